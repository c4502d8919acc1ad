"""Many clients at once: exact counts, killed workers, and damaged files.

All that a client was told is recorded has to be there afterwards, whatever happened to
the processes that told it.
"""

import http.client
import os
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from threading import Event, Lock

import bencoder
import psutil
import pytest
from conftest import kept, rewrite
from servers import (
    announce,
    announce_path,
    free_port,
    gunicorn,
    poll,
    scrape,
    scrape_path,
    serving,
    uwsgi,
)

SWARMS = [b"swarm number %07d" % number for number in range(50)]
PEERS = 200  # in each swarm
CLIENTS = 64
FRESH = b"-FRESH-a fresh peer-"


def test_counts_are_exact_after_a_storm(tmp_path):
    port = free_port()
    with serving(gunicorn(port, 4, 4), port, settings(tmp_path)) as server:
        peers = sorted(a_crowd(), key=Peer.swarm)  # so that all want the same lock
        storm = Storm(port, peers)
        storm.run()
        assert storm.acknowledged == set(peers)
        assert not storm.refused
        for info_hash in SWARMS:
            here = {peer for peer in peers if peer.info_hash == info_hash}
            leechers = sum(1 for peer in here if peer.left)
            assert counted(server, info_hash) == (PEERS - leechers, leechers)
            assert handed_out(server, info_hash) == {peer.port for peer in here}
        check_log(server)


# Workers are killed while clients come, stay, complete and go.

SIZES = {bytes((size % 256,)) * 20: size for size in (4, 40, 90, 200, 700)}
RESTLESS = 32  # clients
HOSTS = {  # and how many seconds are between two kills: gunicorn's workers start slowly
    "gunicorn": (lambda port: gunicorn(port, 4, 4), 0.5),
    "uwsgi": (uwsgi, 0.1),
}


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_acknowledged_is_lost_when_workers_are_killed(tmp_path, is_long, host):
    port, seconds = free_port(), 60 if is_long else 4
    command, pause = HOSTS[host]
    with serving(command(port), port, settings(tmp_path)) as server:
        storm = KillStorm(server, pause)
        with ThreadPoolExecutor(RESTLESS + 1) as pool:
            running = [pool.submit(storm.run_client, n) for n in range(RESTLESS)]
            running.append(pool.submit(storm.kill_on))
            try:
                for second in range(1, seconds + 1):
                    poll(lambda s=second: storm.age() >= s, 60, "a second")
                    for info_hash in SIZES:
                        storm.check(info_hash)
            finally:
                storm.is_over.set()
                server.signal(signal.SIGKILL)
                for each in running:
                    each.result(30)
        check_log(server)
    with serving(command(port), port, settings(tmp_path)) as storm.server:
        for info_hash in SIZES:
            storm.check(info_hash, at_rest=True)
        check_log(storm.server)
    assert not (tmp_path / "data" / "damaged").exists()
    print(f"{host}: {storm.kills} kills, {storm.acknowledged} acknowledged, 0 lost")
    assert storm.kills >= seconds and storm.acknowledged >= 100 * seconds


@pytest.mark.long
def test_workers_do_not_grow(tmp_path):
    """What they hold in memory after a third of the time is as much as at the end."""
    port, sizes, seconds = free_port(), [], 180
    with serving(gunicorn(port, 2, 4), port, settings(tmp_path)) as server:
        storm, workers = KillStorm(server, 0), server.workers()
        with ThreadPoolExecutor(RESTLESS) as pool:
            running = [pool.submit(storm.run_client, n) for n in range(RESTLESS)]
            for third in (1, 2, 3):
                until = third * seconds / 3
                poll(lambda t=until: storm.age() >= t, seconds, "a third of the time")
                sizes.append(sum(psutil.Process(w).memory_info().rss for w in workers))
            storm.is_over.set()
            for each in running:
                each.result(30)
        for info_hash in SIZES:
            storm.check(info_hash)
        check_log(server)
    print(f"{storm.acknowledged} acknowledged; bytes after each third: {sizes}")
    assert sizes[2] - sizes[0] < 2 * 2**20


class Restless:
    """A peer that comes and goes, and what it knows to be recorded of itself."""

    def __init__(self, info_hash, number):
        self.info_hash, self.port = info_hash, 200 + number * 7
        self.peer_id = b"-REST-%014d" % number
        # Whether it is in the swarm, None while it is not told; and how often it asked.
        self.known = False, 0

    def path(self, rnd):
        """Return an announce, and whether the peer is in the swarm after it."""
        left, event = rnd.choice([(0, ""), (1, ""), (0, "completed"), (1, "paused")])
        event = event if self.known[0] else "started"
        stays = not self.known[0] or rnd.random() < 0.8
        more = {"left": left, "event": event if stays else "stopped", "numwant": 20}
        return announce_path(self.info_hash, self.peer_id, self.port, **more), stays


