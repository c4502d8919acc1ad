"""Door: paths, methods and errors, and a process for every request (CGI)."""

import errno
import fcntl
import logging
import os
import socket
import ssl
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, nullcontext
from types import BuiltinFunctionType

import bencoder
import pytest
from conftest import escape, peer_id
from servers import announce, announce_path, free_port, gunicorn, serving

import app as bitbreeze

QUERY = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881&left=0"


@pytest.mark.parametrize(
    "path",
    [
        "/announce",
        "/announce/",
        "/announce.php",
        "/announce.php/",
        "//announce",
        "/x/announce",
    ],
)
def test_announce_paths(tracker, path):
    status, headers, body = tracker().get(path, QUERY)
    assert status == "200 OK"
    assert bencoder.bdecode(body)[b"complete"] == 1
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/scrape", "/scrape/", "/scrape.php"])
def test_scrape_paths(tracker, path):
    assert b"files" in bencoder.bdecode(tracker().get(path, QUERY)[2])


@pytest.mark.parametrize(
    "path", ["/announcement", "/announce.html", "/peers", "/announce/x"]
)
def test_other_paths_are_not_found(tracker, path):
    assert tracker().get(path, QUERY)[0] == "404 NOT FOUND"


def test_head_is_get_without_body(tracker):
    client = tracker()
    status, headers, body = client.get("/announce", QUERY, method="HEAD")
    assert (status, body) == ("200 OK", b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/announce", "/scrape", "/"])
def test_other_methods_are_not_allowed(tracker, method, path):
    status, headers, _ = tracker().get(path, QUERY, method=method)
    assert status.upper() == "405 METHOD NOT ALLOWED"
    assert "GET" in headers["Allow"]


def test_flask_test_client_passes_the_same_door(tmp_path):
    app = bitbreeze.create_app({"data": str(tmp_path)})
    reply = app.test_client().get("/announce?" + QUERY)
    assert bencoder.bdecode(reply.data)[b"complete"] == 1


def test_gunicorns_sync_worker_waits_for_nobody_to_hang_up(tmp_path):
    """It would for two seconds, and the last of these would be told after a minute."""
    port = free_port()
    path = announce_path(b"h" * 20, peer_id(1), 6881)
    with (
        serving(gunicorn(port, 1, 1), port, {"TRACKER_DATA": str(tmp_path)}) as server,
        ExitStack() as opened,
    ):
        for _ in range(30):
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            opened.enter_context(client)
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert announce(server.url, b"h" * 20, peer_id(2), 6882)[b"incomplete"] == 2
        answer = b"".join(iter(lambda: client.recv(9999), b""))
        assert b"Connection: close" in answer and b"d8:complete" in answer


def _plain(each):
    return each


def _encrypted(each):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return context.wrap_socket(each, server_side=True, do_handshake_on_connect=False)


@pytest.mark.parametrize(
    ("kind", "is_kept", "is_read"),
    [
        (_plain, False, False),
        (_plain, True, True),  # a thread of gunicorn's may wait for the next request
        (_encrypted, False, True),  # Python would go on in clear
    ],
)
def test_what_is_read_no_more(tracker, kind, is_kept, is_read):
    ours, client = socket.socketpair()
    with client, kind(ours) as ours:
        ours.setblocking(False)
        asked = {"gunicorn.socket": ours, "wsgi.multithread": is_kept}
        assert b"d8:complete" in tracker().get("/announce", QUERY, **asked)[2]
        with pytest.raises(BlockingIOError) if is_read else nullcontext():
            assert not os.read(ours.fileno(), 1)


def test_a_client_that_has_gone_is_no_fault(tracker, caplog):
    with socket.socket() as ours:  # not connected
        asked = {"gunicorn.socket": ours, "wsgi.multithread": False}
        assert b"d8:complete" in tracker().get("/announce", QUERY, **asked)[2]
    assert not caplog.text


def test_refusals_are_200_with_a_reason(tracker):
    status, _, body = tracker().get("/announce", "info_hash=" + "ab" * 20)
    assert status == "200 OK"
    reply = bencoder.bdecode(body)
    assert (
        reply[b"failure reason"]
        == b"info_hash must be 20 bytes, these are 40: is it hex?"
    )
    assert (reply[b"interval"], reply[b"min interval"], reply[b"retry in"]) == (
        1800,
        300,
        30,
    )


def test_our_faults_are_logged_once_and_not_shown(tracker, caplog, monkeypatch):
    client = tracker()
    with monkeypatch.context() as patch:
        patch.setattr(client.app.tracker.store, "announce", lambda *_: {}["secret"])
        reply = client.announce(1)
    assert reply[b"failure reason"] == b"internal error"
    assert b"interval" in reply
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "KeyError: 'secret'" in caplog.text
    assert client.announce(1)[b"incomplete"] == 1


@pytest.mark.parametrize("path", ["/announce", "/stats.json"])
def test_a_fault_that_repeats_is_logged_once_a_minute(
    tracker, caplog, monkeypatch, path
):
    client, now = tracker(), [1_900_000_000]
    monkeypatch.setattr(bitbreeze.time, "time", lambda: now[0])
    with monkeypatch.context() as patch:
        for method in ("announce", "swarms"):
            patch.setattr(client.app.tracker.store, method, lambda *_: {}["secret"])
        for logged in (1, 2, 3):
            for _ in range(30):
                assert b"secret" not in client.get(path, QUERY)[2]
                now[0] += 1
            assert len(caplog.records) == logged
            now[0] += 30
        patch.setattr(client.app.tracker.store, "announce", lambda *_: 1 / 0)
        client.get("/announce", QUERY)
    assert "ZeroDivisionError" in caplog.text  # another kind is told at once


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_without_locks_nobody_is_kept_and_that_is_said(
    tracker, caplog, monkeypatch, number
):
    client = tracker()
    client.announce(1)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze.fcntl, "flock", flock)
        for peer in range(20):
            reply = client.announce(peer)
            assert reply[b"failure reason"] == bitbreeze.DISK_FAILS.encode()
            assert b"interval" in reply
        assert client.get("/health")[0] == "503 SERVICE UNAVAILABLE"
        status, _, body = client.get("/stats.json")
        assert status == "503 SERVICE UNAVAILABLE"
        assert b"This tracker cannot read or write its data" in body
    told = [each.getMessage() for each in caplog.records]
    assert len([each for each in told if each.startswith("/announce failed")]) == 1
    assert len(told) <= 3  # the counters and the history have files, too
    assert client.announce(2)[b"incomplete"] == 2
    assert client.get("/health")[0] == "200 OK"


