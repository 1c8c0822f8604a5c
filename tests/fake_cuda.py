"""A GPU made of shapes: torch's fake CUDA tensors, which compute nothing, on a machine without one.

    python tests/fake_cuda.py model         # models, their losses, texts and optimisers
    python tests/fake_cuda.py bytes         # what inductor's code for the head would read and write

For a process of its own, since it changes torch. Prints JSON.
"""

import ctypes
import itertools
import json
import sys
import types
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import torch._inductor.config
import torch._inductor.scheduler
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import config
import model
import nanolab.kernels
from model import GPT, GPTConfig
from nanolab.devices import autocast, autocast_dtype
from nanolab.optim import make_optimizer
from probes import flag_combinations

CUDA = torch.device("cuda:0")
A100 = types.SimpleNamespace(
    type="cuda", index=0, name="A100", major=8, minor=0, cc=80, multi_processor_count=108,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    warp_size=32, total_memory=80 * 2**30, L2_cache_size=40 * 2**20)


def pretend_cuda():
    """Gives CUDA the device guard of the device `meta`: without one, torch built for CPUs ends the
    process where autograd asks for it."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 15).in_dll(library, name)
    guards[1] = guards[14]  # c10::DeviceType: CUDA, Meta
    torch.autograd.set_multithreading_enabled(False)
    for name, answer in {"is_available": True, "is_bf16_supported": True, "device_count": 1,
                         "current_device": 0, "get_device_capability": (8, 0),
                         "get_device_properties": A100}.items():
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    CudaInterface.get_device_properties = torch.cuda.get_device_properties  # of the compiler


def move(model):
    """model.to("cuda"), which fake parameters refuse."""
    moved = {}  # a tied matrix stays one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = moved.setdefault(p, nn.Parameter(p.detach().to(CUDA)))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(CUDA)
    return model


def run_model(flags, dtype, optimizer_name):
    """A step but for the backward pass, and a text longer than the context. Raises if a tensor is
    on the wrong device, or of the wrong type."""
    size = ["--vocab_size=301", "--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=32"]
    flags = [f"--{name}={value}" for name, value in flags.items()]
    options = config.load([*size, *flags, f"--optimizer={optimizer_name}", "--decay=matrices"])
    gpt = move(GPT(GPTConfig.from_options(vars(options))))
    tokens = torch.zeros(4, 16, dtype=torch.int64, device=CUDA)
    optimizer = make_optimizer(gpt, options)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    with autocast(dtype, CUDA):
        logits, loss = gpt(tokens), gpt(tokens, tokens)
        hidden = gpt.hidden_states(tokens).flatten(0, 1)
        compiled_loss = nanolab.kernels.head_loss_outside_graph(
            hidden, gpt.head.weight, tokens.flatten(), options.logit_softcap, True)
    assert logits.shape == (4, 16, 301) and logits.dtype == (dtype or torch.float32)
    for scalar in (loss, compiled_loss, scaler.scale(loss)):
        assert scalar.shape == () and scalar.dtype == torch.float32 and scalar.device == CUDA
    for p in gpt.parameters():
        p.grad = torch.empty_like(p)
    for _ in range(2):  # the first makes the state
        scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in gpt.parameters()])
        clip_grads_with_norm_(gpt.parameters(), 1.0, norm)
        optimizer.step()
        scaler.update()
    assert all(p.dtype == torch.float32 and p.device == CUDA for p in gpt.parameters())
    with autocast(dtype, CUDA):
        text = gpt.eval().generate(tokens[:, :14], 5, top_k=3)
    assert text.shape == (4, 19) and text.dtype == torch.int64 and text.device == CUDA


def run_models():
    """-> how many."""
    kernels = nanolab.kernels
    kernels.compiled_kernels = lambda: (kernels.loss_of_logits, kernels.logits_to_gradient_)
    model.check_finite = lambda logits: None  # fake tensors have no values
    kernels.EAGER_CHUNK = kernels.GPU_CHUNK = 25 * 320  # several chunks
    assert autocast_dtype("auto", CUDA) == torch.bfloat16
    pairs = list(itertools.product((None, torch.bfloat16, torch.float16), ("adamw", "muon")))
    *single, one, other = flag_combinations(2)
    cases = [(flags, *pairs[i % 6]) for i, flags in enumerate(single)]
    cases += [(flags, *pair) for flags in (one, other) for pair in pairs]
    for case in cases:
        with FakeTensorMode():
            try:
                run_model(*case)
            except Exception:
                print(case, file=sys.stderr)
                raise
    return len(cases)


def count_bytes(kernel, *args):
    """The bytes that inductor's CUDA kernels for kernel(*args) read and write, by its own count."""
    mode = args[0].fake_mode
    is_tensor = [isinstance(arg, torch.Tensor) for arg in args]
    tensors = [arg for arg, is_one in zip(args, is_tensor) if is_one]

    def of_tensors(*tensors):
        left = iter(tensors)
        return kernel(*(next(left) if is_one else arg for arg, is_one in zip(args, is_tensor)))

    traced = torch.func.functionalize(of_tensors, remove="mutations")
    graph = make_fx(traced, select_decomp_table())(*tensors)
    with V.set_fake_mode(mode):
        joint_graph_passes(graph)
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=tensors)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*tensors)
            lowering._update_scheduler()
            return lowering.count_bytes()[0]


def count_head_bytes(rows, vocab_size, padded):
    """-> {softcap: bytes of the two kernels for one chunk in bfloat16}"""
    torch._inductor.config.joint_graph_constant_folding = False  # it would compute
    torch._inductor.scheduler.has_triton = lambda *args: True  # nothing is handed to it
    with FakeTensorMode():
        logits = torch.empty(rows, padded, dtype=torch.bfloat16, device=CUDA)
        targets = torch.empty(rows, 1, dtype=torch.int64, device=CUDA)
        log_sum_exp = torch.empty(rows, 1, device=CUDA)
        return {cap: count_bytes(nanolab.kernels.loss_of_logits, logits, targets, vocab_size, cap)
                + count_bytes(nanolab.kernels.logits_to_gradient_, logits, targets, log_sum_exp,
                              vocab_size, cap) for cap in (0.0, 30.0)}


if __name__ == "__main__":
    pretend_cuda()
    what, *numbers = sys.argv[1:]
    print(json.dumps(run_models() if what == "model" else count_head_bytes(*map(int, numbers))))
