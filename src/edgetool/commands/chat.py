"""`edgetool chat`: talk to a model in the terminal, behind an OpenAI API or out of an image."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetool.commands import _board_options as b
from edgetool.commands import _options as o
from edgetool.commands._run import run
from edgetool.errors import UsageError

Option = typer.Option


@o.with_common
def chat(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="Address of an OpenAI endpoint, with or without /v1.")
    ] = None,
    image: b.Image = None,
    api_key: o.ApiKey = None,
    model: Annotated[
        str | None, Option("--model", metavar="NAME", help="Model to ask for [default: the only one served].")
    ] = None,
    message: Annotated[
        str | None, Option("--message", "-m", metavar="TEXT", help="One question; print its answer and stop.")
    ] = None,
    system: Annotated[
        str | None, Option("--system", metavar="TEXT", help="What the model is told before the first question.")
    ] = None,
    temperature: Annotated[
        float | None,
        Option("--temperature", metavar="X", help="How freely tokens are drawn [default: left to the server]."),
    ] = None,
    top_p: Annotated[
        float | None,
        Option("--top-p", metavar="X", help="Draw among the likeliest of this share [default: left to the server]."),
    ] = None,
    max_tokens: Annotated[
        int | None, Option("--max-tokens", metavar="N", help="Longest answer [default: what the context holds].")
    ] = None,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="Seed of the drawing.")] = None,
    timeout_s: Annotated[
        str | None, Option("--timeout", metavar="TIME", help="Longest wait for the next word [default: 600].")
    ] = None,
    numerics: b.Numerics = None,
    device: b.Device = None,
    threads: o.Threads = None,
) -> None:
    """Talk to a model in the terminal.

    Answers come as they are written, with tokens per second. /new begins again, /quit or Ctrl-D leaves, and Ctrl-C
    stops an answer. With --message one question is asked, whose answer is all that stands on stdout.
    """
    with run(ctx) as this:
        settings = this.config.chat
        if settings.url is None and settings.image is None:
            raise UsageError("chat needs URL or --image", "edgetool chat http://127.0.0.1:7000")
        if settings.message is None and this.output.json:
            raise UsageError("--json is for one question", "add --message TEXT")
        from edgetool import chat_client

        with chat_client.open_talker(settings, this.config.common.server_key(), this.progress) as talker:
            this.live.close()  # from here on the terminal is the conversation's
            if settings.message is None:
                chat_client.converse(talker, settings, this.output.spoken)
            elif this.output.json:
                this.result(chat_client.ask_once(talker, settings, None), [])
            else:
                chat_client.ask_once(talker, settings, this.output.spoken)
