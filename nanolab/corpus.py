"""Documents from files: text, .jsonl and .parquet, on this machine or on the hub.

Files are cut into ranges, and consecutive ranges are grouped into shards of about 4 MiB of text.
The shards depend on the files alone, not on the number of processes that will read them.
"""

import contextlib
import glob
import json
import os
import re
import subprocess
import sys
import sysconfig
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanolab.common import UserError, describe, reachable
from nanolab.tokenizer import END_OF_TEXT

# pyarrow, datasets and huggingface_hub are imported where they are used: without them, the
# tokenising processes start faster.

READABLE = {".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet"}  # in a folder
RECORDS = (".jsonl", ".ndjson", ".json")  # a JSON object a line
SHARD_BYTES = 4 * 2**20
MARKER = re.escape(END_OF_TEXT) + "(?:\r?\n)?"  # of your own text: between two documents
# Soft hyphens, joiners, marks of direction, variants of emoji, BOMs.
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
FINEWEBS = {"fineweb": "FineWeb", "fineweb-edu": "FineWeb-Edu"}  # what prepare.py calls them


class FileRange(NamedTuple):
    """Bytes start ... stop - 1 of a file; of a .parquet file, rows of one row group."""
    path: str
    start: int
    stop: int
    n_bytes: float  # how much text this is, about
    row_group: int | None = None


def own_files(source, left_out=None):
    """The text files of a path, a folder or a glob, sorted. Raises UserError.

    A folder gives its READABLE files; a file or glob may name another suffix, which is then text.
    A file with several names counts once. left_out: a dict that gets the others, {real path: why}.
    """
    path, left_out = Path(source), {} if left_out is None else left_out
    start, _, end = str(source).partition("**")  # glob.glob would run into loops of links
    if "**" in end:
        raise UserError(f"'{source}' has ** twice; give a folder, or a glob with one **")
    named = [path] if path.exists() else [*map(Path, glob.glob(start or "."))]
    found = {file for match in named
             for file in (files_below(match, set()) if match.is_dir() else [match])
             if path.exists() or file.match(end.strip("/") or "*")}
    names_suffix = path.is_file() or path.suffix and not path.is_dir()
    suffixes = READABLE | ({path.suffix.lower()} if names_suffix else set())
    files = {}
    for file in sorted(found):
        real_path = os.path.realpath(file)
        if file.name.startswith(".") and file not in named:
            left_out[real_path] = "hidden"
        elif file.suffix.lower() not in suffixes:
            left_out[real_path] = file.suffix.lower() or "no suffix"
        elif not file.is_file() or not file.stat().st_size:
            left_out[real_path] = "empty or a broken link"
        else:
            files.setdefault(real_path, str(file))
    if not files:
        raise UserError(f"'{source}' does not exist, or has no text to read (left out: "
                        f"{format_counts(Counter(left_out.values()))}); give a file, folder or "
                        f"glob of {' '.join(sorted(READABLE))}, or a source that --help lists")
    return list(files.values())


def files_below(folder, seen):
    """Yields the files below a folder, and its hidden folders. Links are followed, but into each
    folder once: `seen` has those that it entered."""
    if os.path.realpath(folder) in seen:
        return
    seen.add(os.path.realpath(folder))
    for path in Path(folder).iterdir():
        if path.is_dir() and not path.name.startswith("."):
            yield from files_below(path, seen)
        else:
            yield path


def format_counts(counts):
    """A Counter as ".gz 2, hidden 1"."""
    return ", ".join(f"{what} {n:,}" for what, n in counts.most_common() if n) or "none"


