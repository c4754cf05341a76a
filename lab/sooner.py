"""How much sooner a recipe reaches a loss: numbers in, numbers out."""

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


def tokens_to_the_same_loss(runs: dict[str, dict[int, dict]]) -> str:
    """Says how many times fewer tokens and seconds the other variants need to reach the first variant's loss.

    The other variants are one recipe at growing lengths. runs: name → seed → measured numbers; a failed variant has none.
    """
    failed = [name for name, seeds in runs.items() if not seeds]
    first, *series = [seeds for seeds in runs.values() if seeds]
    lines = []
    for unit in ("tokens", "seconds"):
        ratios = []
        for seed in sorted(set.intersection(*map(set, [first, *series]))):
            amount = amount_for(first[seed]["val_loss"], [one[seed][unit] for one in series], [one[seed]["val_loss"] for one in series])
            if amount is None:
                why = "the series does not reach the first variant's loss, or its shortest run already beats it: choose other lengths"
                return f"{', '.join(failed)} failed, and without it {why}" if failed else why
            ratios.append(first[seed][unit] / amount)
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"× fewer {unit} to the first variant's loss, seed by seed: {each}; mean {statistics.fmean(ratios):.2f}")
    return "\n".join(lines)
