"""Problem x Device -> Plan: which kernel family runs, with which tiles, and why not the others."""

from cuflash.plan.choose import choose, explain, why_not
from cuflash.plan.config import Config
from cuflash.plan.families import FAMILIES, Family
from cuflash.plan.plan import Box, Plan, Scratch, Step, Workspace

__all__ = [
    "FAMILIES",
    "Box",
    "Config",
    "Family",
    "Plan",
    "Scratch",
    "Step",
    "Workspace",
    "choose",
    "explain",
    "why_not",
]
