"""The matrices that read the residual stream and those that write to it, for every supported family."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.effective_weights import effective_weight
from spectral_sinks.models.experts import mixture_of
from spectral_sinks.models.layout import SHARED_MLP, Layout
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
    """The head (a key head for k and v), or the expert of a mixture; -1 for a plain MLP, and for the expert
    that all tokens share."""
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

    `gate` appears only if the MLP has one. Fused projections are split, and so are the experts of a mixture.
    Raises InputError for an MLP whose matrices are not found.
    """
    model.require_attention("what attention reads and writes")
    for layer in range(model.layers):
        yield from attention_weights(model, layer)
        yield from mlp_weights(model, layer)


def mlp_weights(model: Transformer, layer: int) -> Iterator[Weight]:
    """Return the readers `gate` and `up` and the writer `down` of one layer's MLP, by expert if any."""
    model.require_weights("what an MLP reads and writes")
    layout = model.layout
    block: Any = model.module.get_submodule(f"{layout.layers}.{layer}")
    before = _norm(block, layout.mlp_norm, model.d)
    after = _norm(block, layout.mlp_add_norm or norm_after_mlp(layout), model.d)
    for part, unit, rows in _mlp(block, model, layer):
        yield Weight(part, layer, unit, rows, *(after if part in WRITERS else before))


def norm_after_mlp(layout: Layout) -> str:
    """Return the name of the norm whose output is what the MLP adds (Gemma, OLMo 2); "" without one."""
    inside = layout.mlp_write == layout.mlp or layout.mlp_write.startswith(f"{layout.mlp}.")
    return "" if inside or layout.mlp_add_norm or layout.mlp in SHARED_MLP else layout.mlp_write


def attention_weights(model: Transformer, layer: int) -> Iterator[Weight]:
    """Return the readers `q`, `k`, `v` and the writer `o` of one layer's attention, by head."""
    model.require_weights("what attention reads and writes")
    model.require_attention_in(layer)
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
    if not after and layout.attention_write not in (layout.attention, layout.attention_projection):
        after = layout.attention_write
    gain, centring = _norm(block, after, model.d)
    writes = _outputs(block.get_submodule(layout.attention_projection), model).T
    for head, rows in enumerate(writes.split(model.value_size)):
        yield Weight("o", layer, head, rows, gain, centring)


def head_weights(model: Transformer, layer: int) -> list[Weight]:
    """Return the writer of each head, by which its mixed values, after a gate, act on the residual stream.

    Raises InputError for a family in which they pass something else first, and where what attention adds to
    the residual stream is not what W_O returns.
    """
    lacking = model.layout.traits.lacking
    if reason := next((lacking[kind] for kind in ("written", "attention", "head") if kind in lacking), ""):
        raise InputError(
            f"what the heads of {model.name} ({model.family}) write is not W_O times their values, since "
            f"{reason}"
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


def _mlp(block: Any, model: Transformer, layer: int) -> Iterator[tuple[Part, int, Tensor]]:
    mlp = block.get_submodule(model.layout.mlp)
    if model.layout.mlp in SHARED_MLP:  # OPT: both matrices lie in the layer itself
        yield "up", -1, _outputs(mlp, model)
        yield "down", -1, _outputs(block.get_submodule(model.layout.mlp_write), model).T
        return
    if model.layout.mlp_add_norm:  # BERT: the module that writes is not inside the one that reads
        yield "up", -1, _outputs(mlp.dense, model)
        yield "down", -1, _outputs(block.get_submodule(model.layout.mlp_write), model).T
        return
    mixture = mixture_of(model, layer)
    if mixture is not None:
        for unit, matrices in enumerate(mixture.matrices()):
            for part, rows in matrices.items():
                yield cast(Part, part), unit, rows
        if mixture.shared is None:
            return
        parts = [part for part in mlp.modules() if getattr(part, "down_proj", None) is mixture.shared]
        mlp = parts[0]
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
