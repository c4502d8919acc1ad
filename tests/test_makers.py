"""Torrents that real programs make: listed, and known by what clients announce."""

import bencoder
import libtorrent
import pytest
from conftest import NOW
from makers import FLAGS, MAKERS, PAYLOADS

import app as bitbreeze

PADDING = libtorrent.file_flags_t.flag_pad_file


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_real_programs_make(tmp_path, maker, payload):
    (tmp_path / "torrents").mkdir()
    path = MAKERS[maker](tmp_path / "torrents", PAYLOADS[payload](tmp_path))
    check_as_libtorrent(tmp_path, path)


@pytest.mark.parametrize("kind", FLAGS)
def test_ten_thousand_files_in_one_torrent(tmp_path, kind):
    (tmp_path / "torrents").mkdir()
    (tmp_path / "many").mkdir()
    for number in range(10_000):
        (tmp_path / f"many/{number}").write_bytes(b"%d" % number)
    path = MAKERS[f"libtorrent {kind}"](tmp_path / "torrents", tmp_path / "many")
    assert check_as_libtorrent(tmp_path, path).files == 10_000


def check_as_libtorrent(folder, path):
    """Fail unless a torrent is listed as libtorrent reads it; return the Torrent."""
    known = bitbreeze.Catalogue(folder / "torrents", folder / "data/torrents.json")
    info = libtorrent.torrent_info(str(path))
    known.scan(NOW, seconds=10)
    assert not known.skipped
    (torrent,) = known.torrents.values()
    hashes = info.info_hashes()
    assert torrent.v1 == (str(hashes.v1) if hashes.has_v1() else "")
    assert torrent.v2 == (str(hashes.v2) if hashes.has_v2() else "")
    assert all(known.tracks(each, NOW) for each in torrent.info_hashes())
    assert all(known.find(each, NOW) for each in (torrent.v1, torrent.v2) if each)
    files = getattr(info, "layout", info.files)()  # the latter until libtorrent 2.1
    real = [i for i in range(files.num_files()) if not files.file_flags(i) & PADDING]
    assert torrent.files == len(real)
    assert torrent.size == sum(files.file_size(i) for i in real)
    name = bencoder.bdecode(path.read_bytes())[b"info"][b"name"]
    assert torrent.name == name.decode()
    assert torrent.is_private == info.priv()
    return torrent
