"""Each intervention's own mathematics: the model, its loss, gradients and updates against an
independent reference: the paper's formula in float64, or a class of torch or transformers. Also
the initial weights, and what each seed changes."""

import math
from collections import defaultdict
from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

import nanolab.optim
from config import Config
from conftest import equal_weights, read_json
from model import GPT, GPTConfig
from nanolab.checkpoint import load_model, read_checkpoint
from nanolab.data import TokenDataset
from nanolab.optim import Muon, count_steps, learning_rate_at, make_optimizer, set_learning_rate
from nanolab.options import load

# What each file of config/interventions/ changes. A file of your own need not be here.
INTERVENTIONS = {
    "adamw_weight_decay": {"adamw_weight_decay": 0.001},
    "baseline": {},
    "beta2": {"beta2": 0.95},
    "decay_to_zero": {"schedule": "wsd", "warmup_fraction": 0.0, "cooldown_fraction": 0.7,
                      "min_lr_ratio": 0.0},
    "embedding_lr": {"embedding_lr": 155.0, "embed_norm": True},
    "fp16_sums": {"amp": "float16", "fp16_sums": True},
    "gpt2_init": {"init": "gpt2"},
    "gradient_clipping": {"grad_clip": 3.5},
    "head_dim_128": {"n_head": 6},
    "head_lr": {"head_lr": 0.89},
    "logit_softcap": {"logit_softcap": 30.0},
    "muon": {"optimizer": "muon"},
    "no_amp": {"amp": "off", "tf32": False},
    "normuon": {"optimizer": "normuon"},
    "qk_norm": {"qk_norm": True, "qk_bound": 12.0},
    "relu2": {"activation": "relu2"},
    "remove_dropout": {"dropout": 0.0},
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"position": "rope"},
    "scalar_lr": {"scalar_lr": 3.3},
    "schedule_learning_rate": {"learning_rate": 1.4e-3, "schedule": "cosine",
                               "warmup_fraction": 0.05, "min_lr_ratio": 0.1},
    "swiglu": {"activation": "swiglu"},
    "tail_average": {"tail_average": 0.05},
    "weight_decay_cerebras": {"weight_decay": 0.33724},
    "weight_decay_gpt2": {"weight_decay": 0.01},
    "weight_tying": {"tie_weights": True},
    "weight_tying_gpt2_init": {"tie_weights": True, "init": "gpt2"},
    "z_loss": {"z_loss": 1e-4},
    "wsd": {"learning_rate": 1.4e-3, "schedule": "wsd", "warmup_fraction": 0.05,
            "cooldown_fraction": 0.2, "min_lr_ratio": 0.1},
    **{name: {name: True} for name in (
        "cautious_decay", "embed_norm", "qkv_bias", "value_embeddings", "value_residual",
        "x0_lambdas", "zero_init")}}
# what train.py alone does; fp16_sums are a GPU's
IN_THE_LOOP = {"fp16_sums", "gradient_clipping", "no_amp", "tail_average", "z_loss"}

STACKS = {
    "modern": {"n_layer": 2, "n_head": 3, "norm": "rmsnorm", "position": "rope", "qk_norm": True,
               "qk_bound": 12.0, "dropout": 0.2, "activation": "swiglu", "logit_softcap": 2.0,
               "value_residual": True, "value_embeddings": True, "x0_lambdas": True,
               "embed_norm": True, "qkv_bias": True, "optimizer": "normuon", "decay": "matrices",
               "cautious_decay": True, "adamw_weight_decay": 0.3, "embedding_lr": 3.0,
               "head_lr": 0.5, "scalar_lr": 7.0},
    "learned": {"embed_norm": True, "tie_weights": True, "activation": "relu2", "qk_norm": True,
                "value_residual": True, "value_embeddings": True, "x0_lambdas": True,
                "init": "gpt2", "n_head": 4, "embedding_lr": 3.0, "decay": "matrices",
                "beta1": 0.5, "eps": 0.01},
    "muon": {"optimizer": "muon", "weight_decay": 2.0, "adamw_weight_decay": 0.0,
             "cautious_decay": True, "activation": "swiglu", "qkv_bias": True, "head_lr": 2.0,
             "n_embd": 36, "n_head": 2},
    "cautious adamw": {"cautious_decay": True, "activation": "gelu_erf", "weight_decay": 2.0,
                       "decay": "matrices", "tie_weights": True, "embedding_lr": 0.1,
                       "scalar_lr": 2.0}}

