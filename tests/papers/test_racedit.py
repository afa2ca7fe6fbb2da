"""Sentences from Expert Race, checked. S is a case worked by hand: the scores of 2 images of 3
tokens for 4 experts, all 24 different."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import wake
from torch.utils.checkpoint import checkpoint

import dit
import racedit
from diffusion import RectifiedFlow, StepRNG

S = torch.tensor([[[0.5, 0.3, 0.4, 0.1], [-0.5, -0.1, 0.7, 0.6], [-0.3, -0.2, -0.6, -0.7]],
                  [[0.8, 2.0, -0.4, 1.2], [0.9, 0.0, 1.1, -1.1], [0.2, -0.9, 1.5, -1.3]]],
                 dtype=torch.float64)
SMALL = replace(racedit.TINY, size=8, channels=2, patch=2, dim=32, depth=2, heads=4)
every_route = pytest.mark.parametrize("route", racedit.ROUTES)


def matrix(winners, shape):
    """Indices of pairs -> the 0/1 matrix of this shape, as float64."""
    return torch.zeros(shape).double().flatten().index_fill(0, winners, 1.0).view(shape)


def words(assigned):
    """(B, L, E) -> "1000 0010 ... | ...": a word for each token, a digit for each expert."""
    digits = [["".join(str(int(a)) for a in token) for token in image] for image in assigned]
    return " | ".join(" ".join(image) for image in digits)


def assigned(scores, k, route="race"):
    return matrix(racedit.select(scores, k, route)[0], scores.shape)


# ------------------------------------------------------------------------ selection


@pytest.mark.parametrize("scores, k, route, expected", [
    (S, 1, "token", "1000 0010 0100 | 0100 0010 0010"),
    (S, 1, "expert", "1100 0011 0000 | 0101 1000 0010"),
    (S, 1, "bl", "0000 0000 0000 | 0101 1000 0010"),
    (S, 1, "be", "0000 0000 0000 | 0101 1010 1010"),
    (S, 1, "le", "1000 0011 0000 | 0101 0000 0010"),
    (S, 1, "race", "0000 0000 0000 | 1101 1010 0010"),
    (S, 2, "race", "1110 0011 0000 | 1101 1010 1010"),
    (S, 2, "token", "1010 0011 1100 | 0101 1010 1010"),
    (S, 2, "bl", "1101 0011 0000 | 1101 1110 0010"),
    (S, 2, "be", "1000 0011 1100 | 1101 1010 1010"),
    (S, 2, "le", "1111 0011 0000 | 1101 1010 0010"),
    (S[..., :3], 1, "token", "100 001 010 | 010 001 001"),
    (S[..., :3], 1, "expert", "110 001 000 | 010 100 001"),
    (S[..., :3], 1, "bl", "010 000 000 | 110 101 001"),
    (S[..., :3], 1, "be", "000 000 000 | 110 101 101"),
    (S[..., :3], 1, "le", "101 001 000 | 010 001 001"),
    (S[..., :3], 1, "race", "000 001 000 | 110 101 001"),
    (S.softmax(-1), 1, "race", "0000 0011 0000 | 0100 1010 0010"),
    (S.softmax(-1), 1, "expert", "1000 0011 0100 | 0101 1000 0010"),
    (S.softmax(-1), 1, "token", "1000 0010 0100 | 0100 0010 0010"),
    (S.sigmoid(), 1, "race", "0000 0000 0000 | 1101 1010 0010")])
def test_every_route_selects_the_pairs_worked_by_hand(scores, k, route, expected):
    assert words(assigned(scores, k, route)) == expected


def test_the_picture_in_the_docstring_is_what_select_computes():
    scores = torch.tensor([[[.9, .1, .7], [.3, .2, .1], [.2, .8, .4]]])
    assert words(assigned(scores, 1, "race")) == "101 000 010"
    assert words(assigned(scores, 1, "token")) == "100 100 010"
    tau = racedit.select(scores, 1)[1]
    assert tau.item() == pytest.approx(.7)
    new = torch.tensor([[[.8, .2, .9], [.6, .1, .5]]])
    assert words(matrix(racedit.select_by_threshold(new, tau), new.shape)) == "101 000"


def test_the_kth_score_is_the_smallest_score_that_won_and_has_no_gradient():
    for scores, k, value in ((S, 1, 0.8), (S, 2, 0.2), (S[..., :3], 1, 0.7),
                             (S.softmax(-1), 1, 0.340759)):
        assert racedit.select(scores, k)[1].item() == pytest.approx(value, abs=1e-6)
    assert not racedit.select(S.clone().requires_grad_(), 1)[1].requires_grad


def test_a_race_inside_each_image_is_le_choice():
    alone = [words(assigned(S[b : b + 1], 1)) for b in range(2)]
    assert " | ".join(alone) == words(assigned(S, 1, "le"))


@every_route
def test_every_route_spends_k_experts_per_token_and_keeps_everything_if_k_is_e(route):
    winners, _ = racedit.select(torch.randn(4, 16, 8), 2, route)
    assert len(winners) == len(winners.unique()) == 4 * 16 * 2
    assert len(racedit.select(S, 4, route)[0].unique()) == S.numel()


def test_exactly_k_pairs_win_even_if_all_scores_are_equal():
    assert len(racedit.select(torch.zeros(2, 3, 4), 2)[0].unique()) == 12


@pytest.mark.parametrize("route", ["race", "bl", "be"])
def test_two_processes_with_pool_global_select_what_one_process_with_all_images_selects(
        monkeypatch, route):
    scores, selected = torch.randn(4, 16, 4), []
    layer = racedit.MoE(replace(SMALL, experts=4, k=1, route=route, pool="global"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for own, other in ((scores[:2], scores[2:]), (scores[2:], scores[:2])):
        monkeypatch.setattr(racedit, "gather_processes", lambda x: torch.cat([x, other]))
        winners, kth_score = layer.compete(own)
        selected.append(matrix(winners, own.shape))
        assert torch.equal(kth_score, racedit.select(scores, 1, route)[1])
    assert torch.equal(torch.cat(selected), assigned(scores, 1, route))


# ------------------------------------------------------------------------ the layer


def moe(**changes):
    """A layer with biases that are not zero, in training mode, and tokens for it."""
    layer = racedit.MoE(replace(SMALL, **changes))
    for b in (layer.experts.b1, layer.experts.b2):
        torch.nn.init.normal_(b)
    return layer, torch.randn(3, 16, 32)


@every_route
@pytest.mark.parametrize("gate", racedit.GATES)
def test_the_layer_is_the_sum_of_the_experts_won_times_their_gate(route, gate):
    layer, x = moe(route=route, gate=gate, experts=6, k=2)
    y, stats = layer(x)
    gates = layer.router(x)[0]
    gates = {"identity": gates, "sigmoid": gates.sigmoid(), "softmax": gates.softmax(-1)}[gate]
    won, e = assigned(gates, 2, route), layer.experts
    z = F.gelu(torch.einsum("bld,edh->bleh", x, e.w1) + e.b1, approximate="tanh")
    dense = torch.einsum("bleh,ehd,ble->bld", z, e.w2, (won * gates).float())
    dense = dense + torch.einsum("ed,ble->bld", e.b2, (won * gates).float())
    assert (y - dense).abs().max() < 1e-5 * dense.abs().max()
    assert torch.equal(stats["map"], won.sum(-1).float())
    assert torch.equal(stats["load"], won.sum((0, 1)).float())


def test_the_engine_computes_what_the_loop_over_experts_computes():
    """Forward and backward, with an expert that gets no pair and pairs in any order."""
    experts = racedit.Experts(5, 32, 48, "gelu")
    torch.nn.init.normal_(experts.b1), torch.nn.init.normal_(experts.b2)
    x, pair = torch.randn(20, 32), torch.randperm(20 * 4)[:37]              # never expert 4
    gate, results = torch.randn(37, requires_grad=True), []
    for compute in (experts, lambda *args: racedit.experts_loop(experts, *args)):
        y = compute(x, pair // 4, pair % 4, gate)
        results.append([y, *torch.autograd.grad(y.square().mean(), [gate, *experts.parameters()])])
    for engine, loop in zip(*results):
        assert (engine - loop).abs().max() < 1e-5 * loop.abs().max()
    assert not results[0][2][4].any()


def test_a_token_that_wins_nothing_adds_nothing_and_an_expert_may_win_all_tokens():
    layer, x = moe(experts=6, k=1)
    with torch.no_grad():
        layer.router.score.bias[:] = torch.tensor([9.0, -9, -9, -9, -9, -9])
    y, stats = layer(x)
    (y.square().mean() + stats["similarity"]).backward()
    assert stats["load"].tolist() == [48, 0, 0, 0, 0, 0]
    assert not layer.experts.w1.grad[1:].any() and layer.experts.w1.grad[0].any()
    with torch.no_grad():
        layer.router.score.weight.fill_(1.0), layer.router.score.bias.zero_()   # all experts agree
    y, stats = layer(x)
    assert (stats["map"] == 0).any() and not y[stats["map"] == 0].any()


def test_only_the_logits_of_winners_get_a_gradient_from_the_output():
    (layer, x), logits = moe(), []
    layer.router.register_forward_hook(lambda m, inputs, out: logits.append(out[0]))
    y, _ = layer(x)
    logits[0].retain_grad()
    y.square().mean().backward()
    assert torch.equal(logits[0].grad != 0, assigned(logits[0], 2).bool())
    assert all(p.grad.any() for n, p in layer.named_parameters() if "target" not in n)


# ------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("k, route, value", [
    (1, "race", 1.049683773), (1, "token", 0.470231), (1, "expert", 0.965059), (1, "bl", 0.962816),
    (1, "be", 1.228551), (1, "le", 0.957836), (2, "race", 1.102815742)])
def test_the_similarity_loss_has_the_value_worked_by_hand(k, route, value):
    loss = racedit.similarity_loss(S.view(6, 4), assigned(S, k, route).view(6, 4))
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_the_similarity_loss_sends_gradient_through_the_softmax_only():
    logits = S.view(6, 4).clone().requires_grad_()
    racedit.similarity_loss(logits, assigned(S, 1).view(6, 4)).backward()
    for token, grad in ((3, [0.021232, -0.019887, -0.012683, 0.011338]),
                        (0, [0.040183, -0.011475, -0.021712, -0.006996])):
        assert logits.grad[token].tolist() == pytest.approx(grad, abs=1e-6)
    assert logits.grad.sum(-1).abs().max() < 1e-12


def losses(won, gap):
    """Similarity and balance loss if the winners have this logit and the others 0."""
    won = torch.tensor(won).double()
    return [f(gap * won, won).item() for f in (racedit.similarity_loss, racedit.balance_loss)]


def of_pairs(pairs, E):
    """Tokens that win these pairs of E experts -> assigned."""
    return [[int(e in pair) for e in range(E)] for pair in pairs]


def test_the_similarity_loss_sees_twins_that_the_balance_loss_cannot_see():
    """The worked example of the docstring; then rings and twins of four experts."""
    twins, everyone = [(0, 1), (2, 3), (4, 5), (6, 7)], list(itertools.combinations(range(8), 2))
    assert [round(v, 1) for v in losses(of_pairs(twins, 8), 4)] == [3.6, 1.0]
    assert losses(of_pairs(everyone, 8), 4) == pytest.approx([1.0, 1.0])
    for pairs, similarity in (([(0, 1), (0, 1), (2, 3), (2, 3)], 1.819293361),
                              ([(0, 1), (1, 2), (2, 3), (3, 0)], 1.204823340),
                              (list(itertools.combinations(range(4), 2)), 1.0)):
        assert losses(of_pairs(pairs, 4), 3) == pytest.approx([similarity, 1.0])


def test_both_losses_at_their_extremes():
    same = of_pairs([(2, 5)] * 6, 8)                    # 2 of 8 experts win every token
    assert losses(same, 0) == pytest.approx([1.0, 1.0])         # all logits are equal
    assert losses(same, 40) == pytest.approx([16.0, 4.0])       # (E/k)^2 and E/k
    alone = [[1, 0, 0, 0]] * 3 + [[0, 1, 0, 0]]         # no token wins two experts
    assert losses(alone, 0) == pytest.approx([1 / 4, 1.0])
    won = assigned(S, 1).view(6, 4)
    assert racedit.balance_loss(S.view(6, 4), won).item() == pytest.approx(1.050743280)


def test_per_layer_regularization_compares_every_layer_with_the_final_target():
    model = racedit.RaceDiT(replace(SMALL, plr=1.0)).train()
    x0, y = torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.long)
    rng = StepRNG(0, 0, 4, torch.arange(4))
    with torch.no_grad():
        for b in model.blocks:                          # every layer predicts 0.5
            b.moe.router.target.weight.zero_(), b.moe.router.target.bias.fill_(0.5)
    _, aux = racedit.loss(RectifiedFlow(), model, x0, y, 0, rng)
    target = rng.normal("noise", 2, 8, 8) - x0
    assert aux["plr_loss"].item() == pytest.approx(2 * (target - 0.5).square().mean().item())
    aux["plr_loss"].backward()
    assert all(b.moe.router.target.weight.grad.any() for b in model.blocks)


def test_the_prediction_of_the_target_is_laid_out_as_the_final_one_and_trains_what_is_below():
    model = wake(racedit.RaceDiT(replace(SMALL, learn_sigma=False))).train()
    inside = {}
    model.blocks[1].moe.router.register_forward_hook(lambda m, x, out: inside.update(r=out[1]))
    aux = model(torch.randn(2, 2, 8, 8), torch.rand(2), torch.arange(2))[1]
    assert torch.equal(aux["target_prediction"][1], racedit.unpatchify(inside["r"], model.cfg))
    aux["target_prediction"][1].square().mean().backward()
    for p in (model.blocks[1].moe.router.hidden.weight, model.blocks[0].attn.qkv.weight):
        assert p.grad.any()


# ------------------------------------------------------------------------ tau


def test_tau_starts_at_the_first_kth_score_and_is_then_a_moving_average():
    model = racedit.RaceDiT(replace(SMALL, momentum=0.95))
    for v, tau in ((0.8, 0.8), (0.4, 0.78), (1.8, 0.831)):
        model.update_buffers({"kth_score_stat": torch.full((2, 1), v)})
        assert model.blocks[1].moe.tau.item() == pytest.approx(tau, abs=1e-6)


def test_sampling_keeps_every_pair_that_reaches_tau():
    for tau, pairs in ((0.78, 6), (0.831, 5), (0.8, 6)):
        winners = racedit.select_by_threshold(S, torch.tensor([tau], dtype=S.dtype))
        assert len(winners) == pairs
    assert set(winners.tolist()) == set(racedit.select(S, 1)[0].tolist())


def trained(**changes):
    """A woken model whose tau has seen one batch; and another batch."""
    torch.manual_seed(0)
    model = wake(racedit.RaceDiT(replace(SMALL, **changes))).train()
    seen, new = ((torch.randn(8, 2, 8, 8), torch.rand(8), torch.arange(8)) for _ in range(2))
    with torch.no_grad():
        model.update_buffers(model(*seen)[1])
    return model, new


@every_route
def test_an_image_depends_on_its_batch_in_training_but_not_when_sampling(route):
    model, (x, t, y) = trained(route=route)
    difference = {}
    for training in (True, False):
        with torch.no_grad():
            model.train(training)
            alone = [model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0] for i in range(8)]
            difference[training] = (model(x, t, y)[0] - torch.cat(alone)).abs().max()
    assert difference[False] < 1e-5
    assert (difference[True] > 1e-3) == (route in ("race", "bl", "be"))     # those that need tau


def test_without_a_tau_the_top_k_decides_but_with_one_a_token_may_get_nothing():
    layer, x = moe()
    layer.eval()
    assert layer(x)[1]["map"].sum() == 3 * 16 * 2                           # tau is nan
    layer.tau.fill_(1e9)
    y, stats = layer(x)
    assert not y.any() and not stats["map"].any()


def test_forward_never_changes_tau():
    model, batch = trained()
    before = [b.moe.tau.clone() for b in model.blocks]
    for mode in (True, False):
        model.train(mode)(*batch)
    assert all(torch.equal(a, b.moe.tau) for a, b in zip(before, model.blocks))


def test_activation_checkpointing_changes_neither_gradients_nor_tau():
    results = []
    for again in (False, True):
        model, batch = trained()
        for b in model.blocks if again else ():
            b.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False))(b.forward)
        prediction, aux = model(*batch)
        (prediction.square().mean() + aux["sim_loss"]).backward()
        model.update_buffers(aux)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append(torch.cat(grads + [b.moe.tau for b in model.blocks]))
    assert torch.equal(*results)


# ------------------------------------------------------------------------ counts


def count(cfg, *without):
    """Weights of the blocks' matrices in billions, without the parameters of these names."""
    with torch.device("meta"):
        blocks = racedit.RaceDiT(cfg).blocks
    return sum(p.numel() for n, p in blocks.named_parameters()
               if not n.endswith(("bias", "b1", "b2")) and not any(w in n for w in without)) / 1e9


