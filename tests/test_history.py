"""History: a sample an hour, whoever takes it, and a month of them."""

import errno
import os
import time

import pytest
from conftest import NOW, peer_id
from servers import cgi

import app as bitbreeze

HOUR, HASH = 3600, b"h" * 20
NOON = NOW // HOUR * HOUR


class Swarms:
    """Swarms of a seeder and two leechers each, as a store yields them."""

    def __init__(self, in_each):
        self.in_each, self.walked = in_each, []

    def __call__(self, now, first):
        self.walked.append(first)
        for _ in range(self.in_each):
            yield HASH, bitbreeze.Counts(1, 2, 0, 7)


def run(history, swarms, now):
    """Step as announces do, until there is nothing to do; return how often."""
    steps = 0
    while not history.quiet[0] <= now < history.quiet[1]:
        history.step(swarms, now)
        steps += 1
    return steps


def times(history, now):
    return [sample.time for sample in history.samples(now)]


def test_a_sample_an_hour_of_all_processes(tmp_path):
    swarms = Swarms(1)
    mine, other = (bitbreeze.History(tmp_path / "history") for _ in range(2))
    run(mine, swarms, NOON + 5)
    assert mine.samples(NOON + 5) == [(256, 512, 256, NOON + 5)]
    for now in (NOON + 6, NOON + HOUR - 1):
        run(mine, swarms, now)
        run(other, swarms, now)
    assert len(swarms.walked) == 256
    run(other, swarms, NOON + HOUR)
    run(mine, swarms, NOON + HOUR)
    assert times(mine, NOON + HOUR) == [NOON + 5, NOON + HOUR]
    assert len(swarms.walked) == 512


def test_a_step_counts_a_slice(tmp_path):
    history, swarms = bitbreeze.History(tmp_path / "history"), Swarms(40)
    for _ in range(4):
        history.step(swarms, NOON)
    assert swarms.walked == list(range(10))  # ten folders of 40 are four slices
    history.step(swarms, NOON + 4)  # after quiet seconds, more
    assert 80 < len(swarms.walked) < 100
    run(history, swarms, NOON + 4)
    assert history.samples(NOON + 4) == [(10240, 20480, 10240, NOON + 4)]


def test_another_process_takes_over_from_a_dead_one(tmp_path):
    dead, other = (bitbreeze.History(tmp_path / "history") for _ in range(2))
    dead.step(Swarms(200), NOON)
    assert run(other, Swarms(200), NOON + 299) == 1
    assert times(other, NOON + 299) == []
    assert run(other, Swarms(200), NOON + 300) == 513  # and one to see the end
    assert times(other, NOON + 300) == [NOON + 300]


def test_a_month_is_kept_in_order(tmp_path):
    history = bitbreeze.History(tmp_path / "history")
    for hour in range(800):
        run(history, Swarms(0), NOON + hour * HOUR)
    now = NOON + 799 * HOUR
    assert times(history, now) == [NOON + hour * HOUR for hour in range(56, 800)]
    assert (tmp_path / "history").stat().st_size == 16 + 744 * 16
    assert len(times(history, now + 700 * HOUR)) == 44


def test_a_clock_that_jumps_neither_floods_nor_stops_it(tmp_path):
    history, swarms = bitbreeze.History(tmp_path / "history"), Swarms(0)
    jumps = (0, 1, 5000, 5001, 2, -300, -299, 3, 5002, 4)
    for hour in jumps:
        for second in range(3):
            run(history, swarms, NOON + hour * HOUR + second)
    assert len(swarms.walked) == 256 * len(jumps)
    assert times(history, NOON + 5 * HOUR) == [
        NOON + hour * HOUR for hour in (-300, -299, 0, 1, 2, 3, 4)
    ]


@pytest.mark.parametrize("data", [b"hist", b"hist\0" + bytes(11920), b"?" * 3000])
def test_a_damaged_history_is_set_aside(tmp_path, caplog, data):
    (tmp_path / "history").write_bytes(data)
    history = bitbreeze.History(tmp_path / "history")
    assert history.samples(NOON) == []
    run(history, Swarms(1), NOON)
    run(history, Swarms(1), NOON + HOUR)
    assert times(history, NOON + HOUR) == [NOON, NOON + HOUR]
    assert (tmp_path / "history.damaged").read_bytes() == data
    assert len(caplog.records) == 1


HERE = [(1, 1, 1, NOON - hour * HOUR) for hour in (0, 1, 5)]
MERGES = {
    "others": [(2, 2, 2, NOON - hour * HOUR + 9) for hour in (2, 9, 743)],
    "the same hours": [(2, 2, 2, NOON - hour * HOUR + 9) for hour in (0, 1, 5)],
    "both": [(2, 2, 2, NOON - hour * HOUR + 9) for hour in (1, 2, 3)],
    "too old": [(2, 2, 2, NOON - hour * HOUR) for hour in (744, 745, 9999)],
    "of tomorrow": [(2, 2, 2, NOON + hour * HOUR) for hour in (1, 24)],
    "none": [],
}


