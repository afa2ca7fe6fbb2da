"""DyDiT: compute less where denoising is easy.   Zhao et al. 2024 (ICLR 2025), arXiv:2410.03456

The question: DiT spends the same compute on every timestep and on every patch. How much of it can
be left out without making the images worse?

1. Start from a trained DiT, add three routers to every block, and fine-tune all weights.
2. Width by timestep (the paper's TDW): two routers see only the timestep. One switches attention
   heads on and off, the other switches groups of MLP channels.
3. Tokens by content (SDT): the third router sees each token after the attention. A token that is
   off skips the MLP and keeps its value. Attention always sees all tokens.
4. Every switch is exactly 0 or 1. In training it is random, and its gradient is that of a smooth
   sigmoid. A FLOPs loss pulls the average compute towards a target share, lambda.
5. Training computes everything and multiplies by the masks. Sampling computes only what is on.

    E_t --> attn_rate ---------+           E_t --> mlp_rate ------------+
                               | heads 1 . 1 . 1 .                      | groups 1 1 . 1 . 1
    x -+- norm, modulate - attention - *gate1 -(+)-+- norm, modulate - MLP - *gate2 - *tokens -(+)-
       +----------------------------------------+  +-------------------------------------^------+
                                                   +-> token_selection -> tokens 1 . 1 1 +

    1 is on, . is off. E_t is the embedding of the time alone, so heads and groups are the same for
    all images of a sampling step. Sampling therefore cuts the weights. If head 2 of 3 is off:
      rows of W_q, W_k, W_v       columns of W_o
        head 1 |########|           1    2    3
        head 2 |  off   |         |####|off |####|
        head 3 |########|         |####|off |####|
    A group of MLP channels that is off loses its rows of W_1 and b_1 and its columns of W_2.

Equations; (a), (b), ... mark the lines that compute them:
    gate:    on = [logit + n > 0],  n = log(u / (1 - u)),  u uniform in (0, 1);                  (a)
             P(on) = sigmoid(logit);  sampling: n = 0
             backward: d on / d logit = sigmoid'((logit + n) / tau) / tau                        (b)
    block:   x = x + gate1 * (W_o [heads * softmax(q k' / sqrt(D/H)) v] + b_o)                   (c)
             x = x + gate2 * tokens * (W_2 GELU(groups * (W_1 z + b_1)) + b_2)                   (d)
             q, k, v come from modulate(LN(x)), z is modulate(LN(x)) of the x that (c) gave;
             gate1 and gate2 are adaLN's as in DiT, and no switches
    ratio:   r = mean over blocks of  a mean(heads) + (1 - a) mean(groups) mean(tokens),         (e)
             a = (4D + 2L) / (12D + 2L): attention's share of a dense block,                     (f)
             0.40 for S, 0.36 for XL
    total:   loss = diffusion loss + 2 (mean of r over the batch - lambda_step)^2                (g)
                    [+ diffusion loss of the full model, during the first full_model_steps]      (h)
    lambda_step: 1 before step 100; then the line from 1 at step 0 to lambda at step W, so that  (i)
             it drops to 0.95 at step 100 (lambda = 0.5, W = 1000); lambda from step W on

The FLOPs loss at its extremes, from step W on: 0 if the mean ratio of the batch is lambda, however
it is spread over times and images; 2 (1 - lambda)^2 = 0.5 for lambda = 0.5 if everything is on.

Where the gradient comes from: a mask multiplies what it hides, so the loss has a gradient with
respect to the mask. This also holds for a unit that is off, because training computes it anyway: it
can be switched on again. The straight-through gate passes this gradient on to the logit, times (b).
At the initial logit 15 of heads and groups this factor is 4e-6 on average with tau = 1, and 1e-2
with the official tau = 5 (tokens, logit 35: 2e-4).

Worked example, S/2 (D = 384, L = 256). Divided by L D, attention costs 4D + 2L = 2048 and the MLP
8D = 3072. With 3 of 6 heads, 4 of 6 groups and 192 of 256 tokens on:
    r = (2048 * 3/6 + 3072 * 4/6 * 192/256) / (2048 + 3072) = (1024 + 1536) / 5120 = 0.5

Why tokens skip only the MLP: the paper argues that a token which skips attention loses its exchange
with other tokens. Why the width routers see neither label nor image: the widths of all steps are
known before sampling, and both halves of guidance share them. Why one head and one group are always
on: attention then keeps a head, and the MLP a group for the tokens that it still gets (our
reading). We do not know why the paper has as many groups as heads.

The paper's main result (ImageNet 256x256): DiT-XL/2 goes from 118.69 to 57.88 GFLOPs and is 1.73
times faster. FID falls (improves) from 2.27 to 2.07, but inception score (277 to 248) and precision
(0.83 to 0.80) fall too. Small models get worse: at 0.5 S/2 has FID 28.75, not 21.46. The width
grows from noise to data (Fig. 1c). Mean FID of S at 0.5 over five data sets: both kinds of router
16.94, width only 20.93, tokens only 35.12, random masks 136.01.
What we found (Fashion-MNIST, lambda = 0.5, three seeds; claims Y1, Y5, Y6, Y8, Y9 in experiments/
README.md): after 800 steps the loss is 2.4 % above the dense parent's. But it is 5.5 % above that
of a dense DiT which is tuned for 800 steps, too, and 3.2 % above that of one whose weakest half is
cut first (a random half: no visible difference). With 400 steps, both kinds of router have 13 %
less loss than tokens only, 14 % less than random masks, and 1.2 % more than width only. The tokens
that skip are background (AUC 0.83). The flow's width is largest in the middle (0.71 at t = 0.45;
0.38 at 0.05, 0.28 at 0.95), DDPM's is nearly even.

Letters: B batch, C channels, S side of the image, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, and also the number of groups (each has 4D/H channels), N depth, h active heads, g active
groups, M active tokens of the batch, E_t the time embedding (B, D), lambda the target ratio.
"FLOPs" are multiply-accumulates, as in the paper.  Time: t = 0 is data, t = 1 is noise.
Read next: gate(), Block.forward, then loss().

Differences from the paper and from the official code (alibaba-damo-academy/DyDiT)
- The official code slices no class-conditional DiT: its masks save no time there. The sliced half
  of Block.forward is our implementation of the paper's idea; it gives what the masked half gives.
- The paper sorts heads and channels by magnitude before fine-tuning, so that the always-on ones are
  the strongest; the official code does not. Our sort_by_magnitude() looks at weights, not at data.
- An earlier official release (NUS-HPC-AI-Lab) has no always-on head or group: always_on=False.
- lambda counts the products in attention and MLP only, as in the paper (Sec. 3.2). At XL/2 and
  r = 0.5 the whole network spends 60.0 of DiT's 118.6 GMAC: adaLN, embeddings and routers stay. The
  paper's 57.88 fits r = 0.48.
- From the official code, and not in what we know of the paper: weight 2, lambda_step, stratified
  times (image i of a batch draws its t in quarter i mod 4, so that a batch covers all times). Its
  r is the mean over one GPU's batch, ours over the global batch (with --accum, over each part of
  it).
- lambda is a mean over all times, so all times are drawn equally often here. If the parent (the
  trained DiT) drew some times more often, the diffusion loss is weighted by how often: our choice.
- The full model is the same network with every switch on. The paper adds its loss in the first
  30,000 steps of XL, and not for S and B; the official code with lambda = 0.7 in all steps. The
  official code draws dropped labels anew for this pass. Here both passes see the same labels; the
  default is no such pass.
- Fine-tuning of XL takes 150,000 to 200,000 steps; for S, B and XL it is 1 to 6 % of the parent's
  steps. The learning rate is 1e-4 (official code, lambda = 0.7: 2.5e-5). The official code skips
  an update whose gradient norm is at least 200 (lambda = 0.7: 50). While it trains the full model,
  it calls optimizer.step() twice per gradient, the first time before it looks at the norm. train.py
  steps once, and clips the gradient in its tiny recipe.
- In training a switch is on with probability sigmoid(logit), in sampling always or never. The ratio
  in sampling can thus differ from lambda. hard_gates_from is ours: from this step on, training has
  no gate noise, so that the network learns with the masks of sampling.
- Routers compute in float32 and test logit > 0. The official code tests sigmoid(logit) > 0.5; in
  bfloat16 this sigmoid is rounded to 0.5, which is "off", up to a logit of 0.0078.
- The official initial biases (15, 15, 35) hardly move in a small network. TINY has smaller ones and
  a larger learning rate for the routers, router_lr: our choice.
- route="random" is our reading of the paper's control: a pseudo-random number per switch and time.
- Attention is torch's fused kernel; the official code writes out the softmax."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
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
    target: float = 0.5         # lambda, the target ratio. S, B: 0.3 to 0.9; XL: 0.3 to 0.7
    weight: float = 2.0         # weight of the FLOPs loss
    anneal_steps: int = 1000    # W: from this step on lambda_step is lambda (5000 for 0.7)
    anneal_start: int = 100     # before this step lambda_step is 1
    full_model_steps: int = 0   # the first steps, which also train the full model. XL: 30000
    hard_gates_from: int = 0    # from this step on gates have no noise, as in sampling; 0: never
    tau: float = 5.0            # temperature of a gate's gradient; it does not change the forward
    head_bias: float = 15.0     # initial logits of the routers: P(on) = sigmoid(15)
    channel_bias: float = 15.0
    token_bias: float = 35.0
    router_lr: float = 1.0      # learning rate of the routers, relative to all other weights
    always_on: bool = True      # the first head and the first group have no switch
    route: str = "both"         # both | width (TDW only) | tokens (SDT only) | random


# The official biases would not move in a few hundred steps: AdamW moves a weight by about the
# learning rate per step, so a logit by that times the sum of |E_t|, which is small for a small D.
TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4,
              anneal_steps=150, anneal_start=20, hard_gates_from=250, router_lr=30.0,
              head_bias=10.0, channel_bias=10.0, token_bias=10.0)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16)}


def gate(logit, u, tau=5.0):
    """A switch: exactly 0.0 or 1.0, with the gradient of a sigmoid (straight-through Gumbel).

    logit: any number; u: in [0, 1], of the same shape. u uniform: training. u = 0.5: no noise, on
    where logit > 0. u = 1 forces the switch on, u = 0 forces it off; it then has no gradient."""
    logit = logit + u.logit()                           # two Gumbels' difference is logistic  (a)
    hard, soft = (logit > 0).to(logit.dtype), (logit / tau).sigmoid()           # (a)
    return hard - soft.detach() + soft          # exactly hard; hard + soft - soft is not  (b)


def flops_per_token(heads, groups, tokens, cfg):
    """Cost of each token; a dense block costs 1.  (..., H), (..., H), (..., L) -> (..., L).

    The mean over tokens and blocks is the FLOPs ratio r: 1 if everything is on, 1/H with one head,
    one group and every token."""
    s, m = 4 * cfg.dim + 2 * (cfg.size // cfg.patch) ** 2, 8 * cfg.dim  # qkvo, QK', AV; MLP  (f)
    # r, before the mean over tokens and blocks  (e)
    return (s * heads.mean(-1)[..., None] + m * groups.mean(-1)[..., None] * tokens) / (s + m)


def lambda_step(step, cfg):
    """The target ratio of one training step, see lambda_step in the docstring above."""
    progress = min(step / max(cfg.anneal_steps, 1), 1)                          # (i)
    return 1.0 if step < cfg.anneal_start else 1 - (1 - cfg.target) * progress  # (i)


def loss(diffusion, model, x0, y, step, rng):
    """Called by train.py: x0 (B, C, S, S), y (B,) -> the dynamic model's diffusion loss, and aux.

    train.py adds every entry of aux that ends in _loss. diffusion.loss gives the loss of each image
    (B,). rng.first is the number of images in all earlier steps, rng.rows (B,) are the places of
    these images in the global batch: their sum, modulo 4, says which quarter of time is drawn."""
    cfg = getattr(model, "module", model).cfg
    t = diffusion.from_uniform(((rng.first + rng.rows) % 4 + rng.uniform("t")) / 4)     # stratified
    # weight (B,): how often the parent drew this t. noise (B, C, S, S): the diffusion's.
    weight, noise = diffusion.time_density(t), rng.normal("noise", *x0.shape[1:])
    gate_noise = rng.uniform("gate", cfg.depth, 2 * cfg.heads + (cfg.size // cfg.patch) ** 2)
    if 0 < cfg.hard_gates_from <= step:
        gate_noise = torch.full_like(gate_noise, 0.5)   # logit(0.5) = 0: no noise

    each, aux = diffusion.loss(lambda *xty: model(*xty, gate_noise=gate_noise), x0, y, t, noise)
    if step < cfg.full_model_steps:                     # the paper's first steps of XL
        full, _ = diffusion.loss(lambda *xty: model(*xty, full_model=True), x0, y, t, noise)
        aux["full_model_loss"] = (weight * full).mean()                         # (h)
    # 0 if the mean ratio is on target  (g)
    aux["flops_loss"] = cfg.weight * (global_mean(aux["flops"].mean()) - lambda_step(step, cfg))**2
    return (weight * each).mean(), aux                                          # (g)


def global_mean(v):
    """The mean of v over all processes, with the gradient of this process's v; DDP then averages
    the gradients. The target is for the mean over all images. If each process had its own (mean -
    target)^2, it would be punished for images at easy times, which are meant to cost less."""
    total, world_size = v.detach().clone(), dist.get_world_size() if dist.is_initialized() else 1
    if world_size > 1:
        dist.all_reduce(total)
    return v + (total / world_size - v.detach())


class WidthRouter(nn.Module):
    """E_t (B, D), u (B, H) -> which heads, or which groups of channels, are on (B, H)."""

    full_precision = True                               # FSDP must not round these weights to bf16

    def __init__(self, cfg):
        super().__init__()
        self.always_on, self.tau = int(cfg.always_on), cfg.tau
        self.router = nn.Linear(cfg.dim, cfg.heads - self.always_on)
        # Freeze a router that this ablation does not use, or that has no rows (one head).
        self.requires_grad_(cfg.route in ("both", "width") and cfg.heads > self.always_on)

    def forward(self, emb, u):
        logit = linear_fp32(emb, *self.router.parameters())                     # (B, H-1)
        return F.pad(gate(logit, u[:, self.always_on :], self.tau), (self.always_on, 0), value=1.0)


class TokenRouter(nn.Module):
    """x (B, L, D), without norm and time, u (B, L) -> which tokens the MLP processes (B, L)."""

    full_precision = True

    def __init__(self, cfg):
        super().__init__()
        self.tau, D = cfg.tau, cfg.dim
        self.mlp_head = nn.Sequential(nn.Linear(D, D // 16), nn.ReLU(), nn.Linear(D // 16, 1))
        self.requires_grad_(cfg.route in ("both", "tokens"))

    def forward(self, x, u):
        x = linear_fp32(x, *self.mlp_head[0].parameters()).relu()               # (B, L, D/16)
        return gate(linear_fp32(x, *self.mlp_head[2].parameters()).squeeze(-1), u, self.tau)


def take(w, i, n, dim=0):
    """Cut one dimension of a weight into n equal parts -> the parts with the indices i (None: all).
    Sampling leaves out heads and groups in this way."""
    return w if i is None else w.unflatten(dim, (n, -1)).index_select(dim, i).flatten(dim, dim + 1)


def attention(layer, x, mask=None, active=None):
    """layer: Attention, x (B, L, D) -> (B, L, D). mask (B, H) hides heads; active (h,), the indices
    of the heads that are on in the whole batch, computes only these.

    Each head has its own softmax, so the others do not change when one is left out. The mask comes
    before W_o, and the bias b_o is always added."""
    (B, L, D), H = x.shape, layer.heads
    if active is not None and len(active) == 0:         # attention kernels fail on zero heads
        return F.linear(x[..., :0], layer.proj.weight[:, :0], layer.proj.bias)      # no inputs: b_o
    rows = None if active is None else torch.cat([active, active + H, active + 2 * H])  # q, k, v
    qkv = F.linear(x, take(layer.qkv.weight, rows, 3 * H), take(layer.qkv.bias, rows, 3 * H))
    x = attend(*qkv.view(B, L, 3, -1, D // H).permute(2, 0, 3, 1, 4))           # (B, h, L, D/H)
    x = (x if mask is None else x * mask[:, :, None, None].to(x.dtype)).transpose(1, 2)  # (c)
    return F.linear(x.flatten(2), take(layer.proj.weight, active, H, 1), layer.proj.bias)  # (c)


def mlp(layer, x, H, mask=None, active=None):
    """layer: Mlp, its 4D channels in H groups; x (B, L, D) with mask (B, H), or x (..., D) with
    active (g,), the indices of the groups that are on in the whole batch -> like x.

    The mask comes before GELU, and GELU(0) = 0, so b_1 vanishes too. b_2 is always added."""
    x = F.linear(x, take(layer.fc1.weight, active, H), take(layer.fc1.bias, active, H))
    x = x if mask is None else x * mask.repeat_interleave(x.shape[-1] // H, 1)[:, None].to(x.dtype)
    x = F.gelu(x, approximate="tanh")                                           # (..., 4gD/H)  (d)
    return F.linear(x, take(layer.fc2.weight, active, H, 1), layer.fc2.bias)    # (..., D)  (d)


class Block(nn.Module):
    """adaLN-Zero (DiT, Fig. 3) with switches, computed in two ways: masked and sliced."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(cfg.dim, 4 * cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.attn_rate, self.mlp_rate = WidthRouter(cfg), WidthRouter(cfg)
        self.token_selection = TokenRouter(cfg)

    def forward(self, x, c, u, heads, groups, sliced=False, all_on=False):
        """x (B, L, D), c (B, D), u (B, L) -> x, tokens (B, L).

        heads and groups are masks (B, H). If sliced, they are the indices (h,) and (g,) of the
        active ones, or None for all. all_on: u is 1 everywhere, so every token is on."""
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)                # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        # Training: compute everything and multiply by the masks. A switch can only learn whether
        # a unit should be on if the unit is computed.
        if not sliced:
            x = x + gate1 * attention(self.attn, modulate(self.norm1(x), shift1, scale1), heads)
            tokens = self.token_selection(x, u)                                 # (B, L)
            y = mlp(self.mlp, modulate(self.norm2(x), shift2, scale2), self.attn.heads, groups)
            return x + tokens[:, :, None].to(x.dtype) * gate2 * y, tokens       # (B, L, D)  (d)
        # Sampling: compute only what is on, and write it into x, because new memory is slow.
        torch.addcmul(shift1, z := self.norm1(x), 1 + scale1, out=z)            # modulate() into z
        x.addcmul_(gate1, attention(self.attn, z, active=heads))                # (B, L, D)  (c)
        tokens = u if all_on else self.token_selection(x, u)                    # (B, L)
        rows = None if all_on else tokens.flatten().nonzero().squeeze(1)        # (M,), a GPU sync
        torch.addcmul(shift2, z := self.norm2(x), 1 + scale2, out=z)            # (B, L, D)
        if all_on or len(rows) == tokens.numel():
            x.addcmul_(gate2, mlp(self.mlp, z, self.attn.heads, active=groups)) # (B, L, D)
        elif len(rows):
            y = mlp(self.mlp, z.flatten(0, 1).index_select(0, rows), self.attn.heads, active=groups)
            y = (gate2[:, 0].index_select(0, rows // x.shape[1]) * y).to(x.dtype)    # of its image
            x.view(-1, x.shape[-1]).index_add_(0, rows, y)                      # into (B*L, D)  (d)
        return x, tokens


class DyDiT(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: the masks "heads", "groups"
    (B, N, H) and "tokens" (B, N, L, 1); "map" (N, B, L), the cost of each token; "flops" (B,), the
    mean of the map. gate_noise (B, N, 2H + L): uniform numbers for the gates in training; without
    it torch draws them. full_model: every switch is on. The model slices if it is in eval mode,
    under torch.no_grad(), and if all images of the batch have the same heads and groups, which
    holds in sampling; else, or with sliced=False, it multiplies by masks."""

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
        for b in self.blocks:                           # every switch starts on
            nn.init.constant_(b.attn_rate.router.bias, cfg.head_bias)
            nn.init.constant_(b.mlp_rate.router.bias, cfg.channel_bias)
            nn.init.constant_(b.token_selection.mlp_head[2].bias, cfg.token_bias)
        routes = ("both", "width", "tokens", "random")
        if not (cfg.route in routes and 0 < cfg.target <= 1 and cfg.tau > 0 and cfg.router_lr >= 0):
            raise ValueError(f"need route in {routes}, 0 < target <= 1, tau > 0, router_lr >= 0")

    def forward(self, x, t, y, gate_noise=None, full_model=False, sliced=None):
        x = self.x_embedder(x) + self.pos_embed                                 # (B, L, D)
        emb = self.t_embedder(t)                                                # (B, D), E_t
        c = emb + self.y_embedder(y)                                            # (B, D)
        u = self.forced_masks(t, full_model)                                    # (B, N, 2H + L)
        if self.training or gate_noise is not None:
            u = torch.where(u == 0.5, torch.rand_like(u) if gate_noise is None else gate_noise, u)
        heads, groups = self.width_masks(emb, u)                                # 2 x (B, N, H)
        masked = self.training or torch.is_grad_enabled() or x.is_meta or sliced is False
        active = None if masked else self.active_units(heads, groups)
        all_on, tokens = full_model or self.cfg.route == "width", [None] * self.cfg.depth
        masks = active or list(zip(heads.unbind(1), groups.unbind(1)))          # N x 2 x (B, H)
        for i, (block, v) in enumerate(zip(self.blocks, u[..., -x.shape[1] :].unbind(1))):
            x, tokens[i] = block(x.contiguous(), c, v, *masks[i], bool(active), all_on)
        tokens = torch.stack(tokens, dim=1)                                     # (B, N, L)
        cost = flops_per_token(heads, groups, tokens, self.cfg)                 # (B, N, L)  (e)
        aux = dict(map=cost.transpose(0, 1).clone(), flops=cost.mean((1, 2)), heads=heads,
                   groups=groups, tokens=tokens[..., None].clone())     # FSDP wants no views
        return unpatchify(self.final_layer(x, c), self.cfg), aux                # (B, C or 2C, S, S)

    def forced_masks(self, t, full_model=False):
        """t (B,) -> the u of gate() for each switch (B, N, 2H + L): 1 forces it on, 0 off, 0.5
        leaves it to its router. In training forward() replaces each 0.5 by a random number; in
        sampling 0.5 stays and means no noise."""
        cfg, shape = self.cfg, (len(t), self.cfg.depth, 2 * self.cfg.heads)
        if cfg.route == "random" and not full_model:
            return random_masks(t, cfg)                 # 0 or 1: every switch is forced
        # route "tokens" forces all heads and groups on, route "width" forces all tokens on
        u = lambda route: 1.0 if full_model or cfg.route == route else 0.5
        return F.pad(t.new_full(shape, u("tokens")), (0, self.pos_embed.shape[1]), value=u("width"))

    def width_masks(self, emb, u):
        """E_t (B, D), u (B, N, 2H + L) -> the heads and the groups of all blocks, 2 x (B, N, H)."""
        u1, u2 = (v.unbind(1) for v in u[..., : 2 * self.cfg.heads].chunk(2, dim=-1))
        masks = [(b.attn_rate(emb, v), b.mlp_rate(emb, w)) for b, v, w in zip(self.blocks, u1, u2)]
        return [torch.stack(m, dim=1) for m in zip(*masks)]

    def active_units(self, heads, groups):
        """Masks (B, N, H) -> for each block the indices of its active heads and of its active
        groups (None: all); or None if the images of the batch do not have the same masks.

        The CPU reads the numbers of active units from the GPU in one copy."""
        width = torch.cat([heads, groups], dim=1)                               # (B, 2N, H)
        # One list of floats: are all images alike, then the 2N counts of the first image.
        same, *counts = torch.cat([(width == width[:1]).all()[None], width[0].sum(-1)]).tolist()
        order = width[0].argsort(dim=-1, descending=True, stable=True)          # active ones first
        units = [None if n == len(row) else row[: int(n)] for n, row in zip(counts, order)]
        return list(zip(units[: heads.shape[1]], units[heads.shape[1] :])) if same else None


Model = DyDiT                                           # the name that train.py looks for


def random_masks(t, cfg):
    """The control without routers: t (B,) -> masks (B, N, 2H + L).

    A unit is on if a pseudo-random number, a hash of t and of the unit, is below the share w. It is
    the same share for heads, groups and tokens: a w + (1 - a) w^2 = lambda. If the first head and
    group are always on, the others are on less often."""
    H, L, on = cfg.heads, (cfg.size // cfg.patch) ** 2, int(cfg.always_on and cfg.heads > 1)
    a = (4 * cfg.dim + 2 * L) / (12 * cfg.dim + 2 * L)  # attention's share of a block  (f)
    w = (math.sqrt(a * a + 4 * (1 - a) * cfg.target) - a) / (2 * (1 - a))
    i = torch.arange(cfg.depth * (2 * H + L), device=t.device)
    u = (i * 12.9898 + t.float()[:, None] * 78.233).sin() * 43758.5453  # as graphics shaders do
    u = (u - u.floor()).view(len(t), cfg.depth, -1)                             # (B, N, 2H + L)
    width, tokens = u[..., : 2 * H] < (w * H - on) / (H - on), u[..., 2 * H :] < w
    return torch.cat([width, tokens], dim=-1).float()


@torch.no_grad()
def sort_by_magnitude(model):
    """Sort the heads and the channels of every block, the strongest first. The network computes the
    same function. Strength of a head: |W_v| |W_o|; of a channel: |row of W_1| |column of W_2|."""
    for b in model.blocks:
        wqkv, bqkv, wo, _, w1, b1, w2, _ = (*b.attn.parameters(), *b.mlp.parameters())
        D, H = len(wo), b.attn.heads
        heads = wqkv.view(3, H, -1)[2].norm(dim=1) * wo.view(D, H, -1).norm(dim=(0, 2))  # (H,)
        i = torch.arange(3 * D).view(3, H, -1)[:, heads.argsort(descending=True)].flatten() # (3D,)
        j = (w1.norm(dim=1) * w2.norm(dim=0)).argsort(descending=True)          # (4D,)
        for p, order in ((wqkv, i), (bqkv, i), (wo.mT, i[:D]), (w1, j), (b1, j), (w2.mT, j)):
            p.copy_(p[order])


def from_dense(state, cfg):
    """Called by train.py --init: a trained DiT's state dict -> DyDiT with heads and channels sorted
    by magnitude and every switch on.

    ValueError if the keys are not those of a dense DiT."""
    model = DyDiT(cfg)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or len(missing) != 8 * cfg.depth:     # 8 router tensors per block
        raise ValueError(f"not the weights of a dense DiT: {unexpected or missing or 'routers'}")
    sort_by_magnitude(model)
    return model


def param_groups(model, lr):
    """Called by train.py: the routers have a learning rate of their own."""
    groups = {1.0: [], model.cfg.router_lr: []}
    for name, p in model.named_parameters():
        router = "_rate." in name or "token_selection." in name
        groups[model.cfg.router_lr if router else 1.0] += [p] if p.requires_grad else []
    return [dict(params=params, lr=lr * factor) for factor, params in groups.items()]


def cost(cfg):
    """Cost of one image: GMAC, 1e9 multiply-accumulates in matrix products, with every switch on
    and at the target. Both include the routers; a dense DiT has none. The paper's 118.69 GFLOPs of
    DiT-XL/2 are 118.62 of matrix products plus 4 operations for each element that a LayerNorm
    reads. Idle parameters are 0: what a token does not use is not fixed but learned."""
    L, D = (cfg.size // cfg.patch) ** 2, cfg.dim
    block = 4 * L * D * D + 2 * L * L * D + 8 * L * D * D + 6 * D * D   # qkvo; QK', AV; MLP; adaLN
    routers = L * (D + 1) * (D // 16) + 2 * D * (cfg.heads - cfg.always_on)
    total = cfg.depth * (block + routers) + plain_macs(cfg)
    saved = (1 - cfg.target) * cfg.depth * (block - 6 * D * D)
    return {"idle parameters": 0, "GMAC": total / 1e9, "GMAC at the target": (total - saved) / 1e9}


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