TINY = {"vocab_size": 61, "block_size": 16, "n_layer": 3, "n_embd": 48}
MAX_STEPS = 40


def as_flags(options):
    return [f"--{key}={value}" for key, value in options.items()]


def tiny(*words, **options):
    """The config of files and flags, of TINY's shape."""
    return load(Config, [*words, *as_flags(TINY | options)])


def expected_options(**options):
    """What tiny should return: `options` and TINY instead of the defaults."""
    return SimpleNamespace(**(vars(Config()) | TINY | options))


def new_model(options):
    return GPT(GPTConfig.from_options(vars(options)), seed=options.init_seed)


# --- the reference


def separate(tensors, options):
    """Our model's {name: tensor}, in float64; Q, K and V are three matrices, and SwiGLU's gate and
    up are two."""
    parts = {"attn.qkv": ("attn.q", "attn.k", "attn.v")}
    if options.activation == "swiglu":
        parts["mlp.fc"] = ("mlp.gate", "mlp.up")
    separated = {}
    for name, tensor in tensors.items():
        stacked = next((part for part in parts if part in name), None)
        if stacked is None:
            separated[name] = tensor.detach().double()
        else:
            names = [name.replace(stacked, part) for part in parts[stacked]]
            separated |= zip(names, tensor.detach().double().chunk(len(names)), strict=True)
    return separated


def rms_normalised(x):  # Zhang and Sennrich, 2019
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x):
    """Su et al., "RoFormer", 2021, in complex numbers: z exp(i t theta) at position t. The pairs
    are Llama's, (j, j + D/2)."""
    T, half = x.shape[2], x.shape[3] // 2
    theta = 10_000 ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[3])
    z = torch.complex(x[..., :half], x[..., half:])
    z = z * torch.exp(1j * torch.arange(T)[:, None] * theta)
    return torch.cat((z.real, z.imag), dim=-1)


