"""Export: all that is worth keeping goes into a file, and comes out of it the same."""

import io
import json
import random
import tracemalloc
from collections import Counter

import pytest
from conftest import NOW, make_settings, peer_id
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app as bitbreeze

HASH = b"\xabcdefghijklmnopqrstu"
PARTIAL, SNATCHED = bitbreeze.PARTIAL, bitbreeze.SNATCHED
HEADER = '{"format": "BitBreeze", "version": 2, "made": 1800000000}\n'
END = '{"end": true, "swarms": 2, "peers": 2}\n'
SWARMS = """\
{"info_hash": "6161616161616161616161616161616161616161", "snatches": 7, "peers": [\
{"peer_id": "2d4242303030312d303030303030303030303031", "key": 5, "state": 2, \
"seen4": 1799999999, "seen6": 0, "endpoint4": "c00002011ae1", \
"endpoint6": "000000000000000000000000000000000000", "seeder": true}, \
{"peer_id": "2d4242303030312d303030303030303030303032", "key": 0, "state": 1, \
"seen4": 0, "seen6": 1799999998, "endpoint4": "000000000000", \
"endpoint6": "20010db80000000000000000000000010000", "seeder": false}]}
{"info_hash": "6262626262626262626262626262626262626262", "snatches": 9, "peers": []}
"""
EXPORT = HEADER + SWARMS + END
ENDS = bytes.fromhex("c0000201 1ae1"), bytes.fromhex("20010db8") + bytes(11) + b"\1\0\0"
PEERS = [
    (bitbreeze.Record(peer_id(1), 5, SNATCHED, NOW - 1, 0, ENDS[0], bytes(18)), True),
    (bitbreeze.Record(peer_id(2), 0, PARTIAL, 0, NOW - 2, bytes(6), ENDS[1]), False),
]
READ = [(b"a" * 20, 7, PEERS), (b"b" * 20, 9, [])]


class Records:
    """A store that only yields its records."""

    def __init__(self, swarms):
        self.swarms = swarms

    def records(self, clock):
        yield from self.swarms


def read(text):
    data = text if isinstance(text, bytes) else text.encode()
    return list(bitbreeze.read_export(io.BytesIO(data)))


def write(swarms):
    lines = bitbreeze.export_lines(Records(swarms), lambda: NOW)
    return "".join(f"{line}\n" for line in lines)


def peers_of(number):
    """Return so many seeders, each with another IPv4 endpoint."""
    found = []
    for peer in range(number):
        end4 = b"\x0a" + peer.to_bytes(3, "big") + (2000 + peer).to_bytes(2, "big")
        record = bitbreeze.Record(peer_id(peer), 5, 0, NOW, 0, end4, bytes(18))
        found.append((record, True))
    return found


# -- Lines


def test_an_export_is_read_and_written():
    assert read(EXPORT) == READ
    assert write(READ) == EXPORT
    assert read(write([])) == []


