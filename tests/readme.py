"""Runs every command of README.md and docs/ in a fresh copy of the repository: PYTHONPATH=. python tests/readme.py FOLDER

What needs eight GPUs, days or the network runs small: on two processes, with a tiny model, against a hub on localhost.
SMALL says what is added to which command; everything else runs word for word.
"""

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hub import serve
from made_up_tasks import write_tasks
from test_dataloader import llmc_bin
from test_fineweb import CARD

REPO = Path(__file__).parent.parent
SHAPE = "--n-layer 2 --n-head 2 --n-embd 32"
STEPS = (
    "--seq-len 64 --total-batch-tokens 512 --micro-batch-size 4 --max-steps 8 --warmup-steps 2 --val-tokens 1024 "
    "--device cpu --no-compile --hellaswag-file tasks.jsonl --sample-every 4"
)
LADDER = "--seq-len 64 --total-batch-tokens 512 --micro-batch-size 4 --max-lr 3e-3 --val-tokens 1024 --device cpu --no-compile"
QUICK = "--flags='--preset quickstart --max-steps 10 --val-tokens 1024 --checkpoint-every 0 --sample-every 0'"
VISIT = "curl --silent --fail --retry 60 --retry-delay 1 --retry-connrefused --output page.html"
SMALL = (  # the first pattern that a command matches says what is added to it
    (r"^until", ""),  # the run in log is finished by then: it says so
    (r"lab.sweep", f"--trials 2 {QUICK}"),
    (r"lab.compare log/baseline", "--seeds 1"),
    (r"^printf", ""),
    (r"lab.search", f"--larger= --seeds 3 --fresh-seeds 2 {QUICK}"),
    (r"lab.false_keeps", "--trials 1 --seeds 2 --limit 3 --pairs 2"),
    (r"lab.compare", f"--seeds 1 {QUICK}"),
    (r"--plan|lab.scaling (plan|fit)", ""),
    (r"lab.scaling ladder", f"--sizes 1x32 2x32 2x64 --tokens 2560 5120 10240 --workers 2 --flags='{LADDER}'"),
    (r"export.py", ""),
    (r"lm_eval", "--device cpu"),
    (r"app.py", f"& {VISIT} http://127.0.0.1:7860; seen=$?; kill $!; exit $seen"),
    (r"--preset quickstart --data-dir (mine_bytes|play|file://)|log/early", "--max-steps 20"),
    (r"--resume --out-dir log/quickstart", "--max-steps 1510"),
    (r"--preset quickstart|log/quickstart|plot_log|pytest|pip install|jupyter", ""),
    (r"--rehearse", f"{SHAPE} {STEPS} --out-dir log/rehearsed"),  # log holds a run by then
    (r"train.py.*--resume", "--max-steps 12"),
    (r"train.py.*--init-from", STEPS),
    (r"train.py", f"{SHAPE} {STEPS}"),
    (r"evaluate.py", "-d cpu --limit 4"),
    (r"hellaswag.py", "--file tasks.jsonl -d cpu"),
    (r"sample.py", "-d cpu"),
    (r"perplexity.py", "-d cpu --max-tokens 2000"),
    (r"fineweb.py", "--workers 2"),
    (r"lab.bench", f"{SHAPE} --seq-len 64 --what train load tokenize --rounds 1 --megabytes 1 --shard-tokens 100000 --no-compile"),
)


# pages that run in this order: later ones use what earlier ones made. The other pages of docs/ run beside them
IN_ORDER = ("first-steps", "data", "rented-machines", "evaluation")


def pages() -> tuple[list[Path], list[Path]]:
    """The pages of docs/ in two lists, which can run at the same time after README.md."""
    first = [REPO / "docs" / f"{page}.md" for page in IN_ORDER]
    return first, sorted(set((REPO / "docs").glob("*.md")) - set(first))


def commands(readme: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) for line in block.splitlines() if line]


