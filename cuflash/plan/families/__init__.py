"""The catalogue of kernel families: a file for each architecture, with its tiles, shared memory, configs and plans.

Adding a kernel means adding its ``.cu``/``.cuh`` files and its plan to a family here.
"""

from cuflash.plan.families.simt import SIMT
from cuflash.plan.families.sm80 import SM80
from cuflash.plan.families.sm90 import SM90
from cuflash.plan.family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (SM90, SM80, SIMT)
"""In order of preference: the first without a reason against a problem runs it."""
