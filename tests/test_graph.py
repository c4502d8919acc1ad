"""Graph: the seeders and leechers of a month, without style or script."""

import re
import xml.etree.ElementTree as ET

import pytest
from conftest import NOW

import app as bitbreeze


def drawn(numbers, now=NOW):
    """Return a graph of samples given as {hours ago: (seeders, leechers)}."""
    hours = sorted(numbers, reverse=True)
    history = [[now // 3600 - hour, *numbers[hour], 1] for hour in hours]
    return bitbreeze.month_graph(history, now)


def test_fewer_than_two_samples_are_no_graph():
    assert drawn({}) == drawn({5: (1, 1)}) == ""


def test_graph_is_svg_without_style_or_script():
    text = drawn({ago: (ago, 744 - ago) for ago in range(744)})
    svg = ET.fromstring(text)
    names = {each.tag for each in svg.iter()}
    assert names == {"svg", "title", "desc", "rect", "text", "path"}
    attributes = {name for each in svg.iter() for name in each.attrib}
    assert not [n for n in attributes if n == "style" or n.startswith("on")]
    assert svg.attrib["role"] == "img"
    labels = {each.attrib.get("id") for each in svg}
    assert set(svg.attrib["aria-labelledby"].split()) <= labels
    assert len(text) < 16000


def test_graph_says_its_numbers():
    text = drawn({700: (1200, 0), 40: (7, 3), 0: (40, 2)})
    assert "40 seeders now, 7 to 1,200. 2 leechers now, 0 to 3." in text
    for label in ("seeders 40", "leechers 2", "1,200"):
        assert f">{label}</text>" in text


def test_a_gap_is_a_gap():
    at = {20, 19, 18, 17, 9, 8, 6, 5, 1}  # one hour that is missing is none
    text = drawn({hour: (10, hour // 4) for hour in at})
    seeders, leechers = re.findall(r'd="([^"]+)" stroke="#', text)
    assert seeders == "M724 0h0L725 0L726 0L727 0M735 0h0L736 0L738 0L739 0M743 0h0"
    assert leechers.startswith("M724 100h0L725 120L726 120L727 120M735 160h0")


def test_a_graph_of_nothing_is_at_the_bottom():
    paths = re.findall(r'd="([^"]+)" stroke="#', drawn({1: (0, 0), 0: (0, 0)}))
    assert paths == ["M743 200h0L744 200"] * 2


@pytest.mark.parametrize("second", [0, 86399])
def test_graph_has_dates_where_days_begin(second):
    day = NOW // 86400 * 86400  # 2027-01-15
    text = drawn({1: (1, 1), 0: (1, 1)}, day + second)
    labels = re.findall(r'<text x="([\d.]+)%" [^>]+middle">([^<]+)<', text)
    assert [date for _, date in labels] == ["19 Dec", "26 Dec", "2 Jan", "9 Jan"]
    ago = [(100 - float(x)) / 100 * 31 * 86400 for x, _ in labels]
    expected = [days * 86400 + second for days in (27, 20, 13, 6)]
    assert ago == pytest.approx(expected, abs=7200)


def contrast(colour, other):
    def luminance(text):
        parts = [int(text[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [
            p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(colour), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#121212", "#1c1b22"])
def test_colours_can_be_seen(background):
    for colour in set(re.findall("#[0-9a-f]{6}", drawn({1: (1, 1), 0: (1, 1)}))):
        assert contrast(colour, background) >= 3
