"""Data sets: what prepare.py makes of text, and the batches that training reads from it."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import threading
import time
import types
import zipfile
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from pyarrow import table
from pyarrow.parquet import write_table
from safetensors.torch import save_file

import prepare
from conftest import (SMALL, SPLITS, call, losses, no_file_larger_than, read_split, run_main,
                      run_quickly, write_texts)
from nanolab import common, corpus, data, dataset_writer, tokenizer
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.corpus import own_files, undressed
from nanolab.data import UNFINISHED, TokenDataset, read_meta, window_ids
from nanolab.dataset_writer import DatasetWriter, prepare_text
from nanolab.tokenizer import encode, get_tokenizer


def read_bytes(folder):
    return {split: (folder / f"{split}.bin").read_bytes() for split in SPLITS}


def assert_continues_after_a_kill(monkeypatch, tmp_path, make, *functions):
    """make(folder) makes the same bytes after an interruption at any call of these functions."""
    make(tmp_path / "whole")
    for function in functions:
        owner = DatasetWriter if hasattr(DatasetWriter, function) else dataset_writer
        real = getattr(owner, function)
        for calls in (0, 1, 5):
            def interrupted(*args, left=iter(range(calls))):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return real(*args)
            folder = tmp_path / f"{function}{calls}"
            with monkeypatch.context() as patch:
                patch.setattr(owner, function, interrupted)
                try:
                    make(folder)
                    break
                except KeyboardInterrupt:
                    pass
            assert not (folder / "meta.json").exists()
            make(folder)
            assert read_bytes(folder) == read_bytes(tmp_path / "whole")
            assert {file.name for file in folder.iterdir()} == {
                "meta.json", "test.bin", "train.bin", "val.bin"}
        assert calls > 0, "it was killed"


def prepare_mine(source, folder, **options):
    prepare_text(own_files(source), folder, "bytes", "text", 1, "mine", **options)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of small texts, which make about 20 shards."""
    write_texts(tmp_path / "texts", "abcd")
    monkeypatch.setattr(corpus, "SHARD_BYTES", 300)
    return tmp_path / "texts"


def test_own_text_round_trip(tmp_path, monkeypatch):
    """All documents come back, none twice, split by their text and not by the order of files."""
    rows = write_texts(tmp_path / "one", "abcd")
    write_texts(tmp_path / "two", "dcba")
    for name in ("one", "two"):
        run_main(monkeypatch, "prepare", tmp_path / name, f"--data_dir={tmp_path}/data")
    one, two = ({split: read_split(tmp_path / "data", name, split) for split in SPLITS}
                for name in ("one", "two"))
    assert sorted(one["train"] + one["val"] + one["test"]) == sorted(rows)
    assert all(one[split] and sorted(one[split]) == sorted(two[split]) for split in SPLITS)
    by_hash = sorted(rows, key=lambda row: hashlib.blake2b(undressed(row).encode(),
                                                           digest_size=8).digest())
    n_test, n_heldout = len(one["test"]), len(one["test"] + one["val"])
    assert set(one["test"]) == set(by_hash[:n_test])
    assert set(one["val"]) == set(by_hash[n_test:n_heldout])
    meta = read_meta(tmp_path / "data", "one")
    n_bytes = sum(facts["bytes"] for facts in meta["splits"].values())
    assert n_bytes == sum(len(row.encode()) for row in rows)


def test_the_bytes_of_stdlib_stay(tmp_path):
    """Of a long file too, which is cut at line ends."""
    text = "".join(f"\ufeffLine {i} ends as Windows does.\r\n" for i in range(3000))
    (tmp_path / "a.py").write_bytes(text.encode())
    prepare_text([str(tmp_path / "a.py")], tmp_path / "made", "bytes", "text", 1, "", is_own=False)
    pieces = sum((read_split(tmp_path, "made", split) for split in SPLITS), [])
    assert len(pieces) > 3 and all(piece in text and piece.endswith("\n") for piece in pieces)
    assert sum(map(len, pieces)) == len(text)


def test_tokenising_processes_do_not_load_torch():
    """They import prepare.py and what it imports: with torch, each would start seconds later."""
    command = "import sys, prepare; print({'torch', 'pyarrow', 'datasets'} & set(sys.modules))"
    assert call("-c", command).stdout == "set()\n"


