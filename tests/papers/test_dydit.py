"""DyDiT (arXiv 2410.03456): what the paper says, checked."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import wake
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import dit
import dydit

SMALL = replace(dydit.TINY, size=16, patch=2, dim=64, depth=3, heads=4)      # 64 tokens


def as_dit(cfg):
    """The same network for dit.py."""
    return dit.Config(**{k: getattr(cfg, k) for k in dit.Config.__dataclass_fields__})


def inputs(cfg, B=3, t=0.4, seed=0, dtype=torch.float32):
    """x, t, y; all images at one time, or at times of their own if t is None."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, cfg.channels, cfg.size, cfg.size, generator=g).to(dtype)
    t = torch.rand(B, generator=g) if t is None else torch.full((B,), t)
    return x, t, torch.arange(B) % (cfg.classes + 1)


def router_layers(block):
    """The three layers whose outputs are logits: heads, groups, tokens."""
    return block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]


def mixed(cfg=SMALL, seed=0, spread=4.0):
    """An awake network. Some of its switches are on and some off, and others at another time."""
    model = wake(dydit.DyDiT(cfg), seed=seed).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.t_embedder.mlp[::2]:             # a new one hardly tells times apart
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.1)
        for layer in (layer for b in model.blocks for layer in router_layers(b)):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * spread)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=g))
    return model


@torch.no_grad()
def set_logits(model, *logits):
    """Routers that ignore their input: logits of heads, groups, tokens; None leaves a router."""
    for b in model.blocks:
        for layer, value in zip(router_layers(b), logits):
            if value is not None:
                layer.weight.zero_()
                layer.bias.fill_(value)
    return model


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def furthest(a, b):
    return (a - b).abs().max().item()


def step_rng(B=8, step=0):
    return diffusion.StepRNG(0, step, B, torch.arange(B))


@pytest.fixture
def sliced_calls(monkeypatch):
    """A list that grows with every block that is computed in the sliced way."""
    calls, forward = [], dydit.Block.forward

    def watched(self, x, c, u, heads, groups, sliced=False, all_on=False):
        calls.extend([1] * sliced)
        return forward(self, x, c, u, heads, groups, sliced, all_on)

    monkeypatch.setattr(dydit.Block, "forward", watched)
    return calls


# ------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("name, total, routers, nus_routers, products, gflops", [
    ("S/2", 33_120_740, 157_380, 166_620, 6.0557, 6.0655),
    ("B/2", 131_158_964, 646_548, 665_004, 23.0051, 23.0248),
    ("L/2", 460_416_776, 2_313_960, None, None, None),
    ("XL/2", 678_424_644, 3_295_012, 3_359_580, 118.6214, 118.6887)])
def test_parameters_and_gflops_are_the_papers(name, total, routers, nus_routers, products, gflops):
    cfg = dydit.size(name)
    with torch.device("meta"):
        models = [dydit.DyDiT(cfg), dit.DiT(dit.size(name)),
                  dydit.DyDiT(replace(cfg, always_on=False))]
    ours, dense, nus = (sum(p.numel() for p in m.parameters()) for m in models)
    assert (ours, dense) == (total, total - routers)
    assert nus_routers is None or nus - dense == nus_routers
    if gflops:
        norms = 4 * (2 * cfg.depth + 1) * 256 * cfg.dim / 1e9   # the paper counts 4 per element
        gmac = dit.cost(dit.size(name))["GMAC"]
        assert (round(gmac, 4), round(gmac + norms, 4)) == (products, gflops)


def test_both_costs_include_the_routers_and_all_that_cannot_be_switched_off():
    for name, target, gflops in (("S/2", 0.5, 3.07), ("S/2", 0.7, 4.28), ("B/2", 0.9, 20.84),
                                 ("XL/2", 0.5, 60.09)):     # block ratio lambda exactly
        cfg = dydit.size(name, target=target)
        cost, dense = dydit.cost(cfg), dit.cost(dit.size(name))["GMAC"]
        norms = 4 * (2 * cfg.depth + 1) * 256 * cfg.dim / 1e9
        assert cost["GMAC at the target"] + norms == pytest.approx(gflops, abs=0.01)
        per_block = 256 * (cfg.dim + 1) * cfg.dim // 16 + 2 * cfg.dim * (cfg.heads - 1)
        assert cost["GMAC"] - dense == pytest.approx(cfg.depth * per_block / 1e9)
        assert dydit.cost(replace(cfg, target=1.0))["GMAC at the target"] == cost["GMAC"]


