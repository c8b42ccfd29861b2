"""`load`: a language model by name, folder, hub id or object."""

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GgufConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from spectral_sinks.errors import InputError, SpectralWarning, brief
from spectral_sinks.files import GGUF
from spectral_sinks.models.adapters import adapted_base, check_adapted, with_adapter
from spectral_sinks.models.attention_sdpa import OPENING, is_softmax
from spectral_sinks.models.checkpoint import Source, find_source
from spectral_sinks.models.configuration import (
    is_masked,
    load_tokenizer,
    read_config,
    refuse_code,
    require_text,
)
from spectral_sinks.models.effective_weights import adapter_state, check_finite, device_of, offloaded
from spectral_sinks.models.embedded import DEFAULT
from spectral_sinks.models.encoders import encodes, is_bare
from spectral_sinks.models.gguf import fast_reader
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import Layout, Traits, find_layout
from spectral_sinks.models.meta_loading import load_on_meta
from spectral_sinks.models.pickling import wrap
from spectral_sinks.models.remote_state import To, remote_state
from spectral_sinks.models.traits import find_traits
from spectral_sinks.models.unwrapping import unwrapped

NUMBER = re.compile(r"\.\d+\.")
"""The number of a layer or an expert in the name of a weight."""

EXAMINED = ("queries", "keys", "values", "head", "mlp-input")
"""Kinds of sites that only a pass of the weights shows to be exact, in a family that is not tested."""


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
    A checkpoint whose `architectures` name a masked language model (BERT, RoBERTa, ModernBERT), or such an
    encoder without a head (BertModel), is loaded as an encoder, with `causal` False, unless its configuration
    sets `is_decoder`. Without a head there is no NLL and no unembedding. A model given as an object
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
            by default, and no weights are loaded into this process. Without weights a family whose layout is
            not tested is not examined: it has no sites of projections and heads, and is refused where a pass
            of one token does not add up. "local" rehearses a remote run in this
            process, with the weights.
        factors: the dtype in which bases are sent to a server; by default the model's dtype.
        gguf_file: the name of the GGUF file in a folder that holds several, or in a hub repository.

    Raises:
        InputError: for a name that is neither a path nor reachable; for missing, pickled (unless allowed),
            truncated or non-finite weights; for an architecture that transformers cannot read from GGUF; for
            a checkpoint that runs code of its own (unless trusted); for quantised weights that cannot be read
            or run here; for an adapter that does more than weights do; for a model that is sharded over
            processes; for an encoder whose head is not over the vocabulary; for a model whose modules are not
            found or do not add up; for an encoder or a GGUF file that is to run remotely; and for options
            that a model object cannot take.

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
        if gguf_file is not None or Path(str(model)).suffix == GGUF:
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
    masked = encodes(module)
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
    found = LanguageModel(nn, layout, source.name, tokenizer, remote=place)
    if found.tested and not parts:
        return found
    # no pass shows what this family does, and the handshake examines less
    reason = (
        f"a pass of the weights shows whether it is exact in {found.family}, whose layout is not tested, and "
        "these are at a server (load the model in this process)"
    )
    return replace(found, layout=replace(layout, traits=Traits(lacking=dict.fromkeys(EXAMINED, reason))))


