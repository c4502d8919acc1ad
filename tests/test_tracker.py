"""The tracker: announce and scrape over a store, through the WSGI door."""

import gc
import os
import random
import struct
import tracemalloc
from hashlib import sha1
from heapq import heappop, heappush

import bencoder
import pytest
from conftest import NOW, all_peers, endpoints, kept, make_settings, peer_id
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app as bitbreeze

HASH, OTHER = b"h" * 20, b"i" * 20


def test_two_peers_meet(tracker):
    client = tracker()
    first = client.announce(1, left=0, event="started")
    assert (first[b"complete"], first[b"incomplete"], first[b"peers"]) == (1, 0, b"")
    second = client.announce(2, address="192.0.2.2")
    assert (second[b"complete"], second[b"incomplete"]) == (1, 1)
    assert second[b"peers"] == bytes((192, 0, 2, 1)) + (1001).to_bytes(2, "big")


def test_stopped_gets_every_key(tracker):
    client = tracker()
    client.announce(1)
    assert set(client.announce(1, event="stopped")) == {
        *(b"complete", b"downloaded", b"incomplete"),
        *(b"interval", b"min interval", b"peers"),
    }


def test_scrape(tracker):
    client = tracker()
    client.announce(1, left=0)
    client.announce(2, event="paused")
    client.announce(3)
    client.announce(3, left=0, event="completed")
    files = client.scrape(HASH, OTHER)[b"files"]
    assert files[HASH] == {
        b"complete": 2,
        b"downloaded": 1,
        b"downloaders": 0,
        b"incomplete": 1,
    }
    assert files[OTHER] == {b"complete": 0, b"downloaded": 0, b"incomplete": 0}


def test_a_full_scrape_is_refused(tracker):
    refusal = tracker().ask("/scrape", {"x": 1})[b"failure reason"]
    assert refusal == b"info_hash is missing: this tracker does not list its torrents"


@pytest.mark.parametrize(("numwant", "given"), [(3, 3), (-1, 5), (10**12, 5), (9, 8)])
def test_numwant_has_a_default_and_a_most(tracker, numwant, given):
    client = tracker(numwant=5, max_numwant=8)
    for peer in range(20):
        client.announce(peer)
    assert len(endpoints(client.announce(0, numwant=numwant)[b"peers"])) == given


def test_intervals_differ_by_a_tenth(tracker):
    client = tracker(interval=1000, small_interval=1000, min_interval=100)
    intervals = {client.announce(1)[b"interval"] for _ in range(200)}
    assert len(intervals) > 50
    assert 900 <= min(intervals) < 950 < 1050 < max(intervals) <= 1100


def test_dual_stack_through_the_door(tracker):
    client = tracker()
    client.announce(1, address="192.0.2.1", key="aa")
    client.announce(1, address="2001:db8::1", key="aa")
    reply = client.announce(2, address="::ffff:192.0.2.2")
    assert (reply[b"incomplete"], len(reply[b"peers"])) == (2, 6)
    assert b"peers6" not in reply
    reply = client.announce(2, address="2001:db8::2")
    assert (len(reply[b"peers"]), len(reply[b"peers6"])) == (6, 18)


def test_addresses_in_the_query_are_ignored(tracker):
    client = tracker()
    victims = {"ip": "198.51.100.9", "ipv4": "198.51.100.9", "ipv6": "2001:db8::9"}
    client.announce(1, **victims)
    assert client.announce(2, address="192.0.2.2")[b"peers"][:4] == bytes(
        (192, 0, 2, 1)
    )


