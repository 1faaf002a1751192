"""Pictures, by matplotlib, which is imported when the first one is drawn: no window, nothing of pyplot's state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".pdf", ".png", ".svg")
"""Of files that pictures are written to."""
SHADES = {"full": "#1f4e79", "partial": "#8fb8de", "skipped": "#eef1f4"}
"""Of tiles all of whose pairs are computed, some, and none."""
SHARES = "Blues"
"""The colours of shares from 0 on."""
DRAWN = 512
"""Tiles along a side of a picture; of more, some are left out."""
INK = "#24292f"
GRID = "#d0d7de"
SERIES = ("#1f4e79", "#d1702e", "#3a8f5d", "#8a5aa8", "#b8860b", "#c2504f", "#4c9aa8", "#7a7a7a")
"""Of cuflash, and of what stands beside it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What was drawn: a notebook shows it, `save` writes it, `figure` is matplotlib's."""

    figure: Any

    def save(self, path: str | Path, dpi: float = 150) -> None:
        """Write PDF, PNG or SVG, by the suffix."""
        self.figure.savefig(path, dpi=dpi, bbox_inches="tight")

    def __repr__(self) -> str:
        width, height = self.figure.get_size_inches()
        return f"<{type(self).__name__}: {width:g} x {height:g} inches>"

    def _repr_png_(self) -> bytes:
        page = io.BytesIO()
        width = self.figure.get_size_inches()[0]
        self.figure.savefig(page, format="png", dpi=110 if width < 8 else 72, bbox_inches="tight")
        return page.getvalue()


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many panels of so many inches each, and a (rows, columns) array of their axes.

    Raises
    ------
    ImportError
        Without matplotlib; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "cuflash draws with matplotlib, which cannot be imported. It comes with the extra viz: "
            "in cuflash's checkout run `pip install -e '.[viz]'`."
        ) from error
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    figure.patch.set_facecolor("white")  # a notebook may be dark
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel(ax: Any, width: float, height: float) -> Any:
    """The caller's axes, or those of a figure of their own."""
    return panels(1, 1, width, height)[1][0, 0] if ax is None else ax


def tiles(
    ax: Any, kinds: Any, counts: Sequence[int], lengths: tuple[int, int], sizes: tuple[int, int], text: str, below: str
) -> Picture:
    """Draw tiles of scores, each by its kind: 0 full, 1 partial, 2 skipped.

    Parameters
    ----------
    ax : matplotlib axes
    kinds : array of int, (rows, columns)
        Of the tiles that are drawn, of long sequences not all.
    counts : sequence of int
        How many tiles of each kind there are.
    lengths, sizes : (int, int)
        Queries and keys of all, and of a tile; the last tiles may reach beyond the last query and key.
    text, below : str
        The title, and the smaller line below it.
    """
    from matplotlib.colors import ListedColormap

    len_q, len_kv = lengths
    reach = [-(-n // size) * size for n, size in zip(lengths, sizes, strict=True)]
    shades = ListedColormap(list(SHADES.values()))
    extent = (0, reach[1], reach[0], 0)
    ax.imshow(kinds, cmap=shades, vmin=-0.5, vmax=2.5, extent=extent, interpolation="nearest", aspect="auto")
    ax.set(xlim=(0, max(len_kv, 1)), ylim=(max(len_q, 1), 0))
    title(ax, text, below)
    total = max(sum(counts), 1)
    for (name, shade), count in zip(SHADES.items(), counts, strict=True):
        label = f"{name} {count / total:.1%}"
        ax.plot([], [], "s", markersize=9, color=shade, markeredgecolor=GRID, label=label)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=8.5, handletextpad=0.2,
        labelcolor=INK,
    )  # fmt: skip
    ax.set_xlabel("key", fontsize=9, color=INK)
    ax.set_ylabel("query", fontsize=9, color=INK)
    quiet(ax)
    if max(kinds.shape) <= 32:
        ax.set_xticks(range(0, len_kv, sizes[1]), minor=True)
        ax.set_yticks(range(0, len_q, sizes[0]), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
    return Picture(ax.figure)


def title(ax: Any, text: str, below: str = "") -> None:
    """A title, and a smaller line below it."""
    ax.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK, pad=22 if below else 8)
    if below:
        ax.text(0, 1.02, below, transform=ax.transAxes, fontsize=8.5, color=INK, va="bottom", ha="left")


def quiet(ax: Any, grid: bool = False) -> None:
    """Less frame, and a grid behind what is drawn."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    ax.tick_params(colors=INK, labelsize=8, color=GRID)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(color=GRID, linewidth=0.6, alpha=0.7)