def _load_module(
    source: Source,
    dtype: torch.dtype | str,
    device_map: Any,
    attention: str,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> Any:
    refuse_code(source, trust_remote_code)
    require_text(source)
    source.require_weights(allow_pickle)
    named = source.config.get("attn_implementation")
    if attention == "auto" and named and not is_softmax(named):
        attention = named
    masked = is_masked(source)
    kind = class_of(source)
    extra: dict[str, Any] = {}
    if kind is AutoModel and not any("pooler." in name for name in source.shards):
        inner: Any = AutoModel._model_mapping[type(read_config(source, trust_remote_code))]
        if "add_pooling_layer" in inspect.signature(inner).parameters:
            extra["add_pooling_layer"] = False  # which would be random; nothing here reads it
    module = load_weights(
        source,
        kind,
        "an encoder" if kind is AutoModel else f"a {'masked' if masked else 'causal'} language model",
        **extra,
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
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    try:
        if source.gguf is not None:
            module, report = _from_gguf(source, kind, **options)
        else:
            module, report = kind.from_pretrained(
                source.location,
                **source.options,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except ImportError as error:
        stored = f", whose weights are quantised by {method}," if method else ""
        other = ": install or use that, or give a checkpoint that is not quantised" if method else ""
        raise InputError(f"{source.name}{stored} needs what is not here ({brief(error)}){other}") from error
    except Exception as error:  # of the code of a family, which raises types of its own
        raise InputError(f"{source.name} cannot be loaded as {what}: {brief(error)}") from error
    unknown = isinstance(method, str) and method not in AUTO_QUANTIZATION_CONFIG_MAPPING
    if unknown and report["missing_keys"]:
        raise InputError(
            f"{source.name} is quantised by {method}, which transformers does not know: give a checkpoint "
            "that is not quantised, or one of a method that it knows, such as gptq or bitsandbytes"
        )
    if lacking := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise InputError(
            f"{source.name} lacks {len(lacking)} of the weights of a {type(module).__name__}: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
        )
    for name, stored, asked in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{source.name}: {name} is {list(stored)} where its config.json asks for {list(asked)}: the two "
            "are not of one model"
        )
    if beyond := _beyond(module, report["unexpected_keys"]):
        warnings.warn(
            f"{source.name} holds layers that its config.json does not count, such as that of {beyond}: they "
            "are left out",
            SpectralWarning,
            stacklevel=3,
        )
    for name in sorted(report["unexpected_keys"]):
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in source.shards and source.packed(weight):
            raise InputError(
                f"{source.name} stores {weight} quantised, beside {name}, and transformers would take the "
                "codes for the weights: dequantise it, or add the quantization_config of its method to "
                "config.json"
            )
    if method is None and (integers := source.integers()):
        raise InputError(
            f"{source.name} stores {integers} as integers, and transformers would take the codes for the "
            "weights: dequantise it, or add the quantization_config of its method to config.json"
        )
    return module


def _beyond(module: Any, unexpected: Iterable[str]) -> str | None:
    """Return the first weight that a layer of the model would have, if it had more of them."""
    held = {NUMBER.sub(".#.", name) for name in module.state_dict()}
    return next((name for name in sorted(unexpected) if NUMBER.sub(".#.", name) in held), None)


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
            f"{name} is quantised and does not run on {ids.device} ({brief(error)}): give a device on which "
            "it does, such as device='cuda'"
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


def refuse_options(model: object, **options: Any) -> None:
    """Raise InputError if options of loading are given for a model that is loaded already.

    An option counts as given if it is neither None nor "auto".
    """
    if given := [name for name, value in options.items() if value is not None and value != "auto"]:
        raise InputError(
            f"{', '.join(given)} cannot be given with a {type(model).__name__}, which is loaded already: "
            "give its name or folder to load it anew"
        )


def class_of(source: Source) -> Any:
    """Return the class of transformers that loads a checkpoint."""
    if not is_masked(source):
        return AutoModelForCausalLM
    bare = is_bare(source.config.get("architectures") or ())
    return AutoModel if bare else AutoModelForMaskedLM


def _check_opening(name: str, module: Any) -> None:
    """Raise InputError for a model whose attention the `OPENING` implementation cannot compute or map.

    These are encoders, whose tokens attend beyond the first tokens, and models without sdpa attention, such
    as those with a cap or a learned sink, which the kernel would leave out.
    """
    if encodes(module):
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
    """Move the module to a device. Raises InputError if that fails, and for `meta`, without numbers."""
    if str(device).startswith("meta"):
        raise InputError("device 'meta' holds no weights, so nothing can be computed there: give such as cpu")
    try:
        return module.to(device)
    except (
        RuntimeError,
        AssertionError,
        ValueError,
    ) as error:  # an unknown or absent device, or too little memory
        raise InputError(f"the model cannot be put on device {str(device)!r}: {brief(error)}") from error
