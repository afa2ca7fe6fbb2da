"""Sentences from the DiT-MoE paper, checked. What the authors' own code computed is in
test_official.py."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import wake
from torch.utils._python_dispatch import TorchDispatchMode

import dit
import ditmoe
from diffusion import RectifiedFlow, StepRNG

SMALL = replace(ditmoe.TINY, size=8, channels=2, patch=2, dim=32, depth=2, heads=4, experts=4,
                learn_sigma=False)                                          # L = 16
DENSE = dit.Config(**{k: v for k, v in asdict(SMALL).items() if k in asdict(dit.TINY)})
both_forms = pytest.mark.parametrize("form", ["swiglu", "gelu"])


def inputs(n=3):
    return torch.randn(n, 2, 8, 8), torch.rand(n), torch.arange(n) % 10


def woken(**changes):
    return wake(ditmoe.DiTMoE(replace(SMALL, **changes)))


def layer(**changes):
    """A MoE layer whose biases are not zero, and tokens for it."""
    return wake(ditmoe.MoE(replace(SMALL, **changes))), torch.randn(3, 16, 32)


# ------------------------------------------------------------------------ the router


def test_a_token_takes_its_k_best_experts_and_weighs_them_by_their_probabilities():
    probs = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.6, 0.0, 0.4, 0.0]])
    gates, chosen = ditmoe.top_k_gating(probs, 2)
    assert chosen.tolist() == [[1, 3], [0, 2]]
    assert torch.equal(gates, torch.tensor([[0.5, 0.3], [0.6, 0.4]]))
    assert torch.allclose(ditmoe.top_k_gating(probs, 2, True)[0][0], torch.tensor([0.625, 0.375]))


def test_the_router_computes_in_float32_in_a_bf16_model_and_under_autocast():
    moe, x = layer()
    exact = moe.gate(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.gate(x.bfloat16().float()), exact)
    probs = moe.bfloat16().gate(x.bfloat16())
    assert probs.dtype == torch.float32 and (probs.sum(-1) - 1).abs().max() < 1e-6
    assert len(probs.unique()) > 0.9 * len(exact.unique())                  # bf16 has 128 below 1


def test_two_chosen_probabilities_of_a_new_router_sum_to_about_0_43():
    probs = ditmoe.Router(replace(SMALL, dim=192, experts=8))(torch.randn(1, 4096, 192))
    assert probs.topk(2)[0].sum(-1).mean().item() == pytest.approx(0.43, abs=0.02)


def test_a_renormalised_single_expert_trains_its_router_by_the_balance_loss_only():
    moe, x = layer(k=1, renormalize=True)
    y, stats = moe(x)
    y.square().mean().backward(retain_graph=True)
    assert moe.gate.weight.grad.abs().max() < 1e-7
    stats["balance"].backward()
    assert moe.gate.weight.grad.abs().max() > 1e-4


# ------------------------------------------------------------------------ the layer


@both_forms
@pytest.mark.parametrize("E, k, shared", [(4, 2, 2), (4, 1, 0), (3, 3, 1), (1, 1, 1), (24, 2, 1)])
def test_the_layer_is_the_weighted_sum_of_the_chosen_experts_of_each_token(form, E, k, shared):
    moe, x = layer(experts=E, k=k, shared=shared, expert=form, hidden=2)
    y, stats = moe(x)
    for b, t in ((0, 0), (0, 7), (1, 3), (2, 15)):
        probs = (moe.gate.weight @ x[b, t]).softmax(0)
        expected = moe.shared_experts(x[b, t]) if shared else torch.zeros(32)
        for e in probs.argsort(descending=True)[:k]:
            w1, w2 = moe.experts.w1[e].T, moe.experts.w2[e].T
            if form == "swiglu":
                one = w2 @ (F.silu(w1[:64] @ x[b, t]) * (w1[64:] @ x[b, t]))
            else:
                b1, b2 = moe.experts.b1[e], moe.experts.b2[e]
                one = w2 @ F.gelu(w1 @ x[b, t] + b1, approximate="tanh") + b2
            expected = expected + probs[e] * one
        assert (y[b, t] - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
    assert stats["load"].sum().item() == pytest.approx(1, abs=1e-6)


def test_the_engine_computes_what_the_loop_over_experts_computes():
    """Forward and backward, with an expert that no token chose: its gradient is 0 and not None."""
    experts = ditmoe.Experts(5, 32, 48, "swiglu")
    x, chosen = torch.randn(20, 32), torch.rand(20, 4).argsort(1)[:, :2].flatten()      # never 4
    token, gate, results = torch.arange(40) // 2, torch.rand(40, requires_grad=True), []
    for compute in (experts, lambda *args: ditmoe.experts_loop(experts, *args)):
        y = compute(x, token, chosen, gate)
        results.append([y, *torch.autograd.grad(y.square().mean(), [gate, *experts.parameters()])])
    for engine, loop in zip(*results):
        assert (engine - loop).abs().max() < 1e-5 * loop.abs().max()
    assert not results[0][2][4].any() and all(results[0][2][e].any() for e in range(4))


@both_forms
@pytest.mark.parametrize("E", [4, 24])
def test_all_experts_in_one_kernel_compute_what_the_loop_computes(form, E):
    """grouped_mm has a slow CPU version, so the way of a GPU can be compared here."""
    net = wake(ditmoe.Experts(E, 32, 64, form)).bfloat16()
    expert, x = torch.tensor([0] * 5 + [2] * 9 + [3] * 2), torch.randn(16, 32).bfloat16()
    ends = torch.searchsorted(expert, torch.arange(E), right=True, out_int32=True)

    def grouped(z):
        z = net.act(ditmoe.grouped_linear(z, net.w1, net.b1, ends, expert))
        return ditmoe.grouped_linear(z, net.w2, net.b2, ends, expert)

    results = []
    for y in (net.networks(x, ends, expert), grouped(x)):
        grads = torch.autograd.grad(y.float().square().mean(), list(net.parameters()))
        results.append([y, *grads])
    for loop, kernel in zip(*results):
        assert (loop - kernel).float().abs().max() <= 0.01 * loop.float().abs().max()


def test_the_gradient_of_a_bias_is_a_product_and_no_sum_in_bf16():
    """A GPU adds bf16 rows by index one after the other: from 256 on, adding 1 changes nothing.
    A CPU adds them better, so what is tested here is that nothing is added by index."""
    b, called = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True), []
    z, w = torch.zeros(4096, 8).bfloat16(), torch.zeros(2, 8, 8).bfloat16()
    ends, expert = torch.tensor([4096, 4096]).int(), torch.zeros(4096, dtype=torch.long)

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            called.append(f.__name__)
            return f(*args, **(kwargs or {}))

    with Record():
        (ditmoe.grouped_linear(z, w, b, ends, expert) * 1).float().sum().backward()
    assert b.grad.tolist() == [[4096.0] * 8, [0.0] * 8]
    assert any("mm" in f for f in called) and not any("index" in f for f in called)


@pytest.mark.parametrize("D, h", [(32, 20), (20, 32)])
def test_widths_that_the_kernel_refuses_go_through_the_loop(monkeypatch, D, h):
    """The meta device tells: the loop asks for the number of tokens of each expert, a value."""
    monkeypatch.setattr(ditmoe, "grouped_linear", None)
    with torch.device("meta"), pytest.raises(NotImplementedError, match="meta"):
        net, pair = ditmoe.Experts(4, D, h, "gelu").bfloat16(), torch.arange(8)
        net(torch.randn(8, D).bfloat16(), pair, pair % 4, torch.randn(8))


def test_one_gelu_expert_without_shared_ones_is_dit():
    dense, (x, t, y) = wake(dit.DiT(DENSE)), inputs()
    model = ditmoe.from_dense(dense.state_dict(), replace(SMALL, experts=1, k=1, shared=0))
    assert (model(x, t, y)[0] - dense(x, t, y)[0]).abs().max() < 1e-6


def test_two_shared_experts_are_one_of_twice_the_width():
    both, x = ditmoe.SwiGLU(32, 64), torch.randn(5, 32)
    (g1, g2, u1, u2), (d1, d2) = both.w1.split(32), both.w2.split(32, dim=1)
    parts = [F.silu(x @ g.T) * (x @ u.T) @ d.T for g, u, d in ((g1, u1, d1), (g2, u2, d2))]
    assert (both(x) - sum(parts)).abs().max() < 1e-6


def test_training_and_sampling_compute_and_learn_the_same():
    model, (x, t, y), results = woken(), inputs(), []
    for mode in (True, False):
        prediction, _ = model.train(mode)(x, t, y)
        weights = [p for p in model.parameters() if p.requires_grad]
        results.append([prediction, *torch.autograd.grad(prediction.square().mean(), weights)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results))


@pytest.mark.parametrize("changes", [dict(expert="gelu"), dict(qk_norm=True), dict(scope="image"),
                                     dict(moe_layers="deep"), dict(shared=0, k=1), dict(alpha=0.0)])
def test_every_variant_trains_in_bf16_without_waiting_for_a_gpu(changes):
    """The meta device has no values: whatever would wait for one fails on it."""
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = ditmoe.DiTMoE(replace(SMALL, **changes)).bfloat16()
        x, t, y = (v.to(device) for v in inputs())
        prediction, aux = (model if device == "meta" else wake(model))(x.bfloat16(), t, y)
        (prediction.float().square().mean() + aux["balance_loss"]).backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and (device == "meta" or g.isfinite().all()) for g in grads)


def test_float64_works_and_so_do_widths_that_no_kernel_likes():
    model, (x, t, y) = woken(dim=20, heads=2, hidden=3, experts=5, k=3), inputs()
    single = model(x, t, y)[0]
    double = model.double()(x.double(), t.double(), y)[0]
    assert double.dtype == torch.float64 and (single - double).abs().max() < 1e-5
    assert model.blocks[0].moe.gate(torch.randn(1, 2, 20).double()).dtype == torch.float64
    assert model.bfloat16()(x.bfloat16(), t, y)[0].isfinite().all()


def test_experts_start_as_xavier_matrices_and_the_router_within_one_over_root_d():
    moe = ditmoe.MoE(replace(SMALL, dim=128, hidden=4))
    for w in (*moe.experts.w1.split(512, dim=2), moe.experts.w2):
        assert w.std().item() == pytest.approx((2 / (128 + 512)) ** 0.5, rel=0.02)
    assert 0.95 < moe.gate.weight.abs().max().item() * 128**0.5 <= 1


# ------------------------------------------------------------------------ the balance loss


def balance(probs, k=2, scope="batch"):
    loss, share = ditmoe.balance_loss(probs, ditmoe.top_k_gating(probs, k)[1], scope)
    return loss.item(), share.tolist()


def winning(experts, E, gap=40, n=1, L=8):
    """probs (n, L, E) of images whose tokens give these experts a logit of gap, the others 0."""
    return torch.tensor([[[gap * float(e in experts) for e in range(E)]] * L] * n).softmax(-1)


def test_the_balance_loss_has_the_value_worked_by_hand_in_the_docstring():
    loss, share = balance(torch.tensor([[[.5, .3, .1, .1], [.4, .1, .3, .2]]]))
    assert loss == pytest.approx(1.3) and share == [0.5, 0.25, 0.25, 0]


def test_the_balance_loss_is_1_if_counts_are_even_and_e_over_k_only_if_probabilities_collapse():
    for gap in (0.01, 40):                              # even counts, whatever the probabilities
        even = torch.cat([winning([0, 1], 4, gap), winning([2, 3], 4, gap)], dim=1)
        assert balance(even) == (pytest.approx(1), [0.25] * 4)
    for gap, loss in ((0.01, 1.008), (1, 1.90), (3, 3.48), (10, 4.00)):
        value, share = balance(winning([3, 5], 8, gap))
        assert value == pytest.approx(loss, abs=0.005) and share == [0, 0, 0, 0.5, 0, 0.5, 0, 0]


def test_the_balance_loss_falls_below_1_if_all_second_choices_are_one_improbable_expert():
    probs = torch.full((1, 700, 8), 1e-6)
    probs[0, torch.arange(700), torch.arange(700) % 7 + 1] = 1.0        # evenly: experts 1 to 7
    probs[:, :, 0] = 1e-5                                               # second choice: expert 0
    probs = probs / probs.sum(-1, keepdim=True)
    loss, load = ditmoe.balance_loss(probs, ditmoe.top_k_gating(probs, 2)[1])
    assert load[0] == pytest.approx(0.5) and loss.item() == pytest.approx(8 / 14, abs=1e-3)


def test_experts_in_balance_over_the_batch_need_not_be_so_in_each_image():
    probs = torch.cat([winning([0, 1], 4), winning([2, 3], 4)])
    assert balance(probs)[0] == pytest.approx(1)
    assert balance(probs, scope="image")[0] == pytest.approx(2)


def test_the_model_reports_alpha_times_layers_if_counts_are_even():
    _, aux = woken(experts=2, k=2, alpha=0.01)(*inputs())                   # all take both
    assert aux["balance_loss"].item() == pytest.approx(0.01 * 2)
    assert torch.equal(aux["load"], torch.full((2, 2), 0.5))
    assert aux["experts"].shape == (2, 3, 16, 2) and "map" not in aux


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_counts_are_constants_and_the_gradient_lowers_the_logits_of_busy_experts(scope):
    z = torch.randn(3, 10, 6, dtype=torch.float64, requires_grad=True)
    probs = z.softmax(-1)
    chosen = ditmoe.top_k_gating(probs, 2)[1]
    ditmoe.balance_loss(probs, chosen, scope)[0].backward()
    hot = F.one_hot(chosen, 6).sum(2).double()                              # (3, 10, 6)
    f = 6 / 2 * (hot.mean((0, 1), keepdim=True) if scope == "batch" else hot.mean(1, keepdim=True))
    probs = probs.detach()
    assert (z.grad - probs * (f - (f * probs).sum(-1, keepdim=True)) / 30).abs().max() < 1e-12


def test_a_skewed_router_recovers_on_the_balance_loss_alone():
    moe, x = ditmoe.MoE(replace(SMALL, experts=8)), torch.randn(8, 64, 32) + 0.5
    with torch.no_grad():
        moe.gate.weight[:2] += 1.0
    optimizer = torch.optim.AdamW(moe.gate.parameters(), lr=1e-2, weight_decay=0)
    for step in range(150):
        probs = moe.gate(x)
        loss, share = ditmoe.balance_loss(probs, ditmoe.top_k_gating(probs, 2)[1])
        assert step or loss > 3.5 and share[:2].sum() > 0.9                 # two take everything
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 1.05 and share.min() > 0.5 / 8


def test_without_balance_loss_the_router_still_learns_from_the_prediction():
    model = woken(alpha=0.0)
    prediction, aux = model(*inputs())
    assert aux["balance_loss"] == 0
    (prediction.square().mean() + aux["balance_loss"]).backward()
    assert all(block.moe.gate.weight.grad.any() for block in model.blocks)


def test_more_processes_do_not_change_the_balance_gradient(monkeypatch):
    """Two processes with half of the images each: the mean of their gradients is the gradient of
    one process with all images, because counts are summed over processes."""
    z = torch.randn(4, 16, 8, requires_grad=True)
    probs = z.softmax(-1)
    chosen = ditmoe.top_k_gating(probs, 2)[1]
    whole, = torch.autograd.grad(ditmoe.balance_loss(probs, chosen)[0], z, retain_graph=True)
    halves, grads = (slice(0, 2), slice(2, 4)), []
    for mine, theirs in (halves, halves[::-1]):
        other = torch.bincount(chosen[theirs].flatten(), minlength=8)[None]
        monkeypatch.setattr(ditmoe, "gather_processes", lambda count: torch.cat([count, other]))
        loss, _ = ditmoe.balance_loss(probs[mine], chosen[mine])
        grads += torch.autograd.grad(loss, z, retain_graph=True)
    assert (sum(grads) / 2 - whole).abs().max() < 1e-9
    monkeypatch.setattr(ditmoe, "gather_processes", None)                   # one process may sample
    with torch.no_grad():
        ditmoe.balance_loss(probs, chosen)


# ------------------------------------------------------------------------ sizes


def count(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in ditmoe.DiTMoE(cfg).parameters())


@pytest.mark.parametrize("name, E, total, activated, gflops, gmac", [
    ("S/2", 8, 199_307_552, 71_905_568, 15.43, 16.03),
    ("S/2", 16, 369_213_728, 71_942_432, 15.44, None),
    ("B/2", 8, 795_861_536, 286_253_600, 61.68, 62.89),
    ("B/2", 16, 1_475_412_512, 286_327_328, None, None),
    ("L/2", 8, 2_823_764_000, 1_011_824_672, 219.26, 222.48),
    ("L/2", 16, 5_239_879_712, 1_012_021_280, None, None),
    ("XL/2", 8, 4_168_164_128, 1_492_722_464, 323.74, 327.97),
    ("XL/2", 16, 7_735_677_728, 1_492_980_512, None, None),
    ("G/2", 8, 8_890_604_832, 3_181_108_512, None, None),
    ("G/2", 16, 16_503_717_152, 3_181_559_072, 690.94, 698.33),
    ("S/4", 8, 199_289_216, None, None, None), ("S/8", 8, 199_492_352, None, None, None),
    ("XL/4", 8, 4_168_108_928, None, None, None), ("XL/8", 8, 4_168_717_568, None, None, None)])
def test_parameters_and_gflops_are_those_of_the_paper(name, E, total, activated, gflops, gmac):
    """gflops: the paper's figure. gmac: the same with the two products inside attention."""
    cfg = ditmoe.size(name, experts=E)
    cost = ditmoe.cost(cfg)
    assert count(cfg) == total
    assert activated is None or total - cost["idle parameters"] == activated
    assert gflops is None or round(cost["GMAC without QK', AV (the paper's Gflops)"], 2) == gflops
    assert gmac is None or round(cost["GMAC"], 2) == gmac


