"""Compares evaluate.py with lm-evaluation-harness, and with a plain loop: one row at a time, all logits, one softmax."""

import json
import math
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import forked, read_stream, run_main, run_train, save_checkpoint
from made_up_tasks import core_files, write_core, write_tasks

import evaluate
from checkpoint import load_model
from common.distributed import DistContext
from common.tokenizer import get_tokenizer
from export import save_tokenizer
from model import GPT
from tasks.judging import Task, answer_bytes, figures, group_figures, judge, points, trees_of
from tasks.readers import read_tasks
from tasks.scoring import Scored, Scorer
from training.flags import parse_config
from training.plan import evaluation_tokens
from variants import VariantConfig, build

WORLD, BYTES = DistContext(torch.device("cpu")), get_tokenizer("bytes")


def random_model(seq_len: int = 320, std: float = 0.15, **switches) -> GPT:
    """A model with random weights, large enough that answers differ."""
    torch.manual_seed(0)
    model = build(VariantConfig(257, seq_len, 2, 2, 32, **switches))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def passages(given: list[str]) -> list[str]:
    return [json.loads(line)["text"] for line in Path(given[0].partition("=")[2]).read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(given) -> GPT:
    """A model that learned three passages by heart. So it finds some last words."""
    torch.set_num_threads(1)
    model = random_model(160, 0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        for text in passages(given)[:3]:
            ids = torch.tensor([list(text.encode())])
            model(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def judged(model: GPT, given, limit: int = 0, batch_tokens: int = 0) -> dict[str, tuple[dict, list[dict]]]:
    """Task → its figures and answers."""
    seq_len = model.config.seq_len
    tasks = read_tasks(tuple(given), BYTES, seq_len, limit)
    found = judge(Scorer(model, WORLD, batch_tokens), tasks, BYTES, seq_len)
    return {name: (result, answered) for name, result, answered in found}


# ---- the plain loop ----


@torch.no_grad()
def plain(model: GPT, ids: list[int], scored: int) -> tuple[list[float], bool]:
    """Log-probabilities of the last ids, and whether all are the model's first choice."""
    logits = model(torch.tensor([ids[:-1]]))[0][0]  # (T, V)
    log_p = F.log_softmax(logits.double(), -1)[range(len(ids) - 1 - scored, len(ids) - 1), ids[-scored:]]
    return log_p.tolist(), logits.argmax(-1)[-scored:].tolist() == ids[-scored:]


def prompt(name: str, item: dict, delimiter: str, examples: list[dict], choice: int | None, with_answer: bool = True) -> str:
    """CORE's prompt, as its reference builds it with templates."""
    text = ""
    for example, pick in [*((example, example.get("gold", 0)) for example in examples), (item, choice)]:
        if name == "picks":
            text += example["query"] + delimiter + example["choices"][pick]
        elif name == "pronouns":
            text += example["context_options"][pick] + delimiter + example["continuation"]
        else:
            text += example["context"].strip() + delimiter + (example["continuation"] if with_answer or example is not item else "")
        text += "" if example is item else "\n\n"
    return text if with_answer else text.strip()


def plain_core(model: GPT, name: str, shots: int, delimiter: str, limit: int = 0) -> list[float]:
    """The points of each question of a made-up CORE task."""
    items = next(rows for file, rows in core_files().items() if name in file)
    random.Random(1337).shuffle(items)
    found = []
    for number, item in enumerate(items[: limit or None]):
        others = [i for i in range(len(items)) if i != number]
        examples = [items[i] for i in random.Random(1234 + number).sample(others, shots)]
        count = len(item.get("choices", item.get("context_options", [0])))
        rows = [[256, *prompt(name, item, delimiter, examples, choice).encode()] for choice in range(count)]
        if name == "words":
            start = 1 + len(prompt(name, item, delimiter, examples, 0, with_answer=False).encode())
            found.append(float(plain(model, rows[0], len(rows[0]) - start)[1]))
            continue
        step = 1 if name == "picks" else -1
        same = next(n for n, ids in enumerate(zip(*(row[::step] for row in rows), strict=False)) if len(set(ids)) > 1)
        means = [np.mean(plain(model, row, len(row) - same if name == "picks" else same)[0]) for row in rows]
        found.append(float(np.argmax(means) == item["gold"]))
    return found


CORE_TASKS = [("picks", 2, "\nAnswer: "), ("picks_zeroshot", 0, " "), ("pronouns", 1, " "), ("words", 3, " ")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots", "delimiter"), CORE_TASKS)
def test_core_types_match_plain_loop(model, given, name, shots, delimiter):
    result, answered = judged(model, given[1:2])[f"core/{name}"]
    expected = plain_core(model, name.removesuffix("_zeroshot"), shots, delimiter)
    assert [entry["points"] for entry in answered] == expected
    chance = {"picks": 0.25, "pronouns": 0.5}.get(name.removesuffix("_zeroshot"), 0.0)
    assert result["acc"] == pytest.approx(np.mean(expected))
    assert result["centered"] == pytest.approx((np.mean(expected) - chance) / (1 - chance))


@pytest.mark.slow
def test_greedy_answers_match_plain_loop(taught, given):
    result, answered = judged(taught, given[:1])["lambada"]
    nats = []
    for text, entry in zip(passages(given), answered, strict=True):
        word = text[len(text.rpartition(" ")[0].rstrip()) :].encode()
        log_p, greedy = plain(taught, list(text.encode()), len(word))
        assert entry["points"] == greedy and entry["log_probs"] == pytest.approx([sum(log_p)], abs=1e-3)
        assert (entry["tokens"], entry["bytes"]) == ([len(word)], [len(word)])
        nats.append(-sum(log_p))
    assert 0 < result["acc"] < 1
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(entry["bytes"][0] for entry in answered), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("switches", [{}, dict(pos="rope", short_conv=4, bigram=500)])
def test_long_choices_lose_their_own_start(tmp_path, switches):
    """Each choice keeps the last 60 ids, as if it were alone. CORE leaves one position of the model unused."""
    model = random_model(60, **switches)
    write_core(tmp_path / "bundle", unpacked=True)
    for name, _, delimiter in CORE_TASKS[:1]:
        answered = judged(model, [f"core={tmp_path}/bundle"])[f"core/{name}"][1]
        items = core_files()["world/picks.jsonl"]
        random.Random(1337).shuffle(items)
        for number, (item, entry) in enumerate(zip(items, answered, strict=True)):
            others = [i for i in range(len(items)) if i != number]
            examples = [items[i] for i in random.Random(1234 + number).sample(others, 2)]
            for choice, log_p in enumerate(entry["log_probs"]):
                row = [256, *prompt(name, item, delimiter, examples, choice).encode()]
                assert log_p == pytest.approx(sum(plain(model, row[-60:], entry["tokens"][choice])[0]), abs=1e-3)


@pytest.mark.slow
def test_text_bits_match_perplexity(model, tmp_path, capsys):
    import perplexity

    model.save_pretrained(tmp_path / "hf")
    assert run_main(perplexity.main, "README.md", "-m", tmp_path / "hf", "-d", "cpu", "--json") == 0
    (expected,) = json.loads(capsys.readouterr().out)
    result, answered = judged(model, ["text=README.md"])["text/README.md"]
    assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6) and result["n"] == len(answered)
    assert sum(entry["tokens"][0] for entry in answered) == expected["tokens"]


@pytest.mark.slow
def test_batch_size_changes_no_points(model, given):
    one, many = judged(model, given, batch_tokens=1), judged(model, given, batch_tokens=10**6)
    for name, (_, answered) in one.items():
        assert [entry["points"] for entry in answered] == [entry["points"] for entry in many[name][1]]


# ---- lm-evaluation-harness ----


def harness_answers(folder: Path, task: dict) -> list[dict]:
    """lm-evaluation-harness's answers on a saved Hugging Face model: log_probs and points of each question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=8)
    ours_only = TaskManager(include_defaults=False)  # else it reads 14,000 files
    samples = simple_evaluate(lm, tasks=[task], task_manager=ours_only, log_samples=True, bootstrap_iters=0)["samples"][task["task"]]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [{"log_probs": [found[0] for found in sample["filtered_resps"]], "points": float(sample["acc"])} for sample in samples]


def like_harness(task: str, file: Path) -> dict:
    """One of the harness's own tasks (a .yaml in its package), read from a local file."""
    import lm_eval.tasks
    import yaml

    config = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / task).read_text())
    config = {key: config[key] for key in ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice") if key in config}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(file)}}, "validation_split": "validation"}
    return config | data | {"task": f"local_{file.stem}", "metric_list": [{"metric": "acc"}]}


@pytest.mark.slow
def test_lambada_and_blimp_match_lm_evaluation_harness(tmp_path, taught, given):
    taught.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    save_tokenizer(tokenizer, tmp_path, model.config.seq_len)
    ours, folder = judged(model, [given[0], given[2]]), Path(given[2].partition("=")[2])
    files = {"lambada": ("lambada/lambada_openai.yaml", Path(given[0].partition("=")[2]))}
    files |= {f"blimp/{name}": ("blimp/_template_yaml", folder / "data" / f"{name}.jsonl") for name in ("adjunct_island", "wh_island")}
    for name, (task, file) in files.items():
        theirs = harness_answers(tmp_path, like_harness(task, file))
        assert len(theirs) == len(ours[name][1]) > 0
        for mine, other in zip(ours[name][1], theirs, strict=True):
            assert mine["log_probs"] == pytest.approx(other["log_probs"], rel=1e-4, abs=1e-4)
            assert mine["points"] == other["points"]
        assert {entry["points"] for entry in ours[name][1]} == {0.0, 1.0}


# ---- figures ----


def made_up_answers(n: int, rule: str, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    nats, sizes = rng.gamma(4.0, 0.5, n), rng.integers(2, 12, n)
    log_probs = [[-float(x * size / 3), -9.0] for x, size in zip(nats, sizes, strict=True)]
    points = (rng.random(n) < 0.3).astype(float) if rule != "sum" else rng.choice([0.0, 0.5, 1.0], n)
    return [
        {"label": 0, "points": float(p), "log_probs": log_p, "bytes": [int(size), 3]}
        for p, log_p, size in zip(points, log_probs, sizes, strict=True)
    ]


@pytest.mark.parametrize(("name", "rule"), [("lambada", "greedy"), ("core/copa", "mean"), ("blimp/x", "sum"), ("text/a.txt", "text")])
def test_standard_errors_match_a_bootstrap(name, rule):
    answered, rng = made_up_answers(400, rule, 0), np.random.default_rng(1)
    result = figures(Task(name, rule, [0] * 400, None, chance=0.5 * name.startswith("core/")), answered)
    nats = np.array([-entry["log_probs"][0] for entry in answered])
    sizes, points = np.array([entry["bytes"][0] for entry in answered]), np.array([entry["points"] for entry in answered])
    drawn = rng.integers(0, 400, (1500, 400))
    samples = {
        "acc": points[drawn].mean(1),
        "centered": points[drawn].mean(1) / 0.5,
        "perplexity": np.exp(nats[drawn].mean(1)),
        "bits_per_byte": nats[drawn].sum(1) / sizes[drawn].sum(1),
    }
    errors = {key.removesuffix("_stderr"): value for key, value in result.items() if key.endswith("_stderr")}
    assert errors.keys() >= ({"bits_per_byte"} if rule == "text" else {"acc", "bits_per_byte"})
    for key, error in errors.items():
        scale = 1 / math.log(2) if key == "bits_per_byte" else 1
        assert error == pytest.approx(samples[key].std() * scale, rel=0.1)


def test_error_of_a_mean_matches_a_bootstrap():
    """Over three tasks of different sizes and chance levels."""
    sizes, rng = {"a": 50, "b": 300, "c": 1000}, np.random.default_rng(2)
    answered = {name: made_up_answers(n, "mean", n) for name, n in sizes.items()}
    tasks = {name: Task(f"core/{name}", "mean", [0] * n, None, chance=0.25) for name, n in sizes.items()}
    mean = group_figures({f"core/{name}": figures(tasks[name], answered[name]) for name in sizes})["core"]
    points = {name: np.array([entry["points"] for entry in entries]) for name, entries in answered.items()}
    drawn = [np.mean([(x[rng.integers(0, len(x), len(x))].mean() - 0.25) / 0.75 for x in points.values()]) for _ in range(1500)]
    assert mean["centered_stderr"] == pytest.approx(np.std(drawn), rel=0.1) and mean["n"] == 1350
    assert mean["centered"] == pytest.approx(np.mean([(x.mean() - 0.25) / 0.75 for x in points.values()]))


@pytest.mark.parametrize(
    ("rule", "log_p", "counts", "expected"),
    [
        ("sum", [-2.0, -3.0], [1, 9], 1.0),
        ("sum", [-3.0, -3.0], [1, 9], 0.5),
        ("sum", [-4.0, -3.0], [1, 9], 0.0),
        ("mean", [-2.0, -3.0], [1, 9], 0.0),
        ("mean", [-2.0, -4.0, -6.0], [1, 2, 3], 1 / 3),
        ("text", [-2.0], [1], None),
    ],
)
def test_choices_that_tie_share_a_point(rule, log_p, counts, expected):
    assert points(rule, 0, Scored(log_p, [False] * len(log_p), counts, counts)) == expected


def test_bytes_are_those_of_scored_tokens():
    """An answer longer than the model's sequence counts only what the model predicts."""
    (tree,) = trees_of([(list(b"0123456789"), 8)], BYTES, 5)
    assert (tree.counts, tree.lengths, bytes(tree.targets.tolist())) == ([5], [5], b"56789")


def test_endoftext_has_no_bytes(gpt2_tokenizer):
    for tokenizer in (gpt2_tokenizer, BYTES):
        assert answer_bytes([tokenizer.eot, *tokenizer.encode("é 你好"), tokenizer.eot], tokenizer) == len("é 你好".encode())


def test_limit_keeps_prompts(given):
    """The first questions, with the same examples as without a limit."""
    every, few = (read_tasks(tuple(given), BYTES, 320, limit) for limit in (0, 4))
    assert [len(task.gold) for task in few] == [4] * len(few) and len(few) == 7
    for mine, theirs in zip(few, every, strict=True):
        assert mine.gold == theirs.gold[:4]
        assert [mine.choices(i, BYTES) for i in range(4)] == [theirs.choices(i, BYTES) for i in range(4)]


def test_lines_of_the_table_fit():
    result = {"n": 10_042, "acc": 0.123456, "acc_stderr": 0.01, "bits_per_byte": 12.34567, "bits_per_byte_stderr": 0.01}
    for more in ({"centered": -0.12345, "centered_stderr": 0.01}, {"perplexity": 1234567.8, "perplexity_stderr": 99999.9}):
        text = evaluate.line("core/" + "long_name_" * 5, result | more)
        assert len(text) <= 100 and "10,042  0.1235 ± 0.0100" in text
    assert evaluate.line("text/a", {"n": 1, "bits_per_byte": 1.0, "bits_per_byte_stderr": math.nan}).endswith("1.0000 ± nan")


# ---- the script ----


@pytest.mark.slow
def test_script_prints_and_writes_all_tasks(model, given, tmp_path, capsys):
    model.save_pretrained(tmp_path / "hf")
    argv = ["-m", tmp_path / "hf", "-d", "cpu", "--tasks", *given, "text=README.md", "--out", tmp_path / "out.jsonl"]
    assert run_main(evaluate.main, *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    names = "lambada core/picks core/picks_zeroshot core/pronouns core/words blimp/adjunct_island blimp/wh_island text/README.md".split()
    assert [line.split()[0] for line in lines] == ["task", *names, "core,", "blimp,"] and max(map(len, lines)) <= 100
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(entry["task"] for entry in entries)) == names
    blimp = [entry["points"] for entry in entries if entry["task"] == "blimp/wh_island"]
    assert f"blimp/wh_island {len(blimp):>22}  {np.mean(blimp):.4f} ±" in "\n".join(lines)
    assert run_main(evaluate.main, *argv, "--json", "--dtype", "bf16", "--limit", 3) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["tasks"]) == names and found["tasks"]["lambada"]["n"] == 3 and found["groups"]["core"]["n"] == 12


@pytest.mark.slow
def test_two_processes_give_the_same_answers(model, given, tmp_path):
    model.save_pretrained(tmp_path / "hf")
    outs = []
    for processes in (0, 2):
        argv = ["-m", tmp_path / "hf", "-d", "cpu", "--tasks", *given, "--limit", 5, "--out", tmp_path / f"{processes}.jsonl"]
        result = forked(tmp_path, "evaluate", *argv, processes=processes)
        assert result.returncode == 0, result.stderr
        entries = [json.loads(line) for line in (tmp_path / f"{processes}.jsonl").read_text().splitlines()]
        outs.append((re.sub(r" ± \S+|\d\d  ", "", result.stdout)[:200], [(e["task"], e["ind"], e["points"]) for e in entries]))
    assert outs[0] == outs[1] and len(outs[0][1]) == 35


URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no --tasks: pass at least one, such as lambada=lambada_test.jsonl"),
        (["mmlu=x", "lambada"], "--tasks mmlu=x: choose lambada, core, blimp, text"),
        (["lambada=a", "lambada=b"], "--tasks has lambada twice: drop one"),
        (["lambada=a b.jsonl", "core=c.zip"], "error: no file a b.jsonl: curl -Lo 'a b.jsonl' https://openaipublic"),
        (["core=c.zip"], f"no file c.zip: curl -Lo c.zip {URL} fetches it"),
        (["blimp=none"], "no file none: git clone https://github.com/alexwarstadt/blimp none fetches it"),
        (["text=none.txt"], "no file none.txt: pass a text file"),
        (["lambada=EMPTY"], "lambada has no questions"),
        (["lambada=HTML"], "line 1: not a question of this task"),
        (["blimp=EMPTYDIR"], "has no .jsonl files: git clone https://github.com/alexwarstadt/blimp"),
        (["core=HTML"], "is no complete evaluation bundle (BadZipFile: File is not a zip file): curl -Lo"),
        (["text=EMPTY"], "text/empty has no questions"),
    ],
)
def test_wrong_tasks_are_one_line(tmp_path, monkeypatch, capsys, tasks, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "html").write_text("<html>404</html>\n")
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = save_checkpoint(tmp_path, 1, build(VariantConfig(257, 16, 1, 1, 8)), "bytes", None, {})
    tasks = [task.replace("EMPTYDIR", "dir").replace("EMPTY", "empty").replace("HTML", "html") for task in tasks]
    assert run_main(evaluate.main, "-m", saved, "-d", "cpu", "--tasks", *tasks) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("core.yaml", "icl_tasks:", "icl_tasks: {", "core.zip is no complete evaluation bundle (ParserError"),
        ("core.yaml", "schema", "other", "unknown settings of pronouns"),
        ("core.yaml", "[3]", "[9]", "words has 9 questions, too few for 9 examples"),
        ("core.yaml", "world/picks", "world/none", "is no complete evaluation bundle (FileNotFoundError"),
        ("eval_meta_data.csv", "words,", "others,", "is no complete evaluation bundle (KeyError: 'words')"),
        ("eval_data/language/words.jsonl", '"context"', '"contexts"', "core.zip, language/words.jsonl, line 1: not a question"),
        ("eval_data/world/picks.jsonl", '"gold": ', '"gold": 9', "core.zip, world/picks.jsonl, line 1: not a question"),
    ],
)
def test_damaged_bundle_is_one_line(tmp_path, name, old, new, message):
    write_core(tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as whole, zipfile.ZipFile(tmp_path / "core.zip", "w") as damaged:
        for entry in whole.namelist():
            text = whole.read(entry).decode()
            damaged.writestr(entry, text.replace(old, new) if entry == f"eval_bundle/{name}" else text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_tasks((f"core={tmp_path}/core.zip",), BYTES, 320)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---- during training ----


@pytest.mark.slow
def test_tasks_during_a_run(shards, given, tmp_path, capsys):
    """A line for each group in the log and in the metrics. The figures are evaluate.py's."""
    run = tmp_path / "run"
    argv = ["--eval-every", 15, "--eval-tasks", *given, "text=README.md", "--eval-limit", 4]
    assert run_train(shards, run, *argv) == 0
    out = capsys.readouterr().out
    assert run_main(evaluate.main, "-m", run, "-d", "cpu", "--tasks", *given, "text=README.md", "--limit", 4, "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for group, key in {"lambada": "acc", "core": "centered", "blimp": "acc", "text": "bits_per_byte"}.items():
        values = read_stream(run, group)
        assert list(values) == [0, 15, 20]
        row = next(row for row in rows if row["step"] == 20 and f"{group}_{key}" in row)
        assert values[20] == f"{row[f'{group}_{key}']:.6f}" and row["tokens"] == 20 * 256
        assert row[f"{group}_{key}"] == pytest.approx(expected["groups"][group][key], rel=1e-5)
        assert f"step 20: {group} {key} {row[f'{group}_{key}']:.4f} ± " in out
    assert row["text/README.md_bits_per_byte"] == row["text_bits_per_byte"]


@pytest.mark.slow
def test_tasks_change_no_weight(shards, given, tmp_path):
    """Nor does a resume after an evaluation, on two processes and with fewer tasks."""
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    assert run_train(shards, quiet, "--checkpoint-every", 10) == 0
    flags = ["--eval-every", 5, "--eval-tasks", *given, "--eval-limit", 2, "--checkpoint-every", 10]
    assert run_train(shards, loud, *flags) == 0
    assert read_stream(loud, "train") == read_stream(quiet, "train")
    before = read_stream(loud, "core")
    [path.unlink() for path in loud.glob("model_00020.*")]
    result = forked(tmp_path, "train", "--resume", "--out-dir", loud, "--eval-tasks", *given[1:2], processes=2)
    assert result.returncode == 0, result.stderr
    assert list(read_stream(loud, "core")) == list(before) == [0, 5, 10, 15, 20]
    assert max(abs(float(read_stream(loud, "train")[s]) - float(read_stream(quiet, "train")[s])) for s in range(20)) <= 1e-5


@pytest.mark.slow
def test_damaged_tasks_are_a_warning(shards, tmp_path, capsys):
    (tmp_path / "odd.zip").write_text("<html>")
    assert run_train(shards, tmp_path / "run", "--max-steps", 2, "--eval-every", 1, "--eval-tasks", f"core={tmp_path}/odd.zip") == 0
    assert "warning: no --eval-tasks in this run: " in capsys.readouterr().err
    assert read_stream(tmp_path / "run", "core") == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval-every", 5], "--eval-every needs --eval-tasks, such as lambada=lambada_test.jsonl"),
        (["--eval-every", 5, "--eval-tasks", "mmlu=x"], "--eval-tasks mmlu=x: choose lambada"),
        (["--eval-every", 5, "--eval-tasks", "core=none.zip"], f"no file none.zip: curl -Lo none.zip {URL} fetches it"),
    ],
)
def test_wrong_eval_tasks_end_the_run(shards, tmp_path, capsys, argv, message):
    assert run_train(shards, tmp_path / "run", *argv) == 2
    assert message in capsys.readouterr().err


def test_plan_estimates_tokens_from_a_sample(given, tmp_path):
    argv = ["--vocab-size", "257", "--seq-len", "320", "--eval-every", "5", "--eval-tasks", *given, "--out-dir", str(tmp_path)]
    config = parse_config(["--plan", *argv])
    everything = evaluation_tokens(config, sample=1000)
    assert everything == pytest.approx(evaluation_tokens(config, sample=6), rel=0.2) and everything > 5000
