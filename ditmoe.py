"""DiT-MoE: many experts, of which every token runs two.   Fei et al. 2024, arXiv:2407.11633
"Scaling Diffusion Transformers to 16 Billion Parameters"

The question: can a DiT get many more parameters without paying for all of them at every token?

1. Replace each MLP by E experts and a router. A token runs only the k = 2 experts that its router
   finds most probable: parameters grow with E, the work per token grows with k.
2. The router is one linear layer and a softmax over all E experts. The probability of a chosen
   expert is the weight of its output. It is not renormalised: the k weights do not sum to 1.
3. Shared experts run for every token, with weight 1. They can learn what all tokens need, so that
   the routed experts need not all learn it again.
4. Balance loss: without it a router may send most tokens to a few experts, while the others learn
   nothing. The loss makes an expert less probable for a token if it is chosen more often than the
   token's other likely experts.
5. Experts have no capacity limit and no token is dropped: an image does not depend on its batch.

    token t1 -+- router, softmax --- [.1 .5 .1 .3] - top 2 - .5 F2(t1) + .3 F4(t1) -(+)- y1
              +- shared experts --------------------------------------- Fs(t1) ------+

    how it is computed             pairs sorted by expert      one product per expert, added back
    t1 -> F2, F4                   F1: t3                      y1 = .5 F2(t1) + .3 F4(t1)
    t2 -> F3, F2        --->       F2: t1 t2          --->     y2 = ...
    t3 -> F1, F4                   F3: t2    F4: t1 t3         y3 = ...

Equations (x: the normed and modulated token that DiT's MLP would get: it knows time and class);
(a), (b), ... mark the lines that compute them:
    probs = softmax(x W)                                                                         (a)
    chosen = the k experts with the largest probs                                                (b)
    MoE(x) = sum over chosen e of probs_e F_e(x) + F_s(x)                                        (c)
    F_e(x) = (silu(x W_gate) * x W_up) W_down, 4D wide inside                                    (d)
    F_s: n_s = 2 shared experts, each D wide, as one network of the same form, 2D wide
    f_e = E n_e / (k T),   p_e = mean of probs_e over T tokens                                   (e)
    L_balance = sum_e f_e p_e                                   (Eq. 5 without alpha)            (f)
    L = L_diffusion + alpha * sum over layers of L_balance,   alpha = 0.005                      (g)
n_e is the number of tokens that chose e, out of k T pairs: f_e = 1 is a fair share. f is a count
and therefore a constant; the gradient flows through p.

Where the router's gradient comes from: the choice of the top k gives no gradient. Two things do.
The probabilities multiply the outputs of the chosen experts, and through the softmax this reaches
the logits of all experts. The balance loss is the other. If the weights are renormalised and k = 1,
the weight is always 1: then only the balance loss trains the router.

What the balance loss says at its extremes. Even counts: exactly 1, whatever the probabilities. All
tokens choose the same k experts: E/k times the mean sum of their k probabilities, from 1 to E/k.
If 2 of 8 experts win every token, and their logits exceed the others by 0.01, 1, 3 or 10, it is
1.008, 1.90, 3.48 or 4.00. So a value near 1 does not prove even use: look at "load" in aux.
Worked example, E = 4, k = 2, two tokens with probs (.5 .3 .1 .1) and (.4 .1 .3 .2): they choose
experts 1, 2 and 1, 3. n = (2 1 1 0), f = 4 n / (2 * 2) = (2 1 1 0), p = (.45 .2 .2 .15), so
L_balance = .9 + .2 + .2 + 0 = 1.3.

Main result (ImageNet 256x256, 250 DDPM steps, with guidance): XL/2 with 2 of 8 experts has FID
1.72, DiT-XL/2 2.27; at 512x512 2.30 and 3.04. The same name is not the same work. A token costs
(24 + 6) D^2 multiplications in two experts and the shared ones, where DiT's MLP has 8 D^2; with
the 4 D^2 of attention's layers in both, DiT-MoE-XL/2 costs 2.8 times DiT-XL/2. We count:
    8 experts, k = 2        S/2     B/2     L/2     XL/2    G/2 (16 experts)
    parameters              199M    796M    2.8B    4.2B    16.5B
    activated per token     72M     286M    1.0B    1.5B    3.2B
    GMAC/image, QK', AV in  16      63      222     328     698
    GMAC of the same DiT    6       23      81      119
A controlled study of MoE in SiT-XL (arXiv:2607.24665): FID 5.20 dense, 4.65 with experts, 4.62 with
a shared expert in addition. The last gain is smaller than the spread over seeds (0.04 to 0.06).
At initialisation the two chosen probabilities of E = 8 sum to about 0.43, so the routed experts
begin with less than half of the weight of the shared ones.
What we found (claims M5 and M9 in experiments/README.md; three seeds): without balance loss the
load is less even (entropy 0.88; 1.00 with it), but every expert is used and the loss is the same;
with alpha = 0.5 it is 1.3 % higher. On both data sets, on average over the layers, the choice of an
expert (at most 3 bits) tells 0.48 or 0.47 bits about the position, 0.05 or 0.09 about the step, and
0.05 or 0.03 about the class. That the step counts more than the class could not be shown. In Fig. 7
the first sampling steps use few experts and later steps use all more evenly; here use is uneven in
the first and in the last steps.

Letters: B batch, C channels, S side of the image, P side of a patch, L = (S/P)^2 tokens, D width, H
heads, N depth, M of the N blocks have experts, E experts, k chosen per token, h width inside an
expert, T = B*L tokens, R = T*k pairs (token, chosen expert). Four things are called gate: `gates`,
the weights of the chosen experts; MoE.gate, the router (its name in checkpoints); gate1 and gate2
of adaLN; W_gate inside a SwiGLU. Time: t = 0 is data, t = 1 is noise (see diffusion.py). Read next:
top_k_gating(), balance_loss(), MoE.forward().  The paper's part ends at the first "# -----" line.

Where the paper and the official code (feizc/DiT-MoE) differ, and what we do
- Expert: in the paper a GELU MLP (Eq. 4), in the official code a SwiGLU, 4D wide, without
  biases. Only the SwiGLU fits the paper's table of parameters: our default. expert=gelu: the MLP.
- Shared experts: the official code has one SwiGLU, 2D wide, as we do. That is the same function as
  n_s = 2 of width D, because the hidden channels of a SwiGLU add up. A shared expert is D wide, a
  routed one 4D (in TINY both are D). In the paper, n_s = 1, 2 and 4 differ little.
- alpha: the paper tried 0, 0.005, 0.01, 0.05 and 0.5 and takes 0.005, as we do; the official code
  has 0.01, and stops with an error at 0.
- Balance over which tokens: the paper counts one image (scope=image; we average over images), the
  official code the batch of one process. We count the batch of all processes (scope=batch), so that
  the number of processes does not change the gradient. This is our choice: the batch is the weaker
  demand, it leaves an image free to prefer some experts.
- The official code does not add the balance loss to the objective but adds its gradient during the
  backward pass. In fp16 the objective is multiplied by a large scale, and at the end all gradients
  are divided by it. That of the balance loss was never multiplied, so it becomes nearly 0. Here it
  is part of the objective: train.py adds every aux entry whose name ends in _loss.
- The official routed experts have no gradient in eval mode and accept only float32 in training.
  Here one path serves both modes and all dtypes. The router computes in float32 (our choice).
- Blocks with experts: the paper has "every e-th block" and compares the deep with the shallow half;
  the official code has all. We have moe_layers=all|deep|shallow; the other blocks keep DiT's MLP.
- G: the paper's text says 32 experts, the official code 16; 16.5B parameters need 16.
- from_dense is not in the paper. The official script copies the expert of a DiT-MoE that has only
  one: its weight was 1, the k weights sum to less, so the function changes. Ours starts from a
  plain DiT and keeps the function.
- The released rectified-flow weights (XL, G) embed t in [0, 1] unscaled: time_scale=1."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    size: int = 32              # S, side of the image or latent (ImageNet 256x256: 32)
    patch: int = 2              # P: 2, 4 or 8
    channels: int = 4           # C: 4 for Stable Diffusion's latents, 1 for digits
    classes: int = 1000         # y = classes means "no class"
    dim: int = 384              # D. S: 384, B: 768, L: 1024, XL: 1152, G: 1408
    depth: int = 12             # N. S: 12,  B: 12,  L: 24,   XL: 28,   G: 40
    heads: int = 6              # H. S: 6,   B: 12,  L: 16,   XL: 16,   G: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t; released XL and G: 1
    experts: int = 8            # E. The paper's "8E2A" is experts = 8, k = 2; "16E2A" has 16
    k: int = 2                  # experts that a token runs
    shared: int = 2             # n_s: 1, 2 or 4 shared experts, each D wide inside; 0: none
    hidden: int = 4             # h = hidden * D: a routed expert is 4D wide inside
    expert: str = "swiglu"      # swiglu | gelu (DiT's MLP, with biases)
    renormalize: bool = False   # divide the k weights of a token by their sum
    alpha: float = 0.005        # weight of the balance loss; the official code has 0.01
    scope: str = "batch"        # batch | image: the tokens among which experts must be in balance
    moe_layers: str = "all"     # all | deep | shallow (half of them): the blocks with experts
    qk_norm: bool = False       # LayerNorm on queries and keys: released XL and G


# TINY's experts are D wide, not 4D: two of them and a shared one cost 3 * 3 D^2 multiplications per
# token, the MLP of the tiny DiT 8 D^2. So the tiny DiT-MoE and the tiny DiT do nearly equal work.
TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4)
TINY = replace(TINY, experts=8, k=2, hidden=1, shared=1)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}
SIZES["G"] = dict(dim=1408, depth=40, heads=16, experts=16)


def top_k_gating(probs, k, renormalize=False):
    """The paper: every token takes its k most probable experts, weighted by their probabilities.

    probs (..., E), rows sum to 1 -> gates (..., k), chosen (..., k) expert ids, best first."""
    gates, chosen = probs.topk(k, dim=-1)                                       # (b)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates, chosen


def balance_loss(probs, chosen, scope="batch"):
    """sum_e f_e p_e (Eq. 5): 1 if the counts are even, E / k at most. 1 is not the minimum: with 2
    of 8 it is 0.57 if the first choices are sure, and even over 7 experts, and all second ones the
    eighth.

    probs (B, L, E), chosen (B, L, k) -> loss, and the share of all pairs that each expert got (E,).
    With scope "batch" training counts in all processes, because counts multiply p. p is that of
    this process: the loss is linear in p, so DDP's mean of gradients is the gradient of mean p."""
    assigned = torch.zeros_like(probs).scatter(2, chosen, 1.0)                  # (B, L, E)
    count, p = assigned.sum(1), probs.mean(1)                                   # (B, E) each
    if scope == "batch":
        count, p = count.sum(0, keepdim=True), p.mean(0, keepdim=True)          # (1, E) each  (e)
        if torch.is_grad_enabled():             # sampling may run on one process
            count = gather_processes(count).sum(0, keepdim=True)
    share = count / count.sum(1, keepdim=True)                                  # (B or 1, E)
    f = probs.shape[2] * share                          # E n_e / (k T): 1 is a fair share  (e)
    return (f * p).sum(1).mean(), share.mean(0)                                 # (f)


