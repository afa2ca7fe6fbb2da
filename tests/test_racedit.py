"""Sentences from Expert Race, checked. The scores S are a case worked by hand: 2 pictures of 3 tokens,
4 experts, all 24 different."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import wake

import diffusion
import racedit

S = torch.tensor([[[0.5, 0.3, 0.4, 0.1], [-0.5, -0.1, 0.7, 0.6], [-0.3, -0.2, -0.6, -0.7]],
                  [[0.8, 2.0, -0.4, 1.2], [0.9, 0.0, 1.1, -1.1], [0.2, -0.9, 1.5, -1.3]]],
                 dtype=torch.float64)
SMALL = replace(racedit.TINY, size=8, channels=2, patch=2, dim=32, depth=2, heads=4)


def mask(scores, k, route):
    """-> "1000 0010 ... | ...": a word per token, a digit per expert; and the last winner's score."""
    winners, last = racedit.select(scores, k, route)
    won = torch.zeros(scores.numel(), dtype=torch.long).index_fill(0, winners, 1).view(scores.shape)
    return " | ".join(" ".join("".join(map(str, w.tolist())) for w in b) for b in won), last


HAND = [
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
    (S.sigmoid(), 1, "race", "0000 0000 0000 | 1101 1010 0010"),
]


@pytest.mark.parametrize("scores, k, route, words", HAND)
def test_each_strategy_is_one_top_k_over_other_axes(scores, k, route, words):
    assert mask(scores, k, route)[0] == words


def test_tau_learns_from_the_last_winner_of_the_race():
    assert mask(S, 1, "race")[1].item() == 0.8
    assert mask(S, 2, "race")[1].item() == 0.2
    assert mask(S[..., :3], 1, "race")[1].item() == 0.7
    assert mask(S.softmax(-1), 1, "race")[1].item() == pytest.approx(0.340759, abs=1e-6)


def test_a_race_within_each_picture_is_le_choice():
    alone = [mask(S[b : b + 1], 1, "race")[0] for b in range(2)]
    assert " | ".join(alone) == mask(S, 1, "le")[0]


def test_every_route_spends_the_same_budget():
    scores = torch.randn(4, 16, 8)
    for route in racedit.ROUTES:
        winners, _ = racedit.select(scores, 2, route)
        assert len(winners) == len(winners.unique()) == 4 * 16 * 2, route


def test_when_every_expert_may_win_every_route_keeps_everything():
    for route in racedit.ROUTES:
        assert len(racedit.select(S, 4, route)[0].unique()) == S.numel(), route


def test_exactly_k_pairs_win_even_when_all_scores_tie():
    assert len(racedit.select(torch.zeros(2, 3, 4), 2)[0].unique()) == 12


# ---- the layer


def moe(**changes):
    cfg = replace(SMALL, **changes)
    layer = racedit.MoE(cfg)
    for b in (layer.experts.b1, layer.experts.b2):
        torch.nn.init.normal_(b)
    return layer, torch.randn(3, 16, cfg.dim)


def every_expert_on_every_token(layer, u):
    """F_e(u) (B, L, E, D), computed densely."""
    e = layer.experts
    z = F.gelu(torch.einsum("bld,edh->bleh", u, e.w1) + e.b1, approximate="tanh")
    return torch.einsum("bleh,ehd->bled", z, e.w2) + e.b2


@pytest.mark.parametrize("route", racedit.ROUTES)
@pytest.mark.parametrize("gate", racedit.GATES)
def test_the_layer_is_the_sum_of_the_experts_won_times_their_score(route, gate):
    layer, u = moe(route=route, gate=gate, experts=6, k=2)
    y, notes = layer(u)
    Z = layer.router(u)[0]
    Z = {"identity": Z, "sigmoid": Z.sigmoid(), "softmax": Z.softmax(-1)}[gate]
    won = torch.zeros(Z.numel()).index_fill(0, racedit.select(Z, 2, route)[0], 1.0).view(Z.shape)
    dense = ((won * Z)[..., None] * every_expert_on_every_token(layer, u)).sum(2)
    assert (y - dense).abs().max() < 1e-5 * dense.abs().max()
    assert torch.equal(notes["map"], won.sum(-1)) and torch.equal(notes["load"], won.sum((0, 1)))


