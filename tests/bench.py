#!/usr/bin/env python3
"""Measure what BitBreeze costs, beside other trackers and an earlier version of itself.

    python tests/bench.py [PART ...] [--before REVISION_OR_FOLDER] [--quick]

Without a PART, every part runs. That takes about ten minutes, or nearly twenty with
--before, which measures another app.py in the same run: that of a git revision or of a
folder. --quick takes a few minutes, but its figures are too rough to quote.

    uwsgi     CPU time per announce under uWSGI, beside qBittorrent's tracker,
              opentracker and an empty WSGI application
    gunicorn  the same under gunicorn with gevent workers, beside an empty application
    udp       CPU time per announce over UDP, beside HTTP under uWSGI and opentracker
    inside    the stages of an announce within the process
    flat      CPU time per announce from 1,000 to 1,000,000 peers, and in one swarm from
              60 to 200,000 peers; memory of a worker
    pages     a scrape of 60 torrents and the front page with 5,000, in announces
    redis     CPU time per announce of a tracker and of its Redis, in swarms of 60 to
              200,000 peers; announces a second, beside peers in files
    start     seconds from the start of a server to its first answer; an announce as a
              CGI program, beside an empty Flask program

The results go to stdout as Markdown tables, with the limits that BitBreeze should keep.
Progress goes to stderr. CPU time is user and system time of the whole process tree. All
figures are medians. Applications take turns (A B C, A B C), so that a drift of the
machine affects them all. Quote ratios from one run: absolute figures differ.

All parts but "inside" and "start" need wrk. Other trackers are measured if they are
installed. On Debian: apt-get install wrk opentracker qbittorrent-nox
"""

import argparse
import atexit
import hashlib
import importlib.util
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock
from urllib.parse import quote
from urllib.request import urlopen
from wsgiref.util import setup_testing_defaults

import bencoder
import psutil

HERE = Path(__file__).resolve().parent
PORTS = count(7101)  # below the ports that Linux gives to outgoing connections
FILES = 20_000  # file descriptors that a process may have
WARM_UP = 3  # seconds of requests that fill the caches of a server

