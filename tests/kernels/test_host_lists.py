"""Block masks in whole kernels, on the CPU: every family walks its lists, and no tile that is in none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from host.build import why_not
from host.cases import CAUSAL, HostCase, Tensors, dense, exact_and_naive, packed, run

from cuflash import create_block_mask
from cuflash.blocks import BlockMask
from cuflash.blocks.walks import over_keys, over_queries
from cuflash.device import Device
from cuflash.ops.lists import MEMBERS, listings
from cuflash.plan import Plan
from cuflash.plan.families import FAMILIES
from cuflash.problem import Blocks, Problem

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def random_mask(
    p: Problem, size: tuple[int, int], batch: bool = False, heads: bool = False, rule: Callable[..., Any] | None = None
) -> BlockMask:
    """Blocks of which 40 % are kept, in the first row and in the last column none."""
    rng = np.random.default_rng(7)
    shape = p.batch if batch else 1, p.heads_q if heads else 1, -(-p.len_q // size[0]), -(-p.len_kv // size[1])
    kept = rng.random(shape) < 0.4
    kept[:, :, 0] = False
    if shape[3] > 1:
        kept[..., -1] = False
        kept[:, :, 1:, 0] = True
    return create_block_mask(
        rule, batch=p.batch if batch else None, heads=p.heads_q if heads else None, len_q=p.len_q, len_kv=p.len_kv,
        block_size=size, blocks=kept,
    )  # fmt: skip


def holes(p: Problem) -> Callable[..., Any]:
    """A rule that hides some pairs of every block, by an array."""
    phase = np.random.default_rng(3).integers(0, 7, p.len_q)
    return lambda b, h, q, k: (phase[q] + k) % 7 > 1


def prefix(p: Problem) -> Callable[..., Any]:
    """Full, partial and empty blocks: keys of a prefix and those before the query."""
    return lambda b, h, q, k: (k < 40) | (k <= q)


def check(case: HostCase, mask: BlockMask, direction: str, seed: int = 0) -> None:
    """Run a block mask in a kernel; the oracle has all of its pairs."""
    backward = direction == "backward"
    tensors = Tensors(case)
    inputs = ("dout", "dlse") if backward else ()
    for name in ("q", "k", "v", *inputs):
        tensors.random(name)
    tensors.options["mask"] = mask.to_dense()
    exact, naive = exact_and_naive(tensors, *inputs)
    if backward:
        tensors.place("out", exact.out.astype(case.problem.dtype.numpy))
        tensors.place("lse", exact.lse)
        tensors.arrays["dlse"][np.isneginf(exact.lse)] = np.nan
        results = {name: tensors.place(name) for name in ("dq", "dk", "dv")}
        if case.problem.bias is not None:
            shape, real = tensors.arrays["bias"].shape, case.problem.dtype.accumulator
            results["dbias"] = tensors.place_flat("dbias", shape, real)
    else:
        results = {name: tensors.place(name) for name in ("out", "lse")}
        exact, naive = (x._replace(lse=tensors.told_of_nothing(x.lse)) for x in (exact, naive))
    tensors.arrays |= {f"captured{i}": x for i, x in enumerate(mask.tested.arrays)}

    def choose(problem: Problem, device: Device, family: str) -> Plan:
        """The plan of a family, with the lists that it walks beside the arrays."""
        plan = next(known for known in FAMILIES if known.name == family).plan(problem, device)
        computed = listings(problem, plan.steps)
        assert computed
        sums = problem.bias_grad and problem.bias_broadcast[2]  # the gradient of a bias is summed over all pairs
        if (
            case.problem.layout == "dense"
            and not sums
            and not any(mask.block_size[0] % x[1] or mask.block_size[1] % x[2] for x in computed)
        ):
            for name in ("k", "v"):  # rows that no tile of a list has, which a product with 0 would pass on
                tensors.arrays[name][:, (mask.grid.shape[1] - 1) * mask.block_size[1] :] = np.nan
        for side, tile_q, tile_kv, group in computed:
            walk = over_keys(mask, tile_q, tile_kv) if side == "kv" else over_queries(mask, tile_q, tile_kv, group)
            tensors.arrays.update(zip(MEMBERS[side], walk, strict=False))
        return plan

    blocks = Blocks(mask.block_size, mask.tested.mod, mask.batch, mask.heads)
    run(case, tensors, direction, seed, choose=choose, block_mask=blocks)
    for name, result in results.items():
        oracle.assert_close(result, getattr(exact, name), getattr(naive, name), name)
    tensors.assert_surroundings_untouched(*results)


def cases() -> list[Any]:
    """(case, block size, what varies, rule, direction)."""
    own = {"batch": True, "heads": True}
    rows: list[tuple[str, str, HostCase, tuple[int, int], dict[str, bool], Any]] = [
        ("simt", "f", dense("fp32", (4, 2), (200, 330), (40, 24), batch=2), (64, 64), own, holes),
        ("simt", "f", dense("fp64", (2, 2), (100, 130), (24, 24), mask=CAUSAL), (48, 40), {}, prefix),
        ("simt", "b", dense("fp32", (4, 2), (200, 330), (24, 16), batch=2), (64, 64), own, holes),
        ("simt", "b", packed("fp32", (2, 1), (130, 0, 60), (150, 20, 90), (24, 24), tail=5), (32, 64), {}, prefix),
        ("sm80", "f", dense("bf16", (4, 2), (200, 330), (64, 64), batch=2), (128, 128), own, holes),
        ("sm80", "f", packed("bf16", (4, 2), (300, 0, 33), (310, 20, 140), (64, 64), tail=5), (64, 64), {}, prefix),
        ("sm80", "f", dense("bf16", (2, 2), (40, 700), (64, 64), num_splits=3), (64, 128), {}, None),
        ("sm80", "b", dense("bf16", (4, 2), (200, 330), (64, 64), batch=2), (128, 128), own, holes),
        ("sm80", "b", packed("bf16", (4, 2), (200, 0, 33), (310, 20, 140), (64, 64), tail=5), (64, 128), {}, prefix),
        ("sm80", "b", dense("bf16", (2, 1), (200, 330), (128, 128), deterministic=True), (64, 128), {}, holes),
        ("sm80", "b", dense("bf16", (2, 1), (140, 150), (64, 64), bias_axes="bhqk"), (64, 128), {}, None),
        ("sm80", "b", dense("bf16", (2, 1), (140, 150), (64, 64), bias_axes="hk"), (64, 128), {}, prefix),
        ("sm90", "f", dense("bf16", (4, 2), (300, 600), (64, 64), batch=2), (128, 128), own, holes),
        ("sm90", "f", packed("bf16", (4, 2), (300, 0, 33), (410, 20, 140), (128, 128), tail=5), (128, 128), {}, prefix),
        ("sm90", "f", dense("fp16", (2, 1), (300, 500), (192, 192), mask=CAUSAL), (128, 64), {}, prefix),
        ("sm90", "f", dense("fp16", (2, 1), (300, 500), (128, 128)), (128, 128), {"heads": True}, None),
        ("sm90", "b", dense("bf16", (4, 2), (300, 300), (64, 64), batch=2), (128, 128), own, holes),
        ("sm90", "b", packed("bf16", (4, 2), (200, 0, 33), (310, 20, 140), (128, 128), tail=5), (64, 128), {}, prefix),
        ("sm90", "b", dense("bf16", (2, 1), (200, 330), (128, 128), deterministic=True), (64, 128), {}, holes),
        ("sm90", "b", dense("bf16", (4, 2), (200, 330), (64, 64), deterministic=True), (128, 128), own, None),
        ("sm90", "b", dense("bf16", (2, 1), (150, 150), (192, 192)), (64, 64), {"heads": True}, prefix),
        ("sm90", "b", dense("bf16", (3, 3), (150, 300), (64, 64), batch=2, num_sms=2), (128, 128), {}, holes),
        ("sm90", "b", dense("bf16", (4, 2), (140, 330), (128, 128), batch=2, num_sms=1), (64, 128), own, None),
    ]
    directions = {"f": "forward", "b": "backward"}
    return [
        pytest.param(
            replace(case, family=family), size, varies, rule, directions[letter],
            id=f"{family}-{replace(case.problem, direction=directions[letter])}-{number}".replace(" ", "-"),
        )
        for number, (family, letter, case, size, varies, rule) in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.sample(5)
@pytest.mark.parametrize(("case", "size", "varies", "rule", "direction"), cases())
def test_kernels_walk_what_is_listed(
    case: HostCase, size: tuple[int, int], varies: dict[str, bool], rule: Any, direction: str
) -> None:
    p = case.problem
    check(case, random_mask(p, size, rule=rule and rule(p), **varies), direction)
