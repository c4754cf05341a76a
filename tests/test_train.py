"""train.py: the same losses for any world size and micro batch, exact resume, and one line for every mistake."""

import fcntl
import itertools
import json
import os
import pkgutil
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, Forked, forked, read_stream, run_main, run_train, script, write_shards
from test_hellaswag import make_tasks
from test_model import random_hf
from torch.optim import AdamW

import checkpoint
import hellaswag
import sample
import train
from common import cli, device
from common.distributed import DistContext
from common.run_folder import RunFolder
from common.shards import find_shards
from dataloader import TokenStream
from tasks import scoring
from training import checks, distillation, evaluation
from training.config import TrainConfig
from training.flags import overridden_preset, parse_config, parse_flags, warnings
from training.optimizer import schedule
from training.presets import PRESETS
from training.run_json import read_run
from variants import VariantConfig, build, build_on_meta


def final_weights(out_dir, step=20) -> dict:
    return torch.load(out_dir / f"model_{step:05d}.pt", weights_only=True)["model"]


def assert_same_weights(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- a run's files ----


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """The folder of an uninterrupted run of 20 steps."""
    out_dir = tmp_path_factory.mktemp("runs") / "finished"
    torch.set_num_threads(1)
    assert run_train(shards, out_dir, "--checkpoint-every", 5, "--keep", 2) == 0
    return out_dir


def test_run_writes_log_metrics_checkpoints_and_plot(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "run.json", "log.txt", "metrics.jsonl", "log_plot.png",
        *(path.name for step in (15, 20) for path in checkpoint.files_of(finished, step)),
    }  # fmt: skip
    losses = {int(step): float(value) for step, value in read_stream(finished, "train").items()}
    assert list(losses) == list(range(20)) and losses[19] < losses[0] - 1
    assert list(read_stream(finished, "val")) == [0, 10, 20]
    content = torch.load(finished / "model_00020.pt", weights_only=True)
    assert content["step"] == 20 and content["tokenizer"] == "bytes" and content["config"]["vocab_size"] == 257
    assert f"{content['val_loss']:.6f}" == read_stream(finished, "val")[20]
    params = json.loads((finished / "run.json").read_text())["params"]
    assert params == checkpoint.load_model(str(finished))[0].num_params()


def test_metrics_jsonl_has_everything(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 7 and "loss" in row)
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "tokens", "seconds", "epoch"} < set(row)
    assert f"{row['loss']:.6f}" == read_stream(finished, "train")[7]
    assert row["tokens"] == 7 * 256 and row["mfu"] is None and row["memory_bytes"] > 10**7
    assert row["lr"] == 3e-3 * schedule("cosine", 7, 20, 3, 0.1, 0.2)
    assert row["epoch"] == pytest.approx(7 * 256 / (8020 // 32 * 32))


def test_same_settings_give_the_same_run(finished, shards, tmp_path):
    run = json.loads((finished / "run.json").read_text())
    assert run["config"]["model"]["n_embd"] == 32 and run["config"]["resume"] is False
    launch = run["launches"][0]
    assert launch["torch"] == torch.__version__ and launch["world_size"] == 1 and len(run["launches"]) == 1
    assert run_train(shards, tmp_path / "again", "--checkpoint-every", 5) == 0
    assert read_stream(tmp_path / "again", "train") == read_stream(finished, "train")
    assert_same_weights(final_weights(tmp_path / "again"), final_weights(finished))


@pytest.mark.parametrize(("columns", "last"), [(150, r"norm [\d.]+"), (80, r"[\d,]+ tok/s( \| lr \S+)?"), (40, r"loss [\d.]+")])
def test_progress_is_a_bar_on_a_terminal(shards, tmp_path, monkeypatch, capsys, columns, last):
    controller, terminal = os.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert not cli.on_a_screen()  # a terminal of unknown size can't show a bar
        termios.tcsetwinsize(terminal, (24, columns))
        assert cli.on_a_screen()
        assert run_train(shards, tmp_path / "run") == 0
        seen = b""
        while select.select([controller], [], [], 0.1)[0]:  # a terminal passes text on in pieces
            seen += os.read(controller, 10**6)
    seen = seen.decode()
    assert re.search(rf"\r█{{10}}\| .*{last}\r\nfinished: ", seen), seen
    assert max(len(line) for line in re.split(r"[\r\n]", seen) if "| step" in line or "█" in line) <= columns
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step 0", "step 10", "step 20"]


def test_results_on_stdout_and_progress_on_stderr(shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(step \d+: val loss \d\.\d{4}\n){3}", out)
    line = r"step 19/20 \| loss \d\.\d{4} \| eta 0:00:00 \| [\d,]+ tok/s \| lr \S+ \| norm \d+\.\d\d\n"
    assert re.search(line, err)


# ---- formulas ----


def test_update_matches_the_plain_formula(finished, shards):
    """Three steps by hand: the whole batch in one pass, PyTorch's unfused AdamW, clipping written out."""
    torch.manual_seed(1337)
    model = build(VariantConfig(257, 32, 2, 2, 32))
    stream = TokenStream(find_shards(shards), "train", 32)
    decay = {p for p in model.parameters() if p.dim() >= 2}
    groups = [{"params": [p for p in model.parameters() if (p in decay) == d], "weight_decay": 0.1 * d} for d in (True, False)]
    optimizer = AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for step in range(3):
        x, y = map(torch.from_numpy, stream.batch(range(8 * step, 8 * step + 8)))
        loss = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        assert float(read_stream(finished, "train")[step]) == pytest.approx(loss.item(), abs=2e-6)
        optimizer.zero_grad()
        loss.backward()
        norm = sum((p.grad**2).sum() for p in model.parameters()) ** 0.5
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (step + 1) / 3
        optimizer.step()


def test_validation_averages_evenly_spread_sequences(finished, shards):
    """20 of the val shard's 31 sequences: 0, 1, 3, 4, 6, …"""
    torch.manual_seed(1337)
    model = build(VariantConfig(257, 32, 2, 2, 32))
    stream = TokenStream(find_shards(shards), "val", 32, shuffle=False)
    starts = [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]
    rows = torch.stack([torch.from_numpy(stream.read(32 * start, 33)) for start in starts])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
    assert float(read_stream(finished, "val")[0]) == pytest.approx(loss.item(), abs=2e-6)


# ---- any world size and micro batch ----


@pytest.fixture(scope="module")
def fifty_steps(shards, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("fifty") / "run"
    torch.set_num_threads(1)
    assert run_train(shards, out_dir, "--max-steps", 50, "--micro-batch-size", 8) == 0
    return out_dir


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 1), (1, 2), (1, 4), (2, 4), (4, 1)])
def test_losses_agree_across_world_sizes_and_micro_batches(fifty_steps, shards, tmp_path, processes, micro_batch):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--max-steps", 50, "--micro-batch-size", micro_batch]
    if processes == 1:
        assert run_main(train.main, *argv) == 0
    else:
        result = forked(tmp_path, "train", *argv, processes=processes)
        assert result.returncode == 0, result.stderr
    for stream, count in (("train", 50), ("val", 6)):
        losses, expected = read_stream(tmp_path / "run", stream), read_stream(fifty_steps, stream)
        assert losses.keys() == expected.keys() and len(losses) == count
        assert max(abs(float(losses[step]) - float(expected[step])) for step in losses) <= 1e-5


# ---- teachers and variants ----


@pytest.fixture(scope="module")
def teacher(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run_train(shards, folder, "--n-embd", 64, "--max-steps", 40, "--val-every", 0) == 0
    return folder


@pytest.fixture(scope="module")
def two_teachers(teacher, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "small"
    assert run_train(shards, folder, "--n-layer", 1, "--max-steps", 40, "--val-every", 0) == 0
    return f"{teacher},{folder}"


@pytest.mark.parametrize(("teachers", "max_logits"), [("teacher", 2**26), ("teacher", 3000), ("two_teachers", 3000)])
def test_distillation_matches_the_plain_formula(teachers, shards, tmp_path, monkeypatch, request, max_logits):
    """(1 - w) · cross entropy + w · KL(mean of the teachers ‖ student), Hinton et al., 2015, also when the logits are computed part by
    part. The log has the cross entropy alone."""
    teachers = str(request.getfixturevalue(teachers))
    monkeypatch.setattr("ops.loss.MAX_LOGITS", max_logits)
    rows, divergence_of = [], distillation.divergence
    monkeypatch.setattr(distillation, "divergence", lambda logits, expected: rows.append(logits.numel()) or divergence_of(logits, expected))
    argv = ["--teacher", teachers, "--teacher-weight", 0.7, "--max-steps", 1, "--warmup-steps", 0, "--grad-clip", 0]
    assert run_train(shards, tmp_path / "run", *argv) == 0
    torch.manual_seed(1337)
    student, experts = build(VariantConfig(257, 32, 2, 2, 32)), [checkpoint.load_model(path)[0] for path in teachers.split(",")]
    x, y = map(torch.from_numpy, TokenStream(find_shards(shards), "train", 32).batch(range(8)))
    log_p, q = student(x)[0].log_softmax(-1), sum(expert(x)[0].softmax(-1) for expert in experts) / len(experts)
    text = -log_p.gather(2, y[..., None]).mean()
    divergence = (q * (q.log() - log_p)).sum(-1).mean()
    (0.3 * text + 0.7 * divergence).backward()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert max(rows) <= max_logits and len(rows) > 1
    assert row["loss"] == pytest.approx(text.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(sum((p.grad**2).sum() for p in student.parameters()).item() ** 0.5, rel=1e-4)


def test_distillation_sums_the_parts_gradients_in_fp32(monkeypatch):
    """In bf16, many parts give the head as exact a gradient as one."""
    torch.manual_seed(1)
    student, expert = (build(VariantConfig(257, 64, 1, 2, 32)) for _ in range(2))
    x, y = torch.randint(257, (2, 16, 64))

    def gradient(parts: int, bf16: bool) -> torch.Tensor:
        monkeypatch.setattr("ops.loss.MAX_LOGITS", 257 * x.numel() // parts)
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, bf16), distillation.distillation_loss(student, [expert], x, 0.7):
            student(x, y)[1].backward()
        return student.lm_head.weight.grad.clone()

    exact = gradient(1, False)
    one, many = ((gradient(parts, True) - exact).norm() for parts in (1, 256))
    assert 0 < many < 1.2 * one


def test_teacher_stays_fixed_when_its_run_resumes(teacher, shards, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    assert run_train(shards, tmp_path / "run", "--teacher", tmp_path / "teacher") == 0
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "teacher", "--max-steps", 60) == 0
    assert run_main(train.main, "--replay-step", 15, "--out-dir", tmp_path / "run") == 0
    again = "--resume", "--out-dir", tmp_path / "run", "--max-steps", 21, "--teacher"
    assert run_main(train.main, *again, tmp_path / "teacher") == 0


def test_teacher_may_move_but_not_change(teacher, shards, tmp_path, capsys):
    shutil.copytree(teacher, tmp_path / "teacher")
    assert run_train(shards, tmp_path / "run", "--teacher", tmp_path / "teacher") == 0
    os.rename(tmp_path / "teacher", tmp_path / "moved")
    again = ["--resume", "--out-dir", tmp_path / "run", "--max-steps"]
    assert run_main(train.main, *again, 21) == 2 and "pass --teacher with" in capsys.readouterr().err
    assert run_main(train.main, *again, 21, "--teacher", tmp_path / "moved") == 0
    assert run_train(shards, tmp_path / "other", "--seed", 7) == 0  # another model, under the recorded path and name
    shutil.copy(tmp_path / "other" / "model_00020.pt", checkpoint.checkpoint_file(str(tmp_path / "moved")))
    [path.unlink() for path in (tmp_path / "moved").glob("*.json")]
    assert run_main(train.main, *again, 22) == 2 and "is not what this run began with" in capsys.readouterr().err
    assert run_main(train.main, *again, 22, "--teacher", teacher) == 0


def test_several_teachers_stay_the_same_on_resume(two_teachers, shards, tmp_path, capsys):
    large, small = two_teachers.split(",")
    assert run_train(shards, tmp_path / "run", "--teacher", two_teachers) == 0
    shutil.copytree(small, tmp_path / "small")
    again = ["--resume", "--out-dir", tmp_path / "run", "--max-steps"]
    assert run_main(train.main, *again, 21) == 0
    assert run_main(train.main, *again, 22, "--teacher", f"{large},{tmp_path / 'small'}") == 0
    assert run_main(train.main, *again, 23, "--teacher", f"{small},{large}") == 0  # their mean is the same
    for others in (large, f"{two_teachers},{tmp_path / 'small'}"):
        assert run_main(train.main, *again, 24, "--teacher", others) == 2
        assert "is not what this run began with" in capsys.readouterr().err


def test_distillation_keeps_the_experts_load_balance(teacher, shards):
    """Even with --teacher-weight 1, the router gets the gradient of the load balance."""
    config = parse_flags([*TINY, "--data-dir", str(shards), "--n-expert", "4", "--teacher", str(teacher), "--teacher-weight", "1"])
    world = DistContext(torch.device("cpu"))
    grads = []
    for balance in (0.01, 0.0):
        config.model.load_balance = balance
        _, trainer, *_ = train.set_up(config, world, RunFolder(Path(config.out_dir)))
        trainer.loss(trainer.model, range(4)).backward()
        grads.append(trainer.model.transformer.h[0].mlp.router.weight.grad)
        x = torch.from_numpy(trainer.train_stream.batch(range(4))[0])
        (of_balance,) = torch.autograd.grad(trainer.model.hidden_states_and_balance(x)[1], trainer.model.transformer.h[0].mlp.router.weight)
    assert of_balance.abs().max() > 1e-4
    assert (grads[0] - grads[1] - 0.01 * of_balance).abs().max() <= 1e-7


def test_unsuitable_teacher_is_refused(teacher, shards, tmp_path, capsys):
    hf = random_hf(97, 64, 1, 2, 16)
    hf.save_pretrained(tmp_path / "hf")
    for argv, message in (
        (
            ["--teacher", tmp_path / "hf"],
            "has 97 ids and 64 positions, the run has 257 and 32: choose a teacher with the same",
        ),
        (["--teacher", teacher, "--seq-len", 64], "has 257 ids and 32 positions, the run has 257 and 64"),
        (["--teacher", tmp_path / "none"], "no model named"),
        (["--teacher", f"{teacher},"], "--teacher has an empty path, or one twice: leave that out"),
        (["--teacher", f"{teacher},{teacher}"], "--teacher has an empty path, or one twice: leave that out"),
    ):
        assert run_train(shards, tmp_path / "run", *argv) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert message in error
    run = forked(tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--teacher", "none.pt", processes=2)
    assert (
        run.returncode == 2
        and run.stderr.count("error: ") == run.stderr.count("error: --teacher: no checkpoint none.pt: check the path\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_doc_mask_needs_known_document_starts(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", [1000, 5000])
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "characters"}))
    assert run_train(shards, tmp_path / "run", "--doc-mask") == 2
    assert "--doc-mask can't tell where documents end with the tokenizer 'characters'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--pos", "rope", "--window", 8, "--window-pattern", "SL", "--n-kv-head", 1, "--doc-mask"],
        ["--n-expert", 4, "--n-expert-active", 2, "--mlp", "swiglu", "--value-residual"],
        ["--share-layers", 2, "--no-bias", "--norm", "rmsnorm", "--no-tied-head", "--qk-norm"],
    ],
)
def test_variant_trains_on_two_ranks_and_loads(argv, shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "one", *argv, "--activation-memory", 0) == 0
    assert ("of them active" in capsys.readouterr().err) == ("--n-expert" in argv)
    assert forked(tmp_path, "train", *TINY, *argv, "--data-dir", shards, "--out-dir", tmp_path / "two", processes=2).returncode == 0
    one, two = (read_stream(tmp_path / name, "train") for name in ("one", "two"))
    assert max(abs(float(one[step]) - float(two[step])) for step in one) <= 1e-5
    assert float(one[19]) < float(one[0]) - 0.5
    model, _ = checkpoint.load_model(tmp_path / "one")
    assert model.config == read_run(tmp_path / "one").model
    assert run_main(sample.main, "-m", tmp_path / "one", "-d", "cpu", "--max-new-tokens", 40) == 0


