"""lab.search on made-up runs, whose loss depends on their flags: what it keeps, judges again, continues and refuses."""

import json
from pathlib import Path

import pytest
from made_up import CRASH, noise

from lab import search

GAINS = {"rmsnorm": 0.05, "swiglu": 0.05, "--qk-norm": 0.0, "--no-bias": -0.05, "512": 0.05}
LARGER = "--larger=--n-embd 64"
KEPT = "norm=--norm rmsnorm\nmlp=--mlp swiglu\n"


@pytest.fixture
def world(world):
    """The loss of a run depends on its flags. SwiGLU gains nothing in the larger model."""

    def loss(name: str, seed: int, argv) -> float:
        gain = sum(gain for word, gain in GAINS.items() if word in argv) - 0.05 * ("64" in argv and "swiglu" in argv)
        return 2.0 + 0.1 * seed + 0.2 * noise(name, seed) - gain

    world.loss = loss
    return world


def lines_of(path: str) -> list[dict]:
    head, *lines = (line.split("\t") for line in Path(path).read_text().splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.mark.slow
def test_better_ideas_join_the_recipe(world):
    ideas = "# ideas\n\nnorm=--norm rmsnorm\nbad flag=--no-such-flag\nbias = --no-bias\nnot now=--rope-base 500\n"
    ideas += "mlp=--mlp swiglu\nqk=--qk-norm\n"
    status, out, err = world.search(LARGER, "--json", ideas=ideas)
    assert status == 0
    found = json.loads(out)
    assert {row["variant"]: row["verdict"] for row in found["ideas"]} == {
        "norm": "better", "bad flag": "failed", "bias": "worse", "not now": "failed", "mlp": "better", "qk": "no difference shown",
    }  # fmt: skip
    assert found["recipe"].endswith("--norm rmsnorm --mlp swiglu")
    assert "set pos to rope" in found["ideas"][3]["text"] and "train.py rejects" in found["ideas"][1]["text"]
    assert [row["verdict"] for row in found["fresh"]] == ["better", "better"]
    assert found["larger"][0]["verdict"] == "better" and found["larger"][1]["verdict"] != "better" and found["held"] == 1
    # a kept idea gets the seeds that it was decided without; the end has seeds of its own
    assert [seed for name, seed in world.started if name == "norm"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8, 9, 10]
    assert "norm: better" in err
    lines = [(line["name"], line["against"], line["verdict"].split()[0]) for line in lines_of("log/search/results.tsv")]
    assert lines == [
        ("baseline", "", "the"), ("norm", "baseline", "better"), ("bad flag", "norm", "failed:"), ("bias", "norm", "worse"),
        ("not now", "norm", "failed:"), ("mlp", "norm", "better"), ("qk", "mlp", "no"),
    ]  # fmt: skip


@pytest.mark.slow
def test_stopped_search_continues(world):
    ideas = KEPT + "bad=--no-bias\n"
    world.failing = {"mlp/2": (1, "error: disk full"), "bad": CRASH}
    status, _, err = world.search(LARGER, ideas=ideas)
    assert status == 2 and "disk full" in err
    begun = [*world.started]
    world.failing.pop("mlp/2")
    status, out, _ = world.search(LARGER, ideas=ideas)
    assert status == 0
    assert "kept 2 of 3 ideas; better again with fresh seeds and in the larger model: 1\n" in out
    assert "If none of them helped, luck alone would keep at most 0.1 of 2 on average." in out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    ended = world.started[len(begun) :]
    assert set(begun) & set(ended[: ended.index(("bad", 1))]) == {("mlp", 2)}
    world.started.clear()
    status, _, err = world.search(LARGER, ideas=ideas)  # a finished search trains nothing, not even what failed
    assert (status, world.started) == (0, []) and "bad failed before (seed 1: KeyError: 'x'): delete log/search/bad/failed.json" in err


@pytest.mark.slow
def test_ideas_that_break_the_comparison_fail(world):
    ideas = "longer=--max-steps 40\nval=--val-tokens 320\ndata=--data-dir nowhere\nseed=--seed 3\nquote='\n"
    ideas += "batch=--total-batch-tokens 512 --max-steps 10\n"
    _, out, _ = world.search("--json", ideas=ideas)
    rows = json.loads(out)["ideas"]
    assert [row["text"] for row in rows] == [
        "failed: longer trains for 10,240 tokens, baseline for 5,120 tokens",
        "failed: val validates on 320 tokens, baseline on 640",
        "failed: no shards: the folder nowhere does not exist; make it: python fineweb.py --out-dir nowhere",
        "failed: lab.compare sets --seed and --out-dir for each run: leave them out",
        "failed: No closing quotation: check the quotes and backslashes in the flags",
        "better",  # other batches are an idea like any other
    ]
    assert {name for name, _ in world.started} == {"baseline", "batch"}


@pytest.mark.slow
@pytest.mark.parametrize("late", [(CRASH, "seed 5: KeyError: 'x'"), (float("inf"), "seed 5: the loss is not finite")])
def test_kept_idea_may_fail_with_later_seeds(world, late):
    (failure, why), loss = late, world.loss
    if failure == CRASH:
        world.failing = {"norm/5": CRASH}
    else:
        world.loss = lambda name, seed, argv: failure if (name, seed) == ("norm", 5) else loss(name, seed, argv)
    status, out, _ = world.search("--json", ideas=KEPT)
    found = json.loads(out)
    assert (status, found["ideas"][0]["text"], found["ideas"][1]["verdict"]) == (0, f"failed: {why}", "better")
    assert found["recipe"].endswith(" --mlp swiglu") and "rmsnorm" not in found["recipe"]


@pytest.mark.slow
def test_failures_at_the_end_are_rows(world):
    world.failing = {"larger/norm": CRASH}
    status, out, _ = world.search(LARGER, ideas=KEPT)
    assert status == 0 and "mlp" in out.split("verdict with fresh seeds")[0]
    assert "failed: seed 6: KeyError: 'x'" in out and "failed: norm failed here: seed 6: KeyError: 'x'" in out
    assert "better again with fresh seeds and in the larger model: 0\n" in out


@pytest.mark.slow
def test_ideas_are_printed_before_the_end(world):
    world.failing = {"fresh/norm": (1, "error: disk full")}
    status, out, err = world.search(ideas=KEPT)
    assert status == 2 and "disk full" in err and "norm" in out and "verdict" in out


@pytest.mark.slow
def test_wrong_larger_flags_end_it_at_once(world):
    status, _, err = world.search("--larger=--n-embdd 64", ideas=KEPT)
    assert (status, world.started) == (2, []) and "n-embdd" in err


@pytest.mark.slow
def test_changed_order_of_ideas_is_named(world):
    assert world.search(ideas=KEPT)[0] == 0
    status, _, err = world.search(ideas="\n".join(reversed(KEPT.splitlines())))
    assert status == 2 and "does not fit log/search/mlp/1" in err and "Did an idea before it change?" in err


def test_ideas_of_a_windows_editor_are_read(tmp_path):
    path = tmp_path / "ideas.txt"
    path.write_bytes("\ufeff# ideas\r\nrope=--pos rope\r\n".encode())
    assert search.read_ideas(str(path)) == {"rope": "--pos rope"}
    path.write_bytes("rope=--pos rope".encode("utf-16"))
    with pytest.raises(ValueError, match=r"ideas.txt is not UTF-8 .*: save it as UTF-8"):
        search.read_ideas(str(path))


@pytest.mark.slow
def test_notes_of_a_search_are_printed_once(world):
    world.judge("baseline=", "norm=--norm rmsnorm", world.flags(), "--seeds", 3, "--out-dir", "log/search")
    _, out, err = world.search("--json", ideas=KEPT)
    (note,) = json.loads(out)["notes"]
    assert "looking again adds false verdicts" in note and err.count(note) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "ideas.txt has no idea: write a line NAME=FLAGS for each"),
        ("norm\n", "ideas.txt: 'norm' is not NAME=FLAGS"),
        ("norm=\n", "ideas.txt: 'norm=' is not NAME=FLAGS"),
        ("a b=--qk-norm\na_b=--no-bias\n", "ideas.txt: 'a_b' would share a folder with an earlier idea or the baseline: rename it"),
        ("baseline=--qk-norm\n", "ideas.txt: 'baseline' would share a folder with an earlier idea or the baseline: rename it"),
    ],
)
def test_wrong_ideas_are_named(tmp_path, monkeypatch, text, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ideas.txt").write_text(text)
    with pytest.raises(ValueError, match=error.replace("(", r"\(")):
        search.read_ideas("ideas.txt")
