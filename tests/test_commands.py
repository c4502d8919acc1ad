"""Commands: python app.py, and what it says."""

import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from threading import Event, Thread
from urllib.request import urlopen

import click
import psutil
import pytest
from conftest import kept, rewrite
from servers import (
    ROOT,
    announce,
    free_port,
    gunicorn,
    has_ipv6,
    poll,
    scrape,
    serving,
)
from test_archive import DOCUMENT, peers_of, write
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


COLLECTS = """
import gc, os, app, psutil

def own():
    return psutil.Process().memory_full_info().uss

if not os.fork():
    before = own()
    gc.collect()
    print(own() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell what is shared")
def test_a_forked_worker_shares_what_was_loaded_also_after_a_collection(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", COLLECTS],
        cwd=ROOT, env={**os.environ, **data(tmp_path)}, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert int(out) < 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="others do not count packets")
@pytest.mark.parametrize("threads", [1, 4], ids=["sync", "gthread"])
def test_an_answer_is_one_packet(tmp_path, threads):
    port = free_port()
    command = [*gunicorn(port, 1, threads), "-c", "app.py"]
    with serving(command, port, data(tmp_path)):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /stats.json HTTP/1.1\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(9999), b""))
            told = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}\n")
    assert int.from_bytes(told[152:156], sys.byteorder) == 1  # tcpi_data_segs_in


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


# -- export and import


def now_document(number=2):
    """Return a document with peers of now, in one swarm, and two hours of history."""
    now = int(time.time())
    peers = [(record._replace(seen4=now), False) for record, _ in peers_of(number)]
    samples = [bitbreeze.Sample(1, 2, 3, now - hour * 3600) for hour in (2, 1)]
    return write([(HASHES[0], 5, peers)], samples)[0]


def test_what_is_exported_can_be_imported(tmp_path):
    document = now_document()
    (tmp_path / "given").write_text(document)
    folder, other = tmp_path / "data", tmp_path / "other"
    words = " 1 swarms with 2 peers and 2 hours of history.\n"
    ended = run("import", tmp_path / "given", TRACKER_DATA=folder)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "Merged are" + words
    ended = run("export", tmp_path / "file", TRACKER_DATA=folder)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "Exported are" + words
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    piped = run("export", TRACKER_DATA=folder)
    assert piped.stdout.splitlines()[1:] == document.splitlines()[1:]
    for _ in range(2):
        ended = run("import", "-", typed=piped.stdout, TRACKER_DATA=other)
        assert ended.returncode == 0
        again = run("export", TRACKER_DATA=other)
        assert again.stdout.splitlines()[1:] == piped.stdout.splitlines()[1:]
    assert sorted(os.listdir(tmp_path)) == ["data", "file", "given", "other"]


def test_export_does_not_write_over_a_file(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("precious")
    ended = run("export", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    check_sentence(ended, "file is there already: see --force")
    assert (tmp_path / "file").read_text() == "precious"
    ended = run("export", "--force", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    assert ended.returncode == 0
    assert json.loads((tmp_path / "file").read_text())["swarms"] == []


@pytest.mark.parametrize(
    ("path", "data", "part"),
    [
        ("file", "none", "there is no {}/none: set data as the server has it"),
        ("no/file", "data", "nothing is exported: {}/no/file."),
        ("data", "data", "{}/data is there already"),
    ],
)
def test_export_fails_in_a_sentence(tmp_path, path, data, part):
    (tmp_path / "data").mkdir()
    ended = run("export", tmp_path / path, TRACKER_DATA=tmp_path / data)
    check_sentence(ended, part.format(tmp_path))
    assert ended.returncode == 1
    assert os.listdir(tmp_path) == ["data"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        with bitbreeze._new_file(str(tmp_path / "file"), False) as file:
            file.write("x")
    assert os.listdir(tmp_path) == []


def test_export_says_that_newer_swarms_are_left_out(tmp_path):
    (tmp_path / "file").write_text(now_document())
    run("import", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    (info_hash,) = kept(tmp_path / "data")
    rewrite(tmp_path / "data", info_hash, lambda page: b"swrm\x02" + page[5:])
    ended = run("export", tmp_path / "new", TRACKER_DATA=tmp_path / "data")
    assert ended.returncode == 1
    assert "was written by a newer BitBreeze" in ended.stderr
    assert "not among them: export with that\n" in ended.stderr
    assert json.loads((tmp_path / "new").read_text())["swarms"] == []


def test_whoever_has_seen_enough_of_an_export_may_go(tmp_path):
    (tmp_path / "file").write_text(now_document(5000))
    run("import", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    ended = subprocess.run(
        f"{sys.executable} app.py export | head -c 10",
        cwd=ROOT,
        env={**os.environ, **data(tmp_path)},
        shell=True,
        capture_output=True,
        timeout=20,
    )
    assert ended.stdout == b'{"format":'
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "file: No such file"),
        ("<html>", "nothing is merged, {}/file: it is not JSON"),
        (DOCUMENT[:-3], "nothing is merged, {}/file: it is cut short in line 6"),
        (DOCUMENT.replace('"snatches": 9', '"snatches": -9'), "file: line 5: snatches"),
        (
            DOCUMENT.replace('ion": 1', 'ion": 2'),
            "newer BitBreeze, in format 2: upgrade",
        ),
    ],
)
def test_nothing_is_imported_of_a_bad_file(tmp_path, text, part):
    if text is not None:
        (tmp_path / "file").write_text(text)
    ended = run("import", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    check_sentence(ended, part.format(tmp_path))
    assert ended.returncode == 1
    assert not (tmp_path / "data").exists()


def broken():
    raise OSError(28, "No space left on device", "a file")


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("end", "part"),
    [(broken, "a file: No space left on device"), (interrupted, "Ctrl-C")],
)
def test_an_import_that_stops_says_where(tmp_path, end, part):
    settings = bitbreeze.load_settings({"data": str(tmp_path)}, {}, os.devnull)
    merging = bitbreeze.Merging(bitbreeze.open_tracker(settings))
    entries = bitbreeze.read_archive(io.BytesIO(now_document().encode()))
    with pytest.raises(click.ClickException) as raised:
        bitbreeze._merge_all(merging, itertools.chain(entries, iter(end, None)))
    assert str(raised.value) == (
        f"stopped by {part}. Merged are 1 swarms with 2 peers and 2 hours of history."
        " Import it again for the rest"
    )


def test_root_does_not_write_what_the_server_cannot_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    real = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path: os.stat_result([*real(path)[:4], 33, *real(path)[5:]])
    )
    with pytest.raises(click.ClickException, match="with sudo -u '#33'"):
        bitbreeze._check_user(tmp_path)
    bitbreeze._check_user(tmp_path / "none")


def test_progress_is_for_terminals_only(monkeypatch, capsys):
    assert list(bitbreeze._with_progress(range(3), "done")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    assert list(bitbreeze._with_progress(range(3), "done")) == [0, 1, 2]
    assert "\r3 done" in capsys.readouterr().err


def test_a_tracker_moves_while_both_serve(tmp_path):
    """Whoever was acknowledged before the export is met at the other tracker."""
    here, there = tmp_path / "here", tmp_path / "there"
    ports = free_port(), free_port()
    with (
        serving(gunicorn(ports[0]), ports[0], {"TRACKER_DATA": str(here)}) as old,
        serving(gunicorn(ports[1]), ports[1], {"TRACKER_DATA": str(there)}) as new,
    ):
        known, is_over = [], Event()

        def announce_on():
            while not is_over.is_set():
                number = len(known)
                who = b"-MOVING-%012d" % number
                left = {"left": 0, "event": "completed"} if number % 2 else {"left": 1}
                announce(old.url, HASHES[number % 3], who, 2000 + number, **left)
                known.append(number)

        clients = Thread(target=announce_on)
        clients.start()
        try:
            poll(lambda: len(known) > 300, 60, "300 announces")
            before = len(known)
            ended = run("export", tmp_path / "file", TRACKER_DATA=here)
            announce(new.url, HASHES[0], b"-HERE---------------", 1999, left=1)
            assert ended.returncode == 0, ended.stderr
            ended = run("import", tmp_path / "file", TRACKER_DATA=there)
            assert ended.returncode == 0, ended.stderr
        finally:
            is_over.set()
            clients.join()
        met = set()
        for info_hash in HASHES[:3]:
            for _ in range(50):
                asked = {"left": 1, "numwant": 100}
                reply = announce(new.url, info_hash, PEER, 7000, **asked)[b"peers"]
                met |= {int.from_bytes(reply[i + 4 : i + 6], "big") - 2000
                        for i in range(0, len(reply), 6)}  # fmt: skip
        assert met - {-1} >= set(range(before))
        snatches = scrape(new.url, *HASHES[:3])[b"files"].values()
        assert sum(each[b"downloaded"] for each in snatches) >= before // 2
        assert "Traceback" not in old.log() + new.log()


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


def run(*options, typed=None, **settings):
    """Run app.py until it ends by itself; return how it ended."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("TRACKER_")}
    return subprocess.run(
        [*APP, *map(str, options)],
        cwd=ROOT,
        env={**kept, **{name: str(value) for name, value in settings.items()}},
        input=typed,
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
