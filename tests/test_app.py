"""The page writes the same text as sample.py, works in a real browser, and survives bad requests.

PYTHONPATH=. python tests/test_app.py results/app.png log/quickstart log/early    # takes pictures: two models, and one on a phone
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import REPO, run_main, save_checkpoint, script

import app
import fineweb
from app import Piece, as_html, clamp, offered, write
from common.tokenizer import get_tokenizer
from model import GPT
from sample import Sampling, sample_texts
from training.config import TrainConfig
from variants import VariantConfig, build

BYTES = get_tokenizer("bytes")
LONGEST = app.LENGTH[1]


def tiny(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return build(VariantConfig(257, 64, 2, 2, 32)).eval()


def test_text_and_probabilities_match_sample_py():
    model = tiny()
    pieces = list(write(model, BYTES, "def ", 40, 7, 0.8, 30, 0.9))
    text = "".join(piece.text for piece in pieces)
    assert "def " + text == sample_texts(model, BYTES, "def ", 1, 40, 7, Sampling(0.8, 30, 0.9))[0]
    with torch.no_grad():
        probs = model(torch.tensor([BYTES.encode("def ")]))[0][0, -1].softmax(-1)
    assert pieces[0].prob == pytest.approx(probs[ord(pieces[0].text)].item(), rel=1e-4)  # before temperature, top-k and top-p
    assert [p for _, p in pieces[0].likeliest] == pytest.approx(probs.topk(5).values.tolist(), rel=1e-4)


def test_character_of_several_tokens_is_one_piece(monkeypatch):
    ids = [*"aé€".encode(), 256, 98]
    monkeypatch.setattr(app, "stream", lambda *args: ((torch.tensor([[i]]), torch.zeros(1, 257)) for i in ids))
    pieces = list(write(tiny(), BYTES, "", 10, 0, 1.0, 0, 1.0))
    assert [piece.text for piece in pieces] == ["a", "é", "€", "<|endoftext|>"]  # nothing after the end
    assert [piece.tokens for piece in pieces] == [1, 2, 3, 1]
    assert [piece.prob for piece in pieces] == pytest.approx([257**-1, 257**-2, 257**-3, 257**-1])


def test_cut_character_looks_as_in_sample_py(monkeypatch):
    monkeypatch.setattr(app, "stream", lambda *args: ((torch.tensor([[i]]), torch.zeros(1, 257)) for i in "é€".encode()[:4]))
    pieces = list(write(tiny(), BYTES, "", 4, 0, 1.0, 0, 1.0))
    assert "".join(piece.text for piece in pieces) == BYTES.decode([*"é€".encode()[:4]]) == "é\ufffd"


def test_model_output_is_escaped_in_html():
    written = as_html(Piece("<b>", 1, 0.4, [('"', 0.5), ("<b>", 0.4)]))
    tooltip = "\u2007  50.0% &#x27;&quot;&#x27;\n▸  40.0% &#x27;&lt;b&gt;&#x27;"
    assert written == f'<span tabindex="-1" style="--p:0.40" title="{tooltip}">&lt;b&gt;</span>'
    assert 'title="\u2007  90.0% &#x27;a&#x27;\n▸   1.0% &#x27;b&#x27;"' in as_html(Piece("b", 1, 0.01, [("a", 0.9)]))


@pytest.mark.parametrize(
    "sent, used",
    [(1, 1), ("1.5", 1.5), (9, 2), (-math.inf, 0.1), (math.nan, 1), (None, 1), ("hot", 1), ([], 1), (10**400, 1)],
)
def test_requested_numbers_are_clamped(sent, used):
    assert clamp(sent, 0.1, 2.0, 1.0) == used


def run_with_two_checkpoints(folder: Path) -> Path:
    folder.mkdir()
    for step in (10, 20):
        save_checkpoint(folder, step, tiny(step), "bytes", 3.0, {})
    return folder


def test_run_offers_all_checkpoints_and_reloads_changed(tmp_path):
    run = run_with_two_checkpoints(tmp_path / "run")
    assert list(offered((str(run),))) == [f"{run}, newest", f"{run}, step 20", f"{run}, step 10"]
    assert offered(("gpt2",)) == {"gpt2": "gpt2"}
    cpu, fp32 = torch.device("cpu"), torch.float32
    first = app.load(str(run), cpu, fp32)[0]
    assert app.load(str(run), cpu, fp32)[0] is first
    save_checkpoint(run, 20, tiny(21), "bytes", 3.0, {})
    second = app.load(str(run), cpu, fp32)[0]
    for step in (1, 2):  # a Hugging Face folder that is replaced
        tiny(step).save_pretrained(tmp_path / "hf")
        os.utime(tmp_path / "hf" / "model.safetensors", ns=(step, step))
        model = app.load(str(tmp_path / "hf"), cpu, fp32)[0]
        assert (model.transformer.wpe.weight == tiny(step).transformer.wpe.weight).all()
    assert second is not first  # the file of step 20 was replaced
    save_checkpoint(run, 30, tiny(30), "bytes", 3.0, {})
    assert app.load(str(run), cpu, fp32)[0] is not second  # step 30 is the newest now


@pytest.mark.parametrize("argv, words", [(["-m"], "python app.py -m log/quickstart"), (["-m", "nowhere"], "no model named 'nowhere'")])
def test_missing_model_is_one_line(capsys, argv, words):
    assert run_main(app.main, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.slow
def test_wrong_gradio_environment_is_one_line(tmp_path):
    result = script("app.py", "-m", save_checkpoint(tmp_path, 1, tiny(1), "bytes", 3.0, {}), GRADIO_SERVER_PORT="abc")
    assert result.returncode == 2 and result.stderr.startswith("error: Gradio can't read its environment (invalid literal for int()")
    assert result.stderr.count("\n") == 1 and "GRADIO_" in result.stderr


def test_curve_points_are_means_of_steps(tmp_path):
    lines = [{"step": i, "loss": 4.0 - i / 1000} for i in range(1003)] + [{"step": 500, "val_loss": 3.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    found = app.loss_curves((str(tmp_path), "gpt2"))
    train = found[found.curve == f"{tmp_path}: train"]
    assert list(train.step) == [*range(4, 1000, 5), 1002] and train.loss.iloc[1] == pytest.approx(4 - 0.007)
    assert found[found.curve == f"{tmp_path}: validation"].values.tolist() == [[500, 3.25, f"{tmp_path}: validation"]]
    assert app.loss_curves(("gpt2", str(tmp_path / "none"))) is None


def test_examples_are_lines_of_the_runs_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.txt").write_text(f"SCENE {name}\n" + "ROMEO: is it?\nJULIET: It is, my lord.\n    too far to the right\n" * 400)
    assert run_main(fineweb.main, "--dataset", "a.txt", "b.txt", "c.txt", "--tokenizer", "bytes", "--out-dir", "shards") == 0
    Path("run").mkdir()
    config = asdict(TrainConfig(data_dir="shards", sample_prompt="ROMEO:", model=VariantConfig(257, 64)))
    Path("run/run.json").write_text(json.dumps({"config": config, "data": {}, "launches": []}))
    assert set(app.examples(("gpt2", "run"))) == {"ROMEO:", "JULIET: It is, my lord.", "ROMEO: is it?"}
    assert app.examples(("gpt2", "run"))[0] == "ROMEO:"
    Path("shards").rename("elsewhere")
    assert app.examples(("gpt2", "run")) == [*app.PROMPTS]


# ---- a running page ----


def serve(*models, **variables) -> tuple[subprocess.Popen, str]:
    """The server and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, REPO / "app.py", "-m", *map(str, models)]
    heed_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a process that a shell starts with & ignores Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heed_ctrl_c)
    first = process.stderr.readline()
    assert first.startswith("open http://127.0.0.1:"), first
    threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would block it
    return process, first.split()[1].rstrip("/")


