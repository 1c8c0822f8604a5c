"""The learning rate of each step, and which optimiser updates which parameter and how."""

import numpy as np
import pytest
import torch
from torch import nn

import config
import nanolab.optim
import train
from model import GPT, GPTConfig
from nanolab.logfile import read_log
from nanolab.optim import Muon, make_optimizer


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
    rates = [entry["lr"] for entry in read_log(folder / "log.jsonl")[0]]
    assert rates == pytest.approx([1e-8, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 11, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4, 1e-4], rel=1e-4)


def test_decay_groups():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=4))
    for decay, n_groups in (("all", 1), ("matrices", 2)):
        groups = make_optimizer(model, config.load([f"--decay={decay}", "--weight_decay=0.3"])).param_groups
        assert len(groups) == n_groups and groups[0]["weight_decay"] == 0.3
        assert decay == "all" or all(p.ndim < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_each_parameter_has_one_optimizer(monkeypatch):
    """Muon has the blocks' matrices, AdamW the rest, a tied head once; a parameter without an owner stops the run."""
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=2, n_head=1, n_embd=4, qkv_bias=True, tie_weights=True))
    options = config.load(["--optimizer=muon", "--decay=matrices", "--activation=swiglu"])
    muon, adamw = make_optimizer(model, options).optimizers
    assert {group["n_split"]: len(group["params"]) for group in muon.param_groups} == {3: 2, 1: 4, 2: 2}
    names = {p: name for name, p in model.named_parameters()}
    owned = [[names[p] for group in part.param_groups for p in group["params"]] for part in (muon, adamw)]
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")}
    assert set(owned[0]) == matrices and len(owned[0]) == 8
    assert sorted(owned[1]) == sorted(set(names.values()) - matrices) and "wte.weight" in owned[1]
    monkeypatch.setattr(model, "parameters", lambda: [*names, nn.Parameter(torch.zeros(2))])
    with pytest.raises(AssertionError, match="one owner"):
        make_optimizer(model, options)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_muon_is_torchs(monkeypatch, dtype, tolerance):
    """As torch.optim.Muon in its bfloat16, as on a GPU, and with that taken away, for every shape; Q, K and V stacked are
    each by itself."""
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: dtype)
    if not dtype:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    draw = torch.Generator().manual_seed(1)
    shapes = [(24, 8), (8, 24), (8, 8), (8, 8), (8, 8)]
    theirs = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs[:2]] + [nn.Parameter(torch.cat([p.detach() for p in theirs[2:]]))]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "n_split": 3}], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=draw)
        for p, grad in zip(ours, [*(p.grad for p in theirs[:2]), torch.cat([p.grad for p in theirs[2:]])]):
            p.grad = grad.clone()
        reference.step()
        muon.step()
    for our, their in zip(ours, [*theirs[:2], torch.cat(theirs[2:])], strict=True):
        assert torch.allclose(our, their, rtol=0, atol=tolerance)
