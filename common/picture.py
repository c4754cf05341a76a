"""Draws pictures with matplotlib, and turns its errors into one line."""

import io
from contextlib import contextmanager
from pathlib import Path

from common import cli
from common.files import write_atomically


@contextmanager
def picture(out: Path, width: float, height: float):
    """Yields a figure of this size in inches, and writes it to out at the end. ValueError in one line if matplotlib is missing or can't
    draw, for whatever reason; then the file stays as it was. OSError if the file can't be written."""
    try:
        from matplotlib.figure import Figure  # pyplot would look for a window system

        figure, content = Figure(figsize=(width, height), layout="constrained"), io.BytesIO()
        yield figure
        figure.savefig(content, dpi=110, format=out.suffix[1:])
    except Exception as e:  # a backend, a font, LaTeX or a broken installation may raise anything
        remedy = "pip install matplotlib" if isinstance(e, ImportError) else "look at MPLBACKEND and your matplotlibrc"
        raise ValueError(f"can't draw {out} ({' '.join(str(e).split())[:200] or type(e).__name__}): {remedy}") from e
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write(content.getvalue()))


def draw_or_warn(draw, *args):
    """Calls draw. If that fails, warns in one line: a picture must not cost the results beside it."""
    try:
        draw(*args)
    except (ValueError, OSError) as e:
        cli.say(f"warning: {e}")


def label_of(name: str, longest: int = 60) -> str:
    """Returns a name as matplotlib shows it: it would read $…$ as mathematics, and leave a label with a leading _ out of a legend."""
    name = name.encode(errors="replace").decode()  # a file's name may have bytes that are not UTF-8
    half = longest // 2
    name = name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
