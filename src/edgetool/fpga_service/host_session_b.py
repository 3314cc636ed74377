"""What the host does with the commands of one connection of protocol B. No sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from edgetool.errors import BadInput
from edgetool.fpga_service import protocol_b as b
from edgetool.fpga_service import tasks
from edgetool.fpga_service.device import GenerateOptions, Step
from edgetool.fpga_service.frames import ProtocolError
from edgetool.fpga_service.work import End, Job, QueueFull, Worker

_ONE_ID = ("rmod", "rmd4")
_MOST_WAITING = 64


class SessionB:
    """Commands one after another, each answered before the next is begun.

    Args:
        worker: does the work.
        timeout_s: longest time of one command.
        send: takes bytes.
        hang_up: closes the connection, for the reason given.
    """

    def __init__(
        self, worker: Worker, timeout_s: float, send: Callable[[bytes], None], hang_up: Callable[[str], None]
    ) -> None:
        self._worker = worker
        self._timeout_s = timeout_s
        self._send = send
        self._hang_up = hang_up
        self._waiting: deque[b.Command] = deque()
        self._job: Job | None = None
        self._sequence: list[int] = []
        """Prompt and answer of the last command."""

    def take(self, command: b.Command) -> None:
        """Have a command done. Raises ProtocolError to have the connection closed."""
        vocabulary = self._worker.facts.vocab
        if not command.wide and vocabulary > b.LARGEST_U16_VOCABULARY:
            raise ProtocolError(f"{command.operation}: ids of a vocabulary of {vocabulary} are no u16; see hel4")
        if len(self._waiting) >= _MOST_WAITING:
            raise ProtocolError(f"more than {_MOST_WAITING} commands at once")
        self._waiting.append(command)
        self._go_on()

    def close(self) -> None:
        """The connection has ended."""
        self._waiting.clear()
        if self._job is not None:
            self._job.end("cancelled")

    def _go_on(self) -> None:
        while self._waiting and self._job is None:
            command = self._waiting.popleft()
            if command.operation == "hel4":
                self._send(b.hello_frame(self._worker.facts))
                continue
            try:
                self._start(command, self._prompt(command))
            except (BadInput, QueueFull) as error:
                self._refuse(command, str(error))

    def _start(self, command: b.Command, prompt: list[int]) -> None:
        one = command.operation in _ONE_ID
        reply = _OneId(self._send, command.wide) if one else _Ids(self._send, command)
        options = GenerateOptions(max_tokens=_limit(command), temperature=0.0, ignore_eos=one)

        def deliver(item: Any) -> None:
            if isinstance(item, Step):
                reply.add(item)
            elif isinstance(item, End):
                self._job = None
                if item.error is None and item.why is None:
                    self._sequence = prompt if one else prompt + reply.ids
                    reply.end()
                elif item.why != "cancelled":
                    self._refuse(command, str(item.error or item.why))
                self._go_on()

        task = tasks.answer(tasks.of_prompt(prompt), options, fit=True)
        self._job = self._worker.submit(self, task, deliver, self._timeout_s)

    def _prompt(self, command: b.Command) -> list[int]:
        """The ids to go on from. Raises BadInput."""
        count, came = command.parameters[0], len(command.ids)
        go_on = command.parameters[1 if command.operation in _ONE_ID else 2]
        kept = self._sequence if go_on else []
        new = count - len(kept) if command.operation in _ONE_ID else count
        if not 0 < new <= came:
            raise BadInput(f"{count} ids were announced, {len(kept)} are known, and {came} came")
        return [*kept, *command.ids[:new]]

    def _refuse(self, command: b.Command, why: str) -> None:
        if command.wide:
            self._send(b.error_frame(why))
        else:
            self._waiting.clear()
            self._hang_up(f"{command.operation}: {why}")


def _limit(command: b.Command) -> int | None:
    """Most ids of the answer; None: as many as the context holds."""
    if command.operation in _ONE_ID:
        return 1
    if command.wide:
        return command.parameters[1] or None
    return b.most_ids(wide=False) if command.operation == "rkvc" else None  # its reply is one frame


class _OneId:
    """The reply of `rmod`: the next id."""

    def __init__(self, send: Callable[[bytes], None], wide: bool) -> None:
        self._send = send
        self._wide = wide
        self.ids: list[int] = []

    def add(self, step: Step) -> None:
        self.ids.append(step.id)

    def end(self) -> None:
        self._send(b.id_frame(self.ids[0], wide=self._wide))


class _Ids:
    """The reply of the others: ids as they come, or all at the end; then a frame 0."""

    def __init__(self, send: Callable[[bytes], None], command: b.Command) -> None:
        self._send = send
        self._wide = command.wide
        self._streamed = command.operation in ("rkvs", "rks4")
        self._sent = 0
        self.ids: list[int] = []

    def add(self, step: Step) -> None:
        self.ids.append(step.id)
        if self._streamed and len(self.ids) - self._sent == b.IDS_A_FRAME:
            self._flush()

    def end(self) -> None:
        self._flush()
        self._send(b.ids_frame((), wide=self._wide))

    def _flush(self) -> None:
        for frame in b.split(self.ids[self._sent :], wide=self._wide):
            self._send(frame)
        self._sent = len(self.ids)