def test_totals_are_exact_then_kept_a_while(tmp_path):
    tracker = bitbreeze.Tracker(make_settings(data=str(tmp_path)))

    def announce(swarm, left, event=""):
        announce = bitbreeze.Announce(
            swarm.to_bytes(20, "big"), peer_id(swarm), b"\x0a\0\0\1", 6881, left, event
        )
        tracker.announce(announce, NOW)

    assert tuple(tracker.snapshot(NOW)[0].values()) == (0, 0, 0, 0, 0)
    for swarm in range(999):
        announce(swarm, left=swarm % 2)
    announce(0, left=1)
    announce(0, left=0, event="completed")
    announce(1, left=0, event="stopped")
    assert tuple(tracker.snapshot(NOW)[0].values()) == (500, 498, 0, 2, 998)
    announce(1000, left=1)
    announce(1001, left=1)
    assert tracker.snapshot(NOW)[0]["swarms"] == 1000
    announce(1002, left=1)
    assert tracker.snapshot(NOW)[0]["swarms"] == 1000  # kept, as there are a thousand
    assert tracker.snapshot(NOW + 1)[0]["swarms"] == 1001


def test_the_first_snapshot_of_a_worker_has_the_listed_torrents(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
    info = {b"length": 5, b"name": b"a", b"piece length": 16384, b"pieces": b"p" * 20}
    (tmp_path / "torrents").mkdir()
    (tmp_path / "torrents/a.torrent").write_bytes(bencoder.bencode({b"info": info}))
    info_hash = sha1(bencoder.bencode(info)).digest()
    peer = bitbreeze.Announce(info_hash, peer_id(1), b"\x0a\0\0\1", 6881, 0)
    bitbreeze.Tracker(make_settings(**folders)).announce(peer, NOW)
    fresh = bitbreeze.Tracker(make_settings(**folders))
    assert fresh.snapshot(NOW)[1] == {info_hash: (1, 0, 0, 0)}


@given(st.text(st.characters(max_codepoint=255), max_size=200))
@hypothesis_settings(max_examples=2000, deadline=None)
def test_any_query_is_answered(any_query_client, query):
    for path in ("/announce", "/scrape"):
        any_query_client.check(path, query)


names = st.sampled_from(
    ["info_hash", "peer_id", "port", "left", "event", "numwant", "key", "compact"]
)
values = st.one_of(
    st.binary(max_size=40).map(lambda raw: "".join(f"%{byte:02X}" for byte in raw)),
    st.just("a" * 20),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["started", "stopped", "completed", "paused", "0", "1", "%", "%4", "=", ""]
    ),
)


@given(st.lists(st.tuples(names, values), max_size=12))
@hypothesis_settings(max_examples=1000, deadline=None)
def test_any_parameters_are_answered(any_query_client, parameters):
    query = "&".join(f"{name}={value}" for name, value in parameters)
    whole = f"info_hash={'h' * 20}&peer_id={'p' * 20}&{query}"
    for path in ("/announce", "/scrape"):
        any_query_client.check(path, query)
        any_query_client.check(path, whole)


@pytest.fixture(scope="module")
def any_query_client(tmp_path_factory):
    """A client that asks for 200, a decodable dictionary, and no internal error."""
    import bencoder
    from conftest import Client

    class Checking(Client):
        def check(self, path, query):
            status, headers, body = self.get(path, query)
            if not query:  # as from a browser
                assert (status, headers["Location"]) == ("302 Found", "/")
                return
            assert status == "200 OK"
            assert headers["Content-Length"] == str(len(body))
            reply = bencoder.bdecode(body)
            assert reply.get(b"failure reason") != b"internal error"
            assert (
                b"failure reason" in reply or b"interval" in reply or b"files" in reply
            )

    data = str(tmp_path_factory.mktemp("any") / "data")
    return Checking(bitbreeze.create_app({"data": data}))


# -- A life of hours, with what a model knows of it

LIFE = {"interval": 120, "min_interval": 30, "peer_ttl": 300, "max_numwant": 1000}
WORKERS = 3


