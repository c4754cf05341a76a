"""Compares scores with lm-evaluation-harness on the same model, and with one plain forward pass per row."""

import errno
import json
import os
import re
import statistics
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from conftest import THOROUGH, forked, make_tasks, run_main, save_checkpoint
from test_fineweb import disk_of, the_error

import hellaswag
from checkpoint import load_model
from common.distributed import DistContext
from common.tokenizer import get_tokenizer
from export import save_tokenizer
from hellaswag import clean, completion_rows, evaluate, harness_rows, load_tasks
from model import GPT
from tasks.scoring import merge_rows, score_trees
from variants import VariantConfig, build

WORLD = DistContext(torch.device("cpu"))


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in make_tasks(40)))
    return path


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model with random weights, large enough that the four endings differ."""
    torch.manual_seed(0)
    model = build(VariantConfig(257, 320, 2, 2, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval()


def harness_answers(folder: Path, tasks_file: Path) -> list[tuple[int, int, list[float]]]:
    """(pred, pred_norm, log p) per task, from lm-evaluation-harness's own requests and metrics on a saved Hugging Face model."""
    import numpy as np
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.hellaswag.utils import process_docs

    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=8)
    task = {
        "task": "hellaswag_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tasks_file)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    ours_only = TaskManager(include_defaults=False)  # else it reads 14,000 files
    samples = simple_evaluate(lm, tasks=[task], task_manager=ours_only, log_samples=True, bootstrap_iters=0)["samples"]["hellaswag_local"]
    result = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        log_p = [response[0] for response in sample["filtered_resps"]]
        per_char = [p / len(choice) for p, choice in zip(log_p, sample["doc"]["choices"], strict=True)]
        pred, pred_norm = int(np.argmax(log_p)), int(np.argmax(per_char))
        gold = sample["doc"]["gold"]
        assert (sample["acc"], sample["acc_norm"]) == (pred == gold, pred_norm == gold)  # the harness agrees
        result.append((pred, pred_norm, log_p))
    return result


def assert_equal_to_harness(folder: Path, tasks_file: Path):
    model, tokenizer = load_model(str(folder))
    save_tokenizer(tokenizer, folder, model.config.seq_len)
    theirs = harness_answers(folder, tasks_file)
    ours = evaluate(model, tokenizer, load_tasks(tasks_file), WORLD)[1]
    assert len(ours) == len(theirs)
    for task, (pred, pred_norm, log_p) in zip(ours, theirs, strict=True):
        assert (task["harness"]["pred"], task["harness"]["pred_norm"]) == (pred, pred_norm)
        assert task["harness"]["log_probs"] == pytest.approx(log_p, rel=1e-4, abs=1e-4)
    assert len({pred for pred, *_ in theirs}) == 4  # the model picks each ending somewhere


@pytest.mark.slow
def test_answers_match_lm_evaluation_harness(tmp_path, model, tasks_file):
    model.save_pretrained(tmp_path)
    assert_equal_to_harness(tmp_path, tasks_file)


@pytest.mark.slow
def test_real_answers_match_lm_evaluation_harness(tmp_path, gpt2_tokenizer):
    """Real tasks and GPT-2's vocabulary. HELLASWAG_FILE is a file with at least 2,000 tasks."""
    if "HELLASWAG_FILE" not in os.environ:
        pytest.skip("HELLASWAG_FILE is not set to HellaSwag's validation set")
    lines = Path(os.environ["HELLASWAG_FILE"]).read_text().splitlines()
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines[:: 8 if THOROUGH else 25][:250]) + "\n")
    torch.manual_seed(0)
    model = build(VariantConfig(50257, 256, 2, 2, 64))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    assert_equal_to_harness(tmp_path, tmp_path / "tasks.jsonl")


# ---- the formula ----


def test_log_probs_match_plain_forward_passes(model):
    """One row at a time, without padding or sorting. In completion style, acc_norm is the mean per token."""
    tokenizer = get_tokenizer("bytes")
    for task, scored in zip(make_tasks(6), evaluate(model, tokenizer, make_tasks(6), WORLD)[1], strict=True):
        context = tokenizer.encode(task["ctx"])
        sums, means = [], []
        for ending in task["endings"]:
            completion = tokenizer.encode(" " + ending)
            ids = torch.tensor([context + completion])
            log_p = F.log_softmax(model(ids)[0][0], -1)[len(context) - 1 : -1]
            picked = log_p[range(len(completion)), completion]
            sums.append(picked.sum().item())
            means.append(picked.mean().item())
        assert scored["completion"]["log_probs"] == pytest.approx(sums, abs=1e-3)
        assert scored["completion"]["pred"] == sums.index(max(sums))
        assert scored["completion"]["pred_norm"] == means.index(max(means))


