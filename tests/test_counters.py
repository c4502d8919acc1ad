"""Counters and history: right over processes, and no announce fails for their sake."""

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import NOW, escape, peer_id
from prometheus_client.parser import text_string_to_metric_families
from servers import announce, free_port, gunicorn, poll, serving

import app as bitbreeze

MICROSECOND, SECOND = 1000, 10**9  # in nanoseconds


def announces(folder, now=NOW):
    return sum(bitbreeze.Counters(folder).total(now).took)


def count(counters, number=1, now=NOW):
    for _ in range(number):
        counters.count(now, "", MICROSECOND)


def start(folder, number):
    """Count announces in a process of its own, which then waits for a line."""
    program = (
        "import sys, app; counters = app.Counters(sys.argv[1])\n"
        "for _ in range(int(sys.argv[2])): counters.count(5, 'key', 1)\n"
        "print('done', flush=True); sys.stdin.readline()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, folder, str(number)],
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


def test_processes_killed_and_started_again_count_exactly(tmp_path):
    folder = tmp_path / "counters"
    running = [start(folder, 300 + number) for number in range(3)]
    for process in running:
        assert process.stdout.readline() == b"done\n"
    assert announces(folder) == 903
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert announces(folder) == 903
    assert start(folder, 100).communicate(b"\n") == (b"done\n", None)
    assert bitbreeze.Counters(folder).total(NOW).failures["key"] == 1003
    assert sorted(os.listdir(folder)) == ["0", "1", "2"]


def test_forked_children_count_for_themselves(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    count(counters, 5)
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            count(counters, 100 * number)
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


def test_threads_count_exactly(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for number in range(16):
            pool.submit(count, counters, 500, now=NOW + number % 3)
    assert announces(tmp_path) == sum(counters.total(NOW).took) == 8000
    assert os.listdir(tmp_path) == ["0"]


@pytest.mark.parametrize(
    "data",
    [b"x", b"cntr\x02" + bytes(507), bytes(512), b"cntr\x01\0\0\0" + b"\xff" * 504],
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


def test_a_damaged_file_that_cannot_be_kept_is_written_over(tmp_path, caplog):
    (tmp_path / "0").write_bytes(b"x")
    (tmp_path / "0.damaged").mkdir()
    count(bitbreeze.Counters(tmp_path), 3)
    assert announces(tmp_path) == 3
    assert len(caplog.records) == 1


def test_a_file_cut_or_written_over_is_whole_again(tmp_path):
    counters = bitbreeze.Counters(tmp_path)
    count(counters)
    for damage in (b"", b"?" * 512):
        (tmp_path / "0").write_bytes(damage)
        count(counters)
    assert announces(tmp_path) == 3


def test_removed_files_take_their_numbers_with_them(tmp_path):
    counters = bitbreeze.Counters(tmp_path / "counters")
    count(counters, 7)
    (tmp_path / "counters" / "0").unlink()
    (tmp_path / "counters").rmdir()
    assert sum(counters.total(NOW + 1).took) == 0
    count(counters, 2, now=NOW + 1)
    assert announces(tmp_path / "counters") == 2


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
        **{"full": 1, "address": 1, "request": 2, "internal": 1}
    }


def test_refusals_are_of_a_known_kind():
    tree = ast.parse(Path(bitbreeze.__file__).read_text())
    kinds = {
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrackerError"
        for keyword in node.keywords
    }
    assert kinds and kinds | {"request", "internal"} == set(bitbreeze.FAILURES)


def cgi(folder):
    """Announce to app.py as a CGI program."""
    query = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881"
    environ = {
        **{"GATEWAY_INTERFACE": "CGI/1.1", "REQUEST_METHOD": "GET"},
        **{"PATH_INFO": "/announce", "QUERY_STRING": query},
        **{"REMOTE_ADDR": "192.0.2.1", "TRACKER_DATA": str(folder)},
        **{"SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1"},
    }
    subprocess.run([sys.executable, bitbreeze.__file__], env=environ, check=True)


def test_a_cgi_program_is_counted(tmp_path):
    cgi(tmp_path)
    cgi(tmp_path)
    assert announces(tmp_path / "counters") == 2
    assert os.listdir(tmp_path / "counters") == ["0"]


# What the outside is told


def parsed(text):
    """Return a page of metrics as {(name, labels): number}, without the prefix."""
    return {
        (sample.name.removeprefix("bitbreeze_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(tracker):
    client = tracker(track="any")
    client.announce(1, left=0)
    client.announce(2, event="paused", address="2001:db8::1")
    client.announce(3, address="192.0.2.3", key="a")
    client.announce(3, address="2001:db8::3", key="a", port=0)
    client.announce(4, left=0, event="completed", info_hash=b"i" * 20)
    client.announce(4, left=0, event="stopped", info_hash=b"i" * 20)
    client.announce(5, port="x")
    client.scrape(b"h" * 20)
    status, headers, body = client.get("/metrics")
    assert status == "200 OK"
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    found = parsed(body.decode())
    expected = {
        **{"swarms": 1, "seeders": 1, "leechers": 2, "partial_seeds": 1},
        **{"snatches": 1, "announces_total": 7, "scrapes_total": 1},
        "announce_duration_seconds_count": 7,
    }
    assert expected.items() <= {name: n for (name, *_), n in found.items()}.items()
    assert (found["peers", "ipv4"], found["peers", "ipv6"]) == (2, 2)
    assert found["failures_total", "request"] == 1
    assert found["failures_total", "internal"] == 0
    took = [n for (name, *_), n in found.items() if name.endswith("_bucket")]
    assert took == sorted(took) and took[-1] == 7
    assert found["announce_duration_seconds_sum",] > 0


def test_metrics_have_types_and_help(tracker):
    text = tracker().get("/metrics")[2].decode()
    families = list(text_string_to_metric_families(text))
    assert {family.name: family.type for family in families} == {
        f"bitbreeze_{name.removesuffix('_total')}": kind
        for name, kind, _ in bitbreeze.METRICS
    }
    assert all(family.documentation and family.samples for family in families)


def test_peers_by_family_in_a_swarm_of_many_pages(tmp_path, settings):
    store = bitbreeze.FileStore(tmp_path, settings)
    for number in range(300):
        address = b"\x0b\0" + number.to_bytes(2, "big")
        both = (address, address * 4) if number % 3 == 0 else (address,)
        for each in both:
            peer = bitbreeze.Announce(b"h" * 20, peer_id(number), each, 6881, 0, key=1)
            store.announce(peer, 0, NOW)
    assert store.families(NOW) == (300, 100)
    assert store.families(NOW + settings.peer_ttl + 1) == (0, 0)


def test_metrics_of_killed_workers_are_exact(tmp_path):
    port, environ = free_port(), {"TRACKER_DATA": str(tmp_path)}

    def numbers(server):
        with urlopen(f"{server.url}/metrics", timeout=20) as response:
            return parsed(response.read().decode())

    def send(server, number):
        with ThreadPoolExecutor(8) as pool:
            for peer in range(number):
                pool.submit(announce, server.url, b"h" * 20, peer_id(peer), 2000)

    with serving(gunicorn(port, 2, 4), port, environ) as server:
        send(server, 150)
        assert numbers(server)["announces_total",] == 150
        old = set(server.workers())
        for worker in old:
            os.kill(worker, signal.SIGKILL)
        poll(lambda: len(set(server.workers()) - old) == 2, 20, "new workers")
        server.wait_until_ready()
        assert numbers(server)["announces_total",] == 150
        send(server, 50)
        assert numbers(server)["announces_total",] == 200
        server.signal(signal.SIGKILL)
    with serving(gunicorn(port, 2, 4), port, environ) as server:
        assert numbers(server)["announces_total",] == 200


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("module", "name", "broken", "reason"),
    [
        (os, "pwrite", lambda *_: 1, "No space left on device"),
        (bitbreeze.fcntl, "flock", no_locks, "No locks available"),
    ],
)
def test_health(tracker, monkeypatch, tmp_path, module, name, broken, reason):
    client = tracker()
    assert client.get("/health")[0] == "200 OK"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        status, headers, body = client.get("/health")
    assert status == "503 SERVICE UNAVAILABLE"
    assert headers["Cache-Control"] == "no-store"
    reason = f"the data folder cannot be written: {reason}"
    assert json.loads(body) == {"status": "failing", "reason": reason}
    status, headers, body = client.get("/health")
    assert (status, json.loads(body)) == ("200 OK", {"status": "ok"})
    assert headers["Cache-Control"] == "no-store"
    assert not list((tmp_path / "data").iterdir())


def test_health_with_a_file_in_place_of_the_folder(tracker, tmp_path):
    (tmp_path / "data").write_bytes(b"")
    status, _, body = tracker().get("/health")
    assert status == "503 SERVICE UNAVAILABLE"
    assert json.loads(body)["reason"].endswith(": File exists")


def test_health_of_many_at_once(tracker):
    client = tracker()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.get, "/health") for _ in range(200)]
    assert {each.result()[0] for each in asked} == {"200 OK"}


# History

HOUR, HASH = 3600, b"h" * 20
NOON = NOW // HOUR * HOUR


class Swarms:
    """Swarms of a seeder and two leechers each, as a store yields them."""

    def __init__(self, in_each):
        self.in_each, self.walked = in_each, []

    def __call__(self, now, first):
        self.walked.append(first)
        for _ in range(self.in_each):
            yield HASH, bitbreeze.Counts(1, 2, 0, 7)


def run(history, swarms, now):
    """Step as announces do, until there is nothing to do; return how often."""
    steps = 0
    while not history.quiet[0] <= now < history.quiet[1]:
        history.step(swarms, now)
        steps += 1
    return steps


def times(history, now):
    return [sample.time for sample in history.samples(now)]


def test_a_sample_an_hour_of_all_processes(tmp_path):
    swarms = Swarms(1)
    mine, other = (bitbreeze.History(tmp_path / "history") for _ in range(2))
    run(mine, swarms, NOON + 5)
    assert mine.samples(NOON + 5) == [(256, 512, 256, NOON + 5)]
    for now in (NOON + 6, NOON + HOUR - 1):
        run(mine, swarms, now)
        run(other, swarms, now)
    assert len(swarms.walked) == 256
    run(other, swarms, NOON + HOUR)
    run(mine, swarms, NOON + HOUR)
    assert times(mine, NOON + HOUR) == [NOON + 5, NOON + HOUR]
    assert len(swarms.walked) == 512


def test_a_step_counts_a_slice(tmp_path):
    history, swarms = bitbreeze.History(tmp_path / "history"), Swarms(40)
    for _ in range(4):
        history.step(swarms, NOON)
    assert swarms.walked == list(range(10))  # ten folders of 40 are four slices
    history.step(swarms, NOON + 4)  # after quiet seconds, more
    assert 80 < len(swarms.walked) < 100
    run(history, swarms, NOON + 4)
    assert history.samples(NOON + 4) == [(10240, 20480, 10240, NOON + 4)]


def test_another_process_takes_over_from_a_dead_one(tmp_path):
    dead, other = (bitbreeze.History(tmp_path / "history") for _ in range(2))
    dead.step(Swarms(200), NOON)
    assert run(other, Swarms(200), NOON + 299) == 1
    assert times(other, NOON + 299) == []
    assert run(other, Swarms(200), NOON + 300) == 513  # and one to see the end
    assert times(other, NOON + 300) == [NOON + 300]


def test_a_month_is_kept_in_order(tmp_path):
    history = bitbreeze.History(tmp_path / "history")
    for hour in range(800):
        run(history, Swarms(0), NOON + hour * HOUR)
    now = NOON + 799 * HOUR
    assert times(history, now) == [NOON + hour * HOUR for hour in range(56, 800)]
    assert (tmp_path / "history").stat().st_size == 16 + 744 * 16
    assert len(times(history, now + 700 * HOUR)) == 44


def test_a_clock_that_jumps_neither_floods_nor_stops_it(tmp_path):
    history, swarms = bitbreeze.History(tmp_path / "history"), Swarms(0)
    jumps = (0, 1, 5000, 5001, 2, -300, -299, 3, 5002, 4)
    for hour in jumps:
        for second in range(3):
            run(history, swarms, NOON + hour * HOUR + second)
    assert len(swarms.walked) == 256 * len(jumps)
    assert times(history, NOON + 5 * HOUR) == [
        NOON + hour * HOUR for hour in (-300, -299, 0, 1, 2, 3, 4)
    ]


@pytest.mark.parametrize("data", [b"hist", b"hist\x02" + bytes(11920), b"?" * 3000])
def test_a_damaged_history_is_set_aside(tmp_path, caplog, data):
    (tmp_path / "history").write_bytes(data)
    history = bitbreeze.History(tmp_path / "history")
    assert history.samples(NOON) == []
    run(history, Swarms(1), NOON)
    run(history, Swarms(1), NOON + HOUR)
    assert times(history, NOON + HOUR) == [NOON, NOON + HOUR]
    assert (tmp_path / "history.damaged").read_bytes() == data
    assert len(caplog.records) == 1


def test_a_torn_sample_is_none(tmp_path):
    history = bitbreeze.History(tmp_path / "history")
    run(history, Swarms(1), NOON)
    run(history, Swarms(1), NOON + HOUR)
    data = (tmp_path / "history").read_bytes()
    (tmp_path / "history").write_bytes(data[:-1])
    assert times(history, NOON + HOUR) == [NOON]


def test_without_a_folder_there_is_no_history(tmp_path, caplog):
    (tmp_path / "data").write_bytes(b"a file")
    history = bitbreeze.History(tmp_path / "data" / "history")
    for now in range(NOON, NOON + 3 * HOUR, 60):
        run(history, Swarms(1), now)
    assert history.samples(NOON) == []
    assert len(caplog.records) == 1


def test_a_sample_that_fails_is_begun_again(tmp_path, caplog):
    def broken(now, first):
        yield HASH, bitbreeze.Counts(5, 5, 0, 0)
        raise OSError(errno.EIO, "broken")

    history = bitbreeze.History(tmp_path / "history")
    for now in (NOON, NOON + 1, NOON + 300):
        run(history, broken, now)
    assert len(caplog.records) == 1
    run(history, Swarms(1), NOON + 700)
    assert history.samples(NOON + 700) == [(256, 512, 256, NOON + 700)]


def test_announces_take_the_sample(tracker, tmp_path, monkeypatch):
    client = tracker(track="any")
    monkeypatch.setattr(bitbreeze.time, "time", lambda: NOON + 0.5)
    client.announce(1, left=0)
    assert client.app.tracker.history.samples(NOON) == [(1, 0, 1, NOON)]
    for number in range(300):  # each beginning with another byte, or nearly
        client.announce(number, info_hash=bytes((number % 256,)) * 20)
    monkeypatch.setattr(bitbreeze.time, "time", lambda: NOON + HOUR)
    for _ in range(2):
        client.announce(1, left=0)
        assert len(client.app.tracker.history.samples(NOON + HOUR)) == 1
    client.announce(1, left=0)
    assert client.app.tracker.history.samples(NOON + HOUR)[1] == (
        *(1, 300, 256, NOON + HOUR),
    )


def test_a_cgi_program_takes_the_sample_at_once(tmp_path, settings):
    store, now = bitbreeze.FileStore(tmp_path, settings), int(time.time())
    for number in range(300):
        info_hash = bytes((number % 256,)) + number.to_bytes(19, "big")
        peer = bitbreeze.Announce(info_hash, peer_id(1), b"\x0b\0\0\1", 6881, 0)
        store.announce(peer, 0, now)
    cgi(tmp_path)
    found = bitbreeze.History(tmp_path / "history").samples(int(time.time()))
    assert found[0][:3] == (300, 1, 301)


# The graph of a month


def drawn(numbers, now=NOW):
    """Return a graph of samples given as {hours ago: (seeders, leechers)}."""
    samples = [
        bitbreeze.Sample(*numbers[ago], 1, now - ago * HOUR)
        for ago in sorted(numbers, reverse=True)
    ]
    return bitbreeze.month_graph(samples, now)


def test_no_graph_of_fewer_than_two_samples():
    assert drawn({}) == drawn({5: (1, 1)}) == ""


def test_graph_is_svg_without_style_or_script():
    text = drawn({ago: (ago, 744 - ago) for ago in range(744)})
    svg = ET.fromstring(text)
    names = {each.tag.rpartition("}")[2] for each in svg.iter()}
    assert names == {"svg", "title", "desc", "rect", "text", "path", "line"}
    attributes = {name for each in svg.iter() for name in each.attrib}
    assert not [n for n in attributes if n == "style" or n.startswith("on")]
    assert svg.attrib["role"] == "img"
    labels = {each.attrib.get("id") for each in svg}
    assert set(svg.attrib["aria-labelledby"].split()) <= labels
    assert len(text) < 16000


def test_graph_says_its_numbers():
    text = drawn({700: (1200, 0), 40: (7, 3), 0: (40, 2)})
    assert "Seeders: 40 at last, 7 at least, 1,200 at most" in text
    assert "Leechers: 2 at last, 0 at least, 3 at most" in text


@pytest.mark.parametrize(
    ("most", "top"),
    [(0, 2), (1, 2), (3, 4), (9, 10), (11, 12), (25, 30), (199, 200), (1546, 1600)],
)
def test_graph_ends_at_a_round_number(most, top):
    assert f">{top:,}</text>" in drawn({1: (0, 0), 0: (most, 0)})


def test_a_gap_is_a_gap():
    at = {20, 19, 18, 17, 9, 8, 6, 5, 1}  # one hour that is missing is none
    text = drawn({ago: (10, 5) for ago in at})
    lines = re.findall(r'd="M(\d+) (\d+)l([-\d ]+)" stroke', text)
    assert lines == [
        *(
            ("724", "0", "1 0 1 0 1 0"),
            ("735", "0", "1 0 2 0 1 0"),
            ("743", "0", "1 0"),
        ),
        *(("724", "100", "1 0 1 0 1 0"), ("735", "100", "1 0 2 0 1 0")),
        ("743", "100", "1 0"),
    ]


def test_graph_names_mondays():
    # 2027-01-15, a Friday
    dates = re.findall(r'text-anchor="middle">([^<]+)<', drawn({1: (1, 1), 0: (1, 1)}))
    assert dates == ["21 Dec", "28 Dec", "4 Jan", "11 Jan"]


def contrast(colour, other):
    def luminance(text):
        parts = [int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [
            p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(colour), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#121212", "#1c1b22"])
def test_colours_can_be_seen(background):
    for colour in set(re.findall("#[0-9a-f]{6}", drawn({1: (1, 1), 0: (1, 1)}))):
        assert contrast(colour, background) >= 3
