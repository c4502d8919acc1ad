"""Keys of members: who may do what; publishing, bans, progress, small swarms."""

import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from threading import Event
from urllib.parse import quote
from urllib.request import urlopen

import bencoder
import pytest
from conftest import escape, peer_id
from servers import ROOT, announce, free_port, gunicorn, poll, serving
from test_torrents import info_of, torrent_of
from werkzeug.test import EnvironBuilder

import app as bitbreeze

KEYS = {
    "member": "m" * 26,
    "publisher": "p" * 26,
    "expired": "e" * 26,
    "revoked": "r" * 26,
    "stranger": "",
}
FILE = f"""
{KEYS["member"]} Ana  # a comment
{KEYS["publisher"]} Bo Derek until=9999-12-31 publish
{KEYS["expired"]} Cy publish until=2020-02-28
"""
FOREVER = 253402300800  # the end of the year 9999
REFUSED = b"this tracker needs a key: use the announce URL from your own page"
HASH = b"h" * 20


@pytest.fixture
def site(tracker, tmp_path):
    """A function that makes a tracker with keys and a torrent; returns its Client."""

    def make(**settings):
        (tmp_path / "torrents").mkdir(exist_ok=True)
        (tmp_path / "torrents/one.torrent").write_bytes(
            torrent_of("one", length=10_000)
        )
        (tmp_path / "keys.txt").write_text(FILE)
        client = tracker(**settings)
        client.one = next(iter(client.app.tracker.catalogue.by_hash), None)
        client.app.tracker.catalogue.refresh(int(time.time()))
        (client.one,) = client.app.tracker.catalogue.by_hash
        return client

    return make


def post(
    client, path, data=b"", category="", accept="*/*", fields=None, name="x.torrent"
):
    """Return (status, headers, body) of a form that is sent."""
    form = {"category": category} if fields is None else dict(fields)
    if data is not None and fields is None:
        form["torrent"] = (io.BytesIO(data), name)
    builder = EnvironBuilder(path, method="POST", data=form, headers={"Accept": accept})
    environ = builder.get_environ()
    said = []
    body = b"".join(client.app(environ, lambda *answer: said.extend(answer)))
    return said[0], dict(said[1]), body


# Who may do what

ACTS = {
    "announce": lambda c, p: refused(c.get(f"{p}/announce", announce_query(c))),
    "scrape": lambda c, p: refused(c.get(f"{p}/scrape", scrape_query(c))),
    "page": lambda c, p: c.get(f"{p}/")[0][:3],
    "feed": lambda c, p: c.get(f"{p}/feed.xml")[0][:3],
    "json": lambda c, p: c.get(f"{p}/torrents.json")[0][:3],
    "metrics": lambda c, p: c.get(f"{p}/metrics")[0][:3],
    "download": lambda c, p: c.get(f"{p}/torrent/{c.one.hex()}.torrent")[0][:3],
    "publish": lambda c, p: post(c, f"{p}/publish", torrent_of("two"))[0][:3],
    "move": lambda c, p: post(
        c, f"{p}/torrent/{c.one.hex()}/edit", fields={"category": "x"})[0][:3],
    "remove": lambda c, p: post(
        c, f"{p}/torrent/{c.one.hex()}/edit", fields={"remove": "yes"})[0][:3],
    "health": lambda c, p: c.get("/health")[0][:3],
}  # fmt: skip


def announce_query(client):
    return f"info_hash={escape(client.one)}&peer_id={'p' * 20}&port=6881&left=1"


def scrape_query(client):
    return f"info_hash={escape(client.one)}"


def refused(answer):
    assert answer[0] == "200 OK"
    reason = bencoder.bdecode(answer[2]).get(b"failure reason")
    assert reason in (None, REFUSED)
    return "no" if reason else "yes"


ALLOWED = {  # on an open tracker, on a private one
    "stranger": ("yes yes 200 200 200 200 200 403 403 403 200",
                 "no no 403 403 403 403 403 403 403 403 200"),
    "member": ("yes yes 200 200 200 200 200 403 403 403 200",) * 2,
    "publisher": ("yes yes 200 200 200 200 200 303 303 303 200",) * 2,
}  # fmt: skip
# Another key is a path of nothing on an open tracker; announces ignore it.
UNKNOWN = ("yes yes 404 404 404 404 404 404 404 404 200",
          "no no 403 403 403 403 403 403 403 403 200")  # fmt: skip


