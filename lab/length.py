"""Sequences longer than in training: the loss at each position, of learned positions, rope and scaled rope."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
from common import picture
from common.bucket_shards import open_shards
from common.tables import table
from dataloader import TokenStream
from lab.runs import folder_of
from lab.suites import SUITES
from model import GPT
from variants import adapt, build


@torch.no_grad()
def loss_by_position(model: GPT, stream: TokenStream, sequences: int) -> torch.Tensor:
    """Returns the mean loss at each position (T,), in nats per token, over sequences spread evenly over the stream."""
    available, total = stream.sequences_per_epoch, 0.0
    for i in range(sequences):
        x, y = map(torch.from_numpy, stream.batch([i * available // sequences]))
        total = total + F.cross_entropy(model(x)[0][0].float(), y[0], reduction="none")
    return total / sequences


def stretched(folder: Path, times: int, scaling: str) -> GPT:
    """Returns a run's model for sequences `times` as long as in training.

    New rows of a learned position table keep their random initialization.
    """
    model = checkpoint.load_model(str(folder))[0]
    c = model.config
    longer = replace(c, seq_len=times * c.seq_len, rope_scaling=scaling, rope_factor=float(times) if scaling != "none" else 1.0)
    if c.pos == "rope":
        model = adapt(model, longer)
        return model
    other = build(longer).eval()
    table = other.state_dict()["transformer.wpe.weight"].clone()
    table[: c.seq_len] = model.transformer.wpe.weight
    other.load_state_dict(model.state_dict() | {"transformer.wpe.weight": table})
    return other


def extrapolate(out_dir: str, data_dir: str, seeds: list[int], times: int = 4, sequences: int = 64) -> list[dict]:
    """Measures loss by position up to `times` the training length: learned positions, plain rope, scaled rope."""
    curves = []
    learned, rope = SUITES["length"]
    for name, scaling in ((learned, "none"), (rope, "none"), (rope, "linear"), (rope, "ntk"), (rope, "yarn")):
        losses = []
        for seed in seeds:
            model = stretched(folder_of(out_dir, name, seed), times, scaling)
            stream = TokenStream(open_shards(data_dir), "val", model.config.seq_len, shuffle=False)
            losses.append(loss_by_position(model, stream, sequences))
        curves.append({"variant": name if scaling == "none" else f"{name}, {scaling}", "loss": torch.stack(losses).mean(0).tolist()})
    return curves


def show_curves(curves: list[dict], markdown: bool = False, parts: int = 4) -> str:
    """Returns a table: the mean loss in each of `parts` equal parts of the sequence."""
    length = len(curves[0]["loss"]) // parts
    slices = [slice(i * length, (i + 1) * length) for i in range(parts)]
    rows = [[curve["variant"], *(f"{statistics.fmean(curve['loss'][part]):.4f}" for part in slices)] for curve in curves]
    return table(["positions", *(f"{part.start} to {part.stop - 1}" for part in slices)], rows, markdown=markdown)


def plot_curves(curves: list[dict], trained: int, out: Path):
    """Plots the loss over the position, in means of 16."""
    with picture.picture(out, picture.NARROW, 4.8, f"Loss at each position, of models trained on {trained} positions") as figure:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            bins = torch.tensor(curve["loss"]).view(-1, 16).mean(1)
            axes.plot([16 * i + 8 for i in range(len(bins))], bins, **picture.look(number), label=picture.label_of(curve["variant"]))
        axes.axvline(trained, color=picture.GREY, linestyle="--", label="length in training")
        axes.set(xlabel="position in the sequence", ylabel="nats per token, mean of 16 positions")
        picture.number_axis(axes.xaxis)
        picture.legend_below(figure)
