"""Pages: what people see of the tracker and of its torrents."""

import os
import re

import bencoder
import libtorrent
import pytest
from conftest import Client, escape, peer_id
from test_torrents import info_of

import app as bitbreeze

QUERY = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881&left=0"
MARKUP = '"><script>alert(1)</script>'
ESCAPED = "&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.fixture
def site(tracker, tmp_path):
    """A function that makes an application with torrents, and returns its Client."""

    def make(*names, info=None, folder="linux", **keys):
        for number, name in enumerate(names):
            put(tmp_path / "torrents" / folder, number, name, info or {}, keys)
        return tracker()

    return make


def put(folder, number, name, info, keys):
    """Write a .torrent file, the lower its number the newer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}.torrent"
    metainfo = {b"info": info_of(name.encode(), **info)}
    metainfo |= {key.replace("_", " ").encode(): value for key, value in keys.items()}
    path.write_bytes(bencoder.bencode(metainfo))
    os.utime(path, (1_700_000_000 - number,) * 2)


def names(page):
    """Return the names in the list, as they are shown."""
    return re.findall(r"^<td><a [^>]*><bdi>(.*?)</bdi>", page, re.M)


def first_id(client):
    return re.search("torrent/([0-9a-f]{40})", text(client.get("/")))[1]


def text(answer):
    """Return the body of an answer of 200."""
    status, _, body = answer
    assert status == "200 OK", body.decode()
    return body.decode()


def test_front_page(tracker):
    client = tracker(title="<ISOs & more>", notice="Back <soon>")
    client.announce(1, left=0)
    client.announce(2)
    page = text(client.get("/"))
    assert "<code>http://tracker.test/announce</code>" in page
    assert "&lt;ISOs &amp; more&gt;" in page and "Back &lt;soon&gt;" in page
    for name in ("seeders", "leechers", "swarms"):
        assert f"<dt>{name}</dt><dd>1</dd>" in page
    assert "<table" not in page


def test_front_page_says_what_is_tracked(tracker):
    assert b"any torrent that is announced" in tracker(track="any").get("/")[2]
    assert b"torrents of its own list only" in tracker(track="listed").get("/")[2]


def test_prefix_stands_in_the_links(tmp_path, site):
    app = site("a").app

    def mounted(environ, start_response):
        return app({**environ, "SCRIPT_NAME": "/tracker"}, start_response)

    client = Client(mounted)
    page, one = text(client.get("/")), first_id(client)
    assert "<code>http://tracker.test/tracker/announce</code>" in page
    assert set(re.findall('(?:href|action)="/([^/?#"]*)', page)) == {"tracker"}
    page = text(client.get(f"/torrent/{one}"))
    assert set(re.findall('href="/([^/?#"]*)', page)) == {"tracker"}
    for path in (f"/torrent/{one}.torrent", "/announce"):
        assert bencoder.bdecode(client.get(path, QUERY)[2])


def test_the_list_has_what_the_folder_has(site, tmp_path):
    client = site("one", "two")
    assert names(text(client.get("/"))) == ["one", "two"]
    one = bytes.fromhex(first_id(client))
    client.announce(1, info_hash=one, left=0)
    client.announce(2, info_hash=one)
    client.announce(2, info_hash=one, left=0, event="completed")
    page = text(client.get("/"))
    row = re.search("<tr>\n<td>.*?</tr>", page, re.S)[0]  # that of two is of class dead
    assert re.findall("<td>([^<]*)</td>", row)[:4] == ["5 B", "2", "0", "1"]
    assert page.count("nobody seeds it") == 1
    (tmp_path / "deny.txt").write_text(one.hex())
    assert names(text(site().get("/"))) == ["two"]
    assert site().get(f"/torrent/{one.hex()}")[0] == "404 NOT FOUND"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["b", "a", "c"]),
        ("sort=name", ["a", "b", "c"]),
        ("sort=-name", ["c", "b", "a"]),
        ("q=A", ["a"]),
        ("q=nothing+like+it", []),
        ("category=linux", ["b", "a", "c"]),
        ("category=windows", []),
        ("page=9", ["b", "a", "c"]),  # the last there is
        ("sort=--name&page=-1&q=%ff&category=", []),
        ("sort=evil&page=99999999999999999999", ["b", "a", "c"]),
        ("page=%C2%B2&sort=", ["b", "a", "c"]),
        (f"q={'x' * 5000}", []),
    ],
)
def test_what_is_asked_for(site, query, found):
    assert names(text(site("b", "a", "c").get("/", query))) == found


def test_a_hundred_to_a_page(site):
    client = site(*(f"n{number:03}" for number in range(250)))
    seen, query = [], "sort=name&q=n"
    while query:
        page = text(client.get("/", query))
        assert len(names(page)) in (100, 50)
        seen += names(page)
        following = re.search('href="/[?]([^"]*)#torrents" rel="next"', page)
        query = following and following[1].replace("&amp;", "&")
    assert seen == [f"n{number:03}" for number in range(250)]
    previous = re.search('href="/[?]([^"]*)#torrents" rel="prev"', page)[1]
    page = text(client.get("/", previous.replace("&amp;", "&")))
    assert names(page)[0] == "n100"


def test_headings_sort_and_turn_round(site):
    client, query = site("b", "a", "c"), ""

    def heading():
        page = text(client.get("/", query))
        found = re.search(
            '<th scope="col"([^>]*)>\\s*<a href="/[?]?([^#]*)#t[^>]*>Name', page
        )
        return found[1], found[2].replace("&amp;", "&"), names(page)

    state, query, _ = heading()
    assert state == ""
    state, query, listed = heading()
    assert state == ' aria-sort="ascending"' and listed == ["a", "b", "c"]
    state, query, listed = heading()
    assert state == ' aria-sort="descending"' and listed == ["c", "b", "a"]


DETAILS = {
    "comment": b"First <line>\nSecond\x07",
    "created_by": b"maker <1>",
    "creation_date": 1_600_000_000,
    "url-list": [b"https://mirror.test/?a&b"],
}


def test_page_of_a_torrent(site):
    files = [
        {b"length": 1500, b"path": [b"dir", b"<inner>"]},
        {b"length": 7, b"path": [b"dir", b"b"]},
        {b"length": 9, b"path": [b"..", b"..", b"etc", b"passwd"]},
    ]
    info = {"files": files, "length": None, "private": 1, "piece length": 2**20}
    client = site("all of it", info=info, **DETAILS)
    one = first_id(client)
    client.announce(1, info_hash=bytes.fromhex(one), left=0)
    page = text(client.get(f"/torrent/{one.upper()}"))
    for expected in (
        *("<bdi>all of it</bdi>", "1.5 KiB\n  (1,516 bytes)", "<dd>1.0 MiB</dd>"),
        *(f"<code>{one}</code>", "First &lt;line&gt;\nSecond⟨U+0007⟩"),
        *("maker &lt;1&gt;", "2023-11-14 22:13 UTC", "2020-09-13 12:26 UTC"),
        *("https://mirror.test/?a&amp;b", "this\n  tracker only"),
        *("<bdi>&lt;inner&gt;</bdi>", "<bdi>etc</bdi>", "1.5 KiB"),
        f"/torrent/{one}.torrent",
        "<dt>seeders</dt><dd>1</dd>",
    ):
        assert expected in page, expected
    assert re.search("Last seen</dt><dd>20[2-9]", page)
    assert "Nobody seeds it" not in page


def test_a_private_torrent_has_no_magnet_link(site):
    """Clients give the metadata of such to nobody: the link would never start."""
    client = site("open", info={"private": 0})
    one = first_id(client)
    for path in ("/", f"/torrent/{one}"):
        assert f"magnet:?xt=urn:btih:{one}&amp;dn=open" in text(client.get(path))
    client = site("private", info={"private": 1})
    for path in ("/", f"/torrent/{first_id(client)}"):
        assert "magnet:" not in text(client.get(path))


def test_many_files_are_not_all_on_the_page(site):
    files = [{b"length": n, b"path": [b"f%d" % n]} for n in range(2500)]
    client = site("a", info={"files": files, "length": None})
    page = text(client.get(f"/torrent/{first_id(client)}"))
    assert page.count("<bdi>f") == 2000 and "And 500 more:" in page


@pytest.mark.parametrize("name", [MARKUP, "a\u202eb", "..", "/etc/passwd", "a" * 500])
def test_a_name_is_just_a_name(site, name):
    client = site(name, folder="more/<b>", comment=name.encode())
    one = first_id(client)
    for path in ("/", f"/torrent/{one}"):
        for query in ("", f"q={MARKUP}&category={MARKUP}&sort={MARKUP}"):
            page = text(client.get(path, query))
            assert "<script" not in page and "<b>/" not in page
            assert "\u202e" not in page
    assert ESCAPED in text(client.get("/", f"q={MARKUP}"))
    assert (ESCAPED in text(client.get(f"/torrent/{one}"))) == (name == MARKUP)


def test_download_is_the_torrent_with_our_announce_url(site):
    client = site("ISO: größe/1", announce=b"http://other.test/announce")
    one = first_id(client)
    status, headers, body = client.get(f"/torrent/{one}.torrent")
    assert status == "200 OK"
    assert headers["Content-Type"] == "application/x-bittorrent"
    named = "filename*=UTF-8''ISO_%20gr%C3%B6%C3%9Fe_1.torrent"
    assert headers["Content-Disposition"].startswith("attachment;")
    assert named in headers["Content-Disposition"]
    read = libtorrent.torrent_info(libtorrent.bdecode(body))
    assert str(read.info_hash()) == one
    trackers = bencoder.bdecode(body)[b"announce-list"]
    assert trackers == [
        [b"http://tracker.test/announce"],
        [b"http://other.test/announce"],
    ]


@pytest.mark.parametrize(("name", "file"), [("a", "a"), ("..", ""), (MARKUP, "___sc")])
def test_download_is_named_after_the_torrent(site, name, file):
    client = site(name)
    one = first_id(client)
    said = client.get(f"/torrent/{one}.torrent")[1]["Content-Disposition"]
    assert re.search(f'filename="?{file or one}', said), said


def test_download_is_sent_once_only(site):
    client = site("a")
    path = f"/torrent/{first_id(client)}.torrent"
    _, headers, _ = client.get(path)
    assert headers["Last-Modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    for condition in (
        {"HTTP_IF_NONE_MATCH": headers["ETag"]},
        {"HTTP_IF_MODIFIED_SINCE": headers["Last-Modified"]},
    ):
        status, _, body = client.get(path, **condition)
        assert (status, body) == ("304 NOT MODIFIED", b"")
    # Under another name of the tracker it is another file.
    condition = {"HTTP_IF_NONE_MATCH": headers["ETag"], "HTTP_HOST": "other.test"}
    assert b"http://other.test/announce" in client.get(path, **condition)[2]


@pytest.mark.parametrize("kind", ["v1", "v2", "hybrid"])
def test_both_hashes_of_a_torrent_lead_to_it(tracker, tmp_path, kind):
    flags = {"v1": libtorrent.create_torrent.v1_only,
             "v2": libtorrent.create_torrent.v2_only, "hybrid": 0}  # fmt: skip
    (tmp_path / "payload").write_bytes(b"x" * 20000)
    files = libtorrent.list_files(str(tmp_path / "payload"))
    made = libtorrent.create_torrent(files, 16384, flags[kind])
    libtorrent.set_piece_hashes(made, str(tmp_path))
    (tmp_path / "torrents").mkdir()
    data = libtorrent.bencode(made.generate())
    (tmp_path / "torrents/a.torrent").write_bytes(data)
    client = tracker()
    both = libtorrent.torrent_info(libtorrent.bdecode(data)).info_hashes()
    shown = [str(both.v1)] * both.has_v1() + [str(both.v2)] * both.has_v2()
    for info_hash in (hashes := [*shown, *(each[:40] for each in shown)]):
        page = text(client.get(f"/torrent/{info_hash}"))
        assert all(f"<code>{each}</code>" in page for each in shown)
        body = client.get(f"/torrent/{info_hash}.torrent")[2]
        read = libtorrent.torrent_info(libtorrent.bdecode(body)).info_hashes()
        assert (read.v1, read.v2) == (both.v1, both.v2)
    wrong = hashes[-1][:40] + "0" * 24
    assert client.get(f"/torrent/{wrong}")[0] == "404 NOT FOUND"


@pytest.mark.parametrize(
    "path", ["00" * 20, "00" * 32, "x", "..", "%2e%2e", "00", "é", "00" * 20 + ".json"]
)
@pytest.mark.parametrize("end", ["", ".torrent", ".json"])
def test_what_is_not_listed_is_not_found(site, path, end):
    status, _, body = site("a").get(f"/torrent/{path}{end}")
    assert status == "404 NOT FOUND"
    assert b"<h1>Not Found</h1>" in body


def test_a_file_that_is_being_replaced_is_not_found(site, tmp_path):
    client = site("a")
    one = first_id(client)
    (tmp_path / "torrents/linux/0.torrent").write_bytes(b"d4:")
    status, _, body = client.get(f"/torrent/{one}.torrent")
    assert status == "404 NOT FOUND" and b"being replaced" in body


def test_browsers_are_told_to_run_and_load_nothing(site):
    client = site("a")
    one = first_id(client)
    style = re.search("<style>(.*?)</style>", text(client.get("/")), re.S)[1]
    hashed = bitbreeze.sha256(style.encode()).digest()
    told = bitbreeze.base64.b64encode(hashed).decode()
    for path in ("/", f"/torrent/{one}", f"/torrent/{one}.torrent", "/feed.xml",
                 "/torrents.json", "/nothing"):  # fmt: skip
        _, headers, body = client.get(path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert told in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert not re.search(rb"<script|style=|\son\w+=|src=", body)


def test_our_own_faults_are_not_shown(site, monkeypatch, caplog):
    client = site("a")
    monkeypatch.setattr(bitbreeze.Listing, "select", lambda *_: 1 / 0)
    status, _, body = client.get("/")
    assert status == "500 INTERNAL SERVER ERROR"
    assert b"ZeroDivisionError" not in body and b"<h1>" in body
    assert len([r for r in caplog.records if r.exc_info]) == 1


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 * 1024, "150 KiB")),
        *((2**20 - 1, "1024 KiB"), (5 * 2**30, "5.0 GiB"), (2**62, "4096 PiB")),
    ],
)
def test_sizes(size, shown):
    assert bitbreeze.size_text(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((-5, "now"), (0, "now"), (1, "1 second"), (119, "1 minute")),
        *((7200, "2 hours"), (86400 * 3, "3 days"), (86400 * 800, "2 years")),
    ],
)
def test_spans(seconds, shown):
    assert bitbreeze.span_text(seconds) == shown
