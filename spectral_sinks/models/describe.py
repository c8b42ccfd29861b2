"""What a checkpoint is, from its configuration and tokenizer alone."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from spectral_sinks.errors import InputError
from spectral_sinks.models.layout import FAMILIES
from spectral_sinks.models.loading import load_tokenizer, refuse_code
from spectral_sinks.models.matrices import UNEMBEDDINGS
from spectral_sinks.models.source import DEFAULT, find_source


def describe(
    model: str | Path = DEFAULT, *, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Family, sizes, tied or not, BOS policy and context of a checkpoint; weights are not read.

    Raises InputError for a name that is neither a folder nor reachable, or a broken configuration.
    """
    source = find_source(str(model), revision)
    refuse_code(source, trust_remote_code)
    _ = source.config  # says what is wrong with a missing or broken config.json
    try:
        config = AutoConfig.from_pretrained(
            source.location,
            revision=source.revision,
            local_files_only=source.offline or source.folder is not None,
            trust_remote_code=trust_remote_code,
        ).get_text_config()
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the configuration of {source.name} cannot be read: {error}") from error
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    names = source.shards
    opens = tokenizer is not None and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return {
        "model": source.name,
        "family": config.model_type,
        "layout_tested": config.model_type in FAMILIES,
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
        "tied": bool(config.tie_word_embeddings) and not any(name in names for name in UNEMBEDDINGS),
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "bos_token": None if tokenizer is None else tokenizer.bos_token,
        "bos_token_id": bos,
        "opens_with_bos": opens,
    }
