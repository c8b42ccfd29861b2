"""Which outputs of a projection are queries, keys and values: a change of them shows what they are."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectral_sinks.models.attention_sdpa import whole_maps
from spectral_sinks.models.effective_weights import innermost
from spectral_sinks.models.layout import Fused

if TYPE_CHECKING:
    from spectral_sinks.models.language import LanguageModel

PLACE = 2
"""The token at which queries, keys or values are changed, to see which of them a projection makes."""

SIZES = (4.0, 0.3, 30.0)
"""Sizes of the change, relative to the outputs; under a steep softmax, one alone may show nothing."""

Which = Literal["queries", "keys", "values"]


class _Enough(Exception):
    pass


def find_fused(
    model: "LanguageModel", run: Callable[[], object], tokens: int, named: list[Which]
) -> tuple[Fused, str]:
    """Return the layout of a fused matrix by which a change of each part acts on attention as it should.

    Changed queries change one row of the map, keys one column and the rows after it, and values and gates
    change nothing.

    Args:
        model: the model, whose layout says where queries, keys and values are taken to come from.
        run: a pass of the model.
        tokens: the length of the pass.
        named: the parts that are examined.

    Returns:
        The layout, and why the parts are not exact sites ("" if they are).

    """
    old = model.layout.fused
    probe = _Probe(model, run, tokens)
    candidates: list[Fused] = [old]
    if old:
        candidates += [kind for kind in get_args(Fused) if kind not in ("", "gates", old)]
    elif "queries" in named and probe.width == 2 * model.heads * model.head_size:
        candidates = ["gates"]
    with whole_maps(model) if model.own_attention is None else nullcontext():
        plain = probe.map(None, old)
        if plain is None:
            known = not old or model.tested
            return old, "" if known else (
                "its attention returns no weights, by which its fused matrix could be checked"
            )
        for kind in candidates:
            parts: list[Which | Literal["gate"]] = [*named, "gate"] if kind == "gates" else [*named]
            if all(probe.acts_as(which, kind, plain) for which in parts):
                return kind, ""
    return old, (
        "a change of what was taken for its queries, keys or values does not act on its attention as one of "
        "these should"
    )


class _Probe:
    """Passes in which one part is changed at one token."""

    def __init__(self, model: "LanguageModel", run: Callable[[], object], tokens: int) -> None:
        self.model, self.run, self.tokens = model, run, tokens
        self.layer = f"{model.layout.layers}.{model.attention_layers[0]}"

    @property
    def width(self) -> int:
        """The number of outputs of the projection that makes the queries."""
        part = self.model.module.get_submodule(f"{self.layer}.{self.model.layout.queries}")
        return getattr(innermost(part), "out_features", 0)

    def map(self, which: Which | Literal["gate"] | None, fused: Fused, size: float = 1.0) -> Tensor | None:
        """Return the map of the first attention layer, in which one part is changed at one token."""
        old = self.model.layout
        found: list[Any] = []
        handles: list[Any] = []

        def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            assert which is not None
            index = replace(self.model, layout=replace(old, fused=fused)).projection_index(which)
            changed = output.clone()
            rows = changed.view(1, self.tokens, -1)
            noise = torch.randn(rows[0, PLACE, index].shape, generator=torch.Generator().manual_seed(0))
            rows[0, PLACE, index] += (size * (float(rows.float().std()) + 0.1) * noise).to(rows)
            return changed

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[1] if isinstance(output, tuple) and len(output) > 1 else None)
            raise _Enough

        block = self.model.module.get_submodule(self.layer)
        if which is not None:
            path = {"keys": old.keys, "values": old.values}.get(which, old.queries)
            handles.append(block.get_submodule(path).register_forward_hook(change))
        handles.append(block.get_submodule(old.attention).register_forward_hook(keep))
        try:
            with torch.no_grad():
                self.run()
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        maps = found[0] if found else None
        return maps.detach().float() if isinstance(maps, Tensor) and maps.ndim == 4 else None

    def acts_as(self, which: Which | Literal["gate"], fused: Fused, plain: Tensor) -> bool:
        rows = torch.zeros(self.tokens, dtype=torch.bool)  # which queries attend otherwise
        for size in SIZES:
            try:
                changed = self.map(which, fused, size)
            except (IndexError, RuntimeError):  # columns that the matrix does not have
                return False
            if changed is None:
                return False
            rows |= ((changed - plain).abs().amax((0, 1, 3)) > 1e-4).cpu()
            if which in ("values", "gate") or bool(rows.any()):
                break
        own = torch.arange(self.tokens) == PLACE
        if which == "queries":
            return bool((rows & own).any()) and not bool((rows & ~own).any())
        if which == "keys":
            before = torch.arange(self.tokens) < (PLACE if self.model.causal else 0)
            return bool((rows & ~own).any()) and not bool((rows & before).any())
        return not bool(rows.any())