# Commands that serve the app.py of a folder, and other trackers.
UWSGI = (
    "uwsgi --chdir {app} --module app:app --http-socket 127.0.0.1:{port}"
    " --master --processes 2 --buffer-size 32768 --disable-logging --die-on-term"
)
GUNICORN = "gunicorn app:app --chdir {app} -b 127.0.0.1:{port} -w 2"
GEVENT = f"{GUNICORN} -k gevent"
OVER_UDP = "python {app}/app.py udp --host 127.0.0.1 --port {port} --workers 1"
OTHERS = {
    "opentracker": "-i 127.0.0.1 -p {port} -P {port} -d {folder}/.. -w allow.txt",
    "qbittorrent-nox": "--profile={folder}",
}
EMPTY = "an empty application"
EMPTY_WSGI = """
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
QBITTORRENT_SETTINGS = """[LegalNotice]
Accepted=true
[BitTorrent]
TrackerEnabled=true
Session\\DHTEnabled=false
Session\\Interface=lo
Session\\InterfaceName=lo
[Preferences]
Advanced\\trackerPort={port}
WebUI\\Port={web}
"""


PEER_PORTS = 64_000  # from 1024 on


class Workload:
    """The announces of announce.lua. Peers have numbers and are dealt out to swarms."""

    def __init__(self, folder, swarms=500, peers=60, file="hashes.txt"):
        """Choose info dictionaries, and write their info_hashes to a file for wrk."""
        self.swarms, self.peers = swarms, peers  # peers in each swarm
        info = {b"piece length": 2**20, b"pieces": bytes(2000), b"length": 100 * 2**20}
        self.infos = [{**info, b"name": b"iso-%d" % i} for i in range(swarms)]
        encoded = map(bencoder.bencode, self.infos)
        self.hashes = [hashlib.sha1(each).digest() for each in encoded]
        self.escaped = [quote(each, safe="") for each in self.hashes]
        (folder / file).write_text("".join(f"{each.hex()}\n" for each in self.hashes))
        sizes = {"SWARMS": str(swarms), "PEERS": str(peers)}
        self.for_wrk = "announce.lua", {"HASHES": f"{folder}/{file}", **sizes}

    def query(self, number):
        """Return the query that announce.lua sends for a peer."""
        member = number // self.swarms
        return (
            f"info_hash={self.escaped[number % self.swarms]}"
            f"&peer_id=-TR4040-{number:012}&port={1024 + member * 7 % PEER_PORTS}"
            f"&uploaded=0&downloaded=0&left={1000 if member % 3 else 0}"
            "&numwant=50&key=2C4DEC5F&compact=1&supportcrypto=1"
        )

    def environ(self, number):
        """Return the WSGI environ of the announce of a peer."""
        # Each peer has another endpoint. wrk announces those of the first address.
        address = f"127.0.{number // self.swarms // PEER_PORTS}.1"
        environ = {"REMOTE_ADDR": address, "PATH_INFO": "/announce"}
        environ |= {"QUERY_STRING": self.query(number), "HTTP_USER_AGENT": "Test/1.0"}
        setup_testing_defaults(environ)
        return environ


def open_application(app, folder, **settings):
    """Import the app.py of a folder; return (module, application with its data)."""
    spec = importlib.util.spec_from_file_location("app", app / "app.py")
    sys.modules["app"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    where = {"data": str(folder / "data"), "torrents": str(folder / "torrents")}
    return module, module.create_app({**where, **settings})


def fill(app, folder, workload, **settings):
    """Announce every peer, in a child process because a store keeps files open."""

    def announce_all():
        module, application = open_application(app, folder, **settings)
        tracker, total = application.tracker, workload.swarms * workload.peers
        for number in sorted(range(total), key=lambda number: number % workload.swarms):
            announce = module.parse_announce(workload.environ(number), tracker.settings)
            tracker.store.announce(announce, 0, int(time.time()))

    say(f"announcing {workload.swarms * workload.peers:,} peers")
    (folder / "data").mkdir(parents=True)
    child = multiprocessing.get_context("fork").Process(target=announce_all)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{app}/app.py cannot announce the peers")


# -- Servers --------------------------------------------------------------------------


class Server:
    """A server and its workers. They run inside a ``with`` block."""

    def __init__(self, command, folder, app=None, store=""):
        """Keep data in ``folder``. A command may name {folder}, {app} and {port}."""
        self.folder, self.port, self.store = folder, free_port(), store
        names = {"folder": folder, "app": app, "port": self.port}
        self.command = [word.format(**names) for word in command.split()]
        folder.mkdir()

    def __enter__(self):
        data, torrents = f"{self.folder}/data", f"{self.folder}/torrents"
        environ = os.environ | {"TRACKER_DATA": data, "TRACKER_TORRENTS": torrents}
        if self.store:  # an earlier version does not know it
            environ["TRACKER_STORE"] = self.store
        with open(self.folder / "log.txt", "ab") as log:
            output = {"stdout": log, "stderr": log, "start_new_session": True}
            self.process = subprocess.Popen(self.command, env=environ, **output)
        return self

    def __exit__(self, *_):
        """Ask the server to stop, and kill after ten seconds whatever still runs."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def get(self, path, is_ready=bool):
        """Request a path until ``is_ready(body)``, and return that body."""
        deadline, body = time.monotonic() + 60, b""
        url = f"http://127.0.0.1:{self.port}{path}"
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urlopen(url, timeout=20) as answer:
                if is_ready(body := answer.read()):
                    return body
            time.sleep(0.005)
        log = (self.folder / "log.txt").read_text()
        sys.exit(f"{self.command} does not answer {path} as expected: {body}\n{log}")

    def wait(self, workload):
        """Announce the first peer until the server accepts it."""
        self.get(f"/announce?{workload.query(0)}", lambda body: b"failure" not in body)

    def cost(self, seconds, script, environ):
        """Return CPU µs per request that wrk makes, and requests per second."""
        before = self.cpu()
        report = self.wrk(seconds, script, environ)
        taken = self.cpu() - before
        if "Non-2xx" in report:
            sys.exit(f"{self.command} refuses requests:\n{report}")
        requests = int(re.search(r"(\d+) requests in", report)[1])
        rate = float(re.search(r"Requests/sec: +([\d.]+)", report)[1])
        return 1e6 * taken / requests, rate

    def wrk(self, seconds, script, environ):
        """Have wrk make requests with 32 connections; return its report."""
        command = ["wrk", "-t1", "-c32", f"-d{seconds}", "--timeout", "20"]
        command += ["-s", str(HERE / script), f"http://127.0.0.1:{self.port}/"]
        return subprocess.check_output(command, env=os.environ | environ, text=True)

    def cpu(self):
        """Return the seconds of CPU time that all its processes have taken."""
        root = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def free_port():
    """Return the next port on which no server listens."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def take_turns(rounds, measures):
    """Return the medians of the numbers that each measure returns, by its name."""
    results = {name: [] for name in measures}
    for number in range(1, rounds + 1):
        for name, measure in measures.items():
            say(f"round {number} of {rounds}: {name}")
            results[name].append(measure())
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }


def compare_servers(title, servers, workload, run, limits):
    """Print CPU time and rate of announces to servers, which take turns."""
    script, environ = workload.for_wrk
    measures = {}
    with ExitStack() as stack:
        for name, server in servers.items():
            say(f"{name}: announcing every peer")
            stack.enter_context(server).wait(workload)
            server.wrk(3600, script, environ | {"WARM": "1"})
            measures[name] = partial(server.cost, run.seconds, script, environ)
        figures = take_turns(run.rounds, measures)
    print_beside(title, figures, limits, ("CPU µs per announce", "announces/s"))


def say(text):
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def print_table(heading, rows):
    """Print a Markdown table."""
    print()
    for row in (heading, ["---"] * len(heading), *rows):
        print("|", " | ".join(map(str, row)), "|", flush=True)


def print_beside(title, figures, limits, heading):
    """Print a table of figures by name, with BitBreeze's ratio to each first figure."""
    ours, rows = figures["bitbreeze"][0], []
    for name, (first, *more) in sorted(figures.items(), key=lambda item: item[1]):
        cells = f"{first:.{1 if more else 3}f}", *(f"{each:,.0f}" for each in more)
        rows.append((name, *cells, f"{ours / first:.2f}", limits.get(name, "")))
    print_table((title, *heading, "bitbreeze's to its", "limit"), rows)


