"""Checkpoints: the embedded models, folders and hub ids, with access to single files and tensors."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.embedded import DEFAULT, FOLDER, TWIN
from spectral_sinks.models.remote_tensor import open_remote, read_header, read_tensor

TIMEOUT = 5.0
"""Seconds to wait for the hub to say whether it knows a model."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint: `folder` if it is on disk, otherwise the hub id `name` at `revision`."""

    name: str
    folder: Path | None = None
    revision: str | None = None
    offline: bool = False
    """Whether the hub cannot be reached, so that only its local cache is used."""

    @property
    def location(self) -> str:
        """The path or id for transformers' `from_pretrained`."""
        return str(self.folder) if self.folder else self.name

    def file(self, name: str) -> Path | None:
        """Return the path of one file of the checkpoint, downloaded alone from the hub; None if it does not
        exist.
        """
        if self.folder:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return Path(
                hf_hub_download(self.name, name, revision=self.revision, local_files_only=self.offline)
            )
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises InputError if it is missing or not a JSON object."""
        path = self.file("config.json")
        if path is None:
            raise InputError(f"{self.name} has no config.json: expected a Hugging Face checkpoint")
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error})") from error
        if not isinstance(read, dict):
            raise InputError(f"{path} is not a configuration: expected a JSON object")
        return read

    @cached_property
    def shards(self) -> dict[str, str]:
        """Map from each tensor name to the safetensors file that holds it; empty without safetensors."""
        if index := self.file(INDEX):
            try:
                return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise InputError(f"{index} is not an index of safetensors files ({error})") from error
        name = "model.safetensors"
        if (path := self._at_hand(name)) is not None:
            with _opened(path) as stored:
                return dict.fromkeys(stored.keys(), name)
        if self.folder or self.offline or not HfApi().file_exists(self.name, name, revision=self.revision):
            return {}
        with open_remote(self.name, self.revision, name) as stream:
            return dict.fromkeys(read_header(stream), name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor of the checkpoint, and nothing else, not even the rest of its file on the hub.

        Raises InputError if the tensor does not exist.
        """
        if name not in self.shards:
            raise InputError(f"{self.name} holds no tensor {name!r}")
        shard = self.shards[name]
        if (path := self._at_hand(shard)) is not None:
            with _opened(path) as stored:
                return stored.get_tensor(name)
        if self.folder or self.offline:
            raise InputError(f"{self.name}: {shard} is missing, its index names it")
        with open_remote(self.name, self.revision, shard) as stream:
            return read_tensor(stream, name)

    def _at_hand(self, name: str) -> Path | None:
        """Return a file that needs no download, from the folder or from the hub's cache."""
        if self.folder:
            return self.file(name)
        cached = try_to_load_from_cache(self.name, name, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def require_weights(self, allow_pickle: bool = False) -> None:
        """Raise InputError unless there are weights, which must be safetensors unless pickle is allowed."""
        if self.shards:
            return
        pickled = [n for n in ("pytorch_model.bin", "pytorch_model.bin.index.json") if self.file(n)]
        if pickled and not allow_pickle:
            raise InputError(
                f"{self.name} has only pickled weights ({pickled[0]}), which run code when they are loaded; "
                "convert them to safetensors, or allow it: load(..., allow_pickle=True), --allow-pickle"
            )
        if not pickled:
            raise InputError(f"{self.name} holds no weights: expected model.safetensors or {INDEX}")


def find_source(name: str, revision: str | None = None) -> Source:
    """Find a checkpoint by the name of an embedded model, a folder, or a hub id.

    Raises InputError within seconds for a name that is neither a folder nor known to the hub, where that can
    be reached.
    """
    if name in (DEFAULT, TWIN):
        return Source(name, FOLDER / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.exists():
        raise InputError(f"{name} is a file: give the folder of a Hugging Face checkpoint")
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        return Source(name, revision=info.sha)
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither a folder nor a valid hub id") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise InputError(
                f"{name!r} is not a folder, and the hub has no such model or revision that you may read "
                f"(status {status}); for a gated model log in with `hf auth login`"
            ) from error
        return _cached(name, revision, error)
    except (OfflineModeIsEnabled, OSError) as error:
        return _cached(name, revision, error)
    except Exception as error:
        if type(error).__module__.startswith(
            "httpx"
        ):  # the hub client's http library, which it vendors under changing names
            return _cached(name, revision, error)
        raise


def _cached(name: str, revision: str | None, error: Exception) -> Source:
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return Source(name, revision=revision, offline=True)
    raise InputError(
        f"{name!r} is not a folder, is not in the hub's cache, and the hub cannot be reached ({error})"
    ) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a weight holds NaN or Inf."""
    if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} holds {bad} NaN or Inf of {tensor.numel()} values: check the weights")
