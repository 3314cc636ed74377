"""Lines for log files and programs: what is said, how often, and that silence never looks like a hang."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest

from edgetool.progress_lines import JsonProgress, Meter, PlainProgress, count, duration, size


def test_a_task_that_goes_on_quietly_beats() -> None:
    stream = io.StringIO()
    lines = PlainProgress(stream, heartbeat_s=0.05)
    with lines.task("solve", 3, "layer") as task:
        task.advance(1, "model.layers.0")
        before = len(stream.getvalue().splitlines())  # a beat that came before the layer was done tells of none

        def beats() -> list[str]:
            return [line for line in stream.getvalue().splitlines()[before:] if "still running" in line]

        deadline = time.monotonic() + 60
        while len(beats()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lines.close()
    assert all("solve: 1 of 3 layers" in beat and "(model.layers.0)" in beat and "left" in beat for beat in beats())


def test_no_heartbeat_after_the_work() -> None:
    stream = io.StringIO()
    lines = PlainProgress(stream, heartbeat_s=0.05)
    with lines.task("solve", 1):
        pass
    time.sleep(0.2)
    lines.close()
    assert "done in" in stream.getvalue().splitlines()[-1]


def test_a_heartbeat_that_is_under_way_when_the_work_ends_comes_before_the_word_on_its_end() -> None:
    beating, ended = threading.Event(), threading.Event()

    class Slow(PlainProgress):
        def _task_line(self, event: str, meter: Meter) -> str:
            if event == "heartbeat":
                beating.set()
                ended.wait(0.2)  # the end would be said now, were it not made to wait
            return super()._task_line(event, meter)

    stream = io.StringIO()
    lines = Slow(stream, heartbeat_s=0.05)
    with lines.task("solve", 1):
        assert beating.wait(60)
    ended.set()
    lines.close()
    assert "done in" in stream.getvalue().splitlines()[-1]


def test_many_small_steps_are_few_lines() -> None:
    stream = io.StringIO()
    lines = PlainProgress(stream, interval_s=60)
    with lines.task("read", 10_000, "B") as task:
        for _ in range(10_000):
            task.advance(1)
    lines.close()
    assert len(stream.getvalue().splitlines()) == 2  # started, done


def test_a_task_that_fails_is_not_called_done() -> None:
    stream = io.StringIO()
    lines = JsonProgress(stream, interval_s=3600, heartbeat_s=3600)
    with pytest.raises(RuntimeError), lines.task("solve", 3) as task:
        task.advance(2)
        raise RuntimeError
    lines.close()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "stopped"]
    assert (events[1]["done"], events[1]["total"]) == (2, 3)


def test_messages_stay_on_one_line() -> None:
    stream = io.StringIO()
    PlainProgress(stream).note("two\nlines")
    assert len(stream.getvalue().splitlines()) == 1


def test_a_reader_who_went_away_does_not_stop_the_job() -> None:
    stream = io.StringIO()
    lines = PlainProgress(stream)
    stream.close()
    lines.note("nobody hears this")


def test_quantities_read_naturally() -> None:
    assert count(3, 30, "layer") == "3 of 30 layers"
    assert count(0, 1, "layer") == "0 of 1 layer"
    assert count(12_000_000, 98_400_000, "B") == "12.0 MB of 98.4 MB"
    assert [size(n) for n in (999, 1000, 5e9, 2e12)] == ["999 B", "1.0 kB", "5.0 GB", "2.0 TB"]
    assert [duration(s) for s in (0.25, 41.4, 360, 7560)] == ["0.2 s", "41 s", "6 min", "2.1 h"]


def test_steps_of_an_earlier_run_do_not_make_this_one_look_fast() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, interval_s=0.0).task("quantise", 30, "layer", 20) as task:
        time.sleep(0.2)
        task.advance()
    said = next(line for line in stream.getvalue().splitlines() if "21 of 30" in line)
    # one layer took 0.2 s or more, so nine take 1.8 s or more; with 21 counted as this run's own it would be 0.09 s
    assert float(said.split("about ")[1].split(" s left")[0]) > 1


def test_steps_are_lines_with_their_state_and_their_own_tasks() -> None:
    stream = io.StringIO()
    lines = PlainProgress(stream)
    with lines.steps(["quantize", "eval"]) as steps:
        steps.state("quantize", "running", "going on")
        steps.advance("quantize", "layers", 3, 30, "layer", "layer 2 done")
        steps.state("quantize", "done")
    said = [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]
    assert said == [
        "quantize: running (going on)",
        "quantize: layers: 3 of 30 layers (layer 2 done)",
        "quantize: done",
    ]


def test_steps_as_json_name_themselves_in_every_event() -> None:
    stream = io.StringIO()
    lines = JsonProgress(stream)
    with lines.steps(["quantize"]) as steps:
        steps.state("quantize", "running")
        steps.advance("quantize", "layers", 3, 30, "layer")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["step"], first["state"], first["note"]) == ("step", "quantize", "running", None)
    assert (second["event"], second["step"], second["task"]) == ("progress", "quantize", "layers")
    assert (second["done"], second["total"], second["unit"]) == (3, 30, "layer")
