"""The grid: every combination once, controls of each rank, and bad input of every kind."""

from typing import Any

import pytest
import torch
from support import small_sweeps, tiny_models

import spectral_sinks as ss
from spectral_sinks.sweeps.cells import named


def grid(**options: Any) -> list[ss.sweeps.Cell]:
    embedding = ss.read_spectrum(tiny_models.model(), "embedding", bands=4, use_cache=False)
    return ss.grid(tiny_models.model(), small_sweeps.windows(), small_sweeps.spectrum(), embedding, **options)


def names(**options: Any) -> list[str]:
    return [cell.name for cell in grid(**options)]


def test_every_combination_once() -> None:
    options: dict[str, Any] = {
        "sites": ["exit", "head:2", "embedding"],
        "layers": [0, [0, 2]],
        "keep": ["1-2"],
        "remove": ["dark", "2"],
        "fills": ["zero", "noise", "swap"],
        "tokens": ["all", "first", [7, 5]],
    }
    found = grid(**options)
    assert len(found) == (2 + 2 + 1) * 3 * 3 * 3 == len({cell.name for cell in found})
    assert {str(site) for cell in found for site in cell.edits} == {
        *("exit 0", "exit 2", "head 0.2", "head 2.2", "embedding")
    }
    by = {cell.name: cell for cell in found}
    both = by["exit 0 + exit 2: remove dark, swap, tokens 5 7"]
    assert list(both.edits) == [ss.Site("exit", 0), ss.Site("exit", 2)]
    for edit in both.edits.values():
        assert isinstance(edit, ss.Filter) and isinstance(edit.fill, ss.Swap)
        assert edit.tokens == [7, 5] and edit.rank == 8
        assert torch.equal(edit.blocked.basis, small_sweeps.spectrum().dark().basis)
    assert {"embedding: keep 1-2", "exit 0: remove 2, noise", "head 0.2: remove 2, first"} <= set(by)
    assert all(cell.draw is None for cell in found)


def test_all_layers_by_default() -> None:
    assert names(remove=["4"]) == ["exit 0: remove 4", "exit 1: remove 4", "exit 2: remove 4"]
    assert names(sites=["embedding"], remove=["4"]) == ["embedding: remove 4"]
    assert names(layers=[[1, 1], 1], remove=["4"]) == ["exit 1: remove 4"], "a place once"


def test_other_tokens_are_other_cells() -> None:
    """Token ids and masks once shared a name, and all but the first were dropped."""
    masks = [torch.arange(66) < n for n in (3, 5)]
    found = grid(layers=[0], remove=["4"], tokens=[[3], [4], {4, 30}, *masks])
    assert len(found) == 5
    assert [cell.name for cell in found[:3]] == [
        f"exit 0: remove 4, tokens {ids}" for ids in ("3", "4", "4 30")
    ]


def test_the_ladder() -> None:
    assert names(layers=[0], ladder=["phi", "psi", "omega"]) == [
        *(f"exit 0: Phi 1:{k}" for k in (1, 2, 3, 4)),
        *(f"exit 0: Psi {k} (u-e)" for k in (1, 2, 3, 4)),
        *(f"exit 0: Omega {k}" for k in (1, 2, 3)),
    ]
    assert names(layers=[0], ladder=["omega"], kept=[2, 4]) == ["exit 0: Omega 2"]
    (cell,) = grid(layers=[0], ladder=["psi"], kept=[3])
    (edit,) = cell.edits.values()
    assert isinstance(edit, ss.Filter) and edit.through is not None and edit.rank == 8


def test_controls_have_the_rank_and_are_shared() -> None:
    found = grid(layers=[1], keep=["1-3"], remove=["4", "1-2"], ladder=["phi"], kept=[4], controls=2)
    assert [(cell.name, cell.draw) for cell in found] == [
        ("exit 1: keep 1-3", None),
        ("exit 1: Rnd 8 (seed 0)", 0),
        ("exit 1: Rnd 8 (seed 1)", 1),
        ("exit 1: remove 4", None),
        ("exit 1: remove 1-2", None),
        ("exit 1: Rnd 16 (seed 0)", 0),
        ("exit 1: Rnd 16 (seed 1)", 1),
        ("exit 1: Phi 1:4", None),  # removes nothing: no control
    ]
    (edit,) = found[2].edits.values()
    assert isinstance(edit, ss.Filter)
    assert torch.equal(edit.blocked.basis, ss.rnd(32, 8, 1).blocked.basis)
    filled = grid(layers=[1], remove=["4"], fills=["swap"], tokens=["first"], controls=1)
    (edit,) = filled[1].edits.values()
    assert isinstance(edit, ss.Filter) and isinstance(edit.fill, ss.Swap) and edit.tokens == "first"
    assert filled[1].name == "exit 1: Rnd 8 (seed 0), swap, first"


