"""HTTP protocol: queries become values or refusals, and values become bencode."""

import random
from contextlib import suppress
from urllib.parse import quote, urlencode

import bencoder
import pytest
from conftest import make_settings, mutated, peer_id
from hypothesis import given
from hypothesis import strategies as st

import app as bitbreeze

HASH = bytes(range(0x75, 0x89))  # with and without need to be escaped
GOOD = {"info_hash": HASH, "peer_id": peer_id(1), "port": 6881, "left": 1}


def environ(query, address="192.0.2.1"):
    return {"QUERY_STRING": query, "REMOTE_ADDR": address}


def parse(address="192.0.2.1", **changes):
    given = {**GOOD, **changes}
    query = urlencode(
        {n: v for n, v in given.items() if v is not None}, quote_via=quote
    )
    return read(environ(query, address))


def read(environ):
    return bitbreeze.parse_announce(environ, make_settings())


def test_announce_of_libtorrent():
    announce = read(environ(
        "info_hash=%0a%ffabc%26%3d%2b%25%00klmnopqrs-&peer_id=-LT2110-abc%ff%20'!*().~"
        "&port=6881&uploaded=0&downloaded=0&left=16384&corrupt=0&key=0F3A5C77&event=started"
        "&numwant=200&compact=1&no_peer_id=1&supportcrypto=1&redundant=0&ip=10.0.0.1&ipv6=::1"
    ))  # fmt: skip
    assert announce.info_hash == b"\x0a\xffabc&=+%\x00klmnopqrs-"
    assert announce.peer_id == b"-LT2110-abc\xff '!*().~"
    assert announce.address == bytes((192, 0, 2, 1))
    assert announce[3:7] == (6881, 16384, "started", 200)
    assert announce[8:] == (True, True, 0)


@pytest.mark.parametrize(
    ("parameter", "sent", "field", "expected"),
    [
        ("port", "65535", "port", 65535),
        ("port", "0", "port", 0),
        ("port", "", "port", 0),
        ("port", None, "port", 0),
        ("left", "0", "left", 0),
        ("left", "", "left", None),
        ("left", None, "left", None),
        ("left", "-1", "left", None),
        ("left", str(2**63 - 1), "left", 2**63 - 1),
        ("left", str(2**32), "left", 2**32),
        ("event", "started", "event", "started"),
        ("event", "completed", "event", "completed"),
        ("event", "stopped", "event", "stopped"),
        ("event", "paused", "event", "paused"),
        ("event", "empty", "event", ""),
        ("event", "resumed", "event", ""),
        ("event", "", "event", ""),
        ("numwant", "7", "numwant", 7),
        ("numwant", "0", "numwant", 0),
        ("numwant", "-1", "numwant", -1),
        ("numwant", "many", "numwant", -1),
        ("numwant", "", "numwant", -1),
        ("numwant", str(2**63), "numwant", -1),
        ("compact", "0", "compact", False),
        ("compact", "1", "compact", True),
        ("compact", "", "compact", True),
        ("no_peer_id", "1", "no_peer_id", True),
        ("no_peer_id", "0", "no_peer_id", False),
    ],
)
def test_parameters(parameter, sent, field, expected):
    assert getattr(parse(**{parameter: sent}), field) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"info_hash": None},
            "info_hash is missing: this URL is for BitTorrent clients",
        ),
        ({"info_hash": b"x" * 19}, "info_hash must be 20 bytes, not 19"),
        (
            {"info_hash": b"a" * 40},
            "info_hash must be 20 bytes, not 40: is it hex?",
        ),
        (
            {"info_hash": b"A" * 32},
            "info_hash must be 20 bytes, not 32: is it base32?",
        ),
        (
            {"peer_id": None},
            "peer_id is missing: this URL is for BitTorrent clients",
        ),
        ({"peer_id": b"x" * 21}, "peer_id must be 20 bytes, not 21"),
        ({"port": "68.81"}, "port must be a whole number from 0 to 65535"),
        ({"port": "65536"}, "port must be a whole number from 0 to 65535"),
        ({"port": "-1"}, "port must be a whole number from 0 to 65535"),
        ({"port": "9" * 5000}, "port must be a whole number from 0 to 65535"),
        ({"left": "all"}, "left must be a whole number of bytes"),
        ({"left": "9" * 5000}, "left must be a whole number of bytes"),
    ],
)
def test_refusals_name_the_parameter(changes, reason):
    with pytest.raises(bitbreeze.TrackerError) as refusal:
        parse(**changes)
    assert str(refusal.value) == reason


