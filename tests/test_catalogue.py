"""Catalogue: what is tracked, while the folder and the lists beside it change.

The first part moves the clock by hand, in one process. The second part runs servers
with several workers: each follows a change within five seconds, and a thousand edits
of the lists never lead to a wrong answer.
"""

import errno
import itertools
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace
from urllib.request import urlopen

import bencoder
import pytest
from conftest import NOW, Client, kept, mutated
from makers import MAKERS, one_file
from servers import announce_path, free_port, gunicorn, poll, scrape_path, serving
from test_torrents import TREE, torrent_of

import app as bitbreeze

LISTED = "torrent not registered with this tracker"
READING = "this tracker is still reading its list of torrents: try again soon"
HASH, OTHER, THIRD = b"\xaa" * 20, b"\xbb" * 20, b"\xcc" * 20


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A function that makes the Catalogue of another worker. Scans take no time."""
    (tmp_path / "data").mkdir()
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: 0})
    monkeypatch.setattr(bitbreeze, "time", clock)

    def make(track="auto"):
        index = tmp_path / "data/torrents.json"
        return bitbreeze.Catalogue(tmp_path / "torrents", index, track)

    return make


def put(folder, path="a", name=""):
    """Write a .torrent file below the folder, and return its info_hash."""
    data = torrent_of(name or Path(path).name)
    (folder / f"torrents/{path}.torrent").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"torrents/{path}.torrent").write_bytes(data)
    return hash_of(data)


def hash_of(data):
    metainfo = bitbreeze.read_metainfo(data)
    return bitbreeze.parse_torrent(metainfo, "", 0).info_hashes()[0]


def put_list(path, text):
    """Write a list, or remove it for None; return the second of that change."""
    path.unlink(missing_ok=True) if text is None else path.write_text(text)
    return int((path if path.exists() else path.parent).stat().st_mtime)


def names(catalogue):
    return sorted(torrent.name for torrent in catalogue.torrents.values())


def answer(catalogue, info_hash, now):
    """Return why a torrent is refused, or None if it is tracked."""
    try:
        catalogue.check(info_hash, now)
    except bitbreeze.TrackerError as refusal:
        return str(refusal)


# What is tracked


@pytest.mark.parametrize(
    ("track", "before", "after"),
    [("auto", None, LISTED), ("any", None, None), ("listed", LISTED, LISTED)],
)
def test_auto_is_any_until_something_is_listed(worker, tmp_path, track, before, after):
    catalogue = worker(track)
    assert answer(catalogue, HASH, NOW) == before
    assert catalogue.is_open == (before is None)
    listed = put(tmp_path)
    assert catalogue.tracks(listed, NOW + 1)
    assert answer(catalogue, HASH, NOW + 1) == after
    (tmp_path / "torrents/a.torrent").unlink()
    (tmp_path / "allow.txt").write_text(OTHER.hex())
    assert catalogue.tracks(OTHER, NOW + 2)
    assert answer(catalogue, HASH, NOW + 2) == after


@pytest.mark.parametrize("now", [NOW, 0])  # an old file, and a file of this second
def test_a_folder_of_bad_files_is_not_empty(worker, tmp_path, now):
    put(tmp_path)
    (tmp_path / "torrents/a.torrent").write_bytes(b"bad")
    catalogue, now = worker(), now or int(time.time())
    for second in range(5):
        assert not catalogue.tracks(HASH, now + second)
    assert answer(catalogue, HASH, now + 5) == LISTED


@pytest.mark.parametrize("track", ["auto", "any", "listed"])
def test_deny_wins(worker, tmp_path, track):
    listed = put(tmp_path)
    (tmp_path / "allow.txt").write_text(HASH.hex())
    (tmp_path / "deny.txt").write_text(listed.hex() + "\n" + HASH.hex())
    catalogue = worker(track)
    assert answer(catalogue, listed, NOW) == answer(catalogue, HASH, NOW) == LISTED
    assert not catalogue.torrents and not catalogue.find(listed.hex(), NOW)
    assert catalogue.denied == {listed, HASH}


def test_a_start_just_after_unpacking_is_not_open(worker, tmp_path):
    now = put_list(tmp_path / "allow.txt", HASH.hex())
    put_list(tmp_path / "deny.txt", OTHER.hex())
    listed, catalogue = put(tmp_path), worker()
    assert catalogue.tracks(HASH, now) and catalogue.tracks(listed, now)
    assert answer(catalogue, THIRD, now) == answer(catalogue, OTHER, now) == LISTED
    assert answer(worker("any"), OTHER, now) == LISTED


def test_the_folder_is_searched_for_torrents(worker, tmp_path):
    """Folders and links are followed, but not hidden ones."""
    a, b = put(tmp_path, "isos/linux/a"), put(tmp_path, "b")
    for hidden in (".hidden", ".git/hidden", "isos/.cache/hidden"):
        put(tmp_path, hidden, "hidden")
    folder = tmp_path / "torrents"
    (folder / "notes.txt").write_text("not a torrent")
    (tmp_path / "elsewhere").write_bytes(torrent_of("c"))
    (folder / "c.torrent").symlink_to(tmp_path / "elsewhere")
    (folder / "nowhere.torrent").symlink_to("nothing")
    (folder / "loop.torrent").symlink_to("loop.torrent")
    catalogue = worker()
    catalogue.refresh(NOW)
    assert names(catalogue) == ["a", "b", "c"] and len(catalogue.by_hash) == 3
    assert {*catalogue.torrents} == {"isos/linux/a.torrent", "b.torrent", "c.torrent"}
    assert catalogue.find(a.hex(), NOW).path == "isos/linux/a.torrent"
    assert catalogue.find(b.hex().upper(), NOW).path == "b.torrent"
    assert not any(catalogue.find(x, NOW) for x in (b.hex() + 24 * "0", "x"))
    assert {*catalogue.skipped} == {"loop.torrent"} and not catalogue.unread


def test_folders_that_are_links_are_categories(worker, tmp_path):
    """A loop of links ends, and a folder that is found twice counts once."""
    put(tmp_path, "linux/a")
    put(tmp_path, "B")
    (tmp_path / "torrents/B.torrent").rename(tmp_path / "torrents/B.TORRENT")
    put(tmp_path / "mirror", "deep/c")
    folder = tmp_path / "torrents"
    (folder / "linked").symlink_to(tmp_path / "mirror/torrents")
    (folder / "all").symlink_to(".")
    (folder / "linux/up").symlink_to("..")
    (folder / "linux again").symlink_to("linux")
    (tmp_path / "mirror/torrents/back").symlink_to(folder)
    catalogue = worker()
    catalogue.refresh(NOW)
    found = {"linux/a.torrent", "B.TORRENT", "linked/deep/c.torrent"}
    assert {*catalogue.torrents} == found and not catalogue.skipped


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a name may have 108 bytes at most


def link_to_device(path):
    path.symlink_to("/dev/zero")


SPECIAL = make_fifo, make_socket, link_to_device, Path.mkdir


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["torrents/x.torrent", "allow.txt", "deny.txt"])
def test_special_files_are_skipped(worker, tmp_path, caplog, make, name):
    listed = put(tmp_path)
    make(tmp_path / name)
    catalogue = worker()
    for now in (NOW, NOW + 1, NOW + 100):
        assert catalogue.tracks(listed, now) == (name != "deny.txt")
        assert not catalogue.tracks(HASH, now)
    (problem,) = catalogue.problems or catalogue.skipped.values()
    assert problem.endswith("it cannot be read: not a regular file")
    assert len(caplog.records) == 1


def test_changes_of_what_is_tracked_are_logged_once_by_all(worker, tmp_path, caplog):
    workers = [worker(), worker()]
    for each in workers:
        assert each.tracks(HASH, NOW)
    assert not caplog.records
    put(tmp_path)
    for now in range(NOW + 1, NOW + 5):
        for each in (*workers, worker()):
            assert not each.tracks(HASH, now)
    (tmp_path / "torrents/a.torrent").unlink()
    for now in range(NOW + 10, NOW + 15):
        for each in (*workers, worker()):
            assert not each.tracks(HASH, now)
    folder = tmp_path / "torrents"
    folder.rmdir()
    for now in range(NOW + 20, NOW + 25):
        for each in workers:
            assert each.tracks(HASH, now)
    assert [record.getMessage() for record in caplog.records] == [
        f"Tracked from now on: 1 torrents in {folder}",
        f"Tracked from now on: 0 torrents in {folder}",
        "Tracked from now on: any torrent",
    ]


@pytest.mark.parametrize(("gone", "stays"), [("b/x", "a/x"), ("a/x", "b/x")])
def test_a_torrent_in_two_places_is_one(worker, tmp_path, caplog, gone, stays):
    put(tmp_path, "b/x", "same")
    put(tmp_path, "a/x", "same")
    workers = [worker(), worker()]
    for second in range(3):
        for each in workers:
            each.refresh(NOW + second)
            assert {*each.torrents} == {"a/x.torrent"}
            assert {t.path for t in each.by_hash.values()} == {"a/x.torrent"}
            reason = "it is the same torrent as a/x.torrent"
            assert each.skipped == {"b/x.torrent": reason}
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path}/torrents/b/x.torrent: {reason}"
    (tmp_path / f"torrents/{gone}.torrent").unlink()
    for each in workers:
        each.refresh(NOW + 100)
        assert {*each.torrents} == {f"{stays}.torrent"} and not each.skipped


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "bad"])
def test_an_empty_list_is_a_list(worker, tmp_path, text):
    (tmp_path / "allow.txt").write_text(text)
    for each in (worker(), worker()):
        assert answer(each, HASH, NOW) == LISTED and not each.is_open
    assert worker("any").tracks(HASH, NOW)


def test_a_folder_that_had_a_torrent_is_a_list(worker, tmp_path):
    """Until it is gone. Without an index, workers know only the files of now."""
    (tmp_path / "torrents").mkdir()
    assert worker().tracks(HASH, NOW)
    put(tmp_path)
    assert not worker().tracks(HASH, NOW)
    (tmp_path / "torrents/a.torrent").unlink()
    for each in (worker(), worker()):
        assert not each.tracks(HASH, NOW + 10) and not each.tracks(HASH, NOW + 100)
    (tmp_path / "torrents").rmdir()
    assert worker().tracks(HASH, NOW + 200)


ENCODINGS = {
    "UTF-8": (True, "utf-8"), "UTF-8 with mark": (True, "utf-8-sig"),
    "UTF-16 LE": (True, "utf-16"), "UTF-16 BE": (True, "utf-16-be"),
    "Latin-1": (True, "latin-1"), "UTF-16 without mark": (False, "utf-16-le"),
}  # fmt: skip


@pytest.mark.parametrize(("is_read", "encoding"), ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("name", ["allow.txt", "deny.txt"])
@pytest.mark.parametrize("before", [None, OTHER.hex()])
def test_lists_in_any_encoding(
    worker, tmp_path, caplog, is_read, encoding, name, before
):
    """If one cannot be read, its last content counts; without that, none is tracked."""
    listed, path, workers = put(tmp_path), tmp_path / name, []
    if before:
        path.write_text(before)
        workers = [worker(), worker()]
        assert workers[0].tracks(OTHER, NOW) == (name == "allow.txt")
        assert workers[1].tracks(listed, NOW)
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = f"{mark}# bücher\r\n{HASH.hex()} für alle\r\n"
    path.write_bytes(text.encode(encoding))
    caplog.clear()
    for each in [*workers, worker()]:
        for now in (NOW + 10, NOW + 20):
            assert each.tracks(HASH, now) == (is_read and name == "allow.txt")
            is_kept = not is_read and before is not None
            assert each.tracks(OTHER, now) == (is_kept and name == "allow.txt")
            is_known = is_read or is_kept or name == "allow.txt"
            assert each.tracks(listed, now) == is_known
        assert not each.is_open
        problem = f"{path}: it cannot be read: it is not text. Save it as UTF-8"
        assert each.problems == [problem] * (not is_read)
    said = [record.getMessage() for record in caplog.records]
    assert [each for each in said if "Tracked" not in each] == [problem] * (not is_read)


@pytest.mark.parametrize("track", ["any", "auto", "listed"])
@pytest.mark.parametrize("denied", [0, 1])
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_hybrid_is_denied_by_either_hash(worker, tmp_path, track, denied, is_allowed):
    data = torrent_of("f", **{"meta version": 2, "file tree": TREE})
    (tmp_path / "torrents").mkdir()
    (tmp_path / "torrents/hybrid.torrent").write_bytes(data)
    metainfo = bitbreeze.read_metainfo(data)
    hashes = bitbreeze.parse_torrent(metainfo, "", 0).info_hashes()
    if is_allowed:
        (tmp_path / "allow.txt").write_text("\n".join(map(bytes.hex, hashes)))
    (tmp_path / "deny.txt").write_text(hashes[denied].hex())
    catalogue = worker(track)
    assert [answer(catalogue, each, NOW) for each in hashes] == [LISTED] * 2
    assert not catalogue.torrents


def test_a_file_that_becomes_a_fifo_stops_no_worker(worker, tmp_path, monkeypatch):
    """Between the look at a file and its opening, and when it is downloaded."""
    put(tmp_path)
    path, catalogue = tmp_path / "torrents/a.torrent", worker()
    catalogue.refresh(NOW)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        bitbreeze.read_torrent(catalogue.folder, "a.torrent")
    for make in (make_fifo, link_to_device):
        make(tmp_path / make.__name__)
        with pytest.raises(OSError, match="not a regular file"):
            bitbreeze.read_regular(tmp_path / make.__name__)


def test_names_are_escaped_in_the_log(worker, tmp_path, caplog):
    put(tmp_path, "a/x", "same")
    put(tmp_path, "b\nline\x1b[31m/x", "same")
    (tmp_path / "torrents/new\nline\x1b[31m.torrent").write_bytes(b"bad")
    worker().refresh(NOW)
    said = sorted(record.getMessage() for record in caplog.records)
    assert [each.removeprefix(f"{tmp_path}/torrents/") for each in said] == [
        "b⟨U+000A⟩line⟨U+001B⟩[31m/x.torrent: it is the same torrent as a/x.torrent",
        "new⟨U+000A⟩line⟨U+001B⟩[31m.torrent: it is not bencoded",
    ]


# What a list may contain


def test_lists_take_whole_and_truncated_hashes_and_comments(worker, tmp_path, caplog):
    (tmp_path / "allow.txt").write_text(
        f"# ours\n\n{HASH.hex().upper()}  an ISO\n{'cc' * 32}# v2\n"
        f"nonsense\n  {'dd' * 19}\n{OTHER.hex()}\u00a0copied from a page\n"
    )
    catalogue = worker()
    assert all(catalogue.tracks(info_hash, NOW) for info_hash in (HASH, OTHER, THIRD))
    assert not catalogue.tracks(b"\xdd" * 20, NOW)
    assert [record.getMessage() for record in caplog.records] == catalogue.problems
    assert catalogue.problems == [
        f"{tmp_path}/allow.txt, line {number}: not 40 or 64 hex digits, skipped"
        for number in (5, 6)
    ]


def test_a_list_with_a_byte_order_mark_and_many_bad_lines(worker, tmp_path):
    lines = "\r\n".join([HASH.hex(), *["bad"] * 14])
    (tmp_path / "deny.txt").write_text("\ufeff" + lines, encoding="utf-8")
    catalogue = worker("any")
    assert not catalogue.tracks(HASH, NOW) and catalogue.tracks(OTHER, NOW)
    assert len(catalogue.problems) == 11
    assert catalogue.problems[-1].endswith("deny.txt: 4 more lines like these, skipped")


def test_any_accident_to_a_list_leaves_hashes_and_problems(cases):
    whole = f"# ours\n{HASH.hex()} an ISO\r\n\n {OTHER.hex() * 2}#é\n{'cD' * 20}\nx"
    for _ in range(cases(5000)):
        data = mutated(random, whole.encode("utf-8-sig"))
        try:
            hashes, problems = bitbreeze.parse_list(data, "allow.txt")
        except OSError:
            assert b"\0" in data
            continue
        assert {len(bytes.fromhex(info_hash)) for info_hash in hashes} <= {20}
        assert len(hashes) + len(problems) <= len(data.split())
        assert all(map(str.encode, problems))
        for line in re.split("[\r\n]", data.decode("utf-8-sig", "replace")):
            if re.fullmatch("[0-9a-f]{40}", line):
                assert line in hashes


# When a change counts


@pytest.mark.parametrize("seconds", [(1, 1, 2, 1, 3), (100,)])  # asked often, rarely
@pytest.mark.parametrize("text", [None, "", OTHER.hex()])
def test_a_changed_list_counts_when_it_is_settled(worker, tmp_path, text, seconds):
    catalogue = worker()
    assert catalogue.tracks(HASH, put_list(tmp_path / "allow.txt", HASH.hex()))
    now = put_list(tmp_path / "allow.txt", text)
    for second in seconds[:-1]:  # a thread may come late, with the second before
        assert catalogue.tracks(HASH, now + second)
        assert answer(catalogue, OTHER, now + second) == LISTED
    assert catalogue.tracks(OTHER, now + seconds[-1]) == (text != "")
    is_open = text is None  # an empty list is a list
    assert catalogue.tracks(HASH, now + seconds[-1]) == is_open == catalogue.is_open


def test_a_new_list_counts_when_it_is_settled(worker, tmp_path):
    for name, info_hash in (("deny.txt", HASH), ("allow.txt", OTHER)):
        catalogue = worker()
        assert catalogue.tracks(HASH, int(time.time())) == (name == "deny.txt")
        now = put_list(tmp_path / name, info_hash.hex()[:20])
        for second in (1, 2):
            assert catalogue.tracks(THIRD, now + second)
        now = put_list(tmp_path / name, info_hash.hex())
        assert catalogue.tracks(THIRD, now + 10) == (name == "deny.txt")
        assert catalogue.tracks(OTHER, now + 10) and not catalogue.problems


def test_a_list_that_is_written_all_the_time_counts_as_before(worker, tmp_path):
    path, catalogue = tmp_path / "allow.txt", worker()
    now = put_list(path, HASH.hex())
    for second in range(30):
        assert catalogue.tracks(HASH, now + second)
        assert not catalogue.tracks(OTHER, now + second)
        path.write_text(OTHER.hex()[: second % 3])
        os.utime(path, (now + second, now + second))


@pytest.mark.parametrize("text", [None, "", THIRD.hex()])
def test_a_list_may_change_while_it_is_read(worker, tmp_path, monkeypatch, text):
    path, catalogue = tmp_path / "allow.txt", worker()
    now = put_list(path, HASH.hex())
    assert catalogue.tracks(HASH, now)
    path.write_text(OTHER.hex())
    os.utime(path, (now - 100, now - 100))
    parse_list = bitbreeze.parse_list

    def meanwhile(*arguments):
        put_list(path, text)
        return parse_list(*arguments)

    monkeypatch.setattr(bitbreeze, "parse_list", meanwhile)
    assert catalogue.tracks(HASH, now + 1) and not catalogue.tracks(OTHER, now + 1)


@pytest.mark.parametrize("text", [None, ""])
def test_a_request_may_come_late(worker, tmp_path, text):
    """It may wait for seconds after it has read the clock."""
    path, listed, catalogue = tmp_path / "allow.txt", put(tmp_path), worker("listed")
    now = put_list(path, HASH.hex())
    assert catalogue.tracks(HASH, now - 20)
    put_list(path, text)  # before it is written again
    (tmp_path / "torrents/a.torrent").unlink()
    for late in (9, 5, 1, 0):
        assert catalogue.tracks(HASH, now - late)
        assert catalogue.tracks(listed, now - late)


def test_a_folder_that_disappears_for_a_moment_is_not_forgotten(worker, tmp_path):
    listed = [put(tmp_path, "isos/a"), put(tmp_path, "b")]
    folder, catalogue = tmp_path / "torrents", worker()
    catalogue.refresh(int(time.time()))
    folder.rename(tmp_path / "aside")
    now = int(tmp_path.stat().st_mtime)
    for second in (1, 2, 100):
        assert all(catalogue.tracks(info_hash, now + second) for info_hash in listed)
        assert answer(catalogue, OTHER, now + second) == LISTED
        if second == 2:
            (tmp_path / "aside").rename(folder)


def test_removed_files_are_forgotten(worker, tmp_path):
    a, b, catalogue = put(tmp_path, "isos/a"), put(tmp_path, "b"), worker()
    catalogue.refresh(int(time.time()))
    (tmp_path / "torrents/b.torrent").unlink()
    now = int((tmp_path / "torrents").stat().st_mtime)
    assert catalogue.tracks(b, now + 1) and catalogue.tracks(b, now + 2)
    assert not catalogue.tracks(b, now + 3) and catalogue.tracks(a, now + 3)
    assert names(catalogue) == ["a"] and len(catalogue.by_hash) == 1
    shutil.rmtree(tmp_path / "torrents")
    assert catalogue.tracks(OTHER, now + 100) and catalogue.is_open


def test_a_file_written_over_counts_as_before_until_it_is_whole(worker, tmp_path):
    put(tmp_path, "a", "old")
    path, catalogue = tmp_path / "torrents/a.torrent", worker()
    catalogue.refresh(int(time.time()))
    for half in (torrent_of("new one")[:30], b""):
        path.write_bytes(half)
        now = int(path.stat().st_mtime)
        for second in (1, 2):
            catalogue.refresh(now + second)
            assert names(catalogue) == ["old"] and not catalogue.skipped
        catalogue.refresh(now + 3)
        assert names(catalogue) == [] and catalogue.skipped
        put(tmp_path, "a", "old")
        catalogue.refresh(now + 10)
    listed = put(tmp_path, "a", "new one")
    catalogue.refresh(now + 20)
    assert names(catalogue) == ["new one"] and [*catalogue.by_hash] == [listed]


# What cannot be read


@pytest.mark.parametrize("name", ["allow.txt", "deny.txt", "torrents"])
def test_one_list_that_cannot_be_read_counts_as_before(worker, tmp_path, caplog, name):
    """A folder for a file, a file for the folder: root can read everything else."""
    (tmp_path / "allow.txt").write_text(HASH.hex())
    (tmp_path / "deny.txt").write_text(OTHER.hex())
    listed, path, workers = put(tmp_path), tmp_path / name, [worker(), worker()]
    assert all(each.tracks(HASH, NOW) for each in workers)
    path.rename(tmp_path / "aside")
    path.touch() if name == "torrents" else path.mkdir()
    for second in range(1, 5):
        for each in workers:
            assert each.tracks(HASH, NOW + second)
            assert each.tracks(listed, NOW + second)
            assert answer(each, OTHER, NOW + second) == LISTED
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: it cannot be read: ")
    assert workers[0].problems == [record.getMessage()]
    # A worker that starts without an index knows the other lists only.
    (tmp_path / "data/torrents.json").unlink()
    new = worker()
    assert answer(new, THIRD, NOW) == READING  # it may be listed
    assert not new.is_open and new.unread == [str(path)]
    assert new.tracks(HASH, NOW) == (name == "torrents")
    assert new.tracks(listed, NOW) == (name == "allow.txt")
    assert not new.tracks(OTHER, NOW)
    (tmp_path / "data/torrents.json").unlink()
    assert worker("any").tracks(THIRD, NOW) == (name != "deny.txt")
    path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "aside").rename(path)
    assert new.tracks(HASH, NOW + 9) and new.tracks(listed, NOW + 9)
    assert answer(new, THIRD, NOW + 9) == answer(new, OTHER, NOW + 9) == LISTED


def unreadable(monkeypatch, name):
    """Let no folder be listed that has a name."""
    scandir = os.scandir

    def closed(path):
        if path.endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)


def test_a_folder_that_cannot_be_read_is_a_list(worker, monkeypatch):
    catalogue = worker()
    assert catalogue.tracks(HASH, NOW)
    unreadable(monkeypatch, "torrents")
    assert answer(catalogue, HASH, NOW + 1) == READING
    assert answer(worker(), HASH, NOW + 2) == READING


def test_a_category_that_cannot_be_read_keeps_its_torrents(
    worker, tmp_path, monkeypatch, caplog
):
    listed, catalogue = put(tmp_path, "isos/a"), worker()
    catalogue.refresh(NOW)
    put(tmp_path, "b")
    with monkeypatch.context() as patch:
        unreadable(patch, "isos")
        for second in (1, 2, 3):
            catalogue.refresh(NOW + second)
            assert names(catalogue) == ["a", "b"]
        problem = f"{tmp_path}/torrents/isos: it cannot be read: Permission denied"
        assert catalogue.problems == [problem] and len(caplog.records) == 1
        (tmp_path / "data/torrents.json").unlink()
        assert answer(worker("listed"), listed, NOW + 4) == READING
    catalogue.refresh(NOW + 5)
    assert names(catalogue) == ["a", "b"]
    assert not catalogue.problems and not catalogue.unread


def test_a_file_that_cannot_be_read_is_read_when_it_can(worker, tmp_path, monkeypatch):
    put(tmp_path)
    catalogue = worker()

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(bitbreeze, "read_torrent", closed)
        for second in range(3):
            assert answer(catalogue, HASH, NOW + second) == LISTED
            assert "Permission denied" in catalogue.skipped["a.torrent"]
    catalogue.refresh(NOW + 4)
    assert names(catalogue) == ["a"] and not catalogue.skipped


def test_a_file_may_vanish_during_a_scan(worker, tmp_path, monkeypatch):
    for name in "abc":
        put(tmp_path, name)
    catalogue, read_torrent = worker(), bitbreeze.read_torrent

    def vanishing(folder, path):
        (tmp_path / "torrents/b.torrent").unlink(missing_ok=True)
        return read_torrent(folder, path)

    monkeypatch.setattr(bitbreeze, "read_torrent", vanishing)
    for second in (0, 1):
        catalogue.refresh(NOW + second)
    assert names(catalogue) == ["a", "c"] and not catalogue.unread


# How workers share it


def test_new_files_are_read_a_few_at_a_time(worker, tmp_path, monkeypatch):
    listed = [put(tmp_path, str(number)) for number in range(30)]
    workers = itertools.cycle([worker(), worker(), worker()])
    monkeypatch.setattr(bitbreeze.time, "monotonic", itertools.count().__next__)
    for left in range(29, 0, -1):  # each refresh has time for one file
        catalogue = next(workers)
        assert answer(catalogue, HASH, NOW + 30 - left) == READING
        assert len(catalogue.unread) == left and len(catalogue.torrents) == 30 - left
    for catalogue in (next(workers), next(workers), next(workers), worker()):
        assert answer(catalogue, HASH, NOW + 100) == LISTED
        assert all(catalogue.tracks(info_hash, NOW + 100) for info_hash in listed)
    monkeypatch.setattr(bitbreeze, "read_torrent", None)  # not needed any more
    assert worker().tracks(listed[0], NOW + 200)


def test_thousands_of_files_do_not_stall_announces(
    worker, tmp_path, monkeypatch, is_long
):
    monkeypatch.setattr(bitbreeze.time, "monotonic", time.monotonic)
    listed = [
        put(tmp_path, str(number)) for number in range(10_000 if is_long else 2000)
    ]
    (tmp_path / "allow.txt").write_text(HASH.hex())
    workers, times = [worker(), worker()], []
    for second in range(1000):
        for each in workers:
            started = time.thread_time()
            assert each.tracks(HASH, NOW + second)
            times.append(time.thread_time() - started)
            assert answer(each, OTHER, NOW + second) in (READING, LISTED)
        if not any(each.unread for each in workers):
            break
    for each in workers:
        assert all(each.tracks(info_hash, NOW + second) for info_hash in listed)
    assert len(times) > 4 and max(times) < 1, times  # alone on a machine, it is 0.15


def test_a_quiet_folder_is_scanned_once_a_second(worker, tmp_path, monkeypatch):
    listed, scans, walk = put(tmp_path), [], os.walk
    (tmp_path / "allow.txt").write_text(HASH.hex())
    workers = [worker(), worker(), worker()]
    for second in (-1, 0):
        assert all(each.tracks(listed, NOW + second) for each in workers)
    monkeypatch.setattr(os, "walk", lambda *a, **k: scans.append(1) or walk(*a, **k))
    monkeypatch.setattr(bitbreeze, "read_torrent", None)
    monkeypatch.setattr(bitbreeze.json, "loads", None)
    monkeypatch.setattr(bitbreeze.json, "dumps", None)
    for second in range(1, 6):
        for each in workers * 100:
            assert each.tracks(listed, NOW + second)
            assert each.tracks(HASH, NOW + second)
            assert not each.tracks(OTHER, NOW + second)
        assert len(scans) == second


def test_scans_take_a_twentieth_of_the_time(worker, tmp_path, monkeypatch):
    put(tmp_path)
    seconds, catalogue = itertools.count(0, 2), worker()
    monkeypatch.setattr(bitbreeze.time, "monotonic", seconds.__next__)  # a slow disk
    catalogue.refresh(NOW)
    put(tmp_path, "b")
    catalogue.refresh(NOW + 39)
    assert names(catalogue) == ["a"]
    catalogue.refresh(NOW + 500)
    assert names(catalogue) == ["a", "b"]
    put(tmp_path, "c")
    catalogue.refresh(NOW + 20)  # the clock was set back
    assert names(catalogue) == ["a", "b", "c"]
    put(tmp_path, "d")
    new = worker()  # which always scans
    new.refresh(NOW + 21)
    assert names(new) == ["a", "b", "c", "d"]


def test_what_is_skipped_is_logged_once_by_all(worker, tmp_path, caplog):
    put(tmp_path)
    (tmp_path / "torrents/bad.torrent").write_bytes(b"bad")
    for _ in range(3):
        catalogue = worker()
        for second in (0, 1, 100):
            catalogue.refresh(int(time.time()) + second)
        assert "not bencoded" in catalogue.skipped["bad.torrent"]
    assert len(caplog.records) == 1


def block_lock(tmp_path, monkeypatch):
    (tmp_path / "data/torrents.json.lock").mkdir()


def block_folder(tmp_path, monkeypatch):
    (tmp_path / "data").rmdir()
    (tmp_path / "data").touch()


def fill_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("block", [block_lock, block_folder, fill_disk])
def test_lists_are_followed_when_data_cannot_be_written(
    worker, tmp_path, monkeypatch, caplog, block
):
    block(tmp_path, monkeypatch)
    (tmp_path / "allow.txt").write_text(f"{HASH.hex()}\nbad")
    workers = [worker(), worker()]
    for second in range(3):
        assert all(each.tracks(HASH, NOW + second) for each in workers)
        assert not any(each.tracks(OTHER, NOW + second) for each in workers)
    assert len(caplog.records) == 2  # each worker says once what is wrong with the list
    listed = put(tmp_path)
    (tmp_path / "deny.txt").write_text(HASH.hex())
    for each in workers:
        assert each.tracks(listed, NOW + 4) and not each.tracks(HASH, NOW + 4)
    version = workers[0].changed
    workers[0].refresh(NOW + 5)
    assert workers[0].changed == version


def test_a_disk_that_was_full_gets_the_index_later(worker, tmp_path, monkeypatch):
    put(tmp_path)
    first, second, index = worker(), worker(), tmp_path / "data/torrents.json"
    assert not first.tracks(HASH, NOW) and not second.tracks(HASH, NOW)
    with monkeypatch.context() as patch:
        fill_disk(tmp_path, patch)
        listed = put(tmp_path, "b")
        assert first.tracks(listed, NOW + 1)
        assert first.tracks(listed, NOW + 2) and second.tracks(listed, NOW + 2)
        assert b"b.torrent" not in index.read_bytes()
    first.refresh(NOW + 3)
    assert b"b.torrent" in index.read_bytes()
    index.unlink()  # the operator may
    assert first.tracks(listed, NOW + 4) and index.exists()


OLD_LAYOUT = b'{"1": {"a.torrent": ["1 5", "old", 5, 1, "aa", "", 0, false]}}'


@pytest.mark.parametrize(
    "damage", [b"", b"x", b"\xff\0\n\n", OLD_LAYOUT, b"9" * 5000, b"1\n{}"]
)
def test_a_damaged_index_is_rebuilt(worker, tmp_path, caplog, damage):
    index = tmp_path / "data/torrents.json"
    put(tmp_path)
    running = worker()
    running.refresh(NOW)
    whole = index.read_bytes()
    index.write_bytes(damage)
    for number, catalogue in enumerate((worker(), running)):
        catalogue.refresh(NOW + number)
        assert names(catalogue) == ["a"] and index.read_bytes() == whole
    assert len(caplog.records) == 1


def test_any_accident_to_the_index_is_survived(worker, tmp_path, cases):
    put(tmp_path)
    put(tmp_path, "ä")
    (tmp_path / "torrents/bad.torrent").write_bytes(b"bad")
    (tmp_path / "deny.txt").write_text(HASH.hex())
    index, right = tmp_path / "data/torrents.json", worker()
    right.refresh(NOW)
    whole = index.read_bytes()
    for _ in range(cases(500)):
        index.write_bytes(mutated(random, whole))
        catalogue = worker()
        catalogue.refresh(NOW + 1)
        assert catalogue.torrents == right.torrents
        assert catalogue.skipped == right.skipped
        assert catalogue.denied == {HASH}


def test_the_index_names_files_as_they_are(worker, tmp_path):
    """Also those with names that are not UTF-8."""
    put(tmp_path)
    folder = os.fsencode(tmp_path / "torrents")
    os.rename(folder + b"/a.torrent", folder + b"/\xff.torrent")
    for catalogue in (worker(), worker()):
        catalogue.refresh(NOW)
        assert [*map(os.fsencode, catalogue.torrents)] == [b"\xff.torrent"]
    _, text = (tmp_path / "data/torrents.json").read_text().split("\n")
    assert f"{tmp_path}/torrents/\udcff.torrent" in json.loads(text)


@pytest.fixture
def fast_switches():
    """Have threads take turns a hundred times as often, to meet more races."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switches")