def test_batch_size_changes_no_answer(model):
    tokenizer, tasks = get_tokenizer("bytes"), make_tasks(20)
    one, some, all_at_once = (evaluate(model, tokenizer, tasks, WORLD, batch_tokens) for batch_tokens in (1, 700, 10**6))
    for (scores, tasks), (other_scores, other_tasks) in ((one, some), (one, all_at_once)):
        assert scores == other_scores
        for p, q in zip(tasks, other_tasks, strict=True):
            assert p["completion"]["log_probs"] == pytest.approx(q["completion"]["log_probs"], abs=1e-3)
            assert p["completion"]["pred_norm"] == q["completion"]["pred_norm"]


@pytest.mark.parametrize("switches", [{}, dict(pos="rope", short_conv=4, key_offset=True, bigram=500)])
def test_too_long_rows_lose_their_start(switches):
    torch.manual_seed(0)
    model = build(VariantConfig(257, 16, 1, 2, 16, **switches)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    rows = [completion_rows(task, get_tokenizer("bytes")) for task in make_tasks(3)]
    scores = [tree.log_p for tree in score_trees(model, [merge_rows(group, 16) for group in rows], 4096)]
    for row, log_p in ((row, p) for group, ps in zip(rows, scores, strict=True) for row, p in zip(group, ps, strict=True)):
        ids, n = row.ids[-17:], min(row.scored, 16)
        expected = F.log_softmax(model(torch.tensor([ids[:-1]]))[0][0], -1)[torch.arange(16 - n, 16), ids[-n:]].sum()
        assert log_p == pytest.approx(expected.item(), abs=1e-3)


def test_losses_are_not_in_bf16(model, monkeypatch):
    """Under bf16 autocast, the log-probabilities match fp64 on the same logits."""
    cross_entropy, expected = F.cross_entropy, []

    def recording(logits, targets, **options):
        expected.append(F.log_softmax(logits.double(), -1)[range(len(targets)), targets].sum().item())
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(F, "cross_entropy", recording)
    scored = evaluate(model, get_tokenizer("bytes"), make_tasks(4), WORLD, autocast=torch.autocast("cpu", torch.bfloat16))[1]
    values = [p for task in scored for style in ("completion", "harness") for p in task[style]["log_probs"]]
    assert sum(values) == pytest.approx(sum(expected), rel=1e-6)


def test_diverged_model_is_not_scored():
    model = build(VariantConfig(257, 320, 1, 1, 8))
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="its training diverged"):
        evaluate(model, get_tokenizer("bytes"), make_tasks(2), WORLD)


def test_text_is_cleaned_as_in_harness():
    assert clean(" How to boil [title] Take water. [step] Heat  it [substeps]") == "How to boil. Take water. Heat it "
    row = harness_rows(
        {**make_tasks(1)[0], "activity_label": "X", "ctx_a": "A man.", "ctx_b": "he", "endings": ["runs"] * 4}, get_tokenizer("bytes")
    )[0]
    assert bytes(row.ids) == b"X: A man. He runs" and (row.scored, row.length) == (5, 4)


# ---- the script ----


def test_full_disk_costs_no_scores(model, tasks_file, tmp_path, monkeypatch, capsys):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(hellaswag, "write_atomically", full)
    argv = ["-m", tmp_path / "hf", "-d", "cpu", "--file", tasks_file, "--limit", 2, "--out", tmp_path / "out.jsonl"]
    assert run_main(hellaswag.main, *argv) != 0
    out, err = capsys.readouterr()
    assert "2 acc: " in out and err.count("error: ") == 1


