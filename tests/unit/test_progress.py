"""Progress that goes to several places, and rows of steps on a terminal."""

from __future__ import annotations

import pytest

from edgetool import console
from edgetool.progress import RecordingProgress, TeeProgress


def test_a_tee_says_everything_to_all() -> None:
    one, two = RecordingProgress(), RecordingProgress()
    tee = TeeProgress(one, two)
    tee.note("a note")
    tee.warn("a warning")
    with tee.task("solve", 2, "layer") as task:
        task.advance(1, "first")
    with tee.steps(["a"]) as steps:
        steps.state("a", "running")
        steps.advance("a", "inner", 1, 2)
    assert one.events == two.events
    assert [kind for kind, _, _ in one.events] == ["note", "warn", "start", "advance", "end", "running", "advance"]


def test_a_task_that_fails_fails_everywhere() -> None:
    one = RecordingProgress()
    with pytest.raises(KeyError), TeeProgress(one).task("solve", 2):
        raise KeyError
    assert ("end", "solve", 2) not in one.events


def test_steps_are_rows_with_their_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with console.progress("bar") as bars, bars.steps(["quantize", "eval", "image"]) as steps:
        steps.state("quantize", "running")
        steps.advance("quantize", "layers", 3, 30, "layer", "layer 2 done")
        steps.state("quantize", "done")
        steps.state("eval", "running")
        steps.advance("eval", "perplexity", 3, 8, "window")
    first, second, third = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "quantize" in first and "done" in first and "layer" not in first
    assert "eval" in second and "3 of 8 windows" in second and "perplexity" in second
    assert "image" in third and "waiting" in third


def test_a_bar_whose_steps_were_done_in_parts_is_full_at_the_end() -> None:
    from edgetool.console import _BarProgress

    with _BarProgress() as progress:
        with progress.task("quantise", 30) as task:
            for _ in range(149):
                task.advance(0.2)
            assert not progress._bars.tasks[0].finished
            task.advance(0.2)
        assert progress._bars.tasks[0].finished
