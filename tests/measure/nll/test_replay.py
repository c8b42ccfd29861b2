"""Suffix replay: cells together, alone and in whole passes by hooks agree; what lies below never runs."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import reference_hooks, tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure import memory
from spectral_sinks.measure.nll import replay
from spectral_sinks.spectra.edits import as_edit

FAMILIES = ["llama", "gpt2", "gpt_neox parallel", "gemma2", "gpt_oss", "qwen2"]
IDS = tiny_models.ids(5, 66, seed=2)
KINDS = ("queries", "keys", "values", "attention", "mlp-input", "mlp", "exit")
SITES = [
    ss.Site("embedding"),
    *(ss.Site(kind, layer) for layer in range(3) for kind in KINDS),
    *(ss.Site("head", layer, layer + 1) for layer in range(3)),
]
EXITS = [ss.Site("exit", layer) for layer in range(3)]
REFERENCE = torch.randn(66, 32, generator=torch.Generator().manual_seed(7))
VALUES = ["nll", "baseline_nll", "kl", "top1_agreement", "removed_energy_share"]

Cells = dict[str, dict[ss.Site, Any]]


def dampen(x: Tensor) -> Tensor:
    return x * torch.linspace(0.3, 1.1, 32)


def clip_in_place(x: Tensor) -> Tensor:
    return x.clamp_(-0.4, 0.4)


def next_row(removed: Tensor, blocked: ss.Subspace) -> Tensor:
    """A fill of a user's own that mixes the batch and writes into what it is given."""
    return removed.mul_(0.5).roll(-1, dims=0)


def dense(space: ss.Subspace) -> Tensor:
    """Return the explicit float64 projector."""
    basis = space.basis.double()
    inside = basis @ basis.T
    return torch.eye(32, dtype=torch.float64) - inside if space.complemented else inside


def selected(edit: ss.Filter, ids: Tensor, places: list[int]) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    if isinstance(edit.tokens, str):
        return {"all": positions >= 0, "first": positions == 0, "all-but-first": positions > 0}[edit.tokens]
    if isinstance(edit.tokens, Tensor):
        return edit.tokens[places] if edit.tokens.ndim == 2 else edit.tokens.expand(ids.shape)
    return torch.stack([ids == i for i in edit.tokens]).any(0)


def by_definition(edit: Any, ids: Tensor, places: list[int], shares: list[Tensor]) -> reference_hooks.Edit:
    """Write down what a filter or function does, with explicit projectors, and note the share it removes."""

    def run(x: Tensor) -> Tensor:
        exact = x.double()
        if not isinstance(edit, ss.Filter):
            out, mask = edit(x.clone()).double(), torch.ones(ids.shape, dtype=torch.bool)
            removed = exact - out
        else:
            inside, mask = dense(edit.blocked), selected(edit, ids, places)
            removed = exact @ (inside if edit.through is None else dense(edit.through) @ inside)
            if isinstance(edit.fill, ss.Mean):
                fill = edit.fill.reference.double()[: x.shape[1]] @ inside
            elif isinstance(edit.fill, ss.Swap):
                fill = torch.stack([removed[i - 1] for i in range(len(removed))])
            elif isinstance(edit.fill, ss.Noise):
                drawn = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(edit.fill.seed))
                noise = drawn.double() @ inside
                fill = noise / noise.norm(dim=-1, keepdim=True).clamp_min(1e-30)
                fill = fill * removed.norm(dim=-1, keepdim=True)
            else:
                fill = edit.fill(removed.clone(), edit.blocked)
            out = torch.where(mask[..., None], exact - removed + fill, exact)
        share = removed.square().sum(-1) / exact.square().sum(-1).clamp_min(1e-30)
        shares.append((share * mask).sum(-1) / mask.sum(-1).clamp_min(1))
        return out.to(x.dtype)

    return run


