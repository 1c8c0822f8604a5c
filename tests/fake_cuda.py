"""What inductor's code for the head would move and hold on an A100, without a GPU. Prints JSON.

torch.compile traces the head on a CPU, with tensors that have no numbers. Its graphs are then
lowered for CUDA, as far as the list of kernels. For a process of its own, since it changes torch.
"""

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._inductor.scheduler
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.memory import prepare_planning_info
from torch._inductor.virtualized import V as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._ordered_set import OrderedSet

from nanolab.head import HeadLoss

ROWS, C, VOCAB_SIZE = 12 * 1024, 768, 50257  # one micro-batch of GPT-2 small
A100 = types.SimpleNamespace(name="A100", gcnArchName="", major=8, minor=0, warp_size=32,
                             multi_processor_count=108)


def pretend_cuda():
    for name, answer in {"is_available": True, "current_device": 0, "get_device_capability": (8, 0),
                         "get_device_properties": A100}.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    CudaInterface.get_device_properties = torch.cuda.get_device_properties  # of the compiler
    torch._inductor.scheduler.has_triton = lambda *args: True  # nothing is handed to it


def head_loss(hidden, weight, targets):
    return HeadLoss.apply(hidden, weight, targets, 30.0, torch.bfloat16, True)  # with softcap


def trace():
    """-> (the graphs of the forward and of the backward pass, their FakeTensorMode)"""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep,
                           partition_fn=min_cut_rematerialization_partition,
                           decompositions=select_decomp_table())
    with FakeTensorMode() as mode:
        hidden, weight = (torch.empty(n, C, requires_grad=True) for n in (ROWS, VOCAB_SIZE))
        compiled = torch.compile(head_loss, backend=backend, fullgraph=True)
        compiled(hidden, weight, torch.zeros(ROWS, dtype=torch.int64)).backward()
    return graphs, mode


def lower(graph, mode):
    """-> bytes that the CUDA kernels of a graph read and write, how many kernels, and the most
    bytes alive, the graph's inputs left out; by inductor's own count"""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with mode, inductor.set_fake_mode(mode):
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                  for x in inputs]
        graph = make_fx(graph)(*inputs)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with inductor.set_graph_handler(lowering), inductor.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            scheduler = lowering.scheduler
            peak, _ = prepare_planning_info(
                scheduler.nodes, scheduler.name_to_buf, scheduler.name_to_fused_node,
                OrderedSet(lowering.graph_inputs), OrderedSet(lowering.get_output_names()))
            return lowering.count_bytes()[0], len(scheduler.nodes), peak


if __name__ == "__main__":
    (forward, backward), mode = trace()
    saved = [node.meta["val"] for node in forward.graph.find_nodes(op="output")[0].args[0]]
    pretend_cuda()  # no trace comes after it: it would ask CUDA for its random state
    n_bytes, n_kernels, peaks = zip(*(lower(graph, mode) for graph in (forward, backward)))
    print(json.dumps({"bytes": sum(n_bytes), "kernels": sum(n_kernels), "peak": max(peaks),
                      "largest_saved": max(x.numel() for x in saved)}))
