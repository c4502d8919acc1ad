"""Addresses: whose an announce is, whatever headers say, and who is handed whom."""

import ipaddress

import pytest
from conftest import make_settings
from hypothesis import given
from hypothesis import strategies as st

import app as bitbreeze

PROXY = "10.0.0.1"
LONG = ", ".join(["192.0.2.99"] * 800)  # 10 kB


def packed(text):
    return ipaddress.ip_address(text).packed


def ask(remote="192.0.2.1", headers=None, **settings):
    """Return what client_address makes of a request."""
    environ = {
        "HTTP_" + name.upper().replace("-", "_"): value
        for name, value in (headers or {}).items()
    }
    environ["REMOTE_ADDR"] = remote
    return bitbreeze.client_address(environ, make_settings(**settings))


def ask_behind(proxies, forwarded):
    return ask(PROXY, {"X-Forwarded-For": forwarded}, proxies=proxies)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", packed("192.0.2.1")),
        ("::ffff:192.0.2.1", packed("192.0.2.1")),
        ("2001:db8::1", packed("2001:db8::1")),
        ("fe80::1%eth0", packed("fe80::1")),
    ],
)
def test_addresses_of_connections(text, address):
    assert ask(text) == address
    assert ask(text, {"X-Forwarded-For": "192.0.2.66"}) == address


@pytest.mark.parametrize("remote", ["", "localhost", "unix:", "192.0.2.256"])
def test_a_server_that_knows_no_address(remote):
    with pytest.raises(bitbreeze.TrackerError, match="Operator: .*set proxies = 1"):
        ask(remote)
    forwarded = {"X-Forwarded-For": "192.0.2.7"}
    assert ask(remote, forwarded, proxies=1) == packed("192.0.2.7")


@pytest.mark.parametrize(
    ("forwarded", "proxies", "address"),
    [
        # as many as there should be
        ("192.0.2.1", 1, "192.0.2.1"),
        (" 192.0.2.1\t", 1, "192.0.2.1"),
        ("192.0.2.1, 10.0.0.2", 2, "192.0.2.1"),
        ("192.0.2.1,10.0.0.2,10.0.0.3", 3, "192.0.2.1"),
        # all that a client adds stands further to the left
        ("192.0.2.66, 192.0.2.1", 1, "192.0.2.1"),
        ("192.0.2.66, 192.0.2.1, 10.0.0.2", 2, "192.0.2.1"),
        ("127.0.0.1, 192.0.2.1", 1, "192.0.2.1"),
        ("unknown, 192.0.2.1", 1, "192.0.2.1"),
        ("<script>,'; --, 192.0.2.1", 1, "192.0.2.1"),
        (",,,, 192.0.2.1", 1, "192.0.2.1"),
        ("\xff\x00, 192.0.2.1", 1, "192.0.2.1"),
        (f"{LONG}, 192.0.2.1", 1, "192.0.2.1"),
        # as proxies write it
        ("192.0.2.1:51413", 1, "192.0.2.1"),
        ("2001:db8::1", 1, "2001:db8::1"),
        ("[2001:db8::1]", 1, "2001:db8::1"),
        ("[2001:db8::1]:51413", 1, "2001:db8::1"),
        ('"[2001:db8::1]:51413"', 1, "2001:db8::1"),
        ("fe80::1%eth0", 1, "fe80::1"),
        ("[fe80::1%25]:80", 1, "fe80::1"),
        ("::ffff:192.0.2.1", 1, "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", 1, "192.0.2.1"),
        # fewer entries than proxies
        ("", 1, None),
        (" ", 1, None),
        ("192.0.2.1", 2, None),
        ("192.0.2.1, 10.0.0.2", 3, None),
        # no address where one should be
        ("192.0.2.1,", 1, None),
        ("192.0.2.1, unknown", 1, None),
        ("192.0.2.1, peer.example.org", 1, None),
        ("192.0.2.1, _hidden", 1, None),
        ("192.0.2.1 192.0.2.2", 1, None),
        ("192.0.2.256", 1, None),
        ("192.0.02.1", 1, None),
        ("3221225985", 1, None),
        ("192.0.2.1%eth0", 1, None),
        ("192.0.2.1:", 1, None),
        ("2001:db8::1::", 1, None),
        ("[]", 1, None),
        ("[2001:db8::1", 1, None),
        ("0.0.0.0", 1, None),
        ("255.255.255.255", 1, None),
        ("ff02::1", 1, None),
        ("fe80::1%" + "x" * 10000, 1, None),
        ("9" * 10000, 1, None),
        ("\u0661.2.3.4", 1, None),
    ],
)
def test_forwarded_addresses(forwarded, proxies, address):
    if address:
        assert ask_behind(proxies, forwarded) == packed(address)
        return
    with pytest.raises(bitbreeze.TrackerError, match="Operator: .*proxies") as refusal:
        ask_behind(proxies, forwarded)
    assert len(str(refusal.value)) < 300


