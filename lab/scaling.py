"""Fits scaling laws to your own runs: what does more compute buy, and how should you spend it?

    python -m lab.scaling ladder --data-dir edu_fineweb10B      # trains models of several sizes on several amounts of tokens
    python -m lab.scaling fit                                   # fits L(N, D) to their losses and plots it
    python -m lab.scaling plan --dollars 100 --gpu H100 --price 3    # the best size and number of tokens for a budget

N counts all parameters, D counts training tokens, C = 6 N D counts floating point operations (Kaplan et al., 2020).
"""

import csv
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common import cli, picture
from common.device import ASSUMED_MFU, CARDS
from common.files import read_json, write_json
from common.picture import between, short
from common.shards import differences
from common.tables import table
from common.validation import raise_errors
from lab.origins import code_notes, refuse_unless
from lab.runs import Run, last_checkpoint, run_all, split
from train import find_data
from training.checks import fit_vocabulary
from training.config import MAY_CHANGE, TrainConfig
from training.flags import raise_if_changed
from training.run_json import RUN, code_now, is_finished, read_run, read_run_json
from variants import VariantConfig, build_on_meta

LAW = "law.json"


@dataclass
class LadderConfig:
    """Train a ladder: a model of each size for each token count.

    Finished runs are kept, stopped runs resume."""

    data_dir: str
    """Folder of shards. Byte shards give the smallest models: 0.2 to 10 M parameters with the default sizes."""
    sizes: tuple[str, ...] = ("4x64", "4x96", "6x128", "7x192", "8x320")
    """LAYERSxWIDTH of each size. A head has 32 channels."""
    tokens: tuple[float, ...] = (2e5, 4e5, 8e5, 1.6e6)
    """Token counts to train on, such as 1e6. Rounded to whole steps."""
    out_dir: str = "log/scaling"
    """Gets a folder for each run. A later ladder with the same settings adds runs to it."""
    flags: str = "--preset modern --muon-momentum 0.85 --seq-len 256 --total-batch-tokens 2048 --micro-batch-size 8 --val-tokens 262144"
    """Other flags of train.py for all runs. Write --flags="…", with the equals sign."""
    warmup_ratio: float = 0.05
    """Fraction of a run's steps that warm up the learning rate."""
    workers: int = 1
    """Runs at a time. With several GPUs, each run gets one."""
    mixed: bool = False
    """Also use finished and stopped runs of other code. Without it, they are refused."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(1, self, "workers")
        errors += [f"--sizes {size}: give LAYERSxWIDTH, WIDTH a multiple of 32" for size in self.sizes if not shape_of(size)]
        errors += [f"--tokens {tokens:g}: it must be at least 1" for tokens in self.tokens if not 1 <= tokens < math.inf]
        if not 0 <= self.warmup_ratio <= 1:
            errors.append(f"--warmup-ratio is {self.warmup_ratio}: it must be from 0 to 1")
        if not self.sizes or not self.tokens:
            errors.append("give at least one value for --sizes and one for --tokens")
        raise_errors(errors)


@dataclass
class FitConfig:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to a ladder or a .csv."""

    out_dir: str = "log/scaling"
    """The ladder's folder. Gets law.json and scaling.png."""
    points: str = ""
    """A .csv with the columns params, tokens and loss. Replaces a ladder's runs."""
    hold_out: int = 0
    """Leave this many of the largest runs out of the fit, and show how well it predicts them."""
    bootstraps: int = 200
    """Fits to resampled points, for the intervals. 0: no intervals."""
    seed: int = 1337
    """Seed of the resampling."""
    mixed: bool = False
    """Fit runs of several versions of the code. The output names them. Without it, they are refused."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(0, self, "hold_out", "bootstraps", "seed")
        if self.points and folders_of(Path(self.out_dir)):
            errors.append(f"--out-dir {self.out_dir} has a ladder, and --points would overwrite its law: choose another --out-dir")
        raise_errors(errors)


@dataclass
class PlanConfig:
    """Find the best model size and number of tokens for a budget."""

    flops: float = 0.0
    """The budget in floating point operations, such as 1e19. Give this, --gpu-hours or --dollars."""
    gpu_hours: float = 0.0
    """The budget in hours of one --gpu."""
    dollars: float = 0.0
    """The budget in dollars. Needs --price."""
    gpu: Literal[tuple(CARDS)] = "H100"
    """The kind of GPU that hours and dollars pay for."""
    price: float = 0.0
    """Dollars per hour of one --gpu. 0: print no cost."""
    mfu: float = ASSUMED_MFU
    """Fraction of the GPU's peak, counting 6 N D operations. train.py's mfu also counts attention's."""
    law: str = "besiroglu"
    """A published law (besiroglu, hoffmann or kaplan), or the law.json from lab.scaling fit."""
    vocab_size: int = 50257
    """The ids of the models that are suggested: GPT-2's. For byte shards, 257."""
    seq_len: int = 1024
    """Their sequence length, which a table of positions counts."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON instead of a table."""

    def validate(self):
        """Raises ValueError with all errors at once."""
        errors = cli.at_least(0, self, "flops", "gpu_hours", "dollars", "price") + cli.at_least(1, self, "vocab_size", "seq_len")
        if sum(x > 0 for x in (self.flops, self.gpu_hours, self.dollars)) != 1:
            errors.append("give one budget: --flops 1e19, --gpu-hours 10, or --dollars 100 --price 3")
        if self.dollars > 0 and self.price <= 0:
            errors.append("--dollars needs --price: dollars per hour of one --gpu")
        if not 0 < self.mfu <= 1:
            errors.append(f"--mfu is {self.mfu}: it must be above 0 and at most 1")
        raise_errors(errors)


