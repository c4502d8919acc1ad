"""Access: what is tracked, as the folder and the lists beside it change."""

import itertools
import logging
import os
import random
import re
import time
from collections import Counter

import pytest
from conftest import NOW, Client, kept, make_settings, mutated
from test_torrents import torrent_of

import app as bitbreeze

LISTED = "torrent not registered with this tracker"
HASH, OTHER = b"\xaa" * 20, b"\xbb" * 20


@pytest.fixture
def access(tmp_path):
    """A function that makes an Access over a folder of the test's."""

    def make(track="auto"):
        torrents = bitbreeze.Catalogue(tmp_path / "torrents", tmp_path / "data/t.json")
        return bitbreeze.Access(make_settings(track=track), torrents)

    return make


def put(folder, name="a"):
    """Drop a torrent into the folder, and return its info_hash."""
    (folder / "torrents").mkdir(exist_ok=True)
    data = torrent_of(name)
    (folder / "torrents" / f"{name}.torrent").write_bytes(data)
    return bitbreeze.describe(bitbreeze.read_metainfo(data), "", 0).v1


def test_auto_is_any_until_something_is_listed(access, tmp_path):
    known = access()
    assert known.tracks(HASH, NOW) and known.is_open()
    listed = put(tmp_path)
    assert known.tracks(listed, NOW + 1)
    assert not known.tracks(HASH, NOW + 1)
    assert not known.is_open()


def test_auto_is_listed_with_an_allow_list(access, tmp_path):
    (tmp_path / "allow.txt").write_text(HASH.hex())
    known = access()
    assert known.tracks(HASH, NOW)
    assert not known.tracks(OTHER, NOW)


def test_a_folder_of_bad_files_is_not_empty(access, tmp_path):
    put(tmp_path)
    (tmp_path / "torrents/a.torrent").write_bytes(b"bad")
    known = access()
    for second in range(4):
        assert not known.tracks(HASH, NOW + second)


@pytest.mark.parametrize(("track", "tracks"), [("any", True), ("listed", False)])
def test_any_and_listed_say_it_outright(access, tmp_path, track, tracks):
    assert access(track).tracks(HASH, NOW) == tracks
    listed = put(tmp_path)
    known = access(track)
    assert known.tracks(listed, NOW)
    assert known.tracks(HASH, NOW) == tracks


def test_lists_take_whole_and_truncated_hashes_and_comments(access, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "allow.txt").write_text(
        f"# ours\n\n{HASH.hex().upper()}  an ISO\n{'cc' * 32}# v2\n"
        f"nonsense\n  {'dd' * 19}\n"
    )
    known = access()
    for info_hash in (HASH, b"\xcc" * 20):
        assert known.tracks(info_hash, NOW)
    assert not known.tracks(b"\xdd" * 20, NOW)
    assert [record.getMessage() for record in caplog.records] == known.allow.problems
    assert [problem.split(", ")[1][:6] for problem in known.allow.problems] == [
        "line 5",
        "line 6",
    ]


def test_denied_is_denied_whatever_else_is_said(access, tmp_path):
    listed = put(tmp_path)
    (tmp_path / "deny.txt").write_text(listed.hex() + "\n" + HASH.hex())
    for track in ("auto", "any", "listed"):
        known = access(track)
        assert not known.tracks(listed, NOW)
        assert not known.tracks(HASH, NOW)


def put_list(path, text):
    """Write a list, or remove it for None; return the second it is done."""
    path.unlink(missing_ok=True) if text is None else path.write_text(text)
    return int(time.time())


@pytest.mark.parametrize("text", [None, "", OTHER.hex()])
def test_a_list_that_changes_counts_as_before_for_a_while(access, tmp_path, text):
    put_list(tmp_path / "allow.txt", HASH.hex())
    known = access()
    now = int(time.time())
    assert known.tracks(HASH, now)
    now = put_list(tmp_path / "allow.txt", text)
    for second in (1, 1, 2, 1):  # a thread may come late, with the second before
        assert known.tracks(HASH, now + second) and not known.tracks(
            OTHER, now + second
        )
    assert known.tracks(HASH, now + 3) == (not text) == known.is_open()
    assert known.tracks(OTHER, now + 3)


