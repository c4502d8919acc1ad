#!/usr/bin/env python3
"""BitBreeze: a BitTorrent tracker in one file, for any host that runs Python.

Clients announce that they share a torrent and are told who else does. The peers live
in small locked files that every worker process shares; there is no database, no daemon
and nothing to set up. An announce goes one way through the house:

    environ -> parse_announce -> Tracker -> Store -> announce_reply -> bytes

Parsing and replying are pure functions, ``now`` is an argument, and only the edges
(Pages, Commands) touch a socket or a clock. The rooms, in reading order:

    Settings     every setting once, where it is read from, what it may be
    Errors       the one exception whose text a client reads
    Values       what the rooms hand to each other
    Addresses    who is asking, and who can reach whom
    Requests     from a raw query to values
    Replies      from values to bencoded bytes
    Store        the contract, and peers in locked files
    Torrents     the folder of .torrent files, and what they say
    Access       what is tracked: any torrent, or those on lists
    Counters     what all processes have counted since ever
    History      what the tracker held in the last month
    Tracker      announce and scrape over access and store: no sockets, no HTTP
    Door         the WSGI door, where announce and scrape are answered; CGI
    Doctor       what may be wrong with this host, and what to set
    Archive      what is worth keeping, as a document for another host
    Listing      the torrents that a page or a feed shows, and in which order
    Templates    what pages look like
    Graph        the history as a picture
    Pages        the front page, the pages of torrents, the doctor's page
    Feeds        the same for programs: RSS, JSON, Prometheus
    Application  the Flask application, for whatever serves it
    Commands     python app.py
"""

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
import selectors
import socket
import struct
import sys
import time
import zlib
from array import array
from binascii import a2b_qp
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b, sha1, sha256
from itertools import accumulate, count, zip_longest
from operator import add, or_
from pathlib import Path
from random import random
from threading import Lock
from typing import NamedTuple
from urllib.parse import quote
from weakref import WeakSet

import bencoder

HERE = Path(__file__).resolve().parent
log = logging.getLogger("bitbreeze")


# -- Settings -------------------------------------------------------------------------
# Each is declared once. Later sources win: the default, [tracker] in wsgi.ini,
# TRACKER_NAME in the environment, create_app({...}).


class Setting(NamedTuple):
    """One setting: the type of its default is the type of its values."""

    name: str
    default: int | bool | str
    unit: str  # "" where the value speaks for itself
    help: str
    least: int = 0  # the smallest number allowed
    parse: Callable = str.strip  # makes of a text its value, or raises ValueError


class SettingsError(ValueError):
    """A setting is unknown or has a bad value; one sentence for the operator."""


def _track(text):
    if text.strip().lower() not in ("any", "listed", "auto"):
        raise ValueError("not any, listed or auto")
    return text.strip().lower()


def _public_ip(text):
    """Return the addresses in a list by their length in bytes, 4 or 16."""
    found = [ipaddress.ip_address(part).packed for part in _parts(text)]
    by_length = {len(address): address for address in found}
    if len(by_length) < len(found) or any(map(private_network, found)):
        raise ValueError(
            "not one IPv4 address, one IPv6 address, or both, of the internet"
        )
    return by_length


def _networks(text):
    """Return the networks in a list; "unix" is for those who come over a socket."""
    return [p if p == "unix" else ipaddress.ip_network(p) for p in _parts(text)]


def _header(text):
    """Return the key of a WSGI environ under which a header is found."""
    name = text.strip()
    if name and not re.fullmatch("[A-Za-z0-9-]+", name):
        raise ValueError("not the name of a header")
    return name and "HTTP_" + name.upper().replace("-", "_")


def _parts(text):
    return text.replace(",", " ").split()


SETTINGS = (
    Setting("title", "BitBreeze", "", "name of the tracker on its pages"),
    Setting("notice", "", "", "a sentence that clients show their users"),
    Setting("data", "data", "folder", "where the peers are kept, relative to app.py"),
    Setting(
        "torrents", "torrents", "folder",
        "of .torrent files that are tracked and listed, relative to app.py",
    ),
    Setting(
        "track", "auto", "",
        "any torrent, or only those listed in torrents and allow.txt: any, listed, or"
        " auto for listed as soon as one is", parse=_track,
    ),
    Setting("interval", 1800, "seconds", "between announces, a tenth more or less", 10),
    Setting("min_interval", 300, "seconds", "between announces, at the least", 1),
    Setting("peer_ttl", 4200, "seconds", "from its last announce a peer is kept", 20),
    Setting("swarm_ttl", 7776000, "seconds", "an empty swarm's snatches are kept"),
    Setting("numwant", 50, "peers", "in a reply unless the client says how many"),
    Setting("max_numwant", 100, "peers", "in a reply at the most"),
    Setting("max_swarms", 100000, "swarms", "in all at the most, 0 for any number"),
    Setting("max_peers", 200000, "peers", "in a swarm at the most, 0 for any number"),
    Setting(
        "max_peers_per_address", 1000, "peers",
        "in a swarm from one address (IPv6: one /64) at the most, 0 for any number",
    ),
    Setting(
        "operator_key", "", "",
        "opens the page /doctor?key=... to whoever knows it; if empty, nobody does",
    ),
    Setting("full_scrape", False, "", "answer a scrape of no torrent with all"),
    Setting(
        "proxies", 0, "proxies",
        "in front of the tracker: a client is that many from the right in"
        " X-Forwarded-For",
    ),
    Setting(
        "address_header", "", "",
        "header that names the client, such as CF-Connecting-IP or X-Real-IP, in place"
        " of X-Forwarded-For", parse=_header,
    ),
    Setting(
        "proxy_networks", "", "networks",
        "of the proxies, such as 10.0.0.0/8, or unix: no header of others is believed",
        parse=_networks,
    ),
    Setting(
        "public_ip", "", "addresses",
        "of the tracker's own network as the world sees it (IPv4, IPv6 or both): its"
        " peers with private addresses are handed out under them", parse=_public_ip,
    ),
)  # fmt: skip

Settings = namedtuple("Settings", [setting.name for setting in SETTINGS])


def load_settings(overrides=None, environ=os.environ, ini=HERE / "wsgi.ini"):
    """Return the Settings from all sources; raise SettingsError for a bad one."""
    values = {}
    for setting in SETTINGS:
        values[setting.name] = _checked(setting.name, setting.default, "the default")
    for source, given in (
        (f"[tracker] in {ini}", _read_ini(ini)),
        ("the environment", _read_environ(environ)),
        ("create_app", overrides or {}),
    ):
        for name, value in given.items():
            values[name] = _checked(name, value, source)
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _read_ini(path):
    # The file is uWSGI's too, whose sections may say the same key twice.
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"{path} cannot be read: {reason}") from None
    return dict(parser["tracker"]) if parser.has_section("tracker") else {}


def _read_environ(environ):
    prefix = "TRACKER_"
    return {
        n[len(prefix) :].lower(): v for n, v in environ.items() if n.startswith(prefix)
    }


def _checked(name, value, source):
    for setting in SETTINGS:
        if setting.name == name:
            break
    else:
        known = ", ".join(setting.name for setting in SETTINGS)
        raise SettingsError(f"{source} sets '{name}', which is not one of: {known}")
    try:
        return _typed(setting, value)
    except ValueError as error:
        raise SettingsError(f"{source} sets {name} to {value!r}, {error}") from None


def _typed(setting, value):
    """Return a value as its setting wants it; raise ValueError for what it is not."""
    kind, is_text = type(setting.default), isinstance(value, str)
    if kind is str:
        if is_text:
            return setting.parse(value)
        raise ValueError("not text")
    if kind is bool:
        states = configparser.ConfigParser.BOOLEAN_STATES
        value = states.get(value.strip().lower()) if is_text else value
        if type(value) is bool:
            return value
        raise ValueError("not yes or no")
    with suppress(ValueError):
        value = int(value) if is_text else value
        if type(value) is int and value >= setting.least:
            return value
    raise ValueError(f"not a whole number of {setting.unit}, {setting.least} or more")


def _check_together(settings):
    # The interval that a client is told is a tenth more or less: see Tracker.announce.
    shortest, longest = settings.interval * 9 // 10, settings.interval * 11 // 10
    for is_wrong, sentence in (
        (
            settings.min_interval > shortest,
            f"min_interval must be at most {shortest} seconds, nine tenths of interval",
        ),
        (
            settings.peer_ttl <= longest,
            f"peer_ttl must be more than {longest} seconds, eleven tenths of interval",
        ),
        (
            settings.numwant > settings.max_numwant,
            f"numwant must be at most max_numwant, {settings.max_numwant} peers",
        ),
        (
            settings.address_header and settings.proxies,
            "proxies and address_header are two ways to the same: set one of them",
        ),
        (
            settings.address_header and not settings.proxy_networks,
            "address_header needs proxy_networks: anyone else could send that header",
        ),
    ):
        if is_wrong:
            raise SettingsError(sentence)


# -- Errors ---------------------------------------------------------------------------

# The files of Counters know each by its place: new ones go to the end.
FAILURES = (
    "request",
    "address",
    "unregistered",
    "reading",
    "full",
    "key",
    "internal",
    "store",
)


class TrackerError(Exception):
    """A request that is refused. Its text is the only one that reaches a client, so it
    names the parameter and says what to do. Anything else raised is a fault of ours:
    it is logged with its traceback, and the client reads "internal error".

    ``kind`` is what it is counted as, one of FAILURES."""

    def __init__(self, reason, *, kind="request"):
        super().__init__(reason)
        self.kind = kind


# -- Values ---------------------------------------------------------------------------


class Announce(NamedTuple):
    """What a client reports of itself in one swarm."""

    info_hash: bytes  # 20 bytes
    peer_id: bytes  # 20 bytes
    address: bytes  # 4 or 16 bytes, taken from the connection
    port: int  # 0 to 65535; 0 and 1 say that nobody can connect
    left: int | None = None  # bytes still to download, 0 for a seeder, None for unknown
    event: str = ""  # "", started, completed, stopped or paused
    numwant: int = -1  # peers wanted, -1 for as many as the tracker likes
    key: int = 0  # checksum of what ties a client's IPv4 and IPv6 announces, 0 for none
    compact: bool = True
    no_peer_id: bool = False


class Counts(NamedTuple):
    """How many are in a swarm; a partial seed is one of the leechers (BEP 21)."""

    seeders: int
    leechers: int
    partial_seeds: int
    snatches: int  # downloads ever completed


class Peers(NamedTuple):
    """Peers as three columns in the same order.

    An endpoint is an address and a port, in network order; its port is zero where the
    peer cannot be reached in that family. A whole column is empty where the peer that
    asked cannot use that family.
    """

    ids: bytes  # 20 bytes a peer
    endpoints4: bytes  # 6 bytes a peer
    endpoints6: bytes  # 18 bytes a peer


class Totals(NamedTuple):
    """What the whole tracker holds."""

    seeders: int
    leechers: int
    partial_seeds: int
    snatches: int
    swarms: int  # those with at least one peer


class Survey(NamedTuple):
    """What was found when all swarms were counted."""

    totals: Totals
    listed: dict  # Counts by info_hash, of the torrents in the folder
    known: int  # swarms, those with nobody in them too


_tuple = tuple.__new__  # makes a named tuple for a third of what calling it costs


# -- Addresses ------------------------------------------------------------------------
# A wrong address is what breaks most trackers: the swarm looks well, and nobody can
# connect. So an address that is not certain is refused, and a proxy's is never kept.

_WITH_PORT = re.compile(r"\[(.+)\](?::\d+)?|([\d.]+):\d+")
LOOPBACK = 0, 0


def client_address(environ, settings):
    """Return the client's address, 4 or 16 bytes; raise TrackerError if it is hidden.

    A header is believed as far as ``settings`` say that proxies of ours wrote it: what
    stands to the left of their entries in X-Forwarded-For is the client's own word.
    """
    remote = environ.get("REMOTE_ADDR", "")
    if settings.proxies or settings.address_header:
        networks = settings.proxy_networks
        if not networks or _is_among(networks, remote):
            return _told_address(environ, settings)
    try:
        return parse_address(remote)
    except ValueError:
        raise TrackerError(
            f"this tracker cannot see your address, only {remote!r}. Operator: have the"
            " proxy in front send X-Forwarded-For, and set proxies = 1",
            kind="address",
        ) from None


@lru_cache(maxsize=10000)
def parse_address(text):
    """Return an address as 4 or 16 bytes, or raise ValueError.

    IPv4 in IPv6, as some servers write it, is IPv4: clients drop it otherwise.
    """
    if len(text) > 64:  # IPv6 with a zone that could have any length
        raise ValueError("too long for an address")
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).packed


def _is_among(networks, remote):
    try:
        address = ipaddress.ip_address(parse_address(remote))
    except ValueError:  # there is none of those who come over a Unix socket
        return "unix" in networks
    return any(network != "unix" and address in network for network in networks)


def _told_address(environ, settings):
    """Return the address in the header of our proxies."""
    proxies, key = settings.proxies, settings.address_header or "HTTP_X_FORWARDED_FOR"
    name, value = key[5:].replace("_", "-").title(), environ.get(key, "")
    if proxies:
        # Each appends whom it saw, perhaps in a line of its own: servers join them.
        entries = value.rsplit(",", proxies) if value.strip() else []
        if len(entries) < proxies:
            raise TrackerError(
                f"this tracker cannot see your address: {name} has {len(entries)} of"
                f" {proxies} entries. Operator: set proxies to the number of proxies in"
                " front that append to it",
                kind="address",
            )
        value = entries[-proxies]
    text = value.strip(' \t"')
    with_port = _WITH_PORT.fullmatch(text)
    with suppress(ValueError):
        address = parse_address(with_port[1] or with_port[2] if with_port else text)
        if any(address) and address[0] < (224 if len(address) == 4 else 255):
            return address
    raise TrackerError(
        f"this tracker cannot see your address: {name} says {value[:60]!r} where it"
        " belongs. Operator: look at what the proxy sends, and at the setting proxies",
        kind="address",
    )


_PRIVATE = [
    ipaddress.ip_network(network)
    for network in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("100.64.0.0/10", "fc00::/7", "fe80::/10"),
    )
]
# The first two bytes of private IPv4 addresses, as numbers of this machine.
_PRIVATE_STARTS = frozenset(
    int.from_bytes(start.to_bytes(2, "big"), sys.byteorder)
    for network in (ipaddress.ip_network("127.0.0.0/8"), *_PRIVATE[:5])
    for start in range(int(network[0]) >> 16, (int(network[-1]) >> 16) + 1)
)

_PRIVATE_STARTS6 = frozenset(b"\0\xfc\xfd\xfe")  # 0 is that of ::1


@lru_cache(maxsize=10000)
def private_network(address):
    """Return what tells the private network of an address (4 or 16 bytes), or None.

    LOOPBACK is the machine of the tracker itself.
    """
    ip = ipaddress.ip_address(address)
    if ip.is_loopback:
        return LOOPBACK
    for network in _PRIVATE:
        if ip.version == network.version and ip in network:
            # One site's are IPv6 addresses that begin with the same 48 bits (RFC 4193).
            return ip.version, address[:6] if ip.version == 6 else network
    return None


def peers_for(asker, peers, public_ip):
    """Return Peers under the addresses that a peer at ``asker`` can reach them.

    A private address is for those on the same private network. To others it goes as
    the address in ``public_ip`` of its length, behind which the tracker and its
    neighbours are, or as none.
    """
    if private_network(asker) == LOOPBACK:
        return peers  # whoever is beside the tracker is on all its networks
    ends4, ends6 = peers.endpoints4, peers.endpoints6
    if not _PRIVATE_STARTS.isdisjoint(memoryview(ends4).cast("H")[::3]):
        ends4 = _reachable_from(asker, ends4, 6, public_ip)
    if ends6 and not _PRIVATE_STARTS6.isdisjoint(ends6[::18]):
        ends6 = _reachable_from(asker, ends6, 18, public_ip)
    return _tuple(Peers, (peers.ids, ends4, ends6))


def _reachable_from(asker, column, width, public_ip):
    """Return a column of endpoints as ``asker`` can reach them; see peers_for."""
    found, here = [], private_network(asker)
    for at in range(0, len(column), width):
        endpoint = bytes(column[at : at + width])
        there = private_network(endpoint[:-2])
        if there and not _reaches(here, there):
            public = public_ip.get(width - 2)
            endpoint = public + endpoint[-2:] if public else bytes(width)
        found.append(endpoint)
    return b"".join(found)


def _reaches(here, there):
    """Return whether one private network can reach another; None is the internet.

    Of two families it is taken that they are the tracker's own network in both.
    """
    if not here or here == there or there == LOOPBACK:
        return here == there
    return here[0] != there[0]


# -- Requests -------------------------------------------------------------------------
# Never through Flask's request.args: it decodes to text, and an info_hash is 20 bytes
# of anything, so that %FF and the byte FF can no longer be told apart.

_EVENTS = frozenset(("started", "completed", "stopped", "paused"))
_LEFT_OUT = dict.fromkeys(
    ("info_hash", "peer_id", "port", "left", "event", "numwant", "key", "compact")
    + ("no_peer_id",), ""
)  # fmt: skip


def parse_announce(environ, settings):
    """Return the Announce in a WSGI environ; raise TrackerError for a bad one (BEP 3).

    Announced addresses (ip, ipv4, ipv6) are ignored: whoever could name another's
    address could aim a swarm at it (BEP 7 discourages them for that).
    """
    query = environ.get("QUERY_STRING", "")
    if query.count("info_hash=") > 1 and len(parse_scrape(environ)) > 1:
        raise TrackerError(
            "info_hash was sent more than once: announce one torrent at a time"
        )
    given = _LEFT_OUT.copy()
    for part in query.split("&"):
        name, _, value = part.partition("=")
        given[name] = value
    info_hash, peer_id = _info_hash(given["info_hash"]), _bytes(given["peer_id"])
    if len(peer_id) != 20:
        raise TrackerError(f"peer_id must be 20 bytes, these are {len(peer_id)}")
    event = given["event"]
    return _tuple(Announce, (
        info_hash,
        peer_id,
        client_address(environ, settings),
        _port(given["port"]),
        _left(given["left"]),
        event if event in _EVENTS else "",  # nobody is shut out for a new one
        _numwant(given["numwant"]),
        # As it is sent: hex, decimal, or 8 bytes of anything by aria2. No more of it is
        # kept than tells two clients apart.
        zlib.crc32(given["key"].encode("latin-1", "replace")),
        given["compact"] != "0",  # BEP 23: compact unless refused
        given["no_peer_id"] == "1",
    ))  # fmt: skip


def parse_scrape(environ):
    """Return the info_hashes (20 bytes each) a scrape asks for, [] for all (BEP 48)."""
    parts = environ.get("QUERY_STRING", "").split("&")
    return [_info_hash(part[10:]) for part in parts if part.startswith("info_hash=")]


@lru_cache(maxsize=2000)
def _info_hash(text):
    if not text:
        raise TrackerError("info_hash is missing: this URL is for BitTorrent clients")
    value = _bytes(text)
    if len(value) == 20:
        return value
    if len(value) == 32 and not value.isalnum():
        return value[:20]  # a whole v2 hash: trackers know the first 20 bytes (BEP 52)
    hint = {40: ": is it hex?", 32: ": is it base32?"}.get(len(value), "")
    raise TrackerError(f"info_hash must be 20 bytes, these are {len(value)}{hint}")


def _bytes(text):
    """Return the bytes that a value escapes; + is a space, as urlencode sends it."""
    if "+" in text:
        text = text.replace("+", " ")
    raw = text.encode("latin-1", "replace")
    if "%" not in text:
        return raw
    # What is quoted by % is decoded as what is by =, in C: urllib takes a dozen times
    # as long.
    return a2b_qp(raw.replace(b"=", b"=3D").replace(b"%", b"="))


def _port(text):
    if text.isdecimal() and len(text) < 9 and (port := int(text)) < 65536:
        return port
    if text:
        raise TrackerError("port must be a whole number from 0 to 65535")
    return 0  # aria2 leaves it out when it has none


def _left(text):
    if text.isdecimal() and len(text) < 40:
        return int(text)
    if text and not text.startswith("-"):
        raise TrackerError("left must be a whole number of bytes")
    return None  # webtorrent sends it empty with a magnet link, or leaves it out


def _numwant(text):
    return int(text) if text.isdecimal() and len(text) < 10 else -1


# -- Replies --------------------------------------------------------------------------
# The only place that knows the names of the wire. Refusals are ordinary replies, with
# HTTP status 200: on any other, clients discard the reason and come back in seconds.


# An announce's reply is filled into a form: encoding a dictionary takes three times as
# long.
_FORM_LISTED = (
    bencoder.bencode(dict.fromkeys(
        (b"complete", b"downloaded", b"incomplete", b"interval", b"min interval"), 0
    ))[:-1].replace(b"i0e", b"i%de").replace(b"10:incomplete", b"%b10:incomplete")
    + b"5:peers"  # rTorrent needs the key
)  # fmt: skip
_FORM = _FORM_LISTED + b"%d:%b"


def announce_reply(announce, counts, peers, interval, settings):
    """Return the bencoded answer to an announce (BEP 3, 7, 23, 24)."""
    external_ip, least = _external_ip(announce.address), settings.min_interval
    seeders, leechers, snatches = counts.seeders, counts.leechers, counts.snatches
    numbers = seeders, snatches, external_ip, leechers, interval, least
    if announce.compact:
        endpoints = _with_ports(peers.endpoints4, 6)
        reply = _FORM % (*numbers, len(endpoints), endpoints)
        if peers.endpoints6 or len(announce.address) == 16:
            reply += b"6:peers6" + bencoder.bencode(_with_ports(peers.endpoints6, 18))
    else:
        reply = _FORM_LISTED % numbers
        reply += bencoder.bencode(_peer_list(peers, announce.no_peer_id))
    if settings.notice:
        reply += b"15:warning message" + bencoder.bencode(settings.notice.encode())
    return reply + b"e"


def scrape_reply(files, settings):
    """Return the bencoded answer to a scrape (BEP 48, 21).

    ``files`` is Counts by info_hash.
    """
    reply = {
        b"files": {info_hash: _scraped(counts) for info_hash, counts in files.items()}
    }
    reply[b"flags"] = {b"min_request_interval": settings.min_interval}
    return bencoder.bencode(reply)


