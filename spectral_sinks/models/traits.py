"""A short pass of a model, which shows what the names of its modules do not say, or contradicts them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.attention_capture import AttentionCall, attending, can_attend
from spectral_sinks.models.fused_projections import Which, find_fused
from spectral_sinks.models.gates import attending_gates
from spectral_sinks.models.layout import SEARCHED, Fused, Layout, Traits, has, missing

if TYPE_CHECKING:
    from spectral_sinks.models.base import Transformer
    from spectral_sinks.models.language import LanguageModel

TOKENS = 5
"""Length of the pass."""

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "Wo", "fc2", "fc_out", "out_proj", "w2", "wo")
"""Names of the last matrix of an MLP."""


@dataclass
class Call:
    """What a module received and returned last, as it was then, and how often it was called."""

    given: Any = None
    output: Any = None
    """The output, or the first of several."""
    returned: Any = None
    """What was returned, which the model may have changed in place afterwards."""
    count: int = 0


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
        self.eager_maps, self.gated = True, False
        self.names = [f"{self.old.layers}.{index}" for index in range(model.layers)]
        ids = torch.arange(TOKENS, device=model.device)[None] % model.vocabulary
        options = {"use_cache": False} if model.causal else {}
        self.run = lambda: model.module(input_ids=ids, **options)
        paths = [*filter(None, [self.old.final_norm]), *self.names]
        for name in self.names:
            inside = [self.old.attention, self.old.attention_norm, self.old.mlp, self.old.mlp_norm]
            inside += [self.old.queries, self.old.keys, self.old.values]
            inside += [*self._writers("attention"), *self._writers("mlp")]
            block = model.module.get_submodule(name)
            paths += [f"{name}.{part}" for part in dict.fromkeys(inside) if part and has(block, part)]
        with watched(model.module, paths) as self.seen:
            try:
                self.logits = self._result().float()
            except Exception as error:  # of any kind, from the code of a family
                raise InputError(
                    f"{self._title} does not run on {TOKENS} tokens in transformers itself ({brief(error)}): "
                    "check its configuration"
                ) from error

    def layout(self) -> Layout:
        factor = self._logit_factor()
        outputs = self._residual_stream()
        writes, write_factor = self._sums()
        self._heads()
        fused = self._reading(writes["attention_write"])
        self._interface(writes["attention_write"])
        in_place = any(self._changed(path) for path in self.seen)
        traits = Traits(
            outputs=outputs,
            reused_norm=bool(self.old.final_norm) and self.seen[self.old.final_norm].count > 1,
            logit_factor=factor,
            write_factor=write_factor,
            in_place=in_place,
            eager_maps=self.eager_maps,
            gated=self.gated,
            lacking=self.lacking,
        )
        return replace(self.old, fused=fused, traits=traits, **writes)

    def _result(self) -> Tensor:
        """Run the pass, and return its logits, or the last residual stream of a model without a head."""
        found: Any = self.run()
        return found.logits if self.model.has_head else found.last_hidden_state

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
        """Return the factor between the output of the unembedding and the logits; 1 without a head."""
        model = self.model
        end = self.old.final_norm or self.names[-1]
        final = self.seen[end].output
        if not model.has_head:
            if isinstance(final, Tensor) and _near(final.float(), self.logits):
                return 1.0
            raise InputError(f"{self._title}: its output is not that of {end!r}, so its end is not known")
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
        if self.old.final_norm and not self.old.transform:
            final = self.seen[self.old.final_norm].output
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
            inside = (old.attention, old.attention_projection or old.attention)
            own = old.attention_write
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
        if not self.old.attention_projection:
            self.lacking["head"] = (
                "no module was found that is W_O and reads what its heads have mixed; if there is one, "
                "load(model, parts={'attention_projection': 'dotted.name'}) names it"
            )

    def _reading(self, attention_write: str) -> Fused:
        """Find out which sites of reading parts are exact, and how a fused matrix is laid out."""
        old, layers = self.old, self.model.attention_layers
        parts: dict[Which, str] = {"queries": old.queries, "keys": old.keys, "values": old.values}
        for which, path in parts.items():
            if not path:
                self.lacking[which] = (
                    f"its {which} come from a matrix that keys and values share"
                    if which != "queries"
                    else "its queries are not what one matrix makes of the residual stream"
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
        named: list[Which] = [which for which in parts if which not in self.lacking]
        fused, why = find_fused(self.model, self.run, TOKENS, named)
        if why:
            self.lacking |= dict.fromkeys(named, why)
        return fused

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

    def _interface(self, attention_write: str) -> None:
        """Check that attention is what its queries, keys and values make of it, up to W_O.

        Families with a gate or a norm before W_O, or with heads that share values in another way, differ.
        """
        model, layers = self.model, self.model.attention_layers
        if not can_attend(model) or model.own_attention is not None or not layers:
            return
        ends = [f"{self.names[i]}.{self.old.attention_projection or self.old.attention}" for i in layers]
        calls: list[AttentionCall] = []

        def without(call: AttentionCall) -> AttentionCall | None:
            if call.layer != layers[0]:
                return None
            value = call.value.clone()
            value[:, 0] = 0
            return replace(call, value=value)

        try:
            with watched(model.module, ends) as plain, attending(model, calls.append):
                logits = self._result().float()
            with watched(model.module, ends[:1]) as changed, attending(model, without):
                self.run()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            self.lacking["attending"] = (
                f"its attention does not run through transformers' interface ({brief(error)})"
            )
            return
        if not calls:
            self.lacking["attending"] = "its attention does not run through transformers' interface"
            return
        if not _near(logits, self.logits, 2e-2):
            self.lacking["attending"] = (
                "its attention is not the softmax of the queries and keys that are seen"
            )
            return
        returned = self.seen[f"{self.names[layers[0]]}.{self.old.attention}"].returned
        own = returned[1] if isinstance(returned, tuple) and len(returned) > 1 else None
        with torch.no_grad():
            maps, mixed = calls[0].weights(), [call.output().flatten(2) for call in calls]
        if isinstance(own, Tensor) and own.shape == maps.shape:
            self.eager_maps = _near(own, maps)
        if not self.old.attention_projection:
            return
        given = [plain[path].given for path in ends]
        if any(x is None for x in given):
            self.lacking["written"] = "W_O does not run in every layer"
            return
        if len(mixed) != len(ends) or any(x.numel() != y.numel() for x, y in zip(given, mixed, strict=True)):
            self.lacking["written"] = "W_O does not read what its heads mix alone"
        elif not all(_near(x.view_as(y), y) for x, y in zip(given, mixed, strict=True)):
            self._gates(ends, mixed)
        if attention_write != self.old.attention_projection and not all(
            self._returns(layer, plain[path].output) for layer, path in zip(layers, ends, strict=True)
        ):
            self.lacking["written"] = "what W_O returns is not what its attention adds"
        # without the first value head, its query heads alone write something else
        if "head" not in self.lacking and given[0].shape[-1] % model.heads == 0:
            change = (changed[ends[0]].given - given[0]).float().norm(dim=tuple(range(given[0].ndim - 1)))
            by_head = change.view(model.heads, -1).norm(dim=-1)
            first = by_head[: model.heads // model.key_heads]
            if first.square().sum() < 0.5 * by_head.square().sum() or bool((first == 0).any()):
                self.lacking["head"] = (
                    "its heads share what W_O reads in another way than one after the other"
                )

    def _gates(self, ends: list[str], mixed: list[Tensor]) -> None:
        """Find out whether what the heads mix is multiplied by a gate, and by nothing else, before W_O."""
        gates: list[Tensor | None] = []
        more = "its attention passes something other than a gate before W_O, such as a norm"
        try:
            seeing = attending_gates(self.model, lambda call: gates.append(call.gate))
            with watched(self.model.module, ends) as plain, seeing:
                self.run()
        except (RuntimeError, NotImplementedError):  # an operation without a derivative in forward mode
            self.lacking["written"] = more
            return
        for path, y, gate in zip(ends, mixed, gates, strict=True):
            factor = torch.ones_like(y) if gate is None else gate.transpose(1, 2).reshape(y.shape)
            if not _near(plain[path].given.view_as(y), factor * y):
                self.lacking["written"] = more
                return
        self.gated = True

    def _returns(self, layer: int, output: Tensor) -> bool:
        """Whether the attention of a layer returns this."""
        call = self._at(layer, self.old.attention)
        whole = None if call is None else call.output
        return (
            isinstance(whole, Tensor)
            and whole.numel() == output.numel()
            and _near(whole.view_as(output), output)
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