def test_rope_model_fine_tunes_on_longer_sequences(shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "short", "--pos", "rope", "--val-every", 0) == 0
    argv = ["--init-from", tmp_path / "short", "--seq-len", 128, "--rope-scaling", "yarn", "--rope-factor", 4, "--micro-batch-size", 1]
    assert run_train(shards, tmp_path / "long", *argv) == 0
    model = checkpoint.load_model(tmp_path / "long")[0]
    assert (model.config.seq_len, model.config.rope_scaling, model.config.rope_factor) == (128, "yarn", 4.0)
    assert float(read_stream(tmp_path / "long", "train")[0]) < 4.5
    for argv, message in (
        (["--qk-norm", "--n-expert", 2], "n_expert 2 does not fit"),
        (["--qk-norm", "--n-expert", 2], "qk_norm True does not fit"),
        (
            ["--rope-scaling", "yarn", "--rope-factor", 4],
            "rope_factor 4 needs seq_len 128, not 32, for a model trained on 32",
        ),
    ):
        assert run_train(shards, tmp_path / "no", "--init-from", tmp_path / "short", *argv) == 2
        assert message in capsys.readouterr().err


# ---- resume ----


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact_to_the_bit(finished, shards, tmp_path, processes):
    """10 steps + resume = 20 steps: every loss, the final weights and the optimizer state."""

    def launch(out_dir, *argv):
        argv = [*argv, "--out-dir", out_dir]
        if processes == 1:
            return run_main(train.main, *argv)
        result = forked(tmp_path, "train", *argv, processes=processes)
        assert result.returncode == 0, result.stderr
        return 0

    start = [*TINY, "--data-dir", shards]
    reference = finished
    if processes == 2:
        reference = tmp_path / "reference"
        assert launch(reference, *start) == 0
    # undo steps 10 to 19 of a complete run: one with --max-steps 10 would have another schedule
    assert launch(tmp_path / "parts", *start, "--checkpoint-every", 10) == 0
    for path in checkpoint.files_of(tmp_path / "parts", 20):
        path.unlink()
    log = tmp_path / "parts" / "log.txt"
    kept = [line for line in log.read_text().splitlines() if int(line.split()[0]) < 10]
    log.write_text("\n".join(kept) + "\n")
    assert launch(tmp_path / "parts", "--resume") == 0
    assert read_stream(tmp_path / "parts", "train") == read_stream(reference, "train")
    assert read_stream(tmp_path / "parts", "val") == read_stream(reference, "val")
    assert_same_weights(final_weights(tmp_path / "parts"), final_weights(reference))
    state, other = (
        torch.load(folder / "state_00020.pt", weights_only=True)["optimizer"]["state"] for folder in (reference, tmp_path / "parts")
    )
    assert all(torch.equal(state[i][key], other[i][key]) for i in state for key in state[i])


