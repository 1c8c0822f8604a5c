"""Which optimiser updates which parameter, and at which rate; Muon; cautious weight decay."""

import math

import torch
from torch import nn

from nanolab.distributed import autocast_dtype, map_matrices


def make_optimizer(model, config):
    """AdamW for all parameters; or, with optimizer='muon' or 'normuon', Muon for the weights of the
    linear layers in the blocks and AdamW for the rest.

    decay='all': every parameter decays, as published; 'matrices': only 2-D weights, not biases and
    norms. Parameters that are treated alike form one group; its "lr_scale" is for
    set_learning_rate. Raises ValueError for a parameter or an option that no rule covers.
    """
    if config.optimizer not in ("adamw", "muon", "normuon"):
        raise ValueError(f"make_optimizer has no rule for optimizer={config.optimizer!r}")
    if config.decay not in ("all", "matrices"):
        raise ValueError(f"make_optimizer has no rule for decay={config.decay!r}")
    uses_muon = config.optimizer in ("muon", "normuon")
    adamw_decay = config.adamw_weight_decay
    if adamw_decay is None:
        adamw_decay = config.weight_decay
    lr_scale = {"embedding": config.embedding_lr, "head": config.head_lr,
                "scalar": config.scalar_lr, "matrix": 1.0}
    muon_groups, adamw_groups = {}, {}
    for p, module in parameters_with_modules(model):
        kind = kind_of_parameter(p, module, model)
        if uses_muon and kind == "matrix":
            n_split = getattr(module, "n_split", 1)  # matrices in one weight, such as Q, K and V
            group = {"params": [], "n_split": n_split}
            muon_groups.setdefault(n_split, group)["params"].append(p)
        else:
            decay = adamw_decay if config.decay == "all" or p.ndim >= 2 else 0.0
            group = {"params": [], "weight_decay": decay, "lr_scale": lr_scale[kind]}
            adamw_groups.setdefault((lr_scale[kind], decay), group)["params"].append(p)

    adamw_class = CautiousAdamW if config.cautious_decay else torch.optim.AdamW
    adamw = adamw_class(list(adamw_groups.values()), lr=config.learning_rate, eps=config.eps,
                        betas=(config.beta1, config.beta2), weight_decay=adamw_decay, fused=True)
    if not uses_muon:
        return adamw
    muon = Muon(list(muon_groups.values()), config.learning_rate, config.weight_decay,
                cautious=config.cautious_decay, normalise=config.optimizer == "normuon")
    return MuonAdamW(muon, adamw)


def parameters_with_modules(model):
    """[(parameter, the module that has it)], in the order of model.parameters()."""
    found = {p: module for module in reversed(list(model.modules()))
             for p in module.parameters(recurse=False)}
    return [(p, found[p]) for p in model.parameters()]


def kind_of_parameter(p, module, model):
    """'scalar' (fewer than two dimensions), 'embedding' (of tokens, positions, values; a tied head
    too), 'head' or 'matrix', by the type of its module. Raises ValueError for any other."""
    if p.ndim < 2:
        return "scalar"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "head" if module is model.head else "matrix"
    raise ValueError(f"kind_of_parameter has no rule for a parameter of the shape {tuple(p.shape)} "
                     f"in a {type(module).__name__}")


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # older checkpoints and Muon have none


def count_steps(config):
    tokens_per_step = config.global_batch_size * config.block_size
    return config.max_steps or math.ceil(config.max_tokens / tokens_per_step)


def learning_rate_at(step, max_steps, config):
    """The learning rate of step 0 ... max_steps - 1.

    Linear warm-up from 1e-5 of the peak over the first warmup_fraction of the steps. Then
    'constant' stays; 'cosine' falls along half a cosine; 'wsd' stays, then falls linearly over the
    last cooldown_fraction of the steps (Hu et al., "MiniCPM", 2024; Haegele et al., "Scaling laws
    and compute-optimal training beyond fixed training durations", 2024). Both reach min_lr_ratio x
    peak at the last step. The published runs (part 32e) chained torch's LinearLR and
    CosineAnnealingLR, which would reach it one step later: at 33,165 steps the rates differ by at
    most 1.2e-4 of themselves. Raises ValueError for a schedule that no rule covers.
    """
    lr, min_lr = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup_steps = int(config.warmup_fraction * max_steps + 1e-9)  # 1e-9: 0.29 * 100 is 28.99...
    match config.schedule:
        case "constant":
            min_lr, coeff = 0.0, 1.0
        case "cosine":
            progress = (step - warmup_steps) / max(max_steps - 1 - warmup_steps, 1)
            coeff = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            cooldown_steps = max(int(config.cooldown_fraction * max_steps + 1e-9), 1)
            coeff = min((max_steps - 1 - step) / cooldown_steps, 1.0)
        case _:
            raise ValueError(f"learning_rate_at has no rule for schedule={config.schedule!r}")
    if step < warmup_steps:
        return lr * (1e-5 + (1 - 1e-5) * step / warmup_steps)
    return min_lr + (lr - min_lr) * coeff


