#!/usr/bin/env python3
"""Measure what BitBreeze costs, part by part, and beside other trackers in one run.

    python tests/bench.py [PART ...] [--seconds 5] [--rounds 5] [--dir FOLDER]

Without a PART it does all of them, which takes a quarter of an hour:

    hosts     CPU time of an announce of the whole process tree (user and system), and
              announces per second, under uWSGI beside an empty WSGI application,
              opentracker and qBittorrent's tracker, one connection an announce
    gunicorn  announces per second under gunicorn, beside an empty WSGI application
    rooms     where an announce spends its time, from environ to bytes, in process
    flat      whether it costs the same among 1,000 peers and 1,000,000, in a swarm of
              60 and one of 200,000; what peers take of the disk and of memory
    scrape    what a scrape of 60 torrents and the front page with 5,000 torrents cost,
              in announces, under uWSGI and in process
    site      what visits of that page cost those who announce, under uWSGI
    start     how long a server takes from its start to its first answer; what an
              announce costs as a CGI program, beside a Flask program that says nothing

On stdout are the figures, as Markdown, with their targets beside them; on stderr is
what is being done. Rounds go A B C A B C, so that a drift of the machine hits all, and
figures are medians over them. Quote the ratios, of one run.

Needs wrk (Debian's package), and psutil and pyuwsgi as tests/run installs them. The
others take part if they are installed: Debian's opentracker and qbittorrent-nox.
"""

import argparse
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from urllib.request import urlopen
from wsgiref.util import setup_testing_defaults

import bencoder
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SWARMS, PEERS = 500, 60
LISTED = 5000  # torrents on the front page
FRONT_PAGE = f"front page with {LISTED:,} torrents, warm"
FEW, MORE, MANY = (17, 60), (1_667, 60), (16_667, 60)  # swarms, and peers in each
SMALL, BIG = (1, 60), (1, 200_000)
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


class Run(NamedTuple):
    """What a part is given."""

    folder: Path  # its own, removed after it
    seconds: int  # of announces in a round
    rounds: int


class Workload(NamedTuple):
    """Announces of the peers that announce.lua makes up; a peer has a number."""

    swarms: int
    peers: int  # in each
    hashes: Path  # file of info_hashes, 40 hex digits a line
    escaped: list  # the same, as they stand in a query

    def environ(self, number):
        """Return the WSGI environ of an announce, the same that announce.lua sends."""
        member = number // self.swarms
        environ = BROWSER | {"HTTP_USER_AGENT": "Transmission/4.04"}
        environ["PATH_INFO"] = "/announce"
        environ["QUERY_STRING"] = (
            f"info_hash={self.escaped[number % self.swarms]}"
            f"&peer_id=-TR4040-{number:012}&port={1024 + member * 7 % 64000}"
            f"&uploaded=0&downloaded=0&left={1000 if member % 3 else 0}"
            "&numwant=50&key=2C4DEC5F&compact=1&supportcrypto=1"
        )
        return environ

    def sample(self, number, seed=1):
        """Return the environs of ``number`` announces, of peers at random."""
        chosen = random.Random(seed)
        among = range(self.swarms * self.peers)
        return [self.environ(chosen.choice(among)) for _ in range(number)]

    def fill(self, store, parse, settings):
        """Announce every peer once in a store, swarm by swarm, without a server."""
        total = self.swarms * self.peers
        for swarm in range(self.swarms):
            for number in range(swarm, total, self.swarms):
                announce = parse(self.environ(number), settings)
                store.announce(announce, 0, int(time.time()))


# What every request has in its environ.
BROWSER = {"REMOTE_ADDR": "127.0.0.1", "QUERY_STRING": "", "HTTP_ACCEPT": "*/*"}
setup_testing_defaults(BROWSER)


def workload(folder, swarms=SWARMS, peers=PEERS, hashes=None):
    """Return a Workload, in one-piece torrents unless there is a file of hashes."""
    hashes = hashes or info_hashes(folder, swarms)
    raw = [bytes.fromhex(line) for line in hashes.read_text().split()]
    return Workload(swarms, peers, hashes, [quote(each, safe="") for each in raw])