def test_threads_that_come_first_wait_for_the_first_scan(worker, tmp_path):
    listed, catalogue, start = put(tmp_path), worker(), Barrier(8)

    def ask():
        start.wait()
        return answer(catalogue, listed, NOW), answer(catalogue, HASH, NOW)

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask) for _ in range(8)]
    assert {each.result() for each in answers} == {(None, LISTED)}


@pytest.mark.usefixtures("fast_switches")
def test_threads_send_no_client_away_while_files_are_read(
    worker, tmp_path, monkeypatch
):
    listed = [put(tmp_path, str(number)) for number in range(60)]
    clock, catalogue, now = itertools.count(), worker(), itertools.count(NOW)
    monkeypatch.setattr(bitbreeze.time, "monotonic", clock.__next__)  # one file a scan

    def ask():
        answers = set()
        while catalogue.unread:
            second = next(now)
            answers |= {answer(catalogue, info_hash, second) for info_hash in listed}
        return answers

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(ask) for _ in range(4)]
    assert set().union(*(each.result() for each in threads)) == {None, READING}


@pytest.mark.usefixtures("fast_switches")
def test_threads_never_see_half_a_change(worker, tmp_path):
    """A torrent moves from the folder to allow.txt and back, and is always tracked."""
    listed, other = put(tmp_path), put(tmp_path, "other")
    workers, done, wrong, now = [worker(), worker()], Event(), [], [NOW]

    def ask(catalogue):
        while not done.is_set():
            for info_hash in (listed, other, HASH):
                reason = answer(catalogue, info_hash, now[0])
                if reason != (LISTED if info_hash is HASH else None):
                    wrong.append((info_hash, reason))

    def wait(what, in_folder, in_list):
        def is_so():
            now[0] += 1
            return all(
                (bool(each.allowed), "a.torrent" in each.torrents)
                == (in_list, in_folder)
                for each in workers
            )

        poll(is_so, 20, what)

    for each in workers:
        each.refresh(NOW)
    with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
        stack.callback(done.set)
        clients = [pool.submit(ask, each) for each in workers * 2]
        for _ in range(20):
            (tmp_path / "new").write_text(listed.hex())
            os.replace(tmp_path / "new", tmp_path / "allow.txt")
            wait("both", True, True)
            (tmp_path / "torrents/a.torrent").unlink()
            wait("allow.txt only", False, True)
            put(tmp_path)
            wait("both again", True, True)
            (tmp_path / "allow.txt").unlink()
            wait("the folder only", True, False)
        done.set()
        for client in clients:
            client.result(20)
    assert not wrong


