"""lab.search on made-up runs, whose loss depends on their flags: what it keeps, judges again, continues and refuses."""

import json
from pathlib import Path

import pytest
from conftest import TINY, run_main
from test_verdicts import NOISE, Process, made_up, world  # noqa: F401

from lab import runs, search

GAINS = {"rmsnorm": 0.05, "swiglu": 0.05, "--qk-norm": 0.0, "--no-bias": -0.05}
IDEAS = """# ideas

norm=--norm rmsnorm
bad flag=--no-such-flag
bias = --no-bias
not now=--rope-base 500
mlp=--mlp swiglu
qk=--qk-norm
"""


@pytest.fixture
def searched(world, monkeypatch, tmp_path):  # noqa: F811
    """Returns the made-up world, and a function that calls lab.search in it. The machine fails at the run that world.failing names."""

    def launch(argv, env):
        folder = Path(argv[argv.index("--out-dir") + 1])
        name, seed = folder.parts[-2:]
        world.started.append((name, int(seed)))
        if world.failing == world.started[-1]:
            return Process(1, "error: disk full")
        loss = 2.0 + 0.1 * int(seed) + 0.2 * NOISE[int(seed) + len(name)] - sum(gain for word, gain in GAINS.items() if word in argv)
        if "64" in argv:  # the larger model: SwiGLU gains nothing there
            loss += 0.05 * ("swiglu" in argv)
        made_up(folder, world.shards, int(seed), loss, tuple(argv))
        return Process(0, "")

    def call(*argv):
        flags = " ".join([*TINY, "--n-layer", "1", "--n-embd", "8", "--data-dir", str(world.shards)])
        status = run_main(search.main, "ideas.txt", f"--flags={flags}", "--larger=--n-embd 64", "--seeds", 5, *argv)
        return status, world.capsys.readouterr()

    monkeypatch.setattr(runs, "launch", launch)
    (tmp_path / "ideas.txt").write_text(IDEAS)
    return world, call


@pytest.mark.slow
def test_better_ideas_join_the_recipe(searched):
    world, call = searched  # noqa: F811
    status, output = call("--json")
    assert status == 0
    found = json.loads(output.out)
    verdicts = {row["variant"]: row["verdict"] for row in found["ideas"]}
    assert verdicts["qk"] in ("no difference shown", "worse") and verdicts | {"qk": ""} == {
        "norm": "better", "bad flag": "failed", "bias": "worse", "not now": "failed", "mlp": "better", "qk": "",
    }  # fmt: skip
    assert found["recipe"].endswith("--norm rmsnorm --mlp swiglu")
    assert "set pos to rope" in found["ideas"][3]["text"] and "train.py rejects" in found["ideas"][1]["text"]
    assert [row["verdict"] for row in found["fresh"]] == ["better", "better"]
    assert found["larger"][0]["verdict"] == "better" and found["larger"][1]["verdict"] != "better" and found["held"] == 1
    # a kept idea gets the seeds that it was decided without; the end has seeds of its own
    assert [seed for name, seed in world.started if name == "norm"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8, 9, 10]
    assert "norm: better" in output.err


@pytest.mark.slow
def test_stopped_search_continues(searched):
    world, call = searched  # noqa: F811
    world.failing = ("mlp", 2)
    status, output = call()
    assert status == 2 and "disk full" in output.err
    begun, world.failing = len(world.started) - 1, ()
    status, output = call()
    assert status == 0 and len(set(map(tuple, world.started[:begun]))) == begun
    assert not set(world.started[:begun]) & set(world.started[begun : world.started.index(("mlp", 3))])
    assert "kept 2 of 6 ideas; 1 hold everywhere. By luck alone, at most 0.1 of 4 would be kept." in output.out
    assert max(map(len, output.out.splitlines()[:-1])) <= 100


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
