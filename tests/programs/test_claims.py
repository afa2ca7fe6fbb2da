"""The ledger of claims: verdicts from made-up results, the queue, equal work, and the tables in the
READMEs, which are those that the stored results give."""

import json
import time
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, batch, run_cli, small, wake

import ditmoe
import dydit
import racedit
from common.cli import UserError
from data import load
from diffusion import RectifiedFlow
from experiments import claims, contrasts, figures, prune, run_queue, runs
from experiments.claims import BY_ID, CLAIMS
from experiments.contrasts import UNSEEN, Claim, Contrast, outcome_of
from experiments.runs import DENSE, Run, arm

RACE, OTHER = arm("racedit"), arm("racedit", "route=token")
ARMS = {x for c in CLAIMS for x in c.needs()}
ARMS |= {x.parent for x in ARMS if x.parent}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Results and checkpoints go to a folder of the test."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "CHECKPOINTS", tmp_path / "checkpoints")
    (tmp_path / "results").mkdir()
    return tmp_path


def store(run, **measured):
    """Write a made-up result of a run."""
    content = dict(seed=run.seed, **runs.plan(run.arm, run.from_scratch), log=[[1, 1.0]],
                   seconds_per_step=0.1) | measured
    (runs.RESULTS / f"{run.name}.json").write_text(json.dumps(content))


def losses(*values):
    return {seed: dict(loss=dict(mean=v)) for seed, v in enumerate(values)}


# ------------------------------------------------------------------------ the list


def test_every_claim_of_the_list_is_there_once():
    ids = [f"{paper}{i}" for paper in "RMYT" for i in range(1, 11)]
    assert [c.id for c in CLAIMS] == ids
    for c in CLAIMS:
        assert c.kind in "0CGN" and bool(c.why) == (c.kind == "N")
        assert (c.kind == "N") == (not c.contrasts) and all(
            not x.shown for x in c.contrasts[:1]), c.id


def test_the_three_controls_of_a_reviewer_are_there():
    arms = {id: set(BY_ID[id].needs()) for id in BY_ID}
    assert claims.DENSE_800 in arms["Y1"] and claims.DENSE_800.parent == DENSE     # equal steps
    assert claims.DENSE_PLR in arms["R6"] and DENSE in arms["R6"]
    assert claims.AS_NARROW in arms["R1"] & arms["R2"] & arms["M10"]


def test_every_arm_is_a_valid_command_line_and_has_a_name_of_its_own():
    for x in ARMS:
        assert runs.plan(x)["cost"]["GMAC"] > 0 and len(f"{x.name}_1000-0.json") < 200
    assert len({x.name for x in ARMS}) == len(ARMS)
    assert runs.plan(claims.HALF)["config"]["target"] == 0.5
    narrow = claims.tuned(dense=claims.dense(64))           # inherits its parent's width
    assert runs.plan(narrow)["config"]["dim"] == 64 and "dim=64" in narrow.name


def test_every_measurement_that_a_claim_needs_exists():
    needs = {need for c in CLAIMS for own in c.needs().values() for need in own}
    assert needs == set(runs.MEASUREMENTS)


def test_arms_do_equal_work_unless_the_contrast_says_why_not():
    for c in CLAIMS:
        for x in c.contrasts:
            if isinstance(x, Contrast):
                ratio = claims.equal_work(x)
                assert x.b is None or x.work is not True or abs(ratio - 1) <= 0.01, (c.id, ratio)
    wider = Contrast("loss", arm("dit", "dim=160"), DENSE)
    with pytest.raises(UserError, match="activated work"):
        claims.equal_work(wider)
    assert claims.equal_work(Contrast("loss", wider.a, DENSE, work="a reason")) > 1.5


def test_work_counts_the_router_and_dydits_target():
    for module, x in ((racedit, RACE), (ditmoe, arm("ditmoe"))):
        cfg = replace(module.TINY, learn_sigma=False)           # a flow
        assert runs.work(x) == module.cost(cfg)["GMAC"] > 1.07 * runs.work(DENSE)
    assert 0.5 < runs.work(claims.HALF) / runs.work(DENSE) < 0.53


def test_the_column_work_tells_what_dydit_really_spent():
    contrast = BY_ID["Y5"].contrasts[0]                         # DyDiT : pruning, target 0.5
    ours, theirs = contrast.arms
    spent = {share: dict(schedule=dict(flops=[share, share])) for share in (0.5, 0.6)}
    assert claims.measured_work(contrast, {}) == "1.000"
    assert claims.measured_work(contrast, {ours: {0: spent[0.5]}, theirs: {}}) == "1.000"
    more = float(claims.measured_work(contrast, {ours: {0: spent[0.6]}, theirs: {0: spent[0.5]}}))
    assert 1.15 < more < 1.2                                    # all but the blocks stays equal


