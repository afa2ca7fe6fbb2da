"""DTR: every noise level reads its own channels.   Park et al. 2024, arXiv:2310.07138

One network denoises at a thousand noise levels: a thousand tasks that share all weights, and get in
each other's way. Task routing withholds some channels from each task; DTR says which.

1. A task reads a window of the channels: a share beta of them, the same number for every task.
2. The window slides from the first channels (data) to the last (noise), so neighbouring tasks read
   nearly the same ones ("task affinity").
3. It slides as t^alpha, slowly near data and fast near noise: the noisier a task, the more its
   window is its own ("task weights").
4. The mask gates what a block READS; what it WRITES goes to all channels. LayerNorm counts the
   zeros, and every weight serves every task: what is withheld is information, not parameters.
5. No new parameter, no new loss, about 1 % more time. beta = 1 is DiT.

    channels ->         alpha = 1         alpha = 4         random ("R-TR")
    t = 0     data      ########....      ########....      #.##.##.##.#
              |         .########...      ########....      ##.#.#.####.
              |         ..########..      ########....      .###.#####..
              |         ...########.      .########...      #.#.####.##.
    t = 1     noise     ....########      ....########      ###..#.##.##

    a block:  x -+-----------------------------------------(+)----------------------------------(+)-
                 |                                          | a                                  | b
                 +- *mask -+- norm, modulate - attn *gate1 -+-(+)- norm, modulate - MLP - *gate2 +
                           +----------------------------------+

Letters: B batch, C channels, S side of the picture, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, N depth, T tasks.  Time: t = 0 is data, t = 1 is noise (diffusion.py says more).
Read next: task_table, then Block.forward.
`python dtr.py` draws the masks; `python dtr.py CKPT ...` compares what blocks do across times.

Differences from the paper and from byeongjun-park/DTR
- The mask rule is the official code's: t/(T-1), both ends included, all windows of one width. The
  paper's equation rounds (t-1)/T and t/T, which makes some of its windows a channel wider.
- A time between two tasks takes the nearest. DDPM's step n is t = n/1000, so with T = 1000 it meets
  its own row; rectified flow has a row for every 0.001. Samplers that skip steps pass the original
  step: the index of their loop would hardly move the window.
- We keep T window starts and compare. The official code keeps a (T, D) float table in every block
  (129 MB for XL), and computes x*mask + a + b + x*(1 - mask), which is x + a + b.
- Random masks are drawn again from route_seed, never stored; the official ones have no seed and
  live in the checkpoint. from_official keeps them as route "given", which does store its masks.
- alpha is a choice (the official code always uses 4). Loss weightings are in diffusion.py.
- A whole sampling step shares t, hence its window. The query, key and value products could then
  skip unread channels, exactly, if LayerNorm's shift of them is added back. That saves 4 to 5 % of
  all multiply-accumulates and needs a second attention for sampling: left out."""

import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    size: int = 32              # S, side of the picture or latent (ImageNet 256x256: 32)
    patch: int = 2              # P: 2, 4 or 8
    channels: int = 4           # C: 4 for Stable Diffusion's latents, 1 for digits
    classes: int = 1000         # y = classes means "no class"
    dim: int = 384              # D. S: 384, B: 768, L: 1024, XL: 1152           (DiT, Table 1)
    depth: int = 12             # N. S: 12,  B: 12,  L: 24,   XL: 28
    heads: int = 6              # H. S: 6,   B: 12,  L: 16,   XL: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t
    alpha: float = 4.0          # the window speeds up towards noise; 1: keeps pace; below 1: slows
    beta: float = 0.8           # share of the channels that a task reads: 1 is DiT
    tasks: int = 1000           # T, noise levels with a mask of their own
    route: str = "window"       # window | random (R-TR, the ablation) | given (random, and stored)
    route_seed: int = 0         # random: two models of one seed have the same masks
    per_block: bool = False     # random: other masks in every block, as the authors


TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}