def whole_pass(
    family: str, edits: dict[ss.Site, Any], ids: Tensor, places: list[int]
) -> list[dict[str, Any]]:
    """One row per window: the filtered pass of an unwrapped model through all layers, in the definitions."""
    model = tiny_models.plain(family)
    shares: list[Tensor] = []
    with torch.no_grad(), ExitStack() as stack:
        base = model(ids, use_cache=False).logits.double()
        for site in sorted(edits, key=lambda s: s.rank):
            edit = by_definition(edits[site], ids, places, shares)
            stack.enter_context(reference_hooks.hooked(model, family, site, edit))
        found = model(ids, output_attentions=True, use_cache=False)
    logits = found.logits.double()[:, :-1]
    p, q = base[:, :-1].log_softmax(-1), logits.log_softmax(-1)
    at_top = logits.gather(-1, base[:, :-1].argmax(-1, keepdim=True))[..., 0]
    agrees = (at_top == logits.amax(-1)).double().mean(-1)  # capped logits are often equal
    target = ids[:, 1:, None]
    removed = torch.stack(shares).mean(0)
    return [
        {
            "document": place,
            "nll": float(-q[i].gather(-1, target[i]).mean()),
            "baseline_nll": float(-p[i].gather(-1, target[i]).mean()),
            "kl": float((p[i].exp() * (p[i] - q[i])).sum(-1).mean()),
            "top1_agreement": float(agrees[i]),
            "removed_energy_share": float(removed[i]),
        }
        | {f"sink_mass_{n}": float(a[i, :, :64, 0].mean()) for n, a in enumerate(found.attentions)}
        for i, place in enumerate(places)
    ]


def by_hooks(family: str, windows: ss.Windows, edits: dict[ss.Site, Any], size: int) -> pd.DataFrame:
    if any(as_edit(edit).swaps for edit in edits.values()):  # pairs windows whatever the batch
        size = len(windows)
    rows = [row for places, ids in windows.batches(size) for row in whole_pass(family, edits, ids, places)]
    return pd.DataFrame(rows).sort_values("document", ignore_index=True)


def close(found: pd.DataFrame, expected: pd.DataFrame, atol: float = 1e-5) -> None:
    for name in expected.columns:
        np.testing.assert_allclose(found[name], expected[name], atol=atol, rtol=0, err_msg=name)


def filters(spectrum: ss.Spectrum, other: ss.Spectrum) -> st.SearchStrategy[ss.Filter]:
    """Draw filters of every sort, with every fill, at every selection of tokens."""
    seeds = st.integers(0, 5)
    band = st.integers(1, 8)
    members = st.lists(st.booleans(), min_size=32, max_size=32).map(torch.tensor)
    spectral = st.one_of(
        st.tuples(band, band).map(lambda jk: ss.phi(spectrum, min(jk), max(jk))),
        band.map(lambda j: ss.omega(spectrum, j)),
        members.map(lambda m: ss.remove(ss.Subspace.of_members(spectrum.vectors, m, "some", "u"))),
    )
    psi = st.builds(
        lambda j, reading: ss.psi(spectrum, other, j, reading),
        band,
        st.sampled_from(["u-e", "e-u", "intersection"]),
    )
    random = st.builds(lambda rank, seed: ss.rnd(32, rank, seed), st.integers(0, 32), seeds)
    fills = st.one_of(
        st.just(ss.Zero()),
        st.just(ss.Mean(REFERENCE)),
        st.just(ss.Mean(REFERENCE[0])),
        st.just(ss.Swap()),
        st.builds(ss.Noise, seeds),
        st.just(next_row),
    )
    tokens = st.one_of(
        st.sampled_from(["all", "first", "all-but-first"]),
        st.just(torch.arange(66) % 3 == 0),
        st.just(IDS > 40),
        st.just([5, 9, 30, 31, 32, 33]),
    )
    drawn = st.one_of(spectral, spectral, psi, random)
    return st.builds(lambda f, fill, at: f.filled(fill).at(at), drawn, fills, tokens)


def many_cells(spectrum: ss.Spectrum, other: ss.Spectrum) -> st.SearchStrategy[list[dict[ss.Site, Any]]]:
    sites = st.one_of(st.sampled_from(EXITS), st.sampled_from(SITES))
    edits = st.one_of(*[filters(spectrum, other)] * 4, st.sampled_from([dampen, clip_in_place]))
    return st.lists(st.dictionaries(sites, edits, min_size=1, max_size=3), min_size=6, max_size=9)


@pytest.fixture(scope="module")
def model() -> ss.LanguageModel:
    return tiny_models.model()


@pytest.fixture(scope="module")
def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(IDS, model)


