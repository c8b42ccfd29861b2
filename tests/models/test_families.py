"""Every supported family: parts found, filters at every site equal hooks written by hand for that family."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support import tiny_models
from support.reference_hooks import head_size, hooked
from torch import Tensor

import spectral_sinks as ss

IDS = tiny_models.ids()
SITES = [
    ss.Site("embedding"),
    *(ss.Site(kind, 1) for kind in ("queries", "keys", "values", "attention", "mlp-input", "mlp", "exit")),
    ss.Site("head", 1, 2),
]
EVERYWHERE = [ss.Site(s.kind, layer, s.head) for layer in range(3) for s in SITES if s.kind != "embedding"]


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def untouched() -> Callable[[str], Tensor]:
    def run(family: str) -> Tensor:
        with torch.no_grad():
            return tiny_models.plain(family)(IDS).logits

    return run


def test_the_parts_are_found_and_add_up(family: str) -> None:
    model = tiny_models.model(family)
    model.check()
    assert model.tested
    assert (model.layers, model.d, model.heads, model.head_size) == (3, 32, 4, head_size(family))
    assert (model.vocabulary, model.context) == (tiny_models.VOCABULARY, tiny_models.CONTEXT)
    assert model.tied == (family in ("qwen2", "gemma2", "gemma3", "gpt2"))
    assert model.centres_residual == (family in ("gpt2", "gpt_neox", "gpt_neox parallel"))
    norm = tiny_models.plain(family).get_submodule(model.layout.final_norm)
    gain = norm.weight + 1 if family.startswith("gemma") else norm.weight
    assert torch.equal(model.final_gain, gain.detach())


def test_identity_and_keep_all_change_no_bit(family: str, untouched: Any) -> None:
    model, expected = tiny_models.model(family), untouched(family)
    everywhere = [ss.Site("embedding"), *EVERYWHERE]
    kept = ss.phi(ss.read_spectrum(model, bands=4), 1, 4)
    assert torch.equal(tiny_models.logits(model, IDS, {}), expected)
    assert torch.equal(tiny_models.logits(model, IDS, dict.fromkeys(everywhere, lambda x: x * 1.0)), expected)
    assert torch.equal(tiny_models.logits(model, IDS, dict.fromkeys(everywhere, kept)), expected)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_filter_equals_hooks_written_by_hand(family: str, site: ss.Site, untouched: Any) -> None:
    spectrum = ss.read_spectrum(tiny_models.model(family), bands=8)
    basis = torch.cat([spectrum.vectors[:, :4], spectrum.vectors[:, 24:]], dim=1)
    rest = (torch.eye(32, dtype=torch.float64) - basis @ basis.T).float()
    removed = ss.remove(spectrum.subspace("1,7-8"))
    traced = tiny_models.logits(tiny_models.model(family), IDS, {site: removed})
    twin = tiny_models.plain(family)
    with torch.no_grad(), hooked(twin, family, site, lambda x: x @ rest):
        by_hand = twin(IDS).logits
    with torch.no_grad(), hooked(twin, family, site, removed):
        same_filter = twin(IDS).logits
    assert (traced - untouched(family)).abs().max() > 1e-3, "the filter must act"
    assert (traced - by_hand).abs().max() <= 5e-5  # the explicit projector rounds otherwise
    if site.kind == "head":  # sums the heads in another order
        assert (traced - same_filter).abs().max() <= 1e-5
    else:
        assert torch.equal(traced, same_filter)


def test_many_sites_at_once_equal_hooks(family: str) -> None:
    model = tiny_models.model(family)
    spectrum = ss.read_spectrum(model, bands=8)
    edits = {site: ss.remove(spectrum.band(1 + i % 8)) for i, site in enumerate(EVERYWHERE)}
    twin = tiny_models.plain(family)
    with torch.no_grad(), ExitStack() as stack:
        for site in sorted(edits, key=lambda s: s.rank):
            stack.enter_context(hooked(twin, family, site, edits[site]))
        expected = twin(IDS).logits
    assert (tiny_models.logits(model, IDS, edits) - expected).abs().max() <= 2e-5


def test_nll_is_the_loss_of_transformers(family: str) -> None:
    ids = tiny_models.ids(3, 20, seed=1)
    effect = ss.evaluate(tiny_models.model(family), ss.Windows.of_ids(ids, tiny_models.model(family)), {})
    with torch.no_grad():
        expected = [tiny_models.plain(family)(row[None], labels=row[None]).loss for row in ids]
    assert effect.table["nll"].tolist() == pytest.approx([float(loss) for loss in expected], abs=1e-5)
    assert effect.baseline_nll == effect.nll and effect.delta_nll == 0.0