def print_costs(title, costs, limits):
    """Print CPU µs by (row, version), and their ratios to the first row."""
    order, table = list(dict.fromkeys(row for row, _ in costs)), []
    for row, name in sorted(costs, key=lambda key: order.index(key[0])):
        cost, unit = costs[row, name], costs[order[0], name]
        cells = row, name, f"{cost:,.1f}", f"{cost / unit:.2f}"
        table.append((*cells, limits.get(row, "") if name == "bitbreeze" else ""))
    print_table((title, "", "CPU µs", f"in {order[0]}s", "limit"), table)


# -- The parts ------------------------------------------------------------------------


def uwsgi(run):
    """Print CPU time per announce under uWSGI, beside other trackers."""
    workload = Workload(run.folder, file="allow.txt")
    servers = {n: Server(UWSGI, run.folder / n, app) for n, app in run.apps.items()}
    for name, options in OTHERS.items():
        if shutil.which(name):
            servers[name] = Server(f"{name} {options}", run.folder / name)
        else:
            print(f"\nNot measured: {name} is missing (apt-get install {name}).")
    if server := servers.get("qbittorrent-nox"):
        config = server.folder / "qBittorrent/config/qBittorrent.conf"
        config.parent.mkdir(parents=True)
        ports = {"port": server.port, "web": free_port()}
        config.write_text(QBITTORRENT_SETTINGS.format(**ports))
    limits = {"qbittorrent-nox": "at most 0.85"}
    compare_servers("uWSGI, 2 processes", servers, workload, run, limits)


