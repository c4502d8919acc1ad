"""Feeds: the torrents and the numbers for programs."""

import json

import feedparser
import libtorrent
from conftest import escape
from test_pages import MARKUP, put, site  # noqa: F401

BASE = "http://tracker.test"


def parsed(client, query=""):
    """Return the feed as a feed reader understands it."""
    status, headers, body = client.get("/feed.xml", query)
    assert status == "200 OK"
    assert headers["Content-Type"] == "application/rss+xml; charset=utf-8"
    found = feedparser.parse(body)
    assert not found.bozo and found.version == "rss20"
    return found


def listed(client, query=""):
    return json.loads(client.get("/torrents.json", query)[2])["torrents"]


def test_feed_has_the_newest_first(site):  # noqa: F811
    client = site("new", "old")
    feed, torrents = parsed(client), listed(client)
    assert feed.feed.title == "BitBreeze" and feed.feed.link == f"{BASE}/"
    for entry, torrent in zip(feed.entries, torrents, strict=True):
        assert entry.title == torrent["name"] and entry.link == torrent["page"]
        assert entry.id == f"urn:btih:{torrent['info_hash']}" and not entry.guidislink
        (enclosure,) = entry.enclosures
        assert enclosure.type == "application/x-bittorrent"
        assert (enclosure.href, enclosure.length) == (torrent["download"], "5")
        assert [tag.term for tag in entry.tags] == ["linux"]
        made = libtorrent.bdecode(client.get(enclosure.href.removeprefix(BASE))[2])
        assert str(libtorrent.torrent_info(made).info_hash()) == torrent["info_hash"]
        read = libtorrent.parse_magnet_uri(torrent["magnet"])
        assert str(read.info_hashes.v1) == torrent["info_hash"]
    assert [entry.title for entry in feed.entries] == ["new", "old"]
    assert feed.entries[0].published == "Tue, 14 Nov 2023 22:13:20 GMT"


def test_feed_of_a_search_and_of_a_category(site, tmp_path):  # noqa: F811
    put(tmp_path / "torrents/bsd", 5, "FreeBSD one", {}, {})
    client = site("one", "two")
    for query, found in (
        ("", ["one", "two", "FreeBSD one"]),
        ("q=one", ["one", "FreeBSD one"]),
        ("category=bsd", ["FreeBSD one"]),
        ("category=linux&q=one&sort=name&page=3", ["one"]),
        ("q=none", []),
    ):
        feed = parsed(client, query)
        assert [entry.title for entry in feed.entries] == found
        assert [each["name"] for each in listed(client, query)][: len(found)] == (
            found if "sort" not in query else ["one"]
        )
    assert parsed(client, "category=bsd&q=one").feed.title == "BitBreeze / bsd / one"


def test_feed_stays_short(site):  # noqa: F811
    client = site(*(f"n{number}" for number in range(120)))
    assert [entry.title for entry in parsed(client).entries] == [
        f"n{number}" for number in range(100)
    ]


def test_feed_is_sent_again_only_when_it_changes(site, tmp_path):  # noqa: F811
    client = site("a")
    _, headers, _ = client.get("/feed.xml")
    known = {"HTTP_IF_NONE_MATCH": headers["ETag"]}
    one = bytes.fromhex(listed(client)[0]["info_hash"])
    client.announce(1, info_hash=one)
    assert client.get("/feed.xml", **known)[0] == "304 NOT MODIFIED"
    assert client.get("/feed.xml", "q=b", **known)[0] == "200 OK"
    put(tmp_path / "torrents", 7, "b", {}, {})
    assert site().get("/feed.xml", **known)[0] == "200 OK"


def test_names_are_just_names(site):  # noqa: F811
    wild = [MARKUP, "a\u202eb\0c", "]]>&amp;<![CDATA["]
    client = site(*wild, folder="<b>")
    titles = [entry.title for entry in parsed(client).entries]
    assert b"<script" not in client.get("/feed.xml")[2]
    assert (
        titles[0].replace("&quot;", '"').replace("&gt;", ">").replace("&lt;", "<")
        == MARKUP
    )
    assert "a⟨U+202E⟩b⟨U+0000⟩c" in client.get("/feed.xml")[2].decode()
    assert [each["name"] for each in listed(client)] == wild
    parsed(client, f"q={escape(MARKUP.encode())}&category=%00%ff")


def test_json_of_a_torrent(site):  # noqa: F811
    files = [{b"length": 3, b"path": [b"d", b"f"]}, {b"length": 4, b"path": [b"g"]}]
    client = site(
        "a", info={"files": files, "length": None, "private": 1}, comment=b"hello"
    )
    one = listed(client)[0]["info_hash"]
    client.announce(1, info_hash=bytes.fromhex(one), left=0)
    client.announce(2, info_hash=bytes.fromhex(one))
    client.announce(2, info_hash=bytes.fromhex(one), left=0, event="completed")
    _, headers, body = client.get(f"/torrent/{one}.json")
    assert headers["Access-Control-Allow-Origin"] == "*"
    torrent = json.loads(body)
    assert torrent.pop("last_seen") > 1_700_000_000
    assert torrent == {
        "name": "a", "category": "linux", "size": 7, "info_hash": one,
        "info_hash_v2": None, "added": 1_700_000_000, "private": True,
        "seeders": 2, "leechers": 0, "partial_seeds": 0, "snatches": 1,
        "page": f"{BASE}/torrent/{one}", "download": f"{BASE}/torrent/{one}.torrent",
        "piece_length": 16384, "comment": "hello", "created": None, "created_by": "",
        "web_seeds": [], "magnet": None,
        "files": [{"path": ["d", "f"], "size": 3}, {"path": ["g"], "size": 4}],
    }  # fmt: skip


def test_stats_are_the_numbers_of_the_front_page(tracker):
    client = tracker()
    client.announce(1, left=0)
    client.announce(2, event="paused")
    _, headers, body = client.get("/stats.json")
    assert json.loads(body) == {
        "seeders": 1,
        "leechers": 1,
        "partial_seeds": 1,
        "snatches": 0,
        "swarms": 1,
    }
    assert headers["Access-Control-Allow-Origin"] == "*"