# ------------------------------------------------------------------------ verdicts


def test_the_interval_is_students():
    found = outcome_of([1.0, 2.0, 3.0], "more")                 # mean 2, deviation 1
    assert found.mean == 2 and found.half == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    t = torch.distributions.StudentT(7.0).sample((400_000,)).abs()
    assert (t > contrasts.T[6]).double().mean().item() == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("values, expect, margin, outcome", [
    ([-1.0, -1.1, -0.9], "less", 0, "yes"), ([1.0, 1.1, 0.9], "less", 0, "no"),
    ([1.0, 1.1, 0.9], "more", 0, "yes"), ([1.0, -1.1, 0.9], "more", 0, UNSEEN),
    ([0.1, -0.1, 0.2], "equal", 1, "yes"), ([2.0, 2.1, 1.9], "equal", 1, "no"),
    ([3.0, -2.0, 1.0], "equal", 1, UNSEEN), ([1.0, 1.1, 0.9], "equal", 1, "mixed"),
    ([1.5, 1.6, 1.4], "more", 1, "yes"), ([0.5, 0.6, 0.55], "more", 1, "mixed"),
    ([0.2, -0.5, 0.1], "more", 1, "no"), ([0.9, -0.5, 0.9], "more", 1, UNSEEN),
    ([1.0, 2.0, 3.0], "-", 0, "-"), ([-1.0], "less", 0, "not run yet"),
    ([], "less", 0, "not run yet"), ([2.0, 2.0], "more", 0, "not run yet")])
def test_outcomes_of_made_up_differences(values, expect, margin, outcome):
    assert outcome_of(values, expect, margin).outcome == outcome


def claim(*contrasts, seeds=3):
    return Claim("X", "says", "Fig. 1", "C", seeds, contrasts)


def test_differences_are_paired_by_seed_and_relative_to_the_rival():
    results = {RACE: losses(0.9, 1.8, 2.7), OTHER: losses(1.0, 2.0) | {5: dict(loss={"mean": 9})}}
    contrast = Contrast("loss", RACE, OTHER)
    assert contrast.values(results) == pytest.approx([-10, -10])        # seed 2 and 5 have no pair
    beyond = Contrast("loss", RACE, OTHER, beyond=(RACE, OTHER))
    assert beyond.values(results) == pytest.approx([0, 0])


def test_a_verdict_says_yes_no_mixed_unseen_and_how_many_seeds():
    loss, same = Contrast("loss", RACE, OTHER), Contrast("loss", RACE, DENSE)
    results = {RACE: losses(0.90, 0.91, 0.89), OTHER: losses(1, 1, 1), DENSE: losses(0.8, 0.8, 0.8)}
    assert claim(loss).verdict(results) == "yes"
    assert claim(loss, same).verdict(results) == "mixed"
    assert claim(same).verdict(results) == "no"
    shown = Contrast("loss", RACE, DENSE, shown=True)
    assert claim(loss, shown).verdict(results) == "yes"         # a control does not decide
    assert claim(loss, seeds=5).verdict(results) == "yes (3 of 5 seeds)"
    assert claim(loss).verdict({}) == "not run yet"
    assert claim(loss, same).verdict({RACE: results[RACE], OTHER: results[OTHER]}) == "not run yet"
    noisy = {RACE: losses(0.9, 1.1, 1.02), OTHER: losses(1, 1, 1)}
    half = outcome_of(loss.values(noisy), "less").half                  # of 0.7 % on average
    assert claim(loss).verdict(noisy) == f"{UNSEEN} (< {2 / 3 + half:.1f} %)"
    assert claim(loss, shown).differences(noisy) == f"loss: +1 ± {half:.0f} %"
    cases = [replace(loss, case=case) for case in ("one", "two")]
    told = claim(*cases).differences(noisy)
    assert told == f"loss: +1 ± {half:.0f} % (one), +1 ± {half:.0f} % (two)"
    assert BY_ID["R10"].verdict({}) == "not testable here"


def test_means_are_rounded_to_two_digits_of_the_half_width():
    def text(mean, half):
        return contrasts.interval(contrasts.Found("yes", 3, mean, half), "%")
    assert text(4.944, 0.687) == "+4.94 ± 0.69 %" and text(-0.4, 11.2) == "+0 ± 11 %"
    assert text(2.96e-5, 1.3e-5) == "+0.000030 ± 0.000013 %" and text(0.0, 0.0) == "+0.00 ± 0.00 %"


def test_steps_to_the_rivals_final_loss():
    rival = dict(log=[[s, 10.0 - s / 100] for s in range(100, 1001, 100)])
    twice = dict(log=[[s, 10.0 - s / 50] for s in range(100, 1001, 100)])
    assert contrasts.speedup(twice, rival, window=1) == pytest.approx(1.0)
    assert contrasts.speedup(rival, rival) == 0
    assert contrasts.speedup(rival, twice, window=1) == pytest.approx(-0.5)
    bump = dict(log=[[100, 9.0], [200, 5.0], [300, 5.5]])       # ends above its own best loss
    assert contrasts.speedup(bump, bump, window=1) == 0


