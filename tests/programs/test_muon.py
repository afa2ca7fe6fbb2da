"""Muon against torch's own, and which weights it trains."""

import pytest
import torch
from helpers import small

from common.checkpoint import MODELS
from common.muon import Muon, hidden_matrices, orthogonalize


def steps(optimizer, params, n=4):
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_muon_makes_the_steps_of_torchs_own_muon():
    ours = [torch.nn.Parameter(torch.randn(s) * 0.1) for s in ((48, 16), (16, 16), (16, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    steps(Muon(ours, 8e-3), ours)
    muon = torch.optim.Muon(theirs, lr=8e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    steps(muon, theirs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


def test_a_stack_of_experts_is_orthogonalized_expert_by_expert():
    stack = torch.nn.Parameter(torch.randn(4, 16, 32) * 0.1)
    each = [torch.nn.Parameter(w.clone()) for w in stack.detach()]
    one, many = Muon([stack], 8e-3), Muon(each, 8e-3)
    for i in range(3):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(i))
        for p, g in zip(each, stack.grad):
            p.grad = g.clone()
        one.step(), many.step()
    assert torch.allclose(stack, torch.stack(list(each)), atol=1e-6)


def test_orthogonalize_brings_all_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(2, 24, 40)).float())
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("name", MODELS)
def test_muon_trains_matrices_of_blocks_and_no_router_embedding_or_modulation(name):
    module, cfg = small(name)
    model = module.Model(cfg)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = [names[id(p)] for p in hidden_matrices(model)]
    assert all(n.startswith("blocks.") for n in taken)
    assert not any(word in n for n in taken for word in ("adaLN", "router", "gate", "_rate", "bias",
                                                         "selection", ".b1", ".b2"))
    matrices = 6 if name == "ditmoe" else 4             # qkv, proj, two of MLP or experts; shared
    assert len(taken) == cfg.depth * matrices
