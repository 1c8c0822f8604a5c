"""The model as a whole: its size and first loss, its operations, any device, any flags. The
mathematics of each flag is in test_interventions.py."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model
from conftest import Operators, equal_weights, flag_sets, small_gpt_config
from model import GPT, GPTConfig
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.head import HeadLoss

FLAG_SETS = flag_sets(4)


@pytest.mark.parametrize("options, n_params, low, high", [
    ({}, 163_009_536, 10.9, 11.1),
    ({"tie_weights": True}, 124_412_160, 440, 500)])
def test_size_and_first_loss(options, n_params, low, high):
    """As published: 163.0 M parameters start near 11.0, tied ones at 460 to 480."""
    gpt = GPT(GPTConfig(**options)).eval()
    tokens = torch.randint(50257, (1, 65), generator=torch.Generator().manual_seed(1))
    assert gpt.num_params() == n_params
    with torch.no_grad():
        assert low < gpt(tokens[:, :-1], tokens[:, 1:]).item() < high


@pytest.mark.parametrize("flags", [{"tie_weights": True}, {"activation": "swiglu", "n_layer": 3,
                                                           "value_embeddings": True}])
def test_operations(flags):
    """Those of all matrix products, forward and backward, as torch counts them."""
    gpt, tokens = GPT(small_gpt_config(**flags)), torch.zeros(4, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        gpt(tokens).sum().backward()
    assert gpt.flops_per_token() * tokens.numel() == counted.get_total_flops()


def assert_one_device(function, args, kwargs, result):
    """For all tensors of an operator but single numbers."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
    assert len({x.device for x in tensors}) <= 1, function


@pytest.mark.parametrize("i", range(len(FLAG_SETS)))
def test_no_tensor_is_on_another_device(monkeypatch, i):
    """A device without numbers stands for a GPU."""
    monkeypatch.setattr(model, "check_finite", lambda logits: None)
    gpt = GPT(small_gpt_config(**FLAG_SETS[i])).to("meta")
    tokens = torch.zeros(4, 14, dtype=torch.int64, device="meta")
    with Operators(assert_one_device):
        hidden = gpt.hidden_states(tokens).flatten(0, 1)
        HeadLoss.apply(hidden, gpt.head.weight, tokens.flatten(), gpt.config.logit_softcap,
                       torch.bfloat16, True).backward()
        text = gpt.generate(tokens, 5, top_k=3, top_p=0.9)
    assert {x.device.type for x in (text, *(p.grad for p in gpt.parameters()))} == {"meta"}


def test_unmatched_parameter_is_an_error(monkeypatch):
    monkeypatch.setattr("model.Attention", lambda *args: nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="no initialisation rule matches"):
        GPT(small_gpt_config())


@pytest.mark.parametrize("i", range(len(FLAG_SETS)))
def test_flags_in_any_combination(small_run, i):
    """A run learns with every parameter and resumes exactly. It generates with the cache what it
    would without one, also beyond the context, and in 16 bits."""
    flags = ["--n_layer=3", "--block_size=11", "--max_steps=4",
             *(f"--{key}={value}" for key, value in FLAG_SETS[i].items())]
    whole = small_run("whole", *flags)
    small_run("parts", *flags, "--max_steps=2")
    small_run("parts", *flags, "--resume")
    assert equal_weights(whole / "last.pt", whole.parent / "parts" / "last.pt")
    gpt = load_model(read_checkpoint(whole / "last.pt"))
    start = GPT(gpt.config)
    for name, p in gpt.named_parameters():
        assert not p.equal(start.get_parameter(name)), name

    draw = torch.Generator().manual_seed(i)
    for block in gpt.blocks:  # attention that matters, as it does not yet after 4 steps
        for matrix in (block.attn.qkv.weight, block.attn.proj.weight):
            nn.init.normal_(matrix, std=0.5, generator=draw)
    prompt = torch.randint(257, (3, 1 + 4 * i), generator=draw)
    text = gpt.generate(prompt, 30, temperature=0)
    read = prompt[:, -11:]
    for token in text[:, prompt.shape[1]:].T:
        read = read if read.shape[1] <= 11 else read[:, -6:]  # the rule of stream
        logits = gpt(read)[:, -1]
        most_likely = logits.max(dim=-1).values
        chosen = logits.gather(1, token[:, None])[:, 0]
        assert (chosen >= most_likely - 1e-5 * most_likely.abs()).all()
        read = torch.cat((read, token[:, None]), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpt.generate(prompt, 15).shape == (3, prompt.shape[1] + 15)
        loss = gpt(text[:, :11], text[:, 1:12])
    assert loss.item() == pytest.approx(gpt(text[:, :11], text[:, 1:12]).item(), rel=0.05)


@pytest.mark.parametrize("n_tokens, n_kept", [(2**15, 2), (2**15 + 1, 1)])
def test_large_activations_are_recomputed(n_tokens, n_kept):
    """Above 2**22 elements, what comes out of the activation is not stored."""
    mlp, kept = GPT(small_gpt_config()).blocks[0].mlp.to("meta"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        mlp(torch.empty(n_tokens, 32, device="meta"))
    assert kept.count((n_tokens, 128)) == n_kept
