"""The generated headers, and what a user sees when a kernel does not compile.

``PYTHONPATH=tests python tests/jit/test_render.py`` writes the golden files and the examples in ``kernels/`` anew.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from nvrtc import needs_nvrtc

from cuflash import jit, mods, plan
from cuflash.device import named
from cuflash.dtypes import BF16
from cuflash.errors import CompileError
from cuflash.jit import compile, sources
from cuflash.masks import Mask
from cuflash.plan.config import ForwardConfig, Written
from cuflash.plan.families import sm90
from cuflash.plan.families.sm80 import BackwardConfig
from cuflash.plan.steps import DeltaConfig
from cuflash.problem import Problem

GOLDEN = Path(__file__).parent / "golden"

FORWARD = ForwardConfig(
    element="bf16",
    dim_qk=128,
    dim_v=128,
    threads=128,
    mask="CausalMask",
    tile_q=128,
    tile_kv=64,
    copy_bytes=16,
    blocks_per_sm=2,
    smem_bytes=69632,
)
BACKWARD = BackwardConfig(
    element="double",
    dim_qk=24,
    dim_v=40,
    threads=256,
    sequence="VarlenSequence",
    mask="WindowMask",
    score="SoftCapScore<double>",
    reduction="OrderedReduction",
    tile_q=64,
    tile_kv=32,
    stages=2,
    dim_splits=3,
    warps_across=2,
    halves=2,
    copy_bytes=8,
    smem_bytes=12345,
)
HOPPER = sm90.ForwardConfig(
    element="fp16",
    dim_qk=64,
    dim_v=64,
    threads=384,
    bias_copies="BiasRow<float>",
    tile_q=128,
    tile_kv=128,
    box_rows=128,
    stages=3,
    ping_pong=True,
    row_buffers=2,
    producer_registers=24,
    consumer_registers=240,
    smem_bytes=54321,
)
HOPPER_BACKWARD = sm90.BackwardConfig(
    element="bf16",
    dim_qk=64,
    dim_v=64,
    threads=384,
    reduction="OrderedReduction",
    tile_q=128,
    tile_kv=128,
    stages=3,
    producer_registers=32,
    consumer_registers=224,
    smem_bytes=54321,
)
DELTA = DeltaConfig(element="float", dim_v=64, threads=128, tile_q=64, copy_bytes=16)
"""A config of ``bwd_delta``, the kernel that compiles fastest."""


IDS, SCALES = np.arange(9), np.ones((4, 2), np.float16)
RULE = mods.trace("mask_mod", lambda b, h, q, k: IDS[q] == IDS[k]).mod
CAPPED = mods.trace("score_mod", lambda s, b, h, q, k: 30.0 * mods.tanh(s / 30.0)).mod
SCALED = mods.trace("score_mod", lambda s, b, h, q, k: s * SCALES[h, q]).mod
WRITTEN = (
    Written(CAPPED, None),
    Written(SCALED, None),
    Written(SCALED, None, (0,)),
    Written(None, RULE),
    Written(SCALED, RULE),
    Written(None, None, blocks=RULE),
    Written(None, RULE, blocks=RULE),
)
WRITTEN_GOLDEN = Written(SCALED, RULE, (0,), (0,))


def example() -> str:
    problem = Problem("forward", BF16, 1, 16, 16, 8192, 8192, 128, 128, mask=Mask(right=0))
    (step,) = plan.choose(problem, named("h100"), "sm80").steps
    return jit.render.config_header(step.kernel, step.config)


RENDERED = {
    sources.root() / "config.example.cuh": example,
    sources.root() / "layout.example.cuh": lambda: jit.render.layout_header("FwdParams"),
    GOLDEN / "bwd_sm80.cuh": lambda: jit.render.config_header("bwd_sm80", BACKWARD),
    GOLDEN / "written.cuh": lambda: jit.render.config_header("bwd_sm80", replace(BACKWARD, written=WRITTEN_GOLDEN)),
    GOLDEN / "captured.cuh": lambda: jit.render.headers(
        "bwd_sm80", replace(BACKWARD, written=WRITTEN_GOLDEN), "BwdParams"
    )["captured.cuh"],
}


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.name)
def test_rendered_text_is_the_one_on_record(path):
    assert RENDERED[path]() == path.read_text(), f"run PYTHONPATH=tests python {Path(__file__)}, and read what changes"


@pytest.mark.parametrize(
    "config", [FORWARD, BACKWARD, HOPPER, HOPPER_BACKWARD, DELTA], ids=lambda config: type(config).__name__
)
def test_every_choice_appears_once(config):
    text = jit.render.config_header("fwd_sm80", config)
    struct = text.split("struct Config {")[1].split("};")[0]
    types = dict(re.findall(r"using (\w+) = (.+);", struct))
    numbers = {name: int(value) for name, value in re.findall(r"static constexpr int k(\w+) = (-?\d+);", struct)}
    truths = {name: value == "true" for name, value in re.findall(r"constexpr bool k(\w+) = (true|false);", struct)}
    choices = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "written"}
    assert len(types) + len(numbers) + len(truths) == struct.count(";") == len(choices)
    members = {name.lower(): value for name, value in (types | numbers | truths).items()}
    assert members == {name.replace("_", ""): value for name, value in choices.items()}


def test_every_choice_changes_the_text():
    seen = {jit.render.config_header("fwd_sm90", HOPPER)}
    for field in fields(HOPPER):
        value = getattr(HOPPER, field.name)
        if field.name == "written":
            for written in WRITTEN:
                seen.add(jit.render.config_header("fwd_sm90", replace(HOPPER, written=written)))
            continue
        changed = value + "x" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
        other = replace(HOPPER, **{field.name: changed})
        seen.add(jit.render.config_header("fwd_sm90", other))
    seen.add(jit.render.config_header("fwd_sm80", HOPPER))
    assert len(seen) == len(fields(HOPPER)) - 1 + len(WRITTEN) + 2
    assert jit.render.layout_header("FwdParams") != jit.render.layout_header("BwdParams")


def test_text_is_deterministic():
    texts = {jit.render.config_header("bwd_sm80", replace(BACKWARD)) for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize("params", ["FwdParams", "BwdParams"])
def test_layout_of_every_member_is_asserted(params):
    text = jit.render.layout_header(params)
    for struct in ("Strides", "Attention", "TensorMap", params):
        dtype = jit.params.dtype(struct)
        assert f"static_assert(sizeof({struct}) == {dtype.itemsize}," in text
        for name, (_, offset) in dtype.fields.items():
            assert f"static_assert(CF_OFFSET({struct}, {name}) == {offset}," in text


def test_includes_exist():
    rendered = jit.render.headers("fwd_sm80", FORWARD, "FwdParams")
    included = {name for text in rendered.values() for name in re.findall(r'#include "(.+)"', text)}
    assert len(included) >= 6 and "layout.cuh" in included
    assert all((sources.root() / name).is_file() for name in included - rendered.keys())


def test_the_example_is_a_config_and_no_layout():
    """So that it is worth opening: a line for each choice, and where it is declared."""
    text = example()
    assert "static_assert" not in text and len(text.splitlines()) < 45


# What a user sees when it fails


@pytest.fixture
def kernels(tmp_path, monkeypatch) -> Path:
    """A copy of the kernel sources that a test may break, an empty cache, and room for saved sources."""
    copy = Path(shutil.copytree(sources.root(), tmp_path / "kernels"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(sources, "root", lambda: copy)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "cache"))
    return copy


def compile_delta(arch: str = "sm_80", **changes) -> jit.Cubin:
    return jit.compile_kernel("bwd_delta", replace(DELTA, **changes), "BwdParams", arch)


def test_a_missing_header_names_who_includes_it(kernels):
    (kernels / "ptx" / "sync.cuh").unlink()
    with pytest.raises(CompileError) as caught:
        sources.gather("bwd_delta", jit.render.headers("bwd_delta", DELTA, "BwdParams"))
    assert re.fullmatch(
        rf"\S+\.cuh includes ptx/sync.cuh, which is not a file under {re.escape(str(kernels))}\.", str(caught.value)
    )


def test_a_missing_entry_lists_the_kernels_there_are(kernels):
    with pytest.raises(CompileError) as caught:
        sources.gather("fwd_sm70", {})
    names = sorted(path.stem for path in (kernels / "entry").iterdir())
    assert str(caught.value) == f"there is no kernel fwd_sm70 in {kernels / 'entry'}; there are: {', '.join(names)}."


def test_gather_takes_what_is_included_and_nothing_else(kernels):
    (kernels / "new.cuh").write_text('  #  include "std.cuh"\n// #include "nowhere.cuh"\n#include <cuda_fp16.h>\n')
    (kernels / "entry" / "new.cu").write_text('#include "config.cuh"\n#include "new.cuh"\n')
    texts = sources.gather("new", {"config.cuh": "// a config"})
    assert texts.keys() == {"config.cuh", "entry/new.cu", "new.cuh", "std.cuh"}
    assert texts["config.cuh"] == b"// a config"
    assert texts["std.cuh"] == (kernels / "std.cuh").read_bytes()


@needs_nvrtc
def test_an_error_shows_the_header_its_line_and_the_config(kernels):
    header = kernels / "backward" / "delta.cuh"
    text = header.read_text()
    line = text.index("{\n", text.index("backward_delta(")) + 2
    header.write_text(text[:line] + "  this_is_not_declared();\n" + text[line:])
    number = text[:line].count("\n") + 1
    with pytest.raises(CompileError) as caught:
        compile_delta()
    message = str(caught.value)
    assert message.startswith(f"NVRTC {'.'.join(map(str, compile.version()))} refused entry/bwd_delta.cu")
    assert "-arch=sm_80" in message
    assert re.search(rf"delta\.cuh\({number}\): error: .*this_is_not_declared", message)
    assert jit.render.config_header("bwd_delta", DELTA) in message
    saved = Path(re.search(r"saved under (\S+)\.$", message)[1])
    assert saved.is_relative_to(tempfile.gettempdir())
    assert (saved / "backward" / "delta.cuh").read_text() == header.read_text()
    assert (saved / "config.cuh").is_file() and (saved / "layout.cuh").is_file()
    assert (saved / "entry" / "bwd_delta.cu").is_file()


@needs_nvrtc
def test_an_error_is_not_cached(kernels, tmp_path):
    for _ in range(2):
        with pytest.raises(CompileError, match="NoSuchSequence"):
            compile_delta(sequence="NoSuchSequence")
    assert not (tmp_path / "cache").exists()


@needs_nvrtc
def test_a_layout_that_differs_is_an_error(kernels, monkeypatch):
    """The host keeps the old layout while the header changes under it."""
    jit.params.dtype("BwdParams")
    header = kernels / "params.cuh"
    header.write_text(header.read_text().replace("  void* dq; ", "  int extra;\n  void* dq; "))
    with pytest.raises(CompileError, match=r"layout\.cuh\(\d+\): error: static assertion failed.*host layout"):
        compile_delta()


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_1", "sm_999", "sm_90x", "hopper", ""])
def test_an_unknown_architecture_names_the_known_ones(kernels, arch):
    with pytest.raises(CompileError) as caught:
        compile_delta(arch)
    message = str(caught.value)
    assert f"not for {arch!r}" in message
    assert "sm_80, " in message
    assert all(known in message for known in compile.supported_archs())


def test_no_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    compile._module.cache_clear()
    with pytest.raises(CompileError) as caught:
        compile._module()
    assert "kernels are compiled by NVRTC through CuPy, which cannot be imported" in str(caught.value)
    assert "run `pip install -e '.[cuda13]'`, or with '.[cuda12]' where the driver is older" in str(caught.value)


if __name__ == "__main__":
    for path, render in RENDERED.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(render())
        print(path)
