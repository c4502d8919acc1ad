"""Hosts: every recipe in the README, on the real servers.

The README names the hosts, and each goes through all CHECKS.
"""

import http.client
import multiprocessing
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import bencoder
import pytest
from hosts import HOSTS, Site, readme, recipe, require
from servers import (
    ROOT,
    Server,
    announce,
    announce_path,
    free_port,
    has_ipv6,
    scrape,
    scrape_path,
)

pytestmark = pytest.mark.skipif(not has_ipv6(), reason="no host without IPv6 here")

HERE4 = b"\x7f\0\0\1"
HERE6 = bytes(15) + b"\1"
CLIENTS = 4
CROWDED = [b"\xff\0 a crowded swarm %d" % number for number in range(3)]


@contextmanager
def site_of(name, *settings):
    require(name, *HOSTS[name].needs)
    site = Site(HOSTS[name])
    try:
        site.prepare(*settings)
        yield site
        assert "Traceback" not in site.log()
    finally:
        site.remove()


@pytest.mark.parametrize("name", HOSTS)
def test_host(name, subtests):
    with site_of(name) as site, ExitStack() as running:
        running.enter_context(site.serving())
        for said, check in CHECKS.items():
            if check is restarts:
                running.close()
            with subtests.test(said):
                check(site)


def announces(site):
    """Check that a peer is given the endpoint of another."""
    info_hash = b"announce".ljust(20, b"\xfe")
    announce(site.urls[0], info_hash, peer_id(1), 7001, left=0)
    reply = announce(site.urls[-1], info_hash, peer_id(2), 7002, left=1)
    assert reply[b"peers"] == endpoint(HERE4, 7001)


def dual_stack(site):
    """Check that a client with two addresses is one peer with two endpoints."""
    info_hash = b"dual stack".ljust(20, b"\xfe")
    for number in (1, 2):
        for url in (site.urls[0], over_ipv6(site.urls[-1])):
            port = 7000 + number
            reply = announce(url, info_hash, peer_id(number), port, left=number - 1)
    assert (reply[b"complete"], reply[b"incomplete"]) == (1, 1)
    assert reply[b"peers6"] == endpoint(HERE6, 7001)
    reply = announce(site.urls[-1], info_hash, peer_id(2), 7002, left=1)
    assert reply[b"peers"] == endpoint(HERE4, 7001)


def scrapes_60(site):
    """Check that a scrape of 60 percent-encoded hashes fits into all buffers."""
    hashes = [b"\0\xff" + bytes((number,)) * 18 for number in range(130, 190)]
    assert len(scrape_path(*hashes)) > 4200
    announce(site.urls[0], hashes[7], peer_id(1), 7001, left=0)
    for url in (*site.urls, over_ipv6(site.urls[0])):
        files = scrape(url, *hashes)[b"files"]
        assert set(files) == set(hashes)
        assert [files[i][b"complete"] for i in hashes] == [0] * 7 + [1] + [0] * 52


def concurrent_processes(site):
    """Check that peers of concurrent clients are counted exactly once."""
    peers, fork = site.host.peers, multiprocessing.get_context("fork")
    work = [(site.urls, client, peers) for client in range(CLIENTS)]
    with fork.Pool(CLIENTS) as pool:
        pool.starmap(crowd, work)
    check_crowd(site)


def crowd(urls, client, peers):
    """Announce peers over IPv4 and IPv6, in swarms that all clients share."""
    for number in range(peers):
        url, port = urls[client % len(urls)], 7000 + client * peers + number
        info_hash = CROWDED[number % len(CROWDED)]
        for each in (url, over_ipv6(url)):
            announce(each, info_hash, peer_id(port), port, left=client % 2)


def check_crowd(site):
    each = CLIENTS * site.host.peers // len(CROWDED) // 2
    for url in site.urls:
        files = scrape(url, *CROWDED)[b"files"]
        counts = [(files[i][b"complete"], files[i][b"incomplete"]) for i in CROWDED]
        assert counts == [(each, each)] * len(CROWDED)


def slow_clients(site):
    """Check that fifty clients of every kind of STALLS delay no others."""
    stalls(site, STALLS.values())


def stalls(site, beginnings):
    """Announce while fifty clients stall after one of these beginnings."""
    with ExitStack() as opened:
        for url in site.urls:
            for beginning in islice(cycle(beginnings), STALLED):
                opened.enter_context(raw(url, at(url, beginning)))
        for number in range(4):
            answers_within(site, 20, number)  # CGI starts a program for each client


def answers_within(site, seconds, number=0):
    """Announce a peer to each server; fail unless each replies in time."""
    for url in site.urls:
        query = announce_path(b"honest".ljust(20, b"\xfe"), peer_id(number), 7001)
        with urlopen(url + query, timeout=seconds) as response:
            assert b"peers" in bencoder.bdecode(response.read())


def restarts(site):
    """Check that a restart keeps the peers."""
    with site.serving():
        check_crowd(site)