def test_fills() -> None:
    found = grid(sites=["exit", "mlp"], layers=[[0, 2]], remove=["4"], fills=["zero", "mean", "noise"])
    fills = {cell.name: [edit.fill for edit in cell.edits.values()] for cell in found}  # pyright: ignore
    assert fills["exit 0 + exit 2: remove 4"] == [ss.Zero(), ss.Zero()]
    assert fills["mlp 0 + mlp 2: remove 4, noise"] == [ss.Noise(0), ss.Noise(0)]
    for kind in ("exit", "mlp"):
        means = fills[f"{kind} 0 + {kind} 2: remove 4, mean"]
        for layer, mean in zip((0, 2), means, strict=True):
            expected = ss.mean_residual(tiny_models.model(), small_sweeps.windows(), ss.Site(kind, layer))
            assert torch.equal(mean.reference, expected)
    sources = [fill.source for parts in fills.values() for fill in parts if isinstance(fill, ss.Mean)]
    assert len(set(sources)) == 4 and "" not in sources


def test_the_mean_is_of_its_model_and_windows() -> None:
    def source(model: ss.LanguageModel, windows: ss.Windows) -> str:
        (cell,) = ss.grid(model, windows, small_sweeps.spectrum(), layers=[0], remove=["4"], fills=["mean"])
        (edit,) = cell.edits.values()
        return edit.fill.source  # pyright: ignore[reportFunctionMemberAccess]

    windows = small_sweeps.windows()
    fewer = ss.Windows.of_ids(windows.rows[:4], tiny_models.model())
    other = ss.load(tiny_models.build(seed=1))
    assert source(tiny_models.model(), windows) == source(tiny_models.model(), windows.as_documents())
    assert (
        len(
            {source(tiny_models.model(), windows), source(tiny_models.model(), fewer), source(other, windows)}
        )
        == 3
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a grid without filters: give keep, remove or ladder"),
        ({"remove": ["4"], "layers": []}, "an empty grid: give at least one site, layer, fill and"),
        ({"remove": ["4"], "layers": [[]]}, "an empty grid"),
        ({"remove": ["4"], "sites": []}, "an empty grid"),
        ({"remove": ["4"], "fills": []}, "an empty grid"),
        ({"remove": ["4"], "tokens": []}, "an empty grid"),
        ({"ladder": ["phi"], "kept": []}, "a grid without filters"),
        ({"ladder": ["phi"], "kept": [5]}, "bands 1 to 5: the spectrum has bands 1 to 4"),
        ({"ladder": ["phi"], "kept": [0]}, "bands 1 to 0"),
        ({"ladder": ["rho"]}, "ladder 'rho': choose from phi, psi, omega"),
        ({"remove": ["5"]}, "bands 5 to 5: the spectrum has bands 1 to 4"),
        ({"keep": ["darkest"]}, "'darkest' in 'darkest' is not a band specification"),
        ({"remove": ["4"], "layers": [3]}, "layer 3: LlamaForCausalLM has layers 0 to 2"),
        ({"remove": ["4"], "layers": [0, [1, -1]]}, "layer -1"),
        ({"remove": ["4"], "sites": ["head:4"]}, "head 4: LlamaForCausalLM has heads 0 to 3"),
        ({"remove": ["4"], "sites": ["head"]}, "a head site needs its head"),
        ({"remove": ["4"], "sites": ["embedding:1"]}, "no other site has one"),
        ({"remove": ["4"], "sites": ["nowhere"]}, "site 'nowhere': choose from embedding, queries"),
        ({"remove": ["4"], "fills": ["zeros"]}, "fill 'zeros': choose from zero, mean, swap, noise"),
        ({"remove": ["4"], "tokens": ["last"]}, "tokens 'last': choose 'all', 'first'"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ss.InputError) as refused:
        grid(**options)
    assert message in str(refused.value)


def test_psi_needs_the_embedding() -> None:
    with pytest.raises(ss.InputError, match="Psi needs the spectrum of the embedding as well"):
        ss.grid(tiny_models.model(), small_sweeps.windows(), small_sweeps.spectrum(), ladder=["psi"])


def test_names_are_unique() -> None:
    cell = ss.sweeps.Cell("twice", {})
    with pytest.raises(ss.InputError, match="1 names of cells occur more than once, such as 'twice'"):
        named([cell, cell])
    for nothing in ([], {}):
        with pytest.raises(ss.InputError, match="a sweep without cells"):
            named(nothing)
    assert [c.name for c in named({"a": {}, "b": {}})] == ["a", "b"]


def test_a_sweep_refuses_cells_that_mean_nothing() -> None:
    site = ss.Site("exit", 1)
    for edits, message in (
        ({ss.Site("exit", 3): ss.rnd(32, 2)}, "layer 3"),
        ({site: ss.rnd(16, 2)}, "width 16"),
        ({site: ss.rnd(32, 2).at([97])}, "token id 97"),
        ({site: ss.rnd(32, 2).filled(ss.Mean(torch.ones(16)))}, "a mean of width 16"),
    ):
        with pytest.raises(ss.InputError, match=message):
            small_sweeps.sweep({"bad": edits})


def test_a_swap_without_a_donor_is_refused_before_the_start() -> None:
    swap = {"good": {}, "swapped": {ss.Site("exit", 1): ss.rnd(32, 2).filled(ss.Swap())}}
    for size in (1, 2, 5):
        assert [len(indices) for indices, _ in small_sweeps.sweep(swap, batch_size=size).batches] == [5]
    ids = [torch.zeros(n, dtype=torch.long) for n in (66, 66, 65)]
    with pytest.raises(ss.InputError, match="window 2 is the only one of its length"):
        ss.Sweep.of(tiny_models.model(), ss.Windows.of_ids(ids, tiny_models.model()), swap)