def udp(run):
    """Print CPU time per announce over UDP, beside HTTP and opentracker."""
    workload, names = Workload(run.folder, file="allow.txt"), ["bitbreeze"]
    if (
        "before" in run.apps
        and "def serve_udp" in (run.apps["before"] / "app.py").read_text()
    ):
        names.append("before")
    servers = {n: Server(OVER_UDP, run.folder / n, run.apps[n]) for n in names}
    if shutil.which("opentracker"):
        options = OTHERS["opentracker"]
        servers["opentracker"] = Server(f"opentracker {options}", run.folder / "other")
    http = Server(UWSGI, run.folder / "http", run.apps["bitbreeze"])
    script, environ = workload.for_wrk
    with ExitStack() as stack:
        measures = {}
        for name, server in servers.items():
            say(f"{name}: announcing every peer")
            client = UdpClient(stack.enter_context(server).port, workload)
            client.announce(range(workload.swarms * workload.peers))
            measures[name] = partial(client.cost, server, run.seconds)
        stack.enter_context(http).wait(workload)
        http.wrk(3600, script, environ | {"WARM": "1"})
        measures["HTTP, uWSGI"] = partial(http.cost, run.seconds, script, environ)
        figures = take_turns(run.rounds, measures)
    limits = {"HTTP, uWSGI": "at most 0.65", "opentracker": "at most 7"}
    heading = "CPU µs per announce", "announces/s"
    print_beside("UDP, one process", figures, limits, heading)