@pytest.mark.parametrize("private", [False, True], ids=["open", "private"])
@pytest.mark.parametrize("who", KEYS)
def test_who_may_do_what(site, who, private):
    client = site(private=private)
    prefix = f"/{KEYS[who]}" if KEYS[who] else ""
    expected = dict(zip(ACTS, ALLOWED.get(who, UNKNOWN)[private].split(), strict=True))
    found = {name: act(client, prefix) for name, act in ACTS.items()}
    if who in ("expired", "revoked"):
        for name in ("publish", "move", "remove"):
            assert found.pop(name) in ("404", "403", "405")
            del expected[name]
    assert found == expected


@pytest.mark.parametrize(
    "path", ["/announce/KEY", "/KEY/announce", "/x/KEY/announce.php"]
)
def test_keys_in_announces(site, path):
    client = site(private=True)
    query = announce_query(client)
    for who, answer in (("member", "yes"), ("expired", "no"), ("revoked", "no")):
        assert refused(client.get(path.replace("KEY", KEYS[who]), query)) == answer
        with_key = f"passkey={KEYS[who]}&{query}"
        assert refused(client.get("/announce", with_key)) == answer
    assert refused(client.get("/announce", f"{query}&passkey=")) == "no"
    assert client.app.tracker.stats.counters()["failure_member"] == 5


def test_everything_on_a_members_site_has_the_key(site):
    client, key = site(private=True, udp_port=7000), KEYS["member"]
    base = f"http://tracker.test/{key}"
    page = client.get(f"/{key}/")[2].decode()
    links = re.findall(r'(?:href|action)="(/[^"]*)"', page)
    assert links and all(link.startswith(f"/{key}/") for link in links)
    assert re.findall("<code>(.*?)</code>", page) == [f"{base}/announce"]
    one = client.one.hex()
    made = bencoder.bdecode(client.get(f"/{key}/torrent/{one}.torrent")[2])
    assert made[b"announce"] == f"{base}/announce".encode()
    assert b"announce-list" not in made
    torrent = json.loads(client.get(f"/{key}/torrent/{one}.json")[2])
    assert torrent["magnet"].endswith(f"&tr={quote(base, '')}%2Fannounce")
    feed = client.get(f"/{key}/feed.xml")[2].decode()
    assert f"<link>{base}/torrent/{one}</link>" in feed
    assert client.get(f"/{key}/announce", "")[1]["Location"] == f"/{key}/"
    client = site(url="https://other.test/x", private=True)
    location = client.get(f"/{key}/announce", "")[1]["Location"]
    assert location == f"https://other.test/x/{key}/"
    page = client.get(f"/{key}/")[2].decode()
    assert f"<code>https://other.test/x/{key}/announce</code>" in page
    assert client.get(f"/{key}/")[1]["Cache-Control"] == "private"


def test_keys_appear_nowhere_else(site, caplog, tmp_path, capsys):
    client = site(private=True, verbose=True)
    for who, key in KEYS.items():
        client.get(f"/{key}/announce", announce_query(client))
        for path in ("", "/nothing", "/feed.xml", "/torrent/x"):
            body = client.get(f"/{key}{path}")[2]
            assert (
                who == "member"
                or who == "publisher"
                or key.encode() not in body
                or not key
            )
        post(client, f"/{key}/publish", b"bad")
    shown = caplog.text + "".join(capsys.readouterr())
    client.app.tracker.catalogue.refresh(int(time.time()) + 60)
    shown += (tmp_path / "data/torrents.json").read_text()
    assert not [key for key in KEYS.values() if key and key in shown]


OTHER = b"udp://other.test:80/announce"
KEYED = {
    "path": "http://tracker.test/{key}/announce",
    "end of the path": "http://192.0.2.1:6969/announce/{key}",
    "passkey": "https://tracker.test/announce?passkey={key}",
    "passkey and more": "https://tracker.test/announce?x=1&passkey={key}&y=2",
    "UDP": "udp://tracker.test:6969/{key}/announce?x",
}


