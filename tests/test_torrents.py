"""Torrents: what .torrent files say, and a folder of them that changes under us."""

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
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


def catalogue(folder):
    return bitbreeze.Catalogue(folder / "torrents", folder / "data/torrents.json")


def names(catalogue):
    return sorted(torrent.name for torrent in catalogue.torrents.values())


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
    torrent = bitbreeze.describe(metainfo, "x.torrent", NOW)
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
        (b"x" * (bitbreeze.BIGGEST + 1), "more than 10485760 bytes"),
        (torrent_of("x")[:-1], "not bencoded"),
        (torrent_of("x") + b"\n", "not bencoded"),
        (b"d4:infod4:name1:x1:ai1eee", "not canonical"),
        (torrent_of("x").replace(b"i5e", b"i05e"), ""),
        (torrent_of(""), "no name"),
        (torrent_of("x", length=-1), "no length"),
        (torrent_of("x", length=None), "lists no files"),
        (torrent_of("x", pieces=b"p" * 19), "no pieces of v1"),
        (torrent_of("x", length=None, files=[{b"length": 1}]), "has no path"),
        (torrent_of("x", length=None, files=[5]), "has no path"),
        (torrent_of("x", length=None, files=[b"x"]), "has no path"),
        (torrent_of("x", **{"file tree": {b"f": 5}}), "file tree is broken"),
        (torrent_of("x", **{"piece length": 0}), "no piece length"),
    ],
)
def test_what_is_no_torrent_has_a_reason(data, reason):
    with pytest.raises(bitbreeze.TorrentError) as refusal:
        bitbreeze.describe(bitbreeze.read_metainfo(data), "x", NOW)
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
        torrent = bitbreeze.describe(bitbreeze.read_metainfo(data), "x", NOW)
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
    torrent = bitbreeze.describe(metainfo, "x.torrent", NOW)
    details = bitbreeze.details_of(metainfo)
    assert torrent.size == sum(size for _, size in details.files) >= 0
    assert {len(i) for i in torrent.info_hashes()} == {20}
    assert torrent.name.encode() and 0 <= details.created < 2**33
    link = bitbreeze.magnet(torrent, OURS.decode())
    assert link.isascii() and not re.search(r'[\s<>"]', link)
    made = bitbreeze.read_metainfo(bitbreeze.with_announce(metainfo, OURS.decode()))
    assert (made[b"info"], made[b"announce"]) == (metainfo[b"info"], OURS)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    with pytest.raises(bitbreeze.TorrentError):
        bitbreeze.read_metainfo(data)


def test_a_folder_that_changes(tmp_path):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    known.look(NOW, 1)
    assert known.is_empty()
    (folder / "isos").mkdir(parents=True)
    (folder / "isos/a.torrent").write_bytes(torrent_of("a"))
    (folder / "b.torrent").write_bytes(torrent_of("b"))
    (folder / "notes.txt").write_text("no torrent")
    (folder / ".hidden.torrent").write_bytes(torrent_of("hidden"))
    known.look(NOW + 1, 1)
    assert names(known) == ["a", "b"]
    assert {t.path for t in known.by_hash.values()} == {"isos/a.torrent", "b.torrent"}
    (folder / "b.torrent").unlink()
    now = int(time.time())
    for second in (1, 2):
        known.look(now + second, 1)
        assert names(known) == ["a", "b"]  # it may come back in a moment
    known.look(now + 3, 1)
    assert names(known) == ["a"]
    assert len(known.by_hash) == 1
    shutil.rmtree(folder)
    for second in (100, 101):  # however long ago that was
        known.look(now + second, 1)
        assert names(known) == ["a"] and not known.is_empty()
    known.look(now + 102, 1)
    assert known.is_empty()


def test_who_looks_rarely_sees_at_once_that_a_torrent_has_gone(tmp_path):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    (folder / "isos").mkdir(parents=True)
    (folder / "isos/a.torrent").write_bytes(torrent_of("a"))
    known.look(int(time.time()), 1)
    shutil.rmtree(folder / "isos")
    known.look(int(time.time()) + 100, 1)
    assert known.is_empty()


def test_what_vanishes_during_a_look_is_all_that_is_missed(tmp_path, monkeypatch):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.torrent").write_bytes(torrent_of(name))
    (folder / "loop.torrent").symlink_to("loop.torrent")
    (folder / "nowhere.torrent").symlink_to("nothing")
    scandir = os.scandir

    def vanishing(path):
        entries = [*scandir(path)]
        (folder / "b.torrent").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(os, "scandir", vanishing)
    known.look(NOW, 1)
    assert names(known) == ["a", "c"]


