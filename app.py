"""A web page to try models in. It samples with sample.py.

python app.py -m log/quickstart        # then open http://127.0.0.1:7860
"""

import functools
import html
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro

from checkpoint import checkpoint_file, files_of, load_with_tokenizer, sealed_steps
from common import cli
from common.device import pick_device, pick_dtype
from common.logs import read_metrics
from common.shards import find_shards
from common.tokenizer import Tokenizer, get_tokenizer
from common.validation import raise_errors
from dataloader import TokenStream
from model import GPT
from sample import GrowingText, Sampling, stream
from training.run_json import read_run


@dataclass
class AppConfig:
    """Serve a page to try models in, on 127.0.0.1:7860.

    Gradio's environment variables (GRADIO_SERVER_PORT, …) change that."""

    model: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-m"])]
    """One or more: a run's folder (offers all its checkpoints), a checkpoint.pt, a Hugging Face folder, gpt2, …"""
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision of weights and computation. auto: bf16 if the hardware supports it."""

    def validate(self):
        """ValueError with all errors at once."""
        raise_errors([] if self.model else ["-m needs a model: python app.py -m log/quickstart"])


# (least, most, default): any request, also from a program, is clamped to these
TEMPERATURE, TOP_K, TOP_P, LENGTH, SEED = (0.1, 2.0, 1.0), (0, 200, 50), (0.05, 1.0, 1.0), (1, 1000, 200), (0, 2**32 - 1, 1337)
PROMPT_CHARS, BODY_BYTES, WAITING = 20_000, 1_000_000, 32


def clamp(value, least: float, most: float, default: float) -> float:
    """The value as a number from least to most, or the default if it is not a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return default if math.isnan(number) else min(max(number, least), most)


# ---- the models ----


def offered(models: tuple[str, ...]) -> dict[str, str]:
    """Name → path for load. A run's folder offers its newest checkpoint at the time of the request, and each one it has now."""
    choices = {}
    for path in models:
        steps = sealed_steps(Path(path))
        choices[f"{path}, newest" if len(steps) > 1 else path] = path
        for step in reversed(steps if len(steps) > 1 else []):
            choices[f"{path}, step {step}"] = str(files_of(Path(path), step).model)
    return choices


