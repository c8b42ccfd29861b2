"""Continuations under interventions, greedy or sampled, with a cache of edited keys and values.

Each step is one trace that continues from the cache, not one traced `model.generate` with `tracer.iter`. So
the steps use the same sites as every other measurement, several interventions share passes, and a text
depends only on its own prompt, draw and intervention.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions, trace
from spectral_sinks.measure.nll.scoring import score
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.edits import Edit, EditFunction, as_edit, as_edits

CONTINUATIONS = 128
"""Continuations that are generated at once."""


def generate(
    model: LanguageModel,
    prompts: Int[Tensor, "prompts tokens"],
    interventions: Interventions | None = None,
    **options: Any,
) -> Int[Tensor, "prompts draws new"]:
    """Run `generate_all` for one intervention, or for the untouched model."""
    return generate_all(model, prompts, {"": interventions or {}}, **options)[""]


@remotely
def generate_all(
    model: LanguageModel,
    prompts: Int[Tensor, "prompts tokens"],
    cells: Mapping[str, Interventions],
    *,
    new: int = 64,
    temperature: float = 0.0,
    draws: int = 1,
    seed: int = 0,
    cached: bool = True,
    rows: int = CONTINUATIONS,
) -> dict[str, Int[Tensor, "prompts draws new"]]:
    """Continue prompts of one length under each of several interventions.

    The interventions act on the prompt and on every new token when it is read. So cached keys and values come
    from edited residuals, as they would without a cache. A function receives only the tokens that are new to
    the cache. The end-of-sequence token is never drawn, so all continuations have the same length.

    Args:
        model: a causal language model.
        prompts: token ids.
        cells: interventions by name.
        new: tokens to generate.
        temperature: of the softmax; 0 is greedy.
        draws: continuations of each prompt.
        seed: a draw depends on the seed, prompt, draw and step only, so it is the same for every intervention
            and does not depend on which continuations share a pass.
        cached: whether to use a cache. A server that runs functions apart from the weights uses none; the
            texts are the same.
        rows: continuations that are generated at once.

    Returns:
        The new token ids, by name of the cell.

    Raises:
        InputError: for an encoder, a continuation longer than the context, several greedy draws, and filters
            that are not defined for tokens still to be generated: those that select tokens by a mask, and
            those with fill `Noise` or `Swap`.

    """
    for interventions in cells.values():
        _check(model, prompts, interventions, new, temperature, draws)
    texts = [(name, p, draw) for name in cells for p in range(len(prompts)) for draw in range(draws)]
    cached = cached and not model.weightless  # the cache would be in the other process
    grown: list[Tensor] = []
    for start in range(0, len(texts), rows):
        part = texts[start : start + rows]
        names = [name for name, _, _ in part]
        spans = {name: slice(names.index(name), names.index(name) + names.count(name)) for name in names}
        random = [_generator(seed, p, draw) for _, p, draw in part] if temperature else []
        ids = prompts[[p for _, p, _ in part]].to(model.device)
        cache = DynamicCache(config=model.config) if cached else None
        for _ in range(new):
            # The first pass reads the whole prompt, every later one a single new token
            known = ids.shape[1] - 1 if cached and ids.shape[1] > prompts.shape[1] else 0
            logits = trace(
                model,
                ids[:, known:],
                _shared({name: cells[name] for name in spans}, spans, ids[:, known:], known),
                readout=lambda final, *_: model.unembed(final[:, -1]),
                cache=cache,
            )
            logits[:, _ends(model)] = -torch.inf
            if temperature:  # the largest of log p + Gumbel noise is a draw from p
                drawn = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g) for g in random])
                logits = logits / temperature - drawn.clamp_min(1e-30).log().to(logits.device)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        grown.append(ids[:, prompts.shape[1] :].cpu())
    generated = torch.cat(grown).view(len(cells), len(prompts), draws, new)
    return dict(zip(cells, generated, strict=True))


def continuation_nll(
    model: LanguageModel,
    prompts: Int[Tensor, "prompts tokens"],
    continuations: Int[Tensor, "prompts draws new"],
    interventions: Interventions | None = None,
    *,
    rows: int = CONTINUATIONS,
) -> Float[Tensor, "prompts draws"]:
    """Return the NLL of continuations after their prompts, in nats per token of the continuation.

    A text that loops is easy to predict, so a low value does not mean a good continuation. Raises InputError
    for an encoder.
    """
    _require_causal(model)
    count, draws, new = continuations.shape
    texts = torch.cat([prompts.repeat_interleave(draws, 0), continuations.flatten(0, 1)], dim=1)
    losses: list[Tensor] = []
    for part in texts.split(rows):

        def readout(final: Tensor, *_: Any, ids: Tensor = part) -> Tensor:
            scored = slice(-new - 1, None)  # nothing before the last token of the prompt
            return score(model, final[:, scored], ids[:, scored]).nll.double().mean(1).cpu()

        losses.append(trace(model, part.to(model.device), interventions or {}, readout=readout))
    return torch.cat(losses).view(count, draws)


def _shared(
    cells: Mapping[str, Interventions], spans: Mapping[str, slice], ids: Tensor, known: int
) -> dict[Site, EditFunction]:
    """Return one function per site, which applies the edit of each cell to that cell's own rows.

    `known` is the number of tokens in the cache; after the first step a pass reads a single new token.
    """
    by_site: dict[Site, list[tuple[slice, Edit]]] = {}
    for name, interventions in cells.items():
        for site, edit in as_edits(interventions).items():
            if (acting := edit.within(known, 1) if known else edit) is not None:
                by_site.setdefault(site, []).append((spans[name], acting))

    def together(edits: list[tuple[slice, Edit]]) -> EditFunction:
        def apply(x: Tensor) -> Tensor:
            out = x.clone()
            for span, edit in edits:
                out[span] = edit.apply(x[span], ids[span])
            return out

        return apply

    return {site: together(edits) for site, edits in by_site.items()}


def _generator(seed: int, prompt: int, draw: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, prompt, draw)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def _ends(model: LanguageModel) -> list[int]:
    ends: Any = getattr(model.module.config, "eos_token_id", None)
    return [] if ends is None else ([ends] if isinstance(ends, int) else list(ends))


def _require_causal(model: LanguageModel) -> None:
    if not model.causal:
        raise InputError(f"{model.name} predicts masked tokens: only a causal model continues a text")


def _check(
    model: LanguageModel, prompts: Tensor, edits: Interventions, new: int, temperature: float, draws: int
) -> None:
    _require_causal(model)
    if prompts.ndim != 2 or not prompts.numel():
        raise InputError(f"prompts of shape {tuple(prompts.shape)}: expected [prompts, tokens] of one length")
    if new < 1 or draws < 1 or temperature < 0:
        raise InputError(f"{new} new tokens, {draws} draws, temperature {temperature}: at least 1, 1 and 0")
    if draws > 1 and not temperature:
        raise InputError("greedy continuations are all the same: one draw, or a temperature above 0")
    length = prompts.shape[1] + new
    if model.context is not None and length > model.context:
        raise InputError(f"{length} tokens with the prompt: {model.name} has a context of {model.context}")
    for edit in edits.values():
        as_edit(edit).check_continuation(length)
