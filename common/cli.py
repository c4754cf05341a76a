"""What every script does with its command line and with a user's mistakes."""

import errno
import io
import math
import os
import signal
import sys
from contextlib import contextmanager, suppress

import tyro
from tqdm import tqdm

registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def whole_numbers(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """What is typed for an int may be 1e9, as one says amounts of tokens."""
    if kind.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def whole_number(text: str) -> int:
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise ValueError(f"{text} is no whole number, as 1000 or 1e3")


def parse(cls, argv: list[str] | None = None, default=None, script: str | None = None):
    """The dataclass is the command line: a field a flag, its docstring the help. Exits 2 on an unknown flag. script: whose flags
    they are, where it is not the one that runs."""
    return tyro.cli(cls, prog=script, args=argv, default=tyro.MISSING_NONPROP if default is None else default, registry=registry)


def parse_command(commands: dict[str, type], argv: list[str] | None = None):
    """parse, for a script whose first word chooses the dataclass."""
    return tyro.extras.subcommand_cli_from_dict(commands, args=argv, registry=registry)


def flag(name: str) -> str:
    """A field's flag as the user types it."""
    return "--" + name.replace("_", "-")


def at_least(limit: int, config, *names: str) -> list[str]:
    """A fault for each of these fields that is below the limit, infinite or not a number."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{flag(name)} is {value}: it must be {'' if math.isfinite(value) else 'a finite number of '}at least {limit}"
        for name, value in values.items()
        if not limit <= value < math.inf
    ]


def at_most(limit: int, config, *names: str) -> list[str]:
    """A fault for each of these fields that is above the limit."""
    return [f"{flag(name)} is {getattr(config, name)}: it must be at most {limit:,}" for name in names if getattr(config, name) > limit]


def printable(text: str) -> str:
    """The text, what would control a terminal shown as a box: a model may write anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def disk_failed(e: Exception) -> bool:
    return isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


AGAIN = "give the same command again to go on"  # what can be stopped at any time
REMEDIES = {
    errno.EEXIST: "it is a file, give a folder",
    errno.ENOTDIR: "a part of that path is a file, give folders",
    errno.EACCES: "give a path that you may read and write",
    errno.EPERM: "give a path that you may read and write",
    errno.EROFS: "nothing can be written there, give another folder",
}


@contextmanager
def one_line_errors(after_ctrl_c: str = ""):
    """A mistake that a user can mend (ValueError, a file that can't be used) ends in one line and status 2, a full or
    broken disk in status 1, Ctrl-C in 130. Anything else is a fault of the program and keeps its traceback.
    after_ctrl_c: how to go on then."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as e:
        full = disk_failed(e)
        remedy = ""
        if isinstance(e, OSError):
            of_path = REMEDIES.get(e.errno, "check the path")
            remedy = ": free some space and give the command again" if full else f": {of_path}"
        if not getattr(e, "is_shared", False):
            print(f"error: {e}{remedy}", file=sys.stderr)
        sys.exit(1 if full else 2)
    except KeyboardInterrupt:
        print(f"\nstopped by Ctrl-C{after_ctrl_c and ': '}{after_ctrl_c}", file=sys.stderr)
        sys.exit(130)


def drop(stream):
    """For a broken pipe, as `… | head` leaves it, or a full disk: what is written there goes nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def on_a_screen() -> bool:
    """Whether stderr is a terminal with room for a line that stays in its place."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 1


def bar(iterable=None, **how) -> tqdm:
    """A progress bar on stderr; where that is a file, a line every half minute instead of ten a second."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30, **how)
