"""Losses, samplers, guidance and random numbers, against closed forms.

The oracle for samplers is a model that cannot be wrong: for a single image, or for Gaussian data
N(mu, s^2), the best prediction is a formula, and so is the end of its trajectory."""

import math

import pytest
import torch

from diffusion import (Coefficients, DDPM, RectifiedFlow, SPACINGS, StepRNG, coefficients, dpm_step,
                       grey_level_log_likelihood, guide, half_log_snr, respace, sample_noise,
                       steps_even_in_half_log_snr)

F64 = torch.float64
MU = torch.rand(1, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1)) * 2 - 1
NOISE = torch.randn(6, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(2))


def end_of(trajectory):
    *_, (t, x, _) = trajectory
    assert t == 0
    return x


def perfect_prediction(diffusion, s):
    """E[v | x], or E[noise | x], for data N(MU, s^2); s = 0: all data are the image MU."""
    def velocity(x, t):
        if s == 0 and t == 0:
            return NOISE - MU
        var, rest = ((1 - t) * s) ** 2 + t**2, x - (1 - t) * MU
        return t / var * rest - (MU + (1 - t) * s**2 / var * rest)

    def noise(x, t):
        a = diffusion.alphas_cumprod[round(t * diffusion.T)].item()
        return math.sqrt(1 - a) / (a * s**2 + 1 - a) * (x - math.sqrt(a) * MU)
    return velocity if diffusion.kind == "rf" else noise


def exact_end(diffusion, s, steps, solver):
    """Where the exact ODE takes NOISE: it keeps (x - mean) / std constant."""
    if diffusion.kind == "rf":
        return MU + s * NOISE
    a = diffusion.alphas_cumprod[-1].item()             # every solver starts at step 999
    return MU + s * (NOISE - math.sqrt(a) * MU) / math.sqrt(a * s**2 + 1 - a)


def final_error(diffusion, solver, steps):
    x = end_of(diffusion.trajectory(perfect_prediction(diffusion, 0.5), NOISE, steps, solver))
    return (x - exact_end(diffusion, 0.5, steps, solver)).abs().max().item()


# ------------------------------------------------------------------------ perfect models


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("diffusion, solver, eta", [
    (RectifiedFlow(), "euler", 0), (RectifiedFlow(), "heun", 0), (DDPM(), "ddpm", 0),
    (DDPM("cosine"), "ddpm", 0), (DDPM(), "ddim", 0), (DDPM(), "ddim", 1), (DDPM(), "dpm++", 0),
    (DDPM("cosine"), "dpm++", 0)])
def test_perfect_model_recovers_x0_with_every_sampler(diffusion, solver, eta, steps):
    f = perfect_prediction(diffusion, 0)
    for t, x, x0 in diffusion.trajectory(f, NOISE, steps, solver=solver, eta=eta):
        assert (x0 - MU).abs().max() < 1e-4                     # the estimate of every step
    assert t == 0 and (x - MU).abs().max() < 1e-4


class Fine(DDPM):
    """So many noise levels that the steps which a sampler keeps are nearly where it wants them."""
    T = 50_000


@pytest.mark.parametrize("diffusion, solver, order, steps", [
    (RectifiedFlow(), "euler", 1, 40), (RectifiedFlow(), "heun", 2, 40), (DDPM(), "ddim", 1, 50),
    (Fine("cosine"), "ddim", 1, 50), (Fine("cosine"), "dpm++", 2, 40), (DDPM(), "dpm++", 2, 20)])
def test_twice_the_steps_halve_or_quarter_the_error(diffusion, solver, order, steps):
    error = [final_error(diffusion, solver, n) for n in (steps, 2 * steps)]
    assert error[0] < 0.15
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("r", [0.25, 1, 3])
def test_the_second_order_of_dpm_solver_also_holds_between_uneven_steps(r):
    """From lambda = 0 by h, when the step before was r h long, and x0 = sin(1 + lambda). The exact
    x / sigma grows by the integral of e^lambda x0, here solved by hand."""
    def primitive(lam):
        return math.exp(lam) * (math.sin(1 + lam) - math.cos(1 + lam)) / 2

    def local_error(h):
        now, then = 0.5, 1 / (1 + math.exp(-2 * h))             # abar: half_log_snr is 0 and h
        x = torch.tensor(0.3, dtype=F64)
        x0, earlier = (torch.tensor(math.sin(1 + lam), dtype=F64) for lam in (0, -r * h))
        exact = math.sqrt(1 - then) * (x / math.sqrt(1 - now) + primitive(h) - primitive(0))
        assert half_log_snr(then) == pytest.approx(h)
        return (dpm_step(x, x0, now, then, (-r * h, earlier)) - exact).abs().item()

    assert math.log2(local_error(0.02) / local_error(0.01)) == pytest.approx(3, abs=0.1)


