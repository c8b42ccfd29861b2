"""The same functions of a model, called where the model is: numbers, payloads, refusals."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import fake_ndif, tiny_models
from support.user_functions import entropies, halved

import spectral_sinks as ss
from spectral_sinks.measure.attention.by_position import received_in_maps
from spectral_sinks.measure.circuits import no_op
from spectral_sinks.measure.nll.remote_batch import RemoteBatch
from spectral_sinks.measure.residual import massive
from spectral_sinks.measure.sinks import comparison, edit_effects
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote import serialization, transport
from spectral_sinks.remote.serialization import pack, sources, unpack

TOKENS = 66


def windows(model: ss.LanguageModel) -> ss.Windows:
    return ss.Windows.of_ids(tiny_models.ids(5, TOKENS), model, [0, 0, 1, 2, 3])


def spectrum(model: ss.LanguageModel) -> ss.Spectrum:
    return ss.read_spectrum(model, bands=4, use_cache=False)


def cells(u: ss.Spectrum) -> dict[str, dict[ss.Site, Any]]:
    exit, last = ss.Site("exit", 0), ss.Site("exit", 2)
    mask = torch.zeros(5, TOKENS, dtype=torch.bool)
    mask[2, 3:9] = True
    return {
        "no-op": {},
        "dark": {exit: ss.remove(u.dark())},
        "thick": {exit: ss.phi(u, 1, 1), last: ss.phi(u, 1, 3)},
        "random": {exit: ss.rnd(u.d, 3, 7), ss.Site("mlp", 1): ss.rnd(u.d, 29, 7)},
        "random kept": {exit: ss.keep(ss.random_subspace(u.d, 3, 7))},
        "intersection": {
            exit: ss.remove(ss.spectra.intersection(u.bands(2, 4), ss.random_subspace(u.d, 20)))
        },
        "swap": {exit: ss.remove(u.band(2), ss.Swap(), "all-but-first")},
        "noise": {ss.Site("attention", 1): ss.remove(u.band(1), ss.Noise(3))},
        "mean": {exit: ss.remove(u.band(1), ss.Mean(torch.ones(TOKENS, u.d)))},
        "masked": {exit: ss.remove(u.band(4)).at(mask)},
        "by id": {exit: ss.remove(u.band(4)).at({5, 9, 11})},
        "psi": {exit: ss.psi(u, ss.spectra.random_spectrum(u.d, 4), 2)},
        "head": {ss.Site("head", 1, 2): ss.remove(u.bands(1, 2))},
        "queries": {ss.Site("queries", 1): ss.remove(u.bands(1, 2))},
        "own": {last: lambda x: 0.5 * x + x.mean()},
    }


def tables(model: ss.LanguageModel, u: ss.Spectrum) -> pd.DataFrame:
    effects = ss.evaluate_all(model, windows(model), cells(u), batch_size=3)
    return pd.concat([effect.table.assign(name=name) for name, effect in effects.items()])


def difference(one: pd.DataFrame, other: pd.DataFrame) -> float:
    numbers = one.select_dtypes("number").columns
    assert list(one.columns) == list(other.columns) and one[numbers].notna().any().all()
    return float((one[numbers] - other[numbers]).abs().max().max())


def by_position(found: ss.attention.PositionAttention) -> dict[str, Any]:
    return {name: getattr(found, name).ravel() for name in ("total", "seen")}


def by_sink(found: ss.sinks.Sinks) -> dict[str, Any]:
    assert found.sinks
    sizes = [getattr(found.residuals, name).ravel() for name in ("norm", "peak", "dimension", "median")]
    shares = [sink.dark_share.value for sink in found.sinks]
    return {"value": np.concatenate([found.attention.total.ravel(), *sizes, shares])}


def by_convention(found: ss.sinks.Sinks) -> pd.DataFrame:
    assert found.conventions == ("folded", "raw")
    return found.summary()[["dark_share", "dark_share_raw", "other_dark_share_raw"]]


def both() -> list[ss.Spectrum]:
    return ss.read_spectra(tiny_models.model(), bands=4)


def comparisons(u: ss.Spectrum) -> dict[str, Any]:
    return {
        "masked": ss.attention.MaskKey(0),
        "nothing written": ss.attention.SetValue(0),
        "dark": {ss.Site("exit", 0): ss.remove(u.dark(), tokens=ss.At(0))},
        "swap": {ss.Site("exit", 1): ss.remove(u.dark(), ss.Swap())},
        "prefix": ss.attention.Prefix((3, 4)),
        "own": [halved, {ss.Site("mlp", 1): lambda x: 0.5 * x}],
    }


def frequent(w: ss.Windows) -> int:
    return int(torch.stack(list(w.rows))[:, :40].flatten().bincount().argmax())


MEASUREMENTS: dict[str, Callable[[ss.LanguageModel, ss.Windows, ss.Spectrum], pd.DataFrame]] = {
    "energy": lambda m, w, u: ss.energy(m, w, u),
    "energy, two conventions": lambda m, w, u: ss.energy(m, w, both()),
    "attention": lambda m, w, u: ss.attention_by_head(m, w),
    "verdict": lambda m, w, u: ss.sink_verdict(m, w, u, draws=3).summary(),
    "verdict, two conventions": lambda m, w, u: ss.sink_verdict(m, w, both(), draws=3).summary(),
    "received": lambda m, w, u: ss.sinks.received(m, w, {"dark": u.dark(), "rest": u.dark().complement()}),
    "lens": lambda m, w, u: ss.residual.band_lens(m, w, {"u": u}, bands=[1, 4]),
    "lens of a sample": lambda m, w, u: ss.residual.band_lens(m, w, {"u": u}, bands=[1, 4], predict=3),
    "weights": lambda m, w, u: ss.residual.weight_shares(m, {"dark": u.dark()}, convention="folded"),
    "screen": lambda m, w, u: ss.nll.first_order(m, w, u),
    "mean": lambda m, w, u: pd.DataFrame(ss.mean_residual(m, w, ss.Site("exit", 1)).numpy()),
    "generate": lambda m, w, u: pd.DataFrame(
        ss.generate(
            m, tiny_models.ids(2, 9), {ss.Site("exit", 0): ss.remove(u.dark())}, new=5, temperature=1.0
        )
        .flatten(0, 1)
        .numpy()
    ),
    "continuation": lambda m, w, u: pd.DataFrame(
        ss.nll.continuation_nll(m, tiny_models.ids(2, 9), tiny_models.ids(2, 6)[:, None]).numpy()
    ),
    "positions": lambda m, w, u: pd.DataFrame(
        by_position(ss.attention.attention_by_position(m, w, length=40))
    ),
    "sinks": lambda m, w, u: pd.DataFrame(by_sink(ss.find_sinks(m, w, u, epsilon=0.07, draws=3))),
    "sinks, two conventions": lambda m, w, u: by_convention(
        ss.find_sinks(m, w, both(), epsilon=0.07, draws=3)
    ),
    "compare": lambda m, w, u: ss.compare(m, w, comparisons(u), controls=2, spectrum=u, batch_size=3).table,
    "designate": lambda m, w, u: ss.designate(m, w, 3, spectrum=u, controls=2, draws=3).tried,
    "designate a token": lambda m, w, u: ss.designate(m, w, token=frequent(w), controls=2).tried,
    "circuits": lambda m, w, u: ss.no_op_circuits(m, w, u).heads.drop(columns="reading_dark"),
    "head use": lambda m, w, u: ss.head_use(m, w, [1, 2, 3, 4, 5]),
    "detectors": lambda m, w, u: ss.circuits.detectors(m, w, 2).table,
    "keys": lambda m, w, u: pd.DataFrame(ss.residual.mean_keys(m, w).flatten(1).numpy()),
    "values": lambda m, w, u: pd.DataFrame(ss.residual.mean_values(m, w, None).flatten(1).numpy()),
    "channels": lambda m, w, u: pd.DataFrame({"": ss.residual.massive_channels(m, w, ss.Site("exit", 1))}),
    "ladder": lambda m, w, u: ss.sweeps.ladder(m, w, ss.Site("exit", 1), u, u, random_at=(2,), draws=2),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_is_the_same_elsewhere(name: str) -> None:
    model = tiny_models.model()
    u, w = spectrum(model), windows(model)
    there = ss.load(model, remote="local")
    measure = MEASUREMENTS[name]
    assert difference(measure(model, w, u), measure(there, w, u)) < 1e-6
    assert there.remote is not None and there.remote.jobs, "nothing was sent"
    assert model.remote is None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_intervention_is_the_same_elsewhere(family: str) -> None:
    model = tiny_models.model(family)
    u = spectrum(model)
    assert difference(tables(model, u), tables(ss.load(model, remote="local"), u)) < 1e-6


def test_a_filter_alone_is_the_same_bit_for_bit() -> None:
    model = tiny_models.model()
    u = spectrum(model)
    there = ss.load(model, remote="local")
    for edit in (ss.remove(u.dark()), ss.phi(u, 1, 1), ss.rnd(u.d, 3)):
        one, other = (ss.evaluate(m, windows(m), {ss.Site("exit", 0): edit}) for m in (model, there))
        assert one.table.equals(other.table)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox parallel", "bert"])
def test_without_weights_at_hand_modules_are_called(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that runs what it is sent apart from the weights: nothing may read them."""
    model = tiny_models.model(family)
    u = spectrum(model)
    before = tables(model, u)
    monkeypatch.setattr(LanguageModel, "weightless", True)
    monkeypatch.setattr(LanguageModel, "head_write", None)
    assert difference(before, tables(model, u)) < 2e-6
    with pytest.raises(ss.InputError, match="weights of"):
        ss.residual.weight_shares(model, {"dark": u.dark()})
    with pytest.raises(ss.InputError, match="gradients"):
        ss.nll.first_order(model, windows(model), u)


