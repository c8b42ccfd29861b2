"""The layout of language models: the one table of their module names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.encoders import encodes, is_bare
from spectral_sinks.models.tensor_names import TRANSFORMS, through

Fused = Literal["", "blocks", "heads", "groups", "gates"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a pass of the model shows and names do not say; `find_traits` measures it."""

    outputs: int = 0
    """Length of the tuple that a layer returns; 0 if it returns the residual stream itself."""
    reused_norm: bool = False
    """Whether the final norm also acts elsewhere, so that its first output is not the one read (NanoChat)."""
    logit_factor: float = 1.0
    """Factor between the output of the unembedding and the logits, before a soft cap (Cohere, Granite)."""
    write_factor: float = 1.0
    """Factor between the output of attention or MLP and what is added to the residual stream (Granite)."""
    in_place: bool = False
    """Whether the model changes in place what its modules return, so that a copy must be read (Falcon)."""
    eager_maps: bool = True
    """Whether eager attention returns the weights by which it averages values; it may leave a learned sink
    out of them (Granite with sliding windows).
    """
    gated: bool = False
    """Whether a gate multiplies what heads mix before W_O reads it (Qwen3-Next, AfMoE)."""
    lacking: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kinds of sites that the model does not have, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Dotted names of a model's modules.

    The first four names and `transform` are relative to the model, the others to a layer.
    """

    layers: str
    """The list of layers."""
    embedding: str
    unembedding: str
    """Empty for an encoder without a head over the vocabulary."""
    final_norm: str
    """The norm whose output the unembedding reads; empty for BERT without a head, which has none there."""
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
    """W_O, whose input is the concatenated outputs of the heads; empty if no module is that (JetMoE)."""
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
    `heads`, or by `groups` of query heads that share a key head. With `gates`, the matrix of the queries
    holds each head's queries and then the gate on its output (Qwen3-Next).
    """
    traits: Traits = Traits()

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
        "model.decoder.layers",
        "transformer.blocks",
        "biogpt.layers",
        "gpt_neox_japanese.layers",
        "encoder.layer",
        "layers",
    ),
    "final_norm": (
        "model.norm",
        "transformer.ln_f",
        "gpt_neox.final_layer_norm",
        "model.language_model.norm",
        "cls.predictions.transform.LayerNorm",
        "lm_head.layer_norm",
        "head.norm",
        "lm_head.norm",
        "model.final_layernorm",
        "model.decoder.final_layer_norm",
        "model.embedding_norm",
        "model.layer_norm",
        "model.final_norm",
        "transformer.norm_f",
        "transformer.layernorm",
        "biogpt.layer_norm",
        "gpt_neox_japanese.final_layer_norm",
        "final_norm",
    ),
    "attention": (
        "self_attn",
        "attn.attention",
        "attn",
        "attention",
        "self_attention",
        "multi_head_attention",
        "norm_attn_norm.attn",
        "temporal_block",
        "shared_transformer.self_attn",
        "shared_transf.self_attn",
    ),
    "mlp": (
        "mlp",
        "feed_forward",
        "ffn",
        "block_sparse_moe",
        "shared_mlp",
        "fc1",
        "mlp_block",
        "shared_transformer.feed_forward",
        "shared_transf.feed_forward",
    ),
    "attention_norm": (
        "input_layernorm",
        "ln_1",
        "attn_norm",
        "self_attn_layer_norm",
        "ln_attn",
        "norm_1",
        "attention_layernorm",
        "operator_norm",
        "layernorm1",
        "norm_attn_norm.norm_1",
        "temporal_pre_norm",
        "shared_transformer.input_layernorm",
        "shared_transf.input_layernorm",
    ),
    "mlp_norm": (
        "pre_feedforward_layernorm",
        "pre_mlp_layernorm",
        "post_attention_layernorm",
        "ln_2",
        "mlp_norm",
        "final_layer_norm",
        "ln_mlp",
        "norm_2",
        "feedforward_layernorm",
        "ffn_norm",
        "pre_ff_layernorm",
        "layernorm2",
        "norm_attn_norm.norm_2",
        "channel_pre_norm",
        "shared_transformer.pre_ff_layernorm",
        "shared_transf.pre_ff_layernorm",
    ),
    "attention_projection": ("o_proj", "c_proj", "dense", "Wo", "out_proj"),
}

AFTER: tuple[tuple[str, str], ...] = (
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_attention_layernorm", "post_mlp_layernorm"),
    ("post_norm1", "post_norm2"),
)
"""Norms after attention and after the MLP, whose outputs are added to the residual (GLM-4, Gemma, AfMoE)."""

SHARED_MLP = {"fc1": "fc2"}
"""The matrix of an MLP that writes, by the one that reads, where both lie in the layer itself (OPT)."""

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

