"""Every option of nanolab, in one place: its name, its default, its meaning.

    python train.py [FILE.py ...] [--key=value ...]

A config file is Python that assigns values. Files apply in order, and flags win over files, so an
experiment is a stack:

    python train.py config/lab.py config/interventions/qkv_bias.py --seed=2 --out_dir=out/qkv_bias

The defaults are the published baseline: GPT-2 small's shape, untied, no QKV bias, 163,009,536
parameters, a global batch of 96 x 1,024 tokens for 33,165 steps (Giles Thomas, "Writing an LLM from
scratch", part 32a, 2026).
"""

import ast
import difflib
import math
import runpy
import sys
import textwrap
import traceback
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

from nanolab.common import UserError, is_text_utf8, parse_json


def option(default, meaning, *, choices=(), within=""):
    """A field of Config. `choices`: the words allowed; `within`: the interval allowed, such as "[0,
    1)"."""
    metadata = {"meaning": meaning, "choices": choices, "within": within}
    return field(default=default, metadata=metadata)


@dataclass
class GPTConfig:
    """The options that make a model. A new one is defined here and nowhere else."""

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
    qk_scale: float | str = option(
        0.0, "with qk_norm: the bound of attention logits (scale = bound / D; 0: 1/sqrt(D)); or gains "
        "that are learned, per head or per channel, from 1 / sqrt(D) or from a bound of 12 on",
        choices=("head", "head12", "channel", "channel12"), within="[0, inf)")
    activation: str = option(
        "gelu", "of the MLP: gelu, relu2 (ReLU squared), or swiglu (gated, 8/3 instead of 4 n_embd "
        "wide)", choices=("gelu", "relu2", "swiglu"))
    logit_softcap: float = option(
        0.0, "logits x become cap * tanh(x / cap); 0: unchanged", within="[0, inf)")
    zero_init: bool = option(
        False, "weights and biases of the residual projections start at 0")
    value_residual: bool = option(
        False, "each block's attention values are mixed with the first block's, in a learned share")
    value_embeddings: bool = option(
        False, "in every second block, the last one included, the attention values are mixed with "
        "an embedding of the token, in a learned share")
    x0_lambdas: bool = option(
        False, "before each block, x becomes a x + b x0, with x0 the embeddings and a, b learned, "
        "from 1 and 0 on")
    embed_norm: bool = option(False, "the embeddings are divided by their root mean square")

    @classmethod
    def from_options(cls, options):
        """From a mapping that holds these options among others, such as vars(config) or a
        checkpoint's config."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})


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
        False, "continue from out_dir/last.pt if it is there, start if not. Without a config file "
        "or a flag that makes another run, the other options are those of out_dir/config.json")
    extend: bool = option(
        False, "with --resume: go on to another max_steps, at the learning rates of a run planned "
        "that long. If the steps done had other rates, `name` says that it was extended")

    dry_run: bool = option(
        False, "stop before the first step, and print what the run would need: shapes, memory, "
        "time. Nothing is written to out_dir")

    # --- data
    dataset: str = option("fineweb", "name of the data set: its files are in data_dir/dataset/")
    data_dir: str = option("data", "folder of the data sets")
    order: str = option(
        "sequential", "windows in the order of the file, or in a seeded permutation, a new one "
        "each epoch", choices=("sequential", "shuffled"))

    # --- batch and budget
    batch_size: int | str = option(
        12, "sequences per device per micro-step, or 'auto': the largest that fits",
        choices=("auto",), within="[1, inf)")
    global_batch_size: int = option(
        96, "sequences per optimiser step over all devices; "
        "grad_accum_steps = global_batch_size / (batch_size x world size)", within="[1, 1e9]")
    max_tokens: int = option(
        3_260_190_720, "training budget in tokens, rounded up to whole steps "
        "(the default is 20 x 163,009,536: 33,165 steps)", within="[1, inf)")
    max_steps: int = option(
        0, "training budget in steps; above 0 it wins over max_tokens", within="[0, inf)")

    # --- optimiser and schedule
    optimizer: str = option(
        "adamw", "'muon': Muon for the 2-D weights inside the blocks, AdamW for all others; "
        "learning_rate and weight_decay apply to both. 'normuon': the same with Muon's updates "
        "normalised by neuron", choices=("adamw", "muon", "normuon"))
    learning_rate: float = option(
        4e-4, "peak learning rate; the next three are multiples of it", within="(0, inf)")
    embedding_lr: float = option(
        1.0, "of the embeddings: tokens (a tied head too), positions, values", within="(0, inf)")
    head_lr: float = option(1.0, "of the output head", within="(0, inf)")
    scalar_lr: float = option(
        1.0, "of all that is no matrix: biases, gains of the norms, learned shares",
        within="(0, inf)")
    schedule: str = option(
        "constant", "after the warm-up: constant; one half cosine to min_lr_ratio x peak at the "
        "last step; or 'wsd': constant, then a straight line to there",
        choices=("constant", "cosine", "wsd"))
    warmup_fraction: float = option(
        0.0, "share of the steps (rounded down) that warm up linearly", within="[0, 1)")
    cooldown_fraction: float = option(
        0.2, "share of the steps (rounded down, at least one) that wsd's straight line takes",
        within="(0, 1]")
    min_lr_ratio: float = option(
        0.1, "where cosine and wsd end, as a share of the peak", within="[0, 1]")
    weight_decay: float = option(0.1, "decoupled weight decay", within="[0, inf)")
    adamw_weight_decay: float | None = option(
        None, "that of the parameters that AdamW has; None: weight_decay", within="[0, inf)")
    cautious_decay: bool = option(
        False, "a weight decays only where the update does not enlarge it")
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
        0.0, "share of the steps (rounded down, at least one), at the end, whose weights are "
        "averaged; validation, best.pt and last.pt then have the mean", within="[0, 1)")

    # --- precision and device
    amp: str = option(
        "auto", "autocast to 16 bits (float16 brings a GradScaler). auto: bfloat16 on CUDA where "
        "supported, float16 on older CUDA, off elsewhere",
        choices=("auto", "off", "bfloat16", "float16"))
    tf32: bool = option(
        True, "let float32 matrix products use TF32 (CUDA), whatever amp is")
    compile: bool | str = option(
        "auto", "torch.compile. auto: on for CUDA, off elsewhere", choices=("auto",))
    threads: int = option(
        0, "CPU: how many threads; 0: what is fastest here now, which a resumed run keeps",
        within="[0, 1024]")
    device: str = option(
        "auto", "auto: cuda, else mps, else cpu", choices=("auto", "cuda", "mps", "cpu"))

    # --- seeds
    seed: int = option(42, "one seed for all that is random", within="[0, 9e18]")
    init_seed: int | None = option(
        None, "initial weights; None: seed. They depend on nothing else", within="[0, 9e18]")
    data_seed: int | None = option(
        None, "order of shuffled windows; None: seed", within="[0, 9e18]")
    dropout_seed: int | None = option(None, "dropout masks; None: seed", within="[0, 9e18]")

    # --- measuring, saving, logging
    eval_every: int = option(
        617, "steps between validations; 0: only at the end", within="[0, inf)")
    eval_tokens: int = option(
        1_966_080, "tokens in one validation (at most what the validation split has)",
        within="[1, inf)")
    save_every: int = option(
        617, "steps between saves of last.pt; 0: only at the end", within="[0, inf)")
    save_weights: bool = option(
        True, "keep last.pt and best.pt; False: a timing run, which leaves log and summary only")
    log_every: int = option(1, "steps between lines of log.jsonl", within="[1, inf)")
    sample_every: int = option(
        0, "steps between texts that the model writes, for the log; 0: none", within="[0, inf)")
    sample_prompt: str = option(
        "Every effort moves you", "what those texts, and sample.py's, begin with; <|endoftext|>: "
        "nothing")
    wandb: str = option(
        "", "Weights & Biases project to log to as well (pip install wandb; WANDB_MODE=offline "
        "keeps it on this machine); '': none")
    dollars_per_hour: float = option(
        0.0, "price of the machine, for the cost in summary.json", within="[0, inf)")


OPTIONS = {f.name: f for f in fields(Config)}
SEEDS = ("init_seed", "data_seed", "dropout_seed")

# What applies to random weights only.
INIT_OPTIONS = ("init", "init_seed", "zero_init")

# What init_from's weights determine. Dropout and initialisation are the new run's own.
ARCHITECTURE_OPTIONS = [f.name for f in fields(GPTConfig)
                        if f.name not in ("dropout", "init", "zero_init")]

# Options that do not change what a run computes, up to rounding (with dropout on, batch_size
# changes the masks; on another device, amp='auto' may choose another type). A resumed run may
# change them. `seed` acts through SEEDS.
RESUME_MAY_CHANGE = {"name", "out_dir", "resume", "extend", "dry_run", "data_dir", "batch_size",
                     "threads", "device", "eval_every", "save_every", "save_weights", "log_every",
                     "sample_every", "sample_prompt", "wandb", "dollars_per_hour", "seed"}


def resume_may_change(options):
    """RESUME_MAY_CHANGE, and `compile` too without dropout: compiled code draws other masks."""
    return RESUME_MAY_CHANGE if options["dropout"] else RESUME_MAY_CHANGE | {"compile"}


def load(argv):
    """The Config that files and flags ask for.

    argv: the command line without the program's name, e.g. ["config/lab.py", "--seed=2",
    "--resume"]. With init_from, the ARCHITECTURE_OPTIONS that nobody set are None: they are taken
    from those weights. `--help` prints every option and exits. Raises UserError.
    """
    files, flags = split_command_line(argv)
    values, origin = {}, {}
    for file in files:
        for key, value in read_file(file).items():
            values[key], origin[key] = parse(key, value, file), file
    for key, text in flags:
        values[key], origin[key] = parse(key, text, f"--{key}", is_text=True), f"--{key}"
    alone = not files and values.keys() <= RESUME_MAY_CHANGE | {"max_steps", "max_tokens"}
    if values.get("resume") and alone:
        path = Path(values.get("out_dir", OPTIONS["out_dir"].default), "config.json")
        stored = read_run_options(path, values) if path.exists() else {}
        values, origin = stored | values, dict.fromkeys(stored, path) | origin
    config = Config(**values)
    if config.init_from:
        for key in set(ARCHITECTURE_OPTIONS) - origin.keys():
            setattr(config, key, None)
    check_combinations(config, origin)
    for key in SEEDS:
        if getattr(config, key) is None:
            setattr(config, key, config.seed)
    return config


def config_error(message):
    return UserError(message, exit_code=2)


def split_command_line(argv):
    """-> (config files, [(key, text)]). Takes --key=value, --key value, and a bare --key for a
    switch."""
    files, flags = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        require_known(key, f"--{key}")
        if not equals:
            is_switch = bool in types_of(key)
            next_is_file = bool(words) and is_switch and words[0].endswith(".py")
            if words and not words[0].startswith("--") and not next_is_file:
                text = words.pop(0)
            elif is_switch:
                text = "True"
            else:
                raise config_error(f"--{key} wants a value: --{key}=...")
        flags.append((key, text))
    return files, flags


def read_file(file):
    """The options that a config file assigns. It runs as plain Python in a namespace of its own."""
    if not file.endswith(".py"):
        raise config_error(f"'{file}' is neither a config file (NAME.py) nor a flag (--key=value)")
    if not Path(file).is_file():
        there = [str(path) for path in Path("config").rglob("*.py") if path.name != "__init__.py"]
        raise config_error(f"there is no config file {file}{nearest(file, there)}")
    stdin, sys.stdin = sys.stdin, None  # a file that reads it would wait without a word
    try:
        namespace = runpy.run_path(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frame, what = error, getattr(error, "msg", "")
        if not isinstance(error, SyntaxError):
            frames = traceback.extract_tb(error.__traceback__)
            frame = [f for f in frames if not f.filename.startswith("<frozen")][-1]
            what = f"{type(error).__name__}: {error}"
        raise config_error(f"{frame.filename}, line {frame.lineno}: {what}") from None
    finally:
        sys.stdin = stdin
    assigned = {key: value for key, value in namespace.items() if not key.startswith("_")
                and not isinstance(value, types.ModuleType) and not callable(value)}
    for key in assigned:
        require_known(key, file)
    return assigned


def read_run_options(path, flags):
    """The options of the run that wrote this config.json, without those that `flags` replace."""
    try:
        options = dict(parse_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        raise config_error(f"{path} is damaged; resume with the config files and flags that the "
                           "run was started with") from None
    replaced = {"resume", "extend", "out_dir", *flags}
    if "seed" in flags:
        replaced |= set(SEEDS)
    if "max_tokens" in flags:
        replaced |= {"max_steps"}
    if options.get("init_from"):
        replaced |= set(INIT_OPTIONS)
    for key in options.keys() - replaced:
        require_known(key, path)
    return {key: parse(key, options[key], path) for key in options if key not in replaced}


def require_known(key, origin):
    if key not in OPTIONS:
        raise config_error(f"unknown option '{key}' (from {origin}){nearest(key, OPTIONS)}; "
                           "--help lists them all")


def nearest(word, known):
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def types_of(key):
    """The types that an option takes, e.g. (int, str) for batch_size."""
    return typing.get_args(OPTIONS[key].type) or (OPTIONS[key].type,)


def parse(key, value, origin, is_text=False):
    """`value` as option `key` holds it; UserError if its type or size is not allowed."""
    allowed = types_of(key)
    if is_text and allowed != (str,):
        value = {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pass
    if int in allowed and isinstance(value, float) and value.is_integer():
        value = int(value)  # max_tokens=1e9
    if float in allowed and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    wrong = f"{key}={as_shown(value)} (from {origin})"
    if type(value) not in allowed:
        names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise config_error(f"{wrong}: wants {names}, not {type(value).__name__}"
                           f"{allowed_values(key)}")
    meta = OPTIONS[key].metadata
    if value == "" and OPTIONS[key].default != "":
        raise config_error(f"{wrong}: must not be empty")
    if isinstance(value, str) and not is_text_utf8(value):
        raise config_error(f"{wrong}: is not UTF-8 text")
    choices, within = meta["choices"], meta["within"]
    if isinstance(value, str) and choices and value not in choices:
        raise config_error(f"{wrong}: not allowed{allowed_values(key)}{nearest(value, choices)}")
    if isinstance(value, (int, float)) and within and not lies_within(value, within):
        raise config_error(f"{wrong}: not allowed{allowed_values(key)}")
    return value


def as_shown(value):
    """repr(value), which fails for an int of thousands of digits, or an object of a config file."""
    try:
        return repr(value)
    except Exception:
        return f"({type(value).__name__})"


def allowed_values(key):
    meta = OPTIONS[key].metadata
    parts = [meta["within"]] if meta["within"] else []
    parts += ["True", "False"] if meta["choices"] and bool in types_of(key) else []
    parts += [repr(choice) for choice in meta["choices"]]
    return f"; allowed: {', '.join(parts)}" if parts else ""


def lies_within(value, interval):
    """Whether a number lies in an interval such as "[0, 1)". NaN lies in none, nor does an int that
    64 bits do not hold."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    largest = 9e18 if isinstance(value, int) else 1.7e308  # of float64
    return above and below and -largest <= value <= largest


