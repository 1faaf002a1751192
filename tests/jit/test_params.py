"""``kernels/params.cuh`` read as NumPy dtypes, against a compiler that reads the same file."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from cuflash import mods
from cuflash.errors import CompileError
from cuflash.jit import params, sources
from cuflash.plan.config import AttentionConfig, Written
from cuflash.plan.steps import DeltaConfig

STRUCTS = (
    "Strides", "Attention", "Pages", "Append", "TensorMap", "FwdParams", "JvpParams", "BwdParams", "MergePart",
    "MergeParams",
)  # fmt: skip
ALIGNMENTS = dict.fromkeys(STRUCTS, 8) | dict.fromkeys(("TensorMap", "FwdParams", "JvpParams", "BwdParams"), 64)
HEADER = (sources.root() / "params.cuh").read_text()

DELTA = DeltaConfig(element="float", dim_v=64, threads=128, tile_q=64, copy_bytes=16)
ATTENTION = AttentionConfig(threads=1, element="float", dim_qk=1, dim_v=1, tile_q=1, tile_kv=1)


def members(struct: str) -> dict[str, str]:
    """Name -> type of the members of a struct of params.cuh, by a reader that knows less than the one under test."""
    _, base, text = re.split(rf"struct (?:alignas\(64\) )?{struct}(?: : (\w+))? {{", HEADER)
    body = re.sub(r"//.*", "", text.split("};")[0])
    declarations = [declaration.replace("*", "* ").split() for declaration in body.split(";") if declaration.strip()]
    return (members(base) if base in STRUCTS else {}) | {words[-1]: " ".join(words[:-1]) for words in declarations}


@pytest.mark.parametrize("struct", STRUCTS)
def test_members_are_in_order_with_their_types(struct):
    kinds = {"int": np.dtype("i4"), "int64": np.dtype("i8"), "uint64": np.dtype("u8")}
    kinds |= {"float": np.dtype("f4"), "double": np.dtype("f8")}
    dtype = params.dtype(struct)
    assert dtype.names == tuple(name.partition("[")[0] for name in members(struct))
    for declared, kind in members(struct).items():
        name, _, length = declared.partition("[")
        if length:
            element = params.dtype(kind) if kind in STRUCTS else kinds[kind]
            assert dtype[name] == np.dtype((element, int(length.removesuffix("]"))))
        elif kind.endswith("*"):
            assert dtype[name] == np.uint64
        elif kind in STRUCTS:
            assert dtype[name] == params.dtype(kind)
        else:
            assert dtype[name] == kinds[kind]


@pytest.mark.parametrize("struct", STRUCTS)
def test_dtypes_are_aligned(struct):
    dtype = params.dtype(struct)
    assert dtype.isalignedstruct
    assert dtype.alignment == 8
    assert dtype.itemsize % ALIGNMENTS[struct] == 0
    for kind, offset in dtype.fields.values():
        assert offset % (64 if kind == params.dtype("TensorMap") else min(kind.itemsize, 8)) == 0


def test_every_struct_is_read():
    declared = re.findall(r"struct (?:alignas\(64\) )?(\w+)(?: : \w+)? \{", HEADER)
    assert tuple(declared) == STRUCTS == tuple(params.parse(HEADER))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_layout_is_the_compilers(tmp_path):
    lines = []
    for struct in STRUCTS:
        lines.append(f'  printf("{struct} %zu %zu\\n", sizeof({struct}), alignof({struct}));')
        for name in (declared.partition("[")[0] for declared in members(struct)):
            place = f"offsetof({struct}, {name}), sizeof((({struct}*)0)->{name})"
            lines.append(f'  printf("{struct}.{name} %zu %zu\\n", {place});')
    text = ["#include <cstdio>", '#include "params.cuh"', "using namespace cuflash;", "int main() {", *lines, "}"]
    (tmp_path / "print.cpp").write_text("\n".join(text) + "\n")
    command = ["g++", "-std=c++17", f"-I{sources.root()}", "print.cpp", "-o", "print"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "print"], capture_output=True, text=True, check=True).stdout
    compiled = {name: (int(a), int(b)) for name, a, b in map(str.split, printed.splitlines())}

    ours = {}
    for struct in STRUCTS:
        dtype = params.dtype(struct)
        ours[struct] = (dtype.itemsize, ALIGNMENTS[struct])
        ours |= {f"{struct}.{name}": (offset, kind.itemsize) for name, (kind, offset) in dtype.fields.items()}
    assert ours == compiled
    assert len(ours) > 60


def test_what_is_captured_comes_before_all_that_a_kernel_without_it_reads():
    table, number, ids = np.ones((2, 3)), np.array(2.0), np.arange(9)
    mod, _ = mods.trace("score_mod", lambda s, b, h, q, k: s * table[h, k] + number * k)
    scale, _ = mods.trace("score_mod", lambda s, b, h, q, k: s * number)
    rule, _ = mods.trace("mask_mod", lambda b, h, q, k: ids[q] == ids[k])
    blocks = Written(None, None, blocks=rule), Written(mod, rule, (0,), blocks=rule)
    others = Written(mod, rule, (0,)), Written(None, rule), Written(scale, None, (0,)), Written(scale, rule)
    for written in (*others, *blocks):
        first = params.first_byte(DELTA, written)
        assert first > 0 and first % 64 == 0 and params.first_byte(replace(ATTENTION, written=written), written) == 0
        for struct in ("FwdParams", "BwdParams"):
            plain, whole = params.dtype(struct), params.dtype(struct, written)
            assert whole.itemsize == first + plain.itemsize and whole.isalignedstruct
            for name in plain.names[1:]:
                assert whole.fields[name][1] == first + plain.fields[name][1]
        plain, whole = params.dtype("Attention"), params.dtype("Attention", written)
        assert {whole.fields[name][1] - first - plain.fields[name][1] for name in plain.names} == {0}
        captured = [name for name in whole.names if name not in plain.names]
        assert whole.names == (*captured, *plain.names)
        assert sum(whole[name].itemsize for name in captured) <= first
    none, _ = mods.trace("score_mod", lambda s, b, h, q, k: s + k)
    assert params.dtype("FwdParams", Written(none, None)) == params.dtype("FwdParams")


def test_values_land_where_the_names_say():
    block = np.zeros((), params.dtype("FwdParams"))
    block["attention"]["softmax_scale"] = 0.125
    block["attention"]["len_q"] = 77
    block["out"] = 0xFFFF_FFFF_FFFF_FFF0
    block["k_stride"]["row"] = -(2**40)
    raw = block.tobytes()
    dtype, attention = params.dtype("FwdParams"), params.dtype("Attention")
    start = attention.fields["softmax_scale"][1]
    assert np.frombuffer(raw, "f8", 1, start) == 0.125
    assert np.frombuffer(raw, "i4", 1, attention.fields["len_q"][1]) == 77
    assert np.frombuffer(raw, "u8", 1, dtype.fields["out"][1]) == 0xFFFF_FFFF_FFFF_FFF0
    assert np.frombuffer(raw, "i8", 1, dtype.fields["k_stride"][1] + 8) == -(2**40)


def test_padding_and_nesting():
    text = """
    #include "std.cuh"
    namespace cuflash {
    // Remarks stand anywhere.
    struct Inner {
      int a;  // [b]
      double b;
      int c;
    };

    struct Outer {
      int first;
      Inner inner;
      const void* pointer;
      float* other;
      int64 last;
    };
    }  // namespace cuflash
    """
    structs = params.parse(text)
    assert list(structs) == ["Inner", "Outer"]
    assert [structs["Inner"].fields[name][1] for name in "abc"] == [0, 8, 16]
    assert structs["Inner"].itemsize == 24
    offsets = {name: offset for name, (_, offset) in structs["Outer"].fields.items()}
    assert offsets == {"first": 0, "inner": 8, "pointer": 32, "other": 40, "last": 48}


def test_stated_alignment_holds_for_all_that_is_around_it():
    text = """
    struct alignas(64) Map {
      uint64 words[3];
    };
    struct Holder {
      int first;
      Map map;
      int last[5];
      double end;
    };
    struct Outer {
      Holder holder;
      int after;
    };
    """
    structs = params.parse(text)
    assert structs["Map"].itemsize == 64 and structs["Map"]["words"] == np.dtype(("u8", (3,)))
    holder = structs["Holder"]
    assert {n: at for n, (_, at) in holder.fields.items()} == {"first": 0, "map": 64, "last": 128, "end": 152}
    assert (holder.itemsize, structs["Outer"].fields["after"][1], structs["Outer"].itemsize) == (192, 192, 256)
    block = np.zeros(1, structs["Outer"])
    block["holder"]["map"]["words"][0, 2] = 7
    assert np.flatnonzero(block.view(np.uint64)).tolist() == [64 // 8 + 2]


MISUNDERSTOOD = {
    "two declarations": ("int a; int b;", "params.cuh(2): expected one declaration a line, got 'int a; int b;'."),
    "two names": ("int a, b;", "params.cuh(2): expected one declaration a line, got 'int a, b;'."),
    "arrays of arrays": ("int a[3][2];", "params.cuh(2): expected one declaration a line, got 'int a[3][2];'."),
    "a named length": ("int a[kFew];", "params.cuh(2): expected one declaration a line, got 'int a[kFew];'."),
    "a default": ("int a = 0;", "params.cuh(2): expected one declaration a line, got 'int a = 0;'."),
    "no semicolon": ("int a", "params.cuh(2): expected one declaration a line, got 'int a'."),
    "a block comment": ("/* why */", "params.cuh(2): expected one declaration a line, got '/* why */'."),
    "a directive": ("#ifdef CF_DEBUG", "params.cuh(2): expected one declaration a line, got '#ifdef CF_DEBUG'."),
    "a struct inside": ("struct B {", "params.cuh(2): expected one declaration a line, got 'struct B {'."),
    "an unknown type": ("short a;", "params.cuh(2): type 'short' is none of int, int64, uint64, float, double."),
    "a later struct": ("Later a;", "params.cuh(2): type 'Later' is none of int, int64, uint64, float, double."),
    "an empty struct": ("", "params.cuh(3): expected one declaration a line, got '};'."),
    "itself": ("A a;", "params.cuh(2): type 'A' is none of int, int64, uint64, float, double."),
}


@pytest.mark.parametrize("line, message", MISUNDERSTOOD.values(), ids=MISUNDERSTOOD)
def test_what_the_reader_does_not_understand_is_refused(line, message):
    with pytest.raises(CompileError) as caught:
        params.parse(f"struct A {{\n  {line}\n}};\nstruct Later {{\n  int b;\n}};\n")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["int outside;\n", "};\n", "struct alignas(n) A {\n", "struct A { int a; };\n", "struct A\n"]
)
def test_stray_lines_are_refused(text):
    with pytest.raises(CompileError, match=r"params.cuh\(1\): expected one declaration a line"):
        params.parse(text)


def test_an_end_without_a_struct_is_refused():
    with pytest.raises(CompileError, match=r"params.cuh\(4\): expected one declaration a line, got '};'"):
        params.parse("struct A {\n  int a;\n};\n};\n")


def test_a_struct_without_an_end_is_refused():
    with pytest.raises(CompileError, match=r"params.cuh\(2\): struct A has no end"):
        params.parse("struct A {\n  int a;\n")


def test_a_name_given_twice_is_refused():
    with pytest.raises(CompileError, match=r"params.cuh\(3\): A has two members a"):
        params.parse("struct A {\n  int a;\n  int a;\n};\n")


def test_unknown_struct_names_the_known_ones():
    with pytest.raises(CompileError) as caught:
        params.dtype("Params")
    assert str(caught.value) == f"kernels/params.cuh has no struct Params; it has {', '.join(STRUCTS)}."
