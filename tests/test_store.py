"""The store: one contract for every store, a model, and what is special to files."""

import errno
import fcntl
import logging
import os
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import NOW, all_peers, endpoints, kept, make_settings, peer_id, rewrite
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app as bitbreeze

HASH = b"\xabcdefghijklmnopqrstu"
TTL = make_settings().peer_ttl


class Swarm:
    """Announces to one swarm of a store."""

    def __init__(self, store, info_hash=HASH):
        self.store, self.info_hash = store, info_hash

    def announce(self, peer, now=NOW, wanted=50, address=None, **fields):
        """Announce peer number ``peer`` from an address and port of its own."""
        known = {"left": 1, "port": 1000 + peer % 60000, "key": 5, **fields}
        announce = bitbreeze.Announce(
            self.info_hash, peer_id(peer), address or ipv4(peer), **known
        )
        return self.store.announce(announce, wanted, now)

    def counts(self, now=NOW):
        return self.store.scrape([self.info_hash], now)[self.info_hash]


def ipv4(peer):
    return b"\x0a" + peer.to_bytes(3, "big")


def ipv6(peer):
    """Return an address of a /48 that no other peer has."""
    return bytes.fromhex("2001") + peer.to_bytes(4, "big") + bytes(10)


def endpoint(peer):
    return ipv4(peer) + (1000 + peer % 60000).to_bytes(2, "big")


@pytest.fixture
def make_store(tmp_path):
    """A function that makes stores; those with the same folder share their data."""

    def make(folder="data", **overrides):
        return bitbreeze.FileStore(tmp_path / folder, make_settings(**overrides))

    return make


@pytest.fixture
def swarm(make_store):
    return Swarm(make_store())


# -- The contract


def test_unknown_swarm_is_all_zeros(swarm):
    assert swarm.counts() == (0, 0, 0, 0)
    assert list(swarm.store.swarms(NOW)) == []


def test_peers_are_counted_by_what_they_lack(swarm):
    swarm.announce(1, left=0)
    swarm.announce(2, left=7)
    swarm.announce(3, left=None)
    assert swarm.announce(4, left=7, event="paused")[0] == (1, 3, 1, 0)
    assert swarm.announce(4, left=0, event="paused")[0] == (2, 2, 0, 1)
    assert list(swarm.store.swarms(NOW)) == [(HASH, (2, 2, 0, 1))]


def test_another_store_sees_it_at_once(make_store):
    first, second = Swarm(make_store()), Swarm(make_store())
    for peer in range(200):
        (first, second)[peer % 2].announce(peer)
        assert first.counts() == second.counts() == (0, peer + 1, 0, 0)


def test_stopped_peers_leave(swarm):
    swarm.announce(1)
    swarm.announce(2, left=0)
    counts, peers = swarm.announce(1, event="stopped")
    assert (counts, peers) == ((1, 0, 0, 0), bitbreeze.NO_PEERS)
    assert swarm.announce(1, event="stopped")[0] == (1, 0, 0, 0)


def test_stopping_makes_no_swarm(swarm):
    assert swarm.announce(1, event="stopped") == ((0, 0, 0, 0), bitbreeze.NO_PEERS)
    assert list(swarm.store.swarms(NOW)) == []


@pytest.mark.parametrize(
    ("announces", "snatches"),
    [
        ([(5, ""), (0, "completed")], 1),
        ([(5, ""), (0, "completed"), (0, "completed"), (0, "")], 1),
        ([(5, ""), (0, "")], 1),  # rTorrent
        ([(5, ""), (0, "stopped")], 1),
        ([(5, ""), (0, ""), (5, ""), (0, "completed")], 1),
        ([(5, ""), (None, "completed")], 1),
        ([(None, ""), (0, "completed")], 1),  # webtorrent with a magnet link
        ([(5, ""), (5, "completed")], 0),
        ([(5, ""), (5, "completed"), (0, "")], 1),
        ([(0, "started"), (0, "")], 0),
        ([(0, "completed")], 0),
        ([(0, ""), (0, "completed")], 0),
        ([(None, "completed")], 0),
        ([(5, ""), (5, "stopped")], 0),
    ],
)
@pytest.mark.parametrize("others", [0, 300])
def test_snatches_count_once(swarm, announces, snatches, others):
    for peer in range(others):
        swarm.announce(1000 + peer)
    for left, event in announces:
        swarm.announce(1, left=left, event=event)
    assert swarm.counts().snatches == snatches


def test_peers_expire(swarm):
    swarm.announce(1)
    swarm.announce(2, NOW + 10)
    assert swarm.counts(NOW + TTL) == (0, 2, 0, 0)
    assert swarm.counts(NOW + TTL + 1) == (0, 1, 0, 0)
    assert swarm.announce(3, NOW + TTL + 1)[1].endpoints4 == endpoint(2)


def test_many_peers_expire(swarm):
    for peer in range(500):
        swarm.announce(peer, NOW + peer)
    assert swarm.counts(NOW + TTL + 500) == (0, 0, 0, 0)


def test_one_peer_has_two_endpoints(swarm):
    swarm.announce(9)
    swarm.announce(9, address=ipv6(9))
    assert swarm.counts() == (0, 1, 0, 0)
    _, peers = swarm.announce(1)
    assert (peers.endpoints4, peers.endpoints6) == (endpoint(9), b"")
    _, peers = swarm.announce(1, address=ipv6(1))
    assert peers.endpoints4 == endpoint(9)  # the other family of the same peer
    assert peers.endpoints6 == ipv6(9) + endpoint(9)[4:]


def test_who_expires_is_not_counted_though_the_swarm_is_open(swarm):
    until = NOW + TTL
    swarm.announce(1)
    for now in (until - 1, until, until):
        swarm.announce(2, now)
        assert swarm.counts(now) == (0, 2, 0, 0)
    assert swarm.counts(until + 1) == (0, 1, 0, 0)


def test_each_endpoint_expires_by_itself(swarm):
    swarm.announce(9, NOW)
    swarm.announce(9, NOW + 100, address=ipv6(9))
    swarm.announce(1, NOW + TTL + 50)
    _, peers = swarm.announce(1, NOW + TTL + 50, address=ipv6(1))
    assert peers.endpoints6 == ipv6(9) + endpoint(9)[4:]
    assert peers.endpoints4 in (b"", bytes(6))
    assert swarm.counts(NOW + TTL + 50) == (0, 2, 0, 0)


def test_own_endpoints_are_never_handed_out(swarm):
    for peer in (1, 2, 3):
        swarm.announce(peer, address=ipv4(7), port=7777)
    swarm.announce(4)
    for peer in (1, 2, 3):
        assert swarm.announce(peer, address=ipv4(7), port=7777)[
            1
        ].endpoints4 == endpoint(4)


@pytest.mark.parametrize("port", [0, 1])
def test_unreachable_peers_are_counted_only(swarm, port):
    swarm.announce(1, port=port)
    swarm.announce(2)
    counts, peers = swarm.announce(3)
    assert counts.leechers == 3
    assert peers.endpoints4 == endpoint(2)


def test_seeders_are_not_handed_seeders(swarm):
    swarm.announce(1, left=0)
    swarm.announce(2, left=5)
    assert len(swarm.announce(3, left=0)[1].endpoints4) == 12  # its first: aria2
    assert swarm.announce(3, left=0)[1].endpoints4 == endpoint(2)
    assert len(swarm.announce(3, left=0, event="started")[1].endpoints4) == 12
    assert len(swarm.announce(2, left=5)[1].endpoints4) == 12