def cgi(folder, path, query=QUERY, method="GET", **environ):
    """Run app.py as a web server runs a CGI program; return its headers and body."""
    kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    return subprocess.run(
        [sys.executable, bitbreeze.__file__],
        env={
            **kept,
            "GATEWAY_INTERFACE": "CGI/1.1",
            "TRACKER_DATA": str(folder / "data"),
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "/cgi-bin/app.py",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REMOTE_ADDR": "192.0.2.1",
            "SERVER_NAME": "tracker.test",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            **environ,
        },
        capture_output=True,
        timeout=20,
    )


def test_cgi_answers_an_announce_without_flask(tmp_path):
    done = cgi(tmp_path, "/announce", PYTHONPROFILEIMPORTTIME="1")
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"Status: 200 OK")
    assert bencoder.bdecode(body)[b"complete"] == 1
    imported = {line.split(b"|")[-1].strip() for line in done.stderr.splitlines()}
    assert b"bencoder" in imported
    assert imported.isdisjoint({b"flask", b"werkzeug", b"jinja2", b"click"})


def test_cgi_answers_scrapes_and_pages(tmp_path):
    assert cgi(tmp_path, "/announce").returncode == 0
    assert b"8:completei1e" in cgi(tmp_path, "/scrape").stdout
    front = cgi(tmp_path, "/", query="").stdout
    assert front.startswith(b"Status: 200 OK")
    assert b"http://tracker.test/cgi-bin/app.py/announce" in front


def test_cgi_answers_a_bad_announce_with_a_reason(tmp_path):
    done = cgi(tmp_path, "/announce", query="")
    assert b"info_hash is missing" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("path", ["/announce", "/"])