class Model:
    """Who is in which swarm, in dictionaries."""

    def __init__(self, ttl):
        self.ttl, self.swarms, self.snatches = ttl, {}, {}

    def announce(self, said, now):
        """Take in an Announce."""
        peers = self.alive(said.info_hash, now)
        old = peers.pop(said.peer_id, None)
        if said.event == "stopped" and not old:
            return
        seeds, has_snatched, seen = said.left == 0, bool(old and old[2]), {}
        if old and seeds and not old[0]:
            before = self.snatches.get(said.info_hash, 0)
            self.snatches[said.info_hash] = before + (not has_snatched)
            has_snatched = True
        if said.event != "stopped":
            seen = {**(old[3] if old else {}), len(said.address): (now, said)}
            is_partial = said.event == "paused" and not seeds
            peers[said.peer_id] = seeds, is_partial, has_snatched, seen

    def alive(self, info_hash, now):
        """Return the peers of a swarm by peer_id, without those who have expired."""
        peers = self.swarms.setdefault(info_hash, {})
        for who, (*known, seen) in list(peers.items()):
            left = {n: s for n, s in seen.items() if s[0] >= now - self.ttl}
            if not left:
                del peers[who]
            elif len(left) < len(seen):
                peers[who] = *known, left
        return peers

    def counts(self, info_hash, now):
        peers = self.alive(info_hash, now).values()
        seeders = sum(seeds for seeds, *_ in peers)
        partial_seeds = sum(is_partial for _, is_partial, *_ in peers)
        snatches = self.snatches.get(info_hash, 0)
        return seeders, len(peers) - seeders, partial_seeds, snatches

    def endpoints(self, info_hash, now):
        """Return (peer_id, IPv4 endpoint, IPv6 endpoint) of all in a swarm."""
        found = set()
        for who, (*_, seen) in self.alive(info_hash, now).items():
            ends = [
                seen[n][1].address + seen[n][1].port.to_bytes(2, "big")
                if n in seen
                else bytes(n + 2)
                for n in (4, 16)
            ]
            found.add((who, *ends))
        return found


class Soul:
    """One who is a peer, goes in some way, and comes back as another."""

    def __init__(self, number):
        self.number, self.lives = number, 0
        self.be_born()

    def be_born(self):
        self.lives += 1
        rank = min(int(random.paretovariate(0.7)), 40)  # of few swarms are most
        self.info_hash, self.peer_id = bytes((rank,)) * 20, os.urandom(20)
        self.left, self.event, self.key = random.choice((0, 1, 1)), "started", 7
        self.addresses = [os.urandom(4), b"\x20" + os.urandom(15)]
        self.port, self.days = random.randrange(1024, 2**16), random.randrange(1, 20)
        if random.random() < 0.6:
            self.addresses.pop(random.randrange(2))

    def announces(self):
        """Return what it says next, and how many seconds later it speaks again."""
        self.days -= 1
        fate, wait = random.random(), random.randrange(100, 130)
        if self.days < 1:
            said = self.say("stopped") if fate < 0.7 else []
            self.be_born()
            return said, random.randrange(1, 900)
        if fate < 0.1 and self.left:
            self.left = 0
            return self.say(random.choice(("completed", "completed", ""))), wait
        if fate < 0.15:
            self.addresses[0] = os.urandom(len(self.addresses[0]))
        said = self.say("paused" if fate > 0.9 and self.left else self.event)
        self.event = ""
        return said, wait

    def say(self, event):
        return [
            bitbreeze.Announce(
                self.info_hash, self.peer_id, a, self.port, self.left, event, key=7
            )
            for a in self.addresses
        ]


