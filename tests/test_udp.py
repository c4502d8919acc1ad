"""UDP: packets of every kind, in process and on real servers."""

import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import NOW, all_peers, mutated, peer_id
from servers import (
    APP,
    ROOT,
    Server,
    announce,
    close,
    free_port,
    has_ipv6,
    poll,
    serving,
    uwsgi,
)

import app as bitbreeze

HASH, OTHER = b"h" * 20, b"i" * 20
V4, V6 = "192.0.2.1", "2001:db8::1"
PROTOCOL = bytes.fromhex("0000041727101980")


def packet(connection, action, rest=b"", transaction=b"abcd"):
    return connection + struct.pack(">I", action) + transaction + rest


def announced(
    peer=1, *, info_hash=HASH, left=1, event=0, key=0, numwant=-1, port=None, url=b""
):
    """Return an announce from its info_hash on."""
    port = 1000 + peer if port is None else port
    numbers = struct.pack(">QQQIIIiH", 5, left, 7, event, 0, key, numwant, port)
    return info_hash + peer_id(peer) + numbers + url


@pytest.fixture
def udp(tracker):
    """A function that makes a UdpServer with settings; its tracker is a Client's."""
    made = []

    def make(**settings):
        client = tracker(**settings)
        sock = bitbreeze.bound_socket(socket.SOCK_DGRAM, "127.0.0.1", 0)
        made.append(sock)
        server = bitbreeze.UdpServer(client.app.tracker, sock)
        server.client = client
        return server

    yield make
    for sock in made:
        sock.close()


def connect(server, source=V4, now=NOW):
    reply = server.answer(packet(PROTOCOL, 0), source, now)
    assert reply[:8] == b"\0\0\0\0abcd" and len(reply) == 16
    return reply[8:]


def ask(server, action, rest, source=V4, now=NOW, answer=None):
    """Return the reply with a good connection id, behind its head.

    Its action is ``answer``, by default the same as that of the request.
    """
    sent = packet(connect(server, source, now), action, rest)
    reply = server.answer(sent, source, now)
    expected = action if answer is None else answer
    assert reply[:8] == struct.pack(">I", expected) + b"abcd", reply
    return reply[8:]


def refusal(*request):
    return ask(*request, answer=3).decode()


# Replies


def test_an_announce_and_a_scrape(udp):
    server = udp(interval=1000, small_interval=1000)
    ask(server, 1, announced(1, left=0, event=2))
    ask(server, 1, announced(2, left=5), "192.0.2.2")
    reply = ask(server, 1, announced(3), "192.0.2.3")
    interval, leechers, seeders = struct.unpack(">III", reply[:12])
    assert 900 <= interval <= 1100 and (leechers, seeders) == (2, 1)
    ends = {reply[at : at + 6] for at in range(12, len(reply), 6)}
    assert ends == {b"\xc0\0\2\1\3\xe9", b"\xc0\0\2\2\3\xea"}
    ask(server, 1, announced(2, left=0, event=1), "192.0.2.2")
    counts = struct.unpack(">6I", ask(server, 2, OTHER + HASH))
    assert counts == (0, 0, 0, 2, 1, 1)
    assert ask(server, 1, announced(1, event=3))[12:] == b""
    assert struct.unpack(">III", ask(server, 2, HASH)) == (1, 1, 1)


def test_a_family_gets_its_own_endpoints(udp):
    server = udp()
    ask(server, 1, announced(1))
    ask(server, 1, announced(2), V6)
    assert ask(server, 1, announced(3), "192.0.2.3")[12:] == b"\xc0\0\2\1\3\xe9"
    assert len(ask(server, 1, announced(4), "2001:db8::4")[12:]) == 18
    # A dual-stack socket sees IPv4 clients as mapped addresses.
    assert len(ask(server, 1, announced(5), "::ffff:192.0.2.5")[12:]) % 6 == 0


