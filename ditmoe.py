"""DiT-MoE: own eight experts, pay for two.   Fei et al. 2024, arXiv:2407.11633

1. Replace every MLP by E experts and a router. A token runs only the k = 2 experts that the router
   likes best: parameters grow with E, the work of a token with k.
2. The router is one linear layer and a softmax over ALL experts. The probability of a chosen expert
   is its weight, as it is: the two weights of a token do not sum to 1.
3. Shared experts serve every token, unasked. They learn what all tokens need, so that E routed
   experts need not learn it E times over.
4. Balance loss: left alone, a router may feed a few favourites while the others starve. For each
   expert, multiply the share of tokens it got by its mean probability; even use keeps the sum low.
5. Nobody is turned away (no capacity, no dropped token), so a picture does not depend on its batch.

    token t1 -+- router, softmax --- [.1 .5 .1 .3] - top 2 - .5 E2(t1) + .3 E4(t1) -(+)- y1
              +- shared experts ------------------------------------- 1 Es(t1) ------+

    how it is computed             pairs sorted by expert      one product per expert, added back
    t1 -> E2, E4                   E1: t3                      y1 = .5 E2(t1) + .3 E4(t1)
    t2 -> E3, E2        --->       E2: t1 t2          --->     y2 = ...
    t3 -> E1, E4                   E3: t2    E4: t1 t3         y3 = ...

Letters: B batch, C channels, S side of the picture, P side of a patch, L = (S/P)^2 tokens, D width,
H heads, N depth, M of the N blocks have experts, E experts, k chosen per token, h width inside an
expert, T = B*L tokens, R = T*k pairs (token, chosen expert).
Time: t = 0 is data, t = 1 is noise (diffusion.py says more).
Read next: route() and balance_loss(), then MoE.forward().  Below the ruler: plain DiT.
`python ditmoe.py CKPT` shows what the experts of a trained model are chosen for (Figs. 5-7).

Where the paper and the official code (feizc/DiT-MoE) disagree, and what we do
- An expert is a GELU MLP in the text, a SwiGLU of width 4D without biases in the code. Only SwiGLU
  fits the paper's own table of parameters: it is the default here, expert=gelu the other. So XL/2
  with k = 2 multiplies 2.8 times as much as DiT-XL/2, and activates 1.5B of its 4.2B parameters.
- n_s = 2 shared experts are one SwiGLU of width 2D in the code, as here: the same function as two
  of width D. Each is thus a quarter as wide as a routed expert.
- alpha is 0.005 in the paper (our default), 0.01 in the code, which raises an error at alpha = 0.
- Balance is counted over one picture in the paper (scope=image; we average over pictures), over a
  process's batch in the code (scope=batch, our default). We count the batch of ALL processes, so
  that their number does not change the gradient.
- The code does not add the balance loss to the objective but injects its gradient, which fp16 loss
  scaling then shrinks. Here it is a summand like any other, and logged as one.
- In eval mode the official routed experts get no gradient, in training they accept float32 only.
  Here one path serves both modes and every dtype; the router computes in float32 at least.
- "Every e-th block has experts" is in the text, every block in the code: moe_layers. Which MLP the
  other blocks keep is not said; here it is DiT's.
- G has 32 experts in the text, 16 in the code; its 16.5B parameters need 16.
- Upcycling (from_dense) is not in the paper. The official script copies one expert of a one-expert
  MoE and does not preserve the function; ours starts from a plain DiT and does.
- The official rectified-flow weights (XL, G) embed t in [0, 1] as it is: load them with
  time_scale=1. New models embed 1000 t, as DDPM does."""

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
    dim: int = 384              # D. S: 384, B: 768, L: 1024, XL: 1152, G: 1408
    depth: int = 12             # N. S: 12,  B: 12,  L: 24,   XL: 28,   G: 40
    heads: int = 6              # H. S: 6,   B: 12,  L: 16,   XL: 16,   G: 16
    learn_sigma: bool = True    # 2C output channels, the second C for DDPM's variance
    time_scale: float = 1000.0  # the network embeds time_scale * t; released XL and G: 1
    experts: int = 8            # E. "8E2A" is experts = 8, k = 2; also 16E2A
    k: int = 2                  # experts that a token runs
    shared: int = 2             # n_s: 1, 2 or 4 shared experts, each D wide inside; 0: none
    hidden: int = 4             # h / D of a routed expert: 4
    expert: str = "swiglu"      # swiglu | gelu (DiT's own MLP)
    renormalize: bool = False   # a token's weights sum to 1; with k = 1 its router learns nothing
    alpha: float = 0.005        # weight of the balance loss; tried: 0, 0.005, 0.01, 0.05
    scope: str = "batch"        # batch | image: among which tokens experts must be in balance
    moe_layers: str = "all"     # all | deep | shallow (half of them) | 2 (every 2nd block), 3 ...
    qk_norm: bool = False       # LayerNorm on queries and keys: released XL and G


