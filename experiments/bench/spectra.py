"""The spectrum of a tall matrix, compared with the SVD of scipy in single and double precision."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from cases import Bench
from timing import Row, row

import spectral_sinks as ss

ERROR = 1e-9
"""Largest error at which a ratio counts: the sine between the dark subspace and that of scipy in float64."""


def spectra(bench: Bench) -> list[Row]:
    """Compare speed and error on a float32 matrix of condition about 1e3.

    Like an unembedding, the matrix has a few dominant singular values, a slow decay and a steep tail. Each
    side runs once, since it takes minutes.
    """
    rows, d = (2000, 256) if bench.quick else (32_000, 4096)
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, d)
    values = 1e3 ** -(0.1 * t.sqrt() + 0.3 * t + 0.6 * t**8)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    weight = torch.randn(rows, d, generator=generator) * values @ basis.T

    def scipys(dtype: type) -> tuple[float, np.ndarray, np.ndarray]:
        matrix = weight.numpy().astype(dtype)
        scipy.linalg.svd(matrix[:200, :100], full_matrices=False)  # starts threads and loads libraries
        seconds, (_, found, right) = timed(lambda: scipy.linalg.svd(matrix, full_matrices=False))
        return seconds, found, right[-spectrum.dark().rank :].T.astype(np.float64)

    ss.Spectrum.from_matrix(weight[:200, :100], use_cache=False)
    ours, spectrum = timed(lambda: ss.Spectrum.from_matrix(weight, use_cache=False))
    single, _, single_dark = scipys(np.float32)
    double, found, truth = scipys(np.float64)

    def sine(dark: np.ndarray) -> float:
        dark = np.linalg.qr(dark)[0]  # in single precision it is orthonormal only to 1e-6
        return float(np.linalg.norm(dark - truth @ (truth.T @ dark), 2))

    error = sine(spectrum.dark().orthonormal().numpy())
    note = f"condition {found[0] / found[-1]:.0f}; error of the dark subspace {error:.1g}"
    note += f", of float32 {sine(single_dark):.1g}; relative error of singular values "
    note += f"{np.abs(spectrum.values.numpy() / found - 1).max():.1g}"
    made: list[Row] = []
    for name, theirs, target in (("float32", single, 2.5), ("float64", double, 4.0)):
        seconds = {"scipy": round(theirs, 3), "ours": round(ours, 3)}
        size = f"random matrix, {rows} x {d}"
        ratio = theirs / ours
        made.append(
            row(f"scipy {name} SVD / spectrum", size, ratio, target, True, seconds=seconds, note=note)
        )
        made[-1]["reached"] = bool(made[-1]["reached"]) and error <= ERROR
    return made


def timed(decompose: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = decompose()
    return time.perf_counter() - start, result