def python_blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def smaller(command: str) -> str:
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
    for pattern, flags in SMALL:
        if re.search(pattern, command):
            return f"{command} {flags}".strip()
    raise SystemExit(f"no rule in tests/readme.py for {command!r}")


def repos(folder: Path) -> dict[str, dict[str, bytes]]:
    """What the commands fetch: a FineWeb-Edu, ready .bin shards and a gpt2, all of them small."""
    from test_export import on_the_hub
    from test_hellaswag import make_tasks

    from variants import VariantConfig, build

    pages = [path.read_text() for path in sorted(REPO.rglob("*.py"))] * 4
    pq.write_table(pa.table({"text": pages}), folder / "pages.parquet")
    names = ("10BT/000_00000", "100BT/000_00000", "100BT/001_00000", "100BT/002_00000", "100BT/003_00000")
    edu = {"README.md": CARD} | {f"sample/{name}.parquet": (folder / "pages.parquet").read_bytes() for name in names}
    bins = {}
    for index in range(2):
        name = f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
        llmc_bin(folder / name, np.arange(20_000) % 50257)
        bins[name] = (folder / name).read_bytes()
    torch.manual_seed(0)
    build(VariantConfig(n_layer=2, n_head=2, n_embd=32)).save_pretrained(folder / "gpt2")
    gpt2 = {path.name: path.read_bytes() for path in (folder / "gpt2").iterdir()}
    datasets = {"HuggingFaceFW/fineweb-edu": edu, "kjj0/fineweb10B-gpt2": bins, "Rowan/hellaswag": on_the_hub(make_tasks(8))}
    return {f"datasets/{name}": files for name, files in datasets.items()} | {"openai-community/gpt2": gpt2}


def main(folder: Path):
    import json

    from test_hellaswag import make_tasks

    subprocess.run(["git", "clone", "--quiet", str(REPO), str(folder / "clone")], check=True)
    clone = folder / "clone"
    (clone / "play.txt").write_text((clone / "README.md").read_text() * 20)
    write_tasks(clone)
    (clone / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in make_tasks(8)))
    with serve(repos(folder)) as (url, _):
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_XET": "1"}
        run_pages([REPO / "README.md"], clone, env)
        with ThreadPoolExecutor() as pool:  # two at a time: much of the time is one process that starts
            list(pool.map(lambda those: run_pages(those, clone, env | {"OMP_NUM_THREADS": "1"}, beside_others=True), pages()))


FAILED = threading.Event()


def run_pages(those: list[Path], clone: Path, env: dict[str, str], beside_others: bool = False):
    """Runs the commands of these pages in order, then their Python. Beside others, a command's output is printed at its end."""
    text = "\n".join(page.read_text() for page in those)
    for command in [*map(smaller, commands(text)), *(shlex.join(["python", "-c", code]) for code in python_blocks(text))]:
        if FAILED.is_set():
            return
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") if beside_others else {}
        result = subprocess.run(["bash", "-c", command], cwd=clone, env=env, stdin=subprocess.DEVNULL, **how)
        seconds = time.monotonic() - began
        print(*([f"---- {command}\n{result.stdout}"] if beside_others else []), f"({seconds:.0f} s)", flush=True)
        if result.returncode:
            FAILED.set()
            raise SystemExit(f"failed: {command}")
        if command.endswith("train.py --preset quickstart"):
            check_quickstart(clone / "log" / "quickstart", seconds)


def check_quickstart(run: Path, seconds: float):
    losses = [float(line.split()[2]) for line in (run / "log.txt").read_text().splitlines() if line.split()[1] == "val"]
    # the time is shown, not asserted: it is three minutes on two idle cores, and these may not be idle
    print(f"quickstart: val loss {losses[-1]:.4f} nats a byte in {seconds:.0f} s", flush=True)
    assert losses[-1] < 1.65
    assert (run / "log_plot.png").stat().st_size > 20_000 and list(run.glob("model_*.pt"))


if __name__ == "__main__":
    del os.environ["PYTHONPATH"]  # the commands must do without
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    main(target)
