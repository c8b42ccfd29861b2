"""A description of a checkpoint, from its configuration and tokenizer alone."""

from pathlib import Path
from typing import Any

from spectral_sinks.models.checkpoint import find_source
from spectral_sinks.models.configuration import (
    FAMILIES,
    context_of,
    load_tokenizer,
    opening_token,
    read_config,
    refuse_code,
    require_text,
)
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.encoders import is_bare, is_encoder
from spectral_sinks.models.tensor_names import read_through, ties


def describe(
    model: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> dict[str, Any]:
    """Return the family, sizes, tying, BOS policy and context of a checkpoint, without reading its weights.

    Only two matrices that the configuration ties although both are stored are compared, since transformers
    does not tie them if they differ.

    `causal` is False for an encoder, and `has_head` for one without a head over the vocabulary. `heads` and
    `key_value_heads` are None for a model without attention.
    `reads_through` names the modules between the residual stream and the unembedding, other than one norm.
    `quantization` is the type in which a GGUF file stores the unembedding, and `quantizations` has the types
    of each kind of its tensors; both are None for another checkpoint.

    Raises InputError for a name that is neither a path nor reachable, for an image encoder, and for a broken
    configuration.
    """
    source = find_source(str(model), revision, gguf_file)
    refuse_code(source, trust_remote_code)
    require_text(source)
    config = read_config(source, trust_remote_code).get_text_config()
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    classes = source.config.get("architectures") or ()
    causal = not is_encoder(classes, config.model_type, getattr(config, "is_decoder", False))
    head = causal or not is_bare(classes)
    bos = None if tokenizer is None else opening_token(tokenizer, causal)
    names = source.shards
    heads = getattr(config, "num_attention_heads", None)
    opens = tokenizer is not None and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return {
        "model": source.name,
        "family": config.model_type,
        "layout_tested": config.model_type in FAMILIES,
        "causal": causal,
        "has_head": head,
        "reads_through": read_through(names),
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocabulary": config.vocab_size,
        "context": context_of(config),
        "tied": head and ties(source),
        "quantization": source.gguf and source.gguf.quantization(source.gguf.unembedding),
        "quantizations": source.gguf and source.gguf.quantizations(),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "bos_token": None if tokenizer is None or bos is None else tokenizer.convert_ids_to_tokens(bos),
        "bos_token_id": bos,
        "opens_with_bos": opens,
    }
