"""Sites: where in a model an edit acts on the residual stream."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from spectral_sinks.errors import InputError
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.layout import has

Kind = Literal["embedding", "queries", "keys", "values", "head", "attention", "mlp-input", "mlp", "exit"]
"""The kinds of site, in the order in which a forward pass reaches them within a layer."""

ORDER: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Site:
    """A point in the model at which an edit acts: its kind, its layer, and the head for the kind `head`.

    - `exit`: the residual stream at the exit of the layer
    - `attention`, `mlp`: the output of the component, which is added to the residual stream. In BERT and
      RoBERTa a norm follows the addition, so an exit is not the sum of the entry and the outputs.
    - `head`: the output of one head, before a norm that follows attention (Gemma, OLMo 2)
    - `embedding`: the residual stream that enters layer 0, with position embeddings where they are added
    - `queries`, `keys`, `values`, `mlp-input`: the residual stream as this component reads it. All other
      components and the skip connection read it unedited. The norm of the component acts after the edit.
    """

    kind: Kind = "exit"
    layer: int = 0
    head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ORDER:
            raise InputError(f"site {self.kind!r}: choose from {', '.join(ORDER)}")
        if (self.kind == "head") != (self.head is not None):
            raise InputError(
                "a head site needs its head, as in Site('head', layer, head), and no other site has one"
            )
        if self.kind == "embedding" and self.layer != 0:
            raise InputError("the embedding site has no layer: use Site('embedding')")

    @classmethod
    def parse(cls, text: str, layer: int = 0) -> "Site":
        """Read a site from its name on the command line: `exit`, `mlp`, `head:3`, ..."""
        kind, _, head = text.partition(":")
        if kind not in ORDER or (head and not re.fullmatch(r"\d{1,9}", head)):
            raise InputError(f"site {text!r}: choose from {', '.join(ORDER)}; a head is head:N")
        return cls(kind, 0 if kind == "embedding" else layer, int(head) if head else None)

    def check(self, model: Transformer) -> None:
        """Raise InputError where the model has no such layer or head, or no such site in this layer."""
        if not 0 <= self.layer < model.layers:
            raise InputError(f"layer {self.layer}: {model.name} has layers 0 to {model.layers - 1}")
        if self.head is not None and not 0 <= self.head < model.heads:
            raise InputError(f"head {self.head}: {model.name} has heads 0 to {model.heads - 1}")
        layout, title = model.layout, f"{model.name} ({model.family})"
        if self.kind in layout.traits.lacking:
            raise InputError(
                f"{title} has no site {self.kind!r}, since {layout.traits.lacking[self.kind]}: choose "
                "another site, such as 'exit'"
            )
        if self.kind in ("queries", "keys", "values", "head", "attention"):
            if self.layer not in model.attention_layers:
                raise InputError(
                    f"{self}: layer {self.layer} of {title} has no softmax attention; the layers "
                    f"{', '.join(map(str, model.attention_layers))} have"
                )
        elif self.kind in ("mlp", "mlp-input"):
            layer = model.module.get_submodule(f"{layout.layers}.{self.layer}")
            if not has(layer, layout.mlp):
                raise InputError(f"{self}: layer {self.layer} of {title} has no {layout.mlp!r}")

    @property
    def rank(self) -> tuple[int, int]:
        """The position of the site in the order of a forward pass."""
        return self.layer, ORDER.index(self.kind)

    def __str__(self) -> str:
        if self.kind == "embedding":
            return "embedding"
        return f"{self.kind} {self.layer}" + ("" if self.head is None else f".{self.head}")
