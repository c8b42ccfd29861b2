"""The embedded model is what its card says."""

from pathlib import Path

import pytest
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_sinks as ss
from spectral_sinks.models.embedded import FOLDER

ROOT = Path(__file__).parent.parent
SITE = ss.Site("exit", 0)


@pytest.fixture(scope="module")
def model():
    return ss.load()


@pytest.fixture(scope="module")
def windows(model):
    return ss.cut(ss.documents(limit=12), model, per_document=1)


def test_transformers_loads_the_folder(model):
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "sinklet")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "sinklet")
    ids = tokenizer("The sink", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == model.bos
    assert plain(ids).logits.shape == (1, ids.shape[1], model.vocabulary)
    assert sum(path.stat().st_size for path in (FOLDER / "sinklet").iterdir()) < 10 * 2**20


@pytest.mark.parametrize("form", ["nnsight", "nnsight on meta", "device_map"])
def test_other_ways_to_load_it_give_the_same(model, windows, form):
    folder = str(FOLDER / "sinklet")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"task": "text-generation", "tokenizer": tokenizer, "attn_implementation": "eager"}
    if form == "device_map":
        other = ss.load(device_map="cpu")
    else:
        wrapped = TransformersModel(folder, **options, dispatch=form == "nnsight")
        other = ss.load(wrapped)
        assert other.nn is wrapped
    nll = ss.evaluate(model, windows, {}).nll
    assert ss.evaluate(other, windows, {}).nll == pytest.approx(
        nll, abs=1e-6
    )  # another kernel rounds otherwise


def test_the_sink_is_strong_and_dark(model, windows):
    heads = ss.attention_by_head(model, windows)
    assert (heads["attention"] > 0.3).mean() >= 0.4
    shares = ss.energy(model, windows, ss.read_spectrum(model), [SITE])
    dark = shares[shares["band"] == 20].groupby("position_class")[["share", "norm"]].mean()
    assert dark["norm"]["bos"] >= 5 * dark["norm"]["other"]
    assert dark["share"]["bos"] > 5 * dark["share"]["other"]


def test_what_its_card_states_without_a_table(model, windows):
    assert f"{sum(p.numel() for p in model.module.parameters()) / 1e6:.2f}" == "1.80"
    shares = ss.energy(model, windows, ss.read_spectrum(model, bands=128), [SITE])
    last = shares[(shares["band"] == 128) & (shares["position_class"] == "bos")]
    assert f"{last['share'].mean():.2f}" == "0.48"


def test_removing_the_dark_band_removes_the_sink_and_no_random_one_does(model, windows):
    spectrum = ss.read_spectrum(model)
    dark = spectrum.dark()
    cells = {"dark": {SITE: ss.remove(dark)}, "rest": {SITE: ss.remove(dark, tokens="all-but-first")}}
    cells |= {"first": {SITE: ss.remove(dark, tokens="first")}}
    cells |= {"Omega": {SITE: ss.omega(spectrum, 14)}, "Phi": {SITE: ss.phi(spectrum, 1, 14)}}
    cells |= {f"random {seed}": {SITE: ss.rnd(model.d, dark.rank, seed)} for seed in range(20)}
    effects = ss.evaluate_all(model, windows, cells)

    def cut(name):
        return 1 - effects[name].sink_mass[1] / effects[name].baseline_sink_mass[1]

    random = [f"random {seed}" for seed in range(20)]
    assert cut("dark") >= 0.7
    assert max(map(cut, random)) < 0.25
    assert effects["dark"].delta_nll > max(effects[name].delta_nll for name in random)
    assert effects["first"].delta_nll > effects["rest"].delta_nll
    assert effects["Omega"].delta_nll < 0.6 * effects["Phi"].delta_nll


def test_no_training_text_is_in_the_corpus_twice():
    texts = ss.documents()
    assert len(texts) == len(set(texts)) == 96
