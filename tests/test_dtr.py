"""DTR: its masks by the numbers, its block against DiT's, and the authors' own outputs.

Numbers in tables were computed with the authors' code, not with ours."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import dit
import dtr
from conftest import ROOT, wake
from experiments import cka
from test_official import close, golden, guided

SMALL = dict(size=8, patch=2, channels=4, classes=10, dim=32, depth=2, heads=4)


def masks_of(**fields):
    """Every task's mask, one copy: (T, D) bool."""
    cfg = replace(dtr.Config(), **fields)
    return dtr.task_masks(cfg, dtr.task_table(cfg), torch.arange(cfg.tasks))[0]


def starts_of(**fields):
    return dtr.task_table(replace(dtr.Config(), **fields)).tolist()


def pair(**fields):
    """An awake DTR and a DiT with the same weights."""
    model = wake(dtr.DTR(dtr.Config(**SMALL | fields)))
    plain = dit.DiT(dit.Config(**SMALL))
    plain.load_state_dict(model.state_dict())
    return model, plain


def inputs(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, 4, 8, 8, generator=g), torch.rand(n, generator=g)
    return x, t, torch.randint(0, 11, (n,), generator=g)


def block_inputs(cfg, n=3):
    x, c = torch.randn(n, 16, cfg.dim), torch.randn(n, cfg.dim)
    task = torch.tensor([0, 900, 999])[:n]
    return x, c, dtr.task_masks(cfg, dtr.task_table(cfg), task)[0, :, None]         # (n, 1, D)


# ------------------------------------------------------------------------ the mask rule


@pytest.mark.parametrize("beta, alpha, starts", [
    (0.5, 1, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), (0.5, 2, [0, 0, 0, 0, 1, 1, 2, 2, 3, 4]),
    (0.5, 4, [0, 0, 0, 0, 0, 0, 1, 1, 2, 4]), (0.8, 1, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]),
    (0.8, 2, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]), (0.8, 4, [0, 0, 0, 0, 0, 0, 0, 1, 1, 2])])
def test_ten_tasks_and_eight_channels_have_the_masks_worked_by_hand(beta, alpha, starts):
    fields = dict(dim=8, tasks=10, beta=beta, alpha=alpha)
    assert starts_of(**fields) == starts
    on = 4 if beta == 0.5 else 6
    rows = ["".join("01"[bit] for bit in row) for row in masks_of(**fields).int().tolist()]
    assert rows == [("0" * s + "1" * on).ljust(8, "0") for s in starts]


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
def test_windows_start_where_the_official_table_starts_them(dim):
    on, *rows, last = STARTS[dim]
    for alpha, expected in zip((1, 2, 4), rows):
        starts = starts_of(dim=dim, alpha=alpha)
        assert [starts[t] for t in AT] == expected
    assert max(t for t, s in enumerate(starts) if s == 0) == last
    assert (masks_of(dim=dim).sum(1) == on).all()


def test_alphas_beyond_the_paper_move_the_window_early_or_late():
    assert [starts_of(alpha=0.5)[t] for t in AT] == [0, 24, 39, 54, 67, 73, 77]
    assert [starts_of(alpha=8)[t] for t in AT] == [0, 0, 0, 0, 8, 33, 77]


def test_the_whole_table_of_dit_s_has_the_official_checksum():
    m = masks_of()
    assert hashlib.sha1(m.to(torch.uint8).numpy().tobytes()).hexdigest() == \
        "0a8850e789f3ada8534b16122c639842bf387bef"
    assert m.sum() == 307_000 and (m * torch.arange(384)).sum() == 51_699_107
    assert m.sum(0)[[0, 1, 76, 77, 306, 307, 308, 383]].tolist() == \
        [284, 374, 998, 1000, 1000, 716, 626, 2]


@pytest.mark.parametrize("dim, tasks, extra, rows, earlier", [
    (8, 10, 2, 2, 2), (384, 1000, 77, 77, 55)])
