"""Which kernels are preferred, what happens where they do not serve a call, and the four checks of arguments."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cuflash
from cuflash import InvalidArgument, UnsupportedProblem, device, plan
from cuflash.api.pytorch import backend
from cuflash.ops import Options, asked
from cuflash.problem import Problem

HERE = "CUFLASH_ATTENTION_BACKEND"


@pytest.fixture(autouse=True)
def nothing_preferred(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(HERE, raising=False)
    monkeypatch.setattr(backend, "_warned", set())
    yield
    cuflash.preferred_backend("default")


def planned(problem: Problem, preference: str | None = None, name: str = "a100") -> str:
    """The family that runs a call."""

    def operation(options: Options) -> tuple[str]:
        return (plan.choose(problem, device.named(name), options.manner.family).family,)

    (family,) = backend.call(operation, asked(), preference)
    return family


def problem(dtype: str = "fp16", dim: int = 64) -> Problem:
    return Problem("forward", cuflash.dtypes.DTYPES[dtype], 1, 1, 1, 64, 64, dim, dim)


def test_nothing_is_preferred_by_default() -> None:
    assert cuflash.preferred_backend() == "default"
    assert planned(problem()) == planned(problem("fp32")) == planned(problem("fp64")) == "sm80"
    assert planned(problem("fp64", 200)) == "simt"


@pytest.mark.parametrize(
    ("name", "known", "family"),
    [
        ("flash", "flash", "sm80"),
        ("mem_eff", "mem_eff", "simt"),
        ("aotriton", "flash", "sm80"),
        ("ck", "mem_eff", "simt"),
    ],
)
def test_a_preference_holds_the_planner_to_its_kernels(
    name: str, known: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(problem(), name) == family
    assert cuflash.preferred_backend(name) == known == cuflash.preferred_backend()
    assert planned(problem()) == family
    assert cuflash.preferred_backend("default") == "default"
    monkeypatch.setenv(HERE, name)
    assert cuflash.preferred_backend() == known and planned(problem()) == family


def test_a_preference_for_several_families_takes_the_first_that_runs_the_call() -> None:
    long = replace(problem(), len_q=700, len_kv=700)
    assert planned(long, "flash", "h100") == "sm90"
    assert planned(replace(long, direction="backward"), "flash", "h100") == "sm90"
    assert planned(replace(long, direction="backward", copy_bytes=8), "flash", "h100") == "sm80"
    with pytest.raises(UnsupportedProblem) as caught:
        planned(problem(dim=600), "flash", "h100")
    assert [line.split()[0] for line in str(caught.value).splitlines()[2:-1]] == ["sm90", "sm80"]


def test_the_call_goes_before_the_setter_and_that_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HERE, "flash")
    cuflash.preferred_backend("mem_eff")
    assert planned(problem()) == "simt"
    assert planned(problem(), "flash") == "sm80" and planned(problem(), "default") == "sm80"
    cuflash.preferred_backend("default")
    assert planned(problem()) == "sm80" and cuflash.preferred_backend() == "flash"


@pytest.mark.parametrize(
    ("dtype", "dim", "name"), [("fp64", 200, "h100"), ("fp16", 600, "h100"), ("fp16", 64, "sm_75")]
)
def test_a_preference_of_the_environment_warns_once_and_falls_back(
    dtype: str, dim: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HERE, "flash")
    with pytest.warns(UserWarning, match="CUFLASH_ATTENTION_BACKEND is 'flash', which does not serve this call"):
        assert planned(problem(dtype, dim), name=name) == "simt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planned(problem(dtype, dim), name=name) == "simt"
        assert planned(problem()) == "sm80"


def test_a_preference_of_the_setter_or_the_call_raises() -> None:
    with pytest.raises(UnsupportedProblem, match=r"sm80 .* heads of 200 > 128 in fp64"):
        planned(problem("fp64", 200), "flash")
    cuflash.preferred_backend("flash")
    with pytest.raises(UnsupportedProblem, match=r"sm80 .* heads of 200 > 128 in fp64"):
        planned(problem("fp64", 200))
    assert planned(problem("fp64", 200), "mem_eff") == "simt"


def test_what_no_kernel_serves_raises_whoever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HERE, "mem_eff")
    with pytest.warns(UserWarning, match="'mem_eff'"), pytest.raises(UnsupportedProblem, match="dim_qk 2048 > 1024"):
        planned(problem(dim=2048))


def test_every_family_is_that_of_a_backend() -> None:
    listed = [family for families in backend._FAMILIES.values() for family in families]
    assert sorted(listed) == sorted(family.name for family in plan.FAMILIES)


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("cudnn", "", 3, ["flash"]):
        with pytest.raises(InvalidArgument, match=r"backend is .*; expected one of 'default', 'flash'"):
            cuflash.preferred_backend(wrong)
    monkeypatch.setenv(HERE, "cudnn")
    with pytest.raises(InvalidArgument, match="CUFLASH_ATTENTION_BACKEND is 'cudnn'; expected one of"):
        cuflash.preferred_backend()
    os.environ[HERE] = ""
    assert cuflash.preferred_backend() == "default"


def test_every_function_of_pytorch_takes_a_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(backend, "resolve", lambda name: seen.append(name) or backend.Choice("default", False))
    x, starts = np.ones((1, 3, 2, 4), np.float32), np.array([0, 3], np.int32)
    lengths = starts, starts
    with_lse = {"compute_log_sumexp": True}
    for forward, head in (
        (cuflash.mha_fwd, (x, x, x)), (cuflash.mha_fwd_ck, (x, x, x)), (cuflash.mem_eff_forward, (x, x, x)),
        (cuflash.scaled_dot_product_attention, (x, x, x)),
        (cuflash.mha_varlen_fwd, (x[0], x[0], x[0], None, *lengths)),
        (cuflash.mha_varlen_fwd_ck, (x[0], x[0], x[0], None, *lengths)),
    ):  # fmt: skip
        forward(*head, backend="flash")
    efficient = cuflash.efficient_attention_forward(x, x, x, **with_lse, backend="flash")
    out, lse = cuflash.flash_attn_func(x, x, x, return_lse=True)
    cuflash.mha_bwd(x, x, x, x, out, lse, backend="flash")
    cuflash.mha_bwd_ck(x, x, x, x, out, lse, backend="flash")
    cuflash.mem_eff_backward(x, x, x, x, out, lse, None, None, None, backend="flash")
    packed = (x[0], x[0], x[0], x[0], out[0])
    cuflash.mha_varlen_bwd(*packed, lse[0], None, None, None, *lengths, backend="flash")
    cuflash.mha_varlen_bwd_ck(*packed, lse, None, None, None, *lengths, backend="flash")
    cuflash.efficient_attention_backward(
        x, x, x, x, None, out, None, None, None, None, efficient.logsumexp, 0.0, None, None, 0, False, backend="flash"
    )
    assert seen == ["flash"] * 13
    functions = [x for x in vars(cuflash).values() if inspect.isfunction(x) and x is not cuflash.preferred_backend]
    assert sum("backend" in inspect.signature(x).parameters for x in functions) == 13


def on_gpu(x: np.ndarray) -> object:
    """A CuPy array over the memory of a NumPy array."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(x.ctypes.data, max(x.nbytes, 1), x, 0)
    return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0), x.strides)


