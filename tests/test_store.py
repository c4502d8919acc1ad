"""The file store: the contract of every store, and what is special to files."""

import errno
import fcntl
import logging
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import NOW, all_peers, endpoints, kept, make_settings, peer_id, rewrite
from contract import *  # noqa: F403
from contract import (
    HASH,
    TTL,
    Swarm,
    endpoint,
    ipv4,
    ipv6,
    refused_from_one_48,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app as bitbreeze


@pytest.fixture
def make_store(tmp_path):
    """A function that makes stores; those with the same folder share their data."""

    def make(folder="data", **overrides):
        return bitbreeze.FileStore(tmp_path / folder, make_settings(**overrides))

    return make


def test_snatches_are_kept_so_long(make_store):
    swarm = Swarm(make_store(swarm_ttl=5000))
    for fields in ({}, {"event": "completed", "left": 0}):
        swarm.announce(1, **fields)
    for later in (1, 4000):
        found = dict(swarm.store.swarms(NOW + TTL + later))
        assert found == {HASH: (0, 0, 0, 1)}
    assert dict(swarm.store.swarms(NOW + TTL + 5002)) == {}
    assert swarm.counts(NOW + TTL + 5002) == (0, 0, 0, 0)
    assert not kept(swarm.store.folder)


def test_one_address_cannot_fill_a_large_swarm(make_store):
    """In which its peers are estimated from a sample of pages."""
    swarm = Swarm(make_store(max_peers_per_address=100))
    for peer in range(3000):
        swarm.announce(peer)
    assert 1680 < refused_from_one_48(swarm, range(10_000, 12_000)) <= 1900


def test_a_full_tracker_takes_no_swarm(make_store):
    swarm, other = Swarm(make_store(max_swarms=1)), b"i" * 20
    swarm.announce(1)
    for act in (
        lambda: Swarm(swarm.store, other).announce(1),
        lambda: swarm.store.raise_snatches(other, 1, NOW),
    ):
        with pytest.raises(bitbreeze.TrackerError, match="is full: it tracks 1 "):
            act()
    assert swarm.announce(2)[0] == (0, 2, 0, 0)


def test_dropped_swarms_make_room(make_store):
    store = make_store(max_swarms=2)
    Swarm(store, b"a" * 20).announce(1)
    Swarm(store, b"b" * 20).announce(1)
    for _ in range(256):
        later = NOW + TTL + 10
        store.tidy(later + 10 * _)
    Swarm(store, b"c" * 20).announce(1, later)
    Swarm(store, b"d" * 20).announce(1, later)


def test_swarms_without_peers_keep_no_live_swarm_out(make_store):
    """Only swarms with peers count, and the others go when there are too many."""
    store = make_store(max_swarms=300)
    names = [bytes([number % 256, number // 256]) * 10 for number in range(1500)]
    for number, name in enumerate(names):
        for fields in ({}, {"left": 0, "event": "completed"}, {"event": "stopped"}):
            Swarm(store, name).announce(1, NOW + number, **fields)
    later = NOW + len(names)
    found = [name for name, counts in store.swarms(later) if counts.snatches]
    assert 300 <= len(found) <= 601
    for number in range(300):
        Swarm(store, b"%020d" % number).announce(1, later)
    with pytest.raises(bitbreeze.TrackerError, match="it tracks 300 torrents already"):
        Swarm(store, b"i" * 20).announce(1, later)
    assert counted(store)[1] == 300 < counted(store)[0] <= 601
    assert len(kept(store.folder)) == counted(store)[0]


def test_a_wrong_number_of_swarms_costs_no_snatches(make_store):
    store = make_store(max_swarms=20)
    for number in range(10):
        store.raise_snatches(bytes([number]) * 20, 1, NOW)
    store._count_swarms(lambda swarms, live: (60, live))
    for turn in range(256):
        store.tidy(NOW + turn)
    assert len(list(store.swarms(NOW))) == 10


def test_a_reset_by_another_process_counts_once(make_store):
    store, other = make_store(), make_store()

    def announce(store, numbers):
        for number in numbers:
            Swarm(store, bytes([number]) * 20).announce(1)

    announce(store, range(10))
    other.reset(NOW)
    announce(other, range(10, 30))
    announce(store, range(10))
    assert counted(store) == (30, 30)


def files(store):
    return [path for path in Path(store.folder).rglob("*") if path.is_file()]


def test_files_are_private(swarm):
    for peer in range(100):
        swarm.announce(peer)
        assert os.stat(swarm.store.folder).st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in files(swarm.store)} == {0o600}


def test_big_swarms_take_100_bytes_a_peer_and_shrink(swarm):
    for now, first in ((NOW, 0), (NOW + 1000, 1)):
        for peer in range(first, 5000, 2):
            swarm.announce(peer, now)
    path = kept(swarm.store.folder)[HASH]
    assert path.stat().st_size < 5000 * 110
    assert swarm.counts(NOW + TTL + 1) == (0, 2500, 0, 0)
    assert swarm.counts(NOW + TTL + 1001) == (0, 0, 0, 0)
    assert path.stat().st_size == 4096


DAMAGES = {
    "cut short": lambda data: data[:1000],
    "cut in a later page": lambda data: data[:-1],
    "random": lambda data: random.Random(1).randbytes(len(data)),
    "random in a later page": lambda data: data[:8192] + os.urandom(9000),
    "an older version": lambda data: data[:4] + b"\0" + data[5:],
    "another version in a later page": lambda data: data[:8196] + b"\2" + data[8197:],
    "of another swarm": lambda data: data[:16] + b"x" * 20 + data[36:],
    "something else": lambda data: b"<html>" * 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "damage"),
    [
        pytest.param(size, damage, id=f"{size}-{name}")
        for name, damage in DAMAGES.items()
        for size in ((300,) if "cut" in name or "later" in name else (5, 300))
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
def test_damaged_files_are_set_aside(make_store, caplog, size, damage, is_open):
    swarm = Swarm(make_store())
    for peer in range(size):
        swarm.announce(peer)
    rewrite(swarm.store.folder, HASH, damage)
    if not is_open:
        swarm = Swarm(make_store())
    for peer in range(size):  # one of them comes upon the damage
        swarm.announce(peer)
    if swarm.counts() == (0, size, 0, 0) and not caplog.records:
        swarm.counts(NOW + TTL // 2)
    for peer in range(size):
        swarm.announce(peer, NOW + TTL // 2)
    assert swarm.counts(NOW + TTL // 2) == (0, size, 0, 0)
    assert len(caplog.records) == 1
    assert "was damaged" in caplog.text
    assert Path(swarm.store.folder, "damaged", HASH.hex()).exists()


@pytest.mark.parametrize(("size", "at"), [(5, 7), (300, 7), (300, 8192)])
def test_a_damaged_swarm_goes_for_those_who_have_it_open(make_store, size, at):
    one, other = Swarm(make_store()), Swarm(make_store())
    for peer in range(size):
        one.announce(peer)
        other.announce(peer)
    rewrite(one.store.folder, HASH, lambda it: it[:at] + b"\xff" * 9 + it[at + 9 :])
    list(all_peers(one.store, NOW))
    assert Path(one.store.folder, "damaged", HASH.hex()).exists()
    for peer in range(size):
        (one, other)[peer % 2].announce(peer)
    assert one.counts() == other.counts() == (0, size, 0, 0)
    assert dict(make_store().swarms(NOW)) == {HASH: (0, size, 0, 0)}


def test_swarms_grow_by_a_page(swarm):
    for peer in range(70):
        swarm.announce(peer)
    assert kept(swarm.store.folder)[HASH].stat().st_size == 4096
    swarm.announce(70)
    assert kept(swarm.store.folder)[HASH].stat().st_size == 8192


def test_files_are_as_the_docstring_says(make_store):
    """Trackers have these bytes on their disks: another format needs another folder."""
    swarm, number = Swarm(make_store()), 3
    head = struct.pack("<4sBBBBII", b"swrm", 1, number, 0, 0, 0, NOW)
    checked = HASH + b"saltsalt" + struct.pack("<IIII", 1, number, 0, 0)
    checked += struct.pack("<QIIB", 77, 0, 0, 0)
    records, ends4, ends6 = b"", b"", b""
    for peer in range(number):
        records += peer_id(peer) + struct.pack("<IBII", 5, 2, NOW, NOW)
        ends4 += endpoint(peer)
        ends6 += ipv6(peer) + endpoint(peer)[4:]
    page = head + checked + zlib.crc32(checked).to_bytes(4, "little")
    page = page.ljust(106, b"\0") + records.ljust(2310, b"\0")
    page += ends4.ljust(420, b"\0") + ends6.ljust(1260, b"\0")
    path = Path(swarm.store.folder, "swarms/ab", HASH.hex())
    path.parent.mkdir(parents=True)
    path.write_bytes(page)
    assert swarm.counts() == (3, 0, 0, 77)
    _, peers = swarm.announce(9, address=ipv6(9))
    found = endpoints(peers.endpoints6, 18)
    assert sorted(found) == [ipv6(peer) + endpoint(peer)[4:] for peer in range(3)]
    with pytest.raises(bitbreeze.TrackerError, match="another key"):
        swarm.announce(1, key=6, address=ipv4(99))
    assert swarm.announce(1, left=0, event="completed")[0].snatches == 77


@pytest.mark.parametrize("size", [0, 1, 81, 1000, 3605, 4095, 4097, 9000, 16384, 18000])
@pytest.mark.parametrize("peers", [1, 60, 300])
def test_a_file_that_is_cut_while_open_fills_again(swarm, peers, size):
    for peer in range(peers):
        swarm.announce(peer)
    os.truncate(kept(swarm.store.folder)[HASH], size)
    for _ in range(2):  # one of these announces may find the damage
        for peer in range(peers):
            swarm.announce(peer)
    assert swarm.counts() == (0, peers, 0, 0)


def test_an_emptied_file_is_a_new_swarm(swarm, caplog):
    for peer in range(100):
        swarm.announce(peer)
    os.truncate(kept(swarm.store.folder)[HASH], 0)
    assert swarm.announce(2)[0] == (0, 1, 0, 0)
    assert not caplog.records


def test_a_miscounted_partial_seed_is_damage(swarm):
    swarm.announce(1)
    state_at = 106 + 24
    partial = bytes((bitbreeze.PARTIAL,))
    folder = swarm.store.folder
    rewrite(folder, HASH, lambda it: it[:state_at] + partial + it[state_at + 1 :])
    swarm.announce(1, event="stopped")
    assert swarm.announce(2)[0] == (0, 1, 0, 0)


def test_files_stay_open_while_they_are_announced_and_so_many(make_store, monkeypatch):
    monkeypatch.setattr(bitbreeze, "OPEN_AT_MOST", 6)
    store = make_store()
    for number in range(20):
        Swarm(store, bytes((number,)) * 20).announce(1)
        assert len(store._open) == min(number + 1, 6)
    Swarm(store).announce(1, NOW + 9)
    assert len(store._open) == 6
    Swarm(store).announce(1, NOW + 10)
    Swarm(store).announce(1, NOW + 19)
    assert HASH in store._open
    Swarm(store).announce(1, NOW + 20)
    assert list(store._open) == [HASH]


def test_a_dropped_store_closes_its_files(tmp_path):
    """At once: a process without a free descriptor cannot wait for the collector."""
    store = bitbreeze.FileStore(tmp_path, make_settings())
    for _ in range(3):
        Swarm(store).announce(1)
    fd = store._open[HASH].fd
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_forked_child_opens_its_own_files(swarm):
    swarm.announce(1)
    assert swarm.store._open
    child = os.fork()
    if not child:
        os._exit(len(swarm.store._open))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("waiter", ["process", "thread"])
@pytest.mark.parametrize("peers", [0, 60, 300])
def test_a_worker_that_waits_for_a_removed_swarm(tmp_path, monkeypatch, peers, waiter):
    """The swarm goes, or grows, while a process or a thread waits for its lock."""
    store = bitbreeze.FileStore(tmp_path, make_settings(swarm_ttl=0))
    for peer in range(peers or 1):
        Swarm(store).announce(peer)
    if not peers:
        Swarm(store).announce(0, event="stopped")
    newcomers = range(3000, 3000 + peers)
    waits, flock = [True], bitbreeze.fcntl.flock

    def change(store):
        if waits:
            waits.clear()
            list(store.swarms(NOW))
            for peer in newcomers:
                Swarm(store).announce(peer)

    def wait_for_file(fd, operation):
        if operation == fcntl.LOCK_EX:
            change(bitbreeze.FileStore(tmp_path, make_settings(swarm_ttl=0)))
        return flock(fd, operation)

    class ThreadLock:
        def __init__(self, lock):
            self.lock, self.release = lock, lock.release

        def acquire(self):
            change(store)
            return self.lock.acquire()

    if waiter == "process":
        monkeypatch.setattr(bitbreeze.fcntl, "flock", wait_for_file)
    else:
        store._open[HASH].lock = ThreadLock(store._open[HASH].lock)
    Swarm(store).announce(2000)
    assert not waits
    other = bitbreeze.FileStore(tmp_path, make_settings())
    assert Swarm(other).counts().leechers == peers + len(newcomers) + 1


@pytest.mark.parametrize("jump", [TTL // 2, 86400])
@pytest.mark.parametrize("number", [30, 300])
def test_a_clock_that_was_set_back_keeps_no_peer(make_store, number, jump):
    """At the next tidy or recount, seconds in the future count as now."""
    swarm = Swarm(make_store(swarm_ttl=0))
    for first, now in ((0, NOW), (number, NOW + jump)):
        for peer in range(first, first + number):
            swarm.announce(peer, now)
    later = NOW + TTL // 4
    tidied(later)(swarm)
    swarm.announce(5000, later)
    assert swarm.counts(later + TTL) == (0, number + 1, 0, 0)
    recounted = later + TTL + (TTL // 16 if number > 70 else 1)
    assert swarm.counts(recounted + 1) == (0, 0, 0, 0)


def test_a_clock_that_was_set_forward_lets_peers_come_back(swarm):
    for now in (NOW, NOW + 86400, NOW):
        for peer in range(100):
            swarm.announce(peer, now)
        assert swarm.counts(now) == (0, 100, 0, 0)


def test_removed_folder_is_made_again(swarm):
    swarm.announce(1)
    os.rename(swarm.store.folder, swarm.store.folder + ".gone")
    assert swarm.announce(2, NOW + 10)[0] == (0, 1, 0, 0)


def test_number_of_swarms_is_mended(make_store):
    store = make_store(max_swarms=2)
    Swarm(store, b"a" * 20).announce(1)
    Path(store.folder, "swarms.count").write_bytes(struct.pack("<QQ", 9, 2))
    assert len(list(store.swarms(NOW))) == 1
    assert counted(store) == (1, 1)
    Swarm(store, b"b" * 20).announce(1)
    assert counted(store) == (2, 2)


@pytest.mark.parametrize("peers", [5, 75])
def test_any_flipped_byte_is_survived(tmp_path, caplog, is_long, peers):
    """What is counted then is there, and can be; or the file is set aside.

    Each byte is flipped in the file of a swarm of its own, so that one walk is over
    many.
    """
    caplog.set_level(logging.CRITICAL)
    whole = whole_file(bitbreeze.FileStore(tmp_path / "whole", make_settings()), peers)
    values = [1 << bit for bit in range(8)] + [255, random.randrange(1, 255)]
    values = values if is_long else random.sample(values, 1)
    flips = [(at, value) for at in range(len(whole)) for value in values]
    flips = flips if is_long else flips[random.randrange(2) :: 2]
    for first in range(0, len(flips), 2048):
        folder = tmp_path / str(first)
        flipped = put_flipped(folder, whole, flips[first : first + 2048])
        check_flipped(bitbreeze.FileStore(folder, make_settings()), flipped)
        shutil.rmtree(folder)


def whole_file(store, peers):
    """Return the bytes of the file of a swarm of peers of all kinds."""
    swarm = Swarm(store)
    for peer in range(peers):
        event = ("", "paused", "completed")[peer % 3]
        swarm.announce(peer, left=peer % 3 % 2, event=event)
        swarm.announce(peer, left=peer % 3 % 2, event=event, address=ipv6(peer))
    return rewrite(store.folder, HASH, lambda whole: whole)


def put_flipped(folder, whole, flips):
    """Make a swarm of each flip: (which byte, what to flip in it); return them."""
    (folder / "swarms/00").mkdir(parents=True)
    swarms = {number.to_bytes(20, "big"): flip for number, flip in enumerate(flips)}
    for info_hash, (at, value) in swarms.items():
        head = whole[16:36].replace(HASH, info_hash) + whole[36:77]
        data = bytearray(whole[:16] + head + bitbreeze.checksum(head) + whole[81:])
        data[at] ^= value
        (folder / "swarms/00" / info_hash.hex()).write_bytes(data)
    return swarms


def check_flipped(store, swarms):
    """Fail unless each swarm is whole, or set aside, and goes on either way."""
    later = NOW + TTL // 8  # all are counted anew
    for now in (NOW, later):
        for info_hash, flip in swarms.items():
            counts = store.scrape([info_hash], now)[info_hash]
            assert 0 <= min(counts) <= max(counts) <= 140, flip
            counts, peers = Swarm(store, info_hash).announce(99, now)
            assert 0 <= min(counts) <= max(counts) <= 140, flip
            assert len(peers.endpoints4) % 6 == 0 and counts.leechers, flip
    found = dict(all_peers(store, later))
    for info_hash, (at, value) in swarms.items():
        if at < 5 or 16 <= at < 81:  # nothing is believed of such a head
            assert Path(store.folder, "damaged", info_hash.hex()).exists(), (at, value)
    for info_hash, counts in store.swarms(later):
        peers, flip = found.pop(info_hash), swarms.pop(info_hash)
        assert len(peers.ids) == 20 * (counts.seeders + counts.leechers), flip
        assert peer_id(99) in endpoints(peers.ids, 20), flip
    assert not found and not swarms


@given(st.integers(0, 2**32), st.integers(1, 8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_flipped_bytes_are_survived(tmp_path_factory, seed, flips):
    """With bytes of the file changed, an announce works, or the file is set aside."""
    rnd = random.Random(seed)
    store = bitbreeze.FileStore(tmp_path_factory.mktemp("flip"), make_settings())
    swarm = Swarm(store)
    for peer in range(rnd.choice([3, 75])):
        swarm.announce(peer, address=rnd.choice([ipv4, ipv6])(peer))

    def flip(data):
        data = bytearray(data)
        for _ in range(flips):
            at = rnd.choice([rnd.randrange(110), rnd.randrange(len(data))])
            data[at] = rnd.randrange(256)
        return data

    rewrite(store.folder, HASH, flip)
    for peer in (1, 90):
        for now in (NOW, NOW + 2000):
            try:
                swarm.announce(peer, now)
            except bitbreeze.TrackerError:
                pass  # another key, or full, as far as the file knows
            assert min(swarm.counts(now)) >= 0


class Killed(BaseException):
    """The process is gone: nothing after it runs, not even an except."""


CALLS = frozenset(
    ("open", "pread", "pwrite", "unlink", "replace", "ftruncate", "makedirs")
    + ("stat", "fstat", "listdir", "flock")
)


class Faulty:
    """The modules os and fcntl of the store, of which one call does not happen.

    It is the one after ``left`` others. A "kill" lets no later one happen either. An
    "error" is what a disk may answer, but not to a lock that is given back.
    """

    path, LOCK_EX, LOCK_UN = os.path, fcntl.LOCK_EX, fcntl.LOCK_UN

    def __init__(self, kind, left, calls=CALLS):
        self.kind, self.left, self.calls = kind, left, calls
        self.has_struck = False

    def __getattr__(self, name):
        real = getattr(fcntl if name == "flock" else os, name)
        if name not in self.calls:
            return real
        return lambda *given, **more: self._call(real, *given, **more)

    def _call(self, real, *given, **more):
        is_kill = self.kind == "kill"
        if given[1:] == (fcntl.LOCK_UN,):
            real(*given)  # the system does, when a process is gone
            if not is_kill:
                return None
        if real is os.listdir and not os.path.exists(given[0]):  # as most are
            return real(*given)
        self.left -= 1
        if self.left == -1 or self.has_struck and is_kill:
            self.has_struck = True
            raise Killed if is_kill else OSError(errno.ENOSPC, "no space left")
        return real(*given, **more)

    def strike(self, act, swarm):
        """Do something until the fault comes; return whether it came."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bitbreeze, "os", self)
            patch.setattr(bitbreeze, "fcntl", self)
            with suppress(Killed, OSError, bitbreeze.TrackerError):
                act(swarm)
        return self.has_struck


class Case(NamedTuple):
    """What is there before a fault, what is done, and when one looks afterwards."""

    prepare: Callable  # (Swarm)
    act: Callable  # (Swarm)
    now: int = NOW + 100
    is_damaged: bool = False
    halfway: Callable | None = None  # (Swarm): does only the first of two changes


def crowd(number):
    """Return what announces so many peers of all kinds, every eighth a bit later."""

    def prepare(swarm):
        for peer in range(number):
            event = "paused" if peer % 5 == 1 else ""
            now = NOW + 100 * (peer % 8 == 0)
            swarm.announce(peer, now, left=peer % 3, event=event)

    return prepare


def torn(number):
    """Return what leaves a swarm as a kill does after so many writes of a growth."""

    def prepare(swarm):
        crowd(120)(swarm)
        Faulty("kill", number, {"pwrite"}).strike(announced(120), swarm)
        assert kept(swarm.store.folder)[HASH].read_bytes()[76] == bitbreeze.CHANGING, (
            number
        )

    return prepare


def damaged(number, at):
    """Return what leaves a swarm with something else in its file."""

    def prepare(swarm):
        crowd(number)(swarm)
        other = b"something else" * 9
        after = at + len(other)
        rewrite(swarm.store.folder, HASH, lambda it: it[:at] + other + it[after:])

    return prepare


def swarms(number):
    """Return what leaves so many swarms of one peer."""

    def prepare(swarm):
        for info_hash in (HASH, OTHER)[:number]:
            Swarm(swarm.store, info_hash).announce(1)

    return prepare


def an_empty_file(swarm):
    """Leave what a kill leaves when a file is made, and nothing written to it yet."""
    crowd(1)(swarm)
    os.truncate(kept(swarm.store.folder)[HASH], 0)
    Path(swarm.store.folder, "swarms.count").write_bytes(bytes(16))


def announced(peer, now=NOW + 100, **fields):
    return lambda swarm: swarm.announce(peer, now, **fields)


def scraped(now):
    return lambda swarm: swarm.counts(now)


def walked(now):
    return lambda swarm: list(all_peers(swarm.store, now))


def tidied(now):
    def tidy(swarm):
        for _ in range(256):
            swarm.store.tidy(now)

    return tidy


def elsewhere(swarm):
    Swarm(swarm.store, OTHER).announce(1)


OTHER, LATER = HASH[::-1], NOW + TTL + 50


CASES = {
    "nothing there": Case(swarms(0), announced(0)),
    "a second swarm": Case(swarms(1), elsewhere),
    "no room for a third swarm": Case(
        swarms(2), lambda swarm: Swarm(swarm.store, b"t" * 20).announce(1)
    ),
    "a file just made, used": Case(an_empty_file, announced(0)),
    "a file just made, removed": Case(an_empty_file, walked(NOW)),
    **{f"newcomer to {n}": Case(crowd(n), announced(n)) for n in (6, 70, 80, 120, 500)},
    **{
        f"{what} among {n}": Case(crowd(n), announced(peer, **fields))
        for n in (6, 500)
        for what, peer, fields in (
            ("known", 3, {"left": 0}),
            ("moved", 3, {"left": 0, "address": ipv4(999)}),
            ("second endpoint", 3, {"left": 0, "address": ipv6(3)}),
            ("completed", 1, {"left": 0, "event": "completed"}),
            ("completed silently", 2, {"left": 0}),
            ("stopped", 2, {"event": "stopped"}),
            ("stopped at last", 2, {"left": 0, "event": "stopped"}),
            ("paused", 2, {"event": "paused"}),
        )
    },
    **{
        f"{what} when most of {n} have expired": Case(crowd(n), act, LATER)
        for n in (60, 500)
        for what, act in (
            ("newcomer", announced(n, LATER)),
            ("scrape", scraped(LATER)),
            ("walk", walked(LATER)),
        )
    },
    **{
        f"{what} after a kill in growing, {n} writes done": Case(torn(n), act)
        for n in (2, 3)
        for what, act in (("scrape", scraped(NOW + 100)), ("newcomer", announced(999)))
    },
    **{
        f"restarted among {n}": Case(
            crowd(n),
            announced(n, address=ipv4(3), port=1003),
            halfway=announced(3, event="stopped"),
        )
        for n in (6, 500)
    },
    "nobody left of many": Case(crowd(500), scraped(LATER + 50), LATER + 50),
    "walk over the expired": Case(swarms(2), walked(LATER), LATER),
    "tidy": Case(swarms(2), tidied(LATER), LATER),
    "damaged": Case(damaged(6, 0), announced(9), is_damaged=True),
    "damaged, of many": Case(damaged(500, 20), announced(9), is_damaged=True),
    "damaged in a later page": Case(
        damaged(500, 3 * 4096), walked(NOW), is_damaged=True
    ),
}  # fmt: skip


def observed(store, now):
    """Return the peers and counts of all swarms, which must agree, and the snatches."""
    found = {
        info_hash: sorted(zip(*map(endpoints, peers, (20, 6, 18)), strict=True))
        for info_hash, peers in all_peers(store, now)
    }
    counted = {h: counts for h, counts in store.swarms(now) if sum(counts[:2])}
    assert found.keys() == counted.keys()
    counts = store.scrape([HASH, OTHER], now)
    for info_hash, (seeders, leechers, partial_seeds, _) in counts.items():
        ids = [peer_id for peer_id, *_ in found.setdefault(info_hash, [])]
        assert len(set(ids)) == len(ids) == seeders + leechers
        assert 0 <= partial_seeds <= leechers
    kinds = {info_hash: each[:3] for info_hash, each in counts.items()}
    return (found, kinds), sum(each.snatches for each in counts.values())


def check_numbers(store, now):
    """Fail unless the numbers of swarms, after a walk over all, are right."""
    live = len(dict(all_peers(store, now)))
    assert counted(store) == (len(kept(store.folder)), live)


def counted(store):
    """Return the numbers of swarms, and of those with peers, that a store keeps."""
    return struct.unpack("<QQ", Path(store.folder, "swarms.count").read_bytes())


def disk_use(store):
    return sum(path.stat().st_size for path in files(store))


@pytest.mark.parametrize("kind", ["kill", "error"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fault_at_any_call_loses_nothing(tmp_path, caplog, is_long, kind, case):
    """All is as before or as after; and as after, once the client asks again.

    Without --long, these are each second call of the odd or the even ones.
    """

    def opened(name, prepared="prepared"):
        if prepared:
            shutil.copytree(tmp_path / prepared, tmp_path / name)
        return Swarm(bitbreeze.FileStore(tmp_path / name, make_settings(max_swarms=2)))

    (tmp_path / "prepared").mkdir()
    case.prepare(opened("prepared", None))
    before = *observed(opened("before").store, case.now), 0
    swarm = opened("halfway")
    if case.halfway:
        case.halfway(swarm)
    halfway = observed(swarm.store, case.now)
    swarm = opened("after")
    with suppress(bitbreeze.TrackerError):
        case.act(swarm)
    after = *observed(swarm.store, case.now), disk_use(swarm.store)
    step = 1 if is_long else 2
    for calls in range(random.randrange(step), 1000, step):
        caplog.clear()
        swarm = opened(str(calls))
        if not Faulty(kind, calls).strike(case.act, swarm):
            break
        if kind == "kill":
            swarm = opened(str(calls), None)
        check_after_fault(swarm, case, before, after, halfway)
        said = [record.getMessage() for record in caplog.records]
        assert all("was damaged" in each for each in said)
        assert case.is_damaged - (kind == "kill") <= len(said) <= case.is_damaged
        shutil.rmtree(tmp_path / str(calls))
    assert calls > 3


def check_after_fault(swarm, case, before, after, halfway):
    """Fail unless all is as before or as after, and as after once it is done again."""
    store = swarm.store
    found, snatches = observed(store, case.now)
    seen = found, snatches
    assert seen in (before[:2], after[:2], halfway, (before[0], after[1]))
    check_numbers(store, case.now)
    with suppress(bitbreeze.TrackerError):
        case.act(swarm)
    found, snatches = observed(store, case.now)
    # A kill between the two writes of a snatch among many makes it count twice.
    assert found == after[0] and 0 <= snatches - after[1] <= 1
    check_numbers(store, case.now)
    assert disk_use(store) == after[2]
    aside = Path(store.folder, "damaged", HASH.hex())
    assert aside.exists() == case.is_damaged
