"""Generation: cache, compiled steps and drafts change no token, and samples follow the distribution."""

import copy
import gc
import io
import sys
import weakref
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main, save_checkpoint
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList
from transformers.generation import logits_process as hf_process

import sample
from common.tokenizer import get_tokenizer
from sample import Sampling, generate, next_ids
from variants import VariantConfig, build


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = build(VariantConfig(257, 24, 2, 2, 32))
    for name, p in model.named_parameters():
        if "ln_" not in name:  # with random norms, the likeliest id would always be the same
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("prompt", "new"), [(1, 23), (5, 10), (24, 8), (30, 4), (8, 40)])
def test_cache_changes_no_greedy_token(model, prompt, new):
    """Also if the text becomes longer than the model's positions."""
    idx = torch.randint(257, (3, prompt), generator=torch.Generator().manual_seed(0))
    cached, plain = (generate(model, idx, new, temperature=0, use_cache=use) for use in (True, False))
    assert cached.shape == (3, prompt + new)
    assert (cached == plain).all() and (cached[:, :prompt] == idx).all()


@pytest.mark.slow
def test_compiled_steps_change_no_token(model):
    """One sequence (products with one row) and two; greedy and sampled; a second model; beyond the model's positions."""
    other = build(VariantConfig(257, 24, 2, 4, 32)).eval()
    for net, batch, new in ((model, 1, 21), (model, 2, 30), (other, 1, 21)):
        idx = torch.randint(257, (batch, 3), generator=torch.Generator().manual_seed(0))
        assert (generate(net, idx, new, temperature=0, compile=True) == generate(net, idx, new, temperature=0)).all()
        plain, compiled = (generate(net, idx, new, generator=torch.Generator().manual_seed(5), compile=c) for c in (False, True))
        assert (plain == compiled).all()


