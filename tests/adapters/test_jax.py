"""Attention inside JAX's transformations: on the CPU by the NumPy backend, and on a GPU by the kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from inputs import BF16, FP16, FP32, random

import cuflash
from cuflash.errors import InvalidArgument, UnsupportedProblem

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = jax.numpy

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES, autouse=True)
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The device of every array that a test makes."""
    if request.param == "cuda" and "cuda" not in {device.platform.replace("gpu", "cuda") for device in jax.devices()}:
        pytest.skip("JAX sees no GPU")
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def put(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def get(x: Any) -> np.ndarray:
    return np.asarray(x)


CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3), "softcap": 2.0},
    "top-left": {"causal": True, "alignment": "top-left"},
    "alibi": {"alibi_slopes": random(4, dtype=FP32) ** 2},
    "mask": {"attn_mask": random(1, 4, 37, 53, dtype=FP32) > -1},
    "bias": {"attn_bias": random(4, 37, 53, dtype=FP32), "causal": True},
    "one bias": {"attn_bias": random(2, 1, 37, 53, dtype=FP32)},
    "sink": {"sink": random(4, dtype=FP32), "softmax_scale": 0.3},
}
ORACLE = {"attn_bias": "bias", "attn_mask": "mask", "window_size": "window", "softmax_scale": "scale"}


def tensors(dtype: Any, heads_kv: int = 2) -> list[np.ndarray]:
    """q, k, v, dout and dlse."""
    shapes = (2, 37, 4, 16), (2, 53, heads_kv, 16), (2, 53, heads_kv, 24), (2, 37, 4, 24)
    arrays = [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [*arrays, random(2, 4, 37, dtype=FP32)]


def learnt(keywords: dict[str, Any]) -> list[str]:
    return [name for name in ("attn_bias", "sink") if name in keywords]


def gradients(call: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any, dlse: Any, given: dict[str, Any]) -> Any:
    """(out, lse), then gradients of q, k, v and of what is learnt, pulled through out and lse."""
    names = learnt(given)

    def of_tensors(q: Any, k: Any, v: Any, *others: Any) -> Any:
        return call(q, k, v, return_lse=True, **given | dict(zip(names, others, strict=True)))

    results, pullback = jax.vjp(of_tensors, q, k, v, *(given[name] for name in names))
    return results, pullback((dout, dlse))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "op-by-op"])
@pytest.mark.sample(3)
def test_results_and_gradients(name: str, dtype: Any, jitted: bool) -> None:
    keywords, arrays = CALLS[name], tensors(dtype)
    numbers = {n: x for n, x in keywords.items() if not isinstance(x, np.ndarray)}

    def whole(given: dict[str, Any], *tensors: Any) -> Any:
        return gradients(cuflash.flash_attn_func, *tensors, given | numbers)

    whole = jax.jit(whole) if jitted else whole
    given = {n: put(x) for n, x in keywords.items() if isinstance(x, np.ndarray)}
    (out, lse), grads = whole(given, *map(put, arrays))
    words = {ORACLE.get(n, n): x for n, x in keywords.items()}
    exact, naive = oracle.attention(*arrays, **words), oracle.naive_in_dtype(*arrays, **words)
    others = dict(zip(learnt(keywords), map(get, grads[3:]), strict=True))
    actual = oracle.Attention(
        *map(get, (out, lse, *grads[:3])), others.get("attn_bias"), others.get("sink")
    )  # fmt: skip
    oracle.assert_all_close(actual, exact, naive, name)
    assert out.dtype == grads[0].dtype == dtype and lse.dtype == np.float32


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, bias = put(random(1, 8, 2, 16, dtype=FP32)), put(random(2, 8, 8, dtype=FP32))
    call = lambda x, bias: cuflash.flash_attn_func(x, x, x, attn_bias=bias).sum()  # noqa: E731
    texts = [str(jax.make_jaxpr(jax.grad(call, argnums))(x, bias)) for argnums in (0, (0, 1))]
    assert ["bias_grad=True" in text for text in texts] == [False, True]