def reference_logits(weights, tokens, options, training=False):
    """GPT-2 (Radford et al., 2019), changed as the options say. weights: as separate returns them;
    tokens: (B, T). -> (B, T, V)"""
    (B, T), H, D = tokens.shape, options.n_head, options.n_embd // options.n_head

    def linear(x, name, bias=True):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if bias else y

    def norm(x, name):
        gain = weights[f"{name}.weight"]
        if options.norm == "rmsnorm":
            return rms_normalised(x) * gain
        # Ba et al., "Layer normalization", 2016
        return rms_normalised(x - x.mean(-1, keepdim=True)) * gain + weights[f"{name}.bias"]

    def dropout(x):  # in the same places and order as ours, it draws the same masks
        return F.dropout(x, options.dropout, training)

    def heads(x):
        return x.view(B, T, H, D).transpose(1, 2)

    def attention(x, i, v0):
        name = f"blocks.{i}.attn"
        q, k, v = (heads(linear(x, f"{name}.{part}", options.qkv_bias)) for part in "qkv")
        if options.qk_norm:  # Henry et al., 2020
            q, k = rms_normalised(q), rms_normalised(k)
        if options.position == "rope":
            q, k = rotated(q), rotated(k)
        if options.value_residual:  # Zhou et al., 2024, with weights that sum to 1
            weight = weights[f"{name}.v0_lambda"]
            v = weight * (v if i == 0 else v0) + (1 - weight) * v
        if options.value_embeddings and i in range(options.n_layer)[::-2]:  # the last, and back
            weight = weights[f"{name}.ve_lambda"]
            embedded = heads(weights[f"{name}.value_embedding.weight"][tokens])
            v = weight * embedded + (1 - weight) * v
        scores = q @ k.mT * (options.qk_bound / D if options.qk_bound else D**-0.5)
        is_future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = dropout(scores.masked_fill(is_future, -math.inf).softmax(-1)) @ v
        return linear(y.transpose(1, 2).reshape(B, T, -1), f"{name}.proj"), v

    def mlp(x, i):
        name = f"blocks.{i}.mlp"
        if options.activation == "swiglu":  # Shazeer, 2020
            gate = linear(x, f"{name}.gate")
            hidden = gate / (1 + torch.exp(-gate)) * linear(x, f"{name}.up")
        elif options.activation == "relu2":  # So et al., "Primer", 2021
            hidden = linear(x, f"{name}.fc").clamp(min=0)**2
        elif options.activation == "gelu_erf":  # Hendrycks and Gimpel, 2016
            x = linear(x, f"{name}.fc")
            hidden = x / 2 * (1 + torch.erf(x / 2**0.5))
        else:  # their approximation
            x = linear(x, f"{name}.fc")
            hidden = x / 2 * (1 + torch.tanh((2 / math.pi)**0.5 * (x + 0.044715 * x**3)))
        return linear(hidden, f"{name}.proj")

    x = weights["wte.weight"][tokens]
    if options.position == "learned":
        x = x + weights["wpe.weight"][:T]
    if options.embed_norm:
        x = rms_normalised(x)
    x = x0 = dropout(x)
    v0 = None
    for i in range(options.n_layer):
        if options.x0_lambdas:
            x = weights["x_lambdas"][i] * x + weights["x0_lambdas"][i] * x0
        y, v = attention(norm(x, f"blocks.{i}.ln_1"), i, v0)
        v0 = v if i == 0 else v0
        x = x + dropout(y)
        x = x + dropout(mlp(norm(x, f"blocks.{i}.ln_2"), i))
    logits = norm(x, "ln_f") @ weights["wte.weight" if options.tie_weights else "head.weight"].T
    cap = options.logit_softcap  # Gemma Team, "Gemma 2", 2024
    return cap * torch.tanh(logits / cap) if cap else logits


def reference_loss(weights, inputs, targets, options):
    """Of the model in training. The weights get their gradients."""
    logits = reference_logits(weights, inputs, options, training=True)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.item()


