"""The analyses of trained models: measures with values worked by hand, models whose result is known
beforehand, and the command lines, on checkpoints of untrained models."""

import json

import numpy as np
import pytest
import torch
from helpers import batch, run_cli, small, wake, write_model
from PIL import Image

from diffusion import DDPM, RectifiedFlow
from experiments import analyze_ditmoe, analyze_dtr, analyze_dydit, analyze_racedit

pytestmark = pytest.mark.usefixtures("few_digits")
TINY = dict(size=28, patch=4, channels=1, dim=32, heads=2)                         # fits `digits`


@pytest.fixture
def checkpoint(tmp_path):
    """write(name, source="digits", **fields of Config) -> a checkpoint of a woken model."""
    def write(name, source="digits", **fields):
        write_model(tmp_path / name / "last.pt", name, source=source, **TINY | fields)
        return tmp_path / name / "last.pt"
    return write


def rejected(program, *argv, word):
    assert word in run_cli(program, *argv, code=2)[1]


def test_an_analysis_refuses_the_checkpoint_of_another_model(checkpoint, tmp_path):
    dit = checkpoint("dit")
    for analysis, name in ((analyze_racedit, "racedit"), (analyze_ditmoe, "ditmoe"),
                           (analyze_dydit, "dydit")):
        rejected(analysis, dit, word=f"holds dit, not {name}")
        rejected(analysis, tmp_path / "none.pt", word="no such file")
    rejected(analyze_dtr, checkpoint("racedit"), word="only dit and dtr")


# ---------------------------------------------------------------------------- Race-DiT


def assigned(*words):
    """One word per token: a digit per expert, 1 where the token won it -> shared (E, E)."""
    rows = torch.tensor([[int(c) for c in word] for word in words]).double()
    return rows.mT @ rows


def test_balance_measures_have_the_values_worked_by_hand():
    shared = assigned("100", "100", "010", "001")           # loads 2, 1, 1: no pair is shared
    assert analyze_racedit.max_violation(shared) == pytest.approx(1 / 2)
    shared = assigned("110", "110", "011", "100")           # loads 3, 3, 1; pairs 2, 0, 1
    assert analyze_racedit.max_violation(shared) == pytest.approx(2 / 7)
    assert analyze_racedit.combination_usage(shared) == pytest.approx(100 / 3)      # 2 of 3 < 95 %


def test_even_loads_can_hide_pairs_that_always_win_together():
    for words, usage in (("1100 1100 0011 0011", 100 / 6), ("1100 0110 0011 1001", 50.0),
                         ("1100 1010 1001 0110 0101 0011", 100 * 5 / 6)):
        shared = assigned(*words.split())
        assert analyze_racedit.max_violation(shared) == 0
        assert analyze_racedit.combination_usage(shared) == pytest.approx(usage)


def test_equally_frequent_pairs_use_about_95_percent_of_the_pairs():
    shared = torch.ones(32, 32)
    assert analyze_racedit.combination_usage(shared) == pytest.approx(100 * 471 / 496)


@pytest.mark.parametrize("route", ["race", "token"])
def test_experts_are_counted_as_the_model_assigns_them(checkpoint, tmp_path, route):
    argv = [checkpoint("racedit", route=route), "--n", 12, "--json", tmp_path / "r.json"]
    assert "experts/token" in run_cli(analyze_racedit, *argv)[0]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["mean"] == pytest.approx(found["k"])       # tau is untrained: the top-k decides
    assert len(found["experts_per_token"]) == 10 and len(found["max_violation"]) == 2
    assert all(0 <= v < 8 / 2 for v in found["max_violation"])
    rejected(analyze_racedit, argv[0], "--json", "r.txt", word="r.txt")


@pytest.mark.parametrize("name, analysis", [("racedit", analyze_racedit), ("dtr", analyze_dtr)])
def test_images_are_read_at_the_size_that_the_checkpoint_was_trained_with(
        checkpoint, tmp_path, name, analysis):
    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(12):                                 # so that some are held out
            image = Image.fromarray(np.full((30, 40, 3), 10 * i, np.uint8))
            image.save(tmp_path / f"images/{kind}/{i}.png")
    source = str(tmp_path / "images")
    run_cli(analysis, checkpoint(name, source, size=12, channels=3, classes=2), "--n", 2)


