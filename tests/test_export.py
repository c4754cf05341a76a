"""Loads exported folders in transformers (tokenizer and model) and in the lm_eval command."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import REPO, run_main, save_checkpoint
from hub import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hellaswag import make_tasks

import checkpoint
import export
import hellaswag
from common.distributed import DistContext
from common.tokenizer import get_tokenizer
from sample import sample_texts
from variants import VariantConfig, build

LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_kv_head=1)


@pytest.fixture(scope="session", params=["bytes", "gpt2"])
def tokenizers(request, tmp_path_factory):
    """Our tokenizer, and transformers' tokenizer from our file."""
    ours = get_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("gpt2_tokenizer")
    folder = tmp_path_factory.mktemp(request.param)
    export.save_tokenizer(ours, folder, 64)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_gets_the_same_tokens(tokenizers, text):
    ours, theirs = tokenizers
    text = text.replace("<|endoftext|>", "").encode("utf-8", "replace").decode()
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_real_texts_get_the_same_tokens(tokenizers):
    ours, theirs = tokenizers
    for path in [*sorted(REPO.glob("*.py")), REPO / "README.md"]:
        text = path.read_text().replace("<|endoftext|>", "")
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eot
    assert set(theirs("a")) == {"input_ids", "attention_mask"} == set(theirs.init_kwargs["model_input_names"])
    assert theirs("a<|endoftext|>")["input_ids"] == [*ours.encode("a"), ours.eot]


@pytest.fixture
def run(tmp_path) -> Path:
    torch.manual_seed(0)
    model = build(VariantConfig(257, 320, 2, 2, 32, **LLAMA)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run", 7, model, "bytes", None, {})
    return tmp_path / "run"


def test_transformers_continues_text_like_the_run(run, tmp_path, capsys):
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    assert output.endswith(f"/out: LlamaForCausalLM, {model.num_parameters():,} parameters in fp32, tokenizer bytes\n")
    theirs = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=30, do_sample=False)[0]
    ours = sample_texts(*checkpoint.load_with_tokenizer(run), "def f(", 1, 30, 0, temperature=0.0)[0]
    assert tokenizer.decode(theirs, skip_special_tokens=True) == ours
    (tmp_path / "out" / "model.safetensors.tmp").touch()  # as a killed export leaves
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "out", "--dtype", "bf16") == 0  # replaces it
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert (half.model.norm.weight == model.model.norm.weight.bfloat16()).all()


def test_folder_with_other_files_is_rejected(run, capsys):
    before = sorted(run.iterdir())
    assert run_main(export.main, "-m", run, "--out-dir", run) == 2
    assert "has other files (model_00007.json, …): choose another --out-dir" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


def on_the_hub(tasks: list[dict]) -> dict[str, bytes]:
    """The dataset's files, as the harness downloads them."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([task | {"label": str(task["label"])} for task in tasks]), file)
    return {f"data/{split}-00000-of-00001.parquet": file.getvalue() for split in ("train", "validation")}


@pytest.mark.slow
def test_harness_scores_match_hellaswag_py(run, tmp_path):
    """Runs the lm_eval command. It downloads its task from a hub on localhost."""
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "out") == 0
    tasks = make_tasks(40)
    command = f"-m lm_eval --model hf --model_args pretrained={tmp_path}/out,dtype=float32 --device cpu --tasks hellaswag --batch_size 8"
    with serve({"datasets/Rowan/hellaswag": on_the_hub(tasks)}) as (url, _):
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        result = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    theirs = [float(x) for x in re.findall(r"\|(?:acc|acc_norm) *\|↑ *\|([\d.]+)", result.stdout)]
    ours = hellaswag.evaluate(*checkpoint.load_with_tokenizer(run), tasks, DistContext(torch.device("cpu")))[0]
    assert theirs == pytest.approx([ours["harness_acc"], ours["harness_acc_norm"]], abs=1e-4)