@pytest.mark.parametrize("name, attention, mlp", [      # GMAC of a block in the authors' code
    ("S/2", 0.201326592, 0.301989888), ("B/2", 0.704643072, 1.207959552),
    ("XL/2", 1.50994944, 2.717908992)])
def test_attention_has_the_share_of_the_authors_table(name, attention, mlp):
    off = torch.zeros(1)
    alone = dydit.flops_per_token(torch.ones(1), off, off, dydit.size(name)).item()
    assert alone == pytest.approx(attention / (attention + mlp), rel=1e-6)


def test_the_worked_example_of_the_docstring_has_ratio_one_half():
    def units(on, n):
        return (torch.arange(n) < on).float()

    cfg = dydit.size("S/2")
    assert dydit.flops_per_token(units(3, 6), units(4, 6), units(192, 256), cfg).mean() == 0.5
    assert dydit.flops_per_token(units(1, 6), units(1, 6), units(256, 256), cfg)[0] * 6 == 1
    assert 4 * 384 + 2 * 256 == 2048 and "= 0.5" in dydit.__doc__
    xl = dydit.cost(dydit.size("XL/2"))["GMAC at the target"]
    assert round(xl, 1) == 60.0 and "60.0 of DiT's 118.6" in dydit.__doc__


@pytest.mark.parametrize("seed", [0, 1])
def test_the_flops_ratio_is_what_slicing_really_multiplies(seed, monkeypatch, sliced_calls):
    cfg = replace(SMALL, size=32)                           # 256 tokens: QK' and AV matter
    model, counted, linear = mixed(cfg, seed), [], dydit.linear_fp32
    monkeypatch.setattr(dydit, "attend", lambda q, k, v: (q @ k.mT).softmax(-1) @ v)   # countable

    def count(x, *rest):                                    # the routers are not in the ratio
        counted.append(2 * x.numel() * len(rest[0]))
        return linear(x, *rest)

    monkeypatch.setattr(dydit, "linear_fp32", count)

    def multiplied(full):                                   # by torch's counter, 2 FLOPs each
        counted.clear()
        with FlopCounterMode(display=False) as counter:
            aux = run(model, *inputs(cfg), full_model=full)[1]
        outside = 2 * 3 * (3 * 6 * 64**2 + dit.plain_macs(cfg))             # adaLN, embedders, ...
        return aux["flops"].mean().item(), counter.get_total_flops() - sum(counted) - outside

    (ratio, some), (one, everything) = multiplied(False), multiplied(True)
    assert one == 1 and everything == 2 * 3 * 3 * (12 * 256 * 64**2 + 2 * 256**2 * 64)
    assert 0.2 < ratio < 0.8 and some / everything == pytest.approx(ratio, rel=1e-5)
    assert len(sliced_calls) == 6


def test_the_map_shows_the_cost_of_every_token_and_attention_is_never_skipped():
    aux = run(mixed(), *inputs(SMALL))[1]
    assert aux["map"].shape == (3, 3, 64) and aux["tokens"].shape == (3, 3, 64, 1)
    assert torch.allclose(aux["map"].mean((0, 2)), aux["flops"])
    skipped = aux["map"].transpose(0, 1)[aux["tokens"][..., 0] == 0]
    heads = skipped * 4 * (12 * 64 + 2 * 64) / (4 * 64 + 2 * 64)            # active ones
    assert set(heads.round(decimals=4).tolist()) <= {1.0, 2.0, 3.0, 4.0}


# ------------------------------------------------------------------------ the start


def test_the_authors_settings_are_the_defaults():
    c = dydit.Config()
    assert (c.weight, c.anneal_steps, c.anneal_start, c.full_model_steps, c.hard_gates_from, c.tau,
            c.head_bias, c.channel_bias, c.token_bias, c.router_lr, c.always_on, c.route) == (
        2, 1000, 100, 0, 0, 5, 15, 15, 35, 1, True, "both")
    cfg = replace(SMALL, head_bias=1.0, channel_bias=2.0, token_bias=3.0, tau=7.0)
    block = dydit.DyDiT(cfg).blocks[2]
    for layer, bias in zip(router_layers(block), (1, 2, 3)):
        assert layer.bias.eq(bias).all() and layer.weight.any()
    assert block.attn_rate.tau == block.mlp_rate.tau == block.token_selection.tau == 7


