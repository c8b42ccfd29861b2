"""The other side of each ratio of the benchmarks: the code that one would write without this package.

`naive` runs one nnsight trace per cell and batch. `Replay` is suffix replay by hand on a model that nnsight
has not wrapped. It calls the layers directly with arguments captured from one forward pass, and it uses the
same scoring arithmetic and returns the same rows as `evaluate_all`. Both work only with the module names of
Llama.
"""

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

import spectral_sinks as ss

OPENING = 64
"""Number of queries over which attention received is averaged."""

Cell = tuple[int, int]
"""The layer at whose exit bands 1 to k are kept, and k."""

Rows = dict[str, Tensor]
"""Tensors by name: `[windows]`, and `[windows, layers]` for the sink mass."""


def twin(model: ss.LanguageModel, attention: str | None = None) -> Any:
    """Return an unwrapped transformers model that shares the weights of a model."""
    config = model.module.config
    used = attention or config._attn_implementation
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), attn_implementation="eager")
    made.load_state_dict(model.module.state_dict(), assign=True)
    made.set_attn_implementation(used)
    return made.to(model.device).eval().requires_grad_(False)


def thin(filter: ss.Filter, like: Tensor) -> tuple[Tensor, bool]:
    """Return the basis that a filter stores, in the dtype for use, and whether it spans the kept part."""
    basis = filter.blocked.basis.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return basis, filter.blocked.complemented


def naive(
    model: ss.LanguageModel, windows: ss.Windows, filters: dict[Cell, ss.Filter], batch: int
) -> dict[Cell, Rows]:
    """Run whole passes, with the filter at the output of the layer, and reduce the logits in the trace."""
    nn, layers = model.nn, range(model.layers)
    found: dict[Cell, list[Rows]] = {cell: [] for cell in filters}
    for _, ids in windows.batches(batch):
        ids = ids.to(model.device)
        targets = ids[:, 1:, None]
        with torch.no_grad(), nn.trace(input_ids=ids, use_cache=False):
            base = nnsight.save(nn.lm_head.output[:, :-1].float().log_softmax(-1))
        probabilities, top = base.exp(), base.argmax(-1)
        for (layer, kept), keep in filters.items():
            with torch.no_grad(), nn.trace(input_ids=ids, use_cache=False):
                mass = []
                for index in layers:
                    weights = nn.model.layers[index].self_attn.output[1]
                    mass.append(weights[:, :, :OPENING, 0].float().mean((1, 2)))
                    if index == layer:
                        nn.model.layers[index].output = keep(nn.model.layers[index].output)
                log = nn.lm_head.output[:, :-1].float().log_softmax(-1)
                rows = nnsight.save(
                    {
                        "nll": -log.gather(-1, targets)[..., 0].mean(1).cpu(),
                        "kl": (probabilities * (base - log)).sum(-1).mean(1).cpu(),
                        "top1": (log.argmax(-1) == top).float().mean(1).cpu(),
                        "sink": torch.stack(mass, -1).cpu(),
                    }
                )
            found[layer, kept].append(rows)
    return {cell: _joined(parts) for cell, parts in found.items()}