@pytest.mark.parametrize("url", KEYED.values(), ids=KEYED)
@pytest.mark.parametrize("private", [True, False])
def test_a_download_has_no_key_of_its_publisher(site, url, private):
    """The publisher made the torrent with the announce URL of its own page."""
    client, url = site(private=private), url.format(key=KEYS["publisher"]).encode()
    lists = {}, {b"announce-list": [[url, OTHER], [url]]}, {b"announce-list": [[url]]}
    for number, more in enumerate(lists):
        outer = {b"announce": url, **more, b"info": info_of(b"%d" % number)}
        data = bencoder.bencode(outer)
        answer = json.loads(post(client, f"/{KEYS['publisher']}/publish", data)[2])
        for start in [f"/{KEYS['member']}"] + [""] * (not private):
            path = f"{start}/torrent/{answer['info_hash']}.torrent"
            made = bencoder.bdecode(client.get(path)[2])
            ours = f"http://tracker.test{start}/announce".encode()
            assert made[b"announce"] == ours
            expected = [[ours], [OTHER]] if number == 1 else None
            assert made.get(b"announce-list") == expected


# keys.txt


@pytest.mark.parametrize(
    ("line", "member"),
    [
        ("a" * 16 + " Ana", ("Ana", False, FOREVER)),
        ("A-_9" * 16 + " Ana Maria", ("Ana Maria", False, FOREVER)),
        ("a" * 16 + " publish Ana # until=x", ("Ana", True, FOREVER)),
        ("a" * 16 + " Ana until=1970-01-01", ("Ana", False, 86400)),
        ("a" * 16 + " Ana until=1970-01-02 until=1970-01-01", ("Ana", False, 86400)),
        ("a" * 15 + " Ana", None),
        ("a" * 65 + " Ana", None),
        ("a" * 16 + "! Ana", None),
        ("a" * 16, None),
        ("a" * 16 + " publish", None),
        ("a" * 16 + " Ana until=", None),
        ("a" * 16 + " Ana until=2027-02-30", None),
        ("a" * 16 + " Ana until=tomorrow", None),
    ],
)
def test_lines_of_keys(line, member):
    members, problems = bitbreeze.parse_list(f"# x\n{line}\n\n".encode(), "keys.txt")
    if member:
        checksum = sha256(line.split()[0].encode()).hexdigest()
        assert members == [[checksum, *member]] and not problems
    else:
        form = "not KEY (16-64 letters) NAME [publish] [until=YYYY-MM-DD]"
        assert (members, problems) == ([], [f"keys.txt, line 2: {form}, skipped"])


def run(tmp_path, *arguments):
    env = {**os.environ, "TRACKER_TORRENTS": str(tmp_path / "torrents")}
    env |= {"TRACKER_DATA": str(tmp_path / "data"), "TRACKER_URL": "https://t.test"}
    command = [sys.executable, ROOT / "app.py", "keys", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


def test_commands(tmp_path):
    link = run(tmp_path, "add", "Ana").stdout
    assert re.fullmatch(r"https://t\.test/[0-9a-f]{32}/\n", link)
    run(tmp_path, "add", "Bo Derek", "--publish", "--until", "2027-01-31")
    listed = run(tmp_path, "list").stdout
    assert listed == "Ana\nBo Derek publish until=2027-01-31\n"
    path = tmp_path / "keys.txt"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith(link.split("/")[3] + " Ana\n")
    path.write_text(path.read_text() + "# a comment\n")
    assert run(tmp_path, "revoke", "Ana").stdout == "Revoked 1 keys of Ana.\n"
    assert run(tmp_path, "revoke", "Ana").stdout == "Revoked 0 keys of Ana.\n"
    assert run(tmp_path, "list").stdout == "Bo Derek publish until=2027-01-31\n"
    assert path.read_text().endswith("# a comment\n")
    for name in ("", "publish", "a # b", "until=x", "a\nb"):
        assert "Give a NAME" in run(tmp_path, "add", name).stderr
    assert "Give a NAME" in run(tmp_path, "revoke").stderr
    ended = run(tmp_path, "add", "Cy", "--until", "soon")
    assert ended.stderr == "Error: Give a NAME without #, and a day like 2027-01-31.\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root can do this")
def test_root_adds_keys_for_the_user_of_the_server(tmp_path):
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", 65534, -1)
    for name in ("Ana", "Bo"):
        run(tmp_path, "add", name)
        status = (tmp_path / "keys.txt").stat()
        assert (status.st_uid, status.st_mode & 0o777) == (65534, 0o600)