def test_a_category_that_cannot_be_read_keeps_what_is_known(tmp_path, monkeypatch):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    (folder / "isos").mkdir(parents=True)
    (folder / "isos/a.torrent").write_bytes(torrent_of("a"))
    known.look(NOW, 1)
    (folder / "b.torrent").write_bytes(torrent_of("b"))
    scandir = os.scandir

    def closed(path):
        if path.endswith("isos/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        for second in (100, 200, 300):
            known.look(NOW + second, 1)
            assert names(known) == ["a", "b"]
        assert known.skipped == {"isos/": "it cannot be read: Permission denied"}
    known.look(NOW + 400, 1)
    assert names(known) == ["a", "b"] and not known.skipped


def test_a_file_that_cannot_be_read_is_read_when_it_can(tmp_path, monkeypatch):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    folder.mkdir()
    path = folder / "a.torrent"
    path.write_bytes(torrent_of("a"))

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    now = int(time.time())
    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze, "open", closed, raising=False)
        known.look(now + 100, 1)
        assert "Permission denied" in known.skipped["a.torrent"]
    at = path.stat()
    path.chmod(0o640)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    known.look(now + 200, 1)
    assert names(known) == ["a"] and not known.skipped


def test_a_file_written_over_counts_as_before_until_it_is_whole(tmp_path):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    folder.mkdir()
    (folder / "a.torrent").write_bytes(torrent_of("old"))
    now = int(time.time())
    known.look(now, 1)
    (folder / "a.torrent").write_bytes(torrent_of("new one")[:30])
    now = int(time.time())
    for second in (1, 2):
        known.look(now + second, 1)
        assert names(known) == ["old"]
    (folder / "a.torrent").write_bytes(torrent_of("new one"))
    known.look(now + 3, 1)
    assert names(known) == ["new one"]
    info = bencoder.bencode(info_of(b"new one"))
    assert [*known.by_hash] == [hashlib.sha1(info).digest()]


