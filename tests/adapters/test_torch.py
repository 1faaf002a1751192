"""Tensors of torch that require grad, are mapped, cast, checkpointed or compiled, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cuflash
from cuflash.errors import InvalidArgument, UnsupportedProblem

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    torch.manual_seed(0)
    return request.param


def tensors(device: str, dtype: Any = None, *, length: int = 9, grad: bool = True, lead: tuple = ()) -> list[Any]:
    """q, k and v of four heads and two."""
    shapes = [(*lead, 2, length, heads, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, device=device, dtype=dtype or torch.float32, requires_grad=grad) for shape in shapes]


def naive(q: Any, k: Any, v: Any, bias: Any = None, sink: Any = None, causal: bool = False) -> tuple[Any, Any]:
    """(out, lse) by torch's own operations, (b, s, h, d)."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1) > 0, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp()[..., : k.shape[2]] @ v).transpose(1, 2), lse


def results(f: Callable[..., Any], *inputs: Any) -> list[Any]:
    """What a function gives, and the gradients of all inputs for weights that are always the same."""
    computed = f(*inputs)
    computed = computed if isinstance(computed, tuple) else (computed,)
    total = sum(
        (x * torch.linspace(-1, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)).sum() for x in computed
    )
    return [*computed, *torch.autograd.grad(total, inputs)]


def close(computed: list[Any], expected: list[Any], atol: float = 2e-5) -> None:
    assert len(computed) == len(expected)
    for x, y in zip(computed, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y.double(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("bias_shape", [(2, 4, 9, 9), (4, 1, 9), (9, 9)])
def test_every_differentiable_input(device: str, bias_shape: tuple[int, ...]) -> None:
    bias = torch.randn(bias_shape, device=device, requires_grad=True)
    sink = torch.randn(4, device=device, requires_grad=True)

    def ours(q: Any, k: Any, v: Any, bias: Any, sink: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, causal=True, attn_bias=bias, sink=sink, return_lse=True)

    inputs = (*tensors(device), bias, sink)
    close(results(ours, *inputs), results(lambda *x: naive(*x, causal=True), *inputs))
    wide = bias.expand(2, 4, 9, 9)
    close(results(lambda b: ours(*inputs[:3], b.expand_as(wide), sink), bias)[2:], results(ours, *inputs)[5:6])


def test_only_the_log_sum_exp(device: str) -> None:
    inputs = tensors(device)
    ours = results(lambda q, k: cuflash.flash_attn_func(q, k, inputs[2], return_lse=True)[1], *inputs[:2])
    close(ours, results(lambda q, k: naive(q, k, inputs[2])[1], *inputs[:2]))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sixteen_bits(device: str, name: str) -> None:
    inputs = tensors(device, getattr(torch, name))
    close(results(cuflash.flash_attn_func, *inputs), results(lambda *x: naive(*x)[0].to(x[0].dtype), *inputs), 0.06)


def test_every_function(device: str) -> None:
    q, k, v = tensors(device)
    q3 = q.detach().requires_grad_()
    kv, qkv = (torch.randn(2, 9, n, 4, 16, device=device, requires_grad=True) for n in (2, 3))
    close(results(cuflash.flash_attn_kvpacked_func, q3, kv), results(lambda q, x: naive(q, *x.unbind(2))[0], q3, kv))
    close(results(cuflash.flash_attn_qkvpacked_func, qkv), results(lambda x: naive(*x.unbind(2))[0], qkv))
    heads_first = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    mask = torch.randn(9, 9, device=device, requires_grad=True)
    close(
        results(lambda *x: cuflash.scaled_dot_product_attention(*x, enable_gqa=True), *heads_first, mask),
        results(lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
                *heads_first, mask),
    )  # fmt: skip
    starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    packed = [x.detach()[0].requires_grad_() for x in (q, k, v)]

    def one_by_one(q: Any, k: Any, v: Any) -> Any:
        return torch.cat([naive(q[None, a:b], k[None, a:b], v[None, a:b])[0][0] for a, b in ((0, 4), (4, 9))])

    for lengths in ((), (5, 5)):
        ours = results(lambda *x: cuflash.flash_attn_varlen_func(*x, starts, starts, *lengths), *packed)  # noqa: B023
        close(ours, results(one_by_one, *packed))


def test_gradcheck(device: str) -> None:
    q, k, v = tensors(device, torch.float64, length=4)
    bias = torch.randn(4, 4, device=device, dtype=torch.float64, requires_grad=True)

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, attn_bias=bias, causal=True, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias))