# TINY's experts are D wide, not 4D: two of them and one shared expert are 9 D^2 multiplications per
# token, the tiny DiT's MLP is 8 D^2. So the two compare at nearly equal work.
TINY = Config(size=28, patch=4, channels=1, classes=10, dim=128, depth=6, heads=4,
              experts=8, k=2, hidden=1, shared=1)
SIZES = {"S": dict(dim=384, depth=12, heads=6), "B": dict(dim=768, depth=12, heads=12),
         "L": dict(dim=1024, depth=24, heads=16), "XL": dict(dim=1152, depth=28, heads=16),
         "G": dict(dim=1408, depth=40, heads=16)}


def route(P, k, renormalize=False):
    """The paper: every token takes its k most probable experts, at their probabilities.

    P (..., E), rows sum to 1 -> weight (..., k), chosen (..., k) expert ids, best first."""
    weight, chosen = P.topk(k, dim=-1)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight, chosen


def balance_loss(P, chosen, scope="batch"):
    """Expert-level balance loss, sum of f_i p_i: 1 when even, E / k when k experts take everything.

    P (B, L, E), chosen (B, L, k) -> loss, and the share of all pairs that each expert got (E,).
    f is a count: gradient flows through p only, and lowers the logits of experts with large f."""
    pairs = chosen.flatten(1)                                               # (B, L*k)
    count = P.new_zeros(len(P), P.shape[-1])
    count = count.scatter_add(1, pairs, torch.ones_like(pairs, dtype=P.dtype))      # (B, E)
    p = P.mean(1)                                                           # (B, E)
    if scope == "batch":
        count, p = count.sum(0, keepdim=True), p.mean(0, keepdim=True)      # (1, E)
        if torch.is_grad_enabled() and dist.is_initialized():
            dist.all_reduce(count)                      # training: the batch of all processes
    share = count / count.sum(1, keepdim=True)                              # (B or 1, E)
    f = P.shape[-1] * share                             # E / (k tokens) * count: 1 is a fair share
    return (f * p).sum(1).mean(), share.mean(0)


class Router(nn.Module):
    """x (B, L, D) -> P (B, L, E), a softmax over all experts.

    In float32 (or float64) whatever the model computes in: in bf16 many probabilities would tie."""

    full_precision = True                   # sharded training must not round these weights

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.experts, cfg.dim))
        nn.init.uniform_(self.weight, -cfg.dim**-0.5, cfg.dim**-0.5)

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)


def swiglu(z):
    gate, up = z.chunk(2, dim=-1)                                           # (..., h) each
    return F.silu(gate) * up


def gelu(z):
    return F.gelu(z, approximate="tanh")


class Experts(nn.Module):
    """E networks D -> h -> D, their weights stacked.  x (R, D), rows sorted by expert -> (R, D).

    swiglu: (silu(x W_g) * x W_u) W_d, w1 = [W_g W_u] and w2 = W_d. gelu: DiT's Mlp, with biases.
    owner (R,) names each row's expert, ascending. An expert without rows has a gradient of zero."""

    def __init__(self, cfg):
        super().__init__()
        E, D, h = cfg.experts, cfg.dim, cfg.hidden * cfg.dim
        self.act = swiglu if cfg.expert == "swiglu" else gelu
        self.w1 = nn.Parameter(torch.empty(E, D, 2 * h if cfg.expert == "swiglu" else h))
        self.w2 = nn.Parameter(torch.empty(E, h, D))    # (in, out): faster than Linear's (out, in)
        self.b1 = nn.Parameter(torch.zeros(E, h)) if cfg.expert == "gelu" else None
        self.b2 = nn.Parameter(torch.zeros(E, D)) if cfg.expert == "gelu" else None
        xavier(*(w for stack in (*self.w1.data.split(h, dim=2), self.w2.data) for w in stack))

    def forward(self, x, owner):
        stacks = [w if w is None else w.to(x.dtype) for w in (self.w1, self.w2, self.b1, self.b2)]
        E = len(self.w1)
        expert = torch.arange(E, device=x.device)
        ends = torch.searchsorted(owner, expert, right=True, out_int32=True)    # (E,)
        if x.dtype == torch.bfloat16 and x.device.type in ("cuda", "meta") and x.shape[1] % 8 == 0:
            return self.network(x, *stacks, lambda x, w, b: grouped_linear(x, w, b, ends, owner))
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()   # waits for a GPU; the way above not
        unbound = ([None] * E if w is None else w.unbind() for w in stacks)
        return torch.cat([self.one(*own) for own in zip(x.split(sizes), *unbound)])

    def one(self, x, *weights):
        """One expert, x (n, D) -> (n, D). A CPU builds a bf16 product anew for every number of rows
        it has not seen: rounding n up makes numbers recur, and a training step much faster."""
        if x.dtype != torch.bfloat16:                       # padding by nothing would copy x
            return self.network(x, *weights, one_linear)
        return self.network(F.pad(x, (0, 0, 0, -len(x) % 32)), *weights, one_linear)[: len(x)]

    def network(self, x, w1, w2, b1, b2, linear):
        return linear(self.act(linear(x, w1, b1)), w2, b2)