def test_two_at_once_make_one_data_set(tmp_path, texts, capsys):
    """The second waits for the first, and finds it made."""
    first, made = tmp_path / "first", tmp_path / "made"
    prepare_mine(texts, first)
    second = threading.Thread(target=prepare_mine, args=(texts, made))
    with FileLock(f"{made}.lock"):
        second.start()
        second.join(0.5)
        first.rename(made)
    second.join(60)
    assert "made is there already" in capsys.readouterr().out
    (tmp_path / "made.lock").unlink()
    (made / UNFINISHED).mkdir()  # as after a kill at the very end
    prepare_mine(texts, made)
    assert not (tmp_path / "made.lock").exists(), "not needed, as on a disk that is read-only"
    assert not (made / UNFINISHED).exists()


def test_a_disk_without_locks(tmp_path, texts, monkeypatch, capsys):
    no_lock = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=no_lock))
    prepare_mine(texts, tmp_path / "made")
    assert "cannot be locked (No locks available" in capsys.readouterr().out
    assert (tmp_path / "made/meta.json").exists()


def test_other_token_files_are_not_overwritten(tmp_path, texts):
    """Such as nanoGPT's."""
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"0123")
    with pytest.raises(UserError, match="has token files that are not nanolab's"):
        prepare_mine(texts, tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"0123"


def test_own_text_after_a_kill_or_on_a_full_disk(tmp_path, texts, monkeypatch):
    """With a ready-made split, whose texts are left out of train. What is tokenised is kept."""
    make = partial(prepare_mine, texts, given={"val": [str(texts / "c.jsonl")]})
    assert_continues_after_a_kill(monkeypatch, tmp_path, make, "encode", "choose_hash_limits",
                                  "count_tokens", "append", "finish")
    size = (tmp_path / "whole" / "train.bin").stat().st_size
    with no_file_larger_than(size // 2), pytest.raises(OSError):
        make(tmp_path / "full")
    assert not (tmp_path / "full" / "meta.json").exists()
    monkeypatch.setattr(dataset_writer, "encode", None)
    make(tmp_path / "full")
    assert read_bytes(tmp_path / "full") == read_bytes(tmp_path / "whole")


def test_damaged_shards_are_made_again(tmp_path, texts, monkeypatch):
    prepare_mine(texts, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset_writer, "choose_hash_limits", Mock(side_effect=KeyboardInterrupt))
        prepare_mine(texts, tmp_path / "made")
    shards = sorted((tmp_path / "made" / UNFINISHED).glob("*.npz"))
    for i, shard in enumerate(shards):
        flip(shard, i * shard.stat().st_size // len(shards))
    os.truncate(shards[0], 0)
    os.truncate(shards[1], 100)
    prepare_mine(texts, tmp_path / "made")
    assert read_bytes(tmp_path / "made") == read_bytes(tmp_path / "whole")


@pytest.fixture(scope="session")
def fineweb_copy(tmp_path_factory):
    """A repository in FineWeb's layout, 400 rows in 2 files, and FineWeb-Edu. -> folder, rows"""
    folder = tmp_path_factory.mktemp("hub") / "HuggingFaceFW" / "fineweb"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
                                      "  - split: train\n    path: sample/10BT/*.parquet\n---\n")
    rows = [f"Row {i} says that {i} times {i} is {i * i}." for i in range(400)]
    for i in range(2):
        columns = {"text": rows[200 * i:200 * (i + 1)], "id": list(range(200))}
        write_table(table(columns), folder / "sample/10BT" / f"{i:03d}_00000.parquet",
                    row_group_size=64)
    (folder.parent / "fineweb-edu").symlink_to(folder)
    return folder.parent.parent, rows


def assert_splits(folder, train_tokens, heldout):
    """The windows that prepare.py fineweb cuts with these options."""
    expected = {"train": train_tokens[:2049], "val": heldout[:100], "test": heldout[100:421]}
    for split, tokens in expected.items():
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == tokens.tolist()


@pytest.mark.parametrize("name, title", [("fineweb", "FineWeb"), ("fineweb-edu", "FineWeb-Edu")])
def test_fineweb_split(tmp_path, fineweb_copy, monkeypatch, name, title):
    """Train is the first rows; val and test are cut from the last 10 % as one stream."""
    folder, rows = fineweb_copy
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which prepare.py sets: undone after the test
    run_main(monkeypatch, "prepare", name, f"--from={folder}", f"--data_dir={tmp_path}",
             "--heldout=0.1", "--test_offset=100", "--test_tokens=320", "--train_tokens=2048")
    assert_splits(tmp_path / name, *(np.concatenate([encode(get_tokenizer("gpt2"), row)
                                                     for row in part])
                                     for part in (rows[:360], rows[360:])))
    assert len(TokenDataset(tmp_path, name, "test", 32)) == 10
    assert read_meta(tmp_path, name)["source"] == f"{title} sample-10BT"


def test_fineweb_after_a_kill(tmp_path, fineweb_copy, monkeypatch):
    """And the same bytes by any number of processes."""
    folder, _ = fineweb_copy
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1000)
    files = sorted(map(str, folder.rglob("*.parquet")))
    workers = iter([2])

    def make(folder):
        prepare.prepare_fineweb(files, folder, "bytes", next(workers, 1), "copy", 8000, 0.3, 2500,
                                1000)

    assert_continues_after_a_kill(monkeypatch, tmp_path, make, "append", "finish")
    files = [str(tmp_path / "a.parquet")]
    for rows in ["One row. " * 9] * 400, ["Another row. " * 9] * 400:
        write_table(table({"text": rows}), files[0])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DatasetWriter, "finish", Mock(side_effect=KeyboardInterrupt))
            make(tmp_path / "changed")
    make(tmp_path / "changed")
    assert ord("O") not in np.fromfile(tmp_path / "changed/train.bin", "<u2")


