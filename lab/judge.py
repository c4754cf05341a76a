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
SERIES = 100_000  # simulated for the level of several looks; their mirror images double them
DECIDED = ("better", "worse")


def distributions():
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
    p: float | None = None  # probability of so low a mean, at any look so far, if the variant makes no difference
    detectable: float | None = None  # smallest true difference that these seeds would find with probability POWER
    reason: str = ""

    @property
    def decided(self) -> bool:
        return self.verdict in DECIDED

    @property
    def text(self) -> str:
        """The verdict with its reason, for people."""
        if self.verdict == "no difference shown" and not self.reason:
            return f"{self.verdict} ({len(self.differences)} seeds could detect {self.detectable:.3f})"
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


def judge(differences: Sequence[float], looks: Sequence[int]) -> Judgement:
    """Judges a variant by its differences, one per seed in order. looks: the numbers of seeds after which someone looks, fixed before
    the first look. Later seeds than the first decisive look don't count."""
    if not all(map(math.isfinite, differences)):
        return Judgement("failed", reason="a loss is not finite")
    smallest, found = 1.0, Judgement("no difference shown", reason=f"{len(differences)} seeds, the first look is after {min(looks)}")
    for n in looks:
        if n <= len(differences):
            found, smallest = judge_once(tuple(differences[:n]), tuple(looks), smallest)
            if found.decided:
                break
    return found


def judge_once(differences: tuple[float, ...], looks: tuple[int, ...], smallest: float) -> tuple[Judgement, float]:
    """Judges at one of the looks. smallest: p of the earlier looks, the smallest of them; returned with this look's."""
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Judgement("one seed shows nothing", differences, mean), smallest
    deviation = statistics.stdev(differences)
    if deviation == 0 == mean:
        return Judgement("no difference shown", differences, 0.0, 0.0, 0.0, 0.5, 0.0, reason="the losses are equal"), smallest
    t, level = distributions().t(n - 1), nominal_level(looks)
    error = deviation / math.sqrt(n)
    smallest = min(smallest, float(t.cdf(mean / error if error else math.copysign(math.inf, mean))))
    half = float(t.isf(level)) * error
    low, high = mean - half, mean + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return Judgement(verdict, differences, mean, low, high, overall(smallest, looks), detectable(n, level) * deviation), smallest


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
    return np.sort(distributions().t.cdf(lowest, n - 1).min(1))


@cache
def nominal_level(looks: tuple[int, ...]) -> float:
    """Returns the one-sided level of each look that makes the probability of a false "better" at any of them LEVEL."""
    return LEVEL if len(looks) == 1 else float(np.quantile(smallest_p(looks), LEVEL))


def overall(p: float, looks: tuple[int, ...]) -> float:
    """Returns the probability that a variant that makes no difference has a p this small at any look."""
    if len(looks) == 1:
        return p
    simulated = smallest_p(looks)
    return float(np.searchsorted(simulated, p, side="right") + 1) / (len(simulated) + 1)  # never 0: a simulation can't show that


# ---- power ----


def power(n: int, effect: float, level: float = LEVEL) -> float:
    """Returns the probability that n seeds find a true difference. effect: the difference in standard deviations of one seed's."""
    t = distributions()
    return float(t.nct.sf(t.t.isf(level, n - 1), n - 1, abs(effect) * math.sqrt(n)))


@cache
def detectable(n: int, level: float = LEVEL) -> float:
    """Returns the true difference that n seeds find with probability POWER, in standard deviations of one seed's difference."""
    low, high = 0.0, 1.0
    while power(n, high, level) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(n, middle, level) < POWER else (low, middle)
    return high


def seeds_needed(effect: float, most: int = 1000) -> int | None:
    """Returns how many seeds find a true difference of this many standard deviations with probability POWER. None if more than most."""
    return next((n for n in range(2, most + 1) if power(n, effect) >= POWER), None)


# ---- how much sooner ----


def amount_for(loss: float, amounts: list[float], losses: list[float]) -> float | None:
    """Interpolates the tokens (or seconds) that a series of runs needs to reach a loss.

    Linear in the loss and in log(amount), between the two runs around that loss. None if no two runs are around it.
    """
    for i in range(1, len(amounts)):
        if losses[i - 1] > loss >= losses[i]:
            fraction = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
            return math.exp((1 - fraction) * math.log(amounts[i - 1]) + fraction * math.log(amounts[i]))
    return None


def tokens_to_the_same_loss(runs: dict[str, list[dict]]) -> str:
    """Says how many times fewer tokens and seconds the other variants need to reach the first variant's loss.

    The other variants are one recipe at growing lengths.
    """
    first, *series = runs.values()
    lines = []
    for unit in ("tokens", "seconds"):
        ratios = []
        for seed, one in enumerate(first):
            amount = amount_for(one["val_loss"], [runs[seed][unit] for runs in series], [runs[seed]["val_loss"] for runs in series])
            if amount is None:
                return "the series does not reach the first variant's loss, or its shortest run already beats it: choose other lengths"
            ratios.append(one[unit] / amount)
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"× fewer {unit} to the first variant's loss, seed by seed: {each}; mean {statistics.fmean(ratios):.2f}")
    return "\n".join(lines)