def info_hashes(folder, swarms):
    """Write the info_hashes of one-piece torrents, and return the file's path."""
    path = folder / "hashes.txt"
    infos = [{b"length": 1, b"name": b"bench-%d.iso" % i} for i in range(swarms)]
    hashes = [
        hashlib.sha1(bencoder.bencode(info)).hexdigest().upper() for info in infos
    ]
    path.write_text("\n".join(hashes) + "\n")
    return path


def say(*words):
    """Tell whoever waits what is being done."""
    print(*words, file=sys.stderr, flush=True)


def row(*cells):
    """Print a row of a table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def head(*names):
    """Print the first two rows of a table."""
    print()
    row(*names)
    row(*["---"] * len(names))


def sentence(text):
    """Print a result that is no table."""
    print(f"\n{text}", flush=True)


# -- Servers --------------------------------------------------------------------------


def uwsgi(port, folder, module):
    """Return the command of uWSGI with two processes."""
    return [
        Path(sys.executable).with_name("uwsgi"),
        *("--chdir", folder, "--module", module, "--master", "--processes", "2"),
        *("--http-socket", f"127.0.0.1:{port}", "--buffer-size", "32768"),
        *("--disable-logging", "--die-on-term"),
    ]


def gunicorn(port, folder, module, *options):
    """Return the command of gunicorn with two sync workers."""
    return [
        *(Path(sys.executable).with_name("gunicorn"), "-w", "2"),
        *("-b", f"127.0.0.1:{port}", "--chdir", folder, *options, module),
    ]


class Tracker:
    """A tracker that serves, from one command, while in a ``with``."""

    def __init__(self, name, port, command, folder, environ=None):
        self.name, self.port, self.command, self.folder = name, port, command, folder
        # Compiled files of ours are there at the second start, as on any host.
        self.environ = {
            "TRACKER_DATA": str(folder / "data"),
            "TRACKER_TORRENTS": str(folder / "torrents"),
            "PYTHONPYCACHEPREFIX": sys.pycache_prefix,
            **(environ or {}),
        }

    def __enter__(self):
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, self.command)),
                env={**os.environ, **self.environ}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_it_listens(self):
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            if time.monotonic() > deadline or self.process.poll() is not None:
                said = (self.folder / "log.txt").read_text()
                sys.exit(f"{self.name} does not serve:\n{said}")
            time.sleep(0.005)

    def __exit__(self, *_):
        self.stop()

    def cpu(self):
        """Return the seconds that all its processes have used, of user and system."""
        root = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (root, *root.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def memory(self):
        """Return the bytes of its largest worker that no other process shares."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        taken = [worker.memory_full_info() for worker in workers]
        return max(getattr(each, "uss", each.rss) for each in taken)

    def announce(self, announced):
        """Announce the first peer; raise OSError if nobody answers."""
        query = announced.environ(0)["QUERY_STRING"]
        url = f"http://127.0.0.1:{self.port}/announce?{query}"
        with urlopen(url, timeout=20) as answer:
            if b"failure" in (body := answer.read()):
                sys.exit(f"{self.name} refuses an announce: {body}")

    def measure(self, seconds, announced):
        """Return CPU µs an announce and announces a second, of announces at random."""
        self.announce(announced)  # or it is refusals that are measured
        return self.cost(lambda: wrk(self.port, seconds, announced, CLOSE="1"))

    def cost(self, ask):
        """Return CPU µs a request and requests a second, of what ``ask`` does."""
        before = self.cpu()
        requests, rate = ask()
        return 1e6 * (self.cpu() - before) / requests, rate

    def stop(self):
        """End it, by force after ten seconds, and whatever it has started."""
        self.process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def wrk(port, seconds, announced, **environ):
    """Announce for some seconds; return (announces, announces per second)."""
    known = {
        "HASHES": str(announced.hashes),
        "SWARMS": str(announced.swarms),
        "PEERS": str(announced.peers),
    }
    return asked(port, seconds, 32, "announce.lua", {**known, **environ})


