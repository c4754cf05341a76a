"""The house rules of CONTRIBUTING.md: sizes, where lines belong, and the direction of imports."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
from conftest import REPO

from training.run_json import CODE

PACKAGES = ("ops", "formats", "tasks", "training", "lab", "common")
FILES = sorted([*REPO.glob("*.py"), *(path for package in PACKAGES for path in REPO.glob(f"{package}/*.py"))])

# from the top down; a file imports only files further down, or its own layer's without a cycle
LAYERS = (
    ["lab"],
    ["train", "app", "export"],
    ["training"],
    ["evaluate", "hellaswag", "perplexity", "sample", "plot_log"],
    ["tasks"],
    ["checkpoint", "fineweb"],
    ["variants"],
    ["model", "dataloader"],
    ["formats"],
    ["ops"],
    ["common"],
)
BY_NAME = {("model", "variants")}  # GPT.from_pretrained returns a variant, if a folder holds one


def name_of(path: Path) -> str:
    """The module's name, such as ops.loss."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The repo's own modules that a file imports, anywhere in it."""
    own, found = {name_of(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & own) - {name_of(path)}


def layer_of(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module.split(".")[0] in layer)


def functions_of(path: Path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(node) -> int:
    return node.end_lineno - node.lineno + 1


def test_model_file_is_short():
    lines = (REPO / "model.py").read_text().splitlines()
    assert len(lines) <= 200
    assert next(n for n, line in enumerate(lines, 1) if "q @ k" in line) < 80


@pytest.mark.parametrize("word", ["rope", "window", "expert", "kernel"])
def test_model_file_is_gpt2_alone(word):
    assert not re.search(rf"\b{word}s?\b", (REPO / "model.py").read_text(), re.I)


def test_root_has_few_files():
    assert len(list(REPO.glob("*.py"))) <= 13


def test_train_file_is_short():
    assert len((REPO / "train.py").read_text().splitlines()) <= 250


def test_functions_are_short():
    long = {f"{name_of(path)}.{node.name}": lines_of(node) for path in FILES for node in functions_of(path) if lines_of(node) > 40}
    assert long == {}


def test_classes_have_few_methods():
    counts = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                counts[f"{name_of(path)}.{node.name}"] = sum(isinstance(part, ast.FunctionDef) for part in node.body)
    assert {name: count for name, count in counts.items() if count > 12} == {}


def test_imports_point_down():
    up = [(name_of(path), other) for path in FILES for other in imports_of(path) if layer_of(other) < layer_of(name_of(path))]
    assert up == []


def test_imports_have_no_cycle():
    graph = {name_of(path): imports_of(path) for path in FILES}
    while free := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


def test_run_json_hashes_all_code_of_a_run():
    """Except what computes no loss."""
    others, todo, found = {"fineweb", "hellaswag", "plot_log", "sample"}, ["train"], set()
    while todo:
        module = todo.pop()
        if module not in found | others and not module.startswith("tasks."):
            found.add(module)
            todo += imports_of(REPO / (module.replace(".", "/") + ".py")) - {"training", "common", "ops", "formats"}
    hashed = {name_of(path) for pattern in CODE for path in REPO.glob(pattern)}
    assert "training.trainer" in found and found <= hashed


def test_imports_by_name_are_known():
    """importlib hides an import from the tests above."""
    hidden = set()
    for path in FILES:
        for module in re.findall(r"import_module\(\"(\w+)\"\)", path.read_text()):
            if (REPO / f"{module}.py").exists():
                hidden.add((name_of(path), module))
    assert hidden == BY_NAME


def test_readme_is_short():
    lines = (REPO / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("page", sorted(path.name for path in (REPO / "docs").glob("*.md")))
def test_readme_links_every_page(page):
    assert f"docs/{page}" in (REPO / "README.md").read_text()


@pytest.mark.parametrize("path", sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("results/*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, link


@pytest.mark.parametrize("path", sorted((REPO / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_test_names_have_eight_words(path):
    names = re.findall(r"^def test_(\w+)", path.read_text(), re.M)
    assert [name for name in names if len(name.split("_")) > 8] == []


def test_notebook_imports_exist():
    """The notebook itself runs in CI, at its end."""
    cells = json.loads((REPO / "play.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    own = {name_of(file) for file in FILES}
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module in own]
    assert len(found) >= 3
    for node in found:
        for alias in node.names:
            assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module} has no {alias.name}"