def failure_reply(reason, settings):
    """Return a bencoded refusal (BEP 31).

    No client is known to read ``retry in`` (minutes); libtorrent, Transmission and
    rTorrent wait for the intervals, so those come with it.
    """
    return bencoder.bencode({
        b"failure reason": reason.encode(),
        b"interval": settings.interval,
        b"min interval": settings.min_interval,
        b"retry in": max(1, settings.interval // 60),
    })  # fmt: skip


def _with_ports(column, width):
    """Return a column of endpoints without those whose port is zero."""
    if 0 not in column[width - 2 :: width]:  # no port below 256
        return column
    ends = range(width, len(column) + 1, width)
    return b"".join(
        [column[end - width : end] for end in ends if column[end - 2 : end] != b"\0\0"]
    )


def _peer_list(peers, no_peer_id):
    """Return peers as dictionaries; one with two endpoints is there twice (BEP 7)."""
    found = []
    for i in range(len(peers.ids) // 20):
        for column, width, family in (
            (peers.endpoints4, 6, socket.AF_INET),
            (peers.endpoints6, 18, socket.AF_INET6),
        ):
            endpoint = column[i * width : (i + 1) * width]
            if endpoint[-2:] not in (b"", b"\0\0"):
                ip = socket.inet_ntop(family, endpoint[:-2]).encode()
                peer = {b"ip": ip, b"port": int.from_bytes(endpoint[-2:], "big")}
                if not no_peer_id:
                    peer[b"peer id"] = peers.ids[i * 20 : i * 20 + 20]
                found.append(peer)
    return found


@lru_cache(maxsize=10000)
def _external_ip(address):
    """Return BEP 24's key and value; nothing for a private address, of no use there."""
    if ipaddress.ip_address(address).is_global:
        return b"11:external ip" + bencoder.bencode(address)
    return b""


def _scraped(counts):
    scraped = {
        b"complete": counts.seeders,
        b"downloaded": counts.snatches,
        b"incomplete": counts.leechers,
    }
    if counts.partial_seeds:
        scraped[b"downloaders"] = counts.leechers - counts.partial_seeds
    return scraped


# -- Store ----------------------------------------------------------------------------


class Store:
    """Who is in which swarm: what every store must do.

    ``now`` is in seconds since 1970. A store forgets a peer's endpoint peer_ttl seconds
    after the last announce that named it, and the peer with its last endpoint. Whatever
    it has acknowledged, another process sees at once.
    """

    def announce(self, announce, wanted, now):
        """Record what a peer says; return Counts and up to ``wanted`` Peers.

        A peer is known by its peer_id and counts once, with an endpoint of each family.
        It is never handed its own endpoints; a seeder is handed no seeders, unless the
        endpoint is new: aria2 with a magnet link claims to have everything.
        A completed download is counted once a peer, as a snatch.
        Raise TrackerError when a limit is reached, or when a live peer announces from
        another address with another key.
        """
        raise NotImplementedError

    def scrape(self, info_hashes, now):
        """Return Counts by info_hash, zeros for a swarm that is not known."""
        raise NotImplementedError

    def swarms(self, now, first=None):
        """Yield (info_hash, Counts) of every swarm that has peers or snatches.

        With ``first``, 0 to 255, only of those whose info_hash begins with that byte.
        """
        raise NotImplementedError

    def peers(self, now):
        """Yield (info_hash, Peers) of every swarm, with all the peers that are kept."""
        raise NotImplementedError

    def records(self, now):
        """Yield (info_hash, snatches, peers) of every swarm, as it is in one moment.

        ``peers`` yields (Record, is_seeder) of each.
        """
        raise NotImplementedError

    def restore(self, info_hash, snatches, peers, now):
        """Merge into a swarm what ``records`` yielded, here or elsewhere, now or once.

        Of a peer that is known here, the newer sighting wins, in each family and in
        what the peer is; SNATCHED stays. The snatches are the larger number. So it is
        the same how often it is done. What has expired is left out, and nobody is seen
        later than ``now``. Return Restored; raise TrackerError when there are too many
        swarms.
        """
        raise NotImplementedError

    def last_seen(self, info_hash, now):
        """Return about when anybody last announced, 0 where that is not known."""
        raise NotImplementedError

    def families(self, now):
        """Return how many peers have an IPv4 endpoint, and how many an IPv6 one."""
        raise NotImplementedError

    def tidy(self, now):
        """Do a little housekeeping when it is due: nobody else does it."""
        raise NotImplementedError

    def probe(self):
        """Raise OSError if peers cannot be kept."""
        raise NotImplementedError


PAGE = 4096  # bytes: one block of a file system, one page of memory
SLOTS = 70  # peers in a page: as many as fit
CROWDED = 56  # peers in a page from which a newcomer may go to its second page
FILL = 40  # peers a page, on average: so no page got full in growing to 200,000 peers
SPARSE = 16  # peers a page, on average, below which pages are given back
SAMPLE = 16  # pages, at the most, in which the peers of an address are counted
MAGIC = b"swrm\x01"  # with the version of the format
QUIET, CHANGING, RETIRED, CONDEMNED = range(4)  # states of a swarm file
PARTIAL, SNATCHED = 1, 2  # bits of a peer's state
TIDY_EVERY = 10  # seconds
SHELVES = 64  # files that small swarms share
SHELF_MAGIC = b"shlf\x01"  # with the version of the format
BUCKETS, BUCKET = 31, 16  # of entries of a shelf, and how many entries are in each
KNOWN_AT_MOST = 4096  # swarms on shelves that a process remembers
_QUIETLY = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOATIME", 0)  # which is Linux's
# Descriptors of swarm files that a process keeps: half of what it may have, less those
# of shelves. Two thirds are for files, and one for mapped memory, which before Python
# 3.13 has its own.
_MAY_HAVE = resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31  # -1 for any number
OPEN_AT_MOST = min(2048, max(16, _MAY_HAVE // 2 - 2 * SHELVES))
# File systems on which a file may be mapped: a change there needs no room that a full
# disk has not (as on btrfs and ZFS), and all see it at once (not so over a network).
MAPPABLE = frozenset(("ext2", "ext3", "ext4", "xfs", "tmpfs"))


class DamagedError(Exception):
    """A file is not a whole one of this version."""


class NewerError(Exception):
    """A file is of a version that is newer than this one's."""


class RetiredError(Exception):
    """A swarm was dropped, or its file, while the lock was waited for."""


class OutgrownError(Exception):
    """A swarm needs more than one page, which is all that a shelf has for it."""


class Record(NamedTuple):
    """A peer as a page keeps it."""

    peer_id: bytes  # 20 bytes
    key: int  # checksum of the client's key, 0 for none
    state: int  # PARTIAL, SNATCHED
    seen4: int  # seconds since 1970 of the last announce over IPv4, 0 for none
    seen6: int
    endpoint4: bytes  # 6 bytes: address and port, 0 for a port nobody can reach
    endpoint6: bytes  # 18 bytes


class Restored(NamedTuple):
    """What became of the peers that were to be restored."""

    kept: int
    expired: int
    refused: int  # by max_peers or max_peers_per_address


_PAGE_HEAD = struct.Struct("<5sBBBII")
_SWARM_HEAD = struct.Struct("<20s8sIIIIQIIB")
_CHECKED = _PAGE_HEAD.size + _SWARM_HEAD.size  # what follows is its checksum
_HEADS = _CHECKED + 4
_HASHES = struct.Struct("<II")
_WHO = struct.Struct("<20sIBII")  # a Record without the endpoints
_LASTING = struct.Struct("<20sIB")  # of that, what stays from announce to announce
_SEEN4_AT, _SEEN6_AT = 25, 29  # in a Record
# Where in a page the three columns begin.
_WHOS = PAGE - SLOTS * (_WHO.size + 6 + 18)
_ENDS4 = _WHOS + SLOTS * _WHO.size
_ENDS6 = _ENDS4 + SLOTS * 6
# A shelf: what begins it, where its entries and its pages are, and what an entry is.
_SHELF_HEAD = SHELF_MAGIC + bytes(15)
_RETIRED_SHELF = SHELF_MAGIC + b"\1" + bytes(14)
_ENTRY = struct.Struct("<20sH10x")  # in no two blocks, or a kill could cut a write
_BUCKET = BUCKET * _ENTRY.size
_PAGES = 4 * PAGE
_ENTRIES = _PAGES - BUCKETS * _BUCKET
_FREE = bytes(_ENTRY.size)
# What is read of all slots at once.
_IDS = struct.Struct("20s13x" * SLOTS)
_SEEN = struct.Struct("<" + "25xII" * SLOTS)
_ADDRESSES4 = struct.Struct("4s2x" * SLOTS)
_PREFIXES6 = struct.Struct("8s10x" * SLOTS)


_NOWHERE4, _NOWHERE6 = bytes(6), bytes(18)  # the endpoints of a family that is absent


class Page:
    """Up to 70 peers in columns, the leechers first and then the seeders.

    Columns make a reply a slice: any run of slots is a run of endpoints. A page knows
    nothing of files; its bytes are laid out as FileStore says.
    """

    __slots__ = (
        *("number", "data", "peers", "leechers", "partial_seeds", "oldest", "counted"),
    )

    def __init__(self, number, data):
        """Read page ``number`` from 4096 bytes; raise DamagedError if it is not it."""
        if len(data) != PAGE:
            raise DamagedError(f"page {number} is cut short")
        head = _PAGE_HEAD.unpack_from(data)
        magic, peers, leechers, partial_seeds, stored, self.oldest = head
        if magic != MAGIC or stored != number:
            raise DamagedError(f"page {number} does not begin with {MAGIC!r}")
        if not partial_seeds <= leechers <= peers <= SLOTS:
            raise DamagedError(f"page {number} counts its peers wrong")
        self.number, self.data = number, data
        self.peers, self.leechers, self.partial_seeds = peers, leechers, partial_seeds
        self.counted = head[1:4]  # what the swarm's counts include of this page

    @classmethod
    def empty(cls, number):
        """Return a new page."""
        return cls(
            number, _PAGE_HEAD.pack(MAGIC, 0, 0, 0, number, 0).ljust(PAGE, b"\0")
        )

    def counts(self):
        """Return how many peers, leechers among them, and partial seeds among these."""
        return self.peers, self.leechers, self.partial_seeds

    def seal(self):
        """Bring the head of ``data`` up to date, after changes."""
        if not 0 <= self.partial_seeds <= self.leechers:
            raise DamagedError(f"page {self.number} counts its partial seeds wrong")
        self.put(0, _PAGE_HEAD.pack(MAGIC, *self.counts(), self.number, self.oldest))

    def put(self, at, data):
        """Replace bytes in the head, which the swarm keeps in page 0."""
        self.data = b"".join((self.data[:at], data, self.data[at + len(data) :]))

    def _edited(self):
        if not isinstance(self.data, bytearray):  # as most stay, which are only read
            self.data = bytearray(self.data)
        return self.data

    def find(self, peer_id):
        """Return the slot of a peer, or -1."""
        stop = _WHOS + self.peers * _WHO.size
        return _find(self.data, peer_id, _WHO.size, _WHOS, stop)

    def __getitem__(self, slot):
        data, at4, at6 = self.data, _ENDS4 + slot * 6, _ENDS6 + slot * 18
        who = _WHO.unpack_from(data, _WHOS + slot * _WHO.size)
        return Record(*who, data[at4 : at4 + 6], data[at6 : at6 + 18])

    def __setitem__(self, slot, record):
        data, at4, at6 = self._edited(), _ENDS4 + slot * 6, _ENDS6 + slot * 18
        _WHO.pack_into(data, _WHOS + slot * _WHO.size, *record[:5])
        data[at4 : at4 + 6], data[at6 : at6 + 18] = record[5:]

    def add(self, record, seeder):
        """Put a peer in, for which there must be room."""
        slot = self.peers
        self.peers += 1
        if not seeder:
            self[slot] = self[self.leechers]  # the first seeder goes behind the last
            slot = self.leechers
            self.leechers += 1
            self.partial_seeds += record.state & PARTIAL
        self[slot] = record
        self.oldest = min(filter(None, (record.seen4, record.seen6, self.oldest)))

    def remove(self, slot):
        """Take a peer out and return its Record; no slot below ``slot`` changes."""
        record = self[slot]
        self.peers -= 1
        if slot < self.leechers:
            self.leechers -= 1
            self.partial_seeds -= record.state & PARTIAL
            self[slot] = self[self.leechers]
            slot = self.leechers
        self[slot] = self[self.peers]
        return record

    def forget(self, cutoff):
        """Forget endpoints last seen before ``cutoff``, and peers left without one."""
        seen = _SEEN.unpack_from(self.data, _WHOS)[: 2 * self.peers]
        for slot in reversed(range(self.peers)):
            seen4, seen6 = seen[2 * slot : 2 * slot + 2]
            if max(seen4, seen6) < cutoff:
                self.remove(slot)
            elif 0 < seen4 < cutoff:
                self[slot] = self[slot]._replace(endpoint4=_NOWHERE4, seen4=0)
            elif 0 < seen6 < cutoff:
                self[slot] = self[slot]._replace(endpoint6=_NOWHERE6, seen6=0)
        self.oldest = min([at for at in seen if at >= cutoff], default=0)

    def count_from(self, address):
        """Return how many peers have an IPv4 address, or the /64 of an IPv6 one."""
        if len(address) == 4:
            sources = _ADDRESSES4.unpack_from(self.data, _ENDS4)
        else:
            sources = _PREFIXES6.unpack_from(self.data, _ENDS6)
        return sources[: self.peers].count(address[:8])

    def find_same(self, announce):
        """Find a peer of whom an announce without event tells nothing new.

        Return where the page says when it was last seen, and its endpoints, as
        ``endpoints`` does; (0, None) if there is none. An endpoint is found much sooner
        than a peer_id, being shorter.
        """
        data, endpoint = self.data, _endpoint(announce)
        if len(endpoint) == 6:
            start, width, seen_at = _ENDS4, 6, _SEEN4_AT
        else:
            start, width, seen_at = _ENDS6, 18, _SEEN6_AT
        at = data.find(endpoint, start, start + self.peers * width)
        if at < 0:
            return 0, None
        slot, rest = divmod(at - start, width)
        who_at = _WHOS + slot * _WHO.size
        peer_id, key, state = _LASTING.unpack_from(data, who_at)
        if (
            peer_id != announce.peer_id
            or key != announce.key
            or (announce.left == 0) != (slot >= self.leechers)
            or state & PARTIAL
            or rest  # by chance, across two others
        ):
            return 0, None
        return who_at + seen_at, self.endpoints(slot)

    def endpoints(self, slot):
        """Return a peer's endpoints, (IPv4, IPv6), b"" for a family it has not."""
        data, at4, at6 = self.data, _ENDS4 + slot * 6, _ENDS6 + slot * 18
        return _present(data[at4 : at4 + 6], data[at6 : at6 + 18])

    def families(self):
        """Return how many peers have an IPv4 endpoint, and how many an IPv6 one."""
        seen = _SEEN.unpack_from(self.data, _WHOS)[: 2 * self.peers]
        return self.peers - seen[::2].count(0), self.peers - seen[1::2].count(0)

    def columns(self):
        """Return all peers, as the columns of Peers."""
        data, number = self.data, self.peers
        ids = b"".join(_IDS.unpack_from(data, _WHOS)[:number])
        ends4 = data[_ENDS4 : _ENDS4 + number * 6]
        return ids, ends4, data[_ENDS6 : _ENDS6 + number * 18]

    def pick(self, wanted, seeders_too, own, with_ids):
        """Return at random up to ``wanted`` peers, as the columns of Peers.

        They have a port in a family of the peer that asks, whose ``own`` endpoints are
        left out.
        """
        data, (own4, own6) = self.data, own
        pool = self.peers if seeders_too else self.leechers
        ids = b"".join(_IDS.unpack_from(data, _WHOS)[:pool]) if with_ids else b""
        ends4 = data[_ENDS4 : _ENDS4 + pool * 6] if own4 else b""
        ends6 = data[_ENDS6 : _ENDS6 + pool * 18] if own6 else b""
        # A zero there is a port below 256, or none. Without any, all can be reached.
        if not (own4 and 0 not in ends4[4::6] or own6 and 0 not in ends6[16::18]):
            ids, ends4, ends6, pool = _reachable(ids, ends4, ends6)
        while (at := _find(ends4, own4, 6)) >= 0 or (at := _find(ends6, own6, 18)) >= 0:
            pool -= 1
            ids, ends4, ends6 = _run(at + 1, pool, ids, ends4, ends6)
        if pool <= wanted:
            return ids, ends4, ends6
        return _run(int(random() * pool), wanted, ids, ends4, ends6)


def _present(endpoint4, endpoint6):
    """Return both endpoints, b"" for that of an absent family."""
    return (
        endpoint4 if endpoint4 != _NOWHERE4 else b"",
        endpoint6 if endpoint6 != _NOWHERE6 else b"",
    )


def _run(first, count, ids, ends4, ends6):
    """Return ``count`` peers of the columns from ``first`` on, and round the end."""
    last = first + count
    return (
        ids and (ids + ids)[first * 20 : last * 20],
        ends4 and (ends4 + ends4)[first * 6 : last * 6],
        ends6 and (ends6 + ends6)[first * 18 : last * 18],
    )


def _entry(directory, info_hash, wanted):
    """Return where the entry of a swarm is on a shelf, or a free one for it; or 0."""
    start = _ENTRIES + info_hash[1] % BUCKETS * _BUCKET
    number = _find(directory[start : start + _BUCKET], wanted, _ENTRY.size)
    return start + number * _ENTRY.size if number >= 0 else 0


def _entries_of(directory):
    """Return (info_hash, place) of all swarms on a shelf."""
    entries = _ENTRY.iter_unpack(directory[_ENTRIES:_PAGES])
    return [entry for entry in entries if entry[1]]


def _at_place(place):
    """Return where on a shelf the page of a place begins; places count from 1."""
    return _PAGES + (place - 1) * PAGE


def _find(data, wanted, width, start=0, stop=None):
    """Return the number of the item that begins so in a column, or -1.

    ``width`` is that of the items, in bytes; the column is what is from ``start`` to
    ``stop``. An empty endpoint is nowhere.
    """
    if not wanted:
        return -1
    at = data.find(wanted, start, stop)
    while at >= 0 and (at - start) % width:  # by chance, across two others
        at = data.find(wanted, at + 1, stop)
    return (at - start) // width if at >= 0 else -1


def _reachable(ids, ends4, ends6):
    """Return the columns without those who have no port, and how many are left."""
    ports4 = map(or_, ends4[4::6], ends4[5::6])
    ports6 = map(or_, ends6[16::18], ends6[17::18])
    slots = [i for i, ports in enumerate(zip_longest(ports4, ports6)) if any(ports)]
    return (
        b"".join([ids[i * 20 : i * 20 + 20] for i in slots]),
        b"".join([ends4[i * 6 : i * 6 + 6] for i in slots]),
        b"".join([ends6[i * 18 : i * 18 + 18] for i in slots]),
        len(slots),
    )


def _lacking(columns, wanted):
    """Return how many peers lack, or 0 if there are half of those wanted."""
    lacking = wanted - (len(columns[1]) // 6 or len(columns[2]) // 18)
    return lacking if lacking > wanted // 2 else 0


class SwarmFile:
    """An open file of one swarm; in a ``with`` it is locked."""

    __slots__ = ("path", "fd", "opened", "map", "is_met", "lock")

    def __init__(self, path, now):
        """Open what is at ``path``; raise OSError if there is nothing."""
        self.fd = -1
        self.fd = _open_quietly(path)
        self.path, self.opened = path, now
        self.map, self.is_met = None, False  # the file as memory, see FileStore._map
        self.lock = Lock()  # between threads, as flock is between descriptors

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)  # no sooner than the last thread that uses it is done

    def __enter__(self):
        self.lock.acquire()
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            self.map = _whole(self.map, self.fd)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        try:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        finally:
            self.lock.release()

    def is_at_path(self):
        """Return whether the file is still the one at its path; it must be locked."""
        return _is_at(self.path, self.fd)

    def page(self, at):
        """Return the 4096 bytes of a page, fewer where the file ends."""
        data = self.map and self.map[at : at + PAGE]
        return data or os.pread(self.fd, PAGE, at)  # one that is new is not mapped yet

    def cut(self, size):
        """Have no more than ``size`` bytes."""
        os.ftruncate(self.fd, size)
        self.map = None  # it may be longer than the file

    def holds(self, swarm):
        """Return whether this is where its swarm is to be looked for."""
        return self.is_at_path()

    def drop(self, swarm):
        """Hold the swarm no more."""
        os.unlink(self.path)

    def set_aside(self, swarm, path):
        """Move the swarm, which is damaged, to another path."""
        swarm.condemn()  # others may have it open, and not see what is wrong with it
        os.replace(self.path, path)


class Shelf(SwarmFile):
    """An open file of many swarms, each in one page; see FileStore."""

    __slots__ = ()

    def would_open_again(self):
        """Return whether its path leads here, and it may still be written."""
        try:
            fd = _open_quietly(self.path)
        except OSError:
            return False
        try:
            return os.path.sameopenfile(fd, self.fd)
        finally:
            os.close(fd)

    def directory(self):
        """Return what is before the pages, and perhaps these, as bytes or memory.

        What its file lacks is zeros. It need not be locked: an entry may change
        meanwhile, as it may afterwards.
        Raise DamagedError, NewerError or RetiredError.
        """
        data = _whole(self.map, self.fd)
        if data is None or len(data) < _PAGES:
            data = os.pread(self.fd, _PAGES, 0) or _SHELF_HEAD  # only just made
            data = data.ljust(_PAGES, b"\0")
        head = data[:20]
        if head == _SHELF_HEAD:
            return data
        if head == _RETIRED_SHELF:
            raise RetiredError
        if _is_newer(head, SHELF_MAGIC):
            raise NewerError
        raise DamagedError(f"it does not begin with {_SHELF_HEAD!r}")

    def swarms(self):
        """Return the info_hashes of all swarms."""
        return [info_hash for info_hash, _ in _entries_of(self.directory())]

    def find(self, info_hash):
        """Return where the page of a swarm begins, 0 if it is not here."""
        directory = self.directory()
        at = _entry(directory, info_hash, info_hash)
        place = _ENTRY.unpack_from(directory, at)[1] if at else 0
        return place and _at_place(place)

    def put(self, info_hash, page):
        """Give a swarm a place, and its page; return whether there is one left."""
        directory = self.directory()
        at = _entry(directory, info_hash, _FREE)
        # The swarm of 20 zeros, which nobody has, gets a file of its own.
        if not at or not any(info_hash):
            return False
        taken = {place for _, place in _entries_of(directory)}
        place = next(place for place in count(1) if place not in taken)
        _write(self.fd, _SHELF_HEAD, 0)  # first, as the file may be new
        _write(self.fd, page, _at_place(place))
        _write(self.fd, _ENTRY.pack(info_hash, place), at)
        return True

    def holds(self, swarm):
        with suppress(DamagedError, NewerError, RetiredError):
            return self.find(swarm.info_hash) == swarm.at
        return False

    def drop(self, swarm):
        info_hash = swarm.info_hash
        _write(self.fd, _FREE, _entry(self.directory(), info_hash, info_hash))

    def set_aside(self, swarm, path):
        page = self.page(swarm.at)
        Path(path).write_bytes(page)
        if _owner(page) == swarm.info_hash:  # else it may be the page of another
            swarm.condemn()
        self.drop(swarm)

    def pages(self):
        """Return how many pages there are, of swarms or free."""
        return max(0, os.fstat(self.fd).st_size - _PAGES) // PAGE

    def retire(self):
        """Tell all others who have it open that it is not to be used any more."""
        _write(self.fd, _RETIRED_SHELF, 0)

    def rebuild(self, now, settings):
        """Make the directory anew, of the pages that are whole; it must be locked.

        One that nobody is in may be the rest of a kill, of a swarm that is elsewhere.
        """
        directory = bytearray(_SHELF_HEAD.ljust(_PAGES, b"\0"))
        for place in range(1, self.pages() + 1):
            at = _at_place(place)
            swarm = Swarm(self, at, _owner(self.page(at)), settings)
            with suppress(DamagedError, NewerError, RetiredError):
                swarm.begin(now)
                at = _entry(directory, swarm.info_hash, _FREE)
                if at and not swarm.is_forgettable():
                    _ENTRY.pack_into(directory, at, swarm.info_hash, place)
        _write(self.fd, directory[20:], 20)
        _write(self.fd, _SHELF_HEAD, 0)


class Swarm:
    """A swarm in an open file. That has to be locked, and ``begin`` called first."""

    __slots__ = (
        *("file", "at", "info_hash", "settings", "ttl", "first", "head", "loaded"),
        *("now", "due", "salt", "pages", "tally", "snatches", "recount_at", "emptied"),
        "state",
    )

    def __init__(self, file, at, info_hash, settings):
        self.file, self.at = file, at  # where its first page begins: 0 off a shelf
        self.info_hash, self.settings = info_hash, settings
        self.first, self.head = None, None  # page 0, and what is known to begin it
        self.loaded, self.due = {}, 0  # other pages; see _look_after
        self.ttl = settings.peer_ttl

    def begin(self, now):
        """Read the first page; raise DamagedError, NewerError or RetiredError."""
        self.now = now
        data = self.file.page(self.at)
        if data[:_HEADS] == self.head and len(data) == PAGE:
            self.first.data = data  # all that follows from the head still stands
        else:
            self._read_first(data)
        if self.loaded:
            self.loaded = {}
        if now >= self.due:
            self._look_after(now)

    def is_as_it_was(self, now):
        """Return whether counts are still what they were at the last visit.

        A mapped head tells that without flock: whoever changes them changes it, and one
        that is half-written is not as it was.
        """
        mapped, at = _whole(self.file.map, self.file.fd), self.at
        is_same = mapped is not None and mapped[at : at + _HEADS] == self.head
        return is_same and now < self.due

    def _look_after(self, now):
        """Forget who has expired, and recount, if need be; see when it is due again."""
        if 0 < self.first.oldest < now - self.ttl:
            self._forget_expired(self.first)
        is_due = self.pages > 1 and not now < self.recount_at <= now + self.ttl
        if is_due or self.state == CHANGING:
            self._recount()
        due = (self.first.oldest or now) + self.ttl + 1
        self.due = due if self.pages == 1 else min(due, self.recount_at)

    def _read_first(self, data):
        """Take in the first page, of 4096 bytes, or none in a new file."""
        self.head, self.due = None, 0
        if not data and not self.at:
            data = _new_first(self.info_hash, self.now)
        if data[:5] != MAGIC and _is_newer(data, MAGIC):
            raise NewerError
        self.first = first = Page(0, data)
        heads = first.data[:_HEADS]
        raw, stored = heads[_PAGE_HEAD.size : _CHECKED], heads[_CHECKED:]
        if stored != _checksum(raw) and any(stored):
            raise DamagedError("its head does not have its checksum")
        head = _SWARM_HEAD.unpack(raw)
        info_hash, self.salt, self.pages, peers, leechers, partial_seeds = head[:6]
        self.snatches, self.recount_at, self.emptied, self.state = head[6:]
        if self.state == RETIRED:
            raise RetiredError
        if info_hash != self.info_hash or not self.pages or self.state > CHANGING:
            raise DamagedError("its head is not that of this swarm")
        if self.at and (self.pages > 1 or self.state != QUIET):
            raise DamagedError("its head is not that of a swarm of one page")
        self.tally = first.counted
        if self.pages > 1:
            self.tally = peers, leechers, partial_seeds
            is_right = partial_seeds <= leechers <= peers <= self.pages * SLOTS
            if self.state == QUIET and not is_right:
                raise DamagedError("its head counts the peers wrong")
        self.head = heads  # not before: it is known from now on

    # What is done with a swarm

    def announce(self, announce, wanted):
        """Record an announce; return (Counts, Peers), as Store.announce says."""
        event = announce.event
        if not event and self.pages == 1:
            answer = self._answer_same(announce, wanted)
            if answer:
                return answer
        own, is_first = None if event else self._note_same(announce), False
        if not own:
            own, is_first = self._record(announce)
        if event == "stopped" or not wanted:
            return self.counts(), NOBODY
        seeders_too = is_first or announce.left != 0
        with_ids = not announce.compact
        return self.counts(), self._choose(wanted, seeders_too, own, with_ids)

    def _answer_same(self, announce, wanted):
        """Answer as ``announce`` does to a peer who is still there and says no more.

        Return None, with nothing done, where that is not as simple: for any but a peer
        with IPv4 alone in a swarm of one page. But most are such, and all in one place
        it takes half the time.
        """
        page, data = self.first, self.first.data
        endpoint = announce.address + announce.port.to_bytes(2, "big")
        peers, leechers = page.peers, page.leechers
        ends4 = data[_ENDS4 : _ENDS4 + peers * 6]
        at = ends4.find(endpoint)
        slot = at // 6
        who_at, at6 = _WHOS + slot * _WHO.size, _ENDS6 + slot * 18
        peer_id, key, state = _LASTING.unpack_from(data, who_at)
        is_seeder = slot >= leechers
        if (
            at % 6  # not there, as with ports 0 and 1, or by chance across two others
            or peer_id != announce.peer_id
            or key != announce.key
            or is_seeder != (announce.left == 0)
            or state & PARTIAL
            or data[at6 : at6 + 18] != _NOWHERE6
            or 0 in ends4[4::6]  # somebody has no port, or a low one
            or not announce.compact
        ):
            return None
        others = ends4[: leechers * 6] if is_seeder else ends4[at + 6 :] + ends4[:at]
        if endpoint in others:
            return None
        self._write_seen(who_at + _SEEN4_AT)
        pool = len(others) // 6
        if pool > wanted:
            start = int(random() * pool) * 6
            others = (others + others)[start : start + wanted * 6]
        counts = peers - leechers, leechers, page.partial_seeds, self.snatches
        return _tuple(Counts, counts), _tuple(Peers, (b"", others, b""))

    def _note_same(self, announce):
        """Write that a peer is still there, if that is all it says, as most do.

        Return then its endpoints, as Page.endpoints does.
        """
        for number in self._homes(announce.peer_id):
            page = self._page(number)
            seen_at, own = page.find_same(announce)
            if own:
                self._write_seen(number * PAGE + seen_at)
                return own
        return None

    def _record(self, announce):
        """Record what is new; return the peer's endpoints, and whether one is new."""
        page, slot = self._locate(announce.peer_id)
        if slot >= 0:
            return self._change(page, slot, announce)
        if announce.event == "stopped":
            return (b"", b""), False
        return self._arrive(page, announce), True

    def _arrive(self, page, announce):
        """Put a new peer in; return its endpoints, as Page.endpoints does."""
        self._refuse_excess(page, announce.address)
        page = self._page_with_room(announce.peer_id)
        record = _updated(_ABSENT, announce, self.now)
        self.snatches += record.state // SNATCHED
        page.add(record, _is_seeder(announce))
        self._save(page)
        return page.endpoints(page.find(announce.peer_id))

    def _change(self, page, slot, announce):
        """Bring a peer up to date; return its endpoints, and whether one is new."""
        old, seeder = page[slot], _is_seeder(announce)
        if old.key and old.key != announce.key:
            _refuse_stranger(old, announce)
        new = _updated(old, announce, self.now)
        # rTorrent may finish without ever saying so: its next announce has left=0.
        if seeder and slot < page.leechers:
            new = new._replace(state=new.state | SNATCHED)
        self.snatches += (new.state & ~old.state) // SNATCHED
        page.remove(slot)
        if announce.event != "stopped":
            page.add(new, seeder)
        self._save(page)
        is_first = (new.seen4 and not old.seen4) or (new.seen6 and not old.seen6)
        own = _present(new.endpoint4, new.endpoint6)
        return own, is_first or announce.event == "started"

    def counts(self):
        """Return the swarm's Counts."""
        peers, leechers, partial_seeds = self.tally
        seeders = peers - leechers
        return _tuple(Counts, (seeders, leechers, partial_seeds, self.snatches))

    def last_seen(self):
        """Return when a peer last announced, among the first that there are."""
        for number in range(self.pages if self.tally[0] else 0):
            page = self._page(number)
            if page.peers:
                return max(_SEEN.unpack_from(page.data, _WHOS)[: 2 * page.peers])
        return self.emptied

    def peers(self):
        """Return all Peers of the swarm."""
        found = [self._page(number).columns() for number in range(self.pages)]
        self.loaded.clear()  # that was the whole swarm
        return Peers(*map(b"".join, zip(*found, strict=True)))

    def families(self):
        """Return how many peers of the swarm have an IPv4 endpoint, and an IPv6 one."""
        found = [self._page(number).families() for number in range(self.pages)]
        self.loaded.clear()  # that was the whole swarm
        return tuple(map(sum, zip(*found, strict=True)))

    def snapshot(self):
        """Return the snatches, and copies of all pages."""
        pages = [Page(0, bytes(self.first.data))]
        pages += [self._page(number) for number in range(1, self.pages)]
        self.loaded.clear()  # they are the caller's
        return self.snatches, pages

    def restore(self, snatches, peers):
        """Merge peers, (Record, is_seeder); return how many limits kept out."""
        refused, self.snatches = 0, max(snatches, self.snatches)
        for record, is_seeder in peers:
            try:
                self._restore(record, is_seeder)
            except TrackerError:
                refused += 1
        if self._head() != self.first.data[_PAGE_HEAD.size : _HEADS]:
            self._save(self.first)
        return refused

    def _restore(self, record, is_seeder):
        """Merge a peer, as Store.restore says; raise TrackerError at a limit."""
        page, slot = self._locate(record.peer_id)
        if slot < 0:
            for endpoint in filter(None, _present(record.endpoint4, record.endpoint6)):
                self._refuse_excess(page, endpoint[:-2])
            page = self._page_with_room(record.peer_id)
        else:
            known = page[slot], slot >= page.leechers
            record, is_seeder = merged = _merged(*known, record, is_seeder)
            if merged == known:
                return
            page.remove(slot)
        page.add(record, is_seeder)
        self._save(page)

    def is_forgettable(self):
        """Return whether nobody is in the swarm and nothing of it is worth keeping."""
        kept = self.settings.swarm_ttl if self.snatches else 0
        return not self.tally[0] and self.now >= self.emptied + kept

    def retire(self):
        """Tell all others who have the file open that it is not to be used any more.

        It is a whole page, also of a file that was only just made: if we are killed
        now, whoever finds the file removes it.
        """
        self.state = RETIRED
        self._write(self.first)
        self.head = None  # for a thread that waits with the same Swarm

    def condemn(self):
        """Tell all others who have the file open that it is damaged."""
        self._pwrite(bytes((CONDEMNED,)), _CHECKED - 1)

    def leave_shelf(self):
        """Go on in a file of its own: raise OutgrownError, unless there is one."""
        if self.at:
            raise OutgrownError

    def _choose(self, *ask):
        """Return up to ``wanted`` Peers, of a random page first; see Page.pick."""
        if self.pages == 1:
            return _tuple(Peers, self.first.pick(*ask))
        start = self._random_page(ask[0])
        found = self._page(start).pick(*ask)
        if _lacking(found, ask[0]):
            found = self._choose_more(found, start, ask)
        return _tuple(Peers, found)

    def _random_page(self, wanted):
        """Return the number of a page, for few peers rather a full one's.

        Else those who share a page with few would be handed out more often.
        """
        number = int(random() * self.pages)
        if wanted >= FILL or random() * SLOTS < self._page(number).peers:
            return number
        return int(random() * self.pages)

    def _choose_more(self, found, start, ask):
        """Return more than was found in page ``start``, of those that follow.

        Not the asker's own, though it is read already: it would meet the same.
        """
        wanted = ask[0]
        last = start + min(self.pages, 2 + wanted // SPARSE)
        for number in range(start + 1, last):
            if lacking := _lacking(found, wanted):
                more = self._page(number % self.pages).pick(lacking, *ask[1:])
                found = tuple(map(add, found, more))
        return found

    def _refuse_excess(self, page, address):
        """Raise TrackerError if the swarm, or an address in it, has too many peers.

        In a swarm of many pages those of an address are estimated from some of them:
        the salted hash spreads them evenly, and three standard deviations may pass.
        """
        most = self.settings.max_peers
        if most and self.tally[0] >= most:
            raise TrackerError(f"this swarm is full: it has {most} peers", kind="full")
        most = self.settings.max_peers_per_address
        if not most or address[0] == 127 or address == _LOOPBACK6:
            return
        share = most / self.pages
        if share > SAMPLE and page.count_from(address) < share / 3:
            return
        # Always the same ones: else who asks often enough meets a sample that is low.
        start = zlib.crc32(address[:8]) * self.pages >> 32
        looked = min(self.pages, SAMPLE)
        pages = [self._page((start + i) % self.pages) for i in range(looked)]
        share *= looked
        allowed = share if looked == self.pages else share + 3 * share**0.5
        if sum(page.count_from(address) for page in pages) >= allowed:
            raise TrackerError(
                f"your address has {most} peers in this swarm already", kind="full"
            )

    # Where in the file a peer is

    def _homes(self, peer_id):
        """Return the numbers of the pages, at most two, a peer may be in.

        This is linear hashing. The hash is salted, so that nobody can choose peer_ids
        that crowd one page.
        """
        if self.pages == 1:
            return (0,)
        digest = blake2b(peer_id, salt=self.salt, digest_size=8).digest()
        whole = 1 << (self.pages - 1).bit_length()  # the next power of two
        first, second = _HASHES.unpack(digest)
        first, second = first % whole, second % whole
        # Of the pages of the second half, not all are there yet.
        return (
            first if first < self.pages else first - whole // 2,
            second if second < self.pages else second - whole // 2,
        )

    def _locate(self, peer_id):
        """Return (page, slot) of a peer, or (one of its pages, -1)."""
        for number in self._homes(peer_id):
            page = self._page(number)
            slot = page.find(peer_id)
            if slot >= 0:
                break
        return page, slot

    def _page_with_room(self, peer_id):
        """Return the page to put a new peer in; the file grows as the swarm does."""
        while True:
            homes = [self._page(number) for number in self._homes(peer_id)]
            is_crowded = homes[0].peers >= CROWDED
            page = min(homes, key=Page.counts) if is_crowded else homes[0]
            is_dense = self.pages > 1 and self.tally[0] >= self.pages * FILL
            if page.peers < SLOTS and not is_dense:
                return page
            self._split()

    def _split(self):
        """Add a page, and move there from one other who belongs there now."""
        self.leave_shelf()  # before anything is changed
        source = self._page(self.pages - (1 << self.pages.bit_length() - 1))
        target = self.loaded[self.pages] = Page.empty(self.pages)
        self.pages += 1
        for slot in reversed(range(source.peers)):
            if source.number not in self._homes(source[slot].peer_id):
                is_seeder = slot >= source.leechers
                target.add(source.remove(slot), is_seeder)
        self._write(target)  # behind the last page, until the head counts it
        with self._changing():
            self._count(target)
            self._save(source)

    def _merge(self):
        """Take the last page away, and move who is in it to where they belong then."""
        self.pages -= 1
        source, homes = self._page(self.pages), {}
        for slot in reversed(range(source.peers)):
            is_seeder = slot >= source.leechers
            record = source.remove(slot)
            page = min(map(self._page, self._homes(record.peer_id)), key=Page.counts)
            page.add(record, is_seeder)
            homes[page.number] = page
        self._count(source)
        for number in sorted(homes, reverse=True):
            self._save(homes[number])  # page 0 last: with it goes the number of pages

    # What is in the file

    def _page(self, number):
        """Return a page, without those in it that have expired."""
        if number == 0:
            return self.first
        page = self.loaded.get(number)
        if page is None:
            page = Page(number, self.file.page(number * PAGE))
            self.loaded[number] = page
            if 0 < page.oldest < self.now - self.ttl:
                self._forget_expired(page)
        return page

    def _forget_expired(self, page):
        page.forget(self.now - self.ttl)
        self._save(page)

    def _recount(self):
        """Look at all pages: forget, count, and give back pages that are not needed.

        After a kill a peer may stand in two pages: it stays in one where it belongs.
        """
        is_torn, met = self.state == CHANGING, set()
        self.state = QUIET
        with self._changing():
            tally = 0, 0, 0
            for number in range(self.pages):
                self.loaded.clear()  # not all pages at a time
                page = self._page(number)
                if is_torn and self._remove_strays(page, met):
                    self._save(page)
                tally = [a + b for a, b in zip(tally, page.counts(), strict=True)]
            self.tally = tally
            while self.pages > 1 and self.tally[0] < self.pages * SPARSE:
                self._merge()
            self.recount_at = self.now + self.ttl // 16
            self._write_head()
            self.file.cut(self.pages * PAGE)
        self.loaded.clear()

    def _remove_strays(self, page, met):
        """Remove who is in the wrong page, or was ``met``; return whether any was."""
        before = page.peers
        for slot in reversed(range(page.peers)):
            peer_id = bytes(page[slot].peer_id)
            if peer_id in met or page.number not in self._homes(peer_id):
                page.remove(slot)
            else:
                met.add(peer_id)
        return page.peers < before

    def _count(self, page):
        """Take into the swarm's counts what has changed in a page."""
        changes = zip(self.tally, page.counts(), page.counted, strict=True)
        self.tally = [max(0, total + new - old) for total, new, old in changes]
        page.counted = page.counts()

    def _save(self, page):
        """Write a changed page, and the head if the counts change with it."""
        self._count(page)
        if (
            page is self.first
            or self._head() == self.first.data[_PAGE_HEAD.size : _HEADS]
        ):
            self._write(page)
        else:
            with self._changing():
                self._write(page)

    @contextmanager
    def _changing(self):
        """Have the head say that pages and counts differ while several are written.

        If we are killed meanwhile, whoever opens the file next counts anew.
        """
        if self.state == CHANGING:
            yield
            return
        self.state = CHANGING
        self._write_head()
        yield
        self.state = QUIET
        self._write_head()

    def _write(self, page):
        """Write a page, and with page 0 the head.

        A page is one write: after a kill, the file has all of it or nothing.
        """
        if page is self.first:
            page.put(_PAGE_HEAD.size, self._head())
        page.seal()
        self._pwrite(page.data, page.number * PAGE)
        if page is self.first:
            self.head, self.due = page.data[:_HEADS], 0

    def _write_seen(self, at):
        """Write into a page that a peer was seen now."""
        seen, at, mapped = self.now.to_bytes(4, "little"), self.at + at, self.file.map
        if mapped and at < len(mapped):
            mapped[at : at + 4] = seen
        else:
            _write(self.file.fd, seen, at)

    def _write_head(self):
        head = self._head()
        self.first.put(_PAGE_HEAD.size, head)
        self._pwrite(head, _PAGE_HEAD.size)
        self.head, self.due = self.first.data[:_HEADS], 0

    def _head(self):
        self.emptied = 0 if self.tally[0] else self.emptied or self.now
        head = _SWARM_HEAD.pack(
            *(self.info_hash, self.salt, self.pages, *self.tally),
            *(self.snatches, self.recount_at, self.emptied, self.state),
        )
        return head + _checksum(head)

    def _pwrite(self, data, at):
        _write(self.file.fd, data, self.at + at)


# Whatever has files open that are locked: flock does not tell a child from its parent.
# (uWSGI forks without this, but from a process that has answered nobody.)
_not_shared = WeakSet()
os.register_at_fork(after_in_child=lambda: [each.start_anew() for each in _not_shared])

NOBODY, NOTHING = Peers(b"", b"", b""), Counts(0, 0, 0, 0)
_ABSENT = Record(b"", 0, 0, 0, 0, _NOWHERE4, _NOWHERE6)
_LOOPBACK6 = bytes(15) + b"\1"


def _new_first(info_hash, now):
    """Return the first page of a swarm of which nothing is known yet, as bytes."""
    head = _SWARM_HEAD.pack(info_hash, os.urandom(8), 1, 0, 0, 0, 0, 0, now, QUIET)
    return (Page.empty(0).data[: _PAGE_HEAD.size] + head).ljust(PAGE, b"\0")


def _owner(page):
    """Return the info_hash of the swarm that a first page says it is of."""
    return page[_PAGE_HEAD.size : _PAGE_HEAD.size + 20]


def _open_locked(path, operation):
    """Return a descriptor of a file, made if need be, that is locked by flock."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, operation)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_quietly(path):
    """Open a file that is there; to read it is no change of its inode, if we may."""
    try:
        return os.open(path, _QUIETLY)
    except PermissionError:  # it is another user's
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _mapped(fd):
    """Return a whole file as memory; None if it is empty or no descriptor is left."""
    options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    with suppress(OSError, ValueError):
        return mmap.mmap(fd, 0, **options)
    return None


def _whole(mapped, fd):
    """Return mapped memory if there is some, and it is as long as its file, or None.

    If the file was cut short, to touch the memory would kill the process.
    """
    is_whole = mapped and os.lseek(fd, 0, os.SEEK_END) == len(mapped)
    return mapped if is_whole else None


def _is_mappable(folder):
    """Return whether the files in a folder may be mapped: see MAPPABLE."""
    return _file_system(folder) in MAPPABLE


def _file_system(folder):
    """Return the type of the file system of a folder, "" where that is not told."""
    path, best = os.path.realpath(folder) + "/", ("", "")
    with suppress(OSError), open("/proc/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            mounted, kind = line.split()[1:3]
            if path.startswith(mounted.rstrip("/") + "/"):
                best = max(best, (mounted, kind), key=lambda found: len(found[0]))
    return best[1]


def _write(fd, data, at):
    if os.pwrite(fd, data, at) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_at(path, fd):
    """Return whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_newer(data, magic):
    """Return whether a file begins as one of a newer version: a name, then a byte."""
    return data[:4] == magic[:4] and data[4:5] > magic[4:5]


def _checksum(head):
    return zlib.crc32(head).to_bytes(4, "little")


def _is_seeder(announce):
    return announce.left == 0 or (
        announce.left is None and announce.event == "completed"
    )


def _endpoint(announce):
    # Ports 0 and 1 mean that nobody can connect: libtorrent says 1 behind a proxy.
    return announce.address + (announce.port if announce.port > 1 else 0).to_bytes(
        2, "big"
    )


def _refuse_stranger(record, announce):
    """Raise TrackerError if an announce with another key has another address, too.

    The key is what tells a client that has moved from somebody else (BEP 7).
    """
    endpoint = record.endpoint4 if len(announce.address) == 4 else record.endpoint6
    if endpoint[:-2] != announce.address:
        raise TrackerError(
            "peer_id is in use with another key: restart your client", kind="key"
        )


def _merged(old, was_seeder, new, is_seeder):
    """Return what two trackers know of a peer: (Record, is_seeder)."""
    is_newer = max(new.seen4, new.seen6) > max(old.seen4, old.seen6)
    latest, seeder = (new, is_seeder) if is_newer else (old, was_seeder)
    over4 = new if new.seen4 > old.seen4 else old
    over6 = new if new.seen6 > old.seen6 else old
    record = latest._replace(
        state=latest.state | (old.state | new.state) & SNATCHED,
        seen4=over4.seen4,
        endpoint4=over4.endpoint4,
        seen6=over6.seen6,
        endpoint6=over6.endpoint6,
    )
    return record, seeder


def _unexpired(record, now, ttl):
    """Return a Record without endpoints that have expired, seen at ``now`` at last.

    Return None if none is left.
    """
    seen4, seen6 = (
        min(seen, now) if seen >= now - ttl else 0
        for seen in (record.seen4, record.seen6)
    )
    if not (seen4 or seen6):
        return None
    endpoint4 = record.endpoint4 if seen4 else _NOWHERE4
    endpoint6 = record.endpoint6 if seen6 else _NOWHERE6
    return Record(*record[:3], seen4, seen6, endpoint4, endpoint6)


def _updated(old, announce, now):
    """Return a peer's Record as an announce leaves it."""
    state = old.state & SNATCHED
    if announce.event == "completed":
        state |= SNATCHED
    if announce.event == "paused" and not _is_seeder(announce):
        state |= PARTIAL  # BEP 21
    known = old._replace(peer_id=announce.peer_id, key=announce.key, state=state)
    if len(announce.address) == 4:
        return known._replace(seen4=now, endpoint4=_endpoint(announce))
    return known._replace(seen6=now, endpoint6=_endpoint(announce))


def _boot_id():
    """Return 16 bytes that are others whenever the computer starts, or b""."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return bytes.fromhex(text.replace("-", ""))
    except (OSError, ValueError):
        return b""  # not on Linux


def _uptime():
    """Return for how many seconds the computer has run, asleep or not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class EvenClock:
    """Seconds that go on evenly when the computer's clock is set.

    Set forward by a day, that makes everybody look gone for a day; set back, it keeps
    those who are gone. So each process compares it with the time since the computer was
    started, and what all of them make of it is in one file, under flock:

        offset  bytes
             0      8  "clck", the version of the format, 1, and zeros
             8     16  what Linux calls this run of the computer
            24      8  by how many seconds the clock was ahead of those since the start
            32      8  by how many even seconds are ahead of the clock
            40      8  an even second of the last minute

    The numbers are signed. When the computer has been started again, even seconds are
    those of the clock, but never less than they were. Where the computer's start is not
    told (no Linux), or the file cannot be written or is of a newer version, they are
    those of the clock.
    """

    _FORM, _MAGIC = struct.Struct("<8s16sqqq"), b"clck\x01\0\0\0"
    JUMP = 60  # seconds by which clocks may differ for other reasons

    def __init__(self, path, boot_id=None, uptime=None):
        """Agree at ``path``; ``uptime`` returns the seconds since the start."""
        self.path, self.ahead = str(path), 0  # even seconds, of the clock
        self._boot_id = _boot_id() if boot_id is None else boot_id
        self._uptime = uptime or _uptime
        self._looked, self._agreed, self._clock_ahead = None, None, 0

    def __call__(self, now):
        """Return the even second for one of the clock."""
        if now != self._looked and self._boot_id:
            self._looked = now
            self._look(now, self._uptime())
        return now + self.ahead

    def _look(self, now, uptime):
        """Agree with other processes every minute, and when the clock was set."""
        has_jumped = not -self.JUMP < now - uptime - self._clock_ahead < self.JUMP
        if has_jumped or not self._agreed or uptime - self._agreed > 60:
            self._agreed = uptime
            with suppress(OSError):  # then peers cannot be kept either
                self._agree(now, int(now - uptime))

    def _agree(self, now, clock_ahead):
        """See what other processes know, and tell them of a jump."""
        fd = _open_locked(self.path, fcntl.LOCK_EX)
        try:
            data = os.pread(fd, PAGE, 0)
            if _is_newer(data, self._MAGIC):
                self._boot_id = b""  # no more of this while we run
                return
            was_ahead, ahead = self._from(data, now, clock_ahead)
            known = self._MAGIC, self._boot_id, was_ahead, ahead, now + ahead
            _write(fd, self._FORM.pack(*known), 0)
            self.ahead = ahead  # first: other threads are not to see the other alone
            self._clock_ahead = was_ahead
        finally:
            os.close(fd)

    def _from(self, data, now, clock_ahead):
        """Return how far the clock is ahead of the start, and we of the clock."""
        if len(data) != self._FORM.size or data[:8] != self._MAGIC:
            return clock_ahead, 0  # a new file, or no file of ours
        _, boot_id, was_ahead, ahead, last = self._FORM.unpack(data)
        if boot_id != self._boot_id:
            return clock_ahead, max(0, last - now) if last < 2**32 else 0
        jump = clock_ahead - was_ahead
        if abs(jump) < self.JUMP:
            return was_ahead, ahead
        log.warning("the clock was set by %d seconds; peers are kept as before", jump)
        return clock_ahead, ahead - jump


def _later(record, seconds):
    """Return a Record as if its peer had been seen so many seconds later."""
    if not seconds:
        return record
    seen = (at and max(1, at + seconds) for at in (record.seen4, record.seen6))
    return Record(*record[:3], *seen, *record[5:])


def _records_of(pages, seconds):
    """Yield (Record, is_seeder) of the peers in pages, as seen so much later."""
    for page in pages:
        for slot in range(page.peers):
            yield _later(page[slot], seconds), slot >= page.leechers


class FileStore(Store):
    """Peers in files that are opened, and locked for one operation at a time.

    A swarm is one page on a shelf, a file of many swarms. When it needs more, it gets a
    file of its own, which its info_hash names: swarms/ab/abcd... The lock of a swarm is
    flock on its file. Nothing is kept in memory but open files, mapped where that is
    safe, and for ten seconds what is known of some swarms: so it is the same how many
    threads or processes serve, or for how long. The counts of a swarm that is mapped
    are told without a lock while its head is as it was.

    Both are pages of 4096 bytes, numbers little-endian. Every page of a swarm:

        offset  bytes
             0      5  "swrm" and the version of the format, 1
             5      3  peers, leechers among them, partial seeds among these
             8      4  number of this page
            12      4  seconds since 1970: no endpoint here was last seen before
            16     65  page 0 only: the head of the swarm
           106   2310  70 times peer_id 20, key 4, state 1, seen on IPv4 4, on IPv6 4
          2416    420  70 IPv4 endpoints
          2836   1260  70 IPv6 endpoints

    The head of the swarm:

            16     20  info_hash
            36      8  salt of the hash that says which pages a peer may be in
            44      4  pages in use; what is behind them does not count
            48     12  peers, leechers, partial seeds
            60      8  snatches
            68      4  when to recount at the latest, if there are several pages
            72      4  since when nobody is in the swarm, or 0
            76      1  0 quiet, 1 changing, 2 retired, 3 condemned
            77      4  CRC-32 of these 61 bytes, or 0 where that is not known

    Up to 70 peers share one page with the head. Then the file grows a page at a time
    (linear hashing), and a peer is in one of two pages that its hashed peer_id names:
    an announce touches a handful of pages, however large the swarm.

    Opening a file, and closing it, takes as long as the rest of an announce. So small
    swarms share 64 shelves, few enough to stay open and mapped. A swarm's shelf is
    shelves/00 to shelves/3f, for the first byte of its info_hash modulo 64:

             0      5  "shlf" and the version of the format, 1
             5      1  0, or 1 for a shelf that is retired
             6    506  zeros
           512  15872  31 buckets of 16 entries: info_hash 20, place 2, 10 zeros
         16384         the pages, that of place 1 first

    The second byte of the info_hash, modulo 31, says in which bucket a swarm is. Is
    that full, the swarm gets a file of its own at once; a swarm never comes back from
    there. It is moved so: its page is written to that file, retired on the shelf, and
    its entry freed. When most of a shelf is free, all who are left are moved, and the
    shelf is retired and removed.

    Guarantees: a process killed at any moment loses nothing that was acknowledged. A
    change is one write inside one page, or is marked "changing", so that whoever comes
    next counts anew. A damaged swarm is moved to damaged/ and logged, and starts
    afresh; of a shelf with a damaged head, the entries are made anew of its pages.
    Limits: the file system must have flock; a power cut may lose the last seconds, as
    nothing waits for the disk; seconds are good until 2106.

    Versions: the first page has that of the whole file, or of the swarm on a shelf. A
    newer one is left alone: its swarm is refused until those who wrote it are back. The
    next version is to read this one with the classes of today, kept beside its own,
    when it has locked a swarm. One on a shelf it moves to a file of its own as above.
    Of a file it writes abcd....new, puts its version and "moved" into the old file,
    after which this version leaves it alone, too, and renames the new one over it.
    Whoever finds one that has moved, but is still in place, renames.

    swarms.count holds the number of swarms, 8 bytes, under a lock of its own.
    """

    def __init__(self, folder, settings, even=None):
        """Keep peers under ``folder``, which the first announce makes.

        ``even`` is an EvenClock, by which peers age.
        """
        self.folder = str(folder)
        self.settings = settings
        self._tidied, self._next = 0, int(random() * 256)
        self.start_anew()
        _not_shared.add(self)
        self.even = even or (lambda now: now)
        self.newer = None  # path of the first file that was met of a newer version

    def start_anew(self):
        """Have no file open yet, as in a child that has just been forked."""
        self._open = {}  # Swarms that have a file of their own, by info_hash
        self._known = {}  # some Swarms that are on shelves
        self._shelves, self._maps = {}, None  # by number; see _can_map
        self._now, self._even = None, 0  # see _begin_second

    def announce(self, announce, wanted, now):
        info_hash, is_new = announce.info_hash, announce.event != "stopped"
        found = self._visit(info_hash, now, is_new, Swarm.announce, announce, wanted)
        return found or (NOTHING, NOBODY)

    def scrape(self, info_hashes, now):
        if now != self._now:
            self._begin_second(now)
        return {
            info_hash: self._known_counts(info_hash)
            or self._visit(info_hash, now, False, Swarm.counts)
            or NOTHING
            for info_hash in info_hashes
        }

    def _known_counts(self, info_hash):
        """Return the Counts of a swarm that is as it was, or None."""
        swarm = self._open.get(info_hash) or self._known.get(info_hash)
        if swarm is None:
            return None
        with swarm.file.lock:
            return swarm.counts() if swarm.is_as_it_was(self._even) else None

    def swarms(self, now, first=None):
        if first is not None:
            yield from (found for found in self._walk(first, now) if found[1])
            return
        before, found, gone = self._count_swarms(), 0, 0
        for fan in range(256):
            for info_hash, counts in self._walk(fan, now):
                if counts:
                    found += 1
                    yield info_hash, counts
                else:
                    gone += 1
        # A kill may have left the number wrong; if nobody used it meanwhile, mend it.
        left = max(0, before - gone)
        self._count_swarms(lambda number: found if number == left else number)

    def peers(self, now):
        for info_hash, _ in self.swarms(now):
            found = self._visit(info_hash, now, False, Swarm.peers)
            if found:
                yield info_hash, found

    def records(self, now):
        behind = now - self.even(now)
        for fan in range(256):
            for info_hash, found in self._walk(fan, now, Swarm.snapshot):
                snatches, pages = found or (0, ())
                if snatches or any(page.peers for page in pages):
                    yield info_hash, snatches, _records_of(pages, behind)

    def restore(self, info_hash, snatches, peers, now):
        ttl, ahead, known = self.settings.peer_ttl, self.even(now) - now, list(peers)
        live = [(_unexpired(record, now, ttl), seeder) for record, seeder in known]
        live = [(_later(record, ahead), seeder) for record, seeder in live if record]
        create = bool(live or snatches)
        refused = self._visit(info_hash, now, create, Swarm.restore, snatches, live)
        kept = len(live) - (refused or 0)
        return Restored(kept, len(known) - len(live), len(live) - kept)

    def last_seen(self, info_hash, now):
        seen = self._visit(info_hash, now, False, Swarm.last_seen)
        return seen - self.even(now) + now if seen else 0

    def families(self, now):
        found = [(0, 0)]
        for fan in range(256):
            walk = self._walk(fan, now, Swarm.families)
            found += [each for _, each in walk if each]
        return tuple(map(sum, zip(*found, strict=True)))

    def probe(self):
        path = f"{self.folder}/probe"  # one, so that kills leave no more behind
        with suppress(BlockingIOError):  # another process is at it, so locks work
            fd = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                _write(fd, bytes(PAGE), 0)
            finally:
                with suppress(FileNotFoundError):  # it was opened, then removed
                    os.unlink(path)
                os.close(fd)

    def tidy(self, now):
        """Look through one of the 256 folders, at most every TIDY_EVERY seconds."""
        if abs(now - self._tidied) >= TIDY_EVERY:
            self._tidied, self._next = now, (self._next + 1) % 256
            with suppress(OSError):  # who announces there next will say so
                for _ in self._walk(self._next, now):
                    pass
                self._thin_out(self._next % SHELVES, now)

    def _walk(self, fan, now, work=None):
        """Yield (info_hash, work(swarm)) of the swarms whose info_hash begins so.

        Without ``work``, yield Counts, and remove swarms that are over: None for those.
        """
        if now != self._now:
            self._begin_second(now)
        # Shelves first: a swarm goes from there to a file of its own, and never back.
        found = [each for each in self._on_shelf(fan % SHELVES) if each[0] == fan]
        with suppress(FileNotFoundError):
            for name in os.listdir(f"{self.folder}/swarms/{fan:02x}"):
                if len(name) == 40 and _HEX.fullmatch(name):
                    found.append(bytes.fromhex(name))
        for info_hash in dict.fromkeys(found):
            work = work or self._count_or_remove
            yield info_hash, self._visit(info_hash, now, False, work)

    def _count_or_remove(self, swarm):
        if not swarm.is_forgettable():
            return swarm.counts()
        self._unlink_stale(swarm)
        swarm.retire()
        return self._remove(swarm)

    def _visit(self, info_hash, now, create, work, *arguments):
        """Return what ``work(swarm, *arguments)`` does with a swarm locked.

        Return None if there is no such swarm, unless it is to be created, or none that
        this version can read: raise TrackerError if it is to be created.
        """
        if now != self._now:
            self._begin_second(now)
        swarm = self._open.get(info_hash) or self._known.get(info_hash)
        swarm = swarm or self._find(info_hash, create)
        if swarm is None:
            return None
        with swarm.file as file:
            try:
                if file.map is None:
                    self._map(file)
                swarm.begin(self._even)
                return work(swarm, *arguments)
            except RetiredError:
                self._remove(swarm)
            except OutgrownError:
                self._move_out(swarm)
            except DamagedError as error:
                self._set_aside(swarm, error)
            except NewerError:
                self._forget(swarm)
                return self._leave_alone(file.path, create)
            except BaseException:
                swarm.head = None  # memory may differ now from what is in the file
                raise
            finally:
                if swarm.first:
                    swarm.first.data = b""  # memory is for open files, not for pages
        return self._visit(info_hash, now, create, work, *arguments)

    def _begin_second(self, now):
        """See once a second what the even second is, and close old files.

        After ten seconds whoever removed the folder sees another.
        """
        for info_hash, swarm in list(self._open.items()):
            if not 0 <= now - swarm.file.opened < 10:
                self._open.pop(info_hash, None)
        for number, shelf in list(self._shelves.items()):
            if not 0 <= now - shelf.opened < 10:
                # It stays open if it may: to map it anew costs a page fault a swarm.
                shelf.opened = now
                self._known = {}  # make place for others
                if not shelf.would_open_again():
                    self._shelves.pop(number, None)
        if not self._open and not self._shelves:
            self._maps = None  # perhaps it is another disk
        self._even, self._now = self.even(now), now

    # Where a swarm is

    def _path(self, info_hash):
        """Return the path of the file of its own that a swarm has, or may get."""
        name = info_hash.hex()
        return f"{self.folder}/swarms/{name[:2]}/{name}"

    def _forget(self, swarm):
        self._open.pop(swarm.info_hash, None)
        self._known.pop(swarm.info_hash, None)

    def _find(self, info_hash, create):
        """Return a Swarm as its file is found, or None if there is none.

        It is remembered for those who announce, not for who looks at all of them.
        """
        number, given = info_hash[0] % SHELVES, (info_hash, self.settings)
        while True:
            shelf = self._shelf(number)
            try:
                at = shelf.find(info_hash) if shelf else 0
                if at:
                    swarm = Swarm(shelf, at, *given)
                    if create and len(self._known) < KNOWN_AT_MOST:
                        self._known[info_hash] = swarm
                    return swarm
                file = self._found(SwarmFile, self._path(info_hash))
                if file:
                    shelf = shelf or self._shelf(number)
                    if shelf and shelf.find(info_hash):
                        continue  # it was begun meanwhile, and is about to move
                    swarm = Swarm(file, 0, *given)
                    if create:
                        self._close_some()
                        self._open[info_hash] = swarm
                    return swarm
                if not create:
                    return None
                self._create(info_hash, shelf)
            except (DamagedError, RetiredError):
                self._mend(number, shelf)
            except NewerError:
                return self._leave_alone(shelf.path, create)
            except OSError as error:
                if not self._close_unused(error):
                    raise

    def _found(self, kind, path):
        """Return an open SwarmFile or Shelf, or None if there is none."""
        with suppress(FileNotFoundError):
            return self._opened(kind, path, self._now)
        return None

    def _opened(self, opener, path, *how):
        """Return what ``opener`` opens; others are closed if too many are open."""
        while True:
            try:
                return opener(path, *how)
            except OSError as error:
                if not self._close_unused(error):
                    raise

    def _close_some(self):
        """Make room for one more file among those that are kept open."""
        kept = self._open  # another thread may have others from now on
        while kept and len(kept) >= OPEN_AT_MOST * 2 // 3:
            kept.popitem()

    def _close_unused(self, error):
        """Close what need not be open; return whether that may help against ``error``.

        To raise it here would have it, and what it came from, wait for a collection.
        """
        is_excess = error.errno in (errno.EMFILE, errno.ENFILE)
        if not is_excess or not (self._open or self._shelves):
            return False
        self._open, self._known, self._shelves = {}, {}, {}
        return True

    def _map(self, file):
        """Map a file from its second visit on, where that is safe.

        A hot swarm has many: no calls to read it, nor to write when a peer was seen.
        """
        if file.is_met and self._can_map(file):
            file.map = _mapped(file.fd)
        file.is_met = True

    def _can_map(self, file):
        """Return whether a file may be mapped: see MAPPABLE, OPEN_AT_MOST."""
        if self._maps is None:
            self._maps = _is_mappable(self.folder)
        is_left = isinstance(file, Shelf) or len(self._open) <= OPEN_AT_MOST // 3
        return self._maps and is_left

    # Swarms come, move and go

    def _create(self, info_hash, shelf):
        """Begin a swarm if there is none; raise TrackerError if there are too many.

        If there is no shelf for it, make that, and leave the rest to the next time.
        """
        number, path = info_hash[0] % SHELVES, self._path(info_hash)
        if shelf is None:
            return self._create_shelf(number)

        def make(swarms):
            if 0 < self.settings.max_swarms <= swarms:
                raise TrackerError(
                    f"this tracker is full: it tracks {swarms} torrents already",
                    kind="full",
                )
            if not shelf.put(info_hash, _new_first(info_hash, self._even)):
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            return swarms + 1

        with shelf:
            if not shelf.is_at_path():
                self._shelves.pop(number, None)
            elif not shelf.find(info_hash) and not os.path.exists(path):
                self._count_swarms(make)

    def _remove(self, swarm):
        """Remove a retired swarm, unless that is done."""
        self._forget(swarm)
        if swarm.file.holds(swarm):
            swarm.file.drop(swarm)
            # If _move_out was killed, the swarm has only gone to a file of its own.
            if not (swarm.at and os.path.exists(self._path(swarm.info_hash))):
                self._count_swarms(lambda number: number - 1)

    def _set_aside(self, swarm, error):
        """Move a damaged swarm out of the way, unless that is done."""
        self._forget(swarm)
        if not swarm.file.holds(swarm):
            return
        aside = self._aside(swarm.info_hash.hex())
        self._unlink_stale(swarm)
        swarm.file.set_aside(swarm, aside)
        log.error(
            "swarm file %s was damaged: %s. It is kept as %s",
            *(swarm.file.path, error, aside),
        )
        self._count_swarms(lambda number: number - 1)

    def _aside(self, name):
        """Return where what is damaged is kept; make the folder."""
        folder = f"{self.folder}/damaged"
        os.makedirs(folder, 0o700, exist_ok=True)
        return f"{folder}/{name}"

    def _move_out(self, swarm):
        """Give a swarm on a shelf a file of its own.

        That is behind its path when it is whole, and locked until the shelf has it no
        more. A kill before the page is retired leaves one that nobody looks for.
        """
        self._forget(swarm)
        if not swarm.file.holds(swarm):
            return  # its entry was damaged: others do not find it there
        path = self._path(swarm.info_hash)
        fd = self._opened(_open_locked, f"{path}.new", fcntl.LOCK_EX)
        try:
            _write(fd, swarm.file.page(swarm.at), 0)
            os.replace(f"{path}.new", path)
            swarm.retire()
            swarm.file.drop(swarm)
        finally:
            os.close(fd)

    def _unlink_stale(self, swarm):
        """Remove the file that a swarm on a shelf got when _move_out was killed."""
        path = self._path(swarm.info_hash)
        for stale in (path, f"{path}.new") if swarm.at else ():
            with suppress(FileNotFoundError):
                os.unlink(stale)

    def _leave_alone(self, path, create):
        """Log, once, that a file is of a newer version; raise TrackerError or not."""
        if not self.newer:
            self.newer = path
            log.error(
                "swarm file %s was written by a newer BitBreeze. It is left alone, with"
                " others like it, and their swarms are refused: upgrade this one, or"
                " export there and import here",
                path,
            )
        if create:
            raise TrackerError(
                "a newer version of this tracker keeps this swarm. Operator: upgrade"
                " this one",
                kind="internal",
            )

    # Shelves

    def _shelf_path(self, number):
        return f"{self.folder}/shelves/{number:02x}"

    def _shelf(self, number):
        """Return a shelf, which stays open, or None if there is none."""
        shelf = self._shelves.get(number)
        if shelf is None:
            shelf = self._found(Shelf, self._shelf_path(number))
            if shelf:
                self._shelves[number] = shelf
        return shelf

    def _create_shelf(self, number):
        for folder in (self.folder, f"{self.folder}/shelves"):
            os.makedirs(folder, 0o700, exist_ok=True)
        path = self._shelf_path(number)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))

    def _on_shelf(self, number):
        """Return the info_hashes of the swarms on a shelf."""
        while shelf := self._shelf(number):
            try:
                return shelf.swarms()
            except (DamagedError, RetiredError):
                self._mend(number, shelf)
            except NewerError:
                self._leave_alone(shelf.path, False)
                break
        return []

    def _mend(self, number, shelf):
        """Remove a shelf that is retired; make the entries of a damaged one anew."""
        with shelf:
            try:
                shelf.directory()
            except RetiredError:
                self._shelves.pop(number, None)
                if shelf.is_at_path():
                    os.unlink(shelf.path)
            except DamagedError as error:
                self._rebuild(shelf, error)
            except NewerError:
                pass  # the next look sees to it

    def _rebuild(self, shelf, error):
        aside = self._aside(f"shelf-{os.path.basename(shelf.path)}")
        Path(aside).write_bytes(Path(shelf.path).read_bytes())
        shelf.rebuild(self._even, self.settings)
        log.error(
            "shelf %s was damaged: %s. It is kept as %s, and was made anew of what is"
            " whole",
            *(shelf.path, error, aside),
        )

    def _thin_out(self, number, now):
        """Give back the disk of a shelf that is mostly free.

        Who is left there gets a file of its own.
        """
        hashes = self._on_shelf(number)
        shelf = self._shelves.get(number)
        if shelf is None:
            return
        pages = shelf.pages()
        if hashes and (pages < 64 or len(hashes) > pages / 4):
            return
        for info_hash in hashes:
            self._visit(info_hash, now, False, Swarm.leave_shelf)
        with shelf, suppress(DamagedError, NewerError, RetiredError):
            if not shelf.swarms():
                shelf.retire()
        self._mend(number, shelf)

    def _count_swarms(self, change=lambda number: number):
        """Replace the number of swarm files by change(number), locked; return it."""
        try:
            fd = os.open(
                f"{self.folder}/swarms.count",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                0o600,
            )
        except FileNotFoundError:
            return 0  # there is no data folder yet
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            number = int.from_bytes(os.pread(fd, 8, 0), "little")
            changed = max(0, change(number))
            if changed != number:
                os.pwrite(fd, changed.to_bytes(8, "little"), 0)
            return changed
        finally:
            os.close(fd)


# -- Torrents -------------------------------------------------------------------------
# The list of what is tracked is a folder of .torrent files. They come from strangers:
# nothing in them is a path to us, and what is not exactly as it should be is skipped.

BIGGEST = 10 * 2**20  # bytes of a .torrent file that is read
MOST_PARTS = 2**20  # numbers, texts, lists and ends in it: a second or two to look at
DEEPEST = 100  # lists and dictionaries in one another; bencoder goes down by recursion
_TOKEN = re.compile(rb"(\d{1,9}):|i-?\d{1,19}e|[dle]")


class TorrentError(Exception):
    """A file is not a torrent that can be listed; the text says why."""


class Torrent(NamedTuple):
    """A torrent, as far as the list of all needs it."""

    path: str  # below the folder
    name: str
    size: int  # bytes, without padding
    files: int
    v1: bytes  # 20 bytes, b"" for a torrent of v2 only
    v2: bytes  # 32 bytes, b"" for one of v1 only (BEP 52)
    added: int  # seconds since 1970
    is_private: bool

    def info_hashes(self):
        """Return what clients announce: 20 bytes for each version."""
        return [found[:20] for found in (self.v1, self.v2) if found]


def read_metainfo(data):
    """Return the dictionary in a .torrent file (BEP 3); raise TorrentError.

    Only a canonical file is taken, which is the same when it is encoded anew: so its
    info_hash is that of the bytes as they stand there.
    """
    if len(data) > BIGGEST:
        raise TorrentError(f"it has more than {BIGGEST} bytes")
    _check_parts(data)
    try:
        metainfo = bencoder.bdecode(data)
        is_canonical = bencoder.bencode(metainfo) == data
    except Exception:  # of several kinds, by the version of bencoder
        raise TorrentError("it is not bencoded") from None
    if not isinstance(metainfo, dict) or not isinstance(metainfo.get(b"info"), dict):
        raise TorrentError("it has no dictionary called info")
    if not is_canonical:
        raise TorrentError(
            "it is not canonical: its keys are not sorted, or a number"
            " has leading zeros"
        )
    return metainfo


def _check_parts(data):
    """Raise TorrentError for what would crash bencoder, or is no bencoding at all."""
    at = depth = parts = 0
    while at < len(data):
        token = _TOKEN.match(data, at)
        if not token:
            raise TorrentError("it is not bencoded")
        at, kind = token.end() + int(token[1] or 0), token[0]
        depth, parts = depth + (kind in (b"d", b"l")) - (kind == b"e"), parts + 1
        if depth > DEEPEST:
            raise TorrentError(f"it is nested more than {DEEPEST} deep")
        if parts > MOST_PARTS:
            raise TorrentError(f"it has more than {MOST_PARTS} parts")


def describe(metainfo, path, added):
    """Return the Torrent that a .torrent file describes; raise TorrentError."""
    info = metainfo[b"info"]
    name = info.get(b"name.utf-8") or info.get(b"name")
    if not isinstance(name, bytes) or not name:
        raise TorrentError("it has no name")
    if not _is_number(info.get(b"piece length"), 1):
        raise TorrentError("it has no piece length")
    pieces, raw = info.get(b"pieces"), bencoder.bencode(info)
    has_v1 = isinstance(pieces, bytes) and len(pieces) % 20 == 0
    has_v2 = info.get(b"meta version") == 2 and isinstance(info.get(b"file tree"), dict)
    if not has_v1 and not has_v2:
        raise TorrentError("it has no pieces of v1 and no file tree of v2")
    files = list(files_of(info))
    return Torrent(
        path,
        name.decode("utf-8", "replace"),
        sum(length for _, length in files),
        len(files),
        sha1(raw).digest() if has_v1 else b"",
        sha256(raw).digest() if has_v2 else b"",
        added,
        info.get(b"private") == 1,
    )


def files_of(info):
    """Yield (path, bytes) of each file that an info dictionary lists.

    A path is a tuple of names as text, without that of the torrent. Padding is left out
    (BEP 47). Raise TorrentError for lists that make no sense.
    """
    if isinstance(info.get(b"file tree"), dict):
        yield from _files_below(info[b"file tree"], ())
    elif b"length" in info:
        yield (), _length_of(info)
    elif isinstance(files := info.get(b"files"), list):
        for file in files:
            file = file if isinstance(file, dict) else {}
            path = file.get(b"path.utf-8") or file.get(b"path")
            if not isinstance(path, list) or not path:
                raise TorrentError("a file in it has no path")
            attributes = file.get(b"attr")
            if not isinstance(attributes, bytes) or b"p" not in attributes:
                yield tuple(map(_text, path)), _length_of(file)
    else:
        raise TorrentError("it lists no files")


def _files_below(tree, path):
    """Yield the files of a v2 file tree, in which b"" marks what is a file (BEP 52)."""
    for name, below in tree.items():
        if not isinstance(below, dict):
            raise TorrentError("its file tree is broken")
        if name == b"":
            yield path, _length_of(below)
        else:
            yield from _files_below(below, (*path, _text(name)))


def _length_of(file):
    if not _is_number(file.get(b"length"), 0):
        raise TorrentError("a file in it has no length")
    return file[b"length"]


def _is_number(value, least):
    return isinstance(value, int) and least <= value < 2**63


def _text(name):
    if not isinstance(name, bytes):
        raise TorrentError("a name in it is no text")
    return name.decode("utf-8", "replace")


class Details(NamedTuple):
    """What the page of a torrent shows beside what the Torrent says."""

    files: list  # of (path, bytes), as files_of yields them
    piece_length: int  # bytes
    comment: str
    creator: str  # the program
    created: int  # seconds since 1970, 0 for unknown
    web_seeds: list  # URLs (BEP 19)


def details_of(metainfo):
    """Return the Details in a metainfo; what is of the wrong type counts as absent."""
    info, created = metainfo[b"info"], metainfo.get(b"creation date")
    seeds = metainfo.get(b"url-list")
    seeds = seeds if isinstance(seeds, list) else [seeds]
    comment = metainfo.get(b"comment.utf-8") or metainfo.get(b"comment")
    return Details(
        list(files_of(info)),
        info[b"piece length"],
        _text_or_none(comment),
        _text_or_none(metainfo.get(b"created by")),
        created if _is_number(created, 0) and created < 2**33 else 0,
        list(filter(None, map(_text_or_none, seeds))),
    )


def _text_or_none(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def with_announce(metainfo, url):
    """Return the bytes of a .torrent file that names the tracker at ``url`` first.

    Other trackers come after it (BEP 12), but not in a private torrent: those are for
    one tracker's peers only (BEP 27). The info dictionary stays as it is to the byte.
    """
    ours, changed = url.encode(), {**metainfo}
    others = changed.pop(b"announce-list", None) or [[metainfo.get(b"announce")]]
    if metainfo[b"info"].get(b"private") == 1 or not isinstance(others, list):
        others = []
    tiers = [[ours]]
    for tier in others:
        named = tier if isinstance(tier, list) else []
        tiers.append(
            [t for t in named if isinstance(t, bytes) and t not in (b"", ours)]
        )
    changed[b"announce"] = ours
    if len(tiers := list(filter(None, tiers))) > 1:
        changed[b"announce-list"] = tiers
    return bencoder.bencode(changed)


def magnet(torrent, url):
    """Return the magnet link of a Torrent, tracked at ``url`` (BEP 9, 52)."""
    topics = [f"urn:btih:{torrent.v1.hex()}"] if torrent.v1 else []
    topics += [f"urn:btmh:1220{torrent.v2.hex()}"] if torrent.v2 else []  # a multihash
    name, url = quote(torrent.name, safe=""), quote(url, safe="")
    xt = "&".join(f"xt={topic}" for topic in topics)
    return f"magnet:?{xt}&dn={name}&xl={torrent.size}&tr={url}"


class Catalogue:
    """The torrents in a folder; the folders in it are categories.

    Every process looks for itself what is there. What a file says is read once for
    all of them, and kept in data/torrents.json: {path: [signature, *Torrent]}, or
    [signature, reason] for one that is skipped, below "1", the version of that format.
    It may be removed at any time. What newer versions keep there stays as it is, so
    that two versions can run side by side; what older ones keep is dropped.

    What vanishes, or cannot be read any more, still counts as it did until the folder
    has been quiet for a while: whoever replaces a file may be in the middle of it.
    """

    def __init__(self, folder, memo, writes=True):
        """Look into ``folder``, which need not be there, at the first ``look``."""
        self.folder, self._memo_path, self._writes = str(folder), str(memo), writes
        self.is_known = False  # whether the folder was ever read
        self.torrents, self.by_hash = {}, {}  # Torrents by path, and by info_hash
        self.skipped, self.unread = {}, []  # reasons by path, and paths
        self._found, self._known = {}, {}  # signatures by path
        self._folders, self._is_stale = {}, False  # times of change by folder
        self._fading = {}  # since when they are missed, by path
        self._unsettled = {}  # signatures, and since when they are seen, by path
        self._memo, self._memo_signature, self._news = {}, None, {}
        self._newer = {}  # what newer versions keep in the memo, by version
        self._scanned, self._remembered = None, 0
        self.version = 0  # another whenever the torrents are others

    def is_empty(self):
        """Return whether there is no .torrent file at all, good or bad."""
        return not self._found and not self._fading

    def metainfo(self, torrent):
        """Return what the file of a listed Torrent says; raise TorrentError."""
        try:
            with open(f"{self.folder}/{torrent.path}", "rb") as file:
                metainfo = read_metainfo(file.read(BIGGEST + 1))
        except OSError as error:
            raise TorrentError(f"it cannot be read: {error.strerror}") from None
        if describe(metainfo, torrent.path, torrent.added) != torrent:
            raise TorrentError("it is being replaced")
        return metainfo

    def look(self, now, seconds):
        """See what has changed, and read what is new for about so many seconds."""
        if self._has_changed(now):
            self._recall()
            self._compare(*self._scan(), now)
            self._scanned, self.is_known = now, True
        self.read(now, seconds)

    def read(self, now, seconds):
        """Go on reading what is new for about so many seconds, one file at least."""
        end = time.monotonic() + seconds
        while self.unread:
            self._read_one(self.unread.pop(), now)
            if time.monotonic() > end:
                break
        if self._is_stale:
            listed = list(self.torrents.values())
            self.by_hash = {i: each for each in listed for i in each.info_hashes()}
            self._is_stale = False
        is_time = not self.unread or abs(now - self._remembered) > 1
        if self._news and is_time and self._writes:
            self._remember()
            self._remembered = now

    def _has_changed(self, now):
        if self._scanned is None or self._fading or self._unsettled:
            return True
        if not 0 <= now - self._scanned < 60:  # for what is written over in its place
            return True
        for folder, changed in self._folders.items():
            # What came in the same instant as the last look may be missing from it.
            at = _changed_at(folder)
            if at != changed or abs(at / 1e9 - self._scanned) < 2:
                return True
        return False

    def _scan(self):
        """Return what is there: signatures by path, and times of change by folder."""
        found, folders, below = {}, {}, [""]
        self.skipped = {p: s for p, s in self.skipped.items() if p in self._known}
        while below:
            inner = below.pop()
            folder = f"{self.folder}/{inner}"
            folders[folder] = _changed_at(folder)
            try:
                entries = [*os.scandir(folder)] if folders[folder] else []
            except FileNotFoundError:
                continue
            except OSError as error:
                if not inner:
                    raise
                self.skipped[inner] = f"it cannot be read: {error.strerror}"
                kept = {p: s for p, s in self._found.items() if p.startswith(inner)}
                found.update(kept)
                continue
            for entry in entries:
                path = f"{inner}{entry.name}"
                if entry.name.startswith("."):
                    continue
                with suppress(OSError):  # it has gone meanwhile, or leads nowhere
                    if entry.is_dir(follow_symlinks=False) and path.count("/") < 8:
                        below.append(f"{path}/")
                    elif entry.name.endswith(".torrent") and entry.is_file():
                        at = entry.stat()
                        found[path] = f"{at.st_ctime_ns} {at.st_size}"
        return found, folders

    def _compare(self, found, folders, now):
        """Take in what has come, and what has gone for good."""
        gone = self._known.keys() - found.keys()
        is_there = gone and folders[f"{self.folder}/"]
        changed = max(map(_changed_at, folders)) if is_there else 0
        since = _first_seen(now, changed)
        self._fading = {path: self._fading.get(path, since) for path in gone}
        for path in gone:
            if _is_settled(now, self._fading[path], changed):
                self._forget(path)
                del self._fading[path]
        self._found, self._folders = found, folders
        self._unsettled = {p: s for p, s in self._unsettled.items() if p in found}
        self.unread = [
            path
            for path, signature in found.items()
            if self._known.get(path) != signature and not self._is_recalled(path)
        ]

    def _forget(self, path):
        self._known.pop(path, None)
        self.skipped.pop(path, None)
        if self.torrents.pop(path, None):
            self._is_stale = True
            self.version += 1

    def _take(self, path, known):
        """Take in a Torrent, or the reason why there is none."""
        self._forget(path)
        self._unsettled.pop(path, None)
        self._known[path] = self._found[path]
        if isinstance(known, str):
            self.skipped[path] = known
            return
        self.torrents[path] = known
        self.version += 1
        for info_hash in known.info_hashes():
            self.by_hash[info_hash] = known

    def _read_one(self, path, now):
        try:
            with open(f"{self.folder}/{path}", "rb") as file:
                data, added = (
                    file.read(BIGGEST + 1),
                    int(os.fstat(file.fileno()).st_mtime),
                )
            torrent = describe(read_metainfo(data), path, added)
        except PermissionError as error:
            self._skip(path, f"it cannot be read: {error.strerror}", now)
        except OSError as error:  # to be tried again, if it has not gone
            self._unsettled[path] = "", now
            self.skipped[path] = f"it cannot be read: {error.strerror}"
        except TorrentError as error:
            self._skip(path, str(error), now)
        else:
            self._take(path, torrent)
            self._news[path] = [self._found[path], *_as_json(torrent)]

    def _skip(self, path, reason, now):
        """Skip a file, unless it may still be on its way here."""
        signature = self._found[path]
        seen, since = self._unsettled.get(path, ("", now))
        changed = int(signature.split()[0])
        since = since if seen == signature else _first_seen(now, changed)
        if not _is_settled(now, since, changed):
            self._unsettled[path] = signature, since
            return
        self._take(path, reason)
        self._news[path] = [signature, reason]

    def _is_recalled(self, path):
        """Take in what another process has read of a file; return whether one has."""
        signature, *known = self._memo.get(path, [None])
        if signature != self._found[path]:
            return False
        self._take(path, known[0] if len(known) == 1 else _from_json(path, known))
        return True

    def _recall(self):
        """Read what all processes know, if that has changed."""
        # It is data of ours, but a disk may give back anything.
        with suppress(OSError, ValueError, RecursionError):
            at = os.stat(self._memo_path)
            signature = at.st_mtime_ns, at.st_ino
            if signature != self._memo_signature:
                with open(self._memo_path, encoding="utf-8") as file:
                    memo = json.load(file)
                self._memo, self._newer = _checked_memo(memo), _newer_memos(memo)
                self._memo_signature = signature

    def _remember(self):
        """Add what was read to what all processes know; log what they did not."""
        news, self._news = self._news, {}
        try:
            os.makedirs(os.path.dirname(self._memo_path), 0o700, exist_ok=True)
            with open(f"{self._memo_path}.lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._recall()
                known = {p: m for p, m in self._memo.items() if p in self._found}
                news = {p: m for p, m in news.items() if known.get(p) != m}
                with open(f"{self._memo_path}.new", "w", encoding="utf-8") as file:
                    file.write(json.dumps({"1": {**known, **news}, **self._newer}))
                os.replace(f"{self._memo_path}.new", self._memo_path)
        except OSError as error:
            log.warning("what is in %s is not kept: %s", self.folder, error)
        for path, (_, *known) in news.items():
            if len(known) == 1:
                log.warning("%s/%s is skipped: %s", self.folder, path, known[0])


def _checked_memo(memo):
    """Return what a memo says of each path; {} for what is not one."""
    known = memo.get("1") if isinstance(memo, dict) else None
    if not isinstance(known, dict):
        return {}
    return {p: m for p, m in known.items() if isinstance(m, list) and _is_memo(p, *m)}


def _is_memo(path, signature=None, *known):
    """Return whether what a memo says of a path is a reason, or a Torrent."""
    try:
        if len(known) == 1:
            return isinstance(known[0], str) and bool(known[0].encode())
        torrent = _from_json(path, known)
        torrent.name.encode()
        numbers = torrent.size, torrent.files, torrent.added
        return (
            all(_is_number(number, 0) for number in numbers)
            and {len(i) for i in torrent.info_hashes()} == {20}
            and type(torrent.is_private) is bool
        )
    except (AttributeError, TypeError, ValueError):  # of another type, or not text
        return False


def _newer_memos(memo):
    """Return what versions after this one keep in a memo."""
    memo = memo if isinstance(memo, dict) else {}
    return {v: m for v, m in memo.items() if v.isdecimal() and int(v[:9]) > 1}


def _changed_at(folder):
    """Return when a folder changed, in nanoseconds since 1970; 0 if there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_settled(now, since, changed):
    """Return whether what was first seen at ``since`` can be taken for finished.

    It is if it stayed so for a second: two, as ``now`` has no fractions. Who looks
    rarely sees that at once by when it ``changed``, in nanoseconds, 0 for unknown.
    """
    return not -60 <= now - since < 2 or 0 < changed <= (now - 2) * 10**9


def _first_seen(now, changed):
    """Return when a change is first seen: not before it was made, in nanoseconds.

    A request that has waited for its turn comes with a ``now`` of long ago.
    """
    seconds = changed // 10**9
    return seconds if now < seconds < now + 60 else now


def _as_json(torrent):
    _, *rest = torrent._replace(v1=torrent.v1.hex(), v2=torrent.v2.hex())
    return rest


def _from_json(path, known):
    torrent = Torrent(path, *known)
    return torrent._replace(v1=bytes.fromhex(torrent.v1), v2=bytes.fromhex(torrent.v2))


# -- Access ---------------------------------------------------------------------------
# Who may announce what. Keys for people will join the lists here.

_HEX = re.compile("(?i)[0-9a-f]{40}|[0-9a-f]{64}")


class HashList:
    """A file of info_hashes, one a line; what follows one, or a #, is comment.

    They are hex: 40 digits, or the 64 of a whole v2 hash. A file that has changed is
    read when it has stayed the same for a while, for it may be half written, or gone
    to be replaced. Whoever writes slower than that had better rename it into place.
    """

    def __init__(self, path):
        self.path, self.hashes, self.problems = str(path), frozenset(), []
        self.is_known = False  # whether it was ever read, or seen to be missing
        self._read, self._seen = (), ()  # signatures
        self._since = 0  # when ``_seen`` was first seen

    def look(self, now):
        """Take in what has changed; return whether anything has. Raise OSError."""
        try:
            signature = _signature(os.stat(self.path))
        except FileNotFoundError:
            signature = ()
        if self.is_known and signature == self._seen == self._read:
            return False
        changed = signature[0] if signature else _changed_at(os.path.dirname(self.path))
        if signature != self._seen:
            self._seen, self._since = signature, _first_seen(now, changed)
        if self.is_known and (
            signature == self._read or not _is_settled(now, self._since, changed)
        ):
            return False
        hashes, problems, at = self._parsed() if signature else (frozenset(), [], ())
        if self.is_known and at != signature:  # it has changed meanwhile
            return False
        self.hashes, self.problems, self._read = hashes, problems, at
        self.is_known = True
        return True

    def _parsed(self):
        """Return the hashes, what is wrong, and the signature of what was read."""
        hashes, problems = set(), []
        with open(self.path, encoding="utf-8-sig", errors="replace") as file:
            lines, at = file.read().split("\n"), _signature(os.fstat(file.fileno()))
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].split()[:1]
            if text and not _HEX.fullmatch(text[0]):
                problems.append(number)
            elif text:
                hashes.add(bytes.fromhex(text[0])[:20])
        said = [
            f"{self.path}, line {number}: not 40 or 64 hex digits, skipped"
            for number in problems[:10]
        ]
        if more := problems[10:]:
            said.append(f"{self.path}: {len(more)} more lines like these, skipped")
        return frozenset(hashes), said, at


def _signature(at):
    return at.st_mtime_ns, at.st_size, at.st_ino


class Access:
    """Which torrents are tracked: any, or those in torrents/ and allow.txt.

    Those in deny.txt never are. The lists stand beside the folder.
    """

    def __init__(self, settings, catalogue):
        beside = os.path.dirname(catalogue.folder)
        self.track, self.catalogue = settings.track, catalogue
        self.allow = HashList(f"{beside}/allow.txt")
        self.deny = HashList(f"{beside}/deny.txt")
        self._looked, self._lock, self._trouble = None, Lock(), []
        self._is_open = False

    def is_open(self):
        """Return whether any torrent is tracked that is not denied."""
        return self._is_open

    def listed(self):
        """Return the Torrents in the folder that are tracked, in any order."""
        denied = self.deny.hashes
        torrents = list(self.catalogue.torrents.values())
        return [t for t in torrents if denied.isdisjoint(t.info_hashes())]

    def check(self, info_hash, now):
        """Raise TrackerError if a torrent is not tracked."""
        if self.tracks(info_hash, now):
            return
        is_read = self._is_known() and not self.catalogue.unread
        if not is_read and info_hash not in self.deny.hashes:
            raise TrackerError(
                "this tracker is still reading its list of torrents: try again soon",
                kind="reading",
            )
        # Transmission knows these words, and stops asking.
        raise TrackerError(
            "torrent not registered with this tracker", kind="unregistered"
        )

    def tracks(self, info_hash, now):
        """Return whether a torrent is tracked."""
        if now != self._looked or self.catalogue.unread:
            self.look(now)
        if info_hash in self.deny.hashes:
            return False
        return (
            info_hash in self.catalogue.by_hash
            or self._is_open
            or info_hash in self.allow.hashes
        )

    def look(self, now, patience=0.002):
        """Take in what has changed, once a second; read new files bit by bit.

        ``patience`` is for how many seconds whoever asks can wait for files to be read.
        """
        if not self._lock.acquire(blocking=self._looked is None):
            return  # another thread is at it
        try:
            # A thread may come late, with a second that has been looked at.
            if self._looked is not None and -2 < now - self._looked <= 0:
                self.catalogue.read(now, patience)
                return
            try:
                problems, trouble = self.take_in(now, max(0.05, patience))
            finally:
                self._looked = now  # not before: without a look, nothing is known
            for problem in problems:
                log.warning("%s", problem)
            if trouble and trouble != self._trouble:
                log.error("lists of torrents cannot be read: %s", "; ".join(trouble))
            self._trouble = trouble
        finally:
            self._lock.release()

    def take_in(self, now, seconds):
        """Look at all lists, read new files for about so many seconds.

        Return two lists of sentences: what is wrong in the lists that were read, and
        which cannot be: of them, what was known stays.
        """
        problems, trouble = [], []
        for each in (self.allow, self.deny):
            try:
                problems += each.problems if each.look(now) else []
            except OSError as error:
                trouble.append(f"{each.path}: {error.strerror}")
        try:
            self.catalogue.look(now, seconds)
        except OSError as error:
            trouble.append(f"{self.catalogue.folder}: {error.strerror}")
        self._is_open = self._is_known() and (
            self.track == "any"
            or self.track == "auto"
            and self.catalogue.is_empty()
            and not self.allow.hashes
        )
        return problems, trouble

    def _is_known(self):
        """Return whether every list that counts was read, if only once."""
        lists = (self.deny, self.allow, self.catalogue)
        return all(each.is_known for each in lists[: 1 if self.track == "any" else 3])

    def is_any_listed(self):
        """Return whether a list holds a torrent that is tracked for that."""
        return bool(self.catalogue.torrents or self.allow.hashes)

    def in_words(self):
        """Return what is tracked as it was last seen, for the operator."""
        listed, catalogue = len(self.allow.hashes), self.catalogue
        words = f"{len(catalogue.torrents)} torrents in {catalogue.folder}"
        words += f" and {listed} of allow.txt" if listed else ""
        words = "any torrent" if self._is_open else words
        if self.deny.hashes:
            words += f", but {len(self.deny.hashes)} of deny.txt"
        if catalogue.unread:
            words += f"; {len(catalogue.unread)} files are still to be read"
        return words


def open_access(settings, writes=True):
    """Return the Access to the lists that are where ``settings`` say."""
    memo = HERE / settings.data / "torrents.json"
    return Access(settings, Catalogue(HERE / settings.torrents, memo, writes))


# -- Counters -------------------------------------------------------------------------

COUNTED = 64  # numbers in a file: those that nothing is counted in yet are zeros
_COUNTERS_MAGIC = b"cntr\x01\0\0\0"  # with the version of the format
# Upper bounds of the time that an announce takes, in nanoseconds. A longer one goes
# into a bucket of its own.
WITHIN = tuple(
    round(milliseconds * 1e6) for milliseconds in (0.05, 0.1, 0.2, 0.5, 1, 5, 20, 100)
)
_SCRAPES, _NANOSECONDS, _TOOK, _FAILED = 1, 2, 3, 16  # places in a file
_FAILED_AT = {kind: place for place, kind in enumerate(FAILURES, _FAILED)}


class Counted(NamedTuple):
    """What all processes have counted since ever."""

    scrapes: int  # answered or refused
    nanoseconds: int  # that all announces took
    took: tuple  # announces by time: see WITHIN
    failures: dict  # by FAILURES


class Counters:
    """What is counted, by each process in a file of its own.

    A process takes the first of the files counters/0, counters/1 ... that nobody has
    locked, goes on from its numbers, and keeps the lock for as long as it lives. So the
    sum of all files is right however processes come and go. 512 bytes each, numbers in
    the order of this machine:

        offset  bytes
             0      8  "cntr", the version of the format, 1, and zeros
             8      8  scrapes
            16      8  nanoseconds that all announces took
            24     72  announces: one number for each of WITHIN, and one for longer ones
           128     56  failures: one number for each of FAILURES
           184    328  zeros

    Guarantees: each count writes the whole file, as mapped memory where that is safe,
    so a killed process loses no more than the announce it was at, and a file that was
    cut short or overwritten is whole again with the next. A damaged file is kept as
    0.damaged and logged. While a file cannot be written, its process counts in memory.
    Whoever removes files takes their numbers away.
    """

    def __init__(self, folder):
        """Count in ``folder``, which the first count makes."""
        self.folder, self._fd = str(folder), -1
        self.start_anew()
        _not_shared.add(self)

    def start_anew(self):
        """Have no file and no lock yet, as in a child that has just been forked."""
        self._lock, self._looked, self._has_failed = Lock(), None, False
        self._close()

    def __del__(self):
        self._close()

    def _close(self):
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._path, self._map = -1, "", None
        self._numbers = array("Q", _COUNTERS_MAGIC.ljust(8 * COUNTED, b"\0"))

    def count(self, now, failure, nanoseconds=None):
        """Count a scrape, or an announce and the time it took.

        ``failure`` is "", or why it was refused: one of FAILURES.
        """
        with self._lock:
            if now != self._looked:
                self._look(now)
            numbers = self._numbers
            if nanoseconds is None:
                numbers[_SCRAPES] += 1
            else:
                numbers[_NANOSECONDS] += nanoseconds
                numbers[_TOOK + bisect_left(WITHIN, nanoseconds)] += 1
            if failure:
                numbers[_FAILED_AT[failure]] += 1
            try:
                self._write()
            except OSError as error:
                self._complain(error)

    def total(self, now):
        """Return Counted, of all processes."""
        with self._lock:
            if self._fd >= 0:
                self._look(now)
            found = [self._numbers.tolist()]
            names = os.listdir(self.folder) if os.path.isdir(self.folder) else ()
            for path in (f"{self.folder}/{name}" for name in names if name.isdecimal()):
                with suppress(OSError, DamagedError):
                    if path != self._path:
                        found.append(_numbers(Path(path).read_bytes()))
        sums = [sum(column) for column in zip(*found, strict=True)]
        took = tuple(sums[_TOOK : _TOOK + len(WITHIN) + 1])
        failures = dict(zip(FAILURES, sums[_FAILED:], strict=False))
        return Counted(sums[_SCRAPES], sums[_NANOSECONDS], took, failures)

    def _look(self, now):
        """See, once a second, that there is a file and that it is still in place."""
        self._looked = now
        try:
            if self._fd >= 0 and not _is_at(self._path, self._fd):
                self._close()
            if self._fd < 0:
                self._take_file()
                self._has_failed = False
            elif self._map is None:  # not at first: a CGI program counts but once
                self._map = _is_mappable(self.folder) and _mapped(self._fd)
        except OSError as error:
            self._complain(error)

    def _write(self):
        """Write the whole file."""
        mapped = _whole(self._map, self._fd)
        if mapped is not None and len(mapped) == 8 * COUNTED:
            mapped[:] = self._numbers
        else:
            _write(self._fd, self._numbers.tobytes(), 0)

    def _complain(self, error):
        if not self._has_failed:
            log.error("counters are not kept in %s: %s", self.folder, error)
        self._has_failed = True

    def _take_file(self):
        """Take a file that nobody has, and add its numbers to ours."""
        for number in range(1000):
            path = f"{self.folder}/{number}"
            with suppress(BlockingIOError):  # another process has it
                fd = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_newer(os.pread(fd, 8, 0), _COUNTERS_MAGIC):
                    break
                os.close(fd)
        else:
            raise OSError(errno.EAGAIN, "all files are locked")
        self._fd, self._path = fd, path
        try:
            for place, number in enumerate(_numbers(os.pread(fd, PAGE, 0))):
                self._numbers[place] += number
        except DamagedError as error:
            _empty_damaged(fd, path, error)


def _numbers(data):
    """Return the numbers in a file of Counters, with 0 for its magic."""
    if not data:  # a new one
        return [0] * COUNTED
    if len(data) != 8 * COUNTED or data[:8] != _COUNTERS_MAGIC:
        raise DamagedError(
            f"it is not {8 * COUNTED} bytes of format {_COUNTERS_MAGIC!r}"
        )
    numbers = [0, *memoryview(data).cast("Q")[1:]]
    if max(numbers) >= 2**63:  # one more could be too much for its 8 bytes
        raise DamagedError("a number in it is too big")
    return numbers


def _empty_damaged(fd, path, error):
    """Keep a copy of a damaged file, and empty it; it must be locked.

    It is not renamed, as others may have it open, and wait for its lock.
    """
    with open(f"{path}.damaged", "wb") as copy:
        copy.write(os.pread(fd, BIGGEST, 0))
    os.ftruncate(fd, 0)
    log.error("%s was damaged: %s. It is kept as %s.damaged", path, error, path)


# -- History --------------------------------------------------------------------------

HOUR, MONTH = 3600, 31 * 24  # seconds, hours
SLICE = 100  # swarms counted in one announce, about a millisecond
TAKEOVER = 300  # seconds for a process to take a sample before others begin one
_HISTORY_HEAD = struct.Struct("<5s7xI")
_HISTORY_MAGIC = b"hist\x01"  # with the version of the format


class Sample(NamedTuple):
    """What the tracker held once in an hour."""

    seeders: int
    leechers: int
    swarms: int  # those with at least one peer
    time: int  # seconds since 1970


_SAMPLE = struct.Struct("<IIII")  # the time last: without it, there is no sample


class History:
    """The samples of 31 days, one an hour, in one file of all processes.

    Numbers are little-endian:

        offset  bytes
             0      5  "hist" and the version of the format, 1
            12      4  seconds since 1970: when a process last began a sample
            16  11904  744 times seeders 4, leechers 4, swarms 4, time 4, or zeros

    Each hour since 1970 has its place, modulo 744. So a clock that was wrong spoils the
    hours it named, no more, and they come again. The requests do it: one begins, under
    flock, and the announces that its process then gets count on, a slice each. After
    five minutes others begin, too, and who ends first writes: one write, so that a kill
    leaves the old sample or the new one. A damaged file is kept as history.damaged; one
    of a newer version is left alone, and no history is kept.
    """

    def __init__(self, path):
        """Keep samples at ``path``, which the first announce makes."""
        self.path = str(path)
        self.quiet = 0, 0  # seconds from and until when a step has nothing to do
        self._lock, self._sums = Lock(), (0, 0, 0)
        self._walk, self._next = None, 0  # what is left of a folder, and the next one
        self._stepped, self._has_failed = 0, False

    def samples(self, now):
        """Return the Samples of the last 31 days, the oldest first."""
        try:
            data = Path(self.path).read_bytes()
        except OSError:
            return []
        if data[:5] != _HISTORY_MAGIC:
            return []
        end = len(data) - len(data) % _SAMPLE.size
        found = map(Sample._make, _SAMPLE.iter_unpack(data[_HISTORY_HEAD.size : end]))
        is_recent = [each for each in found if now - MONTH * HOUR < each.time <= now]
        return sorted(is_recent, key=lambda sample: sample.time)

    def step(self, swarms, now, enough=SLICE):
        """Count on for the sample of this hour, if it is for this process to do.

        ``swarms`` is Store.swarms; ``enough`` of them are counted.
        """
        if not self._lock.acquire(blocking=False):
            return  # another thread is at it
        try:
            if self._walk or self._begin(now):
                # Nobody waits behind an announce that comes after quiet seconds.
                idle = min(max(0, now - self._stepped - 1), 10)
                self._count(swarms, now, enough + 1000 * idle)
        except (OSError, NewerError) as error:
            if not self._has_failed:
                log.error("no history is kept in %s: %s", self.path, error)
            self._has_failed, self._walk = True, None
            self.quiet = now, now + TAKEOVER
        finally:
            self._stepped = now
            self._lock.release()

    def merge(self, samples, now):
        """Add Samples of hours that have none, and return how many. Raise OSError."""
        fd = _open_locked(self.path, fcntl.LOCK_EX)
        try:
            begun = self._begun(fd)
            _write(fd, _HISTORY_HEAD.pack(_HISTORY_MAGIC, begun), 0)
            hours = {sample.time // HOUR for sample in self.samples(now)}
            before = len(hours)
            for sample in samples:
                hour = sample.time // HOUR
                if now // HOUR - MONTH < hour <= now // HOUR and hour not in hours:
                    _write(fd, _SAMPLE.pack(*sample), _place(sample.time))
                    hours.add(hour)
            return len(hours) - before
        finally:
            os.close(fd)

    def _begin(self, now):
        """Return whether this process is to take a sample."""
        fd = _open_locked(self.path, fcntl.LOCK_EX)
        try:
            begun = self._begun(fd)
            known = os.pread(fd, _SAMPLE.size, _place(now)).ljust(_SAMPLE.size, b"\0")
            if _SAMPLE.unpack(known)[3] // HOUR == now // HOUR:
                self.quiet = now, now - now % HOUR + HOUR
            elif 0 <= now - begun < TAKEOVER:
                self.quiet = now, begun + TAKEOVER
            else:
                _write(fd, _HISTORY_HEAD.pack(_HISTORY_MAGIC, now), 0)
                self._sums, self._walk, self._next = (0, 0, 0), iter(()), 0
                self._stepped = now
                return True
            return False
        finally:
            os.close(fd)

    def _begun(self, fd):
        """Return when a process last began a sample, 0 for never."""
        head = os.pread(fd, _HISTORY_HEAD.size, 0)
        if _is_newer(head, _HISTORY_MAGIC):
            raise NewerError("a newer BitBreeze wrote it")
        if head and not (head[:5] == _HISTORY_MAGIC and len(head) == 16):
            _empty_damaged(fd, self.path, f"no head of format {_HISTORY_MAGIC!r}")
            head = b""
        return _HISTORY_HEAD.unpack(head)[1] if head else 0

    def _count(self, swarms, now, enough):
        """Count so many swarms, or all that are left, and then write the sample."""
        while enough:
            found = next(self._walk, None)
            if found:
                seeders, leechers, _, _ = found[1]
                alive = seeders + leechers > 0
                self._sums = tuple(map(add, self._sums, (seeders, leechers, alive)))
                enough -= 1
            elif self._next < 256:
                self._walk = swarms(now, self._next)
                self._next += 1
            else:
                return self._end(now)

    def _end(self, now):
        """Write the sample."""
        fd = _open_locked(self.path, fcntl.LOCK_EX)
        try:
            _write(fd, _SAMPLE.pack(*self._sums, now), _place(now))
        finally:
            os.close(fd)
        self._walk = None
        self.quiet, self._has_failed = (now, now - now % HOUR + HOUR), False


def _place(now):
    """Return where in the file of History the sample of an hour is."""
    return _HISTORY_HEAD.size + now // HOUR % MONTH * _SAMPLE.size


# -- Tracker --------------------------------------------------------------------------


class Tracker:
    """Announce and scrape. No sockets, no HTTP; ``now`` is an argument."""

    def __init__(self, settings, access, store, counters, history):
        self.settings, self.access, self.store = settings, access, store
        self.counters, self.history = counters, history
        self._survey, self._survey_until, self._lock = None, (0, 0), Lock()
        self._families, self._families_until = None, (0, 0)
        self._quiet = 0, 0  # seconds from and until when there is no house to keep

    def announce(self, announce, now):
        """Return (Counts, Peers, seconds to wait); raise TrackerError if refused."""
        self.access.check(announce.info_hash, now)
        settings, wanted = self.settings, announce.numwant
        if wanted < 0:
            wanted = settings.numwant
        elif wanted > settings.max_numwant:
            wanted = settings.max_numwant
        counts, peers = self.store.announce(announce, wanted, now)
        peers = peers_for(announce.address, peers, settings.public_ip)
        start, end = self._quiet
        if not start <= now < end:
            self._keep_house(now)
        # A tenth more or less, so that those who came together do not return together.
        return counts, peers, int(settings.interval * (0.9 + 0.2 * random()))

    def _keep_house(self, now):
        """Do a little of what nobody else does; see when there is more to do."""
        self.store.tidy(now)
        start, end = self.history.quiet
        if not start <= now < end:
            self.history.step(self.store.swarms, now)
        start, end = self.history.quiet
        self._quiet = start, min(end, now + TIDY_EVERY)

    def scrape(self, info_hashes, now):
        """Return Counts by info_hash; of all swarms for none, if that is allowed.

        What is not tracked has zeros: libtorrent fails if a torrent is missing.
        """
        tracks = self.access.tracks
        if info_hashes:
            tracked = [i for i in info_hashes if tracks(i, now)]
            return {
                **dict.fromkeys(info_hashes, NOTHING),
                **self.store.scrape(tracked, now),
            }
        if not self.settings.full_scrape:
            raise TrackerError(
                "info_hash is missing: this tracker does not list its torrents"
            )
        return {i: counts for i, counts in self.store.swarms(now) if tracks(i, now)}

    def totals(self, now):
        """Return the Totals, as ``survey`` does."""
        return self.survey(now).totals

    def survey(self, now):
        """Return the Survey: exact, and kept for a second per thousand swarms.

        Counting looks into every swarm, ten microseconds each: so it never takes more
        than a hundredth of the time, and in a small tracker every look is a new one.
        """
        start, end = self._survey_until
        if start <= now < end or not self._lock.acquire(blocking=self._survey is None):
            return self._survey  # another thread is counting
        try:
            self._survey = self._count(now)
            self._survey_until = now, now + self._survey.known // 1000
            return self._survey
        finally:
            self._lock.release()

    def _count(self, now):
        by_hash, listed = self.access.catalogue.by_hash, {}
        sums, known, alive = NOTHING, 0, 0
        for info_hash, counts in self.store.swarms(now):
            sums, known = tuple(map(add, sums, counts)), known + 1
            alive += bool(counts.seeders or counts.leechers)
            if info_hash in by_hash:
                listed[info_hash] = counts
        return Survey(Totals(*sums, alive), listed, known)

    def families(self, now):
        """Return how many peers have an IPv4 endpoint, and how many an IPv6 one.

        Kept like the totals, as long for ten peers as for a swarm: a swarm of many is
        read whole.
        """
        start, end = self._families_until
        if not start <= now < end:
            totals, self._families = self.totals(now), self.store.families(now)
            peers = totals.seeders + totals.leechers
            self._families_until = now, now + (totals.swarms + peers // 10) // 500
        return self._families


def open_tracker(settings):
    """Return the Tracker that keeps its peers where ``settings`` say."""
    data = HERE / settings.data
    store = FileStore(data, settings, EvenClock(data / "clock"))
    counters = Counters(data / "counters")
    history = History(data / "history")
    return Tracker(settings, open_access(settings), store, counters, history)


# -- Door -----------------------------------------------------------------------------
# Announce and scrape are answered before Flask has made a request of them: that would
# cost more than the whole announce. Pages go through Flask.


DISK_FAILS = "this tracker cannot read or write its data: try again later"
FAULT = "internal error"
_TEXT = "Content-Type", "text/plain; charset=iso-8859-1"


class Faults:
    """Our own faults on their way to the error log: one of a kind, once a minute.

    A full disk or a bug would write as much as all clients together ask.
    """

    def __init__(self):
        self._told = {}  # seconds, by kind

    def tell(self, fault, path, now):
        """Log what was raised while ``path`` was answered, unless it has been."""
        kind = type(fault), getattr(fault, "errno", None) or _line_of(fault)
        if 0 <= now - self._told.get(kind, -60) < 60:
            return
        self._told[kind] = now
        if isinstance(fault, OSError):
            log.error("%s failed, as others may for a minute: %s", path, fault)
        else:
            log.error("%s failed, as others may for a minute", path, exc_info=fault)


def _line_of(fault):
    """Return where something was raised."""
    trace = fault.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace and (trace.tb_frame.f_code, trace.tb_lineno)


class Door:
    """The WSGI application that answers announces and scrapes itself."""

    def __init__(self, tracker, pages):
        """Hand on to ``pages``, a WSGI application."""
        self.tracker, self.pages, self.faults = tracker, pages, Faults()

    def __call__(self, environ, start_response):
        answer = _answer_of(environ.get("PATH_INFO", ""))
        if answer is None:
            return self.pages(environ, start_response)
        method = environ["REQUEST_METHOD"]
        if method != "GET" and method != "HEAD":
            start_response("405 Method Not Allowed", [_TEXT, ("Allow", "GET, HEAD")])
            return [b"Clients announce and scrape with GET.\n"]
        body = self._reply(answer, environ)
        if "gunicorn.socket" in environ:
            _read_no_more(environ)
        start_response("200 OK", [_TEXT, ("Content-Length", str(len(body)))])
        return [body] if method == "GET" else []

    def _reply(self, answer, environ):
        """Return the reply to an announce or a scrape, or why there is none."""
        tracker, failure = self.tracker, ""
        now, started = int(time.time()), time.perf_counter_ns()
        try:
            return answer(tracker, environ, now)
        except TrackerError as refusal:
            failure = refusal.kind
            return failure_reply(str(refusal), tracker.settings)
        except Exception as fault:
            is_disk = isinstance(fault, OSError)
            failure = "store" if is_disk else "internal"
            self.faults.tell(fault, environ["PATH_INFO"], now)
            return failure_reply(DISK_FAILS if is_disk else FAULT, tracker.settings)
        finally:
            took = (
                time.perf_counter_ns() - started if answer is _answer_announce else None
            )
            tracker.counters.count(now, failure, took)


def _answer_announce(tracker, environ, now):
    announce = parse_announce(environ, tracker.settings)
    counts, peers, interval = tracker.announce(announce, now)
    return announce_reply(announce, counts, peers, interval, tracker.settings)


def _answer_scrape(tracker, environ, now):
    return scrape_reply(tracker.scrape(parse_scrape(environ), now), tracker.settings)


def _read_no_more(environ):
    """Tell gunicorn's sync worker that a client will say no more.

    When it has answered, it would wait up to two seconds for the client to hang up, and
    serve nobody meanwhile. (With -c app.py it waits for none, see Guest.)
    """
    client = environ["gunicorn.socket"]
    # An encrypted one would go on in clear, and one that is kept has more to ask.
    if type(client) is socket.socket and not environ["wsgi.multithread"]:
        with suppress(OSError):  # it has gone
            client.shutdown(socket.SHUT_RD)


_ANSWERS = {
    "/announce": _answer_announce,
    "/announce.php": _answer_announce,  # BitStorm's
    "/scrape": _answer_scrape,
    "/scrape.php": _answer_scrape,
}


def _answer_of(path):
    """Return what answers a path, or None if that is a page.

    The end of the path decides: hosts differ in how much of a prefix they cut.
    """
    return _ANSWERS.get(path) or _ANSWERS.get("/" + path.rstrip("/").rpartition("/")[2])


def answer_cgi(application):
    """Answer the one request that a web server has started this program for."""
    from wsgiref.handlers import CGIHandler  # which nobody else needs

    CGIHandler().run(application)


is_cgi = __name__ == "__main__" and "GATEWAY_INTERFACE" in os.environ
if is_cgi and _answer_of(os.environ.get("PATH_INFO", "")):
    # A program that lives for one announce ends here: all that is above takes a third
    # of the time that Flask takes to be imported.
    try:
        tracker = open_tracker(load_settings())
    except SettingsError as error:
        sys.exit(f"app.py: {error}")  # for the web server's error log
    answer_cgi(Door(tracker, pages=None))
    # No other announce will go on counting here.
    tracker.history.step(tracker.store.swarms, int(time.time()), enough=sys.maxsize)
    sys.exit()


# -- Doctor ---------------------------------------------------------------------------
# A finding is one line: what was found, why it matters, what to do. The host is looked
# at from inside, and a tracker through all that stands in front of it, as clients do.

import email.utils  # noqa: E402  (why so late: see the end of Door)
import http.client  # noqa: E402
from collections import Counter  # noqa: E402
from itertools import islice  # noqa: E402
from random import sample  # noqa: E402
from urllib.parse import urlencode, urljoin, urlsplit  # noqa: E402

OK, WARNING, FAILURE = "ok", "warning", "failure"
NETWORK_FILE_SYSTEMS = tuple("nfs cifs smb 9p afs fuse.sshfs ceph lustre".split())


class Finding(NamedTuple):
    """What the doctor found: a level, and one line of text."""

    level: str  # OK, WARNING or FAILURE
    text: str


def examine_host(tracker, now):
    """Yield Findings about the data folder, its locks, the clock, peers and lists."""
    folder, existed = tracker.store.folder, os.path.isdir(tracker.store.folder)
    probe = f"{folder}/doctor.{os.getpid()}"
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(bytes(PAGE))
        yield Finding(OK, f"The data folder {folder} can be written.")
        yield from _examine_disk(folder)
        yield from _examine_locks(probe)
        yield from _examine_clock(now, os.stat(probe).st_mtime)
        if existed:
            yield from _examine_peers(tracker, int(now))
    except OSError as error:
        yield Finding(
            FAILURE,
            f"The data folder {folder} cannot be used: {error.strerror}. No peer can be"
            " kept. Make it writable for the user that the server runs as, or set data"
            " to another folder.",
        )
    finally:
        with suppress(OSError):
            os.unlink(probe)
        with suppress(OSError):
            if not existed:
                os.rmdir(folder)
    yield from _examine_lists(tracker.settings, now)


def _examine_disk(folder):
    space = os.statvfs(folder)
    free, files = space.f_bavail * space.f_frsize // 2**20, space.f_favail
    if free < 100 or 0 < space.f_files and files < 1000:
        yield Finding(
            WARNING,
            f"The disk of {folder} has room for {free} MB and {files} files. When it is"
            " full, announces fail. Make room, or set data to a folder elsewhere.",
        )
    kind = _file_system(folder)
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        yield Finding(
            WARNING,
            f"{folder} is on a network file system ({kind}). Whether its locks exclude"
            " workers on other machines cannot be seen from here. Set data to a folder"
            " on a local disk, if there is one.",
        )
    damaged = f"{folder}/damaged"
    if os.path.isdir(damaged) and (number := len(os.listdir(damaged))):
        yield Finding(
            WARNING,
            f"{number} damaged swarm files are in {damaged}. Something else wrote into"
            " them, or the disk is failing. Look at the error log, then remove them.",
        )


def _examine_locks(probe):
    """Lock a file and see whether a thread and a process are kept out of it."""
    with open(probe, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Each thread opens swarm files itself, and flock tells openings apart.
        excluded = {"threads": _is_locked(probe)}
        child = os.fork()
        if not child:
            try:
                os._exit(_is_locked(probe))
            finally:  # whatever happens, two must not go on from here
                os._exit(2)
        status = os.waitpid(child, 0)[1]
        excluded["processes"] = os.waitstatus_to_exitcode(status) == 1
    for who, is_excluded in excluded.items():
        if is_excluded:
            yield Finding(OK, f"Locks in the data folder exclude two {who}.")
        else:
            yield Finding(
                FAILURE,
                f"Locks in the data folder do not exclude two {who}. They will write"
                " over each other's peers. Set data to a folder on a local disk.",
            )


def _is_locked(path):
    try:
        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True


def _examine_clock(now, written):
    """``written`` is when the file system says that a file was written just now."""
    made = os.stat(__file__).st_mtime
    if now < made - 86400:
        yield Finding(
            FAILURE,
            f"The clock says {time.ctime(now)}, but app.py was copied here after that."
            " Peers would be kept too long when it is corrected. Set the clock.",
        )
    elif abs(now - written) > 60:
        yield Finding(
            WARNING,
            f"The clock and that of the data folder's disk differ by"
            f" {abs(now - written):.0f} seconds. One of the two machines is wrong. Have"
            " both keep their clocks by NTP.",
        )
    else:
        yield Finding(OK, f"The clock says {time.ctime(now)}.")


def _examine_peers(tracker, now):
    """See where a thousand peers come from, and whether they can be read."""
    ids, addresses = set(), []
    for _, peers in tracker.store.peers(now):
        ids.update(_cut(peers.ids, 20))
        addresses += [end[:-2] for end in _cut(peers.endpoints4, 6) if any(end)]
        addresses += [end[:-2] for end in _cut(peers.endpoints6, 18) if any(end)]
        if len(ids) > 1000:
            break
    if tracker.store.newer:
        yield Finding(
            FAILURE,
            f"{tracker.store.newer} was written by a newer BitBreeze, others may be,"
            " too. Their swarms are refused. Upgrade this one, or run app.py export"
            " there and app.py import here.",
        )
    seen = set(addresses)
    if len(ids) > 4 and len(seen) == 1:
        yield Finding(
            WARNING,
            f"All {len(ids)} peers looked at come from {_shown(seen.pop())}. If that is"
            " a proxy, none of them can be reached. Set proxies to the number of those"
            " in front; the page /doctor?key=... shows what they send.",
        )
    elif ids:
        yield Finding(OK, f"{len(ids)} peers looked at have {len(seen)} addresses.")
    private = sum(1 for address in addresses if private_network(address))
    if private and not tracker.settings.public_ip:
        yield Finding(
            WARNING,
            f"{private} peers have private addresses. They are handed to their own"
            " network only. Set public_ip to the address the world sees them under.",
        )


def _cut(column, width):
    return [bytes(column[at : at + width]) for at in range(0, len(column), width)]


def _shown(address):
    return str(ipaddress.ip_address(address))


def _examine_lists(settings, now):
    """See what is tracked, and what is wrong with what is listed.

    The memory of the workers is read, but not written: this may be another user.
    """
    access = open_access(settings, writes=False)
    # As it will be in a minute: what came just now is taken for finished.
    problems, trouble = access.take_in(now + 60, 3)
    catalogue = access.catalogue
    for each in trouble:
        yield Finding(
            FAILURE,
            f"A list of torrents cannot be read: {each}. What it holds is not known."
            " Make it readable for the user that the server runs as.",
        )
    if not (trouble or access.is_open() or catalogue.unread or access.is_any_listed()):
        yield Finding(
            WARNING,
            f"No torrent is tracked: there is no good one in {catalogue.folder}, and no"
            f" hash in {access.allow.path}. Put one there, or set track to any.",
        )
    elif not trouble:
        yield Finding(OK, f"Tracked: {access.in_words()}; track is {settings.track}.")
    skipped = sorted(catalogue.skipped.items())
    for path, reason in skipped[:10]:
        yield Finding(
            WARNING, f"{_printable(f'{catalogue.folder}/{path}')} is skipped: {reason}."
        )
    if more := skipped[10:]:
        yield Finding(WARNING, f"{len(more)} more files there are skipped.")
    for problem in problems:
        yield Finding(WARNING, f"{problem}.")


def _printable(text):
    """Return a text of others as it can stand in a line, whatever it is."""
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def examine_request(environ, settings):
    """Yield Findings about who a request seems to come from.

    It is the operator's, from a browser, which sends no X-Forwarded-For by itself.
    """
    remote = environ.get("REMOTE_ADDR", "")
    forwarded = environ.get("HTTP_X_FORWARDED_FOR", "")
    entries = len(forwarded.split(",")) if forwarded.strip() else 0
    headers = f"The server knows {remote!r}, X-Forwarded-For is {forwarded[:200]!r}."
    try:
        address = _shown(client_address(environ, settings))
    except TrackerError as refusal:
        yield Finding(FAILURE, f"Announces are refused: {refusal}. {headers}")
        return
    if entries > settings.proxies and not settings.address_header:
        yield Finding(
            FAILURE,
            f"You seem to come from {address}, but {entries} proxies told whom they"
            f" forward, and proxies is {settings.proxies}. All peers get a proxy's"
            f" address, and nobody can connect. Set proxies = {entries}. {headers}",
        )
    else:
        yield Finding(
            OK,
            f"You come from {address}. If that is not your own address, but a proxy's,"
            f" set proxies to one more than {settings.proxies}. {headers}",
        )


class Unanswered(Exception):
    """A tracker did not answer as one; the text says what came instead."""


def examine_url(url, clock):
    """Yield Findings about the tracker at ``url``, asked as clients ask.

    It announces three peers in a swarm that nobody else has, and stops them again.
    ``clock`` returns seconds since 1970.
    """
    try:
        base, moved = _follow(_base_of(url))
        if moved:
            yield Finding(
                WARNING,
                f"{moved} redirects to {base}. Every announce takes two requests. Give"
                f" clients {base}/announce.",
            )
        yield Finding(OK, f"Clients announce to {base}/announce, and it answers.")
        yield from _examine_front_page(base, clock)
        yield from _examine_scrape(base)
        yield from _examine_addresses(base)
        yield from _examine_ipv6(base)
        yield from _examine_private_files(base)
    except Unanswered as error:
        yield Finding(FAILURE, str(error))


def _base_of(url):
    """Return a URL without what stands behind the announce URL's prefix."""
    url = url if "://" in url else f"http://{url}"
    base = url.partition("?")[0].rstrip("/")
    for path in _ANSWERS:
        base = base.removesuffix(path)
    with suppress(ValueError):
        parts = urlsplit(base)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return base
    raise Unanswered(f"{url} is no URL of a tracker: say http://NAME:PORT/announce.")


def _follow(base):
    """Return where a tracker answers, and where it moved from, "" if it did not."""
    moved = ""
    for _ in range(5):
        response, body, _ = _get(f"{base}/announce")
        to = response.getheader("Location")
        if not 301 <= response.status <= 308 or not to:
            _decoded(response, body)
            return base, moved
        moved, base = f"{base}/announce", _base_of(urljoin(f"{base}/announce", to))
    raise Unanswered(f"{base}/announce redirects for ever. Look at the front end.")


def _get(url, headers=None):
    """Return the response to a GET, its body, and the address that it was sent from."""
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kinds[parts.scheme](
        parts.hostname, parts.port, timeout=10, source_address=_source(parts.hostname)
    )
    target = f"{parts.path or '/'}?{parts.query}"
    try:
        connection.request(
            "GET", target, headers={"User-Agent": "BitBreeze-doctor", **(headers or {})}
        )
        own = parse_address(connection.sock.getsockname()[0])
        response = connection.getresponse()
        return response, response.read(2**20), own
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(
            f"{url.partition('?')[0]} does not answer: {error or type(error).__name__}."
            " No client gets further. See that the server runs, that its port is open,"
            " and that one more request is answered while it is busy."
        ) from None
    finally:
        connection.close()


def _source(host):
    """Return where to ask a host from: not from the address of its own proxies."""
    with suppress(OSError):
        if sys.platform == "linux" and socket.gethostbyname(host) == "127.0.0.1":
            return "127.0.0.2", 0
    return None


def _decoded(response, body):
    with suppress(Exception):  # whatever it is, it is not what a tracker answers
        reply = bencoder.bdecode(body)
        if response.status == 200 and isinstance(reply, dict):
            return reply
    kind = response.getheader("Content-Type", "nothing")
    raise Unanswered(
        f"The answer was {response.status} {response.reason}, {kind}, not a tracker's."
        " Clients cannot read it. See that the front end hands /announce and /scrape to"
        " app.py, and asks no visitor to prove anything."
    )


def _examine_front_page(base, clock):
    response, body, _ = _get(f"{base}/")
    with suppress(TypeError, ValueError):  # there is no such header, or no date in it
        date = email.utils.parsedate_to_datetime(response.getheader("Date"))
        if abs(ahead := date.timestamp() - clock()) > 60:
            yield Finding(
                WARNING,
                f"The server's clock and this one differ by {abs(ahead):.0f} seconds."
                " One of them is wrong. Set it by NTP.",
            )
    shown = re.search(rb"<code>(.*?)</code>", body)
    if not shown or shown[1].decode(errors="replace") != f"{base}/announce":
        told = shown[1].decode(errors="replace") if shown else "no announce URL"
        yield Finding(
            WARNING,
            f"The front page shows {told}, not {base}/announce. Users copy it from"
            " there. Have the front end pass on Host, and set X-Forwarded-Proto where"
            " it takes https; that is believed if proxies is set.",
        )


def _examine_scrape(base):
    values = bytes(sample(range(256), 256)) * 5
    hashes = [values[at : at + 20] for at in range(0, 1200, 20)]
    if _scrape(base, hashes[:13]) != set(hashes[:13]):  # has every byte there is
        yield Finding(
            FAILURE,
            "Binary info_hashes do not survive the way to app.py. Clients never meet."
            " Look for rewrite rules that put the query together anew: Apache's need"
            " the flags QSA, or B and NE.",
        )
        return
    yield Finding(OK, "Binary info_hashes survive the way to app.py.")
    with suppress(Unanswered):
        if _scrape(base, hashes) == set(hashes):
            yield Finding(OK, "A scrape of 60 torrents passes.")
            return
    yield Finding(
        FAILURE,
        "A scrape of 60 torrents, 4.3 kB, does not pass. Transmission sends such. Set"
        " gunicorn's --limit-request-line 8190, uWSGI's buffer-size = 32768, or nginx'"
        " large_client_header_buffers 4 16k.",
    )


def _scrape(base, hashes):
    """Return the set of info_hashes that the answer to a scrape has."""
    query = "&".join("info_hash=" + "".join(f"%{b:02x}" for b in h) for h in hashes)
    response, body, _ = _get(f"{base}/scrape?{query}")
    return set(_decoded(response, body).get(b"files", ()))


# Addresses for documentation (RFC 5737), none of which a client can have.
_FORGED = {
    "X-Forwarded-For": "198.51.100.1",
    "X-Real-IP": "198.51.100.2",
    "CF-Connecting-IP": "198.51.100.3",
    "True-Client-IP": "198.51.100.4",
    "X-Client-IP": "198.51.100.5",
    "Forwarded": "for=198.51.100.6",
}


def _address_of(port, reply):
    """Return the address of the peer with a port in a reply, or None."""
    for key, width in ((b"peers", 6), (b"peers6", 18)):
        for endpoint in _cut(reply.get(key, b""), width):
            if endpoint[-2:] == port.to_bytes(2, "big"):
                return endpoint[:-2]
    return None


def _announce_thrice(base):
    """Announce plainly, with forged headers, and to ask for both.

    Return the addresses that were kept of the two, None for none, and our own.
    """
    swarm, who = os.urandom(20), b"-BBDOCT-" + os.urandom(11).hex().encode()[:11]

    def announce(port, headers=None, event="started"):
        peer = {"peer_id": who + b"%d" % (port % 10), "port": port, "left": 1}
        parameters = {"info_hash": swarm, **peer, "event": event, "compact": 1}
        query = urlencode(parameters)
        response, body, own = _get(f"{base}/announce?{query}", headers)
        reply = _decoded(response, body)
        if b"failure reason" in reply:
            reason = reply[b"failure reason"].decode(errors="replace")
            raise Unanswered(f"Announces are refused: {reason}.")
        return reply, own

    try:
        announce(50001)
        announce(50002, _FORGED)
        reply, own = announce(50003)
        return _address_of(50001, reply), _address_of(50002, reply), own
    finally:
        with suppress(Unanswered):
            for port in (50001, 50002, 50003):
                announce(port, event="stopped")


def _examine_addresses(base):
    kept, forged, own = _announce_thrice(base)
    believed = [n for n, v in _FORGED.items() if forged and v.endswith(_shown(forged))]
    if not kept or not forged:
        yield Finding(
            FAILURE,
            "A peer was not told of the two that announced before. Something in front"
            " caches answers, or the workers have different data folders. Have nothing"
            " cached, and set data to one folder.",
        )
    elif believed:
        yield Finding(
            FAILURE,
            f"The tracker believes a client's own {believed[0]}. Anybody can aim swarms"
            " at others. Set proxies to the number of proxies in front (it is too"
            " high), or proxy_networks to where they are.",
        )
    elif kept == own or (
        private_network(own) and own[0] != 127 and not private_network(kept)
    ):
        yield Finding(
            OK,
            f"The tracker sees this machine as {_shown(kept)}, whatever it claims.",
        )
    else:
        yield Finding(
            FAILURE,
            f"The tracker takes this machine, {_shown(own)}, for {_shown(kept)}. If"
            " that is a proxy's address, all peers get it, and nobody can connect. Set"
            " proxies to the number of proxies in front (it is too low).",
        )


def _examine_ipv6(base):
    parts = urlsplit(base)
    port = parts.port or http.client.HTTPS_PORT * (parts.scheme == "https") or 80
    try:
        found = socket.getaddrinfo(
            parts.hostname, port, socket.AF_INET6, socket.SOCK_STREAM
        )
    except OSError:
        yield Finding(OK, f"{parts.hostname} has no IPv6 address: it needs none.")
        return
    try:
        socket.create_connection(found[0][4][:2], timeout=5).close()
        yield Finding(OK, f"{parts.hostname} answers over IPv6, too.")
    except OSError as error:
        yield Finding(
            WARNING,
            f"{parts.hostname} has the IPv6 address {found[0][4][0]}, which does not"
            f" answer here: {error.strerror}. Clients with IPv6 wait for it. Have the"
            " server listen there, or take the address out of DNS, unless this machine"
            " has no IPv6.",
        )


def _examine_private_files(base):
    """See whether the web server hands out what lies beside app.py."""
    folders = {base, base.rpartition("/")[0]} if base.count("/") > 2 else {base}
    for folder in sorted(folders):
        for name, start in (("wsgi.ini", b"# BitBreeze"), ("data/swarms.count", b"")):
            response, body, _ = _get(f"{folder}/{name}")
            if response.status == 200 and (len(body) == 8 or body[:11] == start):
                yield Finding(
                    FAILURE,
                    f"Anybody can read {folder}/{name}. Peers' addresses and keys are"
                    " not for the public. Set data to a folder outside of what the web"
                    " server shows, and deny it all but app.py.",
                )


# -- Archive --------------------------------------------------------------------------
# One JSON document holds all that is worth keeping: to move a tracker, or merge two. It
# is written and read a line at a time, so that it may be larger than the memory.

ARCHIVE_VERSION = 1  # raised when older trackers would read it wrong, not for more keys
BATCH = 500  # peers in a line at most; they are merged under one lock
LONGEST_LINE = 2**20  # bytes that are read as a line; 500 peers have 150,000
REFORMATTED = 2**24  # bytes of a document that is read at once, as its lines are others
_OPENING = re.compile(  # stays, in all versions, but for what follows the version
    rb'\{"format": "BitBreeze", "version": (\d{1,9}), (?:"made": \d+(,\r?\n))?'
)
_ENDPOINTS = ("4", socket.AF_INET), ("6", socket.AF_INET6)


class ArchiveError(ValueError):
    """A document cannot be read; the text says where, and what is wrong."""


class ArchivedSwarm(NamedTuple):
    """A swarm in a document; one of many peers is there several times, in parts."""

    info_hash: bytes  # 20 bytes
    snatches: int
    peers: list  # of (Record, is_seeder)


def write_archive(file, swarms, samples, now):
    """Write a document of version 1 into a text file; return how many swarms and peers.

    ``swarms`` is what Store.records yields, ``samples`` is what the History has. The
    document is one JSON object, laid out in lines: the opening, the history, and one
    for each 500 peers of a swarm.

        {"format": "BitBreeze", "version": 1, "made": SECONDS,
        "history": [{"seeders": 1, "leechers": 2, "swarms": 1, "time": SECONDS}, ...],
        "swarms": [
        {"info_hash": HEX, "snatches": 3, "peers": [PEER, ...]},
        ...
        ]
        }

    A PEER is {"peer_id": HEX, "key": CHECKSUM, "seeder": false, "partial": false,
    "snatched": true}, and for each family that it was seen in, "endpoint4": "IP:PORT",
    "seen4": SECONDS, "endpoint6": "[IP]:PORT", "seen6": SECONDS. Seconds are since
    1970; port 0 stands for one that nobody can reach.
    """
    file.write(
        f'{{"format": "BitBreeze", "version": {ARCHIVE_VERSION}, "made": {now},\n'
    )
    history = json.dumps([sample._asdict() for sample in samples])
    file.write(f'"history": {history},\n"swarms": [')
    number, total, comma = 0, 0, ""
    for info_hash, snatches, peers in swarms:
        named = {"info_hash": info_hash.hex(), "snatches": snatches}
        for batch in _batches(_peer_as_json(*peer) for peer in peers):
            file.write(f"{comma}\n{json.dumps({**named, 'peers': batch})}")
            comma, total = ",", total + len(batch)
        number += 1
    file.write("\n]\n}\n")
    return number, total


def _batches(peers):
    """Yield lists of up to 500 peers each, one list at least."""
    yield list(islice(peers, BATCH))
    while batch := list(islice(peers, BATCH)):
        yield batch


def _peer_as_json(record, is_seeder):
    peer = {
        "peer_id": record.peer_id.hex(),
        "key": record.key,
        "seeder": is_seeder,
        "partial": bool(record.state & PARTIAL),
        "snatched": bool(record.state & SNATCHED),
    }
    if record.seen4:
        ip = socket.inet_ntop(socket.AF_INET, record.endpoint4[:-2])
        peer["endpoint4"] = f"{ip}:{int.from_bytes(record.endpoint4[-2:], 'big')}"
        peer["seen4"] = record.seen4
    if record.seen6:
        ip = socket.inet_ntop(socket.AF_INET6, record.endpoint6[:-2])
        peer["endpoint6"] = f"[{ip}]:{int.from_bytes(record.endpoint6[-2:], 'big')}"
        peer["seen6"] = record.seen6
    return peer


def read_archive(file):
    """Yield the Samples and then the ArchivedSwarms in a document, a binary file.

    Raise ArchiveError for what is none, is damaged or cut short, or was made by a newer
    version. What is laid out otherwise than by write_archive must have at most 16 MB.
    """
    for where, parse, value in _members(file):
        try:
            yield parse(value)
        except ArchiveError as error:
            raise ArchiveError(f"{where}: {error}") from None


def _members(file):
    """Yield (where it stands, what parses it, value) of what is in a document."""
    line, number, parse = file.readline(LONGEST_LINE), 1, None
    if opening := _OPENING.match(line):
        _check_version(int(opening[1]))
    if not opening or not opening[2]:
        yield from _members_at_once(line, file)
        return
    text = b""
    while text != b"}":
        line, number = file.readline(LONGEST_LINE), number + 1
        text, where = line.strip().rstrip(b","), f"line {number}"
        if not line.endswith(b"\n") and len(line) < LONGEST_LINE and text != b"}":
            raise ArchiveError(f"it is cut short in line {number}: copy it anew")
        if text == b"]" or text == b'"swarms": [':
            parse = None if text == b"]" else _parsed_swarm
        elif parse:
            yield where, parse, _decoded_json(text, where)
        elif text != b"}":
            member = _decoded_json(b"{" + text + b"}", where)
            for each in _list(member, "history", []):
                yield where, _parsed_sample, each
    if file.read(1):
        raise ArchiveError(f"something stands behind its end in line {number}")


def _members_at_once(start, file):
    """Yield what ``_members`` does of a document whose lines are others than ours."""
    text = start + file.read(REFORMATTED)
    if file.read(1):
        raise ArchiveError("its lines are not those that app.py export wrote")
    document = _decoded_json(text, "it")
    if not isinstance(document, dict) or document.get("format") != "BitBreeze":
        raise ArchiveError("app.py export did not write it")
    _check_version(_number(document, "version", 10**9))
    for each in _list(document, "history", []):
        yield "history", _parsed_sample, each
    for number, each in enumerate(_list(document, "swarms"), 1):
        yield f"swarm {number}", _parsed_swarm, each


def _decoded_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ArchiveError(
            f"{where} is not JSON, or not as app.py export wrote it"
        ) from None


def _list(given, name, default=None):
    value = given.get(name, default)
    if not isinstance(value, list):
        raise ArchiveError(f"{name} is not a list")
    return value


def _check_version(version):
    if version > ARCHIVE_VERSION:
        raise ArchiveError(
            f"it was made by a newer BitBreeze, in format {version}: upgrade this one"
        )


def _parsed_sample(sample):
    return Sample(*[_number(sample, name, 2**32 - 1) for name in Sample._fields])


def _parsed_swarm(swarm):
    info_hash, snatches = _hash(swarm, "info_hash"), _number(swarm, "snatches", 2**63)
    peers = list(map(_parsed_peer, _list(swarm, "peers")))
    return ArchivedSwarm(info_hash, snatches, peers)


def _parsed_peer(peer):
    """Return (Record, is_seeder) of a peer in a document; raise ArchiveError."""
    peer_id, key = _hash(peer, "peer_id"), _number(peer, "key", 2**32 - 1)
    flags = [peer.get(name) for name in ("seeder", "partial", "snatched")]
    if any(type(flag) is not bool for flag in flags):
        raise ArchiveError("seeder, partial or snatched is neither true nor false")
    is_seeder, is_partial, is_snatched = flags
    state = PARTIAL * (is_partial and not is_seeder) | SNATCHED * is_snatched
    seen, ends = [], []
    for digit, family in _ENDPOINTS:
        ends.append(_parsed_endpoint(peer, digit, family))
        is_there = peer.get(f"endpoint{digit}") is not None
        seen.append(_number(peer, f"seen{digit}", 2**32 - 1) if is_there else 0)
    return Record(peer_id, key, state, *seen, *ends), is_seeder


def _parsed_endpoint(peer, digit, family):
    """Return the 6 or 18 bytes of an endpoint, zeros where there is none."""
    text = peer.get(f"endpoint{digit}")
    if text is None:
        return _NOWHERE4 if digit == "4" else _NOWHERE6
    with suppress(ValueError, OverflowError, OSError, AttributeError):
        ip, _, port = text.rpartition(":")
        if digit == "6":
            ip = ip.removeprefix("[").removesuffix("]")
        number = int(port) if port.isdecimal() else -1
        # As in an announce: nobody can connect to port 1.
        packed = (number if number != 1 else 0).to_bytes(2, "big")
        return socket.inet_pton(family, ip) + packed
    raise ArchiveError(f"endpoint{digit} is not an address and a port: {text!r:.60}")


def _hash(given, name):
    """Return the 20 bytes in hex of that name; raise ArchiveError."""
    text = given.get(name) if isinstance(given, dict) else None
    with suppress(ValueError, TypeError):
        if len(text) == 40 and len(value := bytes.fromhex(text)) == 20:
            return value
    raise ArchiveError(f"{name} is not 40 hex digits")


def _number(given, name, most):
    value = given.get(name) if isinstance(given, dict) else None
    if type(value) is not int or not 0 <= value <= most:
        raise ArchiveError(f"{name} is not a whole number from 0 to {most}")
    return value


class Merging:
    """What became of a document so far, while it is merged."""

    def __init__(self, tracker):
        self.tracker, self.swarms, self.peers, self.hours = tracker, 0, 0, 0
        self.left_out = Counter()  # how many by what they are, and why
        self._last = b""  # info_hash of the swarm that was met last

    def merge(self, archived, now):
        """Merge a Sample or an ArchivedSwarm, as History.merge and Store.restore say.

        What is not tracked here is merged like all else: the lists decide at every
        announce, and may come later. Raise OSError.
        """
        if isinstance(archived, Sample):
            self._merge_sample(archived, now)
        else:
            self._merge_swarm(archived, now)

    def _merge_sample(self, sample, now):
        try:
            self.hours += self.tracker.history.merge([sample], now)
        except NewerError:
            self.left_out["hours of history", "a newer BitBreeze keeps it here"] += 1

    def _merge_swarm(self, swarm, now):
        is_new, self._last = swarm.info_hash != self._last, swarm.info_hash
        try:
            done = self.tracker.store.restore(*swarm, now)
        except TrackerError as refusal:
            self.left_out["swarms", re.split("[:.]", str(refusal))[0]] += is_new
            return
        self.swarms, self.peers = self.swarms + is_new, self.peers + done.kept
        ttl = self.tracker.settings.peer_ttl
        self.left_out["peers", f"not seen for {ttl} seconds"] += done.expired
        limits = "max_peers or max_peers_per_address"
        self.left_out["peers", limits] += done.refused

    def in_words(self):
        """Return how much is merged, and what is left out and why."""
        words = f"{self.swarms} swarms with {self.peers} peers"
        words += f" and {self.hours} hours of history" if self.hours else ""
        reasons = [
            f"{n} {what} ({why})" for (what, why), n in self.left_out.items() if n
        ]
        return words + ("; left out are " + ", ".join(reasons) if reasons else "")


# -- Listing --------------------------------------------------------------------------
# The torrents that a page, a feed or JSON shows, and in which order. What strangers
# have named is made visible here, once for all of them.

# Control and direction characters, halves of surrogates, and what XML cannot hold; not
# the two joiners, which Persian and emoji are written with.
_INVISIBLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)


def visible(text):
    """Return a stranger's text with what nobody would see as, say, ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


class Row(NamedTuple):
    """A torrent as it is listed, with its swarm's counts."""

    torrent: Torrent
    counts: Counts
    id: str  # hex: its info_hash of v1, or of v2 in full
    name: str  # visible, as the category is
    category: str  # the folder that its file is in, "" for none
    searched: str  # what a search looks at


def row_of(torrent, counts):
    """Return the Row of a Torrent; ``counts`` are Counts by info_hash.

    A client has both of a hybrid's swarms, or one: so the larger number is taken.
    """
    found = [counts.get(info_hash, NOTHING) for info_hash in torrent.info_hashes()]
    folder = os.fsencode(torrent.path.rpartition("/")[0]).decode("utf-8", "replace")
    name, category = visible(torrent.name), visible(folder)
    return Row(
        torrent,
        Counts(*map(max, zip(*found, strict=True))),
        (torrent.v1 or torrent.v2).hex(),
        name,
        category,
        f"{torrent.name}\n{name}\n{category}".casefold(),
    )


ORDERS = {  # by the name of a column; "-" before it turns the order round
    "name": lambda row: row.name.casefold(),
    "size": lambda row: row.torrent.size,
    "seeders": lambda row: row.counts.seeders,
    "leechers": lambda row: row.counts.leechers,
    "completed": lambda row: row.counts.snatches,
    "added": lambda row: row.torrent.added,
}
NEWEST = "-added"


class Listing:
    """All listed torrents at one time."""

    def __init__(self, torrents, counts):
        """List Torrents, with Counts by info_hash."""
        self.rows = [row_of(torrent, counts) for torrent in torrents]
        self._ordered = {}  # rows by the name of an order, as they are asked for
        self.categories = sorted({row.category for row in self.rows if row.category})

    def select(self, words="", category="", order=NEWEST):
        """Return the Rows that have all of the words, in a category or below it."""
        rows, words = self._in_order(order), words.casefold().split()
        if category:
            inside = (category, *(c for c in self.categories if _below(c, category)))
            rows = [row for row in rows if row.category in inside]
        if not words:
            return rows
        return [row for row in rows if all(word in row.searched for word in words)]

    def _in_order(self, order):
        if order not in self._ordered:
            by_name = sorted(self.rows, key=ORDERS["name"])
            name, is_reversed = order.lstrip("-"), order.startswith("-")
            by_name.sort(key=ORDERS[name], reverse=is_reversed)
            self._ordered[order] = by_name
        return self._ordered[order]


def _below(category, above):
    return category.startswith(f"{above}/")


class Folder(NamedTuple):
    """A folder in a torrent."""

    name: str
    size: int  # bytes of all that is in it
    folders: list  # of Folder
    files: list  # of (name, bytes)


def folder_of(files, name="", depth=0):
    """Return the Folder that files are in; ``files`` are as files_of yields them.

    Names are made visible. Below twenty folders the rest of a path is one name: nobody
    looks there, but templates go down by recursion.
    """
    folder = Folder(name, sum(size for _, size in files), [], [])
    below = {}  # files by the name of their folder
    for path, size in files:
        if len(path) > 1 and depth < 20:
            below.setdefault(path[0], []).append((path[1:], size))
        else:
            folder.files.append((visible("/".join(path)), size))
    for inner, found in below.items():
        folder.folders.append(folder_of(found, visible(inner), depth + 1))
    return folder


# -- Templates ------------------------------------------------------------------------
# One style sheet, no script, nothing from elsewhere: it says so to browsers, too.

STYLE = """
:root { color-scheme: light dark; --text: #1c2127; --back: #fff; --faint: #59636e;
  --line: #d0d7de; --link: #0b57a8; --bad: #b3261e; --soft: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --back: #14181c; --faint: #a3adb7; --line: #39414a;
    --link: #82b8ff; --bad: #ff938a; --soft: #1f252b } }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: .5rem 0; line-height: 1.2 } h2 { margin: 2rem 0 .5rem; line-height: 1.2 }
h1, td, dd, li { overflow-wrap: anywhere }
a { color: var(--link) } a:focus-visible { outline: 2px solid; outline-offset: 2px }
code { padding: .1rem .3rem; background: var(--soft); overflow-wrap: anywhere;
  user-select: all } .url code { display: block; padding: .6rem .75rem }
.notice { padding-left: .75rem; border-left: 3px solid #d08700 }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0 }
.numbers dd { font-size: 1.6rem; line-height: 1.2 }
dt, .faint { color: var(--faint) } dd { margin: 0 } .bad { color: var(--bad) }
.about { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem }
@media (max-width: 30rem) { .about { grid-template-columns: 1fr; gap: 0 }
  .about dd { margin-bottom: .6rem } }
form { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; margin: 1rem 0 }
label { display: grid; color: var(--faint); font-size: .875rem }
input, select, button { font: inherit; padding: .4rem .6rem; max-width: 100%;
  box-sizing: border-box; color: var(--text); background: var(--back);
  border: 1px solid var(--faint); border-radius: .3rem } .search { flex: 1 1 14rem }
select { max-width: 16rem }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .4rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line) } th { white-space: nowrap }
th:first-child, td:first-child { padding-left: 0; text-align: left }
td:first-child { width: 100% } td { white-space: nowrap }
td:first-child, td small { white-space: normal } small a { margin-right: .5rem }
tr.dead td:first-child { padding-left: .6rem; border-left: 3px solid var(--bad) }
@media (max-width: 40rem) { thead { display: none }
  tr { display: flex; flex-wrap: wrap; padding: .5rem 0;
    border-bottom: 1px solid var(--line) }
  td { padding: 0 1rem 0 0; border: 0 } td:first-child { width: auto; flex: 1 0 95% }
  td:nth-child(n+2)::before { color: var(--faint) }
  td:nth-child(3)::before { content: "seeders " }
  td:nth-child(4)::before { content: "leechers " }
  td:nth-child(5)::before { content: "completed " }
  td:nth-child(6)::before { content: "age " } }
.pages, .actions { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
.actions a { padding: .5rem 1rem; border: 1px solid; border-radius: .3rem }
.tree ul, ul.tree { margin: 0; padding-left: 1.25rem; list-style: none }
ul.tree { padding-left: 0 } summary { cursor: pointer }
.comment { white-space: pre-wrap; padding: .6rem .75rem; background: var(--soft) }
.findings { padding: 0; list-style: none } .findings li { margin: .75rem 0;
  padding: .25rem .75rem; border-left: .4rem solid #2e8b57 }
.findings .warning { border-color: #d08700 }
.findings .failure { border-color: #c8281e }
svg { display: block; width: 100%; height: auto } footer { margin-top: 3rem }
footer a { margin-right: 1rem }
"""

ICON = (  # two winds and a breeze
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'"
    " viewBox='0 0 16 16' fill='none' stroke='%232a7ae2' stroke-width='1.6'"
    " stroke-linecap='round'%3E%3Cpath"
    " d='M1 5h9a2 2 0 1 0-2-2M1 8h12M1 11h7a2 2 0 1 1-2 2'/%3E%3C/svg%3E"
)

TEMPLATES = {
    "base.html": """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{{ title }}{% endblock %}</title>
<link rel="icon" href="{{ icon }}">
{% block head %}{% endblock -%}
<style>{{ style }}</style>
</head>
<body>
{% block home %}<nav><a href="{{ root }}">{{ title }}</a></nav>{% endblock %}
<main>
{% block main %}{% endblock %}
</main>
<footer class="faint">{% block footer %}{% endblock %}BitBreeze</footer>
</body>
</html>
""",
    "front.html": """\
{% extends "base.html" %}
{% block head %}
<link rel="alternate" type="application/rss+xml" title="{{ title }}" href="{{ feed }}">
{% endblock %}
{% block home %}{% endblock %}
{% block main %}
<h1>{{ title }}</h1>
{% if notice %}<p class="notice">{{ notice }}</p>{% endif %}
<p>This is a BitTorrent tracker: it tells those who share a torrent of one another.
It holds no files. {% if is_open %}It is open: any torrent that is announced here is
tracked.{% else %}It tracks the torrents of its own list only.{% endif %}
Its announce URL:</p>
<p class="url"><code>{{ announce_url }}</code></p>
<dl class="numbers">
  {% for name in ("seeders", "leechers", "swarms") -%}
  <div><dt>{{ name }}</dt><dd>{{ "{:,}".format(totals[name]) }}</dd></div>
  {% endfor -%}
  {% if listed %}<div><dt>torrents</dt><dd>{{ "{:,}".format(listed) }}</dd></div>
  {% endif %}
</dl>
{% if unread %}<p class="notice">{{ unread }} more torrents are being read.</p>
{% endif %}
{% if listed %}{% include "list.html" %}{% endif %}
{% if graph %}<h2>Last month</h2>
{{ graph }}{% endif %}
{% endblock %}
{% block footer %}
{% if listed %}<a href="{{ feed }}">Feed</a>
<a href="{{ root }}torrents.json">The list as JSON</a>{% endif %}
<a href="{{ root }}stats.json">The numbers as JSON</a>
<a href="{{ root }}metrics">for Prometheus</a>
{% endblock %}
""",
    "list.html": """\
<h2 id="torrents">Torrents</h2>
<form role="search" action="{{ root }}#torrents">
  <label class="search">Search
    <input type="search" name="q" value="{{ asked.q }}" maxlength="200"></label>
  {% if categories %}<label>Category <select name="category">
    <option value="">all</option>
    {% for each in categories -%}
    <option{% if each == asked.category %} selected{% endif %}>{{ each }}</option>
    {% endfor %}</select></label>{% endif %}
  <label>Sort by <select name="sort">
    {% for each, text in sorts -%}
    <option value="{{ each }}"{% if each == asked.sort %} selected{% endif %}>{{ text }}
    </option>
    {% endfor %}</select></label>
  <button>Search</button>
</form>
{% if not rows %}
<p>No torrent is called that. <a href="{{ root }}#torrents">Show all</a></p>
{% else %}
<table>
<thead><tr>
  {% for column in columns -%}
  <th scope="col"{% if column.sorted %} aria-sort="{{ column.sorted }}"{% endif %}>
  <a href="{{ column.link }}">{{ column.text }}</a>{{ column.arrow }}</th>
  {% endfor %}
</tr></thead>
<tbody>
{% for row in rows -%}
{% set counts = row.counts -%}
<tr{% if not counts.seeders %} class="dead"{% endif %}>
<td><a href="{{ root }}torrent/{{ row.id }}"><bdi>{{ row.name }}</bdi></a><br>
<small>{% if row.category %}<a class="faint" href="{{ root }}?category=
{{- row.category | urlencode }}#torrents"><bdi>{{ row.category }}</bdi></a>
{% endif %}{% set link = row | magnet %}{% if link -%}
<a href="{{ link }}" aria-label="magnet link of {{ row.name }}">magnet</a>
{%- endif %}<a href="{{ root }}torrent/{{ row.id }}.torrent"
 aria-label="download {{ row.name }}">.torrent</a>
{%- if not counts.seeders %}<b class="bad">nobody seeds it</b>{% endif %}</small></td>
<td>{{ row.torrent.size | size }}</td>
<td>{{ counts.seeders }}</td>
<td>{{ counts.leechers }}</td>
<td>{{ counts.snatches }}</td>
<td>{{ (now - row.torrent.added) | span }}</td>
</tr>
{% endfor %}
</tbody>
</table>
<nav class="pages" aria-label="Pages">
{% if previous %}<a href="{{ previous }}" rel="prev">Previous</a>{% endif %}
<span>{{ found }} torrent{{ "s" * (found > 1) }},
page {{ asked.page }} of {{ last }}</span>
{% if next %}<a href="{{ next }}" rel="next">Next</a>{% endif %}
</nav>
{% endif %}
""",
    "torrent.html": """\
{% extends "base.html" %}
{% block title %}{{ row.name }} - {{ title }}{% endblock %}
{% block main %}
<h1><bdi>{{ row.name }}</bdi></h1>
{% if row.category %}<p class="faint"><bdi>{{ row.category }}</bdi></p>{% endif %}
{% if not row.counts.seeders %}<p class="bad"><b>Nobody seeds it at the moment.</b></p>
{% endif %}
<dl class="numbers">
  <div><dt>seeders</dt><dd>{{ row.counts.seeders }}</dd></div>
  <div><dt>leechers</dt><dd>{{ row.counts.leechers }}</dd></div>
  <div><dt>completed</dt><dd>{{ row.counts.snatches }}</dd></div>
</dl>
<p class="actions">
<a href="{{ root }}torrent/{{ row.id }}.torrent">Download .torrent</a>
{% set link = row | magnet -%}
{% if link %}<a href="{{ link }}">Magnet link</a>{% endif %}
</p>
<dl class="about">
  <dt>Size</dt><dd>{{ row.torrent.size | size }}
  ({{ "{:,}".format(row.torrent.size) }} bytes)</dd>
  <dt>Pieces of</dt><dd>{{ details.piece_length | size }}</dd>
  {% if row.torrent.v1 %}<dt>Info hash</dt>
  <dd><code>{{ row.torrent.v1.hex() }}</code></dd>{% endif %}
  {% if row.torrent.v2 %}<dt>Info hash v2</dt>
  <dd><code>{{ row.torrent.v2.hex() }}</code></dd>{% endif %}
  <dt>Added</dt><dd>{{ row.torrent.added | date }}</dd>
  {% if details.created %}<dt>Made</dt><dd>{{ details.created | date }}</dd>{% endif %}
  {% if details.creator %}<dt>Made by</dt>
  <dd><bdi>{{ details.creator | visible }}</bdi></dd>{% endif %}
  <dt>Last seen</dt><dd>{% if seen %}{{ seen | date }}{% else %}never{% endif %}</dd>
  {% if row.torrent.is_private %}<dt>Private</dt><dd>Yes: its peers come from this
  tracker only.</dd>{% endif %}
  {% for seed in details.web_seeds %}<dt>Web seed</dt>
  <dd>{{ seed | visible }}</dd>{% endfor %}
</dl>
{% if details.comment %}<h2>Comment</h2>
<p class="comment" dir="auto">
{%- for line in details.comment.splitlines() %}{{ line | visible }}
{% endfor %}</p>{% endif %}
<h2>Files</h2>
<ul class="tree">{% include "tree.html" %}</ul>
{% if hidden %}<p>And {{ "{:,}".format(hidden) }} more:
<a href="{{ root }}torrent/{{ row.id }}.json">all of them as JSON</a>.</p>{% endif %}
{% endblock %}
{% block footer %}<a href="{{ root }}torrent/{{ row.id }}.json">This as JSON</a>
{% endblock %}
""",
    "tree.html": """\
{% macro inside(folder) -%}
{% for each in folder.folders -%}
<li><details><summary><bdi>{{ each.name }}</bdi>
<span class="faint">{{ each.size | size }}</span></summary>
<ul>{{ inside(each) }}</ul></details></li>
{% endfor -%}
{% for name, size in folder.files -%}
<li><bdi>{{ name }}</bdi> <span class="faint">{{ size | size }}</span></li>
{% endfor -%}
{% endmacro -%}
{{ inside(folder) }}""",
    "doctor.html": """\
{% extends "base.html" %}
{% block title %}Doctor{% endblock %}
{% block head %}<meta name="robots" content="noindex">{% endblock %}
{% block main %}
<h1>Doctor</h1>
<ul class="findings">
  {% for finding in findings -%}
  <li class="{{ finding.level }}"><b>{{ finding.level }}</b>: {{ finding.text }}</li>
  {% endfor %}
</ul>
<p><a href="?{{ {"key": key, "through": 1} | urlencode }}">Ask this tracker through its
own front end</a>, as <code>python app.py doctor URL</code> does from anywhere.</p>
{% endblock %}
""",
    "error.html": """\
{% extends "base.html" %}
{% block title %}{{ error.name }}{% endblock %}
{% block main %}
<h1>{{ error.name }}</h1>
<p>{{ error.description }}</p>
{% endblock %}
""",
}

# -- Graph ----------------------------------------------------------------------------

# Both have three times the contrast of black and of white, and differ for all eyes.
_SEEDERS, _LEECHERS = "#2a7ae2", "#c46a00"
_HEIGHT = 200  # units from the bottom of the graph to its top; an hour is one across


def month_graph(samples, now):
    """Return Samples as SVG to stand in a page, or "" if there are not two yet.

    It stretches with the page while its text keeps its size, and needs no style. What
    was not sampled for more than two hours is a gap in the lines.
    """
    if len(samples) < 2:
        return ""
    seeders = [sample.seeders for sample in samples]
    leechers = [sample.leechers for sample in samples]
    half = _rounded(max(*seeders, *leechers))
    title = "Seeders and leechers in the last 31 days"
    text = "; ".join(
        f"{name}: {each[-1]:,} at last, {min(each):,} at least, {max(each):,} at most"
        for name, each in (("Seeders", seeders), ("Leechers", leechers))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" width="100%" height="240"'
        ' aria-labelledby="month-title month-text" font-size="13" fill="currentColor">'
        f'<title id="month-title">{title}</title><desc id="month-text">{text}.</desc>'
        + _legend(seeders[-1], leechers[-1])
        + f'<svg y="40" width="100%" height="176" viewBox="0 0 {MONTH} {_HEIGHT}"'
        ' preserveAspectRatio="none" fill="none" stroke-width="2"'
        ' stroke-linecap="round" stroke-linejoin="round" overflow="visible">'
        + _line(samples, seeders, now, 2 * half, _SEEDERS, area=True)
        + _line(samples, leechers, now, 2 * half, _LEECHERS)
        + "</svg>"
        + "".join(_level(y, n) for y, n in ((40, 2 * half), (128, half), (216, 0)))
        + _days(now)
        + "</svg>"
    )


def _rounded(most):
    """Return a round number that is at least half of ``most``."""
    half = max(1, (most + 1) // 2)
    unit = max(1, 10 ** (len(str(half)) - 1) // 2)
    return -(-half // unit) * unit


def _legend(seeders, leechers):
    return "".join(
        f'<rect x="{x}" y="3" width="12" height="12" rx="2" fill="{colour}"/>'
        f'<text x="{x}" dx="18" y="14">{name} {number:,}</text>'
        for x, colour, name, number in (
            ("0", _SEEDERS, "seeders", seeders),
            ("50%", _LEECHERS, "leechers", leechers),
        )
    )


def _line(samples, numbers, now, top, colour, area=False):
    """Return a line for each time without a gap, with the area below it if asked."""
    runs, last = [], -MONTH
    for each, number in zip(samples, numbers, strict=True):
        hour = MONTH - now // HOUR + each.time // HOUR
        if hour - last > 2:
            runs.append([])
        runs[-1].append((last := hour, _HEIGHT - round(number * _HEIGHT / top)))
    drawn = ""
    for run in runs:
        (x, y), steps = run[0], zip(run, run[1:], strict=False)
        # A sample alone is drawn as an hour. Relative steps take half of the bytes.
        path = " ".join(f"{d - b} {e - c}" for (b, c), (d, e) in steps) or "1 0"
        if area:
            drawn += (
                f'<path d="M{x} {_HEIGHT}V{y}l{path}V{_HEIGHT}Z" fill="{colour}"'
                ' fill-opacity=".2"/>'
            )
        drawn += (
            f'<path d="M{x} {y}l{path}" stroke="{colour}"'
            ' vector-effect="non-scaling-stroke"/>'
        )
    return drawn


def _level(y, number):
    return (
        f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="currentColor"'
        f' stroke-opacity=".25"/><text x="2" y="{y - 4}" stroke="Canvas"'
        f' stroke-width="3" paint-order="stroke">{number:,}</text>'
    )


def _days(now):
    """Return the dates (UTC) of Mondays, where the days begin."""
    day, found = 24 * HOUR, ""
    for midnight in range(now // day * day - 30 * day, now, day):
        at = 100 - (now - midnight) / (MONTH * HOUR) * 100
        if time.gmtime(midnight).tm_wday == 0 and 5 < at < 95:
            date = time.strftime("%-d %b", time.gmtime(midnight))
            found += (
                f'<line x1="{at:.1f}%" x2="{at:.1f}%" y1="216" y2="221"'
                ' stroke="currentColor"/>'
                f'<text x="{at:.1f}%" y="235" text-anchor="middle">{date}</text>'
            )
    return found


# -- Pages ----------------------------------------------------------------------------

import base64  # noqa: E402
import io  # noqa: E402

import click  # noqa: E402  (why so late: see the end of Door)
from flask import (  # noqa: E402
    Blueprint,
    Flask,
    abort,
    current_app,
    render_template,
    request,
    send_file,
)
from flask.logging import default_handler, has_level_handler  # noqa: E402
from jinja2 import DictLoader  # noqa: E402
from markupsafe import Markup  # noqa: E402
from werkzeug.exceptions import HTTPException, ServiceUnavailable  # noqa: E402
from werkzeug.http import http_date  # noqa: E402
from werkzeug.middleware.proxy_fix import ProxyFix  # noqa: E402

PER_PAGE = 100  # torrents
FILES_SHOWN = 2000  # of a torrent, on its page
COLUMNS = (  # the order that a heading asks for first
    ("name", "Name"),
    ("-size", "Size"),
    ("-seeders", "Seeders"),
    ("-leechers", "Leechers"),
    ("-completed", "Completed"),
    ("-added", "Age"),
)
SORTS = (
    ("-added", "newest"),
    ("added", "oldest"),
    ("name", "name"),
    ("-seeders", "most seeders"),
    ("-leechers", "most leechers"),
    ("-completed", "most completed"),
    ("-size", "largest"),
    ("size", "smallest"),
)

pages = Blueprint("pages", __name__)


class Asked(NamedTuple):
    """Which torrents a request asks for."""

    q: str  # words to search for
    category: str
    sort: str
    page: int

    def rows(self, listing):
        """Return all Rows of a Listing that are asked for, in order."""
        return listing.select(self.q, self.category, self.sort)

    def link(self, path, **changes):
        """Return a link to the same, but for ``changes``."""
        usual = Asked("", "", NEWEST, 1)._asdict()
        wanted = {**self._asdict(), **changes}
        query = urlencode({n: v for n, v in wanted.items() if v != usual[n]})
        return f"{_root()}{path}?{query}" if query else f"{_root()}{path}"


def _asked():
    """Return what the request asks for; what makes no sense counts as not said."""
    words, category = request.args.get("q", ""), request.args.get("category", "")
    sort, page = request.args.get("sort", ""), request.args.get("page", "")
    return Asked(
        words[:200].strip(),
        category,
        sort if sort.lstrip("-") in ORDERS and sort[:2] != "--" else NEWEST,
        int(page) if page.isdecimal() and 0 < len(page) < 7 and int(page) else 1,
    )


def _root():
    """Return the path of the front page: hosts mount the tracker where they like."""
    return f"{request.script_root}/"


def _announce_url():
    return f"{request.url_root}announce"


def _now():
    return int(time.time())


@pages.get("/")
def front():
    """The announce URL, how much is going on, and the list of torrents."""
    now, tracker, asked = _now(), current_app.tracker, _asked()
    listing = current_app.listing(now)
    return render_template(
        "front.html",
        now=now,
        notice=tracker.settings.notice,
        announce_url=_announce_url(),
        totals=tracker.totals(now)._asdict(),
        is_open=tracker.access.is_open(),
        unread=len(tracker.access.catalogue.unread),
        listed=len(listing.rows),
        categories=listing.categories,
        graph=Markup(month_graph(tracker.history.samples(now), now)),
        feed=asked.link("feed.xml", sort=NEWEST, page=1),
        sorts=SORTS,
        **_page_of(asked.rows(listing), asked),
    )


def _page_of(rows, asked):
    """Return what the template of the list needs to show one page of ``rows``."""
    last = max(1, -(-len(rows) // PER_PAGE))
    asked = asked._replace(page=min(asked.page, last))
    number, columns = asked.page, []
    for order, text in COLUMNS:
        turned = order[1:] if order.startswith("-") else f"-{order}"
        is_turned, is_sorted = asked.sort == order, asked.sort in (order, turned)
        link = asked.link("", sort=turned if is_turned else order, page=1)
        is_down = asked.sort.startswith("-") != (order == "-added")  # the age goes up
        columns.append({
            "text": text, "link": f"{link}#torrents",
            "sorted": is_sorted and ("descending" if is_down else "ascending"),
            "arrow": (" ▼" if is_down else " ▲") if is_sorted else "",
        })  # fmt: skip
    return {
        "asked": asked,
        "rows": rows[(number - 1) * PER_PAGE : number * PER_PAGE],
        "found": len(rows),
        "last": last,
        "previous": number > 1 and asked.link("", page=number - 1) + "#torrents",
        "next": number < last and asked.link("", page=number + 1) + "#torrents",
        "columns": columns,
    }


@pages.get("/torrent/<info_hash>")
def torrent_page(info_hash):
    """All that is known of a torrent."""
    now, row = _now(), _row_or_404(info_hash)
    details = details_of(_metainfo_or_404(row.torrent))
    # A torrent of one file has no path for it.
    files = [(path or (row.torrent.name,), size) for path, size in details.files]
    store, hashes = current_app.tracker.store, row.torrent.info_hashes()
    return render_template(
        "torrent.html",
        row=row,
        details=details,
        seen=max(store.last_seen(each, now) for each in hashes),
        folder=folder_of(files[:FILES_SHOWN]),
        hidden=max(0, len(files) - FILES_SHOWN),
    )


@pages.get("/torrent/<info_hash>.torrent")
def download(info_hash):
    """The .torrent file, with this tracker put in."""
    row = _row_or_404(info_hash)
    data = with_announce(_metainfo_or_404(row.torrent), _announce_url())
    name = re.sub(r'[/\\:*?"<>|]', "_", row.name)[:120].strip(". ")
    return send_file(
        io.BytesIO(data),
        mimetype="application/x-bittorrent",
        as_attachment=True,
        download_name=f"{name or row.id}.torrent",
        etag=sha1(data).hexdigest(),
        last_modified=row.torrent.added,
    )


def _row_or_404(info_hash):
    """Return the Row that a hash in hex names: v1, v2, or v2 truncated."""
    access, now = current_app.tracker.access, _now()
    access.look(now)
    if re.fullmatch("[0-9a-fA-F]{40}|[0-9a-fA-F]{64}", info_hash):
        found = bytes.fromhex(info_hash)
        torrent = access.catalogue.by_hash.get(found[:20])
        if torrent and found in (torrent.v1, torrent.v2, torrent.v2[:20]):
            if access.deny.hashes.isdisjoint(torrent.info_hashes()):
                hashes = torrent.info_hashes()
                return row_of(torrent, current_app.tracker.scrape(hashes, now))
    abort(404, "No torrent with that hash is on this tracker's list.")


def _metainfo_or_404(torrent):
    try:
        return current_app.tracker.access.catalogue.metainfo(torrent)
    except TorrentError:
        abort(404, "The file of this torrent is being replaced. Try again soon.")


@pages.get("/doctor")
def doctor_page():
    """The doctor's findings of this host and of this request, for the operator."""
    tracker, now = current_app.tracker, time.time()
    key = tracker.settings.operator_key
    if not key or not hmac.compare_digest(
        request.args.get("key", "").encode(), key.encode()
    ):
        abort(404)
    findings = [
        *examine_host(tracker, now),
        *examine_request(request.environ, tracker.settings),
    ]
    if "through" in request.args:
        findings += examine_url(request.url_root, time.time)
    page = render_template("doctor.html", findings=findings, key=key)
    return page, {"Cache-Control": "no-store"}


@pages.app_errorhandler(HTTPException)
def error_page(error):
    """An error of HTTP as a page like the others."""
    if not error.code or error.code < 400:
        return error  # a redirect
    response = error.get_response()
    response.data = render_template("error.html", error=error)
    return response


@pages.app_errorhandler(OSError)
def disk_page(fault):
    """A full or broken disk as a page, and in the log."""
    current_app.wsgi_app.faults.tell(fault, request.path, _now())
    return error_page(ServiceUnavailable(f"{DISK_FAILS[0].upper()}{DISK_FAILS[1:]}."))


_STYLE_HASH = base64.b64encode(sha256(STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:;"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@pages.after_app_request
def guard(response):
    """Have browsers run, load and tell nothing, whatever strangers named a torrent."""
    response.headers.update(_HEADERS)
    return response


@pages.app_context_processor
def _about():
    return {
        "title": current_app.tracker.settings.title,
        "root": _root(),
        "style": Markup(STYLE),
        "icon": ICON,
    }


@pages.app_template_filter("magnet")
def magnet_of(row):
    """Return a Row's magnet link; none for a private torrent, or it would never start.

    libtorrent and others give the metadata of such to nobody.
    """
    return None if row.torrent.is_private else magnet(row.torrent, _announce_url())


@pages.app_template_filter("size")
def size_text(size):
    """Return a number of bytes as people read it."""
    if size < 1024:
        return f"{size} B"
    power = min(5, (size.bit_length() - 1) // 10)
    value = size / 1024**power
    return f"{value:.{0 if value >= 100 else 1}f} {' KMGTP'[power]}iB"


@pages.app_template_filter("span")
def span_text(seconds):
    """Return a time as people read it, in its largest unit."""
    units = (31557600, "year"), (2629800, "month"), (86400, "day"), (3600, "hour")
    for unit, name in (*units, (60, "minute"), (1, "second")):
        if number := max(0, seconds) // unit:
            return f"{number} {name}{'s' * (number > 1)}"
    return "now"


@pages.app_template_filter("date")
def date_text(seconds):
    """Return seconds since 1970 as a date in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


pages.add_app_template_filter(visible)

# -- Feeds ----------------------------------------------------------------------------
# The same for programs: RSS 2.0, which qBittorrent and other clients subscribe to, and
# JSON, which pages of any site may read.

from xml.etree import ElementTree  # noqa: E402

ANYWHERE = {"Access-Control-Allow-Origin": "*"}
IN_FEED = 100  # torrents


@pages.get("/feed.xml")
def feed():
    """The newest torrents of a search, of a category, or of all."""
    asked = _asked()._replace(sort=NEWEST)
    rows = asked.rows(current_app.listing(_now()))[:IN_FEED]
    here, title = request.url_root, current_app.tracker.settings.title
    about = [title, *filter(None, (visible(asked.category), visible(asked.q)))]
    response = current_app.response_class(
        rss(" / ".join(about), here, request.url, rows),
        content_type="application/rss+xml; charset=utf-8",
    )
    return _if_changed(response, rows)


def rss(title, site, url, rows):
    """Return an RSS 2.0 document of Rows; ``site`` and ``url`` are those of the feed.

    An enclosure's length is that of the download, as other trackers have it: clients
    show it as such.
    """
    atom = "http://www.w3.org/2005/Atom"
    ElementTree.register_namespace("atom", atom)
    root = ElementTree.Element("rss", version="2.0")
    channel = ElementTree.SubElement(root, "channel")
    _texts(
        channel, title=title, link=site, description=f"Torrents of {title}", ttl="30"
    )
    itself = {"href": url, "rel": "self", "type": "application/rss+xml"}
    ElementTree.SubElement(channel, f"{{{atom}}}link", itself)
    for row in rows:
        item, page = ElementTree.SubElement(channel, "item"), f"{site}torrent/{row.id}"
        size, number = size_text(row.torrent.size), row.torrent.files
        _texts(item, title=row.name, link=page, description=f"{size}, {number} file(s)")
        _texts(
            item, pubDate=http_date(row.torrent.added), category=row.category or None
        )
        name = ElementTree.SubElement(item, "guid", isPermaLink="false")
        name.text = f"urn:btih:{row.id}"
        enclosed = {"url": f"{page}.torrent", "type": "application/x-bittorrent"}
        enclosed["length"] = str(row.torrent.size)
        ElementTree.SubElement(item, "enclosure", enclosed)
    return ElementTree.tostring(root, "utf-8", xml_declaration=True)


def _texts(element, **texts):
    for name, text in texts.items():
        if text is not None:
            ElementTree.SubElement(element, name).text = text


def _if_changed(response, rows):
    """Answer with 304 if the client knows the same; ``rows`` are what it says."""
    response.last_modified = max((row.torrent.added for row in rows), default=None)
    response.add_etag()
    return response.make_conditional(request)


@pages.get("/torrents.json")
def torrents_json():
    """The torrents of a search, of a category, or all, in any order of the list."""
    asked = _asked()
    rows = asked.rows(current_app.listing(_now()))
    return {"torrents": [_summary(row) for row in rows]}, ANYWHERE


def _summary(row):
    torrent, page = row.torrent, f"{request.url_root}torrent/{row.id}"
    return {
        "name": torrent.name,
        "category": row.category,
        "size": torrent.size,
        "files": torrent.files,
        "info_hash": torrent.v1.hex() or None,
        "info_hash_v2": torrent.v2.hex() or None,
        "added": torrent.added,
        "private": torrent.is_private,
        **row.counts._asdict(),
        "page": page,
        "download": f"{page}.torrent",
        "magnet": magnet_of(row),
    }


@pages.get("/torrent/<info_hash>.json")
def torrent_json(info_hash):
    """All that is known of a torrent, with its files."""
    row = _row_or_404(info_hash)
    details = details_of(_metainfo_or_404(row.torrent))
    hashes, store = row.torrent.info_hashes(), current_app.tracker.store
    return {
        **_summary(row),
        "last_seen": max(store.last_seen(each, _now()) for each in hashes) or None,
        "piece_length": details.piece_length,
        "comment": details.comment,
        "created": details.created or None,
        "created_by": details.creator,
        "web_seeds": details.web_seeds,
        "files": [
            {"path": list(path) or [row.torrent.name], "size": size}
            for path, size in details.files
        ],
    }, ANYWHERE


@pages.get("/stats.json")
def stats():
    """The numbers of the front page."""
    return current_app.tracker.totals(_now())._asdict(), ANYWHERE


@pages.get("/metrics")
def metrics():
    """All that is counted, for Prometheus."""
    tracker, now = current_app.tracker, _now()
    totals, counted = tracker.totals(now), tracker.counters.total(now)
    return metrics_text(totals, tracker.families(now), counted), {
        "Content-Type": "text/plain; version=0.0.4; charset=utf-8",
        "Cache-Control": "no-store",
    }


METRICS = (
    # Snatches are no counter: they go with the swarms that are forgotten.
    ("swarms", "gauge", "Swarms with a peer."),
    ("seeders", "gauge", "Peers that have all of a torrent."),
    ("leechers", "gauge", "All other peers."),
    ("partial_seeds", "gauge", "Leechers that have all they want."),
    ("snatches", "gauge", "Downloads completed in the swarms that are kept."),
    ("peers", "gauge", "Peers by family; one of both is in both."),
    ("announces_total", "counter", "Announces, with those refused."),
    ("scrapes_total", "counter", "Scrapes, with those refused."),
    ("failures_total", "counter", "Announces and scrapes refused, by reason."),
    ("announce_duration_seconds", "histogram", "Time from request to reply."),
)


def metrics_text(totals, families, counted):
    """Return Totals, peers by family (IPv4, IPv6) and Counted as Prometheus reads them.

    That is its text format, version 0.0.4.
    """
    ends = [*(f"{end / 1e9:g}" for end in WITHIN), "+Inf"]
    took = dict(zip(ends, accumulate(counted.took), strict=True))
    announces = took["+Inf"]
    samples = {name: {"": number} for name, number in totals._asdict().items()}
    samples |= {
        "peers": _labelled("family", zip(("ipv4", "ipv6"), families, strict=True)),
        "announces_total": {"": announces},
        "scrapes_total": {"": counted.scrapes},
        "failures_total": _labelled("reason", counted.failures.items()),
        "announce_duration_seconds": {
            **{f"_bucket{end}": n for end, n in _labelled("le", took.items()).items()},
            "_sum": f"{counted.nanoseconds / 1e9:.9f}",
            "_count": announces,
        },
    }
    return "".join(
        f"# HELP bitbreeze_{name} {sentence}\n# TYPE bitbreeze_{name} {kind}\n"
        + "".join(
            f"bitbreeze_{name}{which} {n}\n" for which, n in samples[name].items()
        )
        for name, kind, sentence in METRICS
    )


def _labelled(label, numbers):
    return {f'{{{label}="{value}"}}': number for value, number in numbers}


@pages.get("/health")
def health():
    """Whether peers can be kept here, for load balancers and monitors."""
    answer, status = {"status": "ok"}, 200
    try:
        current_app.tracker.store.probe()
    except OSError as error:
        reason = f"the data folder cannot be written: {error.strerror}"
        answer, status = {"status": "failing", "reason": reason}, 503
    return answer, status, {"Cache-Control": "no-store"}


# -- Application ----------------------------------------------------------------------


class BitBreeze(Flask):
    """The application; announces and scrapes do not get past its door."""

    def __init__(self, settings):
        super().__init__(__name__, static_folder=None)
        self.tracker, self._listing, self._listed = open_tracker(settings), None, None
        pages_app = self.wsgi_app
        if settings.proxies or settings.address_header:
            # Whether clients come by https, only the proxy knows.
            pages_app = ProxyFix(pages_app, x_for=0, x_proto=1)
        self.wsgi_app = Door(self.tracker, pages_app)
        self.jinja_loader = DictLoader(TEMPLATES)
        self.register_blueprint(pages)

    def log_exception(self, exc_info):
        """Log a fault in a page, as often as those at the door."""
        self.wsgi_app.faults.tell(exc_info[1], request.path, _now())

    def listing(self, now):
        """Return the Listing of now; it is made anew when the lists or counts are."""
        access = self.tracker.access
        access.look(now, patience=0.3)
        survey = self.tracker.survey(now)
        listed = access.catalogue.version, access.deny.hashes, survey
        if listed != self._listed:
            self._listing = Listing(access.listed(), survey.listed)
            self._listed = listed
        return self._listing


def create_app(overrides=None):
    """Return the WSGI application; ``overrides`` are settings that win over all."""
    if not has_level_handler(log):
        log.addHandler(default_handler)
    return BitBreeze(load_settings(overrides))


def paste_app(global_config, **local_config):
    """Return the application to PasteDeploy, for gunicorn --paste wsgi.ini."""
    return app


# -- Commands -------------------------------------------------------------------------


@click.command()
@click.option(
    "--host", default="", help="Address to listen on.  [default: all, IPv4 and IPv6]"
)
@click.option("--port", default=6969, show_default=True, help="TCP port to listen on.")
@click.option(
    "--workers",
    default=max(2, min(os.cpu_count() or 2, 8)),
    show_default=True,
    help="Processes that answer, of 8 threads each.",
)
def serve(host, port, workers):
    """Serve with gunicorn until Ctrl-C: what app.py does unless told otherwise."""
    folder = app.tracker.store.folder
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        open(f"{folder}/swarms.count", "ab").close()
    except OSError as error:
        raise click.ClickException(
            f"peers cannot be kept in {folder}: {error.strerror}."
            " Set TRACKER_DATA to another folder."
        ) from None
    try:
        listener = _listen(host, port)
    except OSError as error:
        raise click.ClickException(
            f"cannot listen on port {port}: {error.strerror}."
            " Choose another with --port, or an address with --host."
        ) from None
    click.echo(_greeting(host, port, app.tracker), err=True)
    module = Path(__file__).stem
    os.execv(sys.executable, [
        sys.executable, "-m", "gunicorn", f"{module}:app", "--chdir", str(HERE),
        "--bind", f"fd://{listener.detach()}",
        "--workers", str(workers), "--threads", "8",
        "--limit-request-line", "8190",  # Transmission scrapes in up to 4,300 bytes
        # Ctrl-C reaches the workers twice, and one in ten of gunicorn 27's then hangs.
        "--graceful-timeout", "5",
        "--config", os.path.abspath(__file__),  # for post_worker_init
        "--no-control-socket", "--log-level", "warning",
    ])  # fmt: skip


def _listen(host, port):
    """Return a socket for gunicorn, which cannot bind one for IPv4 and IPv6."""
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        )
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    listener.set_inheritable(True)
    return listener


def post_worker_init(worker):
    """Have a worker wait for no client; gunicorn -c app.py calls this.

    Its threads would wait for the rest of half a request: a few slow clients, and it
    serves nobody else.
    """
    kinds = ("SyncWorker", "ThreadWorker")
    is_known = type(worker).__name__ in kinds and hasattr(worker, "wait_fds")
    if is_known and not worker.cfg.is_ssl:
        worker.cfg.set("keepalive", 0)  # or it waits for a next request, and for bodies
        worker.sockets = [
            each if each.family == socket.AF_UNIX else Vestibule(each)
            for each in worker.sockets
        ]
        worker.wait_fds[:-1] = worker.sockets


HEAD_AT_MOST = 32768  # bytes of a request up to its body
WAITING_AT_MOST = 256  # clients that a worker waits for


class Guest(socket.socket):
    """A client's connection, as the vestibule hands it to gunicorn."""

    def shutdown(self, how):
        """Raise OSError, or gunicorn waits two seconds for the client to hang up."""
        super().shutdown(how)
        raise OSError(errno.ENOTCONN, "nobody waits for the client's end")


class Vestibule:
    """A listening socket for gunicorn, from which come requests and no mere clients.

    Clients stay in here until the head of a request is there. When they are too many,
    the one that has waited longest has to go: an honest one takes but a moment.
    """

    def __init__(self, listener):
        """Accept from ``listener``, one of gunicorn's sockets."""
        self.listener = listener
        self.waiting = {}  # (address, bytes seen) by socket, the oldest first
        self.events = selectors.DefaultSelector()
        self.events.register(listener, selectors.EVENT_READ)
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # Linux: most come with their request
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
            # And all of an answer leaves in one packet: gunicorn writes head and body
            # one by one, and then hangs up.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)

    def __getattr__(self, name):
        return getattr(self.listener, name)

    def fileno(self):
        """Return what is readable when there is something to do in here."""
        return self.events.fileno()

    def accept(self):
        """Return (socket, address) of a client whose request can be read."""
        ready = [self.listener]
        if self.waiting:
            ready = [key.fileobj for key, _ in self.events.select(0)]
        for client in ready:
            seen = 0
            if client is self.listener:
                client, address = self._next()
            elif client in self.waiting:
                address, seen = self.waiting[client]
            else:
                continue  # it had to go a moment ago
            data = _peek(client)
            if data is None:
                self._keep(client, address, 0)
            elif b"\r\n\r\n" in data or len(data) <= seen:  # or it has hung up
                self._release(client)
                return client, address
            elif len(data) == HEAD_AT_MOST:
                self._refuse(client, b"HTTP/1.1 431 Too Long\r\n\r\n")
            else:
                self._keep(client, address, len(data))
        raise BlockingIOError(errno.EAGAIN, "no request is here yet")

    def close(self):
        """Close the listening socket, and the connections of all who wait."""
        for client in list(self.waiting):
            self._refuse(client)
        self.events.close()
        self.listener.close()

    def _next(self):
        client, address = self.listener.accept()
        client = Guest(client.family, client.type, client.proto, client.detach())
        client.setblocking(False)
        return client, address

    def _keep(self, client, address, seen):
        """Wait for more than was seen of a request."""
        if client not in self.waiting:
            if len(self.waiting) >= WAITING_AT_MOST:
                self._refuse(next(iter(self.waiting)))
            self.events.register(client, selectors.EVENT_READ)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)
        self.waiting[client] = address, seen

    def _release(self, client):
        if self.waiting.pop(client, None):
            self.events.unregister(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _refuse(self, client, answer=b""):
        self._release(client)
        with suppress(OSError):
            client.send(answer)
        client.close()


def _peek(client):
    """Return what a client has said, b"" if it has hung up, or None."""
    try:
        return client.recv(HEAD_AT_MOST, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _greeting(host, port, tracker):
    """Return what the operator reads at the start."""
    access = tracker.access
    wrong = sum(access.take_in(int(time.time()) + 60, 0.5), [])  # as in a minute
    tracked, skipped = access.in_words(), len(access.catalogue.skipped)
    tracked += f"; {skipped} files are skipped" if skipped else ""
    tracked += "; the lists have faults" if wrong else ""
    tracked += ": see app.py doctor" if skipped or wrong else ""
    return f"""\
BitBreeze serves this tracker until Ctrl-C:
  announce URL  http://{_own_name(host)}:{port}/announce
  front page    http://{_own_name(host)}:{port}/
  peers are in  {tracker.store.folder}
  tracked are   {tracked}"""


def _own_name(host):
    """Return an address of this machine to put into a URL."""
    if host:
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # sends nothing: it only asks for the way out
            return probe.getsockname()[0]
        except OSError:
            return "localhost"


@click.command()
@click.argument("url", required=False)
def doctor(url):
    """Say what is wrong with this host, or with the tracker at URL, and what to set.

    The exit code is 1 if anything is.
    """
    if url:
        findings = examine_url(url, time.time)
    else:
        findings = examine_host(app.tracker, time.time())
    failures = 0
    for finding in findings:
        click.echo(f"{finding.level:8} {finding.text}")
        failures += finding.level == FAILURE
    if not url:
        click.echo(
            "\nThat was the host. The way through its web server is examined from"
            " outside, by\n  app.py doctor URL"
        )
    sys.exit(bool(failures))


@click.command()
@click.argument("path", metavar="[FILE]", default="-")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def export(path, force):
    """Write all peers, snatches and the history to FILE, as JSON for import.

    Without FILE they go to the output. The tracker may be serving.
    """
    tracker, now = app.tracker, int(time.time())
    _check_user(tracker.store.folder)
    if not os.path.isdir(tracker.store.folder):
        raise click.ClickException(
            f"there is no {tracker.store.folder}: set data as the server has it"
        )
    swarms = _with_progress(tracker.store.records(now), "swarms are written")
    samples = tracker.history.samples(now)
    try:
        with _new_file(path, force) as file:
            number, peers = write_archive(file, swarms, samples, now)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # whoever read it has seen enough
        raise click.ClickException(f"nothing is exported: {_reason(error)}") from None
    words = f"{number} swarms with {peers} peers"
    words += f" and {len(samples)} hours of history" if samples else ""
    click.echo(f"Exported are {words}.", err=True)
    if tracker.store.newer:
        raise click.ClickException(
            "swarms that a newer BitBreeze wrote are not among them: export with that"
        )


@click.command("import")
@click.argument("path", metavar="FILE")
def import_(path):
    """Merge into this tracker what export wrote to FILE, or to the input for "-".

    All of FILE is read before anything is merged. The tracker may be serving. To do it
    twice is the same as once.
    """
    merging = Merging(app.tracker)
    _check_user(app.tracker.store.folder)
    try:
        with _rewindable(path) as file:
            for _ in _with_progress(read_archive(file), "lines are read"):
                pass
            file.seek(0)
            _merge_all(merging, read_archive(file))
    except OSError as error:
        raise click.ClickException(f"nothing is merged: {_reason(error)}") from None
    except ArchiveError as error:
        raise click.ClickException(f"nothing is merged, {path}: {error}") from None
    click.echo(f"Merged are {merging.in_words()}.", err=True)


def _merge_all(merging, archived):
    """Merge what read_archive yields; raise ClickException that says how far it got."""
    try:
        for each in _with_progress(archived, "lines are merged"):
            merging.merge(each, int(time.time()))
    except (OSError, ArchiveError, KeyboardInterrupt) as error:
        why = _reason(error) if isinstance(error, OSError) else str(error) or "Ctrl-C"
        raise click.ClickException(
            f"stopped by {why}. Merged are {merging.in_words()}. Import it again for"
            " the rest"
        ) from None


def _check_user(folder):
    """Raise ClickException for root, if its files would not be the server's."""
    with suppress(FileNotFoundError):
        owner = os.stat(folder).st_uid
        if os.geteuid() == 0 != owner:
            raise click.ClickException(
                f"the server could not use what root writes to {folder}: run this as"
                f" its owner, with sudo -u '#{owner}'"
            )


@contextmanager
def _new_file(path, force):
    """Open a text file that is at ``path`` when it is whole; "-" is the output."""
    if path == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    if os.path.lexists(path) and not force:
        raise click.ClickException(f"{path} is there already: see --force")
    new = f"{path}.{os.getpid()}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.replace(new, path)
    finally:
        with suppress(OSError):
            os.unlink(new)


@contextmanager
def _rewindable(path):
    """Open a binary file that can be read twice; "-" is the input."""
    from shutil import copyfileobj  # which nobody else needs
    from tempfile import TemporaryFile

    with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
        if file.seekable():
            yield file
            return
        with TemporaryFile() as copy:
            copyfileobj(file, copy)
            copy.seek(0)
            yield copy


def _with_progress(items, what):
    """Yield items; on a terminal, say twice a second how many there were."""
    if not sys.stderr.isatty():
        yield from items
        return
    said = time.monotonic()
    try:
        for number, item in enumerate(items, 1):
            yield item
            if time.monotonic() - said > 0.5:
                said = time.monotonic()
                click.echo(f"\r{number} {what}", nl=False, err=True)
    finally:
        click.echo("\r\033[K", nl=False, err=True)


def _reason(error):
    """Return what an OSError is about, in a few words."""
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def main(arguments):
    """Run a command of app.py; without the name of one, ``serve``."""
    if not arguments or arguments[0] not in (*app.cli.commands, "--help"):
        arguments = ["serve", *arguments]
    app.cli.main(arguments, prog_name="app.py")


try:
    app = application = create_app()  # each host wants one of the two names
except SettingsError as error:
    if __name__ == "__main__":
        sys.exit(f"app.py: {error}")
    raise
app.cli.add_command(serve)
app.cli.add_command(doctor)
app.cli.add_command(export)
app.cli.add_command(import_)
# To look for garbage among what is here for good writes to it, and so each worker that
# a server forks from here would soon have a copy of its own.
gc.freeze()

if is_cgi:
    answer_cgi(app)
elif __name__ == "__main__":
    main(sys.argv[1:])