def meet(port, announced):
    """Announce every peer, so that none is new to the tracker that is measured."""
    seconds = 6
    while (
        wrk(port, seconds, announced, WARM="1")[0] < announced.swarms * announced.peers
    ):
        seconds *= 2


def asked(port, seconds, connections, script, environ):
    """Ask for some seconds what a script says; return (requests, requests a second)."""
    out = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "20"),
            *("-s", HERE / script, f"http://127.0.0.1:{port}/"),
        ],
        env={**os.environ, **environ}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if "Non-2xx" in out:
        sys.exit(out)
    requests = int(re.search(r"(\d+) requests in", out)[1])
    return requests, float(re.search(r"Requests/sec: +([\d.]+)", out)[1])


def compared(trackers, run, announced):
    """Return medians of CPU µs an announce and announces a second, by name.

    The trackers take turns, each started anew, and met by every peer first.
    """
    results = {tracker.name: [] for tracker in trackers}
    for number in range(run.rounds):
        for tracker in trackers:
            say(f"round {number + 1} of {run.rounds}: {tracker.name}")
            with tracker:
                meet(tracker.port, announced)
                results[tracker.name].append(tracker.measure(run.seconds, announced))
    return {name: medians(rows) for name, rows in results.items()}


def medians(rows):
    """Return the median of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


# -- hosts ----------------------------------------------------------------------------


def hosts(run):
    """Put BitBreeze beside other trackers and an empty application."""
    targets = {
        "qbittorrent": "at most 0.85",
        "opentracker": "at most 1.7",
        "an empty WSGI application": "at most 1.7",
    }
    announced = workload(run.folder)
    with in_memory() as memory:
        trackers = installed(run.folder, announced.hashes, memory)
        found = compared(trackers, run, announced)
    ours = found["bitbreeze"][0]
    head("tracker", "announces/s", "CPU µs an announce", "bitbreeze's to its", "target")
    for name, (cpu, rate) in sorted(found.items(), key=lambda item: item[1]):
        ratio, target = f"{ours / cpu:.2f}", targets.get(name, "")
        row(name, f"{rate:,.0f}", f"{cpu:.1f}", ratio, target)


@contextmanager
def in_memory():
    """Make a folder on a tmpfs; None if there is none."""
    if not os.path.isdir("/dev/shm") or imported()._file_system("/dev/shm") != "tmpfs":
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as folder:
        yield folder


def installed(folder, hashes, memory):
    """Return a Tracker of each kind that is installed."""
    (folder / "empty.py").write_text(EMPTY)
    ours = uwsgi(7101, ROOT, "app:app")
    empty = uwsgi(7102, folder, "empty:app")
    found = [
        Tracker("bitbreeze", 7101, ours, folder),
        Tracker("an empty WSGI application", 7102, empty, folder),
    ]
    if memory:
        ours, environ = uwsgi(7107, ROOT, "app:app"), {"TRACKER_DATA": memory}
        name = "bitbreeze, its data on tmpfs"
        found.append(Tracker(name, 7107, ours, folder, environ))
    if shutil.which("opentracker"):
        jail = folder / "opentracker"
        jail.mkdir()
        shutil.copy(hashes, jail / "allow.txt")
        for path in (folder.parent, folder, jail):
            path.chmod(0o755)  # it serves as nobody
        command = [
            *("opentracker", "-i", "127.0.0.1", "-p", "7103", "-P", "7103"),
            *("-d", jail, "-u", "nobody", "-w", "allow.txt"),
        ]
        found.append(Tracker("opentracker", 7103, command, folder))
    if shutil.which("qbittorrent-nox"):
        config = folder / "qbittorrent/qBittorrent/config/qBittorrent.conf"
        config.parent.mkdir(parents=True)
        config.write_text(QBITTORRENT.format(port=7104, web=7105))
        command = ["qbittorrent-nox", f"--profile={folder}/qbittorrent"]
        found.append(Tracker("qbittorrent", 7104, command, folder))
    return found


# -- gunicorn -------------------------------------------------------------------------


def under_gunicorn(run):
    """Put BitBreeze beside an empty application on the same gunicorn."""
    (run.folder / "empty.py").write_text(EMPTY)
    announced, trackers, pairs = workload(run.folder), [], []
    for port, options, words in (
        (7111, (), "plain"),
        (7113, ("-c", ROOT / "app.py"), "with -c app.py"),
    ):
        pairs.append((f"bitbreeze, {words}", f"an empty WSGI application, {words}"))
        for at, name, folder, module in (
            (port, pairs[-1][0], ROOT, "app:app"),
            (port + 1, pairs[-1][1], run.folder, "empty:app"),
        ):
            command = gunicorn(at, folder, module, *options)
            trackers.append(Tracker(name, at, command, run.folder))
    found = compared(trackers, run, announced)
    plain = found[pairs[0][1]][1]  # what everybody has who changes nothing
    head(
        *("application", "announces/s", "CPU µs an announce"),
        *("to the empty one's", "to the plain empty one's", "target"),
    )
    for pair in pairs:
        for name, target in zip(pair, ("at least 0.90", ""), strict=True):
            cpu, rate = found[name]
            shares = f"{rate / found[pair[1]][1]:.2f}", f"{rate / plain:.2f}"
            row(name, f"{rate:,.0f}", f"{cpu:.0f}", *shares, target)


# -- rooms ----------------------------------------------------------------------------


def rooms(run):
    """Print what each room takes of an announce by a known peer."""
    bitbreeze, app, announced = in_process(run.folder)
    environs = announced.sample(5000)
    check_announces(app, environs)
    steps = ways(bitbreeze, app, environs)
    costs = {name: [] for name in steps}
    for number in range(4 * run.rounds):
        say(f"repetition {number + 1} of {4 * run.rounds}")
        for name, (work, given) in steps.items():
            costs[name].append(cpu_each(work, given))
    best = {name: min(found) for name, found in costs.items()}
    whole = best.pop("the whole way")
    best["the rest: door, housekeeping"] = whole - sum(best.values())
    head("room", "CPU µs", "share", "target")
    for name, cost in best.items():
        target = "at most 50%" if name == "store" else ""
        row(name, f"{cost:.1f}", f"{cost / whole:.0%}", target)
    row("the whole way", f"{whole:.1f}", "100%", "")


def ways(bitbreeze, app, environs):
    """Return (work, what it is given) of the whole way, and of each room, by name."""
    tracker, settings = app.tracker, app.tracker.settings
    parse, reply = bitbreeze.parse_announce, bitbreeze.announce_reply
    check, count = tracker.access.check, tracker.counters.count
    heard = [parse(environ, settings) for environ in environs]
    now = int(time.time())
    ready = [(announce, *tracker.announce(announce, now)) for announce in heard]
    return {
        "the whole way": (answering(app), environs),
        "parse": (lambda each, now: parse(each, settings), environs),
        "access": (lambda each, now: check(each.info_hash, now), heard),
        "store": (announcing(tracker.store), heard),
        "reply": (lambda each, now: reply(*each, settings), ready),
        "counters": (lambda each, now: count(now, "", 9000), heard),
    }


def answering(app):
    """Return what asks an application, for cpu_each."""
    return lambda environ, now: answered(app, environ)


def announcing(store):
    """Return what announces in a store, for cpu_each."""
    return lambda announce, now: store.announce(announce, 50, now)


def in_process(folder, announced=None, torrents="torrents"):
    """Return app.py, an application of it whose peers are known, and its Workload."""
    bitbreeze, announced = imported(), announced or workload(folder)
    app = bitbreeze.create_app({
        "data": str(folder / "data"), "torrents": str(folder / torrents),
    })  # fmt: skip
    say("filling", named(announced))
    (folder / "data").mkdir()
    store, settings = app.tracker.store, app.tracker.settings
    announced.fill(store, bitbreeze.parse_announce, settings)
    return bitbreeze, app, announced


def imported():
    """Return app.py as a module."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import app

    return app