def test_identity_gates_weigh_an_expert_by_its_raw_score():
    """The hand case with toy experts F_e(x) = (e + 1) x at x = 1."""
    won = torch.zeros(24).double().index_fill(0, racedit.select(S, 1)[0], 1.0).view(S.shape)
    y = (won * S * torch.arange(1, 5)).sum(-1).flatten().tolist()
    assert y == pytest.approx([0, 0, 0, 9.6, 4.2, 4.5])


def test_a_token_that_wins_nothing_passes_unchanged_and_an_expert_without_tokens_is_no_error():
    layer, u = moe(experts=6, k=1)
    with torch.no_grad():
        layer.router.score.bias[:] = torch.tensor([9.0, -9, -9, -9, -9, -9])    # one expert takes all
        u[0] = 0.0
    y, notes = layer(u)
    (y.square().mean() + notes["similarity"]).backward()
    assert notes["load"].tolist() == [48, 0, 0, 0, 0, 0]
    assert layer.experts.w1.grad[1:].abs().max() == 0 and layer.experts.w1.grad[0].any()
    with torch.no_grad():
        layer.router.score.weight.fill_(1.0), layer.router.score.bias.zero_()   # all experts agree
    y, notes = layer(u)
    assert (notes["map"] == 0).any() and (y[notes["map"] == 0] == 0).all()


def test_gradients_reach_router_and_experts():
    layer, u = moe()
    y, _ = layer(u)
    y.square().mean().backward()
    for p in (layer.router.hidden.weight, layer.router.score.weight, *layer.experts.parameters()):
        assert p.grad.abs().max() > 0


# ---- router similarity loss


def won(S, k, route):
    return torch.zeros(S.numel()).double().index_fill(0, racedit.select(S, k, route)[0], 1).view(-1, 4)


@pytest.mark.parametrize("k, route, value", [
    (1, "race", 1.049683773), (1, "token", 0.470231), (1, "expert", 0.965059), (1, "bl", 0.962816),
    (1, "be", 1.228551), (1, "le", 0.957836), (2, "race", 1.102815742)])
def test_similarity_loss_has_the_value_worked_by_hand(k, route, value):
    assert racedit.similarity_loss(S.view(6, 4), won(S, k, route)).item() == pytest.approx(value, abs=1e-6)


def test_similarity_loss_sends_gradient_through_the_softmax_only():
    logits = S.view(6, 4).clone().requires_grad_()
    racedit.similarity_loss(logits, won(S, 1, "race")).backward()
    assert logits.grad[3].tolist() == pytest.approx([0.021232, -0.019887, -0.012683, 0.011338], abs=1e-6)
    assert logits.grad[0].tolist() == pytest.approx([0.040183, -0.011475, -0.021712, -0.006996], abs=1e-6)
    assert logits.grad.sum(-1).abs().max() < 1e-12


def test_similarity_loss_is_one_for_equal_logits_whoever_won():
    assert racedit.similarity_loss(torch.zeros(6, 4).double(), won(S, 1, "race")).item() == 1.0


def test_the_balance_loss_cannot_see_a_collapse_that_the_similarity_loss_sees():
    """Loads are even in all three; in the first, experts 1, 2 and 3, 4 always win together."""
    for words, similarity in (("1100 1100 0011 0011", 1.819293361), ("1100 0110 0011 1001", 1.204823340),
                              ("1100 1010 1001 0110 0101 0011", 1.0)):
        M = torch.tensor([[int(c) for c in w] for w in words.split()]).double()
        assert racedit.balance_loss(3 * M, M).item() == pytest.approx(1.0)
        assert racedit.similarity_loss(3 * M, M).item() == pytest.approx(similarity, abs=1e-8)


