"""Attention received by every position: against eager maps, by the outside convention, and bad input."""

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from support import reference_attention, tiny_models
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.models import attention_capture as attending

IDS = tiny_models.ids(5, 80, seed=5)
OWNER = [0, 0, 1, 2, 2]


class Both(ss.LanguageModel):
    """A model that says that its tokens see those after them."""

    causal = False


@functools.cache
def maps(family: str, tokens: int = 64) -> Tensor:
    """Eager attention of transformers, `[layers, windows, heads, queries, keys]`."""
    with torch.no_grad():
        found = tiny_models.plain(family)(IDS[:, :tokens], output_attentions=True, use_cache=False)
    return torch.stack(found.attentions)


def uniform_model() -> ss.LanguageModel:
    model = ss.load(tiny_models.build())
    for layer in model.module.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("tokens", [64, 10])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_position_against_eager_maps(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "WEIGHTS", 2500)
    model = tiny_models.model(family)
    windows = ss.Windows.of_ids(IDS, model, OWNER)
    found = ss.attention.attention_by_position(model, windows, length=tokens, batch_size=3)
    expected = maps(family, tokens).transpose(0, 1)
    assert found.length == tokens and found.alpha.shape == (5, 3, 4, tokens)
    assert np.array_equal(found.ids, IDS[:, :tokens])
    for k in range(tokens):
        alpha = expected[..., k:, k].double().mean(-1)
        assert np.allclose(found.alpha[..., k], alpha, atol=2e-6)
    visible = (expected > 0).sum(-2)
    assert np.array_equal(found.seen, visible), "a sliding window hides early keys from late queries"
    assert np.allclose(found.alpha_seen, expected.sum(-2) / visible, atol=2e-5)
    rest = 1 - expected.sum(-1).mean(-1)
    assert np.allclose(found.to_sink_logit, rest if family == "gpt_oss" else 0, atol=2e-6)
    assert (found.to_sink_logit.min() > 0.01) == (family == "gpt_oss")
    assert np.allclose(found.mass(found.ids[:, None] >= 0) + found.to_sink_logit, 1, atol=2e-6)
    members = (found.ids % 7 == 0)[:, None]
    assert np.allclose(
        found.mass(members),
        (expected * torch.as_tensor(members)[:, :, None, None]).sum(-1).mean(-1),
        atol=2e-6,
    )
    first = ss.attention_by_head(model, windows, length=tokens)["attention"]
    assert np.allclose(found.by_document(found.alpha[..., 0]).ravel(), first, atol=2e-6)
    rates = [
        [
            np.mean([float((found.alpha[w, ..., k] > 0.1).mean()) for w in range(5) if OWNER[w] == d])
            for k in (0, 7)
        ]
        for d in range(3)
    ]
    assert np.allclose(found.rate(0.1)[:, [0, 7]], rates)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_opening", "eager"])
def test_under_every_implementation_and_batch(attention: str) -> None:
    model = ss.load(tiny_models.build(attention=attention))
    windows = ss.Windows.of_ids(IDS, model)
    found = ss.attention.attention_by_position(model, windows, length=80, batch_size=2)
    assert np.allclose(found.total, maps("llama", 80).transpose(0, 1).sum(-2), atol=1e-5)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        after = model.module(IDS, use_cache=False).logits
        before = tiny_models.build(attention=attention)(IDS, use_cache=False).logits
    assert torch.equal(after, before)


def test_maps_that_an_implementation_of_the_models_own_returns() -> None:
    """Layer by layer, from whole maps."""
    model = ss.load(tiny_models.build())
    windows = ss.Windows.of_ids(IDS[:2, :12], model)
    expected = ss.attention.attention_by_position(model, windows, length=12)
    model.module.set_attn_implementation(reference_attention.NAME)
    with pytest.warns(ss.SpectralWarning, match="rows sum to 1 on average"):
        found = ss.attention.attention_by_position(model, windows, length=12)
    with torch.no_grad():
        whole = torch.stack(tiny_models.plain()(IDS[:2, :12], output_attentions=True).attentions, 1)
    alone = whole.diagonal(dim1=-2, dim2=-1).numpy() / found.queries[:, None, None]
    assert np.allclose(found.alpha, expected.alpha - alone, atol=1e-6) and alone.max() > 0.05
    assert np.array_equal(found.seen, expected.seen)
    by_head = ss.attention_by_head(model, windows, 3, length=12)["attention"].to_numpy()
    assert by_head == pytest.approx(found.by_document(found.alpha[..., 3]).ravel(), abs=1e-6)