@pytest.mark.parametrize(
    ("source", "most"), [("198.51.100.9", 202), ("2001:db8:f::1", 67)]
)
def test_no_network_cuts_a_reply(udp, source, most):
    server = udp(max_numwant=1000, max_peers_per_address=0)
    for peer in range(300):
        other = f"198.51.{peer % 100}.7" if "." in source else f"2001:db8:{peer:x}::7"
        ask(server, 1, announced(peer), other)
    reply = ask(server, 1, announced(999, numwant=1000), source)
    assert len(reply) == 12 + most * (6 if "." in source else 18)
    assert len(reply) + 8 <= 1232


@pytest.mark.parametrize(
    ("numwant", "given"),
    [(-1, 5), (-(2**31), 5), (0, 0), (3, 3), (9, 8), (2**31 - 1, 8)],
)
def test_numwant_has_a_default_and_a_most(udp, numwant, given):
    server = udp(numwant=5, max_numwant=8)
    for peer in range(20):
        ask(server, 1, announced(peer), f"192.0.2.{peer}")
    reply = ask(server, 1, announced(99, numwant=numwant), "192.0.2.99")
    assert len(reply) == 12 + 6 * given


@pytest.mark.parametrize(
    ("left", "event", "counts"),
    [
        (0, 0, (1, 0)),
        (0, 77, (1, 0)),
        (2**64 - 1, 0, (0, 1)),  # -1, with a magnet link
        (2**63 - 1, 0, (0, 1)),
        (2**64 - 1, 1, (1, 0)),
        (5, 2**32 - 1, (0, 1)),
        (5, 4, (0, 1)),
        (5, 3, (0, 0)),
    ],
)
def test_odd_numbers(udp, left, event, counts):
    server = udp()
    ask(server, 1, announced(left=left, event=event))
    seeders, _, leechers = struct.unpack(">III", ask(server, 2, HASH))
    assert (seeders, leechers) == counts


def test_event_4_is_a_partial_seed(udp):
    server = udp()
    ask(server, 1, announced(left=5, event=4))
    assert server.client.scrape(HASH)[b"files"][HASH][b"downloaders"] == 0


@pytest.mark.parametrize(("asked", "answered"), [(1, 1), (74, 74), (75, 74), (100, 74)])
def test_hashes_of_a_scrape(udp, asked, answered):
    server, hashes = udp(), [bytes((n,)) * 20 for n in range(asked)]
    for number, info_hash in enumerate(hashes):
        for peer in range(number % 3):
            ask(server, 1, announced(peer, info_hash=info_hash))
    for rest in (b"", b"x", b"y" * 19):
        reply = ask(server, 2, b"".join(hashes) + rest)
        leechers = [count for _, _, count in struct.iter_unpack(">III", reply)]
        assert leechers == [number % 3 for number in range(answered)]
    assert ask(server, 2, HASH * 3) == bytes(36)


# One client


KEY = 0x1A2B


@pytest.mark.parametrize("key", [0, KEY])
def test_http_and_udp_are_one_peer(udp, key):
    """libtorrent sends its key over HTTP as eight hexadecimal digits."""
    server, now = udp(), int(time.time())
    sent = {"key": f"{key:08X}"} if key else {}
    ask(server, 1, announced(1, key=key), V4, now)
    assert server.client.announce(1, **sent)[b"incomplete"] == 1
    # It moves. Without the key, it would be refused now.
    assert server.client.announce(1, address="192.0.2.9", **sent)[b"incomplete"] == 1
    ask(server, 1, announced(1, key=key), V6, now)
    assert struct.unpack(">III", ask(server, 2, HASH, V4, now)) == (0, 0, 1)
    if key:
        text = refusal(server, 1, announced(1, key=key + 1), "192.0.2.77", now)
        assert text == "peer_id is in use with another key: restart your client"


def options(*parts):
    return b"".join(b"\2" + bytes((len(part),)) + part for part in parts)


