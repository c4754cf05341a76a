"""Measures speed and memory: training, generation, scoring, tokenizing, loading and saving, each beside a peer.

    python -m lab.bench                                          # GPT-2 (124M) on the best device here
    python -m lab.bench --what train --micro-batch-size 4        # only the training step
    python -m lab.bench --device cuda --micro-batch-size 32 --json > bench.json

The peers are what you would use instead: Hugging Face transformers (compiled too, with the same fused AdamW), tiktoken on one document
at a time, a whole shard read into memory, torch.save. Each side runs in its own process, which gives its own peak memory. The sides
take turns, so a machine whose speed drifts treats both alike. A ratio is the median over the rounds.
"""

import hashlib
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import fineweb
import hellaswag
import train
from common import cli
from common import device as hardware
from common import tokenizer as tokenizers
from common.distributed import DistContext
from common.files import write_json
from common.run_folder import RunFolder
from common.shards import find_shards, write_shard
from common.tables import table
from common.validation import raise_errors
from dataloader import TokenStream
from model import GPT
from ops import choice
from sample import generate
from training.config import TrainConfig
from training.log import Log
from training.run_json import git_commit
from training.saving import Checkpoints
from training.trainer import Trainer
from variants import VariantConfig, build, set_precision


@dataclass
class BenchConfig:
    """Time this repository beside its peers."""

    what: tuple[Literal["train", "recompute", "generate", "score", "tokenize", "load", "save"], ...] = (
        "train", "recompute", "generate", "score", "tokenize", "load", "save"
    )  # fmt: skip
    """What to time. recompute: training in less memory, beside our training that keeps all activations."""
    model: tyro.conf.OmitArgPrefixes[VariantConfig] = field(default_factory=VariantConfig)
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    """Precision of the matrix products. int8: our generation has 8-bit weights; transformers has fp32, or auto on CUDA."""
    compile: bool = True
    """torch.compile the training step of both sides, and our generation."""
    rounds: int = 5
    """Timed rounds of each side, after two to warm up."""
    micro_batch_size: int = 1
    """Training: sequences per pass through the model."""
    passes: int = 1
    """Training: passes per step. Their gradients are accumulated."""
    activation_memory: float = 0.9
    """recompute: the fraction of activations to keep, as in train.py. Without --compile it keeps none."""
    new_tokens: int = 128
    """Tokens to generate greedily, after a prompt of 16 tokens."""
    num_samples: int = 1
    """Sequences to generate at a time."""
    tasks: int = 16
    """HellaSwag tasks to score, completion style."""
    hellaswag_file: str = hellaswag.HellaSwagConfig.file
    """Their file. The tasks are spread evenly over it."""
    dataset: tuple[str, ...] = ("stdlib",)
    """Text to tokenize: what fineweb.py takes as --dataset."""
    megabytes: int = 30
    """Megabytes of text to tokenize."""
    shard_tokens: int = 100_000_000
    """Tokens in the shard to load."""
    markdown: bool = False
    """Print tables as Markdown."""
    json: bool = False
    """Print JSON instead of a table."""

    @property
    def step_tokens(self) -> int:
        return self.micro_batch_size * self.model.seq_len * self.passes


# ---- the two sides of each task ----
# A side sets up and returns a function that does one round. It returns the amount of work and its answer. If the answer takes
# time that should not count, it returns a function for it.