def test_fineweb_on_the_hub(tmp_path, fineweb_copy, monkeypatch):
    """Footers are read from afar; whole files through the hub's cache, no more than needed."""
    (folder, rows), downloaded = fineweb_copy, []

    def download(repo_id, path_in_repo, repo_type, revision):
        downloaded.append((repo_type, revision, path_in_repo))
        return folder / repo_id / path_in_repo

    hub = types.SimpleNamespace(
        open=lambda path: open(folder / path[len("hf://datasets/"):].replace("@abc", ""), "rb"),
        resolve_path=lambda path: types.SimpleNamespace(
            repo_id=path[len("hf://datasets/"):].split("@")[0], repo_type="dataset", revision="abc",
            path_in_repo=path.split("@abc/")[1]))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(corpus, "SHARD_BYTES", 1000)
    names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(2)]
    files = [f"hf://datasets/HuggingFaceFW/fineweb@abc/{name}" for name in names]
    prepare.prepare_fineweb(files, tmp_path / "fineweb", "gpt2", 1, "hub", 512, 0.1, 100, 320)
    expected = np.concatenate([encode(get_tokenizer("gpt2"), row) for row in rows[:100]])[:513]
    assert np.fromfile(tmp_path / "fineweb" / "train.bin", "<u2").tolist() == expected.tolist()
    assert set(downloaded) == {("dataset", "abc", name) for name in names}
    assert downloaded.count(("dataset", "abc", names[0])) == 1, "one shard of train is enough"


def test_published_token_files(tmp_path, monkeypatch):
    """gpjt/fineweb-gpt2-tokens: the windows that `prepare.py fineweb` cuts, after a kill too."""
    train_tokens, heldout = (np.random.default_rng(1).integers(50257, size=size).astype("<u2")
                             for size in (3000, 600))
    train_tokens[7] = 50256  # an end of text is a token, too
    for name, tokens in ("train", train_tokens), ("validation", heldout):
        save_file({"tokens": torch.from_numpy(tokens)}, tmp_path / f"{name}.safetensors")
    assert_continues_after_a_kill(
        monkeypatch, tmp_path,
        lambda folder: prepare.prepare_published_tokens(tmp_path, folder, 2048, 100, 320),
        "append")
    assert_splits(tmp_path / "whole", train_tokens, heldout)
    meta = read_meta(tmp_path, "whole")
    assert meta["tokenizer"] == "gpt2"
    assert meta["splits"]["train"]["documents"] == (train_tokens[:2049] == 50256).sum()


