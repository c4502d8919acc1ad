"""Helpers to run the tracker on a real server, and to talk to it as clients do."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import bencoder
import psutil
import redis

ROOT = Path(__file__).resolve().parent.parent
APP = [sys.executable, "app.py"]  # in the project's folder
LONGEST_QUERY = "8190"  # bytes in a request line that gunicorn is told to accept


class Server:
    """A tracker in a separate process group, and its output."""

    def __init__(self, command, port, env, cwd=ROOT, path=""):
        self.port, self.url = port, f"http://127.0.0.1:{port}{path}"
        self.output = tempfile.TemporaryFile()
        kept = {n: v for n, v in os.environ.items() if not n.startswith("TRACKER_")}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**kept, "PYTHONUNBUFFERED": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def log(self):
        """Return the text that was written to stdout and stderr so far."""
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), size, 0).decode(errors="replace")

    def workers(self):
        """Return the process ids of all children of the first process."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child.pid for child in children]

    def wait_until_ready(self, seconds=20):
        """Wait until the tracker answers; raise RuntimeError if it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urlopen(f"{self.url}/stats.json", timeout=5) as response:
                    json.load(response)
                    return
            except (OSError, ValueError) as error:
                if getattr(error, "code", 0) == 403:  # it is private
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start. Its output:\n{self.log()}")

    def signal(self, number):
        """Send a signal to all processes of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self):
        """Send SIGTERM to the server, and SIGKILL after ten seconds."""
        self.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.signal(signal.SIGKILL)
        self.process.wait(10)


def free_port():
    """Return a free port below those that the system uses for outgoing connections."""
    while True:
        # pytest-randomly seeds random.randrange alike in all processes of a run.
        port = random.SystemRandom().randrange(10000, 32000)
        with suppress(OSError), _listening(port):
            return port


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _listening(port):
    if socket.has_dualstack_ipv6():
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("", port), **both)
    return socket.create_server(("", port))


@contextmanager
def serving(command, port, env):
    """Run a server in the project's folder, and yield it as soon as it answers."""
    server = Server(command, port, env)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
        server.output.close()


def gunicorn(port, workers=2, threads=0):
    """Return a command for gunicorn with gevent workers, or with threads if given."""
    command = [sys.executable, "-m", "gunicorn", "app:app", "-b", f"127.0.0.1:{port}"]
    command += ["--threads", threads] if threads else ["--worker-class", "gevent"]
    command += ["--workers", workers, "--limit-request-line", LONGEST_QUERY]
    return [*command, "--no-control-socket"]


def uwsgi(port):
    """Return a command for uWSGI with wsgi.ini, and another port."""
    program = Path(sys.executable).with_name("uwsgi")
    return [program, "--set-placeholder", f"port={port}", "wsgi.ini"]


class Engine:
    """A process of redis-server, with its data in a folder."""

    def __init__(self, folder, *options):
        self.port, self.folder, self.options = free_port(), str(folder), options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def start(self):
        command = ["redis-server", "--port", self.port, "--dir", self.folder]
        command += ["--save", "", "--databases", 99, *self.options]
        words = [str(word) for word in command]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        poll(self._answers, 20, "redis-server")

    def _answers(self):
        with suppress(redis.RedisError):
            return self.client.ping()

    def stop(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(20)


@contextmanager
def cluster(folder, *options):
    """Yield three Engines that are a Cluster."""
    engines = []
    try:
        for number in range(3):
            place = Path(folder, str(number))
            place.mkdir()
            more = "--cluster-enabled", "yes", "--cluster-port", free_port()
            engines.append(Engine(place, *more, *options))
        nodes = [f"127.0.0.1:{engine.port}" for engine in engines]
        create = ["redis-cli", "--cluster", "create", *nodes, "--cluster-yes"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        wait_for_cluster(engines)
        yield engines
    finally:
        for engine in engines:
            engine.stop()


def wait_for_cluster(engines):
    """Wait until all nodes of a Cluster find that it works."""
    clients = [engine.client for engine in engines]
    ask = lambda client: client.cluster("info")["cluster_state"]  # noqa: E731
    poll(lambda: {*map(ask, clients)} == {"ok"}, 30, "a Cluster")


def announce_path(info_hash, peer_id, port, **parameters):
    """Return the path and query of an announce."""
    known = {"info_hash": info_hash, "peer_id": peer_id, "port": port}
    return "/announce?" + urlencode({**known, **parameters})


def scrape_path(*info_hashes):
    """Return the path and query of a scrape."""
    return "/scrape?" + urlencode([("info_hash", i) for i in info_hashes])


def announce(url, info_hash, peer_id, port, **parameters):
    """Return the decoded reply to an announce."""
    return _decoded(url + announce_path(info_hash, peer_id, port, **parameters))


def scrape(url, *info_hashes):
    """Return the decoded reply to a scrape."""
    return _decoded(url + scrape_path(*info_hashes))


def _decoded(url):
    with urlopen(url, timeout=20) as response:
        return bencoder.bdecode(response.read())


def poll(check, seconds, what):
    """Return the first true value of ``check()``; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return value


def cgi(folder):
    """Run app.py once as a CGI program that answers an announce."""
    query = f"info_hash={'h' * 20}&peer_id={'p' * 20}&port=6881"
    environ = {
        "GATEWAY_INTERFACE": "CGI/1.1",
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/announce",
        "QUERY_STRING": query,
        "REMOTE_ADDR": "192.0.2.1",
        "TRACKER_DATA": str(folder),
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
    }
    subprocess.run([sys.executable, ROOT / "app.py"], env=environ, check=True)


def close(sock):
    """Close the socket of a UdpServer, and wake it, so that it ends."""
    address = sock.getsockname()
    sock.close()
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.sendto(b"", address)
