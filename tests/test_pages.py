"""Pages: the paths, methods and errors at the door, the front page and its numbers."""

import json
import logging

import bencoder
import pytest
from conftest import Client, escape, peer_id

import app as bitbreeze

QUERY = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881&left=0"


@pytest.mark.parametrize(
    "path",
    [
        "/announce",
        "/announce/",
        "/announce.php",
        "/announce.php/",
        "//announce",
        "/x/announce",
    ],
)
def test_announce_paths(tracker, path):
    status, headers, body = tracker().get(path, QUERY)
    assert status == "200 OK"
    assert bencoder.bdecode(body)[b"complete"] == 1
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/scrape", "/scrape/", "/scrape.php"])
def test_scrape_paths(tracker, path):
    assert b"files" in bencoder.bdecode(tracker().get(path, QUERY)[2])


@pytest.mark.parametrize(
    "path", ["/announcement", "/announce.html", "/peers", "/announce/x"]
)
def test_other_paths_are_not_found(tracker, path):
    assert tracker().get(path, QUERY)[0] == "404 NOT FOUND"


def test_head_is_get_without_body(tracker):
    client = tracker()
    status, headers, body = client.get("/announce", QUERY, method="HEAD")
    assert (status, body) == ("200 OK", b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/announce", "/scrape", "/"])
def test_other_methods_are_not_allowed(tracker, method, path):
    status, headers, _ = tracker().get(path, QUERY, method=method)
    assert status.upper() == "405 METHOD NOT ALLOWED"
    assert "GET" in headers["Allow"]


def test_flask_test_client_passes_the_same_door(tmp_path):
    app = bitbreeze.create_app({"data": str(tmp_path)})
    reply = app.test_client().get("/announce?" + QUERY)
    assert bencoder.bdecode(reply.data)[b"complete"] == 1


def test_refusals_are_200_with_a_reason(tracker):
    status, _, body = tracker().get("/announce", "info_hash=" + "ab" * 20)
    assert status == "200 OK"
    reply = bencoder.bdecode(body)
    assert (
        reply[b"failure reason"]
        == b"info_hash must be 20 bytes, these are 40: is it hex?"
    )
    assert (reply[b"interval"], reply[b"min interval"], reply[b"retry in"]) == (
        1800,
        300,
        30,
    )


def test_our_faults_are_logged_once_and_not_shown(tracker, caplog, monkeypatch):
    client = tracker()
    with monkeypatch.context() as patch:
        patch.setattr(client.app.tracker.store, "announce", lambda *_: {}["secret"])
        reply = client.announce(1)
    assert reply[b"failure reason"] == b"internal error"
    assert b"interval" in reply
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "KeyError: 'secret'" in caplog.text
    assert client.announce(1)[b"incomplete"] == 1


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
