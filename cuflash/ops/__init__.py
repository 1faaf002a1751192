"""From checked arrays to results: the only place that joins the NumPy backend, the planner and the compiler."""

from cuflash.ops.backward import backward
from cuflash.ops.call import Arrays, CapturedGradients, Gradients, Options, Tangents, asked, new
from cuflash.ops.explain import Explanation, explain
from cuflash.ops.forward import forward, out
from cuflash.ops.jvp import jvp
from cuflash.ops.prepared import BoundAttention, PreparedAttention
from cuflash.ops.vjp import vjp
from cuflash.ops.written import with_mods

__all__ = [
    "Arrays", "BoundAttention", "CapturedGradients", "Explanation", "Gradients", "Options", "PreparedAttention",
    "Tangents", "asked", "backward", "explain", "forward", "jvp", "new", "out", "vjp", "with_mods",
]  # fmt: skip