@pytest.mark.parametrize("text", [None, OTHER.hex()])
def test_who_looks_rarely_takes_a_finished_list_at_once(access, tmp_path, text):
    put_list(tmp_path / "allow.txt", HASH.hex())
    known = access()
    assert not known.tracks(OTHER, int(time.time()))
    now = put_list(tmp_path / "allow.txt", text)
    assert known.tracks(OTHER, now + 100)


def test_a_list_that_is_written_all_the_time_counts_as_before(access, tmp_path):
    path = tmp_path / "allow.txt"
    put_list(path, HASH.hex())
    known, now = access(), int(time.time())
    assert known.tracks(HASH, now)
    for second in range(1, 30):
        path.write_text(OTHER.hex()[: second % 3])
        os.utime(path, (now + second, now + second))
        assert known.tracks(HASH, now + second)
        assert not known.tracks(OTHER, now + second)


@pytest.mark.parametrize("text", [None, ""])
def test_a_list_that_changes_under_the_reader_counts_as_before(
    access, tmp_path, monkeypatch, text
):
    path = tmp_path / "allow.txt"
    put_list(path, HASH.hex())
    known, now = access(), int(time.time())
    assert known.tracks(HASH, now)
    path.write_text(OTHER.hex())
    parsed = known.allow._parsed

    def meanwhile():
        put_list(path, text)
        return parsed()

    monkeypatch.setattr(known.allow, "_parsed", meanwhile)
    assert known.tracks(HASH, now + 100) and not known.tracks(OTHER, now + 100)


def test_a_list_with_a_byte_order_mark_and_many_bad_lines(tmp_path):
    known = bitbreeze.HashList(tmp_path / "deny.txt")
    known_lines = "\r\n".join([HASH.hex(), *["bad"] * 14])
    (tmp_path / "deny.txt").write_text("\ufeff" + known_lines, encoding="utf-8")
    assert known.look(NOW)
    assert known.hashes == {HASH}
    assert len(known.problems) == 11
    assert known.problems[-1].endswith("deny.txt: 4 more lines like these, skipped")


def test_any_accident_to_a_list_leaves_hashes_and_problems(tmp_path, cases):
    path, rnd = tmp_path / "allow.txt", random
    whole = f"# ours\n{HASH.hex()} an ISO\r\n\n {OTHER.hex() * 2}#é\n{'cD' * 20}\nx"
    for _ in range(cases(5000)):
        data = mutated(rnd, whole.encode("utf-8-sig"))
        path.write_bytes(data)
        known = bitbreeze.HashList(path)
        assert known.look(NOW) and not known.look(NOW)
        assert {len(info_hash) for info_hash in known.hashes} <= {20}
        assert len(known.hashes) + len(known.problems) <= len(data.split())
        assert all(map(str.encode, known.problems))
        for line in re.split("[\r\n]", data.decode("utf-8-sig", "replace")):
            if re.fullmatch("[0-9a-f]{40}", line):
                assert bytes.fromhex(line) in known.hashes


@pytest.mark.parametrize("name", ["allow.txt", "deny.txt", "torrents"])
def test_one_list_that_cannot_be_read_leaves_the_others(access, tmp_path, name):
    """A folder for a file, a file for the folder: root cannot be kept out otherwise."""
    (tmp_path / "allow.txt").write_text(HASH.hex())
    (tmp_path / "deny.txt").write_text(OTHER.hex())
    listed, path = put(tmp_path), tmp_path / name
    path.rename(tmp_path / "aside")
    path.touch() if name == "torrents" else path.mkdir()
    known = access()
    with pytest.raises(bitbreeze.TrackerError, match="still reading"):
        known.check(b"\xcc" * 20, NOW)  # it may be listed
    assert not known.is_open()
    assert known.tracks(HASH, NOW) == (name != "allow.txt")
    assert known.tracks(listed, NOW) == (name != "torrents")
    assert not known.tracks(OTHER, NOW)
    assert access("any").tracks(b"\xcc" * 20, NOW) == (name != "deny.txt")


