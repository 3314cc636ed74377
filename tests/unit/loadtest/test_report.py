"""Figures from samples made by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from edgetool.loadtest.client import Sample, Target
from edgetool.loadtest.plot import svg
from edgetool.loadtest.report import percentile, report
from edgetool.loadtest.run import Measured, Round


def sample(latency_s: float, tokens: int = 10, error: str | None = None) -> Sample:
    if error:
        return Sample(latency_s, None, None, None, 0, False, error)
    return Sample(latency_s, latency_s / 10, latency_s / 100, 32, tokens, True)


TARGETS = (Target("http://a", "m", None, "chat"), Target("http://b", "m", None, "chat"))


def two_endpoints() -> Measured:
    rounds = (
        Round(0, 1, 2.0, (sample(1.0), sample(1.0))),
        Round(1, 1, 1.0, (sample(0.5), sample(0.5))),
        Round(1, 1, 4.0, (sample(2.0), sample(2.0))),
        Round(0, 1, 2.0, (sample(1.0), sample(1.0, error="cut"))),
    )
    return Measured(TARGETS, rounds, ("a warning",))


@pytest.mark.parametrize("rank", [1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_nearest_ranks_as_numpy_has_them(rank, count):
    values = list(np.random.default_rng(count).random(count))
    assert percentile(values, rank) == np.percentile(values, rank, method="inverted_cdf")


def test_no_values_have_no_percentile():
    assert percentile([], 50) is None


def test_rates_count_good_requests_over_the_time_of_all_rounds():
    first, second = report(two_endpoints())["results"]
    assert (first["requests"], first["failed"], first["wall_s"]) == (4, 1, 4.0)
    assert first["requests_per_s"] == 3 / 4
    assert first["output_tokens_per_s"] == 30 / 4
    assert first["latency_s"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert second["latency_s"] == {"p50": 0.5, "p90": 2.0, "p99": 2.0}
    assert second["ttft_s"]["p50"] == 0.05
    assert second["prompt_tokens_mean"] == 32


def test_endpoints_are_compared_round_by_round():
    compared = report(two_endpoints())["comparison"]
    # round 1: 20 tokens in 2 s against 20 in 1 s; round 2: 10 (one failed) in 2 s against 20 in 4 s
    assert compared == [
        {
            "concurrency": 1,
            "rounds": 2,
            "output_tokens_per_s": {"ratio": 1.5, "lowest": 1.0, "highest": 2.0},
            "ttft_s_p50": {"ratio": 1.25, "lowest": 0.5, "highest": 2.0},
            "tpot_s_p50": {"ratio": 1.25, "lowest": 0.5, "highest": 2.0},
            "latency_s_p50": {"ratio": 1.25, "lowest": 0.5, "highest": 2.0},
        }
    ]


def test_one_endpoint_is_compared_with_nothing():
    document = report(Measured(TARGETS[:1], (Round(0, 1, 1.0, (sample(1.0),)),), ()))
    assert "comparison" not in document


def test_the_plot_is_well_formed_and_holds_a_line_for_each_endpoint_in_each_panel():
    root = ElementTree.fromstring(svg(report(two_endpoints())))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 4
    texts = [element.text for element in root.findall(f"{space}text")]
    assert "m at http://a" in texts
    assert "m at http://b" in texts


def test_names_in_the_plot_cannot_break_it():
    target = Target("http://a", "<m & 'n'>", None, "chat")
    drawn = svg(report(Measured((target,), (Round(0, 1, 1.0, (sample(1.0),)),), ())))
    assert "<m & 'n'> at http://a" in [element.text for element in ElementTree.fromstring(drawn).iter()]