def test_what_is_not_listed_leaves_nothing_behind(tmp_path):
    app = bitbreeze.create_app(
        {"data": str(tmp_path / "data"), "torrents": str(tmp_path / "torrents")}
    )
    client, listed = Client(app), put(tmp_path)
    reply = client.announce(1, info_hash=HASH)
    assert reply[b"failure reason"] == LISTED.encode()
    assert client.announce(1, info_hash=listed)[b"incomplete"] == 1
    files = client.scrape(HASH, listed)[b"files"]
    assert [files[i][b"incomplete"] for i in (HASH, listed)] == [0, 1]
    assert list(kept(tmp_path / "data")) == [listed]


# Real servers with several workers


PEER = b"-LISTED-a client----"
# The tracker, with the worker's process id in a header of each reply.
NAMED = """
import os
from app import app


def named(environ, start_response):
    def start(status, headers, *rest):
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *rest)

    return app(environ, start)
"""


def gunicorn_named(folder, port, workers):
    command = gunicorn(port, workers, 2)
    command[command.index("app:app")] = "named:named"
    return [*command, "--pythonpath", folder]


def uwsgi_named(folder, port, workers):
    program = Path(sys.executable).with_name("uwsgi")
    command = [program, "--http-socket", f"127.0.0.1:{port}", "--master", "--need-app"]
    command += ["--processes", workers, "--threads", 2, "--disable-logging"]
    return [*command, "--pythonpath", folder, "--module", "named:named"]


