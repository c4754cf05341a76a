"""The README.md of an exported model, which the Hugging Face hub shows as its page."""

from huggingface_hub.repocard_data import EvalResult, ModelCardData

from common.text import shown

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
ids = model.generate(**tokenizer({prompt!r}, return_tensors="pt"), max_new_tokens=50, do_sample=True)
print(tokenizer.decode(ids[0]))
```"""


def model_card(name: str, facts: dict[str, str], scores: dict[tuple[str, str], float], prompt: str | None) -> str:
    """Returns the page's text: YAML for the hub, then what people read.

    facts: row of the table → text. scores: (data, metric) → value. prompt: for the example; None if the folder has no tokenizer.
    """
    name = shown(name)
    results = [EvalResult("text-generation", data, data, metric, value) for (data, metric), value in scores.items()]
    header = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"], model_name=name, eval_results=results or None
    )
    rows = {row: shown(text) for row, text in facts.items()}
    rows |= {f"{data}, {metric}": f"{value:.4f}" for (data, metric), value in scores.items()}
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {row} | {text} |" for row, text in rows.items())])
    use = "" if prompt is None else f"\n\n{USE.format(name=name, prompt=prompt)}"
    return f"---\n{header.to_yaml()}\n---\n\n# {name}\n\n{table}{use}\n"
