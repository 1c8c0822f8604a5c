"""Every option of nanolab, in one place: its name, its default, its meaning.

A config file is Python that assigns values. Files apply in order, and flags win over files, so an
experiment is a stack:

    python train.py config/lab.py config/interventions/qkv_bias.py --seed=2 --out_dir=out/qkv_bias

The defaults are the published baseline: GPT-2 small's shape, untied, no QKV bias, 163,009,536
parameters, a global batch of 96 x 1,024 tokens for 33,165 steps (Giles Thomas, "Writing an LLM from
scratch", part 32a, 2026).
"""

import math
from dataclasses import dataclass, field, fields


def option(default, meaning, *, choices=(), within=""):
    """A field of Config. choices: the words allowed; within: the interval allowed, as "[0, 1)"."""
    metadata = {"meaning": meaning, "choices": choices, "within": within}
    return field(default=default, metadata=metadata)


@dataclass
class GPTConfig:
    """The options that make a model. `from model import GPT, GPTConfig`."""

    # --- shape
    vocab_size: int = option(50257, "tokens in the vocabulary", within="[1, inf)")
    block_size: int = option(1024, "context length, tokens", within="[1, inf)")
    n_layer: int = option(12, "transformer blocks", within="[1, 10000]")
    n_head: int = option(12, "attention heads per block", within="[1, 1e6]")
    n_embd: int = option(768, "width of the residual stream", within="[1, 1e6]")

    # --- model interventions
    dropout: float = option(
        0.1, "after the embeddings, on attention weights, on both residual branches",
        within="[0, 1)")
    qkv_bias: bool = option(
        False, "bias on Q, K and V (attention output, MLP and LayerNorm always have theirs)")
    tie_weights: bool = option(False, "the output head shares the token embedding's matrix")
    init: str = option(
        "pytorch", "'pytorch': its defaults, as published; 'gpt2': N(0, 0.02), residual "
        "projections / sqrt(2 n_layer), biases 0", choices=("pytorch", "gpt2"))
    norm: str = option(
        "layernorm", "layernorm, or rmsnorm: a gain, no mean subtracted and no bias",
        choices=("layernorm", "rmsnorm"))
    position: str = option(
        "learned", "a learned embedding for each position, or rope: q and k are rotated by it",
        choices=("learned", "rope"))
    qk_norm: bool = option(False, "q and k of each head are divided by their root mean square")
    qk_bound: float = option(
        0.0, "with qk_norm: attention logits lie within -qk_bound and qk_bound; 0: the square root "
        "of the head size, which follows from the usual scale", within="[0, inf)")
    activation: str = option(
        "gelu", "of the MLP: gelu (GPT-2's, by tanh), gelu_erf (exact, nanoGPT's), relu2 (ReLU "
        "squared), or swiglu (gated, 8/3 n_embd wide instead of 4)",
        choices=("gelu", "gelu_erf", "relu2", "swiglu"))
    logit_softcap: float = option(
        0.0, "logits x become cap * tanh(x / cap); 0: unchanged", within="[0, inf)")
    zero_init: bool = option(
        False, "weights and biases of the residual projections start at 0")
    value_residual: bool = option(
        False, "mix each block's attention values with the first block's, in a learned proportion")
    value_embeddings: bool = option(
        False, "in every second block, the last one included: mix the attention values with an "
        "embedding of the token, in a learned proportion")
    x0_lambdas: bool = option(
        False, "before each block, x becomes a x + b x0, with x0 the embeddings; a and b are "
        "learned, starting at 1 and 0")
    embed_norm: bool = option(False, "the embeddings are divided by their root mean square")

    @classmethod
    def from_options(cls, options):
        """From a mapping that holds these options among others, such as vars(config)."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})


# What the weights of init_from determine. Dropout and initialisation are the new run's own.
ARCHITECTURE_OPTIONS = [f.name for f in fields(GPTConfig)
                        if f.name not in ("dropout", "init", "zero_init")]

# What applies to random weights only.
INIT_OPTIONS = ("init", "init_seed", "zero_init")

# With another value of these, the training loss is another quantity.
OBJECTIVE_OPTIONS = ("dropout", "z_loss")

SEEDS = ("init_seed", "data_seed", "dropout_seed")

BUDGETS = {"max_tokens", "max_steps", "epochs"}


@dataclass
class Config(GPTConfig):
    """Every option of a run: the model's, which it inherits, and the rest."""

    vocab_size: int = option(
        0, "tokens in the vocabulary; 0: that of the data set", within="[0, inf)")
    init_from: str = option(
        "", "start from weights instead: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in "
        "Hugging Face layout or a checkpoint. Shape and architecture are then its own, unless you "
        "set a smaller block_size, which keeps the first positions")

    # --- the run
    name: str = option("baseline", "label in tables; runs of one name are seeds of one experiment")
    out_dir: str = option(
        "out", "folder the run writes to: config.json, log.jsonl, last.pt, best.pt, loss.png, "
        "report.html, summary.json")
    resume: bool = option(
        False, "continue from the last checkpoint in out_dir; start if there is none")
    extend: bool = option(
        False, "with --resume: go on to another budget, at the learning rates of a run planned "
        "that long. If the steps done had other rates, `name` says that it was extended")
    dry_run: bool = option(
        False, "measure one step, print what the run would need, and stop. Nothing is written to "
        "out_dir")

    # --- data
    dataset: str = option("fineweb", "name of the data set: its files are in data_dir/dataset/")
    data_dir: str = option("data", "folder of the data sets")
    order: str = option(
        "sequential", "windows in the order of the file, or in a seeded permutation, a new one "
        "each epoch", choices=("sequential", "shuffled"))

    # --- batch and budget
    batch_size: int | str = option(
        12, "sequences per device per micro-step, or 'auto': the most that fit on the GPU",
        choices=("auto",), within="[1, inf)")
    global_batch_size: int = option(
        96, "sequences per optimiser step over all devices; "
        "grad_accum_steps = global_batch_size / (batch_size x world size)", within="[1, 1e9]")
    max_tokens: int = option(
        3_260_190_720, "training budget in tokens, rounded up to whole steps "
        "(the default is 20 x 163,009,536: 33,165 steps)", within="[1, inf)")
    max_steps: int = option(
        0, "training budget in steps; above 0 it wins over max_tokens", within="[0, inf)")
    epochs: float = option(
        0.0, "training budget in passes over the training split; above 0 it wins over max_tokens. "
        "config.json then has the max_steps that it comes to", within="[0, inf)")

    # --- objective, optimiser and schedule
    z_loss: float = option(
        0.0, "adds z_loss x log(Z)^2 to a token's training loss, Z the sum of exp(logits); "
        "validation and test have the cross-entropy alone", within="[0, inf)")
    optimizer: str = option(
        "adamw", "'muon': Muon for the 2-D weights inside the blocks, AdamW for all others; "
        "learning_rate and weight_decay apply to both. 'normuon': the same with Muon's updates "
        "normalised by neuron", choices=("adamw", "muon", "normuon"))
    learning_rate: float = option(
        4e-4, "peak learning rate; the next three multiply it", within="(0, inf)")
    embedding_lr: float = option(
        1.0, "multiplier for all embeddings: tokens (with a tied head), positions, values",
        within="(0, inf)")
    head_lr: float = option(1.0, "multiplier for the output head", within="(0, inf)")
    scalar_lr: float = option(
        1.0, "multiplier for biases, norm gains and scalars", within="(0, inf)")
    schedule: str = option(
        "constant", "after the warm-up: constant; one half cosine to min_lr_ratio x peak at the "
        "last step; or 'wsd': constant, then a straight line to there",
        choices=("constant", "cosine", "wsd"))
    warmup_fraction: float = option(
        0.0, "fraction of the steps (rounded down) that warm up linearly", within="[0, 1)")
    cooldown_fraction: float = option(
        0.2, "fraction of the steps (rounded down, at least one) that wsd's straight line takes",
        within="(0, 1]")
    min_lr_ratio: float = option(
        0.1, "where cosine and wsd end, as a fraction of the peak", within="[0, 1]")
    weight_decay: float = option(0.1, "decoupled weight decay", within="[0, inf)")
    adamw_weight_decay: float | None = option(
        None, "weight decay of AdamW's parameters; None: weight_decay", within="[0, inf)")
    cautious_decay: bool = option(
        False, "a weight decays only where its update does not enlarge it")
    decay: str = option(
        "all", "what decays: every parameter, as published, or only the 2-D weights",
        choices=("all", "matrices"))
    beta1: float = option(0.9, "AdamW's first moment", within="[0, 1)")
    beta2: float = option(0.999, "AdamW's second moment", within="[0, 1)")
    eps: float = option(1e-8, "AdamW's epsilon", within="(0, inf)")
    grad_clip: float = option(
        0.0, "largest global L2 norm of the gradient; 0: no clipping (the norm is logged anyway)",
        within="[0, inf)")
    tail_average: float = option(
        0.0, "average the weights over this last fraction of the steps (at least one); validation "
        "and checkpoints then have the average", within="[0, 1)")

    # --- precision and device
    amp: str = option(
        "auto", "autocast to 16 bits (float16 brings a GradScaler). auto: bfloat16 on CUDA where "
        "supported, float16 on older CUDA, off elsewhere",
        choices=("auto", "off", "bfloat16", "float16"))
    tf32: bool = option(
        True, "let float32 matrix products use TF32 (CUDA), whatever amp is")
    compile: bool | str = option(
        "auto", "torch.compile. auto: on for CUDA, off elsewhere; graphs: and on one GPU its CUDA "
        "graphs, which start a step's kernels at once and take more memory",
        choices=("auto", "graphs"))
    fp16_sums: bool = option(
        False, "float16 products sum in 16 bits too (CUDA), at twice the speed on GeForce cards. "
        "Needs amp='float16'; attention and one product of the head keep 32 bits")
    threads: int = option(
        0, "CPU threads; 0: by the rule in docs/speed.md", within="[0, 1024]")
    device: str = option(
        "auto", "auto: cuda, else mps, else cpu", choices=("auto", "cuda", "mps", "cpu"))

    # --- seeds
    seed: int = option(42, "seed for everything", within="[0, 9e18]")
    init_seed: int | None = option(
        None, "of the initial weights; None: seed", within="[0, 9e18]")
    data_seed: int | None = option(
        None, "of the order of shuffled windows; None: seed", within="[0, 9e18]")
    dropout_seed: int | None = option(
        None, "of the dropout masks; None: seed", within="[0, 9e18]")

    # --- measuring, saving, logging
    eval_every: int = option(
        617, "steps between validations, the first before any step; 0: only at the end",
        within="[0, inf)")
    eval_tokens: int = option(
        1_966_080, "tokens in one validation (at most what the validation split has)",
        within="[1, inf)")
    save_every: int = option(
        617, "steps between saves of last.pt; 0: only at the end", within="[0, inf)")
    save_weights: bool = option(
        True, "keep last.pt and best.pt; False: a timing run, which leaves log and summary only")
    on_save: str = option(
        "", "shell command to run after each save, in the background, such as 'rsync -a out/ "
        "HOST:out'; '': none")
    log_every: int = option(1, "steps between lines of log.jsonl", within="[1, inf)")
    sample_every: int = option(
        0, "steps between samples for the log; 0: only at the end", within="[0, inf)")
    sample_prompt: str = option(
        "Every effort moves you", "prompt of those samples and of sample.py; <|endoftext|>: an "
        "empty one")
    wandb: str = option(
        "", "Weights & Biases project to log to as well (pip install wandb; WANDB_MODE=offline "
        "keeps it on this machine); '': none")
    dollars_per_hour: float = option(
        0.0, "price of the machine, for the cost in summary.json", within="[0, inf)")

    def __post_init__(self):
        for key in SEEDS:
            if getattr(self, key) is None:
                setattr(self, key, self.seed)

    @classmethod
    def from_given(cls, given):
        """From the options that files and flags set. With init_from, the architecture that nobody
        set is None: find_start takes it from those weights."""
        if given.get("init_from"):
            given = {**dict.fromkeys(ARCHITECTURE_OPTIONS), **given}
        return cls(**given)

    def conflict(self, given, shown):
        """Why these options do not go together, or None.

        given: the options that files and flags set; shown: option -> its value and origin, as text.
        """
        C, H = self.n_embd, self.n_head  # None where init_from decides
        if C and H and C % H:
            return (f"{shown('n_embd')} is not divisible by {shown('n_head')}; n_head could be "
                    f"{divisors_near(C, H)}")
        if self.batch_size != "auto" and self.global_batch_size % self.batch_size:
            return (f"{shown('global_batch_size')} is not divisible by {shown('batch_size')}; "
                    f"batch_size could be {divisors_near(self.global_batch_size, self.batch_size)}")
        if self.epochs and self.max_steps:
            return f"{shown('epochs')} and {shown('max_steps')} are two budgets; set one to 0"
        if self.schedule == "wsd" and self.warmup_fraction + self.cooldown_fraction > 1:
            return (f"{shown('warmup_fraction')} and {shown('cooldown_fraction')} together exceed "
                    "the whole run")
        if self.position == "rope" and C and H and C // H % 2:
            return (f"{shown('position')} rotates pairs of numbers, but {shown('n_embd')} and "
                    f"{shown('n_head')} give each head {C // H}")
        if self.qk_bound and self.qk_norm is False:
            return f"{shown('qk_bound')} has no effect without --qk_norm"
        if self.fp16_sums and self.amp != "float16":
            return f"{shown('fp16_sums')} needs --amp=float16, not {shown('amp')}"
        if self.compile == "graphs" and self.dropout:
            return (f"{shown('compile')} would draw other masks in the first step after --resume; "
                    f"it wants --dropout=0, not {shown('dropout')}")
        if self.compile == "graphs" and self.batch_size == "auto":
            return f"{shown('batch_size')} would try sizes without the memory of {shown('compile')}"
        if self.tie_weights and self.head_lr != 1:
            return (f"{shown('head_lr')} has no effect with {shown('tie_weights')}: the head is "
                    "the embedding's matrix, whose rate is embedding_lr")
        by_flag = lambda key: "(from --" in shown(key)  # in a file it may be for another stack
        for key, other, unused in (
                ("max_tokens", "max_steps", self.max_steps and not by_flag("max_steps")),
                ("max_tokens", "epochs", self.epochs and not by_flag("epochs")),
                ("min_lr_ratio", "schedule", self.schedule == "constant"),
                ("cooldown_fraction", "schedule", self.schedule != "wsd"),
                ("weight_decay", "adamw_weight_decay",
                 self.optimizer == "adamw" and self.adamw_weight_decay is not None),
                ("data_seed", "order", self.order == "sequential"),
                ("dropout_seed", "dropout", not self.dropout),
                ("on_save", "save_weights", not self.save_weights)):
            if unused and by_flag(key):
                return f"{shown(key)} has no effect with {shown(other)}"
        if self.extend and not self.resume:
            return "--extend continues a run: it goes with --resume"
        for key in INIT_OPTIONS:
            if self.init_from and key in given:
                return (f"{shown(key)} applies to random weights only, but {shown('init_from')} "
                        "starts from others; leave one of them out")


OPTIONS = {f.name: f for f in fields(Config)}

# Options that do not change what a run computes, up to rounding (with dropout on, batch_size
# changes the masks; on another device, amp='auto' may choose another type). A resumed run may
# change them. `seed` acts through SEEDS.
RESUME_MAY_CHANGE = {"name", "out_dir", "resume", "extend", "dry_run", "data_dir", "batch_size",
                     "threads", "device", "eval_every", "save_every", "on_save", "log_every",
                     "sample_every", "sample_prompt", "wandb", "dollars_per_hour", "seed"}


def divisors(total):
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    return sorted({*small, *(total // d for d in small)})


def divisors_near(total, wanted):
    """The divisors of `total` on either side of `wanted`, as text: (96, 7) -> "6 or 8"."""
    below = [d for d in divisors(total) if d < wanted]
    above = [d for d in divisors(total) if d > wanted]
    return " or ".join(str(d) for d in below[-1:] + above[:1])
