"""Real transfers: clients that know of one another by nothing but the tracker.

libtorrent seeds, and libtorrent and aria2 download, on loopback and with every other
way to find peers turned off.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import bencoder
import libtorrent
import pytest
from makers import MAKERS, PAYLOADS
from servers import (
    APP,
    announce,
    free_port,
    gunicorn,
    has_ipv6,
    poll,
    scrape,
    serving,
    uwsgi,
)

PAYLOAD = random.Random(1).randbytes(600_000)
CHECKSUM = hashlib.sha256(PAYLOAD).hexdigest()
KINDS = {
    "v1": libtorrent.create_torrent.v1_only,
    "v2": libtorrent.create_torrent.v2_only,
    "hybrid": 0,
}
ALONE = (
    libtorrent.torrent_flags.disable_dht
    | libtorrent.torrent_flags.disable_lsd
    | libtorrent.torrent_flags.disable_pex
)


@pytest.fixture(params=[gunicorn, uwsgi], ids=["gunicorn", "uwsgi"])
def server(request, tmp_path):
    port = free_port()
    env = {"TRACKER_DATA": str(tmp_path / "data")}
    with serving(request.param(port), port, env) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_libtorrent_downloads_from_libtorrent(server, tmp_path, kind):
    info = make_torrent(tmp_path / "seed", server.url, KINDS[kind])
    (tmp_path / "leech").mkdir()
    with session() as seeding, session() as leeching:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(server, info), 20, "the seeder's announce")
        leecher = add(leeching, info, tmp_path / "leech")
        poll(lambda: leecher.status().is_seeding, 30, "the download")
        check_payload(tmp_path / "leech" / "payload")
        poll(lambda: snatched(server, info), 20, "the news that it is complete")


@pytest.mark.parametrize("server", [uwsgi], ids=["uwsgi"], indirect=True)
def test_libtorrent_that_is_killed_and_restarted_is_one_peer(server, tmp_path):
    """It draws a new peer_id at each start, and cannot say that it stops."""
    info = make_torrent(tmp_path / "seed", server.url, KINDS["v1"])
    path, port, met = tmp_path / "x.torrent", free_port(), set()
    metainfo = {"announce": f"{server.url}/announce"}
    metainfo["info"] = libtorrent.bdecode(info.info_section())
    path.write_bytes(libtorrent.bencode(metainfo))

    def new_peers():
        """Return the seeders of one reply, if one of them was not met before."""
        asker = {"port": 1, "left": 1, "compact": 0}
        reply = announce(server.url, hashes(info)[0], b"-XX0001-who is here?", **asker)
        peers = {peer[b"peer id"]: peer[b"port"] for peer in reply[b"peers"]}
        return peers if peers.keys() - met else None

    for _ in range(4):
        arguments = str(path), str(tmp_path / "seed"), port
        seeder = get_context("spawn").Process(target=seed, args=arguments)
        seeder.start()
        found = poll(new_peers, 20, "the announce of the new process")
        seeder.kill()
        seeder.join()
        assert [*found.values()] == [port] and seeded(server, info)
        met |= found.keys()


def seed(path, folder, port):
    """Seed a .torrent file until this process is killed."""
    with session(port) as seeding:
        add(seeding, libtorrent.torrent_info(path), folder)
        signal.pause()


@pytest.mark.parametrize("server", [gunicorn], ids=["gunicorn"], indirect=True)
def test_aria2_downloads_from_a_magnet_link(server, tmp_path):
    info = make_torrent(tmp_path / "seed", server.url, KINDS["v1"])
    magnet = f"magnet:?xt=urn:btih:{info.info_hash()}&tr={server.url}/announce"
    with session() as seeding:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(server, info), 20, "the seeder's announce")
        ended = subprocess.run(
            [program("aria2c"), *ARIA2_OPTIONS, f"--listen-port={free_port()}", magnet],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_payload(tmp_path / "payload")


ARIA2_OPTIONS = (
    "--no-conf",
    "--enable-dht=false",
    "--enable-dht6=false",
    "--bt-enable-lpd=false",
    "--enable-peer-exchange=false",
    "--bt-stop-timeout=40",
    "--seed-time=0",
    "--file-allocation=none",
    "--summary-interval=0",
)


def program(name):
    """Return the path of a client; skip without it, or fail where CI is set."""
    if path := shutil.which(name):
        return path
    reason = f"{name} IS NOT INSTALLED: its download is NOT tested"
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@contextmanager
def session(port=None, address="127.0.0.1"):
    """Yield a libtorrent session that finds peers by trackers only."""
    settings = {
        "listen_interfaces": f"{address}:{port or free_port()}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "allow_multiple_connections_per_ip": True,
        "stop_tracker_timeout": 1,
        "unchoke_interval": 1,  # Transmission waits for that
        "alert_mask": 0,
    }
    session = libtorrent.session(settings)
    yield session
    for torrent in session.get_torrents():
        session.remove_torrent(torrent)


def make_torrent(folder, url, flags):
    """Put the payload into a new folder, and return the torrent_info for it."""
    folder.mkdir()
    (folder / "payload").write_bytes(PAYLOAD)
    files = libtorrent.list_files(str(folder / "payload"))
    torrent = libtorrent.create_torrent(files, 16384, flags)
    torrent.add_tracker(f"{url}/announce")
    libtorrent.set_piece_hashes(torrent, str(folder))
    return libtorrent.torrent_info(torrent.generate())


def add(session, info, folder):
    """Start a torrent in a session, and return its handle."""
    parameters = libtorrent.add_torrent_params()
    parameters.ti, parameters.save_path = info, str(folder)
    parameters.flags &= ~libtorrent.torrent_flags.paused
    parameters.flags |= ALONE
    return session.add_torrent(parameters)


def hashes(info):
    """Return the 20 bytes by which trackers know a torrent, of a hybrid twice."""
    both = info.info_hashes()
    found = [both.v1.to_bytes()] if both.has_v1() else []
    return found + ([both.v2.to_bytes()[:20]] if both.has_v2() else [])


def scraped(server, info, path=""):
    files = scrape(server.url + path, *hashes(info))[b"files"]
    return [files[info_hash] for info_hash in hashes(info)]


def seeded(server, info, path=""):
    """Return whether the tracker counts one seeder in each swarm of a torrent."""
    return all(file[b"complete"] == 1 for file in scraped(server, info, path))


def snatched(server, info):
    """Return whether the tracker counts a second seeder, who has downloaded it all.

    For a hybrid, one swarm is enough: libtorrent tells the other only later when it is
    done before the other has answered its first announce.
    """
    done = [(file[b"complete"], file[b"downloaded"]) for file in scraped(server, info)]
    return (2, 1) in done


def check_payload(path):
    """Fail unless the payload is at a path, where it may still be written."""

    def check():
        found = path.read_bytes() if path.exists() else b""
        return hashlib.sha256(found).hexdigest() == CHECKSUM

    poll(check, 10, "the payload with the right checksum")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A tracker that lists what is in a folder, and that folder."""
    port, folder = free_port(), tmp_path_factory.mktemp("site")
    (folder / "torrents").mkdir()
    env = {"TRACKER_DATA": str(folder / "data"), "TRACKER_TRACK": "listed"}
    env["TRACKER_TORRENTS"] = str(folder / "torrents")
    # One worker: a client that asks another, which does not list a torrent yet, is told
    # so, and comes back in half an hour.
    with serving(gunicorn(port, workers=1), port, env) as server:
        yield server, folder / "torrents"