def test_twenty_steps_of_dpm_solver_beat_fifty_of_ddim():
    assert final_error(DDPM(), "dpm++", 20) < 0.03 < final_error(DDPM(), "ddim", 50)


def test_every_step_yields_the_best_estimate_of_x0():
    ddpm, s = DDPM(), 0.5
    x, t = NOISE, 0.999
    for then, after, x0 in ddpm.trajectory(perfect_prediction(ddpm, s), NOISE, 30, "ddpm"):
        a = ddpm.alphas_cumprod[round(t * 1000)].item()
        best = MU + math.sqrt(a) * s**2 / (a * s**2 + 1 - a) * (x - math.sqrt(a) * MU)
        assert (x0 - best).abs().max() < 1e-4
        x, t = after, then


def mean_and_std(ddpm, f, steps):
    """Of the samples of "ddpm", exactly, because it is linear in its random numbers: row 0 gets
    zeros, and each other row gets a single 1."""
    rows = torch.cat([torch.zeros(1, steps + 1), torch.eye(steps + 1)]).to(F64)     # (n+2, n+1)
    rows = rows[:, :, None, None, None].expand(-1, -1, 1, 4, 4)
    x = end_of(ddpm.trajectory(f, rows[:, 0], steps, noise=lambda i: rows[:, i + 1]))
    return x[:1], (x[1:] - x[:1]).square().sum(0, keepdim=True).sqrt()


@pytest.mark.parametrize("steps", [10, 100])
def test_ancestral_sampling_with_the_exact_variance_samples_the_data(steps):
    """For Gaussian data a reverse step is a Gaussian, however long it is: ten steps suffice."""
    ddpm, s = DDPM("cosine"), 0.6
    kept, noise = respace(1000, steps), perfect_prediction(ddpm, s)

    def f(x, t):
        n = kept.index(round(t * 1000))
        a, before = (ddpm.alphas_cumprod[kept[i]].item() if i >= 0 else 1.0 for i in (n, n - 1))
        beta = 1 - a / before
        tilde = beta * (1 - before) / (1 - a)
        spare = (math.sqrt(before) * beta / (1 - a)) ** 2 * s**2 * (1 - a) / (a * s**2 + 1 - a)
        share = math.log((tilde + spare) / tilde) / math.log(beta / tilde) if n else 0
        return torch.cat([noise(x, t), torch.full_like(x, 2 * share - 1)], dim=1)

    mean, std = mean_and_std(ddpm, f, steps)
    assert (mean - MU).abs().max() < 1e-3 and (std - s).abs().max() < 1e-3


def test_ancestral_sampling_with_the_smallest_variance_needs_many_steps():
    ddpm, s = DDPM(), 0.6
    f = perfect_prediction(ddpm, s)
    few, many = (mean_and_std(ddpm, f, n)[1].mean() for n in (10, 1000))
    assert few < 0.9 * s < 0.98 * s < many < s


def test_ancestral_sampling_with_the_smallest_variance_is_of_first_order():
    ddpm = Fine("cosine")
    std = [mean_and_std(ddpm, perfect_prediction(ddpm, 0.6), n)[1].mean() for n in (80, 160)]
    error = [0.6 - v.item() for v in std]
    assert math.log2(error[0] / error[1]) == pytest.approx(1, abs=0.2)


def test_ddim_with_eta_one_is_ddpm_with_the_smallest_variance():
    ddpm = DDPM()
    f = perfect_prediction(ddpm, 0.5)
    runs = [ddpm.trajectory(f, NOISE, 60, solver, eta=1.0, noise=lambda i: NOISE.roll(i + 1, 0),
                            spacing="linspace") for solver in ("ddim", "ddpm")]
    for (_, x, _), (_, z, _) in zip(*runs, strict=True):
        assert (x - z).abs().max() < 1e-5


def test_the_first_step_of_dpm_solver_is_a_ddim_step(monkeypatch):
    ddpm = DDPM()
    f = perfect_prediction(ddpm, 0.5)
    monkeypatch.setattr("diffusion.respace", lambda T, steps, spacing:
                        steps_even_in_half_log_snr(ddpm.alphas_cumprod, steps))
    runs = [ddpm.trajectory(f, NOISE, 60, solver) for solver in ("ddim", "dpm++")]
    (_, x, _), (_, z, _) = map(next, runs)
    assert (x - z).abs().max() < 1e-6


# ------------------------------------------------------------------------ imperfect models


IMAGES = torch.tensor([[-0.8, -0.8, 0.8, 0.8], [0.8, -0.8, 0.8, -0.8]], dtype=F64)
IMAGES = IMAGES.repeat_interleave(4, 0).view(2, 1, 4, 4)        # rows alike: two grey patterns