# ------------------------------------------------------------------------ the queue


def test_parents_come_first_and_arms_are_shared_between_claims(folders):
    order, done, cost = run_queue.queue([BY_ID["Y1"], BY_ID["Y5"], BY_ID["R6"]])
    names = [job.name for job in order]
    assert len(set(names)) == len(names) and set(names) == set(cost)
    for job in order:
        if job.run.parent:
            assert names.index(job.run.parent.name) < names.index(job.name)
    dense = [job for job in order if job.run.arm == DENSE]
    assert len(dense) == 5                              # R6 wants 5 seeds, Y1 and Y5 three of them
    assert dense[0].needs >= {"loss", "samples", "norms"}       # measured once for all claims
    assert done[0][0] == "Y1"                           # the least work


def test_a_contrast_may_want_fewer_seeds_than_its_claim(folders):
    names = [job.name for job in run_queue.jobs_of(BY_ID["T1"])]
    linear = [name for name in names if "schedule=linear" in name]
    assert len(linear) == 2 and all(name.endswith("-0") for name in linear) and len(names) == 18


def test_the_claim_with_the_least_remaining_work_comes_first(folders):
    first = [c for c, _ in run_queue.queue([BY_ID["R4"], BY_ID["M7"]])[1]]
    assert first == ["M7", "R4"]
    for job in run_queue.jobs_of(BY_ID["R4"])[:-1]:     # all but one run is there
        store(job.run, **{need: {} for need in job.needs})
    order, done, _ = run_queue.queue([BY_ID["R4"], BY_ID["M7"]])
    assert [c for c, _ in done] == ["R4", "M7"] and len(order) == 1 + 6


def test_a_result_of_another_recipe_or_length_does_not_count(folders, monkeypatch):
    run = Run(RACE, 0)
    store(run, loss={})
    assert run.result() and not run.missing({"loss"}) and run.missing({"race"}) == ["race"]
    assert Run(RACE, 0, from_scratch=7).result() is None and Run(RACE, 1).result() is None
    content = json.loads((runs.RESULTS / f"{run.name}.json").read_text())
    content["recipe"]["lr"] *= 2
    (runs.RESULTS / f"{run.name}.json").write_text(json.dumps(content))
    assert run.result() is None and run.missing({"loss"}) == ["loss"]


def test_a_child_of_another_recipes_parent_does_not_count(folders, monkeypatch):
    run = Run(claims.HALF, 0)
    store(run, loss={})
    assert run.result()
    monkeypatch.setitem(runs.train.TINY, "lr", 1.0)             # the dense parent's alone
    runs.plan.cache_clear()
    try:
        assert run.result() is None
    finally:
        runs.plan.cache_clear()


def test_seeds_of_a_gpu_and_of_a_cpu_are_never_paired(folders):
    c = BY_ID["M7"]
    for seed in range(3):
        for x, device in zip(c.needs(), ("cpu", "cuda")):
            store(Run(x, seed, device=device), loss=dict(mean=1.0))
    assert c.verdict(claims.stored_results([c])[c.id]) == "not run yet"


def test_a_queue_that_was_cut_off_goes_on(folders, monkeypatch):
    ran = []

    def run_one(job, deadline=None):
        if len(ran) == stop[0]:
            time.sleep(0.01)
            return "saved before its end"
        ran.append(job.name)
        out = runs.CHECKPOINTS / job.name
        out.mkdir(parents=True)
        (out / "last.pt").touch()
        (out / "done.json").write_text(json.dumps(job.run.about()))
        store(job.run, **{need: {} for need in job.needs})
        return "done"
    monkeypatch.setattr(run_queue, "run_one", run_one)
    stop = [4]
    order, *_ = run_queue.queue([BY_ID["Y5"]])
    run_queue.work_off(order, jobs=2)
    again, *_ = run_queue.queue([BY_ID["Y5"]])
    assert len(ran) == 4 and not {job.name for job in again} & set(ran)
    stop[0] = 100
    assert run_queue.work_off(again, jobs=2) == ([], set())
    assert len(ran) == len(order) == 21 and run_queue.queue([BY_ID["Y5"]])[0] == []
    late, _ = run_queue.work_off(order, deadline=time.time() - 1)
    assert len(late) == len(order)                              # nothing begins after the deadline


def test_a_parent_without_a_checkpoint_is_trained_again_for_its_children(folders):
    for job in run_queue.jobs_of(BY_ID["Y5"]):
        if not job.run.parent:
            store(job.run, **{need: {} for need in job.needs})
    names = {job.name for job in run_queue.queue([BY_ID["Y5"]])[0]}
    assert len(names) == 21                             # results are there, checkpoints are not


