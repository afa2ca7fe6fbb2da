"""DyDiT: spend less where denoising is easy.   Zhao et al. 2024 (ICLR 2025), arXiv:2410.03456

1. Take a trained DiT, give every block three routers, and fine-tune it all for a few % more steps.
2. Width by time (TDW): two routers look at the timestep alone and switch off attention heads and
   groups of MLP channels. Almost pure noise needs few of them, an almost clean picture needs more.
3. Tokens by content (SDT): a router looks at every token. A token that is switched off skips the
   MLP and keeps its value; attention always sees all tokens.
4. A switch is exactly 0 or 1; its gradient is that of a noisy sigmoid (straight-through Gumbel).
   A FLOPs loss pulls the compute that is left towards a target share, lambda.
5. Training computes everything and multiplies by masks. Sampling computes only what is on: all
   pictures of a step share the time, hence heads and groups, so weights are sliced once per step.

    E_t (time alone) -+- attn_rate -> heads  1 . 1 1      known for all blocks before the first runs
                      +- mlp_rate --> groups 1 1 . .
    x after attention --- token_selection --> tokens 1 . . 1 1 .

    a block:  x -+- norm, modulate - attention - *gate1 -(+)-+- norm, modulate - MLP - *gate2 -(+)-
                 |                 3 of 4 heads           |  |  3 of 6 tokens, 2 of 4 groups    |
                 +----------------------------------------+  +----------------------------------+

Letters: B batch, C channels, S side of the picture, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, and also groups of 4D/H MLP channels, N depth, h heads and g groups that are on, M tokens
of the batch that are on, E_t the embedding of the time, lambda the target share of FLOPs (the
literature's word for multiply-accumulates).
Time: t = 0 is data, t = 1 is noise (diffusion.py says more).
Read next: gate(), Block.forward and Block.sliced, then loss().  Below the ruler: plain DiT.

Differences from the paper (P) and the official code (C)
- C has no accelerated path for class-conditional DiT: its masks cost time. Block.sliced is ours. It
  equals the masked path; evaluation takes it whenever a batch shares its heads and groups.
- P sorts heads and channels by magnitude before fine-tuning, so that the one that is always on is
  the strongest. C does not. rank() does, judging by the weights alone.
- C's first release (NUS) has H outputs per width router and none that is always on, its second
  (Alibaba) has H - 1. always_on says which; from_official reads both.
- The FLOPs loss takes the ratio of the global batch (with --accum, of each part), in C that of each
  GPU. Its weight 2, the ramp W, the 100 steps before it and stratified times are in C, not in P.
- lambda is the share of a whole trajectory, so all times are drawn alike; if the parent's path
  drew some more often (a rectified flow's logit-normal), its density weighs the diffusion loss.
- A switch near logit 0 is on half the time in training and always in sampling. So P's and C's
  ratios are off lambda by some hundredths; TINY without quiet ended at 0.78 for 0.7. quiet is ours:
  the last steps have no noise, and the ratio that is trained is the one that sampling has.
- C draws dropped labels anew for the complete model; here both passes see the same labels. C also
  steps the optimizer twice on one gradient in phase 1; train.py steps once.
- Routers decide in float32 by logit > 0: in bf16 the sigmoid of 0.008 is 0.5, which is "off".
- The official biases (15, 15, 35) hardly move in a small network. TINY has its own, and router_lr.
- route = "random", P's control, is our reading: a coin per switch and time, lambda on average.
- Attention is the fused kernel; C writes out the softmax."""

