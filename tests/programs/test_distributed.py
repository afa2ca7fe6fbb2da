"""Two processes do what one does. Starting processes takes seconds, so ONE launch of torchrun runs
all jobs of this file, one after the other: this file itself is the program that it starts."""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

if __name__ == "__main__":                              # started by torchrun: conftest is not there
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from helpers import (ROOT, assert_same, break_losses, few_digits, metrics, run_cli, smallest_run,
                     wake)

import racedit
import sample
import train
from common.checkpoint import MODELS, load_model, read_checkpoint
from common.cli import run_program
from common.config import make_config
from diffusion import RectifiedFlow
from experiments import sample_npz

SETTINGS = {                # with these a model's own losses do something in five steps
    "dit": [], "dtr": [], "ditmoe": ["alpha=0.1"], "racedit": ["pool=global", "sim=0.1"],
    "dydit": ["anneal_start=0", "anneal_steps=2", "full_model_steps=2", "head_bias=1",
              "channel_bias=1", "token_bias=1"]}
COUNTED = ("dit-ddp", "dit-fsdp", "accum-ddp", "accum-fsdp")        # what they send is counted
ANT = ["--path", "ddpm", "--weighting", "ant-uw", "--clusters", 3]


def command(out, model, *options):
    return smallest_run(out, "--steps", 5, "--batch", 8, "--lr", 1e-3, "--cooldown", 0,
                        "--clip", 0.3, "--set", "dim=32", "depth=2", "patch=4", *SETTINGS[model],
                        *options, model=model)


def jobs(top):
    """name -> the command lines of both processes, in this order."""
    both = {f"{model}-{engine}": command(top / f"{model}-{engine}", model, *flag)
            for model in MODELS for engine, flag in (("ddp", []), ("fsdp", ["--fsdp"]))}
    both |= {f"{model}-accum": command(top / f"{model}-accum", model, "--accum", 2)
             for model in ("ditmoe", "racedit", "dydit")}
    both |= {f"accum-{engine}": command(top / f"accum-{engine}", "dit", "--accum", 2, *flag)
             for engine, flag in (("ddp", []), ("fsdp", ["--fsdp", "--checkpointing"]))}
    both |= {"two-then-one": command(top / "two-then-one", "racedit", "--fsdp", "--steps", 3),
             "ant-uw": command(top / "ant-uw", "dtr", *ANT, "--accum", 2, "--steps", 3),
             "one-then-two": command(top / "one-then-two", "dydit", "--fsdp", "--resume",
                                     "--sample-every", 1),
             "sharded": command(top / "sharded", "ditmoe", "--fsdp", "--sharded-save", "--steps", 3,
                                "--save-every", 2),
             "again": command(top / "accum-ddp", "dit", "--steps", 1),
             "cannot-save": command(top / "cannot-save", "dit", "--steps", 1)}
    both |= {f"skip-{model}": command(top / f"skip-{model}", model, "--steps", 3)
             for model in MODELS}
    both |= {"inf": command(top / "inf", "dit", "--steps", 3),
             "diverged": command(top / "diverged", "dit", "--steps", 9),
             "npz": [top / "dit-ddp/last.pt", "--device", "cpu", "--n", 7, "--batch", 2,
                     "--steps", 2, "--npz", top / "s.npz"]}
    alone = command(top / "refused", "dit"), command(top / "refused", "dit", "--data", "nowhere")
    lost = command(top / "lost", "dtr", "--steps", 100_000, "--save-every", 2)
    return {name: (argv, argv) for name, argv in both.items()} | {
        "refused": alone, "lost": (lost, lost)}


@contextlib.contextmanager
def trouble(name, rank):
    """What goes wrong in a job: broken losses on one process, or a disk without room."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as m:
        if name.startswith("skip-") and rank == 1:
            break_losses(name[5:], [1], "gradient", m.setattr)
        if name == "inf" and rank == 1:
            break_losses("dit", [1], "inf", m.setattr)
        if name == "diverged" and rank == 0:
            break_losses("dit", range(9), "inf", m.setattr)
        if name == "cannot-save" and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, was[1]))
        m.setattr(train, "MAX_SKIPPED", 2)
        yield
    resource.setrlimit(resource.RLIMIT_FSIZE, was)


def race(rank=None):
    """A Race-DiT's choices on a batch of 8, or those of a process on its half of it."""
    cfg = racedit.Config(size=8, patch=2, dim=32, depth=2, heads=2, experts=4, k=1, pool="global")
    model = wake(racedit.Model(cfg))
    g = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(8, 4, 8, 8, generator=g), torch.rand(8, generator=g), torch.arange(8)
    if rank is not None:
        x, t, y = (v.chunk(2)[rank] for v in (x, t, y))
    out, aux = model(x, t, y)
    out.square().sum().backward()
    grad = model.blocks[0].moe.experts.w1.grad
    kth = next(v for k, v in aux.items() if k.endswith("_stat"))
    return dict(map=aux["map"], load=aux["load"], kth=kth, out=out.detach(), grad=grad)