def test_uniform_attention_is_the_outside_convention() -> None:
    """As published with GPT-2's shares at T = 64: 0.0741 on the first key, 0.2288 on the first four."""
    model = uniform_model()
    found = ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS, model))
    assert found.alpha[..., 0] == pytest.approx(0.0741, abs=5e-5)
    for k in range(64):
        assert found.alpha[..., k] == pytest.approx(ss.attention.uniform_attention(k), abs=1e-6)
    for first, share in ((1, 0.0741232953704026), (4, 0.2287848481482772), (8, 0.3782542201060783)):
        members = np.broadcast_to(np.arange(64) < first, (5, 1, 64))
        assert found.mass(members) == pytest.approx(share, abs=1e-6)
        assert found.uniform(members) == pytest.approx(share, abs=1e-12)


SHARES = ("sink_share_first_1", "uniform_first_1", "uniform_first_4")


def shares(path: Path, model: str) -> dict[str, Tensor]:
    """Columns of a table of sink shares at T = 64, `[1, layers, heads]` each."""
    with path.open() as file:
        chosen = [row for row in csv.DictReader(file) if row["model"] == model and row["seq_len"] == "64"]
    heads = max(int(row["head"]) for row in chosen) + 1
    ordered = sorted(chosen, key=lambda row: (int(row["layer"]), int(row["head"])))
    return {n: torch.tensor([float(row[n]) for row in ordered]).view(1, -1, heads) for n in SHARES}


def test_a_table_in_the_outside_layout(tmp_path: Path) -> None:
    """Our own numbers written as others write theirs: the rate read back is the rate measured."""
    model = tiny_models.model()
    found = ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS[:1], model))
    path = tmp_path / "summary.csv"
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "seq_len", "layer", "head", *SHARES])
        for layer in range(3):
            for head in range(4):
                share = float(found.alpha[0, layer, head, 0])
                writer.writerow(["a", 64, layer, head, share, 0.0741232953704026, 0.2287848481482772])
    table = shares(path, "a")
    assert np.allclose(table["sink_share_first_1"], found.alpha[..., 0])
    assert ss.attention.sink_rate(table["sink_share_first_1"], 0.1) == pytest.approx(found.rate(0.1)[0, 0])


TABLE = os.environ.get("SPECTRAL_SINKS_GPT2_SHARES", "")
"""A table of GPT-2's sink shares in the layout of JohnScheuer/attention-sink-profiler."""


@pytest.mark.skipif(not TABLE, reason="SPECTRAL_SINKS_GPT2_SHARES names no table of GPT-2's sink shares")
@pytest.mark.parametrize(("model", "rate"), [("gpt2", 0.736), ("gpt2-medium", 0.810)])
def test_published_shares_above_epsilon(model: str, rate: float) -> None:
    found = shares(Path(TABLE), model)
    assert ss.attention.sink_rate(found["sink_share_first_1"]) == pytest.approx(rate, abs=5e-4)
    assert found["uniform_first_1"].numpy() == pytest.approx(ss.attention.uniform_attention(), abs=1e-6)


@pytest.mark.skipif(
    not isinstance(huggingface_hub.try_to_load_from_cache("openai-community/gpt2", "model.safetensors"), str),
    reason="the weights of openai-community/gpt2 are not in the local cache of the hub",
)
def test_gpt2_itself() -> None:
    model = ss.load("openai-community/gpt2")
    found = ss.attention.attention_by_position(model, ss.cut(ss.documents(limit=24), model, length=64))
    assert found.rate().mean(0)[0] == pytest.approx(0.74, abs=0.06)


def test_a_bidirectional_model_is_read_whole_and_over_all_queries() -> None:
    plain = ss.load(tiny_models.plain("gpt2"))
    model = Both(plain.nn, plain.layout, plain.name, plain.tokenizer)
    rows = [IDS[0], IDS[1], IDS[2, :20]]
    found = ss.attention.attention_by_position(model, ss.Windows.of_ids(rows, model), length=64)
    assert not found.causal and found.length == 80
    assert np.allclose(found.alpha[:2], maps("gpt2", 80)[:, :2].transpose(0, 1).mean(-2), atol=2e-6)
    assert np.isnan(found.alpha[2, ..., 20:]).all() and np.allclose(found.alpha[2, ..., :20].sum(-1), 1)
    assert found.lengths.tolist() == [80, 80, 20] and (found.ids[2, 20:] == -1).all()
    assert np.allclose(found.mass((found.ids >= 0)[:, None]), 1, atol=1e-5)
    assert np.allclose(found.uniform((found.ids >= 0)[:, None]), 1)
    pooled = ss.attention.attention_by_position(model, ss.Windows.of_ids(rows, model, [0, 1, 1]), length=64)
    first = found.by_document(found.alpha)[1:, ..., :20].mean(0)
    assert np.allclose(pooled.by_document(pooled.alpha)[1, ..., :20], first, atol=1e-6)
    assert np.allclose(pooled.by_document(pooled.alpha)[1, ..., 20:], found.alpha[1, ..., 20:], atol=1e-6), (
        "behind the end of one window the other counts alone"
    )
    assert np.isfinite(found.rate()).all(axis=1).tolist() == [True, True, False]


