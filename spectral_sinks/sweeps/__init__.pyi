# Made by: python docs/generate_api.py
from .band_ladder import ladder as ladder
from .cells import Cell as Cell
from .cells import grid as grid
from .config import SweepFile as SweepFile
from .cost import Cost as Cost
from .definition import Sweep as Sweep
from .definition import versions as versions
from .effect_rows import effect_table as effect_table
from .image_band_ladder import image_ladder as image_ladder
from .remote_jobs import collect as collect
from .remote_jobs import jobs as jobs
from .run import Done as Done
from .run import Report as Report
from .run import plan as plan
from .run import sweep as sweep
from .store import Store as Store
from .workers import begin_worker as begin_worker

__all__ = [
    'Cell',
    'Cost',
    'Done',
    'Report',
    'Store',
    'Sweep',
    'SweepFile',
    'begin_worker',
    'collect',
    'effect_table',
    'grid',
    'image_ladder',
    'jobs',
    'ladder',
    'plan',
    'sweep',
    'versions',
]
