"""The strings of special tokens are text in texts, for every kind of tokenizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support import tiny_chats, tiny_models
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import spectral_sinks as ss
from spectral_sinks.data.token_ids import MarkedEncoder, TextEncoder

SAID = "strings of special tokens, such as '{}', which are read as text"


def test_the_embedded_model_reads_bos_as_text() -> None:
    model = ss.load()
    for text in ("<bos>The river", "The <bos> river", "The river<bos>"):
        with pytest.warns(ss.SpectralWarning, match="1 document with " + SAID.format("<bos>")):
            windows = ss.cut([text, "The river rises."], model)
        ids = windows.rows[0].tolist()
        assert ids[0] == model.bos and model.bos not in ids[1:], "BOS is there once"
        assert model.tokenizer.decode(ids[1:]) == text
    assert model.tokenizer("<bos>", add_special_tokens=False)["input_ids"] == [model.bos], "as before"
    assert model.tokenizer.backend_tokenizer.encode_special_tokens is False


def test_an_encoder_reads_its_special_tokens_as_text() -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "mask", "sep", "cls", "a", "river"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    bert = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    known = tiny_models.model("bert")
    model = ss.LanguageModel(known.nn, known.layout, known.name, bert)
    with pytest.warns(ss.SpectralWarning, match="2 documents"):
        windows = ss.cut(["[CLS] a [MASK] river", "a [SEP]"], model, bos="always")
    words = [bert.convert_ids_to_tokens(row.tolist()) for row in windows.rows]
    assert [" ".join(row) for row in words] == [
        "[CLS] [ cls ] a [ mask ] river [SEP]",
        "[CLS] a [ sep ] [SEP]",
    ]


@pytest.mark.parametrize("text", ["a <|end|> b", "<bos>", "<|start|>user\n"])
def test_text_is_bytes_where_the_tokenizer_has_no_merges(text: str) -> None:
    encoder = TextEncoder(tiny_chats.tokenizer(), "bytes")
    assert encoder.read(text, "it") == (tiny_chats.bytes_of(text), [])
    assert encoder.held(text) == [string for string in tiny_chats.SPECIAL if string in text]
    added = "a <think> b"
    assert encoder.read(added, "it")[0] == tiny_chats.ids_of(added, tiny_chats.ADDED), "which is not special"


def test_a_slow_tokenizer() -> None:
    class Slow:
        """Knows one word, and the options of a call."""

        added_tokens_decoder = {0: SimpleNamespace(content="</s>", special=True)}  # noqa: RUF012
        eos_token_id = 0

        def __call__(self, text: str, split_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] * len(text) if split_special_tokens else [0]}

    assert TextEncoder(Slow(), "slow").read("a</s>", "it")[0] == [7] * 5
    bytes_ = transformers.ByT5Tokenizer()  # pyright: ignore
    found = TextEncoder(bytes_, "bytes").read("a</s>", "it")[0]
    assert found == [3 + byte for byte in b"a</s>"]
    assert bytes_("</s>", add_special_tokens=False)["input_ids"] == [bytes_.eos_token_id]


def test_a_padding_token_that_is_a_usual_word() -> None:
    words = tiny_models.tokenizer()
    words.add_special_tokens({"pad_token": "w5"})
    assert TextEncoder(words, "words").read("w4 w5 w6", "it")[0] == [4, 5, 6]
    words.add_special_tokens({"eos_token": "w5"})
    with pytest.raises(ss.InputError, match="it contains 'w5', which the tokenizer of words reads"):
        TextEncoder(words, "words").read("w4 w5 w6", "it")


def test_a_copy_knows_chosen_tokens_by_their_names_alone() -> None:
    copy = MarkedEncoder.of(tiny_chats.tokenizer(), [2, 3])
    text = f"a<|end|>{copy.names[2]}<think>{copy.names[3]}</think>é"
    ids, offsets = copy.encode(text)
    expected = [*tiny_chats.bytes_of("a<|end|>"), 2, *tiny_chats.bytes_of("<think>"), 3, 4]
    assert ids == [*expected, *tiny_chats.bytes_of("é")]
    assert [text[a:b] for a, b in offsets if b - a > 1] == [copy.names[2], copy.names[3], "</think>"]
