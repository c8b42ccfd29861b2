"""Answers of a server, read without running any code that they may contain.

An answer is a pickle inside a file of `torch.save`. A pickle can name any function and call it. So both are
read by an unpickler that knows a few names: numbers, arrays, tensors, dataclasses of this package, and
dataclasses that the user has defined, which are filled without a call.
"""

import dataclasses
import io
import pickle
import sys
import zipfile
from typing import Any

import torch
import zstandard
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.response import ResponseModel

from spectral_sinks.errors import RemoteError, without_secrets
from spectral_sinks.remote.serialization import RENAMED

RECONSTRUCTED = "spectral_sinks.remote.serialization"
"""Module of the functions that make a tensor or a subspace from what travelled."""

ALLOWED = frozenset(
    [
        *(("builtins", name) for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
        *(("builtins", name) for name in ("dict", "float", "int", "list", "str", "tuple")),
        *(("collections", name) for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
        ("_codecs", "encode"),  # bytes in a pickle of protocol 2
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *(("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar")),
        *(("numpy.core.multiarray", name) for name in ("_reconstruct", "scalar")),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.core.numeric", "_frombuffer"),
        ("nnsight.schema.response", "Status"),
        ("torch", "Size"),
        ("torch.torch_version", "TorchVersion"),  # in answers to earlier versions of this package
        *((RECONSTRUCTED, name) for name in ("_of_columns", "_random", "_spectrum", "tensor")),
    ]
)
"""The classes and functions that an answer may name, besides dtypes of torch and dataclasses."""

OWN = "spectral_sinks.remote.serialization", "own"
"""The name under which an instance of a user's dataclass travels."""


class Unpickler(pickle.Unpickler):
    """Reads values of the allowed kinds. Raises RemoteError for anything else, before it is called."""

    def __init__(self, data: bytes, model: Any = None) -> None:
        super().__init__(io.BytesIO(data))
        self._model = model

    def persistent_load(self, pid: Any) -> Any:
        return self._model

    def find_class(self, module_name: str, global_name: str) -> Any:
        where = RENAMED.get((module_name, global_name), (module_name, global_name))
        if where == OWN:
            return _own
        if where in ALLOWED:
            return super().find_class(*where)
        module, name = where
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("spectral_sinks."):
            found = getattr(sys.modules.get(module), name, None)  # an import could run code
            if _fillable(found) and found.__module__ == module:
                return found
        raise RemoteError(
            f"the answer names {module}.{name}, which could run code: a function may return numbers, texts, "
            "tensors, arrays, dataclasses, and lists and dictionaries of them"
        )


def read_answer(data: bytes, model: Any = None) -> tuple[str, Any, dict[str, Any]]:
    """Return the kind, the value and the facts of a packed answer, with `model` in place of the reference.

    Raises RemoteError for bytes that are not an answer, and for one that names a function.
    """
    found = _read(data, model)
    match found:
        case ("result", value, dict(facts)):
            return "result", value, facts
        case ("refused", str(reason), dict(facts)):
            return "refused", without_secrets(reason), facts
        case _:
            raise RemoteError("the answer of the server is not one that this version of the package sends")


def read_saved(content: bytes, compressed: bool) -> dict[str, Any]:
    """Return the saved values in a file of `torch.save`. Raises RemoteError as `read_answer` does."""
    try:
        if compressed:
            content = zstandard.ZstdDecompressor().decompress(content)
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            (name,) = (name for name in file.namelist() if name.endswith("/data.pkl"))
            pickled = file.read(name)
    except (ValueError, zipfile.BadZipFile, zstandard.ZstdError) as error:
        raise RemoteError(f"the answer of the server cannot be read: {error}") from error
    found = _read(pickled)
    if not isinstance(found, dict):
        raise RemoteError(f"the answer of the server is a {type(found).__name__}, not saved values")
    return found


class SafeBackend(RemoteBackend):
    """nnsight's backend, whose answers are read by `Unpickler`, and which prints nothing."""

    def __init__(self, model_key: str, **options: Any) -> None:
        super().__init__(model_key, **options)
        # standard output belongs to the commands, also where nnsight is in its debug mode (pytest -v is one)
        self.display.enabled = self.verbose = False

    def finalize(self, content: bytes) -> dict[str, Any]:
        return read_saved(content, self.compress)

    @staticmethod
    def parse(message: str | bytes) -> ResponseModel:
        if isinstance(message, str):
            return ResponseModel.model_validate_json(message)
        return ResponseModel.model_validate(read_saved(bytes(message), compressed=False))


def _read(data: bytes, model: Any = None) -> Any:
    try:
        return Unpickler(data, model).load()
    except RemoteError:
        raise
    except Exception as error:  # of any class, since the bytes may be anything
        raise RemoteError(f"the answer of the server cannot be read: {error}") from error


def _own(module: str, name: str, fields: dict[str, Any]) -> Any:
    """Fill an instance of a dataclass that this process has, without calling anything of it."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not _fillable(found):
        raise RemoteError(f"the answer holds a {module}.{name}, which is no dataclass of this process")
    made = object.__new__(found)
    vars(made).update(fields)
    return made


def _fillable(found: Any) -> bool:
    """Whether something is a dataclass that does nothing when an instance of it ends."""
    return isinstance(found, type) and dataclasses.is_dataclass(found) and not hasattr(found, "__del__")