@pytest.mark.parametrize("switches", [{}, dict(window=4, pos="rope", doc_mask=True)])
def test_compiled_step_mutates_only_static_inputs(monkeypatch, switches):
    """Inductor skips the CUDA graph of a step that mutates an input which may move (its check_for_mutation)."""
    static = []

    def compiler(graph, inputs):
        step = torch._guards.TracingContext.get().fw_metadata
        static.append([i in step.static_input_indices for i, info in enumerate(step.input_info) if info.mutates_data])
        return make_boxed_func(graph.forward)

    step = torch.compile(sample.decode_step, backend=aot_autograd(fw_compiler=compiler, inference_compiler=compiler), dynamic=False)
    monkeypatch.setattr(sample, "compiled_step", lambda kind: step)
    model = build(VariantConfig(97, 16, 2, 2, 32, **switches))
    idx = torch.randint(97, (1, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second text does not recompile
        assert (generate(model, idx, 6, temperature=0, compile=True) == generate(model, idx, 6, temperature=0)).all()
    assert static == [[True] * (5 if switches else 4)]  # keys and values of two layers, and the documents


@pytest.fixture
def caches(monkeypatch) -> list:
    """The cache that each compiled step is given."""
    given = []

    def step(model, ids, cache, position):
        given.append(cache)
        return sample.decode_step(model, ids, cache, position)

    monkeypatch.setattr(sample, "compiled_step", lambda kind: step)
    return given


def texts(model, *batches: int, **how) -> list[torch.Tensor]:
    return [generate(model, torch.full((batch, 3), 7), 6, temperature=0, **how) for batch in batches]


@pytest.mark.parametrize("switches", [{}, dict(window=4, pos="rope", doc_mask=True)])
def test_compiled_texts_share_a_clean_cache(caches, switches):
    """A CUDA graph is recorded for the cache's address. What the last text left there must not show, not even a NaN."""
    model = build(VariantConfig(97, 24, 2, 2, 32, **switches))
    first = texts(model, 2, compile=True)[0]
    addresses = [x.data_ptr() for x in caches[0].tensors()]
    for x in caches[0].tensors():
        x.fill_(torch.nan if x.is_floating_point() else 3)
    assert torch.equal(texts(model, 2, compile=True)[0], first) and torch.equal(texts(model, 2)[0], first)
    assert len(set(map(id, caches))) == 1 and [x.data_ptr() for x in caches[0].tensors()] == addresses


def test_cache_of_another_kind_is_new(caches, model):
    texts(model, 2, 1, 2, compile=True)
    other = build(model.config)
    texts(other, 2, compile=True)
    with torch.autocast("cpu", torch.bfloat16):
        texts(other, 2, compile=True)
    texts(model.to(torch.bfloat16), 2, compile=True)
    assert len(set(map(id, caches))) == 6


def test_cache_of_inference_mode_stays_there(caches, model):
    with torch.inference_mode():
        first = texts(model, 1, compile=True)[0]
    assert torch.equal(texts(model, 1, compile=True)[0], first)


def test_two_texts_at_once_have_two_caches(caches, model):
    idx = torch.full((1, 3), 7)
    texts(model, 1, compile=True)
    expected = [new.item() for new, _ in sample.stream(model, idx, 6, Sampling(0), None)]
    both = zip(*(sample.stream(model, idx, 6, Sampling(0), None, compile=True) for _ in range(2)), strict=True)
    assert [(a.item(), b.item()) for (a, _), (b, _) in both] == [(x, x) for x in expected]
    assert len(set(map(id, caches))) == 2


def test_cache_goes_with_its_model(caches):
    model = build(VariantConfig(97, 24, 1, 2, 16))
    texts(model, 1, compile=True)
    held, kept = len(sample.SPARE), weakref.ref(caches[0].tensors()[0])
    caches.clear()
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None and len(sample.SPARE) == held - 1


def test_greedy_tokens_match_hugging_face(tmp_path, model):
    model.save_pretrained(tmp_path)
    hf = GPT2LMHeadModel.from_pretrained(tmp_path)
    hf.generation_config.eos_token_id = None
    idx = torch.tensor([[5, 200, 31]])
    theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert (generate(model, idx, 20, temperature=0) == theirs).all()
    assert isinstance(hf.config, GPT2Config)


def test_same_seed_gives_same_samples(model):
    def text(seed, use_cache=True):
        return generate(model, torch.zeros(2, 1, dtype=torch.long), 12, generator=torch.Generator().manual_seed(seed), use_cache=use_cache)

    assert (text(1) == text(1)).all() and (text(1) == text(1, use_cache=False)).all()
    assert (text(1) != text(2)).any()


def frequencies(logits, n=20_000, **options):
    sampling = Sampling(**{"top_k": 0} | options)
    ids = next_ids(logits.repeat(n, 1), sampling, torch.zeros(n, 1, dtype=torch.long), torch.Generator().manual_seed(0))
    return torch.bincount(ids.flatten(), minlength=logits.numel()) / n


def test_draw_matches_torch_multinomial():
    probs, ids = torch.rand(6, 50).softmax(-1), torch.randperm(50).expand(6, 50)
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for _ in range(20):
        assert (sample.draw(probs, ids, ours) == ids.gather(1, torch.multinomial(probs, 1, generator=theirs))).all()


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5]])
    assert (frequencies(logits) - logits[0].softmax(-1)).abs().max() < 0.015
    assert (frequencies(logits, temperature=0.5) - (logits[0] / 0.5).softmax(-1)).abs().max() < 0.015
    top2 = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.5]).masked_fill(torch.tensor([1, 0, 1, 1, 0]).bool(), -torch.inf).softmax(-1)
    assert (frequencies(logits, top_k=2) - top2).abs().max() < 0.015


def test_top_p_keeps_fewest_ids_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert (frequencies(logits, top_p=0.5) > 0).tolist() == [False, True, False, False]
    assert (frequencies(logits, top_p=0.51) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_p=0.9) > 0).tolist() == [False, True, True, True]
    assert (frequencies(logits, top_p=0.01) > 0).tolist() == [False, True, False, False]


