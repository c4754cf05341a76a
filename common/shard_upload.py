"""fineweb.py --out-dir s3://…: sends shards to a bucket while it makes more, the manifest last.

progress.json    while shards are missing: the settings, and the shards that have arrived
manifest.json    sent last, as it is written last in a folder: with it, train.py --data-dir takes the URL
"""

import json
import math
import re
import threading
import time
from pathlib import Path

from common import cli
from common.bucket_shards import Failing
from common.files import parse_json
from common.preparation import check_same, other_settings, settings_of
from common.remote import Remote
from common.shards import BIN_HEADER_BYTES, MANIFEST, PROGRESS, SOURCES, are_entries, read_manifest, split_of

HEADERS = 128, BIN_HEADER_BYTES  # bytes before the tokens in the files of write_shard and of llm.c
PATIENCE = 600.0  # seconds that the end waits for a bucket that fails
ELSEWHERE = "choose another --out-dir"


class Upload:
    """Sends the shards of a folder in a thread. config: fineweb.py's, with the URL as out_dir."""

    def __init__(self, config):
        self.config, self.remote = config, Remote(config.out_dir, "--out-dir")
        self.folder = Path(re.sub(r"[^\w.-]", "_", self.remote.url.rpartition("/")[2]))
        self.entries: list[dict] = []  # of the shards that are ready
        self.arrived: list[dict] = []
        self.failing = Failing(self.remote.url, "the work continues, and the upload is tried again")
        self.problem, self.changed = None, threading.Condition()

    def is_complete(self) -> bool:
        """Whether the URL has all shards; prints so. ValueError if it has others than this command makes."""
        place, found = self.remote.url, self.remote.list()
        if MANIFEST in found:
            manifest = self.json_of(MANIFEST)
            if not ({"settings", "revision", "shards"} <= manifest.keys() and isinstance(manifest["settings"], dict)):
                raise ValueError(f"{place} has shards that this command did not make: {ELSEWHERE}")
            check_same(manifest, self.config, place)
            if (self.folder / MANIFEST).exists() and read_manifest(self.folder)["shards"] != manifest["shards"]:
                raise ValueError(f"{place} and {self.folder} have different shards: {ELSEWHERE}")
            self.remote.delete(PROGRESS)  # left by a kill between the last two steps
            print(f"{place} is already complete")
            return True
        if PROGRESS in found:
            progress = self.json_of(PROGRESS)
            settings, shards = progress.get("settings"), progress.get("shards")
            if not (isinstance(settings, dict) and are_entries(shards)):
                raise ValueError(f"{place}/{PROGRESS} is damaged: delete it, then run the same command again")
            if other := other_settings(settings, self.config, {}, ("skip_bad_rows",)):
                if shards or any(split_of(name) for name in found):
                    raise ValueError(f"{place} has an unfinished upload with other settings ({other}): use the same, or {ELSEWHERE}")
                self.send_progress()  # nothing has arrived, so settings may change
            whole = [entry for entry in shards if (found.get(entry["file"]) or 0) - 2 * entry["tokens"] in HEADERS]
            self.arrived = whole  # what someone has deleted or cut since is sent again
        elif any(split_of(name) for name in found):
            raise ValueError(f"{place} has shards that this command did not make: {ELSEWHERE}")
        else:
            self.send_progress()  # a bucket that refuses says so before the work
        cli.say(f"making shards in {self.folder}, sending them to {place}")
        threading.Thread(target=self.send_all, name="--out-dir: upload", daemon=True).start()
        return False

    def json_of(self, name: str) -> dict:
        try:
            found = parse_json(self.remote.read(name) or b"{}")
        except ValueError as e:
            raise ValueError(f"{self.remote.url}/{name} is not valid JSON ({e}): {ELSEWHERE}") from None
        return found if isinstance(found, dict) else {}

    def ready(self, entries: list[dict]):
        """Sends shards that are complete in the folder. entries: all of them so far. Returns at once."""
        with self.changed:
            self.entries = list(entries)
            self.changed.notify_all()

    def missing(self) -> list[dict]:
        return [entry for entry in self.entries if entry not in self.arrived]

    def send_all(self):
        while True:
            with self.changed:
                self.changed.wait_for(self.missing)
                entry = self.missing()[0]
            try:
                self.remote.put(self.folder / entry["file"], entry["file"])
                arrived = [each for each in self.arrived if each["file"] != entry["file"]] + [entry]
                self.send_progress(arrived)
                self.failing.over()
            except ValueError as e:
                self.problem = e
                self.failing.wait(e)
                continue
            except Exception as e:  # the folder is gone, or its disk fails
                with self.changed:
                    self.problem = e
                    self.changed.notify_all()
                return
            with self.changed:
                self.arrived, self.problem = arrived, None
                self.changed.notify_all()

    def send_progress(self, arrived: tuple | list = ()):
        content = {"settings": settings_of(self.config), "shards": list(arrived)}
        self.remote.put(json.dumps(content).encode(), PROGRESS)

    def finish(self):
        """Waits until all shards of the folder have arrived, then sends the manifest. ValueError if the bucket fails for too long."""
        self.ready(read_manifest(self.folder)["shards"])
        began, total = time.monotonic(), len(self.entries)
        if missing := self.missing():
            cli.say(f"waiting until {self.remote.url} has the last {len(missing)} of {total} shards")
        while missing := self.missing():
            with self.changed:
                self.changed.wait(0.2)
            since = max(began, self.failing.since or math.inf)
            if self.problem and (not isinstance(self.problem, ValueError) or time.monotonic() - since > PATIENCE):
                lacking = f"{self.remote.url} lacks {len(missing)} of {total} shards"
                raise cli.TryAgain(f"{lacking} ({cli.in_one_line(self.problem)}): run the same command again to send them")
        for name in (SOURCES, MANIFEST):
            if (self.folder / name).exists():
                self.remote.put((self.folder / name).read_bytes(), name)
        self.remote.delete(PROGRESS)
        print(f"{self.remote.url}: all {total} shards are there; {self.folder} has them too and may be deleted")
