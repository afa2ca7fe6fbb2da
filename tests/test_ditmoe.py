"""Sentences from the DiT-MoE paper, checked."""

import json
import runpy
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, wake
from test_official import close, golden

import diffusion
import dit
import ditmoe
import train
from experiments import specialisation

SMALL = replace(ditmoe.TINY, size=8, channels=2, patch=2, dim=32, depth=2, heads=4, experts=4,
                learn_sigma=False)                                          # L = 16
DENSE = dit.Config(**{k: v for k, v in asdict(SMALL).items() if k in asdict(dit.TINY)})


def inputs(cfg=SMALL, n=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, cfg.channels, cfg.size, cfg.size, generator=g)
    return x, torch.rand(n, generator=g), torch.arange(n) % cfg.classes


def awake(**changes):
    torch.manual_seed(0)
    return wake(ditmoe.DiTMoE(replace(SMALL, **changes)))


def layer(**changes):
    """A MoE layer with weights of about 1, so that nothing is small, and tokens for it."""
    torch.manual_seed(0)
    moe = wake(ditmoe.MoE(replace(SMALL, **changes)))
    return moe, torch.randn(3, 16, 32)


# ---- the router


def test_a_token_takes_its_k_best_experts_at_their_raw_probabilities():
    P = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.6, 0.0, 0.4, 0.0]])
    weight, chosen = ditmoe.route(P, 2)
    assert chosen.tolist() == [[1, 3], [0, 2]]
    assert torch.equal(weight, torch.tensor([[0.5, 0.3], [0.6, 0.4]]))
    assert torch.allclose(ditmoe.route(P, 2, renormalize=True)[0][0], torch.tensor([0.625, 0.375]))


def test_the_router_computes_in_float32_in_a_bf16_model_and_under_autocast():
    moe, x = layer()
    exact = moe.gate(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.gate(x.bfloat16().float()), exact)
    moe = moe.bfloat16()
    P = moe.gate(x.bfloat16())
    assert P.dtype == torch.float32 and (P.sum(-1) - 1).abs().max() < 1e-6
    assert len(P.unique()) > 0.9 * len(exact.unique())                      # bf16 has 128 below 1


# ---- the layer


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("experts, k, shared", [(4, 2, 2), (4, 1, 0), (3, 3, 1), (1, 1, 1),
                                                (24, 2, 1)])