def test_continuations_without_a_cache_that_grows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.model()
    before = ss.generate(model, tiny_models.ids(2, 9), new=6)
    monkeypatch.setattr(LanguageModel, "weightless", True)
    assert torch.equal(before, ss.generate(model, tiny_models.ids(2, 9), new=6))


def test_a_refusal_comes_back_as_it_is() -> None:
    there = ss.load(tiny_models.model(), remote="local")
    with pytest.raises(ss.InputError, match=r"layer 7: .* layers 0 to 2"):
        ss.trace(there, tiny_models.ids(), {ss.Site("exit", 7): lambda x: x}, readout=lambda final, *_: 0)
    with pytest.raises(ss.InputError, match="returned shape"):
        ss.trace(
            there, tiny_models.ids(), {ss.Site("exit", 1): lambda x: x[:, 1:]}, readout=lambda final, *_: 0
        )


def test_attention_implementations_are_left_as_they_were() -> None:
    """What sees attention at the far end is taken away again: from the model, and from transformers."""
    from transformers import AttentionInterface

    model = tiny_models.model()
    before = {name: AttentionInterface()[name] for name in AttentionInterface()}
    ss.attention.attention_by_position(ss.load(model, remote="local"), windows(model))
    assert model.config._attn_implementation == "eager"
    assert {name: AttentionInterface()[name] for name in AttentionInterface()} == before


