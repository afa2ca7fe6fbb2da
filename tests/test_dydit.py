"""DyDiT (arXiv 2410.03456): what the paper says, checked."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import dit
import dydit
import sample
import train
from conftest import wake
from experiments import bench_dydit
from experiments.timetable import cli as timetable_cli, timetable
from test_faults import MICRO, few_digits
from test_official import close, golden

SMALL = replace(dydit.TINY, size=16, patch=2, dim=64, depth=3, heads=4)      # 64 tokens


def plain(cfg):
    """The same network for dit.py."""
    return dit.Config(**{k: getattr(cfg, k) for k in dit.Config.__dataclass_fields__})


def inputs(cfg, B=3, t=0.4, seed=0, dtype=torch.float32):
    """x, t, y; all pictures at one time, unless t is None."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, cfg.channels, cfg.size, cfg.size, generator=g).to(dtype)
    t = torch.rand(B, generator=g) if t is None else torch.full((B,), t)
    return x, t, torch.arange(B) % (cfg.classes + 1)


def mixed(cfg=SMALL, seed=0, spread=4.0):
    """An awake network whose switches are a mixture of on and off, another one at another time."""
    model = wake(dydit.DyDiT(cfg), seed=seed).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.t_embedder.mlp[::2]:             # a fresh one hardly tells times apart
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.1)
        for b in model.blocks:
            for r in (b.attn_rate.router, b.mlp_rate.router, b.token_selection.mlp_head[2]):
                r.weight.copy_(torch.randn(r.weight.shape, generator=g) * spread)
                r.bias.copy_(torch.randn(r.bias.shape, generator=g))
    return model


@torch.no_grad()
def set_bias(model, heads=None, groups=None, tokens=None):
    """Routers that ignore their input and always answer the sign of a number."""
    for b in model.blocks:
        for layer, value in ((b.attn_rate.router, heads), (b.mlp_rate.router, groups),
                             (b.token_selection.mlp_head[2], tokens)):
            if value is not None:
                layer.weight.zero_()
                layer.bias.fill_(value)
    return model


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def furthest(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("name, total, routers, products, macs", [
    ("S/2", 33_120_740, 157_380, 6.0557, 6.0655), ("B/2", 131_158_964, 646_548, 23.0051, 23.0248),
    ("L/2", 460_416_776, 2_313_960, None, None),
    ("XL/2", 678_424_644, 3_295_012, 118.6214, 118.6887)])
def test_parameters_and_gmacs_are_the_papers(name, total, routers, products, macs):
    with torch.device("meta"):
        ours, dense = dydit.DyDiT(dydit.size(name)), dit.DiT(dit.size(name))
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, dense)]
    assert count == [total, total - routers]
    cost = dydit.cost(dydit.size(name))
    assert macs is None or round(cost["GMAC (the paper's count)"], 4) == macs
    assert macs is None or round(cost["GMAC"], 4) == products
    assert cost["GMAC"] == dit.cost(dit.size(name))["GMAC"]


@pytest.mark.parametrize("name, attention, mlp", [      # GMAC of a block in the authors' code
    ("S/2", 0.201326592, 0.301989888), ("B/2", 0.704643072, 1.207959552),
    ("XL/2", 1.50994944, 2.717908992)])
def test_a_block_costs_what_the_authors_table_says(name, attention, mlp):
    cfg, off = dydit.size(name), torch.zeros(1)
    alone = dydit.spend(torch.ones(1), off, off, cfg).item()
    assert alone == pytest.approx(attention / (attention + mlp), rel=1e-6)


def test_the_authors_settings_are_the_defaults():
    model = dydit.DyDiT(dydit.Config(size=8, dim=64, depth=1, heads=4))
    block = model.blocks[0]
    for router, bias in ((block.attn_rate.router, 15), (block.mlp_rate.router, 15),
                         (block.token_selection.mlp_head[2], 35)):
        assert router.bias.eq(bias).all() and router.weight.any()
    assert block.attn_rate.tau == block.token_selection.tau == 5
    c = model.cfg
    assert (c.weight, c.ramp, c.hold, c.complete, c.quiet, c.router_lr) == (2, 1000, 100, 0, 0, 1)
    cfg = replace(SMALL, head_bias=1.0, channel_bias=2.0, token_bias=3.0)
    block = dydit.DyDiT(cfg).blocks[2]                      # TINY's own arrive, too
    assert [r.bias[0].item() for r in (block.attn_rate.router, block.mlp_rate.router,
                                       block.token_selection.mlp_head[2])] == [1, 2, 3]


@pytest.mark.parametrize("wrong", [dict(target=0.0), dict(target=1.01), dict(target=math.nan),
                                   dict(tau=0.0), dict(router_lr=-1.0), dict(route="off")])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=[*wrong][0]):
        dydit.DyDiT(replace(SMALL, **wrong))


def test_the_first_release_has_a_few_more_router_parameters():
    for name, routers in (("S/2", 166_620), ("B/2", 665_004), ("XL/2", 3_359_580)):
        with torch.device("meta"):
            model = dydit.DyDiT(dydit.size(name, always_on=False))
        assert routers == sum(p.numel() for k, p in model.named_parameters()
                              if "rate" in k or "token_selection" in k)