# ---- the law ----


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta in nats per token (Hoffmann et al., 2022, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n, d):
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def best(self, flops: float) -> tuple[float, float]:
        """Returns the N and D with the lowest loss at 6 N D = flops (Hoffmann et al., 2022, equation 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n

    @property
    def exponent(self) -> float:
        """gamma in L(C) = E + K / C^gamma, the lowest loss at each compute."""
        return self.alpha * self.beta / (self.alpha + self.beta)


@dataclass(frozen=True)
class Kaplan:
    """The law of Kaplan et al., 2020. Its N excludes embeddings."""

    def best(self, flops: float) -> tuple[float, float]:
        """Returns the best N and D for this compute (section 6.1)."""
        n = 1.3e9 * (flops / 8.64e19) ** 0.73  # flops in PF-days
        return n, flops / 6 / n

    def loss(self, n, d):
        """Returns the loss in nats per token (equation 1.5)."""
        return ((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / d) ** 0.103


PUBLISHED = {
    "besiroglu": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658),  # Besiroglu et al., 2024, a new fit to Hoffmann's runs
    "hoffmann": Law(1.69, 406.4, 410.7, 0.34, 0.28),  # Hoffmann et al., 2022, appendix D.3
    "kaplan": Kaplan(),
}


# ---- the ladder ----


def shape_of(size: str) -> tuple[int, int] | None:
    """Parses '6x128' into layers and width. None if it is invalid."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    layers, width = map(int, match.groups()) if match else (0, 0)
    return (layers, width) if layers and width and width % 32 == 0 else None