def differentiated(device: str) -> tuple[Callable[..., Any], list[Any]]:
    """A function of q, k, v, a bias and a sink, in float64, and places of theirs."""
    shapes = (2, 3, 4, 5), (2, 5, 2, 5), (2, 5, 2, 4), (4, 3, 5)
    x = [torch.randn(*shape, dtype=torch.float64, device=device) for shape in shapes]

    def loss(q: Any, k: Any, v: Any, bias: Any) -> Any:
        out, lse = cuflash.flash_attn_func(
            q, k, v, attn_bias=bias, sink=torch.ones(4, device=device), causal=True, softcap=2.0, return_lse=True,
            dropout_p=0.2, generator=(3, 0),
        )  # fmt: skip
        return out.sin().sum() + (lse[lse.isfinite()] ** 2).sum()

    return loss, x


def test_second_derivatives_and_forward_mode_are_finite_differences(device: str) -> None:
    loss, x = differentiated(device)
    x = [y.requires_grad_() for y in x]
    torch.autograd.gradcheck(loss, x, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    if device != "cpu":
        pytest.skip("no kernel computes tangents of gradients")
    torch.autograd.gradgradcheck(loss, x, check_fwd_over_rev=True, fast_mode=True)


def test_forward_mode_inside_transforms(device: str) -> None:
    loss, x = differentiated(device)
    changes = [torch.randn_like(y) for y in x]
    dots = lambda a, b: sum((y * z).sum() for y, z in zip(a, b, strict=True))  # noqa: E731
    func, every = torch.func, (0, 1, 2, 3)
    gradient = func.grad(loss, every)
    pushed = func.jvp(loss, tuple(x), tuple(changes))[1]
    torch.testing.assert_close(pushed, dots(gradient(*x), changes))
    row = x[0][0, 1, :, 2]
    at = tuple(torch.tensor(i, device=device) for i in ([0], [1], [0, 1, 2, 3], [2]))
    of_row = lambda row: loss(x[0].index_put(at, row), *x[1:])  # noqa: E731
    torch.testing.assert_close(func.jacfwd(of_row)(row), func.grad(of_row)(row))
    if device != "cpu":
        pytest.skip("no kernel computes tangents of gradients")
    turned = func.jvp(gradient, tuple(x), tuple(changes))[1]
    pulled = func.grad(lambda *x: dots(gradient(*x), changes), every)(*x)
    for a, b in zip(turned, pulled, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(func.hessian(of_row)(row), func.jacrev(func.grad(of_row))(row))


def test_mapped_gradients_drop_what_the_forward_dropped(device: str) -> None:
    q, k, v = (x.detach() for x in tensors(device, length=4))
    attend = lambda q: cuflash.flash_attn_func(q, k, v, dropout_p=0.4, generator=(3, 0))[0, :2, :, 0]  # noqa: E731
    rows = [torch.func.vjp(attend, q)[1](row.reshape(2, 4))[0] for row in torch.eye(8, device=device)]
    torch.testing.assert_close(torch.func.jacrev(attend)(q), torch.stack(rows).reshape(2, 4, *q.shape))
    pushed = lambda q: torch.func.jvp(attend, (q,), (q,))[1]  # noqa: E731
    with pytest.raises(UnsupportedProblem, match=r"^torch.vmap maps a call with dropout in forward mode"):
        torch.vmap(pushed, randomness="different")(torch.stack([q, q]))


@pytest.mark.parametrize("no_grad", [False, True])
def test_dual_tensors(device: str, no_grad: bool) -> None:
    mode = torch.autograd.forward_ad
    q, k, v = (x.detach() for x in tensors(device, torch.float64, length=6))
    with mode.dual_level(), torch.set_grad_enabled(not no_grad):
        dual = cuflash.flash_attn_func(q, mode.make_dual(k, v), mode.make_dual(v, k), causal=True)
        out, tangent = mode.unpack_dual(dual)
    expected = cuflash.flash_attn_jvp(q, k, v, dk=v, dv=k, causal=True)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(tangent, expected[2])


def test_what_has_no_gradient_is_refused(device: str) -> None:
    q, k, v = tensors(device)
    mode = torch.autograd.forward_ad
    further = r"^cuflash has first and second derivatives of attention, and none of these is differentiated again"
    once = torch.autograd.grad(cuflash.flash_attn_func(q, k, v).square().sum(), q, create_graph=True)[0]
    if device == "cpu":
        twice = torch.autograd.grad(once.square().sum(), q, create_graph=True)[0]
        with pytest.raises(UnsupportedProblem, match=further):
            twice.sum().backward()
    else:
        with pytest.raises(UnsupportedProblem, match=r"^no kernel computes tangents of gradients"):
            once.sum().backward()
    out, lse = cuflash.flash_attn_func(q, k, v, return_lse=True)
    explicit = cuflash.flash_attn_backward(torch.ones_like(out), q, k, v, out, lse)[0]
    with pytest.raises(UnsupportedProblem, match=further):
        explicit.sum().backward()
    factor = torch.full((4,), 2.0, device=device, requires_grad=True)
    written = cuflash.flash_attn_func(*(x.float() for x in (q, k, v)), score_mod=lambda s, b, h, i, j: s * factor[h])
    (once,) = torch.autograd.grad(written.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedProblem, match=r"^(what score_mod reads has a gradient in a call that|no kernel)"):
        once.sum().backward()
    with mode.dual_level(), pytest.raises(UnsupportedProblem, match=r"has a tangent of torch's forward mode"):
        cuflash.flash_attn_prepare(mode.make_dual(q.detach(), q.detach()), k.detach(), v.detach())
    with pytest.raises(InvalidArgument, match=r"^out is given and a gradient may be taken"):
        cuflash.flash_attn_func(q, k, v, out=torch.empty_like(q))
    with pytest.raises(UnsupportedProblem, match=r"^alibi_slopes requires grad, and there is no gradient of it"):
        cuflash.flash_attn_func(q, k, v, alibi_slopes=torch.ones(4, device=device, requires_grad=True))
    with pytest.raises(UnsupportedProblem, match=r"^k_cache is a cache, and there are no gradients of it or beside it"):
        cuflash.flash_attn_with_kvcache(q, k, v)


def test_what_is_refused_is_refused_where_it_is_traced() -> None:
    """By the same words: a tangent that a compiled graph lost would be zero."""
    mode, attend = torch.autograd.forward_ad, lambda x: cuflash.flash_attn_func(x, x, x)

    def dual(x: Any) -> Any:
        with mode.dual_level():
            return mode.unpack_dual(attend(mode.make_dual(x, x))).tangent

    for function, words in (
        (lambda x: torch.func.jvp(attend, (x,), (x,)), "cuflash has no forward mode for torch"),
        (lambda x: torch.func.jacfwd(attend)(x), "cuflash has no forward mode for torch"),
        (dual, "cuflash has no forward mode for torch"),
        (lambda x: torch.func.grad(lambda y: attend(y).sum())(x), "attention inside torch.func.grad"),
        (lambda x: attend(x[..., :3, :]) * cuflash.flash_attn_func(x, x, x, out=x), "out is given to a call that"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=words):
            torch.compile(function, backend="eager", fullgraph=True)(torch.randn(1, 5, 4, 8))


def test_transforms(device: str) -> None:
    """vmap, grad, and one of the other, mapped in any axis or not at all, against a loop."""
    _, k, v = tensors(device, torch.float64, grad=False)
    many = torch.randn(2, 9, 3, 4, 16, device=device, dtype=torch.float64)
    bias = torch.randn(3, 4, 9, 9, device=device, dtype=torch.float64)
    sink = torch.randn(3, 4, device=device)

    def attend(q: Any, bias: Any, sink: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, causal=True, attn_bias=bias, sink=sink)

    def gradients(q: Any, bias: Any, sink: Any) -> Any:
        return torch.func.grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2))(q, bias, sink)

    for given, dim in ((bias, 0), (bias[0], None), (bias[:, :1], 0), (bias[0, 0], None)):
        outs = torch.vmap(attend, in_dims=(2, dim, 0))(many, given, sink)
        computed = torch.vmap(gradients, in_dims=(2, dim, 0))(many, given, sink)
        for i in range(3):
            alone = many[:, :, i], given if dim is None else given[i], sink[i]
            close([outs[i], *(x[i] for x in computed)], [attend(*alone), *gradients(*alone)])
    nested = torch.vmap(torch.vmap(lambda q: attend(q, None, None)), in_dims=1)(
        many.movedim(2, 0).repeat(2, 1, 1, 1, 1).unflatten(0, (3, 2))
    )
    assert nested.shape == (2, 3, 2, 9, 4, 16)
    with pytest.raises(UnsupportedProblem, match=r"^randomness is 'error' in torch.vmap"):
        torch.vmap(lambda q: cuflash.flash_attn_func(q, k, v, 0.5), in_dims=2)(many)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_drop_what_they_dropped(device: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = tensors(device)
    attend = lambda *x: cuflash.flash_attn_func(*x, 0.4).square()  # noqa: E731
    torch.manual_seed(3)
    expected = results(attend, *inputs)
    torch.manual_seed(3)
    out = checkpoint(attend, *inputs, use_reentrant=reentrant)
    (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
    close([out, *(x.grad for x in inputs)], expected)
    assert not torch.equal(attend(*inputs), out), "the generator moves on"


def test_autocast(device: str) -> None:
    inputs = tensors(device)
    with torch.autocast(device, torch.bfloat16):
        out = cuflash.flash_attn_func(*inputs)
    assert out.dtype is torch.bfloat16
    close(results(lambda *x: naive(*x)[0].to(torch.bfloat16), *inputs)[1:], list(torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.numel(), device=device, dtype=out.dtype).view_as(out)).sum(), inputs
    )), 0.06)  # fmt: skip


