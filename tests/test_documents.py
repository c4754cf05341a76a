"""common/documents.py, folders.py, text.py: what users' files are read as, what is refused, and what is left out with a word."""

import codecs
import gzip
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import documents
from common.documents import BadRows, How, add_bad, changes, describe_bad, hash_files, read_file
from common.folders import list_files, stdlib_files
from common.text import Bad, kind_of

TEXT = "The café – “quoted” – 日本語 🙂\nopened.\n"


def read(path, **how) -> list:
    """The documents of a file, and 'kind: why' of each bad row."""
    return [f"{row.kind}: {row.why}" if isinstance(row, Bad) else row for row in read_file(path, How(**how))]


def names(listing) -> list[str]:
    return [found.name for found in listing.files]


def write(folder, files: dict[str, bytes | str]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


# ---- encodings and line ends ----

ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "utf-32 big": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda raw: pa.compress(raw, codec="zstd", asbytes=True)])
def test_every_encoding_gives_the_same_text(tmp_path, name, pack):
    encode = ENCODINGS[name]
    row = json.dumps({"text": TEXT}, ensure_ascii=False)
    write(tmp_path, {"a.txt": pack(encode(TEXT.replace("\n", "\r\n"))), "b.jsonl": pack(encode(f"{row}\r\n\n{row}"))})
    write(tmp_path, {"c.json": pack(encode(f"[{row},\n{row}]")), "d.md": pack(encode(TEXT.replace("\n", "\r")))})
    assert read(tmp_path / "a.txt") == read(tmp_path / "d.md") == [TEXT]
    assert read(tmp_path / "b.jsonl") == read(tmp_path / "c.json") == [TEXT, TEXT]


def test_fields_keep_their_line_ends(tmp_path):
    text = "a\r\nb\rc\u2028d\x85e\x0bf\ufeff"
    line = json.dumps({"text": text}, ensure_ascii=False).encode()
    write(tmp_path, {"a.jsonl": line + b"\r\n" + line + b"\r" + line})
    pq.write_table(pa.table({"text": [text]}), tmp_path / "b.parquet")
    assert read(tmp_path / "a.jsonl") == [text] * 3 and read(tmp_path / "b.parquet") == [text]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", "café".encode("cp1252"), "not UTF-8: not UTF-8 at byte offset 3 (0xe9)"),
        ("a.txt", "plain".encode("utf-16-le"), "not UTF-8: it looks like UTF-16 without a byte order mark"),
        ("a.txt", "plain".encode("utf-16-be"), "not UTF-8: it looks like UTF-16 without a byte order mark"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), "not UTF-8: it looks like UTF-16 without a byte order mark"),
        ("a.txt", codecs.BOM_UTF16_LE + b"a\0\x00\xd8", "not UTF-16: not UTF-16 at byte offset 4 (0x00)"),
        ("a.txt", b"some text, then \0 and more", "binary: it has NUL characters, so it is not plain text"),
        ("a.py", b"# caf\xe9", "not UTF-8: not UTF-8 at byte offset 5 (0xe9)"),
        (
            "a.jsonl",
            b'{"text": "half \\ud83d"}',
            "half a character: it has half of a surrogate pair, such as \\ud800, which is not a character",
        ),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8: not UTF-8 at byte offset 13 (0xe9)"),
    ],
)
def test_wrong_characters_are_never_guessed(tmp_path, name, content, why):
    write(tmp_path, {name: content})
    assert read(tmp_path / name)[0] == why


def test_python_declares_its_encoding(tmp_path):
    write(tmp_path, {"a.py": "# coding: latin-1\r\ns = 'café'\n".encode("latin-1")})
    assert read(tmp_path / "a.py") == ["# coding: latin-1\ns = 'café'\n"]


def test_stdlib_is_read_as_ever():
    """The quickstart's losses were measured with wrong bytes read as U+FFFD."""
    files = stdlib_files()
    for found in [*files[:20], *(found for found in files if "cjkencodings" in found.name or "bom" in found.name)]:
        assert list(read_file(found.path, How(tolerant=True))) == [found.path.read_text(encoding="utf-8", errors="replace")]


# ---- rows ----


