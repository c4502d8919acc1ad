"""The Redis store: the contract, engines that fail, and trackers that share one."""

import inspect
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest
from conftest import NOW, Client, all_peers, make_settings, peer_id
from contract import *  # noqa: F403
from contract import Swarm
from servers import (
    APP,
    ROOT,
    Engine,
    announce,
    cluster,
    free_port,
    gunicorn,
    poll,
    serving,
    wait_for_cluster,
)
from test_clients import KINDS, make_torrent, seeded, session, snatched
from test_clients import add as add_to

import app as bitbreeze

HASH = b"h" * 20


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """An engine alone and the nodes of a Cluster, for all tests of the contract."""
    alone = Engine(tmp_path_factory.mktemp("engine"))
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield {"alone": alone, "cluster": nodes[0], "nodes": nodes}
    alone.stop()


@pytest.fixture(params=["alone", pytest.param("cluster", marks=pytest.mark.long)])
def make_store(tmp_path, engines, request):
    """A function that makes stores; those with the same name share their data.

    A Cluster has only one database, so in it, a test has one such name.
    """
    nodes = engines["nodes"] if request.param == "cluster" else [engines["alone"]]
    for node in nodes:
        node.client.flushall()
    names = []

    def make(name="data", **overrides):
        if name not in names:
            names.append(name)
        url = engines[request.param].url
        if request.param == "alone":
            url = f"{url[:-1]}{names.index(name)}"
        elif names[-1] == name and len(names) > 1:  # the next example of hypothesis
            names[:] = [name]
            for node in nodes:
                node.client.flushall()
        store = bitbreeze.RedisStore(url, tmp_path, make_settings(**overrides))
        store.has_clock = False  # the tests say what time it is
        return store

    return make


CONTRACT = [
    test
    for name, test in globals().items()
    if name.startswith("test_")
    and inspect.signature(test).parameters.keys() in ({"swarm"}, {"make_store"})
    and not hasattr(test, "pytestmark")
    and name != "test_an_endpoint_belongs_to_one_peer"  # it takes seconds
]


@pytest.mark.parametrize("check", CONTRACT)
def test_a_cluster_is_a_store(tmp_path, engines, check):
    """Most of the contract; --long tests all of it."""

    def make_store(_="data", **overrides):
        for node in engines["nodes"]:
            node.client.flushall()
        url, settings = engines["cluster"].url, make_settings(**overrides)
        store = bitbreeze.RedisStore(url, tmp_path, settings)
        store.has_clock = False
        return store

    by_swarm = "swarm" in inspect.signature(check).parameters
    check(Swarm(make_store()) if by_swarm else make_store)


DURABLE = ["--appendonly", "yes", "--appendfsync", "always"]


@pytest.fixture
def engine(tmp_path):
    engine = Engine(tmp_path, *DURABLE)
    yield engine
    engine.stop()


@pytest.fixture(params=["alone", "cluster"])
def nodes(tmp_path, request):
    """One engine alone, or those of a Cluster."""
    if request.param == "cluster":
        with cluster(tmp_path, *DURABLE) as engines:
            yield engines
    else:
        yield [request.getfixturevalue("engine")]


def make(engine, tmp_path, has_clock=True, **settings):
    store = bitbreeze.RedisStore(engine.url, tmp_path, make_settings(**settings))
    store.has_clock = has_clock
    return store


def add(store, peer, now=NOW, left=1, info_hash=HASH, progress=0, **fields):
    address = bytes((9, peer >> 16 & 255, peer >> 8 & 255, peer & 255))
    known = {"left": left, "key": 5, **fields}
    peer = bitbreeze.Announce(info_hash, peer_id(peer), address, 1000, **known)
    return store.announce(peer, 50, now, progress)


def test_the_time_is_the_engines(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1, now=0)  # this host's clock is wrong
    assert abs(store.last_seen(HASH, 0) - time.time()) < 5
    add(store, 2, now=2**31)
    assert store.scrape([HASH], 0) == {HASH: (0, 2, 0, 0)}


