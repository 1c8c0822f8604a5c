"""The learning rate of each step, and which optimiser updates which parameter and how."""

import numpy as np
import pytest
import torch
from torch import nn

import config
import nanolab.optim
import train
from model import GPT, GPTConfig
from conftest import equal_weights, evaluate
from nanolab.checkpoint import read_checkpoint
from nanolab.data import TokenDataset
from nanolab.logfile import read_log
from nanolab.optim import CautiousAdamW, Muon, make_optimizer, set_learning_rate


def test_schedule_is_the_published_one():
    published = config.load(["config/interventions/schedule_learning_rate.py"])
    steps = train.count_steps(published)
    rates = [train.learning_rate_at(step, steps, published) for step in range(steps)]
    assert steps == 33_165 and np.argmax(rates) == 1658
    assert [rates[0], rates[1658], rates[33_164]] == pytest.approx([1.4e-8, 1.4e-3, 1.4e-4],
                                                                   rel=1e-9)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.4e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1e-5, total_iters=1658),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1658, 1.4e-4)], [1658])
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1.2e-4)
        optimizer.step()
        scheduler.step()


def test_wsd_schedule(small_run):
    """In the log of 20 steps: 4 of warm-up, the peak until step 14, a straight line over the last 5
    down to a tenth."""
    folder = small_run("run", "--max_steps=20", "--schedule=wsd", "--warmup_fraction=0.2",
                       "--cooldown_fraction=0.25")
    rates = [entry["lr"] for entry in read_log(folder / "log.jsonl")[0]]
    assert rates == pytest.approx([1e-8, 2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 11, 8.2e-4, 6.4e-4, 4.6e-4,
                                   2.8e-4, 1e-4], rel=1e-4)


def test_decay_groups():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=4))
    for decay, n_groups in (("all", 1), ("matrices", 2)):
        groups = make_optimizer(model, config.load([f"--decay={decay}",
                                                    "--weight_decay=0.3"])).param_groups
        assert len(groups) == n_groups and groups[0]["weight_decay"] == 0.3
        assert decay == "all" or all(
            p.ndim < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_each_parameter_has_one_optimizer(monkeypatch):
    """Muon has the blocks' matrices, AdamW the rest, a tied head once; a parameter without an owner
    stops the run."""
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=2, n_head=1, n_embd=4, qkv_bias=True,
                          tie_weights=True))
    options = config.load(["--optimizer=muon", "--decay=matrices", "--activation=swiglu"])
    muon, adamw = make_optimizer(model, options).optimizers
    assert {group["n_split"]: len(group["params"])
            for group in muon.param_groups} == {3: 2, 1: 4, 2: 2}
    names = {p: name for name, p in model.named_parameters()}
    owned = [[names[p] for group in part.param_groups for p in group["params"]]
             for part in (muon, adamw)]
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj",
                                                                           "mlp.fc", "mlp.proj")}
    assert set(owned[0]) == matrices and len(owned[0]) == 8
    assert sorted(owned[1]) == sorted(set(names.values()) - matrices) and "wte.weight" in owned[1]
    monkeypatch.setattr(model, "parameters", lambda: [*names, nn.Parameter(torch.zeros(2))])
    with pytest.raises(AssertionError, match="one owner"):
        make_optimizer(model, options)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 1e-2)])
