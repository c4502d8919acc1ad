"""Lists that change while many workers serve: each follows, and none is ever wrong.

A torrent dropped in or taken out counts in every worker within five seconds. Meanwhile
what is always listed is always accepted, and what never is never: a list that is being
written does not count as everything, and not as nothing.
"""

import itertools
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from urllib.request import urlopen

import bencoder
import pytest
from conftest import kept
from makers import MAKERS, one_file
from servers import announce_path, free_port, gunicorn, poll, scrape_path, serving
from test_torrents import torrent_of

import app as bitbreeze

LISTED = b"torrent not registered with this tracker"
PEER = b"-LISTED-a client----"
# The tracker, and in each answer the process that gave it.
NAMED = """
import os
from app import app


def named(environ, start_response):
    def start(status, headers, *rest):
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], *rest)

    return app(environ, start)
"""


def gunicorn_named(folder, port, workers):
    command = gunicorn(port, workers, 2)
    command[command.index("app:app")] = "named:named"
    return [*command, "--pythonpath", folder]


def uwsgi_named(folder, port, workers):
    program = Path(sys.executable).with_name("uwsgi")
    command = [program, "--http-socket", f"127.0.0.1:{port}", "--master", "--need-app"]
    command += ["--processes", workers, "--threads", 2, "--disable-logging"]
    return [*command, "--pythonpath", folder, "--module", "named:named"]


HOSTS = {"gunicorn": (gunicorn_named, 4), "uwsgi": (uwsgi_named, 3)}


class Site:
    """A folder with a tracker's lists, and how to change them."""

    def __init__(self, folder, host, track):
        self.folder, (self.host, self.workers) = folder, HOSTS[host]
        self.track, self.port = track, free_port()
        self.torrents = folder / "torrents"
        self.torrents.mkdir(parents=True)
        (folder / "named.py").write_text(NAMED)

    def serving(self):
        """Return the context of a server of this site."""
        env = {"TRACKER_DATA": str(self.folder / "data"), "TRACKER_TRACK": self.track}
        env["TRACKER_TORRENTS"] = str(self.torrents)
        command = self.host(self.folder, self.port, self.workers)
        return serving(command, self.port, env)

    def put(self, name):
        """Drop a torrent in as a whole, and return its info_hash."""
        data = torrent_of(name)
        (self.folder / "new").write_bytes(data)
        os.replace(self.folder / "new", self.torrents / f"{name}.torrent")
        return hash_of(data)

    def ask(self, info_hash):
        """Announce over a new connection; return which worker refuses it, and why."""
        path = announce_path(info_hash, PEER, 7000, left=1)
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as response:
            reply = bencoder.bdecode(response.read())
            return response.headers["X-Worker"], reply.get(b"failure reason")

    def ask_all(self, info_hash):
        """Return what each worker answers: why it refuses, or None, by worker."""
        answers = {}
        with ThreadPoolExecutor(self.workers * 2) as pool:
            while len(answers) < self.workers:
                answers.update(pool.map(self.ask, [info_hash] * self.workers * 2))
        return answers

    def check_all(self, info_hash, refusal, until):
        """Fail unless every worker answers so before a time on the monotonic clock."""

        def is_so():
            return set(self.ask_all(info_hash).values()) == {refusal}

        what = f"{refusal} for {info_hash.hex()} by all workers"
        poll(is_so, until - time.monotonic(), what)


def hash_of(data):
    return bitbreeze.describe(bitbreeze.read_metainfo(data), "", 0).info_hashes()[0]


@pytest.mark.parametrize("host", HOSTS)
def test_every_worker_follows_within_five_seconds(tmp_path, host):
    site = Site(tmp_path, host, "listed")
    with site.serving():
        missing = os.urandom(20)
        assert set(site.ask_all(missing).values()) == {LISTED}
        hybrid = MAKERS["libtorrent hybrid"](site.torrents, one_file(tmp_path))
        until = time.monotonic() + 5
        both = bitbreeze.describe(bitbreeze.read_metainfo(hybrid.read_bytes()), "", 0)
        v1, v2 = both.info_hashes()
        allowed = os.urandom(20)
        (tmp_path / "allow.txt").write_text(allowed.hex())
        for info_hash in (v1, v2, allowed):
            site.check_all(info_hash, None, until)
        with urlopen(f"http://127.0.0.1:{site.port}{scrape_path(missing)}") as response:
            files = bencoder.bdecode(response.read())[b"files"]
        assert set(files[missing].values()) == {0}
        assert set(kept(tmp_path / "data")) == {v1, v2, allowed}
        hybrid.unlink()
        (tmp_path / "allow.txt").unlink()
        until = time.monotonic() + 5
        for info_hash in (v1, v2, allowed, missing):
            site.check_all(info_hash, LISTED, until)


# A thousand edits, each another way to write what is always true.

