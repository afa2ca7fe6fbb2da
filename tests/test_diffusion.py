"""Losses, samplers, guidance and chance, against closed forms.

The oracle for samplers is a model that cannot be wrong: for one picture, or for Gaussian data
N(mu, s^2), the best prediction is a formula, and so is where its trajectory must end."""

import math

import pytest
import torch

import diffusion
from diffusion import DDPM, Draw, RectifiedFlow, guide, index_noise, respace

F64 = torch.float64
MU = torch.rand(1, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1)) * 2 - 1
NOISE = torch.randn(6, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(2))


def last(trajectory):
    *_, (t, x, x0) = trajectory
    assert t == 0
    return x


def perfect_flow(s):
    """E[noise - x0 | x] for data N(MU, s^2); s = 0: for the picture MU, on its way from NOISE."""
    def f(x, t):
        if s == 0 and t == 0:
            return NOISE - MU
        var, rest = ((1 - t) * s) ** 2 + t**2, x - (1 - t) * MU
        return t / var * rest - (MU + (1 - t) * s**2 / var * rest)
    return f


def perfect_noise(path, s):
    """E[noise | x] for data N(MU, s^2)."""
    def f(x, t):
        a = path.abar[round(t * 1000)].item()
        return math.sqrt(1 - a) / (a * s**2 + 1 - a) * (x - math.sqrt(a) * MU)
    return f


def gaussian_end(path, s, steps, solver):
    """Where the exact ODE takes NOISE: it keeps (x - mean) / std for ever."""
    if path.kind == "rf":
        return MU + s * NOISE
    a = path.abar[respace(1000, steps, solver)[-1]].item()
    return MU + s * (NOISE - math.sqrt(a) * MU) / math.sqrt(a * s**2 + 1 - a)


# ------------------------------------------------------------------------ perfect models


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("path, solver, eta", [
    (RectifiedFlow(), "euler", 0), (RectifiedFlow(), "heun", 0), (DDPM(), "ddpm", 0),
    (DDPM("cosine"), "ddpm", 0), (DDPM(), "ddim", 0), (DDPM(), "ddim", 1), (DDPM(), "dpm++", 0),
    (DDPM("cosine"), "dpm++", 0)])
def test_who_knows_the_picture_gets_it_back_through_every_sampler(path, solver, eta, steps):
    f = perfect_flow(0) if path.kind == "rf" else perfect_noise(path, 0)
    for t, x, x0 in path.trajectory(f, NOISE, steps, solver=solver, eta=eta):
        assert (x0 - MU).abs().max() < 1e-4                     # and aims at it all the way
    assert t == 0 and (x - MU).abs().max() < 1e-4


@pytest.mark.parametrize("path, solver, order, steps", [
    (RectifiedFlow(), "euler", 1, 40), (RectifiedFlow(), "heun", 2, 40), (DDPM(), "ddim", 1, 50),
    (DDPM("cosine"), "ddim", 1, 50), (DDPM("cosine"), "dpm++", 2, 40), (DDPM(), "dpm++", 2, 20)])
def test_twice_the_steps_halve_or_quarter_the_error(path, solver, order, steps):
    f = perfect_flow(0.5) if path.kind == "rf" else perfect_noise(path, 0.5)
    error = []
    for n in (steps, 2 * steps):
        x = last(path.trajectory(f, NOISE, n, solver=solver))
        error.append((x - gaussian_end(path, 0.5, n, solver)).abs().max().item())
    assert error[0] < 0.15
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.2)


def test_every_x0_on_the_way_is_what_the_model_believes():
    path, s = DDPM(), 0.5
    f = perfect_noise(path, s)
    x, t = NOISE, 0.999
    for then, after, x0 in path.trajectory(f, NOISE, 30, "ddpm"):
        a = path.abar[round(t * 1000)].item()
        best = MU + math.sqrt(a) * s**2 / (a * s**2 + 1 - a) * (x - math.sqrt(a) * MU)
        assert (x0 - best).abs().max() < 1e-4
        x, t = after, then