def load(path: str, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """A model with its tokenizer. Keeps the last four in memory, and reloads one if its file has changed."""
    file = checkpoint_file(path)
    weights = file or Path(path, "model.safetensors")
    return load_once(str(file or path), weights.stat().st_mtime_ns if weights.exists() else 0, device, dtype)


@functools.lru_cache(maxsize=4)
def load_once(path: str, modified: int, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load_with_tokenizer(path, device)
    return model.to(dtype), tokenizer


# ---- a text with its probabilities ----


class Piece(NamedTuple):
    """The text that a token adds. If a character has several tokens, they are one piece."""

    text: str
    tokens: int
    prob: float
    """The model's own, before temperature, top-k and top-p. Several tokens: the product."""
    likeliest: list[tuple[str, float]]
    """The likeliest tokens at the position of the last one, with their probabilities."""


def write(model: GPT, tokenizer: Tokenizer, prompt: str, length: int, seed: int, *sampling: float) -> Iterator[Piece]:
    """Continues a prompt up to <|endoftext|>, as sample.py does with the same seed. sampling: temperature, top_k, top_p."""
    device = model.transformer.wte.weight.device
    idx = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=device)
    written, tokens, prob = GrowingText(tokenizer), 0, 1.0
    steps = stream(model, idx, length, Sampling(*sampling), torch.Generator(device).manual_seed(seed))
    for number, (new, logits) in enumerate(steps, 1):
        token, probs = new.item(), F.softmax(logits[0].float(), dim=-1)  # (V,)
        tokens, prob = tokens + 1, prob * probs[token].item()
        text = written.add([token])
        text += written.end() if written.ended or number == length else ""
        text += "<|endoftext|>" if written.ended else ""
        if text:
            best = zip(*(part.tolist() for part in probs.topk(5)), strict=True)
            yield Piece(text, tokens, prob, [(tokenizer.decode([i]), p) for p, i in best])
            tokens, prob = 0, 1.0
        if written.ended:
            return


FIGURE_SPACE = "\N{FIGURE SPACE}"  # a browser would drop a plain one


def as_html(piece: Piece) -> str:
    """A piece as HTML: the less likely, the more orange. Its tooltip shows the likeliest tokens, with a mark at the one that came. A tap
    shows it too: phones have no tooltips."""
    rows = piece.likeliest if any(text == piece.text for text, _ in piece.likeliest) else [*piece.likeliest, (piece.text, piece.prob)]
    tooltip = "\n".join(f"{'▸' if text == piece.text else FIGURE_SPACE} {p:6.1%} {text!r}" for text, p in rows)
    return f'<span tabindex="-1" style="--p:{piece.prob:.2f}" title="{html.escape(tooltip)}">{html.escape(piece.text)}</span>'


class Column:
    """One of the texts that grow side by side."""

    def __init__(self, prompt: str, pieces: Iterator[Piece]):
        self.html, self.pieces = html.escape(prompt), pieces
        self.number, self.seconds, self.ended = 0, 0.0, False

    def grow(self):
        started = time.perf_counter()
        piece = next(self.pieces, None)
        self.seconds += time.perf_counter() - started
        self.ended = piece is None
        if piece:
            self.html += as_html(piece)
            self.number += piece.tokens

    def status(self) -> str:
        return f"{self.number} tokens, {self.number / self.seconds:,.0f} tokens/s" if self.number else ""


# ---- the run that a model is from ----

PROMPTS = ("Hello, I'm a language model,", "Once upon a time", "The meaning of life is")
CURVE_POINTS, CURVE_SECONDS = 200, 5


def examples(models: tuple[str, ...]) -> list[str]:
    """Prompts that fit the first run among the models: its own one, and lines of the text that it validates on."""
    for path in models:
        try:
            config = read_run(Path(path))
            shards = find_shards(config.data_dir)
            stream, decode = TokenStream(shards, "val", config.model.seq_len, shuffle=False), get_tokenizer(shards.tokenizer).decode
            n = stream.sequences_per_epoch
            texts = [decode(stream.batch([i * n // 20])[0][0].tolist()) for i in range(20)]
        except (ValueError, OSError):  # not a run, or its data are elsewhere
            continue
        lines = [line for text in texts for line in text.splitlines()[1:-1] if 10 <= len(line) <= 60 and line[0].isalnum()]
        return [config.sample_prompt, *dict.fromkeys(lines[:: max(1, len(lines) // 4)])][:5]
    return [*PROMPTS]


def loss_curves(models: tuple[str, ...]):
    """Returns the losses of the models that are runs, as Gradio plots them: step, loss and the curve's name. None if none is a run."""
    import pandas as pd

    rows = []
    for path in models:
        losses = read_metrics(Path(path, "metrics.jsonl"), ["loss", "val_loss"])
        name = "" if len(models) == 1 else f"{path}: "
        train = sorted(losses["loss"].items())
        size = max(1, len(train) // CURVE_POINTS)
        for start in range(0, len(train), size):  # each point is the mean of some steps
            part = train[start : start + size]
            rows.append((part[-1][0], sum(loss for _, loss in part) / len(part), f"{name}train"))
        rows += [(step, loss, f"{name}validation") for step, loss in losses["val_loss"].items()]
    return pd.DataFrame(rows, columns=["step", "loss", "curve"]) if rows else None


# ---- the page ----

TITLE = "GPT-2 from scratch"
HINT = (
    "Type a prompt and press Generate. The more orange a token is, the less the model expected it. "
    "Point at a token (or tap it) to see what else could have come."
)
NONE = "none"
CSS = """
.text { position: relative; min-height: 8em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; font-size: 15px; line-height: 1.5; }
.text span { background: color-mix(in srgb, orange calc((1 - var(--p)) * 70%), transparent); border-radius: 3px; }
.text span:focus { outline: 2px solid #9a4a00; }
.text span:focus::after {
  content: attr(title); position: absolute; left: 0; margin-top: 1.7em; z-index: 1000; padding: 8px 12px; white-space: pre; font-size: 14px;
  color: var(--body-text-color); background: var(--background-fill-primary); border: 1px solid orange;
}
.status { color: gray; min-height: 1.5em; }
"""


def build(models: tuple[str, ...], device: torch.device, dtype: torch.dtype):
    """The page, a gradio.Blocks."""
    import gradio as gr

    choices, prompts = offered(models), examples(models)

    def run(name, beside, prompt, temperature, top_k, top_p, length, seed):
        """Yields two texts and their status lines as they grow."""
        if len(prompt or "") > PROMPT_CHARS:
            raise gr.Error(f"Your prompt has {len(prompt):,} characters. Please use at most {PROMPT_CHARS:,}.", print_exception=False)
        sampling = clamp(temperature, *TEMPERATURE), int(clamp(top_k, *TOP_K)), clamp(top_p, *TOP_P)
        request = prompt or "", int(clamp(length, *LENGTH)), int(clamp(seed, *SEED)), *sampling
        try:
            models = [load(choices[one], device, dtype) for one in (name, beside) if one in choices]
            yield from growing([Column(request[0], write(*model, *request)) for model in models])
        except Exception as e:  # the checkpoint is gone, its weights are NaN, or memory ran out
            if not (isinstance(e, ValueError | OSError) or cli.out_of_memory(e)):
                raise
            raise gr.Error(html.escape(str(e)), print_exception=False) from e

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\n{HINT}")
        with gr.Row():
            name = gr.Dropdown(list(choices), value=next(iter(choices)), label="Checkpoint")
            beside = gr.Dropdown([NONE, *choices], value=NONE, label="Compare with", visible=len(choices) > 1)
        prompt = gr.Textbox(prompts[0], label="Prompt", lines=3, max_lines=10, max_length=PROMPT_CHARS)
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", min_width=120)
            stop = gr.Button("Stop", variant="stop", min_width=120)
        outputs, settings = text_columns(gr, beside), sliders(gr)
        gr.Examples([[text] for text in prompts], prompt, label="Examples")
        live_curves(gr, models)
        inputs = [name, beside, prompt, *settings]
        running = gr.on([generate.click, prompt.submit], run, inputs, outputs, api_name="generate", concurrency_limit=1)
        stop.click(None, cancels=running)
    return page.queue(max_size=WAITING)


def growing(columns: list[Column]) -> Iterator[list[str]]:
    """Yields the contents of both columns with their status lines until all texts have ended."""

    def contents() -> list[str]:
        return [part for column in columns for part in (column.html, column.status())] + [""] * (4 - 2 * len(columns))

    shown = 0.0
    while not all(column.ended for column in columns):
        for column in columns:
            column.grow()
        if time.perf_counter() - shown > 0.05:  # 20 updates per second are enough
            yield contents()
            shown = time.perf_counter()
    yield contents()


def text_columns(gr, beside) -> list:
    """The two texts with their status lines. The right column is there only while a second model is chosen."""
    outputs = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(visible=side == "left") as column:
                outputs.append(gr.HTML(elem_id=side, html_template='<div class="text">${value}</div>'))
                outputs.append(gr.HTML(elem_id=f"{side}-status", html_template='<div class="status">${value}</div>'))
    beside.change(lambda one: gr.Column(visible=one != NONE), beside, column, show_progress="hidden", api_name=False)
    return outputs


def live_curves(gr, models: tuple[str, ...]):
    """Draws the losses of the runs, again every few seconds: a run may be in training."""
    if loss_curves(models) is None:
        return
    plot = gr.LinePlot(lambda: loss_curves(models), x="step", y="loss", color="curve", title="Loss in nats per token", height=300)
    gr.Timer(CURVE_SECONDS).tick(lambda: loss_curves(models), None, plot, show_progress="hidden", api_name=False)


def sliders(gr) -> list:
    """Temperature, top-k, top-p, length and seed, in the order of run's arguments."""
    with gr.Row():
        return [
            gr.Slider(*TEMPERATURE, step=0.05, label="Temperature", min_width=280),
            gr.Slider(*TOP_K, step=1, label="Top-k (0: all tokens)", min_width=280),
            gr.Slider(*TOP_P, step=0.05, label="Top-p", min_width=280),
            gr.Slider(*LENGTH, step=1, label="Length in tokens", min_width=280),
            gr.Number(SEED[2], label="Seed", min_width=280),
        ]


PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class BodyLimit:
    """Answers 413 to a request of more than BODY_BYTES, before it fills the memory, and 404 to an uploaded file."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from starlette.exceptions import HTTPException
        from starlette.responses import PlainTextResponse

        if scope.get("path", "").rstrip("/").endswith("/upload"):
            await PlainTextResponse("this page accepts no files", 404)(scope, receive, send)
            return
        seen = 0

        async def counting_receive():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY_BYTES:
                raise HTTPException(413, f"send at most {BODY_BYTES:,} bytes")
            return message

        await self.app(scope, counting_receive, send)


@contextmanager
def without_proxies():
    """Hides proxies from Gradio, which at the start would ask for its own page through them, and fail on a kind that it lacks."""
    before = {name: value for name, value in os.environ.items() if name.lower() in PROXIES}
    for name in before:
        del os.environ[name]
    try:
        yield
    finally:  # the hub's client needs them
        os.environ |= before


def serve(config: AppConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Starts the page in a thread and returns its address. ValueError if Gradio is missing or can't serve."""
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as e:
        raise ValueError(f"the page needs Gradio ({e}): pip install gradio") from e
    except ValueError as e:
        raise ValueError(f"Gradio can't read its environment ({e}): check the GRADIO_… variables") from e
    system = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # no fonts from the network
    page = build(config.model, device, dtype)
    try:
        return page.launch(
            share=False, css=CSS, theme=gr.themes.Default(**system), footer_links=[], ssr_mode=False, quiet=True,
            app_kwargs={"middleware": [Middleware(BodyLimit)]}, prevent_thread_lock=True,
        )[1]  # fmt: skip
    except (OSError, ValueError, OverflowError) as e:
        raise ValueError(f"can't serve the page ({e}): check GRADIO_SERVER_PORT and GRADIO_SERVER_NAME") from e


def main():
    with cli.one_line_errors():
        config = cli.parse(AppConfig)
        config.validate()
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        for path in config.model:
            load(path, device, dtype)
        with without_proxies():
            url = serve(config, device, dtype)
        cli.say(f"open {url}  (Ctrl-C to stop)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            cli.say("\nstopped by Ctrl-C")
            os._exit(130)  # a normal exit would abort if a thread is still generating


if __name__ == "__main__":
    main()
