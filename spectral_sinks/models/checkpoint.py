"""Checkpoints: the embedded models, folders and hub ids, with access to single files and tensors."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open

from spectral_sinks.errors import InputError, brief
from spectral_sinks.files import GGUF, expanded
from spectral_sinks.models.embedded import DEFAULT, FOLDER, TWIN
from spectral_sinks.models.remote_tensor import open_remote, read_header, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from spectral_sinks.models.gguf import GgufFile

TIMEOUT = 5.0
"""Seconds to wait for the hub to say whether it knows a model."""

INDEX = "model.safetensors.index.json"

SHARD = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
"""The name of a file of weights in an index, which may come from somebody else."""


class QuantisedError(InputError):
    """A tensor is not stored as it acts, so that it can be read from the loaded model only."""


FORMS: dict[str, type] = {
    "model_type": str,
    "architectures": list,
    "text_config": dict,
    "vision_config": dict,
    "quantization_config": dict,
    "auto_map": dict,
}
"""Entries of a configuration that are read here or by transformers before it checks them, and their types."""


@dataclass(frozen=True)
class Source:
    """A checkpoint: `folder` if it is on disk, otherwise the hub id `name` at `revision`."""

    name: str
    folder: Path | None = None
    revision: str | None = None
    offline: bool = False
    """Whether the hub cannot be reached, so that only its local cache is used."""
    gguf_file: str | None = None
    """The GGUF file in the folder or repository that holds configuration, tokenizer and weights."""

    @property
    def location(self) -> str:
        """The path or id for transformers' `from_pretrained`."""
        return str(self.folder) if self.folder else self.name

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' `from_pretrained` that say which files are meant."""
        named = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {
            "revision": self.revision,
            "local_files_only": self.offline or self.folder is not None,
            **named,
        }

    @cached_property
    def gguf(self) -> "GgufFile | None":
        """The GGUF file, downloaded from the hub where it is not on disk; None for another checkpoint."""
        if self.gguf_file is None:
            return None
        path = self.file(self.gguf_file)
        if path is None:
            raise InputError(f"{self.name} holds no file {self.gguf_file!r}")
        from spectral_sinks.models.gguf import open_gguf  # imports torch, which few checkpoints need here

        return open_gguf(path)

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
        """The content of config.json, or the configuration that transformers reads from a GGUF file.

        Raises InputError if it is missing or not a JSON object, and for an architecture that transformers
        does not read from GGUF.
        """
        if self.gguf is not None:
            return self.gguf.config()
        if (path := self.file("config.json")) is not None:
            return _formed(path, _json(path))
        if self.adapter is not None:
            raise InputError(
                f"{self.name} holds an adapter and no model: load both by load({self.name!r}), or name the "
                f"model that it adapts, {self.adapter.get('base_model_name_or_path')}"
            )
        raise InputError(
            f"{self.name} has no config.json: expected a Hugging Face checkpoint, or GGUF files, of which "
            "gguf_file= (--gguf-file) names one"
        )

    @cached_property
    def adapter(self) -> dict[str, Any] | None:
        """The content of the adapter_config.json of peft; None for a checkpoint without an adapter."""
        path = None if self.gguf_file else self.file("adapter_config.json")
        return None if path is None else _json(path)

    @cached_property
    def shards(self) -> dict[str, str]:
        """Map from each tensor name to the file that holds it; empty without safetensors and GGUF.

        A GGUF file has names of its own for tensors, such as `token_embd.weight`.
        """
        if self.gguf is not None:
            return dict.fromkeys(self.gguf.tensors, str(self.gguf_file))
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
                shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if astray := [name for name in shards.values() if not SHARD.fullmatch(name)]:
                    raise ValueError(f"{astray[0]!r} is not the name of a file below the checkpoint")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{index} is not an index of safetensors files ({brief(error)})") from error
            return shards
        return {}

    def tensor(self, name: str) -> "Tensor":
        """Read one tensor of the checkpoint, and nothing else, not even the rest of its file on the hub.

        Raises InputError if the tensor does not exist, and QuantisedError if it is not stored as it acts.
        """
        if name not in self.shards:
            raise InputError(f"{self.name} holds no tensor {name!r}")
        if self.gguf is not None:
            return self.gguf.tensor(name)
        shard = self.shards[name]
        if (path := self._at_hand(shard)) is not None:
            with _opened(path, "pt") as stored:
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

    def integers(self) -> str | None:
        """Return the first weight that lies on this machine as integers; None if there is none."""
        for shard in sorted(set(self.shards.values())) if self.gguf is None else ():
            if (path := self._at_hand(shard)) is None:
                continue
            with _opened(path) as stored:
                for name in sorted(stored.keys()):
                    if name.endswith(".weight") and stored.get_slice(name).get_dtype()[0] in "IU":
                        return name
        return None

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

    @property
    def bytes_at_hand(self) -> int | None:
        """Size of the weights, if all of their files are on this machine; None otherwise."""
        paths = [self._at_hand(shard) for shard in sorted(set(self.shards.values()))]
        sizes = [path.stat().st_size for path in paths if path is not None]
        return sum(sizes) if sizes and len(sizes) == len(paths) else None

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


