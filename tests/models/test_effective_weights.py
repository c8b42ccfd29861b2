"""Weights that are stored in other forms than they act: every number is that of the dequantised model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import readings, tiny_encoders, tiny_models
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Embedding
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear
from transformers.pytorch_utils import Conv1D

import spectral_sinks as ss
from spectral_sinks.models.effective_weights import (
    effective_embedding,
    effective_weight,
    usual_weight,
)


class Packed(nn.Module):
    """A linear layer of int8 codes and scales, stored transposed, which may round its input as well."""

    def __init__(self, linear: nn.Linear, rounding: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rounding = linear.in_features, linear.out_features, rounding
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer(
            "qweight", (linear.weight.detach() / scale).round().to(torch.int8).T.contiguous()
        )
        self.register_buffer("scales", scale.T.contiguous())
        self.bias = linear.bias
        self.register_buffer("input_scale", torch.tensor([0.01]) if rounding == "static float8" else None)

    def dequantised(self) -> Tensor:
        return (self.qweight * self.scales).T

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding == "dynamic int8":
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
            x = (x / scale).round() * scale
        elif self.rounding == "static float8":
            x = (x / self.input_scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * self.input_scale
        return nn.functional.linear(
            x, self.dequantised().to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None
        )


def packed(rounding: str) -> Callable[[nn.Linear], tuple[nn.Module, Tensor]]:
    def make(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
        made = Packed(linear, rounding)
        return made, made.dequantised()

    return make


def of_gemma(bits: int) -> Callable[[nn.Linear], tuple[nn.Module, Tensor]]:
    """Transformers' layer with packed codes and fixed scales by which it rounds its input and its output."""

    def make(linear: nn.Linear) -> tuple[nn.Module, Tensor]:
        made = QuantizedLinear(linear.in_features, linear.out_features, linear.bias is not None, bits)
        generator = torch.Generator().manual_seed(linear.in_features)
        storage = torch.randint(0, 127, made.weight.shape, generator=generator).to(made.weight.dtype)
        made.weight = nn.Parameter(storage, requires_grad=False)
        made.weight_scale.data *= 2.0 ** -(bits + 1)
        if linear.bias is not None:
            made.bias = linear.bias
        weight = made._dequantize_weights().detach()
        made.input_activation_scale.data += 0.05
        made.output_activation_scale.data += 0.05
        return made.eval(), weight

    return make


