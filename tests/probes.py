"""Ways to watch what torch does in a test: which graphs it compiles, when it reads the device, how
many bytes it moves and holds. And the GPU's branch of the head on a CPU."""

import random
import re
import sys
from dataclasses import fields

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

import nanolab.kernels
from model import GPTConfig


def flag_combinations(n_random, seed=0):
    """Each value of each switch of GPTConfig with the others at their defaults, and n_random
    combinations of all of them. A new switch is among them without a change here."""
    values = {}
    for field in fields(GPTConfig):
        if field.type is bool:
            values[field.name] = (False, True)
        elif field.type is str:
            values[field.name] = field.metadata["choices"]
        elif field.type is float:
            values[field.name] = (0.0, 0.1 if field.name == "dropout" else 9.0)
    single = [{name: value} for name in values for value in values[name]
              if value != getattr(GPTConfig, name)]
    draw = random.Random(seed)
    return [{}, *single, *({name: draw.choice(values[name]) for name in values}
                           for _ in range(n_random))]


def force_gpu_head(monkeypatch, compiled=True, kernels=None):
    """The head takes the GPU's branch on a CPU. kernels: what stands for the compiled ones."""
    def sum_chunks(*args):
        return nanolab.kernels.sum_chunks_gpu(*args, compiled)
    monkeypatch.setattr(nanolab.kernels, "sum_chunks_cpu", sum_chunks)
    if kernels:
        monkeypatch.setattr(nanolab.kernels, "compiled_kernels", lambda: kernels)


def counting_backend(graphs):
    """torch.compile's aot_eager, which also appends each graph that it compiles."""
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    return backend


class DeviceReads:
    """Notes, as (what, in which function), all that would make a GPU's program wait for the GPU:
    reading a tensor's numbers, and results whose size depends on them.

    On a CPU, tolist() and cpu() reach no operator, so Python's calls are watched; and for what
    torch does inside itself, the operators.
    """

    CALLS = {"item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__",
             "__index__", "__contains__", "__format__", "__repr__", "nonzero", "argwhere",
             "masked_select", "unique", "equal", "allclose", "is_nonzero", "tensor"}
    OPERATORS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2",
                 "unique_dim", "unique_consecutive", "equal", "repeat_interleave", "bincount"}

    def __init__(self):
        self.events = []
        self.modes = [Calls(self), Operators(self)]

    def note(self, what):
        frame = sys._getframe(2)
        while frame.f_code.co_filename.startswith((*torch.__path__, __file__)):
            frame = frame.f_back
        self.events.append((what, frame.f_code.co_name))

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class Calls(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        # to(device) goes to a GPU's place; only a place called by its name is the CPU for sure
        to_cpu = name == "to" and "cpu" in [x for x in (*args[1:], *(kwargs or {}).values())
                                            if isinstance(x, str)]
        if name in DeviceReads.CALLS or to_cpu:
            self.reads.note(name)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1])
        if name in DeviceReads.OPERATORS or by_mask:
            self.reads.note(name)
        return function(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write: every input and every output, whether it is
    needed or not, but those of views. And the most bytes of results alive at one time, and the most
    numbers in one float32 result."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most_alive = self.largest_float32 = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
                           for tree in ((args, kwargs), result))
        if function.namespace == "aten" and not function.is_view:
            self.bytes += sum(x.nbytes for x in inputs + outputs)
        for x in outputs:
            storage = x.untyped_storage()
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            if x.dtype is torch.float32:
                self.largest_float32 = max(self.largest_float32, x.numel())
        self.alive = {key: (storage, size) for key, (storage, size) in self.alive.items()
                      if not storage.expired()}
        self.most_alive = max(self.most_alive, sum(size for _, size in self.alive.values()))
        return result


def small_gpt_config(**flags):
    return GPTConfig(**{"vocab_size": 301, "block_size": 16, "n_layer": 2, "n_head": 2,
                        "n_embd": 32, "dropout": 0.0, **flags})


def without_progress(stderr):
    """The lines of a run's stderr that are not of its progress bar: warnings, errors. Not what
    torch for CUDA says of a machine that has none."""
    return [line for line in stderr.splitlines() if not re.fullmatch(r"\s*(\d+%\|.*)?", line)
            and "No CUDA runtime is found" not in line]