@pytest.mark.parametrize("name, target, macs", [("S/2", 0.5, 3.07), ("S/2", 0.7, 4.28),
                                                ("B/2", 0.9, 20.84), ("XL/2", 0.5, 60.09)])
def test_flops_at_lambda_include_what_cannot_be_switched_off(name, target, macs):
    cost = dydit.cost(dydit.size(name, target=target))
    norms = cost["GMAC (the paper's count)"] - cost["GMAC"]
    assert cost["GMAC at the target"] + norms == pytest.approx(macs, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_flops_ratio_is_what_the_sliced_path_really_multiplies(seed, monkeypatch):
    cfg = replace(SMALL, size=32)                           # 256 tokens: QK' and AV matter
    model = mixed(cfg, seed)
    monkeypatch.setattr(dydit, "attend", lambda q, k, v: (q @ k.mT).softmax(-1) @ v)   # countable

    def multiplied(complete):                               # by torch's counter, 2 flops each
        with FlopCounterMode(display=False) as counter:
            aux = run(model, *inputs(cfg), complete=complete, fast=True)[1]
        return aux["flops"].mean().item(), sum(
            sum(v.values()) for k, v in counter.get_flop_counts().items()
            if k.endswith((".attn", ".mlp")) and "embedder" not in k)

    ratio, some = multiplied(False)
    one, everything = multiplied(True)
    assert one == 1 and everything == 2 * 3 * 3 * (12 * 256 * 64**2 + 2 * 256**2 * 64)
    assert 0.2 < ratio < 0.8
    assert some / everything == pytest.approx(ratio, rel=1e-5)


def test_the_map_is_1_where_all_is_on_and_attention_is_never_skipped():
    cfg = SMALL
    ones = torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 64)
    assert dydit.spend(*ones, cfg).eq(1).all()
    skipped = dydit.spend(ones[0], ones[1], 0 * ones[2], cfg)
    assert skipped[0, 0].item() == pytest.approx((4 * 64 + 2 * 64) / (12 * 64 + 2 * 64))
    aux = run(mixed(), *inputs(cfg))[1]
    assert aux["map"].shape == (3, 3, 64) and aux["tokens"].shape == (3, 3, 64, 1)
    assert torch.allclose(aux["map"].mean((0, 2)), aux["flops"])


# ------------------------------------------------------------------------------- the idea off: DiT


def test_with_every_switch_on_dydit_is_dit():
    cfg = SMALL
    model = set_bias(wake(dydit.DyDiT(cfg)).eval(), 1, 1, 1)
    dense = dit.DiT(plain(cfg)).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    args = inputs(cfg, t=None)
    expected = run(dense, *args)[0]
    assert expected.std() > 0.01
    for complete, fast in ((False, False), (True, False), (True, True)):
        assert furthest(run(model, *args, complete=complete, fast=fast)[0], expected) < 1e-5


def test_a_fresh_network_has_everything_on_and_equals_its_complete_model_to_the_bit():
    model = wake(dydit.DyDiT(replace(SMALL, head_bias=15.0, channel_bias=15.0, token_bias=35.0)))
    set_bias(model, 15, 15, 35).train()                     # wake() may have touched nothing else
    args = inputs(SMALL)
    dynamic, aux = run(model, *args)
    assert aux["flops"].eq(1).all()
    assert torch.equal(dynamic, run(model, *args, complete=True)[0])


def test_a_trained_dit_starts_unchanged_but_for_8_router_tensors_per_block():
    cfg = SMALL
    dense = wake(dit.DiT(plain(cfg))).eval()
    model = dydit.from_dense(dense.state_dict(), cfg).eval()
    assert len(set(model.state_dict()) - set(dense.state_dict())) == 8 * cfg.depth
    args = inputs(cfg)
    expected = run(dense, *args)[0]
    for out, aux in (run(model, *args), run(model, *args, complete=True)):
        assert aux["flops"].eq(1).all()
        assert furthest(out, expected) < 1e-6 * expected.abs().max()


def test_ranking_puts_the_strongest_head_and_channels_first():
    cfg, d = SMALL, 16
    state = wake(dit.DiT(plain(cfg))).state_dict()
    state["blocks.1.attn.proj.weight"][:, 2 * d : 3 * d] *= 10              # head 2, by its columns
    heads = state["blocks.1.attn.qkv.weight"].view(3, 4, d, 64)
    heads[2, 3] *= 5                                                        # then 3, by its values
    heads[0, 1] *= 50                                                       # queries say nothing
    state["blocks.1.mlp.fc1.weight"][77] *= 10                              # channel 77, by its row
    state["blocks.1.mlp.fc2.weight"][:, 99] *= 5                            # then 99, by its column
    ranked = dydit.from_dense(state, cfg).state_dict()
    assert torch.equal(ranked["blocks.1.attn.qkv.weight"][: 2 * d], heads[0, 2:].flatten(0, 1))
    assert torch.equal(ranked["blocks.1.mlp.fc2.weight"][:, :2],
                       state["blocks.1.mlp.fc2.weight"][:, [77, 99]])