def test_where_weights_are_kept_apart_sinks_are_found_in_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "mistral", "gpt_oss"):  # rows of maps, a sliding window, a learned logit
        model = tiny_models.model(family)
        u, w = spectrum(model), windows(model)
        here = ss.find_sinks(model, w, u, epsilon=0.07, draws=3)
        with monkeypatch.context() as patched:
            patched.setattr(LanguageModel, "weightless", True)
            there = ss.find_sinks(model, w, u, epsilon=0.07, draws=3)
            for refused in (
                lambda model=model, w=w: ss.head_use(model, w),
                lambda model=model, w=w: ss.circuits.detectors(model, w),
                lambda model=model, w=w, u=u: ss.no_op_circuits(model, w, u),
                lambda model=model, w=w: ss.compare(model, w, {"masked": ss.attention.MaskKey(0)}),
                lambda model=model, w=w: ss.designate(model, w, 3),
                lambda model=model, w=w: ss.residual.mean_keys(model, w),
            ):
                with pytest.raises(ss.InputError, match=r"reads the weights of .* server that trusts you"):
                    refused()
        assert here.sinks and [s.position for s in there.sinks] == [s.position for s in here.sinks]
        for name in ("total", "seen", "to_sink_logit"):
            one, other = (getattr(found.attention, name) for found in (here, there))
            assert np.abs(one - other).max() < 1e-5, (family, name)  # sums over 64 queries
        assert here.onset_layer == there.onset_layer
    assert here.to_sink_logit.value > 0.01


