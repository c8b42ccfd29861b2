"""Nested blocks against direct removal: any sequence of filters, and only what differs is projected."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.spectra.incremental import Nested

D = 12
Step = tuple[str, list[bool], int]


def spectrum(seed: int, name: str = "named") -> tuple[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return (f"{name} {seed}" if name else ""), vectors


SPECTRA = [spectrum(0), spectrum(1), spectrum(2, ""), spectrum(3, "")]
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(9))


def block(which: int, members: list[bool]) -> ss.Subspace:
    fingerprint, vectors = SPECTRA[which]
    return ss.Subspace.of_members(vectors, torch.tensor(members), "some", fingerprint)


def made(kind: str, members: list[bool], which: int) -> ss.Filter:
    space = block(which, members)
    if kind == "remove":
        return ss.remove(space)
    if kind == "keep":
        return ss.keep(space)
    if kind == "complement":
        return ss.remove(space.complement())
    if kind == "through":
        return ss.Filter(space, block((which + 1) % 4, members[::-1]))
    return ss.rnd(D, sum(members), which)


def by_projector(edit: ss.Filter, x: Tensor) -> Tensor:
    """Explicit float64 projectors."""

    def dense(space: ss.Subspace) -> Tensor:
        inside = space.basis.double() @ space.basis.double().T
        return torch.eye(D, dtype=torch.float64) - inside if space.complemented else inside

    exact = x.double()
    return (exact if edit.through is None else exact @ dense(edit.through)) @ dense(edit.blocked)


class Counting:
    """Note how many directions are projected onto, by `Nested` itself and by filters called from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.direct: list[int] = []
        part, removed = Nested._part, ss.Filter.removed

        def counted(nest: Nested, vectors: Tensor, members: Tensor) -> Any:
            self.steps.append(int(members.sum()))
            return part(nest, vectors, members)

        def whole(edit: ss.Filter, x: Tensor) -> Tensor:
            self.direct.append(edit.blocked.basis.shape[1])
            return removed(edit, x)

        monkeypatch.setattr(Nested, "_part", counted)
        monkeypatch.setattr(ss.Filter, "removed", whole)

    def taken(self) -> tuple[int, int]:
        counts = sum(self.steps), sum(self.direct)
        self.steps.clear()
        self.direct.clear()
        return counts


steps = st.tuples(
    st.sampled_from(["remove", "remove", "keep", "complement", "through", "random"]),
    st.lists(st.booleans(), min_size=D, max_size=D),
    st.integers(0, 3),
)


@given(st.lists(steps, min_size=1, max_size=30))
def test_any_sequence_equals_direct_removal(sequence: list[Step]) -> None:
    nest = Nested(X)
    for kind, members, which in sequence:
        edit = made(kind, members, which)
        found = nest.removed(edit)
        assert found.shape == X.shape and found.dtype == torch.float32
        assert (found - by_projector(edit, X)).abs().max() <= 1e-5
        assert (found - edit.removed(X)).abs().max() <= 1e-5


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=D, max_size=D), st.integers(0, 3)), max_size=20))
def test_only_what_differs_is_projected(sequence: list[tuple[list[bool], int]]) -> None:
    last: dict[int, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        count, nest = Counting(patch), Nested(X)
        for members, which in sequence:
            now = torch.tensor(members)
            edit = made("remove", members, which)
            nest.removed(edit)
            direct = min(int(now.sum()), D - int(now.sum()))
            differ = D + 1 if which not in last else int((now ^ last[which]).sum())
            assert count.taken() == ((0, direct) if differ >= direct else (differ, 0))
            last[which] = now


def test_a_ladder_costs_one_band_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    d, bands = 60, 20
    weight = torch.randn(200, d, generator=torch.Generator().manual_seed(4))
    read = ss.Spectrum.from_matrix(weight, bands=bands, use_cache=False)
    x = torch.randn(2, 7, d, generator=torch.Generator().manual_seed(5))
    count, nest = Counting(monkeypatch), Nested(x)
    for k in range(1, bands):
        edit = ss.phi(read, 1, k)
        found = nest.removed(edit)
        steps, direct = count.taken()
        assert steps + direct == 3, k
        assert (found - edit.removed(x)).abs().max() <= 1e-5
        count.taken()


def test_spectra_are_not_taken_for_one_another() -> None:
    """Two without a fingerprint, the second of which may lie where the first one lay."""
    members = torch.arange(D) < 5
    nest = Nested(X)
    for seed in range(20):
        vectors = spectrum(seed, "")[1]
        edit = ss.remove(ss.Subspace.of_members(vectors, members, "some", ""))
        assert (nest.removed(edit) - by_projector(edit, X)).abs().max() <= 1e-5
        del edit, vectors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_in_float32_at_least(dtype: torch.dtype) -> None:
    nest = Nested(X.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for j in range(1, D):
        edit = made("remove", [i < j for i in range(D)], 0)
        found = nest.removed(edit)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (found - by_projector(edit, X.to(dtype))).abs().max() <= tolerance


def test_rounding_over_a_long_ladder() -> None:
    """A thousand rungs up and down add up to no more than 1e-7 a rung."""
    nest = Nested(X)
    generator = torch.Generator().manual_seed(6)
    members = torch.arange(D) < 6
    for _ in range(1000):
        chosen = torch.randint(D, (2,), generator=generator)
        members = members.clone()
        members[chosen] = ~members[chosen]
        edit = made("remove", members.tolist(), 2)
        assert (nest.removed(edit) - by_projector(edit, X)).abs().max() <= 1e-4
