"""The model: a GPT-2-class language model, its initialisation, its loss, its text, its weights from a checkpoint and from
and to Hugging Face's layout; and where it runs: on which device, in which numbers, in how many processes.

    python model.py export out/best.pt FOLDER

Shapes in comments: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from prepare import END_OF_TEXT, UNKNOWN, DataError, assumed_tokenizer, describe, get_tokenizer, gpt2_vocabulary_files, reachable


@dataclass
class GPTConfig:
    """The options that make a model; config.Config explains each. The defaults have 163,009,536 parameters."""
    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False
    init: str = "pytorch"
    norm: str = "layernorm"
    position: str = "learned"
    qk_norm: bool = False
    activation: str = "gelu"
    logit_softcap: float = 0.0
    zero_init: bool = False
    value_residual: bool = False

    @classmethod
    def of(cls, options):
        """From a mapping that holds these options among others, such as vars(config) or a checkpoint's config."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})


########################################
#          Products of matrices        #
########################################

# Whether torch's library for matrix products, Intel's MKL, leaves half of this CPU idle: on AMD's it does not use AVX-512.
# oneDNN does, to which torch sends convolutions. So a product is said there as a convolution of 1 x 1: the same sums to
# rounding, in half the time on Zen 5 (torch 2.13, float32).
CPUINFO = Path("/proc/cpuinfo")
MKL_IDLES = (torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
             and CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text())


def as_images(x):
    """(..., C) as images with C channels, (n, C, height, width), in place: 16 of two columns if the rows divide. With fewer,
    torch does not send a single thread's convolution to oneDNN; of one column, torch.compile takes it for another layout."""
    n, width = (1, 1) if x.numel() // x.shape[-1] % 32 else (16, 2)
    return x.reshape(n, -1, width, x.shape[-1]).permute(0, 3, 1, 2)


def linear(x, weight, bias=None):
    """x @ weight.T + bias: (..., C), (D, C) and (D,) -> (..., D)."""
    if x.device.type != "cpu" or not MKL_IDLES:
        return F.linear(x, weight, bias)
    y = F.conv2d(as_images(x), weight.view(*weight.shape, 1, 1), bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def linear_backward(grad, x, weight):
    """What autograd would find for linear(x, weight): of x (N, C), weight (D, C) and the gradient of their product, (N, D),
    the gradients of x and weight."""
    if x.device.type != "cpu" or not MKL_IDLES:
        return grad @ weight, grad.T @ x
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        as_images(grad), as_images(x), weight.view(*weight.shape, 1, 1), bias_sizes=None, stride=[1, 1], padding=[0, 0],
        dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1, output_mask=[True, True, False])
    return grad_x.permute(0, 2, 3, 1).reshape(x.shape), grad_weight.view(weight.shape)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


########################################
#             Architecture             #
########################################

def unchanged(x, *_):
    return x


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# What the switches of GPTConfig choose from, once, when a model is made.
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # RMSNorm: Zhang and Sennrich, 2019; a gain, no bias
ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"),
               "relu2": lambda x: F.relu(x).square(),  # So et al., "Primer", 2021
               "swiglu": swiglu}  # Shazeer, "GLU variants improve transformer", 2020


