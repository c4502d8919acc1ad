"""Counters: right over processes, and no announce fails for their sake."""

import ast
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import NOW
from servers import cgi

import app as bitbreeze

MICROSECOND, SECOND = 1000, 10**9  # in nanoseconds


@pytest.fixture(params=[True, False], ids=["mapped", "written"])
def is_mapped(request, monkeypatch):
    """Whether the counters are mapped from a process's second second on."""
    monkeypatch.setattr(bitbreeze, "_is_mappable", lambda _: request.param)
    return request.param


def announces(folder, now=NOW):
    return sum(bitbreeze.Counters(folder).total(now).took)


def count(counters, number=1, now=NOW):
    for _ in range(number):
        counters.count(now, "", MICROSECOND)


def start(folder, number, is_mapped):
    """Count announces in a process of its own, which then waits for a line."""
    program = (
        "import sys, app; counters = app.Counters(sys.argv[1])\n"
        "app._is_mappable = lambda _: sys.argv[3] == 'True'\n"
        "for now in range(int(sys.argv[2])): counters.count(now, 'key', 1)\n"
        "print('done', flush=True); sys.stdin.readline()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, folder, str(number), str(is_mapped)],
        cwd=Path(bitbreeze.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_what_is_counted(tmp_path):
    counters = bitbreeze.Counters(tmp_path / "counters")
    for took in (0, 50, 51, 200_000):
        counters.count(NOW, "", took * MICROSECOND)
    counters.count(NOW, "full", SECOND)
    counters.count(NOW, "")
    counters.count(NOW, "request")
    found = counters.total(NOW)
    assert found.scrapes == 2
    assert found.took == (2, 1, 0, 0, 0, 0, 0, 0, 2)
    assert found.nanoseconds == 200_101 * MICROSECOND + SECOND
    assert found.failures == {
        **dict.fromkeys(bitbreeze.FAILURES, 0), "full": 1, "request": 1
    }  # fmt: skip
    assert bitbreeze.Counters(tmp_path / "counters").total(NOW) == found


def test_looking_makes_nothing(tmp_path):
    assert announces(tmp_path / "counters") == 0
    assert not list(tmp_path.iterdir())


def test_processes_killed_and_started_again_count_exactly(tmp_path, is_mapped):
    folder = tmp_path / "counters"
    running = [start(folder, 300 + number, is_mapped) for number in range(3)]
    for process in running:
        assert process.stdout.readline() == b"done\n"
    assert announces(folder) == 903
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert announces(folder) == 903
    assert start(folder, 100, is_mapped).communicate(b"\n") == (b"done\n", None)
    assert bitbreeze.Counters(folder).total(NOW).failures["key"] == 1003
    assert sorted(os.listdir(folder)) == ["0", "1", "2"]


@pytest.mark.usefixtures("is_mapped")
def test_forked_children_count_for_themselves(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    count(counters, 4)
    count(counters, now=NOW + 1)
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            for now in range(NOW, NOW + 100 * number):
                count(counters, now=now)
            os._exit(0)
        children.append(child)
        count(counters, 10)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert sum(counters.total(NOW).took) == announces(tmp_path) == 335


def test_a_child_is_not_stopped_by_its_parents_lock(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    count(counters)
    with counters._lock:
        child = os.fork()
        if not child:
            count(counters)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert announces(tmp_path) == 2


@pytest.mark.usefixtures("is_mapped")
def test_threads_count_exactly(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for number in range(16):
            pool.submit(count, counters, 500, now=NOW + number % 3)
    assert announces(tmp_path) == sum(counters.total(NOW).took) == 8000
    assert os.listdir(tmp_path) == ["0"]


@pytest.mark.usefixtures("is_mapped")
@pytest.mark.parametrize(
    "data",
    [b"x", b"cntr\0" + bytes(507), bytes(512), b"cntr\x01\0\0\0" + b"\xff" * 504],
    ids=["short", "another version", "zeros", "too big"],
)
def test_a_damaged_file_is_set_aside(tmp_path, caplog, data):
    (tmp_path / "0").write_bytes(data)
    assert announces(tmp_path) == 0
    counters = bitbreeze.Counters(tmp_path)
    count(counters, 3)
    count(counters, now=NOW + 1)
    assert announces(tmp_path) == 4
    assert (tmp_path / "0.damaged").read_bytes() == data
    assert [record.message[-9:] for record in caplog.records] == ["0.damaged"]


def test_a_file_of_a_newer_version_is_left_alone(tmp_path, caplog):
    data = b"cntr\x02" + bytes(3000)
    (tmp_path / "0").write_bytes(data)
    counters = bitbreeze.Counters(tmp_path)
    count(counters, 3)
    assert announces(tmp_path) == 3
    assert (tmp_path / "0").read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
    assert not caplog.records


def test_a_damaged_file_that_cannot_be_kept_is_written_over(tmp_path, caplog):
    (tmp_path / "0").write_bytes(b"x")
    (tmp_path / "0.damaged").mkdir()
    count(bitbreeze.Counters(tmp_path), 3)
    assert announces(tmp_path) == 3
    assert len(caplog.records) == 1


def test_a_file_cut_or_written_over_is_whole_again(tmp_path, is_mapped):
    counters, expected = bitbreeze.Counters(tmp_path), 0
    for damage in (b"", b"?" * 300, b"?" * 512):
        for now in (NOW, NOW + 1):  # the file is damaged before it is mapped, and after
            count(counters, now=now)
            (tmp_path / "0").write_bytes(damage)
            count(counters, now=now)
            count(counters, now=NOW + 1)
            expected += 3
            assert announces(tmp_path) == expected
    assert bool(counters._map) is is_mapped


@pytest.mark.usefixtures("is_mapped")
def test_removed_files_take_their_numbers_with_them(tmp_path):
    counters = bitbreeze.Counters(tmp_path / "counters")
    count(counters, 7)
    (tmp_path / "counters" / "0").unlink()
    (tmp_path / "counters").rmdir()
    assert sum(counters.total(NOW + 1).took) == 0
    count(counters, 2, now=NOW + 1)
    assert announces(tmp_path / "counters") == 2


@pytest.mark.usefixtures("is_mapped")
def test_without_a_folder_counts_are_in_memory(tmp_path, caplog):
    (tmp_path / "counters").write_bytes(b"a file")
    counters = bitbreeze.Counters(tmp_path / "counters")
    for now in range(NOW, NOW + 5):
        count(counters, 2, now=now)
        counters.count(now, "")
    assert sum(counters.total(NOW).took) == 10
    assert len(caplog.records) == 1
    (tmp_path / "counters").unlink()
    count(counters, now=NOW + 9)
    assert announces(tmp_path / "counters") == 11


@pytest.mark.usefixtures("is_mapped")
def test_a_full_disk_is_logged_once(tmp_path, caplog, monkeypatch):
    counters = bitbreeze.Counters(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze.os, "pwrite", lambda *_: 100)
        for now in range(NOW, NOW + 5):
            count(counters, 2, now=now)
    assert [record.message for record in caplog.records] == [
        f"counters are not kept in {tmp_path}: [Errno 28] No space left on device"
    ]
    assert announces(tmp_path) == 0
    count(counters)
    assert announces(tmp_path) == 11


def test_the_door_counts_answers_and_refusals(tracker, monkeypatch, caplog):
    client = tracker(max_peers=1, track="any")
    client.announce(1)
    client.announce(2, address="192.0.2.2")  # full
    client.announce(1, address="not an address")
    client.announce(1, port="x")
    client.scrape(b"h" * 20)
    client.scrape()  # not allowed
    client.get("/announce", "", method="POST")
    client.get("/")
    monkeypatch.setattr(client.app.tracker.store, "announce", lambda *_: {}[0])
    client.announce(1)
    found = client.app.tracker.counters.total(NOW)
    assert (sum(found.took), found.scrapes, found.nanoseconds > 0) == (5, 2, True)
    assert {kind: number for kind, number in found.failures.items() if number} == {
        "full": 1,
        "address": 1,
        "request": 2,
        "internal": 1,
    }


def test_refusals_are_of_a_known_kind():
    tree = ast.parse(Path(bitbreeze.__file__).read_text())
    kinds = {
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrackerError"
        for keyword in node.keywords
    }
    assert kinds and kinds | {"request", "internal", "store"} == set(bitbreeze.FAILURES)


def test_a_cgi_program_is_counted(tmp_path):
    cgi(tmp_path)
    cgi(tmp_path)
    assert announces(tmp_path / "counters") == 2
    assert os.listdir(tmp_path / "counters") == ["0"]
