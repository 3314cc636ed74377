"""`edgetool bench` against strangers' servers, by typer's own runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tests.fakes.openai_server import Running, Stranger

QUICK = ("--requests", "4", "--rounds", "2", "--concurrency", "1,2", "--prompt-tokens", "20", "--output-tokens", "4")


@pytest.fixture
def bench() -> Callable[..., Any]:
    from edgetool.cli import app

    def invoke(*arguments: str, **env: str) -> Any:
        return CliRunner().invoke(app, ["bench", *arguments], env=env)

    return invoke


def test_the_document_holds_every_level_with_percentiles(bench: Callable[..., Any]) -> None:
    with Running(Stranger(key="geheim")) as server:
        result = bench(f"{server.url}/v1", *QUICK, "--json", EDGETOOL_API_KEY="geheim")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "edgetool.bench/1"
    assert document["endpoints"] == [{"url": server.url, "model": "fake"}]
    assert [found["concurrency"] for found in document["results"]] == [1, 2]
    for found in document["results"]:
        assert (found["requests"], found["failed"], found["output_tokens_mean"]) == (4, 0, 4.0)
        for name in ("ttft_s", "tpot_s", "latency_s"):
            assert set(found[name]) == {"p50", "p90", "p99"}
            assert found[name]["p50"] <= found[name]["p90"] <= found[name]["p99"]
        assert found["output_tokens_per_s"] == pytest.approx(4 * found["requests_per_s"])
    assert "comparison" not in document
    assert "geheim" not in result.stdout


def test_people_get_a_table(bench: Callable[..., Any]) -> None:
    with Running(Stranger()) as server:
        result = bench(server.url, *QUICK)
    assert result.exit_code == 0
    assert "TTFT ms p50" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.startswith(server.url)]) == 2


def test_two_endpoints_are_compared_and_drawn(bench: Callable[..., Any], tmp_path: Path) -> None:
    plot = tmp_path / "figures.svg"
    with Running(Stranger(key="a")) as one, Running(Stranger(key="b", models=("other",))) as two:
        result = bench(
            one.url, "--against", two.url, *QUICK, "--json", "--plot", str(plot),
            EDGETOOL_API_KEY="a", EDGETOOL_BENCH_AGAINST_KEY="b",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [found["model"] for found in document["results"]] == ["fake", "other", "fake", "other"]
    for compared in document["comparison"]:
        ratio = compared["output_tokens_per_s"]
        assert ratio["lowest"] <= ratio["ratio"] <= ratio["highest"]
        assert compared["rounds"] == 2
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert document["plot"] == str(plot)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "needs URL"),
        (("http://127.0.0.1:9",), 6, "nothing answers"),
        (("ftp://x",), 3, "not an address"),
        (("URL", "--concurrency", "0"), 3, "concurrency"),
        (("URL", "--concurrency", "two"), 3, "concurrency"),
        (("URL", "--concurrency", ""), 3, "concurrency"),
        (("URL", "--output-tokens", "1"), 3, "at least 2"),
        (("URL", "--model", "other"), 4, "it serves fake"),
        (("URL", "--plot", "/nowhere/at/all.svg"), 4, "no directory"),
        (("URL", "--against", "http://127.0.0.1:9"), 6, "nothing answers at http://127.0.0.1:9"),
    ],
)
def test_what_is_wrong_is_said_with_its_exit_code(
    bench: Callable[..., Any], arguments: tuple[str, ...], code: int, said: str
) -> None:
    with Running(Stranger()) as server:
        result = bench(*[server.url if argument == "URL" else argument for argument in arguments])
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_refused_key_is_a_setting_that_is_wrong(bench: Callable[..., Any]) -> None:
    with Running(Stranger(key="right")) as server:
        result = bench(server.url, *QUICK, "--json", "--api-key", "wrong")
    assert result.exit_code == 3
    assert "wrong" not in result.stdout.replace("what was wrong", "")