def test_muon_is_torchs(monkeypatch, dtype, tolerance):
    """As torch.optim.Muon in its bfloat16, as on a GPU, and with that taken away, for every shape;
    Q, K and V stacked are each by itself."""
    monkeypatch.setattr(nanolab.optim, "autocast_dtype", lambda amp, device: dtype)
    if not dtype:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    draw = torch.Generator().manual_seed(1)
    shapes = [(24, 8), (8, 24), (8, 8), (8, 8), (8, 8)]
    theirs = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [nn.Parameter(p.detach().clone())
            for p in theirs[:2]] + [nn.Parameter(torch.cat([p.detach() for p in theirs[2:]]))]
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = Muon([{"params": ours[:2]}, {"params": ours[2:], "n_split": 3}], lr=0.1,
                weight_decay=0.3)
    for _ in range(5):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=draw)
        for p, grad in zip(ours, [*(p.grad for p in theirs[:2]),
                                  torch.cat([p.grad for p in theirs[2:]])]):
            p.grad = grad.clone()
        reference.step()
        muon.step()
    for our, their in zip(ours, [*theirs[:2], torch.cat(theirs[2:])], strict=True):
        assert torch.allclose(our, their, rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_own_rates(optimizer, decay):
    """Each parameter is in one group, whose rate is its kind's multiple; AdamW's decay may differ
    from Muon's."""
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=2, n_head=1, n_embd=4,
                          value_embeddings=True, x0_lambdas=True))
    options = config.load([f"--optimizer={optimizer}", f"--decay={decay}", "--embedding_lr=2",
                           "--head_lr=3", "--scalar_lr=5", "--adamw_weight_decay=0.01",
                           "--weight_decay=0.3"])
    made = make_optimizer(model, options)
    set_learning_rate(made, 0.1)
    got = {
        id(p): (group["lr"], group["weight_decay"])
        for group in made.param_groups
        for p in group["params"]
    }
    assert len(got) == sum(len(group["params"])
                           for group in made.param_groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        multiple = (5 if p.ndim < 2 else 3 if name == "head.weight" else
                    2 if "embedding" in name or name.startswith("w") else 1)
        adamw_decay = 0.01 if decay == "all" or p.ndim >= 2 else 0.0
        expected = 0.3 if optimizer == "muon" and multiple == 1 else adamw_decay
        assert got[id(p)] == (pytest.approx(0.1 * multiple), expected), name


def test_cautious_decay():
    """AdamW and Muon: what the plain one does without decay, less lr x decay of each weight that
    the update makes smaller."""
    draw = torch.Generator().manual_seed(1)
    start, grads = torch.randn(12, 8, generator=draw), torch.randn(6, 12, 8, generator=draw)
    makers = [(lambda p, decay: torch.optim.AdamW([p], lr=0.1, weight_decay=decay),
               lambda p: CautiousAdamW([p], lr=0.1, weight_decay=0.5)),
              (lambda p, decay: Muon([{"params": [p]}], 0.1, decay),
               lambda p: Muon([{"params": [p]}], 0.1, 0.5, cautious=True))]
    for plain, cautious in makers:
        ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
        our, their = cautious(ours), plain(theirs, 0.0)
        n_spared = 0
        for grad in grads:
            before = ours.detach().clone()
            theirs.data.copy_(before)
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            our.step()
            their.step()
            update = before - theirs.detach()
            decays = update * before >= 0
            assert torch.allclose(ours, before - update - 0.1 * 0.5 * before * decays, atol=1e-6)
            n_spared += (~decays).sum().item()
        assert 100 < n_spared < 476


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_normuon(shape):
    """The record's rule, written out: rows of tall matrices, columns of wide ones."""
    draw = torch.Generator().manual_seed(1)
    ours, plain = (nn.Parameter(torch.zeros(2 * shape[0], shape[1])) for _ in range(2))
    muons = [Muon([{"params": [p], "n_split": 2}], 1.0, 0.0,
                  normalise=p is ours) for p in (ours, plain)]
    second = torch.zeros(2, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(2, 1, shape[1])
    for _ in range(3):
        before = ours.detach().clone(), plain.detach().clone()
        grad = torch.randn(ours.shape, generator=draw)
        for p, muon in zip((ours, plain), muons):
            p.grad = grad.clone()
            muon.step()
        got, u = ((was - p.detach()).view(2, *shape) for was, p in zip(before, (ours, plain)))
        u = u / (0.2 * 12 ** 0.5)
        second.lerp_(u.square().mean(dim=2 if shape[0] >= shape[1] else 1, keepdim=True), 0.05)
        expected = u / second.sqrt()
        expected *= u.norm(dim=(1, 2), keepdim=True) / expected.norm(dim=(1, 2), keepdim=True)
        assert torch.allclose(got, 0.2 * 12 ** 0.5 * expected, atol=1e-5)
    assert not torch.allclose(got, 0.2 * 12 ** 0.5 * u, atol=1e-2)


def test_tail_average(small_run, monkeypatch, capsys, data_dir):
    """The mean of the weights of the last 4 of 10 steps: that is what the last validation measured,
    what best.pt has and says it has, and what eval.py tests; the training itself is as without
    it."""
    flags = ["--tie_weights", "--init=gpt2", "--learning_rate=1e-2"]
    steps = [
        read_checkpoint(small_run(f"run{n}", *flags, f"--max_steps={n}") / "last.pt")["model"]
        for n in (7, 8, 9, 10)
    ]
    folder = small_run("run", *flags, "--tail_average=0.4", "--eval_every=5")
    best = read_checkpoint(folder / "best.pt")
    assert best["averaged_steps"] == 4 and equal_weights(folder / "best.pt", folder / "last.pt")
    for name, mean in best["model"].items():
        assert torch.allclose(mean, torch.stack([weights[name] for weights in steps]).mean(dim=0),
                              atol=1e-7), name
        assert torch.equal(best["training_model"][name], steps[-1][name])
    data = TokenDataset(data_dir, "stdlib", "val", 32)
    inputs, targets = data.batch(range(64))
    assert GPT.from_checkpoint(best)(inputs,
                                     targets).item() == pytest.approx(best["val_loss"], abs=1e-5)
    assert "mean of the last 4 steps' weights" in evaluate(monkeypatch, capsys, "--ckpt",
                                                           folder / "best.pt")
