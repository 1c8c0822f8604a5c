"""Which optimiser updates which parameter, and at which rate; Muon; cautious weight decay; the mean
of a run's last weights."""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanolab.cpu import map_parts
from nanolab.devices import autocast_dtype, begin_read


def make_optimizer(model, config):
    """AdamW for all parameters; or, with optimizer='muon' or 'normuon', Muon for the matrices in
    the blocks and AdamW for the rest.

    decay='all': every parameter decays, as published; 'matrices': only 2-D weights, not biases and
    norms. Parameters that are treated alike form one group; its "lr_scale" is for
    set_learning_rate.
    """
    uses_muon = config.optimizer != "adamw"
    adamw_decay = config.adamw_weight_decay
    if adamw_decay is None:
        adamw_decay = config.weight_decay
    muon_groups, adamw_groups = {}, {}
    for name, p in model.named_parameters():
        kind = parameter_kind(name, p)
        if uses_muon and kind == "matrix":
            # how many matrices one weight holds: Q, K and V; SwiGLU's gate and value
            is_swiglu = name.endswith("fc.weight") and config.activation == "swiglu"
            n_split = 3 if name.endswith("qkv.weight") else 2 if is_swiglu else 1
            group = {"params": [], "n_split": n_split}
            muon_groups.setdefault(n_split, group)["params"].append(p)
        else:
            scale = {"embedding": config.embedding_lr, "head": config.head_lr,
                     "scalar": config.scalar_lr, "matrix": 1.0}[kind]
            decay = adamw_decay if config.decay == "all" or p.ndim >= 2 else 0.0
            group = {"params": [], "weight_decay": decay, "lr_scale": scale}
            adamw_groups.setdefault((scale, decay), group)["params"].append(p)
    groups = [*muon_groups.values(), *adamw_groups.values()]
    owned = [id(p) for group in groups for p in group["params"]]
    all_params = sorted(id(p) for p in model.parameters())
    assert sorted(owned) == all_params, "each parameter has exactly one owner"

    adamw_class = CautiousAdamW if config.cautious_decay else torch.optim.AdamW
    adamw = adamw_class(list(adamw_groups.values()), lr=config.learning_rate, eps=config.eps,
                        betas=(config.beta1, config.beta2), weight_decay=adamw_decay, fused=True)
    if not uses_muon:
        return adamw
    muon = Muon(list(muon_groups.values()), config.learning_rate, config.weight_decay,
                cautious=config.cautious_decay, normalise=config.optimizer == "normuon")
    return MuonAdamW(muon, adamw)


def parameter_kind(name, p):
    """'embedding' (of tokens, positions, values; a tied head too), 'head', 'scalar' (fewer than two
    dimensions) or 'matrix'."""
    if p.ndim < 2 or name.endswith("qk_gain"):
        return "scalar"
    module = name.split(".")[-2]
    embeddings = ("wte", "wpe", "value_embedding")
    return "embedding" if module in embeddings else "head" if module == "head" else "matrix"


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # older checkpoints and Muon have none


QUEUES_ADAMW = ("cuda",)  # device types on which AdamW is queued before a step's wait


def step_if_finite(optimizer, numbers, finite):
    """Updates the weights, unless a number is not finite. -> the numbers, read from the device: a
    step's one wait for it.

    numbers: (n,); finite: whether all are, (), on the same device. On CUDA, AdamW is queued before
    the wait, so that the GPU has work until the next forward pass is queued. It leaves the update
    out by itself where `found_inf` is 1, as under torch's GradScaler. Muon and CautiousAdamW step
    after the wait.
    """
    optimizers = getattr(optimizer, "optimizers", [optimizer])
    read = begin_read(numbers)
    early = [each for each in optimizers
             if type(each) is torch.optim.AdamW and numbers.device.type in QUEUES_ADAMW]
    for adamw in early:
        adamw.found_inf = 1 - finite.float()
        adamw.step()
    values = read()
    if all(map(math.isfinite, values)):
        for each in optimizers:
            if each not in early:
                each.step()
    return values


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
                matrices = orthogonalise(matrices)
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


def decay_weights(params, updates, share, cautious):
    """Takes a share of each weight away, before the optimiser subtracts its updates, of the same
    shapes. Cautious: only where the update does not enlarge the weight, that is where the two have
    one sign (Chen et al., "Cautious weight decay", 2025, arXiv 2510.12402)."""
    if not cautious:
        torch._foreach_mul_(params, 1 - share)
    elif share:
        for p, update in zip(params, updates):
            p.mul_(1 - share * (p * update >= 0))


def normalise_neurons(matrices, states, beta2=0.95):
    """NorMuon: divides each row (of a wide matrix, each column) of the orthogonalised updates by the
    root of its running mean square, and keeps each matrix's norm (Li et al., "NorMuon", 2025, arXiv
    2510.05491; as in modded-nanogpt's records/track_3_optimization/results/20260503_normuon).

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


def orthogonalise(matrices):
    """newton_schulz of (n, rows, columns) matrices. Each rank does its share, and all get all; on
    one rank, the threads of a CPU share them."""
    if not dist.is_initialized():
        parts = map_parts(newton_schulz, matrices)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    share = math.ceil(len(matrices) / world_size)
    padded = F.pad(matrices, (0, 0, 0, 0, 0, share * world_size - len(matrices)))
    mine = newton_schulz(padded[rank * share:(rank + 1) * share]).contiguous()
    gathered = mine.new_empty(padded.shape)
    dist.all_gather_single(gathered, mine)
    return gathered[:len(matrices)]


def newton_schulz(matrices):
    """Approximates the orthogonal factor of each matrix: (n, rows, columns), U S V' -> about U V'.

    Five Newton-Schulz iterations with Jordan's coefficients bring the singular values to between
    0.7 and 1.2. They run in 16 bits where the device computes in them.
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


class TailAverage:
    """The mean of the weights after each step of a run's tail, its last tail_average x max_steps
    (Izmailov et al., "Averaging weights leads to wider optima", 2018; at the end of a run with a
    decaying rate: modded-nanogpt's records/track_3_optimization, #45).

    A second model holds it, from the start of the run, so that memory does not run out late.
    n_averaged: how many steps' weights are in it; 0 before the tail.
    """

    def __init__(self, model, config, max_steps):
        n_steps = max(int(config.tail_average * max_steps + 1e-9), 1) if config.tail_average else 0
        self.model, self.first_step, self.n_averaged = model, max_steps - n_steps, 0
        self.mean = copy.deepcopy(model).requires_grad_(False) if n_steps else model

    @torch.no_grad()
    def update(self, step):
        """After every step; `step` counts the steps done."""
        self.n_averaged = self.n_averaged + 1 if step > self.first_step else 0
        if self.n_averaged:
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()),
                                 1 / self.n_averaged)

    def state_dict(self):
        """A checkpoint's entries. "model" has the weights to use; inside the tail they are the
        mean, and "training_model" has those to go on from."""
        entries = {"model": self.mean.state_dict(), "training_model": self.model.state_dict()}
        if not self.n_averaged:
            entries = {"model": self.model.state_dict()}
        return {**entries, "averaged_steps": self.n_averaged}

    def load_state_dict(self, checkpoint):
        """From what state_dict returned, or a checkpoint that is older than this class."""
        self.n_averaged = checkpoint.get("averaged_steps", 0)
        if self.n_averaged:
            self.mean.load_state_dict(checkpoint["model"])
        self.model.load_state_dict(checkpoint.get("training_model", checkpoint["model"]))