def test_the_layer_is_the_weighted_sum_over_chosen_experts_token_by_token(expert, experts, k,
                                                                           shared):
    moe, x = layer(experts=experts, k=k, shared=shared, expert=expert, hidden=2)
    y, notes = moe(x)
    for b, t in ((0, 0), (0, 7), (1, 3), (2, 15)):
        P = (moe.gate.weight @ x[b, t]).softmax(0)
        expected = moe.shared_experts(x[b, t]) if shared else torch.zeros(32)
        for e in P.argsort(descending=True)[:k]:
            w1, w2 = moe.experts.w1[e].T, moe.experts.w2[e].T
            if expert == "swiglu":
                own = w2 @ (F.silu(w1[:64] @ x[b, t]) * (w1[64:] @ x[b, t]))
            else:
                b1, b2 = moe.experts.b1[e], moe.experts.b2[e]
                own = w2 @ F.gelu(w1 @ x[b, t] + b1, approximate="tanh") + b2
            expected = expected + P[e] * own
        assert (y[b, t] - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
    assert abs(notes["load"].sum().item() - 1) < 1e-6


def test_one_gelu_expert_without_shared_ones_is_dit():
    dense = wake(dit.DiT(DENSE))
    one = replace(SMALL, experts=1, k=1, shared=0)
    model = ditmoe.from_dense(dense.state_dict(), one)
    x, t, y = inputs()
    assert (model(x, t, y)[0] - dense(x, t, y)[0]).abs().max() < 1e-6


def test_two_shared_experts_are_one_of_twice_the_width():
    torch.manual_seed(0)
    both, x = ditmoe.SwiGLU(32, 64), torch.randn(5, 32)
    parts = [ditmoe.SwiGLU(32, 32), ditmoe.SwiGLU(32, 32)]
    (g1, g2, u1, u2), (d1, d2) = both.w1.split(32), both.w2.split(32, dim=1)
    for part, w1, w2 in zip(parts, (torch.cat([g1, u1]), torch.cat([g2, u2])), (d1, d2)):
        part.load_state_dict(dict(w1=w1.detach(), w2=w2.detach()))
    assert (both(x) - parts[0](x) - parts[1](x)).abs().max() < 1e-6


def test_an_expert_that_nobody_chose_has_gradient_zero_and_not_none():
    moe, x = layer(experts=4, k=2)
    x = x.abs()
    with torch.no_grad():
        moe.gate.weight[3] = -1.0                                           # the least likely
    y, notes = moe(x)
    y.square().mean().backward()
    assert notes["load"][3] == 0 and not moe.experts.w1.grad[3].any()
    assert all(moe.experts.w1.grad[e].any() and moe.experts.w2.grad[e].any() for e in range(3))


def test_training_and_sampling_compute_and_learn_the_same():
    model, (x, t, y) = awake(), inputs()
    grads, outs = [], []
    for mode in (True, False):
        model.train(mode).zero_grad()
        out, _ = model(x, t, y)
        out.square().mean().backward()
        outs.append(out.detach())
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("experts", [4, 24])
def test_all_experts_in_one_kernel_compute_what_the_loop_computes(expert, experts):
    """grouped_mm has a slow CPU version, so the GPU's formulation can be compared here."""
    moe, _ = layer(experts=experts, expert=expert, hidden=2)
    net = moe.experts.bfloat16()
    owner = torch.tensor([0] * 5 + [2] * 9 + [3] * 2)
    x = torch.randn(16, 32).bfloat16()
    ends = torch.searchsorted(owner, torch.arange(experts), right=True, out_int32=True)
    grouped = partial(ditmoe.grouped_linear, ends=ends, owner=owner)
    results = []
    for y in (net(x, owner), net.network(x, net.w1, net.w2, net.b1, net.b2, grouped)):
        net.zero_grad()
        y.float().square().mean().backward()
        results.append([y.detach()] + [p.grad.clone() for p in net.parameters()])
    for loop, kernel in zip(*results):
        assert (loop - kernel).float().abs().max() <= 0.01 * loop.float().abs().max()


@pytest.mark.parametrize("changes", [dict(expert="gelu"), dict(qk_norm=True), dict(scope="image"),
                                     dict(moe_layers="deep"), dict(shared=0, k=1), dict(alpha=0.0)])
def test_every_variant_trains_without_waiting_for_a_gpu_and_in_bf16(changes):
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = ditmoe.DiTMoE(replace(SMALL, **changes)).bfloat16()
        if device == "cpu":
            wake(model)
        x, t, y = (v.to(device) for v in inputs())
        out, aux = model(x.bfloat16(), t, y)
        (out.float().square().mean() + aux["balance_loss"]).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        if device == "cpu":
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_float64_and_widths_that_no_kernel_likes_work():
    model = awake(dim=20, heads=2, hidden=3, experts=5, k=3)
    x, t, y = inputs()
    single = model(x, t, y)[0]
    double = model.double()(x.double(), t.double(), y)[0]
    assert double.dtype == torch.float64 and (single - double).abs().max() < 1e-5
    assert model.blocks[0].moe.gate(torch.randn(1, 2, 20).double()).dtype == torch.float64
    assert model.bfloat16()(x.bfloat16(), t, y)[0].isfinite().all()


def test_experts_start_as_xavier_matrices_and_the_router_within_one_over_root_d():
    moe = ditmoe.MoE(replace(SMALL, dim=128, hidden=4))
    for w in (*moe.experts.w1.split(512, dim=2), moe.experts.w2):
        assert abs(w.std().item() / (2 / (128 + 512)) ** 0.5 - 1) < 0.02
    assert 0.95 < moe.gate.weight.abs().max().item() * 128**0.5 <= 1


# ---- the balance loss


def collapsed(n, L, experts, winners):
    """P of n pictures whose tokens all give nearly everything to the winners."""
    P = torch.full((n, L, experts), 1e-9)
    P[..., winners] = 1 / len(winners)
    return P


def test_balance_loss_is_1_when_experts_are_used_evenly_and_e_over_k_when_k_take_all():
    even = torch.cat([collapsed(2, 8, 4, [0, 1]), collapsed(2, 8, 4, [2, 3])], dim=1)
    loss, share = ditmoe.balance_loss(even, ditmoe.route(even, 2)[1])
    assert abs(loss.item() - 1) < 1e-6 and torch.equal(share, torch.full((4,), 0.25))
    few = collapsed(2, 16, 8, [3, 5])
    loss, share = ditmoe.balance_loss(few, ditmoe.route(few, 2)[1])
    assert abs(loss.item() - 8 / 2) < 1e-6 and share.tolist() == [0, 0, 0, 0.5, 0, 0.5, 0, 0]


def test_the_model_reports_alpha_times_layers_when_balanced_and_the_share_of_each_expert():
    model = awake(experts=2, k=2, alpha=0.01)                               # everybody takes both
    _, aux = model(*inputs())
    assert abs(aux["balance_loss"].item() - 0.01 * 2) < 1e-8
    assert torch.equal(aux["load"], torch.full((2, 2), 0.5))
    assert aux["experts"].shape == (2, 3, 16, 2) and "map" not in aux


def test_experts_in_balance_over_the_batch_need_not_be_so_in_each_picture():
    P = torch.cat([collapsed(1, 16, 4, [0, 1]), collapsed(1, 16, 4, [2, 3])])
    chosen = ditmoe.route(P, 2)[1]
    assert abs(ditmoe.balance_loss(P, chosen, "batch")[0].item() - 1) < 1e-6
    assert abs(ditmoe.balance_loss(P, chosen, "image")[0].item() - 2) < 1e-6


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_counts_are_constants_and_the_gradient_lowers_logits_of_busy_experts(scope):
    torch.manual_seed(0)
    z = torch.randn(3, 10, 6, dtype=torch.float64, requires_grad=True)
    P = z.softmax(-1)
    chosen = ditmoe.route(P, 2)[1]
    ditmoe.balance_loss(P, chosen, scope)[0].backward()
    hot = F.one_hot(chosen, 6).sum(2).double()                              # (3, 10, 6)
    f = 6 / 2 * (hot.mean((0, 1), keepdim=True) if scope == "batch" else hot.mean(1, keepdim=True))
    P = P.detach()
    assert (z.grad - P * (f - (f * P).sum(-1, keepdim=True)) / 30).abs().max() < 1e-12


def test_a_skewed_router_recovers_on_the_balance_loss_alone():
    torch.manual_seed(0)
    moe = ditmoe.MoE(replace(SMALL, experts=8, alpha=1.0))
    x = torch.randn(8, 64, 32) + 0.5
    with torch.no_grad():
        moe.gate.weight[:2] += 1.0
    optimizer = torch.optim.AdamW(moe.gate.parameters(), lr=1e-2, weight_decay=0)
    for step in range(150):
        P = moe.gate(x)
        loss, share = ditmoe.balance_loss(P, ditmoe.route(P, 2)[1])
        if step == 0:
            assert loss > 3.5 and share[:2].sum() > 0.9                     # two take everything
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 1.05 and share.min() > 0.5 / 8


def test_without_balance_loss_the_router_still_learns_from_the_picture():
    model = awake(alpha=0.0)
    out, aux = model(*inputs())
    assert aux["balance_loss"] == 0
    (out.square().mean() + aux["balance_loss"]).backward()
    assert all(block.moe.gate.weight.grad.any() for block in model.blocks)


def test_more_processes_do_not_change_the_balance_gradient(monkeypatch):
    """Two processes with half of the pictures each: the mean of their gradients is the gradient of
    one process with all pictures, because counts are summed over processes."""
    torch.manual_seed(0)
    z = torch.randn(4, 16, 8, requires_grad=True)
    P = z.softmax(-1)
    chosen = ditmoe.route(P, 2)[1]
    whole, = torch.autograd.grad(ditmoe.balance_loss(P, chosen)[0], z, retain_graph=True)
    halves, grads = (slice(0, 2), slice(2, 4)), []
    for mine, theirs in (halves, halves[::-1]):
        other = torch.bincount(chosen[theirs].flatten(), minlength=8)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(other))
        loss, _ = ditmoe.balance_loss(P[mine], chosen[mine])
        grads += torch.autograd.grad(loss, z, retain_graph=True)
    assert (sum(grads) / 2 - whole).abs().max() < 1e-9
    monkeypatch.setattr(torch.distributed, "all_reduce", None)              # one process may sample
    with torch.no_grad():
        ditmoe.balance_loss(P, chosen)


