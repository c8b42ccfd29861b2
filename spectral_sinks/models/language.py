"""Language models, causal or masked: their modules, sizes and BOS policy."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import BLOCKWISE, OPENING, WHOLE
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.effective_weights import (
    device_of,
    dtype_of,
    effective_embedding,
    effective_weight,
    offloaded,
    usual_weight,
)
from spectral_sinks.models.layout import FAMILIES, context_of
from spectral_sinks.models.masked_lm import predicts_masked
from spectral_sinks.models.traits import find_traits


@dataclass(frozen=True, eq=False)
class LanguageModel(Transformer):
    """A causal or masked language model of transformers, wrapped by nnsight, with its modules located.

    Make one with `load`. `nn` is the nnsight model, for your own traces; `module` is the transformers model.
    """

    nn: TransformersModel
    tokenizer: Any = None

    @cached_property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.module.config.get_text_config()

    @cached_property
    def causal(self) -> bool:
        """Whether the model predicts the next token; False for an encoder, which predicts masked tokens."""
        return not predicts_masked(self.module)

    @property
    def reads_through(self) -> str:
        """Modules between the residual stream and the unembedding, other than one norm; "" for none.

        A masked-LM head has a dense layer and an activation there. Its unembedding reads their output, not
        the residual stream.
        """
        return self.layout.reads_through

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int | None:
        """Longest window that the model was made for, in tokens; None if the configuration does not say."""
        return context_of(self.config)

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its inputs; the CPU if the weights are in another process."""
        return device_of(self.module.get_submodule(self.layout.embedding))

    @property
    def dtype(self) -> torch.dtype:
        if self.remote is not None and self.remote.examined:
            return getattr(torch, self.remote.examined["dtype"])
        return dtype_of(self.module.get_submodule(self.layout.embedding), self.module.dtype)

    @property
    def weightless(self) -> bool:
        """Whether the weights are in another process."""
        head = self.module.get_submodule(self.layout.unembedding)
        weight = next(head.parameters(), None)
        return weight is not None and weight.is_meta and not offloaded(head)

    @property
    def reads_attention(self) -> bool:
        """Whether a trace can read attention weights; of a causal model, at least those of the first 64
        tokens.
        """
        seen = ("eager", WHOLE, OPENING, BLOCKWISE) if self.causal else ("eager", WHOLE)
        return self.config._attn_implementation in seen or self.own_attention is not None

    @property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one matrix."""
        parts = [self.module.get_submodule(name) for name in (self.layout.embedding, self.layout.unembedding)]
        if self.weightless:
            return parts[0].weight is parts[1].weight
        stored = [usual_weight(part) for part in parts]
        if stored[0] is not None and stored[1] is not None:
            return stored[0].data_ptr() == stored[1].data_ptr()
        return torch.equal(self.embedding_weight, self.unembedding_weight)

    @property
    def embedding_weight(self) -> Float[Tensor, "vocabulary d"]:
        """The matrix by which the embedding acts: dequantised, with the adapters that are active."""
        return effective_embedding(self.module.get_submodule(self.layout.embedding))

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary d"]:
        """The matrix by which the unembedding acts: dequantised, with the adapters that are active."""
        return effective_weight(self.module.get_submodule(self.layout.unembedding), self.dtype)

    @property
    def stored_unembedding(self) -> Tensor | None:
        """The stored matrix of the unembedding, if it acts by that and it is in memory; otherwise None."""
        return usual_weight(self.module.get_submodule(self.layout.unembedding))

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token ([CLS] of an encoder); None if the tokenizer has none."""
        return None if self.tokenizer is None else opening_token(self.tokenizer, self.causal)

    @property
    def sep(self) -> int | None:
        """Id of the token that ends the window of an encoder ([SEP]); None for a causal model."""
        return None if self.tokenizer is None or self.causal else self.tokenizer.sep_token_id

    @property
    def mask(self) -> int:
        """Id of the mask token. Raises InputError for a causal model, and if the tokenizer has none."""
        if self.causal:
            raise InputError(f"{self.name} is a causal language model: it masks nothing")
        found = None if self.tokenizer is None else self.tokenizer.mask_token_id
        if found is None:
            raise InputError(
                f"{self.name} came without a tokenizer that has a mask token, and has no masked-token NLL: "
                "load(model, tokenizer=...)"
            )
        return found

    @cached_property
    def opens_with_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        if self.bos is None:
            return False
        return self.tokenizer("a")["input_ids"][:1] == [self.bos]

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids of the tokens that the tokenizer itself puts before a text: mostly BOS or none."""
        if not self.causal or self.tokenizer is None:
            return (self.bos,) if self.opens_with_bos and self.bos is not None else ()
        return opening_ids(self.tokenizer)

    @cached_property
    def closes_with_sep(self) -> bool:
        """Whether the tokenizer itself appends SEP to a text, for an encoder."""
        return self.sep is not None and self.tokenizer("a")["input_ids"][-1:] == [self.sep]

    def unembed(self, final: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocabulary"]:
        """Return the logits, in float32 at least, of residuals that have passed the final norm."""
        if self.weightless:  # inside a trace, nnsight calls the module in the process that has the weights
            logits = self.nn.get(self.layout.unembedding)(final)
        else:
            logits = self.module.get_submodule(self.layout.unembedding).forward(final)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        factor = self.layout.traits.logit_factor
        return self.capped(logits if factor == 1 else factor * logits)

    @property
    def logit_cap(self) -> float | None:
        """The soft cap of the logits, if the model has one (Gemma 2, RecurrentGemma)."""
        caps = (getattr(self.config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        return next((cap for cap in caps if cap is not None), None)

    def capped(self, logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
        """Apply the model's soft cap to logits, if it has one."""
        cap = self.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def inputs(self, batch: Int[Tensor, "batch tokens"]) -> dict[str, Any]:
        """Return the arguments of the model's forward pass for a batch of token ids."""
        return {"input_ids": batch}

    def check(self) -> None:
        """Run a few tokens and check that the modules add up; raises InputError if they do not.

        The residual stream must pass from layer to layer, and the unembedding of the final norm's output must
        be the logits. Sites whose components do not add up are refused when they are used.
        """
        if self.vocabulary < 2:
            raise InputError(f"{self.name} has a vocabulary of {self.vocabulary}")
        if (found := find_traits(self)) != self.layout:
            raise InputError(f"{self.name} ({self.family}) does not run as its layout says: {found}")

    @property
    def tested(self) -> bool:
        return self.family in FAMILIES

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name}, {self.family}, {self.layers} layers, d {self.d}, "
            f"{self.heads} heads, vocabulary {self.vocabulary}, {self.dtype}, "
            f"{'tied' if self.tied else 'untied'})"
        )


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


def token_rows(tokenizer: Any) -> int | None:
    """Return the number of first rows of a vocabulary that tokens of the tokenizer use; None without one."""
    return None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
