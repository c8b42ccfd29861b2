"""Moves of attention and functions of a user's own, where the model is."""

from contextlib import ExitStack
from typing import Any

import pandas as pd
import pytest
import torch
from support import tiny_models
from support.user_functions import (
    Halved,
    Tally,
    apart,
    entropies,
    grid,
    halved,
    optioned,
    returned,
    room,
    spread,
)

import spectral_sinks as ss

TOKENS = 66


def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(5, TOKENS), model, [0, 0, 1, 2, 3])


def spectrum(model: ss.LanguageModel) -> ss.Spectrum:
    return ss.read_spectrum(model, bands=4, use_cache=False)


def difference(one: pd.DataFrame, other: pd.DataFrame) -> float:
    numbers = one.select_dtypes("number").columns
    assert list(one.columns) == list(other.columns) and one[numbers].notna().any().all()
    return float((one[numbers] - other[numbers]).abs().max().max())


MOVES: dict[str, tuple[Any, ...]] = {
    "none": (lambda call: None,),
    "mask": (ss.attention.MaskKey(0),),
    "own, then mask": (halved, ss.attention.MaskKey(1, heads={0, 2})),
    "value, then half of it": (ss.attention.SetValue(0, torch.ones(3, 2, 8)), halved),
    "logit": (ss.attention.SinkLogit(torch.ones(4)),),
    "key": (ss.attention.KeyBias(torch.ones(1, 2, 8)),),
    "stream": (ss.attention.Streaming(1, 9, layers={1}),),
}


@pytest.mark.parametrize("name", MOVES)
def test_attention_is_changed_elsewhere_as_it_is_here(name: str) -> None:
    model = tiny_models.model()
    u, there = spectrum(model), ss.load(model, remote="local")
    cell, found = {ss.Site("exit", 0): ss.remove(u.dark())}, []
    for each in (model, there):
        with ExitStack() as stack:
            for look in MOVES[name]:
                stack.enter_context(ss.attending(each, look))
            found.append(ss.evaluate(each, windows(model), cell))
    assert difference(found[0].table, found[1].table) < 1e-6
    plain = ss.evaluate(model, windows(model), cell)
    assert (abs(found[0].baseline_nll - plain.baseline_nll) > 1e-4) == (name != "none")
    after = ss.evaluate(there, windows(model), cell)
    assert difference(after.table, plain.table) < 1e-6, "the moves outlive their block"


def test_what_a_look_collects_elsewhere_would_be_lost_so_it_is_refused() -> None:
    there = ss.load(tiny_models.model(), remote="local")
    seen: list[Any] = []

    class Counter:
        calls = 0

        def __call__(self, call: ss.attention.AttentionCall) -> None:
            self.calls += 1

    def keep(call: ss.attention.AttentionCall) -> None:
        seen.append(call.layer)

    for look, name in ((seen.append, "list.append"), (keep, "keep"), (Counter(), "Counter")):
        with (
            pytest.raises(ss.InputError, match=rf"{name} is changed by what it sees .* `remotely`"),
            ss.attending(there, look),
        ):
            ss.attention_by_head(there, windows(there))
    assert not seen and not there.remote.hooks
    with (
        pytest.raises(ss.InputError, match=r"layer 9: .* layers 0 to 2"),
        ss.attending(there, ss.attention.MaskKey(0, layers={9})),
    ):
        pass


def test_a_function_of_ones_own_runs_where_the_model_is() -> None:
    model = tiny_models.model()
    there = ss.load(model, remote="local")
    here = entropies(model, tiny_models.ids(2, 9), power=1.0)
    assert len(here) == 3 and (here.abs() > 0.1).all()
    assert torch.equal(entropies(there, tiny_models.ids(2, 9), power=1.0), here)
    assert there.remote.jobs[-1].payload < 3000
    there.remote.jobs.clear()
    assert (
        spread(there, tiny_models.ids(2, 9)) == spread(model, tiny_models.ids(2, 9))
        and len(there.remote.jobs) == 1
    )
    with pytest.raises(ModuleNotFoundError, match=r"spectral_sinks\.sweeps does not run at the server"):
        grid(there)
    assert grid(model) is ss.grid


def test_the_model_itself_is_a_reference_and_another_is_refused() -> None:
    here, other = tiny_models.model(), tiny_models.model("gpt2")
    there = ss.load(here, remote="local")
    assert apart(there, here, tiny_models.ids(1, 5)) == 0 == apart(here, there, tiny_models.ids(1, 5))
    with pytest.raises(ss.InputError, match=r"is another model than .* call the function for each"):
        apart(there, other, tiny_models.ids(1, 5))
    with pytest.raises(ss.InputError, match="is a part of the model and stays where that is"):
        optioned(there, function=here.module)
    assert apart(here, other, tiny_models.ids(1, 5)) > 0.01


def test_classes_of_ones_own_are_made_from_those_of_the_far_end() -> None:
    model = tiny_models.model()
    there, w = ss.load(model, remote="local"), windows(model)
    cell = {ss.Site("exit", 0): ss.remove(spectrum(model).dark())}
    for _ in range(2):  # a class that an earlier job has made is not this one's
        found = []
        for each in (model, there):
            with ss.attending(each, Halved(layers={1})):
                found.append(ss.evaluate(each, w, cell))
        assert difference(found[0].table, found[1].table) < 1e-6
    assert returned(there, "tally") == Tally(3) and isinstance(returned(there, "tally"), Tally)


@pytest.mark.usefixtures("unchecked")
def test_arguments_by_name_and_what_cannot_come_back() -> None:
    there = ss.load(tiny_models.model(), remote="local")
    assert (
        optioned(there, function=2, job="x") == optioned(tiny_models.model(), function=2, job="x") == (2, "x")
    )
    assert room(there) == "spectral_sinks.stats"
    assert torch.equal(returned(there, "conjugate"), returned(tiny_models.model(), "conjugate"))
    for what in ("lock", "sparse"):
        with pytest.raises(ss.InputError, match="cannot be sent to a server or back"):
            returned(there, what)
    with (
        pytest.raises(ss.InputError, match="'mask' is not a function of an AttentionCall"),
        ss.attending(there, "mask"),
    ):
        pass
