"""Designated sinks: the part after training on a tiny model, the table of variants on tiny runs."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from support import tiny_models
from support.tiny_study import run, study

import spectral_sinks as ss
from spectral_sinks.experiments import find_experiment

ROOT = Path(__file__).parents[2]


def test_after_training(tmp_path: Path) -> None:
    given = study(tiny_models.model(), tmp_path)
    answers = run("designated", given)
    direct = ss.designate(given.model, given.windows, 16, spectrum=given.unembedding, draws=3)
    assert answers.loc["NLL difference", "value"] == pytest.approx(direct.delta_nll.value, abs=1e-6)
    tried = pd.read_csv(tmp_path / "designated.csv")
    assert len(tried) == len(direct.tried) and direct.intervention in answers["control"].str.cat(sep=" ")
    assert (tmp_path / "designated.png").stat().st_size > 10_000


def made(path: Path, softmax: str = "plain", position: int = 0, logit: float | None = None) -> Path:
    folder = tiny_models.save(path / "model")
    recipe = {"seed": 0, "window": 70, "bos": True, "position": position, "softmax": softmax}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (path / "log.jsonl").write_text(json.dumps({"heldout_nll": 3.5}) + "\n")
    if logit is not None:
        logits = torch.full((tiny_models.LAYERS, tiny_models.HEADS), logit)
        save_file({"sink_logits": logits}, folder / "sinks.safetensors")
    return folder


def test_variants(tmp_path: Path) -> None:
    script: dict[str, Any] = find_experiment("designated").__globals__
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.text(200))
    folders = (
        made(tmp_path / "a"),
        made(tmp_path / "b", position=16),
        made(tmp_path / "c", "learned", logit=30.0),
        made(tmp_path / "d", "off-by-one", logit=-30.0),
    )
    script["main"](script["Options"](folders, tmp_path / "out", str(text), draws=3))
    table = pd.read_csv(tmp_path / "out" / "designated_variants.csv").set_index("kind")
    assert table.loc["BOS, learned", "to_sink_logit"] > 0.99
    plain, off = table.loc["BOS"], table.loc["BOS, off-by-one"]
    columns = ["sink_rate", "mass", "norm_ratio", "share", "others"]
    assert plain[columns].to_list() == pytest.approx(off[columns].to_list(), abs=1e-5), "a logit of -30"
    assert table.loc["BOS at 16", "place"] == 16
    assert table.loc["BOS at 16", "uniform"] == pytest.approx(ss.attention.uniform_attention(16), abs=1e-6)

    model = ss.load(folders[1])
    words = model.tokenizer(tiny_models.text(200), add_special_tokens=False)["input_ids"][:69]
    ids = torch.tensor([[*words[:16], 0, *words[16:]]])
    with torch.no_grad():
        maps = tiny_models.plain()(ids[:, :64], output_attentions=True, use_cache=False).attentions
    alpha = torch.stack([layer[0, :, 16:, 16].mean() for layer in maps])
    assert table.loc["BOS at 16", "mass"] == pytest.approx(float(alpha.max()), abs=1e-5)
    over = pd.read_csv(tmp_path / "out" / "designated_over_seeds.csv")
    assert set(over["seeds"]) == {1} and over["low"].isna().all(), "one seed has no interval"
    assert (tmp_path / "out" / "designated_variants.png").stat().st_size > 10_000


def test_tuned(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("tuned", ROOT / "experiments" / "tuned.py")
    assert spec and spec.loader
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules["tuned"] = script
    spec.loader.exec_module(script)
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.text(200))
    before = tiny_models.save(tmp_path / "before")
    folders = [made(tmp_path / "a", "no-first"), made(tmp_path / "b")]
    script.main(script.Options((str(before), *map(str, folders)), tmp_path / "out", str(text)))
    over = pd.read_csv(tmp_path / "out" / "tuned_over_seeds.csv").set_index(["kind", "first_key", "quantity"])
    model = ss.load(before)
    windows = ss.cut(ss.documents(str(text)), model, per_document=1)
    with ss.attending(model, ss.attention.MaskKey(0)):
        masked = ss.evaluate(model, windows, {}).nll
    cost = over.loc[("cost of no first key before", "both", "nll difference"), "mean"]
    assert cost == pytest.approx(masked - ss.evaluate(model, windows, {}).nll, abs=1e-5)
    assert over.loc[("before", "masked", "first"), "mean"] == pytest.approx(1 / 64, abs=1e-5)
    assert (tmp_path / "out" / "tuned.png").stat().st_size > 10_000
