"""How a request to the host of a board can end without its answer."""

from __future__ import annotations

from edgetool.errors import BackendFailed, BadInput, EdgetoolError, ResourceUnavailable
from edgetool.fpga_service.device import ContextLengthExceeded
from edgetool.fpga_service.extension import Failed


class HostAway(ResourceUnavailable):
    """There is no connection to the host, or it broke while the request was under way."""


class HostBusy(ResourceUnavailable):
    """The host's queue is full."""


class TimedOut(ResourceUnavailable):
    """The answer was not complete within the request's time."""


class HostFailed(BackendFailed):
    """The host's device failed, or what the host said is no reply."""


class RequestRefused(BadInput):
    """The host cannot do what was asked."""


def of_reply(failed: Failed) -> EdgetoolError:
    """The error that an error frame stands for."""
    match failed.code:
        case "context_length_exceeded" if failed.prompt_tokens is not None and failed.max_context_tokens is not None:
            return ContextLengthExceeded(failed.prompt_tokens, failed.max_tokens, failed.max_context_tokens)
        case "bad_request" | "context_length_exceeded":
            return RequestRefused(failed.message)
        case "queue_full":
            return HostBusy(failed.message, "ask again in a moment")
        case "timeout":
            return TimedOut(failed.message)
        case "shutting_down":
            return HostAway(failed.message)
        case _:
            return HostFailed(failed.message)