HOSTS = {"gunicorn": (gunicorn_named, 4), "uwsgi": (uwsgi_named, 3)}


class Site:
    """A tracker with lists in a folder, and the ways to change and to ask it."""

    def __init__(self, folder, host, track):
        self.folder, (self.host, self.workers) = folder, HOSTS[host]
        self.track, self.port = track, free_port()
        self.torrents = folder / "torrents"
        self.torrents.mkdir(parents=True)
        (folder / "named.py").write_text(NAMED)

    def serving(self):
        """Return the context of a server of this site."""
        env = {"TRACKER_DATA": str(self.folder / "data"), "TRACKER_TRACK": self.track}
        env["TRACKER_TORRENTS"] = str(self.torrents)
        command = self.host(self.folder, self.port, self.workers)
        return serving(command, self.port, env)

    def put(self, name):
        """Rename a complete torrent into the folder, and return its info_hash."""
        data = torrent_of(name)
        (self.folder / "new").write_bytes(data)
        os.replace(self.folder / "new", self.torrents / f"{name}.torrent")
        return hash_of(data)

    def ask(self, info_hash):
        """Announce over a new connection; return the worker and why it refuses."""
        path = announce_path(info_hash, PEER, 7000, left=1)
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as response:
            reply = bencoder.bdecode(response.read())
            reason = reply.get(b"failure reason")
            return response.headers["X-Worker"], reason and reason.decode()

    def ask_all(self, info_hash):
        """Return why each worker refuses, or None, by worker."""
        answers = {}
        with ThreadPoolExecutor(self.workers * 2) as pool:
            while len(answers) < self.workers:
                answers.update(pool.map(self.ask, [info_hash] * self.workers * 2))
        return answers

    def check_all(self, info_hash, refusal, until):
        """Fail unless all workers give this answer before a monotonic time."""

        def is_so():
            return set(self.ask_all(info_hash).values()) == {refusal}

        what = f"{refusal} for {info_hash.hex()} by all workers"
        poll(is_so, until - time.monotonic(), what)


