"""What other implementations get wrong or cannot do, asked of NumPy and of the kernels, on the CPU and on a GPU.

:data:`LIMITS` lists every such limit with the tests that show that it is none here. Those that need data of their own
on every backend are in this file; kernels run on the CPU by `tests/host`.
"""

from __future__ import annotations

from pathlib import Path

import flash_words
import numpy as np
import pytest
from backends import LEFT_BY_HOPPER, PLACES, Backend, assert_right
from inputs import random

import cuflash
from cuflash import ops

LIMITS: dict[str, list[str]] = {
    "no queries, no keys or no batch": [
        "test_edges.py::test_dimensions_of_size_zero", "test_mha.py::test_empty_sizes",
        "test_host_kernels.py::no-queries", "test_host_kernels.py::no-keys",
        "test_launch.py::test_nothing_is_launched_for_empty_tensors", "test_gpu_api.py::test_empty_tensors",
    ],
    "no heads, no dimension, a probability of 1": [
        "test_mha.py::no heads", "test_mha.py::no dims", "test_mha.py::p one", "test_messages.py::no-heads",
        "test_messages.py::no-dim", "test_messages.py::dropout-one",
    ],
    "log-sum-exp undefined without keys": ["test_mem_eff.py::test_empty_sizes", "test_mha.py::test_empty_sizes"],
    "misaligned bases and strides kill the context": [
        "test_known_limits.py::test_tensors_that_start_between_two_vectors", "test_host_kernels.py::copy-2",
        "test_messages.py::misaligned", "test_gpu_api.py::test_the_context_survives_refused_calls",
    ],
    "scales that are not positive": [
        "test_spec_vectors.py::test_scales_that_are_not_positive", "test_host_kernels.py::negative-scale",
        "test_host_kernels.py::zero-scale", "test_host_kernels.py::simt-fp64-negative-scale",
        "test_host_kernels.py::sm90-negative-scale",
    ],
    "NaN spreads to other rows": [
        "test_edges.py::test_nan_in_a_query_row_spoils_that_row_alone",
        "test_known_limits.py::test_what_is_not_a_number_stays_in_its_row",
    ],
    "causal masks aligned by one corner alone": [
        "test_spec_vectors.py::test_visibility_of_the_flash_functions",
        "test_spec_vectors.py::test_visibility_of_the_memory_efficient_functions", "test_host_kernels.py::top-left",
        "test_host_kernels.py::simt-top-left", "test_host_kernels.py::sm90-top-left",
    ],
    "bottom-right causal with more queries than keys": [
        "test_mem_eff.py::test_efficient_attention", "test_host_kernels.py::more-queries-causal",
        "test_host_kernels.py::simt-more-queries", "test_host_kernels.py::sm90-more-queries",
    ],
    "windows of one key, beyond every key, beside causal, with negative sides": [
        "test_edges.py::test_window_of_the_diagonal_alone_copies_values", "test_host_kernels.py::window-one-key",
        "test_host_kernels.py::sm90-window-one-key", "test_edges.py::test_sides_that_reach_every_key_hide_nothing",
        "test_edges.py::test_causal_wins_over_a_right_side", "test_mha.py::unbounded",
        "test_messages.py::window-negative",
    ],
    "window gradients where the lengths differ": [
        "test_mem_eff.py::test_efficient_attention", "test_host_kernels.py::varlen-window-d40",
        "test_host_kernels.py::window-top-left", "test_host_kernels.py::simt-fp16-gqa-window",
    ],
    "rows that see nothing": [
        "test_edges.py::test_rows_that_see_nothing_are_zero_with_lse_minus_inf", "test_host_kernels.py::mask",
        "test_edges.py::test_rows_that_see_nothing_add_nothing_to_dk_and_dv",
    ],
    "packed rows of no sequence": [
        "test_edges.py::test_packed_tails_and_unused_keys_are_not_read_and_get_zeros", "test_host_kernels.py::varlen",
        "test_mha.py::test_zero_tensors_say_what_rows_of_no_sequence_hold",
    ],
    "one dropout mask for all heads and sequences": [
        "test_mem_eff.py::test_heads_and_sequences_draw_masks_of_their_own",
        "test_known_limits.py::test_heads_and_packed_sequences_draw_masks_of_their_own",
    ],
    "dropout masks that repeat beyond 2**32 pairs": [
        "test_dropout.py::test_masks_do_not_repeat_beyond_32_bits",
        "test_dropout.py::test_the_kernels_draw_the_same_mask",
    ],
    "dropout masks that no other kernel draws": [
        "test_dropout.py::test_byte_scheme_is_the_mask_of_the_flash_kernels",
        "test_host_kernels.py::test_dropout_masks_are_exact", "test_gpu_torch.py::test_flash_masks_are_bit_equal",
    ],
    "a generator that is accepted and ignored": ["test_mha.py::test_generators_move_on_by_32_numbers_a_head"],
    "arguments that some functions accept and ignore": [
        "test_mha.py::test_varlen", "test_mha.py::softcap of legacy", "test_mha.py::block_table of legacy",
        "test_mem_eff.py::test_mem_eff", "test_mem_eff.py::test_mem_eff_of_packed_sequences",
    ],
    "no masks, biases or dropout of packed sequences": [
        "test_mha.py::test_bias_of_packed_sequences", "test_host_kernels.py::varlen-everything",
        "test_host_kernels.py::sm90-varlen-everything", "test_launch.py::test_score_features_on_host_memory",
    ],
    "no mask, bias or ALiBi in flash attention": [
        "test_api.py::test_gradients_of_score_features", "test_host_kernels.py::everything",
        "test_host_kernels.py::simt-everything", "test_host_kernels.py::sm90-everything-d128",
    ],
    "soft cap with dropout": [
        "test_spec_vectors.py::test_softcap_and_dropout_together", "test_host_kernels.py::everything",
    ],
    "more than 65,535 heads and batch elements": [
        "test_known_limits.py::test_more_heads_and_batch_elements_than_a_grid_dimension_has",
        "test_host_policies.py::test_schedule_beyond_32_bits",
    ],
    "offsets beyond 32 bits": [
        "test_known_limits.py::test_tensors_further_apart_than_32_bits",
        "test_gpu_kernels.py::test_batches_further_apart_than_32_bits",
        "test_gpu_kernels.py::test_more_than_2_to_the_31_elements",
    ],
    "expanded inputs and gradients": ["test_known_limits.py::test_expanded_inputs_masks_and_gradients"],
    "logits near -120 behind the last whole tile": [
        "test_known_limits.py::test_logits_far_below_zero_behind_the_last_whole_tile",
    ],
    "no grouped heads in memory-efficient attention": [
        "test_mem_eff.py::test_efficient_attention", "test_gpu_mha.py::test_efficient_attention",
    ],
    "head dimensions above 256": [
        "test_known_limits.py::test_wide_heads_are_left_to_hopper_and_plain_kernels_with_the_reason",
        "test_mem_eff.py::test_heads_of_any_size", "test_host_kernels.py::simt-fp32-d512",
        "test_host_kernels.py::simt-d1024",
    ],
    "head dimensions that are no multiple of 8": [
        "test_host_kernels.py::copy-2", "test_host_kernels.py::simt-bf16-copy-2",
    ],
    "bias: alignment, broadcast axes, layouts": [
        "test_mha.py::test_bias_and_its_gradient", "test_host_kernels.py::bias-copy-2",
        "test_host_kernels.py::bias-all-pairs",
    ],
    "lengths in use at head dimension 256": ["test_known_limits.py::test_lengths_in_use_of_wide_heads"],
    "one query of grouped heads, given output": [
        "test_spec_vectors.py::test_one_query_of_grouped_heads_fills_the_given_output",
        "test_known_limits.py::test_one_query_of_grouped_heads_fills_the_given_output",
    ],
    "pages of any size, and sequences without keys in them": [
        "test_mha.py::test_pages", "test_api.py::test_keys_in_pages_are_those_of_packed_sequences",
        "test_host_paged.py::test_any_page_size_and_lengths", "test_host_kernels.py::paged-1",
        "test_host_kernels.py::paged-seqused", "test_gpu_api.py::test_keys_in_pages",
    ],
    "pages and page numbers that are not there": [
        "test_mha.py::test_what_pages_refuse",
        "test_launch.py::test_page_numbers_on_a_gpu_are_checked_on_request_alone",
    ],
    "keys split for one query of grouped heads alone": [
        "test_host_splits.py::test_any_lengths_groups_and_splits", "test_gpu_splits.py::test_packed_sequences",
        "test_gpu_splits.py::test_lengths_groups_and_splits",
    ],
    "bits of a row that depend on the batch": [
        "test_host_splits.py::test_one_split_gives_a_row_the_same_bits_in_any_batch",
        "test_gpu_splits.py::test_one_split_gives_a_row_the_same_bits_in_any_batch",
    ],
    "cu_seqlens, lengths in use and longest lengths that do not fit": [
        "test_spec_vectors.py::test_what_pytorch_leaves_undefined_is_refused",
        "test_launch.py::test_lengths_on_a_gpu_are_checked_on_request_alone",
    ],
    "ALiBi shifts the log-sum-exp": [
        "test_spec_vectors.py::test_alibi_counts_from_the_diagonal_and_its_log_sum_exp_is_the_textbook_one",
        "test_reference_features.py::test_lse_is_the_textbook_one_with_alibi_and_causal",
    ],
    "neither probabilities nor log-sum-exps are returned": [
        "test_api.py::test_returned_probabilities", "test_mha.py::test_probabilities_are_normalised_and_signed",
        "test_reference.py::test_merging_two_halves_by_their_lse_gives_the_whole",
    ],
    "no gradient through the log-sum-exp": [
        "test_api.py::test_vjp_and_backward", "test_host_kernels.py::test_backward",
    ],
    "gradients of 16-bit heads summed in 16 bits": ["test_edges.py::test_gradients_of_a_group_are_summed_in_fp32"],
    "gradients that differ from run to run": ["test_gpu_kernels.py::test_repeats_are_bit_equal"],
    "masks taken for another type": ["test_messages.py::mask-dtype"],
}  # fmt: skip
"""Each limit with tests, as ``file::name`` of a test or of a case in its table."""


TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("limit", LIMITS)
def test_every_limit_has_tests(limit: str) -> None:
    for test in LIMITS[limit]:
        file, _, name = test.partition("::")
        (path,) = TESTS.rglob(file)
        text = path.read_text(encoding="utf-8")
        assert (f"def {name}(" if name.startswith("test_") else f'"{name}": ') in text, test


def tensors(b: int = 2, sq: int = 70, sk: int = 90, h: int = 4, hk: int = 2, d: int = 64) -> list[np.ndarray]:
    """q, k, v, dout."""
    shapes = (b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d), (b, sq, h, d)
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("backend", LEFT_BY_HOPPER, indirect=True)
def test_tensors_that_start_between_two_vectors(backend: Backend) -> None:
    arrays = tensors(d=40)
    shifted = []
    for x in arrays:
        memory = np.zeros(x.size + 16, x.dtype)
        first = -memory.ctypes.data % 16 // x.itemsize + 1
        shifted.append(memory[first : first + x.size].reshape(x.shape))
        shifted[-1][...] = x
        assert shifted[-1].ctypes.data % 4 == 2
    assert_right(backend(*shifted, causal=True, deterministic=True), arrays, causal=True)


def test_what_is_not_a_number_stays_in_its_row(backend: Backend) -> None:
    q, k, v, dout = tensors()
    clean = backend(q, k, v, dout, causal=True, deterministic=True)
    q[1, 37, 2, 5] = np.nan
    out, lse, dq, dk, dv = backend(q, k, v, dout, causal=True, deterministic=True)
    for x, at in ((out, (1, 37, 2)), (lse, (1, 2, 37)), (dq, (1, 37, 2))):
        assert np.isnan(x[at]).all() and np.isnan(x).sum() == x[at].size
    for x, before in ((dk, clean[3]), (dv, clean[4])):
        np.testing.assert_array_equal(x[0], before[0])
        np.testing.assert_array_equal(x[1, :, 0], before[1, :, 0])


