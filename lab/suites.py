"""The ready-made comparisons of lab.compare --suite: name → variant → flags of train.py."""

# 0.9 M parameters, 1.6 M bytes in 800 steps
SMALL = (
    "--n-layer 4 --n-head 4 --n-embd 128 --seq-len 256 --vocab-size 257 --total-batch-tokens 2048 --micro-batch-size 8 "
    "--max-steps 800 --val-every 0 --val-tokens 262144 --hellaswag-every 0 --sample-every 0 --checkpoint-every 0 --keep 1"
)
# --suite rates searches for these learning rates and momenta
ADAMW = "--preset gpt2 --max-lr 4e-3 --min-lr-ratio 0.02 --warmup-steps 40"
MODERN = "--preset modern --total-batch-tokens 1024 --micro-batch-size 4"  # modern learns more from twice as many, smaller steps
EPOCH, LONG = 2441, "--preset modern --total-batch-tokens 4096 --micro-batch-size 16 --val-every 488"  # an epoch of 10 MB takes 2441 steps
WIDE = f"{LONG} --n-embd 256 --max-steps {4 * EPOCH}"  # 3.2 M parameters
ROPE = f"{ADAMW} --pos rope"  # GPT-2's learned positions have hardly begun to work by step 800
# a name always means the same run: suites with the same --out-dir share it
SUITES = {
    "switches": {  # each switch alone, on top of rope
        "gpt2": ADAMW,
        "rope": ROPE,
        "rope, 2 KV heads": f"{ROPE} --n-kv-head 2",
        "rope, 1 KV head": f"{ROPE} --n-kv-head 1",
        "rope, window 64": f"{ROPE} --window 64",
        "rope, window 64 in 3 of 4": f"{ROPE} --window 64 --window-pattern SSSL",
        "rope, 4 experts, 1 at work": f"{ROPE} --n-expert 4",
        "rope, QK-norm": f"{ROPE} --qk-norm",
        "rope, RMSNorm": f"{ROPE} --norm rmsnorm",
        "rope, ReLU²": f"{ROPE} --mlp relu2",
        "rope, SwiGLU": f"{ROPE} --mlp swiglu",
        "rope, no biases": f"{ROPE} --no-bias",
        "rope, untied head": f"{ROPE} --no-tied-head",
        "rope, value residual": f"{ROPE} --value-residual",
        "rope, documents apart": f"{ROPE} --doc-mask",
        "rope, layers shared by twos": f"{ROPE} --share-layers 2",
        "rope, 2 layers": f"{ROPE} --n-layer 2",
        "rope, wsd": f"{ROPE} --schedule wsd",
        "rope, average": f"{ROPE} --ema 0.99",
        "rope, muon": f"{ROPE} --optimizer muon",
        "rope, short convolutions": f"{ROPE} --short-conv 4",
        "rope, offset keys": f"{ROPE} --key-offset",
        "rope, gated heads": f"{ROPE} --head-gate",
        "rope, QK-norm, mimetic init": f"{ROPE} --qk-norm --mimetic-init",
        "rope, token pairs": f"{ROPE} --bigram 66306",
        "modern": f"{MODERN} --max-steps 1600",
    },
    "without": {  # modern with one part left out or replaced
        "modern, 533 steps": f"{MODERN} --max-steps 533",
        **{
            f"modern, 533 steps, {name}": f"{MODERN} --max-steps 533 {flags}"
            for name, flags in {
                "learned positions, no offset keys": "--pos learned --no-key-offset",
                "no QK-norm, no mimetic init": "--no-qk-norm --no-mimetic-init",
                "LayerNorm": "--norm layernorm",
                "GELU": "--mlp gelu",
                "ReLU²": "--mlp relu2",
                "biases": "--bias",
                "untied head": "--no-tied-head",
                "no value residual": "--no-value-residual",
                "no mimetic init": "--no-mimetic-init",
                "no short convolutions": "--short-conv None",
                "no offset keys": "--no-key-offset",
                "no head gates": "--no-head-gate",
                "plain Muon": "--muon-beta2 0",
                "momentum 0.95": "--muon-momentum 0.95",
                "batches twice as large": "--total-batch-tokens 2048 --micro-batch-size 8 --max-steps 267",
                "token pairs": "--bigram 66306",
                "cosine": "--schedule cosine",
                "AdamW": "--optimizer adamw --max-lr 4e-3 --warmup-steps 40",
            }.items()
        },
    },
    "rates": {
        **{f"gpt2, {lr}": f"{ADAMW} --max-lr {lr} --max-steps 4000" for lr in ("2e-3", "4e-3", "8e-3")},
        **{f"modern, {lr}": f"{MODERN} --muon-lr {lr}" for lr in ("0.01", "0.02", "0.04")},
        **{f"modern, AdamW's {lr}": f"{MODERN} --max-lr {lr}" for lr in ("5e-3", "2e-2")},
        **{f"modern, momentum {m}": f"{MODERN} --muon-momentum {m}" for m in ("0.8", "0.9", "0.95")},
    },
    "modern": {
        "gpt2, 4000 steps": f"{ADAMW} --max-steps 4000 --warmup-steps 100",
        **{f"modern, {steps} steps": f"{MODERN} --max-steps {steps}" for steps in (360, 440, 533)},
    },
    "tables": {  # 9.3 M parameters: a row for each pair of bytes
        "gpt2, 4000 steps": f"{ADAMW} --max-steps 4000 --warmup-steps 100",
        **{f"modern, token pairs, {steps} steps": f"{MODERN} --bigram 66306 --max-steps {steps}" for steps in (300, 360, 440)},
    },
    "experts": {  # all have the same number of active parameters, the router aside
        "rope": ROPE,
        "rope, 4 experts, 1 at work": f"{ROPE} --n-expert 4",
        "rope, 4 experts, 2 at work": f"{ROPE} --n-expert 4 --n-expert-active 2",
        "rope, 8 experts, 2 at work": f"{ROPE} --n-expert 8 --n-expert-active 2",
    },
    "teacher": {
        "alone": f"{MODERN} --n-layer 2 --n-embd 64 --n-head 2",
        "teacher": f"{MODERN} --max-steps 1200",
        "taught": f"{MODERN} --n-layer 2 --n-embd 64 --n-head 2 --teacher {{out_dir}}/teacher/{{seed}}",
    },
    "little-data": {  # any number of epochs of 10 MB; needs shards of that size: fineweb.py --max-tokens 10.5e6 --shard-size 5e5
        **{f"modern, {n} × 10 MB": f"{LONG} --max-steps {n * EPOCH}" for n in (1, 2, 4)},
        "256 wide, 4 × 10 MB": WIDE,
        "256 wide, 4 × 10 MB, weight decay": f"{WIDE} --weight-decay 0.03",
        "256 wide, 4 × 10 MB, taught": f"{WIDE} --weight-decay 0.03 --teacher "
        "{out_dir}/modern__4___10_MB/{seed},{out_dir}/256_wide__4___10_MB__weight_decay/{seed}",
    },
    "length": {
        "learned, 1200 steps": f"{ADAMW} --max-steps 1200",
        "rope, 1200 steps": f"{ROPE} --max-steps 1200",
    },
}
