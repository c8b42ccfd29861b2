"""The content address of a cell changes with all that its numbers depend on, and with nothing else."""

import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import small_sweeps, tiny_models
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama

import spectral_sinks as ss
from spectral_sinks.measure.nll import replay
from spectral_sinks.models.patches import patches
from spectral_sinks.sweeps import content_address as address

EXIT = ss.Site("exit", 1)
CONTEXT = {"weights": "w", "data": "d", "metrics": ["nll"], "version": 1, "batch_size": 16}


def of(edits: Any, **context: Any) -> str:
    return address.address(CONTEXT | context, edits)


def at(edit: Any) -> str:
    return of({EXIT: edit})


def subspace(members: list[int], fingerprint: str = "raw") -> ss.Subspace:
    marked = torch.zeros(6, dtype=torch.bool)
    marked[members] = True
    return ss.Subspace.of_members(torch.eye(6, dtype=torch.float64), marked, "name", fingerprint)


DARK = ss.remove(subspace([5]))


def test_it_is_the_same_in_every_interpreter() -> None:
    """Literals: another value here means that all stores there are would be computed again."""
    assert at(DARK) == "ff90891b1cecc5caa0c56cd0587f7080"
    assert at(ss.rnd(6, 2, 1).at([4, 2]).filled(ss.Noise(3))) == "5aa9f52de59c118ae76fd90a2c5cbdaf"


def test_addresses_of_stored_cells_stay_the_same() -> None:
    """Values computed before edits had a class of their own, on bases without rounding; that of the swap in
    batches of 16 windows, in which it still pairs them.
    """

    def own(x: torch.Tensor) -> torch.Tensor:
        return x

    own.address = "mine"  # pyright: ignore[reportFunctionMemberAccess]
    three = ss.Subspace(torch.eye(8, dtype=torch.float64)[:, :3], "three")
    mask = torch.tensor([True, False])
    both = ss.Filter(three.complement(), three, ss.Noise(3), ss.At(4, 1))
    expected: dict[str, dict[ss.Site, Any]] = {
        "44917915a53a46ce9fc9a5d4a0dde624": {EXIT: ss.remove(three)},
        "c5e3b99fd58fe94dabac3ad07b39e1ea": {EXIT: ss.remove(three, ss.Swap(), "all-but-first")},
        "9a078cb36cad57d4fff998e9b409703b": {EXIT: both, ss.Site("embedding"): ss.rnd(8, 2, 7)},
        "c00296b9adcd9afb06828660efde45eb": {EXIT: ss.remove(three, ss.Mean(torch.ones(8)), [5, 2, 5])},
        "7d06b7eca965dc6090e50efbbbd4ec5b": {EXIT: ss.remove(three, ss.Mean(torch.ones(8), "texts"), mask)},
        "e2a319a2b76b01fc8f086c4802dc7858": {EXIT: ss.spectra.NormRestored(ss.remove(three))},
        "09ea1e62c692ccd486dbb092007485e2": {EXIT: ss.remove(three, ss.spectra.DirectionSwap(2))},
        "a2de5f6faa392e682326d1c2a0956a12": {EXIT: ss.spectra.carry(8, 0, ss.At(3))},
        "2105cf19dc427828770df863ee9016df": {EXIT: own},
        "dda111674a2b31b8c2b5507203263750": {},
    }
    assert [of(edits, batch_size=4) for edits in expected.values()] == list(expected)


@pytest.mark.parametrize("key", ["weights", "data", "metrics", "version"])
def test_what_all_cells_share(key: str) -> None:
    assert of({EXIT: DARK}, **{key: "other"}) != at(DARK)


def test_the_batch_size_matters_to_no_cell() -> None:
    for fill in (ss.Zero(), ss.Noise(), ss.Mean(torch.ones(6)), ss.Swap()):
        assert of({EXIT: DARK.filled(fill)}, batch_size=8) == at(DARK.filled(fill))