def spread(path, f, steps, solver, **options):
    """Mean and standard deviation of a sampler that is linear in its random numbers, exactly: row 0
    gets zeros, each other row a single 1."""
    n = len(respace(1000, steps, solver))
    rows = torch.cat([torch.zeros(1, n + 1), torch.eye(n + 1)])             # (n+2, n+1)
    rows = rows.to(F64)[:, :, None, None, None].expand(-1, -1, 1, 4, 4)
    x = last(path.trajectory(f, rows[:, 0], steps, solver=solver, noise=lambda i: rows[:, i + 1],
                             **options))
    return x[:1], (x[1:] - x[:1]).square().sum(0, keepdim=True).sqrt()


@pytest.mark.parametrize("steps", [10, 100])
def test_ancestral_sampling_with_the_exact_variance_samples_the_data(steps):
    """For Gaussian data a reverse step is a Gaussian, however long: ten steps must do."""
    path, s = DDPM("cosine"), 0.6
    kept, noise = respace(1000, steps), perfect_noise(path, s)

    def f(x, t):
        n = kept.index(round(t * 1000))
        a, before = path.abar[kept[n]].item(), path.abar[kept[n - 1]].item() if n else 1.0
        beta = 1 - a / before
        tilde = beta * (1 - before) / (1 - a)
        spare = (math.sqrt(before) * beta / (1 - a)) ** 2 * s**2 * (1 - a) / (a * s**2 + 1 - a)
        share = math.log((tilde + spare) / tilde) / math.log(beta / tilde) if n else 0
        return torch.cat([noise(x, t), torch.full_like(x, 2 * share - 1)], dim=1)

    mean, std = spread(path, f, steps, "ddpm")
    assert (mean - MU).abs().max() < 1e-3 and (std - s).abs().max() < 1e-3


def test_ancestral_sampling_with_the_smallest_variance_needs_many_steps():
    path, s = DDPM(), 0.6
    few, many = (spread(path, perfect_noise(path, s), n, "ddpm")[1].mean() for n in (10, 1000))
    assert few < 0.9 * s < 0.98 * s < many < s


def test_ddim_with_eta_one_is_ddpm_with_the_smallest_variance():
    path = DDPM()
    f = perfect_noise(path, 0.5)
    assert respace(1000, 60, "ddim") == respace(1000, 60)       # no integer stride gives 60 steps
    runs = [path.trajectory(f, NOISE, 60, solver, eta=1.0, noise=lambda i: NOISE.roll(i + 1, 0))
            for solver in ("ddim", "ddpm")]
    for (_, x, _), (_, z, _) in zip(*runs):
        assert (x - z).abs().max() < 1e-5


def test_twenty_steps_of_dpm_beat_fifty_of_ddim():
    path = DDPM()
    f = perfect_noise(path, 0.5)
    error = {(solver, n): (last(path.trajectory(f, NOISE, n, solver)) -
                           gaussian_end(path, 0.5, n, solver)).abs().max()
             for solver, n in (("dpm++", 20), ("ddim", 50))}
    assert error["dpm++", 20] < 0.03 < error["ddim", 50]


def test_the_first_step_of_dpm_is_ddims(monkeypatch):
    path = DDPM()
    f = perfect_noise(path, 0.5)
    monkeypatch.setattr(diffusion, "respace",
                        lambda T, steps, solver: diffusion.even_in_log_snr(path.abar, steps))
    runs = [path.trajectory(f, NOISE, 60, solver) for solver in ("ddim", "dpm++")]
    (_, x, _), (_, z, _) = map(next, runs)
    assert (x - z).abs().max() < 1e-6


# ------------------------------------------------------------------------ paths


def test_a_flow_goes_straight_from_data_to_noise():
    path, e = RectifiedFlow(), NOISE
    x0 = e.flip(0)
    t = torch.tensor([0, 0.25, 0.5, 1, 0, 1], dtype=F64)
    x = path.mix(x0, e, t)
    assert torch.equal(x[[0, 4]], x0[[0, 4]]) and torch.equal(x[[3, 5]], e[[3, 5]])
    assert torch.allclose(x[1], 0.75 * x0[1] + 0.25 * e[1])
    assert torch.allclose(x + (1 - t).view(-1, 1, 1, 1) * path.target(x0, e), e)