def test_bad_rows_are_named_and_counted(tmp_path):
    lines = [
        b'{"text": "a"}',
        b"",
        b'{"text": null}',
        b'{"text": 5}',
        b"cut off",
        b'{"txt": 1}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": "b"}',
    ]
    write(tmp_path, {"a.jsonl": b"\n".join(lines)})
    bad = BadRows(skip=True)
    assert list(bad.good(read_file(tmp_path / "a.jsonl"))) == ["a", "b"]
    line = f"{tmp_path}/a.jsonl, line "
    assert {kind: entry["first"] for kind, entry in bad.found.items()} == {
        "null": [line + "3"], "not a string": [line + "4"], "not JSON": [line + "5"], "without the field": [line + "6", line + "7"],
        "not UTF-8": [line + "8"],
    }  # fmt: skip
    assert describe_bad(bad.found).startswith(f"--skip-bad-rows left out 6 rows: 1 null ({line}3), 1 not a string (")
    with pytest.raises(ValueError, match=r"line 3: the field 'text' is null: fix or .* leave it out with --skip-bad-rows"):
        list(BadRows().good(read_file(tmp_path / "a.jsonl")))


def test_bad_files_and_rows_are_counted_apart(tmp_path):
    packed = gzip.compress(json.dumps({"text": "a" * 9999}).encode())
    write(tmp_path, {"a.txt": b"\xff", "b.jsonl.gz": packed[:-9], "c.jsonl": b'{"text": null}\n[1]', "d.json": "[1,", "e.jsonl": b"\xff"})
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "f.parquet")
    bad = BadRows(skip=True)
    for path in sorted(tmp_path.iterdir()):
        assert list(bad.good(read_file(path))) == []
    again = BadRows(skip=True)
    again.load(json.loads(json.dumps(bad.found)))
    for found in (bad.found, again.found, add_bad([bad.found])):
        assert describe_bad(found).startswith("--skip-bad-rows left out 4 files and 3 rows: 2 not UTF-8 (")
    both = add_bad([bad.found, bad.found])
    assert describe_bad(both).startswith("--skip-bad-rows left out 8 files and 6 rows: ")
    assert describe_bad({"null": {"rows": 2, "first": ["a"]}}) == "--skip-bad-rows left out 2 rows: 2 null (a; …)"  # of older versions


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.jsonl", '{"body": "x"}', "choose another with --text-field"),
        ("a.json", '[{"body": "x"}]', "choose another with --text-field"),
        ("a.json", '{\n"body": "x"}', "choose another with --text-field"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}', "choose another with --text-field, or leave it out with --skip-bad-rows"),
        ("a.jsonl", "[1]", "fix or remove this document, or leave it out with --skip-bad-rows"),
    ],
)
def test_advice_where_the_field_is_missing(tmp_path, name, content, advice):
    write(tmp_path, {name: content})
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    for file, expected in ((name, advice), ("a.parquet", "choose another with --text-field")):
        with pytest.raises(ValueError, match="the field 'text' is missing") as error:
            list(BadRows().good(read_file(tmp_path / file)))
        assert str(error.value).endswith(f": {expected}")
        assert "[1]" in content or "(it has body)" in str(error.value)


def test_bad_parquet_rows_are_named(tmp_path):
    values = pa.array([b"a", None, b"\xff\xfe", b"b"] * 300).cast(pa.binary())
    text = pa.StringArray.from_buffers(len(values), values.buffers()[1], values.buffers()[2], values.buffers()[0])
    pq.write_table(pa.table({"body": text, "id": range(len(values))}), tmp_path / "a.parquet")
    bad = BadRows(skip=True)
    assert list(bad.good(read_file(tmp_path / "a.parquet", How("body")))) == ["a", "b"] * 300
    assert {kind: (entry["rows"], entry["first"][1]) for kind, entry in bad.found.items()} == {
        "null": (300, f"{tmp_path}/a.parquet, row 6"), "not UTF-8": (300, f"{tmp_path}/a.parquet, row 7"),
    }  # fmt: skip
    assert read(tmp_path / "a.parquet") == ["without the field: the field 'text' is missing (it has body, id)"]