def test_every_site_and_every_edit_is_a_cell_of_its_own() -> None:
    sites = [ss.Site(kind, layer) for kind in ("exit", "mlp", "keys") for layer in (0, 1)]
    sites += [ss.Site("embedding"), ss.Site("head", 1, 0), ss.Site("head", 1, 1)]
    mask = torch.tensor([True, False, True])
    mean = torch.arange(6.0)
    e, u = subspace([4, 5], "embedding"), subspace([4, 5])
    edits = [
        *(DARK, ss.remove(subspace([4])), ss.remove(subspace([5], "folded")), ss.keep(subspace([5]))),
        *(ss.rnd(6, 1, 0), ss.rnd(6, 1, 1), ss.rnd(6, 2, 0), ss.rnd(6, 5, 0), ss.rnd(6, 5, 0).complement()),
        *(ss.remove(ss.Subspace(torch.eye(6)[:, :1])), ss.keep(ss.Subspace(torch.eye(6)[:, :1]))),
        *(ss.Filter(u, e), ss.Filter(e, u), ss.Filter(u), ss.Filter(e)),
        *(DARK.filled(fill) for fill in (ss.Swap(), ss.Noise(0), ss.Noise(1), ss.Mean(mean))),
        *(DARK.filled(ss.Mean(m)) for m in (mean + 1e-6, mean.double(), mean.expand(2, 6))),
        *(DARK.filled(ss.Mean(mean, source)) for source in ("one", "other")),
        *(DARK.at(tokens) for tokens in ("first", "all-but-first", [1], [1, 2], mask, ~mask, mask[None])),
        *(DARK.at(empty) for empty in ([],)),
        *(small_sweeps.Fixed(0.5), small_sweeps.Fixed(0.25), DARK.filled(small_sweeps.Fixed(0.5))),
    ]
    cells = [{site: DARK} for site in sites] + [{EXIT: edit} for edit in edits[1:]]
    cells += [{}, {EXIT: DARK, sites[0]: DARK}, {EXIT: edits[1], sites[0]: DARK}]
    assert len({of(cell) for cell in cells}) == len(cells)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_change_a_number() -> None:
    two = {EXIT: DARK, ss.Site("mlp", 1): DARK}
    assert of(two) == of(dict(reversed(two.items())))
    assert at(DARK) == at(replace(DARK, name="another", blocked=DARK.blocked.named("another")))
    assert at(DARK.at([3, 1])) == at(DARK.at({1, 3})) == at(DARK.at([1, 3, 3]))
    assert at(DARK.at(frozenset(np.array([1, 3])))) == at(DARK.at([1, 3]))
    assert at(ss.keep(subspace([0, 1, 2, 3, 4]))) == at(DARK), "to keep all others is to remove"
    source = ss.Mean(torch.ones(6), "of it"), ss.Mean(torch.ones(6) + 1e-9, "of it")
    assert len({at(DARK.filled(fill)) for fill in source}) == 1, "the mean of the same, rounded otherwise"
    rounded = ss.rnd(6, 2, 0)
    basis = replace(rounded.blocked, basis=rounded.blocked.basis.nextafter(torch.tensor(2.0).double()))
    assert at(replace(rounded, blocked=basis)) == at(rounded), "the same draw on another machine"


@pytest.fixture(scope="module")
def shared() -> Callable[..., dict[str, Any]]:
    windows = small_sweeps.windows()

    def context(model: Any = None, given: ss.Windows = windows) -> dict[str, Any]:
        return address.context(model or tiny_models.model(), given, 16)

    return context


def changed(change: Callable[[Any], None], **options: Any) -> ss.LanguageModel:
    module = tiny_models.plain()
    change(module)
    return ss.load(module, tokenizer=tiny_models.tokenizer(), **options)


def test_weights_and_settings(shared: Callable[..., Any], tmp_path: Path) -> None:
    def one_bit(module: Any) -> None:
        module.model.layers[2].mlp.up_proj.weight.data.view(torch.int32)[3, 4] ^= 1

    def rope(module: Any) -> None:
        module.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}

    def attention(name: str) -> Callable[[Any], None]:
        return lambda module: module.set_attn_implementation(name)

    expected = shared()
    assert expected["metrics"][-1] == "sink_mass"
    for change in (one_bit, rope, lambda module: module.bfloat16()):
        found = shared(changed(change))
        assert found.pop("weights") != expected["weights"]
        assert found == {key: value for key, value in expected.items() if key != "weights"}
    for model in (
        ss.load(tiny_models.save(tmp_path / "elsewhere")),
        changed(attention("sdpa_opening")),
        changed(lambda module: module.requires_grad_(False), device="cpu"),
    ):
        assert shared(model) == expected, "path, kind of attention, device"
    blind = shared(changed(attention("sdpa")))
    assert blind == expected | {"metrics": expected["metrics"][:-1]}, "no sink mass is read"