def experts_loop(experts, x, token, expert, gate):
    """What self.experts in MoE computes if they are SwiGLUs, written out; only tests call it.
    x (T, D); token, expert, gate (R,), one entry for each pair -> (T, D)."""
    y = torch.zeros_like(x)
    for e, (w1, w2) in enumerate(zip(experts.w1, experts.w2)):
        own = token[expert == e]                                                # (n,)
        y = y.index_add(0, own, gate[expert == e, None] * (swiglu(x[own] @ w1) @ w2))  # (c) (d)
    return y


class Router(nn.Module):
    """x (B, L, D) -> probs (B, L, E), a softmax over all experts.

    In float32: in bf16 some probabilities would be equal, and the top k could not tell them apart.
    Its matrix starts uniform in +-1/sqrt(D)."""

    full_precision = True                               # FSDP must not round these weights

    def __init__(self, cfg):
        super().__init__()
        bound = cfg.dim**-0.5
        self.weight = nn.Parameter(torch.empty(cfg.experts, cfg.dim).uniform_(-bound, bound))

    def forward(self, x):
        return linear_fp32(x, self.weight).softmax(-1)                          # (a)


class SwiGLU(nn.Module):
    """The n_s shared experts, each D wide inside, as one network with h = n_s D. Its weights are
    (out, in) as in nn.Linear; w1 is [W_gate; W_up]."""

    def __init__(self, dim, h):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(2 * h, dim)), nn.Parameter(torch.empty(dim, h))
        xavier(*self.w1.data.split(h), self.w2.data)

    def forward(self, x):
        return F.linear(swiglu(F.linear(x, self.w1)), self.w2)                  # (d)