def one_linear(x, w, b):
    """One expert's linear layer.  x (n, in), w (in, out), b (out,) or None."""
    return x @ w if b is None else torch.addmm(b, x, w)                     # (n, out)


def grouped_linear(x, w, b, ends, owner):
    """Every expert's linear layer in one kernel.  x (R, in), w (E, in, out), b (E, out) or None."""
    x = F.grouped_mm(x, w, offs=ends)                                       # (R, out)
    return x if b is None else x + b.index_select(0, owner)


class SwiGLU(nn.Module):
    """The shared experts: n_s of them, each D wide inside, are one of h = n_s D."""

    def __init__(self, dim, h):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(2 * h, dim)), nn.Parameter(torch.empty(dim, h))
        xavier(*self.w1.data.split(h), self.w2.data)

    def forward(self, x):
        return F.linear(swiglu(F.linear(x, self.w1)), self.w2)


class MoE(nn.Module):
    """y = sum over the chosen e of P_e E_e(x), plus Es(x).  x (B, L, D) -> (B, L, D), notes.

    notes: "balance" not yet weighted, "load" (E,) shares of pairs, "experts" (B, L, k) ids."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.gate, self.experts = cfg, Router(cfg), Experts(cfg)
        if cfg.shared:
            form = SwiGLU if cfg.expert == "swiglu" else Mlp
            self.shared_experts = form(cfg.dim, cfg.shared * cfg.dim)

    def forward(self, x):
        P = self.gate(x)                                                    # (B, L, E)
        weight, chosen = route(P, self.cfg.k, self.cfg.renormalize)         # (B, L, k) each
        balance, load = balance_loss(P, chosen, self.cfg.scope)
        y = self.dispatch(x.flatten(0, 1), weight.flatten(), chosen.flatten()).view(x.shape)
        if self.cfg.shared:
            y = y + self.shared_experts(x)
        return y.to(x.dtype), dict(balance=balance, load=load, experts=chosen)

    def dispatch(self, x, weight, chosen):
        """Every pair through its expert.  x (T, D); weight, chosen (R,), k per token -> (T, D).

        Sorted by expert, so that an expert meets its tokens as one block. There are R = T*k pairs
        whoever is chosen: no shape depends on the routing, and nothing waits to learn one."""
        owner, pair = chosen.sort(stable=True)                              # (R,) each
        token = pair // self.cfg.k                                          # (R,)
        y = x.to(amp_dtype(x)).index_select(0, token)                       # (R, D)
        y = self.experts(y, owner).to(weight.dtype)                         # (R, D)  now float32
        y = y * weight.index_select(0, pair)[:, None]                       # P_e E_e(x)
        return y.new_zeros(x.shape).index_add(0, token, y)                  # (T, D)


class Block(nn.Module):
    """adaLN-Zero with experts in the MLP's place.  x (B, L, D), c (B, D) -> (B, L, D), notes."""

    def __init__(self, cfg, routed):
        super().__init__()
        self.routed = routed
        self.norm1 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        self.attn = (NormedAttention if cfg.qk_norm else Attention)(cfg.dim, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=1e-6, elementwise_affine=False)
        if routed:
            self.moe = MoE(cfg)
        else:
            self.mlp = Mlp(cfg.dim, 4 * cfg.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)            # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (B, L, D)
        y = modulate(self.norm2(x), shift2, scale2)                         # (B, L, D)
        y, notes = self.moe(y) if self.routed else (self.mlp(y), {})        # (B, L, D)
        return x + gate2 * y, notes


