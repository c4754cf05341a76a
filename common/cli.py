"""Command lines and one-line errors, the same for every script."""

import errno
import io
import math
import os
import re
import signal
import sys
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache

import docstring_parser
import tyro
from tqdm import tqdm

registry = tyro.constructors.ConstructorRegistry()


def joining_lines(parse):
    """Wraps the function that reads the docstrings under a class's fields. tyro would end a line of the help at each line end of theirs."""

    def parse_and_join(cls):
        found = parse(cls)
        for each in found.params:
            each.description = each.description and " ".join(each.description.split())
        return found

    return parse_and_join


docstring_parser.parse_from_object = joining_lines(docstring_parser.parse_from_object)


@registry.primitive_rule
def whole_numbers(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Accepts 1e9 for an int: people count tokens like that."""
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
    raise ValueError(f"{text} is not a whole number: write 1000 or 1e3, for example")


NO_COMMENTS = (tyro.conf.HelptextFromCommentsOff,)  # none of our help is in comments, and to look there takes tyro most of its time


def parse(cls, argv: list[str] | None = None, default=None, script: str | None = None):
    """Parses the command line into a dataclass: each field is a flag, and the docstring under it is the help. The fields of a base class
    have their own box in the help. Exits with status 2 on an unknown flag. script: the name in the help, if these are another script's
    flags."""
    boxes = boxes_of(cls)
    kind = boxed(cls) if boxes else cls
    default = kind(**split(default, boxes)) if boxes and default is not None else default
    given = tyro.MISSING_NONPROP if default is None else default
    found = tyro.cli(kind, prog=script or module_command(), args=argv, default=given, registry=registry, config=NO_COMMENTS)
    return cls(**joined(found, boxes)) if boxes else found


def boxes_of(cls) -> dict[str, type]:
    """Returns the base classes by the names of their boxes, in the order of the fields."""
    return {base.__name__.lower(): base for base in cls.__bases__[::-1] if is_dataclass(base)}


@cache
def boxed(cls) -> type:
    """Returns a dataclass like cls, with an object of each base class in place of that class's fields: tyro draws a box for each."""
    boxes = boxes_of(cls)
    inherited = {one.name for base in boxes.values() for one in fields(base)}
    parts = [(name, tyro.conf.OmitArgPrefixes[base], field(default_factory=base)) for name, base in boxes.items()]
    own = [(one.name, one.type, field(default_factory=one.default_factory)) for one in fields(cls) if one.name not in inherited]
    return make_dataclass(cls.__name__, parts + own, namespace={"__doc__": cls.__doc__})


def split(config, boxes: dict[str, type]) -> dict:
    """Returns the fields of boxed's class, from an object of the original class."""
    values = dict(vars(config))
    return {name: base(**{one.name: values.pop(one.name) for one in fields(base)}) for name, base in boxes.items()} | values


def joined(found, boxes: dict[str, type]) -> dict:
    """Returns the fields of the original class, from an object of boxed's class."""
    values = dict(vars(found))
    return {name: value for box in boxes for name, value in vars(values.pop(box)).items()} | values


def parse_command(commands: dict[str, type], argv: list[str] | None = None):
    """parse, for a script whose first argument selects the dataclass."""
    return tyro.extras.subcommand_cli_from_dict(commands, prog=module_command(), args=argv, registry=registry, config=NO_COMMENTS)


def module_command() -> str | None:
    """How to start this program again, if it was started as python -m lab.NAME; else None: by its file."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec and spec.name.startswith("lab.") else None


def flag(name: str) -> str:
    """A field's flag as the user types it."""
    return "--" + name.replace("_", "-")


def at_least(limit: int, config, *names: str) -> list[str]:
    """One error for each of these fields that is below the limit, infinite or not a number."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{flag(name)} is {value}: it must be {'' if math.isfinite(value) else 'a finite number of '}at least {limit}"
        for name, value in values.items()
        if not limit <= value < math.inf
    ]


def at_most(limit: int, config, *names: str) -> list[str]:
    """One error for each of these fields that is above the limit."""
    return [f"{flag(name)} is {getattr(config, name)}: it must be at most {limit:,}" for name in names if getattr(config, name) > limit]


def writable(file: str, name: str) -> list[str]:
    """One error if this flag's file can't be written. None for ''."""
    folder = os.path.dirname(file) or "."
    if not file or (os.path.isdir(folder) and os.access(folder, os.W_OK) and not os.path.isdir(file)):
        return []
    return [f"{flag(name)} {file} is not a file in an existing folder that you can write to: choose another path"]


# remedies for what may pass by itself
WAIT, CHECK_NETWORK = "wait for it, or choose another --out-dir", "check the network"


class TryAgain(ValueError):
    """An error that passes by itself, such as one of the network: the same command may succeed later."""


TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # the direction of the text after it


def printable(text: str) -> str:
    """Replaces by a box what would control a terminal: a model may write anything. Keeps all blanks, and the invisible joiners of Persian
    and emoji."""

    def harmless(c: str) -> bool:
        return c.isprintable() or c in "\n\t" or (unicodedata.category(c) in ("Zs", "Cf", "Co", "Cn") and not TURNS.match(c))

    return "".join(c if harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def some(items, n: int = 5) -> str:
    """Names the first n of these, for messages: 'a, b and 3 more'."""
    items = [printable(str(item)).replace("\n", "\N{REPLACEMENT CHARACTER}") for item in items]
    return ", ".join(items[:n]) + (f" and {len(items) - n:,} more" if items[n:] else "")


FULL = "free some space and run the command again"
# the machine is at fault, not the user or a file's content
MACHINE_REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EFBIG: FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): FULL,  # Windows has no quotas
    errno.EIO: "check the disk and its connection",
    getattr(errno, "ESTALE", errno.EIO): "the file server changed under this mount, so mount it again",
    errno.EMFILE: "raise the limit of open files, such as ulimit -n 4096",
    errno.ENFILE: "the machine has too many open files, so close other programs",
    errno.ENOMEM: "memory ran out, so close other programs",
}


def disk_failed(e: Exception) -> bool:
    """Whether the machine is at fault: a full or broken disk, too many open files, no memory."""
    return isinstance(e, OSError) and e.errno in MACHINE_REMEDIES


# PyTorch on a CPU, on CUDA (also cuBLAS and a CUDA context), on MPS; the C library
OUT_OF_MEMORY = re.compile("out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED|Invalid buffer size", re.I)


def out_of_memory(e: BaseException) -> bool:
    """Whether an error means that memory ran out: the machine's or a card's. PyTorch has a type of its own only for CUDA."""
    if isinstance(e, MemoryError) or (isinstance(e, OSError) and e.errno == errno.ENOMEM):
        return True
    return isinstance(e, RuntimeError) and OUT_OF_MEMORY.search(str(e)) is not None


AGAIN = "run the same command again to continue"  # for scripts that can stop at any time
REMEDIES = MACHINE_REMEDIES | {
    errno.EEXIST: "it is a file, give a folder",
    errno.ENOTDIR: "part of that path is a file: give folders",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "that disk is read-only: give another folder",
    errno.ENAMETOOLONG: "give a shorter name",
}


def in_one_line(e: Exception) -> str:
    """An error's message, which may quote a damaged file."""
    return printable(" ".join(str(e).splitlines()))


def with_remedy(e: Exception) -> str:
    """in_one_line, and what helps against an OSError. A ValueError's message names its remedy itself."""
    return in_one_line(e) + (f": {REMEDIES.get(e.errno, 'check the path')}" if isinstance(e, OSError) else "")


@contextmanager
def one_line_errors(after_ctrl_c: str = "", if_memory_runs_out: str = "close other programs, or use a smaller model"):
    """Turns errors into one line and an exit status: 2 for a user's mistake (ValueError, a file that can't be used), 1 if the machine
    fails (a full or broken disk, too many open files, too little memory), 130 for Ctrl-C. An error's own `status` counts, if it has one.
    Anything else is a bug and keeps its traceback. after_ctrl_c: how to continue then."""
    open_streams()
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            fail(f"out of memory ({first_line(e)}): {if_memory_runs_out}", 1)
        if isinstance(e, RuntimeError):
            raise
        fail("" if getattr(e, "is_shared", False) else with_remedy(e), 1 if disk_failed(e) else getattr(e, "status", 2))
    except KeyboardInterrupt:
        say(f"\nstopped by Ctrl-C{after_ctrl_c and ': '}{after_ctrl_c}")
        sys.exit(130)


def fail(message: str, status: int):
    if message:
        say(f"error: {message}")
    sys.exit(status)


def first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]