def reference_optimizer(weights, options):
    """-> update(learning_rate). The weights are updated by torch's AdamW and, in the blocks'
    matrices, torch's Muon. Decoupled decay (Loshchilov and Hutter, 2019) is written out."""
    is_embedding = {name: name.startswith(("wte", "wpe")) or "value_embedding" in name
                    for name in weights}
    by_muon = {name: p for name, p in weights.items() if options.optimizer != "adamw"
               and p.ndim == 2 and "blocks" in name and not is_embedding[name]}
    multiples, decays, mean_squares = {}, {}, {}
    for name, p in weights.items():
        multiples[name] = (options.scalar_lr if p.ndim < 2 else
                           options.embedding_lr if is_embedding[name] else
                           options.head_lr if name == "head.weight" else 1.0)
        decays[name] = options.weight_decay
        if name not in by_muon and options.adamw_weight_decay is not None:
            decays[name] = options.adamw_weight_decay
        if options.decay == "matrices" and p.ndim < 2:
            decays[name] = 0.0
    groups = [{"params": [p], "multiple": multiples[name]} for name, p in weights.items()
              if name not in by_muon]
    optimizers = [torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.eps,
                                    weight_decay=0.0)]
    if by_muon:
        optimizers.append(torch.optim.Muon(by_muon.values(), weight_decay=0.0,
                                           adjust_lr_fn="match_rms_adamw"))

    def normuon(name, change):
        """Each neuron's change is divided by its running root mean square. The matrix's norm stays
        (Li et al., "NorMuon", 2025; modded-nanogpt's record 20260503_normuon)."""
        rows, columns = change.shape
        mean_square = change.square().mean(1 if rows >= columns else 0, keepdim=True)
        mean_squares[name] = 0.95 * mean_squares.get(name, 0) + 0.05 * mean_square
        normalised = change / mean_squares[name].sqrt()
        return normalised / normalised.norm() * change.norm()

    def update(learning_rate):
        before = {name: p.detach().clone() for name, p in weights.items()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("multiple", 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for name, p in weights.items():
            rate, change = learning_rate * multiples[name], before[name] - p.detach()
            if options.optimizer == "normuon" and name in by_muon:
                size = rate * 0.2 * max(p.shape)**0.5  # Liu et al., 2025
                change = size * normuon(name, change / size)
            # Chen et al., "Cautious weight decay", 2025
            may_decay = change * before[name] >= 0 if options.cautious_decay else 1
            p.data = before[name] - change - rate * decays[name] * may_decay * before[name]
    return update


@pytest.fixture(autouse=True)
def muon_in_float64(monkeypatch):
    """torch's Muon casts to bfloat16, ours does not on a CPU."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())


def whole_steps(fraction, n_steps):
    return math.floor(Fraction(str(fraction)) * n_steps)  # exact for decimals


def reference_rates(n_steps, options):
    """The learning rate of each step."""
    warmup, last = whole_steps(options.warmup_fraction, n_steps), n_steps - 1
    steps, end = np.arange(n_steps), options.min_lr_ratio
    factors = np.ones(n_steps)
    if options.schedule == "cosine":  # Loshchilov and Hutter, "SGDR", 2017, equation 5
        progress = (steps - warmup) / max(last - warmup, 1)
        factors = end + (1 - end) / 2 * (1 + np.cos(np.pi * progress))
    elif options.schedule == "wsd":  # Hu et al., "MiniCPM", 2024
        cooldown = max(whole_steps(options.cooldown_fraction, n_steps), 1)
        factors = np.interp(steps, [last - cooldown, last], [1, end])
    factors[:warmup] = np.linspace(1e-5, 1, warmup, endpoint=False)
    return options.learning_rate * factors


def reference_run(start, tokens, options):
    """The plain training loop, over the windows of a token file in their order. -> the weights at
    the end, averaged over the tail, and the gradient norm of each step"""
    weights = {name: p.clone().requires_grad_() for name, p in start.items()}
    update = reference_optimizer(weights, options)
    norms, after, T = [], [], options.block_size
    n = options.global_batch_size * T
    for step, rate in enumerate(reference_rates(options.max_steps, options)):
        read = torch.from_numpy(tokens[step * n:(step + 1) * n + 1].astype(np.int64))
        reference_loss(weights, read[:-1].view(-1, T), read[1:].view(-1, T), options)
        norms.append(nn.utils.clip_grad_norm_(weights.values(), options.grad_clip or math.inf))
        update(rate)
        after.append({name: p.detach().clone() for name, p in weights.items()})
    tail = after[-max(whole_steps(options.tail_average, options.max_steps), 1):]
    return {name: torch.stack([each[name] for each in tail]).mean(0) for name in weights}, norms


# --- the reference against transformers


RENAMES = {"transformer.h": "blocks", "transformer.": "", "model.layers": "blocks",
           "model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "head",
           "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "c_attn": "qkv",
           "c_fc": "fc", "c_proj": "proj", "self_attn.o_proj": "attn.proj", "self_attn": "attn",
           "down_proj": "proj", "_proj": ""}


def renamed(model):
    """The parameters of transformers' model, by our names and in our layout."""
    parameters = {}
    for name, p in model.named_parameters():
        p = p.T if "c_" in name and p.ndim == 2 else p  # GPT-2 has (in, out)
        for their_name, our_name in RENAMES.items():
            name = name.replace(their_name, our_name)
        parameters[name] = p
    return parameters


def transformers_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=16, n_embd=48, n_layer=3, n_head=3, bos_token_id=0,
        eos_token_id=0, attn_implementation="eager", embd_pdrop=0.2, attn_pdrop=0.2,
        resid_pdrop=0.2, tie_word_embeddings=False))