def answered(app, environ):
    """Return the body of an application's answer."""
    body = app(dict(environ), ignore)
    try:
        return b"".join(body)
    finally:
        getattr(body, "close", int)()


def check_announces(app, environs):
    """End the program if an announce is refused, which would be a cheap one."""
    for environ in environs:
        if b"failure" in (body := answered(app, environ)):
            sys.exit(f"an announce in process is refused: {body}")


def ignore(status, headers, exc_info=None):
    """Take the place of a server's start_response."""


def cpu_each(work, given):
    """Return the CPU µs that ``work(each, now)`` takes for one of those given."""
    now, start = int(time.time()), time.process_time()
    for each in given:
        work(each, now)
    return 1e6 * (time.process_time() - start) / len(given)


# -- flat -----------------------------------------------------------------------------


class Held(NamedTuple):
    """A data folder full of peers."""

    folder: Path  # with data in it
    announced: Workload
    store: object


def flat(run):
    """Print what an announce costs as peers grow, and what a peer takes."""
    held = {size: filled(run.folder, *size) for size in (FEW, MORE, MANY, SMALL, BIG)}
    alone = stores_alone(held, run)
    whole, memory = whole_ways(held, run)
    head("peers", "swarms", "CPU µs an announce", "in the store alone", "worker's MB")
    for size, (cpu, _) in whole.items():
        peers, taken = f"{size[0] * size[1]:,}", f"{memory[size] / 1e6:.1f}"
        row(peers, f"{size[0]:,}", f"{cpu:.1f}", f"{alone[size]:.1f}", taken)
    head("growth", "the whole way", "in the store alone", "target")
    for small, big in ((FEW, MANY), (SMALL, BIG)):
        words = f"{named(small)} to {named(big)}"
        ways = whole[big][0] / whole[small][0], alone[big] / alone[small]
        row(words, *(f"{ratio:.2f}" for ratio in ways), "at most 1.30")
    room = on_disk(held[BIG])
    sentence(
        f"On disk, a swarm of {BIG[1]:,} takes {room / BIG[1]:.0f} bytes a peer (target"
        f" at most 200), each of {named(MANY)} {on_disk(held[MANY]):,.0f} bytes."
    )
    taken = [f"{memory[size] / 1e6:.1f}" for size in (MANY, MORE, FEW)]
    sentence(
        f"A worker takes {taken[0]} MB among {MANY[0] * MANY[1]:,} peers, {taken[1]}"
        f" among {MORE[0] * MORE[1]:,}, {taken[2]} among {FEW[0] * FEW[1]:,} (target:"
        " the same, once what it keeps of swarms is full)."
    )