def test_scaled_dot_product_attention() -> None:
    q, k, v, dout, _ = (x.swapaxes(1, 2) if x.ndim == 4 else x for x in tensors(FP32))
    call = lambda *x: cuflash.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)  # noqa: E731
    out, pullback = jax.jit(lambda *x: jax.vjp(call, *x))(*map(put, (q, k, v)))
    words = {"causal": True, "alignment": "top-left"}
    results = [get(x).swapaxes(1, 2) for x in (out, *pullback(put(dout)))]
    arrays = [x.swapaxes(1, 2) for x in (q, k, v, dout)]
    exact, naive = oracle.attention(*arrays, **words), oracle.naive_in_dtype(*arrays, **words)
    oracle.assert_all_close(oracle.Attention(results[0], naive.lse, *results[1:]), exact._replace(lse=naive.lse), naive)


STARTS_Q, STARTS_K = np.array([0, 9, 9, 30], np.int32), np.array([0, 4, 20, 41], np.int32)


@pytest.mark.parametrize("used", [False, True])
def test_packed_sequences(used: bool) -> None:
    q, k, v = (random(n, h, 16, dtype=FP32) for n, h in ((33, 4), (45, 2), (45, 2)))
    dout, dlse = random(33, 4, 16, dtype=FP32, seed=1), random(4, 33, dtype=FP32)
    lengths = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K}
    lengths |= {"seqused_k": np.array([4, 0, 17], np.int32)} if used else {}

    def whole(q: Any, k: Any, v: Any, dout: Any, dlse: Any, lengths: Any) -> Any:
        call = lambda *x: cuflash.flash_attn_varlen_func(  # noqa: E731
            *x, **lengths, max_seqlen_q=21, max_seqlen_k=21, causal=True, return_lse=True
        )
        results, pullback = jax.vjp(call, q, k, v)
        return results, pullback((dout, dlse))

    (out, lse), grads = jax.jit(whole)(*map(put, (q, k, v, dout, dlse)), jax.tree.map(put, lengths))
    exact, naive = (f(q, k, v, dout, dlse, causal=True, **lengths) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(*map(get, (out, lse, *grads))), exact, naive)
    eager = jax.grad(lambda q: cuflash.flash_attn_varlen_func(q, *map(put, (k, v)), **jax.tree.map(put, lengths)).sum())
    assert eager(put(q)).shape == q.shape  # the longest lengths are read from arrays that are there


def test_packed_projections() -> None:
    qkv = random(2, 19, 3, 2, 16, dtype=FP32)
    q, k, v = (qkv[:, :, i] for i in range(3))
    exact, naive = (f(q, k, v, np.ones_like(q)) for f in (oracle.attention, oracle.naive_in_dtype))
    grad = get(jax.jit(jax.grad(lambda x: cuflash.flash_attn_qkvpacked_func(x).sum()))(put(qkv)))
    results = oracle.Attention(naive.out, naive.lse, *(grad[:, :, i] for i in range(3)))
    oracle.assert_all_close(results, exact._replace(out=naive.out, lse=naive.lse), naive)


