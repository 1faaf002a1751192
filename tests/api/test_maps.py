"""Maps of attention beside the float64 oracle's whole matrices of probabilities."""

from __future__ import annotations

from typing import Any

import inputs
import libraries
import ml_dtypes
import numpy as np
import oracle
import pytest

import cuflash
from cuflash.errors import InvalidArgument

Array = np.ndarray
BATCH, HEADS, HEADS_KV, LEN_Q, LEN_KV, DIM = 2, 4, 2, 37, 53, 16
WORDS = {"window": "window_size", "mask": "attn_mask", "bias": "attn_bias", "scale": "softmax_scale"}
"""What the oracle calls otherwise than cuflash."""


def random(*shape: int) -> Array:
    return inputs.random(*shape, dtype=np.float32)


def features(batch: int = BATCH, len_q: int = LEN_Q, len_kv: int = LEN_KV) -> dict[str, dict[str, Any]]:
    """Everything that changes scores, in the oracle's words."""
    rng = np.random.default_rng(7)
    slopes = rng.uniform(0.01, 0.3, (batch, HEADS)).astype(np.float32)
    bias = random(1, HEADS, len_q, len_kv)
    sink = np.array([-1, 0.5, 3, 9], np.float32)
    seen = rng.random((batch, 1, len_q, len_kv)) < 0.7
    return {
        "plain": {},
        "causal": {"causal": True},
        "top-left": {"causal": True, "alignment": "top-left"},
        "window": {"window": (11, 4)},
        "scale": {"scale": 0.9},
        "softcap": {"softcap": 1.5, "scale": 1.0},
        "mask": {"mask": seen},
        "alibi": {"alibi_slopes": slopes, "causal": True},
        "bias": {"bias": bias},
        "sink": {"sink": sink},
        "all": {
            "causal": True, "window": (20, 0), "softcap": 4.0, "mask": seen, "alibi_slopes": slopes[0], "bias": bias,
            "sink": sink,
        },
    }  # fmt: skip


def asked(options: dict[str, Any]) -> dict[str, Any]:
    return {WORDS.get(name, name): value for name, value in options.items()}


def whole(q: Array, k: Array, **options: Any) -> tuple[list[Array], list[Array], list[Array]]:
    """(heads, len_q, len_kv) probabilities, (heads, len_q) log-sum-exp and sink shares of each sequence, in float64."""
    if "cu_seqlens_k" in options:
        starts = options["cu_seqlens_q"], options["cu_seqlens_k"]
        used = [
            np.diff(edges) if options.get(name) is None else options[name]
            for edges, name in zip(starts, ("seqused_q", "seqused_k"), strict=True)
        ]
        rows, keys = (
            [slice(a, a + n) for a, n in zip(s[:-1], u, strict=True)] for s, u in zip(starts, used, strict=True)
        )
        identity = np.concatenate(
            [np.eye(end - begin, len(k)) for begin, end in zip(starts[1], starts[1][1:], strict=False)]
        )
        identity = np.pad(identity, ((0, len(k) - len(identity)), (0, 0)))
        values = np.repeat(identity[:, None], k.shape[1], axis=1)
        out, lse = oracle.attention(q, k, values, **options)[:2]
        p = [out[at].transpose(1, 0, 2)[..., : keys[b].stop - keys[b].start] for b, at in enumerate(rows)]
        lses = [lse[:, at] for at in rows]
    else:
        values = np.broadcast_to(np.eye(k.shape[1])[None, :, None], (*k.shape[:3], k.shape[1]))
        out, lse = oracle.attention(q, k, values, **options)[:2]
        p, lses = list(out.transpose(0, 2, 1, 3)), list(lse)
    sink = options.get("sink")
    shares = [np.zeros(x.shape) if sink is None else np.exp(sink[:, None] - x) for x in lses]
    return p, lses, shares