class UdpClient:
    """Announces a Workload over UDP, with 32 packets on their way."""

    def __init__(self, port, workload):
        """Connect until the tracker answers."""
        self.sock = socket.socket(type=socket.SOCK_DGRAM)
        self.sock.settimeout(0.2)
        self.sock.connect(("127.0.0.1", port))
        deadline = time.monotonic() + 20
        while True:
            with suppress(OSError):
                self.sock.send(bytes.fromhex("000004172710198000000000") + b"abcd")
                self.id = self.sock.recv(99)[8:]
                break
            if time.monotonic() > deadline:
                sys.exit(f"no tracker answers UDP on port {port}")
            time.sleep(0.05)
        self.packets = [
            workload.hashes[number % workload.swarms]
            + b"-TR4040-%012d" % number
            + struct.pack(
                ">QQQIIIiH",
                *(0, 1000 if (member := number // workload.swarms) % 3 else 0, 0, 0),
                *(0, 0x2C4DEC5F, 50, 1024 + member * 7 % PEER_PORTS),
            )
            for number in range(workload.swarms * workload.peers)
        ]

    def announce(self, numbers):
        """Announce peers by their numbers; return how many got a reply."""
        head, answered, missing = self.id + bytes((0, 0, 0, 1)) + b"abcd", 0, 0
        for number in numbers:
            self.sock.send(head + self.packets[number])
            missing += 1
            while missing >= 32:
                with suppress(TimeoutError):  # a packet was lost
                    answered += self.sock.recv(2048)[3] == 1
                missing -= 1
        return answered

    def cost(self, server, seconds):
        """Return CPU µs per announce of random peers, and announces per second."""
        before, start, answered = server.cpu(), time.monotonic(), 0
        while (taken := time.monotonic() - start) < seconds:
            answered += self.announce(random.choices(range(len(self.packets)), k=2000))
        return 1e6 * (server.cpu() - before) / answered, answered / taken


def gunicorn(run):
    """Print CPU time per announce under gunicorn, beside an empty application."""
    servers = {n: Server(GEVENT, run.folder / n, app) for n, app in run.apps.items()}
    before = run.apps.get("before")
    if before and "class Vestibule" in (before / "app.py").read_text():
        # Such a version changes gunicorn's workers, so that slow clients do not block.
        for threads in ("", " --threads 8"):
            name = f"before, with -c app.py{threads}"
            command = f"{GUNICORN} -c {{app}}/app.py{threads}"
            servers[name] = Server(command, run.folder / name, before)
    compare_servers("gunicorn, gevent", servers, Workload(run.folder), run, {})


class Clock:
    """A clock that moves by a second every 500 announces.

    If time stood still, a store would have less to write and look faster than it is.
    """

    def __init__(self):
        self.now = int(time.time())

    def cost(self, work, items):
        """Return the CPU µs that ``work(item, now)`` takes on average.

        A round before it opens the files that a store closed during other stages.
        """
        for item in items:
            work(item, self.now)
        start = time.process_time()
        for number, item in enumerate(items):
            self.now += number % 500 == 0
            work(item, self.now)
        return (1e6 * (time.process_time() - start) / len(items),)


def inside(run):
    """Print what each stage of an announce takes of CPU time, in process."""
    workload, measures = Workload(run.folder), {}
    for name, app in run.versions.items():
        fill(app, run.folder / name, workload)
    clock = Clock()
    with mock.patch("time.time", lambda: clock.now):
        for name, app in run.versions.items():
            stages = stages_of(app, run.folder / name, workload, clock)
            measures |= {(stage, name): measure for stage, measure in stages.items()}
        found = take_turns(2 * run.rounds, measures)
    costs = {key: cost for key, (cost,) in found.items()}
    for name in run.versions:
        parts = [costs[stage, name] for stage in ("parse", "access", "store", "reply")]
        costs["rest", name] = costs["announce", name] - sum(parts)
    limits = {"store": "at most 0.50", "announce with a key": "at most 1.10"}
    print_costs("in process", costs, limits)


def stages_of(app, folder, workload, clock):
    """Return a measure of an announce, and of each stage of it, by name."""
    module, wsgi = open_application(app, folder)
    tracker, settings = wsgi.tracker, wsgi.tracker.settings
    catalogue = getattr(tracker, "catalogue", None) or tracker.access  # its old name
    if hasattr(tracker.store, "even"):
        tracker.store.even = int  # an earlier store compared the clock with the uptime
    parse, reply = module.parse_announce, module.announce_reply
    pick, total = random.Random(1), workload.swarms * workload.peers
    environs = [workload.environ(pick.randrange(total)) for _ in range(5000)]
    for _ in range(10):  # seconds in which the catalogue may read its folder
        clock.now += 1
        [body] = wsgi(environs[0], start_response)
    if b"failure" in body:
        sys.exit(f"{app}/app.py refuses announces: {body}")
    parsed = [parse(environ, settings) for environ in environs]
    results = [(each, tracker.announce(each, clock.now)) for each in parsed]
    if not hasattr(module, "UdpServer"):  # an earlier reply took the answer in parts
        results = [(each, *answer) for each, answer in results]
    stages = {
        "announce": (lambda environ, now: wsgi(environ, start_response), environs),
        "parse": (lambda environ, now: parse(environ, settings), environs),
        "access": (lambda each, now: catalogue.check(each.info_hash, now), parsed),
        "store": (lambda each, now: tracker.store.announce(each, 50, now), parsed),
        "reply": (lambda result, now: reply(*result, settings), results),
    }
    if hasattr(module, "Member"):
        (folder / "keys.txt").write_text(f"{'k' * 26} Ana\n")
        for_members = open_application(app, folder, private=True)[1]
        path = f"/{'k' * 26}/announce"
        with_key = [{**environ, "PATH_INFO": path} for environ in environs]
        clock.now += 100  # the list is settled
        [body] = for_members(with_key[0], start_response)
        assert b"failure" not in body, body
        work = lambda environ, now: for_members(environ, start_response)  # noqa: E731
        stages["announce with a key"] = work, with_key
    return {name: partial(clock.cost, *stage) for name, stage in stages.items()}


def start_response(status, headers, exc_info=None):
    """Accept the head of an answer, as a WSGI server does."""


def flat(run):
    """Print CPU time per announce and memory as swarms and peers grow."""
    many = [(17, 60), (1_667, 60), (16_667, 60)][: 2 if run.quick else 3]
    big = [(1, 60), (1, 20_000 if run.quick else 200_000)]
    limits = {many[-1]: "at most 1.9", big[-1]: "at most 1.35"}
    measures, served, rows = {}, {}, []
    with ExitStack() as stack:
        for size in many + big:
            workload = Workload(run.folder, *size, f"hashes-{size[0]}.txt")
            for name, app in run.versions.items():
                folder = run.folder / f"{name}-{size[0]}-{size[1]}"
                server = stack.enter_context(Server(UWSGI, folder, app))
                fill(app, folder, workload)
                server.wait(workload)
                server.cost(WARM_UP, *workload.for_wrk)
                measure = partial(server.cost, run.seconds, *workload.for_wrk)
                measures[size, name], served[size, name] = measure, (server, workload)
        found = take_turns(run.rounds, measures)
        facts = {key: facts_of(*each) for key, each in served.items()}
    for sizes in (many, big):
        for size, name in [(size, name) for size in sizes for name in run.versions]:
            cpu, (peers, memory) = found[size, name][0], facts[size, name]
            growth = f"{cpu / found[sizes[0], name][0]:.2f}"
            limit = limits.get(size, "") if name == "bitbreeze" else ""
            cells = f"{size[0]:,}", f"{peers:,}", name, f"{cpu:.1f}", growth, limit
            rows.append((*cells, f"{memory / 1e6:.1f}"))
    heading = "swarms", "peers", "uWSGI, 2 processes", "CPU µs per announce", "growth"
    print_table((*heading, "limit", "MB of a worker"), rows)


def facts_of(server, workload):
    """Return the number of peers, and the bytes that a worker does not share."""
    reply = bencoder.bdecode(server.get(f"/scrape?info_hash={workload.escaped[0]}"))
    [counts] = reply[b"files"].values()
    peers = counts[b"complete"] + counts[b"incomplete"]
    workers = psutil.Process(server.process.pid).children()
    memory = max(worker.memory_full_info().uss for worker in workers)
    return peers * workload.swarms, memory


def pages(run):
    """Print what a scrape of 60 torrents and the front page cost, in announces."""
    workload, pick, measures = Workload(run.folder), random.Random(1), {}
    samples = [pick.sample(workload.escaped, 60) for _ in range(200)]
    queries = ["&".join(f"info_hash={each}" for each in some) for some in samples]
    scrapes = paths_for_wrk(run.folder / "scrapes", [f"/scrape?{q}" for q in queries])
    front_page = paths_for_wrk(run.folder / "front-page", ["/"])
    number = 1_000 if run.quick else 5_000
    listed = Workload(run.folder, number, 6, "listed.txt")
    with ExitStack() as stack:
        for name, app in run.versions.items():
            tracker = Server(UWSGI, run.folder / name, app)
            site = Server(UWSGI, run.folder / f"{name}-listed", app)
            (site.folder / "torrents").mkdir()
            for i, info in enumerate(listed.infos):
                path = site.folder / f"torrents/{i}.torrent"
                path.write_bytes(bencoder.bencode({b"info": info}))
            fill(app, tracker.folder, workload)
            fill(app, site.folder, listed)
            stack.enter_context(tracker).wait(workload)
            stack.enter_context(site).wait(listed)
            end = f">{number} torrents, page 1 of ".encode()
            site.get("/", lambda body, end=end: end in body)
            for what, server, asked in (
                ("announce", tracker, workload.for_wrk),
                ("scrape of 60", tracker, scrapes),
                (f"front page with {number:,} torrents", site, front_page),
            ):
                server.cost(WARM_UP, *asked)
                measures[what, name] = partial(server.cost, run.seconds, *asked)
        found = take_turns(run.rounds, measures)
    costs = {key: cpu for key, (cpu, _) in found.items()}
    print_costs("uWSGI, 2 processes", costs, {"scrape of 60": "at most 8"})


def paths_for_wrk(path, paths):
    """Write paths to a file; return the script for wrk and its environment."""
    path.write_text("\n".join(paths) + "\n")
    return "paths.lua", {"PATHS": str(path)}


def start(run):
    """Print the time from a server's start to its first answer, and CGI's CPU time."""
    workload, measures = Workload(run.folder), {}
    uwsgi, gunicorn = "uWSGI, start to first answer", "gunicorn, start to first answer"
    cgi = "CGI, CPU time of an announce"
    for name, app in run.apps.items():
        for host, template in ((uwsgi, UWSGI), (gunicorn, GEVENT)):
            server = Server(template, run.folder / f"{name}-{len(measures)}", app)
            measures[host, name] = partial(time_start, server, workload)
        program = app / ("cgi.py" if name == EMPTY else "app.py")
        folder = run.folder / f"{name}-cgi"
        measures[cgi, name] = partial(cgi_announce, program, folder, workload)
    for measure in measures.values():
        measure()  # fills the disk's cache, and makes Python compile its modules
    found = take_turns(run.rounds, measures)
    for what, limits in ((uwsgi, {}), (gunicorn, {}), (cgi, {EMPTY: "at most 0.80"})):
        figures = {name: found[what, name] for name in run.apps}
        print_beside(what, figures, limits, ["seconds"])


def time_start(server, workload):
    """Return the seconds from a server's start to its first answer."""
    begun = time.monotonic()
    with server:
        server.wait(workload)
        return (time.monotonic() - begun,)


def cgi_announce(program, folder, workload):
    """Return the seconds of CPU time that an announce takes as a CGI program."""
    folder.mkdir(parents=True, exist_ok=True)
    request = workload.environ(0) | {"GATEWAY_INTERFACE": "CGI/1.1"}
    environ = {name: text for name, text in request.items() if isinstance(text, str)}
    data, torrents = f"{folder}/data", f"{folder}/torrents"
    environ |= os.environ | {"TRACKER_DATA": data, "TRACKER_TORRENTS": torrents}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, program], env=environ, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout.startswith(b"Status: 200 OK") or b"failure" in done.stdout:
        sys.exit(f"{program} does not answer: {done.stdout!r} {done.stderr!r}")
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,)