# ---- sizes


TABLE = [("S/2", 8, 199_307_552, 71_905_568, 15.43), ("S/2", 16, 369_213_728, 71_942_432, 15.44),
         ("B/2", 8, 795_861_536, 286_253_600, 61.68), ("B/2", 16, 1_475_412_512, 286_327_328, None),
         ("L/2", 8, 2_823_764_000, 1_011_824_672, 219.26),
         ("L/2", 16, 5_239_879_712, 1_012_021_280, None),
         ("XL/2", 8, 4_168_164_128, 1_492_722_464, 323.74),
         ("XL/2", 16, 7_735_677_728, 1_492_980_512, None),
         ("G/2", 8, 8_890_604_832, 3_181_108_512, None),
         ("G/2", 16, 16_503_717_152, 3_181_559_072, 690.94),
         ("S/4", 8, 199_289_216, None, None), ("S/8", 8, 199_492_352, None, None),
         ("XL/4", 8, 4_168_108_928, None, None), ("XL/8", 8, 4_168_717_568, None, None)]
BEFORE_ATTENTION = "GMAC without QK', AV (the paper's Gflops)"


def count(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in ditmoe.DiTMoE(cfg).parameters())


@pytest.mark.parametrize("name, experts, total, activated, gflops", TABLE)
def test_parameters_and_gflops_are_those_of_the_paper(name, experts, total, activated, gflops):
    cfg = ditmoe.size(name, experts=experts)
    cost = ditmoe.cost(cfg)
    assert count(cfg) == total
    assert activated is None or total - cost["idle parameters"] == activated
    assert gflops is None or f"{cost[BEFORE_ATTENTION]:.2f}" == str(gflops)


