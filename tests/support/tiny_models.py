"""Small random models of every family, a tokenizer of words, and windows: what many tests measure on."""

import copy
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.cli import main, progress

VOCABULARY, D, LAYERS, HEADS, CONTEXT = 97, 32, 3, 4, 128
BOS, EOS = 0, 1

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": D,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        SIZES | {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "gpt_neox parallel": ("GPTNeoXConfig", SIZES | {"use_parallel_residual": True}),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"use_parallel_residual": False}),
    "olmo2": ("Olmo2Config", SIZES),
    "phi3": ("Phi3Config", SIZES),
    "gpt_oss": (
        "GptOssConfig",
        SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}
FAMILIES = tuple(CONFIGS)

ENCODER_SIZES = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"} | {
    "cls_token_id": BOS,
    "sep_token_id": EOS,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}
ENCODER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", ENCODER_SIZES),
    "roberta": ("RobertaConfig", ENCODER_SIZES | {"max_position_embeddings": CONTEXT + 3}),
    "modernbert": ("ModernBertConfig", ENCODER_SIZES | {"local_attention": 8, "norm_bias": True}),
    "modernbert untied": (
        "ModernBertConfig",
        ENCODER_SIZES | {"tie_word_embeddings": False, "decoder_bias": False, "attention_bias": True},
    ),
}
ENCODERS = tuple(ENCODER_CONFIGS)
"""Bidirectional, with a masked-LM head; `[CLS]` and `[SEP]` have the ids of BOS and EOS."""

MASK = 3


def build(family: str = "llama", *, seed: int = 0, attention: str = "eager", **sizes: Any) -> Any:
    """Make a transformers model with every parameter random: gains and biases too, attention not uniform."""
    kind, given = (CONFIGS | ENCODER_CONFIGS)[family]
    config = getattr(transformers, kind)(**given | sizes)
    auto: Any = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(0.3 * random + ("gemma" not in family) if gain else 0.2 * random)
    return model.eval()


@functools.cache
def _built(family: str) -> Any:
    return build(family)


def plain(family: str = "llama") -> Any:
    """Return a model that nnsight has never touched: the same weights as `model(family)`.

    It is a new copy each time, since a model that a test has wrapped keeps the `forward` that its classes
    had then.
    """
    return copy.deepcopy(_built(family))


@functools.cache
def model(family: str = "llama") -> ss.LanguageModel:
    words = encoder_tokenizer() if family in ENCODERS else tokenizer()
    return ss.load(plain(family), tokenizer=words)


def tokenizer(*, opens: bool = True, bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Split at white space: word `w7` has id 7; `<bos>` has id 0 and `opens` a text."""
    words = {"<bos>": BOS, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if opens and bos:
        made.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    special = {"bos_token": "<bos>"} if bos else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", unk_token="<unk>", **special
    )


def encoder_tokenizer(*, mask: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Split at white space, between `[CLS]` (0) and `[SEP]` (1); word `w7` has id 7, `[MASK]` has 3."""
    special = {"[CLS]": BOS, "[SEP]": EOS, "[UNK]": 2, "[MASK]": MASK}
    words = special | {f"w{i}": i for i in range(4, VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", BOS), ("[SEP]", EOS)]
    )
    named = {"mask_token": "[MASK]"} if mask else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", **named
    )


def save(path: Path, family: str = "llama", **options: Any) -> Path:
    """Write a checkpoint folder with its tokenizer."""
    plain(family).save_pretrained(path, **options)
    (encoder_tokenizer() if family in ENCODERS else tokenizer()).save_pretrained(path)
    return path


def text(words: int, seed: int = 0) -> str:
    drawn = torch.randint(3, VOCABULARY, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in drawn.tolist())


def ids(rows: int = 4, tokens: int = 12, seed: int = 0) -> Tensor:
    """Token ids that open with BOS."""
    drawn = torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = BOS
    return drawn


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run the command line in this process."""
    capsys.readouterr()
    status: Any = 0
    try:
        with patch.object(progress, "EVERY", 1e6):  # on a busy machine any command may take long
            main([*map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return Ran(status, captured.out, captured.err)


def documented_keys() -> dict[str, str]:
    """Return what the page of the command line says of the keys of `--json`, by command."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    rows = re.findall(r"^- \*\*`([\w-]+)`\*\*: (.*(?:\n  .*)*)", page[page.index("## JSON") :], re.MULTILINE)
    return {command: " ".join(keys.split()) for command, keys in rows}


def keys_of(said: str) -> set[str]:
    """Return the keys that such a text names, without those inside them."""
    return set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", said)))


def logits(trace_model: ss.LanguageModel, token_ids: Tensor, edits: Any, **options: Any) -> Tensor:
    """Logits of a traced pass: the unembedding of what leaves the final norm."""
    return ss.trace(
        trace_model, token_ids, edits, readout=lambda final, *_: trace_model.unembed(final), **options
    )
