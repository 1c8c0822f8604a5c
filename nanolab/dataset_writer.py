"""Documents to token files by many processes; meta.json, which describes them.

A data set is a folder with train.bin, val.bin and test.bin (raw little-endian token ids, an
end-of-text token after every document) and meta.json, which is written last: a folder without it
is unfinished. Until then, all work is in its subfolder UNFINISHED.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock
from tqdm import tqdm

from nanolab.common import UserError, parse_json, write_atomically
from nanolab.corpus import (cut_at_line_ends, documents, file_ranges, format_counts,
                            group_into_shards, locate, own_texts, stdlib_files, undressed)
from nanolab.data import CHUNK_BYTES, UNFINISHED, read_meta
from nanolab.tokenizer import encode, get_tokenizer, token_dtype

DOCUMENT = np.dtype([("n_tokens", "u8"), ("n_bytes", "u8"), ("hash", "u8")])


def fingerprint(*parts):
    """A hash of everything that decides the bytes of a data set: its plan."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def dataset_lock(folder):
    """One process at a time makes a data set; the next one waits, and then finds it complete."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock")


def is_complete(folder, plan):
    """Whether the data set is there already; if so, prints that. Raises UserError if another is."""
    if not Path(folder, "meta.json").exists():
        return False
    meta = read_meta(Path(folder).parent, Path(folder).name)
    if meta["plan"] != plan:
        raise UserError(f"{folder} holds another data set (from {meta['source']}, or other "
                        "options); delete that folder, or choose another --name")
    print(f"{folder} is there already")
    return True


HELDOUT = 0.02  # of stdlib and of much text, for val and test: half each
OWN_RULES = 2  # the second set of rules by which your own text is read, cut and split


def prepare_stdlib(data_dir="data", tokenizer="bytes", name="stdlib", workers=1, heldout=HELDOUT):
    """Python's standard library: small, on every machine, different from one version to another."""
    prepare_text(stdlib_files(), Path(data_dir, name), tokenizer, "text", workers,
                 f"the standard library of Python {sys.version.split()[0]}", heldout, is_own=False)