def runs_of(config: LadderConfig) -> list[Run]:
    """Returns a run for each size and token count, the cheapest first.

    Each run has its own complete schedule. A longer run, cut short, has a higher loss (Hoffmann et al., 2022, appendix B).
    """
    common = [*split(config.flags), "--data-dir", config.data_dir]
    batch = Run("--flags", common, Path()).config().total_batch_tokens
    quiet = "--val-every 0 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 --keep 1".split()
    runs = {}
    for size in config.sizes:
        layers, width = shape_of(size)
        shape = ["--n-layer", str(layers), "--n-embd", str(width), "--n-head", str(width // 32)]
        for tokens in config.tokens:
            steps = max(1, round(tokens / batch))
            length = ["--max-steps", str(steps), "--warmup-steps", str(round(config.warmup_ratio * steps))]
            folder = Path(config.out_dir, f"{size}_{steps * batch}")
            runs[steps * layers * width**2, folder] = Run(folder.name, [*quiet, *common, *shape, *length], folder)
    return [runs[cost] for cost in sorted(runs)]


class Point(NamedTuple):
    """The result of a run."""

    name: str
    params: int
    tokens: int
    loss: float  # validation, nats per token

    @property
    def flops(self) -> float:
        return 6 * self.params * self.tokens


# settings that may differ within a ladder; checksums show whether the data are the same
RUNGS = MAY_CHANGE - {"dtype", "val_tokens"} | {"n_layer", "n_embd", "n_head", "warmup_steps", "out_dir"}


def check_same_settings(folders: list[Path], config: TrainConfig, data: dict[str, list], source: str):
    """Raises ValueError for the first run whose settings or data differ from those of the ladder `source`."""
    for folder in folders:
        remedy = f"move {folder} elsewhere, it belongs to another ladder"
        raise_if_changed(config, read_run(folder), RUNGS, source, remedy)
        if differences(data_of(folder), data):
            raise ValueError(f"the data of {folder} differ from those of {source}: {remedy}")


def folders_of(out_dir: Path) -> list[Path]:
    return sorted(path.parent for path in out_dir.glob(f"*/{RUN}"))


def data_of(folder: Path) -> dict[str, list]:
    return read_run_json(folder / RUN)["data"]


def finished_in(out_dir: Path) -> list[Path]:
    """Returns the folders of the finished runs in a ladder's folder. ValueError if there is none."""
    finished = [folder for folder in folders_of(out_dir) if is_finished(folder)]
    if not finished:
        raise ValueError(
            f"no finished run in {out_dir}: train some with python -m lab.scaling ladder --data-dir SHARDS --out-dir {out_dir}"
        )
    return finished


def points_of(finished: list[Path]) -> list[Point]:
    """Returns the results of finished runs. ValueError if one belongs to another ladder than the first."""
    first, *others = finished
    check_same_settings(others, read_run(first), data_of(first), str(first))
    points = []
    for folder in finished:
        config, last = read_run(folder), last_checkpoint(folder)
        params, tokens = build_on_meta(config.model).num_params(), last["step"] * config.total_batch_tokens
        points.append(Point(folder.name, params, tokens, last["val_loss"]))
    return points


def read_points(path: Path) -> list[Point]:
    """Reads a .csv with the columns params, tokens and loss. ValueError names the first invalid line."""
    points, columns = [], ("params", "tokens", "loss")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        try:
            if set(columns) - set(rows.fieldnames or ()):
                raise ValueError(f"{path} needs a first line of column names, with commas: {','.join(columns)}")
        except csv.Error as e:
            raise ValueError(f"{path} is not a valid .csv file") from e
        try:
            for row in rows:
                params, tokens, loss = (float(row[name]) for name in columns)
                if not (1 <= params <= 1e30 and 1 <= tokens <= 1e30 and 0 < loss < 1e6):
                    raise ValueError
                points.append(Point(str(rows.line_num), params, tokens, loss))
        except (TypeError, ValueError, csv.Error) as e:
            raise ValueError(f"{path}, line {rows.line_num}: params and tokens must be from 1 to 1e30, loss above 0") from e
    if not points:
        raise ValueError(f"{path} has no points: add lines with params,tokens,loss")
    return points


# ---- the fit ----

FLAT, STEEP = 1e-3, 3.0  # bounds of the exponents; a fit at a bound found no law
HUBER = 1e-3  # as in Hoffmann et al., 2022: larger errors count linearly, so an outlier changes little


def objective(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the Huber loss of log L, summed over the points, and its gradient.

    theta = (log A, log B, log E, alpha, beta) (Hoffmann et al., 2022, equation 3). It is a sum because with a mean the search ends too
    early (Besiroglu et al., 2024).
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])  # (3, points)
    log_sum = np.logaddexp.reduce(terms)
    shares = np.exp(terms - log_sum)
    error = log_sum - log_loss
    value = np.where(np.abs(error) <= HUBER, 0.5 * error**2, HUBER * (np.abs(error) - 0.5 * HUBER)).sum()
    slope = np.clip(error, -HUBER, HUBER) * shares
    return value, np.array([*slope.sum(1), -(slope[0] * log_n).sum(), -(slope[1] * log_d).sum()])


# starting points of the search: the logs of both terms at the middle of the points, log E, alpha, beta
STARTS = list(itertools.product((-2.0, 0.0), (-2.0, 0.0), (-1.0, 0.5), (0.2, 0.5), (0.2, 0.5)))


def fit(points: list[Point], starts=STARTS) -> tuple[Law, tuple]:
    """Fits the law to the points by L-BFGS, keeping the best result of all starts. Also returns that result as a start for similar points.

    ValueError if there are too few points.
    """
    minimize = import_minimize()
    if len({p.params for p in points}) < 3 or len({p.tokens for p in points}) < 3 or len(points) < 6:
        raise ValueError(f"{len(points)} points are too few to fit: give at least 6, with 3 sizes and 3 token counts")
    log_n, log_d, log_loss = np.log([[p.params, p.tokens, p.loss] for p in points]).T
    # centered, alpha and A are nearly independent: the search takes a tenth of the steps
    centered = log_n - log_n.mean(), log_d - log_d.mean(), log_loss
    scaled = 1 / HUBER**2  # the search's tolerances expect values of about 1

    def value(theta):
        value, gradient = objective(theta, *centered)
        return scaled * value, scaled * gradient

    bounds = [(-20.0, 20.0)] * 3 + [(FLAT, STEEP)] * 2
    ends = [minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=dict(maxiter=5000, ftol=1e-13)) for start in starts]
    a, b, e, alpha, beta = theta = min(ends, key=lambda end: end.fun).x
    a, b = a + alpha * log_n.mean(), b + beta * log_d.mean()
    return Law(*map(float, (math.exp(e), math.exp(a), math.exp(b), alpha, beta))), tuple(theta)