@pytest.mark.parametrize("maker", [m for m in MAKERS if not m.startswith("by hand")])
def test_what_the_site_lists_is_seeded_and_downloaded(site, tmp_path, maker):
    """By a client that has only the downloaded file, and one with the magnet link."""
    server, folder = site
    for path in (folder / maker, *(tmp_path / name for name in ("seed", "leech"))):
        path.mkdir()
    payload = PAYLOADS["markup"](tmp_path / "seed")
    made = libtorrent.torrent_info(str(MAKERS[maker](folder / maker, payload)))
    (info_hash, *_) = hashes(made)
    page = f"{server.url}/torrent/{info_hash.hex()}"
    got = poll(lambda: fetch(f"{page}.torrent"), 5, "the site to list it")
    known = json.loads(fetch(f"{page}.json"))
    info = libtorrent.torrent_info(libtorrent.bdecode(got))
    assert hashes(info) == hashes(made)
    with session() as seeding, session() as leeching, session() as linked:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(server, info), 20, "the seeder's announce")
        clients = [add(leeching, info, tmp_path / "leech")]
        if known["magnet"]:
            parameters = libtorrent.parse_magnet_uri(known["magnet"])
            parameters.save_path = str(tmp_path / "magnet")
            parameters.flags |= ALONE
            clients.append(linked.add_torrent(parameters))
        for client in clients:
            poll(lambda c=client: c.status().is_seeding, 40, "the download")
        for client in clients:
            assert client.torrent_file().info_hashes() == made.info_hashes()
    assert known["private"] == made.priv() == (not known["magnet"])


