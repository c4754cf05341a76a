"""A checkpoint is complete or does not count, loads without running code, and restores the model."""

import errno
import os
import pickle
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from conftest import Trap, save_checkpoint
from transformers import GPT2LMHeadModel

import checkpoint
from checkpoint import (
    Saver,
    content_of,
    files_of,
    find_problem,
    load_model,
    newest_step,
    prune,
    recover_interrupted_save,
    sealed_steps,
    write_checkpoint,
)
from common.run_folder import RunFolder
from model import GPT
from variants import VariantConfig, build, build_on_meta


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(VariantConfig(257, 16, 1, 2, 16))


@pytest.fixture
def run(tmp_path, model):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, model, "bytes", 1.5, {"seconds": float(step)})
    return tmp_path


def test_checkpoint_is_a_plain_dict(run, model):
    content = torch.load(run / "model_00010.pt", weights_only=True)
    assert set(content) == {"model", "config", "step", "val_loss", "tokenizer"}
    assert (content["step"], content["val_loss"], content["tokenizer"]) == (10, 1.5, "bytes")
    again = build(VariantConfig(**content["config"]))
    again.load_state_dict(content["model"])
    assert all((p == q).all() for p, q in zip(again.parameters(), model.parameters(), strict=True))
    assert checkpoint.load_training(run, 10)[1]["seconds"] == 10.0


@pytest.mark.parametrize("path", ["model_00015.pt", ""])
def test_load_model_returns_model_and_tokenizer(run, model, path):
    loaded, tokenizer = load_model(str(run / path))
    idx = torch.arange(16)[None]
    assert (loaded(idx)[0] == model(idx)[0]).all()
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo" and not loaded.training


