"""The model: its size and start, what it sees, its loss and gradients, every combination of its
flags."""

import numpy as np
import pytest
import torch
from torch import nn

import model
import nanolab.kernels
from conftest import assert_same_logits, equal_weights, run_main
from model import GPT, GPTConfig
from nanolab.common import UserError
from nanolab.memory import count_training_memory


@pytest.mark.parametrize("options, n_params, low, high", [
    ({}, 163_009_536, 10.9, 11.1),
    ({"qkv_bias": True}, 163_037_184, 10.9, 11.1),
    ({"tie_weights": True}, 124_412_160, 440, 500),
    ({"tie_weights": True, "init": "gpt2"}, 124_412_160, 10.9, 11.1),
])
def test_size_and_first_loss(options, n_params, low, high):
    """As published: 163.0 M parameters start near 11.0, tied ones at 460-480 unless initialised as
    GPT-2."""
    model = GPT(GPTConfig(**options)).eval()
    tokens = torch.randint(50257, (2, 65), generator=torch.Generator().manual_seed(1))
    assert model.num_params() == n_params
    with torch.no_grad():
        assert low < model(tokens[:, :-1], tokens[:, 1:]).item() < high


def test_initial_weights_are_the_published_ones():
    """Seed 42 gives what the published code's constructors draw after torch.manual_seed(42), QKV
    bias or not."""
    size = GPTConfig(vocab_size=101, block_size=16, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(42)
    published = [nn.Embedding(101, 32).weight, nn.Embedding(16, 32).weight]
    for _ in range(2):
        query, key, value = (nn.Linear(32, 32, bias=False).weight for _ in range(3))
        out, up, down = nn.Linear(32, 32), nn.Linear(32, 128), nn.Linear(128, 32)
        published += [torch.cat((query, key, value)), out.weight, out.bias, up.weight, up.bias,
                      down.weight, down.bias]
    published.append(nn.Linear(32, 101, bias=False).weight)
    size.qkv_bias = True
    model = GPT(size, seed=42)
    drawn = [
        p for name, p in model.named_parameters()
        if "ln_" not in name and not name.endswith("qkv.bias")
    ]
    assert len(drawn) == len(published) and all(map(torch.equal, drawn, published))


def test_zero_init():
    """The residual projections start at 0, biases too; every other weight starts as without it."""
    size = {"vocab_size": 11, "block_size": 4, "n_layer": 2, "n_head": 1, "n_embd": 8}
    plain = GPT(GPTConfig(**size))
    for name, p in GPT(GPTConfig(**size, zero_init=True)).named_parameters():
        expected = torch.zeros_like(p) if ".proj." in name else plain.get_parameter(name)
        assert torch.equal(p, expected), name


def test_lambdas_start_as_the_plain_model():
    """To the last bit, with every other weight as without them; 24 numbers in 12 layers."""
    size = {"vocab_size": 50, "block_size": 16, "n_layer": 12, "n_head": 2, "n_embd": 32,
            "dropout": 0.0}
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    plain, ours = GPT(GPTConfig(**size)), GPT(GPTConfig(**size, x0_lambdas=True))
    assert torch.equal(plain(tokens), ours(tokens)) and ours.num_params() == plain.num_params() + 24
    with torch.no_grad():
        ours.x_lambdas[7], ours.x0_lambdas[7] = 2.0, 3.0
        seen = {}
        for i in (0, 6, 7):
            ours.blocks[i].register_forward_hook(
                lambda block, args, out, i=i: seen.update({i: (args[0], out[0])}))
        ours(tokens)
    assert torch.allclose(seen[7][0], 2 * seen[6][1] + 3 * seen[0][0], atol=1e-5)


def test_value_embeddings():
    """In every second block from the last on; there the values are mixed half and half with what
    the token looks up. All other weights start as without them; parameters as counted, operations
    as before."""
    size = {"vocab_size": 50, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 32,
            "dropout": 0.0, "qkv_bias": True}
    plain, ours = GPT(GPTConfig(**size)), GPT(GPTConfig(**size, value_embeddings=True))
    assert all(torch.equal(p, ours.get_parameter(name)) for name, p in plain.named_parameters())
    assert ours.num_params() == plain.num_params() + 2 * (50 * 32 + 1)
    assert ours.flops_per_token() == plain.flops_per_token()
    counted = [count_training_memory(gpt, 2, torch.bfloat16) for gpt in (plain, ours)]
    assert 16 * 2 * (50 * 32 + 1) < counted[1] - counted[0] < 16 * 2 * (50 * 32 + 1) + 20_000
    tokens, x = torch.arange(32).view(2,
                                      16), torch.randn(2, 16, 32,
                                                       generator=torch.Generator().manual_seed(1))
    for block, same in zip(ours.blocks, plain.blocks):
        (_, mixed), (_, values) = block.attn(x, tokens), same.attn(x, tokens)
        if block is not ours.blocks[1]:
            looked_up = block.attn.value_embedding.weight[tokens].view(2, 16, 2, 16).transpose(1, 2)
            values = (values + looked_up) / 2
        assert torch.allclose(mixed, values, atol=1e-6)


def test_embed_norm():
    """Twice the embeddings are the same model."""
    gpt = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0,
                        position="rope", embed_norm=True))
    tokens = torch.arange(16)[None]
    before = gpt(tokens)
    with torch.no_grad():
        gpt.wte.weight *= 2
    assert torch.allclose(gpt(tokens), before, atol=1e-5)