class Rope(nn.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021): turns number i and number i + D/2 of the D that a head has
    as if they were a point in the plane, by an angle of position x 10000^(-2i/D)."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.block_size), 10000 ** (-torch.arange(0, D, 2) / D))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, start):
        """(B, heads, T, D), the first of the T at position `start`."""
        cos, sin = (table[start:start + x.shape[2]] for table in (self.cos, self.sin))
        one, other = x.chunk(2, dim=-1)
        return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.qk_norm = rms_norm if config.qk_norm else unchanged  # before the rotation or after it is the same
        self.rotate = Rope(config) if config.position == "rope" else unchanged
        self.value_share = nn.Parameter(torch.empty(())) if config.value_residual else None

    def forward(self, x, first_values=None, cache=None, start=0):
        """(B, T, C) -> (B, T, C), and this block's values. first_values: those of the first block, None in it.
        cache, start: as for GPT.hidden; cache is this layer's keys and values."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads)
        q, k = (self.rotate(self.qk_norm(x), start) for x in (q, k))
        if self.value_share is not None:
            v = v + self.value_share * ((v if first_values is None else first_values) - v)
        values = v
        if cache is not None:
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), values


class MLP(nn.Module):
    """4 C wide; with SwiGLU, which has three matrices, 8/3 C (a multiple of 8), so that the number of parameters stays."""
    KEPT = 2**22  # numbers, 16 MiB in float32

    def __init__(self, config):
        super().__init__()
        gates = config.activation == "swiglu"
        width = 8 * max(round(config.n_embd / 3), 1) if gates else 4 * config.n_embd
        self.fc = Linear(config.n_embd, 2 * width if gates else width)
        self.proj = Linear(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        """Where it is large, the output of the activation is not kept for the backward pass but computed anew: it would be a
        quarter of what a block keeps. The product with proj is not computed again, for nothing of it is kept."""
        x = self.fc(x)
        if torch.is_grad_enabled() and x.numel() > MLP.KEPT:
            return recompute_in_backward(self.down, x, use_reentrant=False, preserve_rng_state=False)
        return self.down(x)

    def down(self, x):
        return self.proj(self.activation(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, first_values=None, cache=None, start=0):
        """As Attention: -> x after this block, and this block's values."""
        y, values = self.attn(self.ln_1(x), first_values, cache, start)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x, values


