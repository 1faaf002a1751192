"""Who holds which pages of a cache: the books of `KVCache`, on the host and of numbers alone."""

from __future__ import annotations

import numpy as np

from cuflash.errors import InvalidArgument


class Pages:
    """Pages that sequences take as they grow, hold together where they have a past in common, and give back."""

    def __init__(self, sequences: int, most: int, count: int, size: int) -> None:
        self.size = size
        """Rows of a page."""
        self.count = count
        """Pages of the whole cache."""
        self.table = np.zeros((sequences, most), np.int32)
        """The pages of each sequence, and behind them numbers that say nothing."""
        self.free = list(range(count))[::-1]
        """Pages that no sequence holds."""
        self._uses = [0] * count
        """How many sequences hold each page."""
        self._held = np.zeros(sequences, np.int32)
        """How many pages each sequence holds."""

    def grow(self, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Give sequences of these lengths the pages that they need for others.

        Raises
        ------
        InvalidArgument
            If too few are free; nothing has changed then.
        """
        have, need = self._number(lengths), self._number(ends)
        if (need - have).sum() > len(self.free):
            raise InvalidArgument(
                f"{(need - have).sum()} more pages are needed, but {len(self.free)} of {self.count} are free. "
                "Make the cache larger, or clear a sequence."
            )
        for b in range(len(lengths)):
            for at in range(have[b], need[b]):
                self.table[b, at] = self._take()
        self._held = need

    def trim(self, lengths: np.ndarray) -> None:
        """Take back the pages behind the rows in use."""
        need = self._number(lengths)
        for b in range(len(lengths)):
            for at in range(need[b], self._held[b]):
                self._give(int(self.table[b, at]))
        self._held = need

    def share(self, lengths: np.ndarray, order: np.ndarray) -> list[tuple[int, int]]:
        """Let each sequence go on from the pages of another; `lengths` are those before.

        What is returned is to be copied, (page, copy) each: pages that more than one sequence would write to.

        Raises
        ------
        InvalidArgument
            If too few are free for copies; nothing has changed then.
        """
        before, sequences = self.table.copy(), range(len(order))
        whole, begun = lengths[order] // self.size, lengths[order] % self.size > 0
        owners: set[int] = set()
        shared: list[tuple[int, int]] = []
        for b in np.flatnonzero(begun).tolist():
            page = int(before[order[b], whole[b]])
            if page in owners:
                shared.append((b, page))
            owners.add(page)
        taken = [before[order[b], : whole[b] + begun[b]].tolist() for b in sequences]
        given = [before[b, : self._held[b]].tolist() for b in sequences]
        room = len(self.free) + len(set().union(*given) - set().union(*taken))
        if len(shared) > room:
            raise InvalidArgument(
                f"{len(shared)} pages are needed for copies, but {room} are free. "
                "Make the cache larger, or clear a sequence."
            )
        for pages in taken:
            for page in pages:
                self._uses[page] += 1
        for pages in given:
            for page in pages:
                self._give(page)
        self.table, self._held = before[order], whole + begun
        copies = []
        for b, page in shared:
            self._give(page)
            copy = self._take()
            self.table[b, whole[b]] = copy
            copies.append((page, copy))
        return copies

    def _number(self, lengths: np.ndarray) -> np.ndarray:
        """How many pages rows take."""
        return -(-lengths // self.size)

    def _take(self) -> int:
        page = self.free.pop()
        self._uses[page] = 1
        return page

    def _give(self, page: int) -> None:
        self._uses[page] -= 1
        if not self._uses[page]:
            self.free.append(page)
