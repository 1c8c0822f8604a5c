"""Documents from files: text, .jsonl and .parquet, on this machine or on the hub.

Files are cut into ranges, and consecutive ranges are grouped into shards of about 4 MiB of text.
The shards depend on the files alone, not on the number of processes that will read them.
"""

import contextlib
import glob
import itertools
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

from nanolab.common import UserError, parse_json, reachable

# pyarrow, datasets and huggingface_hub are imported where they are used: without them, the
# tokenising processes start faster.

READABLE = (".txt", ".md", ".jsonl", ".parquet")
SHARD_BYTES = 4 * 2**20
# What prepare.py calls them: a title, and the repository on the hub.
FINEWEBS = {"fineweb": ("FineWeb", "HuggingFaceFW/fineweb"),
            "fineweb-edu": ("FineWeb-Edu", "HuggingFaceFW/fineweb-edu")}


class FileRange(NamedTuple):
    """Bytes start ... stop - 1 of a file; of a .parquet file, rows of one row group."""
    path: str
    start: int
    stop: int
    n_bytes: float  # how much text this is, about
    row_group: int | None = None


def own_files(source):
    """The text files of a path, a folder or a glob, sorted."""
    path = Path(source)
    matches = [path] if path.exists() else [Path(p) for p in glob.glob(source, recursive=True)]
    files = {str(file)
             for match in matches
             for file in (match.rglob("*") if match.is_dir() else [match])
             if file.is_file() and file.suffix.lower() in READABLE}
    if not files:
        problem = f"has no {' '.join(READABLE)} file" if matches else "does not exist"
        raise UserError(f"'{source}' {problem}; "
                        "give stdlib, pypi, fineweb, fineweb-edu, or a file, folder or glob of "
                        "text")
    return sorted(files)


def stdlib_files():
    """Python's standard library, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [str(file) for file in sorted(root.rglob("*.py"))
             if not left_out & set(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"the Python library at {root} has no source files; "
                        "prepare a text of your own instead")
    return files


def pypi_wheels(requirements, folder):
    """The wheels of a requirements file, downloaded to a folder by pip, which checks their hashes.

    Comments `# test`, `# val` and `# train` in the file begin a split. -> {split: paths}. Raises
    UserError.
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
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"the wheels of {requirements} could not be downloaded ({reason}); "
                        "connect to PyPI, and run the same command again")
    return wheels


def wheel_documents(path):
    """The Python files of a wheel, by name; those that are UTF-8 and not empty. Raises
    UserError."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = sorted(name for name in wheel.namelist() if name.endswith(".py"))
            files = [wheel.read(name) for name in names]
    except zipfile.BadZipFile:
        raise UserError(f"{path} is damaged; delete it, and run the same command again") from None
    for data in files:
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode()
            if text.strip():
                yield text


def fineweb_files(folder, repository):
    """The .parquet files of the sample-10BT of one of FINEWEBS, in order.

    Without a folder: their hf:// addresses, revision included. With one: their paths in it. The
    folder is a copy of the repository, or contains one under the repository's name.
    """
    if folder and not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} (from --from)")
    if folder or not reachable("huggingface.co"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # datasets may have the file list in its cache
    source, advice = repository, "connect to huggingface.co, or give --from=FOLDER with a copy"
    if folder:
        copy = Path(folder, repository)
        source = str((copy if copy.is_dir() else Path(folder)).resolve())
        advice = "needs sample/10BT/*.parquet and the README.md that names them"
    from datasets import load_dataset_builder
    try:
        return list(load_dataset_builder(source, "sample-10BT").config.data_files["train"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{repository} could not be opened at {source}: {advice} "
                        f"({str(error).splitlines()[0]})") from None


def file_ranges(path):
    """The whole file: 4 MiB a range, or one range a row group of a .parquet file. -> [FileRange]"""
    if is_parquet(path):
        metadata = open_parquet(path, only_footer=True).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [FileRange(path, 0, group.num_rows, group.total_byte_size, i)
                for i, group in enumerate(groups)]
    size = os.path.getsize(path)
    bounds = [(start, min(start + SHARD_BYTES, size)) for start in range(0, size, SHARD_BYTES)]
    return [FileRange(path, start, stop, stop - start) for start, stop in bounds]


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


def documents(file_range, text_column, max_length):
    """Yields the texts of a range. Raises UserError.

    A text file is one document, or several if it is longer than max_length characters.
    """
    path = file_range.path
    if is_parquet(path):
        yield from parquet_rows(file_range, text_column)
        return
    with open(path, "rb") as file:
        start, stop = line_start(file, file_range.start), line_start(file, file_range.stop)
        file.seek(start)
        data = file.read(stop - start)
    if path.lower().endswith(".jsonl"):
        lines = (line.strip() for line in data.split(b"\n"))
        yield from (json_text(line, path, text_column) for line in lines if line)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {start + error.start:,}); "
                        "convert it or leave it out") from None
    yield from cut_at_line_ends(text, max_length)


def line_start(file, position):
    """Where the first line starts at or after `position`: neighbouring ranges share no line."""
    if position > 0:
        file.seek(position - 1)
        file.readline()
        return file.tell()
    return 0


def cut_at_line_ends(text, max_length):
    """Yields the text cut at a line end past max_length, or at twice that if none is there."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + max_length, start + 2 * max_length)
        stop = line_end + 1 or start + 2 * max_length
        yield text[start:stop]
        start = stop


def json_text(line, path, text_column):
    try:
        return parse_json(line)[text_column]
    except ValueError:
        raise UserError(f"{path} has a line that is not JSON: {line[:60]!r}") from None
    except (KeyError, TypeError):
        raise UserError(f"{path} has a line without '{text_column}': {line[:60]!r}; "
                        "choose with --text_column") from None


def parquet_rows(file_range, text_column):
    file = open_parquet(file_range.path)
    columns = file.schema_arrow.names
    if text_column not in columns:
        raise UserError(f"{file_range.path} has no column '{text_column}' but "
                        f"{', '.join(columns)}; choose with --text_column")
    batches = file.iter_batches(256, row_groups=[file_range.row_group], columns=[text_column])
    texts = (text for batch in batches for text in batch.column(0).to_pylist())
    chosen = itertools.islice(texts, file_range.start, file_range.stop)
    yield from (text for text in chosen if text is not None)


def is_parquet(path):
    return path.lower().endswith(".parquet")


def open_parquet(path, only_footer=False):
    """A pyarrow ParquetFile. A file on the hub is downloaded to its cache, unless only_footer."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile
    try:
        return ParquetFile(open_on_hub(path, only_footer) if path.startswith("hf://") else path)
    except ArrowInvalid as error:
        raise UserError(f"{path} is damaged or no .parquet file "
                        f"({str(error).splitlines()[0]})") from None


def open_on_hub(path, only_footer):
    """A file object that reads over the network, or the path of the whole file in the cache."""
    import huggingface_hub
    try:
        hub = huggingface_hub.HfFileSystem()
        if only_footer:
            return hub.open(path)
        file = hub.resolve_path(path)
        return huggingface_hub.hf_hub_download(file.repo_id, file.path_in_repo,
                                               repo_type=file.repo_type, revision=file.revision)
    except Exception as error:  # of many classes, from huggingface_hub and the packages it calls
        raise UserError(f"{path} could not be downloaded "
                        f"({type(error).__name__}: {str(error).splitlines()[0]}); "
                        "the same command continues from here") from None
