"""Many interventions on the same texts: cells, units of work, a store that resumes.

Ladders of bands and tables of effects stand here too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "spectral_sinks",
    submod_attrs={
        "sweeps.band_ladder": ["ladder"],
        "sweeps.cells": ["Cell", "grid"],
        "sweeps.config": ["SweepFile"],
        "sweeps.cost": ["Cost"],
        "sweeps.definition": ["Sweep"],
        "sweeps.effect_rows": ["effect_table"],
        "sweeps.image_band_ladder": ["image_ladder"],
        "sweeps.remote_jobs": ["collect", "jobs"],
        "sweeps.run": ["Done", "Report", "plan", "sweep"],
        "sweeps.store": ["Store"],
    },
)
