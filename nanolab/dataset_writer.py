"""Documents to token files by many processes; meta.json, which describes them.

A data set is a folder with train.bin, val.bin and test.bin (raw little-endian token ids, an
end-of-text token after every document) and meta.json, which is written last. Until then, all work
is in its subfolder UNFINISHED: shards, which are not tokenised again after a kill, and splits,
which are written again from the shards.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock
from tqdm import tqdm

from nanolab.common import UserError, describe, write_atomically
from nanolab.corpus import (cut_at_line_ends, file_ranges, format_counts, group_into_shards, locate,
                            own_texts, records, stdlib_files, undressed)
from nanolab.data import CHUNK_BYTES, UNFINISHED, read_meta
from nanolab.tokenizer import encode, get_tokenizer, token_dtype

DOCUMENT = np.dtype([("n_tokens", "u8"), ("n_bytes", "u8"), ("hash", "u8")])


def fingerprint(*parts):
    """A hash of everything that decides the bytes of a data set: its plan."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


HELDOUT = 0.02  # of stdlib and of much text, for val and test: half each
OWN_RULES = 3  # the third set of rules by which your own text is read, cut and split


def prepare_stdlib(data_dir="data", tokenizer="bytes", name="stdlib", workers=1):
    """Python's standard library: small, on every machine, different from one version to another."""
    prepare_text(stdlib_files(), Path(data_dir, name), tokenizer, "text", workers,
                 f"the standard library of Python {sys.version.split()[0]}", is_own=False)


