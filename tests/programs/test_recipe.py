"""The recipe of train.py, against a loop that is written out here: draws, gradients, AdamW, the
moving average. The runs use --size, so that nothing depends on what --tiny means."""

import importlib
import math
import os
from dataclasses import replace

import pytest
import torch
from helpers import metrics, run_cli, small

import train as program
from common.checkpoint import load_model, read_checkpoint
from common.distributed import tune_device
from data import Dataset, load
from diffusion import DDPM, RectifiedFlow, StepRNG, make_generator
from experiments import runs

pytestmark = pytest.mark.usefixtures("few_digits")

SMALL = dict(size=28, patch=7, channels=1, classes=10, dim=16, depth=2, heads=2, learn_sigma=False)
OWN = {                         # with these, a model's own losses matter from the first step on
    "dit": {}, "ditmoe": dict(experts=4, alpha=1.0), "racedit": dict(
        experts=4, k=2, split=2, sim=0.1, balance=0.1, plr=0.1),
    "dydit": dict(head_bias=0.0, channel_bias=0.0, token_bias=0.0, router_lr=30.0, anneal_steps=2,
                  anneal_start=0, full_model_steps=2)}


def options(out, model="dit", **changes):
    """The command line of a small run with the recipe of the papers' sizes."""
    given = dict(steps=8, batch=4, log_every=1, sample_every=0, seed=3, out=out) | changes
    fields = {k: v for k, v in (SMALL | OWN[model]).items() if k != "learn_sigma"}
    return [*f"--model {model} --size S/2 --device cpu --amp off".split(),
            *(word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", v)),
            "--set", *(f"{k}={v}" for k, v in fields.items())]


def train(out, model="dit", **changes):
    run_cli(program, *options(out, model, **changes))
    return read_checkpoint(out / "last.pt")


def new_model(model, seed=3):
    """-> the module and a model with the weights that a run begins with."""
    module = importlib.import_module(model)
    torch.manual_seed(seed)
    return module, module.Model(module.Config(**SMALL, **OWN[model])).train()


def by_hand(model, steps=8, batch=4, lr=1e-4, warmup=0, cooldown=0.0, beta2=0.999, ema=0.9999,
            clip=0.0, drop=0.1, seed=3):
    """The defaults are those of DiT -> weights, averages, {name: tensor}, and what a log holds."""
    (module, net), data, log = new_model(model, seed), load("digits"), []
    weights = {k: p for k, p in net.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in weights.items()}
    mean = {k: torch.zeros_like(p) for k, p in average.items()}
    square = {k: torch.zeros_like(p) for k, p in average.items()}
    for step in range(steps):
        rng = StepRNG(seed, step, batch, torch.arange(batch))
        ids = program.shuffled_ids(len(data), seed, step * batch, (step + 1) * batch)
        x, y = data.batch(ids, rng)
        y = torch.where(rng.uniform("forget") < drop, 10, y)
        if hasattr(module, "loss"):
            loss, aux = module.loss(RectifiedFlow(), net, x, y, step, rng)
        else:
            t, noise = rng.normal("t").sigmoid(), rng.normal("noise", *x.shape[1:])
            mix = t.view(-1, 1, 1, 1)
            prediction, aux = net((1 - mix) * x + mix * noise, t, y)
            loss = (prediction - (noise - x)).square().mean()
        total = loss + sum(v for k, v in aux.items() if k.endswith("_loss"))
        grads = dict(zip(weights, torch.autograd.grad(total, weights.values())))
        norm = math.sqrt(sum(g.double().square().sum() for g in grads.values()))
        rate = lr * min(1, (step + 1) / (warmup + 1))
        if cooldown and step > steps - cooldown * steps:
            rate *= (steps - step) / (cooldown * steps)
        decay = min(ema, (1 + step) / (10 + step))
        for k, p in weights.items():
            g = grads[k] * (clip / norm if clip and norm > clip else 1)
            mean[k] = 0.9 * mean[k] + 0.1 * g
            square[k] = beta2 * square[k] + (1 - beta2) * g**2
            root = (square[k] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
            own = 30 if model == "dydit" and ("_rate." in k or "token_selection" in k) else 1
            p.data -= own * rate * mean[k] / (1 - 0.9 ** (step + 1)) / root
            average[k] = decay * average[k] + (1 - decay) * p.detach()
        log.append((loss.item(), norm))
    return weights, average, log


RECIPE = dict(lr=1e-2, warmup=2, cooldown=0.5, beta2=0.95, ema=0.3, clip=0.4, drop=0.5)


@pytest.mark.parametrize("model, changes", [
    ("dit", {}), ("dit", RECIPE), ("ditmoe", RECIPE), ("racedit", RECIPE), ("dydit", RECIPE)])
def test_a_run_computes_what_a_loop_written_by_hand_computes(tmp_path, model, changes):
    content = train(tmp_path, model, **changes)
    weights, average, log = by_hand(model, **changes)
    start = dict(new_model(model)[1].named_parameters())
    moved = max((weights[k] - start[k]).abs().max() for k in weights)
    for mine, theirs in ((weights, content["model"]), (average, content["ema"])):
        assert max((mine[k] - theirs[k]).abs().max() for k in mine) < 1e-3 * moved
    lines = metrics(tmp_path)
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in log], rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx([n for _, n in log], rel=1e-3)


def test_the_recipe_of_the_papers_sizes_is_dits():
    """Learning rate 1e-4 constant, batch 256, no weight decay, no warm-up, EMA 0.9999, labels
    dropped with 0.1, 400K steps: DiT, Sec. 4 and its train.py. AdamW's betas are torch's."""
    args = program.parse_args("--model dit --size XL/2".split())
    assert [args.steps, args.batch, args.lr, args.warmup, args.cooldown, args.beta2, args.ema,
            args.clip, args.drop] == [400_000, 256, 1e-4, 0, 0, 0.999, 0.9999, 0, 0.1]
    assert {program.lr_multiplier(args, step) for step in (0, 1, 399_999)} == {1.0}
    module, model = new_model("dit")
    (optimizer, peak), = program.make_optimizers(args, module, model, RectifiedFlow(),
                                                 torch.device("cpu"))
    group, = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and peak == [1e-4] == [group["lr"]]
    assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == (
        (0.9, 0.999), 1e-8, 0, False)


def test_a_tenth_of_the_rate_is_a_tenth_of_the_first_step(tmp_path):
    """AdamW's first step has the length of the learning rate, of each group its own."""
    start = dict(new_model("dydit")[1].named_parameters())
    for lr in (1e-3, 1e-4):
        after = train(tmp_path / f"{lr}", "dydit", steps=1, lr=lr)["model"]
        step = {k: (after[k] - w).abs().max().item() for k, w in start.items()}
        routers = [v for k, v in step.items() if "_rate." in k or "token_selection" in k]
        assert max(routers) == pytest.approx(30 * lr, rel=1e-2)
        assert max(step[k] for k in step if "rate" not in k and "token_sel" not in k
                   ) == pytest.approx(lr, rel=1e-2)


def test_the_weights_of_ant_uw_have_a_rate_of_their_own(tmp_path):
    """0.025: DTR's official code. AdamW's first step has this length, however small --lr is."""
    content = train(tmp_path, steps=1, path="ddpm", weighting="ant-uw", clusters=2)
    assert content["path"]["weights"]["log_var"].abs().tolist() == pytest.approx([0.025, 0.025])


def test_only_the_models_gradient_is_measured_and_cut():
    """ANT-UW's loss weights have gradients of their own, which are neither."""
    model, ant = torch.nn.Linear(2, 1, bias=False), DDPM(weighting="ant-uw", clusters=2)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    ant.log_var.grad = torch.tensor([30.0, 40.0])
    norm, ok, _ = program.clip_gradients(1.0, model, dict(loss=torch.ones(())), ant, 1)
    assert norm.item() == pytest.approx(5) and ok
    assert model.weight.grad.norm().item() == pytest.approx(1, rel=1e-5)
    assert ant.log_var.grad.tolist() == [30, 40]


@pytest.mark.parametrize("loss, gradient, ok", [
    (1.0, 3.0, True), (math.nan, 3.0, False), (math.inf, 3.0, False), (1.0, math.nan, False),
    (1.0, math.inf, False), (1.0, -math.inf, False), (1.0, 3e38, False)])
def test_a_step_with_any_number_that_is_not_finite_is_no_step(loss, gradient, ok):
    """The squares of 3e38 overflow: such a gradient has no norm to cut it by."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[gradient, 4.0]])
    assert program.clip_gradients(1.0, model, dict(loss=torch.tensor(loss)), RectifiedFlow(), 1,
                                  stop=True)[1:] == (ok, True)


# ------------------------------------------------------------------------ the moving average


def test_sample_sheets_are_drawn_from_the_averaged_weights(tmp_path, monkeypatch):
    """If the average stays as it began, so does the sheet, whatever the raw weights learn."""
    monkeypatch.setattr(program, "update_ema", lambda *args: None)
    sheets = []
    for lr in (0, 1e-2):
        train(tmp_path / f"{lr}", steps=3, sample_every=3, lr=lr)
        sheets.append((tmp_path / f"{lr}/samples/step_0000003.png").read_bytes())
    assert sheets[0] == sheets[1]


def race_statistics(model, step, places, drop=0.1, batch=8, seed=3):
    """Race-DiT's K-th scores (N, 1) on some of the images of a step."""
    data, rng = load("digits"), StepRNG(seed, step, batch, places)
    ids = program.shuffled_ids(len(data), seed, step * batch, (step + 1) * batch)
    x, y = data.batch(ids[places], rng)
    y = torch.where(rng.uniform("forget") < drop, 10, y)
    t, noise = RectifiedFlow().sample_times_and_noise(x, rng)
    with torch.no_grad():
        return model(RectifiedFlow().q_sample(x, noise, t), t, y)[1]["kth_score_stat"]


def thresholds(state):
    return torch.stack([state[f"blocks.{i}.moe.tau"] for i in range(SMALL["depth"])])


def test_the_averages_threshold_is_the_mean_over_the_next_16_batches(tmp_path):
    content = train(tmp_path, "racedit", steps=3, batch=8, lr=1e-2)
    model = load_model(tmp_path / "last.pt")[0].train()
    each = torch.stack([race_statistics(model, 3 + i, torch.arange(8)) for i in range(16)])
    assert torch.allclose(thresholds(content["ema"]), each.mean(0), atol=1e-6)
    assert each.std(0).min() > 1e-3                     # one batch would say something else


def test_statistics_and_losses_are_means_over_the_parts_of_a_step(tmp_path):
    content = train(tmp_path, "racedit", steps=1, batch=8, accum=4, lr=0)
    model = new_model("racedit")[1]
    each = torch.stack([race_statistics(model, 0, part) for part in torch.arange(8).chunk(4)])
    assert torch.allclose(thresholds(content["model"]), each.mean(0), atol=1e-6)
    assert each.std(0).min() > 1e-3


def test_the_threshold_remembers_its_last_hundred_steps(tmp_path):
    """momentum 0.99: the second K-th score moves it by 1 % of the difference."""
    content = train(tmp_path, "racedit", steps=2, batch=8, lr=0)
    first, second = (race_statistics(new_model("racedit")[1], step, torch.arange(8))
                     for step in range(2))
    assert torch.allclose(thresholds(content["model"]), 0.99 * first + 0.01 * second, atol=1e-6)
    assert (first - second).abs().min() > 1e-3


# ------------------------------------------------------------------------ what a step draws


def latents(n):
    """A data set of latents whose mean is the image's number, negative if mirrored; std 1."""
    def read(rows, mirrored):
        sign = 1 - 2 * torch.tensor(mirrored).float()
        mean = sign * (1000 + 10 * torch.tensor(rows).float())
        moments = torch.stack([mean, torch.ones_like(mean)], 1)
        return moments[:, :, None, None, None].expand(-1, -1, 1, 2, 2)
    return Dataset("latents", torch.arange(n) % 10, read, flips=True, scale=1.0)


class Asked:
    """Stands in for a model: remembers what it is asked."""

    def __init__(self, cfg):
        self.cfg, self.inputs = cfg, None

    def __call__(self, x, t, y, gate_noise=None):
        self.inputs = x, t, y, gate_noise
        return torch.zeros_like(x), dict(flops=torch.zeros_like(t))


KINDS = {"flow": ("dit", RectifiedFlow()), "uniform": ("dit", RectifiedFlow("uniform")),
         "ddpm": ("dit", DDPM()), "ant-uw": ("dit", DDPM(weighting="ant-uw")),
         "dydit": ("dydit", RectifiedFlow())}


def draws(kind, steps=250, batch=32):
    """Everything that is drawn for each image of a run -> {name: (steps, batch)}."""
    model, diffusion = KINDS[kind]
    module, data, found = importlib.import_module(model), latents(1000), []
    args = program.parse_args(f"--model {model} --tiny --batch {batch} --drop 0.3".split())
    net = Asked(replace(module.TINY, size=2, patch=1, channels=1, depth=1, heads=1))
    loss = getattr(module, "loss", program.default_loss)
    for step in range(steps):
        (rows, y, rng), = program.get_batches(args, data, net.cfg, 0, 1, step)
        x0, y, rng = program.prepare(data, rows, y, rng, torch.device("cpu"))
        loss(diffusion, net, x0, y, step, rng)
        x, t, y, gates = net.inputs
        a, b = (diffusion.q_sample(u, v, t) for u, v in ((x0, 0 * x0), (0 * x0, x0 * 0 + 1)))
        noise, mean = ((x - a) / b).flatten(1), rows[:, 0].flatten(1)[:, 0]
        latent = (x0.flatten(1) - mean[:, None])
        one = dict(image=mean.abs(), mirrored=mean.sign(), dropped=(y == 10).float(), t=t,
                   noise0=noise[:, 0], noise1=noise[:, 3], latent0=latent[:, 0],
                   latent1=latent[:, 3])
        if gates is not None:
            one |= dict(gate0=gates[:, 0, 0], gate1=gates[:, 0, -1])
        found.append(one)
    return {k: torch.stack([one[k] for one in found]).double() for k in found[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_draws_of_a_run_begin_with_the_same_random_state(kind, monkeypatch):
    """Tensors of different shapes would share numbers, though not at the same image."""
    begin = []

    def watched(*key, device="cpu"):
        begin.append(make_generator(*key).initial_seed())
        return make_generator(*key, device=device)
    monkeypatch.setattr("diffusion.make_generator", watched)
    draws(kind, steps=20)
    assert len(set(begin)) == len(begin) >= 20 * 5      # flip, latent, forget, t, noise


@pytest.mark.parametrize("kind", KINDS)
def test_all_draws_of_a_step_are_independent_of_each_other_and_of_the_last_step(kind):
    """Correlations of the draws and of their distances from the median, of 8,000 images: between
    draws of the same image, of its neighbour in the batch, and of the step before. (Stratified
    times depend on the place in the batch, so a time is not compared with other times.)"""
    found = draws(kind)
    assert found["dropped"].mean() == pytest.approx(0.3, abs=0.03)
    assert found["mirrored"].mean().abs() < 0.06 and found["image"].unique().numel() == 1000
    features = {}
    for name, v in found.items():
        rank = v.flatten().argsort().argsort().view(v.shape).double() / v.numel() - 0.5
        rank = v - v.mean() if v.unique().numel() == 2 else rank
        features |= {name: rank} if v.unique().numel() == 2 else {
            name: rank, f"{name} far": rank.abs() - rank.abs().mean()}
    for a, u in features.items():
        for b, v in features.items():
            same, times = a.split()[0] == b.split()[0], {a.split()[0], b.split()[0]} == {"t"}
            pairs = {"image": (u, v)} if not same else {}
            pairs |= {} if times else {"neighbour": (u, v.roll(1, 1)), "step": (u[1:], v[:-1])}
            for what, (p, q) in pairs.items():
                r = (p * q).mean() / (p.square().mean() * q.square().mean()).sqrt()
                assert abs(r) < 0.065, f"{kind}: {a} and {b}, {what}: {r:.2f}"


def test_every_part_of_a_step_knows_how_many_images_came_before():
    """So DyDiT's quarters of time and ANT-UW's clusters go on from batch to batch."""
    args, data = program.parse_args("--model dit --tiny --batch 18 --accum 3".split()), load()
    cfg = replace(importlib.import_module("dit").TINY, classes=10)
    parts = [part for rank in range(2) for part in program.get_batches(args, data, cfg, rank, 2, 5)]
    assert len(parts) == 6 and {rng.first for _, _, rng in parts} == {5 * 18}
    assert torch.cat([rng.rows for _, _, rng in parts]).sort().values.tolist() == list(range(18))


def test_the_flops_that_a_study_reports_are_the_mean_over_all_times():
    """A network that spends t^4 costs 1/5 on average; at t = 1/2 alone it would be 1/16."""
    module, cfg = small("dydit", size=28, patch=7, channels=1, dim=32, depth=1)
    model = module.Model(cfg).eval()
    whole = model.forward

    def forward(x, t, y):
        out, aux = whole(x, t, y)
        return out, aux | dict(flops=t**4)
    model.forward = forward
    found = runs.schedule(model, RectifiedFlow(), load("digits", "test"))
    assert found["mean"] == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("cores, told, threads", [(2, None, 1), (2, "2", 2), (8, None, 2)])
def test_two_cores_get_one_thread_unless_told_otherwise(monkeypatch, cores, told, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    torch.set_num_threads(2)                            # as torch would start there
    try:
        tune_device(torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
