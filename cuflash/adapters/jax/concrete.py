"""Arrays of JAX outside its transformations: in one place they are memory, on several devices a program's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from cuflash.adapters.jax.traced import Traced
from cuflash.arrays import Adapter, Guest
from cuflash.ops.call import Arrays


class Concrete(Guest):
    """Arrays with elements."""

    def __init__(self, traced: Traced) -> None:
        # NumPy's DLPack has no bfloat16; and what it makes of an array has its memory, too.
        super().__init__("JAX", jax.numpy.from_dlpack, np.asarray, lambda x, beside: jax.device_put(x, beside.sharding))
        self._traced = traced

    def beyond(self, arrays: Arrays, generator: Any = None) -> Adapter | None:
        """What divides arrays that lie on several devices, or draws from a key."""
        if isinstance(generator, jax.Array) or any(x is not None and len(x.sharding.device_set) > 1 for x in arrays):
            return self._traced
        return None
