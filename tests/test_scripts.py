"""Rules for all scripts: imports have no side effects, --help is quick, flags have two spellings, unknown flags exit with 2."""

import importlib
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from conftest import REPO, run_main, seconds_of

from common import cli
from common.device import CARDS
from training.config import Main, TrainConfig
from training.flags import parse_config
from variants import VariantConfig, build, flops_per_token

SCRIPTS = [
    "train",
    "fineweb",
    "hellaswag",
    "evaluate",
    "sample",
    "plot_log",
    "perplexity",
    "app",
    "export",
    "lab.bench",
    "lab.compare",
    "lab.sweep",
    "lab.cluster",
    "lab.false_keeps",
    "lab.search",
    "lab.scaling",
]
COMMANDS = [*SCRIPTS[:-1], "lab.scaling ladder", "lab.scaling fit", "lab.scaling plan"]

# imports third-party modules first; after that, every opened file, looked-up address and started process counts
IMPORT_QUIETLY = """
import ast, os, sys
from pathlib import Path
repo = sys.argv[1]
sys.argv[1:] = ["--no-such-flag"]
sys.path.insert(0, repo)
paths = sorted([*Path(repo).glob("*.py"), *(path for path in Path(repo).glob("*/*.py") if path.parts[-2] != "tests")])
own = {path.stem for path in paths} | {path.parts[-2] for path in paths}
for path in paths:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]:
                if module.split(".")[0] not in own:
                    __import__(module)
import torch.distributed, torch.utils.data
already = set(sys.modules)
events = []
def hook(event, args):
    mine = event == "open" and not str(args[0]).endswith((".py", ".pyc")) and not str(args[0]).startswith(sys.prefix)
    if mine or event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "urllib.")):
        events.append((event, args))
sys.addaudithook(hook)
before = dict(os.environ)
for path in paths:
    __import__(".".join(path.relative_to(repo).with_suffix("").parts))
    assert not events and dict(os.environ) == before, (path, events)
assert not {"wandb", "trackio", "tensorboard", "optuna", "scipy", "matplotlib", "transformers", "datasets"} & (set(sys.modules) - already)
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""


def test_imports_have_no_side_effects(tmp_path):
    result = subprocess.run([sys.executable, "-c", IMPORT_QUIETLY, str(REPO)], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def answers_quickly(name: str) -> bool:
    seconds = seconds_of(*(["-m", name] if "." in name else [REPO / f"{name}.py"]), "--help")
    return seconds < 2.0 or seconds < 1.5 * seconds_of("-c", "import torch")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_in_two_seconds(name):
    """One of four tries must pass. If the machine is so slow that torch alone takes more than 1.3 s, the limit is 1.5 times that."""
    assert any(answers_quickly(name) for _ in range(4))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_flag(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    name, *words = command.split()
    assert run_main(importlib.import_module(name).main, *words, "--help") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    starts = [number for number, line in enumerate(lines) if re.match(r"[│ ] --?[a-z]", line)]
    assert len(starts) > 2
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        _, *text = re.split(r" {2,}", " ".join(line.strip("│ ") + "  " for line in lines[start:end]))
        assert len(" ".join(text).split("(default")[0].strip()) > 10, lines[start]


def test_help_fills_its_lines(monkeypatch, capsys):
    """A line ends where the next word doesn't fit, not where a docstring's line ended."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main(importlib.import_module("train").main, "--help") == 0
    lines = capsys.readouterr().out.replace("│", " ")  # a terminal gets boxes
    pairs = re.findall(r"(?=^ {24,26}(\w.*)\n {24,26}(\w\S*))", lines, re.MULTILINE)
    assert len(pairs) > 50
    assert [pair for pair in pairs if len(f"{pair[0].strip()} {pair[1]}") <= 53] == []


