"""Hides what Python lacks on Windows, to run this repo's code without it. Nobody has run the repo on Windows itself yet.

Other packages keep what they need on this machine: they are imported first, and hide() changes only what this repo's modules see.
"""

import ast
import builtins
import importlib
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).parent.parent
FILES = sorted([*REPO.glob("*.py"), *(path for path in REPO.glob("*/*.py") if path.parts[-2] != "tests")])
OWN = {path.relative_to(REPO).parts[0].removesuffix(".py") for path in FILES}
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses", "posix")
OS = (
    "sysconf uname fork forkpty killpg getuid geteuid getgid getegid getpgid setpgid setsid getsid nice getloadavg statvfs mkfifo mknod "
    "chown fchmod chroot sched_getaffinity sched_setaffinity openpty pread pwrite sendfile posix_fadvise posix_spawn wait O_DIRECTORY "
    "O_CLOEXEC O_NOFOLLOW O_SYNC EX_OK confstr ttyname"
).split()
SIGNALS = ("SIGHUP", "SIGPIPE", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGCONT", "SIGQUIT", "SIGSTOP", "alarm", "pause")


class Without(ModuleType):
    """A module without some of its names."""

    def __init__(self, module, *names: str):
        super().__init__(module.__name__)
        self.__dict__["module"], self.__dict__["names"] = module, names

    def __getattr__(self, name: str):
        if name in self.names:
            raise AttributeError(f"Windows has no {self.module.__name__}.{name}")
        return getattr(self.module, name)

    def __dir__(self):
        return [name for name in dir(self.module) if name not in self.names]


def open_file(path, *args, **how) -> int:
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, *args, **how)


def hide():
    """From now on, this repo's modules see what they would see on Windows. Call it before importing any of them."""
    import_others()
    hidden_os = Without(os, *OS)
    hidden_os.__dict__["open"] = open_file
    shown, plain = {"os": hidden_os, "signal": Without(signal, *SIGNALS)}, builtins.__import__

    def import_as_on_windows(name, globals=None, *rest, **named):
        caller = (globals or {}).get("__file__") or ""
        if Path(caller) not in FILES:
            return plain(name, globals, *rest, **named)
        if name in MODULES:
            raise ImportError(f"Windows has no module {name}")
        return shown.get(name) or plain(name, globals, *rest, **named)

    builtins.__import__ = import_as_on_windows


def import_others():
    """Imports every package that a file of this repo imports at its top."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in getattr(node, "names", ())]
            for name in names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                if name.split(".")[0] not in OWN:
                    importlib.import_module(name)


def main(argv: list[str]):
    """Imports every module of the repo, then runs a script: python tests/windows.py train --preset quickstart …"""
    sys.path[0] = str(REPO)
    hide()
    for path in FILES:
        importlib.import_module(".".join(path.relative_to(REPO).with_suffix("").parts))
    for command in " ".join(argv).split(" , "):
        name, *sys.argv[1:] = command.split()
        importlib.import_module(name).main()


if __name__ == "__main__":
    main(sys.argv[1:])