class KillStorm:
    """Clients that announce on and on, and the one who kills their server's workers."""

    def __init__(self, server, pause):
        self.server, self.pause, self.is_over = server, pause, Event()
        self.start, self.kills, self.acknowledged = time.monotonic(), 0, 0
        swarms = [info_hash for info_hash, size in SIZES.items() for _ in range(size)]
        self.peers = [Restless(i, number) for number, i in enumerate(swarms)]

    def age(self):
        """Return how many seconds the storm has lasted."""
        return time.monotonic() - self.start

    def kill_on(self):
        """Kill a random worker, or all, again and again."""
        rnd = random.Random()
        while not self.is_over.wait(rnd.uniform(0, 2 * self.pause)):
            if workers := self.workers():
                everyone = rnd.random() < 0.1
                kill(workers if everyone else [rnd.choice(workers)])
                self.kills += 1

    def workers(self):
        """Return the pids of all workers, without uWSGI's router.

        What a router leaves behind, when it is killed, a worker carries out all the
        same, perhaps when its client has asked again, was answered, and has gone on: a
        peer that has left would be back.
        """
        router = r"spawned uWSGI http \d+ \(pid: (\d+)\)"
        routers = set(map(int, re.findall(router, self.server.log())))
        return [pid for pid in self.server.workers() if pid not in routers]

    def run_client(self, number):
        """Announce the peers of one client, in any order, until the storm is over."""
        rnd, mine = random.Random(number), self.peers[number::RESTLESS]
        while not self.is_over.is_set():
            peer = rnd.choice(mine)
            path, stays = peer.path(rnd)
            peer.known = None, peer.known[1] + 1
            reply = None
            while reply is None and not self.is_over.is_set():
                reply = self.ask(path)
            if reply is not None:
                assert b"interval" in reply and b"failure reason" not in reply
                peer.known = stays, peer.known[1]
                self.acknowledged += 1

    def ask(self, path):
        """Return the decoded reply to a request, or None when a kill came between."""
        try:
            address = "127.0.0.1", self.server.port
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
                with connection.makefile("rb") as file:
                    head, _, body = file.read().partition(b"\r\n\r\n")
        except OSError:
            return None
        length = b"Content-Length: %d\r\n" % len(body)
        return bencoder.bdecode(body) if length in head + b"\r\n" else None

    def check(self, info_hash, at_rest=False):
        """Fail unless all who know to be in a swarm are, and nobody who has left."""
        here = [peer for peer in self.peers if peer.info_hash == info_hash]
        before = [peer.known for peer in here]
        counts = self.insist(scrape_path(info_hash))[b"files"][info_hash]
        fresh = announce_path(info_hash, FRESH, 60000, left=1, numwant=10000)
        found = ports_in(self.insist(fresh))
        pairs = zip(here, before, strict=True)
        settled = {peer: known[0] for peer, known in pairs if peer.known == known}
        inside = {p.port for p, is_in in settled.items() if is_in}
        outside = {p.port for p, is_in in settled.items() if is_in is False}
        assert inside <= found, "who was acknowledged is not there"
        assert found <= {peer.port for peer in here} - outside, "who left is there"
        counted = counts[b"complete"] + counts[b"incomplete"]
        assert len(inside) <= counted <= len(here) - len(outside) + 1
        if at_rest:
            assert counted == len(found) + 1  # and the one that asked before

    def insist(self, path):
        """Return the reply to a request that is repeated until there is one."""
        return poll(lambda: self.ask(path), 30, "a reply")


class Peer:
    """One that announces itself in one swarm."""

    def __init__(self, info_hash, number):
        self.info_hash, self.port = info_hash, 200 + number * 7
        self.peer_id = b"-STORM-%013d" % number
        self.left = number % 3  # every third is a seeder

    def swarm(self):
        """Return the info_hash, to sort by."""
        return self.info_hash

    def path(self):
        """Return the announce to send."""
        return announce_path(self.info_hash, self.peer_id, self.port, left=self.left)


