"""Turns text into a data set.

    python prepare.py stdlib                 Python's own library as bytes; needs no network
    python prepare.py pypi                   the source of packages (studies/ladder/pypi.txt)
    python prepare.py fineweb                FineWeb sample-10BT as GPT-2 tokens, as published
    python prepare.py fineweb --from=FOLDER  the same from a copy, or from the published token files
    python prepare.py fineweb-edu            FineWeb-Edu sample-10BT in the same way
    python prepare.py PATH [--name=NAME]     your own .txt .md .jsonl .parquet: file, folder or glob
    python prepare.py PATH --val=PATH --test=PATH   the same, in its ready-made splits
    python prepare.py info NAME              what a data set has: counts, checksums, its beginning

A data set is a folder data/NAME with train.bin, val.bin, test.bin and meta.json. After a kill, run
the same command again: it continues where it was.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanolab.common import UserError, argument_parser, run_script
from nanolab.corpus import (FINEWEBS, file_ranges, fineweb_files, format_counts, own_files,
                            pypi_wheels, wheel_documents)
from nanolab.data import print_info
from nanolab.dataset_writer import HELDOUT, fingerprint, new_dataset, prepare_stdlib, prepare_text
from nanolab.tokenizer import encode, get_tokenizer, token_dtype

PYPI = Path(__file__).parent / "studies" / "ladder" / "pypi.txt"
FINEWEB_HELDOUT = 0.01


def main():
    args = parse_arguments()
    if args.source == "info":
        print_info(args.data_dir, args.dataset)
        return
    folder = Path(args.data_dir, args.name)
    sizes = {key: getattr(args, key) for key in ("train_tokens", "test_offset", "test_tokens")}
    get_tokenizer(args.tokenizer)  # fails before anything is read or downloaded
    if args.source == "stdlib":
        prepare_stdlib(args.data_dir, args.tokenizer, args.name, args.workers)
    elif args.source == "pypi":
        prepare_pypi(folder, args.tokenizer)
    elif args.source not in FINEWEBS:
        prepare_own(args, folder)
    elif args.is_published:
        prepare_published_tokens(args.from_folder, folder, **sizes)
    else:
        files = fineweb_files(args.from_folder, f"HuggingFaceFW/{args.source}")
        prepare_fineweb(files, folder, args.tokenizer, args.workers,
                        f"{FINEWEBS[args.source]} sample-10BT",
                        heldout=args.heldout or FINEWEB_HELDOUT, **sizes)
    print_info(args.data_dir, args.name)


def parse_arguments():
    parser = argument_parser(__doc__)
    parser.add_argument("source",
                        help="stdlib, pypi, fineweb, fineweb-edu, or a file, folder or glob of "
                             ".txt .md .jsonl .parquet; or info")
    parser.add_argument("dataset", nargs="?", metavar="NAME", help="of the data set, after info")
    parser.add_argument("--name", help="the data set's folder in data_dir; default: as the source")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"),
                        help="default: bytes for stdlib and pypi, else gpt2")
    parser.add_argument("--text_column", default="text",
                        help="of your .jsonl and .parquet files (default: text)")
    parser.add_argument("--val", metavar="PATH",
                        help="your own text for val, left out of train (default: a part of it)")
    parser.add_argument("--test", metavar="PATH", help="the same for test")
    parser.add_argument("--heldout", type=float,
                        help=f"fraction for val and test (default: {HELDOUT}, of text below 26 MB "
                             f"up to 0.1; of FineWeb {FINEWEB_HELDOUT})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes; any number gives the same bytes")
    fineweb = parser.add_argument_group("fineweb and fineweb-edu")
    fineweb.add_argument("--from", dest="from_folder", metavar="FOLDER",
                         help="a local copy instead of the hub's: of the text, or of gpjt/fineweb-"
                              "gpt2-tokens (train.safetensors and validation.safetensors)")
    fineweb.add_argument("--train_tokens", type=int, default=33_165 * 96 * 1024,
                         help="default: the baseline's %(default)s")
    fineweb.add_argument("--test_offset", type=int, default=50_000_000,
                         help="where test starts in the held-out tokens; val is all before "
                              "(default: %(default)s)")
    fineweb.add_argument("--test_tokens", type=int, default=19_200 * 1024,
                         help="default: %(default)s")
    args = parser.parse_args()
    if "" in (args.source, args.val, args.test, args.from_folder):
        parser.error("a path is empty, as from a variable of the shell that is not set")
    args.is_published = (args.source == "fineweb" and args.from_folder
                         and Path(args.from_folder, "train.safetensors").exists())
    has_own_name = args.source in ("info", "stdlib", "pypi", *FINEWEBS)
    without_effect = ["text_column", "val", "test"] * has_own_name
    if args.source not in FINEWEBS:
        without_effect += ["from_folder", "train_tokens", "test_offset", "test_tokens"]
    if args.source in ("stdlib", "pypi") or args.val and args.test:
        without_effect.append("heldout")
    without_effect += ["heldout", "tokenizer"] * bool(args.is_published)
    for key in without_effect:
        if getattr(args, key) != parser.get_default(key):
            parser.error(f"--{key.removesuffix('_folder')} has no effect on this data set")
    source = Path(os.path.realpath(args.source))  # which takes a loop of links, too
    args.name = args.name or (args.source if has_own_name else
                              source.name if source.is_dir() else source.stem)
    args.tokenizer = args.tokenizer or ("bytes" if args.source in ("stdlib", "pypi") else "gpt2")
    if bool(args.dataset) != (args.source == "info"):
        parser.error("give one source, or info and the NAME of a data set")
    if set(args.name) & set("/*?[") or args.name in ("", ".", ".."):
        parser.error(f"'{args.name}' is no name for a folder in --data_dir; choose one with --name")
    folder = Path(os.path.realpath(Path(args.data_dir, args.name)))
    if not has_own_name and folder in (source, *source.parents):
        parser.error(f"the data set would lie in {folder}, with its text; choose another --name")
    if min(args.workers, args.train_tokens, args.test_offset, args.test_tokens) < 1:
        parser.error("--workers, --train_tokens, --test_offset and --test_tokens are at least 1")
    if args.heldout is not None and not 0 < args.heldout < 1:
        parser.error("--heldout must be between 0 and 1")
    return args


def prepare_own(args, folder):
    left_out = {}
    given = {split: own_files(path, left_out)
             for split, path in (("val", args.val), ("test", args.test)) if path}
    taken = {os.path.realpath(file) for files in given.values() for file in files}
    files = [file for file in own_files(args.source, left_out)
             if os.path.realpath(file) not in taken]
    n_files = len(files) + sum(map(len, given.values()))
    left_out = Counter(why for file, why in left_out.items() if file not in taken)
    print(f"files read: {n_files:,}; left out: {format_counts(left_out)}")
    is_split = r"(?i)(^|[\W_])(val|valid|validation|dev|test)([\W\d_]|$)"
    named = [file for file in files if re.search(is_split, os.path.relpath(file, args.source))]
    if named and len(files) > 1 and not given:
        print(f"note: {named[0]} has the name of a split, but goes into all; --val and --test take "
              "ready-made ones")
    prepare_text(files, folder, args.tokenizer, args.text_column, args.workers, args.source,
                 args.heldout, given, {"files": n_files, "files_left_out": left_out})


def prepare_pypi(folder, tokenizer_name, requirements=PYPI):
    """The Python files of pinned wheels from PyPI: the same bytes on every machine. Whole packages
    are held out. A file that is there twice counts once, in test before val before train."""
    plan = fingerprint(Path(requirements).read_text(), tokenizer_name)
    with new_dataset(folder, plan, tokenizer_name, f"the wheels of {requirements}") as writer:
        if not writer:
            return
        wheels = pypi_wheels(requirements, folder.with_suffix(".wheels"))
        tokenizer = get_tokenizer(tokenizer_name)
        seen = set()
        for split in ("test", "val", "train"):
            for wheel in wheels[split]:
                texts = [text for text in wheel_documents(wheel) if text not in seen]
                seen.update(texts)
                tokens = [encode(tokenizer, text) for text in dict.fromkeys(texts)]
                writer.append(split, np.concatenate(tokens).astype(token_dtype(tokenizer)))


def prepare_fineweb(files, folder, tokenizer, workers, source, train_tokens, heldout, test_offset,
                    test_tokens):
    """FineWeb as published. The last `heldout` of the rows are one stream of tokens: val is the
    first `test_offset`, test the `test_tokens` after them. Train is the first `train_tokens` of the
    rows before. Train and test have one token more, the target of their last window."""
    plan = fingerprint(source, files, tokenizer, train_tokens, heldout, test_offset, test_tokens)
    with new_dataset(folder, plan, tokenizer, source) as writer:
        if not writer:
            return
        ranges = [file_range for file in files for file_range in file_ranges(file)]
        train_ranges, heldout_ranges = split_rows(ranges, heldout)
        test_end = test_offset + test_tokens + 1
        sizes = {"val": test_offset, "test": test_tokens + 1}
        n_heldout = fill_splits(writer, "heldout", heldout_ranges, sizes, workers)
        if n_heldout < test_end:
            raise UserError(f"the last {heldout:.2%} of the rows have {n_heldout:,} tokens, and "
                            f"test ends at {test_end:,}; use a smaller --test_offset and "
                            "--test_tokens or a larger --heldout")
        if not fill_splits(writer, "train", train_ranges, {"train": train_tokens + 1}, workers):
            raise UserError(f"with --heldout={heldout} no row is left for training")


def split_rows(ranges, heldout):
    """The ranges of the first 1 - heldout of all rows, and those of the rest."""
    n_train = round(sum(r.stop - r.start for r in ranges) * (1 - heldout))
    train, rest = [], []
    for r in ranges:
        cut = min(r.start + n_train, r.stop)
        n_train -= cut - r.start
        if cut > r.start:
            train.append(r._replace(stop=cut))
        if cut < r.stop:
            rest.append(r._replace(start=cut))
    return train, rest


def fill_splits(writer, group, ranges, sizes, workers):
    """Tokenises file ranges as one stream that fills one split after the other. sizes: {split:
    tokens}. -> how many tokens the splits have; fewer if the stream is too short."""
    missing, n_tokens = dict(sizes), sum(sizes.values())
    for shard in writer.tokenize(group, ranges, workers, n_tokens):
        tokens = shard["tokens"]
        for split in sizes:
            head = tokens[:missing[split]]
            writer.append(split, head)
            missing[split] -= len(head)
            tokens = tokens[len(head):]
        if not any(missing.values()):
            break
    return n_tokens - sum(missing.values())


def prepare_published_tokens(source, folder, train_tokens, test_offset, test_tokens):
    """The same from the token files of the published runs, gpjt/fineweb-gpt2-tokens on the hub:
    the first 99 % and the last 1 % of the rows as GPT-2 tokens."""
    train, heldout = Path(source, "train.safetensors"), Path(source, "validation.safetensors")
    n_train, n_heldout = (open_tokens(file).get_shape()[0] for file in (train, heldout))
    test_end = test_offset + test_tokens + 1
    if n_heldout < test_end:
        raise UserError(f"{heldout} has {n_heldout:,} tokens, and test ends at {test_end:,}; "
                        "use a smaller --test_offset and --test_tokens")
    ranges = {"val": (heldout, 0, test_offset), "test": (heldout, test_offset, test_end),
              "train": (train, 0, min(train_tokens + 1, n_train))}
    stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in (train, heldout)]
    plan = fingerprint(stats, *[[start, stop] for _, start, stop in ranges.values()])
    with new_dataset(folder, plan, "gpt2", "gpjt/fineweb-gpt2-tokens") as writer:
        if not writer:
            return
        for split, (file, start, stop) in ranges.items():
            for i in tqdm(range(start, stop, 2**23), desc=split, disable=None):
                # Opened again for each chunk: memory does not grow with the file.
                tokens = open_tokens(file)[i:min(i + 2**23, stop)]
                if tokens.max() > 50256:
                    raise UserError(f"{file} has the token {tokens.max()}; GPT-2's end at 50256")
                writer.append(split, tokens)


def open_tokens(path):
    """The one tensor of a token file, read lazily. Raises UserError."""
    from safetensors import SafetensorError, safe_open
    try:
        tokens = safe_open(path, "numpy").get_slice("tokens")
        if tokens.get_dtype() == "U16" and len(tokens.get_shape()) == 1:
            return tokens
    except SafetensorError:
        pass
    raise UserError(f"{path} is damaged, or no row of U16 tokens")


if __name__ == "__main__":
    run_script(main, if_interrupted="stopped; the same command continues from here",
               if_failed="; what is done is kept, the same command continues from here")