def test_ddpm_keeps_the_variance_and_ends_in_noise():
    for path in (DDPM(), DDPM("cosine")):
        t, one = torch.arange(1000) / 1000, torch.ones(1000, 1, 1, 1)
        data, noise = path.mix(one, 0 * one, t).flatten(), path.mix(0 * one, one, t).flatten()
        assert torch.allclose(data**2 + noise**2, torch.ones(1000), atol=1e-5)
        assert data[0] > 0.9999 and data[999] < 0.007 and (data.diff() < 0).all()


def test_step_n_is_time_n_over_a_thousand():
    assert DDPM().step(torch.arange(1000) / 1000).tolist() == list(range(1000))
    assert DDPM().step(torch.tensor([1.0])).item() == 999
    grid = DDPM().grid(torch.tensor([0.0, 0.4567, 1.0]))
    assert grid.tolist() == pytest.approx([0, 0.456, 0.999])


SNR = {"linear": (9999, 8.537, 1.090, 0.08436, 3.311e-3, 4.036e-5),
       "cosine": (24220, 34.18, 5.489, 0.9696, 0.1671, 2.429e-9)}        # from the authors' code


@pytest.mark.parametrize("schedule", SNR)
def test_schedules_have_the_official_signal_to_noise_ratios(schedule):
    a = DDPM(schedule).abar[[0, 100, 250, 500, 750, 999]]
    assert (a / (1 - a)).tolist() == pytest.approx(SNR[schedule], rel=1e-3)


def test_the_cosine_schedule_is_a_squared_cosine_until_its_last_steps():
    u = (torch.arange(1, 981, dtype=F64) / 1000 + 0.008) / 1.008
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    expected = (u * math.pi / 2).cos() ** 2 / start
    assert torch.allclose(DDPM("cosine").abar[:980], expected, rtol=1e-9)


def test_training_times_are_where_they_should_be():
    draw, x0 = Draw(0, 0, 20_000, torch.arange(20_000)), torch.zeros(20_000, 1, 1, 1)
    t, noise = RectifiedFlow().draw(x0, draw)
    inner = torch.tensor([-1.0, 1.0]).sigmoid()
    assert ((inner[0] < t) & (t < inner[1])).float().mean() == pytest.approx(0.683, abs=0.01)
    t, _ = RectifiedFlow("uniform").draw(x0, draw)
    assert t.histc(10, 0, 1).tolist() == pytest.approx([2000] * 10, rel=0.1)
    t, _ = DDPM().draw(x0, draw)
    assert (t * 1000).round().long().bincount().shape == (1000,)
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(1, abs=0.02)


def test_unknown_choices_are_refused():
    for make in (lambda: RectifiedFlow("cosine"), lambda: DDPM("quadratic"),
                 lambda: DDPM(weighting="snr"), lambda: respace(1000, 0),
                 lambda: DDPM(weighting="min-snr", gamma=0.0),
                 lambda: respace(1000, 1001)):
        with pytest.raises(ValueError):
            make()


# ------------------------------------------------------------------------ the learned variance


def vb(path, n, v, error=0.0):
    """The variational term at step n for a network whose noise is off by `error`, variance v."""
    n, noise = torch.full((6,), n), NOISE.float()
    x0 = noise.flip(0).clamp(-1, 1)
    x = path.mix(x0, noise, n / 1000)
    return path.vb(torch.cat([noise + error, torch.full_like(noise, v)], 1), x0, x, n)


def test_a_perfect_guess_with_the_true_variance_costs_no_bits():
    assert vb(DDPM(), 500, -1.0).abs().max() < 1e-5
    assert vb(DDPM(), 500, -1.0, error=0.1).min() > 1e-6