def is_averaged(step, max_steps, config):
    """Whether tail_average averages the weights after this step, 0 ... max_steps - 1 (Izmailov et
    al., "Averaging weights leads to wider optima", 2018; at the end of a run with a decaying rate:
    modded-nanogpt's records/track_3_optimization, #45)."""
    n_steps = max(int(config.tail_average * max_steps + 1e-9), 1)
    return config.tail_average > 0 and step >= max_steps - n_steps


@torch.no_grad()
def average_weights(average, model, n):
    """Adds the weights of this step to the mean of n others. -> n + 1. Not torch's AveragedModel,
    which copies n to the GPU, and so waits for it."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 / (n + 1))
    return n + 1


class MuonAdamW:
    """Two optimisers of different parameters that step, save and load as one."""

    def __init__(self, muon, adamw):
        self.optimizers = [muon, adamw]

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class Muon(torch.optim.Optimizer):
    """Updates each weight matrix by the nearest orthogonal matrix to its Nesterov momentum (Jordan
    et al., "Muon: An optimizer for hidden layers in neural networks", 2024).

    The update's root mean square is 0.2 for every shape. That is about AdamW's, so one learning
    rate and one weight decay serve both (Liu et al., "Muon is scalable for LLM training", 2025).
    Like torch.optim.Muon with adjust_lr_fn="match_rms_adamw", with two differences: the precision
    follows the device, and where "n_split" matrices are stacked in one weight, such as Q, K and V,
    each is orthogonalised by itself.

    cautious: as decay_weights has it; normalise: NorMuon, see normalise_neurons.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95, cautious=False, normalise=False):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "n_split": 1})
        self.cautious, self.normalise = cautious, normalise

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("n_split", group.pop("pieces", 1))  # its name in older checkpoints

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            for p in params:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, momenta, group["momentum"])
            for shape in {p.shape for p in params}:  # all matrices of one shape in one batch
                same = [i for i, p in enumerate(params) if p.shape == shape]
                these = [params[i] for i in same]
                stack = torch.stack([directions[i] for i in same])
                matrices = stack.view(len(same) * group["n_split"], -1, shape[1])
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5
                matrices = map_matrices(newton_schulz, matrices)
                if self.normalise:
                    matrices = normalise_neurons(matrices, [self.state[p] for p in these])
                updates = list(matrices.reshape(stack.shape))
                decay_weights(these, updates, group["lr"] * group["weight_decay"], self.cautious)
                torch._foreach_add_(these, updates, alpha=-group["lr"] * scale)


class CautiousAdamW(torch.optim.AdamW):
    """AdamW with cautious weight decay, see decay_weights."""

    @torch.no_grad()
    def step(self):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays):
            params = group["params"]
            # the update has the sign of the first moment, which the step is about to compute
            moments = [self.state[p]["exp_avg"] if self.state[p] else torch.zeros_like(p)
                       for p in params]
            directions = torch._foreach_lerp(moments, [p.grad for p in params],
                                             1 - group["betas"][0])
            decay_weights(params, directions, group["lr"] * decay, cautious=True)
            group["weight_decay"] = 0.0
        super().step()
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


def decay_weights(params, updates, fraction, cautious):
    """Takes a fraction of each weight away, before the optimiser subtracts its updates, of the same
    shapes. Cautious: only where the update does not enlarge the weight, that is where the two have
    one sign (Chen et al., "Cautious weight decay", 2025, arXiv 2510.12402)."""
    if not cautious:
        torch._foreach_mul_(params, 1 - fraction)
    elif fraction:
        for p, update in zip(params, updates):
            p.mul_(1 - fraction * (p * update >= 0))


def normalise_neurons(matrices, states, beta2=0.95):
    """NorMuon: divides each row (of a wide matrix, each column) of the orthogonalised updates by
    the root of its running mean square, and keeps each matrix's norm (Li et al., "NorMuon", 2025,
    arXiv 2510.05491; as in modded-nanogpt's records/track_3_optimization/results/20260503_normuon).

    matrices: (n, rows, columns); states: of the n / n_split weights that they come from.
    """
    matrices = matrices.float()
    dim = 2 if matrices.shape[1] >= matrices.shape[2] else 1
    mean_squares = matrices.square().mean(dim, keepdim=True)
    for state, mean_square in zip(states, mean_squares.chunk(len(states))):
        if "mean_square" not in state:
            state["mean_square"] = torch.zeros_like(mean_square)
        state["mean_square"].lerp_(mean_square, 1 - beta2)
    running = torch.cat([state["mean_square"] for state in states])
    normalised = matrices * running.clamp(min=1e-10).rsqrt()
    norms, new_norms = (x.norm(dim=(1, 2), keepdim=True) for x in (matrices, normalised))
    return normalised * (norms / new_norms.clamp(min=1e-10))


def newton_schulz(matrices):
    """Approximates the orthogonal factor of each matrix: (n, rows, columns), U S V' -> about U V'.

    Five Newton-Schulz iterations with Jordan's coefficients bring the singular values to between
    0.68 and 1.2. They run in 16 bits where the device computes in them.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    x = x.to(autocast_dtype("auto", x.device) or x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