def test_a_folder_of_another_user(tmp_path):
    (tmp_path / "keys.txt.lock").mkdir()
    error = run(tmp_path, "add", "Ana").stderr
    assert (
        error
        == f"Error: Cannot change {tmp_path}/keys.txt: Is a directory. Use sudo.\n"
    )


# Publishing


def test_publishing(site, tmp_path, caplog):
    client, key = site(private=True), KEYS["publisher"]
    data = torrent_of("two")
    status, _, body = post(client, f"/{key}/publish", data, "linux/arch")
    answer = json.loads(body)
    assert status == "303 SEE OTHER"
    path = f"linux/arch/two {answer['info_hash'][:8]}.torrent"
    assert (tmp_path / "torrents" / path).read_bytes() == data
    assert answer[
        "page"
    ] == f"http://tracker.test/{key}/torrent/{answer['info_hash']}".replace(
        "tracker.test", "localhost"
    )
    assert f"Bo Derek published {path}" in caplog.text
    reply = client.ask(
        f"/{key}/announce",
        {
            "info_hash": bytes.fromhex(answer["info_hash"]),
            "peer_id": peer_id(1),
            "port": 1,
            "left": 0,
        },
    )
    assert reply[b"complete"] == 1
    status, _, body = post(client, f"/{key}/publish", data)
    assert status == "400 BAD REQUEST"
    assert (
        json.loads(body)["error"]
        == f"This torrent is refused: it is listed already as {path}."
    )
    status, headers, _ = post(
        client, f"/{key}/publish", torrent_of("three"), accept="text/html"
    )
    assert status == "303 SEE OTHER" and f"/{key}/torrent/" in headers["Location"]
    # Move it, and remove it.
    edit = f"/{key}/torrent/{answer['info_hash']}/edit"
    assert b"Remove" in client.get(edit.removesuffix("/edit"))[2]
    assert post(client, edit, fields={"category": "other"})[0] == "303 SEE OTHER"
    moved = tmp_path / "torrents/other" / path.rpartition("/")[2]
    assert moved.read_bytes() == data
    assert post(client, edit, fields={"category": "../x"})[0] == "400 BAD REQUEST"
    assert post(client, edit, fields={"x": ""})[0] == "400 BAD REQUEST"
    assert post(client, edit, fields={"remove": "yes"})[0] == "303 SEE OTHER"
    assert not moved.exists()


BAD_CATEGORIES = ["..", "../x", "a/../b", ".hidden", "a/.b", "a\\b", "a\0b", "x" * 51,
                  "a/b/c/d/e/f", "x.torrent", "\u202e", "a\nb"]  # fmt: skip


@pytest.mark.parametrize("category", BAD_CATEGORIES)
def test_bad_categories(site, tmp_path, category):
    client = site()
    before = sorted(tmp_path.rglob("*"))
    answer = post(client, f"/{KEYS['publisher']}/publish", torrent_of("two"), category)
    assert answer[0] == "400 BAD REQUEST"
    assert "category must be" in json.loads(answer[2])["error"]
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/passwd",
        "a\0b",
        "x" * 300,
        "ü" * 200,
        "..",
        "...",
        "a\nb",
        "\udcff",
        "CON",
        " ",
    ],
)
def test_any_name_is_a_file_in_the_folder(site, tmp_path, name):
    client = site()
    before = sorted(tmp_path.rglob("*"))
    data = bencoder.bencode({b"info": info_of(name.encode("utf-8", "surrogateescape"))})
    answer = post(client, f"/{KEYS['publisher']}/publish", data, "new")
    new = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    if answer[0] == "303 SEE OTHER":
        assert new[0] == tmp_path / "torrents/new" and len(new) == 2
        assert new[1].parent == new[0] and new[1].read_bytes() == data
        assert client.app.tracker.catalogue.find(
            json.loads(answer[2])["info_hash"], int(time.time())
        )
    else:
        assert answer[0] == "400 BAD REQUEST" and not new


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (None, "400", "it is not bencoded"),
        (b"", "400", "it is not bencoded"),
        (b"d4:infod", "400", "it is not bencoded"),
        (b"d" + b"1:a" + b"l" * 50_000 + b"e" * 50_000 + b"e", "400", "deep"),
        (b"x" * (10 * 2**20 + 1), "400", "it has more than 10485760 bytes"),
        (b"x" * (11 * 2**20), "413", "bytes at most"),
    ],
    ids=["none", "empty", "cut", "deep", "large", "too large"],
)
def test_bad_uploads(site, tmp_path, data, status, reason):
    client = site()
    before = sorted(tmp_path.rglob("*"))
    answer = post(client, f"/{KEYS['publisher']}/publish", data)
    assert answer[0][:3] == status and reason in json.loads(answer[2])["error"]
    assert sorted(tmp_path.rglob("*")) == before
    page = post(client, f"/{KEYS['publisher']}/publish", data, accept="text/html")
    assert page[0][:3] == status and b"<h1>" in page[2]