def test_q_k_norm_adds_four_times_the_width_of_a_head_per_block():
    assert count(ditmoe.size("XL/2", qk_norm=True)) == 4_168_172_192
    assert count(ditmoe.size("G/2", experts=16, qk_norm=True)) == 16_503_731_232


@pytest.mark.parametrize("changes", [dict(expert="gelu"), dict(moe_layers="deep"),
                                     dict(hidden=2, k=3)])
def test_idle_parameters_are_those_of_the_experts_not_chosen(changes):
    cfg = replace(SMALL, experts=8, **changes)
    routers = len(ditmoe.moe_layers(cfg)) * (8 - cfg.k) * cfg.dim
    fewer = count(replace(cfg, experts=cfg.k))
    assert ditmoe.cost(cfg)["idle parameters"] == count(cfg) - fewer - routers


@pytest.mark.parametrize("moe_layers", ["all", "deep"])
def test_one_gelu_expert_costs_what_the_mlp_of_dit_costs_plus_a_router(moe_layers):
    one = replace(SMALL, experts=1, k=1, shared=0, expert="gelu", hidden=4, moe_layers=moe_layers)
    routers = len(ditmoe.moe_layers(one)) * 16 * 32 / 1e9
    assert ditmoe.cost(one)["GMAC"] - routers == pytest.approx(dit.cost(DENSE)["GMAC"], abs=1e-12)