def test_unmatched_parameter_is_an_error(monkeypatch):
    monkeypatch.setattr("model.Attention", lambda *args: nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="no initialisation rule matches"):
        GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=4))


def test_model_sees_the_past_only():
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:10].max() < 1e-5 < difference[10:].min()


@pytest.mark.parametrize("dtype, scale, tolerance", [(torch.float32, 1, 1e-5),
                                                     (torch.bfloat16, 1, 0.03),
                                                     (torch.float16, 2**12, 0.003)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_plain_ones(monkeypatch, dtype, scale, tolerance, softcap, tied):
    """In chunks, with activations computed anew, in 16 bits (on a vocabulary that is no multiple of
    64), scaled or compiled: what cross_entropy of all the logits gives in float32; and no tensor of
    all logits is kept."""
    monkeypatch.setattr(nanolab.kernels, "EAGER_CHUNK", 301 * 40)
    monkeypatch.setattr(nanolab.kernels, "CPU_SLICE", 128)
    monkeypatch.setattr(model.MLP, "RECOMPUTE_ABOVE", 0)
    gpt = GPT(GPTConfig(vocab_size=301, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0,
                        init="gpt2", tie_weights=tied, logit_softcap=softcap))
    nn.init.normal_(gpt.head.weight, std=0.5,
                    generator=torch.Generator().manual_seed(2))  # logits that the cap bends
    tokens = torch.randint(301, (8, 17), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain = nn.functional.cross_entropy(gpt(inputs).flatten(0, 1), targets.flatten())
    plain.backward()
    expected = {name: p.grad for name, p in gpt.named_parameters()}
    for loss_of in (gpt, torch.compile(gpt, backend="aot_eager")):
        gpt.zero_grad()
        kept = []
        with (torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                       lambda t: t),
              torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)):
            loss = loss_of(inputs, targets)
        (loss * scale).backward()
        assert loss.item() == pytest.approx(plain.item(),
                                            rel=tolerance / 10) and max(kept) < 8 * 16 * 301
        for name, p in gpt.named_parameters():
            assert (p.grad / scale
                    - expected[name]).norm() <= tolerance * expected[name].norm(), name
    with torch.no_grad():
        assert gpt.eval()(inputs, targets).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("rows",
                         [(1, 1), (3, 7), (4, 64)])  # one image of one column, and sixteen of two
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_products_are_the_same_by_either_library(monkeypatch, rows, dtype, tolerance):
    """Whichever CPU this is: a product as a convolution is F.linear's, and so are its gradients."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(*shape, generator=draw).to(dtype).requires_grad_()
                             for shape in ((*rows, 48), (80, 48), (80,), (*rows, 80)))
    answers = {}
    for idles in (False, True):
        monkeypatch.setattr(nanolab.kernels, "USE_ONEDNN", idles)
        y = nanolab.kernels.linear(x, weight, bias)
        own = nanolab.kernels.linear_backward(grad.detach().flatten(0, 1), x.detach().flatten(0, 1),
                                              weight.detach())
        answers[idles] = (y, *torch.autograd.grad(y, (x, weight, bias), grad), *own)
    for one, other in zip(answers[False], answers[True], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * one.norm()
    for of_autograd, own in zip(answers[True][1:3], answers[True][4:]):
        assert (of_autograd.reshape(own.shape) - own).norm() <= tolerance * own.norm()


GPT2_FLAGS = {"qkv_bias": (False, True), "tie_weights": (False, True), "init": ("gpt2", "pytorch"),
              "dropout": (0.0, 0.1)}


MODERN_FLAGS = {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rope"),
                "qk_norm": (False, True), "activation": ("gelu", "relu2", "swiglu"),
                "logit_softcap": (0.0, 9.0), "zero_init": (False, True),
                "value_residual": (False, True), "value_embeddings": (False, True),
                "x0_lambdas": (False, True), "embed_norm": (False, True)}


@pytest.mark.parametrize("seed", range(5))
def test_flags_in_any_combination(small_run, tmp_path, monkeypatch, seed):
    """Drawn at random: a run learns and resumes exactly, generates with the cache what it would
    without one, in 16 bits as well, and is exported as the same model or refused by the name of a
    flag."""
    rng = np.random.default_rng(seed)
    chosen = {
        key: values[rng.integers(len(values))]
        for key, values in (GPT2_FLAGS | MODERN_FLAGS).items()
    }
    if seed == 0:  # one without the modern ones
        chosen |= {key: values[0] for key, values in MODERN_FLAGS.items()}
    flags = ["--n_layer=3", "--block_size=11",
             *(f"--{key}={value}" for key, value in chosen.items())]
    whole, parts = small_run("whole", "--max_steps=4",
                             *flags), small_run("parts", "--max_steps=2", *flags)
    small_run("parts", "--max_steps=4", "--resume", *flags)
    assert equal_weights(whole / "last.pt", parts / "last.pt")
    gpt = GPT.from_checkpoint(whole / "best.pt")
    untrained = GPT(gpt.config)
    assert all(
        p.equal(untrained.get_parameter(name)) is False
        for name, p in gpt.named_parameters()), "every parameter learns"

    for block in gpt.blocks:  # attention that matters, as it does not yet after 4 steps
        for matrix in (block.attn.qkv.weight, block.attn.proj.weight):
            nn.init.normal_(matrix, std=0.5, generator=torch.Generator().manual_seed(seed))
    prompt = torch.randint(257, (3, 1 + 2 * seed),
                           generator=torch.Generator().manual_seed(seed))  # also beyond the context
    text = gpt.generate(prompt, 30, temperature=0)
    read = prompt[:, -11:]
    for token in text[:, prompt.shape[1]:].T:
        read = read if read.shape[1] <= 11 else read[:, -6:]  # the rule of stream
        logits = gpt(read)[:, -1]
        likeliest = logits.max(dim=-1).values
        assert (logits.gather(1, token[:, None])[:, 0] >= likeliest - 1e-5 * likeliest.abs()).all()
        read = torch.cat((read, token[:, None]), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gpt(text[:, :11], text[:, 1:12])
        assert gpt.generate(prompt, 15).shape[1] == prompt.shape[1] + 15
    loss.backward()
    assert loss.item() == pytest.approx(gpt(text[:, :11], text[:, 1:12]).item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in gpt.parameters())

    modern = [key for key, values in MODERN_FLAGS.items() if chosen[key] != values[0]]
    if modern:
        with pytest.raises(UserError,
                           match=f"best.pt has ({'|'.join(modern)})=.*, which transformers' GPT-2"):
            run_main(monkeypatch, "model", "export", whole / "best.pt", tmp_path / "folder")
    else:
        from transformers import AutoModelForCausalLM
        run_main(monkeypatch, "model", "export", whole / "best.pt", tmp_path / "folder")
        assert_same_logits(GPT.from_checkpoint(whole / "best.pt"),
                           AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval())
