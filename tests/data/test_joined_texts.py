"""Texts of joined documents hold their tokens in order, open once, and begin with documents."""

import pytest
import torch
from support import tiny_models

import spectral_sinks as ss

join = ss.nll.join_documents


def test_documents_are_joined_until_a_text_is_long_enough() -> None:
    model = tiny_models.model()
    texts = ["w3 w4 w5", "w6 w7 w8", "w9 w10 w11", "w12 w13 w14", "w15 w16 w17"]
    assert join(texts, model, length=5, count=2).tolist() == [[0, 3, 4, 5, 6], [0, 9, 10, 11, 12]]
    assert join(texts, model, length=4, count=5)[:, 1:].tolist() == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(1, 6)
    ]
    assert join(texts, model, length=5, count=1, bos="never").tolist() == [[3, 4, 5, 6, 7]]
    assert join(texts, model, length=16).tolist() == [[0, *range(3, 18)]]


def test_a_single_document_gives_consecutive_texts() -> None:
    model = tiny_models.model()
    assert join(["w3 w4 w5 w6 w7"], model, length=3, count=2).tolist() == [[0, 3, 4], [0, 5, 6]]


def test_a_text_may_exceed_the_context() -> None:
    model = tiny_models.model()
    assert join([tiny_models.text(400)], model, length=300).shape == (1, 300)


def test_less_than_was_asked_for_is_said() -> None:
    model = tiny_models.model()
    with pytest.warns(ss.SpectralWarning, match="give 2 texts of 3 tokens, and 4 were asked for"):
        assert len(join(["w3 w4 w5 w6"], model, length=3, count=4)) == 2
    with pytest.warns(ss.SpectralWarning, match="have 3 tokens, and 9 were asked for: all of them are read"):
        assert torch.equal(join(["w3 w4"], model, length=9), torch.tensor([[0, 3, 4]]))


@pytest.mark.filterwarnings("ignore:the documents")
def test_bad_input_is_refused() -> None:
    model = tiny_models.model()
    with pytest.raises(ss.InputError, match="of at least 3 tokens"):
        join(["w3 w4"], model, length=2)
    with pytest.raises(ss.InputError, match="fewer than two tokens"):
        join(["w3"], model, length=9)
    other = ss.load(tiny_models.plain(), tokenizer=tiny_models.tokenizer(bos=False))
    with pytest.raises(ss.InputError, match="no BOS token"):
        join(["w3 w4"], other, length=3, bos="always")
    with pytest.raises(ss.InputError, match="without a tokenizer"):
        join(["w3"], ss.load(tiny_models.plain()), length=3)


def test_a_single_document_need_not_be_a_list() -> None:
    """Its letters are no documents."""
    model, text = tiny_models.model(), tiny_models.text(40)
    found = ss.nll.join_documents(text, model, length=10, count=3)
    assert torch.equal(found, ss.nll.join_documents([text], model, length=10, count=3))
    assert found[:, 1:].flatten().tolist() == [int(word[1:]) for word in text.split()][:27]


@pytest.mark.usefixtures("unchecked")
def test_a_table_is_no_document() -> None:
    with pytest.raises(ss.InputError, match="read files and tables by"):
        ss.nll.join_documents({"text": ["w5 w6 w7"]}, tiny_models.model(), length=3)
