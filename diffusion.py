"""Two ways from noise to images: rectified flow and DDPM. Each loss stands next to its samplers.

    data x0 ----------------- x_t -----------------> noise e     training: mix, ask the network
    t = 0                      t                       t = 1
    data x0 <---- x_t <---- x_t <---- x_t <--------- noise e     sampling: step back from t = 1 to 0

Time is t in [0, 1] everywhere: 0 is data, 1 is noise. DDPM's step n of 0..999 is t = n/1000; its
step 0 has a little noise (abar is 0.9999 or more).
Codebases that count the other way (t = 1 is data): SiT, lightning-DiT, torchcfm.

             x_t                                the network predicts
    flow     (1 - t) x0 + t e                   v = e - x0
    DDPM     sqrt(abar) x0 + sqrt(1 - abar) e   e (or DDPM's v), and perhaps the variance

Letters: B batch, C channels, S side of the image; x (B, C, S, S), t (B,), y (B,). abar is the share
of the signal's variance that is left at a step (alphas_cumprod in most code).
Read next: RectifiedFlow (one screen), guide(), then DDPM.

Sources. Rectified flow: Liu 2209.03003; logit-normal t: Esser 2403.03206. DDPM: Ho 2006.11239;
learned variance, cosine schedule, respacing: Nichol & Dhariwal 2102.09672, "IDDPM". DDIM: Song
2010.02502; its trailing steps: Lin 2305.08891. DPM-Solver++: Lu 2211.01095. Guidance: Ho & Salimans
2207.12598; in an interval: Kynkaanniemi 2404.07724. Weightings: Min-SNR: Hang 2303.09556; P2: Choi
2204.00227; ANT-UW: Go 2306.00354."""

import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------- rectified flow


class RectifiedFlow(nn.Module):
    """Straight lines from data to noise; the network learns their velocity.

    times: how training draws t, "logit-normal" (mostly near 0.5: SD3, DiT-MoE) or "uniform". Of a
    network with 2C output channels (official DiT-MoE) only the first C are used."""

    kind, solvers = "rf", ("euler", "heun")

    def __init__(self, times="logit-normal"):
        super().__init__()
        if times not in ("logit-normal", "uniform"):
            raise ValueError(f"times {times!r}: logit-normal or uniform")
        self.options = dict(times=times)

    def from_uniform(self, u):
        """Numbers u in [0, 1) -> times t, evenly spread."""
        return u

    def time_density(self, t):
        """The density at t (B,) with which training draws times; its mean over [0, 1] is 1."""
        if self.options["times"] == "uniform":
            return torch.ones_like(t)
        z = t.clamp(1e-6, 1 - 1e-6).logit()             # dt = t (1 - t) dz
        return (-z.square() / 2 - F.logsigmoid(z) - F.logsigmoid(-z)).exp() / math.sqrt(2 * math.pi)

    def sample_times_and_noise(self, x0, rng):
        """-> t (B,) and noise like x0, as training draws them."""
        t = rng.uniform("t") if self.options["times"] == "uniform" else rng.normal("t").sigmoid()
        return t, rng.normal("noise", *x0.shape[1:])

    def q_sample(self, x0, noise, t):
        return (1 - expand_dims(t)) * x0 + expand_dims(t) * noise

    def target(self, x0, noise, t):
        """The regression target (B, C, S, S)."""
        return noise - x0

    def mse(self, model, x0, y, t, noise):
        """The mean squared error of each image (B,), and the model's aux."""
        prediction, aux = model(self.q_sample(x0, noise, t), t, y)
        v = prediction[:, : x0.shape[1]].float()
        return (v - self.target(x0, noise, t)).square().flatten(1).mean(1), aux

    loss = mse                                          # training minimises it as it is

    def trajectory(self, f, x, steps=25, solver="euler", **_):
        """From noise x to data in equal steps; yields (t, x, the x0 estimated in this step).

        f(x, t) -> prediction. euler: one call per step, first order. heun: the mean of the
        velocities at both ends of a step, two calls, second order."""
        C = x.shape[1]
        for i in range(steps, 0, -1):
            t, s = i / steps, (i - 1) / steps           # from t to s, which is nearer to the data
            v = f(x, t)[:, :C]
            x0 = x - t * v
            if solver == "heun":
                v = (v + f(x + (s - t) * v, s)[:, :C]) / 2
            x = x + (s - t) * v
            yield s, x, x0


