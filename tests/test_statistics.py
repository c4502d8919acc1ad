"""Statistics: exact counts of all processes, in one file."""

import ast
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import NOW, peer_id
from servers import announce, cgi, free_port, gunicorn, poll, serving, uwsgi

import app as bitbreeze


@pytest.fixture
def stats(tmp_path):
    return bitbreeze.Stats(tmp_path / "data/stats.json")


def announces(path):
    """Return how many announces are in a file, as another process sees it."""
    return bitbreeze.Stats(path).counters()["announces"]


def count(stats, number=1):
    for _ in range(number):
        stats.count("", 1000)


# -- Counting


def test_what_is_counted(stats):
    for failure, nanoseconds in (
        *(("", 1), ("", 20), ("full", 300), ("", None)),
        *(("request", None), ("request", 0)),
    ):
        stats.count(failure, nanoseconds)
    expected = {"announces": 4, "announce_nanoseconds": 321, "scrapes": 2}
    expected |= {"failure_full": 1, "failure_request": 2}
    assert stats.counters() == expected
    stats.flush()
    stats.count("full", None)
    expected |= {"scrapes": 3, "failure_full": 2}
    assert stats.counters() == expected  # the file and what is pending
    assert announces(stats.path) == 4


def test_reading_makes_no_file(stats, tmp_path):
    assert not stats.counters()
    assert not list(tmp_path.iterdir())


def test_counts_are_written_every_ten_seconds(tracker):
    tracker = tracker().app.tracker
    for second, written in ((0, 1), (5, 1), (9, 1), (10, 4), (19, 4), (-3, 6)):
        count(tracker.stats)
        tracker.run_maintenance(NOW + second)
        assert announces(tracker.stats.path) == written


def test_threads_count_exactly(stats):
    def work(number):
        seen = 0
        for each in range(500):
            count(stats)
            if each % 50 == 0:
                stats.flush()
                now_seen = stats.counters()["announces"]
                assert now_seen > seen
                seen = now_seen

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert stats.counters()["announces"] == 8000
    stats.flush()
    assert announces(stats.path) == 8000


PROGRAM = """
import sys, app
stats = app.Stats(sys.argv[1])
for now in range(int(sys.argv[2])):
    stats.count("key", 1)
    if now % 10 == 0:
        stats.flush()
print("done", flush=True)
sys.stdin.readline()
"""


