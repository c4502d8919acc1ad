"""Pages: what people see of the tracker and its torrents."""

import base64
import json
import os
import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote, unquote_to_bytes
from xml.etree import ElementTree

import bencoder
import libtorrent
import pytest
from conftest import Client, escape, peer_id
from servers import poll
from test_torrents import info_of, torrent_of

import app as bitbreeze

QUERY = f"info_hash={escape(b'h' * 20)}&peer_id={escape(peer_id(1))}&port=6881&left=0"
MARKUP = '"><script>alert(1)</script>'
ESCAPED = "&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.fixture
def site(tracker, tmp_path):
    """Return a function that returns the Client of an application with torrents."""

    def make(*names, info=None, folder="linux", **keys):
        for number, name in enumerate(names):
            put(tmp_path / "torrents" / folder, number, name, info or {}, keys)
        return tracker()

    return make


def put(folder, number, name, info, keys):
    """Write a .torrent file; a file with a lower number is newer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}.torrent"
    metainfo = {b"info": info_of(name.encode(), **info)}
    metainfo |= {key.replace("_", " ").encode(): value for key, value in keys.items()}
    path.write_bytes(bencoder.bencode(metainfo))
    os.utime(path, (1_700_000_000 - number,) * 2)


def names(page):
    """Return the names in the list, as the page shows them."""
    found = re.findall(r"^<tr><td><a [^>]*>(.*?)</a>", page, re.M)
    return [name.replace("<wbr>", "") for name in found]


def first_id(client):
    return re.search("torrent/([0-9a-f]{40})", text(client.get("/")))[1]


def text(answer):
    """Return the body of an answer with status 200, without soft breaks."""
    status, _, body = answer
    assert status == "200 OK", body.decode()
    return body.decode().replace("<wbr>", "")


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
    assert b"it tracks any\ntorrent" in tracker(track="any").get("/")[2]
    assert b"tracks only the torrents on" in tracker(track="listed").get("/")[2]


def test_links_contain_the_prefix(tmp_path, site):
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


def test_list_shows_the_folder(site, tmp_path):
    client = site("one", "two")
    assert names(text(client.get("/"))) == ["one", "two"]
    one = bytes.fromhex(first_id(client))
    client.announce(1, info_hash=one, left=0)
    client.announce(2, info_hash=one)
    client.announce(2, info_hash=one, left=0, event="completed")
    page = text(client.get("/"))
    row = re.search("^<tr><td>.*", page, re.M | re.S)[0]
    assert re.findall("<td[^>]*>([^<]*)</td>", row)[:4] == ["5 Bytes", "2", "0", "1"]
    assert page.count("class=bad") == 1
    (tmp_path / "deny.txt").write_text(one.hex())
    assert names(text(site().get("/"))) == ["two"]
    assert site().get(f"/torrent/{one.hex()}")[0] == "404 NOT FOUND"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["b", "a", "c"]),
        ("sort=-name&category=linux", ["c", "b", "a"]),
        ("q=A", ["a"]),
        ("category=windows", []),
        ("page=9", ["b", "a", "c"]),  # the last page
        ("sort=--name&page=-1&q=%ff&category=", []),
        ("sort=evil&page=99999999999999999999", ["b", "a", "c"]),
        ("page=%C2%B2&sort=", ["b", "a", "c"]),
        (f"q={'x' * 5000}", []),
    ],
)
def test_search_sort_and_category(site, query, found):
    assert names(text(site("b", "a", "c").get("/", query))) == found


def test_page_has_100_torrents(site):
    client = site(*(f"n{number:03}" for number in range(250)))
    # A request reads files for a short time only: on a busy computer, not all of them.
    poll(lambda: "still to read" not in text(client.get("/")), 20, "all torrents")
    seen, query = [], "sort=name&q=n"
    while query:
        page = text(client.get("/", query))
        assert len(names(page)) in (100, 50)
        seen += names(page)
        following = re.search('href="/[?]([^"]*)"\\s+rel="next"', page)
        query = following and following[1].replace("&amp;", "&")
    assert seen == [f"n{number:03}" for number in range(250)]
    previous = re.search('href="/[?]([^"]*)"\\s+rel="prev"', page)[1]
    page = text(client.get("/", previous.replace("&amp;", "&")))
    assert names(page)[0] == "n100"


def test_a_page_of_100_is_short(site):
    client = site(*(f"debian-12.7.0-amd64-netinst-{n:05}.iso" for n in range(100)))
    poll(lambda: len(names(text(client.get("/")))) == 100, 20, "all torrents")
    assert len(client.get("/")[2]) < 60_000


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
        *("<bdi>all of it</bdi>", "1.5 KiB (1,516 bytes)", "<bdi>1.0 MiB</bdi>"),
        *(f"<code>{one}</code>", "First &lt;line&gt;\nSecond⟨U+0007⟩"),
        *("maker &lt;1&gt;", "2023-11-14 22:13 UTC", "2020-09-13 12:26 UTC"),
        *("https://mirror.test/?a&amp;b", "Peers come from this tracker only."),
        *("<bdi>dir/&lt;inner&gt;</bdi>", "<bdi>dir/b</bdi>", "/etc/passwd</bdi>"),
        *(f'href="{one}.torrent"', f'href="{one}.json"'),
        "<dt>seeders</dt><dd>1</dd>",
    ):
        assert expected in page, expected
    assert re.search("last seen</dt><dd>20[2-9]", page)
    assert "No seeders" not in page


def test_a_private_torrent_has_no_magnet_link(site):
    """A link would not work: clients keep the metadata of a private torrent."""
    client = site("open", info={"private": 0})
    one = first_id(client)
    for path in ("/", f"/torrent/{one}"):
        assert f"magnet:?xt=urn:btih:{one}&amp;dn=open" in text(client.get(path))
    client = site("private", info={"private": 1})
    for path in ("/", f"/torrent/{first_id(client)}"):
        assert "magnet:" not in text(client.get(path))


@pytest.mark.parametrize(("number", "is_cut"), [(2000, False), (2500, True)])
def test_page_shows_2000_files(site, number, is_cut):
    files = [{b"length": n, b"path": [b"d"] * 99 + [b"f%d" % n]} for n in range(number)]
    pieces = b"p" * 20 * -(-sum(range(number)) // 16384)
    client = site("a", info={"files": files, "length": None, "pieces": pieces})
    page = text(client.get(f"/torrent/{first_id(client)}"))
    assert page.count(f"<bdi>{'d/' * 99}f") == 2000
    assert ("All\n2,500 files as JSON" in page) == is_cut


HOST_PATHS = (
    "/ /torrent/{} /torrent/{}.torrent /torrent/{}.json /feed.xml /torrents.json"
)


@pytest.mark.parametrize("path", HOST_PATHS.split())
def test_the_host_of_a_request_is_replaced_or_not_cached(site, path):
    client = site("a")
    path = path.replace("{}", first_id(client))
    _, headers, body = client.get(path, HTTP_HOST="evil.test")
    assert b"evil.test" in body and "private" in headers["Cache-Control"]
    client.app.tracker.settings = client.app.tracker.settings._replace(
        url="https://good.test/x"
    )
    _, headers, body = client.get(path, HTTP_HOST="evil.test")
    assert b"evil.test" not in body and b"https://good.test/x" in unquote_to_bytes(body)
    assert "private" not in headers.get("Cache-Control", "")


def test_a_category_is_named_and_kept_by_the_search(tracker, tmp_path):
    """Also a category that has no torrents itself, but categories below it."""
    put(tmp_path / "torrents/Linux/<Fedora>", 0, "a", {}, {})
    put(tmp_path / "torrents/Other", 1, "b", {}, {})
    client = tracker()
    page = text(client.get("/", "category=Linux"))
    assert "<h1><bdi>Torrents in Linux</bdi></h1>" in page and names(page) == ["a"]
    assert " aria-current=page><bdi>Linux</bdi>\n 1</a>" in page
    assert "><bdi>Linux/&lt;Fedora&gt;</bdi>\n 1</a>" in page
    assert '<input type="hidden" name="category" value="Linux">' in page
    assert "Fedora" not in text(client.get("/")).partition("<table>")[0]
    assert "There is no such category." in text(client.get("/", "category=Lin"))
    assert "Torrents in" not in text(client.get("/"))
    torrent = text(client.get(f"/torrent/{first_id(client)}"))
    [link] = re.findall(r'href="/\?(category=[^"]*)"', torrent)
    assert names(text(client.get("/", link))) == ["a"]


def test_headings_sort_the_list_and_turn_it_round(site):
    client, query = site("b", "a", "c"), ""
    order = {"Name": "abc", "Added": "bac", "Size": "abc"}
    for heading, found in order.items():
        for is_turned in (False, True):
            page = text(client.get("/", query))
            link = re.search(rf'<th[^>]*><a href="/([^"]*)">{heading}', page)[1]
            query = link.partition("?")[2].replace("&amp;", "&")
            page = text(client.get("/", query))
            (sorts,) = re.findall(r'aria-sort="(\w+)"><a [^>]*>(\w+) (.)<', page)
            is_up = is_turned == (heading != "Name")
            assert sorts == (
                "ascending" if is_up else "descending", heading, "▲" if is_up else "▼"
            )  # fmt: skip
            if heading != "Size":  # these three are equal
                assert "".join(names(page)) == found[:: -1 if is_turned else 1]


def test_a_text_beside_a_torrent_describes_it(site, tmp_path):
    client = site("a")
    one = first_id(client)
    path = tmp_path / "torrents/linux/0.txt"
    said = "See <https://a.test/?x=1&y>, or javascript:alert(1).\nftp://b \u202e\n"
    path.write_text(said + "long" * 2**15)
    page = text(client.get(f"/torrent/{one}"))
    assert (
        'See &lt;<a href="https://a.test/?x=1&amp;y" rel="noreferrer nofollow">'
        "https://a.test/?x=1&amp;y</a>&gt;, or javascript:alert(1).\nftp://b ⟨U+202E⟩"
    ) in page
    assert page.count('<a href="https:') == 1 and len(page) < 80_000
    path.unlink()
    path.mkdir()
    assert "Description" not in text(client.get(f"/torrent/{one}"))


def test_web_seeds_are_links_and_in_the_magnet_link(site):
    client = site("a", **{"url-list": [b"https://m.test/a b", b"ftp://x"]})
    one = first_id(client)
    page = text(client.get(f"/torrent/{one}"))
    link = json.loads(client.get(f"/torrent/{one}.json")[2])["magnet"]
    read = libtorrent.parse_magnet_uri(link)
    assert read.url_seeds == ["https://m.test/a b", "ftp://x"]
    assert link.replace("&", "&amp;") in page
    assert '<a href="https://m.test/a" rel="noreferrer nofollow">' in page
    assert "<dt>Web seed</dt><dd><bdi>ftp://x</bdi></dd>" in page


def test_badges_say_how_many_there_are(site):
    client = site("a")
    one = first_id(client)
    client.announce(1, info_hash=bytes.fromhex(one), left=0)
    client.announce(2, info_hash=bytes.fromhex(one))
    client.app.tracker._snapshot = 0, 0, None
    for path in ("/badge.svg", f"/torrent/{one}.svg"):
        status, headers, body = client.get(path)
        assert status == "200 OK" and headers["Content-Type"] == "image/svg+xml"
        assert headers["Cache-Control"] == "max-age=300"
        assert b">seeders 1, leechers 1</text>" in body
        ElementTree.fromstring(body)
    assert client.get(f"/torrent/{'0' * 40}.svg")[0] == "404 NOT FOUND"


def test_an_error_says_what_to_do(site):
    client = site("a")
    page = client.get("/nothing")[2].decode()
    assert "<p>There is no such page on this tracker.</p>" in page
    assert '<a href="/">Go to the front page</a>' in page
    assert "If you entered the URL" not in page


@pytest.mark.parametrize(("track", "is_open"), [("any", True), ("listed", False)])
def test_an_empty_tracker_says_what_to_do(tracker, track, is_open):
    page = text(tracker(track=track).get("/"))
    assert "No torrents are listed yet" in page and page.count("<li>") >= 3
    assert ("The torrent must be on the list." in page) != is_open
    assert ("Ask the operator to put" in page) != is_open
    assert 'name="q"' not in page


def test_page_of_a_bare_torrent(site):
    client = site("one.iso")
    page = text(client.get(f"/torrent/{first_id(client)}"))
    for expected in (
        "<li><bdi>one.iso</bdi>",
        "No seeders now:",
        "<dt>last seen</dt><dd>never</dd>",
    ):
        assert expected in page
    assert not re.search("Comment|Created|Private|Web seed|hash v2", page)


@pytest.mark.parametrize("name", [MARKUP, "a\u202eb", "../x", "/etc/passwd", "a" * 500])
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


@pytest.mark.parametrize(("name", "file"), [("a", "a"), (". .", ""), (MARKUP, "___sc")])
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
    # The file differs under another host name of the tracker.
    condition = {"HTTP_IF_NONE_MATCH": headers["ETag"], "HTTP_HOST": "other.test"}
    assert b"http://other.test/announce" in client.get(path, **condition)[2]


@pytest.mark.parametrize("kind", ["v1", "v2", "hybrid"])
def test_all_hashes_lead_to_the_torrent(tracker, tmp_path, kind):
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
def test_unlisted_torrent_is_not_found(site, path, end):
    status, headers, body = site("a").get(f"/torrent/{path}{end}")
    assert status == "404 NOT FOUND"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"<h1><bdi>Not Found</bdi></h1>" in body


def test_wrong_method_is_refused(site):
    status, headers, body = site("a").get("/", method="POST")
    assert status == "405 METHOD NOT ALLOWED" and "GET" in headers["Allow"]
    assert b"<h1><bdi>Method Not Allowed</bdi></h1>" in body


@pytest.mark.parametrize("data", [b"d4:", torrent_of("b"), None], ids=repr)
def test_a_file_that_is_being_replaced_is_not_found(site, tmp_path, monkeypatch, data):
    client = site("a")
    one, now = first_id(client), time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    path = tmp_path / "torrents/linux/0.torrent"
    path.unlink() if data is None else path.write_bytes(data)
    status, _, body = client.get(f"/torrent/{one}.torrent")
    assert status == "404 NOT FOUND" and b"being replaced" in body


def test_headers_forbid_scripts_and_loading(site):
    client = site("a")
    one = first_id(client)
    style = re.search("<style>(.*?)</style>", text(client.get("/")), re.S)[1]
    hashed = bitbreeze.sha256(style.encode()).digest()
    told = base64.b64encode(hashed).decode()
    for path in ("/", f"/torrent/{one}", f"/torrent/{one}.torrent", "/feed.xml",
                 "/torrents.json", "/nothing"):  # fmt: skip
        _, headers, body = client.get(path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert told in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert not re.search(rb"<script|style=|\son\w+=|src=", body)


def test_page_hides_internal_errors(site, monkeypatch, caplog):
    client = site("a")
    monkeypatch.setattr(bitbreeze.ListQuery, "select", lambda *_: 1 / 0)
    status, _, body = client.get("/")
    assert status == "500 INTERNAL SERVER ERROR"
    assert b"ZeroDivisionError" not in body and b"<h1>" in body
    assert len([r for r in caplog.records if r.exc_info]) == 1


# -- What strangers may send, and what operators may have


PATHS = (
    "/ /feed.xml /torrents.json /stats.json /health /metrics /doctor /nothing"
    " /torrent/{id} /torrent/{id}.json /torrent/{id}.torrent"
).split()
RAW = (
    "\xff\xfe",
    "%ff%fe",
    "\xc3\xbc",
    "\x00\x80",
    "%",
    "\x85\xa0<>",
    "%zz&&=;\xff=\xff",
)


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("path", PATHS)
def test_raw_bytes_have_an_answer(site, caplog, path, raw):
    """In the query, in the path, in headers: as text, or as an error with a page."""
    client = site("one")
    path = path.format(id=first_id(client))
    for query in (
        f"q={raw}",
        f"category={raw}",
        f"sort={raw}&page={raw}",
        raw,
        f"key={raw}",
    ):
        assert client.get(path, query)[0][:3] in ("200", "404")
    assert client.get(path + raw)[0][:3] in ("200", "404")
    for header in (
        "HOST",
        "REFERER",
        "USER_AGENT",
        "IF_NONE_MATCH",
        "X_FORWARDED_PROTO",
    ):
        answer = client.get(path, **{f"HTTP_{header}": raw})
        assert answer[0][:3] in ("200", "400", "404")
    assert client.get(path, SCRIPT_NAME=f"/{raw}")[0][:3] in ("200", "404")
    assert not caplog.records


@pytest.mark.parametrize("path", PATHS)
def test_any_host_has_an_answer(site, caplog, path):
    client = site("one")
    path = path.format(id=first_id(client))
    for host in ("xn--a", "a..b", ".", "x" * 64 + ".org", "[zz]", "a:99999", ""):
        answer = client.get(path, HTTP_HOST=host)
        assert answer[0][:3] in ("200", "400", "404")
    assert not caplog.records


def test_raw_bytes_are_text(site):
    client = site("b\xfccher", "one")
    assert names(text(client.get("/", "q=b\xc3\xbccher"))) == ["b\xfccher"]
    assert 'value="%FF%FE"' in text(client.get("/", "q=\xff\xfe"))
    assert names(text(client.get("/", "q=one+&sort=name%20"))) == ["one"]


@pytest.mark.parametrize(
    "seconds", [-(10**11), -1, 0, 253402300799, 253402300800, 10**12]
)
def test_any_file_time_can_be_shown(tracker, tmp_path, seconds):
    """The torrents are on a tmpfs, because ext4 keeps no such times."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else tmp_path
    with TemporaryDirectory(dir=place) as folder:
        put(Path(folder), 1, "one", {}, {})
        path = Path(folder, "1.torrent")
        os.utime(path, (seconds, seconds))
        if int(path.stat().st_mtime) != seconds:
            pytest.skip(f"NOT TESTED is {seconds}: this file system has no such time")
        client = tracker(torrents=folder)
        shown = "1970-01-01" if seconds <= 0 else "9999-12-31"
        one = first_id(client)
        for page in ("/", f"/torrent/{one}"):
            assert shown in text(client.get(page))
        assert shown[:4] in text(client.get("/feed.xml"))
        _, headers, _ = client.get(f"/torrent/{one}.torrent")
        assert shown[:4] in headers["Last-Modified"]


