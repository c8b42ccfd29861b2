"""Checkpoints: the embedded models, folders and hub ids, with access to single files and tensors."""

import json
from collections.abc import Iterable
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
from torch.nn import Parameter

from spectral_sinks.errors import InputError
from spectral_sinks.models.embedded import DEFAULT, FOLDER, TWIN
from spectral_sinks.models.remote_tensor import open_remote, read_header, read_tensor

TIMEOUT = 5.0
"""Seconds to wait for the hub to say whether it knows a model."""

INDEX = "model.safetensors.index.json"


class QuantisedError(InputError):
    """A tensor is not stored as it acts, so that it can be read from the loaded model only."""


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
        if (path := self.file("config.json")) is not None:
            return _json(path)
        if self.adapter is not None:
            raise InputError(
                f"{self.name} holds an adapter and no model: use load({self.name!r}), or name the model that "
                f"it adapts, {self.adapter.get('base_model_name_or_path')}"
            )
        raise InputError(f"{self.name} has no config.json: expected a Hugging Face checkpoint")

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The content of the adapter_config.json of peft; None for a checkpoint without an adapter."""
        path = self.file("adapter_config.json")
        return None if path is None else _json(path)

    @cached_property
    def shards(self) -> dict[str, str]:
        """Map from each tensor name to the safetensors file that holds it; empty without safetensors."""
        name = "model.safetensors"  # which transformers prefers to an index that lies beside it
        if (path := self._at_hand(name)) is not None:
            with _opened(path) as stored:
                return dict.fromkeys(stored.keys(), name)
        local = self.folder is not None or self.offline
        if not local and HfApi().file_exists(self.name, name, revision=self.revision):
            with open_remote(self.name, self.revision, name) as stream:
                return dict.fromkeys(read_header(stream), name)
        if index := self.file(INDEX):
            try:
                return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise InputError(f"{index} is not an index of safetensors files ({error})") from error
        return {}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor of the checkpoint, and nothing else, not even the rest of its file on the hub.

        Raises InputError if the tensor does not exist, and QuantisedError if it is not stored as it acts.
        """
        if name not in self.shards:
            raise InputError(f"{self.name} holds no tensor {name!r}")
        shard = self.shards[name]
        if (path := self._at_hand(shard)) is not None:
            with _opened(path) as stored:
                tensor = stored.get_tensor(name)
        elif self.folder or self.offline:
            raise InputError(f"{self.name}: {shard} is missing, its index names it")
        else:
            with open_remote(self.name, self.revision, shard) as stream:
                tensor = read_tensor(stream, name)
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            raise QuantisedError(f"{self.name} stores {name!r} quantised, in {tensor.dtype}")
        return tensor

    def packed(self, name: str) -> bool:
        """Whether a tensor on disk has at most one byte for each number; False for one on the hub."""
        path = self._at_hand(self.shards[name])
        if path is None:
            return False
        with _opened(path) as stored:
            return stored.get_slice(name).get_dtype() not in ("F64", "F32", "F16", "BF16")

    def require_plain(self, layers: Iterable[str]) -> None:
        """Raise QuantisedError if a layer has its weight in other tensors than `weight`."""
        for layer in layers:
            inside = [name.removeprefix(f"{layer}.") for name in self.shards if name.startswith(f"{layer}.")]
            own = {part for part in inside if "." not in part or part.startswith("weight.")}
            if own - {"weight", "bias"}:
                raise QuantisedError(f"{self.name} stores {layer!r} quantised, in {', '.join(sorted(own))}")

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


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} is not a configuration: expected a JSON object")
    return read


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError if a weight that is in memory and not packed holds NaN or Inf."""
    if type(tensor) not in (Tensor, Parameter) or tensor.is_meta or not tensor.is_floating_point():
        return
    tensor = tensor if tensor.itemsize > 1 else tensor.float()
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(f"{name} holds {bad} NaN or Inf of {tensor.numel()} values: check the weights")
