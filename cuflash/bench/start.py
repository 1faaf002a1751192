"""How long a new process takes to its first result, with an empty and with a filled kernel cache.

Run as a script, ``start.py forward gpu``, it measures itself and prints JSON; :func:`measure` starts such processes. It
is no module then, as ``-m`` would import the package before the clock starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(gpu: bool) -> dict[str, dict[str, float]]:
    """Seconds of a new process by phase and cache state: ``cold`` compiles a variant, ``cached`` finds it on disk."""
    times = {}
    for phase in ("forward", "backward"):
        with tempfile.TemporaryDirectory(prefix="cuflash-start-") as folder:
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
            environment = os.environ | {"CUFLASH_CACHE_DIR": folder, "PYTHONPATH": path}
            command = [sys.executable, "-P", __file__, phase, "gpu" if gpu else "numpy"]
            for state in ("cold", "cached") if gpu else ("cpu",):
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
                times[f"{phase}, {state}"] = json.loads(run.stdout)
    return times


def measure_here(phase: str, backend: str) -> dict[str, float]:
    """Import, create a context, and make the first and the second call, in this process; seconds of each."""
    started_s = time.perf_counter()
    import ml_dtypes
    import numpy as np

    import cuflash

    imported_s = time.perf_counter()
    dtype = ml_dtypes.bfloat16 if backend == "gpu" else np.float32
    host = np.random.default_rng(0).standard_normal((4, 1, 256, 2, 64)).astype(dtype)
    synchronize = _no_device
    q, k, v, dout = host
    if backend == "gpu":
        import cupy

        q, k, v, dout = (cupy.asarray(x) for x in host)
        synchronize = cupy.cuda.get_current_stream().synchronize
    synchronize()
    ready_s = time.perf_counter()

    def forward() -> tuple[object, object]:
        return cuflash.flash_attn_func(q, k, v, causal=True, return_lse=True)

    def backward() -> object:
        return cuflash.flash_attn_backward(dout, q, k, v, out, lse, causal=True)

    if phase == "backward":  # its forward's own start is measured apart
        out, lse = forward()
    call = backward if phase == "backward" else forward

    marks_s = [time.perf_counter()]
    for _ in range(2):
        call()
        synchronize()
        marks_s.append(time.perf_counter())
    return {
        "import_s": imported_s - started_s,
        "context_s": ready_s - imported_s,
        "first_call_s": marks_s[1] - marks_s[0],
        "second_call_s": marks_s[2] - marks_s[1],
    }


def _no_device() -> None:
    """Nothing to wait for."""


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2])))