def fetch(url):
    """Return what is at a URL, b"" where there is nothing."""
    try:
        with urlopen(url, timeout=10) as response:
            return response.read()
    except HTTPError as error:
        assert error.code == 404
        return b""


# Over UDP


@pytest.fixture
def app(tmp_path):
    """python app.py, which serves HTTP and UDP on the same port.

    libtorrent keeps a connection id for a minute, whichever port the tracker has. So
    all trackers here have the same key.
    """
    port = free_port()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/udp.key").write_bytes(b"k" * 32)
    command = [*APP, "--port", port, "--verbose"]
    with serving(command, port, {"TRACKER_DATA": str(tmp_path / "data")}) as server:
        yield server
        assert "Traceback" not in server.log()


def own_address():
    """Return an address of this machine: Transmission ignores peers on loopback."""
    with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # this sends nothing
        return probe.getsockname()[0]
    pytest.skip("NOT TESTED is a client that needs another address than 127.0.0.1")


PRIVATE = {
    "member": "m" * 26,
    "revoked": "r" * 26,
    "expired": "e" * 26,
    "stranger": "",
}


@pytest.fixture
def private(tmp_path):
    """python app.py, for members only."""
    keys = f"{PRIVATE['member']} Ana\n{PRIVATE['expired']} Cy until=2020-02-28\n"
    (tmp_path / "keys.txt").write_text(keys)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/udp.key").write_bytes(b"k" * 32)
    port, folder = free_port(), str(tmp_path / "torrents")
    command = [*APP, "--port", str(port), "--verbose"]
    env = {"TRACKER_DATA": str(tmp_path / "data"), "TRACKER_PRIVATE": "yes"}
    with serving(command, port, env | {"TRACKER_TORRENTS": folder}) as server:
        yield server
        assert "Traceback" not in server.log()
        assert not any(key in server.log() for key in PRIVATE.values() if key)


PATH, PASSKEY = "/{}/announce", "/announce?passkey={}"
MEMBERS = [("libtorrent over UDP", PATH), ("libtorrent over UDP", PASSKEY)]
MEMBERS += [("libtorrent", PASSKEY), ("aria2", PATH), ("aria2", PASSKEY)]
MEMBERS += [("Transmission", PATH), ("qBittorrent", PASSKEY), ("qBittorrent", PATH)]


@pytest.mark.parametrize(("name", "form"), MEMBERS)
def test_members_share_and_others_do_not(private, tmp_path, name, form):
    address, key = own_address(), PRIVATE["member"]
    scheme = "udp" if "UDP" in name else "http"
    url = f"{scheme}://{address}:{private.port}{form}"
    site = f"http://{address}:{private.port}/{key}"
    info = make_torrent(tmp_path / "seed", site, KINDS["v1"])
    with session(address=address) as seeding:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(private, info, f"/{key}"), 20, "the seeder's announce")
        for who in ("revoked", "expired") * (form == PATH) + ("stranger", "member"):
            folder = tmp_path / f"{name}-{who}/leech"
            folder.mkdir(parents=True)
            metainfo = {b"announce": url.format(PRIVATE[who]).encode()}
            metainfo[b"info"] = bencoder.bdecode(info.info_section())
            torrent = folder.with_name("x.torrent")
            torrent.write_bytes(bencoder.bencode(metainfo))
            refusals = private.log().count("refused: this tracker needs a key")
            with leeching(name, folder, torrent, address):
                if who == "member":
                    poll(partial(is_whole, folder / "payload"), 60, "the download")
                else:
                    reason = "refused: this tracker needs a key"
                    poll(partial(has_more, private, reason, refusals), 60, "a refusal")


