"""Pages: the front page, and its numbers as JSON."""

import json

import bencoder
from conftest import Client, escape, peer_id

import app as bitbreeze

QUERY = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881&left=0"


def test_front_page(tracker):
    client = tracker(title="<ISOs & more>", notice="Back <soon>")
    client.announce(1, left=0)
    client.announce(2)
    status, _, body = client.get("/")
    page = body.decode()
    assert status == "200 OK"
    assert "<code>http://tracker.test/announce</code>" in page
    assert "&lt;ISOs &amp; more&gt;" in page and "Back &lt;soon&gt;" in page
    for name in ("seeders", "leechers", "swarms"):
        assert f"<dt>{name}</dt><dd>1</dd>" in page


def test_stats_are_the_same_numbers(tracker):
    client = tracker()
    client.announce(1, left=0)
    client.announce(2, event="paused")
    _, headers, body = client.get("/stats.json")
    assert json.loads(body) == {
        **{"seeders": 1, "leechers": 1, "partial_seeds": 1, "snatches": 0, "swarms": 1}
    }
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_prefix_stands_in_the_announce_url(tmp_path):
    app = bitbreeze.create_app({"data": str(tmp_path)})

    def mounted(environ, start_response):
        return app({**environ, "SCRIPT_NAME": "/tracker"}, start_response)

    page = Client(mounted).get("/")[2].decode()
    assert "<code>http://tracker.test/tracker/announce</code>" in page
    assert 'href="/tracker/stats.json"' in page
    assert b"complete" in bencoder.bdecode(Client(mounted).get("/announce", QUERY)[2])


def test_front_page_says_what_is_tracked(tracker):
    assert b"any torrent that is announced" in tracker(track="any").get("/")[2]
    assert b"torrents of its own list only" in tracker(track="listed").get("/")[2]
