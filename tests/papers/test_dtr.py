"""DTR: its masks by the numbers, its block against DiT's, its tasks against diffusion steps.

Numbers in tables were computed with the authors' code, not with ours."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT, batch, small, wake

import diffusion
import dit
import dtr

both_routes = pytest.mark.parametrize("route", ["window", "random"])


def all_masks(**fields):
    """The mask of every task, (T, D) bool."""
    cfg = replace(dtr.Config(), **fields)
    table = dtr.window_starts(cfg) if cfg.route == "window" else dtr.random_masks(cfg)
    return dtr.task_masks(cfg, table, torch.arange(cfg.tasks))[0, :, 0]


def starts(**fields):
    return dtr.window_starts(replace(dtr.Config(), **fields)).tolist()


def dtr_and_dit(**changes):
    """A DTR that does not predict 0, and a DiT with the same weights."""
    model = wake(dtr.DTR(small("dtr", dim=32, **changes)[1]))
    plain = dit.DiT(small("dit", dim=32)[1])
    plain.load_state_dict(model.state_dict())
    return model, plain


def block_inputs(model):
    """x (3, L, D), c (3, D) and the masks (3, 1, D) of the tasks 0, 900 and 999."""
    masks = dtr.task_masks(model.cfg, model.table, torch.tensor([0, 900, 999]))[0]
    return torch.randn(3, 16, model.cfg.dim), torch.randn(3, model.cfg.dim), masks


# ------------------------------------------------------------------------ the mask rule


@pytest.mark.parametrize("beta, alpha, expected", [
    (0.5, 1, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (0.5, 2, [0, 0, 0, 0, 1, 1, 2, 2, 3, 4]),
    (0.5, 4, [0, 0, 0, 0, 0, 0, 1, 1, 2, 4]), (0.8, 1, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
    (0.8, 2, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]), (0.8, 4, [0, 0, 0, 0, 0, 0, 0, 1, 1, 2])])
def test_ten_tasks_and_eight_channels_have_the_masks_worked_by_hand(beta, alpha, expected):
    fields = dict(dim=8, tasks=10, beta=beta, alpha=alpha)
    assert starts(**fields) == expected
    width = 4 if beta == 0.5 else 6
    rows = ["".join("01"[bit] for bit in row) for row in all_masks(**fields).int().tolist()]
    assert rows == [("0" * s + "1" * width).ljust(8, "0") for s in expected]


AT = (0, 100, 250, 500, 750, 900, 999)
STARTS = {      # width: (channels read, starts for alpha 1, 2, 4, last task that starts at 0)
    192: (153, [0, 4, 10, 20, 29, 35, 39], [0, 0, 2, 10, 22, 32, 39],
          [0, 0, 0, 2, 12, 26, 39], 336),
    384: (307, [0, 8, 19, 39, 58, 69, 77], [0, 1, 5, 19, 43, 62, 77],
          [0, 0, 0, 5, 24, 51, 77], 283),
    768: (614, [0, 15, 39, 77, 116, 139, 154], [0, 2, 10, 39, 87, 125, 154],
          [0, 0, 1, 10, 49, 101, 154], 238),
    1024: (819, [0, 21, 51, 103, 154, 185, 205], [0, 2, 13, 51, 116, 166, 205],
           [0, 0, 1, 13, 65, 135, 205], 222),
    1152: (921, [0, 23, 58, 116, 173, 208, 231], [0, 2, 14, 58, 130, 187, 231],
           [0, 0, 1, 14, 73, 152, 231], 215)}


@pytest.mark.parametrize("dim", STARTS)
def test_windows_start_where_the_official_code_starts_them(dim):
    width, *rows, end = STARTS[dim]
    for alpha, expected in zip((1, 2, 4), rows, strict=True):
        assert [starts(dim=dim, alpha=alpha)[n] for n in AT] == expected
    assert max(n for n, s in enumerate(starts(dim=dim)) if s == 0) == end
    assert (all_masks(dim=dim).sum(1) == width).all()


def test_alphas_beyond_the_paper_move_the_window_early_or_late():
    assert [starts(alpha=0.5)[n] for n in AT] == [0, 24, 39, 54, 67, 73, 77]
    assert [starts(alpha=8)[n] for n in AT] == [0, 0, 0, 0, 8, 33, 77]


def test_the_masks_of_dit_s_have_the_checksum_of_the_official_table():
    m = all_masks()
    assert hashlib.sha1(m.to(torch.uint8).numpy().tobytes()).hexdigest() == \
        "0a8850e789f3ada8534b16122c639842bf387bef"


def test_the_example_of_the_docstring():
    m = all_masks()
    assert [starts()[n] for n in (0, 250, 500, 900, 999)] == [0, 0, 5, 51, 77]
    assert (m.sum(1) == 307).all() and len(m.unique(dim=0)) == 78
    first = (m == m[0]).all(1)
    assert first.sum() == 284 and first[:284].all()             # t <= 0.283
    assert m.all(0).sum() == 230 and m[:, 77:307].all()
    text = " ".join(dtr.__doc__.split())
    for words in ("starts at channel 0, 0, 5, 51, 77 for t = 0, .25, .5, .9, 1", "W = 307",
                  "78 different windows", "the first 284 tasks (t <= 0.283)", "230 channels"):
        assert words in text


@pytest.mark.parametrize("dim, tasks, extra, earlier", [(8, 10, 2, 2), (384, 1000, 77, 55)])
def test_the_rule_of_the_paper_makes_some_windows_a_channel_wider(dim, tasks, extra, earlier):
    """round(L ((t-1)/T)^alpha) < c <= round(L (t/T)^alpha) + C_beta, both counted from 1."""
    ours, C = all_masks(dim=dim, tasks=tasks), int(0.8 * dim)
    t, c = np.arange(1, tasks + 1)[:, None], np.arange(1, dim + 1)
    low, high = ((dim - C) * ((t - 1) / tasks) ** 4).round(), ((dim - C) * (t / tasks) ** 4).round()
    theirs = torch.from_numpy((low < c) & (c <= high + C))
    if dim == 8:
        assert low.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
        assert (high.flatten() + C).tolist() == [6, 6, 6, 6, 6, 6, 6, 7, 7, 8]
    assert (theirs | ours).sum() == theirs.sum() == ours.sum() + extra
    assert (theirs.sum(1) == C + 1).sum() == extra
    assert (theirs.int().argmax(1) < ours.int().argmax(1)).sum() == earlier


@pytest.mark.parametrize("alpha, clean, noisy", [
    (1, 0.958, 0.958), (2, 0.979, 0.937), (4, 0.996, 0.925), (8, 1.000, 0.933)])
def test_noisy_tasks_share_fewer_channels_when_alpha_is_above_one(alpha, clean, noisy):
    m = all_masks(alpha=alpha).float()
    for half, expected in ((m[:500], clean), (m[500:], noisy)):
        assert (half @ half.T).mean().item() / 307 == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("field, values", [
    ("beta", (0, 1.01, 0.001, float("inf"), float("nan"))), ("alpha", (0, -1, float("nan"))),
    ("tasks", (0, 10_001)), ("route", ("clustered",))])
def test_impossible_masks_raise_value_error(field, values):
    for value in values:
        with pytest.raises(ValueError, match="route|beta|alpha|tasks"):
            dtr.DTR(small("dtr", **{field: value})[1])


# ------------------------------------------------------------------------ random routing


def test_every_random_task_reads_as_many_channels_as_a_window_has():
    m = all_masks(route="random")
    assert (m.sum(1) == 307).all() and len(m.unique(dim=0)) == 1000


def test_two_random_tasks_share_beta_of_their_channels():
    m = all_masks(route="random").float()
    shared = (m @ m.T)[~torch.eye(1000, dtype=torch.bool)] / 307
    assert shared.mean().item() == pytest.approx(307 / 384, abs=1e-3)
    assert m.mean(0).std() < 3 * (0.8 * 0.2 / 1000) ** 0.5      # no channel is preferred


def test_random_masks_are_those_of_every_other_process_and_of_older_checkpoints():
    """They are drawn again when a checkpoint is read: other masks would be another model."""
    code = ("import torch, dtr, hashlib; torch.manual_seed(7); torch.set_num_threads(2); "
            "cfg = dtr.Config(dim=64, depth=2, route='random', per_block=True, route_seed=3); "
            "print(hashlib.sha1(dtr.random_masks(cfg).numpy().tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    cfg = dtr.Config(dim=64, depth=2, route="random", per_block=True, route_seed=3)
    ours = dtr.random_masks(cfg)
    assert done.stdout.strip() == hashlib.sha1(ours.numpy().tobytes()).hexdigest() == \
        "4206e1475cdea7afacea8778d5436dcc47531a94"
    assert not torch.equal(ours, dtr.random_masks(replace(cfg, route_seed=4)))


def test_random_masks_can_differ_from_block_to_block():
    cfg = dtr.Config(route="random", per_block=True, depth=3, dim=64)
    masks = dtr.random_masks(cfg)
    assert masks.shape == (3, 1000, 64) and not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[:2], dtr.random_masks(replace(cfg, depth=2)))
    model, _ = dtr_and_dit(route="random", per_block=True)
    (x, y), t = batch(model.cfg), torch.rand(4)
    before = model(x, t, y)[0]
    model.table[1] = model.table[0]                             # now both blocks read the same
    assert not torch.allclose(before, model(x, t, y)[0])


# ------------------------------------------------------------------------ the block


def test_dtr_with_every_channel_open_is_dit_bit_for_bit():
    model, plain = dtr_and_dit(beta=1.0)
    (x, y), t = batch(model.cfg), torch.rand(4)
    out, reference = model(x, t, y)[0], plain(x, t, y)[0]
    assert torch.equal(out, reference) and out.std() > 0.1
    out.square().mean().backward(), reference.square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters()):    # summed in another order
        assert not p.requires_grad or (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()


@both_routes
def test_a_block_adds_what_dits_block_would_add_to_the_masked_tokens(route):
    model, plain = (m.double() for m in dtr_and_dit(route=route))
    x, c, mask = (v.double() for v in block_inputs(model))
    for ours, theirs in zip(model.blocks, plain.blocks):
        u = x * mask
        assert (ours(x, c, mask) - (x + theirs(u, c) - u)).abs().max() < 1e-12
        assert (theirs(x, c) - ours(x, c, mask)).abs().max() > 0.1


def test_a_closed_channel_keeps_its_value_and_changes_nothing_else():
    model, _ = dtr_and_dit()
    x, c, mask = block_inputs(model)
    change = torch.randn_like(x) * ~mask
    before, after = model.blocks[0](x, c, mask), model.blocks[0](x + change, c, mask)
    assert (after - before - change).abs().max() < 1e-5 and change.abs().max() > 1


def test_a_block_writes_to_channels_that_it_does_not_read():
    model, _ = dtr_and_dit()
    x, c, mask = block_inputs(model)
    written = (model.blocks[0](x, c, mask) - x).abs()
    read, closed = (written[m.expand_as(x)].mean() for m in (mask, ~mask))
    assert 0.5 < closed / read < 2


def test_a_single_task_trains_every_weight():
    model, _ = dtr_and_dit()
    x, y = batch(model.cfg)
    model(x, torch.full((4,), 0.9), y)[0].square().mean().backward()
    for block in model.blocks:
        for w in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert (w.grad.abs().sum(0) > 0).all() and (w.grad.abs().sum(1) > 0).all()


def test_a_new_block_is_the_identity_and_starts_with_the_weights_of_dit():
    torch.manual_seed(3)
    model = dtr.DTR(small("dtr")[1])
    x, c, mask = block_inputs(model)
    assert torch.equal(model.blocks[0](x, c, mask), x)
    torch.manual_seed(3)                        # so that paired runs start from the same weights
    plain = dit.DiT(small("dit")[1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(),
                                                 strict=True))


# ------------------------------------------------------------------------ time


@pytest.fixture
def seen(monkeypatch):
    """Every batch of tasks that a model asks masks for."""
    seen, real = [], dtr.task_masks
    monkeypatch.setattr(dtr, "task_masks", lambda *args: seen.append(args[2]) or real(*args))
    return seen


def test_a_ddpm_step_has_its_own_task(seen):
    model, steps = dtr.DTR(small("dtr", dim=16)[1]), torch.arange(1000)
    x, y = batch(model.cfg, 1000)
    model(x, steps / 1000, y)
    assert torch.equal(seen[0], steps)


@pytest.mark.parametrize("tasks, t, expected", [
    (1000, [0.0, 0.50049, 0.50051, 1.0], [0, 500, 501, 999]),
    (10, [0.0, 0.14, 0.16, 1.0], [0, 1, 2, 9])])
def test_a_time_between_two_tasks_takes_the_nearer_one(seen, tasks, t, expected):
    model = dtr.DTR(small("dtr", tasks=tasks)[1])
    x, y = batch(model.cfg)
    model(x, torch.tensor(t), y)
    assert seen[0].tolist() == expected


@torch.no_grad()
def test_a_sampler_that_skips_steps_uses_the_windows_of_the_original_steps(seen):
    model = dtr.DTR(small("dtr", dim=384, depth=1, patch=4)[1])
    x, y = batch(model.cfg, 1)
    f = diffusion.guide(model, y, 10)
    for solver, steps in (("ddpm", 250), ("ddim", 50)):
        seen.clear()
        list(diffusion.DDPM().trajectory(f, x, steps, solver))
        asked = [task.item() for task in seen][::-1]
        assert asked == diffusion.respace(1000, steps, diffusion.SPACINGS[solver])
        assert solver == "ddim" or len(all_masks()[asked].unique(dim=0)) == 76


def test_images_at_different_times_do_not_mix():
    model, _ = dtr_and_dit()
    (x, y), t = batch(model.cfg, 6), torch.rand(6)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0] for i in range(6)])
    assert (model(x, t, y)[0] - alone).abs().max() < 1e-5


def test_both_halves_of_guidance_read_the_same_channels():
    model, _ = dtr_and_dit()
    x, none = torch.randn(4, 4, 8, 8), torch.full((4,), 10)
    alone = diffusion.guide(model, none, 10, scale=1)(x, 0.9)
    assert torch.allclose(diffusion.guide(model, none, 10, scale=7)(x, 0.9), alone, atol=1e-5)


def test_time_changes_the_masks_and_not_only_the_embedding():
    model, plain = dtr_and_dit()
    (x, y), t = batch(model.cfg), torch.rand(4)
    assert (model(x, t, y)[0] - plain(x, t, y)[0]).abs().max() > 0.1
    model.table.fill_(0)                                        # every task reads channels 0..24
    early = model(x, t, y)[0]
    model.table.fill_(7)                                        # channels 7..31
    assert (early - model(x, t, y)[0]).abs().max() > 0.1


# ------------------------------------------------------------------------ weights and cost


@both_routes
def test_dtr_has_the_parameters_of_dit_and_its_masks_are_not_stored(route):
    model, plain = dtr_and_dit(route=route)
    assert list(plain.state_dict()) == list(model.state_dict())
    size = dict(window=4 * 1000, random=32 * 1000)[route]       # bytes: a start per task, or a mask
    assert [b.numel() * b.element_size() for b in model.buffers()] == [size]


@pytest.mark.parametrize("name, gmac", [
    ("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.70), ("XL/2", 118.62)])
def test_a_forward_costs_what_dits_costs(name, gmac):
    assert dtr.cost(dtr.size(name))["GMAC"] == pytest.approx(gmac, abs=0.011)
    assert dtr.cost(dtr.size(name)) == dit.cost(dit.size(name))


@pytest.mark.parametrize("route", ["random", "given"])
def test_masks_in_a_table_work_on_the_meta_device_in_bf16(route):
    with torch.device("meta"):
        cfg = small("dtr", route=route, per_block=True)[1]
        model = dtr.DTR(cfg).bfloat16()
    x, y = batch(cfg, device="meta")
    out, aux = model(x.bfloat16(), torch.empty(4, device="meta"), y)
    out.float().square().mean().backward()
    assert out.shape == (4, 8, 8, 8) and out.dtype == torch.bfloat16 and aux == {}


def test_dtr_computes_in_bf16_and_in_float64():
    model, _ = dtr_and_dit()
    (x, y), t = batch(model.cfg), torch.rand(4)
    exact = model.double()(x.double(), t, y)[0]
    rough = model.bfloat16()(x.bfloat16(), t, y)[0]
    assert (exact.dtype, rough.dtype) == (torch.float64, torch.bfloat16)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_dtr_works_without_classes():
    model = wake(dtr.DTR(small("dtr", classes=0)[1]))
    assert model.y_embedder.embedding_table.weight.shape == (1, 64)
    y = torch.zeros(4, dtype=torch.long)
    assert model(torch.randn(4, 4, 8, 8), torch.rand(4), y)[0].std() > 0.1