def test_the_papers_own_rule_makes_some_windows_a_channel_wider(dim, tasks, extra, rows, earlier):
    """round(L ((t-1)/T)^alpha) < c <= round(L (t/T)^alpha) + C_beta, both counted from 1."""
    ours, C = masks_of(dim=dim, tasks=tasks), int(0.8 * dim)
    t, c = np.arange(1, tasks + 1)[:, None], np.arange(1, dim + 1)
    low, high = ((dim - C) * ((t - 1) / tasks) ** 4).round(), ((dim - C) * (t / tasks) ** 4).round()
    theirs = torch.from_numpy((low < c) & (c <= high + C))
    if dim == 8:
        assert low.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
        assert (high.flatten() + C).tolist() == [6, 6, 6, 6, 6, 6, 6, 7, 7, 8]
    assert (theirs | ours).sum() == theirs.sum() == ours.sum() + extra
    assert (theirs.sum(1) == C + 1).sum() == rows
    assert (theirs.int().argmax(1) < ours.int().argmax(1)).sum() == earlier


def test_low_channels_belong_to_data_and_high_channels_to_noise():
    m = masks_of()
    assert m[0, :307].all() and not m[0, 307:].any()
    assert m[999, 77:].all() and not m[999, :77].any()
    assert m[:, 77:307].all()                                   # 60 % are on for every task
    assert len(m.unique(dim=0)) == 78
    assert starts_of().index(77) == 998


@pytest.mark.parametrize("alpha, clean, noisy", [
    (1, 0.958, 0.958), (2, 0.979, 0.937), (4, 0.996, 0.925), (8, 1.000, 0.933)])
def test_noisy_tasks_share_fewer_channels_when_alpha_is_above_one(alpha, clean, noisy):
    m = masks_of(alpha=alpha).float()
    for half, expected in ((m[:500], clean), (m[500:], noisy)):
        assert (half @ half.T).mean().item() / 307 == pytest.approx(expected, abs=6e-4)


def test_impossible_masks_are_refused():
    for bad in (dict(beta=0), dict(beta=1.01), dict(beta=0.001), dict(alpha=0), dict(alpha=-1),
                dict(beta=float("inf")), dict(beta=float("nan")), dict(alpha=float("nan")),
                dict(tasks=0), dict(route="clustered")):
        with pytest.raises(ValueError, match="route|beta|alpha|tasks"):
            dtr.DTR(dtr.Config(**SMALL | bad))


# ------------------------------------------------------------------------ random routing


def test_random_tasks_read_as_many_channels_as_windows_do():
    m = masks_of(route="random")
    assert (m.sum(1) == 307).all() and len(m.unique(dim=0)) == 1000


def test_two_random_tasks_share_beta_of_their_channels():
    m = masks_of(route="random").float()
    shared = (m @ m.T)[~torch.eye(1000, dtype=torch.bool)] / 307
    assert shared.mean().item() == pytest.approx(307 / 384, abs=1e-3)
    assert m.mean(0).std() < 3 * (0.8 * 0.2 / 1000) ** 0.5      # and no channel is preferred


def test_random_masks_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = masks_of(route="random", route_seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, masks_of(route="random", route_seed=5))
    assert not torch.equal(first, masks_of(route="random", route_seed=6))