def test_load_model_reads_hugging_face_folders(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert tokenizer.name == "bytes" and (loaded.transformer.wpe.weight == model.transformer.wpe.weight).all()


def test_damaged_checkpoint_is_detected_and_skipped(run, capsys):
    """Flips 100 bits and cuts 100 times, spread over the three files. Each time the earlier checkpoint is used."""
    for path, count in zip(files_of(run, 15), (35, 35, 30), strict=True):
        data = path.read_bytes()
        for place in torch.linspace(0, len(data) - 2, count).long().tolist():  # the seal's last byte is a newline
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
            assert path.name in find_problem(run, 15)
            path.write_bytes(data[:place])
            assert path.name in find_problem(run, 15)
        assert newest_step(run) == 10 and f"skipping the checkpoint of step 15 in {run}: {path.name}" in capsys.readouterr().err
        path.write_bytes(data)
    assert find_problem(run, 15) is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_missing_file_falls_back_to_earlier_checkpoint(run, capsys, index):
    files_of(run, 15)[index].unlink()
    assert newest_step(run) == 10
    assert "skipping the checkpoint of step 15" in capsys.readouterr().err


def test_newest_step_without_a_complete_checkpoint(run, tmp_path):
    assert newest_step(tmp_path / "empty") is None
    for step in (5, 10, 15):
        (run / f"model_{step:05d}.json").unlink()
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        newest_step(run)


def test_keep_deletes_oldest_but_never_newest(run):
    prune(run, 0, 15)
    assert sealed_steps(run) == [5, 10, 15]
    prune(run, 2, 15)
    assert sealed_steps(run) == [10, 15] and not list(run.glob("*_00005*"))
    prune(run, 1, 10)  # keeps the one just saved, even if a later one was copied into the folder
    assert sealed_steps(run) == [10, 15]
    (run / "model_00015.json").unlink()  # a checkpoint without a seal does not count
    prune(run, 1, 10)
    assert sealed_steps(run) == [10] and newest_step(run) == 10


def test_keep_ignores_incomplete_checkpoints(run, model):
    """Steps 5 and 15 are damaged, so a run resumes from 10 and saves 12 and 15."""
    for step in (5, 15):
        (run / f"state_{step:05d}.pt").write_bytes(b"x")
    save_checkpoint(run, 12, model, "bytes", None, {})
    prune(run, 2, 12)
    assert sealed_steps(run) == [5, 10, 12, 15] and newest_step(run) == 12
    save_checkpoint(run, 15, model, "bytes", None, {})
    prune(run, 2, 15)
    assert sealed_steps(run) == [5, 12, 15] and newest_step(run) == 15


def test_timed_checkpoints_last_until_the_next(run, model):
    def save(step, timed):
        write_checkpoint(RunFolder(run), step, content_of(step, model, "bytes", None), {}, timed)
        prune(run, 2, step)
        return sealed_steps(run)

    assert save(17, True) == [10, 15, 17]  # --keep doesn't count it
    assert save(18, True) == [10, 15, 18] and newest_step(run) == 18
    assert save(20, False) == [15, 20]
    assert save(21, True) == [15, 20, 21]
    prune(run, 0, 25)  # keeps all, but not these
    assert sealed_steps(run) == [15, 20]


def test_training_does_not_change_a_background_save(run, model):
    """Changes weights and optimizer state during the save. The tied head is written once."""
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}}
    saver = Saver(RunFolder(run), 0, background=True)
    saver.save(20, content_of(20, model, "bytes", None), state)
    with torch.no_grad():
        [p.add_(1) for p in model.parameters()]
    state["optimizer"]["state"][0]["exp_avg"].add_(1)
    saver.finish()
    content, saved = checkpoint.load_training(run, 20)
    assert all((content["model"][name] == p).all() for name, p in before.items())
    assert (saved["optimizer"]["state"][0]["exp_avg"] == 1).all() and saved["optimizer"]["param_groups"] == [{"lr": 1.0, "params": [0]}]
    assert abs((run / "model_00020.pt").stat().st_size - (run / "model_00010.pt").stat().st_size) < 1000


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("which", ["model", "state"])
def test_failed_save_keeps_earlier_checkpoints(run, model, monkeypatch, background, which):
    plain = checkpoint.save_torch

    def save_torch(content, file):
        if (which == "model") == ("model" in content):
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(content, file)

    monkeypatch.setattr(checkpoint, "save_torch", save_torch)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    saver = Saver(RunFolder(run), 1, background)
    saver.save(15, content_of(15, model, "bytes", 0.1), {"seconds": 1.0})
    with pytest.raises(
        OSError, match=r"could not save the checkpoint of step 15 \(No space left on device\): it needs 0.0 MB, .* free"
    ) as e:
        saver.finish()
    assert e.value.errno == errno.ENOSPC and {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert saver.failure() is e.value and saver.failure() is None
    monkeypatch.undo()
    saver.save(20, content_of(20, model, "bytes", 0.1), {})
    saver.finish()
    assert sealed_steps(run) == [20]


def test_failed_save_is_reported_without_its_disk(run, model, monkeypatch):
    """The disk can't even say how much space it has."""

    def away(*args):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint, "save_torch", away)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", away)
    saver = Saver(RunFolder(run), 1, background=True)
    saver.save(15, content_of(15, model, "bytes", 0.1), {})
    with pytest.raises(OSError, match=r"could not save the checkpoint of step 15 \(Stale file handle\).* can't be reached"):
        saver.finish()


def test_saving_a_step_twice_replaces_it(run):
    torch.manual_seed(1)
    other = build(VariantConfig(257, 16, 1, 2, 16))
    save_checkpoint(run, 15, other, "bytes", 0.5, {"seconds": 0.0})
    assert find_problem(run, 15) is None
    assert (load_model(str(run / "model_00015.pt"))[0].transformer.wpe.weight == other.transformer.wpe.weight).all()


def test_bug_in_background_save_is_raised(run, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_torch", lambda content, file: 1 / 0)
    saver = Saver(RunFolder(run), 1, background=True)
    saver.save(20, content_of(20, model, "bytes", 0.1), {})
    with pytest.raises(ZeroDivisionError):
        saver.finish()


@pytest.mark.parametrize("step", [15, 20])
@pytest.mark.parametrize("renames", range(4))
def test_killed_save_leaves_all_or_nothing(run, model, monkeypatch, renames, step):
    """Stops before each rename (seal, model, state), for a new step and for one that exists already."""
    plain, done = os.replace, []

    def replace(source, target):
        if len(done) == renames:
            os.link(source, f"{source}.kept")  # a kill would not have cleaned up
            raise KeyboardInterrupt
        done.append(target)
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt) if renames < 3 else nullcontext():
        save_checkpoint(run, step, model, "bytes", 0.5, {"seconds": 20.0})
    monkeypatch.undo()
    for path in run.glob("*.kept"):
        os.replace(path, path.with_suffix(""))
    recover_interrupted_save(run)
    recover_interrupted_save(run)
    assert newest_step(run) == (15 if renames == 0 else step) and not list(run.glob("*.pt.tmp"))
    content, state = checkpoint.load_training(run, newest_step(run))
    assert (content["val_loss"], state["seconds"]) == ((1.5, 15.0) if renames == 0 else (0.5, 20.0))