def test_too_large_a_comparison_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.model()
    u, w, there = spectrum(model), windows(model), ss.load(model, remote="local")
    moves = {
        f"{i}": {ss.Site("exit", 0): ss.remove(ss.spectra.intersection(u.band(i), u.band(i)))}
        for i in (1, 2, 3)
    }
    here = ss.compare(model, w, moves).table
    ss.remote.examine(there)
    there.remote.jobs.clear()
    monkeypatch.setattr(transport, "PAYLOAD", 6_000)
    assert difference(here, ss.compare(there, w, moves).table) < 1e-6 and len(there.remote.jobs) > 1
    monkeypatch.setattr(transport, "PAYLOAD", 100)
    with pytest.raises(ss.InputError, match=r"a job of .* MB, .* at most"):
        ss.compare(there, w, moves)


def test_what_is_rounded_to_nothing_is_seen_all_the_same() -> None:
    weights = torch.softmax(torch.tensor([[20.0, -1e9, -1e9], [20.0, 0.0, -1e9], [20.0, 0.0, 3.0]]), -1)
    plain, half = (received_in_maps(x[None, None], True, softmax=True)[1] for x in (weights, weights.half()))
    assert plain.tolist() == half.tolist() == [[[3, 2, 1]]]


def test_bands_of_circuits_are_exact_where_bases_travel_in_full() -> None:
    model = tiny_models.model()
    there = ss.load(model, remote="local", factors="float64")
    one, other = (ss.no_op_circuits(m, windows(m), spectrum(model)) for m in (model, there))
    assert difference(one.heads, other.heads) == 0 and difference(one.profile(1, 2), other.profile(1, 2)) == 0
    assert difference(one.sides(0, 1), other.sides(0, 1)) == 0


def test_what_comes_back_is_reduced() -> None:
    """By window, layer and head at most: of the attention of a designation no map by head and position."""
    model = tiny_models.model()
    there, w = ss.load(model, remote="local"), windows(model)
    ss.remote.examine(there)
    numbers = {
        "compare": len(w) * 15 * (5 + 3 * 4 + 3 * 4),
        "designate": 20 * len(w) * (2 * 3 * 64 + 64 + 3 * 4),
        "circuits": len(w) * 3 * 4 * 20 + 3 * 4 * (4 * 66 + 4 * 8 + 100),
    }
    for name, count in numbers.items():
        there.remote.jobs.clear()
        MEASUREMENTS[name](there, w, spectrum(model))
        assert sum(job.received for job in there.remote.jobs) < 8 * count + 25_000, name