@pytest.mark.parametrize("pack", [gzip.compress, lambda raw: pa.compress(raw, codec="zstd", asbytes=True)])
def test_truncated_file_keeps_its_whole_rows(tmp_path, pack):
    rows = [f"{number} {os.urandom(30).hex()}" for number in range(9000)]
    packed = pack("".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    write(tmp_path, {"a.jsonl.gz": packed[:-2000]})
    *good, bad = read(tmp_path / "a.jsonl.gz")
    assert good == rows[: len(good)] and len(good) > 100
    assert bad.startswith("damaged file: it is truncated or damaged (")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('\n[\n {"text": "a"},\n {"text": "b"}\n]\n', ["a", "b"]),
        ('{\n "text": "a"\n}', ["a"]),
        ('cut"}\n{"text": "b"}', ["not JSON: not JSON (Expecting value: line 1 column 1 (char 0))", "b"]),
        ('[{"text": "a"},', ["not JSON: not JSON (Expecting value: line 1 column 16 (char 15))"]),
        ("[" * 200_000, ["not JSON: not JSON (maximum recursion depth exceeded"]),
    ],
)
def test_json_is_lines_or_one_value(tmp_path, content, found):
    write(tmp_path, {"a.json": content})
    assert [row[: len(expected)] for row, expected in zip(read(tmp_path / "a.json"), found, strict=True)] == found


def test_packing_is_told_by_content(tmp_path):
    line = b'{"text": "a"}\n'
    zstd = pa.compress(line, codec="zstd", asbytes=True)
    write(tmp_path, {"a.jsonl.zst": gzip.compress(line), "b.jsonl.gz": line, "c.jsonl": zstd + zstd})
    assert [read(path) for path in sorted(tmp_path.iterdir())] == [["a"], ["a"], ["a", "a"]]


# ---- folders ----


def test_folder_names_what_it_skips(tmp_path):
    write(tmp_path / "d", dict.fromkeys(["b/x.py", "a.txt", "BOOK.TXT", "c.Md.GZ", ".git/a.txt", ".env", "._a.txt", "pic.png"], "x"))
    write(
        tmp_path / "d", dict.fromkeys(["env/pyvenv.cfg", "env/a.py", "node_modules/a.md", ".ipynb_checkpoints/a.txt", "archive.zip"], "x")
    )
    write(
        tmp_path / "d", {"empty.txt": b"", "rows.json": '{"text": null}\n{"text": "x"}', "package.json": '{"name": "x"}', "bad.json": "{"}
    )
    (tmp_path / "d" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d" / "pipe.txt")
    listing = list_files([tmp_path / "d"], "text")
    assert names(listing) == ["d/BOOK.TXT", "d/a.txt", "d/b/x.py", "d/c.Md.GZ", "d/rows.json"]
    assert listing.skipped == {
        "hidden files and folders": ["._a.txt", ".env", ".git", ".ipynb_checkpoints"],
        "files of other kinds": ["archive.zip", "pic.png"],
        "folders of tools": ["env", "node_modules"],
        "empty files": ["empty.txt"],
        "broken links": ["gone.txt"],
        "pipes, sockets and devices": ["pipe.txt"],
        ".json files without a field 'text'": ["bad.json", "package.json"],
    }
    first, *others = listing.summary()
    assert first == "reading 5 files: 2 .txt, 1 .py, 1 .md.gz, 1 .json"
    assert "skipping hidden files and folders (4): ._a.txt, .env, .git, .ipynb_checkpoints" in others and len(others) == 7
    write(tmp_path, {".notes.txt": "named on the command line"})
    assert names(list_files([tmp_path / ".notes.txt", tmp_path / "d" / ".git"], "text")) == [".notes.txt", ".git/a.txt"]


def test_links_are_followed_once(tmp_path):
    write(tmp_path, {"d/m/a.txt": "a", "real/b.txt": "b", "real/deep/c.txt": "c", "single.txt": "s", "aside/x.txt": "x"})
    for name, target in {"sub": "../real", "again": "../real/deep", "loop": ".", "up": "..", "m/root": "/", "a.txt": "m/a.txt"}.items():
        (tmp_path / "d" / name).symlink_to(target)
    (tmp_path / "d" / "s.txt").symlink_to("../single.txt")
    (tmp_path / "real" / "back").symlink_to("../d")
    os.link(tmp_path / "d" / "m" / "a.txt", tmp_path / "d" / "n.txt")
    listing = list_files([tmp_path / "d"], "text")
    found = [found.path.read_text() for found in listing.files]
    assert sorted(found) == ["a", "b", "c", "s"] and "d/m/a.txt" in names(listing) and "d/sub/b.txt" in names(listing)
    assert listing.skipped["other names of files that are read anyway"] == ["n.txt", "a.txt"]
    (reason,) = [reason for reason in listing.skipped if "links to folders" in reason]
    assert {"loop", "up", "m/root", "sub/back"} < set(listing.skipped[reason])


@pytest.mark.parametrize("order", [["d", "d/a.txt"], ["d/a.txt", "d"], ["d", "d", "d/a.txt", "d/a.txt"], ["d/sub", "d"]])
def test_file_named_twice_is_read_once(tmp_path, order):
    write(tmp_path, {"d/a.txt": "a", "d/sub/b.txt": "b", "d/settings.json": "{}"})
    listing = list_files([tmp_path / name for name in order], "text")
    assert sorted(found.path.read_text() for found in listing.files) == ["a", "b"]
    assert "skipping other names of files that are read anyway (" in "\n".join(listing.summary())
    listing = list_files([tmp_path / "d", tmp_path / "d" / "settings.json"], "text")
    assert "settings.json" in names(listing)  # a file that is named is always read


def test_unreadable_files_and_folders_are_named(tmp_path, monkeypatch):
    """Root may read everything, so the system's answer is made up."""
    write(tmp_path, {"d/a.txt": "a", "d/secret.txt": "s", "d/private/b.txt": "b"})
    access, scandir = os.access, os.scandir

    def refuse(path):
        if os.path.basename(path) == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "secret.txt" and access(path, mode))
    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_files([tmp_path / "d"], "text")
    assert names(listing) == ["d/a.txt"]
    assert listing.summary()[1:] == ["skipping unreadable files and folders, Permission denied (2): secret.txt, private"]