def bootstrap(points: list[Point], theta: tuple, count: int, seed: int) -> list[Law]:
    """Fits laws to points drawn with replacement (Efron, 1979). Each search starts from the fit to all points."""
    rng, laws = np.random.default_rng(seed), []
    while len(laws) < count:
        drawn = [points[i] for i in rng.integers(len(points), size=len(points))]
        try:
            laws.append(fit(drawn, [theta])[0])
        except ValueError:  # the draw has too few sizes
            continue
    return laws


def import_minimize():
    try:
        from scipy.optimize import minimize
    except ImportError as e:
        raise ValueError("lab.scaling fit needs SciPy: pip install scipy") from e
    return minimize


def interval(values: list[float]) -> list[float]:
    """Returns the ends of the middle 80 %, as Hoffmann et al. report it."""
    return [float(x) for x in np.quantile(values, [0.1, 0.9])] if values else []


def report(config: FitConfig, points: list[Point]) -> dict:
    """Returns the fit, its intervals and its predictions, also for the held-out points."""
    points = sorted(points, key=lambda p: p.flops)
    if config.hold_out >= len(points):
        raise ValueError(f"--hold-out {config.hold_out} leaves none of {len(points)} runs to fit: lower it")
    seen, held_out = points[: len(points) - config.hold_out], points[len(points) - config.hold_out :]
    law, theta = fit(seen)
    for name, exponent in (("size", law.alpha), ("tokens", law.beta)):
        if not FLAT < exponent < STEEP:
            how = "do not fall" if exponent <= FLAT else "fall too steeply"
            raise ValueError(f"no law fits these runs, their losses {how} with {name}: train more runs, or on more tokens")
    laws = bootstrap(seen, theta, config.bootstraps, config.seed)
    errors = [law.loss(p.params, p.tokens) / p.loss - 1 for p in seen]
    return {
        "law": asdict(law),
        "intervals": {name: interval([getattr(each, name) for each in laws]) for name in asdict(law)},
        "exponent": law.exponent,
        "exponent_interval": interval([each.exponent for each in laws]),
        "share_of_n": law.beta / (law.alpha + law.beta),  # the best N grows as C to this power
        "share_of_n_interval": interval([each.beta / (each.alpha + each.beta) for each in laws]),
        "error": math.sqrt(np.mean(np.square(errors))),
        "points": [[*p, law.loss(p.params, p.tokens)] for p in seen],
        "held_out": [[*p, law.loss(p.params, p.tokens)] for p in held_out],
    }


def show_fit(found: dict, markdown: bool = False) -> str:
    """Returns the law and its points as tables."""

    def within(ends: list[float]) -> str:
        return f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""

    law = [[name, f"{value:.4g}", within(found["intervals"][name])] for name, value in found["law"].items()]
    law.append(["best N ~ C^", f"{found['share_of_n']:.4g}", within(found["share_of_n_interval"])])
    law.append(["L(C) = E + K / C^", f"{found['exponent']:.4g}", within(found["exponent_interval"])])
    parts = [table(["L = E + A / N^alpha + B / D^beta", "", "80 % interval"], law, markdown=markdown)]
    parts.append(f"Root mean square error over {len(found['points'])} runs: {found['error']:.2%}")
    runs = [("", row) for row in found["points"] if len(found["points"]) <= 60]
    runs += [(" (held out)", row) for row in found["held_out"]]
    rows = [
        [f"{run}{note}", f"{params:,.0f}", f"{tokens:,.0f}", f"{loss:.4f}", f"{predicted:.4f}", f"{predicted / loss - 1:+.2%}"]
        for note, (run, params, tokens, loss, predicted) in runs
    ]
    parts += [table(["run", "parameters", "tokens", "loss", "predicted", "error"], rows, markdown=markdown)] if rows else []
    return "\n\n".join([*parts, *(["\n".join(found["notes"])] if found["notes"] else [])])