# ---------------------------------------------------------------------------- guidance, once


def guide(model, y, none, scale=1.0, channels=None, interval=(0.0, 1.0)):
    """Classifier-free guidance -> f(x, t): the prediction, moved from "no class" towards class y.

    none: the label for "no class" (cfg.classes). scale: 1 is no guidance, at half the cost.
    channels: how many channels to guide (None: all C). The official code of DiT, DyDiT and
    DiT-MoE's DDPM guides 3 of the 4 by mistake, and published figures contain it; DTR guides all.
    interval: (lo, hi), the times at which guidance is on."""

    def f(x, t):
        time = x.new_full((len(x),), t)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return model(x, time, y)[0].to(x)           # autocast may have given bf16
        label = torch.cat([y, torch.full_like(y, none)])
        cond, uncond = model(torch.cat([x, x]), torch.cat([time, time]), label)[0].to(x).chunk(2)
        n = channels or x.shape[1]
        # Ho & Salimans, Eq. (6), with scale = 1 + w; the channels that are not guided are cond's
        guided = uncond[:, :n] + scale * (cond[:, :n] - uncond[:, :n])
        return torch.cat([guided, cond[:, n:]], dim=1)

    return f


# ---------------------------------------------------------------------------- DDPM


class DDPM(nn.Module):
    """A thousand noise levels; the network predicts the noise, and may learn the reverse variance.

    predict: "eps", the noise (DiT), or "v" = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho
    2202.00512). From each follows an estimate of x0. With SNR = abar / (1 - abar), the squared
    error of eps is SNR times that of x0, and the squared error of v is 1 + SNR times that of x0. At
    the highest noise SNR is 4e-5 (linear) or 2e-9 (cosine), so that eps learns nothing about x0
    there, but it is there that the network decides what an image of the class looks like. So the
    tiny recipe predicts v.
    schedule: linear (DiT) or cosine (IDDPM). weighting of the squared error at each step: none,
    min-snr (gamma: 5), p2 (gamma: 1) or ant-uw (clusters: 8; its weights are learned)."""

    kind, solvers = "ddpm", ("ddpm", "ddim", "dpm++")
    T = 1000

    def __init__(self, schedule="linear", weighting="none", gamma=None, clusters=8,
                 predict="eps"):
        super().__init__()
        if predict not in ("eps", "v"):
            raise ValueError(f"predict {predict!r}: eps or v")
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule {schedule!r}: linear or cosine")
        if weighting not in ("none", "min-snr", "p2", "ant-uw"):
            raise ValueError(f"weighting {weighting!r}: none, min-snr, p2 or ant-uw")
        if gamma is None:
            gamma = {"min-snr": 5.0, "p2": 1.0}.get(weighting, 0.0)
        if weighting == "min-snr" and not gamma > 0:
            raise ValueError(f"gamma {gamma}: min-snr needs one above 0")
        self.options = dict(schedule=schedule, weighting=weighting, gamma=gamma, clusters=clusters,
                            predict=predict)
        self.alphas_cumprod = alphas_cumprod(schedule, self.T)          # (T,) float64
        self.register_buffer("table", coefficients(self.alphas_cumprod), persistent=False)
        if weighting == "ant-uw":                                       # log variance per cluster
            self.log_var = nn.Parameter(torch.zeros(clusters))

    # ---- training

    def from_uniform(self, u):
        return (u * self.T).floor().clamp(max=self.T - 1) / self.T      # u may be rounded up to 1

    def time_density(self, t):
        return torch.ones_like(t)

    def sample_times_and_noise(self, x0, rng):
        """-> t (B,) and noise like x0, as training draws them."""
        first, end = 0, self.T
        if self.options["weighting"] == "ant-uw":       # all clusters get equally many images; if
            k = self.options["clusters"]                # k does not divide B, the next batch
            i = (rng.first + rng.rows) % k              # continues with the next cluster
            first, end = i * self.T // k, (i + 1) * self.T // k
        n = first + (rng.uniform("t") * (end - first)).floor()          # (B,) 0..999
        return n / self.T, rng.normal("noise", *x0.shape[1:])

    def q_sample(self, x0, noise, t):
        a = Coefficients(self.table, self.step(t))
        return a.sqrt_abar * x0 + a.sqrt_1m_abar * noise                # DDPM Eq. (4)

    def target(self, x0, noise, t):
        """The regression target (B, C, S, S)."""
        a = Coefficients(self.table, self.step(t))
        return a.sqrt_abar * noise - a.sqrt_1m_abar * x0 if self.predicts_v else noise

    @property
    def predicts_v(self):
        return self.options["predict"] == "v"

    def mse(self, model, x0, y, t, noise):
        """The mean squared error of each image (B,), and the model's aux."""
        prediction, aux = model(self.q_sample(x0, noise, t), t, y)
        return self.squared_error(prediction, self.target(x0, noise, t)), aux

    def loss(self, model, x0, y, t, noise):
        """The training loss of each image, weight * mse + vlb (B,), and the model's aux."""
        x = self.q_sample(x0, noise, t)
        prediction, aux = model(x, t, y)
        mse = self.squared_error(prediction, self.target(x0, noise, t))
        learned = prediction.shape[1] > x0.shape[1]                     # 2C channels
        vlb = self.vlb(prediction.float(), x0, x, self.step(t)) if learned else 0
        return self.weight(mse, vlb, t), aux

    def step(self, t):
        return (t * self.T).round().long().clamp(0, self.T - 1)         # (B,) 0..999

    def squared_error(self, prediction, target):
        return (prediction[:, : target.shape[1]].float() - target).square().flatten(1).mean(1)

    def vlb(self, prediction, x0, x, n):
        """The variational lower bound's term of step n, in bits per dimension (B,).

        The squared error does not train the second C channels, the variance; this term does. It is
        the KL divergence between the true reverse step (which knows x0) and the network's Gaussian.
        The mean is detached, so that the noise prediction learns from the squared error alone
        (IDDPM Sec. 3.1). IDDPM adds 1/1000 of the sum over steps. Of 1000 steps that is the mean,
        so the weight is 1 here, as in DiT. At n = 0 the term is minus the log likelihood of the
        image's 256 grey levels."""
        a = Coefficients(self.table, n)
        eps, v = prediction.chunk(2, dim=1)
        mean, log_var, *_ = self.p_mean_variance(torch.cat([eps.detach(), v], dim=1), x, a)
        true_mean = a.posterior_mean_coef1 * x0 + a.posterior_mean_coef2 * x    # DDPM Eq. (7)
        kl = gaussian_kl(true_mean, a.log_beta_tilde, mean, log_var)
        nll = -grey_level_log_likelihood(x0, mean, log_var)
        return torch.where(expand_dims(n) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def weight(self, mse, vlb, t):
        """Min-SNR and P2 weight only the squared error. ANT-UW weights the whole loss."""
        o, a = self.options, Coefficients(self.table, self.step(t))
        if self.predicts_v and o["weighting"] in ("min-snr", "p2"):
            mse = mse * a.abar.flatten()        # they weight the error of the noise: abar times v's
        snr = (a.sqrt_abar / a.sqrt_1m_abar).square().flatten()         # (B,)
        if o["weighting"] == "min-snr":
            return mse * snr.clamp(max=o["gamma"]) / snr + vlb          # min(SNR, gamma) / SNR
        if o["weighting"] == "p2":
            return mse / (1 + snr) ** o["gamma"] + vlb                  # 1 / (k + SNR)^gamma, k = 1
        if o["weighting"] == "ant-uw":          # uncertainty weighting: L / (2 var) + log(var) / 2
            k = o["clusters"]
            s = self.log_var[((self.step(t) + 1) * k - 1) // self.T]    # (B,)
            # s is log(var). The sum of s over k clusters is the mean of k s over images, of which
            # 1/k lies in each cluster. Minimal at s = log(mean loss of the cluster / k).
            return ((mse + vlb) * torch.exp(-s) + k * s) / 2
        return mse + vlb

    def param_groups(self):
        """The learning rate of ANT-UW's weights, 0.025 as in DTR's official code. Our choice: an
        AdamW of their own, with torch's betas, and no clipping of their gradients."""
        return [dict(params=[p], lr=0.025, weight_decay=0.0) for p in self.parameters()]

    # ---- sampling

    def p_mean_variance(self, prediction, x, a, clip_x0=None):
        """One reverse step as a Gaussian: its mean and log variance, and the x0 and noise that the
        network estimates. clip_x0: a bound of |x0|; mean and noise follow from the bounded x0."""
        C = x.shape[1]
        eps = prediction[:, :C]                                         # or v
        if self.predicts_v:
            x0 = a.sqrt_abar * x - a.sqrt_1m_abar * eps
            eps = a.sqrt_abar * eps + a.sqrt_1m_abar * x
        else:
            x0 = (x - a.sqrt_1m_abar * eps) / a.sqrt_abar
        if clip_x0 is not None:                                         # the authors' clip_denoised
            x0 = x0.clamp(-clip_x0, clip_x0)
            eps = (x - a.sqrt_abar * x0) / a.sqrt_1m_abar
        mean = a.posterior_mean_coef1 * x0 + a.posterior_mean_coef2 * x     # Eq. (7)
        if prediction.shape[1] == C:
            return mean, a.log_beta_tilde.expand_as(x), x0, eps
        share = (prediction[:, C:] + 1) / 2             # -1..1 -> 0..1, between beta_tilde and beta
        log_var = share * a.log_beta + (1 - share) * a.log_beta_tilde   # IDDPM Eq. (15)
        return mean, log_var, x0, eps

    def trajectory(self, f, x, steps=250, solver="ddpm", eta=0.0, noise=None, spacing=None,
                   clip_x0=None):
        """From noise x to data; yields (t, x, the x0 estimated in this step).

        ddpm: ancestral sampling, new noise in each step. ddim: no new noise with eta 0; with eta 1
        the same as ddpm of the same steps without learned variance. dpm++: DPM-Solver++(2M), second
        order, made for 10 to 30 steps. noise(i) -> the normal numbers of step i, counted from 0.
        spacing (ddpm, ddim): see respace(). The network always gets the ORIGINAL number of a step.

        clip_x0: bound every estimate of x0 to [-clip_x0, clip_x0]. Images need 1: at the noisiest
        step of the cosine schedule the signal is 5e-5 of x, so that dividing by it turns an error
        of 0.01 in eps into 200 in x0 (v is not divided). sample.py does so. Latents have no known
        range, so the released samplers do not clip them, nor do we unless a bound is asked for."""
        kept = steps_even_in_half_log_snr(self.alphas_cumprod, steps) if solver == "dpm++" else \
            respace(self.T, steps, spacing or SPACINGS[solver])         # original steps, ascending
        level = self.alphas_cumprod[kept]                               # abar of the steps kept
        table = coefficients(level).to(x)
        noise = noise or (lambda i: torch.randn_like(x))
        before = None                                                   # dpm++: lambda, x0 one ago
        for i, n in enumerate(reversed(range(len(kept)))):
            prediction = f(x, kept[n] / self.T)
            a = Coefficients(table, slice(n, n + 1))                    # one row for all images
            mean, log_var, x0, eps = self.p_mean_variance(prediction, x, a, clip_x0)
            now, then = level[n].item(), level[n - 1].item() if n else 1.0
            if solver == "ddpm":
                x = mean + (0.5 * log_var).exp() * noise(i) if n else mean
            elif solver == "ddim":
                sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))   # DDIM Eq. (16)
                x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - sigma**2, 0)) * eps
                x = x + sigma * noise(i) if sigma else x                             # DDIM Eq. (12)
            else:
                x, before = dpm_step(x, x0, now, then, before), (half_log_snr(now), x0)
            yield (kept[n - 1] / self.T if n else 0.0), x, x0