@pytest.mark.parametrize("wrong", [dict(target=0.0), dict(target=1.01), dict(target=math.nan),
                                   dict(tau=0.0), dict(router_lr=-1.0), dict(route="off")])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=[*wrong][0]):
        dydit.DyDiT(replace(SMALL, **wrong))


def test_with_every_switch_on_dydit_is_dit():
    model = set_logits(wake(dydit.DyDiT(SMALL)).eval(), 1, 1, 1)
    dense = dit.DiT(as_dit(SMALL)).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    expected = run(dense, *inputs(SMALL))[0]
    assert expected.std() > 0.01
    for full_model in (False, True):
        for sliced in (False, None):
            out, aux = run(model, *inputs(SMALL), full_model=full_model, sliced=sliced)
            assert furthest(out, expected) < 1e-5 and aux["flops"].eq(1).all()


def test_a_new_network_has_everything_on_and_equals_its_full_model_to_the_bit():
    cfg = replace(SMALL, head_bias=15.0, channel_bias=15.0, token_bias=35.0)
    model = wake(dydit.DyDiT(cfg)).train()
    set_logits(model, 15, 15, 35)                           # wake() has not touched the routers
    dynamic, aux = run(model, *inputs(cfg))
    assert aux["flops"].eq(1).all() and dynamic.std() > 0.01
    assert torch.equal(dynamic, run(model, *inputs(cfg), full_model=True)[0])


def test_a_trained_dit_starts_unchanged_but_for_8_router_tensors_per_block():
    dense = wake(dit.DiT(as_dit(SMALL))).eval()
    model = dydit.from_dense(dense.state_dict(), SMALL).eval()
    assert len(set(model.state_dict()) - set(dense.state_dict())) == 8 * SMALL.depth
    out, aux = run(model, *inputs(SMALL))
    expected = run(dense, *inputs(SMALL))[0]
    assert aux["flops"].eq(1).all() and furthest(out, expected) < 1e-6 * expected.abs().max()


def test_sorting_puts_the_strongest_head_and_channels_first():
    d, state = 16, wake(dit.DiT(as_dit(SMALL))).state_dict()
    state["blocks.1.attn.proj.weight"][:, 2 * d : 3 * d] *= 10              # head 2, by its columns
    heads = state["blocks.1.attn.qkv.weight"].view(3, 4, d, 64)
    heads[2, 3] *= 5                                                        # then 3, by its values
    heads[0, 1] *= 50                                                       # queries do not count
    state["blocks.1.mlp.fc1.weight"][77] *= 10                              # channel 77, by its row
    state["blocks.1.mlp.fc2.weight"][:, 99] *= 5                            # then 99, by its column
    ours = dydit.from_dense(state, SMALL).state_dict()
    assert torch.equal(ours["blocks.1.attn.qkv.weight"][: 2 * d], heads[0, 2:].flatten(0, 1))
    for name in ("fc1.weight", "fc1.bias"):
        theirs = state[f"blocks.1.mlp.{name}"]
        assert torch.equal(ours[f"blocks.1.mlp.{name}"][:2], theirs[[77, 99]])


def test_weights_that_are_not_those_of_a_dense_dit_are_refused():
    state = dit.DiT(as_dit(SMALL)).state_dict()
    bias = state.pop("blocks.0.mlp.fc1.bias")
    for wrong, words in ((state, "fc1.bias"), (state | {"blocks.0.mlp.fc1.biased": bias}, "biased"),
                         (dydit.DyDiT(SMALL).state_dict(), "routers")):
        with pytest.raises(ValueError, match=words):
            dydit.from_dense(wrong, SMALL)


# ------------------------------------------------------------------------ the switch


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_a_switch_is_on_with_probability_sigmoid_of_its_logit_whatever_tau_is(tau):
    u = torch.rand(200_000)
    for logit in (-1.0, 0.0, 2.0):
        on = dydit.gate(torch.full_like(u, logit), u, tau)
        assert set(on.unique().tolist()) == {0.0, 1.0}      # exactly: the soft parts cancel
        assert on.mean().item() == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=5e-3)


def two_logistics(z):
    """Density of the sum of two logistic variables: the mean gradient for tau = 1."""
    return math.exp(z) * ((z - 2) * math.exp(z) + z + 2) / (math.exp(z) - 1) ** 3


@pytest.mark.parametrize("logit, tau, gradient", [
    (15, 1, two_logistics(15)), (5, 1, two_logistics(5)), (0, 1, 1 / 6),
    (15, 5, 9.5e-3), (35, 5, 1.9e-4), (5, 5, 0.039), (0, 5, 0.048)])
