"""Doctor: each fault that it knows is made and found; without one, all is well."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Thread
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from conftest import NOW, make_settings
from servers import ROOT, close, free_port, gunicorn, serving
from test_torrents import torrent_of

import app as bitbreeze

OK, WARNING, FAILURE = bitbreeze.OK, bitbreeze.WARNING, bitbreeze.FAILURE


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


@contextmanager
def served(app):
    """Serve a WSGI application meanwhile; yield its URL."""
    server = make_server("127.0.0.1", 0, app, Threaded, Quiet)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def texts(findings, level):
    return [finding.text for finding in findings if finding.level == level]


# The host


def test_a_good_host(tracker, tmp_path):
    client = tracker(public_ip="203.0.113.1")
    for peer in range(10):
        client.announce(peer, address=f"192.168.2.{peer}")
    findings = list(bitbreeze.check_host(client.app.tracker, time.time()))
    assert {finding.level for finding in findings} == {OK}
    assert "Tracked: any torrent; track is auto." in texts(findings, OK)


def test_it_leaves_nothing_behind(tracker, tmp_path):
    list(bitbreeze.check_host(tracker().app.tracker, time.time()))
    assert not list(tmp_path.iterdir())
    good_torrents(tmp_path)
    list(bitbreeze.check_host(tracker().app.tracker, time.time()))
    assert [path.name for path in tmp_path.iterdir()] == ["torrents"]


# What is tracked. Each makes lists in a folder.


def good_torrents(folder):
    (folder / "torrents").mkdir()
    for name in "abc":
        (folder / f"torrents/{name}.torrent").write_bytes(torrent_of(name))


def bad_torrents(folder):
    (folder / "torrents").mkdir()
    for number in range(14):
        (folder / f"torrents/{number:02}.torrent").write_bytes(b"bad")


def bad_names(folder):
    (folder / "torrents").mkdir()
    for name in (b"\xff", b"\n\x1b[2J", "\u202egnp".encode(), "שלום".encode()):
        (folder / os.fsdecode(b"torrents/" + name + b".torrent")).write_bytes(b"bad")


def allowed(folder):
    (folder / "allow.txt").write_text("aa" * 20 + "\n" + "bb" * 32)


def denied(folder):
    (folder / "deny.txt").write_text("aa" * 20 + "\nbad\n" * 14)


def broken(folder):
    (folder / "torrents").touch()
    (folder / "deny.txt").mkdir()


def doubled(folder):
    good_torrents(folder)
    (folder / "torrents/d\n.torrent").write_bytes(torrent_of("c"))


def wide(folder):
    (folder / "allow.txt").write_bytes(("aa" * 20).encode("utf-16-le"))


def all_good(folder):
    for make in (good_torrents, allowed, denied):
        make(folder)


@pytest.mark.parametrize(
    ("make", "track", "level", "text"),
    [
        (good_torrents, "auto", OK, "Tracked: 3 torrents in {}/torrents; track is aut"),
        (good_torrents, "any", OK, "Tracked: any torrent; track is any."),
        (allowed, "auto", OK, "Tracked: 0 torrents in {}/torrents and 2 of allow.txt;"),
        (denied, "auto", OK, "Tracked: any torrent, but 1 of deny.txt; track is aut"),
        (all_good, "listed", OK, "3 torrents in {}/torrents and 2 of allow.txt, but 1"),
        (denied, "listed", WARNING, "No torrent is tracked: there is no valid one in"),
        (bad_torrents, "auto", WARNING, "No torrent is tracked:"),
        (bad_torrents, "any", WARNING, "{}/torrents/00.torrent is skipped: it is not"),
        (bad_torrents, "any", WARNING, "{}/torrents/09.torrent is skipped: it is not"),
        (bad_torrents, "any", WARNING, "4 more files there are skipped."),
        (bad_names, "any", WARNING, "{}/torrents/⟨U+DCFF⟩.torrent is skipped"),
        (bad_names, "any", WARNING, "/⟨U+000A⟩⟨U+001B⟩[2J.torrent is skipped"),
        (bad_names, "any", WARNING, "{}/torrents/⟨U+202E⟩gnp.torrent is skipped"),
        (bad_names, "any", WARNING, "{}/torrents/שלום.torrent is skipped"),
        (denied, "any", WARNING, "{}/deny.txt, line 2: not 40 or 64 hex digits, nor a"),
        (denied, "any", WARNING, "{}/deny.txt: 4 more lines like these, skipped."),
        (doubled, "any", WARNING, "d⟨U+000A⟩.torrent is skipped: it is the same torre"),
        (wide, "auto", FAILURE, "{}/allow.txt: it cannot be read: it is not text. Sav"),
        (broken, "auto", FAILURE, "{}/torrents: it cannot be read: Not a directory. R"),
        (broken, "auto", FAILURE, "{}/deny.txt: it cannot be read: not a regular file"),
    ],
)  # fmt: skip
def test_lists(tracker, tmp_path, make, track, level, text):
    make(tmp_path)
    examined = tracker(track=track).app.tracker
    findings = list(bitbreeze.check_host(examined, time.time()))
    found = texts(findings, level)
    assert any(text.replace("{}", str(tmp_path)) in each for each in found), findings
    assert len(findings) < 30


def test_a_long_list_takes_no_more_than_its_time(tracker, tmp_path, monkeypatch):
    good_torrents(tmp_path)
    client = tracker(track="listed")
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", itertools.count(0, 2).__next__)
        findings = list(bitbreeze.check_host(client.app.tracker, time.time()))
    assert any("still to be read; track is listed." in t for t in texts(findings, OK))


def no_locks(_, patch):
    patch.setattr(bitbreeze.fcntl, "flock", lambda *_: None)


def no_space(_, patch):
    Space = namedtuple("Space", "f_bavail f_frsize f_favail f_files")
    patch.setattr(bitbreeze.os, "statvfs", lambda _: Space(10, 4096, 10, 100))


def network(client, patch):
    folder = Path(client.app.tracker.store.folder).resolve()
    mounts = folder.parent / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        f"server:/data {folder.parent} autofs rw 0 0\n"
        f"server:/data {folder.parent} nfs4 rw 0 0\n"
        f"tmpfs {folder}-beside tmpfs rw 0 0\n"
        f"tmpfs {folder}/below tmpfs rw 0 0\n"
    )
    patch.setattr(bitbreeze, "MOUNTS", mounts)


@pytest.mark.parametrize(
    ("spoil", "level", "text"),
    [
        (no_locks, FAILURE, "do not exclude other workers"),
        (no_space, WARNING, "has room for 0 MB and 10 files"),
        (network, WARNING, "is on a network file system (nfs4)"),
    ],
)
def test_faults_of_a_host(tracker, monkeypatch, spoil, level, text):
    client = tracker()
    with monkeypatch.context() as patch:
        spoil(client, patch)
        findings = list(bitbreeze.check_host(client.app.tracker, time.time()))
    assert any(text in found for found in texts(findings, level))


def test_a_folder_that_cannot_be_written(tracker, tmp_path):
    (tmp_path / "data").touch()
    version, finding, *_ = bitbreeze.check_host(tracker().app.tracker, NOW)
    assert version.text.startswith(f"This is BitBreeze {bitbreeze.__version__} with ")
    assert finding.level == FAILURE
    assert f"{tmp_path / 'data'} cannot be used: File exists." in finding.text
    assert "set data to a folder on a local disk" in finding.text


# A tracker from outside. Each front is a way to spoil it.


def plain(app):
    return app


def proxy(app):
    def front(environ, start_response):
        forwarded = environ.get("HTTP_X_FORWARDED_FOR")
        entries = [forwarded] if forwarded else []
        entries.append(environ["REMOTE_ADDR"])
        environ["HTTP_X_FORWARDED_FOR"] = ", ".join(entries)
        environ["REMOTE_ADDR"] = "127.0.0.1"
        return app(environ, start_response)

    return front


def careless_proxy(app):
    """It sets X-Forwarded-For unless the client did."""

    def front(environ, start_response):
        environ.setdefault("HTTP_X_FORWARDED_FOR", environ["REMOTE_ADDR"])
        environ["REMOTE_ADDR"] = "127.0.0.1"
        return app(environ, start_response)

    return front


def rewriting(app):
    def front(environ, start_response):
        query = environ["QUERY_STRING"].replace("%ff", "%ef%bf%bd")
        return app({**environ, "QUERY_STRING": query}, start_response)

    return front


def short(app):
    def front(environ, start_response):
        if len(environ["QUERY_STRING"]) > 4000:
            start_response("414 URI Too Long", [("Content-Type", "text/html")])
            return [b"<html>"]
        return app(environ, start_response)

    return front


def caching(app):
    kept = {}

    def front(environ, start_response):
        key = environ["PATH_INFO"], environ["QUERY_STRING"][:70]
        if key not in kept:
            said = []
            body = list(app(environ, lambda *answer: said.extend(answer)))
            kept[key] = said, body
        said, body = kept[key]
        start_response(*said)
        return body

    return front


def answering(status, body=b"", **headers):
    """Return a front that answers everything itself, and always the same."""

    def make(app):
        def front(environ, start_response):
            start_response(status, [("Content-Type", "text/html"), *headers.items()])
            return [body]

        return front

    return make


challenging = answering("403 Forbidden", b"<html>Are you human?")
nonsense = answering("200 OK", "<code>http://\u202e/announce</code>".encode())
moving = answering("302 Found", Location="/announce")


def moved(app):
    def front(environ, start_response):
        path = environ["PATH_INFO"]
        if path.startswith("/new/"):
            environ.update(SCRIPT_NAME="/new", PATH_INFO=path[4:])
            return app(environ, start_response)
        location = f"/new{path}?{environ['QUERY_STRING']}"
        start_response("301 Moved Permanently", [("Location", location)])
        return [b""]

    return front


def showing(path, content, prefix=""):
    """Return a front that hands out a file, and has the tracker below a prefix."""

    def make(app):
        def front(environ, start_response):
            if environ["PATH_INFO"] == path:
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [content]
            asked = environ["PATH_INFO"].removeprefix(prefix)
            return app(
                {**environ, "SCRIPT_NAME": prefix, "PATH_INFO": asked}, start_response
            )

        return front

    return make


wsgi_ini = showing("/wsgi.ini", (ROOT / "wsgi.ini").read_bytes())
stats = showing("/data/stats.json", b'{"counters": {"scrapes": 1}}')
count = showing("/data/swarms.count", bytes(16))
below = showing("/wsgi.ini", b"[tracker]\ndata = /data\n", "/app.py")


def renaming(app):
    """A front page with another URL than clients use, as without Host."""
    return lambda environ, start_response: (
        nonsense(app) if environ["PATH_INFO"] == "/" else app
    )(environ, start_response)


@pytest.mark.parametrize(
    ("front", "settings", "level", "text"),
    [
        (plain, {}, OK, "The tracker sees this machine as 127.0.0.2."),
        (proxy, {"proxies": 1}, OK, "The tracker sees this machine as 127.0.0.2."),
        (proxy, {}, FAILURE, "sees this machine, 127.0.0.2, as 127.0.0.1. If that is"),
        (proxy, {"proxies": 2}, FAILURE, "only 1 of 2 entries in X-Forwarded-For"),
        (plain, {"proxies": 1}, FAILURE, "only 0 of 1 entries in X-Forwarded-For"),
        (careless_proxy, {"proxies": 1, "proxy_networks": "::/0"}, FAILURE,
         "sees this machine, 127.0.0.2, as 127.0.0.1."),
        (careless_proxy, {"proxies": 1}, FAILURE, "client's own X-Forwarded-For"),
        (rewriting, {}, FAILURE, "A scrape of 13 binary hashes fails. Look for rewrit"),
        (short, {}, FAILURE, "A scrape of 60 binary hashes fails. Set gunicorn's --"),
        (caching, {}, FAILURE, "Peers do not find each other. Turn off caches"),
        (challenging, {}, FAILURE, "answer as a tracker: 403 Forbidden. See that it"),
        (nonsense, {}, FAILURE, "answer as a tracker: not a valid bencoded string"),
        (moved, {}, WARNING, "redirects. Give clients http://127.0.0.1:{}/new/announce"),
        (moved, {}, OK, "Clients announce to http://127.0.0.1:{}/new/announce, and it"),
        (moved, {}, OK, "The tracker sees this machine as 127.0.0.2."),
        (moving, {}, FAILURE, "does not answer as a tracker: 302 Found."),
        (wsgi_ini, {}, FAILURE, "Anyone can read http://127.0.0.1:{}/wsgi.ini. "),
        (stats, {}, FAILURE, "Anyone can read http://127.0.0.1:{}/data/stats.json. "),
        (count, {}, FAILURE, "Anyone can read http://127.0.0.1:{}/data/swarms.count. "),
        (below, {}, OK, "Clients announce to http://127.0.0.1:{}/app.py/announce, an"),
        (below, {}, FAILURE, "Anyone can read http://127.0.0.1:{}/wsgi.ini. "),
        (renaming, {}, WARNING, "The front page shows http://⟨U+202E⟩/announce, not"),
    ],
)  # fmt: skip
def test_fronts(tmp_path, front, settings, level, text):
    app = bitbreeze.create_app({"data": str(tmp_path / "data"), **settings})
    with served(front(app)) as url:
        path = "/app.py/announce" if front is below else "/announce?x=1"
        findings = list(bitbreeze.check_url(url + path))
    text = text.replace("{}", url.rpartition(":")[2])
    assert any(text in found for found in texts(findings, level)), findings
    if front in (plain, proxy) and level == OK:
        assert {finding.level for finding in findings} == {OK}
    assert all(finding.text.isprintable() for finding in findings)
    totals = app.tracker.snapshot(int(time.time()))[0]
    # From this cache, a stopped announce is answered, too. No other leaves a peer.
    assert totals["seeders"] + totals["leechers"] == (front is caching)


@pytest.mark.parametrize("event", ["started", "stopped"])
@pytest.mark.parametrize("port", [50001, 50002, 50003])
def test_no_peer_stays(tmp_path, event, port):
    """The other peers are stopped, even if an announce or a stop of one fails."""
    app, failed = bitbreeze.create_app({"data": str(tmp_path)}), []

    def front(environ, start_response):
        body = app(environ, start_response)
        query = environ["QUERY_STRING"]
        if f"port={port}" in query and f"event={event}" in query and not failed:
            failed.append(query)
            return [b"<html>"]  # the peer was announced, but the reply is lost
        return body

    with served(front) as url:
        findings = list(bitbreeze.check_url(url))
    assert failed
    assert (FAILURE in {finding.level for finding in findings}) == (event == "started")
    totals = app.tracker.snapshot(int(time.time()))[0]
    assert totals["seeders"] + totals["leechers"] == 0


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:1/announce", "Connection refused. See that it runs"),
        ("127.0.0.1:1", "http://127.0.0.1:1/announce does not answer as a tracker: "),
        ("http://no.such.name.invalid/", "does not answer as a tracker: "),
        ("ftp://tracker.test/announce", "it is no URL like http://NAME:PORT/announce"),
        ("http://tracker.test:port/", "does not answer as a tracker: Port could not"),
        ("", "it is no URL like http://NAME:PORT/announce"),
        ("http://[::1/", "does not answer as a tracker: Invalid IPv6 URL"),
    ],
)
def test_urls_that_cannot_be_asked(url, text):
    (finding,) = bitbreeze.check_url(url)
    assert finding.level == FAILURE
    assert text in finding.text


# The request of an operator


@pytest.mark.parametrize(
    ("remote", "forwarded", "proxies", "level", "text"),
    [
        ("192.0.2.1", "", 0, OK, "You come from 192.0.2.1."),
        ("10.0.0.1", "192.0.2.1", 1, OK, "You come from 192.0.2.1."),
        ("192.0.2.1", "", 0, OK, "If it is a proxy, set proxies = 1."),
        ("10.0.0.1", "192.0.2.1", 0, FAILURE, "You come from 10.0.0.1. It is a "),
        ("10.0.0.1", "192.0.2.1, 10.0.0.2", 1, FAILURE, "Set proxies = 2."),
        ("10.0.0.1", "192.0.2.1", 2, FAILURE, "only 1 of 2 entries"),
        ("", "", 0, FAILURE, "set proxies = 1"),
    ],
)
def test_requests(remote, forwarded, proxies, level, text):
    settings = make_settings(proxies=proxies)
    environ = {"REMOTE_ADDR": remote, "HTTP_X_FORWARDED_FOR": forwarded}
    (finding,) = bitbreeze.check_request(environ, settings)
    assert finding.level == level
    assert text in finding.text


def test_the_page_is_for_who_has_the_key(tracker):
    assert tracker().get("/doctor", "key=")[0] == "404 NOT FOUND"
    client = tracker(operator_key="secret")
    for query in ("", "key=", "key=Secret", "key=%FF%00"):
        assert client.get("/doctor", query)[0] == "404 NOT FOUND"
    status, headers, body = client.get("/doctor", "key=secret")
    assert status == "200 OK"
    assert headers["Cache-Control"] == "no-store"
    assert b"You come from 192.0.2.1." in body
    assert b"The data folder" in body


def test_the_page_asks_through_the_front_end(tmp_path):
    app = bitbreeze.create_app({"data": str(tmp_path), "operator_key": "secret"})
    with served(app) as url, urlopen(f"{url}/doctor?key=secret&through=1") as page:
        assert b"A scrape of 60 binary hashes passes." in page.read()


# The command


def run(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "app.py", "doctor", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_command_examines_the_host(tmp_path):
    done = run(TRACKER_DATA=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"ok       The data folder {tmp_path} can be written and locked." in done.stdout
    )
    bad_names(tmp_path)
    denied(tmp_path)
    done = run(TRACKER_DATA=str(tmp_path), TRACKER_TORRENTS=str(tmp_path / "torrents"))
    assert done.returncode == 0 and not done.stderr
    assert "/torrents/⟨U+DCFF⟩.torrent is skipped: it is not bencoded." in done.stdout
    assert "deny.txt, line 2: not" in done.stdout
    (tmp_path / "file").touch()
    done = run(TRACKER_DATA=str(tmp_path / "file"))
    assert done.returncode == 1
    assert "\nfailure  The data folder" in done.stdout


def test_the_command_examines_a_url():
    done = run(f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def test_a_server_that_takes_no_long_scrapes(tmp_path):
    port = free_port()
    command = gunicorn(port)
    command[command.index("--limit-request-line") + 1] = "4094"
    with serving(command, port, {"TRACKER_DATA": str(tmp_path)}) as server:
        done = run(server.url)
    assert done.returncode == 1
    assert "failure  A scrape of 60 binary hashes" in done.stdout
    assert done.stdout.count("failure") == 1


# Over UDP


@contextmanager
def over_udp(tmp_path, **settings):
    """Serve UDP, and yield its URL and the tracker."""
    sock = bitbreeze.bound_socket(socket.SOCK_DGRAM, "127.0.0.1", 0)
    folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
    app = bitbreeze.create_app({**folders, **settings}, isolated=True)
    server = bitbreeze.UdpServer(app.tracker, sock)
    thread = Thread(target=server.serve)
    thread.start()
    yield f"udp://127.0.0.1:{sock.getsockname()[1]}", app.tracker
    close(server.sock)
    thread.join()


@pytest.mark.parametrize("path", ["", "/announce", "/KEY/announce?x=1"])
def test_a_good_tracker_over_udp(tmp_path, path):
    with over_udp(tmp_path) as (url, tracker):
        findings = list(bitbreeze.check_url(url + path))
    assert texts(findings, OK) == [
        f"Clients connect to {url}{path} and scrape, and it answers.",
        "The tracker sees this machine as 127.0.0.1.",
    ]
    assert len(findings) == 2
    totals = tracker.snapshot(int(time.time()))[0]
    assert totals["seeders"] + totals["leechers"] == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("udp://127.0.0.1:{closed}/announce", "[Errno 111] Connection refused"),
        ("udp://127.0.0.1:{silent}", "timed out"),
        ("udp://no.such.host.invalid:1", "[Errno "),
        ("udp://127.0.0.1:99999", "Port out of range 0-65535"),
    ],
)
def test_a_tracker_that_is_not_there(monkeypatch, url, reason):
    real = socket.socket.settimeout
    monkeypatch.setattr(socket.socket, "settimeout", lambda s, _: real(s, 0.1))
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        url = url.format(closed=free_port(), silent=silent.getsockname()[1])
        (finding,) = bitbreeze.check_url(url)
    assert finding.level == FAILURE
    assert finding.text.startswith(f"{url} does not answer as a tracker: {reason}")
    assert finding.text.endswith("Containers need -p 6969:6969/udp.")


def test_a_tracker_of_listed_torrents_refuses_a_random_one(tmp_path):
    settings = {"data": tmp_path / "data", "track": "listed"}
    with served(bitbreeze.create_app(settings, isolated=True)) as url:
        found = list(bitbreeze.check_url(url))
    with over_udp(tmp_path, track="listed") as (url, _):
        found += bitbreeze.check_url(url)
    reason = "torrent not registered with this tracker"
    told = f"Addresses cannot be checked: {reason}."
    assert texts(found, WARNING) == [told] * 2 and not texts(found, FAILURE)


def test_a_private_tracker_is_checked_with_a_key(tmp_path):
    (tmp_path / "keys.txt").write_text(f"{'k' * 20} Ana\n")
    settings = {"torrents": tmp_path / "torrents", "private": True}
    app = bitbreeze.create_app({**settings, "data": tmp_path / "data"}, isolated=True)
    with served(app) as url:
        found = list(bitbreeze.check_url(f"{url}/{'k' * 20}/announce"))
        (refused,) = texts(bitbreeze.check_url(f"{url}/announce"), FAILURE)
    assert {finding.level for finding in found} == {OK}
    assert "403" in refused
