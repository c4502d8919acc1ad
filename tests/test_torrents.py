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


def info_of(name, /, **changes):
    """Return a small v1 info dictionary."""
    known = {b"length": 5, b"name": name, b"piece length": 16384, b"pieces": b"p" * 20}
    known |= {key.encode(): value for key, value in changes.items()}
    return {key: value for key, value in known.items() if value is not None}


def download_of(metainfo):
    """Return a .torrent file with OURS in it, from a tracker without keys."""
    return bitbreeze.with_announce(metainfo, [OURS.decode()], lambda url: False)


def torrent_of(name, /, **changes):
    """Return the bytes of a small .torrent file."""
    return bencoder.bencode({b"info": info_of(name.encode(), **changes)})


TREE = {b"f": {b"": {b"length": 5, b"pieces root": b"r" * 32}}}


def v2_of(tree, **changes):
    """Return the bytes of a small v2 torrent file."""
    known = {"length": None, "pieces": None, "meta version": 2, "file tree": tree}
    return torrent_of("x", **{**known, **changes})


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
    assert torrent.v1 == (str(hashes.v1) if kind != "v2" else "")
    assert torrent.v2 == (str(hashes.v2) if kind != "v1" else "")
    assert [len(i) for i in torrent.info_hashes()] == [20] * (1 + (kind == "hybrid"))
    assert dict(bitbreeze.files_of(metainfo.info)) == {
        ("a",): 20000,
        ("inner", "b"): 40000,
        ("inner", "ü"): 60000,
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not bencoded"),
        (b"<html>", "not bencoded"),
        (b"i5e", "not bencoded"),
        (b"l" * 50000 + b"e" * 50000, "not bencoded"),
        (b"d4:infoi5ee", "no dictionary called info"),
        (b"d1:a" + b"l" * 50000 + b"e" * 50001, "nested more than 100 deep"),
        (b"d1:ad" * 200, "nested more than 100 deep"),
        (b"d1:al" + b"i0e" * 1_200_000 + b"ee", "more than 524288 parts"),
        (b"x" * (bitbreeze.MAX_TORRENT_BYTES + 1), "more than 10485760 bytes"),
        (torrent_of("x")[:-1], "not bencoded"),
        (b"di5ei6ee", "not bencoded"),
        (b"d4:infoe", "not bencoded"),
        (torrent_of(""), "no name"),
        (torrent_of("x", length=-1), "length is missing"),
        (torrent_of("x", length=None), "length is missing"),
        (torrent_of("x", length=0, pieces=b""), "have no bytes"),
        (torrent_of("x", pieces=b"p" * 19), "its pieces do not fit"),
        (torrent_of("x", length=16385), "its pieces do not fit"),
        (torrent_of("x", length=None, files=[{b"length": 1}]), "has no path"),
        (torrent_of("x", length=None, files=[5]), "is no dictionary"),
        (torrent_of("x", length=None, files=[]), "its pieces do not fit"),
        (torrent_of("x", **{"file tree": {}}), "does not fit its file tree"),
        (torrent_of("x", **{"piece length": 0}), "piece length is missing"),
        (v2_of({b"f": 5}), "file tree is broken"),
        (v2_of({b"f": {b"": {b"length": 5}}}), "no pieces root"),
        (v2_of(TREE, **{"piece length": 20000}), "no power of two"),
        (v2_of(TREE, length=5, pieces=b"p" * 20), "lists of files differ"),
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
    details = bitbreeze.parse_details(metainfo)
    assert torrent.size == sum(file["size"] for file in details["files"]) >= 0
    assert {len(i) for i in torrent.info_hashes()} == {20}
    assert torrent.name.encode() and 0 <= (details["created"] or 0) < 2**33
    link = bitbreeze.magnet(torrent, [OURS.decode()])
    assert link.isascii() and not re.search(r'[\s<>"]', link)
    made = bitbreeze.read_metainfo(download_of(metainfo))
    assert (made.info_bytes, made.outer[b"announce"]) == (metainfo.info_bytes, OURS)


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
    assert bitbreeze.parse_details(metainfo_of(metainfo)) == {
        "piece_length": 16384,
        "comment": "häh",
        "created": NOW,
        "created_by": "mktorrent 1.1",
        "web_seeds": ["http://mirror.example.org/"],
        "files": [{"path": ("a",), "size": 5}],
    }


def metainfo_of(outer):
    return bitbreeze.read_metainfo(bencoder.bencode(outer))


@pytest.mark.parametrize("wrong", [-1, 2**64, b"", b"\xff", [], [5, [b"x"]], {}])
def test_details_of_the_wrong_type_are_absent(wrong):
    keys = (b"comment", b"created by", b"creation date", b"url-list")
    outer = {b"info": info_of(b"a"), **dict.fromkeys(keys, wrong)}
    details = bitbreeze.parse_details(metainfo_of(outer))
    text = "\ufffd" if wrong == b"\xff" else ""
    assert details["created"] is None
    assert details["comment"] == details["created_by"] == text
    assert details["web_seeds"] == [text] * bool(text)


OURS, THEIRS = b"http://ours.test/announce", b"http://theirs.test/announce"


# What real files contain. Each kind is listed if libtorrent loads it, and only then.


def file_of(size, *path, **more):
    """Return a file of a v1 list; without a size if that is None."""
    file = {b"length": size, b"path": [each.encode() for each in path], **more}
    file = {k.encode() if isinstance(k, str) else k: v for k, v in file.items()}
    return {key: value for key, value in file.items() if value is not None}


def files_with(*files, pieces=1, **more):
    """Return a v1 torrent of several files."""
    known = {"length": None, "files": [*files], "pieces": b"p" * 20 * pieces}
    return torrent_of("x", **{**known, **more})


def leaf(size, root=b"r" * 32, **more):
    """Return a file of a v2 tree."""
    file = {b"length": size, b"pieces root": root}
    file |= {key.encode(): value for key, value in more.items()}
    return {b"": {key: value for key, value in file.items() if value is not None}}


def hybrid_of(*files, pieces=2):
    tree = {b"a": leaf(5), b"b": leaf(6)}
    return v2_of(tree, files=[*files], pieces=b"p" * 20 * pieces)


def raw(info):
    """Return a torrent file whose info dictionary has these bytes."""
    return b"d8:announce3:a/b4:info" + info + b"e"


A, B, LINK = file_of(5, "a"), file_of(6, "b"), {"attr": b"l"}
PAD = file_of(16379, ".pad", "16379", attr=b"p")
END = b"12:piece lengthi16384e6:pieces20:" + b"A" * 20
BITCOMET = "_____padding_file_0_if you see this file, please update to BitComet 0.85"
KINDS = {
    # Bencoding
    "plain": torrent_of("x"),
    "unsorted info": raw(b"d4:name1:a6:lengthi5e" + END + b"e"),
    "unsorted outside": b"d4:infod6:lengthi5e4:name1:a" + END + b"e8:announce3:a/be",
    "a key twice": raw(b"d6:lengthi5e6:lengthi7e4:name1:a4:name1:b" + END + b"e"),
    "info twice": raw(b"d6:lengthi5e4:name1:a" + END + b"e4:infod4:name1:be"),
    "a newline behind": torrent_of("x") + b"\n",
    "much behind": torrent_of("x") + b"\0" * 70_000,
    "a newline before": b"\n" + torrent_of("x"),
    "zeros before a number": raw(b"d6:lengthi0005e4:name1:a" + END + b"e"),
    "zeros before a length": raw(b"d6:lengthi5e04:name01:a" + END + b"e"),
    "minus zero": raw(b"d6:lengthi5e4:name1:a" + END + b"1:xi-0ee"),
    "plus": raw(b"d6:lengthi+5e4:name1:a" + END + b"e"),
    "a space in a number": raw(b"d6:lengthi 5e4:name1:a" + END + b"e"),
    "no digits": raw(b"d6:lengthi5e4:name1:a" + END + b"1:xiee"),
    "30 digits": raw(b"d6:lengthi5e4:name1:a" + END + b"1:xi" + b"9" * 30 + b"ee"),
    "cut": torrent_of("x")[:-1],
    "a list": b"l" + torrent_of("x") + b"e",
    "no info": b"d8:announce3:a/be",
    # Names and optional fields
    "no name": torrent_of("x", name=None),
    "empty name": torrent_of(""),
    "dots": torrent_of(".."),
    "name is a number": torrent_of("x", name=5),
    "name in other bytes": torrent_of("x", name=b"\xff\xfe"),
    "name.utf-8": torrent_of("x", **{"name.utf-8": b"y"}),
    "name.utf-8 only": torrent_of("x", name=None, **{"name.utf-8": b"y"}),
    "name.utf-8 is a number": torrent_of("x", **{"name.utf-8": 5}),
    "private 2": torrent_of("x", private=2),
    "private -1": torrent_of("x", private=-1),
    "private 0": torrent_of("x", private=0),
    "private is text": torrent_of("x", private=b"1"),
    "comment is a number": bencoder.bencode({b"comment": 5, b"info": info_of(b"x")}),
    "announce is a number": bencoder.bencode({b"announce": 5, b"info": info_of(b"x")}),
    # Sizes and pieces
    "length is text": torrent_of("x", length=b"5"),
    "negative": torrent_of("x", length=-1),
    "no bytes": torrent_of("x", length=0, pieces=b""),
    "too few pieces": torrent_of("x", length=16385),
    "too many pieces": torrent_of("x", pieces=b"p" * 40),
    "pieces of 19 bytes": torrent_of("x", pieces=b"p" * 19),
    "pieces are a number": torrent_of("x", pieces=5),
    "pieces of 1 byte": torrent_of("x", pieces=b"p" * 100, **{"piece length": 1}),
    "odd pieces": torrent_of("x", **{"piece length": 1000}),
    "no piece length": torrent_of("x", **{"piece length": 0}),
    "largest pieces": torrent_of("x", **{"piece length": 2**29 - 2**14}),
    # Files of v1
    "files": files_with(A, B),
    "files and length": files_with(A, B, length=7),
    "files is a number": torrent_of("x", files=5),
    "no files": files_with(),
    "files of no bytes": files_with(file_of(0, "a"), pieces=0),
    "no path": files_with({b"length": 5}),
    "empty path": files_with(file_of(5)),
    "path is text": files_with({b"length": 5, b"path": b"a"}),
    "path of numbers": files_with({b"length": 5, b"path": [5]}),
    "path of dots": files_with(file_of(5, "..", "..", "a")),
    "path.utf-8": files_with(file_of(5, "a", **{"path.utf-8": [b"u"]})),
    "path.utf-8 is text": files_with(file_of(5, "a", **{"path.utf-8": b"u"})),
    "the same path twice": files_with(A, A),
    "no length": files_with(file_of(None, "a"), B),
    "link": files_with(file_of(7, "l", **LINK), B),
    "link without a length": files_with(file_of(None, "l", **LINK), B),
    "nothing but a link": files_with(file_of(7, "l", **LINK)),
    "padding": files_with(A, PAD, B, pieces=2),
    "padding without a path": files_with(
        A, {b"attr": b"p", b"length": 16379}, B, pieces=2
    ),
    "padding that can be run": files_with(
        A, file_of(16379, "x", attr=b"xp"), B, pieces=2
    ),
    "BitComet's padding": files_with(A, file_of(16379, BITCOMET), B, pieces=2),
    "BitComet's padding below": files_with(
        A, file_of(16379, "d", BITCOMET), B, pieces=2
    ),
    "attr is a number": files_with(A, file_of(16379, "x", attr=5), B, pieces=2),
    # v2, and both
    "v2": v2_of(TREE),
    "v2, folders": v2_of({b"d": {b"f": leaf(5)}, b"e": leaf(7)}),
    "v2, no root": v2_of({b"f": leaf(5, None)}),
    "v2, short root": v2_of({b"f": leaf(5, b"r" * 31)}),
    "v2, root of zeros": v2_of({b"f": leaf(5, bytes(32))}),
    "v2, a file of no bytes": v2_of({b"e": leaf(0, None), b"f": leaf(5)}),
    "v2, nothing but no bytes": v2_of({b"e": leaf(0, None)}),
    "v2, odd pieces": v2_of(TREE, **{"piece length": 20000}),
    "v2, small pieces": v2_of(TREE, **{"piece length": 8192}),
    "v2, link": v2_of({b"f": leaf(5), b"l": {b"": {b"attr": b"l"}}}),
    "v2, empty tree": v2_of({}),
    "v2, no tree": v2_of(None, length=5, pieces=b"p" * 20),
    "v2, number in the tree": v2_of({b"f": 5}),
    "v2, file and folder": v2_of({b"f": {**leaf(5), b"g": leaf(5)}}),
    "v2, empty folder": v2_of({b"f": leaf(5), b"g": {}}),
    "v2, root is a file": v2_of(leaf(5)),
    "v2, length but no pieces": v2_of({b"x": leaf(5)}, length=5),
    "v2, pieces but no list": v2_of(TREE, pieces=b"p" * 20),
    "meta version 1": torrent_of("x", **{"meta version": 1}),
    "tree without version 2": torrent_of("x", **{"file tree": TREE}),
    "hybrid of one file": v2_of({b"x": leaf(5)}, length=5, pieces=b"p" * 20),
    "hybrid, other name": v2_of({b"y": leaf(5)}, length=5, pieces=b"p" * 20),
    "hybrid, other length": v2_of({b"x": leaf(5)}, length=6, pieces=b"p" * 20),
    "hybrid": hybrid_of(A, PAD, B),
    "hybrid, other path": hybrid_of(A, PAD, file_of(6, "c")),
    "hybrid, other order": hybrid_of(B, file_of(16378, "p", attr=b"p"), A),
    "hybrid, one file too few": hybrid_of(A, pieces=1),
    "hybrid, too many pieces": hybrid_of(A, PAD, B, pieces=3),
}


def loaded(data):
    """Return what libtorrent makes of a torrent file, None if it refuses it."""
    try:
        info = libtorrent.load_torrent_buffer(data).ti
    except RuntimeError:
        return None
    files, hashes = info.files(), info.info_hashes()
    padding = libtorrent.file_storage.flag_pad_file
    sizes = [
        files.file_size(number)
        for number in range(files.num_files())
        if not files.file_flags(number) & padding
    ]
    v1 = str(hashes.v1) if hashes.has_v1() else ""
    v2 = str(hashes.v2) if hashes.has_v2() else ""
    return sum(sizes), len(sizes), v1, v2, info.priv()


def listed(data):
    """Return what BitBreeze makes of it, None if it is skipped."""
    try:
        _, _, *found, _, is_private = bitbreeze.parse_torrent(
            bitbreeze.read_metainfo(data), "x.torrent", NOW
        )
        return *found, is_private
    except bitbreeze.TorrentError:
        return None


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_torrents_are_listed_as_libtorrent_loads_them(data):
    assert listed(data) == loaded(data)
    if loaded(data):
        metainfo = bitbreeze.read_metainfo(data)
        download = download_of(metainfo)
        assert loaded(download) == loaded(data)
        assert libtorrent.load_torrent_buffer(download).trackers[0] == OURS.decode()


def test_the_kinds_are_of_both_sorts():
    """So that a table that refuses or accepts everything is noticed."""
    accepted = sum(listed(data) is not None for data in KINDS.values())
    assert 40 <= accepted <= len(KINDS) - 40


@pytest.mark.parametrize("files", [131_000, 166_000])
def test_large_torrents_are_refused(files):
    """To read them would stall announces."""
    data = files_with(
        *(file_of(70_000, f"{n:x}") for n in range(files)),
        pieces=-(-files * 70_000 // 16384),
    )
    with pytest.raises(bitbreeze.TorrentError, match="more than (524288|10485760) "):
        bitbreeze.read_metainfo(data)


# Downloads and magnet links


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({b"announce": OURS}, None),
        ({b"announce": THEIRS}, [[OURS], [THEIRS]]),
        ({b"announce": THEIRS, b"announce-list": [[OURS]]}, [[OURS], [THEIRS]]),
        ({b"announce-list": [[OURS, THEIRS], [b"x", 5]]}, [[OURS], [THEIRS], [b"x"]]),
        ({b"announce-list": [[b" ", OURS], [THEIRS]]}, [[OURS], [THEIRS]]),
        ({b"announce-list": [THEIRS, {}, 5, []], b"announce": 5}, None),
        ({b"announce-list": 5}, None),
        *(
            ({b"announce": THEIRS, b"announce-list": useless}, [[OURS], [THEIRS]])
            for useless in (
                *([b"a", b"b"], [[]], [[b""]], [[b" "]], [5], [[5]]),
                *(b"a", {b"a": b"b"}, [[[b"a"]]], []),
            )
        ),
        ({b"announce": [THEIRS]}, None),
    ],
)
def test_our_announce_url_comes_first(before, after):
    """In the file as it is, and in a private one, which names nobody else (BEP 27)."""
    for private in (None, 0, 1, 2, -1):
        info = info_of(b"a", private=private)
        metainfo = {**before, b"info": info, b"url-list": [b"kept"]}
        metainfo = metainfo_of(metainfo)
        made = bencoder.bdecode(download_of(metainfo))
        assert made.pop(b"announce") == OURS
        assert made.pop(b"announce-list", None) == (None if private else after)
        assert made == {b"info": info, b"url-list": [b"kept"]}


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("name", ["a&b=c d+e#", "ü%41", '"><script>'])
def test_magnet_links_are_those_that_libtorrent_reads(kind, name):
    hashes = {"v1": (b"1" * 20, b""), "v2": (b"", b"2" * 32)}.get(kind)
    v1, v2 = hashes or (b"1" * 20, b"2" * 32)
    torrent = bitbreeze.Torrent("", name, 12345, 1, v1.hex(), v2.hex(), NOW, False)
    link = bitbreeze.magnet(torrent, ["http://[::1]:6969/x/announce"])
    read = libtorrent.parse_magnet_uri(link)
    assert (read.name, read.trackers) == (name, ["http://[::1]:6969/x/announce"])
    assert read.info_hashes.v1.to_bytes() == (v1 or bytes(20))
    assert read.info_hashes.v2.to_bytes() == (v2 or bytes(32))
    assert "&xl=12345&" in link and not re.search(r'[\s<>"]', link)
