"""z_loss, an option of the training: it changes the training loss alone."""

import pytest
import torch
import torch.nn.functional as F

from config import ARCHITECTURE_OPTIONS
from nanolab.head import HeadLoss, head_loss, softcap
from nanolab.log import having, read_entries


def plain(hidden, weight, targets, cap, z_loss):
    logits = softcap(hidden @ weight.T, cap)
    return F.cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("loss", ["cpu", "gpu"])
def test_values_and_gradients_are_those_of_the_formula(loss, cap):
    """On both paths, against autograd; that of the GPU runs on a CPU too."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 16), torch.randn(1100, 16)
    targets, results = torch.randint(1100, (70,)), []
    for function in (plain, head_loss if loss == "cpu" else lambda *args: HeadLoss.apply(
            *args[:4], torch.float32, True, args[4])):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = function(*inputs, targets, cap, 0.1)
        (3 * value).backward()
        results.append([value, *(x.grad for x in inputs)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_it_changes_the_training_loss_alone(small_run):
    """The first training loss has the term. Validations have the cross-entropy: that of the initial
    weights is the same."""
    logs = [read_entries(small_run(name, "--max_steps=2", "--eval_every=1", *flags) / "log.jsonl")
            for name, flags in (("without", []), ("with", ["--z_loss=0.1"]))]
    losses, val_losses = ([having(key, log)[0][key] for log in logs]
                          for key in ("loss", "val_loss"))
    assert val_losses[0] == val_losses[1]
    assert 2 < losses[1] - losses[0] < 5  # 0.1 log(Z)^2, and Z is about 257
    assert "z_loss" not in ARCHITECTURE_OPTIONS  # so no export knows it
