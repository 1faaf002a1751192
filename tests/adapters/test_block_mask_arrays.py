"""Block masks of torch's and JAX's arrays in host memory, and where they are refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import Mask, create_block_mask
from cuflash.errors import UnsupportedProblem

RNG = np.random.default_rng(0)
PAIRS = (RNG.random((30, 40)) < 0.5) & (np.arange(40) // 8 % 2 == 0)
IDS = np.sort(RNG.integers(0, 4, 40))


def tensors() -> list[np.ndarray]:
    """q, k, v and dout."""
    shapes, rng = ((2, 30, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8), (2, 30, 4, 8)), np.random.default_rng(1)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_made_of_arrays_of_other_libraries(library: str) -> None:
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    put: Any = module.from_numpy if library == "torch" else module.numpy.asarray
    ids = put(IDS)
    mask = create_block_mask(put(PAIRS), block_size=8)
    np.testing.assert_array_equal(mask.to_dense()[0, 0], PAIRS)
    own = mask & (lambda b, h, q, k: ids[q] == ids[k])
    np.testing.assert_array_equal(own.to_dense()[0, 0], PAIRS & (IDS[:30, None] == IDS))
    q, k, v, _ = (put(x) for x in tensors())
    computed = cuflash.flash_attn_func(q, k, v, block_mask=own)
    assert type(computed) is type(q)
    expected = cuflash.flash_attn_func(q, k, v, attn_mask=put(own.to_dense()))
    np.testing.assert_allclose(np.asarray(computed), np.asarray(expected), 1e-5, 1e-6)


def test_autograd_visits_the_same_blocks_and_keeps_none() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    mask = create_block_mask(PAIRS, block_size=8)
    gradients = []
    for masks in ({"block_mask": mask}, {"attn_mask": torch.from_numpy(PAIRS)}):
        *inputs, dout = (torch.from_numpy(x) for x in tensors())
        inputs = [x.requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad(cuflash.flash_attn_func(*inputs, **masks), inputs, dout))
        del inputs
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    gone = weakref.ref(mask.kv.indices)
    del mask, masks
    gc.collect()
    assert gone() is None


def test_refused_where_torch_or_jax_traces() -> None:
    mask = create_block_mask(Mask(right=0), len_q=30, len_kv=40)
    q, k, v, _ = tensors()
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    with pytest.raises(UnsupportedProblem, match=r"^block_mask is given inside JAX's transformations"):
        jax.jit(lambda *qkv: cuflash.flash_attn_func(*qkv, block_mask=mask))(*map(jax.numpy.asarray, (q, k, v)))
    with pytest.raises(UnsupportedProblem, match=r"^block_mask is given inside JAX's transformations"):
        jax.jit(lambda *qkv: cuflash.flash_attn_jvp(*qkv, block_mask=mask))(*map(jax.numpy.asarray, (q, k, v)))
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = (torch.from_numpy(x) for x in (q, k, v))
    with pytest.raises(UnsupportedProblem, match=r"^block_mask is given inside torch.vmap"):
        torch.func.vmap(lambda q: cuflash.flash_attn_func(q, k, v, block_mask=mask))(q[None])
