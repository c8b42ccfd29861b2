"""What a checkpoint says of itself without its weights: its configuration, its kind and its tokenizer."""

from contextlib import nullcontext
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.import_utils import is_torch_available

from spectral_sinks.errors import InputError, brief
from spectral_sinks.models.checkpoint import Source
from spectral_sinks.models.encoders import is_encoder


class UnreadableError(InputError):
    """transformers cannot read the configuration or the tokenizer of a checkpoint."""


FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox"}
    | {"olmo2", "phi3", "gpt_oss"}
    | {"bert", "roberta", "modernbert"}
)
"""Model types whose layout is tested; the layout of any other type is checked against a forward pass."""

VISION_FAMILIES = frozenset(
    {"dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "deit", "clip_vision_model"}
    | {"siglip_vision_model"}
)
"""Model types of image encoders whose layout is tested; any other is checked against a forward pass."""

TWO_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
"""Model types that have a text tower beside the image tower, and the class that loads the image tower."""

SHIFTED = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm"})
"""Model types whose position ids start after the id of the padding token."""

DTYPES = (None, "float32", "float16", "bfloat16", "float64")
"""The usual entries for the dtype of weights."""


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """Return the checkpoint's configuration as an object of transformers.

    Raises InputError for a missing or broken configuration.
    """
    known = source.config  # its errors are clearer than transformers'
    try:
        if not is_torch_available():
            _check_dtypes(known)
        if source.gguf is not None:
            return AutoConfig.for_model(**known)
        return AutoConfig.from_pretrained(
            source.location, **source.options, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of the code of a family, which raises types of its own
        raise UnreadableError(f"the configuration of {source.name} cannot be read: {brief(error)}") from error


def _check_dtypes(config: Any) -> None:
    """Raise ValueError for a dtype that is not usual, since torch alone knows whether there is such a one."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name in ("dtype", "torch_dtype") and value not in DTYPES:
                raise ValueError(f"dtype {value!r}")
            _check_dtypes(value)


def context_of(config: Any) -> int | None:
    """Return the longest window in tokens according to a configuration; None if it does not say."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest - config.pad_token_id - 1 if longest and config.model_type in SHIFTED else longest


def is_masked(source: Source) -> bool:
    """Whether a checkpoint is loaded as an encoder: a masked language model, or one without a head."""
    config = source.config
    return is_encoder(config.get("architectures") or (), config.get("model_type"), config.get("is_decoder"))


def is_vision(source: Source) -> bool:
    """Whether a checkpoint holds an image encoder, alone or beside a text tower."""
    return source.config.get("model_type") in VISION_FAMILIES | set(TWO_TOWERS)


def require_text(source: Source) -> None:
    """Raise InputError for the checkpoint of an image encoder."""
    if is_vision(source):
        raise InputError(
            f"{source.name} is an image encoder: load it by load_vision, or give it images, as in "
            f"spectral-sinks explore {source.name} FOLDER"
        )


def refuse_code(source: Source, trust_remote_code: bool) -> None:
    """Raise InputError for a checkpoint that needs code of its own, unless it is trusted."""
    if trust_remote_code or "auto_map" not in source.config:
        return
    if source.config.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{source.name} runs code of its own ({', '.join(sorted(source.config['auto_map']))}); "
            "read it, then allow it: load(..., trust_remote_code=True), --trust-remote-code"
        )


def load_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """Load the checkpoint's tokenizer; None if it ships none (token ids can still be measured)."""
    if source.gguf is None and not any(
        source.file(name) for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    ):
        return None
    try:
        # transformers would read a GGUF file once more for the configuration
        known = {} if source.gguf is None else {"config": read_config(source, trust_remote_code)}
        with nullcontext() if source.gguf is None else source.gguf.vocabulary_reader():
            tokenizer = AutoTokenizer.from_pretrained(
                source.location, **source.options, trust_remote_code=trust_remote_code, **known
            )
    except (ValueError, KeyError, OSError) as error:
        raise UnreadableError(f"the tokenizer of {source.name} cannot be loaded: {brief(error)}") from error
    if source.gguf is not None:
        source.gguf.configure_tokenizer(tokenizer)
    return tokenizer


def opening_token(tokenizer: Any, causal: bool) -> int | None:
    """Return the id of the token that opens a text: BOS, or [CLS] for an encoder that has one."""
    if causal or tokenizer.cls_token_id is None:
        return tokenizer.bos_token_id
    return tokenizer.cls_token_id


def opening_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text, whichever tokens they are."""
    whole = tokenizer("a")["input_ids"]
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(text) + 1)
    return next((tuple(whole[:start]) for start in starts if whole[start : start + len(text)] == text), ())