PROJECTIONS: tuple[tuple[tuple[str, ...], Fused], ...] = (
    (("q_proj", "k_proj", "v_proj"), ""),
    (("c_attn",) * 3, "blocks"),
    (("qkv_proj",) * 3, "blocks"),
    (("query_key_value",) * 3, "heads"),
    (("Wqkv",) * 3, "blocks"),
    (("Wq", "Wk", "Wv"), ""),
)

COMPRESSED = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_proj")
"""Projections to what keys and values share, instead of matrices of their own (latent attention)."""

OF_MODEL = ("layers", "embedding", "unembedding", "final_norm", "transform")
"""Names that are relative to the model; the others are relative to a layer."""


SHOWN = 8
"""Names that an error lists, of those under which a part was looked for."""


def find_layout(model: nn.Module, given: Mapping[str, str] | None = None) -> Layout:
    """Find the layout of a transformers model; `given` names modules by hand.

    Raises InputError for a module that is not found, with a message that says how to name it.
    """
    given = dict(given or {})
    known = {field.name for field in fields(Layout)} - {"traits"}
    if unknown := sorted(set(given) - known):
        raise InputError(f"no part is called {', '.join(unknown)}; parts: {', '.join(sorted(known))}")
    for part in OF_MODEL:
        if part in given:
            submodule(model, given[part], part)

    # names in the model
    config: Any = model.config
    found: dict[str, Any] = {"layers": given.get("layers") or _layers(model)}
    layers = submodule(model, found["layers"], "layers")
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise InputError(f"{found['layers']} is not a list of layers; name it by parts={{'layers': '...'}}")
    bare = encodes(model) and is_bare(kind.__name__ for kind in type(model).__mro__)
    post_norm = has(layers[0], POST_NORM["attention_add_norm"])
    ends = bare and post_norm  # the exit of the last layer is the output
    found["final_norm"] = given.get("final_norm") or ("" if ends else _final_norm(model, found["layers"]))
    for part, module in (
        ("embedding", model.get_input_embeddings()),  # pyright: ignore[reportCallIssue]
        ("unembedding", model.get_output_embeddings()),  # pyright: ignore[reportCallIssue]
    ):
        absent = bare and part == "unembedding"
        found[part] = given.get(part) or ("" if absent else _name_of(model, module, part))
    found["transform"] = given.get("transform", next((name for name in TRANSFORMS if has(model, name)), ""))

    # names in a layer, the first one that has attention: norms, and the modules that write to the residual
    if post_norm:
        given = POST_NORM | given
    for part in ("attention_add_norm", "mlp_add_norm"):
        found[part] = given.get(part, "")
    layer = _attending(layers, given)
    found["attention"] = given.get("attention") or first(layer, "attention", SEARCHED["attention"])
    found["mlp"] = given.get("mlp") or first(layer, "mlp", SEARCHED["mlp"])
    found |= _norms(layer, given)
    after = next((names for names in AFTER if all(has(layer, name) for name in names)), None)
    writes = (found["attention"], SHARED_MLP.get(found["mlp"], found["mlp"])) if after is None else after
    for part, name in zip(("attention_write", "mlp_write"), writes, strict=True):
        found[part] = given.get(part) or name

    # names in attention: its projections, fused or separate
    attention = submodule(layer, found["attention"], "attention")
    if isinstance(attention, nn.ModuleList):
        raise InputError(
            f"each layer of a {type(model).__name__} has {len(attention)} modules of attention "
            f"({found['attention']!r} is a list), and this package measures layers with one: choose another "
            "model"
        )
    prefix = found["attention"] + "."
    fused: Fused = ""
    for names, kind in PROJECTIONS:
        if all(hasattr(attention, name) for name in names):
            found |= {p: prefix + n for p, n in zip(("queries", "keys", "values"), names, strict=True)}
            fused = kind and _fused(kind, config.get_text_config())
            break
    compressed = any(hasattr(attention, name) for name in COMPRESSED)
    for part in ("queries", "keys", "values"):
        if part in given:
            found[part] = given[part]
        elif part not in found:
            if not compressed:
                raise InputError(missing(part, [n for names, _ in PROJECTIONS for n in names], prefix))
            found[part] = ""
    projection, writers = given.get("attention_projection"), SEARCHED["attention_projection"]
    if not projection and (not compressed or any(has(attention, name) for name in writers)):
        projection = prefix + first(attention, "attention_projection", writers, prefix)
    found["attention_projection"] = projection or ""
    if given.get("fused") in ("blocks", "heads", "groups"):
        fused = given["fused"]  # pyright: ignore[reportAssignmentType]
    for part in set(given) - {*OF_MODEL, "fused"}:
        if given[part]:
            submodule(layer, given[part], part)
    return Layout(fused=fused, **{part: name for part, name in found.items() if part != "fused"})