import math
import sys
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
    dim: int = 384              # D. S: 384, B: 768, L: 1024, XL: 1152           (DiT, Table 1)
    depth: int = 12             # N. S: 12,  B: 12,  L: 24,   XL: 28
    heads: int = 6              # H. S: 6,   B: 12,  L: 16,   XL: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t
    target: float = 0.5         # lambda, share of the dense blocks' FLOPs. S, B: .3-.9, XL: .3-.7
    weight: float = 2.0         # of the FLOPs loss
    ramp: int = 1000            # W: at this step lambda_step reaches lambda   (C, for 0.7: 5000)
    hold: int = 100             # ... and before this one it is 1
    complete: int = 0           # so many first steps also train the complete model. XL: 30000
    quiet: int = 0              # from this step on switches have no noise, as in sampling; 0: never
    tau: float = 5.0            # temperature of a switch's gradient; its decision has none
    head_bias: float = 15.0     # the routers' start: P(on) = sigmoid(15)
    channel_bias: float = 15.0
    token_bias: float = 35.0
    router_lr: float = 1.0      # learning rate of the routers, in units of all others'
    always_on: bool = True      # the first head and the first group have no switch (NUS: False)
    route: str = "both"         # both | width (TDW only) | tokens (SDT only) | random


# The paper's start would not move in a few hundred steps: a router's logits change with D and lr.
TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4,
              ramp=150, hold=20, quiet=250, router_lr=30.0,
              head_bias=10.0, channel_bias=10.0, token_bias=10.0)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}


def gate(logit, u=None, tau=5.0):
    """A switch: exactly 0.0 or 1.0, with a soft one's gradient (straight-through Gumbel-sigmoid).

    logit, any shape; u, the same shape, uniform in [0, 1). Without u: no noise, on where logit > 0.
    P(on) = sigmoid(logit) for every tau. A large tau lets gradient through a switch that is far
    from flipping: at logit 15 it is 4e-6 on average with tau = 1, and 1e-2 with tau = 5."""
    if u is not None:
        logit = logit + u.logit()                       # the difference of two Gumbels is logistic
    hard, soft = (logit > 0).to(logit.dtype), (logit / tau).sigmoid()
    return hard - soft.detach() + soft                  # exactly hard: 1 - s is exact, s >= 1/2