@given(st.text(st.characters(max_codepoint=255)), st.integers(1, 3))
def test_any_header_is_an_address_of_a_client_or_refused(forwarded, proxies):
    try:
        assert len(ask_behind(proxies, forwarded)) in (4, 16)
    except bitbreeze.TrackerError as refusal:
        assert "Operator: " in str(refusal)


@given(st.text(st.characters(max_codepoint=255)))
def test_nothing_in_front_of_the_proxies_changes_anything(forged):
    assert ask_behind(1, f"{forged},192.0.2.1") == packed("192.0.2.1")
    assert ask_behind(2, f"{forged},192.0.2.1,10.0.0.2") == packed("192.0.2.1")


NAMED = {
    "proxies": 1,
    "proxy_networks": "unix, 198.51.100.0/24, 2001:db8::/32",
}


@pytest.mark.parametrize(
    ("remote", "header", "address"),
    [
        ("198.51.100.7", "192.0.2.1", "192.0.2.1"),
        ("::ffff:198.51.100.7", "192.0.2.1", "192.0.2.1"),
        ("2001:db8::7", "2001:db8:1::9", "2001:db8:1::9"),
        ("", "192.0.2.1", "192.0.2.1"),
        ("203.0.113.5", "192.0.2.66", "203.0.113.5"),  # it is no proxy of ours
        ("203.0.113.5", None, "203.0.113.5"),
        ("198.51.100.7", None, None),
        ("198.51.100.7", "", None),
        ("198.51.100.7", "192.0.2.66, 192.0.2.1", "192.0.2.1"),
    ],
)
def test_the_header_is_believed_from_proxies_only(remote, header, address):
    headers = {} if header is None else {"X-Forwarded-For": header}
    if address:
        assert ask(remote, headers, **NAMED) == packed(address)
        return
    with pytest.raises(bitbreeze.TrackerError, match="in X-Forwarded-For"):
        ask(remote, headers, **NAMED)


def test_forwarded_addresses_are_believed_from_listed_proxies_only():
    headers = {"X-Forwarded-For": "192.0.2.1"}
    networks = {"proxies": 1, "proxy_networks": "10.0.0.0/8"}
    assert ask("10.1.2.3", headers, **networks) == packed("192.0.2.1")
    assert ask("203.0.113.5", headers, **networks) == packed("203.0.113.5")


