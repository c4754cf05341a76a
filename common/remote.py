"""A folder in a bucket, or wherever else fsspec reaches: s3://, gs://, hf://, file://, memory://, …

Credentials come from the usual places of each store (environment, ~/.aws, hf auth login). No message contains one.
"""

import base64
import errno
import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common import cli
from common.files import naming, sha256

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
ATOMIC = {*PACKAGES, "abfss", "oss", "oci", "memory"}  # an object appears there in one piece, or not at all
CONNECTIONS = {"config_kwargs": {"max_pool_connections": 64}}  # s3fs has 10, too few for ranges()
PART = 50 * 2**20  # bytes in s3fs's part of a large upload


def is_url(place: str | Path) -> bool:
    """Whether this is meant as a URL: s3:/bucket too, but not C:/folder."""
    return re.match("[a-z][a-z0-9+.-]+:/", str(place), re.I) is not None


def url_error(url: str, flag: str) -> str:
    """Says why this can't be a remote folder. Returns '' if it can."""
    parts = urlsplit(url)
    user = unquote(parts.netloc).rpartition("@")[0]
    if parts.query or ":" in user or (user and parts.scheme not in ("az", "abfs", "abfss")):  # there it is a container
        return f"{flag} {parts.scheme}://… contains credentials or a query, which files would record: set them in the environment"
    where = parts.netloc + parts.path.strip("/") if parts.scheme in ("file", "local", "memory") else parts.netloc
    if "::" in url or not re.match(r"[a-z][a-z0-9+.-]*://", url, re.I) or not where:
        return f"{flag} needs a URL such as s3://bucket/folder or file:///mnt/disk/folder"
    return ""


