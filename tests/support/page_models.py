"""A tiny model whose tokens would break a page that reads them as markup, and texts of them."""

import functools

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

import spectral_sinks as ss
from support import tiny_models

HOSTILE = (
    "<script>document.body.dataset.hacked=1</script>",
    "</script><img src=x onerror=document.body.dataset.hacked=1>",
    "<!--",
    "[bold]",
    "\x1b[31m",
    "<b>bold</b>",
    "{{7*7}}",
    "\u202eevil",
    "\u0301",
    "سلام",
    "שלום",
    '"&quot;',
)
"""Words of the vocabulary, in the place of its first ones."""


@functools.cache
def model() -> ss.LanguageModel:
    """Return a tiny model that knows `HOSTILE` as its tokens 3, 4, ..."""
    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, tiny_models.VOCABULARY)}
    for place, word in enumerate(HOSTILE):
        del words[f"w{place + 3}"]
        words[word] = place + 3
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Split(" ", "removed")  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    return ss.load(tiny_models.plain(), tokenizer=tokenizer)


def hostile_text(words: int = 70, seed: int = 0) -> str:
    """Return a text that begins with every hostile word."""
    return " ".join([*HOSTILE, *tiny_models.text(words, seed).split()])


def right_to_left_text(words: int = 30) -> str:
    return " ".join(["سلام", "שלום"] * (words // 2))
