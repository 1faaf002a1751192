"""Forward, backward and one gradient step: attention learns to copy another attention's output."""

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:  # no CuPy, no driver or no GPU: NumPy runs the same calls on the CPU
    xp = np

shape = (2, 128, 4, 32)  # batch, length, heads, dim
rng = np.random.default_rng(0)
teacher = [xp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(3)]
student = [xp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(3)]
target = cuflash.flash_attn_func(*teacher, causal=True)


def loss_of(out: xp.ndarray) -> float:
    """Half the squared distance to the target."""
    return 0.5 * float(((out - target) ** 2).sum())


out, pullback = cuflash.flash_attn_vjp(*student, causal=True)
before = loss_of(out)
gradients = pullback(out - target)  # d loss / d out  ->  d loss / d (q, k, v)
slope = sum(float((g * g).sum()) for g in gradients)
print(f"loss {before:.2f}; along the gradient it changes by {slope:.2f} per unit of step")

# The gradient is right if a tiny step against it changes the loss by what it promises.
tiny = 1e-3
ahead, behind = (
    loss_of(cuflash.flash_attn_func(*(x - step * g for x, g in zip(student, gradients, strict=True)), causal=True))
    for step in (tiny, -tiny)
)
measured = (behind - ahead) / (2 * tiny)
print(f"finite differences measure {measured:.2f} per unit of step")
assert abs(measured - slope) < 0.01 * slope

learning_rate = 0.5
student = [x - learning_rate * g for x, g in zip(student, gradients, strict=True)]
after = loss_of(cuflash.flash_attn_func(*student, causal=True))
print(f"loss after one step of {learning_rate}: {after:.2f}")
assert after < before
