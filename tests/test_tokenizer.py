"""The right tokenizer, or none: long runs of blanks, the tokenizers of other folders, and models with more rows than ids."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, ids_for, read_stream, run_main, run_train, save_checkpoint, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import random_hf

import checkpoint
import perplexity
import sample
import train
import training.evaluation
from common import tokenizer as tokenizers
from common.shards import find_shards
from common.tokenizer import OTHER, get_tokenizer
from dataloader import TokenStream
from export import save_tokenizer, tokenizer_json
from formats.tokenizer_files import FINGERPRINTS, fingerprint, identify
from training.evaluation import Evaluation
from variants import VariantConfig, build

BYTES = get_tokenizer("bytes")

# ---- long runs ----


@given(st.text(" \t\n\r\xa0\u3000\x1c\x85x!1é’'s"))
@settings(max_examples=300, deadline=None)
def test_splitting_long_blanks_changes_no_id(gpt2_tokenizer, text):
    import tiktoken

    limit, runs = tokenizers.LONG_RUN, tokenizers.LONG_RUNS
    tokenizers.LONG_RUN, tokenizers.LONG_RUNS = 3, re.compile(runs.pattern.replace("{100000,}", "{3,}"))
    try:
        assert tokenizers.LONG_RUNS.pattern != runs.pattern
        assert gpt2_tokenizer.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    finally:
        tokenizers.LONG_RUN, tokenizers.LONG_RUNS = limit, runs


def test_a_million_blanks_get_their_ids(gpt2_tokenizer):
    """tiktoken alone panics."""
    text = "hi" + " " * 1_200_000 + "x"
    expected = [5303, *[220] * 1_199_999, 2124]
    assert gpt2_tokenizer.encode(text) == expected
    if fast := tokenizers.fast_encode("gpt2"):  # another implementation
        assert fast([text])[0].tolist() == expected


def test_a_panic_is_one_line(gpt2_tokenizer, monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    def panic(*args):
        raise PanicException("overflow")

    monkeypatch.setattr(tokenizers, "fast_encode", lambda name: panic)
    expected = [50256, *gpt2_tokenizer.encode("some text")]
    assert tokenizers.tokenize("gpt2", ["some text"]).tolist() == expected  # tiktoken takes over
    with pytest.raises(ValueError, match=r"^the text that starts with 'some text' can't be tokenized \(overflow\): leave it out$"):
        tokenizers.encode_bpe(type("", (), {"encode_ordinary": panic}), "some text")


def test_odd_texts_encode_without_error(gpt2_tokenizer):
    for text, ours, gpt2 in (("", "", ""), ("\ud800 x", "? x", "\ufffd x"), ("<|endoftext|>",) * 3, ("\udcff", "?", "\ufffd")):
        assert BYTES.decode(BYTES.encode(text)) == ours
        assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == gpt2


def test_ids_beyond_the_tokenizer_decode_to_nothing(gpt2_tokenizer):
    assert gpt2_tokenizer.decode([15496, 50257, 60000, 11]) == "Hello,"
    assert BYTES.decode([97, 257, 300, 98]) == "ab"


# ---- which tokenizer a folder has ----


def bytes_json() -> dict:
    return tokenizer_json(BYTES) | {"normalizer": None}


def added(i: int, token: str, special: bool) -> dict:
    return bytes_json()["added_tokens"][0] | {"id": i, "content": token, "special": special}


def changed(**parts) -> str:
    return json.dumps(bytes_json() | parts)


def with_model(**parts) -> str:
    return changed(model=bytes_json()["model"] | parts)


def with_added(*tokens) -> str:
    return changed(added_tokens=bytes_json()["added_tokens"] + [added(*token) for token in tokens])


def shuffled(vocab: dict) -> dict:
    """The same tokens with other ids. <|endoftext|> keeps its id."""
    last = len(vocab) - 1
    return {token: (i + 7) % last if i < last else i for token, i in vocab.items()}


VOCAB = bytes_json()["model"]["vocab"]
LEVEL = bytes_json()["pre_tokenizer"]
PAIR = {"vocab.json": json.dumps(VOCAB), "merges.txt": "#version: 0.2\n"}
DECODER = {"257": {"content": "[PAD]", "special": True}}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": changed()},
        {"tokenizer.json": changed(), "tokenizer_config.json": json.dumps({"add_prefix_space": False, "added_tokens_decoder": DECODER})},
        {"tokenizer.json": with_added((257, "[PAD]", True), (299, "<|user|>", True), (258, "pad", True))},
        {"tokenizer.json": with_added((257, "[PAD]", False), (299, "<|user|>", False))},
        {"tokenizer.json": with_model(type="BPE", dropout=None, end_of_word_suffix="", vocab=VOCAB | {"[PAD]": 257})},
        PAIR,
        PAIR | {"tokenizer.json": changed(), "chat_template.jinja": "x"},
        PAIR | {"added_tokens.json": '{"[PAD]": 257}', "special_tokens_map.json": '{"pad_token": "[PAD]"}'},
        PAIR | {"tokenizer_config.json": json.dumps({"added_tokens_decoder": DECODER})},
    ],
)
def test_files_of_our_tokenizer_are_recognized(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert identify(tmp_path, 257 if not files else 300) == ("bytes", "")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"tokenizer.json": with_model(vocab=shuffled(VOCAB))}, "its tokenizer.json is not GPT-2's: its vocabulary or its merges differ"),
        ({"tokenizer.json": with_model(merges=["a b"])}, "its merges differ"),
        ({"tokenizer.json": with_model(vocab=VOCAB | {"ab": 97})}, "its vocabulary or"),
        ({"tokenizer.json": with_model(type="WordLevel")}, "not a plain BPE"),
        ({"tokenizer.json": with_model(dropout=0.1)}, "not a plain BPE"),
        ({"tokenizer.json": changed(normalizer={"type": "Lowercase"})}, "changes the text"),
        ({"tokenizer.json": changed(pre_tokenizer=LEVEL | {"add_prefix_space": True})}, "splits"),
        ({"tokenizer.json": changed(pre_tokenizer=LEVEL | {"use_regex": False})}, "splits"),
        ({"tokenizer.json": changed(pre_tokenizer={"type": "Whitespace"})}, "splits"),
        ({"tokenizer.json": changed(), "tokenizer_config.json": '{"add_prefix_space": true}'}, "adds a space"),
        ({"tokenizer.json": with_added((257, "cat", False))}, "it reads 'cat' as one token"),
        ({"tokenizer.json": with_added((257, "[PAD]", True), (258, "a [dog]", False))}, "it reads 'a [dog]' as one token"),
        ({"tokenizer.json": with_added((97, "a", True))}, "it reads 'a' as one token"),
        (PAIR | {"added_tokens.json": '{"cat": 257}'}, "it reads 'cat' as one token"),
        (PAIR | {"tokenizer.json": with_model(vocab=shuffled(VOCAB))}, "its tokenizer.json is not GPT-2's"),
        (PAIR | {"tokenizer.json": "{}"}, "its tokenizer.json can't be read as a tokenizer"),
        (PAIR | {"vocab.json": json.dumps(shuffled(VOCAB)), "tokenizer.json": changed()}, "its vocab.json is not GPT-2's"),
        ({"vocab.json": json.dumps(VOCAB)}, "its vocab.json can't be read"),
        ({"tokenizer.model": "x"}, "its tokenizer.model is not GPT-2's"),
        ({"vocab.txt": "x"}, "its vocab.txt is not GPT-2's"),
        *(({"tokenizer.json": text}, "can't be read as a tokenizer") for text in ("", "{", "[]", "5", "[" * 100_000, '{"model": 5}')),
    ],
)
def test_another_tokenizer_is_never_taken_for_ours(tmp_path, files, why):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    name, found = identify(tmp_path, 300)
    assert name == OTHER and why in found


def test_table_smaller_than_its_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text(changed())
    assert identify(tmp_path, 200) == (OTHER, "its tokenizer.json has 257 ids, its config.json 200")


@pytest.mark.parametrize("rows", [256, 258, 320, 1000, 50256, 50259, 50265, 50305])
def test_unknown_number_of_rows_means_no_tokenizer(tmp_path, rows):
    assert identify(tmp_path, rows)[0] is None


def test_fingerprints_are_those_of_our_files(gpt2_tokenizer):
    for tokenizer in (gpt2_tokenizer, BYTES):
        parts = tokenizer_json(tokenizer)["model"]
        assert fingerprint(list(parts["vocab"]), parts["merges"]) == FINGERPRINTS[tokenizer.name]


@pytest.fixture
def other(tmp_path) -> Path:
    """A folder of GPT-2 with 257 ids and a tokenizer of its own, as large as ours."""
    random_hf(257, 48, 2, 2, 32).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(with_model(vocab=shuffled(VOCAB)))
    return tmp_path / "other"


def test_scripts_refuse_another_tokenizer(other, shards, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    assert checkpoint.load_model(other)[1] is None
    for main, *argv in ((sample.main, "-d", "cpu"), (perplexity.main, tmp_path / "a.txt", "--device", "cpu")):
        assert run_main(main, "-m", other, *argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {other}: its tokenizer.json is not GPT-2's: ") and "train.py --init-from" in error
    argv = [*TINY[6:], "--data-dir", shards, "--out-dir", tmp_path / "run", "--seq-len", 32]
    assert run_main(train.main, *argv, "--init-from", other) == 2
    assert "is not GPT-2's: its vocabulary or its merges differ; " in (error := capsys.readouterr().err) and "has bytes tokens" in error
    shape = ["--n-layer", 2, "--n-head", 2, "--n-embd", 32]
    assert run_main(train.main, *argv, *shape, "--teacher", other) == 2
    assert f"error: --teacher {other}: its tokenizer.json is not GPT-2's" in capsys.readouterr().err


def test_another_tokenizer_trains_on_its_own_shards(other, tmp_path, capsys):
    own = write_shards(tmp_path / "own", [1000, 5000])
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "mine"}))
    argv = [*TINY[6:], "--data-dir", own, "--out-dir", tmp_path / "run", "--seq-len", 32, "--sample-every", 1]
    assert run_main(train.main, *argv, "--init-from", other, "--max-steps", 1) == 0
    assert "warning: no samples or HellaSwag in this run: no tokenizer named 'mine'" in capsys.readouterr().err
    assert checkpoint.load_gpt(str(tmp_path / "run"))[1].tokenizer == "mine" and checkpoint.load_model(tmp_path / "run")[1] is None
    assert run_main(sample.main, "-m", tmp_path / "run", "-d", "cpu") == 2
    assert "its tokenizer 'mine' is not known here; use it only with export.py" in capsys.readouterr().err


# ---- more rows than ids, or fewer ----


@pytest.fixture
def padded(tmp_path):
    """A folder of GPT-2 with our byte tokenizer and 43 more rows, and its model in transformers."""
    hf = random_hf(300, 48, 2, 2, 32)
    hf.save_pretrained(tmp_path / "padded")
    save_tokenizer(BYTES, tmp_path / "padded", 48)
    return tmp_path / "padded", hf.eval()


def test_fine_tuning_keeps_the_extra_rows(padded, shards, tmp_path):
    folder, hf = padded
    argv = [*TINY[6:], "--data-dir", shards, "--init-from", folder, "--seq-len", 32, "--out-dir", tmp_path / "run", "--sample-every", 2]
    assert run_main(train.main, *argv, "--max-steps", 2) == 0
    x, y = map(torch.from_numpy, TokenStream(find_shards(shards), "train", 32).batch(range(8)))
    expected = torch.nn.functional.cross_entropy(hf(x).logits.flatten(0, 1), y.flatten()).item()
    assert float(read_stream(tmp_path / "run", "train")[0]) == pytest.approx(expected, abs=1e-5)
    assert run_main(train.main, "--resume", "--out-dir", tmp_path / "run", "--max-steps", 3) == 0
    model, tokenizer = checkpoint.load_with_tokenizer(tmp_path / "run")
    assert (model.config.vocab_size, tokenizer.name) == (300, "bytes")


def test_doc_mask_needs_the_last_id(padded, shards, tmp_path, capsys):
    argv = [*TINY[6:], "--data-dir", shards, "--init-from", padded[0], "--seq-len", 32, "--out-dir", tmp_path / "run", "--doc-mask"]
    assert run_main(train.main, *argv) == 2
    assert "can't tell where documents end with the tokenizer 'bytes' in a model with 300 ids" in capsys.readouterr().err


def test_model_smaller_than_its_tokenizer_is_refused(tmp_path, capsys):
    model = build(VariantConfig(200, 16, 1, 2, 16))
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    assert checkpoint.load_model(path)[1] is None
    assert run_main(sample.main, "-m", path, "-d", "cpu") == 2
    assert "its tokenizer bytes has 257 ids, the model only 200" in capsys.readouterr().err


def test_run_continues_if_samples_are_impossible(tmp_path, capsys):
    """The manifest says bytes, but the model has fewer ids than these."""
    shards = write_shards(tmp_path / "shards", [1000, 5000])
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 257, "tokenizer": "gpt2"}))
    assert run_train(shards, tmp_path / "run", "--sample-every", 1, "--hellaswag-every", 1, "--max-steps", 2) == 0
    assert "its tokenizer gpt2 has 50257 ids, the model only 257" in capsys.readouterr().err
    assert set(read_stream(tmp_path / "run", "train")) == {0, 1}


@pytest.mark.parametrize("error", [IndexError("index out of range"), KeyError("x"), RuntimeError("y"), OverflowError("z")])
def test_run_continues_if_a_sample_fails(shards, tmp_path, capsys, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(training.evaluation, "sample_texts", fail)
    assert run_train(shards, tmp_path / "run", "--sample-every", 1, "--max-steps", 2) == 0
    assert f"warning: no samples at step 2: {type(error).__name__}: " in capsys.readouterr().err


def test_failures_that_other_ranks_miss_are_raised():
    evaluation = Evaluation.__new__(Evaluation)
    with pytest.raises(KeyError):
        evaluation.or_warn("HellaSwag", lambda: {}["x"])


def test_perplexity_refuses_shards_with_more_ids(tmp_path, capsys):
    build(VariantConfig(257, 32, 1, 2, 16)).save_pretrained(tmp_path / "hf")
    shards = write_shards(tmp_path / "shards", [1000, 5000])
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 300}))
    assert run_main(perplexity.main, "-m", tmp_path / "hf", shards) == 2
    assert "has 300 ids, the model 257: score the text itself" in capsys.readouterr().err


def test_draft_needs_as_many_ids(padded):
    model = checkpoint.load_model(padded[0])[0]
    draft = build(VariantConfig(257, 32, 1, 2, 16))
    with pytest.raises(ValueError, match="the draft has 257 ids, the model 300: use a draft with as many"):
        sample.generate(model, ids_for(draft.config, 1, 4), 3, draft=draft)
