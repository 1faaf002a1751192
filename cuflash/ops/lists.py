"""The lists of a block mask, and the arrays that its rule reads, on the GPU of a call: moved there once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cuflash.arrays import Launcher
from cuflash.ops.call import Arrays, Options
from cuflash.plan import Step
from cuflash.problem import Problem

if TYPE_CHECKING:
    from cuflash.blocks import BlockMask

MEMBERS = {"kv": ("kv_lines", "kv_list"), "q": ("q_lines", "q_list", "q_turns")}
"""The members of a parameter block that point to what :func:`pointers` finds, by :attr:`Step.walks`."""


class Listing(NamedTuple):
    """One of the lists that the kernels of a call walk."""

    side: str
    """Of what tiles: :attr:`Step.walks`."""
    tile_q: int
    tile_kv: int
    group: int
    """Query heads of a key head."""

    def distances(self, problem: Problem) -> tuple[int, int]:
        """Lines from a batch element to the next, and from a head to the next; 0 where all have the same."""
        assert problem.block_mask is not None
        batch, heads = problem.block_mask.batch, problem.block_mask.heads
        tiles = -(-problem.len_q // self.tile_q) if self.side == "kv" else -(-problem.len_kv // self.tile_kv)
        heads = heads // self.group if self.side == "q" and heads > 1 else heads
        return (tiles * heads if batch > 1 else 0), (tiles if problem.block_mask.heads > 1 else 0)


def listings(problem: Problem, steps: Sequence[Step]) -> tuple[Listing, ...]:
    """Those that the steps of a plan walk, of either side at most one."""
    if problem.block_mask is None:
        return ()
    tiles = [(step.walks, step.config.tile_q, step.config.tile_kv) for step in steps if step.walks]  # type: ignore[attr-defined]
    return tuple(Listing(*tile, problem.group) for tile in tiles)


def with_rule(framework: Launcher, options: Options, arrays: Arrays) -> Arrays:
    """The arrays of a call with those that the rule of its block mask reads behind the captured ones."""
    if (mask := options.block_mask) is None:
        return arrays
    rule = options.rule
    if rule is None or not rule.arrays:  # what is no block mask the checks refuse
        return arrays
    device = framework.ordinal(arrays.q)
    key = framework.name, device
    if key not in mask.copies:
        with framework.context(device):
            mask.copies[key] = tuple(framework.moved(x, arrays.q) for x in rule.arrays)
    return arrays._replace(captured=(*(arrays.captured or ()), *mask.copies[key]))


def pointers(framework: Launcher, mask: BlockMask, beside: Any, wanted: Sequence[Listing]) -> tuple[int, ...]:
    """Where lists are on the device of an array, in the order of :data:`MEMBERS`."""
    return tuple(framework.pointer(x) for listing in wanted for x in _moved(framework, mask, beside, listing))


def _moved(framework: Launcher, mask: BlockMask, beside: Any, listing: Listing) -> tuple[Any, ...]:
    device = framework.ordinal(beside)
    key = framework.name, device, listing
    if key not in mask.copies:
        from cuflash.blocks.walks import over_keys, over_queries

        tile_q, tile_kv = listing.tile_q, listing.tile_kv
        over_q = listing.side == "q"
        walk = over_queries(mask, tile_q, tile_kv, listing.group) if over_q else over_keys(mask, tile_q, tile_kv)
        with framework.context(device):
            mask.copies[key] = tuple(framework.moved(x, beside) for x in walk[: len(MEMBERS[listing.side])])
    return mask.copies[key]
