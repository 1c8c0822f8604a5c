"""The model: a GPT-2-class language model with a flag for each intervention.

GPTConfig, in config/__init__.py, has the flags. Shapes in comments: B sequences, T tokens, C =
n_embd, H heads of size D = C / H, V = vocab_size.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from config import GPTConfig  # also for `from model import GPT, GPTConfig`
from nanolab.head import head_loss, softcap


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # RMSNorm: Zhang and Sennrich, 2019
ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"),
               "gelu_erf": F.gelu,  # Hendrycks and Gimpel, 2016, without an approximation
               "relu2": lambda x: F.relu(x).square(),  # So et al., "Primer", 2021
               "swiglu": swiglu}  # Shazeer, "GLU variants improve transformer", 2020


class Rope(nn.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021). Rotates the pair (i, i + D/2) of
    each head by the angle position x 10000^(-2i/D)."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.block_size), 10000 ** (-torch.arange(0, D, 2) / D))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, position):
        """x: (B, H, T, D), whose first token is at `position`."""
        cos, sin = (table[position:position + x.shape[2]] for table in (self.cos, self.sin))
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        # normalised q and k have a product of at most D; None is 1 / sqrt(D)
        self.scale = config.qk_bound * config.n_head / config.n_embd or None
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.qkv.n_split = 3  # Muon orthogonalises Q, K and V one by one
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.rope = Rope(config) if config.position == "rope" else None
        self.v0_lambda = nn.Parameter(torch.empty(())) if config.value_residual else None
        self.value_embedding = None
        if config.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0:  # as in nanochat
            self.value_embedding = nn.Embedding(config.vocab_size, config.n_embd)
            self.ve_lambda = nn.Parameter(torch.empty(()))

    def forward(self, x, tokens, v0=None, cache=None, position=0):
        """(B, T, C), of tokens (B, T) -> (B, T, C), and this block's values (B, H, T, D).

        v0: the first block's values, None in the first block. cache: this block's keys and values,
        (2, B, H, block_size, D), filled up to `position`, where the first of the tokens is; with a
        position above 0, T is 1.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.qk_norm:  # before or after the rotation, which keeps the norm
            q, k = rms_norm(q), rms_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, position), self.rope(k, position)
        v = values = self.mix_values(v, tokens, v0)
        if cache is not None:
            cache[:, :, :, position:position + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :position + T]
        # a single new token, at a position above 0, sees every cached key
        y = F.scaled_dot_product_attention(q, k, v, is_causal=position == 0, scale=self.scale,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.proj(y), values

    def mix_values(self, v, tokens, v0):
        """Interpolates the values with the first block's, and with an embedding of the tokens."""
        if self.v0_lambda is not None:  # no effect in the first block
            v = v + self.v0_lambda * ((v if v0 is None else v0) - v)
        if self.value_embedding is not None:  # after modded-nanogpt's 2024-12-04_ValueEmbed
            B, H, T, D = v.shape
            embedded = self.value_embedding(tokens).view(B, T, H, D).transpose(1, 2)
            v = v + self.ve_lambda * (embedded.type_as(v) - v)
        return v


class MLP(nn.Module):
    """Hidden width 4 C. SwiGLU has three matrices, so its width is 8/3 C (a multiple of 8), for the
    same number of parameters."""

    # A larger activation (in elements; 16 MiB in float32) is recomputed in the backward pass:
    # stored, it would be a quarter of a block's memory. It costs one more pass of the activation.
    RECOMPUTE_ABOVE = 2**22

    def __init__(self, config):
        super().__init__()
        gated = config.activation == "swiglu"
        width = 8 * max(round(config.n_embd / 3), 1) if gated else 4 * config.n_embd
        self.fc = nn.Linear(config.n_embd, 2 * width if gated else width)
        self.fc.n_split = 2 if gated else 1  # Muon orthogonalises gate and value one by one
        self.proj = nn.Linear(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        x = self.fc(x)
        if torch.is_grad_enabled() and x.numel() > MLP.RECOMPUTE_ABOVE:
            return recompute_in_backward(self.activate_and_project, x, use_reentrant=False,
                                         preserve_rng_state=False)
        return self.activate_and_project(x)

    def activate_and_project(self, x):
        return self.proj(self.activation(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.attn = Attention(config, layer)
        self.ln_2 = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, tokens, v0=None, cache=None, position=0):
        """(B, T, C) -> (B, T, C), and the attention's values. Other arguments: see Attention."""
        y, values = self.attn(self.ln_1(x), tokens, v0, cache, position)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x, values


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2: Radford et al., 2019) with optional changes, see
    GPTConfig.

    seed: for the initial weights, which depend only on it and the config.
    """

    def __init__(self, config, seed=42):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.position != "rope":  # which Attention has
            raise ValueError(f"GPT has no rule for position={config.position!r}")
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.x_lambdas = self.x0_lambdas = None
        if config.x0_lambdas:
            self.x_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(self, tokens, targets=None, z_loss=0.0):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats, a
        scalar. z_loss: as head_loss has it."""
        x = self.hidden_states(tokens)
        if targets is None:
            return self.logits(x)
        # F.cross_entropy of self.logits(x), without all the logits in memory
        return head_loss(x.flatten(0, 1), self.head.weight, targets.flatten(),
                         self.config.logit_softcap, z_loss)

    def hidden_states(self, tokens, cache=None, position=0):
        """(B, T) token ids from `position` on, which end before block_size -> (B, T, C), the head's
        input.

        cache: from new_cache; holds the keys and values of earlier positions, and stores those of
        `tokens`.
        """
        x = self.wte(tokens)
        if self.wpe is not None:
            last = position + tokens.shape[1]
            x = x + self.wpe(torch.arange(position, last, device=tokens.device))
        if self.config.embed_norm:
            x = rms_norm(x)
        x = x0 = self.dropout(x)
        v0 = None
        for i, block in enumerate(self.blocks):
            if self.x0_lambdas is not None:  # Jordan, modded-nanogpt's 2024-11-06_ShortcutsTweaks
                x = self.x_lambdas[i] * x + self.x0_lambdas[i] * x0
            x, values = block(x, tokens, v0, None if cache is None else cache[i], position)
            v0 = values if i == 0 else v0
        return self.ln_f(x)

    def logits(self, x):
        return softcap(self.head(x), self.config.logit_softcap)

    def num_params(self):
        """Trainable parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations to train on one token, forward and backward: 6 for each weight
        in a matrix product and 12 n_layer C T for attention (Chowdhery et al., "PaLM", 2022,
        appendix B)."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                 generator=None):
        """(B, T) prompts -> (B, T + max_new_tokens), prompts first. The rest: as for stream."""
        new = self.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat((tokens, *(token[:, None] for token in new)), dim=1)

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
               generator=None):
        """Yields the next token ids of B sequences, (B,) at a time, max_new_tokens times.

        tokens: (B, T) prompts of any length; the model reads their last block_size tokens. Each new
        token is read once, next to the cached keys and values. When all positions are used, the
        older half is dropped and the newer half read again from position 0, so a token costs about
        the same at any length.
        temperature: 0 takes the most likely token; top_k: sample from the k most likely only;
        top_p: from the most likely that together have this probability (Holtzman et al., "The
        curious case of neural text degeneration", 2020).
        generator: a torch.Generator on the model's device.
        Raises FloatingPointError if the logits are not finite.
        """
        context = tokens[:, -self.config.block_size:]
        position = 0  # of the first token that is not cached
        cache = self.new_cache(len(tokens))
        for _ in range(max_new_tokens):
            if context.shape[1] > self.config.block_size:
                context, position = context[:, -((self.config.block_size + 1) // 2):], 0
            x = self.hidden_states(context[:, position:], cache, position)
            position = context.shape[1]
            logits = self.logits(x[:, -1])  # (B, V)
            check_finite(logits)
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                token = sample_token(logits.float() / temperature, top_k, top_p, generator)
            context = torch.cat((context, token[:, None]), dim=1)
            yield token

    def new_cache(self, B):
        """Room for the keys and values of B sequences in every block: (n_layer, 2, B, H,
        block_size, D)."""
        config = self.config
        D = config.n_embd // config.n_head
        shape = (config.n_layer, 2, B, config.n_head, config.block_size, D)
        return self.wte.weight.new_empty(shape)


@torch.no_grad()
def initialise(model, generator):
    """Fills every parameter from `generator` by the rule of config.init. A parameter that no rule
    matches is an error.

    'pytorch' draws in the order of the published code's constructors, so a seed gives the published
    runs' weights exactly. Q, K and V biases are drawn last, then value embeddings: switching them
    on leaves every other weight as it was.
    """
    as_pytorch, zero_init = model.config.init == "pytorch", model.config.zero_init
    if not as_pytorch and model.config.init != "gpt2":
        raise ValueError(f"initialise has no rule for init={model.config.init!r}")
    # GPT-2: the residual stream's variance does not grow with depth
    residual_scale = (2 * model.config.n_layer) ** -0.5
    parameters = dict(model.named_parameters())
    for name in sorted(parameters, key=lambda name: (".value_embedding." in name,
                                                     name.endswith("qkv.bias"))):
        p = parameters[name]
        # the first case that matches wins
        match name.split(".")[-2:]:
            case ["ln_1" | "ln_2" | "ln_f", "weight"]:
                nn.init.ones_(p)
            case ["ln_1" | "ln_2" | "ln_f", "bias"]:
                nn.init.zeros_(p)
            case ["attn", "v0_lambda" | "ve_lambda"]:
                p.fill_(0.5)
            case ["x_lambdas"]:
                nn.init.ones_(p)
            case ["x0_lambdas"]:
                nn.init.zeros_(p)
            case ["wte" | "wpe" | "value_embedding", "weight"]:
                nn.init.normal_(p, std=1.0 if as_pytorch else 0.02, generator=generator)
            case ["qkv" | "proj" | "fc" | "head", "weight"] if as_pytorch:
                # uniform within 1/sqrt(fan_in)
                nn.init.kaiming_uniform_(p, a=math.sqrt(5), generator=generator)
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
        if zero_init and ".proj." in name:  # zeroed after drawing: the other weights stay as drawn
            nn.init.zeros_(p)


def check_finite(logits):
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights are too large")


def sample_token(logits, top_k, top_p, generator):
    """(B, V) logits -> (B,) token ids. top_k, top_p, generator: as for GPT.stream."""
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        more_likely = probs.cumsum(dim=-1) - probs  # the probability of all more likely tokens
        logits = ordered.masked_fill(more_likely >= top_p, -math.inf).gather(-1, ids.argsort())
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