def precision(out):
    """Under FSDP and bf16: in which type do weights arrive where they are used, and time? And what
    is moved to the device, whole weights or slices?"""
    found, to_empty = {}, torch.nn.Module.to_empty

    def watched(m, **where):                # a model that does not fit on a GPU is cut before
        seen["moved"] |= {type(p).__name__ for p in m.parameters()}
        return to_empty(m, **where)
    torch.nn.Module.to_empty = watched
    for name in MODELS:
        args = train.parse_args(command(out, name, "--fsdp", "--amp", "bf16"))
        module = importlib.import_module(name)
        cfg = make_config(args, module, RectifiedFlow(), None, None)
        seen = found[name] = {"router": set(), "attention": set(), "t": set(), "moved": set()}
        model, _ = train.make_models(args, module, cfg, None, int(os.environ["RANK"]), 2,
                                     torch.device("cpu"))
        seen["kept"] = {str(p.dtype) for p in model.parameters()}

        def look(m, inputs):
            kind = type(m).__name__
            if kind.endswith("Router"):
                seen["router"] |= {str(p.dtype) for p in m.parameters()}
            if kind.endswith("Block"):                      # FSDP calls it FSDPBlock
                seen["attention"] |= {str(p.dtype) for p in m.attn.parameters()}
            if kind == "TimestepEmbedder":
                seen["t"].add(str(inputs[0].dtype))
        for m in model.modules():
            m.register_forward_pre_hook(look)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, cfg.channels, cfg.size, cfg.size), torch.rand(2), torch.arange(2))
    torch.nn.Module.to_empty = to_empty
    return {name: {k: list(v) for k, v in seen.items()} for name, seen in found.items()}


