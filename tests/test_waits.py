"""One read of the device a step: the program runs ahead of a GPU but for that."""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import conftest
import model
from conftest import Operators, force_gpu_head

# What would make a program wait for a GPU: reading numbers, and results whose size depends on them.
# On a CPU, tolist() and cpu() reach no operator, so Python's calls are watched; and for what torch
# does inside itself, the operators.
CALLS = {"item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__",
         "__index__", "__contains__", "__format__", "__repr__", "allclose", "is_nonzero", "tensor"}
OPERATORS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2",
             "unique_dim", "unique_consecutive", "equal", "repeat_interleave", "bincount"}
READS = []  # (what, in which function)


def note(what):
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith((*torch.__path__, __file__, conftest.__file__)):
        frame = frame.f_back
    READS.append((what, frame.f_code.co_name))


class Calls(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        # to(device) goes to a GPU's place; only a place called by its name is the CPU for sure
        to_cpu = name == "to" and "cpu" in [x for x in (*args[1:], *(kwargs or {}).values())
                                            if isinstance(x, str)]
        if name in CALLS or to_cpu:
            note(name)
        return function(*args, **(kwargs or {}))


def note_operator(function, args, kwargs, result):
    name = function.overloadpacket.__name__
    by_mask = name.startswith("index") and any(
        isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in tree_leaves(args[1:2]))
    if name in OPERATORS or by_mask:
        note(name)


FLAGS = ["--batch_size=2", "--max_steps=4", "--dropout=0.1", "--grad_clip=0.01", "--x0_lambdas",
         "--position=rope", "--activation=swiglu", "--value_residual", "--logit_softcap=9",
         "--value_embeddings", "--cautious_decay", "--tail_average=0.5"]


@pytest.mark.parametrize("optimizer, amp", [("adamw", "bfloat16"), ("normuon", "float16")])
def test_a_step_reads_the_device_once(small_run, monkeypatch, optimizer, amp):
    """With 4 micro-steps, clipping, the GPU's head and activations computed anew."""
    force_gpu_head(monkeypatch)
    monkeypatch.setattr(model.MLP, "RECOMPUTE_ABOVE", 0)
    READS.clear()
    starts = []
    with Calls(), Operators(note_operator):
        small_run("run", *FLAGS, f"--optimizer={optimizer}", f"--amp={amp}",
                  on_step=lambda step, model: starts.append(len(READS)))
    for start, end in zip(starts[1:-1], starts[2:]):  # the first and the last step do more
        assert READS[start:end] == [("tolist", "average_over_ranks")]


@pytest.mark.parametrize("what, read", [
    ("item", lambda x: x[0].item()), ("cpu", torch.Tensor.cpu), ("to", lambda x: x.to("cpu")),
    ("__bool__", lambda x: bool(x[0])), ("nonzero", lambda x: torch.where(x > 0)),
    ("index", lambda x: x[x > 0]), ("tensor", lambda x: torch.tensor(1.0)),
    ("_local_scalar_dense", lambda x: torch.ops.aten._local_scalar_dense(x[0]))])
def test_no_read_is_overlooked(what, read):
    """What the test above would see in a step, and what it would not: arithmetic alone."""
    READS.clear()
    x = torch.arange(3.0)
    with Calls(), Operators(note_operator):
        (x * 2).sum().sqrt().clamp(max=1)
        x[1:] += torch.where(x[1:] > 0, x[:-1], 0)
        assert READS == []
        read(x)
    assert what in [event for event, function in READS]