def start(path, number):
    """Count announces in another process, one a second. It then waits for a line."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path, str(number)],
        cwd=Path(bitbreeze.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_processes_count_exactly(stats):
    running = [start(stats.path, 100 + number) for number in range(3)]
    for process in running:
        assert process.stdout.readline() == b"done\n"
    for process in running:
        process.communicate(b"\n")
    assert announces(stats.path) == 303


def test_a_kill_loses_what_was_counted_since_the_last_flush(stats):
    process = start(stats.path, 105)
    assert process.stdout.readline() == b"done\n"
    process.kill()
    process.communicate()
    assert announces(stats.path) == 101


def test_a_forked_child_writes_its_own_counts_only(stats):
    count(stats, 4)
    children = []
    for number in range(3):
        # The parent's lock is held, as by another thread in the moment of the fork.
        with stats._lock:
            child = os.fork()
        if not child:
            count(stats, 10 * number)
            stats.flush()
            os._exit(stats.counters()["announces"] < 10 * number)
        children.append(child)
        assert os.waitpid(child, 0)[1] == 0
        count(stats, 10)
    stats.flush()
    assert announces(stats.path) == 64


def test_a_flush_does_not_wait_for_another_process(stats, caplog):
    stats.flush()
    count(stats, 3)
    with open(f"{stats.path}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stats.flush()
    assert (announces(stats.path), stats.counters()["announces"]) == (0, 3)
    stats.flush()
    assert announces(stats.path) == 3 and not caplog.records


# -- Files and disks that fail

CORRUPT = {
    "empty": "",
    "cut short": '{"counters": {"announces": 1}, "hist',
    "no counters": '{"x": []}',
    "a list": "[1, 2]",
    "a text as a number": '{"counters": {"announces": "1"}}',
    "a negative number": '{"counters": {"announces": -1}}',
    "a number of 5000 digits": '{"counters": {"a": %s}}' % ("9" * 5000),
    "half an announce": '{"counters": {"announces": 0.5}}',
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT)
def test_counters_of_a_damaged_file_start_again(stats, caplog, data):
    path = Path(stats.path)
    path.parent.mkdir()
    path.write_text(data)
    count(stats, 2)
    assert stats.counters()["announces"] == 2
    for _ in range(3):
        count(stats)
        stats.flush()
    assert announces(path) == 5
    told = f"{path} is damaged: its counters start again"
    assert [each.message for each in caplog.records] == [told]


def full(path):
    """Have each write to the new file meet a full disk."""
    new = Path(f"{path}.new")
    new.symlink_to("/dev/full")
    return new.unlink, "No space left on device"


def no_folder(path):
    """Have a file in the place of the folder."""
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.write_bytes(b"")

    def mend():
        path.parent.unlink()
        path.parent.with_name("moved").rename(path.parent)

    return mend, "File exists"


def unreadable(path):
    """Have a folder in the place of the file."""
    path.rename(path.with_name("moved"))
    path.mkdir()

    def mend():
        path.rmdir()
        path.with_name("moved").rename(path)

    return mend, "Is a directory"


@pytest.mark.parametrize("fault", [full, no_folder, unreadable])
def test_counts_wait_while_a_disk_fails(stats, fault):
    count(stats)
    stats.flush()
    for counted in (5, 10):
        mend, reason = fault(Path(stats.path))
        for _ in range(4):
            count(stats)
            with pytest.raises(OSError, match=reason):
                stats.flush()
        mend()
        assert stats.counters()["announces"] == counted
        count(stats)
        stats.flush()
        assert announces(stats.path) == counted + 1


def test_a_folder_that_was_removed_comes_back(stats):
    count(stats, 7)
    stats.flush()
    for path in Path(stats.path).parent.iterdir():
        path.unlink()
    Path(stats.path).parent.rmdir()
    count(stats, 2)
    assert stats.counters()["announces"] == 2
    stats.flush()
    assert announces(stats.path) == 2


# -- In the tracker


def test_answers_and_refusals_are_counted(tracker, monkeypatch):
    client = tracker(max_peers_per_address=1, track="any")
    client.announce(1, address="192.0.2.2")
    client.announce(2, address="192.0.2.2")  # full
    client.announce(1, address="not an address")
    client.announce(1, port="x")
    client.scrape(b"h" * 20)
    client.ask("/scrape", {"x": 1})  # of all torrents, which is not allowed
    client.get("/announce", "", method="POST")
    client.get("/")
    monkeypatch.setattr(client.app.tracker.store, "announce", lambda *_: {}[0])
    client.announce(1)
    found = dict(client.app.tracker.stats.counters())
    assert found.pop("announce_nanoseconds") > 0
    assert found == {
        "announces": 5, "scrapes": 2, "failure_full": 1, "failure_address": 1,
        "failure_request": 2, "failure_internal": 1,
    }  # fmt: skip


def test_refusals_are_of_a_known_kind():
    tree = ast.parse(Path(bitbreeze.__file__).read_text())
    kinds = {
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrackerError"
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant)
    }
    assert kinds and kinds | {"request", "internal", "store"} == set(bitbreeze.FAILURES)


def test_a_fault_in_maintenance_does_not_spoil_the_reply(tracker, monkeypatch, caplog):
    client = tracker()
    monkeypatch.setattr(client.app.tracker, "run_maintenance", lambda now: 1 / 0)
    for _ in range(3):
        assert client.announce(1)[b"incomplete"] == 1
    assert b"failure reason" in client.announce(1, port="x")
    assert client.scrape(b"h" * 20)[b"files"][b"h" * 20][b"incomplete"] == 1
    assert caplog.text.count("'maintenance' failed") == 1


def test_a_cgi_program_writes_at_once(tmp_path):
    stats = bitbreeze.Stats(tmp_path / "stats.json")
    cgi(tmp_path)
    assert announces(stats.path) == 1
    cgi(tmp_path)
    assert announces(stats.path) == 2


def test_a_process_that_ends_waits_for_the_lock(stats):
    stats.flush()
    with open(f"{stats.path}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(stats.path, 1)
        assert process.stdout.readline() == b"done\n"
        process.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.wait(20) == 0
    assert announces(stats.path) == 1


SERVERS = {
    "gunicorn sync": lambda port: gunicorn(port, 2, 1),
    "gunicorn gthread": lambda port: gunicorn(port, 2, 4),
    "gunicorn gevent": lambda port: [*gunicorn(port, 2, 1), "-k", "gevent"],
    "uWSGI": uwsgi,
}


@pytest.mark.parametrize("host", SERVERS.values(), ids=SERVERS)
def test_workers_write_when_they_end(tmp_path, host):
    def serve(number, end):
        port = free_port()
        with serving(host(port), port, {"TRACKER_DATA": str(tmp_path)}) as server:
            with ThreadPoolExecutor(4) as pool:
                for peer in range(number):
                    pool.submit(announce, server.url, b"h" * 20, peer_id(peer), 2000)
            # uWSGI writes nothing in a worker that is still at a request.
            poll(lambda: are_idle(server.workers()), 20, "idle workers")
            end(server)
            server.process.wait(20)
        return announces(tmp_path / "stats.json")

    assert serve(100, lambda server: server.process.terminate()) == 100
    # A kill loses some of the last ten seconds.
    known = serve(50, lambda server: server.signal(signal.SIGKILL))
    assert 100 <= known <= 150
    assert serve(50, lambda server: server.process.terminate()) == known + 50


def are_idle(pids):
    """Return whether no thread of the processes runs: any may be at a request."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(file.read_text().rpartition(") ")[2][0] == "S" for file in files)