def test_a_long_life_ends_as_the_model_says(tmp_path, monkeypatch, is_long):
    """Some workers over one folder, an hour; 3,000 peers and six with --long."""
    monkeypatch.setattr(bitbreeze, "OPEN_AT_MOST", 8)
    folders = {"data": str(tmp_path / "data"), "torrents": str(tmp_path / "torrents")}
    settings = make_settings(**folders, **LIFE, swarm_ttl=10**9)
    souls, hours = (3000, 6) if is_long else (120, 1)
    life = Life(settings, souls)
    open_before = len(os.listdir("/proc/self/fd"))
    sizes = []
    tracemalloc.start()
    try:
        for third in (1, 2, 3):
            life.live_until(NOW + third * hours * 1200)
            life.check(tmp_path / "data")
            most = open_before + WORKERS * bitbreeze.OPEN_AT_MOST + 1
            assert len(os.listdir("/proc/self/fd")) <= most
            sizes.append(memory_of_app())
    finally:
        tracemalloc.stop()
    print(f"{life.number} announces; bytes held after each third: {sizes}")
    assert sizes[2] < sizes[0] + 8000 * WORKERS * bitbreeze.OPEN_AT_MOST
    end = life.now + settings.peer_ttl + 1
    last = bitbreeze.Tracker(settings._replace(swarm_ttl=0)).store
    for step in range(256):
        last.tidy(end + 10 * step)
    left = (tmp_path / "data").glob("s*/**/*")
    assert not [path for path in left if path.is_file()]
    assert not any((tmp_path / "data/swarms.count").read_bytes())


class Life:
    """Peers that come and go under the eyes of several trackers and of a model."""

    def __init__(self, settings, souls):
        self.settings, self.model = settings, Model(settings.peer_ttl)
        self.trackers = [bitbreeze.Tracker(settings) for _ in range(WORKERS)]
        self.now, self.number, self.waiting = NOW, 0, []
        for number in range(souls):
            at = NOW + random.randrange(1000)
            heappush(self.waiting, (at, number, Soul(number)))

    def live_until(self, end):
        while self.waiting[0][0] < end:
            at, number, soul = heappop(self.waiting)
            self.now = max(self.now, at)
            said, wait = soul.announces()
            for each in said:
                self.announce(each)
            heappush(self.waiting, (self.now + wait, number, soul))

    def announce(self, said):
        worker = random.randrange(WORKERS)
        if random.random() < 0.001:  # it is restarted
            self.trackers[worker] = bitbreeze.Tracker(self.settings)
        counts, peers, _ = self.trackers[worker].announce(said, self.now)
        self.trackers[worker].run_maintenance(self.now)
        self.model.announce(said, self.now)
        self.number += 1
        known = self.model.swarms[said.info_hash]
        assert counts.seeders + counts.leechers >= len(known)
        assert counts.snatches == self.model.snatches.get(said.info_hash, 0)

    def check(self, folder):
        """Fail unless all is as the model says, when all has been counted anew."""
        self.now += self.settings.peer_ttl // 16 + 1
        store, now, pages, sums = self.trackers[0].store, self.now, 0, [0] * 5
        found = dict(all_peers(store, now))
        for info_hash in self.model.swarms:
            counts = self.model.counts(info_hash, now)
            assert store.scrape([info_hash], now)[info_hash] == counts
            peers = found.pop(info_hash, bitbreeze.NO_PEERS)
            columns = map(endpoints, peers, (20, 6, 18))
            there = self.model.endpoints(info_hash, now)
            assert set(zip(*columns, strict=True)) == there
            sums = [a + b for a, b in zip(sums, (*counts, bool(there)), strict=True)]
            pages += 1 + len(there) // bitbreeze.SPARSE
        assert not found
        totals = self.trackers[1].snapshot(now)[0]
        assert tuple(totals.values()) == tuple(sums)
        paths = kept(folder).values()
        assert sum(path.stat().st_size for path in paths) <= 4096 * pages
        counted = struct.unpack("<QQ", (folder / "swarms.count").read_bytes())
        assert counted == (len(paths), sums[-1])


def memory_of_app():
    """Return how many bytes are held that app.py has asked for."""
    bitbreeze.is_private.cache_clear()  # its size is limited
    gc.collect()
    ours = tracemalloc.Filter(True, bitbreeze.__file__)
    statistics = tracemalloc.take_snapshot().filter_traces([ours]).statistics("lineno")
    return sum(each.size for each in statistics)