KEY16 = "abcdefghij-KLM_0"


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        (b"", ""),
        (options(b"/announce"), ""),
        (options(f"/{KEY16}/announce".encode()), KEY16),
        (options(f"/announce/{KEY16}".encode()), KEY16),
        (options(b"/announce", b"?x=1&passkey=", KEY16.encode()) + b"\0", KEY16),
        (
            b"\1\1" + options(b"/abcdefghi") + b"\1" + options(b"j-KLM_0/") + b"\1",
            KEY16,
        ),
        (b"\0" + options(f"/{KEY16}".encode()), ""),
        (b"\7\3abc" + options(f"/{KEY16}".encode()), KEY16),  # an option of the future
        (options(b"/" + b"x" * 64), "x" * 64),
        (options(b"/" + b"x" * 15), ""),
        (options(b"/" + b"x" * 254, b"y" * 255), "x" * 254 + "y" * 255),
        (options(f"/{KEY16}!".encode()), f"{KEY16}!"),
        (b"\2", ""),
        (b"\2\5ab", ""),
        (b"\2\0", ""),
        (b"\1", ""),
        (options(b"\xff"), ""),
    ],
)
def test_the_key_of_an_announce(udp, sent, key):
    path = bitbreeze.key_path(*bitbreeze.url_data(sent))
    keys = [sha256(key.encode()).hexdigest()] if key else []
    assert bitbreeze.key_checksums(path) == keys
    assert ask(udp(), 1, announced(url=sent))[4:12] == struct.pack(">II", 1, 0)


# Connection ids


@pytest.mark.parametrize("source", [V4, V6])
def test_an_id_is_good_for_two_minutes(udp, source):
    server = udp()
    for start in range(NOW, NOW + 240, 17):
        connection = connect(server, source, start)
        for later, is_good in ((0, True), (60, True), (120, True), (241, False)):
            sent = packet(connection, 2, HASH)
            action = server.answer(sent, source, start + later)[:4]
            assert action == struct.pack(">I", 2 if is_good else 3), later


def test_an_id_is_for_one_address_at_all_workers(udp, tracker):
    server = udp()
    restarted = bitbreeze.UdpServer(server.tracker, server.sock)
    stranger = bitbreeze.UdpServer(
        tracker(data=f"{server.tracker.store.folder}-2").app.tracker, server.sock
    )
    connection = connect(server)
    assert connection == connect(restarted) == connect(server, f"::ffff:{V4}")
    others = connect(stranger), connect(server, "192.0.2.2"), bytes(8), PROTOCOL
    for other in others:
        assert other != connection
        reply = server.answer(packet(other, 1, announced()), V4, NOW)
        assert reply == b"\0\0\0\3abcdconnect again"
    assert server.client.scrape(HASH)[b"files"][HASH][b"incomplete"] == 0
    path = Path(server.tracker.store.folder, "udp.key")
    assert path.stat().st_size == 32 and path.stat().st_mode & 0o777 == 0o600


def test_every_length(udp, caplog):
    """Short packets get silence; who has shown no id gets no more than was sent."""
    server = udp()
    good = connect(server)
    for size in range(201):
        for action in (0, 1, 2, 3, 4, 2**31, 2**32 - 1):
            for start in (PROTOCOL, bytes(8), b"\xff" * 8, good):
                sent = packet(start, action, announced() + bytes(200))[:size]
                reply = server.answer(sent, V4, NOW)
                if size < 16 or action > 2 or size < (16, 98, 36)[action]:
                    assert reply == b""
                elif action == 0:
                    assert len(reply) == (16 if start == PROTOCOL else 0)
                elif start != good:
                    assert reply.endswith(b"connect again") and len(reply) <= size
                else:
                    assert reply[:8] == sent[8:16]
    assert not caplog.records


