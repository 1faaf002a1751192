"""cuflash inside JAX's transformations: jit, grad, vmap, scan, remat, shard_map, shardings and export.

A call is one step of a traced program, the layers of which are files here, from the inside out: `primitive` (what XLA
runs), `sharding`, `batching`, `differentiation`, `traced` (what the public functions call). `concrete` is of arrays
outside such programs.
"""

from cuflash.adapters.jax.concrete import Concrete
from cuflash.adapters.jax.primitive import register
from cuflash.adapters.jax.traced import Traced

__all__ = ["Concrete", "Traced", "register"]