@contextmanager
def served(*models, **variables):
    process, url = serve(*models, **variables)
    try:
        yield url
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_page_starts_behind_a_proxy(tmp_path, monkeypatch):
    """Gradio asks for its own page at the start, which no proxy can reach."""
    pytest.importorskip("gradio")
    nobody = "http://127.0.0.1:9"
    proxies = {"http_proxy": nobody, "HTTPS_PROXY": nobody, "ALL_PROXY": "socks5://127.0.0.1:9"}
    with served(save_checkpoint(tmp_path, 1, tiny(1), "bytes", 3.0, {}), **proxies, no_proxy="", NO_PROXY="") as url:
        assert b"GPT-2 from scratch" in urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60).read()
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with app.without_proxies():
        assert not proxies.keys() & os.environ.keys()
    assert proxies.items() <= os.environ.items()  # the hub's client needs them


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("gradio")
    with served(run_with_two_checkpoints(tmp_path_factory.mktemp("app") / "run")) as url:
        yield url


@contextmanager
def browser():
    """A tab of a real browser, without a screen."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    quiet = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    with playwright.sync_playwright() as p:
        window = p.chromium.launch(executable_path=chromium, args=quiet.split())
        yield window.new_page(viewport={"width": 1200, "height": 1000})
        window.close()


def choose(tab, label: str, number: int):
    tab.get_by_label(label).click()
    tab.get_by_role("option").nth(number).click()


def generate(tab):
    """Presses Generate and waits for the first token."""
    tab.get_by_role("button", name="Generate").click()
    tab.locator("#left span").first.wait_for()


def written(tab, side: str = "left") -> int:
    """The number of tokens in the status line below a text."""
    return int((tab.locator(f"#{side}-status .status").inner_text() or "0").split()[0])


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_page_fits_one_model_and_a_phone(tmp_path):
    """One model has the whole width. The loss curve grows with the run. A tap shows what a tooltip shows."""
    pytest.importorskip("gradio")
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run, 20, tiny(20), "bytes", 3.0, {})
    line = '{"step": %d, "loss": 3.0, "val_loss": 3.0}\n'
    (run / "metrics.jsonl").write_text("".join(line % step for step in range(20)))
    with served(run) as url, browser() as tab:
        for width in (1200, 390):
            tab.set_viewport_size({"width": width, "height": 844})
            tab.goto(url)
            generate(tab)
            assert tab.locator("#left").bounding_box()["width"] > 0.8 * width and not tab.locator("#right").is_visible()
            assert not tab.get_by_label("Compare with").is_visible()
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            until(lambda: written(tab) > 5)
            token = tab.locator("#left span").nth(5)
            token.click()
            shown = "(span) => getComputedStyle(span, '::after').content"
            assert "▸" in token.evaluate(shown) and "%" in token.evaluate(shown)
        curve = tab.locator("svg.marks, .vega-embed").first
        curve.wait_for()
        before = curve.inner_html()
        with (run / "metrics.jsonl").open("a") as file:
            file.write("".join(line % step for step in range(20, 3000)))
        until(lambda: curve.inner_html() != before, 4 * app.CURVE_SECONDS)


@pytest.mark.slow
def test_text_stops_when_its_reader_leaves(page):
    """Only one text is written at a time: the next one would wait for it."""
    url, newest = f"{page}/gradio_api/call/generate", newest_of(page)
    data = json.dumps({"data": [*{**REQUEST, "name": newest, "length": LONGEST}.values()]}).encode()
    began = time.monotonic()
    assert ask(page, length=LONGEST) == "complete"
    whole = time.monotonic() - began
    for _ in range(5):
        event = json.load(urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})))["event_id"]
        with urllib.request.urlopen(f"{url}/{event}") as answers:
            answers.readline()
    began = time.monotonic()
    assert ask(page) == "complete"
    assert time.monotonic() - began < 2 * whole


@pytest.mark.slow
def test_page_works_in_a_browser(page):
    with browser() as tab:
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(page)
        tab.get_by_label("Prompt").fill("<i>def")
        tab.get_by_label("number input for Length").fill("30")
        tab.get_by_label("Seed").fill("5")
        generate(tab)
        until(lambda: written(tab) == 30)
        text = tab.locator("#left .text").text_content()
        assert text == sample_texts(tiny(20), BYTES, "<i>def", 1, 30, 5)[0]
        assert "%" in tab.locator("#left span").first.get_attribute("title")

        tab.get_by_label("range slider for Temperature").fill("0.1")
        choose(tab, "Compare with", 3)  # none, newest, step 20, step 10
        generate(tab)
        until(lambda: written(tab, "right") == 30)
        cold, other = (sample_texts(tiny(step), BYTES, "<i>def", 1, 30, 5, Sampling(0.1))[0] for step in (20, 10))
        until(lambda: tab.locator("#left .text").text_content() == cold != text)
        assert tab.locator("#right .text").text_content() == other

        tab.get_by_label("number input for Length").fill(str(LONGEST))
        tab.get_by_label("number input for Length").blur()
        tab.get_by_role("button", name="Generate").click()
        until(lambda: written(tab) > 30)
        tab.get_by_role("button", name="Stop").click()
        time.sleep(0.5)
        stopped = written(tab)
        time.sleep(1)
        assert stopped == written(tab) < LONGEST
        assert all(url.startswith((page, "data:", "blob:")) for url in requested), requested  # nothing from the network


REQUEST = {"name": None, "beside": "none", "prompt": "a", "temperature": 1.0, "top_k": 50, "top_p": 1.0, "length": 5, "seed": 1}


def newest_of(page: str) -> str:
    with urllib.request.urlopen(f"{page}/gradio_api/info") as info:
        return json.load(info)["named_endpoints"]["/generate"]["parameters"][0]["parameter_default"]


def ask(page: str, **changes) -> str:
    """The page's answer to a program: 'complete', 'error' or the HTTP status of a refusal."""
    url, values = f"{page}/gradio_api/call/generate", {**REQUEST, "name": newest_of(page), **changes}
    request = urllib.request.Request(url, json.dumps({"data": [*values.values()]}).encode(), {"Content-Type": "application/json"})
    try:
        event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
        with urllib.request.urlopen(f"{url}/{event}", timeout=120) as answers:
            events = [line.decode().split()[1] for line in answers if line.startswith(b"event: ")]
        return events[-1]
    except urllib.error.HTTPError as e:
        return str(e.code)


