"""Fake quantisation: planted residuals whose error is known, and NumPy's for the rest."""

import numpy as np
import pytest
import torch
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.spectra import FakeQuantiser


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def massive(size: float) -> Tensor:
    """Two texts of five tokens and width 12, all values within 1 but one channel of one token."""
    x = gaussian(2, 5, 12).clamp(-1, 1)
    x[:, 0, 3] = size
    return x


def test_one_massive_channel_takes_everything_else() -> None:
    x = massive(300.0)  # a step of 300 / 127, so whatever is below 1.18 becomes 0
    lost = (FakeQuantiser(8)(x) - x).double().square().sum((1, 2))
    others = x.double().square().sum((1, 2)) - 300.0**2
    torch.testing.assert_close(lost, others)
    # without that channel the step is that of the others, and the error what NumPy computes
    y = x.double().numpy().copy()
    y[..., 3] = 0
    step = np.abs(y).max((1, 2), keepdims=True) / 127
    expected = ((np.round(y / step) * step - y) ** 2).sum((1, 2))
    spared = FakeQuantiser(8, channels=(3,))(x)
    np.testing.assert_allclose((spared - x).double().square().sum((1, 2)), expected, rtol=1e-4)
    assert torch.equal(spared[..., 3], x[..., 3])
    # sparing the one token does as well, but for its own other channels
    tokens = torch.zeros(5, dtype=torch.bool)
    tokens[0] = True
    spared = FakeQuantiser(8, tokens=tokens)(x)
    assert torch.equal(spared[:, 0], x[:, 0])
    assert ((spared - x).abs().amax() <= 1 / 127 / 2 * 1.001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
def test_one_step_per_token_is_numpy_s(bits: int) -> None:
    x = gaussian(2, 7, 9) * torch.logspace(-3, 3, 7)[:, None]
    values = x.double().numpy()
    step = np.abs(values).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(FakeQuantiser(bits, "token")(x), np.round(values / step) * step, rtol=1e-5)
    # a text whose tokens are equally long is rounded alike by either
    same = torch.nn.functional.normalize(x.flatten(0, 1), p=float("inf"), dim=-1)
    torch.testing.assert_close(FakeQuantiser(bits, "token")(same), FakeQuantiser(bits)(same))


def test_the_error_is_a_twelfth_of_the_squared_step() -> None:
    x = gaussian(1, 400, 250)
    step = float(x.abs().max()) / 127
    error = (FakeQuantiser(8)(x) - x).double().square().mean()
    assert float(error) == pytest.approx(step**2 / 12, rel=0.02)


def test_many_bits_change_nothing() -> None:
    x = massive(300.0)
    for per in ("tensor", "token"):
        torch.testing.assert_close(FakeQuantiser(24, per)(x), x, rtol=0, atol=300 * 2**-23)
    whole = torch.randint(-7, 8, (2, 6, 5)).float()
    whole[:, 0, 0] = 7
    assert torch.equal(FakeQuantiser(4)(whole), whole), "integers of four bits"
    zero = torch.zeros(2, 3, 4)
    assert torch.equal(FakeQuantiser(8)(zero), zero)


def test_a_mask_with_a_row_for_each_window_follows_them() -> None:
    x, mask = gaussian(3, 4, 6), torch.zeros(5, 7, dtype=torch.bool)
    mask[3, 2] = mask[4, 6] = True  # the windows are shorter than the longest one
    out = FakeQuantiser(2, tokens=mask).for_windows([3, 0, 4], 5)(x)
    kept = (out == x).all(-1)
    assert kept.nonzero().tolist() == [[0, 2]]
    everything = FakeQuantiser(4, tokens=torch.ones(4, dtype=torch.bool))(x)
    assert torch.equal(everything, x)


def test_dtype_and_address() -> None:
    half = gaussian(2, 3, 4).bfloat16()
    assert FakeQuantiser(8)(half).dtype == torch.bfloat16
    mask = torch.tensor([True, False])
    kinds = [
        *(FakeQuantiser(8), FakeQuantiser(4), FakeQuantiser(8, "token"), FakeQuantiser(8, channels=(1,))),
        *(FakeQuantiser(8, tokens=mask), FakeQuantiser(8, tokens=~mask)),
    ]
    assert len({str(each.address) for each in kinds}) == 6
    assert kinds[0].name == "int8 per tensor" and kinds[0].per_window


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_answer_is_refused() -> None:
    for options, said in (
        ({"bits": 1}, "1 bits: give 2 to 24"),
        ({"bits": 25}, "give 2 to 24"),
        ({"bits": 8, "per": "row"}, "'row': choose from tensor, token"),
        ({"bits": 8, "tokens": torch.zeros(3)}, "give bool"),
    ):
        with pytest.raises(ss.InputError, match=said):
            FakeQuantiser(**options)
    x = gaussian(2, 3, 4)
    with pytest.raises(ss.InputError, match="channel 4 at"):
        FakeQuantiser(8, channels=(4,))(x)
    with pytest.raises(ss.InputError, match="does not fit"):
        FakeQuantiser(8, tokens=torch.ones(2, dtype=torch.bool))(x)
    with pytest.raises(ss.InputError, match="5 rows for 2 windows"):
        FakeQuantiser(8, tokens=torch.ones(5, 3, dtype=torch.bool)).for_windows([0], 2)
    with pytest.raises(ss.InputError, match="give one step per token"):
        FakeQuantiser(8).check_continuation(9)
    FakeQuantiser(8, "token").check_continuation(9)
