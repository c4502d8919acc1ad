"""Commands: python app.py, and what it says."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from urllib.request import urlopen

import psutil
import pytest
from servers import (
    ROOT,
    announce,
    free_port,
    has_ipv6,
    poll,
    scrape,
    serving,
)
from test_torrents import torrent_of

import app as bitbreeze

APP = [sys.executable, "app.py"]
HASHES = [bytes((number,)) * 20 for number in range(130, 190)]
PEER = b"-COMMAND-a client---"


def test_app_serves_until_it_is_interrupted(tmp_path):
    port = free_port()
    with serving([*APP, "--port", port], port, data(tmp_path)) as server:
        assert f":{port}/announce" in server.log()
        assert str(tmp_path / "data") in server.log()
        assert "  tracked are   any torrent\n" in server.log()
        check_answers(server)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        poll(lambda: not server.workers(), 10, "the end of the workers")
        assert "Traceback" not in server.log()


def test_app_says_what_is_tracked(tmp_path):
    port, torrents = free_port(), tmp_path / "torrents"
    torrents.mkdir()
    for name in ("a", "b"):
        (torrents / f"{name}.torrent").write_bytes(torrent_of(name))
    (torrents / "c.torrent").write_bytes(b"bad")
    (tmp_path / "allow.txt").write_text(HASHES[0].hex())
    (tmp_path / "deny.txt").write_text("bad")
    env = {**data(tmp_path), "TRACKER_TORRENTS": str(torrents)}
    command = [*APP, "--host", "127.0.0.1", "--port", port]
    with serving(command, port, env) as server:
        assert (
            f"  tracked are   2 torrents in {torrents} and 1 of allow.txt;"
            " 1 files are skipped; the lists have faults: see app.py doctor\n"
        ) in server.log()


@pytest.mark.parametrize(
    ("each", "words"), [(0.1, "3 torrents in {}"), (0.3, "2 torrents in {}; 1 files")]
)
def test_the_start_does_not_wait_for_long_lists(tmp_path, monkeypatch, each, words):
    for name in "abc":
        (tmp_path / f"{name}.torrent").write_bytes(torrent_of(name))
    folders = {"data": str(tmp_path / "data"), "torrents": str(tmp_path)}
    tracker = bitbreeze.create_app(folders).tracker
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", itertools.count(0, each).__next__)
        greeting = bitbreeze._greeting("127.0.0.1", 1, tracker)
    assert f"  tracked are   {words.format(tmp_path)}" in greeting


def test_app_ends_when_ctrl_c_reaches_all_its_processes(tmp_path):
    port = free_port()
    with serving([*APP, "--port", port], port, data(tmp_path)) as server:
        server.signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_app_answers_over_ipv4_and_ipv6(tmp_path):
    port = free_port()
    with serving([*APP, "--port", port], port, data(tmp_path)):
        for url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            announce(url, HASHES[0], PEER, 7000, left=0)
        asked = announce(f"http://[::1]:{port}", HASHES[0], PEER[::-1], 7001, left=1)
        assert asked[b"complete"] == 1
        assert asked[b"peers6"] == bytes(15) + b"\1" + (7000).to_bytes(2, "big")


def test_app_listens_where_it_is_told(tmp_path):
    port = free_port()
    command = [*APP, "--host", "127.0.0.1", "--port", port, "--workers", 3]
    with serving(command, port, data(tmp_path)) as server:
        assert f"http://127.0.0.1:{port}/announce" in server.log()
        poll(lambda: len(server.workers()) == 3, 10, "three workers")
        if has_ipv6():
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("::1", port))


@pytest.mark.parametrize(
    ("said", "number", "answer"),
    [
        (b"GET /announce?info_hash=", 600, b""),  # more than a worker waits for
        (b"GET /stats.json HTTP/1.1\r\n\r\n", 50, b"HTTP/1.1 200"),
        (b"GET /stats.json HTTP/1.1\r\n\r\nGET /", 50, b"HTTP/1.1 200"),
        (b"GET /announce?x=" + b"y" * 50_000, 50, b"HTTP/1.1 431"),
    ],
)
def test_one_worker_withstands_many_who_do_not_go(tmp_path, said, number, answer):
    port = free_port()
    command = [*APP, "--host", "127.0.0.1", "--port", port, "--workers", 1]
    with ExitStack() as opened:
        server = opened.enter_context(serving(command, port, data(tmp_path)))
        others = []
        for _ in range(number):
            other = socket.create_connection(("127.0.0.1", port), timeout=10)
            others.append(opened.enter_context(other))
            with suppress(OSError):  # it need not be listened to the end
                other.sendall(said)
        started = time.monotonic()
        check_answers(server)
        assert time.monotonic() - started < 5
        with suppress(ConnectionResetError):
            assert others[0].recv(12) == answer
        [worker] = map(psutil.Process, server.workers())
        assert worker.num_fds() < 300 + 2 * len(HASHES)
        assert worker.cpu_percent(0.5) < 50  # nor does it turn round and round
        assert "Traceback" not in server.log()


def test_a_request_may_come_byte_by_byte_or_never(tmp_path):
    port = free_port()
    command = [*APP, "--host", "127.0.0.1", "--port", port, "--workers", 1]
    with serving(command, port, data(tmp_path)) as server:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"GET /stats.json HTTP/1.1\r\nHost: a\r\n\r\n":
                client.send(bytes((byte,)))
            assert client.recv(12) == b"HTTP/1.1 200"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET /announce")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        check_answers(server)


def test_help_names_the_commands_and_options():
    assert "serve" in run("--help").stdout
    ended = run("serve", "--help")
    assert ended.returncode == 0
    for option in ("--host", "--port", "--workers", "6969"):
        assert option in ended.stdout


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("--port", port, TRACKER_DATA=tmp_path / "data")
    check_sentence(ended, f"port {port}")


def test_a_data_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "data"
    ended = run("--port", free_port(), TRACKER_DATA=folder)
    check_sentence(ended, str(folder))
    assert "TRACKER_DATA" in ended.stderr


@pytest.mark.parametrize("value", ["30m", "-1", ""])
def test_a_bad_setting(value):
    check_sentence(run(TRACKER_INTERVAL=value), "interval")


def test_a_setting_that_does_not_exist():
    check_sentence(run(TRACKER_INTERVALL="30"), "intervall")


@pytest.mark.parametrize("options", [["--port", "many"], ["--nothing"], ["nothing"]])
def test_bad_options(options, tmp_path):
    ended = run(*options, TRACKER_DATA=tmp_path / "data")
    assert ended.returncode == 2
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_uwsgi_serves_on_6969_unless_told_otherwise():
    settings = [line.strip() for line in (ROOT / "wsgi.ini").read_text().splitlines()]
    assert "port = 6969" in settings
    assert "http = %(host):%(port)" in settings


def check_answers(server):
    """Fail unless a server answers announces, a scrape of 60, and the front page."""
    announce(server.url, HASHES[7], PEER, 7000, left=0)
    reply = announce(server.url, HASHES[7], PEER[::-1], 7001, left=1)
    assert reply[b"peers"] == b"\x7f\0\0\1" + (7000).to_bytes(2, "big")
    files = scrape(server.url, *HASHES)[b"files"]
    assert set(files) == set(HASHES)
    assert files[HASHES[7]][b"complete"] == files[HASHES[7]][b"incomplete"] == 1
    with urlopen(server.url, timeout=20) as response:
        assert b"/announce" in response.read()


def data(folder):
    return {"TRACKER_DATA": str(folder / "data")}


def run(*options, **settings):
    """Run app.py until it ends by itself; return how it ended."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("TRACKER_")}
    return subprocess.run(
        [*APP, *map(str, options)],
        cwd=ROOT,
        env={**kept, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=20,
    )


def check_sentence(ended, part):
    """Fail unless a command ended with one line that says what is wrong."""
    assert ended.returncode not in (0, None)
    assert part in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not ended.stdout