def test_weights_that_are_no_dit_are_refused():
    state = dit.DiT(plain(SMALL)).state_dict()
    with pytest.raises(ValueError, match="fc1.bias"):
        dydit.from_dense({k: v for k, v in state.items() if k != "blocks.0.mlp.fc1.bias"}
                         | {"blocks.0.mlp.fc1.biased": state["blocks.0.mlp.fc1.bias"]}, SMALL)
    with pytest.raises(ValueError, match="no routers"):
        dydit.from_official(state, heads=4)
    with pytest.raises(ValueError, match="pass heads=3 or 4"):
        dydit.from_official(dydit.DyDiT(SMALL).state_dict())


@pytest.mark.parametrize("name", dydit.SIZES)
@pytest.mark.parametrize("always_on", [True, False])
def test_the_papers_sizes_are_told_by_their_routers(name, always_on):
    with torch.device("meta"):
        cfg = dydit.size(f"{name}/2", depth=1, always_on=always_on)
        found = dydit.from_official(dydit.DyDiT(cfg).state_dict()).cfg
    assert (found.heads, found.always_on) == (cfg.heads, always_on)


# ------------------------------------------------------------------------------- the switch


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_a_switch_is_on_with_probability_sigmoid_logit_whatever_tau(tau):
    u = torch.rand(200_000)
    for logit in (-1.0, 0.0, 2.0):
        on = dydit.gate(torch.full_like(u, logit), u, tau)
        assert set(on.unique().tolist()) == {0.0, 1.0}      # exactly: soft parts cancel
        assert on.mean().item() == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=5e-3)


def two_logistics(z):
    """Density of the sum of two logistic variables: the mean gradient for tau = 1."""
    return math.exp(z) * ((z - 2) * math.exp(z) + z + 2) / (math.exp(z) - 1) ** 3


@pytest.mark.parametrize("logit, tau, gradient", [
    (15, 1, two_logistics(15)), (5, 1, two_logistics(5)), (0, 1, 1 / 6),
    (15, 5, 9.5e-3), (35, 5, 1.9e-4), (5, 5, 0.039), (0, 5, 0.048)])
def test_a_large_tau_lets_gradient_through_a_closed_or_open_switch(logit, tau, gradient):
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000        # no chance in it
    logits = torch.full_like(u, logit).requires_grad_(True)
    dydit.gate(logits, u, tau).mean().backward()
    assert logits.grad.sum().item() == pytest.approx(gradient, rel=0.03)


def test_without_noise_a_switch_is_on_where_its_logit_is_positive():
    logit = torch.tensor([-1e-6, 0.0, 1e-6, 0.005])         # 0.005: sigmoid rounds to 0.5 in bf16
    assert dydit.gate(logit).tolist() == [0, 0, 1, 1]
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1.001)
    assert dydit.decide(x, weight, torch.tensor([-1.0])).item() == pytest.approx(1e-3, rel=1e-3)


def test_every_switch_flips_its_own_coin():
    model = set_bias(dydit.DyDiT(SMALL), 0, 0, 0).train()
    x, t, y = (v.repeat_interleave(100, 0) for v in inputs(SMALL, B=1))
    masks = run(model, x, t, y)[1]
    masks = torch.cat([masks["heads"][..., 1:], masks["groups"][..., 1:],
                       masks["tokens"][..., 0]], -1)        # (100, N, 2(H-1) + L)
    together = masks.flatten(1).T.corrcoef()                # of 100 flips each
    assert masks.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (together - torch.eye(len(together))).abs().max() < 0.6


def test_a_closed_switch_still_learns():
    model = set_bias(wake(dydit.DyDiT(SMALL)), -9, -9, -9).train()
    out, aux = model(*inputs(SMALL, t=None))
    assert aux["flops"].max() < 0.5
    out.square().mean().backward()
    for b in model.blocks:
        assert b.attn_rate.router.bias.grad.abs().min() > 0
        assert b.token_selection.mlp_head[2].bias.grad.abs().min() > 0


def test_the_temperature_reaches_every_router():
    def pull(tau):
        model = set_bias(dydit.DyDiT(replace(SMALL, depth=1, tau=tau)), 5, 5, 5).train()
        half = torch.full((3, 1, 2 * 4 + 64), 0.5)          # no noise
        model(*inputs(SMALL, t=None), noise=half)[1]["flops"].sum().backward()
        block = model.blocks[0]
        return [r.bias.grad.mean().item() for r in (
            block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2])]

    slope = [math.exp(-5 / tau) / (1 + math.exp(-5 / tau)) ** 2 / tau for tau in (1, 5)]
    for sharp, soft in zip(pull(1.0), pull(5.0)):
        assert soft / sharp == pytest.approx(slope[1] / slope[0], rel=1e-3)


