"""The lens by band against the norm and the unembedding applied directly, in float64."""

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure.residual.logit_lens import Reader, norm_scale

IDS = tiny_models.ids(4, 15, seed=6)
LENS_FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "gpt_neox", "qwen2", "olmo2"]


def residual(model: ss.LanguageModel, site: ss.Site) -> Tensor:
    return ss.trace(model, IDS, {}, [site], readout=lambda final, read, weights: read[site])


def direct(model: ss.LanguageModel, x: Tensor, spectrum: ss.Spectrum, start: int, stop: int) -> Tensor:
    """Logits of the norm, with the scale of all of x, on the part of x in some bands: by projectors, fp64."""
    x = x.double()
    basis = spectrum.vectors[:, spectrum.edges[start] : spectrum.edges[stop]]
    norm = model.module.get_submodule(model.layout.final_norm)
    head = model.module.get_submodule(model.layout.unembedding)
    part = x @ basis @ basis.T
    weight = norm.weight.detach().double() + ("gemma" in model.family)
    if isinstance(norm, torch.nn.LayerNorm):
        spread = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        final = (part - part.mean(-1, keepdim=True)) / spread * weight + norm.bias.detach().double()
    else:
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        final = part / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    logits = final @ head.weight.detach().double().T
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("family", LENS_FAMILIES)
@pytest.mark.parametrize("own", [True, False])
def test_against_the_direct_computation(family: str, own: bool) -> None:
    model = tiny_models.model(family)
    spectrum = ss.read_spectrum(model, bands=5) if own else ss.spectra.random_spectrum(32, 5, seed=3)
    sites = [ss.Site("embedding"), ss.Site("exit", 1), ss.Site("exit", 2)]
    owner = [0, 0, 1, 2]
    table = ss.residual.band_lens(
        model, ss.Windows.of_ids(IDS, model, owner), {"x": spectrum}, sites, batch_size=3
    ).set_index(["document", "layer", "reading", "band"])
    assert len(table) == 3 * 3 * 2 * 5
    truth = tiny_models.logits(model, IDS, {})[:, :-1].double().log_softmax(-1)
    targets = IDS[:, 1:, None]
    for site in sites:
        layer = -1 if site.kind == "embedding" else site.layer
        x = residual(model, site)[:, :-1]
        for band in range(1, 6):
            for reading, start in ((ss.residual.TOGETHER, 0), (ss.residual.ALONE, band - 1)):
                logits = direct(model, x, spectrum, start, band)
                other = logits.log_softmax(-1)
                nll = -other.gather(-1, targets)[..., 0].mean(1)
                kl = (truth.exp() * (truth - other)).sum(-1).mean(1)
                top = truth.argmax(-1)
                agree = (logits.gather(-1, top[..., None])[..., 0] >= logits.amax(-1) - 1e-9).double().mean(1)
                for document, rows in enumerate(([0, 1], [2], [3])):
                    found = table.loc[(document, layer, reading, band)]
                    assert found["nll"] == pytest.approx(float(nll[rows].mean()), rel=2e-5)
                    assert found["kl"] == pytest.approx(float(kl[rows].mean()), abs=2e-4)
                    assert found["top1"] == pytest.approx(float(agree[rows].mean()), abs=1e-9)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_bands_at_the_last_exit_are_the_model(family: str) -> None:
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(IDS, model)
    table = ss.residual.band_lens(
        model, windows, {"r": ss.spectra.random_spectrum(32, 4)}, [ss.Site("exit", 2)], bands=[4]
    )
    table = table[table["reading"] == ss.residual.TOGETHER]
    nll = ss.evaluate(model, windows, {}).table["nll"]
    assert np.allclose(table["nll"], nll, atol=1e-5)
    assert np.allclose(table["kl"], 0, atol=1e-5) and (table["top1"] == 1).all()


