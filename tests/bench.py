#!/usr/bin/env python3
"""Put BitBreeze beside other trackers, under one announce workload, in one run.

    python tests/bench.py [--seconds 5] [--rounds 5] [--dir FOLDER]

Prints, as medians over the rounds, announces per second, CPU time per announce of the
whole process tree (user and system), and that as a ratio to opentracker's; then what
the store alone costs in swarms of 60 and of 100,000, an announce as a CGI program
beside a Flask program that answers nothing, and what visits of the front page with
5,000 torrents cost those who announce. Rounds go A B C A B C, so that a drift of the
machine hits all. Quote the ratios, of one run.

Needs wrk (Debian's package), and psutil and pyuwsgi as tests/run installs them. The
others take part if they are installed: Debian's opentracker and qbittorrent-nox.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import bencoder
import psutil

HERE = Path(__file__).resolve().parent
SWARMS, PEERS = 500, 60
LISTED = 5000  # torrents on the front page
EMPTY = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "400")])
    return [b"x" * 400]
"""
EMPTY_CGI = """
from wsgiref.handlers import CGIHandler
from flask import Flask
app = Flask(__name__)
app.add_url_rule("/announce", view_func=lambda: "x" * 400)
CGIHandler().run(app)
"""
QBITTORRENT = """[LegalNotice]
Accepted=true
[BitTorrent]
TrackerEnabled=true
Session\\DHTEnabled=false
Session\\LSDEnabled=false
Session\\PeXEnabled=false
Session\\Interface=lo
Session\\InterfaceName=lo
[Network]
PortForwardingEnabled=false
[Preferences]
Advanced\\trackerPort={port}
Connection\\UPnP=false
WebUI\\Port={web}
WebUI\\Address=127.0.0.1
"""


def uwsgi(port, folder, module):
    program = Path(sys.executable).with_name("uwsgi")
    return [
        *(
            program,
            "--chdir",
            folder,
            "--module",
            module,
            "--master",
            "--processes",
            "2",
        ),
        *("--http-socket", f"127.0.0.1:{port}", "--buffer-size", "32768"),
        *("--disable-logging", "--die-on-term"),
    ]


def commands(folder, hashes):
    """Return the command of every tracker that is installed, by its name and port."""
    (folder / "empty.py").write_text(EMPTY)
    found = {("bitbreeze", 7101): uwsgi(7101, HERE.parent, "app:app")}
    found["an empty WSGI application", 7102] = uwsgi(7102, folder, "empty:app")
    if shutil.which("opentracker"):
        jail = folder / "opentracker"
        jail.mkdir()
        shutil.copy(hashes, jail / "allow.txt")
        for path in (folder, jail):
            path.chmod(0o755)  # it serves as nobody
        found["opentracker", 7103] = [
            *("opentracker", "-i", "127.0.0.1", "-p", "7103", "-P", "7103"),
            *("-d", jail, "-u", "nobody", "-w", "allow.txt"),
        ]
    if shutil.which("qbittorrent-nox"):
        config = folder / "qbittorrent/qBittorrent/config/qBittorrent.conf"
        config.parent.mkdir(parents=True)
        config.write_text(QBITTORRENT.format(port=7104, web=7105))
        found["qbittorrent", 7104] = [
            "qbittorrent-nox",
            f"--profile={folder}/qbittorrent",
        ]
    return found


def info_hashes(folder):
    """Write the info_hashes of one-piece torrents, and return the file's path."""
    path = folder / "hashes.txt"
    infos = [{b"length": 1, b"name": b"bench-%d.iso" % i} for i in range(SWARMS)]
    hashes = [
        hashlib.sha1(bencoder.bencode(info)).hexdigest().upper() for info in infos
    ]
    path.write_text("\n".join(hashes) + "\n")
    return path


class Tracker:
    """A tracker that serves, from one command, until ``stop``."""

    def __init__(self, name, port, command, folder, environ=None):
        environ = {"TRACKER_DATA": str(folder / "data"), **(environ or {})}
        with open(folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, **environ}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline or self.process.poll() is not None:
                sys.exit(f"{name} does not serve:\n{(folder / 'log.txt').read_text()}")
            time.sleep(0.1)

    def cpu(self):
        root = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def wrk(port, seconds, hashes, **environ):
    """Announce for some seconds; return (announces, announces per second)."""
    known = {"HASHES": str(hashes), "SWARMS": str(SWARMS), "PEERS": str(PEERS)}
    script = ["-s", HERE / "announce.lua", f"http://127.0.0.1:{port}/"]
    out = subprocess.run(
        ["wrk", "-t1", "-c32", f"-d{seconds}", *script],
        env={**os.environ, **known, **environ},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if "Non-2xx" in out:
        sys.exit(out)
    announces = int(re.search(r"(\d+) requests in", out)[1])
    return announces, float(re.search(r"Requests/sec: +([\d.]+)", out)[1])


def compare(folder, seconds, rounds):
    hashes = info_hashes(folder)
    trackers = commands(folder, hashes)
    results = {key: [] for key in trackers}
    for _ in range(rounds):
        for (name, port), command in trackers.items():
            tracker = Tracker(name, port, command, folder)
            wrk(port, 6, hashes, WARM="1", CLOSE="0")
            before = tracker.cpu()
            announces, rate = wrk(port, seconds, hashes, CLOSE="1")
            cpu = 1e6 * (tracker.cpu() - before) / announces
            tracker.stop()
            results[name, port].append((cpu, rate))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for (name, _), rows in results.items()
    }
    reference = medians.get("opentracker", medians["bitbreeze"])[0]
    print("| tracker | announces/s | CPU µs an announce | to opentracker's |")
    print("| --- | --- | --- | --- |")
    for name, (cpu, rate) in sorted(medians.items(), key=lambda item: item[1]):
        print(f"| {name} | {rate:,.0f} | {cpu:.0f} | {cpu / reference:.2f} |")