# ---- streams and signals ----

BROKEN_PIPE = 128 + 13  # SIGPIPE's number, which Windows lacks


def open_streams():
    """Makes stdout and stderr accept any text. A stream that was closed at the start (2>&-) discards it: otherwise the next file that
    we open would get its number, and messages of C code would go into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                unused = os.open(os.devnull, os.O_RDWR)
                if unused != number:
                    os.dup2(unused, number)
                    os.close(unused)
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)  # a model may write characters that the terminal lacks; file names may not be UTF-8


def on_stop_signals(handler, *more: int):
    """Calls handler(number, frame) on SIGTERM, on SIGHUP and on more signals. SIGHUP means that the terminal or ssh session has closed;
    nohup makes a process ignore it, and that stays so."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    for number in (signal.SIGTERM, hangup, *more):
        if number and not (number == hangup and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, handler)


def exit_on_stop_signals():
    """Ends this process on SIGTERM and SIGHUP with an exception, so that it can clean up."""
    on_stop_signals(lambda number, frame: sys.exit(128 + number))


def say(text: str):
    """Prints a message to stderr. If its terminal is gone or its disk is full, the work continues without messages."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream):
    """Discards everything written to a stream from now on, as after a broken pipe (`… | head`) or on a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def on_a_screen() -> bool:
    """Whether stderr is a terminal with room for a line that is redrawn in place."""
    with suppress(OSError, ValueError):  # some terminals don't tell their size
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 1
    return False


def columns() -> int:
    """The width of the terminal that shows stderr; 80 if it is unknown."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


class Unbroken:
    """A stream that drops what it can't write, as when its terminal has closed or its disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            drop(self.stream)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def bar(iterable=None, **how) -> tqdm:
    """A progress bar on stderr. In a terminal it updates ten times a second, in a file twice a minute. Never ends the work."""
    return tqdm(iterable, file=Unbroken(sys.stderr), mininterval=0.1 if sys.stderr.isatty() else 30, **how)