def alphas_cumprod(schedule, T):
    """abar, the share of the signal's variance left at each step: (T,) float64, from 1 to 0."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2           # IDDPM Eq. (17)
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


SPACINGS = {"ddpm": "linspace", "ddim": "trailing"}                     # the defaults of solvers


def respace(T, steps, spacing="linspace"):
    """-> the steps of 0..T-1 that a sampler keeps, ascending. Raises ValueError.

    10 of 1000     linspace   0 111 222 ... 888 999     the authors' ancestral sampling, up to how
                                                        halves are rounded
                   trailing   99 199 299 ... 899 999    from pure noise on, in equal steps
                   leading    0 100 200 ... 800 900     the authors' DDIM, where a stride gives
                                                        this many steps (else an error, as theirs)

    leading starts at step 900 (with two steps: at 500), but from an x that is pure noise, which
    spoils the samples of few steps. So trailing is our default of DDIM, and leading is for
    comparisons with released figures."""
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: between 1 and {T}")
    if spacing == "trailing":
        return [math.ceil(i * T / steps) - 1 for i in range(1, steps + 1)]
    if spacing == "leading":
        for stride in range(1, T):                      # T would keep step 0 alone
            if len(range(0, T, stride)) == steps:
                return list(range(0, T, stride))
        raise ValueError(f"{steps} sampling steps: no stride over {T} steps gives that many, which "
                         "the spacing \"leading\" needs")
    if spacing != "linspace":
        raise ValueError(f"spacing {spacing!r}: linspace, trailing or leading")
    return [T - 1] if steps == 1 else [round(i * (T - 1) / (steps - 1)) for i in range(steps)]


def steps_even_in_half_log_snr(abar, steps):
    """-> steps for DPM-Solver++, evenly spread in lambda = log(SNR) / 2, ascending. Raises
    ValueError.

    Of 20 steps evenly spread in time, the first would cross 50 % of the range of lambda (cosine),
    or the last 30 % (linear), with a large error. Where the nearest step is already taken, the next
    lower one is, and the rest is spread evenly again: there are always as many as asked for."""
    if not 1 <= steps <= len(abar):
        raise ValueError(f"{steps} sampling steps: between 1 and {len(abar)}")
    lam = 0.5 * torch.log(abar / (1 - abar))                            # (T,) falling
    kept = [len(abar) - 1]
    for left in range(steps - 1, 0, -1):                # how many steps are still to be chosen
        goal = lam[kept[-1]] + (lam[0] - lam[kept[-1]]) / left
        nearest = int((lam - goal).abs().argmin())
        kept.append(max(min(nearest, kept[-1] - 1), left - 1))  # at least left - 1: room for others
    return kept[::-1]


NAMES = ("abar", "sqrt_abar", "sqrt_1m_abar", "log_beta", "log_beta_tilde",
         "posterior_mean_coef1", "posterior_mean_coef2")


def coefficients(abar):
    """abar (N,) of the kept steps -> a table (N, 7) float32 with a column per name in NAMES. Betas
    are those between kept steps: leaving out steps gives a DDPM with fewer, larger steps (IDDPM
    Sec. 4)."""
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / before                                            # (N,)
    tilde = beta * (1 - before) / (1 - abar)                            # DDPM Eq. (7)
    tilde = torch.cat([tilde[1:2] if len(abar) > 1 else beta, tilde[1:]])   # 0 at n = 0 has no log
    posterior_mean_coef1 = before.sqrt() * beta / (1 - abar)
    posterior_mean_coef2 = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return torch.stack([abar, abar.sqrt(), (1 - abar).sqrt(), beta.log(), tilde.log(),
                        posterior_mean_coef1, posterior_mean_coef2], dim=1).float()


class Coefficients:
    """Rows n (B,), or a slice, of the table: each column is an attribute, (B, 1, 1, 1)."""

    def __init__(self, table, n):
        for name, column in zip(NAMES, table[n].unbind(1)):
            setattr(self, name, expand_dims(column))


def half_log_snr(abar):
    return 0.5 * math.log(abar / (1 - abar))                            # lambda of DPM-Solver++


def dpm_step(x, x0, now, then, before):
    """DPM-Solver++(2M): the linear part is solved exactly; the network's part is extrapolated by a
    line through the last two estimates of x0. now, then: abar before and after the step; before:
    lambda and x0 of the step before, or None."""
    if then == 1.0:
        return x0                                                       # the last step: no noise
    h = half_log_snr(then) - half_log_snr(now)
    if before:
        r = (half_log_snr(now) - before[0]) / h
        x0 = x0 + (x0 - before[1]) / (2 * r)                            # Algorithm 2, D_i
    return math.sqrt((1 - then) / (1 - now)) * x - math.sqrt(then) * math.expm1(-h) * x0


def gaussian_kl(mean1, log_var1, mean2, log_var2):
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp()
                  + (mean1 - mean2).square() * (-log_var2).exp())


def grey_level_log_likelihood(x, mean, log_var):
    """log probability of the grey level (1/255 to each side of x in [-1, 1]) under a Gaussian."""
    def cdf(z):     # of the normal distribution, in the tanh form that the authors use
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    inv = (-0.5 * log_var).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inv), cdf((x - mean - 1 / 255) * inv)
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return p.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------- random numbers


def expand_dims(v):
    return v.view(-1, 1, 1, 1)                                          # (B,) -> (B, 1, 1, 1)


def make_generator(*key, device="cpu"):
    """A generator whose numbers depend on the key alone, so that no random state must be saved."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


