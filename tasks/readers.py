"""Reads the tasks that judge a base model: LAMBADA, BLiMP, the CORE tasks of DCLM, any text.

    lambada=lambada_test.jsonl     OpenAI's version of the test set: {"text": a passage}; predict its last word
    blimp=FOLDER                   BLiMP's repository, or its folder data: {"sentence_good": …, "sentence_bad": …} in each .jsonl
    core=eval_bundle.zip           nanochat's bundle of DCLM's tasks, also unpacked: core.yaml, eval_meta_data.csv, eval_data/
    text=FILE                      as perplexity.py reads it

The rules are those of the references: lm-evaluation-harness for LAMBADA and BLiMP, nanochat's core_eval.py for CORE.
"""

import csv
import random
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.documents import BadRows, How, read_file
from common.files import parse_json
from common.text import shown
from common.tokenizer import Tokenizer
from common.validation import raise_errors

# one choice of a question: all ids of its prompt and answer, and how many of them, counted from the end, are the answer
Choice = tuple[list[int], int]


@dataclass
class Task:
    """Questions of one kind. Holds only text, so that it can be sent to other processes."""

    name: str  # such as lambada or core/copa
    rule: str  # how an answer gets its points: see judging.points
    gold: list[int]  # the right choice of each question
    choices: Callable[[int, Tokenizer], list[Choice]]  # of question i
    chance: float = 0.0  # accuracy of a random guess
    spare: int = 0  # positions of the model to leave unused


# ---- LAMBADA (Paperno et al., 2016) ----


def read_lambada(path: Path, tokenizer: Tokenizer, seq_len: int, limit: int) -> list[Task]:
    is_passage = has_fields(text=lambda text: isinstance(text, str) and " " in text.strip())
    texts = [row["text"] for row in rows_of(path.read_bytes(), path, is_passage)][: limit or None]
    return [Task("lambada", "greedy", [0] * len(texts), partial(lambada_choices, texts))]


def lambada_choices(texts: list[str], i: int, tokenizer: Tokenizer) -> list[Choice]:
    """The last word with the blanks before it. Tokenizes the whole passage, then cuts after as many tokens as the rest alone has."""
    ids, context = tokenizer.encode(texts[i]), texts[i].rpartition(" ")[0].rstrip()
    return [(ids, len(ids) - len(tokenizer.encode(context)))] if context else [([tokenizer.eot, *ids], len(ids))]


# ---- BLiMP (Warstadt et al., 2020) ----


def read_blimp(path: Path, tokenizer: Tokenizer, seq_len: int, limit: int) -> list[Task]:
    files = sorted((path / "data" if (path / "data").is_dir() else path).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path} has no .jsonl files: {remedy('blimp', 'blimp')}")
    tasks, is_pair = [], has_fields(sentence_good=is_text, sentence_bad=is_text)
    for file in files:
        pairs = [(row["sentence_good"], row["sentence_bad"]) for row in rows_of(file.read_bytes(), file, is_pair)][: limit or None]
        tasks.append(Task(f"blimp/{file.stem}", "sum", [0] * len(pairs), partial(blimp_choices, pairs), chance=0.5))
    return tasks


def blimp_choices(pairs: list[tuple[str, str]], i: int, tokenizer: Tokenizer) -> list[Choice]:
    """Both sentences, each after <|endoftext|> and a blank, as in lm-evaluation-harness."""
    rows = [tokenizer.encode(f" {sentence}") for sentence in pairs[i]]
    return [([tokenizer.eot, *ids], len(ids)) for ids in rows]


# ---- CORE (Li et al., 2024) ----


def read_core(path: Path, tokenizer: Tokenizer, seq_len: int, limit: int) -> list[Task]:
    import yaml

    with one_line_if_damaged(path, yaml.YAMLError):
        root = path if path.is_dir() else zipfile.Path(path)
        root = root / "eval_bundle" if (root / "eval_bundle").is_dir() else root
        config = yaml.safe_load((root / "core.yaml").read_text(encoding="utf-8"))
        table = csv.DictReader((root / "eval_meta_data.csv").read_text(encoding="utf-8").splitlines())
        chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
        return [core_task(path, root, entry, chances, limit) for entry in config["icl_tasks"]]


