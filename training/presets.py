"""The presets of train.py. A preset sets the defaults of all other flags."""

from formats.huggingface import SIZES
from training.config import TrainConfig
from variants import VariantConfig


def gpt3(name: str, n_layer: int, n_head: int, n_embd: int, total_batch_tokens: int = 2**19, **settings) -> TrainConfig:
    """A GPT-3 of Brown et al., 2020, table 2.1, but with dense attention in all layers. Trains on 10 B tokens like the other presets
    (GPT-3: 300 B). Warms up over 375 M tokens as in appendix B."""
    return TrainConfig(
        preset=name,
        model=VariantConfig(seq_len=2048, n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        total_batch_tokens=total_batch_tokens,
        max_steps=round(10e9 / total_batch_tokens),
        warmup_steps=round(375e6 / total_batch_tokens),
        **settings,
    )


PRESETS = {
    "gpt2": TrainConfig(),
    "quickstart": TrainConfig(
        preset="quickstart",
        data_dir="stdlib_bytes",
        out_dir="log/quickstart",
        # on two CPU cores, the backward pass of PyTorch's fused attention is slower than plain products
        model=VariantConfig(vocab_size=257, seq_len=128, n_layer=2, n_head=2, n_embd=128, attention="manual"),
        max_steps=1500,
        total_batch_tokens=2048,
        micro_batch_size=16,
        max_lr=6e-3,
        min_lr_ratio=0.02,
        warmup_steps=100,
        compile=False,
        val_every=500,
        val_tokens=131072,
        hellaswag_every=0,
        sample_every=750,
        sample_prompt="def ",
        sample_tokens=200,
        checkpoint_every=750,
        keep=1,
    ),
    # learning rates: Brown et al., 2020, table 2.1, by size
    "gpt2-medium": TrainConfig(preset="gpt2-medium", model=VariantConfig(**SIZES["gpt2-medium"]), max_lr=3e-4, micro_batch_size=32),
    "gpt2-large": TrainConfig(preset="gpt2-large", model=VariantConfig(**SIZES["gpt2-large"]), max_lr=2.5e-4, micro_batch_size=16),
    "gpt2-xl": TrainConfig(preset="gpt2-xl", model=VariantConfig(**SIZES["gpt2-xl"]), max_lr=2e-4, micro_batch_size=8),
    "gpt3-125m": gpt3("gpt3-125m", n_layer=12, n_head=12, n_embd=768, max_lr=6e-4, micro_batch_size=32),
    "gpt3-350m": gpt3("gpt3-350m", n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, micro_batch_size=16),
    "gpt3-760m": gpt3("gpt3-760m", n_layer=24, n_head=16, n_embd=1536, max_lr=2.5e-4, micro_batch_size=8),
    # the table has 24 heads of 128 for a width of 2048, but 24 × 128 is not 2048: we use 16
    "gpt3-1b": gpt3("gpt3-1b", n_layer=24, n_head=16, n_embd=2048, max_lr=2e-4, micro_batch_size=4, total_batch_tokens=2**20),
    # GPT-2's layers and width, with changes that learn from fewer tokens; lab.compare --suite without measures what each one gains
    "modern": TrainConfig(
        preset="modern",
        model=VariantConfig(
            pos="rope",
            qk_norm=True,
            norm="rmsnorm",
            mlp="swiglu",
            bias=False,
            value_residual=True,
            short_conv=4,
            key_offset=True,
            head_gate=True,
            mimetic_init=True,
        ),
        optimizer="muon",
        muon_momentum=0.0,
        muon_beta2=0.95,
        schedule="wsd",
        decay_ratio=0.7,
        max_lr=1e-2,
        min_lr_ratio=0.0,
        warmup_steps=0,
        weight_decay=0.0,
    ),
}