def split(n: int, bins: int) -> list[Array]:
    """Neighbours in bins: item i is in bin i * bins // n, where there are more items than bins."""
    items = np.arange(n)
    return [items[(items * bins // n if n > bins else items) == b] for b in range(bins)]


def expected(q: Array, k: Array, rows: Any, bins: int, **options: Any) -> tuple[Array, ...]:
    """Mass, entropy, share of the first key and of the sink, from whole matrices."""
    computed = whole(q, k, **options)
    count_q, count_kv = (min(bins, max(p.shape[axis] for p in computed[0])) for axis in (1, 2))
    heads, count_q = q.shape[-2], count_q if rows is None else len(rows)
    mass = np.zeros((len(computed[0]), heads, count_q, count_kv))
    totals = np.zeros((4, len(computed[0]), heads))
    for b, (p, lse, share) in enumerate(zip(*computed, strict=True)):
        len_q = p.shape[1]
        chosen = split(len_q, count_q) if rows is None else [np.arange(len_q)[r : (r + 1) or None] for r in rows]
        of_bins = np.stack([p[..., keys].sum(-1) for keys in split(p.shape[2], count_kv)], axis=-1)
        for i, at in enumerate(chosen):
            if not len(at):
                continue
            mass[b, :, i] = of_bins[:, at].mean(1)
            parts = np.concatenate([of_bins[:, at], share[:, at, None]], axis=-1)
            logs = np.log(np.where(parts > 0, parts, 1))
            totals[0, b] -= (parts * logs).sum((1, 2))
            totals[1, b] += p[:, at, 0].sum(1) if p.shape[2] else 0
            totals[2, b] += np.nan_to_num(share[:, at]).sum(1)
            totals[3, b] += (lse[:, at] > -np.inf).sum(1)
    with np.errstate(invalid="ignore"):
        return mass, *(totals[:3] / totals[3])


def compare(computed: cuflash.AttentionMap, right: tuple[Array, ...], tolerance: float) -> None:
    for name, exact in zip(("mass", "entropy", "first_share", "sink_share"), right, strict=True):
        actual = getattr(computed, name)
        assert actual.shape == exact.shape, name
        scale = 4.0 if name == "entropy" else 1.0  # some nats
        np.testing.assert_allclose(actual, exact, rtol=0, atol=scale * tolerance, err_msg=name)


TOLERANCES = [(np.float64, 1e-13), (np.float32, 2e-6), (np.float16, 1e-3), (ml_dtypes.bfloat16, 8e-3)]


@pytest.mark.parametrize("rows", [None, [0, 5, -1, 5]])
@pytest.mark.parametrize("bins", [1, 10, 256])
@pytest.mark.parametrize("feature", features())
def test_maps_are_sums_of_probabilities(feature: str, bins: int, rows: Any) -> None:
    q, k = random(BATCH, LEN_Q, HEADS, DIM), random(BATCH, LEN_KV, HEADS_KV, DIM)
    options = features()[feature]
    computed = cuflash.attention_map(q, k, rows=rows, bins=bins, **asked(options))
    compare(computed, expected(q, k, rows, bins, **options), 2e-6)
    assert (computed.len_q, computed.len_kv) == ((LEN_Q,) * BATCH, (LEN_KV,) * BATCH)
    assert computed.mass.dtype == np.float32 and computed.rows == (None if rows is None else tuple(rows))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=lambda x: getattr(x, "__name__", ""))
def test_maps_in_every_type(dtype: Any, tolerance: float) -> None:
    q, k = random(1, LEN_Q, HEADS, DIM).astype(dtype), random(1, LEN_KV, HEADS_KV, DIM).astype(dtype)
    computed = cuflash.attention_map(q, k, bins=9, causal=True)
    compare(computed, expected(q.astype(np.float64), k.astype(np.float64), None, 9, causal=True), tolerance)
    assert computed.mass.dtype == (np.float64 if dtype == np.float64 else np.float32)


@pytest.mark.parametrize("bins", [255, 256, 300, 700])
def test_more_bins_than_a_call_has_columns(bins: int) -> None:
    q, k = random(1, 300, 2, 8), random(1, 600, 1, 8)
    compare(cuflash.attention_map(q, k, bins=bins, causal=True), expected(q, k, None, bins, causal=True), 2e-6)


LENGTHS_Q, LENGTHS_KV = [5, 0, 19, 1, 30], [7, 9, 19, 0, 53]


@pytest.mark.parametrize("rows", [None, [2, -1]])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("feature", features())
def test_maps_of_packed_sequences(feature: str, used: bool, rows: Any) -> None:
    starts_q, starts_k = (np.cumsum([0, *n]).astype(np.int32) for n in (LENGTHS_Q, LENGTHS_KV))
    q, k = random(starts_q[-1] + 3, HEADS, DIM), random(starts_k[-1] + 2, HEADS_KV, DIM)
    options = features(len(LENGTHS_Q), max(LENGTHS_Q), max(LENGTHS_KV))[feature]
    options |= {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    if used:
        options |= {
            "seqused_q": np.array([5, 0, 11, 0, 30], np.int32),
            "seqused_k": np.array([2, 9, 0, 0, 40], np.int32),
        }
        q[starts_q[2] + 11 : starts_q[3]] = np.nan
        k[starts_k[0] + 2 : starts_k[1]] = np.nan
    q[starts_q[-1] :], k[starts_k[-1] :] = np.nan, np.nan
    computed = cuflash.attention_map(q, k, rows=rows, bins=12, **asked(options))
    clean = {"q": np.nan_to_num(q), "k": np.nan_to_num(k)}
    compare(computed, expected(**clean, rows=rows, bins=12, **options), 2e-6)
    assert computed.len_kv == ((2, 9, 0, 0, 40) if used else tuple(LENGTHS_KV))


@pytest.mark.parametrize("rows", [None, [3, -2]])
def test_maps_of_written_scores_and_masks(rows: Any) -> None:
    q, k = random(BATCH, LEN_Q, HEADS, DIM), random(BATCH, LEN_KV, HEADS_KV, DIM)
    table = random(HEADS, LEN_Q + LEN_KV)
    apart = np.arange(LEN_Q)[:, None] - np.arange(LEN_KV)
    bias, seen = table[None, :, apart + LEN_KV], (abs(apart) % 3 != 1)[None, None]
    expected = cuflash.attention_map(q, k, rows=rows, bins=10, attn_mask=seen, attn_bias=bias)
    blocks = cuflash.create_block_mask(np.broadcast_to(seen, (1, 1, LEN_Q, LEN_KV)), block_size=16)
    score = lambda s, b, h, i, j: s + table[h, i - j + LEN_KV]  # noqa: E731
    for mask in ({"mask_mod": lambda b, h, i, j: cuflash.mods.abs(i - j) % 3 != 1}, {"block_mask": blocks}):
        computed = cuflash.attention_map(q, k, rows=rows, bins=10, score_mod=score, **mask)
        np.testing.assert_allclose(computed.mass, expected.mass, atol=1e-5)
        np.testing.assert_allclose(computed.entropy, expected.entropy, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_maps_of_nothing(shape: tuple[int, int, int]) -> None:
    batch, len_q, len_kv = shape
    q, k = random(batch, len_q, 2, 8), random(batch, len_kv, 2, 8)
    computed = cuflash.attention_map(q, k)
    assert computed.mass.shape == (batch, 2, len_q if batch else 0, len_kv if batch else 0) and not computed.mass.any()
    assert computed.entropy.shape == computed.first_share.shape == computed.sink_share.shape == (batch, 2)
    assert np.isnan(computed.entropy).all()
    assert "attention map" in str(computed) and "attention map" in computed._repr_html_()


def test_the_numbers_of_heads_that_can_be_told() -> None:
    """Head 0 sees all keys alike, head 1 its own key alone, head 2 the first alone, head 3 the sink alone."""
    n = 64
    q = np.zeros((1, n, 4, n), np.float32)
    k = np.zeros((1, n, 4, n), np.float32)
    q[0, :, 1], k[0, :, 1] = 1000 * np.eye(n), np.eye(n)
    q[0, :, 2, 0], k[0, 0, 2, 0] = 1000, 1
    sink = np.array([-np.inf, -np.inf, -np.inf, 90], np.float32)
    computed = cuflash.attention_map(q, k, softmax_scale=1.0, sink=sink)
    np.testing.assert_allclose(computed.entropy[0], [np.log(n), 0, 0, 0], atol=5e-6)
    np.testing.assert_allclose(computed.first_share[0], [1 / n, 1 / n, 1, 0], atol=1e-6)
    np.testing.assert_allclose(computed.sink_share[0], [0, 0, 0, 1], atol=1e-6)
    lines = str(computed).splitlines()
    assert lines[0] == "attention map: b1 h4, 64 x 64 in 64 x 64 bins" and repr(computed) == f"<{lines[0]}>"
    assert lines[3].split("head 2")[1].strip() == "entropy 0.00 nats, 100.0% to the first key, 0.0% to the sink"


def test_what_is_given_stays_as_it_is() -> None:
    q, k = random(1, 9, 2, 8)[:, ::-1], random(1, 30, 2, 8)[:, :, ::-1]
    copies = q.copy(), k.copy()
    computed = cuflash.attention_map(q, k, bins=5)
    compare(computed, expected(*copies, None, 5), 2e-6)
    np.testing.assert_array_equal(q, copies[0])
    np.testing.assert_array_equal(k, copies[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, r"^rows is \[\]; expected numbers of queries"),
        ({"rows": 3}, r"^rows is 3; expected"),
        ({"rows": [0, 1.5]}, r"^rows is \[0, 1.5\]; expected"),
        ({"rows": [9]}, r"^rows has 9, but no sequence has more than 9 queries"),
        ({"rows": [-10]}, r"^rows has -10, but"),
        ({"bins": 0}, r"^bins is 0; expected an integer of at least 1"),
        ({"bins": 2.5}, r"^bins is 2.5; expected"),
        ({"causal": "yes"}, r"^causal is 'yes'; expected True or False"),
        ({"k": np.zeros((1, 9, 3, 8), np.float32)}, r"^k has 3 heads but q has 2"),
        ({"k": np.zeros((1, 9, 8), np.float32)}, r"^k has"),
        ({"k": None}, r"^k is None"),
        ({"softcap": -1.0}, r"^softcap is -1.0"),
        ({"max_seqlen_q": 9}, r"^max_seqlen_q"),
        ({"cu_seqlens_k": np.array([0, 9], np.int32)}, r"cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    x = random(1, 9, 2, 8)
    with pytest.raises(InvalidArgument, match=message):
        cuflash.attention_map(**({"q": x, "k": x} | changes))


def test_pictures_of_maps() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra viz)")
    starts = np.array([0, 9, 40], np.int32)
    x = random(40, 5, 8)
    computed = cuflash.attention_map(x, x, bins=16, cu_seqlens_q=starts, cu_seqlens_k=starts)
    figure = computed.plot(sequence=1).figure
    assert [ax.get_title("left") for ax in figure.axes] == [*(f"head {h}" for h in range(5)), "", "", ""]
    np.testing.assert_allclose(figure.axes[3].images[0].get_array() ** 2, computed.mass[1, 3], rtol=1e-5)
    tokens = list("abcdefghi")
    [ax] = computed.plot(head=-1, sequence=0, tokens=tokens).figure.axes
    assert ax.get_title("left") == "head 4" and ax.images[0].get_array().shape == (9, 9)
    assert [label.get_text() for label in ax.get_xticklabels()] == tokens
    chosen = cuflash.attention_map(x, x, rows=[0, -1], bins=16, cu_seqlens_q=starts, cu_seqlens_k=starts)
    [ax] = chosen.plot(head=0).figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "-1"]
    with pytest.raises(InvalidArgument, match=r"^tokens has 9 words for 31 keys in 16 bins"):
        computed.plot(sequence=1, tokens=tokens)
    with pytest.raises(InvalidArgument, match=r"^head is 5; expected the number of one, of 5"):
        computed.plot(head=5)
    with pytest.raises(InvalidArgument, match=r"^sequence is 2"):
        computed.plot(sequence=2)
    with pytest.raises(InvalidArgument, match=r"^ax is given and head is None"):
        computed.plot(ax=ax)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("library", "dtype", "packed"),
    [("cupy", np.float16, False), ("torch", ml_dtypes.bfloat16, True), ("jax", ml_dtypes.bfloat16, False),
     ("cupy", np.float32, True)],
)  # fmt: skip
def test_maps_on_a_gpu(library: str, dtype: Any, packed: bool) -> None:
    there = libraries.LIBRARIES[library]()
    starts = np.cumsum([0, 300, 17, 0, 900]).astype(np.int32)
    shape = (starts[-1],) if packed else (2, 600)
    q, k = inputs.random(*shape, 4, 128, dtype=dtype), inputs.random(*shape, 2, 128, dtype=dtype, seed=1)
    options: dict[str, Any] = {"causal": True, "sink": np.array([-1, 0.5, 3, 9], np.float32)}
    options |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts} if packed else {}
    given = {name: there.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    tolerance = next(tolerance for kind, tolerance in TOLERANCES if kind == dtype)
    for rows in (None, [0, 5, -1]):
        computed = cuflash.attention_map(there.put(q), there.put(k), rows=rows, bins=63, **given)
        results = (computed.mass, computed.entropy, computed.first_share, computed.sink_share)
        assert all(there.owns(x) for x in results) and "head 3" in str(computed)
        on_cpu = cuflash.AttentionMap(*map(there.get, results), computed.len_q, computed.len_kv, computed.rows)
        compare(on_cpu, expected(q.astype(np.float64), k.astype(np.float64), rows, 63, **options), tolerance)