@pytest.fixture(scope="module")
def spectrum(model: ss.LanguageModel) -> ss.Spectrum:
    return ss.read_spectrum(model, bands=8)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note the first layer and the rows of every pass."""
    made: list[tuple[int, int]] = []
    trace = replay.trace

    def watched(model: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
        resume = options.get("resume")
        made.append((0 if resume is None else resume.layer + 1, len(ids)))
        return trace(model, ids, *args, **options)

    monkeypatch.setattr(replay, "trace", watched)
    return made


@pytest.fixture
def ran() -> Iterator[Callable[[ss.LanguageModel], dict[int, list[int]]]]:
    """Count the rows of each forward call inside every layer of a model."""
    with ExitStack() as stack:

        def watch(model: ss.LanguageModel) -> dict[int, list[int]]:
            calls: dict[int, list[int]] = {index: [] for index in range(model.layers)}
            layers = model.module.get_submodule(model.layout.layers)
            for index, layer in enumerate(layers):
                inside = layer.get_submodule(model.layout.mlp)
                hook = inside.register_forward_pre_hook(
                    lambda m, args, i=index: calls[i].append(len(args[0]))
                )
                stack.callback(hook.remove)
            return calls

        yield watch


def rows_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let a pass take so many windows."""
    monkeypatch.setattr(memory, "TOKENS", {"cpu": rows * IDS.shape[1]})


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, phases=[Phase.generate])  # shrinking takes minutes
@given(data=st.data())
def test_together_alone_and_by_hooks(family: str, data: st.DataObject) -> None:
    model = tiny_models.model(family)
    spectrum, other = (ss.read_spectrum(model, matrix, bands=8) for matrix in ("unembedding", "embedding"))
    windows = ss.Windows.of_ids(IDS, model)
    cells = dict(zip("abcdefghi", data.draw(many_cells(spectrum, other)), strict=False))
    size = data.draw(st.sampled_from([3, 5]))
    together = ss.evaluate_all(model, windows, cells, batch_size=size)
    for name, edits in cells.items():
        alone = ss.evaluate(model, windows, edits, batch_size=size)
        close(together[name].table, alone.table[[*VALUES, "sink_mass_0", "sink_mass_1", "sink_mass_2"]])
        close(together[name].table, by_hooks(family, windows, edits, size))


