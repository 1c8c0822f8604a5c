"""The model: a GPT-2-class language model, its initialisation, its loss, its text, its weights from a checkpoint; and
where it runs: on which device, in which numbers, in how many processes.

Shapes in comments: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

import math
import os
import warnings
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


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

    @classmethod
    def of(cls, options):
        """From a mapping that holds these options among others, such as vars(config) or a checkpoint's config."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})


########################################
#             Architecture             #
########################################

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attn(self.ln_1(x)))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2: Radford et al., 2019), with the published study's switches.

    seed: of the initial weights, which depend on it and on the shape alone.
    """

    def __init__(self, config, seed=42):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, torch.Generator().manual_seed(seed))

    def hidden(self, tokens):
        """(B, T) token ids -> (B, T, C), what the output head reads. T is at most block_size."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.wte(tokens) + self.wpe(positions))
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def forward(self, tokens, targets=None):
        """Without targets: the (B, T, V) logits. With targets (B, T): the mean cross-entropy in nats, a scalar."""
        x = self.hidden(tokens)
        if targets is None:
            return self.head(x)
        return F.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())

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

        tokens: (B, T) prompts, T of any length; the model reads the last block_size tokens of what there is.
        temperature: 0 takes the likeliest token; top_k: draw from the k likeliest only.
        generator: the torch.Generator to draw from, on the model's device.
        """
        for _ in range(max_new_tokens):
            x = self.hidden(tokens[:, -self.config.block_size:])
            logits = self.head(x[:, -1])  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                logits = logits.float() / temperature
                if top_k is not None:
                    logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
                token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
            tokens = torch.cat((tokens, token[:, None]), dim=1)
            yield token

    def generate(self, tokens, max_new_tokens, **how):
        """(B, T) prompts -> (B, T + max_new_tokens), prompts first. `how`: as for stream."""
        return torch.cat((tokens, *(token[:, None] for token in self.stream(tokens, max_new_tokens, **how))), dim=1)

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model of a checkpoint (a path, or what read_checkpoint returned), in eval mode, on the CPU.
        Raises CheckpointError."""
        if not isinstance(checkpoint, dict):
            checkpoint = read_checkpoint(checkpoint)
        model = cls(GPTConfig.of(checkpoint["config"]))
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise CheckpointError(f"{checkpoint['path']} does not fit its own config ({reason})") from None
        return model.eval()


########################################
#            Initialisation            #
########################################

@torch.no_grad()
def initialise(model, generator):
    """Fills every parameter from `generator` by the rule of config.init; an unmatched parameter is an error.

    'pytorch' draws in the order of the published code's constructors, so that a seed gives the published runs' very
    weights. Q, K and V biases are drawn last: switching them on leaves every other weight as it was.
    """
    as_pytorch = model.config.init == "pytorch"
    residual_scale = (2 * model.config.n_layer) ** -0.5  # GPT-2 keeps the residual stream's variance level with depth
    parameters = dict(model.named_parameters())
    for name in sorted(parameters, key=lambda name: name.endswith("qkv.bias")):
        p = parameters[name]
        match name.split(".")[-2:]:
            case ["ln_1" | "ln_2" | "ln_f", "weight"]:
                nn.init.ones_(p)
            case ["ln_1" | "ln_2" | "ln_f", "bias"]:
                nn.init.zeros_(p)
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


########################################
#             Checkpoints              #
########################################

CHECKPOINT_FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or one that does not fit, told in one line."""


def read_checkpoint(path):
    """The dict that train.py saved at `path`, tensors on the CPU. Executes nothing from the file. Raises CheckpointError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles; they are refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a checkpoint") from None
    except PermissionError:
        raise CheckpointError(f"no right to read {path}") from None
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors alike
        raise CheckpointError(f"{path} is damaged or no checkpoint of nanolab ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not {"format", "model", "config"} <= checkpoint.keys():
        raise CheckpointError(f"{path} is no checkpoint of nanolab")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} has format {checkpoint['format']}; this nanolab reads format {CHECKPOINT_FORMAT}")
    return {**checkpoint, "path": str(path)}


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
