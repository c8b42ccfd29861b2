"""GGUF files, as llama.cpp writes them: their header, single tensors, and the flags of their tokenizer."""

import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import gguf
import numpy as np
import torch
from gguf import quants
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PretrainedConfig, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils import logging

from spectral_sinks.errors import InputError, SpectralWarning, brief

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

LONG = 1000
"""Longer arrays are a vocabulary, its scores or its merges, which the header leaves out."""

DIGIT_BY_DIGIT = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum")
)
"""Pre-tokenizers that split numbers into digits and the rest as GPT-2 does (llama.cpp, `llama-vocab.cpp`)."""

AS_GPT2 = frozenset(
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "modern-bert", "gigachat")
)
"""Pre-tokenizers that split text as GPT-2 does (llama.cpp, `llama-vocab.cpp`)."""

BYTE_LEVEL_WITH_BOS = frozenset(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken")
)
"""Pre-tokenizers for which llama.cpp adds BOS where the file does not say whether to."""


STEPS = {
    "Q4_0": (32, 8, True),
    "Q5_0": (32, 16, True),
    "Q8_0": (32, 127, True),
    "Q3_K": (16, 4, True),
    "Q6_K": (16, 32, True),
    "Q4_1": (32, 15, False),
    "Q5_1": (32, 31, False),
    "Q2_K": (16, 3, False),
    "Q4_K": (32, 15, False),
    "Q5_K": (32, 31, False),
}
"""For types with evenly spaced values: entries that share a step, steps in the range, and whether that range
is from zero to the largest magnitude. Otherwise it is from the smallest to the largest value."""

MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
"""Bits of the mantissa."""


class HeaderReader(gguf.GGUFReader):
    """The reader of the gguf package, without the entries of long arrays.

    The package makes one NumPy view for each entry. For the vocabulary of Gemma 3 these are 786 000, and cost
    half a minute of processor time whenever the file is opened.
    """

    entries = False
    """Whether the entries of long arrays are read."""

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data.data, orig_offs)
        if count <= LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, end = gguf.GGUFValueType(kind), orig_offs + 12
        parts: list[Any] = []
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                start = end + 8
                end = start + struct.unpack_from("<Q", self.data.data, end)[0]
                if self.entries:
                    parts.append(self.data.data[start:end])
        else:
            dtype = np.dtype(self.gguf_scalar_to_np[kind])
            if self.entries:
                parts = list(np.frombuffer(self.data.data, dtype, count, end)[:, None])
            end += count * dtype.itemsize
        return end - orig_offs, parts, [*range(len(parts))], [gguf.GGUFValueType.ARRAY, kind]


class VocabularyReader(HeaderReader):
    """The same with the entries of long arrays, as the tokenizer needs them: plain arrays, views of bytes."""

    entries = True


GROUP = 2**18
"""Values that are dequantised at once; the gguf package takes 16 rows, which are few where rows are short."""