def test_own_shards_are_never_data(tmp_path):
    write(tmp_path, {"d/a.txt": "a", "d/out/notes.txt": "n", "d/out/manifest.json": '{"text": "x"}'})
    listing = list_files([tmp_path / "d"], "text", tmp_path / "d" / "out")
    assert names(listing) == ["d/a.txt"] and listing.skipped == {"--out-dir": ["out"]}


def test_folder_without_text_says_why(tmp_path):
    write(tmp_path, {"d/a.png": "x", "d/.b.txt": "x"})
    with pytest.raises(ValueError, match=r"contains no .parquet .*\(skipping hidden .* \(1\): .b.txt; skipping files .* \(1\): a.png\)"):
        list_files([tmp_path / "d"], "text")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems have only names in UTF-8")
def test_odd_names_are_read_and_shown(tmp_path):
    odd = [os.fsdecode(b"caf\xe9.txt"), "two\nlines.txt", "x" * 240 + ".txt", "blank \u202e.txt", ".txt"]
    write(tmp_path / "d", dict.fromkeys([*odd, "two\nlines.png"], "text"))
    listing = list_files([tmp_path / "d"], "text")
    assert len(listing.files) == 4  # .txt is hidden
    assert all(line.isprintable() for line in listing.summary())
    assert [digest for _, digest in hash_files(listing.files)] == [documents.sha256(found.path) for found in listing.files]
    assert kind_of(tmp_path / ".txt") == ".txt" and len(list_files([tmp_path / "d" / ".txt"], "text").files) == 1


def test_long_lists_end_with_a_count(tmp_path):
    write(tmp_path, {"d/x.txt": "x", **{f"d/{number}\n.png": "x" for number in range(7)}})
    assert "(7): 0�.png, 1�.png, 2�.png, 3�.png, 4�.png and 2 more" in list_files([tmp_path / "d"], "text").summary()[1]
    assert changes([["a", "1"]], [["a", "1"], *([str(number), "1"] for number in range(6))]) == "new: 0, 1, 2, 3, 4 and 1 more"
    write(tmp_path, {"a.jsonl": json.dumps({str(number): "x" for number in range(9)})})
    assert read(tmp_path / "a.jsonl")[0].endswith("(it has 0, 1, 2, 3, 4, 5, 6, 7 and 1 more)")


def test_changes_are_named():
    before = [["a", "1"], ["b", "2"], ["c", "3"]]
    assert changes(before, [["a", "1"], ["b", "4"], ["d", "5"]]) == "changed: b; missing: c; new: d"
    assert changes(before, before[::-1]) == "other order" and changes(before, before) == changes([], before) == ""