@pytest.mark.parametrize(
    "host", ["gunicorn", pytest.param("uwsgi", marks=pytest.mark.long)]
)
def test_every_worker_follows_within_five_seconds(tmp_path, host):
    site = Site(tmp_path, host, "listed")
    with site.serving():
        missing = os.urandom(20)
        assert set(site.ask_all(missing).values()) == {LISTED}
        hybrid = MAKERS["libtorrent hybrid"](site.torrents, one_file(tmp_path))
        until = time.monotonic() + 5
        both = bitbreeze.parse_torrent(
            bitbreeze.read_metainfo(hybrid.read_bytes()), "", 0
        )
        v1, v2 = both.info_hashes()
        allowed = os.urandom(20)
        (tmp_path / "allow.txt").write_text(allowed.hex())
        for info_hash in (v1, v2, allowed):
            site.check_all(info_hash, None, until)
        with urlopen(f"http://127.0.0.1:{site.port}{scrape_path(missing)}") as response:
            files = bencoder.bdecode(response.read())[b"files"]
        assert set(files[missing].values()) == {0}
        assert set(kept(tmp_path / "data")) == {v1, v2, allowed}
        hybrid.unlink()
        (tmp_path / "allow.txt").unlink()
        until = time.monotonic() + 5
        for info_hash in (v1, v2, allowed, missing):
            site.check_all(info_hash, LISTED, until)


