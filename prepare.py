"""Text to token files, and token files back as batches.

    python prepare.py stdlib                  Python's own library, byte-level tokens; no network needed
    python prepare.py fineweb                 the published runs' data: FineWeb sample-10BT, GPT-2 tokens
    python prepare.py fineweb --from=FOLDER   the same from a copy, or from the published runs' own token files
    python prepare.py PATH [--name=NAME]      your own text: a file, a folder or a glob of .txt .md .jsonl .parquet

A data set is a folder data/NAME/ with train.bin, val.bin, test.bin (raw little-endian token ids, an end-of-text token
after every document) and meta.json, which is written last: a folder without it is unfinished.

Text is cut into parts of about 4 MiB whatever the number of processes; they tokenise parts into numbered files, and one
appends these in order. Run the same command again after a kill: finished parts are not tokenised again.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock
from tqdm import tqdm

# torch, pyarrow and datasets are imported where they are needed: the processes that tokenise start faster without.


class DataError(ValueError):
    """Text or token files that are missing, damaged or unfit, told in one line that says what to do."""


########################################
#              Tokenizers              #
########################################

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCABULARY = ["https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
                   "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"]
UNKNOWN = "unknown"  # the tokenizer of weights and token files that came without one of ours


@functools.cache
def get_tokenizer(name):
    """'gpt2': GPT-2's 50,257 tokens; 'bytes': the 256 bytes and an end-of-text token. -> tiktoken.Encoding.

    Raises DataError, within 2 seconds, where GPT-2's vocabulary is neither on this machine nor to be had.
    """
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", special_tokens={END_OF_TEXT: 256},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    if name == UNKNOWN:
        raise DataError("nothing says which text these tokens stand for: their tokenizer is neither gpt2 nor bytes")
    if name != "gpt2":
        raise DataError(f"unknown tokenizer '{name}'; there are gpt2 and bytes")
    if not all(path.exists() for path in gpt2_vocabulary_files()) and not reachable("openaipublic.blob.core.windows.net"):
        raise DataError("GPT-2's vocabulary is not on this machine and openaipublic.blob.core.windows.net does not answer: "
                        "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' errors, and tiktoken's own when a hash does not match
        raise DataError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): connect once, "
                        "or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bytes") from None


def gpt2_vocabulary_files():
    """vocab.bpe and encoder.json where tiktoken's load.py looks for them first, and keeps them: [Path, Path]."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache")
    return [Path(folder, hashlib.sha1(url.encode()).hexdigest()) for url in GPT2_VOCABULARY]


def assumed_tokenizer(vocab_size):
    """Of weights or token files that come without one: 'gpt2' if they have its 50,257 tokens, or these filled up to the
    50,304 that nanoGPT's models have; else UNKNOWN."""
    return "gpt2" if vocab_size in (50257, 50304) else UNKNOWN


def reachable(host, seconds=1.2):
    """Whether a TCP connection to `host` opens in time; assumed where a proxy stands between. A thread bounds the look-up
    of the name as well, which no time-out of socket covers."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    answered = []

    def connect():
        try:
            socket.create_connection((host, 443), timeout=seconds).close()
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)


def encode(tokenizer, text):
    """The token ids of a document, end-of-text token included. As in the published data, "<|endoftext|>" in the text is
    that token too. -> (n,) uint32. Raises DataError."""
    try:
        tokens = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT})
    except ValueError as error:  # about a million blanks in a row exceed the stack of tiktoken's regular expressions
        raise DataError(f"tiktoken cannot encode the document that starts with {text[:60]!r} ({describe(error)})") from None
    return np.append(tokens, np.uint32(tokenizer.eot_token))


def dtype_for(tokenizer):
    """The little-endian integers that hold its tokens on disk."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")


########################################
#   Reading token files: the windows   #
########################################

NANOGPT = "nanoGPT's prepare.py"


RANDOM = "random"  # the data set that is no files: random tokens, always the same, to time a model with
RANDOM_TOKENS = 2**20 + 1


