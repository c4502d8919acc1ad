"""Feeds: the torrents and the totals for programs."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from xml.etree import ElementTree

import feedparser
import libtorrent
import pytest
from conftest import Client, escape
from prometheus_client.parser import text_string_to_metric_families
from servers import poll
from test_pages import MARKUP, put, site  # noqa: F401

import app as bitbreeze

BASE = "http://tracker.test"


def parsed(client, query=""):
    """Return the feed as feedparser reads it."""
    status, headers, body = client.get("/feed.xml", query)
    assert status == "200 OK"
    assert headers["Content-Type"] == "application/rss+xml; charset=utf-8"
    found = feedparser.parse(body)
    assert not found.bozo and found.version == "rss20"
    return found


def listed(client, query=""):
    return json.loads(get(client, query))["torrents"]


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
        names = [each["name"] for each in listed(client, query.replace("&page=3", ""))]
        assert names[: len(found)] == (found if "sort" not in query else ["one"])
    assert parsed(client, "category=bsd&q=one").feed.title == "BitBreeze / bsd / one"


def test_feed_of_torrents_without_seeders(site, tmp_path):  # noqa: F811
    client = site("alive", "dead", "older")
    put(tmp_path / "torrents", 0, "new", {}, {})
    os.utime(tmp_path / "torrents/0.torrent")
    client.app.tracker.catalogue.refresh(time.time() + 2, at_once=True)
    alive = next(each for each in listed(client) if each["name"] == "alive")
    client.announce(1, info_hash=bytes.fromhex(alive["info_hash"]), left=0)
    client.app.tracker._snapshot = 0, 0, None
    feed = parsed(client, "dead=1")
    assert [entry.title for entry in feed.entries] == ["dead", "older"]
    assert feed.feed.title == "BitBreeze / without seeders"
    assert len(parsed(client).entries) == 4


def test_an_item_says_size_files_and_magnet(site):  # noqa: F811
    client = site("a")
    (entry,) = parsed(client).entries
    size, files, link = entry.description.split(", ")
    assert (size, files) == ("5 Bytes", "files: 1")
    assert unescape(link) == listed(client)[0]["magnet"]


def test_feed_stays_short(site):  # noqa: F811
    names = [f"n{number}" for number in range(120)]
    client = site(*names)
    while client.app.tracker.catalogue.unread:
        client.app.tracker.catalogue.scan(int(time.time()))
    feed = parsed(client)
    assert [entry.title for entry in feed.entries] == names[:100]


def test_feed_is_not_sent_again_unchanged(site, tmp_path):  # noqa: F811
    client = site("a")
    _, headers, _ = client.get("/feed.xml")
    known = {"HTTP_IF_NONE_MATCH": headers["ETag"]}
    one = bytes.fromhex(listed(client)[0]["info_hash"])
    client.announce(1, info_hash=one)
    assert client.get("/feed.xml", **known)[0] == "304 NOT MODIFIED"
    assert client.get("/feed.xml", "q=b", **known)[0] == "200 OK"
    put(tmp_path / "torrents", 7, "b", {}, {})
    assert site().get("/feed.xml", **known)[0] == "200 OK"


def test_feed_contains_names_as_text(site):  # noqa: F811
    wild = [MARKUP, "a\u202eb\0c\ufffe", "שלום", "]]>&amp;<![CDATA["]
    shown = [MARKUP, "a⟨U+202E⟩b⟨U+0000⟩c⟨U+FFFE⟩", *wild[2:]]
    client = site(*wild, folder="<b>")
    body = client.get("/feed.xml")[2]
    items = ElementTree.fromstring(body).findall("channel/item")
    assert [item.findtext("title") for item in items] == shown
    assert {item.findtext("category") for item in items} == {"<b>"}
    entries = parsed(client, "category=%3Cb%3E").entries
    assert [unescape(entry.title) for entry in entries][:3] == shown[:3]
    assert [each["name"] for each in listed(client)] == wild
    parsed(client, f"q={escape(MARKUP.encode())}&category=%00%ff%EF%BF%BE%E2%80%AE")


def test_feed_title_is_text(tracker):
    feed = parsed(tracker(title="<T> & \x07"), "q=%3Cq%3E")
    assert feed.feed.title == "<T> & ⟨U+0007⟩ / <q>"


def test_a_torrent_with_an_old_time_is_in_the_feed(site, tmp_path):  # noqa: F811
    """After rsync -a, cp -p or unzip; readers may send a date, an ETag, or both."""
    client = site("one")
    (tmp_path / "data").mkdir()
    workers = [client, another_worker(tmp_path)]
    for each in workers:
        each.get("/feed.xml")
        os.utime(tmp_path / "data/torrents.json", (1_700_000_000,) * 2)  # long ago
        each.app.tracker.catalogue.refresh(time.time() + 2)
    _, headers, _ = client.get("/feed.xml")
    date, tag = headers["Last-Modified"], headers["ETag"]
    known = {"HTTP_IF_NONE_MATCH": tag, "HTTP_IF_MODIFIED_SINCE": date}
    for each in workers:
        assert each.get("/feed.xml", **known)[0] == "304 NOT MODIFIED"
        known.pop("HTTP_IF_NONE_MATCH", None)
    put(tmp_path / "torrents", 10**9, "old", {}, {})
    for each in workers:
        each.app.tracker.catalogue.refresh(time.time() + 4)
        for sent in (known, {"HTTP_IF_NONE_MATCH": tag, **known}):
            assert each.get("/feed.xml", **sent)[0] == "200 OK"
        assert each.get("/feed.xml")[1]["Last-Modified"] != date


def another_worker(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
    return Client(bitbreeze.create_app(folders))


def test_json_of_the_list_has_pages(site, tmp_path, monkeypatch):  # noqa: F811
    client, made = site(*map(str, range(120))), []
    poll(lambda: len(listed(client, "page=2")) == 20, 10, "all torrents")
    make = bitbreeze.Row.__init__
    monkeypatch.setattr(
        bitbreeze.Row, "__init__", lambda *given: [made.append(1), make(*given)][1]
    )
    pages = [listed(client, f"sort=name&page={page}") for page in (1, 2, 3)]
    assert [len(page) for page in pages] == [100, 20, 0]
    names = [torrent["name"] for page in pages for torrent in page]
    assert names == sorted(map(str, range(120)))
    found = json.loads(get(client, "q=11"))
    assert {each["name"] for each in found["torrents"]} >= {"11", "110", "111"}
    assert (found["page"], found["pages"]) == (1, 1)
    for host in ("a.test", "b.test:8000"):
        for torrent in json.loads(get(client, "q=1", HTTP_HOST=host))["torrents"]:
            assert torrent["page"].startswith(f"http://{host}/torrent/")
            assert torrent["download"] == f"{torrent['page']}.torrent"
            read = libtorrent.parse_magnet_uri(torrent["magnet"])
            assert read.trackers == [f"http://{host}/announce"]
    assert not made  # the rows are kept for all visitors
    _, headers, _ = client.get("/torrents.json")
    known = {"HTTP_IF_NONE_MATCH": headers["ETag"]}
    assert client.get("/torrents.json", **known)[::2] == ("304 NOT MODIFIED", b"")
    for query, host in (("q=1", "tracker.test"), ("", "a.test")):
        answer = client.get("/torrents.json", query, **known, HTTP_HOST=host)
        assert answer[0] == "200 OK"
    first = listed(client)[0]
    client.announce(1, info_hash=bytes.fromhex(first["info_hash"]))
    now = time.time() + 2
    monkeypatch.setattr(time, "time", lambda: now)
    assert client.get("/torrents.json", **known)[0] == "200 OK"
    assert listed(client)[0]["leechers"] == 1 and len(made) == 120
    tags = {
        each.get("/torrents.json")[1]["ETag"]
        for each in (client, another_worker(tmp_path))
    }
    assert len(tags) == 1


def get(client, query, **environ):
    return client.get("/torrents.json", query, **environ)[2]


def test_json_of_an_empty_list(tracker):
    found = json.loads(tracker().get("/torrents.json")[2])
    assert found == {"torrents": [], "page": 1, "pages": 0}


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
        "description": "",
        "progress": {"mean": None, "leechers": [0] * 10, "unknown": 0},
        "files": [{"path": ["d", "f"], "size": 3}, {"path": ["g"], "size": 4}],
    }  # fmt: skip


def test_stats_are_the_totals(tracker):
    client = tracker()
    client.announce(1, left=0)
    client.announce(2, event="paused")
    _, headers, body = client.get("/stats.json")
    numbers = json.loads(body)
    assert numbers == {
        "version": bitbreeze.__version__,
        "seeders": 1,
        "leechers": 1,
        "partial_seeds": 1,
        "snatches": 0,
        "swarms": 1,
    }
    assert headers["Access-Control-Allow-Origin"] == "*"


def measured(text):
    """Return a page of metrics as {(name, labels): number}, without the prefix."""
    return {
        (sample.name.removeprefix("bitbreeze_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(tracker):
    client = tracker(track="any")
    client.announce(1, left=0)
    client.announce(2, event="paused", address="2001:db8::1")
    client.announce(3, address="192.0.2.3", key="a")
    client.announce(3, address="2001:db8::3", key="a", port=0)
    client.announce(4, info_hash=b"i" * 20)
    client.announce(4, left=0, event="completed", info_hash=b"i" * 20)
    client.announce(4, left=0, event="stopped", info_hash=b"i" * 20)
    client.announce(5, port="x")
    client.scrape(b"h" * 20)
    status, headers, body = client.get("/metrics")
    assert status == "200 OK"
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    found = measured(body.decode())
    expected = {
        "swarms": 1,
        "seeders": 1,
        "leechers": 2,
        "partial_seeds": 1,
        "snatches": 1,
        "announces_total": 8,
        "scrapes_total": 1,
        "announce_duration_seconds_count": 8,
    }
    assert expected.items() <= {name: n for (name, *_), n in found.items()}.items()
    failures = {key[1]: n for key, n in found.items() if key[0] == "failures_total"}
    assert failures == {**dict.fromkeys(bitbreeze.FAILURES, 0), "request": 1}
    assert 0 < found["announce_duration_seconds_sum",] < 7


def test_metrics_have_types(tracker):
    text = tracker().get("/metrics")[2].decode()
    families = list(text_string_to_metric_families(text))
    gauges = ("swarms", "seeders", "leechers", "partial_seeds", "snatches")
    assert {family.name: family.type for family in families} == {
        **{f"bitbreeze_{name}": "gauge" for name in gauges},
        **{f"bitbreeze_{n}": "counter" for n in ("announces", "scrapes", "failures")},
        "bitbreeze_announce_duration_seconds": "summary",
    }
    assert all(family.samples for family in families)


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("module", "name", "broken", "reason"),
    [
        (os, "pwrite", lambda *_: 1, "No space left on device"),
        (bitbreeze.fcntl, "flock", no_locks, "No locks available"),
    ],
)
def test_health(tracker, monkeypatch, tmp_path, module, name, broken, reason):
    client = tracker()
    assert client.get("/health")[0] == "200 OK"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        status, headers, body = client.get("/health")
    assert status == "503 SERVICE UNAVAILABLE"
    assert headers["Cache-Control"] == "no-store"
    reason = f"peers cannot be stored: {reason}"
    assert json.loads(body) == {"status": "failing", "reason": reason}
    status, headers, body = client.get("/health")
    assert (status, json.loads(body)) == ("200 OK", {"status": "ok"})
    assert headers["Cache-Control"] == "no-store"
    assert not list((tmp_path / "data").iterdir())


def test_health_with_a_file_in_place_of_the_folder(tracker, tmp_path):
    (tmp_path / "data").write_bytes(b"")
    status, _, body = tracker().get("/health")
    assert status == "503 SERVICE UNAVAILABLE"
    assert json.loads(body)["reason"].endswith(": File exists")


def test_health_of_many_at_once(tracker):
    client = tracker()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.get, "/health") for _ in range(200)]
    assert {each.result()[0] for each in asked} == {"200 OK"}
