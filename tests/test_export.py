"""Loads exported folders in transformers (tokenizer and model) and in the lm_eval command."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import REPO, run_main, save_checkpoint
from hub import serve
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hellaswag import make_tasks

import checkpoint
import export
import hellaswag
from common.distributed import DistContext
from common.tokenizer import get_tokenizer
from sample import Sampling, sample_texts
from training.config import TrainConfig
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
    ours = sample_texts(*checkpoint.load_with_tokenizer(run), "def f(", 1, 30, 0, Sampling(0))[0]
    assert tokenizer.decode(theirs, skip_special_tokens=True) == ours
    (tmp_path / "out" / "model.safetensors.tmp").touch()  # as a killed export leaves
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "out", "--dtype", "bf16") == 0  # replaces it
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert (half.model.norm.weight == model.model.norm.weight.bfloat16()).all()


def test_card_says_how_the_model_was_trained(run, tmp_path, capsys):
    save_checkpoint(run, 7, checkpoint.load_model(str(run))[0], "bytes", 1.25, {})
    config = asdict(TrainConfig(total_batch_tokens=640, sample_prompt="def ", data_dir=str(tmp_path / "data"), teacher="log/large"))
    launches = [{"step": 0, "config": config, "commit": "abc"}, {"step": 9, "config": config, "commit": "later"}]
    (run / "run.json").write_text(json.dumps({"config": config, "data": {}, "launches": launches}))
    (run / "metrics.jsonl").write_text('{"step": 5, "hellaswag_acc_norm": 0.2}\n{"step": 7, "hellaswag_acc_norm": 0.31}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"source": "HuggingFaceFW/fineweb-edu", "revision": "87f0914"}')
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "my gpt") == 0
    assert capsys.readouterr().err.endswith(f"; to share it: hf upload 'my gpt' '{tmp_path}/my gpt'\n")
    card = ModelCard.load(tmp_path / "my gpt" / "README.md")
    scores = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert scores == {("validation split", "loss in nats per token"): 1.25, ("HellaSwag", "acc_norm"): 0.31}
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card.text, re.M))
    assert rows["trained on"] == "4,480 tokens in 7 steps" and rows["data"] == "HuggingFaceFW/fineweb-edu 87f0914"
    assert (rows["code"], rows["learned from"], rows["HellaSwag, acc_norm"]) == ("commit abc", "log/large", "0.3100")
    assert rows["architecture"] == "LlamaForCausalLM" and "started from" not in rows


def test_example_of_the_card_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(export.main, "-m", run, "--out-dir", "mine") == 0
    capsys.readouterr()
    exec(re.search("```python\n(.*)```", Path("mine/README.md").read_text(), re.S)[1], {})
    assert capsys.readouterr().out.startswith("Hello, I'm a language model,")


def test_folder_with_other_files_is_rejected(run, capsys):
    before = sorted(run.iterdir())
    assert run_main(export.main, "-m", run, "--out-dir", run) == 2
    assert "has other files (model_00007.json, …): choose another --out-dir" in capsys.readouterr().err
    assert sorted(run.iterdir()) == before


def same_logits(folder: Path, hf: torch.nn.Module) -> bool:
    idx = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        ours, theirs = loaded.eval()(idx).logits, hf.eval()(idx).logits
    return not any(info.values()) and ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5


def random_gpt2(rows: int, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = dict(n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=50256, eos_token_id=50256)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=rows, **shape, **settings)).eval()


@pytest.mark.parametrize("rows", [50304, 50258, 50264])
def test_gpt2_with_extra_rows_is_exported(gpt2_tokenizer, tmp_path, rows):
    """From the folder, and from a checkpoint of a run on its weights. 50,258: with a [PAD], and its tokenizer's files."""
    hf, folder = random_gpt2(rows), tmp_path / "hf"
    hf.save_pretrained(folder)
    if rows == 50258:
        export.save_tokenizer(gpt2_tokenizer, folder, 32)
        padded = transformers.AutoTokenizer.from_pretrained(folder)
        padded.add_special_tokens({"pad_token": "[PAD]"})
        padded.save_pretrained(folder)
    model, tokenizer = checkpoint.load_with_tokenizer(folder)
    idx = torch.tensor([tokenizer.encode("Hello there, this is a text.")])
    assert tokenizer.name == "gpt2" and (model(idx)[0] - hf(idx).logits).abs().max() <= 1e-5
    save_checkpoint(tmp_path, 1, model, "gpt2", None, {})
    for number, source in enumerate((folder, tmp_path / "model_00001.pt")):
        out = tmp_path / f"out{number}"
        assert run_main(export.main, "-m", source, "--out-dir", out) == 0
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert theirs("Hello there, this is a text.")["input_ids"] == idx[0].tolist() and theirs.eos_token_id == 50256
        assert same_logits(out, hf) and transformers.AutoConfig.from_pretrained(out).eos_token_id == 50256
        assert theirs("[PAD]")["input_ids"] == [50257] or rows != 50258 or number == 1  # a folder's own files are copied


