"""Two ways from noise to pictures: rectified flow and DDPM. Each loss stands next to its samplers.

    data x0 ----------------- x_t -----------------> noise e         training: mix, ask the network
    t = 0                      t                       t = 1
    data x0 <---- x_t <---- x_t <---- x_t <--------- noise e         sampling: walk back in steps

Time is t in [0, 1] everywhere: 0 is data, 1 is noise. DDPM's step n of 0..999 is t = n/1000.
Codebases that count the other way (t = 1 is data): SiT, lightning-DiT, torchcfm.

             x_t                                the network predicts
    flow     (1 - t) x0 + t e                   v = e - x0
    DDPM     sqrt(abar) x0 + sqrt(1 - abar) e   e, and where between two bounds the variance lies

Letters: B batch, C channels, S side; x (B, C, S, S), t (B,), y (B,); "wide" means (B, 1, 1, 1).
Read next: RectifiedFlow (one screen), guide(), then DDPM.

Sources. Rectified flow: Liu 2209.03003; logit-normal t: Esser 2403.03206. DDPM: Ho 2006.11239;
learned variance, cosine steps, respacing: Nichol & Dhariwal 2102.09672, "IDDPM". DDIM: Song
2010.02502. DPM-Solver++: Lu 2211.01095. Guidance: Ho & Salimans 2207.12598; in an interval:
Kynkaanniemi 2404.07724. Weightings: Min-SNR: Hang 2303.09556; P2: Choi 2204.00227; ANT-UW: Go
2306.00354."""

import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------- rectified flow


class RectifiedFlow(nn.Module):
    """Straight lines from data to noise; the network learns their velocity.

    times: how training draws t: "logit-normal" (mostly in the middle: SD3, DiT-MoE) or "uniform".
    A network with 2C output channels will do too (official DiT-MoE): the last C are not used."""

    kind, solvers = "rf", ("euler", "heun")

    def __init__(self, times="logit-normal"):
        super().__init__()
        if times not in ("logit-normal", "uniform"):
            raise ValueError(f"times {times!r}: logit-normal or uniform")
        self.options = dict(times=times)

    def grid(self, u):
        """Numbers u in [0, 1) -> times of this path, evenly spread."""
        return u

    def density(self, t):
        """How often training draws t (B,); the mean over all times is 1."""
        if self.options["times"] == "uniform":
            return torch.ones_like(t)
        z = t.clamp(1e-6, 1 - 1e-6).logit()             # dt = t (1 - t) dz
        return (-z.square() / 2 - F.logsigmoid(z) - F.logsigmoid(-z)).exp() / math.sqrt(2 * math.pi)

    def draw(self, x0, draw):
        """What training draws: t (B,) and noise like x0."""
        t = draw.uniform("t") if self.options["times"] == "uniform" else draw.normal("t").sigmoid()
        return t, draw.normal("noise", *x0.shape[1:])

    def mix(self, x0, noise, t):
        return (1 - wide(t)) * x0 + wide(t) * noise

    def target(self, x0, noise):
        """What the network should predict, (B, C, S, S)."""
        return noise - x0

    def error(self, model, x0, y, t, noise):
        """Mean squared error of each picture (B,), and the model's aux."""
        prediction, aux = model(self.mix(x0, noise, t), t, y)
        v = prediction[:, : x0.shape[1]].float()
        return (v - self.target(x0, noise)).square().flatten(1).mean(1), aux

    loss = error                                        # what training minimises (B,), and aux

    def trajectory(self, f, x, steps=25, solver="euler", **_):
        """From noise x to data in equal steps; yields (t, x, the x0 that this step aims at).

        f(x, t) -> prediction. heun looks at both ends of a step: twice the work, second order."""
        C = x.shape[1]
        for i in range(steps, 0, -1):
            t, s = i / steps, (i - 1) / steps           # s is the earlier, cleaner end
            v = f(x, t)[:, :C]
            x0 = x - t * v
            if solver == "heun":
                v = (v + f(x + (s - t) * v, s)[:, :C]) / 2
            x = x + (s - t) * v
            yield s, x, x0


# ---------------------------------------------------------------------------- guidance, once


