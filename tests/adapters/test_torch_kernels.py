"""Gradients that autograd asks for of tensors on a GPU: here in host memory, where the kernels' twins run."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import oracle
import pytest
from doubles.launch import Launches, needs_compiler
from inputs import FP16, random

import cuflash
from cuflash import arrays
from cuflash.adapters.torch.tensors import Torch

torch = pytest.importorskip("torch", reason="torch is not installed")

from cuflash.adapters.torch import three  # noqa: E402  which imports torch

pytestmark = needs_compiler


@pytest.fixture
def gpu(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Tensors in host memory count as being on a GPU."""
    view = Torch.view
    monkeypatch.setitem(sys.modules, "torch", torch)
    arrays.framework_of_type.cache_clear()
    arrays._torch_tensors.cache_clear()
    monkeypatch.setattr(three, "_pairs", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(Torch, "view", lambda self, name, x: view(self, name, x)._replace(device="cuda:0"))
    for name in ("empty", "zeros"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(
            Torch, name, lambda self, shape, dtype, ordinal, allocate=allocate: allocate(shape, dtype=dtype)
        )
    return launches


INPUTS = [random(2, 40, 3, 32, dtype=FP16, seed=i) for i in range(4)]


def attend(*leaves: Any) -> Any:
    return cuflash.flash_attn_func(*leaves, causal=True)


def right(out: Any, gradients: Any, dout: np.ndarray) -> None:
    """Compare a result and its gradients with the oracle."""
    exact, naive = (f(*INPUTS[:3], dout, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    computed = [x.detach().numpy() for x in (out, *gradients)]
    oracle.assert_all_close(oracle.Attention(computed[0], exact.lse, *computed[1:]), exact, naive)


def leaves() -> list[Any]:
    return [torch.from_numpy(x.copy()).requires_grad_() for x in INPUTS[:3]]


def test_forward_and_gradient_are_found_together(gpu: Launches) -> None:
    dout = torch.from_numpy(INPUTS[3])
    for turn in range(3):
        mine = leaves()
        out = attend(*mine)
        right(out, torch.autograd.grad(out, mine, dout), INPUTS[3])
        if turn == 0:
            loaded, called = list(gpu.loaded), gpu.take()
            assert [name for name, _ in loaded] == called
        else:
            assert gpu.loaded == loaded and gpu.take() == called
    (pair,) = three._pairs.values()
    assert pair._pull is not None


def test_a_gradient_that_is_recorded_itself(gpu: Launches) -> None:
    mine, dout = leaves(), torch.from_numpy(INPUTS[3])
    out = attend(*mine)
    gradients = torch.autograd.grad(out, mine, dout, create_graph=True)
    assert all(x.grad_fn is not None for x in gradients)
    right(out, gradients, INPUTS[3])


def test_parameters_beside_tensors(gpu: Launches) -> None:
    q, k, v = leaves()
    mine = q, torch.nn.Parameter(k.detach()), torch.nn.Parameter(v.detach())
    for _ in range(2):
        out = attend(*mine)
        right(out, torch.autograd.grad(out, mine, torch.from_numpy(INPUTS[3])), INPUTS[3])
    assert len(three._pairs) == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_arrays_of_two_libraries_are_refused(gpu: Launches, recorded: bool) -> None:
    q, _, v = leaves()
    with pytest.raises(cuflash.InvalidArgument, match="k is a NumPy array"):
        attend(q if recorded else q.detach(), INPUTS[1], v.detach())


def test_values_that_start_with_the_keys_are_another_pair(gpu: Launches) -> None:
    q, k, v = (x.detach().requires_grad_() for x in leaves())
    shared, apart = attend(q, k, k.view_as(k)), attend(q, k, v)
    assert len(three._pairs) == 2
    right(apart, torch.autograd.grad(apart, (q, k, v), torch.from_numpy(INPUTS[3])), INPUTS[3])
    np.testing.assert_array_equal(shared.detach().numpy(), attend(q, k, k.detach().clone()).detach().numpy())


@pytest.mark.parametrize("kind", ["of other strides", "all the same", "off 16 bytes"])
def test_gradients_that_arrive_otherwise(gpu: Launches, kind: str) -> None:
    mine, dout = leaves(), torch.from_numpy(INPUTS[3].copy())
    if kind == "of other strides":
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "all the same":
        dout = torch.ones((), dtype=dout.dtype).expand(dout.shape)
    else:
        dout = torch.empty(dout.numel() + 1, dtype=dout.dtype)[1:].view(dout.shape).copy_(dout)
    out = attend(*mine)
    right(out, torch.autograd.grad(out, mine, dout), dout.contiguous().numpy())


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("change", ["moved", "other strides", "data"])
def test_hooks_may_give_back_other_tensors_than_were_saved(gpu: Launches, change: str, return_lse: bool) -> None:
    def attend(*leaves: Any) -> Any:
        out = cuflash.flash_attn_func(*leaves, causal=True, return_lse=return_lse)
        return out[0] if return_lse else out

    def unpack(x: Any) -> Any:
        if change == "moved" or x.dim() != 4:
            return x.clone()
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    dout, mine = torch.from_numpy(INPUTS[3]), leaves()
    out = attend(*mine)  # the pair is there
    torch.autograd.grad(out, mine, dout)
    if change == "data":
        out = attend(*mine)
        for x in mine:
            x.data = x.data.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), unpack):
            out = attend(*mine)
    right(out, torch.autograd.grad(out, mine, dout), INPUTS[3])