SITES = [
    ("xn--bcher-kva.example", "", "http://xn--bcher-kva.example/"),
    ("a.test:81", "/my tracker", "http://a.test:81/my%20tracker/"),
    ("a.test", '/<b>"', "http://a.test/%3Cb%3E%22/"),
    ("a.test", "/\xc3\xbc", "http://a.test/%C3%BC/"),
]


@pytest.mark.parametrize(("host", "mount", "url"), SITES)
def test_urls_are_ascii(site, host, mount, url):
    client = site("one")
    one = first_id(client)

    def get(path, query=""):
        return client.get(path, query, HTTP_HOST=host, SCRIPT_NAME=mount)

    made = bencoder.bdecode(get(f"/torrent/{one}.torrent")[2])
    assert made[b"announce"] == f"{url}announce".encode()
    feed, listed = text(get("/feed.xml")), text(get("/torrents.json"))
    assert feed.isascii() and listed.isascii()
    assert f"<link>{url}torrent/{one}</link>" in feed
    assert f'"{url}torrent/{one}.torrent"' in listed
    magnet = re.search('"(magnet:.*?)"', listed)[1]
    assert libtorrent.parse_magnet_uri(magnet).trackers == [f"{url}announce"]
    page = text(get("/"))
    assert f"<code>{url}announce</code>" in page
    path = url.split("/", 3)[3]
    assert f'href="/{path}torrent/{one}"' in page
    assert get("/announce", "")[1]["Location"] == f"/{path}"