def test_files_of_nanogpt(tmp_path):
    """train.bin and val.bin without meta.json are read when --vocab_size says what they hold."""
    tokens = np.random.default_rng(1).integers(65, size=1_200_000).astype("<u2")
    assert tokens.nbytes > 2 * 2**20, "more than what is hashed"
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
    flags = [*SMALL, f"--dataset={tmp_path}", f"--out_dir={tmp_path}/run", "--vocab_size=65"]
    run_quickly([*flags, "--max_steps=2"])
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(65), abs=0.7)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["tokenizer"] == "unknown"
    inputs, _ = TokenDataset("", tmp_path, "train", 32, 65).batch([3])
    assert inputs[0].tolist() == tokens[96:128].tolist()
    with pytest.raises(UserError, match="has the token 64, beyond its vocabulary of 64"):
        TokenDataset("", tmp_path, "train", 32, 64).batch(range(50))
    assert read_meta("", tmp_path, 50304)["tokenizer"] == "gpt2"
    tokens[-1] = 64 - tokens[-1]
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="another data set"):
        run_quickly([*flags, "--max_steps=3", "--resume"])
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="train.bin has 0 tokens, less than one window"):
        TokenDataset("", tmp_path, "train", 32, 64)


def test_info(tmp_path, texts, output_of):
    """Counts, checksums and the beginning; damage to any split is an error that names it."""
    folder, info = tmp_path / "mine", ["info", "mine", f"--data_dir={tmp_path}"]
    prepare_mine(texts, folder)
    out = output_of("prepare", *info)
    for split, facts in read_meta(tmp_path, "mine")["splits"].items():
        assert re.search(rf"{split} .* {facts['tokens']:,} tokens .* {facts['documents']:,} "
                         "documents .*checksum matches", out)
    assert read_split(tmp_path, "mine", "train")[0][:100] in out
    for path, advice in (("x/mine", ".* --dataset=mine --data_dir=x; .*prepare.py x/mine first"),
                         (str(texts / "a.txt"), "")):  # of text
        with pytest.raises(UserError, match=f"is a path{advice}"):
            read_meta(tmp_path, path)
    meta = (folder / "meta.json").read_text()
    splits = json.loads(meta)["splits"]
    splits["train"]["bytes"] = "12 kB"
    for key, value in (("dtype", "x"), ("vocab_size", "257"), ("plan", None), ("splits", [1]),
                       ("splits", splits)):
        (folder / "meta.json").write_text(json.dumps({**json.loads(meta), key: value}))
        with pytest.raises(UserError, match="meta.json is damaged or not nanolab's"):
            output_of("prepare", *info)
    (folder / "meta.json").write_text(meta)
    flip(folder / "train.bin", 20)
    with pytest.raises(UserError, match="train.bin is damaged: bytes from 0 on"):
        output_of("prepare", *info)
    for file in ("meta.json", "test.bin"):
        (folder / file).unlink()
    out = output_of("prepare", *info)
    assert "from nanoGPT's prepare.py; unknown tokens of 65,536 kinds" in out
    assert "train begins with the tokens [" in out, "nothing is shown as GPT-2's words"
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50304}))
    np.array([6109, 50303, 6100, 345], "<u2").tofile(folder / "train.bin")
    assert "train begins:\nEvery moves" in output_of("prepare", *info), "50303 has no text"


def test_gpt2_tokens_and_batches(gpt2_data):
    """Window i is tokens i x T ... (i + 1) x T of the file, targets one further."""
    tokens = encode(get_tokenizer("gpt2"), "Every effort moves you")
    assert tokens.tolist() == [6109, 3626, 6100, 345, 50256]
    folder = gpt2_data[1].removeprefix("--data_dir=")
    dataset = TokenDataset(folder, "words", "train", 16)
    tokens = np.fromfile(dataset.path, "<u2").astype(np.int64)
    inputs, targets = dataset.batch([0, 3, len(dataset) - 1])
    assert inputs[1].tolist() == tokens[48:64].tolist()
    assert targets[1].tolist() == tokens[49:65].tolist()
    assert len(dataset) == (len(tokens) - 1) // 16 and targets.shape == (3, 16)
    starts = np.flatnonzero(tokens == 50256) + 1  # of documents
    groups = dataset.groups_of_documents(50256)
    assert len(groups) > 50 and [i for group in groups for i in group] == [*range(len(dataset))]
    assert all(min(16 * group[0] - starts[starts <= 16 * group[0]]) < 16 for group in groups[1:])