def test_any_packet_is_answered_or_not(udp, cases, caplog):
    """A million of them in the long run."""
    server, rnd = udp(), random.Random(5)
    ids = [connect(server), PROTOCOL, bytes(8)]
    url = options(b"/KEY/announce?x=1")
    kinds = [(0, b""), (1, announced(url=url)), (2, HASH * 3), (1, announced(left=0))]
    for _ in range(cases(25_000)):
        start, (action, rest) = rnd.choice(ids), rnd.choice(kinds)
        sent = bytearray(mutated(rnd, packet(start, action, rest)))
        if rnd.random() < 0.5:
            sent[:8] = ids[0]
        reply = server.answer(bytes(sent), V4, NOW)
        assert len(reply) <= 1232
        if bytes(sent[:8]) != ids[0]:
            assert len(reply) <= len(sent)
    assert not caplog.records


# Refusals and faults


def test_refusals_are_those_of_http_and_counted(udp):
    server = udp(track="listed")
    assert refusal(server, 1, announced()) == "torrent not registered with this tracker"
    assert ask(server, 2, HASH) == bytes(12)
    server = udp(max_peers_per_address=3, data=f"{server.tracker.store.folder}-2")
    for peer in range(3):
        ask(server, 1, announced(peer))
    assert "your address has 3 peers" in refusal(server, 1, announced(4))
    counters = server.tracker.stats.counters()
    assert (counters["announces"], counters["failure_full"]) == (4, 1)


def test_private_addresses_stay_private(udp):
    server = udp()
    ask(server, 1, announced(1), "192.168.1.2")
    assert ask(server, 1, announced(2))[12:] == b""
    assert len(ask(server, 1, announced(3), "192.168.1.3")[12:]) == 12


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (OSError(5, "no disk"), bitbreeze.DISK_FAILS),
        (KeyError("secret"), "internal error"),
    ],
)
def test_our_faults_are_logged_once_and_not_shown(
    udp, monkeypatch, caplog, fault, text
):
    server = udp()

    def fail(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(server.tracker.store, "announce", fail)
        for _ in range(3):
            assert refusal(server, 1, announced()) == text
    assert caplog.text.count("'announce over udp' failed") == 1
    ask(server, 1, announced())


# Real servers


def app(port, *options, command=()):
    return [*APP, *command, "--port", str(port), *options]


class Peer:
    """A UDP client. It asks again after a second, because datagrams get lost."""

    def __init__(self, host, port):
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_DGRAM
        )[0]
        self.sock = socket.socket(family, kind)
        self.sock.settimeout(1)
        self.sock.connect(address)  # a reply from another address does not arrive
        self.id = self.ask(PROTOCOL, 0, b"")

    def ask(self, connection, action, rest, tries=10):
        transaction = os.urandom(4)
        for _ in range(tries):
            with suppress(OSError):
                self.sock.send(packet(connection, action, rest, transaction))
                while True:
                    reply = self.sock.recv(2048)
                    if reply[4:8] == transaction:
                        assert reply[:4] == struct.pack(">I", action), reply
                        return reply[8:]
        raise TimeoutError("no reply")

    def announce(self, number=1, **fields):
        return self.ask(self.id, 1, announced(number, **fields))

    def scrape(self, *hashes):
        reply = self.ask(self.id, 2, b"".join(hashes))
        return [*struct.iter_unpack(">III", reply)]


HOSTS = ["127.0.0.1", "127.0.0.2", *["::1"] * has_ipv6()]


def test_app_serves_http_and_udp(tmp_path):
    port = free_port()
    command = app(port, "--workers", "2")
    with serving(command, port, {"TRACKER_DATA": str(tmp_path)}) as server:
        for number, host in enumerate(HOSTS):
            Peer(host, port).announce(number)
        reply = announce(server.url, HASH, peer_id(9), 2009)
        assert reply[b"incomplete"] == len(HOSTS) + 1
        assert "udp://" in server.log() and f":{port}/announce\n  front" in server.log()
        # Gunicorn's workers are replaced, and the socket stays.
        poll(lambda: len(server.workers()) == 2, 20, "two workers")
        peer, workers = Peer("127.0.0.1", port), set(server.workers())
        os.kill(server.process.pid, signal.SIGHUP)
        poll(lambda: not workers & set(server.workers()), 20, "new workers")
        poll(lambda: len(server.workers()) == 2, 20, "two of them")
        peer.announce(10)
        server.signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log()
    sock = bitbreeze.bound_socket(socket.SOCK_DGRAM, "", port)
    sock.close()


