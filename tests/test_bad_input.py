"""Bad input of every kind: one line, a non-zero exit code, nothing lost."""

import importlib
import json
import pathlib
import pickle
import shutil
import sys

import pytest
import torch

import config
import prepare
import train
from conftest import HERE, SMALL, call, write, write_texts
from nanolab.common import run_script
from nanolab.corpus import own_files


class Code:
    """What a malicious checkpoint holds: unpickled, it would make a file."""
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture(scope="session")
def good(tmp_path_factory, vocabulary):
    """A folder with everything whole: data set `data/tiny`, run `out`, texts. Its damaged copies
    are made from it."""
    folder = tmp_path_factory.mktemp("good")
    write_texts(folder / "texts", "abcd")
    prepare.prepare_text(own_files(folder / "texts"), folder / "data" / "tiny", "bytes", "text", 1,
                         "tiny")
    train.train(config.load([*SMALL, "--dataset=tiny", f"--data_dir={folder}/data",
                             f"--out_dir={folder}/out"]))
    return folder


def resize(path, n_bytes):
    with open(path, "r+b") as file:
        file.truncate(n_bytes)


def change_meta(**changes):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def change_checkpoint(**changes):
    def change(path):
        checkpoint = torch.load(path, weights_only=True)
        for key, value in changes.items():
            checkpoint[key] = value(checkpoint[key]) if callable(value) else value
        torch.save(checkpoint, path)
    return change


def write_parquet(columns):
    def change(path):
        from pyarrow import Table
        from pyarrow.parquet import write_table
        write_table(Table.from_pydict(columns), path)
    return change


def write_tokens(dtype=torch.uint16, token=1, **sizes):
    def change(folder):
        from safetensors.torch import save_file
        folder.mkdir()
        for name, size in sizes.items():
            save_file({"tokens": torch.full((size,), token, dtype=dtype)},
                      folder / f"{name}.safetensors")
    return change


TRAIN = ["train", *SMALL, "--dataset=tiny", "--data_dir=data", "--out_dir=new"]


RESUME = ["train", *SMALL, "--dataset=tiny", "--data_dir=data", "--out_dir=out", "--resume",
          "--max_steps=12"]


EVAL = ["eval", "--ckpt", "out/best.pt", "--device=cpu", "--data_dir=data"]


SAMPLE = ["sample", "--ckpt", "out/best.pt", "--device=cpu", "--max_new_tokens=5"]


PREPARE = ["prepare", "mine", "--data_dir=data", "--tokenizer=bytes"]


META, TRAIN_BIN, TEST_BIN = (f"data/tiny/{name}" for name in ("meta.json", "train.bin", "test.bin"))
LAST, BEST = "out/last.pt", "out/best.pt"


TOKENS = ["prepare", "fineweb", "--data_dir=data", "--from=tokens", "--test_offset=100",
          "--test_tokens=320", "--train_tokens=2048"]


HF = {"model_type": "gpt2", "vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_layer": 1,
      "n_head": 2, "nanolab_tokenizer": "bytes"}