def named(size):
    """Return a number of swarms, and of peers in each, in words."""
    swarms, peers = size[:2]
    words = "a swarm" if swarms == 1 else f"{swarms:,} swarms"
    return f"{words} of {peers:,}"


def filled(folder, swarms, peers):
    """Return Held, filled without a server, with the peers that wrk will announce."""
    bitbreeze = imported()
    folder = folder / f"{swarms}-{peers}"
    data = folder / "data"
    data.mkdir(parents=True)
    announced = workload(folder, swarms, peers)
    settings = bitbreeze.load_settings({"max_swarms": 0, "max_peers": 0})
    even = bitbreeze.EvenClock(data / "clock")
    store = bitbreeze.FileStore(data, settings, even)
    say("filling", named((swarms, peers)))
    announced.fill(store, bitbreeze.parse_announce, settings)
    return Held(folder, announced, store)


def stores_alone(held, run):
    """Return the CPU µs of an announce in the store, by size, in process."""
    costs, parse = {size: [] for size in held}, imported().parse_announce
    for number in range(4 * run.rounds):
        say(f"the store alone: repetition {number + 1} of {4 * run.rounds}")
        for size, (_, announced, store) in held.items():
            environs = announced.sample(5000, seed=number)
            heard = [parse(environ, store.settings) for environ in environs]
            costs[size].append(cpu_each(announcing(store), heard))
    return {size: statistics.median(found) for size, found in costs.items()}