def test_help_is_in_boxes_by_purpose(monkeypatch, capsys):
    """The first box has the ten flags that most runs need."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main(importlib.import_module("train").main, "--help") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    titles = [number for number, line in enumerate(lines) if re.search(r"\w options\b", line)]
    names = [re.search(r"(\w+) options", lines[number])[1] for number in titles]
    assert names == ["main", "learning", "hardware", "evaluating", "saving", "planning", "model"]
    first = "\n".join(lines[titles[0] : titles[1]])
    assert re.findall(r"^[│ ] --(\w[\w-]*)", first, re.MULTILINE) == [cli.flag(one.name)[2:] for one in fields(Main)]
    assert len(fields(Main)) == 10


def test_boxes_keep_every_value():
    config = TrainConfig(max_steps=3, model=VariantConfig(n_layer=5), ema=0.5, price=2.0)
    assert cli.parse(TrainConfig, ["--n-head", "6", "--keep", "9"], config) == replace(
        config, keep=9, model=replace(config.model, n_head=6)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_exits_with_2(command):
    name, *words = command.split()
    assert run_main(importlib.import_module(name).main, *words, "--no-such-flag") == 2


def test_tests_named_in_the_docs_exist():
    defined = {name for path in (REPO / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    named = set(re.findall(r"`(test_\w+)`", (REPO / "docs" / "reliability.md").read_text()))
    assert len(named) > 10 and named <= defined


def test_hours_in_the_docs_follow_from_flops():
    config = TrainConfig()
    flops = flops_per_token(build(config.model)) * config.total_batch_tokens * config.max_steps
    power = int(math.log10(flops))
    exponent = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(power))
    text = (REPO / "docs" / "rented-machines.md").read_text()
    assert f"is {flops / 10**power:.1f} × 10{exponent} floating point operations" in text
    rows = re.findall(r"^\| (\d) (RTX \d+|[AH]\d+)[^|]* \| ([\d,]+) \| ([\d.]+) \| (?:([\d.]+) \$/h \| (\d+) \$)?", text, re.M)
    assert len(rows) == 5
    for cards, name, tflops, hours, rent, price in rows:
        assert int(tflops.replace(",", "")) * 10**12 == int(cards) * CARDS[name].flops
        expected = flops / (0.4 * int(tflops.replace(",", "")) * 1e12) / 3600
        assert float(hours) == pytest.approx(expected, rel=0.01, abs=0.051)
        assert not rent or int(price) == round(expected * float(rent))


def test_control_characters_print_as_boxes():
    assert cli.printable(text := "10\xa0km\u202f!　東京 می\u200cخواهم 👨\u200d👩 soft\xadhyphen") == text
    assert cli.printable("a\u202eb\u2028\ud800") == "a�b��"
    assert cli.printable("a\x1b[2J\x07\r\x00\nb\tü\x9b") == "a�[2J���\nb\tü�"


@pytest.mark.parametrize("name", ["lab.compare", "lab.false_keeps", "lab.search", "lab.sweep", "lab.scaling", "fineweb"])
def test_ctrl_c_names_the_way_to_continue(name, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", stop)
    monkeypatch.setattr(cli, "parse_command", stop)
    assert run_main(importlib.import_module(name).main) == 130
    assert capsys.readouterr().err == "\nstopped by Ctrl-C: run the same command again to continue\n"


def test_integer_flags_accept_exponents(capsys):
    assert cli.parse(TrainConfig, ["--max-steps", "2e3"]).max_steps == 2000
    assert cli.parse(TrainConfig, ["--seed", "123456789012345678"]).seed == 123456789012345678  # more digits than a float holds
    for wrong in ("1.5", "1e-1", "inf", "nan", "many"):
        with pytest.raises(SystemExit):
            cli.parse(TrainConfig, ["--max-steps", wrong])
        assert f"--max-steps: {wrong} is not a whole number" in capsys.readouterr().err


def test_flags_have_two_spellings():
    a = parse_config(["--micro-batch-size", "7", "--out-dir", "nowhere"])
    b = parse_config(["--micro_batch_size", "7", "--out_dir", "nowhere"])
    assert a == b and a.micro_batch_size == 7
