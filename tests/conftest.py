"""What every test shares: a cache of its own, matrices with a known spectrum, reproducible examples."""

import gc
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path

import annotation_checks  # noqa: F401  before nnsight, after which beartype cannot be imported
import jaxtyping
import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("tests")

# `make test-ndif` has an environment with the server; `make test-real` names its folder, and is not kept out
collect_ignore = ["real"] if list(distributions(name="ndif")) else ["real", "ndif"]

Planted = Callable[..., Tensor]


def pytest_collection_finish() -> None:
    """Spare the garbage collector the libraries, which it would go through again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SPECTRAL_SINKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the run-time check of shapes, to meet the error that users meet without it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def planted() -> Planted:
    """Make a `rows x d` matrix with the singular values given, in random directions."""

    def make(values: Sequence[float] | Tensor, rows: int = 300, seed: int = 0) -> Tensor:
        singular = torch.as_tensor(values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(rows, len(singular), generator=generator, dtype=torch.float64)
        right = torch.randn(len(singular), len(singular), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(left).Q * singular @ torch.linalg.qr(right).Q.T

    return make