@pytest.mark.parametrize("rows", [1, 3, 7, 12])
def test_how_many_go_in_a_pass_does_not_matter(
    model: ss.LanguageModel,
    windows: ss.Windows,
    spectrum: ss.Spectrum,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[int, int]],
    mixed_by_hooks: dict[str, pd.DataFrame],
    rows: int,
) -> None:
    """Of a batch larger than a pass, some rows at a time, each with its own rows of masks and donors."""
    cells = mixed(spectrum)
    rows_of(monkeypatch, rows)
    found = ss.evaluate_all(model, windows, cells, batch_size=5)
    tall = [n for _, n in passes]
    assert max(tall) == max(5, rows // 5 * 5)
    assert rows >= 5 or tall.count(5) == 3, "what acts on whole batches inside a layer is given them"
    for name in cells:
        close(found[name].table, mixed_by_hooks[name])


def mixed(spectrum: ss.Spectrum) -> Cells:
    """Cells of every way in which windows of a batch could be told apart or mixed up."""
    dark, exit, mlp = ss.remove(spectrum.dark()), ss.Site("exit", 1), ss.Site("mlp", 2)
    ids = [5, 9, 30, 31]
    return {
        "exit": {exit: dark},
        "mask": {exit: dark.at(IDS > 40)},
        "mask inside": {mlp: dark.at(IDS > 40)},
        "ids": {exit: dark.at(ids)},
        "ids inside": {mlp: dark.at(ids), ss.Site("values", 2): ss.rnd(32, 9).at(ids)},
        "ids at the embedding": {ss.Site("embedding"): dark.at(ids)},
        "mean inside": {mlp: dark.filled(ss.Mean(REFERENCE))},
        "noise inside": {mlp: dark.filled(ss.Noise(1))},
        "swap": {exit: dark.filled(ss.Swap())},
        "swap inside": {mlp: dark.filled(ss.Swap())},
        "own fill inside": {mlp: dark.filled(next_row)},
        "function": {exit: lambda x: x - 0.5 * x.mean(0)},
        "function inside": {mlp: lambda x: x - 0.5 * x.mean(0)},
    }


@pytest.fixture(scope="module")
def mixed_by_hooks(windows: ss.Windows, spectrum: ss.Spectrum) -> dict[str, pd.DataFrame]:
    return {name: by_hooks("llama", windows, edits, 5) for name, edits in mixed(spectrum).items()}


def test_stacked_cells_that_select_by_token_id(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum
) -> None:
    cells: Cells = {
        str(k): {ss.Site("mlp", 2): ss.remove(spectrum.band(k)).at(range(10 * k, 10 * k + 10))}
        for k in range(1, 6)
    }
    for name, effect in ss.evaluate_all(model, windows, cells).items():
        close(effect.table, by_hooks("llama", windows, cells[name], 5))


@pytest.mark.parametrize("site", [ss.Site("exit", 0), ss.Site("mlp", 1), ss.Site("queries", 1)], ids=str)
def test_a_function_that_writes_in_place_spoils_nothing(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, site: ss.Site
) -> None:
    dark = ss.remove(spectrum.dark())
    cells: Cells = {"in place": {site: clip_in_place}, "fill": {site: dark.filled(next_row)}}
    cells |= {
        "after": {ss.Site("exit", 0): dark},
        "again": {ss.Site("exit", 0): ss.remove(spectrum.bands(7, 8))},
    }
    found = ss.evaluate_all(model, windows, cells)
    for name, edits in cells.items():
        close(found[name].table, by_hooks("llama", windows, edits, 5))
    assert (found["in place"].table["removed_energy_share"] > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_start_not_one_bit_differs(family: str, spectrum: ss.Spectrum) -> None:
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(IDS, model)
    cells: Cells = {f"{kind} {layer}": {ss.Site(kind, layer): dampen} for kind in KINDS for layer in range(3)}
    for name, effect in ss.evaluate_all(model, windows, cells).items():
        kind, layer = name.split()
        lowest = int(layer) + (kind == "exit")
        rows = effect.table
        for index in range(3):
            same = rows[f"sink_mass_{index}"] == rows[f"baseline_sink_mass_{index}"]
            if index < lowest:
                assert same.all(), name
            if index > lowest or kind in ("queries", "keys", "exit"):
                assert index < lowest or not same.any(), name


def test_nothing_removed_changes_not_one_bit(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum, passes: list[tuple[int, int]]
) -> None:
    nothing = ss.phi(spectrum, 1, 8)
    cells: Cells = {
        "no site": {},
        "keep all": {ss.Site("mlp", 1): nothing, ss.Site("exit", 0): ss.rnd(32, 0).filled(ss.Noise())},
        "psi": {ss.Site("embedding"): ss.psi(spectrum, spectrum, 8)},
        "some": {ss.Site("exit", 1): ss.remove(spectrum.dark())},
    }
    for name, effect in ss.evaluate_all(model, windows, cells, batch_size=3).items():
        if name == "some":
            continue
        rows = effect.table
        assert (rows[["delta_nll", "kl", "removed_energy_share"]] == 0).all(axis=None)
        assert (rows["nll"] == rows["baseline_nll"]).all() and (rows["top1_agreement"] == 1).all()
        assert effect.sink_mass == effect.baseline_sink_mass
    assert passes == [(0, 2), (2, 2), (0, 3), (2, 3)], "they cost no pass"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox parallel", "gpt_oss"])
def test_what_lies_below_never_runs(
    family: str, ran: Callable[[ss.LanguageModel], dict[int, list[int]]], spectrum: ss.Spectrum
) -> None:
    """Of each exit one pass for all its cells, through the layers above it alone."""
    model = ss.load(tiny_models.plain(family))
    calls = ran(model)
    blocks = [ss.remove(spectrum.band(k)) for k in range(1, 9)]
    cells: Cells = {"nothing": {}}
    cells |= {f"exit 0, {k}": {EXITS[0]: blocks[k]} for k in range(3)}
    cells |= {f"mlp 1, {k}": {ss.Site("mlp", 1): blocks[k]} for k in range(2)}
    cells |= {f"exit 1, {k}": {EXITS[1]: blocks[k], ss.Site("keys", 2): blocks[0]} for k in range(4)}
    cells |= {f"exit 2, {k}": {EXITS[2]: blocks[k]} for k in range(8)}
    cells |= {"embedding": {ss.Site("embedding"): blocks[0], EXITS[2]: blocks[1]}}
    batches = 2
    ss.evaluate_all(model, ss.Windows.of_ids(IDS[:4], model), cells, batch_size=2)
    untouched, embedding = [2], [2]
    of = {
        0: [*untouched, *embedding],
        1: [*untouched, *embedding, 5 * 2],
        2: [*untouched, *embedding, 5 * 2, 4 * 2],
    }
    if family == "gpt_oss":  # its MLP takes rows of tokens in places
        assert {layer: len(rows) for layer, rows in calls.items()} == {i: len(of[i]) * batches for i in of}
    else:
        assert calls == {layer: of[layer] * batches for layer in of}


def test_at_the_last_exit_no_layer_runs(
    windows: ss.Windows, ran: Callable[[ss.LanguageModel], dict[int, list[int]]], spectrum: ss.Spectrum
) -> None:
    model = ss.load(tiny_models.plain())
    calls = ran(model)
    cells: Cells = {str(k): {EXITS[2]: ss.phi(spectrum, 1, k)} for k in range(1, 9)}
    effects = ss.evaluate_all(model, windows, cells)
    assert calls == {0: [5], 1: [5], 2: [5]}, "the untouched pass"
    assert all(effect.sink_mass == effect.baseline_sink_mass for effect in effects.values())
    assert len({effect.nll for effect in effects.values()}) == 8


@pytest.mark.parametrize(
    ("rows", "stacks"), [(62, [40]), (15, [15, 15, 10]), (9, [5] * 8), (2, [2, 2, 1] * 8)]
)
def test_stacks_are_as_tall_as_fits(
    model: ss.LanguageModel,
    windows: ss.Windows,
    spectrum: ss.Spectrum,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[int, int]],
    rows: int,
    stacks: list[int],
) -> None:
    cells: Cells = {str(k): {EXITS[1]: ss.remove(spectrum.band(k))} for k in range(1, 9)}
    rows_of(monkeypatch, rows)
    done: list[int] = []
    ss.evaluate_all(model, windows, cells, progress=done.append)
    untouched = [(0, 5)] if rows >= 5 else [(0, 2), (0, 2), (0, 1)]
    assert passes == [*untouched, *((2, n) for n in stacks)]
    assert sum(done) == 8 and len(done) == (len(stacks) if rows >= 5 else 8)


def test_exits_that_do_not_fit_are_computed_again(
    model: ss.LanguageModel,
    windows: ss.Windows,
    spectrum: ss.Spectrum,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[int, int]],
) -> None:
    blocks = [ss.remove(spectrum.band(k)) for k in range(1, 4)]
    cells: Cells = {f"{site} {k}": {site: f} for site in EXITS for k, f in enumerate(blocks)}
    cells["nothing"] = {}
    fitting = ss.evaluate_all(model, windows, cells)
    assert passes == [(0, 5), (1, 15), (2, 15), (3, 15)]
    each = IDS.numel() * 32 * 4
    for exits, again in ((1, 2), (2, 1), (3, 0)):
        passes.clear()
        room = int(exits * each / replay.SHARE * 2)
        monkeypatch.setattr(replay, "free", lambda device, room=room: room)
        found = ss.evaluate_all(model, windows, cells)
        assert Counter(passes) == Counter([(0, 5)] * (1 + again) + [(1, 15), (2, 15), (3, 15)])
        for name, effect in found.items():
            pd.testing.assert_frame_equal(effect.table, fitting[name].table)


