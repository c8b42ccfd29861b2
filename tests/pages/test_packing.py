"""Numbers inside a page come back within half a step, and no text ends its script element."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_sinks.pages.packing import Bits, as_codes, from_codes, inside_script

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=50), st.sampled_from([8, 16]))
def test_values_come_back_within_half_a_step(values: list[float], bits: Bits) -> None:
    coded = as_codes(np.array(values), bits)
    back = from_codes(coded)
    assert coded.step == pytest.approx((max(values) - min(values)) / (2**bits - 2))
    assert np.abs(back - values).max() <= coded.step / 2 + 1e-9 * max(map(abs, values))


def test_the_ends_of_a_stated_range_are_exact_and_nan_stays_nan() -> None:
    values = np.array([[0.0, 1.0, np.nan], [0.25, 0.5, np.inf]])
    for bits in (8, 16):
        back = from_codes(as_codes(values, bits, within=(0.0, 1.0)))
        assert back.shape == (2, 3) and back[0, 0] == 0 and back[0, 1] == pytest.approx(1, abs=1e-12)
        assert np.isnan(back[:, 2]).all() and back[1, 1] == pytest.approx(0.5, abs=1e-12)


def test_norms_of_any_size_keep_three_digits() -> None:
    values = np.geomspace(1e-3, 1e6, 500)
    back = from_codes(as_codes(values, 16, log=True))
    assert np.abs(back / values - 1).max() < 3e-4


def test_values_without_any_number_are_nan() -> None:
    assert np.isnan(from_codes(as_codes(np.full((2, 2), np.nan), 16))).all()
    assert (from_codes(as_codes(np.full(3, 4.0), 8)) == 4.0).all()


def test_one_array_always_gives_one_text() -> None:
    values = np.random.default_rng(0).random(100)
    assert as_codes(values, 8) == as_codes(values, 8)


@given(st.text())
def test_no_text_ends_the_script_element(text: str) -> None:
    for hostile in (text, f"</script>{text}", f"<!--<script>{text}", f"]]>{text}"):
        written = inside_script({"text": hostile, hostile: [1]})
        assert not set(written) & set("<>&")
        assert json.loads(written) == {"text": hostile, hostile: [1]}


def test_what_json_lacks_becomes_null() -> None:
    given = {"a": math.nan, "b": [np.float64(math.inf), np.int64(3)], "c": np.array([1.5, math.nan]), 7: True}
    assert json.loads(inside_script(given)) == {"a": None, "b": [None, 3], "c": [1.5, None], "7": True}
