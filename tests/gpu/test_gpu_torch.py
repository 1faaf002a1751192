"""PyTorch's own flash and memory-efficient kernels beside ours: the same dropout masks, no more than twice the error.

torch's seed and offset go into our calls, so that both drop the same probabilities; the oracle says what is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32
from libraries import WithTorch

import cuflash

pytestmark = pytest.mark.gpu

P = 0.3


@pytest.fixture(scope="module")
def library() -> WithTorch:
    return WithTorch()


def seeded(library: WithTorch) -> None:
    """Bring torch's generator into a state with an offset above 0."""
    library.torch.cuda.manual_seed(0x123456789ABCDEF)
    library.torch.rand(1000, device="cuda")


def numbers(x: Any) -> list[int]:
    """The 64-bit numbers of a torch tensor, unsigned."""
    return [int(n) % 2**64 for n in x.cpu().view(-1).tolist()]


def close(library: WithTorch, name: str, ours: Any, torchs: Any, exact: np.ndarray) -> None:
    """Hold our error to twice torch's; torch writes +inf where a row sees nothing."""
    ours, torchs = library.get(ours), library.get(torchs)
    if name == "lse":
        torchs = np.where(np.isposinf(torchs), -np.inf, torchs)
    oracle.assert_close(ours, exact, torchs, name)


@dataclass(frozen=True, slots=True)
class TorchCase:
    """One call of torch's flash kernels."""

    dtype: np.dtype
    heads: tuple[int, int]
    lens: tuple[int, int] = (0, 0)
    dim: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    lens_q: tuple[int, ...] = ()
    """Rows of packed sequences; empty when dense."""
    lens_k: tuple[int, ...] = ()
    seqused_k: tuple[int, ...] = ()
    """Forward only: torch's backward does not have it."""


FLASH = {
    "plain": TorchCase(FP16, (3, 3), (200, 300)),
    "causal": TorchCase(BF16, (4, 2), (130, 257), 128, causal=True),
    "more-queries": TorchCase(FP16, (2, 1), (200, 70), causal=True),
    "window": TorchCase(BF16, (4, 1), (300, 333), 40, window=(37, 5)),
    "causal-window": TorchCase(FP16, (2, 2), (129, 200), 96, causal=True, window=(64, -1)),
    "d256": TorchCase(BF16, (2, 2), (150, 190), 256),
    "dropout": TorchCase(FP16, (4, 2), (200, 300), dropout_p=P),
    "dropout-causal-d128": TorchCase(BF16, (4, 2), (257, 257), 128, causal=True, dropout_p=P),
    "dropout-window-d256": TorchCase(FP16, (2, 2), (130, 200), 256, window=(70, 20), dropout_p=0.5),
    "dropout-d32": TorchCase(BF16, (3, 1), (90, 100), 32, dropout_p=0.9),
    "varlen": TorchCase(FP16, (4, 2), lens_q=(70, 0, 1, 200), lens_k=(100, 20, 30, 257)),
    "varlen-causal": TorchCase(BF16, (2, 2), dim=128, causal=True, lens_q=(130, 64, 33), lens_k=(60, 64, 200)),
    "varlen-dropout": TorchCase(FP16, (4, 2), lens_q=(70, 5, 200), lens_k=(100, 20, 257), dropout_p=P),
    "varlen-dropout-causal": TorchCase(
        BF16, (2, 1), dim=96, causal=True, lens_q=(33, 130), lens_k=(90, 140), dropout_p=0.1
    ),
    "varlen-seqused": TorchCase(FP16, (2, 1), causal=True, lens_q=(70, 40), lens_k=(100, 257), seqused_k=(77, 130)),
}  # fmt: skip


