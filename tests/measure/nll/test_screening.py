"""A screen: what it confirms, recomputed from planted intervals, and the marks of what it does not."""

from typing import cast

import numpy as np
import pandas as pd
import pytest
from support import tiny_models

import spectral_sinks as ss
from spectral_sinks.measure.nll import screening

EXIT = ss.Site("exit", 1)


def planted(mean: float, error: float, name: str = "planted") -> ss.Effect:
    """Make the effect of one document whose NLL difference has a standard error due to its sample."""
    table = pd.DataFrame({"document": [0], "delta_nll": [mean], "delta_nll_sampling_error": [error]})
    return ss.Effect(name, (), (), table, 8)


def test_what_may_lie_on_either_side_is_open():
    effects = {"far below": planted(0, 0.1), "near": planted(0.8, 0.1), "far above": planted(2, 0.1)}
    assert screening.undecided(effects, 1, 0) == ["near"]
    assert screening.undecided(effects, 5, 0) == []
    # of three cells, the interval is that of 1 - 0.05 / 3: 2.394 standard errors to either side
    for distance, expected in ((0.2390, ["x"]), (0.2400, [])):
        some = {"x": planted(1 + distance, 0.1), "y": planted(9, 0.1), "z": planted(-9, 0.1)}
        assert screening.undecided(some, 1, 0) == expected


def test_what_may_be_among_the_largest_is_open():
    effects = {"a": planted(0, 0.1), "b": planted(2.9, 0.1), "c": planted(3, 0.1), "d": planted(9, 0.1)}
    assert screening.undecided(effects, None, 1) == ["d"]
    assert screening.undecided(effects, None, 2) == ["b", "c", "d"]
    assert screening.undecided(effects, None, 7) == list(effects)
    assert screening.undecided(effects, 0, 1) == ["a", "d"]


def test_confirmed_numbers_are_exact_and_the_others_are_marked():
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(4, 70), model)
    cells = {f"{rank}": {EXIT: ss.rnd(model.d, rank, 0)} for rank in (1, 2, model.d)}
    exact = ss.evaluate_all(model, windows, cells)
    found = ss.nll.screen(model, windows, cells, predict=30, largest=1)
    far = ss.nll.screen(model, windows, cells, predict=30, threshold=50.0)
    assert list(found) == list(far) == list(exact)
    confirmed = [name for name, effect in found.items() if effect.predict is None]
    assert max(exact, key=lambda name: exact[name].delta_nll) in confirmed
    for name in confirmed:
        pd.testing.assert_frame_equal(found[name].table, exact[name].table)
    for effect in [*far.values(), *(found[name] for name in found if name not in confirmed)]:
        assert effect.predict == effect.table.attrs["predict"] == effect.record()["predict"] == 30
    mixed = ss.sweeps.effect_table(far | {"exact": exact["1"]}).set_index("name")
    assert mixed["exact"].tolist() == [False, False, False, True]
    assert "exact" not in ss.sweeps.effect_table(exact)


@pytest.mark.parametrize("options", [{}, {"largest": -1}, {"threshold": 1.0, "largest": -1}])
def test_a_screen_without_a_question(options):
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 20), model)
    with pytest.raises(ss.InputError, match="give a threshold, or largest=5"):
        ss.nll.screen(model, windows, {"none": {}}, **options)


def test_a_threshold_that_is_no_number_is_refused():
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 20), model)
    with pytest.raises(ss.InputError, match="threshold nan"):
        ss.nll.screen(model, windows, {"none": {}}, threshold=float("nan"))


@pytest.mark.usefixtures("unchecked")
def test_the_number_of_predictions_may_be_an_integer_of_numpy():
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 20), model)
    few, same = (
        ss.evaluate(model, windows, {EXIT: ss.rnd(model.d, 2, 0)}, predict=count)
        for count in (4, cast(int, np.int64(4)))
    )
    pd.testing.assert_frame_equal(few.table, same.table)