def test_cgi_tells_the_error_log_of_a_bad_setting(tmp_path, path):
    done = cgi(tmp_path, path, TRACKER_INTERVAL="soon")
    assert done.returncode == 1
    assert done.stderr.startswith(b"app.py: the environment sets interval to 'soon'")
    assert len(done.stderr.splitlines()) == 1


# -- What the system is asked for an answer: more of it shows here, without a clock


class Counting:
    """A module, of which every call to the system is counted by its name."""

    def __init__(self, module, calls):
        self.module, self.calls = module, calls

    def __getattr__(self, name):
        found = getattr(self.module, name)
        if not isinstance(found, BuiltinFunctionType) or name == "fspath":
            return found

        def call(*given, **more):
            self.calls[name] += 1
            return found(*given, **more)

        return call


def calls_of(act, monkeypatch):
    """Return how often ``act`` calls the system, by name."""
    calls = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze, "os", Counting(os, calls))
        patch.setattr(bitbreeze, "fcntl", Counting(fcntl, calls))
        act()
    return dict(calls)


# How many peers there are, what is asked, how many pages are read at the most, and how
# many writes are left where files are mapped. There, nothing is read; elsewhere, both
# the swarm and the counters are always written.
ANSWERS = {
    "a peer who is still there": (20, {}, 1, 0),
    "a new peer": (20, {"peer": 21}, 1, 1),
    "a peer who goes": (20, {"event": "stopped"}, 1, 1),
    "a peer over IPv6": (20, {"address": "2001:db8::1"}, 1, 1),
    "a peer in a swarm of many pages": (1000, {}, 7, 0),
}


@pytest.mark.parametrize("is_mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize(
    ("peers", "said", "pages", "writes"), ANSWERS.values(), ids=ANSWERS
)
def test_what_the_system_is_asked(
    tracker, monkeypatch, peers, said, pages, writes, is_mapped
):
    """One look at a swarm and one change of it; and one change of the counters."""
    client = a_client_of(tracker, monkeypatch, peers, is_mapped)
    found = calls_of(lambda: client.announce(**{"peer": 7, **said}), monkeypatch)
    assert found.pop("flock") == 2  # a lock, and its end
    if is_mapped:
        assert found.pop("lseek") == 2
        assert found.pop("pwrite", 0) == writes
    else:
        assert 1 <= found.pop("pread") <= pages
        assert found.pop("pwrite") == 2
    assert not found


def test_what_the_system_is_asked_about_one_of_many_swarms(tracker, monkeypatch):
    """No file is opened, though nothing of the swarm is remembered."""
    monkeypatch.setattr(bitbreeze, "KNOWN_AT_MOST", 0)
    client = a_client_of(tracker, monkeypatch, 20, is_mapped=True)
    found = calls_of(lambda: client.announce(7), monkeypatch)
    assert found == {"flock": 2, "lseek": 3}


def test_what_the_system_is_asked_for_a_scrape(tracker, monkeypatch):
    client = a_client_of(tracker, monkeypatch, 20, is_mapped=True)
    found = calls_of(lambda: client.scrape(b"h" * 20), monkeypatch)
    assert found == {"lseek": 2}


def a_client_of(tracker, monkeypatch, peers, is_mapped):
    """Return the client of a tracker that has done whatever is due once, or seldom."""
    monkeypatch.setattr(bitbreeze, "_is_mappable", lambda _: is_mapped)
    now = [1_900_000_000]
    monkeypatch.setattr(bitbreeze.time, "time", lambda: now[0])
    client = tracker()
    for peer in range(1, peers + 1):
        client.announce(peer)
    now[0] += 1  # counters are mapped from the second second on
    for _ in range(5):
        client.announce(7)
    return client


def test_what_the_system_is_asked_in_a_second(tracker, monkeypatch):
    """A new second costs no more than a look at the lists, and at the counters."""
    client, now = tracker(), [1_900_000_000]
    monkeypatch.setattr(bitbreeze.time, "time", lambda: now[0])
    client.announce(7)
    now[0] += 1
    client.announce(7)
    now[0] += 1
    found = calls_of(lambda: client.announce(7), monkeypatch)
    assert sum(found.values()) <= 16, found
