"""Torrent files: what they say, what is refused, and what is made of them."""

import random
import re
from contextlib import suppress

import bencoder
import libtorrent
import pytest
from conftest import NOW, mutated
from hypothesis import given
from hypothesis import strategies as st
from makers import by_libtorrent, empty_names

import app as bitbreeze

FLAGS = {
    "v1": libtorrent.create_torrent.v1_only,
    "v2": libtorrent.create_torrent.v2_only,
    "hybrid": 0,
}


def info_of(name, **changes):
    """Return a small v1 info dictionary."""
    known = {b"length": 5, b"name": name, b"piece length": 16384, b"pieces": b"p" * 20}
    known |= {key.encode(): value for key, value in changes.items()}
    return {key: value for key, value in known.items() if value is not None}


def torrent_of(name, **changes):
    """Return the bytes of a small .torrent file."""
    return bencoder.bencode({b"info": info_of(name.encode(), **changes)})


@pytest.mark.parametrize("kind", FLAGS)
def test_hashes_and_files_are_those_of_libtorrent(tmp_path, kind):
    folder = tmp_path / "päyload"
    (folder / "inner").mkdir(parents=True)
    for number, path in enumerate(("a", "inner/b", "inner/ü")):
        (folder / path).write_bytes(b"x" * 20000 * (number + 1))
    made = libtorrent.create_torrent(
        libtorrent.list_files(str(folder)), 16384, FLAGS[kind]
    )
    libtorrent.set_piece_hashes(made, str(tmp_path))
    data = bencoder.bencode(made.generate())
    hashes = libtorrent.torrent_info(made.generate()).info_hashes()
    metainfo = bitbreeze.read_metainfo(data)
    torrent = bitbreeze.parse_torrent(metainfo, "x.torrent", NOW)
    assert (torrent.name, torrent.size, torrent.files) == ("päyload", 120000, 3)
    assert torrent.v1 == (hashes.v1.to_bytes() if kind != "v2" else b"")
    assert torrent.v2 == (hashes.v2.to_bytes() if kind != "v1" else b"")
    assert [len(i) for i in torrent.info_hashes()] == [20] * (1 + (kind == "hybrid"))
    assert dict(bitbreeze.files_of(metainfo[b"info"])) == {
        ("a",): 20000,
        ("inner", "b"): 40000,
        ("inner", "ü"): 60000,
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not bencoded"),
        (b"<html>", "not bencoded"),
        (b"i5e", "no dictionary called info"),
        (b"d4:infoi5ee", "no dictionary called info"),
        (b"l" * 50000 + b"e" * 50000, "nested more than 100 deep"),
        (b"d1:ad" * 200, "nested more than 100 deep"),
        (b"l" + b"i0e" * 1_200_000 + b"e", "more than 1048576 parts"),
        (b"x" * (bitbreeze.MAX_TORRENT_BYTES + 1), "more than 10485760 bytes"),
        (torrent_of("x")[:-1], "not bencoded"),
        (torrent_of("x") + b"\n", "not bencoded"),
        (b"d4:infod4:name1:x1:ai1eee", "not canonical"),
        (torrent_of("x").replace(b"i5e", b"i05e"), ""),
        (torrent_of(""), "no name"),
        (torrent_of("x", length=-1), "length is missing"),
        (torrent_of("x", length=None), "lists no files"),
        (torrent_of("x", pieces=b"p" * 19), "no pieces of v1"),
        (torrent_of("x", length=None, files=[{b"length": 1}]), "has no path"),
        (torrent_of("x", length=None, files=[5]), "has no path"),
        (torrent_of("x", length=None, files=[b"x"]), "has no path"),
        (torrent_of("x", **{"file tree": {b"f": 5}}), "file tree is broken"),
        (torrent_of("x", **{"piece length": 0}), "piece length is missing"),
    ],
)
def test_what_is_no_torrent_has_a_reason(data, reason):
    with pytest.raises(bitbreeze.TorrentError) as refusal:
        bitbreeze.parse_torrent(bitbreeze.read_metainfo(data), "x", NOW)
    assert reason in str(refusal.value)


BENCODABLE = st.recursive(
    st.integers(-9, 2**70) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*info_of(b"x"), b"files", b"path"]), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*info_of(b"x"), b"files", b""]), BENCODABLE))
def test_any_info_is_described_or_refused(info):
    data = bencoder.bencode({b"info": {**info_of(b"x"), **info}})
    try:
        torrent = bitbreeze.parse_torrent(bitbreeze.read_metainfo(data), "x", NOW)
        assert torrent.size >= 0
    except bitbreeze.TorrentError as error:
        assert str(error)


def every_torrent(folder):
    """Return the bytes of small torrents of every kind, with all that may be in one."""
    payload = empty_names(folder)
    for kind in FLAGS:
        for is_dressed in (False, True):
            path = by_libtorrent(folder, payload, kind=kind, is_dressed=is_dressed)
            yield path.read_bytes()