def test_lists_that_cannot_be_read_leave_what_is_known(access, tmp_path, caplog):
    (tmp_path / "allow.txt").write_text(HASH.hex())
    known = access()
    assert known.tracks(HASH, NOW)
    (tmp_path / "allow.txt").unlink()
    (tmp_path / "allow.txt").mkdir()
    for second in range(1, 5):
        assert known.tracks(HASH, NOW + second)
        assert not known.tracks(OTHER, NOW + second)
    assert len(caplog.records) == 1


def test_nobody_is_sent_away_for_good_while_torrents_are_read(
    access, tmp_path, monkeypatch
):
    listed = [put(tmp_path, str(number)) for number in range(30)]
    known = access()
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    for left in range(29, 0, -1):  # each look or announce has the time for one
        with pytest.raises(bitbreeze.TrackerError, match="still reading"):
            known.check(HASH, NOW)
        assert len(known.catalogue.unread) == left
    with pytest.raises(bitbreeze.TrackerError, match=LISTED):
        known.check(HASH, NOW)
    for info_hash in listed:
        known.check(info_hash, NOW)


def test_a_quiet_folder_costs_a_look_a_second(access, tmp_path, monkeypatch):
    listed = put(tmp_path)
    (tmp_path / "torrents/isos").mkdir()
    (tmp_path / "allow.txt").write_text(HASH.hex())
    for path in (tmp_path / "torrents", tmp_path / "torrents/isos"):
        os.utime(path, (NOW - 100, NOW - 100))
    known, calls = access(), Counter()
    assert known.tracks(listed, NOW)

    def counting(name, function):
        def counted(*arguments, **named):
            calls[name] += 1
            return function(*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in ("stat", "scandir"):
            patch.setattr(os, name, counting(name, getattr(os, name)))
        patch.setattr(bitbreeze, "open", counting("open", open), raising=False)
        for second in range(1, 6):
            for _ in range(1000):
                assert known.tracks(listed, NOW + second)
                assert known.tracks(HASH, NOW + second)
                assert not known.tracks(OTHER, NOW + second)
            # One of each list, one of each folder.
            assert calls == {"stat": second * 4}


def test_ten_thousand_files_are_read_a_few_an_announce(access, tmp_path, monkeypatch):
    """Reading one takes a thousandth of a second, by a clock of our own."""
    listed = [put(tmp_path, str(number)) for number in range(10_000)]
    (tmp_path / "allow.txt").write_text(HASH.hex())
    known, clock, read = access(), [0.0], bitbreeze.Catalogue._read_one

    def reading(*arguments):
        clock[0] += 0.001
        read(*arguments)

    monkeypatch.setattr(bitbreeze.Catalogue, "_read_one", reading)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    now, taken = int(time.time()), []
    while not taken or known.catalogue.unread:
        before = clock[0]
        assert known.tracks(HASH, now + len(taken) // 500)
        taken.append(clock[0] - before)
        with pytest.raises(bitbreeze.TrackerError, match="still reading|registered"):
            known.check(OTHER, now + len(taken) // 500)
    assert max(taken) < 0.053  # a look
    assert sum(taken) / len(taken) < 0.004
    assert sum(known.tracks(i, now + len(taken) // 500) for i in listed) == 10_000
    other = access()
    assert other.tracks(listed[0], now + 100)
    assert not other.catalogue.unread and clock[0] < 10.1  # it is known by the first


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


@pytest.mark.parametrize("write", [lambda path: path.write_text(""), os.unlink])
def test_a_look_that_comes_late_does_not_age_what_it_sees(access, tmp_path, write):
    """A request may wait for seconds between its look at the clock and its turn."""
    path, now = tmp_path / "allow.txt", int(time.time())
    path.write_text(HASH.hex())
    known = access("listed")
    assert known.tracks(HASH, now - 20)
    write(path)  # as whoever is about to write it anew
    for late in (9, 5, 1, 0):
        assert known.tracks(HASH, now - late)


def test_a_torrent_that_is_replaced_counts_for_a_look_that_comes_late(access, tmp_path):
    listed, now = put(tmp_path), int(time.time())
    known = access("listed")
    assert known.tracks(listed, now - 20)
    (tmp_path / "torrents/a.torrent").unlink()
    for late in (9, 5, 1, 0):
        assert known.tracks(listed, now - late)