def transformers_qwen3():
    """Which has Llama's RMSNorm, RoPE and SwiGLU, and normalises q and k."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=16, rms_norm_eps=1e-5,
        attention_bias=True, attn_implementation="eager"))


@torch.no_grad()
def disturb(model):
    """Moves each weight from its start: a gain of 1 or a bias of 0 would hide mistakes. Makes the
    embeddings small, so that the norms' epsilon matters."""
    draw = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        p += 0.2 * torch.randn(p.shape, generator=draw)
        if name.removeprefix("transformer.").startswith(("wte", "wpe", "model.embed")):
            p *= 0.05
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # gains that we do not have
            p.fill_(1)


def batch(seed):
    """-> inputs, targets, each (3, 16)"""
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("make, options", [
    (transformers_gpt2, {"dropout": 0.2}),
    (transformers_qwen3, {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "dropout": 0.0,
                          "activation": "swiglu"})])
def test_the_reference_is_transformers(make, options):
    options = expected_options(n_head=3, qkv_bias=True, **options)
    theirs = make().double().train()
    disturb(theirs)
    torch.manual_seed(2)
    expected = theirs(batch(1)[0]).logits
    torch.manual_seed(2)
    weights = defaultdict(float, separate(renamed(theirs), options))  # Qwen3 lacks biases
    got = reference_logits(weights, batch(1)[0], options, training=True)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


# --- our model, loss, gradients and updates


def assert_close(ours, expected, tolerance, rounding=None, outliers=0.0):
    """Tensors by name: each differs by at most `tolerance` of its norm, and rounding[name], when
    the largest differences, a fraction `outliers` of them, are left out."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        differences = (ours[name] - tensor).flatten()
        if n_outliers := int(outliers * len(differences)):
            differences = differences.abs().sort().values[:-n_outliers]
        allowed = tolerance * tensor.norm() + (rounding[name] if rounding else 0.0)
        assert differences.norm() <= allowed, name


def take_steps(config, options):
    """Two steps of our model and of the reference: the logits, losses, gradients, rates and
    updates are the same. -> the losses, and the weights' norms at the end"""
    gpt = new_model(config)
    disturb(gpt)
    parameters = dict(gpt.named_parameters())
    weights = {name: p.requires_grad_() for name, p in separate(parameters, options).items()}
    optimizer, update = make_optimizer(gpt, config), reference_optimizer(weights, options)
    rates = reference_rates(MAX_STEPS, options)
    with torch.no_grad():
        logits = reference_logits(weights, batch(0)[0], options)
        assert (gpt.eval()(batch(0)[0]) - logits).abs().max() < 1e-5 * logits.abs().max()
    gpt.train()
    losses = []
    for step in (1, 38):  # in the warm-up, if there is one, and near the end
        torch.manual_seed(step)
        loss = gpt(*batch(step))
        loss.backward()
        losses.append(loss.item())
        torch.manual_seed(step)
        expected = reference_loss(weights, *batch(step), options)
        assert losses[-1] == pytest.approx(expected, rel=1e-6)
        grads = separate({name: p.grad for name, p in parameters.items()}, options)
        assert_close(grads, {name: p.grad for name, p in weights.items()}, 2e-5,
                     rounding=dict.fromkeys(weights, 5e-7))
        for name, p in weights.items():
            p.grad = grads[name]  # AdamW would enlarge the rounding of those that are about 0
        rate = learning_rate_at(step, MAX_STEPS, config)
        assert rate == pytest.approx(rates[step], rel=1e-9)
        before = separate(parameters, options)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        update(rates[step])
        after = separate(parameters, options)
        changes, expected = ({name: p.detach() - before[name] for name, p in each.items()}
                             for each in (after, weights))
        assert_close(changes, expected, 2e-4,
                     rounding={name: 3e-7 * p.norm() for name, p in before.items()},
                     # where a change is about 0, rounding decides whether the weight decays
                     outliers=1e-3 if options.cautious_decay else 0.0)
        for name, p in weights.items():  # rounding does not add up over the steps
            p.data = after[name]
    return losses, {name: p.norm().item() for name, p in after.items()}