def core_task(path: Path, root, entry: dict, chances: dict[str, float], limit: int) -> Task:
    """Reads the task that an entry of core.yaml describes."""
    label, kind, shots = str(entry["label"]), CORE_KINDS.get(entry["icl_task_type"]), entry["num_fewshot"][0]
    delimiter, file = entry.get("continuation_delimiter", " "), root / "eval_data" / entry["dataset_uri"]
    if not (kind and isinstance(shots, int) and shots >= 0 and isinstance(delimiter, str) and 0 <= chances[label] < 1):
        raise ValueError(f"unknown settings of {label}")
    items = list(rows_of(file.read_bytes(), f"{path}, {entry['dataset_uri']}", kind.valid))
    if len(items) <= shots:
        raise ValueError(f"{label} has {len(items)} questions, too few for {shots} examples in a prompt")
    random.Random(1337).shuffle(items)  # as in nanochat: the examples depend on the order
    gold = [item.get("gold", 0) for item in items][: limit or None]
    return Task(f"core/{label}", kind.rule, gold, partial(core_choices, items, kind, delimiter, shots), chances[label], spare=1)


def core_choices(items: list[dict], kind: "CoreKind", delimiter: str, shots: int, i: int, tokenizer: Tokenizer) -> list[Choice]:
    """The choices of a prompt: <|endoftext|>, solved examples with a blank line after each, the question, the delimiter, an answer."""
    drawn = random.Random(1234 + i).sample(range(len(items) - 1), shots)
    examples = [items[j + (j >= i)] for j in drawn]  # any question except this one
    solved = "".join(kind.texts(item, delimiter)[item.get("gold", 0)] + "\n\n" for item in examples)
    texts = [solved + text for text in kind.texts(items[i], delimiter)]
    rows = [[tokenizer.eot, *tokenizer.encode(text)] for text in texts]
    if kind.rule == "greedy":
        question = texts[0].removesuffix(items[i]["continuation"]).strip()
        return [(rows[0], len(rows[0]) - 1 - len(tokenizer.encode(question)))]
    if kind.same_end:
        same = same_start([row[::-1] for row in rows])
        return [(row, same) for row in rows]
    same = same_start(rows)
    return [(row, len(row) - same) for row in rows]


def same_start(rows: list[list[int]]) -> int:
    """How many ids the rows share at their start."""
    return next((n for n, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), min(map(len, rows)))


class CoreKind(NamedTuple):
    """One of CORE's three types of tasks."""

    rule: str
    valid: Callable[[dict], bool]  # whether a row is a question
    texts: Callable[[dict, str], list[str]]  # a question with each of its answers, without examples
    same_end: bool = False  # the choices are in front of the delimiter, so that their ends are the same tokens; else their starts are


def choice_texts(item: dict, delimiter: str) -> list[str]:
    return [f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]


def schema_texts(item: dict, delimiter: str) -> list[str]:
    return [f"{context}{delimiter}{item['continuation']}" for context in item["context_options"]]


def language_texts(item: dict, delimiter: str) -> list[str]:
    return [f"{item['context'].strip()}{delimiter}{item['continuation']}"]


def has_gold(name: str) -> Callable[[dict], bool]:
    """Whether a row has a list of texts under this name, and the index of the right one."""

    def valid(row: dict) -> bool:
        choices, gold = row.get(name), row.get("gold")
        is_list = isinstance(choices, list) and all(map(is_text, choices))
        return is_list and isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices)

    return valid


def has_fields(**checks: Callable[[object], bool]) -> Callable[[dict], bool]:
    return lambda row: all(check(row.get(name)) for name, check in checks.items())


def is_text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def is_choice_question(row: dict) -> bool:
    return has_gold("choices")(row) and isinstance(row.get("query"), str)


def is_schema_question(row: dict) -> bool:
    return has_gold("context_options")(row) and is_text(row.get("continuation"))


def is_language_question(row: dict) -> bool:
    return isinstance(row.get("context"), str) and is_text(row.get("continuation"))


CORE_KINDS = {
    "multiple_choice": CoreKind("mean", is_choice_question, choice_texts),
    "schema": CoreKind("mean", is_schema_question, schema_texts, same_end=True),
    "language_modeling": CoreKind("greedy", is_language_question, language_texts),
}


# ---- text ----