STALLED = 50
HEAD = b" HTTP/1.1\r\nHost: localhost\r\n"
LOOK = b"GET PATH/scrape" + HEAD
LENGTH = b"Content-Length: %d\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
STALLS = {  # what a client sends before it stalls
    "nothing": b"",
    "half a line": b"GET PATH/announce?info_hash=",
    "half a head": b"GET PATH/announce" + HEAD + b"X-",
    "half a body": b"POST PATH/" + HEAD + LENGTH % 99 + b"x",
    "half a long body": b"POST PATH/scrape" + HEAD + LENGTH % 300_000 + b"x" * 150_000,
    "half a chunk": b"POST PATH/scrape" + HEAD + CHUNKED + b"99\r\nx",
    "half of the next": LOOK + b"\r\nGET /",
    "no hang-up": LOOK + b"Connection: close\r\n\r\n",
}

CHECKS = {
    "announce": announces,
    "dual stack": dual_stack,
    "60-hash scrape": scrapes_60,
    "concurrent processes": concurrent_processes,
    "slow clients": slow_clients,
    "restart keeps peers": restarts,
}


def test_readme_names_these_hosts():
    named = readme().partition("The hosts are: ")[2].partition(".\n")[0]
    assert " ".join(named.split()).split("; ") == [*HOSTS]


# -- Abuse ----------------------------------------------------------------------------


@pytest.mark.long  # test_host mixes all kinds
@pytest.mark.parametrize("name", HOSTS)
def test_slow_clients_of_every_kind(name, subtests):
    with site_of(name) as site, site.serving():
        for said, beginning in STALLS.items():
            with subtests.test(said):
                stalls(site, [beginning])


HASH = b"broken".ljust(20, b"\xfe")
LINE = b"GET PATH" + announce_path(HASH, b"-HOST01-000000000001", 7001).encode()
LONG = b"X: " + b"y" * 8000 + b"\r\n"
# What is sent, and the beginning of the answer if there must be one.
BROKEN = {
    "HTTP/1.0": (LINE + b" HTTP/1.0\r\n\r\n", b"HTTP/1."),
    "a body": (LINE + HEAD + b"Content-Length: 4\r\n\r\nbody", b"HTTP/1."),
    "two at once": ((LINE + HEAD + b"\r\n") * 2, b"HTTP/1.1 200"),
    "HTTP/0.9": (LINE + b"\r\n", b""),
    "a long line": (LINE + b"&x=" + b"y" * 100_000 + HEAD + b"\r\n", b""),
    "long headers": (LINE + HEAD + LONG * 20 + b"\r\n", b""),
    "many headers": (LINE + HEAD + b"X: y\r\n" * 5000 + b"\r\n", b""),
    "bytes of anything": (bytes(range(255, -1, -1)) * 20, b""),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500), b""),
    "NUL": (b"GET PATH/announce?info_hash=\0\0\0" + HEAD + b"\r\n", b""),
    "no method": (b"\r\n\r\n\r\n", b""),
    "no chunk": (b"POST PATH/" + HEAD + CHUNKED + b"zz\r\n", b""),
}


@pytest.mark.parametrize("name", HOSTS)
def test_broken_requests_break_nothing(name, subtests):
    with site_of(name) as site, site.serving():
        for said, (request, beginning) in BROKEN.items():
            with subtests.test(said):
                with raw(site.urls[0], at(site.urls[0], request)) as connection:
                    if beginning:
                        assert connection.recv(16).startswith(beginning)
                answers_within(site, 5)