def test_what_is_skipped_is_logged_once_by_all(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folder = tmp_path / "torrents"
    folder.mkdir()
    (folder / "bad.torrent").write_bytes(b"bad")
    for _ in range(3):
        known = catalogue(tmp_path)
        for second in (0, 1, 100):
            known.look(int(time.time()) + second, 1)
        assert "not bencoded" in known.skipped["bad.torrent"]
        assert not known.is_empty()
    assert len(caplog.records) == 1


def test_a_torrent_in_two_places_stays_when_one_goes(tmp_path):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.torrent").write_bytes(torrent_of("same"))
    known.look(NOW, 1)
    (folder / "b.torrent").unlink()
    known.look(NOW + 100, 1)
    known.look(NOW + 200, 1)
    assert [torrent.path for torrent in known.by_hash.values()] == ["a.torrent"]


def test_many_are_read_bit_by_bit_and_known_to_the_next(tmp_path, monkeypatch):
    folder, known = tmp_path / "torrents", catalogue(tmp_path)
    folder.mkdir()
    for number in range(50):
        (folder / f"{number}.torrent").write_bytes(torrent_of(str(number)))
    known.look(NOW, 0)
    assert (len(known.torrents), len(known.unread)) == (1, 49)
    for _ in range(49):
        known.look(NOW + 1, 0)
    assert (len(known.torrents), len(known.unread)) == (50, 0)
    monkeypatch.setattr(bitbreeze, "read_metainfo", None)  # it need not be called again
    other = catalogue(tmp_path)
    other.look(NOW, 0)
    assert other.torrents == known.torrents
    assert other.by_hash == known.by_hash


def test_a_damaged_memory_is_as_none(tmp_path):
    folder = tmp_path / "torrents"
    folder.mkdir()
    (folder / "a.torrent").write_bytes(torrent_of("a"))
    catalogue(tmp_path).look(NOW, 1)
    for damage in (
        b"",
        b"{",
        b"[]",
        b'{"1": []}',
        b'{"x": [], "": 1, "-2": 0}',
        b'{"1": {"a.torrent": []}}',
        b"\xff",
    ):
        (tmp_path / "data/torrents.json").write_bytes(damage)
        known = catalogue(tmp_path)
        known.look(NOW, 1)
        assert names(known) == ["a"]


def test_two_versions_keep_their_memories_side_by_side(tmp_path):
    folder, memo = tmp_path / "torrents", tmp_path / "data/torrents.json"
    folder.mkdir()
    memo.parent.mkdir()
    memo.write_text('{"0": {"old": 1}, "2": {"a.torrent": "as they like"}}')
    (folder / "a.torrent").write_bytes(torrent_of("a"))
    known = catalogue(tmp_path)
    known.look(NOW, 1)
    kept = json.loads(memo.read_text())
    assert kept["2"] == {"a.torrent": "as they like"}
    assert kept.keys() == {"1", "2"}
    memo.write_text('{"2": {}}')  # the newer version has dropped what is ours
    known.look(NOW + 100, 1)
    assert names(known) == ["a"]
    assert memo.read_text() == '{"2": {}}'  # nothing is new: nothing to be written


def test_any_accident_to_the_memory_is_survived(tmp_path, cases):
    """What it says then of a torrent, if anything, can be shown."""
    folder, memo, rnd = tmp_path / "torrents", tmp_path / "data/torrents.json", random
    folder.mkdir()
    for name in ("ä", "b"):
        (folder / f"{name}.torrent").write_bytes(torrent_of(name))
    (folder / "bad.torrent").write_bytes(b"bad")
    catalogue(tmp_path).look(int(time.time()) + 100, 1)
    whole = json.loads(memo.read_text())
    for _ in range(cases(1500)):
        damaged = grafted(rnd, whole, [*parts_of(whole), None, True, 0.5, "\ud800"])
        if rnd.random() < 0.5:
            data = mutated(rnd, json.dumps(whole).encode())
        else:
            data = json.dumps(damaged, default=bytes.hex, skipkeys=True).encode()
        memo.write_bytes(data)
        known = bitbreeze.Catalogue(folder, memo, writes=False)
        known.look(int(time.time()) + 100, 1)
        assert set(known.torrents) | set(known.skipped) == set(whole["1"])
        for torrent in known.torrents.values():
            assert (
                torrent.name.encode() is not None and torrent.size + torrent.added >= 0
            )
            assert {len(i) for i in torrent.info_hashes()} == {20}
            assert bitbreeze.magnet(torrent, "http://x/").isascii()
        assert all(reason.encode() for reason in known.skipped.values())


@pytest.mark.parametrize("memo", ["[" * 100000, '{"1": ' * 100000, "9" * 5000])
def test_a_memory_of_anything_else_is_as_none(tmp_path, memo):
    (tmp_path / "torrents").mkdir()
    (tmp_path / "torrents/a.torrent").write_bytes(torrent_of("a"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/torrents.json").write_text(memo)
    known = catalogue(tmp_path)
    known.look(NOW, 1)
    assert names(known) == ["a"]


def test_details_are_those_of_the_file():
    metainfo = {
        b"info": info_of(b"a"),
        b"comment": "häh".encode(),
        b"created by": b"mktorrent 1.1",
        b"creation date": NOW,
        b"url-list": b"http://mirror.example.org/",
    }
    assert bitbreeze.details_of(metainfo) == (
        *([((), 5)], 16384, "häh", "mktorrent 1.1", NOW),
        ["http://mirror.example.org/"],
    )


@pytest.mark.parametrize("wrong", [-1, 2**80, b"", b"\xff", [], [5, [b"x"]], {}])
def test_details_of_the_wrong_type_are_absent(wrong):
    keys = (b"comment", b"created by", b"creation date", b"url-list")
    details = bitbreeze.details_of(
        {b"info": info_of(b"a"), **dict.fromkeys(keys, wrong)}
    )
    assert details.created == 0
    assert details.comment == details.creator == ("\ufffd" if wrong == b"\xff" else "")
    assert details.web_seeds == (["\ufffd"] if wrong == b"\xff" else [])


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


def test_metainfo_is_that_of_the_listed_torrent_only(tmp_path):
    path = tmp_path / "torrents/a.torrent"
    path.parent.mkdir()
    path.write_bytes(torrent_of("a"))
    known = catalogue(tmp_path)
    known.look(NOW, 1)
    torrent = known.torrents["a.torrent"]
    assert known.metainfo(torrent)[b"info"] == info_of(b"a")
    for change in (
        lambda: path.write_bytes(torrent_of("b")),
        lambda: path.write_bytes(b"half"),
        path.unlink,
    ):
        change()
        with pytest.raises(bitbreeze.TorrentError):
            known.metainfo(torrent)
