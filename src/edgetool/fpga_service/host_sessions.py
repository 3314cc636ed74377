"""What the host does with the frames of one connection of protocol A: plain, or after a hello with the extension.

No sockets: texts come by `take`, and leave by the function that a session was made with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, assert_never

from edgetool import __version__
from edgetool.errors import BadInput
from edgetool.fpga_service import extension, protocol_a, tasks
from edgetool.fpga_service.device import ContextLengthExceeded, Step
from edgetool.fpga_service.extension import ErrorCode, Failed
from edgetool.fpga_service.frames import Frame, ProtocolError
from edgetool.fpga_service.protocol_a import MalformedMessage
from edgetool.fpga_service.work import DeviceFailed, End, Job, QueueFull, Task, Worker


class Session(Protocol):
    """One connection's requests."""

    def take(self, frame: Frame) -> Session:
        """Deal with a frame; returns the session for the next one. Raises ProtocolError to have it closed."""
        ...

    def close(self) -> None:
        """The connection has ended: its requests are given up."""
        ...


class PlainSession:
    """Plain A: a reply for every request, in their order, or the end of the connection.

    Args:
        worker: does the work.
        timeout_s: longest time of one request.
        send: takes the text of a frame, and whether it gets the marker.
        hang_up: closes the connection, for the reason given.
    """

    def __init__(
        self, worker: Worker, timeout_s: float, send: Callable[[str, bool], None], hang_up: Callable[[str], None]
    ) -> None:
        self._worker = worker
        self._timeout_s = timeout_s
        self._send = send
        self._hang_up = hang_up
        self._first = True
        self._jobs: set[Job] = set()

    def take(self, frame: Frame) -> Session:
        request = protocol_a.read_plain(frame.text)
        first, self._first = self._first, False
        if first and request.edgetool is not None:
            if not frame.marked:
                raise ProtocolError("a hello without the marker")
            host = f"edgetool {__version__}"
            self._send(
                protocol_a.write_hello_reply(request.edgetool.nonce, self._worker.facts, host, self._worker.max_queue),
                True,
            )
            return ExtendedSession(self._worker, self._timeout_s, lambda text: self._send(text, True))
        messages = [message.model_dump() for message in request.messages]
        task = tasks.answer(tasks.of_messages(messages), request.options(self._worker.facts), fit=True)
        text: list[str] = []

        def deliver(item: Any) -> None:
            if isinstance(item, Step):
                text.append(item.text)
            elif isinstance(item, End):
                self._jobs.discard(job)
                if item.error is None and item.why is None:
                    self._send("".join(text), frame.marked)
                elif item.why != "cancelled":
                    self._hang_up(str(item.error or item.why))

        try:
            job = self._worker.submit(self, task, deliver, self._timeout_s)
        except QueueFull as error:
            raise ProtocolError(str(error)) from error
        self._jobs.add(job)
        return self

    def close(self) -> None:
        for job in list(self._jobs):
            job.end("cancelled")