def test_bases_together_are_bases_alone_and_chosen_bands_are_some_of_all() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(IDS, model)
    bases = {"U": ss.read_spectrum(model, bands=4), "R": ss.spectra.random_spectrum(32, 8, seed=1)}
    together = ss.residual.band_lens(model, windows, bases)
    for name, spectrum in bases.items():
        alone = ss.residual.band_lens(model, windows, {name: spectrum}, batch_size=2)
        part = together[together["basis"] == name]
        both = part.merge(alone, on=["document", "site", "layer", "basis", "reading", "band"])
        assert len(both) == len(part) == len(alone)
        for score in ("nll", "kl", "top1"):
            assert np.allclose(both[f"{score}_x"], both[f"{score}_y"], atol=1e-5)
    some = ss.residual.band_lens(model, windows, bases, bands=(2, 4), alone=False)
    keep = together["band"].isin([2, 4]) & (together["reading"] == ss.residual.TOGETHER)
    assert np.allclose(some["nll"], together[keep]["nll"], atol=1e-5)
    with pytest.raises(ss.InputError, match=r"bands \[5\]: .* has bands 1 to 4"):
        ss.residual.band_lens(model, windows, bases, bands=[5])


def test_a_sample_is_the_mean_over_the_predictions_that_are_drawn() -> None:
    """Against the logits of the model at all positions, of which the sample's are picked here."""
    model = tiny_models.model()
    windows = ss.Windows.of_ids(IDS, model)
    sample = ss.nll.Sample(5, seed=3)
    last, u = ss.Site("exit", 2), ss.read_spectrum(model, bands=4)
    for batch_size in (None, 3):
        table = ss.residual.band_lens(
            model, windows, {"U": u}, [last], bands=[2], alone=False, batch_size=batch_size, predict=sample
        )
        assert table.attrs["predict"] == 5
        other = direct(model, residual(model, last)[:, :-1], u, 0, 2).log_softmax(-1)
        nll = -other.gather(-1, IDS[:, 1:, None])[..., 0]
        drawn = [float(nll[window, sample.drawn(window, 14)].mean()) for window in range(4)]
        assert table["nll"].tolist() == pytest.approx(drawn, rel=2e-5)
    every = ss.residual.band_lens(model, windows, {"U": u}, [last], bands=[2], predict=100)
    whole = ss.residual.band_lens(model, windows, {"U": u}, [last], bands=[2])
    assert np.allclose(every["nll"], whole["nll"], atol=1e-6) and "predict" not in whole.attrs
    with pytest.raises(ss.InputError, match="predict 1: give at least 2 predictions"):
        ss.residual.band_lens(model, windows, {"U": u}, predict=1)


def test_a_band_that_the_vocabulary_does_not_read_changes_nothing() -> None:
    module = tiny_models.build()
    with torch.no_grad():
        basis = ss.random_subspace(32, 4, seed=9).basis.float()
        gain = module.model.norm.weight
        module.lm_head.weight -= module.lm_head.weight * gain @ basis @ basis.T / gain
    model = ss.load(module)
    u = ss.read_spectrum(model, bands=8, convention="folded")
    table = ss.residual.band_lens(model, ss.Windows.of_ids(IDS, model), {"U": u}, [ss.Site("exit", 2)])
    rows = table[table["reading"] == ss.residual.TOGETHER].set_index(["document", "band"])
    seven, eight = rows.xs(7, level="band"), rows.xs(8, level="band")
    assert np.allclose(seven["nll"], eight["nll"], atol=1e-4) and (seven["top1"] == 1).all()
    dark = table[(table["reading"] == ss.residual.ALONE) & (table["band"] == 8)]
    assert np.allclose(dark["nll"], np.log(tiny_models.VOCABULARY), atol=1e-4), "alone it predicts nothing"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_scale_of_the_norm(family: str) -> None:
    model = tiny_models.model(family)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * 3
    spread = x - x.mean(-1, keepdim=True) if family == "gpt2" else x
    assert torch.allclose(norm_scale(model, x), spread.square().mean(-1, keepdim=True).rsqrt(), rtol=1e-4)


def test_bad_input() -> None:
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match=r"width 16 for .* of width 32"):
        Reader.of(model, ss.spectra.random_spectrum(16, 4))
    odd = ss.load(tiny_models.build())
    norm = odd.module.model.norm
    norm.forward = lambda x: torch.tanh(x) * norm.weight
    with pytest.raises(ss.InputError, match=r"cannot be split by band|not understood as a norm"):
        norm_scale(odd, torch.randn(5, 32) * 3)