def test_pages() -> None:
    pages = random(7, 5, 2, 16, dtype=FP32)
    table = np.array([[3, 1, 6], [2, 0, 5]], np.int32)
    starts = np.array([0, 11, 25], np.int32)
    rows = np.concatenate([pages[table[b]].reshape(-1, 2, 16)[:n] for b, n in enumerate((11, 14))])
    q = random(4, 4, 16, dtype=FP32)
    starts_q = np.array([0, 1, 4], np.int32)
    call = jax.jit(
        lambda q, pages, starts_q, starts, table: cuflash.flash_attn_varlen_func(
            q, pages, pages, starts_q, starts, 3, 15, block_table=table, causal=True, return_lse=True
        )
    )
    out, lse = call(*map(put, (q, pages, starts_q, starts, table)))
    words = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts, "causal": True}
    exact, naive = (f(q, rows, rows, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(get(out), get(lse)), exact, naive)
    with pytest.raises(InvalidArgument, match=r"^block_table is given and gradients are taken"):
        jax.grad(lambda q: call(q, *map(put, (pages, starts_q, starts, table)))[0].sum())(put(q))


def test_caches() -> None:
    cache = random(3, 20, 2, 16, dtype=FP32)
    q, used = random(2, 3, 4, 16, dtype=FP32), np.array([7, 20], np.int32)
    numbers = np.array([2, 0], np.int32)
    call = lambda q, cache, used, numbers: cuflash.flash_attn_with_kvcache(  # noqa: E731
        q, cache, cache, cache_seqlens=used, cache_batch_idx=numbers, causal=True, return_softmax_lse=True
    )
    out, lse = jax.jit(call)(*map(put, (q, cache, used, numbers)))
    rows = cache[numbers]
    hidden = np.arange(20)[None, None, None] < (used[:, None, None, None] - 2 + np.arange(3)[None, None, :, None])
    exact, naive = (f(q, rows, rows, mask=hidden) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_all_close(oracle.Attention(get(out), get(lse)), exact, naive)
    mapped = jax.jit(jax.vmap(call, (0, None, 0, None)))(
        *map(put, (np.stack([q, q]), cache, np.stack([used, used]))), put(numbers)
    )
    np.testing.assert_allclose(get(mapped[0]), np.stack([out, out]), atol=1e-6)
    whole = jax.jit(lambda q, cache: cuflash.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=7))(
        put(q), put(cache[:2])
    )
    exact, naive = (f(q, cache[:2, :7], cache[:2, :7]) for f in (oracle.attention, oracle.naive_in_dtype))
    oracle.assert_close(get(whole), exact.out, naive.out, "out")
    new = put(q[:, :, :2])
    with pytest.raises(
        InvalidArgument, match=r"^k is given inside JAX's transformations, where arrays are not written"
    ):
        jax.jit(lambda *x: cuflash.flash_attn_with_kvcache(*x, cache_seqlens=5))(
            put(q), *[put(cache[:2])] * 2, new, new
        )
    with pytest.raises(InvalidArgument, match=r"a cache has none"):
        jax.grad(lambda q: call(q, *map(put, (cache, used, numbers)))[0].sum())(put(q))


def test_nothing_to_attend_to() -> None:
    for rows_q, rows_k in ((0, 4), (4, 0), (0, 0)):
        q, k = put(np.zeros((2, rows_q, 2, 16), FP32)), put(np.ones((2, rows_k, 2, 16), FP32))
        call = jax.jit(lambda q, k: cuflash.flash_attn_func(q, k, k, return_lse=True))
        out, lse = call(q, k)
        assert not get(out).any() and np.isneginf(get(lse)).all() and lse.shape == (2, 2, rows_q)
        dk = jax.jit(jax.grad(lambda k, call=call, q=q: call(q, k)[0].sum()))(k)
        assert not get(dk).any() and dk.shape == k.shape


# Dropout


def test_dropout_draws_from_a_key() -> None:
    q, k, v, dout, _ = tensors(FP32)
    key = jax.random.key(3)

    def whole(q: Any, k: Any, v: Any, dout: Any, generator: Any) -> Any:
        call = lambda *x: cuflash.flash_attn_func(*x, dropout_p=0.25, generator=generator, return_rng_state=True)  # noqa: E731
        (out, state), pullback = jax.vjp(call, q, k, v)
        return out, state, *pullback((dout, np.zeros(state.shape, jax.dtypes.float0)))

    arrays = *map(put, (q, k, v, dout)), key
    out, state, *grads = jax.jit(whole)(*arrays)
    seed, offset = get(state).view(np.uint64).tolist()
    words = {"dropout_p": 0.25, "rng_state": (seed, offset)}
    exact, naive = (f(q, k, v, dout, **words) for f in (oracle.attention, oracle.naive_in_dtype))
    actual = oracle.Attention(get(out), naive.lse, *map(get, grads))
    oracle.assert_all_close(actual, exact._replace(lse=naive.lse), naive)
    bits = get(jax.random.bits(key, (2,), np.uint32))
    assert (seed, offset) == (int(bits[0]) + (int(bits[1]) << 32), 0)
    eager = cuflash.flash_attn_func(*arrays[:3], dropout_p=0.25, generator=key)
    np.testing.assert_allclose(get(eager), get(out), rtol=1e-6, atol=1e-6)
    again = jax.jit(whole)(*arrays[:4], state)
    assert all((get(a) == get(b)).all() for a, b in zip(again, (out, state, *grads), strict=True))
    other = jax.jit(whole)(*arrays[:4], jax.random.split(key)[0])
    assert (get(other[0]) != get(out)).any()
    eager = jax.vmap(lambda x: cuflash.flash_attn_func(x, x, x, dropout_p=0.25, generator=(seed, offset)))(put(q[None]))
    same = cuflash.flash_attn_func(q, q, q, dropout_p=0.25, generator=(seed, offset))
    np.testing.assert_allclose(get(eager[0]), same, atol=2e-6)


def test_mapped_dropout_draws_for_every_element_what_it_draws_for_one() -> None:
    x = put(random(3, 2, 19, 2, 16, dtype=FP32))
    call = jax.jit(lambda x, key: cuflash.flash_attn_func(x, x, x, dropout_p=0.5, generator=key))
    keys = jax.random.split(jax.random.key(0), 3)
    for key, axis in ((keys[0], None), (keys, 0)):
        mapped = jax.vmap(call, (0, axis))(x, key)
        singly = jnp.stack([call(x[i], key if axis is None else key[i]) for i in range(3)])
        assert (get(mapped) == get(singly)).all()


@pytest.mark.parametrize("generator", [None, cuflash.PhiloxGenerator(3)])
def test_generators_of_the_host_are_refused(generator: Any) -> None:
    x = put(random(1, 8, 2, 16, dtype=FP32))
    with pytest.raises(InvalidArgument, match=r"the same numbers\. Pass a key \(jax\.random\.key"):
        jax.jit(lambda x: cuflash.flash_attn_func(x, x, x, dropout_p=0.5, generator=generator))(x)


# Transformations


def attend(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    return cuflash.flash_attn_func(q, k, v, causal=True, **keywords)


MAPPED = {
    "all": (0, 0, 0),
    "queries": (0, None, None),
    "keys": (None, 0, None),
    "keys and values": (None, 1, 2),
    "inner axes": (2, 1, 3),
}


BESIDE = {
    "nothing": {},
    "one bias": {"attn_bias": (1, 1, 9, 9)},
    "bias": {"attn_bias": (4, 9, 9)},
    "sink": {"sink": (4,)},
    "slopes": {"alibi_slopes": (2, 4)},
}


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.sample(4)
def test_vmap(name: str, beside: str, each: bool) -> None:
    """Mapped results and gradients are those of the elements, one by one."""
    axes = MAPPED[name]
    shapes = (2, 9, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)
    mapped = [s if a is None else tuple(np.insert(s, a, 3)) for s, a in zip(shapes, axes, strict=True)]
    arrays = [put(random(*shape, dtype=FP32)) for shape in mapped]
    given = {n: put(random(*((3, *shape) if each else shape), dtype=FP32)) for n, shape in BESIDE[beside].items()}
    in_axes = (*axes, dict.fromkeys(given, 0 if each else None))

    def call(q: Any, k: Any, v: Any, given: Any) -> Any:
        return attend(q, k, v, return_lse=True, **given)

    def total(q: Any, k: Any, v: Any, given: Any) -> Any:
        out, lse = call(q, k, v, given)
        return (out**2).sum() + jnp.sin(lse).sum()

    def element(i: int) -> list[Any]:
        tensors = [x if a is None else jnp.take(x, i, a) for x, a in zip(arrays, axes, strict=True)]
        return [*tensors, {n: x[i] if each else x for n, x in given.items()}]

    argnums = (0, 1, 2) if beside == "slopes" else (0, 1, 2, 3)
    for function in (call, jax.grad(total, argnums)):
        together = jax.jit(jax.vmap(function, in_axes))(*arrays, given)
        singly = [jax.jit(function)(*element(i)) for i in range(3)]
        expected = jax.tree.map(lambda *x: np.stack([get(y) for y in x]), *singly)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(get(a), b, rtol=2e-5, atol=2e-5)


def calls_of(function: Callable[..., Any], *arrays: Any) -> list[tuple[int, ...]]:
    """The shapes of q of every call in a program."""
    text = jax.jit(function).lower(*arrays).as_text()
    shapes = re.findall(r"\\22q\\22,\[([\d,]+)\]", text) or re.findall(r'\["q",\[([\d,]+)\]', text.replace("\\22", '"'))
    return [tuple(map(int, shape.split(","))) for shape in shapes]


def test_mapped_queries_of_shared_keys_are_more_heads() -> None:
    q, k = put(random(3, 2, 9, 4, 16, dtype=FP32)), put(random(2, 9, 2, 16, dtype=FP32))
    mapped = jax.vmap(attend, (0, None, None))
    assert calls_of(mapped, q, k, k) == [(2, 9, 12, 16)]
    assert calls_of(jax.vmap(mapped, (1, None, None)), jnp.stack([q, q, q, q], 1), k, k) == [(2, 9, 48, 16)]
    both = jax.vmap(jax.vmap(attend))
    assert calls_of(both, *[jnp.stack([q, q])] * 3) == [(12, 9, 4, 16)]


def test_scan_and_remat() -> None:
    q, k, v = map(put, (random(2, 19, 2, 16, dtype=FP32, seed=i) for i in range(3)))

    def layers(q: Any, k: Any, v: Any, block: Any) -> Any:
        return (jax.lax.scan(lambda x, scale: (block(x * scale, k, v), None), q, jnp.arange(1.0, 4.0))[0] ** 2).sum()

    def unrolled(q: Any, k: Any, v: Any) -> Any:
        for scale in (1.0, 2.0, 3.0):
            q = attend(q * scale, k, v)
        return (q**2).sum()

    expected = jax.grad(unrolled, (0, 1, 2))(q, k, v)
    for block in (attend, jax.checkpoint(attend), jax.checkpoint(attend, policy=jax.checkpoint_policies.dots_saveable)):
        computed = jax.jit(jax.grad(lambda *x, block=block: layers(*x, block), (0, 1, 2)))(q, k, v)
        for a, b in zip(computed, expected, strict=True):
            np.testing.assert_allclose(get(a), get(b), rtol=1e-5, atol=1e-5)


def test_control_flow_and_shapes_alone() -> None:
    x = put(random(2, 19, 2, 16, dtype=FP32))
    either = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: attend(x, x, x), lambda x: 2 * x, x))
    np.testing.assert_array_equal(get(either(True, x)), get(jax.jit(attend)(x, x, x)))
    np.testing.assert_array_equal(get(either(False, x)), 2 * get(x))
    out, lse = jax.eval_shape(lambda x: attend(x, x, x, return_lse=True), jax.ShapeDtypeStruct((8, 10**6, 2, 16), BF16))
    assert (out.shape, out.dtype, lse.shape) == ((8, 10**6, 2, 16), BF16, (8, 2, 10**6))
    jax.jit(attend).lower(*[jax.ShapeDtypeStruct((2, 19, 2, 16), FP32)] * 3).compile()


