"""The command table and the error boundary: every failure leaves through here with its exit code."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from edgetool import __version__, console, messages
from edgetool.commands import (
    bench,
    chat,
    compile_vcu128,
    completion,
    convert,
    demo,
    envs,
    eval,
    fpga_host,
    gpus,
    inspect,
    jobs,
    quantize,
    run,
    serve_fpga,
    serve_gpu,
)
from edgetool.commands._options import Lang
from edgetool.commands._run import schema_of
from edgetool.config_sources import json_wanted
from edgetool.errors import EdgetoolError, ReaderGone, Stopped, Terminated
from edgetool.messages import choice

INTERRUPTED = 130


class EdgetoolGroup(TyperGroup):
    """Runs a command and turns each way it can fail into words, a JSON document and an exit code.

    The boundary is in `invoke`, so that `typer.testing.CliRunner` sees the same as a shell does.
    """

    _arguments: tuple[str, ...] = ()

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Choose the language first: help and usage errors come before any option is known."""
        messages.use(choice.asked(args, os.environ))
        if messages.language() != messages.ENGLISH:
            from edgetool.commands._help import translate

            translate(self)
        with _errors_translated():
            return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the command line as typed: `--json` must be known before the options are parsed."""
        self._arguments = tuple(args)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, and answer for what stdout has not taken: help and versions are typer's to print."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _printed_by_typer(error):
                raise
            failure = console.unwritable(error)
            console.Output("", as_json=False).error(failure)
            raise SystemExit(failure.exit_code) from error
        except SystemExit as leaving:
            if isinstance(leaving.__context__, BrokenPipeError):  # typer gives it the exit code of a bug
                raise SystemExit(ReaderGone.exit_code) from None
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with the exit code of docs/exit-codes.md, after a known failure.
            Exception: a bug, as it is, so that its traceback is shown.
        """
        output = ctx.obj = _output(self._arguments)
        try:
            with _sigterm_raises(), _errors_translated():
                return super().invoke(ctx)
        except ReaderGone as error:
            raise typer.Exit(error.exit_code) from error
        except EdgetoolError as error:
            if isinstance(error, Stopped) and error.hint is None:
                error.hint = _again(self._arguments)
            output.error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            output.failure("Interrupted", "interrupted (SIGINT)", None, INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from error
        except Terminated as error:
            output.failure("Terminated", "terminated (SIGTERM)", None, error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if output.json:
                _document(output, error)
            raise


@contextlib.contextmanager
def _errors_translated() -> Iterator[None]:
    """What typer is going to put in words, in the language that is spoken."""
    try:
        yield
    except Exception as error:
        if messages.language() != messages.ENGLISH:
            from edgetool.commands._help import translate_error

            translate_error(error)
        raise


def _printed_by_typer(error: OSError) -> bool:
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    return innermost is not None and innermost.tb_frame.f_code is typer.echo.__code__


def _document(output: console.Output, error: Exception) -> None:
    """The JSON document of a failure that typer (usage) or the interpreter (a bug: its traceback) puts in words."""
    say = getattr(error, "format_message", None)
    if callable(say):
        where = getattr(error, "ctx", None)
        output.schema = output.schema if where is None else schema_of(where)
        output.failure("UsageError", str(say()), None, int(getattr(error, "exit_code", 2)), say=False)
    else:
        output.failure("Bug", f"{type(error).__name__}: {error}", "the traceback is on stderr", 1, say=False)


def _output(arguments: tuple[str, ...]) -> console.Output:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    output = console.Output("edgetool.failure/1", "--json" in options or json_wanted(os.environ))
    output.arguments = arguments
    for position, argument in enumerate(options):
        if argument == "--progress=json" or options[position : position + 2] == ("--progress", "json"):
            output.progress_mode = "json"
    return output


def _again(arguments: tuple[str, ...]) -> str:
    # --overwrite stays: beside --resume it no longer starts again, but an old output is still to be replaced
    kept = [argument for argument in arguments if argument != "--resume"]
    end = kept.index("--") if "--" in kept else len(kept)
    return shlex.join(["edgetool", *kept[:end], "--resume", *kept[end:]])


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that locks and children are given back."""

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgetool {__version__}")
        raise typer.Exit()


# Plain help: it answers in a third of the time of the boxed one, and nothing in it is cut to the terminal's width.
app = typer.Typer(
    name="edgetool",
    cls=EdgetoolGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=False,  # typer's own knows no values, and splits quoted words: edgetool/completion
)


@app.callback()
def edgetool(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
    lang: Lang = None,
) -> None:
    """From published weights to the edge: quantise, convert, evaluate, serve on GPUs, compile for a VCU128 board."""


app.command("quantize")(quantize.quantize)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("demo")(demo.demo)
app.command("compile-vcu128")(compile_vcu128.compile_vcu128)
app.add_typer(envs.app, name="envs")
app.add_typer(gpus.app, name="gpus")
app.command("serve-gpu")(serve_gpu.serve_gpu)
app.command("bench")(bench.bench)
app.command("eval")(eval.eval)
app.command("serve-fpga")(serve_fpga.serve_fpga)
app.command("fpga-host")(fpga_host.fpga_host)
app.command("chat")(chat.chat)
app.command("run")(run.run_recipe)
app.add_typer(jobs.app, name="jobs")
app.command("completion")(completion.completion)


def complete(arguments: Sequence[str]) -> None:
    """Answer the script of a shell, `edgetool _complete SHELL -- WORDS`: see edgetool/completion.

    This is no command of typer's: parsing alone would take longer than the answer, and a shell waits for it. Whatever
    goes wrong, a line that is being typed is left alone.
    """
    with contextlib.suppress(Exception):
        from edgetool.completion.replies import reply

        shell, _, *words = arguments
        sys.stdout.write(reply(shell, typer.main.get_command(app), words))
