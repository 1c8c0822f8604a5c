"""Options: files and flags stack, each is defined once, and none is taken for another."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import train
from config import OPTIONS, Config
from conftest import HERE, SMALL, losses
from model import GPT, GPTConfig
from nanolab.common import UserError, load_tensors
from nanolab.distributed import World
from nanolab.optim import make_optimizer
from nanolab.options import check, load


def test_config_stacks(tmp_path):
    """Later files win, flags win over files; 1e-3, True and 1e9 parse; helpers are ignored."""
    file = tmp_path / "mine.py"
    file.write_text("import math\ndef half(x): return x / 2\n_private = 3\n"
                    "learning_rate = half(2)\ndropout = 0\nweight_decay = 0\n")
    got = load(Config, ["--dropout=0.3", str(HERE / "config/cloud.py"), str(file), "--seed", "3",
                        "--max_tokens=1e9", "--tie_weights", "--eps=1e-3"])
    assert (got.learning_rate, got.weight_decay, got.grad_clip) == (1.0, 0.0, 3.5)
    assert (got.dropout, got.max_tokens, got.tie_weights, got.eps) == (0.3, 10**9, True, 1e-3)
    assert (got.seed, got.init_seed, got.data_seed) == (3, 3, 3)


def test_every_config_file_is_accepted(small_run):
    """And those of whole runs train, here at a small size."""
    for file in sorted((HERE / "config/interventions").glob("*.py")):
        load(Config, [str(file)])
    for file in sorted((HERE / "config").glob("[a-z]*.py")):
        run = small_run(file.stem, str(file), *SMALL, "--vocab_size=257", "--max_steps=1")
        assert 5 < losses(run)[0] < 7


def micro_steps(config, n_processes):
    world = World(torch.device("cpu"), None, 0, n_processes)
    return train.split_batch(config, None, None, None, world)[1]


@pytest.mark.parametrize("on_one, on_eight", [("local_3090", "cloud"),
                                              ("modern_3090", "cloud_hour")])
def test_local_and_cloud_are_one_run(on_one, on_eight):
    local, cloud = (load(Config, [str(HERE / f"config/{name}.py")]) for name in (on_one, on_eight))
    differ = {key for key in OPTIONS if getattr(local, key) != getattr(cloud, key)}
    assert differ <= {"name", "batch_size", "out_dir", "eval_every", "save_every"}
    for config, n in (local, 1), (cloud, 8):
        assert micro_steps(config, n) * config.batch_size * n == config.global_batch_size


def test_global_batch_that_does_not_divide():
    with pytest.raises(UserError, match="; batch_size could be 4$"):
        micro_steps(Config(batch_size=8, global_batch_size=8), 2)
    with pytest.raises(UserError, match="global_batch_size could be 80 or 160"):
        micro_steps(Config(batch_size=16, global_batch_size=96), 5)


@pytest.mark.parametrize("key", [
    key for key, option in OPTIONS.items() if option.type is str and option.metadata["choices"]])
def test_a_choice_without_a_rule_is_refused(small_flags, tmp_path, key):
    """A word that was added to an option's choices and nowhere else is taken for no other."""
    config = replace(load(Config, small_flags("run")), **{key: "new"})
    with pytest.raises((ValueError, KeyError), match="new"):
        train.train(config)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_new_parameters_and_the_optimizer():
    """A new embedding goes to AdamW, at the embeddings' rate; a kind that no rule knows to none."""
    config = Config(optimizer="muon", embedding_lr=3.0)
    shape = {"vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4}
    model = GPT(GPTConfig(**shape))
    model.blocks[0].bigram = torch.nn.Embedding(4, 8)
    [group] = [group for group in make_optimizer(model, config).optimizers[1].param_groups
               if any(p is model.blocks[0].bigram.weight for p in group["params"])]
    assert group["lr_scale"] == 3.0
    model.blocks[0].bigram = torch.nn.Module()
    model.blocks[0].bigram.table = torch.nn.Parameter(torch.ones(4, 8))
    with pytest.raises(ValueError, match="no rule for a parameter of the shape .4, 8. in a Module"):
        make_optimizer(model, config)


RUN_SCRIPTS = """
import contextlib, io, json, runpy, sys
results = []
for script, *words in json.load(sys.stdin):
    sys.argv, code, output = [script, *words], 0, io.TextIOWrapper(io.BytesIO(), write_through=True)
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            run(script, run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    results.append((code, output.buffer.getvalue().decode()))
print(json.dumps(results))
"""


def test_an_option_is_defined_once(tmp_path, data_dir, small_run):
    """In config/__init__.py: --help lists a new flag, --init_from takes its value from the
    checkpoint, and --resume, --init_from and the export name it when they refuse."""
    copy = tmp_path / "copy"  # of the program, where GPTConfig has one line more
    for part in ("config", "nanolab"):
        shutil.copytree(HERE / part, copy / part)
    for script in HERE.glob("*.py"):
        shutil.copy(script, copy)
    before, neighbour, after = (copy / "config/__init__.py").read_text().partition(
        "    qkv_bias: bool")  # in GPTConfig
    (copy / "config/__init__.py").write_text(
        f'{before}    rotary: bool = option(False, "a throw-away flag")\n{neighbour}{after}')
    train = ["train.py", *SMALL, "--max_steps=1", "--dataset=stdlib", f"--data_dir={data_dir}"]
    new = "--init_from=new/last.pt"
    old = str(small_run("old", "--max_steps=1") / "last.pt")  # it does not have the option
    commands = [  # with the exit code, and what the last line says
        (["train.py", "--help"], 0, ""), ([*train, "--out_dir=new", "--rotary=True"], 0, ""),
        ([*train, "--out_dir=from_new", new], 0, ""),
        ([*train, "--out_dir=from_old", f"--init_from={old}"], 0, ""),
        ([*train, "--out_dir=new", "--resume"], 2, "rotary was True, is False"),
        ([*train, "--out_dir=no", new, "--rotary=False"], 2, "rotary=False was asked for"),
        ([*train, "--out_dir=no", f"--init_from={old}", "--rotary"], 2, "True was asked for"),
        (["nanolab.huggingface", "export", "new/last.pt", "to"], 1, "has rotary=True, which"),
        (["nanolab.huggingface", "export", old, "to"], 0, "")]
    # one process for all: Python takes longer to start than they do
    done = subprocess.run([sys.executable, "-c", RUN_SCRIPTS], cwd=copy, text=True, timeout=120,
                          input=json.dumps([command for command, _, _ in commands]),
                          stdout=subprocess.PIPE, check=True)
    results = json.loads(done.stdout)
    for (command, exit_code, message), (code, output) in zip(commands, results, strict=True):
        assert code == exit_code and message in output.splitlines()[-1], (command, output)
    assert "--rotary=False" in results[0][1] and "a throw-away flag" in results[0][1]
    for run, rotary in (("new", True), ("from_new", True), ("from_old", False)):
        assert load_tensors(copy / run / "last.pt")["config"]["rotary"] is rotary


VALUES = ["0", "1", "-1", "3", "0.5", "1e999", "nan", "-inf", "9" * 30, "", "True", "None", "x",
          "é", "../..", "[1]", "(" * 300, "'a'", "auto", "\n", "1e30", "0x10", "1_000"]


@pytest.mark.fuzz
def test_random_flags():
    """They are a config whose every value is allowed, or one UserError, and never another error."""
    draw, keys = random.Random(1), sorted(OPTIONS.keys() - {"resume"})
    for _ in range(20_000):
        flags = [f"--{key}={draw.choice(VALUES)}" for key in draw.sample(keys, draw.randint(1, 3))]
        try:
            config = load(Config, flags)
        except UserError as error:
            assert str(error)
            continue
        for key, option in OPTIONS.items():
            value = getattr(config, key)
            assert value is None or check(option, value, "itself") == value
