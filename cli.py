"""What every script does with its command line and with a user's mistakes."""

import sys
from contextlib import contextmanager

import tyro
from tqdm import tqdm


def parse(cls, argv: list[str] | None = None, default=None):
    """The dataclass is the command line: a field a flag, its docstring the help. Exits 2 on an unknown flag."""
    return tyro.cli(cls, args=argv, default=tyro.MISSING_NONPROP if default is None else default)


@contextmanager
def one_line_errors():
    """A mistake that a user can mend (ValueError, a missing file) ends in one line and status 2, Ctrl-C in 130.
    Anything else is a fault of the program and keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


def bar(iterable=None, **how) -> tqdm:
    """A progress bar on stderr; where that is a file, a line every half minute instead of ten a second."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 30, **how)