def test_with_attention_products_the_multiplications_are_those_we_derived():
    for name, experts, gmac in (("S/2", 8, 16.03), ("B/2", 8, 62.89), ("L/2", 8, 222.48),
                                ("XL/2", 8, 327.97), ("G/2", 16, 698.33)):
        assert f"{ditmoe.cost(ditmoe.size(name, experts=experts))['GMAC']:.2f}" == str(gmac)


def test_q_k_norm_adds_4_heads_worth_of_parameters_per_block():
    assert count(ditmoe.size("XL/2", qk_norm=True)) == 4_168_172_192
    assert count(ditmoe.size("G/2", experts=16, qk_norm=True)) == 16_503_731_232


@pytest.mark.parametrize("changes", [dict(expert="gelu"), dict(moe_layers="deep"),
                                     dict(hidden=2, k=3)])
def test_idle_parameters_are_those_of_the_experts_not_chosen(changes):
    cfg = replace(SMALL, experts=8, **changes)
    fewer = replace(cfg, experts=cfg.k)
    routers = len(ditmoe.moe_layers(cfg)) * (8 - cfg.k) * cfg.dim
    assert ditmoe.cost(cfg)["idle parameters"] == count(cfg) - count(fewer) - routers


@pytest.mark.parametrize("moe_layers", ["all", "deep"])
def test_one_gelu_expert_costs_what_the_mlp_of_dit_costs_plus_a_router(moe_layers):
    one = replace(SMALL, experts=1, k=1, shared=0, expert="gelu", hidden=4, moe_layers=moe_layers)
    routers = len(ditmoe.moe_layers(one)) * 16 * 32 / 1e9
    assert abs(ditmoe.cost(one)["GMAC"] - routers - dit.cost(DENSE)["GMAC"]) < 1e-12


