"""lab.compare: its numbers against plain arithmetic, and complete comparisons of tiny models."""

import json
import re
import shlex
import shutil
import statistics
import subprocess
import threading

import pytest
import torch
from conftest import TINY, Finished, forked, ids_for, rewrite_run, run_main, run_train, save_checkpoint, script, write_shards

from common.run_folder import without_seed
from common.shards import find_shards
from dataloader import TokenStream
from lab import compare, measure, origins, runs
from lab.compare import CompareConfig
from lab.judge import Judgement, judge
from lab.length import loss_by_position, stretched
from lab.measure import cache_bytes
from lab.report import summary
from lab.sooner import amount_for, tokens_to_the_same_loss
from lab.suites import SUITES
from ops.kv_cache import KVCache
from training.flags import parse_config
from training.run_json import hash_of_code, other_code
from variants import VariantConfig, build


def result(val_loss: float, speed: float = 10.0, tokens: int = 1000, seconds: float = 5.0) -> dict:
    measured = dict(tokens=tokens, val_loss=val_loss, seconds=seconds, tokens_per_second=speed, memory_bytes=1, params=2, active_params=2)
    measured |= dict(flops_per_token=12 * speed)
    return measured | dict(cache_bytes=3, bits_per_byte=2 * val_loss, curve={tokens // 2: val_loss + 1, tokens: val_loss})


def test_summary_means_and_median_speed_ratio():
    a = {1: result(2.0, 10), 2: result(3.0, 20), 3: result(4.0, 30)}
    b = {1: result(1.0, 20), 2: result(2.5, 30), 3: result(2.5, 30)}
    rows = summary({"a": a, "b": b, "c": {}}, {"b": judge([-1.0, -0.5, -1.5], [3]), "c": Judgement("failed", reason="seed 1: boom")})
    assert [row.get("val_loss") for row in rows] == [3.0, 2.0, None] and [row["spread"] for row in rows[:2]] == [2.0, 1.5]
    assert rows[1]["difference"] == -1.0 and rows[1]["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert rows[1]["bits_per_byte"] == 4.0 and rows[1]["paired_seeds"] == [1, 2, 3]
    assert summary({"a": {1: result(800.0)}}, {})[0]["perplexity"] is None  # too large for exp, and for JSON
    assert [(row["speed"], row["work"]) for row in rows[:2]] == [(1.0, 1.0), (1.5, 2.0)]
    assert rows[2]["text"] == "failed: seed 1: boom" and "verdict" not in rows[0]


def test_tokens_to_a_loss_are_interpolated():
    assert amount_for(2.0, [100, 400], [2.5, 1.5]) == pytest.approx(200)
    assert amount_for(1.5, [100, 400], [2.5, 1.5]) == pytest.approx(400)
    assert amount_for(1.4, [100, 400], [2.5, 1.5]) is None and amount_for(2.6, [100, 400], [2.5, 1.5]) is None
    runs = {"first": {1: result(2.0, tokens=1000)}, "x": {1: result(2.5, tokens=100, seconds=1.0)}}
    runs |= {"y": {1: result(1.5, tokens=400, seconds=4.0), 2: result(1.0)}}
    assert "tokens to the first variant's loss, seed by seed: 5.00; mean 5.00" in tokens_to_the_same_loss(runs)
    assert "seconds to the first variant's loss, seed by seed: 2.50" in tokens_to_the_same_loss(runs)
    assert "choose other lengths" in tokens_to_the_same_loss(runs | {"y": {1: result(2.1)}})
    assert tokens_to_the_same_loss(runs | {"z": {}}) == tokens_to_the_same_loss(runs)
    assert tokens_to_the_same_loss(runs | {"y": {}}).startswith("y failed, and without it the series does not reach")


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(n_kv_head=1),
        dict(window=8, window_pattern="SL", pos="rope"),
        dict(short_conv=3, n_kv_head=1, pos="rope", key_offset=True, bigram=500),
    ],
)
def test_cache_bytes_equal_a_real_cache(switches):
    config, cache = VariantConfig(97, 24, 4, 2, 16, **switches), KVCache(24)
    build(config)(ids_for(config, batch=1), cache=cache)
    assert cache_bytes(config) == cache.nbytes()


@pytest.mark.parametrize("suite", SUITES)
def test_suite_variants_are_valid_and_distinct(suite):
    configs = [parse_config([*variant.flags, "--out-dir", "none"]) for variant in compare.variants_of(CompareConfig(suite=suite))]
    for config in configs:
        config.validate(1)
    assert len(set(map(repr, configs))) == len(configs)


def test_a_variant_name_means_one_run():
    flags = {}
    for suite in SUITES.values():
        for name, own in suite.items():
            assert flags.setdefault(runs.folder_of("", name, 1), (name, own)) == (name, own)
    run = compare.run_of(CompareConfig(out_dir="o"), "b", ["--teacher", "{out_dir}/a/{seed}"], 2)
    assert run.argv() == ["--teacher", "o/a/2", "--seed", "2", "--out-dir", "o/b/2"]


def test_seeds_may_have_their_own_teachers():
    one, two = (without_seed({"teacher": f"hf/a/{seed},hf/b/{seed}/model_00020.pt"}, seed) for seed in (1, 2))
    assert one == two != without_seed({"teacher": "hf/a/1,hf/b/1/model_00020.pt"}, 2)


def test_teachers_of_a_suite_are_earlier_variants():
    found = 0
    for suite in SUITES.values():
        earlier = set()
        for name, flags in suite.items():
            teachers = re.findall(r"\{out_dir\}/(.+?)/\{seed\}", flags)
            assert earlier.issuperset(teachers) and flags.count("{out_dir}") == len(teachers)
            earlier.add(runs.folder_of("", name, 1).parent.name)
            found += len(teachers)
    assert found == 3


@pytest.mark.parametrize("argv", [["--suite", "little-data"], ["a=", "b=--teacher {out_dir}/a/{seed}"]])
def test_teachers_are_not_trained_beside_students(argv, capsys):
    for more in (["--workers", 2], ["--until-decided"]):
        assert run_main(compare.main, *argv, *more) == 2
        assert "which must have finished: leave out --workers and --until-decided" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_loss_by_position_and_stretched_models(shards, tmp_path, pos):
    assert run_train(shards, tmp_path, "--pos", pos, "--val-every", 0) == 0
    model, stream = stretched(tmp_path, 1, "none"), TokenStream(find_shards(shards), "val", 32, shuffle=False)
    losses = loss_by_position(model, stream, 5)
    x, y = map(torch.from_numpy, stream.batch([i * stream.sequences_per_epoch // 5 for i in range(5)]))
    assert losses.mean().item() == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    longer = stretched(tmp_path, 4, "none")
    assert longer.config.seq_len == 128 and (longer(x)[0] - model(x)[0]).abs().max() <= 1e-5
    assert longer(ids_for(longer.config))[0].isfinite().all()
    if pos == "rope":
        config = stretched(tmp_path, 4, "yarn").config
        assert (config.rope_scaling, config.rope_factor) == ("yarn", 4.0)
        assert (stretched(tmp_path, 4, "linear")(x)[0] - model(x)[0]).abs().max() > 1e-3


def test_mistakes_are_one_line(capsys, tmp_path):
    for argv, message in (
        ([], "give either variants, such as"),
        (["a=--max-steps 1", "--suite", "length"], "give either variants, such as"),
        (["a", "--seeds", 0], "--seeds is 0: it must be at least 1; 'a' is neither NAME=FLAGS nor a folder"),
        (["a b=", "a_b=--max-steps 1"], "two variants would share a folder, rename one: a_b, a_b"),
        (["a=--n-head 5"], "a: n_embd 768 is not a multiple of n_head 5"),
        (["a='"], "No closing quotation"),
        (["a=--seed 3", "b=--out-dir=x"], "error: a: lab.compare sets --seed and --out-dir for each run: leave them out"),
    ):
        assert run_main(compare.main, *argv, "--out-dir", tmp_path / "out") in (2, 3)
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error
    assert not (tmp_path / "out").exists()


def test_unvalidated_checkpoint_does_not_count(tmp_path):
    model = build(VariantConfig(257, 16, 1, 2, 16))
    save_checkpoint(tmp_path, 10, model, "bytes", 1.5, {})
    assert runs.last_checkpoint(tmp_path)["val_loss"] == 1.5
    save_checkpoint(tmp_path, 20, model, "bytes", None, {})
    assert runs.last_checkpoint(tmp_path) == {} == runs.last_checkpoint(tmp_path / "none")


@pytest.mark.slow
def test_comparison_keeps_finished_runs(shards, tmp_path, capsys, monkeypatch):
    flags = shlex.join([*TINY, "--data-dir", str(shards), "--val-every", "0", "--sample-every", "20"])
    argv = ["plain=", "rope, 1 KV head=--pos rope --n-kv-head 1", f"--flags={flags}", "--out-dir", tmp_path, "--seeds", 2]
    monkeypatch.setattr(runs, "launch", lambda argv, env: Finished(forked(tmp_path, "train", *argv)))
    assert run_main(compare.main, *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("rope, 1 KV head") for line in lines) == 3 and any(line.endswith("8 kB") for line in lines)
    assert lines[-1].startswith("verdict rope, 1 KV head: ")
    with open(tmp_path / "plain" / "1" / "metrics.jsonl", "a") as file:  # HellaSwag after the last validation, then a kill
        file.write(json.dumps({"step": 20, "hellaswag_acc": 0.25, "seconds": 1.0}) + '\n{"step": 20, "hella')
    monkeypatch.setattr(runs, "launch", None)
    assert run_main(compare.main, "plain=--max-steps 30", *argv[2:]) == 2
    assert "plain: max_steps 30 does not fit" in capsys.readouterr().err
    assert run_main(compare.main, *argv, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["variant"] for row in rows] == ["plain", "rope, 1 KV head"]
    assert len(rows[1]["differences"]) == 2 and (tmp_path / "compare.png").stat().st_size > 10_000
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) ** 2)  # each call takes two seconds longer
    assert run_main(compare.main, *argv, "--json", "--time-steps", 10) == 0
    timed = json.loads(capsys.readouterr().out)["variants"]
    # each variant does a turn of 5 steps to warm up, then 2 timed turns
    seconds = [statistics.median(2 * 2 * (turn * 10 + first + i) + 1 for turn in (1, 2) for i in range(5)) for first in (0, 5)]
    assert [row["tokens_per_second"] for row in timed] == pytest.approx([256 / s for s in seconds])
    assert timed[1]["speed"] == pytest.approx(seconds[0] / seconds[1]) and timed[1]["val_loss"] == rows[1]["val_loss"]


@pytest.fixture
def compared(shards, tmp_path, capsys, monkeypatch):
    """A finished comparison of one variant, and the command line that made it. Shards of its own: a test may change them."""
    data = shutil.copytree(shards, tmp_path / "data")
    flags = shlex.join([*TINY, "--data-dir", str(data), "--val-every", "0", "--max-steps", "4"])
    argv = ["plain=", f"--flags={flags}", "--out-dir", tmp_path / "out", "--seeds", 1]
    monkeypatch.setattr(runs, "launch", lambda argv, env: Finished(forked(tmp_path, "train", *argv)))
    assert run_main(compare.main, *argv) == 0
    capsys.readouterr()
    return tmp_path / "out" / "plain" / "1", argv


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_other_code_are_refused(compared, capsys, finished):
    folder, argv = compared
    rewrite_run(folder, lambda launch: launch["code"].update({"model.py": "0" * 16, "variants.py": "1" * 16}))
    if not finished:
        for path in folder.glob("model_*"):
            path.unlink()
    why = f"{folder} was trained by other code (model.py, variants.py)"
    argv.insert(1, "rope=--pos rope")
    assert run_main(compare.main, *argv) == 2
    remedy = "train all runs again in another --out-dir, or pass --mixed to use these too"
    assert f"error: {why}: {remedy}\n" == capsys.readouterr().err
    assert not folder.parent.with_name("rope").exists()  # refused before anything trains
    if finished:
        assert run_main(compare.main, *argv, "--mixed") == 0
        assert why in capsys.readouterr().out
        assert run_main(compare.main, *argv, "--mixed", "--json") == 0
        assert json.loads(capsys.readouterr().out)["notes"] == [why]


@pytest.mark.slow
def test_runs_on_changed_shards_are_refused(compared, tmp_path, capsys):
    folder, argv = compared
    write_shards(tmp_path / "data", [1000, 5003, 17, 3001], seed=1)
    hidden = [path.rename(tmp_path / path.name) for path in folder.glob("model_*")]  # the run isn't finished then
    assert run_main(compare.main, *argv, "--mixed") == 2
    assert "so it can't resume: restore the data, or train all runs again in another --out-dir\n" in capsys.readouterr().err
    for path in hidden:
        path.rename(folder / path.name)
    assert run_main(compare.main, *argv) == 2
    err = capsys.readouterr().err
    assert f"error: {folder} was trained on other data than {tmp_path}/data has now (tiny_train_000001.npy has changed, " in err
    assert run_main(compare.main, *argv, "--mixed") == 0
    assert "was trained on other data" in capsys.readouterr().out


@pytest.mark.slow
def test_code_edited_during_a_comparison_is_named(compared, tmp_path, capsys, monkeypatch):
    folder, argv = compared

    def launch(argv, env):
        result = forked(tmp_path, "train", *argv)
        rewrite_run(folder.parent.with_name("rope") / "1", lambda launch: launch["code"].update({"ops/new.py": "2"}))
        return Finished(result)

    monkeypatch.setattr(runs, "launch", launch)
    assert run_main(compare.main, *argv[:1], "rope=--pos rope", *argv[1:]) == 2
    assert "rope/1 was trained by other code (ops/new.py): train all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ("a" * 40, "a" * 40, ""),
        ("a" * 40, "b" * 40, "commit aaaaaaaa against bbbbbbbb"),
        ("a" * 40 + "+", "a" * 40 + "+", "commit aaaaaaaa+ against aaaaaaaa+"),  # each + may be another change
        ("", "", "commit unknown against unknown"),
    ],
)
def test_older_runs_compare_by_commit(before, now, why):
    assert other_code({"commit": before}, {"commit": now, "code": {"model.py": "1"}}) == why


