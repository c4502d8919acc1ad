"""Abuse: what strangers can make of the tracker's room, and what honest ones notice."""

import os
import random
import time

import bencoder
import pytest
from conftest import NOW, endpoints, escape, peer_id

HONEST = b"an honest swarm 0000"
BLOCK = 4096
IN_A_PAGE = 70  # peers


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set; applications must be made after."""
    times = [NOW]
    monkeypatch.setattr(time, "time", lambda: times[0])
    return times


def on_disk(folder):
    """Return how many bytes all files in a folder take."""
    paths = [
        os.path.join(at, name) for at, _, names in os.walk(folder) for name in names
    ]
    return sum(os.stat(path).st_blocks * 512 for path in paths)


def memory():
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cost(client):
    """Return the CPU seconds of an honest announce, which must be answered right."""
    costs = []
    for _ in range(60):
        before = time.process_time()
        reply = client.announce(1, HONEST)
        costs.append(time.process_time() - before)
        assert reply[b"peers"] == bytes((192, 0, 2, 1)) + (1002).to_bytes(2, "big")
    return min(costs)  # others may use the machine meanwhile


# -- Floods


def test_a_flood_of_hashes(tracker, tmp_path, clock, is_long):
    """It fills the tracker up to max_swarms, and ends with the flood."""
    number, most = (1_000_000, 100_000) if is_long else (20_000, 2_000)
    client = tracker(max_swarms=most)
    for peer in (1, 2):
        client.announce(peer, HONEST)
    before, held = cost(client), memory()
    full = b"this tracker is full: it tracks %d torrents already" % most
    source, refused = random.Random(1), 0
    for _ in range(number):
        reply = client.announce(1, source.randbytes(20), "198.51.100.7")
        refused += reply.get(b"failure reason") == full
    assert refused == number - (most - 1)
    assert memory() - held < 64 << 20
    folder = tmp_path / "data/swarms"
    assert on_disk(folder) <= most * BLOCK + 257 * BLOCK
    assert cost(client) < 2 * before + 20e-6
    totals, _ = client.app.tracker.snapshot(NOW)
    assert sorted(totals.values()) == [0, 0, 0, most, most + 1]
    # All who were in the flood have expired; honest ones go on announcing.
    for turn in range(260):
        clock[0] = NOW + 4300 + 10 * turn
        client.announce(1, HONEST)
    assert b"peers" in client.announce(1, b"a newcomer's torrent")
    assert on_disk(folder) < 4 * BLOCK


@pytest.mark.parametrize("family", [4, 6])
def test_a_flood_of_ports_from_one_address(tracker, tmp_path, family, is_long):
    """An address gets as many peers as it may have; all others are where they were."""
    number, most = (60_000, 1000) if is_long else (4_000, 100)
    client = tracker(max_peers_per_address=most, max_numwant=1000)
    for peer in range(1, 201):
        client.announce(peer, HONEST, f"192.0.2.{peer}")
    network = "198.51.100.7" if family == 4 else "2001:db8:7:"
    reason = b"your address has %d peers in this swarm already" % most
    refused = 0
    for peer in range(1000, 1000 + number):
        address = network if family == 4 else f"{network}{peer:x}::1"
        port = 1024 + peer % 60_000
        reply = client.announce(peer, HONEST, address, port=port)
        refused += reply.get(b"failure reason") == reason
    assert number - 2 * most < refused <= number - most
    peers = 200 + number - refused
    assert client.announce(1, HONEST, "192.0.2.1")[b"incomplete"] == peers
    for newcomer in range(201, 240):
        reply = client.announce(newcomer, HONEST, f"192.0.2.{newcomer}")
        assert b"failure reason" not in reply
    met = set()
    for _ in range(60):
        reply = client.announce(0, HONEST, "203.0.113.1", numwant=1000)
        met |= {each[:4] for each in endpoints(reply[b"peers"])}
    assert met >= {bytes((192, 0, 2, peer)) for peer in range(1, 240)}
    assert on_disk(tmp_path / "data/swarms") <= BLOCK * (2 + peers // 35)


def test_a_flood_through_a_proxy_is_one_address(tracker):
    """Whatever the flood writes into the header itself, to the left of the proxy's."""
    client = tracker(max_peers_per_address=10, proxies=1)
    reasons = set()
    for peer in range(100):
        header = f"203.0.113.{peer}, 198.51.100.7"
        query = f"info_hash={escape(HONEST)}&peer_id={escape(peer_id(peer))}"
        query += f"&port={7000 + peer}"
        body = client.get("/announce", query, HTTP_X_FORWARDED_FOR=header)[2]
        reasons.add(bencoder.bdecode(body).get(b"failure reason"))
    assert reasons == {None, b"your address has 10 peers in this swarm already"}
    assert client.scrape(HONEST)[b"files"][HONEST][b"incomplete"] == 10


