"""A description of a checkpoint, from its configuration and tokenizer alone."""

from pathlib import Path
from typing import Any

from spectral_sinks.models.checkpoint import find_source
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.language import opening_token
from spectral_sinks.models.layout import FAMILIES, context_of
from spectral_sinks.models.loading import load_tokenizer, read_config, refuse_code
from spectral_sinks.models.masked_lm import is_masked_lm
from spectral_sinks.models.spectra import read_through, ties


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

    `causal` is False for an encoder. `heads` and `key_value_heads` are None for a model without attention.
    `reads_through` names the modules between the residual stream and the unembedding, other than one norm.
    `quantization` is the type in which a GGUF file stores the unembedding, and `quantizations` has the types
    of each kind of its tensors; both are None for another checkpoint.

    Raises InputError for a name that is neither a path nor reachable, and for a broken configuration.
    """
    source = find_source(str(model), revision, gguf_file)
    refuse_code(source, trust_remote_code)
    config = read_config(source, trust_remote_code).get_text_config()
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    causal = not is_masked_lm(
        source.config.get("architectures") or (), config.model_type, getattr(config, "is_decoder", False)
    )
    bos = None if tokenizer is None else opening_token(tokenizer, causal)
    names = source.shards
    heads = getattr(config, "num_attention_heads", None)
    opens = tokenizer is not None and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return {
        "model": source.name,
        "family": config.model_type,
        "layout_tested": config.model_type in FAMILIES,
        "causal": causal,
        "reads_through": read_through(names),
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "heads": heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocabulary": config.vocab_size,
        "context": context_of(config),
        "tied": ties(source),
        "quantization": source.gguf and source.gguf.quantization(source.gguf.unembedding),
        "quantizations": source.gguf and source.gguf.quantizations(),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "bos_token": None if tokenizer is None or bos is None else tokenizer.convert_ids_to_tokens(bos),
        "bos_token_id": bos,
        "opens_with_bos": opens,
    }
