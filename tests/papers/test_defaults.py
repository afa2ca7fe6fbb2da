"""The numbers that a model begins with: every default of every Config and every initial tensor,
against tables with their sources; and what stands between a block's tokens and its experts."""

import importlib
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from helpers import batch, small, wake

import ditmoe
import racedit
from common.checkpoint import MODELS
from diffusion import DDPM, RectifiedFlow, StepRNG

every_model = pytest.mark.parametrize("name", MODELS)

# ------------------------------------------------------------------------ defaults

DIT = dict(                             # DiT-S/2 on ImageNet 256 x 256
    size=32, channels=4,                # DiT, Sec. 3.1: latents 32 x 32 x 4
    patch=2, dim=384, depth=12, heads=6,        # DiT, Table 1 and Sec. 3.2
    classes=1000, learn_sigma=True,     # DiT's models.py
    time_scale=1000.0)                  # DiT embeds the steps 0..999
DEFAULTS = {
    "dit": DIT,
    "dtr": DIT | dict(
        alpha=4.0, beta=0.8, tasks=1000,        # official code
        route="window", route_seed=0, per_block=False),
    "ditmoe": DIT | dict(
        experts=8, k=2, shared=2,       # the paper's 8E2A; n_s = 2 in the official code
        hidden=4, expert="swiglu",      # official code: 4D wide, fits the paper's parameters
        renormalize=False,              # official code: it has a switch for this, off
        alpha=0.005,                    # the paper (its code: 0.01)
        scope="batch",                  # official code: all tokens of a forward
        moe_layers="all",               # official code: every block
        qk_norm=False),                 # official code: only for released XL and G
    "racedit": DIT | dict(
        experts=32, k=4, split=4,       # Table 4: 4-in-32
        route="race", gate="identity",  # Tables 1 and 6: the best
        momentum=0.99,                  # re-implementation B
        sim=1e-4, plr=1e-2,             # re-implementation A
        balance=0.0,                    # Table 2: similarity loss instead
        pool="local"),                  # our choice
    "dydit": DIT | dict(
        target=0.5, weight=2.0,         # official code: lambda 0.5; weight of the FLOPs loss
        anneal_steps=1000, anneal_start=100,    # official code
        full_model_steps=0,             # the paper: none for S and B
        hard_gates_from=0,              # our option, off
        tau=5.0, head_bias=15.0, channel_bias=15.0, token_bias=35.0,    # official code
        router_lr=1.0, always_on=True,  # official code: one rate; the first head has no switch
        route="both")}                  # the paper: TDW and SDT
SIZES = dict(S=(384, 12, 6), B=(768, 12, 12), L=(1024, 24, 16), XL=(1152, 28, 16))   # DiT, Table 1
MORE = {"ditmoe": dict(G=(1408, 40, 16)), "racedit": dict(M=(960, 16, 16))}     # their own tables


@every_model
def test_every_default_is_that_of_the_paper_or_the_official_code(name):
    config = importlib.import_module(name).Config
    assert {f.name: f.default for f in fields(config)} == DEFAULTS[name]
    assert all(type(f.default) is type(DEFAULTS[name][f.name]) for f in fields(config))


@every_model
def test_every_size_is_that_of_the_papers_tables(name):
    module, sizes = importlib.import_module(name), SIZES | MORE.get(name, {})
    assert set(module.SIZES) == set(sizes)
    for letter, (dim, depth, heads) in sizes.items():
        for patch in (2, 4, 8):
            expected = DEFAULTS[name] | dict(dim=dim, depth=depth, heads=heads, patch=patch)
            expected |= dict(experts=16) if letter == "G" else {}       # 16.5 B parameters
            assert vars(module.size(f"{letter}/{patch}")) == expected


def test_the_defaults_of_both_diffusions_and_of_the_weightings():
    """DiT: linear schedule, no weighting. SD3: logit-normal times. Min-SNR 5, P2 1 (k = 1); 8
    clusters of ANT-UW: DTR's official code."""
    assert RectifiedFlow().options["times"] == "logit-normal" and DDPM.T == 1000
    options = DDPM().options
    assert (options["schedule"], options["weighting"], options["clusters"]) == ("linear", "none", 8)
    assert DDPM(weighting="min-snr").options["gamma"] == 5
    assert DDPM(weighting="p2").options["gamma"] == 1


# ------------------------------------------------------------------------ initial tensors