def test_tiny_activates_about_what_the_tiny_dit_costs():
    ratio = ditmoe.cost(ditmoe.TINY)["GMAC"] / dit.cost(dit.TINY)["GMAC"]
    assert 0.95 < ratio < 1.1


def test_experts_may_fill_the_deep_half_the_shallow_half_or_every_second_block():
    for which, layers in (("all", [0, 1, 2, 3, 4, 5]), ("deep", [3, 4, 5]), ("shallow", [0, 1, 2]),
                          ("2", [1, 3, 5]), ("3", [2, 5])):
        cfg = replace(SMALL, depth=6, moe_layers=which)
        model = awake(depth=6, moe_layers=which)
        assert list(ditmoe.moe_layers(cfg)) == layers
        assert [i for i, block in enumerate(model.blocks) if hasattr(block, "moe")] == layers
        assert model(*inputs())[1]["load"].shape == (len(layers), 4)


@pytest.mark.parametrize("wrong", [dict(k=5), dict(k=0), dict(expert="relu"), dict(scope="token"),
                                   dict(moe_layers="7"), dict(moe_layers="odd"), dict(hidden=0)])
def test_a_config_that_cannot_be_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[0])):
        ditmoe.DiTMoE(replace(SMALL, **wrong))


# ---- golden: what the authors' own code computed


@pytest.fixture(params=["ditmoe", "ditmoe_qknorm"])
def theirs(request):
    meta, state, g = golden(request.param)
    load = partial(ditmoe.from_official, state, k=meta["k"],
                   heads=None if request.param == "ditmoe_qknorm" else meta["heads"])
    return meta, state, g, load


def test_official_weights_predict_what_the_official_code_predicts(theirs):
    meta, _, g, load = theirs
    model = load()
    for k in ("dim", "heads", "depth", "size", "patch", "channels", "classes", "learn_sigma",
              "experts"):
        assert getattr(model.cfg, k) == meta[k], k
    with torch.no_grad():
        close(model.eval()(g["x"], g["t"] / 1000, g["y"])[0], g["out"])
        for i in range(m := len(g["cfg_x"]) // 2):      # DDPM: 3 channels guided
            x, t, y = (g[k][i : i + 1] for k in ("cfg_x", "cfg_t", "cfg_y"))
            f = diffusion.guide(model, y, meta["classes"], g["cfg_scale"].item(), 3)
            ours = f(x, t.item() / 1000)
            scale = g["cfg_out"].abs().max()
            assert (ours - g["cfg_out"][i : i + 1]).abs().max() <= 1e-4 * scale
            assert (ours - g["cfg_out"][m + i : m + i + 1])[:, :3].abs().max() <= 1e-4 * scale


def test_official_training_outputs_balance_losses_and_gradients_are_ours(theirs):
    _, _, g, load = theirs
    model, losses = load(alpha=0.01).train(), []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, __, out: losses.append(0.01 * out[1]["balance"]))
    out, aux = model(g["x"], g["t"] / 1000, g["y"])
    close(out, g["train_out"])
    close(torch.stack(losses), g["balance_losses_alpha001"])
    close(aux["balance_loss"], g["balance_losses_alpha001"].sum())
    (out.square().mean() + aux["balance_loss"]).backward()
    close(model.blocks[0].moe.gate.weight.grad, g["grad_gate0"])
    close(model.blocks[0].moe.experts.w2.grad[0].T, g["grad_down0"])


def test_official_rectified_flow_weights_sample_what_the_official_code_samples(theirs):
    meta, _, g, load = theirs
    model = load(time_scale=1.0).eval()                                     # their t is in [0, 1]
    f = diffusion.guide(model, g["rf10_y"], meta["classes"], g["rf10_cfg"].item())
    with torch.no_grad():
        *_, (t, x, x0) = diffusion.RectifiedFlow().trajectory(f, g["rf10_noise"], steps=10)
    close(x, g["rf10_out"], 1e-3)
    close(x0, x)                                        # the last step's guess is where it ends
    assert t == 0