def check_combinations(config, origin):
    def shown(key):
        return f"{key}={getattr(config, key)!r} (from {origin.get(key, 'the default')})"

    C, H = config.n_embd, config.n_head  # None where init_from decides
    if C and H and C % H:
        raise config_error(f"{shown('n_embd')} is not divisible by {shown('n_head')}; "
                           f"n_head could be {divisors_near(C, H)}")
    if config.batch_size != "auto" and config.global_batch_size % config.batch_size:
        nearest_sizes = divisors_near(config.global_batch_size, config.batch_size)
        raise config_error(f"{shown('global_batch_size')} is not divisible by "
                           f"{shown('batch_size')}; batch_size could be {nearest_sizes}")
    if config.schedule == "wsd" and config.warmup_fraction + config.cooldown_fraction > 1:
        raise config_error(f"{shown('warmup_fraction')} and {shown('cooldown_fraction')} together "
                           "exceed the whole run")
    if config.position == "rope" and C and H and C // H % 2:
        raise config_error(f"{shown('position')} rotates pairs of numbers, but {shown('n_embd')} "
                           f"and {shown('n_head')} give each head {C // H}")
    if config.tie_weights and config.head_lr != 1:
        raise config_error(f"{shown('head_lr')} has no effect with {shown('tie_weights')}: the "
                           "head is the embedding's matrix, whose rate is embedding_lr")
    if config.extend and not config.resume:
        raise config_error("--extend continues a run: it goes with --resume")
    for key in INIT_OPTIONS:
        if config.init_from and key in origin:
            raise config_error(f"{shown(key)} applies to random weights only, but "
                               f"{shown('init_from')} starts from others; leave one of them out")


