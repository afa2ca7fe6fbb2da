"""Race-DiT: every token of the batch races for every expert.   Yuan et al. 2025, arXiv:2503.16057

1. Replace every MLP by E small experts. A router scores every (token, expert) pair.
2. Keep the best B*L*k pairs of the WHOLE batch: a hard token may win many experts, an easy one
   none, so compute can go where noise level and picture need it. Nothing is normalised: the score
   itself is the expert's weight ("identity gating"), so that scores compare across tokens.
3. A picture to sample has no batch to race against. Training therefore remembers the score of the
   last winner as a running threshold tau, and sampling keeps every pair that reaches tau.
4. Router similarity loss: experts that win the same tokens are pushed to score tokens differently.
5. Per-layer regularization: each router also predicts the final target from its hidden layer, so
   that shallow layers learn something although deep ones write larger numbers.

    scores (one batch)          race: the best B*L*k of all    token choice: the best k of each row
           e1  e2  e3
    t1    [.9  .1  .7]          [x  .  x]   2 experts          [x  .  .]
    t2    [.3  .2  .1]          [.  .  .]   0 experts          [x  .  .]        (here k = 1)
    t3    [.2  .8  .4]          [.  x  .]   1 expert           [.  x  .]
                                        tau = .7, the last winner's score

Letters: B batch, C channels, S side of the picture, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, N depth, E experts, k experts per token on average, h width of an expert, T = B*L tokens.
Time: t = 0 is data, t = 1 is noise (diffusion.py says more).
Read next: select(), then MoE.forward().  Everything below the ruler is plain DiT.

Differences from the paper. No official code or weights were released, and some constants are not
known to us; what we had to choose is marked "ours".
- tau is an EMA of the last winner's score, per layer, momentum 0.99 (ours; re-implementations use
  0.95 and 0.99). It starts at the first batch's value, not at 0 or 1: no warm-up bias (ours).
- Loss weights 1e-4 (similarity), 1e-2 (per layer), summed over layers, as in a re-implementation.
- Selection works on the gate G(S), not on the raw scores S: only then can softmax change who wins a
  race, as Table 1 shows it does. The similarity loss always looks at softmax(S).
- The race is run among the tokens of one process. pool=global races over all processes (ours).
- Averaged weights (EMA) have a tau of their own, learned on training batches before they are saved
  (train.settle): with the tau of the weights in training, a token gets about 6 % fewer experts.
- Ties cannot win twice: training keeps exactly K pairs by index, in float32 (ours)."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    size: int = 32              # S, side of the picture or latent (ImageNet 256x256: 32)
    patch: int = 2              # P: 2, 4 or 8
    channels: int = 4           # C: 4 for Stable Diffusion's latents, 1 for digits
    classes: int = 1000         # y = classes means "no class"
    dim: int = 768              # D. B: 768, M: 960, L: 1024, XL: 1152                   (Table 4)
    depth: int = 12             # N. B: 12,  M: 16,  L: 24,   XL: 28
    heads: int = 12             # H. B: 12,  M: 16,  L: 16,   XL: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t
    experts: int = 32           # E. "4-in-32" is k = 4, experts = 32, split = 4         (Table 4)
    k: int = 4                  # experts per token, on average. Table 5: 1, 2, 4, 8 ...
    split: int = 4              # ... with split = k: an expert is h = 4D / split wide, so that k of
                                # them cost what the dense MLP costs
    route: str = "race"         # race | token | expert | bl | be | le                   (Table 6)
    gate: str = "identity"      # identity | sigmoid | softmax                           (Table 1)
    momentum: float = 0.99      # of tau; its memory is about 1 / (1 - momentum) steps
    sim: float = 1e-4           # weight of the router similarity loss                   (Table 3)
    plr: float = 1e-2           # weight of the per-layer regularization                 (Table 3)
    balance: float = 0.0        # weight of the classic balance loss, sim's rival        (Table 2)
    pool: str = "local"         # local | global: race within a process or over all of them


TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4,
              experts=8, k=2, split=2)                                                 # 2-in-8
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "M": dict(dim=960, depth=16, heads=16), "L": dict(dim=1024, depth=24, heads=16),
         "XL": dict(dim=1152, depth=28, heads=16)}          # S is not in the paper

# Who competes with whom: the order of the axes (0 batch, 1 token, 2 expert), and how many of the
# first axes separate one contest from the next. The axes that remain compete with each other.
ROUTES = {"token": ((0, 1, 2), 2),      # contests: B*L, among E        DiT-MoE
          "expert": ((0, 2, 1), 2),     # contests: B*E, among L        EC-DiT
          "bl": ((2, 0, 1), 1),         # contests: E,   among B*L      DiffMoE in training
          "be": ((1, 0, 2), 1),         # contests: L,   among B*E
          "le": ((0, 1, 2), 1),         # contests: B,   among L*E
          "race": ((0, 1, 2), 0)}       # contests: 1,   among B*L*E    this paper
CROSSING = ("race", "bl", "be")         # pictures compete with each other: sampling needs tau
GATES = {"identity": lambda S: S, "sigmoid": torch.sigmoid, "softmax": lambda S: S.softmax(-1)}


def contests(scores, route):
    """scores (B, L, E) -> one row per contest (D_A, D_B): D_A contests among D_B pairs each."""
    axes, rows = ROUTES[route]
    scores = scores.permute(axes)
    return scores.reshape(math.prod(scores.shape[:rows]), -1)


def select(gates, k, route="race"):
    """The paper: ONE top-K, whatever the axes.   (Fig. 3, Table 6)

    gates (B, L, E) -> winners: the K best pairs of every contest as indices into gates.flatten(),
    (D_A * K,); last: the score of each contest's last winner, (D_A,). K = D_B * k / E: every route
    spends k experts per token on average (rounded down where E does not divide, but at least 1)."""
    rows = contests(gates, route)                                               # (D_A, D_B)
    K = max(1, rows.shape[1] * k // gates.shape[2])
    score, column = rows.topk(K, dim=1)                                         # (D_A, K)
    return contests(pairs(gates), route).gather(1, column).flatten(), score[:, -1]


def reach(gates, tau, route="race"):
    """The same when sampling: all pairs that reach tau (D_A,). No picture looks at another."""
    return contests(pairs(gates), route)[contests(gates, route) >= tau[:, None]]


def pairs(gates):
    """The index of every (token, expert) pair, (B, L, E)."""
    return torch.arange(gates.numel(), device=gates.device).view(gates.shape)


def select_global(gates, k, route):
    """select() among the pairs of all processes -> those winners that are mine, and last."""
    everyone = gates.new_empty(dist.get_world_size() * len(gates), *gates.shape[1:])
    dist.all_gather_into_tensor(everyone, gates.detach().contiguous())          # (W*B, L, E)
    winners, last = select(everyone, k, route)
    mine = winners // gates.numel() == dist.get_rank()
    return winners[mine] % gates.numel(), last


def similarity_loss(logits, won):
    """Router similarity loss.   (Eqs. 9-11)

    logits, won (T, E), won is 0 or 1 -> scalar. 1 when tokens are spread evenly over experts and
    over pairs of experts, or when all logits are equal; more when experts that win the same tokens
    also score them alike. Counts are constants: gradient flows through the softmax only."""
    T, E = logits.shape
    P = logits.softmax(-1)
    alike, shared = P.mT @ P, won.mT @ won                                      # P', M' (E, E)
    if dist.is_initialized():
        dist.all_reduce(shared)                                              # count the whole batch
    own = shared.diagonal().diag()
    both = shared - own
    W = E * own / own.sum() + (E * E - E) * both / both.sum().clamp(min=1)      # both parts: mean 1
    return (W * alike).sum() / T


def balance_loss(logits, won):
    """The classic rival: 1 when loads are even, E when one expert scores and wins everything."""
    load = won.sum(0)
    if dist.is_initialized():
        dist.all_reduce(load)
    return logits.shape[1] * (load / load.sum() * logits.softmax(-1).mean(0)).sum()


class Router(nn.Module):
    """u (B, L, D) -> scores S (B, L, E), and in training a guess of the target (B, L, P*P*C).

    Both read one hidden layer r: this is how per-layer regularization teaches it (Fig. 12). Always
    in float32: in bf16 many pairs would tie with the last winner."""

    def __init__(self, cfg):
        super().__init__()
        self.hidden = nn.Linear(cfg.dim, cfg.dim)                               # W_1
        self.score = nn.Linear(cfg.dim, cfg.experts)                            # W_g
        self.target = nn.Linear(cfg.dim, cfg.patch**2 * cfg.channels)           # W_t, training only

    full_precision = True                   # sharded training must not round these weights

    def forward(self, u):
        def linear(layer, x):
            return F.linear(x, layer.weight.float(), layer.bias.float())
        r = F.gelu(linear(self.hidden, u.float()))                              # (B, L, D)
        return linear(self.score, r), linear(self.target, r) if self.training else None


class Experts(nn.Module):
    """E MLPs, D -> h -> D.  x (R, D), rows sorted by expert -> (R, D).

    Expert e owns rows ends[e-1]:ends[e], possibly none; owner (R,) names the expert of a row."""

    def __init__(self, cfg):
        super().__init__()
        E, D, h = cfg.experts, cfg.dim, 4 * cfg.dim // cfg.split
        self.w1, self.b1 = nn.Parameter(torch.empty(E, D, h)), nn.Parameter(torch.zeros(E, h))
        self.w2, self.b2 = nn.Parameter(torch.empty(E, h, D)), nn.Parameter(torch.zeros(E, D))
        for w in (*self.w1, *self.w2):              # one by one: a 3-D stack has other fans
            nn.init.xavier_uniform_(w)

    def forward(self, x, ends, owner):
        w1, b1, w2, b2 = (w.to(amp_dtype(x)) for w in (self.w1, self.b1, self.w2, self.b2))
        x = x.to(w1.dtype)
        if x.dtype == torch.bfloat16 and x.device.type != "cpu":               # all experts at once
            z = F.grouped_mm(x, w1, offs=ends) + b1.index_select(0, owner)      # (R, h)
            z = F.gelu(z, approximate="tanh")
            return F.grouped_mm(z, w2, offs=ends) + b2.index_select(0, owner)   # (R, D)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()                  # one after the other
        experts = zip(x.split(sizes), w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind())
        return torch.cat([self.one(*expert) for expert in experts])

    def one(self, x, w1, b1, w2, b2):
        """x (n, D) -> (n, D). A CPU builds a bf16 product anew for every number of rows it has not
        seen: rounding n up makes numbers recur, and a training step 1.5 times as fast."""
        even = x.dtype == torch.bfloat16                    # padding by nothing would copy x
        z = F.pad(x, (0, 0, 0, -len(x) % 32)) if even else x
        z = torch.addmm(b2, F.gelu(torch.addmm(b1, z, w1), approximate="tanh"), w2)
        return z[: len(x)] if even else z


class MoE(nn.Module):
    """MoE(u): sum over the experts e that token u won of Z_e F_e(u).  (B, L, D) -> the same, notes.

    M (T, E) says who won, Z is the gate, R pairs won in all. notes: "map" (B, L) experts per token,
    "load" (E,) tokens per expert; in training also what the losses and tau learn from."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.router, self.experts = Router(cfg), Experts(cfg)
        rows = {"race": 1, "bl": cfg.experts, "be": (cfg.size // cfg.patch) ** 2}.get(cfg.route, 0)
        self.register_buffer("tau", torch.full((rows,), torch.nan))   # (D_A,); nan: before training

    def forward(self, u):
        (B, L, D), E, T = u.shape, self.cfg.experts, u.shape[0] * u.shape[1]
        with no_autocast(u):
            S, guess = self.router(u)                                           # (B, L, E)
            Z = GATES[self.cfg.gate](S)
            winners, last = self.contest(Z)                                     # (R,), (D_A,)
            M = torch.zeros_like(S).flatten().index_fill(0, winners, 1.0).view(T, E)
            notes = dict(map=M.sum(1).view(B, L), load=M.sum(0))
            if self.training:
                notes |= dict(similarity=similarity_loss(S.view(T, E), M), guess=guess,
                              balance=balance_loss(S.view(T, E), M), last_stat=last[:len(self.tau)])
        order = (winners % E * T + winners // E).sort().values                  # (R,) by expert
        owner, token = order // T, order % T
        x = self.experts(u.reshape(T, D).index_select(0, token), M.sum(0).cumsum(0).int(), owner)
        x = x.float() * Z.flatten().index_select(0, token * E + owner)[:, None]             # (R, D)
        return x.new_zeros(T, D).index_add(0, token, x).view(B, L, D).to(u.dtype), notes

    def contest(self, Z):
        """Training: the top-K. Sampling: tau, where pictures of a batch would otherwise compete."""
        if not self.training and self.cfg.route in CROSSING and not self.tau.isnan().any():
            return reach(Z, self.tau.to(Z.dtype), self.cfg.route), self.tau
        if self.cfg.pool == "global" and dist.is_initialized():
            return select_global(Z, self.cfg.k, self.cfg.route)
        return select(Z, self.cfg.k, self.cfg.route)


class Block(nn.Module):
    """adaLN-Zero with the race in the MLP's place.  x (B, L, D), c (B, D) -> (B, L, D), notes."""

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
        y, notes = self.moe(modulate(self.norm2(x), shift2, scale2))            # (B, L, D)
        return x + gate2 * y, notes


class RaceDiT(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: "map" (N, B, L) experts per
    token, "load" (N, E) tokens per expert; in training also "sim_loss", "balance_loss", "last_stat"
    (N, D_A) for update_buffers() and "guess" (N, B, C, S, S) for loss()."""

    def __init__(self, cfg):
        super().__init__()
        if (cfg.route not in ROUTES or cfg.gate not in GATES or cfg.pool not in ("local", "global")
                or not 1 <= cfg.k <= cfg.experts or not 1 <= cfg.split <= 4 * cfg.dim):
            raise ValueError(f"route {cfg.route!r}, gate {cfg.gate!r}, pool {cfg.pool!r}, k "
                             f"{cfg.k}, split {cfg.split}: route is one of {', '.join(ROUTES)}; "
                             f"gate of {', '.join(GATES)}; pool of local, global; k in 1..experts; "
                             "split in 1..4D")
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)      # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)

    def forward(self, x, t, y):
        x, notes = self.x_embedder(x) + self.pos_embed, []                      # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        for block in self.blocks:
            x, note = block(x, c)                                               # (B, L, D)
            notes.append(note)
        aux = {key: torch.stack([note[key] for note in notes]) for key in notes[0]}
        if self.training:
            aux["sim_loss"] = self.cfg.sim * aux.pop("similarity").sum()        # even: sim * N
            aux["balance_loss"] = self.cfg.balance * aux.pop("balance").sum()   # even: balance * N
            aux["guess"] = torch.stack([unpatchify(g, self.cfg) for g in aux["guess"]])
        return unpatchify(self.final_layer(x, c), self.cfg), aux                # (B, C or 2C, S, S)

    @torch.no_grad()
    def update_buffers(self, aux):
        """tau <- m tau + (1 - m) last: once per training step, after backward(), never in
        forward(), which activation checkpointing and accumulation run more than once."""
        for block, last in zip(self.blocks, aux["last_stat"]):
            tau = block.moe.tau
            tau.copy_(torch.where(tau.isnan(), last, tau.lerp(last.to(tau), 1 - self.cfg.momentum)))


Model = RaceDiT                                         # the name train.py and sample.py ask for


def loss(path, model, x0, y, step, draw):
    """Training: the diffusion loss, and per-layer regularization, which needs the target.

    Every layer's guess is held to what the last layer must predict; there is no detach."""
    t, noise = path.draw(x0, draw)
    per_picture, aux = path.loss(model, x0, y, t, noise)
    error = (aux.pop("guess").float() - path.target(x0, noise)).square()        # (N, B, C, S, S)
    cfg = getattr(model, "module", model).cfg                                  # inside DDP: .module
    aux["plr_loss"] = cfg.plr * error.flatten(1).mean(1).sum()                  # sum over layers
    return per_picture.mean(), aux


def cost(cfg):
    """Of one picture: 1e9 multiply-accumulates in matrix products (what the papers call Gflops),
    and how many parameters a token does not use (it has k of E experts, on average)."""
    L, D, E, h = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.experts, 4 * cfg.dim // cfg.split
    moe = L * (D * D + D * E + cfg.k * 2 * D * h)                               # router, k experts
    block = 4 * L * D * D + 2 * L * L * D + moe + 6 * D * D                   # qkvo; QK', AV; adaLN
    head = D * cfg.patch**2 * cfg.channels + cfg.patch**2 * cfg.channels        # W_t: training only
    return {"idle parameters": cfg.depth * ((E - cfg.k) * (2 * D * h + h + D) + head),
            "GMAC": (cfg.depth * block + plain_macs(cfg)) / 1e9}


def amp_dtype(x):
    """What autocast would give a matrix product on x; the meta device knows no autocast."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def no_autocast(x):
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


# ------------------------------------------------------ plain DiT parts, the same in every file
# ------------------------------------------------- (tests/test_shared.py fails when they drift)


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
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":    # the fused kernel's backward is
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v     # 3 to 8 x slower than this
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)          # (B, L, 3, H, D/H)
        x = attend(*qkv.permute(2, 0, 3, 1, 4))                                     # (B, H, L, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))                        # (B, L, D)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PatchEmbed(nn.Module):
    """A picture's patches as tokens, row by row.  (B, C, S, S) -> (B, L, D)."""

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
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)                  # (B, 256)
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
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)           # 2 x (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x, cfg):
    """(B, L, P*P*C) -> (B, C, S, S). Inside a patch: row, column, channel (channel fastest)."""
    n, P = cfg.size // cfg.patch, cfg.patch
    x = x.reshape(len(x), n, n, P, P, -1)                                     # (B, n, n, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, cfg.size, cfg.size)      # (B, C, S, S)


def sincos_2d(cfg):
    """Fixed position embedding (1, L, D): first half of D tells the column, second half the row."""
    n = cfg.size // cfg.patch
    omega = 10000 ** -(torch.arange(cfg.dim // 4, dtype=torch.float64) / (cfg.dim // 4))    # (D/4,)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * omega             # (n, D/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                       # (n, D/2)
    column, row = wave.repeat(n, 1), wave.repeat_interleave(n, dim=0)         # (L, D/2)
    return torch.cat([column, row], dim=1)[None].float()


def initialize(model):
    """DiT's start: Xavier for linears, N(0, 0.02) for embeddings, zeros where a block ends."""
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
        nn.init.zeros_(m.weight)                        # gates and output 0: the network starts as
        nn.init.zeros_(m.bias)                          # the identity and predicts 0


def plain_macs(cfg):
    """Multiply-accumulates of everything around the blocks: patches, time MLP, final layer."""
    L, D, pixels = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.patch**2 * cfg.channels
    return L * D * pixels * (2 + cfg.learn_sigma) + (256 + D) * D + 2 * D * D
