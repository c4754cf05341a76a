"""Checks a dataclass's values: their types, and rules about them."""

from collections.abc import Callable
from dataclasses import fields
from string import Formatter
from typing import Annotated, Literal, get_args, get_origin


def rule(message: str, holds: Callable[[object], bool]) -> tuple:
    """One rule for field_errors. message: the error, with the rule's fields in braces. holds(config): True if the config obeys it."""
    return ((message, holds),)


def field_errors(config, rules: tuple) -> list[str]:
    """What is wrong with a dataclass's values, one line each: first wrong types, then broken rules about the other fields."""
    wrong = {
        f.name: f"{f.name} is {getattr(config, f.name)!r}: {describe_type(f.type)}"
        for f in fields(config)
        if not has_type(getattr(config, f.name), f.type) or below_one(getattr(config, f.name), f.type)
    }
    checkable = [(text, holds) for text, holds in rules if not wrong.keys() & {name for _, name, _, _ in Formatter().parse(text)}]
    return [*wrong.values(), *(text.format(**vars(config)) for text, holds in checkable if not holds(config))]


def has_type(value, kind) -> bool:
    """Whether a value, perhaps from a file, has a field's type."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:  # of any length; JSON has lists
        return isinstance(value, list | tuple) and all(has_type(part, get_args(kind)[0]) for part in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)  # more would not fit into a float
    return isinstance(value, kind)


def below_one(value, kind) -> bool:
    """Whether a model's whole number is too small: all of them are counts."""
    return kind in (int, int | None) and value is not None and value < 1


def describe_type(kind, whole_number: str = "a whole number of at least 1") -> str:
    if get_origin(kind) is Literal:
        return f"choose {' or '.join(get_args(kind))}"
    return f"it must be {whole_number if kind in (int, int | None) else f'a {kind.__name__}'}"


def from_dict(cls, values, source):
    """Builds a dataclass from a dict in a file; missing fields get their defaults. ValueError names a setting that this code does not
    know, or that has the wrong type. source: for these messages."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} is damaged: its settings are no dict; restore it from a copy")
    kinds = {f.name: f.type for f in fields(cls)}
    for name, value in values.items():
        shown = " ".join(f"{name}={value!r}".split())[:80]
        if name not in kinds:
            raise ValueError(f"{source} has the setting {shown}, which this code does not know: use the code (branch) that made it")
        if not has_type(value, kinds[name]):
            wanted = describe_type(kinds[name], "a whole number")
            raise ValueError(f"{source} has the setting {shown}, {wanted}: restore it from a copy, or use the code (branch) that made it")
    return cls(**{name: tuple(value) if get_origin(kinds[name]) is tuple else value for name, value in values.items()})


def raise_errors(errors: list[str]):
    """Raises one ValueError with all errors, if there are any."""
    if errors:
        raise ValueError("; ".join(errors))