def test_comments_and_layout_are_not_code():
    texts = (
        "def f(x):\n    return x + 1\n",
        'def f( x ):  # adds\n    """Adds."""\n\n    return x+1',
        "def f(x):\n    return x + 2\n",
        "def f(",
    )
    first, same, other, broken = map(hash_of_code, texts)
    assert first == same and len({first, other, broken}) == 3


@pytest.mark.parametrize(("workers", "cards"), [(1, [None, None, None]), (2, ["0", "1"]), (3, ["0", "0", "1"])])
def test_workers_get_a_gpu_each(tmp_path, monkeypatch, workers, cards):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    together, seen = threading.Barrier(workers), []

    def launch(argv, env):
        together.wait(10)
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        assert env["WANDB_RUN_GROUP"] == argv[-1].split("/")[-1]
        return Finished(subprocess.CompletedProcess([], 0, "", ""))

    monkeypatch.setattr(runs, "launch", launch)
    jobs = [runs.Run(str(i), [], tmp_path / str(i)) for i in range(len(cards))]
    assert runs.run_all(jobs, workers, False) == [] and sorted(seen, key=str) == cards


def test_speeds_of_several_devices_are_noted(shards, tmp_path):
    for name in ("a", "b"):
        assert run_train(shards, tmp_path / name, "--max-steps", 2, "--val-every", 0) == 0
    rewrite_run(tmp_path / "b", lambda launch: launch.update(device="NVIDIA H100"))
    assert origins.machine_notes([tmp_path / "a"]) == []
    (note,) = origins.machine_notes([tmp_path / "a", tmp_path / "b"])
    assert note.startswith("the runs had more than one device: ") and "NVIDIA H100" in note and note.count(" cores") == 1


