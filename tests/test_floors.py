"""Who may import whom, in Python and in CUDA: each floor stands on the ones below it and knows none above."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from cuflash.jit import sources
from cuflash.ops.call import VOCABULARIES, Arrays, asked

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cuflash"
KERNELS = sources.root()
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
HEADERS = sorted(path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cu*"))

GROUND = {"errors", "numbers", "settings", "dtypes", "device", "sheet", "drawing", "arrays"}
DESCRIPTIONS = GROUND | {"problem", "masks", "blocks", "mods", "dropout", "features", "generator"}
PARTS = DESCRIPTIONS | {"reference", "plan", "jit", "ops", "api", "__init__"}
FLOORS = {
    **dict.fromkeys(GROUND, GROUND),
    "masks": GROUND,
    "mods": GROUND | {"mods"},
    "blocks": GROUND | {"masks", "mods", "blocks"},
    "dropout": GROUND,
    "generator": GROUND,
    "problem": GROUND | {"masks", "mods", "dropout"},
    "features": GROUND | {"problem", "masks", "mods"},
    "reference": DESCRIPTIONS | {"reference"},
    "plan": DESCRIPTIONS | {"plan"},
    "jit": DESCRIPTIONS | {"jit", "plan"},
    "ops": DESCRIPTIONS | {"reference", "plan", "jit", "ops"},
    "api": DESCRIPTIONS | {"ops", "api"},
    "parallel": GROUND | {"masks", "problem", "ops", "parallel"},
    "adapters": DESCRIPTIONS | {"ops", "parallel", "adapters"},
    "__init__": {"api", "parallel", "blocks", "errors", "generator", "masks", "problem"},
    "cases": PARTS | {"cases"},
    "verify": PARTS | {"cases", "verify"},
    "bench": PARTS | {"parallel", "cases", "verify", "bench"},
    "cli": PARTS | {"parallel", "cases", "verify", "bench", "cli"},
    "__main__": {"cli"},
}
"""What each part of the package may import of it; ``__init__`` is ``import cuflash``. Only ``ops`` joins ``reference``
with ``plan`` and ``jit``, for everything above it but the tools: ``cases``, ``verify``, ``bench`` and ``cli``."""

LIBRARIES = {
    **{name: {"numpy"} for name in FLOORS},
    "settings": {"platformdirs"},
    "sheet": {"rich"},
    "drawing": {"matplotlib"},
    "reference": {"numpy", "threadpoolctl"},
    "dtypes": {"numpy", "ml_dtypes"},
    "mods": {"numpy", "ml_dtypes"},
    "adapters": {"numpy"},
    "verify": {"numpy", "ml_dtypes"},
    "bench": {"numpy", "ml_dtypes", "rich"},
    "cli": {"numpy", "rich", "click"},
}
"""What each part may import from outside the standard library, at the top of a file; a room of ``adapters``, the
library that it is for, too."""

MAY_USE_CUPY = {
    "device.py",
    "arrays.py",
    "generator.py",
    "jit/compile.py",
    "jit/driver.py",
    "jit/graph.py",
    "jit/kernel.py",
    "parallel/nccl.py",
}
"""Files that import cupy, inside functions; verify, bench and cli may as well."""


class Import(NamedTuple):
    name: str
    """Dotted, with the imported name: ``cuflash.plan.plan.Config``."""
    line: int
    in_function: bool


@cache
def tree(path: Path) -> ast.Module:
    """A file of Python, parsed."""
    return ast.parse(path.read_text())


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Every import statement of a module of the package."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno} imports relatively"
                yield from (Import(f"{child.module}.{a.name}", child.lineno, in_function) for a in child.names)
            yield from walk(child, in_function or isinstance(child, ast.FunctionDef | ast.Lambda))

    return tuple(walk(tree(PACKAGE / name), False))


def part(name: str) -> str:
    """The part of the package a file belongs to: ``jit`` for ``jit/cache.py``, ``masks`` for ``masks.py``."""
    return name.split("/")[0].removesuffix(".py")


def imported_part(name: str) -> str:
    """The part of the package an import names: ``jit`` for ``cuflash.jit.cache`` and for ``jit`` from ``cuflash``."""
    words = name.split(".")
    return words[1] if len(words) > 1 and words[1] in FLOORS else "__init__"


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_floors_below_only(name):
    allowed = FLOORS[part(name)]
    wrong = [
        f"{name}:{imported.line} imports {imported.name}"
        for imported in imports(name)
        if imported.name.split(".")[0] == "cuflash"
        and imported_part(imported.name) not in allowed
        and not (name == "arrays.py" and imported.in_function and imported_part(imported.name) == "adapters")
    ]
    assert not wrong


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_its_libraries_only(name):
    wrong = []
    for imported in imports(name):
        library = imported.name.split(".")[0]
        if library == "cupy":
            here = name in MAY_USE_CUPY or part(name) in ("verify", "bench", "cli")
            fine = here and imported.in_function
        elif name.startswith("adapters/") and name.count("/") == 2:
            fine = library in {"cuflash", *sys.stdlib_module_names, *LIBRARIES["adapters"], name.split("/")[1]}
        else:
            fine = library in {"cuflash", *sys.stdlib_module_names, *LIBRARIES[part(name)]}
        if not fine:
            wrong.append(f"{name}:{imported.line} imports {imported.name}")
    assert not wrong


def words(name: str) -> set[str]:
    """Every name and attribute that the code of a module speaks of."""
    nodes = list(ast.walk(tree(PACKAGE / name)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return used | {word for imported in imports(name) for word in imported.name.split(".")}


@pytest.mark.parametrize(
    "word, home",
    [
        ("nvrtc", "jit/compile.py"),
        ("RawModule", "jit/kernel.py"),
        ("createProgram", "jit/compile.py"),
        ("cuTensorMapEncodeTiled", "jit/tensormap.py"),
    ],
)
def test_one_module_only_knows(word, home):
    assert [name for name in MODULES if word in words(name)] == [home]


def test_jit_knows_the_types_of_a_plan_and_nothing_else_of_it():
    taken = {imported.name for name in MODULES if part(name) == "jit" for imported in imports(name)}
    assert {name for name in taken if name.startswith("cuflash.plan")} == {
        "cuflash.plan.config.Config",
        "cuflash.plan.config.HEADER",
        "cuflash.plan.config.Written",
        "cuflash.plan.plan.Step",
    }


CONVENTIONS = "cuflash.api.pytorch"
"""The room of PyTorch's functions: what they are to the rest of ``api`` is one more user of the same calls."""