def prepare_text(files, folder, tokenizer, text_column, workers, source, heldout=None, given={},
                 facts={}, is_own=True):
    """The documents of `files`, split by the hash of their text. Raises UserError.

    heldout: the fraction for val and test, half each. given: {split: files} of val and test that
    do not come from `files`. facts: more for meta.json. is_own: not stdlib, whose bytes stay.
    """
    groups = {"text": files, **given}
    get_stats = lambda: {group: [[file, os.path.getsize(file), os.stat(file).st_mtime_ns]
                                 for file in files] for group, files in groups.items()}
    stats = get_stats()
    ranges = {group: [file_range for file in files for file_range in file_ranges(file)]
              for group, files in groups.items()}
    n_bytes = sum(file_range.n_bytes for file_range in ranges["text"])
    if is_own:
        plan = fingerprint(source, stats, tokenizer, text_column, heldout, OWN_RULES)
        fraction = heldout or choose_heldout(n_bytes)
        # A text longer than val is cut: into eighths of val, but not into less than a window's
        # 4 KiB or, of little text, than half a percent of it.
        size = int(min(max(fraction / 16 * n_bytes, 2**12), max(n_bytes / 200, 100), 2**20))
        limit = min(max(fraction / 2 * n_bytes, size), 2**20) if len(given) < 2 else 2**20
        split = functools.partial(own_texts, limit=limit, size=size)
    else:
        plan, heldout = fingerprint(source, stats["text"], tokenizer, text_column), HELDOUT
        max_length = min(max(n_bytes // 100, 2**14), 2**20)
        split = functools.partial(cut_at_line_ends, max_length=max_length)
    options = {"text_column": text_column, "split": split, "is_own": is_own}
    with new_dataset(folder, plan, tokenizer, source) as writer:
        if not writer:
            return
        documents = {}
        for group in groups:
            shards = writer.tokenize(group, ranges[group], workers, **options)
            documents[group] = np.concatenate([np.empty(0, DOCUMENT),
                                               *(shard["documents"] for shard in shards)])
        known = np.array([hash_ for split in given for hash_ in documents[split]["hash"]], "u8")
        writer.facts = {**facts, "documents_left_out": leave_out(documents, known)}
        if len(given) == 2 and (
                n_both := np.isin(documents["val"]["hash"], documents["test"]["hash"]).sum()):
            print(f"note: {n_both:,} documents of val are in test too, so test is not unseen")
        splits = [split for split in ("test", "val") if split not in given]  # to take from files
        hash_limits = choose_hash_limits(documents["text"], heldout, len(splits))
        for split in given:
            for shard in writer.tokenize(split, ranges[split], 1, **options):
                writer.append(split, shard["tokens"])
        for shard in writer.tokenize("text", ranges["text"], 1, **options):
            tokens, documents = shard["tokens"], shard["documents"]
            ids = np.searchsorted(np.array(hash_limits, np.uint64), documents["hash"])
            ids[np.isin(documents["hash"], known)] = -1
            ids = ids.repeat(documents["n_tokens"].astype(int))
            for i, split in enumerate([*splits, "train"]):
                writer.append(split, tokens[ids == i])
        if get_stats() != stats:
            raise UserError(f"files of {source} changed while they were read; run the same command "
                            "again when they are complete")


def leave_out(documents, known):
    """Drops the documents without text, and of "text" those whose hash is known. -> a Counter"""
    counts = Counter()
    for group, all_ in documents.items():
        has_text = all_["n_tokens"] > 0
        is_known = has_text & np.isin(all_["hash"], known) & (group == "text")
        documents[group] = all_[has_text & ~is_known]
        counts.update({"null or empty": int((~has_text).sum()),
                       "in val or test": int(is_known.sum())})
        if not len(documents[group]):
            raise UserError(f"there is no text for {group.replace('text', 'train')}; documents "
                            f"left out: {format_counts(counts)}; --text_column says "
                            "which column of .jsonl and .parquet files is text")
    if +counts:
        print(f"documents left out: {format_counts(counts)}")
    return counts


def choose_heldout(n_bytes):
    """For val and test: at least 256 KiB each, 60 windows of GPT-2's tokens; or 5 % each."""
    return min(max(HELDOUT, 2**19 / (n_bytes + 1)), 0.1)


def choose_hash_limits(documents, heldout, n_limits):
    """The largest hash in each of the first n_limits splits, with documents ordered by their hash.

    Each split has the next half of the fraction `heldout` of the text, at least one document;
    equal texts stay together. documents: an array of DOCUMENT. Raises UserError.
    """
    documents = documents[np.argsort(documents["hash"])]
    hashes, ends = documents["hash"], np.cumsum(documents["n_bytes"], dtype=float)
    heldout = heldout or choose_heldout(ends[-1])
    limits, n_done = [], 0
    for n_reserved in range(n_limits, 0, -1):  # documents to leave for the splits after this
        start = ends[n_done - 1] if n_done else 0
        last = int(np.searchsorted(ends, start + heldout / 2 * ends[-1]))
        last = max(min(last, len(hashes) - 1 - n_reserved), n_done)
        n_done = int(np.searchsorted(hashes, hashes[last], side="right"))
        if n_done == len(hashes):
            raise UserError(f"{len(np.unique(hashes)):,} different documents are too few to split "
                            "into train, val and test; use more or smaller ones")
        limits.append(int(hashes[last]))
        if (fraction := (ends[n_done - 1] - start) / ends[-1]) > 0.75 * heldout:
            print(f"note: a held-out split is {fraction:.1%} of the text instead of "
                  f"{heldout / 2:.1%}: it has long or equal documents")
    return limits


@contextlib.contextmanager
def new_dataset(folder, plan, tokenizer, source):
    """Yields the DatasetWriter of a data set, and completes the data set at the end of the block.

    Yields None if it is there already. A second process waits, and then finds it complete. Raises
    UserError if the folder has another data set.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_made = (folder / "meta.json").exists  # then no lock: the folder may be read-only
    with contextlib.ExitStack() as stack:
        if not is_made():
            try:
                stack.enter_context(FileLock(f"{folder}.lock", fallback_to_soft=False))
            except (OSError, NotImplementedError) as error:  # some network disks have no locks
                print(f"note: {folder.parent} cannot be locked ({describe(error)})")
        if is_made():
            if read_meta(folder.parent, folder.name)["plan"] != plan:
                raise UserError(f"{folder} holds another data set, or one with other options; "
                                "delete that folder, or choose another --name")
            print(f"{folder} is there already")
            yield None
        elif any(folder.glob("*.bin")) and not (folder / UNFINISHED).exists():
            raise UserError(f"{folder} has token files that are not nanolab's; choose another "
                            "--name, or move them")
        else:
            writer = DatasetWriter(folder, plan, tokenizer)
            yield writer
            writer.finish(source)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


class DatasetWriter:
    """Writes shards and splits in the subfolder UNFINISHED. facts: more for meta.json."""

    def __init__(self, folder, plan, tokenizer):
        self.folder, self.plan, self.tokenizer = folder, plan, tokenizer
        self.unfinished = folder / UNFINISHED
        self.unfinished.mkdir(parents=True, exist_ok=True)
        self.split_paths = {split: self.unfinished / f"{split}.tokens"
                            for split in ("train", "val", "test")}
        for path in self.split_paths.values():
            path.write_bytes(b"")
        self.facts = {}

    def tokenize(self, group, ranges, workers, n_tokens=None, **options):
        """Yields the arrays of tokenize_shard, of each shard of the file ranges, in order.

        group: a name for these ranges. n_tokens: how many are needed, if not all.
        """
        shards = group_into_shards(ranges)
        # A killed run may have left the shards of another plan, or of files that have changed.
        prefix = self.unfinished / f"{fingerprint(self.plan, ranges)[:8]}-{group}"
        paths = [Path(f"{prefix}-{i:06d}.npz") for i in range(len(shards))]
        function = functools.partial(tokenize_shard, self.tokenizer, **options)
        token_bytes = 1 if self.tokenizer == "bytes" else 4  # of English, about
        n_tokens = n_tokens or sum(r.n_bytes for r in ranges) / token_bytes
        with tqdm(total=n_tokens, unit="tok", unit_scale=True, desc=group, disable=None) as bar:
            for path in map_in_processes(function, paths, shards, workers):
                with np.load(path) as shard:
                    yield shard
                    bar.update(int(shard["documents"]["n_tokens"].sum()))

    def append(self, split, tokens):
        with open(self.split_paths[split], "ab") as file:
            file.write(tokens)

    def finish(self, source):
        """Moves the splits to their places and writes meta.json, which completes the data set."""
        tokenizer, splits = get_tokenizer(self.tokenizer), {}
        for split, unfinished in self.split_paths.items():
            path = self.folder / f"{split}.bin"
            os.replace(unfinished, path)
            splits[split] = count_tokens(path, tokenizer)
        meta = {"tokenizer": self.tokenizer, "vocab_size": tokenizer.n_vocab,
                "dtype": token_dtype(tokenizer).name, "eot_id": tokenizer.eot_token,
                "splits": splits, "source": source, "plan": self.plan,
                "versions": {"python": sys.version.split()[0], "tiktoken": tiktoken.__version__,
                             "numpy": np.__version__}, **self.facts}
        write_atomically(self.folder / "meta.json", json.dumps(meta, indent=1))


def count_tokens(path, tokenizer):
    """What meta.json has about a split: its tokens, documents, bytes of text, and SHA-256 sums."""
    token_bytes = [len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)]
    token_bytes[tokenizer.eot_token] = 0
    digest, counts, chunks = hashlib.sha256(), np.zeros(tokenizer.n_vocab, np.int64), []
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            chunks.append(hashlib.sha256(chunk).hexdigest())
            counts += np.bincount(np.frombuffer(chunk, token_dtype(tokenizer)),
                                  minlength=tokenizer.n_vocab)
    return {"tokens": int(counts.sum()), "documents": int(counts[tokenizer.eot_token]),
            "bytes": int(counts @ token_bytes), "sha256": digest.hexdigest(), "chunks": chunks}


def map_in_processes(function, paths, shards, workers):
    """Yields function(path, shard) for each shard, in order, from as many processes."""
    workers = min(workers, len(shards))
    if workers <= 1:
        yield from map(function, paths, shards)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=exit_with_parent) as pool:
        try:
            yield from pool.map(function, paths, shards)
        except BrokenProcessPool:
            raise UserError("a tokenising process was killed, perhaps because memory ran out; the "
                            "same command continues from here; try fewer --workers") from None


def exit_with_parent():
    """Ignores Ctrl-C, which the parent handles, and exits when the parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tokenize_shard(tokenizer_name, path, shard, text_column="text",
                   split=lambda text: [text] if text else [], is_own=False):
    """Tokenises a list of FileRange into an .npz file, unless it is there undamaged. -> its path

    It has the tokens (n,) and of each document its DOCUMENT (m,), which is 0 for an empty text.
    split: a function of a text that returns its documents. is_own: see corpus.records.
    """
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:  # what damage raises
        if not file.testzip():
            return path
    tokenizer, tokens, facts = get_tokenizer(tokenizer_name), [np.empty(0, np.uint32)], []
    for file_range in shard:
        for place, value in records(file_range, text_column, is_own):
            try:
                documents = [*split(value)]
                for document in documents:
                    tokens.append(encode(tokenizer, document))
                    plain = (undressed(document) if is_own else document).encode()
                    digest = hashlib.blake2b(plain, digest_size=8).digest()
                    facts.append((len(tokens[-1]), len(document.encode()),
                                  int.from_bytes(digest, "big")))
                if not documents:
                    facts.append((0, 0, 0))
            # a number, half a surrogate pair, or so many spaces that tiktoken's stack overflows
            except (AttributeError, TypeError, ValueError) as error:
                reason = error if isinstance(value, str) else f"type {type(value).__name__}"
                raise UserError(f"{locate(file_range, place)} has no text that can be encoded: "
                                f"{str(value)[:60]!r} ({reason})") from None
    write_atomically(path, lambda file: np.savez(
        file, tokens=np.concatenate(tokens).astype(token_dtype(tokenizer)),
        documents=np.array(facts, DOCUMENT)))
    return path