# What a tensor begins with: a constant, ("normal", std), ("uniform", bound), or ("xavier", how its
# matrices are cut out of it). Xavier's bound is sqrt(6 / (fan in + fan out)).
ONE = ("xavier", lambda w: [w.flatten(1)])              # a matrix, or a convolution as one
PLAIN = {                               # DiT's initialize_weights(), in the official models.py
    "pos_embed": "sincos",
    r"x_embedder.proj.weight": ONE, r"x_embedder.proj.bias": 0.0,
    r"t_embedder.mlp.[02].weight": ("normal", 0.02), r"t_embedder.mlp.[02].bias": 0.0,
    r"y_embedder.embedding_table.weight": ("normal", 0.02),
    r"blocks.\d.attn.(qkv|proj).weight": ONE, r"blocks.\d.attn.(qkv|proj).bias": 0.0,
    r"blocks.\d.mlp.fc[12].weight": ONE, r"blocks.\d.mlp.fc[12].bias": 0.0,
    r"(blocks.\d|final_layer).adaLN_modulation.1.(weight|bias)": 0.0,
    r"final_layer.linear.(weight|bias)": 0.0}
EXPERTS = {                             # each matrix of each expert by itself, as nn.Linear's are
    r"blocks.\d.moe.experts.w1": ("xavier", lambda w: list(w)),
    r"blocks.\d.moe.experts.w2": ("xavier", lambda w: list(w)),
    r"blocks.\d.moe.experts.b[12]": 0.0}
INITIAL = {
    "dit": PLAIN, "dtr": PLAIN,
    "ditmoe": PLAIN | EXPERTS | {       # official code: the router is no nn.Linear: Kaiming, a = 5
        r"blocks.\d.moe.gate.weight": ("uniform", 64**-0.5),
        r"blocks.\d.moe.experts.w1": ("xavier", lambda w: [m for e in w for m in e.chunk(2, 1)]),
        r"blocks.\d.moe.shared_experts.w1": ("xavier", lambda w: w.chunk(2)),
        r"blocks.\d.moe.shared_experts.w2": ONE},
    "ditmoe gelu": PLAIN | EXPERTS | {
        r"blocks.\d.moe.gate.weight": ("uniform", 64**-0.5),
        r"blocks.\d.moe.shared_experts.fc[12].weight": ONE,
        r"blocks.\d.moe.shared_experts.fc[12].bias": 0.0,
        r"blocks.\d.attn.[qk]_norm.weight": 1.0, r"blocks.\d.attn.[qk]_norm.bias": 0.0},
    "racedit": PLAIN | EXPERTS | {      # re-implementation A; biases of 0 are ours
        r"blocks.\d.moe.router.(hidden|score|target).weight": ONE,
        r"blocks.\d.moe.router.(hidden|score|target).bias": 0.0,
        r"blocks.\d.moe.tau": math.nan},                # no K-th score has been seen
    "dydit": PLAIN | {                  # official code: DiT's, then the biases
        r"blocks.\d.(attn|mlp)_rate.router.weight": ONE,
        r"blocks.\d.token_selection.mlp_head.[02].weight": ONE,
        r"blocks.\d.token_selection.mlp_head.0.bias": 0.0,
        r"blocks.\d.attn_rate.router.bias": 15.0, r"blocks.\d.mlp_rate.router.bias": 14.0,
        r"blocks.\d.token_selection.mlp_head.2.bias": 35.0}}


def new_model(name):
    name, *form = name.split()
    module = importlib.import_module(name)
    own = {"ditmoe": dict(experts=4), "racedit": dict(experts=8),
           "dydit": dict(channel_bias=14.0)}.get(name, {})      # told apart from head_bias
    own |= dict(expert="gelu", qk_norm=True, hidden=3) if form else {}
    cfg = replace(module.Config(), size=8, dim=64, depth=2, heads=4, classes=30, **own)
    return module.Model(cfg)


def assert_drawn(w, bound=None, std=None):
    """Are these numbers uniform in -bound..bound, or normal? All limits are five deviations of such
    a sample."""
    n, std = w.numel(), std or bound / math.sqrt(3)
    kurtosis = 1.8 if bound else 3
    noise = 5 / math.sqrt(n)
    assert w.mean().abs() <= noise * std and len(w.unique()) > 0.99 * n
    found = w.double().square().mean().sqrt().item()
    assert abs(found / std - 1) <= noise * math.sqrt(kurtosis - 1) / 2
    if bound:
        assert bound * (1 - 12 / n) <= w.abs().max() <= bound * (1 + 1e-6)
    elif n > 1000:
        assert abs((w / found).pow(4).mean() - 3) < 24 / math.sqrt(n)


