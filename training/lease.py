"""The lease under --remote: which launch works on the run now.

Two machines may both believe that they are the run: one lost its network, was suspended, or was given up by its owner too early. The
launch that works rewrites lease.json every few seconds. A launch that finds a lease watches whether it changes. Clocks of two machines
are never compared. The lease only saves money: even without it no launch could damage another's files, since each writes under a name
of its own (see bucket.py).
"""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from common import cli
from common.files import parse_json
from common.remote import Remote

NAME = "lease.json"
EVERY = 10.0  # seconds between renewals
EVERY_ON_THE_HUB = 60.0  # there each one is a commit, if the URL is a repository
MISSED = 3  # renewals that an owner may miss before its lease is free
SETTLE = 2.0  # seconds until a launch that wrote the lease at the same moment has written it


def boot_id() -> str:
    """Returns what tells machines apart that are copies of one image. '' if the system doesn't tell."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


class LeaseLost(Exception):
    """Another launch has taken over. The message says which."""


class Lease:
    """One launch's claim on the run under a URL. token: the launch's. folder: the run's, which this launch has locked."""

    def __init__(self, remote: Remote, token: str, folder: Path):
        self.remote, self.token, self.count, self.owned, self.said = remote, token, 0, False, False
        info = os.stat(folder)
        self.place = [str(folder.absolute()), info.st_dev, info.st_ino, boot_id()]
        self.every = EVERY_ON_THE_HUB if remote.url.startswith("hf://") else EVERY
        self.seen, self.since = self.read(), time.monotonic()

    def read(self) -> dict:
        """Returns what the lease says now. {} if there is none, or if it is damaged."""
        data = self.remote.read(NAME)
        try:
            found = parse_json(data or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, released: bool = False):
        self.count += 1
        owner = {"token": self.token, "host": platform.node(), "folder": self.place}
        content = owner | {"renewed": self.count, "every": self.every, "released": released}
        self.remote.put(json.dumps(content).encode(), NAME, verify=False)

    def acquire(self):
        """Takes the lease once it is free: nobody has it, or its owner released it, stopped renewing it, or has ended. TryAgain if another
        launch is at work."""
        self.watch(MISSED)
        self.write()
        time.sleep(SETTLE)
        if (found := self.read()).get("token") != self.token:
            self.seen = found
            raise self.busy()
        self.owned = True

    def watch(self, renewals: float):
        """Waits until the lease is free, or its owner missed this number of renewals. TryAgain if it renews the lease: it is at work."""
        self.look()
        every = self.seen.get("every")
        every = every if isinstance(every, int | float) and 0 < every <= EVERY_ON_THE_HUB else self.every
        while self.held() and (rest := self.since + renewals * every - time.monotonic()) > 0:
            if not self.said:
                most = self.since + MISSED * every - time.monotonic()
                cli.say(f"waiting {most:.0f} s to see whether the last launch, on {self.host()}, still trains the run in {self.remote.url}")
                self.said = True
            time.sleep(min(rest, every / 4))
            self.look()

    def look(self):
        """Reads the lease again. TryAgain if its owner has renewed it."""
        if (found := self.read()) != self.seen:
            self.seen, self.since = found, time.monotonic()
            if self.held():
                raise self.busy()

    def held(self) -> bool:
        """Whether the owner may be at work. In the folder that this launch has locked, nobody else is."""
        ended = (self.seen.get("host"), self.seen.get("folder")) == (platform.node(), self.place)
        return bool(self.seen.get("token")) and not self.seen.get("released") and not ended

    def host(self) -> str:
        return cli.printable(str(self.seen.get("host")))

    def busy(self) -> cli.TryAgain:
        return cli.TryAgain(
            f"another launch, on {self.host()}, is training the run in {self.remote.url}: wait for its end, or stop it there"
        )

    def renew(self):
        """Says that this launch is still at work. LeaseLost if another one has taken over."""
        found = self.read()
        if found and found.get("token") != self.token:
            self.owned, self.seen = False, found
            raise LeaseLost(f"another launch, on {self.host()}, has taken over the run in {self.remote.url}")
        self.write()

    def release(self):
        """Frees the lease. If that fails three times, the next launch has to wait."""
        for _ in range(3):
            try:
                if self.owned and self.read().get("token") == self.token:
                    self.write(released=True)
                return
            except Exception:  # the packages of the stores may raise anything
                time.sleep(0.5)