def slow_steps(seconds: float = 0.1):
    """Makes each update this much slower."""
    plain = train.Trainer.update

    def update(self, *args, **how):
        time.sleep(seconds)
        return plain(self, *args, **how)

    train.Trainer.update = update


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resume_is_exact(finished, shards, tmp_path, number):
    run = Forked(tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", first=slow_steps)
    while not (tmp_path / "run" / "log.txt").exists() or not read_stream(tmp_path / "run", "train"):
        assert run.processes[0].is_alive()
        time.sleep(0.01)
    os.kill(run.processes[0].pid, number)
    result = run.wait(30)
    assert result.returncode == 128 + number and "all saved" in result.stderr and "Traceback" not in result.stderr
    step = checkpoint.newest_step(tmp_path / "run")
    assert 0 < step < 20
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run") == 0
    assert read_stream(tmp_path / "run", "train") == read_stream(finished, "train")
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(finished))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [launch["step"] for launch in run["launches"]] == [0, step]


def test_resume_with_another_world_size_and_micro_batch(finished, shards, tmp_path):
    assert run_train(shards, tmp_path / "run", "--checkpoint-every", 10) == 0
    for path in checkpoint.files_of(tmp_path / "run", 20):
        path.unlink()
    argv = ["--resume", "--out-dir", tmp_path / "run", "--micro-batch-size", 2, "--sample-every", 5]
    result = forked(tmp_path, "train", *argv, processes=2)
    assert result.returncode == 0, result.stderr
    losses, expected = read_stream(tmp_path / "run", "train"), read_stream(finished, "train")
    assert max(abs(float(losses[step]) - float(expected[step])) for step in expected) <= 1e-5
    assert "sample: " in result.stdout