# A thousand edits, after each of which the same torrents are listed and denied.

ROUNDS, EDITS = 3, 168


class Edited(Site):
    """A site with lists that are written again and again.

    The hashes in ``always`` and ``never`` get the same answer after every edit. The
    folder has ``kept`` torrents, which are edited too. With none, it stays empty.
    """

    def __init__(self, folder, host, track, kept):
        super().__init__(folder, host, track)
        self.random, self.numbers = random.Random(1), itertools.count()
        self.kept = [f"kept {number}" for number in range(kept)]
        self.allowed = [os.urandom(20) for _ in range(3)]
        self.denied = [os.urandom(20) for _ in range(3)]
        if kept:
            self.denied.append(self.put("denied"))
        self.always = self.allowed + [self.put(name) for name in self.kept]
        self.never = self.denied + [os.urandom(20) for _ in range(3)]
        self.marks, self.dropped = (None, None), []
        self.edit_list("allow")
        self.edit_list("deny")

    def ask_any(self):
        """Announce a random hash; return the answer if it is wrong."""
        info_hash = self.random.choice(self.always + self.never)
        worker, refusal = self.ask(info_hash)
        # A new torrent that is half written is still to be read.
        right = [None] if info_hash in self.always else [LISTED, READING]
        return None if refusal in right else (worker, info_hash, refusal)

    def edit(self):
        """Make one edit of any kind."""
        kind = self.random.randrange(4 if self.kept else 2)
        if kind < 2:
            self.edit_list(("allow", "deny")[kind])
        elif kind == 2:
            self.edit_kept(self.random.choice(self.kept))
        else:
            self.edit_dropped()

    def edit_list(self, name):
        """Write a list with other hashes in it, and in another order."""
        allowed, denied = self.marks
        hashes = {
            "allow": [*self.allowed, *self.denied, allowed, denied],
            "deny": [*self.denied, denied],
        }[name]
        hashes += [os.urandom(20) for _ in range(self.random.randrange(300))]
        self.random.shuffle(hashes)
        text = "\n".join(info_hash.hex() for info_hash in hashes if info_hash)
        self.write(self.folder / f"{name}.txt", text.encode())

    def edit_kept(self, name):
        """Write a torrent that is always listed, with or without a comment in it."""
        comment = b"d7:comment%d:%s" % (len(name), name.encode())
        data = torrent_of(name)
        data = self.random.choice([data, comment + data[1:]])
        self.write(self.torrents / f"{name}.torrent", data)

    def edit_dropped(self):
        """Add a torrent, or remove one if others are left."""
        if len(self.dropped) > self.random.randrange(1, 9):
            (self.torrents / f"{self.dropped.pop(0)}.torrent").unlink()
        else:
            self.drop()

    def drop(self):
        """Add a new torrent, and return its info_hash."""
        self.dropped.append(f"dropped {next(self.numbers)}")
        return self.put(self.dropped[-1])

    def write(self, path, data):
        """Overwrite a file, or replace it by renaming, or remove and write it."""
        way = self.random.choice(["over", "rename", "remove"])
        if way == "rename":
            path.with_suffix(".new").write_bytes(data)
            os.replace(path.with_suffix(".new"), path)
            return
        if way == "remove":
            path.unlink(missing_ok=True)
        path.write_bytes(data)

    def mark(self):
        """List other hashes; return a function that waits until all workers follow."""
        gone, self.marks = self.marks, (os.urandom(20), os.urandom(20))
        self.edit_list("allow")
        self.edit_list("deny")
        expected = {self.marks[0]: None, self.marks[1]: LISTED, gone[0]: LISTED}
        if self.kept:
            expected[self.drop()] = None
            taken = self.torrents / f"{self.dropped.pop(0)}.torrent"
            expected[hash_of(taken.read_bytes())] = LISTED
            taken.unlink()
        until = time.monotonic() + 10  # the other clients slow it down

        def check():
            for info_hash, refusal in expected.items():
                if info_hash:
                    self.check_all(info_hash, refusal, until)

        return check


def test_a_thousand_edits_never_make_a_wrong_answer(tmp_path):
    sites = [
        Edited(tmp_path / "kept", "gunicorn", "auto", 5),
        Edited(tmp_path / "bare", "uwsgi", "auto", 0),
    ]
    wrong, done = [], Event()

    def ask_on():
        while not done.is_set():
            wrong.extend(filter(None, (site.ask_any() for site in sites)))

    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        for site in sites:
            stack.enter_context(site.serving())
            # A worker that starts in the middle of an edit would use half a list.
            site.ask_all(site.always[0])
        stack.callback(done.set)
        clients = [pool.submit(ask_on) for _ in range(3)]
        for _ in range(ROUNDS):
            for _ in range(EDITS):
                for site in sites:
                    site.edit()
                    wrong.extend(filter(None, [site.ask_any()]))
            for check in [site.mark() for site in sites]:
                check()
        done.set()
        for client in clients:
            client.result(20)
    assert not wrong
