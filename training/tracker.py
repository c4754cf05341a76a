"""--tracker: a run's metrics on Weights & Biases, Trackio or TensorBoard, beside its own log."""

import importlib
import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

PROJECT = "gpt2"


class Tracker:
    """What a user watches a run with. Whatever goes wrong with it is one warning, and the run goes on without it.

    run_id: the same for all launches of a run, so that they are one run there too. step: where this launch begins. warn: is
    told what went wrong.
    """

    def __init__(self, kind: str, out_dir: str, run_id: str, config: dict, step: int, warn: Callable[[str], None]):
        self.kind, self.warn, self.sink = kind, warn, None
        self.sink = self.attempt(lambda: SINKS[kind](Path(out_dir), run_id, config, step))

    def log(self, step: int, metrics: dict):
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
        if self.sink:
            self.attempt(lambda: self.sink.log(step, numbers))

    def finish(self):
        if self.sink:
            self.attempt(lambda: self.sink.finish())

    def attempt(self, call):
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the run's results
                return call()
        except Exception as e:  # of another project's code nothing is known
            self.sink, why = None, " ".join(str(e).split())
            remedy = f": pip install {self.kind}" if isinstance(e, ImportError) else ""
            self.warn(f"warning: going on without {self.kind}: {why or type(e).__name__}{remedy}")


class WandbSink:
    """wandb login, WANDB_MODE=offline, WANDB_PROJECT and the like are honoured."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", out_dir.resolve().name),
            id=os.environ.get("WANDB_RUN_ID", run_id),  # which an agent of a sweep gives it
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(out_dir)),
            config=config,
            settings=wandb.Settings(console="off"),
        )
        # W&B's own steps only ever rise, and it drops what a run that went on from an earlier checkpoint does again
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict):
        self.run.log({"step": step, **numbers})

    def finish(self):
        self.run.finish()


class TrackioSink:
    """Kept in TRACKIO_DIR and shown by `trackio show`; TRACKIO_SPACE_ID and the like are honoured."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        self.trackio: ModuleType = importlib.import_module("trackio")
        self.trackio.init(project=PROJECT, name=f"{out_dir.resolve().name}-{run_id}", resume="allow", config=config)

    def log(self, step: int, numbers: dict):
        self.trackio.log(numbers, step=step)

    def finish(self):
        self.trackio.finish()


class TensorBoardSink:
    """Files for `tensorboard --logdir` in the run's folder."""

    def __init__(self, out_dir: Path, run_id: str, config: dict, step: int):
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self.writer = tensorboard.SummaryWriter(str(out_dir / "tensorboard"), purge_step=step)  # hides what is done again
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), step)

    def log(self, step: int, numbers: dict):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        self.writer.close()


SINKS = {"wandb": WandbSink, "trackio": TrackioSink, "tensorboard": TensorBoardSink}