@pytest.mark.parametrize(
    "change",
    [
        ("info_hash=", "info%5Fhash="),
        ("peer_id=", "peer%5fid="),
        ("port=6881", "port=%36881"),
        ("port=6881", "p%6Frt=%368%381"),
        ("left=7", "left=%37"),
        ("event=completed", "event=%63ompleted"),
        ("numwant=5", "numwant=%35"),
        ("compact=0", "compact=%30"),
        ("no_peer_id=1", "no%5Fpeer%5Fid=1"),
        ("key=1234", "%6Bey=1234"),
    ],
)
def test_names_and_numbers_may_be_escaped(change):
    query = (
        "info_hash=%25%41aaaaaaaaaaaaaaaaaa&peer_id=-TR4040-aaaaaaaaaaa%37&port=6881"
    )
    query += "&left=7&event=completed&numwant=5&compact=0&no_peer_id=1&key=1234"
    announce = read(environ(query))
    assert announce.info_hash == b"%A" + b"a" * 18 and announce.peer_id[-1:] == b"7"
    assert announce[3:7] == (6881, 7, "completed", 5)
    assert announce[8:] == (False, True, None)
    assert read(environ(query.replace(*change))) == announce


def test_bad_hashes_of_a_scrape_are_left_out():
    good = ["a" * 20, "%ff" * 20]
    query = "&".join(f"info_hash={each}" for each in (good[0], "x", "", good[1], "%"))
    assert bitbreeze.parse_scrape(environ(query)) == [b"a" * 20, b"\xff" * 20]
    assert bitbreeze.parse_scrape(environ("info%5Fhash=" + good[0])) == [b"a" * 20]
    for query in ("info_hash=x", "info_hash=x&info_hash=y", "info_hash="):
        with pytest.raises(bitbreeze.TrackerError, match="info_hash"):
            bitbreeze.parse_scrape(environ(query))


def test_info_hash_twice_is_refused():
    query = urlencode({**GOOD, "event": ""}) + "&info_hash=" + quote(b"y" * 20)
    with pytest.raises(bitbreeze.TrackerError, match="twice"):
        read(environ(query))


def test_whole_v2_hash_is_truncated():
    assert parse(info_hash=bytes(range(200, 232))).info_hash == bytes(range(200, 220))


def test_key_tells_clients_apart():
    keys = [parse(key=key).key for key in (None, "0F3A5C77", "-123", b"\xff" * 8)]
    assert keys[0] == 0
    assert len(set(keys)) == 4


@given(
    st.binary(min_size=20, max_size=20), st.sampled_from(["%02x", "%02X"]), st.data()
)
def test_any_hash_survives_any_escaping(info_hash, form, data):
    def written(byte):
        must = byte in b"%&+# =" or byte < 33 or byte == 127
        if must or data.draw(st.booleans()):
            return "%" + form % byte if byte != 32 or data.draw(st.booleans()) else "+"
        return chr(byte)  # raw, as WSGI hands it on

    query = "info_hash=" + "".join(map(written, info_hash)) + "&peer_id=" + "p" * 20
    assert read(environ(query)).info_hash == info_hash


def test_scrape_takes_many_hashes():
    hashes = [bytes((i,)) * 20 for i in range(70)]
    query = "&".join("info_hash=" + quote(info_hash) for info_hash in hashes)
    assert bitbreeze.parse_scrape(environ(query)) == hashes
    assert bitbreeze.parse_scrape(environ("")) == []