def test_heads_and_packed_sequences_draw_masks_of_their_own(backend: Backend) -> None:
    """With the identity as values and equal scores, an output of 0 says that a pair was dropped."""
    starts, dim = np.arange(0, 5 * 32, 32, dtype=np.int32), 32
    q = np.zeros((128, 3, dim), np.float16)
    v = np.tile(np.eye(dim, dtype=np.float16), (4, 1))[:, None].repeat(3, axis=1)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 65, "max_seqlen_k": 65}
    state = 2**64 - 7, 2**33 - 8
    for scheme in ("byte", "word"):
        out, _ = backend(q, q, v, generator=state, dropout_p=0.5, dropout_scheme=scheme, **lengths)
        masks = (out > 0).reshape(4, 32, 3, dim).transpose(0, 2, 1, 3).reshape(12, -1)
        assert len(np.unique(masks, axis=0)) == 12
        assert 0.4 < masks.mean() < 0.6


def test_logits_far_below_zero_behind_the_last_whole_tile(backend: Backend) -> None:
    """Rows 128 to 191 of 192, and keys likewise, with every logit near -120; keys beyond them must not count as 0."""
    q, k, v, dout = tensors(b=1, sq=192, sk=192, h=1, hk=1)
    q, k = np.full_like(q, 1.0), np.full_like(k, -1.875)  # times 64
    k += random(*k.shape, seed=5) * np.float16(0.01)
    results = backend(q, k, v, dout, softmax_scale=1.0, deterministic=True)
    assert np.abs(results[1] + 120 - np.log(192)).max() < 1
    assert_right(results, [q, k, v, dout], scale=1.0)