def test_random_masks_are_those_of_every_other_process_and_of_older_checkpoints():
    """They are drawn again when a checkpoint is read: another draw would be another model."""
    code = ("import torch, dtr, hashlib; torch.manual_seed(7); torch.set_num_threads(2); "
            "cfg = dtr.Config(dim=64, depth=2, route='random', per_block=True, route_seed=3); "
            "print(hashlib.sha1(dtr.task_table(cfg).numpy().tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    cfg = dtr.Config(dim=64, depth=2, route="random", per_block=True, route_seed=3)
    ours = hashlib.sha1(dtr.task_table(cfg).numpy().tobytes()).hexdigest()
    assert done.stdout.strip() == ours == \
        "4206e1475cdea7afacea8778d5436dcc47531a94"


def test_random_masks_can_differ_from_block_to_block():
    cfg = dtr.Config(route="random", per_block=True, depth=3, dim=64)
    table = dtr.task_table(cfg)
    assert table.shape == (3, 1000, 64) and not torch.equal(table[0], table[1])
    assert torch.equal(table[:2], dtr.task_table(replace(cfg, depth=2)))
    model, plain = pair(route="random", per_block=True)
    x, t, y = inputs()
    one = model(x, t, y)[0]
    model.table[1] = model.table[0]                             # now both blocks read the same
    assert not torch.allclose(one, model(x, t, y)[0])


# ------------------------------------------------------------------------ the block


def test_dtr_with_every_channel_on_is_dit_bit_for_bit():
    model, plain = pair(beta=1.0)
    x, t, y = inputs()
    out, reference = model(x, t, y)[0], plain(x, t, y)[0]
    assert torch.equal(out, reference) and out.std() > 0.1
    out.square().mean().backward(), reference.square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters()):    # summed in another order
        assert not p.requires_grad or (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()


@pytest.mark.parametrize("route", ["window", "random"])
def test_a_block_adds_what_dits_block_would_add_to_the_masked_tokens(route):
    model, plain = (m.double() for m in pair(route=route))
    x, c, mask = (v.double() for v in block_inputs(model.cfg))
    for ours, theirs in zip(model.blocks, plain.blocks):
        u = x * mask
        expected = x + theirs(u, c) - u                         # z + Block(m z)
        assert (ours(x, c, mask) - expected).abs().max() < 1e-12
        assert (ours.float()(x.float(), c.float(), mask.float()) - expected).abs().max() < 2e-6
        assert (theirs(x, c) - expected).abs().max() > 0.1


def test_channels_that_are_not_read_pass_by_and_change_nothing_else():
    model, _ = pair()
    x, c, mask = block_inputs(model.cfg)
    change = torch.randn_like(x) * ~mask
    before, after = model.blocks[0](x, c, mask), model.blocks[0](x + change, c, mask)
    assert (after - before - change).abs().max() < 1e-5 and change.abs().max() > 1


def test_a_block_writes_to_channels_that_it_does_not_read():
    model, _ = pair()
    x, c, mask = block_inputs(model.cfg)
    written = (model.blocks[0](x, c, mask) - x).abs()
    read, unread = (written[m.expand_as(x)].mean() for m in (mask, ~mask))
    assert 0.5 < unread / read < 2


def test_one_task_alone_trains_every_weight():
    model, _ = pair()
    x, _, y = inputs()
    model(x, torch.full((4,), 0.9), y)[0].square().mean().backward()
    for block in model.blocks:
        for w in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert (w.grad.abs().sum(0) > 0).all() and (w.grad.abs().sum(1) > 0).all()


def test_blocks_are_the_identity_before_training():
    torch.manual_seed(3)
    model = dtr.DTR(dtr.Config(**SMALL))
    x, c, mask = block_inputs(model.cfg)
    assert torch.equal(model.blocks[0](x, c, mask), x)
    torch.manual_seed(3)                            # so paired runs start from the same weights
    plain = dit.DiT(dit.Config(**SMALL))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))


def test_a_window_s_queries_keys_and_values_can_be_had_from_its_channels_alone():
    """What dtr.py leaves out, and says is exact: LayerNorm turns every unread 0 of a token into the
    same number, so all unread columns of the weight together are two vectors."""
    model, _ = pair()
    block, D, n, s, eps = model.blocks[0], 32, 25, 5, 1e-6
    x, (shift, scale) = torch.randn(16, D) + 1, torch.randn(2, D) / 2
    read = torch.zeros(D, dtype=torch.bool).index_fill(0, torch.arange(s, s + n), True)
    dense = block.attn.qkv(dtr.modulate(block.norm1(x * read), shift, scale))           # (L, 3D)

    W, b = block.attn.qkv.weight, block.attn.qkv.bias
    mean = x[:, read].sum(1, keepdim=True) / D
    var = ((x[:, read] - mean).square().sum(1, keepdim=True) + (D - n) * mean**2) / D
    std = (var + eps).sqrt()
    h = (x[:, read] - mean) / std * (1 + scale[read]) + shift[read]                     # (L, n)
    rest = -mean / std * (W[:, ~read] @ (1 + scale[~read])) + W[:, ~read] @ shift[~read] + b
    assert (h @ W[:, read].T + rest - dense).abs().max() < 1e-5
    assert (h @ W[:, read].T + b - dense).abs().max() > 0.1     # to drop the columns is wrong
    for name, saved in (("S/2", 0.044), ("B/2", 0.047), ("L/2", 0.047), ("XL/2", 0.048)):
        cfg = dtr.size(name)
        share = 0.2 * cfg.depth * 256 * 3 * cfg.dim**2 / 1e9 / dtr.cost(cfg)["GMAC"]
        assert share == pytest.approx(saved, abs=1e-3)


