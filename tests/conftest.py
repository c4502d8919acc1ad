"""What several test files share: an application of its own for every test."""

import os
import sys
from pathlib import Path

import bencoder
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for name in [name for name in os.environ if name.startswith("TRACKER_")]:
    del os.environ[name]  # before app reads them: tests say themselves what they set

import app as bitbreeze  # noqa: E402

pytest.register_assert_rewrite("contract")

NOW = 1_800_000_000
# What takes long on a machine with other work to do is no fault of what is tested.
hypothesis_settings.register_profile("patient", deadline=None)
hypothesis_settings.load_profile("patient")


def pytest_addoption(parser):
    help_text = "the storms, soaks and cases in full: half an hour and more"
    parser.addoption("--long", action="store_true", help=help_text)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes, and runs with --long only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def is_long(request):
    """Whether to test in full, or as long as anybody who changes something waits."""
    return request.config.getoption("--long")


@pytest.fixture
def cases(is_long):
    """A function that says how many cases to try: eighty times as many in full."""
    return lambda number: number * 40 if is_long else number // 2


@pytest.fixture
def fuzz(cases):
    """A function that calls a check with so many cases of a strategy."""

    def run(number, strategy, check):
        slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        limits = hypothesis_settings(
            max_examples=cases(number),
            database=None,
            suppress_health_check=slow,
        )
        limits(given(strategy)(lambda case: check(case)))()

    return run


@pytest.fixture
def settings():
    return make_settings()


@pytest.fixture
def tracker(tmp_path):
    """A function that makes an application with settings, and returns its Client."""

    def make(**overrides):
        folders = {name: str(tmp_path / name) for name in ("data", "torrents")}
        return Client(bitbreeze.create_app({**folders, **overrides}))

    return make


def make_settings(**overrides):
    """Return Settings as they are by default, but for ``overrides``."""
    return bitbreeze.load_settings(overrides, environ={}, ini=os.devnull)


class Client:
    """Announces and scrapes at the WSGI door, and returns decoded replies."""

    def __init__(self, app):
        self.app = app

    def get(self, path, query="", address="192.0.2.1", method="GET", **more):
        """Return (status, headers, body) of one request, ``query`` as it is sent.

        ``more`` is more of the environ.
        """
        said = []
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REMOTE_ADDR": address,
            "SERVER_NAME": "tracker.test",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            **more,
        }
        body = b"".join(self.app(environ, lambda *answer: said.extend(answer)))
        return said[0], dict(said[1]), body

    def announce(self, peer=1, info_hash=b"h" * 20, address="192.0.2.1", **parameters):
        """Announce peer number ``peer`` on port 1000 + peer, and return the reply."""
        query = {"peer_id": peer_id(peer), "port": 1000 + peer, "left": 1, **parameters}
        return self.ask("/announce", {"info_hash": info_hash, **query}, address)

    def scrape(self, *info_hashes):
        query = "&".join("info_hash=" + escape(info_hash) for info_hash in info_hashes)
        return bencoder.bdecode(self.get("/scrape", query)[2])

    def ask(self, path, parameters, address="192.0.2.1"):
        query = "&".join(
            f"{name}={escape(value)}" for name, value in parameters.items()
        )
        status, _, body = self.get(path, query, address)
        assert status == "200 OK"
        return bencoder.bdecode(body)


def all_peers(store, now):
    """Yield (info_hash, Peers) of every swarm in a store that has peers."""
    for info_hash, _ in store.swarms(now):
        if found := [record for record, _ in store.peers(info_hash, now)[1]]:
            fields = ("peer_id", "endpoint4", "endpoint6")
            columns = (b"".join(getattr(r, field) for r in found) for field in fields)
            yield info_hash, bitbreeze.Peers(*columns)


def kept(data):
    """Return the paths of the swarm files in a data folder, by info_hash."""
    paths = Path(data, "swarms").glob("??/" + "?" * 40)
    return {bytes.fromhex(path.name): path for path in paths}


def rewrite(data, info_hash, change):
    """Replace a swarm file by ``change(bytes)``; return the bytes from before.

    It stays the same file, because processes may have it open.
    """
    path = kept(data)[info_hash]
    before = path.read_bytes()
    path.write_bytes(change(before))
    return before


def escape(value):
    """Return a value as it stands in a query, every byte of it escaped."""
    raw = value if isinstance(value, bytes) else str(value).encode()
    return (
        "".join(f"%{byte:02x}" for byte in raw)
        if isinstance(value, bytes)
        else raw.decode()
    )


def peer_id(number):
    return b"-BB0001-%012d" % number


def endpoints(packed, width=6):
    """Return the endpoints in a compact reply, as a list of bytes."""
    return [packed[i : i + width] for i in range(0, len(packed), width)]


def mutated(rnd, data):
    """Return bytes after a few accidents: flipped, lost, doubled, or written over."""
    data = bytearray(data)
    for _ in range(rnd.choice((1, 1, 1, 2, 5))):
        at, size = rnd.randrange(len(data) + 1), rnd.choice((0, 1, 1, 2, 9, 200))
        gone = data[at : at + size]
        data[at : at + size] = rnd.choice(
            (
                *(b"", gone * 2, gone[::-1], bytes(len(gone)), rnd.randbytes(size)),
                bytes(byte ^ 1 << rnd.randrange(8) for byte in gone),
                rnd.choice((b"i", b"e", b"d", b"l", b"0:", b"-", b"1:x", b"9" * 20)),
            )
        )
    return bytes(data)