def flash_arguments(case: TorchCase, library: WithTorch) -> tuple[list[Any], dict[str, Any], dict[str, Any], list[Any]]:
    """(host arrays q, k, v, dout), the oracle's options, ours, and torch's positional ones after the tensors."""
    rng = np.random.default_rng(3)
    heads_q, heads_k = case.heads
    if case.lens_q:
        rows_q, rows_k = (sum(case.lens_q),), (sum(case.lens_k),)
        starts = [np.cumsum([0, *lens], dtype=np.int32) for lens in (case.lens_q, case.lens_k)]
        longest = [max(case.lens_q), max(case.lens_k)]
        packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))
        if case.seqused_k:
            packed["seqused_k"] = np.array(case.seqused_k, np.int32)
    else:
        rows_q, rows_k = (2, case.lens[0]), (2, case.lens[1])
        starts, longest, packed = [None, None], list(case.lens), {}
    shapes = [(*rows_q, heads_q), (*rows_k, heads_k), (*rows_k, heads_k), (*rows_q, heads_q)]
    arrays = [rng.standard_normal((*shape, case.dim), np.float32).astype(case.dtype) for shape in shapes]
    options = {"causal": case.causal, "window": case.window, "dropout_p": case.dropout_p, **packed}
    on_device = {name: library.put(x) for name, x in packed.items()}
    ours = {"causal": case.causal, "window_size": case.window, "dropout_p": case.dropout_p, **on_device}
    if case.lens_q:
        ours |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    torchs = [on_device.get("cu_seqlens_q"), on_device.get("cu_seqlens_k"), *longest, case.dropout_p, case.causal]
    return arrays, options, ours, torchs


@pytest.mark.parametrize("name", FLASH)
def test_flash(library: WithTorch, name: str) -> None:
    case, aten = FLASH[name], library.torch.ops.aten
    arrays, options, ours, torchs = flash_arguments(case, library)
    q, k, v, dout = (library.put(x) for x in arrays)
    sides = {}
    for side, size in zip(("left", "right"), case.window, strict=True):
        sides[f"window_size_{side}"] = None if size < 0 else size
    used = {"seqused_k": ours["seqused_k"]} if case.seqused_k else {}

    seeded(library)
    torch_out, torch_lse, state, unused, _ = aten._flash_attention_forward(q, k, v, *torchs, False, **sides, **used)
    drawn = {}
    if case.dropout_p:
        options["rng_state"] = tuple(numbers(state))
        drawn = {"generator": options["rng_state"], "return_rng_state": True}
    function = cuflash.flash_attn_varlen_func if case.lens_q else cuflash.flash_attn_func
    out, lse, *rng_state = function(q, k, v, **ours, **drawn, return_lse=True)
    backward = not case.seqused_k
    exact = oracle.attention(*arrays[:3], arrays[3] if backward else None, **options)
    close(library, "out", out, torch_out, exact.out)
    close(library, "lse", lse, torch_lse, exact.lse)
    if not backward:
        return

    torch_gradients = aten._flash_attention_backward(
        dout, q, k, v, torch_out, torch_lse, *torchs, state, unused, **sides
    )  # fmt: skip
    if rng_state:
        assert numbers(rng_state[0]) == numbers(state)
        ours["rng_state"] = state  # as torch returns it
    gradients = cuflash.flash_attn_backward(dout, q, k, v, out, lse, **ours)
    for field, mine, torchs_own in zip(("dq", "dk", "dv"), gradients, torch_gradients, strict=True):
        close(library, field, mine, torchs_own, getattr(exact, field))


def kept(library: WithTorch, run: Callable[[Any, Any, Any], Any], lens: tuple[int, int], dim: int) -> np.ndarray:
    """(2, 3, len_q, len_kv) booleans of what `run`, a forward with dropout of two elements with three heads, keeps.

    Uniform probabilities meet one-hot values, `dim` keys at a time; every run must draw the same mask.
    """
    torch, (len_q, len_kv) = library.torch, lens
    q = torch.zeros(2, len_q, 3, dim, dtype=torch.float16, device="cuda")
    keep = np.zeros((2, 3, len_q, len_kv), bool)
    for start in range(0, len_kv, dim):
        width = min(dim, len_kv - start)
        v = torch.zeros(2, len_kv, 3, dim, dtype=torch.float16, device="cuda")
        for column in range(width):
            v[:, start + column, :, column] = 1
        out = library.get(run(q, torch.zeros_like(v), v))
        keep[..., start : start + width] = out[..., :width].transpose(0, 2, 1, 3) != 0
    return keep


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("lens", "dim"), [((200, 333), 64), ((130, 257), 128), ((70, 500), 256)])
def test_flash_masks_are_bit_equal(library: WithTorch, lens: tuple[int, int], dim: int, p: float) -> None:
    states = []

    def torchs(q: Any, k: Any, v: Any) -> Any:
        seeded(library)
        results = library.torch.ops.aten._flash_attention_forward(q, k, v, None, None, *lens, p, False, False)
        states.append(tuple(numbers(results[2])))
        return results[0]

    expected = kept(library, torchs, lens, dim)
    (state,) = set(states)
    assert state[1] > 0
    ours = kept(library, lambda q, k, v: cuflash.flash_attn_func(q, k, v, p, generator=state), lens, dim)
    np.testing.assert_array_equal(ours, expected)
    i, j = np.arange(lens[0])[:, None], np.arange(lens[1])[None, :]
    for b in range(2):
        for h in range(3):
            np.testing.assert_array_equal(expected[b, h], oracle.flash_keep(*state, p, b, h, 3, i, j))


