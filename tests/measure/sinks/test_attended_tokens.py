"""The most attended tokens: what is marked, dealt, removed and found."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from support.tiny_study import study

import spectral_sinks as ss
from spectral_sinks.measure.sinks.attended_tokens import removal, shuffled


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> ss.experiments.Study:
    return study(tiny_models.model(), tmp_path_factory.mktemp("attended"))


@pytest.fixture(scope="module")
def table(given: ss.experiments.Study) -> pd.DataFrame:
    return ss.sinks.attended(given.model, given.windows, given.unembedding, draws=given.draws)


@pytest.fixture(scope="module")
def inner(table: pd.DataFrame) -> pd.DataFrame:
    return ss.sinks.most_attended(table)


def test_relative_attention_is_that_of_a_loop(given: ss.experiments.Study, table: pd.DataFrame) -> None:
    """From eager maps: later queries only, over what each would give if it looked evenly; 1 where all do."""
    ids = given.windows.rows[1]
    with torch.no_grad():
        maps = tiny_models.plain()(ids[None], output_attentions=True).attentions
    own = table[(table["window"] == 1) & (table["layer"] == 2)].set_index("position")
    for k in (0, 5, 40):
        later = range(k + 1, len(ids))
        attention = np.mean([float(maps[2][0, :, i, k].mean()) for i in later])
        even = np.mean([1 / (i + 1) for i in later])
        assert own.loc[k, "relative"] == pytest.approx(attention / even, rel=1e-4)
    assert (own["late"] == (own.index >= 35)).all()


def test_labels_stay_in_their_stratum(inner: pd.DataFrame) -> None:
    part = inner[inner["layer"] == 1]
    drawn = [shuffled(part, seed) for seed in range(200)]
    count = part["top"].groupby(part["stratum"]).sum()
    for dealt in drawn[:20]:
        assert (pd.Series(dealt, part.index).groupby(part["stratum"]).sum() == count).all()
    assert any((dealt != part["top"]).any() for dealt in drawn)
    chance = part.groupby("stratum")["top"].transform("mean")
    assert np.mean(drawn, axis=0) == pytest.approx(chance.to_numpy(), abs=0.2), "each with the same chance"


def test_a_planted_difference_is_found_and_its_absence_too(inner: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    noise = inner.assign(dark=rng.random(len(inner)))
    assert (ss.sinks.attended_darkness(noise)[0]["p_holm"] > 0.05).all()
    found, excess = ss.sinks.attended_darkness(noise.assign(dark=0.1 * noise["dark"] + noise["top"]))
    assert (found["p_holm"] < 0.05).all() and found["excess"].to_numpy() == pytest.approx(1, abs=0.1)
    assert found["excess"].mean() == pytest.approx(excess.mean(), abs=0.01)
    # darkness of frequent tokens, not of attended ones
    frequent = noise.assign(dark=noise["stratum"] + 0.01 * noise["dark"])
    assert ss.sinks.attended_darkness(frequent)[0]["excess"].abs().max() < 0.02


def test_the_band_leaves_these_tokens_only(given: ss.experiments.Study, inner: pd.DataFrame) -> None:
    effects = removal(given.model, given.windows, given.unembedding.dark(), inner, range(2))
    assert set(effects["kind"]) == {"most attended", "matched", "random"}
    top = inner[inner["top"] & (inner["layer"] == 2)]
    own = effects[(effects["layer"] == 2) & (effects["kind"] == "most attended")].set_index("document")
    for document in (0, 3):
        alone = ss.Windows.of_ids([given.windows.rows[document]], given.model, [document])
        places = top[top["document"] == document]["position"].tolist()
        edit = ss.remove(given.unembedding.dark(), tokens=ss.At(*places))
        direct = ss.evaluate(given.model, alone, {ss.Site("exit", 1): edit})
        assert own.loc[document, "delta_nll"] == pytest.approx(direct.delta_nll, abs=1e-5)