def test_the_variational_term_is_a_kl_divergence_in_bits():
    path = DDPM()
    a, before = path.abar[20], path.abar[19]
    beta = 1 - a / before
    tilde = beta * (1 - before) / (1 - a)
    shift = beta / (1 - a).sqrt() / (a / before).sqrt() * 0.1   # of the mean: the noise is 0.1 off
    p = torch.distributions.Normal(0.0, tilde.sqrt())
    q = torch.distributions.Normal(shift, beta.sqrt())
    kl = torch.distributions.kl_divergence(p, q) / math.log(2)
    assert torch.allclose(vb(path, 20, 1.0, error=0.1), kl.float(), rtol=1e-3)


def test_the_last_step_pays_for_the_grey_level_of_each_pixel():
    path, x0 = DDPM(), NOISE.float().tanh() * 0.9               # a perfect mean at n = 0 is x0
    n, noise = torch.zeros(6, dtype=torch.long), x0.flip(0)
    x = path.mix(x0, noise, n / 1000)
    bits = path.vb(torch.cat([noise, torch.ones_like(x)], 1), x0, x, n)         # variance beta_0
    p = math.erf(1 / 255 / math.sqrt(1 - path.abar[0].item()) / math.sqrt(2))
    assert torch.allclose(bits, torch.full((6,), -math.log2(p)), rtol=2e-3)


def test_the_256_grey_levels_share_all_probability():
    levels = torch.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.3), (-1.2, 0.05), (0.9, 2.0)):
        log_p = diffusion.grey_level_log_likelihood(
            levels, torch.full((256,), mean), torch.full((256,), 2 * math.log(std)))
        assert log_p.exp().sum() == pytest.approx(1, abs=1e-4)


def test_the_variance_lies_between_beta_tilde_and_beta():
    path, n = DDPM(), torch.tensor([1, 10, 100, 500, 900, 999])
    a, before = path.abar[n], path.abar[n - 1]
    beta = (1 - a / before)
    tilde = beta * (1 - before) / (1 - a)
    row = diffusion.Coefficients(path.table, n)
    for v, expected in ((-1.0, tilde), (1.0, beta), (0.0, (beta * tilde).sqrt())):
        prediction = torch.cat([NOISE.float(), torch.full((6, 1, 4, 4), v)], 1)
        log_var = path.reverse(prediction, NOISE.float(), row)[1]
        assert torch.allclose(log_var[:, 0, 0, 0].exp(), expected.float(), rtol=1e-4)


@pytest.mark.parametrize("n", [0, 300])
def test_noise_learns_from_the_error_alone_and_variance_from_vb_alone(n):
    path = DDPM()
    prediction = torch.randn(6, 2, 4, 4, requires_grad=True)
    t, noise = torch.full((6,), n / 1000), NOISE.float()
    total, _ = path.loss(lambda x, t, y: (prediction, {}), noise.flip(0), None, t, noise)
    both, = torch.autograd.grad(total.sum(), prediction)
    error, = torch.autograd.grad(path.mse(prediction, noise).sum(), prediction)
    assert torch.allclose(both[:, :1], error[:, :1]) and both[:, 1:].abs().max() > 0


def test_without_learned_variance_the_loss_is_the_error():
    path, noise = DDPM(), NOISE.float()
    model = lambda x, t, y: (torch.zeros_like(x), {"balance_loss": 1})
    loss, aux = path.loss(model, noise, None, torch.full((6,), 0.5), noise)
    assert torch.allclose(loss, noise.square().mean((1, 2, 3))) and aux == {"balance_loss": 1}


# ------------------------------------------------------------------------ weightings


def weights(path, steps):
    """What the weighting multiplies the squared error with."""
    return path.weigh(torch.ones(len(steps)), 0, torch.tensor(steps) / 1000).tolist()


@pytest.mark.parametrize("schedule, expected, first", [
    ("linear", (5.001e-4, 0.5857, 1, 1, 1, 1), 130),
    ("cosine", (2.064e-4, 0.1463, 0.9109, 1, 1, 1), 261)])
def test_min_snr_5_weighs_as_the_official_table_says(schedule, expected, first):
    path = DDPM(schedule, "min-snr")
    assert weights(path, [0, 100, 250, 500, 750, 999]) == pytest.approx(expected, rel=3e-4)
    assert weights(path, list(range(1000))).index(1.0) == first