def test_killed_first_save_is_not_a_checkpoint(tmp_path, model):
    """Nothing was ever saved, so the run may start over."""
    content = content_of(5, model, "bytes", None)
    checkpoint.write_temporary(tmp_path / "model_00005.pt", lambda file: torch.save(content, file))
    assert newest_step(tmp_path) is None
    recover_interrupted_save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pickled_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "plain.pt"):
        with pytest.raises(ValueError, match="can't be loaded safely"):
            load_model(str(tmp_path / name))
    assert not (tmp_path / "fired").exists()


def save_like(kind: str, rows: int, path) -> torch.nn.Module:
    """Saves Hugging Face's GPT-2 with random weights as nanoGPT or build-nanogpt would, and returns it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    act = "gelu" if kind == "nanoGPT" else "gelu_new"
    hf = GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_positions=16, n_embd=24, n_layer=2, n_head=2, activation_function=act, bos_token_id=0, eos_token_id=0)
    ).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state = {name: p.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p for name, p in hf.state_dict().items()}
    shape = dict(block_size=16, vocab_size=rows, n_layer=2, n_head=2, n_embd=24)
    if kind == "nanoGPT":
        state = {f"_orig_mod.{name}": p for name, p in state.items()} | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
        optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
        best = {"iter_num": 5, "best_val_loss": torch.tensor(3.0), "config": {"dataset": "x"}}
        torch.save({"model": state, "optimizer": optimizer, "model_args": shape | {"bias": True, "dropout": 0.0}, **best}, path)
        return hf
    config = type("GPTConfig", (), {"__module__": "__main__"})()
    vars(config).update(shape)
    main = sys.modules["__main__"]
    main.GPTConfig = type(config)  # where pickle looks for it
    torch.save({"model": state, "config": config, "step": 5, "val_loss": 3.0}, path)
    del main.GPTConfig
    return hf


@pytest.mark.parametrize("kind", ["nanoGPT", "build-nanogpt"])
@pytest.mark.parametrize("rows", [50304, 50257, 65])
def test_nanogpt_checkpoints_give_the_same_logits(tmp_path, kind, rows, capsys):
    hf = save_like(kind, rows, tmp_path / "ckpt.pt")
    model, opened = checkpoint.load_gpt(str(tmp_path / "ckpt.pt"))
    os.rename(tmp_path / "ckpt.pt", tmp_path / ("ckpt.pt" if kind == "nanoGPT" else "model_00005.pt"))
    assert checkpoint.load_config(str(tmp_path)) == model.config  # found in the folder
    assert opened.tokenizer == (None if rows == 65 else "gpt2") and model.config.vocab_size == min(rows, 50257)
    idx = torch.randint(0, 65, (2, 16))
    with torch.no_grad():
        assert (model.eval()(idx)[0] - hf(idx).logits[..., : model.config.vocab_size]).abs().max() <= 1e-5
        model.save_pretrained(tmp_path / "hf")  # transformers gets the same GELU
        again = type(hf).from_pretrained(tmp_path / "hf").eval()
        assert (model(idx)[0] - again(idx).logits).abs().max() <= 1e-5
        assert (GPT.from_pretrained(tmp_path / "hf").eval()(idx)[0] == model(idx)[0]).all()


def test_prefixes_of_torch_compile_and_ddp_load(tmp_path):
    save_like("nanoGPT", 65, tmp_path / "ckpt.pt")
    expected = checkpoint.load_gpt(str(tmp_path / "ckpt.pt"))[0].state_dict()
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for prefix in ("", "module.", "module._orig_mod.", "_orig_mod.module."):
        state = {prefix + name.removeprefix("_orig_mod."): p for name, p in content["model"].items()}
        torch.save(content | {"model": state}, tmp_path / "ckpt.pt")
        found = checkpoint.load_gpt(str(tmp_path / "ckpt.pt"))[0].state_dict()
        assert all(torch.equal(p, expected[name]) for name, p in found.items())


def test_tables_without_padding_rows_load(tmp_path):
    """Hugging Face's state dicts have such tables."""
    torch.manual_seed(0)
    model = build(VariantConfig(257, 16, 2, 2, 24)).eval()
    model.save_pretrained(tmp_path / "hf")
    hf = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    state = {name: p.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p for name, p in hf.state_dict().items()}
    assert len(state["transformer.wte.weight"]) == 257 < model.config.padded_vocab_size
    idx = torch.randint(257, (2, 16))
    again = build(model.config).eval()
    assert not any(again.load_state_dict(state))  # no key is missing or unexpected
    torch.save({"model": state, "config": asdict(model.config), "step": 0, "val_loss": None, "tokenizer": "bytes"}, tmp_path / "a.pt")
    for found in (again, load_model(str(tmp_path / "a.pt"))[0]):
        assert (found(idx)[0] - hf(idx).logits).abs().max() <= 1e-5
        assert torch.equal(found(idx)[0], model(idx)[0]) and len(found.state_dict()["lm_head.weight"]) == 320


