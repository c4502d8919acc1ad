"""The list: which torrents it shows, and in which order."""

import sys
from types import SimpleNamespace

import pytest
from conftest import NOW

from app import NO_COUNTS, Counts, ListQuery, Row, Torrent, create_app, visible


def torrent_of(number, name="", folder="", v2=""):
    """Return a Torrent whose size, age and hash come from a number."""
    return Torrent(
        *(f"{folder}/{number}.torrent".lstrip("/"), name or f"t{number}", number, 1),
        *(f"{number:02x}" * 20, v2, NOW - number, False),
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢字 שלום", "plain ü 漢字 שלום"),
        ("می\u200cخواهم 👩\u200d💻", "می\u200cخواهم 👩\u200d💻"),
        ("evil\u202egpj.exe", "evil⟨U+202E⟩gpj.exe"),
        ("\u2066a\u2069\u200f\u061c", "⟨U+2066⟩a⟨U+2069⟩⟨U+200F⟩⟨U+061C⟩"),
        ("a\nb\0\x1b[31m\x85", "a⟨U+000A⟩b⟨U+0000⟩⟨U+001B⟩[31m⟨U+0085⟩"),
        ("\udcff\ufffe\ufeff\U000e0041", "⟨U+DCFF⟩⟨U+FFFE⟩⟨U+FEFF⟩⟨U+E0041⟩"),
    ],
)
def test_visible_spells_out_invisible_characters(text, shown):
    assert visible(text) == shown


def test_row_has_torrent_and_counts():
    torrent = torrent_of(1, "A\u202eb", "linux/isos")
    row = Row(torrent, {b"\1" * 20: Counts(1, 2, 1, 3)})
    assert row.name == "A⟨U+202E⟩b" and row.category == "linux/isos"
    assert row.counts == (1, 2, 1, 3) and row.id == "01" * 20
    undecodable = Row(torrent_of(1, folder="\udcfc"), {})
    assert undecodable.counts == NO_COUNTS and undecodable.category == "\ufffd"


def test_row_of_a_hybrid_has_the_larger_counts():
    torrent = torrent_of(1, v2=b"v".hex() * 32)
    counts = {b"\1" * 20: Counts(3, 1, 0, 5), b"v" * 20: Counts(2, 4, 1, 1)}
    assert Row(torrent, counts).counts == (3, 4, 1, 5)
    only_v2 = Row(torrent._replace(v1=b""), counts)
    assert only_v2.counts == (2, 4, 1, 1) and only_v2.id == b"v".hex() * 32


TORRENTS = [
    torrent_of(1, "Debian 12 netinst", "linux/debian"),
    torrent_of(2, "debian 12 DVD", "linux/debian"),
    torrent_of(3, "Ubuntu", "linux"),
    torrent_of(4, "linux-libre"),
    torrent_of(5, "Ärger", "linuxoid"),
]
COUNTS = {bytes([n]) * 20: Counts(n % 3, n % 2, 0, 10 - n) for n in range(1, 6)}


@pytest.fixture
def app(tmp_path):
    """Return an application whose tracker has only what the list needs."""
    app = create_app({"data": str(tmp_path), "torrents": str(tmp_path)})
    torrents = {torrent.path: torrent for torrent in TORRENTS}
    catalogue = SimpleNamespace(changed=1, torrents=torrents)
    catalogue.refresh = lambda *_, **__: None
    snapshot = [(), COUNTS]
    app.tracker = SimpleNamespace(catalogue=catalogue, snapshot=lambda now: snapshot)
    return app


def numbers(rows):
    return [row.torrent.size for row in rows]


@pytest.mark.parametrize(
    ("words", "category", "found"),
    [
        ("", "", [1, 2, 3, 4, 5]),
        ("debian", "", [1, 2]),
        ("12 DEBIAN dvd", "", [2]),
        ("ärger", "", [5]),
        ("linux", "", [1, 2, 3, 4, 5]),  # a search looks at categories, too
        ("", "linux", [1, 2, 3]),
        ("", "linux/debian", [1, 2]),
        ("dvd", "linux", [2]),
        ("dvd", "linux/arch", []),
        ("%", "", []),
    ],
)
def test_search_and_category(app, words, category, found):
    rows, categories, _ = app.listing("size", NOW)
    assert numbers(ListQuery(words, category).select(rows)) == found
    assert categories == {"linux": 3, "linux/debian": 2, "linuxoid": 1}


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ("-added", [1, 2, 3, 4, 5]),
        ("added", [5, 4, 3, 2, 1]),
        ("name", [2, 1, 4, 3, 5]),
        ("-name", [5, 3, 4, 1, 2]),
        ("size", [1, 2, 3, 4, 5]),
        ("-size", [5, 4, 3, 2, 1]),
        ("-seeders", [2, 5, 1, 4, 3]),  # by name among the same
        ("leechers", [2, 4, 1, 3, 5]),
        ("completed", [5, 4, 3, 2, 1]),
    ],
)
def test_sort_orders(app, order, found):
    app.listing("completed", NOW)  # another order, which is kept beside this one
    assert numbers(app.listing(order, NOW)[0]) == found


def test_list_is_kept_until_it_changes(app):
    rows = app.listing("name", NOW)[0]
    assert app.listing("name", NOW)[0] is rows
    app.tracker.snapshot(NOW)[1] = {bytes([4]) * 20: Counts(9, 0, 0, 0)}
    assert numbers(app.listing("-seeders", NOW)[0])[0] == 4
    del app.tracker.catalogue.torrents[TORRENTS[0].path]
    app.tracker.catalogue.changed = 2
    assert numbers(app.listing("size", NOW)[0]) == [2, 3, 4, 5]


FOLDERS = {
    "many below one": lambda number: f"a/{number}",
    "deep": lambda number: "a/" + "x/" * (number % 1000) + "x",
    "one": lambda number: "a",
}


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_the_list_costs_the_same_for_each_torrent(app, folder):
    """Twice as many categories, levels or words do not cost four times as much."""
    catalogue, costs = app.tracker.catalogue, []
    for number in (1000, 2000):
        torrents = [torrent_of(each % 250, "t", folder(each)) for each in range(number)]
        catalogue.torrents = dict(enumerate(torrents))
        catalogue.changed += 1
        calls = []
        sys.setprofile(lambda *_, calls=calls: calls.append(1))
        try:
            rows, _, _ = app.listing("-added", NOW)
            found = ListQuery(q="t " * number, category="a").select(rows)
        finally:
            sys.setprofile(None)
        assert len(found) == number
        held = sum(
            map(sys.getsizeof, (each for row in rows for each in vars(row).values()))
        )
        costs.append((len(calls), held))
    for fewer, more in zip(*costs, strict=True):
        assert more < 3 * fewer