class Bench:
    """Settings and inputs that both sides share."""

    def __init__(self, config: BenchConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = hardware.pick_device(config.device)
        self.dtype = hardware.pick_dtype(config.dtype, self.device)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def shards(self):
        return find_shards(self.folder / "shards")


def trainer_of(bench: Bench, activation_memory: float = 1.0) -> Trainer:
    config = bench.config
    settings = TrainConfig(
        model=config.model, data_dir=str(bench.folder / "shards"), out_dir=str(bench.folder / "run"), total_batch_tokens=config.step_tokens,
        micro_batch_size=config.micro_batch_size, device=config.device, dtype=config.dtype, compile=config.compile,
        activation_memory=activation_memory, warmup_steps=0, max_lr=1e-4, keep=1,
    )  # fmt: skip
    world = DistContext(bench.device)
    return train.set_up(settings, world, RunFolder(bench.folder / "run"))[1]


def train_ours(bench: Bench, activation_memory: float = 1.0):
    trainer = trainer_of(bench, activation_memory)
    return lambda number: (bench.config.step_tokens, trainer.update(number).loss)


def train_in_less_memory(bench: Bench):
    compiled = bench.config.compile and hardware.can_compile(bench.device)
    return train_ours(bench, bench.config.activation_memory if compiled else 0)


def train_peer(bench: Bench):
    B, passes = bench.config.micro_batch_size, bench.config.passes
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as in Trainer
    model = hugging_face(bench.config.model).to(bench.device)
    forward = torch.compile(model) if bench.config.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = TokenStream(bench.shards(), "train", bench.config.model.seq_len)

    def step(number):
        for first in range(number * passes * B, (number + 1) * passes * B, B):
            x = torch.from_numpy(stream.batch(range(first, first + B))[0]).to(bench.device)
            with bench.autocast():
                loss = forward(input_ids=x, labels=x, use_cache=False).loss / passes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return bench.config.step_tokens, loss.item()

    return step


def hugging_face(config: VariantConfig):
    """Returns a transformers model of the same shape, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.seq_len, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def generate_ours(bench: Bench):
    config = bench.config
    model = GPT.from_pretrained(str(bench.folder / "model")).to(bench.device).eval()
    set_precision(model, config.dtype)
    idx = prompt(config).to(bench.device)
    compiled = config.compile and hardware.can_compile(bench.device)

    def run(number):
        ids = generate(model, idx, config.new_tokens, temperature=0, compile=compiled)
        return config.num_samples * config.new_tokens, ids.tolist()

    return run


def generate_peer(bench: Bench):
    from transformers import GPT2LMHeadModel

    config = bench.config
    model = GPT2LMHeadModel.from_pretrained(bench.folder / "model", dtype=bench.dtype).to(bench.device).eval()
    idx = prompt(config).to(bench.device)
    options = dict(do_sample=False, use_cache=True, min_new_tokens=config.new_tokens, max_new_tokens=config.new_tokens, pad_token_id=0)

    def run(number):
        with torch.no_grad():
            ids = model.generate(idx, attention_mask=torch.ones_like(idx), **options)
        return config.num_samples * config.new_tokens, ids.tolist()

    return run


def prompt(config: BenchConfig) -> torch.Tensor:
    return torch.arange(config.num_samples * 16).view(config.num_samples, 16) % config.model.vocab_size


def score_ours(bench: Bench):
    model = GPT.from_pretrained(str(bench.folder / "model")).to(bench.device).eval()
    tasks, tokenizer, world = bench_tasks(bench), tokenizers.get_tokenizer("gpt2"), DistContext(bench.device, rank=0)

    def run(number):
        scored = hellaswag.evaluate(model, tokenizer, tasks, world, autocast=bench.autocast(), styles=("completion",))[1]
        return len(tasks), [task["completion"]["pred_norm"] for task in scored]

    return run


def score_peer(bench: Bench):
    """Scores one task at a time: four padded rows, all their logits, the mean loss of each ending."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(bench.folder / "model").to(bench.device).eval()
    tasks, tokenizer = bench_tasks(bench), tokenizers.get_tokenizer("gpt2")

    @torch.no_grad()
    def answer(task):
        rows = hellaswag.completion_rows(task, tokenizer)
        ids = torch.zeros(4, max(len(row.ids) for row in rows), dtype=torch.long)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            scored[i, len(row.ids) - row.scored : len(row.ids)] = True
        ids, scored = ids.to(bench.device), scored.to(bench.device)
        with bench.autocast():
            logits = model(ids).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(4, -1)
        return ((losses * scored[:, 1:]).sum(1) / scored[:, 1:].sum(1)).argmin().item()

    return lambda number: (len(tasks), [answer(task) for task in tasks])


def bench_tasks(bench: Bench) -> list[dict]:
    tasks = hellaswag.load_tasks(bench.config.hellaswag_file)
    return tasks[:: max(1, len(tasks) // bench.config.tasks)][: bench.config.tasks]


def tokenize_ours(bench: Bench):
    def run(number):
        out = bench.folder / f"ours{number}"
        fineweb.prepare(fineweb.PrepareConfig(dataset=(str(bench.folder / "text.parquet"),), out_dir=str(out)))
        return bench.config.megabytes, lambda: hash_tokens(out)

    return run


def tokenize_peer(bench: Bench):
    """Tokenizes one document at a time with tiktoken, in one process."""
    import pyarrow.parquet
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")

    def run(number):
        out = bench.folder / f"peer{number}"
        out.mkdir()
        texts = pyarrow.parquet.read_table(bench.folder / "text.parquet").column("text").to_pylist()
        rows = [np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16) for text in texts]
        np.save(out / "text_train_000000.npy", np.concatenate(rows))
        return bench.config.megabytes, lambda: hash_tokens(out)

    return run


def hash_tokens(folder: Path) -> str:
    """Returns the sha256 of all tokens in a folder of shards, in order."""
    tokens = [np.load(path) for path in sorted(folder.glob("*.npy"), key=lambda path: path.stem[-6:])]
    return hashlib.sha256(np.concatenate(tokens).tobytes()).hexdigest()


def load_ours(bench: Bench):
    def run(number):
        batch = TokenStream(bench.shards(), "train", bench.config.model.seq_len, shuffle=False).batch(range(4))
        return 1, batch[0].sum().item()

    return run


def load_peer(bench: Bench):
    """Loads like build-nanogpt: the whole shard, as int64."""

    def run(number):
        tokens = torch.from_numpy(np.load(bench.folder / "shards" / "bench_train_000001.npy").astype(np.int64))
        return 1, tokens[: 4 * bench.config.model.seq_len].view(4, -1).sum().item()

    return run


def save_ours(bench: Bench):
    """Times how long a checkpoint blocks training: on an accelerator for the copy, on a CPU until it is on the disk."""
    trainer = trainer_of(bench)
    trainer.update(0)
    folder = RunFolder(bench.folder / "run")
    folder.path.mkdir()
    checkpoints = Checkpoints(trainer, folder, Log(trainer.config, trainer.world, folder))

    def run(number):
        checkpoints.save(number, None)
        return saved_megabytes(trainer), checkpoints.saver.finish

    return run


def save_peer(bench: Bench):
    """Saves the same tensors with torch.save: no checksum, no wait for the disk."""
    trainer = trainer_of(bench)
    trainer.update(0)

    def run(number):
        torch.save({"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, bench.folder / "peer.pt")
        return saved_megabytes(trainer), None

    return run


def saved_megabytes(trainer: Trainer) -> float:
    return 12 * trainer.model.num_params() / 1e6  # weights and AdamW's two moments, in fp32


# unit, our side, the peer, the peer's name, whether both must give the same answers
WORK = {
    "train": ("tokens/s", train_ours, train_peer, "transformers", False),
    "recompute": ("tokens/s", train_in_less_memory, train_ours, "all kept", False),
    "generate": ("tokens/s", generate_ours, generate_peer, "transformers", True),
    "score": ("tasks/s", score_ours, score_peer, "transformers", True),
    "tokenize": ("MB/s", tokenize_ours, tokenize_peer, "tiktoken", True),
    "load": ("1/s", load_ours, load_peer, "read whole", True),
    "save": ("MB/s", save_ours, save_peer, "torch.save", False),
}
WARMUP = 2  # rounds to warm up: the first compiles, the second fills the allocator's caches


# ---- the rounds ----


def side(connection, setup, config: BenchConfig, folder: Path):
    """Runs one side in its process. Sets up, then answers each round's number with (amount, seconds, answer, bytes, ways)."""
    sys.stdout = sys.stderr  # only the table goes to stdout
    before = hardware.peak_memory(torch.device("cpu"))
    bench = Bench(config, folder)
    torch.manual_seed(0)
    try:
        work = setup(bench)
        while (number := connection.recv()) is not None:
            began = time.perf_counter()
            amount, answer = work(number)
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            grown = hardware.peak_memory(bench.device) - (before if bench.device.type != "cuda" else 0)
            connection.send((amount, seconds, answer() if callable(answer) else answer, grown, choice.chosen))
    except Exception as e:
        connection.send(e)


class Side:
    """Starts a side's process and asks it for rounds."""

    def __init__(self, setup, config: BenchConfig, folder: Path):
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=side, args=(theirs, setup, config, folder), daemon=True)
        self.process.start()
        theirs.close()  # recv then raises EOFError if the process dies

    def round(self, number: int):
        try:
            self.connection.send(number)
            result = self.connection.recv()
        except (EOFError, ConnectionError):
            raise ValueError("a benchmark process was killed, probably out of memory: try a smaller model or batch") from None
        if isinstance(result, Exception):
            raise result
        return result

    def end(self):
        self.connection.send(None)
        self.process.join()


def compare(what: str, config: BenchConfig, folder: Path) -> dict:
    """Times both sides in turns and returns a row of the table. The side that goes first alternates."""
    unit, ours, peer, name, same_answers = WORK[what]
    sides = [Side(ours, config, folder), Side(peer, config, folder)]
    rounds = []
    for number in range(WARMUP + config.rounds):
        both = [None, None]
        for i in (0, 1) if number % 2 else (1, 0):
            both[i] = sides[i].round(number)
        rounds.append(both)
    for s in sides:
        s.end()
    rates = [[amount / seconds for amount, seconds, *_ in both] for both in rounds[WARMUP:]]
    row = {
        "work": what,
        "unit": unit,
        "ours": statistics.median(rate for rate, _ in rates),
        "peer": statistics.median(rate for _, rate in rates),
        "peer_name": name,
        "ratio": statistics.median(a / b for a, b in rates),
        "rounds": rates,
        "memory_ours": rounds[-1][0][3],
        "memory_peer": rounds[-1][1][3],
        "ways": rounds[-1][0][4] | {name: way for name in choice.WAYS if (way := choice.forced(name))},
    }
    if same_answers and config.dtype != "int8":
        row["same_answers"] = rounds[-1][0][2] == rounds[-1][1][2]
    return row


def make_inputs(config: BenchConfig, folder: Path):
    """Writes random shards, a random model and real text. The weights are large, so that no two logits tie."""
    rng = np.random.default_rng(0)
    if {"train", "recompute", "load", "save"} & set(config.what):
        size = config.shard_tokens if "load" in config.what else 2_000_000
        (folder / "shards").mkdir()
        entries = []
        for i, n in enumerate((10 * config.model.seq_len, max(size, 10 * config.micro_batch_size * config.model.seq_len))):
            tokens = rng.integers(0, config.model.vocab_size, n, dtype=np.uint16)
            entries.append(write_shard(folder / "shards" / f"bench_{'train' if i else 'val'}_{i:06d}.npy", tokens))
        write_json(folder / "shards" / "manifest.json", {"tokenizer": "gpt2", "vocab_size": config.model.vocab_size, "shards": entries})
    if {"generate", "score"} & set(config.what):
        torch.manual_seed(0)
        model = build(config.model)
        for p in model.parameters():
            if p.dim() >= 2:
                torch.nn.init.normal_(p, std=0.05)
        model.save_pretrained(str(folder / "model"))
    if "tokenize" in config.what:
        import pyarrow
        import pyarrow.parquet

        texts, size = [], 0
        for text in fineweb.open_documents(fineweb.PrepareConfig(dataset=config.dataset), ""):
            texts.append(text)
            size += len(text.encode())
            if size >= config.megabytes * 1e6:
                break
        if size < config.megabytes * 1e6:
            raise ValueError(f"--dataset has only {size / 1e6:.0f} MB: lower --megabytes")
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")


def environment(config: BenchConfig) -> dict:
    device = hardware.pick_device(config.device)
    return {
        "command": sys.argv,
        "commit": git_commit(),
        "machine": hardware.describe(device),
        "threads": torch.get_num_threads(),
        "dtype": config.dtype if config.dtype == "int8" else str(hardware.pick_dtype(config.dtype, device))[6:],
        **measured_rates(device, config.dtype),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tiktoken")},
    }


def measured_rates(device: torch.device, dtype: str) -> dict[str, str]:
    """Returns the limits to compare with: how fast this machine multiplies matrices of a training step, and reads memory."""
    kind = hardware.pick_dtype(dtype, device)
    torch.set_float32_matmul_precision("high")
    m, k, n = (65536, 768, 3072) if device.type == "cuda" else (1024, 768, 3072)
    x, w = torch.ones(m, k, device=device, dtype=kind), torch.ones(n, k, device=device, dtype=kind)
    numbers = torch.ones(2**26, device=device)  # more than a cache holds
    multiply, read = best_time(lambda: F.linear(x, w), device), best_time(numbers.sum, device)
    return {"matrix products": f"{2 * m * k * n / multiply / 1e9:,.0f} GFLOP/s", "memory": f"{numbers.nbytes / read / 1e9:,.0f} GB/s"}


def best_time(work, device: torch.device) -> float:
    """Returns the shortest of ten times in seconds."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def show_rows(rows: list[dict], markdown: bool) -> str:
    """Returns a table with a line per task."""
    lines = []
    for row in rows:
        note = {True: "the same answers", False: "OTHER ANSWERS", None: ""}[row.get("same_answers")]
        note = ", ".join(filter(None, (note, *(f"{name}: {way}" for name, way in row.get("ways", {}).items()))))
        memory = (f"{row[side] / 1e9:.2f} GB" for side in ("memory_ours", "memory_peer"))
        speeds = f"{row['ours']:,.1f} {row['unit']}", f"{row['peer']:,.1f} ({row['peer_name']})", f"{row['ratio']:.2f} ×"
        lines.append([row["work"], *speeds, *memory, note])
    return table(["work", "ours", "peer", "ratio", "memory, ours", "memory, peer", "note"], lines, [1, 2, 6], markdown)


def errors_of(config: BenchConfig) -> list[str]:
    errors = config.model.errors()
    counts = "rounds", "micro_batch_size", "passes", "new_tokens", "num_samples", "tasks", "megabytes", "shard_tokens"
    errors += cli.at_least(1, config, *counts)
    if not 0 <= config.activation_memory <= 1:
        errors.append(f"--activation-memory is {config.activation_memory}: it must be from 0 to 1")
    if not config.what:
        errors.append("--what has no value: choose from " + ", ".join(WORK))
    if "generate" in config.what and 16 + config.new_tokens > config.model.seq_len:
        errors.append(f"a prompt of 16 and --new-tokens {config.new_tokens} exceed --seq-len {config.model.seq_len}: lower --new-tokens")
    if config.dtype == "int8" and set(config.what) != {"generate"}:
        errors.append("--dtype int8 is for generation only: add --what generate")
    if not 50257 <= config.model.vocab_size <= 65536:
        errors.append(f"--vocab-size is {config.model.vocab_size}: it must be from 50257 (GPT-2) to 65536 (a shard's limit)")
    if (on := config.model.switches_on()) and {"train", "generate", "score"} & {*config.what}:
        flags = ", ".join(map(cli.flag, on))
        errors.append(f"the peer of train, generate and score is plain GPT-2: leave out {flags}, or pass --what recompute load save")
    if find_spec("transformers") is None:
        errors.append("the peers are not installed: pip install -r requirements-dev.txt")
    return errors


def main():
    with cli.one_line_errors():
        config = cli.parse(BenchConfig)
        raise_errors(errors_of(config))
        machine = environment(config)
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(config, Path(folder))
            rows = [compare(what, config, Path(folder)) for what in config.what]
        if config.json:
            print(json.dumps({**machine, "rows": rows}, indent=1))
        else:
            print(show_rows(rows, config.markdown))
            print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items() if key != "command"))


if __name__ == "__main__":
    main()
