"""Content addresses: a hash of everything that a number depends on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.memory import BATCH
from spectral_sinks.measure.nll import replay
from spectral_sinks.measure.nll.scoring import Sample
from spectral_sinks.models.attention_sdpa import BLOCKWISE, WHOLE
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.masked_lm import RULE
from spectral_sinks.models.patches import patches
from spectral_sinks.spectra.edits import as_edit, as_edits

METRICS = ("nll", "kl", "top1_agreement", "removed_energy_share")


def address(context: Mapping[str, Any], edits: Interventions) -> str:
    """Return the address of a cell: a hash of model, data, metrics, version, and the edit at each site.

    A swap pairs windows in groups of `BATCH`, which enters the address of a cell that swaps. Raises
    InputError for a function without an attribute `address`, a string that changes whenever its results do.
    """
    what = {key: value for key, value in context.items() if key != "batch_size"}
    if swapping(edits):
        what["batch_size"] = BATCH
    ordered = sorted((site.rank, str(site), edit.address) for site, edit in as_edits(edits).items())
    return digest(what | {"edits": [[site, edit] for _, site, edit in ordered]})


def context(
    model: LanguageModel, windows: Windows, batch_size: int, predict: Sample | None = None
) -> dict[str, Any]:
    """Return what all cells of a sweep share.

    Raises InputError inside `attending`, which no address covers, and for a model with hooks or functions of
    a user's own that have no address.
    """
    if model.config._attn_implementation in (BLOCKWISE, WHOLE) or (model.remote and model.remote.hooks):
        raise InputError(
            f"the attention of {model.name} is being edited or recorded, which the address of a cell does "
            "not include: leave `attending` before a sweep"
        )
    masking = {} if model.causal else {"masking": [RULE, model.mask, sorted(model.tokenizer.all_special_ids)]}
    own = {"patches": acting} if (acting := patches(model)) else {}
    sampled = {} if predict is None else {"predict": [predict.count, predict.seed]}
    return (
        masking
        | own
        | sampled
        | {
            "weights": model.fingerprint,
            "data": digest([of_rows(windows), list(map(int, windows.document))]),
            "metrics": [*METRICS, *(["sink_mass"] if replay.reads_sink(model, windows) else [])],
            "version": replay.VERSION,
            "batch_size": batch_size,
        }
    )


def swapping(edits: Interventions) -> bool:
    """Whether a cell pairs windows, so that a batch must hold both."""
    return any(as_edit(edit).swaps for edit in edits.values())


def of_rows(windows: Windows) -> str:
    """Return a hash of the token ids of some windows."""
    return digest([row.tolist() for row in windows.rows])


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
