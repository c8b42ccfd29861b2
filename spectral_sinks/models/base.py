"""The base class of language models and image encoders: layers that add to a residual stream."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import WHOLE, is_softmax
from spectral_sinks.models.effective_weights import (
    adapter_state,
    device_of,
    dtype_of,
    effective_weight,
    inputs_of,
    stored_tensors,
    unsaved_buffers,
)
from spectral_sinks.models.layout import Layout, has
from spectral_sinks.models.norms import centres, gain_of
from spectral_sinks.models.remote_state import Remote

torch.cos(torch.zeros(1))  # on one thread, since the first call on several may be off by 1e-4 (2.13.0)

INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Configuration entries that do not change what a model computes."""


CHANGING = ("max_seq_len_cached", "gradient_checkpointing", "name_or_path", "loss_type")
"""Attributes of modules that differ between runs, and do not change what the model computes."""


@dataclass(frozen=True, eq=False)
class Transformer:
    """A transformer wrapped by nnsight, together with the modules that read and write its residual stream."""

    nn: Any
    """The nnsight model, for your own traces."""
    layout: Layout
    name: str
    remote: Remote | None = field(default=None, kw_only=True)
    """Where traces run; None for this process."""

    @property
    def module(self) -> Any:
        """The transformers model itself."""
        return self.nn._module

    @cached_property
    def config(self) -> Any:
        """The configuration from which the sizes below are read."""
        return self.module.config

    @cached_property
    def causal(self) -> bool:
        """Whether a token attends only to itself and to earlier tokens."""
        return False

    @property
    def family(self) -> str:
        return self.config.model_type

    @cached_property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.module.get_submodule(self.layout.layers))

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def heads(self) -> int:
        """Number of query heads per layer."""
        return self.config.num_attention_heads

    @property
    def head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.d // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads per layer (fewer than `heads` in grouped-query attention)."""
        if self.layout.fused == "heads":
            return self.heads
        if self.layout.fused == "blocks" and getattr(self.config, "multi_query", False):
            return 1
        named = (getattr(self.config, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
        return next((heads for heads in named if heads), self.heads)

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have softmax attention: all of them, but for stacks with other kinds of layers."""
        kinds = getattr(self.config, "layer_types", None) or ()
        layers = self.module.get_submodule(self.layout.layers)
        return tuple(
            index
            for index, layer in enumerate(layers)
            if has(layer, self.layout.attention_projection or self.layout.attention)
            and not (index < len(kinds) and kinds[index].startswith("linear"))
        )

    def require_attention(self, purpose: str) -> None:
        """Raise InputError for a stack in which some layers have no softmax attention; `purpose` says in the
        message what needs it.
        """
        lacking = sorted({*range(self.layers)} - {*self.attention_layers})
        if lacking:
            raise InputError(
                f"{purpose} needs softmax attention in every layer, and {len(lacking)} of {self.layers} "
                f"layers of {self.name} ({self.family}), such as {lacking[0]}, have none; "
                "attention_by_head reads the others"
            )

    def require_attention_in(self, layer: int) -> None:
        """Raise InputError for a layer that has no softmax attention."""
        if layer not in self.attention_layers:
            raise InputError(
                f"layer {layer} of {self.name} ({self.family}) has no softmax attention; the layers "
                f"{', '.join(map(str, self.attention_layers))} have"
            )

    def require_equal_heads(self) -> None:
        """Raise InputError for a model whose layers have different numbers of heads, or no attention."""
        if not self.attention_layers:
            raise InputError(f"no layer of {self.name} ({self.family}) has softmax attention")
        if "heads" in self.layout.traits.lacking:
            raise InputError(
                "attention is measured head by head in every layer, and "
                f"{self.layout.traits.lacking['heads']}"
            )

    def require_heads(self, purpose: str) -> None:
        """Raise InputError for a model whose projections or heads are not known; `purpose` says in the
        message what needs them.
        """
        for kind in ("heads", "queries", "keys", "values"):
            if kind in self.layout.traits.lacking:
                raise InputError(
                    f"{purpose} needs the heads of {self.name} ({self.family}) one by one, and "
                    f"{self.layout.traits.lacking[kind]}"
                )

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its inputs."""
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return dtype_of(self.module, self.module.dtype)

    @property
    def weightless(self) -> bool:
        """Whether the weights are in another process."""
        return False

    def require_weights(self, purpose: str) -> None:
        """Raise InputError if the weights are in another process; `purpose` says in the message what needs
        them.
        """
        if self.weightless:
            raise InputError(
                f"{purpose} reads the weights of {self.name}, and the server keeps them in another process "
                "than the code that it is sent: load the model locally, or use a server that trusts you"
            )

    @property
    def reads_attention(self) -> bool:
        """Whether a trace can read whole attention maps."""
        return self.config._attn_implementation in ("eager", WHOLE) or self.own_attention is not None

    @property
    def own_attention(self) -> str | None:
        """Name of an attention implementation that is not one of transformers' and may not be a softmax, or
        None.
        """
        name = self.config._attn_implementation
        return None if name is None or is_softmax(name) else name

    @property
    def final_gain(self) -> Float[Tensor, "d"]:
        """The effective gain of the final norm in float32: `weight`, or `1 + weight` (Gemma)."""
        if not self.layout.final_norm:
            raise InputError(f"{self.name} ({self.family}) has no norm after its last layer")
        return gain_of(self.module.get_submodule(self.layout.final_norm), self.d)

    @property
    def centres_residual(self) -> bool:
        """Whether the final norm subtracts the mean of the residual over channels, as LayerNorm does."""
        name = self.layout.final_norm
        return bool(name) and centres(self.module.get_submodule(name), self.d)

    def layer(self, index: int) -> Any:
        """Return the nnsight envoy of a layer. Raises InputError for a layer that does not exist."""
        if not 0 <= index < self.layers:
            raise InputError(f"layer {index}: {self.name} has layers 0 to {self.layers - 1}")
        return self.nn.get(self.layout.layers)[index]

    def part(self, layer: Any, name: str) -> Any:
        """Return the envoy of a named module inside a layer; nnsight calls `output` `E_output`."""
        return layer.get(re.sub(r"\boutput\b", "E_output", name))

    def inputs(self, batch: Tensor) -> dict[str, Any]:
        """Return the arguments of the model's forward pass for a batch of inputs."""
        raise NotImplementedError

    def final(self) -> Any:
        """Inside a trace, return the residual stream `[batch, tokens, d]` after the final norm, if any."""
        if not self.layout.final_norm:
            return self.exit(self.layers - 1)
        if self.layout.traits.reused_norm:  # its first output is another one
            last = self.exit(self.layers - 1)
            norm = self.nn.get(self.layout.final_norm)
            return norm(last) if self.weightless else norm._module.forward(last)
        return self.nn.get(self.layout.final_norm).output

    def exit(self, layer: int) -> Any:
        """Inside a trace, return the residual stream at the exit of a layer."""
        output = self.layer(layer).output
        return output[0] if self.layout.traits.outputs else output

    def skip(self, layer: int, residual: Tensor) -> None:
        """Inside a trace, let a layer return a residual stream without being run."""
        outputs = self.layout.traits.outputs
        self.layer(layer).skip((residual, *[None] * (outputs - 1)) if outputs else residual)

    @cached_property
    def value_size(self) -> int:
        """Width of the values of a head, which is that of its queries and keys in most families."""
        layer = self.attention_layers[0] if self.attention_layers else 0
        columns = self.head_columns(layer, 0)
        return columns.stop - columns.start

    def head_columns(self, layer: int, head: int) -> slice:
        """Return which inputs of W_O are the output of one head. Raises InputError without a W_O."""
        if not self.layout.attention_projection:
            raise InputError(f"{self.name} ({self.family}): {self.layout.traits.lacking['head']}")
        part = self.module.get_submodule(f"{self.layout.layers}.{layer}.{self.layout.attention_projection}")
        size = inputs_of(part) // self.heads
        return slice(head * size, (head + 1) * size)

    def head_write(self, layer: int, head: int) -> Float[Tensor, "head_size d"]:
        """Return the slice of W_O that writes the output of one head into the residual stream.

        It includes the factor by which the model multiplies what it adds.
        """
        if not 0 <= head < self.heads:
            raise InputError(f"head {head}: {self.name} has heads 0 to {self.heads - 1}")
        path = f"{self.layout.layers}.{layer}.{self.layout.attention_projection}"
        columns = self.head_columns(layer, head)
        weight = effective_weight(self.module.get_submodule(path), self.dtype, columns).T
        factor = self.layout.traits.write_factor
        return weight if factor == 1 else factor * weight

    def projection_index(self, which: str) -> Tensor | slice:
        """Return which outputs of the layout's projection are `queries`, `keys` or `values`.

        Where the matrix of the queries also holds gates, `gate` is the part that they come from.
        """
        if not self.layout.fused or (self.layout.fused == "gates" and which not in ("queries", "gate")):
            return slice(None)
        if self.layout.fused == "gates":
            first = self.head_size if which == "gate" else 0
            start = torch.arange(self.heads)[:, None] * 2 * self.head_size + first
            return (start + torch.arange(self.head_size)).flatten()
        size, order = self.head_size, ("queries", "keys", "values")
        if self.layout.fused in ("heads", "groups"):  # each key head with its query heads
            shared = self.heads // self.key_heads
            counts = [shared, 1, 1]
            first = sum(counts[: order.index(which)])
            start = torch.arange(self.key_heads)[:, None] * (shared + 2) * size + first * size
            return (start + torch.arange(counts[order.index(which)] * size)).flatten()
        lengths = [self.heads * size, self.key_heads * size, self.key_heads * size]
        start = sum(lengths[: order.index(which)])
        return slice(start, start + lengths[order.index(which)])

    @property
    def settings(self) -> str:
        """The configuration as JSON, without the entries that do not change what is computed."""
        kept = {k: v for k, v in self.config.to_dict().items() if k not in INCIDENTAL}
        return json.dumps(kept, sort_keys=True, default=str)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the model computes with: weights, buffers, the kinds of its modules with the
        numbers and strings that they hold, the active adapters and the configuration.

        It is computed anew each time, since any of these can be changed in place. What is not hashed is in
        `patches`. For a model whose weights are on a server, the hash covers the configuration, the model's
        name, the server, the published commit and the dtype.
        """
        digest = hashlib.sha256(self.settings.encode())
        if self.remote is not None and self.weightless:
            where = f"{self.name} at {self.remote.host}, commit {self.remote.commit}, {self.dtype}"
            digest.update(where.encode())
            return digest.hexdigest()
        for name, part in self.module.named_modules():
            digest.update(f"{name} {type(part).__qualname__} {settings_of(part)}".encode())
        for name, tensor in (*stored_tensors(self.module), *unsaved_buffers(self.module)):
            if tensor.is_meta:
                raise InputError(f"{self.name}: the weights of {name!r} are not in memory, so have no hash")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        digest.update(adapter_state(self.module).encode())
        return digest.hexdigest()


def settings_of(part: nn.Module) -> list[tuple[str, Any]]:
    """Return the numbers and strings among the attributes of a module, such as the epsilon of a norm.

    Lists and tuples of them count, and so do the numbers in an array of NumPy or in a tensor that is neither
    a parameter nor a buffer.
    """
    found: list[tuple[str, Any]] = []
    for name, value in vars(part).items():
        if name.startswith("_") or name in CHANGING:
            continue
        if isinstance(value, np.generic | np.ndarray) or (isinstance(value, Tensor) and not value.is_meta):
            value = (str(value.dtype), value.tolist())
        elif not _is_setting(value):
            continue
        found.append((name, value))
    return sorted(found, key=lambda item: item[0])


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(each is None or _is_setting(each) for each in value)
    return isinstance(value, bool | int | float | str)
