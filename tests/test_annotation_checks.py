"""The check of annotations in tests: kept for a function within another, and as strict as a new one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from annotation_checks import checked
from beartype.roar import BeartypeCallHintViolation

import spectral_sinks as ss


def made(kind: Any, default: Any = None) -> Callable[..., Any]:
    def inner(x: kind) -> Any: ...

    def opening(x: kind = default) -> Any: ...

    return checked(inner if default is None else opening)


def test_a_check_is_kept_for_one_signature() -> None:
    assert made(int) is made(int) is not made(str)
    assert made(int, 1) is not made(int, 1), "its default may be another"
    made(int)(3)
    for _ in range(2):
        for kind, wrong in ((int, "a"), (str, 1)):
            with pytest.raises(BeartypeCallHintViolation):
                made(kind)(wrong)


def test_a_result_is_checked() -> None:
    def returned(x: int, *, found: Any) -> float:
        return found

    check = checked(returned)
    assert check("checked before", found=3) == 3, "an int passes for a float"
    with pytest.raises(BeartypeCallHintViolation):
        check(1, found="a")


def test_the_package_is_checked() -> None:
    with pytest.raises(Exception, match="Type-check error whilst checking the parameters of"):
        ss.random_subspace("32", 3)  # pyright: ignore[reportArgumentType]


def test_the_result_of_a_function_of_the_package_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths in its annotation are those of its arguments."""
    space, x = ss.random_subspace(32, 3), torch.randn(2, 5, 32)
    assert space.project(x).shape == x.shape
    monkeypatch.setattr(ss.Subspace, "_stored_part", lambda self, x: (x[:1], x[:1]))
    with pytest.raises(Exception, match="Type-check error whilst checking the return value"):
        space.project(x)