@pytest.mark.slow
def test_fine_tuning_comparison_keeps_finished_runs(shards, tmp_path, capsys, monkeypatch):
    assert run_train(shards, tmp_path / "base", "--pos", "rope", "--max-steps", 4) == 0
    flags = shlex.join(
        [*TINY[8:], "--init-from", str(tmp_path / "base"), "--data-dir", str(shards), "--val-every", "0", "--max-steps", "4"]
    )
    argv = ["tuned=", "window=--window 8", f"--flags={flags}", "--out-dir", tmp_path / "out", "--seeds", 1]
    monkeypatch.setattr(runs, "launch", lambda argv, env: Finished(forked(tmp_path, "train", *argv)))
    assert run_main(compare.main, *argv) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(runs, "launch", None)
    assert run_main(compare.main, *argv) == 0
    again = capsys.readouterr().out
    assert again.startswith("variant ") and first.endswith(again)
    assert run_train(shards, tmp_path / "base", "--resume", "--max-steps", 6) == 0
    assert run_main(compare.main, *argv) == 2
    assert f"{tmp_path}/out/tuned/1 started from other weights than {tmp_path}/base has now, " in capsys.readouterr().err
    assert run_main(compare.main, *argv[:1], "window=--window 9", *argv[2:]) == 2
    assert "window: window 9 does not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_another_teacher_is_another_run(shards, tmp_path, capsys, monkeypatch):
    for name in ("base", "other"):
        assert run_train(shards, tmp_path / name, "--max-steps", 2, "--val-every", 0) == 0
    flags = shlex.join([*TINY, "--data-dir", str(shards), "--val-every", "0", "--max-steps", "4"])
    argv = [f"--flags={flags}", "--out-dir", tmp_path / "out", "--seeds", 1]
    monkeypatch.setattr(runs, "launch", lambda argv, env: Finished(forked(tmp_path, "train", *argv)))
    assert run_main(compare.main, f"taught=--teacher {tmp_path}/base", *argv) == 0
    monkeypatch.setattr(runs, "launch", None)
    assert run_main(compare.main, f"taught=--teacher {tmp_path}/base/", *argv) == 0
    taught, load_teachers = [], measure.load_teachers
    monkeypatch.setattr(measure, "load_teachers", lambda config: taught.append(config.teacher) or load_teachers(config))
    steps, update = [], measure.Trainer.update
    monkeypatch.setattr(measure.Trainer, "update", lambda self, step: steps.append(step) or update(self, step))
    assert run_main(compare.main, f"taught=--teacher {tmp_path}/base", *argv, "--time-steps", 5) == 0
    assert len(taught) == 1 and len(steps) == 10 and max(steps) == 3
    assert run_main(compare.main, f"taught=--teacher {tmp_path}/other", *argv) == 2
    assert f"taught: teacher '{tmp_path}/other/model_00002.pt' does not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_script_shows_the_error_of_a_run(shards, tmp_path):
    result = script("lab.compare", "a=--preset quickstart --data-dir nowhere", "--out-dir", tmp_path, "--seeds", 1)
    assert result.returncode == 2 and "the folder nowhere does not exist" in result.stderr.splitlines()[-1]