def raw(url, data):
    """Return a connection on which ``data`` was sent."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=5)
    with suppress(OSError):  # a server may refuse it before the end
        connection.sendall(data)
    return connection


def at(url, request):
    return request.replace(b"PATH", urlsplit(url).path.encode())


# -- Addresses ------------------------------------------------------------------------

FORGED = "X-Forwarded-For", "203.0.113.9"
FORGERIES = {
    "nothing": [],
    "one line": [FORGED],
    "two lines": [FORGED, FORGED],
    "many entries": [(FORGED[0], ", ".join([FORGED[1]] * 50))],
    "all names": [FORGED, ("X-Real-IP", FORGED[1]), ("Forwarded", "for=203.0.113.9")],
}


@pytest.mark.parametrize("name", [n for n, host in HOSTS.items() if host.is_proxied])
def test_a_proxy_says_who_the_client_is(name, subtests):
    with site_of(name) as site, site.serving():
        for number, (said, headers) in enumerate(FORGERIES.items()):
            with subtests.test(said):
                found = address_recorded(site.urls[0], number, headers, "127.0.0.2")
                assert found == bytes((127, 0, 0, 2))


@pytest.mark.parametrize(
    ("proxies", "failure"),
    [
        ("1", ""),
        ("0", "sees this machine, 127.0.0.2, as 127.0.0.1."),
        ("2", "only 1 of 2 entries in X-Forwarded-For"),
    ],
)
@pytest.mark.parametrize("name", ["nginx, gunicorn", "Apache, gunicorn"])
def test_the_doctor_names_wrong_proxies(name, proxies, failure):
    with site_of(name, f"proxies = {proxies}") as site, site.serving():
        if name.startswith("nginx") and proxies == "0":
            failure = "set proxies = 1"  # a socket has no client address
        command = [sys.executable, "app.py", "doctor", f"{site.urls[0]}/announce"]
        done = subprocess.run(command, cwd=site.folder, capture_output=True, text=True)
    assert done.returncode == bool(failure), done.stdout
    assert done.stdout.count("\nfailure ") == bool(failure), done.stdout
    assert failure in done.stdout


@pytest.mark.parametrize(
    "name", [n for n, host in HOSTS.items() if not host.is_proxied]
)
def test_the_last_line_of_a_header_counts(name):
    """HAProxy adds a line. A server that used the first one would trust the client."""
    with site_of(name, "proxies = 1") as site, site.serving():
        lines = [("X-Forwarded-For", f"203.0.113.{number}") for number in (1, 2)]
        for url in site.urls:
            assert address_recorded(url, 1, lines) == bytes((203, 0, 113, 2))


def address_recorded(url, number, headers, source="127.0.0.1"):
    """Announce from an address with headers; return the address that peers get."""
    info_hash = b"whose address is %03d" % number
    get(url + announce_path(info_hash, peer_id(1), 7001), headers, source)
    reply = get(url + announce_path(info_hash, peer_id(2), 7002), headers, source)
    assert reply[b"peers"][4:] == (7001).to_bytes(2, "big"), reply
    return reply[b"peers"][:4]


def get(url, headers, source):
    """Return the decoded reply to a request from an address, with these headers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname, parts.port, timeout=20, source_address=(source, 0)
    )
    connection.putrequest("GET", f"{parts.path}?{parts.query}")
    for header in headers:
        connection.putheader(*header)
    connection.endheaders()
    reply = bencoder.bdecode(connection.getresponse().read())
    connection.close()
    return reply


# -- Other promises of the recipes ----------------------------------------------------


@pytest.mark.parametrize("name", [n for n in HOSTS if n.endswith("CGI")])
def test_a_cgi_host_gives_out_no_files(name):
    with site_of(name) as site, site.serving():
        announces(site)
        folder = site.urls[0].removesuffix("/app.py")
        (site.folder / "data").mkdir()
        (site.folder / "data" / "file").touch()
        for file in ("wsgi.ini", ".htaccess", "requirements.txt", "data/file", ""):
            for way in ("", "./", "/", "app.py/../", "app.py%2f..%2f", "data/../"):
                with pytest.raises(HTTPError, match="40[034]"):
                    urlopen(f"{folder}/{way}{file}", timeout=20)
        assert any((site.home / "tracker-data").iterdir())


@pytest.mark.parametrize("name", ["tracker", "tracker-udp"])
def test_the_units_are_taken_by_systemd(tmp_path, name):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd IS NOT HERE: only test_host runs the unit's command")
    programs = (
        f"/home/you/tracker/.venv/bin/{'uwsgi' if name == 'tracker' else 'python'}"
    )
    unit = tmp_path / f"{name}.service"
    text = recipe("/etc/systemd/system/tracker.service", {})
    if name == "tracker-udp":
        (line,) = re.findall("`(ExecStart=.* udp .*)`", readme())
        text = re.sub("RuntimeDirectory=.*\n", "", text)  # one unit must own it
        text = re.sub("ExecStart=.*", line, text)
    assert programs in text
    unit.write_text(text.replace(programs, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_container_serves(tmp_path):
    """Run the Dockerfile's lines without a container, in an empty environment."""
    for file in ("app.py", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    port, data = free_port(), tmp_path / "data"
    text = recipe(
        "Dockerfile", {"/data": data, '"app.py"': f'"app.py", "--port={port}"'}
    )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = f"{tmp_path}/venv/bin:/usr/bin:/bin"
    lines = dict(line.split(" ", 1) for line in text.splitlines()[1:])
    env = {"PATH": path, **dict([lines["ENV"].split("=")])}
    subprocess.run(lines["RUN"], shell=True, cwd=tmp_path, env=env, check=True)
    command = [word.strip('",') for word in shlex.split(lines["CMD"].strip("[]"))]
    server = Server(command, port, env, tmp_path)
    try:
        server.wait_until_ready()
        announce(server.url, CROWDED[0], peer_id(1), 7001, left=0)
        assert any(data.iterdir())
    finally:
        server.stop()
        server.output.close()


def peer_id(number):
    return b"-HOST01-%012d" % number


def endpoint(address, port):
    return address + port.to_bytes(2, "big")


def over_ipv6(url):
    return url.replace("127.0.0.1", "[::1]")
