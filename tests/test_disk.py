"""Disks and clocks that fail under real workers: announces are answered, peers kept.

What a disk is made to do here, a small file system of the test's own does; only root
can mount one.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import peer_id
from servers import announce, free_port, gunicorn, poll, scrape, serving, uwsgi

REASON = b"this tracker cannot read or write its data: try again later"
KEPT, NEW = b"k" * 20, b"n" * 20
PEERS = 20


@pytest.fixture
def disk(tmp_path):
    """A folder that is a file system of its own, of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("NOT TESTED are disks that fail: only root can mount one, if that")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def server(disk):
    """A tracker of two workers on that disk, with peers in a swarm."""
    port, environ = free_port(), {"TRACKER_DATA": str(disk / "data")}
    with serving(gunicorn(port), port, environ) as server:
        for number in range(PEERS):
            announce(server.url, KEPT, peer_id(number), 2000 + number)
        yield server
        assert "Traceback" not in server.log()


def health(server):
    """Return the status of /health, and what it says."""
    try:
        with urlopen(f"{server.url}/health", timeout=10) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def reason(server, info_hash=NEW, number=0):
    """Announce; return why that is refused, or None."""
    reply = announce(server.url, info_hash, peer_id(number), 2000 + number)
    return reply.get(b"failure reason")


def count(server, info_hash=KEPT):
    return scrape(server.url, info_hash)[b"files"][info_hash][b"incomplete"]


def check_log(server, most):
    """Fail unless a fault is in the log, and at most so often."""
    times = server.log().count("failed (logged once a minute)")
    assert 0 < times <= most, server.log()


def fill(disk):
    """Leave no room on a disk; return the file that takes it."""
    path = disk / "filler"
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return path


def test_a_full_disk(server, disk):
    filler = fill(disk)
    for number in range(40):
        assert reason(server, number=number) == REASON
    for number in range(PEERS + 5):  # five more have room in the page that is there
        assert reason(server, KEPT, number) is None
    assert count(server) == PEERS + 5 and count(server, NEW) == 0
    status, said = health(server)
    assert status == 503 and "No space left" in said["reason"]
    filler.unlink()
    assert reason(server) is None
    assert count(server, NEW) == 1 and count(server) == PEERS + 5
    assert health(server) == (200, {"status": "ok"})
    check_log(server, 4)  # a minute's, of two workers


def test_a_swarm_that_grows_on_a_full_disk(server, disk):
    filler = fill(disk)
    known, refused = set(), set()
    for number in range(200):
        (refused if reason(server, KEPT, number) else known).add(number)
    assert len(known) >= 56 and len(refused) >= 100
    assert count(server) == len(known | set(range(PEERS)))
    filler.unlink()
    for number in range(200):
        assert reason(server, KEPT, number) is None
    assert count(server) == 200


@contextmanager
def read_only(folder):
    """Have a folder be found read-only; what is open already can still be written."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    yield
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_read_only_disk(server, disk):
    with read_only(disk / "data"):
        assert reason(server) == REASON
        for number in range(40):  # each worker keeps files open, ten seconds at most
            poll(
                lambda n=number: reason(server, KEPT, n % PEERS) == REASON,
                *(20, "open files to be closed"),
            )
            assert reason(server, NEW, number) == REASON
        status, said = health(server)
        assert status == 503 and "Read-only file system" in said["reason"]
        for path in ("/", "/stats.json", "/metrics", "/torrents.json"):
            with pytest.raises(HTTPError, match="503") as error:
                urlopen(server.url + path, timeout=10)
            assert REASON[6:] in error.value.read()
    assert count(server) == PEERS
    assert reason(server, KEPT, 30) is None and reason(server) is None
    assert count(server) == PEERS + 1
    for path in ("/", "/health", "/stats.json", "/metrics", "/torrents.json"):
        assert urlopen(server.url + path, timeout=10).status == 200
    check_log(server, 4)


@pytest.mark.parametrize("host", [gunicorn, uwsgi])
def test_a_folder_that_is_removed(tmp_path, host):
    port, environ = free_port(), {"TRACKER_DATA": str(tmp_path / "data")}
    with serving(host(port), port, environ) as server:
        for round_ in range(3):
            for number in range(PEERS):
                assert reason(server, bytes([round_]) * 20, number) is None
            assert count(server, bytes([round_]) * 20) == PEERS
            shutil.rmtree(tmp_path / "data")
            assert health(server)[0] == 200
        assert count(server, NEW) == 0
        assert "Traceback" not in server.log()


MANY_FILES = """
import os, resource, sys
sys.path[:0] = {paths}
import app as bitbreeze
from conftest import Client
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
client = Client(bitbreeze.create_app({{"data": sys.argv[1], "track": "any"}}))
for number in range(300):  # more swarms than files that may be open
    assert b"peers" in client.announce(info_hash=b"%020d" % number), number
taken = []
client.app.tracker.store.close_files()  # it would do that itself
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
for number in range(100):
    reply = client.announce(info_hash=b"%020d" % (number + 250))
    refused = reply.get(b"failure reason", b"")
    assert not refused or refused == {reason}, reply
assert refused
for fd in taken:
    os.close(fd)
for number in range(350):
    assert b"peers" in client.announce(2, info_hash=b"%020d" % number), number
files = client.scrape(*(b"%020d" % number for number in range(60)))[b"files"]
assert all(each[b"incomplete"] == 2 for each in files.values()), files
"""


def test_no_more_files_may_be_opened(tmp_path):
    here = Path(__file__).resolve().parent
    program = MANY_FILES.format(paths=[str(here), str(here.parent)], reason=REASON)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0 < done.stderr.count("Too many open files") <= 3, done.stderr


def written(folder, text):
    (folder / "new").write_text(text)
    return folder / "new"


JUMPING = """
import time
clock = time.time
time.time = lambda: clock() + int(open({!r}).read())
"""


# The offset of the clock in seconds, and how many peers are counted then: those from
# before expire when it is set forward, and count as seen now when it is set back.
JUMPS = (0, 5), (86400, 5), (-86400, 10)


@pytest.mark.parametrize("host", [gunicorn, uwsgi])
def test_a_clock_that_jumps_a_day(tmp_path, host):
    """Announces go on, while the clock is set and workers come and go."""
    offset, port = tmp_path / "offset", free_port()
    offset.write_text("0")
    # Every Python process imports this first.
    (tmp_path / "sitecustomize.py").write_text(JUMPING.format(str(offset)))
    environ = {"TRACKER_DATA": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)}
    with serving(host(port), port, environ) as server:
        for number, (jump, counted) in enumerate(JUMPS):
            os.replace(written(tmp_path, str(jump)), offset)
            for peer in range(5):
                assert reason(server, KEPT, 5 * number + peer) is None
            assert count(server) == counted, server.log()
            old = set(server.workers())
            for worker in old:
                os.kill(worker, 9)
            poll(lambda old=old: set(server.workers()) - old, 20, "new workers")
            server.wait_until_ready()
            assert count(server) == counted, server.log()
        assert "Traceback" not in server.log()