class Replay:
    """Suffix replay by hand, in which `stack` cells share a pass."""

    def __init__(self, module: Any, chunk: int, stack: int = 1, compiled: bool = False) -> None:
        self.module, self.chunk, self.stack = module, chunk, stack
        self.layers = list(module.model.layers)
        self.last = torch.empty(0)
        self.seen: list[Tensor] = []
        for layer in self.layers:
            layer.self_attn.register_forward_hook(self._look)
        self.calls = [torch.compile(layer) if compiled else layer for layer in self.layers]

    def _look(self, module: Any, inputs: Any, output: Any) -> None:
        self.last = output[1][:, :, :OPENING, 0].float().mean((1, 2))

    @torch.no_grad()
    def __call__(self, windows: ss.Windows, filters: dict[Cell, ss.Filter], batch: int) -> dict[Cell, Rows]:
        """Return the same rows as `naive`, and the share of removed energy."""
        like = self.module.lm_head.weight
        bases = {id(keep): thin(keep, like) for keep in filters.values()}
        found: dict[Cell, list[Rows]] = {cell: [] for cell in filters}
        for _, ids in windows.batches(batch):
            ids = ids.to(like.device)
            exits, options = self._untouched(ids)
            below = torch.stack(self.seen, -1)
            for layer, x in enumerate(exits):
                cells = [cell for cell in filters if cell[0] == layer]
                for start in range(0, len(cells), self.stack):
                    part = cells[start : start + self.stack]
                    rows = self._suffix(layer, x, [bases[id(filters[c])] for c in part], ids, options, below)
                    for cell, row in zip(part, rows, strict=True):
                        found[cell].append(row)
        return {cell: _joined(parts) for cell, parts in found.items()}

    def _untouched(self, ids: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """Run one untouched pass.

        Returns the residuals at every exit, and the keyword arguments of the layers. The quantities that
        filtered passes are compared with become attributes.
        """
        exits: list[Tensor] = []
        options: dict[str, Any] = {}

        def leave(module: Any, inputs: Any, output: Tensor) -> None:
            exits.append(output)
            self.seen.append(self.last)

        handles = [layer.register_forward_hook(leave) for layer in self.layers]
        handles.append(
            self.layers[0].register_forward_pre_hook(
                lambda module, inputs, given: options.update(given), with_kwargs=True
            )
        )
        self.seen.clear()
        self.final = self.module.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        for handle in handles:
            handle.remove()
        weight = self.module.lm_head.weight
        totals, expected, tops = [], [], []
        for rows in self.final.split(self.chunk):
            logits = self.module.lm_head(rows).float()
            tops.append(logits.argmax(-1))
            totals.append(logits.logsumexp(-1))
            expected.append(logits.softmax(-1) @ weight.float())
        self.total, self.expected, self.top = torch.cat(totals), torch.cat(expected), torch.cat(tops)
        return exits, options

    def _suffix(
        self,
        layer: int,
        x: Tensor,
        bases: Sequence[tuple[Tensor, bool]],
        ids: Tensor,
        options: dict[str, Any],
        below: Tensor,
    ) -> list[Rows]:
        entries, shares = [], []
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        energy = precise.square().sum(-1)
        for basis, kept in bases:
            inside = (precise @ basis) @ basis.T
            outside = precise - inside
            left, removed = (inside, outside) if kept else (outside, inside)
            entries.append(left.to(x.dtype))
            shares.append((removed.square().sum(-1) / energy).mean(1).cpu())
        count, size = len(bases), len(ids)
        self.seen.clear()
        stream = torch.cat(entries) if count > 1 else entries[0]
        for call in self.calls[layer + 1 :]:
            stream = call(stream, **options)
            self.seen.append(self.last)
        final = self.module.model.norm(stream)[:, :-1].flatten(0, 1)
        scores = self._score(final, ids[:, 1:].flatten(), count)
        nll, kl, top1 = (score.view(count, size, -1).mean(2).cpu() for score in scores)
        above = [mass.view(count, size) for mass in self.seen]
        sinks = [torch.stack([*below.T[: layer + 1], *(mass[i] for mass in above)], -1) for i in range(count)]
        return [
            {"nll": nll[i], "kl": kl[i], "top1": top1[i], "sink": sinks[i].cpu(), "removed": shares[i]}
            for i in range(count)
        ]

    def _score(self, final: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        nll, kl, agrees = (torch.empty(len(final), device=final.device) for _ in "123")
        period = len(targets)
        for start in range(0, count * period, period):
            for first in range(0, period, self.chunk):
                last = min(first + self.chunk, period)
                there, here = slice(first, last), slice(start + first, start + last)
                logits = self.module.lm_head(final[here]).float()
                hit = logits.gather(-1, targets[there, None])[:, 0]
                at_top = logits.gather(-1, self.top[there, None])[:, 0]
                most = logits.amax(-1)
                total = most + logits.sub_(most[:, None]).exp_().sum(-1).log()
                nll[here] = total - hit
                agrees[here] = (at_top >= most).float()
                moved = (final[here] - self.final[there]).float()
                kl[here] = total - self.total[there] - (self.expected[there] * moved).sum(-1)
        return nll, kl, agrees


def _joined(parts: list[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
