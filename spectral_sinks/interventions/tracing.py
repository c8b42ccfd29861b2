"""One forward pass of a model with edits at sites, through nnsight."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import ORDER, Kind, Site
from spectral_sinks.models.attention_sdpa import whole_maps
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.vision import VisionModel
from spectral_sinks.remote.client import remotely
from spectral_sinks.spectra.edits import Edit, EditFunction, as_edits

T = TypeVar("T")

Interventions = Mapping[Site, Edit | EditFunction]
"""The edit at each site: a filter, or any function of a tensor `[batch, length, d]`."""

Reads = Sequence[Site] | Mapping[Site, Callable[[Tensor], Any]]
"""Sites whose residuals are read, or the function at each site whose result is kept of the residual."""

READS: tuple[Kind, ...] = ("queries", "keys", "values")

SiteFunctions = list[tuple[Site, EditFunction]]
"""The functions of one layer and kind of site, in the order in which they act."""

Hooks = dict[tuple[int, Kind], SiteFunctions]
"""Functions by layer and kind of site."""


@dataclass(frozen=True)
class Resume:
    """The residual `[batch, length, d]` at the exit of `layer`, from which a pass starts above that layer."""

    layer: int
    residual: Tensor


@remotely
def trace(
    model: Transformer,
    ids: Int[Tensor, "batch length"] | Float[Tensor, "batch channels height width"],
    edits: Interventions,
    reads: Reads = (),
    *,
    readout: Callable[[Tensor, dict[Site, Any], list[Tensor]], T],
    attention: bool | EditFunction = False,
    resume: Resume | None = None,
    last: int | None = None,
    gradients: bool = False,
    cache: Any = None,
) -> T:
    """Run one forward pass with edits at sites, and return the result of `readout`.

    The pass ends with `readout`: the model itself computes no logits, and `readout` may unembed residuals.

    Args:
        model: a language model or an image encoder.
        ids: token ids, or pixels for an image encoder. An encoder reads the ids as they are; `masked_ids`
            masks them.
        edits: the edit at each site. With a cache, filters count positions from the beginning of the text,
            and a function receives only the tokens of this pass.
        reads: sites whose residuals, after any edit there, `readout` receives; all of them are held until the
            end of the pass. Or a function for each site, called where the residual arises: `readout` receives
            its result, and the residual is not held.
        readout: a function that is called inside the trace with three arguments: the output of the final norm
            `[batch, length, d]`, which the unembedding reads; the residuals at `reads`; and the attention
            weights. For an image encoder it may call the model's `logits()`.
        attention: True for the attention weights `[batch, heads, length, length]` of each layer (of the first
            64 tokens under "sdpa_opening"), or a function that is applied to the weights of each layer in
            turn. Layers that `resume` skips have none.
        resume: the residual from which the pass begins, above its layer.
        last: the last layer that runs; by default all of them and the final norm. With it, `readout` receives
            the residual at the exit of that layer in place of the output of the final norm.
        gradients: whether the pass is recorded for autograd.
        cache: a cache of transformers. The ids continue where it ends, and their keys and values, which come
            from edited residuals, are added to it.

    Returns:
        The result of `readout`.

    Raises:
        InputError: for a site that the model does not have, for a site that does not lie between `resume` and
            `last`, for a filter that needs tokens of the text before this pass, and for attention weights or
            gradients that the model cannot give.

    """
    if attention and not model.reads_attention:
        raise InputError(
            f"attention weights of {model.name} cannot be read: it runs "
            f"{model.config._attn_implementation!r} attention; load it with attention='eager'"
        )
    if gradients and model.weightless:
        raise InputError(
            f"gradients of {model.name} cannot be computed, since its weights are in another process"
        )
    # collect the edits, then the recorders, which thus see the edited residuals
    hooks: Hooks = {}
    kinds = model.kinds(ids) if isinstance(model, VisionModel) else ids
    past = 0 if cache is None else int(cache.get_seq_length())
    for site, edit in as_edits(edits).items():
        site.check(model)
        if cache is not None and (edit := edit.within(past, ids.shape[1])) is None:
            continue
        hooks.setdefault((site.layer, site.kind), []).append((site, partial(edit.apply, ids=kinds)))
    read: dict[Site, Any] = {}
    functions = reads if isinstance(reads, Mapping) else dict.fromkeys(reads, _whole)
    for site, reduce in functions.items():
        site.check(model)
        hooks.setdefault((site.layer, site.kind), []).append((site, _recorder(site, read, reduce)))
    start = 0 if resume is None else resume.layer + 1
    if any(layer < start for layer, _ in hooks):
        raise InputError(f"a pass that begins above layer {start - 1} has sites at or below it")
    if last is not None and not start <= last < model.layers:
        raise InputError(f"a pass that ends with layer {last}: expected {start} to {model.layers - 1}")
    if last is not None and any(layer > last for layer, _ in hooks):
        raise InputError(f"a pass that ends with layer {last} has sites above it")
    writes = _head_writes(model, hooks)
    # run the model; the walk through its modules happens inside the trace
    on_attention = (lambda weights: weights) if attention is True else attention or None
    options = model.inputs(ids)
    if model.causal:
        options |= {"use_cache": cache is not None, "past_key_values": cache}
    other = bool(attention) and not model.layout.traits.eager_maps
    maps = whole_maps(model) if other else nullcontext()
    with maps, torch.set_grad_enabled(gradients), model.nn.trace(**options) as tracer:
        ss_result = nnsight.save(_walk(model, hooks, writes, on_attention, resume, last, readout, read))
        tracer.stop()
    return ss_result


def deepest(sites: Iterable[Site]) -> int:
    """Return the highest layer of some sites, or 0: the `last` of a pass that reads nothing else."""
    return max((site.layer for site in sites), default=0)


def _recorder(site: Site, into: dict[Site, Any], reduce: Callable[[Tensor], Any]) -> EditFunction:
    def record(x: Tensor) -> Tensor:
        into[site] = reduce(x)
        return x

    return record


def _whole(x: Tensor) -> Tensor:
    return x


def _head_writes(model: Transformer, hooks: Hooks) -> dict[Site, Tensor]:
    """Return what the heads with functions write by, if the weights are in this process."""
    heads = [site for (_, kind), functions in hooks.items() if kind == "head" for site, _ in functions]
    return {} if model.weightless else {s: model.head_write(s.layer, s.head or 0) for s in set(heads)}


def _walk(
    model: Transformer,
    hooks: Hooks,
    writes: dict[Site, Tensor],
    attention: EditFunction | None,
    resume: Resume | None,
    last: int | None,
    readout: Callable[[Tensor, dict[Site, Any], list[Tensor]], T],
    read: dict[Site, Any],
) -> T:
    """Visit the modules in forward order, as nnsight requires, inside the trace."""
    start = 0
    weights: list[Tensor] = []
    if resume is not None:
        start = resume.layer + 1
        for index in range(start):
            model.skip(index, resume.residual)
    for index in range(start, model.layers if last is None else last + 1):
        own: dict[Kind, SiteFunctions] = {
            kind: hooks[index, kind] for kind in ORDER if (index, kind) in hooks
        }
        seen = attention if index in model.attention_layers else None
        if own or seen is not None:
            _visit(model, model.layer(index), own, writes, seen, weights)
    return readout(model.final() if last is None else model.exit(last), read, weights)


def _visit(
    model: Transformer,
    layer: Any,
    hooks: dict[Kind, SiteFunctions],
    writes: dict[Site, Tensor],
    on_attention: EditFunction | None,
    weights: list[Tensor],
) -> None:
    """Apply the functions of one layer, and pass its attention weights to `on_attention`."""
    layout = model.layout
    if "embedding" in hooks:
        layer.input = _chain(layer.input, hooks["embedding"])
    shared = bool(layout.mlp_norm) and layout.mlp_norm == layout.attention_norm
    entry = layer.input if shared and "mlp-input" in hooks else None
    reads: dict[Kind, SiteFunctions] = {kind: hooks[kind] for kind in READS if kind in hooks}
    if reads:
        _read_projections(model, layer, reads)
    inside = layout.attention_projection.startswith(f"{layout.attention}.")
    if on_attention is not None and not inside:
        weights.append(on_attention(_maps(model, layer)))
    if "head" in hooks:
        projection = model.part(layer, layout.attention_projection)
        mixed = projection.input
        change, factor = torch.zeros_like(projection.output), layout.traits.write_factor
        for site, edit in hooks["head"]:
            assert site.head is not None
            columns = model.head_columns(site.layer, site.head)
            if site in writes:
                written = mixed[..., columns] @ writes[site].to(mixed)
            else:
                alone = torch.zeros_like(mixed)
                alone[..., columns] = mixed[..., columns]
                written = factor * (projection(alone) - projection(torch.zeros_like(mixed)))
            change = change + (edit(written) - written) / factor
        projection.output = projection.output + change
    first = layout.attention_write.startswith(f"{layout.attention}.")  # BLOOM
    if on_attention is not None and inside and not first:
        weights.append(on_attention(_maps(model, layer)))
    if "attention" in hooks:
        _rewrite(
            model, model.part(layer, layout.attention_write), hooks["attention"], layout.traits.write_factor
        )
    if on_attention is not None and inside and first:
        weights.append(on_attention(_maps(model, layer)))
    if entry is not None:  # attention reads the output of the same norm, and reads it unedited
        edited = model.part(layer, layout.mlp_norm)(_chain(entry, hooks["mlp-input"]))
        model.part(layer, layout.mlp).input = edited
    elif "mlp-input" in hooks:
        reader = model.part(layer, layout.mlp_norm or layout.mlp)
        reader.input = _chain(reader.input, hooks["mlp-input"])
    if "mlp" in hooks:
        _rewrite(model, model.part(layer, layout.mlp_write), hooks["mlp"], layout.traits.write_factor)
    if "exit" in hooks:
        _rewrite(model, layer, hooks["exit"])


def _maps(model: Transformer, layer: Any) -> Tensor:
    """Return the attention weights of a layer. Raises InputError where its implementation returns none."""
    maps = model.part(layer, model.layout.attention).output[1]
    if maps is None:
        raise InputError(
            f"attention weights of {model.name} cannot be read: {layer.path} returns none, so it runs "
            "another attention implementation than requested, or one that does not return its weights; let "
            "it return them after its output, or measure without sink mass: attention='sdpa'"
        )
    return maps


def _read_projections(model: Transformer, layer: Any, hooks: dict[Kind, SiteFunctions]) -> None:
    """Let queries, keys or values read an edited residual, while all other components read the true one.

    The projection is run a second time, on the edited residual. The columns of its output that belong to the
    queries, keys or values are then replaced.
    """
    layout = model.layout
    entry = layer.input
    edited: dict[Kind, Tensor] = {kind: _chain(entry, edits) for kind, edits in hooks.items()}
    norm = model.part(layer, layout.attention_norm) if layout.attention_norm else None
    names: dict[Kind, str] = {"queries": layout.queries, "keys": layout.keys, "values": layout.values}
    for path in dict.fromkeys(names[kind] for kind in edited):
        projection = model.part(layer, path)
        extra: dict[Kind, Tensor] = {
            kind: projection(x if norm is None else norm(x))
            for kind, x in edited.items()
            if names[kind] == path and x is not entry
        }
        output = projection.output
        if extra:
            output = output.clone()
            for kind, other in extra.items():
                index = model.projection_index(kind)
                output[..., index] = other[..., index]
            projection.output = output


def _chain(x: Float[Tensor, "*tokens d"], edits: SiteFunctions) -> Tensor:
    for site, edit in edits:
        before = x
        x = edit(x)
        if x.shape != before.shape:
            raise InputError(
                f"the function at {site} returned shape {tuple(x.shape)} for {tuple(before.shape)}"
            )
    return x


def _rewrite(model: Transformer, module: Any, edits: SiteFunctions, factor: float = 1.0) -> None:
    """Apply edits to what a module adds, which is `factor` times its output."""
    output = module.output
    x = output[0] if isinstance(output, tuple) else output
    x = _chain(x, edits) if factor == 1 else _chain(x * factor, edits) / factor
    if model.layout.traits.in_place:
        x = x.clone()  # so that what an edit keeps is not changed afterwards
    module.output = (x, *output[1:]) if isinstance(output, tuple) else x