@cache
def baseline_steps():
    return take_steps(tiny(), expected_options())


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_intervention(name):
    """A file's model and updates are the reference's, and not the baseline's."""
    config = tiny(f"config/interventions/{name}.py")
    expected = expected_options(name=name, **INTERVENTIONS[name])
    assert vars(config) == vars(expected)
    same = take_steps(config, expected) == baseline_steps()
    assert same == (name == "baseline" or name in IN_THE_LOOP)


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_stack(options):
    take_steps(tiny(**options), expected_options(**options))


@pytest.mark.parametrize("n_steps", [1, 7, 40, 100])
@pytest.mark.parametrize("options", [
    {"warmup_fraction": 0.29}, {"schedule": "cosine", "min_lr_ratio": 0.3},
    *(INTERVENTIONS[name] for name in ("schedule_learning_rate", "wsd", "decay_to_zero")),
    {"schedule": "wsd", "warmup_fraction": 0.29, "cooldown_fraction": 0.57}])
def test_rates(n_steps, options):
    rates = [learning_rate_at(step, n_steps, tiny(**options)) for step in range(n_steps)]
    expected = reference_rates(n_steps, expected_options(**options))
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_the_published_runs_have_as_many_steps():
    assert count_steps(load(Config, ["config/interventions/schedule_learning_rate.py"])) == 33_165


def test_muon_in_16_bits_is_torchs(monkeypatch):
    """As on a GPU, for every shape."""
    monkeypatch.undo()  # of muon_in_float64
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    theirs = [nn.Parameter(torch.randn(shape, generator=draw))
              for shape in [(24, 8), (8, 24), (8, 8)]]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours}], 0.1, 0.3)
    for _ in range(5):
        for our, their in zip(ours, theirs):
            our.grad = their.grad = torch.randn(their.shape, generator=draw)
        reference.step()
        muon.step()
    for our, their in zip(ours, theirs):
        assert torch.allclose(our, their, rtol=0, atol=1e-2)


# --- what train.py does


@pytest.mark.parametrize("name, options", [
    ("gradient_clipping", {"n_embd": 32, "tie_weights": True, "max_steps": 5, "eps": 0.1,
                           "learning_rate": 0.1, "schedule": "cosine", "warmup_fraction": 0.4}),
    ("tail_average", {"n_embd": 16, "position": "rope", "max_steps": 10, "tail_average": 0.35,
                      "learning_rate": 0.01, "eps": 0.01, "schedule": "wsd", "tie_weights": True,
                      "optimizer": "normuon", "cautious_decay": True})])
def test_a_run_is_the_references(small_run, data_dir, name, options):
    """In micro-steps of 2 sequences, with a tail of 3 steps. A large eps keeps AdamW from
    enlarging rounding errors."""
    options |= {"n_layer": 1, "n_head": 2, "block_size": 16, "batch_size": 2, "dropout": 0.0}
    folder = small_run("run", f"config/interventions/{name}.py", *as_flags(options))
    gpt = new_model(SimpleNamespace(**read_json(folder / "config.json")))
    options = expected_options(**INTERVENTIONS[name] | options, global_batch_size=8)
    start = separate(dict(gpt.named_parameters()), options)
    gpt.load_state_dict(read_checkpoint(folder / "last.pt")["model"])
    got = separate(dict(gpt.named_parameters()), options)
    tokens = np.fromfile(data_dir / "stdlib" / "train.bin", np.uint16, 10_000)
    expected, norms = reference_run(start, tokens, options)
    changes, expected = ({name: p - start[name] for name, p in each.items()}
                         for each in (got, expected))
    assert_close(changes, expected, 1e-3)
    assert not options.grad_clip or min(norms) < options.grad_clip < max(norms)


