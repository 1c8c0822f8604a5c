"""Every tensor on the right device and of the right type, on a GPU that is only pretended."""

import sys
import subprocess

import pytest
import torch

from conftest import HERE
from nanolab.devices import machine
from probes import flag_combinations


def run_on_fake_cuda(*words):
    return subprocess.run([sys.executable, HERE / "tests/fake_cuda.py", *map(str, words)], cwd=HERE,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the device guards as Linux names them")
def test_the_model_on_cuda():
    """Forward pass, loss as in a compiled model and not, optimisers, text: all flags, float32,
    bfloat16 and float16, AdamW and Muon. A read of a tensor's numbers fails it too."""
    result = run_on_fake_cuda("model")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(flag_combinations(2)) + 10


def test_machine_is_what_the_run_used(monkeypatch):
    """A CPU's name for a run on the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA A100")
    assert "cores" in machine(torch.device("cpu")) and "NVIDIA" not in machine(torch.device("cpu"))
    assert machine(torch.device("cuda", 0)) == "1 x NVIDIA A100"
