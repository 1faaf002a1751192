"""The host twin of the PTX floor notices what a GPU would only sometimes show."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from host import build
from host.cases import check_backward, check_forward, dense
from host.run import LaunchFailed

from cuflash.masks import Mask

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")

UNIT = """
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/sync.cuh"
using namespace cuflash;

extern "C" __attribute__((visibility("default"))) const char* launch(float* out) {{
  const auto kernel = [](const void* params) {{
    float* out = *static_cast<float* const*>(params);
    float* smem = reinterpret_cast<float*>(ptx::dynamic_smem());
    const int thread = ptx::thread_index(), lane = ptx::lane_index();
    {body}
  }};
  return host::launch(kernel, &out, 2, 64, 1024, 1);
}}
"""


PTX = sorted((build.KERNELS / "ptx").glob("*.cuh"))


@pytest.mark.parametrize("header", PTX, ids=[path.stem for path in PTX])
def test_every_instruction_has_a_twin(header: Path) -> None:
    instructions = set(re.findall(r"^CF_DEVICE .*?(\w+)\(", header.read_text(), flags=re.MULTILINE))
    assert instructions
    twin = (build.HOST / "ptx" / header.name).read_text()
    assert {name for name in instructions if not re.search(rf"\b{name}(<\w+>)?\(", twin)} == set()


def launch(body: str) -> tuple[str | None, np.ndarray]:
    """Run a kernel body with two blocks of 64 threads and 1024 bytes of shared memory; its error and ``out[64]``."""
    library = build.build(UNIT.format(body=body))
    library.launch.restype = ctypes.c_char_p
    out = np.zeros(64, np.float32)
    error = library.launch(ctypes.c_void_p(out.ctypes.data))
    return error and error.decode(), out


def test_barrier_and_shuffle() -> None:
    body = "smem[thread] = thread; ptx::sync_threads(); out[thread] = ptx::shuffle_xor(smem[63 - thread], 1);"
    error, out = launch(body)
    assert error is None
    np.testing.assert_array_equal(out, (63 - np.arange(64)) ^ 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (thread < 32) ptx::sync_threads();", r"thread 0 waits at sync_threads, thread 32 at the end .*: deadlock"),
        ("if (lane == 7) return; ptx::sync_warp();", r"thread \d+ is at sync_warp, thread \d+ at the end"),
        ("if (lane < 8) ptx::sync_warp(); else ptx::shuffle_xor(1, 1);", r"sync_warp, thread \d+ at shuffle"),
        ("int flag = 0; while (ptx::load_acquire(&flag) != 1) {}", r"waits for a turn that no block before it gives"),
        ("smem[256 + thread] = 0;", r"wrote 0 bytes past the end of shared memory"),
        ("ptx::cp_async<16>(ptx::smem_u32(smem) + 4, out, true);", r"cp_async of 16 bytes: .* not aligned"),
        ("ptx::smem_u32(out);", r"of 1024 bytes of shared memory"),
        ("uint32 r[4]; ptx::ldmatrix_x4(r, 1016 + lane * 16);", r"ldmatrix: row address 1016 is not a multiple of 16"),
    ],
)
def test_faults_end_the_launch_with_a_message(body: str, message: str) -> None:
    error, _ = launch(body)
    assert error is not None and re.search(message, error), error
    assert error.startswith("block 0: ")


def test_copies_arrive_when_waited_for() -> None:
    copy = "out[thread] = thread; ptx::cp_async<4>(ptx::smem_u32(smem + thread), out + thread, thread != 5);"
    body = f"{copy} ptx::cp_async_commit(); out[thread] = 9; out[thread] = smem[thread];"
    assert np.isnan(launch(body)[1]).all(), "a copy that nobody waited for has arrived"
    body = f"{copy} ptx::cp_async_commit(); ptx::cp_async_wait<0>(); out[thread] = smem[thread];"
    np.testing.assert_array_equal(launch(body)[1], np.where(np.arange(64) == 5, 0, np.arange(64)))
    body = f"{copy} ptx::cp_async_wait<0>(); ptx::cp_async_commit(); out[thread] = smem[thread];"
    assert np.isnan(launch(body)[1]).all(), "waiting has completed a copy of no group"


ORDER = re.compile(r"ptx::(sync_threads|sync_warp|cp_async_wait<0>|cp_async_commit)\(\);")


def ordering_calls(kernel: str) -> list[int]:
    """Offsets of the calls that order memory accesses in a kernel."""
    return [call.start() for call in ORDER.finditer((build.KERNELS / kernel).read_text())]


TESTS = {
    "forward/sm80.cuh": (check_forward, "sm80"),
    "backward/sm80.cuh": (check_backward, "sm80"),
    "backward/convert.cuh": (check_backward, "sm80"),
    "tile/gemm_simt.cuh": (check_forward, "simt"),
}
CALLS = [(file, number) for file in TESTS for number in range(len(ordering_calls(file)))]


@pytest.fixture
def kernels_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the kernels that the host builds from."""
    for source in build.KERNELS.rglob("*.cu*"):
        target = tmp_path / source.relative_to(build.KERNELS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    for memoised in (build.build, build.kernels_digest):
        memoised.cache_clear()
    yield tmp_path
    for memoised in (build.build, build.kernels_digest):
        memoised.cache_clear()


@pytest.mark.sample(3)
@pytest.mark.parametrize(("file", "number"), CALLS)
def test_every_ordering_call_matters(file: str, number: int, kernels_copy: Path) -> None:
    """Without any one of its barriers and waits, a kernel goes wrong here: the tests of the kernels would notice."""
    path = kernels_copy / file
    text, start = path.read_text(), ordering_calls(file)[number]
    path.write_text(text[:start] + text[text.index(";", start) :])
    test, family = TESTS[file]
    with pytest.raises(AssertionError):
        for dims in ((64, 40), (128, 72)):  # warps with keys of their own, and those that share them
            test(dense("fp16", (2, 1), (150, 330), dims, family=family, mask=Mask(right=0)))


HOPPER_ORDER = re.compile(
    r"ptx::(sync_threads|sync_named|fence_proxy_async|fence_mbarrier_init|wgmma_fence|tma_store_commit|"
    r"tma_store_wait_read)\([^;]*\);"
)
NARROW, WIDE = (
    dense("bf16", (2, 1), (150, len_kv), dims, family="sm90", mask=Mask(right=0))
    for len_kv, dims in ((330, (64, 40)), (170, (192, 128)))
)
HOPPER_TESTS = {
    "backward/sm90.cuh": NARROW,
    "backward/sm90_wide.cuh": WIDE,
    "backward/block_sm90.cuh": NARROW,
    "backward/convert_sm90.cuh": NARROW,
}


def hopper_calls(kernel: str) -> list[re.Match[str]]:
    return list(HOPPER_ORDER.finditer((build.KERNELS / kernel).read_text()))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("file", "number"), [(file, number) for file in HOPPER_TESTS for number in range(len(hopper_calls(file)))]
)
def test_every_ordering_call_of_the_hopper_backward_matters(file: str, number: int, kernels_copy: Path) -> None:
    """As above, in some order of the warps or other."""
    path = kernels_copy / file
    text, call = path.read_text(), hopper_calls(file)[number]
    path.write_text(text[: call.start()] + ";" + text[call.end() :])
    with pytest.raises((AssertionError, LaunchFailed)):
        for seed in range(8):
            check_backward(HOPPER_TESTS[file], seed)


CROSSING = re.compile(
    r"(?:ptx::sync_cluster|(?:this->plan\.)?\w+\.(?:wait\w*_across|release_across|announce))\([^;]*\);"
)
SLICED = dense("bf16", (1, 1), (150, 100), (264, 72), family="sm90")
CROSSINGS = [
    (file, number)
    for file in ("backward/block_sm90.cuh", "backward/sm90_wide.cuh")
    for number in range(len(CROSSING.findall((build.KERNELS / file).read_text())))
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("file", "number"), CROSSINGS)
def test_every_call_across_a_cluster_matters(file: str, number: int, kernels_copy: Path) -> None:
    """As above, of what one block does for the other."""
    path = kernels_copy / file
    text = path.read_text()
    call = list(CROSSING.finditer(text))[number]
    path.write_text(text[: call.start()] + ";" + text[call.end() :])
    with pytest.raises((AssertionError, LaunchFailed)):
        for seed in range(8):
            check_backward(SLICED, seed)
