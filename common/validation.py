"""Checks a dataclass's values: their types, and rules about them."""

from collections.abc import Callable
from dataclasses import fields
from string import Formatter
from typing import Literal, get_args, get_origin


def rule(message: str, holds: Callable[[object], bool]) -> tuple:
    """One rule for field_errors. message: the error, with the rule's fields in braces. holds(config): True if the config obeys it."""
    return ((message, holds),)


def field_errors(config, rules: tuple) -> list[str]:
    """What is wrong with a dataclass's values, one line each: first wrong types, then broken rules about the other fields."""
    wrong = {
        f.name: f"{f.name} is {getattr(config, f.name)!r}: {describe_type(f.type)}"
        for f in fields(config)
        if not has_type(getattr(config, f.name), f.type)
    }
    checkable = [(text, holds) for text, holds in rules if not wrong.keys() & {name for _, name, _, _ in Formatter().parse(text)}]
    return [*wrong.values(), *(text.format(**vars(config)) for text, holds in checkable if not holds(config))]


def has_type(value, kind) -> bool:
    """Whether a value, perhaps from a file, has a field's type. Whole numbers are counts: at least 1."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind) and not (isinstance(value, int) and kind is not float and value < 1)


def describe_type(kind) -> str:
    if get_origin(kind) is Literal:
        return f"choose {' or '.join(get_args(kind))}"
    return f"it must be {'a whole number of at least 1' if kind in (int, int | None) else f'a {kind.__name__}'}"


def raise_errors(errors: list[str]):
    """Raises one ValueError with all errors, if there are any."""
    if errors:
        raise ValueError("; ".join(errors))
