"""The command `info`: the properties of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import spectral_sinks as ss
from spectral_sinks.cli.options import Common
from spectral_sinks.cli.output import show, table


@dataclass(frozen=True)
class Info(Common):
    """Print the family, sizes, tying, BOS policy and context of a model, without reading its weights."""


def run_info(options: Info) -> None:
    found = ss.describe(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        gguf_file=options.gguf_file,
    )
    show(options.json, found, table("", ("", ""), [(k, str(v)) for k, v in found.items()]))