@pytest.mark.parametrize("size", [5, 69, 70, 71, 500])
@pytest.mark.parametrize("wanted", [0, 1, 50, 1000])
def test_wanted_is_kept_to(swarm, size, wanted):
    for peer in range(size):
        swarm.announce(peer)
    found = endpoints(swarm.announce(0, wanted=wanted)[1].endpoints4)
    most = min(wanted, size - 1)
    # Of several pages, another is not read for less than half of them.
    assert (most if size <= 70 else most // 2) <= len(found) <= most
    assert len(set(found)) == len(found)


def test_ids_are_those_of_the_endpoints(swarm):
    for peer in range(100):
        swarm.announce(peer)
    _, peers = swarm.announce(0, compact=False, wanted=200)
    pairs = zip(endpoints(peers.ids, 20), endpoints(peers.endpoints4), strict=True)
    assert set(pairs) == {(peer_id(peer), endpoint(peer)) for peer in range(1, 100)}


@pytest.mark.parametrize("wanted", [10, 50])
def test_everybody_meets_everybody(swarm, wanted):
    for peer in range(500):
        swarm.announce(peer)
    met = Counter()
    for _ in range(200_000 // wanted):
        met.update(endpoints(swarm.announce(0, wanted=wanted)[1].endpoints4))
    assert len(met) == 499
    assert max(met.values()) <= 1.6 * min(met.values())


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("wanted", [1, 50, 100, 250])
def test_replies_are_as_large_as_the_client_asked(swarm, wanted, left):
    """Whether the client may be handed all others, or as a seeder only leechers."""
    for peer in range(260 * (2 - left)):
        swarm.announce(peer, left=peer // 260)
    for _ in range(50):
        peers = endpoints(swarm.announce(5, wanted=wanted, left=left)[1].endpoints4)
        assert len(peers) == len(set(peers)) == wanted


@pytest.mark.parametrize("wanted", [20, 100, 149, 1000])
def test_replies_are_as_large_though_others_have_no_port(swarm, wanted):
    for peer in range(450):
        swarm.announce(peer, port=1 if peer % 3 else 6881)
    for _ in range(50):
        peers = endpoints(swarm.announce(0, port=6881, wanted=wanted)[1].endpoints4)
        assert len({*peers} - {bytes(6)}) == len(peers) == min(wanted, 149)


def test_a_seeder_is_told_of_the_only_leecher(swarm):
    for peer in range(1000):
        swarm.announce(peer, left=int(peer == 500))
    for peer in (0, 999):
        for _ in range(2):  # the first time, it is handed seeders, too
            _, peers = swarm.announce(peer, left=0)
        assert peers.endpoints4 == endpoint(500)


@pytest.mark.parametrize(("leechers", "seeders"), [(3, 5), (3, 150), (60, 150), (9, 0)])
def test_a_new_seeder_is_told_of_leechers_first(swarm, leechers, seeders):
    for peer in range(leechers + seeders):
        swarm.announce(peer, left=int(peer < leechers))
    for peer in range(1000, 1010):
        _, peers = swarm.announce(peer, left=0, wanted=50)
        found = endpoints(peers.endpoints4)
        assert len(found) == len(set(found)) == min(50, leechers + seeders)
        first = min(50, leechers)
        assert set(found[:first]) <= {endpoint(each) for each in range(leechers)}
        swarm.announce(peer, left=0, event="stopped")


SIZES = (0, 68, 69, 300, 2000)  # of a swarm: one page, a page that gets full, many


@pytest.mark.parametrize("others", SIZES)
@pytest.mark.parametrize("keys", [(5, 5, 5), (5, 6, 7), (0, 5, 0), (5, 0, 0)])
@pytest.mark.parametrize("family", ["IPv4", "IPv6", "both"])
def test_a_restarted_client_is_one_peer(swarm, others, keys, family):
    """Its peer_id is new each time, as those of qBittorrent and Transmission are."""
    for peer in range(others):
        swarm.announce(100 + peer, left=0)
    addresses = [ipv4(1)] * (family != "IPv6") + [ipv6(1)] * (family != "IPv4")
    for peer, key in enumerate(keys, 1):
        for address in addresses:
            client = {"key": key, "left": 1, "port": 6881, "address": address}
            counts, _ = swarm.announce(peer, **client, event="started")
            assert counts == (others, 1, 0, 0)
    ((_, peers),) = all_peers(swarm.store, NOW)
    assert len(peers.ids) == 20 * (others + 1)
    counts, _ = swarm.announce(3, **client, event="stopped")
    assert counts == (others, 0, 0, 0)


@pytest.mark.parametrize("others", SIZES)
def test_a_restart_adds_no_snatch(swarm, others):
    for peer in range(others):
        swarm.announce(100 + peer)
    client = {"address": ipv4(1), "port": 6881}
    swarm.announce(1, **client)
    swarm.announce(1, **client, left=0, event="completed")
    for peer in (2, 3):
        swarm.announce(peer, **client, left=0)
        swarm.announce(peer, **client, left=0, event="completed")
    assert swarm.counts() == (1, others, 0, 1)


def test_a_download_that_ends_after_a_restart_is_a_snatch(swarm):
    swarm.announce(1, address=ipv4(1), port=6881, left=1)
    assert swarm.announce(2, address=ipv4(1), port=6881, left=0)[0] == (1, 0, 0, 1)


def test_restarts_do_not_fill_replies(swarm):
    for peer in range(10):
        swarm.announce(peer, left=0)
    for peer in range(100, 160):
        swarm.announce(peer, address=ipv4(99), port=6881)
    for _ in range(20):
        _, peers = swarm.announce(200)
        assert len(set(endpoints(peers.endpoints4))) == 11 == len(peers.endpoints4) // 6


def test_a_peer_that_moves_takes_an_endpoint(swarm):
    swarm.announce(1, address=ipv4(1), port=6881)
    swarm.announce(2, address=ipv4(2), port=6881)
    swarm.announce(2, address=ipv6(2), port=6881)
    assert swarm.announce(1, address=ipv4(2), port=6881)[0] == (0, 1, 0, 0)


def test_peers_without_a_port_share_an_address(swarm):
    for peer in range(5):
        swarm.announce(peer, address=ipv4(1), port=1)
    assert swarm.counts() == (0, 5, 0, 0)


@given(st.integers(0, 2**32), st.sampled_from([5, 90, 500]))
@hypothesis_settings(max_examples=12, deadline=None)
def test_an_endpoint_belongs_to_one_peer(tmp_path_factory, seed, crowd):
    """Whatever clients announce from few addresses, with few peer_ids."""
    rnd, folder = random.Random(seed), tmp_path_factory.mktemp("endpoints")
    swarm = Swarm(bitbreeze.FileStore(folder, make_settings()))
    for _ in range(1000):
        address = rnd.choice([ipv4, ipv6])(rnd.randrange(crowd))
        event = rnd.choice(["", "started", "completed", "stopped"])
        fields = {"address": address, "port": 6881, "event": event, "left": 0}
        _, reply = swarm.announce(rnd.randrange(crowd), **fields)
        for column, width in zip(reply, (20, 6, 18), strict=True):
            found = [each for each in endpoints(column, width) if any(each)]
            assert len(found) == len(set(found))
    for _, peers in all_peers(swarm.store, NOW):
        for column, width in zip(peers, (20, 6, 18), strict=True):
            found = [each for each in endpoints(column, width) if any(each)]
            assert len(found) == len(set(found))
        assert len(peers.ids) // 20 == sum(swarm.counts()[:2])


# Announces of a peer, and a last one with its peer_id: whether that is taken as the
# peer's, and the key that the peer has afterwards.
HOME4, HOME6, AWAY4, AWAY6 = ipv4(1), ipv6(1), ipv4(99), ipv6(99)
KEYS = [
    (("", 5, HOME4), ("", 5, AWAY4), True, 5),  # it has moved
    (("", 0, HOME4), ("", 0, AWAY4), True, 0),
    (("", 5, HOME4), ("", 6, HOME4), True, 6),  # it has restarted
    (("", 0, HOME4), ("", 6, HOME4), True, 6),
    (("", 5, HOME4), ("stopped", 6, HOME4), True, None),
    (("", 0, HOME4), ("stopped", 0, HOME4), True, None),
    (("", 5, HOME4), ("stopped", 5, AWAY4), True, None),
    (("", 5, HOME4), ("stopped", 5, HOME6), True, None),
    (("", 5, HOME4), ("", 6, AWAY4), False, 5),
    (("", 5, HOME4), ("", 0, AWAY4), False, 5),
    (("", 0, HOME4), ("", 6, AWAY4), False, 0),
    (("", 0, HOME4), ("completed", 6, AWAY4), False, 0),
    (("", 5, HOME4), ("stopped", 6, AWAY4), False, 5),
    (("", 5, HOME4), ("stopped", 0, HOME6), False, 5),
    (("", 0, HOME4), ("stopped", 0, AWAY4), False, 0),
    (("", 0, HOME4), ("stopped", 6, AWAY4), False, 0),
    (("", 0, HOME4), ("stopped", 0, AWAY6), False, 0),
    # qBittorrent 4.2 sends one key over IPv4, and another over IPv6.
    (("", 5, HOME4), ("", 6, HOME6), True, 5),
    (("", 0, HOME4), ("", 6, AWAY6), True, 0),
    (("", 5, HOME4), ("", 6, AWAY6), ("", 7, AWAY6), True, 5),
    (("", 5, HOME4), ("", 6, AWAY6), ("stopped", 6, AWAY6), False, 5),
    (("", 5, HOME4), ("", 6, HOME6), ("", 6, HOME4), True, 5),
    (("", 5, HOME4), ("", 6, HOME6), ("", 6, AWAY6), False, 5),
    (("", 5, HOME4), ("", 6, HOME6), ("stopped", 5, HOME4), True, None),
]


@pytest.mark.parametrize("case", KEYS)
@pytest.mark.parametrize("others", [0, 200])
def test_a_stranger_with_the_peer_id_takes_nothing(swarm, case, others):
    *before, (event, key, address), is_taken, key_after = case
    for peer in range(others):
        swarm.announce(1000 + peer)
    for known in before:
        swarm.announce(1, event=known[0], key=known[1], address=known[2])
    ((_, _, peers),) = swarm.store.records(lambda: NOW)
    was = [each for each, _ in peers if each.peer_id == peer_id(1)]
    if is_taken:
        swarm.announce(1, NOW + 5, event=event, key=key, address=address)
    else:
        with pytest.raises(bitbreeze.TrackerError, match="another key"):
            swarm.announce(1, NOW + 5, event=event, key=key, address=address)
    found = [
        r for _, _, peers in swarm.store.records(lambda: NOW + 5) for r, _ in peers
    ]
    found = [each for each in found if each.peer_id == peer_id(1)]
    assert [each.key for each in found] == ([] if key_after is None else [key_after])
    if not is_taken:
        assert found == was
    assert swarm.counts(NOW + 5)[:2] == (0, others + len(found))


def test_limits_have_reasons(make_store):
    swarm = Swarm(make_store(max_peers=3, max_peers_per_address=2, max_swarms=1))
    swarm.announce(1, address=ipv4(1))
    swarm.announce(2, address=ipv4(1))
    with pytest.raises(bitbreeze.TrackerError, match="your address has 2 peers"):
        swarm.announce(3, address=ipv4(1))
    swarm.announce(4, address=b"\x7f\0\0\1")
    counts, peers = swarm.announce(5)  # it is not kept, but can download
    assert (counts, len(peers.endpoints4)) == ((0, 3, 0, 0), 18)
    assert swarm.announce(1, address=ipv4(1))[0] == (0, 3, 0, 0)
    with pytest.raises(
        bitbreeze.TrackerError, match="this tracker is full: it tracks 1 "
    ):
        Swarm(swarm.store, b"i" * 20).announce(1)


def test_one_address_cannot_fill_a_swarm(make_store):
    swarm = Swarm(make_store(max_peers_per_address=100))
    for peer in range(300):
        swarm.announce(peer)
    refused = 0
    for peer in range(1000, 2000):
        try:
            swarm.announce(peer, address=ipv6(1)[:6] + peer.to_bytes(10, "little"))
        except bitbreeze.TrackerError:
            refused += 1
    assert refused == 900
    for peer in range(3000, 6000):
        swarm.announce(peer)
    for peer in range(10_000, 14_000):  # now it is an estimate
        with suppress(bitbreeze.TrackerError):
            swarm.announce(peer, address=ipv6(1)[:6] + peer.to_bytes(10, "little"))
    from_there = [
        prefix
        for _, peers in all_peers(swarm.store, NOW)
        for prefix in endpoints(peers.endpoints6, 18)
        if prefix[:6] == ipv6(1)[:6]
    ]
    assert 100 <= len(from_there) < 320


@pytest.mark.parametrize("others", [0, 200])
@pytest.mark.parametrize("was_at", [ipv4, ipv6])
@pytest.mark.parametrize("crowd", [ipv4(1), ipv6(1)])
def test_one_address_cannot_gain_peers(make_store, others, was_at, crowd):
    """Peers that move there, or add an endpoint there, are peers of the address."""
    swarm, refused = Swarm(make_store(max_peers_per_address=10)), 0
    for peer in range(others):
        swarm.announce(1000 + peer)
    for peer in range(10, 40):
        swarm.announce(peer, address=was_at(peer))
        try:
            swarm.announce(peer, address=crowd)
        except bitbreeze.TrackerError as refusal:
            assert str(refusal) == "your address has 10 peers in this swarm already"
            refused += 1
    assert refused == 20
    assert swarm.announce(10, address=crowd, port=7)[0] == (0, others + 30, 0, 0)
    assert swarm.announce(50, address=crowd, port=7)[0] == (0, others + 30, 0, 0)
    ((_, _, peers),) = swarm.store.records(lambda: NOW)
    ends = [end for record, _ in peers for end in record.endpoints()]
    assert sum(end[:-2] == crowd for end in ends) == 10


@pytest.mark.parametrize("others", [1, 30, 500])
@pytest.mark.parametrize("crowd", [1, 5])
@pytest.mark.parametrize(("make", "width", "size"), [(ipv4, 6, 4), (ipv6, 18, 6)])
@pytest.mark.parametrize("left", [0, 1])
def test_an_address_gets_a_quarter_of_a_reply(
    make_store, others, crowd, make, width, size, left
):
    """``crowd`` addresses, or networks, with a hundred peers each, and ``others``."""
    swarm = Swarm(make_store())
    sources = [make(each)[:size] for each in range(crowd)]
    for peer in range(100 * crowd):
        address = sources[peer % crowd].ljust(width - 2, bytes([peer // crowd]))
        swarm.announce(1000 + peer, address=address, port=1024 + peer)
    for peer in range(100, 100 + others):
        swarm.announce(peer, address=make(peer))
    for compact in (True, False):
        for _ in range(10):
            newcomer = {"address": make(99), "left": left, "compact": compact}
            _, peers = swarm.announce(99, **newcomer)
            found = endpoints(peers[1 + (width == 18)], width)
            assert len(set(found)) == len(found) <= 50
            assert len(peers.ids) == 20 * len(found) * (not compact)
            counts = Counter(each[:size] for each in found)
            share = max(bitbreeze.FEW, len(found) // 4)
            assert max(counts[each] for each in sources) <= share
            honest = sum(counts[make(peer)[:size]] for peer in range(100, 100 + others))
            assert honest >= min(others, 50 - share * crowd)
            if others > 50:
                assert len(found) == 50


@pytest.mark.parametrize("number", [6, 40, 300])
@pytest.mark.parametrize("is_dual", [False, True])
def test_an_address_alone_gets_the_whole_reply(make_store, number, is_dual):
    """Peers of one campus, one house or one computer find each other."""
    swarm = Swarm(make_store(max_peers_per_address=0))
    for peer in range(number):
        for address in (ipv4(1), ipv6(1)[:15] + bytes([peer % 256]))[: 1 + is_dual]:
            swarm.announce(peer, address=address, port=1024 + peer)
    for address in (ipv4(1), ipv4(2)):
        _, peers = swarm.announce(number, address=address, port=7)
        assert len(set(endpoints(peers.endpoints4))) == min(50, number)


@pytest.mark.parametrize("number", [3, 300])
def test_peers_are_all_of_every_swarm(make_store, number):
    store = make_store()
    for info_hash in (HASH, HASH[::-1]):
        for peer in range(number):
            Swarm(store, info_hash).announce(peer)
            Swarm(store, info_hash).announce(peer, address=ipv6(peer))
    Swarm(store, b"e" * 20).announce(1, event="stopped")
    found = dict(all_peers(store, NOW))
    assert set(found) == {HASH, HASH[::-1]}
    for peers in found.values():
        columns = (endpoints(c, w) for c, w in zip(peers, (20, 6, 18), strict=True))
        assert {
            (who, end4, end6[:-2]) for who, end4, end6 in zip(*columns, strict=True)
        } == {(peer_id(peer), endpoint(peer), ipv6(peer)) for peer in range(number)}


def test_empty_swarms_keep_their_snatches(make_store):
    swarm = Swarm(make_store(swarm_ttl=5000))
    swarm.announce(1)
    swarm.announce(1, event="completed", left=0)
    Swarm(swarm.store, b"i" * 20).announce(1)
    assert dict(swarm.store.swarms(NOW + TTL + 1)) == {HASH: (0, 0, 0, 1)}
    assert dict(swarm.store.swarms(NOW + TTL + 4000)) == {HASH: (0, 0, 0, 1)}
    assert dict(swarm.store.swarms(NOW + TTL + 5002)) == {}
    assert swarm.counts(NOW + TTL + 5002) == (0, 0, 0, 0)


def test_dropped_swarms_make_room(make_store):
    store = make_store(max_swarms=2)
    Swarm(store, b"a" * 20).announce(1)
    Swarm(store, b"b" * 20).announce(1)
    for _ in range(256):
        later = NOW + TTL + 10
        store.tidy(later + 10 * _)
    Swarm(store, b"c" * 20).announce(1, later)
    Swarm(store, b"d" * 20).announce(1, later)


def test_swarms_without_peers_keep_no_live_swarm_out(make_store):
    """Only swarms with peers count, and of the others the oldest go first."""
    store = make_store(max_swarms=100)
    names = [bytes([number % 256, number // 256]) * 10 for number in range(1000)]
    for number, name in enumerate(names):
        for fields in ({}, {"left": 0, "event": "completed"}, {"event": "stopped"}):
            Swarm(store, name).announce(1, NOW + number, **fields)
    later = NOW + len(names)
    found = {name: counts for name, counts in store.swarms(later) if counts.snatches}
    assert 100 <= len(found) <= 200
    assert max(found) and set(names[-50:]) <= set(found)
    for number in range(100):
        Swarm(store, b"%020d" % number).announce(1, later)
    with pytest.raises(bitbreeze.TrackerError, match="it tracks 100 torrents already"):
        Swarm(store, b"i" * 20).announce(1, later)
    assert counted(store)[1] == 100 < counted(store)[0] <= 200
    assert len(kept(store.folder)) == counted(store)[0]


def test_completed_from_strangers_keeps_no_swarm(make_store):
    store = make_store()
    for number in range(300):
        for fields in ({"event": "completed"}, {}, {"event": "completed"}):
            Swarm(store, b"%020d" % number).announce(number, left=0, **fields)
    assert len(list(store.swarms(NOW + TTL + 1))) == 0
    assert not kept(store.folder)


def mixed(store, number, now=NOW):
    """Announce to a store, as each of three does who have all kinds of peers."""
    for info_hash, size in ((HASH, number), (HASH[::-1], 3)):
        swarm = Swarm(store, info_hash)
        for peer in range(size):
            seen, left = now + peer % 7, peer % 2
            address = (ipv4 if peer % 3 else ipv6)(peer)
            swarm.announce(peer, seen, port=peer * 99 % 65536, left=1, address=address)
            if peer % 5 == 0:
                fields = {"left": left, "event": "completed", "address": ipv6(peer)}
                swarm.announce(peer, seen + 1, port=peer, **fields)
            if peer % 11 == 0:
                swarm.announce(peer, seen + 2, event="paused", address=ipv4(peer))
    for fields in ({}, {"event": "completed", "left": 0}, {"event": "stopped"}):
        Swarm(store, b"e" * 20).announce(1, now, **fields)


def known(store, now=NOW + 10):
    """Return (snatches, peers) of all swarms of a store."""
    found = {}
    for info_hash, snatches, peers in store.records(lambda: now):
        found[info_hash] = snatches, sorted(peers)
    return found


@pytest.mark.parametrize("number", [0, 3, 70, 71, 1000])
def test_restored_swarms_are_those_they_were(make_store, number):
    now, store, other = NOW + 10, make_store(), make_store("other")
    mixed(store, number)
    for _ in range(2):
        for info_hash, snatches, peers in store.records(lambda: now):
            done = other.restore(info_hash, snatches, peers, now)
            assert done == (len(known(store)[info_hash][1]), 0, 0)
        assert known(other) == known(store)
        assert dict(other.swarms(now)) == dict(store.swarms(now))
    assert len(known(store)) == 2 + bool(number)
    met = [Swarm(each).announce(5, now, wanted=2000)[1] for each in (store, other)]
    if number <= 70:  # of several pages, not all peers are handed out
        assert len({frozenset(endpoints(peers.endpoints4)) for peers in met}) == 1


def test_records_of_a_swarm_stay_as_they_were(swarm):
    for peer in range(100):
        swarm.announce(peer)
    ((_, _, peers),) = swarm.store.records(lambda: NOW)
    for peer in range(100):
        swarm.announce(peer, NOW + 5, left=0)
    assert {(record.seen4, is_seeder) for record, is_seeder in peers} == {(NOW, False)}


def test_a_slow_walk_keeps_peers_that_announce_meanwhile(make_store):
    store, other, now = make_store(), make_store(), iter((NOW, NOW + TTL + 5))
    for first in (1, 255):
        Swarm(store, bytes([first]) * 20).announce(1)
    walk = store.records(lambda: next(now))
    next(walk)
    Swarm(other, b"\xff" * 20).announce(2, NOW + TTL)
    (_, _, peers) = next(walk)
    assert [each.seen4 for each, _ in peers] == [NOW + TTL]


def record(seen4=0, seen6=0, address=1, key=5, state=0):
    """Return the Record of peer 1 as another tracker could have it."""
    end4, end6 = bytes(6), bytes(18)
    end4 = ipv4(address) + b"\x10\x01" if seen4 else end4
    end6 = ipv6(address) + b"\x10\x01" if seen6 else end6
    return bitbreeze.Record(peer_id(1), key, state, seen4, seen6, end4, end6)


SEEDER, LEECHER = True, False
OLD, NEW, HAD = NOW - 100, NOW - 50, bitbreeze.SNATCHED
RESTORED = {
    "new": (None, (record(NEW), SEEDER), (record(NEW), SEEDER)),
    "known": (
        (record(OLD), LEECHER), (record(NEW, NEW, 2, 6), SEEDER),
        (record(OLD), LEECHER),
    ),
    "snatched": (
        None, (record(OLD, state=HAD), SEEDER), (record(OLD, state=HAD), SEEDER),
    ),
    "seen tomorrow": (None, (record(NOW + 9**5), SEEDER), (record(NOW), SEEDER)),
    "expired": ((record(NEW), SEEDER), (record(1), LEECHER), (record(NEW), SEEDER)),
    "expired in a family": (None, (record(NEW, 1), LEECHER), (record(NEW), LEECHER)),
}  # fmt: skip


@pytest.mark.parametrize(("here", "there", "kept"), RESTORED.values(), ids=RESTORED)
@pytest.mark.parametrize("others", [0, 200])
def test_a_peer_that_is_known_stays_as_it_is(make_store, here, there, kept, others):
    swarm = Swarm(make_store())
    for peer in range(others):
        swarm.announce(1000 + peer)
    for each in (here, there, there):
        if each:
            swarm.store.restore(HASH, 0, [each], NOW)
    seeders, leechers, partial, _ = swarm.counts()
    assert (seeders, leechers) == (kept[1], others + (not kept[1]))
    assert partial == 0
    ((_, _, peers),) = swarm.store.records(lambda: NOW)
    assert [each for each in peers if each[0].peer_id == peer_id(1)] == [kept]


@pytest.mark.parametrize(
    ("here", "there", "merged"), [(0, 3, 3), (3, 3, 3), (3, 2, 3), (3, 5, 5)]
)
def test_the_larger_number_of_snatches_stays(swarm, here, there, merged):
    swarm.store.restore(HASH, here, [], NOW)
    swarm.store.restore(HASH, there, iter([(record(NEW), LEECHER)]), NOW)
    assert swarm.counts() == (0, 1, 0, merged)


def test_nothing_is_made_of_nobody(swarm):
    assert swarm.store.restore(HASH, 0, [(record(1), SEEDER)], NOW) == (0, 1, 0)
    assert list(swarm.store.swarms(NOW)) == list(swarm.store.records(lambda: NOW)) == []
    assert swarm.store.restore(HASH, 7, [(record(1), SEEDER)], NOW) == (0, 1, 0)
    assert known(swarm.store) == {HASH: (7, [])}


def test_limits_hold_for_the_restored(make_store):
    store = make_store(max_swarms=1, max_peers=3, max_peers_per_address=2)
    peers = [
        (
            record(NOW, 0, n // 3)._replace(
                peer_id=peer_id(n), endpoint4=ipv4(n // 3) + bytes((9, n))
            ),
            SEEDER,
        )
        for n in range(6)
    ]
    assert store.restore(HASH, 1, peers, NOW) == (3, 0, 3)
    assert store.restore(HASH, 1, peers, NOW) == (3, 0, 3)
    assert Swarm(store).counts() == (3, 0, 0, 1)
    with pytest.raises(bitbreeze.TrackerError, match="this tracker is full"):
        store.restore(b"i" * 20, 1, peers, NOW)


@pytest.mark.parametrize("others", [0, 200])
def test_the_peer_before_a_restart_is_not_restored(swarm, others):
    for peer in range(others):
        swarm.announce(1000 + peer)
    swarm.announce(2, address=ipv4(1), port=4097)  # the endpoint of record()
    for _ in range(2):
        swarm.store.restore(HASH, 0, [(record(NEW, NEW), SEEDER)], NOW)
        assert swarm.counts() == (0, others + 1, 0, 0)


class Model:
    """What a store should say, with a dictionary for memory; one family, no limits."""

    def __init__(self):
        self.peers, self.snatches = {}, 0  # [left, paused, seen, snatched] by number

    def announce(self, peer, now, left, event):
        self.expire(now)
        known = self.peers.get(peer)
        if event == "stopped" and not known:
            return
        seeder = left == 0
        snatched = bool(known and known[3])
        if known and seeder and known[0] != 0:
            self.snatches += not snatched
            snatched = True
        self.peers[peer] = [left, event == "paused" and not seeder, now, snatched]
        if event == "stopped":
            del self.peers[peer]

    def expire(self, now):
        self.peers = {p: v for p, v in self.peers.items() if v[2] >= now - TTL}

    def counts(self, now):
        self.expire(now)
        lefts = [left for left, *_ in self.peers.values()]
        paused = sum(1 for _, is_paused, *_ in self.peers.values() if is_paused)
        seeders = lefts.count(0)
        return seeders, len(lefts) - seeders, paused, self.snatches


@given(st.integers(0, 2**32), st.sampled_from([5, 80, 400]), st.sampled_from([1, 60]))
@hypothesis_settings(max_examples=12, deadline=None)
def test_store_and_model_agree(tmp_path_factory, seed, crowd, pace):
    """Announce up to ``crowd`` peers at random, up to ``pace`` seconds apart."""
    rnd, model, now = random.Random(seed), Model(), NOW
    store = bitbreeze.FileStore(
        tmp_path_factory.mktemp("model"), make_settings(swarm_ttl=10**9)
    )
    swarm = Swarm(store)
    for _ in range(700):
        now += rnd.randrange(pace + 1)
        peer, left = rnd.randrange(crowd), rnd.choice([0, 1, 1])
        event = rnd.choice(["", "", "", "started", "completed", "paused", "stopped"])
        counts, peers = swarm.announce(peer, now, wanted=1000, left=left, event=event)
        model.announce(peer, now, left, event)
        if crowd <= 70:  # one page: never behind
            assert counts == model.counts(now)
        known = {endpoint(peer) for peer in model.peers}
        assert known.issuperset(endpoints(peers.endpoints4))
    now += TTL // 4 + 1  # a recount
    assert swarm.counts(now) == model.counts(now)


# -- Files


def files(store):
    return [path for path in Path(store.folder).rglob("*") if path.is_file()]


def test_files_are_private(swarm):
    for peer in range(100):
        swarm.announce(peer)
        assert os.stat(swarm.store.folder).st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in files(swarm.store)} == {0o600}


def test_big_swarms_take_100_bytes_a_peer_and_shrink(swarm):
    for now, first in ((NOW, 0), (NOW + 1000, 1)):
        for peer in range(first, 5000, 2):
            swarm.announce(peer, now)
    path = kept(swarm.store.folder)[HASH]
    assert path.stat().st_size < 5000 * 110
    assert swarm.counts(NOW + TTL + 1) == (0, 2500, 0, 0)
    assert swarm.counts(NOW + TTL + 1001) == (0, 0, 0, 0)
    assert path.stat().st_size == 4096


DAMAGES = {
    "cut short": lambda data: data[:1000],
    "cut in a later page": lambda data: data[:-1],
    "random": lambda data: random.Random(1).randbytes(len(data)),
    "random in a later page": lambda data: data[:8192] + os.urandom(9000),
    "an older version": lambda data: data[:4] + b"\0" + data[5:],
    "another version in a later page": lambda data: data[:8196] + b"\2" + data[8197:],
    "of another swarm": lambda data: data[:16] + b"x" * 20 + data[36:],
    "something else": lambda data: b"<html>" * 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "damage"),
    [
        pytest.param(size, damage, id=f"{size}-{name}")
        for name, damage in DAMAGES.items()
        for size in ((300,) if "cut" in name or "later" in name else (5, 300))
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_damaged_files_are_set_aside(make_store, caplog, size, damage, is_open):
    swarm = Swarm(make_store())
    for peer in range(size):
        swarm.announce(peer)
    rewrite(swarm.store.folder, HASH, damage)
    if not is_open:
        swarm = Swarm(make_store())
    for peer in range(size):  # one of them comes upon the damage
        swarm.announce(peer)
    if swarm.counts() == (0, size, 0, 0) and not caplog.records:
        swarm.counts(NOW + TTL // 2)
    for peer in range(size):
        swarm.announce(peer, NOW + TTL // 2)
    assert swarm.counts(NOW + TTL // 2) == (0, size, 0, 0)
    assert len(caplog.records) == 1
    assert "was damaged" in caplog.text
    assert Path(swarm.store.folder, "damaged", HASH.hex()).exists()


@pytest.mark.parametrize(("size", "at"), [(5, 7), (300, 7), (300, 8192)])
def test_a_damaged_swarm_goes_for_those_who_have_it_open(make_store, size, at):
    one, other = Swarm(make_store()), Swarm(make_store())
    for peer in range(size):
        one.announce(peer)
        other.announce(peer)
    rewrite(one.store.folder, HASH, lambda it: it[:at] + b"\xff" * 9 + it[at + 9 :])
    list(all_peers(one.store, NOW))
    assert Path(one.store.folder, "damaged", HASH.hex()).exists()
    for peer in range(size):
        (one, other)[peer % 2].announce(peer)
    assert one.counts() == other.counts() == (0, size, 0, 0)
    assert dict(make_store().swarms(NOW)) == {HASH: (0, size, 0, 0)}


def test_swarms_grow_by_a_page(swarm):
    for peer in range(70):
        swarm.announce(peer)
    assert kept(swarm.store.folder)[HASH].stat().st_size == 4096
    swarm.announce(70)
    assert kept(swarm.store.folder)[HASH].stat().st_size == 8192


def test_files_are_as_the_docstring_says(make_store):
    """Trackers have these bytes on their disks: another format needs another folder."""
    swarm, number = Swarm(make_store()), 3
    head = struct.pack("<4sBBBBII", b"swrm", 1, number, 0, 0, 0, NOW)
    checked = HASH + b"saltsalt" + struct.pack("<IIII", 1, number, 0, 0)
    checked += struct.pack("<QIIB", 77, 0, 0, 0)
    records, ends4, ends6 = b"", b"", b""
    for peer in range(number):
        records += peer_id(peer) + struct.pack("<IBII", 5, 2, NOW, NOW)
        ends4 += endpoint(peer)
        ends6 += ipv6(peer) + endpoint(peer)[4:]
    page = head + checked + zlib.crc32(checked).to_bytes(4, "little")
    page = page.ljust(106, b"\0") + records.ljust(2310, b"\0")
    page += ends4.ljust(420, b"\0") + ends6.ljust(1260, b"\0")
    path = Path(swarm.store.folder, "swarms/ab", HASH.hex())
    path.parent.mkdir(parents=True)
    path.write_bytes(page)
    assert swarm.counts() == (3, 0, 0, 77)
    _, peers = swarm.announce(9, address=ipv6(9))
    found = endpoints(peers.endpoints6, 18)
    assert sorted(found) == [ipv6(peer) + endpoint(peer)[4:] for peer in range(3)]
    with pytest.raises(bitbreeze.TrackerError, match="another key"):
        swarm.announce(1, key=6, address=ipv4(99))
    assert swarm.announce(1, left=0, event="completed")[0].snatches == 77


@pytest.mark.parametrize("size", [0, 1, 81, 1000, 3605, 4095, 4097, 9000, 16384, 18000])
@pytest.mark.parametrize("peers", [1, 60, 300])
def test_a_file_that_is_cut_while_open_fills_again(swarm, peers, size):
    for peer in range(peers):
        swarm.announce(peer)
    os.truncate(kept(swarm.store.folder)[HASH], size)
    for _ in range(2):  # one of these announces may find the damage
        for peer in range(peers):
            swarm.announce(peer)
    assert swarm.counts() == (0, peers, 0, 0)


def test_an_emptied_file_is_a_new_swarm(swarm, caplog):
    for peer in range(100):
        swarm.announce(peer)
    os.truncate(kept(swarm.store.folder)[HASH], 0)
    assert swarm.announce(2)[0] == (0, 1, 0, 0)
    assert not caplog.records


def test_a_miscounted_partial_seed_is_damage(swarm):
    swarm.announce(1)
    state_at = 106 + 24
    partial = bytes((bitbreeze.PARTIAL,))
    folder = swarm.store.folder
    rewrite(folder, HASH, lambda it: it[:state_at] + partial + it[state_at + 1 :])
    swarm.announce(1, event="stopped")
    assert swarm.announce(2)[0] == (0, 1, 0, 0)


def test_files_stay_open_while_they_are_announced_and_so_many(make_store, monkeypatch):
    monkeypatch.setattr(bitbreeze, "OPEN_AT_MOST", 6)
    store = make_store()
    for number in range(20):
        Swarm(store, bytes((number,)) * 20).announce(1)
        assert len(store._open) == min(number + 1, 6)
    Swarm(store).announce(1, NOW + 9)
    assert len(store._open) == 6
    Swarm(store).announce(1, NOW + 10)
    Swarm(store).announce(1, NOW + 19)
    assert HASH in store._open
    Swarm(store).announce(1, NOW + 20)
    assert list(store._open) == [HASH]


def test_a_dropped_store_closes_its_files(tmp_path):
    """At once: a process without a free descriptor cannot wait for the collector."""
    store = bitbreeze.FileStore(tmp_path, make_settings())
    for _ in range(3):
        Swarm(store).announce(1)
    fd = store._open[HASH].fd
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_forked_child_opens_its_own_files(swarm):
    swarm.announce(1)
    assert swarm.store._open
    child = os.fork()
    if not child:
        os._exit(len(swarm.store._open))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("waiter", ["process", "thread"])
@pytest.mark.parametrize("peers", [0, 60, 300])
def test_a_worker_that_waits_for_a_removed_swarm(tmp_path, monkeypatch, peers, waiter):
    """The swarm goes, or grows, while a process or a thread waits for its lock."""
    store = bitbreeze.FileStore(tmp_path, make_settings(swarm_ttl=0))
    for peer in range(peers or 1):
        Swarm(store).announce(peer)
    if not peers:
        Swarm(store).announce(0, event="stopped")
    newcomers = range(3000, 3000 + peers)
    waits, flock = [True], bitbreeze.fcntl.flock

    def change(store):
        if waits:
            waits.clear()
            list(store.swarms(NOW))
            for peer in newcomers:
                Swarm(store).announce(peer)

    def wait_for_file(fd, operation):
        if operation == fcntl.LOCK_EX:
            change(bitbreeze.FileStore(tmp_path, make_settings(swarm_ttl=0)))
        return flock(fd, operation)

    class ThreadLock:
        def __init__(self, lock):
            self.lock, self.release = lock, lock.release

        def acquire(self):
            change(store)
            return self.lock.acquire()

    if waiter == "process":
        monkeypatch.setattr(bitbreeze.fcntl, "flock", wait_for_file)
    else:
        store._open[HASH].lock = ThreadLock(store._open[HASH].lock)
    Swarm(store).announce(2000)
    assert not waits
    other = bitbreeze.FileStore(tmp_path, make_settings())
    assert Swarm(other).counts().leechers == peers + len(newcomers) + 1


@pytest.mark.parametrize("jump", [TTL // 2, 86400])
@pytest.mark.parametrize("number", [30, 300])
def test_a_clock_that_was_set_back_keeps_no_peer(make_store, number, jump):
    """At the next tidy or recount, seconds in the future count as now."""
    swarm = Swarm(make_store(swarm_ttl=0))
    for first, now in ((0, NOW), (number, NOW + jump)):
        for peer in range(first, first + number):
            swarm.announce(peer, now)
    later = NOW + TTL // 4
    tidied(later)(swarm)
    swarm.announce(5000, later)
    assert swarm.counts(later + TTL) == (0, number + 1, 0, 0)
    recounted = later + TTL + (TTL // 16 if number > 70 else 1)
    assert swarm.counts(recounted + 1) == (0, 0, 0, 0)


def test_a_clock_that_was_set_forward_lets_peers_come_back(swarm):
    for now in (NOW, NOW + 86400, NOW):
        for peer in range(100):
            swarm.announce(peer, now)
        assert swarm.counts(now) == (0, 100, 0, 0)


def test_removed_folder_is_made_again(swarm):
    swarm.announce(1)
    os.rename(swarm.store.folder, swarm.store.folder + ".gone")
    assert swarm.announce(2, NOW + 10)[0] == (0, 1, 0, 0)


def test_number_of_swarms_is_mended(make_store):
    store = make_store(max_swarms=2)
    Swarm(store, b"a" * 20).announce(1)
    Path(store.folder, "swarms.count").write_bytes(struct.pack("<QQ", 9, 2))
    assert len(list(store.swarms(NOW))) == 1
    assert counted(store) == (1, 1)
    Swarm(store, b"b" * 20).announce(1)
    assert counted(store) == (2, 2)


@pytest.mark.parametrize("peers", [5, 75])
def test_any_flipped_byte_is_survived(tmp_path, caplog, is_long, peers):
    """What is counted then is there, and can be; or the file is set aside.

    Each byte is flipped in the file of a swarm of its own, so that one walk is over
    many.
    """
    caplog.set_level(logging.CRITICAL)
    whole = whole_file(bitbreeze.FileStore(tmp_path / "whole", make_settings()), peers)
    values = [1 << bit for bit in range(8)] + [255, random.randrange(1, 255)]
    values = values if is_long else random.sample(values, 1)
    flips = [(at, value) for at in range(len(whole)) for value in values]
    flips = flips if is_long else flips[random.randrange(2) :: 2]
    for first in range(0, len(flips), 2048):
        folder = tmp_path / str(first)
        flipped = put_flipped(folder, whole, flips[first : first + 2048])
        check_flipped(bitbreeze.FileStore(folder, make_settings()), flipped)
        shutil.rmtree(folder)


def whole_file(store, peers):
    """Return the bytes of the file of a swarm of peers of all kinds."""
    swarm = Swarm(store)
    for peer in range(peers):
        event = ("", "paused", "completed")[peer % 3]
        swarm.announce(peer, left=peer % 3 % 2, event=event)
        swarm.announce(peer, left=peer % 3 % 2, event=event, address=ipv6(peer))
    return rewrite(store.folder, HASH, lambda whole: whole)


def put_flipped(folder, whole, flips):
    """Make a swarm of each flip: (which byte, what to flip in it); return them."""
    (folder / "swarms/00").mkdir(parents=True)
    swarms = {number.to_bytes(20, "big"): flip for number, flip in enumerate(flips)}
    for info_hash, (at, value) in swarms.items():
        head = whole[16:36].replace(HASH, info_hash) + whole[36:77]
        data = bytearray(whole[:16] + head + bitbreeze.checksum(head) + whole[81:])
        data[at] ^= value
        (folder / "swarms/00" / info_hash.hex()).write_bytes(data)
    return swarms


def check_flipped(store, swarms):
    """Fail unless each swarm is whole, or set aside, and goes on either way."""
    later = NOW + TTL // 8  # all are counted anew
    for now in (NOW, later):
        for info_hash, flip in swarms.items():
            counts = store.scrape([info_hash], now)[info_hash]
            assert 0 <= min(counts) <= max(counts) <= 140, flip
            counts, peers = Swarm(store, info_hash).announce(99, now)
            assert 0 <= min(counts) <= max(counts) <= 140, flip
            assert len(peers.endpoints4) % 6 == 0 and counts.leechers, flip
    found = dict(all_peers(store, later))
    for info_hash, (at, value) in swarms.items():
        if at < 5 or 16 <= at < 81:  # nothing is believed of such a head
            assert Path(store.folder, "damaged", info_hash.hex()).exists(), (at, value)
    for info_hash, counts in store.swarms(later):
        peers, flip = found.pop(info_hash), swarms.pop(info_hash)
        assert len(peers.ids) == 20 * (counts.seeders + counts.leechers), flip
        assert peer_id(99) in endpoints(peers.ids, 20), flip
    assert not found and not swarms


@given(st.integers(0, 2**32), st.integers(1, 8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_flipped_bytes_are_survived(tmp_path_factory, seed, flips):
    """With bytes of the file changed, an announce works, or the file is set aside."""
    rnd = random.Random(seed)
    store = bitbreeze.FileStore(tmp_path_factory.mktemp("flip"), make_settings())
    swarm = Swarm(store)
    for peer in range(rnd.choice([3, 75])):
        swarm.announce(peer, address=rnd.choice([ipv4, ipv6])(peer))

    def flip(data):
        data = bytearray(data)
        for _ in range(flips):
            at = rnd.choice([rnd.randrange(110), rnd.randrange(len(data))])
            data[at] = rnd.randrange(256)
        return data

    rewrite(store.folder, HASH, flip)
    for peer in (1, 90):
        for now in (NOW, NOW + 2000):
            try:
                swarm.announce(peer, now)
            except bitbreeze.TrackerError:
                pass  # another key, or full, as far as the file knows
            assert min(swarm.counts(now)) >= 0


# -- Shelves


# -- Kills and errors, at every call to the system


class Killed(BaseException):
    """The process is gone: nothing after it runs, not even an except."""


CALLS = frozenset(
    ("open", "pread", "pwrite", "unlink", "replace", "ftruncate", "makedirs")
    + ("stat", "fstat", "listdir", "flock")
)


class Faulty:
    """The modules os and fcntl of the store, of which one call does not happen.

    It is the one after ``left`` others. A "kill" lets no later one happen either. An
    "error" is what a disk may answer, but not to a lock that is given back.
    """

    path, LOCK_EX, LOCK_UN = os.path, fcntl.LOCK_EX, fcntl.LOCK_UN

    def __init__(self, kind, left, calls=CALLS):
        self.kind, self.left, self.calls = kind, left, calls
        self.has_struck = False

    def __getattr__(self, name):
        real = getattr(fcntl if name == "flock" else os, name)
        if name not in self.calls:
            return real
        return lambda *given, **more: self._call(real, *given, **more)

    def _call(self, real, *given, **more):
        is_kill = self.kind == "kill"
        if given[1:] == (fcntl.LOCK_UN,):
            real(*given)  # the system does, when a process is gone
            if not is_kill:
                return None
        if real is os.listdir and not os.path.exists(given[0]):  # as most are
            return real(*given)
        self.left -= 1
        if self.left == -1 or self.has_struck and is_kill:
            self.has_struck = True
            raise Killed if is_kill else OSError(errno.ENOSPC, "no space left")
        return real(*given, **more)

    def strike(self, act, swarm):
        """Do something until the fault comes; return whether it came."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bitbreeze, "os", self)
            patch.setattr(bitbreeze, "fcntl", self)
            with suppress(Killed, OSError, bitbreeze.TrackerError):
                act(swarm)
        return self.has_struck


class Case(NamedTuple):
    """What is there before a fault, what is done, and when one looks afterwards."""

    prepare: Callable  # (Swarm)
    act: Callable  # (Swarm)
    now: int = NOW + 100
    is_damaged: bool = False
    halfway: Callable | None = None  # (Swarm): does only the first of two changes


def crowd(number):
    """Return what announces so many peers of all kinds, every eighth a bit later."""

    def prepare(swarm):
        for peer in range(number):
            event = "paused" if peer % 5 == 1 else ""
            now = NOW + 100 * (peer % 8 == 0)
            swarm.announce(peer, now, left=peer % 3, event=event)

    return prepare


def torn(number):
    """Return what leaves a swarm as a kill does after so many writes of a growth."""

    def prepare(swarm):
        crowd(120)(swarm)
        Faulty("kill", number, {"pwrite"}).strike(announced(120), swarm)
        assert kept(swarm.store.folder)[HASH].read_bytes()[76] == bitbreeze.CHANGING, (
            number
        )

    return prepare


def damaged(number, at):
    """Return what leaves a swarm with something else in its file."""

    def prepare(swarm):
        crowd(number)(swarm)
        other = b"something else" * 9
        after = at + len(other)
        rewrite(swarm.store.folder, HASH, lambda it: it[:at] + other + it[after:])

    return prepare


def swarms(number):
    """Return what leaves so many swarms of one peer."""

    def prepare(swarm):
        for info_hash in (HASH, OTHER)[:number]:
            Swarm(swarm.store, info_hash).announce(1)

    return prepare


def an_empty_file(swarm):
    """Leave what a kill leaves when a file is made, and nothing written to it yet."""
    crowd(1)(swarm)
    os.truncate(kept(swarm.store.folder)[HASH], 0)
    Path(swarm.store.folder, "swarms.count").write_bytes(bytes(16))


def announced(peer, now=NOW + 100, **fields):
    return lambda swarm: swarm.announce(peer, now, **fields)


def scraped(now):
    return lambda swarm: swarm.counts(now)


def walked(now):
    return lambda swarm: list(all_peers(swarm.store, now))


def tidied(now):
    def tidy(swarm):
        for _ in range(256):
            swarm.store.tidy(now)

    return tidy


def elsewhere(swarm):
    Swarm(swarm.store, OTHER).announce(1)


OTHER, LATER = HASH[::-1], NOW + TTL + 50
CASES = {
    "nothing there": Case(swarms(0), announced(0)),
    "a second swarm": Case(swarms(1), elsewhere),
    "no room for a third swarm": Case(
        swarms(2), lambda swarm: Swarm(swarm.store, b"t" * 20).announce(1)
    ),
    "a file just made, used": Case(an_empty_file, announced(0)),
    "a file just made, removed": Case(an_empty_file, walked(NOW)),
    **{f"newcomer to {n}": Case(crowd(n), announced(n)) for n in (6, 70, 80, 120, 500)},
    **{
        f"{what} among {n}": Case(crowd(n), announced(peer, **fields))
        for n in (6, 500)
        for what, peer, fields in (
            ("known", 3, {"left": 0}),
            ("moved", 3, {"left": 0, "address": ipv4(999)}),
            ("second endpoint", 3, {"left": 0, "address": ipv6(3)}),
            ("completed", 1, {"left": 0, "event": "completed"}),
            ("completed silently", 2, {"left": 0}),
            ("stopped", 2, {"event": "stopped"}),
            ("stopped at last", 2, {"left": 0, "event": "stopped"}),
            ("paused", 2, {"event": "paused"}),
        )
    },
    **{
        f"{what} when most of {n} have expired": Case(crowd(n), act, LATER)
        for n in (60, 500)
        for what, act in (
            ("newcomer", announced(n, LATER)),
            ("scrape", scraped(LATER)),
            ("walk", walked(LATER)),
        )
    },
    **{
        f"{what} after a kill in growing, {n} writes done": Case(torn(n), act)
        for n in (2, 3)
        for what, act in (("scrape", scraped(NOW + 100)), ("newcomer", announced(999)))
    },
    **{
        f"restarted among {n}": Case(
            crowd(n),
            announced(n, address=ipv4(3), port=1003),
            halfway=announced(3, event="stopped"),
        )
        for n in (6, 500)
    },
    "nobody left of many": Case(crowd(500), scraped(LATER + 50), LATER + 50),
    "walk over the expired": Case(swarms(2), walked(LATER), LATER),
    "tidy": Case(swarms(2), tidied(LATER), LATER),
    "damaged": Case(damaged(6, 0), announced(9), is_damaged=True),
    "damaged, of many": Case(damaged(500, 20), announced(9), is_damaged=True),
    "damaged in a later page": Case(
        damaged(500, 3 * 4096), walked(NOW), is_damaged=True
    ),
}  # fmt: skip


def observed(store, now):
    """Return the peers and counts of all swarms, which must agree, and the snatches."""
    found = {
        info_hash: sorted(zip(*map(endpoints, peers, (20, 6, 18)), strict=True))
        for info_hash, peers in all_peers(store, now)
    }
    counted = {h: counts for h, counts in store.swarms(now) if sum(counts[:2])}
    assert found.keys() == counted.keys()
    counts = store.scrape([HASH, OTHER], now)
    for info_hash, (seeders, leechers, partial_seeds, _) in counts.items():
        ids = [peer_id for peer_id, *_ in found.setdefault(info_hash, [])]
        assert len(set(ids)) == len(ids) == seeders + leechers
        assert 0 <= partial_seeds <= leechers
    kinds = {info_hash: each[:3] for info_hash, each in counts.items()}
    return (found, kinds), sum(each.snatches for each in counts.values())


def check_numbers(store, now):
    """Fail unless the numbers of swarms, after a walk over all, are right."""
    live = len(dict(all_peers(store, now)))
    assert counted(store) == (len(kept(store.folder)), live)


def counted(store):
    """Return the numbers of swarms, and of those with peers, that a store keeps."""
    return struct.unpack("<QQ", Path(store.folder, "swarms.count").read_bytes())


def disk_use(store):
    return sum(path.stat().st_size for path in files(store))


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fault_at_any_call_loses_nothing(tmp_path, caplog, kind, case):
    """All is as before or as after; and as after, once the client asks again."""

    def opened(name, prepared="prepared"):
        if prepared:
            shutil.copytree(tmp_path / prepared, tmp_path / name)
        return Swarm(bitbreeze.FileStore(tmp_path / name, make_settings(max_swarms=2)))

    (tmp_path / "prepared").mkdir()
    case.prepare(opened("prepared", None))
    before = *observed(opened("before").store, case.now), 0
    swarm = opened("halfway")
    if case.halfway:
        case.halfway(swarm)
    halfway = observed(swarm.store, case.now)
    swarm = opened("after")
    with suppress(bitbreeze.TrackerError):
        case.act(swarm)
    after = *observed(swarm.store, case.now), disk_use(swarm.store)
    for calls in range(1000):
        caplog.clear()
        swarm = opened(str(calls))
        if not Faulty(kind, calls).strike(case.act, swarm):
            break
        if kind == "kill":
            swarm = opened(str(calls), None)
        check_after_fault(swarm, case, before, after, halfway)
        said = [record.getMessage() for record in caplog.records]
        assert all("was damaged" in each for each in said)
        assert case.is_damaged - (kind == "kill") <= len(said) <= case.is_damaged
        shutil.rmtree(tmp_path / str(calls))
    assert calls > 3


def check_after_fault(swarm, case, before, after, halfway):
    """Fail unless all is as before or as after, and as after once it is done again."""
    store = swarm.store
    found, snatches = observed(store, case.now)
    seen = found, snatches
    assert seen in (before[:2], after[:2], halfway, (before[0], after[1]))
    check_numbers(store, case.now)
    with suppress(bitbreeze.TrackerError):
        case.act(swarm)
    found, snatches = observed(store, case.now)
    # A kill between the two writes of a snatch among many makes it count twice.
    assert found == after[0] and 0 <= snatches - after[1] <= 1
    check_numbers(store, case.now)
    assert disk_use(store) == after[2]
    aside = Path(store.folder, "damaged", HASH.hex())
    assert aside.exists() == case.is_damaged


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("here", [0, 69, 119])
def test_a_restore_that_fails_at_any_call_is_done_again(make_store, kind, here):
    """Whoever was there stays, and those restored until then; the rest comes later."""
    source = Swarm(make_store("source"))
    for peer in range(60, 160):
        source.announce(peer)
    ((_, _, peers),) = source.store.records(lambda: NOW)
    restore = HASH, 3, list(peers), NOW
    for calls in (*range(12), 20, 50):
        swarm = Swarm(make_store(str(calls)))
        for peer in range(here):
            swarm.announce(peer)
        assert Faulty(kind, calls).strike(lambda it: it.store.restore(*restore), swarm)
        if kind == "kill":
            swarm = Swarm(make_store(str(calls)))
        assert here <= swarm.counts().leechers <= max(100, 160 * (here > 0))
        assert swarm.store.restore(*restore) == (100, 0, 0)
        assert swarm.counts() == (0, 160 if here > 60 else 100, 0, 3)
        assert list(swarm.store.swarms(NOW))
        check_numbers(swarm.store, NOW)