def test_resume_with_more_steps_after_the_end(shards, tmp_path, capsys):
    assert run_train(shards, tmp_path / "run", "--max-steps", 4) == 0
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run") == 0
    assert "finished already, at step 4: raise --max-steps" in capsys.readouterr().err
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 6) == 0
    assert list(read_stream(tmp_path / "run", "train")) == list(range(6))
    before = (tmp_path / "run" / "run.json").read_text()
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 5) == 0
    assert (tmp_path / "run" / "run.json").read_text() == before  # a launch that trains nothing records nothing


def test_resume_appends_to_the_log(shards, tmp_path):
    """build-nanogpt empties its log at each start."""
    assert run_train(shards, tmp_path / "run", "--max-steps", 2) == 0
    before = (tmp_path / "run" / "log.txt").read_text()
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 3) == 0
    assert (tmp_path / "run" / "log.txt").read_text().startswith(before)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n-layer", 3, "--max-lr", 1], "max_lr 1.0 does not fit the run in"),
        (["--n-layer", 3, "--max-lr", 1], "n_layer 3 does not fit the run in"),
        (["--total-batch-tokens", 512], "total_batch_tokens 512"),
        (["--max-lr", 1e-4], "max_lr 0.0001"),
        (["--seed", 1], "seed 1"),
        (["--no-shuffle"], "shuffle False"),
        (["--preset", "gpt2-xl"], "preset 'gpt2-xl'"),
        (["--data-dir", "OTHER"], "tiny_train_000003.npy has changed"),
    ],
)
def test_resume_names_forbidden_changes(finished, tmp_path, capsys, argv, message):
    other = write_shards(tmp_path / "other", [1000, 5003, 17, 3001], seed=9)
    argv = [other if word == "OTHER" else word for word in argv]
    before = (finished / "run.json").read_text()
    assert run_main(train.main, "--resume", "--out-dir", finished, "--max-steps", 30, *argv) == 2
    assert message in capsys.readouterr().err and (finished / "run.json").read_text() == before


# ---- HellaSwag, samples, compilation, precision ----


def test_hellaswag_and_samples_during_a_run(shards, tmp_path, capsys, monkeypatch):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(12)))
    argv = ["--hellaswag-every", 10, "--hellaswag-file", tasks, "--sample-every", 10, "--sample-prompt", "the ca"]
    trees, merge = [], hellaswag.merge_rows
    monkeypatch.setattr(hellaswag, "merge_rows", lambda *args: trees.append(args) or merge(*args))
    assert run_train(shards, tmp_path / "run", *argv) == 0
    assert len(trees) == 2 * 12  # both styles of each task, once for all evaluations
    out = capsys.readouterr().out
    assert out.count("sample: the ca") == 9  # one at step 0, shortened
    assert 5 < len(re.search("step 0: sample: (.*) …\n", out)[1]) <= 60
    saved = (tmp_path / "run" / "samples.txt").read_text()
    assert re.findall(r"^---- step (\d+), sample (\d) of 4 ----\nthe ca", saved, re.M) == [
        (s, n) for s in ("0", "10", "20") for n in "1234"
    ]
    values = read_stream(tmp_path / "run", "hella")
    assert list(values) == [0, 10, 20]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["step"] == 20 and "hellaswag_acc_norm" in row)
    assert f"{row['hellaswag_acc_norm']:.6f}" == values[20] and "hellaswag_harness_acc_norm" in row
    assert row["hellaswag_tasks"] == 12
    from common.distributed import DistContext
    from hellaswag import evaluate

    model, tokenizer = checkpoint.load_model(str(tmp_path / "run"))
    assert evaluate(model, tokenizer, make_tasks(12), DistContext(torch.device("cpu")))[0]["acc_norm"] == row["hellaswag_acc_norm"]


