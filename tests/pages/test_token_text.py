"""Tokens as text: whole characters, visible control characters, and the direction of the letters."""

import unicodedata

import pytest
import transformers
from support import page_models, tiny_models
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

import spectral_sinks as ss
from spectral_sinks.pages.token_text import direction, labelled, shown_tokens, visible


def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """Characters a to z and a space, and any other character by its bytes, as in SentencePiece models."""
    words = ["<unk>", "<bos>", "▁", *map(chr, range(97, 123)), *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(
        BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    made.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def test_a_character_of_several_bytes_stands_in_the_first_of_its_tokens() -> None:
    tokenizer = byte_fallback()
    pieces = ["<bos>", "a", "▁", "<0xE2>", "<0x82>", "<0xAC>", "b", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    tokens = shown_tokens(tokenizer.convert_tokens_to_ids(pieces), tokenizer)
    assert [t.text for t in tokens] == ["<bos>", "a", " ", "€", "·", "·", "b", "😀", "·", "·", "·"]
    assert [t.kind for t in tokens][:5] == ["special", "text", "text", "text", "part"]
    assert tokens[5].label == "part 3 of 3 of €"


def test_bytes_that_are_no_character_do_not_swallow_what_follows() -> None:
    tokenizer = byte_fallback()
    tokens = shown_tokens(tokenizer.convert_tokens_to_ids(["<0xE2>", "a", "<0xFF>", "<bos>", "b"]), tokenizer)
    assert [t.text for t in tokens] == ["\ufffd", "a", "\ufffd", "<bos>", "b"]


@pytest.mark.parametrize(
    "text", ["Hello, world", "naïve café", "日本語のテキスト", "السلام عليكم", "👩\u200d🔬 tests", "a\n\n\tb"]
)
def test_the_tokens_of_the_embedded_model_add_up_to_the_text(text: str) -> None:
    model = ss.load()
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = shown_tokens(ids, model.tokenizer)
    assert len(tokens) == len(ids)
    joined = "".join(token.text for token in tokens if token.kind != "part")
    assert joined.replace("⏎", "").replace("⇥", "").strip() == text


def test_without_a_tokenizer_a_token_is_its_number() -> None:
    assert [token.label for token in shown_tokens([5, 7], None)] == ["#5", "#7"]


def test_control_characters_are_visible_and_change_nothing() -> None:
    assert visible("\x1b[31mred\x1b[0m") == "␛[31mred␛[0m"
    assert visible("a\x00\x7f") == "a␀␡"
    assert visible("\u202eabc\u2066") == "⟨U+202E⟩abc⟨U+2066⟩"
    assert visible("\ud800") == "⟨U+D800⟩"
    assert visible("नमस्ते \u200d") == "नमस्ते \u200d", "scripts need their joiners"
    for code in (*range(0x300), *range(0x2000, 0x2100), 0xFEFF, 0xE0001, 0xD800, 0xDFFF, 0x10FFFF):
        shown = visible(chr(code))
        if code not in (0x0A, 0x09, 0x200C, 0x200D):
            assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)


def test_a_label_shows_spaces_and_gives_a_mark_something_to_stand_on() -> None:
    assert labelled(" the") == "␣the" and labelled("\n") == "⏎" and labelled("\u0301") == "◌\u0301"


def test_the_direction_is_that_of_most_letters_not_of_special_tokens() -> None:
    model = page_models.model()

    def of(text: str) -> str:
        return direction(shown_tokens(model.tokenizer(text)["input_ids"], model.tokenizer))

    assert of(page_models.right_to_left_text()) == "rtl"
    assert of(tiny_models.text(9)) == "ltr" and of(f"سلام {tiny_models.text(9)}") == "ltr"