def _in_groups(
    func: Callable[[NDArray[Any]], NDArray[Any]], arr: NDArray[Any], otype: Any, oshape: tuple[int, ...]
) -> NDArray[Any]:
    """Do what `_apply_over_grouped_rows` of the gguf package does, in groups of `GROUP` values."""
    rows = np.asarray(arr).reshape(-1, arr.shape[-1])
    out = np.empty((len(rows), int(np.prod(oshape)) // len(rows)), dtype=otype)
    step = max(1, GROUP // out.shape[1])
    for start in range(0, len(rows), step):
        group = rows[start : start + step]
        out[start : start + step] = func(group).reshape(len(group), -1)
    return out.reshape(oshape)


_patching = RLock()


@contextmanager
def _fast_dequantisation() -> Iterator[None]:
    theirs: Any = quants
    with _patching:
        usual, theirs._apply_over_grouped_rows = theirs._apply_over_grouped_rows, _in_groups
        try:
            yield
        finally:
            theirs._apply_over_grouped_rows = usual


@contextmanager
def fast_reader(reader: type[HeaderReader] = HeaderReader) -> Iterator[None]:
    """Let transformers open a GGUF file once, by a reader of this module, and make one map of tensor names.

    transformers takes both from the gguf package. It opens a file several times for a tokenizer, and makes
    the map once per module. The progress bar of that reading obeys transformers' own switch inside the block.
    """
    with _patching, _fast_dequantisation():
        usual = gguf.GGUFReader, gguf.get_tensor_name_map
        theirs: Any = modeling_gguf_pytorch_utils
        bar = theirs.tqdm
        gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(gguf.get_tensor_name_map)
        theirs.tqdm = logging.tqdm
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = usual
            theirs.tqdm = bar


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file on disk, of which single tensors can be read."""

    path: Path

    @cached_property
    def _reader(self) -> HeaderReader:
        try:
            return HeaderReader(self.path)
        except ValueError as error:
            if "magic" in str(error):
                raise InputError(f"{self.path} is not a GGUF file: it does not begin with GGUF") from error
            if "version" in str(error) or "Duplicate" in str(error) or "duplicated" in str(error):
                raise InputError(f"{self.path} cannot be read: {brief(error)}") from error
            raise self._truncated() from error
        except (IndexError, struct.error) as error:
            raise self._truncated() from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {brief(error)}") from error

    def _truncated(self) -> InputError:
        size = self.path.stat().st_size
        return InputError(f"{self.path} is truncated or damaged at {size} bytes: fetch the file again")

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The values of the header, without long arrays.

        Raises InputError for a file that is not GGUF or is truncated, and for one part of a split file.
        """
        found = {name: field.contents() for name, field in self._reader.fields.items() if field.data}
        parts = int(found.get("split.count", 0))
        if parts > 1:
            raise InputError(_split(self.path, parts))
        if "general.architecture" not in found:
            raise InputError(f"{self.path} does not name the architecture of its model")
        return found

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors of the file by name: type, shape and position, without their values."""
        _ = self.metadata
        return {str(tensor.name): tensor for tensor in self._reader.tensors}

    @cached_property
    def vocabulary(self) -> int:
        """Number of rows of the embedding."""
        if EMBEDDING not in self.tensors:
            raise InputError(f"{self.path} holds no token embedding: expected a language model")
        return int(self.tensors[EMBEDDING].shape[1])

    @cached_property
    def _config(self) -> dict[str, Any]:
        _ = self.metadata  # its errors are clearer than transformers'
        where = {"gguf_file": self.path.name, "local_files_only": True}
        try:
            with fast_reader():
                config, _ = PretrainedConfig.get_config_dict(str(self.path.parent), **where)
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            architecture = self.metadata["general.architecture"]
            raise InputError(
                f"{self.path} holds a model of the architecture {architecture!r}, which transformers cannot "
                f"read from GGUF ({brief(error)}): give the Hugging Face checkpoint"
            ) from error
        return {key: value for key, value in config.items() if key != "gguf_file"} | {
            "vocab_size": self.vocabulary
        }

    def config(self) -> dict[str, Any]:
        """Return a copy of the configuration that transformers reads from the file."""
        return deepcopy(self._config)

    @property
    def unembedding(self) -> str:
        """Name of the tensor that is the unembedding: the embedding, if the file holds no other."""
        return HEAD if HEAD in self.tensors else EMBEDDING

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, dequantised to float32, in torch's order of dimensions."""
        stored = self.tensors[name]
        try:
            with _fast_dequantisation():
                values = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: {name} is stored as {stored.tensor_type.name}, which the gguf package cannot "
                "dequantise"
            ) from error
        held = np.shares_memory(values, stored.data)  # the file itself, where nothing is quantised
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True if held else None))

    def steps(self, name: str) -> Tensor | None:
        """Return the step between the values that each entry of a tensor can take, float32.

        It is worked out from the dequantised values: their range in each block over the number of steps, for
        a type that spaces its values evenly, or the spacing of floating-point numbers. None for another type.
        """
        kind = self.quantization(name)
        values = self.tensor(name)
        if kind in MANTISSA:
            return torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=1e-38))) - MANTISSA[kind])
        if kind not in STEPS:
            return None
        size, count, symmetric = STEPS[kind]
        blocks = values.reshape(-1, size)
        low, high = blocks.amin(1), blocks.amax(1)
        extent = torch.maximum(low.abs(), high.abs()) if symmetric else high.clamp(min=0) - low.clamp(max=0)
        return (extent / count).repeat_interleave(size).view(values.shape)

    def quantization(self, name: str) -> str:
        """Return the type in which a tensor is stored, such as "Q8_0"."""
        return self.tensors[name].tensor_type.name

    def quantizations(self) -> dict[str, str]:
        """Return the types of each kind of tensor, such as {"attn_q": "Q4_K", "token_embd": "Q8_0"}.

        Where the layers differ, the types are joined by "+".
        """
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            kind = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
            types = found.setdefault(kind, [])
            if (stored := self.quantization(name)) not in types:
                types.append(stored)
        return {kind: "+".join(sorted(types)) for kind, types in found.items()}

    def vocabulary_reader(self) -> AbstractContextManager[None]:
        """Let transformers read the tokenizer of the file inside the block, as `fast_reader` does."""
        return fast_reader(VocabularyReader)

    @property
    def adds_bos(self) -> bool:
        """Whether texts open with BOS: the file's own flag, or llama.cpp's default where it has none."""
        kind = self.metadata.get("tokenizer.ggml.model")
        by_default = kind == "llama" or self._pre_tokenizer in BYTE_LEVEL_WITH_BOS
        return bool(self.metadata.get("tokenizer.ggml.add_bos_token", by_default))

    @property
    def adds_eos(self) -> bool:
        """Whether texts close with EOS: the file's own flag, or llama.cpp's default where it has none."""
        by_default = self.metadata.get("tokenizer.ggml.model") == "t5"
        return bool(self.metadata.get("tokenizer.ggml.add_eos_token", by_default))

    @property
    def _pre_tokenizer(self) -> str:
        return str(self.metadata.get("tokenizer.ggml.pre", "default"))

    def configure_tokenizer(self, tokenizer: Any) -> None:
        """Give the tokenizer that transformers built from this file the pre-tokenizer and flags of the file.

        transformers 5.22 drops `add_bos_token` and `add_eos_token`, and knows some pre-tokenizers only. A
        `SpectralWarning` is issued for a pre-tokenizer that neither it nor this package knows.
        """
        pre = self._pre_tokenizer
        if self.metadata.get("tokenizer.ggml.model") == "gpt2" and pre not in GGUF_PRE_TOKENIZER_SPLITS:
            if pre in DIGIT_BY_DIGIT:
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            elif pre not in AS_GPT2:
                warnings.warn(
                    f"{self.path.name} names the pre-tokenizer {pre!r}, which is not known here: text is "
                    "split as GPT-2 splits it, which may differ from the model's training; give the model's "
                    "own tokenizer, load(..., tokenizer=...)",
                    SpectralWarning,
                    stacklevel=2,
                )
        if self.adds_bos or self.adds_eos:
            tokenizer.add_bos_token, tokenizer.add_eos_token = self.adds_bos, self.adds_eos


def open_gguf(path: Path) -> GgufFile:
    """Return a file, with what has been read of it already unless it has changed since."""
    state = path.stat()
    return _opened(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _opened(path: Path, changed: int, size: int) -> GgufFile:
    return GgufFile(path)


def _split(path: Path, parts: int) -> str:
    """Return the sentence about one part of a split file."""
    names = [re.sub(r"-\d{5}-of-\d{5}", f"-{i:05d}-of-{parts:05d}", path.name) for i in range(1, parts + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        return f"{path.name} is a part of a file in {parts} parts, and {', '.join(missing)} is missing"
    return f"{path.name} is a part of a file in {parts} parts: join them by `llama-gguf-split --merge`"