def redis(run):
    """Print what an announce costs a tracker and its Redis, and how many it takes."""
    from servers import Engine  # only this part needs redis-py

    app, size = run.apps["bitbreeze"], 20_000 if run.quick else 200_000
    measures, memory, servers = {}, {}, {}
    with ExitStack() as stack:
        for swarms, peers in ((500, 60), (1, 10_000), (1, size)):
            name = f"{swarms:,} of {peers:,}"
            workload = Workload(run.folder, swarms, peers, f"hashes-{peers}.txt")
            folder = run.folder / f"{swarms}-{peers}"
            engine = Engine(run.folder)
            stack.callback(engine.stop)
            before = engine.client.info()["used_memory"]
            fill(app, folder, workload, store=engine.url)
            used = engine.client.info()["used_memory"] - before
            memory[name] = used / swarms / peers
            server = stack.enter_context(Server(UWSGI, folder / "it", app, engine.url))
            server.wait(workload)
            server.cost(WARM_UP, *workload.for_wrk)
            both = server, engine, run.seconds, workload
            measures[name] = partial(cost_of_both, *both)
            if swarms > 1:
                servers = {"files": "", "redis": engine.url}, workload
        costs = take_turns(run.rounds, measures)
        first, *_ = costs.values()
        rows = [
            (name, *(f"{cost:.0f}" for cost in found), f"{found[0] / first[0]:.2f}",
             "at most 1.3", f"{memory[name]:.0f}")
            for name, found in costs.items()
        ]  # fmt: skip
        heading = "swarms", "Redis, CPU µs per announce", "tracker", "growth of Redis"
        print_table((*heading, "limit", "bytes of Redis a peer"), rows)
        compare_rates(run, app, stack, *servers)


