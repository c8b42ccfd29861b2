"""A tokenizer of bytes with special tokens and chat templates, and a small random model that has it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import spectral_sinks as ss
from support import tiny_models

SPECIAL = {"<bos>": 0, "<|start|>": 1, "<|end|>": 2}
ADDED = {"<think>": 3, "</think>": 4, "<|tool|>": 5}
"""Added tokens that the tokenizer does not call special. The template `THOUGHTS` writes all but the last."""
FIRST = 6
"""Byte b has the id FIRST + b."""

Pieces = list[tuple[str, str]]
"""Texts and their roles."""
Messages = Sequence[Mapping[str, str]]

PLAIN = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' }}{{ m['content'] | trim }}{{ '<|end|>' }}{% endfor %}"
)
THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{{ m['role'] + ': ' + text + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def plain(messages: Messages) -> Pieces:
    """Write what `PLAIN` writes."""
    return [
        piece
        for m in messages
        for piece in (
            (f"<|start|>{m['role']}\n", "template"),
            (m["content"], m["role"]),
            ("<|end|>\n", "template"),
        )
    ]


def trimming(messages: Messages) -> Pieces:
    """Write what `TRIMMING` writes."""
    return [
        ("<bos>", "template"),
        *(
            piece
            for m in messages
            for piece in (
                (f"<|start|>{m['role']}\n", "template"),
                (m["content"].strip(), m["role"]),
                ("<|end|>", "template"),
            )
        ),
    ]


def thoughts(messages: Messages) -> Pieces:
    """Write what `THOUGHTS` writes."""
    found: Pieces = []
    for m in messages:
        text = m["content"]
        if m["role"] == "assistant":
            text = text.split("</think>")[-1].strip()
        found += [(f"{m['role']}: ", "template"), (text, m["role"]), ("<|end|>", "template")]
    return found


def bytes_of(text: str) -> list[int]:
    """Return the ids of a text without any special or added token."""
    return [FIRST + byte for byte in text.encode()]


def ids_of(text: str, tokens: Mapping[str, int]) -> list[int]:
    """Return the ids of a text in which the strings of some tokens are these tokens."""
    parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text)
    return [i for part in parts for i in ([tokens[part]] if part in tokens else bytes_of(part))]


def tokenizer(template: str | None = PLAIN) -> transformers.PreTrainedTokenizerFast:
    # the characters that stand for bytes in byte-level BPE, in the order of the bytes
    usual = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in usual]
    characters = {byte: chr(byte) for byte in usual} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    vocabulary = {string: i for string, i in (SPECIAL | ADDED).items()}
    vocabulary |= {characters[byte]: FIRST + byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens([AddedToken(string, normalized=False) for string in SPECIAL])
    made.add_tokens([AddedToken(string, normalized=False, special=False) for string in ADDED])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<|end|>"
    )
    found.chat_template = template
    return found


def model(template: str | None = PLAIN) -> ss.LanguageModel:
    return ss.load(tiny_models.build(vocab_size=FIRST + 256), tokenizer=tokenizer(template))


def save(path: Path) -> Path:
    """Write a checkpoint folder with its tokenizer."""
    tiny_models.build(vocab_size=FIRST + 256).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