def test_a_failed_parent_takes_only_its_children_along(folders, monkeypatch):
    def run_one(job, deadline=None):
        if job.run.arm == DENSE and job.run.seed == 0:
            raise UserError("diverged")
        out = runs.CHECKPOINTS / job.name
        out.mkdir(parents=True)
        (out / "last.pt").touch()
        (out / "done.json").write_text(json.dumps(job.run.about()))
        return "done"
    monkeypatch.setattr(run_queue, "run_one", run_one)
    left, failed = run_queue.work_off(run_queue.queue([BY_ID["Y5"]])[0])
    assert left == [] and len(failed) == 7 and all(name.endswith("-0") for name in failed)


def test_the_command_line(folders):
    out, _ = run_cli(claims, "--run", "R7", "--seeds", 1, "--dry-run")
    assert out.count("racedit") == 4 and "4 runs" in out
    out, _ = run_cli(claims, "--run", "recipe", "--dry-run")
    assert "12 runs" in out and out.count("muon-lr=0") == 6 and "predict=eps" in out
    assert "cheap" in run_cli(claims, "--run", "R99", code=2)[1]
    assert "bench" in run_cli(claims, "--run", "T9", code=2)[1]
    assert "no such run" in run_cli(claims, "--measure", "x", "loss", code=2)[1]
    assert "Not testable here" in run_cli(claims)[0]


# ------------------------------------------------------------------------ measurements, pruning


def test_dydits_schedule_is_measured_evenly_over_time(few_digits):
    """A DyDiT whose switches are all on: every share is 1, and tokens tell nothing."""
    module, cfg = small("dydit", size=28, patch=4, channels=1)
    found = runs.schedule(wake(module.Model(cfg)).eval(), RectifiedFlow(), load("digits", "test"))
    assert found["heads"] == found["width"] == found["flops"] == [1.0] * 10
    assert found["mean"] == pytest.approx(1) and found["auc"] == [0.5] * 10


def test_auc_by_hand():
    score, positive = torch.tensor([3.0, 1, 2, 2]), torch.tensor([True, False, True, False])
    assert runs.auc(score, positive) == pytest.approx(3.5 / 4)          # one tie counts half
    assert runs.auc(-score, positive) == pytest.approx(0.5 / 4)
    assert runs.auc(0 * score, positive) == 0.5


def test_a_pruned_network_uses_half_of_its_heads_and_channels_at_all_times():
    module, cfg = small("dydit", route="width", weight=0.0, heads=4)
    dense = wake(small("dit")[0].DiT(small("dit", heads=4)[1]))
    model = prune.half(dense.state_dict(), cfg).eval()
    x, y = batch(cfg)
    with torch.no_grad():
        aux = wake(model)(x, torch.linspace(0, 1, 4), y)[1]
    assert aux["heads"].mean() == aux["groups"].mean() == 0.5 and aux["tokens"].all()
    assert torch.allclose(aux["flops"], torch.tensor(0.5))
    assert not any(p.requires_grad for b in model.blocks for p in b.attn_rate.parameters())
    with pytest.raises(UserError, match="route=width"):
        prune.half(dense.state_dict(), small("dydit")[1])
    assert prune.main.__module__ == "experiments.prune" and dydit.from_dense is not prune.half


# ------------------------------------------------------------------------ the READMEs


def test_the_tables_in_the_readmes_are_those_of_the_stored_results():
    results = claims.stored_results(CLAIMS)
    for (file, name), lines in reversed(claims.blocks(results).items()):
        written = claims.between(name).search((ROOT / file).read_text())
        if written is None and file == "README.md":
            pytest.skip("README.md has no markers <!-- claims --> yet")
        assert written and written[0].split("\n")[1:-1] == lines, (
            f"{file}: python -m experiments.claims --write")


def test_every_figure_has_a_caption_and_draws_or_says_what_is_missing(folders):
    pytest.importorskip("matplotlib")
    assert list(claims.CAPTIONS) == [name for name in figures.FIGURES if name != "panels"]
    out, _ = run_cli(figures, *(name for name in figures.FIGURES if name != "expert_maps"), "--out",
                     folders)
    assert out.count("skipped, no ") == len(claims.CAPTIONS) - 1
    assert (folders / "panels.png").exists()
    assert "no figure" in run_cli(figures, "x", code=2)[1]


def test_no_cell_of_a_table_is_long_and_no_pipe_breaks_it():
    for lines in claims.blocks({}).values():
        for line in lines:
            if line.startswith("|"):
                assert max(map(len, line.strip("|").split("|"))) <= 150
    assert claims.row("a|b", "c").count("|") == 3