def cost_of_both(server, engine, seconds, workload):
    """Return CPU µs per announce of an engine and of its tracker."""
    process = psutil.Process(engine.process.pid)
    before = sum(process.cpu_times()[:2])
    cost, rate = server.cost(seconds, *workload.for_wrk)
    return 1e6 * (sum(process.cpu_times()[:2]) - before) / rate / seconds, cost


def compare_rates(run, app, stack, stores, workload):
    """Print announces a second of one, two and four processes of uWSGI."""
    measures = {}
    for number in (1, 2, 4):
        command = UWSGI.replace("--processes 2", f"--processes {number}")
        for name, store in stores.items():
            folder = run.folder / f"{name} {number}"
            server = stack.enter_context(Server(command, folder, app, store))
            server.wait(workload)
            server.wrk(3600, workload.for_wrk[0], workload.for_wrk[1] | {"WARM": "1"})
            measures[number, name] = partial(
                server.cost, run.seconds, *workload.for_wrk
            )
    found = take_turns(run.rounds, measures)
    rows = [(*key, f"{rate:,.0f}") for key, (_, rate) in found.items()]
    print_table(("processes", "peers in", "announces/s"), rows)


_PARTS = uwsgi, gunicorn, udp, inside, flat, pages, redis, start
PARTS = {part.__name__: part for part in _PARTS}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--before", metavar="REVISION_OR_FOLDER", help="another version to compare")
    add("--quick", action="store_true", help="one round of a second, and small sizes")
    add("--seconds", type=int, default=5, help="of requests in a round  [5]")
    add("--rounds", type=int, default=5, help="rounds of each comparison  [5]")
    add("--dir", default=HERE, help="where to keep the data meanwhile  [tests]")
    run = parser.parse_intermixed_args()
    if unknown := set(run.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)}; choose from {', '.join(PARTS)}")
    if not shutil.which("wrk") and not {"inside", "start"}.issuperset(run.parts):
        parser.error("wrk is missing: apt-get install wrk opentracker qbittorrent-nox")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=run.dir)).resolve()
    folder.chmod(0o755)  # opentracker gives up root before it reads its list
    atexit.register(shutil.rmtree, folder)  # after the applications' own exit functions
    run_parts(run, folder)


