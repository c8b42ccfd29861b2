"""Edits: every kind of edit answers the same questions, and a plain function is wrapped once."""

from typing import Any

import pytest
import torch
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.spectra.edits import Edit, FunctionEdit, as_edit, as_edits, energy_share
from spectral_sinks.spectra.incremental import Nested

IDS = torch.tensor([[5, 7, 9], [7, 7, 5]])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def three() -> ss.Subspace:
    return ss.random_subspace(8, 3, seed=1)


def share_by_loop(removed: Tensor, x: Tensor, selected: Tensor) -> list[float]:
    """The removed share of energy, token by token, for selected tokens `[batch, length]`."""
    means = []
    for window in range(len(x)):
        shares = [
            float(removed[window, t] @ removed[window, t] / (x[window, t] @ x[window, t]))
            for t in range(x.shape[1])
            if selected[window, t]
        ]
        means.append(sum(shares) / max(len(shares), 1))
    return means


def test_a_function_is_wrapped_and_an_edit_is_not(three: ss.Subspace) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    edit = as_edit(double)
    assert isinstance(edit, FunctionEdit) and edit.function is double and edit.name == "custom"
    assert as_edit(edit) is edit
    for known in (ss.remove(three), ss.spectra.NormRestored(ss.remove(three))):
        assert as_edit(known) is known
    both = as_edits({"a": double, "b": ss.remove(three)})
    assert list(both) == ["a", "b"] and all(isinstance(each, Edit) for each in both.values())
    assert edit.rank is None and not edit.per_window and edit.labels is None and edit.positions is None
    with pytest.raises(ss.InputError, match="double has no content address"):
        _ = edit.address
    double.address, double.name = "double", "twice"  # pyright: ignore[reportFunctionMemberAccess]
    assert as_edit(double).address == "double" and as_edit(double).name == "twice"


def test_all_edits_are_applied_with_the_token_ids(three: ss.Subspace, x: Tensor) -> None:
    removed = ss.remove(three)
    selecting = removed.at([7])
    expected = torch.where((IDS == 7)[..., None], removed(x), x)
    assert torch.equal(selecting.apply(x, IDS), expected)
    assert torch.equal(as_edit(lambda x: x + 1).apply(x, IDS), x + 1)
    restored = ss.spectra.NormRestored(removed)
    assert torch.equal(restored.apply(x, IDS), restored(x))


@pytest.mark.parametrize("tokens", ["all", "first", "all-but-first", [7], [3]])
def test_the_removed_share_is_the_mean_over_the_selected_tokens(
    tokens: Any, three: ss.Subspace, x: Tensor
) -> None:
    edit = ss.remove(three, ss.Noise(2)).at(tokens)
    selected = {
        "all": torch.ones(2, 3, dtype=torch.bool),
        "first": torch.tensor([[True, False, False]] * 2),
        "all-but-first": torch.tensor([[False, True, True]] * 2),
    }
    chosen = selected[tokens] if isinstance(tokens, str) else torch.isin(IDS, torch.tensor(tokens))
    for remover in (None, Nested(x)):
        out, share = edit.apply_and_measure(x, IDS, remover)
        torch.testing.assert_close(out, edit(x, IDS))
        assert share.tolist() == pytest.approx(share_by_loop(three.project(x), x, chosen))


def test_a_function_may_write_into_its_argument(x: Tensor) -> None:
    def halve(x: Tensor) -> Tensor:
        return x.mul_(0.5)

    before = x.clone()
    out, share = as_edit(halve).apply_and_measure(x, IDS)
    assert torch.equal(x, before) and torch.equal(out, before / 2)
    assert share.tolist() == pytest.approx([0.25, 0.25])
    assert energy_share(torch.zeros_like(x), torch.zeros_like(x)).tolist() == [0.0, 0.0]


def test_masks_are_cut_to_windows(three: ss.Subspace) -> None:
    mask = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    edit = ss.remove(three).at(mask)
    cut = edit.for_windows([2, 0], 3)
    assert isinstance(cut.tokens, Tensor) and torch.equal(cut.tokens, mask[[2, 0]])
    with pytest.raises(ss.InputError, match="a mask of 3 rows for 4 windows"):
        edit.for_windows([0], 4)
    for other in (ss.remove(three), ss.remove(three).at(mask[0])):
        assert other.for_windows([0], 4) is other