# The swarm, for the operator


def test_a_swarm_is_shown_to_the_operator(tracker):
    client = tracker(operator_key="secret", track="any")
    client.announce(1, left=0, peer_id="-qB5100-abcdefghijkl")
    client.announce(1, left=0, peer_id="-qB5100-abcdefghijkl", address="2001:db8::1")
    path = f"/swarm/{(b'h' * 20).hex()}.json"
    for query in ("", "key=", "key=wrong", "key=secre"):
        assert client.get(path, query)[0] == "404 NOT FOUND"
    status, headers, body = client.get(path, "key=secret")
    swarm = json.loads(body)
    assert (status, headers["Cache-Control"]) == ("200 OK", "no-store")
    (peer,) = swarm["peers"]
    assert abs(peer.pop("seen") - time.time()) < 60
    assert peer == {
        "peer_id": b"-qB5100-abcdefghijkl".hex(),
        "client": "qBittorrent 5.1.0",
        "endpoints": ["192.0.2.1 1001", "2001:db8::1 1001"],
        "seeder": True,
    }
    other = json.loads(client.get(f"/swarm/{'0' * 40}.json", "key=secret")[2])
    assert other == {"snatches": 0, "peers": []}
    assert client.get("/swarm/abc.json", "key=secret")[0] == "404 NOT FOUND"
    assert tracker(dev=True, track="any").get(path)[0] == "200 OK"
    assert tracker(track="any").get(path, "key=")[0] == "404 NOT FOUND"