def guide(model, y, none, scale=1.0, channels=None, interval=(0.0, 1.0)):
    """Classifier-free guidance -> f(x, t): the prediction, pushed from "no class" towards class y.

    none: the label for "no class" (cfg.classes). scale 1 asks the model once, without guidance.
    channels: how many channels to guide (None: all C). DiT, DyDiT and DiT-MoE's DDPM guide the
    first 3 of 4, an accident of the official code that published figures contain; DTR guides all.
    interval: (lo, hi), the times at which guidance is on."""

    def f(x, t):
        time = x.new_full((len(x),), t)
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return model(x, time, y)[0]
        label = torch.cat([y, torch.full_like(y, none)])
        given, free = model(torch.cat([x, x]), torch.cat([time, time]), label)[0].chunk(2)
        n = channels or x.shape[1]
        guided = free[:, :n] + scale * (given[:, :n] - free[:, :n])     # Ho & Salimans, Eq. (6):
        return torch.cat([guided, given[:, n:]], dim=1)     # scale = 1 + w; variances stay

    return f


# ---------------------------------------------------------------------------- DDPM


class DDPM(nn.Module):
    """A thousand noise levels; the network predicts the noise, and may learn the reverse variance.

    schedule: linear (DiT) or cosine (IDDPM). weighting of the squared error at each step:
    none, min-snr (gamma: 5), p2 (gamma: 1), ant-uw (clusters: 8; learns its weights)."""

    kind, solvers = "ddpm", ("ddpm", "ddim", "dpm++")
    T = 1000

    def __init__(self, schedule="linear", weighting="none", gamma=None, clusters=8):
        super().__init__()
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule {schedule!r}: linear or cosine")
        if weighting not in ("none", "min-snr", "p2", "ant-uw"):
            raise ValueError(f"weighting {weighting!r}: none, min-snr, p2 or ant-uw")
        if gamma is None:
            gamma = {"min-snr": 5.0, "p2": 1.0}.get(weighting, 0.0)
        if weighting == "min-snr" and not gamma > 0:
            raise ValueError(f"gamma {gamma}: min-snr needs one above 0")
        self.options = dict(schedule=schedule, weighting=weighting, gamma=gamma, clusters=clusters)
        self.abar = abar(schedule, self.T)                              # (T,) float64
        self.register_buffer("table", coefficients(self.abar), persistent=False)
        if weighting == "ant-uw":                                     # log variance of each cluster
            self.log_var = nn.Parameter(torch.zeros(clusters))

    # ---- training

    def grid(self, u):
        return (u * self.T).floor().clamp(max=self.T - 1) / self.T    # u may have been rounded to 1

    def density(self, t):
        return torch.ones_like(t)                       # ant-uw's clusters are equally long, too

    def draw(self, x0, draw):
        first, end = 0, self.T
        if self.options["weighting"] == "ant-uw":      # as many pictures from each cluster of steps
            k = self.options["clusters"]               # (B / k need not be whole: the next batch
            i = (draw.first + draw.rows) % k           # goes on where this one stops)
            first, end = i * self.T // k, (i + 1) * self.T // k
        n = first + (draw.uniform("t") * (end - first)).floor()         # (B,) 0..999
        return n / self.T, draw.normal("noise", *x0.shape[1:])

    def mix(self, x0, noise, t):
        a = Coefficients(self.table, self.step(t))
        return a.sqrt_abar * x0 + a.sqrt_1m_abar * noise                # DDPM Eq. (4)

    def target(self, x0, noise):
        return noise

    def error(self, model, x0, y, t, noise):
        """Mean squared error of each picture (B,), and the model's aux."""
        prediction, aux = model(self.mix(x0, noise, t), t, y)
        return self.mse(prediction, noise), aux

    def loss(self, model, x0, y, t, noise):
        """What training minimises: weight * mse + vb (B,), and aux."""
        x = self.mix(x0, noise, t)
        prediction, aux = model(x, t, y)
        mse = self.mse(prediction, noise)
        learned = prediction.shape[1] > x0.shape[1]                     # 2C channels
        vb = self.vb(prediction.float(), x0, x, self.step(t)) if learned else 0
        return self.weigh(mse, vb, t), aux

    def step(self, t):
        return (t * self.T).round().long().clamp(0, self.T - 1)         # (B,) 0..999

    def mse(self, prediction, noise):
        return (prediction[:, : noise.shape[1]].float() - noise).square().flatten(1).mean(1)

    def vb(self, prediction, x0, x, n):
        """The variational term, for the learned variance alone, in bits per dimension (B,).

        The squared error says nothing about the variance of a reverse step: the second C channels
        would stay untrained. This term is the KL divergence between the true reverse step (it knows
        x0) and the network's Gaussian. The mean is detached: the noise prediction learns from the
        squared error only, the variance from this only (IDDPM Sec. 3.1; their 1/1000 of the sum
        over 1000 steps is the mean over steps, hence weight 1, as in DiT). At n = 0 the next thing
        is the picture itself, with 256 grey levels: a likelihood."""
        a = Coefficients(self.table, n)
        eps, v = prediction.chunk(2, dim=1)
        mean, log_var, _ = self.reverse(torch.cat([eps.detach(), v], dim=1), x, a)
        true_mean = a.mean_x0 * x0 + a.mean_x * x                       # DDPM Eq. (7)
        kl = gaussian_kl(true_mean, a.log_beta_tilde, mean, log_var)
        nll = -grey_level_log_likelihood(x0, mean, log_var)
        return torch.where(wide(n) == 0, nll, kl).flatten(1).mean(1) / math.log(2)

    def weigh(self, mse, vb, t):
        """Weightings touch the squared error only; ANT-UW, a task balance, weighs everything."""
        o, a = self.options, Coefficients(self.table, self.step(t))
        snr = (a.sqrt_abar / a.sqrt_1m_abar).square().flatten()         # (B,)
        if o["weighting"] == "min-snr":
            return mse * snr.clamp(max=o["gamma"]) / snr + vb           # min(SNR, gamma) / SNR
        if o["weighting"] == "p2":
            return mse / (1 + snr) ** o["gamma"] + vb                   # 1 / (k + SNR)^gamma, k = 1
        if o["weighting"] == "ant-uw":                          # Kendall: sum of L/2var + log var/2
            k = o["clusters"]
            s = self.log_var[((self.step(t) + 1) * k - 1) // self.T]    # (B,)  best at log L_i:
            return ((mse + vb) * torch.exp(-s) + k * s) / 2             # its share of the mean
        return mse + vb

    def param_groups(self):
        """ANT-UW's weights have an AdamW of their own: rate 0.025, no decay (DTR's released code),
        torch's betas. The rate rises and falls with the model's; gradients are not clipped."""
        return [dict(params=[p], lr=0.025, weight_decay=0.0) for p in self.parameters()]

    # ---- sampling

    def reverse(self, prediction, x, a):
        """One reverse step as a Gaussian: mean, log variance, and the x0 it believes in."""
        C = x.shape[1]
        eps = prediction[:, :C]
        x0 = (x - a.sqrt_1m_abar * eps) / a.sqrt_abar
        mean = a.mean_x0 * x0 + a.mean_x * x                            # DDPM Eq. (7)
        if prediction.shape[1] == C:
            return mean, a.log_beta_tilde.expand_as(x), x0          # the smallest sensible variance
        v = (prediction[:, C:] + 1) / 2                                 # -1..1 -> 0..1
        return mean, v * a.log_beta + (1 - v) * a.log_beta_tilde, x0    # IDDPM Eq. (15)

    def trajectory(self, f, x, steps=250, solver="ddpm", eta=0.0, noise=None):
        """From noise x to data; yields (t, x, the x0 that this step aims at).

        ddpm: ancestral, fresh noise at each step. ddim: eta 0 draws none, eta 1 is close to ddpm.
        dpm++: second order (2M), made for 10-30 steps. noise(i) -> the normal numbers of step i,
        counted from 0. The network is told the ORIGINAL step, whatever steps are left out."""
        kept = even_in_log_snr(self.abar, steps) if solver == "dpm++" else \
            respace(self.T, steps, solver)                              # original steps, ascending
        level = self.abar[kept]                                         # abar of the steps kept
        table = coefficients(level).to(x)
        noise = noise or (lambda i: torch.randn_like(x))
        before = None                                                  # dpm++: (lambda, x0) one ago
        for i, n in enumerate(reversed(range(len(kept)))):
            prediction = f(x, kept[n] / self.T)
            a = Coefficients(table, torch.full((len(x),), n, device=x.device))
            mean, log_var, x0 = self.reverse(prediction, x, a)
            now, then = level[n].item(), level[n - 1].item() if n else 1.0
            if solver == "ddpm":
                x = mean + (0.5 * log_var).exp() * noise(i) if n else mean
            elif solver == "ddim":
                sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))   # DDIM Eq. (16)
                eps = prediction[:, : x.shape[1]]
                x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - sigma**2, 0)) * eps
                x = x + sigma * noise(i) if sigma else x                             # DDIM Eq. (12)
            else:
                x, before = dpm_step(x, x0, now, then, before), (log_snr(now), x0)
            yield (kept[n - 1] / self.T if n else 0.0), x, x0


