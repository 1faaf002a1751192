"""Modules that FSDP shards, and DTensors, in two processes, which one test here starts."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuflash
from cuflash.errors import InvalidArgument, UnsupportedProblem

torch = pytest.importorskip("torch", reason="torch is not installed")

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)


def test_everything_here_in_two_processes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def exact(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """(out, lse) of causal attention in float64, (b, s, h, d)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def close(computed: Any, expected: Any) -> None:
    torch.testing.assert_close(computed.double(), expected.double(), atol=2e-5, rtol=1e-4)


class Block(torch.nn.Module):
    """Attention between two layers."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last, self.attend = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), attend

    def forward(self, x: Any) -> Any:
        q, k, v = (y.unflatten(-1, (4, 4)) for y in self.first(x).chunk(3, -1))
        return self.last(self.attend(q, k, v).flatten(-2).to(x.dtype))


def a_model_learns_what_it_learns_whole(mesh: Any, rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Block(lambda q, k, v: exact(q, k, v)[0])
    sharded = copy.deepcopy(model)
    sharded.attend = lambda q, k, v: cuflash.flash_attn_func(q, k, v, causal=True)
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(4, 5, 16)
    model(x).square().mean().backward()
    sharded(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for ours, expected in zip(sharded.parameters(), model.parameters(), strict=True):
        assert expected.grad.abs().max() > 1e-3 and ours.grad.to_local().shape != expected.shape
        close(ours.grad.full_tensor(), expected.grad)


def each_process_attends_to_its_part(mesh: Any, rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for batch, placement, local in ((2, Shard(0), (1, 7, 4, 8)), (3, Shard(0), (2 - rank, 7, 4, 8)),
                                    (2, Shard(2), (2, 7, 2, 8)), (2, Replicate(), (2, 7, 4, 8))):  # fmt: skip
        plain = [torch.randn(batch, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        dout, dlse = torch.randn(batch, 7, 4, 8), torch.randn(batch, 4, 7)
        out, lse = exact(*plain)
        expected = [out, lse, *torch.autograd.grad([out, lse], plain, [dout.double(), dlse.double()])]
        tensors = [distribute_tensor(x.detach(), mesh, [placement]) for x in plain]
        for x in tensors:
            x.requires_grad_()
        computed = cuflash.flash_attn_func(*tensors, causal=True, return_lse=True)
        assert tuple(computed[0].to_local().shape) == local and computed[0].placements == (placement,)
        assert computed[0].shape == out.shape and computed[1].shape == lse.shape
        ((computed[0] * share(dout, mesh)).sum() + (computed[1] * share(dlse, mesh)).sum()).backward()
        for x, y in zip([*computed, *(x.grad for x in tensors)], expected, strict=True):
            close(x.full_tensor(), y)
        heads_first = [x.detach().transpose(1, 2) for x in tensors]
        computed = cuflash.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        close(computed.full_tensor(), out.transpose(1, 2))


def share(x: Any, mesh: Any) -> Any:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, mesh, [Replicate()])


def a_compiled_function_does_too(mesh: Any, rank: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = [torch.randn(2, 7, 4, 8) for _ in range(3)]
    tensors = [distribute_tensor(x, mesh, [Shard(2)]) for x in plain]
    attend = torch.compile(lambda *x: cuflash.flash_attn_func(*x, causal=True), fullgraph=True, backend="aot_eager")
    close(attend(*tensors).full_tensor(), exact(*plain)[0])


def what_needs_other_parts_is_refused(mesh: Any, rank: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(placement: Any, heads: int = 4) -> Any:
        return distribute_tensor(torch.randn(2, 7, heads, 8), mesh, [placement])

    q, along, other = sharded(Shard(0)), sharded(Shard(1)), sharded(Shard(2))
    few, plain, attend = sharded(Shard(2), 1), torch.randn(2, 7, 4, 8), cuflash.flash_attn_func
    for match, call in (
        (r"^q is a DTensor with placement Shard\(dim=1\), of which no process", lambda: attend(along, along, along)),
        (r"^k is a DTensor with placements \(Shard\(dim=2\),\) but q has", lambda: attend(q, other, other)),
        (r"^q is a DTensor with its heads in 2 parts, and k has 1 heads", lambda: attend(other, few, few)),
        (r"^q is a DTensor and dropout_p is 0.5: .* to_local\(\)", lambda: attend(q, q, q, 0.5)),
        (r"^q is a DTensor and attn_bias is given", lambda: attend(q, q, q, attn_bias=torch.zeros(7, 7))),
        (r"^k is a plain tensor but q is a DTensor", lambda: attend(q, plain, plain)),
        (r"^k is a DTensor, of which each process has a part", lambda: attend(plain, q, q)),
        (r"^q is a DTensor, of which each process has a part", lambda: cuflash.flash_attn_prepare(q, q, q)),
        (r"^q is a DTensor, and gradients", lambda: cuflash.flash_attn_backward(q, q, q, q, q, plain[..., 0])),
        (r"^query is a DTensor with placement", lambda: cuflash.scaled_dot_product_attention(other, other, other)),
    ):  # fmt: skip
        with pytest.raises((InvalidArgument, UnsupportedProblem), match=match):
            call()


def main(store: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for check in (
        a_model_learns_what_it_learns_whole, each_process_attends_to_its_part, a_compiled_function_does_too,
        what_needs_other_parts_is_refused,
    ):  # fmt: skip
        torch.manual_seed(0)
        check(mesh, rank)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
