"""Checkpoints whose weights are stored quantised: the numbers of transformers, or one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import readings, tiny_models
from torch import Tensor

import spectral_sinks as ss

FLOAT8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def rewrite(folder: Path, change: Any, **config: Any) -> Path:
    """Change the tensors and the configuration of a checkpoint."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in float8 and the scale of each block of 16 x 16."""
    blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))  # rows, 16, columns, 16
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return stored.to(torch.float8_e4m3fn), scale


def float8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            made[name], made[f"{name}_scale_inv"] = to_float8(weight)
        else:
            made[name] = weight
    return made


def plain_model(folder: Path) -> Any:
    """The model as transformers loads it, in modules that know nothing of its storage."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    made = tiny_models.plain().to(loaded.dtype)
    made.load_state_dict(loaded.state_dict())
    return made


@pytest.fixture
def in_float8(tmp_path: Path) -> Path:
    return rewrite(tiny_models.save(tmp_path / "float8"), float8, quantization_config=FLOAT8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, transformers keeps float8")
def test_float8_in_blocks(in_float8: Path) -> None:
    model = ss.load(in_float8, attention="eager")
    readings.assert_same(
        readings.readings(model),
        readings.readings(ss.load(plain_model(in_float8), tokenizer=model.tokenizer)),
    )
    weights, name = load_file(in_float8 / "model.safetensors"), readings.NAMED
    scale = weights[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    values = torch.linalg.svdvals((weights[name].float() * scale).double())
    found = ss.read_spectrum(in_float8, name, use_cache=False)
    torch.testing.assert_close(found.values, values, rtol=2**-7, atol=0)
    same = ss.read_spectrum(tiny_models.save(in_float8.parent / "plain"), use_cache=False)
    assert torch.equal(ss.read_spectrum(in_float8, use_cache=False).values, same.values), "lm_head is plain"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, transformers keeps float8")
def test_a_float8_head_is_read_from_the_loaded_model(in_float8: Path) -> None:
    def head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = weights["lm_head.weight"][:96]
        stored, scale = to_float8(rows)
        return weights | {"lm_head.weight": stored, "lm_head.weight_scale_inv": scale}

    rewrite(
        in_float8,
        lambda weights: weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:96]},
    )
    rewrite(in_float8, head, vocab_size=96, quantization_config=FLOAT8 | {"modules_to_not_convert": []})
    found = ss.read_spectrum(in_float8, use_cache=False)
    weights = load_file(in_float8 / "model.safetensors")
    scale = weights["lm_head.weight_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    values = torch.linalg.svdvals((weights["lm_head.weight"].float() * scale).double())
    torch.testing.assert_close(found.values, values, rtol=2**-7, atol=0)


def test_mxfp4_experts(tmp_path: Path) -> None:
    plain = tiny_models.build("gpt_oss", hidden_size=32, intermediate_size=32)
    folder = tmp_path / "mxfp4"
    plain.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(weights)
        for name in weights:
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inputs, outputs = made.pop(name).shape
                size = (experts, outputs, inputs // 32, 16)
                made[f"{name}_blocks"] = torch.randint(256, size, generator=generator, dtype=torch.uint8)
                made[f"{name}_scales"] = torch.randint(
                    120, 126, size[:3], generator=generator, dtype=torch.uint8
                )
        return made

    rewrite(
        folder,
        pack,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    )
    model = ss.load(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.dtype == model.dtype
    ids = tiny_models.ids()
    with torch.no_grad():
        assert torch.equal(tiny_models.logits(model, ids, {}), loaded(ids).logits.float())
    shares = ss.residual.weight_shares(model, {"x": ss.random_subspace(32, 4, 0)})
    assert set(shares["part"]) == {"q", "k", "v", "o", "gate", "up", "down"}


def rename(suffix: str) -> Any:
    return lambda weights: {
        name.replace(".weight", suffix) if name.endswith("proj.weight") else name: weight
        for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    ("method", "suffix", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            ".qweight",
            "by gptq, needs what is not here .*pip install",
        ),
        (
            {"quant_method": "awq", "bits": 4},
            ".qweight",
            "by awq, needs what is not here .*pip install",
        ),
        ({"quant_method": "hqq"}, ".W_q", "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, ".weight._data", "quanto.*pip install"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, ".weight_packed", "compressed.tensors"),
        ({"quant_method": "torchao", "quant_type": "x"}, "._weight_qdata", "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ".weight", "bitsandbytes"),
        ({"quant_method": "fbgemm_fp8"}, ".weight", "needs what is not here .*requires a GPU.*not quantised"),
        ({"quant_method": "exl2"}, ".q_weight", "quantised by exl2, which transformers does not know: give"),
        ({"quant_method": "aqlm"}, ".codes", "aqlm"),
        ({"quant_method": "spqr", "shapes": {}}, ".dense_weights", "SpQR"),
    ],
    ids=lambda value: value.get("quant_method", "") if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_methods_that_cannot_run_here_end_in_one_sentence(
    method: dict[str, Any], suffix: str, message: str, tmp_path: Path
) -> None:
    folder = rewrite(tiny_models.save(tmp_path / "model"), rename(suffix), quantization_config=method)
    with pytest.raises(ss.InputError, match=message) as caught:
        ss.load(folder)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value).strip()
    if suffix != ".weight":
        with pytest.raises(ss.InputError, match=message):
            ss.read_spectrum(folder, readings.NAMED)
    else:
        assert ss.read_spectrum(folder).d == 32, "lm_head is stored as it acts"


@pytest.mark.parametrize("method", [None, {"quant_method": "of_tomorrow"}])
@pytest.mark.filterwarnings("ignore")
def test_scales_that_transformers_would_leave_out_are_refused(method: Any, tmp_path: Path) -> None:
    """The codes alone would be taken for the weights."""
    config = {} if method is None else {"quantization_config": method}
    folder = rewrite(tiny_models.save(tmp_path / "model"), float8, **config)
    for use in (ss.load, lambda folder: ss.read_spectrum(folder, readings.NAMED)):
        with pytest.raises(ss.InputError, match=r"would take the codes for the weights: dequantise it"):
            use(folder)
    plain = rewrite(
        tiny_models.save(tmp_path / "plain"),
        lambda weights: weights | {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)},
    )
    assert ss.load(plain).layers == 3, "scales of a cache beside weights that act as they lie"
