"""Settings of a launch: flags override the defaults, which come from a preset, from --init-from or from the run to resume."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import checkpoint
from common import cli
from common.run_folder import RUN
from common.validation import raise_errors
from training.config import MAY_CHANGE, TrainConfig
from training.presets import PRESETS
from training.run_json import is_restart, read_run
from variants import NOT_IN_WEIGHTS, VariantConfig


@dataclass
class PresetFlag:
    """The flag that sets the defaults of all others, and the folder."""

    preset: str = TrainConfig.preset
    out_dir: str = ""


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Returns the settings: flags override the preset, the weights to start from, or the run to resume.
    ValueError if a flag contradicts these weights or this run, or if the run would overwrite another."""
    config = parse_flags(argv)
    out_dir = Path(config.out_dir)
    new = config.resume and config.remote != "" and not (out_dir / RUN).exists()  # training.mirror has looked for the run there
    if new:
        if not config.plan:  # which has not looked
            cli.say(f"neither {out_dir} nor {config.remote} has a run: starting one")
        config.resume = False
    if config.plan and not (config.resume or config.init_from):
        return config
    continues = config.resume or config.replay_step is not None or is_restart(out_dir)
    if not (config.plan or continues):
        raise_if_taken(out_dir)
    if continues:
        previous = replace(read_run(out_dir, config.replay_step), out_dir=config.out_dir, resume=True)
        config = replace(cli.parse(TrainConfig, argv, previous), init_revision=previous.init_revision)
        config.teacher = recorded_teachers(config.teacher, previous.teacher)
        moved = {"teacher"} if config.teacher and previous.teacher else set()  # check_teachers compares the contents
        raise_if_changed(previous, config, MAY_CHANGE | moved, f"the run in {out_dir}")
    elif config.init_from:
        shape = checkpoint.load_config(config.init_from, config.init_revision)
        config = replace(parse_flags(argv, shape), resume=False)
        config.init_revision = checkpoint.hub_commit(config.init_from, config.init_revision)
        raise_if_changed(shape, config.model, NOT_IN_WEIGHTS, config.init_from)
    if config.teacher and not config.resume:  # the teacher's folder may have a newer checkpoint by the time this run resumes
        config.teacher = ",".join(str(checkpoint.checkpoint_file(path) or path) for path in config.teachers)
    return config


# also of nanoGPT and Hugging Face, whose large models are in parts. A folder named models is none of them
OURS_OR_A_MODEL = ("run.json", "log.txt", "config.json", "ckpt.pt", "model_*.pt", "model_*.json", "model*.safetensors")


def holds_a_run(out_dir: Path, *, besides: str = "") -> bool:
    """Whether a run in this folder would overwrite a run or a model. besides: a file that doesn't count."""
    return any(path.is_file() for pattern in OURS_OR_A_MODEL if pattern != besides for path in out_dir.glob(pattern))


def raise_if_taken(out_dir: Path, half_fetched: bool = False):
    """ValueError if a new run in this folder would overwrite a run or a model. half_fetched: an interrupted fetch may have left its log."""
    if holds_a_run(out_dir, besides="log.txt" if half_fetched else ""):
        remedy = "" if half_fetched else "add --resume to continue it, or "
        raise ValueError(f"{out_dir} holds a run or a model already: {remedy}choose another --out-dir")


def out_dir_of(argv: list[str] | None = None) -> Path:
    """Returns the run's folder, even if other flags are wrong."""
    try:
        first, _ = tyro.cli(PresetFlag, args=argv, return_unknown_args=True, add_help=False)
    except SystemExit:  # --preset without a value
        named = re.search(r"--out[-_]dir[= ](\S+)", " ".join(sys.argv[1:] if argv is None else argv))
        return Path(named[1] if named else TrainConfig.out_dir)
    return Path(first.out_dir or PRESETS.get(first.preset, PRESETS["gpt2"]).out_dir)


