"""Chooses the fastest of several ways to compute the same thing. It differs from CPU to CPU, so we measure (results/speed.md).

GPT_WAYS="row=library compiled_row=loop" in the environment forces a choice. `python -m lab.bench` prints what was chosen.
"""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager

FORCE = "GPT_WAYS"
WAYS = {
    "row": ("library", "onednn", "packed", "mv"),  # linear layers that add a token to one text
    "rows": ("library", "onednn", "packed"),  # linear layers with more rows of input
    "compiled_row": ("loop", "library", "mv"),  # row, in torch.compile
    "attention": ("blockwise", "fused"),  # in torch.compile on a CPU
}
chosen: dict[str, str] = {}  # what → the way, for this process
may_try = True  # False: every default stays


def forced(what: str) -> str | None:
    """Returns the way that the environment asks for, or None. ValueError if it names something unknown."""
    wanted = dict(entry.partition("=")[::2] for entry in os.environ.get(FORCE, "").split())
    for name, way in wanted.items():
        if way not in WAYS.get(name, ()):
            known = ", ".join(f"{name}={'|'.join(ways)}" for name, ways in WAYS.items())
            raise ValueError(f"{FORCE} has {name}={way}: use {known}")
    return wanted.get(what)


@contextmanager
def defaults():
    """Keeps every default inside this block. For a run, which must compute the same bits when it is resumed."""
    global may_try
    may_try = False
    try:
        yield
    finally:
        may_try = True


def fastest(what: str, ways: dict[str, Callable[[], object]], passes: int = 3) -> str:
    """Tries each way a few times in turns, and returns the name of the one with the shortest best time. The first way stays unless
    another takes less than 0.9 of its time, so that noise seldom changes the choice, and with it the rounding."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(1 + passes):
        for name, call in ways.items():
            began = time.perf_counter()
            call()
            if turn:  # the first one warms up
                best[name] = min(best[name], time.perf_counter() - began)
    first, winner = next(iter(ways)), min(best, key=best.get)
    chosen[what] = winner if best[winner] < 0.9 * best[first] else first
    return chosen[what]
