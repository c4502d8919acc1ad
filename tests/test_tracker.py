"""The tracker: announce and scrape over a store, through the WSGI door."""

import pytest
from conftest import NOW, endpoints, make_settings, peer_id
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


def test_full_scrape_is_opt_in(tracker):
    refusal = tracker().scrape()[b"failure reason"]
    assert refusal == b"info_hash is missing: this tracker does not list its torrents"
    client = tracker(full_scrape=True)
    client.announce(1)
    client.announce(1, info_hash=OTHER)
    assert set(client.scrape()[b"files"]) == {HASH, OTHER}


@pytest.mark.parametrize(("numwant", "given"), [(3, 3), (-1, 5), (10**12, 5), (9, 8)])
def test_numwant_has_a_default_and_a_most(tracker, numwant, given):
    client = tracker(numwant=5, max_numwant=8)
    for peer in range(20):
        client.announce(peer)
    assert len(endpoints(client.announce(0, numwant=numwant)[b"peers"])) == given


def test_intervals_differ_by_a_tenth(tracker):
    client = tracker(interval=1000, min_interval=100)
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
    tracker = bitbreeze.open_tracker(make_settings(data=str(tmp_path)))

    def announce(swarm, left, event=""):
        announce = bitbreeze.Announce(
            swarm.to_bytes(20, "big"), peer_id(swarm), b"\x0a\0\0\1", 6881, left, event
        )
        tracker.announce(announce, NOW)

    assert tracker.totals(NOW) == (0, 0, 0, 0, 0)
    for swarm in range(999):
        announce(swarm, left=swarm % 2)
    announce(0, left=0, event="completed")
    announce(1, left=0, event="stopped")
    assert tracker.totals(NOW) == (500, 498, 0, 2, 998)
    announce(1000, left=1)
    announce(1001, left=1)
    assert tracker.totals(NOW).swarms == 1000
    announce(1002, left=1)
    assert tracker.totals(NOW).swarms == 1000  # kept, as there are a thousand
    assert tracker.totals(NOW + 1).swarms == 1001


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
@hypothesis_settings(max_examples=2000, deadline=None)
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
            assert status == "200 OK"
            assert headers["Content-Length"] == str(len(body))
            reply = bencoder.bdecode(body)
            assert reply.get(b"failure reason") != b"internal error"
            assert (
                b"failure reason" in reply or b"interval" in reply or b"files" in reply
            )

    data = str(tmp_path_factory.mktemp("any") / "data")
    return Checking(bitbreeze.create_app({"data": data}))
