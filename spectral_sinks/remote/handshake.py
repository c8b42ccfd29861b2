"""Checks of a server's model before results rely on it."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.remote.transport import call


def examine(model: LanguageModel) -> dict[str, Any]:
    """Run one token through a remote model, once, and check that it is the intended model.

    Returns what the server reported about itself: versions, dtype, attention implementation, and commit.

    Raises InputError in these cases: the server changes token ids; it has another configuration or another
    BOS policy; it runs in another dtype than the requested one; it returns no attention maps although eager
    attention was requested; a function that changes nothing changes the result; or the modules of a layer do
    not add up.
    """
    remote = model.remote
    assert remote is not None
    if remote.examined is None:
        remote.examined = {}  # so that the probe's own call does not start another probe
        hooks, remote.hooks = remote.hooks, ()
        try:
            remote.examined = _agreed(model, call(model, probe, _ids(model)))
        finally:
            remote.hooks, remote.examined = hooks, remote.examined or None
    return {**(remote.examined or {}), **remote.facts}


def require(model: LanguageModel) -> None:
    """Examine a remote model before the first job relies on it. Raises as `examine` does."""
    assert model.remote is not None
    if model.remote.examined is None:
        examine(model)


def _ids(model: LanguageModel) -> Int[Tensor, "1 1"]:
    return torch.tensor([[0 if model.bos is None else model.bos]])


def probe(model: LanguageModel, ids: Int[Tensor, "1 tokens"]) -> dict[str, Any]:
    """Return what a pass of one token and the server's tokenizer show about the model."""
    nn, layout = model.nn, model.layout
    options = {"logits_to_keep": 1, "use_cache": False} if model.causal else {}
    passes: list[Tensor] = []
    for noop in (False, True):
        with model.nn.trace(**model.inputs(ids), **options):
            seen = nn.get(layout.embedding).input
            layer = model.layer(0)
            entry = layer.input
            attended = model.part(layer, layout.attention).output[1]
            attention = _first(model.part(layer, layout.attention_write).output)
            mlp = _first(model.part(layer, layout.mlp_write).output)
            returned = layer.output
            after = _first(returned)
            if noop:
                layer.output = (
                    (after.clone(), *returned[1:]) if isinstance(returned, tuple) else after.clone()
                )
            final = nn.get(layout.final_norm).output
            logits = nn.get(layout.unembedding).output
            again = nn.get(layout.unembedding)(final)
            own = nn.output.logits
            written = _normed(model, layer, layout.attention_add_norm, entry + attention)
            written = _normed(model, layer, layout.mlp_add_norm, written + mlp)
            passes.append(logits)
    return {
        "ids": seen.tolist(),
        "dtype": str(final.dtype).removeprefix("torch."),
        "maps": attended is not None,
        "noop": bool(torch.equal(passes[0], passes[1])),
        "alone": not isinstance(returned, tuple),
        "adds_up": _near(written, after) and _near(again, logits),
        "logits": _near(model.capped(again.float()), own.float()),
        "settings": model.settings,
        "bos": model.bos,
        "opens_with_bos": model.opens_with_bos,
    }


def _normed(model: LanguageModel, layer: Any, name: str, x: Tensor) -> Tensor:
    return model.part(layer, name)(x) if name else x


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


def _agreed(model: LanguageModel, found: dict[str, Any]) -> dict[str, Any]:
    """Return the findings of the probe that are kept. Raises InputError as `examine` does."""
    remote = model.remote
    assert remote is not None
    host = remote.host
    if found["ids"] != _ids(model).tolist():
        raise InputError(f"{host} runs token ids {found['ids']} where {_ids(model).tolist()} were sent")
    if found["settings"] != model.settings:
        raise InputError(
            f"{host} runs {model.name} with another configuration than this process has: give a revision"
        )
    if model.tokenizer is not None and (found["bos"], found["opens_with_bos"]) != (
        model.bos,
        model.opens_with_bos,
    ):
        raise InputError(
            f"the tokenizer of {model.name} at {host} has BOS {found['bos']} (opens texts: "
            f"{found['opens_with_bos']}), the one in this process {model.bos} ({model.opens_with_bos}): give "
            "a revision"
        )
    if remote.dtype is not None and found["dtype"] != str(remote.dtype).removeprefix("torch."):
        raise InputError(f"{host} runs {model.name} in {found['dtype']}, not in {remote.dtype} as requested")
    if model.reads_attention and not found["maps"]:
        raise InputError(
            f"{host} returns no attention maps for {model.name}, though eager attention was requested, so "
            "sink mass cannot be read: measure the rest with load(..., attention='sdpa')"
        )
    wrong = {
        "noop": "writing back a residual changes logits",
        "adds_up": "the parts of a layer do not add up",
        "alone": "its layers return several values",
        "logits": "its logits are not what the unembedding gives",
    }
    if what := next((said for name, said in wrong.items() if not found[name]), None):
        other = "" if model.tested else f"; a model loaded here is examined for what {model.family} does"
        raise InputError(f"{host} cannot be relied on for {model.name}: {what}{other}")
    return {name: found[name] for name in ("dtype", "bos", "opens_with_bos")}