def parse_flags(argv: list[str] | None = None, model: VariantConfig | None = None) -> TrainConfig:
    """Returns the settings: flags override the preset, and the model's shape if one is passed."""
    first, _ = tyro.cli(PresetFlag, args=argv, return_unknown_args=True, add_help=False)
    preset = PRESETS.get(first.preset, PRESETS["gpt2"])  # the full parser rejects a wrong name
    return cli.parse(TrainConfig, argv, replace(preset, model=model or preset.model), "train.py")


def recorded_teachers(given: str, recorded: str) -> str:
    """Returns --teacher with each folder replaced by the checkpoint that the run recorded, if it is there."""
    ours, theirs = given.split(","), recorded.split(",")
    if len(ours) != len(theirs):
        return given
    return ",".join(recorded_teacher(*pair) for pair in zip(ours, theirs, strict=True))


def recorded_teacher(given: str, recorded: str) -> str:
    """Returns the recorded teacher if `given` is it or the folder it is in. Otherwise `given`, or the checkpoint of the same name in
    that folder. The run recorded one checkpoint of the folder."""
    if not (given and recorded):
        return given
    if Path(given) in (Path(recorded), Path(recorded).parent):
        return recorded
    moved = Path(given, Path(recorded).name)
    return str(moved) if moved.is_file() else given


def raise_if_changed(before, now, allowed: set[str], source: str, remedy: str = "leave its flag out"):
    """Raises one ValueError for all fields that differ and are not allowed to."""
    old, new = ({**vars(config), **vars(getattr(config, "model", config))} for config in (before, now))
    changed = [name for name in old if name not in allowed | {"model"} and old[name] != new[name]]
    raise_errors([f"{name} {new[name]!r} does not fit {source}, which has {old[name]!r}: {remedy}" for name in changed])


def warnings(config: TrainConfig) -> list[str]:
    """Settings that are valid, but probably not intended, such as flags without effect. One line each."""
    lines = []
    if config.warmup_steps >= config.max_steps:
        lines.append(f"--warmup-steps {config.warmup_steps} is not below --max-steps: the learning rate never reaches --max-lr")
    if config.min_lr_ratio > 1:
        lines.append(f"--min-lr-ratio {config.min_lr_ratio} is above 1: the learning rate rises until the end")
    if config.init_revision and not config.init_from:
        lines.append("--init-revision has no effect without --init-from")
    usual = PRESETS[config.preset]
    ours, theirs = ({**vars(c), **vars(c.model)} for c in (config, usual))
    differ = [name for name in ours if ours[name] != theirs[name]]
    idle = {
        "--optimizer muon": [] if config.optimizer == "muon" else ["muon_lr", "muon_momentum", "muon_beta2"],
        "--schedule wsd": [] if config.schedule == "wsd" else ["decay_ratio"],
        "--eval-every": [] if config.eval_every else ["eval_tasks", "eval_limit"],
        "--teacher": [] if config.teacher else ["teacher_weight"],
        "--n-expert": [] if config.model.n_expert > 1 or config.init_from else ["load_balance"],  # the weights may have set it
        "--plan": ["gpu", "gpus", "rate", *["price"] * (not config.rehearse)],  # --plan returns before this
    }
    for other, names in idle.items():
        lines += [f"{cli.flag(name)} has no effect without {other}" for name in names if name in differ]
    return lines


def overridden_preset(config: TrainConfig, shape: VariantConfig) -> list[str]:
    """Names the flags of the preset's model that --init-from overrides, in one line. [] if there are none."""
    usual = vars(PRESETS[config.preset].model)
    names = [name for name, kept in vars(shape).items() if usual[name] != kept == getattr(config.model, name) and name != "vocab_size"]
    if not names or config.preset == TrainConfig.preset:
        return []
    return [f"--init-from {config.init_from} overrides --preset {config.preset}: {', '.join(map(cli.flag, names))}"]