def test_a_large_tau_lets_the_gradient_through_a_switch_far_from_flipping(logit, tau, gradient):
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000    # all of them, no chance
    logits = torch.full_like(u, logit).requires_grad_(True)
    dydit.gate(logits, u, tau).mean().backward()
    assert logits.grad.sum().item() == pytest.approx(gradient, rel=0.03)


def test_without_noise_a_switch_is_on_where_its_logit_is_positive():
    logit = torch.tensor([-1e-6, 0.0, 1e-6, 0.005])         # sigmoid(0.005) is 0.5 in bf16
    assert dydit.gate(logit, torch.full((4,), 0.5)).tolist() == [0, 0, 1, 1]
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1.001)
    exact = dydit.linear_fp32(x, weight, torch.tensor([-1.0])).item()
    assert exact == pytest.approx(1e-3, rel=1e-3)


def test_u_0_and_u_1_force_a_switch_and_leave_no_gradient():
    logits = torch.tensor([-99.0, 0.0, 99.0]).requires_grad_(True)
    for u in (0.0, 1.0):
        on = dydit.gate(logits, torch.full((3,), u))
        on.sum().backward()
        assert on.eq(u).all() and logits.grad.eq(0).all()


def test_every_switch_has_its_own_noise():
    model = set_logits(dydit.DyDiT(SMALL), 0, 0, 0).train()
    x, t, y = (v.repeat_interleave(100, 0) for v in inputs(SMALL, B=1))
    aux = run(model, x, t, y)[1]
    masks = torch.cat([aux["heads"][..., 1:], aux["groups"][..., 1:], aux["tokens"][..., 0]], -1)
    together = masks.flatten(1).T.corrcoef()                # of 100 images each
    assert masks.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (together - torch.eye(len(together))).abs().max() < 0.6


@pytest.mark.parametrize("logits", [(-9, -9, 9), (9, 9, -9)])
def test_a_switch_that_is_off_still_learns(logits):
    model = set_logits(wake(dydit.DyDiT(SMALL)), *logits).train()
    out, aux = model(*inputs(SMALL, t=None))
    assert aux["flops"].max() < 0.5
    out.square().mean().backward()
    for layer, logit in zip(router_layers(model.blocks[1]), logits):
        assert logit > 0 or layer.bias.grad.abs().min() > 0


def test_the_temperature_reaches_every_router():
    def pull(tau):
        model = set_logits(dydit.DyDiT(replace(SMALL, depth=1, tau=tau)), 5, 5, 5).train()
        no_noise = torch.full((3, 1, 2 * 4 + 64), 0.5)
        model(*inputs(SMALL, t=None), gate_noise=no_noise)[1]["flops"].sum().backward()
        return [layer.bias.grad.mean().item() for layer in router_layers(model.blocks[0])]

    slope = [math.exp(-5 / tau) / (1 + math.exp(-5 / tau)) ** 2 / tau for tau in (1, 5)]
    for sharp, soft in zip(pull(1.0), pull(5.0)):
        assert soft / sharp == pytest.approx(slope[1] / slope[0], rel=1e-3)


def test_width_routers_see_the_time_alone_and_the_token_router_the_raw_token_after_attention():
    model, seen = mixed(), {}
    block = model.blocks[1]
    hooks = dict(emb=block.attn_rate, emb2=block.mlp_rate, x=block.token_selection, h=block.norm2)
    for key, module in hooks.items():
        module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
    x, t, y = inputs(SMALL, t=None)
    run(model, x, t, y)
    assert torch.equal(seen["emb"], run(model.t_embedder, t)) and seen["emb2"] is seen["emb"]
    assert torch.equal(seen["x"], seen["h"])                # what the MLP's norm gets
    with torch.no_grad():
        block.token_selection.mlp_head[0].bias.fill_(-1e6)  # ReLU: only the last bias counts
        block.token_selection.mlp_head[2].bias.fill_(1)
    assert run(model, x, t, y)[1]["tokens"][:, 1].eq(1).all()


def test_the_mask_of_a_group_comes_before_gelu():
    layer, x = dit.Mlp(64, 256), torch.randn(1, 1, 64)
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0]], requires_grad=True)
    dydit.mlp(layer, x, 4, mask).sum().backward()
    z, w2 = layer.fc1(x)[0, 0, :64], layer.fc2.weight.sum(0)[:64]           # group 0 of 4
    assert mask.grad[0, 0].item() == pytest.approx((z / 2 @ w2).item(), rel=1e-4)   # GELU'(0) = 1/2


