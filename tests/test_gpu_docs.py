"""docs/gpu.md and the scripts behind it, without a GPU: the predicted figures are those of the
code, and what measures on a GPU runs on a CPU."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench.gpu
import nanolab.kernels
import nanolab.optim
from bench import gpu_predicted
from conftest import HERE, call, watch_waits
from model import GPT, GPTConfig
from nanolab.common import run_script
from nanolab.optim import Muon

DOC = HERE / "docs/gpu.md"


def test_predicted_figures_are_computed():
    """docs/gpu.md has each paragraph of bench/gpu_predicted.py as it is printed, but for the
    columns of measured figures. Elsewhere it names no figure that is not among these."""
    lines = DOC.read_text().splitlines()
    unexplained = list(lines)
    for paragraph in gpu_predicted.paragraphs():
        computed = paragraph.splitlines()
        n_cells = -2 if computed[0].endswith("| measured |") else None

        def without_measured(line):
            return line.split("|")[:n_cells]

        start = next(i for i, line in enumerate(lines) if line == computed[0])
        in_docs = lines[start:start + len(computed)]
        assert [*map(without_measured, in_docs)] == [*map(without_measured, computed)]
        unexplained = [line for line in unexplained if line not in in_docs]
    prose = re.sub("\n## Measured.*?\n## ", "", "\n".join(unexplained), flags=re.DOTALL)
    computed = "\n".join(gpu_predicted.paragraphs())
    for figure in re.findall(r"\d[\d,.]* (?:[GM]i?B|[TGM]FLOP|m?s|h|million|tokens/s)\b", prose):
        assert figure in computed, figure


def test_measured_table_is_that_of_the_script():
    assert f"| {' | '.join(bench.gpu.HEADER)} |" in DOC.read_text()


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, by operator: inputs that they need, and outputs."""

    CREATE = {"zeros", "zeros_like", "new_zeros", "copy_", "empty", "new_empty"}  # read no target

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and "view" not in name and "empty" not in name:
            read = args[1:] if name in self.CREATE else (args, kwargs)
            tensors = [*tree_leaves(read), *tree_leaves(result)]
            if result is None:  # _foreach_add_ and its like change their first argument
                tensors += tree_leaves(args[0])
            self.bytes[name] += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return result


def meta(*shape, **kwargs):
    return torch.empty(*shape, device="meta", **kwargs)


def test_head_moves_the_bytes_predicted(monkeypatch):
    """Each operator's and each compiled kernel's inputs and outputs, at the size that is predicted,
    by nanolab.kernels itself."""
    N, V, C = gpu_predicted.N, gpu_predicted.V, gpu_predicted.C
    traffic = Traffic()

    def loss_kernel(logits, targets, V, cap):
        traffic.bytes["kernels"] += logits.nbytes
        return meta(()), None

    def gradient_kernel(logits, *others):
        traffic.bytes["kernels"] += 2 * logits.nbytes

    monkeypatch.setattr(nanolab.kernels, "compiled_kernels", lambda: (loss_kernel, gradient_kernel))
    hidden, weight, targets = meta(N, C), meta(V, C), meta(N, dtype=torch.int64)
    with traffic:
        grads = torch.zeros_like(hidden), torch.zeros_like(weight)
        nanolab.kernels.sum_chunks_gpu(hidden, weight, targets, 0.0, torch.bfloat16, grads, True)
        for grad in grads:  # what HeadLoss.backward does
            grad.mul_(1.0)
    assert gpu_predicted.head_bytes() == pytest.approx(traffic.bytes.total(), rel=1e-3)
    assert gpu_predicted.head_bytes() < 10e9


ONE_PASS = """
import sys, torch, fake_cuda, nanolab.kernels
fake_cuda.pretend_cuda()
passes = fake_cuda.post_grad_passes

def show(graph, is_inference):
    passes(graph, is_inference)
    print([str(node.target) for node in graph.graph.nodes])
    sys.exit()

fake_cuda.post_grad_passes = show
torch._inductor.config.joint_graph_constant_folding = False
with fake_cuda.FakeTensorMode():
    logits = torch.empty(64, 320, dtype=torch.bfloat16, device="cuda")
    targets = torch.empty(64, 1, dtype=torch.int64, device="cuda")
    fake_cuda.count_bytes(nanolab.kernels.loss_of_logits, logits, targets, 301, 9.0)
"""


def test_loss_kernel_passes_over_a_row_once():
    """torch.compile recognises the sum of exponentials, and finds it together with the maximum."""
    result = call("-c", ONE_PASS, PYTHONPATH=str(HERE / "tests"))
    assert "prepare_softmax_online" in result.stdout, result.stderr


@pytest.mark.parametrize("n_ranks", [1, gpu_predicted.RANKS])
def test_muon_does_what_is_predicted(monkeypatch, n_ranks):
    """Operations and bytes of rank 0's step at GPT-2 small's shape, and what it gathers."""
    gathered = []
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: torch.bfloat16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: n_ranks > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: n_ranks)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_gather_single",
                        lambda whole, part: gathered.append(whole.nbytes))
    L, C = gpu_predicted.L, gpu_predicted.C
    groups = [{"params": [nn.Parameter(meta(rows, columns)) for rows, columns in shapes * L],
               "n_split": n_split}
              for n_split, shapes in ((3, [(3 * C, C)]), (1, [(C, C), (4 * C, C), (C, 4 * C)]))]
    muon = Muon(groups, lr=0.1, weight_decay=0.1)
    for _ in range(2):  # the first one makes the state
        gathered.clear()
        for group in groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            muon.step()
    products = traffic.bytes["bmm"] + traffic.bytes["baddbmm"]
    n_flops, n_bytes, elementwise, n_gathered = gpu_predicted.muon_work(n_ranks)
    assert flops.get_total_flops() == n_flops
    assert traffic.bytes.total() == pytest.approx(n_bytes, rel=0.01)
    assert traffic.bytes.total() - products == pytest.approx(elementwise, rel=0.01)
    assert sum(gathered) == n_gathered