def grafted(rnd, value, parts):
    """Return a bencodable value with one part replaced by one from elsewhere."""
    if rnd.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return rnd.choice([*parts, 0, -1, 2**63, b"", b"\xff", [], {}, [[]], {b"": {}}])
    key = rnd.choice([*value] if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    copy[key] = grafted(rnd, value[key], parts)
    return copy


def parts_of(value):
    yield value
    inner = value.values() if isinstance(value, dict) else value
    for each in inner if isinstance(value, (dict, list)) else ():
        yield from parts_of(each)


def test_any_accident_to_a_torrent_leaves_it_read_or_refused(tmp_path, cases):
    rnd, whole = random, [*every_torrent(tmp_path)]
    parts = [part for data in whole for part in parts_of(bencoder.bdecode(data))]
    for _ in range(cases(8000)):
        data = rnd.choice(whole)
        if rnd.random() < 0.5:
            data = mutated(rnd, data)
        else:
            data = bencoder.bencode(grafted(rnd, bencoder.bdecode(data), parts))
        with suppress(bitbreeze.TorrentError):
            check_torrent(data)
    for data in whole:
        check_torrent(data)


def check_torrent(data):
    """Fail unless all that is shown of a torrent makes sense."""
    metainfo = bitbreeze.read_metainfo(data)
    torrent = bitbreeze.parse_torrent(metainfo, "x.torrent", NOW)
    details = bitbreeze.parse_details(metainfo, torrent)
    assert torrent.size == sum(file["size"] for file in details["files"]) >= 0
    assert {len(i) for i in torrent.info_hashes()} == {20}
    assert torrent.name.encode() and 0 <= (details["created"] or 0) < 2**33
    link = bitbreeze.magnet(torrent, OURS.decode())
    assert link.isascii() and not re.search(r'[\s<>"]', link)
    made = bitbreeze.read_metainfo(bitbreeze.with_announce(metainfo, OURS.decode()))
    assert (made[b"info"], made[b"announce"]) == (metainfo[b"info"], OURS)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with pytest.raises(bitbreeze.TorrentError):
        bitbreeze.read_metainfo(data)


def test_details_are_those_of_the_file():
    metainfo = {
        b"info": info_of(b"a"),
        b"comment": "häh".encode(),
        b"created by": b"mktorrent 1.1",
        b"creation date": NOW,
        b"url-list": b"http://mirror.example.org/",
    }
    assert parse_details(metainfo) == {
        "piece_length": 16384,
        "comment": "häh",
        "created": NOW,
        "created_by": "mktorrent 1.1",
        "web_seeds": ["http://mirror.example.org/"],
        "files": [{"path": ("a",), "size": 5}],
    }


def parse_details(metainfo):
    torrent = bitbreeze.parse_torrent(metainfo, "x.torrent", NOW)
    return bitbreeze.parse_details(metainfo, torrent)


@pytest.mark.parametrize("wrong", [-1, 2**80, b"", b"\xff", [], [5, [b"x"]], {}])
def test_details_of_the_wrong_type_are_absent(wrong):
    keys = (b"comment", b"created by", b"creation date", b"url-list")
    details = parse_details({b"info": info_of(b"a"), **dict.fromkeys(keys, wrong)})
    text = "\ufffd" if wrong == b"\xff" else ""
    assert details["created"] is None
    assert details["comment"] == details["created_by"] == text
    assert details["web_seeds"] == [text] * bool(text)


OURS, THEIRS = b"http://ours.test/announce", b"http://theirs.test/announce"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({b"announce": OURS}, None),
        ({b"announce": THEIRS}, [[OURS], [THEIRS]]),
        ({b"announce": THEIRS, b"announce-list": [[OURS]]}, None),
        ({b"announce-list": [[OURS, THEIRS], [b"x", 5]]}, [[OURS], [THEIRS], [b"x"]]),
        ({b"announce-list": [THEIRS, {}, 5, []], b"announce": 5}, None),
        ({b"announce-list": 5}, None),
        ({b"announce": [THEIRS]}, None),
    ],
)
def test_our_announce_url_comes_first(before, after):
    """In the file as it is, and in a private one, which names nobody else (BEP 27)."""
    for private in (None, 0, 1):
        info = info_of(b"a", private=private)
        metainfo = {**before, b"info": info, b"url-list": [b"kept"]}
        made = bencoder.bdecode(bitbreeze.with_announce(metainfo, OURS.decode()))
        assert made.pop(b"announce") == OURS
        assert made.pop(b"announce-list", None) == (None if private else after)
        assert made == {b"info": info, b"url-list": [b"kept"]}


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("name", ["a&b=c d+e#", "ü%41", '"><script>'])
def test_magnet_links_are_those_that_libtorrent_reads(kind, name):
    hashes = {"v1": (b"1" * 20, b""), "v2": (b"", b"2" * 32)}.get(kind)
    v1, v2 = hashes or (b"1" * 20, b"2" * 32)
    torrent = bitbreeze.Torrent("", name, 12345, 1, v1, v2, NOW, False)
    link = bitbreeze.magnet(torrent, "http://[::1]:6969/x/announce")
    read = libtorrent.parse_magnet_uri(link)
    assert (read.name, read.trackers) == (name, ["http://[::1]:6969/x/announce"])
    assert read.info_hashes.v1.to_bytes() == (v1 or bytes(20))
    assert read.info_hashes.v2.to_bytes() == (v2 or bytes(32))
    assert "&xl=12345&" in link and not re.search(r'[\s<>"]', link)