# ------------------------------------------------------------------------ time


def tasks_seen(monkeypatch):
    """Every batch of tasks that a model asks masks for."""
    seen, real = [], dtr.task_masks
    monkeypatch.setattr(dtr, "task_masks", lambda *args: seen.append(args[2]) or real(*args))
    return seen


def test_a_ddpm_step_meets_its_own_row(monkeypatch):
    seen = tasks_seen(monkeypatch)
    model = dtr.DTR(dtr.Config(**SMALL))
    steps = torch.arange(1000)
    x, _, y = inputs(1)
    model(x.expand(1000, -1, -1, -1), steps / 1000, y.expand(1000))
    assert torch.equal(seen[0], steps)


def test_rectified_flow_takes_the_nearest_row(monkeypatch):
    seen = tasks_seen(monkeypatch)
    x, _, y = inputs()
    dtr.DTR(dtr.Config(**SMALL))(x, torch.tensor([0.0, 0.50049, 0.50051, 1.0]), y)
    assert seen[0].tolist() == [0, 500, 501, 999]
    dtr.DTR(dtr.Config(**SMALL | dict(tasks=10)))(x, torch.tensor([0.0, 0.14, 0.16, 1.0]), y)
    assert seen[1].tolist() == [0, 1, 2, 9]


def test_a_sampler_of_250_steps_asks_for_the_original_steps(monkeypatch):
    seen = tasks_seen(monkeypatch)
    model = dtr.DTR(dtr.Config(**SMALL | dict(dim=384, depth=1, patch=4)))
    x, _, y = inputs(1)
    with torch.no_grad():
        f = diffusion.guide(model, y, 10)
        for _ in diffusion.DDPM().trajectory(f, x, 250):
            pass
    asked = [task.item() for task in seen]
    assert asked[::-1][:3] == [0, 4, 8] and asked[:2] == [999, 995] and len(set(asked)) == 250
    assert len(masks_of()[asked].unique(dim=0)) == 76
    seen.clear()
    with torch.no_grad():
        for _ in diffusion.DDPM().trajectory(f, x, 50, "ddim"):
            pass
    assert [task.item() for task in seen][::-1] == list(range(0, 1000, 20))


def test_pictures_at_different_times_do_not_mix():
    model, _ = pair()
    x, t, y = inputs(6)
    together = model(x, t, y)[0]
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0] for i in range(6)])
    assert (together - alone).abs().max() < 1e-5


def test_both_halves_of_guidance_read_the_same_channels():
    model, _ = pair()
    x, _, _ = inputs()
    none = torch.full((4,), 10)
    alone = diffusion.guide(model, none, 10, scale=1)(x, 0.9)
    assert torch.allclose(diffusion.guide(model, none, 10, scale=7)(x, 0.9), alone, atol=1e-5)


def test_time_changes_the_masks_and_not_only_the_embedding():
    model, plain = pair()
    x, t, y = inputs()
    assert (model(x, t, y)[0] - plain(x, t, y)[0]).abs().max() > 0.1
    model.table.fill_(0)                                        # every task reads channels 0..24
    early = model(x, t, y)[0]
    model.table.fill_(7)
    assert (early - model(x, t, y)[0]).abs().max() > 0.1


# ------------------------------------------------------------------------ plumbing


@pytest.mark.parametrize("route", ["window", "random"])
def test_a_dit_checkpoint_is_a_dtr_checkpoint_and_back(route):
    plain, model = dit.DiT(dit.Config(**SMALL)), dtr.DTR(dtr.Config(**SMALL | dict(route=route)))
    assert list(plain.state_dict()) == list(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_windows_cost_four_bytes_a_task_and_no_parameter():
    with torch.device("meta"):
        ours, plain = dtr.DTR(dtr.size("XL/2", depth=2)), dit.DiT(dit.size("XL/2", depth=2))
    assert sum(b.numel() * b.element_size() for b in ours.buffers()) == 4000
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, plain)]
    assert count[0] == count[1]


