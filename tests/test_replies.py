"""Replies: values as bencode, with the names of the wire."""

import bencoder
import pytest
from conftest import make_settings

import app as bitbreeze

SETTINGS = make_settings(interval=1000, min_interval=200, notice="")
V4, V6 = b"\xc0\x00\x02\x01", bytes.fromhex("20010db8") + bytes(11) + b"\1"
GLOBAL = bytes((8, 8, 8, 8))
COUNTS = bitbreeze.Counts(3, 5, 2, 7)
PEERS = bitbreeze.Peers(
    b"a" * 20 + b"b" * 20, V4 + b"\x1a\xe1" + bytes(6), bytes(18) + V6 + b"\0\x50"
)


def announce(address=V4, **fields):
    return bitbreeze.Announce(b"h" * 20, b"p" * 20, address, 6881, **fields)


def reply(announce, peers=bitbreeze.NOBODY, settings=SETTINGS):
    packed = bitbreeze.announce_reply(announce, COUNTS, peers, 1050, settings)
    decoded = bencoder.bdecode(packed)
    assert bencoder.bencode(decoded) == packed  # canonical: sorted keys, nothing behind
    return decoded


def test_every_key_is_there_without_peers():
    assert reply(announce()) == {
        b"complete": 3,
        b"downloaded": 7,
        b"incomplete": 5,
        b"interval": 1050,
        b"min interval": 200,
        b"peers": b"",
    }


def test_compact_leaves_out_who_cannot_be_reached():
    decoded = reply(announce(), PEERS)
    assert decoded[b"peers"] == V4 + b"\x1a\xe1"
    assert decoded[b"peers6"] == V6 + b"\0\x50"


def test_ipv6_always_gets_peers6():
    assert reply(announce(V6))[b"peers6"] == b""


def test_low_ports_are_no_holes():
    column = b"".join(V4 + port.to_bytes(2, "big") for port in (80, 0, 256, 255, 6881))
    found = reply(announce(), bitbreeze.Peers(b"", column, b""))[b"peers"]
    assert [int.from_bytes(found[i + 4 : i + 6], "big") for i in range(0, 24, 6)] == [
        *(80, 256, 255, 6881)
    ]


def test_dictionaries():
    first = {b"peer id": b"a" * 20, b"ip": b"192.0.2.1", b"port": 6881}
    second = {b"peer id": b"b" * 20, b"ip": b"2001:db8::1", b"port": 80}
    assert reply(announce(compact=False), PEERS)[b"peers"] == [first, second]
    short = reply(announce(compact=False, no_peer_id=True), PEERS)[b"peers"]
    assert short == [
        {b"ip": b"192.0.2.1", b"port": 6881},
        {b"ip": b"2001:db8::1", b"port": 80},
    ]


@pytest.mark.parametrize(
    ("address", "told"), [(V4, False), (bytes((10, 0, 0, 1)), False), (GLOBAL, True)]
)
def test_external_ip_only_if_global(address, told):
    assert (reply(announce(address)).get(b"external ip") == address) is told


def test_notice_is_a_warning():
    settings = SETTINGS._replace(notice="Back at 8 – sorry")
    assert (
        reply(announce(GLOBAL), settings=settings)[b"warning message"]
        == "Back at 8 – sorry".encode()
    )


def test_failure_says_when_to_come_back():
    decoded = bencoder.bdecode(bitbreeze.failure_reply("port is wrong", SETTINGS))
    assert decoded == {
        b"failure reason": b"port is wrong",
        b"interval": 1000,
        b"min interval": 200,
        b"retry in": 16,
    }


def test_scrape():
    files = {b"h" * 20: COUNTS, b"i" * 20: bitbreeze.Counts(0, 0, 0, 0)}
    decoded = bencoder.bdecode(bitbreeze.scrape_reply(files, SETTINGS))
    assert decoded[b"flags"] == {b"min_request_interval": 200}
    assert decoded[b"files"] == {
        b"h" * 20: {
            b"complete": 3,
            b"downloaded": 7,
            b"downloaders": 3,
            b"incomplete": 5,
        },
        b"i" * 20: {b"complete": 0, b"downloaded": 0, b"incomplete": 0},
    }
