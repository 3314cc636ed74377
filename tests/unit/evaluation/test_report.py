"""The page: whole, self-contained, escaped, and its plots show the figures where they belong."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from edgetool.evaluation.gate import parse_gate
from edgetool.evaluation.plots import Bar, Range, bars, ranges
from edgetool.evaluation.report import report_page
from edgetool.evaluation.results import Measured, MeasuredPerplexity, document
from tests.fakes.evaluated import PROFILE, both, both_perplexities, subjects

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>\"'&"


def full(**changes: Any) -> dict[str, Any]:
    tasks = {"arc_easy": both(), "mmlu": subjects()}
    gate = parse_gate("drop<=1pt; ratio<=1.1")
    return document(PROFILE, {"model": "out"}, {"model": "demo"}, tasks, both_perplexities(), gate, 3.5, 7) | changes


class Page(HTMLParser):
    """Tags that are open at the end, tags and attributes that were seen, and all text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] == "p":
            self.open.pop()
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_is_whole_and_needs_nothing_but_itself() -> None:
    page = report_page(full())
    parsed = Page(page)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "default-src 'none'" in page
    assert not [value for _, attributes in parsed.seen for key, value in attributes.items() if key in ("href", "src")]
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert report_page(full()) == page


def test_the_page_says_what_was_found() -> None:
    text = Page(report_page(full())).text
    for words in (
        "out against demo",
        "Gate failed: drop<=1pt; ratio<=1.1",
        "arc_easy: drop 4.00 pt, at most 1 pt asked",
        "60.00 %",
        "56.00 %",
        "-4.00 pt",
        "mmlu by subject",
        "KL(original || quantised), nats",
        "93.00 % of 80 tokens",
        "arc_easy: 6 lost (right before, wrong now)",
        "arc_easy:0, arc_easy:1",
        "c0ffee",
    ):
        assert words in text, words


def test_one_model_alone_has_a_page_too() -> None:
    alone = {"mmlu": Measured(subjects().quantized)}
    ppl = MeasuredPerplexity(both_perplexities().quantized)
    parsed = Page(report_page(document(PROFILE, {"model": "out"}, None, alone, ppl, None, 1.0, 7)))
    assert parsed.open == []
    assert "Differences" not in parsed.text and "Gate" not in parsed.text and "Flips" not in parsed.text
    assert "mmlu by subject" in parsed.text and "Perplexity" in parsed.text


@pytest.mark.parametrize("place", ["model", "against", "profile", "gate", "task", "metric", "id", "group"])
def test_no_name_can_put_anything_into_the_page(place: str) -> None:
    found = full()
    entry = found["tasks"]["arc_easy"]
    if place in ("model", "against"):
        found[place] = {"model": EVIL}
    elif place == "profile":
        found["profile"] = {"hash": EVIL, EVIL: EVIL}
    elif place == "gate":
        verdict = {"task": EVIL, "clause": EVIL, "passed": False, "reason": EVIL}
        found["gate"] = {"expression": EVIL, "passed": False, "reason": EVIL, "verdicts": [verdict]}
    elif place == "task":
        found["tasks"][EVIL] = entry
    elif place == "metric":
        entry["metric"] = EVIL
    elif place == "id":
        entry["flipped"] = {"lost": [EVIL], "gained": [EVIL]}
    else:
        groups = found["tasks"]["mmlu"]["groups"]
        groups[EVIL] = groups["mmlu_law"]
    page = report_page(found)
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.seen} and parsed.open == []
    assert "alert(1)" in parsed.text
    assert len(drawings(page)) == len(drawings(report_page(full())))


def test_what_is_no_number_is_a_dash() -> None:
    found = full()
    entry = found["tasks"]["perplexity"]
    for key in ("quantized", "ratio", "ratio_ci95", "kl_divergence"):
        entry[key] = None
    entry["sides"]["model"] = dict.fromkeys(entry["sides"]["model"])
    found["tasks"]["arc_easy"]["recovery"] = found["tasks"]["arc_easy"]["mcnemar_p"] = None
    entry["note"] = "the model's outputs are not numbers"
    parsed = Page(report_page(found))
    assert "–" in parsed.text and "not numbers" in parsed.text


def test_every_drawing_is_well_formed_and_stays_on_its_sheet() -> None:
    found = drawings(report_page(full()))
    assert len(found) == 5  # scores, differences, two of perplexity, subjects
    for drawing in found:
        width, height = map(float, drawing.attrib["viewBox"].split()[2:])
        for element in drawing.iter():
            for key, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if key in element.attrib:
                    assert 0 <= float(element.attrib[key]) <= most
            for x in re.findall(r"[MH](-?[\d.]+)", element.attrib.get("d", "")):
                assert 0 <= float(x) <= width


def test_bars_and_whiskers_are_as_long_as_their_values() -> None:
    drawing = ElementTree.fromstring(
        bars("t", [("a", [Bar("model", 50.0, (25.0, 75.0), "x"), Bar("against", None, None, "–")])], " %", 100.0)
    )
    (rectangle,) = drawing.iter(f"{SVG}rect")
    left, width = float(rectangle.attrib["x"]), float(rectangle.attrib["width"])
    whisker = next(one.attrib["d"] for one in drawing.iter(f"{SVG}path") if one.attrib["class"] == "whisker")
    low, high = re.findall(r"^M([\d.]+) [\d.]+H([\d.]+)", whisker)[0]
    assert (float(low) - left, float(high) - left) == (pytest.approx(width / 2), pytest.approx(1.5 * width))
    labels = [one.text for one in drawing.iter(f"{SVG}text")]
    assert {"0 %", "25 %", "50 %", "75 %", "100 %", "a", "x"} <= set(labels)


def test_ranges_lie_around_zero_and_are_coloured_where_they_do_not_hold_it() -> None:
    rows = [
        Range("worse", -4.0, (-6.0, -2.0), ""),
        Range("better", 2.0, (1.0, 3.0), ""),
        Range("same", 1.0, (-1.0, 3.0), ""),
    ]
    drawing = ElementTree.fromstring(ranges("t", rows, " pt"))
    circles = list(drawing.iter(f"{SVG}circle"))
    assert [one.attrib["class"] for one in circles] == ["against", "model", "rule"]
    zero = next(
        float(re.findall(r"M([\d.]+)", one.attrib["d"])[0]) for one in drawing.iter() if one.get("class") == "zero"
    )
    worse, better, same = (float(one.attrib["cx"]) - zero for one in circles)
    assert worse < 0 < same < better
    assert worse == pytest.approx(-2 * better, abs=0.2) and better == pytest.approx(2 * same, abs=0.2)