@pytest.mark.parametrize("name, gmac", [
    ("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.70), ("XL/2", 118.62)])
def test_a_forward_costs_what_dits_costs(name, gmac):
    assert dtr.cost(dtr.size(name))["GMAC"] == pytest.approx(gmac, abs=0.011)
    assert dtr.cost(dtr.size(name)) == dit.cost(dit.size(name))


@pytest.mark.parametrize("route", ["window", "random", "given"])
def test_it_trains_on_the_meta_device_in_bf16(route):
    with torch.device("meta"):
        cfg = dtr.Config(**SMALL | dict(route=route, per_block=route != "window"))
        model = dtr.DTR(cfg).bfloat16()
    x = torch.empty(4, 4, 8, 8, device="meta", dtype=torch.bfloat16)
    y = torch.empty(4, device="meta", dtype=torch.long)
    out, aux = model(x, torch.empty(4, device="meta"), y)
    out.float().square().mean().backward()
    assert out.shape == (4, 8, 8, 8) and out.dtype == torch.bfloat16 and aux == {}


def test_it_computes_in_bf16_and_in_fp64():
    model, _ = pair()
    x, t, y = inputs()
    exact = model.double()(x.double(), t, y)[0]
    assert exact.dtype == torch.float64
    rough = model.bfloat16()(x.bfloat16(), t, y)[0]
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_it_compiles_without_a_break():
    model, _ = pair()
    x, t, y = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, y)[0], model(x, t, y)[0])


def test_it_works_without_classes():
    model = wake(dtr.DTR(dtr.Config(**SMALL | dict(classes=0))))
    x, t, _ = inputs()
    assert model.y_embedder.embedding_table.weight.shape == (1, 32)
    assert model(x, t, torch.zeros(4, dtype=torch.long))[0].std() > 0.1


# ------------------------------------------------------------------------ golden


@pytest.mark.parametrize("name", ["dtr", "dtr_random"])
def test_official_weights_predict_and_guide_as_the_official_code_does(name):
    meta, state, g = golden(name)
    model = dtr.from_official(state, meta["heads"], alpha=meta["alpha"], beta=meta["beta"])
    with torch.no_grad():
        close(model(g["x"], g["t"] / 1000, g["y"])[0], g["out"])
        guided(model, g, channels=None)                         # all channels, unlike DiT
    for k in set(meta) - {"source", "seed"}:
        assert getattr(model.cfg, k) == meta[k], k
    assert model.cfg.route == ("window" if name == "dtr" else "given")


def test_official_random_masks_survive_our_checkpoint():
    meta, state, g = golden("dtr_random")
    ours = dtr.from_official(state, heads=meta["heads"])
    again = dtr.DTR(dtr.Config(**json.loads(json.dumps(asdict(ours.cfg)))))
    again.load_state_dict(ours.state_dict())
    for i in range(meta["depth"]):
        assert torch.equal(again.table[i], state[f"blocks.{i}.routing._unit_mapping"].bool())
    with torch.no_grad():
        close(again(g["x"], g["t"] / 1000, g["y"])[0], g["out"])


def test_the_masks_of_a_file_win_over_alpha_and_beta():
    meta, state, g = golden("dtr")
    for fields in (dict(alpha=meta["alpha"] / 4), dict(beta=meta["beta"] / 2)):
        model = dtr.from_official(state, heads=meta["heads"], **fields)
        assert model.cfg.route == "given"
        with torch.no_grad():
            close(model(g["x"], g["t"] / 1000, g["y"])[0], g["out"])


def test_other_layouts_of_official_files_are_read():
    meta, state, g = golden("dtr_random")
    mappings = [f"blocks.{i}.routing._unit_mapping" for i in range(meta["depth"])]
    switch = dict(state) | {f"routers.{i}._unit_mapping": state[k].float()  # Switch-DiT's names, in
                            for i, k in reversed([*enumerate(mappings)])}   # any order
    for k in mappings:
        del switch[k]
    wrapped = {"ema": {f"module.{k}": v for k, v in switch.items()}, "opt": {}}
    model = dtr.from_official(wrapped, heads=meta["heads"])
    with torch.no_grad():
        close(model(g["x"], g["t"] / 1000, g["y"])[0], g["out"])
    bare = {k: v for k, v in state.items() if "mapping" not in k}           # a plain DiT's file
    assert dtr.from_official(bare, heads=meta["heads"]).cfg.route == "window"
    with pytest.raises(ValueError, match="heads"):
        dtr.from_official(state)


def test_an_unconditional_official_file_has_one_row_of_labels_and_none_to_guide():
    meta, state, g = golden("dtr")
    key = "y_embedder.embedding_table.weight"                   # as with num_classes=1, no dropout
    model = dtr.from_official(dict(state) | {key: state[key][-1:]}, meta["heads"])
    assert model.cfg.classes == 0
    full = dtr.from_official(state, meta["heads"])
    none, x = torch.full_like(g["y"], full.cfg.classes), g["x"]
    with torch.no_grad():
        close(model(x, g["t"] / 1000, 0 * g["y"])[0], full(x, g["t"] / 1000, none)[0])


# ------------------------------------------------------------------------ the paper's pictures


class Toy(torch.nn.Module):
    """One block of one channel: at time t it is first + t * second, two patterns over pictures."""

    def __init__(self, first, second):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        self.first, self.second = first, second

    def forward(self, x, t, y):
        times = t.view(-1, len(self.first))
        self.blocks[0]((self.first + times * self.second).view(-1, 1, 1) + 5)


def test_cka_of_single_channels_is_their_correlation_squared():
    first, second = torch.randn(50), 3 * torch.randn(50)
    x0 = torch.zeros(50, 1, 2, 2)
    m = cka.cka(Toy(first, second), diffusion.RectifiedFlow(), x0, torch.zeros(50), x0, n=4)
    t = (torch.arange(4) + 0.5)[:, None] / 4
    assert torch.allclose(m[0], torch.corrcoef(first + t * second).square(), atol=1e-5)


def test_cka_is_one_for_times_that_a_block_cannot_tell_apart():
    model, _ = pair()
    x, _, y = inputs()
    m = cka.cka(model, diffusion.DDPM(), x, y, torch.randn_like(x), n=3)
    assert m.shape == (2, 3, 3) and torch.allclose(m, m.mT, atol=1e-5)
    assert torch.allclose(m.diagonal(dim1=1, dim2=2), torch.ones(2, 3)) and m.min() < 0.99
    assert not any(block._forward_hooks for block in model.blocks)


def test_without_a_checkpoint_it_draws_the_masks(tmp_path):
    cka.main(["--out", str(tmp_path / "masks.png")])
    page = np.array(Image.open(tmp_path / "masks.png"))
    panels = [page[24:264, left : left + 240] < 128 for left in range(12, 1272, 252)]   # dark: read
    assert all(abs(read.mean() - 307 / 384) < 0.01 for read in panels)          # the first: random
    column = np.arange(240) * 384 / 240
    for read, alpha in zip(panels[1:], (0.5, 1, 2, 4)):
        for row in (0, 120, 239):
            start = 77 * ((row + 0.5) / 240) ** alpha
            assert read[row, (column > start + 3) & (column < start + 304)].all()
            assert not read[row, (column < start - 3) | (column > start + 310)].any()


def test_checkpoints_are_compared_on_the_same_pictures(tmp_path, capsys):
    from train import FORMAT, write_checkpoint
    files = []
    for module in (dtr, dit):
        classes = 10 if module is dtr else 0                    # 0: trained without labels
        cfg = replace(module.TINY, dim=32, depth=2, learn_sigma=False, classes=classes)
        state = wake(module.Model(cfg)).state_dict()
        files.append(tmp_path / f"{module.__name__}.pt")
        write_checkpoint(files[-1], dict(
            format=FORMAT, name=module.__name__, config=asdict(cfg), step=1, model=state, ema=state,
            path=dict(kind="rf", options={}), data=dict(source="digits")))
    cka.main([*map(str, files), "--n", "4", "--device", "cpu"])
    report = json.loads((tmp_path / "cka.json").read_text())
    assert [report[str(f)]["model"] for f in files] == ["dtr window", "dit"]
    assert np.array(report[str(files[0])]["cka"]).shape == (2, 10, 10)
    assert Image.open(tmp_path / "cka.png").size == (2 * 132 + 12, 2 * 148 + 8)
    assert "block  1" in capsys.readouterr().out
    for argv, word in (([tmp_path / "missing.pt"], "no such file"),
                       ([*files, "--device", "x"], "--device x"),
                       (["--out", tmp_path / "no/masks.png"], "masks.png")):
        assert cka.cli([str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error