OPTIONS = ({}, dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2), dict(min_p=1.0), dict(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1))


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("options", OPTIONS)
def test_distribution_matches_hugging_face(penalty, options):
    """Three positions, of which each sees one id more."""
    sampling = Sampling(**{"top_k": 0, "repetition_penalty": penalty} | options)
    ids, logits = torch.tensor([[1, 4, 4, 9, 2], [0, 0, 0, 7, 3]]), 2 * torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    probs, candidates = sample.distribution(logits, sampling, ids)
    ours = torch.zeros_like(logits).scatter_(2, candidates, probs)
    chain = [hf_process.RepetitionPenaltyLogitsProcessor(penalty), hf_process.TemperatureLogitsWarper(sampling.temperature)]
    chain += [hf_process.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [hf_process.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    chain += [hf_process.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for i in range(3):
        theirs = LogitsProcessorList(chain)(ids[:, : 3 + i], logits[:, i]).softmax(-1)
        assert torch.allclose(ours[:, i], theirs, atol=1e-6)


def test_repetition_penalty_matches_hugging_face(tmp_path, model):
    model.save_pretrained(tmp_path)
    hf = GPT2LMHeadModel.from_pretrained(tmp_path)
    hf.generation_config.eos_token_id = None
    idx = torch.tensor([[5, 200, 31]])
    how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, repetition_penalty=1.5)
    ours = generate(model, idx, 20, temperature=0, repetition_penalty=1.5)
    assert (ours == hf.generate(idx, attention_mask=torch.ones_like(idx), **how)).all()
    assert (ours != generate(model, idx, 20, temperature=0)).any()
    draft = similar_model(model)
    assert (generate(model, idx, 20, temperature=0, repetition_penalty=1.5, draft=draft) == ours).all()


def test_zero_temperature_and_oversized_top_k():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert frequencies(logits, n=100, temperature=0).tolist() == [0, 1, 0]
    assert (frequencies(logits, n=1000, top_k=50) > 0).all()


def test_padding_ids_are_never_sampled(model):
    with torch.no_grad():
        model.transformer.wte.weight[257:] = 1e4
    ids = generate(model, torch.zeros(16, 1, dtype=torch.long), 60, temperature=5.0, top_k=0)
    assert ids.max() < 257


def test_script_prints_only_samples(model, tmp_path, capsys):
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    argv = ["-m", path, "-d", "cpu", "--prompt", "abc", "--num-samples", 3, "--max-new-tokens", 0]
    assert run_main(sample.main, *argv) == 0
    assert capsys.readouterr().out == "abc\n" * 3
    assert run_main(sample.main, "-m", tmp_path, "-d", "cpu", "--prompt", "", "--num_samples", 1, "--temperature", 0, "--no-kv-cache") == 0
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_script_casts_model_and_draft_to_dtype(model, tmp_path, monkeypatch, dtype):
    seen = []

    def grow(model, idx, n, *sampling, draft, **options):
        seen.extend({p.dtype for p in model.parameters()} | {p.dtype for p in draft.parameters()})
        return []

    monkeypatch.setattr(sample, "grow", grow)
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    assert run_main(sample.main, "-m", path, "-d", "cpu", "--dtype", dtype, "--draft", path) == 0
    assert seen == [torch.bfloat16 if dtype == "bf16" else torch.float32]


def test_compile_flag_without_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sample, "compile_problem", lambda device: "it needs a C++ compiler: install g++")
    assert run_main(sample.main, "-m", "x.pt", "-d", "cpu", "--compile") == 2
    assert "drop --compile, which does not work here: it needs a C++ compiler: install g++" in capsys.readouterr().err


def test_samples_end_at_end_of_text(model, monkeypatch):
    new = [torch.tensor([[98, 256, 99], [98, 99, 100]]), torch.tensor([[101], [256]]), torch.tensor([[102], [103]])]
    monkeypatch.setattr(sample, "grow", lambda *args: iter(new))
    assert sample.sample_texts(model, get_tokenizer("bytes"), "a", 2, 7, 0) == ["ab", "abcd"]
    steps = iter(new)
    monkeypatch.setattr(sample, "grow", lambda *args: steps)
    sample.sample_texts(model, get_tokenizer("bytes"), "a", 2, 7, 0)
    assert len(list(steps)) == 1  # it stops when all have ended


def test_first_text_is_shown_as_it_grows(model, monkeypatch):
    """A character of several bytes comes with its last one; bytes that are no text become the usual sign."""
    monkeypatch.setattr(sample, "grow", lambda *args: [torch.tensor([[byte]]) for byte in [*"aé".encode(), 0xC3, 98, 0xE2, 0x82]])
    shown = []
    texts = sample.sample_texts(model, get_tokenizer("bytes"), "<", 1, 7, 0, show=shown.append)
    assert shown == ["<a", "", "é", "", "\ufffdb", "", "", "\ufffd"]
    assert texts == ["".join(shown)] == ["<" + get_tokenizer("bytes").decode([*"aé".encode(), 0xC3, 98, 0xE2, 0x82])]


def test_script_streams_the_first_sample(model, tmp_path, monkeypatch):
    path, written = save_checkpoint(tmp_path, 1, model, "bytes", None, {}), []
    out = io.StringIO()
    monkeypatch.setattr(out, "flush", lambda: written.append(out.getvalue()), raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    assert run_main(sample.main, "-m", path, "-d", "cpu", "--prompt", "abc", "--num-samples", 2, "--max-new-tokens", 5) == 0
    assert len(written) >= 6 and written[0].startswith("abc") and len(out.getvalue().splitlines()) >= 2


def test_prompt_comes_from_a_file(model, tmp_path, capsys):
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    (tmp_path / "prompt.txt").write_text("def é\n", encoding="utf-8")
    argv = ["-m", path, "-d", "cpu", "--num-samples", 1, "--max-new-tokens", 0, "--prompt"]
    assert run_main(sample.main, *argv, f"FILE:{tmp_path}/prompt.txt") == 0
    assert capsys.readouterr().out == "def é\n\n"
    (tmp_path / "prompt.txt").write_bytes(b"\xff")
    for name in ("prompt.txt", "nowhere.txt", ""):
        assert run_main(sample.main, *argv, f"FILE:{tmp_path}/{name}") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "can't read the file" in err and "give the path of a text in UTF-8" in err


# ---- speculative decoding ----


def similar_model(model, seq_len=24, noise=0.02):
    """A model that often has the same likeliest id as this one."""
    torch.manual_seed(1)
    draft = build(VariantConfig(257, seq_len, 2, 2, 32)).eval()
    weights = {name: p + noise * torch.randn_like(p) for name, p in model.state_dict().items()}
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:seq_len]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    draft.load_state_dict(weights)
    return draft


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("prompt", "new"), [(1, 23), (5, 0), (5, 1), (5, 12), (24, 3), (30, 4), (8, 30)])
def test_draft_changes_no_greedy_token(model, batch, prompt, new):
    """A good draft, a bad one and one with few positions; few and many ids per pass; also texts longer than the positions."""
    idx = torch.randint(257, (batch, prompt), generator=torch.Generator().manual_seed(0))
    plain = generate(model, idx, new, temperature=0)
    drafts = similar_model(model), similar_model(model, noise=1), similar_model(model, seq_len=9), build(VariantConfig(257, 50, 1, 1, 8))
    for draft in drafts:
        for k in (1, 2, 5, 100):
            assert (generate(model, idx, new, temperature=0, draft=draft, draft_tokens=k) == plain).all()


