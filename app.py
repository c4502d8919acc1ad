#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["Flask>=3.0", "bencoder.pyx>=3.0", "gunicorn[gevent]>=25.1"]
# ///
"""BitBreeze: a BitTorrent tracker in one file, for any host that runs Python.

Clients announce the torrents that they share, and the tracker tells them about each
other. The peers are kept in small locked files that all worker processes share, so
there is no database and nothing to set up. Every announce follows this path:

    HTTP: environ -> parse_announce -> Tracker.announce -> announce_reply -> bytes
    UDP:  packet  -> parse_packet_announce |        ^  packet_announce_reply
                        Catalogue.check <--+        +--> FileStore.announce
                        may it be tracked?               one lock, one file: Swarm, Page

TrackerApp and UdpServer drive it through Tracker.answer. Parsing and replying are pure
functions, and ``now`` is an argument. Only the edges (WSGI entry point, UDP, Pages and
feeds, Doctor, Application and commands) ask for the time or use a socket. The sections,
in reading order:

    Settings                  every setting and its default; where values come from
    Types                     what the sections pass to each other
    Client addresses          which address is trusted; who gets private addresses
    HTTP protocol             from a raw query to an Announce, from a reply to bytes
    Tracker                   announce and scrape, over any transport
    WSGI entry point          answers announces and scrapes ahead of Flask; CGI
    UDP                       announces and scrapes in packets
    Catalogue                 which torrents are tracked, and for whom: the lists
    Torrent files             what a .torrent file says
    Statistics                counters that all processes share
    File store                the contract of a store; peers in locked files
    Redis store               the same contract over Redis or Valkey
    Templates                 style sheet and pages
    Pages and feeds           list, torrent, publishing, RSS, JSON, metrics
    Doctor                    what may be wrong with this host, and what to set
    Application and commands  create_app; python app.py and its commands

Where new things go: a new event or parameter of clients in HTTP protocol, its effect in
File store (``is_seeder``, ``updated``). A new list in Catalogue (``LISTS``, ``_use``).
A new page in Pages and feeds, with its template. A new setting in Settings and in
README's table.
"""

import atexit
import configparser
import errno
import fcntl
import gc
import hmac
import ipaddress
import json
import logging
import mmap
import os
import re
import resource
import socket
import stat
import struct
import sys
import time
import zlib
from binascii import a2b_qp, b2a_base64
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from datetime import date
from difflib import get_close_matches
from functools import lru_cache
from hashlib import blake2b, sha1, sha256
from importlib.util import find_spec
from itertools import chain, islice, zip_longest
from operator import add, attrgetter, or_
from pathlib import Path
from random import random
from threading import Lock, Thread
from typing import NamedTuple
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit
from weakref import WeakSet

HERE = Path(__file__).resolve().parent
__version__ = "1.0"

try:
    import bencoder
except ImportError:
    bencoder = None
# PyPI's package "bencoder" has the same module, but no bencode().
if not hasattr(bencoder, "bencode") or not find_spec("flask"):
    install = f"{sys.executable} -m pip install -r {HERE}/requirements.txt"
    problem = f"Flask or bencoder.pyx is not installed. Run: {install}"
    if __name__ == "__main__":
        sys.exit(f"app.py: {problem}")
    raise ImportError(problem)

log = logging.getLogger("bitbreeze")


# -- Settings -------------------------------------------------------------------------


class SettingsError(ValueError):
    """A setting is unknown or has a bad value. The text is for the operator."""


class Settings(NamedTuple):
    """Every setting with its default. README's table has the same words."""

    title: str = "BitBreeze"  # name of the tracker on its pages
    url: str = ""  # address of the site in all links; if empty, that of each request
    notice: str = ""  # a sentence that clients show to their users
    data: str = "data"  # folder for peers and statistics, relative to app.py
    store: str = "files"  # or the URL of Redis: redis://HOST:6379/0, rediss://, unix://
    torrents: str = "torrents"  # folder of .torrent files to track and list
    track: str = "auto"  # any, listed, or auto: listed once there is a list
    private: bool = False  # only for the members in keys.txt
    interval: int = 1800  # seconds between announces, give or take ten percent
    small_interval: int = 900  # the same in swarms of fewer peers than numwant
    min_interval: int = 300  # seconds between announces at least; a sixth of interval
    peer_ttl: int = 4200  # seconds that a silent peer is kept; 7/3 of interval
    swarm_ttl: int = 7776000  # seconds that the snatches of an empty swarm are kept
    numwant: int = 50  # peers in a reply if the client does not ask for a number
    max_numwant: int = 100  # peers in a reply at most
    max_swarms: int = 100000  # swarms with peers at most; 0 is no limit, here and below
    max_peers: int = 200000  # peers kept in one swarm at most
    max_peers_per_address: int = 100  # peers of an address or an IPv6 /48 in one swarm
    operator_key: str = ""  # opens /doctor?key=... and /swarm/INFO_HASH.json?key=...
    udp_port: int = 0  # UDP port that pages show, or 0; "python app.py" sets it
    verbose: bool = False  # print a line for each announce and scrape
    dev: bool = False  # /swarm/INFO_HASH.json needs no key, as with --dev
    proxies: int = 0  # number of proxies in front that append to X-Forwarded-For
    proxy_networks: list = []  # networks of proxies, such as 10.0.0.0/8, or unix
    public_ip: dict = {}  # public IPv4 and IPv6 address of the tracker's network