class MoE(nn.Module):
    """MoE(x) = sum of probs_e F_e(x) over chosen e, plus F_s(x).  x (B, L, D) -> same, stats.

    stats: "balance" not yet weighted, "load" (E,) shares of all pairs, "experts" (B, L, k) ids."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.gate = cfg, Router(cfg)
        self.experts = Experts(cfg.experts, cfg.dim, cfg.hidden * cfg.dim, cfg.expert)
        if cfg.shared:
            form = SwiGLU if cfg.expert == "swiglu" else Mlp
            self.shared_experts = form(cfg.dim, cfg.shared * cfg.dim)

    def forward(self, x):
        probs = self.gate(x)                                                    # (B, L, E)
        gates, chosen = top_k_gating(probs, self.cfg.k, self.cfg.renormalize)   # (B, L, k) each
        balance, load = balance_loss(probs, chosen, self.cfg.scope)
        token = torch.arange(chosen.numel(), device=x.device) // self.cfg.k     # (R,)  0 0 1 1 2 ..
        y = self.experts(x.flatten(0, 1).to(amp_dtype(x)), token, chosen.flatten(), gates.flatten())
        if self.cfg.shared:
            y = y + self.shared_experts(x).flatten(0, 1)                        # (T, D)  (c)
        return y.view(x.shape).to(x.dtype), dict(balance=balance, load=load, experts=chosen)


class Block(nn.Module):
    """adaLN-Zero with experts in the MLP's place.  x (B, L, D), c (B, D) -> (B, L, D), stats."""

    def __init__(self, cfg, routed):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = (NormedAttention if cfg.qk_norm else Attention)(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.moe = MoE(cfg) if routed else None
        self.mlp = None if routed else Mlp(cfg.dim, 4 * cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))      # (B, L, D)
        y = modulate(self.norm2(x), shift2, scale2)                             # (B, L, D)
        y, stats = self.moe(y) if self.moe else (self.mlp(y), None)             # (B, L, D)
        return x + gate2 * y, stats