class Storm:
    """Threads that announce peers, each over a connection of its own."""

    def __init__(self, port, peers):
        self.port, self.waiting, self.lock = port, list(peers), Lock()
        self.acknowledged, self.refused = set(), []

    def run(self):
        """Announce all peers."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            for client in [pool.submit(self._client) for _ in range(CLIENTS)]:
                client.result()

    def _client(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while peer := self._next():
            try:
                reply = fetch(connection, peer.path())
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it anew
                self.waiting.append(peer)
            else:
                self._note(peer, reply)
        connection.close()

    def _next(self):
        with self.lock:
            if not self.waiting:
                return None
            return self.waiting.pop()

    def _note(self, peer, reply):
        with self.lock:
            if b"interval" in reply and b"failure reason" not in reply:
                self.acknowledged.add(peer)
            else:
                self.refused.append(reply)


def a_crowd():
    """Return all peers of all swarms, in no order."""
    peers = [Peer(info_hash, number) for info_hash in SWARMS for number in range(PEERS)]
    random.Random(1).shuffle(peers)
    return peers


def settings(folder):
    return {"TRACKER_DATA": str(folder / "data"), "TRACKER_MAX_NUMWANT": "10000"}


def fetch(connection, path):
    """Return the decoded reply to a request over an open connection."""
    connection.request("GET", path)
    return bencoder.bdecode(connection.getresponse().read())


def counted(server, info_hash):
    """Return how many seeders and leechers a scrape counts."""
    file = scrape(server.url, info_hash)[b"files"][info_hash]
    return file[b"complete"], file[b"incomplete"]


def handed_out(server, info_hash):
    """Return the ports that a new leecher is told."""
    more = {"left": 1, "numwant": 1000}
    return ports_in(announce(server.url, info_hash, FRESH, 60000, **more))


def ports_in(reply):
    """Return the ports in a reply, each of which has to come once."""
    peers = reply[b"peers"]
    endpoints = [peers[at : at + 6] for at in range(0, len(peers), 6)]
    assert {endpoint[:4] for endpoint in endpoints} <= {bytes((127, 0, 0, 1))}
    ports = [int.from_bytes(endpoint[4:], "big") for endpoint in endpoints]
    assert len(ports) == len(set(ports))
    return set(ports)


def kill(pids):
    """End processes at once, as if the power were gone."""
    assert pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_log(server):
    for word in ("Traceback", "damaged", "failed"):
        assert word not in server.log()


# Damaged files: what is done to one, and whether it is noticed as damage.


def cut_short(data):
    return data[:1000]


def cut_behind_the_head(data):
    return data[:20]


def filled_at_random(data):
    return random.Random(1).randbytes(len(data))


def of_no_version(data):
    return data[:4] + b"\x00" + data[5:]


def with_wrong_counts(data):
    return data[:5] + b"\xff" + data[6:]


def of_another_swarm(data):
    return data[:16] + bytes(20) + data[36:]


DAMAGES = (
    cut_behind_the_head,
    filled_at_random,
    of_no_version,
    with_wrong_counts,
    of_another_swarm,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Yield a server, and the folder of its data."""
    port, folder = free_port(), tmp_path_factory.mktemp("damage")
    with serving(gunicorn(port, 2, 2), port, settings(folder)) as server:
        yield server, folder / "data"


@pytest.mark.parametrize(
    ("peers", "damage"), [(100, cut_short), *product((5, 100), DAMAGES)]
)
def test_a_damaged_file_is_set_aside(shared, damage, peers):
    server, data = shared
    info_hash = os.urandom(20)
    fill(server, info_hash, peers)
    rewrite(data, info_hash, damage)
    assert join(server, info_hash, 0) == 1
    assert fill(server, info_hash, 20) == 20
    aside = data / "damaged" / info_hash.hex()
    assert aside.exists()
    assert logged(server, info_hash) == 1


@pytest.mark.parametrize("peers", [5, 100])
def test_an_emptied_file_is_begun_anew(shared, peers):
    server, data = shared
    info_hash = os.urandom(20)
    fill(server, info_hash, peers)
    os.truncate(kept(data)[info_hash], 0)
    assert join(server, info_hash, 0) == 1
    assert fill(server, info_hash, 100) == 100
    assert not (data / "damaged" / info_hash.hex()).exists()
    assert logged(server, info_hash) == 0


def test_a_lost_page_is_noticed_by_those_who_need_it(shared):
    server, data = shared
    info_hash = os.urandom(20)
    fill(server, info_hash, 100)
    path = kept(data)[info_hash]
    os.truncate(path, path.stat().st_size - 1)
    fill(server, info_hash, 100)  # not all of them need that page
    assert fill(server, info_hash, 100) == 100
    assert (data / "damaged" / info_hash.hex()).exists()
    assert logged(server, info_hash) == 1


def fill(server, info_hash, peers):
    """Announce so many leechers, and return how many there are then."""
    return [join(server, info_hash, number) for number in range(peers)][-1]


def join(server, info_hash, number):
    """Announce a leecher, and return how many there are then."""
    peer_id = b"-LEECH-%013d" % number
    reply = announce(server.url, info_hash, peer_id, 1000 + number, left=1)
    assert b"failure reason" not in reply
    return reply[b"incomplete"]


def logged(server, info_hash):
    """Return how often the log says that the file of a swarm was damaged."""
    lines = server.log().splitlines()
    assert not any("Traceback" in line for line in lines)
    return sum("was damaged" in line and info_hash.hex() in line for line in lines)