def read_text(path: Path, tokenizer: Tokenizer, seq_len: int, limit: int) -> list[Task]:
    ids = [i for text in BadRows().good(read_file(path, How())) for i in (tokenizer.eot, *tokenizer.encode(text))]
    windows = list(rows_of_text(ids, seq_len, 0))[: limit or None]
    return [Task(f"text/{shown(path.name)}", "text", [0] * len(windows), partial(text_choices, windows))]


def text_choices(windows: list[Choice], i: int, tokenizer: Tokenizer) -> list[Choice]:
    return [windows[i]]


def rows_of_text(ids: list[int], seq_len: int, stride: int) -> Iterator[Choice]:
    """Yields windows that predict every id except the first once, each from at most seq_len ids. After the first window, all reach
    back as far as the model sees."""
    done, last = 0, len(ids) - 1
    while done < last:
        end = min(last, done + (stride if done and stride else seq_len))
        yield ids[max(0, end - seq_len) : end + 1], end - done
        done = end


# ---- files ----


class Kind(NamedTuple):
    read: Callable[[Path, Tokenizer, int, int], list[Task]]
    remedy: str  # puts the file at PATH


KINDS = {
    "lambada": Kind(read_lambada, "curl -Lo PATH https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl fetches it"),
    "core": Kind(read_core, "curl -Lo PATH https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip fetches it"),
    "blimp": Kind(read_blimp, "git clone https://github.com/alexwarstadt/blimp PATH fetches it"),
    "text": Kind(read_text, "pass a text file"),
}


def remedy(name: str, path) -> str:
    return KINDS[name].remedy.replace("PATH", shlex.quote(str(path)))


def task_errors(given: tuple[str, ...], flag: str = "--tasks") -> list[str]:
    """What is wrong with NAME=PATH arguments, one line each. Missing files are none of this: see missing_files."""
    known = f"choose {', '.join(KINDS)}, such as lambada=lambada_test.jsonl"
    errors = [f"{flag} {text}: {known}" for text in given if text.partition("=")[0] not in KINDS or not text.partition("=")[2]]
    names = [text.partition("=")[0] for text in given]
    return errors + [f"{flag} has {name} twice: drop one" for name in KINDS if name != "text" and names.count(name) > 1]


def missing_files(given: tuple[str, ...]) -> list[str]:
    """One error for each file that does not exist, with the command that fetches it."""
    pairs = [text.partition("=")[::2] for text in given]
    return [f"no file {path}: {remedy(name, path)}" for name, path in pairs if not Path(path).exists()]


def read_tasks(given: tuple[str, ...], tokenizer: Tokenizer, seq_len: int, limit: int = 0) -> list[Task]:
    """Reads the tasks that NAME=PATH arguments name. limit: keep only the first questions of each; 0: all. ValueError if a file is
    missing or has no questions."""
    raise_errors(task_errors(given) + missing_files(given))
    tasks = []
    for name, path in (text.partition("=")[::2] for text in given):
        tasks += KINDS[name].read(Path(path), tokenizer, seq_len, limit)
    if empty := next((task.name for task in tasks if not task.gold), None):
        raise ValueError(f"{empty} has no questions: restore its file from a copy")
    if twice := next((task.name for i, task in enumerate(tasks) if task.name in [other.name for other in tasks[:i]]), None):
        raise ValueError(f"two tasks are called {twice}: rename a file")
    return tasks


def rows_of(content: bytes, where, valid: Callable[[dict], bool]) -> Iterator[dict]:
    """Yields the rows of a .jsonl file. ValueError names the first line that is not a row of this kind."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not (isinstance(row, dict) and valid(row)):
            raise ValueError(f"{where}, line {number}: not a question of this task; restore the file from a copy")
        yield row


@contextmanager
def one_line_if_damaged(path: Path, *more: type[Exception]):
    """Turns what a damaged bundle raises into a ValueError that names it. more: other exceptions that mean this."""
    kinds = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, FileNotFoundError, LookupError, TypeError, AttributeError, csv.Error)
    try:
        yield
    except (ValueError, *kinds, *more) as e:
        if type(e) is ValueError and str(e).startswith(str(path)):  # it names the line
            raise
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise ValueError(f"{path} is no complete evaluation bundle ({why}): {remedy('core', path)}") from e
