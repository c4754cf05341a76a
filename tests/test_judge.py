"""lab.judge against published numbers, SciPy, and simulations of experiments in which nothing, or something known, is there to find."""

import math

import numpy as np
import pytest
from scipy import stats

from lab import judge
from lab.judge import LEVEL, detectable, nominal_level, power, seeds_needed

# hours of extra sleep of ten patients with each of two drugs (Student, 1908)
SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
EIGHT = judge.looks_until(8)  # 3 to 8


def test_sleep_data_give_the_published_numbers():
    """R's t.test: t = -4.0621, p = 0.002833 of both sides, 95 % interval -2.4598858 to -0.7001142."""
    found = judge.judge([a - b for a, b in zip(*SLEEP, strict=True)], [10])
    assert (found.verdict, found.difference) == ("better", pytest.approx(-1.58))
    assert 2 * found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.3, 2.0])
def test_one_look_equals_scipys_paired_test(shift):
    a, b = np.random.default_rng(1).normal(2.0, 0.3, (2, 6))
    a = a + shift
    found, expected = judge.judge([*(a - b)], [6]), stats.ttest_rel(a, b, alternative="less")
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == ("better" if interval.high < 0 else "worse" if interval.low > 0 else "no difference shown")


@pytest.mark.parametrize(
    ("differences", "text"),
    [
        ([-0.05, -0.06, -0.055], "better"),
        ([0.05, 0.06, 0.055], "worse"),
        ([-0.05, 0.06, 0.02], "no difference shown (3 seeds could detect 0.182)"),
        ([-0.05], "one seed shows nothing"),
        ([0.0, 0.0, 0.0], "no difference shown: the losses are equal"),
        ([-0.5, -0.5001], "better"),
        ([-0.5, -0.5], "no difference shown: all seeds have the same difference, so they count as one"),
        ([0.1, math.nan, 0.1], "failed: a loss is not finite"),
        ([0.1, math.inf, 0.1], "failed: a loss is not finite"),
        ([], "no difference shown: 0 seeds, the first look is after 3"),
    ],
)
def test_verdicts_and_their_reasons(differences, text):
    assert judge.judge(differences, [len(differences) or 3]).text == text


@pytest.mark.slow
def test_verdict_and_interval_agree_at_every_look():
    for differences in np.random.default_rng(2).normal(-0.8, 1.0, (40, 8)):
        found = judge.judge([*differences], EIGHT)
        assert (found.verdict == "better") == (found.high < 0) and (found.verdict == "worse") == (found.low > 0)
        assert not found.high < 0 or found.p <= LEVEL + 1e-5
        if len(found.differences) < 8:  # it stopped at the first decisive look
            assert found.decided and not judge.judge([*differences[: len(found.differences) - 1]], EIGHT).decided


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_equal_gpowers_table(effect, seeds):
    """Faul et al., 2007: one-sample t-test, 5 % on both sides, power 80 %."""
    assert seeds_needed(effect) == seeds and power(seeds, effect) >= 0.8 > power(seeds - 1, effect)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_detectable_difference_is_found_in_80_percent(n):
    true = 0.02 * detectable(n)
    series = np.random.default_rng(n).normal(-true, 0.02, (20_000, n))
    assert np.mean(stats.ttest_1samp(series, 0, axis=1, alternative="less").pvalue < LEVEL) == pytest.approx(0.8, abs=0.012)


@pytest.mark.slow
@pytest.mark.parametrize(("looks", "level"), [(2, 0.0294), (3, 0.0221), (4, 0.0182), (5, 0.0158)])
def test_levels_of_many_seeds_are_pococks(looks, level):
    """Pocock, 1977, table 1: the level of each look, both sides together, that makes 5 % in all. It is for known variances."""
    assert 2 * nominal_level(tuple(30 * look for look in range(1, looks + 1))) == pytest.approx(level, rel=0.03)


def first_crossings(series: np.ndarray, looks: tuple[int, ...]) -> tuple[float, float]:
    """Returns which part of these series (N, seeds) is ever called better, and worse, by the verdict at the first decisive look."""
    level, verdicts = nominal_level(looks), np.zeros(len(series))
    for n in looks:
        p = stats.ttest_1samp(series[:, :n], 0, axis=1, alternative="less").pvalue
        verdicts = np.where(verdicts, verdicts, np.where(p < level, -1, np.where(p > 1 - level, 1, 0)))
    return float(np.mean(verdicts < 0)), float(np.mean(verdicts > 0))


# differences of two runs that differ only in luck; the last, of a variant that is mostly a bit better and sometimes much worse
NULLS = {
    "normal": (0.0285, lambda rng, shape: rng.standard_normal(shape)),
    "uniform losses": (0.0325, lambda rng, shape: rng.uniform(-1, 1, shape) - rng.uniform(-1, 1, shape)),
    "skewed losses": (0.0285, lambda rng, shape: rng.lognormal(0, 0.5, shape) - rng.lognormal(0, 0.5, shape)),
    "heavy tails": (0.0285, lambda rng, shape: rng.standard_t(3, shape)),
    "skewed differences": (0.11, lambda rng, shape: rng.lognormal(0, 0.5, shape) - math.exp(0.125)),
}


@pytest.mark.slow
@pytest.mark.parametrize("looks", [(5,), (3, 4, 5), EIGHT, tuple(range(3, 13))], ids=str)
@pytest.mark.parametrize("kind", NULLS)
def test_false_verdicts_are_as_rare_as_promised(kind, looks):
    limit, draw = NULLS[kind]
    better, worse = first_crossings(draw(np.random.default_rng(7), (40_000, max(looks))), looks)
    assert max(better, worse) < limit
    if kind == "normal":
        assert better == pytest.approx(LEVEL, abs=0.0035) and worse == pytest.approx(LEVEL, abs=0.0035)


@pytest.mark.slow
def test_looks_cross_as_often_as_the_verdicts_say():
    series = np.random.default_rng(8).normal(-1.0, 1.0, (300, 8))
    verdicts = [judge.judge([*differences], EIGHT).verdict for differences in series]
    assert first_crossings(series, EIGHT) == (verdicts.count("better") / 300, verdicts.count("worse") / 300)


@pytest.mark.slow
@pytest.mark.parametrize(("effect", "found"), [(1.2, 0.655), (1.42, 0.80), (1.5, 0.85)])
def test_until_decided_finds_what_the_docs_say(effect, found):
    """docs/experiments.md: eight seeds at most find 1.4 standard deviations in 80 %."""
    series = np.random.default_rng(9).normal(-effect, 1.0, (20_000, 8))
    assert first_crossings(series, EIGHT)[0] == pytest.approx(found, abs=0.01)
    assert 1.42 < detectable(8, nominal_level(EIGHT)) < 1.5  # a verdict's figure is a little too large


@pytest.mark.slow
def test_p_counts_the_best_look_among_all_planned():
    best, later = [-0.03, -0.05, -0.024], [0.05, 0.03, 0.05, 0.04, 0.02]
    found, p = judge.judge(best + later, EIGHT), judge.one_sided_p(best)
    assert found.verdict == "no difference shown" and found.difference > 0
    assert found.p == judge.p_over_looks(p, EIGHT) > p
    assert found.p == judge.judge(best, EIGHT).p  # the later seeds speak against it, but the evidence was there


def test_looks_begin_after_three_seeds():
    assert [judge.looks_until(n) for n in (1, 2, 3, 5)] == [(1,), (2,), (3,), (3, 4, 5)]
