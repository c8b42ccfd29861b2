"""Planted shares of a direction are found, and taken out; what has no answer is refused."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from support.planted_sinks import D, sinking

import spectral_sinks as ss


@pytest.fixture(scope="module")
def planted() -> Any:
    """The carrier is channel 0, in the last band."""
    model, spectrum, windows = sinking(20, gain=0.1)
    found = ss.find_sinks(model, windows, spectrum, draws=2)
    spectra = [spectrum, ss.read_spectrum(model, convention="folded", bands=20)]
    return ss.SinkRule.learn(model, found, spectra), spectra


def test_planted_shares_are_found_and_taken_out(planted: Any) -> None:
    rule, spectra = planted
    dark = {each.convention: each.dark() for each in spectra}
    carried = [*(space.orthonormal() for space in dark.values()), torch.eye(D)[:, :1]]
    carried.append(rule.carrier()[:, None])
    other = torch.linalg.qr(torch.cat([part.double() for part in carried], dim=1)).Q
    clean = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean -= other @ (other.T @ clean)
    clean *= 4 / clean.norm()
    vector = clean.clone()
    vector[0] += 3  # 9 of 25
    found = ss.clean(vector, rule)
    table = found.table.set_index("part")
    assert list(table.index) == ["carrier", "channels", "dark raw", "dark folded", "removed"]
    assert table.loc["channels", "share"] == pytest.approx(9 / 25) and table.loc["channels", "rank"] == 1
    for name, space in dark.items():
        assert table.loc[f"dark {name}", "share"] == pytest.approx(float(space.share(vector)), abs=1e-6)
    assert found.share == pytest.approx(9 / 25, abs=1e-6) and table["removed"].all()
    torch.testing.assert_close(found.vector, clean, atol=1e-5, rtol=0)
    for space in (*dark.values(), ss.Subspace.spanning(rule.carrier()[:, None])):
        assert space.share(found.vector) < 1e-6
    assert abs(found.vector[0]) < 1e-6 and json.dumps(found.record()) and found.summary() is found.table


def test_parts_are_taken_out_one_by_one(planted: Any) -> None:
    rule, _ = planted
    vector = torch.randn(D, generator=torch.Generator().manual_seed(1))
    found = ss.clean(vector, rule, remove=["channels"])
    expected = vector.clone()
    expected[0] = 0
    torch.testing.assert_close(found.vector, expected)
    assert found.table.set_index("part")["removed"].tolist() == [False, True, False, False, True]
    assert found.share == pytest.approx(float(vector[0] ** 2 / vector.square().sum()), rel=1e-5)
    assert (
        found.vector.dtype == torch.float32
        and ss.clean(vector.bfloat16(), rule).vector.dtype == torch.bfloat16
    )


def test_random_directions_have_the_stated_shares(planted: Any) -> None:
    rule, _ = planted
    draws = [ss.clean(torch.randn(D), rule).table.set_index("part") for _ in range(300)]
    for part in ("carrier", "dark raw", "dark folded"):
        shares = np.array([table.loc[part, "share"] for table in draws])
        row = draws[0].loc[part]
        assert shares.mean() == pytest.approx(row["random"], rel=0.3)
        inside = (shares >= row["random_low"]) & (shares <= row["random_high"])
        assert 0.9 < inside.mean() < 0.99


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_answer_is_refused(planted: Any) -> None:
    rule, _ = planted
    for vector, said in (
        (torch.randn(D + 1), "for vectors of width 40"),
        (torch.randn(2, D), "for vectors of width 40"),
        (torch.zeros(D), "zero or not finite"),
        (torch.full((D,), float("nan")), "zero or not finite"),
        (rule.carrier(), "leaves nothing of it"),
    ):
        with pytest.raises(ss.InputError, match=said):
            ss.clean(vector, rule)
    with pytest.raises(ss.InputError, match="choose from carrier, channels, dark raw"):
        ss.clean(torch.randn(D), rule, remove=["dark"])
    with pytest.raises(ss.InputError, match="leaves the vector as it is"):
        ss.clean(torch.randn(D), rule, remove=[])
    with pytest.raises(ss.InputError, match="knows the embedding"):
        ss.clean(torch.randn(D), rule, site=ss.Site("mlp", 1))


@pytest.mark.usefixtures("unchecked")
def test_a_direction_of_integers_loses_what_the_same_numbers_lose(planted: Any) -> None:
    rule, _ = planted
    whole = torch.randint(-3, 4, (D,), generator=torch.Generator().manual_seed(0))
    found, same = ss.clean(whole, rule), ss.clean(whole.float(), rule)
    assert found.vector.dtype == torch.float32 and torch.equal(found.vector, same.vector)
    alone: Any = "carrier"
    assert torch.equal(
        ss.clean(whole, rule, remove=alone).vector, ss.clean(whole, rule, remove=["carrier"]).vector
    )
