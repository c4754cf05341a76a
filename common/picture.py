"""The style of all pictures: colors, numbers on axes, legends. Draws with matplotlib, and turns its errors into one line."""

import io
import math
import textwrap
from contextlib import contextmanager
from pathlib import Path

from common import cli
from common.files import write_atomically

WIDTH = 10.0  # inches: on GitHub, which shows 830 pixels, the smallest text is 10 pixels high
DPI = 120
NARROW = 7.5  # of a picture with one panel
# Okabe & Ito's colors (2008), which color-blind readers can tell apart, without yellow: too pale for a line
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)))  # so that a print in grey tells them apart, too
GREY = "#777777"  # of what is no run: zero, baselines, chance
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
}


@contextmanager
def picture(out: Path, width: float, height: float, title: str = ""):
    """Yields a figure of this size in inches, and writes it to out at the end. ValueError in one line if matplotlib is missing or can't
    draw, for whatever reason; then the file stays as it was. OSError if the file can't be written."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # pyplot would look for a window system

        with matplotlib.rc_context(STYLE):
            figure, content = Figure(figsize=(width, height), layout="constrained"), io.BytesIO()
            figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # inches
            if title:
                figure.suptitle(textwrap.fill(title, int(width * 10)), x=0.01, ha="left")
            yield figure
            figure.savefig(content, dpi=DPI, format=out.suffix[1:])
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


# ---- lines ----


def look(i: int) -> dict:
    """Returns the color and the dashes of line i. The first 28 differ; the first 4 also in grey."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)]}


def fit_late(axes, curves: list[tuple], start: float | None = None):
    """Sets the vertical limits so that 0 and the curves (x, low, high) fill the panel from start on; without it, in the later half. Early
    differences are large, and would leave no room for the others."""
    start = sum(axes.get_xlim()) / 2 if start is None else start
    late = (end for x, low, high in curves for at, *ends in zip(x, low, high, strict=True) if at >= start for end in ends)
    values = [0.0, *filter(math.isfinite, late)]
    margin = 0.1 * (max(values) - min(values)) or 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.locator_params("y", nbins=7, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:+.3g}".replace("-", "−") if y else "0")


def legend_below(where, handles=()):
    """Puts the legend of some axes, or of a whole figure, below it: there it covers nothing. A label that is there twice counts once."""
    axes, figure = ([where], where.get_figure()) if hasattr(where, "get_figure") and hasattr(where, "plot") else (where.axes, where)
    found = {h.get_label(): h for h in handles} | {h.get_label(): h for each in axes for h in each.get_legend_handles_labels()[0]}
    if not found:
        return
    width = figure.get_figwidth() * (1 if where is figure else 0.5)
    columns = max(1, min(len(found), int(width * 12 / (6 + max(map(len, found))))))
    place = dict(loc="outside lower center") if where is figure else dict(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    where.legend(handles=[*found.values()], ncols=columns, handlelength=2.6, **place)


def label_of(name: str, longest: int = 60) -> str:
    """Returns a name as matplotlib shows it: it would read $…$ as mathematics, and leave a label with a leading _ out of a legend."""
    name = name.encode(errors="replace").decode()  # a file's name may have bytes that are not UTF-8
    half = longest // 2
    name = name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


# ---- numbers ----

COUNTS, SI = "kMBT", "kMGTPEZ"  # thousands, millions, billions, …; the second for bytes and FLOPs


def short(x: float, top: float | None = None, names: str = COUNTS, digits: int = 4) -> str:
    """Returns a number as people write it: 1,500, 300 k, 0.5 M. top: the axis's largest number, which sets the unit for all."""
    top = abs(x) if top is None else top
    power = 0 if top < 1e4 else min(len(names), int(math.log10(top) + 1e-9) // 3)  # 1e-9: log10(1e15) may be below 15
    value = x / 1000**power
    text = (f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}").replace("e-0", "e-")
    return f"{text} {names[power - 1]}" if power and x else text


def between(values, digits: int = 3) -> str:
    """Returns 0.2 M, or 0.2 M to 10 M: the lowest and the highest of some numbers."""
    return " to ".join(dict.fromkeys(short(end, digits=digits) for end in (min(values), max(values))))


def number_axis(axis, names: str = COUNTS):
    """Labels an axis 0.5 M, not 0.5 with 1e6 in a corner. The unit fits the largest number; on a logarithmic axis, each one."""
    logarithmic = axis.get_scale() == "log"
    axis.set_major_formatter(lambda x, _: short(x, None if logarithmic else max(map(abs, axis.get_view_interval())), names))


SECONDS = {1: "s", 60: "min", 3600: "h", 86400: "days"}
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)  # seconds from tick to tick


def time_axis(axis):
    """Labels an axis of seconds 30 s, 5 min or 2 h, at full ones."""
    from matplotlib.ticker import MultipleLocator

    low, high = axis.get_view_interval()
    step = next((step for step in STEPS if (high - low) / step <= 9), 86400 * -(-(high - low) // (9 * 86400)))
    unit = max(unit for unit in SECONDS if unit <= step)
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(lambda x, _: f"{x / unit:g} {SECONDS[unit]}" if x else "0")


def log_ticks(low: float, high: float, least: int = 5) -> list[float]:
    """Returns round numbers from low to high, at least this many, for a logarithmic axis. Fewer if low is about high."""
    finer = (
        [k * step for k in range(round(1 / step), round(10 / step))] for step in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    )
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for leading in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), *finer):
        ticks = [tick for d in decades for m in leading if low <= (tick := float(f"{m:.4g}e{d}")) <= high]
        if len(ticks) >= least:
            break
    return ticks


def log_axis(axis, names: str = COUNTS, least: int = 5):
    """Gives a logarithmic axis enough ticks with plain numbers, for what it shows now."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(log_ticks(*axis.get_view_interval(), least)))
    axis.set_minor_locator(NullLocator())
    number_axis(axis, names)