def test_operations_are_the_models():
    gpt = gpu_predicted.empty_model(gpu_predicted.SHAPE)
    assert gpu_predicted.FLOPS[1] == gpt.flops_per_token()


def test_graphs_are_those_predicted(monkeypatch):
    """As many as torch.compile makes of a small model and of the head's kernels in a run."""
    compiled = Counter()

    def backend(name):
        def compile_graph(graph, inputs):
            compiled[name] += 1
            return graph.forward
        return compile_graph

    torch._dynamo.reset()
    kernels = [torch.compile(kernel, backend=backend("head")) for kernel in
               (nanolab.kernels.loss_of_logits, nanolab.kernels.logits_to_gradient_)]
    monkeypatch.setattr(nanolab.kernels, "compiled_kernels", lambda: kernels)
    monkeypatch.setattr(nanolab.kernels, "sum_chunks_cpu",
                        lambda *args: nanolab.kernels.sum_chunks_gpu(*args, True))
    gpt = GPT(GPTConfig(vocab_size=301, block_size=16, n_layer=2, n_head=2, n_embd=32))
    model = torch.compile(gpt, backend=backend("model"))
    tokens = torch.randint(301, (4, 17))

    def train(n=4):
        model.train()(tokens[:n, :-1], tokens[:n, 1:]).backward()

    @torch.no_grad()
    def validate(n=4):
        model.eval()(tokens[:n, :-1], tokens[:n, 1:])

    def later():
        for _ in range(2):
            train(), validate(), validate(3)

    steps = [train, validate, lambda: validate(3), later]
    for (when, in_model, in_head), step in zip(gpu_predicted.GRAPHS, steps, strict=True):
        compiled.clear()
        step()
        assert (compiled["model"], compiled["head"]) == (in_model, in_head), when
    torch._dynamo.reset()


def test_gpu_script_on_a_cpu(data_dir):
    """Every figure that needs no GPU is there, and the table has as many cells as its header."""
    flags = ["--device=cpu", "--batch_size=2", "--global_batch_size=2", "--max_steps=8",
             "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=300",
             f"--data_dir={data_dir}"]
    figures = bench.gpu.measure_in_new_process([*flags, "--amp=bfloat16"], largest=4)
    assert figures["largest_batch"] == 4
    caption, _, header, line, row = bench.gpu.format_table({"bfloat16": figures}, flags).split("\n")
    assert " ".join(flags) in caption
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert len(cells) == len(bench.gpu.HEADER) == header.count("|") - 1 == line.count("|") - 1
    assert cells[0] == "bfloat16" and cells[-2:] == ["", ""]  # a CPU's memory is not counted
    assert all(float(cell.strip("%").replace(",", "")) >= 0 for cell in cells[1:-2])


@pytest.mark.parametrize("flags, message, exit_code", [
    ([], "there is no CUDA GPU here", 1),
    (["--device=cpu", "--dropuot=1"], "did you mean 'dropout'", 2)])
def test_gpu_script_ends_with_one_line(monkeypatch, capsys, flags, message, exit_code):
    """Without a GPU, or with a wrong flag for train.py; before anything is measured."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_script(bench.gpu.main)
    out, err = capsys.readouterr()
    assert ended.value.code == exit_code and out == ""
    assert err.count("\n") == 1 and message in err


def test_watching_for_waits(small_run, monkeypatch):
    """What tests/test_gpu.py watches with: waits are forbidden in the watched steps, and allowed
    between them."""
    modes = []
    watched = watch_waits(monkeypatch, modes.append, first_step=1)
    small_run("run", "--max_steps=3")
    assert watched == [1, 2]
    assert modes == ["default", *["error", "default"] * 2]


FAKE_GPU = "import torch\ntorch.cuda.is_available = lambda: True\n"
WHO_SEES_IT = """
import os, subprocess, sys, pytest, torch

def visible():
    show = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    child = subprocess.run(show, capture_output=True, text=True).stdout.strip()
    return torch.cuda.is_available(), child

def test_before():
    assert visible() == (False, "")

@pytest.mark.gpu
def test_gpu():
    assert visible() == (True, "5")

def test_after():
    assert visible() == (False, "")
"""


def test_only_gpu_tests_see_the_gpu(tmp_path):
    """Under the rules of tests/conftest.py, in one process, and in those that a test starts."""
    (tmp_path / "fake_gpu.py").write_text(FAKE_GPU)
    (tmp_path / "test_it.py").write_text(WHO_SEES_IT)
    path = os.pathsep.join([str(tmp_path), str(HERE / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "fake_gpu", "-p", "conftest", "-p", "no:xdist",
         "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "5"})
    assert "3 passed" in result.stdout, result.stdout + result.stderr