def test_what_filters_answer(three: ss.Subspace) -> None:
    removed = ss.remove(three)
    assert [removed.filled(f).per_window for f in (ss.Zero(), ss.Noise(), ss.Mean(torch.ones(8)))] == [
        True
    ] * 3
    assert not removed.filled(ss.Swap()).per_window and removed.filled(ss.Swap()).swaps
    assert not removed.filled(ss.spectra.NoOp()).per_window, "a fill of unknown kind may mix windows"
    assert removed.at(ss.At(4, 1)).positions == {1, 4} and removed.at("first").positions == {0}
    assert removed.positions is None and removed.at([0]).positions is None
    assert ss.spectra.carry(8, 2, ss.At(4)).copies_from == 2 and removed.copies_from == -1
    moved = removed.at_position(3)
    assert moved.positions == {3} and moved.blocked is three
    assert [removed.at(t).acts_on_first({7}) for t in ("all", "all-but-first", [7], [5])] == [
        True,
        False,
        True,
        False,
    ]


def test_what_remains_of_a_filter_for_a_later_token(three: ss.Subspace) -> None:
    reference = torch.arange(40.0).view(5, 8)
    filled = ss.remove(three, ss.Mean(reference))
    assert ss.remove(three).at("first").within(3, 1) is None
    assert ss.remove(three).at(ss.At(1)).within(3, 1) is None
    later = filled.at("all-but-first").within(3, 1)
    assert later is not None and later.tokens == "all" and isinstance(later.fill, ss.Mean)
    assert torch.equal(later.fill.reference, reference[3:4])
    with pytest.raises(ss.InputError, match="a mean of 5 positions, 6 are read"):
        filled.check_continuation(7)
    filled.check_continuation(6)


def test_blocks_of_a_text_are_filtered_as_the_whole_is(three: ss.Subspace) -> None:
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(24).view(2, 12)
    mean = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    removed = ss.remove(three)
    selections: list[Any] = ["all", "first", "all-but-first", ss.At(0, 4, 11), mask, mask[0], [3, 17]]
    edits: list[Any] = [removed.at(tokens) for tokens in selections]
    edits += [removed.at(tokens).filled(ss.Mean(mean)) for tokens in selections]
    edits += [ss.spectra.NormRestored(removed.at(tokens)) for tokens in ("all", "first", "all-but-first")]
    edits += [removed.filled(ss.Swap()), ss.spectra.FakeQuantiser(4, per="token", tokens=mask)]
    edits += [ss.spectra.carry(8, 2, ss.At(3)), as_edit(lambda x: 2 * x)]
    for edit in edits:
        parts = []
        for start in range(0, 12, 5):
            part, own = x[:, start : start + 5], ids[:, start : start + 5]
            acting = edit.within(start, part.shape[1])
            parts.append(part if acting is None else acting.apply(part, own))
        torch.testing.assert_close(torch.cat(parts, 1), edit.apply(x, ids), msg=repr(edit))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda removed: removed.filled(ss.Noise()), "need the whole text"),
        (lambda removed: ss.spectra.carry(8, 0, [7]), "need the whole text"),
        (lambda removed: removed.filled(ss.Mean(torch.ones(6, 8))), "over 6 positions, and 8 are read"),
        (lambda removed: ss.spectra.FakeQuantiser(8, per="tensor"), "a step for a whole text"),
    ],
)
def test_what_needs_the_tokens_before_is_refused(three: ss.Subspace, make: Any, said: str) -> None:
    edit = make(ss.remove(three))
    edit.within(0, 4)
    with pytest.raises(ss.InputError, match=said):
        edit.within(4, 4)


def test_a_copy_to_tokens_still_to_be_generated_is_refused() -> None:
    with pytest.raises(ss.InputError, match="copies from position 0 to tokens still to be generated"):
        ss.spectra.carry(8, 0, [7]).check_continuation(9)
    ss.spectra.carry(8, 0, ss.At(3)).check_continuation(9)