def whole_ways(held, run):
    """Return CPU µs and announces a second under uWSGI, and a worker's bytes, by size.

    All trackers serve all the time, but only one at a time is asked.
    """
    costs = {size: [] for size in held}
    environ = {"TRACKER_MAX_SWARMS": "0", "TRACKER_MAX_PEERS": "0"}
    with ExitStack() as stack:
        trackers = {}
        for port, (size, (folder, announced, _)) in enumerate(held.items(), 7121):
            say(f"{named(size)}: warming up")
            command = uwsgi(port, ROOT, "app:app")
            tracker = Tracker("bitbreeze", port, command, folder, environ)
            trackers[size] = stack.enter_context(tracker)
            tracker.measure(run.seconds, announced)
        for number in range(run.rounds):
            for size, tracker in trackers.items():
                say(f"round {number + 1} of {run.rounds}: {named(size)}")
                costs[size].append(tracker.measure(run.seconds, held[size].announced))
        memory = {size: tracker.memory() for size, tracker in trackers.items()}
    return {size: medians(rows) for size, rows in costs.items()}, memory


def on_disk(held):
    """Return the bytes of a file system that a swarm takes, on average."""
    found = held.folder.glob("data/s*/**/*")
    files = [path.stat() for path in found if path.is_file()]
    return sum(file.st_blocks * 512 for file in files) / held.announced.swarms


# -- scrape ---------------------------------------------------------------------------


def scrape(run):
    """Print what a scrape of 60 and the front page cost, in announces."""
    small, listing = run.folder / "small", run.folder / "listing"
    small.mkdir()
    _, app, announced = in_process(small)
    pages, listed = listed_application(listing)
    chosen, scrapes = random.Random(1), []
    for _ in range(200):
        hashes = (f"info_hash={h}" for h in chosen.sample(announced.escaped, 60))
        scrapes.append("&".join(hashes))
    whole = under_uwsgi(small, announced, listing, listed, scrapes, run)
    alone = inside(app, announced, pages, scrapes, run)
    head("request", "CPU µs", "announces", "in process", "announces", "target")
    for name, target in (
        ("announce", ""),
        ("scrape of 60", "at most 8"),
        (FRONT_PAGE, "at most 100"),
    ):
        cells = []
        for found in (whole, alone):
            ratio = found[name] / found["announce"]
            cells += [f"{found[name]:.{0 if ratio > 2 else 1}f}", f"{ratio:.1f}"]
        row(name, *cells, target)


def under_uwsgi(small, announced, listing, listed, scrapes, run):
    """Return CPU µs of the process tree under uWSGI, by what is asked."""
    (small / "paths.txt").write_text("".join(f"/scrape?{q}\n" for q in scrapes))
    (listing / "paths.txt").write_text("/\n")
    names = "announce", "scrape of 60", FRONT_PAGE
    costs = {name: [] for name in names}
    ports = (7141, small, announced), (7142, listing, listed)
    with ExitStack() as stack:
        trackers = []
        for port, folder, each in ports:
            command = uwsgi(port, ROOT, "app:app")
            tracker = stack.enter_context(Tracker("bitbreeze", port, command, folder))
            tracker.measure(run.seconds, each)
            trackers.append(tracker)
        for number in range(run.rounds):
            say(f"round {number + 1} of {run.rounds}")
            costs[names[0]].append(trackers[0].measure(run.seconds, announced)[0])
            for name, tracker in zip(names[1:], trackers, strict=True):
                environ = {"PATHS": str(tracker.folder / "paths.txt")}
                given = tracker.port, run.seconds, 8, "paths.lua", environ
                costs[name].append(tracker.cost(lambda g=given: asked(*g))[0])
    return {name: statistics.median(found) for name, found in costs.items()}