BASE = np.zeros((4, 6, 8), np.float32)


@pytest.mark.parametrize("check", [cuflash.check_contiguous, cuflash.check_last_contiguous])
def test_arrays_must_be_on_a_cuda_device_and_dense(check) -> None:
    check("q", on_gpu(BASE))
    with pytest.raises(InvalidArgument, match=r"q is on cpu; expected an array on a CUDA device. Move it there"):
        check("q", BASE)
    with pytest.raises(InvalidArgument, match=r"q has layout torch.sparse_coo; expected a dense array"):
        check("q", SimpleNamespace(layout="torch.sparse_coo"))
    with pytest.raises(InvalidArgument, match="q is a list; expected an array"):
        check("q", [1])
    with pytest.raises(InvalidArgument, match="q is None; expected an array"):
        check("q", None)


@pytest.mark.parametrize("x", [BASE, BASE[1:2, :, ::1], BASE[:0, ::2], BASE[:, :1, :1][:1], BASE[0, 0, 0]])
def test_contiguous_arrays(x: np.ndarray) -> None:
    cuflash.check_contiguous("q", on_gpu(np.asarray(x)))


@pytest.mark.parametrize("x", [BASE[:, ::2], BASE.swapaxes(0, 1), BASE[..., ::2], BASE[:, :3]])
def test_arrays_that_are_not_contiguous(x: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match=r"q has shape .* with strides of .*; expected a contiguous array"):
        cuflash.check_contiguous("q", on_gpu(x))


def test_last_dimension() -> None:
    for x in (BASE, BASE.swapaxes(0, 1), BASE[:, ::2], BASE[..., :1].swapaxes(0, 2)[..., :1], BASE[..., ::2][:0]):
        cuflash.check_last_contiguous("q", on_gpu(x))
    for x in (BASE[..., ::2], BASE.T):
        with pytest.raises(InvalidArgument, match="q is not contiguous along its last dimension, whose stride is"):
            cuflash.check_last_contiguous("q", on_gpu(x))
    with pytest.raises(InvalidArgument, match="q has no dimension; expected at least one"):
        cuflash.check_last_contiguous("q", on_gpu(np.zeros((), np.float32)))


def test_alignment() -> None:
    raw = np.zeros(64, np.uint8)
    first = -raw.ctypes.data % 16
    for pointer in (0, 32, np.uint64(48), raw[first:], on_gpu(raw[first:])):
        cuflash.check_aligned("q", pointer, 16)
    for pointer in (8, np.int64(4), raw[first + 8 :], on_gpu(raw[first + 8 :])):
        with pytest.raises(InvalidArgument, match=r"q is at 0x[0-9a-f]+, which is no multiple of 16 bytes"):
            cuflash.check_aligned("q", pointer, 16)
        cuflash.check_aligned("q", pointer, 4)


def test_range() -> None:
    assert cuflash.check_range("len_q", 2**31 - 2) == 2**31 - 2
    assert cuflash.check_range("len_q", np.int64(-(2**31))) == -(2**31)
    assert cuflash.check_range("n", 254, np.uint8) == 254
    for value, dtype in ((2**31 - 1, np.int32), (-1, np.uint8), (255, np.uint8), (2**63, np.int64), (1.0, np.int32)):
        with pytest.raises(InvalidArgument, match=r"n is .*; expected an integer from -?\d+ to \d+, as u?int\d+ holds"):
            cuflash.check_range("n", value, dtype)
    with pytest.raises(InvalidArgument, match="n is True"):
        cuflash.check_range("n", True)
