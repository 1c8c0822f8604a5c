"""One read of the device a step: the program runs ahead of a GPU but for that."""

import pytest
import torch

import model
import train
from probes import DeviceReads, force_gpu_head

FLAGS = ["--batch_size=2", "--max_steps=4", "--dropout=0.1", "--grad_clip=0.01",
         "--position=rope", "--activation=swiglu", "--value_residual", "--logit_softcap=9",
         "--x0_lambdas", "--value_embeddings", "--cautious_decay", "--tail_average=0.5"]


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
def test_a_step_reads_the_device_once(small_run, monkeypatch, optimizer, amp):
    """With 4 micro-steps, clipping, the GPU's branch of the head and activations computed anew."""
    force_gpu_head(monkeypatch, compiled=False)
    monkeypatch.setattr(model.MLP, "RECOMPUTE_ABOVE", 0)
    steps = []
    learning_rate_at = train.learning_rate_at

    def start_of_step(step, *args):
        steps.append(len(reads.events))
        return learning_rate_at(step, *args)
    monkeypatch.setattr(train, "learning_rate_at", start_of_step)
    with DeviceReads() as reads:
        small_run("run", *FLAGS, f"--optimizer={optimizer}", f"--amp={amp}")
    for start, end in zip(steps[1:-1], steps[2:]):  # the first and the last step do more
        assert reads.events[start:end] == [("tolist", "step_if_finite")]


@pytest.mark.parametrize(
    "what, read", [("item", lambda x: x[0].item()), ("tolist", torch.Tensor.tolist),
                   ("cpu", torch.Tensor.cpu), ("to", lambda x: x.to("cpu")),
                   ("numpy", torch.Tensor.numpy), ("__bool__", lambda x: bool(x[0])),
                   ("__float__", lambda x: float(x[0])), ("__format__", lambda x: f"{x[0]}"),
                   ("nonzero", lambda x: x.nonzero()), ("nonzero", lambda x: torch.where(x > 0)),
                   ("masked_select", lambda x: x.masked_select(x > 0)),
                   ("index", lambda x: x[x > 0]), ("equal", lambda x: torch.equal(x, x)),
                   ("tensor", lambda x: torch.tensor(1.0)),
                   ("_local_scalar_dense", lambda x: torch.ops.aten._local_scalar_dense(x[0])),])
def test_no_read_is_overlooked(what, read):
    """What the test above would see in a step, and what it would not: arithmetic alone."""
    x = torch.arange(3.0)
    with DeviceReads() as reads:
        (x * 2).sum().sqrt().clamp(max=1)
        x[1:] += torch.where(x[1:] > 0, x[:-1], 0)
        assert reads.events == []
        read(x)
    assert what in [event for event, function in reads.events]