@pytest.mark.usefixtures("unchecked")
def test_data(shared: Callable[..., Any]) -> None:
    windows, expected = small_sweeps.windows(), shared()
    ids = torch.stack(windows.rows)
    other = ids.clone()
    other[4, 65] += 1
    model, owners = tiny_models.model(), small_sweeps.DOCUMENTS
    for rows, owner in ((other, owners), (ids, None), (ids[:4], owners[:4]), (ids[[1, 0, 2, 3, 4]], owners)):
        found = shared(given=ss.Windows.of_ids(rows, model, owner))
        assert found.pop("data") != expected["data"]
        assert found == {key: value for key, value in expected.items() if key != "data"}
    same = ss.Windows.of_ids(ids, model, np.array(owners), cut="otherwise")
    assert shared(given=same) == expected
    short = shared(given=ss.Windows.of_ids(ids[:, :63], model, owners))
    assert "sink_mass" not in short["metrics"]


def test_the_version_of_the_code(shared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared()
    monkeypatch.setattr(replay, "VERSION", replay.VERSION + 1)
    assert shared() == before | {"version": replay.VERSION}


def test_conventions_and_bands_of_a_spectrum() -> None:
    spectra = [
        ss.read_spectrum(tiny_models.model(), matrix, convention=convention, use_cache=False)
        for matrix, convention in (
            ("unembedding", "raw"),
            ("unembedding", "folded"),
            ("embedding", "raw"),
        )
    ]
    made = [*(at(ss.remove(s.dark())) for s in spectra), *(at(ss.remove(s.band(19))) for s in spectra)]
    assert len(set(made)) == 6
    raw = spectra[0]
    assert at(ss.remove(raw.band(20))) == at(ss.remove(raw.dark())) == at(ss.phi(raw, 1, 19))
    assert at(ss.remove(raw.with_bands(10).band(10))) == at(ss.remove(raw.bands(19, 20)))


def test_the_same_under_two_names_is_measured_once_and_told_twice(tmp_path: Path) -> None:
    s = small_sweeps.spectrum()
    cells = {"keep": ss.phi(s, 1, 3), "remove": ss.remove(s.band(4)), "other": ss.remove(s.band(1))}
    sweep = small_sweeps.sweep({name: {EXIT: edit} for name, edit in cells.items()})
    assert len(set(sweep.addresses)) == 2 and ss.sweeps.plan(sweep).cells == 2
    done = ss.sweep(sweep, tmp_path / "out")
    assert (done.report.computed, done.report.found) == (2 * 5, 0)
    assert len(done.store.rows()) == 2 * 5
    table, summary = done.table, done.summary()
    assert list(summary["name"]) == list(cells) and list(summary["documents"]) == [4] * 3
    assert list(summary["filter"]) == ["Phi 1:3", "remove band 4", "remove band 1"]
    assert list(table["name"]) == [name for name in cells for _ in range(4)]
    keep, remove = (
        table[table["name"] == name][small_sweeps.NUMBERS].to_numpy() for name in ("keep", "remove")
    )
    assert (keep == remove).all()
    again = ss.sweep(small_sweeps.sweep({"by another name": {EXIT: cells["remove"]}}), tmp_path / "out")
    assert again.report.computed == 0 and again.report.found == 5
    assert list(again.summary()["name"]) == ["by another name"]


def test_custom_functions_say_what_they_are(tmp_path: Path) -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return x / 2

    refused = "half has no content address, so its results cannot be stored: give it an attribute `address`"
    for edit in (half, DARK.filled(lambda removed, blocked: removed)):
        with pytest.raises(ss.InputError, match="has no content address"):
            at(edit)
    with pytest.raises(ss.InputError, match=refused):
        ss.sweep(small_sweeps.sweep({"half": {EXIT: half}}), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is begun"
    half.address = "half"  # pyright: ignore[reportFunctionMemberAccess]
    done = ss.sweep(small_sweeps.sweep({"half": {EXIT: half}}), tmp_path / "out")
    effect = ss.evaluate(tiny_models.model(), small_sweeps.windows(), {EXIT: half})
    assert done.table["nll"].to_numpy() == pytest.approx(effect.table["nll"].to_numpy())
    assert done.table["rank"].isna().all() and set(done.table["filter"]) == {"custom"}


def test_distinct_cells_are_the_first_of_each_address() -> None:
    sweep = small_sweeps.sweep()
    assert (len(sweep.cells), len(sweep.distinct), len(set(sweep.addresses))) == (48, 36, 36)
    assert list(sweep.distinct) == sorted(sweep.distinct)
    assert all(sweep.addresses[i] not in sweep.addresses[:i] for i in sweep.distinct)
    assert {cell for unit in sweep.units for cell in unit.cells} == set(sweep.distinct)


def test_a_changed_attention_has_no_address(tmp_path: Path) -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 12).tolist(), model, [0, 1])
    for each in (model, ss.load(model, remote="local")):
        with ss.attending(each, lambda call: None), pytest.raises(ss.InputError, match="before a sweep"):
            address.context(each, windows, 4)
        assert address.context(each, windows, 4)


