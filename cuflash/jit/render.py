"""Config -> ``config.cuh``, the only CUDA text that is generated."""

from __future__ import annotations

from dataclasses import fields

from cuflash.jit import params as params_header
from cuflash.plan.config import HEADER, Config


def config_header(kernel: str, config: Config, params: str) -> str:
    """Render the header that makes ``entry/<kernel>.cu`` concrete.

    Strings of the config become type aliases, declared in the headers that the config names, the rest constants. The
    parameter struct's layout is asserted to be the one the host fills.
    """
    headers, types, constants = ["params.cuh"], [], []
    for field in fields(config):
        value = getattr(config, field.name)
        name = "".join(word.capitalize() for word in field.name.split("_"))
        if isinstance(value, str):
            headers.append(field.metadata[HEADER])
            types.append(f"  using {name} = {value};")
        else:
            constants.append(f"  static constexpr {type(value).__name__} k{name} = {str(value).lower()};")
    lines = [
        f"// Written by cuflash.jit.render for {kernel}. Do not edit.",
        "#pragma once",
        "",
        *(f'#include "{name}"' for name in dict.fromkeys(headers)),
        "",
        "namespace cuflash {",
        "",
        "struct Config {",
        *types,
        *constants,
        "};",
        "",
        *_layout_assertions(params),
        "",
        "}  // namespace cuflash",
    ]
    return "\n".join(lines) + "\n"


def _layout_assertions(params: str) -> list[str]:
    """The host's layout of the parameter struct and of those inside it, as static assertions."""
    lines = []
    for struct in ("Strides", "Attention", "Pages", "TensorMap", params):
        dtype = params_header.dtype(struct)
        lines.append(f'static_assert(sizeof({struct}) == {dtype.itemsize}, "host layout");')
        lines += [
            f'static_assert(CF_OFFSET({struct}, {name}) == {offset}, "host layout");'
            for name, (_, offset) in params_header.members(dtype).items()
        ]
    return lines