def attend_dense(q: Any, k: Any, v: Any) -> Any:
    return cuflash.flash_attn_func(q * 2, k, v, causal=True, softmax_scale=0.3).sin()


def attend_heads_first(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return cuflash.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2) * 2


def attend_packed(q: Any, k: Any, v: Any) -> Any:
    starts = torch.arange(0, 3 * q.shape[1], q.shape[1], device=q.device, dtype=torch.int32)
    longest = q.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return cuflash.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest).exp()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("attend", [attend_dense, attend_heads_first, attend_packed])
def test_compiled(device: str, attend: Callable[..., Any], backend: str) -> None:
    if backend == "inductor" and device == "cpu":
        pytest.importorskip("torch._inductor.cpu_vec_isa")
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for length in (9, 13, 17):
        inputs = tensors(device, length=length)
        close(results(compiled, *inputs), results(attend, *inputs))
        with torch.no_grad():
            close([compiled(*inputs)], [attend(*inputs)])


@pytest.mark.parametrize("compiled", [False, True])
def test_products_of_tf32(device: str, compiled: bool) -> None:
    """The gradient rounds as the forward does, which no 24 bits come to."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        return cuflash.flash_attn_func(q, k, v, precision="tf32")

    torch._dynamo.reset()
    inputs = tensors(device)
    out, pullback = cuflash.flash_attn_vjp(*(x.detach() for x in inputs), precision="tf32")
    weights = torch.linspace(-1, 1, out.numel(), device=device, dtype=out.dtype).view_as(out)
    expected = [out, *pullback(weights)]
    mine = results(torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend, *inputs)
    if device == "cpu":
        assert [bool((x == y).all()) for x, y in zip(mine, expected, strict=True)] == [True] * 4
    full = results(cuflash.flash_attn_func, *inputs)
    assert all(float((x - y).detach().abs().max()) > 1e-5 for x, y in zip(mine, full, strict=True))


# PyTorch's own check looks at .grad of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("written", [False, True])
def test_operators(device: str, written: bool) -> None:
    from cuflash.adapters.torch import operators
    from cuflash.adapters.torch.written import spelled
    from cuflash.ops.call import asked

    q, k, v = tensors(device)
    bias, sink = (
        torch.randn(4, 9, 9, device=device, requires_grad=True),
        torch.randn(4, device=device, requires_grad=True),
    )
    table, ids = torch.randn(4, 17, device=device, requires_grad=True), torch.arange(9, device=device)
    score, mask = (
        cuflash.mods.trace("score_mod", lambda s, b, h, i, j: 2 * s + table[h, i - j + 8]),
        cuflash.mods.trace("mask_mod", lambda b, h, i, j: ids[i] >= j),
    )
    options = asked().replace(score_mod=score.mod, mask_mod=mask.mod) if written else asked()
    captured = [*score.arrays, *mask.arrays] if written else []
    settings = (
        None, True, -1, -1, 0.0, "bottom-right", 0.0, "byte", False, None, None, 0, False, "full", False, True, "bshd",
        "flash", spelled(options),
    )  # fmt: skip
    given = (q, k, v, None, bias, None, sink, *4 * (None,), captured, None, *settings, 0, -1, True)
    torch.library.opcheck(operators.forward, given)

    def detached(x: Any) -> Any:
        return [y.detach() for y in x] if isinstance(x, list) else x.detach() if torch.is_tensor(x) else x

    torch.library.opcheck(torch.ops.cuflash.forward.default, (*map(detached, given),))
    with torch.no_grad():
        out, lse, row_state, rng = torch.ops.cuflash.forward(*given)
    inputs = [detached(x) for x in given[:12]]
    backward = (torch.randn_like(out), lse, None, row_state, rng, out, *inputs, *settings, True, written)
    torch.library.opcheck(operators.backward, backward)


@pytest.mark.gpu
def test_streams_and_graphs() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    inputs = tensors("cuda", torch.bfloat16)
    expected = [x.detach() for x in results(cuflash.flash_attn_func, *inputs)]  # torch warns of graphs of two streams
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            computed = [x.detach() for x in results(cuflash.flash_attn_func, *inputs)]
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    close(computed, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [x.detach() for x in results(cuflash.flash_attn_func, *inputs)]  # torch warns of its graph's stream
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    close(captured, results(cuflash.flash_attn_func, *inputs))


def test_import_brings_no_torch_and_the_first_call_may_be_compiled() -> None:
    import subprocess
    import sys

    script = (
        "import sys, cuflash; assert 'torch' not in sys.modules; import torch\n"
        "f = torch.compile(cuflash.flash_attn_func, fullgraph=True, backend='aot_eager')\n"
        "x = torch.randn(1, 5, 2, 8, requires_grad=True); f(x, x, x).sum().backward(); print(x.grad.shape)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
