"""Optimisers and schedules, apart from their mathematics, which is in test_interventions.py: the
published schedule, Muon in 16 bits, the average of the last weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import nanolab.optim
from config import Config
from conftest import equal_weights, evaluate
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.data import TokenDataset
from nanolab.optim import Muon, count_steps, learning_rate_at
from nanolab.options import load


def test_schedule_is_the_published_one():
    """Up to what learning_rate_at says: the published runs chained two of torch's schedulers."""
    config = load(Config, ["config/interventions/schedule_learning_rate.py"])
    n_steps = count_steps(config)
    rates = [learning_rate_at(step, n_steps, config) for step in range(n_steps)]
    assert n_steps == 33_165 and np.argmax(rates) == 1658
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.4e-3)
    scheduler = SequentialLR(optimizer, [LinearLR(optimizer, 1e-5, total_iters=1658),
                                         CosineAnnealingLR(optimizer, n_steps - 1658, 1.4e-4)],
                             milestones=[1658])
    published = []
    optimizer.step()  # or the scheduler would warn
    for _ in range(n_steps):
        published.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    np.testing.assert_allclose(rates, published, rtol=1.2e-4)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_muon_is_torchs(monkeypatch, dtype, tolerance):
    """In torch's bfloat16, as on a GPU, and with that taken away, for every shape; three matrices
    in one weight are each by itself."""
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: dtype)
    if not dtype:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    draw = torch.Generator().manual_seed(1)
    theirs = [nn.Parameter(torch.randn(shape, generator=draw))
              for shape in [(24, 8), (8, 24), (8, 8), (8, 8), (8, 8)]]

    def stacked(tensors):
        return [x.detach().clone() for x in (*tensors[:2], torch.cat(list(tensors[2:])))]
    ours = [nn.Parameter(p) for p in stacked(theirs)]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "n_split": 3}], 0.1, 0.3)
    for _ in range(5):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=draw)
        for p, grad in zip(ours, stacked([p.grad for p in theirs]), strict=True):
            p.grad = grad
        reference.step()
        muon.step()
    for our, their in zip(ours, stacked(theirs), strict=True):
        assert torch.allclose(our, their, rtol=0, atol=tolerance)


def test_tail_average(small_run, monkeypatch, capsys, tiny_data):
    """The mean of the weights of the last 4 of 10 steps: the last validation measured it, best.pt
    has it and eval.py says so. The training is as without it, also when resumed within the 4."""
    flags = [*tiny_data, "--tie_weights", "--init=gpt2", "--learning_rate=1e-2"]
    weights = []
    plain = small_run("plain", *flags, on_step=lambda step, model: weights.append(
        {name: p.clone() for name, p in model.state_dict().items()}))
    weights.append(read_checkpoint(plain / "last.pt")["model"])
    flags += ["--tail_average=0.4", "--eval_every=5"]
    run = small_run("run", *flags)
    best = read_checkpoint(run / "best.pt")
    assert best["averaged_steps"] == 4 and equal_weights(run / "best.pt", run / "last.pt")
    for name, mean in best["model"].items():
        expected = torch.stack([each[name] for each in weights[-4:]]).mean(dim=0)
        assert torch.allclose(mean, expected, atol=1e-7), name
        assert torch.equal(best["training_model"][name], weights[-1][name])
    data = TokenDataset(best["config"]["data_dir"], "tiny", "val", 16)
    loss = load_model(best)(*data.batch(range(len(data)))).item()
    assert loss == pytest.approx(best["val_loss"], abs=1e-5)
    assert "average of the last 4 steps' weights" in evaluate(monkeypatch, capsys, "--ckpt",
                                                              run / "best.pt")

    def fail(step, model):
        if step == 8:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        small_run("parts", *flags, "--save_every=8", on_step=fail)
    assert read_checkpoint(run.parent / "parts" / "last.pt")["averaged_steps"] == 2
    small_run("parts", *flags, "--save_every=8", "--resume")
    assert equal_weights(run / "last.pt", run.parent / "parts" / "last.pt")