@pytest.mark.parametrize("name", INITIAL)
def test_every_tensor_begins_as_in_the_official_code(name):
    model, left = new_model(name), dict(INITIAL[name])
    assert set(INITIAL) - {"ditmoe gelu"} == set(MODELS)
    for key, w in model.state_dict().items():
        pattern, = [p for p in INITIAL[name] if re.fullmatch(p, key)]
        left.pop(pattern, None)
        how = INITIAL[name][pattern]
        if how == "sincos":
            assert torch.allclose(w, sincos(4, 64), atol=1e-6) and not model.pos_embed.requires_grad
        elif isinstance(how, float):
            assert torch.equal(w.nan_to_num(7.5), torch.full_like(w, how).nan_to_num(7.5)), key
        elif how[0] == "normal":
            assert_drawn(w, std=how[1])
        elif how[0] == "uniform":
            assert_drawn(w, how[1])
        else:
            for m in how[1](w):
                assert_drawn(m, math.sqrt(6 / sum(m.shape)))
    unused = {k for k in left if not re.search(r"mlp.fc|experts.b", k)}     # no MLP beside experts
    assert not unused, f"nothing is called {unused}"
    assert all(p.requires_grad for k, p in model.named_parameters() if k != "pos_embed")


def test_upcycled_experts_begin_as_the_mlp_and_their_router_as_a_small_normal_matrix():
    """N(0, 0.02) is our choice: a softmax over such logits hardly prefers an expert."""
    dense = wake(new_model("dit"))
    model = ditmoe.from_dense(dense.state_dict(), replace(new_model("ditmoe").cfg, qk_norm=False))
    for sparse, block in zip(model.blocks, dense.blocks):
        assert_drawn(sparse.moe.gate.weight, std=0.02)
        for e in range(4):
            for ours, theirs in (("1", block.mlp.fc1), ("2", block.mlp.fc2)):
                assert torch.equal(getattr(sparse.moe.experts, f"w{ours}")[e], theirs.weight.T)
                assert torch.equal(getattr(sparse.moe.experts, f"b{ours}")[e], theirs.bias)
        assert not sparse.moe.shared_experts.fc2.weight.any()
        assert_drawn(sparse.moe.shared_experts.fc1.weight, math.sqrt(6 / (64 + 2 * 64)))