# One peer is in the swarm, another asks: under which address does it get the first?
PUBLIC = "198.51.100.1 2001:db8:ff::1"
HANDED = [
    # asker, peer, with public_ip, without
    ("203.0.113.5", "203.0.113.9", "203.0.113.9", "203.0.113.9"),
    ("203.0.113.5", "127.0.0.1", "198.51.100.1", None),
    ("203.0.113.5", "10.1.2.3", "198.51.100.1", None),
    ("203.0.113.5", "172.31.0.1", "198.51.100.1", None),
    ("203.0.113.5", "172.32.0.1", "172.32.0.1", "172.32.0.1"),
    ("203.0.113.5", "192.168.1.2", "198.51.100.1", None),
    ("203.0.113.5", "169.254.1.2", "198.51.100.1", None),
    ("203.0.113.5", "100.64.0.2", "198.51.100.1", None),
    ("203.0.113.5", "100.128.0.2", "100.128.0.2", "100.128.0.2"),
    ("192.168.1.2", "192.168.1.3", "192.168.1.3", "192.168.1.3"),
    ("192.168.1.2", "10.1.2.3", "10.1.2.3", "10.1.2.3"),
    ("192.168.1.2", "127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ("192.168.1.2", "203.0.113.9", "203.0.113.9", "203.0.113.9"),
    ("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "192.168.1.2", "192.168.1.2", "192.168.1.2"),
    ("2001:db8::5", "2001:db8::9", "2001:db8::9", "2001:db8::9"),
    ("2001:db8::5", "::1", "2001:db8:ff::1", None),
    ("2001:db8::5", "fe80::9", "2001:db8:ff::1", None),
    ("2001:db8::5", "fd00:1:2::9", "2001:db8:ff::1", None),
    ("fd00:1:2:3::5", "fd00:1:2:4::9", "fd00:1:2:4::9", "fd00:1:2:4::9"),
    ("fd00:1:2::5", "fd00:1:3::9", "fd00:1:3::9", "fd00:1:3::9"),
    ("::1", "fd00:1:3::9", "fd00:1:3::9", "fd00:1:3::9"),
]


@pytest.mark.parametrize(("asker", "peer", "public", "without"), HANDED)
@pytest.mark.parametrize("is_set", [True, False], ids=["public_ip", "unset"])
def test_who_is_handed_whom(tracker, asker, peer, public, without, is_set):
    client = tracker(public_ip=PUBLIC if is_set else "")
    client.announce(1, address=peer, left=0)
    expected = public if is_set else without
    for compact in (1, 0):
        reply = client.announce(2, address=asker, compact=compact)
        assert reply[b"complete"] == 1
        found = reply[b"peers"]
        if compact and ":" in asker:
            found = reply[b"peers6"]
        if not expected:
            assert not found
        elif compact:
            assert found == packed(expected) + (1001).to_bytes(2, "big")
        else:
            assert [(p[b"ip"], p[b"port"]) for p in found] == [
                (expected.encode(), 1001)
            ]


def test_only_private_addresses_are_replaced(tracker):
    client = tracker(public_ip="198.51.100.1")
    addresses = ["203.0.113.1", "127.0.0.1", "203.0.113.2", "10.1.1.1", "172.15.0.1"]
    for number, address in enumerate(addresses):
        client.announce(number, address=address)
    found = client.announce(9, address="203.0.113.9")[b"peers"]
    addresses[1] = addresses[3] = "198.51.100.1"
    assert {found[at : at + 6] for at in range(0, len(found), 6)} == {
        packed(address) + (1000 + number).to_bytes(2, "big")
        for number, address in enumerate(addresses)
    }


def test_a_replaced_endpoint_stands_once(tracker):
    """Only one of several peers behind an address can have a port of it."""
    client = tracker(public_ip="198.51.100.1")
    for number, address in enumerate(("10.0.0.1", "10.0.0.2", "198.51.100.1")):
        client.announce(number, address=address, port=6881)
    for _ in range(5):
        found = client.announce(9, address="203.0.113.9")[b"peers"]
        assert found == packed("198.51.100.1") + (6881).to_bytes(2, "big")


def test_a_peer_of_both_families_keeps_what_can_be_reached(tracker):
    client = tracker()
    client.announce(1, address="192.168.1.2")
    client.announce(1, address="2001:db8::1")
    client.announce(2, address="203.0.113.5")
    reply = client.announce(2, address="2001:db8::5")
    assert reply[b"peers"] == b""
    assert reply[b"peers6"] == packed("2001:db8::1") + (1001).to_bytes(2, "big")