def test_explicit_gradients() -> None:
    q, k, v, dout, dlse = tensors(FP32)

    def whole(q: Any, k: Any, v: Any, dout: Any, dlse: Any) -> Any:
        (out, lse), pullback = cuflash.flash_attn_vjp(q, k, v, causal=True, return_lse=True)
        return (
            out,
            lse,
            pullback(dout, dlse),
            cuflash.flash_attn_backward(dout, q, k, v, out, lse, causal=True, dlse=dlse),
        )

    out, lse, *both = jax.jit(whole)(*map(put, (q, k, v, dout, dlse)))
    exact, naive = (f(q, k, v, dout, dlse, causal=True) for f in (oracle.attention, oracle.naive_in_dtype))
    for grads in both:
        oracle.assert_all_close(oracle.Attention(*map(get, (out, lse, *grads))), exact, naive)


DIFFERENTIATED = {
    "causal": {"causal": True, "softcap": 1.5, "attn_bias": random(4, 7, 9), "sink": random(4)},
    "window": {"window_size": (3, 1), "alibi_slopes": random(4) ** 2, "attn_bias": random(2, 1, 1, 9)},
    "mask": {"attn_mask": random(2, 4, 7, 9) > 0.3, "softmax_scale": -0.4, "attn_bias": random(1, 4, 7, 1)},
}


