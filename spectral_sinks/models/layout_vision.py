"""The layout of image encoders: the table of their module names."""

from collections.abc import Mapping
from typing import Any

from spectral_sinks.errors import InputError
from spectral_sinks.models.layout import Layout, first, has, submodule

TOWERS = ("dinov2", "dinov2_with_registers", "vit", "deit", "model", "vision_model", "vision_tower", "")
"""Names under which a model may hold the encoder."""

SEARCHED: dict[str, tuple[str, ...]] = {
    "layers": ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer"),
    "embedding": ("embeddings",),
    "final_norm": ("layernorm", "norm", "post_layernorm"),
    "attention": ("attention", "self_attn"),
    "mlp": ("mlp",),
    "attention_norm": ("norm1", "layernorm_before", "layer_norm1"),
    "mlp_norm": ("norm2", "layernorm_after", "layer_norm2"),
    "queries": ("q_proj",),
    "keys": ("k_proj",),
    "values": ("v_proj",),
    "attention_projection": ("o_proj", "out_proj"),
}

OF_TOWER = ("layers", "embedding", "final_norm")
OF_ATTENTION = ("queries", "keys", "values", "attention_projection")
HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def vision_layout(module: Any, given: Mapping[str, str] | None = None) -> Layout:
    """Find the layout of an image encoder; `given` names modules by hand.

    Raises InputError for a module that is not found, with a message that says how to name it.
    """
    given = dict(given or {})
    if unknown := sorted(set(given) - {*SEARCHED, "attention_write", "mlp_write", "unembedding"}):
        raise InputError(f"no part is called {', '.join(unknown)}; parts: {', '.join(sorted(SEARCHED))}")
    tower = next((name for name in TOWERS if has(module, f"{name}.embeddings".lstrip("."))), None)
    if tower is None:
        raise InputError(
            f"{type(module).__name__} holds no image encoder that is known: expected DINOv2, DINOv3, ViT, "
            "DeiT, or the vision tower of CLIP or SigLIP"
        )
    # names in the model
    start = f"{tower}." if tower else ""
    found: dict[str, Any] = {}
    for part in OF_TOWER:
        if part in given:
            submodule(module, given[part], part)
        name = given.get(part) or start + first(module.get_submodule(tower), part, SEARCHED[part], start)
        found[part] = name
    # names in a layer, and in its attention
    layer: Any = module.get_submodule(found["layers"])[0]
    for part in set(given) - {*OF_TOWER, "unembedding"}:
        submodule(layer, given[part], part)
    for part in ("attention", "mlp", "attention_norm", "mlp_norm"):
        found[part] = given.get(part) or first(layer, part, SEARCHED[part])
    for part in OF_ATTENTION:
        inside = f"{found['attention']}."
        attention = layer.get_submodule(found["attention"])
        found[part] = given.get(part) or inside + first(attention, part, SEARCHED[part], inside)
    for part, scale, plain in (
        ("attention_write", "layer_scale1", "attention"),
        ("mlp_write", "layer_scale2", "mlp"),
    ):
        found[part] = given.get(part) or (scale if has(layer, scale) else found[plain])
    head = next((name for name in HEADS if has(module, name)), "")
    return Layout(unembedding=given.get("unembedding", head), **found)