def plot_fit(found: dict, out: Path):
    """Plots loss over compute (left: a curve per size, and the lowest loss) and the best size beside published laws (right)."""
    law, rows, held_out = Law(**found["law"]), found["points"] + found["held_out"], len(found["held_out"])
    flops, params, tokens, loss = np.array([[6 * n * d, n, d, loss] for _, n, d, loss, _ in rows]).T
    near, far = np.geomspace(flops.min() / 2, flops.max() * 2), np.geomspace(flops.min() / 2, max(1e24, flops.max()))
    fitted = slice(len(found["points"]))
    title = f"A law fitted to {len(found['points'])} runs: {between(params[fitted])} parameters, {between(tokens[fitted])} tokens"
    with picture.picture(out, picture.WIDTH, 5.4, title) as figure:
        losses, sizes = figure.subplots(1, 2)
        few = len(set(params)) <= 10
        for number, n in enumerate(sorted(set(params)) if few else ()):
            d = np.geomspace(tokens[params == n].min() / 1.5, tokens[params == n].max() * 1.5)
            losses.plot(6 * n * d, law.loss(n, d), **picture.look(number), label=f"{short(n, digits=2)} parameters")
            losses.plot(flops[params == n], loss[params == n], "o", color=picture.look(number)["color"], markersize=4)
        if not few:
            losses.plot(flops, loss, ".", color=picture.GREY, label="runs")
        losses.plot(near, [law.loss(*law.best(c)) for c in near], color=picture.GREY, linewidth=3, zorder=1, label="lowest: the best size")
        losses.set(xscale="log", yscale="log", ylabel="validation loss, nats per token", title="Loss: dots are runs, lines the law")
        picture.log_axis(losses.yaxis)
        for number, (name, published) in enumerate(PUBLISHED.items()):
            sizes.plot(far, [published.best(c)[0] for c in far], **picture.look(number + 3), label=f"{name.capitalize()} et al.")
        best = np.array([law.best(c)[0] for c in far])
        inside = (best >= params.min()) & (best <= params.max())
        sizes.plot(far[inside], best[inside], "k-", linewidth=2.5, label="this law, at sizes of the runs")
        sizes.plot(far, best, "k:", label="this law, beyond them")
        sizes.plot(flops, params, "o", color=picture.GREY, markersize=4, label="runs")
        sizes.set(xscale="log", yscale="log", ylabel="parameters", title="Best size for each compute")
        picture.number_axis(sizes.yaxis)
        for axes, values in ((losses, loss), (sizes, params)):
            if held_out:
                axes.plot(flops[-held_out:], values[-held_out:], "k*", markersize=12, label="held out of the fit")
            axes.set_xlabel("compute in FLOPs: 6 × parameters × tokens")
            picture.legend_below(axes)


# ---- the plan ----


