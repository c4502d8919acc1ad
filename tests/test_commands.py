"""Commands: python app.py and what it prints."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import psutil
import pytest
from click.testing import CliRunner
from gunicorn.config import Config
from servers import (
    APP,
    ROOT,
    Server,
    announce,
    free_port,
    has_ipv6,
    poll,
    scrape,
    serving,
    uwsgi,
)
from test_torrents import torrent_of

import app as bitbreeze

HASHES = [bytes((number,)) * 20 for number in range(130, 190)]
PEER = b"-COMMAND-a client---"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_for_all", [False, True], ids=["main process", "all"])
def test_app_serves_until_it_is_stopped(tmp_path, number, is_for_all):
    """Ctrl-C signals all processes, and some workers may still be starting then."""
    port = free_port()
    command = [*APP, "--port", port, "--workers", 3]
    with serving(command, port, data(tmp_path)) as server:
        greeting = server.log()
        assert f":{port}/announce" in greeting
        assert str(tmp_path / "data") in greeting
        assert "  it tracks     any torrent\n" in greeting
        if number == signal.SIGINT:
            check_answers(server)
        workers = server.workers()
        (server.signal if is_for_all else server.process.send_signal)(number)
        assert server.process.wait(5) == 0
        assert server.log() == greeting
        assert not any(map(psutil.pid_exists, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="psutil needs Linux for this")
@pytest.mark.parametrize("host", ["app.py", "uwsgi"])
def test_workers_may_open_as_many_files_as_the_system_allows(tmp_path, host):
    port = free_port()
    command = [*APP, "--port", port] if host == "app.py" else uwsgi(port)
    few = ["sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh"]
    with serving([*few, *command], port, data(tmp_path)) as server:
        hard = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[1]
        for worker in server.workers():
            soft, _ = psutil.Process(worker).rlimit(psutil.RLIMIT_NOFILE)
            assert soft == (hard if host == "app.py" else 20_000)


def test_app_replaces_a_killed_worker_and_reloads(tmp_path):
    port = free_port()
    command = [*APP, "--port", port, "--workers", 1]
    with serving(command, port, data(tmp_path)) as server:

        def has_replaced(worker):
            return len(server.workers()) == 1 and server.workers() != [worker]

        [first] = server.workers()
        os.kill(first, signal.SIGKILL)
        poll(lambda: has_replaced(first), 10, "a worker in place of the killed one")
        check_answers(server)
        [second] = server.workers()
        server.process.send_signal(signal.SIGHUP)
        poll(lambda: has_replaced(second), 10, "a worker after the reload")
        check_answers(server)
        assert "Traceback" not in server.log()


def test_only_the_hooks_have_names_of_gunicorn_settings():
    """gunicorn -c app.py takes every name in app.py that it knows for a setting."""
    hooks = {"post_fork", "post_worker_init", "on_exit"}
    assert Config().settings.keys() & vars(bitbreeze).keys() == hooks


def test_app_says_what_is_tracked(tmp_path):
    port, torrents = free_port(), tmp_path / "torrents"
    torrents.mkdir()
    for name in ("a", "b"):
        (torrents / f"{name}.torrent").write_bytes(torrent_of(name))
    (torrents / "c.torrent").write_bytes(b"bad")
    (tmp_path / "allow.txt").write_text(HASHES[0].hex())
    (tmp_path / "deny.txt").write_text("bad")
    # A file counts as skipped when it has been left alone for two seconds.
    os.utime(torrents / "c.torrent", (0, 0))
    env = {**data(tmp_path), "TRACKER_TORRENTS": str(torrents)}
    command = [*APP, "--host", "127.0.0.1", "--port", port]
    with serving(command, port, env) as server:
        assert (
            f"  it tracks     2 torrents in {torrents} and 1 of allow.txt; 2 files or"
            " lines are skipped: see app.py doctor\n"
        ) in server.log()


def test_the_greeting_names_the_port_that_the_system_chose(tmp_path):
    server = Server([*APP, "--port", 0, "--workers", 1], 0, data(tmp_path))
    try:
        poll(lambda: "it tracks" in server.log(), 10, "a greeting")
        port = re.search(r"front page +http://\S+:(\d+)/", server.log())[1]
        server.url = f"http://127.0.0.1:{port}"
        server.wait_until_ready()
    finally:
        server.stop()
        server.output.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("options", [[], ["--host", "::"]])
def test_app_answers_over_ipv4_and_ipv6(tmp_path, options):
    port = free_port()
    with serving([*APP, *options, "--port", port], port, data(tmp_path)):
        for url in (f"http://127.0.0.1:{port}", f"http://[::1]:{port}"):
            announce(url, HASHES[0], PEER, 7000, left=0)
        asked = announce(f"http://[::1]:{port}", HASHES[0], PEER[::-1], 7001, left=1)
        assert asked[b"complete"] == 1
        assert asked[b"peers6"] == bytes(15) + b"\1" + (7000).to_bytes(2, "big")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_app_listens_where_it_is_told(tmp_path, host):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    other = "127.0.0.1" if host == "::1" else "::1"
    server = Server([*APP, "--host", host, "--port", port], port, data(tmp_path))
    try:
        server.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server.wait_until_ready()
        assert f"{server.url}/announce" in server.log()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port))
    finally:
        server.stop()
        server.output.close()


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


@pytest.mark.parametrize(
    ("said", "number", "answer"),
    [
        (b"GET /announce?info_hash=", 600, b""),
        (b"GET /stats.json HTTP/1.1\r\n\r\n", 50, b"HTTP/1.1 200"),
        (b"GET /stats.json HTTP/1.1\r\n\r\nGET /", 50, b"HTTP/1.1 200"),
        (b"GET /announce?x=" + b"y" * 50_000, 50, b"HTTP/1.1 414"),
    ],
)
def test_one_worker_serves_while_many_clients_stall(tmp_path, said, number, answer):
    port = free_port()
    command = [*APP, "--host", "127.0.0.1", "--port", port, "--workers", 1]
    with ExitStack() as opened:
        server = opened.enter_context(serving(command, port, data(tmp_path)))
        others = []
        for _ in range(number):
            other = socket.create_connection(("127.0.0.1", port), timeout=10)
            others.append(opened.enter_context(other))
            with suppress(OSError):  # the worker may refuse it before the end
                other.sendall(said)
        started = time.monotonic()
        check_answers(server)
        assert time.monotonic() - started < 5
        [worker] = map(psutil.Process, server.workers())
        assert worker.cpu_percent(0.5) < 50
        with suppress(ConnectionResetError):
            assert others[0].recv(12) == answer
        # It hangs up by itself, on all of them.
        poll(lambda: len(worker.net_connections()) <= 3, 10, "the end of connections")
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


@pytest.mark.parametrize("options", [["--help"], ["serve", "--help"]])
def test_help_names_the_commands_and_options(options):
    ended = run(*options)
    assert ended.returncode == 0
    for option in ("--host", "--port", "--workers", "6969"):
        assert option in ended.stdout
    if options == ["--help"]:
        for part in ("a BitTorrent tracker", "Without a command", "serve", "doctor"):
            assert part in ended.stdout


def test_a_misspelt_command_is_told_the_nearest():
    ended = run("docter")
    assert ended.returncode == 2
    assert "No such command 'docter'. Did you mean 'doctor'?" in ended.stderr


@pytest.mark.parametrize("port", [80000, -1])
def test_a_port_that_does_not_exist(port):
    ended = run("--port", port)
    assert ended.returncode == 2
    assert f"Invalid value for '--port': {port} is not in the range" in ended.stderr


def test_the_version():
    assert run("--version").stdout == f"BitBreeze {bitbreeze.__version__}\n"


@pytest.mark.parametrize("options", [[], ["doctor"], ["--help"], ["--version"]])
@pytest.mark.parametrize("package", ["none", "another"])
def test_missing_packages_are_a_sentence(tmp_path, options, package):
    """Also if PyPI's other package with a module called bencoder is installed."""
    if package == "another":
        (tmp_path / "bencoder.py").write_text(
            "def encode(): pass\ndef decode(): pass\n"
        )
        (tmp_path / "flask.py").touch()
    # -S hides the packages of this environment.
    command = [sys.executable, "-S", "app.py", *options]
    env = {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    install = f"-m pip install -r {ROOT}/requirements.txt"
    check_sentence(ended, "app.py: Flask or bencoder.pyx is not installed. Run: ")
    assert ended.stderr.endswith(f"{install}\n")


def test_bad_settings_stop_every_command(tmp_path):
    shutil.copy(ROOT / "app.py", tmp_path)
    (tmp_path / "wsgi.ini").write_text("titel = ours\n")
    problem = f"{tmp_path}/wsgi.ini has no line [tracker]. Add it above the settings"

    def run_there(*options):
        command = [sys.executable, tmp_path / "app.py", *options]
        return subprocess.run(command, capture_output=True, text=True)

    for options in ([], ["--help"], ["doctor"], ["export"]):
        ended = run_there(*options)
        assert (ended.returncode, ended.stderr) == (1, f"app.py: {problem}\n")


def test_the_metadata_of_the_script_are_the_requirements():
    """uv run app.py and pipx run app.py install what the block of PEP 723 names."""
    block = re.search(
        r"^# /// script\n# requires-python = \">=3.10\"\n"
        r"# dependencies = (\[.*\])\n# ///$",
        (ROOT / "app.py").read_text(),
        re.M,
    )
    assert json.loads(block[1]) == (ROOT / "requirements.txt").read_text().split()


def test_a_port_that_is_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("--port", port, TRACKER_DATA=tmp_path / "data")
    check_sentence(
        ended,
        f"Cannot listen on port {port}: Address already in use. Choose another --port"
        " or --host.\n",
    )


def test_a_data_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "data"
    ended = run("--port", free_port(), TRACKER_DATA=folder)
    check_sentence(ended, f"Cannot write to {folder}: Not a directory. Set TRACKER_")


@pytest.mark.parametrize("value", ["30m", "-1", ""])
def test_a_bad_setting(value):
    check_sentence(run(TRACKER_INTERVAL=value), "interval")


def test_a_setting_that_does_not_exist():
    check_sentence(run(TRACKER_INTERVALL="30"), "intervall")


@pytest.mark.parametrize(
    "option", ["--port=many", "--port=65536", "--workers=0", "--nothing", "nothing"]
)
def test_a_bad_option(option, tmp_path):
    ended = run(option, TRACKER_DATA=tmp_path / "data")
    assert ended.returncode == 2
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_uwsgi_listens_on_6969_by_default():
    settings = [line.strip() for line in (ROOT / "wsgi.ini").read_text().splitlines()]
    assert "port = 6969" in settings
    assert "http = %(host):%(port)" in settings


# -- export and import


def snatches_in(folder):
    """Return snatches by info_hash in hex, of a store."""
    store = bitbreeze.FileStore(folder, bitbreeze.Settings())
    found = store.swarms(int(time.time()))
    return {info_hash.hex(): counts.snatches for info_hash, counts in found}


def export_of(number):
    """Return an export of so many swarms."""
    return json.dumps({f"{each:040x}": 1 + each for each in range(number)})


def test_what_is_exported_can_be_imported(tmp_path):
    given = json.loads(export_of(3))
    (tmp_path / "given").write_text(export_of(3))
    folder, other = tmp_path / "data", tmp_path / "other"
    ended = run("import", tmp_path / "given", TRACKER_DATA=folder)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "Imported the snatches of 3 swarms.\n"
    ended = run("export", tmp_path / "file", TRACKER_DATA=folder)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == "Exported the snatches of 3 swarms.\n"
    piped = run("export", TRACKER_DATA=folder)
    assert json.loads(piped.stdout) == given
    assert (tmp_path / "file").read_text() == piped.stdout
    more = {f"{0:040x}": 7, f"{9:040x}": 5}
    for text in (piped.stdout, piped.stdout, json.dumps(more), piped.stdout):
        ended = run("import", "-", typed=text, TRACKER_DATA=other)
        assert ended.returncode == 0, ended.stderr
    assert snatches_in(other) == given | more


@pytest.mark.parametrize(
    ("path", "data", "part"),
    [
        ("file", "none", "There is no {}/none. Set data as for the server."),
        ("no/file", "data", "The export failed: [Errno 2] No such file or director"),
        ("data", "data", "The export failed: [Errno 17] File exists: '{}/data'."),
        ("there", "data", "The export failed: [Errno 17] File exists: '{}/there'."),
    ],
)
def test_export_fails_in_a_sentence(tmp_path, path, data, part):
    (tmp_path / "data").mkdir()
    (tmp_path / "there").write_text("precious")
    ended = run("export", tmp_path / path, TRACKER_DATA=tmp_path / data)
    check_sentence(ended, part.format(tmp_path))
    assert ended.returncode == 1
    assert sorted(os.listdir(tmp_path)) == ["data", "there"]
    assert (tmp_path / "there").read_text() == "precious"


def test_an_export_that_fails_cannot_be_imported(tmp_path):
    (tmp_path / "given").write_text(export_of(300))
    run("import", tmp_path / "given", TRACKER_DATA=tmp_path / "data")
    limits = resource.RLIMIT_FSIZE, (10_000, 10_000)
    ended = run("export", tmp_path / "file", TRACKER_DATA=tmp_path / "data",
                before=lambda: resource.setrlimit(*limits))  # fmt: skip
    check_sentence(ended, "The export failed: [Errno 27] File too large.")
    ended = run("import", tmp_path / "file", TRACKER_DATA=tmp_path / "other")
    assert ended.returncode == 1


def test_the_reader_of_an_export_may_stop(tmp_path):
    (tmp_path / "file").write_text(export_of(2000))
    run("import", tmp_path / "file", TRACKER_DATA=tmp_path / "data")
    ended = subprocess.run(
        f"{sys.executable} app.py export | head -c 3",
        cwd=ROOT,
        env={**os.environ, **data(tmp_path)},
        shell=True,
        capture_output=True,
        timeout=20,
    )
    assert ended.stdout == b'{"0'
    assert not ended.stderr.replace(b"Exported the snatches of 2000 swarms.\n", b"")


GOOD = export_of(3)
BAD_EXPORTS = {
    "empty": "",
    "a page": "<html>",
    "cut off": GOOD[:-1],
    "twice": GOOD * 2,
    "a list": "[]",
    "deep": "[" * 100_000,
    "short hash": GOOD.replace("0" * 39 + "1", "01"),
    "long hash": GOOD.replace("0" * 39 + "1", "0" * 64),
    "not hex": GOOD.replace("0" * 39 + "1", "x" * 40),
    "negative": GOOD.replace("3}", "-3}"),
    "half a snatch": GOOD.replace("3}", "3.5}"),
    "text": GOOD.replace("3}", '"3"}'),
    "too many": GOOD.replace("3}", f"{2**32}}}"),
    "not UTF-8": GOOD.encode().replace(b"00", b"\xff", 1),
}


@pytest.mark.parametrize("text", BAD_EXPORTS.values(), ids=BAD_EXPORTS)
def test_a_file_that_is_no_export_changes_nothing(tmp_path, monkeypatch, text):
    app = bitbreeze.create_app({"data": tmp_path / "data"})
    monkeypatch.setattr(bitbreeze, "app", app)
    ended = CliRunner().invoke(bitbreeze.import_, ["-"], input=text)
    assert ended.exit_code == 1
    sentence = "it is not like {INFO_HASH: NUMBER, ...}"
    told = f"Error: The import failed: {sentence}.\n"
    assert ended.output == told
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_missing_is_named(tmp_path):
    ended = run("import", tmp_path / "none", TRACKER_DATA=tmp_path / "data")
    check_sentence(ended, "[Errno 2] No such file or directory: ")


def test_an_import_that_stops_can_be_repeated(tmp_path, monkeypatch):
    (tmp_path / "file").write_text(export_of(9))
    app = bitbreeze.create_app({"data": str(tmp_path / "data"), "max_swarms": 5})
    real, calls = app.tracker.store.raise_snatches, itertools.count()

    def full_at_four(*arguments):
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(bitbreeze, "app", app)
    monkeypatch.setattr(app.tracker.store, "raise_snatches", full_at_four)
    ended = CliRunner().invoke(bitbreeze.import_, [str(tmp_path / "file")])
    part = "The import failed: [Errno 28] No space left on device."
    assert ended.exit_code == 1 and part in ended.output
    assert len(snatches_in(tmp_path / "data")) == 4
    again = CliRunner().invoke(bitbreeze.import_, [str(tmp_path / "file")])
    assert again.output.endswith("Imported the snatches of 9 swarms.\n")
    assert snatches_in(tmp_path / "data") == json.loads(export_of(9))


def test_an_import_says_what_a_limit_left_out(tmp_path):
    limit = {"TRACKER_DATA": tmp_path, "TRACKER_MAX_SWARMS": "2"}
    store = bitbreeze.FileStore(tmp_path, bitbreeze.Settings())
    for number in (0, 7):
        peer = bitbreeze.Announce(HASHES[number], PEER, b"\x7f\0\0\1", 7000)
        store.announce(peer, 50, int(time.time()))
    ended = run("import", "-", typed=export_of(3), **limit)
    told = "Imported the snatches of 0 swarms, but not of 3: max_swarms is reached.\n"
    assert (ended.returncode, ended.stderr) == (0, told)


@pytest.mark.skipif(os.getuid() != 0, reason="NOT TESTED is an import by root")
def test_what_root_imports_belongs_to_the_server(tmp_path):
    (tmp_path / "file").write_text(export_of(2))
    (tmp_path / "file").chmod(0o600)
    with TemporaryDirectory() as folder:  # no other user may enter tmp_path
        os.chown(folder, 33, 33)
        ended = run("import", tmp_path / "file", TRACKER_DATA=folder)
        assert ended.returncode == 0
        owners = [path.stat().st_uid for path in Path(folder).rglob("*")]
        assert len(owners) > 4 and {*owners} == {33}


def test_reset_forgets_all_peers_while_the_tracker_runs(tmp_path):
    port, env = free_port(), {"TRACKER_DATA": str(tmp_path)}
    with serving([*APP, "--port", port], port, env) as server:
        for number in range(9):
            announce(server.url, HASHES[number % 2], b"%020d" % number, 2000 + number)
        asked = run("reset", typed="n\n", TRACKER_DATA=tmp_path)
        assert "Forget all peers and snatches? [y/N]" in asked.stdout
        assert announce(server.url, HASHES[0], b"%020d" % 0, 2000)[b"incomplete"] == 5
        assert run("reset", "--yes", TRACKER_DATA=tmp_path).returncode == 0
        assert announce(server.url, HASHES[0], b"%020d" % 0, 2000)[b"incomplete"] == 1
    store = bitbreeze.FileStore(tmp_path, bitbreeze.Settings())
    assert len(list(store.swarms(int(time.time())))) == 1
    assert store._count_swarms() == (1, 1)


def test_progress_is_for_terminals_only(monkeypatch, capsys):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)  # noqa: B023
        with bitbreeze._progress(iter("abc"), "Export") as items:
            assert list(items) == ["a", "b", "c"]
        shown = capsys.readouterr()
        assert ("Export" in shown.err) == is_terminal
        assert shown.out == ""


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


def run(*options, typed=None, before=None, **settings):
    """Run app.py until it ends by itself; return how it ended."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("TRACKER_")}
    return subprocess.run(
        [*APP, *map(str, options)],
        cwd=ROOT,
        env={**kept, **{name: str(value) for name, value in settings.items()}},
        input=typed,
        preexec_fn=before,
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
