"""Generation: the cache changes nothing, sampling has the distribution it should, and only what may come out comes out."""

import pytest
import torch
from conftest import run_main, save_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import sample
from model import GPT, GPTConfig
from sample import generate, next_ids


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(GPTConfig(257, 24, 2, 2, 32))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval()


@pytest.mark.parametrize(("prompt", "new"), [(1, 23), (5, 10), (24, 8), (30, 4), (8, 40)])
def test_greedy_tokens_are_the_same_with_and_without_cache(model, prompt, new):
    """Also where the text outgrows the model's positions."""
    idx = torch.randint(257, (3, prompt), generator=torch.Generator().manual_seed(0))
    cached, plain = (generate(model, idx, new, temperature=0, use_cache=use) for use in (True, False))
    assert cached.shape == (3, prompt + new)
    assert (cached == plain).all() and (cached[:, :prompt] == idx).all()


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(model):
    """One sequence, where the products have one row, and two; greedily and sampled; a second model, and past the positions."""
    other = GPT(GPTConfig(257, 24, 2, 4, 32)).eval()
    for net, batch, new in ((model, 1, 21), (model, 2, 30), (other, 1, 21)):
        idx = torch.randint(257, (batch, 3), generator=torch.Generator().manual_seed(0))
        assert (generate(net, idx, new, temperature=0, compile=True) == generate(net, idx, new, temperature=0)).all()
        plain, compiled = (generate(net, idx, new, generator=torch.Generator().manual_seed(5), compile=c) for c in (False, True))
        assert (plain == compiled).all()


def test_greedy_tokens_equal_hugging_faces(tmp_path, model):
    model.save_pretrained(tmp_path)
    hf = GPT2LMHeadModel.from_pretrained(tmp_path)
    hf.generation_config.eos_token_id = None
    idx = torch.tensor([[5, 200, 31]])
    theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert (generate(model, idx, 20, temperature=0) == theirs).all()
    assert isinstance(hf.config, GPT2Config)


def test_a_seed_gives_the_same_samples(model):
    def text(seed, use_cache=True):
        return generate(model, torch.zeros(2, 1, dtype=torch.long), 12, generator=torch.Generator().manual_seed(seed), use_cache=use_cache)

    assert (text(1) == text(1)).all() and (text(1) == text(1, use_cache=False)).all()
    assert (text(1) != text(2)).any()


def frequencies(logits, n=20_000, **how):
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    ids = next_ids(logits.repeat(n, 1), generator=torch.Generator().manual_seed(0), **how)
    return torch.bincount(ids.flatten(), minlength=logits.numel()) / n


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])
    assert (frequencies(logits) - logits[0].softmax(-1)).abs().max() < 0.015
    assert (frequencies(logits, temperature=0.5) - (logits[0] / 0.5).softmax(-1)).abs().max() < 0.015
    top2 = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.5]).masked_fill(torch.tensor([1, 0, 1, 1, 0]).bool(), -torch.inf).softmax(-1)
    assert (frequencies(logits, top_k=2) - top2).abs().max() < 0.015


def test_top_p_keeps_the_fewest_ids_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert (frequencies(logits, top_p=0.5) > 0).tolist() == [False, True, False, False]
    assert (frequencies(logits, top_p=0.51) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.9) > 0).tolist() == [False, True, True, True]
    assert (frequencies(logits, top_p=0.01) > 0).tolist() == [False, True, False, False]


def test_temperature_zero_is_greedy_and_top_k_may_exceed_the_vocabulary():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert frequencies(logits, n=100, temperature=0).tolist() == [0, 1, 0]
    assert (frequencies(logits, n=1000, top_k=50) > 0).all()


def test_padding_ids_are_never_sampled(model):
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 1e4
    ids = generate(model, torch.zeros(16, 1, dtype=torch.long), 60, temperature=5.0, top_k=0)
    assert ids.max() < 257


def test_the_script_prints_the_samples_alone(model, tmp_path, capsys):
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    argv = ["-m", path, "-d", "cpu", "--prompt", "abc", "--num-samples", 3, "--max-new-tokens", 0]
    assert run_main(sample.main, *argv) == 0
    assert capsys.readouterr().out == "abc\n" * 3
    assert run_main(sample.main, "-m", tmp_path, "-d", "cpu", "--prompt", "", "--num_samples", 1, "--temperature", 0, "--no-kv-cache") == 0
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_script_computes_in_the_dtype_asked_for(model, tmp_path, monkeypatch, dtype):
    seen = []
    monkeypatch.setattr(sample, "generate", lambda model, idx, n, **how: seen.append({p.dtype for p in model.parameters()}) or idx)
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    assert run_main(sample.main, "-m", path, "-d", "cpu", "--dtype", dtype) == 0
    assert seen == [{torch.bfloat16 if dtype == "bf16" else torch.float32}]


def test_compile_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sample, "can_compile", lambda device: False)
    assert run_main(sample.main, "-m", "x.pt", "-d", "cpu", "--compile") == 2
    assert "--compile can't be used here on cpu (CPU: install g++): leave it out" in capsys.readouterr().err


def test_a_sample_ends_at_end_of_text(model, monkeypatch):
    from fineweb import get_tokenizer

    monkeypatch.setattr(sample, "generate", lambda model, idx, n, generator: torch.tensor([[97, 98, 256, 99], [97, 98, 99, 100]]))
    assert sample.sample_texts(model, get_tokenizer("bytes"), "a", 2, 3, 0) == ["ab", "abcd"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "-1", "--top-p", "0"], "--temperature is -1.0: it must be at least 0; --top-p is 0.0"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--compile", "--no-kv-cache"], "--compile is for generation with a cache"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999: it must be below 2^63"),
    ],
)
def test_wrong_settings_are_one_line(capsys, argv, message):
    assert run_main(sample.main, "-m", "x.pt", *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_diverged_is_named(model, temperature):
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="its training diverged"):
        generate(model, torch.zeros(1, 1, dtype=torch.long), 1, temperature)


def test_nothing_to_go_on_from_is_refused(model):
    with pytest.raises(ValueError, match="at least one id"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 1)
