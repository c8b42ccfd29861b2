"""Continuations: the cache agrees with no cache, transformers with us; repetition on planted sequences."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models

import spectral_sinks as ss

EXIT = ss.Site("exit", 1)
PROMPTS = tiny_models.ids(3, 10)
CACHED = [
    "llama",
    "mistral",
    "gpt2",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "olmo2",
    "phi3",
    "gpt_oss",
]


def filters(model: ss.LanguageModel) -> dict[str, Any]:
    """Filters of each kind that a continuation can be under."""
    spectrum = ss.read_spectrum(model, bands=4)
    dark, site = ss.remove(spectrum.dark()), EXIT
    mean = torch.randn(40, model.d, generator=torch.Generator().manual_seed(5))
    return {
        "untouched": {},
        "all": {site: dark},
        "first": {site: dark.at("first")},
        "others": {site: dark.at("all-but-first")},
        "ids": {site: dark.at(frozenset(range(0, tiny_models.VOCABULARY, 2)))},
        "mean": {site: dark.filled(ss.Mean(mean))},
        "custom": {site: lambda x: 0.5 * x},
        "several": {ss.Site("embedding"): dark, ss.Site("mlp", 2): dark, ss.Site("head", 0, 1): dark},
    }


@pytest.mark.parametrize("family", CACHED)
def test_the_cache_agrees_with_no_cache_and_changes_nothing_but_time(family: str) -> None:
    model = tiny_models.model(family)
    cells = filters(model)
    for temperature in (0.0, 3.0):
        options = {"new": 8, "temperature": temperature}
        texts, plain = (
            ss.nll.generate_all(model, PROMPTS, cells, cached=c, **options) for c in (True, False)
        )
        for name in cells:
            assert torch.equal(texts[name], plain[name]), name
    assert len({tuple(text.flatten().tolist()) for text in texts.values()}) >= 3, "filters do something"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_is_that_of_transformers(family: str) -> None:
    plain = tiny_models.plain(family)
    expected = plain.generate(
        PROMPTS, do_sample=False, min_new_tokens=8, max_new_tokens=8, attention_mask=torch.ones_like(PROMPTS)
    )
    assert torch.equal(ss.generate(tiny_models.model(family), PROMPTS, new=8)[:, 0], expected[:, 10:])


def test_the_filter_acts_on_the_prompt_and_on_every_new_token() -> None:
    """By hand: at each step the whole text is read again through a hook of torch."""
    plain, spectrum = tiny_models.build(), ss.read_spectrum(tiny_models.model(), bands=4)
    dark = ss.remove(spectrum.dark())
    plain.model.layers[1].register_forward_hook(lambda module, inputs, output: dark(output))
    ids = PROMPTS
    for _ in range(8):
        with torch.no_grad():
            logits = plain(ids, use_cache=False).logits[:, -1]
        logits[:, tiny_models.EOS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ss.generate(tiny_models.model(), PROMPTS, {EXIT: dark}, new=8)[:, 0], ids[:, 10:])


def test_draws_depend_on_nothing_but_their_own() -> None:
    model = tiny_models.model()
    cells = filters(model)
    options = {"new": 6, "temperature": 1.0, "draws": 3}
    together = ss.nll.generate_all(model, PROMPTS, cells, **options)
    assert together["all"].shape == (3, 3, 6)
    for rows in (1, 4, 100):
        again = ss.nll.generate_all(model, PROMPTS, {"all": cells["all"]}, rows=rows, **options)["all"]
        assert torch.equal(again, together["all"])
    assert torch.equal(ss.generate(model, PROMPTS[:1], cells["all"], **options), together["all"][:1])
    assert not torch.equal(together["all"][:, 0], together["all"][:, 1]), "draws differ"
    assert not torch.equal(ss.generate(model, PROMPTS, cells["all"], seed=1, **options), together["all"])
    assert not (together["all"] == tiny_models.EOS).any()


def test_samples_follow_the_distribution() -> None:
    model = tiny_models.model()
    prompt = PROMPTS[:1]
    logits = tiny_models.logits(model, prompt, {})[0, -1].double()
    for temperature in (1.0, 0.5):
        expected = logits.clone()
        expected[tiny_models.EOS] = -torch.inf
        expected = (expected / temperature).softmax(-1)
        drawn = ss.generate(model, prompt, new=1, temperature=temperature, draws=1500, rows=1500).flatten()
        seen = torch.bincount(drawn, minlength=tiny_models.VOCABULARY) / 1500
        spread = (expected * (1 - expected) / 1500).sqrt()
        assert ((seen - expected).abs() < 5 * spread + 1e-3).all()


def test_the_nll_of_continuations() -> None:
    model = tiny_models.model()
    edits = filters(model)["all"]
    texts = ss.generate(model, PROMPTS, new=6, temperature=1.0, draws=2)
    for given_edits in ({}, edits):
        found = ss.nll.continuation_nll(model, PROMPTS, texts, given_edits, rows=4)
        for prompt in range(3):
            for draw in range(2):
                ids = torch.cat([PROMPTS[prompt], texts[prompt, draw]])[None]
                logp = tiny_models.logits(model, ids, given_edits).double().log_softmax(-1)
                hits = logp[0, :-1].gather(-1, ids[0, 1:, None])[9:]
                assert len(hits) == 6 and float(found[prompt, draw]) == pytest.approx(
                    float(-hits.mean()), rel=1e-5
                )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": 0}, "0 new tokens"),
        ({"new": 119}, "context of 128"),
        ({"draws": 2}, "greedy continuations are all the same"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"fill": ss.Noise()}, "not defined for tokens still to be generated"),
        ({"fill": ss.Swap()}, "not defined for tokens still to be generated"),
        ({"tokens": torch.ones(10, dtype=torch.bool)}, "not defined for tokens still to be generated"),
        ({"fill": ss.Mean(torch.zeros(12, tiny_models.D))}, "a mean of 12 positions, 13 are read"),
        ({"prompts": PROMPTS[:, :0]}, "prompts of shape"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    model = tiny_models.model()
    dark = ss.read_spectrum(model, bands=4).dark()
    edit = ss.remove(dark, change.pop("fill", None), change.pop("tokens", "all"))
    prompts = change.pop("prompts", PROMPTS)
    with pytest.raises(ss.InputError, match=message):
        ss.generate(model, prompts, {EXIT: edit}, **{"new": 4} | change)


def test_repeated_ngrams_by_hand() -> None:
    tokens = [1, 2, 3, 1, 2, 3, 1, 4]
    assert ss.nll.repeated(tokens, 1) == 1 - 4 / 8
    assert ss.nll.repeated(tokens, 2) == pytest.approx(1 - 4 / 7)  # 12 23 31 14
    assert ss.nll.repeated(tokens, 4) == pytest.approx(1 - 4 / 5)  # 1231 2312 3123 2314
    assert ss.nll.repeated([5] * 10, 4) == pytest.approx(1 - 1 / 7)
    assert ss.nll.distinct([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    for call in (lambda: ss.nll.repeated([1], 2), lambda: ss.nll.distinct([[1]], 2)):
        with pytest.raises(ss.InputError):
            call()


@given(
    before=st.lists(st.integers(100, 10**6), max_size=20, unique=True),
    period=st.lists(st.integers(0, 99), min_size=1, max_size=7, unique=True),
    passes=st.integers(1, 6),
    more=st.integers(0, 6),
)
def test_a_planted_loop_is_found_where_it_begins(
    before: list[int], period: list[int], passes: int, more: int
) -> None:
    tail = (period * (passes + 2))[: passes * len(period) + more % len(period)]
    found = ss.nll.loop_onset(before + tail)
    if passes >= 3 and len(tail) >= 12:
        assert found == len(before)
    else:
        assert found is None


def test_no_loop() -> None:
    assert ss.nll.loop_onset(list(range(30))) is None
    assert ss.nll.loop_onset([1, 2] * 10 + [3]) is None, "it ended"
    assert ss.nll.loop_onset([7] * 11) is None and ss.nll.loop_onset([7] * 12) == 0
    assert ss.nll.loop_onset([]) is None


def test_the_table() -> None:
    loop = torch.tensor([[9, 9, 8, 7] * 4, list(range(20, 36))])
    continuations = torch.stack([loop, loop.flip(0)])
    prompts = torch.tensor([[1, 9, 9, 8, 7, 9], [20, 21, 22, 23, 24, 25]])
    table = ss.nll.repetition(continuations, prompts)
    assert list(zip(table["document"], table["draw"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(table["loops"]) == [1, 0, 0, 1] and list(table["onset"]) == [0, 16, 16, 0]
    assert table["seq_rep_4"].tolist() == pytest.approx([1 - 4 / 13, 0, 0, 1 - 4 / 13])
    assert table["rep_1"].tolist() == pytest.approx([1 - 3 / 16, 0, 0, 1 - 3 / 16])
    assert table["copied_4"].tolist() == pytest.approx([7 / 13, 0, 3 / 13, 0])
    assert np.isfinite(table.to_numpy()).all()


@pytest.fixture(scope="module")
def experiment() -> Any:
    path = Path(__file__).parents[3] / "experiments" / "generation.py"
    spec = importlib.util.spec_from_file_location("generation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_experiment(
    experiment: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "NEW", 14)
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(tiny_models.ids(3, 66), model)
    u, e = (ss.read_spectrum(model, matrix) for matrix in ("unembedding", "embedding"))
    finding = experiment.run(ss.experiments.Study(model, windows, u, e, tmp_path, draws=2))
    table = pd.read_csv(tmp_path / "generation.csv").set_index(["measure", "decoding", "filter", "removed"])
    assert len(table) == 9 * 2 * (1 + 3 * 4) and finding.verdict.startswith(("holds", "does not"))
    prompts = torch.stack([row[:32] for row in windows.rows])
    site = ss.Site.parse(*str(table["site"].iloc[0]).split()[:1], layer=int(str(table["site"].iloc[0])[-1]))
    for name, chosen in (("Phi", ss.phi(u, 1, 18)), ("Psi", ss.psi(u, e, 18)), ("Omega", ss.omega(u, 17))):
        texts = ss.generate(model, prompts, {site: chosen}, new=14)
        rows = ss.nll.repetition(texts, prompts)
        for measure in ("rep_1", "seq_rep_4", "loops", "onset"):
            found = table.loc[(measure, "greedy", name, 0.1)]
            assert found["mean"] == pytest.approx(rows[measure].mean(), rel=1e-4)
            assert found["rank"] == chosen.rank
    drawn = [ss.generate(model, prompts, {site: ss.rnd(u.d, 3, s)}, new=14) for s in range(2)]
    repeats = [ss.nll.repetition(texts, prompts)["rep_1"].mean() for texts in drawn]
    found = table.loc[("rep_1", "greedy", "Rnd", 0.1)]
    assert (found["least"], found["most"]) == pytest.approx((min(repeats), max(repeats)), rel=1e-4)


@pytest.mark.parametrize(
    ("loops", "repeats", "verdict"),
    [
        ((0.6, 0.5, 0.3), (0.4, 0.3, 0.2), "holds:"),
        ((0.6, 0.2, 0.3), (0.4, 0.3, 0.2), "holds partly:"),
        ((0.6, 0.2, 0.3), (0.2, 0.1, 0.2), "holds partly:"),
        ((0.6, 0.2, -0.1), (0.2, 0.1, 0.2), "does not hold here:"),
    ],
)
def test_the_verdict_of_the_experiment(experiment: Any, loops: Any, repeats: Any, verdict: str) -> None:
    rows = []
    for (decoding, measure), numbers in zip(experiment.JUDGED, (loops, repeats), strict=True):
        keys = {"measure": measure, "decoding": decoding, "removed": 0.05}
        phi = dict(zip(("mean", "low", "difference_low"), numbers, strict=True))
        rows += [keys | {"filter": "Phi", "high": 0.9} | phi, keys | {"filter": "Rnd", "most": 0.25}]
    assert experiment.judged(pd.DataFrame(rows)).startswith(verdict)


@pytest.mark.parametrize("tokens", ["first", "all-but-first"])
def test_a_restored_norm_acts_on_the_tokens_of_the_text(tokens: Any) -> None:
    model, prompts = tiny_models.model(), tiny_models.ids(3, 6)
    removed = ss.remove(ss.spectra.random_subspace(model.d, 20, 0), tokens=tokens)
    edits = {ss.Site("exit", 0): ss.spectra.NormRestored(removed)}
    cached, whole = (ss.generate(model, prompts, edits, new=6, cached=c) for c in (True, False))
    assert torch.equal(cached, whole)
