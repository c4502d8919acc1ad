"""Many clients at once: exact counts, killed workers, and damaged files.

All that a client was told is recorded has to be there afterwards, whatever happened to
the processes that told it.
"""

import http.client
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock

import bencoder
import pytest
from servers import announce, announce_path, free_port, gunicorn, poll, scrape, serving

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


def test_nothing_acknowledged_is_lost_when_processes_are_killed(tmp_path):
    port, peers = free_port(), a_crowd()
    storm = Storm(port, peers)
    with serving(gunicorn(port, 4, 4), port, settings(tmp_path)) as server:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(storm.run)
            for number in range(1, 6):
                storm.wait_for(number * 1200)
                kill(server.workers())
            storm.wait_for(7200)
            server.signal(signal.SIGKILL)
            running.result(20)
        check_log(server)
    assert 7200 <= len(storm.acknowledged) < len(peers)
    with serving(gunicorn(port, 4, 4), port, settings(tmp_path)) as server:
        for info_hash in SWARMS:
            check_what_is_left(server, info_hash, storm)
        check_log(server)
    assert not (tmp_path / "data" / "damaged").exists()


def check_what_is_left(server, info_hash, storm):
    """Fail unless all who were acknowledged are there, and counted, and nobody else."""
    acknowledged = {p.port for p in storm.acknowledged if p.info_hash == info_hash}
    sent = {p.port for p in storm.sent if p.info_hash == info_hash}
    stored = sum(counted(server, info_hash))
    found = handed_out(server, info_hash)
    assert acknowledged <= found <= sent
    assert stored == len(found)
    assert sum(counted(server, info_hash)) == stored + 1  # and the one that asked


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
        self.sent, self.acknowledged, self.refused = set(), set(), []

    def run(self):
        """Announce all peers, or as many as there is a server for."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            for client in [pool.submit(self._client) for _ in range(CLIENTS)]:
                client.result()

    def wait_for(self, number):
        """Return when so many announces are acknowledged."""
        poll(lambda: len(self.acknowledged) >= number, 60, f"{number} replies")

    def _client(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while peer := self._next():
            try:
                reply = fetch(connection, peer.path())
            except ConnectionRefusedError:
                return  # there is no server any more
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
            peer = self.waiting.pop()
            self.sent.add(peer)
            return peer

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
    return {"TRACKER_DATA": str(folder / "data"), "TRACKER_MAX_NUMWANT": "1000"}


def fetch(connection, path):
    """Return the decoded reply to a request over an open connection."""
    connection.request("GET", path)
    return bencoder.bdecode(connection.getresponse().read())


def counted(server, info_hash):
    """Return how many seeders and leechers a scrape counts."""
    file = scrape(server.url, info_hash)[b"files"][info_hash]
    return file[b"complete"], file[b"incomplete"]


def handed_out(server, info_hash):
    """Return the ports that a new leecher is told, each of which has to come once."""
    reply = announce(server.url, info_hash, FRESH, 60000, left=1, numwant=1000)
    peers = reply[b"peers"]
    endpoints = [peers[at : at + 6] for at in range(0, len(peers), 6)]
    assert {endpoint[:4] for endpoint in endpoints} == {bytes((127, 0, 0, 1))}
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


def of_another_version(data):
    return data[:4] + b"\x02" + data[5:]


def with_wrong_counts(data):
    return data[:5] + b"\xff" + data[6:]


def of_another_swarm(data):
    return data[:16] + bytes(20) + data[36:]


DAMAGES = (
    cut_short,
    cut_behind_the_head,
    filled_at_random,
    of_another_version,
    with_wrong_counts,
    of_another_swarm,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Yield a server, and the folder of its data."""
    port, folder = free_port(), tmp_path_factory.mktemp("damage")
    with serving(gunicorn(port, 2, 2), port, settings(folder)) as server:
        yield server, folder / "data"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("peers", [5, 100])
def test_a_damaged_file_is_set_aside(shared, damage, peers):
    server, data = shared
    info_hash = os.urandom(20)
    fill(server, info_hash, peers)
    path = swarm_file(data, info_hash)
    path.write_bytes(damage(path.read_bytes()))
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
    swarm_file(data, info_hash).write_bytes(b"")
    assert join(server, info_hash, 0) == 1
    assert fill(server, info_hash, 100) == 100
    assert not (data / "damaged" / info_hash.hex()).exists()
    assert logged(server, info_hash) == 0


def test_a_lost_page_is_noticed_by_those_who_need_it(shared):
    server, data = shared
    info_hash = os.urandom(20)
    fill(server, info_hash, 100)
    path = swarm_file(data, info_hash)
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


def swarm_file(data, info_hash):
    name = info_hash.hex()
    return data / "swarms" / name[:2] / name


def logged(server, info_hash):
    """Return how often the log says that the file of a swarm was damaged."""
    lines = server.log().splitlines()
    assert not any("Traceback" in line for line in lines)
    return sum("was damaged" in line and info_hash.hex() in line for line in lines)
