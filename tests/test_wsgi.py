"""WSGI entry point: paths, methods, errors, system calls, and CGI."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections import Counter
from types import BuiltinFunctionType

import bencoder
import pytest
from conftest import escape, peer_id

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
    "path", ["/announcement", "/announce.html", "/peers", "/announce/x/y"]
)
def test_other_paths_are_not_found(tracker, path):
    assert tracker().get(path, QUERY)[0] == "404 NOT FOUND"


@pytest.mark.parametrize("path", ["/announce", "/scrape"])
def test_head_is_answered_and_changes_nothing(tracker, path):
    client = tracker()
    status, headers, body = client.get(path, QUERY, method="HEAD")
    assert (status, body) == ("200 OK", b"")
    assert headers["Content-Type"] == client.get(path, QUERY)[1]["Content-Type"]
    client = tracker(data=f"{client.app.tracker.store.folder}-2")
    client.get(path, QUERY, method="HEAD")
    assert client.app.tracker.snapshot(0)[0]["swarms"] == 0


@pytest.mark.parametrize(
    "path", ["/announce", "/scrape", "/announce.php", "/KEY/scrape"]
)
@pytest.mark.parametrize(
    ("query", "accept"), [("", ""), ("", "text/html,*/*"), ("x=1", "text/html")]
)
def test_a_browser_is_led_to_the_front_page(tracker, path, query, accept):
    for script_name, url, location in (
        ("", "", "/"),
        ("/a b", "", "/a%20b/"),
        ("/a", "https://tracker.test/x", "https://tracker.test/x/"),
    ):
        environ = {"SCRIPT_NAME": script_name, "HTTP_ACCEPT": accept}
        status, headers, _ = tracker(url=url).get(path, query, **environ)
        assert (status, headers["Location"]) == ("302 Found", location)


@pytest.mark.parametrize("path", ["/announce", "/scrape"])
def test_a_client_is_never_redirected(tracker, path):
    assert tracker().get(path, QUERY, HTTP_ACCEPT="text/html")[0] == "200 OK"
    assert tracker().get(path, "x=1", HTTP_ACCEPT="*/*")[0] == "200 OK"


def test_an_announce_to_the_front_page_names_the_announce_url(tracker):
    for url, named in (
        ("", b"http://tracker.test/announce"),
        ("https://other.test/x", b"https://other.test/x/announce"),
    ):
        status, headers, body = tracker(url=url).get("/", QUERY)
        reason = bencoder.bdecode(body)[b"failure reason"]
        assert status == "200 OK" and headers["Content-Type"].startswith("text/plain")
        assert reason == b"this is not the announce URL. Use " + named


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/announce", "/scrape", "/"])
def test_other_methods_are_not_allowed(tracker, method, path):
    status, headers, _ = tracker().get(path, QUERY, method=method)
    assert status.upper() == "405 METHOD NOT ALLOWED"
    assert "GET" in headers["Allow"]


def test_flask_test_client_uses_the_same_entry(tmp_path):
    app = bitbreeze.create_app({"data": str(tmp_path)})
    reply = app.test_client().get("/announce?" + QUERY)
    assert bencoder.bdecode(reply.data)[b"complete"] == 1


def test_refusals_are_200_with_a_reason(tracker):
    status, _, body = tracker().get("/announce", "info_hash=" + "ab" * 20)
    assert status == "200 OK"
    reply = bencoder.bdecode(body)
    assert reply[b"failure reason"] == b"info_hash must be 20 bytes, not 40: is it hex?"
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
            assert caplog.text.count("failed (logged once a minute)") == logged
            now[0] += 30
        patch.setattr(client.app.tracker.store, "announce", lambda *_: 1 / 0)
        client.get("/announce", QUERY)
    assert "ZeroDivisionError" in caplog.text  # another kind is told at once


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_without_locks_announces_are_refused(tracker, caplog, monkeypatch, number):
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
    assert sum(each.startswith("'announce over http' failed") for each in told) == 1
    assert len(told) <= 3  # the statistics have a file, too
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
    done = cgi(tmp_path, "/announce", query="x=1")
    assert b"info_hash is missing" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("path", ["/announce", "/"])
def test_cgi_tells_the_error_log_of_a_bad_setting(tmp_path, path):
    done = cgi(tmp_path, path, TRACKER_INTERVAL="soon")
    assert done.returncode == 1
    assert done.stderr.startswith(b"app.py: the environment sets interval to 'soon'")
    assert len(done.stderr.splitlines()) == 1


# -- System calls: a slower way shows here, without a clock


class Counting:
    """A module whose system calls are counted by name."""

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
    """Return the number of system calls that ``act`` makes, by name."""
    calls = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze, "os", Counting(os, calls))
        patch.setattr(bitbreeze, "fcntl", Counting(fcntl, calls))
        act()
    return dict(calls)


# Peers in the swarm, what is announced, and how many pages may be read.
ANNOUNCES = {
    "a known peer": (20, {}, 1),
    "a new peer": (20, {"peer": 21}, 1),
    "a peer that leaves": (20, {"event": "stopped"}, 1),
    "a known peer over IPv6": (20, {"address": "2001:db8::1"}, 1),
    "a known peer of many pages": (1000, {}, 24),
}


@pytest.mark.parametrize(
    ("peers", "fields", "pages"), ANNOUNCES.values(), ids=ANNOUNCES
)
def test_system_calls_of_an_announce(tracker, monkeypatch, peers, fields, pages):
    client = warm_client(tracker, monkeypatch, peers, "btrfs")
    calls = calls_of(lambda: client.announce(**{"peer": 7, **fields}), monkeypatch)
    assert calls.pop("flock") == 2  # lock and unlock
    assert 1 <= calls.pop("pread") <= pages
    assert calls == {"pwrite": 1}


@pytest.mark.parametrize(
    ("peers", "fields"), [each[:2] for each in ANNOUNCES.values()], ids=ANNOUNCES
)
def test_system_calls_of_an_announce_in_a_mapped_file(
    tracker, monkeypatch, peers, fields
):
    client = warm_client(tracker, monkeypatch, peers, "ext4")
    calls = calls_of(lambda: client.announce(**{"peer": 7, **fields}), monkeypatch)
    # One looks at the size: to read beyond the end of the file would kill the process.
    expected = {"flock": 2, "lseek": 1}
    assert calls == (expected | {"pwrite": 1} if fields else expected)


def test_system_calls_of_a_scrape(tracker, monkeypatch):
    client = warm_client(tracker, monkeypatch, 20, "btrfs")
    calls = calls_of(lambda: client.scrape(b"h" * 20), monkeypatch)
    assert calls == {"flock": 2, "pread": 1}


def warm_client(tracker, monkeypatch, peers, disk):
    """Return the client of a tracker on a file system, with no maintenance due."""
    monkeypatch.setattr(bitbreeze, "file_system", lambda folder: disk)
    monkeypatch.setattr(bitbreeze.time, "time", lambda: 1_900_000_000)
    client = tracker()
    for peer in range(1, peers + 1):
        client.announce(peer)
    client.announce(7)
    return client


def test_system_calls_in_a_new_second(tracker, monkeypatch):
    """A new second costs only a look at the lists."""
    client, now = tracker(), [1_900_000_000]
    monkeypatch.setattr(bitbreeze.time, "time", lambda: now[0])
    client.announce(7)
    now[0] += 1
    client.announce(7)
    now[0] += 1
    found = calls_of(lambda: client.announce(7), monkeypatch)
    assert sum(found.values()) <= 16, found