class StepRNG:
    """The random numbers of one training step, keyed by (seed, step, name).

    They are drawn for the GLOBAL batch of `total` images, and each process takes its own `rows`. So
    neither the number of processes nor a restart changes a number. On a GPU they are drawn on the
    GPU; CPU and GPU numbers differ."""

    def __init__(self, seed, step, total, rows, device="cpu"):
        self.key, self.total, self.device = (seed, step), total, torch.device(device)
        self.source = "cuda" if self.device.type == "cuda" else "cpu"
        self.rows = rows.to(self.device, non_blocking=True)     # places in the global batch
        self.own = rows if self.source == "cpu" else self.rows
        self.first = step * total                       # number of images in earlier steps

    def to(self, device):
        return StepRNG(*self.key, self.total, self.own, device)

    def uniform(self, name, *shape):
        """Uniform numbers in [0, 1), (len(rows), *shape)."""
        return self.draw(torch.rand, name, shape)

    def normal(self, name, *shape):
        """Standard normal numbers, (len(rows), *shape)."""
        return self.draw(torch.randn, name, shape)

    def draw(self, function, name, shape):
        g = make_generator(*self.key, name, device=self.source)
        numbers = function(self.total, *shape, generator=g, device=self.source)
        return numbers[self.own].to(self.device)


def sample_noise(seed, indices, shape, step=0):
    """Normal numbers (len(indices), *shape) for sampling: a row depends on its own index only."""
    return torch.stack([torch.randn(shape, generator=make_generator(seed, "sample", i, step))
                        for i in indices])


DIFFUSIONS = {"rf": RectifiedFlow, "ddpm": DDPM}                        # the values of --path