# ---------------------------------------------------------------------------- DiT-MoE


def test_information_is_0_for_independent_things_and_log_e_for_the_same_thing():
    information = analyze_ditmoe.information
    assert information(torch.tensor([[2, 4, 6], [1, 2, 3]])).abs() < 1e-12
    assert information(5 * torch.eye(8, dtype=torch.long)).item() == pytest.approx(3)
    assert information(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])).item() == pytest.approx(1)


class Chooser:
    """A model whose first choice is rule(t, y, patch), and whose second is the expert after it."""

    def __init__(self, rule):
        self.rule, self.cfg = rule, small("ditmoe", experts=8, k=2)[1]

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, x, t, y):
        patch = torch.arange(16).expand(len(x), 16)
        first = self.rule((t * 8).round().long()[:, None], y[:, None], patch).expand(len(x), 16) % 8
        return x, dict(experts=torch.stack([first, (first + 1) % 8], -1).expand(2, -1, -1, -1))


@pytest.mark.parametrize("cause, rule", [("position", lambda t, y, patch: patch),
                                         ("step", lambda t, y, patch: t),
                                         ("class", lambda t, y, patch: y)])
def test_experts_chosen_by_one_thing_tell_of_that_thing_and_of_nothing_else(cause, rule):
    counts, images, _ = analyze_ditmoe.sample_and_count(
        Chooser(rule), RectifiedFlow(), torch.arange(10).repeat(8), steps=8, batch=32)
    choices = 2 * 80 * 8 * 16 * 2                           # not those of the unlabelled half
    assert counts.position_step[0].sum() == counts.position_step[1].sum() == choices
    assert counts.by_class[0].sum() == choices and len(images) == 8
    for layer in analyze_ditmoe.statistics(counts):
        bits, chance = layer["information"], layer["by_chance"]
        for name in bits:
            assert (bits[name] > 1.5) == (name == cause), name
            assert chance[name] < 0.5 and (name == cause or bits[name] < 0.01)
        assert layer["dead"] == 0 and layer["load_entropy"] > 0.95
        focus = torch.tensor(layer["concentration"])
        assert (focus > 0.6).all() if cause == "step" else (focus < 0.1).all()


def test_a_dead_expert_is_counted_and_step_0_is_the_noisiest():
    counts, _, favourites = analyze_ditmoe.sample_and_count(
        Chooser(lambda t, y, patch: torch.where(t == 8, 0, 2)), RectifiedFlow(), torch.arange(3),
        steps=8)
    assert counts.position_step[0, 0, 0].sum(0).tolist() == [48, 48, 0, 0, 0, 0, 0, 0]
    assert counts.position_step[0, 0, 1].sum(0).tolist() == [0, 0, 48, 48, 0, 0, 0, 0]
    assert analyze_ditmoe.statistics(counts)[0]["dead"] == 4
    assert favourites.shape == (2, 3, 16) and favourites.eq(2).all()


def test_the_analysis_of_ditmoe_writes_four_images_and_the_numbers(checkpoint):
    file = checkpoint("ditmoe")
    out, _ = run_cli(analyze_ditmoe, file, "--n", 2, "--steps", 3, "--device", "cpu")
    folder = file.parent / "experts"
    names = {"by_position.png", "by_step.png", "by_class.png", "map.png", "experts.json"}
    assert {f.name for f in folder.iterdir()} == names and "bits of information" in out
    report = json.loads((folder / "experts.json").read_text())
    assert report["images"] == 20 and [s["layer"] for s in report["layers"]] == [0, 1]
    assert len(report["layers"][0]["concentration"]) == 3


# ---------------------------------------------------------------------------- DyDiT


