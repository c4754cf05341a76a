"""Tables: aligned within 100 columns, or Markdown that GitHub reads back as the same cells."""

import re
import sys

import pytest
from rich.cells import cell_len

from common.tables import WIDTH, table

HEAD = ["variant", "loss", "note"]
ROWS = [["rope", "1.2345", "short"], ["a|b" * 30, "12.3", "many words, " * 20], ["[red]é中", "", "two\nlines"]]


def test_tables_are_aligned_within_the_width():
    lines = table(HEAD, ROWS, [2]).splitlines()
    assert max(map(cell_len, lines)) <= WIDTH and lines[1].strip("─ ") == ""
    assert re.match(r"variant +loss +note", lines[0]) and any(re.match(r"rope +1\.2345 +short$", line) for line in lines)
    assert "[red]é中" in lines[-2] + lines[-1]


def test_markdown_keeps_cells_apart():
    lines = table(HEAD, ROWS, [2], markdown=True).splitlines()
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells[0] == HEAD and set(cells[1]) == {"---"}
    assert cells[2:] == [[cell.replace("\n", " ").strip() for cell in row] for row in ROWS]


def test_missing_rich_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ValueError, match=r"tables need Rich .*: pip install -r requirements.txt"):
        table(HEAD, ROWS)


def test_table_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["x" * 200, "better"]]
    assert 60 < max(map(len, table(["variant", "verdict"], rows).splitlines())) <= WIDTH  # not a terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert max(map(len, table(["variant", "verdict"], rows).splitlines())) == 60
    numbers = ["1,557,611,200"] * 4
    lines = table(["variant", *"abcd", "verdict"], [["rope", *numbers, "no difference shown"]], [5]).splitlines()
    assert " ".join(lines[0].split()) == "variant a b c d verdict" and "no" in lines[2] and numbers[0] in lines[2]


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_colors_need_a_terminal_without_no_color(monkeypatch, no_color, colored):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in table(["variant", "verdict"], [["a", "better"]])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ("\x1b[32m" in table(["variant", "verdict"], [["a", "better"]])) == colored