def work(top):
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    (top / f"pid-{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    torch.distributed.destroy_process_group = lambda: None      # one group for all jobs
    importlib.import_module("data").digits.draw_digits = few_digits
    torch.save(race(rank), top / f"race-{rank}.pt")
    (top / "precision").write_text(json.dumps(precision(top / "none")))
    sampled, sample_batch = [], sample_npz.sample_batch
    sample_npz.sample_batch = lambda *a: sampled.append(a) or sample_batch(*a)
    for name, argv in jobs(top).items():
        main = sample_npz.main if name == "npz" else train.main
        with trouble(name, rank), (
                torch.profiler.profile() if name in COUNTED else contextlib.nullcontext()) as seen:
            code = run_program("train.py", main, [str(a) for a in argv[rank]])
        (top / f"{name}-{rank}.code").write_text(str(code))
        if seen:
            events = seen.profiler.kineto_results.events()          # key_averages() takes seconds
            sent = sum(e.name() == "gloo:all_reduce" for e in events)
            (top / f"{name}-{rank}.sent").write_text(str(sent))
        (top / f"sampled-{rank}").write_text(str(len(sampled)))


# ------------------------------------------------------------------------ the launch and its tests

pytestmark = pytest.mark.usefixtures("few_digits")


def one(out, model, *options):
    run_cli(train, *command(out, model, *options))


@pytest.fixture(scope="module")
def top(tmp_path_factory, few_digits):
    """The launch -> its folder. At its end, process 1 is killed in the middle of a run."""
    top = tmp_path_factory.mktemp("two")
    one(top / "one-then-two", "dydit", "--steps", 3)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    p = subprocess.Popen([sys.executable, *launch, __file__, str(top)], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    hung = threading.Timer(400, end, (p, top))
    hung.start()
    try:
        text = []
        for line in p.stdout:
            text.append(line)
            if line.startswith("step 5/100000"):
                os.kill(int((top / "pid-1").read_text()), signal.SIGKILL)
        p.wait(60)
    finally:
        hung.cancel()
        end(p, top)
    (top / "text").write_text("".join(text))
    return top


def end(p, top):
    """torchrun gives every process a session of its own: to kill its group is not enough."""
    p.kill()
    for file in top.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def codes(top, name):
    return [(top / f"{name}-{rank}.code").read_text() for rank in range(2)]


def losses(out, file="metrics.jsonl"):
    every = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return {n["step"]: {k: v for k, v in n.items() if k.endswith("loss")} for n in every}


def assert_close(a, b, limit=1e-5):
    assert list(a) == list(b)
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=limit), step


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_print_the_losses_of_one(top, tmp_path, model):
    one(tmp_path, model)
    for engine in ("ddp", "fsdp"):
        assert_close(losses(top / f"{model}-{engine}"), losses(tmp_path))
    assert len(set(n["loss"] for n in losses(tmp_path).values())) == 5


def test_accumulated_gradients_of_two_processes_are_those_of_one(top, tmp_path):
    one(tmp_path, "dit")
    assert_close(losses(top / "accum-fsdp"), losses(tmp_path))
    assert_close(losses(top / "accum-ddp", "previous_metrics.jsonl"), losses(tmp_path))
    for model in ("ditmoe", "racedit", "dydit"):    # their losses look at all images of a forward
        one(tmp_path / model, model, "--accum", 2)
        assert_close(losses(top / f"{model}-accum"), losses(tmp_path / model))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_accumulation_sends_gradients_once_a_step(top, engine):
    whole, parts = (int((top / f"{name}-{engine}-0.sent").read_text())
                    for name in ("dit", "accum"))
    assert parts == whole >= 5                          # a reduce_scatter is an all_reduce here


@pytest.mark.parametrize("model", MODELS)
def test_sharded_weights_travel_in_bf16_but_those_of_routers_and_the_time_do_not(top, model):
    seen = json.loads((top / "precision").read_text())[model]
    assert seen["attention"] == ["torch.bfloat16"]
    assert seen["t"] == seen["kept"] == ["torch.float32"] and seen["moved"] == ["DTensor"]
    assert seen["router"] == ["torch.float32"] * (model not in ("dit", "dtr"))


def test_torchrun_takes_the_lines_of_the_readme():
    """It reads abbreviations of its own options even behind the program's name: --n was one."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines()
             if line.strip().startswith("torchrun ")]
    for line in lines:
        args = torchrun.get_args_parser().parse_args(line.split()[1:])
        module = importlib.import_module(args.training_script.removesuffix(".py"))
        with pytest.MonkeyPatch.context() as m:
            m.setenv("RANK", "0")
            module.parse_args(args.training_script_args)
    assert lines


def test_a_run_continues_with_another_number_of_processes(top, tmp_path):
    one(top / "two-then-one", "racedit", "--resume")
    for name, model in (("two-then-one", "racedit"), ("one-then-two", "dydit")):
        one(tmp_path / name, model)
        assert_close(losses(top / name), losses(tmp_path / name))


def test_ant_uw_learns_the_same_weights_on_two_processes_and_after_a_restart(top, tmp_path):
    one(top / "ant-uw", "dtr", *ANT, "--accum", 2, "--resume")
    one(tmp_path, "dtr", *ANT)                          # in one piece, on one process, at once
    assert_close(losses(top / "ant-uw"), losses(tmp_path))
    two, alone = (torch.load(folder / "last.pt", weights_only=True)["path"]["weights"]["log_var"]
                  for folder in (top / "ant-uw", tmp_path))
    assert torch.allclose(two, alone, atol=1e-5) and alone.abs().min() > 0.05


def test_a_sharded_dydit_samples_although_no_rows_can_be_cut_of_a_shard(top):
    assert codes(top, "one-then-two") == ["0", "0"]
    for step in (4, 5):                                 # samples do not disturb the next update
        assert (top / f"one-then-two/samples/step_000000{step}.png").exists()


def test_shards_of_two_processes_become_one_file_and_the_run_continues(top, tmp_path):
    out, last = top / "sharded", top / "sharded/last.pt"
    assert len(list(out.glob("shards-*"))) == 1         # of two saves
    assert "model" not in torch.load(last, weights_only=True)
    before = read_checkpoint(last)                      # what sample.py and --init read
    one(out, "ditmoe", "--steps", 3, "--resume")        # nothing to train: makes one file
    after = torch.load(last, weights_only=True)
    assert not list(out.glob("shards-*")) and after["step"] == before["step"] == 3
    for key in ("model", "ema"):
        assert_same(dict(after[key]), dict(before[key]))
    one(out, "ditmoe", "--resume", "--sharded-save")    # one process may write shards, too
    one(tmp_path / "one", "ditmoe")
    assert_close(losses(out), losses(tmp_path / "one"))
    model, alone = (load_model(folder / "last.pt")[0] for folder in (out, tmp_path / "one"))
    for a, b in zip(model.parameters(), alone.parameters()):
        assert (a - b).norm() <= 0.01 * b.norm()        # Muon's bf16 steps enlarge rounding


def test_a_race_over_two_processes_chooses_what_one_process_chooses(top):
    whole, parts = race(), [torch.load(top / f"race-{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat([p["map"] for p in parts], dim=1), whole["map"])
    assert torch.equal(sum(p["load"] for p in parts), whole["load"])
    assert len(whole["map"].unique()) > 2               # tokens differ: there is a race at all
    for p in parts:
        assert torch.allclose(p["kth"], whole["kth"], rtol=1e-5)
    assert torch.allclose(torch.cat([p["out"] for p in parts]), whole["out"], atol=1e-5)
    assert torch.allclose(sum(p["grad"] for p in parts), whole["grad"], rtol=1e-4, atol=1e-4)


def test_two_processes_sample_the_images_of_one_to_the_bit(top, tmp_path):
    options = ["--device", "cpu", "--n", 7, "--batch", 2, "--steps", 2, "--npz", tmp_path / "s.npz"]
    run_cli(sample, top / "dit-ddp/last.pt", *options, "--out", tmp_path / "grid.png")
    with np.load(top / "s.npz") as two, np.load(tmp_path / "s.npz") as alone:
        assert all(np.array_equal(two[k], alone[k]) for k in ("arr_0", "arr_1"))
        assert len(np.unique(alone["arr_0"], axis=0)) == 7
    batches = [(top / f"sampled-{rank}").read_text() for rank in range(2)]
    assert batches == ["2", "2"]                        # of four


@pytest.mark.parametrize("name, word", [("refused", "nowhere"), ("cannot-save", "untouched"),
                                        ("diverged", "2 steps in a row")])
def test_an_error_of_one_process_ends_all_of_them_in_one_line(top, name, word):
    assert codes(top, name) == ["2", "2"]
    said = (top / "text").read_text().splitlines()
    assert sum(line.startswith("train.py: ") and word in line for line in said) == 1


@pytest.mark.parametrize("model", MODELS)
def test_an_infinite_gradient_on_one_process_makes_all_skip_the_step(top, model):
    assert codes(top, f"skip-{model}") == ["0", "0"]
    assert [line.get("skipped") for line in metrics(top / f"skip-{model}")] == [None, 1, None]
    kept = read_checkpoint(top / f"skip-{model}/last.pt")
    assert all(v.isfinite().all() for v in kept["model"].values())


def test_an_infinite_loss_with_a_finite_gradient_on_one_process_makes_all_skip(
        top, tmp_path, monkeypatch):
    break_losses("dit", [1], "inf", monkeypatch.setattr)
    one(tmp_path, "dit", "--steps", 3)
    assert [line.get("skipped") for line in metrics(top / "inf")] == [None, 1, None]
    assert_close(losses(top / "inf"), losses(tmp_path))


def test_a_new_run_moves_the_old_one_aside_once(top):
    assert codes(top, "again") == ["0", "0"]
    assert read_checkpoint(top / "accum-ddp/previous_last.pt")["step"] == 5
    assert read_checkpoint(top / "accum-ddp/last.pt")["step"] == 1


def test_a_lost_process_leaves_a_checkpoint_to_resume_from(top, tmp_path):
    assert not (top / "lost-0.code").exists()           # it did not end by itself
    done = read_checkpoint(top / "lost/last.pt")["step"]
    assert done >= 4
    one(top / "lost", "dtr", "--steps", done + 2, "--resume")
    one(tmp_path, "dtr", "--steps", done + 2)
    assert_close(losses(top / "lost"), losses(tmp_path))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