def test_unreadable_hellaswag_file_is_a_warning(shards, tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text("<html>")
    assert run_train(shards, tmp_path / "run", "--max-steps", 2, "--hellaswag-every", 1, "--hellaswag-file", tmp_path / "odd.jsonl") == 0
    assert "warning: no HellaSwag in this run" in capsys.readouterr().err
    assert read_stream(tmp_path / "run", "hella") == {}


def test_two_ranks_warn_once_and_continue(shards, tmp_path):
    (tmp_path / "odd.jsonl").write_text("<html>")
    argv = ["--max-steps", 2, "--hellaswag-every", 1, "--hellaswag-file", tmp_path / "odd.jsonl"]
    result = forked(tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", *argv, processes=2)
    assert result.returncode == 0 and result.stderr.count("warning: no HellaSwag in this run") == 1
    assert list(read_stream(tmp_path / "run", "val")) == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_compiled_run_with_hellaswag_and_samples(fifty_steps, shards, tmp_path, processes):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(6)))
    argv = ["--max-steps", 50, "--hellaswag-every", 25, "--hellaswag-file", tasks, "--sample-every", 25]
    argv = ["train.py", *TINY, "--compile", "--data-dir", shards, "--out-dir", tmp_path / "run", *argv]
    result = script(*argv, processes=processes, timeout=400, TORCH_LOGS="recompiles")
    assert result.returncode == 0, result.stderr
    assert "size mismatch" not in result.stderr  # shapes of HellaSwag and samples recompile nothing
    losses, expected = read_stream(tmp_path / "run", "train"), read_stream(fifty_steps, "train")
    assert max(abs(float(losses[step]) - float(expected[step])) for step in expected) <= 1e-3
    assert list(read_stream(tmp_path / "run", "hella")) == [0, 25, 50] and result.stdout.count("sample: ") == 9


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bf16_and_fp16_train_like_fp32(finished, shards, tmp_path, dtype):
    assert run_train(shards, tmp_path / "run", "--dtype", dtype, "--attention", "manual") == 0
    losses, expected = read_stream(tmp_path / "run", "train"), read_stream(finished, "train")
    difference = max(abs(float(losses[step]) - float(expected[step])) for step in expected)
    assert 0 < difference < 0.05
    scaler = torch.load(tmp_path / "run" / "state_00020.pt", weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "fp16")
    weights = final_weights(tmp_path / "run")
    assert all(p.dtype == torch.float32 for p in weights.values())


def test_resume_from_fp32_in_fp16_and_back(shards, tmp_path):
    assert run_train(shards, tmp_path / "run", "--max-steps", 4) == 0
    for steps, dtype in ((8, "fp16"), (12, "fp16"), (14, "fp32")):
        assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", steps, "--dtype", dtype) == 0
    state = torch.load(tmp_path / "run" / "state_00012.pt", weights_only=True)
    assert state["scaler"]["_growth_tracker"] == 8  # the resume continued the count
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[-1] > 0  # the clock continued too


def test_auto_dtype_fits_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert device.pick_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert device.pick_dtype("auto", cpu) == torch.float32
    assert device.pick_dtype("auto", torch.device("mps")) == torch.float32
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert device.pick_dtype("auto", cuda) == dtype
    assert device.pick_dtype("fp16", cpu) == torch.float16


