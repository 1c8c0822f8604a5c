"""CUDA graphs on a CPU, as inductor makes them without trees, but for its kernels: torch's own code
for static inputs and outputs (cudagraphify_impl), and graphs that record operators instead."""

from functools import partial
from unittest.mock import MagicMock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import cudagraphify_impl, get_static_input_idxs
from torch._inductor.utils import count_tangents
from torch.utils._pytree import tree_leaves

from conftest import Operators


class Recording(Operators):
    """Keeps every operator with its tensors. A replay writes to the same memory."""

    def __init__(self):
        self.calls = []
        super().__init__(lambda *call: self.calls.append(call))

    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def use_fake_graphs(monkeypatch):
    """-> a list that gets every graph"""
    graphs = []
    for name in ("Stream", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Recording()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    return graphs


def backend(give=list):
    """For torch.compile. give: what becomes of a graph's static outputs before autograd has them.
    """
    def capture(fixed, graph, inputs):
        """-> a function that is captured when it is first called"""
        run, static = [], fixed(graph)

        def captured(arguments):
            if not run:
                run.append(cudagraphify_impl(make_boxed_func(graph.forward), arguments, static))
            return give(run[0](list(arguments)))
        captured._boxed_call = True
        return captured
    # which inputs stay where they are, as in torch._inductor.compile_fx
    forward = partial(capture, lambda graph: get_static_input_idxs(0))
    return aot_autograd(
        fw_compiler=forward, inference_compiler=forward,
        bw_compiler=partial(capture, lambda graph: range(count_tangents(graph))),
        partition_fn=min_cut_rematerialization_partition)
