"""Bad input of every kind, one case a branch: one line, a non-zero exit code, nothing lost."""

import importlib
import json
import pathlib
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from conftest import HERE, SMALL, Code, call, run_quickly, write_texts
from nanolab.common import run_script
from nanolab.corpus import own_files
from nanolab.dataset_writer import prepare_text


@pytest.fixture(scope="session")
def good(tmp_path_factory, vocabulary):
    """Everything intact: data set `data/tiny`, run `out`, texts. Tests damage copies of it."""
    folder = tmp_path_factory.mktemp("good")
    write_texts(folder / "texts", "abcd")
    prepare_text(own_files(folder / "texts"), folder / "data" / "tiny", "bytes", "text", 1, "tiny")
    run_quickly([*SMALL, "--dataset=tiny", f"--data_dir={folder}/data", f"--out_dir={folder}/out"])
    return folder


# Changes that a test makes to a path.

GONE = pathlib.Path.unlink


def write(content):
    def change(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def resize(n_bytes):
    return lambda path: path.write_bytes(path.read_bytes()[:n_bytes])


def save(value):
    return lambda path: torch.save(value, path)


def write_tokens(n_validation, dtype=torch.uint16):
    def change(folder):
        folder.mkdir()
        for name, size in ("train", 9), ("validation", n_validation):
            save_file({"tokens": torch.ones(size, dtype=dtype)}, folder / f"{name}.safetensors")
    return change


def change_meta(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_checkpoint(**changes):
    """Of values, or by functions of the values before."""
    def change(path):
        old = torch.load(path, weights_only=True)
        new = {key: to(old[key]) if callable(to) else to for key, to in changes.items()}
        torch.save(old | new, path)
    return change


TOO_LARGE = change_checkpoint(model=lambda weights: {key: 1e30 * p for key, p in weights.items()})
OWN_DATA = ["--dataset=tiny", "--data_dir=data"]
TRAIN = ["train", *SMALL, *OWN_DATA, "--out_dir=new"]
RESUME = ["train", *SMALL, *OWN_DATA, "--out_dir=out", "--resume", "--max_steps=12"]
TUNE = ["train", "--init_from=out/best.pt", *OWN_DATA, "--out_dir=new"]
EVAL = ["eval", "--ckpt", "out/best.pt", "--device=cpu", "--data_dir=data"]
SAMPLE = ["sample", "--ckpt", "out/best.pt", "--device=cpu", "--max_new_tokens=5"]
EXPORT = ["nanolab.huggingface", "export"]
PREPARE = ["prepare", "mine", "--data_dir=data", "--tokenizer=bytes"]
FINEWEB = ["prepare", "fineweb", "--data_dir=data"]
TOKENS = [*FINEWEB, "--from=tokens", "--test_offset=100", "--test_tokens=320",
          "--train_tokens=2048"]

META, TRAIN_BIN, TEST_BIN = (f"data/tiny/{name}" for name in ("meta.json", "train.bin", "test.bin"))
NANOGPTS = {META: GONE, TEST_BIN: GONE}  # train.bin and val.bin only
LAST, BEST = "out/last.pt", "out/best.pt"


@pytest.mark.parametrize("damage, command, reported", [
    # the command line and config files
    ({}, [*TRAIN, "--dropuot=0"], "(from --dropuot); did you mean 'dropout'"),
    ({"mine.py": write("dropuot = 0")}, [*TRAIN, "mine.py"], "(from mine.py); did you mean"),
    ({}, [*TRAIN, "--n_layer=two"], "n_layer='two' (from --n_layer): wants int, not str"),
    ({}, [*TRAIN, "--init=gtp2"], "allowed: 'pytorch', 'gpt2'; did you mean 'gpt2'"),
    ({}, [*TRAIN, "--n_layer=0"], "not allowed; allowed: [1, 10000]"),
    ({}, [*TRAIN, "--learning_rate=nan"], "learning_rate='nan'"),
    ({}, [*TRAIN, "--max_steps=1e30"], "not allowed; allowed: [0, inf)"),
    ({}, [*TRAIN, "--out_dir="], "out_dir='' (from --out_dir): must not be empty"),
    ({}, [*TRAIN, "--learning_rate"], "--learning_rate wants a value"),
    ({}, [*TRAIN, "out"], "'out' is neither a config file"),
    ({"config/cloud.py": write("")}, [*TRAIN, "config/clod.py"], "did you mean 'config/cloud.py'"),
    ({"mine.py": write("dropout = (")}, [*TRAIN, "mine.py"], "mine.py, line 1: '(' was never"),
    ({"mine.py": write("zzz = 2")}, [*TRAIN, "mine.py"], "a helper may be called _zzz"),
    ({"mine.py": write("x_ = 1\nx_ / 0")}, [*TRAIN, "mine.py"], "mine.py, line 2: ZeroDivision"),
    # options that do not go together
    ({}, [*TRAIN, "--n_head=3"], "n_head=3 (from --n_head); n_head could be 2 or 4"),
    ({}, [*TRAIN, "--schedule=wsd", "--warmup_fraction=0.9"], "exceed the whole run"),
    ({}, [*TRAIN, "--position=rope", "--n_embd=30"], "give each head 15"),
    ({}, [*TRAIN, "--qk_bound=9"], "no effect without --qk_norm"),
    ({}, ["train", f"{HERE}/config/quickstart.py", "--max_tokens=9"],
     "max_tokens=9 (from --max_tokens) has no effect with max_steps=1080"),
    ({}, [*TRAIN, "--cooldown_fraction=0.3"], "has no effect with schedule='constant'"),
    ({}, [*TRAIN, "--adamw_weight_decay=0.1", "--weight_decay=0.2"],
     "weight_decay=0.2 (from --weight_decay) has no effect with adamw_weight_decay=0.1"),
    ({}, [*TRAIN, "--data_seed=2"], "has no effect with order='sequential'"),
    ({}, [*TRAIN, "--tie_weights", "--head_lr=2"], "head_lr=2.0 (from --head_lr) has no effect"),
    ({}, [*TRAIN, "--extend"], "it goes with --resume"),
    ({}, [*TRAIN, "--vocab_size=100"], "less than the 257"),
    ({}, [*TRAIN, "--device=cuda"], "not available"),
    ({}, [*TRAIN, "--fp16_sums"], "needs --amp=float16, not amp='auto'"),
    ({}, [*TRAIN, "--fp16_sums", "--amp=float16"], "fp16_sums is for CUDA; this run is on cpu"),
    ({}, [*TRAIN, "--compile=graphs", "--dropout=0.1"], "it wants --dropout=0, not dropout=0.1"),
    ({}, [*TRAIN, "--compile=graphs", "--dropout=0", "--batch_size=auto"], "would try sizes"),
    ({}, [*TRAIN, "--wandb=project"], "pip install wandb"),
    # weights to start from
    ({}, [*TUNE, "--n_layer=3"], "was asked for, but init_from='out/best.pt' has n_layer=2"),
    ({}, [*TUNE, "--init=gpt2"], "init='gpt2' (from --init) applies to random weights only"),
    ({BEST: change_checkpoint(tokenizer="gpt2")}, TUNE, "reads gpt2 tokens, but the data set tiny"),
    # runs and their checkpoints
    ({}, [*TRAIN, "--out_dir=out"], "holds a run already"),
    ({LAST: GONE, BEST: GONE}, RESUME, "has the record of a finished run, without its checkpoints"),
    ({"file": write("")}, [*TRAIN, "--out_dir=file/out"], "Not a directory"),
    ({LAST: resize(5000), BEST: GONE}, RESUME, "last.pt is damaged"),
    ({LAST: save({"format": 1, "model": Code(), "config": {}})}, RESUME, "holds a io.open"),
    ({BEST: write(pickle.dumps({"model": Code()}, protocol=4))}, EVAL, "best.pt is damaged"),
    ({LAST: save([1, 2])}, RESUME, "last.pt is no checkpoint of nanolab"),
    ({BEST: change_checkpoint(model=5)}, SAMPLE, "best.pt is no checkpoint of nanolab"),
    ({LAST: change_checkpoint(format=99)}, RESUME, "last.pt is no checkpoint of nanolab"),
    ({LAST: change_checkpoint(data_sha256="0")}, RESUME, "another data set"),
    ({LAST: change_checkpoint(optimizer=5)}, RESUME, "last.pt does not fit this run"),
    ({BEST: change_checkpoint(config=lambda config: config | {"norm": "batchnorm"})}, SAMPLE,
     "norm='batchnorm' (from out/best.pt)"),
    ({BEST: TOO_LARGE}, SAMPLE, "its weights are too large"),
    # data sets
    ({}, [*TRAIN, "--dataset=other"], "make it: python prepare.py PATH_OF_YOUR_TEXT --name=other"),
    ({}, ["train", f"{HERE}/config/local_3090.py", "--data_dir=data"], "python prepare.py fineweb"),
    ({META: GONE}, TRAIN, "is unfinished"),
    ({META: write("[")}, TRAIN, "meta.json is damaged"),
    ({META: change_meta(splits={"train": {"tokens": "9"}})}, TRAIN, "meta.json is damaged"),
    ({META: change_meta(vocab_size=50)}, TRAIN, "beyond its vocabulary of 50"),
    ({TRAIN_BIN: resize(1001)}, TRAIN, "train.bin has 1,001 bytes"),
    ({"data/tiny/val.bin": GONE}, TRAIN, "no val split"),
    ({}, [*TRAIN, "--block_size=100000"], "less than one window of 100,001"),
    (NANOGPTS, TRAIN, "train.py reads them with --vocab_size=N"),
    (NANOGPTS, EVAL, "has no test split; --split=val measures"),
    (NANOGPTS, [*TRAIN, "--vocab_size=50"], "beyond its vocabulary of 50; it needs uint16"),
    (NANOGPTS, [*TRAIN, "--vocab_size=257", "--sample_every=1"], "or train without --sample_every"),
    ({**NANOGPTS, TRAIN_BIN: resize(1001)}, [*TRAIN, "--vocab_size=257"], "instead of 1,000"),
    # eval
    ({}, ["eval", "--ckpt", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ({}, ["eval", "--ckpt", "gpt2-smal"], "OpenAI's weights are gpt2, gpt2-medium"),
    ({}, ["eval", "--ckpt", "out/*/best.pt"], "no checkpoint matches 'out/*/best.pt'"),
    ({}, ["eval", "--ckpt", "data"], "data is a folder, neither a run with best.pt or last"),
    ({BEST: change_checkpoint(tokenizer="gpt2")}, EVAL, "was trained on gpt2 tokens"),
    ({TEST_BIN: GONE}, EVAL, "no test split"),
    ({BEST: TOO_LARGE}, EVAL, "the test loss of out/best.pt is not finite"),
    ({}, [*EVAL, "--batch_size=0"], "--batch_size must be"),
    # sample
    ({}, [*SAMPLE, "--prompt_file=nowhere"], "nowhere"),
    ({"p.txt": write(b"a\xff")}, [*SAMPLE, "--prompt_file=p.txt"],
     "p.txt is not UTF-8 text (byte 1)"),
    ({BEST: change_checkpoint(tokenizer="unknown")}, SAMPLE, "with --tokenizer=bytes or gpt2"),
    ({BEST: change_checkpoint(tokenizer="klingon")}, SAMPLE, "is unknown ('klingon')"),
    ({}, [*SAMPLE, "--num_samples=0"], "--num_samples must be at least 1"),
    ({}, [*SAMPLE, "--temperature=1e-40"], "temperature must be"),
    ({}, [*SAMPLE, "--top_p=nan"], "top_p must be"),
    # weights out
    ({}, [*EXPORT, "gpt2", "new"], "gpt2 is not on this machine"),
    ({"file": write("")}, [*EXPORT, "out/best.pt", "file/new"], "Not a directory"),
    # text
    ({}, PREPARE, "'mine' does not exist"),
    ({}, ["prepare", "*.jsonl", "--data_dir=data"], "'*' is no name for a folder"),
    ({"mine/a.rtf": write("text")}, PREPARE, "no text to read (left out: .rtf 1)"),
    ({"mine/a.txt": write("One.")}, PREPARE, "1 different documents are too few"),
    ({"mine.parquet": write("no")}, ["prepare", "mine.parquet"], "mine.parquet is damaged"),
    ({}, ["prepare", "texts", *OWN_DATA[1:], "--name=tiny"], "holds another data set"),
    ({}, ["prepare", "texts", "--data_dir=data", "--name=a/b"], "'a/b' is no name for a folder"),
    ({}, ["prepare", "info", "--data_dir=data"], "info and the NAME"),
    ({}, [*PREPARE, "--heldout=1"], "--heldout must be"),
    ({}, [*PREPARE, "--val="], "a path is empty"),
    ({}, ["prepare", "texts", "--data_dir=."], "the data set would lie in"),
    ({}, [*PREPARE, "--val=a", "--test=b", "--heldout=0.1"], "--heldout has no effect on"),
    ({}, [*PREPARE, "--train_tokens=9"], "--train_tokens has no effect on"),
    # FineWeb
    ({}, [*FINEWEB, "--from=nowhere"], "nowhere could not be opened"),
    ({}, [*FINEWEB, "--from=texts"], "sample/10BT"),
    ({"tokens/train.safetensors": write("no")}, TOKENS, "train.safetensors is damaged"),
    ({"tokens": write_tokens(420)}, TOKENS, "420 tokens, and test ends at 421"),
    ({"tokens": write_tokens(421, torch.int32)}, TOKENS, "no row of U16 tokens"),
    ({"tokens": write_tokens(421)}, [*TOKENS, "--heldout=0.1"], "--heldout has no effect on"),
])
def test_bad_input(good, tmp_path, monkeypatch, capsys, damage, command, reported):
    """A non-zero exit code, one line that says what is wrong, nothing lost or half made."""
    folder = tmp_path / "copy"
    shutil.copytree(good, folder)
    for path, change in damage.items():
        change(folder / path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(folder)
    script, *argv = command
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(SystemExit) as exit_:
        run_script(importlib.import_module(script).main)
    stderr = capsys.readouterr().err
    last_line = stderr.replace("\r", "\n").splitlines()[-1]
    assert exit_.value.code != 0 and last_line.startswith(f"{script}.py: ")
    assert reported in last_line
    assert script == "train" or stderr.count("\n") == 1
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.items() <= after.items(), "nothing that was there is lost or changed"
    made = {str(path.relative_to(folder)) for path in after.keys() - before.keys()}
    assert not any(path.endswith((".bin", ".pt")) or path == "executed" for path in made)


@pytest.mark.parametrize("script", ["train", "prepare", "eval", "sample", "nanolab.huggingface"])
def test_help_and_typo(script, monkeypatch, capsys):
    for word, exit_code, lines in ("--help", 0, range(6, 999)), ("--sede=1", 2, [1]):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", word])
        with pytest.raises(SystemExit) as exit_:
            run_script(importlib.import_module(script).main)
        assert exit_.value.code == exit_code and "".join(capsys.readouterr()).count("\n") in lines


def test_windows_gets_one_line():
    code = "import socket, sys, zipfile; sys.platform = 'win32'; import nanolab.common"
    result = call("-c", code)
    assert result.returncode == 1
    assert result.stderr == "nanolab runs on Linux and macOS; on Windows, use it inside WSL\n"


def test_torchrun_ends_with_our_line(tmp_path):
    """A mistake in the configuration: the summary of torchrun has our line and exit code."""
    result = call("train.py", *SMALL, f"--out_dir={tmp_path}", "--batch_size=16", processes=2)
    ours = "train.py: global_batch_size=8 (from --global_batch_size) is not divisible by batch"
    lines = result.stderr.splitlines()
    assert any(line.startswith(ours) for line in lines) and ours in lines[-2]
    assert result.returncode == 1 and "exitcode  : 2" in result.stderr.split("Root Cause")[1]
