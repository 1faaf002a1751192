"""From checked arrays to results: the only place that joins the NumPy backend, the planner and the compiler."""

from cuflash.ops.backward import backward
from cuflash.ops.call import Arrays, Gradients, Options, asked, new
from cuflash.ops.explain import Explanation, explain
from cuflash.ops.forward import forward
from cuflash.ops.prepared import PreparedAttention
from cuflash.ops.vjp import vjp

__all__ = [
    "Arrays", "Explanation", "Gradients", "Options", "PreparedAttention", "asked", "backward",
    "explain", "forward", "new", "vjp",
]  # fmt: skip
