"""Reads datasets from the Hugging Face hub: waits when it is busy, reconnects when the connection is lost."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator

from common import cli
from common.documents import BadRow, BadRows, check_part_count, check_text
from common.text import not_decodable

PARQUET = "choose a dataset with parquet files, a split 'train'"
HUB_TIMEOUT = 30  # seconds without a byte; dataset_info has no limit by default


def hub_info(repo: str, revision: str, problem: str, remedy: str, **kwargs):
    """Asks the hub for a dataset's commit and files at a revision; '' is the newest."""
    from huggingface_hub import HfApi

    return retry(problem, remedy, busy, HfApi().dataset_info, repo, revision=revision or None, timeout=HUB_TIMEOUT, **kwargs)


def retry(problem: str, remedy: str, is_temporary: Callable[[Exception], bool], call: Callable, *args, **kwargs):
    """Returns the call's result. Tries again after temporary failures; any other failure is a ValueError."""
    for failures in itertools.count(1):
        try:
            return call(*args, **kwargs)
        except Exception as e:  # the hub's client raises dozens of types
            if cli.disk_failed(e):
                raise
            if not is_temporary(e):
                raise ValueError(f"{problem} ({brief(e)}): {remedy}") from e
            back_off(problem, e, failures)


def back_off(problem: str, e: Exception, failures: int):
    """Sleeps before the next attempt. ValueError after too many failures. The hub's client has already retried each attempt
    several times, and it respects Retry-After."""
    if failures > 8:
        raise ValueError(f"{problem} ({brief(e)}) after {failures} attempts: run the same command again later") from e
    cli.say(f"{problem} ({brief(e)}): retrying in {2**failures} s")
    time.sleep(2**failures)


def brief(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0]


def busy(e: Exception) -> bool:
    """Whether the hub answered that it is overloaded or down for now (408, 429 or 5xx)."""
    status = getattr(getattr(e, "response", None), "status_code", 0)
    return status in (408, 429) or status >= 500


def busy_or_unreachable(e: Exception) -> bool:
    """Whether the hub is busy or did not answer."""
    return busy(e) or (getattr(e, "response", None) is None and not isinstance(e, ValueError))


class HubDocuments:
    """Streams a column of a dataset on the hub. part_range (index, count) takes one of `count` blocks of its files.
    The state is that of the datasets library, the number of rows read, and the bad rows among them."""

    sources = ()  # the commit identifies the files

    def __init__(self, repo: str, revision: str, name: str, part_range: tuple[int, int], text_field: str = "text", skip_bad: bool = False):
        self.repo, self.name, self.part_range, self.text_field = repo, name, part_range, text_field
        self.rows, self.bad = 0, BadRows(skip_bad)
        self.loaded = None  # the state to continue after, until the first row is read: only then does datasets tell it
        problem = f"{repo} is not a local path, and looking it up on the hub failed"
        self.revision = hub_info(repo, revision, problem, "check the name, the revision and the network").sha
        self.dataset = retry(f"could not open {repo}", f"{PARQUET}, or check --name, --part and the network", busy, self.open)

    def open(self):
        from datasets import load_dataset

        how = {"split": "train", "streaming": True, "revision": self.revision, "columns": [self.text_field]}
        dataset = load_dataset(self.repo, self.name or None, **how)
        index, count = self.part_range
        check_part_count(self.part_range, dataset.num_shards)  # a shard of datasets is a file
        return dataset.shard(count, index, contiguous=True)

    def state(self) -> dict:
        return {"datasets": self.loaded or self.dataset.state_dict(), "rows": self.rows, "skipped": copy.deepcopy(self.bad.found)}

    def load_state(self, state: dict):
        """Continues after a state. Older ones are the datasets library's alone."""
        self.loaded = copy.deepcopy(state.get("datasets", state))
        self.dataset.load_state_dict(state.get("datasets", state))
        self.rows = int(state.get("rows", 0))
        self.bad.load(state.get("skipped", {}))

    def __iter__(self) -> Iterator[str]:
        failures, again, stuck = 0, False, None
        while True:
            try:
                if again:  # reconnect and continue after the last row
                    state, self.dataset = self.state(), self.open()
                    self.load_state(state)
                for row in self.dataset:
                    self.rows, self.loaded = self.rows + 1, None
                    yield from self.bad.good([check_text(row[self.text_field], self.place(), self.text_field)])
                    failures = 0
                return
            except BadRow:
                raise
            except UnicodeDecodeError as e:  # this iterator is at its end, but its state is after the row
                self.rows, self.loaded, again = self.rows + 1, None, True
                self.bad.add(not_decodable(e, self.place()))
                if stuck == self.dataset.state_dict():
                    raise ValueError(f"{self.place()} can't be skipped: download the files and give them as --dataset") from e
                stuck = self.dataset.state_dict()
            except (ValueError, KeyError, TypeError) as e:  # the data is at fault, not the network
                fix = f"{PARQUET} and a column '{self.text_field}', or another --text-field"
                if self.loaded and isinstance(e, KeyError):  # it knows the state's format only now
                    fix = "if another version of datasets began this, install that one, or start in another --out-dir"
                raise ValueError(f"could not read {self.repo} after {self.rows:,} rows ({brief(e)}): {fix}") from e
            except Exception as e:
                if cli.disk_failed(e):
                    raise
                failures, again = failures + 1, True
                back_off(f"could not read {self.repo}", e, failures)

    def place(self) -> str:
        return f"{self.repo}, row {self.rows:,}"