def test_exits_are_computed_again_together_with_others_that_fit(
    spectrum: ss.Spectrum, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    model = ss.load(tiny_models.build(num_hidden_layers=5))
    dark = ss.remove(spectrum.dark())
    cells: Cells = {str(layer): {ss.Site("exit", layer): dark} for layer in range(5)}
    monkeypatch.setattr(replay, "free", lambda device: int(2 * IDS.numel() * 32 * 4 / replay.SHARE * 2))
    ss.evaluate_all(model, ss.Windows.of_ids(IDS, model), cells)
    assert passes == [(0, 5), (1, 5), (2, 5), (0, 5), (3, 5), (4, 5), (0, 5), (5, 5)]


def test_a_batch_by_itself(model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum) -> None:
    """Cells from exits that were not named, in any order, as often as one likes, give the same."""
    dark = ss.remove(spectrum.dark())
    named, other = {EXITS[1]: dark}, {EXITS[0]: dark}
    batch = replay.Batch(model, windows, range(5), IDS, starts=[1])
    assert len(batch) == 5
    first = batch.measure([named, {}])
    base = batch.baseline
    batch.measure([other])
    again = batch.measure([{}, named, other])
    assert batch.baseline is base, "the untouched pass is measured once"
    for column in ("nll", "kl", "top1_agreement", "removed_energy_share", "sink_mass"):
        before, after = getattr(first, column), getattr(again, column)
        assert (before[[1, 0]] == after[:2]).all()
    assert (again.nll[0] == base.nll[0]).all() and (again.nll[2] != base.nll[0]).all()
    for edits, nll in ((named, again.nll[1]), (other, again.nll[2])):
        np.testing.assert_allclose(nll, by_hooks("llama", windows, edits, 5)["nll"], atol=1e-5)


def test_massive_activations(spectrum: ss.Spectrum) -> None:
    """A residual of norm 10 000 at position 0 in the dark subspace, as models with a sink have."""
    model = tiny_models.model()
    windows = ss.Windows.of_ids(IDS, model)
    direction = spectrum.vectors[:, -1].float()

    def plant(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] + 1e4 * direction, x[:, 1:]], dim=1)

    cells: Cells = {
        str(k): {EXITS[0]: plant, EXITS[1]: edit}
        for k, edit in enumerate([*(ss.phi(spectrum, 1, k) for k in range(1, 8)), ss.remove(spectrum.dark())])
    }
    found = ss.evaluate_all(model, windows, cells)
    for name, edits in cells.items():
        expected = by_hooks("llama", windows, edits, 5)
        close(found[name].table, expected.drop(columns="removed_energy_share"), 5e-5)
        shares = found[name].table["removed_energy_share"]
        np.testing.assert_allclose(shares, expected["removed_energy_share"], rtol=1e-6)