def test_conventions_of_pytorch_are_known_in_their_room_alone():
    users = {name: [x.name for x in imports(name) if x.name.startswith(CONVENTIONS)] for name in MODULES}
    outside = {name: names for name, names in users.items() if names and not name.startswith("api/pytorch/")}
    assert set(outside) == {"__init__.py", "api/sdpa.py"}
    assert outside["api/sdpa.py"] == [f"{CONVENTIONS}.backend"], "whose kernels are preferred for it as well"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("api/pytorch/")])
def test_conventions_of_pytorch_stand_on_what_is_nobodys(name):
    of_api = {x.name.split(".")[2] for x in imports(name) if x.name.startswith("cuflash.api.")}
    assert of_api <= {"pytorch", "padding", "probabilities"}


OPS_FLOORS = (
    {"call", "draw", "overlap", "scratch"}, {"written", "lists"},
    {"check/array", "check/options"}, {"check/dropout", "check/packed", "check/parts", "check/tangents"},
    {"check/sizes"}, {"check/bias", "check/cache", "check/mask", "check/rotary", "check/written"}, {"check/layout"},
    {"check/problem"},
    {"check/__init__"}, {"lengths", "boxes"}, {"block"}, {"launch", "on_numpy", "merge"},
    {"given", "answer"}, {"forward", "jvp", "backward", "explain", "prepared"}, {"vjp"}, {"__init__"},
)  # fmt: skip
"""The files of ``ops``, from what a call consists of up to its answer."""
JOINED = {
    "reference": {"on_numpy", "merge"},
    "plan": {"explain", "given", "launch", "lists", "block", "boxes", "merge"},
    "jit": {"given", "launch", "block", "boxes", "merge"},
}
"""Which of them know the rooms that ``ops`` joins."""