def inside(app, announced, pages, scrapes, run):
    """Return CPU µs in process, from environ to bytes, by what is asked."""
    announces = announced.sample(2000)
    check_announces(app, announces)
    scrapes = [BROWSER | {"PATH_INFO": "/scrape", "QUERY_STRING": q} for q in scrapes]
    if answered(app, scrapes[0]).count(b"8:complete") != 60:
        sys.exit("a scrape of 60 torrents does not answer for 60")
    costs = {
        "announce": (app, announces),
        "scrape of 60": (app, scrapes),
        FRONT_PAGE: (pages, [BROWSER] * 20),
    }
    found = {name: [] for name in costs}
    for number in range(4 * run.rounds):
        say(f"repetition {number + 1} of {4 * run.rounds}")
        for name, (asked_app, environs) in costs.items():
            found[name].append(cpu_each(answering(asked_app), environs))
    return {name: statistics.median(each) for name, each in found.items()}


def listed_application(folder):
    """Return an application that has read its 5,000 torrents, with 6 peers in each,
    and their Workload."""
    hashes = listed_torrents(folder / "torrents")
    announced = workload(folder, LISTED, 6, hashes)
    _, app, _ = in_process(folder, announced)
    say("reading the torrents")
    deadline = time.monotonic() + 60
    while len(app.tracker.access.listed()) < LISTED:
        answered(app, BROWSER)
        if time.monotonic() > deadline:
            sys.exit("the torrents are not listed within a minute")
    if answered(app, BROWSER).count(b"<tr") < 100:
        sys.exit("the front page does not list the torrents")
    return app, announced


def listed_torrents(folder):
    """Write 5,000 torrents into a folder; return the path of their info_hashes."""
    folder.mkdir(parents=True)
    found = []
    say(f"writing {LISTED:,} torrents")
    for number in range(LISTED):
        info = {b"length": number, b"name": b"iso-%d" % number, b"pieces": bytes(2000)}
        info[b"piece length"] = 2**20
        made = bencoder.bencode({b"info": info})
        (folder / f"{number}.torrent").write_bytes(made)
        found.append(hashlib.sha1(bencoder.bencode(info)).hexdigest().upper())
    hashes = folder.parent / "listed.txt"
    hashes.write_text("\n".join(found) + "\n")
    return hashes


# -- site -----------------------------------------------------------------------------


def site(run):
    """Print what the front page with 5,000 torrents costs those who announce."""
    hashes = listed_torrents(run.folder / "torrents")
    announced = workload(run.folder, LISTED, 6, hashes)
    command = uwsgi(7106, ROOT, "app:app")
    alone, visited, times = [], [], []
    with Tracker("bitbreeze", 7106, command, run.folder):
        say("warming up")
        meet(7106, announced)
        for number in range(run.rounds):
            say(f"round {number + 1} of {run.rounds}")
            alone.append(wrk(7106, run.seconds, announced, CLOSE="1")[1])
            with visits(7106, times):
                visited.append(wrk(7106, run.seconds, announced, CLOSE="1")[1])
    alone, visited = statistics.median(alone), statistics.median(visited)
    usual, worst = 1000 * statistics.median(times), 1000 * max(times)
    sentence(
        f"The front page with {LISTED:,} torrents, twice a second while others"
        f" announce: {usual:.0f} ms, at most {worst:.0f} ms;"
        f" {visited:,.0f} announces/s instead of {alone:,.0f}:"
        f" {visited / alone:.2f} times as many."
    )


@contextmanager
def visits(port, times):
    """Have somebody look at the front page meanwhile, as ``visit`` does."""
    stop = threading.Event()
    visitor = threading.Thread(target=visit, args=(port, stop, times))
    visitor.start()
    try:
        yield
    finally:
        stop.set()
        visitor.join()


def visit(port, stop, times):
    """Look at the front page twice a second, and note how many seconds each took."""
    while not stop.wait(0.5):
        start = time.monotonic()
        with urlopen(f"http://127.0.0.1:{port}/") as page:
            if page.read().count(b"<tr") < 100:
                sys.exit("the front page does not list the torrents")
        times.append(time.monotonic() - start)


# -- start ----------------------------------------------------------------------------


