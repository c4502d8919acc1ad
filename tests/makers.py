"""Real torrents: what people make them with, and what people put into them.

Each of MAKERS is called with a folder, a payload (a file or a folder), and the announce
URL; it returns the path of a new .torrent file in that folder. Each of PAYLOADS is
called with a folder, and returns the path of a payload in it.
"""

import hashlib
import os
import random
import shutil
import subprocess
from functools import partial

import bencoder
import libtorrent
import pytest

FLAGS = {
    "v1": libtorrent.create_torrent.v1_only,
    "v2": libtorrent.create_torrent.v2_only,
    "hybrid": 0,
}
NOWHERE = "http://tracker.invalid/announce"
COMMENT = '<b>"ours"</b> &amp; שלהם'
SEEDS = ["http://seed.invalid/a/", 'http://seed.invalid/"><script>alert(1)</script>']


# Makers


def by_libtorrent(folder, payload, url=NOWHERE, kind="v1", is_dressed=False):
    """Make one as qBittorrent and Deluge do."""
    files = libtorrent.list_files(str(payload))
    made = libtorrent.create_torrent(files, 16384, FLAGS[kind])
    made.add_tracker(url)
    if is_dressed:
        made.set_priv(True)
        made.set_comment(COMMENT)
        for seed in SEEDS:
            made.add_url_seed(seed)
        made.add_node("node.invalid", 6881)
    libtorrent.set_piece_hashes(made, str(payload.parent))
    return _written(folder, payload, bencoder.bencode(made.generate()))


def by_mktorrent(folder, payload, url=NOWHERE, is_dressed=False):
    options = ["-p", "-c", COMMENT, "-w", ",".join(SEEDS)] if is_dressed else []
    return _made(folder, payload, "mktorrent", "-a", url, *options)


def by_transmission(folder, payload, url=NOWHERE, is_dressed=False):
    options = ["-p", "-c", COMMENT] if is_dressed else []
    return _made(folder, payload, "transmission-create", "-t", url, *options)


def by_hand(folder, payload, url=NOWHERE, kind="v1"):
    """Make one with names that no disk can hold, as only an editor does."""
    metainfo = bencoder.bdecode(by_libtorrent(folder, payload, url, kind).read_bytes())
    metainfo[b"info"][b"name"] = b'../"><script>alert(1)</script>\0\n'
    metainfo[b"info"][b"x"] = [{b"<x>": -5}, b"\xff", 2**62]
    return _written(folder, payload, bencoder.bencode(metainfo))


MAKERS = {
    **{f"libtorrent {kind}": partial(by_libtorrent, kind=kind) for kind in FLAGS},
    **{
        f"libtorrent {kind} dressed": partial(by_libtorrent, kind=kind, is_dressed=True)
        for kind in FLAGS
    },
    **{f"by hand {kind}": partial(by_hand, kind=kind) for kind in ("v1", "v2")},
    "mktorrent": by_mktorrent,
    "mktorrent dressed": partial(by_mktorrent, is_dressed=True),
    "transmission": by_transmission,
    "transmission dressed": partial(by_transmission, is_dressed=True),
}


def program(name):
    """Return the path of a program; skip the test without it, or fail where CI is."""
    if path := shutil.which(name):
        return path
    reason = f"{name} IS NOT INSTALLED: the torrents it makes are NOT tested"
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def _made(folder, payload, name, *options):
    path = _torrent_path(folder, payload)
    command = [program(name), "-o", str(path), *options, str(payload)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and path.exists(), done.stdout + done.stderr
    return path


def _written(folder, payload, data):
    path = _torrent_path(folder, payload)
    path.write_bytes(data)
    return path


def _torrent_path(folder, payload):
    # The payload's name and .torrent together may be too long for a name.
    return folder / f"{hashlib.sha1(os.fsencode(payload.name)).hexdigest()}.torrent"


# Payloads


def one_file(folder):
    return _put(folder / "a file.iso", 100_000)


def empty_names(folder):
    """Files of no bytes, of one piece, and of a byte more, in deep folders."""
    for path, size in (("none", 0), ("a/b/c/d/piece", 16384), ("a/b/more", 16385)):
        _put(folder / "deep" / path, size)
    return folder / "deep"


def names_of_the_world(folder):
    """Right to left, composed and decomposed, outside of the first 65,536."""
    for name in ("שלום עולם", "مرحبا\u202egnp.exe", "é", "e\u0301", "𝔘🎉", "日本" * 40):
        _put(folder / "עברית und Übermut" / f"{name}.txt", 20_000)
    return folder / "עברית und Übermut"


def markup(folder):
    for name in (
        "<img src=x onerror=alert(1)>",
        '"><svg onload=alert(1)>',
        "&lt;'{{7*7}}",
    ):
        _put(folder / '"><img src=x onerror=alert(1)>' / name, 5_000)
    return folder / '"><img src=x onerror=alert(1)>'


PAYLOADS = {
    each.__name__: each for each in (one_file, empty_names, names_of_the_world, markup)
}


def _put(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(path.name).randbytes(size))
    return path
