"""Flags, bits and cuts drawn at random from a seed: right, or one UserError, and never another
error."""

import random
import shutil

import pytest

import config
from conftest import evaluate
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError
from nanolab.data import TokenDataset

VALUES = ["0", "1", "-1", "3", "0.5", "1e-3", "1e999", "nan", "inf", "-inf", "9" * 30, "9" * 5000,
          "", "True", "None", "x", "é", "\udcff", "../..", "[1]", "(" * 300, "{}", "'a'", "auto",
          "\n", "1e30", "0x10", "1_000"]
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(2, 200))]


def one_line(function, *args):
    """What the function returns, or None after a UserError. Any other error fails the test."""
    try:
        return function(*args)
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize("seed", SEEDS)
def test_flags(seed):
    draw = random.Random(seed)
    outcomes = []
    for _ in range(120):
        keys = draw.sample(sorted(config.OPTIONS.keys() - {"resume"}), draw.randint(1, 3))
        loaded = one_line(config.load, [f"--{key}={draw.choice(VALUES)}" for key in keys])
        outcomes.append(loaded is not None)
        if loaded:
            for key in config.OPTIONS.keys() - {"vocab_size"}:
                value = getattr(loaded, key)
                assert value is None or config.parse(key, value, "itself") == value
    assert True in outcomes and False in outcomes


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_files(seed, small_run, tiny_data, tmp_path):
    """A flipped bit or a cut in a checkpoint, a token file or meta.json: refused, or what is read
    is as it was."""
    draw = random.Random(seed)
    folder = small_run("run", *tiny_data, "--max_steps=1")
    shutil.copytree(f"{tiny_data[1].split('=')[1]}/tiny", tmp_path / "data" / "tiny")

    def read_tokens(split):
        data = TokenDataset(tmp_path / "data", "tiny", split, 16)
        return [data.batch([i])[0].tolist() for i in range(len(data))]

    files = [(folder / "last.pt", lambda: str(read_checkpoint(folder / "last.pt")))]
    for split in ("train", "val", "test"):
        files.append((tmp_path / f"data/tiny/{split}.bin", lambda split=split: read_tokens(split)))
        files.append((tmp_path / "data/tiny/meta.json", lambda split=split: read_tokens(split)))
    for path, read in files:
        content, good = path.read_bytes(), read()
        for _ in range(12):
            damaged = bytearray(content)
            place = draw.randrange(len(content))
            if draw.random() < 0.5:
                damaged[place] ^= 1 << draw.randrange(8)
            else:
                del damaged[place:]
            path.write_bytes(damaged)
            found = one_line(read)
            assert found is None or found == good, (path, place)
        path.write_bytes(content)


def test_the_low_bit_of_every_test_token(small_run, tiny_data, tmp_path, monkeypatch, capsys):
    """eval.py refuses it."""
    folder = small_run("run", *tiny_data, "--max_steps=1")
    shutil.copytree(f"{tiny_data[1].split('=')[1]}/tiny", tmp_path / "data" / "tiny")
    path = tmp_path / "data/tiny/test.bin"
    path.write_bytes(bytes(byte ^ (i % 2 == 0) for i, byte in enumerate(path.read_bytes())))
    with pytest.raises(UserError, match="test.bin is damaged"):
        evaluate(monkeypatch, capsys, "--ckpt", folder / "best.pt",
                 f"--data_dir={tmp_path / 'data'}", "--device=cpu")
    assert not list(folder.glob("*.test.json"))
