"""Circuits made by hand: every tool returns that head, mode and position, and none on the randomised twin."""

import pytest
import torch
from support import planted_circuits
from support.planted_circuits import FAMILIES, HEAD, LAYER, MARK, MORE, D

import spectral_sinks as ss
from spectral_sinks.measure.circuits.bands import key_directions


def look(model: ss.LanguageModel, windows: ss.Windows, position: int = 0) -> ss.circuits.Circuits:
    return ss.no_op_circuits(model, windows, ss.read_spectrum(model), position)


def planted(found: ss.circuits.Circuits) -> dict[str, float]:
    return found.heads.set_index(["layer", "head"]).loc[(LAYER, HEAD)].to_dict()


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_planted_circuit_is_found(family: str) -> None:
    model, windows = planted_circuits.made(family)
    found = look(model, windows)
    row = planted(found)
    assert found.found == [(LAYER, HEAD)]
    assert row["dormant"] == 1 and row["use"] == "no-op" and row["value_ratio"] < 0.15
    assert set(found.heads.drop(index=LAYER * planted_circuits.HEADS + HEAD)["use"]) == {"active"}
    assert found.detectors.ranks[LAYER, HEAD, 0] == 1 and row["top_one"] > 0.99
    assert row["always_on"] > 0.95 and row["rival"] < 0.25
    direction = key_directions(model, found.detectors)[LAYER, HEAD]
    assert float(direction[MARK].abs() / direction.norm()) > 0.98
    sides = found.sides(LAYER, HEAD)
    assert sides["key_1"].idxmax() == 0 and (sides["query_1"][1:] > 0).all()
    assert row["weighted"] < row["attention"] - 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_circuit_is_lost_in_the_randomised_twin(family: str) -> None:
    model, windows = planted_circuits.made(family)
    other = planted_circuits.twin(model)
    weights, turns = (list(each.module.state_dict().values()) for each in (model, other))
    for weight, turned in zip(weights, turns, strict=True):
        if weight.ndim == 2:
            values, expected = torch.linalg.svdvals(turned), torch.linalg.svdvals(weight)
            assert torch.allclose(values, expected, rtol=1e-4, atol=1e-4 * float(expected[0]))
    found = look(other, windows)
    assert found.found == [] and set(found.heads["use"]) == {"active"}


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "gpt_oss", "mixtral"])
def test_planted_broadcast_is_a_broadcast(family: str) -> None:
    model, windows = planted_circuits.made(family, "broadcast")
    found = look(model, windows)
    row = planted(found)
    assert found.found == [] and row["lacking"] == "a sink that writes nothing"
    assert row["use"] == "broadcast" and row["dormant"] == 1 and row["stable_rank"] < 1.1
    assert row["weighted"] > 0.9


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_planted_circuit_is_found_where_it_is(family: str) -> None:
    model, windows = planted_circuits.made(family, place=9)
    found = look(model, windows, 9)
    assert found.found == [(LAYER, HEAD)] and planted(found)["dormant"] == 1
    assert found.sides(LAYER, HEAD)["key_1"].idxmax() == 9
    for position in (0, 8, 10):
        assert look(model, windows, position).found == []


def test_planted_circuit_reads_its_band() -> None:
    """The mark is one direction of a band of a spectrum made for it: the detector reads that band alone."""
    model, windows = planted_circuits.made("llama")
    basis = torch.eye(D, dtype=torch.float64)
    order = [*(i for i in range(D) if i != MARK), MARK]
    spectrum = ss.Spectrum(basis[:, order], torch.linspace(2, 1, D, dtype=torch.float64), count=16)
    found = ss.no_op_circuits(model, windows, spectrum)
    row = planted(found)
    assert row["key_dark"] > 0.98 and row["reading_dark"] > 0.95
    profile = found.profile(LAYER, HEAD).set_index(["what", "band"])
    assert profile.loc[("key direction", 16), "random"] == pytest.approx(4 / D)
    assert profile.loc[("key direction", 16), "random_high"] < 0.2
    for what in ("key direction", "value", "reading"):
        assert profile.loc[what, "share"].sum() == pytest.approx(1, abs=1e-6)
    energy = profile.loc[("reading", 16), "random"]
    words = model.embedding_weight[planted_circuits.MARKED].detach()
    assert energy == pytest.approx(float(words[MARK] ** 2 / words.square().sum()), abs=0.02)


def test_planted_circuit_without_its_key_asks_in_vain() -> None:
    model, windows = planted_circuits.made("llama")
    rows = planted_circuits.parts(model, LAYER, HEAD)
    rows["k"][:, MARK] = 0
    found = look(model, windows)
    assert found.found == [] and planted(found)["attention"] < 0.2


@pytest.mark.parametrize("family", ["llama grouped", "gpt2", "qwen3"])
def test_planted_circuit_is_found_at_another_position_of_each_window(family: str) -> None:
    """In three windows of four, each with its mark elsewhere; one has none, and its head is active."""
    model, windows = planted_circuits.made(family)
    ids = torch.stack(windows.rows)
    ids[:, 0] = 8
    places = [2, 9, 5, 7]
    ids[[0, 1, 3], [2, 9, 7]] = planted_circuits.MARKED
    marked = ss.Windows.of_ids(ids[[0, 1, 3]], model)
    found = ss.no_op_circuits(model, marked, ss.read_spectrum(model), [2, 9, 7], batch_size=2)
    assert found.found == [(LAYER, HEAD)] and planted(found)["rival"] < 0.25
    use = ss.head_use(model, ss.Windows.of_ids(ids[[0, 1, 3, 2]], model), [2, 9, 7, 5], batch_size=3)
    here = use[(use["layer"] == LAYER) & (use["head"] == HEAD)]
    assert here["use"].tolist() == ["no-op"] * 3 + ["active"]
    mixed = ss.no_op_circuits(model, ss.Windows.of_ids(ids, model), ss.read_spectrum(model), places)
    row = planted(mixed)
    assert (row["dormant"], row["use"]) == (0.75, "no-op")
    last = ss.Windows.of_ids(ids[[0, 1, 3, 2]], model)
    assert planted(look(model, last, 2))["use"] == "active"
    listed = ss.no_op_circuits(model, last, ss.read_spectrum(model), [2, 9, 7, 5])
    assert planted(listed)["use"] == "no-op", "the most frequent use, and not the last"
