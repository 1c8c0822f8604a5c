"""The model: a GPT-2-class language model with a switch for each intervention, its initialisation,
and text generation.

    python model.py export out/best.pt FOLDER      for Hugging Face's transformers

GPTConfig, in config/__init__.py, has the switches. Shapes in comments: B sequences, T tokens, C =
n_embd, H heads of size D = C / H, V = vocab_size.
"""

if __name__ == "__main__":
    import nanolab.ctrl_c  # first, because the other imports take seconds

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from config import GPTConfig
from nanolab.checkpoint import read_checkpoint
from nanolab.common import UserError, argument_parser, run_script
from nanolab.export import check_export, export, push
from nanolab.kernels import Linear, head_loss, softcap


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}  # RMSNorm: Zhang and Sennrich, 2019
ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"),
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

    def forward(self, x, start):
        """x: (B, H, T, D), whose first token has position `start`."""
        cos, sin = (table[start:start + x.shape[2]] for table in (self.cos, self.sin))
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm, self.scale, self.qk_gain = config.qk_norm, None, None
        D = config.n_embd // config.n_head
        if isinstance(config.qk_scale, str):  # gain = start x (1 + s): weight decay pulls to start
            per_channel = config.qk_scale.startswith("channel")
            self.qk_gain = nn.Parameter(torch.empty(2, D) if per_channel
                                        else torch.empty(config.n_head, 1, 1))
            start = config.qk_scale.lstrip("abcdefghijklmnopqrstuvwxyz")
            self.scale = float(start) / D if start else None
        elif config.qk_scale:
            self.scale = config.qk_scale / D
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.proj = Linear(config.n_embd, config.n_embd)
        self.rope = Rope(config) if config.position == "rope" else None
        self.value_share = nn.Parameter(torch.empty(())) if config.value_residual else None
        self.value_embedding = None
        if config.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0:  # as in nanochat
            self.value_embedding = nn.Embedding(config.vocab_size, config.n_embd)
            self.embedding_share = nn.Parameter(torch.empty(()))

    def forward(self, x, tokens, first_values=None, cache=None, start=0):
        """(B, T, C), of tokens (B, T) -> (B, T, C), and this block's values (B, H, T, D).

        first_values: the first block's, None in the first block. cache: this block's keys and
        values, (2, B, H, block_size, D), filled up to `start`; with a start above 0, T is 1.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.qk_norm:  # rotation keeps the norm, so the order does not matter
            q, k = rms_norm(q), rms_norm(k)
            if self.qk_gain is not None and self.qk_gain.ndim == 2:
                q, k = q * (1 + self.qk_gain[0]), k * (1 + self.qk_gain[1])
            elif self.qk_gain is not None:
                q = q * (1 + self.qk_gain)
        if self.rope is not None:
            q, k = self.rope(q, start), self.rope(k, start)
        if self.value_share is not None:  # mix in the first block's values; no effect in that block
            v = v + self.value_share * ((v if first_values is None else first_values) - v)
        if self.value_embedding is not None:  # after modded-nanogpt's 2024-12-04_ValueEmbed
            embedded = self.value_embedding(tokens).view(B, T, self.n_head, -1).transpose(1, 2)
            v = v + self.embedding_share * (embedded.type_as(v) - v)
        values = v
        if cache is not None:
            cache[:, :, :, start:start + T] = torch.stack((k, v))
            k, v = cache[:, :, :, :start + T]
        # a single new token, with start above 0, sees every cached key
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, scale=self.scale,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.proj(y), values


class MLP(nn.Module):
    """Hidden width 4 C. SwiGLU has three matrices, so its width is 8/3 C (a multiple of 8), for the
    same number of parameters."""

    RECOMPUTE_ABOVE = 2**22  # elements, 16 MiB in float32

    def __init__(self, config):
        super().__init__()
        gated = config.activation == "swiglu"
        width = 8 * max(round(config.n_embd / 3), 1) if gated else 4 * config.n_embd
        self.fc = Linear(config.n_embd, 2 * width if gated else width)
        self.proj = Linear(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        x = self.fc(x)
        # A large activation is recomputed in the backward pass: stored, it would be a quarter of a
        # block's memory.
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

    def forward(self, x, tokens, first_values=None, cache=None, start=0):
        """(B, T, C) -> (B, T, C), and this block's attention values. The other arguments are
        Attention's."""
        y, values = self.attn(self.ln_1(x), tokens, first_values, cache, start)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.ln_2(x)))
        return x, values


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2: Radford et al., 2019) with the published study's switches.

    seed: for the initial weights, which depend only on it and the config.
    """

    def __init__(self, config, seed=42):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.x_lambdas = self.x0_lambdas = None
        if config.x0_lambdas:
            self.x_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.ln_f = NORMS[config.norm](config.n_embd, eps=1e-5)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.wte.weight
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), the mean cross-entropy in nats, a
        scalar."""
        x = self.hidden_states(tokens)
        if targets is None:
            return self.logits(x)
        # F.cross_entropy of self.logits(x), without all the logits in memory
        return head_loss(x.flatten(0, 1), self.head.weight, targets.flatten(),
                         self.config.logit_softcap)

    def hidden_states(self, tokens, cache=None, start=0):
        """(B, T) token ids at positions start ... start + T - 1, below block_size -> (B, T, C), the
        head's input.

        cache: from new_cache; holds the keys and values of the positions before `start`, and stores
        those of `tokens`.
        """
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        if self.config.embed_norm:
            x = rms_norm(x)
        x = x0 = self.dropout(x)
        first_values = None
        for i, block in enumerate(self.blocks):
            if self.x0_lambdas is not None:  # Jordan, modded-nanogpt's 2024-11-06_ShortcutsTweaks
                x = self.x_lambdas[i] * x + self.x0_lambdas[i] * x0
            x, values = block(x, tokens, first_values, None if cache is None else cache[i], start)
            first_values = values if i == 0 else first_values
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

    def generate(self, tokens, max_new_tokens, **options):
        """(B, T) prompts -> (B, T + max_new_tokens), prompts first. options: as for stream."""
        new = [token[:, None] for token in self.stream(tokens, max_new_tokens, **options)]
        return torch.cat((tokens, *new), dim=1)

    @torch.no_grad()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
               generator=None):
        """Yields the next token ids of B sequences, (B,) at a time, max_new_tokens times.

        tokens: (B, T) prompts of any length; the model reads their last block_size tokens. Each new
        token is read once, beside the cached keys and values. When all positions are used, the
        older half is dropped and the newer half read again from position 0, so a token costs about
        the same at any length.
        temperature: 0 takes the likeliest token; top_k: sample from the k likeliest only; top_p:
        from the likeliest that together have this probability (Holtzman et al., "The curious case
        of neural text degeneration", 2020).
        generator: a torch.Generator on the model's device, or a list of one for each sequence.
        Raises UserError if the logits are not finite.
        """
        context = tokens[:, -self.config.block_size:]
        start = 0  # the position of the first token that is not cached
        cache = self.new_cache(len(tokens))
        for _ in range(max_new_tokens):
            if context.shape[1] > self.config.block_size:
                context, start = context[:, -((self.config.block_size + 1) // 2):], 0
            x = self.hidden_states(context[:, start:], cache, start)
            start = context.shape[1]
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

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model in eval mode, on the CPU, from what read_checkpoint takes or returned. Raises
        UserError."""
        if not isinstance(checkpoint, dict):
            checkpoint = read_checkpoint(checkpoint)
        model = cls(GPTConfig.from_options(checkpoint["config"]))
        model.load_weights(checkpoint)
        return model.eval()

    def load_weights(self, checkpoint):
        """Loads the weights of a checkpoint from read_checkpoint. Raises UserError."""
        try:
            self.load_state_dict(checkpoint["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{checkpoint['path']} does not fit its own config "
                            f"({reason})") from None
        for name, weight in self.named_parameters():
            if not weight.isfinite().all():
                raise UserError(f"{checkpoint['path']} has weights that are not finite ({name})")


def check_finite(logits):
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are too large")


def sample_token(logits, top_k, top_p, generator):
    """(B, V) logits -> (B,) token ids. top_k, top_p, generator: as for GPT.stream."""
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
    if top_p is not None and top_p < 1:
        ordered, ids = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        likelier = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens
        logits = ordered.masked_fill(likelier >= top_p, -math.inf).gather(-1, ids.argsort())
    generators = generator if isinstance(generator, list) else [generator]
    probs = logits.softmax(dim=-1).chunk(len(generators))
    tokens = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)]
    return torch.cat(tokens).squeeze(1)


@torch.no_grad()
def initialise(model, generator):
    """Fills every parameter from `generator` by the rule of config.init. A parameter that no rule
    matches is an error.

    'pytorch' draws in the order of the published code's constructors, so a seed gives the published
    runs' weights exactly. Q, K and V biases are drawn last, then value embeddings: switching them
    on leaves every other weight as it was.
    """
    as_pytorch, zero_init = model.config.init == "pytorch", model.config.zero_init
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
            case ["attn", "value_share" | "embedding_share"]:
                p.fill_(0.5)
            case ["attn", "qk_gain"]:
                nn.init.zeros_(p)
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
        if zero_init and ".proj." in name:  # after the draw: the other weights are unchanged
            nn.init.zeros_(p)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="such as out/best.pt")
    parser.add_argument("folder", help="where to; it must be new or empty")
    parser.add_argument("--push", metavar="USER/NAME",
                        help="then upload the folder to this repository of yours on the Hugging "
                             "Face hub, with your own token (default: nothing is sent)")
    args = parser.parse_args()
    check_export(args.checkpoint, args.folder, args.push)
    checkpoint = read_checkpoint(args.checkpoint)
    export(checkpoint, GPT.from_checkpoint(checkpoint), args.folder, args.push)
    print(f"wrote {args.folder}: config.json, model.safetensors and a model card; read the "
          "card before you publish it")
    if args.push:
        print(f"pushed to {push(args.folder, args.push)}")


if __name__ == "__main__":
    run_script(main)