class ExtendedSession:
    """The extension: many requests by id.

    Args:
        worker: does the work.
        timeout_s: longest time of one request; one can ask for less.
        send: takes the text of a frame.
    """

    def __init__(self, worker: Worker, timeout_s: float, send: Callable[[str], None]) -> None:
        self._worker = worker
        self._timeout_s = timeout_s
        self._send = send
        self._jobs: dict[int, Job] = {}
        self._last_id = -1

    def take(self, frame: Frame) -> Session:
        if not frame.marked:
            raise ProtocolError("a frame without the marker")
        try:
            request = extension.read_request(frame.text)
        except MalformedMessage as error:
            self._refuse(self._fresh(error.id), str(error))
            return self
        if isinstance(request, extension.Cancel):
            if request.id in self._jobs:
                self._jobs[request.id].end("cancelled")
        elif self._fresh(request.id) is None:
            self._refuse(None, f"the id {request.id} is not above all before it")
        elif isinstance(request, extension.Ping):
            self._last_id = request.id
            self._say(extension.Pong(id=request.id))
        else:
            self._last_id = request.id
            self._start(request)
        return self

    def close(self) -> None:
        for job in list(self._jobs.values()):
            job.end("cancelled")

    def _fresh(self, id: int | None) -> int | None:
        return id if id is not None and id > self._last_id else None

    def _refuse(self, id: int | None, message: str) -> None:
        if id is not None:
            self._last_id = id
        self._say(Failed(id=id, code="bad_request", message=message))

    def _start(self, request: extension.Work) -> None:
        timeout_s = min(request.timeout_s or self._timeout_s, self._timeout_s)
        replies = _Replies(request.id, self._say)

        def deliver(item: Any) -> None:
            if isinstance(item, End):
                del self._jobs[request.id]
            try:
                replies.deliver(item)
            except ValueError as error:  # longer than a frame, or no UTF-8
                replies.answered = True
                self._say(Failed(id=request.id, code="bad_request", message=f"the reply cannot be sent: {error}"))
                job.end("cancelled")

        try:
            self._jobs[request.id] = job = self._worker.submit(self, self._task(request), deliver, timeout_s)
        except BadInput as error:
            self._say(Failed(id=request.id, code="bad_request", message=error.message))
        except QueueFull as error:
            self._say(Failed(id=request.id, code="queue_full", message=str(error)))

    def _task(self, request: extension.Work) -> Task:
        facts = self._worker.facts
        match request:
            case extension.Chat():
                return tasks.answer(tasks.of_messages(_dicts(request.messages)), request.options.resolve(facts))
            case extension.Complete():
                return tasks.answer(tasks.of_prompt(request.prompt), request.options.resolve(facts))
            case extension.Score():
                return tasks.scores(tasks.of_prompt(request.prompt), request.top)
            case extension.Tokenize():
                if request.messages is not None:
                    return tasks.ids(tasks.of_messages(_dicts(request.messages)))
                if request.text is None:
                    raise BadInput("tokenize needs text or messages")
                return tasks.ids(tasks.of_prompt(request.text))
            case _:
                assert_never(request)

    def _say(self, message: extension.Reply) -> None:
        self._send(extension.write(message))


class _Replies:
    """What a job makes, as the messages of one request."""

    def __init__(self, id: int, say: Callable[[extension.Reply], None]) -> None:
        self._id = id
        self._say = say
        self._made = 0
        self._prompt_tokens = 0
        self.answered = False
        """Whether the request has had its last message already."""
        self._finish: Any = None

    def deliver(self, item: Any) -> None:
        match item:
            case tasks.Begun():
                self._prompt_tokens = item.prompt_tokens
                self._say(extension.Started(id=self._id, prompt_tokens=item.prompt_tokens))
            case Step():
                self._say(extension.Token(id=self._id, index=self._made, step=extension.finite(item)))
                self._made += 1
                self._finish = item.finish
            case tasks.ScoresMade():
                self.answered = True
                self._say(extension.Scores(id=self._id, tokens=tuple(map(extension.finite_score, item.tokens))))
            case tasks.IdsMade():
                self.answered = True
                self._say(extension.Tokens(id=self._id, ids=item.ids))
            case End() if not self.answered:
                self._say(self._last(item))

    def _last(self, end: End) -> extension.Reply:
        if isinstance(end.error, ContextLengthExceeded):
            return Failed(
                id=self._id,
                code="context_length_exceeded",
                message=end.error.message,
                prompt_tokens=end.error.prompt_tokens,
                max_tokens=end.error.max_tokens,
                max_context_tokens=end.error.max_context_tokens,
            )
        if end.error is not None:
            code: ErrorCode = "device_failed" if isinstance(end.error, DeviceFailed) else "bad_request"
            return Failed(id=self._id, code=code, message=str(end.error))
        if end.why is not None:
            return Failed(id=self._id, code=end.why, message=_WHY[end.why])
        if self._finish is None:
            return Failed(id=self._id, code="device_failed", message="the device stopped before the answer's end")
        return extension.Done(
            id=self._id,
            finish_reason=self._finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._made,
        )


_WHY = {
    "cancelled": "given up by the gateway",
    "timeout": "not complete in time",
    "shutting_down": "the host is ending",
}


def _dicts(messages: tuple[protocol_a.ChatMessage, ...]) -> list[dict[str, Any]]:
    return [message.model_dump() for message in messages]
