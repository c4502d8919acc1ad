"""Templates: the pages in a real browser, with a check of their accessibility."""

import itertools
import json
import os
import shutil
from pathlib import Path
from urllib.request import urlopen

import libtorrent
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from servers import announce, free_port, gunicorn, poll, serving
from test_pages import DETAILS, MARKUP, put
from test_torrents import torrent_of

# Chromium in a container needs the first two. The others stop requests to other hosts.
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage"),
]
KEY, MEMBER = "opensesame", "p" * 26
NAMES = [MARKUP, "שלום עולם.iso", "evil\u202egpj.exe", "long" * 60, "plain.iso"]
NAMES += [f"nightly-{number:03}" for number in range(120)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the URL of a tracker with torrents; one of them has peers."""
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    files = [{b"length": n, b"path": [b"d%d" % (n % 3), b"f%d" % n]} for n in range(9)]
    for number, name in enumerate(NAMES):
        info = {"files": files, "length": None} if name == "plain.iso" else {}
        put(folder / "torrents/linux", number, name, info, DETAILS)
    environ = {"TRACKER_DATA": folder / "data", "TRACKER_TORRENTS": folder / "torrents"}
    environ |= {"TRACKER_OPERATOR_KEY": KEY, "TRACKER_NOTICE": "Back at <noon>"}
    environ = {name: str(value) for name, value in environ.items()}
    with serving(gunicorn(port), port, environ) as server:
        end = f">{len(NAMES)} torrents, page 1 of ".encode()
        poll(lambda: end in urlopen(server.url).read(), 20, "all torrents")
        made = (folder / "torrents/linux/4.torrent").read_bytes()
        info = libtorrent.torrent_info(libtorrent.bdecode(made))
        info_hash = info.info_hashes().v1.to_bytes()
        for number in range(3):
            announce(server.url, info_hash, b"%020d" % number, 5000 + number, left=0)
        yield server.url
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        reason = "chromium IS NOT INSTALLED: the pages are NOT tested in a browser"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


class Visit:
    """A page in a browser window, with the errors and foreign requests in it."""

    def __init__(self, browser, site, width=1200, scheme="light"):
        window = {"width": width, "height": 800}
        self.context = browser.new_context(viewport=window, color_scheme=scheme)
        self.page, self.site, self.wrong = self.context.new_page(), site, []
        self.page.on("console", lambda said: self.wrong.append(said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", self._look_at)

    def _look_at(self, request):
        if not request.url.startswith((self.site, "data:")):
            self.wrong.append(f"asked for {request.url}")
        if "referer" in request.headers:
            self.wrong.append(f"sent a Referer with {request.url}")

    def follow(self, link):
        """Click on a link, and wait for the next page."""
        with self.page.expect_navigation():
            link.click()

    def names(self):
        return self.page.locator("td:first-child > a").all_inner_texts()


@pytest.fixture
def visit(browser, site):
    """Return a function that opens a Visit at a path; errors in it fail the test."""
    visits = []

    def go(path, site=site, **window):
        visits.append(Visit(browser, site, **window))
        visits[-1].page.goto(site + path)
        return visits[-1]

    yield go
    for each in visits:
        each.context.close()
        assert each.wrong == []


PATHS = {
    "front": "/",
    "found": "/?q=script",
    "nothing found": "/?q=nothing-like-it",
    "last page": "/?page=2&sort=name",
    "doctor": f"/doctor?key={KEY}",
    "error": "/nothing",
}


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1200, "light")])
def test_pages_fit_and_are_accessible(visit, tmp_path, width, scheme):
    visited = visit("/", width=width, scheme=scheme)
    links = visited.page.locator("td:first-child > a")
    paths = {**PATHS, "wild": links.nth(0).get_attribute("href")}
    paths["torrent"] = links.nth(NAMES.index("plain.iso")).get_attribute("href")
    for name, path in paths.items():
        visited.page.goto(visited.site + path)
        check(visited.page, tmp_path / f"{name}.png", width)
        if name == "error":  # Chromium writes the status to its console
            assert "404" in visited.wrong.pop()


def check(page, screenshot, width):
    """Fail unless a page is accessible and fits into a window."""
    page.screenshot(path=screenshot, full_page=True)
    faults = Axe().run(page).response["violations"]
    assert [(fault["id"], fault["impact"]) for fault in faults] == [], screenshot
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"{screenshot} is {wide} pixels wide"


def test_search_sort_and_next_page(visit):
    visited = visit("/")
    page = visited.page
    search = page.get_by_role("searchbox", name="Search torrents")
    assert visited.names()[:3] == [MARKUP, "שלום עולם.iso", "evil⟨U+202E⟩gpj.exe"]
    visited.follow(page.get_by_role("link", name="Next"))
    assert len(visited.names()) == len(NAMES) - 100
    search.fill("NIGHTLY 11")
    visited.follow(page.get_by_role("button", name="Search"))
    visited.follow(page.get_by_role("link", name="Added"))
    found = [f"nightly-{number}" for number in range(119, 109, -1)]
    assert visited.names()[:10] == found
    visited.follow(page.get_by_role("link", name="Name"))
    assert visited.names() == sorted(visited.names())
    visited.follow(page.get_by_role("link", name=f"linux {len(NAMES)}"))
    assert page.locator("h1").inner_text() == "Torrents in linux"
    search.fill(MARKUP)
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert visited.names() == [MARKUP]
    assert page.locator("h1").inner_text() == "Torrents in linux"
    assert search.input_value() == MARKUP


def test_the_list_on_a_phone(visit):
    """The first torrent is in sight, what is touched is large, and headings sort."""
    visited = visit("/", width=390)
    first = visited.page.locator("tbody tr").first
    assert first.bounding_box()["y"] < 600
    visited.follow(visited.page.get_by_role("link", name="Seeders"))
    assert visited.names()[0] == "plain.iso"
    assert first.evaluate("row => getComputedStyle(row).display") == "flex"
    for link in visited.page.locator("a").all()[:40]:
        assert link.bounding_box()["height"] >= 24, link.inner_text()


def test_a_torrent_and_its_download_by_keyboard(visit, tmp_path):
    visited = visit("/?q=plain")
    page = visited.page
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "plain.iso":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/torrent/*")
    assert page.locator("h1").inner_text() == "plain.iso"
    page.get_by_text("Details").click()
    one = page.locator("dd code").inner_text()
    assert page.get_by_text("d1/f4", exact=True).is_visible()
    magnet = page.get_by_role("link", name="Magnet").get_attribute("href")
    assert str(libtorrent.parse_magnet_uri(magnet).info_hashes.v1) == one
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "plain.iso.torrent"
    download.value.save_as(tmp_path / "got")
    made = libtorrent.bdecode((tmp_path / "got").read_bytes())
    assert made[b"announce"].decode() == f"{visited.site}/announce"
    assert str(libtorrent.torrent_info(made).info_hash()) == one


# Screenshots

ISOS = {
    "debian-12.7.0-amd64-netinst.iso": "linux/debian",
    "ubuntu-24.04.1-desktop-amd64.iso": "linux/ubuntu",
    "Fedora-Workstation-Live-x86_64-41-1.4.iso": "linux/fedora",
    "archlinux-2024.10.01-x86_64.iso": "linux",
    "FreeBSD-14.1-RELEASE-amd64-dvd1.iso": "bsd",
    "openSUSE_Tumbleweed_with_a_very_long_name_without_spaces.iso": "linux",
    "LibreOffice_24.8.2_Linux_x86-64_deb.tar.gz": "office",
}
PEERS = (11, 23, 9, 4, 6, 0, 3)


@pytest.fixture
def harbour(tmp_path):
    """URLs of pages with likely contents, by name."""
    folder, ports = tmp_path / "torrents", (free_port(), free_port(), free_port())
    for number, (name, category) in enumerate(ISOS.items()):
        size = 700_000_000 + number * 611_000_000
        pieces = b"p" * 20 * -(-size // 2**22)
        info = {"length": size, "piece length": 2**22, "pieces": pieces}
        info |= {"private": 1} if category == "bsd" else {}
        put(folder / category, number, name, info, {})
    text = (
        "The small installer of Debian 12.\n\nSee https://www.debian.org/releases/.\n"
    )
    (folder / "linux/debian/0.txt").write_text(text)
    (tmp_path / "keys.txt").write_text(f"{MEMBER} Ana publish\n")
    common = {"TRACKER_TITLE": "ISO Harbour", "TRACKER_TORRENTS": str(folder)}
    private = {**common, "TRACKER_PRIVATE": "yes", "TRACKER_DATA": str(tmp_path / "p")}
    empty = {
        "TRACKER_DATA": str(tmp_path / "e"),
        "TRACKER_TORRENTS": str(tmp_path / "n"),
    }
    common["TRACKER_DATA"] = str(tmp_path / "data")
    with (
        serving(gunicorn(ports[0]), ports[0], common) as site,
        serving(gunicorn(ports[1]), ports[1], private) as members,
        serving(gunicorn(ports[2]), ports[2], empty) as bare,
    ):
        with urlopen(f"{site.url}/torrents.json") as answer:
            listed = json.load(answer)["torrents"]
        for torrent, peers in zip(listed, PEERS, strict=True):
            info_hash = bytes.fromhex(torrent["info_hash"])
            for number in range(peers):
                left = 0 if number % 3 == 0 else torrent["size"] * number // 30
                announce(
                    site.url, info_hash, b"%020d" % number, 5000 + number, left=left
                )
        pages = {torrent["category"]: torrent["page"] for torrent in listed}
        yield {
            "front": f"{site.url}/?",
            "torrent": pages["linux/debian"],
            "private": pages["bsd"],
            "publish": f"{members.url}/{MEMBER}/?category=office#publish",
            "empty": f"{bare.url}/?",
        }


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "scheme"),
    list(itertools.product((1200, 800, 390), ("light", "dark"))),
)
def test_screenshots_are_made(visit, harbour, width, scheme):
    """They are kept, so that a change of the pages is seen; README shows one."""
    for name, url in harbour.items():
        site, slash, path = url.partition("/torrent/" if "/torrent/" in url else "/?")
        page = visit(slash + path, site, width=width, scheme=scheme).page
        path = Path(__file__).with_name("screenshots") / f"{name}-{width}-{scheme}.jpeg"
        page.screenshot(path=path, type="jpeg", quality=35)


# For members only


@pytest.fixture
def private(tmp_path):
    """Return the URL of a private tracker; the key MEMBER may publish there."""
    (tmp_path / "keys.txt").write_text(f"{MEMBER} Ana publish\n")
    folder, port = tmp_path / "torrents", free_port()
    environ = {"TRACKER_DATA": str(tmp_path / "data"), "TRACKER_PRIVATE": "yes"}
    environ["TRACKER_TORRENTS"] = str(folder)
    with serving(gunicorn(port), port, environ) as server:
        yield server.url
        assert "Traceback" not in server.log()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_a_member_publishes_and_removes(visit, private, tmp_path, width, scheme):
    (tmp_path / "new.torrent").write_bytes(torrent_of("new.iso", length=10_000))
    visited = visit(f"/{MEMBER}/", private, width=width, scheme=scheme)
    page = visited.page
    assert f"{private}/{MEMBER}/announce" in page.content()
    check(page, tmp_path / "member.png", width)
    # 1. Publish a torrent in a category.
    page.get_by_label("Torrent file").set_input_files(tmp_path / "new.torrent")
    page.get_by_label("Category").fill("linux/arch")
    visited.follow(page.get_by_role("button", name="Publish"))
    assert page.locator("h1").inner_text() == "new.iso"
    page.get_by_text("Details").click()
    info_hash = bytes.fromhex(page.locator("dd code").inner_text())
    for peer, left in enumerate((10_000, 6_500, 100, 0)):
        url = f"{private}/{MEMBER}"
        announce(url, info_hash, b"%020d" % peer, 5000 + peer, left=left)
    page.reload()
    chart = page.get_by_role("img").get_attribute("aria-label")
    assert " ".join(chart.split()).endswith(": 1, 0, 0, 1, 0, 0, 0, 0, 0, 1")
    assert page.get_by_text("they have 44%").is_visible()
    check(page, tmp_path / "progress.png", width)
    # 2. Move it, and remove it.
    page.get_by_text("Move or remove").click()
    check(page, tmp_path / "edit.png", width)
    page.get_by_label("Category").fill("bsd")
    visited.follow(page.get_by_role("button", name="Move", exact=True))
    assert page.get_by_role("link", name="bsd").is_visible()
    page.get_by_text("Move or remove").click()
    visited.follow(page.get_by_role("button", name="Remove"))
    assert page.url == f"{private}/{MEMBER}/" and visited.names() == []
    assert list((tmp_path / "torrents/bsd").iterdir()) == []


def test_another_site_can_do_nothing(visit, private, tmp_path):
    visited = visit("/", private)
    assert visited.page.get_by_text("This tracker needs a key").is_visible()
    check(visited.page, tmp_path / "stranger.png", 1200)
    visited.page.set_content(f"""<form method="post" action="{private}/publish"
        enctype="multipart/form-data"><input type="file" name="torrent"><button>""")
    (tmp_path / "new.torrent").write_bytes(torrent_of("new.iso"))
    visited.page.locator("input").set_input_files(tmp_path / "new.torrent")
    visited.follow(visited.page.locator("button"))
    assert visited.page.get_by_text("This tracker needs a key").is_visible()
    assert not (tmp_path / "torrents").exists()
    assert len(visited.wrong) == 2 and all("403" in each for each in visited.wrong)
    visited.wrong.clear()
