"""The matrices that read the residual stream and those that write to it, for every supported family."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.effective_weights import effective_weight, loaded
from spectral_sinks.models.norms import centres, gain_of

Part = Literal["q", "k", "v", "gate", "up", "o", "down"]
"""Names of matrices: W_q, W_k, W_v, W_gate and W_up read the residual stream, W_o and W_down write to it."""

PARTS: tuple[Part, ...] = get_args(Part)
WRITERS: tuple[Part, ...] = ("o", "down")

UP = ("up_proj", "c_fc", "dense_h_to_4h", "fc1")
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "Wo", "fc2")
FUSED = ("gate_up_proj", "Wi")
"""Gate and up projections in one matrix, with the gate (the input of the activation) first."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix, with each row a direction of the residual stream that is read or written.

    Biases are left out: they read nothing, and what they write does not depend on the text.
    """

    part: Part
    layer: int
    unit: int
    """The head (a key head for k and v), or the expert of a mixture; -1 for a plain MLP."""
    rows: Float[Tensor, "rows d"]
    gain: Float[Tensor, "d"] | None
    """Gain of the norm before a reader or after a writer; None without one."""
    centres: bool
    """Whether that norm also subtracts the mean over the coordinates (LayerNorm)."""

    @property
    def writes(self) -> bool:
        return self.part in WRITERS

    def folded(self) -> Float[Tensor, "rows d"]:
        """Return the rows with the norm's gain and a LayerNorm's centring folded in, in float32 at least.

        For a reader, `W norm(x)` is `folded x` up to the scale of the norm, which is one number per token.
        """
        rows = self.rows.to(torch.promote_types(self.rows.dtype, torch.float32))
        if self.writes and self.centres:
            rows = rows - rows.mean(1, keepdim=True)
        if self.gain is not None:
            rows = rows * self.gain.to(rows.device, rows.dtype)
        if not self.writes and self.centres:
            rows = rows - rows.mean(1, keepdim=True)
        return rows


def residual_weights(model: Transformer) -> Iterator[Weight]:
    """Return the readers and writers of every layer, by head.

    `gate` appears only if the MLP has one. Fused projections are split, and so are the experts of gpt-oss.
    Raises InputError for an MLP whose matrices are not found.
    """
    layout = model.layout
    for layer in range(model.layers):
        block: Any = model.module.get_submodule(f"{layout.layers}.{layer}")
        yield from attention_weights(model, layer)
        before = _norm(block, layout.mlp_norm, model.d)
        name = layout.mlp_add_norm or ("" if layout.mlp_write == layout.mlp else layout.mlp_write)
        after = _norm(block, name, model.d)
        for part, unit, rows in _mlp(block, model):
            yield Weight(part, layer, unit, rows, *(after if part in WRITERS else before))


def attention_weights(model: Transformer, layer: int) -> Iterator[Weight]:
    """Return the readers `q`, `k`, `v` and the writer `o` of one layer's attention, by head."""
    model.require_weights("what attention reads and writes")
    model.require_attention("what attention reads and writes")
    model.require_heads("what attention reads and writes")
    layout = model.layout
    block: Any = model.module.get_submodule(f"{layout.layers}.{layer}")
    gain, centring = _norm(block, layout.attention_norm, model.d)
    projections: tuple[tuple[Part, str, str, int], ...] = (
        ("q", layout.queries, "queries", model.head_size),
        ("k", layout.keys, "keys", model.head_size),
        ("v", layout.values, "values", model.value_size),
    )
    found = {path: _outputs(block.get_submodule(path), model) for _, path, _, _ in projections}
    for part, path, which, size in projections:
        weight = found[path][model.projection_index(which)]
        heads = len(weight) / size
        if heads != model.heads if part == "q" else model.heads % heads:
            raise InputError(
                f"{path!r} of {model.name} ({model.family}) has {len(weight)} rows, which are not those of "
                f"heads of size {size}, so it cannot be taken apart by head"
            )
        for head, rows in enumerate(weight.split(size)):
            yield Weight(part, layer, head, rows, gain, centring)
    after = layout.attention_add_norm
    if not after and layout.attention_write != layout.attention:
        after = layout.attention_write
    gain, centring = _norm(block, after, model.d)
    writes = _outputs(block.get_submodule(layout.attention_projection), model).T
    for head, rows in enumerate(writes.split(model.value_size)):
        yield Weight("o", layer, head, rows, gain, centring)


