"""How long a new process takes to its first result, with an empty and with a filled kernel cache.

Run as a script, ``start.py forward gpu plain``, it measures itself and prints JSON; :func:`measure` starts such
processes. It is no module then, as ``-m`` would import the package before the clock starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(gpu: bool, written: bool = False, flex: bool = False) -> dict[str, dict[str, float]]:
    """Seconds of a new process by phase and cache state: ``cold`` compiles a variant, ``cached`` finds it on disk.

    With `written`, of a score that the caller wrote; with `flex`, also by PyTorch's ``flex_attention``, compiled.
    """
    times = {}
    backends = ["gpu" if gpu else "numpy", *["flex"] * flex]
    for backend in backends:
        for phase in ("forward", "backward"):
            with tempfile.TemporaryDirectory(prefix="cuflash-start-") as folder:
                path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
                places = dict.fromkeys(("CUFLASH_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), folder)
                environment = os.environ | places | {"PYTHONPATH": path}
                script = Path(__file__).with_name("peers") / "start_flex.py" if backend == "flex" else __file__
                command = [sys.executable, "-P", str(script), phase, backend, "written" if written else "plain"]
                for state in ("cold", "cached") if gpu else ("cpu",):
                    run = subprocess.run(
                        command, env=environment, capture_output=True, text=True, check=True, timeout=120
                    )
                    by = f"{backend}, " if backend == "flex" else ""
                    times[f"{by}{phase}, {state}"] = json.loads(run.stdout)
    return times


def measure_here(phase: str, backend: str, kind: str) -> dict[str, float]:
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

    options: dict[str, Any] = {"causal": True}
    if kind == "written":
        slopes = type(q)((2,), np.float32)
        slopes[...] = 0.5
        options = {"score_mod": lambda score, b, h, q, k: score - slopes[h] * abs(q - k)}

    def forward() -> tuple[object, object]:
        return cuflash.flash_attn_func(q, k, v, **options, return_lse=True)

    def backward() -> object:
        return cuflash.flash_attn_backward(dout, q, k, v, out, lse, **options)

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
    print(json.dumps(measure_here(*sys.argv[1:])))