def test_the_mask_of_a_group_comes_before_gelu():
    mlp, x = dydit.DynamicMlp(SMALL), torch.randn(1, 1, 64)
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0]], requires_grad=True)
    mlp(x, mask).sum().backward()
    z, w2 = mlp.fc1(x)[0, 0, :64], mlp.fc2.weight.sum(0)[:64]               # group 0 of 4
    assert mask.grad[0, 0].item() == pytest.approx((z / 2 @ w2).item(), rel=1e-4)   # GELU'(0) = 1/2


# ------------------------------------------------------------------------------- masked = sliced


@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gathered_equals_masked(always_on, dtype, tolerance):
    cfg = replace(SMALL, always_on=always_on)
    model = mixed(cfg).to(dtype)
    for t in (0.1, 0.5, 0.9):
        args = inputs(cfg, t=t, dtype=dtype)
        masked, a = run(model, *args, fast=False)
        sliced, b = run(model, *args, fast=True)
        assert all(torch.equal(a[k], b[k]) for k in ("heads", "groups", "tokens"))
        assert 0 < a["tokens"].mean() < 1 and a["heads"].mean() < 1
        assert masked.std() > 0.01 and furthest(masked, sliced) < tolerance
        assert torch.allclose(a["map"], b["map"])


@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("heads, groups, tokens", [(-1, -1, 1), (-1, 1, -1), (1, -1, 1), (1, 1, 1)])
def test_gathered_equals_masked_with_one_or_no_head_group_token(heads, groups, tokens, always_on):
    cfg = replace(SMALL, always_on=always_on)
    model = set_bias(mixed(cfg), heads, groups, tokens)
    args = inputs(cfg)
    (masked, aux), (sliced, _) = run(model, *args, fast=False), run(model, *args, fast=True)
    assert aux["heads"].sum(-1).eq(4 if heads > 0 else int(always_on)).all()
    assert furthest(masked, sliced) < 1e-5


def test_a_skipped_token_keeps_its_value_and_gets_no_bias():
    model = set_bias(mixed(), tokens=-1)
    block, (_, t, y) = model.blocks[0], inputs(SMALL)
    x, c = torch.randn(3, 64, 64), torch.randn(3, 64)
    with torch.no_grad():
        after = [block(x, c, c)[0]]
        block.mlp.fc2.bias += 100
        after += [block(x, c, c)[0], block(x, c, c, width=torch.ones(3, 8))[0]]
        after += [block.sliced(x, c, (0, 1, 2, 3), (0,))[0]]
    assert torch.equal(after[0], after[1])
    assert furthest(after[2], after[3]) < 1e-5


def test_sampling_slices_and_mixed_times_mask(monkeypatch):
    model, used = mixed(), []
    sliced = dydit.Block.sliced
    monkeypatch.setattr(dydit.Block, "sliced", lambda *a, **k: used.append(1) or sliced(*a, **k))
    run(model, *inputs(SMALL, t=None))                      # as in a validation loss
    model(*inputs(SMALL))                                   # with gradients
    assert not used
    run(model, *inputs(SMALL))
    assert len(used) == SMALL.depth
    with pytest.raises(ValueError, match="agrees"):
        run(model, *inputs(SMALL, t=None), fast=True)
    with pytest.raises(ValueError, match="could not learn"):
        model(*inputs(SMALL), fast=True)


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
    ("ddpm", 4, [0.999, 0.666, 0.333, 0]), ("ddim", 5, [0.8, 0.6, 0.4, 0.2, 0]),
    ("dpm++", 3, None)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_any_sampler_gets_the_masks_of_the_original_time(solver, steps, times, scale):
    """Whatever steps are left out, and the same pictures as with masks."""
    path = next(p for p in (diffusion.DDPM(), diffusion.RectifiedFlow()) if solver in p.solvers)
    model = mixed(replace(SMALL, learn_sigma=path.kind == "ddpm")).double()
    x, _, y = inputs(SMALL, dtype=torch.float64)
    seen, ends = [], []
    for fast in (True, False):
        def watched(x, t, y):
            out, aux = model(x, t, y, fast=fast)
            seen.append((t[0].item(), torch.cat([aux["heads"], aux["groups"]], -1)))
            return out, aux

        f = diffusion.guide(watched, y, 10, scale)
        walk = path.trajectory(f, x, steps, solver, noise=lambda i: x.roll(i))
        ends += run(lambda: list(walk)[-1:])
    sliced, masked = ends
    assert sliced[0] == 0 and furthest(sliced[1], masked[1]) < 1e-10 * sliced[1].abs().max()
    assert times is None or [t for t, _ in seen] == pytest.approx(times * 2, abs=1e-6)
    assert len({tuple(on[0].flatten().tolist()) for _, on in seen}) >= min(steps, 3)
    for t, on in seen:
        expected = model.widths(model.t_embedder(torch.tensor([t])))
        assert len(on) == 3 * scale and torch.equal(on, expected.expand(len(on), -1, -1))


# ------------------------------------------------------------------------------- what is kept


