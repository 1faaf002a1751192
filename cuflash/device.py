"""What a kernel choice needs to know about a GPU: read from CuPy, or looked up by name without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

from cuflash.errors import InvalidArgument
from cuflash.numbers import shown


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as a planner sees it."""

    name: str
    capability: tuple[int, int]
    """Compute capability, for example ``(9, 0)``."""
    num_sms: int
    """Streaming multiprocessors."""
    smem_per_block: int
    """Bytes of shared memory one block may opt in to."""
    smem_per_sm: int
    """Bytes of shared memory on one multiprocessor."""

    @property
    def arch(self) -> str:
        """The NVRTC target, ``sm_90a`` where the architecture has a feature-specific one we use."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


_KB = 1024

# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; SM counts from the datasheets.
NAMED: dict[str, Device] = {
    "v100": Device("NVIDIA V100", (7, 0), 80, 96 * _KB, 96 * _KB),
    "t4": Device("NVIDIA T4", (7, 5), 40, 64 * _KB, 64 * _KB),
    "a100": Device("NVIDIA A100", (8, 0), 108, 163 * _KB, 164 * _KB),
    "a10": Device("NVIDIA A10", (8, 6), 72, 99 * _KB, 100 * _KB),
    "l4": Device("NVIDIA L4", (8, 9), 58, 99 * _KB, 100 * _KB),
    "h100": Device("NVIDIA H100", (9, 0), 132, 227 * _KB, 228 * _KB),
    "h200": Device("NVIDIA H200", (9, 0), 132, 227 * _KB, 228 * _KB),
    "b200": Device("NVIDIA B200", (10, 0), 148, 227 * _KB, 228 * _KB),
    "rtx5090": Device("NVIDIA RTX 5090", (12, 0), 170, 99 * _KB, 100 * _KB),
}


def named(name: str) -> Device:
    """Return a device by name (``"h100"``) or architecture (``"sm_90a"``, ``"sm_90"``), without a GPU.

    Raises
    ------
    InvalidArgument
        If the name is neither a known card nor the architecture of one.
    """
    key = name.lower().replace(" ", "") if isinstance(name, str) else None
    if key in NAMED:
        return NAMED[key]
    for device in NAMED.values():
        if key is not None and key.rstrip("a") == device.arch.rstrip("a"):
            return device
    known = ", ".join([*NAMED, *sorted({d.arch for d in NAMED.values()})])
    raise InvalidArgument(f"device {shown(name)} is not known; expected one of: {known}.")


@cache
def current(index: int) -> Device:
    """Return the GPU with this CUDA ordinal, read through CuPy once per process."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name = properties["name"]
    return Device(
        name=name.decode() if isinstance(name, bytes) else name,
        capability=(properties["major"], properties["minor"]),
        num_sms=properties["multiProcessorCount"],
        smem_per_block=properties["sharedMemPerBlockOptin"],
        smem_per_sm=properties["sharedMemPerMultiprocessor"],
    )


def ordinal() -> int:
    """Number of the GPU that this thread works on."""
    return _get_device()()


@cache
def _get_device() -> Callable[[], int]:
    import cupy

    return cupy.cuda.runtime.getDevice


def activated(index: int) -> AbstractContextManager[Any]:
    """Where this thread works on a GPU."""
    import cupy

    return cupy.cuda.Device(index)