# What acts besides the weights that were hashed


CELL = {"x": {EXIT: ss.rnd(32, 3)}}


def marked(function: Any, address: str) -> Any:
    def own(*given: Any, **options: Any) -> Any:
        return function(*given, **options)

    own.address = address  # pyright: ignore[reportFunctionMemberAccess]
    return own


def numbers(model: ss.LanguageModel, folder: Path) -> Any:
    """The NLL that a sweep returns, which is that of a measurement without a store."""
    made = ss.Sweep.of(model, small_sweeps.windows(), CELL)
    found = ss.sweep(made, folder).table["nll"].to_numpy()
    expected = ss.evaluate(model, small_sweeps.windows(), CELL["x"]).table["nll"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    return found


def in_place(module: Any) -> None:
    module.model.layers[2].mlp.up_proj.weight.data.mul_(3)


def under_no_grad(module: Any) -> None:
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight[[0, 1]] = (
            module.model.layers[2].mlp.up_proj.weight[[1, 0]] * 4
        )


def frequencies(module: Any) -> None:
    module.model.rotary_emb.inv_freq.mul_(0.1)


def epsilon(module: Any) -> None:
    module.model.norm.variance_epsilon = 1.0


def activation(module: Any) -> None:
    module.model.layers[1].mlp.act_fn = torch.nn.ReLU()


@pytest.mark.parametrize("change", [in_place, under_no_grad, frequencies, epsilon, activation])
def test_a_model_that_was_changed_after_its_hash(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = changed(lambda module: None)
    sweep = ss.Sweep.of(model, small_sweeps.windows(), CELL)
    before = ss.sweep(sweep, tmp_path / "out").table["nll"].to_numpy()
    change(model.module)
    after = numbers(model, tmp_path / "out")
    assert (abs(after - before) > 1e-3).any(), "the change is one"
    again = ss.sweep(sweep, tmp_path / "out")
    assert again.report.computed == 0 and (again.table["nll"].to_numpy() == after).all(), (
        "the same sweep, anew"
    )
    assert len(ss.sweeps.Store(tmp_path / "out").rows()) == 2 * 5


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_a_number_of_a_module_counts_whatever_its_type(kind: Callable[[float], Any]) -> None:
    model = changed(lambda module: None)
    attention = model.module.model.layers[1].self_attn
    found: list[str] = []
    for scaling in (0.1, 3.0, 0.1):
        attention.scaling = kind(scaling)
        found.append(model.fingerprint)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    "values", [("full", "sliding"), ((1, None), (2, None)), (["a", [1.5]], ["a", [2.5]])]
)
def test_strings_and_sequences_of_a_module_count(values: tuple[Any, Any]) -> None:
    model = changed(lambda module: None)
    attention = model.module.model.layers[1].self_attn
    found: list[str] = []
    for value in (values[0], values[1], values[0]):
        attention.kind = value
        found.append(model.fingerprint)
    assert found[0] == found[2] != found[1]


def test_a_sweep_measures_anew_what_it_holds(tmp_path: Path) -> None:
    model = changed(lambda module: None)
    sweep = ss.Sweep.of(model, small_sweeps.windows(), CELL)
    ss.sweep(sweep, tmp_path / "one", say=lambda _: None)
    in_place(model.module)
    found = ss.sweep(sweep, tmp_path / "two").table["nll"].to_numpy()
    expected = ss.evaluate(model, small_sweeps.windows(), CELL["x"]).table["nll"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def doubling(kind: str, patch: pytest.MonkeyPatch, address: str | None) -> ss.LanguageModel:
    """A model in which a function doubles what one MLP writes; `patch` undoes what outlives the model."""

    def own(function: Any) -> Any:
        return function if address is None else marked(function, address)

    if kind == "forward of a class":
        mlp = type(tiny_models.plain().model.layers[1].mlp)
        original = mlp.forward
        patch.setattr(mlp, "forward", own(lambda self, x: 2 * original(self, x)))
    elif kind == "function of a file":
        rotated = modeling_llama.apply_rotary_pos_emb

        @functools.wraps(rotated)
        def twice(q: Any, *given: Any, **named: Any) -> Any:
            return rotated(2 * q, *given, **named)

        patch.setattr(modeling_llama, "apply_rotary_pos_emb", own(twice))
    elif kind == "function of a class":
        normed = modeling_llama.LlamaRMSNorm.__call__
        patch.setattr(modeling_llama.LlamaRMSNorm, "__call__", own(lambda *given: 2 * normed(*given)))
    model = changed(lambda module: None)
    part = model.module.model.layers[1].mlp
    if kind == "function of a module":
        del part.act_fn
        part.act_fn = own(functools.partial(lambda factor, x: factor * torch.nn.functional.silu(x), 2))
    elif kind == "hook":
        part.register_forward_hook(own(lambda _, given, output: 2 * output))
    elif kind == "hook before":
        part.register_forward_pre_hook(own(lambda _, given: (2 * given[0],)))
    elif kind == "hook on all":
        hooks: Any = torch.nn.modules.module._global_forward_hooks
        patch.setitem(hooks, -1, own(lambda module, given, output: 2 * output if module is part else None))
    elif kind == "forward":
        forward = part.forward
        part.forward = own(lambda x: 2 * forward(x))
    return model


@pytest.mark.parametrize(
    "kind",
    [
        *("hook", "hook before", "hook on all", "forward", "forward of a class"),
        *("function of a file", "function of a class", "function of a module"),
    ],
)
def test_a_function_that_acts_in_the_model(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = numbers(changed(lambda module: None), out)
    with pytest.MonkeyPatch.context() as patch:
        model = doubling(kind, patch, None)
        with pytest.raises(ss.InputError, match=r"(hook|forward of|function) .* has no content address"):
            ss.sweep(ss.Sweep.of(model, small_sweeps.windows(), CELL), out)
    for place, name in enumerate(("one", "other"), start=2):
        with pytest.MonkeyPatch.context() as patch:
            model = doubling(kind, patch, name)
            assert (abs(numbers(model, out) - plain) > 1e-3).any()
            with pytest.raises(ss.InputError, match="functions of this process"):
                pickle.dumps(model)
        assert len(ss.sweeps.Store(out).rows()) == place * 5
    assert (numbers(changed(lambda module: None), out) == plain).all()


def test_an_attention_implementation_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AttentionInterface._global_mapping
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(registry))
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(masks))

    def relu(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).relu().tril() / query.shape[2]
        return (scores @ value).transpose(1, 2).contiguous(), scores

    AttentionMaskInterface.register("relu", masks["eager"])
    AttentionInterface.register("relu", relu)
    model = changed(lambda module: None)
    plain = numbers(model, tmp_path / "out")
    model.module.set_attn_implementation("relu")
    with pytest.raises(ss.InputError, match=r"attention implementation 'relu': relu has no content"):
        ss.sweep(ss.Sweep.of(model, small_sweeps.windows(), CELL), tmp_path / "out")
    AttentionInterface.register("relu", marked(relu, "relu by length"))
    assert (abs(numbers(model, tmp_path / "out") - plain) > 1e-3).any()
    assert len(ss.sweeps.Store(tmp_path / "out").rows()) == 2 * 5
    AttentionInterface.register("sdpa", marked(registry["sdpa"], "mine"))
    model.module.set_attn_implementation("sdpa")
    numbers(model, tmp_path / "out")
    assert len(ss.sweeps.Store(tmp_path / "out").rows()) == 3 * 5


class Louder(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def test_a_module_of_ones_own_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = changed(lambda module: None)
    plain = numbers(model, tmp_path / "out")
    loud = changed(lambda module: setattr(module.model.layers[1].mlp, "act_fn", Louder(torch.nn.SiLU())))
    assert (abs(numbers(loud, tmp_path / "out") - plain) > 1e-3).any()
    assert len(patches(loud)) == 1 and patches(loud)[0].startswith("Louder ")
    monkeypatch.setattr(inspect, "getsource", lambda _: "class Louder: another version")
    assert patches(loud) != patches(changed(lambda module: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", unknown)
        with pytest.raises(ss.InputError, match="the source of the module Louder is not known"):
            patches(loud)
        patch.setattr(Louder, "address", "2", raising=False)
        assert patches(loud) == ["Louder 2"]


def unknown(_: object) -> str:
    raise OSError("could not get source code")


@pytest.mark.parametrize("change", [epsilon, activation])
def test_what_another_process_would_not_have(change: Callable[[Any], None]) -> None:
    model = changed(change)
    with pytest.raises(ss.InputError, match="is not as the configuration describes it"):
        pickle.dumps(model)