def _layers(model: nn.Module) -> str:
    """Return the name of the list of layers: one that is known, or the one of the model's decoder."""
    if (name := next((name for name in SEARCHED["layers"] if has(model, name)), None)) is not None:
        return name
    decoder = getattr(model, "get_decoder", lambda: None)()
    for name, part in model.named_modules():
        if part is decoder and name:
            inside = [f"{name}.{own}" for own, held in part.named_children() if _is_stack(held)]
            if len(inside) == 1:
                return inside[0]
    stacks = [name for name, part in model.named_modules() if _is_stack(part)]
    if len(stacks) > 1:
        raise InputError(
            f"the layers of a {type(model).__name__} are in {len(stacks)} lists ({', '.join(stacks[:3])}"
            f"{', ...' if len(stacks) > 3 else ''}), and this package measures one list of layers, each of "
            "which runs once: choose another model"
        )
    raise InputError(missing("layers", list(SEARCHED["layers"])))


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of layers, and not one of a few other modules."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and len(list(module[0].children())) > 1


def _final_norm(model: nn.Module, layers: str) -> str:
    """Return the name of the final norm: one that is known, or the last norm beside the layers."""
    if (name := next((name for name in SEARCHED["final_norm"] if has(model, name)), None)) is not None:
        return name
    path = layers.rpartition(".")[0]
    beside = model.get_submodule(path).named_children()
    norms = [name for name, part in beside if "norm" in type(part).__name__.lower() and "emb" not in name]
    if norms:
        return f"{path}.{norms[-1]}".lstrip(".")
    if not any("norm" in type(part).__name__.lower() for _, part in _outside(model, layers)):
        raise InputError(
            f"{type(model).__name__} with this configuration has no norm between its last layer and its "
            "unembedding, and the spectrum of the unembedding is defined for models that have one: choose "
            "another model"
        )
    raise InputError(missing("final_norm", list(SEARCHED["final_norm"])))


def _outside(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    return ((n, part) for n, part in model.named_modules() if n and not f"{n}.".startswith(f"{layers}."))


def _attending(layers: nn.ModuleList, given: Mapping[str, str]) -> nn.Module:
    """Return the first layer that has attention; in stacks of several kinds it may not be the first.

    Layers of other kinds may hold another module under the same name, without W_O (RecurrentGemma).
    """
    names = (given["attention"],) if given.get("attention") else SEARCHED["attention"]
    found = [layer for layer in layers if any(has(layer, name) for name in names)]
    writes = SEARCHED["attention_projection"]
    full = (x for x in found if any(has(x, f"{name}.{own}") for name in names for own in writes))
    return next(full, found[0] if found else layers[0])


def _norms(layer: nn.Module, given: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the norms before attention and MLP.

    They are empty in a layer that has norms only after both. A layer without a norm of its own before the MLP
    reads it through the one before attention.
    """
    bare = hasattr(layer, "post_feedforward_layernorm") and not hasattr(layer, "pre_feedforward_layernorm")
    found: dict[str, str] = {}
    for part in ("attention_norm", "mlp_norm"):
        if part in given:
            found[part] = given[part]
        elif bare:
            found[part] = ""
        elif part == "mlp_norm":
            # norms that some layers of the class lack are None there, and not modules
            taken = found["attention_norm"]
            names = (n for n in SEARCHED[part] if has(layer, n) and n != taken)
            found[part] = next(names, taken)
        else:
            found[part] = first(layer, part, SEARCHED[part])
    return found


def _fused(kind: Fused, config: Any) -> Fused:
    """Return how one matrix holds queries, keys and values, where the configuration says so."""
    if getattr(config, "new_decoder_architecture", False):  # Falcon
        return "groups"
    many = getattr(config, "multi_query", None)  # Falcon and GPT-BigCode
    return kind if many is None else "blocks" if many else "heads"


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
    raise InputError(missing(part, list(names), prefix))


def missing(part: str, tried: list[str], prefix: str = "") -> str:
    """Say that a part was not found, and how to name it."""
    tried = [prefix + name for name in dict.fromkeys(tried)]
    more = f" and {len(tried) - SHOWN} more" if len(tried) > SHOWN else ""
    return (
        f"the {part.replace('_', ' ')} of this model {'were' if part[-1] == 's' else 'was'} not found (tried "
        f"{', '.join(tried[:SHOWN])}{more}); "
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
    said = missing(part, [f"get_{'input' if part == 'embedding' else 'output'}_embeddings()"])
    headless = part == "unembedding" and module is None
    raise InputError(
        said + (", or load the model with its head, by AutoModelForCausalLM" if headless else "")
    )
