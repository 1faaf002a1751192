"""How long attention takes that is divided over devices, beside one of them and beside paper: rows of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ALONE = "one device"
"""The way without others."""


@dataclass(frozen=True, slots=True)
class Divided:
    """What one way of dividing a case took, in seconds of the device that was last; all began together."""

    case: str
    phase: str
    """``forward`` or ``backward``."""
    way: str
    """``one device``, ``ring`` or ``all-to-all``."""
    devices: int
    seconds: float
    """The lower median of the repetitions."""
    on_paper: float
    """What `cuflash.parallel.model` expects."""
    kernels: float | None = None
    """The same program where nothing travels: each message is copied within the device."""
    transfers: float | None = None
    """Its messages alone, one exchange after the other."""
    nbytes: int | None = None
    """That arrived at the device that received most."""
    apart: float | None = None
    """Root mean square of the difference from one device, over that of its results: the worst of outputs or gradients.
    Rounding both to bf16 gives about 2e-3."""


def cells(rows: Iterable[Divided]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: of each case and way the forward, the backward, and both together."""
    runs: dict[tuple[str, str], list[Divided]] = {}
    for row in rows:
        runs.setdefault((row.case, row.way), []).append(row)
    header = [
        "case",
        "way",
        "phase",
        "ms",
        "on paper",
        "of one device",
        "kernels",
        "transfers",
        "of the larger",
        "apart",
    ]
    lines = []
    for (case, way), phases in runs.items():
        together = [(row.phase, [row]) for row in phases]
        if len(phases) > 1:
            together.append(("both", phases))
        for phase, of in together:
            alone = sum(row.seconds for row in runs.get((case, ALONE), []) if phase in ("both", row.phase))
            seconds, kernels, transfers = sum(row.seconds for row in of), _sum(of, "kernels"), _sum(of, "transfers")
            larger = max(kernels or 0.0, transfers or 0.0)
            apart = max((row.apart for row in of if row.apart is not None), default=None)
            lines.append(
                [
                    case,
                    way if way == ALONE else f"{way}, {of[0].devices}",
                    phase,
                    _ms(seconds),
                    _ms(sum(row.on_paper for row in of)),
                    "–" if way == ALONE or not alone else f"{alone / seconds:.2f}x",
                    _ms(kernels),
                    _ms(transfers),
                    f"{seconds / larger:.3f}" if larger else "–",
                    "–" if apart is None else f"{apart:.1e}",
                ]
            )
    return header, lines


def _sum(rows: Iterable[Divided], name: str) -> float | None:
    values = [getattr(row, name) for row in rows]
    return None if None in values else sum(values)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.2f}"