def stdlib_files():
    """Python's standard library, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return [str(file) for file in sorted(root.rglob("*.py"))
            if not left_out & set(file.relative_to(root).parts)]


def pypi_wheels(requirements, folder):
    """The wheels of a requirements file, downloaded to a folder by pip, which checks their hashes.

    Comments `# test`, `# val` and `# train` in the file begin a split. -> {split: paths}
    """
    wheels = {"test": [], "val": [], "train": []}
    for line in Path(requirements).read_text().splitlines():
        if line.removeprefix("# ") in wheels:
            split = line.removeprefix("# ")
        elif "==" in line:
            name, version = line.split()[0].split("==")
            name = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            wheels[split].append(Path(folder, name))
    if all(path.exists() for paths in wheels.values() for path in paths):
        return wheels
    print(f"downloading the wheels of {requirements} to {folder}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               "--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none",
               "--python-version=3.11", f"--dest={folder}", f"--requirement={requirements}"]
    if subprocess.run(command).returncode:
        raise UserError("pip could not download the wheels; connect to PyPI (in uv's environments: "
                        "uv pip install pip), and run the same command again")
    return wheels


def wheel_documents(path):
    """The Python files of a wheel, by name: those that are UTF-8 and not empty. Raises
    UserError."""
    try:
        with zipfile.ZipFile(path) as wheel:
            files = [wheel.read(name) for name in sorted(wheel.namelist()) if name.endswith(".py")]
    except zipfile.BadZipFile:
        raise UserError(f"{path} is damaged; delete it, and run the same command again") from None
    for data in files:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode()
            if text.strip():
                yield text


def fineweb_files(folder, repository):
    """The .parquet files of the sample-10BT of a repository on the hub, in order.

    Their hf:// addresses, revision included, or their paths in a folder: a copy of the repository,
    or one that contains a copy under the repository's name.
    """
    if folder or not reachable("huggingface.co"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # datasets may have the file list in its cache
    if folder:
        copy = Path(folder, repository)
        source = str((copy if copy.is_dir() else Path(folder)).resolve())
    from datasets import load_dataset_builder
    try:
        builder = load_dataset_builder(source if folder else repository, "sample-10BT")
        return list(builder.config.data_files["train"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder or repository} could not be opened "
                        f"({describe(error)}); connect to huggingface.co, or give --from"
                        "=FOLDER with sample/10BT/*.parquet and the README.md that names them"
                        ) from None


def file_ranges(path):
    """A list of FileRange of about 4 MiB, which end with a line, or with a MARKER if it has any."""
    if path.lower().endswith(".parquet"):
        ranges, metadata = [], open_parquet(path, only_footer=True).metadata
        for i in range(metadata.num_row_groups):
            n_rows, n_bytes = metadata.row_group(i).num_rows, metadata.row_group(i).total_byte_size
            n = max(n_bytes // SHARD_BYTES, 1)
            rows = sorted({n_rows * k // n for k in range(n + 1)})
            ranges += [FileRange(path, *each, n_bytes / n, i) for each in zip(rows, rows[1:])]
        return ranges
    bounds, size = [0], os.path.getsize(path)
    with open(path, "rb") as file:  # not mapped: a file cut short would kill the process
        has_markers = file.read(SHARD_BYTES).count(END_OF_TEXT.encode()) > 1
        has_markers &= not path.lower().endswith(RECORDS)
        end = re.compile(MARKER.encode() if has_markers else b"\n")
        while bounds[-1] < size:
            file.seek(bounds[-1] + SHARD_BYTES - 1)
            line = next(filter(end.search, file), b"")
            bounds.append(min(file.tell() - len(end.split(line, 1)[-1]), size))
    return [FileRange(path, *each, each[1] - each[0]) for each in zip(bounds, bounds[1:])]


def group_into_shards(ranges):
    """Consecutive ranges together until they have SHARD_BYTES. -> list of lists of FileRange"""
    shards, missing = [], 0
    for file_range in ranges:
        if missing <= 0:
            shards.append([])
            missing = SHARD_BYTES
        shards[-1].append(file_range)
        missing -= file_range.n_bytes
    return shards


def records(file_range, text_column="text", is_own=False):
    """Yields (place, value): of each record, where None is a null; of a text file, its text.

    place: for `locate`. is_own: of a text file BOMs go, and line ends become "\n".
    """
    path, start, stop, _, row_group = file_range
    if row_group is not None:
        yield from parquet_rows(file_range, text_column)
        return
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    bad = data.find(b"\0")  # as in UTF-16
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        raise UserError(f"{path} is not UTF-8 text (byte {start + bad:,}); "
                        "unpack or convert it, or leave it out")
    if is_own:
        text = re.sub("\r\n?", "\n", text.replace("\ufeff", ""))
    if not path.lower().endswith(RECORDS):
        yield None, text
        return
    for i, line in enumerate(text.split("\n")):
        try:
            if line.strip():
                yield i, json.loads(line).get(text_column)
        except (ValueError, AttributeError, RecursionError) as error:
            start = getattr(error, "colno", 1) - 1  # a comma behind a long object, for example
            raise UserError(f"{locate(file_range, i)} is no JSON object, as each line must be: see "
                            f"column {start + 1:,}, {line[start:start + 60]!r}") from None


def locate(file_range, place):
    """"FILE, line 31" or "FILE, row 31", of a place that `records` gave; else "FILE"."""
    path, start, _, _, row_group = file_range
    if place is None:
        return path
    if row_group is not None:
        metadata = open_parquet(path, only_footer=True).metadata
        before = sum(metadata.row_group(i).num_rows for i in range(row_group))
        return f"{path}, row {before + place + 1:,}"
    with open(path, "rb") as file:
        before = sum(file.read(min(2**20, start - i)).count(b"\n") for i in range(0, start, 2**20))
    return f"{path}, line {before + place + 1:,}"


LEFT_OPEN = {}  # the row group that this process read last: the next row, and the rows from there


def parquet_rows(file_range, text_column):
    path, start, stop, _, group = file_range
    row, rows = LEFT_OPEN.pop((path, group, text_column), (stop, None))
    if row > start:  # else the rows before would be decoded again for each range of the group
        file = open_parquet(path)
        if text_column not in (columns := file.schema_arrow.names):
            raise UserError(f"{path} has no column '{text_column}' but {', '.join(columns)}; "
                            "choose with --text_column")
        batches = file.iter_batches(256, row_groups=[group], columns=[text_column])
        row, rows = 0, (value for batch in batches for value in batch.column(0))
    try:
        for i, value in zip(range(row, stop), rows):
            if i >= start:
                yield i, value.as_py()
    except (OSError, ValueError) as error:  # its footer was intact; or a string is not UTF-8
        raise UserError(f"{path} is damaged ({describe(error)})") from None
    LEFT_OPEN.clear()
    LEFT_OPEN[path, group, text_column] = stop, rows


def cut_at_line_ends(text, max_length):
    """Yields the text cut at a line end past max_length, or at twice that if none is there."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + max_length, start + 2 * max_length)
        stop = line_end + 1 or start + 2 * max_length
        yield text[start:stop]
        start = stop