def read_meta(data_dir, dataset, vocab_size=0):
    """meta.json of a data set; with vocab_size, also of one as nanoGPT's prepare.py leaves it, which has none: only train.bin
    and val.bin, uint16. Raises DataError."""
    if dataset == RANDOM:
        split = {"tokens": RANDOM_TOKENS, "sha256": ""}
        return {"tokenizer": UNKNOWN, "vocab_size": vocab_size or 50257, "dtype": "int64", "eot_id": None, "source": RANDOM,
                "splits": {"train": split, "val": split}, "plan": None}
    if not dataset:
        raise DataError("these weights belong to no data set of nanolab: choose one with --dataset")
    path = Path(data_dir, dataset, "meta.json")
    try:
        meta = json.loads(path.read_text())
        np.dtype(meta["dtype"])
        return {key: meta[key] for key in ("tokenizer", "vocab_size", "dtype", "eot_id", "splits", "source", "plan")}
    except FileNotFoundError:
        there = {file.name for file in path.parent.glob("*")}
        if {"train.bin", "val.bin"} <= there and not {"test.bin", "progress.json"} & there:
            return nanogpt_meta(path.parent, vocab_size)
        source = dataset if dataset in ("fineweb", "stdlib") else f"PATH_OF_YOUR_TEXT --name={dataset}"
        where = "" if data_dir == "data" else f" --data_dir={data_dir}"
        state = "is unfinished" if path.parent.is_dir() else "is not there"
        raise DataError(f"the data set {path.parent} {state}; make it: python prepare.py {source}{where}, "
                        "or give the folder it is in with --data_dir") from None
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path} is damaged or not nanolab's; delete {path.parent} and make it again with prepare.py") from None


def nanogpt_meta(folder, vocab_size):
    """What meta.json would say of the files that nanoGPT's prepare.py made. They are up to 17 GB, so of each it is the size,
    the first and the last MiB that are hashed."""
    if not vocab_size:
        raise DataError(f"{folder} has token files as nanoGPT makes them, without meta.json and test split: train.py reads "
                        "them with --vocab_size=N (50257 for GPT-2's tokens), eval.py needs another --dataset")
    splits = {}
    for split in ("train", "val"):
        path = Path(folder, f"{split}.bin")
        size = path.stat().st_size
        if size % 2:
            raise DataError(f"{path} has {size:,} bytes, so it holds no uint16 tokens as nanoGPT makes them")
        with open(path, "rb") as file:
            digest = hashlib.sha256(b"%d" % size + file.read(2**20))
            file.seek(max(size - 2**20, 0))
            digest.update(file.read())
        splits[split] = {"tokens": size // 2, "sha256": digest.hexdigest()}
    return {"tokenizer": assumed_tokenizer(vocab_size), "vocab_size": vocab_size, "dtype": "uint16", "eot_id": None,
            "splits": splits, "source": NANOGPT, "plan": None}


class Windows:
    """One split of a data set as windows: window i is tokens i x block_size up to and with (i + 1) x block_size.

    Neighbours share one token, the target of one's last and the input of the other's first. vocab_size: as for read_meta.
    Raises DataError.
    """

    def __init__(self, data_dir, dataset, split, block_size, vocab_size=0):
        meta = read_meta(data_dir, dataset, vocab_size)
        self.path = Path(data_dir, dataset, f"{split}.bin")
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size = meta["vocab_size"]
        self.block_size = block_size
        self.again = f"delete {self.path.parent} and make it again with prepare.py"
        if meta["source"] == NANOGPT:
            self.again = "it needs uint16 tokens and the right --vocab_size"
        is_random = meta["source"] == RANDOM
        if split not in meta["splits"] or not is_random and not self.path.is_file():
            raise DataError(f"the data set {self.path.parent} has no {split} split ({self.path}); {self.again}")
        self.n_tokens = meta["splits"][split]["tokens"]
        self.random = np.random.default_rng(0).integers(self.vocab_size, size=self.n_tokens) if is_random else None
        expected = self.n_tokens * self.dtype.itemsize
        if not is_random and self.path.stat().st_size != expected:
            raise DataError(f"{self.path} has {self.path.stat().st_size:,} bytes, its meta.json says {expected:,}; {self.again}")
        self.file = None if is_random else open(self.path, "rb", buffering=0)
        if len(self) < 1:
            raise DataError(f"{self.path} has {self.n_tokens:,} tokens, less than one window of {block_size + 1:,}; "
                            "use more text or a smaller --block_size")

    def __len__(self):
        return (self.n_tokens - 1) // self.block_size

    def batch(self, ids, device="cpu"):
        """Windows `ids` -> inputs and targets, each (len(ids), block_size) int64 on `device`, a torch.device or its name."""
        import torch
        windows = np.empty((len(ids), self.block_size + 1), self.dtype)
        for window, i in zip(windows, ids):
            if self.random is not None:
                window[:] = self.random[i * self.block_size:(i + 1) * self.block_size + 1]
            # Read, not mapped: the pages of a map would count as this process's memory, and it costs a small model's step 3 %.
            elif os.preadv(self.file.fileno(), [window], i * self.block_size * self.dtype.itemsize) < window.nbytes:
                raise DataError(f"{self.path} has become shorter since the run began; {self.again}")
        windows = windows.astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise DataError(f"{self.path} has the token {windows.max()}, beyond its vocabulary of {self.vocab_size}; "
                            f"{self.again}")
        windows = torch.from_numpy(windows)
        if torch.device(device).type == "cuda":  # from pinned memory, so that the program need not wait for the copy
            windows = windows.pin_memory()
        windows = windows.to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]