def test_weights_go_back_to_the_official_layout_unchanged(theirs):
    _, state, _, load = theirs
    back = ditmoe.to_official(load())
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    wrapped = dict(ema={f"module.{k}": v for k, v in back.items()}, opt={})
    assert set(load.func(wrapped, **load.keywords).state_dict()) == set(load().state_dict())


def test_what_shapes_do_not_tell_is_asked_for():
    state = ditmoe.to_official(awake())
    with pytest.raises(ValueError, match="pass heads="):
        ditmoe.from_official(state, k=2)
    with pytest.raises(ValueError, match="pass k="):
        ditmoe.from_official(state, heads=4)
    with pytest.raises(ValueError, match="not a DiT-MoE"):
        ditmoe.from_official(dit.DiT(DENSE).state_dict(), heads=4, k=2)
    normed = awake(qk_norm=True, shared=0)
    again = ditmoe.from_official(ditmoe.to_official(normed), k=2)
    x, t, y = inputs()
    assert again.cfg.heads == 4 and torch.equal(again(x, t, y)[0], normed(x, t, y)[0])
    for changes in (dict(expert="gelu"), dict(moe_layers="deep")):
        with pytest.raises(ValueError, match="official layout"):
            ditmoe.to_official(awake(**changes))


# ---- upcycling


@pytest.mark.parametrize("moe_layers", ["all", "deep"])
def test_an_upcycled_dit_computes_what_the_dense_one_computes(moe_layers):
    dense = wake(dit.DiT(DENSE))
    model = ditmoe.from_dense(dense.state_dict(), replace(SMALL, experts=8, moe_layers=moe_layers))
    x, t, y = inputs()
    out, aux = model(x, t, y)
    assert (out - dense(x, t, y)[0]).abs().max() < 1e-5
    assert model.cfg.expert == "gelu" and model.cfg.hidden == 4 and model.cfg.renormalize
    assert aux["load"].max() < 1                        # with a router that does choose


def test_an_upcycled_dit_trains_on_without_a_jump_and_its_experts_part():
    torch.manual_seed(0)
    x, _, y = inputs(n=16)
    path = diffusion.RectifiedFlow()

    def fit(model, steps, start):
        """-> diffusion losses; each step has its own t and noise, the same for every model."""
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(start, start + steps):
            t, noise = path.draw(x, diffusion.Draw(0, step, 16, torch.arange(16)))
            per_picture, aux = path.loss(model, x, y, t, noise)
            optimizer.zero_grad(), (per_picture.mean() + aux.get("balance_loss", 0)).backward()
            optimizer.step()
            losses.append(per_picture.mean().item())
        return torch.tensor(losses)

    dense = dit.DiT(DENSE)
    fit(dense, 40, 0)
    model = ditmoe.from_dense(dense.state_dict(), SMALL)
    dense, sparse = fit(dense, 25, 40), fit(model, 25, 40)
    assert abs(sparse[0] - dense[0]) < 1e-5
    assert (sparse - dense).max() < 0.1 * dense.mean()
    w = model.blocks[0].moe.experts.w1
    assert all((w[0] - w[e]).abs().max() > 1e-4 for e in range(1, 4))
    assert model.blocks[0].moe.shared_experts.fc2.weight.any()


def test_what_is_not_a_dense_dit_of_this_shape_is_refused():
    dense = dit.DiT(DENSE).state_dict()
    for state, cfg, words in ((dense, replace(SMALL, depth=3), "no blocks.2"),
                              (dense, replace(SMALL, qk_norm=True), "qk_norm"),
                              (awake().state_dict(), SMALL, "not a dense DiT")):
        with pytest.raises(ValueError, match=words):
            ditmoe.from_dense(state, cfg)


# ---- what experts are chosen for


def test_information_is_0_for_independent_things_and_log_e_for_the_same_thing():
    independent = torch.tensor([[2, 4, 6], [1, 2, 3]])
    assert specialisation.information(independent).abs() < 1e-12
    assert abs(specialisation.information(5 * torch.eye(8, dtype=torch.long)) - 3) < 1e-12
    assert abs(specialisation.information(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])) - 1) < 1e-12


