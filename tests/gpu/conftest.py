"""CuPy, which is imported where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def cp() -> Any:
    import cupy

    return cupy