def file_of_ops(name: str) -> str:
    """The file an import names: ``check/array`` for ``cuflash.ops.check.array.check_rows``."""
    words = name.split(".")[2:]
    places = ("/".join(words[:depth]) for depth in range(len(words), 0, -1))
    return next(
        file for place in places for file in (place, f"{place}/__init__") if (PACKAGE / f"ops/{file}.py").exists()
    )


def test_files_of_ops_import_floors_below_only():
    below: set[str] = set()
    for floor in OPS_FLOORS:
        for name in floor:
            imported = {x.name for x in imports(f"ops/{name}.py") if x.name.startswith("cuflash.ops.")}
            assert {file_of_ops(x) for x in imported} <= below, name
        below |= floor
    assert {f"ops/{name}.py" for name in below} == {name for name in MODULES if part(name) == "ops"}


@pytest.mark.parametrize("room", JOINED)
def test_few_files_of_ops_know_a_room_that_it_joins(room):
    knowing = {name for name in MODULES if part(name) == "ops" for x in imports(name) if imported_part(x.name) == room}
    assert knowing == {f"ops/{name}.py" for name in JOINED[room]}


def file_of(name: str) -> str | None:
    """The file of the package an import names; None for one of something else."""
    words = name.split(".")[1:]
    places = ("/".join(words[:depth]) for depth in range(len(words), 0, -1))
    files = (file for place in places for file in (f"{place}.py", f"{place}/__init__.py"))
    return next((file for file in files if file in MODULES), None) if name.startswith("cuflash.") else None