def prepare_text(files, folder, tokenizer, text_column, workers, source, heldout=None, given={},
                 facts={}, is_own=True):
    """The documents of `files`, split by the hash of their text. Raises UserError.

    heldout: the fraction for val and test, half each. given: {split: files} of val, of test or of
    both, if they are not to come from `files`. facts: more for meta.json. is_own: not stdlib, whose
    bytes are published and stay what they were.
    """
    groups = {"text": files, **given}
    stats = {group: [[file, os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
             for group, files in groups.items()}
    ranges = {group: [file_range for file in files for file_range in file_ranges(file)]
              for group, files in groups.items()}
    n_bytes = sum(file_range.n_bytes for file_range in ranges["text"])
    if is_own:
        plan = fingerprint(source, stats, tokenizer, text_column, heldout, OWN_RULES)
        # val and test have at least 256 KiB each, 60 windows of GPT-2's tokens, or 5 % of the text
        heldout = heldout or min(max(HELDOUT, 2**19 / (n_bytes + 1)), 0.1)
        # A text longer than val is cut: into eighths of val, but not into less than a window's
        # 4 KiB or, of little text, than half a percent of it.
        size = int(min(max(heldout / 16 * n_bytes, 2**12), max(n_bytes / 200, 100), 2**20))
        limit = min(max(heldout / 2 * n_bytes, size), 2**20) if len(given) < 2 else 2**20
        split = functools.partial(own_texts, limit=limit, size=size)
    else:
        other = [heldout] if heldout != HELDOUT else []  # so that older data sets keep their plan
        plan = fingerprint(source, stats["text"], tokenizer, text_column, *other)
        max_length = min(max(n_bytes // 100, 2**14), 2**20)
        split = functools.partial(cut_at_line_ends, max_length=max_length)
    options = {"text_column": text_column, "split": split, "is_own": is_own}
    with dataset_lock(folder):
        if is_complete(folder, plan):
            return
        # A GPT-2 token is 4.5 bytes of English or 2 of code; 2 is the safe bound.
        n_tokens = sum(r.n_bytes for group in ranges.values() for r in group)
        n_tokens = n_tokens // (1 if tokenizer == "bytes" else 2) + 1
        writer, documents = DatasetWriter(folder, plan, tokenizer), {}
        with writer.progress_bar(n_tokens) as bar:
            for group in groups:
                parts = [np.empty(0, DOCUMENT)]
                for path in writer.tokenize(group, ranges[group], workers, **options):
                    with np.load(path) as shard:
                        parts.append(shard["documents"])
                    bar.update(int(parts[-1]["n_tokens"].sum()))
                documents[group] = np.concatenate(parts)
        # All are there until the text is in its splits: it comes first.
        known = np.array([hash_ for split in given for hash_ in documents[split]["hash"]], "u8")
        splits = [split for split in ("test", "val") if split not in given]  # to take from files
        if writer.hash_limits is None:  # they depend on the hash of every document
            counts = leave_out(documents, known)
            writer.facts = {**facts, "documents_left_out": counts}
            writer.hash_limits = choose_hash_limits(documents["text"], heldout, splits)
            writer.save()
        for group in groups:
            limits, names, left_out = [], [group], []
            if group == "text":
                limits, names, left_out = writer.hash_limits, [*splits, "train"], known
            for path in writer.tokenize(group, ranges[group], 1, **options):  # they exist by now
                with np.load(path) as shard:
                    tokens, documents = shard["tokens"], shard["documents"]
                ids = np.searchsorted(np.array(limits, np.uint64), documents["hash"])
                ids[np.isin(documents["hash"], left_out)] = -1
                ids = ids.repeat(documents["n_tokens"].astype(int))
                for i, split in enumerate(names):
                    writer.append(split, tokens[ids == i])
                writer.finish_shard(group, path)
        writer.finish(source, writer.facts)


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
                            f"left out: {format_counts(+counts) or 'none'}")
    if +counts:
        print(f"documents left out: {format_counts(+counts)}")
    return counts


def choose_hash_limits(documents, heldout, splits=("test", "val")):
    """The largest hash in each of the splits, with documents in the order of their hash.

    Each split has the next half of the fraction `heldout` of the bytes, at least one document;
    equal texts stay together. So it depends on the texts alone, not on the files or their order.
    documents: an array of DOCUMENT. Raises UserError.
    """
    documents = documents[np.argsort(documents["hash"])]
    hashes, ends = documents["hash"], np.cumsum(documents["n_bytes"], dtype=float)
    limits, n_done = [], 0
    for n_reserved, split in zip(range(len(splits), 0, -1), splits):  # documents to leave
        start = ends[n_done - 1] if n_done else 0
        last = int(np.searchsorted(ends, start + heldout / 2 * ends[-1]))
        last = max(min(last, len(hashes) - 1 - n_reserved), n_done)
        n_done = int(np.searchsorted(hashes, hashes[last], side="right"))
        if n_done == len(hashes):
            raise UserError(f"{len(np.unique(hashes)):,} different documents are too few to split "
                            "into train, val and test; use more or smaller ones")
        limits.append(int(hashes[last]))
        if (fraction := (ends[n_done - 1] - start) / ends[-1]) > 0.75 * heldout:
            print(f"note: {split} is {fraction:.1%} of the text instead of {heldout / 2:.1%}: it "
                  "has long or equal documents; use more text, or another --heldout")
    return limits


class DatasetWriter:
    """Writes a data set shard by shard. After a kill, the same plan continues from the last save.

    n_tokens: how many tokens each split has. n_shards: how many shards of each group of file ranges
    are in the splits; a group is what one call of `tokenize` is for.
    """

    def __init__(self, folder, plan, tokenizer):
        self.folder, self.plan, self.tokenizer = Path(folder), plan, tokenizer
        self.unfinished = self.folder / UNFINISHED
        self.progress_file = self.unfinished / "progress.json"
        progress = self.read_progress()
        if progress.get("plan") != plan or "facts" not in progress:  # once, shards were others
            progress = {}
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(parents=True, exist_ok=True)
        self.n_shards = Counter(progress.get("n_shards"))
        self.n_tokens = Counter(progress.get("n_tokens"))
        self.hash_limits = progress.get("hash_limits")  # of a split by hash, once they are known
        self.facts = progress.get("facts", {})  # for meta.json, known at that time
        self.save()

    def read_progress(self):
        try:
            return dict(parse_json(self.progress_file.read_text()))
        except (OSError, ValueError, TypeError):  # none, or damaged: start again
            return {}

    def save(self):
        """Saves the progress. What was appended since the last save is overwritten after a kill."""
        progress = {"plan": self.plan, "n_shards": self.n_shards, "n_tokens": self.n_tokens,
                    "hash_limits": self.hash_limits, "facts": self.facts}
        write_atomically(self.progress_file, json.dumps(progress))

    def progress_bar(self, n_tokens):
        """Prints what is to be done, if the disk has room for n_tokens. Raises UserError."""
        done = self.n_tokens.total()
        on_disk = sum(file.stat().st_size for file in self.unfinished.glob("*.npz"))
        itemsize = token_dtype(get_tokenizer(self.tokenizer)).itemsize
        needed = max((n_tokens - done) * itemsize - on_disk, 0) * 1.05
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(f"{self.folder} needs about {needed / 1e6:,.0f} MB more, and its disk "
                            f"has {free / 1e6:,.0f} MB free; free some, or choose another "
                            "--data_dir")
        print(f"{self.folder}: up to {n_tokens / 1e6:,.1f} million tokens, of which "
              f"{done / 1e6:,.1f} million are done; the rest takes up to {needed / 1e6:,.0f} MB, "
              f"{free / 1e6:,.0f} MB are free")
        return tqdm(total=n_tokens, initial=done, unit="tok", unit_scale=True, desc="tokenising",
                    disable=None)

    def tokenize(self, group, ranges, workers, **options):
        """Tokenises the shards that are not in the splits yet. Yields the file of each, in order.

        options: of tokenize_shard. Raises UserError.
        """
        # The plan is in the names: a process of a killed run may still write a shard of another.
        prefix = self.unfinished / f"{self.plan[:8]}-{group}"
        shards = group_into_shards(ranges)
        paths = [Path(f"{prefix}-{i:06d}.npz") for i in range(len(shards))]
        function = functools.partial(tokenize_shard, self.tokenizer, **options)
        first = self.n_shards[group]
        yield from map_in_processes(function, paths[first:], shards[first:], workers)

    def append(self, split, tokens):
        """Appends tokens to a split. The caller saves."""
        with open(self.unfinished / f"{split}.tokens", "ab") as file:
            file.truncate(self.n_tokens[split] * tokens.itemsize)  # drops what was never saved
            file.write(tokens)
        self.n_tokens[split] += len(tokens)

    def finish_shard(self, group, path):
        """Saves that this shard is in the splits, and removes its file."""
        self.n_shards[group] += 1
        self.save()
        path.unlink()

    def finish(self, source, facts=None):
        """Moves the splits to their places and writes meta.json, which completes the data set."""
        tokenizer, splits = get_tokenizer(self.tokenizer), {}
        for split in ("train", "val", "test"):
            unfinished, path = self.unfinished / f"{split}.tokens", self.folder / f"{split}.bin"
            if unfinished.exists():  # if not, it was moved before a kill
                os.replace(unfinished, path)
            splits[split] = count_tokens(path, tokenizer)
        versions = {"python": sys.version.split()[0], "tiktoken": tiktoken.__version__,
                    "numpy": np.__version__}
        meta = {"tokenizer": self.tokenizer, "vocab_size": tokenizer.n_vocab,
                "dtype": token_dtype(tokenizer).name, "eot_id": tokenizer.eot_token,
                "splits": splits, "source": source, "plan": self.plan, "versions": versions,
                **(facts or {})}
        write_atomically(self.folder / "meta.json", json.dumps(meta, indent=1))
        shutil.rmtree(self.unfinished)


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
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=exit_with_parent) as pool:
        try:
            yield from pool.map(function, paths, shards)
        except BrokenProcessPool:
            raise UserError("a tokenising process was killed, perhaps because memory ran out; the "
                            "same command continues from here; try fewer --workers") from None


def exit_with_parent():
    """Ignores Ctrl-C, which the parent handles, and exits when the parent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def tokenize_shard(tokenizer_name, path, shard, text_column="text", split=None, is_own=False):
    """Tokenises a list of FileRange into an .npz file, unless it is there already. -> its path

    It has the tokens (n,) and of each document its DOCUMENT (m,), which is 0 for a null or an empty
    text. split: a function of a text that returns its documents; None: it is one. is_own: see
    corpus.documents. Raises UserError.
    """
    if path.exists():
        return path
    tokenizer, tokens, facts = get_tokenizer(tokenizer_name), [np.empty(0, np.uint32)], []
    for file_range in shard:
        for place, text in documents(file_range, text_column, is_own):
            if text is None or not (text.strip() if is_own else text):
                facts.append((0, 0, 0))
                continue
            for document in split(text) if split else [text]:
                try:
                    tokens.append(encode(tokenizer, document))
                except UserError as error:
                    if place is None:
                        place = text.count("\n", 0, text.find(document))
                    raise UserError(f"{locate(file_range, place)}: {error}") from None
                plain = (undressed(document) if is_own else document).encode()
                digest = hashlib.blake2b(plain, digest_size=8).digest()
                facts.append((len(tokens[-1]), len(document.encode()),
                              int.from_bytes(digest, "big")))
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(temporary, "wb") as file:
        np.savez(file, tokens=np.concatenate(tokens).astype(token_dtype(tokenizer)),
                 documents=np.array(facts, DOCUMENT))
    os.replace(temporary, path)
    return path
