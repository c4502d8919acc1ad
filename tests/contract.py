"""The contract of a store, as tests for every store.

test_store.py and test_redis.py run them, with a fixture ``make_store`` of their own.
"""

import random
from collections import Counter

import pytest
from conftest import NOW, all_peers, endpoints, make_settings, peer_id
from hypothesis import HealthCheck, given
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
        """Announce peer number ``peer`` from its own address and port."""
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


# Each example has another store.
EXAMPLES = hypothesis_settings(
    max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def swarm(make_store):
    return Swarm(make_store())


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


@pytest.mark.parametrize("wanted", [20, 50])
def test_everybody_meets_everybody(swarm, wanted):
    for peer in range(300):
        swarm.announce(peer)
    met = Counter()
    for _ in range(120_000 // wanted):
        met.update(endpoints(swarm.announce(0, wanted=wanted)[1].endpoints4))
    assert len(met) == 299
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


SIZES = (0, 68, 69, 300, 700)  # of a swarm: one page, a page that gets full, many


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
@EXAMPLES
def test_an_endpoint_belongs_to_one_peer(make_store, seed, crowd):
    """Whatever clients announce from few addresses, with few peer_ids."""
    rnd, swarm = random.Random(seed), Swarm(make_store(f"{seed} {crowd}"))
    for _ in range(700):
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
    _, peers = swarm.store.peers(HASH, NOW)
    was = [each for each, _ in peers if each.peer_id == peer_id(1)]
    if is_taken:
        swarm.announce(1, NOW + 5, event=event, key=key, address=address)
    else:
        with pytest.raises(bitbreeze.TrackerError, match="another key"):
            swarm.announce(1, NOW + 5, event=event, key=key, address=address)
    _, peers = swarm.store.peers(HASH, NOW + 5)
    found = [each for each, _ in peers if each.peer_id == peer_id(1)]
    assert [each.key for each in found] == ([] if key_after is None else [key_after])
    if not is_taken:
        assert found == was
    assert swarm.counts(NOW + 5)[:2] == (0, others + len(found))


def test_limits_have_reasons(make_store):
    swarm = Swarm(make_store(max_peers=3, max_peers_per_address=2))
    swarm.announce(1, address=ipv4(1))
    swarm.announce(2, address=ipv4(1))
    with pytest.raises(bitbreeze.TrackerError, match="your address has 2 peers"):
        swarm.announce(3, address=ipv4(1))
    swarm.announce(4, address=b"\x7f\0\0\1")
    counts, peers = swarm.announce(5)  # it is not kept, but can download
    assert (counts, len(peers.endpoints4)) == ((0, 3, 0, 0), 18)
    assert swarm.announce(1, address=ipv4(1))[0] == (0, 3, 0, 0)


def test_one_address_cannot_fill_a_swarm(make_store):
    swarm = Swarm(make_store(max_peers_per_address=100))
    for peer in range(300):
        swarm.announce(peer)
    assert refused_from_one_48(swarm, range(1000, 1500)) == 400


def refused_from_one_48(swarm, peers):
    """Announce peers from one IPv6 /48; return how many were refused."""
    refused = 0
    for peer in peers:
        try:
            swarm.announce(peer, address=ipv6(1)[:6] + peer.to_bytes(10, "little"))
        except bitbreeze.TrackerError:
            refused += 1
    return refused


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
    _, peers = swarm.store.peers(HASH, NOW)
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


def test_completed_from_strangers_keeps_no_swarm(make_store):
    store = make_store()
    for number in range(300):
        for fields in ({"event": "completed"}, {}, {"event": "completed"}):
            Swarm(store, b"%020d" % number).announce(number, left=0, **fields)
    assert len(list(store.swarms(NOW + TTL + 1))) == 0


def test_records_of_a_swarm_stay_as_they_were(swarm):
    for peer in range(100):
        swarm.announce(peer)
    _, peers = swarm.store.peers(HASH, NOW)
    for peer in range(100):
        swarm.announce(peer, NOW + 5, left=0)
    assert {(record.seen4, is_seeder) for record, is_seeder in peers} == {(NOW, False)}


@pytest.mark.parametrize(
    ("here", "raised", "snatches"), [(0, 3, 3), (3, 3, 3), (3, 2, 3), (3, 5, 5)]
)
def test_the_larger_number_of_snatches_stays(swarm, here, raised, snatches):
    swarm.announce(1)
    for number in (here, raised):
        swarm.store.raise_snatches(HASH, number, NOW)
    assert swarm.counts() == (0, 1, 0, snatches)


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
@EXAMPLES
def test_store_and_model_agree(make_store, seed, crowd, pace):
    """Announce up to ``crowd`` peers at random, up to ``pace`` seconds apart."""
    rnd, model, now = random.Random(seed), Model(), NOW
    swarm = Swarm(make_store(f"{seed} {crowd} {pace}", swarm_ttl=10**9))
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
