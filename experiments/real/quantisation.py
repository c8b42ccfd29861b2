"""What quantisation breaks in a real model: the experiment of the embedded model on fewer documents.

The first eight documents and three draws of each control, since each kind of quantisation takes a pass for
every draw. The sites that are quantised alone are the embedding, the exits that other experiments edit, and
the last exit.
"""

from dataclasses import replace
from typing import Any

from real_study import RealStudy

import spectral_sinks as ss

DOCUMENTS, DRAWS = 8, 3


def run(study: RealStudy) -> ss.experiments.Finding:
    own = study.windows
    few = ss.Windows.of_ids(own.rows[:DOCUMENTS], study.model, own.document[:DOCUMENTS])
    exits = sorted({*study.exits, study.model.layers - 1})
    experiment: Any = ss.experiments.find_experiment("quantisation")
    return experiment(
        replace(study, windows=few, draws=min(study.draws, DRAWS)),
        alone=[ss.Site("embedding"), *(ss.Site("exit", layer) for layer in exits)],
    )