def test_tables_that_need_no_padding_share_memory():
    """inference_copy relies on this: it must not copy the weights."""
    model = build(VariantConfig(256, 16, 1, 1, 8))
    copy = build_on_meta(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    assert copy.transformer.wte.weight.data_ptr() == copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_untied_head_stays_untied(tmp_path):
    save_like("nanoGPT", 65, tmp_path / "ckpt.pt")
    tied = checkpoint.load_gpt(str(tmp_path / "ckpt.pt"))[0].eval()
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    content["model"]["_orig_mod.lm_head.weight"] = 2 * content["model"]["_orig_mod.lm_head.weight"]
    torch.save(content, tmp_path / "ckpt.pt")
    untied, idx = checkpoint.load_gpt(str(tmp_path / "ckpt.pt"))[0].eval(), torch.arange(16)[None]
    assert not untied.config.tied_head and (untied(idx)[0] - 2 * tied(idx)[0]).abs().max() <= 1e-5


def test_broken_nanogpt_checkpoints_are_refused(tmp_path):
    save_like("nanoGPT", 65, tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    for part in ({"model_args": {"n_layer": 2}}, {"model_args": 5}, {"model": {}}, {"model": {"transformer.wte.weight": torch.zeros(1)}}):
        torch.save(content | part, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="not a checkpoint of this project, nanoGPT or build-nanogpt"):
            load_model(str(tmp_path / "odd.pt"))


def test_weights_load_without_training_state(run):
    (run / "state_00015.pt").unlink()
    assert load_model(str(run / "model_00015.pt")) and checkpoint.checkpoint_file(str(run)) == run / "model_00015.pt"
    assert newest_step(run) == 10  # but it can't be resumed


def test_wrong_checkpoints_raise_clear_errors(tmp_path, run, model):
    with pytest.raises(ValueError, match=r"no checkpoint .*nowhere.pt"):
        load_model(str(tmp_path / "nowhere.pt"))
    torch.save({"step": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(str(tmp_path / "other.pt"))
    (run / "model_00015.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="model_00015.pt is damaged"):
        load_model(str(run / "model_00015.pt"))
    content = torch.load(run / "model_00010.pt", weights_only=True)
    torch.save(torch.zeros(2), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(str(tmp_path / "other.pt"))
    for part in ({"tokenizer": ["bytes"]}, {"model": {"a": 1}}, {"model": 5}):
        torch.save(content | part, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="not a checkpoint of this project"):
            load_model(str(tmp_path / "other.pt"))
    for shape in ((), (257,), (257, 2, 16)):
        torch.save(content | {"model": content["model"] | {"transformer.wte.weight": torch.zeros(shape)}}, tmp_path / "shape.pt")
        with pytest.raises(ValueError, match=re.escape(f"wte.weight is {shape} there")):
            load_model(str(tmp_path / "shape.pt"))
    content["config"]["n_embd"] = 32
    torch.save(content, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"does not fit the model: .* is \(320, 16\) there, \(320, 32\) here"):
        load_model(str(tmp_path / "shape.pt"))
