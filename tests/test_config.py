"""Options, config files, flags: they stack as promised, and a mistake is one line."""

import pytest
import torch

import config
import train
from conftest import HERE, losses
from model import GPT, GPTConfig
from nanolab.common import UserError
from nanolab.memory import count_training_memory
from nanolab.schedule import count_steps


@pytest.mark.parametrize("argv, parts", [
    (["--dropuot=0.1"], ["dropuot", "dropout"]),
    (["--dropout=-0.1"], ["dropout", "-0.1", "[0, 1)"]),
    (["--batch_size=many"], ["batch_size", "auto"]),
    (["--seed=1.5"], ["seed", "int"]),
    (["--compile=yes"], ["compile='yes'", "allowed: True, False, 'auto'"]),
    (["--init=gtp2"], ["init", "'gpt2'"]),
    (["--n_head=7"], ["n_embd=768", "n_head=7", "6 or 8"]),
    (["--batch_size=7"], ["global_batch_size=96", "6 or 8"]),
    (["--learning_rate"], ["learning_rate", "value"]),
    (["config/clod.py"], ["config/clod.py", "config/cloud.py"]),
    (["out"], ["'out'", "neither"]),
    (["--position=rope", "--n_embd=15", "--n_head=5"], ["pairs", "n_embd=15", "n_head=5", "3"]),
    (["--init_from=gpt2", "--zero_init"], ["zero_init=True", "init_from='gpt2'", "random weights"]),
    (["--tie_weights", "--head_lr=2"], ["head_lr=2.0", "tie_weights=True", "embedding_lr"]),
    (["--init_from=gpt2", "--init_seed=1"], ["init_seed=1", "init_from='gpt2'", "random weights"]),
])
def test_config_mistakes(argv, parts):
    """Exit code 2 and one line with the key, what is allowed, the nearest spelling."""
    with pytest.raises(UserError) as error:
        config.load(argv)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, part", [("dropuot = 0.1", "dropout"), ("dropout = 'no'", "dropout"),
                                        ("dropout = ", "line 1"),
                                        ("x_ = 1 / 0", "ZeroDivisionError")])
def test_config_file_mistakes(tmp_path, text, part):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        config.load([str(file)])
    assert part in str(error.value) and str(file) in str(error.value)


def test_config_stacks(tmp_path):
    """Later files win, flags win over files; 1e-3, True and 1e9 parse; helpers in a file are
    ignored."""
    file = tmp_path / "mine.py"
    file.write_text("import math\ndef half(x): return x / 2\n_private = 3\n"
                    "learning_rate = half(2)\ndropout = 0\nweight_decay = 0\n")
    got = config.load(["--dropout=0.3", "config/cloud.py", str(file), "--seed", "3",
                       "--max_tokens=1e9", "--tie_weights", "--eps=1e-3"])
    assert (got.learning_rate, got.weight_decay, got.grad_clip) == (1.0, 0.0, 3.5)
    assert (got.dropout, got.max_tokens) == (0.3, 10**9)
    assert (got.seed, got.init_seed, got.data_seed, got.tie_weights,
            got.eps) == (3, 3, 3, True, 1e-3)