class Differentiated:
    """A function of q, k, v and a bias through out and lse, in float64: by cuflash, and written out."""

    def __init__(self, name: str) -> None:
        words = DIFFERENTIATED[name]
        self.tensors = [random(*shape, dtype=np.float64) for shape in ((2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 5))]
        self.tensors.append(words["attn_bias"].astype(np.float64))
        self.changes = [random(*x.shape, dtype=np.float64, seed=1) for x in self.tensors]
        self.weights = random(2, 7, 4, 5, dtype=np.float64), random(2, 4, 7, dtype=np.float64)
        wide = {n: x.astype(FP32) if n in ("sink", "alibi_slopes") else x for n, x in words.items()}
        self.options = {n: x for n, x in wide.items() if n != "attn_bias"}

    def __call__(self, q: Any, k: Any, v: Any, bias: Any) -> Any:
        options = {n: put(x) for n, x in self.options.items()}
        return self._weighed(*cuflash.flash_attn_func(q, k, v, attn_bias=bias, return_lse=True, **options))

    def written_out(self, q: Any, k: Any, v: Any, bias: Any) -> Any:
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.options.get("softmax_scale", 8**-0.5)
        cap = self.options.get("softcap")
        s = s if cap is None else cap * jnp.tanh(s / cap)
        distance = np.arange(9) - np.arange(7)[:, None] - 2
        s = s - self.options.get("alibi_slopes", np.zeros(4))[:, None, None] * np.abs(distance) + bias
        left, right = self.options.get("window_size", (99, 0 if self.options.get("causal") else 99))
        seen = (distance >= -left) & (distance <= right) & self.options.get("attn_mask", True)
        sink = self.options.get("sink", np.full(4, -np.inf))
        s = jnp.concatenate([jnp.where(seen, s, -np.inf), jnp.broadcast_to(sink[:, None, None], (2, 4, 7, 1))], -1)
        lse = jax.nn.logsumexp(s, -1)
        return self._weighed(jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(s - lse[..., None])[..., :-1], v), lse)

    def _weighed(self, out: Any, lse: Any) -> Any:
        return (self.weights[0] * jnp.sin(out)).sum() + (self.weights[1] * lse**2).sum()