@pytest.mark.parametrize("command", [[], ["udp"]], ids=["app.py", "app.py udp"])
def test_refusals_by_real_workers(tmp_path, command):
    """gunicorn loads app.py twice, as its settings and as the application."""
    port = free_port()
    env = {"TRACKER_DATA": str(tmp_path), "TRACKER_TRACK": "listed"}
    server = Server(app(port, command=command), port, env)
    try:
        poll(lambda: "it tracks" in server.log(), 20, "the greeting")
        peer = Peer("127.0.0.1", port)
        for number in range(20):
            transaction = b"%04d" % number
            peer.sock.send(packet(peer.id, 1, announced(), transaction))
            refusal = b"torrent not registered with this tracker"
            while (reply := peer.sock.recv(2048))[4:8] != transaction:
                pass  # the answer to a connect that was sent again
            assert reply == b"\0\0\0\3" + transaction + refusal
        assert peer.scrape(HASH) == [(0, 0, 0)]
    finally:
        server.stop()
        assert "Traceback" not in server.log()
        server.output.close()


def test_a_fault_of_ours_stops_no_worker(udp, monkeypatch, caplog):
    server = udp()
    port, thread = server.sock.getsockname()[1], threading.Thread(target=server.serve)
    with monkeypatch.context() as patch:
        patch.setattr(server, "answer", lambda *_: {}["secret"])
        thread.start()
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for _ in range(3):
                sock.sendto(b"x", ("127.0.0.1", port))
            poll(lambda: "'udp' failed" in caplog.text, 5, "the log")
    Peer("127.0.0.1", port).announce(1)
    close(server.sock)
    thread.join()
    assert caplog.text.count("'udp' failed") == 1