class Chooser:
    """A model whose first choice is rule(t, y, patch), and whose second is the expert after it."""

    def __init__(self, rule):
        self.rule, self.cfg, self.parameters = rule, replace(SMALL, experts=8), None

    def __call__(self, x, t, y):
        patch = torch.arange(16).expand(len(x), 16)
        first = self.rule((t * 8).round().long()[:, None], y[:, None], patch).expand(len(x), 16) % 8
        return x, dict(experts=torch.stack([first, (first + 1) % 8], -1).expand(2, -1, -1, -1))


@pytest.mark.parametrize("cause, rule", [("position", lambda t, y, patch: patch),
                                         ("step", lambda t, y, patch: t),
                                         ("class", lambda t, y, patch: y)])
def test_experts_chosen_by_one_thing_tell_of_that_thing_and_of_nothing_else(cause, rule):
    labels = torch.arange(10).repeat(8)
    recorder = specialisation.Recorder(Chooser(rule), labels, steps=8)
    for batch in labels.split(32):
        f = diffusion.guide(recorder, batch, 10, scale=2.0)
        for _ in diffusion.RectifiedFlow().trajectory(f, torch.zeros(len(batch), 2, 8, 8), steps=8):
            pass
    assert recorder.count[0].sum() == recorder.count[1].sum() == 2 * 80 * 8 * 16 * 2
    assert recorder.by_class[0].sum() == 2 * 80 * 8 * 16 * 2               # not the unlabelled half
    for layer in specialisation.statistics(recorder):
        told, chance = layer["information"], layer["by_chance"]
        for name in told:
            assert (told[name] > 1.5) == (name == cause), name
            assert chance[name] < 0.5 and (name == cause or told[name] < 0.01)
        assert layer["dead"] == 0 and layer["load_entropy"] > 0.95
        focus = torch.tensor(layer["concentration"])
        assert (focus > 0.6).all() if cause == "step" else (focus < 0.1).all()


def test_a_dead_expert_is_counted_and_step_0_is_the_noisiest():
    recorder = specialisation.Recorder(Chooser(lambda t, y, patch: torch.where(t == 8, 0, 2)),
                               torch.arange(3), steps=8)
    f = diffusion.guide(recorder, torch.arange(3), 10)
    for _ in diffusion.RectifiedFlow().trajectory(f, torch.zeros(3, 2, 8, 8), steps=8):
        pass
    assert recorder.count[0, 0, 0].sum(0).tolist() == [48, 48, 0, 0, 0, 0, 0, 0]
    assert recorder.count[0, 0, 1].sum(0).tolist() == [0, 0, 48, 48, 0, 0, 0, 0]
    assert specialisation.statistics(recorder)[0]["dead"] == 4


@pytest.fixture
def checkpoint(tmp_path):
    def write(name, model):
        path = dict(kind="rf", options=diffusion.RectifiedFlow().options, weights={})
        state = model.state_dict()
        torch.save(dict(format=train.FORMAT, name=name, config=asdict(model.cfg), step=0,
                        model=state, ema=state, path=path, data=dict(source="digits")),
                   tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt"
    return write


def test_the_analysis_writes_three_heat_maps_a_map_and_the_numbers(checkpoint, capsys, tmp_path):
    specialisation.main([str(checkpoint("ditmoe", awake(moe_layers="deep"))), "--n", "2", "--steps", "3"])
    out = tmp_path / "experts"
    names = {"by_position.png", "by_step.png", "by_class.png", "map.png", "experts.json"}
    assert {f.name for f in out.iterdir()} == names
    report = json.loads((out / "experts.json").read_text())
    assert report["pictures"] == 20 and [s["layer"] for s in report["layers"]] == [1]
    assert len(report["layers"][0]["concentration"]) == 3
    assert "bits of information" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_and_a_missing_one_are_refused(checkpoint, tmp_path, capsys,
                                                                       monkeypatch):
    with pytest.raises(train.Refusal, match="is a dit"):
        specialisation.main([str(checkpoint("dit", dit.DiT(DENSE)))])
    monkeypatch.setattr(sys, "argv", ["ditmoe.py", str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "ditmoe.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("ditmoe.py: ") and err.count("\n") == 1