def pushed(f: Any, *tensors: Any, changes: Any) -> Any:
    return jax.jvp(f, tensors, changes)[1]


def weighed_gradient(f: Any, changes: Any) -> Any:
    return lambda *x: sum((g * w).sum() for g, w in zip(jax.grad(f, (0, 1, 2, 3))(*x), changes, strict=True))


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, changes: lambda *x: jax.jvp(f, x, changes),
    "jvp of some": lambda f, changes: lambda q, k, v, b: pushed(lambda q, b: f(q, k, v, b), q, b, changes=changes[::3]),
    "linearize": lambda f, changes: lambda *x: jax.linearize(f, *x)[1](*changes),
    "jacfwd": lambda f, changes: (
        lambda q, k, v, b: jax.jacfwd(lambda x: f(q.at[0, 1, :, 2].set(x), k, v, b))(q[0, 1, :, 2])
    ),
    "mapped": lambda f, changes: (
        lambda q, k, v, b: jax.vmap(lambda q, k: pushed(lambda *x: f(*x, v, b), q, k, changes=changes[:2]), (0, None))(
            jnp.stack([q, 2 * q]), k
        )
    ),
    "forward over reverse": lambda f, changes: lambda *x: pushed(jax.grad(f, (0, 1, 2, 3)), *x, changes=changes),
    "reverse over reverse": lambda f, changes: jax.grad(weighed_gradient(f, changes), (0, 1, 2, 3)),
    "reverse over forward": lambda f, changes: jax.grad(lambda *x: pushed(f, *x, changes=changes), (0, 1, 2, 3)),
    "checkpoint": lambda f, changes: jax.grad(weighed_gradient(jax.checkpoint(f), changes), (0, 3)),
    "hessian": lambda f, changes: (
        lambda q, k, v, b: jax.hessian(lambda x: f(q, k.at[1, 2, 0].set(x), v, b))(k[1, 2, 0])
    ),
    "map of reverse": lambda f, changes: (
        lambda q, k, v, b: jax.grad(
            lambda q: (jax.vmap(jax.grad(f, 3), (None, None, None, 0))(q, k, v, jnp.stack([b, 2 * b])) ** 2).sum()
        )(q)
    ),
    "pushed and stopped": lambda f, changes: jax.grad(
        lambda *x: (lambda y, t: y * jax.lax.stop_gradient(t))(*jax.jvp(f, x, changes)), (0, 1, 2)
    ),
}
FIRST = ("jvp", "jvp of some", "linearize", "jacfwd", "mapped", "pushed and stopped")
"""Those of first order."""


