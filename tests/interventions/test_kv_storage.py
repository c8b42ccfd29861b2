"""Integers are at most half a step off, and the entries that are kept are those that were asked for."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_sinks.interventions.kv_storage import Storage, pack_codes, quantised, taken, unpack_codes


def planted(tokens: int = 20, seed: int = 0) -> torch.Tensor:
    """Keys with one channel a hundred times as large as the others, as in many models."""
    x = torch.randn(2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 100
    return x


@given(st.sampled_from([8, 4, 2]), st.integers(0, 100))
def test_packing_loses_nothing(bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 16), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    held = pack_codes(codes, bits)
    assert held.shape == (3, 5, 16 * bits // 8)
    assert torch.equal(unpack_codes(held, bits), codes)


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_is_off_by_half_a_step_and_uses_the_whole_range(bits: int, by: str) -> None:
    x = planted()
    codes, low, step = quantised(x, bits, by)
    dim = -2 if by == "channel" else -1
    by_hand = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
    assert torch.allclose(step, by_hand)
    assert ((codes * step + low - x).abs() <= step * 0.5001).all()
    assert codes.amin() == 0 and codes.amax() == 2**bits - 1


def test_equal_numbers_are_stored_exactly() -> None:
    codes, low, step = quantised(torch.full((1, 1, 4, 8), 3.0), 2, "token")
    assert torch.equal(codes * step + low, torch.full((1, 1, 4, 8), 3.0))


def test_a_large_channel_costs_the_others_nothing_if_groups_are_channels() -> None:
    x = planted()
    others = [0, 1, 2, 3, 4, 6, 7]
    errors = {}
    for by in ("channel", "token"):
        codes, low, step = quantised(x, 4, by)
        errors[by] = float((codes * step + low - x)[..., others].abs().mean())
    assert errors["channel"] < errors["token"] / 10


@pytest.mark.parametrize("by", ["channel", "token"])
@pytest.mark.parametrize("pieces", [(20,), (1,) * 20, (3, 9, 8)])
def test_entries_come_back_however_they_came_in(by: str, pieces: tuple[int, ...]) -> None:
    x = planted()
    storage = Storage(4, by, group=6, exact=3)
    for piece in x.split(pieces, dim=2):
        storage.append(piece)
    read = storage.read()
    assert storage.shape == (2, 3, 20)
    assert torch.equal(read[:, :, :3], x[:, :, :3])
    stop = 3 + (17 // 6 * 6 if by == "channel" else 17)
    assert torch.equal(read[:, :, stop:], x[:, :, stop:])
    width = 6 if by == "channel" else 17
    for start in range(3, stop, width):
        part = x[:, :, start : start + width]
        codes, low, step = quantised(part, 4, by)
        assert torch.allclose(read[:, :, start : start + width], codes * step + low, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 8, 2])
@pytest.mark.parametrize("by", ["channel", "token"])
def test_what_is_kept_reads_as_before(bits: int | None, by: str) -> None:
    storage = Storage(bits, by, group=4, exact=2)
    storage.append(planted(21))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        before = storage.read()
        held = before.shape[2]
        middle = torch.rand(2, 3, held - 6, generator=generator).topk(5, dim=2).indices.sort().values + 2
        ends = [torch.arange(2), torch.arange(held - 4, held)]
        first, last = (x.expand(2, 3, -1) for x in ends)
        index = torch.cat([first, middle, last], dim=2)
        storage.keep(index)
        assert torch.equal(storage.read(), taken(before, index))
        storage.append(planted(7, seed=held))
        assert torch.equal(storage.read()[:, :, :2], before[:, :, :2])


def test_nothing_that_was_dropped_stays_in_memory() -> None:
    storage = Storage(4, "channel", group=4, exact=2)
    for seed in range(20):
        storage.append(planted(8, seed))
        held = storage.shape[2]
        index = torch.cat([torch.arange(2), torch.arange(max(2, held - 8), held)])
        storage.keep(index.expand(2, 3, -1))
    counted = sum(x.numel() * x.element_size() for x in storage.tensors)
    assert counted == sum(x.untyped_storage().nbytes() for x in storage.tensors)
    assert storage.low is not None and storage.low.shape[2] <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("by", ["channel", "token"])
def test_half_precision_adds_no_more_than_its_own_rounding(dtype: torch.dtype, bits: Any, by: Any) -> None:
    x = (torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    held = Storage(bits, by, 32)
    held.append(x)
    found = held.read()
    assert found is not None and found.dtype == dtype
    groups = (x.double().unflatten(2, (-1, 32)), -2) if by == "channel" else (x.double(), -1)
    step = (groups[0].amax(groups[1], keepdim=True) - groups[0].amin(groups[1], keepdim=True)) / (2**bits - 1)
    error = (found.double() - x.double()).abs().view_as(groups[0])
    rounding = torch.finfo(dtype).eps / 2 * x.double().abs().max()  # of the result
    assert (error <= 0.51 * step + rounding).all()