def imperfect_prediction(ddpm, s=0.1):
    """The best estimate of the noise, E[noise | x], if half of the data lie around each of IMAGES
    with standard deviation s; with two faults of every network: an error of up to 0.05, and values
    of x beyond 4, which training never shows, are not told apart."""
    def noise(x, t):
        a, x = ddpm.alphas_cumprod[round(t * 1000)].item(), x.clamp(-4, 4)
        var = a * s**2 + 1 - a
        rest = x[:, None] - math.sqrt(a) * IMAGES                           # (n, 2, 1, 4, 4)
        share = (-rest.square().flatten(2).sum(2) / (2 * var)).softmax(1)   # (n, 2)
        best = math.sqrt(1 - a) / var * (share[:, :, None, None, None] * rest).sum(1)
        return best + 0.05 * (40 * x).sin()
    return noise


def drawn_by_imperfect_model(schedule, solver, steps, clip_x0, eta=0.0):
    """-> 200 samples, and their root mean squared distance to the nearest image."""
    ddpm, g = DDPM(schedule), torch.Generator().manual_seed(0)
    draw = lambda i: torch.randn(200, 1, 4, 4, dtype=F64, generator=g)
    x = end_of(ddpm.trajectory(imperfect_prediction(ddpm), draw(-1), steps, solver, eta,
                               draw, clip_x0=clip_x0))
    distances = (x[:, None] - IMAGES).square().flatten(2).mean(2).sqrt()    # (200, 2)
    return x, distances


@pytest.mark.parametrize("steps", [5, 20, 50, 250, 1000])
@pytest.mark.parametrize("solver, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1), ("dpm++", 0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_imperfect_model_draws_the_data_with_every_solver_if_x0_is_clipped(
        schedule, solver, eta, steps):
    x, distances = drawn_by_imperfect_model(schedule, solver, steps, 1.0, eta)
    nearest, share = distances.min(1).values, (distances[:, 0] < distances[:, 1]).double().mean()
    assert x.abs().max() <= 1 and nearest.mean() < 0.2 and 0.4 < share < 0.6
    assert steps == 5 or nearest.max() < 0.2


@pytest.mark.parametrize("bound, ruined", [(None, True), (5.0, False)])
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_without_a_bound_a_small_error_at_the_noisiest_step_of_cosine_ruins_the_samples(
        solver, bound, ruined):
    """The signal is 5e-5 of x there. Why clip_x0 is on for images, and what a wide bound does."""
    x, distances = drawn_by_imperfect_model("cosine", solver, 50, bound)
    assert ((x.abs() > 1.2).double().mean() > 0.8) == (x.abs().max() > 100) == ruined
    assert ruined or distances.min(1).values.max() < 0.2


@pytest.mark.parametrize("solver, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("dpm++", 0)])
def test_a_step_with_clipping_is_the_step_of_a_model_that_predicts_the_clipped_x0(solver, eta):
    """So the mean and the noise of a step follow from the clipped estimate."""
    ddpm, bound = DDPM("cosine"), 0.5
    wild = lambda x, t: 3 * x.sin() + t

    def tame(x, t):                             # the noise that belongs to the clipped estimate
        a = ddpm.alphas_cumprod[round(t * 1000)].item()
        x0 = ((x - math.sqrt(1 - a) * wild(x, t)) / math.sqrt(a)).clamp(-bound, bound)
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a)

    runs = [list(ddpm.trajectory(f, NOISE, 20, solver, eta, lambda i: NOISE.roll(i + 1, 0),
                                 clip_x0=clip)) for f, clip in ((wild, bound), (tame, None))]
    for (_, x, x0), (_, z, z0) in zip(*runs, strict=True):
        assert x0.abs().max() <= bound and (x0 - z0).abs().max() < 1e-2
        assert (x - z).abs().max() < 1e-2
    assert torch.equal(runs[0][-1][1], runs[0][-1][2])          # it ends at its last estimate


# ------------------------------------------------------------------------ noise levels and times


