"""A sample of predictions: its mean recomputed by hand, its interval over seeds, and its marks."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from torch.nn.functional import log_softmax

import spectral_sinks as ss
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.nll.scoring import score
from spectral_sinks.models.masked_lm import masked_ids

EXIT = ss.Site("exit", 1)
COUNT = 12


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return tiny_models.model()


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    rows = [*tiny_models.ids(4, 70), *tiny_models.ids(2, 40, seed=1)]
    return ss.Windows.of_ids(rows, model, [0, 0, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def cells(model: ss.LanguageModel) -> dict[str, dict[ss.Site, ss.Filter]]:
    spectrum = ss.read_spectrum(model, bands=8)
    other = ss.Site("exit", 0)
    return {
        "none": {},
        "dark": {EXIT: ss.remove(spectrum.dark())},
        "head": {other: ss.remove(spectrum.bands(1, 4))},
    }


def by_token(model: ss.LanguageModel, row: torch.Tensor, edit: ss.Filter | None) -> torch.Tensor:
    """Return the NLL of every predicted token of a window, from hooks on the plain module."""
    layer = model.module.get_submodule(model.layout.layers)[EXIT.layer]

    def change(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output if edit is None else edit(output)

    handle = layer.register_forward_hook(change)
    with torch.no_grad():
        logits = model.module(row[None], use_cache=False).logits[0, :-1].double()
    handle.remove()
    return -log_softmax(logits, -1).gather(1, row[1:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_mean_is_that_of_the_drawn_positions(
    model: ss.LanguageModel, windows: ss.Windows, cells: dict[str, dict[ss.Site, ss.Filter]], batch_size: int
) -> None:
    sample = ss.nll.Sample(COUNT, seed=3)
    table = ss.evaluate_all(model, windows, cells, batch_size=batch_size, predict=sample)["dark"].table
    edit = cells["dark"][EXIT]
    for document, row in table.set_index("document").iterrows():
        own = [i for i, owner in enumerate(windows.document) if owner == document]
        means, errors = [], []
        for index in own:
            ids = windows.rows[index]
            drawn = np.random.default_rng((3, index)).choice(len(ids) - 1, COUNT, replace=False)
            before, after = by_token(model, ids, None)[drawn], by_token(model, ids, edit)[drawn]
            means.append((float(before.mean()), float(after.mean())))
            errors.append(float((after - before).var()) * (1 / COUNT - 1 / (len(ids) - 1)))
        weights = np.array([len(windows.rows[index]) - 1 for index in own]) / row["tokens"]
        assert row["baseline_nll"] == pytest.approx(weights @ [mean[0] for mean in means], abs=1e-6)
        assert row["nll"] == pytest.approx(weights @ [mean[1] for mean in means], abs=1e-6)
        assert row["delta_nll_sampling_error"] == pytest.approx(np.sqrt(weights**2 @ errors), abs=1e-6)
        assert row["scored"] == COUNT * len(own)


def test_the_interval_covers_the_full_value(
    model: ss.LanguageModel, windows: ss.Windows, cells: dict[str, dict[ss.Site, ss.Filter]]
) -> None:
    # the errors of a table, which the test above recomputes, over many seeds at once
    edit = cells["dark"][EXIT]
    changes = [(by_token(model, row, edit) - by_token(model, row, None)).numpy() for row in windows.rows]
    full = np.mean([change.mean() for change in changes])
    hits = []
    for seed in range(300):
        sample = ss.nll.Sample(COUNT, seed)
        drawn = [own[sample.drawn(index, len(own)).numpy()] for index, own in enumerate(changes)]
        table = pd.DataFrame({"delta_nll": [own.mean() for own in drawn]})
        left_out = np.array([1 / COUNT - 1 / len(own) for own in changes])
        table["delta_nll_sampling_error"] = np.sqrt(left_out * [own.var(ddof=1) for own in drawn])
        low, high = ss.nll.Effect("dark", (EXIT,), (1,), table, COUNT).sampling_interval("delta_nll")
        hits.append(low <= full <= high)
    assert 0.91 <= np.mean(hits) <= 0.985


def test_a_sample_of_all_is_exact(
    model: ss.LanguageModel, windows: ss.Windows, cells: dict[str, dict[ss.Site, ss.Filter]]
) -> None:
    full = ss.evaluate_all(model, windows, cells)
    found = ss.evaluate_all(model, windows, cells, predict=1000)
    for name in cells:
        shared = full[name].table
        np.testing.assert_allclose(found[name].table[shared.columns], shared, atol=1e-6)
        assert (found[name].table.filter(like="_sampling_error") == 0).all(axis=None)


def test_a_sample_is_marked(
    model: ss.LanguageModel, windows: ss.Windows, cells: dict[str, dict[ss.Site, ss.Filter]]
) -> None:
    exact = ss.evaluate(model, windows, cells["dark"])
    found = ss.evaluate(model, windows, cells["dark"], predict=COUNT)
    assert found.predict == found.table.attrs["predict"] == found.record()["predict"] == COUNT
    assert "12 predictions of each window" in repr(found) and "sampled" not in repr(exact)
    assert exact.predict is None and "predict" not in exact.record() and not exact.table.attrs
    low, high = exact.sampling_interval("nll")
    assert low == high == exact.nll
    json.dumps(found.record())
    # sink mass is read at all positions
    long = ss.Windows.of_ids(windows.rows[:4], model)
    masses = [ss.evaluate(model, long, cells["dark"], predict=n).sink_mass for n in (None, COUNT)]
    assert masses[0] is not None and masses[0] == masses[1]


def test_the_ladder_is_marked(model: ss.LanguageModel, windows: ss.Windows) -> None:
    spectra = [ss.read_spectrum(model, matrix, bands=4) for matrix in ("unembedding", "embedding")]
    table = ss.sweeps.ladder(model, windows, EXIT, *spectra, kept=[1, 2], random_at=[], predict=COUNT)
    assert table.attrs["predict"] == COUNT
    assert (table["sampling_low"] < table["mean"]).all() and (table["mean"] < table["sampling_high"]).all()
    exact = ss.sweeps.ladder(model, windows, EXIT, *spectra, kept=[1, 2], random_at=[])
    assert "predict" not in exact.attrs and "sampling_low" not in exact.columns


def test_an_encoder_scores_some_of_its_masked_tokens() -> None:
    model = tiny_models.model("bert")
    windows = ss.Windows.of_ids(tiny_models.ids(3, 60), model)
    batch = torch.stack(windows.rows)
    each = trace(
        model, masked_ids(model, batch), {}, readout=lambda final, *_: score(model, final, batch).nll
    )
    sample = ss.nll.Sample(4, seed=1)
    expected = [own[sample.drawn(index, len(own))].mean().item() for index, own in enumerate(each)]
    found = ss.evaluate(model, windows, {}, predict=sample)
    np.testing.assert_allclose(found.table["nll"], expected, atol=1e-6)
    assert found.table["scored"].tolist() == [4, 4, 4]


def test_bad_samples_are_refused(model: ss.LanguageModel, windows: ss.Windows) -> None:
    with pytest.raises(ss.InputError, match="predict 1: give at least 2"):
        ss.evaluate(model, windows, {}, predict=1)
    with pytest.raises(ss.InputError, match="no sampling interval"):
        ss.evaluate(model, windows, {}).sampling_interval("rank")
