"""nanolab.load, and the notebook that uses it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import nanolab
from conftest import HERE
from nanolab.common import UserError

MODERN = ["--position=rope", "--qk_norm", "--qk_bound=3", "--value_embeddings", "--x0_lambdas",
          "--embed_norm", "--logit_softcap=15", "--activation=relu2"]
TEXT = "def f(x):\n    return x  # é\n"
OF_TRAINING = {"train", "datasets", "wandb", *(f"nanolab.{name}" for name in (
    "optim", "start", "runlog", "memory", "evaluation", "dataset_writer", "log"))}


@pytest.fixture(params=[[], MODERN], ids=["gpt2", "modern"])
def lm(shared_run, request):
    return nanolab.load(shared_run(*request.param) / "best.pt", "cpu")


def logits_of(lm, tokens):
    with torch.no_grad():
        return lm.model(torch.tensor([tokens]))[0]


def test_generate(lm):
    """What sample.py would print; any length, from nothing, and another text for another seed."""
    text = lm.generate("class A" * 9, max_new_tokens=40)
    assert text.startswith("class A" * 9) and text == lm.generate("class A" * 9, 40)
    assert text != lm.generate("class A" * 9, 40, seed=1)
    assert isinstance(lm.generate(max_new_tokens=1), str)


def test_loss(lm):
    """Every byte counts, the first one too, and each is predicted from its own window of 32."""
    data = list((TEXT * 3).encode())
    tokens, expected = [lm.tokenizer.eot_token, *data], []
    for i in range(0, len(data), 32):
        targets = torch.tensor(data[i:i + 32])
        logits = logits_of(lm, tokens[i:i + len(targets)])
        expected.append(F.cross_entropy(logits, targets, reduction="none"))
    nats, bits, per_token = lm.loss(TEXT * 3)
    assert torch.allclose(per_token, torch.cat(expected), atol=1e-5)
    assert nats == pytest.approx(per_token.mean().item(), rel=1e-5)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-5)  # a token is a byte
    with pytest.raises(UserError, match="no tokens"):
        lm.loss("")


def test_attention(lm):
    """Rows are distributions over earlier tokens; a block computes its output from them."""
    weights, n = lm.attention(TEXT), len(lm.tokens(TEXT))
    assert weights.shape == (2, 2, n, n) and "".join(lm.tokens("ab c")) == "ab c"
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, n)) and weights.triu(1).max() == 0
    mixed, heads = [], []
    attention = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **options: (
            heads.append(v), mixed.append(attention(q, k, v, **options)), mixed[-1])[-1])
        logits_of(lm, list(TEXT.encode()))
    assert torch.allclose(weights @ torch.cat(heads), torch.cat(mixed), atol=1e-5)
    with pytest.raises(UserError, match="34 tokens"):
        lm.attention("x" * 34)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 2}])
def test_options_of_sampling(lm, options):
    with pytest.raises(UserError, match=f"{[*options][0]} must be from"):
        lm.generate(TEXT, **options)


def test_no_memory_is_no_damage(shared_run, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="allocate"):
        nanolab.load(shared_run())


def test_hidden_states(lm):
    """The last one, normalised, gives the model's logits; the first is of the embeddings."""
    states, tokens = lm.hidden_states(TEXT), list(TEXT.encode())
    logits = lm.model.logits(lm.model.ln_f(states[-1]))
    assert torch.allclose(logits, logits_of(lm, tokens), atol=1e-5)
    assert states.shape == (3, len(tokens), 32)
    assert not any(module._forward_hooks for module in lm.model.modules())
    if lm.model.wpe is not None:
        embeddings = lm.model.wte(torch.tensor(tokens)) + lm.model.wpe.weight[:len(tokens)]
        assert torch.allclose(states[0], embeddings)


def test_characters(shared_run, tmp_path):
    """nanoGPT's characters have no end of text: the first of a text is not predicted."""
    checkpoint = torch.load(shared_run() / "best.pt", weights_only=True)
    weights = {name: p[:3] if len(p) == 257 else p for name, p in checkpoint["model"].items()}
    torch.save({**checkpoint, "model": weights, "tokenizer": 'character:"abc"',
                "config": {**checkpoint["config"], "vocab_size": 3}}, tmp_path / "abc.pt")
    lm = nanolab.load(tmp_path / "abc.pt", "cpu")
    expected = F.cross_entropy(logits_of(lm, [2, 0]), torch.tensor([0, 1]))
    assert lm.loss("cab").nats == pytest.approx(expected.item(), rel=1e-5)
    assert lm.tokens("cab") == ["c", "a", "b"] and set(lm.generate("a", 20)) <= set("abc")
    for fails in (lambda: lm.loss("abd"), lm.generate):
        with pytest.raises(UserError, match="no tokens for"):
            fails()


def test_notebook(tmp_path, data_dir):
    """All of its cells, in order, of which the training is shorter here; from the folder that it
    lies in, as Jupyter does. nanolab.load loads no training code."""
    copy = tmp_path / "nanolab"  # so that the repository stays as it is
    copy.mkdir()
    for name in ("train.py", "model.py", "config", "nanolab", "docs"):
        (copy / name).symlink_to(HERE / name)
    (copy / "data").symlink_to(data_dir)
    cells = json.loads((HERE / "docs" / "first_model.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = code.replace("max_steps=120", "max_steps=30") + "\nprint('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": ""}, timeout=600)
    assert done.returncode == 0, done.stderr
    python, english, disorder = [float(line.split()[0]) for line in done.stdout.splitlines()
                                 if "bits per byte: " in line]
    assert python < english and python < disorder, done.stdout
    assert not OF_TRAINING & set(done.stdout.partition("\nmodules:")[2].split())