def window_ids(order, data_seed, n_windows, first, count):
    """Which windows stand at places first ... first + count - 1 of an endless run through a split, epoch after epoch.

    A pure function: nothing to save, nothing to restore, the same for any number of processes. 'sequential' takes them
    as they lie in the file; 'shuffled' in a permutation of (data_seed, epoch). After llm-baselines' data/utils.py.
    """
    places = range(first, first + count)
    if order == "sequential":
        return [place % n_windows for place in places]
    return [int(permutation(n_windows, data_seed, place // n_windows)[place % n_windows]) for place in places]


@functools.lru_cache(maxsize=2)  # two: a step may reach into the next epoch
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


########################################
#     Sources: from files to parts     #
########################################

PART_BYTES = 4 * 2**20
FINEWEB = "HuggingFaceFW/fineweb"
HELDOUT = 0.01  # share of its rows, at the end, that are for val and test

# A piece is (path, start, stop): rows of a .parquet file, or bytes of any other. A part is a list of pieces.


def own_files(source):
    """The text files of a path, folder or glob, in sorted order."""
    readable = (".txt", ".md", ".jsonl", ".parquet")
    path = Path(source)
    found = [path] if path.exists() else [Path(match) for match in glob.glob(source, recursive=True)]
    files = {str(file) for match in found for file in (match.rglob("*") if match.is_dir() else [match])
             if file.is_file() and file.suffix.lower() in readable}
    if not files:
        why = "does not exist" if not found else f"has no {' '.join(readable)} file"
        raise DataError(f"'{source}' {why}; give stdlib, fineweb, or a file, folder or glob of text")
    return sorted(files)


def stdlib_files():
    """Python's own library on this machine, without its tests and without what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [str(file) for file in sorted(root.rglob("*.py")) if not left_out & set(file.relative_to(root).parts)]
    if not files:
        raise DataError(f"the Python library at {root} has no source files; prepare a text of your own instead")
    return files


def fineweb_files(folder):
    """FineWeb's sample-10BT: its .parquet files in order, on the hub (hf:// addresses with the revision) or in `folder`,
    a local copy of the repository or of the hub's folders above it."""
    if folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not Path(folder).is_dir():
            raise DataError(f"there is no folder {folder} (from --from)")
        inside = Path(folder, FINEWEB)
        source = str((inside if inside.is_dir() else Path(folder)).resolve())
    else:
        source = FINEWEB
        if not reachable("huggingface.co"):
            os.environ["HF_HUB_OFFLINE"] = "1"  # perhaps it was downloaded before
    from datasets import load_dataset_builder
    try:
        return list(load_dataset_builder(source, "sample-10BT").config.data_files["train"])
    except (OSError, ValueError, KeyError) as error:
        what_to_do = "needs sample/10BT/*.parquet and the README.md that names them" if folder else \
            "connect to huggingface.co, or give --from=FOLDER with a copy of it"
        raise DataError(f"FineWeb could not be opened at {source}: {what_to_do} ({str(error).splitlines()[0]})") from None


def open_parquet(path, whole=True):
    """A pyarrow ParquetFile. A file on the hub is downloaded into its cache if `whole`, else only its footer is read."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile
    try:
        return ParquetFile(open_on_hub(path, whole) if path.startswith("hf://") else path)
    except ArrowInvalid as error:
        raise DataError(f"{path} is damaged or no .parquet file ({str(error).splitlines()[0]})") from None


def open_on_hub(path, whole):
    import huggingface_hub
    try:
        hub = huggingface_hub.HfFileSystem()
        if not whole:
            return hub.open(path)
        at = hub.resolve_path(path)
        return huggingface_hub.hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)
    except Exception as error:  # of the network, in the many classes of huggingface_hub and of what it calls
        raise DataError(f"{path} could not be had ({type(error).__name__}: {str(error).splitlines()[0]}); "
                        "the same command goes on from here") from None


def pieces_of(path):
    """-> [((path, start, stop), bytes)]: each row group of a .parquet file, 4 MiB ranges of any other."""
    if path.lower().endswith(".parquet"):
        metadata = open_parquet(path, whole=False).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        stops = np.cumsum([group.num_rows for group in groups]).tolist()
        return [((path, stop - group.num_rows, stop), group.total_byte_size) for group, stop in zip(groups, stops)]
    size = os.path.getsize(path)
    ranges = [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
    return [((path, start, stop), stop - start) for start, stop in ranges]


def group_into_parts(sized_pieces):
    """Consecutive pieces together until they reach PART_BYTES: the same parts for any number of processes."""
    parts, room = [], 0
    for piece, n_bytes in sized_pieces:
        if room <= 0:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(piece)
        room -= n_bytes
    return parts


def documents(piece, text_column, longest):
    """The texts of a piece, one by one. A text file is one document, or several if it has more than `longest` characters."""
    path, start, stop = piece
    if path.lower().endswith(".parquet"):
        yield from parquet_rows(path, start, stop, text_column)
        return
    with open(path, "rb") as file:
        first, end = line_start(file, start), line_start(file, stop)
        if path.lower().endswith(".jsonl"):
            file.seek(first)
            while file.tell() < end:
                if line := file.readline().strip():
                    yield json_row(line, path, text_column)
            return
        file.seek(first)
        try:
            text = file.read(end - first).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {first + error.start:,}); convert it or leave it out") from None
    place = 0
    while place < len(text):  # cut at the first line end past `longest`, or where there is none near
        cut = text.find("\n", place + longest, place + 2 * longest) + 1 or place + 2 * longest
        yield text[place:cut]
        place = cut


def line_start(file, position):
    """The start of the first line at or after `position`, so that neighbouring ranges share no line and miss none."""
    if position > 0:
        file.seek(position - 1)
        file.readline()
        return file.tell()
    return 0


def json_row(line, path, text_column):
    try:
        text = json.loads(line)[text_column]
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path} has a line that is not JSON: {line[:60]!r}") from None
    except (KeyError, TypeError):
        raise DataError(f"{path} has a line without '{text_column}': {line[:60]!r}; choose with --text_column") from None
    return text


def parquet_rows(path, start, stop, text_column):
    file = open_parquet(path)
    if text_column not in file.schema_arrow.names:
        raise DataError(f"{path} has no column '{text_column}' but {', '.join(file.schema_arrow.names)}; "
                        "choose with --text_column")
    row = 0
    for i in range(file.num_row_groups):
        n_rows = file.metadata.row_group(i).num_rows
        if start < row + n_rows and row < stop:
            for batch in file.iter_batches(batch_size=256, row_groups=[i], columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    if start <= row < stop and text is not None:
                        yield text
                    row += 1
        else:
            row += n_rows


########################################
#       The split by hash of text      #
########################################

def text_hash(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def hash_cuts(hashes, sizes):
    """Where test and val end when documents are laid in the order of their hash: the first 1 % of the bytes are test, the
    next 1 % val, each at least one document. It depends on the texts alone, not on the files or their order.
    -> the largest hash in test, the largest in val."""
    if not len(hashes):
        raise DataError("there is no text in these files")
    order = np.argsort(hashes)
    hashes, ends = hashes[order], np.cumsum(sizes[order])
    cuts, n_done = [], 0
    for to_spare in (2, 1):  # documents that must remain for the splits after test, after val
        wanted = (ends[n_done - 1] if n_done else 0) + 0.01 * ends[-1]
        last = max(min(int(np.searchsorted(ends, wanted)), len(hashes) - 1 - to_spare), n_done)
        n_done = int(np.searchsorted(hashes, hashes[last], side="right"))  # equal texts stay together
        if n_done == len(hashes):
            raise DataError(f"{len(set(hashes.tolist())):,} different documents are too few to split into train, val and test; "
                            "use more or smaller ones")
        cuts.append(int(hashes[n_done - 1]))
    return cuts


########################################
#              Tokenising              #
########################################

@dataclass
class Job:
    """What the processes need to know to tokenise a part."""
    name: str
    folder: str
    plan: str  # its beginning is in the names of the numbered files, which a killed run's last processes may still write
    tokenizer: str
    text_column: str = "text"
    longest: int = 2**20  # characters of a document in a text file, before it is cut

    def path(self, index):
        return Path(self.folder, "parts", f"{self.plan[:8]}-{self.name}-{index:06d}.npz")

    def documents(self, part):
        """The texts of a part, each with its bytes. Raises DataError where one is not text."""
        for piece in part:
            for text in documents(piece, self.text_column, self.longest):
                try:
                    if data := text.encode():  # an empty document teaches nothing
                        yield text, data
                except (AttributeError, UnicodeEncodeError):  # a number; half of a surrogate pair, such as JSON's "\\ud800"
                    raise DataError(f"{piece[0]} has a '{self.text_column}' that is not text: {str(text)[:60]!r}") from None


def tokenise(job, numbered_part):
    """Tokenises part (index, pieces) into a numbered file, unless that is there: the tokens of its documents, and of each
    document how many these are, its size in bytes and its hash. -> the file's path."""
    index, part = numbered_part
    path = job.path(index)
    if path.exists():
        return path
    tokenizer = get_tokenizer(job.tokenizer)
    tokens, facts = [np.empty(0, np.uint32)], []
    for text, data in job.documents(part):
        tokens.append(encode(tokenizer, text))
        facts.append((len(tokens[-1]), len(data), text_hash(data)))
    lengths, sizes, hashes = np.array(facts, np.uint64).reshape(-1, 3).T
    unfinished = path.with_suffix(f".{os.getpid()}")
    with open(unfinished, "wb") as file:
        np.savez(file, tokens=np.concatenate(tokens).astype(dtype_for(tokenizer)), lengths=lengths, sizes=sizes, hashes=hashes)
    os.replace(unfinished, path)
    return path


def map_parts(function, numbered_parts, workers):
    """function(part) of each part, in their order, over as many processes."""
    if min(workers, len(numbered_parts)) <= 1:
        yield from map(function, numbered_parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(numbered_parts)), context, initializer=end_with_parent) as pool:
        try:
            yield from pool.map(function, numbered_parts)
        except BrokenProcessPool:
            raise DataError("a tokenising process was killed, perhaps for want of memory; the same command goes on from here, "
                            "with fewer --workers if need be") from None


def end_with_parent():
    """Leaves Ctrl-C to the parent process, and ends this one when the parent has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Progress:
    """How far a data set is: parts done of each job, tokens in each split's unfinished file, hash_cuts once they are known.
    Saved after every part, so that the same command goes on after a kill; another plan starts over."""

    def __init__(self, folder, plan):
        self.path, self.plan = Path(folder, "progress.json"), plan
        self.parts, self.tokens, self.cuts = {}, {}, None
        Path(folder, "parts").mkdir(parents=True, exist_ok=True)
        saved = json.loads(self.path.read_text()) if self.path.exists() else {}
        if saved.get("plan") == plan and "cuts" in saved:  # without: left by a nanolab whose parts were of another kind
            self.parts, self.tokens, self.cuts = saved["parts"], saved["tokens"], saved["cuts"]
        else:
            for part in Path(folder, "parts").iterdir():
                part.unlink()
            self.save()

    def save(self):
        write_atomically(self.path, json.dumps({"plan": self.plan, "parts": self.parts, "tokens": self.tokens,
                                                 "cuts": self.cuts}))


def describe(error):
    """An OSError, or what torch.save makes of one, in a few words."""
    if getattr(error, "strerror", None):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).splitlines()[0]


def write_atomically(path, text):
    unfinished = Path(f"{path}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def unfinished_file(folder, split):
    return Path(folder, f"{split}.bin.unfinished")


def append_parts(job, paths, progress, bar=None, limit=sys.maxsize):
    """Appends numbered files, in order, to the unfinished file of their job; or, where cuts are known, each document to that
    of its split. It ends after `limit` tokens."""
    for path in paths:
        if progress.tokens.get(job.name, 0) >= limit:
            break
        with np.load(path) as arrays:
            tokens = arrays["tokens"]
            if progress.cuts:
                split_of = np.searchsorted(np.array(progress.cuts, np.uint64), arrays["hashes"])  # each document
                split_of = split_of.repeat(arrays["lengths"].astype(np.int64))  # each token
                for number, name in enumerate(("test", "val", "train")):
                    append(job.folder, name, tokens[split_of == number], progress)
            else:
                append(job.folder, job.name, tokens[:limit - progress.tokens.get(job.name, 0)], progress)
        if bar is not None:
            bar.update(len(tokens))
        progress.parts[job.name] = progress.parts.get(job.name, 0) + 1
        progress.save()
        path.unlink()


def append(folder, split, tokens, progress):
    """Puts tokens at the end of a split's unfinished file. It is the caller who saves the progress."""
    done = progress.tokens.get(split, 0)
    with open(unfinished_file(folder, split), "ab") as file:
        file.truncate(done * tokens.itemsize)  # what a killed run appended after its last save goes
        file.write(tokens)
    progress.tokens[split] = done + len(tokens)


def finish(folder, tokenizer_name, source, plan):
    """Renames the splits' unfinished files and writes meta.json, which makes the data set whole."""
    tokenizer = get_tokenizer(tokenizer_name)
    bytes_of = np.array([0 if token == tokenizer.eot_token else len(tokenizer.decode_single_token_bytes(token))
                         for token in range(tokenizer.n_vocab)])
    dtype, splits = dtype_for(tokenizer), {}
    for split in ("train", "val", "test"):
        path, digest, counts = Path(folder, f"{split}.bin"), hashlib.sha256(), np.zeros(tokenizer.n_vocab, np.int64)
        if unfinished_file(folder, split).exists():  # not so if killed between here and meta.json
            os.replace(unfinished_file(folder, split), path)
        with open(path, "rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
                counts += np.bincount(np.frombuffer(chunk, dtype), minlength=tokenizer.n_vocab)
        splits[split] = {"tokens": int(counts.sum()), "documents": int(counts[tokenizer.eot_token]),
                         "bytes": int(counts @ bytes_of), "sha256": digest.hexdigest()}
    versions = {"python": sys.version.split()[0], "tiktoken": tiktoken.__version__, "numpy": np.__version__}
    meta = {"tokenizer": tokenizer_name, "vocab_size": tokenizer.n_vocab, "dtype": dtype.name, "eot_id": tokenizer.eot_token,
            "splits": splits, "source": source, "plan": plan, "versions": versions}
    write_atomically(Path(folder, "meta.json"), json.dumps(meta, indent=1))
    for leftover in [*Path(folder).glob("*.unfinished"), Path(folder, "progress.json")]:
        leftover.unlink(missing_ok=True)
    shutil.rmtree(Path(folder, "parts"))


########################################
#            Making a data set         #
########################################

def prepare_text(files, folder, tokenizer, text_column, workers, source):
    """A data set of the documents in `files`, split by the hash of their text."""
    stats = [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
    plan = fingerprint(source, stats, tokenizer, text_column)
    with alone(folder):
        if not is_made(folder, plan):
            tokenise_text(files, folder, tokenizer, text_column, workers, source, plan)


def tokenise_text(files, folder, tokenizer, text_column, workers, source, plan):
    sized_pieces = [piece for file in files for piece in pieces_of(file)]
    parts = group_into_parts(sized_pieces)
    n_bytes = sum(size for _, size in sized_pieces)
    # No document of a text file is longer than 1 % of the corpus, or val and test could not be 1 % each.
    longest = min(max(n_bytes // 100, 2**14), 2**20)
    job = Job("text", str(folder), plan, tokenizer, text_column, longest)
    n_tokens = n_bytes // (1 if tokenizer == "bytes" else 2) + 1  # English has 4.5 bytes a token, code 2
    progress = Progress(folder, plan)
    with progress_bar(folder, n_tokens, tokenizer, progress) as bar:
        if not progress.cuts:  # which need every document's hash
            facts = [(np.empty(0, np.uint64), np.empty(0, np.uint64))]
            for path in map_parts(functools.partial(tokenise, job), list(enumerate(parts)), workers):
                with np.load(path) as arrays:
                    facts.append((arrays["hashes"], arrays["sizes"]))
                    bar.update(int(arrays["lengths"].sum()))
            progress.cuts = hash_cuts(*map(np.concatenate, zip(*facts)))
            progress.save()
        append_parts(job, map(job.path, range(progress.parts.get("text", 0), len(parts))), progress)
    finish(folder, tokenizer, source, plan)


def prepare_fineweb(files, folder, tokenizer, workers, source, train_tokens, heldout, test_offset, test_tokens):
    """FineWeb as published: the last `heldout` of the rows are one stream, val its first `test_offset` tokens, test the
    `test_tokens` after them; of the rows before, train is the first `train_tokens`. Train and test have one token more, the
    target of their last window."""
    plan = fingerprint(source, files, tokenizer, train_tokens, heldout, test_offset, test_tokens)
    with alone(folder):
        if not is_made(folder, plan):
            tokenise_fineweb(files, folder, tokenizer, workers, source, plan, train_tokens, heldout, test_offset, test_tokens)


def tokenise_fineweb(files, folder, tokenizer, workers, source, plan, train_tokens, heldout, test_offset, test_tokens):
    train_pieces, heldout_pieces = split_rows([piece for file in files for piece in pieces_of(file)], heldout)
    heldout_end = test_offset + test_tokens + 1
    progress = Progress(folder, plan)

    def tokenise_rows(name, pieces, limit):
        job = Job(name, str(folder), plan, tokenizer)
        todo = list(enumerate(group_into_parts(pieces)))[progress.parts.get(name, 0):]
        paths = map_parts(functools.partial(tokenise, job), todo, workers)
        append_parts(job, paths, progress, bar, limit)
        paths.close()

    with progress_bar(folder, train_tokens + heldout_end, tokenizer, progress) as bar:
        tokenise_rows("heldout", heldout_pieces, heldout_end)
        there = progress.tokens.get("heldout", 0)
        if there < heldout_end:
            raise DataError(f"the last {heldout:.2%} of the rows have {there:,} tokens, and test ends at {heldout_end:,}; "
                            "use a smaller --test_offset and --test_tokens or a larger --heldout")
        tokenise_rows("train", train_pieces, train_tokens + 1)
        if not progress.tokens.get("train"):
            raise DataError(f"with --heldout={heldout} no row is left for training")
    stream = np.memmap(unfinished_file(folder, "heldout"), dtype_for(get_tokenizer(tokenizer)), mode="r")
    stream[:test_offset].tofile(unfinished_file(folder, "val"))
    stream[test_offset:heldout_end].tofile(unfinished_file(folder, "test"))
    finish(folder, tokenizer, source, plan)


def split_rows(sized_pieces, heldout):
    """The pieces of the first 1 - heldout of all rows, and those of the rest; the piece between them is cut in two."""
    n_rows = sum(stop - start for (_, start, stop), _ in sized_pieces)
    left = round(n_rows * (1 - heldout))  # rows still to go to train
    train, rest = [], []
    for (path, start, stop), size in sized_pieces:
        middle = min(start + left, stop)
        left -= middle - start
        share = (middle - start) / max(stop - start, 1)
        if middle > start:
            train.append(((path, start, middle), size * share))
        if stop > middle:
            rest.append(((path, middle, stop), size * (1 - share)))
    return train, rest


def prepare_published_tokens(source, folder, train_tokens, test_offset, test_tokens):
    """FineWeb from the token files of the published runs (gpjt/fineweb-gpt2-tokens on the hub): train.safetensors and
    validation.safetensors, the first 99 % and the last 1 % of the rows as GPT-2 tokens. The splits are prepare_fineweb's."""
    train, heldout = Path(source, "train.safetensors"), Path(source, "validation.safetensors")
    n_train, n_heldout = (open_tokens(file).get_shape()[0] for file in (train, heldout))
    heldout_end, n_vocab = test_offset + test_tokens + 1, get_tokenizer("gpt2").n_vocab
    if n_heldout < heldout_end:
        raise DataError(f"{heldout} has {n_heldout:,} tokens, and test ends at {heldout_end:,}; use a smaller --test_offset "
                        "and --test_tokens")
    ranges = {"val": (heldout, 0, test_offset), "test": (heldout, test_offset, heldout_end),
              "train": (train, 0, min(train_tokens + 1, n_train))}
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in (train, heldout)]
    plan = fingerprint(stats, *[[start, stop] for _, start, stop in ranges.values()])
    with alone(folder):
        if is_made(folder, plan):
            return
        progress = Progress(folder, plan)
        with progress_bar(folder, sum(stop - start for _, start, stop in ranges.values()), "gpt2", progress) as bar:
            for split, (file, start, stop) in ranges.items():
                for place in range(start + progress.tokens.get(split, 0), stop, 2**23):
                    tokens = open_tokens(file)[place:min(place + 2**23, stop)]  # anew: memory does not grow with the file
                    if tokens.max() >= n_vocab:
                        raise DataError(f"{file} has the token {tokens.max()}, beyond GPT-2's vocabulary of {n_vocab}")
                    append(folder, split, tokens, progress)
                    bar.update(len(tokens))
                    progress.save()
        finish(folder, "gpt2", "gpjt/fineweb-gpt2-tokens", plan)


def open_tokens(path):
    """The one tensor of a token file, which reads what is asked of it."""
    from safetensors import SafetensorError, safe_open
    try:
        tokens = safe_open(path, "numpy").get_slice("tokens")
    except FileNotFoundError:
        raise DataError(f"there is no {path}") from None
    except SafetensorError as error:
        raise DataError(f"{path} is damaged or no file of tokens ({error})") from None
    if tokens.get_dtype() != "U16" or len(tokens.get_shape()) != 1:
        raise DataError(f"{path} holds {tokens.get_dtype()} numbers of the shape {tokens.get_shape()}; tokens are a row of U16")
    return tokens


def fingerprint(*what):
    """Of everything that decides the bytes of a data set."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


@contextlib.contextmanager
def alone(folder):
    """Holds the folder against other processes that would make the same data set; the second one waits, and finds it made."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


def is_made(folder, plan):
    """Whether the data set is whole already. Raises DataError where another is in its place."""
    if not Path(folder, "meta.json").exists():
        return False
    meta = read_meta(Path(folder).parent, Path(folder).name)
    if meta["plan"] != plan:
        raise DataError(f"{folder} holds another data set (from {meta['source']}, or other options); "
                        "delete that folder, or choose another --name")
    print(f"{folder} is there already")
    return True


def progress_bar(folder, n_tokens, tokenizer, progress):
    """Says what is to come, and sees that the disk has room for it."""
    done = sum(progress.tokens.values())
    in_parts = sum(part.stat().st_size for part in Path(folder, "parts").iterdir())
    needed = max(int(n_tokens - done) * dtype_for(get_tokenizer(tokenizer)).itemsize - in_parts, 0) * 1.05
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{folder} needs about {needed / 1e6:,.0f} MB more and its disk has {free / 1e6:,.0f} MB free; "
                        "free some, or choose another --data_dir")
    print(f"{folder}: up to {n_tokens / 1e6:,.1f} million tokens, {done / 1e6:,.1f} of them done; "
          f"the rest takes up to {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
    return tqdm(total=int(n_tokens), initial=done, unit="tok", unit_scale=True, desc="tokenising", disable=None)


def prepare_stdlib(data_dir="data", tokenizer="bytes", name="stdlib", workers=1):
    """The embedded default: small, on every machine, no download. (Its text differs from one Python version to another.)"""
    prepare_text(stdlib_files(), Path(data_dir, name), tokenizer, "text", workers,
                 source=f"the standard library of Python {sys.version.split()[0]}")


def report(folder):
    splits = json.loads(Path(folder, "meta.json").read_text())["splits"]
    for split, facts in splits.items():
        print(f"{split:6}{facts['tokens']:15,} tokens  {facts['documents']:12,} documents  {facts['bytes']:15,} bytes of text")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}; --help lists what there is\n")
    parser.add_argument("source", help="stdlib, fineweb, or a file, folder or glob of .txt .md .jsonl .parquet")
    parser.add_argument("--name", help="the data set's folder in data_dir (default: the source's name)")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="default: gpt2, for stdlib bytes")
    parser.add_argument("--text_column", default="text", help="of .jsonl and .parquet files")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; any number gives the same bytes")
    fineweb = parser.add_argument_group("fineweb")
    fineweb.add_argument("--from", dest="from_folder", metavar="FOLDER", help="a local copy instead of the hub's, of the text "
                         "or of gpjt/fineweb-gpt2-tokens (train.safetensors, validation.safetensors)")
    fineweb.add_argument("--train_tokens", type=int, default=33_165 * 96 * 1024, help="default: the baseline's %(default)s")
    fineweb.add_argument("--heldout", type=float, default=HELDOUT, help="share of the rows, at the end, for val and test")
    fineweb.add_argument("--test_offset", type=int, default=50_000_000, help="where test starts in them; val is before")
    fineweb.add_argument("--test_tokens", type=int, default=19_200 * 1024)
    args = parser.parse_args()
    name = args.name or (args.source if args.source in ("stdlib", "fineweb") else Path(args.source).resolve().stem)
    for is_wrong, message in (
            (not name or "*" in name or "?" in name or "[" in name, f"'{args.source}' gives no name; choose one with --name"),
            ("/" in name or name in (".", ".."), f"--name={name} is a path; choose the folder with --data_dir"),
            (args.workers < 1, "--workers must be at least 1"),
            (args.train_tokens < 1 or args.test_tokens < 1, "--train_tokens and --test_tokens must be at least 1"),
            (args.test_offset < 1, "--test_offset must be at least 1, for val is what is before it"),
            (not 0 < args.heldout < 1, "--heldout must be between 0 and 1")):
        if is_wrong:
            parser.error(message)
    return args, name


def prepare(args, name):
    folder = Path(args.data_dir, name)
    tokenizer = args.tokenizer or ("bytes" if args.source == "stdlib" else "gpt2")
    get_tokenizer(tokenizer)  # before anything is read or downloaded
    if args.source == "stdlib":
        prepare_stdlib(args.data_dir, tokenizer, name, args.workers)
    elif args.source == "fineweb" and args.from_folder and Path(args.from_folder, "train.safetensors").exists():
        if tokenizer != "gpt2" or args.heldout != HELDOUT:
            raise DataError(f"{args.from_folder} has GPT-2 tokens, split already: neither --tokenizer nor --heldout changes them")
        prepare_published_tokens(args.from_folder, folder, args.train_tokens, args.test_offset, args.test_tokens)
    elif args.source == "fineweb":
        prepare_fineweb(fineweb_files(args.from_folder), folder, tokenizer, args.workers, "FineWeb sample-10BT",
                        args.train_tokens, args.heldout, args.test_offset, args.test_tokens)
    else:
        prepare_text(own_files(args.source), folder, tokenizer, args.text_column, args.workers, args.source)
    report(folder)


def main():
    try:
        prepare(*parse_arguments())
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        sys.exit(f"prepare.py: {describe(error)}; what is done is kept, the same command goes on from here")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
