"""Measures an ensemble: the validation loss of the mean of several models' predictions.

    python -m lab.ensemble log/compare/modern

Models that differ only in seed make different mistakes, so their mean is usually better than each of them. To get close to it with one
model, train that with --teacher MODEL,MODEL.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

import checkpoint
from common import cli, device
from common.bucket_shards import open_shards
from common.shards import differences
from common.tables import check_rich, table
from common.validation import raise_errors
from lab.finished import runs_in
from lab.origins import data_notes
from perplexity import rows_of_shards
from training.config import TrainConfig
from training.distillation import mean_prediction
from training.run_json import RUN, read_run, read_run_json


@dataclass
class EnsembleConfig:
    """Measure the validation loss of runs, and of the mean of their predictions."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of finished runs, or of a variant's seeds, with the same shards, sequence length and validation."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def settings_of(folders: list[Path]) -> TrainConfig:
    """Returns the first run's settings. ValueError if there are fewer than two runs, or another one reads or validates something else."""
    if len(folders) < 2:
        raise ValueError("an ensemble needs at least two runs: pass their folders")
    configs = [read_run(folder) for folder in folders]
    settings = [vars(config) | vars(config.model) for config in configs]
    data = [read_run_json(folder / RUN)["data"] for folder in folders]
    errors = data_notes(folders)
    for folder, ours, theirs in zip(folders[1:], settings[1:], data[1:], strict=True):
        if why := differences(data[0], theirs):
            errors.append(f"{folder} was trained on other data than {folders[0]} ({cli.some(why, 3)}): leave one of them out")
        for name in ("val_tokens", "seq_len", "vocab_size"):
            if ours[name] != settings[0][name]:
                errors.append(f"{folder} has {cli.flag(name)} {ours[name]}, {folders[0]} has {settings[0][name]}: leave one of them out")
    raise_errors(errors)
    return configs[0]


@torch.no_grad()
def losses(folders: list[Path], on: torch.device) -> list[float]:
    """Returns the loss of each run's last model, and that of the mean of their predictions, in nats per token, on train.py's validation
    tokens."""
    config = settings_of(folders)
    models = [checkpoint.load_model(str(folder), on)[0] for folder in folders]
    rows, tokens = rows_of_shards(open_shards(config.data_dir), config.model.seq_len, config.val_tokens)
    dtype, total = device.pick_dtype(config.dtype, on), torch.zeros(len(models) + 1, dtype=torch.float64)
    for ids, _ in cli.bar(rows, total=tokens // config.model.seq_len, desc="sequences", unit="seq"):
        row = torch.tensor(ids, device=on)  # (T + 1,)
        with torch.autocast(on.type, dtype, enabled=dtype != torch.float32):
            each = [model(row[None, :-1])[0][0].float() for model in models]  # (T, V) each
        predictions = [*(F.log_softmax(logits, dim=-1) for logits in each), mean_prediction(each)]
        total += torch.tensor([F.nll_loss(p, row[1:], reduction="sum").item() for p in predictions])
    return (total / tokens).tolist()


def main():
    with cli.one_line_errors():
        config = cli.parse(EnsembleConfig)
        check_rich()
        found = [folder for word in config.runs for folder in runs_in(Path(word))[0]]
        folders = [*{folder.resolve(): folder for folder in found}.values()]  # each once
        found = losses(folders, device.pick_device(config.device))
        names = [*map(str, folders), "mean of their predictions"]
        print(table(["model", "val loss"], [[name, f"{loss:.4f}"] for name, loss in zip(names, found, strict=True)]))


if __name__ == "__main__":
    main()