def task_table(cfg):
    """Who reads what: the first channel of every window (T,), or masks (1 or N, T, D) bool."""
    if cfg.route not in ("window", "random", "given") or not (
            1 <= cfg.beta * cfg.dim <= cfg.dim and cfg.alpha > 0 and 0 < cfg.tasks <= 10_000):
        raise ValueError(f"route {cfg.route}: window, random, given; beta {cfg.beta}: 1/dim to 1; "
                         f"alpha {cfg.alpha}: above 0; tasks {cfg.tasks}: 1 to 10,000")
    read = int(cfg.beta * cfg.dim)                              # C_beta, channels that a task reads
    if cfg.route == "window":
        noise = torch.linspace(0, 1, cfg.tasks, dtype=torch.float64)            # t / (T - 1)
        return ((cfg.dim - read) * noise**cfg.alpha).round().int()              # (T,)  mask rule
    g = torch.Generator("cpu").manual_seed(cfg.route_seed)      # the same masks on every process
    masks = [torch.rand(cfg.tasks, cfg.dim, generator=g, device="cpu").argsort(-1) < read
             for _ in range(cfg.depth if cfg.per_block else 1)]                 # (T, D) each
    return torch.stack(masks).to(torch.get_default_device())                    # (1 or N, T, D)


def task_masks(cfg, table, task):
    """What tasks (B,) read -> (1 or N, B, D) bool; 1 when all blocks have the same masks."""
    if cfg.route != "window":
        return table[:, task]
    start, channel = table[task, None], torch.arange(cfg.dim, device=task.device)
    return ((start <= channel) & (channel < start + int(cfg.beta * cfg.dim)))[None]


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
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                    # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        u = x * mask                                                                # (B, L, D)
        a = gate1 * self.attn(modulate(self.norm1(u), shift1, scale1))              # (B, L, D)
        b = gate2 * self.mlp(modulate(self.norm2(u + a), shift2, scale2))           # (B, L, D)
        return x + a + b                        # = x + DiT's block(u) - u: written to all channels


class DTR(nn.Module):
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
        self.register_buffer("table", task_table(cfg), persistent=cfg.route == "given")
        initialize(self)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed                                     # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                                 # (B, D)
        task = (t.float() * self.cfg.tasks).round().long().clamp(0, self.cfg.tasks - 1)     # (B,)
        masks = task_masks(self.cfg, self.table, task)[:, :, None].to(x.dtype)      # (1|N, B, 1, D)
        for block, mask in zip(self.blocks, masks.expand(self.cfg.depth, -1, -1, -1)):
            x = block(x, c, mask)                                                   # (B, L, D)
        return unpatchify(self.final_layer(x, c), self.cfg), {}               # (B, C or 2C, S, S)


Model = DTR                                             # the name train.py and sample.py ask for


def from_official(state, heads=None, **overrides):
    """DTR from a byeongjun-park/DTR state dict, or from DiT's. heads cannot be read from shapes.

    The masks in the file are what its weights were trained with: when they are not the windows of
    alpha and beta (4, 0.8 unless overridden), the model keeps them as route "given"."""
    state, fields = read_official(state, heads)
    cfg = replace(Config(), **(fields | overrides))
    masks = {int(k.split(".")[1]): state.pop(k) for k in [*state] if k.endswith("._unit_mapping")}
    if masks:
        masks = torch.stack([masks[i] for i in range(cfg.depth)]).bool()            # (N, T, D)
        cfg = replace(cfg, tasks=masks.shape[1])
        if not (masks == task_masks(cfg, task_table(cfg), torch.arange(cfg.tasks))).all():
            cfg, state["table"] = replace(cfg, route="given", per_block=True), masks
    model = DTR(cfg)
    model.load_state_dict(state)
    return model


def cost(cfg):
    """Of one picture: 1e9 multiply-accumulates in matrix products (what the papers call Gflops),
    and how many parameters a token does not use. Both are DiT's: a mask is no matrix."""
    L, D = (cfg.size // cfg.patch) ** 2, cfg.dim
    block = 4 * L * D * D + 2 * L * L * D + 8 * L * D * D + 6 * D * D   # qkvo; QK', AV; MLP; adaLN
    return {"idle parameters": 0, "GMAC": (cfg.depth * block + plain_macs(cfg)) / 1e9}


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


def read_official(state, heads):
    """A released checkpoint -> its bare state dict, and the Config fields that shapes tell."""
    for wrapper in ("ema", "model", "module", "state_dict"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    state = {k.removeprefix("module."): v for k, v in state.items()}
    if "x_embedder.proj.weight" not in state:
        raise ValueError("not a DiT checkpoint: it has no x_embedder.proj.weight")
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if heads is None:
        raise ValueError("a checkpoint does not tell its heads: pass heads= (S 6, B 12, L, XL 16)")
    return state, dict(
        dim=dim, channels=channels, patch=patch, heads=heads,
        size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=len(state["final_layer.linear.bias"]) == 2 * patch**2 * channels)


if __name__ == "__main__":                              # python dtr.py [CKPT ...]
    from experiments.cka import cli
    sys.exit(cli(sys.argv[1:]))
