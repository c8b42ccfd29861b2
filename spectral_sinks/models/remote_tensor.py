"""Reading one tensor of a safetensors file on the hub by range requests, without the rest of the file."""

import json
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from spectral_sinks.errors import InputError, brief

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


def open_remote(name: str, revision: str | None, file: str) -> Any:
    """Open a seekable stream over a file of a hub repository."""
    from huggingface_hub import HfFileSystem  # imports fsspec, which a checkpoint on disk does without

    return HfFileSystem().open(f"{name}@{revision}/{file}" if revision else f"{name}/{file}", "rb")


@runtime_checkable
class Readable(Protocol):
    """A file that can be read from any offset."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


def read_header(stream: Readable) -> dict[str, Any]:
    """Return the dtypes, shapes and byte ranges of the tensors of a safetensors stream, by name."""
    size = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(size))
    except ValueError as error:
        raise InputError(f"not a safetensors file: its header is not JSON ({brief(error)})") from error
    header.pop("__metadata__", None)
    return {name: {**entry, "base": 8 + size} for name, entry in header.items()}


def read_tensor(stream: Readable, name: str) -> "Tensor":
    """Read one tensor of a safetensors stream. Raises InputError for a quantized tensor or a short read."""
    entry = read_header(stream)[name]
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{name} is stored as {entry['dtype']}: expected {', '.join(DTYPES)}")
    start, stop = entry["data_offsets"]
    stream.seek(entry["base"] + start)
    raw = bytearray(stream.read(stop - start))
    if len(raw) != stop - start:
        raise InputError(f"{name}: the file ends after {len(raw)} of {stop - start} bytes")
    import torch  # not for the header

    return torch.frombuffer(raw, dtype=getattr(torch, DTYPES[entry["dtype"]])).reshape(entry["shape"])
