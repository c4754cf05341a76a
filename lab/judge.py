"""Judges variants: numbers in, verdicts out. Knows no files.

The test is the paired t-test (Student, 1908) on one difference of losses per seed. With one look it has its usual level. With several
looks, each has the same stricter level (Pocock, 1977), and the interval is repeated at that level (Jennison & Turnbull, 1984).
The levels hold for normal differences. tests/test_judge.py says how well they hold for others.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.025  # probability of calling a variant better that makes no difference; the same for worse
POWER = 0.8  # probability of finding the difference that a verdict says it could detect
FIRST_LOOK = 3  # seeds; with two, only huge differences can be seen
SERIES = 100_000  # simulated for the level of several looks; their mirror images double them
EQUAL = "the losses are equal"
SAME = "all seeds have the same difference, so they count as one"


def scipy_stats():
    """Returns scipy.stats, which takes half a second to import. ValueError if SciPy is missing."""
    try:
        from scipy import stats
    except ImportError as e:
        raise ValueError(f"the judge needs SciPy ({e}): pip install -r requirements.txt") from e
    return stats


@dataclass(frozen=True)
class Judgement:
    """What the seeds say about one variant against the first. Losses in nats per token."""

    verdict: str  # better, worse, no difference shown, one seed shows nothing, or failed
    differences: tuple[float, ...] = ()  # the variant's loss minus the first's, one for each seed that counts
    difference: float | None = None  # their mean
    low: float | None = None  # of the 95 % interval around the mean
    high: float | None = None
    p: float | None = None  # how often luck alone gives evidence this strong for better, at any planned look; near 1 for worse
    detectable: float | None = None  # about the smallest true difference that these seeds would find with probability POWER
    reason: str = ""

    @property
    def decided(self) -> bool:
        """Whether more seeds are of no use."""
        return self.verdict in ("better", "worse", "failed") or self.reason in (EQUAL, SAME)

    @property
    def text(self) -> str:
        """The verdict with its reason, for people."""
        if self.verdict == "no difference shown" and not self.reason:
            return f"{self.verdict} ({len(self.differences)} seeds could detect {self.detectable:.3f})"
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


def looks_until(seeds: int) -> tuple[int, ...]:
    """Returns the numbers of seeds after which --until-decided looks."""
    return tuple(range(min(FIRST_LOOK, seeds), seeds + 1))


def judge(differences: Sequence[float], looks: Sequence[int] = ()) -> Judgement:
    """Judges a variant by its differences, one per seed in order. looks: the numbers of seeds after which someone looks, fixed before
    the first look; by default one look at all. Stops at the first look that decides; later seeds are ignored."""
    looks = looks or (max(1, len(differences)),)
    if not all(map(math.isfinite, differences)):
        return Judgement("failed", reason="a loss is not finite")
    found = Judgement("no difference shown", reason=f"{len(differences)} seeds, the first look is after {min(looks)}")
    smallest = 1.0  # p of the looks so far
    for n in looks:
        if n <= len(differences):
            smallest = min(smallest, one_sided_p(differences[:n]))
            found = judge_once(tuple(differences[:n]), tuple(looks), smallest)
            if found.decided:
                break
    return found


def one_sided_p(differences: Sequence[float]) -> float:
    """Returns the probability of so low a mean if the true one is 0, by Student's t-test. 1 if the seeds can't say."""
    n, mean = len(differences), statistics.fmean(differences)
    deviation = statistics.stdev(differences) if n > 1 else 0.0
    if deviation:
        return float(scipy_stats().t.cdf(mean / deviation * math.sqrt(n), n - 1))
    return 0.0 if n > 1 and mean < 0 else 1.0


def judge_once(differences: tuple[float, ...], looks: tuple[int, ...], smallest: float) -> Judgement:
    """Judges at one of the looks. smallest: p of this look or an earlier one, whichever is smaller."""
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Judgement("one seed shows nothing", differences, mean)
    deviation, level = statistics.stdev(differences), nominal_level(looks)
    if deviation == 0 == mean:
        return Judgement("no difference shown", differences, 0.0, 0.0, 0.0, 1.0, 0.0, reason=EQUAL)
    if len(set(differences)) == 1:
        return Judgement("no difference shown", differences, mean, reason=SAME)
    half = float(scipy_stats().t.isf(level, n - 1)) * deviation / math.sqrt(n)
    low, high = mean - half, mean + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return Judgement(verdict, differences, mean, low, high, p_over_looks(smallest, looks), detectable(n, level) * deviation)


# ---- several looks ----


@cache
def smallest_p(looks: tuple[int, ...]) -> np.ndarray:
    """Simulates series of differences around 0, and returns the smallest one-sided p of each at these looks, sorted (N,).

    t is the same for any scale, so one simulation of normal differences serves all. Always the same numbers.
    """
    x = np.random.default_rng(0).standard_normal((SERIES, max(looks)))
    n = np.array(looks)
    mean, square = x.cumsum(1)[:, n - 1] / n, (x * x).cumsum(1)[:, n - 1] / n  # (N, L)
    t = mean / np.sqrt((square - mean * mean) / (n - 1))
    lowest = np.concatenate([t, -t])
    return np.sort(scipy_stats().t.cdf(lowest, n - 1).min(1))


@cache
def nominal_level(looks: tuple[int, ...]) -> float:
    """Returns the one-sided level of each look that makes the probability of a false "better" at any of them LEVEL."""
    return LEVEL if len(looks) == 1 else float(np.quantile(smallest_p(looks), LEVEL))


def p_over_looks(p: float, looks: tuple[int, ...]) -> float:
    """Returns the probability that a variant that makes no difference has a p this small at one of the planned looks."""
    if len(looks) == 1:
        return p
    simulated = smallest_p(looks)
    return float(np.searchsorted(simulated, p, side="right") + 1) / (len(simulated) + 1)  # never 0: a simulation can't show that


# ---- power ----


def power(n: int, effect: float, level: float = LEVEL) -> float:
    """Returns the probability that one look after n seeds finds a true difference. effect: that difference, in standard deviations of
    one seed's difference."""
    t = scipy_stats()
    return float(t.nct.sf(t.t.isf(level, n - 1), n - 1, abs(effect) * math.sqrt(n)))


@cache
def detectable(n: int, level: float = LEVEL) -> float:
    """Returns the true difference that n seeds find with probability POWER, in standard deviations of one seed's difference. It is a
    little too large after several looks, because it leaves out what the earlier ones find."""
    low, high = 0.0, 1.0
    while power(n, high, level) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(n, middle, level) < POWER else (low, middle)
    return high


def seeds_needed(effect: float, most: int = 1000) -> int | None:
    """Returns how many seeds find a true difference of this many standard deviations of one seed's difference with probability POWER.
    None if more than most."""
    return next((n for n in range(2, most + 1) if power(n, effect) >= POWER), None)
