"""Listing: what is shown of the torrents, and in which order."""

import pytest
from conftest import NOW

from app import NOTHING, ORDERS, Counts, Listing, Torrent, folder_of, row_of, visible


def torrent_of(number, name="", folder="", v2=b""):
    """Return a Torrent whose size, age and hash come from a number."""
    return Torrent(
        *(f"{folder}/{number}.torrent".lstrip("/"), name or f"t{number}", number, 1),
        *(bytes([number]) * 20, v2, NOW - number, False),
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
def test_what_cannot_be_seen_is_made_visible(text, shown):
    assert visible(text) == shown


def test_a_row_is_a_torrent_with_its_counts():
    torrent = torrent_of(1, "A\u202eb", "linux/isos")
    row = row_of(torrent, {b"\1" * 20: Counts(1, 2, 1, 3)})
    assert row.name == "A⟨U+202E⟩b" and row.category == "linux/isos"
    assert row.counts == (1, 2, 1, 3) and row.id == "01" * 20
    assert row_of(torrent, {}).counts == NOTHING


def test_a_hybrid_is_in_two_swarms_and_counts_once():
    torrent = torrent_of(1, v2=b"v" * 32)
    counts = {b"\1" * 20: Counts(3, 1, 0, 5), b"v" * 20: Counts(2, 4, 1, 1)}
    assert row_of(torrent, counts).counts == (3, 4, 1, 5)
    only_v2 = row_of(torrent._replace(v1=b""), counts)
    assert only_v2.counts == (2, 4, 1, 1) and only_v2.id == b"v".hex() * 32


def test_a_folder_in_no_encoding_is_a_category():
    assert row_of(torrent_of(1, folder="\udcfc"), {}).category == "\ufffd"


TORRENTS = [
    torrent_of(1, "Debian 12 netinst", "linux/debian"),
    torrent_of(2, "debian 12 DVD", "linux/debian"),
    torrent_of(3, "Ubuntu", "linux"),
    torrent_of(4, "linux-libre"),
    torrent_of(5, "Ärger", "linuxoid"),
]
COUNTS = {bytes([n]) * 20: Counts(n % 3, n % 2, 0, 10 - n) for n in range(1, 6)}


def selected(*asked):
    """Return the numbers of the torrents that are selected."""
    rows = Listing(TORRENTS, COUNTS).select(*asked)
    return [row.torrent.size for row in rows]


@pytest.mark.parametrize(
    ("words", "category", "found"),
    [
        ("", "", [1, 2, 3, 4, 5]),
        ("debian", "", [1, 2]),
        ("12 DEBIAN dvd", "", [2]),
        ("ärger", "", [5]),
        ("linux", "", [1, 2, 3, 4, 5]),  # categories count, too
        ("", "linux", [1, 2, 3]),
        ("", "linux/debian", [1, 2]),
        ("dvd", "linux", [2]),
        ("dvd", "linux/arch", []),
        ("%", "", []),
    ],
)
def test_search_and_category(words, category, found):
    assert sorted(selected(words, category)) == found


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
def test_orders(order, found):
    assert selected("", "", order) == found
    assert order.lstrip("-") in ORDERS


def test_categories_are_those_that_have_torrents():
    assert Listing(TORRENTS, {}).categories == ["linux", "linux/debian", "linuxoid"]


def test_files_make_a_tree():
    files = [(("a", "b"), 1), (("c",), 2), (("a", "d", "e"), 4), (("a", "\n"), 8)]
    root = folder_of(files)
    assert (root.size, root.files) == (15, [("c", 2)])
    (a,) = root.folders
    assert (a.name, a.size, a.files) == ("a", 13, [("b", 1), ("⟨U+000A⟩", 8)])
    assert a.folders == [("d", 4, [], [("e", 4)])]


def test_a_path_deeper_than_templates_can_go_ends_in_one_name():
    folder, depth = folder_of([(("x",) * 5000, 1), (("x",), 2)]), 0
    while folder.folders:
        folder, depth = folder.folders[0], depth + 1
    assert depth == 20 and folder.files == [("/".join("x" * 4980), 1)]