class NormedAttention(nn.Module):
    """Attention with a LayerNorm over each head's queries and keys (released XL and G)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)        # (B, L, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, L, D/H) each
        x = attend(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)       # (B, H, L, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))                # (B, L, D)


class DiTMoE(nn.Module):
    """x (B, C, S, S), t (B,) in [0, 1], y (B,) int in 0..classes -> prediction, aux.

    prediction (B, C, S, S), or (B, 2C, S, S) with learn_sigma. aux: "balance_loss", alpha * M when
    experts are used evenly, alpha * M * E / k when k of them take everything; "load" (M, E), shares
    of pairs; "experts" (M, B, L, k), chosen ids, best first. No "map": all tokens cost the same."""

    def __init__(self, cfg):
        super().__init__()
        if (not 1 <= cfg.k <= cfg.experts or cfg.hidden < 1 or cfg.shared < 0
                or cfg.expert not in ("swiglu", "gelu") or cfg.scope not in ("batch", "image")):
            raise ValueError(f"k {cfg.k}, hidden {cfg.hidden}, shared {cfg.shared}, expert "
                             f"{cfg.expert!r}, scope {cfg.scope!r}: k is 1 to {cfg.experts}, "
                             "hidden at least 1, shared at least 0, expert swiglu or gelu, scope "
                             "batch or image")
        routed = moe_layers(cfg)
        self.cfg = cfg
        self.x_embedder = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(sincos_2d(cfg), requires_grad=False)  # (1, L, D), fixed
        self.t_embedder = TimestepEmbedder(cfg)
        self.y_embedder = LabelEmbedder(cfg)
        self.blocks = nn.ModuleList(Block(cfg, i in routed) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg)
        initialize(self)

    def forward(self, x, t, y):
        x, notes = self.x_embedder(x) + self.pos_embed, []                  # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder(y)                         # (B, D)
        for block in self.blocks:
            x, note = block(x, c)                                           # (B, L, D)
            notes += [note] if note else []
        aux = {key: torch.stack([note[key] for note in notes]) for key in notes[0]}
        aux["balance_loss"] = self.cfg.alpha * aux.pop("balance").sum()     # over layers
        return unpatchify(self.final_layer(x, c), self.cfg), aux            # (B, C or 2C, S, S)


Model = DiTMoE                                          # the name train.py and sample.py ask for


def moe_layers(cfg):
    """The M blocks that have experts, as a range. In the paper deep experts beat shallow ones."""
    N, which = cfg.depth, str(cfg.moe_layers)
    layers = {"all": range(N), "deep": range(N // 2, N), "shallow": range(N // 2)}.get(which)
    if which.isdigit() and int(which):
        layers = range(int(which) - 1, N, int(which))   # the last of every so many
    if not layers:
        raise ValueError(f"moe_layers {which}: all, deep, shallow or a number from 1 to {N}")
    return layers


def amp_dtype(x):
    """What autocast would give a matrix product on x; the meta device knows no autocast."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def xavier(*matrices):
    for w in matrices:                      # one by one: a stack of matrices has other fans, and so
        nn.init.xavier_uniform_(w)          # has [W_g; W_u]