@pytest.mark.parametrize("name", DIFFERENTIATED)
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.sample(5)
def test_derivatives_in_both_modes_and_of_both_orders(name: str, derivative: str, place: str) -> None:
    if place != "cpu" and derivative not in FIRST:
        pytest.skip("no kernel computes tangents of gradients")
    with jax.enable_x64(True):
        function = Differentiated(name)
        tensors, changes = (tuple(map(put, x)) for x in (function.tensors, function.changes))
        computed, expected = (
            jax.jit(DERIVATIVES[derivative](f, changes))(*tensors) for f in (function, function.written_out)
        )
        for a, b in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_derivatives_op_by_op_of_packed_sequences_with_dropout(place: str) -> None:
    """<u, J t> = <J^T u, t>, and H is symmetric."""
    with jax.enable_x64(True):
        x = [put(random(n, h, 8, dtype=np.float64)) for n, h in ((33, 4), (45, 2), (45, 2))]
        t, u = ([put(random(*a.shape, dtype=np.float64, seed=i)) for a in x] for i in (1, 2))
        starts = put(STARTS_Q), put(STARTS_K)
        keywords = {"causal": True, "dropout_p": 0.3, "generator": (7, 0)}
        loss = lambda *x: (cuflash.flash_attn_varlen_func(*x, *starts, **keywords) ** 2).sum()  # noqa: E731
        dots = lambda a, b: sum((y * z).sum() for y, z in zip(a, b, strict=True))  # noqa: E731
        gradient = jax.grad(loss, (0, 1, 2))
        np.testing.assert_allclose(jax.jvp(loss, x, t)[1], dots(gradient(*x), t), rtol=1e-10)
        if place != "cpu":
            pytest.skip("no kernel computes tangents of gradients")
        turned = [dots(jax.jvp(gradient, x, a)[1], b) for a, b in ((t, u), (u, t))]
        np.testing.assert_allclose(*turned, rtol=1e-10)
        np.testing.assert_allclose(dots(jax.grad(lambda *x: dots(gradient(*x), t), (0, 1, 2))(*x), u), turned[0])


def test_explicit_tangents(place: str) -> None:
    q, k, v, *_ = tensors(FP32)
    call = lambda *x: cuflash.flash_attn_jvp(*x[:3], x[3], dv=x[4], causal=True)  # noqa: E731
    expected = call(q, k, v, q, 2 * v)
    for computed in (jax.jit(call), call):
        for a, b in zip(computed(*map(put, (q, k, v, q, 2 * v))), expected, strict=True):
            np.testing.assert_allclose(get(a), b, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgument, match=r"^dq has shape"):
        jax.jit(call)(*map(put, (q, k, v, v, v)))


def test_programs_are_exported() -> None:
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    from jax import export

    x = put(random(2, 19, 2, 16, dtype=FP32))
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("cuflash_numpy", "cuflash_cuda")]
    stored = export.export(jax.jit(attend), disabled_checks=checks)(x, x, x).serialize()
    np.testing.assert_array_equal(get(export.deserialize(stored).call(x, x, x)), get(jax.jit(attend)(x, x, x)))


def test_programs_are_made_for_devices_that_are_there(place: str) -> None:
    from jax import export

    x = jax.ShapeDtypeStruct((2, 19, 2, 16), FP32)
    with pytest.raises(UnsupportedProblem, match=r"^a program is made for a device that cuflash does not know"):
        export.export(jax.jit(attend), platforms=["tpu"])(x, x, x)
    if place == "cpu" and jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedProblem, match=r"^a program for CUDA is made where JAX sees no GPU"):
            export.export(jax.jit(attend), platforms=["cuda"])(x, x, x)


# Refusals


def refused(kind: type[Exception], match: str, function: Callable[..., Any], *arrays: Any) -> None:
    for transformed in (function, jax.jit(function)):
        with pytest.raises(kind, match=match):
            transformed(*arrays)


