"""What ``start.py`` measures, of PyTorch's ``flex_attention``, compiled for a score that its caller wrote: a script."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def measure_here(phase: str) -> dict[str, float]:
    """Seconds of the same steps."""
    started_s = time.perf_counter()
    torch = importlib.import_module("torch")
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention

    imported_s = time.perf_counter()
    q, k, v, dout = torch.randn(4, 1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    slopes = torch.tensor([0.5, 0.25], device="cuda")
    torch.cuda.synchronize()
    ready_s = time.perf_counter()

    def score(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score - slopes[h] * (q - k).abs()

    backward = phase == "backward"
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    function = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call() -> object:
        if not backward:
            return function(*leaves, score_mod=score)
        return torch.autograd.grad(function(*leaves, score_mod=score), leaves, dout)

    marks_s = [time.perf_counter()]
    for _ in range(2):
        call()
        torch.cuda.synchronize()
        marks_s.append(time.perf_counter())
    return {
        "import_s": imported_s - started_s,
        "context_s": ready_s - imported_s,
        "first_call_s": marks_s[1] - marks_s[0],
        "second_call_s": marks_s[2] - marks_s[1],
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1])))