def test_each_intervention_changes_its_own_keys():
    expected = {
        "baseline": {}, "gradient_clipping": {"grad_clip": 3.5}, "remove_dropout": {"dropout": 0.0},
        "qkv_bias": {"qkv_bias": True}, "schedule_learning_rate": {
            "learning_rate": 1.4e-3, "schedule": "cosine", "warmup_fraction": 0.05
        }, "weight_decay_gpt2": {"weight_decay": 0.01},
        "weight_decay_cerebras": {"weight_decay": 0.33724}, "weight_tying": {"tie_weights": True},
        "weight_tying_gpt2_init": {"tie_weights": True, "init": "gpt2"},
        "gpt2_init": {"init": "gpt2"}, "no_amp": {"amp": "off", "tf32": False
                                                               }, "muon": {"optimizer": "muon"},
        "wsd": {"learning_rate": 1.4e-3, "schedule": "wsd", "warmup_fraction": 0.05},
        "rmsnorm": {"norm": "rmsnorm"}, "rope": {"position": "rope"}, "qk_norm": {"qk_norm": True},
        "relu2": {"activation": "relu2"}, "swiglu": {"activation": "swiglu"},
        "logit_softcap": {"logit_softcap": 30.0}, "zero_init": {"zero_init": True},
        "value_residual": {"value_residual": True}, "value_embeddings": {"value_embeddings": True},
        "x0_lambdas": {"x0_lambdas": True}, "embed_norm": {"embed_norm": True}, "embedding_lr": {
            "embedding_lr": 155.0, "embed_norm": True
        }, "head_lr": {"head_lr": 0.89}, "scalar_lr": {"scalar_lr": 3.3}, "beta2": {"beta2": 0.95},
        "adamw_weight_decay": {"adamw_weight_decay": 0.001}, "cautious_decay": {
            "cautious_decay": True
        }, "tail_average": {"tail_average": 0.05}, "head_dim_128": {"n_head": 6},
        "decay_to_zero": {"schedule": "wsd", "cooldown_fraction": 0.7,
                          "min_lr_ratio": 0.0}, "normuon": {"optimizer": "normuon"}
    }
    files = sorted((HERE / "config" / "interventions").glob("*.py"))
    assert {file.stem for file in files} == set(expected)
    default = vars(config.load([]))
    for file in files:
        changed = {
            key: value
            for key, value in vars(config.load([str(file)])).items() if value != default[key]
        }
        assert changed.pop("name", "baseline") == file.stem
        assert changed == expected[file.stem]


@pytest.mark.parametrize("on_one, on_eight, same, micro_steps",
                         [("local_3090", "cloud", (), (16, 1)),
                          ("modern_3090", "modern_cloud", ("batch_size",), (32, 4))])
def test_local_and_cloud_are_one_run(on_one, on_eight, same, micro_steps):
    local, cloud = (config.load([f"config/{name}.py"]) for name in (on_one, on_eight))
    differ = {key for key in config.OPTIONS if getattr(local, key) != getattr(cloud, key)}
    assert differ == {"name", "batch_size"} - set(same)
    assert (train.count_grad_accum_steps(local, 1),
            train.count_grad_accum_steps(cloud, 8)) == micro_steps


def test_overnight_run(small_run, capsys):
    """What its comment says: steps, parameters, operations, gibibytes; and it trains, here at a
    small size."""
    options = config.load(["config/overnight_3090.py"])
    gpt = GPT(GPTConfig.from_options(vars(options) | {"vocab_size": 50257}))
    text = (HERE / "config/overnight_3090.py").read_text()
    assert count_steps(options) == 3250
    assert count_steps(config.load(["config/modern_3090.py"])) == 6219
    operations = gpt.flops_per_token() * options.max_tokens
    assert f"{gpt.flops_per_token() / 1e6:.1f} MFLOP a token" in text
    assert f"= {operations:.3e}".replace("e+", "e") in text
    assert f"{gpt.num_params():,} parameters" in text
    counted = count_training_memory(gpt, options.batch_size, torch.bfloat16) / 2**30
    assert f"{counted:.1f} GiB by count_training_memory" in text
    assert f"{operations / (0.55 * 71e12) / 3600:.1f}" == "10.4"
    folder = small_run("run", "config/overnight_3090.py", "--learning_rate=4.5e-3", "--max_steps=3",
                       "--amp=bfloat16")
    got = losses(folder)
    assert len(got) == 3 and got[2] < got[1] < got[0] < 7


def test_global_batch_that_does_not_divide():
    with pytest.raises(UserError, match="; batch_size could be 4$"):
        train.count_grad_accum_steps(config.load(["--batch_size=8", "--global_batch_size=8"]), 2)
    with pytest.raises(UserError, match="global_batch_size could be 80 or 160"):
        train.count_grad_accum_steps(config.load(["--batch_size=16", "--global_batch_size=96"]), 5)
