"""Written scores and masks in functions that torch compiles whole, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cuflash
from cuflash import mods

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:"),
]


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
shows_closures = pytest.mark.skipif(
    OLD, reason="torch.compile shows nothing of functions that are made in what it compiles (2.14 does, 2.11 does not)"
)
takes_dataclasses = pytest.mark.skipif(
    OLD, reason="torch.compile takes no frozen dataclass, as block masks and traced functions are (2.14 does)"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    torch.manual_seed(0)
    torch._dynamo.reset()
    return request.param


SHARE = 0.5  # a number that is found by a global name


def scaled(score: Any, share: float = 2.0) -> Any:
    return mods.tanh(score / share) * share


def inside(q: Any, k: Any, v: Any, table: Any, ids: Any) -> Any:
    """Functions that are made in what is compiled, of its arguments, of others and of numbers."""

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return scaled(s) * SHARE + table[h, j - i + table.shape[1] // 2]

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (ids[i] == ids[j]) | (j == 0)

    return cuflash.flash_attn_func(q, k, v, score_mod=score, mask_mod=seen)


def ready(q: Any, k: Any, v: Any, table: Any, ids: Any) -> Any:
    """Those of `cuflash.mods`, heads before rows, and more than one call."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = cuflash.flex_attention(q, k, v, mods.relative_bias(table), mask_mod=mods.document(ids), enable_gqa=True)
    return out + cuflash.flex_attention(q, k, v, mods.softcap(2.0), enable_gqa=True).sin()


def inputs(device: str) -> list[Any]:
    shapes = (2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16), (4, 17)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    return [*leaves, torch.arange(9, device=device) // 4]


def results(f: Callable[..., Any], given: list[Any]) -> list[Any]:
    """What a function gives, and the gradients of what requires them."""
    out = f(*given)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x for x in given if x.requires_grad])]


def close(actual: list[Any], expected: list[Any]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@shows_closures
@pytest.mark.parametrize(("attend", "backend"), [(inside, "aot_eager"), (inside, "inductor"), (ready, "aot_eager")])
def test_functions_are_compiled_with_what_they_are_in(device: str, attend: Callable[..., Any], backend: str) -> None:
    if backend == "inductor" and device == "cpu":
        pytest.importorskip("torch._inductor.cpu_vec_isa")
    compiled, given = torch.compile(attend, fullgraph=True, backend=backend), inputs(device)
    close(results(compiled, given), results(attend, given))
    given = inputs(device)  # other numbers
    close(results(compiled, given), results(attend, given))
    with torch.no_grad():
        close([compiled(*given)], [attend(*given)])


@pytest.mark.parametrize(
    "kind", ["closure", "ready", *(pytest.param(x, marks=takes_dataclasses) for x in ("traced", "blocks"))]
)
def test_functions_that_were_made_before(device: str, kind: str) -> None:
    """Their arrays are read as they are at a call; what was traced before, and block masks, are taken, too."""
    tensors = inputs(device)[:3]
    slopes, far = torch.tensor([0.5, 0.25, 1.0, 0.0], device=device), 9
    buckets = mods.t5_bias(torch.randn(8, 4, device=device), max_distance=8)
    words: dict[str, Any] = {
        "closure": {"score_mod": lambda s, b, h, i, j: s + slopes[h] * (far - j)},
        "ready": {"score_mod": mods.alibi(slopes), "mask_mod": mods.causal()},
        "traced": {"score_mod": mods.trace("score_mod", buckets)},
        "blocks": {"block_mask": cuflash.create_block_mask(mods.causal(), len_q=9, len_kv=9)},
    }[kind]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, **words)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        close(results(compiled, tensors), results(attend, tensors))
        slopes.mul_(-1)


@shows_closures
def test_a_module_learns_what_its_score_reads(device: str) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(4, 17, device=device))

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            table = self.table
            return cuflash.flash_attn_func(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 8])

    module = Attention()
    given = inputs(device)[:3]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for attend in (compiled, module):
        module.zero_grad()
        attend(*given).square().sum().backward()
        gradients.append(module.table.grad)
    close(gradients[:1], gradients[1:])


@shows_closures
def test_numbers_are_compiled_in_and_anew_where_they_change(device: str) -> None:
    q, k, v = inputs(device)[:3]

    def attend(q: Any, share: float, reach: int) -> Any:
        return cuflash.flash_attn_func(
            q, k, v, score_mod=lambda s, b, h, i, j: s * share, mask_mod=lambda b, h, i, j: abs(i - j) < reach
        )

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for share, reach in ((2.0, 3), (3.0, 3), (3.0, 5), (-1.5, 2), (2.0, 3)):
        close([compiled(q, share, reach)], [attend(q, share, reach)])


@takes_dataclasses
def test_another_mask_or_score_is_compiled_anew(device: str) -> None:
    q = inputs(device)[0]
    blocks = torch.compile(lambda q, m: cuflash.flash_attn_func(q, q, q, block_mask=m), fullgraph=True, backend="eager")
    for rule in (mods.causal(), mods.sliding_window(2, 0)):
        mask = cuflash.create_block_mask(rule, len_q=9, len_kv=9)
        close([blocks(q, mask)], [cuflash.flash_attn_func(q, q, q, block_mask=mask)])
    scores = torch.compile(lambda q, s: cuflash.flash_attn_func(q, q, q, score_mod=s), fullgraph=True, backend="eager")
    for cap in (2.0, 3.0):
        score = mods.trace("score_mod", mods.softcap(cap))
        close([scores(q, score)], [cuflash.flash_attn_func(q, q, q, score_mod=score)])


def test_what_torch_does_not_follow_is_refused_with_what_helps() -> None:
    q = torch.randn(1, 5, 2, 8)
    held = type("Held", (), {})()
    held.table = torch.randn(2, 5)
    for score, words in (
        (lambda s, b, h, i, j: s if s > 0 else -s, "use cuflash.mods.where"),
        (lambda s, b, h, i, j: s + mods.captured(held.table)[h, 0], "finds a Held by name"),
        (lambda s, b, h, i, j: s + TABLE[h, 0], "Give the array a local name around the function"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(
                lambda q, score=score: cuflash.flash_attn_func(q, q, q, score_mod=score),
                backend="eager",
                fullgraph=True,
            )(q)


TABLE = torch.ones(2, 5)