def test_the_balance_loss_has_the_value_worked_by_hand():
    assert racedit.balance_loss(S.view(6, 4), won(S, 1, "race")).item() == pytest.approx(1.050743280)


# ---- tau


def test_tau_starts_at_the_first_threshold_and_then_averages():
    model = racedit.RaceDiT(replace(SMALL, momentum=0.95))
    for last, tau in ((0.8, 0.8), (0.4, 0.78), (1.8, 0.831)):
        model.update_buffers({"last_stat": torch.full((2, 1), last)})
        assert model.blocks[1].moe.tau.item() == pytest.approx(tau, abs=1e-6)


def test_sampling_keeps_every_pair_that_reaches_tau():
    for tau, picks in ((0.78, 6), (0.831, 5), (0.8, 6)):
        assert len(racedit.reach(S, torch.tensor([tau], dtype=S.dtype))) == picks
    assert set(racedit.reach(S, torch.tensor([0.78])).tolist()) == set(racedit.select(S, 1)[0].tolist())


def trained(**changes):
    """An awake model whose tau has seen one batch; and another batch."""
    model = wake(racedit.RaceDiT(replace(SMALL, **changes))).train()
    for _ in range(2):
        batch = torch.randn(8, 2, 8, 8), torch.rand(8), torch.arange(8)
        if model.blocks[0].moe.tau.isnan().any():
            with torch.no_grad():
                model.update_buffers(model(*batch)[1])
    return model, batch


@pytest.mark.parametrize("route", racedit.ROUTES)
def test_a_picture_does_not_depend_on_its_batch_when_sampling(route):
    model, (x, t, y) = trained(route=route)
    model.eval()
    with torch.no_grad():
        together = model(x, t, y)[0]
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0] for i in range(8)])
    assert (together - alone).abs().max() < 1e-5


def test_neighbours_matter_while_racing():
    """... which is why tau exists."""
    model, (x, t, y) = trained()
    with torch.no_grad():
        together, alone = model(x, t, y)[0], model(x[:1], t[:1], y[:1])[0]
    assert (together[:1] - alone).abs().max() > 1e-3


def test_forward_never_changes_tau_however_often_it_runs():
    model, batch = trained()
    before = [b.moe.tau.clone() for b in model.blocks]
    for mode in (True, False):
        model.train(mode)(*batch)
    assert all(torch.equal(a, b.moe.tau) for a, b in zip(before, model.blocks))


def test_activation_checkpointing_changes_neither_gradients_nor_tau():
    from torch.utils.checkpoint import checkpoint
    grads, taus = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model, (x, t, y) = trained()
        if again:
            for b in model.blocks:
                b.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False))(b.forward)
        out, aux = model(x, t, y)
        (out.square().mean() + aux["sim_loss"]).backward()
        model.update_buffers(aux)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        taus.append(torch.cat([b.moe.tau for b in model.blocks]))
    assert torch.equal(*grads) and torch.equal(*taus)


# ---- per-layer regularization, counts


def test_per_layer_regularization_asks_every_layer_for_the_final_target():
    """A router whose target head is perfect pays nothing; the others pay for the whole target."""
    model = racedit.RaceDiT(replace(SMALL, plr=1.0, classes=10)).train()
    x0, y = torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.long)
    path, draw = diffusion.RectifiedFlow(), diffusion.Draw(0, 0, 4, torch.arange(4))
    with torch.no_grad():
        for b in model.blocks:
            b.moe.router.target.weight.zero_(), b.moe.router.target.bias.fill_(0.5)
    _, aux = racedit.loss(path, model, x0, y, 0, draw)
    target = draw.normal("noise", 2, 8, 8) - x0
    assert aux["plr_loss"].item() == pytest.approx(2 * (target - 0.5).square().mean().item(), rel=1e-5)
    aux["plr_loss"].backward()
    assert model.blocks[0].moe.router.hidden.weight.grad.abs().max() == 0       # the head was zeroed
    assert model.blocks[0].moe.router.target.weight.grad.abs().max() > 0


