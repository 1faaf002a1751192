"""Config -> ``config.cuh``, and the layout of parameters -> ``layout.cuh``: the only CUDA text that is generated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from cuflash.jit import params as params_header
from cuflash.jit.sources import CAPTURED, CONFIG, LAYOUT
from cuflash.jit.written import captured_struct, members, structs
from cuflash.plan.config import HEADER, Config, Written


def headers(kernel: str, config: Config, params: str) -> dict[str, str]:
    """The rendered headers of one variant, by name; ``params`` is the struct that the kernel takes."""
    written = getattr(config, "written", None)
    rendered = {CONFIG: config_header(kernel, config), LAYOUT: layout_header(params, written)}
    if written is not None and members(written):
        rendered[CAPTURED] = _header(kernel, ["std.cuh"], captured_struct(written))
    return rendered


def config_header(kernel: str, config: Config) -> str:
    """Render the header that makes ``entry/<kernel>.cu`` concrete.

    Strings of the config become type aliases, declared in the headers that the config names, the rest constants, and
    what a caller wrote structs of their own.
    """
    includes, types, constants, before = [LAYOUT], [], [], []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "Written | None":
            if value is not None:
                includes.append("attention/lists.cuh" if value.blocks else "attention/mods.cuh")
                before = structs(value, value.fast)
            continue
        name = "".join(word.capitalize() for word in field.name.split("_"))
        if isinstance(value, str):
            includes.append(field.metadata[HEADER])
            types.append(f"  using {name} = {value};")
        else:
            constants.append(f"  static constexpr {type(value).__name__} k{name} = {str(value).lower()};")
    return _header(kernel, includes, [*before, "struct Config {", *types, *constants, "};"])


def layout_header(params: str, written: Written | None = None) -> str:
    """Render the header that asserts that a parameter struct, and those in it, have the layout that the host fills."""
    lines = []
    for struct in ("Strides", "Attention", "Pages", "Append", "TensorMap", "MergePart", params):
        dtype = params_header.dtype(struct, written)
        lines.append(f'static_assert(sizeof({struct}) == {dtype.itemsize}, "host layout");')
        lines += [
            f'static_assert(CF_OFFSET({struct}, {name}) == {offset}, "host layout");'
            for name, (_, offset) in params_header.members(dtype).items()
        ]
    return _header(params, ["params.cuh"], lines)


def _header(subject: str, includes: Iterable[str], lines: Iterable[str]) -> str:
    return "\n".join([
        f"// Written by cuflash.jit.render for {subject}. Do not edit.",
        "#pragma once",
        "",
        *(f'#include "{name}"' for name in dict.fromkeys(includes)),
        "",
        "namespace cuflash {",
        "",
        *lines,
        "",
        "}  // namespace cuflash",
        "",
    ])  # fmt: skip
