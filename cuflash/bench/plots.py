"""Pictures of a run: how many times faster cuflash is than each peer, and rates below the roofs of the card."""

from __future__ import annotations

from typing import Any, NamedTuple

from cuflash import drawing
from cuflash.bench.peers.product import NAME as PRODUCT
from cuflash.bench.report import YARDSTICKS, Group, Report, Row, beside_peers, by_case, geometric_mean
from cuflash.errors import InvalidArgument
from cuflash.verify.deviations import OWN


class Peak(NamedTuple):
    """What a datasheet promises."""

    tflops: float
    """Of 16-bit products on dense matrices."""
    tbps: float
    """Terabytes a second of device memory."""


# The SXM cards' datasheets.
PEAKS: dict[str, Peak] = {
    "NVIDIA A100": Peak(312, 2.039),
    "NVIDIA H100": Peak(989.4, 3.35),
    "NVIDIA H200": Peak(989.4, 4.8),
    "NVIDIA B200": Peak(2250, 8.0),
}

_ROW = 0.205
"""Inches of a case."""


def draw(report: Report) -> drawing.Picture:
    """Both pictures of every phase side by side: ratios on the left, rates on the right.

    Raises
    ------
    InvalidArgument
        If the run has no times.
    ImportError
        Without matplotlib, which comes with the extra viz.
    """
    phases = by_case(report.rows)
    if not phases:
        raise InvalidArgument("the run has no times to draw; name a file of one that measured them.")
    most = max(len(cases) for cases in phases.values())
    figure, panels = drawing.panels(len(phases), 2, 6.4, max(4.2, 1.6 + _ROW * most))
    colours = _colours(report)
    for ((phase, mode), cases), (left, right) in zip(phases.items(), panels, strict=True):
        label = phase if mode == "burst" else f"{phase}, {mode}"
        _ratios(left, label, cases, colours)
        _rates(right, label, report.device, cases, colours)
    figure.suptitle(f"{report.device}, {report.date[:10]}", x=0.01, ha="left", fontsize=9, color=drawing.INK)
    return drawing.Picture(figure)


def _colours(report: Report) -> dict[str, str]:
    """One for each implementation in all panels."""
    peers = dict.fromkeys(row.impl for row in report.rows if row.impl not in (OWN, *YARDSTICKS))
    others = drawing.SERIES[1:]
    return {OWN: drawing.SERIES[0]} | {impl: others[i % len(others)] for i, impl in enumerate(peers)}


def _ratios(ax: Any, label: str, cases: dict[str, Group], colours: dict[str, str]) -> None:
    """A line for each case, a point for each peer; a ring around the fastest."""
    ratios = {case: beside_peers(group) for case, group in cases.items()}
    ratios = {case: of_peers for case, of_peers in ratios.items() if of_peers}
    best = geometric_mean([min(of_peers.values()) for of_peers in ratios.values()])
    mean = "no peer was measured" if best is None else f"geometric mean beside the fastest: {best:.2f}x"
    drawing.title(ax, f"{label}: how many times faster {OWN} is", mean)
    drawing.quiet(ax)
    ax.grid(axis="x", color=drawing.GRID, linewidth=0.6, alpha=0.7)
    ax.axvline(1, color=drawing.INK, linewidth=1)
    for impl, colour in colours.items():
        points = [(of_peers[impl], y) for y, of_peers in enumerate(ratios.values()) if impl in of_peers]
        if points:
            own_mean = geometric_mean([ratio for ratio, _ in points])
            ax.scatter(*zip(*points, strict=True), s=26, color=colour, linewidths=0, label=f"{impl} {own_mean:.2f}x")
    for y, of_peers in enumerate(ratios.values()):
        least, most = min(of_peers.values()), max(of_peers.values())
        ax.plot([least, most], [y, y], color=drawing.GRID, linewidth=1.2, zorder=0.9)
        ax.scatter([least], [y], s=60, facecolors="none", edgecolors=drawing.INK, linewidths=0.9)
    ax.set_yticks(range(len(ratios)), list(ratios), fontsize=7)
    ax.set_ylim(len(ratios) - 0.4, -0.6)
    _multiples(ax, [ratio for of_peers in ratios.values() for ratio in of_peers.values()])
    if ratios:
        _legend(ax)