def test_masks_are_cut_to_the_windows_of_a_batch(model: ss.LanguageModel, spectrum: ss.Spectrum) -> None:
    """Windows of several lengths come in another order than they were given in."""
    rows = [tiny_models.ids(1, n, seed=n + i)[0] for i, n in enumerate((20, 33, 20, 33, 33))]
    windows = ss.Windows.of_ids(rows, model)
    mask = torch.rand(5, 33, generator=torch.Generator().manual_seed(3)) < 0.5
    for length, chosen in ((20, [0, 2]), (33, [1, 3, 4])):
        part = dataclasses.replace(windows, rows=tuple(rows[i] for i in chosen), document=(0,) * len(chosen))
        edit = ss.remove(spectrum.dark()).at(mask[chosen, :length])
        found = replay.Batch(model, part, range(len(chosen)), torch.stack(part.rows)).measure(
            [{ss.Site("mlp", 1): edit}, {EXITS[0]: edit}]
        )
        for cell, site in enumerate((ss.Site("mlp", 1), EXITS[0])):
            expected = whole_pass("llama", {site: edit}, torch.stack(part.rows), list(range(len(chosen))))
            np.testing.assert_allclose(found.nll[cell], [row["nll"] for row in expected], atol=1e-5)
        with pytest.raises(ss.InputError, match=r"a mask of \d rows for \d windows"):
            replay.Batch(model, windows, chosen, torch.stack(part.rows)).measure([{EXITS[0]: edit}])


def test_where_a_pass_begins(spectrum: ss.Spectrum) -> None:
    def begins(*sites: ss.Site, edit: Any = dampen) -> int | None:
        return replay.first_exit(dict.fromkeys(sites, edit))

    assert begins() is None and begins(*SITES, edit=ss.phi(spectrum, 1, 8)) is None
    assert [begins(site) for site in EXITS] == [0, 1, 2]
    assert begins(ss.Site("embedding")) == -1 and begins(ss.Site("mlp", 0)) == -1
    assert begins(ss.Site("queries", 2)) == 1 and begins(EXITS[2], ss.Site("mlp", 2)) == 1
    assert begins(EXITS[1], EXITS[2], ss.Site("head", 2, 1)) == 1


def test_sites_that_move_into_another_order(
    model: ss.LanguageModel, windows: ss.Windows, spectrum: ss.Spectrum
) -> None:
    """The order in which sites or cells are named changes nothing."""
    sites: Sequence[ss.Site] = [
        EXITS[0],
        ss.Site("keys", 1),
        ss.Site("head", 1, 0),
        ss.Site("mlp", 2),
        EXITS[2],
    ]
    edits = {site: ss.remove(spectrum.band(k + 1)) for k, site in enumerate(sites)}
    backwards = dict(reversed(edits.items()))
    one = ss.evaluate(model, windows, edits)
    found = ss.evaluate_all(model, windows, {"b": backwards, "a": edits})
    for effect in (one, *found.values()):
        close(effect.table, by_hooks("llama", windows, edits, 5))
    assert found["b"].sites == tuple(reversed(sites))