def test_a_stolen_peer_id(tracker):
    """Another address with another key is refused, and changes nothing."""
    client = tracker()
    client.announce(1, HONEST, key="right")
    client.announce(2, HONEST, "192.0.2.2", key="other")
    for event in ("started", "completed", "stopped", ""):
        for key in ("wrong", "", "\xff" * 500):
            reply = client.announce(1, HONEST, "198.51.100.7", key=key, event=event)
            reason = b"peer_id is in use with another key: restart your client"
            assert reply[b"failure reason"] == reason
    reply = client.announce(2, HONEST, "192.0.2.2", key="other")
    assert reply[b"peers"] == bytes((192, 0, 2, 1)) + (1001).to_bytes(2, "big")
    assert client.announce(1, HONEST, key="right")[b"incomplete"] == 2


def test_a_flood_of_scrapes(tracker, is_long):
    client = tracker()
    hashes = [b"scraped %012d" % number for number in range(70)]
    for number, info_hash in enumerate(hashes[::2]):
        client.announce(number, info_hash)
    first, held, opened = client.scrape(*hashes), memory(), open_files()
    for _ in range(10_000 if is_long else 300):
        reply = client.scrape(*hashes)
    assert reply == first
    assert [reply[b"files"][i][b"incomplete"] for i in hashes] == [1, 0] * 35
    assert memory() - held < 8 << 20
    assert open_files() <= opened + 1


def open_files():
    return len(os.listdir("/proc/self/fd"))


# -- What one swarm and one peer cost


@pytest.mark.parametrize("number", [1, IN_A_PAGE, IN_A_PAGE + 1, 1000, 5000])
def test_what_a_swarm_costs_on_disk(tracker, tmp_path, number):
    client = tracker()
    for peer in range(number):
        address = f"10.0.{peer >> 8}.{peer & 255}"
        client.announce(peer, HONEST, address, port=7000)
    taken = on_disk(tmp_path / "data/swarms")
    assert taken <= max(BLOCK, 117 * number + BLOCK)


# -- Requests


ANNOUNCE = {
    "info_hash": escape(HONEST), "peer_id": escape(peer_id(7)), "port": "7007",
    "left": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"numwant": str(2**63)}, None),
        ({"numwant": str(-(2**63))}, None),
        ({"left": str(2**63)}, None),
        ({"left": "9" * 10_000}, b"left must be"),
        ({"port": "\xb2"}, b"port must be"),
        ({"port": "7007\0"}, b"port must be"),
        ({"port": "0x1f"}, b"port must be"),
        ({"key": "k" * 1_000_000}, None),
        ({"event": "\0" * 1000}, None),
        ({"uploaded": "9" * 1_000_000}, None),
        ({"info_hash": ""}, b"info_hash is missing"),
        ({"info_hash": "%00" * 20}, None),
        ({"info_hash": "\0" * 20}, None),
        ({"info_hash": "a" * 1_000_000}, b"info_hash must be 20 bytes, not"),
        ({"info_hash": "%"}, b"info_hash must be 20 bytes"),
        ({"peer_id": "%00" * 20}, None),
        ({"peer_id": "%0" * 500_000}, b"peer_id must be 20 bytes"),
        ({"x" * 1_000_000: ""}, None),
        (dict.fromkeys(map(str, range(50_000)), "1"), None),
    ],
)  # fmt: skip
def test_absurd_parameters(tracker, caplog, sent, reason):
    """They are answered soon, in reason, and with nothing in the log."""
    client = tracker()
    client.announce(1, HONEST)
    query = "&".join(f"{name}={value}" for name, value in {**ANNOUNCE, **sent}.items())
    started = time.process_time()
    reply = bencoder.bdecode(client.get("/announce", query)[2])
    assert time.process_time() - started < 1
    assert reply.get(b"failure reason", b"")[: len(reason or b"")] == (reason or b"")
    assert len(str(reply)) < 500
    assert not caplog.records
    assert client.announce(2, HONEST)[b"incomplete"] in (2, 3)


@pytest.mark.parametrize("path", ["/announce", "/scrape"])
@pytest.mark.parametrize(
    "more",
    [
        {f"HTTP_X_{number}": "y" * 8000 for number in range(1000)},
        {"HTTP_X_FORWARDED_FOR": "1, " * 100_000},
        {"HTTP_USER_AGENT": "\0\xff" * 100_000},
        {"CONTENT_LENGTH": "-1", "CONTENT_TYPE": "multipart/form-data"},
        {"CONTENT_LENGTH": "9" * 5000},
        {"HTTP_TRANSFER_ENCODING": "chunked", "SERVER_PROTOCOL": "HTTP/0.9"},
    ],
    ids=["many", "long chain", "NUL", "less than none", "huge body", "0.9"],
)
def test_absurd_headers(tracker, caplog, path, more):
    for proxies in (0, 1):
        client = tracker(proxies=proxies)
        query = "&".join(f"{name}={value}" for name, value in ANNOUNCE.items())
        status, _, body = client.get(path, query, **more)
        assert status == "200 OK"
        assert bencoder.bdecode(body)
        assert not caplog.records


@pytest.mark.parametrize(
    "path", ["/announce", "/scrape", "/", "/stats.json", "/feed.xml"]
)
@pytest.mark.parametrize(
    "method", ["POST", "PUT", "TRACE", "CONNECT", "\0", "G" * 9000]
)
def test_wrong_methods(tracker, caplog, path, method):
    assert tracker().get(path, method=method)[0].startswith("405 ")
    assert not caplog.records