@pytest.mark.slow
def test_bad_requests_do_not_stop_the_page(page):
    nan, huge = math.nan, 10**30
    assert [ask(page, **{name: nan}) for name in ("temperature", "top_k", "top_p", "length", "seed")] == ["complete"] * 5
    assert [ask(page, seed=seed) for seed in (-1, huge, "x", None)] == ["complete"] * 4
    assert {ask(page, **{name: huge}) for name in ("temperature", "top_k", "top_p", "length")} == {"error"}
    assert {ask(page, temperature=0), ask(page, length="long"), ask(page, name="/etc/passwd"), ask(page, beside=["x"])} == {"error"}
    assert ask(page, prompt="é" * 20_000) == "complete" and ask(page, prompt="a" * 20_001) == "error"
    assert ask(page, prompt="a" * 2_000_000) == "413"
    assert ask(page, prompt="\ud800\0<script>") == "complete"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(f"{page}/gradio_api/upload", b"x", {"Content-Type": "multipart/form-data"}))

    answers = []
    clients = [threading.Thread(target=lambda: answers.append(ask(page))) for _ in range(200)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(answers) == 200 and set(answers) <= {"complete", "503"} and answers.count("complete") >= app.WAITING
    assert ask(page) == "complete"


@pytest.mark.slow
def test_ctrl_c_stops_the_page_while_generating(tmp_path):
    pytest.importorskip("gradio")
    process, url = serve(run_with_two_checkpoints(tmp_path / "run"))

    def ask_for_long_text():
        with suppress(OSError, IndexError):  # the answer is cut off
            ask(url, length=LONGEST)

    client = threading.Thread(target=ask_for_long_text)
    client.start()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    client.join()


def picture(path: str, width: int, *models: str):
    """Takes a picture of the page with the last model beside the first, if there are two."""
    with served(*models) as address, browser() as tab:
        tab.set_viewport_size({"width": width, "height": 1000})
        tab.goto(address)
        tab.get_by_label("Prompt").fill("class Stack:\n    def push(self, ")
        if models[1:]:
            choose(tab, "Compare with", len(models))
        tab.get_by_label("number input for Length").fill("300")
        generate(tab)
        until(lambda: written(tab) == 300 and (not models[1:] or written(tab, "right") == 300))
        tab.locator("#left span").nth(57).click()
        time.sleep(5)  # the curves are drawn
        tab.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    picture(sys.argv[1], 1200, *sys.argv[2:])
    picture(sys.argv[1].replace(".png", "_phone.png"), 390, sys.argv[2])