@pytest.mark.filterwarnings("ignore:.* has a submodule named 'output'")  # of the server's own wrapper
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoder_is_the_same_elsewhere(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save(tmp_path / "encoder", family)
    fake_ndif.serve(folder, monkeypatch, "fill-mask")
    here = ss.load(folder, attention="eager")
    u, w = spectrum(here), windows(here)
    edits = {ss.Site("exit", 0): ss.remove(u.dark())}
    for there in (ss.load(here, remote="local"), ss.load(folder, remote=True)):
        assert not there.causal and there.weightless == (there.remote.to is True)
        one, other = (ss.evaluate(model, w, edits) for model in (here, there))
        assert difference(one.table, other.table) < 1e-6 and abs(one.delta_nll) > 1e-3
        one, other = (ss.find_sinks(model, w, u, epsilon=0.05, draws=2) for model in (here, there))
        assert difference(one.by_head(), other.by_head()) < 1e-6
        one, other = (ss.head_use(model, w, 3) for model in (here, there))
        assert difference(one, other) < 1e-6
        assert there.remote.jobs


def test_installed_packages_are_looked_up_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the metadata of all packages takes seconds; a module that is written later is found too."""
    asked = []
    found = transport.ndif.get_local_env
    monkeypatch.setattr(transport.ndif, "get_local_env", lambda: asked.append(1) or found())
    monkeypatch.syspath_prepend(tmp_path)
    model = ss.load(tiny_models.model(), remote="local")
    for expected in (1, 1, 2):
        if expected == 2:
            (tmp_path / "written_later.py").write_text("")
        with transport._modules_along():
            assert ("written_later" in transport.list_registry_pickle_by_value()) is (expected == 2)
        ss.evaluate(model, windows(model), {})
        assert len(asked) == expected
        assert "written_later" not in transport.list_registry_pickle_by_value()


def test_what_cannot_be_sent_is_said() -> None:
    import threading

    lock = threading.Lock()

    def locked(x: torch.Tensor) -> torch.Tensor:
        with lock:
            return x

    there = ss.load(tiny_models.model(), remote="local")
    with pytest.raises(ss.InputError, match=r"cannot be sent.*locks"):
        ss.evaluate(there, windows(there), {ss.Site("exit", 0): locked})


def test_payloads_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job weighs its columns once, a draw by its seed, and nothing of the names around it."""
    model = tiny_models.model()
    u, w = spectrum(model), windows(model)
    there = ss.load(model, remote="local")
    exit = ss.Site("exit", 0)
    ss_result = ss_space = ss_model = job = torch.zeros(10**6)  # names of the block: none may go along
    assert len(ss_result) == len(ss_space) == len(ss_model) == len(job)

    def bytes_of(**edits: Any) -> int:
        there.remote.jobs.clear()
        ss.evaluate_all(there, w, {name: {exit: edit} for name, edit in edits.items()}, batch_size=8)
        return there.remote.jobs[-1].payload

    nothing = bytes_of(a=ss.remove(u.subspace("none")))
    one = bytes_of(a=ss.phi(u, 1, 1))
    columns = 4 * u.d * u.edges[1]
    assert nothing < 5000 + 8 * 5 * TOKENS
    assert columns < one - nothing < columns + 1500
    assert bytes_of(a=ss.phi(u, 1, 1), b=ss.keep(u.band(1)), c=ss.remove(u.band(1))) < one + 1000
    assert bytes_of(a=ss.rnd(u.d, 16)) - nothing < 500
    assert len(sources()[0]) < 350_000


def test_bases_travel_in_the_dtype_asked_for() -> None:
    model = tiny_models.model()
    u = spectrum(model)
    packed = {kind: len(pack(u.dark(), kind)) for kind in (torch.bfloat16, torch.float32, torch.float64)}
    size = u.d * u.dark().rank
    assert abs(packed[torch.float32] - packed[torch.bfloat16] - 2 * size) < 20
    assert abs(packed[torch.float64] - packed[torch.float32] - 4 * size) < 20
    there = ss.load(model, remote="local", factors="bfloat16")
    edits = {ss.Site("exit", 0): ss.remove(u.dark())}
    rounded = ss.evaluate(there, windows(there), edits).delta_nll
    exact = ss.evaluate(model, windows(model), edits).delta_nll
    assert 0 < abs(rounded - exact) < 0.05 * abs(exact) + 1e-3
    with pytest.raises(ss.InputError, match="factors 'int8'"):
        ss.load(model, remote="local", factors="int8")


def test_a_view_travels_without_its_storage() -> None:
    large = torch.arange(10**5, dtype=torch.float32)
    sent = pack([large[3:7], large[::25000], large[:0], torch.ones(2, dtype=torch.bool), large[5].bfloat16()])
    assert len(sent) < 1000
    one, two, empty, flags, scalar = unpack(sent)
    assert torch.equal(one, large[3:7]) and torch.equal(two, large[::25000]) and empty.shape == (0,)
    assert flags.all() and scalar.shape == () and scalar.dtype == torch.bfloat16


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("rank", [0, 3, 16, 20, 32])
def test_random_subspaces_are_drawn_again(rank: int, complement: bool) -> None:
    space = ss.random_subspace(32, rank, 5)
    space = space.complement() if complement else space
    again = unpack(pack(space, torch.float32))
    x = torch.randn(4, 32)
    assert torch.equal(again.project(x), space.project(x)) and (again.rank, again.name) == (
        space.rank,
        space.name,
    )


def test_too_large_a_job_is_cut_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.model()
    u, there = spectrum(model), ss.load(model, remote="local")
    edits = {
        f"{i}": {ss.Site("exit", 0): ss.remove(ss.spectra.intersection(u.band(i), u.band(i)))}
        for i in (1, 2, 3)
    }
    here = ss.evaluate_all(model, windows(model), edits)
    ss.remote.examine(there)
    there.remote.jobs.clear()
    monkeypatch.setattr(transport, "PAYLOAD", 6_000)
    found = ss.evaluate_all(there, windows(model), edits)
    assert len(there.remote.jobs) > 1
    assert all(difference(here[name].table, found[name].table) < 1e-6 for name in edits)
    monkeypatch.setattr(transport, "PAYLOAD", 100)
    with pytest.raises(ss.InputError, match=r"a job of .* MB, .* at most"):
        ss.evaluate_all(there, windows(model), edits)


BARE = """
import importlib.abc, sys, types
LACKING = {"datasets", "jaxtyping", "pandas", "pyarrow", "scipy", "spectral_sinks"}
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(name)
import nnsight, torch
folder, arrival, sources, digest, *jobs = sys.argv[1:]
nn = nnsight.TransformersModel(folder, task="text-generation", dispatch=True, attn_implementation="eager")
nn._module.eval()
for name in [n for n in sys.modules if n.partition(".")[0] in LACKING]:
    del sys.modules[name]
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in LACKING else find(name, *a)
sys.meta_path.insert(0, Lacking())
read = lambda file: open(file, "rb").read()
space = {"__name__": "arrival"}
exec(read(arrival).decode(), space)
for job in jobs:
    answer = space["run_job"](nn, read(sources), digest, read(job))
    open(job + ".out", "wb").write(answer)
    assert not [n for n in sys.modules if n.partition(".")[0] in LACKING], "something was left behind"
"""


JOBS: dict[str, Callable[[ss.LanguageModel, ss.Windows, ss.Spectrum], tuple[Any, ...]]] = {
    "cells": lambda m, w, u: RemoteBatch(m, w, range(5), torch.stack(list(w.rows))).job(
        list(cells(u).values())
    ),
    "circuits": lambda m, w, u: (no_op._seen, w, u, [0], 16),
    "interventions": lambda m, w, u: (
        comparison._edited,
        torch.stack(list(w.rows)),
        [edit_effects.CombinedEdit.of(x) for x in comparisons(u).values()],
        [0],
        64,
        [u.dark()],
    ),
    "sinks": lambda m, w, u: (massive.attention_and_residuals, w, 16),
    "own": lambda m, w, u: (entropies.__wrapped__, tiny_models.ids(2, 9)),
}


@pytest.fixture(scope="module")
def bare_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, bytes]]:
    """What each job returns here, and from a process without most libraries, which does all of them."""
    model, place = tiny_models.model(), tmp_path_factory.mktemp("bare")
    there = ss.load(model, remote="local")
    folder = tiny_models.save(place / "model")
    (place / "arrival").write_bytes(serialization.bootstrap_source().encode())
    (place / "sources").write_bytes(sources()[0])
    here = {}
    for name, job in JOBS.items():
        function, *given = job(there, windows(model), spectrum(model))
        (place / name).write_bytes(transport.packed(there, function, *given))
        here[name] = function(model, *given)
    arguments = [folder, place / "arrival", place / "sources", sources()[1], *(place / name for name in JOBS)]
    subprocess.run([sys.executable, "-c", BARE, *map(str, arguments)], check=True, timeout=600)
    return {name: (result, (place / f"{name}.out").read_bytes()) for name, result in here.items()}


@pytest.mark.parametrize("name", JOBS)
def test_a_server_needs_little(name: str, bare_answers: dict[str, tuple[Any, bytes]]) -> None:
    """A process without this package, pandas, scipy, datasets and jaxtyping does a job all the same."""
    here, answer = bare_answers[name]
    kind, found, facts = unpack(answer)
    assert kind == "result" and facts["torch"] == torch.__version__
    one, other = ([x for x in leaves(value) if x.size] for value in (here, found))
    assert len(one) == len(other) > 0
    # parts of what a mode reads may cancel in their sum, and the basis has travelled in float32
    tolerance = 1e-4 if name == "circuits" else 1e-6
    for a, b in zip(one, other, strict=True):
        assert np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def leaves(value: Any) -> list[Any]:
    """All numbers in a result, as arrays."""
    if isinstance(value, torch.Tensor | np.ndarray | int | float):
        return [np.asarray(value, dtype=float)]
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list | tuple) else []
