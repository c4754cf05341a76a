"""What happens on SIGTERM, SIGHUP and Ctrl-C."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from common import cli


class StopSignal:
    """On SIGTERM, SIGHUP or Ctrl-C, the run finishes its step or cancels its evaluation, saves everything and exits.

    It exits at once if there is nothing to save yet (the first step compiles), or at a second signal. A second signal within one
    second of the first doesn't count: torchrun forwards a signal that the scheduler has also sent to its processes.
    """

    hard_exit: threading.Timer | None = None
    current: "StopSignal | None" = None

    def __init__(self):
        self.received, self.at, self.unsaved = 0, 0.0, False
        StopSignal.current = self
        cli.on_stop_signals(self.handle, signal.SIGINT)

    def handle(self, number, frame):
        if not self.received:
            self.received, self.at = number, time.monotonic()
            if not self.unsaved:
                with suppress(OSError):  # the terminal is gone
                    os.write(2, b"stopped by a signal before the first step: nothing to save\n")  # print is not for signal handlers
                # Python drops an exception that is raised in a weakref's callback, and torch.compile has many of those
                StopSignal.hard_exit = threading.Timer(5, os._exit, [128 + number])  # main cancels it
                StopSignal.hard_exit.daemon = True
                StopSignal.hard_exit.start()
                sys.exit(128 + number)
        elif time.monotonic() - self.at > 1 and number in (signal.SIGTERM, signal.SIGINT):
            raise KeyboardInterrupt


def stopped_at() -> float | None:
    """When the first signal came, by time.monotonic(). None if none has come."""
    return StopSignal.current.at if StopSignal.current and StopSignal.current.received else None
