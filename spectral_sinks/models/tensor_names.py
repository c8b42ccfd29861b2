"""The tensors of a checkpoint that embed and unembed tokens, by their names."""

from collections.abc import Iterable

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectral_sinks.models.checkpoint import QuantisedError, Source
from spectral_sinks.models.configuration import read_config

UNEMBEDDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "model.lm_head.weight",
    "language_model.lm_head.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "decoder.weight",
    "output.weight",  # GGUF
)
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
    "model.embeddings.tok_embeddings.weight",
    "token_embd.weight",  # GGUF
    "transformer.word_embeddings.weight",
    "word_embeddings.weight",
    "model.decoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "biogpt.embed_tokens.weight",
    "gpt_neox_japanese.embed_in.weight",
    "transformer.tokens_embed.weight",
    "tokens_embed.weight",
    "transformer.w.weight",
    "backbone.embeddings.weight",
    "rwkv.embeddings.weight",
    "embeddings.word_embeddings.weight",
    "embeddings.tok_embeddings.weight",
)
NORMS = (
    "model.norm.weight",
    "transformer.ln_f.weight",
    "ln_f.weight",
    "gpt_neox.final_layer_norm.weight",
    "model.language_model.norm.weight",
    "language_model.model.norm.weight",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.gamma",
    "lm_head.layer_norm.weight",
    "head.norm.weight",
    "lm_head.norm.weight",
    "output_norm.weight",  # GGUF
)

TRANSFORMS = ("cls.predictions.transform.dense", "lm_head.dense", "head.dense")
"""The dense layer of the head of a masked language model, or of ModernBERT's decoder."""

BEFORE = {"head.norm": "model.final_norm, ", "lm_head.norm": "model.final_norm, "}
"""The modules before that dense layer, by the name of the norm after it."""


def through(transform: str, final_norm: str) -> str:
    """Describe the modules of a masked-LM head before its unembedding, for reports."""
    return f"{BEFORE.get(final_norm, '')}{transform}, an activation and {final_norm}"


def ties(source: Source) -> bool:
    """Whether transformers gives the model of a checkpoint one matrix as embedding and unembedding.

    It does so if the configuration says so, unless the checkpoint holds two matrices that differ. Weights are
    read only to compare these.
    """
    head, embedding = present_of(source.shards, UNEMBEDDINGS), present_of(source.shards, EMBEDDINGS)
    kind, says = source.config.get("model_type"), source.config.get("tie_word_embeddings", head is None)
    if isinstance(kind, str) and kind in CONFIG_MAPPING:  # whose defaults differ between families
        says = getattr(read_config(source, False), "tie_word_embeddings", False)
    if not says or head is None or embedding is None:
        return bool(says)
    try:
        import torch  # which a description of most checkpoints does without

        return torch.equal(source.tensor(head), source.tensor(embedding))
    except QuantisedError:
        return False


def read_through(present: Iterable[str]) -> str:
    """Describe the modules between residual stream and unembedding, from the tensor names of a checkpoint."""
    names = {name.rpartition(".")[0] for name in present}
    dense = next((name for name in TRANSFORMS if name in names), "")
    norm = next((name for name in (each.rpartition(".")[0] for each in NORMS) if name in names), "")
    return through(dense, norm) if dense else ""


def present_of(present: dict[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in present), None)