@pytest.mark.parametrize("backend", LEFT_BY_HOPPER, indirect=True)
def test_expanded_inputs_masks_and_gradients(backend: Backend) -> None:
    """Strides of 0 in everything that is read."""
    shape = 2, 70, 2, 64
    q, k, v, dout = (np.broadcast_to(random(1, 70, 1, 64, seed=seed), shape) for seed in range(4))
    bias = np.broadcast_to(random(1, 2, 1, 70), (2, 2, 70, 70))
    mask = np.broadcast_to(random(2, 1, 70, 1) > -1, (2, 2, 70, 70))
    results = backend(q, k, v, dout, attn_bias=bias, attn_mask=mask, deterministic=True)
    assert_right(results, [q, k, v, dout], bias=bias, mask=mask)


def test_tensors_further_apart_than_32_bits(backend: Backend) -> None:
    """Two batch elements at both ends of memory that is only reserved: offsets of more than 2^31 elements."""
    far, shape = 2**31 + 64, (2, 66, 2, 64)
    rows = 66 * 2 * 64
    memory = np.zeros(far + 8 * rows, np.float16)

    def placed(x: np.ndarray, number: int) -> np.ndarray:
        start = memory[number * rows :]
        strides = (2 * far, *x.strides[1:])
        view = np.lib.stride_tricks.as_strided(start.view(x.dtype), x.shape, strides)
        view[...] = x
        return view

    near = [random(*shape, seed=seed) for seed in range(4)]
    bias, mask = random(2, 1, 66, 66), random(2, 1, 66, 66, seed=1) > -1
    spread = [placed(x, number) for number, x in enumerate((*near, bias, mask))]
    options = {"deterministic": True, "dropout_p": 0.25, "generator": (3, 8)}
    expected = backend(*near, attn_bias=bias, attn_mask=mask, **options)
    results = backend(*spread[:4], attn_bias=spread[4], attn_mask=spread[5], **options)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_lengths_in_use_of_wide_heads(backend: Backend) -> None:
    q, k, v, dout = (x[0] for x in tensors(b=1, sq=40, sk=90, h=2, hk=1, d=256))
    lengths = {"cu_seqlens_q": np.array([0, 30, 37], np.int32), "cu_seqlens_k": np.array([0, 70, 85], np.int32)}
    lengths |= {"seqused_q": np.array([21, 7], np.int32), "seqused_k": np.array([66, 0], np.int32)}
    longest = {"max_seqlen_q": 30, "max_seqlen_k": 70}
    results = backend(q, k, v, dout, **lengths, **longest, causal=True, deterministic=True, num_splits=1)
    assert_right(results, [q, k, v, dout], **lengths, causal=True)


@pytest.mark.parametrize("backend", LEFT_BY_HOPPER, indirect=True)
def test_one_query_of_grouped_heads_fills_the_given_output(backend: Backend) -> None:
    q, k, v = random(3, 6, 64), random(100, 2, 64, seed=1), random(100, 2, 64, seed=2)
    lengths = {"cu_seqlens_q": np.arange(4, dtype=np.int32), "cu_seqlens_k": np.array([0, 1, 31, 99], np.int32)}
    out = backend.put(np.full((3, 6, 64), np.nan, np.float16))
    options = ops.asked(causal=True, max_seqlen_q=1, max_seqlen_k=68, family=backend.family)
    arrays = flash_words.arrays(lengths, backend.put, q=q, k=k, v=v)._replace(out=out)
    result, lse = ops.forward(options, arrays)
    assert result is out
    assert_right([backend.get(out), backend.get(lse)], [q, k, v], **lengths)


@pytest.mark.parametrize("backend", [place for place in PLACES if "cpu" not in str(place)], indirect=True)
@pytest.mark.parametrize("many", ["batch", "heads"])
def test_more_heads_and_batch_elements_than_a_grid_dimension_has(backend: Backend, many: str) -> None:
    """70,000 blocks are too many for the CPU; each attends to its only key, so that results are known."""
    shape = (70_000, 1, 1, 16) if many == "batch" else (1, 1, 70_000, 16)
    q, v, dout = (random(*shape, seed=seed) for seed in range(3))
    out, _, dq, dk, dv = backend(q, q, v, dout)
    np.testing.assert_array_equal(out, v)
    np.testing.assert_array_equal(dv, dout)
    for x in (dq, dk):
        np.testing.assert_allclose(x, 0, atol=1e-3)


def test_wide_heads_are_left_to_hopper_and_plain_kernels_with_the_reason() -> None:
    arrays = [np.zeros((1, 8, 1, 320), np.float16) for _ in range(3)]
    too_wide = ["dim_qk 320 > 256", "dim_v 320 > 256"]
    assert cuflash.explain(*arrays, device="h100").why_not == {"sm90": [], "sm80": too_wide, "simt": []}