def start(run):
    """Print how long a start takes, and an announce as a CGI program."""
    (run.folder / "empty.py").write_text(EMPTY)
    _, _, announced = in_process(run.folder)
    trackers = []
    for port, host, command in ((7131, "uWSGI", uwsgi), (7133, "gunicorn", gunicorn)):
        ours = command(port, ROOT, "app:app")
        empty = command(port + 1, run.folder, "empty:app")
        name = f"an empty WSGI application, {host}"
        trackers.append(Tracker(f"bitbreeze, {host}", port, ours, run.folder))
        trackers.append(Tracker(name, port + 1, empty, run.folder))
    times = {tracker.name: [] for tracker in trackers}
    for number in range(run.rounds + 1):
        for tracker in trackers:
            say(f"start {number} of {run.rounds}: {tracker.name}")
            took = first_answer(tracker, announced)
            if number:  # the first start warms the disk
                times[tracker.name].append(took)
    head("start to first answer", "seconds", "target")
    for name, found in times.items():
        target = "at most 0.5" if name.startswith("bitbreeze") else ""
        row(name, f"{statistics.median(found):.2f}", target)
    cgi_alone(run)


def first_answer(tracker, announced):
    """Return the seconds from a tracker's start to its first answer to an announce."""
    begun = time.monotonic()
    with tracker:
        while time.monotonic() - begun < 20:
            with suppress(OSError):
                tracker.announce(announced)
                return time.monotonic() - begun
            time.sleep(0.005)
    sys.exit(f"{tracker.name} does not answer")


def cgi_alone(run):
    """Print what an announce costs in a process of its own, and an empty program."""
    empty = run.folder / "empty_cgi.py"
    empty.write_text(EMPTY_CGI)
    environ = {
        **os.environ, "TRACKER_DATA": str(run.folder / "cgi"),
        "TRACKER_TORRENTS": str(run.folder / "torrents"), "PATH_INFO": "/announce",
        "PYTHONPYCACHEPREFIX": sys.pycache_prefix,
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

    costs = {ROOT / "app.py": [], empty: []}
    for number in range(4 * run.rounds):
        say(f"CGI: repetition {number + 1} of {4 * run.rounds}")
        for program in costs:
            costs[program].append(cost(program))
    ours, theirs = (statistics.median(found) for found in costs.values())
    sentence(
        f"CGI: {ours:.0f} ms an announce, {theirs:.0f} ms an empty Flask program:"
        f" {ours / theirs:.2f} times as much."
    )


# -- The command ----------------------------------------------------------------------

PARTS = {
    "hosts": hosts,
    "gunicorn": under_gunicorn,
    "rooms": rooms,
    "flat": flat,
    "scrape": scrape,
    "site": site,
    "start": start,
}


def machine(folder):
    """Return a sentence that names this machine, this Python, and a file system."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    model, cores = found[1] if found else platform.machine(), os.cpu_count()
    # Debian takes the flag that uses the profile out of the Makefile that it installs.
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    is_debians = sysconfig.get_config_var("PGO_PROF_USE_FLAG") == ""
    is_guided = "--enable-optimizations" in arguments or is_debians
    kind = imported()._file_system(folder) or "an unknown file system"
    return (
        f"{model}, {cores} cores; {platform.system()} {platform.release()}; Python"
        f" {platform.python_version()}, compiled {'with' if is_guided else 'without'}"
        f" profile-guided optimisation; the data on {kind}."
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", default=5, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--dir", default=HERE, help="where the data is kept meanwhile")
    given = parser.parse_intermixed_args()
    for name in given.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}: there are {', '.join(PARTS)}")
    for name in [name for name in os.environ if name.startswith("TRACKER_")]:
        del os.environ[name]  # it would be a setting of all that is measured
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=given.dir)).resolve()
    sys.dont_write_bytecode, sys.pycache_prefix = False, f"{folder}/compiled"
    try:
        print(machine(folder), flush=True)
        for name in given.parts or PARTS:
            say(f"-- {name}")
            print(f"\n## {name}", flush=True)
            own = folder / name
            own.mkdir()
            PARTS[name](Run(own, given.seconds, given.rounds))
            shutil.rmtree(own)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