def has_more(server, text, number):
    return server.log().count(text) > number


@contextmanager
def leeching(name, folder, torrent, address):
    """Run a client that downloads a torrent."""
    if name not in COMMANDS:
        with session(address=address) as client:
            add(client, libtorrent.torrent_info(str(torrent)), folder)
            yield
        return
    command = COMMANDS[name](folder, free_port(), torrent)
    with open(folder.with_name("log"), "wb") as log:
        client = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield
        finally:
            client.kill()
            client.wait()


def aria2_command(folder, port, torrent):
    # Without DHT, aria2 has no socket for UDP trackers.
    options = [each for each in ARIA2_OPTIONS if each != "--enable-dht=false"]
    options += [f"--listen-port={port}", f"--dht-listen-port={port}"]
    return [program("aria2c"), *options, "-d", folder, torrent]


def transmission_command(folder, port, torrent):
    Path(f"{folder}-settings").mkdir()
    settings = {"utp-enabled": False, "dht-enabled": False, "pex-enabled": False}
    Path(f"{folder}-settings/settings.json").write_text(json.dumps(settings))
    options = ["-g", f"{folder}-settings", "-w", folder, "-p", str(port), "-M"]
    return [program("transmission-cli"), *options, torrent]


QBITTORRENT_SETTINGS = r"""
[LegalNotice]
Accepted=true
[BitTorrent]
Session\DHTEnabled=false
Session\LSDEnabled=false
Session\PeXEnabled=false
Session\Port={port}
[Preferences]
WebUI\Enabled=false
"""


def qbittorrent_command(folder, port, torrent):
    settings = folder.with_name("profile") / "qBittorrent/config/qBittorrent.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(QBITTORRENT_SETTINGS.format(port=port))
    options = [f"--profile={folder.with_name('profile')}", f"--save-path={folder}"]
    return [program("qbittorrent-nox"), *options, torrent]


COMMANDS = {
    "aria2": aria2_command,
    "Transmission": transmission_command,
    "qBittorrent": qbittorrent_command,
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "udp") for name in COMMANDS), ("aria2", "http")],
)
def test_a_client_downloads_over_udp(app, tmp_path, name, scheme):
    """From libtorrent, which announces over UDP or over HTTP."""
    address = own_address()
    over_udp = f"udp://{address}:{app.port}"
    url = over_udp if scheme == "udp" else f"http://{address}:{app.port}"
    info = make_torrent(tmp_path / "seed", url, KINDS["v1"])
    metainfo = {b"announce": f"{over_udp}/announce".encode()}
    metainfo[b"info"] = bencoder.bdecode(info.info_section())
    (tmp_path / "x.torrent").write_bytes(bencoder.bencode(metainfo))
    (tmp_path / "leech").mkdir()
    command = COMMANDS[name](tmp_path / "leech", free_port(), tmp_path / "x.torrent")
    with session(address=address) as seeding, open(tmp_path / "log", "wb") as log:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(app, info), 20, "the seeder's announce")
        client = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            done = partial(is_whole, tmp_path / "leech/payload")
            poll(done, 60, f"the download, {(tmp_path / 'log').read_bytes()}")
            poll(lambda: f" udp {address} {name} " in app.log(), 20, "an announce")
        finally:
            client.kill()
            client.wait()


def is_whole(path):
    return path.exists() and path.read_bytes() == PAYLOAD


@pytest.mark.parametrize("address", ["127.0.0.1", *["::1"] * has_ipv6()])
def test_libtorrent_downloads_over_udp(app, tmp_path, address):
    host = f"[{address}]" if ":" in address else address
    info = make_torrent(tmp_path / "seed", f"udp://{host}:{app.port}", KINDS["hybrid"])
    (tmp_path / "leech").mkdir()
    with session(address=host) as seeding, session(address=host) as leeching:
        add(seeding, info, tmp_path / "seed")
        poll(lambda: seeded(app, info), 20, "the seeder's announce")
        leecher = add(leeching, info, tmp_path / "leech")
        poll(lambda: leecher.status().is_seeding, 30, "the download")
        poll(lambda: snatched(app, info), 20, "the news that it is complete")
    announces = [line for line in app.log().splitlines() if " libtorrent " in line]
    assert len(announces) >= 4 and all(" udp " in line for line in announces)
