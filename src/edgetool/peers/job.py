"""`edgetool quantize` by whichever backend was asked for: edgetool's own engine, or a tool in its own environment."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from edgetool.artifacts import OutputDirectory, atomic_write, disk_errors, write_manifest
from edgetool.backends.child import run_in
from edgetool.backends.environments import look, recipe_of
from edgetool.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from edgetool.checkpoints.sources import ResolvedSource, resolve_configured
from edgetool.config import CommonConfig, Config, ConvertConfig, EnvsConfig, QuantizeConfig
from edgetool.converter.job import run_convert
from edgetool.errors import MissingDependency, ResourceUnavailable
from edgetool.models.architectures import LayerMap, map_layers
from edgetool.peers.check import check_output, worst
from edgetool.peers.table import PEERS, Peer, check
from edgetool.progress import Progress
from edgetool.progress_lines import size
from edgetool.quantizers.guards import input_hashes, memory_named, need_torch, refuse_quantized
from edgetool.quantizers.prepare import RECORD_SCHEMA, Prepared, calibration_of
from edgetool.runs import available_memory_bytes, memory_peak_bytes, refuse_overlap, stop_requests, tool_versions

_RAW, _CONVERTED, _STAGED, _TOKENS = "backend", "converted", "model", "calibration.json"
_WORST_SHOWN = 5
_INTERPRETER_BYTES = 1_200_000_000
"""What a tool with torch, transformers and datasets takes before it has read a weight, measured for three of them."""


def quantize(config: Config, progress: Progress) -> dict[str, Any]:
    """The result document of one run, {"plan": ...} for a dry run, or {"comparison": ...} for several backends.

    Raises any EdgetoolError; nothing appears at the output's place unless everything was written and verified.
    """
    settings = config.quantize
    if settings.compare is not None:
        from edgetool.peers.compare import run_compare

        return run_compare(config, progress)
    return quantize_by(settings.backend, settings, config.common, config.envs, progress)


def quantize_by(
    backend: str, config: QuantizeConfig, common: CommonConfig, envs: EnvsConfig, progress: Progress
) -> dict[str, Any]:
    """Quantise by one backend."""
    if backend == "native":
        from edgetool.quantizers.job import run_quantize

        return run_quantize(config, common, progress)
    return _run_peer(PEERS[backend], config, common, envs, progress)


def _run_peer(
    peer: Peer, config: QuantizeConfig, common: CommonConfig, envs: EnvsConfig, progress: Progress
) -> dict[str, Any]:
    started = time.monotonic()
    need_torch()
    from edgetool.models.devices import resolve_device

    out = OutputDirectory(config.output, config.overwrite)
    out.check()
    check(config, peer, str(resolve_device(config.device)))  # before a model is fetched for nothing
    source = resolve_configured(config.model, common, config.revision, progress)
    checkpoint = Checkpoint.open(source.path)
    refuse_overlap(out, [source.path, Path(config.model)])
    refuse_quantized(checkpoint)
    prepared = Prepared.of(config, checkpoint)
    plan = _plan(peer, prepared, checkpoint, config, envs)
    if config.dry_run:
        return {"plan": plan}
    with out:
        try:
            with stop_requests() as stop, memory_named("quantising the model"):
                run = _PeerRun(peer, config, common, envs, source, checkpoint, prepared, out.partial, stop, progress)
                manifest = run.manifest(started)
            with disk_errors(out.partial):
                write_manifest(out.partial, manifest)
        except BaseException:
            out.discard()  # a tool keeps nothing that could be gone on with
            raise
        out.publish()
    result = dict(manifest["result"])
    result["output"] = str(config.output)
    return result


def _plan(
    peer: Peer, prepared: Prepared, checkpoint: Checkpoint, config: QuantizeConfig, envs: EnvsConfig
) -> dict[str, Any]:
    """The plan of the engine, with what is different when a tool holds the whole model."""
    recipe = recipe_of(peer.name)
    there = look(recipe, envs)
    if there.state != "ready":
        raise MissingDependency(
            f"backend {peer.name} needs the environment {recipe.name}, which is {there.state}: {there.why}",
            there.remedy,
        )
    source_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
    # the model in float32, or in 16 bits and once more while it is packed; measured: 1.9 to 2.4 times its file
    needed_bytes = _INTERPRETER_BYTES + int(2.5 * source_bytes)
    free_bytes = available_memory_bytes()
    if needed_bytes > free_bytes:
        raise ResourceUnavailable(
            f"{peer.name} holds the whole model: about {size(needed_bytes)} of memory, {size(free_bytes)} are free",
            "use --backend native, which holds one layer",
        )
    plan = {**prepared.plan, "method": peer.method(config.method)}
    plan["memory"] = {"needed_bytes": needed_bytes, "available_bytes": free_bytes}
    del plan["time"]  # known for the engine only
    return {"backend": peer.name, "environment": recipe.name, "python": str(there.python), **plan}


@dataclass(frozen=True)
class _PeerRun:
    """One run in its partial directory, up to a verified checkpoint and its manifest."""

    peer: Peer
    config: QuantizeConfig
    common: CommonConfig
    envs: EnvsConfig
    source: ResolvedSource
    checkpoint: Checkpoint
    prepared: Prepared
    directory: Path
    stop: threading.Event
    progress: Progress

    def manifest(self, started: float) -> dict[str, Any]:
        """Do everything; the returned document goes into edgetool.json."""
        from edgetool.models.streamed import StreamedModel
        from edgetool.quantizers import audit

        self.progress.note("hashing the source")
        hashes = input_hashes(self.checkpoint)
        calibration = calibration_of(
            self.config,
            self.common,
            self.prepared.tokenizer,
            lambda: StreamedModel(self.checkpoint, self.prepared.device, self._compute_dtype()),
            self.directory / _TOKENS,
            self.progress,
            self.stop.is_set,
        )
        tools = self._call(calibration)
        shutil.rmtree(self.directory / _STAGED, ignore_errors=True)
        (self.directory / _TOKENS).unlink()
        self._take_over()
        output = Checkpoint.open(self.directory)
        reports = check_output(
            output,
            self.checkpoint,
            [name.removesuffix(".weight") for name in self._layers().quantizable()],
            self.prepared.spec,
            self.config.format,
            scaled=self.config.method == "awq",
            progress=self.progress,
        )
        original = StreamedModel(self.checkpoint, self.prepared.device, self._compute_dtype())
        smoke = audit.smoke(StreamedModel(output, self.prepared.device, self._compute_dtype()), original, self.progress)
        result = self._result(output, reports, smoke, tools, started)
        return {
            "schema": RECORD_SCHEMA,
            "result": result,
            "source": {"spec": self.source.spec, "provenance": self.source.provenance, "sha256": hashes},
            "calibration": {
                "source": calibration.source,
                "samples": len(calibration.token_ids),
                "seqlen": calibration.token_ids.shape[1],
                "sha256_of_token_ids": calibration.sha256,
            },
            "config": json.loads(self.config.model_dump_json()),
            "seed": self.config.seed,
            "tools": {**tool_versions("torch", "transformers", "numpy"), self.peer.name: tools["version"]},
            "backend": {"name": self.peer.name, **tools},
            "modules": reports,
            "verified": {"tensors": len(output.tensors), "quantized_modules": len(reports)},
            "files": output.sha256(),
        }

    def _layers(self) -> LayerMap:
        return map_layers(self.checkpoint.config, self.checkpoint.tensors)

    def _compute_dtype(self) -> Any:
        from edgetool.models.devices import fast_dtype

        return fast_dtype(self.prepared.device)

    def _call(self, calibration: Any) -> dict[str, Any]:
        """Let the tool quantise into `backend/`; returns the versions that it told."""
        with disk_errors(self.directory):
            atomic_write(self.directory / _TOKENS, json.dumps(calibration.token_ids.tolist()).encode())
        # in the cache, since it has to survive the output when the tool fails
        log = self.common.cache_dir / "logs" / f"quantize-{self.peer.name}-{time.time_ns()}" / "backend.log"
        log.parent.mkdir(parents=True)
        with as_file(files("edgetool.backends.jobs").joinpath(f"{self.peer.script}.py")) as script:
            tools = run_in(
                self.peer.name,
                script,
                self._job(),
                self.envs,
                log=log,
                progress=self.progress,
                env={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stop=self.stop,
            )
        shutil.rmtree(log.parent, ignore_errors=True)
        return tools

    def _job(self) -> dict[str, Any]:
        """See edgetool/backends/jobs/__init__.py."""
        config, device = self.config, str(self.prepared.device)
        default_damp = QuantizeConfig.model_fields["damp"].default
        stored = {"F16": "float16", "BF16": "bfloat16"}[self.prepared.dtype]
        return {
            "model": str(self._model()),
            "output": str(self.directory / _RAW),
            "tokens": str((self.directory / _TOKENS).absolute()),
            "method": config.method,
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": self.prepared.recipe.desc_act,
            "damp": None if config.damp == default_damp else config.damp,
            "lm_head": config.quantize_lm_head,
            "device": device,
            "threads": config.threads,
            "seed": config.seed,
            "layers": self._layers().n_layers,
            # a CPU is slow in float16, and bfloat16 would cost what is not quantised three bits
            "compute_dtype": "float32" if device == "cpu" else stored,
            "stored_dtype": stored,
            "scale_dtype": stored if config.format == "compressed-tensors" else "float16",
        }

    def _model(self) -> Path:
        """The model's directory as transformers 4 understands it too: rope_theta at the top of config.json.

        Transformers 4 reads only that, and without it takes 10000 in silence; version 5 writes `rope_parameters`.
        """
        directory = self.checkpoint.directory.absolute()
        rope = self.checkpoint.config.get("rope_parameters")
        if not isinstance(rope, dict) or "rope_theta" in self.checkpoint.config or "rope_theta" not in rope:
            return directory
        staged = (self.directory / _STAGED).absolute()
        staged.mkdir()
        for path in directory.iterdir():
            if path.is_file() and path.name != CONFIG_NAME:
                (staged / path.name).symlink_to(path.resolve())
        config = {**self.checkpoint.config, "rope_theta": rope["rope_theta"]}
        (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        return staged

    def _take_over(self) -> None:
        """Make of the tool's files a checkpoint of the format that was asked for, verified tensor by tensor.

        Also where the format is the tool's own: names, claims and paths that tools leave in config.json are ours then.
        """
        converted = self.directory / _CONVERTED
        run_convert(
            ConvertConfig(
                source=str(self.directory / _RAW),
                output=converted,
                to=self.config.format,
                verify="all",
                max_shard_size_bytes=self.config.max_shard_size_bytes,
                threads=self.config.threads,
            ),
            self.common,
            self.progress,
        )
        shutil.rmtree(self.directory / _RAW)
        for path in converted.iterdir():
            path.replace(self.directory / path.name)
        converted.rmdir()

    def _result(
        self,
        output: Checkpoint,
        reports: list[dict[str, Any]],
        smoke: dict[str, Any],
        tools: dict[str, Any],
        started: float,
    ) -> dict[str, Any]:
        config = self.config
        degenerate = smoke["degenerate"]
        return {
            "output": str(config.output),
            "model": config.model,
            "backend": self.peer.name,
            "backend_version": tools["version"],
            "method": self.peer.method(config.method),
            "format": config.format,
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": config.sym,
            "desc_act": self.prepared.recipe.desc_act,
            "quantized_modules": len(reports),
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": max(memory_peak_bytes(), int(tools["peak_rss_bytes"])),
            "source_bytes": sum(path.stat().st_size for path in self.checkpoint.weight_files),
            "output_bytes": sum(path.stat().st_size for path in output.weight_files),
            "worst_modules": worst(reports, _WORST_SHOWN),
            "smoke": {"prompt": smoke["prompt"], "text": smoke["text"]},
            "warnings": [f"original and quantised model both generate no language: {degenerate}"] if degenerate else [],
        }