CHANGES = {                                                 # a fused optimizer raises no _version
    "optimizer": lambda m, o: (m(*inputs(SMALL))[0].square().mean().backward(),
                               torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()),
    "ema": lambda m, o: torch._foreach_lerp_(list(m.parameters()), list(o.parameters()), 0.5),
    "load_state_dict": lambda m, o: m.load_state_dict(o.state_dict()),
    "assign": lambda m, o: m.load_state_dict(copy.deepcopy(o.state_dict()), assign=True),
    "half": lambda m, o: m.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_cut_before_a_change_are_never_used_after_it(change):
    model, other = mixed(seed=0).requires_grad_(change == "optimizer"), mixed(seed=1)
    args = inputs(SMALL)
    before = run(model, *args, fast=True)[0]
    with torch.set_grad_enabled(change == "optimizer"):
        CHANGES[change](model, other)
    masked, sliced = run(model, *args, fast=False)[0], run(model, *args, fast=True)[0]
    assert furthest(before, masked) > 1e-5                  # the change is one
    assert furthest(masked, sliced) < 1e-5 * max(1, masked.abs().max())


def test_a_copied_or_moved_model_does_not_keep_what_was_cut():
    def follow(model, times):
        with torch.no_grad():
            for _ in range(times):
                torch._foreach_lerp_(list(model.parameters()), list(other.parameters()), 0.3)

    model, other = copy.deepcopy(mixed(seed=0)).requires_grad_(False), mixed(seed=1)
    follow(model, 3)                                        # every _version is 3
    run(model, *inputs(SMALL), fast=True)
    for times in range(6):                                  # here it is 3 again, of other weights
        twin = copy.deepcopy(model)
        follow(twin, times)
        masked, sliced = (run(twin, *inputs(SMALL), fast=fast)[0] for fast in (False, True))
        assert furthest(masked, sliced) < 1e-5
    assert any(b.mlp.kept[0] for b in model.blocks)
    assert not any(b.mlp.kept[0] for b in model.double().blocks)


def test_weights_of_inference_mode_are_cut_anew():
    with torch.inference_mode():                            # such tensors have no _version
        model = mixed().requires_grad_(False)
        for _ in range(2):
            masked, sliced = (model(*inputs(SMALL), fast=fast)[0] for fast in (False, True))
            assert furthest(masked, sliced) < 1e-5
            model.blocks[0].mlp.fc1.weight.mul_(2)


def test_one_copy_is_cut_per_pattern_and_it_is_the_newest():
    model = mixed().requires_grad_(False)
    run(model, *inputs(SMALL, t=0.4))
    kept = model.blocks[0].mlp.kept[1][0]
    run(model, *inputs(SMALL, t=0.4, B=5, seed=1))          # another batch, the same time
    assert model.blocks[0].mlp.kept[1][0] is kept
    assert not any("kept" in k for k in model.state_dict())
    patterns = set()
    for t in (*torch.linspace(0, 1, 12).tolist(), 0.4):     # what was kept is not what is on now
        args = inputs(SMALL, t=t)
        (masked, aux), (sliced, _) = (run(model, *args, fast=f) for f in (False, True))
        assert furthest(masked, sliced) < 1e-5
        patterns.add(tuple(aux["groups"][0].flatten().tolist()))
    assert len(patterns) > 5


# ------------------------------------------------------------------------------- training


def draw(B=8, step=0):
    return diffusion.Draw(0, step, B, torch.arange(B))


def test_the_target_stays_1_and_then_falls_to_lambda():
    cfg = replace(SMALL, target=0.5, hold=100, ramp=1000)
    assert [dydit.lambda_step(s, cfg) for s in (0, 99)] == [1, 1]
    assert [dydit.lambda_step(s, cfg) for s in (100, 500, 1000, 9999)] == [0.95, 0.75, 0.5, 0.5]


def test_the_flops_loss_is_2_times_the_squared_miss():
    cfg = replace(SMALL, target=0.5, hold=1, ramp=4)
    model = set_bias(wake(dydit.DyDiT(cfg)), 99, 99, 99)
    x, _, y = inputs(cfg, B=8)
    for weight in (2.0, 0.5):
        model.cfg.weight = weight
        for step, value in ((0, 0.0), (2, 0.25**2), (4, 0.5**2)):
            aux = dydit.loss(diffusion.RectifiedFlow(), model, x, y, step, draw())[1]
            assert aux["flops_loss"].item() == pytest.approx(weight * value)


@pytest.mark.parametrize("path", [diffusion.RectifiedFlow(), diffusion.RectifiedFlow("uniform"),
                                  diffusion.DDPM(), diffusion.DDPM(weighting="ant-uw")])
def test_every_batch_has_every_quarter_of_time(path):
    cfg, seen = replace(SMALL, size=8, depth=1, learn_sigma=path.kind == "ddpm"), []
    model = dydit.DyDiT(cfg)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    x, _, y = inputs(cfg, B=16)
    for step in range(20):
        dydit.loss(path, model, x, y, step, draw(16, step))
    quarter = (torch.stack(seen) * 4).long()                                # (20, 16)
    assert torch.equal(quarter, (torch.arange(16) % 4).expand(20, 16))


def test_quarters_of_time_do_not_change_what_is_minimised():
    """The parent saw times as often as its path draws them; fine-tuning sees all alike, weighted."""
    class Wrong:                                            # by 100 t^2, whatever the picture
        cfg = replace(SMALL, size=8, complete=1)

        def __call__(self, x, t, y, noise=None, complete=False):
            return (10 * t)[:, None, None, None].expand_as(x), dict(flops=torch.ones_like(t))

    path, (x, y) = diffusion.RectifiedFlow("logit-normal"), (torch.zeros(4096, 1, 8, 8), None)
    ours, aux = dydit.loss(path, Wrong(), x, y, 0, draw(4096))
    assert aux["complete_loss"] == ours                     # phase 1 weighs alike
    t, noise = path.draw(x, draw(4096, step=1))
    theirs = path.loss(Wrong(), x, y, t, noise)[0]
    flat = path.loss(Wrong(), x, y, draw(4096).uniform("t"), noise)[0].mean()
    assert abs(ours - theirs.mean()) < 4 * theirs.std() / 64 < abs(ours - flat)


@pytest.mark.parametrize("quiet, cases", [(5, {4: False, 5: True}), (0, {9: False})])
def test_the_last_steps_train_the_switches_that_sampling_will_have(quiet, cases):
    cfg = replace(SMALL, quiet=quiet)
    model, path, (x, _, y) = mixed(cfg).train(), diffusion.RectifiedFlow(), inputs(cfg, B=8)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    for step, same in cases.items():
        aux = dydit.loss(path, model, x, y, step, draw())[1]
        plain = run(model.eval(), *seen.pop(), fast=False)[1]
        assert torch.equal(aux["heads"], plain["heads"]) == same
        assert torch.equal(aux["tokens"], plain["tokens"]) == same
        model.train()


def test_phase_1_also_trains_the_dense_model():
    cfg = replace(SMALL, complete=3)
    model, dense = mixed(cfg).train(), dit.DiT(plain(cfg))
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in dense.state_dict()})
    path, (x, _, y) = diffusion.RectifiedFlow("uniform"), inputs(cfg, B=8)
    loss, aux = dydit.loss(path, model, x, y, 2, draw())
    t = (torch.arange(8) % 4 + draw().uniform("t")) / 4
    expected = path.loss(dense, x, y, t, draw().normal("noise", 1, 16, 16))[0].mean()
    assert aux["complete_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-5)
    assert "complete_loss" not in dydit.loss(path, model, x, y, 3, draw())[1]


def test_a_training_step_depends_on_its_draw_alone():
    model, (x, _, y), path = mixed().train(), inputs(SMALL, B=8), diffusion.RectifiedFlow()
    (once, aux), (again, _) = (dydit.loss(path, model, x, y, 0, draw()) for _ in range(2))
    assert torch.equal(once, again)                         # torch's own generator has moved on
    half = diffusion.Draw(0, 0, 8, torch.arange(4, 8))      # what the second of two processes sees
    part = dydit.loss(path, model, x[4:], y[4:], 0, half)[1]
    assert all(torch.equal(aux[k][4:], part[k]) for k in ("heads", "groups", "tokens"))


def test_the_flops_loss_sees_the_whole_batch_of_all_processes(monkeypatch):
    """Two processes, ratios 0.2 and 0.8, target 0.5: on target together, so nothing pulls."""
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
    assert sum(len(g["params"]) for g in dydit.param_groups(dydit.DyDiT(SMALL), 1.0)) == learned


def test_a_short_fine_tuning_reaches_lambda_without_noise_too():
    cfg = replace(SMALL, size=8, dim=32, depth=2, heads=2, target=0.6, ramp=60, hold=10)
    model = dydit.from_dense(wake(dit.DiT(plain(cfg))).state_dict(), cfg).train()
    optimizer = torch.optim.AdamW(dydit.param_groups(model, 1e-3), fused=True)
    path, y = diffusion.RectifiedFlow(), torch.arange(32) % 10
    x = (y.float() / 5 - 1).view(-1, 1, 1, 1) * torch.ones(1, 1, 8, 8)      # ten greys
    for step in range(120):
        loss, aux = dydit.loss(path, model, x, y, step, draw(32, step))
        optimizer.zero_grad()
        (loss + aux["flops_loss"]).backward()
        optimizer.step()
    t = (torch.arange(32) + 0.5) / 32
    flops = run(model.eval(), path.mix(x, torch.randn(32, 1, 8, 8), t), t, y)[1]["flops"]
    assert flops.mean().item() == pytest.approx(0.6, abs=0.1)


# ------------------------------------------------------------------------------- the ablations


def test_tdw_alone_keeps_every_token_and_sdt_alone_every_head():
    for route, on, off, frozen in (("width", "tokens", "heads", "token_selection"),
                                   ("tokens", "groups", "tokens", "_rate.")):
        model = mixed(replace(SMALL, route=route))
        for fast in (False, True):
            aux = run(model, *inputs(SMALL), fast=fast)[1]
            assert aux[on].eq(1).all() and aux[off].mean() < 1
        still = {k for k, p in model.named_parameters() if not p.requires_grad and k != "pos_embed"}
        assert still == {k for k, _ in model.named_parameters() if frozen in k}     # for DDP


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("always_on", [True, False])
def test_random_routing_spends_the_target_and_depends_on_time_alone(target, always_on):
    cfg = replace(SMALL, route="random", target=target, always_on=always_on)
    masks = dydit.coins(torch.linspace(0, 1, 2000), cfg)
    heads, groups, tokens = masks[..., :4], masks[..., 4:8], masks[..., 8:]
    assert dydit.spend(heads, groups, tokens, cfg).mean().item() == pytest.approx(target, abs=0.01)
    assert heads[..., 0].eq(1).all() == always_on
    assert heads[..., 1].std() > 0.3 and tokens.float().var() > 0.1
    model = mixed(cfg)
    (masked, a), (sliced, b) = (run(model, *inputs(cfg), fast=f) for f in (False, True))
    assert torch.equal(a["tokens"], b["tokens"]) and furthest(masked, sliced) < 1e-5
    assert run(model, *inputs(cfg), complete=True)[1]["flops"].eq(1).all()


def test_sdt_alone_cannot_reach_a_small_lambda_because_attention_stays():
    cfg = dydit.size("XL/2")                                # the paper's reason why it fails
    attention = dydit.spend(torch.ones(1), torch.ones(1), torch.zeros(1), cfg).item()
    assert attention == pytest.approx(0.357, abs=1e-3)
    assert (0.5 - attention) / (1 - attention) == pytest.approx(0.222, abs=1e-3)


# ------------------------------------------------------------------------------- machines, pictures


class MetaDraw:
    """A draw of shapes without numbers: the first attempt to look at one fails."""

    first, rows = 0, torch.arange(8, device="meta")

    def uniform(self, name, *shape):
        return torch.rand(8, *shape, device="meta")

    normal = uniform


class Bf16(torch.nn.Module):
    """Gives a bf16 network bf16 pictures; the network is one level down, as DDP puts it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *rest, **options):
        return self.module(x.bfloat16(), *rest, **options)


@pytest.mark.parametrize("route", ["both", "width", "tokens", "random"])
def test_training_needs_no_host(route):
    with torch.device("meta"):
        model = dydit.DyDiT(replace(SMALL, route=route, complete=9)).bfloat16()
        x, y = torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=torch.long)
    loss, aux = dydit.loss(diffusion.RectifiedFlow(), Bf16(model), x, y, 0, MetaDraw())
    (loss + aux["flops_loss"] + aux["complete_loss"]).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("route", ["both", "random"])
def test_a_bf16_network_and_autocast_run_on_both_paths(route):
    model, (x, t, y) = mixed(replace(SMALL, route=route)), inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        auto = [run(model, x, t, y, fast=f) for f in (False, True)]
    model = model.bfloat16()
    pure = [run(model, x.bfloat16(), t, y, fast=f) for f in (False, True)]
    assert pure[0][0].dtype == pure[1][0].dtype == torch.bfloat16
    for (masked, a), (sliced, b) in (auto, pure):
        assert a["heads"].dtype == a["flops"].dtype == torch.float32
        assert torch.equal(a["heads"], b["heads"]) and torch.equal(a["groups"], b["groups"])
        assert (a["tokens"] != b["tokens"]).float().mean() < 0.05       # x is rounded otherwise
        if route == "random":                               # the same masks
            assert furthest(masked, sliced) < 0.03 * masked.abs().max()


def test_the_timetable_shows_every_head_and_group_at_every_time():
    model = mixed()
    heads, groups = timetable(model, columns=9)       # (1, N * (H + 1), columns)
    aux = run(model, *inputs(SMALL, t=0.25))[1]
    assert heads.shape == groups.shape == (1, 3 * 5, 9)
    assert torch.equal(heads[0, :, 2].view(3, 5)[:, :4], aux["heads"][0] * 2 - 1)
    assert torch.equal(groups[0, :, 2].view(3, 5)[:, :4], aux["groups"][0] * 2 - 1)
    assert heads[0, 0].eq(1).all() and heads[0, 4].eq(0).all()


# ------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module", params=["rf", "ddpm"])
def runs(request, tmp_path_factory):
    """A dense DiT by train.py, and how to fine-tune it: tune(name, ...) -> folder."""
    out = tmp_path_factory.mktemp(request.param)

    def command(name, model, *options):
        argv = ["--model", model, *MICRO, "--out", out / name, *options]
        assert train.cli([str(a) for a in argv]) == 0
        return out / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "digits", few_digits)
        dense = command("dense", "dit", "--path", request.param, "--steps", 4)
        yield dense, command


def tune(runs, name, *options):
    return runs[1](name, "dydit", "--init", runs[0] / "last.pt", *options)


def test_init_starts_from_the_dense_parent_and_draws_its_pictures(runs):
    out = tune(runs, "start", "--lr", 0, "--steps", 1)
    (dense, path, _), (ours, _, saved) = (sample.load(f / "last.pt") for f in (runs[0], out))
    assert saved["config"]["learn_sigma"] == (path.kind == "ddpm")
    with torch.no_grad():
        dense.final_layer.linear.weight += 0.1              # four steps leave it near 0
        ours.final_layer.linear.weight += 0.1
    a, b = (sample.generate(m, path, torch.arange(4), steps=4) for m in (dense, ours))
    assert furthest(a, b) < 1e-4 * a.abs().max() and a.std() > 0.1


@pytest.mark.parametrize("route", ["both", "width", "tokens", "random"])
def test_a_fine_tuning_that_was_stopped_goes_on_to_the_same_bit(runs, route):
    own = ["--set", "ramp=4", "hold=1", "complete=3", "quiet=4", f"route={route}", "head_bias=1",
           "channel_bias=1", "token_bias=1", "router_lr=10"]
    whole = tune(runs, f"{route}-whole", "--steps", 5, *own)
    cut = tune(runs, f"{route}-cut", "--steps", 2, *own)
    tune(runs, f"{route}-cut", "--steps", 5, "--resume", *own)
    a, b = (torch.load(f / "last.pt", weights_only=True) for f in (whole, cut))
    assert all(torch.equal(a[w][k], b[w][k]) for w in ("model", "ema") for k in a[w])
    lines = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert ["complete_loss" in line for line in lines] == [True] * 3 + [False] * 2


def test_figures_5_and_6_are_drawn(runs, tmp_path, capsys):
    file = tune(runs, "figures", "--steps", 1, "--set", "token_bias=1e6") / "last.pt"
    assert timetable_cli([str(file), "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert sample.cli([str(file), "--maps", "--n", "6", "--steps", "6", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("compute per token 1.000") == 12 and "heads (left)" in said   # all is on
    table = Image.open(tmp_path / "timetable.png").convert("L")
    assert sorted(v for _, v in table.getcolors()) == [128, 255]   # the frame, and all on
    for picture in (tmp_path / "tokens.png", file.with_name("maps.png")):
        assert min(Image.open(picture).size) > 100
    for wrong in ([str(runs[0] / "last.pt")], [], [str(file), "--device", "nowhere"]):
        assert timetable_cli(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_bench_draws_the_ratio_of_a_fine_tuning_and_times_sampling(runs, tmp_path, capsys):
    file = tune(runs, "bench", "--steps", 1, "--set", "token_bias=1e6") / "last.pt"
    dense = str(runs[0] / "last.pt")
    common = ["--dense", dense, "--out", str(tmp_path), "--device", "cpu"]
    bench_dydit.main([*common, "--curve", "13", "--target", "0.7"])
    bench_dydit.main([*common, "--ours", str(file), "--rounds", "1"])
    results = json.loads((tmp_path / "dydit_speed.json").read_text())
    assert [point[0] for point in results["curve 0.7"]] == [10, 13]
    assert all(point[3] == 1 for point in results["curve 0.7"])         # the ramp has hardly begun
    assert (tmp_path / "dydit_curve_0.7.png").exists()
    row, = results["sampling"]
    assert row["ratio"] == 1 and row["difference"] < 1e-2 and row["sliced"] > 0
    for wrong in (["--curve", "3"], ["--ours", str(file)], [*common, "--ours", dense]):
        with pytest.raises(train.Refusal, match="--dense|holds dit"):
            bench_dydit.main(["--out", str(tmp_path), *wrong])


# ------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("name", ["dydit", "dydit_nus"])
def test_the_authors_masks_outputs_and_ratio(name):
    meta, state, g = golden(name)
    model = dydit.from_official(state, heads=meta["heads"]).eval()
    assert model.cfg.always_on == (name == "dydit")
    t, y = g["t"] / 1000, g["y"]
    out, aux = run(model, g["x"], t, y)
    close(out, g["out"])
    rows = [run(model, g["x"][i, None], t[i, None], y[i, None], fast=True) for i in range(len(t))]
    close(torch.cat([out for out, _ in rows]), g["out"])
    for k in ("heads", "groups", "tokens"):
        assert torch.equal(aux[k], g[k]) and torch.equal(torch.cat([a[k] for _, a in rows]), g[k])
    if "out_complete" in g:
        close(run(model, g["x"], t, y, complete=True)[0], g["out_complete"])
    if "flops_ratio" in g:
        assert torch.allclose(aux["flops"], g["flops_ratio"].float(), atol=1e-6)


@pytest.mark.parametrize("name", ["dydit", "dydit_nus"])
def test_the_authors_guidance(name):
    meta, state, g = golden(name)
    model, half = dydit.from_official(state, heads=meta["heads"]).eval(), len(g["cfg_x"]) // 2
    for i in range(half):                                   # guide() samples: one time per call
        f = diffusion.guide(model, g["cfg_y"][i, None], meta["classes"], g["cfg_scale"].item(), 3)
        close(run(f, g["cfg_x"][i, None], g["cfg_t"][i].item() / 1000), g["cfg_out"][i, None])
