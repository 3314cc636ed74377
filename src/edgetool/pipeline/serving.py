"""Steps that serve: started, asked one question, and ended; or, with --serve, left running until they are stopped."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgetool.errors import BackendFailed, Stopped
from edgetool.pipeline.asking import ask
from edgetool.pipeline.child import Ended, RunningStep, Said
from edgetool.pipeline.command_line import path_text
from edgetool.pipeline.work import Planned, Work
from edgetool.process.child import describe

_LOOK_S = 0.5
_GONE = {"schema", "api_key", "pid", "engine_pid", "host_pid", "lease", "url", "openai_base_url", "port"}


@dataclass(frozen=True)
class Server:
    """A server that has answered. `address`: its ready document. `key`: what guards it; given: by the user."""

    running: RunningStep
    address: dict[str, Any]
    key: str
    given: bool
    asked: dict[str, Any]

    def ended(self) -> Ended:
        """The step's result: what stays true of it when it runs no more, and its answer."""
        seconds = float(self.address.get("seconds_to_ready") or 0) + float(self.asked["seconds"])
        kept = {key: value for key, value in self.address.items() if key not in _GONE}
        return Ended(0, {**kept, "asked": self.asked}, round(seconds, 3), tuple(self.running.said.warnings))

    def public(self) -> Mapping[str, Any]:
        """What a client needs; the key only where nobody has it yet."""
        names = ("url", "openai_base_url", "pid")
        return {**{name: self.address.get(name) for name in names}, "api_key": None if self.given else self.key}

    def stay(self, work: Work) -> None:
        """Return when a stop is asked for. Raises BackendFailed when the server ends by itself."""
        while not work.stop.wait(_LOOK_S):
            code = self.running.child.wait(0, self.running.said.line)
            if code is not None:
                raise self.running.child.failure(f"step {self.running.said.step.name} ended ({describe(code)})")


@contextlib.contextmanager
def server(work: Work, plan: Planned) -> Iterator[Server]:
    """A server that has answered the step's question; at the end of the block nothing of it runs.

    Raises what it failed with; BackendFailed where it does not answer.
    """
    given = work.settings.common.server_key()
    key = given or secrets.token_urlsafe(24)
    said = Said(plan.step, work.view, work.progress)
    with RunningStep(plan.words, said, work.log_of(plan.step), {"EDGETOOL_API_KEY": key}) as running:
        address = running.wait_ready(work.stop)
        if not isinstance(address.get("openai_base_url"), str):
            raise BackendFailed(f"step {plan.step.name} did not say where it serves")
        try:
            asked = ask(address, key, plan.step.ask, plan.step.ask_tokens)
        except BackendFailed as error:
            if work.stop.is_set():  # whoever asks the run to stop may have ended the server too
                raise Stopped(f"step {plan.step.name} was stopped") from error
            log = path_text(work.log_of(plan.step))
            raise BackendFailed(f"step {plan.step.name}: {error.message}", f"log: {log}") from error
        yield Server(running, address, key, given is not None, asked)


def check(work: Work, plan: Planned) -> Ended:
    """Start it, ask it, end it."""
    with server(work, plan) as one:
        return one.ended()