def load_settings(overrides=None, environ=os.environ, ini=HERE / "wsgi.ini"):
    """Return the Settings; raise SettingsError with one sentence for a bad one.

    Later sources win: the defaults, section [tracker] of ``ini``, TRACKER_NAME in
    ``environ``, and the dictionary ``overrides``.
    """
    # 1. Read the file. uWSGI reads it too, and allows the same key twice in a section.
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        with suppress(FileNotFoundError), open(ini, encoding="utf-8") as file:
            parser.read_file(file)
        in_file = dict(parser["tracker"]) if parser.sections() else {}
    except (configparser.MissingSectionHeaderError, KeyError):
        problem = f"{ini} has no line [tracker]. Add it above the settings"
        raise SettingsError(problem) from None
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"{ini} cannot be read: {reason}") from None
    in_environ = {n[8:].lower(): environ[n] for n in environ if n[:8] == "TRACKER_"}
    # 2. Parse each value.
    values = {}
    sources = {f"[tracker] in {ini}": in_file, "the environment": in_environ}
    sources["create_app"] = overrides or {}
    for source, given in sources.items():
        for name, value in given.items():
            if name not in Settings._fields:
                near = get_close_matches(name, Settings._fields, 1) or Settings._fields
                advice = f"Did you mean {' or '.join(near)}?"
                raise SettingsError(f"{source} sets {name!r}. {advice}")
            try:
                values[name] = parse_setting(name, value)
            except ValueError as error:
                message = f"{source} sets {name} to {value!r}: {error}"
                raise SettingsError(message) from None
    # 3. Check the values that must fit each other. Two follow from the interval.
    interval = values.get("interval", Settings().interval)
    follow = {"min_interval": max(1, interval // 6), "peer_ttl": interval * 7 // 3}
    settings = Settings(**{**follow, **values})
    check_settings(settings)
    return settings


def parse_setting(name, value):
    """Return the value of a setting, given as text or as a value; raise ValueError."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    kind, is_text = type(Settings._field_defaults[name]), isinstance(value, str)
    text = value.strip() if is_text else ""
    words = text.replace(",", " ").split()
    text.encode()  # raises UnicodeEncodeError if it was not UTF-8 in the environment
    if kind is bool:
        value = configparser.ConfigParser.BOOLEAN_STATES.get(text.lower(), value)
        is_right, expected = type(value) is bool, "yes or no"
    elif kind is int:
        value = int(text) if text.isdecimal() and len(text) < 20 else value
        is_right = type(value) is int and value >= 0
        expected = "a whole number, 0 or more"
    elif not is_text:
        is_right, expected = False, "text"
    elif name == "track":
        value, expected = text.lower(), "any, listed or auto"
        is_right = value in ("any", "listed", "auto")
    elif name == "store":
        value, expected = text, "files, or a URL such as redis://HOST:6379/0"
        is_right = re.fullmatch(r"files|(redis|rediss|unix)://\S+", text)
    elif name == "url":
        value = text.rstrip("/")
        expected = "a URL such as https://tracker.example.org, in ASCII"
        is_right = re.fullmatch(r"(https?://[!$-&()+-;=@-~]+)?", value)
    elif name == "proxy_networks":
        value = [w if w == "unix" else ipaddress.ip_network(w) for w in words]
        is_right, expected = True, "networks"
    elif name == "public_ip":
        addresses = [ipaddress.ip_address(word).packed for word in words]
        value = {len(address): address for address in addresses}  # by 4 or 16 bytes
        is_right = len(value) == len(addresses) and not any(map(is_private, addresses))
        expected = "one public IPv4 address, one public IPv6 address, or both"
    else:
        value, is_right, expected = text, True, "text"
    if not is_right:
        raise ValueError(f"it must be {expected}")
    return value


def check_settings(settings):
    """Raise SettingsError if settings do not fit each other."""
    s = settings
    # Tracker.announce varies the interval by a tenth.
    shortest, longest = max(1, s.interval * 9 // 10), s.interval * 11 // 10
    low = f"at most {shortest} seconds, nine tenths of interval"
    high = f"more than {longest} seconds, eleven tenths of interval"
    for is_right, sentence in (
        (s.interval > 0, "interval must be at least 1 second"),
        (s.min_interval > 0, "min_interval must be at least 1 second"),
        (s.min_interval <= shortest, f"min_interval must be {low}"),
        (s.peer_ttl > longest, f"peer_ttl must be {high}"),
        (s.numwant <= s.max_numwant, f"numwant must be at most {s.max_numwant}"),
    ):
        if not is_right:
            raise SettingsError(sentence)


# -- Types ----------------------------------------------------------------------------

# The reasons for a refusal, as /metrics counts them.
FAILURES = "request address unregistered reading full key member ban".split()
FAILURES += ["internal", "store"]
NEEDS_KEY = "this tracker needs a key: use the announce URL from your own page"


class TrackerError(Exception):
    """A request is refused. The text says what the client's user can do.

    Any other exception is a fault of the tracker: it is logged, and the client reads
    "internal error". ``kind`` is one of FAILURES.
    """

    def __init__(self, reason, *, kind="request"):
        super().__init__(reason)
        self.kind = kind


class Announce(NamedTuple):
    """What a client reports about itself in one swarm."""

    info_hash: bytes  # 20 bytes
    peer_id: bytes  # 20 bytes
    address: bytes  # 4 or 16 bytes, of the connection
    port: int  # 0 to 65535; nothing can connect to 0 and 1
    left: int | None = None  # bytes still to download: 0 for a seeder, None if unknown
    event: str = ""  # "", started, completed, stopped or paused
    numwant: int = -1  # peers wanted, -1 for the tracker's default
    key: int = 0  # checksum of the client's key (BEP 7), 0 for none
    compact: bool = True
    no_peer_id: bool = False
    downloaded: int | None = None  # bytes since the client started, None if unknown


class Exchange(NamedTuple):
    """How a kind of request is parsed, and its reply written."""

    transport: str  # http or udp
    kind: str  # announce or scrape
    parse: Callable  # (raw request, settings): an Announce, or info_hashes
    reply: Callable  # (these, what Tracker returned for these, settings): bytes


class Counts(NamedTuple):
    """The size of a swarm. Partial seeds are among the leechers (BEP 21)."""

    seeders: int
    leechers: int
    partial_seeds: int
    snatches: int  # completed downloads since the swarm is known


class Peers(NamedTuple):
    """Peers as three columns in the same order.

    An endpoint is an address and a port in network order. Its port is zero if the peer
    cannot be reached over that address family. A whole column is empty if the peer that
    asks cannot use that family.
    """

    ids: bytes  # 20 bytes for each peer
    endpoints4: bytes  # 6 bytes for each peer
    endpoints6: bytes  # 18 bytes for each peer


# -- Client addresses -----------------------------------------------------------------
# A wrong address is what breaks most trackers: the swarm looks well, but its peers
# cannot connect to each other. So an announce from an uncertain address is refused.


def client_address(environ, settings):
    """Return the address of a client, 4 or 16 bytes.

    The tracker trusts a header only if the settings name the proxies that send it. In
    X-Forwarded-For, clients can forge everything to the left of the proxies' entries.
    Raise TrackerError if the address cannot be known.
    """
    remote, trusted = environ.get("REMOTE_ADDR", ""), settings.proxy_networks
    try:
        address = parse_address(remote)
        is_proxy = trusted and is_in(address, [n for n in trusted if n != "unix"])
    except ValueError:  # servers on a Unix socket know no address
        address, is_proxy = b"", "unix" in trusted
    if settings.proxies and (is_proxy or not trusted):
        return forwarded_address(environ, settings)
    if not address:
        advice = "let the proxy in front send X-Forwarded-For, and set proxies = 1"
        raise hidden_address(f"only {remote!r}", advice)
    return address


def hidden_address(found, advice):
    """Return the TrackerError for a client whose address is not certain."""
    reason = f"this tracker cannot see your address, {found}. Operator: {advice}"
    return TrackerError(reason, kind="address")


@lru_cache(maxsize=10000)
def parse_address(text):
    """Return an address as 4 or 16 bytes; raise ValueError."""
    if len(text) > 64:  # an IPv6 zone may have any length
        raise ValueError("too long for an address")
    address = ipaddress.ip_address(text)
    # Some servers write IPv4 addresses mapped to IPv6. Clients drop mapped addresses.
    return (getattr(address, "ipv4_mapped", None) or address).packed


def is_in(address, networks):
    """Return True if an address, 4 or 16 bytes, is in one of the networks."""
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in networks)


def forwarded_address(environ, settings):
    """Return the address that our proxies send; raise TrackerError."""
    value, proxies = environ.get("HTTP_X_FORWARDED_FOR", ""), settings.proxies
    # Each proxy appends the address that it saw.
    entries = value.rsplit(",", proxies) if value.strip() else []
    if len(entries) < proxies:
        found = f"only {len(entries)} of {proxies} entries in X-Forwarded-For"
        advice = "set proxies to the number of proxies that append to it"
        raise hidden_address(found, advice)
    value = entries[-proxies]
    text = value.strip(' \t"')
    with_port = re.fullmatch(r"\[(.+)\](?::\d+)?|([\d.]+):\d+", text)
    with suppress(ValueError):
        address = parse_address(with_port[1] or with_port[2] if with_port else text)
        is_multicast = address[0] >= (224 if len(address) == 4 else 255)
        if any(address) and not is_multicast:
            return address
    found = f"but {value[:60]!r} in X-Forwarded-For"
    raise hidden_address(found, "check what the proxy sends, and the setting proxies")


_NETWORKS = (
    "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 169.254.0.0/16 100.64.0.0/10 127.0.0.0/8"
    " ::1/128 fc00::/7 fe80::/10"
)
_PRIVATE = [*map(ipaddress.ip_network, _NETWORKS.split())]
# How private endpoints begin: the first two bytes of IPv4, as a native-endian integer,
# and one byte of IPv6. This check takes 1 µs for a reply of 50 peers, is_private 7 µs.
_PRIVATE_STARTS4 = {
    int.from_bytes(start.to_bytes(2, "big"), sys.byteorder)
    for network in _PRIVATE
    if network.version == 4
    for start in range(int(network[0]) >> 16, (int(network[-1]) >> 16) + 1)
}
_PRIVATE_STARTS6 = {0, 0xFC, 0xFD, 0xFE}


@lru_cache(maxsize=10000)
def is_private(address):
    """Return True for an address, 4 or 16 bytes, of a private network or loopback."""
    return is_in(address, _PRIVATE)


def visible_peers(peers, address, public_ip):
    """Return Peers with the endpoints that a peer at ``address`` can use.

    The tracker sends private addresses only to peers with private addresses. Other
    peers get the address of the same length in ``public_ip`` instead, or none.
    """
    if is_private(address):
        return peers
    ids, ends4, ends6 = peers
    if not _PRIVATE_STARTS4.isdisjoint(memoryview(ends4).cast("H")[::3]):
        ends4 = public_endpoints(ends4, 6, public_ip.get(4))
    if not _PRIVATE_STARTS6.isdisjoint(ends6[::18]):
        ends6 = public_endpoints(ends6, 18, public_ip.get(16))
    return Peers(ids, ends4, ends6)


def public_endpoints(column, width, public):
    """Return a column of endpoints with private addresses replaced, or zeros."""
    endpoints = []
    for endpoint in chunks(column, width):
        if is_private(endpoint[:-2]):
            endpoint = public + endpoint[-2:] if public else bytes(width)
        # Two peers behind the public address may have the same port.
        endpoints.append(endpoint if endpoint not in endpoints else bytes(width))
    return b"".join(endpoints)


def chunks(column, width):
    """Return the items of a column, ``width`` bytes each."""
    return [bytes(column[at : at + width]) for at in range(0, len(column), width)]


def format_ip(address):
    """Return an address of 4 or 16 bytes as text."""
    return str(ipaddress.ip_address(address))


# -- HTTP protocol --------------------------------------------------------------------
# Only this section knows the protocol's parameter names and reply keys. It cannot use
# Flask's request.args, which decodes to text: there %FF and the byte FF are the same.

_BINARY = "info_hash", "peer_id", "key"


def parse_announce(environ, settings):
    """Return the Announce in a WSGI environ; raise TrackerError for a bad one (BEP 3).

    Addresses in the query (ip, ipv4, ipv6) are ignored, because a client could aim a
    swarm at somebody else with them (BEP 7 discourages them for that reason).
    """
    query = environ.get("QUERY_STRING", "")
    if query.count("info_hash=") > 1 and len(parse_scrape(environ)) > 1:
        raise TrackerError("info_hash was sent twice: announce one torrent at a time")
    values = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if "%" in part and name not in _BINARY:  # few clients escape more than these
            name = unquote(name)
            value = value if name in _BINARY else unquote(value)
        values[name] = value
    given = values.get
    info_hash = parse_info_hash(given("info_hash", ""))
    if not (peer_id := parse_bytes(given("peer_id", ""))):
        raise TrackerError("peer_id is missing: this URL is for BitTorrent clients")
    if len(peer_id) != 20:
        raise TrackerError(f"peer_id must be 20 bytes, not {len(peer_id)}")
    address = client_address(environ, settings)
    port, left, done = given("port", ""), given("left", ""), given("downloaded", "")
    if port and not (port.isdecimal() and len(port) < 9 and int(port) < 65536):
        raise TrackerError("port must be a whole number from 0 to 65535")
    is_known = left.isdecimal() and len(left) < 40
    if left and not is_known and not left.startswith("-"):
        raise TrackerError("left must be a whole number of bytes")
    event, numwant = given("event", ""), given("numwant", "")
    return Announce(
        info_hash,
        peer_id,
        address,
        int(port or 0),  # aria2 sends no port if it has none
        # webtorrent sends it empty for a magnet link, or not at all.
        int(left) if is_known else None,
        # An unknown event counts as none, so that new clients are not shut out.
        event if event in ("started", "completed", "stopped", "paused") else "",
        int(numwant) if numwant.isdecimal() and len(numwant) < 10 else -1,
        # Clients send hexadecimal, decimal or any bytes (aria2). A checksum is enough
        # to tell two clients apart.
        zlib.crc32(given("key", "").encode("latin-1", "replace")),
        given("compact") != "0",  # BEP 23: compact unless the client refuses it
        given("no_peer_id") == "1",
        int(done) if done.isdecimal() and len(done) < 20 else None,
    )


def key_path(path, query):
    """Return a path, with the key of ?passkey=KEY as one more part."""
    _, has_passkey, rest = query.partition("passkey=")
    return f"{path}/{rest.partition('&')[0]}" if has_passkey else path


def parse_scrape(environ, settings=None):
    """Return the info_hashes, 20 bytes each, of a scrape; [] means all (BEP 48).

    Of several, the bad ones are left out. Raise TrackerError if all are bad.
    """
    hashes, refusal = [], None
    for part in environ.get("QUERY_STRING", "").split("&"):
        name, _, value = part.partition("=")
        if name == "info_hash" or "%" in name and unquote(name) == "info_hash":
            try:
                hashes.append(parse_info_hash(value))
            except TrackerError as error:
                refusal = error
    if refusal and not hashes:
        raise refusal
    return hashes


@lru_cache(maxsize=2000)
def parse_info_hash(text):
    """Return the 20 bytes of an info_hash in a query; raise TrackerError."""
    if not text:
        raise TrackerError("info_hash is missing: this URL is for BitTorrent clients")
    value = parse_bytes(text)
    # Of a full v2 hash, trackers use the first 20 bytes (BEP 52).
    if len(value) == 20 or len(value) == 32 and not value.isalnum():
        return value[:20]
    hint = {40: ": is it hex?", 32: ": is it base32?"}.get(len(value), "")
    raise TrackerError(f"info_hash must be 20 bytes, not {len(value)}{hint}")


def parse_bytes(text):
    """Return the bytes of a percent-encoded value; + is a space, as in HTML forms."""
    raw = text.replace("+", " ").encode("latin-1", "replace")
    # Percent-encoding is quoted-printable with another sign. That is decoded in C.
    return a2b_qp(raw.replace(b"=", b"=3D").replace(b"%", b"=")) if b"%" in raw else raw


# A format instead of a bencoded dictionary saves 3 of 50 µs of an announce.
_REPLY = (
    b"d8:completei%de10:downloadedi%de%b10:incompletei%de"
    b"8:intervali%de12:min intervali%de5:peers%b%b%be"
)


def announce_reply(announce, answer, settings):
    """Return the bencoded reply to an announce (BEP 3, 7, 23, 24)."""
    counts, peers, interval = answer
    encode = bencoder.bencode
    peers6 = warning = b""
    if announce.compact:
        peers4 = encode(with_ports(peers.endpoints4, 6))  # rTorrent needs this key
        if peers.endpoints6 or len(announce.address) == 16:
            peers6 = b"6:peers6" + encode(with_ports(peers.endpoints6, 18))
    else:
        peers4 = encode([*peer_dictionaries(peers, announce.no_peer_id)])
    if settings.notice:
        warning = b"15:warning message" + encode(settings.notice.encode())
    numbers = counts.leechers, interval, settings.min_interval
    start = counts.seeders, counts.snatches, external_ip(announce.address)
    return _REPLY % (*start, *numbers, peers4, peers6, warning)


def scrape_reply(info_hashes, files, settings):
    """Return the bencoded reply to a scrape (BEP 48, 21) from Counts by info_hash."""
    scraped = {}
    for info_hash, counts in files.items():
        numbers = scraped[info_hash] = {
            b"complete": counts.seeders,
            b"downloaded": counts.snatches,
            b"incomplete": counts.leechers,
        }
        if counts.partial_seeds:
            numbers[b"downloaders"] = counts.leechers - counts.partial_seeds
    flags = {b"min_request_interval": settings.min_interval}
    return bencoder.bencode({b"files": scraped, b"flags": flags})


def failure_reply(reason, settings, kind="request"):
    """Return a bencoded refusal (BEP 31); ``kind`` is that of the TrackerError.

    No client is known to read ``retry in`` (minutes). libtorrent, Transmission and
    rTorrent wait for the intervals. They are short if the next announce may succeed: a
    first seeder often announces before its torrent is in the list.
    """
    interval = settings.interval
    if kind in ("unregistered", "reading", "full"):
        interval = min(settings.min_interval, 300)
    return bencoder.bencode({
        b"failure reason": reason.encode(),
        b"interval": interval,
        b"min interval": min(settings.min_interval, interval),
        b"retry in": max(1, interval // 60),
    })  # fmt: skip


def with_ports(column, width):
    """Return a column of endpoints without those whose port is zero."""
    if 0 not in column[width - 2 :: width]:  # then no port is below 256
        return column
    return b"".join(each for each in chunks(column, width) if each[-2:] != b"\0\0")


def peer_dictionaries(peers, no_peer_id):
    """Yield Peers as dictionaries, two for a peer with two endpoints (BEP 7)."""
    ids = chunks(peers.ids, 20)
    for column, width in ((peers.endpoints4, 6), (peers.endpoints6, 18)):
        for peer_id, endpoint in zip(ids, chunks(column, width), strict=False):
            if port := int.from_bytes(endpoint[-2:], "big"):
                ip = format_ip(endpoint[:-2]).encode()
                named = {} if no_peer_id else {b"peer id": peer_id}
                yield {b"ip": ip, b"port": port, **named}


@lru_cache(maxsize=10000)
def external_ip(address):
    """Return the part of a reply with the client's address, if global (BEP 24)."""
    is_global = ipaddress.ip_address(address).is_global
    return b"11:external ip" + bencoder.bencode(address) if is_global else b""


HTTP = {
    "announce": Exchange("http", "announce", parse_announce, announce_reply),
    "scrape": Exchange("http", "scrape", parse_scrape, scrape_reply),
}


# -- Tracker --------------------------------------------------------------------------

DISK_FAILS = "this tracker cannot read or write its data: try again later"


class Tracker:
    """Announce and scrape. It knows nothing of HTTP or sockets."""

    def __init__(self, settings):
        data, torrents = HERE / settings.data, HERE / settings.torrents
        self.settings, self.store = settings, FileStore(data, settings)
        if settings.store != "files":
            self.store = RedisStore(settings.store, data, settings)
        self.catalogue = Catalogue(torrents, data / "torrents.json", settings.track)
        self.stats = Stats(data / "stats.json")
        self._small = min(settings.small_interval, settings.interval)
        self._maintained = -10  # the second of the last maintenance
        self._snapshot = 0, 0, None  # valid from this second to that
        self._lock = Lock()  # of the snapshot
        self._logged = {}  # seconds, by kind of fault

    def answer(self, exchange, raw, url, source, now):
        """Return the reply to a raw request from an address, ``source`` as text.

        ``url`` is the path and the query that the client asked. Raise TrackerError for
        a refusal. A fault is logged, and refused as well.
        """
        request = answer = refusal = None
        started, (transport, kind, parse, reply) = time.perf_counter_ns(), exchange
        try:
            request = parse(raw, self.settings)
            if self.settings.private and not self.catalogue.member(key_path(*url), now):
                raise TrackerError(NEEDS_KEY, kind="member")
            answer = (self.scrape if kind == "scrape" else self.announce)(request, now)
            return reply(request, answer, self.settings)
        except TrackerError as error:
            refusal = error
            raise
        except Exception as fault:
            self.report(fault, f"{kind} over {transport}", now)
            is_disk = isinstance(fault, OSError)
            reason = DISK_FAILS if is_disk else "internal error"
            refusal = TrackerError(reason, kind="store" if is_disk else "internal")
            raise refusal from None
        finally:
            took = time.perf_counter_ns() - started if kind == "announce" else None
            self.stats.count(refusal.kind if refusal else "", took)
            if self.settings.verbose:
                listed = self.catalogue.by_hash
                line = trace(source, kind, request, answer, refusal, listed)
                at = time.strftime("%H:%M:%S", time.localtime(now))
                print(at, transport, visible(line), file=sys.stderr, flush=True)
            try:
                self.run_maintenance(now)
            except Exception as fault:  # it must not spoil the reply
                self.report(fault, "maintenance", now)

    def report(self, fault, what, now):
        """Log an exception that was raised during ``what``.

        Each kind is logged once a minute. Otherwise a full disk or a bug would write a
        traceback for every request.
        """
        kind = type(fault), getattr(fault, "errno", None)
        if not 0 <= now - self._logged.get(kind, -60) < 60:
            self._logged[kind] = now
            traceback = None if isinstance(fault, OSError) else fault
            text = "%r failed (logged once a minute): %s"
            log.error(text, what, fault, exc_info=traceback)

    def announce(self, announce, now):
        """Return (Counts, Peers, seconds to the next announce); raise TrackerError."""
        settings, wanted, catalogue = self.settings, announce.numwant, self.catalogue
        catalogue.check(announce.info_hash, now)
        if catalogue.banned and is_in(announce.address, catalogue.banned):
            reason = "your address is not allowed on this tracker"
            raise TrackerError(reason, kind="ban")
        progress = progress_of(announce, catalogue.by_hash) if announce.left else 0
        wanted = min(settings.numwant if wanted < 0 else wanted, settings.max_numwant)
        counts, peers = self.store.announce(announce, wanted, now, progress)
        peers = visible_peers(peers, announce.address, settings.public_ip)
        most = self._small if sum(counts[:2]) < settings.numwant else settings.interval
        # Vary the interval by a tenth, so that clients that came together spread out.
        return counts, peers, int(most * (0.9 + 0.2 * random())) or 1

    def scrape(self, info_hashes, now):
        """Return Counts by info_hash.

        Untracked torrents get zeros, because libtorrent treats a missing entry as an
        error. Raise TrackerError without info_hashes: a full scrape would take long.
        """
        if not info_hashes:
            reason = "info_hash is missing: this tracker does not list its torrents"
            raise TrackerError(reason)
        tracked = [each for each in info_hashes if self.catalogue.tracks(each, now)]
        unknown = dict.fromkeys(info_hashes, NO_COUNTS)
        return {**unknown, **self.store.scrape(tracked, now)}

    def snapshot(self, now):
        """Return totals by name, and Counts of the listed torrents by info_hash.

        They are exact, and kept for one second per thousand swarms or torrents. To
        count a swarm takes 10 µs, so this uses at most 1 % of the time.
        """
        start, end, snapshot = self._snapshot
        if start <= now < end or not self._lock.acquire(blocking=snapshot is None):
            return snapshot  # it is valid, or another thread is counting
        try:
            self.catalogue.refresh(now)
            by_hash, listed = self.catalogue.by_hash, {}
            sums, swarms, active = NO_COUNTS, 0, 0
            for info_hash, counts in self.store.swarms(now):
                sums, swarms = tuple(map(add, sums, counts)), swarms + 1
                active += bool(counts.seeders or counts.leechers)
                if info_hash in by_hash:
                    listed[info_hash] = counts
            snapshot = Counts(*sums)._asdict() | {"swarms": active}, listed
            size = max(swarms, len(self.catalogue.torrents))
            self._snapshot = now, now + size // 1000, snapshot
            return snapshot
        finally:
            self._lock.release()

    def run_maintenance(self, now):
        """Run the housekeeping of store and statistics, if it is due."""
        if not 0 <= now - self._maintained < 10:
            self._maintained = now
            self.store.tidy(now)
            self.stats.flush()


def progress_of(announce, by_hash):
    """Return the share that a leecher has, 1 to 63, or 0 if it is unknown.

    The size is that of the listed Torrent. Without one, what was downloaded since the
    client's start is all that it has, at least.
    """
    listed = by_hash.get(announce.info_hash)
    done = listed.size - announce.left if listed else announce.downloaded
    return 0 if done is None else 1 + 62 * max(0, done) // (announce.left + done)


def trace(source, kind, request, answer, refusal, by_hash):
    """Return the line that --verbose prints for a request; ``by_hash`` are Torrents.

    ``request`` is None if it was not parsed, ``answer`` if it was refused.
    """
    words, hashes, found, sent = [kind], request or [], answer or {}, ""
    if request and kind == "announce":
        left = "unknown" if request.left is None else request.left
        words = [client_name(request.peer_id), request.event or kind, f"left {left}"]
        source, hashes = format_ip(request.address), [request.info_hash]
    if answer and kind == "announce":
        found, (_, ends4, ends6) = {0: answer[0]}, answer[1]
        sent = f", {len(ends4) // 6 or len(ends6) // 18} peers sent"
    words += [by_hash[h].name if h in by_hash else h.hex() for h in hashes]
    result = [f"{c.seeders} seeders, {c.leechers} leechers" for c in found.values()]
    result = [f"refused: {refusal}"] if refusal else result
    return f"{source} {', '.join(words)}: {', '.join(result)}{sent}"


_CLIENTS = "A2=aria2 AZ=Vuze BI=BiglyBT BT=BitTorrent DE=Deluge LT=libtorrent"
_CLIENTS += " lt=rTorrent M=BitTorrent qB=qBittorrent TR=Transmission UT=uTorrent"
CLIENTS = dict(pair.split("=") for pair in _CLIENTS.split())  # by their codes


def client_name(peer_id):
    """Return the client that a peer_id names, with its version, or hex (BEP 20).

    >>> client_name(b"-qB5100-abcdefghijkl"), client_name(b"A2-1-36-0-abcdefghij")
    ('qBittorrent 5.1.0', 'aria2 1.36.0')
    """
    text = peer_id.decode("latin-1").replace("_", "-")
    azureus = re.match(r"-(\w\w)(\w{3}[1-9]?)", text, re.A)
    shadow = re.match(r"(A2|[A-Z])-?(\w+(?:-\w+)*)--?", text, re.A)
    if not (found := azureus or shadow):
        return peer_id.hex()
    numbers = found[2].split("-") if "-" in found[2] else found[2]
    version = ".".join(str(int(n, 36)) if len(n) == 1 else n for n in numbers)
    return f"{CLIENTS.get(found[1], found[1])} {version}"


# -- WSGI entry point -----------------------------------------------------------------
# Announces and scrapes are answered here, before Flask makes a request object of them:
# that takes four times as long as an announce. All other paths go to Flask.

_TEXT = "Content-Type", "text/plain; charset=iso-8859-1"
MEMBER = "bitbreeze.member"  # in the environ of pages: ("/KEY", Member), ("", None)


class TrackerApp:
    """The WSGI application: it answers announces and scrapes itself."""

    def __init__(self, tracker, pages):
        """Hand all other requests on to ``pages``, a WSGI application."""
        self.tracker, self.pages = tracker, pages

    def __call__(self, environ, start_response):
        kind = request_kind(path := environ.get("PATH_INFO", ""))
        if not kind:
            # Flask expects a query in ASCII, but clients may send any byte.
            query = quote(environ.get("QUERY_STRING", ""), "%&=+", "latin-1", "replace")
            environ = self._enter({**environ, "QUERY_STRING": query})
            return self.pages(environ, start_response)
        if (method := environ["REQUEST_METHOD"]) not in ("GET", "HEAD"):
            start_response("405 Method Not Allowed", [_TEXT, ("Allow", "GET, HEAD")])
            return [b"Clients announce and scrape with GET.\n"]
        if "info_hash=" not in (query := environ.get("QUERY_STRING", "")):
            is_browser = "text/html" in environ.get("HTTP_ACCEPT", "")
            if is_browser or not query:
                environ, url = self._enter(environ), self.tracker.settings.url
                mount = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1")
                root = url + environ[MEMBER][0] if url else mount
                start_response("302 Found", [_TEXT, ("Location", f"{root}/")])
                return []
        if method == "HEAD":  # it must not change anything
            start_response("200 OK", [_TEXT])
            return []
        source, now = environ.get("REMOTE_ADDR", ""), int(time.time())
        try:
            body = self.tracker.answer(HTTP[kind], environ, (path, query), source, now)
        except TrackerError as refusal:
            # It has status 200 too. With any other, clients ignore the reason and come
            # back within seconds.
            body = failure_reply(str(refusal), self.tracker.settings, refusal.kind)
        start_response("200 OK", [_TEXT, ("Content-Length", str(len(body)))])
        return [body]

    def _enter(self, environ):
        """Move a member's key to the path of the mount, so that all links have it."""
        key, _, rest = environ.get("PATH_INFO", "")[1:].partition("/")
        environ = {**environ, MEMBER: ("", None)}
        if member := self.tracker.catalogue.member(key, int(time.time())):
            environ[MEMBER] = f"/{key}", member
            environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + f"/{key}"
            environ["PATH_INFO"] = f"/{rest}"
        return environ


@lru_cache(maxsize=100)
def request_kind(path):
    """Return "announce" or "scrape" for such a path, else "".

    The end of the path decides, because hosts pass on more or less of a prefix. A key
    may follow, or a space. BitStorm's URLs end in .php.
    """
    for part in path.strip("/ ").split("/")[:-3:-1]:
        if (name := part.removesuffix(".php")) in ("announce", "scrape"):
            return name
    return ""


# -- UDP ------------------------------------------------------------------------------
# BEP 15; numbers are big-endian. A client may have forged its address until it shows a
# connection id that was sent there. So it gets no reply longer than its packet before.

PROTOCOL_ID = 0x41727101980.to_bytes(8, "big")  # in place of a connection id
ID_SECONDS = 120  # that a connection id is good for at least, and at most twice that
MOST_BYTES = 1232  # of a reply, so that no network cuts it: 1280 less the IPv6 headers
MOST_SCRAPED = 74  # info_hashes in a packet
_PACKET = struct.Struct(">8sI4s")  # connection id, action, transaction id
PACKET_ANNOUNCE = struct.Struct(">16x20s20sqq8xI4xIiH")
_EVENTS = "", "completed", "started", "stopped", "paused"  # libtorrent sends 4 (BEP 21)
_NUMBERS = struct.Struct(">III")


def parse_packet_announce(raw, settings):
    """Return the Announce in (packet of at least 98 bytes, address)."""
    packet, address = raw
    fields = PACKET_ANNOUNCE.unpack_from(packet)
    most = (MOST_BYTES - 20) // (len(address) + 2)
    info_hash, peer_id, done, left, event, key, numwant, port = fields
    return Announce(
        info_hash,
        peer_id,
        address,
        port,
        # With a magnet link, clients send -1 or 2^63 - 1.
        left if 0 <= left < 2**63 - 1 else None,
        _EVENTS[event] if event < len(_EVENTS) else "",
        min(settings.numwant if numwant < 0 else numwant, most),
        # Over HTTP, the same clients send it as eight hexadecimal digits.
        zlib.crc32(b"%08X" % key) if key else 0,
        downloaded=done if 0 <= done < 2**63 - 1 else None,
    )


def url_data(options):
    """Return the path and query of the announce URL in the options (BEP 41)."""
    found = b""
    while options[:1] not in (b"", b"\0"):  # 0 is the end
        size = 0 if options[0] == 1 else 1 + sum(options[1:2])  # 1 is padding
        found += options[2 : 1 + size] if options[0] == 2 else b""
        options = options[1 + size :]
    return found.decode("latin-1").partition("?")[::2]


def parse_packet_scrape(raw, settings):
    """Return the info_hashes in (packet of at least 36 bytes, address)."""
    return [h for h in chunks(raw[0][16:], 20) if len(h) == 20][:MOST_SCRAPED]


def packet_announce_reply(announce, answer, settings):
    """Return the reply to an announce behind its head: 12 to 1,224 bytes."""
    counts, peers, interval = answer
    head = _NUMBERS.pack(interval, counts.leechers, counts.seeders)
    if len(announce.address) == 4:
        return head + with_ports(peers.endpoints4, 6)
    return head + with_ports(peers.endpoints6, 18)


def packet_scrape_reply(info_hashes, files, settings):
    """Return the counts of each info_hash, 12 bytes each, in the order asked."""
    found = [files[info_hash] for info_hash in info_hashes]
    return b"".join(_NUMBERS.pack(c.seeders, c.snatches, c.leechers) for c in found)


UDP = {
    1: Exchange("udp", "announce", parse_packet_announce, packet_announce_reply),
    2: Exchange("udp", "scrape", parse_packet_scrape, packet_scrape_reply),
}


@lru_cache(maxsize=10000)
def connection_id(key, address, slot):
    """Return the id for an address in a slot of time: a keyed hash of 8 bytes."""
    return blake2b(address + slot.to_bytes(8, "big"), key=key, digest_size=8).digest()


class UdpServer:
    """Answers the packets that a socket receives."""

    def __init__(self, tracker, sock):
        """Serve with a bound socket. All processes share data/udp.key."""
        self.tracker, self.sock = tracker, sock
        # Packets shall tell their destination. Python names IP_PKTINFO from 3.12 on.
        option = socket.IPPROTO_IP, 8 if sys.platform == "linux" else 26
        if sock.family == socket.AF_INET6:
            option = socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO
        sock.setsockopt(*option, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        os.makedirs(tracker.store.folder, 0o700, exist_ok=True)
        fd = os.open(f"{tracker.store.folder}/udp.key", os.O_RDWR | os.O_CREAT, 0o600)
        with open(fd, "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(fd).st_size:
                file.write(os.urandom(32))
            self._key = os.pread(fd, 32, 0)

    def answer(self, packet, source, now):
        """Return the reply to a packet from an address in text, or b"" for silence."""
        if len(packet) < 16:
            return b""
        given, action, transaction = _PACKET.unpack_from(packet)
        address, slot, head = parse_address(source), now // ID_SECONDS, packet[8:16]
        if not action and given == PROTOCOL_ID:
            return head + connection_id(self._key, address, slot)
        if len(packet) < {1: 98, 2: 36}.get(action, 1 << 16):
            return b""
        error = b"\0\0\0\3" + transaction
        if given not in [connection_id(self._key, address, slot - n) for n in (0, 1)]:
            return error + b"connect again"  # after silence, clients wait for seconds
        try:
            raw, url = (packet, address), url_data(packet[98:])
            return head + self.tracker.answer(UDP[action], raw, url, source, now)
        except TrackerError as refusal:
            return error + str(refusal).encode()

    def serve(self):
        """Answer packets, each from the address that it was sent to."""
        while self.sock.fileno() >= 0:  # closed: ends with the next packet
            try:
                packet, info, _, sender = self.sock.recvmsg(2048, 64)
                if reply := self.answer(packet, sender[0], int(time.time())):
                    with suppress(OSError):  # there may be no way to a forged address
                        self.sock.sendmsg([reply], info, 0, sender)
            except Exception as fault:  # the next packet is answered all the same
                self.tracker.report(fault, "udp", time.time())
            if random() < 0.1:
                time.sleep(0)  # under gevent, HTTP is answered meanwhile


def bound_socket(kind, host, port):
    """Return a bound socket, over IPv4 and IPv6 if host is ""; raise OSError."""
    is_dual = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    sock = socket.socket(family, kind)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
    if kind == socket.SOCK_STREAM:  # bind while old connections time out
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.set_inheritable(True)
    return sock


# -- Catalogue ------------------------------------------------------------------------
# Which torrents are tracked: the .torrent files in a folder, and the info_hashes in
# allow.txt and deny.txt beside that folder. And for whom: deny.txt and keys.txt.

SETTLED = 2  # seconds without a change after which a file counts as complete
UNREAD: list = [None, None]  # the entry of a file that no worker has read yet
_HEX = re.compile("[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
_KEY = re.compile(r"[\w-]{16,64}", re.A)  # of a member


def is_settled(path, now):
    """Return whether a file, or the folder it is missing from, was left alone.

    A change up to a minute ahead is recent, because a request may be handled seconds
    after it read the clock. A later change comes from a wrong clock.
    """
    try:
        return not -60 <= now - os.stat(path).st_mtime < SETTLED
    except OSError:
        return is_settled(os.path.dirname(path), now)


def is_torrent(path):
    return path.lower().endswith(".torrent")


def torrent_paths(folder, onerror):
    """Return the paths of the .torrent files in a folder and in those below it."""
    met, paths = set(), []
    for parent, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        # Each folder counts once: links may form loops.
        status = os.stat(parent)
        if (identity := (status.st_dev, status.st_ino)) in met:
            folders.clear()
            continue
        met.add(identity)
        shown = [name for name in folders + names if name[0] != "."]
        paths += [f"{parent}/{name}" for name in shown if is_torrent(name)]
        folders[:] = [n for n in folders if n[0] != "." and not is_torrent(n)]
    return paths


def parse_list(data, path):
    """Return what the lines of a list say, and sentences on bad lines.

    "#" begins a comment. Windows may save the list as UTF-16 with a mark. Raise OSError
    if it is not text.
    """
    found, problems, (parse, form) = [], [], LISTS[os.path.basename(path)]
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # byte order marks
    text = data.decode("utf-16" if is_wide else "utf-8-sig", "replace")
    if "\0" in text:
        raise OSError(errno.EILSEQ, "it is not text. Save it as UTF-8")
    for number, line in enumerate(text.encode(errors="replace").splitlines(), 1):
        if words := line.decode().partition("#")[0].split():
            try:
                found.append(parse(*words))
            except ValueError:
                problems.append(f"{path}, line {number}: not {form}, skipped")
    if more := len(problems[10:]):
        problems[10:] = [f"{path}: {more} more lines like these, skipped"]
    return found, problems


def parse_hash(word, *comment):
    """Return an info_hash as 40 hex digits; raise ValueError."""
    if not _HEX.fullmatch(word):
        raise ValueError
    return word[:40].lower()


def parse_denied(word, *comment):
    """Return an info_hash, or a network with its "/"; raise ValueError."""
    is_hash = _HEX.fullmatch(word)
    return parse_hash(word) if is_hash else str(ipaddress.ip_network(word))


def parse_member(key, *words):
    """Return [checksum of the key, *Member]; raise ValueError."""
    name = " ".join(w for w in words if w != "publish" and w[:6] != "until=")
    days = [date.fromisoformat(w[6:]) for w in words if w[:6] == "until="]
    until = 86400 * ((min(days, default=date.max) - date(1970, 1, 1)).days + 1)
    if not (name and _KEY.fullmatch(key)):
        raise ValueError
    return [*key_checksums(key), name, "publish" in words, until]


LISTS = {
    "allow.txt": (parse_hash, "40 or 64 hex digits"),
    "deny.txt": (parse_denied, "40 or 64 hex digits, nor an address or a network"),
    "keys.txt": (parse_member, "KEY (16-64 letters) NAME [publish] [until=YYYY-MM-DD]"),
}


@lru_cache(maxsize=1000)
def key_checksums(path):
    """Return checksums of what may be keys: the time to compare them tells nothing."""
    parts = [each for each in re.split("[/?&=]", path) if len(each) > 15]
    return [sha256(each.encode()).hexdigest() for each in parts]


class Member(NamedTuple):
    """A line of keys.txt."""

    name: str
    can_publish: bool
    until: int  # seconds since 1970 at the end of the last day


class Catalogue:
    """The torrents that are tracked, shared by all workers through an index.

    Once a second, one worker scans the folder and the lists, and writes what it found
    to data/torrents.json. The other workers load this index when it has changed. It
    can be deleted at any time. Its first line is a checksum, its second line JSON:

        {path of a .torrent file or a list: [signature, content, *problems]}

    The content is a Torrent, or what the lines of a list say, with hex digits. The
    signature is null if the file was not read yet, or if it cannot be read. The folder
    itself has an entry as soon as a .torrent file was in it, and as long as it exists.

    A .torrent file counts as soon as it parses, because bencoding shows where it ends.
    Other changes count when they are settled, because the operator may be replacing the
    file. Until then, and while a folder or a list cannot be read, the last content
    counts. Without a last content, nothing is tracked.
    """

    def __init__(self, folder, index, track="auto"):
        """Track torrents; "auto" tracks any one until there is a list."""
        self.folder, self.index, self.track = os.path.abspath(folder), str(index), track
        beside = os.path.dirname(self.folder)
        self.lists = [f"{beside}/{name}" for name in LISTS]
        self.changed, self._mutex = 0, Lock()  # seconds: the mtime of the index
        self._checked = None  # the second of the last refresh
        self._removed = ""  # the path that a publisher has just removed
        self._entries = dict.fromkeys([self.folder, *self.lists], UNREAD)
        self._used = self._indexed = self._stamp = None  # entries of _rules; the index
        self._rules = (), (), False, True  # tracked, denied, is_open, unread
        self._known = None  # the last _rules with nothing unread
        self.skipped = {}  # reasons by path below the folder
        self._use()

    def check(self, info_hash, now):
        """Raise TrackerError if a torrent is not tracked."""
        if self.tracks(info_hash, now):
            return
        self.refresh(now, at_once=True)  # another worker may have just published it
        if self.tracks(info_hash, now):
            return
        _, denied, _, unread = self._rules
        if unread and info_hash not in denied:
            text = "this tracker is still reading its list of torrents: try again soon"
            raise TrackerError(text, kind="reading")
        # Transmission recognises these words and stops announcing.
        text = "torrent not registered with this tracker"
        raise TrackerError(text, kind="unregistered")

    def tracks(self, info_hash, now):
        """Return whether a torrent is tracked."""
        if now != self._checked:
            self.refresh(now)
        # One read, because another thread may replace them.
        tracked, denied, is_open, _ = self._rules
        return info_hash in tracked or is_open and info_hash not in denied

    def member(self, path, now):
        """Return the Member whose key is a part of a path or URL, or None."""
        for checksum in key_checksums(path):
            if now != self._checked:
                self.refresh(now)
            member = self.members.get(checksum)
            if member and now < member.until:
                return member
        return None

    def find(self, text, now):
        """Return the listed Torrent with a hash in hex (v1, v2 or truncated v2)."""
        info_hash = bytes.fromhex(text) if _HEX.fullmatch(text) else b""
        self.refresh(now, at_once=info_hash not in self.by_hash)
        return self.by_hash.get(info_hash)

    def add(self, data, category, now):
        """Write a .torrent file into a category, and return its Torrent.

        Raise TorrentError if it cannot be listed, or is listed already.
        """
        torrent = parse_torrent(read_metainfo(data), "", now)
        for info_hash in torrent.info_hashes():
            if known := self.find(info_hash.hex(), now):
                raise TorrentError(f"it is listed already as {known.path}")
            if info_hash in self.denied:
                raise TorrentError("this tracker does not want it: it is in deny.txt")
        path_in(category, torrent)  # raises, before anything is written
        hidden = torrent._replace(path=f".{os.urandom(8).hex()}")  # until it is whole
        os.makedirs(self.folder, exist_ok=True)
        Path(self.folder, hidden.path).write_bytes(data)
        return self.move(hidden, category, now)

    def move(self, torrent, category, now):
        """Move the file of a Torrent to a category, or remove it for None.

        Return the Torrent with its new path; raise TorrentError. All workers see it.
        """
        old, below = f"{self.folder}/{torrent.path}", ""
        if category is None:
            os.unlink(old)
        else:
            below = path_in(category, torrent)
            os.makedirs(os.path.dirname(f"{self.folder}/{below}"), exist_ok=True)
            os.replace(old, f"{self.folder}/{below}")
        with self._mutex:
            self._removed, self._checked = old, None
            self._follow(now, 5)  # seconds, so that this file is read in any case
        return torrent._replace(path=below)

    def summary(self):
        """Return a line for the operator about the tracked torrents."""
        allowed, denied, unread = map(len, (self.allowed, self.denied, self.unread))
        text = f"{len(self.torrents)} torrents in {self.folder}"
        text += f" and {allowed} of allow.txt" if allowed else ""
        text = "any torrent" if self.is_open else text
        text += f", but {denied} of deny.txt" if denied else ""
        return text + (f"; {unread} files are still to be read" if unread else "")

    def refresh(self, now, at_once=False):
        """Take in changes. Only the first call in a second does any work.

        With ``at_once``, take in what other workers have found in this second, too.
        """
        if not self._mutex.acquire(blocking=self._checked is None):
            return  # another thread is refreshing
        try:
            # A thread that waited may come with the second before.
            if self._checked is None or not -2 < now - self._checked <= 0:
                self._follow(now)
                self._checked = now
            elif at_once:
                self._load()
        finally:
            self._mutex.release()

    def _follow(self, now, seconds=0.04):
        """Scan and write the index if that is due, or load it."""
        try:
            with open(f"{self.index}.lock", "ab") as lock:
                # A new worker knows nothing, so it waits for the lock, and scans.
                is_new = self._checked is None
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_new else fcntl.LOCK_NB))
                self._load()
                last, started = os.fstat(lock.fileno()), time.monotonic()
                is_due = not last.st_atime <= now < last.st_mtime
                if is_new or is_due or self._indexed is None:
                    self.scan(now, seconds)
                    if self._entries != self._indexed:
                        text = json.dumps(self._entries).encode()
                        with open(f"{self.index}.new", "wb") as file:
                            file.write(b"%d\n%b" % (zlib.crc32(text), text))
                        os.replace(f"{self.index}.new", self.index)
                        self.changed = os.stat(self.index).st_mtime
                    # A scan takes a twentieth of the time at most, on a slow disk too.
                    pause = max(1, 20 * (time.monotonic() - started))
                    os.utime(lock.fileno(), (now, now if self.unread else now + pause))
        except BlockingIOError:
            self._load()  # another worker scans
        except OSError:  # no index can be written: every worker scans
            self.scan(now)

    def _load(self):
        """Use the entries of the index, if another worker has changed it."""
        try:
            status = os.stat(self.index)
            stamp = [status.st_ctime_ns, status.st_size]
            if stamp == self._stamp:
                return
            self._stamp, self._indexed, self.changed = stamp, None, status.st_mtime
            checksum, _, text = Path(self.index).read_bytes().partition(b"\n")
            if int(checksum) != zlib.crc32(text):
                raise ValueError("its checksum is wrong")
            self._entries = self._indexed = json.loads(text)
        except FileNotFoundError:
            self._stamp = self._indexed = None
        except (OSError, ValueError) as error:
            log.warning("%s will be rebuilt: %s", self.index, error)
        self._use()  # another worker has reported this

    def scan(self, now, seconds=0.04, report=log.warning):
        """Scan the folder and the lists; read new files for so many ``seconds``."""
        before, entries, errors = self._entries, {}, []
        # 1. Find the .torrent files, and the folders that cannot be read.
        paths = [*self.lists, *torrent_paths(self.folder, errors.append)]
        broken = {e.filename: e for e in errors if e.errno != errno.ENOENT}
        # 2. Read what changed: the lists, and torrents while there is time.
        deadline = float("inf")
        for path in (*paths, *broken):
            entry = known = before.get(path, UNREAD)
            try:
                if path in broken:
                    raise broken[path]
                status = os.stat(path)
                signature = [status.st_ctime_ns, status.st_size]
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                is_list = path in self.lists
                if known[0] != signature and (is_list or time.monotonic() < deadline):
                    deadline = min(deadline, time.monotonic() + seconds)
                    if is_list:
                        found, problems = parse_list(read_regular(path)[1], path)
                        if known == UNREAD or is_settled(path, now):
                            entry = [signature, found, *problems]
                    else:
                        below = path.removeprefix(f"{self.folder}/")
                        _, torrent = read_torrent(self.folder, below)
                        entry = [signature, [*torrent]]
            except TorrentError as error:
                if is_settled(path, now):
                    entry = [signature, None, f"{path}: {error}"]
            except FileNotFoundError:
                if path not in self.lists:
                    continue  # a link that leads nowhere
                if known == UNREAD or is_settled(path, now):
                    entry = ["missing", []]
            except OSError as error:
                entry = [None, known[1], f"{path}: it cannot be read: {error.strerror}"]
            for problem in entry[2:]:
                if problem not in known[2:]:
                    report(visible(problem))
            entries[path] = entry
        # 3. Keep what disappeared until that is settled, and what cannot be seen.
        for path in before.keys() - entries.keys():
            is_hidden = any(path.startswith(f"{folder}/") for folder in broken)
            is_gone = is_settled(os.path.dirname(path), now) and not is_hidden
            if before[path] != UNREAD and not is_gone and path != self._removed:
                entries[path] = before[path]
        is_listed = paths[3:] or before.get(self.folder, UNREAD)[1]
        if is_listed and os.path.isdir(self.folder):
            entries.setdefault(self.folder, ["listed", True])
        if entries != self._entries:
            self._entries, self.changed = entries, now  # until the index is written
        self._use(report)

    def _use(self, report=None):
        """Let the entries decide which torrents are tracked; ``report`` a change."""
        entries = self._entries
        if entries == self._used:
            return
        self._used = entries
        # 1. Parse the entries. A torrent is denied by any of its info_hashes.
        files = {p: e for p, e in sorted(entries.items()) if is_torrent(p)}
        others = {p: e for p, e in entries.items() if p not in files}
        allow, deny, keys = (entries.get(path, UNREAD) for path in self.lists)
        self.members = {checksum: Member(*each) for checksum, *each in keys[1] or []}
        bans = {each for each in deny[1] or [] if "/" in each}
        self.banned = [*map(ipaddress.ip_network, bans)]
        self.allowed = frozenset(map(bytes.fromhex, allow[1] or []))
        denied = frozenset(bytes.fromhex(e) for e in deny[1] or [] if e not in bans)
        self.denied = denied
        torrents, doubles = {}, {}
        for torrent in [Torrent(*entry[1]) for entry in files.values() if entry[1]]:
            first = torrents.setdefault((torrent.v1, torrent.v2), torrent)
            if first is not torrent:
                doubles[torrent.path] = f"it is the same torrent as {first.path}"
            elif not denied.isdisjoint(torrent.info_hashes()):
                denied = denied.union(torrent.info_hashes())
        torrents = [t for t in torrents.values() if denied.isdisjoint(t.info_hashes())]
        self.torrents = {torrent.path: torrent for torrent in torrents}
        whole = {bytes.fromhex(each.v2): each for each in torrents if each.v2}
        self.by_hash = {h: t for t in torrents for h in t.info_hashes()} | whole
        # 2. Collect what the operator has to know.
        self.problems = [problem for e in others.values() for problem in e[2:]]
        for path in doubles.keys() - self.skipped.keys() if report else ():
            report(visible(f"{self.folder}/{path}: {doubles[path]}"))
        self.skipped = doubles | {
            os.path.relpath(p, self.folder): e[2].removeprefix(f"{p}: ")
            for p, e in files.items()
            if e[2:]
        }
        unread = [p for p, e in others.items() if not e[0]]
        self.unread = unread + [p for p, e in files.items() if e == UNREAD]
        # 3. Nothing is tracked while deny.txt is unknown. An unknown list is a list.
        has_list = files or self.folder in entries or allow[0] != "missing"
        is_open = self.track == "any" or self.track == "auto" and not has_list
        tracked = (self.by_hash.keys() | self.allowed) - denied
        if deny[1] is None:
            tracked, is_open = frozenset(), False
        self._rules = tracked, denied, is_open, bool(self.unread)
        self.is_open = is_open  # every torrent is tracked that is not denied
        if not self.unread:
            if report and self._known not in (None, self._rules):
                report(f"Tracked from now on: {self.summary()}")
            self._known = self._rules


# -- Torrent files --------------------------------------------------------------------
# They come from strangers, so the names in them are only shown, never used as paths.
# Files that libtorrent loads are listed, with the hashes and sizes that it computes.

MAX_TORRENT_BYTES = 10 * 2**20  # of a .torrent file
DESCRIPTION_BYTES = 2**16  # of a text beside it
MAX_PARTS = 2**19  # numbers, strings, lists...: 50,000 files, half a second
LAST_SECOND = 253402300799  # of the year 9999, after which no date can be formatted
MAX_DEPTH = 100  # of lists and dictionaries: bencoder recurses, and crashes at 50,000
_TOKEN = re.compile(rb"(0*\d{1,10}):|i(-?0*\d{1,20})e|[dle]")
# Control and direction characters, halves of surrogates, and characters that XML does
# not allow. The two joiners are not among them: Persian and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def visible(text):
    """Return the text with invisible characters spelled out, such as ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


class TorrentError(Exception):
    """A file cannot be listed as a torrent. The text says why."""


def path_in(category, torrent):
    """Return the path for the file of a Torrent in the folder; raise TorrentError.

    A part of the info_hash is in its name, so that no file writes over another.
    """
    folder = r"[^./\\][^/\\]{0,49}(?<!\.torrent)"
    is_good = re.fullmatch(f"({folder}(/{folder}){{0,4}})?", category)
    if not is_good or _INVISIBLE.search(category):
        form = "up to five names of 50 letters, with / between and no dot before"
        raise TorrentError(f"its category must be {form}")
    name = f"{file_name(torrent.name)} {(torrent.v1 or torrent.v2)[:8]}.torrent"
    return os.path.join(category, name.strip())


def file_name(name):
    """Return the name of a torrent as every file system takes it."""
    text = re.sub(r'[/\\:*?"<>|]', "_", visible(name)).encode(errors="replace")[:150]
    return text.decode(errors="ignore").strip(". ")


class Torrent(NamedTuple):
    """What the list of torrents needs from a .torrent file."""

    path: str  # below the folder
    name: str
    size: int  # bytes, without padding
    files: int
    v1: str  # info_hash, 40 hex digits, "" for a v2 torrent
    v2: str  # info_hash, 64 hex digits, "" for a v1 torrent (BEP 52)
    added: int  # seconds since 1970
    is_private: bool

    def info_hashes(self):
        """Return the info_hashes that clients announce, of 20 bytes each."""
        return [bytes.fromhex(each[:40]) for each in (self.v1, self.v2) if each]


class Metainfo(NamedTuple):
    """The content of a .torrent file (BEP 3)."""

    outer: dict
    info: dict  # outer[b"info"]
    info_bytes: bytes  # the same as it stands in the file: its hash is the info_hash

    def is_private(self):
        """Return True if peers may come from this tracker only (BEP 27)."""
        return isinstance(self.info.get(b"private"), int) and self.info[b"private"] != 0


def read_torrent(folder, path):
    """Return (Metainfo, Torrent) from a file; raise TorrentError or OSError."""
    status, data = read_regular(f"{folder}/{path}", MAX_TORRENT_BYTES + 1)
    metainfo = read_metainfo(data)
    added = min(max(0, int(status.st_mtime)), LAST_SECOND)
    return metainfo, parse_torrent(metainfo, path, added)


def description_of(folder, torrent):
    """Return the text of NAME.txt beside NAME.torrent, at most 64 kB; "" for none."""
    path = f"{folder}/{torrent.path.removesuffix('.torrent')}.txt"
    with suppress(OSError):
        return read_regular(path, DESCRIPTION_BYTES)[1].decode("utf-8", "replace")
    return ""


def read_regular(path, most=-1):
    """Return (status, ``most`` bytes or all) of a regular file; raise OSError.

    Without O_NONBLOCK, a FIFO that takes the place of a file would stop the worker.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return status, file.read(most)


def read_metainfo(data):
    """Return the Metainfo in the bytes of a .torrent file; raise TorrentError."""
    if len(data) > MAX_TORRENT_BYTES:
        raise TorrentError(f"it has more than {MAX_TORRENT_BYTES} bytes")
    items, ends = bdecode(data)
    outer = dictionary_of(items)
    if not isinstance(info := outer.get(b"info"), dict):
        raise TorrentError("it has no dictionary called info")
    key = 2 * items[::2].index(b"info")
    return Metainfo(outer, info, data[ends[key] : ends[key + 1]])


def bdecode(data):
    """Return the keys and values, in turns, of a bencoded dictionary, and their ends.

    Unlike bencoder, this accepts numbers with leading zeros, and ignores bytes behind
    the end, because some programs append a newline. It refuses lists that are nested
    too deep. Raise TorrentError.
    """
    if data[:1] != b"d":
        raise TorrentError("it is not bencoded")
    items, ends, at = [], [], 1  # of the innermost list or dictionary
    outside = []  # kind and items of the lists and dictionaries around it
    for number_of_parts in range(MAX_PARTS):
        if number_of_parts % 4096 == 0:
            time.sleep(0)  # other greenlets and threads answer announces meanwhile
        token = _TOKEN.match(data, at)
        if not token:
            raise TorrentError("it is not bencoded")
        at, (size, number) = token.end(), token.groups()
        if size:
            at += int(size)
            value = data[token.end() : at]
        elif number:
            value = int(number)
        elif token[0] != b"e":
            outside.append((token[0], items))
            items = []
            if len(outside) >= MAX_DEPTH:
                raise TorrentError(f"it is nested more than {MAX_DEPTH} deep")
            continue
        elif outside:
            value, (kind, items) = items, outside.pop()
            value = dictionary_of(value) if kind == b"d" else value
        else:
            return items, ends
        items.append(value)
        if not outside:
            ends.append(at)
    raise TorrentError(f"it has more than {MAX_PARTS} parts")


def dictionary_of(items):
    """Return the dictionary of keys and values in turns; raise TorrentError."""
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values) or not {*map(type, keys)} <= {bytes}:
        raise TorrentError("it is not bencoded")
    # Of equal keys, the first counts, as in libtorrent.
    in_order = dict(zip(keys, values, strict=True))
    return in_order | dict(zip(keys[::-1], values[::-1], strict=True))


def parse_torrent(metainfo, path, added):
    """Return the Torrent in a Metainfo; raise TorrentError if no client can use it."""
    info, raw = metainfo.info, metainfo.info_bytes
    name = _text(_preferred(info, b"name", bytes))
    if not name.strip("./\\"):
        raise TorrentError("it has no name")
    # 1. Is it a v1 torrent, a v2 torrent (BEP 52), or both?
    has_v2 = info.get(b"meta version") == 2
    has_v1 = not has_v2 or isinstance(info.get(b"files"), list) or b"length" in info
    if has_v2 != isinstance(info.get(b"file tree"), dict):
        raise TorrentError("its meta version does not fit its file tree")
    # 2. Do the pieces fit the files, and the files of v1 those of v2?
    piece = _number_at(info, b"piece length", 1)
    if has_v2 and (piece < 16384 or piece & piece - 1):
        raise TorrentError("its piece length is no power of two from 16384 on")
    if has_v1:
        files, pieces = [*_v1_files(info)], _preferred(info, b"pieces", bytes)
        expected = 20 * -(-sum(size for _, size, _ in files) // piece)
        if len(pieces) != expected and (pieces or not has_v2):
            raise TorrentError("its pieces do not fit the size of its files")
        listed = [file[:2] for file in files if not file[2]]
        if has_v2 and listed != files_of(info):
            raise TorrentError("its v1 and v2 lists of files differ")
    else:
        listed = files_of(info)
    size = sum(size for _, size in listed)
    if not size:
        raise TorrentError("its files have no bytes")
    v1 = sha1(raw).hexdigest() if has_v1 else ""
    v2 = sha256(raw).hexdigest() if has_v2 else ""
    return Torrent(path, name, size, len(listed), v1, v2, added, metainfo.is_private())


def files_of(info):
    """Return (path, bytes) of each file in an info dictionary; raise TorrentError.

    A path is a tuple of names. Padding is left out (BEP 47).
    """
    if info.get(b"meta version") == 2:
        return [*_files_below(info[b"file tree"], ())]
    return [file[:2] for file in _v1_files(info) if not file[2]]


def _v1_files(info):
    """Yield (path, bytes, is_padding) of each file in v1's list; raise TorrentError."""
    if not isinstance(info.get(b"files"), list):
        yield (_text(_preferred(info, b"name", bytes)),), _size_of(info), False
        return
    for file in info[b"files"]:
        if not isinstance(file, dict):
            raise TorrentError("a file in it is no dictionary")
        path = _preferred(file, b"path", list)
        is_padding = "p" in _text(file.get(b"attr"))  # BEP 47; it needs no path
        if not is_padding:
            if {*map(type, path)} != {bytes}:
                raise TorrentError("a file in it has no path")
            is_padding = path[-1].startswith(b"_____padding_file_")  # BitComet's
        yield tuple(map(_text, path)), _size_of(file), is_padding


def _files_below(tree, path):
    """Yield (path, bytes) of the files in a v2 file tree: b"" marks one (BEP 52)."""
    for name, below in tree.items():
        here = (*path, _text(name))
        file = below.get(b"") if isinstance(below, dict) else below
        if file is None:
            yield from _files_below(below, here)
        elif not isinstance(file, dict) or len(below) > 1:
            raise TorrentError("its file tree is broken")
        else:
            size, root = _size_of(file), file.get(b"pieces root")
            if size and not (isinstance(root, bytes) and len(root) == 32 and any(root)):
                raise TorrentError("a file in it has no pieces root")
            yield here, size


def _size_of(file):
    """Return the bytes of a file: none for a symbolic link (BEP 47)."""
    return 0 if "l" in _text(file.get(b"attr")) else _number_at(file, b"length")


def _preferred(values, key, kind):
    """Return the value of KEY.utf-8 or of KEY that has the right type, or kind()."""
    candidates = values.get(key + b".utf-8"), values.get(key)
    return next((each for each in candidates if isinstance(each, kind)), kind())


def _number_at(values, key, least=0):
    """Return a number from a dictionary; raise TorrentError if it makes no sense."""
    value = values.get(key)
    if not isinstance(value, int) or not least <= value < 2**63:
        raise TorrentError(f"its {key.decode()} is missing or makes no sense")
    return value


def _text(value):
    """Return the text in a byte string. Any other value is an empty text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def parse_details(metainfo):
    """Return what the page of a torrent shows in addition, as a dictionary.

    Values of a wrong type count as missing. The creation date is in seconds since 1970.
    """
    outer, info = metainfo.outer, metainfo.info
    created = outer.get(b"creation date")
    is_date = isinstance(created, int) and 0 < created < 2**33
    seeds = outer.get(b"url-list")  # BEP 19
    seeds = seeds if isinstance(seeds, list) else [seeds]
    return {
        "piece_length": info[b"piece length"],
        "comment": _text(_preferred(outer, b"comment", bytes)),
        "created": created if is_date else None,
        "created_by": _text(outer.get(b"created by")),
        "web_seeds": [_text(seed) for seed in seeds if _text(seed)],
        "files": [{"path": path, "size": size} for path, size in files_of(info)],
    }


def with_announce(metainfo, urls, has_key):
    """Return the bytes of a .torrent file with the tracker at ``urls`` as its first.

    The other trackers follow (BEP 12), except in a private torrent, which has only one
    URL (BEP 27). URLs with a member's key are left out: ``has_key`` returns True for
    them. The info dictionary keeps its bytes.
    """
    ours, changed = [url.encode() for url in urls], {**metainfo.outer}
    lists, former = changed.pop(b"announce-list", None), changed.get(b"announce")

    def is_other(url):
        return _text(url).strip() and url not in ours and not has_key(_text(url))

    lists = lists if isinstance(lists, list) else []
    tiers = [[*filter(is_other, each)] for each in lists if isinstance(each, list)]
    if not any(tiers) and is_other(former):
        tiers = [[former]]
    changed[b"announce"] = ours[0]
    if len(ours) + sum(map(len, tiers)) > 1 and not metainfo.is_private():
        changed[b"announce-list"] = [*filter(None, [ours, *tiers])]
    raw = {key: bencoder.bencode(value) for key, value in changed.items()}
    raw[b"info"] = metainfo.info_bytes
    return b"d%be" % b"".join(bencoder.bencode(key) + raw[key] for key in sorted(raw))


def magnet(torrent, urls, web_seeds=()):
    """Return the magnet link of a Torrent, tracked at ``urls`` (BEP 9, 19, 52)."""
    v1 = f"xt=urn:btih:{torrent.v1}&" if torrent.v1 else ""
    v2 = f"xt=urn:btmh:1220{torrent.v2}&" if torrent.v2 else ""
    size = f"&xl={torrent.size}"
    trackers = "".join(f"&tr={quote(url, safe='')}" for url in urls)
    seeds = "".join(f"&ws={quote(url, safe='')}" for url in web_seeds)
    return f"magnet:?{v1}{v2}dn={quote(torrent.name, '')}{size}{trackers}{seeds}"


# -- Statistics -----------------------------------------------------------------------


class Stats:
    """Counters since the first start, shared by all processes, in a JSON file.

        {"counters": {"announces": 9, "announce_nanoseconds": 90000, "failure_full": 2}}

    Each process adds its counts at each flush and when it ends. A kill loses these
    counts. flock on stats.json.lock guards the file.
    """

    def __init__(self, path):
        self.path = str(path)
        self._start_empty()
        os.register_at_fork(after_in_child=self._start_empty)  # parents write their own
        atexit.register(self._write_last)

    def _start_empty(self):
        self._pending, self._lock = defaultdict(int), Lock()

    def count(self, failure="", nanoseconds=None):
        """Count an announce that took so many nanoseconds, or a scrape without them."""
        with self._lock:
            self._pending["scrapes" if nanoseconds is None else "announces"] += 1
            self._pending["announce_nanoseconds"] += nanoseconds or 0
            if failure:  # one of FAILURES
                self._pending["failure_" + failure] += 1

    def counters(self):
        """Return a Counter: the file plus what this process has not written yet."""
        with self._lock:
            return (self._read() or Counter()) + Counter(self._pending)

    def flush(self):
        """Write what was counted, unless another process writes. Raise OSError."""
        with suppress(BlockingIOError):  # the next flush tries again
            self._write(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _write_last(self):
        with suppress(OSError):  # the counts are lost, as by a kill
            if self._pending:
                self._write(fcntl.LOCK_EX)

    def _write(self, mode):
        """Add the pending counts to the file."""
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        with self._lock, open(f"{self.path}.lock", "ab") as lock:
            fcntl.flock(lock, mode)
            if (counters := self._read()) is None:
                log.error("%s is damaged: its counters start again", self.path)
                counters = Counter()
            counters.update(self._pending)
            Path(f"{self.path}.new").write_text(json.dumps({"counters": counters}))
            os.replace(f"{self.path}.new", self.path)
            self._pending.clear()

    def _read(self):
        """Return the counters in the file, or None if it is damaged."""
        try:
            counters = Counter(json.loads(Path(self.path).read_bytes())["counters"])
            is_good = all(type(n) is int and n >= 0 for n in counters.values())
            return counters if is_good else None
        except FileNotFoundError:
            return Counter()
        except (ValueError, LookupError, TypeError, RecursionError):
            return None


# -- File store -----------------------------------------------------------------------

PAGE = 4096  # bytes: one block of a file system
SLOTS = 70  # peers that fit into a page
CROWDED = 56  # peers in a page from which a new peer may go to its second page
FILL = 40  # peers a page on average; then no page overflowed in 200,000 peers
SPARSE = 16  # peers a page on average, below which pages are merged
SAMPLE = 16  # pages at most in which the peers of an address are counted
MOST_SEARCHED = 64  # pages at most that are searched for peers to hand out
FEW = 5  # peers of one address that a reply may have, however small it is
LEECHERS, SEEDERS, ALL = (0, 1), (1, 2), (0, 2)  # kinds of peers, as in Page.bounds
MAGIC = b"swrm\x01"  # with the version of the format
RECOUNTS = 16  # of a swarm with several pages, in each peer_ttl
QUIET, CHANGING, RETIRED = range(3)  # states of a swarm file
PARTIAL, SNATCHED, PROGRESS = 1, 2, 4  # bits of a peer's state, from 4 on a number
# Swarm files that a process keeps open. With its mapping, a file takes two descriptors,
# and connections need some too. RLIM_INFINITY is -1.
_DESCRIPTORS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31
OPEN_AT_MOST = min(10000, max(16, _DESCRIPTORS // 4))
MOUNTS = "/proc/mounts"  # only Linux has it
# File systems on which swarm files are mapped into memory, which saves an eighth of an
# announce. A full disk does not stop a change of a mapped file there, as it would on
# btrfs or ZFS, and all processes see the change, unlike over a network.
MAPPABLE = "ext2", "ext3", "ext4", "xfs", "tmpfs"
_FLAGS = os.O_RDWR | os.O_CLOEXEC


class DamagedError(Exception):
    """A swarm file is corrupt."""


class RetiredError(Exception):
    """A swarm file was removed during a wait for its lock, or must be removed now."""


class Record(NamedTuple):
    """A peer as a page stores it."""

    peer_id: bytes  # 20 bytes
    key: int  # checksum of the client's key, 0 for none
    state: int  # bits: PARTIAL, SNATCHED, and progress_of times PROGRESS
    seen4: int  # seconds since 1970 of the last announce over IPv4, 0 for none
    seen6: int  # the same for IPv6
    endpoint4: bytes  # 6 bytes: address and port; port 0 if nothing can connect to it
    endpoint6: bytes  # 18 bytes

    def endpoints(self):
        """Return [IPv4 endpoint, IPv6 endpoint], b"" for a family without one."""
        return [each if any(each) else b"" for each in self[5:]]


NO_PEERS, NO_COUNTS = Peers(b"", b"", b""), Counts(0, 0, 0, 0)
_NO_ENDPOINT4, _NO_ENDPOINT6 = bytes(6), bytes(18)
_ABSENT = Record(b"", 0, 0, 0, 0, _NO_ENDPOINT4, _NO_ENDPOINT6)
_LOOPBACK6 = bytes(15) + b"\1"

_PAGE_HEAD = struct.Struct("<5sBBBII")
_SWARM_HEAD = struct.Struct("<20s8sIIIIQIIB")
_CHECKED = _PAGE_HEAD.size + _SWARM_HEAD.size  # where the checksum of the head stands
_HEADS = _CHECKED + 4
_HASHES = struct.Struct("<II")
_RECORD = struct.Struct("<20sIBII")  # a Record without its endpoints
_STATE = struct.Struct("<BII")  # of which these are state, seen4 and seen6
_STATE_AT = _RECORD.size - _STATE.size
# Offsets of the three columns in a page.
_RECORDS = PAGE - SLOTS * (_RECORD.size + 6 + 18)
_ENDS4 = _RECORDS + SLOTS * _RECORD.size
_ENDS6 = _ENDS4 + SLOTS * 6
# Each of these formats reads one field of all 70 slots.
_IDS = struct.Struct("20s13x" * SLOTS)
_SEEN = struct.Struct("<" + "25xII" * SLOTS)
_ADDRESSES4 = struct.Struct("4s2x" * SLOTS)
_PREFIXES6 = struct.Struct("6s12x" * SLOTS)
_COUNTS = struct.Struct("<QQ")

# Stores whose files a forked child has to open again: it shares its parent's flock.
_STORES = WeakSet()
os.register_at_fork(after_in_child=lambda: [each.close_files() for each in _STORES])


class FileStore:
    """Peers in files, one for each swarm: swarms/ab/abcd..., named by its info_hash.

    The public methods are the contract of a store. ``now`` is in seconds since 1970. A
    store forgets an endpoint of a peer peer_ttl seconds after the last announce from
    it, and a peer with its last endpoint. Other processes see at once what a store has
    acknowledged.

    Locks: a swarm has two. ``Swarm.lock`` excludes the other threads of this process;
    flock on the file excludes other processes, and other descriptors in this one. A
    file is read and written only under both. flock on swarms.count guards the number of
    swarms. It is taken after the lock of a swarm, never before it. Under gevent a lock
    stops a whole worker, so nothing that waits (a sleep, a socket) may stand between
    lock and unlock. Logging to a terminal or a file does not wait.

    Memory: a process keeps only open files, each for ten seconds, and maps those into
    memory that have a second announce in this time.

    Files: pages of 4096 bytes, numbers little-endian. Each page:

        offset  bytes
             0      5  "swrm" and the version of the format, 1
             5      3  peers, leechers among them, partial seeds among these
             8      4  number of this page
            12      4  seconds since 1970: no endpoint here was last seen earlier
            16     65  page 0 only: the head of the swarm
           106   2310  70 times peer_id 20, key 4, state 1, seen on IPv4 4, on IPv6 4
          2416    420  70 IPv4 endpoints
          2836   1260  70 IPv6 endpoints

    The head of the swarm:

            16     20  info_hash
            36      8  salt of the hash that tells which pages a peer may be in
            44      4  pages in use; the file may be longer
            48     12  peers, leechers, partial seeds
            60      8  snatches
            68      4  when to recount at the latest, if there are several pages
            72      4  since when the swarm has no peers, or 0
            76      1  state: 0 quiet, 1 changing, 2 retired
            77      4  CRC-32 of these 61 bytes

    Up to 70 peers share one page with the head. Then the file grows by a page at a time
    (linear hashing), and a peer is in one of two pages, found by a hash of its peer_id.
    So an announce touches a handful of pages, however large the swarm.

    A kill at any moment loses nothing that was acknowledged: a change is one write
    within one page. Larger changes first set the state "changing", so that the next
    process to open the file recounts it. A corrupt file is moved to damaged/ and
    logged, and its swarm starts afresh. When the clock is set back, peers from the
    future count as seen now as soon as the swarm is recounted or tidied.

    Limits: the file system must have flock. A power cut may lose the last seconds,
    because nothing waits for the disk. Seconds are good until 2106. Another format gets
    another folder. The file swarms.count holds two numbers of 8 bytes: of swarms, and
    of those with peers. max_swarms limits the second number. The first number may be
    twice as large. Then each new swarm removes those of a folder that have no peers.
    """

    def __init__(self, folder, settings):
        """Keep peers below ``folder``; the first announce creates it."""
        self.folder, self.settings = str(folder), settings
        self.place = self.folder  # for the operator
        self._next = int(random() * 256)  # the folder to tidy
        self._is_mappable = file_system(self.folder) in MAPPABLE
        self.close_files()
        _STORES.add(self)

    def close_files(self):
        """Close all swarm files. They are opened again when they are needed."""
        self._open = {}  # Swarms by info_hash
        self._now = None  # the second of the last visit

    def announce(self, announce, wanted, now, progress=0):
        """Record an Announce; return the swarm's Counts and up to ``wanted`` Peers.

        A peer is identified by its peer_id and counts once, with one endpoint of each
        address family. An endpoint belongs to one peer: if a new peer_id announces from
        it, its client was restarted, and the old peer is removed, whatever its key.
        From another address, a client takes a peer over only with the same key.
        A peer is never handed its own endpoints. A seeder is handed no seeders, except
        for a new endpoint, and then behind the leechers: aria2 with a magnet link
        announces left=0 before it has any data. While there are others, an address or
        an IPv6 /48 gets at most a quarter of a reply, or five peers. A leecher that
        becomes a seeder adds a snatch, once. If the swarm has max_peers, a new peer
        gets a reply, but is not kept. Raise TrackerError if another limit is reached,
        or if a peer with another key has this peer_id. ``progress`` is what progress_of
        returns for a leecher.
        """
        create, given = announce.event != "stopped", (announce, wanted, progress)
        found = self._visit(announce.info_hash, now, create, Swarm.announce, *given)
        return found or (NO_COUNTS, NO_PEERS)

    def scrape(self, info_hashes, now):
        """Return Counts by info_hash, zeros for an unknown swarm."""
        found = {h: self._visit(h, now, False, Swarm.counts) for h in info_hashes}
        return {info_hash: counts or NO_COUNTS for info_hash, counts in found.items()}

    def swarms(self, now):
        """Yield (info_hash, Counts) of every swarm that has peers or snatches."""
        (before, _), found, live, removed = self._count_swarms(), 0, 0, 0
        for info_hash, counts in self._walk(range(256), now, Swarm.counts_or_retire):
            if counts:
                found += 1
                live += bool(counts.seeders or counts.leechers)
                yield info_hash, counts
            else:
                removed += 1
        # A kill may have left wrong numbers. Correct them, if no swarm came meanwhile.
        left = max(0, before - removed)
        self._count_swarms(lambda *known: (found, live) if known[0] == left else known)

    def peers(self, info_hash, now):
        """Return the snatches of a swarm, and an iterator of (Record, is_seeder)."""
        snatches, pages = self._visit(info_hash, now, False, Swarm.records) or (0, [])
        return snatches, chain.from_iterable(pages)

    def reset(self, now):
        """Forget all peers and snatches."""
        list(self._walk(range(256), now, Swarm.retire))

    def raise_snatches(self, info_hash, snatches, now):
        """Count at least so many snatches; raise TrackerError as ``announce`` does."""
        self._visit(info_hash, now, True, Swarm.raise_snatches, snatches)

    def last_seen(self, info_hash, now):
        """Return roughly when a peer last announced, 0 if that is unknown."""
        return self._visit(info_hash, now, False, Swarm.last_seen) or 0

    def tidy(self, now, is_full=False):
        """Do a little housekeeping: go through the next of the 256 folders."""
        self._next = (self._next + 1) % 256
        work = Swarm.retire_empty if is_full else Swarm.counts_or_retire
        with suppress(OSError):  # the next announce to that swarm reports it
            list(self._walk([self._next], now, work))

    def probe(self):
        """Raise OSError if the store cannot keep peers."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        with NamedTemporaryFile(prefix="probe.", dir=self.folder, buffering=0) as file:
            write_at(file.fileno(), bytes(PAGE), 0)
            fcntl.flock(file, fcntl.LOCK_EX)
            # flock keeps out every other open file, of this process or of another.
            with suppress(BlockingIOError), open(file.name, "rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                raise OSError(errno.ENOLCK, "its locks do not exclude other workers")

    def _walk(self, folders, now, work):
        """Yield (info_hash, work(swarm)) of the swarms in some of the 256 folders.

        The result is None for a swarm that was removed meanwhile.
        """
        for number in folders:
            names = []
            with suppress(FileNotFoundError):
                names = os.listdir(f"{self.folder}/swarms/{number:02x}")
            for name in names:
                if re.fullmatch("[0-9a-f]{40}", name):
                    info_hash = bytes.fromhex(name)
                    yield info_hash, self._visit(info_hash, now, False, work)

    def _visit(self, info_hash, now, create, work, *arguments):
        """Return ``work(swarm, *arguments)``, done while the swarm is locked.

        Return None if there is no such swarm and ``create`` is false.
        """
        while True:
            if now != self._now:
                self._close_old(now)
            swarm = self._open.get(info_hash) or self._find(info_hash, create)
            if swarm is None:
                return None
            swarm.lock.acquire()
            emptied = swarm.emptied
            try:
                fcntl.flock(swarm.fd, fcntl.LOCK_EX)
                if swarm.map is None and swarm.head and self._is_mappable:
                    # At the second visit, if it has content and a descriptor is left.
                    with suppress(OSError, ValueError):
                        swarm.map = mmap.mmap(swarm.fd, 0)
                emptied = swarm.begin(now)
                return work(swarm, *arguments)
            except (RetiredError, DamagedError) as error:
                self._remove(swarm, error)
            except BaseException:
                swarm.head = b""  # memory may differ from the file now
                raise
            finally:
                more = bool(emptied) - bool(swarm.emptied)  # swarms with peers
                if swarm.first:
                    swarm.first.data = b""  # an open file needs no memory for it
                try:
                    fcntl.flock(swarm.fd, fcntl.LOCK_UN)
                finally:
                    swarm.lock.release()
                if more:
                    with suppress(OSError):  # ``swarms`` corrects the number
                        self._count_swarms(lambda n, live, more=more: (n, live + more))

    def _close_old(self, now):
        """Once a second, close files that were opened ten seconds ago."""
        known = list(self._open.items())
        # Other threads may be behind.
        self._open = {key: each for key, each in known if -60 < now - each.opened < 10}
        self._now = now

    def _find(self, info_hash, create):
        """Return the opened Swarm, or None if there is none and create is false.

        Only a swarm that is announced stays open: walks would close all others. As each
        is closed after ten seconds, a process notices by then that the folder was moved
        or removed.
        """
        name = info_hash.hex()
        path = f"{self.folder}/swarms/{name[:2]}/{name}"
        while True:
            try:
                with suppress(FileNotFoundError):
                    swarm = Swarm(path, info_hash, self.settings, self._now)
                    kept = self._open if create else {}  # threads may replace it
                    while len(kept) >= OPEN_AT_MOST:
                        kept.popitem()
                    kept[info_hash] = swarm
                    return swarm
                if not create:
                    return None
                self._create(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self._open = {}  # closes the other files

    def _create(self, path):
        """Create the empty file of a swarm; raise TrackerError if there are too many.

        If this process is killed before it writes to the file, the swarm has no peers.
        """
        most = self.settings.max_swarms

        def create(swarms, live):
            if 0 < most <= live:
                raise refusal("swarms", self.settings)
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            os.close(os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600))
            return swarms + 1, live

        os.makedirs(self.folder, 0o700, exist_ok=True)
        with suppress(FileExistsError):  # another process has just created it
            swarms, _ = self._count_swarms(create)
            if 0 < 2 * most < swarms:
                self.tidy(self._now, is_full=True)

    def _remove(self, swarm, error):
        """Remove a swarm after a RetiredError; after a DamagedError, keep it aside.

        Do nothing if another process has done that.
        """
        self._open.pop(swarm.info_hash, None)
        try:
            if not os.path.samestat(os.stat(swarm.path), os.fstat(swarm.fd)):
                return  # the path leads to another file
        except FileNotFoundError:
            return
        if isinstance(error, DamagedError):
            aside = f"{self.folder}/damaged/{swarm.info_hash.hex()}"
            os.makedirs(os.path.dirname(aside), 0o700, exist_ok=True)
            # Other processes may have the file open without having noticed the damage.
            # This makes the checksum of its head wrong for them.
            write_at(swarm.fd, bytes((RETIRED,)), _CHECKED - 1)
            os.replace(swarm.path, aside)
            text = "swarm file %s was damaged: %s. It is kept as %s"
            log.error(text, swarm.path, error, aside)
        else:
            os.unlink(swarm.path)
        self._count_swarms(lambda swarms, live: (swarms - 1, live))

    def _count_swarms(self, change=None):
        """Return (swarms, those with peers), first replaced by ``change`` of both."""
        try:
            fd = os.open(f"{self.folder}/swarms.count", _FLAGS | os.O_CREAT, 0o600)
        except FileNotFoundError:
            return 0, 0  # there is no data folder yet
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            known = _COUNTS.unpack(os.pread(fd, 16, 0).ljust(16, b"\0"))
            changed = [max(0, number) for number in change(*known)] if change else known
            if changed != known:
                write_at(fd, _COUNTS.pack(*changed), 0)
            return changed
        finally:
            os.close(fd)


class Swarm:
    """An open swarm file. FileStore locks it, and calls ``begin`` first."""

    def __init__(self, path, info_hash, settings, now):
        """Open the file at ``path``; raise FileNotFoundError if there is none."""
        self.fd = -1
        self.fd = os.open(path, _FLAGS)
        self.path, self.opened, self.lock = path, now, Lock()
        self.info_hash, self.settings = info_hash, settings
        self.map = None  # the file as memory
        self.first, self.head = None, b""  # page 0, and its first bytes in the file
        self.loaded = {}  # other pages by number
        self.emptied = 0  # since when the swarm has no peers, or 0

    def __del__(self, close=os.close):  # os may be gone when Python exits
        # Close it only here, because another thread may still use this Swarm.
        if self.fd >= 0:
            close(self.fd)

    def begin(self, now):
        """Read page 0; return the old ``emptied``. Raise DamagedError, RetiredError."""
        self.now = now
        # If the file was cut short, to touch its memory would kill the process.
        if self.map and os.lseek(self.fd, 0, os.SEEK_END) != len(self.map):
            self.map = None
        data = self.map or os.pread(self.fd, PAGE, 0)
        if data[:_HEADS] == self.head and len(data) >= PAGE:
            self.first.data = data  # the counts in memory are still right
        else:
            self._read_first(data[:PAGE])
        if self.loaded:
            self.loaded = {}
        emptied = self.emptied
        if now >= self.due:
            self._maintain()
        return emptied

    def _read_first(self, data):
        """Read the head of the swarm from the first page; ``data`` is its bytes."""
        self.head, self.due = b"", 0  # due is when _maintain has something to do
        if not data:  # the file was created a moment ago
            head = self.info_hash, os.urandom(8), 1, 0, 0, 0, 0, 0, self.now, QUIET
            raw = _SWARM_HEAD.pack(*head)
            data = _PAGE_HEAD.pack(MAGIC, 0, 0, 0, 0, 0) + raw + checksum(raw)
            data = data.ljust(PAGE, b"\0")
        self.first = Page(0, data)
        raw, stored = data[_PAGE_HEAD.size : _CHECKED], data[_CHECKED:_HEADS]
        if stored != checksum(raw):
            raise DamagedError("the checksum of its head is wrong")
        head = _SWARM_HEAD.unpack(raw)
        if head[-1] == RETIRED:
            raise RetiredError
        info_hash, self.salt, self.pages, *self.tally = head[:6]
        self.snatches, self.recount_at, self.emptied, self.state = head[6:]
        if info_hash != self.info_hash or not self.pages or self.state > CHANGING:
            raise DamagedError("its head belongs to another swarm")
        if self.pages == 1:
            self.tally = self.first.counted
        elif self.state == QUIET:
            peers, leechers, partial_seeds = self.tally
            if not partial_seeds <= leechers <= peers <= self.pages * SLOTS:
                raise DamagedError("its head has impossible counts")
        self.head = data[:_HEADS]  # last: from now on begin() relies on all of this

    def _maintain(self):
        """Forget expired peers and recount if that is due; set ``due`` again."""
        first, now, ttl = self.first, self.now, self.settings.peer_ttl
        # Here and below, the second limit notices a clock that was set back.
        if first.peers and (first.oldest < now - ttl or max(first.seen()) > now):
            self._forget_expired(first)
        is_due = not now < self.recount_at <= now + ttl // RECOUNTS
        if (is_due and self.pages > 1) or self.state == CHANGING:
            self._recount()
        due = (first.oldest or now) + ttl + 1
        self.due = due if self.pages == 1 else min(due, self.recount_at)

    # What can be done with a swarm

    def announce(self, announce, wanted, progress):
        """Record an announce; return (Counts, Peers), as FileStore.announce says."""
        own, is_new, seeder = None, False, is_seeder(announce)
        if not announce.event:
            own = self._renew(announce, seeder, progress)
        if not own:
            own, is_new = self._record(announce, seeder, progress)
        if announce.event == "stopped" or not wanted:
            return self.counts(), NO_PEERS
        options = seeder, is_new, own, not announce.compact
        peers = self._choose(wanted, *options)
        is_local = is_loopback(announce.address)
        if not is_local and any(map(is_crowded, peers[1:], (6, 18))):
            # Among sixteen times as many peers are enough others.
            peers = spread(wanted, *self._choose(16 * wanted, *options))
        return self.counts(), Peers(*peers)

    def _renew(self, announce, seeder, progress):
        """Update when a peer was last seen and its progress, if nothing else is new.

        Return the peer's endpoints, as Record.endpoints does, or None if ``_record``
        must run. Most announces take this path, which needs a fifth of the time.
        """
        endpoint = endpoint_of(announce)
        first, width = (_ENDS4, 6) if len(endpoint) == 6 else (_ENDS6, 18)
        page = self.first
        views = ((0, page.data, 0, page.bounds()),)
        if self.pages > 1:  # read one by one
            views = ((n, *self._view(n)) for n in self._homes(announce.peer_id))
        for number, data, start, (_, leechers, peers) in views:
            column = start + first
            at = data[column : column + peers * width].find(endpoint)
            slot, rest = divmod(at, width)
            record_at = _RECORDS + slot * _RECORD.size
            if at < 0 or rest:  # not found, or by chance across two endpoints
                continue
            peer_id, key, state, *seen = _RECORD.unpack_from(data, start + record_at)
            if (
                peer_id == announce.peer_id
                and key == announce.key
                and not state & PARTIAL
                and (slot >= leechers) == seeder
            ):
                seen[0 if width == 6 else 1] = self.now
                new = _STATE.pack(state & SNATCHED | progress * PROGRESS, *seen)
                at = number * PAGE + record_at + _STATE_AT  # for one write
                if self.map and at < len(self.map):
                    self.map[at : at + len(new)] = new
                else:
                    write_at(self.fd, new, at)
                at4, at6 = start + _ENDS4 + slot * 6, start + _ENDS6 + slot * 18
                ends = data[at4 : at4 + 6], data[at6 : at6 + 18]
                return [each.lstrip(b"\0") and each for each in ends]  # b"" for zeros
        return None

    def _record(self, announce, seeder, progress):
        """Record any announce; return Record.endpoints, and whether one is new."""
        is_stopped, endpoint = announce.event == "stopped", endpoint_of(announce)
        page, slot = self._locate(announce.peer_id)
        # 1. Find the peer's Record.
        old, was_leecher = _ABSENT, False
        if slot >= 0:
            old, was_leecher = page[slot], slot < page.leechers
        elif is_stopped:
            return (b"", b""), False
        known, other = old[5:] if len(endpoint) == 6 else old[6:4:-1]
        # 2. Is it this peer's client?
        if slot >= 0:
            announce = announce._replace(key=key_after(announce, old.key, known, other))
        # 3. Look for another peer that has this endpoint: this client before a restart.
        is_moved = known != endpoint and not is_stopped
        owner = self._owner(endpoint, page.number) if is_moved else None
        is_gained = is_moved and not owner and known[:-2] != announce.address
        if is_gained and self._has_many(announce.address):
            raise refusal("address", self.settings)
        new = updated(old, announce, self.now, progress)
        if slot < 0 and not owner and 0 < self.settings.max_peers <= self.tally[0]:
            return new.endpoints(), True
        # 4. Remove that peer. If the process is killed before step 6, the client
        #    announces again.
        if owner:
            former_page, former_slot = owner
            if slot < 0:
                was_leecher = former_slot < former_page.leechers
            former = former_page.remove(former_slot)
            self._save(former_page)
            old = old._replace(state=old.state | former.state & SNATCHED)
            page, slot = self._locate(announce.peer_id)
        # 5. Find room for a new peer, and change its Record. rTorrent may finish
        #    without "completed"; then its next announce has left=0.
        if slot < 0:
            page = self._page_with_room(announce.peer_id)
        new = new._replace(state=new.state | old.state & SNATCHED)
        if seeder and was_leecher:
            new = new._replace(state=new.state | SNATCHED)
        self.snatches += (new.state & ~old.state & SNATCHED) // SNATCHED
        # 6. Write it.
        if slot >= 0:
            page.remove(slot)
        if not is_stopped:
            page.add(new, seeder)
        self._save(page)
        return new.endpoints(), not any(known) or announce.event == "started"

    def counts(self):
        return counts_of(*self.tally, self.snatches)

    def last_seen(self):
        """Return when a peer in the first page last announced."""
        return max(self.first.seen(), default=self.emptied)

    def records(self):
        """Return the snatches and copies of all pages."""
        copies = [Page(p.number, bytes(p.data[:PAGE])) for p in self._all_pages()]
        return self.snatches, copies

    def raise_snatches(self, snatches):
        self.snatches = max(self.snatches, snatches)
        self._save(self.first)

    def counts_or_retire(self):
        """Return Counts if the swarm has peers, or snatches that are worth keeping."""
        kept = self.settings.swarm_ttl if self.snatches else 0
        return self.counts() if self.now < self.emptied + kept else self.retire_empty()

    def retire_empty(self):
        """Return Counts if the swarm has peers."""
        return self.counts() if self.tally[0] else self.retire()

    def retire(self):
        """Raise RetiredError, so that FileStore removes the swarm with all its peers.

        Tell other processes that have the file open not to use it any more. If this
        process is killed then, the next process to find the file removes it.
        """
        self.state, self.tally = RETIRED, (0, 0, 0)
        self._write(self.first)
        self.head = b""  # for a thread that waits for the lock of this Swarm
        raise RetiredError

    def _has_many(self, address):
        """Return True if an address, or its /48, has max_peers_per_address here.

        In a swarm of many pages the peers of an address are estimated from a sample of
        pages: the salted hash spreads them evenly, and the limit is raised by three
        standard deviations.
        """
        most = self.settings.max_peers_per_address
        if not most or is_loopback(address):
            return False
        # Always the same pages. With random ones, a client that repeats its announce
        # would soon meet a sample in which the address has few peers.
        start = zlib.crc32(address[:6]) * self.pages >> 32
        sampled = min(self.pages, SAMPLE)
        pages = [self._page((start + i) % self.pages) for i in range(sampled)]
        share = most * sampled / self.pages
        allowed = share if sampled == self.pages else share + 3 * share**0.5
        return sum(page.count_from(address) for page in pages) >= allowed

    def _choose(self, wanted, seeder, is_new, own, with_ids):
        """Return what _pick does. A new seeder gets seeders behind the leechers."""
        columns = self._pick(wanted, LEECHERS if seeder else ALL, own, with_ids)
        if seeder and is_new:
            missing = wanted - max(len(columns[1]) // 6, len(columns[2]) // 18)
            if missing:
                more = self._pick(missing, SEEDERS, own, with_ids)
                columns = tuple(map(add, columns, more))
        return columns

    def _pick(self, wanted, kind, own, with_ids):
        """Return up to ``wanted`` peers of a kind as the columns of Peers.

        They are a run of the swarm's peers in the order of its pages, from a random
        peer on. So all peers are equally likely. In a swarm of more than 2,500 peers, a
        reply to a seeder may lack leechers that are rare. ``own`` are the endpoints of
        the peer that asks, as Record.endpoints returns them. They are left out, and so
        are peers without a port in its families.
        """
        begin, end = kind  # in the bounds of a page
        if self.pages == 1:
            data, bounds = self.first.data, self.first.bounds()
            columns = columns_of(data, 0, bounds[begin], bounds[end], own, with_ids)
            count, *columns = usable_peers(*columns, own)
            if count <= wanted:
                return columns
            return run_of_peers(int(random() * count), wanted, *columns)
        # 1. Choose a page in proportion to its peers. Half more than the average is the
        #    most that counts, so two pages of three are taken.
        bounds = 0, self.tally[1], self.tally[0]
        most = 1 + 3 * (bounds[end] - bounds[begin]) // (2 * self.pages)
        for _ in range(16):
            first = int(random() * self.pages)
            data, start, bounds = self._view(first)
            if random() * most < bounds[end] - bounds[begin]:
                break
        # 2. Go on from a random peer in it, and end with the peers before that one.
        slot = skipped = int(random() * (bounds[end] - bounds[begin]))
        missing, columns = wanted + 1, (b"", b"", b"")  # one may be the peer itself
        number, last = first, first + min(self.pages, MOST_SEARCHED + wanted // SPARSE)
        while True:
            at, pool = bounds[begin], bounds[end] - bounds[begin]
            pool = skipped if number == first + self.pages else pool
            stop = min(pool, slot + missing)
            if stop > slot:
                more = columns_of(data, start, at + slot, at + stop, own, with_ids)
                columns, missing = tuple(map(add, columns, more)), missing - stop + slot
            if not missing or number == last:
                count, *columns = usable_peers(*columns, own)
                missing = wanted - count
                if missing <= 0 or number == last and stop >= pool:
                    return run_of_peers(0, min(wanted, count), *columns)
            slot = stop
            if slot >= pool:
                number, slot = number + 1, 0
                data, start, bounds = self._view(number % self.pages)

    def _owner(self, endpoint, near):
        """Return (page, slot) of the peer that has an endpoint, or None.

        Only 128 pages around page number ``near`` are searched, in 0.1 ms. So in a
        swarm of more than 5,000 peers, the old peer of a client that was restarted may
        stay until it expires.
        """
        if endpoint[-2:] in (b"", b"\0\0"):  # many peers may have an unusable port
            return None
        column, width = (_ENDS4, 6) if len(endpoint) == 6 else (_ENDS6, 18)
        searched, mapped = min(self.pages, 128), self.map
        for number in range(near - searched // 2, near + (searched + 1) // 2):
            number %= self.pages
            at = number * PAGE + column
            raw = mapped[at : at + SLOTS * width] if mapped else b""
            if raw and endpoint not in raw:
                continue
            page = self._page(number)
            data = page.data[column : column + page.peers * width]
            if (slot := find_item(data, endpoint, width)) >= 0:
                return page, slot
        return None

    # Which page a peer is in

    def _homes(self, peer_id):
        """Return the numbers of the one or two pages that a peer may be in.

        This is linear hashing. The hash is salted, so that an attacker cannot choose
        peer_ids that all fall into one page.
        """
        if self.pages == 1:
            return (0,)
        digest = blake2b(peer_id, salt=self.salt, digest_size=8).digest()
        whole = 1 << (self.pages - 1).bit_length()  # the next power of two
        first, second = _HASHES.unpack(digest)
        first, second = first % whole, second % whole
        # A number beyond the last page falls back to the page that will be split.
        return (
            first if first < self.pages else first - whole // 2,
            second if second < self.pages else second - whole // 2,
        )

    def _locate(self, peer_id):
        """Return (page, slot) of a peer, or (one of its pages, -1)."""
        for page in map(self._page, self._homes(peer_id)):  # read one by one
            records = page.data[_RECORDS : _RECORDS + page.peers * _RECORD.size]
            slot = find_item(records, peer_id, _RECORD.size)
            if slot >= 0:
                break
        return page, slot

    def _page_with_room(self, peer_id):
        """Return the page for a new peer; add pages as the swarm grows."""
        while True:
            homes = list(map(self._page, self._homes(peer_id)))
            is_crowded = homes[0].peers >= CROWDED
            page = min(homes, key=Page.counts) if is_crowded else homes[0]
            is_dense = self.pages > 1 and self.tally[0] >= self.pages * FILL
            if page.peers < SLOTS and not is_dense:
                return page
            self._split()

    def _split(self):
        """Add a page, and move to it the peers of one other page that belong there."""
        source = self._page(self.pages - (1 << self.pages.bit_length() - 1))
        head = _PAGE_HEAD.pack(MAGIC, 0, 0, 0, self.pages, 0)
        self.loaded[self.pages] = target = Page(self.pages, head.ljust(PAGE, b"\0"))
        self.pages += 1
        for slot in reversed(range(source.peers)):
            if source.number not in self._homes(source[slot].peer_id):
                seeder = slot >= source.leechers
                target.add(source.remove(slot), seeder)
        self._write(target)  # it does not count until the head says so
        with self._changing():
            self._count(target)
            self._save(source)

    def _merge(self):
        """Remove the last page, and move its peers to their other page."""
        self.pages -= 1
        source, homes = self._page(self.pages), {}
        for record, seeder in source:
            page = min(map(self._page, self._homes(record.peer_id)), key=Page.counts)
            page.add(record, seeder)
            homes[page.number] = page
        source.peers = source.leechers = source.partial_seeds = 0
        self._count(source)
        for number in sorted(homes, reverse=True):
            self._save(homes[number])  # page 0 last: it holds the number of pages

    # Reading and writing pages

    def _page(self, number):
        """Return a page without its expired peers."""
        if number == 0:
            return self.first
        page = self.loaded.get(number)
        if page is None:
            at = number * PAGE
            data = self.map and self.map[at : at + PAGE]
            data = data or os.pread(self.fd, PAGE, at)  # a new page is not mapped yet
            self.loaded[number] = page = Page(number, data)
            if 0 < page.oldest < self.now - self.settings.peer_ttl:
                self._forget_expired(page)
        return page

    def _view(self, number):
        """Return (data, start, bounds) of a page without its expired peers.

        The page begins at ``start`` in ``data``, and has these Page.bounds. The data is
        the mapped file if possible: to copy a page of a large swarm takes 1 µs.
        """
        if not number:
            return self.first.data, 0, self.first.bounds()
        at = number * PAGE
        if self.map and at < len(self.map) and number not in self.loaded:
            magic, peers, leechers, *_, oldest = _PAGE_HEAD.unpack_from(self.map, at)
            is_current = not 0 < oldest < self.now - self.settings.peer_ttl
            if is_current and magic == MAGIC and leechers <= peers <= SLOTS:
                return self.map, at, (0, leechers, peers)
        page = self._page(number)
        return page.data, 0, page.bounds()

    def _all_pages(self):
        """Yield all pages; keep only one of them in memory."""
        for number in range(self.pages):
            self.loaded.clear()
            yield self._page(number)

    def _forget_expired(self, page):
        """Forget the expired endpoints in a page, and peers left without one.

        A peer seen in the future counts as seen now: the clock was set back.
        """
        for slot in reversed(range(page.peers)):
            record = page[slot]
            current = unexpired(record, self.now - self.settings.peer_ttl, self.now)
            if current is None:
                page.remove(slot)
            elif current != record:
                page[slot] = current
        page.oldest = min(filter(None, page.seen()), default=0)
        self._save(page)

    def _recount(self):
        """Go through all pages: forget, count, and merge pages that are not needed.

        After a kill a peer may be in two pages. It stays in one where it belongs.
        """
        is_torn, met = self.state == CHANGING, set()
        with self._changing():
            tally = 0, 0, 0
            for page in self._all_pages():
                if max(page.seen(), default=0) > self.now:  # the clock was set back
                    self._forget_expired(page)
                for slot in reversed(range(page.peers)) if is_torn else ():
                    peer_id = page[slot].peer_id
                    if peer_id in met or page.number not in self._homes(peer_id):
                        page.remove(slot)
                    else:
                        met.add(peer_id)
                if page.counts() != page.counted:
                    self._save(page)
                tally = tuple(map(add, tally, page.counts()))
            self.tally = tally
            while self.pages > 1 and self.tally[0] < self.pages * SPARSE:
                self._merge()
            self.recount_at = self.now + self.settings.peer_ttl // RECOUNTS
            self._write_head()
            os.ftruncate(self.fd, self.pages * PAGE)
            self.map = None  # it may be longer than the file
        self.loaded.clear()

    def _count(self, page):
        """Add the changes of a page to the swarm's counts."""
        changes = zip(self.tally, page.counts(), page.counted, strict=True)
        self.tally = [max(0, total + new - old) for total, new, old in changes]
        page.counted = page.counts()

    def _save(self, page):
        """Write a changed page, and the head if the counts change with it."""
        self._count(page)
        is_alone = page is self.first or self._head() == self.head[_PAGE_HEAD.size :]
        if is_alone or self.state == CHANGING:
            self._write(page)
        else:
            with self._changing():
                self._write(page)

    @contextmanager
    def _changing(self):
        """Mark the file as changing while several pages are written.

        If the process is killed meanwhile, the next process recounts the swarm.
        """
        self.state = CHANGING
        self._write_head()
        yield
        self.state = QUIET
        self._write_head()

    def _write(self, page):
        """Write a page, and with page 0 the head; raise DamagedError.

        This is one write: after a kill the file has all of it or nothing.
        """
        if not 0 <= page.partial_seeds <= page.leechers:
            raise DamagedError(f"page {page.number} miscounts its partial seeds")
        head = _PAGE_HEAD.pack(MAGIC, *page.counts(), page.number, page.oldest)
        if page is self.first:
            head += self._head()
            self.head, self.due = head, 0
        page.data = head + page.data[len(head) : PAGE]  # bytes again, as replies are
        write_at(self.fd, page.data, page.number * PAGE)

    def _write_head(self):
        """Write the head alone: _renew changes a page in the file, not in memory."""
        head = self._head()
        self.head, self.due = self.head[: _PAGE_HEAD.size] + head, 0
        write_at(self.fd, head, _PAGE_HEAD.size)

    def _head(self):
        """Return the head of the swarm, with its checksum."""
        self.emptied = 0 if self.tally[0] else self.emptied or self.now
        head = _SWARM_HEAD.pack(
            *(self.info_hash, self.salt, self.pages, *self.tally),
            *(self.snatches, self.recount_at, self.emptied, self.state),
        )
        return head + checksum(head)


class Page:
    """Up to 70 peers in columns, first the leechers and then the seeders.

    Because of the columns, a reply is a slice: neighbouring slots are neighbouring
    endpoints. A page knows nothing of files. FileStore documents its bytes.
    """

    def __init__(self, number, data):
        """Read page ``number`` from 4096 bytes; raise DamagedError if it is corrupt."""
        if len(data) != PAGE:
            raise DamagedError(f"page {number} is cut short")
        head = _PAGE_HEAD.unpack_from(data)
        magic, peers, leechers, partial_seeds, stored, self.oldest = head
        if magic != MAGIC or stored != number:
            raise DamagedError(f"page {number} does not begin with {MAGIC!r}")
        if not partial_seeds <= leechers <= peers <= SLOTS:
            raise DamagedError(f"page {number} has impossible counts")
        self.number, self.data = number, data
        self.peers, self.leechers, self.partial_seeds = peers, leechers, partial_seeds
        self.counted = head[1:4]  # what the swarm's counts include of this page

    def counts(self):
        """Return (peers, leechers among them, partial seeds among the leechers)."""
        return self.peers, self.leechers, self.partial_seeds

    def bounds(self):
        """Return the slots where leechers begin, seeders begin, and seeders end."""
        return 0, self.leechers, self.peers

    def __getitem__(self, slot):
        data, at4, at6 = self.data, _ENDS4 + slot * 6, _ENDS6 + slot * 18
        fields = _RECORD.unpack_from(data, _RECORDS + slot * _RECORD.size)
        return Record(*fields, bytes(data[at4 : at4 + 6]), bytes(data[at6 : at6 + 18]))

    def __setitem__(self, slot, record):
        if not isinstance(self.data, bytearray):  # most pages are only read
            self.data = bytearray(self.data[:PAGE])
        data, at4, at6 = self.data, _ENDS4 + slot * 6, _ENDS6 + slot * 18
        _RECORD.pack_into(data, _RECORDS + slot * _RECORD.size, *record[:5])
        data[at4 : at4 + 6], data[at6 : at6 + 18] = record[5:]

    def __iter__(self):
        """Yield (Record, is_seeder)."""
        for slot in range(self.peers):
            yield self[slot], slot >= self.leechers

    def add(self, record, is_seeder):
        """Add a peer; the page must have room for it."""
        slot = self.peers
        self.peers += 1
        if not is_seeder:
            self[slot] = self[self.leechers]  # the first seeder moves behind the last
            slot = self.leechers
            self.leechers += 1
            self.partial_seeds += record.state & PARTIAL
        self[slot] = record
        self.oldest = min(filter(None, (record.seen4, record.seen6, self.oldest)))

    def remove(self, slot):
        """Remove a peer and return its Record; slots below ``slot`` do not change."""
        record = self[slot]
        self.peers -= 1
        if slot < self.leechers:
            self.leechers -= 1
            self.partial_seeds -= record.state & PARTIAL
            self[slot] = self[self.leechers]
            slot = self.leechers
        self[slot] = self[self.peers]
        return record

    def seen(self):
        """Return seen4 and seen6 of each slot, in one flat tuple."""
        return _SEEN.unpack_from(self.data, _RECORDS)[: 2 * self.peers]

    def count_from(self, address):
        """Return how many peers have an IPv4 address, or the /48 of an IPv6 one."""
        is_v4 = len(address) == 4
        fields, at = (_ADDRESSES4, _ENDS4) if is_v4 else (_PREFIXES6, _ENDS6)
        sources = fields.unpack_from(self.data, at)
        return sources[: self.peers].count(address[:6])


def columns_of(data, start, slot, stop, own, with_ids):
    """Return the columns of Peers for slots from ``slot`` to before ``stop``.

    The page begins at ``start`` in ``data``. ``own`` says which families are wanted.
    """
    own4, own6 = own
    ids, at4, at6 = b"", start + _ENDS4, start + _ENDS6
    if with_ids:
        ids = b"".join(_IDS.unpack_from(data, start + _RECORDS)[slot:stop])
    ends4 = data[at4 + slot * 6 : at4 + stop * 6] if own4 else b""
    ends6 = data[at6 + slot * 18 : at6 + stop * 18] if own6 else b""
    return ids, ends4, ends6


def usable_peers(ids, ends4, ends6, own):
    """Return how many peers a peer with the endpoints ``own`` can use.

    The columns of those peers follow in the result. The peer itself is left out.
    """
    own4, own6 = own
    # 1. A zero byte there means a port below 256, or none. If there is no zero in one
    #    family, all peers can be reached. If not, leave out peers that have no port.
    if not (own4 and 0 not in ends4[4::6] or own6 and 0 not in ends6[16::18]):
        ports4 = map(or_, ends4[4::6], ends4[5::6])
        ports6 = map(or_, ends6[16::18], ends6[17::18])
        slots = [i for i, ports in enumerate(zip_longest(ports4, ports6)) if any(ports)]
        ids, ends4, ends6 = peers_at(slots, ids, ends4, ends6)
    pool = len(ends4) // 6 or len(ends6) // 18
    # 2. Behind a proxy without a port, other peers may have the same endpoint.
    while (slot := find_item(ends4, own4, 6)) >= 0 or (
        own6 and (slot := find_item(ends6, own6, 18)) >= 0
    ):
        pool -= 1
        ids, ends4, ends6 = run_of_peers(slot + 1, pool, ids, ends4, ends6)
    return pool, ids, ends4, ends6


def peers_at(slots, ids, ends4, ends6):
    """Return the columns of the peers in some slots of the columns."""
    return (
        b"".join([column[i * width : (i + 1) * width] for i in slots])
        for column, width in ((ids, 20), (ends4, 6), (ends6, 18))
    )


def is_crowded(column, width):
    """Return True if an address or a /48 has more than its share of a reply.

    The last byte of most addresses differs, so a look at that is enough, in 1 µs for 50
    endpoints. Zeros are no endpoint.
    """
    number, size = len(column) // width, 4 if width == 6 else 6
    most = max(FEW, number // 4)
    if number - len({*column[size - 1 :: width]}) < most:
        return False
    sources = Counter(endpoint[:size] for endpoint in chunks(column, width))
    return any(sources[each] > most for each in sources if any(each))


def spread(wanted, ids, ends4, ends6):
    """Return up to ``wanted`` peers of the columns, the first ones that fit.

    An address or an IPv6 /48 gets at most a quarter of them, or FEW peers, while there
    are others.
    """
    pairs = zip_longest(chunks(ends4, 6), chunks(ends6, 18), fillvalue=b"")
    sources = [[*filter(any, (end4[:4], end6[:6]))] for end4, end6 in pairs]
    totals = Counter(chain.from_iterable(sources))
    most = max(totals.values(), default=0)
    share = wanted if most == len(sources) else wanted // 4
    while True:
        most, counts, slots = max(FEW, share), Counter(), []
        for slot, of_peer in enumerate(sources):
            if len(slots) < wanted and all(counts[each] < most for each in of_peer):
                counts.update(of_peer)
                slots.append(slot)
        share = len(slots) // 4
        if most <= max(FEW, share) or most == wanted:
            return peers_at(slots, ids, ends4, ends6)


def find_item(column, wanted, width):
    """Return the number of the first item that begins with ``wanted``, or -1.

    ``width`` is the length of an item in bytes. An empty ``wanted`` is not found.
    """
    at = column.find(wanted) if wanted else -1
    while at % width and at >= 0:  # a match across two items
        at = column.find(wanted, at + 1)
    return at // width if at >= 0 else -1


def run_of_peers(first, count, ids, ends4, ends6):
    """Return ``count`` peers of the columns from ``first`` on, past the end too."""
    last = first + count
    return (
        ids and (ids + ids)[first * 20 : last * 20],
        ends4 and (ends4 + ends4)[first * 6 : last * 6],
        ends6 and (ends6 + ends6)[first * 18 : last * 18],
    )


def counts_of(peers, leechers, partial_seeds, snatches):
    return Counts(peers - leechers, leechers, partial_seeds, snatches)


def is_seeder(announce):
    """Return True if an Announce says that the peer has the whole torrent."""
    return announce.left == 0 or announce.left is None and announce.event == "completed"


def is_loopback(address):
    return address[:1] == b"\x7f" or address == _LOOPBACK6


def endpoint_of(announce):
    """Return the endpoint of an Announce: 6 or 18 bytes."""
    # Nothing can connect to ports 0 and 1: libtorrent sends 1 behind a proxy.
    port = announce.port if announce.port > 1 else 0
    return announce.address + port.to_bytes(2, "big")


def key_after(announce, key, known, other):
    """Return the key of a peer after an Announce with its peer_id.

    ``known`` is its endpoint in this family, ``other`` the one in the other family. A
    client keeps its key when it moves (BEP 7), and its address when it restarts. If
    both differ, raise TrackerError, because another client uses this peer_id.
    qBittorrent 4.2 has one key for each family, so a family without an endpoint is
    free. But that is not enough to change the key, or to stop the peer.
    """
    is_here, has_key = known[:-2] == announce.address, key == announce.key
    if is_here and not any(other):
        return announce.key
    may_announce = has_key or is_here or not any(known)
    may_stop = has_key and (is_here or key)
    if not (may_stop if announce.event == "stopped" else may_announce):
        raise refusal("key")
    return key


def refusal(cause, settings=None):
    """Return the TrackerError for a client that is not kept because of ``cause``."""
    if cause == "key":
        reason = "peer_id is in use with another key: restart your client"
        return TrackerError(reason, kind="key")
    reason = f"this tracker is full: it tracks {settings.max_swarms} torrents already"
    if cause == "address":
        most = settings.max_peers_per_address
        reason = f"your address has {most} peers in this swarm already"
    return TrackerError(reason, kind="full")


def updated(old, announce, now, progress):
    """Return the Record of a peer after an announce."""
    state = old.state & SNATCHED | progress * PROGRESS
    if announce.event == "paused" and not is_seeder(announce):
        state |= PARTIAL  # BEP 21
    known = old._replace(peer_id=announce.peer_id, key=announce.key, state=state)
    if len(announce.address) == 4:
        return known._replace(seen4=now, endpoint4=endpoint_of(announce))
    return known._replace(seen6=now, endpoint6=endpoint_of(announce))


def unexpired(record, cutoff, now):
    """Return a Record without expired endpoints, or None if none is left.

    An endpoint has expired if it was last seen before ``cutoff``. If it was seen after
    ``now``, it counts as seen now.
    """
    seen4 = min(record.seen4, now) if record.seen4 >= cutoff else 0
    seen6 = min(record.seen6, now) if record.seen6 >= cutoff else 0
    if not (seen4 or seen6):
        return None
    endpoint4 = record.endpoint4 if seen4 else _NO_ENDPOINT4
    endpoint6 = record.endpoint6 if seen6 else _NO_ENDPOINT6
    return Record(*record[:3], seen4, seen6, endpoint4, endpoint6)


def file_system(folder):
    """Return the type of the file system of a folder, "" if it is unknown."""
    path, best, kind = os.path.realpath(folder) + "/", "", ""
    with suppress(OSError), open(MOUNTS, encoding="utf-8") as mounts:
        for line in mounts:
            point = line.split()[1].rstrip("/") + "/"
            if path.startswith(point) and len(point) >= len(best):
                best, kind = point, line.split()[2]
    return kind


def checksum(data):
    """Return the CRC-32 of ``data`` as 4 bytes."""
    return zlib.crc32(data).to_bytes(4, "little")


def write_at(fd, data, at):
    """Write bytes at an offset; raise OSError if the disk has no room for them."""
    if os.pwrite(fd, data, at) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- Redis store ----------------------------------------------------------------------
# The contract over Redis or Valkey, for trackers on many machines that share peers.

REDIS_SCRIPT = """
local I, P, T, call, sub = KEYS[1], KEYS[2], KEYS[3], redis.call, string.sub
local id, e, a = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
local NONE = {[6] = string.rep('\\0', 6), [7] = string.rep('\\0', 18)}
local FORM, SIZE = '<c20I4BI4I4c6c18', 57
local now, ttl = a.now or tonumber(call('time')[1]), a.ttl
local stopped = a.event == 'stopped'
local n = call('hmget', I, 'p', 'l', 'd', 's')  -- see RedisStore
for i = 1, 4 do n[i] = tonumber(n[i] or 0) end

local function get(from, to)
  return from < to and call('getrange', P, from * SIZE, to * SIZE - 1) or ''
end
local function read(at) return {struct.unpack(FORM, get(at, at + 1))} end
local function put(at, record)
  call('setrange', P, at * SIZE, record)
  call('hset', I, sub(record, 1, 20), at)
end
local function move(from, to) if from ~= to then put(to, get(from, from + 1)) end end
local function run(from, to, most)  -- from a random peer on, past the end too
  local first = from + math.floor(a.chance * (to - from))
  local last = first + math.min(most, to - from)
  return get(first, math.min(last, to)) .. get(from, from + last - to)
end
local function source(e) return 'a' .. sub(e, 1, #e == 6 and 4 or 6) end
local function tally(r, by)  -- the endpoints of a record come or go
  for f = 6, 7 do
    local e, from = r[f], source(r[f])
    if e ~= NONE[f] then
      if call('hincrby', I, from, by) < 1 then call('hdel', I, from) end
      if by < 0 and call('hget', I, e) == r[1] then call('hdel', I, e)
      elseif by > 0 and sub(e, -2) ~= '\\0\\0' then call('hset', I, e, r[1]) end
    end
  end
end
local function remove(id)  -- the last leecher and the last seeder fill the gaps
  local at = tonumber(call('hget', I, id))
  local r, leeches = read(at), at < n[2]
  call('hdel', I, id)  -- Redis allows this with a full memory, and then the rest
  call('zrem', T, id)
  tally(r, -1)
  if leeches then
    n[2], n[3] = n[2] - 1, n[3] - r[3] % 2
    move(n[2], at)
    at = n[2]
  end
  n[1] = n[1] - 1
  move(n[1], at)
  return r[3], leeches
end
local function save()
  if n[1] == 0 then call('unlink', I, P, T) end
  if n[1] + n[4] == 0 then return end
  call('hset', I, 'p', n[1], 'l', n[2], 'd', n[3], 's', n[4])
  call('expire', I, ttl + (n[4] > 0 and a.kept or 120))
  call('expire', P, ttl + 120)
  call('expire', T, ttl + 120)
end

-- 1. Forget expired peers: all at once, or some of many.
local newest = tonumber(call('zrevrange', T, 0, 0, 'withscores')[2] or 0)
if n[1] > 0 and newest < now - ttl or a.what == 'retire' then
  n = {0, 0, 0, a.what == 'retire' and 0 or n[4]}
  save()
end
local gone = call('zrangebyscore', T, '-inf', '(' .. now - ttl, 'limit', 0, 50)
for _, each in ipairs(gone) do remove(each) end
if #gone > 0 then save() end
if a.swarms > 0 and n[1] + n[4] == 0 and call('dbsize') >= 3 * a.swarms then
  return {'swarms'}
elseif a.what == 'raise_snatches' then
  n[4] = math.max(n[4], a.snatches)
  save()
end
n[5], n[6], n[7], n[8] = now, newest, NONE[6], NONE[7]
n[9] = a.what == 'records' and get(0, n[1]) or ''
if a.what ~= 'announce' then return n end
-- 2. Find the peer's record, and forget the endpoint in it that has expired.
local at, changed, leeches, owner = call('hget', I, id), stopped, false, false
local r = {id, a.key, 0, 0, 0, NONE[6], NONE[7]}
if at then
  at = tonumber(at)
  r, leeches = read(at), at < n[2]
  for f = 6, 7 do
    local old = r[f - 2] > 0 and r[f - 2] < now - ttl
    if old then r[f - 2], r[f], changed = 0, NONE[f], true end
  end
elseif stopped then return n end
-- 3. Is it this peer's client? See key_after.
local f = #e == 6 and 6 or 7
local known, other, same = r[f], r[13 - f], r[2] == a.key
local here, fresh = sub(known, 1, -3) == sub(e, 1, -3), known == NONE[f]
if here and other == NONE[13 - f] then r[2] = a.key
elseif stopped and not (same and (here or a.key > 0)) then return {'key'}
elseif not (stopped or same or here or fresh) then return {'key'} end
-- 4. Look for another peer that has this endpoint, and at the limits.
if known ~= e and not stopped then
  changed = true
  if sub(e, -2) ~= '\\0\\0' then owner = call('hget', I, e) end
  if owner == id then owner = false end
  local others = not (owner or here) and tonumber(call('hget', I, source(e)) or 0)
  if others and a.each > 0 and others >= a.each then return {'address'} end
end
r[f], r[f - 2] = e, now
if at or owner or a.most == 0 or n[1] < a.most then
  -- 5. Remove that peer, and count a snatch.
  local had, partial = r[3], r[3] % 2
  if owner then
    local state, leeched = remove(owner)
    had, leeches = bit.bor(had, state), leeches or leeched and not at
  end
  had = bit.band(had, 2)
  local has = a.seeder and leeches and 2 or had
  n[4], r[3] = n[4] + (has - had) / 2, has + a.bits
  -- 6. Write the record in its place, or remove it and add it where it belongs.
  local record = struct.pack(FORM, unpack(r, 1, 7))
  if at and not changed and leeches ~= a.seeder and partial == a.bits % 2 then
    call('setrange', P, at * SIZE, record)
  else
    if at then remove(id) end
    if not stopped then
      at, n[1] = n[1], n[1] + 1
      if not a.seeder then  -- the first seeder makes room
        move(n[2], at)
        at, n[2], n[3] = n[2], n[2] + 1, n[3] + a.bits % 2
      end
      put(at, record)
      tally(r, 1)
    end
  end
  if not stopped then call('zadd', T, now, id) end
  save()
end
if stopped then return n end
-- 7. Choose peers. A new seeder gets seeders behind the leechers.
n[7], n[8], n[9] = r[6], r[7], run(0, a.seeder and n[2] or n[1], a.want)
if a.seeder and a.want > n[2] and (fresh or a.event == 'started') then
  n[9] = n[9] .. run(n[2], n[1], a.want - n[2])
end
return n
"""
_WHOLE = struct.Struct("<20sIBII6s18s")  # a Record


class RedisStore(FileStore):
    """Peers in Redis or Valkey. A script does there what the methods of Swarm do.

    A swarm has three keys, in one slot of a Cluster: bb:{INFO_HASH}:i, :p and :t.

        i  hash: p, l, d and s are the peers, leechers, partial seeds and snatches; by
           peer_id the number of its Record, by endpoint its peer_id, by "a" and an
           address or a /48 how many endpoints
        p  string of Records, 57 bytes each, numbers little-endian, first the leechers
        t  sorted set of peer_ids by their last announce

    An announce is one call of the script, so a tracker that is killed leaves nothing
    half done. With a full memory, or read-only, Redis refuses the first change. The
    time is the engine's: the clocks of hosts differ. Each call forgets 50 expired
    peers, or all if all have expired. The keys of a swarm without announces expire.
    max_swarms is a third of the keys in the database, or in a Cluster's node.
    """

    has_clock = True  # the engine has the time

    def __init__(self, url, folder, settings):
        """Use the engine at ``url`` when it is needed. Raise SettingsError."""
        try:
            import redis
        except ImportError:
            install = f"{sys.executable} -m pip install redis"
            raise SettingsError(f"store needs a package. Run: {install}") from None
        self.folder, self.settings, self._redis = str(folder), settings, redis
        self.place, self._client = url.rpartition("@")[2], None
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), 1)
        options = {"socket_timeout": 1, "socket_connect_timeout": 1, "retry": retry}
        self._connect = lambda kind: kind.from_url(url, **options)

    @contextmanager
    def engine(self):
        """Give the client of redis-py; its errors become OSError."""
        redis = self._redis
        try:
            if not self._client:
                client = self._connect(redis.Redis)
                if client.info("cluster")["cluster_enabled"]:
                    client = self._connect(redis.RedisCluster)
                self._script = client.register_script(REDIS_SCRIPT)
                self._client = client
            yield self._client
        except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
            raise OSError(errno.EIO, f"{self.place}: {error}") from None

    def announce(self, announce, wanted, now, progress=0):
        """Do what FileStore.announce says."""
        a, s, seeder = announce, self.settings, is_seeder(announce)
        is_local, partial = is_loopback(a.address), a.event == "paused" and not seeder
        each = 0 if is_local else s.max_peers_per_address
        more = {"event": a.event, "key": a.key, "most": s.max_peers, "each": each}
        more |= {"seeder": seeder, "bits": progress * PROGRESS + partial}
        given = a.info_hash, now, a.event != "stopped", "announce", a.peer_id
        # One may be the peer itself. Among sixteen times as many are enough others.
        for many in (wanted + 1, 16 * wanted):
            more |= {"want": many, "chance": random()}
            found = self._call(*given, endpoint_of(a), **more)
            counts, (seconds, _, *ends, records) = found[:4], found[4:]
            own = [end if any(end) else b"" for end in ends]
            count, *columns = usable_records(records, own, seconds - s.peer_ttl)
            peers = run_of_peers(0, min(wanted, count), *columns)
            is_crowd = not is_local and any(map(is_crowded, peers[1:], (6, 18)))
            is_all = len(records) < many * _WHOLE.size
            if is_all or count >= wanted and not is_crowd:
                break
        ids, *ends = spread(wanted, *columns) if is_crowd else peers
        return counts_of(*counts), Peers(b"" if a.compact else ids, *ends)

    def tidy(self, now, is_full=False):
        """Do nothing: keys expire in the engine."""

    def probe(self):
        """Raise OSError if the engine cannot keep peers."""
        with self.engine() as client:
            client.set("bb:probe", 1, 60)

    def _count_swarms(self, change=None):
        return 0, 0  # walks count them

    def _walk(self, folders, now, work):
        with self.engine() as client:
            keys = {*client.scan_iter("bb:{*}:i", 1000)}
        for info_hash in [bytes.fromhex(key[4:44].decode()) for key in sorted(keys)]:
            yield info_hash, self._visit(info_hash, now, False, work)

    def _visit(self, info_hash, now, create, work, snatches=0):
        """Return what a method of Swarm returns."""
        given = info_hash, now, create, work.__name__
        *counts, seconds, seen, _, _, records = self._call(*given, snatches=snatches)
        if work is Swarm.records:
            rows, cutoff = _WHOLE.iter_unpack(records), seconds - self.settings.peer_ttl
            live = enumerate(unexpired(Record(*row), cutoff, seconds) for row in rows)
            return counts[3], [[(each, at >= counts[1]) for at, each in live if each]]
        if work is Swarm.last_seen:
            return seen
        return counts_of(*counts) if any(counts) else None

    def _call(self, info_hash, now, create, what, peer_id="", endpoint="", **more):
        """Return what the script returns; raise TrackerError."""
        s, most = self.settings, self.settings.max_swarms * create
        more |= {"what": what, "ttl": s.peer_ttl, "kept": s.swarm_ttl, "swarms": most}
        if not self.has_clock:
            more["now"] = now
        keys = [f"bb:{{{info_hash.hex()}}}:{each}" for each in "ipt"]
        with self.engine() as client:
            found = self._script(keys, [peer_id, endpoint, json.dumps(more)], client)
        if isinstance(found[0], bytes):
            raise refusal(found[0].decode(), s)
        return found


def usable_records(records, own, cutoff):
    """Return what usable_peers does, for Records one after the other as bytes."""
    no4, no6 = bytes(6), bytes(18)
    rows = [
        (peer_id, end4 if seen4 >= cutoff else no4, end6 if seen6 >= cutoff else no6)
        for peer_id, _, _, seen4, seen6, end4, end6 in _WHOLE.iter_unpack(records)
        if end4 != own[0] and end6 != own[1]
    ]
    ids, ends4, ends6 = map(b"".join, zip(*rows, strict=True)) if rows else NO_PEERS
    return usable_peers(ids, own[0] and ends4, own[1] and ends6, own)


is_cgi = __name__ == "__main__" and "GATEWAY_INTERFACE" in os.environ
if is_cgi:
    from wsgiref.handlers import CGIHandler  # only CGI needs it
if is_cgi and request_kind(os.environ.get("PATH_INFO", "")):
    # To import Flask takes three times as long as everything above.
    try:
        tracker = Tracker(load_settings())
    except SettingsError as error:
        sys.exit(f"app.py: {error}")  # for the web server's error log
    CGIHandler().run(TrackerApp(tracker, pages=None))
    sys.exit()

# Flask from here on: an announce by CGI has ended above.

import io  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
from http.client import HTTPConnection, HTTPSConnection  # noqa: E402
from tempfile import NamedTemporaryFile, mkdtemp  # noqa: E402

import click  # noqa: E402
import flask  # noqa: E402
from flask import Blueprint, current_app, render_template, request  # noqa: E402
from flask.logging import default_handler, has_level_handler  # noqa: E402
from jinja2 import DictLoader  # noqa: E402
from markupsafe import Markup, escape  # noqa: E402
from werkzeug import exceptions  # noqa: E402
from werkzeug.http import http_date  # noqa: E402
from werkzeug.middleware.proxy_fix import ProxyFix  # noqa: E402
from werkzeug.urls import iri_to_uri  # noqa: E402

# -- Templates ------------------------------------------------------------------------
# The style sheet and the pages. They need no script and load nothing, which the header
# Content-Security-Policy enforces. Jinja escapes all values in .html and .xml.

ICON = """data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='20'\
 viewBox='0 0 16 16' fill='none' stroke='%232a7ae2' stroke-width='1.5'><path d='"""
STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --back: #fff; --faint: #59636e;
  --line: #d8dee4; --link: #0b57a8; --good: #1a7f37; --some: #8a5a00; --bad: #b3261e;
  --soft: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --back: #14181c; --faint: #a3adb7; --line: #333b44;
    --link: #82b8ff; --good: #57c878; --some: #e0a83a; --bad: #ff938a;
    --soft: #1f252b } }
body { margin: 0 auto; padding: 0 1rem 1rem; max-width: 68rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
p a, dd a, .block a { text-decoration: underline }
a:focus-visible, summary:focus-visible { outline: 2px solid; outline-offset: 2px }
h1, h2 { margin: 1.5rem 0 .5rem; line-height: 1.25 } h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem }
header, nav, form, .numbers { display: flex; flex-wrap: wrap; align-items: center;
  gap: .25rem 1rem }
header { padding: .75rem 0; border-bottom: 1px solid var(--line) }
header form { flex: 1 1 12rem; flex-wrap: nowrap; gap: .4rem }
header input { min-width: 0; flex: 1 }
.name { margin: 0; font-size: 1.25rem; font-weight: 700; color: var(--text) }
nav a, summary { padding: .25rem 0 } summary { color: var(--link); cursor: pointer }
.numbers { margin: .5rem 0; color: var(--faint) } .numbers dd { color: var(--text) }
.numbers div { display: flex; flex-direction: row-reverse; gap: .35rem }
.numbers .text { flex-direction: row }
dd { margin: 0; font-weight: 600 } .about dd { font-weight: 400 }
.good { color: var(--good) } .some { color: var(--some) } .bad { color: var(--bad) }
dt, label, small, .faint, .faint a { color: var(--faint) }
code { user-select: all } .url { margin: .5rem 0; padding: .4rem .75rem;
  background: var(--soft); border-radius: .3rem }
.block { padding: .75rem; background: var(--soft); white-space: pre-wrap }
.plain { padding: 0; list-style: none }
.note { margin: .75rem 0; padding: .25rem .75rem; border-left: .4rem solid var(--good) }
.warning { border-color: #d08700 } .failure { border-color: #c8281e }
.chips { gap: .4rem; margin: .75rem 0 } .chips a { padding: .2rem .7rem;
  border: 1px solid var(--line); border-radius: 1rem }
.chips [aria-current] { color: var(--back); background: var(--link) }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem }
.button { padding: .5rem 1rem; border: 1px solid; border-radius: .3rem }
main form { align-items: end; margin: 1rem 0 }
label { display: grid; font-size: .875rem }
input, button { box-sizing: border-box; height: 2.5rem; padding: 0 .7rem; font: inherit;
  color: var(--text); background: var(--back); border: 1px solid var(--faint);
  border-radius: .3rem } [type=file] { padding: .4rem; max-width: 100% }
svg { display: block; width: 100%; height: auto }
td a, small { unicode-bidi: plaintext }
td [title] { display: inline-block; height: 1.5rem; padding: 0 .3rem }
[title=Magnet]::before {
 content: url("ICONM2 2h4v6a2 2 0 0 0 4 0V2h4v6a6 6 0 0 1-12 0zM2 5h4m4 0h4'/></svg>") }
[title=Download]::before { content: url("ICONM8 1v9M4 6l4 4 4-4M2 14h12'/></svg>") }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
tr { border-bottom: 1px solid var(--line) } th { font-weight: 600; font-size: .875rem }
th, td { padding: .45rem .5rem; text-align: right; white-space: nowrap }
tr > :first-child { width: 100%; padding-left: 0; text-align: left;
  white-space: normal }
@media (max-width: 44rem) { tr { display: flex; flex-wrap: wrap; padding: .5rem 0 }
  th, td { padding: 0 1rem 0 0 }
  td::before { color: var(--faint) } td:nth-child(3)::before { content: "seeders " }
  td:nth-child(4)::before { content: "leechers " }
  td:nth-child(5)::before { content: "completed " }
  td:nth-child(6)::before { content: "added " }
  tr > th:first-child { width: auto }
  td a, th a { display: inline-block; padding: .25rem 0 }
  .about { display: block } .about dd { margin-bottom: .6rem } }
@media print { header form, nav, details, svg, .button { display: none } }
footer { margin-top: 3rem }
footer a { display: inline-block; padding: .15rem .75rem .15rem 0 }
""".replace("ICON", ICON)

TEMPLATES = {
    "base.html": """\
{% set settings = tracker.settings -%}
{% set root = request.script_root | urlencode ~ "/" -%} {# where it is mounted -#}
{% set site = site_url() -%}
{% set is_shown = member() or not settings.private -%}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% if heading %}{{ heading }} - {% endif %}{{ settings.title }}</title>
<link rel="icon"
 href="ICONM1 5h9a2 2 0 1 0-2-2M1 8h12M1 11h7a2 2 0 1 1-2 2'/></svg>">
{% if feed %}<link rel="alternate" type="application/rss+xml"
 title="{{ settings.title }}" href="{{ root }}{{ feed }}">{% endif %}
<style>{{ style | safe }}</style>
<header>
{% if heading %}<a class="name" href="{{ root }}">{{ settings.title }}</a>
{% else %}<h1 class="name"><bdi>{{ settings.title }}</bdi></h1>{% endif %}
{% if is_shown and tracker.catalogue.torrents %}
<form role="search" action="{{ root }}">
<input type="search" name="q" value="{{ query.q if query }}" maxlength="200"
 aria-label="Search torrents" placeholder="Search torrents">
{% for field in ("category", "sort") if query and query[field] -%}
<input type="hidden" name="{{ field }}" value="{{ query[field] }}">{% endfor %}
<button>Search</button></form>
<nav aria-label="Site"><a href="{{ root }}">Torrents</a>
<a href="{{ root }}feed.xml">Feed</a>{% endif %}
{% if member().can_publish %}<a href="{{ root }}#publish">Publish</a>{% endif %}
</nav></header><main>
{% block intro %}{% endblock %}
{% if heading %}<h1><bdi>{{ heading | soft }}</bdi></h1>{% endif %}
{% if numbers %}<dl class="numbers">
{% for name, number in numbers.items() -%}
<div{{ " class=text" if number is string }}><dt>{{ name }}</dt><dd>
{{- number if number is string else "{:,}".format(number) }}</dd></div>
{% endfor %}</dl>{% endif %}
{% block main %}<p>{{ text }}</p>
{% if is_shown %}<p><a href="{{ root }}">Go to the front page</a></p>{% endif %}
{% endblock %}
</main>
<footer class="faint">{% block footer %}{% endblock %}BitBreeze VERSION</footer>
""".replace("ICON", ICON).replace("VERSION", __version__),
    "front.html": """\
{% extends "base.html" %}
{% block intro %}
{% if settings.notice %}<p class="note warning">{{ settings.notice }}</p>{% endif %}
{% if not heading %}<p class="faint">
{% if tracker.catalogue.is_open %}This tracker is open: it tracks any
torrent that clients announce.{% else %}This tracker tracks only the torrents on its
list.{% endif %}
{% if settings.private %}It is for members only.{% endif %} Announce URL:</p>
{% for url in announce_urls(site) -%}
<p class="url"><code>{{ url }}</code></p>
{% endfor %}
<details><summary>What this is, and how to download</summary>
<p>This is a BitTorrent tracker. It helps people who share the same torrent find each
other. It does not host any files.</p>
<p>To download, you need a BitTorrent client, such as qBittorrent, Transmission or
Deluge. Click on the magnet of a torrent, or open its .torrent file in the client.</p>
</details>
<details><summary>How to share here</summary><ol>
<li>In your client, make a torrent from a file or folder.</li>
<li>Enter the announce URL above as its tracker.
{% if settings.private %}It contains your key, so keep it to yourself.{% endif %}</li>
{% if not tracker.catalogue.is_open %}<li>{% if member().can_publish %}Publish the
.torrent file below.{% else %}Ask the operator to put the .torrent file on the list.
{% endif %} If your client announced it before, use "Force reannounce".</li>{% endif %}
<li>Leave it in your client, so that it seeds.</li>
<li>Send others the .torrent file, its magnet link, or the address of its page.</li>
</ol></details>{% endif %}
{% endblock %}
{% block main %}
{% if tracker.catalogue.unread %}<p class="note">Torrent files still to read:
{{ tracker.catalogue.unread | length }}</p>{% endif %}
{% if categories %}<nav class="chips" aria-label="Categories">
<a href="{{ root }}"{{ " aria-current=page" if not query.category }}>All</a>
{% for name, number in categories.items() -%}
{% set parent = name.rpartition("/")[0] ~ "/" -%}
{% if parent == "/" or (query.category ~ "/").startswith(parent) -%}
<a href="{{ root }}{{ query.link(category=name, page=1) }}"
{{- " aria-current=page" if name == query.category }}><bdi>{{ name }}</bdi>
 {{ number }}</a>
{% endif %}{% endfor %}</nav>{% endif %}
{% if rows %}<table><thead><tr>
{% for key, (name, _) in columns.items() -%}
{% set is_up, is_down = query.sort == key, query.sort == "-" ~ key -%}
{% set next = key if is_down or key == "name" and not is_up else "-" ~ key -%}
<th scope="col"{% if is_up or is_down %} aria-sort="{{ "ascending" if is_up else
 "descending" }}"{% endif %}><a href="{{ root }}{{ query.link(sort=next, page=1) }}">
{{- name }}{{ " ▲" if is_up }}{{ " ▼" if is_down }}</a></th>
{% endfor %}
<th scope="col">Get</th></tr></thead><tbody>
{% for row in rows -%}
{% set counts, link = row.counts, row | magnet_of(site) -%}
<tr><td><a href="{{ root }}torrent/{{ row.id }}">{{ row.name | soft }}</a>
{%- if row.category and row.category != query.category %}<br><small>
{{- row.category }}</small>{% endif %}</td><td>
{{- row.torrent.size | filesizeformat(true) }}</td><td class=
{{- "good" if counts.seeders else "bad" }}>{{ counts.seeders }}</td><td
{{- " class=some" if counts.leechers }}>{{ counts.leechers }}</td><td>
{{- counts.snatches }}</td><td>{{ (row.torrent.added | date_text)[:10] }}</td><td>
{%- if link %}<a href="{{ link }}" title=Magnet></a>
{%- endif %}<a href="{{ root }}torrent/{{ row.id }}.torrent" title=Download></a>
{% endfor %}
</tbody></table>
<nav aria-label="Pages">
{% set page = query.page -%}
{% if page > 1 %}<a href="{{ root }}{{ query.link(page=page - 1) }}"
 rel="prev">Previous</a>{% endif %}
<span>{{ found }} torrent{{ "s" * (found > 1) }}, page {{ page }} of {{ last }}</span>
{% if page < last %}<a href="{{ root }}{{ query.link(page=page + 1) }}"
 rel="next">Next</a>{% endif %}</nav>
{% elif numbers.torrents %}<p>
{% if query.category and query.category not in categories %}There is no such category.
{% else %}No torrent matches.{% endif %}
<a href="{{ root }}">Show all</a></p>
{% else %}<h2>No torrents are listed yet</h2>
<ul><li>To use this tracker, put its announce URL into your torrent and seed it.
{%- if not tracker.catalogue.is_open %} The torrent must be on the list.{% endif %}</li>
<li>To list a torrent, the operator puts its .torrent file into the folder
 <code>torrents</code>, or gives members keys that can publish.</li>
<li>If clients do not reach the tracker, the operator runs
 <code>python app.py doctor</code>.</li></ul>{% endif %}
{% if member().can_publish %}<h2 id="publish">Publish a torrent</h2>
<form method="post" action="{{ root }}publish" enctype="multipart/form-data">
  <label>Torrent file
    <input type="file" name="torrent" accept=".torrent" required></label>
  <label>Category
    <input name="category" value="{{ query.category }}" maxlength="500"></label>
  <button>Publish</button>
</form>{% endif %}
{% endblock %}
{% block footer %}
{% if numbers.torrents %}<a href="{{ root }}{{ feed }}">RSS feed</a>
<a href="{{ root }}torrents.json">Torrents as JSON</a>{% endif %}
<a href="{{ root }}stats.json">Totals as JSON</a>
<a href="{{ root }}metrics">Prometheus metrics</a>
{% endblock %}
""",
    "torrent.html": """\
{% extends "base.html" %}
{% set torrent, progress = row.torrent, details.progress %}
{% set code = "<code>%s</code>" | safe %}
{% set seen = details.last_seen | date_text if details.last_seen else "never" %}
{% set numbers = {"seeders": row.counts.seeders, "leechers": row.counts.leechers,
  "completed": row.counts.snatches, "last seen": seen} %}
{% if progress.mean is not none %}{% set numbers = dict(numbers,
  progress="{:.0%}".format(progress.mean)) %}{% endif %}
{% block intro %}{% if row.category %}<p><a href="{{ root }}?category=
{{- row.category | urlencode }}"><bdi>{{ row.category }}</bdi></a></p>{% endif %}
{% endblock %}
{% block main %}
{% if not row.counts.seeders %}<p class="bad">No seeders now: a download may have to
wait.</p>{% endif %}
<nav aria-label="Download"><a class="button" href="{{ row.id }}.torrent">Download
.torrent</a>
{% set link = row | magnet_of(site, details.web_seeds) -%}
{% if link %}<a class="button" href="{{ link }}">Magnet link</a>{% endif %}</nav>
{% if torrent.is_private %}<p class="faint">This torrent is private, so it has no magnet
link: clients need its .torrent file. Peers come from this tracker only.</p>{% endif %}
{% for title, text in [("Description", details.description),
  ("Comment", details.comment)] if text -%}
<h2>{{ title }}</h2>
<p class="block" dir="auto">{{ text | linked }}</p>
{% endfor %}
{% if progress.mean is not none %}<h2>Progress of the leechers</h2>
{% set top = progress.leechers | max -%}
<svg role="img" viewBox="0 0 100 12" aria-label="Leechers by tenths of the torrent:
 {{ progress.leechers | join(", ") }}">
{% for number in progress.leechers -%}
<rect x="{{ loop.index0 * 10 }}" y="{{ 12 - 11 * number / top }}" width="9"
 height="{{ 11 * number / top }}" fill="#2a7ae2"/>
{% endfor %}</svg>
<p>Each column counts the leechers in a tenth, from 0% to 100%. On average, they have
{{ "{:.0%}".format(progress.mean) }}.
{% if progress.unknown %}Unknown: {{ progress.unknown }}.{% endif %}</p>{% endif %}
<h2>Files</h2>
<ul class="plain">
{% for file in details.files[:2000] -%}
<li><bdi>{{ file.path | join("/") | visible | soft }}</bdi>
<span class="faint">{{ file.size | filesizeformat(true) }}</span></li>
{% endfor %}</ul>
{% if details.files[2000:] %}<p><a href="{{ row.id }}.json">All
{{ "{:,}".format(details.files | length) }} files as JSON</a></p>{% endif %}
<details><summary>Details</summary><dl class="about">
{% for name, text in [
  ("Size", torrent.size | filesizeformat(true) ~ " ({:,} bytes)".format(torrent.size)),
  ("Piece size", details.piece_length | filesizeformat(true)),
  ("Info hash", torrent.v1 and code % torrent.v1),
  ("Info hash v2", torrent.v2 and code % torrent.v2),
  ("Added", torrent.added | date_text),
  ("Created", details.created and details.created | date_text),
  ("Created with", details.created_by | visible),
] if text -%}
<dt>{{ name }}</dt><dd><bdi>{{ text }}</bdi></dd>
{% endfor %}{% for url in details.web_seeds -%}
<dt>Web seed</dt><dd><bdi>{{ url | linked }}</bdi></dd>
{% endfor %}</dl></details>
{% if member().can_publish %}<details><summary>Move or remove</summary>
<form method="post" action="{{ row.id }}/edit"><label>Category
  <input name="category" value="{{ row.category }}" maxlength="500"></label>
  <button>Move</button> <button name="remove" value="yes">Remove from the list</button>
</form></details>{% endif %}
{% endblock %}
{% block footer %}<a href="{{ row.id }}.json">This torrent as JSON</a>{% endblock %}
""",
    "feed.xml": """\
<?xml version="1.0" encoding="utf-8"?>
<rss version="2.0" xmlns:atom="http://www.w3.org/2005/Atom">
<channel>
{% set site = site_url() -%}
<title>{{ about }}</title>
<link>{{ site }}</link>
<description>Torrents of {{ about }}</description>
<ttl>30</ttl>
<atom:link href="{{ site }}{{ query.link("feed.xml") }}"
 rel="self" type="application/rss+xml"/>
{% for row in rows -%}
{% set torrent, page = row.torrent, site ~ "torrent/" ~ row.id -%}
<item>
<title>{{ row.name }}</title>
<link>{{ page }}</link>
<description>{{ torrent.size | filesizeformat(true) }}, files: {{ torrent.files }}
{%- if row | magnet_of(site) %}, {{ row | magnet_of(site) }}{% endif %}</description>
<pubDate>{{ torrent.added | http_date }}</pubDate>
{% if row.category %}<category>{{ row.category }}</category>{% endif %}
<guid isPermaLink="false">urn:btih:{{ row.id }}</guid>
{# Clients show the length as the size of the download, as other trackers give it. -#}
<enclosure url="{{ page }}.torrent" length="{{ torrent.size }}"
 type="application/x-bittorrent"/>
</item>
{% endfor -%}
</channel>
</rss>
""",
    "badge.svg": """\
{% set width = 14 + 7 * text | length -%}
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width }}" height="20" role="img">
<title>{{ text }}</title><rect width="100%" height="100%" rx="4" fill="{{ fill }}"/>
<text x="50%" y="14" text-anchor="middle" fill="#fff" font-size="11"
 font-family="Verdana, sans-serif" textLength="{{ width - 14 }}">{{ text }}</text></svg>
""",
    "doctor.html": """\
{% extends "base.html" %}
{% block main %}
<ul class="plain">
{% for finding in findings -%}
<li class="note {{ finding.level }}"><b>{{ finding.level }}</b>: {{ finding.text }}</li>
{% endfor %}</ul>
<p><a href="?{{ {"key": key, "through": 1} | urlencode }}">Check it through its front
end</a>, as <code>python app.py doctor URL</code> does from any machine.</p>
{% endblock %}
""",
}


# -- Pages and feeds ------------------------------------------------------------------
# The list of torrents and the page of one, for people, as RSS and as JSON. A ListQuery
# selects from the list's Rows. ``visible`` shows hidden characters in strangers' texts.


class Row:
    """A Torrent of the list, with its counts; ``counts`` holds Counts by info_hash."""

    def __init__(self, torrent, counts):
        # The swarms of a hybrid torrent share most peers, so the larger numbers count.
        swarms = [counts.get(each, NO_COUNTS) for each in torrent.info_hashes()]
        folder = os.fsencode(torrent.path.rpartition("/")[0])
        self.torrent = torrent
        self.counts = Counts(*map(max, zip(*swarms, strict=True)))
        self.id = torrent.v1 or torrent.v2
        self.name = visible(torrent.name)
        self.category = visible(folder.decode("utf-8", "replace"))  # "" for none
        # The text that a search looks at. It begins with the name, to sort by it.
        self.searched = f"{self.name}\n{torrent.name}\n{self.category}".casefold()


# Heading and attribute of a Row. The key names the ascending order; with a "-" before
# it, the descending order.
COLUMNS = {
    "name": ("Name", "searched"),
    "size": ("Size", "torrent.size"),
    "seeders": ("Seeders", "counts.seeders"),
    "leechers": ("Leechers", "counts.leechers"),
    "completed": ("Completed", "counts.snatches"),
    "added": ("Added", "torrent.added"),
}
NEWEST = "-added"


class ListQuery(NamedTuple):
    """The torrents that a request asks for: a page of the list, a feed or JSON."""

    q: str = ""  # words to search for
    category: str = ""
    sort: str = NEWEST  # key of a sort order
    page: int = 1

    @classmethod
    def parse(cls, arguments):
        """Return the query in the arguments of a URL; wrong values count as missing."""
        sort = arguments.get("sort", "")
        return cls(
            arguments.get("q", "")[:200].strip(),
            arguments.get("category", ""),
            sort if sort.removeprefix("-") in COLUMNS else NEWEST,
            max(1, arguments.get("page", 1, type=int)),
        )

    def select(self, rows):
        """Return the rows with all words that are in the category or below it."""
        if self.category:
            rows = [r for r in rows if f"{r.category}/".startswith(f"{self.category}/")]
        for word in {*self.q.casefold().split()}:
            rows = [row for row in rows if word in row.searched]
        return rows

    def link(self, path="", **changes):
        """Return a URL below the front page for this query with some changes."""
        values, defaults = {**self._asdict(), **changes}, self._field_defaults
        query = urlencode({k: v for k, v in values.items() if v != defaults[k]})
        return f"{path}?{query}" if query else path


PER_PAGE = 100  # torrents on a page, in the feed, and in /torrents.json
CORS_HEADERS = {"Access-Control-Allow-Origin": "*"}  # pages of any site may read JSON
pages = Blueprint("pages", __name__)


@pages.get("/")
def front():
    """Show the announce URL, the totals and the list of torrents."""
    tracker, now = current_app.tracker, int(time.time())
    if b"info_hash=" in request.query_string:
        reason = f"this is not the announce URL. Use {site_url()}announce"
        return failure_reply(reason, tracker.settings), {"Content-Type": "text/plain"}
    query = ListQuery.parse(request.args)
    rows, categories, totals = current_app.listing(query.sort, now)
    found = query.select(rows)
    last = max(1, -(-len(found) // PER_PAGE))
    query = query._replace(page=min(query.page, last))
    start = (query.page - 1) * PER_PAGE
    numbers = {"torrents": len(rows)} if rows else {}
    numbers |= {name: totals[name] for name in ("seeders", "leechers", "swarms")}
    heading = f"Torrents in {query.category}" if query.category else ""
    return render_template(
        "front.html",
        heading=visible(heading),
        numbers=numbers,
        feed=query.link("feed.xml", sort=NEWEST, page=1),
        categories=categories,
        columns=COLUMNS,
        query=query,
        rows=found[start : start + PER_PAGE],
        found=len(found),
        last=last,
    )


@pages.get("/torrent/<info_hash>")
def torrent_page(info_hash):
    """Show everything that is known about a torrent."""
    row, _, details = _torrent_or_404(info_hash)
    return render_template("torrent.html", heading=row.name, row=row, details=details)


@pages.get("/torrent/<info_hash>.torrent")
def download(info_hash):
    """Send the .torrent file with the announce URL of this tracker in it."""
    row, metainfo, _ = _torrent_or_404(info_hash)
    member_of, now = current_app.tracker.catalogue.member, int(time.time())
    urls = announce_urls(site_url())
    data = with_announce(metainfo, urls, lambda url: member_of(url, now))
    return flask.send_file(
        io.BytesIO(data),
        mimetype="application/x-bittorrent",
        as_attachment=True,
        download_name=f"{file_name(row.torrent.name) or row.id}.torrent",
        etag=sha1(data).hexdigest(),
        last_modified=row.torrent.added,
    )


def _torrent_or_404(info_hash):
    """Return (Row, metainfo, details with last announce or None) for a hash in hex."""
    tracker, now = current_app.tracker, int(time.time())
    if not (torrent := tracker.catalogue.find(info_hash, now)):
        flask.abort(404, "No torrent on this tracker's list has that info hash.")
    found = None
    with suppress(OSError, TorrentError):
        metainfo, found = read_torrent(tracker.catalogue.folder, torrent.path)
    if found != torrent:
        flask.abort(404, "The file of this torrent is being replaced. Try again soon.")
    hashes = torrent.info_hashes()
    last_seen = max(tracker.store.last_seen(each, now) for each in hashes)
    peers = chain.from_iterable(tracker.store.peers(each, now)[1] for each in hashes)
    details = {**parse_details(metainfo), "last_seen": last_seen or None}
    details["description"] = description_of(tracker.catalogue.folder, torrent)
    details["progress"] = progress_summary(peers)
    return Row(torrent, tracker.scrape(hashes, now)), metainfo, details


def member():
    """Return the Member whose key the path of the request has, or None."""
    return request.environ[MEMBER][1]


@pages.before_app_request
def require_key():
    """Show a private tracker only to members, and to its operator and monitors."""
    others = "pages.health", "pages.doctor_page", "pages.swarm_json"
    is_for_all = request.endpoint in others or not current_app.tracker.settings.private
    if not is_for_all and not member():
        flask.abort(403, "This tracker needs a key: open the link that you were sent.")
    is_publishing = request.endpoint in ("pages.publish", "pages.edit")
    if is_publishing and not (member() and member().can_publish):
        flask.abort(403, "Only members whose key has the word publish can do this.")


@pages.post("/publish")
def publish():
    """Add the uploaded .torrent file to the list.

    Browsers go on to the page of the torrent. Programs can read the JSON.
    """
    upload, category = request.files.get("torrent"), request.form.get("category", "")
    data, catalogue = upload.read() if upload else b"", current_app.tracker.catalogue
    torrent = catalogue.add(data, category, int(time.time()))
    log.warning("%s published %s", *map(visible, (member().name, torrent.path)))
    info_hash = torrent.v1 or torrent.v2
    page = f"{site_url()}torrent/{info_hash}"
    return {"page": page, "info_hash": info_hash}, 303, {"Location": page}


@pages.post("/torrent/<info_hash>/edit")
def edit(info_hash):
    """Move a torrent to another category, or remove its .torrent file."""
    row, _, _ = _torrent_or_404(info_hash)
    category = None if "remove" in request.form else request.form["category"]
    current_app.tracker.catalogue.move(row.torrent, category, int(time.time()))
    what = "removed" if category is None else f"moved to {category!r}"
    log.warning("%s: %s was %s", *map(visible, (member().name, row.torrent.path, what)))
    page = "" if category is None else f"torrent/{row.id}"
    return flask.redirect(f"{site_url()}{page}", 303)


def _operator_key():
    """Return the operator's key if the request has it; abort with 404 if not."""
    key, given = current_app.tracker.settings.operator_key, request.args.get("key", "")
    if not key or not hmac.compare_digest(given.encode(), key.encode()):
        flask.abort(404)
    return key


@pages.get("/swarm/<info_hash>.json")
def swarm_json(info_hash):
    """Send the operator all peers of a swarm, as they are kept."""
    tracker, now = current_app.tracker, int(time.time())
    if not tracker.settings.dev:
        _operator_key()
    if not re.fullmatch("[0-9a-fA-F]{40}", info_hash):
        flask.abort(404, "The info hash of a swarm has 40 hex digits.")
    snatches, records = tracker.store.peers(bytes.fromhex(info_hash), now)
    peers = [
        {
            "peer_id": record.peer_id.hex(),
            "client": client_name(record.peer_id),
            "endpoints": [
                f"{format_ip(each[:-2])} {int.from_bytes(each[-2:], 'big')}"
                for each in filter(None, record.endpoints())
            ],
            "seeder": seeder,
            "seen": max(record.seen4, record.seen6),
        }
        for record, seeder in records
    ]
    return {"snatches": snatches, "peers": peers}, {"Cache-Control": "no-store"}


def progress_summary(peers):
    """Return the mean share that leechers have, and how many are in each tenth.

    ``peers`` are (Record, is_seeder). Of a large swarm, the first 5,000 stand for all:
    their order is random. A leecher in both swarms of a hybrid counts twice.
    """
    steps = [r.state // PROGRESS for r, seeder in islice(peers, 5000) if not seeder]
    shares = [(step - 1) / 62 for step in steps if step]
    tenths = Counter(min(9, int(10 * share)) for share in shares)
    mean = round(sum(shares) / len(shares), 3) if shares else None
    numbers = [tenths[tenth] for tenth in range(10)]
    return {"mean": mean, "leechers": numbers, "unknown": len(steps) - len(shares)}


@pages.get("/doctor")
def doctor_page():
    """Show the operator what the doctor finds on this host and in this request."""
    tracker, key = current_app.tracker, _operator_key()
    findings = list(check_host(tracker, time.time()))
    findings += check_request(request.environ, tracker.settings)
    if "through" in request.args:
        findings += check_url(site_url())
    page = render_template("doctor.html", heading="Doctor", findings=findings, key=key)
    return page, {"Cache-Control": "no-store", "X-Robots-Tag": "noindex"}


ADVICE = {
    404: "There is no such page on this tracker.",
    413: f"A file may have {MAX_TORRENT_BYTES} bytes at most.",
    500: "This page failed. The operator finds the reason in the server's log.",
}


@pages.app_errorhandler(exceptions.HTTPException)
@pages.app_errorhandler(TorrentError)
def error_page(error):
    """Show an error as a page. If the disk is full or broken, it says: try later."""
    if isinstance(error, TorrentError):
        error = exceptions.BadRequest(f"This torrent is refused: {error}.")
    if error.description == type(error).description:  # Werkzeug's own
        error.description = ADVICE.get(error.code, error.description)
    if isinstance(getattr(error, "original_exception", None), OSError):
        error = exceptions.ServiceUnavailable(f"{DISK_FAILS.capitalize()}.")
    if request.path == "/publish" and "html" not in str(request.accept_mimetypes):
        return {"error": error.description}, error.code
    page = render_template("base.html", heading=error.name, text=error.description)
    return page, error.code, error.get_headers()


_STYLE_HASH = b2a_base64(sha256(STYLE.encode()).digest(), newline=False).decode()
SECURITY_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}';"
    " img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@pages.after_app_request
def add_security_headers(response):
    """Forbid scripts and foreign content, in case the escaping of a text fails."""
    response.headers.update(SECURITY_HEADERS)
    is_shared = current_app.tracker.settings.url and not member()
    is_shared = is_shared or response.mimetype == "image/svg+xml"
    if not is_shared and not response.cache_control.no_store:
        # It may contain the Host header of this request, which a stranger may have set.
        response.cache_control.private = True
    return response


def site_url():
    """Return the URL of the front page in ASCII, with a slash at its end."""
    url = current_app.tracker.settings.url
    url = url and url + request.environ[MEMBER][0]
    with suppress(UnicodeError):  # a stranger's Host may break the rules of IDNA
        url = url or iri_to_uri(request.url_root)[:-1]
    return f"{url}/"


def magnet_of(row, site, web_seeds=()):
    """Return a magnet link, or None for a private torrent, where it would not work."""
    urls = announce_urls(site)
    return None if row.torrent.is_private else magnet(row.torrent, urls, web_seeds)


def soft(text):
    """Return a text as HTML that may also be broken after "_" and "."."""
    html = str(escape(text))
    return Markup(html.replace("_", "_<wbr>").replace(".", ".<wbr>"))


def linked(text):
    """Return a text as HTML in which web addresses are links."""
    lines = "\n".join(map(visible, text.splitlines()))
    parts = re.split(r"(https?://[^\s<>]*[^\s<>.,:;!?)])", lines)
    link = Markup('<a href="{0}" rel="noreferrer nofollow">{0}</a>')
    parts[1::2] = map(link.format, parts[1::2])
    return Markup("").join(parts)


def announce_urls(site):
    """Return the announce URLs of the tracker that has its front page at ``site``."""
    port, host = current_app.tracker.settings.udp_port, urlsplit(site).netloc
    over_udp = f"udp://{re.sub(':[0-9]+$', '', host)}:{port}/announce"
    is_open = port and not current_app.tracker.settings.private  # few send keys by UDP
    return [f"{site}announce", over_udp] if is_open else [f"{site}announce"]


def date_text(seconds):
    """Return seconds since 1970 as a date in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


@pages.get("/feed.xml")
def feed():
    """Send the newest torrents of a search, of a category, or of all as RSS 2.0.

    With dead=1, these are torrents without a seeder that were added over a day ago.
    """
    query = ListQuery.parse(request.args)._replace(sort=NEWEST, page=1)
    now, is_dead = int(time.time()), "dead" in request.args
    rows, day_ago = query.select(current_app.listing(NEWEST, now)[0]), now - 86400
    if is_dead:
        rows = [r for r in rows if not r.counts.seeders and r.torrent.added < day_ago]
    rows = rows[:PER_PAGE]
    words = current_app.tracker.settings.title, query.category, query.q
    words += ("without seeders",) * is_dead
    about = visible(" / ".join(filter(None, words)))
    text = render_template("feed.xml", about=about, query=query, rows=rows)
    response = current_app.response_class(text, mimetype="application/rss+xml")
    response.last_modified = current_app.tracker.catalogue.changed
    response.add_etag()
    return response.make_conditional(request)


@pages.get("/torrents.json")
def torrents_json():
    """Send a page of a search, of a category, or of all torrents, in any order."""
    query, site = ListQuery.parse(request.args), site_url()
    rows = query.select(current_app.listing(query.sort, int(time.time()))[0])
    start, last = (query.page - 1) * PER_PAGE, -(-len(rows) // PER_PAGE)
    found = [_json_of(row, site) for row in rows[start : start + PER_PAGE]]
    response = flask.jsonify(torrents=found, page=query.page, pages=last)
    response.headers.update(CORS_HEADERS)
    response.add_etag()
    return response.make_conditional(request)


def _json_of(row, site, web_seeds=()):
    torrent, page = row.torrent, f"{site}torrent/{row.id}"
    return {
        "name": torrent.name,
        "category": row.category,
        "size": torrent.size,
        "files": torrent.files,
        "info_hash": torrent.v1 or None,
        "info_hash_v2": torrent.v2 or None,
        "added": torrent.added,
        "private": torrent.is_private,
        **row.counts._asdict(),
        "page": page,
        "download": f"{page}.torrent",
        "magnet": magnet_of(row, site, web_seeds),
    }


@pages.get("/torrent/<info_hash>.json")
def torrent_json(info_hash):
    """Send everything that is known about a torrent, with all files."""
    row, _, details = _torrent_or_404(info_hash)
    found = _json_of(row, site_url(), details["web_seeds"])
    return {**found, **details}, CORS_HEADERS


@pages.get("/badge.svg")
@pages.get("/torrent/<info_hash>.svg")
def badge(info_hash=""):
    """Send the seeders and leechers of a torrent, or of all, as a small image."""
    if info_hash:
        seeders, leechers = _torrent_or_404(info_hash)[0].counts[:2]
    else:
        totals, _ = current_app.tracker.snapshot(int(time.time()))
        seeders, leechers = totals["seeders"], totals["leechers"]
    fill = "#1a7f37" if seeders else "#b3261e"
    text = f"seeders {seeders:,}, leechers {leechers:,}"
    image = render_template("badge.svg", text=text, fill=fill)
    return image, {"Content-Type": "image/svg+xml", "Cache-Control": "max-age=300"}


@pages.get("/stats.json")
def stats():
    """Send the totals of the front page."""
    totals, _ = current_app.tracker.snapshot(int(time.time()))
    return {"version": __version__, **totals}, CORS_HEADERS


@pages.get("/metrics")
def metrics():
    """Send the totals and counters in Prometheus' text format, version 0.0.4."""
    totals, _ = current_app.tracker.snapshot(int(time.time()))
    counters = current_app.tracker.stats.counters()
    found = [(name, "gauge", {"": size}) for name, size in totals.items()]
    # These include refused announces and scrapes.
    for kind in ("announces", "scrapes"):
        found.append((f"{kind}_total", "counter", {"": counters[kind]}))
    failures = {f'{{reason="{k}"}}': counters[f"failure_{k}"] for k in FAILURES}
    seconds = counters["announce_nanoseconds"] / 1e9  # from request to reply
    took = {"_sum": seconds, "_count": counters["announces"]}
    found.append(("failures_total", "counter", failures))
    found.append(("announce_duration_seconds", "summary", took))
    text = ""
    for name, kind, values in found:
        text += f"# TYPE bitbreeze_{name} {kind}\n"
        for suffix, value in values.items():
            text += f"bitbreeze_{name}{suffix} {value}\n"
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return text, {"Content-Type": kind, "Cache-Control": "no-store"}


@pages.get("/health")
def health():
    """Tell load balancers and monitors whether the tracker can store peers."""
    headers = {"Cache-Control": "no-store"}
    try:
        current_app.tracker.store.probe()
    except OSError as error:
        reason = f"peers cannot be stored: {error.strerror}"
        return {"status": "failing", "reason": reason}, 503, headers
    return {"status": "ok"}, headers


# -- Doctor ---------------------------------------------------------------------------
# A finding is one line: a fact, and what to set. check_host looks at this machine,
# check_request at the operator's request, and check_url asks a tracker as clients do.

OK, WARNING, FAILURE = "ok", "warning", "failure"
NETWORK_FILE_SYSTEMS = tuple("nfs cifs smb 9p afs fuse.sshfs ceph lustre".split())
FORGED = "198.51.100.1"  # an address for documentation (RFC 5737), which no client has
FORGER = 50002  # port of the peer that sends it in X-Forwarded-For
PRIVATE_FILES = "wsgi.ini", "keys.txt", "data/stats.json", "data/swarms.count"
SECRETS = re.compile(rb'(?m)^\[tracker\]|^\{"counters"|(?s:\A.{16}\Z)|^[\w-]{16,64} \w')


class Finding(NamedTuple):
    level: str  # OK, WARNING or FAILURE
    text: str  # one line


def check_host(tracker, now):
    """Yield Findings about the data folder, its disk and locks, the peers and lists."""
    python = sys.version.split()[0]
    yield Finding(OK, f"This is BitBreeze {__version__} with Python {python}.")
    folder = tracker.store.folder
    existed = os.path.isdir(folder)
    try:
        FileStore.probe(tracker.store)
        yield Finding(OK, f"The data folder {folder} can be written and locked.")
        space = os.statvfs(folder)
        free, files = space.f_bavail * space.f_frsize >> 20, space.f_favail
        if free < 100 or 0 < space.f_files and files < 1000:
            fact = f"The disk of {folder} has room for {free} MB and {files} files."
            yield Finding(WARNING, f"{fact} Make room, or announces will fail.")
        kind = file_system(folder)
        if kind.startswith(NETWORK_FILE_SYSTEMS):
            fact = f"{folder} is on a network file system ({kind}): its locks may fail."
            yield Finding(WARNING, f"{fact} Set data to a folder on a local disk.")
        if not existed:
            with suppress(OSError):  # a worker may use it now
                os.rmdir(folder)
    except OSError as error:
        fact = f"The data folder {folder} cannot be used: {error.strerror}."
        remedy = "Make it writable, or set data to a folder on a local disk."
        yield Finding(FAILURE, f"{fact} {remedy}")
    if isinstance(tracker.store, RedisStore):
        yield from _check_engine(tracker.store)
    yield from _check_lists(tracker.settings, int(now))


def _check_engine(store):
    """Look at Redis: does it answer, and would it drop swarms?"""
    try:
        with store.engine() as client:
            version = client.info("server")["redis_version"]
            memory = client.config_get("maxmemory*")
            started = time.perf_counter()
            store.probe()
        took = 1000 * (time.perf_counter() - started)
        yield Finding(OK, f"Redis {version}, {store.place}, answers in {took:.1f} ms.")
        policy = memory["maxmemory-policy"]
        if memory["maxmemory"] != "0" and policy != "noeviction":
            fact = f"With a full memory, Redis drops swarms ({policy})."
            yield Finding(WARNING, f"{fact} Set its maxmemory-policy to noeviction.")
    except OSError as error:
        fact = f"Redis cannot be used: {error.strerror}."
        yield Finding(FAILURE, f"{fact} Start it, or set store to another.")


def _check_lists(settings, now):
    """Look at which torrents are tracked, and which files and lines are skipped."""
    folder = HERE / settings.torrents
    catalogue = Catalogue(folder, os.devnull, settings.track)  # leaves the index alone
    # A minute from now, files that have just been written count as complete.
    catalogue.scan(now + 60, seconds=3, report=lambda problem: None)
    known = catalogue.torrents or catalogue.allowed or catalogue.unread
    if catalogue.is_open or known:
        yield Finding(OK, f"Tracked: {catalogue.summary()}; track is {settings.track}.")
    else:
        fact = f"No torrent is tracked: there is no valid one in {folder}."
        yield Finding(WARNING, f"{fact} Add one, fill allow.txt, or set track to any.")
    keys = catalogue.lists[2]
    if os.path.exists(keys) and os.stat(keys).st_mode & 0o077:
        fact = f"Other users of this host can read {keys}."
        yield Finding(WARNING, f"{fact} Run: chmod 600 {keys}")
    skipped = sorted(catalogue.skipped.items())
    facts = [f"{folder}/{path} is skipped: {reason}" for path, reason in skipped]
    if len(facts) > 10:
        facts[10:] = [f"{len(facts) - 10} more files there are skipped"]
    for fact in map(visible, catalogue.problems + facts):
        is_broken = ": it cannot be read: " in fact
        remedy = " Replace it, or make it readable for the server." if is_broken else ""
        yield Finding(FAILURE if is_broken else WARNING, f"{fact}.{remedy}")


def check_request(environ, settings):
    """Yield a Finding about the address of a request of the operator."""
    remote = environ.get("REMOTE_ADDR", "")
    forwarded = environ.get("HTTP_X_FORWARDED_FOR", "").strip()
    entries = len(forwarded.split(",")) if forwarded else 0  # browsers add none
    seen = f"The server knows {remote!r}, X-Forwarded-For is {forwarded[:200]!r}."
    try:
        fact = f"You come from {format_ip(client_address(environ, settings))}."
    except TrackerError as refusal:
        yield Finding(FAILURE, f"Announces are refused: {refusal}. {seen}")
        return
    if entries > settings.proxies:
        yield Finding(FAILURE, f"{fact} It is a proxy. Set proxies = {entries}. {seen}")
    else:
        advice = f"If it is a proxy, set proxies = {settings.proxies + 1}."
        yield Finding(OK, f"{fact} {advice} {seen}")


def check_url(url):
    """Yield Findings about the tracker at ``url``, asked as clients ask."""
    if url.startswith("udp://"):
        yield from _check_udp(url)
        return
    base = re.sub(r"(/(announce|scrape)(\.php)?)?/*(\?.*)?$", "", url)
    base = base if "://" in base else f"http://{base}"
    try:
        base = iri_to_uri(base)
        found, body, _ = _get(f"{base}/announce?info_hash=")
        bencoder.bdecode(body)
        found = found.partition("?")[0]
        yield Finding(OK, f"Clients announce to {found}, and it answers.")
        if found != f"{base}/announce":
            yield Finding(WARNING, f"{url} redirects. Give clients {found} instead.")
            base = found.removesuffix("/announce")
        page = _get(f"{base}/")[1].decode(errors="replace")
        shown = (re.findall("<code>(.*?)</code>", page) or ["no URL"])[0]
        if shown != f"{base}/announce":
            fact = f"The front page shows {visible(shown)}, not {base}/announce."
            remedy = "Pass on Host and X-Forwarded-Proto, or set url."
            yield Finding(WARNING, f"{fact} {remedy}")
        yield from _check_scrapes(base)
        yield from _check_addresses(lambda *peer: _announce(base, *peer))
        # The files may be below this URL, or beside it if it ends in /app.py.
        folders = {urljoin(base, "."), f"{base}/"}
        for file in [folder + name for folder in folders for name in PRIVATE_FILES]:
            with suppress(ValueError):  # its status is not 200
                if SECRETS.search(_get(file)[1]):
                    remedy = "Set data elsewhere, and deny all files but app.py."
                    yield Finding(FAILURE, f"Anyone can read {file}. {remedy}")
    except Exception as error:  # anything may be in place of a tracker
        fact = f"{base}/announce does not answer as a tracker: {visible(str(error))}."
        yield Finding(FAILURE, f"{fact} See that it runs, and that its port is open.")


def _get(url, headers=None, redirects=5):
    """Return the URL that answered a GET, the body, and the address it came from."""
    parts = urlsplit(url)
    kind = {"http": HTTPConnection, "https": HTTPSConnection}.get(parts.scheme)
    if not kind or not parts.hostname:
        raise LookupError("it is no URL like http://NAME:PORT/announce")
    with closing(kind(parts.hostname, parts.port, timeout=10)) as connection:
        with suppress(OSError):
            address = socket.gethostbyname(parts.hostname)
            if address == "127.0.0.1" and sys.platform == "linux":
                connection.source_address = "127.0.0.2", 0  # a proxy here has another
        headers = {"User-Agent": "BitBreeze", **(headers or {})}
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        own = parse_address(connection.sock.getsockname()[0])
        response = connection.getresponse()
        if redirects and (location := response.getheader("Location")):
            return _get(urljoin(url, location), headers, redirects - 1)
        if response.status != 200:
            raise ValueError(f"{response.status} {response.reason}")
        return url, response.read(2**20), own


def _check_scrapes(base):
    """Scrape info_hashes with every byte, and then as many as Transmission does."""
    for number, remedy in (
        (13, "Look for rewrite rules: Apache's need the flags QSA, or B and NE."),
        (60, "Set gunicorn's --limit-request-line 8190, or uWSGI's buffer-size 32768."),
    ):
        hashes = chunks(bytes(range(256)) * 5, 20)[:number]
        query = "&".join(f"info_hash=%{each.hex('%')}" for each in hashes)
        with suppress(Exception):  # as in check_url
            files = bencoder.bdecode(_get(f"{base}/scrape?{query}")[1])[b"files"]
            if files.keys() == set(hashes):
                yield Finding(OK, f"A scrape of {number} binary hashes passes.")
                continue
        yield Finding(FAILURE, f"A scrape of {number} binary hashes fails. {remedy}")
        return


def _check_udp(url):
    """Connect, announce and scrape over UDP."""
    try:
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)
        with socket.socket(*found[0][:3]) as sock:
            sock.settimeout(3)
            sock.connect(found[0][4])

            def ask(start, action, rest=b""):
                head = action.to_bytes(4, "big") + os.urandom(4)
                sock.send(start + head + rest)
                reply = sock.recv(2048)
                if reply[:8] != head:
                    raise TrackerError(reply[8:].decode(errors="replace"))
                return reply[8:]

            def announce(port, event, swarm):
                peer = swarm, b"-BBDOCT-%012d" % port, 0, 1, 3 - (event == "started"), 0
                packet = PACKET_ANNOUNCE.pack(*peer, -1, port)
                own = parse_address(sock.getsockname()[0])
                return chunks(ask(connection, 1, packet[16:])[12:], len(own) + 2), own

            connection = ask(PROTOCOL_ID, 0)
            ask(connection, 2, bytes(20))
            yield Finding(OK, f"Clients connect to {url} and scrape, and it answers.")
            yield from _check_addresses(announce)
    except (OSError, ValueError, TrackerError) as error:
        fact = f"{url} does not answer as a tracker: {visible(str(error))}."
        remedy = "Open its UDP port in the firewall. Containers need -p 6969:6969/udp."
        yield Finding(FAILURE, f"{fact} {remedy}")


def _announce(base, port, event, swarm):
    """Announce over HTTP; return the endpoints in the reply, and our own address."""
    headers = {"X-Forwarded-For": FORGED} if port == FORGER else {}
    peer = {"peer_id": f"-BBDOCT-{port:012}", "port": port, "left": 1}
    query = urlencode({"info_hash": swarm, **peer, "event": event, "compact": 1})
    _, body, own = _get(f"{base}/announce?{query}", headers)
    reply = bencoder.bdecode(body)
    if b"failure reason" in reply:
        raise TrackerError(reply[b"failure reason"].decode(errors="replace"))
    return chunks(reply[b"peers"], 6) + chunks(reply.get(b"peers6", b""), 18), own


def _check_addresses(announce):
    """Announce a peer, a second with a forged address, and a third to find both."""
    swarm = os.urandom(20)  # a random one, in which all three are stopped again
    ports = 50001, FORGER, 50003
    try:
        found, own = [announce(port, "started", swarm) for port in ports][-1]
    except TrackerError as refusal:
        level = FAILURE if "address" in str(refusal) else WARNING
        yield Finding(level, f"Addresses cannot be checked: {visible(str(refusal))}.")
        return
    finally:
        for port in ports:
            with suppress(Exception):
                announce(port, "stopped", swarm)
    addresses = {int.from_bytes(end[-2:], "big"): end[:-2] for end in found}
    kept, forged = addresses.get(50001), addresses.get(FORGER)
    if not (kept and forged):
        fact = "Peers do not find each other."
        yield Finding(FAILURE, f"{fact} Turn off caches, and share one data folder.")
    elif forged == parse_address(FORGED):
        fact = "The tracker believes a client's own X-Forwarded-For."
        yield Finding(FAILURE, f"{fact} Lower proxies, or set proxy_networks.")
    elif kept == own or is_private(own) and own[0] != 127 and not is_private(kept):
        # Both are the same, or this machine is in a private network behind NAT.
        yield Finding(OK, f"The tracker sees this machine as {format_ip(kept)}.")
    else:
        fact = f"The tracker sees this machine, {format_ip(own)}, as {format_ip(kept)}."
        yield Finding(FAILURE, f"{fact} If that is a proxy, raise proxies.")


# -- Application and commands ---------------------------------------------------------

WORKERS = max(2, min(os.cpu_count() or 2, 8))  # processes, without --workers


class BitBreeze(flask.Flask):
    """The Flask application. Its TrackerApp answers announces and scrapes itself."""

    def __init__(self, settings):
        super().__init__(__name__, static_folder=None)
        tracker = self.tracker = Tracker(settings)
        self._listing = None, {}, {}  # its state, the categories, Rows by sort order
        # Only a proxy in front knows whether the visitor came over HTTPS.
        pages_app = ProxyFix(self.wsgi_app, x_for=0, x_proto=bool(settings.proxies))
        self.wsgi_app = TrackerApp(tracker, pages_app)
        self.jinja_loader = DictLoader(TEMPLATES)
        self.jinja_env.globals.update(tracker=tracker, style=STYLE, site_url=site_url)
        self.jinja_env.globals.update(announce_urls=announce_urls, member=member)
        self.config["MAX_CONTENT_LENGTH"] = MAX_TORRENT_BYTES + 2**16
        for template_filter in (visible, http_date, date_text, magnet_of, soft, linked):
            self.add_template_filter(template_filter)
        self.register_blueprint(pages)

    def serve_udp(self, fd):
        """Answer UDP in another thread, with the file descriptor of a bound socket."""
        server = UdpServer(self.tracker, socket.socket(fileno=fd))
        Thread(target=server.serve, daemon=True).start()

    def log_exception(self, exc_info):
        """Log an error in a page, rate-limited like those of announces."""
        self.tracker.report(exc_info[1], request.path, time.time())

    def listing(self, sort, now):
        """Return (Rows of all listed torrents, sorted; their categories; totals).

        With each category comes the number of torrents in it and below it. Rows that
        are equal in a sort order are sorted by name. The lists are kept until the
        torrents or their counts change.
        """
        catalogue = self.tracker.catalogue
        catalogue.refresh(now, at_once=True)
        totals, counts = self.tracker.snapshot(now)
        state = catalogue.changed, counts
        if state != self._listing[0]:
            rows = [Row(torrent, counts) for torrent in catalogue.torrents.values()]
            rows.sort(key=attrgetter("searched"))
            categories = Counter()
            for row in filter(attrgetter("category"), rows):
                parts = row.category.split("/")
                above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
                categories.update(above)
            self._listing = state, dict(sorted(categories.items())), {"name": rows}
        _, categories, orders = self._listing
        if sort not in orders:
            key = attrgetter(COLUMNS[sort.removeprefix("-")][1])
            orders[sort] = sorted(orders["name"], key=key, reverse=sort[0] == "-")
        return orders[sort], categories, totals


def create_app(overrides=None, *, isolated=False):
    """Return the WSGI application; raise SettingsError. ``overrides`` are settings.

    If it is isolated, neither the environment nor wsgi.ini is read.
    """
    if not has_level_handler(log):
        log.addHandler(default_handler)
    sources = {"environ": {}, "ini": os.devnull} if isolated else {}
    return BitBreeze(load_settings(overrides, **sources))


def post_fork(server, worker):
    """Make a new worker stop quickly and quietly; gunicorn -c app.py calls this hook.

    On Ctrl-C, gunicorn's main process sends SIGQUIT to its workers. A gevent worker
    that gets SIGINT as well prints a traceback. A worker that is still starting misses
    SIGQUIT and SIGTERM, and gunicorn waits 30 seconds before it kills that worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for number in (signal.SIGQUIT, signal.SIGTERM):  # gunicorn sets handlers later
        signal.signal(number, lambda *_: os._exit(0))


def post_worker_init(worker):
    """Answer UDP in a gunicorn worker, too, if ``serve`` opened a socket for that."""
    if fd := os.environ.get("BITBREEZE_UDP"):
        worker.wsgi.serve_udp(int(fd))  # gunicorn has this hook from a copy of app.py


def on_exit(server):
    """Remove the data of --dev when gunicorn ends."""
    if folder := os.environ.get("BITBREEZE_DEV"):
        shutil.rmtree(folder, ignore_errors=True)


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.option("--host", default="", show_default="all", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of TCP and UDP.",
              show_default="6969; with --dev, a free one")  # fmt: skip
@click.option("--workers", default=WORKERS, type=click.IntRange(1), help="Processes.")
@click.option("--udp/--no-udp", default=True, help="Serve UDP beside HTTP.")
@click.option("--verbose", is_flag=True, help="Print each announce and scrape.")
@click.option("--dev", is_flag=True, help="Throwaway data, intervals of two seconds.")
@click.version_option(__version__, message="BitBreeze %(version)s")
@click.pass_context
def cli(context, **options):
    """BitBreeze, a BitTorrent tracker in one file.

    Without a command, it serves with gunicorn until Ctrl-C.
    """
    if not context.invoked_subcommand:
        context.forward(serve)


@cli.command("udp", params=cli.params[:3])
@click.pass_context
def serve_udp(context, **options):
    """Serve UDP alone, beside a server of HTTP that has the same data folder."""
    context.invoke(serve, **options, http=False)


@cli.command(params=cli.params[:6])
def serve(host, port, workers, udp=True, verbose=False, dev=False, http=True):
    """Serve with gunicorn until Ctrl-C (the default command)."""
    # 1. Open the sockets, and tell the workers by their environment what to do.
    port = (0 if dev else 6969) if port is None else port
    server, packets = _open_sockets(host, port, http, udp)
    port = (server or packets).getsockname()[1]
    if udp:
        os.environ["BITBREEZE_UDP"] = str(packets.fileno())
        os.environ["TRACKER_UDP_PORT"] = str(app.tracker.settings.udp_port or port)
    if verbose or dev:
        os.environ["TRACKER_VERBOSE"] = "yes"
    if dev:
        workers, folder = 1, mkdtemp(prefix="bitbreeze-")
        os.environ.update(TRACKER_INTERVAL="2", TRACKER_MIN_INTERVAL="1")
        os.environ.update(TRACKER_PEER_TTL="4", TRACKER_DEV="yes", TRACKER_DATA=folder)
        os.environ["BITBREEZE_DEV"] = folder
    tracker = create_app().tracker
    advice = "Set TRACKER_DATA or TRACKER_STORE to another place."
    with _reported(f"write to {tracker.store.place}", advice):
        tracker.store.probe()
    # 2. Greet the operator.
    served = ["http"] * http + ["udp"] * udp
    click.echo(_greeting(tracker, host, port, served), err=True)
    # 3. Allow as many open files as the system does: the store keeps swarm files open.
    with suppress(OSError, ValueError):  # macOS refuses RLIM_INFINITY
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    # 4. Become gunicorn. A gevent worker serves others while it waits for a client.
    #    Without HTTP, gunicorn listens where no client asks, and the workers are plain.
    bind, kind = f"unix:{tracker.store.folder}/udp.socket", "sync"
    if http:
        bind, kind = f"fd://{server.fileno()}", "gevent"
    os.execv(sys.executable, [
        sys.executable, "-m", "gunicorn", f"{Path(__file__).stem}:app",
        "--chdir", str(HERE), "--config", os.path.abspath(__file__),  # for the hooks
        "--bind", bind, "--worker-class", kind, "--workers", str(workers),
        "--limit-request-line", "8190",  # Transmission scrapes in up to 4,300 bytes
        "--no-control-socket", "--log-level", "warning", "--graceful-timeout", "10",
    ])  # fmt: skip


def _open_sockets(host, port, http, udp):
    """Return a TCP socket and a UDP socket with the same port number, or None."""
    server, packets, advice = None, None, "Choose another --port or --host"
    if http:
        with _reported(f"listen on port {port}", f"{advice}."):
            server = bound_socket(socket.SOCK_STREAM, host, port)
        port = server.getsockname()[1]
    if udp:
        advice += ", or --no-udp." if http else "."
        with _reported(f"listen on UDP port {port}", advice):
            packets = bound_socket(socket.SOCK_DGRAM, host, port)
    return server, packets


def _greeting(tracker, host, port, transports):
    """Return the lines that tell the operator about the tracker."""
    name = f"[{host}]" if ":" in host else host or "localhost"
    if not host:  # this sends nothing, but tells which address connections come from
        with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            name = probe.getsockname()[0]
    tracker.catalogue.refresh(int(time.time()))
    tracked = tracker.catalogue.summary()
    if skipped := len(tracker.catalogue.skipped) + len(tracker.catalogue.problems):
        tracked += f"; {skipped} files or lines are skipped: see app.py doctor"
    lines = ["BitBreeze serves this tracker until Ctrl-C:"]
    lines += [f"  announce URL  {each}://{name}:{port}/announce" for each in transports]
    lines += [f"  front page    http://{name}:{port}/"] * ("http" in transports)
    lines += [f"  peers are in  {tracker.store.place}", f"  it tracks     {tracked}"]
    return "\n".join(lines)


@contextmanager
def _reported(task, advice):
    """Report an OSError in one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror.partition(" (")[0]  # Python appends the address
        raise click.ClickException(f"Cannot {task}: {reason}. {advice}") from None


@cli.command()
@click.argument("action", type=click.Choice(["add", "list", "revoke"]))
@click.argument("name", default="")
@click.option("--publish", is_flag=True, help="The member may add torrents.")
@click.option("--until", metavar="YYYY-MM-DD", help="Last day.")
def keys(action, name, publish, until):
    """Add a key for NAME and print its link, list names, or revoke NAME's keys."""
    path, data = app.tracker.catalogue.lists[2], app.tracker.store.folder
    key = os.urandom(16).hex()
    new = f"{key} {name}{' publish' * publish}" + (f" until={until}" if until else "")
    if action != "list" and not (name and _name_in(new) == name):
        raise click.ClickException("Give a NAME without #, and a day like 2027-01-31.")
    os.umask(0o077)  # only the server may read the keys
    with _reported(f"change {path}", "Use sudo."), open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other commands wait
        lines = Path(path).read_text().splitlines() if os.path.exists(path) else []
        kept = [line for line in lines if action != "revoke" or _name_in(line) != name]
        kept += [new] * (action == "add")
        if kept != lines:  # the tracker sees the old file or the new one
            Path(f"{path}.new").write_text("".join(f"{line}\n" for line in kept))
            with suppress(OSError):  # root adds keys for the server's user
                shutil.chown(f"{path}.new", os.stat(data).st_uid)
            os.replace(f"{path}.new", path)
    link = f"{app.tracker.settings.url or 'http://HOST:6969'}/{key}/"
    members = [line.partition("#")[0].split()[1:] for line in lines if _name_in(line)]
    revoked = f"Revoked {len(lines) - len(kept)} keys of {name}."
    listed = "\n".join(map(" ".join, members))
    click.echo({"add": link, "list": listed, "revoke": revoked}[action])


def _name_in(line):
    """Return the name in a line of keys.txt, or ""."""
    return "".join(member[1] for member in parse_list(line.encode(), "keys.txt")[0])


@cli.command()
@click.confirmation_option(prompt="Forget all peers and snatches?")
def reset():
    """Forget all peers and snatches. The tracker may be running."""
    app.tracker.store.reset(int(time.time()))


@cli.command()
@click.argument("url", required=False)
def doctor(url):
    """Check this host, or the tracker at URL, and say what to set.

    The exit code is 1 if anything fails.
    """
    log.setLevel(logging.CRITICAL)  # the findings say the same
    failures = 0
    for finding in check_url(url) if url else check_host(app.tracker, time.time()):
        click.echo(f"{finding.level:8} {finding.text}")
        failures += finding.level == FAILURE
    if not url:
        click.echo("\nTo check the way through the web server: app.py doctor URL")
    sys.exit(bool(failures))


@cli.command()
@click.argument("path", metavar="[FILE]", default="-")
def export(path):
    """Write the snatches of all swarms to FILE, as JSON, for import.

    Without FILE, write to standard output. The tracker may be running. Peers are not in
    it: they announce again within an interval.
    """
    store, is_file = app.tracker.store, app.tracker.settings.store == "files"
    if is_file and not os.path.isdir(store.folder):
        problem = f"There is no {store.folder}. Set data as for the server."
        raise click.ClickException(problem)
    try:
        with _progress(store.swarms(int(time.time())), "Export") as swarms:
            found = {h.hex(): each.snatches for h, each in swarms if each.snatches}
        with click.open_file(path, "x") as file:
            file.write(f"{json.dumps(found)}\n")
    except BrokenPipeError:
        raise  # click handles it quietly, as for "export | head"
    except OSError as error:
        raise click.ClickException(f"The export failed: {error}.") from None
    click.echo(f"Exported the snatches of {len(found)} swarms.", err=True)


@cli.command("import")
@click.argument("path", metavar="FILE")
def import_(path):
    """Take over the snatches in FILE: {INFO_HASH: NUMBER}. "-" is standard input.

    The tracker may be running. The larger number of snatches stays, so it is safe to
    import a file twice.
    """
    store, left_out = app.tracker.store, 0
    try:
        with click.open_file(path, "rb") as file:
            found = read_snatches(file.read())
        with _progress(found.items(), "Import") as swarms:
            # The server could not use files of root.
            with suppress(FileNotFoundError, PermissionError):
                os.seteuid(os.stat(store.folder).st_uid)
            for info_hash, snatches in swarms:
                try:
                    store.raise_snatches(info_hash, snatches, int(time.time()))
                except TrackerError:
                    left_out += 1
    except (OSError, ValueError) as error:
        raise click.ClickException(f"The import failed: {error}.") from None
    more = f", but not of {left_out}: max_swarms is reached" if left_out else ""
    done = f"Imported the snatches of {len(found) - left_out} swarms{more}."
    click.echo(done, err=True)


def read_snatches(data):
    """Return snatches by info_hash from the bytes of an export; raise ValueError."""
    try:
        found = {bytes.fromhex(h): number for h, number in json.loads(data).items()}
        for info_hash, number in found.items():
            if len(info_hash) != 20 or number >> 32:  # more bits, or negative
                raise ValueError
    except Exception:  # a file may hold anything
        raise ValueError("it is not like {INFO_HASH: NUMBER, ...}") from None
    return found


def _progress(items, label):
    """Return a context manager of items. If stderr is a terminal, it shows a bar."""
    file = sys.stderr if sys.stderr.isatty() else io.StringIO()
    return click.progressbar(items, None, label, show_pos=True, file=file)


try:
    app = application = create_app()  # hosts import it by one of these two names
except SettingsError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"app.py: {error}")
# Freeze the objects made so far. Otherwise each garbage collection writes to their
# headers, and every forked worker ends up with its own copy of those pages.
gc.freeze()

if is_cgi:
    CGIHandler().run(app)
elif __name__ == "__main__":
    cli(prog_name="app.py")
