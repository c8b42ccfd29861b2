"""A language model, causal or masked, as the rest of the package sees it: parts, sizes, BOS policy."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from nnsight import TransformersModel
from torch import Tensor, nn

from spectral_sinks.errors import InputError
from spectral_sinks.models.layout import FAMILIES, Layout, context_of
from spectral_sinks.models.masked import predicts_masked
from spectral_sinks.models.norms import gain_of
from spectral_sinks.models.opening import BLOCKWISE, OPENING, WHOLE, is_softmax

INCIDENTAL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Settings that do not change what a model computes."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A transformers language model, causal or masked, wrapped by nnsight, with its parts found.

    Make one with `load`. `nn` is the nnsight model for traces of one's own; `module` the transformers model.
    """

    nn: TransformersModel
    layout: Layout
    name: str
    tokenizer: Any = None

    @property
    def module(self) -> Any:
        """The transformers model itself."""
        return self.nn._module

    @cached_property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.module.config.get_text_config()

    @cached_property
    def causal(self) -> bool:
        """Whether it predicts the next token; False for an encoder, which predicts masked tokens."""
        return not predicts_masked(self.module)

    @property
    def reads_through(self) -> str:
        """What stands between the residual stream and the unembedding beside one norm; "" for nothing.

        A masked-LM head has a dense layer and an activation there: its unembedding reads their output, and
        not the residual stream.
        """
        return self.layout.reads_through

    @property
    def family(self) -> str:
        return self.config.model_type

    @cached_property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.module.get_submodule(self.layout.layers))

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def heads(self) -> int:
        """Number of query heads per layer."""
        return self.config.num_attention_heads

    @property
    def head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.d // self.heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads per layer (fewer than `heads` in grouped-query attention)."""
        if self.layout.fused == "heads":
            return self.heads
        return getattr(self.config, "num_key_value_heads", None) or self.heads

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int | None:
        """Longest window the model was made for, in tokens; None where its configuration does not say."""
        return context_of(self.config)

    @property
    def device(self) -> torch.device:
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_weight.dtype

    @property
    def reads_attention(self) -> bool:
        """Whether a trace can see attention weights; of the first 64 tokens at least for a causal model."""
        seen = ("eager", WHOLE, OPENING, BLOCKWISE) if self.causal else ("eager", WHOLE)
        return self.config._attn_implementation in seen or self.own_attention is not None

    @property
    def own_attention(self) -> str | None:
        """Name of an attention implementation that is not transformers' and may be no softmax, else None."""
        name = self.config._attn_implementation
        return None if name is None or is_softmax(name) else name

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one matrix."""
        a, b = self.embedding_weight, self.unembedding_weight
        return a is b or (a.data_ptr() == b.data_ptr() and a.device.type != "meta")

    @property
    def embedding_weight(self) -> Float[Tensor, "vocabulary d"]:
        return self.module.get_submodule(self.layout.embedding).weight

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary d"]:
        return self.module.get_submodule(self.layout.unembedding).weight

    @cached_property
    def final_gain(self) -> Float[Tensor, "d"]:
        """The gain of the final norm as it acts, float32: `weight`, or `1 + weight` (Gemma)."""
        return gain_of(self.module.get_submodule(self.layout.final_norm), self.d)

    @property
    def centres_residual(self) -> bool:
        """Whether the final norm removes the residual's own mean (LayerNorm)."""
        return isinstance(self.module.get_submodule(self.layout.final_norm), nn.LayerNorm)

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token ([CLS] of an encoder); None where the tokenizer has none."""
        return None if self.tokenizer is None else opening_token(self.tokenizer, self.causal)

    @property
    def sep(self) -> int | None:
        """Id of the token that ends an encoder's window ([SEP]); None for a causal model."""
        return None if self.tokenizer is None or self.causal else self.tokenizer.sep_token_id

    @property
    def mask(self) -> int:
        """Id of the mask token. Raises InputError for a causal model, and where the tokenizer has none."""
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
    def closes_with_sep(self) -> bool:
        """Whether the tokenizer itself puts SEP behind a text, for an encoder."""
        return self.sep is not None and self.tokenizer("a")["input_ids"][-1:] == [self.sep]

    def layer(self, index: int) -> Any:
        """The nnsight envoy of a layer. Raises InputError for a layer that does not exist."""
        if not 0 <= index < self.layers:
            raise InputError(f"layer {index}: {self.name} has layers 0 to {self.layers - 1}")
        return self.nn.get(self.layout.layers)[index]

    def part(self, layer: Any, name: str) -> Any:
        """A named part inside a layer's envoy; nnsight serves a module called `output` as `E_output`."""
        return layer.get(re.sub(r"\boutput\b", "E_output", name))

    def unembed(self, final: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocabulary"]:
        """Logits, float32 at least, of residuals that have passed the final norm."""
        logits = self.module.get_submodule(self.layout.unembedding).forward(final)
        return self.capped(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def capped(self, logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
        """Logits after the model's soft cap, where it has one (Gemma 2)."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def head_write(self, layer: int, head: int) -> Float[Tensor, "head_size d"]:
        """The slice of W_O that carries one head's output into the residual stream."""
        if not 0 <= head < self.heads:
            raise InputError(f"head {head}: {self.name} has heads 0 to {self.heads - 1}")
        path = f"{self.layout.layers}.{layer}.{self.layout.attention_projection}"
        projection = self.module.get_submodule(path)
        weight = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
        return weight[head * self.head_size : (head + 1) * self.head_size]

    def projection_index(self, which: str) -> Tensor | slice:
        """Which outputs of the projection named in the layout are `queries`, `keys` or `values`."""
        if not self.layout.fused:
            return slice(None)
        size, order = self.head_size, ("queries", "keys", "values")
        if self.layout.fused == "heads":
            start = torch.arange(self.heads)[:, None] * 3 * size + order.index(which) * size
            return (start + torch.arange(size)).flatten()
        lengths = [self.heads * size, self.key_heads * size, self.key_heads * size]
        start = sum(lengths[: order.index(which)])
        return slice(start, start + lengths[order.index(which)])

    def check(self) -> None:
        """Run two tokens and see that the parts add up; raises InputError where they do not.

        Each layer's exit must be its entry plus what attention and MLP wrote (in a post-norm layer, normed
        after each), and the unembedding of the final norm's output must be the logits.
        """
        if self.vocabulary < 2:
            raise InputError(f"{self.name} has a vocabulary of {self.vocabulary}")
        ids = torch.tensor([[0, 1]], device=self.device)
        seen: dict[str, Tensor] = {}
        handles: list[Any] = []

        def watch(path: str, key: str) -> None:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                seen[key] = output[0] if isinstance(output, tuple) else output
                seen[key + " input"] = inputs[0] if inputs else seen[key]

            handles.append(self.module.get_submodule(path).register_forward_hook(hook))

        for index in range(self.layers):
            path = f"{self.layout.layers}.{index}"
            watch(path, f"exit {index}")
            watch(f"{path}.{self.layout.attention_write}", f"attention {index}")
            watch(f"{path}.{self.layout.mlp_write}", f"mlp {index}")
        watch(self.layout.final_norm, "final")
        try:
            with torch.no_grad():
                options = {"use_cache": False} if self.causal else {}
                logits = self.module(input_ids=ids, **options).logits
        finally:
            for handle in handles:
                handle.remove()
        for index in range(self.layers):
            entry = seen[f"exit {index - 1}"] if index else seen["exit 0 input"]
            layer = self.module.get_submodule(f"{self.layout.layers}.{index}")
            total = normed(layer, self.layout.attention_add_norm, entry + seen[f"attention {index}"])
            total = normed(layer, self.layout.mlp_add_norm, total + seen[f"mlp {index}"])
            if not torch.allclose(
                total, seen[f"exit {index}"], rtol=1e-2, atol=1e-2 * float(total.abs().max())
            ):
                raise InputError(
                    f"{self.name} ({self.family}): layer {index} is not entry + attention + MLP with the "
                    f"parts {self.layout.attention_write!r} and {self.layout.mlp_write!r}; name them by "
                    "hand: load(model, parts={'attention_write': ..., 'mlp_write': ...})"
                )
        if not torch.allclose(self.unembed(seen["final"]), logits.float(), rtol=1e-2, atol=1e-2):
            raise InputError(
                f"{self.name} ({self.family}): logits are not unembedding(final norm); its NLL would be wrong"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all weights and the configuration: what the model computes depends on nothing else."""
        digest = hashlib.sha256()
        settings = {k: v for k, v in self.config.to_dict().items() if k not in INCIDENTAL}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if tensor.device.type == "meta":
                raise InputError(f"{self.name}: the weights of {name!r} are not in memory, so have no hash")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
    """Id of the token that opens a text: BOS, or [CLS] of an encoder that has one."""
    if causal or tokenizer.cls_token_id is None:
        return tokenizer.bos_token_id
    return tokenizer.cls_token_id


@torch.no_grad()
def normed(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """The output of a layer's norm, or the input where there is no such norm."""
    return layer.get_submodule(name).forward(x) if name else x
