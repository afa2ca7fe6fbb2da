"""DTR, Denoising Task Routing.   Park et al. 2024 (ICLR), arXiv:2310.07138

Question: one network denoises at a thousand noise levels. The paper calls them a thousand tasks
that share all weights, and argues that they disturb each other. Can tasks read different channels
without a new parameter? (adaLN already scales channels by t, but lets every task read all.)

1. Each task reads a window of the channels (its open channels); all blocks see the others (the
   closed ones) as 0. Every window has the same width, a share beta of D.
2. From data to noise the window slides from the first channels to the last. Neighbouring tasks read
   nearly the same channels, because neighbouring noise levels are similar ("task affinity").
3. The start of the window grows as t^alpha. With alpha = 4 it hardly moves near the data and moves
   fast near the noise: noisy tasks share fewer channels with their neighbours (the paper's "task
   weights": more channels that the neighbours do not read).
4. The mask limits what a block READS. The residual stream x itself is not masked, and what a block
   WRITES is added to all channels, to the closed ones, too, so that other tasks can read it.
5. DTR adds no parameter and no loss, and hardly any time. With beta = 1 it is DiT.

    channels ->         alpha = 1         alpha = 4         random routing ("R-TR", the control)
    t = 0     data      ########....      ########....      #.##.##.##.#
              |         .########...      ########....      ##.#.#.####.
              |         ..########..      ########....      .###.#####..
              |         ...########.      .########...      #.#.####.##.
    t = 1     noise     ....########      ....########      ###..#.##.##       (here beta = 2/3)

Equations, for task n of 0..T-1 (0: least noise), width D and W = floor(beta D) open channels. The
last task, T - 1, reads up to the last channel. (a), (b), ... mark the lines that compute them:
    n = round(t T), at most T - 1                                                                (a)
    start_n = round((D - W) (n / (T - 1))^alpha)                                                 (b)
    mask_n[c] = 1 if start_n <= c < start_n + W                                                  (c)
    u = x * mask_n                              the block reads u                                (d)
    a = gate1 * Attention(modulate(LN(u)))                                                       (e)
    b = gate2 * MLP(modulate(LN(u + a)))        in closed channels u + a is "a" alone            (f)
    out = x + a + b                             = x + (DiT's block(u) - u)                       (g)
LN averages over all D channels, zeros included; it enlarges the open ones by about 1 / sqrt(beta),
so no rescaling as in dropout is needed. After LN and shift a closed channel is no longer 0, but
nothing of its x is in it; for the MLP it holds the output of the attention. Patch embedding, final
layer and c are not masked. The loss is the diffusion's own; diffusion.py has the
loss weightings that the paper combines DTR with (Min-SNR, P2, ANT-UW).

Example: D = 384, beta = 0.8, alpha = 4, T = 1000. W = 307, and the window starts at channel 0, 0,
5, 51, 77 for t = 0, .25, .5, .9, 1. There are 78 different windows for the 1000 tasks; the first
284 tasks (t <= 0.283) share the first one, and 230 channels (2 beta - 1 = 60 %) are read by every
task.

The paper's result, FID (lower is better) of L/2 on ImageNet, guidance 1.5: DiT 12.59, DiT with
random routing 16.18, DiT with DTR 8.90. (In the authors' follow-up, Switch-DiT, DTR makes XL/2
worse: 9.40 to 10.85.) What we found with --tiny (cosine, v predicted, three seeds; claims T1, T2,
T6, T8 in experiments/README.md): random routing (per_block) is worse than none, as in the paper
(18.5 % more loss). We saw no difference between DTR and DiT, neither in loss (0.4 ± 1.1 % more) nor
in the similarity of noise levels (CKA). alpha from 1 to 8 changes nothing; beta = 0.6 costs 4.8 %.

Letters: B batch, C channels of the image, S its side, P side of a patch, L = (S/P)^2 tokens,
D width, H heads, N depth, T tasks.  Time: t = 0 is data, t = 1 is noise (see diffusion.py).
Read next: window_starts, then Block.forward.

Differences from the paper and from the official code (byeongjun-park/DTR)
- The window rule is the official code's. In the paper (tasks m = 1..T) a window begins at channel
  round((D-W) ((m-1)/T)^alpha) and ends before round((D-W) (m/T)^alpha) + W. With T = 1000 some
  windows are a channel wider, and some begin a channel earlier.
- A time takes the nearest task, and t = 1 takes the last one. DDPM's step n is t = n/1000: with T =
  1000 it is task n. Rectified flow is not in the paper; its t is rounded for the mask only.
- As in the official code, samplers that skip steps pass the original step n. The index of a 25-step
  loop (0 to 24) would select the first window at every step.
- We keep T window starts and compare channel numbers with them. The official code keeps a (T, D)
  float table in each of its N blocks (together 129 MB for XL). Its output x*mask + a + b + x*(1 -
  mask) is our x + a + b.
- Random masks are drawn from route_seed and not stored, and all blocks share them unless per_block.
  The official ones differ by block, have no seed and are stored in the checkpoint;
  common/official.py loads them as route "given", which stores its masks.
- alpha and beta are options with the official values 4 and 0.8 as defaults. The official config has
  the cosine schedule, as has --tiny; for paper sizes ours is linear unless --schedule cosine."""

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
    dim: int = 384              # D. S: 384, B: 768, L: 1024, XL: 1152           (DiT, Table 1)
    depth: int = 12             # N. S: 12,  B: 12,  L: 24,   XL: 28
    heads: int = 6              # H. S: 6,   B: 12,  L: 16,   XL: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t
    alpha: float = 4.0          # 1: the window moves evenly with t; above 1: fast near the noise
    beta: float = 0.8           # share of the channels that a task reads; 1 is DiT
    tasks: int = 1000           # T, number of noise levels that are told apart
    route: str = "window"       # window | random (the control) | given (masks of a checkpoint)
    route_seed: int = 0         # random: two models with the same seed have the same masks
    per_block: bool = False     # random: each block has its own masks (official code)


TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}


def window_starts(cfg):
    """The first channel that each task reads, (T,) int. It reads W = int(beta D) channels. A single
    task (T = 1) reads the first W."""
    noise_level = torch.linspace(0, 1, cfg.tasks, dtype=torch.float64)          # (T,)  n / (T - 1)
    return ((cfg.dim - int(cfg.beta * cfg.dim)) * noise_level**cfg.alpha).round().int()  # (T,)  (b)


def random_masks(cfg):
    """The control: each task reads W random channels.  -> (1 or N, T, D) bool"""
    g = torch.Generator("cpu").manual_seed(cfg.route_seed)      # the same masks on every process
    order = torch.rand(cfg.depth if cfg.per_block else 1, cfg.tasks, cfg.dim, generator=g,
                       device="cpu").argsort(-1)        # each row is a permutation of 0..D-1
    return (order < int(cfg.beta * cfg.dim)).to(torch.get_default_device())     # perhaps "meta"


def task_masks(cfg, table, task):
    """Tasks (B,) -> their masks (1 or N, B, 1, D) bool; 1 if all N blocks share them."""
    if cfg.route != "window":
        return table[:, task, None]
    start, channel = table[task, None], torch.arange(cfg.dim, device=task.device)
    return ((start <= channel) & (channel < start + int(cfg.beta * cfg.dim)))[None, :, None]  # (c)


class Block(nn.Module):
    """adaLN-Zero (DiT, Fig. 3) that reads x * mask.  x (B, L, D), c (B, D) -> (B, L, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(cfg.dim, 4 * cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c, mask):
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        u = x * mask                                                            # (B, L, D)  (d)
        a = gate1 * self.attn(modulate(self.norm1(u), shift1, scale1))          # (B, L, D)  (e)
        b = gate2 * self.mlp(modulate(self.norm2(u + a), shift2, scale2))       # (B, L, D)  (f)
        return x + a + b                        # = x + DiT's block(u) - u: into all channels  (g)


class DTR(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma; aux is an empty dict here."""

    def __init__(self, cfg):
        super().__init__()
        if not (cfg.route in ("window", "random", "given") and cfg.alpha > 0
                and 1 <= cfg.beta * cfg.dim <= cfg.dim and 0 < cfg.tasks <= 10_000):
            raise ValueError("route window, random, given; alpha > 0; beta 1/D to 1; tasks to 1e4")
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)    # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        # For "given" the random masks stand in until a checkpoint's are loaded.
        table = window_starts(cfg) if cfg.route == "window" else random_masks(cfg)
        self.register_buffer("table", table, persistent=cfg.route == "given")
        initialize(self)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed                                 # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        task = (t.float() * self.cfg.tasks).round().long().clamp(0, self.cfg.tasks - 1)  # (B,)  (a)
        masks = task_masks(self.cfg, self.table, task).to(x.dtype)              # (1|N, B, 1, D)
        for block, mask in zip(self.blocks, masks.expand(self.cfg.depth, -1, -1, -1)):
            x = block(x, c, mask)                                               # (B, L, D)
        return unpatchify(self.final_layer(x, c), self.cfg), {}                 # (B, C or 2C, S, S)


Model = DTR                                             # the name that train.py looks for


def cost(cfg):
    """Cost of one image: GMAC, 1e9 multiply-accumulates in matrix products (the papers call them
    Gflops), and the number of idle parameters: those that a token does not use."""
    L, D = (cfg.size // cfg.patch) ** 2, cfg.dim
    block = 4 * L * D * D + 2 * L * L * D + 8 * L * D * D + 6 * D * D   # qkvo; QK', AV; MLP; adaLN
    return {"idle parameters": 0, "GMAC": (cfg.depth * block + plain_macs(cfg)) / 1e9}


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