def test_rectified_flow_goes_straight_from_data_to_noise():
    flow, noise, x0 = RectifiedFlow(), NOISE, NOISE.flip(0)
    t = torch.tensor([0, 0.25, 0.5, 1, 0, 1], dtype=F64)
    x = flow.q_sample(x0, noise, t)
    assert torch.equal(x[[0, 4]], x0[[0, 4]]) and torch.equal(x[[3, 5]], noise[[3, 5]])
    assert torch.allclose(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.allclose(x + (1 - t).view(-1, 1, 1, 1) * flow.target(x0, noise, t), noise)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_keeps_the_variance_and_ends_in_noise(schedule):
    ddpm, t, one = DDPM(schedule), torch.arange(1000) / 1000, torch.ones(1000, 1, 1, 1)
    data, noise = (ddpm.q_sample(a * one, b * one, t).flatten() for a, b in ((1, 0), (0, 1)))
    assert torch.allclose(data**2 + noise**2, torch.ones(1000), atol=1e-5)
    assert data[0] > 0.9999 and data[999] < 0.007 and (data.diff() < 0).all()


def test_step_n_is_time_n_over_a_thousand():
    assert DDPM().step(torch.arange(1000) / 1000).tolist() == list(range(1000))
    assert DDPM().step(torch.tensor([1.0])).item() == 999
    times = DDPM().from_uniform(torch.tensor([0.0, 0.4567, 1.0]))
    assert times.tolist() == pytest.approx([0, 0.456, 0.999])


SNR = {"linear": (9999, 8.537, 1.090, 0.08436, 3.311e-3, 4.036e-5),
       "cosine": (24220, 34.18, 5.489, 0.9696, 0.1671, 2.429e-9)}        # from the authors' code


@pytest.mark.parametrize("schedule", SNR)
def test_schedules_have_the_official_signal_to_noise_ratios(schedule):
    a = DDPM(schedule).alphas_cumprod[[0, 100, 250, 500, 750, 999]]
    assert (a / (1 - a)).tolist() == pytest.approx(SNR[schedule], rel=1e-3)


def test_the_cosine_schedule_is_a_squared_cosine_until_its_last_steps():
    u = (torch.arange(1, 981, dtype=F64) / 1000 + 0.008) / 1.008
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    expected = (u * math.pi / 2).cos() ** 2 / start
    assert torch.allclose(DDPM("cosine").alphas_cumprod[:980], expected, rtol=1e-9)


def training_times(diffusion, batch, step=0, rows=None, rng=StepRNG):
    """The times that one training step, or one process with these rows of it, draws."""
    rows = torch.arange(batch) if rows is None else rows
    x0 = torch.zeros(len(rows), 1, 2, 2)
    return diffusion.sample_times_and_noise(x0, rng(0, step, batch, rows))[0]


@pytest.mark.parametrize("diffusion", [RectifiedFlow(), RectifiedFlow("uniform"), DDPM()])
def test_times_are_drawn_as_often_as_their_density_says(diffusion):
    t = torch.linspace(0, 1, 100_001, dtype=F64)
    assert torch.trapezoid(diffusion.time_density(t), t).item() == pytest.approx(1, abs=1e-6)
    drawn = training_times(diffusion, 100_000)
    expected = diffusion.time_density(t[:-1]).view(10, -1).mean(1)          # of ten bins, mean 1
    assert ((drawn * 10 + 1e-4).long().bincount() / 10_000).tolist() == \
        pytest.approx(expected.tolist(), abs=0.05)


def test_two_thirds_of_logit_normal_times_lie_within_one_standard_deviation():
    t = training_times(RectifiedFlow(), 20_000).logit()
    assert (t.abs() < 1).float().mean() == pytest.approx(0.683, abs=0.01)


def test_training_draws_every_step_and_standard_normal_noise():
    rng, x0 = StepRNG(0, 0, 20_000, torch.arange(20_000)), torch.zeros(20_000, 1, 1, 1)
    t, noise = DDPM().sample_times_and_noise(x0, rng)
    count = (t * 1000).round().long().bincount()
    assert count.shape == (1000,) and count.min() > 0
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("make", [
    lambda: RectifiedFlow("cosine"), lambda: DDPM("quadratic"), lambda: DDPM(weighting="snr"),
    lambda: DDPM(weighting="min-snr", gamma=0.0), lambda: respace(1000, 0),
    lambda: respace(1000, 1001), lambda: respace(1000, 9, "even"),
    lambda: steps_even_in_half_log_snr(torch.rand(9), 10)])
def test_unknown_choices_raise_value_error(make):
    with pytest.raises(ValueError):
        make()


# ------------------------------------------------------------------------ the learned variance


def vlb(ddpm, n, v, error=0.0):
    """The variational term at step n for a network whose noise is wrong by `error`, variance v."""
    n, noise = torch.full((6,), n), NOISE.float()
    x0 = noise.flip(0).clamp(-1, 1)
    x = ddpm.q_sample(x0, noise, n / 1000)
    return ddpm.vlb(torch.cat([noise + error, torch.full_like(noise, v)], 1), x0, x, n)


def test_perfect_noise_with_the_true_variance_costs_no_bits():
    assert vlb(DDPM(), 500, -1.0).abs().max() < 1e-5
    assert vlb(DDPM(), 500, -1.0, error=0.1).min() > 1e-6


def beta_and_tilde(ddpm, n):
    a, before = ddpm.alphas_cumprod[n], ddpm.alphas_cumprod[n - 1]
    beta = 1 - a / before
    return beta, beta * (1 - before) / (1 - a)


def test_the_variational_term_is_a_kl_divergence_in_bits():
    ddpm = DDPM()
    beta, tilde = beta_and_tilde(ddpm, 20)
    noise_scale = beta / (1 - ddpm.alphas_cumprod[20]).sqrt() / (1 - beta).sqrt()
    p = torch.distributions.Normal(0.0, tilde.sqrt())
    q = torch.distributions.Normal(0.1 * noise_scale, beta.sqrt())      # the noise is wrong by 0.1
    kl = torch.distributions.kl_divergence(p, q) / math.log(2)
    assert torch.allclose(vlb(ddpm, 20, 1.0, error=0.1), kl.float(), rtol=1e-3)


def test_the_last_step_pays_for_the_grey_level_of_each_pixel():
    ddpm, x0 = DDPM(), NOISE.float().tanh() * 0.9               # a perfect mean at n = 0 is x0
    n, noise = torch.zeros(6, dtype=torch.long), x0.flip(0)
    x = ddpm.q_sample(x0, noise, n / 1000)
    bits = ddpm.vlb(torch.cat([noise, torch.ones_like(x)], 1), x0, x, n)        # variance beta_0
    p = math.erf(1 / 255 / math.sqrt(1 - ddpm.alphas_cumprod[0].item()) / math.sqrt(2))
    assert torch.allclose(bits, torch.full((6,), -math.log2(p)), rtol=2e-3)


@pytest.mark.parametrize("mean, std", [(0.1, 0.3), (-1.2, 0.05), (0.9, 2.0)])
def test_the_probabilities_of_all_256_grey_levels_add_up_to_one(mean, std):
    level, like = torch.linspace(-1, 1, 256), torch.ones(256)
    log_p = grey_level_log_likelihood(level, mean * like, 2 * math.log(std) * like)
    assert log_p.exp().sum() == pytest.approx(1, abs=1e-4)


def test_the_variance_lies_between_beta_tilde_and_beta():
    ddpm, n = DDPM(), torch.tensor([1, 10, 100, 500, 900, 999])
    beta, tilde = beta_and_tilde(ddpm, n)
    row, x = Coefficients(ddpm.table, n), NOISE.float()
    for v, expected in ((-1.0, tilde), (1.0, beta), (0.0, (beta * tilde).sqrt())):
        log_var = ddpm.p_mean_variance(torch.cat([x, torch.full_like(x, v)], 1), x, row)[1]
        assert torch.allclose(log_var[:, 0, 0, 0].exp(), expected.float(), rtol=1e-4)


@pytest.mark.parametrize("n", [0, 300])
def test_noise_learns_from_the_squared_error_and_variance_from_the_variational_term(n):
    ddpm, noise, t = DDPM(), NOISE.float(), torch.full((6,), n / 1000)
    prediction = torch.randn(6, 2, 4, 4, requires_grad=True)
    model = lambda x, t, y: (prediction, {})
    total, alone = (torch.autograd.grad(f(model, noise.flip(0), None, t, noise)[0].sum(),
                                        prediction)[0] for f in (ddpm.loss, ddpm.mse))
    assert torch.allclose(total[:, :1], alone[:, :1])
    assert total[:, 1:].abs().max() > 0 and not alone[:, 1:].any()


@pytest.mark.parametrize("diffusion, error", [(DDPM(), NOISE), (RectifiedFlow(), NOISE - MU)])
def test_without_learned_variance_the_loss_is_the_mean_squared_error(diffusion, error):
    model = lambda x, t, y: (torch.zeros_like(x), {"balance_loss": 1})
    x0, noise = MU.float().expand(6, -1, -1, -1), NOISE.float()
    for f in (diffusion.loss, diffusion.mse):
        loss, aux = f(model, x0, None, torch.full((6,), 0.5), noise)
        assert torch.allclose(loss, error.float().square().mean((1, 2, 3)))
        assert aux == {"balance_loss": 1}


# ------------------------------------------------------------------------ weightings


def weights(ddpm, steps):
    """What the weighting multiplies the squared error of these steps with."""
    return ddpm.weight(torch.ones(len(steps)), 0, torch.tensor(steps) / 1000).tolist()


@pytest.mark.parametrize("schedule, expected, first", [
    ("linear", (5.001e-4, 0.5857, 1, 1, 1, 1), 130),
    ("cosine", (2.064e-4, 0.1463, 0.9109, 1, 1, 1), 261)])
def test_min_snr_5_has_the_official_weights(schedule, expected, first):
    ddpm = DDPM(schedule, "min-snr")
    assert weights(ddpm, [0, 100, 250, 500, 750, 999]) == pytest.approx(expected, rel=3e-4)
    assert weights(ddpm, list(range(1000))).index(1.0) == first


def test_min_snr_is_the_weight_of_an_x0_prediction_capped_at_gamma():
    w = weights(DDPM(weighting="min-snr", gamma=2.0), [100, 250, 500])
    x0_weight = [own * snr for own, snr in zip(w, SNR["linear"][1:4])]
    assert x0_weight == pytest.approx([2.0, 1.090, 0.08436], rel=1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_p2_weights_each_image_by_its_own_step(gamma):
    got = weights(DDPM("cosine", "p2", gamma), [0, 100, 250, 500, 750, 999, 500])
    snr = (*SNR["cosine"], SNR["cosine"][3])
    assert got == pytest.approx([(1 + s) ** -gamma for s in snr], rel=1e-3)


@pytest.mark.parametrize("weighting", ["min-snr", "p2"])
def test_min_snr_and_p2_do_not_weight_the_variational_term(weighting):
    bits, t = torch.rand(5), torch.arange(5) / 10
    assert torch.equal(DDPM(weighting=weighting).weight(torch.zeros(5), bits, t), bits)


@pytest.mark.parametrize("clusters, edges", [
    (8, [0, 125, 250, 375, 500, 625, 750, 875]), (5, [0, 200, 400, 600, 800]), (3, [0, 333, 666])])
def test_ant_uw_draws_every_cluster_equally_often_and_each_has_its_own_weight(clusters, edges):
    ddpm = DDPM(weighting="ant-uw", clusters=clusters)
    n = ddpm.step(training_times(ddpm, 40 * clusters))
    drawn = torch.bucketize(n, torch.tensor(edges), right=True) - 1
    assert drawn.bincount().tolist() == [40] * clusters
    with torch.no_grad():
        ddpm.log_var.copy_(torch.arange(clusters))              # which weight does each step get?
    every = ddpm.weight(torch.zeros(1000), 0, torch.arange(1000) / 1000) * 2 / clusters
    assert [every.tolist().index(i) for i in range(clusters)] == edges
    assert (every.diff() >= 0).all()


@pytest.mark.parametrize("clusters, batch", [(8, 4), (8, 12), (5, 32), (3, 1)])
def test_ant_uw_continues_with_the_next_cluster_in_the_next_batch(clusters, batch):
    ddpm = DDPM(weighting="ant-uw", clusters=clusters)
    t = torch.cat([training_times(ddpm, batch, step) for step in range(2 * clusters)])
    drawn = (t * clusters + 1e-4).long().bincount(minlength=clusters)
    assert (drawn == 2 * batch).all()


def test_ant_uw_draws_the_same_times_on_any_number_of_processes():
    ddpm = DDPM(weighting="ant-uw")
    parts = [training_times(ddpm, 64, rows=rows) for rows in torch.arange(64).chunk(4)]
    assert torch.equal(torch.cat(parts), training_times(ddpm, 64))


def test_the_largest_random_number_stays_in_the_last_step_of_its_cluster():
    class Largest(StepRNG):
        def uniform(self, name, *shape):
            return torch.full((len(self.rows), *shape), 1 - 2**-24)

    ddpm = DDPM(weighting="ant-uw")
    t = training_times(ddpm, 8, rng=Largest)
    assert ddpm.step(t).tolist() == [124, 249, 374, 499, 624, 749, 874, 999] and t.max() < 1
    assert ddpm.weight(torch.ones(8), 0, t).isfinite().all()
    assert training_times(DDPM(), 8, rng=Largest).max() < 1


@pytest.mark.parametrize("s, value", [(0.0, 0.4), (-1.0, -2.9127), (math.log(0.1), -5.2103)])
def test_uncertainty_weighting_has_the_values_worked_by_hand(s, value):
    ddpm = DDPM(weighting="ant-uw")                             # 8 clusters, each with loss 0.8
    t = training_times(ddpm, 64)
    assert not ddpm.log_var.any()                       # it starts at 0: half of the mean loss
    torch.nn.init.constant_(ddpm.log_var, s)
    total = ddpm.weight(torch.full((64,), 0.5), 0.3, t).mean().item()
    assert total == pytest.approx(value, abs=1e-4)


def test_uncertainty_weighting_is_minimal_at_the_log_of_each_loss():
    ddpm = DDPM(weighting="ant-uw")
    t, loss = training_times(ddpm, 64), torch.rand(64) + 0.1
    cluster = (t * 8).long()
    L = torch.stack([loss[cluster == i].mean() / 8 for i in range(8)])
    with torch.no_grad():
        ddpm.log_var.copy_(L.log())
    loss.requires_grad_()
    total = ddpm.weight(loss, 0, t).mean()
    total.backward()
    assert ddpm.log_var.grad.abs().max() < 1e-6
    assert total.item() == pytest.approx((0.5 * (1 + L.log())).sum().item(), rel=1e-5)
    pull = torch.stack([loss.grad[cluster == i].sum() for i in range(8)])
    assert torch.allclose(pull, 0.5 / (8 * L), rtol=1e-4)       # relative losses count equally


def test_uncertainty_weights_learn_their_optimum_with_their_own_learning_rate():
    ddpm = DDPM(weighting="ant-uw")
    group, = ddpm.param_groups()
    assert (group["lr"], group["weight_decay"]) == (0.025, 0)
    assert [p.shape for p in group["params"]] == [(8,)] == [p.shape for p in ddpm.parameters()]
    assert not list(DDPM(weighting="p2").parameters()) and not DDPM(weighting="p2").state_dict()
    t, optimizer = training_times(ddpm, 64), torch.optim.AdamW(ddpm.param_groups())
    for _ in range(250):
        optimizer.zero_grad()
        ddpm.weight(torch.full((64,), 0.8), 0, t).mean().backward()
        optimizer.step()
    assert (ddpm.log_var - math.log(0.1)).abs().max() < 0.05


# ------------------------------------------------------------------------ guidance


class PredictsItsLabel:
    """Every value of the prediction is the label; `batches` counts the rows of each call."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return y.view(-1, 1, 1, 1).to(x) + torch.zeros_like(x).repeat(1, 2, 1, 1), {}


X, Y, NONE = torch.zeros(3, 4, 2, 2), torch.tensor([1, 2, 3]), 9


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("scale", [0.0, 2.0, 4.0])
def test_guidance_moves_the_guided_channels_from_no_class_towards_the_class(scale, channels):
    out, n = guide(PredictsItsLabel(), Y, NONE, scale, channels)(X, 0.5), channels or 4
    assert (out[:, :n] == (NONE + scale * (Y - NONE)).view(-1, 1, 1, 1)).all()
    assert out.shape == (3, 8, 2, 2) and (out[:, n:] == Y.view(-1, 1, 1, 1)).all()


def test_scale_one_is_no_guidance_at_half_the_cost():
    model = PredictsItsLabel()
    assert torch.equal(guide(model, Y, NONE, scale=1.0)(X, 0.5), model(X, X[:, 0, 0, 0], Y)[0])
    assert model.batches == [3, 3]


def test_guidance_is_computed_in_the_precision_of_the_images_not_of_the_network():
    """The two predictions of a network in bf16 differ little; their difference is multiplied."""
    model = lambda x, t, y: (torch.where(y == NONE, 1, 1 + 2**-7).view(-1, 1, 1, 1).expand(
        -1, 4, 2, 2).bfloat16(), {})
    for scale in (1.0, 1.5):
        out = guide(model, Y, NONE, scale)(X, 0.5)
        assert out.dtype == torch.float32 and (out == 1 + scale * 2**-7).all()


def test_outside_its_interval_guidance_is_off():
    model = PredictsItsLabel()
    f = guide(model, Y, NONE, scale=3.0, interval=(0.2, 0.6))
    on = [(f(X, t)[:, 0, 0, 0] != Y).all().item() for t in (0.0, 0.19, 0.2, 0.4, 0.6, 0.61, 1.0)]
    assert on == [False, False, True, True, True, False, False]
    assert model.batches == [3, 3, 6, 6, 6, 3, 3]


# ------------------------------------------------------------------------ respacing


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_a_sampler_of_all_1000_steps_leaves_none_out(spacing):
    ddpm = DDPM()
    assert respace(1000, 1000, spacing) == list(range(1000))
    assert steps_even_in_half_log_snr(ddpm.alphas_cumprod, 1000) == list(range(1000))
    assert torch.equal(coefficients(ddpm.alphas_cumprod[respace(1000, 1000)]), ddpm.table)


@pytest.mark.parametrize("solver, steps, spacing, first, end", [
    ("ddpm", 250, None, [0, 4, 8], [995, 999]), ("ddim", 50, None, [19, 39, 59], [979, 999]),
    ("ddim", 50, "leading", [0, 20, 40], [960, 980]), ("ddim", 3, None, [333, 666], [666, 999]),
    ("ddim", 50, "linspace", [0, 20, 41], [979, 999]), ("dpm++", 20, None, [0], [999])])
def test_the_network_gets_the_original_number_of_every_step(solver, steps, spacing, first, end):
    ddpm, seen = DDPM(), []
    f = lambda x, t: seen.append(round(t * 1000)) or torch.zeros_like(x)
    times = [t for t, _, _ in ddpm.trajectory(f, NOISE, steps, solver, spacing=spacing)]
    kept = seen[::-1]
    assert kept == sorted(set(kept)) and len(kept) == steps
    assert kept[: len(first)] == first and kept[-2:][-len(end):] == end
    assert times == pytest.approx([n / 1000 for n in kept[-2::-1]] + [0])


def test_dpm_solver_takes_equal_steps_of_log_snr():
    a = DDPM().alphas_cumprod
    step = (a / (1 - a)).log()[steps_even_in_half_log_snr(a, 20)].diff()
    assert ((step / step.mean())[3:] - 1).abs().max() < 0.05    # steps 0 to 3 are too far apart


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 25, 250, 999])
def test_dpm_solver_takes_as_many_different_steps_as_asked_for(schedule, steps):
    kept = steps_even_in_half_log_snr(DDPM(schedule).alphas_cumprod, steps)
    assert kept == sorted(set(kept)) and len(kept) == steps and kept[-1] == 999
    assert steps == 1 or kept[0] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 50, 333])
def test_trailing_steps_are_equal_and_start_from_pure_noise(steps):
    kept = respace(1000, steps, SPACINGS["ddim"])
    gaps = torch.tensor([-1, *kept]).diff()                     # the last one leads to the data
    assert kept[-1] == 999 and len(kept) == steps and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [1, 60, 999])
def test_leading_steps_exist_only_where_the_authors_find_a_stride(steps):
    assert respace(1000, 2, "leading") == [0, 500]
    with pytest.raises(ValueError, match="no stride"):
        respace(1000, steps, "leading")


def test_a_single_step_starts_from_noise():
    assert [respace(1000, 1, spacing) for spacing in SPACINGS.values()] == [[999], [999]]
    assert steps_even_in_half_log_snr(DDPM().alphas_cumprod, 1) == [999]


def test_larger_betas_make_up_for_steps_left_out():
    level = DDPM().alphas_cumprod[respace(1000, 25)]
    beta = coefficients(level)[:, 3].double().exp()
    assert torch.allclose((1 - beta).cumprod(0), level, rtol=1e-4)


# ------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_a_step_draws_the_same_rows_on_any_number_of_processes(processes):
    whole = StepRNG(7, 3, 12, torch.arange(12))
    parts = [StepRNG(7, 3, 12, rows) for rows in torch.arange(12).chunk(processes)]
    assert torch.equal(whole.uniform("t"), torch.cat([rng.uniform("t") for rng in parts]))
    assert torch.equal(whole.normal("noise", 2, 3),
                       torch.cat([rng.to("cpu").normal("noise", 2, 3) for rng in parts]))


def test_random_numbers_depend_on_seed_step_and_name_alone():
    def numbers(seed, step, name):
        return StepRNG(seed, step, 4, torch.arange(4)).uniform(name)
    first = numbers(0, 0, "t")
    torch.manual_seed(99)
    assert torch.equal(first, numbers(0, 0, "t")) and 0 <= first.min() <= first.max() < 1
    for key in ((1, 0, "t"), (0, 1, "t"), (0, 0, "flip")):
        assert not torch.equal(first, numbers(*key))


def test_the_noise_of_a_sample_depends_on_its_own_index_only():
    noise = sample_noise(0, range(20), (1, 4, 4))
    assert torch.equal(noise[[17, 3]], sample_noise(0, [17, 3], (1, 4, 4)))
    assert not torch.equal(noise[3], sample_noise(1, [3], (1, 4, 4))[0])
    assert not torch.equal(noise[3], sample_noise(0, [3], (1, 4, 4), step=5)[0])
    assert len(noise.flatten(1).unique(dim=0)) == 20


# ------------------------------------------------------------------------ predicting v


def in_both_units(schedule="linear", **options):
    """-> DDPM that predicts the noise, DDPM that predicts v, and one imperfect estimate of noise as
    a network of each: (x, t, y) -> prediction, aux."""
    by_eps = DDPM(schedule, **options)
    by_v = DDPM(schedule, predict="v", **options)
    abar = by_eps.alphas_cumprod

    def eps(x, t, y):
        return 0.9 * x + 0.1 * x.flip(-1), {}

    def v(x, t, y):
        a = abar[(t * 1000).round().long()].float().view(-1, 1, 1, 1)
        return (eps(x, t, y)[0] - (1 - a).sqrt() * x) / a.sqrt(), {}    # v = (eps - s x) / alpha
    return by_eps, by_v, eps, v


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
def test_a_network_of_v_takes_the_same_steps_as_its_noise(solver):
    by_eps, by_v, eps, v = in_both_units()
    x, noise = torch.randn(3, 1, 4, 4), [torch.randn(3, 1, 4, 4) for _ in range(5)]
    ends = [list(d.trajectory(lambda x, t: f(x, x.new_full((3,), t), None)[0], x, 5, solver,
                              noise=lambda i: noise[i], clip_x0=1.0))[-1][1]
            for d, f in ((by_eps, eps), (by_v, v))]
    assert torch.allclose(*ends, rtol=1e-3, atol=1e-4)


def test_the_target_v_is_worked_by_hand_and_a_perfect_v_gives_back_x0():
    d = DDPM("linear", predict="v")
    x0, noise, t = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.rand(2)
    a = d.alphas_cumprod[(t * 1000).round().long()].float().view(2, 1, 1, 1)
    assert torch.allclose(d.target(x0, noise, t), a.sqrt() - (1 - a).sqrt() * x0)
    perfect = lambda x, t, y: (d.target(x0, noise, t), {})
    assert d.loss(perfect, x0, None, t, noise)[0].max() < 1e-10
    assert DDPM().options["predict"] == "eps"           # DiT's, and that of older checkpoints


@pytest.mark.parametrize("weighting", ["min-snr", "p2"])
def test_weightings_of_the_noise_weight_v_alike(weighting):
    by_eps, by_v, eps, v = in_both_units(weighting=weighting)
    x0, noise, t = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.linspace(0.01, 0.9, 8)
    assert torch.allclose(by_eps.loss(eps, x0, None, t, noise)[0],
                          by_v.loss(v, x0, None, t, noise)[0], rtol=1e-3)