@pytest.mark.parametrize("there", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("here", [HERE, []])
def test_histories_are_merged_by_the_hour(tmp_path, here, there):
    history, now = bitbreeze.History(tmp_path / "data/history"), NOON + 1800
    assert history.merge([bitbreeze.Sample(*each) for each in here], now) == len(here)
    hours = {each[3] // HOUR: each for each in there}
    hours |= {each[3] // HOUR: each for each in here}
    merged = sorted(
        (each for hour, each in hours.items() if -744 < hour - NOON // HOUR <= 0),
        key=lambda each: each[3],
    )
    samples = [bitbreeze.Sample(*each) for each in there]
    assert history.merge(samples, now) == len(merged) - len(here)
    assert history.merge(samples, now) == 0
    assert history.samples(now) == merged
    run(history, Swarms(1), now + HOUR)
    assert len(history.samples(now + HOUR)) in (len(merged), len(merged) + 1)


def test_a_history_of_a_newer_version_is_left_alone(tmp_path, caplog):
    data = b"hist\x02" + bytes(11920)
    (tmp_path / "history").write_bytes(data)
    history = bitbreeze.History(tmp_path / "history")
    for hour in range(3):
        run(history, Swarms(1), NOON + hour * HOUR)
    assert history.samples(NOON + 3 * HOUR) == []
    with pytest.raises(bitbreeze.NewerError):
        history.merge([bitbreeze.Sample(1, 1, 1, NOON)], NOON)
    assert (tmp_path / "history").read_bytes() == data
    assert os.listdir(tmp_path) == ["history"]
    assert [record.message[-26:] for record in caplog.records] == [
        "a newer BitBreeze wrote it"
    ]


def test_a_torn_sample_is_none(tmp_path):
    history = bitbreeze.History(tmp_path / "history")
    run(history, Swarms(1), NOON)
    run(history, Swarms(1), NOON + HOUR)
    data = (tmp_path / "history").read_bytes()
    (tmp_path / "history").write_bytes(data[:-1])
    assert times(history, NOON + HOUR) == [NOON]


def test_without_a_folder_there_is_no_history(tmp_path, caplog):
    (tmp_path / "data").write_bytes(b"a file")
    history = bitbreeze.History(tmp_path / "data" / "history")
    for now in range(NOON, NOON + 3 * HOUR, 60):
        run(history, Swarms(1), now)
    assert history.samples(NOON) == []
    assert len(caplog.records) == 1


def test_a_sample_that_fails_is_begun_again(tmp_path, caplog):
    def broken(now, first):
        yield HASH, bitbreeze.Counts(5, 5, 0, 0)
        raise OSError(errno.EIO, "broken")

    history = bitbreeze.History(tmp_path / "history")
    for now in (NOON, NOON + 1, NOON + 300):
        run(history, broken, now)
    assert len(caplog.records) == 1
    run(history, Swarms(1), NOON + 700)
    assert history.samples(NOON + 700) == [(256, 512, 256, NOON + 700)]


def test_announces_take_the_sample(tracker, tmp_path, monkeypatch):
    client = tracker(track="any")
    monkeypatch.setattr(bitbreeze.time, "time", lambda: NOON + 0.5)
    client.announce(1, left=0)
    assert client.app.tracker.history.samples(NOON) == [(1, 0, 1, NOON)]
    for number in range(300):  # each beginning with another byte, or nearly
        client.announce(number, info_hash=bytes((number % 256,)) * 20)
    monkeypatch.setattr(bitbreeze.time, "time", lambda: NOON + HOUR)
    for _ in range(2):
        client.announce(1, left=0)
        assert len(client.app.tracker.history.samples(NOON + HOUR)) == 1
    client.announce(1, left=0)
    assert client.app.tracker.history.samples(NOON + HOUR)[1] == (
        *(1, 300, 256, NOON + HOUR),
    )


def test_a_cgi_program_takes_the_sample_at_once(tmp_path, settings):
    store, now = bitbreeze.FileStore(tmp_path, settings), int(time.time())
    for number in range(300):
        info_hash = bytes((number % 256,)) + number.to_bytes(19, "big")
        peer = bitbreeze.Announce(info_hash, peer_id(1), b"\x0b\0\0\1", 6881, 0)
        store.announce(peer, 0, now)
    cgi(tmp_path)
    found = bitbreeze.History(tmp_path / "history").samples(int(time.time()))
    assert found[0][:3] == (300, 1, 301)