def _multiples(ax: Any, ratios: list[float]) -> None:
    """A scale on which twice and half are as far from 1."""
    low, high = min([*ratios, 0.9]) / 1.06, max([*ratios, 1.15]) * 1.06
    marks = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 2, 3, 5, 10, 20, 50, 100]
    shown = [mark for mark in marks if low <= mark <= high]
    if high / low > 4:
        shown = [mark for mark in shown if mark not in (0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.6)]
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_xticks(shown, [f"{mark:g}x" for mark in shown])
    ax.minorticks_off()


def _rates(ax: Any, label: str, device: str, cases: dict[str, Group], colours: dict[str, str]) -> None:
    """TFLOP/s over FLOPs a byte that must be moved, below what the card and its matrix product reach."""
    rows: list[Row] = [row for group in cases.values() for row in group.values()]
    timed = [row for row in rows if row.impl not in YARDSTICKS and row.tflops > 0 and row.gbps > 0]
    peak = next((PEAKS[name] for name in PEAKS if device.startswith(name)), None)
    if not any(row.dtype in ("bf16", "fp16") for row in timed):
        peak = None
    product = max((row.tflops for row in rows if row.impl == PRODUCT), default=None)
    drawing.title(ax, f"{label}: rate by intensity", "each point a case; bytes count once, as read or written")
    drawing.quiet(ax, grid=True)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for impl, colour in colours.items():
        points = [(_intensity(row), row.tflops) for row in timed if row.impl == impl]
        if points:
            own = impl == OWN
            ax.scatter(
                *zip(*points, strict=True), s=30 if own else 20, color=colour, alpha=1 if own else 0.65,
                marker="o" if own else "D", linewidths=0.5, edgecolors="white", label=impl, zorder=3 if own else 2,
            )  # fmt: skip
    if timed:
        xs, ys = [_intensity(row) for row in timed], [row.tflops for row in timed]
        left, right = min(xs) / 1.6, max(xs) * 1.6
        roof = [top for top in (peak and peak.tflops, product) if top]
        ax.set_xlim(left, right)
        ax.set_ylim(min(ys) / 1.3, max([*ys, *roof]) * 1.25)
        _plain(ax.xaxis, left, right)
        _plain(ax.yaxis, *ax.get_ylim())
        if peak is not None:
            edge = peak.tflops / peak.tbps
            line = [(x, min(peak.tflops, x * peak.tbps)) for x in (left, min(max(edge, left), right), right)]
            ax.plot(*zip(*line, strict=True), color=drawing.INK, linewidth=1.1, zorder=1)
            _above(
                ax,
                right,
                min(peak.tflops, right * peak.tbps),
                f"datasheet: {peak.tflops:g} TFLOP/s, {peak.tbps:g} TB/s",
            )
        if product is not None:
            ax.axhline(product, color=drawing.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            _below(ax, right, product, f"matrix product, {product:.0f} TFLOP/s")
        _legend(ax)
    ax.set_xlabel("FLOPs a byte", fontsize=9, color=drawing.INK)
    ax.set_ylabel("TFLOP/s", fontsize=9, color=drawing.INK)


def _intensity(row: Row) -> float:
    return row.tflops * 1e3 / row.gbps


def _plain(axis: Any, low: float, high: float) -> None:
    """Whole numbers along a logarithmic axis."""
    marks = [step * 10.0**power for power in range(-6, 9) for step in (1, 2, 3, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    inside = inside if len(inside) <= 8 else [mark for mark in inside if f"{mark:e}"[0] in "125"]
    axis.set_ticks(inside, [f"{mark:,.10g}" for mark in inside])
    axis.set_minor_locator(axis.get_major_locator())


def _above(ax: Any, x: float, y: float, text: str) -> None:
    ax.annotate(text, (x, y), (-3, 3), textcoords="offset points", ha="right", fontsize=7.5, color=drawing.INK)


def _below(ax: Any, x: float, y: float, text: str) -> None:
    ax.annotate(text, (x, y), (-3, -3), textcoords="offset points", ha="right", va="top", fontsize=7.5)


def _legend(ax: Any) -> None:
    """Below the panel and what its axis is called."""
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.6, ncols=min(len(labels), 4),
        frameon=False, fontsize=8, handletextpad=0.1, columnspacing=1.2, labelcolor=drawing.INK,
    )  # fmt: skip
