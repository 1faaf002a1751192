"""How a value shows itself: in a line that can be typed again, as a report in a terminal, and in a notebook."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cuflash.dtypes import DType

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

LABEL = 11
"""Columns of the labels of a report."""

_WIDTH = 110
"""Columns of a report in a notebook."""

_PRE = (
    "<pre style=\"white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',consolas,"
    "'Courier New',monospace\">{code}</pre>"
)
"""What rich's own report of an object stands in, without colours: a notebook may be dark."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A title and, below it, texts behind labels: what rich prints, and notebooks show as rich prints it."""

    title: str
    lines: Sequence[tuple[str, str]]
    """A label and a text each; a text without a label starts at the margin."""

    def __str__(self) -> str:
        lines = (f"  {label:<{LABEL}}{text}" if label else f"  {text}" for label, text in self.lines)
        return "\n".join([self.title, *lines])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = max(options.max_width, 2 * LABEL)
        for line in _wrapped("", self.title, width):
            yield Text(line, style="bold")
        for label, text in self.lines:
            for line in _wrapped(label, text, width):
                yield Text(line)

    def _repr_html_(self) -> str:
        """The report, for a notebook."""
        from rich.console import Console

        page = Console(  # which in a notebook would also show what it records
            file=io.StringIO(), record=True, width=_WIDTH, color_system="truecolor", soft_wrap=True, force_jupyter=False
        )
        page.print(self)
        return page.export_html(inline_styles=True, code_format=_PRE)


def _wrapped(label: str, text: str, width: int) -> Iterator[str]:
    """A text behind a label, its further lines below its first."""
    yield from textwrap.wrap(
        text,
        width,
        initial_indent=label.ljust(LABEL) if label else "",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label]


def spelled(value: Any, *always: str) -> str:
    """The call that makes a dataclass: some fields by place, the others where they are not their defaults."""
    parts = [_spelled(getattr(value, name)) for name in always]
    for field in fields(value):
        if field.name not in always and (given := getattr(value, field.name)) != field.default:
            parts.append(f"{field.name}={_spelled(given)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def _spelled(value: Any) -> str:
    """An element type by its name, which stands for it wherever one is expected."""
    return repr(value.name) if isinstance(value, DType) else repr(value)
