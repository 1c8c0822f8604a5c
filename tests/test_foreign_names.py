"""nanoGPT's user: options of other trainers are answered, and nanoGPT's recipes are files here."""

import math
import re

import pytest

from config import OPTIONS, Config
from conftest import HERE
from nanolab.common import UserError, run_script
from nanolab.optim import count_steps, learning_rate_at
from nanolab.options import foreign_names, load

DOC = (HERE / "docs/from_nanogpt.md").read_text()

NANOGPT = {  # train.py at commit 3adf61e
    "out_dir", "eval_interval", "log_interval", "eval_iters", "eval_only", "always_save_checkpoint",
    "init_from", "wandb_log", "wandb_project", "wandb_run_name", "dataset",
    "gradient_accumulation_steps", "batch_size", "block_size", "n_layer", "n_head", "n_embd",
    "dropout", "bias", "learning_rate", "max_iters", "weight_decay", "beta1", "beta2", "grad_clip",
    "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "backend", "device", "dtype", "compile"}

CHARACTERS = dict(
    eval_interval=250, dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64,
    block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, learning_rate=1e-3,
    max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100)
RECIPES = {  # config/train_*.py there, and for _cpu the command line of its README
    "shakespeare_char": CHARACTERS,
    "shakespeare_char_cpu": CHARACTERS | dict(
        batch_size=12, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0,
        max_iters=2000, lr_decay_iters=2000),
    "gpt2_nanogpt": dict(
        eval_interval=1000, dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
        block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, learning_rate=6e-4,
        max_iters=600_000, lr_decay_iters=600_000, min_lr=6e-5, beta2=0.95, warmup_iters=2000)}

ROWS = [[cell.strip(" `") for cell in row.strip("|").split("|")]
        for row in DOC.rpartition("## ")[2].splitlines() if row.startswith("| `")]


@pytest.mark.parametrize("names, example, meaning", ROWS, ids=lambda cell: cell.split("`")[0])
def test_each_name_is_answered(names, example, meaning):
    """It is no option of ours, for then nobody would see the answer, and the example is one."""
    load(Config, example.split())
    for name in names.split("`, `"):
        assert name not in OPTIONS
        word = name if name.endswith(".py") else f"--{name}" if "=" in name else f"--{name}=1"
        with pytest.raises(UserError) as error:
            load(Config, [word])
        assert example in str(error.value) and meaning in str(error.value)
        assert "docs/from_nanogpt.md" in str(error.value) and error.value.exit_code == 2


def test_all_unknown_names_at_once(capsys):
    """nanoGPT's own command for a CPU, pasted; a misspelt name and one with dashes as well."""
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: load(Config, (
            "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
            "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
            "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --grad_clap=1 --warmup-steps 100 "
            "--init_from=resume").split()))
    first, *lines = capsys.readouterr().err.splitlines()
    assert ": 8 names are unknown; docs/from_nanogpt.md has other" in first
    for line, (name, answer) in zip(lines, [
            ("config/train_shakespeare_char.py", "config/shakespeare_char.py"),
            ("eval_iters", "--eval_tokens="), ("log_interval", "--log_every="),
            ("max_iters", "--max_steps="), ("lr_decay_iters", "--schedule=cosine"),
            ("grad_clap", "'grad_clip'"), ("warmup-steps", "--warmup_fraction="),
            ("init_from=resume", "--resume")], strict=True):
        assert name in line and answer in line


def test_the_docs_say_the_same():
    """The rows of nanoGPT's options are all of them, with the option that the list of names has."""
    seen = set()
    for row in DOC.partition("## train.py")[2].partition("\n## ")[0].splitlines():
        if row.startswith("| `"):
            theirs, _, ours = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[1:4])
            seen.update(theirs)
            for name in theirs:
                answer = foreign_names().get(name, f"--{name}=")
                assert set(re.findall(r"--(\w+)[ =]", answer.partition("(")[0])) <= set(ours), name
                assert bool(ours) == ("--" in answer.partition("(")[0]), name
    assert seen == NANOGPT


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    """nanoGPT's values, and its learning rates by its own formula."""
    there, here = RECIPES[name], load(Config, [f"config/{name}.py"])
    for key in ("dataset", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "dropout",
                "learning_rate", "beta2"):
        assert getattr(here, key) == there[key], key
    assert here.eval_every == there["eval_interval"]
    assert here.global_batch_size == there["batch_size"] * there["gradient_accumulation_steps"]
    assert (here.weight_decay, here.beta1, here.grad_clip, here.eps) == (0.1, 0.9, 1.0, 1e-8)
    assert (here.tie_weights, here.init, here.activation) == (True, "gpt2", "gelu_erf")
    assert (here.decay, here.qkv_bias, here.optimizer) == ("matrices", False, "adamw")
    warmup, last, n = there["warmup_iters"], there["lr_decay_iters"], count_steps(here)
    peak, low = there["learning_rate"], there["min_lr"]
    assert n == there["max_iters"] + 1
    for step in (1, warmup // 2, warmup - 1):
        theirs = peak * (step + 1) / (warmup + 1)
        assert abs(learning_rate_at(step, n, here) - theirs) < 2 * peak / warmup
    for step in (warmup, last // 2, last):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup)))
        theirs = low + cosine * (peak - low)
        assert learning_rate_at(step, n, here) == pytest.approx(theirs, rel=1e-3)