def test_derivatives_that_there_are_none_of(place: str) -> None:
    x, slopes = put(random(2, 9, 2, 16, dtype=FP32)), put(random(2, dtype=FP32))
    once = lambda x: attend(x, x, x).sum()  # noqa: E731
    along = lambda x: jax.jvp(once, (x,), (x,))[1]  # noqa: E731
    if place == "cuda":
        second = r"^cuflash does not take second derivatives on a GPU"
        refused(UnsupportedProblem, second, jax.grad(along), x)
        refused(UnsupportedProblem, second, jax.hessian(once), x)
        refused(UnsupportedProblem, second, jax.grad(lambda x: jax.grad(once)(x).sum()), x)
    refused(UnsupportedProblem, r"^cuflash does not run in JAX's forward mode twice", jax.jacfwd(along), x)
    none_left = r"^cuflash has first and second derivatives of attention, and none of these is differentiated again"
    refused(UnsupportedProblem, none_left, jax.grad(lambda x: jax.grad(along)(x).sum()), x)
    explicit = lambda x: cuflash.flash_attn_vjp(x, x, x)[1](x)[0].sum()  # noqa: E731
    refused(UnsupportedProblem, none_left, jax.grad(explicit), x)
    alibi = lambda slopes: attend(x, x, x, alibi_slopes=slopes).sum()  # noqa: E731
    refused(
        UnsupportedProblem,
        r"^alibi_slopes is differentiated, but cuflash has no gradient of it",
        jax.grad(alibi),
        slopes,
    )


def test_arguments_are_checked_where_they_are_traced() -> None:
    x = put(random(2, 9, 2, 16, dtype=FP32))
    starts = put(np.array([0, 9], np.int32))
    calls = (
        (r"^v has number of heads 2 but k has 1", lambda x, s: attend(x, x[:, :, :1], x)),
        (r"^causal is 3; expected True or False", lambda x, s: cuflash.flash_attn_func(x, x, x, causal=3)),
        (r"^softmax_scale is a \w*Tracer of shape \(\)", lambda x, s: attend(x, x, x, softmax_scale=x[0, 0, 0, 0])),
        (r"^out is a JAX array, and cuflash does not write to those", lambda x, s: attend(x, x, x, out=x)),
        (r"^max_seqlen_q or max_seqlen_k is None and cu_seqlens_q is traced by JAX.*Pass both",
            lambda x, s: cuflash.flash_attn_varlen_func(x[0], x[0], x[0], s, s)),
        (r"^validate is True and cu_seqlens_q is traced by JAX",
            lambda x, s: cuflash.flash_attn_varlen_func(x[0], x[0], x[0], s, s, 9, 9, validate=True)),
    )  # fmt: skip
    for match, call in calls:
        with pytest.raises(InvalidArgument, match=match):
            jax.jit(call)(x, starts)


def test_what_a_program_finds_wrong_when_it_runs_is_said_in_our_words(place: str) -> None:
    if place != "cpu":
        pytest.skip("values on a GPU are trusted")
    x = put(random(9, 2, 16, dtype=FP32))
    call = jax.jit(lambda x, starts: cuflash.flash_attn_varlen_func(x, x, x, starts, starts, 9, 9))
    call(x, put(np.array([0, 9], np.int32)))
    with pytest.raises(Exception, match=r"cu_seqlens_q\[1\] is 10, but q has 9 rows; expected at most that many"):
        call(x, put(np.array([0, 10], np.int32))).block_until_ready()


def test_functions_that_need_memory_refuse_tracers() -> None:
    x = put(random(2, 9, 2, 16, dtype=FP32))
    calls = (
        lambda x: cuflash.flash_attn_prepare(x, x, x),
        lambda x: cuflash.flash_attn_func(x, x, x, return_attn_probs=True),
        lambda x: cuflash.mha_fwd(x, x, x, None, None, 0.0, 0.25, False, -1, -1, 0.0, False, None),
        lambda x: cuflash.check_contiguous("x", x),
    )
    for call in calls:
        with pytest.raises((InvalidArgument, UnsupportedProblem), match=r"traced by JAX"):
            jax.jit(call)(x)


def test_explain_needs_shapes_alone() -> None:
    computed = []
    x = jax.ShapeDtypeStruct((2, 4096, 8, 128), BF16)
    jax.eval_shape(lambda x: computed.append(cuflash.explain(x, x, x, causal=True, device="h100")) or x, x)
    q, k, v = (np.zeros((2, 4096, 8, 128), BF16) for _ in range(3))
    assert computed[0].plan == cuflash.explain(q, k, v, causal=True, device="h100").plan
