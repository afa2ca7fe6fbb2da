"""The bench compares like with like, and every figure that the documentation quotes is there."""

import json
import math

import pytest
import torch
from helpers import run_cli, write_model
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench

pytestmark = pytest.mark.usefixtures("few_digits")


def counted(module, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() / 2                    # of multiply-accumulates


@pytest.mark.parametrize("kind", ["ditmoe", "racedit"])
@pytest.mark.parametrize("E, k", [(4, 1), (8, 2), (64, 4)])
def test_a_routed_layer_and_its_dense_rival_multiply_equally_often(kind, E, k):
    layer, dense, macs = bench.routed_pair(kind, T=64, D=64, E=E, k=k)
    x = torch.randn(1, 64, 64)
    ours, rival = counted(layer.eval(), x), counted(dense, x)
    assert ours == 64 * macs                                # the rival never multiplies more
    assert 0.98 * ours < rival <= ours


def test_the_plain_dit_of_the_bench_is_dit():
    cfg = bench.config(bench.dit, "MICRO")
    ours = bench.awake(bench.dit.DiT(cfg))
    inputs = bench.network_inputs(cfg, 2)
    expected, found = ours(*inputs)[0], bench.same_weights(bench.plain(cfg), ours)(*inputs)[0]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected)


def test_every_round_starts_with_another_variant():
    seen = []
    variants = {name: lambda name=name: seen.append(name) for name in "ABC"}
    times = bench.rounds(variants, 3)
    assert "".join(seen[6:]) == "ABCBCACAB" and times["A"].shape == (3, 2)


FIELDS = {"routed": ("dense_s", "routed", "routed_wall", "floor", "macs"),
          "step": (*bench.PARTS, "rest", "step_s", "all_but_model", "floor"),
          "sampler": ("calls_s", "walk"), "dtr": ("rival_s", "ours", "ours_wall", "floor"),
          "dydit": ("static_s", "masked", "sliced", "ratio", "floor"),
          "growth": ("step_s", "step", "per_mac", "parameters", "floor")}


def test_the_bench_runs_and_writes_its_figures(tmp_path):
    file = tmp_path / "bench.json"
    out, _ = run_cli(bench, *FIELDS, "--micro", "--json", file)
    results = json.loads(file.read_text())
    for case, names in FIELDS.items():
        assert results[case]["rows"]
        for row in results[case]["rows"]:
            assert all(math.isfinite(row[name]) and row[name] > 0 for name in names), (case, row)
    for row in results["step"]["rows"]:                     # nothing is counted twice or forgotten
        assert 0.8 < sum(row[p] for p in (*bench.PARTS, "rest")) < 1.2
    for row in results["sampler"]["rows"]:
        assert row["walk"] > 1                              # a sampler contains its model calls
    assert "all_but_model" in out


def test_dydit_is_measured_against_its_dense_parent(checkpoints, tmp_path):
    dense, ours = checkpoints
    file = tmp_path / "bench.json"
    cases = ["dydit-sampling", "--dense", dense, "--dydit", ours]
    run_cli(bench, *cases, "--micro", "--json", file)
    results = json.loads(file.read_text())
    row, = results["dydit-sampling"]["rows"]
    assert row["ratio"] == 1 and row["difference"] < 1e-2 and row["sliced"] > 0     # all is on


@pytest.fixture
def checkpoints(tmp_path):
    """A dense DiT and a DyDiT whose switches are all on, untrained."""
    for name, fields in (("dit", {}), ("dydit", dict(token_bias=1e6))):
        write_model(tmp_path / f"{name}.pt", name, size=28, patch=4, channels=1, dim=32, heads=2,
                    **fields)
    return tmp_path / "dit.pt", tmp_path / "dydit.pt"


def test_cases_that_do_not_exist_or_lack_a_checkpoint_are_one_line(checkpoints, tmp_path):
    dense, ours = checkpoints
    common = ["--micro", "--json", tmp_path / "b.json"]
    for argv, word in ((["sorted"], "routed"), (["dydit-sampling"], "--dense"),
                       (["dydit-sampling", "--dense", dense], "--dydit"),
                       (["dydit-sampling", "--dense", ours, "--dydit", ours], "holds dydit")):
        assert word in run_cli(bench, *argv, *common, code=2)[1]
