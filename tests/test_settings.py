"""Settings: where they come from, what they may be, and that README has them all."""

import inspect
import random
import re
from ipaddress import ip_network
from pathlib import Path

import pytest
from conftest import make_settings, mutated

import app as bitbreeze

README = Path(bitbreeze.__file__).with_name("README.md")


def load(tmp_path, ini="", environ=None, overrides=None):
    path = tmp_path / "wsgi.ini"
    path.write_text(ini)
    return bitbreeze.load_settings(overrides, environ or {}, path)


def test_later_sources_win(tmp_path):
    ini = "[tracker]\ntitle = ini\ninterval = 1000\nnumwant = 10\n"
    environ = {
        "TRACKER_TITLE": "environment",
        "TRACKER_INTERVAL": "2000",
        "PATH": "/bin",
    }
    settings = load(tmp_path, ini, environ, {"title": "call"})
    assert (settings.title, settings.interval) == ("call", 2000)
    assert (settings.numwant, settings.max_numwant) == (10, 100)


def test_foreign_sections_are_left_alone(tmp_path):
    ini = "[uwsgi]\nendif = a\nendif = %d\n[tracker]\ntitle = 100%\n"
    assert load(tmp_path, ini).title == "100%"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("interval", "1800", 1800),
        ("interval", " 1800 ", 1800),
        ("interval", 900, 900),
        ("max_swarms", "0", 0),
        ("verbose", "yes", True),
        ("verbose", "Off", False),
        ("verbose", True, True),
        ("title", "Ünser Tracker", "Ünser Tracker"),
        ("public_ip", "", {}),
        ("public_ip", "192.0.2.1", {4: bytes((192, 0, 2, 1))}),
        ("public_ip", "::2, 1.2.3.4", {4: b"\1\2\3\4", 16: bytes(15) + b"\2"}),
        ("proxy_networks", "unix, 10.0.0.0/8", ["unix", ip_network("10.0.0.0/8")]),
    ],
)
def test_values(name, value, expected):
    assert getattr(make_settings(**{name: value}), name) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"intervall": 5}, "create_app sets 'intervall'. Did you mean interval?"),
        ({"q": 5}, "create_app sets 'q'. Did you mean title or url or notice or data"),
        (
            {"url": "tracker.test"},
            "it must be a URL such as https://tracker.example.org",
        ),
        (
            {"url": "http://a/?b"},
            "it must be a URL such as https://tracker.example.org",
        ),
        ({"interval": "30m"}, "sets interval to '30m': it must be a whole number"),
        ({"interval": "-1"}, "it must be a whole number, 0 or more"),
        ({"interval": -1}, "it must be a whole number, 0 or more"),
        ({"interval": True}, "it must be a whole number"),
        ({"interval": 0}, "interval must be at least 1 second"),
        ({"min_interval": 0}, "min_interval must be at least 1 second"),
        ({"verbose": "perhaps"}, "'perhaps': it must be yes or no"),
        ({"track": "some"}, "it must be any, listed or auto"),
        ({"title": 5}, "it must be text"),
        ({"notice": "\udcff"}, "surrogates not allowed"),
        ({"min_interval": 1700}, "min_interval must be at most 1620 seconds"),
        ({"peer_ttl": 1980}, "peer_ttl must be more than 1980 seconds"),
        ({"numwant": 200}, "numwant must be at most 100"),
        ({"proxies": "-1"}, "it must be a whole number"),
        ({"public_ip": "here"}, "'here' does not appear to be an IPv4 or IPv6 address"),
        (
            {"public_ip": "10.0.0.1"},
            "public_ip to '10.0.0.1': it must be one public IPv4",
        ),
        ({"public_ip": "192.0.2.1 192.0.2.2"}, "it must be one public IPv4 address"),
        ({"proxy_networks": "10.0.0.1/8"}, "10.0.0.1/8 has host bits set"),
    ],
)
def test_bad_settings_are_refused(given, sentence):
    with pytest.raises(bitbreeze.SettingsError) as refusal:
        make_settings(**given)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(bitbreeze.SettingsError, match="cannot be read: .*directory"):
        bitbreeze.load_settings(environ={}, ini=tmp_path)
    assert bitbreeze.load_settings(environ={}, ini=tmp_path / "missing")