PARAMETERS = "info_hash peer_id port left event numwant key compact no_peer_id".split()
TEXT = st.text(st.characters(max_codepoint=255), max_size=50)
NUMBER = st.integers(-(2**70), 2**70).map(str) | st.sampled_from(
    "0 1 +5 ٣ ² 1e9 -".split()
)
BYTES = st.binary(max_size=40) | st.binary(min_size=20, max_size=20)
VALUE = TEXT | NUMBER | BYTES.map(quote) | st.sampled_from(["stopped", "%", "%f", "+"])
PARAMETER = st.tuples(st.sampled_from([*PARAMETERS, "ip", ""]) | TEXT, VALUE)
QUERY = st.lists(PARAMETER.map("=".join), max_size=8).map("&".join)
GOOD_QUERY = urlencode(GOOD, quote_via=quote)
ADDRESS = st.ip_addresses().map(str) | st.sampled_from(
    ["", "unix:", "[::1]:5", "1.2.3.4:5", "fe80::1%eth0", "::ffff:1.2.3.4", "0.0.0.0"]
)
REQUEST = st.fixed_dictionaries(
    {"QUERY_STRING": QUERY | TEXT | QUERY.map(f"{GOOD_QUERY}&".__add__)},
    optional={
        "REMOTE_ADDR": ADDRESS | TEXT,
        "HTTP_X_FORWARDED_FOR": TEXT | st.lists(ADDRESS | TEXT).map(",".join),
        "HTTP_X_REAL_IP": ADDRESS | TEXT,
    },
)
ALL_SETTINGS = [
    make_settings(),
    make_settings(proxies=1),
    make_settings(proxies=3, proxy_networks="10.0.0.0/8, unix, ::/1"),
    make_settings(proxies=2, proxy_networks="0.0.0.0/1"),
]


def test_any_request_is_a_value_or_a_refusal(fuzz):
    def check(request):
        for settings in ALL_SETTINGS:
            with suppress(bitbreeze.TrackerError):
                check_announce(bitbreeze.parse_announce(request, settings))
        with suppress(bitbreeze.TrackerError):
            assert {len(i) for i in bitbreeze.parse_scrape(request)} <= {20}

    fuzz(2000, REQUEST, check)


def test_any_accident_to_a_request_leaves_a_value_or_a_refusal(cases):
    rnd, settings, raw = random, make_settings(), GOOD_QUERY.encode()
    raw += b"&uploaded=0&key=0F3A&event=started&numwant=50&compact=1&no_peer_id=1"
    for _ in range(cases(8000)):
        request = environ(mutated(rnd, raw).decode("latin-1"))
        with suppress(bitbreeze.TrackerError):
            check_announce(bitbreeze.parse_announce(request, settings))
        with suppress(bitbreeze.TrackerError):
            bitbreeze.parse_scrape(request)


def check_announce(announce):
    """Fail if there is anything in an Announce that nobody could work with."""
    assert len(announce.info_hash) == len(announce.peer_id) == 20
    assert len(announce.address) in (4, 16)
    assert 0 <= announce.port < 2**16 and 0 <= announce.key < 2**32
    assert announce.left is None or announce.left >= 0
    assert announce.event in ("", "started", "completed", "stopped", "paused")
    assert announce.numwant >= -1


# -- Replies

SETTINGS = make_settings(interval=1000, min_interval=200, notice="")
V4, V6 = b"\xc0\x00\x02\x01", bytes.fromhex("20010db8") + bytes(11) + b"\1"
GLOBAL = bytes((8, 8, 8, 8))
COUNTS = bitbreeze.Counts(3, 5, 2, 7)
PEERS = bitbreeze.Peers(
    b"a" * 20 + b"b" * 20, V4 + b"\x1a\xe1" + bytes(6), bytes(18) + V6 + b"\0\x50"
)


def announce(address=V4, **fields):
    return bitbreeze.Announce(b"h" * 20, b"p" * 20, address, 6881, **fields)


def reply(announce, peers=bitbreeze.NO_PEERS, settings=SETTINGS):
    packed = bitbreeze.announce_reply(announce, (COUNTS, peers, 1050), settings)
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


@pytest.mark.parametrize(
    ("min_interval", "interval"), [(60, 60), (300, 300), (900, 300)]
)
@pytest.mark.parametrize("kind", ["unregistered", "reading", "full"])
def test_a_refusal_that_may_soon_be_over_has_short_intervals(
    kind, min_interval, interval
):
    settings = make_settings(min_interval=min_interval)
    decoded = bencoder.bdecode(bitbreeze.failure_reply("no", settings, kind))
    assert decoded[b"interval"] == decoded[b"min interval"] == interval
    assert decoded[b"retry in"] == interval // 60


def test_scrape():
    files = {b"h" * 20: COUNTS, b"i" * 20: bitbreeze.Counts(0, 0, 0, 0)}
    decoded = bencoder.bdecode(bitbreeze.scrape_reply([], files, SETTINGS))
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
