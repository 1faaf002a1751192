"""SM clock and power of a GPU while something runs, by NVML (the package ``nvidia-ml-py``)."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Reading(NamedTuple):
    """What NVML said at one moment."""

    sm_mhz: float
    watts: float
    """The driver's average over the last second or so."""


class Meter:
    """Reads one GPU.

    Parameters
    ----------
    bus_id
        Its PCI address, as ``cudaDeviceGetPCIBusId`` gives it.
    interval_s
        Seconds between readings.

    Raises
    ------
    ImportError
        If ``nvidia-ml-py`` is not installed.
    Exception
        NVML's own, if it does not run here or does not know the GPU.
    """

    def __init__(self, bus_id: str, interval_s: float = 0.02) -> None:
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._gpu = self._nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        self._interval_s = interval_s
        self.read()

    def read(self) -> Reading:
        """Clock and power now."""
        sm_mhz = self._nvml.nvmlDeviceGetClockInfo(self._gpu, self._nvml.NVML_CLOCK_SM)
        return Reading(float(sm_mhz), self._nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1e3)

    @contextmanager
    def watch(self, readings: list[Reading]) -> Iterator[None]:
        """Add to the readings as long as the context is open, from a thread of its own."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(self._interval_s):
                readings.append(self.read())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