def abar(schedule, T):
    """The share of signal left at each step, (T,) float64, falling from about 1 to about 0."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        u = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2           # IDDPM Eq. (17)
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0)


def respace(T, steps, solver="ddpm"):
    """Which of T steps a sampler keeps, ascending. DDIM takes an integer stride from 0 where one
    gives this many (the authors refuse other numbers), everything else spreads from 0 to T - 1 (the
    authors' steps, but for the rounding of halves)."""
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: between 1 and {T}")
    if solver == "ddim":
        for stride in range(1, T):                      # T would keep step 0 alone
            if len(range(0, T, stride)) == steps:
                return list(range(0, T, stride))
    if steps == 1:
        return [T - 1]
    return [round(i * (T - 1) / (steps - 1)) for i in range(steps)]


def even_in_log_snr(abar, steps):
    """The steps for DPM-Solver++, evenly spread in lambda = log(alpha / sigma). Evenly spread in
    time, the last of 20 would cross 18 to 30 % of lambda's range and spoil the others' work.
    Steps that fall together are kept once: 20 stay 20 of linear, 17 of cosine steps."""
    if not 1 <= steps <= len(abar):
        raise ValueError(f"{steps} sampling steps: between 1 and {len(abar)}")
    lam = 0.5 * torch.log(abar / (1 - abar))                            # (T,) falling
    goals = torch.linspace(lam[0], lam[-1], max(steps, 2), dtype=lam.dtype)[-steps:]
    return sorted({int((lam - goal).abs().argmin()) for goal in goals})


NAMES = "abar sqrt_abar sqrt_1m_abar log_beta log_beta_tilde mean_x0 mean_x".split()


def coefficients(abar):
    """abar (N,) of the steps kept -> table (N, 7) float32. Betas are those between kept steps, so a
    sampler that leaves steps out is the same DDPM with fewer, larger ones (IDDPM Sec. 4)."""
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / before                                            # (N,)
    tilde = beta * (1 - before) / (1 - abar)                            # DDPM Eq. (7): 0 at n = 0,
    tilde = torch.cat([tilde[1:2] if len(abar) > 1 else beta, tilde[1:]])   # the next stands in
    mean_x0 = before.sqrt() * beta / (1 - abar)
    mean_x = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return torch.stack([abar, abar.sqrt(), (1 - abar).sqrt(), beta.log(), tilde.log(),
                        mean_x0, mean_x], dim=1).float()


class Coefficients:
    """Rows n (B,) of the table, every column by its name, as (B, 1, 1, 1)."""

    def __init__(self, table, n):
        for name, column in zip(NAMES, table[n].unbind(1)):
            setattr(self, name, wide(column))


def log_snr(abar):
    return 0.5 * math.log(abar / (1 - abar))                           # lambda = log(alpha / sigma)


def dpm_step(x, x0, now, then, before):
    """DPM-Solver++(2M): exact for the linear part, a line through two guesses x0 for the rest."""
    if then == 1.0:
        return x0                                                       # no noise left
    h = log_snr(then) - log_snr(now)
    if before:
        r = (log_snr(now) - before[0]) / h
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


# ---------------------------------------------------------------------------- chance, and shapes


def wide(v):
    return v.view(-1, 1, 1, 1)                                          # (B,) -> (B, 1, 1, 1)


def keyed(*key):
    """A generator that the key alone decides: nothing to save, the same numbers on every device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Draw:
    """The random numbers of one training step: a row per picture of the GLOBAL batch, of which this
    process takes its own. So neither the number of processes nor a restart changes a number."""

    def __init__(self, seed, step, total, rows, device="cpu"):
        self.key, self.total, self.rows, self.device = (seed, step), total, rows.to(device), device
        self.first = step * total                       # pictures that earlier steps have seen

    def to(self, device):
        return Draw(*self.key, self.total, self.rows, device)

    def uniform(self, name, *shape):
        return self.mine(torch.rand(self.total, *shape, generator=keyed(*self.key, name)))

    def normal(self, name, *shape):
        return self.mine(torch.randn(self.total, *shape, generator=keyed(*self.key, name)))

    def mine(self, numbers):
        return numbers[self.rows.cpu()].to(self.device)


def index_noise(seed, indices, shape, step=0):
    """Normal numbers (len(indices), *shape) for sampling: a row depends on its own index only."""
    return torch.stack([torch.randn(shape, generator=keyed(seed, "sample", i, step))
                        for i in indices])
