"""What a data set is: meta.json read, token files to batches.

torch is imported where it is used: without it, the processes of prepare.py start faster.
"""

import functools
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np

from nanolab.common import UserError
from nanolab.corpus import FINEWEBS
from nanolab.tokenizer import CHARACTERS, UNKNOWN, get_tokenizer, guess_tokenizer

UNFINISHED = "nanolab_unfinished"  # the subfolder of a data set that is being made
NANOGPT = "nanoGPT's prepare.py"  # the source of a data set that nanoGPT made
CHUNK_BYTES = 2**24  # of a token file; meta.json has the SHA-256 of each chunk


def read_meta(data_dir, dataset, vocab_size=0):
    """meta.json of a data set. -> dict. Raises UserError.

    vocab_size: needed for a data set that nanoGPT made if it is only train.bin and val.bin.
    """
    if not dataset:
        raise UserError("these weights belong to no data set of nanolab: choose one with --dataset")
    folder = Path(data_dir, dataset)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        keys = ("tokenizer", "vocab_size", "dtype", "eot_id", "splits", "source", "plan")
        facts = ("tokens", "documents", "bytes", "sha256", "chunks")
        if ([type(meta[key]) for key in keys] != [str, int, str, int, dict, str, str] or any(
                [type(split[key]) for key in facts] != [int, int, int, str, list]
                for split in (meta["splits"]["train"], *meta["splits"].values()))):
            raise ValueError
        np.dtype(meta["dtype"])  # a TypeError if that is no type
        return {key: meta[key] for key in keys}
    except (FileNotFoundError, NotADirectoryError):
        present = {file.name for file in folder.glob("*")}
        if {"train.bin", "val.bin"} <= present and not {"test.bin", UNFINISHED} & present:
            return nanogpt_meta(folder, vocab_size)
        given = Path(dataset)
        if given.parts != (given.name,):
            raise UserError(f"'{dataset}' is a path, not the name of a data set; if one is there, "
                            f"give --dataset={given.name or 'NAME'} --data_dir={given.parent}; if "
                            f"text is there, run python prepare.py {dataset} first") from None
        state = "is unfinished" if folder.is_dir() else "is not there"
        has_own_name = dataset in ("stdlib", "pypi", *FINEWEBS)
        source = dataset if has_own_name else f"PATH_OF_YOUR_TEXT --name={given}"
        raise UserError(f"the data set {folder} {state}; make it: python prepare.py {source} "
                        f"--data_dir={data_dir}, or give the folder it is in with --data_dir"
                        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged or not nanolab's; "
                        f"delete {folder} and make it again with prepare.py") from None


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, words, lists and mappings; for anything else a pickle needs `find_class`."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError


def nanogpt_vocabulary(path):
    """The vocabulary's size and tokenizer, from nanoGPT's meta.pkl. Raises UserError."""
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        size, itos = int(meta["vocab_size"]), meta.get("itos", {})
        if not 0 < size <= 2**16:
            raise ValueError
        tokens = [itos[i] for i in range(len(itos))]
        if len(set(tokens)) == size and all(len(t) == 1 and t.encode() for t in tokens):
            return size, CHARACTERS + json.dumps("".join(tokens), ensure_ascii=False)
        return size, UNKNOWN if tokens else guess_tokenizer(size)
    except Exception:  # a damaged pickle raises anything; odd characters, too
        raise UserError(f"{path} is damaged, or has more than a vocabulary; delete it and give "
                        "--vocab_size") from None


def nanogpt_meta(folder, vocab_size):
    """What meta.json would be for the uint16 files of nanoGPT's prepare.py."""
    tokenizer = guess_tokenizer(vocab_size)
    if (folder / "meta.pkl").exists():
        vocab_size, tokenizer = nanogpt_vocabulary(folder / "meta.pkl")
    if not vocab_size:
        raise UserError(f"{folder} has token files as nanoGPT makes them, without meta.json and "
                        "test split: train.py reads them with --vocab_size=N (50257 for GPT-2's "
                        "tokens)")
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        with open(path, "rb") as file:  # of up to 17 GB: only its ends are hashed
            digest = hashlib.sha256(b"%d" % size + file.read(2**20))
            file.seek(max(size - 2**20, 0))
            digest.update(file.read())
        splits[split] = {"tokens": size // 2, "sha256": digest.hexdigest(), "chunks": []}
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "eot_id": None,
            "splits": splits, "source": NANOGPT, "plan": None}


