"""train.py as a user runs it, on small models; the parts of its loop by cases worked by hand."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same, metrics, run_cli, smallest_run, write_model
from PIL import Image

import sample
import train as program
from common.checkpoint import MODELS, load_model, read_checkpoint, write_checkpoint
from common.files import write_atomic
from data import load
from diffusion import RectifiedFlow

pytestmark = pytest.mark.usefixtures("few_digits")


def train(out, *options, model="dit", steps=1, code=0):
    return run_cli(program, *smallest_run(out, "--steps", steps, *options, model=model), code=code)


def read(out):
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_digits):
    """A short run of Race-DiT, shared by the tests that only look at it."""
    out = tmp_path_factory.mktemp("run") / "racedit"
    return out, train(out, "--amp", "auto", model="racedit", steps=4)[0]


# ------------------------------------------------------------------------ a run and its files


def test_the_first_command_trains_and_the_second_samples(run):
    out, text = run
    assert "step 4/4" in text and "img/s" in text and f"now: python sample.py {out}" in text
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert {k for k in metrics(out)[3] if k.endswith("loss")} == {
        "loss", "sim_loss", "plr_loss", "balance_loss"}
    run_cli(sample, out / "last.pt", "--n", 12, "--steps", 3, "--film", "--maps",
            "--npz", out / "s.npz")
    for name in ("grid", "film", "maps"):
        assert Image.open(out / f"{name}.png").size[0] > 100
    with np.load(out / "s.npz") as z:
        assert z["arr_0"].shape == (12, 28, 28, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == [*range(10), 0, 1] and z["arr_1"].dtype == np.int64


def test_a_checkpoint_holds_plain_types_and_a_threshold_for_each_set_of_weights(run):
    content = read(run[0])
    assert content["step"] == 4 and content["config"]["dim"] == 16 and content["name"] == "racedit"
    assert content["data"]["source"] == "digits" and content["path"]["kind"] == "rf"
    for weights in ("model", "ema"):
        assert content[weights]["blocks.0.moe.tau"].isfinite().all()
    for key in ("blocks.0.moe.tau", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(content["ema"][key], content["model"][key])


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_to_the_bit(run, tmp_path):
    train(tmp_path, "--amp", "auto", model="racedit", steps=2)
    train(tmp_path, "--amp", "auto", "--resume", model="racedit", steps=4)
    assert_same(read(run[0]), read(tmp_path))
    assert metrics(tmp_path) == metrics(run[0])


def test_a_finished_run_returns_at_once_and_changes_nothing(run, monkeypatch):
    before = {file.name: file.read_bytes() for file in run[0].iterdir() if file.is_file()}
    monkeypatch.setattr(program, "get_batches", None)               # no batch is read
    text, _ = train(run[0], "--resume", model="racedit", steps=3)
    assert "already at step 4: nothing to do" in text
    assert before == {file.name: file.read_bytes() for file in run[0].iterdir() if file.is_file()}


def test_the_samples_along_the_way_are_written_as_images(tmp_path):
    train(tmp_path, "--sample-every", 1, steps=2)
    assert len(list(tmp_path.glob("samples/step_000000[12].png"))) == 2


def test_new_runs_keep_all_earlier_ones_and_may_start_from_them(tmp_path):
    runs, names = [], ("last.pt", "metrics.jsonl", "samples/step_0000001.png")
    for start in range(4):
        init = ["--init", tmp_path / "last.pt"] if start == 2 else []
        train(tmp_path, "--sample-every", 1, "--seed", start, *init)
        runs.append([(tmp_path / name).read_bytes() for name in names])
    for prefix, run in zip(("previous_", "previous_2_", "previous_3_", ""), runs, strict=True):
        assert [(tmp_path / f"{prefix}{name}").read_bytes() for name in names] == run
    assert len(metrics(tmp_path)) == 1 and len(set(map(str, runs))) == 4


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    """A process of its own, on the digits that users get."""
    argv = [sys.executable, "train.py", *smallest_run(tmp_path, "--steps", 100_000)]
    p = subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in p.stdout:
        if line.startswith("step 3/"):
            p.send_signal(signal.SIGINT)
            break
    rest = p.stdout.read()
    assert p.wait() == 130 and "rerun the same command with --resume" in rest
    assert read(tmp_path)["step"] >= 3


def test_a_file_gets_its_name_only_when_its_content_is_on_the_disk(tmp_path, monkeypatch):
    """Or a power cut could leave a name with nothing behind it."""
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda f: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    write_atomic(tmp_path / "a", lambda f: f.write(b"a"))
    assert done == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"a"


def test_a_checkpoint_that_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    train(tmp_path / "dit")
    read_whole, kept, alive = program.ckpt.read_checkpoint, [], []

    def watched(*a, **k):
        content = read_whole(*a, **k)
        moments = content["optimizer"]["state"]["x_embedder.proj.weight"]
        weights = content["ema"]["x_embedder.proj.weight"]
        kept.extend(map(weakref.ref, (weights, moments["exp_avg"])))
        return content
    monkeypatch.setattr(program.ckpt, "read_checkpoint", watched)
    monkeypatch.setattr(program.ckpt, "save_run", lambda *a: [
        gc.collect(), alive.extend(ref() for ref in kept)])
    train(tmp_path / "dit", "--resume", steps=2)
    train(tmp_path / "dtr", "--init", tmp_path / "dit/last.pt", "--set", "beta=1", model="dtr")
    assert len(alive) == 6 and not any(torch.is_tensor(one) for one in alive)


def test_a_dydit_checkpoint_with_the_old_names_of_its_settings_resumes(tmp_path):
    new = dict(anneal_start=3, anneal_steps=5, hard_gates_from=7, full_model_steps=9)
    train(tmp_path, "--set", *(f"{k}={v}" for k, v in new.items()), model="dydit")
    content = read(tmp_path)
    for old, name in zip(("hold", "ramp", "quiet", "complete"), new):
        content["config"][old] = content["config"].pop(name)
    write_checkpoint(tmp_path / "last.pt", content)
    train(tmp_path, "--resume", model="dydit", steps=2)
    assert new.items() <= read(tmp_path)["config"].items()


# ------------------------------------------------------------------------ the loop


def parse(*options):
    return program.parse_args(["--model", "dit", "--tiny", *map(str, options)])


def test_the_learning_rate_rises_stays_and_falls():
    args = parse("--steps", 100, "--warmup", 3, "--cooldown", 0.5)
    for step, share in {0: 0.25, 2: 0.75, 3: 1, 49: 1, 50: 1, 75: 0.5, 99: 0.02}.items():
        assert program.lr_multiplier(args, step) == pytest.approx(share)


def test_every_epoch_has_each_image_once_in_another_order():
    epochs = program.shuffled_ids(7, 0, 0, 21).view(3, 7)
    assert all(epoch.sort().values.tolist() == list(range(7)) for epoch in epochs)
    assert len(epochs.unique(dim=0)) == 3
    assert torch.equal(program.shuffled_ids(7, 0, 5, 16), epochs.flatten()[5:16])
    assert not torch.equal(program.shuffled_ids(7, 1, 0, 7), epochs[0])         # of another seed


@pytest.mark.parametrize("drop, low, high", [(0, 0, 0), (1, 1, 1), (0.3, 0.2, 0.4)])
def test_a_share_of_the_labels_is_dropped(drop, low, high):
    args, cfg = parse("--batch", 500, "--drop", drop), importlib.import_module("dit").TINY
    (_, y, _), = program.get_batches(args, load("digits"), cfg, 0, 1, 0)
    assert low <= (y == cfg.classes).float().mean() <= high


def test_a_forward_sees_the_same_images_however_many_processes_share_it():
    args, cfg = parse("--batch", 24, "--accum", 3), importlib.import_module("dit").TINY
    every = load("digits")

    def seen(world_size):                   # -> three forwards, each of all processes
        each = [program.get_batches(args, every, cfg, rank, world_size, 7)
                for rank in range(world_size)]
        return [torch.cat([rows for rows, _, _ in parts]) for parts in zip(*each)]
    alone = seen(1)
    assert [len(x0) for x0 in alone] == [8, 8, 8] and len(torch.cat(alone).unique(dim=0)) == 24
    for world_size in (2, 4):
        assert all(map(torch.equal, seen(world_size), alone))


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    for accum in (1, 4):
        train(tmp_path / str(accum), "--accum", accum, steps=4)
    for one, four in zip(*(metrics(tmp_path / accum) for accum in "14")):
        assert abs(one["loss"] - four["loss"]) < 1e-5
        assert abs(one["grad_norm"] - four["grad_norm"]) < 1e-4


def test_checkpointing_changes_no_number(run, tmp_path):
    train(tmp_path, "--amp", "auto", "--checkpointing", model="racedit", steps=4)
    assert metrics(tmp_path) == metrics(run[0])


def test_a_gradient_longer_than_the_limit_is_cut_to_it_and_a_shorter_one_is_left_alone():
    model, diffusion = torch.nn.Linear(3, 2, bias=False), RectifiedFlow()
    one = dict(loss=torch.ones(()))
    for limit, kept in ((1.0, 1.0), (5.0, 5.0), (7.0, 5.0), (0.0, 5.0)):            # 0: no limit
        model.weight.grad = given = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
        before = given.clone()
        norm, ok, stop = program.clip_gradients(limit, model, one, diffusion, 1)
        assert norm == 5 and ok and not stop            # the norm as it was, for the log
        assert given.norm() == pytest.approx(kept, rel=1e-5)
        assert torch.equal(given, before) == (kept == 5)


def test_averaged_weights_move_a_little_and_buffers_are_copied():
    ema, model = (torch.nn.BatchNorm1d(2) for _ in range(2))
    model.weight.data += 1
    model.running_mean += 5
    program.update_ema(ema, model, 0.9)
    assert ema.weight.tolist() == pytest.approx([1.1, 1.1])
    assert ema.running_mean.tolist() == [5, 5]


# ------------------------------------------------------------------------ options


def test_a_dry_run_counts_without_allocating(tmp_path):
    text, _ = run_cli(program, *"--model dit --size XL/2 --path ddpm --dry-run".split())
    assert "parameters 675,129,632 total 675,129,632 activated" in text
    assert "118.6 GMAC per image" in text
    text, _ = run_cli(program, *"--model ditmoe --size G/2 --path ddpm".split(),
                      "--dry-run", "--out", tmp_path / "new")
    assert "parameters 16,503,717,152 total" in text and not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", MODELS)
def test_without_classes_every_model_trains_resumes_and_samples_unguided(tmp_path, model):
    """classes = 0: one row in the label table, whatever labels the images have."""
    train(tmp_path, "--set", "classes=0", model=model)
    train(tmp_path, "--resume", model=model, steps=2)
    net, diffusion, _ = load_model(tmp_path / "last.pt")
    assert net.y_embedder.embedding_table.weight.shape == (1, 16)
    asked = []
    net.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    sample.generate(net, diffusion, torch.zeros(3, dtype=torch.long), steps=2, cfg=7.0)
    assert asked == [3, 3]                              # guidance would ask for twice as many
    maps = ["--maps"] if model in ("racedit", "dydit") else []
    run_cli(sample, tmp_path / "last.pt", "--n", 2, "--steps", 2, *maps)
    _, error = run_cli(sample, tmp_path / "last.pt", "--cfg", 3, code=2)
    assert "knows no classes" in error


def test_a_run_that_starts_from_another_weighting_does_not_inherit_its_gamma(tmp_path):
    ddpm = ["--path", "ddpm", "--weighting"]
    train(tmp_path / "a", *ddpm, "min-snr", "--gamma", 3)
    train(tmp_path / "b", *ddpm, "p2", "--init", tmp_path / "a/last.pt")
    train(tmp_path / "c", "--init", tmp_path / "a/last.pt")
    assert [read(tmp_path / x)["path"]["options"]["gamma"] for x in "abc"] == [3.0, 1.0, 3.0]


PARENTS = {                     # parents, with the models that can begin as the same function
    "dit": "dit ditmoe dydit", "dtr": "dtr", "dtr that reads all channels": "dtr dit ditmoe dydit",
    "ditmoe": "ditmoe", "racedit": "racedit", "dydit": "dydit"}


def write_parent(file, name):
    open_dtr = dict(beta=1.0) if " " in name else {}
    experts = dict(experts=4) if name in ("ditmoe", "racedit") else {}
    return write_model(file, name.split()[0], size=28, patch=7, channels=1, dim=16, depth=1,
                       heads=2, **open_dtr, **experts)[0]


@pytest.mark.parametrize("parent", PARENTS)
def test_a_run_begins_as_the_function_of_its_parent_or_is_refused(tmp_path, parent):
    file = tmp_path / "parent.pt"
    before, took = write_parent(file, parent), []
    x, t, y = torch.randn(4, 1, 28, 28), torch.rand(4), torch.arange(4)
    for model in MODELS:
        out = tmp_path / model
        _, error = train(out, "--init", file, "--lr", 0, model=model, code=(0, 2))
        assert not error or "cannot start from it" in error and not out.exists()
        if not error:
            took.append(model)
            after = load_model(out / "last.pt", "raw")[0]
            for net in (before, after):                 # training has moved the threshold tau
                net.train(model == "racedit")
            with torch.no_grad():
                assert (after(x, t, y)[0] - before(x, t, y)[0]).abs().max() < 1e-5
            assert before(x, t, y)[0].std() > 0.01
    assert sorted(took) == sorted(PARENTS[parent].split())


@pytest.mark.parametrize("parent, model, setting, word", [
    ("dit", "dit", "dim=32", "dim must be 16"), ("dit", "dit", "depth=2", "depth must be 1"),
    ("dit", "ditmoe", "patch=4", "patch must be 7"), ("dit", "dydit", "time_scale=1", "1000.0"),
    ("dit", "ditmoe", "hidden=2", "hidden must be 4"), ("dit", "ditmoe", "expert=swiglu", "gelu"),
    ("dit", "ditmoe", "renormalize=false", "renormalize must be True"),
    ("dit", "ditmoe", "qk_norm=true", "q_norm"), ("dit", "dtr", "beta=0.9", "beta=1"),
    ("ditmoe", "ditmoe", "k=1", "k must be 2"), ("dydit", "dydit", "route=width", "be both"),
    ("racedit", "racedit", "gate=sigmoid", "identity"), ("dtr", "dtr", "alpha=1", "must be 4.0"),
    ("dit", "dit", "dim=16", ""), ("dit", "dtr", "beta=1", ""), ("dit", "ditmoe", "experts=2", ""),
    ("dit", "ditmoe", "hidden=4", ""), ("dit", "dydit", "head_bias=9", ""),
    ("dydit", "dydit", "target=0.3", ""), ("ditmoe", "ditmoe", "alpha=0", ""),
    ("racedit", "racedit", "sim=0", "")])
def test_a_setting_that_would_make_another_function_of_the_parent_is_refused(
        tmp_path, parent, model, setting, word):
    write_parent(tmp_path / "parent.pt", parent)
    _, error = train(tmp_path / "new", "--init", tmp_path / "parent.pt", "--set", setting,
                     model=model, code=2 if word else 0)
    assert word in error and "size mismatch" not in error and "state_dict" not in error
    assert (tmp_path / "new").exists() == (not word)


BAD = [
    ("--set dimm=3", "dimm"), ("--set dim=x", "dim must be of type int"), ("--lr -1", "lr"),
    ("--set heads=3", "heads 3"), ("--data nowhere", "nowhere"), ("--steps 0", "steps"),
    ("--batch 0", "batch"),
    ("--weighting min-snr", "ddpm"), ("--init README.md", "README.md"),
    ("--init nowhere.pt", "no such file"), ("--batch 7 --accum 2", "accum"),
    ("--size S/2", "--tiny or --size"), ("--device tpu", "tpu"), ("--fsdp", "torchrun"),
    ("--unknown", "unknown"), ("--set route=fastest", "route"), ("--gamma 2", "ddpm"),
    ("--path ddpm --times uniform", "times"), ("--path ddpm --gamma 2", "min-snr or p2"),
    ("--path ddpm --weighting ant-uw --gamma 2", "min-snr or p2"),
    ("--path ddpm --weighting p2 --clusters 4", "ant-uw"),
    ("--path ddpm --weighting min-snr --gamma 0", "above 0"),
    ("--path rf --weighting ant-uw", "not rf"), ("--set classes=3", "classes"),
    ("--set size=56", "size"), ("--set channels=2", "channels")]


@pytest.mark.parametrize("options, word", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, options, word):
    _, error = train(tmp_path / "new", *options.split(), model="racedit", code=2)
    assert word in error and not (tmp_path / "new").exists(), error


@pytest.mark.parametrize("option", ["--seed 5", "--set k=1", "--path ddpm", "--data fashion-mnist",
                                    "--lr 1", "--path rf --times uniform"])
def test_resuming_as_another_run_is_refused_and_nothing_is_lost(run, option):
    before = (run[0] / "last.pt").read_bytes()
    train(run[0], "--resume", *option.split(), model="racedit", steps=9, code=2)
    assert (run[0] / "last.pt").read_bytes() == before


# ------------------------------------------------------------------------ sizes of the papers


def write_latents(folder, n, variants=2):
    """Native latents 4 x 32 x 32, mean and std: a sparse file of zeros, made at once."""
    folder.mkdir()
    shape = (n, variants, 8, 32, 32)
    np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape).flush()
    np.save(folder / "labels.npy", np.arange(n) % 1000)
    about = dict(kind="mean-std", scale=0.18215, classes=1000)
    (folder / "meta.json").write_text(json.dumps(about))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_a_size_of_the_papers_takes_a_training_step_on_a_cpu(tmp_path, monkeypatch, model):
    written = []
    monkeypatch.setattr(program.ckpt, "write_checkpoint", lambda *a: written.append(a))     # 2 GB
    run_cli(program, "--model", model, "--size", "S/2", "--data",
            write_latents(tmp_path / "latents", 100), "--batch", 1, "--steps", 1, "--device", "cpu",
            "--out", tmp_path / "out")
    line, = metrics(tmp_path / "out")
    assert 0.5 < line["loss"] < 4 and line["grad_norm"] > 0 and len(written) == 1
    assert written[0][1]["config"]["dim"] == 384 and written[0][1]["config"]["size"] == 32


PEAK = """
import sys
import train
train.main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak) * 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_an_epoch_of_100_000_latents_does_not_load_them_into_memory(tmp_path):
    """Measured in a process of its own. (ru_maxrss begins with the peak of the parent.)"""
    argv = smallest_run(tmp_path / "out", "--data", write_latents(tmp_path / "latents", 100_000),
                        "--batch", 250, "--steps", 380, "--set", "patch=8")
    p = subprocess.run([sys.executable, "-c", PEAK, *argv], cwd=ROOT, text=True,
                       capture_output=True, timeout=300)
    assert p.returncode == 0, p.stderr
    peak = int(p.stdout.split()[-1])
    print(f"{peak / 1e9:.2f} GB resident")
    assert peak < 1.5e9                                                 # the file has 3.3 GB
