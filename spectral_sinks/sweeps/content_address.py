"""Content addresses: what a number depends on, as one hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import Edit, Interventions
from spectral_sinks.measure.nll import replay
from spectral_sinks.models.attention_sdpa import BLOCKWISE, WHOLE
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import RULE
from spectral_sinks.spectra.cache import fingerprint
from spectral_sinks.spectra.controls import NormRestored
from spectral_sinks.spectra.filters import At, Fill, Filter, Mean, Noise, Swap, Zero
from spectral_sinks.spectra.subspace import Subspace

METRICS = ("nll", "kl", "top1_agreement", "removed_energy_share")


def address(context: Mapping[str, Any], edits: Interventions) -> str:
    """The address of a cell: model, data, metrics, version, and what is done at each site.

    A swap takes its donor from the batch, so `batch_size` enters the address of a cell that swaps. Raises
    InputError for a function that does not say what it is: give it an attribute `address`, a string that
    changes whenever its results do.
    """
    what = {key: value for key, value in context.items() if key != "batch_size"}
    if swapping(edits):
        what["batch_size"] = context["batch_size"]
    places = sorted((site.rank, str(site), of_edit(edit)) for site, edit in edits.items())
    return digest(what | {"edits": [place[1:] for place in places]})


def context(model: LanguageModel, windows: Windows, batch_size: int) -> dict[str, Any]:
    """What all cells of a sweep share. Raises InputError inside `attending`, which no address covers."""
    if model.config._attn_implementation in (BLOCKWISE, WHOLE) or (model.remote and model.remote.looks):
        raise InputError(
            f"the attention of {model.name} is being changed or looked at, of which a stored cell would say "
            "nothing: leave `attending` before a sweep"
        )
    masking = {} if model.causal else {"masking": [RULE, model.mask, sorted(model.tokenizer.all_special_ids)]}
    return masking | {
        "weights": model.fingerprint,
        "data": digest([of_rows(windows), list(map(int, windows.document))]),
        "metrics": [*METRICS, *(["sink_mass"] if replay.reads_sink(model, windows) else [])],
        "version": replay.VERSION,
        "batch_size": batch_size,
    }


def swapping(edits: Interventions) -> bool:
    """Whether what a cell does depends on how windows are batched."""
    return any(isinstance(edit, Filter) and isinstance(edit.fill, Swap) for edit in edits.values())


def of_edit(edit: Edit) -> Any:
    """What identifies a filter: subspaces by their members in a spectrum or by their basis, fill, tokens."""
    if isinstance(edit, NormRestored):
        return ["norm restored", of_edit(edit.filter)]
    if not isinstance(edit, Filter):
        return _own(edit)
    tokens = edit.tokens
    if isinstance(tokens, At):
        tokens = f"positions {tokens.positions}"
    elif isinstance(tokens, Tensor):
        tokens = fingerprint(tokens, None, "mask")
    elif not isinstance(tokens, str):
        tokens = sorted(set(map(int, tokens)))
    through = None if edit.through is None else of_subspace(edit.through)
    return [of_subspace(edit.blocked), through, of_fill(edit.fill), tokens]


def of_rows(windows: Windows) -> str:
    """The token ids of some windows."""
    return digest([row.tolist() for row in windows.rows])


def of_subspace(subspace: Subspace) -> str:
    if subspace.source:
        return f"{subspace.source}, complemented: {subspace.complemented}"
    if subspace.members is not None and subspace.spectrum is not None and subspace.spectrum[0]:
        return fingerprint(subspace.members, None, f"members of {subspace.spectrum[0]}")
    return fingerprint(subspace.basis, None, f"basis, complemented: {subspace.complemented}")


def of_fill(fill: Fill) -> str:
    if isinstance(fill, Zero | Swap):
        return type(fill).__name__.lower()
    if isinstance(fill, Noise):
        return f"noise {fill.seed}"
    if isinstance(fill, Mean):
        if fill.source:
            return f"mean {fill.source}"
        return fingerprint(fill.reference, None, "mean")
    return _own(fill)


def _own(function: Any) -> str:
    found = getattr(function, "address", None)
    if not isinstance(found, str):
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(
            f"{name} has no content address, so its results cannot be stored: give it an attribute "
            "`address`, a string that changes whenever its results do"
        )
    return found


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