def test_peak_flops_match_the_data_sheets(monkeypatch):
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
    }
    names |= {"NVIDIA RTX A1000": None, "Tesla V100-SXM2-16GB": 125e12, "NVIDIA H100 80GB HBM3": 989e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert device.peak_flops(torch.device("cpu"), torch.bfloat16) is None


# ---- fine-tuning ----


def test_fine_tuning_starts_from_loaded_weights(shards, tmp_path):
    hf = random_hf(257, 48, 2, 2, 32)
    hf.save_pretrained(tmp_path / "hf")
    tiny = TINY[6:]  # the checkpoint sets the shape
    argv = [*tiny, "--data-dir", shards, "--init-from", tmp_path / "hf", "--seq-len", 32, "--out-dir", tmp_path / "tuned", "--max-steps", 3]
    assert run_main(train.main, *argv) == 0
    stream = TokenStream(find_shards(shards), "train", 32)
    x, y = map(torch.from_numpy, stream.batch(range(8)))
    expected = torch.nn.functional.cross_entropy(hf(x).logits.flatten(0, 1), y.flatten()).item()
    assert float(read_stream(tmp_path / "tuned", "train")[0]) == pytest.approx(expected, abs=1e-5)
    again = [*tiny, "--data-dir", shards, "--init-from", tmp_path / "tuned" / "model_00003.pt", "--out-dir", tmp_path / "again"]
    assert run_main(train.main, *again, "--max-steps", 1) == 0
    assert float(read_stream(tmp_path / "again", "val")[0]) == pytest.approx(float(read_stream(tmp_path / "tuned", "val")[3]), abs=1e-5)


def test_resume_uses_the_recorded_hub_commit(shards, tmp_path):
    """Even if the run has no checkpoint yet and the hub's main has moved."""
    from hub import SHA, serve

    random_hf(257, 48, 2, 2, 32).save_pretrained(tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    run, env = tmp_path / "run", {"HF_HOME": tmp_path / "home", "HF_HUB_DISABLE_XET": 1}
    with serve({"openai-community/gpt2": files}) as (url, requests):
        argv = [*TINY[6:], "--data-dir", shards, "--init-from", "gpt2", "--seq-len", 32, "--out-dir", run, "--max-steps", 1]
        result = forked(tmp_path, "train", *argv, HF_ENDPOINT=url, **env)
        assert result.returncode == 0, result.stderr
        assert json.loads((run / "run.json").read_text())["config"]["init_revision"] == SHA
        for path in checkpoint.files_of(run, 1):
            path.unlink()
        requests.clear()
        result = forked(tmp_path, "train", "--resume", "--out-dir", run, HF_ENDPOINT=url, **env | {"HF_HOME": tmp_path / "empty"})
        assert result.returncode == 0, result.stderr
        assert requests and not any("main" in request for request in requests)
    result = forked(tmp_path, "train", "--resume", "--out-dir", run, "--init-revision", "main")  # a torchrun restart repeats the flag
    assert result.returncode == 0 and "finished already" in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n-layer", 3], "n_layer 3 does not fit"),
        (["--seq-len", 64], "64 is longer than the 48 positions"),
        (["--data-dir", "GPT2"], "the model has 257 ids, the shards in"),
    ],
)
def test_mismatch_with_init_from_is_named(shards, tmp_path, capsys, argv, message):
    random_hf(257, 48, 2, 2, 32).save_pretrained(tmp_path / "hf")
    gpt2 = write_shards(tmp_path / "gpt2", [1000, 5003])
    (gpt2 / "manifest.json").unlink()
    argv = [gpt2 if word == "GPT2" else word for word in argv]
    argv = [*TINY[6:], "--data-dir", shards, "--init-from", tmp_path / "hf", "--total-batch-tokens", 6144, *argv]
    assert run_main(train.main, *argv, "--out-dir", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


# ---- mistakes ----


@pytest.mark.parametrize("resume", [False, True])
def test_batch_advice_works_when_followed(resume):
    advised = 0
    for batch, length, micro, processes in itertools.product((1, 6, 64, 512), (1, 32), (1, 4, 7, 64), (1, 3, 8, 1000)):
        shape = VariantConfig(97, length, 1, 1, 16)
        config = TrainConfig(model=shape, total_batch_tokens=batch * length, micro_batch_size=micro, resume=resume)
        try:
            config.validate(processes)
        except ValueError as e:
            advised += 1
            follow_batch_advice(config, processes, str(e))
    assert advised > 20


def follow_batch_advice(config: TrainConfig, processes: int, text: str):
    """Checks every setting that the message names."""
    if found := re.findall(r"(\d+(?: or \d+)*) processes with --micro-batch-size (\d+)", text):
        for counts, size in found:
            for count in counts.split(" or "):
                replace(config, micro_batch_size=int(size)).validate(int(count))
    elif found := re.search(r"--micro-batch-size (\d+) does$", text):
        replace(config, micro_batch_size=int(found[1])).validate(processes)
    else:
        assert not config.resume
        replace(config, total_batch_tokens=int(re.search(r"--total-batch-tokens (\d+) can be divided$", text)[1])).validate(processes)


def test_resume_on_three_processes_names_what_fits(finished):
    message = "this run's batch can't change; use 1 or 2 processes with --micro-batch-size 4, or 4 processes with --micro-batch-size 2"
    with pytest.raises(ValueError, match=message):
        parse_config(["--resume", "--out-dir", str(finished)]).validate(3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data-dir", "nowhere"], "the folder nowhere does not exist; make it: python fineweb.py --out-dir nowhere"),
        (["--data-dir", __file__], "test_train.py is a file, give the folder that shards are in"),
        (["--hellaswag-file", "nowhere", "--hellaswag-every", 5], "--hellaswag-file nowhere is not a file: pass HellaSwag's"),
        (["--micro-batch-size", 3], "--micro-batch-size 2 does"),
        (["--total-batch-tokens", 100], "--total-batch-tokens 128 can be divided"),
        (["--n-head", 5], "n_embd 32 is not a multiple of n_head 5"),
        (
            ["--n-kv-head", 3, "--window", 8, "--n-expert-active", 2, "--ema", 1, "--decay-ratio", 0, "--muon-lr", -1],
            "n_head 2 is not a multiple of n_kv_head 3: change one of them; n_expert_active 2 is more than n_expert 1: lower it; "
            "--muon-lr is -1.0: it must be at least 0; --ema is 1.0: it must be at least 0 and below 1; --decay-ratio is 0.0",
        ),
        (["--window", 0], "window is 0: it must be a whole number of at least 1"),
        (["--n-embd", 34, "--pos", "rope"], "pos rope rotates pairs of channels: n_embd 34 / n_head 2 must be even"),
        (["--max-steps", 0, "--max-lr", -1, "--keep", -1], "--max-steps is 0: it must be at least 1; --max-lr is -1.0"),
        (["--max-seconds", "inf", "--max-lr", "nan"], "--max-lr is nan: it must be a finite number of at least 0; --max-seconds is inf"),
        (["--ema", 2, "--micro-batch-size", 7], "below 1; --micro-batch-size 7 × --seq-len 32 × 1 processes does not divide"),
        (["--max-steps", 10**21], "it must be at most 1,000,000,000"),
        (["--timeout-minutes", 1e12], "it must be at most 1,000,000"),
        (["--activation-memory", 2], "--activation-memory is 2.0: it must be from 0 to 1"),
        (["--activation-memory", 0.5], "needs a compiled run: pass --compile, or use 0 or 1"),
        (["--device", "cuda"], "--device cuda: this machine has none"),
        (["--init-from", "gpt5"], "no model named 'gpt5'"),
        (["--init-from", "none.pt"], "no checkpoint none.pt"),
        (["--vocab-size", 300], "the model has 300 ids, the shards in"),
        (["--n-embd", 400_000], "choose a smaller --n-layer or --n-embd"),
        (["--seq-len", 8192, "--total-batch-tokens", 32768], "fewer than one sequence of 8192"),
        (["--resume"], "there is no run in"),
        (["--replay-step", 3], "there is no run in"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(shards, tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available() and "cuda" in argv:
        pytest.skip("this machine has CUDA")
    assert run_train(shards, tmp_path / "run", *argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("switches", [{}, {"tied_head": False}, {"n_expert": 4}, {"share_layers": 2}, {"n_kv_head": 1}])
def test_model_too_large_for_memory_is_refused(monkeypatch, switches):
    """4 bytes each for a weight, its gradient and AdamW's two moments. --shard divides them, but evaluations need all weights and no
    gradients. Muon has one moment per matrix, always divided over the ranks."""
    config = TrainConfig(model=VariantConfig(**switches))
    model = build_on_meta(config.model)
    params = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.transformer.h.named_parameters() if p.dim() == 2 and "router" not in name)
    for settings, processes, need in (
        ({}, 1, 16 * params),
        ({}, 2, 16 * params),
        ({"ema": 0.9}, 1, 20 * params),
        ({"shard": True}, 2, 10 * params),
        ({"shard": True}, 4, 7 * params),
        ({"optimizer": "muon"}, 1, 16 * params - 4 * matrices),
        ({"optimizer": "muon"}, 4, 16 * params - 7 * matrices),
    ):
        world = DistContext(torch.device("cpu"), size=processes)
        monkeypatch.setattr(device, "total_memory", lambda _, have=1.001 * need: have)
        checks.check_memory(replace(config, **settings), world)
        monkeypatch.setattr(device, "total_memory", lambda _, have=0.999 * need: have)
        with pytest.raises(ValueError, match="choose a smaller --n-layer"):
            checks.check_memory(replace(config, **settings), world)


def test_out_dir_that_is_a_file_is_refused(shards, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run_train(shards, tmp_path / "run") == 2
    assert "run': it is a file, give a folder\n" in capsys.readouterr().err and (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "log.txt", "config.json", "model_00005.pt"])
def test_files_of_a_run_or_model_are_kept(shards, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    assert run_train(shards, tmp_path / "run") == 2
    assert "already: add --resume" in capsys.readouterr().err and (tmp_path / "run" / name).read_text() == "{}"


@pytest.mark.parametrize("where", ["first update", "update", "validation", "HellaSwag", "validation at the end", "samples at the end"])
def test_signal_at_any_moment_loses_nothing(finished, shards, tmp_path, monkeypatch, capfd, where):
    """A signal cancels an evaluation. The next launch runs it, also at the end of the run."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(3)))
    argv = ["--val-every", 10, "--hellaswag-every", 10, "--hellaswag-file", tasks, "--sample-every", 10, "--sample-prompt", "a"]
    owner, name, step = {
        "first update": (train.Trainer, "update", 0),
        "update": (train.Trainer, "update", 19),
        "validation": (evaluation, "validate", 1),
        "HellaSwag": (scoring, "score_trees", 1),
        "validation at the end": (evaluation, "validate", 2),
        "samples at the end": (evaluation, "sample_texts", 2),
    }[where]
    plain, calls = getattr(owner, name), []

    def signalled(*args, **how):
        calls.append(args)
        if len(calls) == step + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **how)

    monkeypatch.setattr(owner, name, signalled)
    assert run_train(shards, tmp_path / "run", *argv) == (0 if "samples" in where else 128 + signal.SIGTERM)
    assert ("nothing to save" in capfd.readouterr().err) == (where == "first update")
    at = None if where == "first update" else 10 if where in ("validation", "HellaSwag") else 20
    assert checkpoint.newest_step(tmp_path / "run") == at
    done = [0] if where in ("validation", "first update") else [0, 10] if where != "samples at the end" else [0, 10, 20]
    assert list(read_stream(tmp_path / "run", "val")) == done
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run") == 0
    assert ("finished already" in capfd.readouterr().err) == ("samples" in where)
    assert list(read_stream(tmp_path / "run", "val")) == list(read_stream(tmp_path / "run", "hella")) == [0, 10, 20]
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(finished))
    assert torch.load(tmp_path / "run" / "model_00020.pt", weights_only=True)["val_loss"] is not None


def signal_rank_1(path: str):
    """Sends SIGTERM to rank 1 alone, at the start of its second call of this function."""
    owner, function = pkgutil.resolve_name(path.rpartition(".")[0]), path.rpartition(".")[2]
    plain, calls = getattr(owner, function), []

    def signalled(self, *args):
        calls.append(args)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args)

    setattr(owner, function, signalled)


def test_evaluations_run_without_flex_attention(shards, tmp_path, monkeypatch):
    """Uncompiled, it stores all scores, which can fill a GPU."""
    seen, plain = [], evaluation.Evaluation.run

    def run(self, step):
        self.trainer.evaluated.flex = True
        plain(self, step)
        seen.append(self.trainer.evaluated.flex)

    monkeypatch.setattr(evaluation.Evaluation, "run", run)
    monkeypatch.setattr(evaluation.Evaluation, "sample", lambda self, step: seen.append(self.trainer.evaluated.flex))
    assert run_train(shards, tmp_path / "run", "--max-steps", 1, "--sample-every", 1) == 0
    assert seen[:2] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["training.evaluation.validate", "training.evaluation.Evaluation.hellaswag"])
def test_signal_to_one_rank_cancels_evaluation_on_all(shards, tmp_path, path):
    """Rank 1 gets the signal and rank 0 learns of it. The run resumes from there."""
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(3)))
    argv = ["--val-every", 10, "--hellaswag-every", 10, "--hellaswag-file", tmp_path / "tasks.jsonl", "--checkpoint-every", 0]
    run, first = tmp_path / "run", partial(signal_rank_1, path)
    result = forked(tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", run, *argv, processes=2, first=first)
    assert result.returncode == 128 + signal.SIGTERM and "stopped after 10 steps, all saved" in result.stderr
    assert checkpoint.newest_step(run) == 10 and 10 not in read_stream(run, "hella")
    assert forked(tmp_path, "train", "--resume", "--out-dir", run, processes=2).returncode == 0
    assert list(read_stream(run, "hella")) == list(read_stream(run, "val")) == [0, 10, 20]


def test_second_signal_after_a_second_exits_at_once(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    stop = train.StopSignal()
    stop.unsaved = True
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGTERM, None)
    assert stop.received == signal.SIGTERM
    stop.at -= 2
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


@pytest.mark.parametrize("part", [{"data": "abc"}, {"launches": 5}])
def test_unknown_run_json_is_one_line(finished, tmp_path, capsys, part):
    shutil.copytree(finished, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(run | part))
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 30) == 2
    assert "was written by another version of train.py" in capsys.readouterr().err


def test_existing_run_is_not_overwritten(finished, shards, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert run_train(shards, finished) == 2
    assert "already: add --resume" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.slow
def test_mistake_under_torchrun_names_the_remedy(shards, tmp_path):
    argv = [*TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--micro-batch-size", 8]
    result = script("train.py", *argv, processes=2)
    assert result.returncode != 0
    assert "--micro-batch-size 4 does" in result.stderr and 'Traceback (most recent call last):\n  File "' + str(REPO) not in result.stderr


def test_missing_shards_are_named_within_five_seconds(tmp_path):
    began = time.monotonic()
    result = subprocess.run([sys.executable, REPO / "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "python fineweb.py" in result.stderr and len(result.stderr.splitlines()) == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("processes", [0, 2])
def test_second_launch_in_a_folder_is_refused(shards, tmp_path, processes):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = forked(tmp_path, "train", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", processes=processes)
    assert result.returncode == 2 and result.stderr.count("another process is writing into") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: the validation loss of step 10 is nan"),
        (["--max-bad-steps", 3], "error: 3 updates in a row were skipped"),
        (["--max-steps", 1], "error: the validation loss of step 1 is nan"),
        (["--checkpoint-every", 1, "--weight-decay", 1e30], "error: a weight after 1 steps is "),
        (["--sample-every", 1, "--sample-prompt", "a"], "warning: no samples at step 1: the model's logits are not finite"),
    ],
)
def test_diverged_run_ends_unsaved(shards, tmp_path, capsys, argv, message):
    """At this learning rate, the first update makes every weight overflow."""
    assert run_train(shards, tmp_path / "run", "--max-lr", 1e30, "--warmup-steps", 0, "--grad-clip", 0, *argv) == 1
    assert message in capsys.readouterr().err and not list((tmp_path / "run").glob("model_*"))


@pytest.mark.slow
def test_run_survives_closed_stdout_and_ascii_terminal(shards, tmp_path):
    """As in `train.py … | head -n 1`, on a terminal that can't show é."""
    command = [sys.executable, REPO / "train.py", *TINY, "--data-dir", shards, "--out-dir", tmp_path / "run", "--val-every", 1]
    command += ["--sample-every", 1, "--sample-prompt", "é"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout.readline().startswith(b"step 0: val loss")
    process.stdout.close()
    assert process.wait(60) == 0, process.stderr.read()
    assert list(read_stream(tmp_path / "run", "val")) == list(range(21))


def test_damaged_shard_ends_the_run_before_training(shards, tmp_path, capsys):
    copy = shutil.copytree(shards, tmp_path / "shards")
    path = copy / "tiny_train_000003.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run_train(copy, tmp_path / "run") == 2
    assert "tiny_train_000003.npy is damaged" in capsys.readouterr().err


def test_warns_of_flags_without_effect(shards, tmp_path, capsys):
    argv = ["--muon-lr", 0.1, "--decay-ratio", 0.5, "--teacher-weight", 0.2, "--load-balance", 0.1, "--gpus", 8]
    argv += ["--min-lr-ratio", 2, "--init-revision", "main"]
    assert run_train(shards, tmp_path / "run", "--max-steps", 2, *argv) == 0
    warned = re.findall("^warning: (.*)", capsys.readouterr().err, re.M)
    assert warned == [
        "--warmup-steps 3 is not below --max-steps: the learning rate never reaches --max-lr",
        "--min-lr-ratio 2.0 is above 1: the learning rate rises until the end", "--init-revision has no effect without --init-from",
        "--muon-lr has no effect without --optimizer muon", "--decay-ratio has no effect without --schedule wsd",
        "--teacher-weight has no effect without --teacher", "--load-balance has no effect without --n-expert",
        "--gpus has no effect without --plan",
    ]  # fmt: skip
    used = ["--optimizer", "muon", "--muon-lr", 0.1, "--schedule", "wsd", "--decay-ratio", 0.5, "--n-expert", 2, "--load-balance", 0.1]
    assert warnings(parse_flags(list(map(str, used)))) == []
    assert all(warnings(preset) == [] for preset in PRESETS.values())
    assert warnings(parse_flags(["--preset", "modern", "--optimizer", "adamw", "--schedule", "cosine"])) == []


def test_warns_if_init_from_overrides_the_preset(shards, tmp_path, capsys):
    random_hf(257, 48, 3, 2, 32).save_pretrained(tmp_path / "hf")
    argv = ["--preset", "quickstart", *TINY[6:], "--seq-len", 24, "--total-batch-tokens", 192, "--max-steps", 4]
    assert run_main(train.main, *argv, "--data-dir", shards, "--init-from", tmp_path / "hf", "--out-dir", tmp_path / "run") == 0
    warned = re.findall("^warning: (.*)", capsys.readouterr().err, re.M)
    # not --seq-len: it was passed as a flag
    assert warned == [f"--init-from {tmp_path / 'hf'} overrides --preset quickstart: --n-layer, --n-embd, --attention"]
    gpt2 = parse_flags(["--preset", "gpt3-125m", "--init-from", "gpt2"], VariantConfig())
    assert "--seq-len" in overridden_preset(gpt2, VariantConfig())[0] and overridden_preset(parse_flags([]), VariantConfig(n_layer=3)) == []


# ---- presets ----


def test_flags_override_presets():
    config = parse_config(["--preset", "gpt2-xl", "--n-layer", "2", "--out-dir", "nowhere"])
    assert (config.model.n_layer, config.model.n_embd, config.max_lr) == (2, 1600, 2e-4)
    default = parse_config(["--out-dir", "nowhere"])
    assert (default.total_batch_tokens, default.max_steps, default.warmup_steps, default.max_lr) == (524288, 19073, 715, 6e-4)
    for config in PRESETS.values():
        config.validate(1)
        assert PRESETS[config.preset] is config
    for world_size in (1, 2, 4, 8):
        PRESETS["gpt2"].validate(world_size)