def test_all_workers_track_an_upload_at_once(tmp_path):
    (tmp_path / "torrents").mkdir()
    (tmp_path / "keys.txt").write_text(FILE)
    port = free_port()
    env = {
        "TRACKER_DATA": str(tmp_path / "data"),
        "TRACKER_TORRENTS": str(tmp_path / "torrents"),
    }
    with serving(gunicorn(port, workers=4), port, env) as server:
        for number in range(10):
            (tmp_path / "x").write_bytes(torrent_of(f"t{number}"))
            curl = [
                "curl",
                "-sF",
                f"torrent=@{tmp_path}/x",
                f"{server.url}/{KEYS['publisher']}/publish",
            ]
            made = json.loads(subprocess.check_output(curl))
            for peer in range(8):
                reply = announce(
                    server.url,
                    bytes.fromhex(made["info_hash"]),
                    peer_id(peer),
                    2000 + peer,
                )
                assert b"failure reason" not in reply


# Bans


@pytest.mark.parametrize(
    ("address", "is_banned"),
    [
        ("203.0.113.9", True),
        ("203.0.114.9", False),
        ("192.0.2.7", True),
        ("192.0.2.8", False),
        ("2001:db8:5::1", True),
        ("2001:db9::1", False),
        ("::ffff:203.0.113.9", True),
    ],
)
def test_bans(tracker, tmp_path, address, is_banned):
    bans = (
        f"203.0.113.0/24 spam\n192.0.2.7\n2001:db8::/32\n{HASH.hex()}\n203.0.113.1/24\n"
    )
    (tmp_path / "deny.txt").write_text(bans)
    client = tracker(track="any")
    reply = client.announce(1, info_hash=b"i" * 20, address=address)
    reason = b"your address is not allowed on this tracker"
    assert reply.get(b"failure reason") == (reason if is_banned else None)
    denied = client.announce(1, address="192.0.2.8")
    assert denied[b"failure reason"] == b"torrent not registered with this tracker"
    assert any(
        "line 5: not 40" in each for each in client.app.tracker.catalogue.problems
    )


# Progress