def find_source(name: str, revision: str | None = None, gguf_file: str | None = None) -> Source:
    """Find a checkpoint by the name of an embedded model, a folder, a GGUF file, or a hub id.

    Args:
        name: the name, path or id.
        revision: the revision of a hub model.
        gguf_file: the name of a GGUF file in the folder or in the repository of the hub. A folder without
            config.json that holds one GGUF file needs no name.

    Raises:
        InputError: within seconds for a name that is neither a path nor known to the hub, where that can be
            reached; for a file that is not GGUF, and for a folder with several of them and no `gguf_file`.

    """
    if name in (DEFAULT, TWIN):
        return Source(name, FOLDER / name)
    path = expanded(name)
    if path.is_dir():
        return Source(name, path, gguf_file=find_gguf(path, gguf_file))
    if path.suffix == GGUF and (path.exists() or len(path.parts) > 2):
        if not path.is_file():
            raise InputError(f"{name} does not exist")
        return Source(name, path.parent, gguf_file=path.name)
    if path.exists():
        raise InputError(f"{name} is a file: give the folder of a Hugging Face checkpoint, or a GGUF file")
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        return Source(name, revision=info.sha, gguf_file=gguf_file)
    except HFValidationError as error:
        raise InputError(f"{name!r} is neither a folder nor a valid hub id") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise InputError(
                f"{name!r} is not a folder, and the hub has no such model or revision that you may read "
                f"(status {status}); for a gated model log in with `hf auth login`"
            ) from error
        return _cached(name, revision, gguf_file, error)
    except (OfflineModeIsEnabled, OSError) as error:
        return _cached(name, revision, gguf_file, error)
    except Exception as error:
        if type(error).__module__.startswith(
            "httpx"
        ):  # the hub client's http library, which it vendors under changing names
            return _cached(name, revision, gguf_file, error)
        raise


def _cached(name: str, revision: str | None, gguf_file: str | None, error: Exception) -> Source:
    if isinstance(try_to_load_from_cache(name, gguf_file or "config.json", revision=revision), str):
        return Source(name, revision=revision, offline=True, gguf_file=gguf_file)
    raise InputError(
        f"{name!r} is not a folder, is not in the hub's cache, and the hub cannot be reached ({brief(error)})"
    ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({brief(error)})") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} is not a configuration: expected a JSON object")
    return read


def _formed(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration. Raises InputError if an entry that is read here has another form."""
    for name, form in FORMS.items():
        given = config.get(name)
        items = given if isinstance(given, list) else []
        if given is not None and not (isinstance(given, form) and all(isinstance(x, str) for x in items)):
            kind = {str: "a string", dict: "an object", list: "a list of strings"}[form]
            raise InputError(f"{path}: {name!r} is {brief(ValueError(repr(given)))}, expected {kind}")
    return config


def _opened(path: Path, framework: str = "numpy") -> Any:
    """Open a file of weights; its names and dtypes do not depend on the framework of its tensors."""
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({brief(error)})") from error


def find_gguf(folder: Path, name: str | None) -> str | None:
    """Return the name of the GGUF file to read in a folder, or None if the folder is another checkpoint.

    A folder with a config.json and weights beside it is a Hugging Face checkpoint, unless `name` is given.
    Raises InputError if `name` is not there, and if it is not given and there are several.
    """
    if name is not None:
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no file {name!r}")
        return name
    weights = (path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
    if (folder / "config.json").is_file() and any(weights):
        return None
    found = sorted(path.name for path in folder.glob(f"*{GGUF}"))
    # the parts of one split file are one file, and a projector of images is no language model
    first = [f for f in found if not re.search(r"-\d{5}-of-\d{5}", f) or "-00001-of-" in f]
    first = first or found[:1]
    if len(first) > 1:
        raise InputError(
            f"{folder} holds several GGUF files ({', '.join(first)}): name one by load(..., gguf_file=...), "
            "--gguf-file, or give the path of the file itself"
        )
    return first[0] if first else None
