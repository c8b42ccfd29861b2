"""The layout of language models: the one table of their module names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from spectral_sinks.errors import InputError

FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"}
    | {"olmo2", "phi3", "gpt_oss"}
    | {"bert", "roberta", "modernbert"}
)
"""Model types whose layout is tested; the layout of any other type is checked against a forward pass."""

Fused = Literal["", "blocks", "heads"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Dotted names of a model's modules.

    The first four names and `transform` are relative to the model, the others to a layer.
    """

    layers: str
    """The list of layers."""
    embedding: str
    unembedding: str
    final_norm: str
    """The norm whose output the unembedding reads."""
    attention: str
    """The module whose second output is the attention weights."""
    mlp: str
    attention_norm: str
    """The norm through which attention reads the residual; empty if it reads the residual itself (OLMo 2)."""
    mlp_norm: str
    attention_write: str
    """The module whose output is added to the residual: attention, or the norm after it (Gemma, OLMo 2)."""
    mlp_write: str
    queries: str
    keys: str
    values: str
    attention_projection: str
    """W_O, whose input is the concatenated outputs of the heads."""
    attention_add_norm: str = ""
    """In a post-norm layer (BERT), the norm of the residual after attention is added to it; otherwise empty.
    """
    mlp_add_norm: str = ""
    """The same norm after the MLP, whose output is the exit of the layer."""
    transform: str = ""
    """In a masked-LM head, the dense layer between the residual stream and the final norm: a name in the
    model.
    """
    fused: Fused = ""
    """How one matrix holds queries, keys and values: in three consecutive `blocks`, or interleaved by
    `heads`.
    """

    @property
    def reads_through(self) -> str:
        """Modules between the residual stream and the unembedding, other than one norm; "" for none."""
        return through(self.transform, self.final_norm) if self.transform else ""