def test_the_width_schedule_shows_every_head_and_group_at_every_time():
    module, cfg = small("dydit")
    model, g = wake(module.Model(cfg)).eval(), torch.Generator().manual_seed(0)
    for p in model.t_embedder.mlp.parameters():             # a fresh one hardly tells times apart
        torch.nn.init.normal_(p, std=0.3, generator=g)
    for b in model.blocks:
        for router in (b.attn_rate.router, b.mlp_rate.router):
            torch.nn.init.normal_(router.weight, std=4, generator=g)
            torch.nn.init.zeros_(router.bias)
    heads, groups = analyze_dydit.width_schedule(model, columns=9)      # (1, N * (H + 1), columns)
    x, y = batch(cfg, 1)
    with torch.no_grad():
        aux = model(x, torch.tensor([0.25]), y)[1]
    assert heads.shape == groups.shape == (1, 2 * 5, 9) and len(heads.unique()) == 3
    assert torch.equal(heads[0, :, 2].view(2, 5)[:, :4], aux["heads"][0] * 2 - 1)
    assert torch.equal(groups[0, :, 2].view(2, 5)[:, :4], aux["groups"][0] * 2 - 1)
    assert heads[0, 0].eq(1).all() and heads[0, 4].eq(0).all()


def test_figures_5_and_6_of_dydit_are_drawn(checkpoint, tmp_path):
    file = checkpoint("dydit", token_bias=1e6)
    out, _ = run_cli(analyze_dydit, file, "--out", tmp_path, "--device", "cpu")
    assert out.count("compute per token 1.000") == 6        # everything is on
    schedule = Image.open(tmp_path / "width_schedule.png").convert("L")
    assert sorted(v for _, v in schedule.getcolors()) == [128, 255]     # the frame, and all on
    assert min(Image.open(tmp_path / "tokens.png").size) > 100
    rejected(analyze_dydit, file, "--device", "nowhere", word="nowhere")


# ---------------------------------------------------------------------------- DTR


class TwoPatterns(torch.nn.Module):
    """One block of one channel: at time t it is first + t * second, two patterns over images."""

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
    model, diffusion = TwoPatterns(first, second), RectifiedFlow()
    m = analyze_dtr.cka(model, diffusion, x0, torch.zeros(50), x0, n=4)
    t = (torch.arange(4) + 0.5)[:, None] / 4
    assert torch.allclose(m[0], torch.corrcoef(first + t * second).square(), atol=1e-5)


def test_cka_of_a_network_is_symmetric_and_one_for_a_time_with_itself():
    module, cfg = small("dtr")
    model, (x, y) = wake(module.Model(cfg)), batch(cfg)
    m = analyze_dtr.cka(model, DDPM(), x, y, torch.randn_like(x), n=3)
    assert m.shape == (2, 3, 3) and torch.allclose(m, m.mT, atol=1e-5)
    assert torch.allclose(m.diagonal(dim1=1, dim2=2), torch.ones(2, 3)) and m.min() < 0.99
    assert not any(block._forward_hooks for block in model.blocks)


def test_without_a_checkpoint_the_masks_of_dtr_are_drawn(tmp_path):
    run_cli(analyze_dtr, "--out", tmp_path / "masks.png")
    page = np.array(Image.open(tmp_path / "masks.png"))
    panels = [page[24:264, left : left + 240] < 128 for left in range(12, 1272, 252)]   # dark: read
    assert all(abs(read.mean() - 307 / 384) < 0.01 for read in panels)          # the first: random
    column = np.arange(240) * 384 / 240
    for read, alpha in zip(panels[1:], (0.5, 1, 2, 4)):
        for row in (0, 120, 239):
            start = 77 * ((row + 0.5) / 240) ** alpha
            assert read[row, (column > start + 3) & (column < start + 304)].all()
            assert not read[row, (column < start - 3) | (column > start + 310)].any()


def test_checkpoints_are_compared_on_the_same_images(checkpoint, tmp_path):
    files = [checkpoint("dtr"), checkpoint("dit", classes=0)]       # the second without labels
    out, _ = run_cli(analyze_dtr, *files, "--n", 4, "--device", "cpu")
    report = json.loads((files[0].parent / "cka.json").read_text())
    assert [report[str(f)]["model"] for f in files] == ["dtr window", "dit"]
    assert np.array(report[str(files[0])]["cka"]).shape == (2, 10, 10)
    assert Image.open(files[0].parent / "cka.png").size == (2 * 132 + 12, 2 * 148 + 8)
    assert "block  1" in out
    rejected(analyze_dtr, *files, "--device", "x", word="--device x")
    rejected(analyze_dtr, "--out", tmp_path / "masks.txt", word="masks.txt")