def soften(logits, cap):
    """Bends logits smoothly into (-cap, cap), as Gemma 2 does (Gemma Team, 2024); a cap of 0 leaves them."""
    return cap * torch.tanh(logits / cap) if cap else logits


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of soften(hidden @ weight.T, softcap), (N, C) x (V, C), against N token ids, without ever
    holding all N x V logits: they are made for some rows at a time, turned into their gradient on the spot, and let go. So the
    gradients are ready when the forward pass ends, and the backward pass only scales them, in float32: where a float16 loss is
    scaled, the scale comes before anything is rounded to 16 bits again.

    Under autocast the matrix products are in its type and the sums in float32. In 16 bits the vocabulary is padded to a
    multiple of 64, which GPUs multiply faster; the padded logits never reach the softmax. A CPU takes the vocabulary in slices,
    of which what it reads and writes stays in its cache.

    Why not torch's own, F.linear_cross_entropy(..., options=LinearCrossEntropyOptions())? In torch 2.13 on one CPU thread,
    1024 x 384 x 50257 in float32, forward and backward took it 4.9 s of processor time; this took 0.7 s (medians of 3, Zen 5).
    """
    CHUNK = 2**25  # logits at a time, 128 MiB in float32: large enough for the matrix products, small beside a model
    SLICE = 1024  # token ids at a time on a CPU

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, wants_gradient):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        N, V = len(hidden), len(weight)
        width = HeadLoss.SLICE if device == "cpu" else V
        slices = [slice(first, min(first + width, V)) for first in range(0, V, width)]
        heads = [pad(weight[ids].to(dtype)) for ids in slices]
        rows = min(max(HeadLoss.CHUNK // V // 32 * 32, 32), N)
        room = hidden.new_empty(rows, V, dtype=torch.float32)  # one for all: fresh memory costs a CPU more than the softmax
        loss = torch.zeros((), device=hidden.device)
        minus_one = loss - 1
        if wants_gradient:
            grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, N, rows):
            chunk, target = hidden[start:start + rows].to(dtype), targets[start:start + rows, None]
            logits = room[:len(chunk)]
            for ids, head in zip(slices, heads):
                logits[:, ids] = linear(chunk, head)[:, :ids.stop - ids.start]
            logits = soften(logits, softcap)
            top, own = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            slope = 1 - (logits / softcap).square() if softcap and wants_gradient else None  # the derivative of soften
            probabilities = torch.softmax(logits, dim=-1, out=logits)
            loss += (top - own - probabilities.amax(dim=-1, keepdim=True).log()).sum()  # log of the sum of exp is top - log max p
            if wants_gradient:
                grad = probabilities.scatter_add_(1, target, minus_one.expand_as(target))
                if softcap:
                    grad *= slope
                for ids, head in zip(slices, heads):
                    grad_chunk, grad_head = linear_backward(pad(grad[:, ids].to(dtype), dim=1), chunk, head)
                    grad_hidden[start:start + rows] += grad_chunk
                    grad_weight[ids] += grad_head[:ids.stop - ids.start]
        if wants_gradient:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n_rows = N
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / ctx.n_rows
        return *(grad.mul_(scale) for grad in ctx.saved_tensors), None, None, None


def pad(x, dim=0):
    """In 16 bits, x with zeros up to a multiple of 64 along dim 0 or 1 of two; else x."""
    lacking = -x.shape[dim] % 64
    return F.pad(x, (0, lacking) if dim else (0, 0, 0, lacking)) if x.dtype.itemsize == 2 and lacking else x


def draw(logits, top_k, generator):
    """One token id for each row of (B, V) logits. top_k, generator: as for GPT.stream."""
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
    generators = generator if isinstance(generator, list) else [generator]
    rows = logits.softmax(dim=-1).chunk(len(generators))
    return torch.cat([torch.multinomial(p, 1, generator=own) for p, own in zip(rows, generators)]).squeeze(1)


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2: Radford et al., 2019), with the published study's switches.

    seed: of the initial weights, which depend on it and on the shape alone.
    """

    def __init__(self, config, seed=42):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, torch.Generator().manual_seed(seed))

    def hidden(self, tokens, cache=None, start=0):
        """(B, T) token ids -> (B, T, C), what the output head reads. They stand at positions start ... start + T - 1, at most
        block_size in all.

        cache: of new_cache; holds what was read before `start` and takes up these tokens. With a start above 0, T is 1.
        """
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        x, first_values = self.dropout(x), None
        for block, cache_of_block in zip(self.blocks, cache if cache is not None else [None] * len(self.blocks)):
            x, values = block(x, first_values, cache_of_block, start)
            first_values = values if first_values is None else first_values
        return self.ln_f(x)

    def new_cache(self, B):
        """Room for the keys and values of B sequences in every block: (n_layer, 2, B, heads, block_size, C / heads)."""
        config = self.config
        return self.wte.weight.new_empty(config.n_layer, 2, B, config.n_head, config.block_size, config.n_embd // config.n_head)

    def forward(self, tokens, targets=None):
        """Without targets: the (B, T, V) logits. With targets (B, T): the mean cross-entropy in nats, a scalar."""
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        return HeadLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), self.config.logit_softcap,
                              torch.is_grad_enabled())

    def logits(self, x):
        return soften(self.head(x), self.config.logit_softcap)

    def num_params(self):
        """Trainable parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations to train on one token, forward and backward, by the usual count (Chowdhery et al.,
        "PaLM", 2022, appendix B): 6 for each weight in a matrix product, 12 n_layer C T for attention."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Yields the next token ids of B sequences, (B,) at a time, max_new_tokens times.

        tokens: (B, T) prompts, T of any length; the model reads the last block_size tokens of them. Each new token is read
        once, beside the cached keys and values of those before it. When the block_size positions are used up, the older half of
        them is forgotten and the newer half read again from position 0, so that a token costs about the same at any length.
        temperature: 0 takes the likeliest token; top_k: draw from the k likeliest only.
        generator: the torch.Generator to draw from, on the model's device; or one for each sequence, in a list.
        """
        context, start, cache = tokens[:, -self.config.block_size:], 0, self.new_cache(len(tokens))
        for _ in range(max_new_tokens):
            if context.shape[1] > self.config.block_size:
                context, start = context[:, -((self.config.block_size + 1) // 2):], 0
            x = self.hidden(context[:, start:], cache, start)
            start = context.shape[1]
            logits = self.logits(x[:, -1])  # (B, V)
            token = logits.argmax(dim=-1) if temperature == 0 else draw(logits.float() / temperature, top_k, generator)
            context = torch.cat((context, token[:, None]), dim=1)
            yield token

    def generate(self, tokens, max_new_tokens, **how):
        """(B, T) prompts -> (B, T + max_new_tokens), prompts first. `how`: as for stream."""
        return torch.cat((tokens, *(token[:, None] for token in self.stream(tokens, max_new_tokens, **how))), dim=1)

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model of a checkpoint (whatever read_checkpoint takes, or what it returned), in eval mode, on the CPU.
        Raises CheckpointError."""
        if not isinstance(checkpoint, dict):
            checkpoint = read_checkpoint(checkpoint)
        model = cls(GPTConfig.of(checkpoint["config"]))
        model.take_weights(checkpoint)
        return model.eval()

    def take_weights(self, checkpoint):
        """Those of what read_checkpoint returned. Raises CheckpointError."""
        try:
            self.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise CheckpointError(f"{checkpoint['path']} does not fit its own config ({reason})") from None


########################################
#            Initialisation            #
########################################

@torch.no_grad()
def initialise(model, generator):
    """Fills every parameter from `generator` by the rule of config.init; an unmatched parameter is an error.

    'pytorch' draws in the order of the published code's constructors, so that a seed gives the published runs' very
    weights. Q, K and V biases are drawn last: switching them on leaves every other weight as it was.
    """
    as_pytorch, zero_init = model.config.init == "pytorch", model.config.zero_init
    residual_scale = (2 * model.config.n_layer) ** -0.5  # GPT-2 keeps the residual stream's variance level with depth
    parameters = dict(model.named_parameters())
    for name in sorted(parameters, key=lambda name: name.endswith("qkv.bias")):
        p = parameters[name]
        match name.split(".")[-2:]:
            case ["ln_1" | "ln_2" | "ln_f", "weight"]:
                nn.init.ones_(p)
            case ["ln_1" | "ln_2" | "ln_f", "bias"]:
                nn.init.zeros_(p)
            case ["attn", "value_share"]:
                p.fill_(0.5)
            case ["wte" | "wpe", "weight"]:
                nn.init.normal_(p, std=1.0 if as_pytorch else 0.02, generator=generator)
            case ["qkv" | "proj" | "fc" | "head", "weight"] if as_pytorch:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)  # uniform in +-1/sqrt(fan_in)
            case ["qkv" | "proj" | "fc", "bias"] if as_pytorch:
                bound = parameters[name.replace("bias", "weight")].shape[1] ** -0.5
                nn.init.uniform_(p, -bound, bound, generator=generator)
            case ["proj", "weight"]:
                nn.init.normal_(p, std=0.02 * residual_scale, generator=generator)
            case ["qkv" | "fc" | "head", "weight"]:
                nn.init.normal_(p, std=0.02, generator=generator)
            case ["qkv" | "proj" | "fc", "bias"]:
                nn.init.zeros_(p)
            case _:
                raise ValueError(f"no initialisation rule matches the parameter {name}")
        if zero_init and ".proj." in name:  # drawn all the same, so that the others are as they were
            nn.init.zeros_(p)


########################################
#             Checkpoints              #
########################################

CHECKPOINT_FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or one that does not fit, told in one line."""


def read_checkpoint(source, mmap=False):
    """A checkpoint as a dict, tensors on the CPU: what train.py saved at a path, or weights in Hugging Face's layout as if it
    had, from a folder or under OpenAI's name (see read_hugging_face). Executes nothing from a file. Raises CheckpointError.

    mmap: leave the tensors on disk until they are used, for whoever wants the config only.
    """
    if Path(source).is_dir():
        return read_hugging_face(Path(source), source)
    if str(source) in OPENAI_REVISIONS and not Path(source).exists():
        return read_hugging_face(download(str(source)), source)
    checkpoint = unpickle(source, mmap)
    if not isinstance(checkpoint, dict) or not {"format", "model", "config"} <= checkpoint.keys():
        raise CheckpointError(f"{source} is no checkpoint of nanolab")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{source} has format {checkpoint['format']}; this nanolab reads format {CHECKPOINT_FORMAT}")
    return {**checkpoint, "path": str(source)}


def unpickle(path, mmap=False):
    """What torch.save wrote there, tensors on the CPU, if it is of tensors and plain values. Raises CheckpointError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles; they are refused here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        openai = f"; OpenAI's weights are {', '.join(OPENAI_REVISIONS)}" if str(path).startswith("gpt") else ""
        raise CheckpointError(f"there is no checkpoint {path}{openai}") from None
    except PermissionError:
        raise CheckpointError(f"no right to read {path}") from None
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors alike
        raise CheckpointError(f"{path} is damaged or no checkpoint of nanolab ({type(error).__name__})") from None


########################################
#        Hugging Face: weights in      #
########################################

# OpenAI's weights, openai-community/NAME on the hub, each at the revision that has model.safetensors.
OPENAI_REVISIONS = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
                    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
                    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2"}

# What transformers calls a GPT2LMHeadModel's parameters, and what they are called here.
THEIR_NAMES = {"h.": "blocks.", "c_attn.": "qkv.", "c_proj.": "proj.", "c_fc.": "fc.", "lm_head.": "head."}
TRANSPOSED = ("qkv.weight", "proj.weight", "fc.weight")  # GPT-2's Conv1D holds (in, out) where Linear holds (out, in)

# Options of a GPT2Config that change what is computed, with the values that GPT computes; the first is GPT2Config's default.
COMPUTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
SHAPE = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # GPT2Config's defaults

GPT2_VOCABULARY_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"  # of its items by token id, as JSON


def download(name):
    """OpenAI's weights from the hub, through its cache. -> the folder. Raises CheckpointError, in 2 seconds without network."""
    import huggingface_hub
    repository, revision = f"openai-community/{name}", OPENAI_REVISIONS[name]
    for file in ("config.json", "model.safetensors"):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if not isinstance(cached, str) and not os.environ.get("HF_ENDPOINT") and not reachable("huggingface.co"):
            raise CheckpointError(f"{name} is not on this machine and huggingface.co does not answer: connect once, or give a "
                                  f"folder with {repository}'s config.json and model.safetensors")
        try:
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision)
        except Exception as error:  # of the network, in the many classes of huggingface_hub and of what it calls
            raise CheckpointError(f"{file} of {repository} could not be had ({type(error).__name__}: "
                                  f"{str(error).strip().splitlines()[0]})") from None
    return Path(path).parent


def read_hugging_face(folder, source):
    """A GPT-2 in Hugging Face's layout, config.json and its weights, as read_checkpoint returns it.

    source: what the user calls it. Nothing is known of its training: step, tokens and seconds are 0, dataset and seed None.
    Its tokenizer is 'gpt2' if its vocabulary is GPT-2's, or if the folder has none and its size is. Raises CheckpointError,
    which names what GPT does not compute.
    """
    try:
        theirs = json.loads(Path(folder, "config.json").read_text())
        model_type = theirs.get("model_type")
    except FileNotFoundError:
        model_type = None
    except (ValueError, AttributeError):
        raise CheckpointError(f"{folder}/config.json is damaged") from None
    if model_type is None:
        best = f"; say {folder}/best.pt" if Path(folder, "best.pt").exists() else ""
        raise CheckpointError(f"{folder} is a folder, neither a checkpoint nor a model in Hugging Face's layout{best}")
    shape = {key: theirs.get(key, default) for key, default in SHAPE.items()}
    for key, value in shape.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{folder}/config.json is damaged: {key}={value!r}")
    for key, computed in {**COMPUTED, "n_inner": (4 * shape["n_embd"], None)}.items():
        if theirs.get(key, computed[0]) not in computed:
            raise CheckpointError(f"{folder} has {key}={theirs[key]!r} in its config.json; nanolab's model has {computed[0]!r}")
    if shape["n_embd"] % shape["n_head"]:
        raise CheckpointError(f"{folder}/config.json is damaged: n_embd={shape['n_embd']}, n_head={shape['n_head']}")
    tied = theirs.get("tie_word_embeddings", True)
    return {"format": CHECKPOINT_FORMAT, "path": str(source), "model": our_weights(read_weights(folder), tied),
            "config": {"name": Path(source).resolve().name, "dataset": None, "data_dir": "data", "seed": None, "qkv_bias": True,
                       "tie_weights": tied, "dropout": theirs.get("resid_pdrop", 0.1), "block_size": shape.pop("n_positions"),
                       **shape},
            "tokenizer": tokenizer_of(folder, theirs), "step": 0, "tokens": 0, "seconds": 0.0}


def read_weights(folder):
    """-> {their name: tensor} of a folder's model.safetensors, of its parts, or of its pytorch_model.bin."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files = list(folder.glob("model.safetensors")) or sorted(folder.glob("model-*-of-*.safetensors"))
    try:
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the weights in {folder} are damaged ({error})") from None
    if not files:
        if not Path(folder, "pytorch_model.bin").exists():
            raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
        weights = unpickle(Path(folder, "pytorch_model.bin"))
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{folder} holds something else than weights")
    return weights


def our_weights(theirs, tied):
    """Their weights by our names, in our orientation."""
    ours = {}
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which old files hold as well
        for their, our in THEIR_NAMES.items():
            name = name.replace(their, our)
        ours[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    if tied and "wte.weight" in ours:
        ours["head.weight"] = ours["wte.weight"]
    return ours


def tokenizer_of(folder, theirs):
    try:
        if Path(folder, "vocab.json").exists():
            vocabulary = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        elif Path(folder, "tokenizer.json").exists():
            vocabulary = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        else:
            return theirs.get("nanolab_tokenizer") or assumed_tokenizer(theirs.get("vocab_size"))
        items = sorted(vocabulary.items(), key=lambda item: item[1])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"the tokenizer in {folder} is damaged") from None
    return "gpt2" if hashlib.sha256(json.dumps(items).encode()).hexdigest() == GPT2_VOCABULARY_SHA256 else UNKNOWN


########################################
#       Hugging Face: weights out      #
########################################

def export(source, folder):
    """Writes a checkpoint of ours as a folder that transformers reads as a GPT2LMHeadModel, whole or not at all.
    Raises CheckpointError, DataError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    if Path(source).is_dir() or source in OPENAI_REVISIONS:
        raise CheckpointError(f"{source} is no file that train.py saved, such as out/best.pt")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there and not empty; choose another folder, or remove it")
    checkpoint = read_checkpoint(source)
    refuse_what_gpt2_lacks(checkpoint)
    model = GPT.from_checkpoint(checkpoint)
    files = {"config.json": as_json(their_config(checkpoint)), "generation_config.json": as_json(end_of_text(checkpoint)),
             "README.md": model_card(checkpoint, model, folder.name), **tokenizer_files(checkpoint)}
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, text in files.items():
            Path(unfinished, name).write_bytes(text)
        save_file(their_weights(model), unfinished / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")  # or only its owner could read it
        os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written ({describe(error)})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_what_gpt2_lacks(checkpoint):
    """An option of the model that is not among GPT-2's, such as an intervention of your own, cannot be told to transformers."""
    expressed = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "qkv_bias", "tie_weights", "init"}
    for field in fields(GPTConfig):
        value = checkpoint["config"].get(field.name, field.default)
        if field.name not in expressed and value != field.default:
            raise CheckpointError(f"{checkpoint['path']} has {field.name}={value!r}, which transformers' GPT-2 cannot express")


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def their_config(checkpoint):
    """config.json: what a GPT2Config needs to know, and which tokens these are."""
    ours = GPTConfig.of(checkpoint["config"])
    return {"architectures": ["GPT2LMHeadModel"], **{key: values[0] for key, values in COMPUTED.items()},
            "vocab_size": ours.vocab_size, "n_positions": ours.block_size, "n_embd": ours.n_embd, "n_layer": ours.n_layer,
            "n_head": ours.n_head, "n_inner": None, "resid_pdrop": ours.dropout, "embd_pdrop": ours.dropout,
            "attn_pdrop": ours.dropout, "tie_word_embeddings": ours.tie_weights, **end_of_text(checkpoint),
            "dtype": "float32", "nanolab_tokenizer": checkpoint["tokenizer"]}


def end_of_text(checkpoint):
    """The token that parts documents, so that it begins and ends a text; none where the tokenizer is not known."""
    token = None if checkpoint["tokenizer"] == UNKNOWN else get_tokenizer(checkpoint["tokenizer"]).eot_token
    return {"bos_token_id": token, "eos_token_id": token}


def their_weights(model):
    """-> {their name: tensor}. A tied head is left out; QKV biases that the model lacks are zeros, which GPT-2 has always."""
    theirs = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_weights:
            continue
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        for their, our in THEIR_NAMES.items():
            name = name.replace(our, their)
        theirs[name if name.startswith("lm_head.") else f"transformer.{name}"] = tensor.contiguous()
        if name.endswith("c_attn.weight") and not model.config.qkv_bias:
            theirs[f"transformer.{name}".replace("weight", "bias")] = torch.zeros(3 * model.config.n_embd)
    return theirs


def tokenizer_files(checkpoint):
    """-> {file name: its bytes} for transformers' AutoTokenizer, which reads GPT-2's vocabulary but no bytes."""
    if checkpoint["tokenizer"] != "gpt2":
        return {}
    get_tokenizer("gpt2")  # brings the vocabulary to this machine
    merges, vocabulary = (path.read_bytes() for path in gpt2_vocabulary_files())
    return {"merges.txt": merges, "vocab.json": vocabulary, "tokenizer_config.json": as_json(
        {"tokenizer_class": "GPT2Tokenizer", "model_max_length": checkpoint["config"]["block_size"],
         "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT})}


def model_card(checkpoint, model, title):
    """README.md: what is known of the weights, from the checkpoint, the summary.json of its run and the test result beside it."""
    config, path = checkpoint["config"], Path(checkpoint["path"])
    summary = read_json(path.with_name("summary.json"), "machine", "tokens_per_second", "peak_memory_mb", "cost")
    tests = read_json(path.with_suffix(".test.json"), "checkpoint_sha256", "results")
    with open(path, "rb") as file:
        is_of_this = tests.get("checkpoint_sha256") == hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "data": f"`{config['dataset']}`, tokenizer {checkpoint['tokenizer']}, {config['order']} order; sha256 of the training "
                f"split {checkpoint['data_sha256']}",
        "started from": config.get("init_from") or f"random weights, {config['init']} initialisation",
        "training": f"{checkpoint['step']:,} steps of {config['global_batch_size']} x {config['block_size']:,} tokens, "
                    f"{checkpoint['tokens']:,} tokens",
        "validation loss": f"{checkpoint['best_val_loss']:.6f} nats per token, the lowest of the run up to this step"
                           if math.isfinite(checkpoint["best_val_loss"]) else "not measured up to this step",
        "test loss": "not measured (`python eval.py` does, before an export)",
        "seeds": ", ".join(f"{key} {config[key]}" for key in ("init_seed", "data_seed", "dropout_seed")),
        "time": f"{checkpoint['seconds'] / 3600:.2f} hours up to this step",
        "machine": f"{summary['machine']}, {summary['tokens_per_second']:,} tokens/s, {summary['peak_memory_mb']:,} MB, "
                   f"${summary['cost']:.2f} for the whole run" if summary else "not recorded: the run has no summary.json",
        "versions": ", ".join(f"{name} {version}" for name, version in checkpoint["versions"].items()),
    }
    if is_of_this:
        record["test loss"] = "; ".join(f"{test['test_loss']:.6f} nats per token, on {test['tokens']:,} tokens of "
                                        f"`{test['dataset']}`, amp {test['amp']}" for test in tests["results"])
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items())
    options = "\n".join(f"{key} = {value!r}" for key, value in config.items() if key not in ("out_dir", "data_dir"))
    return CARD.format(title=title, n_params=model.num_params(), name=config["name"], rows=rows, options=options,
                       use=USE[checkpoint["tokenizer"]].format(length=min(config["block_size"], 50))).encode()


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- nanolab
---

# {title}

A GPT-2 of {n_params:,} parameters, trained with nanolab as the run `{name}`. It continues text; it follows no instructions.

{use}

## How it was made

| | |
| --- | --- |
{rows}

Every option of the run:

```python
{options}
```
"""

USE = {"gpt2": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained("THIS FOLDER") for auto in (AutoModelForCausalLM, AutoTokenizer))
tokens = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_length={length})[0]))
```""", "bytes": """There are no tokenizer files, for its tokens are the bytes of UTF-8 text, and 256 the end of a text:

```python
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokens = model.generate(torch.tensor([list("Every effort moves you".encode())]), max_length={length})
print(bytes(token for token in tokens[0].tolist() if token < 256).decode(errors="replace"))
```""", UNKNOWN: "There are no tokenizer files, for the run's token files did not say which text their tokens stand for."}


def read_json(path, *keys):
    """What a file beside a checkpoint says; nothing if it is not there, or damaged, or lacks one of the keys."""
    try:
        content = json.loads(path.read_text())
        return content if set(keys) <= content.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


########################################
#            Where it runs             #
########################################

class DeviceError(ValueError):
    """A device that was asked for and is not there."""


def pick_device(wanted="auto", local_rank=0):
    """'auto': CUDA, else MPS, else the CPU; or one of the three by name. -> torch.device. Raises DeviceError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, there in available.items() if there) if wanted == "auto" else wanted
    if not available[kind]:
        raise DeviceError(f"device='{kind}' is not available here; leave it at 'auto' or say --device=cpu")
    if kind != "cuda":
        return torch.device(kind)
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
                          "start at most that many with --nproc_per_node")
    return torch.device("cuda", local_rank)


def start_processes(wanted_device="auto"):
    """This process's device and its place among those that torchrun started, if it did: (device, rank, world size)."""
    device = pick_device(wanted_device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "mps":
        raise DeviceError("MPS has no communication between processes; start one without torchrun, or say --device=cpu")
    # After a restart by torchrun its store still has the addresses of the processes that died (torch 2.13, one machine):
    # a prefix keeps them apart. Several machines don't count restarts alike.
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size,
                            device_id=device if device.type == "cuda" else None)
    return device, rank, world_size


def keep_freed_memory():
    """Makes glibc keep the memory that is freed in a step for the next one. By itself it returns large blocks, and the end of
    its heap, to the system, which hands them out again page by page, filled with zeros."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not so on a Mac
        for parameter, n_bytes in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(parameter, n_bytes)


def autocast_dtype(amp, device):
    """The 16-bit type to compute in, or None for float32. 'auto': bfloat16 on CUDA where supported, float16 on older
    CUDA, None elsewhere (CPUs without bfloat16 units are about 100 times slower in it)."""
    if amp == "auto":
        amp = "off" if device.type != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
    return {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[amp]


def autocast(dtype, device):
    """The context to compute in `dtype`, one of autocast_dtype's."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@torch.no_grad()
def mean_loss(model, windows, n_windows, batch_size, device, dtype=None, rank=0, world_size=1):
    """Mean cross-entropy in nats over the first n_windows of a prepare.Windows, the same for any batch_size and number of
    processes, which share the work. It draws no random number."""
    was_training = model.training
    model.eval()
    losses, sizes = [torch.zeros((), device=device)], [0]
    mine = range(rank, n_windows, world_size)
    for start in range(0, len(mine), batch_size):
        ids = mine[start:start + batch_size]
        with autocast(dtype, device):
            losses.append(model(*windows.batch(ids, device)))
        sizes.append(len(ids))
    model.train(was_training)
    total = torch.dot(torch.stack(losses).cpu().double(), torch.tensor(sizes, dtype=torch.float64))
    if world_size > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.item() / n_windows


########################################
#           The command line           #
########################################

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"model.py: {message}; --help lists what there is\n")
    parser.add_argument("command", choices=["export"], help="write a checkpoint as a folder for Hugging Face's transformers")
    parser.add_argument("checkpoint", help="such as out/best.pt")
    parser.add_argument("folder", help="where to; it must be new or empty")
    args = parser.parse_args()
    try:
        export(args.checkpoint, args.folder)
    except (CheckpointError, DataError) as error:
        sys.exit(f"model.py: {error}")
    except OSError as error:
        sys.exit(f"model.py: {describe(error)}")
    except KeyboardInterrupt:
        sys.exit("model.py: stopped")
    print(f"{args.folder} is written: config.json, model.safetensors and a model card, which is yours to read first")


if __name__ == "__main__":
    main()