def test_shuffled_order():
    """Every window once an epoch, in another order each epoch; a pure function of the position."""
    run = window_ids("shuffled", 1, 10, 0, 30)
    epochs = [run[:10], run[10:20], run[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert window_ids("shuffled", 1, 10, 7, 6) == run[7:13] != window_ids("shuffled", 2, 10, 7, 6)
    assert window_ids("shuffled", 2, 10, 0, 10) not in epochs, "no epoch of seed 1"
    assert epochs[0] == [8, 4, 7, 0, 1, 2, 5, 9, 6, 3], "as in the runs on record"
    assert window_ids("sequential", 1, 10, 8, 4) == [8, 9, 0, 1]


def test_no_vocabulary_no_network(tmp_path, monkeypatch):
    """Where nothing answers, an error within 2 seconds that says what to do."""
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.perf_counter()
    assert not common.reachable("192.0.2.1")  # an address that belongs to nobody (RFC 5737)
    assert time.perf_counter() - start < 1.8
    monkeypatch.setattr(tokenizer, "reachable", lambda host: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer.__wrapped__("gpt2")


def test_wheels(tmp_path, monkeypatch):
    """Whole packages are held out, files in order; one that is there twice counts once, in test."""
    folder, wheels, requirements = (tmp_path / name for name in ("pypi", "pypi.wheels", "pypi.txt"))
    wheels.mkdir()
    for split in ("test", "val", "train"):
        files = {"z.py": f"print('{split} z')\n", "a.py": "shared = 'é'\n", "empty.py": "\n",
                 "b.py": f"b = '{split}'\n", "copy_of_b.py": f"b = '{split}'\n",
                 "latin.py": "é".encode("latin-1"), "data.json": "{}"}
        with zipfile.ZipFile(wheels / f"pack_{split}-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in files.items():
                wheel.writestr(f"pack/{name}", content)
        with open(requirements, "a") as file:
            file.write(f"# {split}\npack-{split}==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda _: types.SimpleNamespace(returncode=1))
    wheels.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="pip could not download the wheels; connect to PyPI"):
        prepare.prepare_pypi(folder, "bytes", requirements)
    (tmp_path / "elsewhere").rename(wheels)
    prepare.prepare_pypi(folder, "bytes", requirements)
    for split in SPLITS:
        shared = ["shared = 'é'\n"] if split == "test" else []
        assert read_split(tmp_path, "pypi", split) == [*shared, f"b = '{split}'\n",
                                                       f"print('{split} z')\n"]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_token_is_noticed(tmp_path, texts, monkeypatch):
    """In train when its chunk is read, in val and test at the start; so is a shorter file."""
    for module in (data, dataset_writer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    folder, open_split = tmp_path / "mine", partial(TokenDataset, tmp_path, "mine", block_size=16)
    prepare_mine(texts, folder)
    intact = open_split("train")
    intact.batch(range(len(intact)))
    assert not intact.unchecked
    flip(folder / "train.bin", 1000)  # in the fourth chunk
    dataset = open_split("train")
    dataset.batch(range(900 // 32 - 1))  # windows of 32 bytes and a token
    with pytest.raises(UserError, match="train.bin is damaged: bytes from 900 on .* make it"):
        dataset.batch([900 // 32])  # its last tokens are the chunk's first
    flip(folder / "train.bin", 1000)
    for split in ("val", "test"):
        flip(folder / f"{split}.bin", 10)
        with pytest.raises(UserError, match=f"{split}.bin is damaged: bytes from 0 on"):
            open_split(split)
        flip(folder / f"{split}.bin", 10)
    os.truncate(folder / "train.bin", 1000)
    with pytest.raises(UserError, match="has become shorter"):
        intact.batch([len(intact) - 1])
    with pytest.raises(UserError, match="train.bin has 1,000 bytes instead of"):
        open_split("train")