def test_min_snr_is_the_weight_of_an_x0_prediction_capped_at_gamma():
    x0_weight = [w * snr for w, snr in zip(weights(DDPM(weighting="min-snr", gamma=2.0),
                                                   [100, 250, 500]), SNR["linear"][1:4])]
    assert x0_weight == pytest.approx([2.0, 1.090, 0.08436], rel=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_p2_weighs_each_picture_by_its_own_step(gamma):
    got = weights(DDPM("cosine", "p2", gamma), [0, 100, 250, 500, 750, 999, 500])
    snr = (*SNR["cosine"], SNR["cosine"][3])
    assert got == pytest.approx([(1 + s) ** -gamma for s in snr], rel=1e-3)


@pytest.mark.parametrize("weighting", ["min-snr", "p2"])
def test_weightings_leave_the_variational_term_alone(weighting):
    path, bits, t = DDPM(weighting=weighting), torch.rand(5), torch.arange(5) / 10
    assert torch.equal(path.weigh(torch.zeros(5), bits, t), bits)
    alone = [path.weigh(bits[i : i + 1], 1.0, t[i : i + 1]) for i in range(5)]
    assert torch.equal(path.weigh(bits, 1.0, t), torch.cat(alone))


def ant(clusters=8, batch=64, processes=1):
    """An ANT-UW path and the times of a batch, drawn by that many processes."""
    path = DDPM(weighting="ant-uw", clusters=clusters)
    parts = [path.draw(torch.zeros(len(rows), 1, 2, 2), Draw(0, 0, batch, rows))[0]
             for rows in torch.arange(batch).chunk(processes)]
    return path, torch.cat(parts)


@pytest.mark.parametrize("clusters, edges", [
    (8, [0, 125, 250, 375, 500, 625, 750, 875]), (5, [0, 200, 400, 600, 800]), (3, [0, 333, 666])])
def test_ant_uw_draws_as_many_times_from_every_cluster(clusters, edges):
    path, t = ant(clusters, 40 * clusters)
    n = path.step(t)
    drawn = torch.bucketize(n, torch.tensor(edges), right=True) - 1
    assert drawn.bincount().tolist() == [40] * clusters
    with torch.no_grad():
        path.log_var.copy_(torch.arange(clusters))              # which weight does each step get?
    every = path.weigh(torch.zeros(1000), 0, torch.arange(1000) / 1000) * 2 / clusters
    assert [every.tolist().index(i) for i in range(clusters)] == edges
    assert (every.diff() >= 0).all()


@pytest.mark.parametrize("clusters, batch", [(8, 4), (8, 12), (5, 32), (3, 1)])
def test_over_batches_that_the_clusters_do_not_divide_all_clusters_are_drawn_alike(clusters, batch):
    path, rows = DDPM(weighting="ant-uw", clusters=clusters), torch.arange(batch)
    drawn = torch.zeros(clusters)
    for step in range(2 * clusters):
        t, _ = path.draw(torch.zeros(batch, 1, 2, 2), Draw(0, step, batch, rows))
        drawn += (t * clusters + 1e-4).long().bincount(minlength=clusters)
    assert (drawn == 2 * batch).all()


def test_ant_uw_draws_the_same_times_on_any_number_of_processes():
    assert torch.equal(ant(processes=1)[1], ant(processes=4)[1])


def test_the_largest_random_number_stays_in_the_last_cluster():
    class Edge(Draw):
        def mine(self, numbers):
            return super().mine(torch.full_like(numbers, 1 - 2**-24))

    path = DDPM(weighting="ant-uw")
    t, _ = path.draw(torch.zeros(8, 1, 2, 2), Edge(0, 0, 8, torch.arange(8)))
    assert path.step(t).tolist() == [124, 249, 374, 499, 624, 749, 874, 999] and t.max() < 1
    path.weigh(torch.ones(8), 0, t)
    assert DDPM().draw(torch.zeros(8, 1, 2, 2), Edge(0, 0, 8, torch.arange(8)))[0].max() < 1


def test_uncertainty_weighting_starts_at_half_the_mean_loss():
    path, t = ant()
    mse, bits = torch.rand(64), torch.rand(64)
    assert path.weigh(mse, bits, t).mean().item() == pytest.approx((mse + bits).mean().item() / 2)


def test_uncertainty_weighting_has_the_values_worked_by_hand():
    path, t = ant()                                             # 8 clusters, each with loss 0.8
    for s, value in ((-1.0, -2.9127), (math.log(0.8 / 8), -5.2103)):
        torch.nn.init.constant_(path.log_var, s)
        total = path.weigh(torch.full((64,), 0.5), 0.3, t).mean().item()
        assert total == pytest.approx(value, abs=1e-4)


def test_uncertainty_weighting_is_best_at_the_log_of_each_loss():
    path, t = ant()
    loss = torch.rand(64) + 0.1
    cluster = (t * 8).long()
    L = torch.stack([loss[cluster == i].mean() / 8 for i in range(8)])
    with torch.no_grad():
        path.log_var.copy_(L.log())
    loss.requires_grad_()
    total = path.weigh(loss, 0, t).mean()
    total.backward()
    assert path.log_var.grad.abs().max() < 1e-6
    assert total.item() == pytest.approx((0.5 * (1 + L.log())).sum().item(), rel=1e-5)
    pull = torch.stack([loss.grad[cluster == i].sum() for i in range(8)])
    assert torch.allclose(pull, 0.5 / (8 * L), rtol=1e-4)       # 1/2m: relative losses count


def test_uncertainty_weights_have_their_own_learning_rate():
    path, t = ant()
    group, = path.param_groups()
    assert (group["lr"], group["weight_decay"]) == (0.025, 0)
    assert [p.shape for p in group["params"]] == [(8,)] == [p.shape for p in path.parameters()]
    assert not list(DDPM(weighting="p2").parameters()) and not DDPM(weighting="p2").state_dict()
    optimizer = torch.optim.AdamW(path.param_groups())
    for _ in range(250):                                        # and find their optimum with it
        optimizer.zero_grad()
        path.weigh(torch.full((64,), 0.8), 0, t).mean().backward()
        optimizer.step()
    assert (path.log_var - math.log(0.1)).abs().max() < 0.05


# ------------------------------------------------------------------------ guidance


class Labels:
    """Predicts its label, and remembers how often it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y):
        self.asked.append(len(x))
        return y.view(-1, 1, 1, 1).to(x) + torch.zeros_like(x).repeat(1, 2, 1, 1), {}


X, Y, NONE = torch.zeros(3, 4, 2, 2), torch.tensor([1, 2, 3]), 9


def test_guidance_pushes_from_no_class_towards_the_class():
    out = guide(Labels(), Y, NONE, scale=4.0)(X, 0.5)
    assert (out[:, :4] == (9 + 4 * (Y - 9)).view(-1, 1, 1, 1)).all()
    assert (out[:, 4:] == Y.view(-1, 1, 1, 1)).all()            # the variances stay as they are


def test_scale_one_is_no_guidance_and_scale_zero_forgets_the_class():
    model = Labels()
    assert torch.equal(guide(model, Y, NONE, scale=1.0)(X, 0.5), model(X, X[:, 0, 0, 0], Y)[0])
    assert model.asked == [3, 3]                                # half the work
    out = guide(model, Y, NONE, scale=0.0)(X, 0.5)
    assert (out[:, :4] == NONE).all()


def test_outside_its_interval_guidance_is_off():
    model = Labels()
    f = guide(model, Y, NONE, scale=3.0, interval=(0.2, 0.6))
    on = [(f(X, t)[:, 0, 0, 0] != Y).all().item() for t in (0.0, 0.19, 0.2, 0.4, 0.6, 0.61, 1.0)]
    assert on == [False, False, True, True, True, False, False]
    assert model.asked == [3, 3, 6, 6, 6, 3, 3]


def test_guidance_of_three_channels_leaves_the_fourth():
    out = guide(Labels(), Y, NONE, scale=2.0, channels=3)(X, 0.5)
    assert (out[:, :3] == (2 * Y - 9).view(-1, 1, 1, 1)).all()
    assert (out[:, 3:] == Y.view(-1, 1, 1, 1)).all()


# ------------------------------------------------------------------------ respacing


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_a_thousand_of_a_thousand_steps_are_all_of_them(solver):
    assert respace(1000, 1000, solver) == list(range(1000))
    path = DDPM()
    assert torch.equal(diffusion.coefficients(path.abar[respace(1000, 1000)]), path.table)


def test_the_network_is_told_the_original_step():
    for solver, steps in (("ddpm", 250), ("ddim", 50), ("dpm++", 20)):
        path, told = DDPM(), []
        f = lambda x, t: told.append(round(t * 1000)) or torch.zeros_like(x)
        times = [t for t, _, _ in path.trajectory(f, NOISE, steps, solver)]
        kept = diffusion.even_in_log_snr(path.abar, steps) if solver == "dpm++" else \
            respace(1000, steps, solver)
        assert told == kept[::-1] and len(set(kept)) == steps
        assert times == pytest.approx([n / 1000 for n in kept[-2::-1]] + [0])
    assert respace(1000, 250)[:3] == [0, 4, 8] and respace(1000, 250)[-2:] == [995, 999]
    assert respace(1000, 50, "ddim") == list(range(0, 1000, 20))


def test_a_single_step_starts_from_noise():
    assert [respace(1000, 1, solver) for solver in ("ddpm", "ddim")] == [[999], [999]]
    assert diffusion.even_in_log_snr(DDPM().abar, 1) == [999]


def test_steps_left_out_are_made_up_for_by_larger_betas():
    path, kept = DDPM(), respace(1000, 25)
    beta = diffusion.coefficients(path.abar[kept])[:, 3].double().exp()
    assert torch.allclose((1 - beta).cumprod(0), path.abar[kept], rtol=1e-4)


# ------------------------------------------------------------------------ chance


def test_a_step_draws_the_same_rows_on_any_number_of_processes():
    whole = Draw(7, 3, 12, torch.arange(12))
    for processes in (2, 3, 5):
        parts = [Draw(7, 3, 12, rows) for rows in torch.arange(12).chunk(processes)]
        assert torch.equal(whole.uniform("t"), torch.cat([d.uniform("t") for d in parts]))
        assert torch.equal(whole.normal("noise", 2, 3),
                           torch.cat([d.to("cpu").normal("noise", 2, 3) for d in parts]))


def test_a_draw_is_decided_by_seed_step_and_name_alone():
    rows = torch.arange(4)
    first = Draw(0, 0, 4, rows).uniform("t")
    torch.manual_seed(99)
    assert torch.equal(first, Draw(0, 0, 4, rows).uniform("t"))
    others = [Draw(1, 0, 4, rows).uniform("t"), Draw(0, 1, 4, rows).uniform("t"),
              Draw(0, 0, 4, rows).uniform("flip")]
    assert not any(torch.equal(first, other) for other in others)
    assert (first >= 0).all() and (first < 1).all()


def test_a_sample_depends_on_its_own_index_only():
    batch = index_noise(0, range(20), (1, 4, 4))
    assert torch.equal(batch[[17, 3]], index_noise(0, [17, 3], (1, 4, 4)))
    assert not torch.equal(batch[3], index_noise(1, [3], (1, 4, 4))[0])
    assert not torch.equal(batch[3], index_noise(0, [3], (1, 4, 4), step=5)[0])
    assert len(batch.flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("path", (RectifiedFlow("logit-normal"), RectifiedFlow("uniform"), DDPM()))
def test_density_is_how_often_times_are_drawn(path):
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert torch.trapezoid(path.density(t), t).item() == pytest.approx(1, abs=1e-6)
    drawn = path.draw(torch.zeros(100_000, 1, 1, 1), Draw(0, 0, 100_000, torch.arange(100_000)))[0]
    middle = (t > 0.3) & (t < 0.6)
    expected = (path.density(t) * middle).mean().item()
    assert ((drawn > 0.3) & (drawn < 0.6)).double().mean().item() == pytest.approx(expected, abs=0.01)