def test_script_reports_both_styles(model, tasks_file, tmp_path, capsys):
    model.save_pretrained(tmp_path / "hf")
    argv = ["-m", tmp_path / "hf", "-d", "cpu", "--file", tasks_file, "--out", tmp_path / "out.jsonl"]
    assert run_main(hellaswag.main, *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    def accuracy(style, pred):
        return sum(row[style][pred] == row["label"] for row in rows) / 40

    first, *lines = lines
    assert lines == [
        f"40 acc: {accuracy('completion', 'pred'):.4f} acc_norm: {accuracy('completion', 'pred_norm'):.4f}",
        f"40 harness_acc: {accuracy('harness', 'pred'):.4f} harness_acc_norm: {accuracy('harness', 'pred_norm'):.4f}",
    ]
    shown = float(re.fullmatch(r"HellaSwag's validation set: 40 tasks, standard error of a score about (0\.\d{4})", first)[1])
    points = [[row[style][pred] == row["label"] for row in rows] for style in ("completion", "harness") for pred in ("pred", "pred_norm")]
    assert shown == pytest.approx(max(statistics.stdev(map(float, each)) for each in points) / 40**0.5, abs=5e-5)
    assert run_main(hellaswag.main, *argv, "--limit", 7) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("7 acc: ")
    assert run_main(hellaswag.main, *argv, "--style", "harness", "--batch-tokens", 300) == 0
    assert capsys.readouterr().out.splitlines()[1:] == lines[1:]
    assert run_main(hellaswag.main, *argv, "--dtype", "bf16") == 0
    bf16 = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert bf16 != rows and all(
        p["completion"]["log_probs"] == pytest.approx(q["completion"]["log_probs"], rel=0.05) for p, q in zip(bf16, rows, strict=True)
    )


def test_two_processes_give_the_same_answers(model, tasks_file, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    outs = []
    for processes in (0, 2):
        argv = ["-m", tmp_path / "hf", "-d", "cpu", "--file", tasks_file, "--limit", 15, "--out", tmp_path / f"{processes}.jsonl"]
        result = forked(tmp_path, "hellaswag", *argv, processes=processes)
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in (tmp_path / f"{processes}.jsonl").read_text().splitlines()]
        outs.append((result.stdout, [(row["ind"], row["harness"]["pred_norm"], row["completion"]["pred"]) for row in rows]))
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        ("", "has no tasks"),
        ("<html>404</html>\n", "line 1: not a HellaSwag task; pass HellaSwag's hellaswag_val.jsonl"),
        (json.dumps({"ctx": "a", "endings": ["b"], "label": 0}) + "\n", "line 1: not a HellaSwag task"),
        (json.dumps(make_tasks(1)[0] | {"label": 4}) + "\n", "line 1: not a HellaSwag task"),
    ],
)
def test_wrong_file_is_one_line(model, tmp_path, capsys, text, message):
    path = tmp_path / "tasks.jsonl"
    if text is not None:
        path.write_text(text)
    saved = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    assert run_main(hellaswag.main, "-m", saved, "-d", "cpu", "--file", path) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_missing_model_fails_before_download(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "download", lambda url, path: pytest.fail("downloaded"))
    assert run_main(hellaswag.main, "-m", "nope", "-d", "cpu") == 2
    assert "no model named 'nope'" in capsys.readouterr().err


def test_missing_file_is_reported_before_the_model(tmp_path, capsys):
    assert run_main(hellaswag.main, "-m", "nope", "-d", "cpu", "--file", tmp_path / "none.jsonl") == 2
    assert "none.jsonl: pass HellaSwag's" in capsys.readouterr().err


def test_empty_lines_are_skipped(tasks_file, tmp_path):
    (tmp_path / "tasks.jsonl").write_text("\n" + tasks_file.read_text() + " \n\n")
    assert hellaswag.load_tasks(tmp_path / "tasks.jsonl") == hellaswag.load_tasks(tasks_file)


# ---- the download ----


@contextmanager
def served(monkeypatch, rows: int, cut: bool = False):
    body = json.dumps(make_tasks(1)[0]).encode() + b"\n"
    body *= rows

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/hellaswag_val.jsonl")
    yield
    server.shutdown()


@pytest.mark.parametrize(("rows", "cut", "kept"), [(10_042, False, True), (10_041, False, False), (10_042, True, False)])
def test_incomplete_download_is_not_kept(tmp_path, monkeypatch, rows, cut, kept):
    path = tmp_path / "hellaswag_val.jsonl"
    with served(monkeypatch, rows, cut):
        if kept:
            assert len(load_tasks(path)) == 10_042
        else:
            with pytest.raises(ValueError, match=r"10041 rows instead of 10042|could not download|rows instead of 10042"):
                load_tasks(path)
    assert path.exists() == kept and len(list(tmp_path.iterdir())) == kept


def test_full_disk_during_download_keeps_no_file(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "tasks").mkdir()
    path, saved = tmp_path / "tasks" / "hellaswag_val.jsonl", save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    with served(monkeypatch, 10_042):
        with disk_of(1_000_000):
            assert run_main(hellaswag.main, "-m", saved, "-d", "cpu", "--file", path) == 1
        assert "free some space and run the command again" in the_error(capsys.readouterr().err)
        assert not list(path.parent.iterdir())
        assert len(load_tasks(path)) == 10_042


def test_unreachable_download_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")
    with pytest.raises(ValueError, match="put the file at"):
        load_tasks(tmp_path / "hellaswag_val.jsonl")
