"""DiT: a transformer that denoises.   Peebles & Xie 2023, arXiv:2212.09748

This file is the control of the suite. Each of the four papers changes one thing in DiT, so each of
their files reads as a diff against this one.

1. Cut the noisy image into patches. Each patch becomes a token.
2. Embed the time and the class, and add the two embeddings: one vector c tells every block both.
3. Each block computes six vectors from c: shift, scale and gate for its attention, and the same
   three for its MLP ("adaLN").
4. All gates start at 0, so that a new block is the identity ("adaLN-Zero"). The output layer starts
   at 0, too: a new network predicts 0.
5. The final layer projects every token back to its patch: the predicted noise, or velocity.

    x (B, C, S, S) --patches--> x (B, L, D) --> N blocks --> final layer --> (B, C or 2C, S, S)
    t (B,), y (B,) -----------> c (B, D) ----------^---------------^

    a block:  x -+- norm, modulate - attention - *gate1 -(+)-+- norm, modulate - MLP - *gate2 -(+)-
                 +----------------------------------------+  +----------------------------------+

Equations of a block (DiT, Fig. 3); (a) and (b) mark the lines that compute them:
    x = x + gate1 * Attention(modulate(LN(x), shift1, scale1))                                   (a)
    x = x + gate2 * MLP(modulate(LN(x), shift2, scale2))                                         (b)
    modulate(x, shift, scale) = x (1 + scale) + shift

Letters: B batch, C channels, S side of the image, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, N depth.  Time: t = 0 is data, t = 1 is noise (see diffusion.py).
Read next: Block.forward, then DiT.forward.

Differences from the paper and from the official code (facebookresearch/DiT)
- The model only predicts. Guidance and losses are in diffusion.py, label dropping is in train.py.
- t is a float in [0, 1] and the network embeds time_scale * t. The official code feeds the integer
  step n of 0..999, which is 1000 * t here: the network sees the same numbers.
- learn_sigma is an option here; the official code always learns the variance. Rectified flow has no
  variance to learn.
- classes = 0 makes an unconditional model: the label table has one row, and y = 0.
- Parameter names and shapes are the official ones, so released weights load without a key map."""

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


TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}


class Block(nn.Module):
    """adaLN-Zero (DiT, Fig. 3).  x (B, L, D), c (B, D) -> (B, L, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(cfg.dim, 4 * cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))      # (B, L, D)  (a)
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))       # (B, L, D)  (b)
        return x


class DiT(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma; aux is an empty dict here."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)    # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed                                 # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                             # (B, D)
        for block in self.blocks:
            x = block(x, c)                                                     # (B, L, D)
        return unpatchify(self.final_layer(x, c), self.cfg), {}                 # (B, C or 2C, S, S)


Model = DiT                                             # the name that train.py looks for


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
