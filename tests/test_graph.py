"""Graph: a month as a picture that needs no style and no script."""

import re
import xml.etree.ElementTree as ET

import pytest
from conftest import NOW

import app as bitbreeze

HOUR = 3600


def drawn(numbers, now=NOW):
    """Return a graph of samples given as {hours ago: (seeders, leechers)}."""
    samples = [
        bitbreeze.Sample(*numbers[ago], 1, now - ago * HOUR)
        for ago in sorted(numbers, reverse=True)
    ]
    return bitbreeze.month_graph(samples, now)


def test_no_graph_of_fewer_than_two_samples():
    assert drawn({}) == drawn({5: (1, 1)}) == ""


def test_graph_is_svg_without_style_or_script():
    text = drawn({ago: (ago, 744 - ago) for ago in range(744)})
    svg = ET.fromstring(text)
    names = {each.tag.rpartition("}")[2] for each in svg.iter()}
    assert names == {"svg", "title", "desc", "rect", "text", "path", "line"}
    attributes = {name for each in svg.iter() for name in each.attrib}
    assert not [n for n in attributes if n == "style" or n.startswith("on")]
    assert svg.attrib["role"] == "img"
    labels = {each.attrib.get("id") for each in svg}
    assert set(svg.attrib["aria-labelledby"].split()) <= labels
    assert len(text) < 16000


def test_graph_says_its_numbers():
    text = drawn({700: (1200, 0), 40: (7, 3), 0: (40, 2)})
    assert "Seeders: 40 at last, 7 at least, 1,200 at most" in text
    assert "Leechers: 2 at last, 0 at least, 3 at most" in text


@pytest.mark.parametrize(
    ("most", "top"),
    [(0, 2), (1, 2), (3, 4), (9, 10), (11, 12), (25, 30), (199, 200), (1546, 1600)],
)
def test_graph_ends_at_a_round_number(most, top):
    assert f">{top:,}</text>" in drawn({1: (0, 0), 0: (most, 0)})


def test_a_gap_is_a_gap():
    at = {20, 19, 18, 17, 9, 8, 6, 5, 1}  # one hour that is missing is none
    text = drawn(dict.fromkeys(at, (10, 5)))
    lines = re.findall(r'd="M(\d+) (\d+)l([-\d ]+)" stroke', text)
    assert lines == [
        *(
            ("724", "0", "1 0 1 0 1 0"),
            ("735", "0", "1 0 2 0 1 0"),
            ("743", "0", "1 0"),
        ),
        *(("724", "100", "1 0 1 0 1 0"), ("735", "100", "1 0 2 0 1 0")),
        ("743", "100", "1 0"),
    ]


def test_graph_names_mondays():
    # 2027-01-15, a Friday
    dates = re.findall(r'text-anchor="middle">([^<]+)<', drawn({1: (1, 1), 0: (1, 1)}))
    assert dates == ["21 Dec", "28 Dec", "4 Jan", "11 Jan"]


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