SEARCHED: dict[str, tuple[str, ...]] = {
    "layers": (
        "model.layers",
        "transformer.h",
        "gpt_neox.layers",
        "model.language_model.layers",
        "bert.encoder.layer",
        "roberta.encoder.layer",
    ),
    "final_norm": (
        "model.norm",
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.language_model.norm",
        "cls.predictions.transform.LayerNorm",
        "lm_head.layer_norm",
        "head.norm",
    ),
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp",),
    "attention_norm": ("input_layernorm", "ln_1", "attn_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "mlp_norm"),
    "attention_projection": ("o_proj", "c_proj", "dense", "Wo"),
}

POST_NORM = {
    "attention": "attention.self",
    "mlp": "intermediate",
    "attention_norm": "",
    "mlp_norm": "",
    "attention_write": "attention.output.dense",
    "mlp_write": "output.dense",
    "queries": "attention.self.query",
    "keys": "attention.self.key",
    "values": "attention.self.value",
    "attention_projection": "attention.output.dense",
    "attention_add_norm": "attention.output.LayerNorm",
    "mlp_add_norm": "output.LayerNorm",
}
"""Layout of a layer of BERT and RoBERTa, where the output of each component is added to the residual and the
sum passes a norm.
"""

TRANSFORMS = {"cls.predictions.transform.dense": "", "lm_head.dense": "", "head.dense": "model.final_norm, "}
"""The dense layer of a masked-LM head, and the modules before it."""

PROJECTIONS: tuple[tuple[tuple[str, ...], Fused], ...] = (
    (("q_proj", "k_proj", "v_proj"), ""),
    (("c_attn",) * 3, "blocks"),
    (("qkv_proj",) * 3, "blocks"),
    (("query_key_value",) * 3, "heads"),
    (("Wqkv",) * 3, "blocks"),
)

OF_MODEL = ("layers", "embedding", "unembedding", "final_norm", "transform")
"""Names that are relative to the model; the others are relative to a layer."""


SHIFTED = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm"})
"""Model types whose position ids start after the id of the padding token."""


def context_of(config: Any) -> int | None:
    """Return the longest window in tokens according to a configuration; None if it does not say."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest - config.pad_token_id - 1 if longest and config.model_type in SHIFTED else longest


def through(transform: str, final_norm: str) -> str:
    """Describe the modules of a masked-LM head before its unembedding, for reports."""
    return f"{TRANSFORMS.get(transform, '')}{transform}, an activation and {final_norm}"


def find_layout(model: nn.Module, given: Mapping[str, str] | None = None) -> Layout:
    """Find the layout of a transformers model; `given` names modules by hand.

    Raises InputError for a module that is not found, with a message that says how to name it.
    """
    given = dict(given or {})
    known = {field.name for field in fields(Layout)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"no part is called {', '.join(unknown)}; parts: {', '.join(sorted(known))}")
    for part in OF_MODEL:
        if part in given:
            submodule(model, given[part], part)

    # names in the model
    found: dict[str, Any] = {
        part: given.get(part) or first(model, part, SEARCHED[part]) for part in ("layers", "final_norm")
    }
    for part, module in (
        ("embedding", model.get_input_embeddings()),  # pyright: ignore[reportCallIssue]
        ("unembedding", model.get_output_embeddings()),  # pyright: ignore[reportCallIssue]
    ):
        found[part] = given.get(part) or _name_of(model, module, part)

    layers = submodule(model, found["layers"], "layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise InputError(f"{found['layers']} is not a list of layers; name it by parts={{'layers': '...'}}")
    # names in a layer: norms, and the modules that write to the residual
    layer = layers[0]
    if has(layer, POST_NORM["attention_add_norm"]):
        given = POST_NORM | given
    for part in ("attention_add_norm", "mlp_add_norm"):
        found[part] = given.get(part, "")
    found["transform"] = given.get("transform", next((name for name in TRANSFORMS if has(model, name)), ""))
    post_normed = hasattr(layer, "post_feedforward_layernorm")
    for part in ("attention", "mlp"):
        found[part] = given.get(part) or first(layer, part, SEARCHED[part])
    bare = post_normed and not hasattr(layer, "pre_feedforward_layernorm")  # OLMo 2: norms only after
    for part in ("attention_norm", "mlp_norm"):
        if part in given:
            found[part] = given[part]
        else:
            found[part] = "" if bare else first(layer, part, SEARCHED[part])
    found["attention_write"] = given.get("attention_write") or (
        "post_attention_layernorm" if post_normed else found["attention"]
    )
    found["mlp_write"] = given.get("mlp_write") or (
        "post_feedforward_layernorm" if post_normed else found["mlp"]
    )

    # names in attention: its projections, fused or separate
    attention = submodule(layer, found["attention"], "attention")
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
    found["attention_projection"] = given.get("attention_projection") or prefix + first(
        attention, "attention_projection", SEARCHED["attention_projection"], prefix
    )
    if given.get("fused") in ("blocks", "heads"):
        fused = "blocks" if given["fused"] == "blocks" else "heads"
    for part in set(given) - {*OF_MODEL, "fused"}:
        submodule(layer, given[part], part)
    return Layout(fused=fused, **{part: name for part, name in found.items() if part != "fused"})


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has a submodule of that dotted name."""
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def first(module: nn.Module, part: str, names: tuple[str, ...], prefix: str = "") -> str:
    """Return the first of some names that a module has; raises InputError if it has none of them."""
    for name in names:
        if has(module, name):
            return name
    raise InputError(_missing(part, list(names), prefix))


def _missing(part: str, tried: list[str], prefix: str = "") -> str:
    tried = [prefix + name for name in dict.fromkeys(tried)]
    return (
        f"the {part.replace('_', ' ')} of this model was not found (tried {', '.join(tried)}); "
        f"name it by hand: load(model, parts={{{part!r}: 'dotted.name'}})"
    )


def submodule(module: nn.Module, name: str, part: str) -> nn.Module:
    """Return a submodule that was named by hand; raises InputError if it does not exist."""
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the {part.replace('_', ' ')} was named {name!r}, which does not exist") from error


def _name_of(model: nn.Module, module: nn.Module | None, part: str) -> str:
    for name, candidate in model.named_modules():
        if candidate is module and name:
            return name
    raise InputError(_missing(part, [f"get_{'input' if part == 'embedding' else 'output'}_embeddings()"]))
