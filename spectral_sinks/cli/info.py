"""The command `info`: the properties of a checkpoint, and whether it wants BOS."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import spectral_sinks as ss
from spectral_sinks.cli.options import Common, bos_record, bos_row
from spectral_sinks.cli.output import show, table
from spectral_sinks.models.without_torch import describe_without_torch

LARGEST = 2 * 2**30
"""Bytes of weights that are loaded to compare the NLL."""


@dataclass(frozen=True)
class Info(Common):
    """Print the family, sizes, tying, BOS policy, quantisation and context of a model.

    The weights are not read, unless the tokenizer has BOS and does not open texts with it. Then the NLL is
    compared with and without BOS, if the weights are on this machine and take at most 2 GiB.
    """


def run_info(options: Info) -> None:
    found = _described(options)
    found |= _bos(options, found)
    rows = [(k, str(v)) for k, v in found.items() if k != "bos_comparison"]
    if found["opens_with_bos"] and found["causal"]:
        rows.append(
            ("NLL with and without BOS", "not compared, since texts open with it; nll and sinks compare")
        )
    show(options.json, found, table("", ("", ""), rows + bos_row(found)))


def _described(options: Info) -> dict[str, Any]:
    """Describe the checkpoint, in a process without torch if it is not imported yet."""
    where = {"revision": options.revision, "gguf_file": options.gguf_file}
    if not options.trust_remote_code and "torch" not in sys.modules:
        found = describe_without_torch(options.model, **where)
        if found is not None:
            return found
    return ss.describe(options.model, trust_remote_code=options.trust_remote_code, **where)


def _bos(options: Info, found: dict[str, Any]) -> dict[str, Any]:
    """Compare the NLL with and without BOS where a policy without it may be an oversight."""
    if not found["causal"] or found["bos_token"] is None or found["opens_with_bos"]:
        return {}
    from spectral_sinks.measure.nll.bos_policy import LENGTH, WINDOWS  # not for --help
    from spectral_sinks.models.checkpoint import find_source

    source = find_source(options.model, options.revision, options.gguf_file)
    if (size := source.bytes_at_hand) is None or size > LARGEST:
        where = "is not on this machine" if size is None else f"has {size / 2**30:.1f} GiB of weights"
        warnings.warn(
            f"texts do not open with BOS ({found['bos_token']}), and {options.model} {where}: `nll` and "
            "`sinks` compare both",
            ss.SpectralWarning,
            stacklevel=2,
        )
        return {}
    model = options.load(attention="sdpa")
    texts = ss.documents(limit=WINDOWS)
    return bos_record(
        model, ss.cut(texts, model, length=min(LENGTH, model.context or LENGTH), per_document=1)
    )