@pytest.mark.parametrize("words, dtype, matmul", [
    (["config/interventions/no_amp.py"], torch.float32, "highest"),
    (["--amp=bfloat16"], torch.bfloat16, "high"), (["--amp=float16"], torch.float16, "high")])
def test_precision(small_run, words, dtype, matmul):
    dtypes = set()

    def note(module, inputs, output):
        if isinstance(module, nn.Linear):
            dtypes.add(output.dtype)
    with nn.modules.module.register_module_forward_hook(note):
        small_run("run", "--max_steps=1", *words)
    assert dtypes == {dtype} and torch.get_float32_matmul_precision() == matmul


def test_tail_average(small_run, output_of, tiny_data):
    """The last validation measured the average of the last 4 of 10 steps' weights, best.pt has it,
    and eval.py says so. The training is as without it."""
    flags = [*tiny_data, "--tie_weights", "--init=gpt2", "--learning_rate=1e-2"]
    plain = read_checkpoint(small_run("plain", *flags) / "last.pt")["model"]
    run = small_run("run", *flags, "--tail_average=0.4", "--eval_every=5")
    best = read_checkpoint(run / "best.pt")
    assert best["averaged_steps"] == 4 and equal_weights(run / "best.pt", run / "last.pt")
    assert all(torch.equal(p, best["training_model"][name]) for name, p in plain.items())
    data = TokenDataset(best["config"]["data_dir"], "tiny", "val", 16)
    loss = load_model(best)(*data.batch(range(len(data)))).item()
    assert loss == pytest.approx(best["val_loss"], abs=1e-5)
    assert "average of the last 4 steps' weights" in output_of("eval", "--ckpt", run / "best.pt")


def what_is_random(small_run, *flags):
    """Two steps, each of two micro-steps. -> the initial weights, the tokens read, and the states
    of the generator that dropout draws from, as bytes."""
    weights, tokens, states = [], [], []

    def note(module, inputs):
        if isinstance(module, GPT) and module.training:
            weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
            tokens.append(inputs[0])
            states.append(torch.get_rng_state())
    with nn.modules.module.register_module_forward_pre_hook(note):
        small_run("".join(("run", *flags)), "--max_steps=2", "--batch_size=4", "--order=shuffled",
                  "--dropout=0.2", *flags)
    return [[x.numpy().tobytes() for x in each] for each in (weights[:1], tokens, states)]


def test_seeds(small_run):
    """Each seed changes what it is for and nothing else; `seed` changes all three."""
    first = what_is_random(small_run)
    assert [len(set(each)) for each in first] == [1, 4, 4], "no batch and no mask comes twice"
    for key, changes in {"seed": [True, True, True], "init_seed": [True, False, False],
                         "data_seed": [False, True, False],
                         "dropout_seed": [False, False, True]}.items():
        other = what_is_random(small_run, f"--{key}=7")
        assert [one != two for one, two in zip(first, other)] == changes, key


# --- initial weights