ROUNDS, EDITS = 3, 168


class Edited(Site):
    """A site of which the lists are written again and again.

    ``always`` and ``never`` say what it answers whatever is edited. With ``kept``
    torrents these are edited, too; without, allow.txt is all that there is.
    """

    def __init__(self, folder, host, track, kept):
        super().__init__(folder, host, track)
        self.random, self.numbers = random.Random(1), itertools.count()
        self.kept = [f"kept {number}" for number in range(kept)]
        self.allowed = [os.urandom(20) for _ in range(3)]
        self.denied = [os.urandom(20) for _ in range(3)]
        if kept:
            self.denied.append(self.put("denied"))
        self.always = self.allowed + [self.put(name) for name in self.kept]
        self.never = self.denied + [os.urandom(20) for _ in range(3)]
        self.marks, self.dropped = (None, None), []
        self.edit_list("allow")
        self.edit_list("deny")

    def ask_any(self):
        """Ask for any hash; return what is wrong with the answer, if anything."""
        info_hash = self.random.choice(self.always + self.never)
        worker, refusal = self.ask(info_hash)
        if refusal != (None if info_hash in self.always else LISTED):
            return worker, info_hash, refusal
        return None

    def edit(self):
        """Make one edit of any kind."""
        kind = self.random.randrange(4 if self.kept else 2)
        if kind < 2:
            self.edit_list(("allow", "deny")[kind])
        elif kind == 2:
            self.edit_kept(self.random.choice(self.kept))
        else:
            self.edit_dropped()

    def edit_list(self, name):
        """Write a list anew, with others in it and in another order."""
        allowed, denied = self.marks
        hashes = {
            "allow": [*self.allowed, *self.denied, allowed, denied],
            "deny": [*self.denied, denied],
        }[name]
        hashes += [os.urandom(20) for _ in range(self.random.randrange(300))]
        self.random.shuffle(hashes)
        text = "\n".join(info_hash.hex() for info_hash in hashes if info_hash)
        self.write(self.folder / f"{name}.txt", text.encode())

    def edit_kept(self, name):
        """Write a torrent anew that is always there, with the same in it or more."""
        comment = b"d7:comment%d:%s" % (len(name), name.encode())
        data = torrent_of(name)
        data = self.random.choice([data, comment + data[1:]])
        self.write(self.torrents / f"{name}.torrent", data)

    def edit_dropped(self):
        """Drop one torrent in, or take one out that is not the last."""
        if len(self.dropped) > self.random.randrange(1, 9):
            (self.torrents / f"{self.dropped.pop(0)}.torrent").unlink()
        else:
            self.drop()

    def drop(self):
        """Drop a torrent in that was never there, and return its info_hash."""
        self.dropped.append(f"dropped {next(self.numbers)}")
        return self.put(self.dropped[-1])

    def write(self, path, data):
        """Write a file over, or rename a new one into its place, or remove it first."""
        way = self.random.choice(["over", "rename", "remove"])
        if way == "rename":
            path.with_suffix(".new").write_bytes(data)
            os.replace(path.with_suffix(".new"), path)
            return
        if way == "remove":
            path.unlink(missing_ok=True)
        path.write_bytes(data)

    def mark(self):
        """List other hashes than before; return a function that sees them followed."""
        gone, self.marks = self.marks, (os.urandom(20), os.urandom(20))
        self.edit_list("allow")
        self.edit_list("deny")
        expected = {self.marks[0]: None, self.marks[1]: LISTED, gone[0]: LISTED}
        if self.kept:
            expected[self.drop()] = None
            taken = self.torrents / f"{self.dropped.pop(0)}.torrent"
            expected[hash_of(taken.read_bytes())] = LISTED
            taken.unlink()
        until = time.monotonic() + 10  # with all the others that ask

        def check():
            for info_hash, refusal in expected.items():
                if info_hash:
                    self.check_all(info_hash, refusal, until)

        return check


def test_a_thousand_edits_never_make_a_wrong_answer(tmp_path):
    sites = [
        Edited(tmp_path / "kept", "gunicorn", "auto", 5),
        Edited(tmp_path / "bare", "uwsgi", "auto", 0),
    ]
    wrong, done = [], Event()

    def ask_on():
        while not done.is_set():
            wrong.extend(filter(None, (site.ask_any() for site in sites)))

    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        for site in sites:
            stack.enter_context(site.serving())
            # Whoever starts in the middle of an edit takes it for what there is.
            site.ask_all(site.always[0])
        stack.callback(done.set)
        clients = [pool.submit(ask_on) for _ in range(3)]
        for _ in range(ROUNDS):
            for _ in range(EDITS):
                for site in sites:
                    site.edit()
                    wrong.extend(filter(None, [site.ask_any()]))
            for check in [site.mark() for site in sites]:
                check()
        done.set()
        for client in clients:
            client.result(20)
    assert not wrong
