"""Options: files and flags stack, each is defined once, and none is taken for another."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import train
from config import OPTIONS, Config
from conftest import HERE, SMALL, losses, read_json
from model import GPT, GPTConfig
from nanolab.common import UserError, load_tensors
from nanolab.distributed import World
from nanolab.optim import make_optimizer
from nanolab.options import load


def test_config_stacks(tmp_path):
    """Later files win, flags win over files; 1e-3, True and 1e9 parse; helpers are ignored."""
    file = tmp_path / "mine.py"
    file.write_text("import math\ndef half(x): return x / 2\n_private = 3\n"
                    "learning_rate = half(2)\ndropout = 0\nweight_decay = 0\n")
    got = load(Config, ["--dropout=0.3", "config/cloud.py", str(file), "--seed", "3",
                        "--max_tokens=1e9", "--tie_weights", "--eps=1e-3"])
    assert (got.learning_rate, got.weight_decay, got.grad_clip) == (1.0, 0.0, 3.5)
    assert (got.dropout, got.max_tokens, got.tie_weights, got.eps) == (0.3, 10**9, True, 1e-3)
    assert (got.seed, got.init_seed, got.data_seed) == (3, 3, 3)


def test_every_config_file_is_accepted(small_run):
    """And those of whole runs train, here at a small size."""
    for file in (HERE / "config/interventions").glob("*.py"):
        load(Config, [str(file)])
    for file in (HERE / "config").glob("[a-z]*.py"):
        run = small_run(file.stem, str(file), *SMALL, "--vocab_size=257", "--max_steps=1",
                        "--eval_tokens=32", "--save_weights=False")
        assert 5 < losses(run)[0] < 7


def micro_steps(config, n_processes):
    world = World(torch.device("cpu"), None, 0, n_processes)
    return train.split_batch(config, None, None, None, world)[1]


@pytest.mark.parametrize("on_one, on_eight", [("local_3090", "cloud"),
                                              ("modern_3090", "cloud_hour")])
def test_local_and_cloud_are_one_run(on_one, on_eight):
    local, cloud = (load(Config, [f"config/{name}.py"]) for name in (on_one, on_eight))
    differ = {key for key in OPTIONS if getattr(local, key) != getattr(cloud, key)}
    assert differ <= {"name", "batch_size", "out_dir", "eval_every", "save_every"}
    for config, n in (local, 1), (cloud, 8):
        assert micro_steps(config, n) * config.batch_size * n == config.global_batch_size


def test_global_batch_that_does_not_divide():
    for batch_size, total, n, advice in ((8, 16, 4, "; batch_size could be 4$"),
                                         (16, 96, 5, "global_batch_size could be 80 or 160")):
        with pytest.raises(UserError, match=advice):
            micro_steps(Config(batch_size=batch_size, global_batch_size=total), n)


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
import importlib, sys
for line in sys.stdin:
    script, *words = sys.argv = line.split()
    try:
        importlib.import_module(script).main()
    except (Exception, SystemExit) as error:
        print("ended by", repr(error), flush=True)
"""


def test_an_option_is_defined_once(tmp_path, data_dir, shared_run):
    """In config/__init__.py: --help lists a new flag, --init_from takes its value from the
    checkpoint, and --resume, --init_from and the export know it."""
    for part in ("config", "nanolab"):  # a copy of the program
        shutil.copytree(HERE / part, tmp_path / part)
    for script in ("train.py", "model.py"):
        shutil.copy(HERE / script, tmp_path)
    options = tmp_path / "config/__init__.py"
    options.write_text(options.read_text().replace(
        "    qkv_bias: bool", "    rotary: bool = option(False, 'a throw-away flag')\n"
                              "    qkv_bias: bool", 1))
    train = " ".join(["train", *SMALL, "--max_steps=1", "--dataset=stdlib",
                      f"--data_dir={data_dir}", "--out_dir="])
    shutil.copytree(shared_run(), tmp_path / "old")  # a run from before the option
    commands = f"""{train}new --rotary
        {train}from_new --init_from=new/last.pt
        {train}from_old --init_from=old
        {train}old --resume
        {train}new --resume
        {train}no --init_from=new/last.pt --rotary=False
        nanolab.huggingface export new/last.pt exported
        train --help"""
    # one process for all: Python takes longer to start than they do
    printed = subprocess.run([sys.executable, "-c", RUN_SCRIPTS], cwd=tmp_path, input=commands,
                             text=True, timeout=120, stdout=subprocess.PIPE, check=True).stdout
    ends = [line for line in printed.splitlines() if line.startswith("ended by")]
    for end, expected in zip(ends, ("rotary was True, is False", "rotary=False was asked for",
                                    "SystemExit(0)"), strict=True):
        assert expected in end
    assert "--rotary=False" in printed and "a throw-away flag" in printed
    assert read_json(tmp_path / "exported/config.json")["rotary"] is True
    for run, rotary in (("new", True), ("from_new", True), ("from_old", False)):
        assert load_tensors(tmp_path / run / "last.pt")["config"]["rotary"] is rotary
