"""Tables for people: aligned, at most 100 columns wide, or as Markdown."""

import io
import os
import shutil
import sys
from collections.abc import Sequence

from common import cli

WIDTH = 100  # columns
COLORS = {"better": "green", "worse": "red", "failed": "red"}  # of cells that begin with these words


def check_rich():
    """ValueError in one line if Rich is missing: that should come before hours of work."""
    try:
        import rich.table  # noqa: F401
    except ImportError as e:
        raise ValueError(f"tables need Rich ({e}): pip install -r requirements.txt") from e


def table(head: Sequence[str], rows: Sequence[Sequence[str]], wide: Sequence[int] = (), markdown: bool = False) -> str:
    """Returns a table. The first column and those in wide hold words, which wrap; the others numbers. Has colors only on a terminal, and
    not if NO_COLOR is set."""
    rows = [[*map(cli.printable, row)] for row in rows]
    if markdown:
        lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    check_rich()
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    shown, least = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False), 3 * (len(head) - 1)
    for i, name in enumerate(head):
        words, longest = i == 0 or i in wide, max(cell_len(row[i]) for row in [head, *rows])
        least += min(longest, 12) if words else longest  # what a narrow terminal must hold; else Rich drops the words
        shown.add_column(Text(name), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for first, *others in rows:
        shown.add_row(Text(first), *(Text(cell, style=COLORS.get(cell.split(":")[0], "")) for cell in others))
    width = min(WIDTH, max(least, shutil.get_terminal_size().columns)) if sys.stdout.isatty() else WIDTH
    text = io.StringIO()
    Console(width=width, file=text, color_system="auto" if colored else None, force_terminal=colored).print(shown)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
