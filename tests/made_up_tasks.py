"""Writes made-up LAMBADA, BLiMP and CORE files in the layout of the real ones."""

import json
import random
import zipfile
from pathlib import Path

WORDS = "the a man woman she He runs jumps over café dog's and then, (slowly) into water. 12 Answer".split()

CORE_YAML = """
icl_tasks:
-
  label: picks
  dataset_uri: world/picks.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: " # this separates questions from answers
-
  label: picks_zeroshot
  dataset_uri: world/picks.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
-
  label: pronouns
  dataset_uri: language/pronouns.jsonl
  num_fewshot: [1]
  icl_task_type: schema
-
  label: words
  dataset_uri: language/words.jsonl
  num_fewshot: [3]
  icl_task_type: language_modeling
  has_categories: true
"""
CORE_CSV = """Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description
picks,world knowledge,multiple choice,2,9,25,,"Three choices, or two"
picks_zeroshot,world knowledge,multiple choice,0,9,25,,
pronouns,language understanding,schema,1,9,50,,
words,language understanding,language modeling,3,9,0,,
"""


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(low, high)))


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_lambada(path: Path, n: int = 12) -> Path:
    """Passages of one or two paragraphs. Some have two blanks before the last word."""
    rng = random.Random(0)
    texts = [
        sentence(rng, 4, 12) + rng.choice(["\n", " "]) + sentence(rng, 3, 9) + rng.choice([" ", " ", "  "]) + rng.choice(WORDS)
        for _ in range(n)
    ]
    return write_jsonl(path, [{"text": text} for text in texts])


def write_blimp(folder: Path, n: int = 10) -> Path:
    """Two paradigms. The sentences of a pair share their start."""
    rng = random.Random(1)
    for name in ("adjunct_island", "wh_island"):
        starts = [sentence(rng, 1, 5) for _ in range(n)]
        pairs = [{"sentence_good": f"{s} {sentence(rng, 1, 5)}.", "sentence_bad": f"{s} {sentence(rng, 1, 5)}?"} for s in starts]
        write_jsonl(folder / "data" / f"{name}.jsonl", [{**pair, "UID": name, "pairID": str(i)} for i, pair in enumerate(pairs)])
    return folder


def core_files(n: int = 9) -> dict[str, list[dict]]:
    """Name → rows of each of CORE's three types. Choices differ in length, and some share their start."""
    rng = random.Random(2)
    picks, pronouns, words = [], [], []
    for _ in range(n):
        start = rng.choice(["", "the "])
        choices = [f"{start}{i} {sentence(rng, 1, 6)}" for i in range(rng.randrange(2, 5))]
        picks.append({"query": sentence(rng, 3, 9), "choices": choices, "gold": rng.randrange(len(choices))})
        contexts = [f"{sentence(rng, 2, 5)} {who}" for who in ("man", "dog's")]
        pronouns.append({"context_options": contexts, "continuation": sentence(rng, 2, 6), "gold": rng.randrange(2)})
        words.append({"context": sentence(rng, 3, 9) + rng.choice(["", " "]), "continuation": sentence(rng, 1, 3), "category": "x"})
    return {"world/picks.jsonl": picks, "language/pronouns.jsonl": pronouns, "language/words.jsonl": words}


def write_core(path: Path, n: int = 9, unpacked: bool = False) -> Path:
    """A bundle as a zip, or as the folder inside it."""
    files = {"core.yaml": CORE_YAML, "eval_meta_data.csv": CORE_CSV}
    files |= {f"eval_data/{name}": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in core_files(n).items()}
    if unpacked:
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(f"eval_bundle/{name}", text)
    return path


def write_tasks(folder: Path) -> list[str]:
    """Writes all of them. Returns the arguments for --tasks."""
    write_lambada(folder / "lambada_test.jsonl")
    write_blimp(folder / "blimp")
    write_core(folder / "eval_bundle.zip")
    return [f"lambada={folder}/lambada_test.jsonl", f"core={folder}/eval_bundle.zip", f"blimp={folder}/blimp"]
