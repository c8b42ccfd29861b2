"""Many interventions on the same texts: cells, units of work, a store that resumes.

The package also has ladders of bands and tables of effects.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "band_ladder": ["ladder"],
        "cells": ["Cell", "grid"],
        "config": ["SweepFile"],
        "cost": ["Cost"],
        "definition": ["Sweep", "versions"],
        "effect_rows": ["effect_table"],
        "image_band_ladder": ["image_ladder"],
        "remote_jobs": ["collect", "jobs"],
        "run": ["Done", "Report", "plan", "sweep"],
        "store": ["Store"],
        "workers": ["begin_worker"],
    },
)
