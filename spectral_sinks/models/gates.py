"""Gates between attention and W_O: the factor on each channel of what a head mixes.

Some families multiply what the softmax returns by a gate, which a token computes from its own residual stream
(Qwen3-Next, Qwen 3.5, AfMoE, Laguna). No module returns that factor. It is the derivative of what W_O reads
by what the softmax returns, which automatic differentiation in forward mode carries along with the pass. It
is exact also where a head mixes nothing.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from spectral_sinks.models.attention_capture import AttentionCall, attending

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer


@dataclass(frozen=True)
class _Followed(AttentionCall):
    """A call whose output carries a derivative of 1 in every channel."""

    def output(self) -> Tensor:
        mixed = super().output()
        return forward_ad.make_dual(mixed, torch.ones_like(mixed))


@contextmanager
def attending_gates(model: "Transformer", see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Inside the block, call `see` with each layer's attention and its gate, once W_O is about to read.

    In a layer without a gate, the factor is 1. Where something other than a factor acts between the softmax
    and W_O, such as a norm, the gate means nothing; `find_traits` tells the two apart. Raises InputError as
    `attending` does.
    """
    calls: dict[int, AttentionCall] = {}

    def look(call: AttentionCall) -> AttentionCall:
        calls[call.layer] = call
        return _Followed(**{each.name: getattr(call, each.name) for each in fields(call)})

    def reader(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def read(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            call = calls.pop(layer, None)
            if call is None:  # a module that layers share, called by another of them
                return None
            mixed, factor = forward_ad.unpack_dual(given[0])
            batch, heads, queries, _size = call.query.shape
            by_head = mixed.new_zeros(mixed.shape) if factor is None else factor
            gate = by_head.detach().reshape(batch, queries, heads, -1).transpose(1, 2)
            see(replace(call, gate=gate))
            return (mixed, *given[1:])

        return read

    layout = model.layout
    with ExitStack() as stack:
        for layer in model.attention_layers:
            path = f"{layout.layers}.{layer}.{layout.attention_projection}"
            part = model.module.get_submodule(path)
            stack.callback(part.register_forward_pre_hook(reader(layer), prepend=True).remove)
        stack.enter_context(attending(model, look))
        stack.enter_context(forward_ad.dual_level())
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of torch, where it loads its own derivatives
            forward_ad.make_dual(torch.zeros(1), torch.ones(1))
        yield