# ------------------------------------------------------------------------ masked = sliced


@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_slicing_equals_masking(always_on, dtype, tolerance, sliced_calls):
    cfg = replace(SMALL, always_on=always_on)
    model = mixed(cfg).to(dtype)
    for t in (0.1, 0.5, 0.9):
        args = inputs(cfg, t=t, dtype=dtype)
        (masked, a), (sliced, b) = run(model, *args, sliced=False), run(model, *args)
        assert all(torch.equal(a[k], b[k]) for k in ("heads", "groups", "tokens", "map", "flops"))
        assert 0 < a["tokens"].mean() < 1 and a["heads"].mean() < 1
        assert masked.std() > 0.01 and furthest(masked, sliced) < tolerance
    assert len(sliced_calls) == 3 * cfg.depth


@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("heads, groups, tokens", [
    (-1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, -1, 1), (1, 1, -1), (1, 1, 1)])
def test_slicing_equals_masking_with_one_or_no_head_group_token(heads, groups, tokens, always_on,
                                                                sliced_calls, monkeypatch):
    cfg, shapes, kernel = replace(SMALL, always_on=always_on), [], dydit.attend
    monkeypatch.setattr(dydit, "attend", lambda q, k, v: shapes.append(q.shape) or kernel(q, k, v))
    model = set_logits(mixed(cfg), heads, groups, tokens)
    masked, aux = run(model, *inputs(cfg), sliced=False)
    sliced = run(model, *inputs(cfg))[0]
    assert aux["heads"].sum(-1).eq(4 if heads > 0 else int(always_on)).all()
    assert furthest(masked, sliced) < 1e-5 and len(sliced_calls) == cfg.depth
    assert all(min(shape) > 0 for shape in shapes)          # kernels fail on zero heads


def test_a_skipped_token_keeps_its_value_and_gets_no_bias():
    block, x, c = set_logits(mixed(), None, None, -1).blocks[0], *torch.randn(2, 3, 64, 64)
    u, on = torch.full((3, 64), 0.5), torch.ones(3, 4)
    with torch.no_grad():
        before = block(x, c[:, 0], u, on, on)[0]
        block.mlp.fc2.bias += 100
        after = block(x, c[:, 0], u, on, on)[0]
        sliced = block(x.clone(), c[:, 0], u, None, torch.tensor([0]), sliced=True)[0]
    assert torch.equal(before, after) and furthest(after, sliced) < 1e-5


def test_sampling_slices_while_learning_and_mixed_times_use_masks(sliced_calls):
    model = mixed()
    run(model, *inputs(SMALL, t=None))                      # as in a validation loss
    model(*inputs(SMALL))                                   # with gradients
    run(model.train(), *inputs(SMALL), full_model=True)
    run(model.eval(), *inputs(SMALL), sliced=False)
    assert not sliced_calls
    run(model, *inputs(SMALL))
    assert len(sliced_calls) == SMALL.depth


@pytest.mark.parametrize("route, full_model, most", [
    ("both", False, 1 + 3), ("width", False, 1), ("both", True, 1), ("random", False, 1 + 3)])
def test_the_host_waits_once_per_forward_and_once_per_block_that_skips_tokens(
        route, full_model, most, monkeypatch):
    model, waits = mixed(replace(SMALL, route=route)), []   # operations that copy to the host
    for name in ("tolist", "nonzero", "item", "__bool__"):
        def watched(v, *args, op=getattr(torch.Tensor, name), name=name):
            waits.append(name)
            return op(v, *args)
        monkeypatch.setattr(torch.Tensor, name, watched)
    run(model, *inputs(SMALL), full_model=full_model)
    assert len(waits) == most and waits.count("tolist") == 1


def test_both_halves_of_guidance_share_heads_and_groups():
    model, seen = mixed(), []

    def watched(x, t, y):
        out, aux = model(x, t, y)
        seen.append(aux)
        return out, aux

    x, _, y = inputs(SMALL, B=2)
    run(diffusion.guide(watched, y, 10, scale=2.0), x, 0.3)
    given, free = seen[0]["heads"].chunk(2)
    assert torch.equal(given, free) and seen[0]["tokens"].shape[0] == 4


