"""Measures an ensemble: the validation loss of the mean of several models' predictions.

    python -m lab.ensemble log/switches/modern

Models that differ only in seed make different mistakes, so their mean is better than each of them. To have its loss from one model,
train it with --teacher MODEL,MODEL.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

import checkpoint
from common import cli, device
from common.bucket_shards import open_shards
from common.tables import check_rich, table
from common.validation import raise_errors
from dataloader import TokenStream
from lab.finished import runs_in
from training.config import TrainConfig
from training.distillation import mean_prediction
from training.run_json import read_run


@dataclass
class EnsembleConfig:
    """Measure the validation loss of runs, and of the mean of their predictions."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of finished runs, or of a variant's seeds, with the same shards, sequence length and validation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""


def settings_of(folders: list[Path]) -> TrainConfig:
    """Returns the first run's settings. ValueError if there are fewer than two runs, or another one reads or validates something else."""
    if len(folders) < 2:
        raise ValueError("an ensemble needs at least two runs: pass their folders")
    configs = [read_run(folder) for folder in folders]
    first, *others = [vars(config) | vars(config.model) for config in configs]
    raise_errors(
        [
            f"{folder} has {cli.flag(name)} {other[name]}, {folders[0]} has {first[name]}: leave one of them out"
            for folder, other in zip(folders[1:], others, strict=True)
            for name in ("data_dir", "val_tokens", "seq_len", "vocab_size")
            if other[name] != first[name]
        ]
    )
    return configs[0]


@torch.no_grad()
def losses(folders: list[Path], on: torch.device) -> list[float]:
    """Returns the loss of each run's last model, and that of the mean of their predictions, in nats per token, on train.py's validation
    tokens."""
    config = settings_of(folders)
    models = [checkpoint.load_model(str(folder), on)[0] for folder in folders]
    stream = TokenStream(open_shards(config.data_dir), "val", config.model.seq_len, shuffle=False)
    available = stream.sequences_per_epoch
    count = max(1, min(available, config.val_tokens // config.model.seq_len))
    dtype, total = device.pick_dtype(config.dtype, on), torch.zeros(len(models) + 1, dtype=torch.float64)
    for i in cli.bar(range(count), desc="sequences", unit="seq"):
        x, y = (torch.from_numpy(rows).to(on) for rows in stream.batch([i * available // count]))
        with torch.autocast(on.type, dtype, enabled=dtype != torch.float32):
            each = [model(x)[0][0].float() for model in models]  # (T, V) each
        predictions = [*(F.log_softmax(logits, dim=-1) for logits in each), mean_prediction(each)]
        total += torch.tensor([F.nll_loss(p, y[0]).item() for p in predictions])
    return (total / count).tolist()


def main():
    with cli.one_line_errors():
        config = cli.parse(EnsembleConfig)
        check_rich()
        folders = [folder for word in config.runs for folder in runs_in(Path(word))[0]]
        found = losses(folders, device.pick_device(config.device))
        names = [*map(str, folders), "mean of their predictions"]
        print(table(["model", "val loss"], [[name, f"{loss:.4f}"] for name, loss in zip(names, found, strict=True)]))


if __name__ == "__main__":
    main()