class Remote:
    """A remote folder. Its methods raise one ValueError that names the URL and a remedy: cli.TryAgain if the error may pass.
    flag: the one that has the URL."""

    def __init__(self, url: str, flag: str = "--remote"):
        if error := url_error(url, flag):
            raise ValueError(error)
        self.url, self.hashes, self.temporary = url.rstrip("/"), True, f".{secrets.token_hex(4)}.tmp"
        scheme = urlsplit(url).scheme
        self.atomic = scheme in ATOMIC
        try:
            import fsspec

            with self.explained():
                more = CONNECTIONS if scheme in ("s3", "s3a") else {}
                self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True, **more)
        except ImportError as e:
            package = f"fsspec {PACKAGES.get(scheme, '')}".strip()
            raise ValueError(f"{flag} {self.url} needs a package that is missing ({e}): pip install {package}") from None

    def place(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}".rstrip("/")

    def put(self, source: Path | bytes, name: str, verify: bool = True):
        """Writes a file or bytes under a name. Nobody ever sees a part of it. FileNotFoundError if the file itself is gone."""
        place = self.place(name)
        target = place if self.atomic else place + self.temporary
        with self.explained(lambda e: isinstance(e, FileNotFoundError) and isinstance(source, Path) and not source.exists()):
            if not self.atomic:
                self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self.fs.pipe_file(target, source)
            elif self.atomic and has_arrived(self, source, place):
                return
            else:
                self.fs.put_file(str(source), target)
            if not self.atomic:
                self.fs.mv(target, place)
            if verify:
                self.verify(source, place)

    def verify(self, source: Path | bytes, place: str):
        """Compares what has arrived: its size, and its hash if the store tells one."""
        info, size = self.fs.info(place), len(source) if isinstance(source, bytes) else source.stat().st_size
        if info["size"] != size:
            raise OSError(f"{info['size']:,} of {size:,} bytes arrived")
        if self.hashes and hash_differs(source, info):  # also with some kinds of encryption: read it back once
            with self.fs.open(place, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != (hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256(source)):
                raise OSError("other bytes arrived than were sent")
            self.hashes = False

    def read(self, name: str) -> bytes | None:
        """Returns a small file's bytes. None if it is missing."""
        with self.explained():
            try:
                return self.fs.cat_file(self.place(name))
            except FileNotFoundError:
                return None

    def get(self, name: str, path: Path):
        """Downloads a file. OSError if this machine's disk fails or is full. Leaves nothing if it fails."""
        try:
            with naming(path), self.explained(cli.disk_failed):
                self.fs.get_file(self.place(name), str(path))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def ranges(self, parts: list[tuple[str, int, int]]) -> list[bytes]:
        """Returns parts of files, all requested at once. Each part: a name, the first byte, and the one after the last."""
        names, starts, ends = zip(*parts, strict=True)
        with self.explained():
            return self.fs.cat_ranges([self.place(name) for name in names], list(starts), list(ends), on_error="raise")

    def list(self, folder: str = "") -> dict[str, int | None]:
        """Returns the names in a folder below this one, each with its size; None for a folder. {} if there is no such folder."""
        place = self.place(folder)
        with self.explained():
            try:
                found = {info["name"].rstrip("/"): info for info in self.fs.ls(place, detail=True)}
            except FileNotFoundError:
                return {}
        found.pop(place, None)  # some stores list the folder itself
        return {name.rpartition("/")[2]: None if info["type"] == "directory" else info["size"] for name, info in found.items()}

    def delete(self, name: str):
        with self.explained(), suppress(FileNotFoundError):
            self.fs.rm_file(self.place(name))

    def exists(self) -> bool:
        """Whether there is such a folder."""
        with self.explained():
            return self.fs.exists(self.place(""))

    def delete_folder(self, name: str = ""):
        """Deletes an empty folder, on a store that has folders. Does nothing if it isn't empty."""
        if not self.atomic:
            with suppress(OSError):
                self.fs.rmdir(self.place(name))

    @contextmanager
    def explained(self, ours: Callable[[Exception], bool] = lambda e: False):
        """Turns whatever a store's package raises into one line. ours: whether an error is this machine's; it then stays as it is."""
        try:
            yield
        except ImportError:
            raise
        except Exception as e:
            if ours(e):
                raise
            raise explain(self.url, e) from None


def has_arrived(remote: Remote, source: Path, place: str) -> bool:
    """Whether a file is there already, from an earlier try whose answer came too late. Only a hash proves it: all full shards have the
    same size."""
    with suppress(Exception):
        info = remote.fs.info(place)
        return remote.hashes and info["size"] == source.stat().st_size and hash_differs(source, info) is False
    return False


def hash_differs(source: Path | bytes, info: dict) -> bool | None:
    """Whether the hash that a store tells differs from the source's. None if it tells none."""
    etag, md5 = str(info.get("ETag", "")).strip('"'), info.get("md5Hash")
    if not md5 and not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag):
        return None
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        if md5:  # Google's
            return base64.b64decode(md5) != hashlib.file_digest(file, "md5").digest()
        if "-" not in etag:
            return etag != hashlib.file_digest(file, "md5").hexdigest()
        parts = [hashlib.md5(part).digest() for part in iter(lambda: file.read(PART), b"")]  # S3's hash of a large file: of its parts'
        return etag != f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def explain(url: str, e: Exception) -> ValueError:
    """Returns the one line for an error of a store's package."""
    text = without_secrets(f"{type(e).__name__}: {' '.join(str(e).split())}".removesuffix(": "))[:300]
    if isinstance(e, PermissionError) or re.search("credential|unauthorized|forbidden|access ?denied", text, re.I):
        return ValueError(f"{url} refuses access ({text}): check your credentials for it and their rights")
    if (isinstance(e, FileNotFoundError) and "upload" not in text) or "Protocol not known" in text:
        return ValueError(f"{url} can't be used ({text}): create the bucket, or check the URL")
    if isinstance(e, LASTING) or getattr(e, "errno", None) == errno.EROFS or re.search(NEVER, text, re.I):
        return ValueError(f"{url} can't be used ({text}): check the URL, or choose another place")
    return cli.TryAgain(f"{url} failed ({text}): {cli.CHECK_NETWORK} and the store")


NEVER = r"invalid bucket name|not ?implemented|\(501\)"
LASTING = (FileExistsError, IsADirectoryError, NotADirectoryError)
SECRET_NAMES = re.compile("secret|token|key|passw|credential", re.I)
SECRETS = re.compile(r"(AKIA|ASIA)[0-9A-Z]{16}|\bhf_\w{20,}|(?<=Signature=)\S+|(?<=Credential=)\S+")


def without_secrets(text: str) -> str:
    """Replaces what looks like a credential, and each value of a variable that is named like one."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return SECRETS.sub("…", text)
