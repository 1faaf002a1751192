"""How small the NumPy backend's tiles are."""

from __future__ import annotations

import pytest

from cuflash.reference import tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows and 16 keys, two heads' worth at once, so that small problems have many of every kind."""
    monkeypatch.setattr(tiles, "ROWS", 8)
    monkeypatch.setattr(tiles, "KEYS", 16)
    monkeypatch.setattr(tiles, "SCORES", 256)
