"""Snapshots of model repositories on the Hugging Face hub and on ModelScope, both through optional packages."""

from __future__ import annotations

from pathlib import Path

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable
from edgetool.progress import Progress

_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*", "README.md"]
# the same weights a second time: Mistral's and Llama's own formats, exports of other runtimes
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "*/*"]
_INSTALL = "pip install 'edgetool[hub]'"


def fetch_huggingface(
    name: str, revision: str | None, token: str | None, offline: bool, progress: Progress
) -> tuple[Path, str]:
    """Directory and commit of a snapshot in the hub library's own cache. An interrupted download is taken up again.

    Raises BadInput for a repository or revision that is not there, closed, or without safetensors weights;
    ResourceUnavailable when the hub cannot be reached or `offline` (or HF_HUB_OFFLINE) is set and the snapshot is not
    in the cache, or the disk is full; MissingDependency without huggingface_hub.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise MissingDependency(f"hf:{name} needs the package huggingface_hub", _INSTALL) from None
    progress.note(f"fetching hf:{name}" if not offline else f"looking for hf:{name} in the local cache")
    try:
        with disk_errors(Path(constants.HF_HUB_CACHE)):
            path = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=offline,
            )
    except errors.GatedRepoError as error:
        raise BadInput(
            f"hf:{name} is gated: its licence must be accepted first",
            f"https://huggingface.co/{name}, then: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"hf:{name}: no such repository, or it is private", "check the name, or: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"hf:{name}: no revision {revision!r}", "check --revision") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ResourceUnavailable(
            f"hf:{name} is not in the local cache and the hub cannot be asked (offline, or no connection)",
            f"with a connection: hf download {name}; or set HF_ENDPOINT to a mirror",
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        raise ResourceUnavailable(f"hf:{name}: the hub cannot be reached: {error}", "run again: it resumes") from error
    return _with_weights(Path(path), f"hf:{name}"), Path(path).name


def fetch_modelscope(
    name: str, revision: str | None, token: str | None, offline: bool, progress: Progress
) -> tuple[Path, str]:
    """Directory and revision of a snapshot in ModelScope's own cache. Raises as fetch_huggingface does."""
    try:
        from modelscope import HubApi, snapshot_download
    except ImportError:
        raise MissingDependency(f"ms:{name} needs the package modelscope", _INSTALL) from None
    progress.note(f"fetching ms:{name}" if not offline else f"looking for ms:{name} in the local cache")
    try:
        with disk_errors(Path.home()):
            if token:
                HubApi().login(token)
            path = snapshot_download(
                name,
                revision=revision,
                allow_file_pattern=_WANTED,
                ignore_file_pattern=_UNWANTED,
                local_files_only=offline,
            )
    except (BadInput, ResourceUnavailable):
        raise
    except Exception as error:  # its exceptions changed module and base class between releases
        if offline:
            raise ResourceUnavailable(
                f"ms:{name} is not in the local cache and may not be fetched offline",
                f"with a connection: modelscope download --model {name}",
            ) from error
        if "not exist" in str(error) or "404" in str(error):
            raise BadInput(f"ms:{name}: no such repository or revision: {error}", "check the name") from error
        raise ResourceUnavailable(
            f"ms:{name}: ModelScope cannot be reached: {error}", "run again: it resumes"
        ) from error
    return _with_weights(Path(path), f"ms:{name}"), revision or "master"


def _with_weights(path: Path, spec: str) -> Path:
    if not any(path.glob("*.safetensors")):
        raise BadInput(
            f"{spec} has no safetensors weights (pickled .bin files can run code when loaded and are not fetched)",
            "look for a conversion of the repository to safetensors, or convert it where you trust it",
        )
    return path