def test_folder_keeps_a_tokenizer_of_its_own(tmp_path, capsys):
    hf, folder, out = random_gpt2(257), tmp_path / "hf", tmp_path / "out"
    hf.save_pretrained(folder)
    own = export.tokenizer_json(get_tokenizer("bytes"))
    vocab = own["model"]["vocab"]
    own["model"]["vocab"] = {token: (i + 7) % 256 if i < 256 else i for token, i in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(own))
    assert run_main(export.main, "-m", folder, "--out-dir", out) == 0
    result = capsys.readouterr()
    assert "warning: its tokenizer.json is not GPT-2's: " in result.err and result.out.endswith("in fp32, its own tokenizer\n")
    assert json.loads((out / "tokenizer.json").read_text()) == own and same_logits(out, hf)
    assert transformers.AutoConfig.from_pretrained(out).eos_token_id == 50256  # its own too
    assert run_main(export.main, "-m", folder, "--out-dir", folder) == 2
    assert "is the model's own folder: choose another --out-dir" in capsys.readouterr().err


def test_unknown_tokenizer_is_not_exported(run, tmp_path, capsys):
    """A tokenizer from an earlier export would be the wrong one."""
    assert run_main(export.main, "-m", run, "--out-dir", tmp_path / "out") == 0
    content = torch.load(run / "model_00007.pt", weights_only=True)
    torch.save(content | {"tokenizer": None}, tmp_path / "unknown.pt")
    for out, status in (("out", 2), ("new", 0)):
        assert run_main(export.main, "-m", tmp_path / "unknown.pt", "--out-dir", tmp_path / out) == status
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["eos_token_id"] is None
    error = capsys.readouterr().err
    assert "out has other files (tokenizer.json, …)" in error and "vocabulary of 257: wrote no tokenizer; put the files of" in error


@pytest.mark.parametrize(("rows", "end"), [(257, 256), (50257, 50256), (50304, 50256), (97, None)])
def test_saved_config_names_the_end_of_text(tmp_path, rows, end):
    """None if the tokenizer is unknown: transformers would stop at a wrong id."""
    build(VariantConfig(rows, 16, 1, 1, 4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == end


def test_nanogpt_without_biases_is_exported(gpt2_tokenizer, tmp_path):
    """The oracle is transformers' GPT-2 with biases of 0."""
    hf = random_gpt2(50257, activation_function="gelu")
    for name, p in hf.named_parameters():
        torch.nn.init.zeros_(p) if name.endswith("bias") else torch.nn.init.normal_(p, std=0.2)
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: p.t() if name.endswith(linear) else p for name, p in hf.state_dict().items() if not name.endswith("bias")}
    shape = dict(block_size=32, vocab_size=50257, n_layer=1, n_head=2, n_embd=16, bias=False)
    torch.save({"model": state, "model_args": shape, "iter_num": 1}, tmp_path / "ckpt.pt")
    assert run_main(export.main, "-m", tmp_path / "ckpt.pt", "--out-dir", tmp_path / "out") == 0
    assert same_logits(tmp_path / "out", hf)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Hello")["input_ids"] == [15496]


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