def test_draft_changes_no_token_with_windows():
    """Their caches are rings, where a rejected token has overwritten another."""
    torch.manual_seed(1)
    model = build(VariantConfig(257, 64, 2, 2, 32, pos="rope", window=5, window_pattern="SL", tied_head=False)).eval()
    for name, p in model.named_parameters():
        if "ln_" not in name:
            torch.nn.init.normal_(p, std=0.3)
    draft = copy.deepcopy(model)
    for p in draft.parameters():
        p.data += 0.05 * torch.randn_like(p)
    idx = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = generate(model, idx, 40, temperature=0, use_cache=False)
    assert len(plain[:, 9:].unique()) > 20
    for k in (1, 4, 9):
        counts = Counter()
        assert (generate(model, idx, 40, temperature=0, draft=draft, draft_tokens=k, counts=counts) == plain).all()
        assert 0 < counts["accepted"] < counts["proposed"]


def test_good_draft_saves_passes(model):
    counts, idx = Counter(), torch.randint(257, (1, 4), generator=torch.Generator().manual_seed(0))
    generate(model, idx, 20, temperature=0, draft=similar_model(model), draft_tokens=3, counts=counts)
    assert 0 < counts["accepted"] < counts["proposed"]
    assert counts["passes"] + counts["accepted"] == 20  # each pass adds one id from the model itself


