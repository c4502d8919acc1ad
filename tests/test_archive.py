"""Archive: what is worth keeping goes into a document, and comes out of it the same."""

import io
import json
import random
import tracemalloc

import pytest
from conftest import NOW, kept, make_settings, peer_id, rewrite
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app as bitbreeze

HASH = b"\xabcdefghijklmnopqrstu"
PARTIAL, SNATCHED = bitbreeze.PARTIAL, bitbreeze.SNATCHED
SAMPLES = [bitbreeze.Sample(1, 2, 3, NOW - 7200), bitbreeze.Sample(4, 5, 6, NOW - 3600)]
# A document of version 1, as it is on the disks of those who export: read for ever.
DOCUMENT = """\
{"format": "BitBreeze", "version": 1, "made": 1800000000,
"history": [{"seeders": 1, "leechers": 2, "swarms": 3, "time": 1799996400}],
"swarms": [
{"info_hash": "6161616161616161616161616161616161616161", "snatches": 7, "peers": [\
{"peer_id": "2d4242303030312d303030303030303030303031", "key": 5, "seeder": true, \
"partial": false, "snatched": true, "endpoint4": "192.0.2.1:6881", "seen4": 1799999999\
}, {"peer_id": "2d4242303030312d303030303030303030303032", "key": 0, "seeder": false, \
"partial": true, "snatched": false, "endpoint6": "[2001:db8::1]:0", "seen6": 1799999998\
}]},
{"info_hash": "6262626262626262626262626262626262626262", "snatches": 9, "peers": []}
]
}
"""
READ = [
    bitbreeze.Sample(1, 2, 3, 1799996400),
    (
        b"a" * 20,
        7,
        [
            (
                bitbreeze.Record(
                    *(peer_id(1), 5, SNATCHED, NOW - 1, 0),
                    *(bytes.fromhex("c0000201 1ae1"), bytes(18)),
                ),
                True,
            ),
            (
                bitbreeze.Record(
                    *(peer_id(2), 0, PARTIAL, 0, NOW - 2),
                    *(bytes(6), bytes.fromhex("20010db8") + bytes(11) + b"\1\0\0"),
                ),
                False,
            ),
        ],
    ),
    (b"b" * 20, 9, []),
]


def read(text):
    data = text if isinstance(text, bytes) else text.encode()
    return list(bitbreeze.read_archive(io.BytesIO(data)))


def write(swarms, samples=SAMPLES):
    file = io.StringIO()
    counted = bitbreeze.write_archive(file, swarms, samples, NOW)
    return file.getvalue(), counted


def peers_of(number):
    """Return so many seeders, each with an IPv4 endpoint of its own."""
    found = []
    for peer in range(number):
        end4 = b"\x0a" + peer.to_bytes(3, "big") + (2000 + peer).to_bytes(2, "big")
        record = bitbreeze.Record(peer_id(peer), 5, 0, NOW, 0, end4, bytes(18))
        found.append((record, True))
    return found


# -- Documents


def test_version_1_is_read():
    assert read(DOCUMENT) == READ


def test_version_1_is_written():
    assert write(READ[1:], READ[:1]) == (DOCUMENT, (2, 2))


