"""Where a causal language model keeps its parts: the one table of module names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from spectral_sinks.errors import InputError

FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"}
    | {"olmo2", "phi3", "gpt_oss"}
)
"""Model types whose layout is tested; for any other the layout is checked against a forward pass."""

Fused = Literal["", "blocks", "heads"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Dotted names of a model's parts; all but the first four are names inside a layer."""

    layers: str
    """The list of blocks."""
    embedding: str
    unembedding: str
    final_norm: str
    attention: str
    mlp: str
    attention_norm: str
    """What attention reads through; empty where it reads the residual itself (OLMo 2)."""
    mlp_norm: str
    attention_write: str
    """The module whose output is added to the residual: attention, or the norm after it (Gemma, OLMo 2)."""
    mlp_write: str
    queries: str
    keys: str
    values: str
    attention_projection: str
    """W_O: its input is the output of the heads, side by side."""
    fused: Fused = ""
    """How one matrix holds queries, keys and values: `blocks` one after the other, or by `heads`."""


SEARCHED: dict[str, tuple[str, ...]] = {
    "layers": ("model.layers", "transformer.h", "gpt_neox.layers", "model.language_model.layers"),
    "final_norm": (
        "model.norm",
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.language_model.norm",
    ),
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp",),
    "attention_norm": ("input_layernorm", "ln_1"),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"),
    "attention_projection": ("o_proj", "c_proj", "dense"),
}

PROJECTIONS: tuple[tuple[tuple[str, ...], Fused], ...] = (
    (("q_proj", "k_proj", "v_proj"), ""),
    (("c_attn",) * 3, "blocks"),
    (("qkv_proj",) * 3, "blocks"),
    (("query_key_value",) * 3, "heads"),
)


def find_layout(model: nn.Module, given: Mapping[str, str] | None = None) -> Layout:
    """The layout of a transformers model; `given` names parts by hand.

    Raises InputError that says which part was not found and how to name it.
    """
    given = dict(given or {})
    known = {field.name for field in fields(Layout)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"no part is called {', '.join(unknown)}; parts: {', '.join(sorted(known))}")
    for part in ("layers", "embedding", "unembedding", "final_norm"):
        if part in given:
            _get(model, given[part], part)

    found: dict[str, Any] = {
        part: given.get(part) or _first(model, part, SEARCHED[part]) for part in ("layers", "final_norm")
    }
    for part, module in (
        ("embedding", model.get_input_embeddings()),  # pyright: ignore[reportCallIssue]
        ("unembedding", model.get_output_embeddings()),  # pyright: ignore[reportCallIssue]
    ):
        found[part] = given.get(part) or _name_of(model, module, part)

    layers = _get(model, found["layers"], "layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise InputError(f"{found['layers']} is not a list of layers; name it by parts={{'layers': '...'}}")
    layer = layers[0]
    post_normed = hasattr(layer, "post_feedforward_layernorm")
    for part in ("attention", "mlp"):
        found[part] = given.get(part) or _first(layer, part, SEARCHED[part])
    bare = post_normed and not hasattr(layer, "pre_feedforward_layernorm")  # OLMo 2: norms only after
    for part in ("attention_norm", "mlp_norm"):
        found[part] = given.get(part, "" if bare else None) or (
            "" if bare else _first(layer, part, SEARCHED[part])
        )
    found["attention_write"] = given.get("attention_write") or (
        "post_attention_layernorm" if post_normed else found["attention"]
    )
    found["mlp_write"] = given.get("mlp_write") or (
        "post_feedforward_layernorm" if post_normed else found["mlp"]
    )

    attention = _get(layer, found["attention"], "attention")
    prefix = found["attention"] + "."
    fused: Fused = ""
    for names, kind in PROJECTIONS:
        if all(hasattr(attention, name) for name in names):
            found |= {p: prefix + n for p, n in zip(("queries", "keys", "values"), names, strict=True)}
            fused = kind
            break
    for part in ("queries", "keys", "values"):
        if part in given:
            found[part] = given[part]
        elif part not in found:
            raise InputError(_missing(part, [n for names, _ in PROJECTIONS for n in names], prefix))
    found["attention_projection"] = given.get("attention_projection") or prefix + _first(
        attention, "attention_projection", SEARCHED["attention_projection"], prefix
    )
    if given.get("fused") in ("blocks", "heads"):
        fused = "blocks" if given["fused"] == "blocks" else "heads"
    for part in set(given) - {"layers", "embedding", "unembedding", "final_norm", "fused"}:
        _get(layer, given[part], part)
    return Layout(fused=fused, **{part: name for part, name in found.items() if part != "fused"})


def _first(module: nn.Module, part: str, names: tuple[str, ...], prefix: str = "") -> str:
    for name in names:
        try:
            module.get_submodule(name)
        except AttributeError:
            continue
        return name
    raise InputError(_missing(part, list(names), prefix))


def _missing(part: str, tried: list[str], prefix: str = "") -> str:
    tried = [prefix + name for name in dict.fromkeys(tried)]
    return (
        f"the {part.replace('_', ' ')} of this model was not found (tried {', '.join(tried)}); "
        f"name it by hand: load(model, parts={{{part!r}: 'dotted.name'}})"
    )


def _get(module: nn.Module, name: str, part: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the {part.replace('_', ' ')} was named {name!r}, which is not there") from error


def _name_of(model: nn.Module, module: nn.Module | None, part: str) -> str:
    for name, candidate in model.named_modules():
        if candidate is module and name:
            return name
    raise InputError(_missing(part, [f"get_{'input' if part == 'embedding' else 'output'}_embeddings()"]))