@pytest.mark.parametrize("solver, steps, times", [
    ("euler", 4, [1, 0.75, 0.5, 0.25]), ("heun", 2, [1, 0.5, 0.5, 0]), ("euler", 1, [1]),
    ("ddpm", 4, [0.999, 0.666, 0.333, 0]), ("ddim", 5, None), ("dpm++", 3, None)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_any_sampler_gets_the_masks_of_the_original_time(solver, steps, times, scale):
    """Whatever steps are left out, and the images are those of the masked model."""
    process = next(d() for d in diffusion.DIFFUSIONS.values() if solver in d.solvers)
    model = mixed(replace(SMALL, learn_sigma=process.kind == "ddpm")).double()
    x, _, y = inputs(SMALL, dtype=torch.float64)
    seen, ends = [], []
    for sliced in (None, False):
        def watched(x, t, y):
            out, aux = model(x, t, y, sliced=sliced)
            seen.append((t, aux["heads"], aux["groups"]))
            return out, aux

        f = diffusion.guide(watched, y, 10, scale)
        walk = process.trajectory(f, x, steps, solver, noise=lambda i: x.roll(i))
        ends += run(lambda: list(walk)[-1:])
    sliced, masked = ends
    assert sliced[0] == 0 and furthest(sliced[1], masked[1]) < 1e-10 * sliced[1].abs().max()
    assert times is None or [t[0].item() for t, *_ in seen] == pytest.approx(times * 2, abs=1e-6)
    assert len({tuple(heads[0].flatten().tolist()) for _, heads, _ in seen}) >= min(steps, 3)
    for t, *masks in seen:
        expected = run(model.width_masks, model.t_embedder(t), model.forced_masks(t))
        assert len(t) == 3 * scale and all(torch.equal(a, b) for a, b in zip(masks, expected))


@pytest.mark.parametrize("route", ["both", "random"])
def test_bf16_models_and_autocast_run_in_both_ways(route, sliced_calls):
    model, (x, t, y) = mixed(replace(SMALL, route=route)), inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        auto = [run(model, x, t, y, sliced=s) for s in (False, None)]
    model = model.bfloat16()
    pure = [run(model, x.bfloat16(), t, y, sliced=s) for s in (False, None)]
    assert pure[0][0].dtype == pure[1][0].dtype == torch.bfloat16 and len(sliced_calls) == 6
    for (masked, a), (sliced, b) in (auto, pure):
        assert a["heads"].dtype == a["flops"].dtype == torch.float32
        assert torch.equal(a["heads"], b["heads"]) and torch.equal(a["groups"], b["groups"])
        assert (a["tokens"] != b["tokens"]).float().mean() < 0.05       # x is rounded otherwise
        assert route == "both" or furthest(masked, sliced) < 0.03 * masked.abs().max()


# ------------------------------------------------------------------------ training


def test_the_target_stays_1_and_then_falls_to_lambda():
    cfg = replace(SMALL, target=0.5, anneal_start=100, anneal_steps=1000)
    assert [dydit.lambda_step(s, cfg) for s in (0, 99)] == [1, 1]
    assert [dydit.lambda_step(s, cfg) for s in (100, 500, 1000, 9999)] == [0.95, 0.75, 0.5, 0.5]


def test_the_flops_loss_is_2_times_the_squared_miss_of_the_batchs_mean():
    cfg = replace(SMALL, target=0.5, anneal_start=1, anneal_steps=4)
    model, (x, _, y), rf = wake(dydit.DyDiT(cfg)), inputs(cfg, B=8), diffusion.RectifiedFlow()
    set_logits(model, 99, 99, 99)
    for weight in (2.0, 0.5):
        model.cfg.weight = weight
        for step, value in ((0, 0.0), (2, 0.25**2), (4, 0.5**2)):
            aux = dydit.loss(rf, model, x, y, step, step_rng())[1]
            assert aux["flops_loss"].item() == pytest.approx(weight * value)
    aux = dydit.loss(rf, mixed(replace(cfg, weight=2.0)), x, y, 4, step_rng())[1]
    assert aux["flops"].std() > 0.02
    assert aux["flops_loss"].item() == pytest.approx(2 * (aux["flops"].mean().item() - 0.5) ** 2)


@pytest.mark.parametrize("process", [diffusion.RectifiedFlow(), diffusion.RectifiedFlow("uniform"),
                                     diffusion.DDPM(), diffusion.DDPM(weighting="ant-uw")])
def test_every_batch_has_every_quarter_of_time(process):
    cfg, seen = replace(SMALL, size=8, depth=1, learn_sigma=process.kind == "ddpm"), []
    model = dydit.DyDiT(cfg)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    x, _, y = inputs(cfg, B=6)                              # the next batch continues the quarters
    for step in range(20):
        dydit.loss(process, model, x, y, step, step_rng(6, step))
    quarter = (torch.cat(seen) * 4).long()
    assert torch.equal(quarter, torch.arange(120) % 4)


def test_drawing_times_evenly_does_not_change_what_is_minimised():
    """The parent saw times as often as its diffusion draws them. Fine-tuning weights by that."""
    class Wrong:                                            # by 100 t^2, whatever the image is
        cfg = replace(SMALL, size=8, full_model_steps=1)

        def __call__(self, x, t, y, gate_noise=None, full_model=False):
            return (10 * t)[:, None, None, None].expand_as(x), dict(flops=torch.ones_like(t))

    rf, (x, y) = diffusion.RectifiedFlow("logit-normal"), (torch.zeros(4096, 1, 8, 8), None)
    ours, aux = dydit.loss(rf, Wrong(), x, y, 0, step_rng(4096))
    assert aux["full_model_loss"] == ours                   # the full model has the same weights
    t, noise = rf.sample_times_and_noise(x, step_rng(4096, step=1))
    theirs = rf.loss(Wrong(), x, y, t, noise)[0]
    flat = rf.loss(Wrong(), x, y, step_rng(4096).uniform("t"), noise)[0].mean()
    assert abs(ours - theirs.mean()) < 4 * theirs.std() / 64 < abs(ours - flat)


@pytest.mark.parametrize("first_hard_step, cases", [(5, {4: False, 5: True}), (0, {9: False})])
def test_the_last_steps_train_with_the_masks_of_sampling(first_hard_step, cases):
    cfg, seen = replace(SMALL, hard_gates_from=first_hard_step), []
    model, (x, _, y) = mixed(cfg).train(), inputs(SMALL, B=8)
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    for step, same in cases.items():
        aux = dydit.loss(diffusion.RectifiedFlow(), model, x, y, step, step_rng())[1]
        sampling = run(model.eval(), *seen.pop(), sliced=False)[1]
        assert all(torch.equal(aux[k], sampling[k]) == same for k in ("heads", "groups", "tokens"))
        model.train()


def test_the_first_steps_also_train_the_full_model():
    cfg = replace(SMALL, full_model_steps=3)
    model, dense = mixed(cfg).train(), dit.DiT(as_dit(cfg))
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    rf, (x, _, y) = diffusion.RectifiedFlow("uniform"), inputs(cfg, B=8)
    loss, aux = dydit.loss(rf, model, x, y, 2, step_rng())
    t = (torch.arange(8) % 4 + step_rng().uniform("t")) / 4
    expected = rf.loss(dense, x, y, t, step_rng().normal("noise", 1, 16, 16))[0].mean()
    assert aux["full_model_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-5)
    assert "full_model_loss" not in dydit.loss(rf, model, x, y, 3, step_rng())[1]


def test_a_training_step_depends_on_its_rng_alone():
    model, (x, _, y), rf = mixed().train(), inputs(SMALL, B=8), diffusion.RectifiedFlow()
    (once, aux), (again, _) = (dydit.loss(rf, model, x, y, 0, step_rng()) for _ in range(2))
    assert torch.equal(once, again)                         # torch's own generator is not used
    second = diffusion.StepRNG(0, 0, 8, torch.arange(4, 8))                 # of two processes
    part = dydit.loss(rf, model, x[4:], y[4:], 0, second)[1]
    assert all(torch.equal(aux[k][4:], part[k]) for k in ("heads", "groups", "tokens"))


def test_the_flops_loss_sees_the_whole_batch_of_all_processes(monkeypatch):
    """Two processes with the ratios 0.2 and 0.8: together they are on the target 0.5."""
    monkeypatch.setattr(dydit.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dydit.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dydit.dist, "all_reduce", lambda v: v.fill_(1.0))
    mine = torch.tensor(0.2, requires_grad=True)
    mean = dydit.global_mean(mine)
    (mean - 0.4).square().backward()
    assert mean.item() == 0.5 and mine.grad.item() == pytest.approx(2 * 0.1)


def test_only_the_routers_have_their_own_learning_rate():
    model = dydit.DyDiT(replace(SMALL, router_lr=10.0))
    groups = {g["lr"]: g["params"] for g in dydit.param_groups(model, 1e-3)}
    learned = sum(p.requires_grad for p in model.parameters())
    assert {lr: len(p) for lr, p in groups.items()} == {1e-3: learned - 8 * 3, 1e-2: 8 * 3}
    same = dydit.param_groups(dydit.DyDiT(replace(SMALL, router_lr=1.0)), 1.0)
    assert sum(len(g["params"]) for g in same) == learned


def test_a_short_fine_tuning_reaches_lambda_in_sampling_too():
    cfg = replace(SMALL, size=8, dim=32, depth=2, heads=2, target=0.6, anneal_steps=60,
                  anneal_start=10)
    model = dydit.from_dense(wake(dit.DiT(as_dit(cfg))).state_dict(), cfg).train()
    optimizer = torch.optim.AdamW(dydit.param_groups(model, 1e-3), fused=True)
    rf, y = diffusion.RectifiedFlow(), torch.arange(32) % 10
    x = (y.float() / 5 - 1).view(-1, 1, 1, 1) * torch.ones(1, 1, 8, 8)      # ten greys
    for step in range(120):
        loss, aux = dydit.loss(rf, model, x, y, step, step_rng(32, step))
        optimizer.zero_grad()
        (loss + aux["flops_loss"]).backward()
        optimizer.step()
    t = (torch.arange(32) + 0.5) / 32
    flops = run(model.eval(), rf.q_sample(x, torch.randn(32, 1, 8, 8), t), t, y)[1]["flops"]
    assert flops.mean().item() == pytest.approx(0.6, abs=0.1)


# ------------------------------------------------------------------------ the ablations


@pytest.mark.parametrize("route, on, off, frozen", [
    ("width", "tokens", "heads", "token_selection"), ("tokens", "groups", "tokens", "_rate.")])
def test_tdw_alone_keeps_every_token_and_sdt_alone_every_head(route, on, off, frozen):
    model = mixed(replace(SMALL, route=route))
    for sliced in (False, None):
        aux = run(model, *inputs(SMALL), sliced=sliced)[1]
        assert aux[on].eq(1).all() and aux[off].mean() < 1
    still = {k for k, p in model.named_parameters() if not p.requires_grad and k != "pos_embed"}
    assert still == {k for k, _ in model.named_parameters() if frozen in k}


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("always_on", [True, False])
def test_random_routing_spends_lambda_and_depends_on_time_alone(target, always_on):
    cfg = replace(SMALL, route="random", target=target, always_on=always_on)
    model, t = mixed(cfg), torch.linspace(0, 1, 2000)
    heads, groups = model.width_masks(torch.randn(2000, 64), model.forced_masks(t))
    tokens = dydit.random_masks(t, cfg)[..., 8:]
    spent = dydit.flops_per_token(heads, groups, tokens, cfg).mean().item()
    assert spent == pytest.approx(target, abs=0.01)
    assert heads[..., 0].eq(1).all() == always_on
    assert torch.equal(heads[..., 1:], dydit.random_masks(t, cfg)[..., 1:4])
    assert heads[..., 1].std() > 0.3 and tokens.var() > 0.1
    (masked, a), (sliced, b) = (run(model, *inputs(cfg), sliced=s) for s in (False, None))
    assert torch.equal(a["tokens"], b["tokens"]) and furthest(masked, sliced) < 1e-5
    assert run(model, *inputs(cfg), full_model=True)[1]["flops"].eq(1).all()


def test_sdt_alone_cannot_reach_a_small_lambda_because_attention_stays():
    cfg = dydit.size("XL/2")                                # the paper's reason why it fails
    attention = dydit.flops_per_token(torch.ones(1), torch.ones(1), torch.zeros(1), cfg).item()
    assert attention == pytest.approx(0.357, abs=1e-3)
    assert (0.5 - attention) / (1 - attention) == pytest.approx(0.222, abs=1e-3)


@pytest.mark.parametrize("always_on", [True, False])
def test_one_head_works_and_a_router_without_rows_is_frozen(always_on):
    """FSDP cannot reduce the gradient of a tensor without elements."""
    model = mixed(replace(SMALL, heads=1, always_on=always_on))
    rows = model.blocks[0].attn_rate.router.weight
    assert len(rows) == 1 - always_on and rows.requires_grad == (not always_on)
    assert all(p.numel() for p in model.parameters() if p.requires_grad)
    (masked, aux), (sliced, _) = (run(model, *inputs(SMALL), sliced=s) for s in (False, None))
    assert aux["heads"].shape == (3, 3, 1) and furthest(masked, sliced) < 1e-5
    assert not always_on or aux["heads"].eq(1).all()
