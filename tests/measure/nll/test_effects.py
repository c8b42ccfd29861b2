"""Effects recomputed by hand from hooked models: NLL, KL, agreement, removed energy; batches and windows."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

import spectral_sinks as ss

IDS = tiny_models.ids(5, 70)
EXIT = ss.Site("exit", 1)


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return tiny_models.model()


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(IDS, model)


@pytest.fixture
def dark(model: ss.LanguageModel) -> ss.Filter:
    return ss.remove(ss.read_spectrum(model, bands=8).dark())


def by_hand(
    ids: Tensor, edit: Callable[[Tensor], Tensor], layer: int = 1, family: str = "llama"
) -> pd.DataFrame:
    """One row per document: the whole filtered pass of an unwrapped model, and the untouched one."""
    twin = tiny_models.plain(family)
    with torch.no_grad():
        base = twin(ids).logits.double()
        entered: list[Tensor] = []

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            entered.append(output)
            return edit(output)

        twin.model.layers[layer].register_forward_hook(hook)
        found = twin(ids, output_attentions=True)
        logits = found.logits.double()
    rows: list[dict[str, float]] = []
    for i, row in enumerate(ids):
        p, q = base[i, :-1].log_softmax(-1), logits[i, :-1].log_softmax(-1)
        residual, after = entered[0][i].double(), edit(entered[0])[i].double()
        rows.append(
            {
                "nll": float(cross_entropy(logits[i, :-1], row[1:])),
                "baseline_nll": float(cross_entropy(base[i, :-1], row[1:])),
                "kl": float(kl_div(q, p, log_target=True, reduction="sum")) / (len(row) - 1),
                "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
                "removed_energy_share": float(
                    ((residual - after).square().sum(-1) / residual.square().sum(-1)).mean()
                ),
            }
            | {f"sink_mass_{n}": float(a[i, :, :64, 0].mean()) for n, a in enumerate(found.attentions)}
        )
    table = pd.DataFrame(rows)
    return table.assign(delta_nll=table["nll"] - table["baseline_nll"])


def close(found: pd.DataFrame, expected: pd.DataFrame, atol: float = 1e-5) -> None:
    for name in expected.columns:
        np.testing.assert_allclose(found[name], expected[name], atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_everything_recomputed_by_hand(
    model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter, layer: int
) -> None:
    effect = ss.evaluate(model, windows, {ss.Site("exit", layer): dark})
    expected = by_hand(IDS, dark, layer)
    close(effect.table, expected)
    assert effect.table["document"].tolist() == list(range(5)) and set(effect.table["tokens"]) == {69}
    assert effect.nll == pytest.approx(expected["nll"].mean(), abs=1e-5)
    assert effect.delta_nll == pytest.approx(expected["delta_nll"].mean(), abs=1e-5)
    assert abs(effect.delta_nll) > 1e-3 and (effect.table["kl"] > 0).all() and effect.rank == 4
    low, high = effect.delta_nll_interval
    assert effect.table["delta_nll"].min() <= low < effect.delta_nll < high <= effect.table["delta_nll"].max()


def test_a_custom_function_is_a_filter(model: ss.LanguageModel, windows: ss.Windows) -> None:
    def shrink(x: Tensor) -> Tensor:
        return x * torch.linspace(0.2, 1, 32)

    effect = ss.evaluate(model, windows, {EXIT: shrink})
    close(effect.table, by_hand(IDS, shrink))
    assert effect.rank is None and effect.name == "custom"


def test_without_an_intervention_nothing_differs(model: ss.LanguageModel, windows: ss.Windows) -> None:
    effect = ss.evaluate(model, windows, {})
    assert (effect.table[["delta_nll", "kl", "removed_energy_share"]] == 0).all(axis=None)
    assert (effect.table["top1_agreement"] == 1).all()
    assert effect.rank == 0 and effect.sink_mass == effect.baseline_sink_mass


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_a_batch_equals_singles(family: str, dark: ss.Filter) -> None:
    model, ids = tiny_models.model(family), tiny_models.ids(6, 66)
    windows, tokens = ss.Windows.of_ids(ids, model), ids > 40
    mean = ss.Mean(ss.mean_residual(model, windows, EXIT))
    cells = {
        "exit": {EXIT: dark},
        "two sites": {ss.Site("values", 0): dark, ss.Site("mlp", 2): dark},
        "mask by window": {ss.Site("mlp", 1): dark.at(tokens)},
        "mean": {EXIT: dark.filled(mean)},
    }
    one, four = (ss.evaluate_all(model, windows, cells, batch_size=size) for size in (1, 4))
    for name in cells:
        close(four[name].table, one[name].table, 2e-6)
        assert abs(one[name].delta_nll) > 1e-4


def test_cells_do_not_influence_each_other(
    model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter
) -> None:
    cells: dict[str, Any] = {
        "early": {ss.Site("embedding"): dark},
        "late": {ss.Site("exit", 2): dark},
        "middle": {ss.Site("head", 1, 2): dark, ss.Site("exit", 1): dark.at("first")},
    }
    calls: list[int] = []
    together = ss.evaluate_all(model, windows, cells, batch_size=2, progress=calls.append)
    assert calls == [1] * 9, "three cells on three batches"
    for name, edits in cells.items():
        alone = ss.evaluate(model, windows, edits, batch_size=2)
        pd.testing.assert_frame_equal(together[name].table, alone.table)


def test_several_sites_at_once(model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter) -> None:
    """Where a pass begins does not matter: an identity at the bottom makes it a whole one."""
    sites = {ss.Site("exit", 2): dark, ss.Site("exit", 1): dark}
    effect = ss.evaluate(model, windows, sites)
    whole = ss.evaluate(model, windows, {ss.Site("embedding"): lambda x: x, **sites})
    columns = ["nll", "kl", "top1_agreement", "sink_mass_2"]
    pd.testing.assert_frame_equal(effect.table[columns], whole.table[columns])
    assert effect.rank == 8 and effect.sites == tuple(sites)


@pytest.mark.parametrize("choice", ["mask of positions", "mask by window", "ids", "first", "all-but-first"])
def test_selected_tokens(model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter, choice: str) -> None:
    positions = torch.arange(70) % 3 == 0
    tokens, mask = {
        "mask of positions": (positions, positions.expand(5, 70)),
        "mask by window": (IDS > 50, IDS > 50),
        "ids": ([5, 9, 30], torch.isin(IDS, torch.tensor([5, 9, 30]))),
        "first": ("first", (torch.arange(70) == 0).expand(5, 70)),
        "all-but-first": ("all-but-first", (torch.arange(70) > 0).expand(5, 70)),
    }[choice]
    effect = ss.evaluate(model, windows, {EXIT: dark.at(tokens)}, batch_size=2)
    expected = by_hand(IDS, lambda x: torch.where(mask[..., None], dark(x), x))
    touched = (
        expected["removed_energy_share"] * 70 / mask.sum(1).clamp_min(1).numpy()
    )  # mean over those it touches
    close(effect.table, expected.assign(removed_energy_share=touched))


def test_fills_are_weighed_by_what_they_remove(
    model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter
) -> None:
    reference = ss.mean_residual(model, windows, EXIT, batch_size=2)
    states = tiny_models.plain()(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(reference, states.double().mean(0), atol=1e-6)
    removed = ss.evaluate(model, windows, {EXIT: dark}).table["removed_energy_share"]
    for fill in (ss.Mean(reference), ss.Swap(), ss.Noise(3)):
        effect = ss.evaluate(model, windows, {EXIT: dark.filled(fill)})
        close(effect.table, by_hand(IDS, dark.filled(fill)).drop(columns="removed_energy_share"))
        np.testing.assert_allclose(effect.table["removed_energy_share"], removed, atol=1e-6)


def test_windows_of_different_lengths(model: ss.LanguageModel, dark: ss.Filter) -> None:
    rows = [tiny_models.ids(1, n, seed=n)[0] for n in (20, 9, 20, 33, 9)]
    owner = [0, 0, 1, 2, 2]
    effect = ss.evaluate(model, ss.Windows.of_ids(rows, model, owner), {EXIT: dark}, batch_size=2)
    assert effect.sink_mass is None, "windows are shorter than 64 tokens"
    assert effect.table["windows"].tolist() == [2, 1, 2] and effect.table["tokens"].tolist() == [27, 19, 40]
    single = [by_hand(row[None], dark)["nll"][0] for row in rows]
    weights = [len(row) - 1 for row in rows]
    expected = [
        np.average([single[i] for i in places], weights=[weights[i] for i in places])
        for places in ([0, 1], [2], [3, 4])
    ]
    np.testing.assert_allclose(effect.table["nll"], expected, atol=1e-5)


def test_half_precision_is_accumulated_in_float32(dark: ss.Filter) -> None:
    twin = tiny_models.plain().to(torch.bfloat16)
    with torch.no_grad():
        logits = twin(IDS).logits
    assert logits.dtype == torch.bfloat16
    exact = [float(cross_entropy(a[:-1].double(), row[1:])) for a, row in zip(logits, IDS, strict=True)]
    rough = [float(cross_entropy(a[:-1], row[1:])) for a, row in zip(logits, IDS, strict=True)]
    model = ss.load(copy.deepcopy(twin))
    effect = ss.evaluate(model, ss.Windows.of_ids(IDS, model), {EXIT: dark})
    np.testing.assert_allclose(effect.table["baseline_nll"], exact, atol=1e-6)
    assert max(abs(np.subtract(rough, exact))) > 1e-3, "which would show here"
    assert 0 < effect.table["removed_energy_share"].mean() < 1


@pytest.mark.parametrize("size", [1, 2, 5, None])
def test_a_swap_does_not_depend_on_the_batch_size(
    size: int | None, model: ss.LanguageModel, dark: ss.Filter
) -> None:
    ids = torch.randint(2, 90, (7, 20), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    windows = ss.Windows.of_ids(ids, model)
    cells = {
        "swap": {EXIT: dark.filled(ss.Swap())},
        "swaps": {EXIT: dark.filled(ss.Swap()), ss.Site("mlp", 2): dark.filled(ss.Swap())},
        "noise": {EXIT: dark.filled(ss.Noise(1))},
    }
    found = ss.evaluate_all(model, windows, cells, batch_size=size)
    blocked = dark.blocked.basis.float()

    def mixed(x: torch.Tensor) -> torch.Tensor:
        """Every window takes the component of the one before it, and the first that of the last."""
        inside = x @ blocked @ blocked.T
        return x - inside + inside.roll(1, 0)

    sites = {"swap": [EXIT], "swaps": [EXIT, ss.Site("mlp", 2)]}
    for name, where in sites.items():
        logits = tiny_models.logits(model, ids, dict.fromkeys(where, mixed))
        each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
        np.testing.assert_allclose(found[name].table["nll"], each.numpy(), atol=1e-5)
    one = ss.evaluate(model, windows, cells["noise"], batch_size=3)
    np.testing.assert_allclose(found["noise"].table["nll"], one.table["nll"], atol=1e-6)


def test_what_is_refused(model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter) -> None:
    others = IDS.clone()
    others[0, 0] = 7
    mixed = ss.Windows.of_ids(others, model)
    swap = dark.filled(ss.Swap())
    with pytest.raises(ss.InputError, match=r"2 different tokens .* tokens='all-but-first'"):
        ss.evaluate(model, mixed, {EXIT: swap})
    ss.evaluate(model, mixed, {EXIT: swap.at("all-but-first")})
    with pytest.raises(ss.InputError, match="another document"):
        ss.evaluate(model, ss.Windows.of_ids(IDS[:1], model), {EXIT: swap})
    with pytest.raises(ss.InputError, match=r"width 16, .* has width 32"):
        ss.evaluate(model, windows, {EXIT: ss.rnd(16, 2)})
    with pytest.raises(ss.InputError, match="mean of width 16 for a model of width 32"):
        ss.evaluate(model, windows, {EXIT: dark.filled(ss.Mean(torch.zeros(70, 16)))})
    with pytest.raises(ss.InputError, match="a mask of 3 rows for 5 windows"):
        ss.evaluate(model, windows, {EXIT: dark.at(torch.ones(3, 70, dtype=torch.bool))})
    with pytest.raises(ss.InputError, match=r"token id 97 .* vocabulary of 97"):
        ss.evaluate(model, windows, {EXIT: dark.at([5, 97])})
    with pytest.raises(ss.InputError, match="layer 3"):
        ss.evaluate(model, windows, {ss.Site("exit", 3): dark})


def test_the_tables(model: ss.LanguageModel, windows: ss.Windows, dark: ss.Filter) -> None:
    effect = ss.evaluate(model, windows, {EXIT: dark}, name="mine")
    assert len(effect.table) == 5
    summary = effect.summary()
    assert len(summary) == 1
    row = summary.iloc[0]
    assert (row["name"], row["site"], row["rank"], row["documents"]) == ("mine", "exit 1", 4, 5)
    assert (row["delta_nll_low"], row["delta_nll_high"]) == effect.delta_nll_interval
    for number in ("nll", "kl", "removed_energy_share"):
        assert row[number] == pytest.approx(effect.table[number].mean())
        assert row[f"{number}_low"] <= row[number] <= row[f"{number}_high"]
    assert json.loads(json.dumps(effect.record())) == row.to_dict()
    head, names, values, *rest = repr(effect).splitlines()
    assert head == "mine at exit 1 (nats per token)"
    printed = dict(zip(names.split(), values.split(), strict=True))
    assert printed["rank"] == "4" and printed["nll"] == f"{effect.nll:.4f}"
    masses = [line.split() for line in rest[-2:]]
    assert effect.sink_mass is not None and effect.baseline_sink_mass is not None
    assert masses[0] == ["untouched", *(f"{mass:.4f}" for mass in effect.baseline_sink_mass)]
    assert masses[1] == ["mine", *(f"{mass:.4f}" for mass in effect.sink_mass)]
