"""One sink or several: the pass recomputed from maps, a planted second sink, planted dark tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment

SCRIPT: dict[str, Any] = find_experiment("several").__globals__


def seen(model: ss.LanguageModel, windows: ss.Windows, *moves: Any) -> dict[str, np.ndarray]:
    return SCRIPT["observe"](model, windows, (moves, {}))


def attract(position: int) -> Any:
    """A move that draws all heads of all layers to one position, once position 0 is out of sight."""

    def move(call: ss.attention.AttentionCall) -> ss.attention.AttentionCall:
        bias = torch.zeros(call.query.shape[2], call.key.shape[2])
        bias[:, 0], bias[:, position] = 60.0, 30.0
        return replace(call, bias=bias)

    return move


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pass_is_what_eager_attention_and_logits_say(family: str) -> None:
    model = tiny_models.model(family)
    ids = tiny_models.ids(3, 48, seed=2)
    windows = ss.Windows.of_ids(ids, model)
    found = seen(model, windows)
    eager = tiny_models.model(family).module
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(torch.stack(list(ids)), output_attentions=True)
    maps = torch.stack(out.attentions, 1).double().numpy()
    for k in (0, 5, 40):
        assert np.allclose(found["alpha"][..., k], maps[..., k:, k].mean(-1), atol=1e-6)
    assert found["uniform"][0, 0] == pytest.approx(ss.attention.uniform_attention(0, 48), abs=1e-6)
    mean = maps.mean((1, 2))
    where = np.zeros((3, 6))
    for i in range(1, 48):
        for k in range(i + 1):
            kind = 0 if k == 0 else 1 if k == i else 2 if i - k == 1 else 3 if i - k < 9 else 4
            where[:, kind] += mean[:, i, k] / 47
    assert np.allclose(found["where"], where, atol=1e-6)
    logs = out.logits[:, :-1].double().log_softmax(-1)
    nll = -logs.gather(-1, torch.stack(list(ids))[:, 1:, None])[..., 0].numpy()
    assert np.allclose(found["nll"], nll.mean(1), atol=1e-5)
    assert np.allclose(found["late"], nll[:, 24:].mean(1), atol=1e-5)


def test_the_tables_of_a_run_agree_with_other_measurements(tmp_path: Path) -> None:
    given = study(tiny_models.model(), tmp_path)
    answers = run("several", given)
    table = pd.read_csv(tmp_path / "several.csv")
    plain = table[table["draw"] == "observed"].set_index(["intervention", "quantity"])["mean"].astype(float)
    site, dark = ss.Site("exit", given.below_sink), ss.remove(given.unembedding.dark())
    direct = ss.evaluate(given.model, given.windows, {site: dark})
    assert plain["dark removed, all tokens", "NLL difference"] == pytest.approx(direct.delta_nll, abs=1e-5)
    compared = (
        ss.compare(given.model, given.windows, {"mask": ss.attention.MaskKey(0)})
        .summary()
        .set_index("intervention")
    )
    assert plain["key masked", "NLL difference"] == pytest.approx(compared.loc["mask", "delta_nll"], abs=1e-5)
    for move in table["intervention"].unique():
        kinds = [f"more to {kind}" for kind in SCRIPT["WHERE"]]
        assert sum(plain[move, kind] for kind in kinds) == pytest.approx(0, abs=1e-5), "nothing is lost"
    assert plain["weight dropped", "more to none"] > 0.01 > abs(plain["key masked", "more to none"])

    stream = pd.read_csv(tmp_path / "several_streaming.csv")
    assert set(stream["kept"]) == {0, 1, 2, 4, 8} and (stream["recent"] == 17).all()
    one, two = (stream[(stream["kept"] == n) & (stream["which"] == "first")]["mean"].item() for n in (1, 2))
    saved = stream[(stream["kept"] == 2) & (stream["which"] == "saved")]["mean"].item()
    assert saved == pytest.approx(one - two, abs=1e-5)
    beyond = stream[(stream["kept"] == 2) & (stream["which"] == "saved beyond others")]["mean"].item()
    mixed = stream[(stream["kept"] == 2) & (stream["which"] == "0 and others")]["mean"].mean()
    assert beyond == pytest.approx(mixed - two, abs=1e-5)
    assert "streaming, next 8 and 17 recent: NLL difference" in answers.index
    assert (tmp_path / "several.png").stat().st_size > 10_000


def test_a_planted_second_sink_is_found_and_none_without_it() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(4, 64, seed=3), model)
    spectrum = ss.read_spectrum(model)
    quantity = SCRIPT["SECOND"]
    with ss.attending(model, attract(6)):
        table, _ = SCRIPT["intervened"](model, windows, spectrum, 0, 1)
    plain = table[table["draw"] == "observed"].set_index(["intervention", "quantity"])
    assert plain.loc[("untouched", quantity), "mean"] == 0, "position 0 draws all"
    assert plain.loc[("key masked", quantity), "mean"] == 1
    assert plain.loc[("weight dropped", quantity), "mean"] == 0, "what is dropped goes nowhere"
    strongest = plain.loc[("key masked", "strongest elsewhere: over uniform")]
    assert strongest["position"] == 6 and strongest["mean"] > 5
    with ss.attending(model, attract(6)), ss.attending(model, ss.attention.MaskKey(0)):
        found = ss.find_sinks(model, windows, spectrum, draws=1).sinks
    assert [sink.position for sink in found if sink.position] == [6]
    free, _ = SCRIPT["intervened"](model, windows, spectrum, 0, 1)
    assert (free[free["quantity"] == quantity]["mean"] == 0).all()


def test_a_sink_that_goes_with_its_token_counts() -> None:
    rows = tiny_models.ids(8, 40, seed=4)
    for place in range(4):
        rows[place][3 + 4 * place] = 7
    windows = ss.Windows.of_ids(rows, tiny_models.model())
    ids = np.stack([row[1:21].numpy() for row in windows.rows])
    drawn = ids == 7
    assert SCRIPT["sinks_elsewhere"](windows, drawn) == 1
    assert SCRIPT["sinks_elsewhere"](windows, drawn & (np.arange(8) < 2)[:, None]) == 0, "too few texts"
    one = np.zeros_like(drawn)
    one[:4, 4] = True
    assert SCRIPT["sinks_elsewhere"](windows, one) == 1, "a position in half of the texts"


def test_planted_dark_tokens_are_counted() -> None:
    model = tiny_models.model()
    spectrum = ss.read_spectrum(model)
    rows = tiny_models.ids(4, 48, seed=5)
    windows = ss.Windows.of_ids(rows, model)
    column = spectrum.dark().orthonormal()[:, 0].float()

    def darken(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        planted = torch.zeros_like(out)
        planted[:, [0, 9, 20]] = 100 * column.to(out)
        return out + planted

    handle = model.module.model.layers[0].mlp.register_forward_hook(darken)
    try:
        _, dark, curve = SCRIPT["dark_tokens"](model, windows, spectrum, 0, 5)
    finally:
        handle.remove()
    dark = dark.set_index("quantity")
    assert dark.loc["like_bos", "tokens"] >= 8 and dark.loc["loud", "tokens"] == 8
    assert dark.loc["both", "tokens"] == 8 and dark.loc["both", "of"] == 4 * 47
    assert curve[curve["share"] > 0.8]["dark"].iloc[0] == pytest.approx(8 / 188)


def test_the_verdict_follows_the_numbers() -> None:
    quantity = {"quantity": SCRIPT["SECOND"], "draw": "observed"}
    moved = pd.DataFrame([{"intervention": m, "mean": 0.0} | quantity for m in ("untouched", "key masked")])
    stream = pd.DataFrame({"which": "saved beyond others", "kept": [2, 8], "low": [-0.1, -0.1]})
    judge = SCRIPT["verdict"]
    assert judge({"": moved, "_streaming": stream}, 1).startswith("holds: one sink")
    assert judge({"": moved, "_streaming": stream.assign(low=[-0.1, 0.1])}, 1).endswith("others: 8")
    second = judge({"": moved.assign(mean=[0, 1]), "_streaming": stream}, 1)
    assert second.startswith("does not hold here: one sink; a second one at once: key masked")
    assert judge({"": moved, "_streaming": stream}, 2).startswith("does not hold here: 2 sinks")


def test_bad_input() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids(tiny_models.ids(2, 20), model)
    with pytest.raises(ss.InputError, match="at least 40 tokens"):
        SCRIPT["measure"](model, windows, ss.read_spectrum(model), 0)