LAYOUTS = {
    "compact": lambda line: json.dumps(json.loads(line), separators=(",", ":")) + "\n",
    "sorted": lambda line: json.dumps(json.loads(line), sort_keys=True) + "\n",
    "with more": lambda line: json.dumps({**json.loads(line), "more": [1]}) + "\n",
    "of Windows": lambda line: line.replace("\n", "\r\n"),
    "upper case": lambda line: line.replace("2d42", "2D42"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts_are_read(layout):
    assert read("".join(map(layout, EXPORT.splitlines(True)))) == READ


u32 = st.integers(0, 2**32 - 1)
ids, end4, end6 = (st.binary(min_size=size, max_size=size) for size in (20, 6, 18))
fields = ids, u32, st.integers(0, 255), u32, u32, end4, end6
peers = st.tuples(st.builds(bitbreeze.Record, *fields), st.booleans())
swarms = st.tuples(ids, u32, st.lists(peers, max_size=5))


@given(st.lists(swarms, max_size=5))
@hypothesis_settings(deadline=None)
def test_what_is_written_is_read(given_swarms):
    text = write(given_swarms)
    assert read(text) == [*given_swarms]
    number = sum(len(peers) for _, _, peers in given_swarms)
    end = {"end": True, "swarms": len(given_swarms), "peers": number}
    assert json.loads(text.splitlines()[-1]) == end


@pytest.mark.parametrize(
    ("number", "lines"), [(0, 1), (499, 1), (500, 1), (501, 2), (1700, 4)]
)
def test_many_peers_are_several_lines(number, lines):
    parts = read(write([(HASH, 3, iter(peers_of(number)))]))
    assert len(parts) == lines
    assert {part[:2] for part in parts} == {(HASH, 3)}
    assert [peer for part in parts for peer in part[2]] == peers_of(number)


# -- Files that are refused


def changed(old, new):
    assert EXPORT.count(old) >= 1
    return EXPORT.replace(old, new, 1)


SECOND = EXPORT.index('{"info_hash": "6262')
DAMAGED = {
    "empty": ("", "it is cut off after line 0. Copy it again"),
    "a page": ("<html>\n</html>\n", "line 1 is wrong: Expecting value"),
    "compressed": (b"\x1f\x8b\x08\0\xff\xff\n", "line 1 is wrong: "),
    "other JSON": ('{"swarms": []}\n', "line 1 is wrong: it has no 'version'"),
    "a list": ("[]\n", "line 1 is wrong: list indices must be"),
    "deep": ("[" * 100_000 + "\n", "line 1 is wrong: maximum recursion depth"),
    "newer": (changed('ion": 2', 'ion": 3'), "a newer BitBreeze wrote it. Upgrade"),
    "newer lines": (
        '{"format": "BitBreeze", "version": 3, "all": "is new"}\n\0',
        "line 1 is wrong: a newer BitBreeze wrote it. Upgrade this one",
    ),
    "no version": (changed('"version": 2, ', ""), "it has no 'version'"),
    "cut short": (EXPORT[:SECOND], "it is cut off after line 2"),
    "cut in a line": (EXPORT[: SECOND + 9], "line 3 is wrong: it is cut off"),
    "cut at the end": (EXPORT[:-3], "line 4 is wrong: it is cut off"),
    "twice": (EXPORT * 2, "line 5 is wrong: it is behind the end"),
    "more swarms": (EXPORT + EXPORT[SECOND:], "line 5 is wrong: it is behind the end"),
    "not UTF-8": (EXPORT.encode().replace(b"seeder", b"\xff"), "line 2 is wrong: 'utf"),
    "no comma": (changed('"key": 5,', '"key": 5'), "line 2 is wrong: Expecting ','"),
    "not hex": (changed("2d42", "2d4g"), "line 2 is wrong: non-hexadecimal number"),
    "short hash": (changed("6262", "62"), "line 3 is wrong: the info_hash has another"),
    "spaced": (changed("6262", "62  "), "line 3 is wrong: the info_hash has"),
    "peer": (changed('"peers": []', '"peers": [1]'), "line 3 is wrong: 'int' object"),
    "peers": (changed('"peers": []', '"peers": 1'), "line 3 is wrong: 'int' object "),
    "no peers": (changed(', "peers": []', ""), "line 3 is wrong: it has no 'peers'"),
    "a swarm": (changed(EXPORT[SECOND : -len(END)], "5\n"), "line 3 is wrong: "),
    "big key": (changed('"key": 5', '"key": 4294967296'), "line 2 is wrong: "),
    "half a key": (changed('"key": 5', '"key": 5.5'), "line 2 is wrong: required arg"),
    "hex key": (changed('"key": 5', '"key": "05"'), "line 2 is wrong: required argum"),
    "big state": (changed('"state": 2', '"state": 256'), "line 2 is wrong: "),
    "negative": (changed('"snatches": 9', '"snatches": -9'), "line 3 is wrong: "),
    "short end": (changed("c00002011ae1", "c0000201"), "line 2 is wrong: a peer_id"),
    "an endpoint": (changed('"c00002011ae1"', "7"), "line 2 is wrong: argument for"),
    "no endpoint": (changed('"endpoint4"', '"end4"'), "it has no 'endpoint4'"),
    "never seen": (changed('"seen4": 1799999999, ', ""), "it has no 'seen4'"),
    "no seeder": (changed(', "seeder": true', ""), "it has no 'seeder'"),
    "a long line": (changed("6262", "6" * 2**20), "line 3 is wrong: it is cut off"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_is_said_in_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=".") as raised:
        read(text)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 130


def test_a_file_cut_anywhere_is_refused():
    for length in range(len(EXPORT)):
        with pytest.raises(ValueError, match="cut off"):
            read(EXPORT[:length])


@given(st.integers(0, 2**32))
@hypothesis_settings(deadline=None)
def test_a_damaged_file_raises_nothing_but_valueerror(seed):
    rnd, data = random.Random(seed), bytearray(EXPORT.encode())
    for _ in range(rnd.randrange(1, 4)):
        data[rnd.randrange(len(data))] = rnd.choice(b'"[]{},:0\n\xff')
    try:
        read(bytes(data))
    except ValueError:
        pass


# -- Merging


@pytest.fixture
def merge(tmp_path):
    """A function that merges an export; it returns the tracker and what was counted."""

    def merge(text, now=NOW, **overrides):
        folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
        tracker = bitbreeze.Tracker(make_settings(**folders, **overrides))
        done = Counter()
        bitbreeze.merge_export(read(text), tracker.store, lambda: now, done)
        return tracker, {what: number for what, number in done.items() if number}

    return merge


def test_an_export_is_merged(merge):
    for _ in range(2):
        tracker, counted = merge(EXPORT)
        assert counted == {"swarms": 2, "peers": 2}
        found = dict(tracker.store.swarms(NOW))
        assert found == {b"a" * 20: (1, 1, 1, 7), b"b" * 20: (0, 0, 0, 9)}
        ((_, _, peers), _) = sorted(tracker.store.records(lambda: NOW))
        assert sorted(peers) == [(seen_now(record), seeder) for record, seeder in PEERS]


def seen_now(record):
    """Return a Record as an import keeps it: snatched is what it sees itself."""
    seen4, seen6 = (NOW if seen else 0 for seen in record[3:5])
    state = record.state & ~SNATCHED
    return record._replace(state=state, seen4=seen4, seen6=seen6)


def one(peer, **fields):
    """Return an export of one seeder, with other fields."""
    (record, seeder), *_ = peers_of(1)
    return write(
        [(HASH, 0, [(record._replace(peer_id=peer_id(peer), **fields), seeder)])]
    )


def test_rules_for_announces_hold_in_an_import(merge):
    (record, _), *_ = peers_of(1)
    end = record.endpoint4[:-1] + b"\0"
    cases = [
        (one(1), {"peers": 1}, (1, 0, 0, 0)),
        (one(2), {"peers": 1}, (1, 0, 0, 0)),  # one endpoint, so it is a new peer_id
        (one(2, endpoint4=end), {"peers": 1}, (1, 0, 0, 0)),  # it has moved
        (one(2, key=6, endpoint4=b"\x09" + end[1:]),
         {"peers left out by keys or limits": 1}, (1, 0, 0, 0)),
        (one(3, seen4=NOW + 9**5, endpoint4=b"\x08" + end[1:]),
         {"peers": 1}, (2, 0, 0, 0)),
        (one(4, seen4=1), {"expired peers left out": 1}, (2, 0, 0, 0)),
    ]  # fmt: skip
    for text, counted, counts in cases:
        tracker, done = merge(text)
        assert done == {"swarms": 1, **counted}
        assert tracker.store.scrape([HASH], NOW) == {HASH: counts}
    assert tracker.store.last_seen(HASH, NOW) == NOW


@pytest.mark.parametrize(
    ("later", "overrides", "counted"),
    [
        (4199, {}, {"swarms": 2, "peers": 1, "expired peers left out": 1}),
        (10**7, {}, {"swarms": 2, "expired peers left out": 2}),
        (0, {"max_swarms": 1},
         {"swarms": 1, "peers": 2, "swarms left out by max_swarms": 1}),
        (0, {"track": "listed"}, {"swarms": 2, "peers": 2}),
    ],
)  # fmt: skip
def test_what_is_left_out_is_counted(merge, later, overrides, counted):
    assert merge(EXPORT, NOW + later, **overrides)[1] == counted


def test_a_swarm_of_several_lines_counts_once(merge):
    text = write([(HASH, 3, peers_of(1200)), (HASH[::-1], 3, peers_of(600))])
    assert merge(text, max_swarms=1, max_peers_per_address=0)[1] == {
        "swarms": 1,
        "peers": 1200,
        "swarms left out by max_swarms": 1,
    }


def test_memory_is_bounded(tmp_path):
    """4,000 swarms and one of 20,000 peers, in less than a quarter of their size."""
    path, few = tmp_path / "export", peers_of(2)
    swarms = [(number.to_bytes(20, "big"), 1, few) for number in range(4000)]
    many = (peer for _ in range(40) for peer in peers_of(500))
    tracemalloc.start()
    try:
        with open(path, "w") as file:
            store = Records([*swarms, (HASH, 1, many)])
            file.writelines(
                f"{n}\n" for n in bitbreeze.export_lines(store, lambda: NOW)
            )
        with open(path, "rb") as file:
            found = [len(each[-1:]) for each in bitbreeze.read_export(file)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 4040
    assert peak < path.stat().st_size / 4