def cost(cfg):
    """Of one picture: 1e9 multiply-accumulates, and how many parameters a token does not use.

    The paper's "Gflops" are multiply-accumulates too, but leave out the two products inside
    attention (queries by keys, weights by values)."""
    L, D, N, M = (cfg.size // cfg.patch) ** 2, cfg.dim, cfg.depth, len(moe_layers(cfg))
    h, matrices, biases = cfg.hidden * D, 3, 0                              # swiglu
    if cfg.expert == "gelu":
        matrices, biases = 2, h + D
    moe = L * (cfg.experts * D + matrices * D * (cfg.k * h + cfg.shared * D))
    macs = M * moe + (N - M) * 8 * L * D * D + N * (4 * L + 6) * D * D + plain_macs(cfg)
    return {"idle parameters": M * (cfg.experts - cfg.k) * (matrices * D * h + biases),
            "GMAC": (macs + N * 2 * L * L * D) / 1e9,
            "GMAC without QK', AV (the paper's Gflops)": macs / 1e9}


# ---- weights from elsewhere


def from_official(state, heads=None, k=None, **overrides):
    """DiT-MoE from a released state dict of either layout; what shapes tell is read from them.

    heads: needed where attention has no q/k norm (S 6, B 12). k: needed, 2 in released weights.
    time_scale=1 for the rectified-flow weights (XL, G), which embed t in [0, 1] as it is."""
    state, fields = read_official(state, heads or 1)
    if "blocks.0.moe.gate.weight" not in state:
        raise ValueError("not a DiT-MoE checkpoint: it has no blocks.0.moe.gate.weight")
    q_norm = state.get("blocks.0.attn.q_norm.weight")                       # (D/H,)
    if q_norm is None and heads is None:
        raise ValueError("a checkpoint without q/k norm does not tell its heads: pass heads= "
                         "(S 6, B 12, L, XL 16)")
    if k is None:
        raise ValueError("a checkpoint does not tell how many experts a token runs: pass k= (2)")
    D, E = fields["dim"], len(state["blocks.0.moe.gate.weight"])
    width = {key.split(".")[3]: w.shape[1] for key, w in state.items() if "down_proj" in key}
    fields |= dict(k=k, experts=E, hidden=width["experts"] // D, qk_norm=q_norm is not None,
                   shared=width.get("shared_experts", 0) // D, heads=heads or D // len(q_norm))
    for moe in (f"blocks.{i}.moe." for i in range(fields["depth"])):
        stacks = zip(*(fuse(state, f"{moe}experts.{e}") for e in range(E)))
        w1, w2 = (torch.stack(stack).mT.contiguous() for stack in stacks)
        state[f"{moe}experts.w1"], state[f"{moe}experts.w2"] = w1, w2
        if fields["shared"]:
            shared = f"{moe}shared_experts"
            state[f"{shared}.w1"], state[f"{shared}.w2"] = fuse(state, shared)
    model = DiTMoE(replace(Config(), **(fields | overrides)))
    model.load_state_dict({key.replace(".Wqkv.", ".qkv.").replace(".out_proj.", ".proj."): w
                           for key, w in state.items()})
    return model


def fuse(state, net):
    """Take one official SwiGLU out of a state dict -> w1 (2h, D), w2 (D, h)."""
    gate, up, down = (state.pop(f"{net}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


def to_official(model):
    """The inverse: a state dict that the authors' code loads."""
    cfg, state = model.cfg, {key: w.detach().clone() for key, w in model.state_dict().items()}
    if cfg.expert != "swiglu" or len(moe_layers(cfg)) < cfg.depth:
        raise ValueError("the official layout has SwiGLU experts in every block and knows no other")
    for moe in (f"blocks.{i}.moe." for i in range(cfg.depth)):
        stacks = zip(state.pop(f"{moe}experts.w1").mT, state.pop(f"{moe}experts.w2").mT)
        nets = {f"{moe}experts.{e}": weights for e, weights in enumerate(stacks)}
        if cfg.shared:
            shared = f"{moe}shared_experts"
            nets[shared] = state.pop(f"{shared}.w1"), state.pop(f"{shared}.w2")
        for net, (w1, w2) in nets.items():
            for name, w in zip(("gate", "up", "down"), (*w1.chunk(2), w2)):
                state[f"{net}.{name}_proj.weight"] = w.clone()
    if cfg.qk_norm:
        state = {key.replace("attn.qkv.", "attn.Wqkv.").replace("attn.proj.", "attn.out_proj."): w
                 for key, w in state.items()}
    return state


def from_dense(state, cfg):
    """Sparse upcycling: a trained DiT's weights -> a DiT-MoE that computes the same, to train on.

    Every expert is a copy of the MLP (hence gelu, 4D), the weights of a token sum to 1 (hence
    renormalize), the shared experts' output is 0. Copies part because each sees other tokens."""
    if cfg.qk_norm:
        raise ValueError("qk_norm: a dense DiT has none, so this could not start as its function")
    model = DiTMoE(replace(cfg, expert="gelu", hidden=4, renormalize=True))
    twin = {"experts.w1": "fc1.weight", "experts.b1": "fc1.bias",
            "experts.w2": "fc2.weight", "experts.b2": "fc2.bias"}
    for key, w in model.state_dict().items():
        block, moe, name = key.partition(".moe.")
        source = f"{block}.mlp.{twin[name]}" if name in twin else key
        if name == "gate.weight":
            nn.init.normal_(w, std=0.02)
        elif name.startswith("shared_experts.fc2"):
            nn.init.zeros_(w)
        elif source in state:
            one = state[source]                         # one MLP fills all E rows of a stack
            w.copy_((one.T if name in ("experts.w1", "experts.w2") else one).expand_as(w))
        elif not name.startswith("shared_experts"):
            raise ValueError(f"not a dense DiT of this depth: it has no {source}")
    return model


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


if __name__ == "__main__":                              # python ditmoe.py CKPT
    from experiments.specialisation import cli
    sys.exit(cli(sys.argv[1:]))