def test_progress(site):
    client = site()
    torrent = client.app.tracker.catalogue.find(client.one.hex(), int(time.time()))
    one, size = client.one, torrent.size
    for peer, left in enumerate((size, size * 3 // 4, size // 2, 1, "")):
        client.announce(peer, info_hash=one, left=left, address=f"192.0.2.{peer + 1}")
    client.announce(9, info_hash=one, left=0, address="192.0.2.99")

    def progress():
        return json.loads(client.get(f"/torrent/{one.hex()}.json")[2])["progress"]

    found = progress()
    assert found["unknown"] == 1 and sum(found["leechers"]) == 4
    assert found["leechers"][0] == 1 and found["leechers"][9] == 1
    client.announce(0, info_hash=one, left=1, address="192.0.2.1")  # a renewal
    assert progress()["leechers"][0] == 0 and progress()["leechers"][9] == 2
    client.announce(0, info_hash=one, left=1, address="2001:db8::1")
    client.announce(0, info_hash=one, left=size, address="2001:db8::1")
    assert progress()["leechers"][0] == 1
    page = client.get(f"/torrent/{one.hex()}")[2].decode()
    assert "On average, they have\n" in page and "Unknown: 1." in page
    assert client.scrape(one)[b"files"][one][b"complete"] == 1


@pytest.mark.parametrize(
    ("left", "downloaded", "size", "step"),
    [
        (100, None, 100, 1),
        (50, None, 100, 32),
        (1, None, 100, 62),
        (10**18, None, 100, 1),
        (100, None, None, 0),
        (100, 0, None, 1),
        (50, 50, None, 32),
    ],
)
def test_steps_of_progress(left, downloaded, size, step):
    peer = bitbreeze.Announce(HASH, b"p" * 20, bytes(4), 1, left, downloaded=downloaded)
    torrent = bitbreeze.Torrent("", "", size, 1, "", "", 0, False)
    assert bitbreeze.progress_of(peer, {HASH: torrent} if size else {}) == step


# Intervals


def test_small_swarms_have_a_shorter_interval(tracker):
    client = tracker(numwant=3, max_numwant=3)
    for peer, most in ((1, 990), (2, 990), (3, 1980), (4, 1980)):
        interval = client.announce(peer)[b"interval"]
        assert 0.81 * most <= interval <= most


# Storms


def test_keys_are_added_and_revoked_while_clients_announce(tmp_path, cases):
    """Two processes change keys.txt, and a third is killed again and again."""
    (tmp_path / "torrents").mkdir()
    (tmp_path / "keys.txt").write_text(FILE)
    port, edits, done = free_port(), cases(4), Event()
    env = {"TRACKER_DATA": str(tmp_path / "data"), "TRACKER_TRACK": "any"}
    env |= {"TRACKER_TORRENTS": str(tmp_path / "torrents"), "TRACKER_PRIVATE": "yes"}
    names, wrong = [[], []], []

    def edit(number):
        for count in range(edits):
            name = f"{number}-{count}"
            assert run(tmp_path, "add", name).returncode == 0
            names[number].append(name)
            if count % 3 == 2:
                assert "Revoked 1 keys" in run(tmp_path, "revoke", name).stdout
                names[number].remove(name)

    def be_killed():
        while not done.is_set():
            command = [sys.executable, ROOT / "app.py", "keys", "add", "killed"]
            process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=subprocess.DEVNULL
            )
            time.sleep(0.2 + 0.1 * (time.monotonic() % 1))
            process.kill()
            process.wait()

    def ask():
        peer = 0
        while not done.is_set():
            peer += 1
            url = f"{server.url}/{KEYS['member']}"
            if b"failure reason" in announce(
                url, HASH, peer_id(peer % 50), 2000 + peer % 50
            ):
                wrong.append("a member was refused")
            if b"failure reason" not in announce(server.url, HASH, peer_id(99), 99):
                wrong.append("a stranger was answered")

    command = gunicorn(port, workers=4)
    with serving(command, port, env) as server, ThreadPoolExecutor(5) as pool:
        others = [pool.submit(work) for work in (be_killed, ask, ask)]
        try:
            for editor in [pool.submit(edit, 0), pool.submit(edit, 1)]:
                editor.result()
        finally:
            done.set()
        for other in others:
            other.result()
    kept = run(tmp_path, "list").stdout.split("\n")
    assert {*names[0], *names[1], "Ana"} <= {*kept}
    left = [name for name in kept if re.fullmatch("[01]-[0-9]+", name)]
    assert sorted(left) == sorted(names[0] + names[1])
    assert not wrong and len(names[0]) == edits - edits // 3


def test_many_uploads_at_once(tmp_path, cases):
    """A thousand in full. Of each torrent, one upload is kept."""
    (tmp_path / "keys.txt").write_text(FILE)
    number, port = cases(25), free_port()
    env = {"TRACKER_DATA": tmp_path / "data", "TRACKER_TORRENTS": tmp_path / "torrents"}
    env = {name: str(path) for name, path in env.items()}

    def upload(each):
        (tmp_path / f"{each}.torrent").write_bytes(torrent_of(f"t{each % number}"))
        form = ["-F", f"torrent=@{tmp_path}/{each}.torrent", "-F", "category=new"]
        url = f"{server.url}/{KEYS['publisher']}/publish"
        code = ["-w", "%{http_code}", "-o", "/dev/null"]
        return subprocess.check_output(["curl", "-s", *form, *code, url]).decode()

    command = gunicorn(port, workers=4)
    with serving(command, port, env) as server, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(upload, range(4 * number)))
        end = f">{number} torrents, page 1 of ".encode()
        poll(lambda: end in fetch(server.url), 10, "the list")
        assert "Traceback" not in server.log()
    assert answers.count("303") >= number and {*answers} <= {"303", "400"}
    files = list((tmp_path / "torrents/new").iterdir())
    assert len(files) == number
    assert not list((tmp_path / "torrents").glob(".*"))


def fetch(url):
    with urlopen(url) as answer:
        return answer.read()