@pytest.mark.parametrize("damage, command, told", [
    # config
    ({}, [*TRAIN, "--dropuot=0"], "did you mean 'dropout'"),
    ({}, [*TRAIN, "--n_layer=two"], "wants int"),
    ({}, [*TRAIN, "--n_layer=0"], "[1, 10000]"),
    ({}, [*TRAIN, "--learning_rate=nan"], "learning_rate"),
    ({}, [*TRAIN, "--n_head=3"], "not divisible"),
    ({}, [*TRAIN, "--batch_size=3"], "2 or 4"),
    ({}, [*TRAIN, "--schedule=linear"], "'cosine'"),
    ({}, [*TRAIN, "--schedule=wsd", "--warmup_fraction=0.5", "--cooldown_fraction=0.6"],
     "exceed the whole run"),
    ({}, [*TRAIN, "nothing.py"], "no config file nothing.py"),
    ({"mine.py": write("dropuot = 0")}, [*TRAIN, "mine.py"], "(from mine.py)"),
    ({"mine.py": write("dropout = (")}, [*TRAIN, "mine.py"], "mine.py, line 1"),
    ({"mine.py": write("import sys; sys.exit(3)")}, [*TRAIN, "mine.py"],
     "mine.py, line 1: SystemExit"),
    ({}, [*TRAIN, "--seed=99999999999999999999"], "seed"),
    ({}, [*TRAIN, "--out_dir="], "out_dir='' (from --out_dir): must not be empty"),
    ({}, [*TRAIN, "--vocab_size=100"], "less than the 257"),
    ({}, [*TRAIN, "--device=cuda"], "not available"),
    ({}, [*TRAIN, "--wandb=project"], "pip install wandb"),
    # hostile
    ({}, [*TRAIN, "--n_embd=100000000"], "n_embd=100000000 (from --n_embd): not allowed"),
    ({}, [*TRAIN, "--vocab_size=999999999999"], "make weights of about 256,000 GB"),
    ({}, [*TRAIN, "--n_layer=1000000"], "not allowed; allowed: [1, 10000]"),
    ({}, [*TRAIN, "--global_batch_size=100000000000000003"], "not allowed; allowed: [1, 1e9]"),
    ({}, [*TRAIN, "--global_batch_size=999999937"], "batch_size could be 1 or 999999937"),
    ({}, [*TRAIN, "--learning_rate=" + "9" * 4000], "learning_rate=inf"),
    ({}, [*TRAIN, "--max_steps=1e999"], "wants int, not float"),
    ({}, [*TRAIN, "--max_steps=1e30"], "not allowed; allowed: [0, inf)"),
    ({}, [*TRAIN, "--grad_clip=nan"], "grad_clip='nan'"),
    ({}, [*TRAIN, "--name=caf\udce9"], "not UTF-8 text"),
    ({}, [*TRAIN, "--dataset=../.."], "'../..' is a path"),
    ({"mine.py": write("raise BaseException('a\\nb')")}, [*TRAIN, "mine.py"],
     "mine.py, line 1: BaseException: a b"),
    ({"mine.py": write("exit()")}, [*TRAIN, "mine.py"], "mine.py, line 1: SystemExit"),
    ({"mine.py": write("input('name? ')")}, [*TRAIN, "mine.py"],
     "mine.py, line 1: RuntimeError: input(): lost sys.stdin"),
    ({"mine.py": write("seed = 10**10000")}, [*TRAIN, "mine.py"], "seed=(int) (from mine.py)"),
    ({"mine.py": write("name = '\\ud800'")}, [*TRAIN, "mine.py"], "not UTF-8 text"),
    ({"mine/a.jsonl": write('{"text": ' + "[" * 1_000_000)}, PREPARE, "not JSON"),
    ({"mine/a.jsonl": write('{"text": ' + "1" * 10_000 + "}")}, PREPARE, "not JSON"),
    ({META: write("[" * 100_000)}, TRAIN, "meta.json is damaged"),
    ({META: change_meta(splits=5)}, TRAIN, "meta.json is damaged"),
    ({META: change_meta(vocab_size="x")}, TRAIN, "meta.json is damaged"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "lookahead": 2})}, EVAL,
     "has the option lookahead, which this nanolab does not have"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "lookahead": 2})}, SAMPLE,
     "has the option lookahead"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "lookahead": 2})},
     ["model", "export", "out/best.pt", "new"], "has the option lookahead"),
    ({LAST: change_checkpoint(config=lambda c: {**c, "lookahead": 2})}, RESUME,
     "has the option lookahead"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "norm": "batchnorm"})}, SAMPLE,
     "norm='batchnorm' (from out/best.pt)"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "n_layer": 10**9})}, SAMPLE,
     "n_layer=1000000000 (from out/best.pt)"),
    ({BEST: change_checkpoint(config=5)}, SAMPLE, "best.pt is no checkpoint of nanolab"),
    ({BEST: change_checkpoint(model=5)}, SAMPLE, "best.pt is no checkpoint of nanolab"),
    ({BEST: change_checkpoint(model=lambda m: {key: w * float("nan") for key, w in m.items()})},
     SAMPLE, "weights that are not finite (wte.weight)"),
    ({BEST: change_checkpoint(model=lambda m: {key: w * float("nan") for key, w in m.items()})},
     EVAL, "weights that are not finite"),
    ({BEST: change_checkpoint(model=lambda m: {key: w * 1e30 for key, w in m.items()})}, SAMPLE,
     "its weights are too large"),
    ({LAST: change_checkpoint(optimizer=5)}, RESUME, "last.pt does not fit this run"),
    ({"hf/config.json": write('{"a": ' * 1_000_000)}, [*SAMPLE, "--ckpt=hf"],
     "hf/config.json is damaged"),
    *[({"hf/config.json": write(json.dumps({**HF, **changes}))}, [*SAMPLE, "--ckpt=hf"],
       told) for changes, told in (({"resid_pdrop": 2}, "dropout=2.0 (from hf/config.json)"),
                                   ({"resid_pdrop": "x"}, "dropout='x'"),
                                   ({"n_embd": 10**30}, "n_embd=1000"),
                                   ({"tie_word_embeddings": "x"}, "tie_weights='x'"))],
    ({}, [*SAMPLE, "--num_samples=1000000"], "--num_samples must be from 1 to 1,000"),
    ({}, [*SAMPLE, "--prompt=caf\udce9", "--num_samples=2"], "not UTF-8 text"),
    ({"a.json": write('[{"name": "a", "test_loss": 3, "seed": [1]}]')},
     ["eval", "--ckpt", "a.json"], "no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": 3, "config": 5}]')},
     ["eval", "--ckpt", "a.json"], "no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": 3, "config": {"lookahead": 2}}]')},
     ["eval", "--ckpt", "a.json"], "has the option lookahead"),
    ({"a.json": write("[" * 100_000)}, ["eval", "--ckpt", "a.json"], "no file of results"),
    ({}, ["eval", "--ckpt", f"{HERE}/config/results/modern.json", "--noise"],
     "--noise needs at least two runs"),
    ({"place": pathlib.Path.mkdir, "link": lambda path: path.symlink_to("place")},
     ["model", "export", "out/best.pt", "link"], "link could not be written"),
    # weights of others, and ours for others
    ({}, ["train", "--init_from=out/best.pt", "--n_layer=3", "--dataset=tiny", "--data_dir=data",
          "--out_dir=new"],
     "n_layer=3 was asked for, but init_from='out/best.pt' has n_layer=2"),
    ({}, ["train", "--init_from=out/best.pt", "--block_size=64", "--dataset=tiny",
          "--data_dir=data", "--out_dir=new"],
     "block_size=64 was asked for, but init_from='out/best.pt' has block_size=32"),
    ({}, ["train", "--init_from=out/best.pt", "--init=gpt2"],
     "init='gpt2' (from --init) applies to random weights only"),
    ({}, ["train", "--init_from=nowhere", "--dataset=tiny", "--data_dir=data", "--out_dir=new"],
     "there is no checkpoint nowhere"),
    ({BEST: change_checkpoint(tokenizer="gpt2")},
     ["train", "--init_from=out/best.pt", "--dataset=tiny", "--data_dir=data", "--out_dir=new"],
     "reads gpt2 tokens, but the data set tiny has bytes"),
    ({"hf/config.json": write("{")}, [*SAMPLE, "--ckpt=hf"], "hf/config.json is damaged"),
    ({"hf/config.json": write(json.dumps(HF))}, [*SAMPLE, "--ckpt=hf"],
     "neither model.safetensors nor pytorch_model.bin"),
    ({"hf/config.json": write(json.dumps(HF)), "hf/model.safetensors": write("no")},
     [*SAMPLE, "--ckpt=hf"], "the weights in hf are damaged"),
    ({"hf/config.json": write(json.dumps(HF)),
      "hf/pytorch_model.bin": lambda path: torch.save({"wte.weight": Code()}, path)},
     [*SAMPLE, "--ckpt=hf"], "pytorch_model.bin is damaged"),
    ({"hf/config.json": write(json.dumps(HF)),
      "hf/pytorch_model.bin": lambda path: torch.save({"wte.weight": torch.ones(257, 8)}, path)},
     [*SAMPLE, "--ckpt=hf"], "hf does not fit its own config (Missing key(s)"),
    *[({"hf/config.json": write(json.dumps({**HF, key: value}))}, [*SAMPLE, "--ckpt=hf"],
       f"{key}={value!r}") for key, value in (("model_type", "llama"), ("n_inner", 2048),
                                              ("activation_function", "relu"),
                                              ("layer_norm_epsilon", 1e-6), ("n_layer", "2"),
                                              ("scale_attn_by_inverse_layer_idx", True),
                                              ("scale_attn_weights", False),
                                              ("add_cross_attention", True), ("n_head", 3))],
    ({}, ["eval", "--ckpt", "gpt2-smal"], "OpenAI's weights are gpt2, gpt2-medium"),
    ({}, ["model", "export", "nowhere.pt", "new"], "there is no checkpoint nowhere.pt"),
    ({}, ["model", "export", "out/best.pt", "texts"], "texts is there and not empty"),
    ({}, ["model", "export", "out/best.pt", "out/best.pt"], "out/best.pt is there and not empty"),
    ({"file": write("")}, ["model", "export", "out/best.pt", "file/new"], "Not a directory"),
    ({}, ["model", "export", "texts", "new"], "texts is no file that train.py saved"),
    ({}, ["model", "export", "gpt2", "new"], "gpt2 is no file that train.py saved"),
    ({}, ["model", "import", "out/best.pt", "new"], "invalid choice: 'import'"),
    # token files
    ({}, [*TRAIN, "--dataset=other"], "make it: python prepare.py PATH_OF_YOUR_TEXT --name=other"),
    ({TRAIN_BIN: lambda path: resize(path, 1001)}, TRAIN, "train.bin has 1,001 bytes"),
    ({META: change_meta(dtype="uint32")}, TRAIN, "its meta.json says"),
    ({META: change_meta(dtype="words")}, TRAIN, "meta.json is damaged"),
    ({META: lambda path: path.write_text(path.read_text().replace('"tokens"', '"tokens "'))}, TRAIN,
     "meta.json is damaged"),
    ({META: change_meta(vocab_size=50)}, TRAIN, "beyond its vocabulary of 50"),
    ({META: write('{"hello": 1}')}, TRAIN, "meta.json is damaged or not nanolab's"),
    ({META: write('{"tok')}, TRAIN, "meta.json is damaged"),
    ({META: pathlib.Path.unlink}, TRAIN, "is unfinished"),
    ({TRAIN_BIN: lambda path: resize(path, 0)}, TRAIN, "train.bin has 0 bytes"),
    ({}, [*TRAIN, "--block_size=100000"], "less than one window of 100,001"),
    ({"data/tiny/val.bin": pathlib.Path.unlink}, TRAIN, "no val split"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, TRAIN,
     "train.py reads them with --vocab_size=N"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, EVAL,
     "eval.py needs another --dataset"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, [*TRAIN, "--vocab_size=50"],
     "beyond its vocabulary of 50; it needs uint16"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink,
      TRAIN_BIN: lambda path: resize(path, 1001)}, [*TRAIN, "--vocab_size=257"],
     "train.bin has 1,001 bytes, so it holds no uint16"),
    # checkpoints and runs
    ({}, [*TRAIN, "--out_dir=out"], "holds a run already"),
    ({"file": write("")}, [*TRAIN, "--out_dir=file/out"], "Not a directory"),
    ({LAST: lambda path: resize(path, 5000)}, RESUME, "last.pt is damaged"),
    ({LAST: write(b"")}, RESUME, "last.pt is damaged"),
    ({LAST: lambda path: torch.save({"format": 1, "model": Code(), "config": {}}, path)}, RESUME,
     "last.pt is damaged"),
    ({LAST: lambda path: torch.save([1, 2], path)}, RESUME, "last.pt is no checkpoint of nanolab"),
    ({LAST: pathlib.Path.unlink, BEST: write("mine")}, RESUME,
     "best.pt is damaged or no checkpoint"),
    ({LAST: change_checkpoint(format=99)}, RESUME, "has format 99"),
    ({LAST: change_checkpoint(data_sha256="0")}, RESUME, "another data set"),
    ({}, [*RESUME, "--n_layer=3"], "n_layer was 2, is 3"),
    ({}, [*RESUME, "--vocab_size=300"], "vocab_size was 257, is 300"),
    # eval and sample
    ({}, ["eval", "--ckpt", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ({BEST: lambda path: path.write_bytes(pickle.dumps({"model": Code()}, protocol=4))}, EVAL,
     "best.pt is damaged"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "n_layer": 1})}, EVAL, "best.pt does not fit"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "vocab_size": 300})}, SAMPLE,
     "best.pt does not fit"),
    ({BEST: change_checkpoint(tokenizer="gpt2")}, EVAL, "was trained on gpt2 tokens"),
    ({BEST: change_checkpoint(tokenizer="klingon")}, SAMPLE, "unknown tokenizer 'klingon'"),
    ({TEST_BIN: pathlib.Path.unlink}, EVAL, "no test split"),
    ({}, [*EVAL, "--baseline=basline"], "there are baseline"),
    ({}, ["eval", "--ckpt", "out/*/best.pt"], "nothing matches 'out/*/best.pt'"),
    ({}, ["eval", "--ckpt", "data"], "there is no run in data"),
    ({"out/summary.json": pathlib.Path.unlink}, ["eval", "--ckpt", "out"],
     "no run has ended yet: out"),
    ({}, ["eval", "--ckpt", "results.json"], "there is no file results.json"),
    ({}, ["eval", "--ckpt", "out/best.pt", "out/last.pt"], "are of one run"),
    ({}, ["eval", "--ckpt", "out/best.pt", "--validation", "--noise"], "are for test losses"),
    ({}, ["eval", "--ckpt", "out/best.pt", "--validation", "--dataset=tiny"],
     "are for test losses"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--beside=a.json"], "no experiment called baseline"),
    ({}, [*EVAL, "--curves=c.png", "--fit_batch_size"], "--curves for it and --noise"),
    ({"a.json": write("[]")}, ["eval", "--ckpt", "a.json"], "a.json has no runs"),
    *[({"a.json": write(f'[{{"name": "a", "test_loss": 3, {wrong}}}]')},
       ["eval", "--ckpt", "a.json"], told) for wrong, told in (
           ('"max_tokens": "x"', "max_tokens='x' (from a.json)"),
           ('"global_batch_size": 0', "global_batch_size=0 (from a.json)"),
           ('"cost": {}', "no file of results"), ('"test_sha256": []', "no file of results"),
           ('"path": 5', "no file of results"), ('"seed": []', "no file of results"))],
    ({"a.json": write('[{"name": "a", "test_loss": 1' + "0" * 400 + "}]")},
     ["eval", "--ckpt", "a.json"], "no file of results"),
    ({"a.json": write("[")}, ["eval", "--ckpt", "a.json"], "a.json is no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": "3"}]')}, ["eval", "--ckpt", "a.json"],
     "a.json is no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": 3, "dropout": 0.0}, {"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--baseline=a"], "could be any of: a, dropout=0.0; a, dropout=0.1"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "a.json", "--noise"],
     "at least two runs"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--fit_batch_size"], "at least 3 global batch"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--curves=c.png"], "a/log.jsonl"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--plot=c.doc"], "c.doc: Format 'doc'"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "out/best.pt", "a.json", *EVAL[3:]], "tested on different data"),
    ({}, [*EVAL, "--noise", "--fit_batch_size"], "ask for one"),
    ({}, [*EVAL, "--batch_size=0"], "--batch_size"),
    ({}, [*EVAL, "--dataset=other"], "is not there"),
    ({}, ["sample", "--ckpt", "data"], "data is a folder, neither a run with best.pt"),
    ({}, [*SAMPLE, "--prompt="], "--prompt is empty"),
    ({}, [*SAMPLE, "--prompt_file=nowhere"], "nowhere"),
    ({"p.txt": write(b"a\xff")}, [*SAMPLE, "--prompt_file=p.txt"],
     "p.txt is not UTF-8 text (byte 1)"),
    ({"p.txt": write("")}, [*SAMPLE, "--prompt_file=p.txt"], "p.txt is empty"),
    ({}, [*SAMPLE, "--tokenizer=gpt2"], "reads bytes tokens; leave out --tokenizer=gpt2"),
    ({BEST: change_checkpoint(tokenizer="unknown")}, SAMPLE,
     "name it to sample.py, with --tokenizer=bytes or gpt2"),
    ({}, [*SAMPLE, "--top_p=0"], "--top_p"),
    ({}, [*SAMPLE, "--top_p=nan"], "--top_p"),
    ({}, [*SAMPLE, "--top_k=0"], "--top_k"),
    ({}, [*SAMPLE, "--top_k=258"], "more than the 257"),
    ({}, [*SAMPLE, "--temperature=-1"], "--temperature"),
    ({}, [*SAMPLE, "--temperature=1e-40"], "--temperature"),
    ({}, [*SAMPLE, "--seed=99999999999999999999"], "--seed"),
    ({}, [*SAMPLE, "--max_new_tokens=many"], "--max_new_tokens"),
    # prepare
    ({}, PREPARE, "'mine' does not exist"),
    ({}, ["prepare", "*.jsonl", "--data_dir=data", "--name=mine"], "does not exist"),
    ({}, ["prepare", "texts/*.jsonl", "--data_dir=data"], "--name"),
    ({"mine/a.rtf": write("text")}, PREPARE, "has no .txt .md .jsonl .parquet file"),
    ({"mine/a.txt": write("")}, PREPARE, "no text"),
    ({"mine/a.txt": write("One.")}, PREPARE, "1 different documents are too few"),
    ({"mine/a.txt": write(bytes(range(256)) * 9)}, PREPARE, "a.txt is not UTF-8 text (byte 128)"),
    ({"mine/a.txt": write("ä".encode("latin-1") * 9)}, PREPARE, "not UTF-8"),
    ({"mine/a.jsonl": write('{"text": "one"}\n{"text": ')}, PREPARE, "not JSON"),
    ({"mine/a.jsonl": write('{"body": "one"}\n')}, PREPARE, "--text_column"),
    ({"mine/a.jsonl": write('{"text": 1}\n')}, PREPARE, "that is not text"),
    ({"mine/a.jsonl": write('{"text": "\\ud800"}\n')}, PREPARE, "that is not text"),
    ({"mine.parquet": write_parquet({"body": ["one"]})},
     ["prepare", "mine.parquet", "--data_dir=data"], "no column 'text' but body"),
    ({"mine.parquet": write_parquet({"text": [1]})}, ["prepare", "mine.parquet", "--data_dir=data"],
     "that is not text"),
    ({"mine.parquet": write_parquet({"text": []})}, ["prepare", "mine.parquet", "--data_dir=data"],
     "no text"),
    ({"mine.parquet": write("no")}, ["prepare", "mine.parquet", "--data_dir=data"],
     "damaged or no .parquet"),
    ({"mine/a.jsonl": write("".join(json.dumps({"text": text}) + "\n"
                                    for text in (" " * 1_500_000 + "a", "b", "c")))},
     ["prepare", "mine", "--data_dir=data"], "tiktoken cannot encode"),
    ({}, ["prepare", "texts", "--data_dir=data", "--name=tiny", "--tokenizer=bytes"],
     "holds another data set"),
    ({}, ["prepare", "texts", "--data_dir=data", "--name=a/b"], "--name"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--from=nowhere"], "no folder nowhere"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--from=texts"], "sample/10BT"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--heldout=0"], "--heldout"),
    ({"tokens": write_tokens(train=9)}, TOKENS, "there is no tokens/validation.safetensors"),
    ({"tokens": write_tokens(train=9, validation=9), "tokens/train.safetensors": write("no")},
     TOKENS, "train.safetensors is damaged"),
    ({"tokens": write_tokens(train=9, validation=420)}, TOKENS,
     "has 420 tokens, and test ends at 421"),
    ({"tokens": write_tokens(train=9, validation=421, dtype=torch.int32)}, TOKENS,
     "holds I32 numbers of the shape [9]"),
    ({"tokens": write_tokens(train=9, validation=421, token=50257)}, TOKENS,
     "beyond GPT-2's vocabulary of 50257"),
    ({"tokens": write_tokens(train=9, validation=421)}, [*TOKENS, "--heldout=0.1"],
     "neither --tokenizer nor --heldout"),
    ({}, [*PREPARE, "--train_tokens=9"],
     "--train_tokens does nothing for mine, only for fineweb, fineweb-edu"),
    ({}, [*PREPARE, "--from=texts"], "--from does nothing for mine"),
    ({}, [*PREPARE, "--heldout=1"], "--heldout must be"),
    ({}, ["prepare", "fineweb", "--text_column=body"],
     "--text_column does nothing for fineweb, only for text of your own"),
    ({}, ["prepare", "pypi", "--heldout=0.1"], "--heldout does nothing for pypi"),
    ({}, ["prepare", "fineweb-edu", "--data_dir=data", "--from=texts"],
     "HuggingFaceFW/fineweb-edu could not be opened"),
    ({}, [*PREPARE, "--tokenizer=words"], "--tokenizer"),
])
def test_bad_input(good, tmp_path, monkeypatch, capsys, damage, command, told):
    """A non-zero exit code, one line on stderr that says what is wrong, no traceback, nothing lost
    or half made."""
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
    assert exit_.value.code != 0 and last_line.startswith(f"{script}.py: ") and told in last_line
    assert script == "train" or stderr.count("\n") == 1
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    kept = {path: after.get(path) for path in before}
    assert kept == before, "nothing that was there is lost or changed"
    made = {str(path.relative_to(folder)) for path in after.keys() - before.keys()}
    assert not any(path.endswith((".bin", ".pt")) or path == "executed" for path in made)


