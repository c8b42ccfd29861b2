"""A short pass of a model, which shows what the names of its modules do not say, or contradicts them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_capture import AttentionCall, attending, can_attend
from spectral_sinks.models.attention_sdpa import whole_maps
from spectral_sinks.models.layout import SEARCHED, Fused, Layout, Traits, has, missing

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer
    from spectral_sinks.models.language import LanguageModel

TOKENS = 5
"""Length of the pass."""

PLACE = 2
"""The token at which queries, keys or values are changed, to see which of them a projection makes."""

SIZES = (4.0, 0.3, 30.0)
"""Sizes of the change, relative to the outputs; under a steep softmax, one alone may show nothing."""

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "Wo", "fc2", "fc_out", "out_proj", "w2", "wo")
"""Names of the last matrix of an MLP."""

Which = Literal["queries", "keys", "values"]


@dataclass
class Call:
    """What a module received and returned last, as it was then, and how often it was called."""

    given: Any = None
    output: Any = None
    """The output, or the first of several."""
    returned: Any = None
    """What was returned, which the model may have changed in place afterwards."""
    count: int = 0


class _Enough(Exception):
    pass


@contextmanager
def watched(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Call]]:
    """Inside the block, keep what the modules of these names receive and return."""
    seen = {path: Call() for path in paths}
    handles: list[Any] = []

    def before(call: Call) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = (x for x in (*given, named.get("hidden_states"), *named.values()) if torch.is_tensor(x))
            call.given = next((x.detach().clone() for x in tensors), None)

        return keep

    def after(call: Call) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            call.returned, call.count = output, call.count + 1
            first = output[0] if isinstance(output, tuple) else output
            call.output = first.detach().clone() if torch.is_tensor(first) else None

        return keep

    for path, call in seen.items():
        part = module.get_submodule(path)
        handles.append(part.register_forward_pre_hook(before(call), with_kwargs=True))
        handles.append(part.register_forward_hook(after(call)))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_traits(model: "LanguageModel", given: Mapping[str, str] | None = None) -> Layout:
    """Run a few tokens, and return the layout with its traits, and with the modules that the pass confirms.

    `given` names the parts that were named by hand, which stay as they are. Raises InputError for a model
    whose logits or residual stream are not read as they are, and for parts named by hand that do not add up.
    """
    return _Pass(model, dict(given or {})).layout()


def check_sums(model: "Transformer", run: Callable[[], object]) -> None:
    """Raise InputError unless each layer of an encoder adds what attention and MLP wrote to its entry."""
    layout = model.layout
    names = [f"{layout.layers}.{index}" for index in range(model.layers)]
    inside = ("", f".{layout.attention_write}", f".{layout.mlp_write}")
    with watched(model.module, [name + part for name in names for part in inside]) as seen:
        run()
    for index, name in enumerate(names):
        layer, *written = (seen[name + part] for part in inside)
        if not _added(layer.given, layer.output, [call.output for call in written], 1.0):
            raise InputError(_no_sum(f"{model.name} ({model.family})", index, layout))


def _no_sum(title: str, layer: int, layout: Layout) -> str:
    return (
        f"{title}: layer {layer} is not entry + attention + MLP with the parts {layout.attention_write!r} "
        f"and {layout.mlp_write!r}; name them by hand: load(model, parts={{'attention_write': ..., "
        "'mlp_write': ...})"
    )


class _Pass:
    """The pass of `find_traits`, and what can be read from it."""

    def __init__(self, model: "LanguageModel", given: dict[str, str]) -> None:
        self.model, self.given, self.old = model, given, model.layout
        self.lacking: dict[str, str] = {}
        self.names = [f"{self.old.layers}.{index}" for index in range(model.layers)]
        ids = torch.arange(TOKENS, device=model.device)[None] % model.vocabulary
        options = {"use_cache": False} if model.causal else {}
        self.run = lambda: model.module(input_ids=ids, **options)
        paths = [self.old.final_norm, *self.names]
        for name in self.names:
            inside = [self.old.attention, self.old.attention_norm, self.old.mlp, self.old.mlp_norm]
            inside += [self.old.queries, self.old.keys, self.old.values]
            inside += [*self._writers("attention"), *self._writers("mlp")]
            block = model.module.get_submodule(name)
            paths += [f"{name}.{part}" for part in dict.fromkeys(inside) if part and has(block, part)]
        with watched(model.module, paths) as self.seen:
            self.logits = self.run().logits.float()

    def layout(self) -> Layout:
        factor = self._logit_factor()
        outputs = self._residual_stream()
        writes, write_factor = self._sums()
        self._heads()
        fused = self._reading(writes["attention_write"])
        self._interface()
        in_place = any(self._changed(path) for path in self.seen)
        traits = Traits(
            outputs=outputs,
            reused_norm=self.seen[self.old.final_norm].count > 1,
            logit_factor=factor,
            write_factor=write_factor,
            in_place=in_place,
            lacking=self.lacking,
        )
        return replace(self.old, fused=fused, traits=traits, **writes)

    @property
    def _title(self) -> str:
        return f"{self.model.name} ({self.model.family})"

    def _at(self, layer: int, path: str) -> Call | None:
        call = self.seen.get(f"{self.names[layer]}.{path}")
        return call if call is not None and call.count else None

    def _changed(self, path: str) -> bool:
        call = self.seen[path]
        returned = call.returned[0] if isinstance(call.returned, tuple) else call.returned
        return torch.is_tensor(returned) and not torch.equal(returned, call.output)

    # the two ends of the residual stream

    def _logit_factor(self) -> float:
        """Return the factor between the output of the unembedding and the logits."""
        model, final = self.model, self.seen[self.old.final_norm].output
        if isinstance(final, Tensor) and final.shape[-1] == model.d:
            with torch.no_grad():
                head = model.module.get_submodule(self.old.unembedding).forward(final).float()
            for factor in _logit_factors(model.config):
                if _near(model.capped(factor * head), self.logits, 2e-2):
                    return factor
        raise InputError(
            f"{self._title}: logits are not unembedding(final norm), nor that times a factor of its "
            "configuration; its NLL would be wrong"
        )

    def _residual_stream(self) -> int:
        """Check that every layer reads what the one before returned; return how many values they return."""
        calls = [self.seen[name] for name in self.names]
        shape = (1, TOKENS, self.model.d)
        for index, call in enumerate(calls):
            before = call.given if index == 0 else calls[index - 1].output
            whole = all(isinstance(x, Tensor) and x.shape == shape for x in (call.given, call.output))
            if not whole or not _near(call.given, before):
                raise InputError(
                    f"{self._title} does not pass one residual stream from layer to layer: layer {index} "
                    "reads or returns something else, and this package measures a residual stream"
                )
        final = self.seen[self.old.final_norm].output
        if not self.old.transform:
            with torch.no_grad():
                norm = self.model.module.get_submodule(self.old.final_norm)
                again = norm.forward(calls[-1].output.to(self.seen[self.old.final_norm].given))
            if not _near(again, final):
                raise InputError(
                    f"{self._title}: the final norm {self.old.final_norm!r} does not read what the last "
                    "layer returns; name it by hand: load(model, parts={'final_norm': 'dotted.name'})"
                )
        lengths = {len(c.returned) if isinstance(c.returned, tuple) else 0 for c in calls}
        if len(lengths) > 1:
            raise InputError(
                f"{self._title}: the layers return different numbers of values, {sorted(lengths)}"
            )
        return lengths.pop()

    # what attention and MLP add

    def _writers(self, part: Literal["attention", "mlp"]) -> list[str]:
        """Return the modules whose output may be what a part adds, likeliest first."""
        old = self.old
        if part == "attention":
            own, inside = old.attention_write, (old.attention, old.attention_projection)
        else:
            own, inside = old.mlp_write, (old.mlp, *(f"{old.mlp}.{name}" for name in DOWN))
        return (
            [own]
            if f"{part}_write" in self.given or old.attention_add_norm
            else [*dict.fromkeys((own, *inside))]
        )

    def _sums(self) -> tuple[dict[str, str], float]:
        """Return the modules whose outputs are added, and the factor that they are added with."""
        writers = {part: self._writers(part) for part in ("attention", "mlp")}
        for factor in _write_factors(self.model.config, self.model.layers):
            for attention in writers["attention"]:
                for mlp in writers["mlp"]:
                    if all(self._adds_up(i, attention, mlp, factor) for i in range(self.model.layers)):
                        return {"attention_write": attention, "mlp_write": mlp}, factor
        old = self.old
        if {"attention_write", "mlp_write"} & set(self.given) or old.attention_add_norm:
            wrong = next(
                i
                for i in range(self.model.layers)
                if not self._adds_up(i, old.attention_write, old.mlp_write, 1)
            )
            raise InputError(_no_sum(self._title, wrong, old))
        # one of them may still be known, from what lies between them
        found, factors = {"attention_write": old.attention_write, "mlp_write": old.mlp_write}, {1.0}
        for part, kinds in (("attention", ("attention", "head")), ("mlp", ("mlp",))):
            right = [
                (name, factor)
                for factor in _write_factors(self.model.config, self.model.layers)
                for name in writers[part]
                if all(self._adds(i, part, name, factor) for i in range(self.model.layers))
            ]
            if right and (factors == {1.0} or right[0][1] in factors):
                found[f"{part}_write"] = right[0][0]
                factors = {right[0][1]}
                continue
            does = "its attention" if part == "attention" else "its MLP"
            for kind in kinds:
                self.lacking[kind] = f"what {does} adds to the residual stream is not the output of a module"
        return found, factors.pop()

    def _adds_up(self, layer: int, attention: str, mlp: str, factor: float) -> bool:
        """Whether the exit of a layer is its entry plus what attention and MLP wrote.

        A layer of another kind than attention is right if its MLP is.
        """
        call, old = self.seen[self.names[layer]], self.old
        first, second = self._at(layer, attention), self._at(layer, mlp)
        block = self.model.module.get_submodule(self.names[layer])
        if old.attention_add_norm and first is not None and second is not None:
            total = normed(block, old.attention_add_norm, call.given + first.output)
            total = normed(block, old.mlp_add_norm, total + second.output)
            return _near(total, call.output)
        if first is None:
            attends = layer in self.model.attention_layers
            return not attends and self._adds(layer, "mlp", mlp, factor)
        if second is None:
            return not has(block, old.mlp) and _added(call.given, call.output, [first.output], factor)
        return _added(call.given, call.output, [first.output, second.output], factor)

    def _adds(self, layer: int, part: str, name: str, factor: float) -> bool:
        """Whether a part's output is what is added before, or after, the norm between attention and MLP."""
        between = self._at(layer, self.old.mlp_norm) if self.old.mlp_norm != self.old.attention_norm else None
        found, call = self._at(layer, name), self.seen[self.names[layer]]
        if found is None:
            whole = self.old.attention if part == "attention" else self.old.mlp
            return not has(self.model.module.get_submodule(self.names[layer]), whole)
        if between is None or _near(between.given.view_as(call.given), call.given, 1e-6):
            return False
        middle = between.given.view_as(call.given)
        ends = (call.given, middle) if part == "attention" else (middle, call.output)
        return _added(*ends, [found.output], factor)

    # what attention and MLP read

    def _heads(self) -> None:
        """Check that all attention layers have the number of heads that the configuration says."""
        counts: set[int] = set()
        for layer in self.model.attention_layers:
            call = self._at(layer, self.old.attention)
            returned = () if call is None else call.returned
            maps = returned[1] if isinstance(returned, tuple) and len(returned) > 1 else None
            if isinstance(maps, Tensor) and maps.ndim == 4:
                counts.add(maps.shape[1])
        if counts - {self.model.heads}:
            self.lacking["heads"] = (
                f"the layers of {self._title} have {', '.join(map(str, sorted(counts)))} heads, where its "
                f"configuration says {self.model.heads}"
            )
            self.lacking["head"] = "its layers have different numbers of heads"

    def _reading(self, attention_write: str) -> Fused:
        """Find out which sites of reading parts are exact, and how a fused matrix is laid out."""
        old, layers = self.old, self.model.attention_layers
        parts: dict[Which, str] = {"queries": old.queries, "keys": old.keys, "values": old.values}
        for which, path in parts.items():
            if not path:
                self.lacking[which] = (
                    f"its {which} come from a matrix that compresses what keys and values share"
                    if which != "queries"
                    else "its queries come from two matrices, or are compressed"
                )
            elif not all(self._reads(layer, path) for layer in layers):
                norm = f"the norm {old.attention_norm!r}" if old.attention_norm else "the residual stream"
                self.lacking[which] = f"{path!r} does not read the output of {norm} in every layer"
        if not old.mlp_norm or old.mlp_norm != old.attention_norm:
            self._mlp_norm(attention_write)
        elif not all(self._reads(layer, old.mlp) for layer in range(len(self.names))):
            if "mlp_norm" not in self.given:
                raise InputError(missing("mlp_norm", list(SEARCHED["mlp_norm"])))
            self.lacking["mlp-input"] = f"{old.mlp!r} does not read the output of {old.mlp_norm!r}"
        if self.lacking.keys() >= set(parts) or not layers:
            return old.fused
        return self._projections([which for which in parts if which not in self.lacking])

    def _reads(self, layer: int, path: str) -> bool:
        """Whether a module of a layer reads the norm before attention, or the residual if there is none."""
        reader = self._at(layer, path)
        source = self._at(layer, self.old.attention_norm) if self.old.attention_norm else None
        read = self.seen[self.names[layer]].given if source is None else source.output
        if reader is None:
            return not has(self.model.module.get_submodule(self.names[layer]), path)
        given = reader.given
        return (
            isinstance(given, Tensor) and given.numel() == read.numel() and _near(given.view_as(read), read)
        )

    def _interface(self) -> None:
        """Check that attention is what its queries, keys and values make of it, up to W_O.

        Families with a gate or a norm before W_O, or with heads that share values in another way, differ.
        """
        model, layers = self.model, self.model.attention_layers
        if not can_attend(model) or model.own_attention is not None or not layers:
            return
        path = f"{self.names[layers[0]]}.{self.old.attention_projection}"
        mixed: list[Tensor] = []

        def look(call: AttentionCall) -> None:
            if call.layer == layers[0]:
                mixed.append(call.output().detach().flatten(2))

        def without(call: AttentionCall) -> AttentionCall | None:
            if call.layer != layers[0]:
                return None
            value = call.value.clone()
            value[:, 0] = 0
            return replace(call, value=value)

        try:
            with watched(model.module, [path]) as plain, attending(model, look):
                logits = self.run().logits.float()
            with watched(model.module, [path]) as changed, attending(model, without):
                self.run()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            self.lacking["attending"] = (
                f"its attention does not run through transformers' interface ({error})"
            )
            return
        if not mixed:
            self.lacking["attending"] = "its attention does not run through transformers' interface"
            return
        if not _near(logits, self.logits, 2e-2):
            self.lacking["attending"] = (
                "its attention is not the softmax of the queries and keys that are seen"
            )
            return
        given = plain[path].given
        if (
            len(mixed) != 1
            or given.numel() != mixed[0].numel()
            or not _near(given.view_as(mixed[0]), mixed[0])
        ):
            self.lacking["written"] = "its attention passes a gate or a norm before W_O"
        # without the first value head, its query heads alone write something else
        if "head" not in self.lacking and given.shape[-1] % model.heads == 0:
            change = (changed[path].given - given).float().norm(dim=tuple(range(given.ndim - 1)))
            by_head = change.view(model.heads, -1).norm(dim=-1)
            own = by_head[: model.heads // model.key_heads].square().sum()
            if own < 0.5 * by_head.square().sum() or bool(
                (by_head[: model.heads // model.key_heads] == 0).any()
            ):
                self.lacking["head"] = (
                    "its heads share what W_O reads in another way than one after the other"
                )

    def _mlp_norm(self, attention_write: str) -> None:
        """Check that the norm before the MLP reads the residual stream after attention, or beside it."""
        for layer, name in enumerate(self.names):
            norm, call = self._at(layer, self.old.mlp_norm or self.old.mlp), self.seen[name]
            if norm is None or self.old.attention_add_norm:
                continue
            wrote, why = self._at(layer, attention_write), ""
            if norm.given.numel() != call.given.numel():
                why = "does not read the residual stream"
            elif wrote is not None and "attention" not in self.lacking:
                given = norm.given.view_as(call.given)
                factors = (0.0, *_write_factors(self.model.config, self.model.layers))
                if not any(_added(call.given, given, [wrote.output], factor) for factor in factors):
                    why = "does not read the residual stream after attention"
            if why:
                self.lacking["mlp-input"] = f"{self.old.mlp_norm or self.old.mlp!r} {why}"

    def _projections(self, named: list[Which]) -> Fused:
        """Return the layout of a fused matrix by which a change of each part acts on attention as it should.

        Changed queries change one row of the map, keys one column and the rows after it, values nothing.
        """
        old = self.old
        candidates: list[Fused] = [old.fused]
        if old.fused:
            candidates += [kind for kind in get_args(Fused) if kind not in ("", old.fused)]
        with whole_maps(self.model) if self.model.own_attention is None else nullcontext():
            plain = self._map(None, old.fused)
            if plain is None:
                if old.fused and not self.model.tested:
                    self.lacking |= dict.fromkeys(
                        named, "its attention returns no weights, by which its fused matrix could be checked"
                    )
                return old.fused
            for kind in candidates:
                if all(self._acts_as(which, kind, plain) for which in named):
                    return kind
        for which in named:
            self.lacking[which] = (
                "a change of what was taken for its queries, keys or values does not act on its attention as "
                "one of these should"
            )
        return old.fused

    def _map(self, which: Which | None, fused: Fused, size: float = 1.0) -> Tensor | None:
        """Return the map of the first attention layer, in which one part is changed at one token."""
        layer = self.names[self.model.attention_layers[0]]
        found: list[Any] = []
        handles: list[Any] = []

        def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            assert which is not None
            index = replace(self.model, layout=replace(self.old, fused=fused)).projection_index(which)
            changed = output.clone()
            rows = changed.view(1, TOKENS, -1)
            noise = torch.randn(rows[0, PLACE, index].shape, generator=torch.Generator().manual_seed(0))
            rows[0, PLACE, index] += (size * (float(rows.float().std()) + 0.1) * noise).to(rows)
            return changed

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[1] if isinstance(output, tuple) and len(output) > 1 else None)
            raise _Enough

        block = self.model.module.get_submodule(layer)
        if which is not None:
            path = {"queries": self.old.queries, "keys": self.old.keys, "values": self.old.values}[which]
            handles.append(block.get_submodule(path).register_forward_hook(change))
        handles.append(block.get_submodule(self.old.attention).register_forward_hook(keep))
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

    def _acts_as(self, which: Which, fused: Fused, plain: Tensor) -> bool:
        rows = torch.zeros(TOKENS, dtype=torch.bool)  # which queries attend otherwise
        for size in SIZES:
            try:
                changed = self._map(which, fused, size)
            except (IndexError, RuntimeError):  # columns that the matrix does not have
                return False
            if changed is None:
                return False
            rows |= ((changed - plain).abs().amax((0, 1, 3)) > 1e-4).cpu()
            if which == "values" or bool(rows.any()):
                break
        own = torch.arange(TOKENS) == PLACE
        if which == "queries":
            return bool((rows & own).any()) and not bool((rows & ~own).any())
        if which == "keys":
            before = torch.arange(TOKENS) < (PLACE if self.model.causal else 0)
            return bool((rows & ~own).any()) and not bool((rows & before).any())
        return not bool(rows.any())


@torch.no_grad()
def normed(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return the output of a layer's norm, or the input where the layer has no such norm."""
    return layer.get_submodule(name).forward(x) if name else x


def _near(one: Tensor, other: Tensor, share: float = 1e-2) -> bool:
    """Whether two tensors differ by at most a share of their largest entry."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float().to(one.device)
    return bool((one - other).abs().max() <= share * other.abs().max() + 1e-12)


def _added(before: Tensor, after: Tensor, written: list[Tensor], factor: float) -> bool:
    """Whether two points of the residual stream differ by what was written, up to rounding.

    A few coordinates of a residual stream can be very large, so the difference is compared with what was
    written, and not with the residual stream.
    """
    if any(x.numel() != before.numel() for x in written):
        return False
    total = factor * torch.stack([x.view_as(before).to(before.device).float() for x in written]).sum(0)
    rounding = 4 * torch.finfo(before.dtype).eps * (before.abs().float() + after.abs().float() + total.abs())
    error = (after.float() - before.float() - total).abs()
    return bool((error <= 1e-2 * total.abs().max() + rounding).all())


def _logit_factors(config: Any) -> Iterator[float]:
    """Yield the factors by which families of transformers multiply their logits."""
    yield 1.0
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), int | float) and value:
            yield float(value)
            yield 1 / value
    base = getattr(config, "dim_model_base", None)  # MiniCPM
    if base:
        yield base / config.hidden_size


def _write_factors(config: Any, layers: int) -> Iterator[float]:
    """Yield the factors by which families of transformers multiply what they add."""
    yield 1.0
    if isinstance(value := getattr(config, "residual_multiplier", None), int | float) and value:
        yield float(value)
    if isinstance(value := getattr(config, "scale_depth", None), int | float) and value:
        yield value / math.sqrt(layers)