def test_tiny_costs_about_what_the_tiny_dit_costs_and_xl_2_8_times_the_dense_xl():
    assert 0.95 < ditmoe.cost(ditmoe.TINY)["GMAC"] / dit.cost(dit.TINY)["GMAC"] < 1.1
    ratio = ditmoe.cost(ditmoe.size("XL/2"))["GMAC"] / dit.cost(dit.size("XL/2"))["GMAC"]
    assert round(ratio, 1) == 2.8


@pytest.mark.parametrize("which, layers", [("all", [0, 1, 2, 3, 4]), ("deep", [2, 3, 4]),
                                           ("shallow", [0, 1])])
def test_experts_may_fill_all_blocks_the_deep_half_or_the_shallow_half(which, layers):
    model = woken(depth=5, moe_layers=which)
    assert list(ditmoe.moe_layers(model.cfg)) == layers
    assert [i for i, block in enumerate(model.blocks) if block.moe] == layers
    assert model(*inputs())[1]["load"].shape == (len(layers), 4)


@pytest.mark.parametrize("wrong", [dict(k=5), dict(k=0), dict(expert="relu"), dict(scope="token"),
                                   dict(moe_layers="odd"), dict(hidden=0), dict(shared=-1)])
def test_a_setting_that_cannot_be_is_an_error_in_words(wrong):
    with pytest.raises(ValueError, match=" ".join(f"{k} {v!r}: must be" for k, v in wrong.items())):
        ditmoe.DiTMoE(replace(SMALL, **wrong))