class DiTMoE(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: "balance_loss", alpha * M if
    the counts are even; "load" (M, E) shares of all pairs; "experts" (M, B, L, k) ids, best first.
    There is no "map" (experts per token) as in racedit.py: all tokens cost the same."""

    def __init__(self, cfg):
        super().__init__()
        check_config(cfg, hidden=range(1, 65), shared=range(65), expert=("swiglu", "gelu"),
                     scope=("batch", "image"), moe_layers=("all", "deep", "shallow"))
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)    # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg, i in moe_layers(cfg)) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)

    def forward(self, x, t, y):
        x, stats = self.x_embedder(x) + self.pos_embed, []                      # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        for block in self.blocks:
            x, own = block(x, c)                                                # (B, L, D)
            stats.append(own)
        aux = {key: torch.stack([own[key] for own in stats if own])             # (M, ...) each
               for key in ("balance", "load", "experts")}
        aux["balance_loss"] = self.cfg.alpha * aux.pop("balance").sum()         # over layers  (g)
        return unpatchify(self.final_layer(x, c), self.cfg), aux                # (B, C or 2C, S, S)


Model = DiTMoE                                          # the name that train.py looks for


def moe_layers(cfg):
    """The M blocks that have experts, as a range. In the paper the deep half beats the shallow."""
    N, half = cfg.depth, cfg.depth // 2
    return {"all": range(N), "deep": range(half, N), "shallow": range(max(1, half))}[cfg.moe_layers]


def cost(cfg):
    """Cost of one image: GMAC, 1e9 multiply-accumulates in matrix products, and the number of idle
    parameters: those that a token does not use. The paper's "Gflops" are multiply-accumulates
    too, but leave out the two products inside attention (QK' and AV)."""
    L, D, N, M = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.depth, len(moe_layers(cfg))
    matrices, biases = (3, 0) if cfg.expert == "swiglu" else (2, cfg.hidden * D + D)
    moe = L * (cfg.experts * D + matrices * D * D * (cfg.k * cfg.hidden + cfg.shared))
    # qkvo and adaLN in all blocks; the MLP in those without experts
    macs = N * (4 * L + 6) * D * D + (N - M) * 8 * L * D * D + M * moe + plain_macs(cfg)
    return {"idle parameters": M * (cfg.experts - cfg.k) * (matrices * cfg.hidden * D * D + biases),
            "GMAC": (macs + N * 2 * L * L * D) / 1e9,
            "GMAC without QK', AV (the paper's Gflops)": macs / 1e9}


def from_dense(state, cfg):
    """Sparse upcycling: the weights of a trained DiT -> a DiT-MoE that computes the same and can be
    trained on. Every expert is a copy of the MLP (hence expert="gelu", hidden=4), the weights of a
    token sum to 1 (hence renormalize), the shared experts add 0. Training makes the copies differ,
    because each gets other tokens.  ValueError if state is not a dense DiT of this depth."""
    model = DiTMoE(replace(cfg, expert="gelu", hidden=4, renormalize=True))
    twin = {"experts.w1": ".mlp.fc1.weight", "experts.b1": ".mlp.fc1.bias",
            "experts.w2": ".mlp.fc2.weight", "experts.b2": ".mlp.fc2.bias"}
    for key, w in model.state_dict().items():
        block, _, name = key.partition(".moe.")
        source = (block + twin[name]) if name in twin else key
        if name == "gate.weight":
            nn.init.normal_(w, std=0.02)
        elif name.startswith("shared_experts"):
            w.mul_(0 if "fc2" in name else 1)           # they add nothing at first
        elif source in state and f"blocks.{cfg.depth}.attn.qkv.weight" not in state:
            # w1, w2 (E, in, out): E transposed copies
            w.copy_(state[source].t().expand_as(w) if name in twin else state[source])
        else:
            raise ValueError(f"not a dense DiT of depth {cfg.depth}: no {source}, or more blocks")
    return model


# ------------------------------------- the expert engine, the same in ditmoe.py and racedit.py
# ------------------------------------------------- (tests/papers/test_shared.py keeps them equal)


class Experts(nn.Module):
    """E small networks D -> h -> D, with their weights stacked: experts_loop(), but faster.

    x (T, D); R pairs in any order: token, expert, gate (R,) -> the sum over the pairs of
    gate * F_expert(x[token]), (T, D). The pairs are sorted by expert, so that every expert gets
    its tokens as one block of rows; the results are added back to their tokens.
    form: "gelu" is DiT's MLP with biases; "swiglu" has no biases, and w1 is [W_gate, W_up].
    An expert without pairs gets a gradient of zero."""

    def __init__(self, E, D, h, form):
        super().__init__()
        mlp = form == "gelu"
        self.act = gelu if mlp else swiglu
        self.w1 = nn.Parameter(torch.empty(E, D, h if mlp else 2 * h))
        self.b1 = nn.Parameter(torch.zeros(E, h)) if mlp else None
        self.w2 = nn.Parameter(torch.empty(E, h, D))    # (in, out): faster than Linear's (out, in)
        self.b2 = nn.Parameter(torch.zeros(E, D)) if mlp else None
        for stack in (*self.w1.data.split(h, dim=2), self.w2.data):
            xavier(*stack)

    def forward(self, x, token, expert, gate):
        if self.in_one_kernel(amp_dtype(x), x.device.type):
            # On some GPUs the kernel's gradient is wrong for an expert without rows. So each expert
            # gets one more pair: token 0 with gate 0, which adds nothing.
            every = torch.arange(len(self.w1), device=x.device)
            token = torch.cat([token, torch.zeros_like(every)])
            expert, gate = torch.cat([expert, every]), torch.cat([gate, gate.new_zeros(len(every))])
        key, order = (expert * len(x) + token).sort()              # (R,)   by expert, then by token
        expert, token = key // len(x), key % len(x)
        ends = torch.searchsorted(expert, torch.arange(len(self.w1), device=x.device), right=True,
                                  out_int32=True)       # (E,)   expert e has rows ends[e-1]:ends[e]
        z = self.networks(x.index_select(0, token).to(amp_dtype(x)), ends, expert)  # (R, D)
        z = z * gate.index_select(0, order)[:, None]    # (R, D), in gate's float32
        return z.new_zeros(x.shape).index_add(0, token, z)                      # (T, D)  (c)

    def networks(self, z, ends, expert):
        """Row r of z (R, D) through the network of expert[r] -> (R, D)."""
        stacks = [w if w is None else w.to(z.dtype) for w in (self.w1, self.b1, self.w2, self.b2)]
        if self.in_one_kernel(z.dtype, z.device.type):
            w1, b1, w2, b2 = stacks
            z = self.act(grouped_linear(z, w1, b1, ends, expert))       # nothing waits for the GPU
            return grouped_linear(z, w2, b2, ends, expert)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()           # here the host waits for it
        weights = zip(*([None] * len(sizes) if w is None else w.unbind() for w in stacks))
        return torch.cat([self.one(*own) for own in zip(z.split(sizes), weights)])

    def in_one_kernel(self, dtype, device):
        """Whether F.grouped_mm can compute all experts at once; widths: multiples of 8."""
        return (dtype == torch.bfloat16 and device in ("cuda", "meta")
                and all(n % 8 == 0 for n in self.w2.shape[1:]))

    def one(self, z, weights):
        """One expert's network, z (n, D) -> (n, D). A CPU prepares a bf16 product anew for every n
        that it has not seen, so n is rounded up to a multiple of 32: few different n remain."""
        n, (w1, b1, w2, b2) = len(z), weights
        if z.dtype == torch.bfloat16 and n % 32:
            z = F.pad(z, (0, 0, 0, -n % 32))
        z = linear(self.act(linear(z, w1, b1)), w2, b2)
        return z if len(z) == n else z[:n]


def gelu(z):
    return F.gelu(z, approximate="tanh")


def swiglu(z):                                                                  # (R, 2h) -> (R, h)
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(z, w, b):
    """z (n, in), w (in, out), b (out,) or None -> (n, out)."""
    return z @ w if b is None else torch.addmm(b, z, w)


def grouped_linear(z, w, b, ends, expert):
    """All experts in one kernel.  z (R, in), w (E, in, out), b (E, out) or None -> (R, out).

    b[expert] is written as a product of 0s and 1s with b: it sums the gradient of b in float32. An
    index would sum it in bf16, row by row: over 4,096 rows that was wrong by 84 % (H200)."""
    z = F.grouped_mm(z, w, offs=ends)
    return z if b is None else torch.addmm(z, F.one_hot(expert, len(b)).to(z.dtype), b)


def xavier(*matrices):
    """Xavier's initialisation, matrix by matrix: in a stack (E, in, out) it would take E for a
    width."""
    for w in matrices:
        nn.init.xavier_uniform_(w)


def amp_dtype(x):
    """The dtype that autocast would give a matrix product on x; "meta" knows no autocast."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def gather_processes(x):
    """x (n, ...) of all processes, one below the other, without gradient: (processes * n, ...)."""
    if not torch.distributed.is_initialized():
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts)


def check_config(cfg, **allowed):
    """ValueError, in one line, if a field of cfg has a value outside its range or list of words."""
    for name, values in (dict(k=range(1, cfg.experts + 1)) | allowed).items():
        if getattr(cfg, name) not in values:
            known = "%d to %d" % (values.start, values.stop - 1) if isinstance(values, range) \
                else ", ".join(values)
            raise ValueError(f"{name} {getattr(cfg, name)!r}: must be one of {known}")


# ------------------------------------------------------ plain DiT parts, the same in every file
# ------------------------------------------------- (tests/papers/test_shared.py keeps them equal)


def size(name, **fields):
    """size("XL/2") -> the Config of a paper's model; **fields override (size=64, classes=10)."""
    letter, _, patch = name.partition("/")
    if letter not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(f"no size {name!r}: one of {', '.join(SIZES)}, then /2, /4 or /8")
    return replace(Config(), patch=int(patch), **(SIZES[letter] | fields))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def attend(q, k, v):
    """softmax(q k' / sqrt(D/H)) v.  q, k, v (B, H, L, D/H) -> (B, H, L, D/H)."""
    # In bf16 on a CPU the backward pass of the fused kernel is 3 to 8 times slower.
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)            # (B, L, 3, H, D/H)
        x = attend(*qkv.permute(2, 0, 3, 1, 4))                                 # (B, H, L, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))                    # (B, L, D)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """An image's patches as tokens, row by row.  (B, C, S, S) -> (B, L, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.channels, cfg.dim, cfg.patch, cfg.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): 128 cosines and 128 sines of time_scale * t, then an MLP."""

    def __init__(self, cfg):
        super().__init__()
        self.scale = cfg.time_scale
        self.mlp = nn.Sequential(nn.Linear(256, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))

    def forward(self, t):
        octave = torch.arange(128, device=t.device, dtype=torch.float32) / 128
        angle = self.scale * t.float()[:, None] * torch.exp(-math.log(10000) * octave)  # (B, 128)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)                    # (B, 256)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, D). The last row stands for "no class"."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding_table = nn.Embedding(cfg.classes + 1, cfg.dim)

    def forward(self, y):
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """(B, L, D), c (B, D) -> (B, L, P*P*C or P*P*2C)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm_final = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(cfg.dim, cfg.patch**2 * cfg.channels * (1 + cfg.learn_sigma))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 2 * cfg.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)       # 2 x (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x, cfg):
    """(B, L, P*P*C) -> (B, C, S, S). Inside a patch: row, column, channel (channel fastest)."""
    n, P = cfg.size // cfg.patch, cfg.patch
    x = x.reshape(len(x), n, n, P, P, -1)                                       # (B, n, n, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, cfg.size, cfg.size)  # (B, C, S, S)


def sincos_2d(cfg):
    """The fixed position embedding (1, L, D): the first half of D encodes the column of a patch,
    the second half its row."""
    n = cfg.size // cfg.patch
    omega = 10000 ** -(torch.arange(cfg.dim // 4, dtype=torch.float64) / (cfg.dim // 4))  # (D/4,)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * omega               # (n, D/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                         # (n, D/2)
    column, row = wave.repeat(n, 1), wave.repeat_interleave(n, dim=0)           # (L, D/2)
    return torch.cat([column, row], dim=1)[None].float()


def initialize(model):
    """DiT's initial weights: Xavier for linear layers, a standard deviation of 0.02 for the label
    table and the time MLP, zeros for adaLN (shift, scale and gate) and for the output."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for w in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(w.weight, std=0.02)
    for m in (*(b.adaLN_modulation[1] for b in model.blocks), model.final_layer.adaLN_modulation[1],
              model.final_layer.linear):
        nn.init.zeros_(m.weight)                        # so each block starts as the identity, and
        nn.init.zeros_(m.bias)                          # the network predicts 0


def plain_macs(cfg):
    """Multiply-accumulates outside the blocks: patch embedding, time MLP, final layer."""
    L, D, pixels = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.patch**2 * cfg.channels
    return L * D * pixels * (2 + cfg.learn_sigma) + (256 + D) * D + 2 * D * D


def linear_fp32(x, weight, bias=None):
    """A linear layer in float32 (float64 stays), also under autocast: routers decide by small
    differences, which bf16 would round away. (A GPU may use TF32 for it: train.py allows that.)"""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide), bias if bias is None else bias.to(wide))


# ------------------------------------------- only here: the attention of the released XL and G,
# ----------------------------------------------------- which the paper does not mention: qk_norm


class NormedAttention(nn.Module):
    """Attention with a LayerNorm on the queries and keys of each head (released XL and G)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)            # (B, L, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # 3 x (B, H, L, D/H)
        x = attend(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)   # (B, H, L, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))                    # (B, L, D)