def test_the_shared_first_layer_learns_from_both_its_heads():
    layer, u = moe()
    for k in range(2):
        layer.zero_grad()
        layer.router(u)[k].square().mean().backward()
        assert layer.router.hidden.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name, total, activated", [
    ("B/2", 0.5311, 0.1348), ("M/2", 1.1064, 0.2807), ("L/2", 1.8882, 0.4789), ("XL/2", 2.7880, 0.7071)])
def test_table_4_counts_the_blocks_weight_matrices(name, total, activated):
    cfg = racedit.size(name)
    with torch.device("meta"):
        model = racedit.RaceDiT(cfg)
    count = sum(p.numel() for n, p in model.blocks.named_parameters()
                if not n.endswith(("bias", "b1", "b2")) and "target" not in n)
    h = 4 * cfg.dim // cfg.split
    idle = cfg.depth * (cfg.experts - cfg.k) * 2 * cfg.dim * h
    assert round(count / 1e9, 4) == pytest.approx(total, abs=1e-4)
    assert round((count - idle) / 1e9, 4) == pytest.approx(activated, abs=1e-4)


@pytest.mark.parametrize("k, experts, total", [
    (1, 4, .2973), (2, 8, .2973), (4, 16, .2973), (8, 32, .2973), (1, 8, .5238), (2, 16, .5238),
    (4, 32, .5238), (8, 64, .5238), (1, 16, .9767), (2, 32, .9767), (4, 64, .9767), (8, 128, .9767)])
def test_table_5_splits_experts_finer_at_equal_size(k, experts, total):
    """Its totals leave out the router."""
    with torch.device("meta"):
        model = racedit.RaceDiT(racedit.size("B/2", k=k, split=k, experts=experts))
    count = sum(p.numel() for n, p in model.blocks.named_parameters()
                if not n.endswith(("bias", "b1", "b2")) and "router" not in n)
    assert count / 1e9 == pytest.approx(total, abs=1e-4)


def test_whole_models_have_the_recounted_sizes():
    for name, total in (("B/2", 0.5347), ("XL/2", 2.7964)):
        with torch.device("meta"):
            model = racedit.RaceDiT(racedit.size(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(total, rel=3e-3)


def test_k_of_e_experts_cost_what_the_dense_mlp_costs():
    import dit
    cfg = racedit.size("B/2")
    L, D = 256, 768
    router = cfg.depth * L * (D * D + D * cfg.experts) / 1e9
    assert racedit.cost(cfg)["GMAC"] - router == pytest.approx(dit.cost(dit.size("B/2"))["GMAC"])


# ---- the paper's two measures of balance (experiments/race.py)


@pytest.mark.parametrize("k, violation, usage", [(1, 1 / 3, 50.0), (2, 1 / 3, 100 * 5 / 6)])
def test_balance_measures_have_the_values_worked_by_hand(k, violation, usage):
    from experiments import race
    M = won(S, k, "race")
    assert race.max_violation(M.mT @ M) == pytest.approx(violation)
    assert race.combination_usage(M.mT @ M) == pytest.approx(usage)


def test_even_loads_can_hide_pairs_that_always_win_together():
    from experiments import race
    for words, usage in (("1100 1100 0011 0011", 100 / 6), ("1100 0110 0011 1001", 50.0),
                         ("1100 1010 1001 0110 0101 0011", 100 * 5 / 6)):
        M = torch.tensor([[int(c) for c in w] for w in words.split()]).double()
        assert race.max_violation(M.mT @ M) == 0
        assert race.combination_usage(M.mT @ M) == pytest.approx(usage)


def test_perfectly_uniform_pairs_use_about_95_percent_of_32_experts_pairs():
    from experiments import race
    assert race.combination_usage(torch.ones(32, 32)) == pytest.approx(100 * 471 / 496)