def test_published_initial_weights():
    """Seed 42 gives what the published code's constructors draw after torch.manual_seed(42)."""
    torch.manual_seed(42)
    published = [nn.Embedding(61, 48).weight, nn.Embedding(16, 48).weight]
    for _ in range(3):
        query, key, value = (nn.Linear(48, 48, bias=False).weight for _ in range(3))
        out, up, down = nn.Linear(48, 48), nn.Linear(48, 192), nn.Linear(192, 48)
        published += [*nn.LayerNorm(48).parameters(), torch.cat((query, key, value)),
                      *out.parameters(), *nn.LayerNorm(48).parameters(), *up.parameters(),
                      *down.parameters()]
    published += [*nn.LayerNorm(48).parameters(), nn.Linear(48, 61, bias=False).weight]
    ours = list(new_model(tiny()).parameters())
    assert len(ours) == len(published) and all(map(torch.equal, ours, published))


def test_gpt2_initial_weights():
    """Each has the shape and the distribution of transformers' GPT-2."""
    theirs = renamed(transformers_gpt2())
    ours = dict(new_model(tiny(init="gpt2", qkv_bias=True)).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        one, other = (each.detach().flatten().numpy() for each in (p, theirs[name]))
        assert p.shape == theirs[name].shape, name
        if p.ndim == 1:
            assert (one == other).all(), name
        else:
            assert one.std() == pytest.approx(other.std(), rel=0.1), name
            assert scipy.stats.ks_2samp(one, other).pvalue > 1e-3, name


@pytest.mark.parametrize("init, bias, embedding", [
    ("pytorch", scipy.stats.uniform(-48**-0.5, 2 * 48**-0.5), scipy.stats.norm(0, 1)),
    ("gpt2", 0, scipy.stats.norm(0, 0.02))])
@pytest.mark.parametrize("zero_init", [False, True])
def test_new_parameters_start(init, bias, embedding, zero_init):
    """A flag's own parameters start as its file says, and leave all others as they were; zero_init
    makes the blocks' projections 0."""
    starts = {"qkv.bias": bias, "value_embedding.weight": embedding, "v0_lambda": 0.5,
              "ve_lambda": 0.5, "x_lambdas": 1, "x0_lambdas": 0}
    options = {"init": init, "activation": "swiglu"}
    before = dict(new_model(tiny(**options)).named_parameters())
    gpt = new_model(tiny(**options, qkv_bias=True, value_embeddings=True, value_residual=True,
                         x0_lambdas=True, zero_init=zero_init))
    new = {name: p.detach().flatten() for name, p in gpt.named_parameters() if name not in before}
    for name, p in before.items():
        expected = p * 0 if zero_init and ".proj." in name else p
        assert torch.equal(gpt.get_parameter(name), expected), name
    assert len(new) == 3 + 2 + 3 + 2 + 2
    for name, p in new.items():
        start, = (start for end, start in starts.items() if f".{name}".endswith(f".{end}"))
        if start in (0, 0.5, 1):
            assert (p == start).all(), name
        else:
            assert scipy.stats.kstest(p, start.cdf).pvalue > 1e-3, name


@pytest.mark.parametrize("width, hidden", [(768, 2048), (48, 128), (20, 56), (2, 8)])
def test_width_of_swiglu(width, hidden):
    """8/3 of the model's width, in multiples of 8: as many matrix weights as GELU has at 4."""
    mlp = new_model(tiny(n_embd=width, n_head=1, n_layer=1, activation="swiglu")).blocks[0].mlp
    assert mlp.proj.weight.shape == (width, hidden) and mlp.fc.weight.shape == (2 * hidden, width)


def test_muon_of_an_older_checkpoint():
    """Which calls n_split pieces."""
    muon = Muon([{"params": [nn.Parameter(torch.ones(6, 2))], "n_split": 3}], 0.1, 0.0)
    state = muon.state_dict()
    state["param_groups"][0]["pieces"] = state["param_groups"][0].pop("n_split")
    muon.load_state_dict(state)
    assert muon.param_groups[0]["n_split"] == 3


def test_the_tail_is_exact_for_decimals():
    """0.29 * 100 is 28.99..."""
    config = load(Config, ["--tail_average=0.29"])
    assert sum(nanolab.optim.is_averaged(step, 100, config) for step in range(100)) == 29