KINDS: dict[str, Callable[[nn.Linear], tuple[nn.Module, Tensor]]] = {
    "weights only": packed(""),
    "dynamic int8": packed("dynamic int8"),
    "static float8": packed("static float8"),
    "gemma int8": of_gemma(8),
    "gemma int4": of_gemma(4),
    "gemma int2": of_gemma(2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_matrix_of_a_layer_whatever_its_storage(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 600).requires_grad_(False)
    linear.bias += 300.0  # to whose size outputs are rounded
    made, weight = KINDS[kind](linear)
    made = made.to(dtype) if kind.startswith("gemma") else made
    expected = weight.to(dtype).float()
    found = effective_weight(made, dtype)
    error = 1e-6 if dtype == torch.float32 else 2**-8
    assert usual_weight(made) is None and found.shape == (600, 40)
    assert (found - expected).abs().max() <= error * expected.abs().max()
    assert torch.equal(effective_weight(made, dtype, slice(8, 24)), found[:, 8:24])
    assert torch.equal(made.bias.float(), linear.bias.to(made.bias.dtype).float()), "as it was"
    if kind.startswith("gemma"):
        assert bool(made.output_activation_scale > 0)


@pytest.mark.parametrize("kind", ["weights only", "gemma int4"])
def test_every_number_of_a_quantised_model_is_that_of_the_dequantised_one(kind: str) -> None:
    plain = tiny_models.build("qwen2", tie_word_embeddings=False)
    quantised = copy.deepcopy(plain)
    make = KINDS[kind]
    for name, part in plain.named_modules():
        if type(part) is nn.Linear:
            made, weight = make(part)
            for scale in ("input_activation_scale", "output_activation_scale"):
                if hasattr(made, scale):
                    getattr(made, scale).data.zero_()  # of a checkpoint that quantises weights alone
            quantised.set_submodule(name, made)
            part.weight.data = weight.clone()
    found, expected = (
        readings.readings(ss.load(model, tokenizer=tiny_models.tokenizer())) for model in (quantised, plain)
    )
    readings.assert_same(found, expected)


def test_a_layer_that_acts_by_its_weight_is_not_copied() -> None:
    linear, conv = nn.Linear(5, 7), Conv1D(7, 5)
    nn.init.normal_(conv.weight)
    for module in (linear, conv):
        found = effective_weight(module, torch.float32)
        assert found.shape == (7, 5) and found.data_ptr() == module.weight.data_ptr()
        torch.testing.assert_close(
            module(torch.eye(5)) - module(torch.zeros(5, 5)), found.T, rtol=1e-5, atol=1e-6
        )
    compiled: Any = torch.compile(linear, backend="eager")
    assert effective_weight(compiled, torch.float32).data_ptr() == linear.weight.data_ptr()


def test_embeddings_in_other_forms() -> None:
    float8 = FP8Embedding(300, 8)
    rows = torch.randn(300, 8)
    float8.weight.data, float8.weight_scale.data = rows.to(torch.float8_e4m3fn), torch.tensor([0.25])
    expected = rows.to(torch.float8_e4m3fn).float() * 0.25
    assert torch.equal(effective_embedding(float8), expected)
    scaled = QuantizedEmbedding(300, 8, torch.float32, embed_scale=3.0)
    scaled.embedding_quantized.data = torch.randint(-127, 127, (300, 8), dtype=torch.int8)
    torch.testing.assert_close(effective_embedding(scaled), scaled.weight.float())
    gemma = tiny_models.plain("gemma3").get_input_embeddings()
    assert effective_embedding(gemma) is gemma.weight, "without the constant that the embedding multiplies by"


class OfItsOwn(nn.Linear):
    """A layer with an adapter of its own, as in loralib: its `weight` is not all that acts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.003 * x.roll(1, -1)


class Rounding(nn.Linear):
    """A layer that rounds its input to multiples of 1/127.5 of the largest number, as torchao does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127.5
        return super().forward((x / scale * 0.9999).round().clamp(-128, 127) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_what_acts_only_up_to_a_factor(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own, rounding = (kind(32, 32).to(dtype).requires_grad_(False) for kind in (OfItsOwn, Rounding))
    for layer in (own, rounding):
        layer.weight.copy_(0.05 * torch.randn(32, 32))
    assert torch.equal(effective_weight(rounding, dtype), rounding.weight.float())
    expected = own.weight.float() + 0.003 * torch.eye(32).roll(1, 0)
    assert not torch.allclose(own.weight.float(), expected, atol=1e-3)
    # in bfloat16 the 0.003 is rounded as well
    assert torch.allclose(effective_weight(own, dtype), expected, rtol=2**-7, atol=2e-5)


class Curved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Clipped(nn.Linear):
    """A layer whose input is clipped at a fixed value that nothing names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-0.3, 0.3))


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")


class Nameless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Curved(6, 6), "Curved is not a linear map of its input, so it has no weight"),
        (Clipped(6, 6), "is not a linear map"),
        (Broken(6, 6), r"only the layer itself can read .*does not run alone \(no kernel image"),
        (Nameless(), "a Nameless is not known as a linear layer"),
    ],
)
def test_what_has_no_matrix_is_refused(layer: nn.Module, message: str) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight)
    with pytest.raises(ss.InputError, match=message):
        effective_weight(layer, torch.float32)


def test_a_quantised_parameter_that_no_layer_reads_is_refused() -> None:
    module = tiny_models.build("gpt_oss")
    experts = module.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.int8), requires_grad=False)
    model = ss.load(module)
    with pytest.raises(ss.InputError, match=r"gate_up_proj is stored quantised .*load the model dequantised"):
        ss.read_spectrum(model, "model.layers.0.mlp.experts.gate_up_proj")


class Mxfp4GptOssExperts(nn.Module):
    pass


def test_experts_that_kernels_hold_are_refused_with_what_to_do() -> None:
    module = tiny_models.build("gpt_oss")
    model = ss.load(module)
    module.model.layers[1].mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(
        ss.InputError, match=r"in a Mxfp4GptOssExperts, which .*Mxfp4Config\(dequantize=True\)"
    ):
        ss.residual.weight_shares(model, {"x": ss.random_subspace(model.d, 4, 0)})


def test_the_fingerprint_of_packed_weights() -> None:
    model, other = (ss.load(tiny_models.build()) for _ in "12")
    for each, seed in ((model, 0), (other, 1)):
        torch.manual_seed(seed)
        part = each.module.model.layers[0].mlp
        part.up_proj = Packed(nn.Linear(32, 48), "")
    assert model.fingerprint != other.fingerprint


@pytest.mark.parametrize("family", ["dinov2 classifier", "deit classifier", "vit classifier"])
def test_an_image_encoder_with_packed_layers(family: str) -> None:
    plain = tiny_encoders.build(family)
    quantised = copy.deepcopy(plain)
    for name, part in plain.named_modules():
        if type(part) is nn.Linear:
            made, weight = packed("")(part)
            quantised.set_submodule(name, made)
            part.weight.data = weight.clone()
    models = [ss.load_vision(module) for module in (quantised, plain)]
    shares = [
        ss.residual.weight_shares(model, {"x": ss.random_subspace(model.d, 4, 0)})["share"]
        for model in models
    ]
    assert shares[0].to_numpy() == pytest.approx(shares[1].to_numpy(), abs=1e-6)
    path = f"{models[0].layout.layers}.0.{models[0].layout.values}.weight"
    for matrix in ("embedding", path):
        a, b = (ss.read_spectrum(model, matrix, use_cache=False) for model in models)
        assert torch.allclose(a.values, b.values, atol=1e-5)