@pytest.mark.parametrize("temperature", [0, 1])
def test_model_as_own_draft_accepts_all_ids(model, temperature):
    """20 ids take 4 passes of 5. Two positions are left: one pass, with one drafted id. 3 more ids take one pass each."""
    counts, idx = Counter(), torch.zeros(2, 2, dtype=torch.long)
    generate(model, idx, 26, temperature, draft=model, draft_tokens=4, generator=torch.Generator().manual_seed(0), counts=counts)
    assert counts == {"proposed": 2 * 18, "accepted": 2 * 18, "passes": 4 + 1 + 3, "ids": 26}


class Chain:
    """Replaces a GPT: the next id depends only on the last one, by logits (V, V)."""

    def __init__(self, logits):
        self.table, self.config = logits, SimpleNamespace(vocab_size=len(logits), seq_len=100)
        self.lm_head = SimpleNamespace(weight=torch.empty(0, device="meta"))  # inference_copy leaves such a device alone

    def hidden_states(self, ids, cache):
        cache.length += ids.size(1)
        return ids

    def logits(self, ids):
        return self.table[ids]


def chi_square(logits, ids, temperature, top_k, top_p):
    """How far the ids (N, T) are from a chain that starts with id 0, in standard deviations of the chi-square statistic."""
    probs = torch.zeros_like(logits)
    for row, out in zip(logits / temperature, probs, strict=True):
        likeliest = row.argsort(descending=True)[: top_k or None].tolist()
        p = row[likeliest].softmax(0)
        kept = [i for i in range(len(p)) if p[:i].sum() < top_p]
        out[[likeliest[i] for i in kept]] = p[kept] / p[kept].sum()
    found, square, cells = Counter(map(tuple, ids.tolist())), 0.0, 0
    for path in product(range(len(logits)), repeat=ids.size(1)):
        expected = len(ids) * float(torch.stack([probs[a, b] for a, b in zip((0, *path), path, strict=False)]).prod())
        if not expected:
            assert path not in found
            continue
        square, cells = square + (found[path] - expected) ** 2 / expected, cells + 1
    return (square - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "k"), [(1.0, 0, 1.0, 2), (1.5, 3, 1.0, 2), (2.0, 0, 0.7, 1), (2.0, 4, 0.9, 2)])
def test_draft_keeps_the_distribution(temperature, top_k, top_p, k):
    """Compares all texts of three ids out of five with their exact probabilities, for one row at a time and for three."""
    logits, noise = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(30))
    model, draft, generator, sampling = Chain(logits), Chain(logits + noise), torch.Generator().manual_seed(0), (temperature, top_k, top_p)
    for batch, calls in ((1, 2000), (3, 700)):
        start = torch.zeros(batch, 1, dtype=torch.long)
        ids = torch.cat([generate(model, start, 3, *sampling, generator, draft=draft, draft_tokens=k) for _ in range(calls)])[:, 1:]
        assert abs(chi_square(logits, ids, *sampling)) < 4


def test_draft_with_another_vocabulary_is_rejected(model, tmp_path, capsys, gpt2_tokenizer):
    other = build(VariantConfig(50257, 24, 1, 1, 8))
    with pytest.raises(ValueError, match="the draft has 50257 ids, the model 257"):
        generate(model, torch.zeros(1, 1, dtype=torch.long), 1, draft=other)
    path, draft = save_checkpoint(tmp_path, 1, model, "bytes", None, {}), save_checkpoint(tmp_path, 2, other, "gpt2", None, {})
    assert run_main(sample.main, "-m", path, "-d", "cpu", "--draft", draft) == 2
    assert "error: --draft uses gpt2 tokens, the model bytes: use a draft with the same tokenizer\n" in capsys.readouterr().err