def sincos(n, D):
    """MAE's fixed embedding, number by number: columns first, sines before cosines."""
    table = torch.zeros(1, n * n, D, dtype=torch.float64)
    for row in range(n):
        for column in range(n):
            for i in range(D // 4):
                omega = 1 / 10000 ** (i / (D / 4))
                for part, angle in enumerate((column * omega, row * omega)):
                    at = part * D // 2 + i
                    table[0, row * n + column, at] = math.sin(angle)
                    table[0, row * n + column, at + D // 4] = math.cos(angle)
    return table.float()


# ------------------------------------------------------------------------ routers


def steps_of_a_block(model, block, router, experts):
    """Run the model -> what the block's MLP norm, its router and its experts get, c, and the
    block's output."""
    seen = {}
    hooks = [(block.norm2, "h"), (router, "router"), (experts, "experts")]
    handles = [module.register_forward_pre_hook(lambda m, args, key=key: seen.update(
        {key: args[0]})) for module, key in hooks]
    handles.append(block.register_forward_hook(lambda m, args, out: seen.update(
        c=args[1], out=out[0])))
    handles.append(block.moe.register_forward_hook(lambda m, args, out: seen.update(y=out[0])))
    x, y = batch(model.cfg)
    with torch.no_grad():
        model(x.double(), torch.rand(4).double(), y)
    [handle.remove() for handle in handles]
    return seen


@pytest.mark.parametrize("name", ["ditmoe", "racedit"])
def test_router_and_experts_get_the_modulated_tokens_and_the_last_gate_scales_their_sum(name):
    module, cfg = small(name)
    model = wake(module.Model(cfg), std=0.3).double()
    block = model.blocks[1]
    seen = steps_of_a_block(model, block, block.moe.gate if name == "ditmoe" else block.moe.router,
                            block.moe.experts)
    h, layer = seen["h"], block.adaLN_modulation[1]
    six = torch.sigmoid(seen["c"]) * seen["c"] @ layer.weight.T + layer.bias    # of SiLU(c)
    shift, scale, gate = (six[:, None, i * 64 : (i + 1) * 64] for i in (3, 4, 5))
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    tokens = normed * (1 + scale) + shift
    for key in ("router", "experts"):
        assert (seen[key].view(tokens.shape) - tokens).abs().max() < 1e-9, key
    assert (seen["out"] - (h + gate * seen["y"])).abs().max() < 1e-9
    assert seen["y"].abs().max() > 0.01


def erf_gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("k, split, width", [(1, 4, 64), (4, 2, 128), (2, 1, 256)])
def test_race_dits_experts_are_a_share_of_the_mlp_wide_whatever_k_is(k, split, width):
    moe = racedit.MoE(replace(small("racedit")[1], k=k, split=split))
    assert moe.experts.w1.shape == (8, 64, width) and moe.experts.w2.shape == (8, width, 64)


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", ["dit", "dtr", "ditmoe", "dydit"])
def test_the_mlp_of_dit_has_the_gelu_in_its_tanh_form(name):
    module, x = importlib.import_module(name), torch.randn(1, 50, 16).double()
    mlp = module.Mlp(16, 64).double()
    expected = tanh_gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    ours = [mlp(x)] + ([module.mlp(mlp, x, 4)] if name == "dydit" else [])
    assert all((y - expected).abs().max() < 1e-12 for y in ours)


@pytest.mark.parametrize("module", [ditmoe, racedit])
def test_an_expert_has_the_gelu_in_its_tanh_form_or_a_swiglu(module):
    x = torch.randn(50, 16).double()
    gate, up = x.chunk(2, dim=1)
    assert (module.gelu(x) - tanh_gelu(x)).abs().max() < 1e-12
    assert (module.swiglu(x) - gate / (1 + (-gate).exp()) * up).abs().max() < 1e-12


def test_race_dits_router_is_two_layers_with_the_exact_gelu():
    router, x = racedit.Router(small("racedit")[1]).double().train(), torch.randn(50, 64).double()
    for bias in (router.hidden.bias, router.score.bias, router.target.bias):
        torch.nn.init.normal_(bias)
    r = erf_gelu(x @ router.hidden.weight.T + router.hidden.bias)
    logits, target = router(x)
    assert (logits - (r @ router.score.weight.T + router.score.bias)).abs().max() < 1e-9
    assert (target - (r @ router.target.weight.T + router.target.bias)).abs().max() < 1e-9


def test_the_target_that_a_router_predicts_has_the_patch_order_of_dit():
    """Inside a patch: row, column, channel, the channel fastest. Four channels, patches of 2."""
    cfg = replace(small("racedit")[1], size=6, dim=32)
    moe = racedit.MoE(cfg).train()
    pixels = torch.arange(2 * 9 * 16.0).view(2, 9, 16)
    moe.router.register_forward_hook(lambda m, args, out: (out[0], pixels))
    image = moe(torch.randn(2, 9, 32))[1]["target_prediction"]
    assert image.shape == (2, 4, 6, 6)
    for b, c, row, column in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        token, place = row // 2 * 3 + column // 2, row % 2 * 2 + column % 2
        assert image[b, c, row, column] == pixels[b, token, place * 4 + c]


def test_race_dits_losses_are_weighted_sums_over_layers(monkeypatch):
    """With layers that say 1, 2, 4 and 10, 20, 40, and whose targets are wrong by 1, 2 and 3."""
    cfg = replace(small("racedit")[1], depth=3, sim=0.5, balance=0.25, plr=0.125)
    model, said = racedit.Model(cfg).train(), dict(similarity=[1.0, 2, 4], balance=[10.0, 20, 40])
    for name, values in said.items():
        monkeypatch.setattr(racedit, f"{name}_loss", lambda logits, assigned, values=values: (
            logits.new_tensor(values.pop(0))))
    x0, y = torch.zeros(4, 4, 8, 8), torch.arange(4)

    class Still(RectifiedFlow):         # a flow without noise: the velocity is 0

        def sample_times_and_noise(self, x0, rng):
            return torch.full((len(x0),), 0.5), torch.zeros_like(x0)
    for error, block in enumerate(model.blocks, 1):
        torch.nn.init.zeros_(block.moe.router.target.weight)
        torch.nn.init.constant_(block.moe.router.target.bias, error)
    value, aux = racedit.loss(Still(), model, x0, y, 0, StepRNG(0, 0, 4, torch.arange(4)))
    assert value == 0 and {k: v.item() for k, v in aux.items() if k.endswith("_loss")} == dict(
        sim_loss=0.5 * 7, balance_loss=0.25 * 70, plr_loss=0.125 * (1 + 4 + 9))