def read_law(name: str) -> Law | Kaplan:
    """Returns a published law, or reads a law.json. ValueError if it is neither."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    try:
        law = Law(**{key: float(value) for key, value in read_json(Path(name), "make it with python -m lab.scaling fit")["law"].items()})
        if not all(0 < value < math.inf for value in asdict(law).values()):
            raise ValueError
        return law
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"--law {name} is not a law: give {', '.join(PUBLISHED)} or a law.json from lab.scaling fit") from e


def plan(config: PlanConfig) -> dict:
    """Returns the best size and tokens for the budget, and the losses of half and twice that size at the same cost."""
    rate = config.mfu * CARDS[config.gpu].flops  # floating point operations per second
    hours = config.gpu_hours or config.dollars / (config.price or 1)
    flops = config.flops or rate * 3600 * hours
    law, model = read_law(config.law), VariantConfig(vocab_size=config.vocab_size, seq_len=config.seq_len)
    best = law.best(flops)[0]
    rows = []
    for n in (best / 2, best, best * 2):
        d = flops / 6 / n
        shape = shape_for(n, model, in_blocks=isinstance(law, Kaplan))
        its_params = params_of(shape, model)
        rows.append({"params": n, "tokens": d, "loss": float(law.loss(n, d)), "shape": flags_of(shape), "its_params": its_params})
    hours = flops / rate / 3600
    return {
        "flops": flops,
        "gpu": config.gpu,
        "gpu_hours": hours,
        "dollars": hours * config.price or None,
        "law": config.law,
        "vocab_size": config.vocab_size,
        "rows": rows,
    }


def shape_for(params: float, model: VariantConfig, in_blocks: bool = False) -> tuple[int, int]:
    """Returns the layers and width of a GPT with about this many parameters, and with a model's vocabulary and sequence length.

    It counts 12 · layers · width² plus the embedding tables (Kaplan et al., 2020, table 1). in_blocks: without the tables.
    The width is about 64 · layers, as in the smallest GPT-2 and GPT-3.
    """
    rows = 0 if in_blocks else model.padded_vocab_size + model.seq_len

    def count(width: int) -> float:
        return 12 * width**3 / 64 + rows * width

    width = 64
    while abs(count(width + 64) - params) < abs(count(width) - params):
        width += 64
    return max(1, round((params - rows * width) / (12 * width**2))), width


def flags_of(shape: tuple[int, int]) -> str:
    layers, width = shape
    return f"--n-layer {layers} --n-embd {width} --n-head {width // 64}"


def params_of(shape: tuple[int, int], model: VariantConfig) -> int | None:
    """Counts the parameters of a GPT with this shape, and with a model's vocabulary and sequence length. None if the shape is invalid."""
    layers, width = shape
    config = replace(model, n_layer=layers, n_embd=width, n_head=width // 64)
    return None if config.errors() else build_on_meta(config).num_params()


def show_plan(found: dict, markdown: bool = False) -> str:
    cost = f", {found['dollars']:,.0f} $" if found["dollars"] else ""
    budget = f"{found['flops']:.3g} floating point operations, {found['gpu_hours']:,.1f} hours of one {found['gpu']}{cost}"
    rows = []
    for name, row in zip(("half the size", "best", "twice the size"), found["rows"], strict=True):
        n, d = row["params"], row["tokens"]
        actual = f"{row['its_params'] / 1e6:,.4g} M" if row["its_params"] else "too many layers"
        rows.append([name, f"{n / 1e6:,.3g} M", f"{d / 1e9:,.3g} B", f"{d / n:,.3g}", f"{row['loss']:.4f}", row["shape"], actual])
    head = ["", "parameters", "tokens", "tokens each", "loss", "flags of train.py", f"with {found['vocab_size']:,} ids"]
    return f"{budget}, by {found['law']}:\n\n{table(head, rows, [5], markdown)}"


# ---- the commands ----


def do_ladder(config: LadderConfig):
    config.validate()
    runs = runs_of(config)
    for run in runs:
        run.config()  # finds errors in the last run before the first one starts
    first = runs[0].config()
    shards = find_data(first)
    first.model = fit_vocabulary(first, shards)
    check_same_settings(folders_of(Path(config.out_dir)), first, shards.contents(), "this ladder")
    refuse_unless(config.mixed, code_notes(folders_of(Path(config.out_dir)), code_now()))  # also the runs of an earlier ladder
    run_all(runs, config.workers, config.mixed)
    print(f"{len(runs)} runs finished in {config.out_dir}: fit them with python -m lab.scaling fit --out-dir {config.out_dir}")


def do_fit(config: FitConfig):
    config.validate()
    out_dir = Path(config.out_dir)
    finished = [] if config.points else finished_in(out_dir)
    points = points_of(finished) if finished else read_points(Path(config.points))
    first = read_run_json(finished[0] / RUN)["launches"][-1] if finished else {}
    found = report(config, points) | {"notes": refuse_unless(config.mixed, code_notes(finished, first))}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / LAW, found)
    picture.draw_or_warn(plot_fit, found, out_dir / "scaling.png")
    print(json.dumps(found, indent=2) if config.json else show_fit(found, config.markdown))


def do_plan(config: PlanConfig):
    config.validate()
    found = plan(config)
    print(json.dumps(found, indent=2) if config.json else show_plan(found, config.markdown))


COMMANDS = {LadderConfig: ("ladder", do_ladder), FitConfig: ("fit", do_fit), PlanConfig: ("plan", do_plan)}


def main():
    with cli.one_line_errors(cli.AGAIN):
        config = cli.parse_command({name: kind for kind, (name, _) in COMMANDS.items()})
        COMMANDS[type(config)][1](config)


if __name__ == "__main__":
    main()
