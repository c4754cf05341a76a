"""Settings of a launch: flags over the defaults of a preset, of the weights to start from, or of the run to resume."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import checkpoint
from common import cli
from common.validation import raise_errors
from training.config import MAY_CHANGE, TrainConfig
from training.presets import PRESETS
from training.run_json import is_restart, read_run
from variants import NOT_IN_WEIGHTS, VariantConfig


@dataclass
class PresetFlag:
    """The one flag that decides the defaults of the others."""

    preset: str = TrainConfig.preset


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Flags over the defaults of a preset, of the weights to start from, or of the run to go on with. ValueError when
    they do not fit it, or would overwrite a run."""
    config = parse_flags(argv)
    out_dir = Path(config.out_dir)
    if config.plan and not (config.resume or config.init_from):
        return config
    if config.resume or config.replay_step is not None or is_restart(out_dir):
        previous = replace(read_run(out_dir, config.replay_step), out_dir=config.out_dir, resume=True)
        config = replace(cli.parse(TrainConfig, argv, previous), init_revision=previous.init_revision)
        config.teacher = recorded_teacher(config.teacher, previous.teacher)
        raise_if_changed(previous, config, MAY_CHANGE, f"the run in {out_dir}")
    elif not config.plan and holds_a_run(out_dir):
        raise ValueError(f"{out_dir} holds a run or a model already: add --resume to go on with it, or choose another --out-dir")
    elif config.init_from:
        shape = checkpoint.load_config(config.init_from, config.init_revision)
        config = parse_flags(argv, shape)
        config.init_revision = checkpoint.hub_commit(config.init_from, config.init_revision)
        raise_if_changed(shape, config.model, NOT_IN_WEIGHTS, config.init_from)
    if config.teacher and not config.resume:  # a folder's newest checkpoint may be another one when the run goes on
        config.teacher = str(checkpoint.checkpoint_file(config.teacher) or config.teacher)
    return config


def holds_a_run(out_dir: Path) -> bool:
    """Whether a run, or a model, would be overwritten there."""
    return any((out_dir / name).exists() for name in ("run.json", "log.txt", "config.json")) or any(out_dir.glob("model*"))


def parse_flags(argv: list[str] | None = None, model: VariantConfig | None = None) -> TrainConfig:
    """Flags over the defaults of a preset, and over a model's shape where one is given."""
    first, _ = tyro.cli(PresetFlag, args=argv, return_unknown_args=True, add_help=False)
    preset = PRESETS.get(first.preset, PRESETS["gpt2"])  # a wrong name is for the full parser to refuse
    return cli.parse(TrainConfig, argv, replace(preset, model=model or preset.model), "train.py")


def recorded_teacher(given: str, recorded: str) -> str:
    """The teacher that a run began with, where the same one is given: a folder stands for the checkpoint in it that it had then."""
    return recorded if given and recorded and Path(given) in (Path(recorded), Path(recorded).parent) else given


def raise_if_changed(before, now, allowed: set[str], source: str, remedy: str = "leave its flag out"):
    """ValueError for all fields that differ and may not."""
    old, new = ({**vars(config), **vars(getattr(config, "model", config))} for config in (before, now))
    changed = [name for name in old if name not in allowed | {"model"} and old[name] != new[name]]
    raise_errors([f"{name} {new[name]!r} does not fit {source}, which has {old[name]!r}: {remedy}" for name in changed])


def warnings(config: TrainConfig) -> list[str]:
    """What can be run but is hardly meant: flags that do nothing beside the others, a line each."""
    lines = []
    if config.warmup_steps >= config.max_steps:
        lines.append(f"--warmup-steps {config.warmup_steps} is not below --max-steps: the learning rate never comes to --max-lr")
    if config.min_lr_ratio > 1:
        lines.append(f"--min-lr-ratio {config.min_lr_ratio} is above 1: the learning rate rises to the end")
    if config.init_revision and not config.init_from:
        lines.append("--init-revision does nothing without --init-from")
    usual = PRESETS[config.preset]
    ours, theirs = ({**vars(c), **vars(c.model)} for c in (config, usual))
    differ = [name for name in ours if ours[name] != theirs[name]]
    idle = {
        "--optimizer muon": [] if config.optimizer == "muon" else ["muon_lr", "muon_momentum"],
        "--schedule wsd": [] if config.schedule == "wsd" else ["decay_ratio"],
        "--teacher": [] if config.teacher else ["teacher_weight"],
        "--n-expert": [] if config.model.n_expert > 1 or config.init_from else ["load_balance"],  # it may have come with the weights
        "--plan": ["gpu", "gpus", "price", "rate"],  # in which nothing is trained
    }
    for other, names in idle.items():
        lines += [f"{cli.flag(name)} does nothing without {other}" for name in names if name in differ]
    return lines


def overridden_preset(config: TrainConfig, shape: VariantConfig) -> list[str]:
    """A line that names the fields of the preset's model that --init-from overrides, if any."""
    usual = vars(PRESETS[config.preset].model)
    names = [name for name, kept in vars(shape).items() if usual[name] != kept == getattr(config.model, name) and name != "vocab_size"]
    if not names or config.preset == TrainConfig.preset:
        return []
    return [f"of --init-from {config.init_from}, and not of --preset {config.preset}, the run has {', '.join(map(cli.flag, names))}"]