def test_flash_debug_mask_has_our_signs(library: WithTorch) -> None:
    torch, (len_q, len_kv) = library.torch, (200, 333)
    q, k, v = (torch.randn(2, n, 3, 64, dtype=torch.bfloat16, device="cuda") for n in (len_q, len_kv, len_kv))
    seeded(library)
    *_, state, _, signed = torch.ops.aten._flash_attention_forward(q, k, v, None, None, len_q, len_kv, P, False, True)
    dropped = torch.signbit(signed[:, :, :len_q, :len_kv]).cpu().numpy()
    i, j = np.arange(len_q)[:, None], np.arange(len_kv)[None, :]
    for b in range(2):
        for h in range(3):
            np.testing.assert_array_equal(~dropped[b, h], oracle.flash_keep(*numbers(state), P, b, h, 3, i, j))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("lens", "dim"), [((200, 336), 64), ((67, 131), 128)])
def test_efficient_masks_are_bit_equal(library: WithTorch, lens: tuple[int, int], dim: int, p: float) -> None:
    states = []

    def torchs(q: Any, k: Any, v: Any) -> Any:
        seeded(library)
        results = library.torch.ops.aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, p, 0, True
        )  # fmt: skip
        states.append((*numbers(results[2]), *numbers(results[3])))
        return results[0]

    expected = kept(library, torchs, lens, dim)
    (state,) = set(states)
    options = {"dropout_scheme": "word", "generator": state}
    ours = kept(library, lambda q, k, v: cuflash.flash_attn_func(q, k, v, p, **options), lens, dim)
    np.testing.assert_array_equal(ours, expected)
    i, j = np.arange(lens[0])[:, None], np.arange(lens[1])[None, :]
    for b in range(2):
        for h in range(3):
            uniform = oracle.word_uniform(*state, b, h, 3, i, j, lens[1], lens[0] * lens[1])
            np.testing.assert_array_equal(expected[b, h], uniform > np.float32(p))


@pytest.mark.parametrize("scheme", ["byte", "word"])
def test_our_generator_moves_on_like_torchs(library: WithTorch, scheme: str) -> None:
    torch, (len_q, len_kv) = library.torch, (37, 51)
    q, k, v = (torch.randn(2, n, 3, 64, dtype=torch.float16, device="cuda") for n in (len_q, len_kv, len_kv))
    seeded(library)
    generator = cuflash.PhiloxGenerator.from_torch_state(torch.cuda.get_rng_state().numpy().tobytes())
    for _ in range(2):
        if scheme == "byte":
            _, _, state, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, len_q, len_kv, P, False, False
            )
            expected = numbers(state)
        else:
            _, _, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
                q, k, v, None, None, None, None, None, P, 0, True
            )  # fmt: skip
            expected = numbers(seed) + numbers(offset)
        options = {"dropout_scheme": scheme, "generator": generator, "return_rng_state": True}
        _, rng_state = cuflash.flash_attn_func(q, k, v, P, **options)
        assert numbers(rng_state) == expected
        assert generator.torch_state() == torch.cuda.get_rng_state().numpy().tobytes()


@dataclass(frozen=True, slots=True)
class Efficient:
    """One call of torch's memory-efficient kernels: two elements with three heads."""

    dtype: np.dtype
    lens: tuple[int, int]
    dims: tuple[int, int] = (64, 64)
    mask_type: int = 0
    window_size: int = 0
    bias_shape: tuple[int, ...] = ()
    """Of (2, 3, len_q, len_kv), 1 where it is expanded."""
    dropout_p: float = 0.0
    scale: float | None = None


