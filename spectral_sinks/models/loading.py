"""`load`: a language model by name, folder, hub id or object."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spectral_sinks.errors import InputError
from spectral_sinks.models.adapters import adapted_base, check_adapted, with_adapter
from spectral_sinks.models.attention_sdpa import OPENING, is_softmax
from spectral_sinks.models.checkpoint import Source, check_finite, find_source
from spectral_sinks.models.effective_weights import adapter_state, device_of, offloaded
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.gguf import SUFFIX, VocabularyReader, fast_reader
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import Layout, find_layout
from spectral_sinks.models.masked_lm import is_masked_lm, predicts_masked
from spectral_sinks.models.meta_loading import load_on_meta
from spectral_sinks.models.pickling import wrap
from spectral_sinks.models.remote_state import To, remote_state
from spectral_sinks.models.traits import find_traits
from spectral_sinks.models.unwrapping import unwrapped


def load(
    model: str | Path | PreTrainedModel | torch.nn.Module | TransformersModel | LanguageModel = DEFAULT,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    attention: str = "auto",
    parts: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    remote: To = False,
    factors: str | None = None,
    gguf_file: str | None = None,
) -> LanguageModel:
    """Load a language model: the embedded `sinklet`, a Hugging Face id, a folder, a file, or a model object.

    A GGUF file is dequantised when it is loaded. Its tokenizer opens and closes texts as the file says.
    A checkpoint whose `architectures` name a masked language model (BERT, RoBERTa, ModernBERT) is loaded as
    an encoder, with `causal` False, unless its configuration sets `is_decoder`. A model given as an object
    keeps its dtype and its attention, and is put into evaluation mode.

    Args:
        model: the name of an embedded model, a Hugging Face id, a folder, a GGUF file, or a model of
            transformers, nnsight or this package. A model of peft is measured with the adapters that are
            active, and its folder is loaded with the base model. Wrappers of torch.compile and DataParallel
            are taken off.
        tokenizer: the tokenizer; by default the checkpoint's own.
        device: the device to which the model is moved.
        dtype: the dtype of the weights; "auto" is the checkpoint's own, and float32 for a GGUF file.
        device_map: transformers' `device_map`.
        revision: the revision of a hub model.
        attention: transformers' `attn_implementation`. Sink mass can be read from "eager", and from
            "sdpa_opening", which is torch's fast kernel with the maps of the first 64 tokens. "auto" is the
            custom implementation that the checkpoint's configuration names (`attn_implementation`), if there
            is one; else "sdpa_opening" if the model supports it (not Gemma 2, gpt-oss and encoders); else
            "eager".
        parts: names of modules, for a model whose layout is not found.
        allow_pickle: whether pickled weights may be loaded, which can run code.
        trust_remote_code: whether the checkpoint may run code of its own.
        remote: where the model's measurements run. False is this process. True is the NDIF server that
            nnsight is configured for, and a URL is another server; eager attention is requested from a server
            by default, and no weights are loaded into this process. "local" rehearses a remote run in this
            process, with the weights.
        factors: the dtype in which bases are sent to a server; by default the model's dtype.
        gguf_file: the name of the GGUF file in a folder that holds several, or in a hub repository.

    Raises:
        InputError: for a name that is neither a path nor reachable; for missing, pickled (unless allowed),
            truncated or non-finite weights; for an architecture that transformers cannot read from GGUF; for
            a checkpoint that runs code of its own (unless trusted); for quantised weights that cannot be read
            or run here; for an adapter that does more than weights do; for a model that is sharded over
            processes; for a model without a head over the vocabulary; for a model whose modules are not found
            or do not add up; for an encoder or a GGUF file that is to run remotely; and for options that a
            model object cannot take.

    """
    if not isinstance(model, str | Path):
        refuse_options(
            model,
            dtype=dtype,
            device_map=device_map,
            revision=revision,
            attention=attention,
            gguf_file=gguf_file,
        )
    if isinstance(model, LanguageModel):
        refuse_options(model, tokenizer=tokenizer, device=device, parts=parts)
        place = remote_state(remote, model.remote and model.remote.commit, factors)
        return model if place is None else replace(model, remote=place)
    # a model on a server: only its configuration and tokenizer are loaded
    if remote not in (False, "local"):
        if device is not None or device_map is not None:
            raise InputError("a model at a server has the server's devices: give no device and no device_map")
        if gguf_file is not None or Path(str(model)).suffix == SUFFIX:
            raise InputError(
                "a server loads checkpoints of the hub: GGUF files are read in this process alone"
            )
        return _afar(model, tokenizer, attention, dtype, parts, revision, trust_remote_code, remote, factors)
    # the transformers module, its tokenizer and its name
    if isinstance(model, (str, Path)):
        if (
            isinstance(dtype, str)
            and dtype != "auto"
            and not isinstance(getattr(torch, dtype, None), torch.dtype)
        ):
            raise InputError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
        source = find_source(str(model), revision, gguf_file)
        base = adapted_base(source)
        module = _load_module(base or source, dtype, device_map, attention, allow_pickle, trust_remote_code)
        if base is not None:
            module = with_adapter(module, source, allow_pickle)
        if device is not None:
            module = moved(module, device)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
        if tokenizer is None and base is not None:
            tokenizer = load_tokenizer(base, trust_remote_code)
        name = source.name
    else:
        given: Any = model
        if isinstance(model, TransformersModel):
            given.dispatch()  # loads the weights of a model that is still on the meta device
        held = given._module if isinstance(model, TransformersModel) else given
        module: Any = unwrapped(held)
        if not isinstance(module, torch.nn.Module) or not hasattr(module, "config"):
            raise InputError(
                f"{type(model).__name__} is not a model: give a name, a folder, or a model of transformers "
                "or nnsight"
            )
        if any(weight.is_meta for weight in module.parameters()) and not offloaded(module):
            raise InputError(
                f"the weights of this {type(module).__name__} are not loaded, but on the meta device: load "
                "it by from_pretrained, or give its name or folder"
            )
        check_adapted(held, module)
        if device is not None:
            module = moved(module, device)
        if isinstance(model, TransformersModel):
            tokenizer = tokenizer or model.tokenizer
        name = getattr(module.config, "name_or_path", "") or type(module).__name__
        if tokenizer is None and Path(name).is_dir():
            tokenizer = load_tokenizer(find_source(name), trust_remote_code)
    # checks of the attention, the weights and the layout
    masked = predicts_masked(module)
    if getattr(module.config, "_attn_implementation", "") == OPENING:
        _check_opening(name, module)
    module.eval()
    for parameter, weight in module.named_parameters():
        check_finite(f"{name}: {parameter}", weight)
    layout = _layout(name, module, parts)
    if layout.transform and not masked and getattr(module.config, "is_decoder", None) is False:
        raise InputError(
            f"{name} is a {type(module).__name__} whose tokens attend to later ones: set is_decoder=True in "
            "its configuration, or load it as a masked language model"
        )
    quantised = getattr(module, "is_quantized", False)
    if quantised:
        run_once(name, module)
    wrapped: Any = model
    if not isinstance(model, TransformersModel) or wrapped._module is not module:
        wrapped = wrap(module, tokenizer)
    loaded = LanguageModel(wrapped, layout, name, tokenizer, remote=remote_state(remote, None, factors))
    if not loaded.tested or parts or quantised or adapter_state(module):
        if loaded.vocabulary < 2:
            raise InputError(f"{name} has a vocabulary of {loaded.vocabulary}")
        loaded = replace(loaded, layout=find_traits(loaded, parts))
    return loaded


def _afar(
    model: Any,
    tokenizer: Any,
    attention: str,
    dtype: torch.dtype | str,
    parts: Mapping[str, str] | None,
    revision: str | None,
    trust_remote_code: bool,
    remote: To,
    factors: str | None,
) -> LanguageModel:
    """Return a model whose weights stay on a server."""
    if not isinstance(model, str | Path):
        raise InputError(f"{type(model).__name__}: a server knows models by name: give a Hugging Face id")
    source = find_source(str(model), revision)
    refuse_code(source, trust_remote_code)
    place = remote_state(remote, source.revision, factors, dtype)
    tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
    masked = is_masked(source)
    nn, layout = load_on_meta(source, tokenizer, attention, dtype, parts, revision, trust_remote_code, masked)
    return LanguageModel(nn, layout, source.name, tokenizer, remote=place)


def _load_module(
    source: Source,
    dtype: torch.dtype | str,
    device_map: Any,
    attention: str,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> Any:
    refuse_code(source, trust_remote_code)
    source.require_weights(allow_pickle)
    named = source.config.get("attn_implementation")
    if attention == "auto" and named and not is_softmax(named):
        attention = named
    masked = is_masked(source)
    module = load_weights(
        source,
        AutoModelForMaskedLM if masked else AutoModelForCausalLM,
        f"a {'masked' if masked else 'causal'} language model",
        dtype=dtype,
        device_map=device_map,
        attn_implementation="eager" if attention in ("auto", OPENING) else attention,
        use_safetensors=None if allow_pickle else True,
        trust_remote_code=trust_remote_code,
    )
    if attention == OPENING:
        _check_opening(source.name, module)
    if attention == OPENING or (attention == "auto" and module._supports_sdpa and not masked):
        module.set_attn_implementation(OPENING)
    return module


def load_weights(source: Source, kind: Any, what: str, **options: Any) -> Any:
    """Load a checkpoint by `from_pretrained` of a transformers class, and return the module.

    Raises InputError for a checkpoint that is not `what` it should be, and for missing weights.
    """
    try:
        if source.gguf is not None:
            module, report = _from_gguf(source, kind, **options)
        else:
            module, report = kind.from_pretrained(
                source.location, **source.options, output_loading_info=True, **options
            )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source.name} cannot be loaded as {what}: {error}") from error
    except ImportError as error:
        method = (source.config.get("quantization_config") or {}).get("quant_method")
        stored = f", whose weights are quantised by {method}," if method else ""
        raise InputError(
            f"{source.name}{stored} needs a library that is not installed here: {error}"
        ) from error
    if lacking := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(
            f"{source.name} lacks {len(lacking)} of the weights of a {type(module).__name__}: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
        )
    for name in sorted(report["unexpected_keys"]):
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in source.shards and source.packed(weight):
            raise InputError(
                f"{source.name} stores {weight} quantised, beside {name}, and transformers would take the "
                "codes for the weights: dequantise it, or add the quantization_config of its method to "
                "config.json"
            )
    return module


def run_once(name: str, module: Any) -> None:
    """Run a quantised model on two tokens, since some unpack their weights in the first pass.

    Raises InputError for a model that does not run here.
    """
    ids = torch.tensor([[0, 1]], device=device_of(module.get_input_embeddings()))
    try:
        with torch.no_grad():
            module(input_ids=ids)
    except Exception as error:  # of kernels, which raise types of their own
        raise InputError(
            f"{name} is quantised and does not run on {ids.device} ({error}): give a device on which it "
            "does, such as device='cuda'"
        ) from error


def _from_gguf(source: Source, kind: Any, *, dtype: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a GGUF file by `from_pretrained`, dequantised, and return the module and the loading report."""
    options["config"] = read_config(source, options.pop("trust_remote_code", False))
    options.pop("use_safetensors", None)
    with fast_reader():
        module, report = kind.from_pretrained(
            source.location,
            **source.options,
            output_loading_info=True,
            dtype=torch.float32 if dtype == "auto" else dtype,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
    # the weights are plain floats now, which transformers would not cast or save while these are set
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(module.config, name):
            delattr(module.config, name)
    module.is_quantized, module.hf_quantizer = False, None
    return module, report


def read_config(source: Source, trust_remote_code: bool) -> Any:
    """Return the checkpoint's configuration as an object of transformers.

    Raises InputError for a missing or broken configuration.
    """
    known = source.config  # its errors are clearer than transformers'
    try:
        if source.gguf is not None:
            return AutoConfig.for_model(**known)
        return AutoConfig.from_pretrained(
            source.location, **source.options, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the configuration of {source.name} cannot be read: {error}") from error


def refuse_options(model: object, **options: Any) -> None:
    """Raise InputError if options of loading are given for a model that is loaded already.

    An option counts as given if it is neither None nor "auto".
    """
    if given := [name for name, value in options.items() if value is not None and value != "auto"]:
        raise InputError(
            f"{', '.join(given)} cannot be given with a {type(model).__name__}, which is loaded already: "
            "give its name or folder to load it anew"
        )


def is_masked(source: Source) -> bool:
    """Whether a checkpoint is loaded as a masked language model."""
    config = source.config
    return is_masked_lm(config.get("architectures") or (), config.get("model_type"), config.get("is_decoder"))


def _check_opening(name: str, module: Any) -> None:
    """Raise InputError for a model whose attention the `OPENING` implementation cannot compute or map.

    These are encoders, whose tokens attend beyond the first tokens, and models without sdpa attention, such
    as those with a cap or a learned sink, which the kernel would leave out.
    """
    if predicts_masked(module):
        raise InputError(
            f"{name}: tokens of a {type(module).__name__} attend to later ones, and {OPENING!r} maps the "
            "opening alone: use attention='eager'"
        )
    if not module._supports_sdpa:
        raise InputError(f"{name}: {type(module).__name__} has no sdpa attention: use attention='eager'")


def _layout(name: str, module: Any, parts: Mapping[str, str] | None) -> Layout:
    """Find the layout, with a clearer error for a model without attention heads (Mamba, RWKV)."""
    try:
        return find_layout(module, parts)
    except InputError as error:
        config: Any = module.config.get_text_config()
        if getattr(config, "num_attention_heads", None) is None:
            raise InputError(
                f"{name} ({config.model_type}) has no attention heads in its configuration: this package is "
                "about softmax attention"
            ) from error
        raise


def moved(module: Any, device: str | torch.device) -> Any:
    """Move the module to a device. Raises InputError if that fails."""
    try:
        return module.to(device)
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ) as error:  # an unknown or absent device, or too little memory
        raise InputError(f"the model cannot be put on device {str(device)!r}: {error}") from error


def load_tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """Load the checkpoint's tokenizer; None if it ships none (token ids can still be measured)."""
    if source.gguf is None and not any(
        source.file(name) for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    ):
        return None
    try:
        # transformers would read a GGUF file once more for the configuration
        known = {} if source.gguf is None else {"config": read_config(source, trust_remote_code)}
        with nullcontext() if source.gguf is None else fast_reader(VocabularyReader):
            tokenizer = AutoTokenizer.from_pretrained(
                source.location, **source.options, trust_remote_code=trust_remote_code, **known
            )
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"the tokenizer of {source.name} cannot be loaded: {error}") from error
    if source.gguf is not None:
        source.gguf.configure_tokenizer(tokenizer)
    return tokenizer


def refuse_code(source: Source, trust_remote_code: bool) -> None:
    """Raise InputError for a checkpoint that needs code of its own, unless it is trusted."""
    if trust_remote_code or "auto_map" not in source.config:
        return
    if source.config.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{source.name} runs code of its own ({', '.join(sorted(source.config['auto_map']))}); "
            "read it, then allow it: load(..., trust_remote_code=True), --trust-remote-code"
        )