def test_without_udp(tmp_path):
    port = free_port()
    with closing(bitbreeze.bound_socket(socket.SOCK_DGRAM, "", port)):
        ended = subprocess.run(
            app(port), cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        assert ended.returncode == 1
        sentence = f"Error: Cannot listen on UDP port {port}: Address already in use."
        assert (
            ended.stderr
            == f"{sentence} Choose another --port or --host, or --no-udp.\n"
        )
        env = {"TRACKER_DATA": str(tmp_path)}
        with serving(app(port, "--no-udp"), port, env) as server:
            assert "udp://" not in server.log()


def test_udp_beside_uwsgi(tmp_path):
    port = free_port()
    env = {"TRACKER_DATA": str(tmp_path), "TRACKER_UDP_PORT": str(port)}
    with serving(uwsgi(port), port, env) as server:
        beside = Server(app(port, command=["udp"]), port, env)
        try:
            poll(lambda: "it tracks" in beside.log(), 20, "the greeting")
            assert "http://" not in beside.log()
            Peer("127.0.0.1", port).announce(1)
            assert announce(server.url, HASH, peer_id(2), 2)[b"incomplete"] == 2
            beside.process.terminate()
            assert beside.process.wait(20) == 0
        finally:
            beside.stop()
            assert "Traceback" not in beside.log()
            beside.output.close()
    assert not list(tmp_path.glob("udp.socket"))


@pytest.mark.parametrize("command", [[], ["udp"]], ids=["app.py", "app.py udp"])
def test_no_acknowledged_peer_is_lost_when_workers_are_killed(
    tmp_path, command, is_long
):
    at, rnd = free_port(), random.Random(3)
    server = Server(
        app(at, "--workers", "4", command=command), at, {"TRACKER_DATA": str(tmp_path)}
    )
    known, is_over = [set() for _ in range(4)], threading.Event()

    def client(number):
        peer, hashes = Peer("127.0.0.1", at), [bytes((n,)) * 20 for n in range(9)]
        for count in range(15_000):
            if is_over.is_set():
                return
            info_hash, who = hashes[count % 9], number * 10**6 + count
            port = 1000 + number * 15_000 + count
            peer.announce(who, info_hash=info_hash, port=port)
            known[number].add((info_hash, peer_id(who)))

    def has_announced(number):
        return sum(map(len, known)) > number

    try:
        poll(lambda: "it tracks" in server.log(), 20, "the greeting")
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            try:
                for kill in range(1, 61 if is_long else 9):
                    poll(partial(has_announced, 50 * kill), 30, "announces")
                    workers = poll(server.workers, 20, "a worker")
                    with suppress(ProcessLookupError):
                        os.kill(rnd.choice(workers), signal.SIGKILL)
            finally:
                is_over.set()
            for each in clients:
                each.result()
    finally:
        server.stop()
        server.output.close()
    store = bitbreeze.FileStore(tmp_path, bitbreeze.Settings())
    found = {
        (info_hash, peer)
        for info_hash, peers in all_peers(store, int(time.time()))
        for peer in bitbreeze.chunks(peers.ids, 20)
    }
    assert set().union(*known) <= found and len(found) > 100


def test_an_address_that_cannot_be_answered_stops_nothing(tmp_path):
    """Such as port 0, which only a forged packet comes from."""
    port = free_port()
    with serving(app(port), port, {"TRACKER_DATA": str(tmp_path)}) as server:
        try:
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        except PermissionError:
            pytest.skip("NOT TESTED are forged packets: only root can send them")
        with raw:
            sent = packet(PROTOCOL, 0)
            head = struct.pack(">HHHH", 0, port, 8 + len(sent), 0)
            for _ in range(50):
                raw.sendto(head + sent, ("127.0.0.1", 0))
        Peer("127.0.0.1", port).announce(1)
        assert "Traceback" not in server.log()


def test_http_is_answered_during_a_flood(tmp_path):
    port, is_over = free_port(), threading.Event()
    command = app(port, "--workers", "1")
    with serving(command, port, {"TRACKER_DATA": str(tmp_path)}) as server:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", port))

        def flood():
            while not is_over.is_set():
                with suppress(OSError):
                    sock.send(packet(PROTOCOL, 0))

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for number in range(30):
                announce(server.url, HASH, peer_id(number), 2000)
        finally:
            is_over.set()
            thread.join()
            sock.close()


def test_the_recipe_in_the_readme_passes(tmp_path):
    readme = (ROOT / "README.md").read_text()
    (recipe,) = re.findall(r"```python\n(# test_client.py\n.*?)```", readme, re.S)
    (tmp_path / "test_client.py").write_text(recipe)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout and not ended.stderr


# Looking into the tracker


def test_dev(tmp_path):
    """One worker, a free port, two seconds, and data that is gone at the end."""
    env = {"TMPDIR": str(tmp_path), "TRACKER_PEER_TTL": "9000"}
    server = Server([*APP, "--dev"], 0, env)
    try:
        poll(lambda: "it tracks" in server.log(), 20, "the greeting")
        port = int(re.search(r"udp://\S+:(\d+)/announce", server.log())[1])
        server.url = f"http://127.0.0.1:{port}"
        server.wait_until_ready()
        assert len(server.workers()) == 1
        assert len(list(tmp_path.iterdir())) == 1
        Peer("127.0.0.1", port).announce(1, left=0)
        reply = announce(server.url, HASH, b"-qB5100-abcdefghijkl", 2, left=9)
        assert (reply[b"interval"], reply[b"complete"]) in ((1, 1), (2, 1))
        line = f" http 127.0.0.1 qBittorrent 5.1.0, announce, left 9, {HASH.hex()}:"
        line += " 1 seeders, 1 leechers, 1 peers sent\n"
        assert line in poll(server.log, 5, "output")
        with urlopen(f"{server.url}/swarm/{HASH.hex()}.json") as answer:
            kept = json.load(answer)["peers"]
        assert sorted(peer["client"] for peer in kept) == [
            "BB 0.0.0.1",
            "qBittorrent 5.1.0",
        ]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert not list(tmp_path.iterdir())
    finally:
        server.stop()
        server.output.close()


COUNTS = bitbreeze.Counts(3, 5, 2, 7)
SENT = bitbreeze.Peers(b"", b"abcdef" * 4, b"")
PEER = bitbreeze.Announce(HASH, b"-TR4060-abcdefghijkl", bytes(4), 1, 0, "completed")
SHOWN = "Transmission 4.0.6, completed, left 0, a.iso"


@pytest.mark.parametrize(
    ("kind", "request_", "answer", "refusal", "line"),
    [
        ("announce", PEER, (COUNTS, SENT, 1), None,
         f"{SHOWN}: 3 seeders, 5 leechers, 4 peers sent"),
        ("announce", PEER, None, "go away", f"{SHOWN}: refused: go away"),
        ("announce", None, None, "no hash", "announce: refused: no hash"),
        ("announce", PEER._replace(left=None, event="", info_hash=OTHER), None, "x",
         f"Transmission 4.0.6, announce, left unknown, {OTHER.hex()}: refused: x"),
        ("scrape", [HASH, OTHER], {HASH: COUNTS, OTHER: bitbreeze.NO_COUNTS}, None,
         f"scrape, a.iso, {OTHER.hex()}: 3 seeders, 5 leechers, 0 seeders, 0 leechers"),
        ("scrape", None, None, "no hash", "scrape: refused: no hash"),
    ],
)  # fmt: skip
def test_lines_of_verbose(kind, request_, answer, refusal, line):
    torrent = bitbreeze.Torrent("a.torrent", "a.iso", 1, 1, "", "", 0, False)
    found = bitbreeze.trace("::1", kind, request_, answer, refusal, {HASH: torrent})
    assert found == f"{'0.0.0.0' if request_ and kind == 'announce' else '::1'} {line}"


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (b"-qB5100-abcdefghijkl", "qBittorrent 5.1.0"),
        (b"-qB4650-abcdefghijkl", "qBittorrent 4.6.5"),
        (b"-TR300Z-abcdefghijkl", "Transmission 3.0.0"),
        (b"-lt0D80-abcdefghijkl", "rTorrent 0.13.8"),
        (b"-LT20B1-abcdefghijkl", "libtorrent 2.0.11.1"),
        (b"-XX1234-abcdefghijkl", "XX 1.2.3.4"),
        (b"A2-1-36-0-abcdefghij", "aria2 1.36.0"),
        (b"M7-9-2--abcdefghijkl", "BitTorrent 7.9.2"),
        (b"S58B-----bcdefghijkl", "S 5.8.11"),
        (b"\xff" * 20, "ff" * 20),
        (bytes(20), "00" * 20),
        (b"-__5100-abcdefghijkl", b"-__5100-abcdefghijkl".hex()),
        (b"-\x1b[2Jxx-abcdefghijk", b"-\x1b[2Jxx-abcdefghijk".hex()),
    ],
)
def test_names_of_clients(peer, client):
    assert bitbreeze.client_name(peer) == client


def test_verbose_prints_what_happens_and_nothing_else_does(udp, capsys):
    server = udp(verbose=True)
    ask(server, 1, announced(1), "::ffff:192.0.2.1")
    server.client.scrape(HASH)
    server.client.get("/announce", "info_hash=\x1b")
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    first = f"udp 192.0.2.1 BB 0.0.0.1, announce, left 1, {HASH.hex()}"
    assert lines == [
        f"{first}: 0 seeders, 1 leechers, 0 peers sent",
        f"http 192.0.2.1 scrape, {HASH.hex()}: 0 seeders, 1 leechers",
        "http 192.0.2.1 announce: refused: info_hash must be 20 bytes, not 1",
    ]
    server = udp(data=f"{server.tracker.store.folder}-2")
    ask(server, 1, announced(1))
    assert not capsys.readouterr().err