def spend(heads, groups, tokens, cfg):
    """What each token costs, a dense block being 1.  (..., H), (..., H), (..., L) -> (..., L).

    Per token and D: attention 4D + 2L (q, k, v, o; QK', AV), MLP 8D. The mean over tokens and
    blocks is the FLOPs ratio: 1 with all on, 1/H with one head, one group and every token."""
    attention, mlp = 4 * cfg.dim + 2 * (cfg.size // cfg.patch) ** 2, 8 * cfg.dim
    spent = attention * heads.mean(-1)[..., None] + mlp * groups.mean(-1)[..., None] * tokens
    return spent / (attention + mlp)


def lambda_step(step, cfg):
    """The target while training: 1 for `hold` steps, then the line from 1 at 0 to lambda at W."""
    return 1.0 if step < cfg.hold else 1 - (1 - cfg.target) * min(step / max(cfg.ramp, 1), 1)


def loss(path, model, x0, y, step, draw):
    """Called by train.py -> the dynamic model's diffusion loss; aux with the two others."""
    cfg = getattr(model, "module", model).cfg
    quarter = (draw.first + draw.rows) % 4             # all quarters of time in turn,
    t = path.grid((quarter + draw.uniform("t")) / 4)
    often = path.density(t)                             # weighted as often as the parent saw them
    noise = draw.normal("noise", *x0.shape[1:])
    coin = draw.uniform("gate", cfg.depth, 2 * cfg.heads + (cfg.size // cfg.patch) ** 2)
    if cfg.quiet and step >= cfg.quiet:
        coin = torch.full_like(coin, 0.5)               # of logit 0: decide as in sampling

    per_picture, aux = path.loss(lambda *inputs: model(*inputs, noise=coin), x0, y, t, noise)
    if step < cfg.complete:                             # phase 1: do not lose the dense model
        aux["complete_loss"] = path.loss(
            lambda *inputs: model(*inputs, complete=True), x0, y, t, noise)[0].mul(often).mean()
    ratio = global_mean(aux["flops"].mean())
    aux["flops_loss"] = cfg.weight * (ratio - lambda_step(step, cfg)) ** 2      # 0 on target; with
    return (often * per_picture).mean(), aux            # all on: 2 (1 - lambda)^2, from step W


def global_mean(v):
    """The mean over processes, with this one's gradient. The square of each process's own mean
    would also punish their scatter: the freedom to spend more on one time than on another."""
    if not dist.is_initialized():
        return v
    total = v.detach().clone()
    dist.all_reduce(total)
    return v + (total / dist.get_world_size() - v).detach()


# -------------------------------------------------------------------------------- the three routers


def decide(x, weight, bias):
    """A router's linear layer in float32 (float64 stays), under autocast, too: rounding to bf16
    flips about one decision in 100."""
    exact = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.linear(x.to(exact), weight.to(exact), bias.to(exact))


class WidthRouter(nn.Module):
    """E_t (B, D) -> which heads, or groups of channels, are on (B, H). It does not see the label,
    so that the two halves of guidance share the sliced weights."""

    full_precision = True                               # to train.py: no bf16 for these weights

    def __init__(self, cfg, bias):
        super().__init__()
        self.heads, self.tau, self.bias = cfg.heads, cfg.tau, bias
        self.router = nn.Linear(cfg.dim, cfg.heads - cfg.always_on)

    def forward(self, emb, u=None):
        logit = decide(emb, self.router.weight, self.router.bias)             # (B, H-1)
        u = u if u is None else u[:, self.heads - logit.shape[1] :]
        return first_on(gate(logit, u, self.tau), self.heads)                       # (B, H)


def first_on(mask, heads):
    return F.pad(mask, (heads - mask.shape[-1], 0), value=1.0)      # (..., H-1 or H) -> (..., H)


class TokenRouter(nn.Module):
    """x (B, L, D) as it is, no norm, no time -> which tokens the MLP is for (B, L)."""

    full_precision = True

    def __init__(self, cfg):
        super().__init__()
        self.tau, self.bias, thin = cfg.tau, cfg.token_bias, cfg.dim // 16
        self.mlp_head = nn.Sequential(nn.Linear(cfg.dim, thin), nn.ReLU(), nn.Linear(thin, 1))

    def forward(self, x, u=None):
        first, relu, last = self.mlp_head
        x = relu(decide(x, first.weight, first.bias))                         # (B, L, D/16)
        return gate(decide(x, last.weight, last.bias).squeeze(-1), u, self.tau)     # (B, L)


# ------------------------------------------------------------- layers that can be sliced to a width


class Sliceable(nn.Module):
    """A layer that can work with the part of its weights that is on.

    Copying that part takes 1 or 2 % of a block's time, so the newest copy is kept: neighbouring
    times often switch alike. It is the one thing in this suite that a module keeps besides
    parameters and buffers. Only frozen weights are kept: a fused optimizer writes into a weight
    without raising its _version. Other changes show in the key (EMA and load_state_dict raise the
    _version), or pass through _apply, as .to() does. Only writing through p.data goes unseen."""

    kept = (None, None)                                 # key, parts

    @torch.no_grad()
    def weights(self, on):
        """on: the numbers of the heads or groups that are on, a tuple, or None for all."""
        whole = self.whole()
        if on is None or len(on) == self.heads:
            return whole
        learns = any(w.requires_grad or w.is_inference() for w in whole)
        key = None if learns else (on, *((id(w), w._version, w.data_ptr()) for w in whole))
        if learns or self.kept[0] != key:
            parts = self.parts(torch.tensor(on, dtype=torch.long, device=whole[0].device))
            self.kept = (None, None) if learns else (key, parts)
            return parts
        return self.kept[1]

    def _apply(self, *args, **kwargs):
        self.kept = (None, None)
        return super()._apply(*args, **kwargs)


class DynamicAttention(Sliceable):
    """A head that is off loses its rows of W_q, W_k, W_v and its columns of W_o. Softmax is per
    head, so the others do not notice. The bias b_o is always added."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def whole(self):
        return self.qkv.weight, self.qkv.bias, self.proj.weight

    def parts(self, on):
        """-> (3hD/H, D), (3hD/H,), (D, hD/H)"""
        wqkv, bqkv, wo = self.whole()
        H, D = self.heads, len(wo)
        return (wqkv.view(3, H, -1).index_select(1, on).view(-1, D),
                bqkv.view(3, H, -1).index_select(1, on).flatten(),
                wo.view(D, H, -1).index_select(1, on).flatten(1))

    def forward(self, x, mask=None, on=None):
        """x (B, L, D) with mask (B, H), or with the numbers of heads that are on -> (B, L, D)."""
        (B, L, D), h = x.shape, self.heads if on is None else len(on)
        wqkv, bqkv, wo = self.weights(on)
        qkv = F.linear(x, wqkv, bqkv).view(B, L, 3, h, D // self.heads)       # (B, L, 3, h, D/H)
        x = attend(*qkv.permute(2, 0, 3, 1, 4))                               # (B, h, L, D/H)
        x = x if mask is None else x * mask[:, :, None, None].to(x.dtype)
        return F.linear(x.transpose(1, 2).flatten(2), wo, self.proj.bias)           # (B, L, D)


class DynamicMlp(Sliceable):
    """4D channels in H groups. A group that is off loses its rows of W_1, b_1 and its columns of
    W_2: its mask comes before GELU, and GELU(0) = 0. The bias b_2 is always added."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads                          # as many groups
        self.fc1 = nn.Linear(cfg.dim, 4 * cfg.dim)
        self.fc2 = nn.Linear(4 * cfg.dim, cfg.dim)

    def whole(self):
        return self.fc1.weight, self.fc1.bias, self.fc2.weight

    def parts(self, on):
        """-> (4gD/H, D), (4gD/H,), (D, 4gD/H)"""
        w1, b1, w2 = self.whole()
        H, D = self.heads, len(w2)
        return (w1.view(H, -1).index_select(0, on).view(-1, D),
                b1.view(H, -1).index_select(0, on).flatten(),
                w2.view(D, H, -1).index_select(1, on).flatten(1))

    def forward(self, x, mask=None, on=None):
        """x (B, L, D) with mask (B, H), or (M, D), too, with the groups that are on -> like x."""
        w1, b1, w2 = self.weights(on)
        x = F.linear(x, w1, b1)                                               # (B, L, 4gD/H)
        if mask is not None:
            x = x * mask.repeat_interleave(x.shape[-1] // self.heads, 1)[:, None].to(x.dtype)
        return F.linear(F.gelu(x, approximate="tanh"), w2, self.fc2.bias)


class Block(nn.Module):
    """adaLN-Zero (DiT, Fig. 3) with switches. There are two ways through it to the same result."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = DynamicAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.mlp = DynamicMlp(cfg)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.attn_rate = WidthRouter(cfg, cfg.head_bias)
        self.mlp_rate = WidthRouter(cfg, cfg.channel_bias)
        self.token_selection = TokenRouter(cfg)

    def forward(self, x, c, emb, u=None, width=None, tokens=None):
        """Masked: compute all, hide what is off. Training needs it: to learn whether it should be
        on, a switch must know what it hides.

        x (B, L, D), c and emb = E_t (B, D), u (B, 2H + L) noise of the switches; width (B, 2H) and
        tokens (B, L): masks instead of the routers'.  -> x, heads, groups (B, H), tokens (B, L)"""
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                    # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        heads, groups = self.width(emb, u) if width is None else width.chunk(2, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), heads)   # (B, L, D)
        if tokens is None:
            tokens = self.token_selection(x, u if u is None else u[:, -x.shape[1]:])
        on = tokens[:, :, None].to(x.dtype)                                         # (B, L, 1)
        x = x + on * gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2), groups)
        return x, heads, groups, tokens

    def width(self, emb, u):
        H = self.mlp.heads
        u1, u2 = (u, u) if u is None else (u[:, :H], u[:, H : 2 * H])
        return self.attn_rate(emb, u1), self.mlp_rate(emb, u2)                      # 2 x (B, H)

    def sliced(self, x, c, heads, groups, tokens=None):
        """Sampling: compute only what is on, and write it into x: new memory is slow.

        x (B, L, D), c (B, D), heads and groups: tuples of the numbers that are on, for the whole
        batch; tokens (B, L): a mask instead of the router's.  -> x, tokens"""
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                    # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x.addcmul_(gate1, self.attn(modulate_(self.norm1(x), shift1, scale1), on=heads))
        tokens = self.token_selection(x) if tokens is None else tokens
        rows = tokens.flatten().nonzero().squeeze(1)    # (M,) of B*L; the host waits for a GPU
        if len(rows) == tokens.numel():
            x.addcmul_(gate2, self.mlp(modulate_(self.norm2(x), shift2, scale2), on=groups))
            return x, tokens
        flat, picture = x.view(-1, x.shape[-1]), rows // x.shape[1]                 # (B*L, D), (M,)
        shift2, scale2, gate2 = (v[:, 0].index_select(0, picture) for v in (shift2, scale2, gate2))
        u = modulate_(self.norm2(flat.index_select(0, rows)), shift2, scale2)       # (M, D)
        flat.index_add_(0, rows, (gate2 * self.mlp(u, on=groups)).to(x.dtype))
        return x, tokens


def modulate_(x, shift, scale):
    """modulate() into x, in one pass."""
    return torch.addcmul(shift, x, 1 + scale, out=x)


class DyDiT(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: the masks "heads", "groups"
    (B, N, H), "tokens" (B, N, L, 1); "map" (N, B, L), what each token cost; "flops" (B,), its mean.
    noise (B, N, 2H + L): uniform numbers for the switches in training; without it torch draws them.
    complete: every switch is on. fast: True slices, False masks, None slices where it can."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.route not in ("both", "width", "tokens", "random"):
            raise ValueError(f"route {cfg.route!r}: both, width, tokens or random")
        if not (0 < cfg.target <= 1 and cfg.tau > 0 and cfg.router_lr >= 0):
            raise ValueError("target must be in (0, 1], tau above 0, router_lr not below 0")
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)    # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)
        for b in self.blocks:                           # all on; who has no say does not learn
            for r in (b.attn_rate, b.mlp_rate, b.token_selection):
                nn.init.constant_(list(r.parameters())[-1], r.bias)
                mine = "tokens" if r is b.token_selection else "width"
                r.requires_grad_(cfg.route in ("both", mine))

    def forward(self, x, t, y, noise=None, complete=False, fast=None):
        x = (self.x_embedder(x) + self.pos_embed).contiguous()                      # (B, L, D)
        emb = self.t_embedder(t)                                                    # (B, D), E_t
        c = emb + self.y_embedder(y)                                                # (B, D)
        N, switches = self.cfg.depth, 2 * self.cfg.heads + x.shape[1]
        if noise is None and self.training and not complete:
            noise = torch.rand(len(x), N, switches, device=x.device)                # (B, N, 2H + L)
        noise = [None] * N if noise is None else noise.unbind(1)
        width, tokens = self.given(t, complete)                         # N x (B, 2H), N x (B, L)
        plan, width = self.plan(emb, width, fast if noise[0] is None else False)
        masks = []
        for i, block in enumerate(self.blocks):
            if plan:
                x, some = block.sliced(x, c, *plan[i], tokens[i])                   # (B, L, D)
                masks.append((*width[i].chunk(2, dim=-1), some))
            else:
                x, *mask = block(x, c, emb, noise[i], width[i], tokens[i])          # (B, L, D)
                masks.append(mask)
        heads, groups, tokens = (torch.stack(m, dim=1) for m in zip(*masks))        # (B, N, H or L)
        spent = spend(heads, groups, tokens, self.cfg)                              # (B, N, L)
        aux = dict(map=torch.stack(spent.unbind(1)), flops=spent.mean((1, 2)),    # (N, B, L), (B,)
                   heads=heads, groups=groups, tokens=torch.stack([tokens], dim=-1))
        return unpatchify(self.final_layer(x, c), self.cfg), aux              # (B, C or 2C, S, S)

    def given(self, t, complete):
        """Masks that no router decides: width N x (B, 2H), tokens N x (B, L); None if one does."""
        N, H, route = self.cfg.depth, self.cfg.heads, self.cfg.route
        n = 2 * H + self.pos_embed.shape[1]
        ones = torch.ones(1, 1, 1, device=t.device).expand(len(t), N, n)
        masks = coins(t, self.cfg) if route == "random" and not complete else ones
        width, tokens = masks[..., : 2 * H].unbind(1), masks[..., 2 * H :].unbind(1)
        every = complete or route == "random"
        return (width if every or route == "tokens" else [None] * N,
                tokens if every or route == "width" else [None] * N)

    def plan(self, emb, width, fast):
        """Slice or mask? -> N x (numbers of heads, numbers of groups) or None, and the width masks.

        Slice when nothing is learned and the batch agrees on the width: that is all sampling.
        All routers of all blocks are one matrix product; the host gets the answer in one copy."""
        if fast and torch.is_grad_enabled():
            raise ValueError("the sliced path is for sampling: what it leaves out could not learn")
        sharded = hasattr(self.blocks[0].mlp.fc1.weight, "placements")        # FSDP: only a part
        learns = self.training or torch.is_grad_enabled()
        if fast is False or fast is None and (learns or sharded or emb.is_meta):
            return None, width
        width = self.widths(emb) if width[0] is None else torch.stack(width, dim=1)     # (B, N, 2H)
        agree = (width == width[:1]).all().view(1)
        agree, *on = torch.cat([agree, width[0].flatten() > 0]).tolist()
        if not agree and fast:
            raise ValueError("the sliced path needs a batch that agrees on its heads and groups")
        on = [on[i : i + self.cfg.heads] for i in range(0, len(on), self.cfg.heads)]    # 2N x H
        on = [tuple(i for i, yes in enumerate(row) if yes) for row in on]
        return list(zip(on[::2], on[1::2])) if agree else None, width.unbind(1)

    def widths(self, emb):
        """E_t (B, D) -> heads and groups of all blocks (B, N, 2H): a sampler's timetable."""
        routers = [r.router for b in self.blocks for r in (b.attn_rate, b.mlp_rate)]
        weight, bias = torch.cat([r.weight for r in routers]), torch.cat([r.bias for r in routers])
        mask = gate(decide(emb, weight, bias))
        mask = mask.view(len(emb), len(self.blocks), 2, len(routers[0].bias))
        return first_on(mask, self.cfg.heads).flatten(2)                      # from (B, N, 2, H-1)


Model = DyDiT                                           # the name train.py and sample.py ask for


def coins(t, cfg):
    """The control without routers: t (B,) -> masks (B, N, 2H + L), a hash of t against a threshold.

    All kinds of switches are on with the same share w, where attention w + MLP w^2 = lambda."""
    H, L = cfg.heads, (cfg.size // cfg.patch) ** 2
    a = (4 * cfg.dim + 2 * L) / (12 * cfg.dim + 2 * L)                        # attention's share
    w = (math.sqrt(a * a + 4 * (1 - a) * cfg.target) - a) / (2 * (1 - a))
    i = torch.arange(cfg.depth * (2 * H + L), device=t.device)
    u = (i * 12.9898 + t.float()[:, None] * 78.233).sin() * 43758.5453        # (B, N * (2H + L))
    u = (u - u.floor()).view(len(t), cfg.depth, -1)
    limit = torch.full((2 * H + L,), w, device=t.device)
    if cfg.always_on and H > 1:                         # the first is on, the others make up for it
        limit[: 2 * H] = (w * H - 1) / (H - 1)
        limit[: 2 * H : H] = 1.0
    return (u < limit).float()


# ------------------------------------------------------------------------------ starting from a DiT


def rank(state, cfg):
    """A dense DiT's weights with heads and channels sorted, the strongest first. The same function.

    Strength of a head: |W_v| |W_o|, of a channel: |row of W_1| |column of W_2|."""
    state, D, H = dict(state), cfg.dim, cfg.heads
    for i in range(cfg.depth):
        wqkv, bqkv, wo, w1, b1, w2 = (f"blocks.{i}.{name}" for name in (
            "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
            "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"))
        rows, columns = state[wqkv].view(3, H, -1), state[wo].view(D, H, -1)
        order = (rows[2].norm(dim=1) * columns.norm(dim=(0, 2))).argsort(descending=True)   # (H,)
        state[wqkv] = rows[:, order].view(3 * D, D)
        state[bqkv] = state[bqkv].view(3, H, -1)[:, order].flatten()
        state[wo] = columns[:, order].flatten(1)
        order = (state[w1].norm(dim=1) * state[w2].norm(dim=0)).argsort(descending=True)    # (4D,)
        state[w1], state[b1], state[w2] = state[w1][order], state[b1][order], state[w2][:, order]
    return state


def from_dense(state, cfg):
    """What train.py --init does: a trained DiT, ranked, with routers that switch everything on."""
    model = DyDiT(cfg)
    dense = {k for k in model.state_dict() if "_rate." not in k and "token_selection." not in k}
    if set(state) != dense:
        raise ValueError(f"not the weights of a dense DiT: {min(set(state) ^ dense)}")
    model.load_state_dict(rank(state, cfg), strict=False)
    return model


def param_groups(model, lr):
    """Called by train.py: the routers have a learning rate of their own."""
    parts = {1.0: [], model.cfg.router_lr: []}
    for name, p in model.named_parameters():
        router = "_rate." in name or "token_selection." in name
        parts[model.cfg.router_lr if router else 1.0] += [p] if p.requires_grad else []
    return [dict(params=params, lr=lr * factor) for factor, params in parts.items()]


def from_official(state, heads=None, **overrides):
    """DyDiT from a state dict of either release. The routers' rows tell the heads if a head is 64
    or 72 wide, as in all of the paper's sizes; else pass heads=."""
    state, fields = read_official(state, heads or 0)
    if "blocks.0.attn_rate.router.weight" not in state:
        raise ValueError("not a DyDiT checkpoint: no routers (from a DiT start by train.py --init)")
    rows, dim = len(state["blocks.0.attn_rate.router.weight"]), fields["dim"]
    heads = heads or next((h for h in (rows, rows + 1) if dim / h in (64, 72)), None)
    if heads not in (rows, rows + 1):
        raise ValueError(f"{rows} rows per router, width {dim}: pass heads={rows} or {rows + 1}")
    fields |= dict(heads=heads, always_on=rows < heads)
    model = DyDiT(replace(Config(), **(fields | overrides)))
    model.load_state_dict(state)
    return model


def cost(cfg):
    """Of one picture: 1e9 multiply-accumulates in matrix products, with every switch on and at the
    target. What idles changes with time and token, so no parameter is called idle."""
    L, D, N = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.depth
    blocks = N * (4 * L * D * D + 2 * L * L * D + 8 * L * D * D)              # qkvo; QK', AV; MLP
    rest = N * 6 * D * D + plain_macs(cfg)                                    # adaLN; around blocks
    routers = N * (L * (D + 1) * (D // 16) + 2 * D * (cfg.heads - cfg.always_on))
    norms = 4 * (2 * N + 1) * L * D                     # the paper counts 4 per LayerNorm element
    return {"idle parameters": 0, "GMAC": (blocks + rest) / 1e9,
            "GMAC (the paper's count)": (blocks + rest + norms) / 1e9,
            "GMAC at the target": (cfg.target * blocks + rest + routers) / 1e9}


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


if __name__ == "__main__":                              # python dydit.py CKPT: figures 5 and 6
    from experiments.timetable import cli
    sys.exit(cli(sys.argv[1:]))