def test_keys_expire_in_the_engine(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    keys = [f"bb:{{{HASH.hex()}}}:{each}" for each in "ipt"]
    assert all(0 < engine.client.ttl(key) <= 4200 + 120 for key in keys)
    add(store, 1, left=0)
    add(store, 1, event="stopped", left=0)
    assert engine.client.keys() == [keys[0].encode()]
    assert 7776000 < engine.client.ttl(keys[0]) <= 7776000 + 4200
    assert store.scrape([HASH], NOW) == {HASH: (0, 0, 0, 1)}


def test_counts_do_not_outlive_the_peers(engine, tmp_path):
    """The peers expire in the engine before the snatches do."""
    store = make(engine, tmp_path)
    add(store, 1)
    add(store, 1, left=0)
    add(store, 2)
    assert store.scrape([HASH], NOW) == {HASH: (1, 1, 0, 1)}
    for key in "pt":
        engine.client.delete(f"bb:{{{HASH.hex()}}}:{key}")
    for _ in range(2):
        assert store.scrape([HASH], NOW) == {HASH: (0, 0, 0, 1)}
    assert add(store, 3)[0] == (0, 1, 0, 1)
    check_keys(engine)


def test_many_that_vanish_at_once_stall_nobody(engine, tmp_path):
    store = make(engine, tmp_path, has_clock=False)
    for peer in range(3000):
        add(store, peer)
    add(store, 5000, NOW + 4000)
    for turn in range(1, 61):  # one has stayed, so they go by fifty
        (counts,) = store.scrape([HASH], NOW + 4201).values()
        assert counts.leechers == 3001 - 50 * turn
    (counts,) = store.scrape([HASH], NOW + 9000).values()
    assert counts.leechers == 0 and not engine.client.keys()


def test_max_swarms_counts_keys(engine, tmp_path):
    store = make(engine, tmp_path, max_swarms=10)
    for number in range(10):
        add(store, 1, info_hash=b"%020d" % number)
    with pytest.raises(bitbreeze.TrackerError, match="this tracker is full"):
        add(store, 1)
    with pytest.raises(bitbreeze.TrackerError, match="this tracker is full"):
        store.raise_snatches(HASH, 1, NOW)
    add(store, 1, info_hash=b"%020d" % 3, event="stopped")
    add(store, 1)


# -- Faults


def test_a_flushed_script_is_loaded_again(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    engine.client.script_flush()
    assert add(store, 2)[0] == (0, 2, 0, 0)


def refused(store):
    with pytest.raises(OSError) as caught:
        add(store, 1)
    return caught.value.strerror


def test_a_stopped_engine_is_refused_and_used_again(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    engine.stop()
    assert "Connection refused" in refused(store)
    with pytest.raises(OSError):
        store.probe()
    engine.start()
    assert add(store, 2)[0] == (0, 2, 0, 0)  # with its data
    engine.stop()
    for path in Path(engine.folder).glob("appendonlydir/*"):
        path.unlink()
    engine.start()
    assert add(store, 2)[0] == (0, 1, 0, 0)  # and without


def test_a_read_only_engine_is_refused(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    engine.client.execute_command("REPLICAOF", "127.0.0.1", free_port())
    assert "read only replica" in refused(store) or "MASTERDOWN" in refused(store)
    engine.client.execute_command("REPLICAOF", "NO", "ONE")
    assert add(store, 2)[0] == (0, 2, 0, 0)


def test_a_full_engine_is_refused(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    engine.client.config_set("maxmemory", 1)
    assert "maxmemory" in refused(store)
    assert store.scrape([HASH], NOW) == {HASH: (0, 1, 0, 0)}
    engine.client.config_set("maxmemory", 0)
    assert add(store, 2)[0] == (0, 2, 0, 0)


def test_peers_leave_a_full_engine(engine, tmp_path):
    store = make(engine, tmp_path, has_clock=False)
    for peer in range(5):
        add(store, peer, NOW + peer)
    engine.client.config_set("maxmemory", 1)
    assert add(store, 1, NOW + 9, event="stopped")[0] == (0, 4, 0, 0)
    assert store.scrape([HASH], NOW + 4202) == {HASH: (0, 3, 0, 0)}
    engine.client.config_set("maxmemory", 0)
    check_keys(engine)


def test_a_hung_engine_stops_a_worker_for_seconds_only(engine, tmp_path):
    store = make(engine, tmp_path)
    add(store, 1)
    engine.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    assert "Timeout" in refused(store)
    assert time.monotonic() - started < 5
    engine.process.send_signal(signal.SIGCONT)
    poll(lambda: add(store, 2), 10, "an answer")


def test_doctor_looks_at_the_engine(nodes, tmp_path):
    store, last = make(nodes[0], tmp_path), nodes[-1]
    (finding,) = bitbreeze._check_engine(store)
    version = re.escape(last.client.info()["redis_version"])
    text = rf"Redis {version}, redis://127\.0\.0\.1:\d+/0, answers in \d+\.\d ms\."
    assert finding.level == "ok" and re.fullmatch(text, finding.text)
    for node in nodes:
        node.client.config_set("maxmemory", "100mb")
        node.client.config_set("maxmemory-policy", "allkeys-lru")
    _, finding = bitbreeze._check_engine(store)
    assert finding.level == "warning" and "noeviction" in finding.text
    for node in nodes:
        node.stop()
    (finding,) = bitbreeze._check_engine(store)
    assert finding.level == "failure"
    assert finding.text.startswith("Redis cannot be used: redis://127.0.0.1:")


# -- Many trackers


@contextmanager
def two_trackers(tmp_path, engine, command):
    """Run two trackers that share an engine, each with its own data folder."""
    with ExitStack() as stack:
        servers = []
        for port in (free_port(), free_port()):
            folder = str(tmp_path / f"data{port}")
            environ = {"TRACKER_DATA": folder, "TRACKER_STORE": engine.url}
            servers.append(stack.enter_context(serving(command(port), port, environ)))
        yield servers


def flush(engine, _):
    engine.client.script_flush()


def fill(engine, _):
    engine.client.config_set("maxmemory", 1)
    time.sleep(0.2)
    engine.client.config_set("maxmemory", 0)


def protect(engine, _):
    engine.client.config_set("min-replicas-to-write", 1)
    time.sleep(0.2)
    engine.client.config_set("min-replicas-to-write", 0)


def kill(engine, _):
    engine.stop()
    time.sleep(0.2)
    engine.start()


def kill_worker(_, trackers):
    with suppress(ProcessLookupError):
        os.kill(random.choice(random.choice(trackers).workers()), signal.SIGKILL)


ACCIDENTS = [flush, fill, protect, kill, kill_worker]


def test_nothing_acknowledged_is_lost(nodes, tmp_path, cases):
    """Of 32 clients of two trackers, while engines and workers have accidents."""
    with two_trackers(tmp_path, nodes[0], gunicorn) as trackers:
        storm(nodes, trackers, tmp_path, cases)


def storm(nodes, trackers, tmp_path, cases):
    done, kept, refusals = threading.Event(), [set() for _ in range(32)], [0] * 32

    def ask(number):
        for count in range(1900):  # each peer has its own port
            if done.is_set():
                return
            peer = number * 1900 + count
            info_hash = bytes([peer % 7]) * 20
            with suppress(OSError, HTTPException):  # of a killed worker
                tracker = trackers[count % 2]
                reply = announce(tracker.url, info_hash, peer_id(peer), 2000 + peer)
                if b"failure reason" in reply:
                    assert b"cannot read or write" in reply[b"failure reason"]
                    refusals[number] += 1
                else:
                    kept[number].add((info_hash, peer_id(peer)))

    with ThreadPoolExecutor(32) as pool:
        clients = [pool.submit(ask, number) for number in range(32)]
        try:
            for _ in range(cases(4)):
                for accident in random.sample(ACCIDENTS, len(ACCIDENTS)):
                    accident(random.choice(nodes), trackers)
                    time.sleep(0.3)
        finally:
            done.set()
        for client in clients:
            client.result()
    if len(nodes) > 1:
        wait_for_cluster(nodes)
    store = make(nodes[0], tmp_path)
    found = {
        (info_hash, peer)
        for info_hash, peers in all_peers(store, int(time.time()))
        for peer in bitbreeze.chunks(peers.ids, 20)
    }
    assert set().union(*kept) <= found and len(found) > 50
    assert sum(refusals) > 0
    for tracker in trackers:
        assert "Traceback" not in tracker.log()
    for node in nodes:
        check_keys(node)


RECORD = struct.Struct("<20sIBII6s18s")


def check_keys(engine):
    """Fail unless all that is kept of each swarm agrees."""
    for key in engine.client.keys("bb:{*}:i"):
        fields = engine.client.hgetall(key)
        numbers = [int(fields.pop(each, 0)) for each in (b"p", b"l", b"d", b"s")]
        string = engine.client.get(key[:-1] + b"p") or b""
        records = [*RECORD.iter_unpack(string)][: numbers[0]]
        assert engine.client.zcard(key[:-1] + b"t") == len(records)
        expected = {}
        for number, (peer, _, _, _, _, *ends) in enumerate(records):
            expected[peer] = b"%d" % number
            for end in filter(any, ends):
                source = b"a" + end[: 4 if len(end) == 6 else 6]
                expected[source] = b"%d" % (int(expected.get(source, 0)) + 1)
                if any(end[-2:]):
                    expected[end] = peer
        assert fields == expected


def test_a_swarm_across_two_trackers(engine, tmp_path):
    """HTTP on one, UDP on the other."""
    command = lambda port: [*APP, "--port", port]  # noqa: E731
    with (
        two_trackers(tmp_path, engine, command) as (first, second),
        session() as seeding,
        session() as leeching,
    ):
        info = make_torrent(tmp_path / "seed", first.url, KINDS["hybrid"])
        add_to(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(second, info), 20, "the seeder, at the other tracker")
        over_udp = make_torrent(
            tmp_path / "copy", f"udp://127.0.0.1:{second.port}", KINDS["hybrid"]
        )
        (tmp_path / "leech").mkdir()
        leecher = add_to(leeching, over_udp, tmp_path / "leech")
        poll(lambda: leecher.status().is_seeding, 60, "the download")
        poll(lambda: snatched(first, info), 20, "the news that it is complete")


def test_snatches_move_to_redis_and_back(engine, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    files, now = bitbreeze.FileStore(here, make_settings()), int(time.time())
    for number in range(700):
        files.raise_snatches(number.to_bytes(20, "big"), number, now)
    before = dict(files.swarms(now))
    moves = [
        ({"TRACKER_DATA": here}, {"TRACKER_STORE": engine.url, "TRACKER_DATA": there})
    ]
    moves.append((moves[0][1], {"TRACKER_DATA": there}))
    for number, (source, target) in enumerate(moves):
        for command, environ in (("export", source), ("import", target)):
            words = [*APP, command, tmp_path / str(number)]
            environ = {**os.environ, **{k: str(v) for k, v in environ.items()}}
            subprocess.run(words, check=True, env=environ, cwd=ROOT)
        assert dict(make(engine, tmp_path).swarms(now)) == before
    assert dict(bitbreeze.FileStore(there, make_settings()).swarms(now)) == before


@pytest.mark.parametrize("command", ["export", "import"])
def test_snatches_do_not_move_without_an_engine(tmp_path, command):
    (tmp_path / "file").write_text(json.dumps({"ab" * 20: 3}))
    environ = {**os.environ, "TRACKER_STORE": "redis://127.0.0.1:1/0"}
    path = tmp_path / ("file" if command == "import" else "new")
    done = subprocess.run(
        [*APP, command, path], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"The {command} failed: " in done.stderr
    assert "127.0.0.1:1" in done.stderr and not (tmp_path / "new").exists()


def test_a_tracker_says_that_its_engine_is_gone(engine, tmp_path, caplog):
    settings = {"store": engine.url, "data": str(tmp_path / "data")}
    client = Client(bitbreeze.create_app(settings))
    assert client.announce()[b"incomplete"] == 1
    assert client.get("/health")[0] == "200 OK"
    engine.stop()
    for _ in range(3):
        reply = client.announce(2)
        assert reply[b"failure reason"] == bitbreeze.DISK_FAILS.encode()
        assert client.get("/health")[0].startswith("503")
    logged = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(logged) <= 2 and all("Connection refused" in each for each in logged)
    engine.start()
    assert client.announce(2)[b"incomplete"] == 2
    assert client.get("/health")[0] == "200 OK"


def test_without_its_package_the_start_says_what_to_install():
    code = "import sys; sys.modules['redis'] = None; import app"
    environ = {**os.environ, "TRACKER_STORE": "redis://127.0.0.1:1/0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode
    sentence = f"store needs a package. Run: {sys.executable} -m pip install redis"
    assert done.stderr.endswith(f"SettingsError: {sentence}\n")


def test_a_password_is_shown_nowhere(tmp_path):
    url = "redis://:secret@127.0.0.1:1/0"
    store = bitbreeze.RedisStore(url, tmp_path, make_settings())
    (finding,) = bitbreeze._check_engine(store)
    assert "secret" not in finding.text + store.place


def test_a_socket_file_is_an_address(tmp_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("s") / "s"
    engine = Engine(tmp_path, "--unixsocket", path)
    try:
        engine.url = f"unix://{path}"
        assert add(make(engine, tmp_path), 1)[0] == (0, 1, 0, 0)
    finally:
        engine.stop()