def store_alone(folder, rounds):
    """Print what an announce costs in the store, in small swarms and in a big one."""
    sys.path.insert(0, str(HERE.parent))
    import random

    import app as bitbreeze

    store = bitbreeze.FileStore(folder / "alone", bitbreeze.load_settings())
    rnd, now = random.Random(1), 1_800_000_000

    def announces(swarms, peers):
        hashes = [rnd.randbytes(20) for _ in range(swarms)]
        return [
            bitbreeze.Announce(
                hashes[number % swarms], b"-TR4040-%012d" % number,
                b"\x0a" + number.to_bytes(3, "big"), 1024 + number % 60000,
                0 if number // swarms % 3 == 0 else 1000, key=7,
            )
            for number in range(swarms * peers)
        ]  # fmt: skip

    def cost(known):
        sample = rnd.choices(known, k=5000)
        start = time.process_time()
        for announce in sample:
            store.announce(announce, 50, now)
        return 1e6 * (time.process_time() - start) / len(sample)

    sizes = {(500, 60): [], (1, 100_000): []}
    known = {size: announces(*size) for size in sizes}
    for size in sizes:
        for announce in known[size]:
            store.announce(announce, 50, now)
    for _ in range(4 * rounds):
        for size in sizes:
            sizes[size].append(cost(known[size]))
    small, big = (statistics.median(costs) for costs in sizes.values())
    print(
        f"\nThe store alone: {small:.1f} µs in swarms of 60, {big:.1f} µs in one",
        end=" ",
    )
    print(f"of 100,000: {big / small:.2f} times as much.")


def site(folder, seconds, rounds):
    """Print what the front page with 5,000 torrents costs those who announce."""
    torrents, hashes = folder / "site/torrents", folder / "listed.txt"
    torrents.mkdir(parents=True)
    found = []
    for number in range(LISTED):
        info = {b"length": number, b"name": b"iso-%d" % number, b"pieces": bytes(2000)}
        info[b"piece length"] = 2**20
        made = bencoder.bencode({b"info": info})
        (torrents / f"{number}.torrent").write_bytes(made)
        found.append(hashlib.sha1(bencoder.bencode(info)).hexdigest().upper())
    hashes.write_text("\n".join(found) + "\n")
    environ = {
        "TRACKER_TORRENTS": str(torrents),
        "TRACKER_DATA": str(folder / "listed"),
    }
    command = uwsgi(7106, HERE.parent, "app:app")
    tracker = Tracker("bitbreeze", 7106, command, folder, environ)
    known = {"SWARMS": str(LISTED), "PEERS": "6"}
    wrk(7106, 10, hashes, WARM="1", CLOSE="0", **known)
    alone, visited, times = [], [], []
    for _ in range(rounds):
        alone.append(wrk(7106, seconds, hashes, CLOSE="1", **known)[1])
        stop = threading.Event()
        visitor = threading.Thread(target=visit, args=(7106, stop, times))
        visitor.start()
        visited.append(wrk(7106, seconds, hashes, CLOSE="1", **known)[1])
        stop.set()
        visitor.join()
    tracker.stop()
    alone, visited = statistics.median(alone), statistics.median(visited)
    usual, worst = 1000 * statistics.median(times), 1000 * max(times)
    print(
        f"\nThe front page with {LISTED:,} torrents, twice a second while others"
        f" announce: {usual:.0f} ms, at most {worst:.0f} ms;"
        f" {visited:,.0f} announces/s instead of {alone:,.0f}:"
        f" {visited / alone:.2f} times as many."
    )


def visit(port, stop, times):
    """Look at the front page twice a second, and note how long each took."""
    while not stop.wait(0.5):
        start = time.monotonic()
        with urlopen(f"http://127.0.0.1:{port}/") as page:
            if page.read().count(b"<tr") < 100:
                sys.exit("the front page does not list the torrents")
        times.append(time.monotonic() - start)


def cgi_alone(folder, rounds):
    """Print what an announce costs in a process of its own, and an empty program."""
    empty = folder / "empty.py"
    empty.write_text(EMPTY_CGI)
    environ = {
        **os.environ, "TRACKER_DATA": str(folder / "cgi"), "PATH_INFO": "/announce",
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_PROTOCOL": "HTTP/1.1",
        "REQUEST_METHOD": "GET", "REMOTE_ADDR": "192.0.2.1", "SERVER_PORT": "80",
        "SERVER_NAME": "localhost",
        "QUERY_STRING": f"info_hash={'%ff' * 20}&peer_id={'p' * 20}&port=6881&left=0",
    }  # fmt: skip

    def cost(program):
        before = os.times()
        done = subprocess.run([sys.executable, program], env=environ, check=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        assert done.stdout.startswith(b"Status: 200 OK"), done.stdout
        after = os.times()
        return 1000 * (after[2] + after[3] - before[2] - before[3])

    costs = {HERE.parent / "app.py": [], empty: []}
    for _ in range(4 * rounds):
        for program in costs:
            costs[program].append(cost(program))
    ours, theirs = (statistics.median(found) for found in costs.values())
    print(
        f"\nCGI: {ours:.0f} ms an announce, {theirs:.0f} ms an empty Flask program:"
        f" {ours / theirs:.2f} times as much."
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", default=5, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--dir", default=HERE, help="where the data is kept meanwhile")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=given.dir)).resolve()
    try:
        compare(folder, given.seconds, given.rounds)
        store_alone(folder, given.rounds)
        cgi_alone(folder, given.rounds)
        site(folder, given.seconds, given.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
