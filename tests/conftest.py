"""Skips `gpu` tests with the reason where no GPU can run them, and sets one hypothesis profile."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("cuflash", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("cuflash")


def why_no_gpu() -> str | None:
    """Return why no kernel can be launched here, or None when one can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable GPU: {error}"
    return None if count else "no GPU is visible"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    reason = why_no_gpu()
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