@pytest.mark.parametrize("command", [["train.py"], ["prepare.py", "stdlib"], ["eval.py"],
                                     ["sample.py"], ["model.py", "export", "a", "b"]])
def test_help_and_typo(command):
    assert call(*command, "--help").returncode == 0
    typo = call(*command, "--sede=1")
    assert typo.returncode == 2 and typo.stderr.count("\n") == 1 and "--sede" in typo.stderr


def test_what_a_terminal_cannot_show(good):
    """A terminal that has only ASCII shows the rest as escapes; a full disk behind stdout is one
    line."""
    command = ["sample.py", f"--ckpt={good / 'out/best.pt'}", "--device=cpu", "--max_new_tokens=5",
               "--prompt=é"]
    for samples in ("--num_samples=1", "--num_samples=2"):
        shown = call(*command, samples, PYTHONIOENCODING="ascii")
        assert shown.returncode == 0 and "\\xe9" in shown.stdout and not shown.stderr


def test_weights_beyond_the_memory(good, monkeypatch, capsys):
    """Where the system refuses the memory, that is one line too."""
    monkeypatch.setattr(train, "GPT", lambda *args, **kwargs: torch.empty(2**60))
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--dataset=tiny",
                                      f"--data_dir={good}/data", f"--out_dir={good}/new"])
    with pytest.raises(SystemExit):
        run_script(train.main)
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: out of memory")
