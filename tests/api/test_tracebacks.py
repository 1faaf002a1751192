"""What stands above a user's error: their own line, and of cuflash one frame at most."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash

PACKAGE = Path(cuflash.__file__).parent
X, PACKED, STARTS = np.ones((1, 3, 2, 4), np.float32), np.ones((3, 2, 4), np.float32), np.array([0, 3], np.int32)
LSE = np.zeros((1, 2, 3), np.float32)
WRONG = X[..., :3]
"""Keys of another dim."""
GENERATOR = cuflash.PhiloxGenerator(1)

CALLS: dict[str, Callable[[], Any]] = {
    "flash_attn_func": lambda: cuflash.flash_attn_func(X, WRONG, X),
    "flash_attn_kvpacked_func": lambda: cuflash.flash_attn_kvpacked_func(X, X),
    "flash_attn_qkvpacked_func": lambda: cuflash.flash_attn_qkvpacked_func(np.stack([X] * 3, 2), softcap=-1.0),
    "flash_attn_varlen_func": lambda: cuflash.flash_attn_varlen_func(PACKED, PACKED, PACKED, STARTS, STARTS + 1),
    "flash_attn_varlen_kvpacked_func": lambda: cuflash.flash_attn_varlen_kvpacked_func(
        PACKED, np.stack([PACKED] * 2, 1), STARTS, STARTS + 1
    ),
    "flash_attn_varlen_qkvpacked_func": lambda: cuflash.flash_attn_varlen_qkvpacked_func(PACKED, STARTS),
    "flash_attn_backward": lambda: cuflash.flash_attn_backward(X, X, WRONG, X, X, LSE),
    "flash_attn_vjp": lambda: cuflash.flash_attn_vjp(X, X, X, attn_bias=X),
    "flash_attn_vjp's pullback": lambda: cuflash.flash_attn_vjp(X, X, X)[1](WRONG),
    "flash_attn_jvp": lambda: cuflash.flash_attn_jvp(X, X, X, WRONG),
    "flash_attn_with_kvcache": lambda: cuflash.flash_attn_with_kvcache(X, X, X, cache_seqlens=4),
    "flash_attn_prepare": lambda: cuflash.flash_attn_prepare(X, WRONG, X),
    "flex_attention": lambda: cuflash.flex_attention(X, WRONG, X),
    "scaled_dot_product_attention": lambda: cuflash.scaled_dot_product_attention(X, WRONG, X),
    "explain": lambda: cuflash.explain(X, X, X, device="abacus"),
    "attention_map": lambda: cuflash.attention_map(X, WRONG),
    "create_block_mask": lambda: cuflash.create_block_mask(len_q=3, len_kv=3, block_size=0),
    "preferred_backend": lambda: cuflash.preferred_backend("abacus"),
    "merge_attention": lambda: cuflash.merge_attention([X, WRONG], [LSE, LSE]),
    "merge_attention_vjp": lambda: cuflash.merge_attention_vjp([X], [X]),
    "merge_attention_vjp's pullback": lambda: cuflash.merge_attention_vjp([X], [LSE])[1](WRONG),
    "mha_fwd": lambda: cuflash.mha_fwd(X, X, X, window_size_left="all"),
    "mha_varlen_fwd": lambda: cuflash.mha_varlen_fwd(PACKED, PACKED, PACKED, None, STARTS, STARTS + 1),
    "mha_bwd": lambda: cuflash.mha_bwd(X, X, WRONG, X, X, LSE),
    "mha_varlen_bwd": lambda: cuflash.mha_varlen_bwd(*[PACKED] * 5, LSE[0], None, None, None, STARTS, None),
    "mha_fwd_ck": lambda: cuflash.mha_fwd_ck(X, WRONG, X, None, 0.0, 1.0, False, -1, -1, False, None, None),
    "mha_varlen_fwd_ck": lambda: cuflash.mha_varlen_fwd_ck(
        PACKED, PACKED, PACKED, None, STARTS, STARTS + 1, None, 3, 3, 0.0, 1.0, False, False, -1, -1, False, None, None
    ),
    "mha_bwd_ck": lambda: cuflash.mha_bwd_ck(X, X, WRONG, X, X, LSE, None, None, None, None, False, None, 0.0, 1.0),
    "mha_varlen_bwd_ck": lambda: cuflash.mha_varlen_bwd_ck(
        *[PACKED] * 5, LSE, None, None, None, STARTS, STARTS + 1, None, False, None, 3, 3, 0.0, 1.0
    ),
    "mem_eff_forward": lambda: cuflash.mem_eff_forward(X, X, X, cu_seqlens_q=STARTS, seqstart_q=STARTS),
    "mem_eff_backward": lambda: cuflash.mem_eff_backward(X, X, WRONG, X, X, LSE, None, None, None),
    "efficient_attention_forward": lambda: cuflash.efficient_attention_forward(X, X, X, custom_mask_type=7),
    "efficient_attention_backward": lambda: cuflash.efficient_attention_backward(
        X, X, WRONG, X, None, X, None, None, None, None, LSE, 0.0, None, None, 0, False
    ),
    "check_contiguous": lambda: cuflash.check_contiguous("x", X),
    "check_last_contiguous": lambda: cuflash.check_last_contiguous("x", None),
    "check_aligned": lambda: cuflash.check_aligned("x", 3, 2),
    "check_range": lambda: cuflash.check_range("x", 2**40),
    "manual_seed": lambda: cuflash.manual_seed(-1),
    "PhiloxGenerator": lambda: cuflash.PhiloxGenerator(-1),
    "PhiloxGenerator.next": lambda: GENERATOR.next(-1),
    "PhiloxGenerator.manual_seed": lambda: GENERATOR.manual_seed(-1),
    "PhiloxGenerator.from_torch_state": lambda: cuflash.PhiloxGenerator.from_torch_state(b"short"),
    "PhiloxGenerator.set_torch_state": lambda: GENERATOR.set_torch_state(b"short"),
}


def frames_of(error: BaseException) -> list[str]:
    """The functions of cuflash that a traceback shows, of the error and of what it says it came from."""
    shown = traceback.TracebackException.from_exception(error)
    names = []
    while shown is not None:
        names += [frame.name for frame in shown.stack if PACKAGE in Path(frame.filename).parents]
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return names


def test_every_public_function_is_called() -> None:
    public = {name for name in cuflash.__all__ if inspect.isfunction(getattr(cuflash, name))}
    assert public <= CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_one_frame_of_cuflash_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUFLASH_DEBUG", raising=False)
    with pytest.raises((cuflash.InvalidArgument, cuflash.UnsupportedProblem)) as caught:
        CALLS[name]()
    assert len(frames_of(caught.value)) <= 1
    assert caught.traceback[1].path == Path(__file__), "the caller's line is shown"


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_vjp's pullback", "mha_bwd", "explain"])
def test_all_frames_for_who_debugs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_DEBUG", "1")
    with pytest.raises(cuflash.InvalidArgument) as caught:
        CALLS[name]()
    assert len(frames_of(caught.value)) > 2


def test_a_prepared_call_is_as_brief() -> None:
    attend = cuflash.flash_attn_prepare(X, X, X)
    with pytest.raises(cuflash.InvalidArgument) as caught:
        attend(X, WRONG, X)
    assert len(frames_of(caught.value)) <= 1


def test_an_error_while_another_is_handled_keeps_it() -> None:
    with pytest.raises(cuflash.InvalidArgument) as caught:
        try:
            raise KeyError("the caller's own")
        except KeyError:
            cuflash.flash_attn_func(X, WRONG, X)
    assert isinstance(caught.value.__context__, KeyError)


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuflash.ops, "out", lambda *arguments: {}["missing"])
    with pytest.raises(KeyError) as caught:
        cuflash.flash_attn_func(X, X, X)
    assert len(frames_of(caught.value)) > 1
