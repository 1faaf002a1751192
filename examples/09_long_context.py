"""Attend to one sequence that is divided over all devices of JAX, forward and backward, and compare with one device.

Tokens lie in zigzag order, so that causal attention gives every device as much to do. By ring_attention keys travel
while others are attended to; by all_to_all_attention devices exchange heads for rows before and after. Shown are the
time of a step, how far outputs and gradients are from those of one device, and whether a second run repeats every bit.
On GPUs the sequence has 1,048,576 tokens; without one it has 2,048, on four devices that JAX makes of the CPU.

    python examples/09_long_context.py
    python examples/09_long_context.py --length 65536 --window 4096
    python examples/09_long_context.py --no-deterministic
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from time import perf_counter

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # before JAX is imported; of no GPU

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import cuflash
from cuflash.parallel import all_to_all_attention, ring_attention, token_order

Step = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
"""The output of attention of q, k and v, (1, length, heads, dim), and the gradients of all three for one of it."""


def step(attention: Callable[..., jax.Array]) -> Step:
    """A forward and a backward in one program."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pullback = jax.vjp(attention, q, k, v)
        return out, pullback(dout)

    return jax.jit(both)


def timed(run: Step, tensors: list[jax.Array]) -> tuple[list[jax.Array], float, bool]:
    """Output and gradients, the seconds of a run that compiles nothing, and whether it repeats the run before it."""
    first, gradients = jax.block_until_ready(run(*tensors))
    begin = perf_counter()
    out, again = jax.block_until_ready(run(*tensors))
    seconds = perf_counter() - begin
    return [out, *again], seconds, all(map(same, (first, *gradients), (out, *again)))


@jax.jit
def same(x: jax.Array, y: jax.Array) -> jax.Array:
    """Whether arrays that lie alike have the same numbers."""
    return jnp.array_equal(x, y)


@jax.jit
def apart(x: jax.Array, y: jax.Array) -> jax.Array:
    """The largest difference over the largest number, computed where the arrays lie."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.abs(x - y).max() / jnp.abs(y).max()


def main() -> None:
    """Run both ways on all devices, then one device alone."""
    on_gpu = jax.default_backend() == "gpu"
    summary = "Attend to one sequence that is divided over all devices of JAX."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=2**20 if on_gpu else 2**11, help="tokens")
    parser.add_argument("--heads", type=int, default=8, help="heads of queries, a multiple of four")
    parser.add_argument("--dim", type=int, default=128 if on_gpu else 32, help="numbers of a head")
    parser.add_argument("--window", type=int, default=-1, help="tokens that each one sees before itself; -1 is all")
    parser.add_argument(
        "--deterministic", action=argparse.BooleanOptionalAction, default=True, help="repeat bits, for slower gradients"
    )
    options = parser.parse_args()
    devices = jax.device_count()
    if options.length % (2 * devices) or options.heads % 4:
        parser.error(f"expected a length that is a multiple of {2 * devices}, and a multiple of four heads")

    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    keys = jax.random.split(jax.random.key(0), 4)
    counts = options.heads, options.heads // 4, options.heads // 4, options.heads
    tensors = [
        jax.random.normal(key, (1, options.length, heads, options.dim), dtype)
        for key, heads in zip(keys, counts, strict=True)
    ]
    tokens = token_order(options.length, devices, "zigzag")
    mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = PartitionSpec(None, "sequence")
    words = {"causal": True, "window_size": (options.window, 0), "deterministic": options.deterministic}

    def as_parts(x: jax.Array) -> jax.Array:
        return jax.device_put(x[:, tokens], NamedSharding(mesh, divided))

    parts = [as_parts(x) for x in tensors]
    print(f"{options.length:,} tokens on {devices} {jax.default_backend()} devices, {parts[0].dtype}")

    def show(name: str, seconds: float, rest: str) -> None:
        print(f"{name:20} {seconds:9.3f} s a step, {options.length / seconds:12,.0f} tokens/s{rest}", flush=True)

    results, seconds, _ = timed(step(partial(cuflash.flash_attn_func, **words)), tensors)
    show("one device", seconds, "")
    expected = [as_parts(x) for x in results]
    del tensors, results
    for attention in ring_attention, all_to_all_attention:
        if attention is all_to_all_attention and options.heads % devices:
            print(f"all_to_all_attention cannot divide {options.heads} heads by {devices} devices")
            continue
        local = partial(attention, group="sequence", order="zigzag", **words)
        run = step(jax.shard_map(local, mesh=mesh, in_specs=(divided,) * 3, out_specs=divided))
        results, seconds, repeats = timed(run, parts)
        furthest = max(float(apart(x, y)) for x, y in zip(results, expected, strict=True))
        show(attention.__name__, seconds, f"; {furthest:.1e} from one device, repeats to the bit: {repeats}")
        assert furthest < (2e-2 if on_gpu else 1e-5) and (repeats or not options.deterministic)


if __name__ == "__main__":
    main()
