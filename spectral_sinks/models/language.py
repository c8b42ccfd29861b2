"""Language models, causal or masked: their modules, sizes and BOS policy."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor, nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_sdpa import BLOCKWISE, OPENING, WHOLE
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.configuration import FAMILIES, context_of, opening_ids, opening_token
from spectral_sinks.models.effective_weights import (
    ADAPTED,
    device_of,
    dtype_of,
    effective_embedding,
    effective_weight,
    offloaded,
    usual_weight,
)
from spectral_sinks.models.encoders import encodes
from spectral_sinks.models.traits import find_traits


@dataclass(frozen=True, eq=False)
class LanguageModel(Transformer):
    """A language model of transformers, causal or an encoder, wrapped by nnsight, with its modules located.

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
        """Whether the model predicts the next token; False for an encoder, which predicts masked tokens or
        nothing.
        """
        return not encodes(self.module)

    @property
    def masks(self) -> bool:
        """Whether the model predicts masked tokens."""
        return not self.causal and self.has_head

    @property
    def has_head(self) -> bool:
        """Whether the model has a head over the vocabulary; False for an encoder alone, such as BertModel."""
        return bool(self.layout.unembedding)

    def require_head(self, purpose: str) -> None:
        """Raise InputError for an encoder without a head; `purpose` says in the message what needs one."""
        if not self.has_head:
            raise InputError(
                f"{purpose} needs a head over the vocabulary, and {self.name} ({type(self.module).__name__}) "
                "is an encoder without one: give a model with a head, or measure sinks, energy and circuits"
            )

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
        head = self.module.get_submodule(self.layout.unembedding or self.layout.embedding)
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
        """Whether embedding and unembedding are one matrix; False without an unembedding."""
        if not self.has_head:
            return False
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
        self.require_head("the unembedding")
        return effective_weight(self.module.get_submodule(self.layout.unembedding), self.dtype)

    @property
    def stored_unembedding(self) -> Tensor | None:
        """The stored matrix of the unembedding, if it acts by that and it is in memory; otherwise None."""
        if not self.has_head:
            return None
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
        """Id of the mask token.

        Raises InputError for a model that predicts no masked tokens, and if the tokenizer has none.
        """
        if self.causal:
            raise InputError(f"{self.name} is a causal language model: it masks nothing")
        self.require_head("the NLL of masked tokens")
        found = None if self.tokenizer is None else self.tokenizer.mask_token_id
        if found is None:
            raise InputError(
                f"{self.name} came without a tokenizer that has a mask token, and has no masked-token NLL: "
                "load(model, tokenizer=...)"
            )
        return found

    @property
    def positions_by_length(self) -> bool:
        """Whether the positions of a text depend on its length, as in dynamic and LongRoPE scaling."""
        kinds = [getattr(part, "rope_type", None) for part in self.module.modules()]
        named = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
        return any(name in ADAPTED for name in named)

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

    @property
    def unembeds_in_parts(self) -> bool:
        """Whether logits of some tokens can be computed alone, from their rows of the stored unembedding."""
        head = self.module.get_submodule(self.layout.unembedding)
        return type(head).forward is nn.Linear.forward and self.stored_unembedding is not None

    def unembed(
        self, final: Float[Tensor, "*batch d"], tokens: slice = slice(None)
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Return the logits, in float32 at least, of residuals that have passed the final norm.

        With `tokens`, the logits are those of consecutive ids. They are computed alone for a model that
        `unembeds_in_parts`.
        """
        self.require_head("a prediction of tokens")
        if self.weightless:  # inside a trace, nnsight calls the module in the process that has the weights
            logits = self.nn.get(self.layout.unembedding)(final)[..., tokens]
        elif tokens != slice(None) and self.unembeds_in_parts:
            head = self.module.get_submodule(self.layout.unembedding)
            bias = None if head.bias is None else head.bias[tokens]
            logits = nn.functional.linear(final, head.weight[tokens], bias)
        else:
            logits = self.module.get_submodule(self.layout.unembedding).forward(final)[..., tokens]
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
            f"{'tied' if self.tied else 'untied' if self.has_head else 'no head'})"
        )


def token_rows(tokenizer: Any) -> Int[Tensor, "tokens"] | None:
    """Return the rows of a vocabulary that tokens of a tokenizer use, in order; None without one."""
    return None if tokenizer is None else torch.tensor(sorted(set(tokenizer.get_vocab().values())))


def rows_of(
    weight: Float[Tensor, "rows columns"], tokens: Int[Tensor, "tokens"] | None
) -> Float[Tensor, "used columns"]:
    """Return the rows of a matrix that belong to tokens, as a view of it where they are its first rows."""
    if tokens is None:
        return weight
    tokens = tokens[tokens < len(weight)]
    last = int(tokens[-1]) + 1
    return weight[:last] if last == len(tokens) else weight[tokens.to(weight.device)]
