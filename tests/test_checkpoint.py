"""A checkpoint is whole or does not count, loads without running code, and gives the model back."""

import pickle

import pytest
import torch

import checkpoint
from checkpoint import fault, files_of, load_model, newest_step, prune, save_checkpoint, sealed_steps
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(257, 16, 1, 2, 16))


@pytest.fixture
def run(tmp_path, model):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, model, "bytes", 1.5, {"seconds": float(step)})
    return tmp_path


def test_a_checkpoint_is_a_plain_dict(run, model):
    content = torch.load(run / "model_00010.pt", weights_only=True)
    assert set(content) == {"model", "config", "step", "val_loss", "tokenizer"}
    assert (content["step"], content["val_loss"], content["tokenizer"]) == (10, 1.5, "bytes")
    again = GPT(GPTConfig(**content["config"]))
    again.load_state_dict(content["model"])
    assert all((p == q).all() for p, q in zip(again.parameters(), model.parameters(), strict=True))
    assert checkpoint.load_training(run, 10)[1] == {"seconds": 10.0}


@pytest.mark.parametrize("path", ["model_00015.pt", ""])
def test_load_model_gives_model_and_tokenizer(run, model, path):
    loaded, tokenizer = load_model(str(run / path))
    idx = torch.arange(16)[None]
    assert (loaded(idx)[0] == model(idx)[0]).all()
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo" and not loaded.training


def test_load_model_reads_hugging_face_folders(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert tokenizer.name == "bytes" and (loaded.transformer.wpe.weight == model.transformer.wpe.weight).all()


def test_every_flipped_byte_and_every_truncation_is_noticed(run):
    """At 40 places all over the three files."""
    for path in files_of(run, 15):
        whole = path.read_bytes()
        for place in torch.linspace(0, len(whole) - 1, 14).long().tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            assert fault(run, 15), (path.name, place)
            path.write_bytes(whole[: min(place, len(whole) - 2)])  # the seal's last byte is a newline
            assert path.stem in fault(run, 15)
        path.write_bytes(whole)
    assert fault(run, 15) is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_one_before_is_used_when_a_file_is_gone(run, capsys, index):
    files_of(run, 15)[index].unlink()
    assert newest_step(run) == 10
    assert "skipping the checkpoint of step 15" in capsys.readouterr().err


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(run, tmp_path):
    assert newest_step(tmp_path / "empty") is None
    for step in (5, 10, 15):
        (run / f"model_{step:05d}.json").unlink()
    with pytest.raises(ValueError, match="none of the 3 checkpoints"):
        newest_step(run)


def test_keep_deletes_the_oldest_and_never_the_last(run):
    prune(run, 0, 15)
    assert sealed_steps(run) == [5, 10, 15]
    prune(run, 2, 15)
    assert sealed_steps(run) == [10, 15] and not list(run.glob("*_00005*"))
    (run / "model_00015.json").unlink()  # an unfinished one is not counted
    prune(run, 1, 10)
    assert sealed_steps(run) == [10] and newest_step(run) == 10


def test_keep_does_not_count_what_a_resume_passed_over(run, model):
    """Step 15 is damaged; the run goes on from 10 and saves 12."""
    (run / "model_00015.pt").write_bytes(b"x")
    save_checkpoint(run, 12, model, "bytes", None, {})
    prune(run, 1, 12)
    assert sealed_steps(run) == [12] and newest_step(run) == 12


def test_saving_a_step_again_replaces_it(run):
    torch.manual_seed(1)
    other = GPT(GPTConfig(257, 16, 1, 2, 16))
    save_checkpoint(run, 15, other, "bytes", 0.5, {"seconds": 0.0})
    assert fault(run, 15) is None
    assert (load_model(str(run / "model_00015.pt"))[0].transformer.wpe.weight == other.transformer.wpe.weight).all()


def test_a_kill_while_a_step_is_saved_again_leaves_the_one_before(run, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(run, 15, model, "bytes", 0.5, {})
    assert newest_step(run) == 10


class Trap:
    def __reduce__(self):
        return (open, ("fired", "w"))


def test_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "plain.pt"):
        with pytest.raises(ValueError, match="can't be loaded safely"):
            load_model(str(tmp_path / name))
    assert not (tmp_path / "fired").exists()


def test_weights_can_be_used_without_their_training_state(run):
    (run / "state_00015.pt").unlink()
    assert load_model(str(run / "model_00015.pt")) and checkpoint.checkpoint_file(str(run)) == run / "model_00015.pt"
    assert newest_step(run) == 10  # but not resumed


def test_wrong_checkpoints_are_named(tmp_path, run, model):
    with pytest.raises(ValueError, match=r"no checkpoint .*nowhere.pt"):
        load_model(str(tmp_path / "nowhere.pt"))
    torch.save({"step": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_model(str(tmp_path / "other.pt"))
    (run / "model_00015.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="model_00015.pt is damaged"):
        load_model(str(run / "model_00015.pt"))
    content = torch.load(run / "model_00010.pt", weights_only=True)
    for part in ({"tokenizer": ["bytes"]}, {"model": {"a": 1}}, {"model": 5}):
        torch.save(content | part, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="not a checkpoint of this project"):
            load_model(str(tmp_path / "other.pt"))
    content["config"]["n_embd"] = 32
    torch.save(content, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"of another shape: .* is \(320, 16\) there, \(320, 32\) here"):
        load_model(str(tmp_path / "shape.pt"))