# ------------------------------------------------------------------------ upcycling


@pytest.mark.parametrize("moe_layers", ["all", "deep"])
def test_an_upcycled_dit_computes_what_the_dense_one_computes(moe_layers):
    dense, (x, t, y) = wake(dit.DiT(DENSE)), inputs()
    model = ditmoe.from_dense(dense.state_dict(), replace(SMALL, experts=8, moe_layers=moe_layers))
    prediction, aux = model(x, t, y)
    assert (prediction - dense(x, t, y)[0]).abs().max() < 1e-5
    assert model.cfg.expert == "gelu" and model.cfg.hidden == 4 and model.cfg.renormalize
    assert aux["load"].max() < 1                        # its router does choose


def test_an_upcycled_dit_trains_on_without_a_jump_and_its_experts_become_different():
    (x, _, y), flow = inputs(16), RectifiedFlow()

    def fit(model, steps, start):
        """-> diffusion losses; each step has its own t and noise, the same for every model."""
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(start, start + steps):
            rng = StepRNG(0, step, 16, torch.arange(16))
            per_image, aux = flow.loss(model, x, y, *flow.sample_times_and_noise(x, rng))
            optimizer.zero_grad(), (per_image.mean() + aux.get("balance_loss", 0)).backward()
            optimizer.step()
            losses.append(per_image.mean().item())
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


def test_from_dense_takes_nothing_but_a_dense_dit_of_this_shape():
    dense = dit.DiT(DENSE).state_dict()
    for state, cfg, missing in ((dense, replace(SMALL, depth=3), "blocks.2"),
                                (dense, replace(SMALL, qk_norm=True), "blocks.0.attn.q_norm"),
                                (dense, replace(SMALL, depth=1), "pos_embed"),  # too deep
                                (woken().state_dict(), SMALL, "blocks.0.mlp")):
        with pytest.raises(ValueError, match=f"not a dense DiT of depth {cfg.depth}: no {missing}"):
            ditmoe.from_dense(state, cfg)