def divisors(total):
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    return sorted({*small, *(total // d for d in small)})


def divisors_near(total, wanted):
    """The divisors of `total` on either side of `wanted`, as text: (96, 7) -> "6 or 8"."""
    below = [d for d in divisors(total) if d < wanted]
    above = [d for d in divisors(total) if d > wanted]
    return " or ".join(str(d) for d in below[-1:] + above[:1])


def as_text(config):
    """All options as key=value on a few lines, for the top of a run's output."""
    words = "  ".join(f"{key}={getattr(config, key)!r}" for key in OPTIONS)
    return textwrap.fill(words, 118, initial_indent="config: ", subsequent_indent="        ",
                         break_long_words=False, break_on_hyphens=False)


def help_text():
    lines = ["usage: python train.py [FILE.py ...] [--key=value ...]",
             "Files apply in order, flags win over files. "
             "The experiments are in config/ and config/interventions/.", ""]
    for key, field_ in OPTIONS.items():
        flag = f"  --{key}={field_.default!r}".ljust(32)
        meaning = f"{field_.metadata['meaning']}{allowed_values(key)}"
        lines.append(textwrap.fill(f"{flag} {meaning}", 118, subsequent_indent=" " * 33,
                                   break_on_hyphens=False))
    return "\n".join(lines)