LAYOUTS = {
    "indented": lambda document: json.dumps(document, indent=2),
    "in one line": json.dumps,
    "compact": lambda document: json.dumps(document, separators=(",", ":")),
    "sorted": lambda document: json.dumps(document, sort_keys=True),
    "by jq": lambda document: json.dumps(document, indent=2) + "\n",
    "with more": lambda document: json.dumps({**document, "more": [1]}),
    "of Windows": lambda _: DOCUMENT.replace("\n", "\r\n"),
    "without the last newline": lambda _: DOCUMENT.rstrip(),
    "with another line": lambda _: DOCUMENT.replace('"his', '"more": {},\n"his'),
    "without history": lambda _: "".join(
        line for line in DOCUMENT.splitlines(True) if "history" not in line
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts_are_read(layout):
    found = read(layout(json.loads(DOCUMENT)))
    assert found == READ or found == READ[1:] and layout is LAYOUTS["without history"]


seen = st.integers(1, 2**32 - 1)
end4, end6 = (st.binary(min_size=size, max_size=size) for size in (6, 18))
families = [
    st.tuples(seen, st.just(0), end4, st.just(bytes(18))),
    st.tuples(st.just(0), seen, st.just(bytes(6)), end6),
    st.tuples(seen, seen, end4, end6),
]
ids = st.binary(min_size=20, max_size=20)
states = st.sampled_from([(0, 1), (0, 0), (SNATCHED, 1), (PARTIAL, 0), (SNATCHED, 0)])
peers = st.tuples(ids, st.integers(0, 2**32 - 1), states, st.one_of(families)).map(
    lambda it: (bitbreeze.Record(it[0], it[1], it[2][0], *it[3]), bool(it[2][1]))
)
swarms = st.tuples(ids, st.integers(0, 2**63), st.lists(peers, max_size=5))


def unreachable(record):
    """Return a Record as an announce would have it: port 1 is as good as none."""
    ends = [end[:-2] + bytes(2) if end[-2:] == b"\0\1" else end for end in record[5:]]
    return bitbreeze.Record(*record[:5], *ends)


@given(st.lists(swarms, max_size=5))
@hypothesis_settings(deadline=None)
def test_what_is_written_is_read(given_swarms):
    text, (number, total) = write(given_swarms)
    kept = [(i, n, [(unreachable(r), s) for r, s in p]) for i, n, p in given_swarms]
    assert read(text) == [*SAMPLES, *kept]
    assert read(json.dumps(json.loads(text))) == [*SAMPLES, *kept]
    assert (number, total) == (len(kept), sum(len(peers) for _, _, peers in kept))


@pytest.mark.parametrize(
    ("number", "lines"), [(0, 1), (499, 1), (500, 1), (501, 2), (1700, 4)]
)
def test_many_peers_are_several_lines(number, lines):
    text, counted = write([(HASH, 3, iter(peers_of(number)))])
    assert counted == (1, number)
    parts = read(text)[2:]
    assert len(parts) == len(json.loads(text)["swarms"]) == lines
    assert {part[:2] for part in parts} == {(HASH, 3)}
    assert [peer for part in parts for peer in part.peers] == peers_of(number)


# -- What is no document


def changed(old, new):
    assert DOCUMENT.count(old) >= 1
    return DOCUMENT.replace(old, new, 1)


END = DOCUMENT.index('{"info_hash": "6262')
DAMAGED = {
    "empty": ("", "it is not JSON"),
    "a page": ("<html>\n</html>\n", "it is not JSON"),
    "compressed": (b"\x1f\x8b\x08\0\xff\xff", "it is not JSON"),
    "another document": ('{"swarms": []}', "app.py export did not write it"),
    "a list": ("[]", "app.py export did not write it"),
    "deep": ("[" * 100_000, "it is not JSON"),
    "newer": (changed('ion": 1', 'ion": 2'), "made by a newer BitBreeze, in format 2"),
    "newer, laid out anew": (
        '{"format": "BitBreeze", "version": 3, "from here on": "all is new"',
        "made by a newer BitBreeze, in format 3: upgrade this one",
    ),
    "newer, indented": (
        '{\n"format": "BitBreeze", "version": 4}',
        "made by a newer BitBreeze, in format 4: upgrade this one",
    ),
    "no version": (changed('"version": 1, ', ""), "version is not a whole number"),
    "cut short": (DOCUMENT[:END], "it is cut short in line 5"),
    "cut in a line": (DOCUMENT[: END + 9], "it is cut short in line 5"),
    "cut at the end": (DOCUMENT[:-3], "it is cut short in line 6"),
    "cut at a comma": (DOCUMENT[: END - 1], "it is cut short in line 4"),
    "twice": (DOCUMENT * 2, "something stands behind its end in line 7"),
    "not UTF-8": (DOCUMENT.encode().replace(b"seeders", b"\xff"), "line 2 is not JSON"),
    "no comma": (changed('"key": 5,', '"key": 5'), "line 4 is not JSON"),
    "not hex": (changed("2d42", "2d4g"), "line 4: peer_id is not 40 hex digits"),
    "short hash": (changed("6262", "62"), "line 5: info_hash is not 40 hex digits"),
    "spaced": (changed("6262", "62  "), "line 5: info_hash is not 40 hex digits"),
    "peer": (changed('"peers": []', '"peers": [1]'), "line 5: peer_id is not 40"),
    "peers": (changed('"peers": []', '"peers": {}'), "line 5: peers is not a list"),
    "swarm": (changed(DOCUMENT[END:-5], "[]"), "line 5: info_hash is not 40 hex"),
    "big key": (changed('"key": 5', '"key": 4294967296'), "line 4: key is not a whole"),
    "true": (changed('"key": 5', '"key": true'), "line 4: key is not a whole number"),
    "negative": (changed('"snatches": 9', '"snatches": -9'), "line 5: snatches is not"),
    "flag": (changed('"seeder": true', '"seeder": 1'), "line 4: seeder, partial or"),
    "address": (changed("192.0.2.1", "192.0.2.256"), "line 4: endpoint4 is not"),
    "family": (changed("192.0.2.1", "::1"), "line 4: endpoint4 is not"),
    "port": (changed(":6881", ":65536"), "line 4: endpoint4 is not"),
    "no port": (changed(":6881", ""), "line 4: endpoint4 is not"),
    "an endpoint": (changed('"192.0.2.1:6881"', "7"), "line 4: endpoint4 is not"),
    "never seen": (changed(', "seen4": 1799999999', ""), "line 4: seen4 is not a"),
    "history": (changed('"leechers": 2', '"leechers": 2.5'), "line 2: leechers is"),
    "a long line": (changed("6262", "6" * 2**20), "line 5 is not JSON"),
    "long, reformatted": ("[" + " " * 2**25, "its lines are not those that app"),
    "no swarms": ('{"version": 1, "format": "BitBreeze"}', "swarms is not a list"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_is_said_in_a_sentence(text, sentence):
    with pytest.raises(bitbreeze.ArchiveError) as raised:
        read(text)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 120


def test_a_document_cut_anywhere_is_refused():
    for length in range(len(DOCUMENT) - 1):
        with pytest.raises(bitbreeze.ArchiveError):
            read(DOCUMENT[:length])


@given(st.integers(0, 2**32))
@hypothesis_settings(deadline=None)
def test_whatever_is_read_nothing_else_is_raised(seed):
    rnd, data = random.Random(seed), bytearray(DOCUMENT.encode())
    for _ in range(rnd.randrange(1, 4)):
        data[rnd.randrange(len(data))] = rnd.choice(b'"[]{},:0\n\xff')
    try:
        read(bytes(data))
    except bitbreeze.ArchiveError:
        pass


# -- Merging


@pytest.fixture
def merge(tmp_path):
    """A function that merges a document, and returns the Merging."""

    def merge(text, now=NOW, **overrides):
        folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
        settings = make_settings(**folders, **overrides)
        merging = bitbreeze.Merging(bitbreeze.open_tracker(settings))
        for each in read(text):
            merging.merge(each, now)
        return merging

    return merge


def test_a_document_is_merged(merge):
    for words in (
        "2 swarms with 2 peers and 1 hours of history",
        "2 swarms with 2 peers",  # the history is there
    ):
        merging = merge(DOCUMENT)
        assert merging.in_words() == words
        found = dict(merging.tracker.store.swarms(NOW))
        assert found == {b"a" * 20: (1, 1, 1, 7), b"b" * 20: (0, 0, 0, 9)}
        assert merging.tracker.history.samples(NOW) == READ[:1]
    text, counted = write(merging.tracker.store.records(NOW), READ[:1])
    assert counted == (2, 2)
    assert sorted(text) == sorted(DOCUMENT)  # in any order


@pytest.mark.parametrize(
    ("later", "overrides", "words"),
    [
        (4199, {}, ("2 swarms with 1 peers and 1 hours of history;"
                   " left out are 1 peers (not seen for 4200 seconds)")),
        (10**7, {}, ("2 swarms with 0 peers;"
                    " left out are 2 peers (not seen for 4200 seconds)")),
        (0, {"max_swarms": 1}, ("1 swarms with 2 peers and 1 hours of history;"
                               " left out are 1 swarms (this tracker is full)")),
        (0, {"max_peers": 1}, ("2 swarms with 1 peers and 1 hours of history; left out"
                              " are 1 peers (max_peers or max_peers_per_address)")),
        (0, {"track": "listed"}, "2 swarms with 2 peers and 1 hours of history"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_counted(merge, later, overrides, words):
    assert merge(DOCUMENT, NOW + later, **overrides).in_words() == words


def test_what_newer_versions_keep_here_is_left_out(merge, tmp_path):
    tracker = merge(DOCUMENT).tracker
    data = tmp_path / "data"
    rewrite(data, b"a" * 20, lambda page: b"swrm\2" + page[5:])
    with open(data / "history", "r+b") as file:
        file.write(b"hist\2")
    assert merge(DOCUMENT).in_words() == (
        "1 swarms with 0 peers; left out are 1 hours of history (a newer BitBreeze"
        " keeps it here), 1 swarms (a newer version of this tracker keeps this swarm)"
    )
    path, at = kept(data)[b"a" * 20]
    assert path.read_bytes()[at : at + 5] == b"swrm\2"
    assert dict(tracker.store.swarms(NOW)) == {b"b" * 20: (0, 0, 0, 9)}


def test_a_swarm_of_several_lines_counts_once(merge):
    text, _ = write([(HASH, 3, peers_of(1200)), (HASH[::-1], 3, peers_of(600))])
    assert merge(text, max_swarms=1, max_peers_per_address=0).in_words() == (
        "1 swarms with 1200 peers and 2 hours of history;"
        " left out are 1 swarms (this tracker is full)"
    )


def test_memory_is_bounded(tmp_path):
    """10,000 swarms and one of 20,000 peers, in less than a quarter of their size."""
    path, few = tmp_path / "document", peers_of(2)
    swarms = [(number.to_bytes(20, "big"), 1, few) for number in range(10_000)]
    tracemalloc.start()
    try:
        with open(path, "w") as file:
            many = (peer for _ in range(40) for peer in peers_of(500))
            bitbreeze.write_archive(file, [*swarms, (HASH, 1, many)], [], NOW)
        with open(path, "rb") as file:
            assert (
                sum(len(each.peers) for each in bitbreeze.read_archive(file)) == 40_000
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4
