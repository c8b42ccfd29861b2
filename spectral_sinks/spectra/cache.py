"""Decompositions on disk, under a hash of the weights they come from."""

# torch is typed only in part:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectral_sinks.errors import SpectralWarning

PROBES = 4
"""Random vectors on which the directions of a file are tried."""

VERSION = 2
"""Raised when the decomposition or the layout of the file changes."""


def folder() -> Path:
    """`$SPECTRAL_SINKS_CACHE`, else `spectral_sinks` in the user's cache folder."""
    if given := os.environ.get("SPECTRAL_SINKS_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral_sinks"


def fingerprint(weight: Tensor, gain: Tensor | None, convention: str) -> str:
    """SHA-256 over dtype, shape and bytes of the weights, the gain and the convention."""
    digest = hashlib.sha256(f"{VERSION} {convention}".encode())
    for tensor in (weight, gain):
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous()
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find(key: str) -> tuple[Tensor, Tensor] | None:
    """Return the stored singular values and vectors, or None; a damaged file is reported and ignored."""
    path = folder() / f"{key}.safetensors"
    if not os.path.exists(path):  # false as well for a folder that cannot be read, where Path.exists raises
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            values, vectors = stored.get_tensor("values"), stored.get_tensor("vectors")
            whole = stored.metadata()["checksum"] == _checksum(values, vectors)
            reason = _fault(values, vectors) if whole else "its checksum does not match"
            if not reason:
                return values, vectors
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        reason = str(error)
    warnings.warn(
        f"cached spectrum {path} is damaged ({reason}): computed again",
        SpectralWarning,
        stacklevel=4,
    )
    return None


def store(key: str, values: Tensor, vectors: Tensor) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees half a file.

    A folder that cannot be written, or a full disk, causes a warning only.
    """
    temporary: Path | None = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder(), suffix=".part")
        os.close(handle)
        temporary = Path(name)
        tensors = {"values": values.contiguous(), "vectors": vectors.contiguous()}
        save_file(tensors, temporary, {"checksum": _checksum(values, vectors)})
        temporary.chmod(0o644)  # mkstemp denies access to other users, who may share the folder
        temporary.replace(folder() / f"{key}.safetensors")
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        warnings.warn(
            f"the spectrum is not cached ({error}): set SPECTRAL_SINKS_CACHE to a folder that can be written",
            SpectralWarning,
            stacklevel=4,
        )


def _fault(values: Tensor, vectors: Tensor) -> str:
    """Return why tensors cannot be a decomposition; "" if they can."""
    d = len(values) if values.ndim == 1 else 0
    if not d or vectors.shape != (d, d) or (values.dtype, vectors.dtype) != (torch.float64, torch.float64):
        return f"it holds {values.dtype} {tuple(values.shape)} and {vectors.dtype} {tuple(vectors.shape)}"
    finite = bool(torch.isfinite(values).all()) and bool((values >= 0).all())
    if not finite or bool((values.diff() > 1e-6 * values[0]).any()):
        return "its singular values are not numbers in descending order"
    # random vectors show it in d^2 operations, of which V^T V takes d^3
    probe = torch.randn(d, PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not torch.allclose(vectors.T @ (vectors @ probe), probe, rtol=0, atol=1e-6):
        return "its directions are not orthonormal"
    return ""


def _checksum(values: Tensor, vectors: Tensor) -> str:
    return fingerprint(values, vectors, "checksum")
