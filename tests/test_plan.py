"""Sizes against published figures; the memory estimate against what a step really allocates; scaling against published runs."""

import pytest
import torch

from config import PRESETS
from model import GPT, GPTConfig


def on_meta(config: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(config)


# ---- sizes ----


# Brown et al., 2020: table 2.1's layers, width, batch in tokens and learning rate; table D.1's parameters in millions and its FLOPs
@pytest.mark.parametrize(
    ("name", "n_layer", "n_embd", "batch", "max_lr", "millions", "flops"),
    [
        ("gpt3-125m", 12, 768, 0.5e6, 6.0e-4, 125, 2.25e20),
        ("gpt3-350m", 24, 1024, 0.5e6, 3.0e-4, 356, 6.41e20),
        ("gpt3-760m", 24, 1536, 0.5e6, 2.5e-4, 760, 1.37e21),
        ("gpt3-1b", 24, 2048, 1e6, 2.0e-4, 1320, 2.38e21),
    ],
)
def test_the_gpt3_presets_are_the_published_ones(name, n_layer, n_embd, batch, max_lr, millions, flops):
    config = PRESETS[name]
    assert (config.model.n_layer, config.model.n_embd, config.model.seq_len, config.max_lr) == (n_layer, n_embd, 2048, max_lr)
    assert config.total_batch_tokens == pytest.approx(batch, rel=0.05)
    assert config.total_batch_tokens * config.warmup_steps == pytest.approx(375e6, rel=2e-3)
    assert config.total_batch_tokens * config.max_steps == pytest.approx(10e9, rel=1e-4)
    params = on_meta(config.model).num_params()
    assert params == pytest.approx(millions * 1e6, rel=0.004)  # rounded to three digits there
    assert 6 * params * 300e9 == pytest.approx(flops, rel=0.006)


def test_flops_are_those_of_nanogpts_notebook():
    """transformer_sizing.ipynb counts, for one sequence, 874,944,921,600 in the matrix products and 879,894,724,608 by PaLM's formula
    over all 124,337,664 parameters. Ours leaves the position table out and has the rows in that pad the vocabulary."""
    config = GPTConfig(bias=False)
    model = on_meta(config)
    assert model.num_params() == 124_337_664
    padding, positions = (config.padded_vocab_size - config.vocab_size) * config.n_embd, config.seq_len * config.n_embd
    ours = 1024 * model.flops_per_token()
    assert ours == 879_894_724_608 + 1024 * 6 * (padding - positions)
    assert ours == pytest.approx(874_944_921_600, rel=5e-4)
