"""Race-DiT: every token of the batch races for every expert.  Yuan et al. 2025, arXiv:2503.16057
"Expert Race: A Flexible Routing Strategy for Scaling Diffusion Transformer with Mixture of Experts"

The question: a mixture of experts usually gives every token k experts, the hard ones and the easy
ones alike. Can the router decide how much compute a token deserves?

1. Replace each MLP by E small experts. A router scores every (token, expert) pair.
2. Keep the B*L*k best pairs of the whole batch. A hard token may win many experts, an easy one
   none; a token without an expert passes through the residual connection unchanged.
3. Sampling cannot race: all images have the same t, so every noise level would get k experts per
   token, and an image would depend on its batch. Training therefore tracks the lowest winning
   score as a moving average tau, and sampling keeps every pair that reaches tau, if any.
4. Router similarity loss: two experts that often win the same tokens are pushed to score tokens
   differently. An expert that wins too many tokens is pushed to score lower.
5. Per-layer regularization (PLR): the outputs of blocks grow with depth, so shallow layers count
   little and learn little. A second head of each router predicts the diffusion target, which gives
   every layer a loss of its own.

    training: scores of 3 tokens    race: the best B*L*k = 3      token choice: the best k = 1
    and 3 experts; k = 1            of all 9 pairs                of each row
           e1  e2  e3
    t1    [.9  .1  .7]              [x  .  x]   2 experts         [x  .  .]
    t2    [.3  .2  .1]              [.  .  .]   0 experts         [x  .  .]
    t3    [.2  .8  .4]              [.  x  .]   1 expert          [.  x  .]
                                    the lowest winning score is .7: tau moves towards .7
    sampling with tau = .7, two tokens of another image: no race, the number of winners is free
    u1    [.8  .2  .9]              [x  .  x]   2 experts
    u2    [.6  .1  .5]              [.  .  .]   0 experts

Letters: B batch, C channels, S side of the image, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, N depth, E experts, k experts per token on average, h width inside an expert, T = B*L
tokens, R pairs that won.
Time: t = 0 is data, t = 1 is noise (see diffusion.py).

Equations (x: the normed and modulated token that the MLP of DiT would get); (a), (b), ... mark the
lines that compute them:
    r = GELU(x W_r + b_r)                                       a router in each layer           (a)
    logits = r W_g + b_g,  gates = G(logits)                                                     (b)
    MoE(x) = sum over the experts e that x won of gates_e F_e(x)      F_e: MLP, h = 4D/split     (c)
    training: assigned = 1 for the K = B*L*k largest gates, v = the K-th                         (d)
              tau <- m tau + (1 - m) v                                                           (e)
    sampling: assigned = 1 where gates >= tau                                                    (f)
    P' = probs^T probs,  probs = softmax(logits) (T, E)         (E, E)                           (g)
    M' = assigned^T assigned,  assigned (T, E)                  (E, E)                           (h)
    W_ii = E M'_ii / sum_a M'_aa,  W_ij = (E^2 - E) M'_ij / sum_{a != b} M'_ab,  i != j          (i)
    L_sim = 1/T sum_ij W_ij P'_ij                               (g) to (j): Eqs. 9-11            (j)
    L_plr = mean (r W_t + b_t - diffusion target)^2                                              (k)
    L = L_diffusion + sum over layers of (1e-4 L_sim + 1e-2 L_plr)                               (l)
G is the identity: a score does not depend on the other scores of its token, so scores of different
tokens can be compared. A sigmoid selects the same pairs with other weights. A softmax makes a
token's gates sum to 1, so a hard token cannot win several experts at high scores: the worst gate of
the race in Table 1 (FID 16.47; identity 13.66). The identity has no lower bound: a chosen gate
below 0 subtracts the output of its expert.

Where the router's gradient comes from: the top-K has none. A chosen gate multiplies the output of
its expert, so the diffusion loss reaches the logits of the winners only (if G is a softmax: all
logits of their tokens). L_sim reaches all logits, through probs; the counts W are constants. L_plr
reaches r and what lies below it.

What the losses say: the classic balance loss multiplies the load of each expert by its mean
probability. It does not see pairs of experts, L_sim does:
                                                                      balance    L_sim
    all logits equal, some token with two winners (else see below)    1          1
    the same k > 1 experts win every token, probability 1/k each      E/k        (E/k)^2
    2 of 8 experts: all 28 pairs win equally often                    1.0        1.0
    2 of 8 experts: only the twins 01, 23, 45, 67 win, evenly         1.0        3.6
    no token has two winners (token choice, k = 1), equal logits      1          1/E
(2 of 8: logits 4 for an expert that won, 0 for the others.) With twins all loads are even, but the
eight experts are in fact four. 1/E shows that 1 is not the minimum: without a token that won two
experts, the terms i != j of L_sim are 0.

Main result (ImageNet 256x256): it reaches DiT-XL's training loss in 7.2 times fewer iterations at
equal activated parameters; XL with 4 of 32 experts has FID 3.31, dense XL 6.31 (Table 4). Routes:
race 8.03, token choice 9.50, expert choice 10.13 (Table 6; B/2 with 2 of 8, we infer). FID falls
from 13.66 to 11.56 with tau, to 8.95 with PLR added, to 8.03 with the similarity loss added
(Table 3). Fig. 6 shows more experts at low noise; the authors' summary for lay readers calls pure
noise harder.
What we found (claims R4 to R8 in experiments/README.md; three seeds, R4 and R6 five): tau keeps k
experts per token on average, as in training, and gives the loss of the top-k of the batch within
0.4 %. At low noise a token of Fashion-MNIST gets more experts, as in Fig. 6 (2.22 at t = 0.05, 1.91
at 0.95), but a token of digits gets fewer (1.77 and 2.27). With the similarity loss more pairs of
experts are used (Comb of Table 2: 45 %; 32 % without it). The balance loss gives 41 % with the same
weight, and 72 % with 100 times the weight. The losses of all four are within 0.7 %. We see no
effect of the gate (identity, sigmoid or softmax: R4) on the loss, and none of PLR on the loss or on
the growth of the blocks' outputs with depth (R6).
Read next: select(), then MoE.forward().  The paper's part ends at the first "# -----" line.

Differences and open points. We found no official code or weights. We could read the paper's tables
and figure captions, but not its running text, so some constants come from re-implementations by
others. Code A is a training code derived from DiffMoE's, B a gate for LoRA experts, C a library of
router losses.
- The weights 1e-4 (similarity; B: 1e-5) and 1e-2 (PLR), summed over layers, are those of A.
- The similarity loss follows A and C, which agree; C names it Eqs. 9-11 of the paper. The classic
  balance loss has weight 0 here.
- tau (Table 3: "learnable threshold") is a moving average in A (m = 0.95) and B (0.99, as here). A
  starts tau at 1, B at 0; either way tau needs many steps to move away. Here it starts at the first
  K-th score (our choice).
- The top-K ranks gates = G(logits), not logits (our inference). If it ranked logits, every G would
  select the same pairs, and the poor FID of the softmax in Table 1 would be hard to explain.
- The race runs inside one process and one micro-batch (our choice; A races over all processes, as
  pool=global does). The counts of the losses cover all processes.
- tau is one number per layer; per expert for route "bl", per position for "be" (our choice).
- Sampling uses the averaged weights (EMA). Their scores differ from those of the raw weights, so
  train.py measures a tau for them, on training batches, before it saves them. With the tau of the
  raw weights a token would get fewer experts.
- Exactly K pairs win in training: of pairs that equal the K-th score, only as many as fit (with
  pool=global, all of them win).
- Our choice too: logit-normal t, initial router biases of 0, the exact GELU in the router and its
  tanh form in the experts, size "S"."""

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
    dim: int = 384              # D. S: 384 (ours), B: 768, M: 960, L: 1024, XL: 1152    (Table 4)
    depth: int = 12             # N. S: 12,         B: 12,  M: 16,  L: 24,   XL: 28
    heads: int = 6              # H. S: 6,          B: 12,  M: 16,  L: 16,   XL: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t
    experts: int = 32           # E. "4-in-32" is k = 4, experts = 32, split = 4         (Table 4)
    k: int = 4                  # experts per token on average: 1, 2, 4 or 8             (Table 5)
    split: int = 4              # h = 4D/split. With split = k, k experts cost one dense MLP
    route: str = "race"         # race | token | expert | bl | be | le                   (Table 6)
    gate: str = "identity"      # identity | sigmoid | softmax                           (Table 1)
    momentum: float = 0.99      # m of tau, which remembers about 1 / (1 - m) steps  (code B)
    sim: float = 1e-4           # weight of the router similarity loss               (code A)
    plr: float = 1e-2           # weight of the per-layer regularization             (code A)
    balance: float = 0.0        # weight of the classic balance loss, the rival of sim   (Table 2)
    pool: str = "local"         # local | global: race inside a process or over all of them


TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4)
TINY = replace(TINY, experts=8, k=2, split=2)                                          # 2-in-8
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "M": dict(dim=960, depth=16, heads=16),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}

# Who competes with whom: ROUTES[route](scores) has one row for each group, (groups, pairs). Only
# pairs of one group compete: for "be", the B*E pairs at one position.           (Fig. 3, Table 6)
ROUTES = {"token": lambda s: s.flatten(0, 1),                                   # (B*L, E)   DiT-MoE
          "expert": lambda s: s.mT.flatten(0, 1),                               # (B*E, L)   EC-DiT
          "bl": lambda s: s.flatten(0, 1).mT,                                   # (E, B*L)   DiffMoE
          "be": lambda s: s.transpose(0, 1).flatten(1),                         # (L, B*E)
          "le": lambda s: s.flatten(1),                                         # (B, L*E)
          "race": lambda s: s.reshape(1, -1)}                                   # (1, B*L*E)
GATES = {"identity": lambda s: s, "sigmoid": torch.sigmoid, "softmax": lambda s: s.softmax(-1)}


def select(gates, k, route="race"):
    """The paper: one top-K, whoever competes with whom.   (Fig. 3, Table 6)

    gates (B, L, E) -> winners (groups * K,): the K best pairs of every group, as indices into
    gates.flatten(); kth_score (groups,). K = pairs * k / E, so that all routes spend k experts per
    token on average; K is rounded down, but it is at least 1."""
    groups = ROUTES[route](gates.detach())                                      # (groups, pairs)
    K = max(1, groups.shape[1] * k // gates.shape[2])                           # (d)
    score, place = groups.topk(K, dim=1, sorted=False)                          # (groups, K)  (d)
    return ROUTES[route](pair_index(gates)).gather(1, place).flatten(), score.amin(1)   # (d)


def select_by_threshold(gates, tau, route="race"):
    """Sampling: all pairs that reach tau (groups,), indices as from select(). What one image gets
    does not depend on the other images."""
    return ROUTES[route](pair_index(gates))[ROUTES[route](gates) >= tau[:, None]]  # (f)


def pair_index(gates):
    """The place of every pair in gates.flatten(), (B, L, E): token * E + expert."""
    return torch.arange(gates.numel(), device=gates.device).view(gates.shape)


def similarity_loss(logits, assigned):
    """Router similarity loss.   (Eqs. 9-11)

    logits, assigned (T, E), assigned is 0 or 1 -> scalar. The docstring above tells its extremes.
    W counts winners and is a constant: gradient flows through the softmax only. Its diagonal has
    mean 1; so has the rest, if some token won two. linear_fp32(a, b) is a b^T in float32."""
    (T, E), probs = logits.shape, logits.softmax(-1)                            # (g)
    shared = gather_processes(linear_fp32(assigned.mT, assigned.mT)[None]).sum(0)   # (E, E)  (h)
    load, both = shared.diagonal().diag(), shared.tril(-1) + shared.triu(1)     # i = j; i != j
    W = E * load / load.sum() + (E * E - E) * both / both.sum().clamp(min=1)    # (i)
    return (W * linear_fp32(probs.mT, probs.mT)).sum() / T                      # P' (g), L_sim (j)


def balance_loss(logits, assigned):
    """The classic rival of similarity_loss() (Table 2): 1 if loads are even, E / k if the same k
    experts win every token and the softmax agrees; still about 1 if the softmax is nearly flat."""
    load = gather_processes(assigned.sum(0, keepdim=True)).sum(0)               # (E,)
    return logits.shape[1] * (load / load.sum() * logits.softmax(-1).mean(0)).sum()


def experts_loop(experts, x, token, expert, gate):
    """What self.experts in MoE computes, written out; only tests call it.  x (T, D); token, expert,
    gate (R,), one entry for each pair -> (T, D). The engine below computes the same, faster."""
    y = torch.zeros_like(x)
    for e, (w1, b1, w2, b2) in enumerate(zip(experts.w1, experts.b1, experts.w2, experts.b2)):
        own = token[expert == e]                                                # (n,)
        y = y.index_add(0, own, gate[expert == e, None] * (gelu(x[own] @ w1 + b1) @ w2 + b2))  # (c)
    return y


class Router(nn.Module):
    """x (B, L, D) -> logits (B, L, E); in training also a prediction of the diffusion target,
    (B, L, P*P*C). Both read the hidden layer r, so per-layer regularization trains r (Fig. 12).
    In float32: bf16 scores tie, and up to 1 % more than K pairs would reach the K-th score."""

    full_precision = True                               # FSDP must not round these weights

    def __init__(self, cfg):
        super().__init__()
        self.hidden, self.score = nn.Linear(cfg.dim, cfg.dim), nn.Linear(cfg.dim, cfg.experts)
        self.target = nn.Linear(cfg.dim, cfg.patch**2 * cfg.channels)           # W_t, training only

    def forward(self, x):
        r = F.gelu(linear_fp32(x, self.hidden.weight, self.hidden.bias))        # (B, L, D)  (a)
        target = linear_fp32(r, self.target.weight, self.target.bias) if self.training else None
        return linear_fp32(r, self.score.weight, self.score.bias), target       # (b)


class MoE(nn.Module):
    """MoE(x) = sum of gates_e F_e(x) over the experts e that x won.  x (B, L, D) -> same, stats.

    stats: "map" (B, L) experts per token, "load" (E,) tokens per expert; in training also what the
    losses and tau need. tau is empty for the routes where images never compete."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.router = cfg, Router(cfg)
        self.experts = Experts(cfg.experts, cfg.dim, 4 * cfg.dim // cfg.split, "gelu")
        groups = {"race": 1, "bl": cfg.experts, "be": (cfg.size // cfg.patch) ** 2}
        self.register_buffer("tau", torch.full((groups.get(cfg.route, 0),), torch.nan))

    def forward(self, x):
        (logits, target), E = self.router(x), self.cfg.experts  # (B, L, E), (B, L, P*P*C) or None
        gates = GATES[self.cfg.gate](logits)                                    # (B, L, E)  (b)
        winners, kth_score = self.compete(gates)                                # (R,), (groups,)
        assigned = gates.new_zeros(gates.numel()).index_fill(0, winners, 1.0).view(-1, E)   # (T, E)
        stats = dict(map=assigned.sum(1).view(x.shape[:2]), load=assigned.sum(0))
        if self.training:
            stats |= dict(similarity=similarity_loss(logits.flatten(0, 1), assigned),
                          balance=balance_loss(logits.flatten(0, 1), assigned),
                          target_prediction=unpatchify(target, self.cfg),
                          kth_score_stat=kth_score[:len(self.tau)])
        y = self.experts(x.flatten(0, 1), winners // E, winners % E,
                         gates.flatten().index_select(0, winners))              # (T, D)  (c)
        return y.view(x.shape).to(x.dtype), stats

    def compete(self, gates):
        """Training: the top-K. Sampling, for the routes where images would compete: all pairs that
        reach tau, perhaps none. No pair reaches a tau of nan (an untrained model): then the top-K
        decides."""
        if not self.training and len(self.tau):
            winners = select_by_threshold(gates, self.tau.to(gates.dtype), self.cfg.route)  # (R,)
            if len(winners) or not self.tau.isnan().any():
                return winners, self.tau
        if self.cfg.pool == "global" and len(self.tau) and torch.distributed.is_initialized():
            tau = select(gather_processes(gates), self.cfg.k, self.cfg.route)[1]    # (groups,)
            return select_by_threshold(gates, tau, self.cfg.route), tau
        return select(gates, self.cfg.k, self.cfg.route)


class Block(nn.Module):
    """adaLN-Zero with the race in the MLP's place.  x (B, L, D), c (B, D) -> (B, L, D), stats."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.moe = MoE(cfg)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))      # (B, L, D)
        y, stats = self.moe(modulate(self.norm2(x), shift2, scale2))            # (B, L, D)
        return x + gate2 * y, stats


class RaceDiT(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: "map" (N, B, L) experts per
    token, "load" (N, E) tokens per expert. In training also "sim_loss" and "balance_loss", which
    train.py adds to the diffusion loss (with even use their values are sim * N and balance * N),
    "target_prediction" (N, B, C, S, S) for loss(), and "kth_score_stat" (N, groups)."""

    def __init__(self, cfg):
        super().__init__()
        check_config(cfg, route=ROUTES, gate=GATES, pool=("local", "global"), split=range(1, 65))
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)    # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)

    def forward(self, x, t, y):
        x, stats = self.x_embedder(x) + self.pos_embed, []                      # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        for block in self.blocks:
            x, own = block(x, c)                                                # (B, L, D)
            stats.append(own)
        aux = {key: torch.stack([s[key] for s in stats]) for key in stats[0]}   # (N, ...) each
        if self.training:
            aux["sim_loss"] = self.cfg.sim * aux.pop("similarity").sum()        # (l)
            aux["balance_loss"] = self.cfg.balance * aux.pop("balance").sum()
        return unpatchify(self.final_layer(x, c), self.cfg), aux                # (B, C or 2C, S, S)

    def update_buffers(self, aux):
        """tau <- m tau + (1 - m) v in every layer; the first v replaces nan. train.py calls this
        once per step, after backward(), because activation checkpointing and accumulation run
        forward() more often than that."""
        for tau, v in zip([block.moe.tau for block in self.blocks], aux["kth_score_stat"]):
            # tau is nan at first  (e)
            tau.copy_(torch.where(tau.isnan(), v, tau.lerp(v.to(tau), 1 - self.cfg.momentum)))


Model = RaceDiT                                         # the name that train.py looks for


def loss(diffusion, model, x0, y, step, rng):
    """What train.py minimises -> the mean diffusion loss, and aux with "plr_loss" added. PLR
    compares the prediction of every layer with the target that the final layer has, too: noise, v
    or velocity, by --path and --predict. There is no detach, so that it also trains the blocks
    below the router. step: for models that need it."""
    t, noise = diffusion.sample_times_and_noise(x0, rng)
    per_image, aux = diffusion.loss(model, x0, y, t, noise)
    error = (aux.pop("target_prediction").float() - diffusion.target(x0, noise, t)).square()  # (k)
    # summed over layers; DDP keeps the model in .module  (l)
    aux["plr_loss"] = getattr(model, "module", model).cfg.plr * error.flatten(1).mean(1).sum()
    return per_image.mean(), aux                                                # (l)


def cost(cfg):
    """Cost of one image: GMAC, 1e9 multiply-accumulates in matrix products (the papers call them
    Gflops), and the number of idle parameters: those that a token does not use (on average)."""
    L, D, E, h = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.experts, 4 * cfg.dim // cfg.split
    # qkvo; QK', AV; the router's two layers and k experts; adaLN
    block = 4 * L * D * D + 2 * L * L * D + L * (D * D + D * E + 2 * cfg.k * D * h) + 6 * D * D
    # the experts that a token does not use; W_t, used in training only
    idle = cfg.depth * ((E - cfg.k) * (2 * D * h + h + D) + (D + 1) * cfg.patch**2 * cfg.channels)
    return {"idle parameters": idle, "GMAC": (cfg.depth * block + plain_macs(cfg)) / 1e9}


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
