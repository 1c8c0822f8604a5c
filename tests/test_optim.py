"""Optimisers and schedules, apart from their mathematics, which is in test_interventions.py."""

import pytest
import torch
from torch import nn

import nanolab.optim
from config import Config
from conftest import equal_weights
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.data import TokenDataset
from nanolab.optim import Muon, count_steps
from nanolab.options import load


def test_the_published_runs_have_as_many_steps():
    assert count_steps(load(Config, ["config/interventions/schedule_learning_rate.py"])) == 33_165


def test_muon_in_16_bits_is_torchs(monkeypatch):
    """As on a GPU, for every shape."""
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    theirs = [nn.Parameter(torch.randn(shape, generator=draw))
              for shape in [(24, 8), (8, 24), (8, 8)]]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours}], 0.1, 0.3)
    for _ in range(5):
        for our, their in zip(ours, theirs):
            our.grad = their.grad = torch.randn(their.shape, generator=draw)
        reference.step()
        muon.step()
    for our, their in zip(ours, theirs):
        assert torch.allclose(our, their, rtol=0, atol=1e-2)


def test_tail_average(small_run, output_of, tiny_data):
    """The last validation measured the average of the last 4 of 10 steps' weights, best.pt has it,
    and eval.py says so. The training is as without it."""
    flags = [*tiny_data, "--tie_weights", "--init=gpt2", "--learning_rate=1e-2"]
    plain = read_checkpoint(small_run("plain", *flags) / "last.pt")["model"]
    run = small_run("run", *flags, "--tail_average=0.4", "--eval_every=5")
    best = read_checkpoint(run / "best.pt")
    assert best["averaged_steps"] == 4 and equal_weights(run / "best.pt", run / "last.pt")
    assert all(torch.equal(p, best["training_model"][name]) for name, p in plain.items())
    data = TokenDataset(best["config"]["data_dir"], "tiny", "val", 16)
    loss = load_model(best)(*data.batch(range(len(data)))).item()
    assert loss == pytest.approx(best["val_loss"], abs=1e-5)
    assert "average of the last 4 steps' weights" in output_of("eval", "--ckpt", run / "best.pt")