@pytest.mark.parametrize("name, total, activated", [
    ("B/2", 0.5311, 0.1348), ("M/2", 1.1064, 0.2807), ("L/2", 1.8882, 0.4789),
    ("XL/2", 2.7880, 0.7071)])
def test_table_4_counts_the_weight_matrices_of_the_blocks(name, total, activated):
    cfg = racedit.size(name)
    idle = cfg.depth * (cfg.experts - cfg.k) * 2 * cfg.dim * 4 * cfg.dim // cfg.split / 1e9
    assert count(cfg, "target") == pytest.approx(total, abs=1e-4)
    assert count(cfg, "target") - idle == pytest.approx(activated, abs=1e-4)


@pytest.mark.parametrize("total, ways", [
    (.2973, [(1, 4), (2, 8), (4, 16), (8, 32)]), (.5238, [(1, 8), (2, 16), (4, 32), (8, 64)]),
    (.9767, [(1, 16), (2, 32), (4, 64), (8, 128)])])
def test_table_5_splits_experts_finer_at_equal_size(total, ways):
    """Its totals leave out the router."""
    for k, experts in ways:
        cfg = racedit.size("B/2", k=k, split=k, experts=experts)
        assert count(cfg, "router") == pytest.approx(total, abs=1e-4)


def test_k_of_e_experts_cost_what_the_dense_mlp_costs():
    cfg, control = racedit.size("B/2"), dit.cost(dit.size("B/2"))
    router = cfg.depth * 256 * (768 * 768 + 768 * cfg.experts) / 1e9
    assert racedit.cost(cfg)["GMAC"] - router == pytest.approx(control["GMAC"])


@pytest.mark.parametrize("wrong", [dict(route="best"), dict(gate="relu"), dict(pool="all"),
                                   dict(k=9), dict(k=0), dict(split=0)])
def test_a_setting_that_cannot_be_is_an_error_in_words(wrong):
    with pytest.raises(ValueError, match=" ".join(f"{k} {v!r}: must be" for k, v in wrong.items())):
        racedit.RaceDiT(replace(SMALL, **wrong))