def run_parts(run, folder):
    """Run each part in a new folder, and remove the folder afterwards."""
    for name in list(os.environ):  # these would change the results
        if name.startswith(("TRACKER_", "PYTHON")):
            del os.environ[name]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    print(describe_machine(folder))
    run.versions = {"bitbreeze": HERE.parent}  # folders with an app.py
    if run.before:
        run.versions["before"] = check_out(run.before, folder / "before")
        print(f'\n"before" is {run.before}.')
    if run.quick:
        run.seconds = run.rounds = 1
        print("\nThis was a quick run. Do not quote its figures.")
    run.apps = {**run.versions, EMPTY: folder / "empty"}
    run.apps[EMPTY].mkdir()
    (run.apps[EMPTY] / "app.py").write_text(EMPTY_WSGI)
    (run.apps[EMPTY] / "cgi.py").write_text(EMPTY_CGI)
    for name in run.parts:
        print(f"\n## {name}", flush=True)
        run.folder = folder / name
        run.folder.mkdir()
        PARTS[name](run)
        shutil.rmtree(run.folder)


def check_out(before, folder):
    """Return a folder with the app.py that --before names."""
    if (Path(before) / "app.py").is_file():
        return Path(before).resolve()
    command = ["git", "-C", str(HERE.parent), "archive", before]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        sys.exit(f"--before {before}: no folder with an app.py and no git revision.")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def describe_machine(folder):
    """Return a sentence about this machine, its Python and a folder's file system."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    system, disk = os.uname(), ["df", "--output=fstype", str(folder)]
    model, python = found[1] if found else system.machine, sys.version.split()[0]
    file_system = subprocess.check_output(disk, text=True).split()[-1]
    return (
        f"{model}, {os.cpu_count()} cores; {system.sysname} {system.release};"
        f" Python {python}; data on {file_system}; {FILES:,} file descriptors allowed."
    )


if __name__ == "__main__":
    main()