def test_no_files_import_each_other():
    """Within a room, too, each file can be read after those that it imports; circles raise."""
    above = {name: {file_of(x.name) for x in imports(name) if not x.in_function} - {None, name} for name in MODULES}
    for name in MODULES:  # for types alone
        blocks = [node for node in tree(PACKAGE / name).body if isinstance(node, ast.If)]
        lines = {child.lineno for node in blocks if "TYPE_CHECKING" in ast.dump(node.test) for child in node.body}
        above[name] -= {file_of(x.name) for x in imports(name) if x.line in lines}
    order = list(TopologicalSorter(above).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("name", [name for name in MODULES if re.match(r"adapters/\w+/", name)])
def test_an_adapter_knows_no_other(name):
    known = {x.name.split(".")[2] for x in imports(name) if x.name.startswith("cuflash.adapters.")}
    assert known <= {name.split("/")[1]}


def test_words_of_callers_are_renamed_in_one_place():
    """Below the door an array has the name that the kernels know it by."""
    renamed = {word for words in VOCABULARIES.values() for word in words.values()} - {
        *Arrays._fields,
        *asked().values(),
    }
    for name in MODULES:
        if part(name) in ("ops", "reference") and name != "ops/call.py":
            constants = {node.value for node in ast.walk(tree(PACKAGE / name)) if isinstance(node, ast.Constant)}
            assert not constants & renamed, name


def test_every_part_of_the_package_has_a_floor():
    assert {part(name) for name in MODULES} == FLOORS.keys()


def test_only_peers_guests_and_the_meter_import_by_name():
    by_name = {name for name in MODULES if words(name) & {"import_module", "__import__"}}
    assert {name for name in by_name if not name.startswith("bench/peers/")} == {"bench/guests.py", "bench/meter.py"}
    assert by_name >= {f"bench/peers/{name}.py" for name in ("flash_attention", "jax", "product", "torch")}


VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core", "base"}


def test_no_file_has_a_vague_name():
    wrong = [name for name in (*MODULES, *HEADERS) if VAGUE & set(re.split(r"[/._]", name))]
    assert not wrong


MUTE = {"found", "stuff", "tmp", "foo"}
"""What no variable is called: it says that there is something, not what."""


@pytest.mark.parametrize("folder", ["cuflash", "tests", "examples"])
def test_no_variable_has_a_name_that_says_nothing(folder):
    for path in (ROOT / folder).rglob("*.py"):
        nodes = list(ast.walk(tree(path)))
        names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        assert not names & MUTE, path


def test_import_brings_nothing_heavy():
    script = "import sys, cuflash; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    heavy = {"cupy", "cupy_backends", "torch", "jax", "click", "rich", "concurrent", "multiprocessing"}
    assert "cuflash" in modules and not heavy & modules


# The tour in cuflash/README.md

TOUR = (PACKAGE / "README.md").read_text(encoding="utf-8")
TOOLS = {"cases", "verify", "bench", "cli"}


def rows(header: str) -> list[list[str]]:
    """The cells of a table."""
    _, _, rest = TOUR.partition(f"| {header} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_tour_shows_every_room_and_file_of_the_ground():
    rooms = {room.strip("/") for names, *_ in rows("room") for room in re.findall("`(.*?)`", names)}
    assert FLOORS.keys() - {"__init__", "__main__"} <= rooms
    for names, _, _, first in rows("room"):
        for room in re.findall("`(.*?)`", names):
            home = PACKAGE / room if room.endswith("/") else PACKAGE / f"{room}.py"
            assert home.exists(), room
        assert (home / first.strip("`") if home.is_dir() else PACKAGE / first.strip("`")).exists(), first


@pytest.mark.parametrize("row", rows("room"), ids=lambda row: row[0])
def test_the_tour_says_who_imports_a_room(row):
    names, _, told, _ = row
    rooms = {room.strip("/") for room in re.findall("`(.*?)`", names)}
    if told == "as `api/`":
        assert rooms == {"api/pytorch"}
        return
    importers = {part for part, allowed in FLOORS.items() if allowed & rooms} - rooms
    named = set(re.findall("`(.*?)`", told)) | (TOOLS if "the tools" in told else set())
    if told.startswith("all"):
        below = [cells[0] for cells in rows("room")]
        below = below[below.index(names) + 1 :]
        named = {room for cells in below for room in re.findall(r"`(\w+)/?`", cells)} | {"__init__"}
    assert importers == named


def test_a_stranger_finds_what_the_tour_names():
    guesses = rows("looking for")
    named = " ".join(places for _, places in guesses)
    assert {path.parent for path in map(Path, MODULES)} - {Path(), Path("adapters")} <= {
        Path(name).relative_to("cuflash").parent for name in re.findall(r"`(cuflash/[\w/.]+)`", named)
    }, "a room that no guess leads to"
    for _, places in guesses:
        paths = [name for name in re.findall("`(.*?)`", places) if "/" in name]
        assert paths or "python -m" in places
        assert not [path for path in paths if not (ROOT / path).exists()]


# Tests

TESTS = ROOT / "tests"
TEST_FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize("name", TEST_FILES)
def test_no_test_file_is_imported(name):
    """What several test files need is in a library: a file of another name, or a fixture in a conftest.py."""
    nodes = [*ast.walk(tree(TESTS / name))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    words = {word for module in modules for word in module.split(".")}
    assert not {word for word in words if word.startswith("test_") or word == "conftest"}


def test_test_files_lie_in_rooms_like_those_of_the_source():
    rooms = {name.split("/")[0] for name in TEST_FILES if "/" in name and "/test_" in name}
    packages = {name.split("/")[0] for name in MODULES if "/" in name}
    assert rooms == packages | {"kernels", "gpu", "examples"}


# Kernels

POLICIES = {f"attention/{name}.cuh" for name in ("sequence", "heads", "schedule", "softmax", "tangent", "dropout")}
"""Policies that tiles may speak of: whose rows they are, whose work, what sums they have and how these change, which
elements drop out."""
KERNEL_FLOORS = {
    "std.cuh": set(),
    "element.cuh": {"std.cuh", "ptx/convert.cuh"},
    "captured.cuh": set(),
    "params.cuh": {"std.cuh", "captured.cuh"},
    "ptx": {"std.cuh", "element.cuh", "params.cuh"},
    "tile": {"std.cuh", "element.cuh", "params.cuh", "ptx", "tile", *POLICIES},
    "attention": {
        "std.cuh", "element.cuh", "params.cuh", "attention", "ptx/keep.cuh", "ptx/memory.cuh", "ptx/sync.cuh",
    },
    "forward": {
        "std.cuh", "element.cuh", "params.cuh", "ptx", "tile", "attention",
        "forward/producer_sm90.cuh", "forward/visit_sm90.cuh",
    },
    "cache": {"std.cuh", "element.cuh", "params.cuh", "ptx", "tile", "attention"},
    "backward": {
        "std.cuh", "element.cuh", "params.cuh", "ptx", "tile", "attention",
        "backward/bias.cuh", "backward/block_sm90.cuh", "backward/delta.cuh", "backward/sm90.cuh",
    },
}  # fmt: skip
HOST_HEADERS = {"std.cuh": {"cmath", "cstddef"}}
"""The only headers from outside, for host compilers alone."""


def code(name: str) -> str:
    """A kernel file without its comments."""
    return re.sub(r"//.*|/\*[^*]*\*/", "", (KERNELS / name).read_text())


def included(name: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', code(name), flags=re.MULTILINE)


def included_from_outside(name: str) -> set[str]:
    return set(re.findall(r"^\s*#\s*include\s*<([^>]+)>", code(name), flags=re.MULTILINE))


FLOOR_HEADERS = [name for name in HEADERS if name.split("/")[0] in KERNEL_FLOORS]


def test_every_kernel_file_has_a_floor():
    assert set(HEADERS) - set(FLOOR_HEADERS) == {n for n in HEADERS if n.startswith("entry/")} | {
        "config.example.cuh",
        "layout.example.cuh",
    }


@pytest.mark.parametrize("name", FLOOR_HEADERS)
def test_header_includes_floors_below_only(name):
    allowed = KERNEL_FLOORS[name.split("/")[0]]
    headers = included(name)
    assert not [header for header in headers if header not in allowed and header.split("/")[0] not in allowed]
    assert all((KERNELS / header).is_file() for header in headers)


@pytest.mark.parametrize("name", HEADERS)
def test_header_includes_nothing_from_outside(name):
    assert included_from_outside(name) == HOST_HEADERS.get(name, set())


def test_host_headers_are_for_host_compilers_alone():
    device, host = re.split(r"^#else.*$", code("std.cuh").split("#ifdef __CUDACC__")[1], maxsplit=1, flags=re.MULTILINE)
    assert "#include" not in device
    assert all(f"<{name}>" in host.split("#endif")[0] for name in HOST_HEADERS["std.cuh"])


@pytest.mark.parametrize("name", [name for name in HEADERS if name.startswith("entry/")])
def test_entry_joins_a_config_and_one_kernel(name):
    config, kernel = included(name)
    assert config == "config.cuh"
    assert re.fullmatch(r"(cache|forward|backward)/\w+\.cuh", kernel)
    assert (KERNELS / kernel).is_file()
    assert re.findall(r"(\w+)\(const __grid_constant__ cuflash::\w+ params\)", code(name)) == [Path(name).stem]


MACHINE = r"\b(asm|__asm__|threadIdx|blockIdx|blockDim|gridDim|__shared__|__sync\w+|__shfl\w*|atomic\w+)\b"


@pytest.mark.parametrize("name", [name for name in HEADERS if not name.startswith("ptx/")])
def test_instructions_are_named_in_ptx_only(name):
    assert not re.findall(MACHINE, code(name))


@pytest.mark.parametrize("name", [name for name in HEADERS if not name.startswith("ptx/")])
def test_no_architecture_is_asked_for(name):
    """A kernel for another architecture is another file; an instruction may be several before one."""
    assert "__CUDA_ARCH__" not in code(name)


def test_a_kernel_file_fits_in_a_reading():
    assert not [name for name in HEADERS if len((KERNELS / name).read_text().splitlines()) > 450]


@pytest.mark.parametrize("name", [name for name in HEADERS if name.endswith(".cuh")])
def test_header_is_read_once(name):
    directives = [line for line in code(name).splitlines() if line.strip()]
    assert directives[0] == "#pragma once"