@pytest.mark.parametrize(
    ("host", "udp"),
    [
        ("tracker.test", "udp://tracker.test:7000/announce"),
        ("tracker.test:8080", "udp://tracker.test:7000/announce"),
        ("[2001:db8::1]:80", "udp://[2001:db8::1]:7000/announce"),
    ],
)
def test_udp_is_named_when_it_is_served(tracker, tmp_path, host, udp):
    put(tmp_path / "torrents", 1, "one", {}, {})
    client = tracker(udp_port=7000)
    http = f"http://{host.removesuffix(':80')}/announce"
    one = first_id(client)
    page = text(client.get("/", HTTP_HOST=host))
    assert re.findall("<code>(.*?)</code>", page) == [http, udp]
    trackers = f"&tr={quote(http, '')}&tr={quote(udp, '')}"
    for path in (f"/torrent/{one}.json", "/torrents.json"):
        answer = json.loads(client.get(path, HTTP_HOST=host)[2])
        torrent = answer.get("torrents", [answer])[0]
        assert torrent["magnet"].endswith(trackers)
    made = bencoder.bdecode(client.get(f"/torrent/{one}.torrent", HTTP_HOST=host)[2])
    assert made[b"announce"] == http.encode()
    assert made[b"announce-list"][0] == [http.encode(), udp.encode()]