class TokenDataset:
    """One split of a data set as windows of block_size + 1 tokens. Raises UserError.

    Window i is tokens i * block_size ... (i + 1) * block_size. Neighbours share one token: the last
    target of the one is the first input of the other. Tokens are checked against the SHA-256 sums
    in meta.json, which nanoGPT's files lack: val and test at the start, train a chunk at a time.
    """

    def __init__(self, data_dir, dataset, split, block_size, vocab_size=0):
        meta = read_meta(data_dir, dataset, vocab_size)
        self.path = Path(data_dir, dataset, f"{split}.bin")
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size = meta["vocab_size"]
        self.block_size = block_size
        self.advice = f"delete {self.path.parent} and make it again with prepare.py"
        if meta["source"] == NANOGPT:
            self.advice = "it needs uint16 tokens and the right --vocab_size"
        if split not in meta["splits"] or not self.path.is_file():
            raise UserError(f"there is no {split} split ({self.path}); {self.advice}")
        self.n_tokens = meta["splits"][split]["tokens"]
        size, expected = self.path.stat().st_size, self.n_tokens * self.dtype.itemsize
        if size != expected:
            raise UserError(f"{self.path} has {size:,} bytes instead of {expected:,}; "
                            f"{self.advice}")
        if len(self) < 1:
            raise UserError(f"{self.path} has {self.n_tokens:,} tokens, less than one window of "
                            f"{block_size + 1:,}; use more text or a smaller --block_size")
        self.file = open(self.path, "rb", buffering=0)
        self.chunk_sums = meta["splits"][split]["chunks"]
        self.unchecked = set(range(len(self.chunk_sums)))
        if split != "train":
            self.check_chunks(0, size)

    def check_chunks(self, start, stop):
        """Checks the chunks that hold bytes start ... stop - 1, unless they were checked before."""
        for i in self.unchecked.intersection(range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))):
            chunk = os.pread(self.file.fileno(), CHUNK_BYTES, i * CHUNK_BYTES)
            if hashlib.sha256(chunk).hexdigest() != self.chunk_sums[i]:
                raise UserError(f"{self.path} is damaged: bytes from {i * CHUNK_BYTES:,} on do not "
                                f"have the SHA-256 that meta.json gives; {self.advice}")
            self.unchecked.remove(i)

    def __len__(self):
        return max(self.n_tokens - 1, 0) // self.block_size

    def groups_of_documents(self, eot_id, n_groups=200):
        """All windows in at most n_groups ranges: those that begin in the same whole documents,
        which a bootstrap draws together, as neighbours are often from one source. -> [range]"""
        ends = np.flatnonzero(np.fromfile(self.path, self.dtype) == eot_id)
        firsts = -(-(ends[:-1] + 1) // self.block_size)  # the first window of each later document
        starts = [0]
        for first in firsts:
            if len(self) > first >= starts[-1] + len(self) / n_groups:
                starts.append(int(first))
        return [range(*each) for each in zip(starts, [*starts[1:], len(self)])]

    def batch(self, ids, device="cpu"):
        """The windows `ids`. -> inputs, targets, each (len(ids), block_size) int64"""
        windows = np.empty((len(ids), self.block_size + 1), self.dtype)
        for window, i in zip(windows, ids):
            # Not a memory map: its pages would count as this process's memory, and it is slower.
            start = i * self.block_size * self.dtype.itemsize
            self.check_chunks(start, start + window.nbytes)
            if os.preadv(self.file.fileno(), [window], start) < window.nbytes:
                raise UserError(f"{self.path} has become shorter; {self.advice}")
        windows = windows.astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise UserError(f"{self.path} has the token {windows.max()}, beyond its vocabulary of "
                            f"{self.vocab_size}; {self.advice}")
        import torch
        windows = torch.from_numpy(windows)
        if torch.device(device).type == "cuda":
            windows = windows.pin_memory()  # so that the copy is asynchronous
        windows = windows.to(device, non_blocking=windows.is_pinned())
        return windows[:, :-1], windows[:, 1:]


def window_ids(order, data_seed, n_windows, first, count):
    """The windows at places first ... first + count - 1 of an endless run through a split. -> [int]

    'sequential': in the order of the file; 'shuffled': in a permutation by (data_seed, epoch), a
    pure function, so there is no state to save. After llm-baselines' data/utils.py.
    """
    places = range(first, first + count)
    if order == "sequential":
        return [place % n_windows for place in places]
    if order != "shuffled":
        raise ValueError(f"window_ids has no rule for order={order!r}")
    return [int(permutation(n_windows, data_seed, place // n_windows)[place % n_windows])
            for place in places]


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def print_info(data_dir, dataset):
    """Prints what a data set holds, whether its checksums match, and how it begins."""
    meta = read_meta(data_dir, dataset, vocab_size=2**16)  # as many as nanoGPT's files can have
    print(f"{Path(data_dir, dataset)}: from {meta['source']}; {meta['tokenizer']} tokens of "
          f"{meta['vocab_size']:,} kinds, stored as {meta['dtype']}")
    for split, facts in meta["splits"].items():
        data = TokenDataset(data_dir, dataset, split, 1, meta["vocab_size"])
        data.check_chunks(0, data.path.stat().st_size)
        counts = [f"{facts[key]:15,} {key}" for key in ("tokens", "documents", "bytes")
                  if key in facts]
        print(f"{split:6}{' '.join(counts)}  "
              f"{'checksum matches' if facts['chunks'] else 'has no checksum'}")
    data = TokenDataset(data_dir, dataset, "train", 1, meta["vocab_size"])
    tokens = data.batch(range(min(200, len(data))))[0].flatten().tolist()
    if meta["tokenizer"] == UNKNOWN:
        print(f"train begins with the tokens {tokens[:20]}")
    else:
        tokenizer = get_tokenizer(meta["tokenizer"])
        tokens = [token for token in tokens if token < tokenizer.n_vocab]
        print(f"train begins:\n{tokenizer.decode(tokens)}")
