"""Keys and values that lie in pages of a cache, read a tile at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PagedRows:
    """One sequence of a cache, read like a (1, length, heads_kv, 1, d) array of grouped keys or values."""

    pages: np.ndarray  # (num_pages, page_size, heads_kv, d)
    table: np.ndarray  # (max_pages,) page numbers, in the order of the sequence
    length: int
    first: int = 0  # the row of the first page at which the sequence begins

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(1, length, heads_kv, d), as if the rows were one tensor."""
        return 1, self.length, *self.pages.shape[2:]

    def __getitem__(self, tile: tuple[slice, slice, slice]) -> np.ndarray:
        """Copy (batches, rows, heads) together from the pages that hold them."""
        _, rows, heads = tile
        page, row = np.divmod(np.arange(rows.start, rows.stop) + self.first, self.pages.shape[1])
        return self.pages[self.table[page], row, heads][None, :, :, None]
