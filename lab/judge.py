"""Judges variants: numbers in, verdicts out. Knows no files."""

import math
import statistics


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