def test_short_windows_are_left_out_with_a_warning() -> None:
    model = tiny_models.model()
    windows = ss.Windows.of_ids([IDS[0], IDS[1, :40], IDS[2]], model, [0, 1, 2])
    with pytest.warns(ss.SpectralWarning, match="windows shorter than 64 tokens are left out: 1 of 3"):
        found = ss.attention.attention_by_position(model, windows)
    alone = ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS[[0, 2]], model, [0, 2]))
    assert np.allclose(found.alpha, alone.alpha, atol=1e-6) and found.windows.document == (0, 2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (81, "over 81 tokens, and the longest window has 80: give longer texts"),
        (129, "over 129 tokens: LlamaForCausalLM has a context of 128"),
        (1, "over 1 tokens: give at least 2"),
    ],
)
def test_tokens_that_do_not_fit(tokens: int, message: str) -> None:
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match=message):
        ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS, model), length=tokens)


def test_padding_is_refused_on_either_side() -> None:
    model = tiny_models.model()  # its configuration pads with token 1
    for side, row in (("opens", [1] * 16 + IDS[0, :64].tolist()), ("ends", [*IDS[0, :64].tolist(), 1, 1])):
        with pytest.raises(ss.InputError, match=f"window 1 {side} with the padding token 1"):
            ss.attention.attention_by_position(model, ss.Windows.of_ids([IDS[1], row], model))
    only = ss.attention.attention_by_position(model, ss.Windows.of_ids([[1] * 64], model))
    assert only.alpha.shape[0] == 1, "a text of that token alone is no padded one"
    closed = torch.cat([IDS[0, :64], torch.tensor([1])])
    found = ss.attention.attention_by_position(model, ss.Windows.of_ids([closed], model))
    assert np.allclose(
        found.alpha[0], ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS[:1], model)).alpha[0]
    )


def test_a_sequence_of_length_one_has_no_attention_to_measure() -> None:
    with pytest.raises(ss.InputError, match="expected at least two tokens"):
        ss.Windows.of_ids([[5]], tiny_models.model())
    with pytest.warns(ss.SpectralWarning, match="documents shorter than two tokens are left out: 1"):
        windows = ss.cut([tiny_models.text(70), "w7"], tiny_models.model(), length=64)
    assert ss.attention.attention_by_position(tiny_models.model(), windows).alpha.shape[0] == 1


@pytest.mark.parametrize("name", ["MambaConfig", "RwkvConfig"])
def test_a_model_without_softmax_attention(name: str) -> None:
    config = getattr(transformers, name)(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ss.InputError, match=r"no attention heads in its configuration: .* softmax attention"):
        ss.load(module)


def test_layers_without_attention() -> None:
    model = ss.load(tiny_models.build())
    layer = model.module.model.layers[1]
    layer.recurrent = layer.self_attn
    del layer.self_attn
    with pytest.raises(
        ss.InputError, match=r"1 of 3 layers of LlamaForCausalLM \(llama\), such as 1, have none"
    ):
        ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS, model))


def test_attention_that_the_family_computes_itself() -> None:
    sizes: dict[str, Any] = {k: v for k, v in tiny_models.GPT2_SIZES.items() if k != "n_layer"}
    module = transformers.AutoModelForCausalLM.from_config(
        transformers.GPTJConfig(**sizes, n_layer=2, rotary_dim=4), attn_implementation="eager"
    )
    model = ss.load(module.eval())
    found = ss.attention.attention_by_position(model, ss.Windows.of_ids(IDS, model))
    with torch.no_grad():
        expected = torch.stack(module(IDS[:, :64], output_attentions=True, use_cache=False).attentions, 1)
    for k in range(64):
        assert np.allclose(found.alpha[..., k], expected[..., k:, k].double().mean(-1), atol=2e-6)


MEMORY = """
import os
from pathlib import Path
import torch
from support import tiny_models
import spectral_sinks as ss

sizes = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 32, "intermediate_size": 4096}
model = ss.load(tiny_models.build(attention="sdpa", **sizes, max_position_embeddings=2048))
ids = tiny_models.ids(1, 2048)
windows = ss.Windows.of_ids(ids, model)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
with torch.no_grad():
    model.module(ids[:, :8], use_cache=False)
ss.attention.attention_by_position(model, windows, length=8)
spectrum = ss.read_spectrum(model, bands=8)
if child := os.fork():  # both have the same libraries and the same model
    os.waitpid(child, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; that of a child has just begun
    ss.find_sinks(model, windows, spectrum, length=2048, draws=2)
else:
    with torch.no_grad():
        model.module(ids, use_cache=False, logits_to_keep=1)
print(peak())
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to see the peak")
def test_peak_memory_at_2048_tokens() -> None:
    """Within 1.5 times a plain pass; what it adds is less than half of one layer's map, 512 MiB."""
    tests = Path(tiny_models.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    plain, ours = map(float, ran.stdout.split())
    assert ours <= 1.5 * plain
    assert ours - plain < 256