def test_script_reports_accepted_draft_tokens(model, tmp_path, capsys):
    """The model is its own draft: 12 tokens take 4 passes, each with 2 tokens from the draft and one from the model."""
    path = save_checkpoint(tmp_path, 1, model, "bytes", None, {})
    model.save_pretrained(tmp_path / "draft")
    argv = ["-m", path, "-d", "cpu", "--prompt", "abc", "--num-samples", 2, "--max-new-tokens", 12, "--temperature", 0]
    assert run_main(sample.main, *argv) == 0
    plain = capsys.readouterr()
    assert run_main(sample.main, *argv, "--draft", tmp_path / "draft", "--draft-tokens", 2) == 0
    speculative = capsys.readouterr()
    assert speculative.out == plain.out and "draft" not in plain.err
    assert "draft: 16 of 16 tokens accepted (100%); each pass of the model added 3.00 tokens to a sample\n" in speculative.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "-1", "--top-p", "0"], "--temperature is -1.0: it must be at least 0; --top-p is 0.0"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--min-p", "1.1"], "--min-p is 1.1: it must be from 0 to 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0: it must be above 0 and finite"),
        (["--compile", "--no-kv-cache"], "--compile needs the KV cache: drop --no-kv-cache"),
        (["--draft", "y.pt", "--no-kv-cache", "--top-k", "-1"], "at least 0; --draft needs the KV cache: drop --no-kv-cache"),
        (["--draft", "y.pt", "--compile"], "--draft and --compile don't work together: drop one"),
        (["--draft-tokens", "0"], "--draft-tokens is 0: it must be at least 1"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999: it must be below 2^63"),
    ],
)
def test_wrong_flags_are_one_line(capsys, argv, message):
    assert run_main(sample.main, "-m", "x.pt", *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [dict(top_p=0.0), dict(top_p=2.0), dict(top_k=-1), dict(temperature=-1.0), dict(max_new_tokens=-1)])
def test_generate_rejects_wrong_numbers_and_shapes(model, wrong):
    with pytest.raises(ValueError, match=f"--{'-'.join(next(iter(wrong)).split('_'))} is "):
        generate(**dict(model=model, idx=torch.zeros(1, 1, dtype=torch.long), max_new_tokens=2) | wrong)
    with pytest.raises(ValueError, match=r"needs ids \(B, T\) .* these are \(3,\)"):
        generate(model, torch.zeros(3, dtype=torch.long), 2)


@pytest.mark.parametrize("temperature", [0, 1])
def test_diverged_model_or_draft_is_named(model, temperature):
    with torch.no_grad():
        model.transformer.wte.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="its training diverged"):
        generate(model, torch.zeros(1, 1, dtype=torch.long), 1, temperature)
    with pytest.raises(ValueError, match="the draft's logits are not finite"):
        generate(build(model.config), torch.zeros(1, 1, dtype=torch.long), 2, temperature, draft=model)


@pytest.mark.parametrize("temperature", [0, 1])
def test_diverged_later_position_is_reported(monkeypatch, temperature):
    model = build(VariantConfig(257, 16, 1, 1, 8))
    monkeypatch.setattr(sample, "compiled_step", lambda kind: sample.decode_step)
    with torch.no_grad():
        model.transformer.wpe.weight[5:] = torch.nan
    for options in ({}, dict(use_cache=False), dict(compile=True), dict(draft=build(VariantConfig(257, 16, 1, 1, 8)))):
        with pytest.raises(ValueError, match="the model's logits are not finite: its training diverged"):
            generate(model, torch.zeros(1, 1, dtype=torch.long), 10, temperature, **options)


def test_empty_prompt_is_rejected(model):
    with pytest.raises(ValueError, match="with T at least 1"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 1)


def test_compile_is_rejected_for_experts():
    with pytest.raises(ValueError, match="--compile does not work with experts: drop it"):
        generate(build(VariantConfig(97, 16, 1, 2, 16, n_expert=2)), torch.zeros(1, 1, dtype=torch.long), 4, compile=True)
