"""--tracker: sends a run's metrics to Weights & Biases, Trackio or TensorBoard too."""

import html
import importlib
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

PROJECT = "gpt2"


class Tracker:
    """Sends metrics to one tracker. After any error it warns once and stops sending; the run continues.

    run_id: the same for all launches of a run, so the tracker shows them as one run. step: this launch's first step. warn: called
    with the warning, and with the command that shows the run.
    """

    def __init__(self, kind: str, out_dir: str, run_id: str, config: dict, step: int, warn: Callable[[str], None]):
        self.kind, self.warn, self.sink = kind, warn, None
        self.sink = self.attempt(lambda: SINKS[kind](Path(out_dir), run_id, config, step))
        if self.sink and kind in TO_WATCH:
            warn(f"to watch the run: {TO_WATCH[kind].replace('FOLDER', shlex.quote(out_dir))}")

    def log(self, step: int, metrics: dict):
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
        if self.sink:
            self.attempt(lambda: self.sink.log(step, numbers))

    def text(self, step: int, name: str, text: str):
        if self.sink:
            self.attempt(lambda: self.sink.text(step, name, text))

    def finish(self):
        if self.sink:
            self.attempt(lambda: self.sink.finish())

    def attempt(self, call):
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the run's results
                return call()
        except Exception as e:  # another project's code may raise anything
            self.sink, why = None, " ".join(str(e).split())
            remedy = f": pip install {self.kind}" if isinstance(e, ImportError) else ""
            self.warn(f"warning: continuing without {self.kind}: {why or type(e).__name__}{remedy}")


def name_of(out_dir: Path) -> str:
    """Names a run by the last two parts of its folder, such as rope/2: in a comparison the last part is only the seed."""
    return "/".join(out_dir.resolve().parts[1:][-2:])


class WandbSink:
    """Weights & Biases. Uses your `wandb login` and variables such as WANDB_MODE=offline, WANDB_PROJECT and WANDB_RUN_GROUP."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", name_of(out_dir)),
            id=os.environ.get("WANDB_RUN_ID", run_id),  # W&B's sweeps set it
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(out_dir)),
            config=config,
            settings=wandb.Settings(console="off"),
        )
        # by W&B's own step counter, which never goes back, it would drop the steps that a resume recomputes
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict):
        self.run.log({"step": step, **numbers})

    def text(self, step: int, name: str, text: str):
        wandb = importlib.import_module("wandb")
        self.run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def finish(self):
        self.run.finish()


class TrackioSink:
    """Trackio: writes to TRACKIO_DIR; `trackio show` shows it. Uses variables such as TRACKIO_SPACE_ID."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        self.trackio: ModuleType = importlib.import_module("trackio")
        name, group = f"{name_of(out_dir)}-{run_id}", os.environ.get("WANDB_RUN_GROUP")
        self.trackio.init(project=PROJECT, name=name, group=group, resume="allow", config=config)

    def log(self, step: int, numbers: dict):
        self.trackio.log(numbers, step=step)

    def text(self, step: int, name: str, text: str):
        self.trackio.log({name: self.trackio.Markdown(indented(text))}, step=step)

    def finish(self):
        self.trackio.finish()


class TensorBoardSink:
    """TensorBoard: writes files for `tensorboard --logdir` into the run's folder."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self.writer = tensorboard.SummaryWriter(str(out_dir / "tensorboard"), purge_step=step)  # hides the steps that a resume recomputes
        self.writer.add_text("config", indented("\n".join(f"{name}: {value}" for name, value in config.items())), step)

    def log(self, step: int, numbers: dict):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str):
        self.writer.add_text(name, indented(text), step)

    def finish(self):
        self.writer.close()


def indented(text: str) -> str:
    """Returns text as it is, for Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


# W&B prints an address itself
TO_WATCH = {"tensorboard": "tensorboard --logdir FOLDER/tensorboard", "trackio": f"trackio show --project {PROJECT}"}
SINKS = {"wandb": WandbSink, "trackio": TrackioSink, "tensorboard": TensorBoardSink}