def head_weights(model: Transformer, layer: int) -> list[Weight]:
    """Return the writer of each head, by which its mixed values act on the residual stream.

    Raises InputError for a family in which they pass something else first.
    """
    if "written" in model.layout.traits.lacking:
        raise InputError(
            f"what the heads of {model.name} ({model.family}) write is not W_O times their values, since "
            f"{model.layout.traits.lacking['written']}"
        )
    return [weight for weight in attention_weights(model, layer) if weight.part == "o"]


def _norm(block: Any, path: str, d: int) -> tuple[Tensor | None, bool]:
    if not path:
        return None, False
    norm = block.get_submodule(path)
    return gain_of(norm, d), centres(norm, d)


def _outputs(module: Any, model: Transformer) -> Float[Tensor, "outputs inputs"]:
    """Return the matrix by which a layer acts, with one row per output."""
    return effective_weight(module, model.dtype).detach()


def _mlp(block: Any, model: Transformer) -> Iterator[tuple[Part, int, Tensor]]:
    mlp = block.get_submodule(model.layout.mlp)
    if model.layout.mlp_add_norm:  # BERT: the module that writes is not inside the one that reads
        yield "up", -1, _outputs(mlp.dense, model)
        yield "down", -1, _outputs(block.get_submodule(model.layout.mlp_write), model).T
        return
    experts = getattr(mlp, "experts", None)
    if experts is not None:
        yield from _experts(experts, model)
        return
    down = next((name for name in DOWN if hasattr(mlp, name)), None)
    up = next((name for name in UP if hasattr(mlp, name)), None)
    both = next((name for name in FUSED if hasattr(mlp, name)), None)
    if down is None or (up is None and both is None):
        raise InputError(
            f"the matrices of {type(mlp).__name__} of {model.name} ({model.family}) were not found: tried "
            f"gate_up_proj, {', '.join(UP)}, Wi and {', '.join(DOWN)}"
        )
    if up is None:
        gate, ups = _outputs(getattr(mlp, str(both)), model).chunk(2)
        yield "gate", -1, gate
        yield "up", -1, ups
    else:
        if hasattr(mlp, "gate_proj"):
            yield "gate", -1, _outputs(mlp.gate_proj, model)
        yield "up", -1, _outputs(getattr(mlp, up), model)
    yield "down", -1, _outputs(getattr(mlp, down), model).T


def _experts(experts: Any, model: Transformer) -> Iterator[tuple[Part, int, Tensor]]:
    """Return the matrices of experts as gpt-oss stores them: `experts x d x 2 inner`, with gate and up
    alternating.
    """
    with loaded(experts):
        both, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if model.family == "gpt_oss" and type(experts).__name__ != "GptOssExperts":
        raise InputError(
            f"the experts of {model.name} are in a {type(experts).__name__}, which does not store their "
            "matrices as they act: merge an adapter (merge_and_unload), or load mxfp4 weights by "
            "transformers with quantization_config=Mxfp4Config(dequantize=True)"
        )
    if model.family != "gpt_oss" or not isinstance(both, Tensor) or not isinstance(down, Tensor):
        raise InputError(
            f"the experts of {model.name} ({model.family}) are not stored as those of gpt_oss: their "
            "matrices cannot be taken apart"
        )
    for unit, (pair, out) in enumerate(zip(both.detach(), down.detach(), strict=True)):
        yield "gate", unit, pair[:, ::2].T
        yield "up", unit, pair[:, 1::2].T
        yield "down", unit, out
