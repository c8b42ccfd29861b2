"""Readers and writers of every family against what the modules compute, and planted weights."""

from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

import spectral_sinks as ss
from spectral_sinks.models.weights import Weight, residual_weights

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "gpt_oss"}


def weights(family: str) -> dict[tuple[str, int, int], Weight]:
    return {(w.part, w.layer, w.unit): w for w in residual_weights(tiny_models.model(family))}


def captured(family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of every module of layer 1, from the plain model run on random residuals."""
    plain = tiny_models.plain(family)
    block = plain.get_submodule(tiny_models.model(family).layout.layers)[1]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = (given, output[0] if isinstance(output, tuple) else output)

        return record

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in block.named_modules()
    ]
    with torch.no_grad():
        plain(tiny_models.ids(2, 9))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_is_taken_apart(family: str) -> None:
    model, found = tiny_models.model(family), weights(family)
    key_heads = 4 if family in ("gpt2", "gpt_neox", "gpt_neox parallel") else 2
    experts = range(4) if family == "gpt_oss" else [-1]
    expected = {
        (part, layer, unit)
        for layer in range(3)
        for part, units in (
            ("q", range(4)),
            ("k", range(key_heads)),
            ("v", range(key_heads)),
            ("o", range(4)),
            *((part, experts) for part in (("gate",) if family in GATED else ()) + ("up", "down")),
        )
        for unit in units
    }
    assert set(found) == expected
    for (part, _, _), weight in found.items():
        inner = 48 if family not in ("gpt2",) else 128
        rows = {"gate": inner, "up": inner, "down": inner}.get(part, model.head_size)
        assert weight.rows.shape == (rows, 32)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_attention_readers_are_what_the_projections_compute(family: str) -> None:
    model, found, seen = tiny_models.model(family), weights(family), captured(family)
    for part, path, which in (
        ("q", model.layout.queries, "queries"),
        ("k", model.layout.keys, "keys"),
        ("v", model.layout.values, "values"),
    ):
        given, output = seen[path]
        made = output[..., model.projection_index(which)]
        module = tiny_models.plain(family).get_submodule(f"{model.layout.layers}.1.{path}")
        if getattr(module, "bias", None) is not None:
            made = made - module.bias[model.projection_index(which)]
        heads = [w for (p, layer, _), w in found.items() if p == part and layer == 1]
        assert torch.allclose(given @ torch.cat([w.rows for w in heads]).T, made, atol=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_folded_readers_read_the_residual_itself(family: str) -> None:
    """W norm(x) is the folded matrix on x up to one scale per token, whatever the norm."""
    model, found = tiny_models.model(family), weights(family)
    block = tiny_models.plain(family).get_submodule(model.layout.layers)[1]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for part, path in (("k", model.layout.attention_norm), ("up", model.layout.mlp_norm)):
        weight = found[part, 1, 0 if part == "k" or family == "gpt_oss" else -1]
        normed = x
        if path:
            norm = block.get_submodule(path)
            normed = norm(x) - getattr(norm, "bias", torch.zeros(32))
        direct, folded = (normed @ weight.rows.T).detach(), x @ weight.folded().T
        cosine = torch.cosine_similarity(direct, folded, dim=-1)
        assert torch.allclose(cosine, torch.ones(50), atol=1e-5)
        assert (weight.gain is None) == (path == "")


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "gpt_oss"])
def test_mlp_matrices_are_what_the_mlp_computes(family: str) -> None:
    model, found, seen = tiny_models.model(family), weights(family), captured(family)
    name = next(n for n in seen if n.startswith(model.layout.mlp + ".") and n.split(".")[-1] in (
        "down_proj", "c_proj", "dense_4h_to_h"))  # fmt: skip
    inner, written = seen[name]
    module = tiny_models.plain(family).get_submodule(f"{model.layout.layers}.1.{name}")
    bias = getattr(module, "bias", None)
    assert torch.allclose(
        inner @ found["down", 1, -1].rows, written - (0 if bias is None else bias), atol=1e-4
    )
    given = seen[model.layout.mlp][0]
    up = given @ found["up", 1, -1].rows.T
    if family in GATED:
        act = model.module.get_submodule(f"{model.layout.layers}.1.{model.layout.mlp}")
        act = getattr(act, "act_fn", None) or act.activation_fn
        rebuilt = act(given @ found["gate", 1, -1].rows.T) * up
    else:
        reader = next(n for n in seen if n.split(".")[-1] in ("c_fc", "dense_h_to_4h"))
        module = tiny_models.plain(family).get_submodule(f"{model.layout.layers}.1.{reader}")
        assert torch.allclose(up + module.bias, seen[reader][1], atol=1e-4)
        return
    assert torch.allclose(rebuilt, inner, atol=1e-4)


def test_experts_are_what_the_mixture_computes() -> None:
    model, found = tiny_models.model("gpt_oss"), weights("gpt_oss")
    experts = tiny_models.plain("gpt_oss").get_submodule("model.layers.1.mlp.experts")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        index = torch.full((5, 1), 2)
        out = experts(x, index, torch.ones(5, 1))
        gate = x @ found["gate", 1, 2].rows.T + experts.gate_up_proj_bias[2, ::2]
        up = x @ found["up", 1, 2].rows.T + experts.gate_up_proj_bias[2, 1::2]
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        mixed = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        made = mixed @ found["down", 1, 2].rows + experts.down_proj_bias[2]
    assert model.family == "gpt_oss" and torch.allclose(made, out, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_writers_fold_the_norm_they_pass(family: str) -> None:
    found, seen = weights(family), captured(family)
    model = tiny_models.model(family)
    assert found["o", 1, 0].gain is not None and found["down", 1, -1].gain is not None
    mixed, _ = seen[model.layout.attention_projection]
    _, written = seen[model.layout.attention_write]
    made = mixed @ torch.cat([found["o", 1, head].folded() for head in range(4)])
    assert torch.allclose(torch.cosine_similarity(made, written, dim=-1), torch.ones(2, 9), atol=1e-5)


def test_other_writers_have_nothing_to_fold() -> None:
    for family in ("llama", "gpt2", "gpt_neox"):
        weight = weights(family)["o", 0, 1]
        assert weight.gain is None and torch.equal(weight.folded(), weight.rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("convention", ["raw", "folded"])
def test_shares_by_projectors(family: str, convention: Any) -> None:
    model = tiny_models.model(family)
    u = ss.read_spectrum(model, bands=5)
    spans = {"dark": u.dark(0.2), "most": u.bands(1, 4), "random": ss.random_subspace(32, 5)}
    table = ss.residual.weight_shares(model, spans, convention=convention)
    found = weights(family)
    assert len(table) == 3 * len(found)
    for row in table.itertuples():
        weight = found[row.part, row.layer, row.unit]
        matrix = (weight.rows if convention == "raw" else weight.folded()).double()
        inside = spans[row.subspace].project(matrix)
        assert row.share == pytest.approx(float(inside.square().sum() / matrix.square().sum()), abs=1e-9)
        values = torch.linalg.svdvals(matrix).square()
        effective = float(values.sum() ** 2 / values.square().sum())
        assert row.effective_rank == pytest.approx(effective, rel=1e-6)
        assert row.null_sd == pytest.approx(ss.spectra.share_deviation(32, row.rank, effective), rel=1e-5)
    both = table[table["subspace"] != "random"].groupby(["part", "layer", "unit"], observed=True)["share"]
    assert np.allclose(both.sum(), 1)


def test_a_planted_reader_and_a_dead_writer() -> None:
    module = tiny_models.build()
    u = ss.read_spectrum(ss.load(module), bands=8)
    dark = u.dark(0.125).basis
    with torch.no_grad():
        keys = module.model.layers[1].self_attn.k_proj.weight  # 2 key heads of 8
        keys[8:16] = torch.randn(8, 4) @ dark.T.float()
        module.model.layers[2].mlp.down_proj.weight.zero_()
    table = ss.residual.weight_shares(ss.load(module), {"dark": u.dark(0.125)})
    table = table.set_index(["part", "layer", "unit"])
    assert table.loc[("k", 1, 1), "share"] == pytest.approx(1, abs=1e-6)
    assert table["share"].idxmax() == ("k", 1, 1)
    assert np.isnan(table.loc[("down", 2, -1), "share"]) and np.isnan(table.loc[("down", 2, -1), "null_sd"])
    assert not table.drop(index=[("down", 2, -1)])["share"].isna().any()


@pytest.mark.usefixtures("unchecked")
def test_bad_input() -> None:
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match=r"width 16 for .* of width 32"):
        ss.residual.weight_shares(model, {"x": ss.random_subspace(16, 2)})
    with pytest.raises(ss.InputError, match="'centred': weights are read"):
        ss.residual.weight_shares(model, {"x": ss.random_subspace(32, 2)}, convention="centred")  # pyright: ignore[reportArgumentType]


def test_an_unknown_mlp_is_refused() -> None:
    module = tiny_models.build()
    for block in module.model.layers:
        block.mlp.w1, block.mlp.up_proj = block.mlp.up_proj, None
        del block.mlp.up_proj
    with pytest.raises(ss.InputError, match=r"matrices of LlamaMLP .* tried gate_up_proj, up_proj"):
        list(residual_weights(ss.load(module)))