EFFICIENT = {
    "fp32": Efficient(FP32, (100, 150)),
    "fp16-dims": Efficient(FP16, (100, 150), (64, 40)),
    "bf16-d128-top-left": Efficient(BF16, (130, 200), (128, 128), mask_type=1),
    "fp16-bottom-right": Efficient(FP16, (130, 200), mask_type=2),
    "fp32-d256": Efficient(FP32, (70, 90), (256, 128), mask_type=2),
    "fp16-window": Efficient(FP16, (150, 150), mask_type=2, window_size=40),
    "fp16-negative-scale": Efficient(FP16, (100, 100), scale=-0.2),
    "bias": Efficient(FP16, (104, 152), bias_shape=(2, 3, 104, 152)),
    "bias-one-head": Efficient(BF16, (104, 152), bias_shape=(2, 1, 104, 152), mask_type=1),
    "bias-keys": Efficient(FP32, (104, 152), bias_shape=(2, 1, 1, 152)),
    "dropout": Efficient(FP16, (100, 152), dropout_p=P),
    "dropout-causal": Efficient(FP32, (100, 152), (64, 32), mask_type=2, dropout_p=0.5),
    "dropout-bias": Efficient(BF16, (104, 152), (128, 128), bias_shape=(1, 3, 104, 152), dropout_p=P),
}


@pytest.mark.parametrize("name", EFFICIENT)
def test_efficient(library: WithTorch, name: str) -> None:
    case, aten, rng = EFFICIENT[name], library.torch.ops.aten, np.random.default_rng(3)
    (len_q, len_kv), (dim, dim_v) = case.lens, case.dims
    shapes = [(2, len_q, 3, dim), (2, len_kv, 3, dim), (2, len_kv, 3, dim_v), (2, len_q, 3, dim_v)]
    arrays = [rng.standard_normal(shape, np.float32).astype(case.dtype) for shape in shapes]
    q, k, v, dout = (library.put(x) for x in arrays)
    bias = expanded = None
    if case.bias_shape:
        bias = rng.standard_normal(case.bias_shape, np.float32).astype(case.dtype)
        expanded = library.put(bias).expand(2, 3, len_q, len_kv)
    window = (case.window_size - 1 if case.window_size else -1, 0 if case.mask_type else -1)
    alignment = "top-left" if case.mask_type == 1 else "bottom-right"
    more = {"scale": case.scale, "window_size": case.window_size or None}

    seeded(library)
    torch_out, torch_lse, seed, offset, max_q, max_k = aten._efficient_attention_forward(
        q, k, v, expanded, None, None, None, None, case.dropout_p, case.mask_type, True, **more
    )
    torch_gradients = aten._efficient_attention_backward(
        dout, q, k, v, expanded, torch_out, None, None, max_q, max_k, torch_lse, case.dropout_p, seed, offset,
        case.mask_type, bias is not None, **more,
    )  # fmt: skip

    options = {
        "window": window, "alignment": alignment, "scale": case.scale, "bias": bias,
        "dropout_p": case.dropout_p, "dropout_scheme": "word",
    }  # fmt: skip
    ours = {
        "softmax_scale": case.scale, "window_size": window, "alignment": alignment, "dropout_p": case.dropout_p,
        "dropout_scheme": "word",
    }  # fmt: skip
    ours["attn_bias"] = None if bias is None else library.put(bias)
    drawn, given = {}, {}
    if case.dropout_p:
        options["rng_state"] = drawn["generator"] = (*numbers(seed), *numbers(offset))
        given["rng_state"] = library.put(np.array(options["rng_state"], np.uint64).view(np.int64))
    exact = oracle.attention(*arrays, **options)
    out, lse = cuflash.flash_attn_func(q, k, v, **ours, **drawn, return_lse=True)
    close(library, "out", out, torch_out, exact.out)
    close(library, "lse", lse, torch_lse[:, :, :len_q], exact.lse)
    gradients = cuflash.flash_attn_backward(dout, q, k, v, out, lse, **ours, **given, bias_grad=bias is not None)
    for field, mine, torchs_own in zip(("dq", "dk", "dv"), gradients, torch_gradients, strict=False):
        close(library, field, mine, torchs_own, getattr(exact, field))
    if bias is not None:
        axes = [axis for axis, n in enumerate(case.bias_shape) if n == 1]
        reduced = torch_gradients[3].float()
        reduced = reduced.sum(axes, keepdim=True) if axes else reduced
        close(library, "dbias", gradients.dbias, reduced, exact.dbias)
