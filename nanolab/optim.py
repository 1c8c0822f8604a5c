"""Which optimiser updates which parameter; Muon."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanolab.devices import autocast_dtype


def make_optimizer(model, config):
    """AdamW for all parameters; or, with optimizer='muon', Muon for the matrices in the blocks and
    AdamW for the rest.

    decay='all': every parameter decays, as published; 'matrices': only 2-D weights, not biases and
    norms.
    """
    muon_params = {}  # by how many matrices one weight holds: Q, K and V; SwiGLU's gate and value
    adamw_decay, adamw_no_decay = [], []
    for name, p in model.named_parameters():
        if config.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2:
            is_swiglu = name.endswith("fc.weight") and config.activation == "swiglu"
            n_split = 3 if name.endswith("qkv.weight") else 2 if is_swiglu else 1
            muon_params.setdefault(n_split, []).append(p)
        elif config.decay == "all" or p.ndim >= 2:
            adamw_decay.append(p)
        else:
            adamw_no_decay.append(p)
    muon_groups = [{"params": params, "n_split": n} for n, params in muon_params.items()]
    adamw_groups = [{"params": adamw_decay}, {"params": adamw_no_decay, "weight_decay": 0.0}]
    adamw_groups = [group for group in adamw_groups if group["params"]]
    owned = [id(p) for group in (*muon_groups, *adamw_groups) for p in group["params"]]
    all_params = sorted(id(p) for p in model.parameters())
    assert sorted(owned) == all_params, "each parameter has exactly one owner"

    adamw = torch.optim.AdamW(adamw_groups, lr=config.learning_rate, eps=config.eps, fused=True,
                              betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    if not muon_groups:
        return adamw
    return MuonAdamW(Muon(muon_groups, config.learning_rate, config.weight_decay), adamw)


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
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "n_split": 1})

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
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for shape in {p.shape for p in params}:  # all matrices of one shape in one batch
                same = [i for i, p in enumerate(params) if p.shape == shape]
                stack = torch.stack([directions[i] for i in same])
                matrices = stack.view(len(same) * group["n_split"], -1, shape[1])
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5
                updates = list(orthogonalise(matrices).reshape(stack.shape))
                torch._foreach_add_([params[i] for i in same], updates, alpha=-group["lr"] * scale)


def orthogonalise(matrices):
    """newton_schulz of (n, rows, columns) matrices; each rank does its share, and all get all."""
    if not dist.is_initialized():
        return newton_schulz(matrices)
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