def test_unknown_names_are_refused_everywhere(tmp_path):
    with pytest.raises(
        bitbreeze.SettingsError, match=r"\[tracker\] in .*wsgi.ini sets 'x'"
    ):
        load(tmp_path, "[tracker]\nx = 1\n")
    with pytest.raises(bitbreeze.SettingsError, match="the environment sets 'x'"):
        load(tmp_path, environ={"TRACKER_X": "1"})


DECLARED = re.findall(
    r"^    (\w+): \w+ = (\S+)  # (.+)$", inspect.getsource(bitbreeze.Settings), re.M
)


def test_every_setting_says_what_it_is():
    assert [name for name, _, _ in DECLARED] == list(bitbreeze.Settings._fields)


@pytest.mark.parametrize(("name", "default", "text"), DECLARED)
def test_readme_has_every_setting(name, default, text):
    shown = {'""': "empty", "[]": "empty", "{}": "empty", "False": "no"}
    default = shown.get(default, default.strip('"'))
    assert f"| `{name}` | {default} | {text} |" in README.read_text()


@pytest.mark.parametrize(
    ("given", "min_interval", "peer_ttl"),
    [
        ({"interval": 1}, 1, 2),
        ({"interval": "2"}, 1, 4),
        ({"interval": 60}, 10, 140),
        ({"interval": 7200}, 1200, 16800),
        ({"interval": 60, "min_interval": 5}, 5, 140),
        ({"interval": 60, "peer_ttl": 600}, 10, 600),
    ],
)
def test_two_settings_follow_from_the_interval(given, min_interval, peer_ttl):
    settings = make_settings(**given)
    assert (settings.min_interval, settings.peer_ttl) == (min_interval, peer_ttl)


def test_a_short_interval_is_told_as_such(tracker):
    client = tracker(interval=1)
    for _ in range(20):
        assert (
            client.announce(1)[b"interval"] == client.announce(1)[b"min interval"] == 1
        )


def test_settings_may_be_paths(tmp_path):
    settings = make_settings(data=tmp_path / "d", torrents=tmp_path / "t")
    assert settings.data == f"{tmp_path}/d" and settings.torrents == f"{tmp_path}/t"


def test_an_isolated_application_reads_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_TITLE", "from the environment")
    for is_isolated, title in ((False, "from the environment"), (True, "BitBreeze")):
        app = bitbreeze.create_app({"data": tmp_path}, isolated=is_isolated)
        assert app.tracker.settings.title == title
    monkeypatch.setenv("TRACKER_TITEL", "x")
    with pytest.raises(bitbreeze.SettingsError, match="Did you mean title"):
        bitbreeze.create_app({"data": tmp_path})
    bitbreeze.create_app({"data": tmp_path}, isolated=True)


@pytest.mark.parametrize("text", ["title = x\n", "[uwsgi]\nport = 1\n", "[Tracker]\n"])
def test_a_file_without_our_section_is_told_the_line(tmp_path, text):
    path = tmp_path / "wsgi.ini"
    path.write_text(text)
    with pytest.raises(bitbreeze.SettingsError) as refusal:
        bitbreeze.load_settings(None, {}, path)
    sentence = f"{path} has no line [tracker]. Add it above the settings"
    assert str(refusal.value) == sentence
    path.write_text("# nothing\n")
    assert bitbreeze.load_settings(None, {}, path) == bitbreeze.Settings()


INI = """[uwsgi]
module = app
%d = 100%
[tracker]
title = Ünser Tracker
interval = 1800
verbose = yes
public_ip = 192.0.2.1, 2001:db8::1
proxy_networks = unix, 10.0.0.0/8
""".encode()


def test_any_accident_to_the_settings_leaves_them_read_or_refused(tmp_path, cases):
    path = tmp_path / "wsgi.ini"
    for _ in range(cases(1500)):
        path.write_bytes(mutated(random, INI))
        try:
            settings = bitbreeze.load_settings(None, {}, path)
        except bitbreeze.SettingsError as error:
            assert "\n" not in str(error).strip() and str(error).encode()
        else:
            assert 0 < settings.min_interval <= settings.interval < settings.peer_ttl