def own_texts(text, limit, size):
    """Yields the documents of a text, between markers; cut if one has more than `limit` bytes."""
    text = "" if text is None else text.replace("\ufeff", "")
    for document in re.split(MARKER, text):
        if len(undressed(document).encode()) > limit:
            yield from cut(document, size)
        elif document.strip():
            yield document


def cut(text, size):
    """Yields the text in pieces of about `size` to 2 `size` bytes.

    It is cut at blank lines, or else at ends of lines or sentences, where the checksum of the text
    before is lowest. So a copy is cut at the same places, in another dress or after other text.
    """
    some = f".{{1,{size // 4 + 1}}}"  # characters of a longer line, up to 4 bytes each
    line, sentence, words = f"[^\n]{{0,{size}}}\n", f"{some}?[.!?]\\s", f"{some}(?:\\s|\\Z)"
    units = re.findall(f"(?s){line}|{sentence}|{words}|{some}", text)
    plain = [undressed(unit).encode() for unit in units]
    ends, keys, recent = np.cumsum([len(each) for each in plain]), [], b""
    for unit, each in zip(units, plain):
        recent = (recent + each)[-200:]  # more than a line: some lines come again and again
        keys.append(zlib.crc32(recent) + 2**32 * (bool(each) + (not unit.endswith("\n"))))
    first = done = 0
    while ends[-1] - done > 2 * size:
        low, high = np.searchsorted(ends, [done + size, done + 2 * size])
        last = low + int(np.argmin(keys[low:max(high, low + 1)]))
        yield "".join(units[first:last + 1])
        first, done = last + 1, ends[last]
    yield "".join(units[first:])


def undressed(text):
    """A text without what differs between copies of it: white space and line ends, invisible
    characters, and which of Unicode's forms a character has."""
    return "".join(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).split())


def open_parquet(path, only_footer=False):
    """A pyarrow ParquetFile. A file on the hub is downloaded to its cache, unless only_footer."""
    from pyarrow.parquet import ParquetFile
    file = path
    try:
        if path.startswith("hf://"):
            import huggingface_hub
            hub = huggingface_hub.HfFileSystem()
            parts = hub.resolve_path(path)
            file = hub.open(path) if only_footer else huggingface_hub.hf_hub_download(
                parts.repo_id, parts.path_in_repo, repo_type=parts.repo_type,
                revision=parts.revision)
        return ParquetFile(file, pre_buffer=False, buffer_size=2**16)  # not a row group at once
    except Exception as error:  # of many classes, from huggingface_hub and the packages it calls
        raise UserError(f"{path} is damaged or could not be downloaded ({type(error).__name__}: "
                        f"{describe(error)})") from None
