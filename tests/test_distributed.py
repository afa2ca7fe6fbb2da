"""Two processes do what one does. Starting processes costs seconds, so ONE torchrun launch runs all
jobs of this file, one after the other: this file itself is the program that it starts."""

import contextlib
import functools
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

if __name__ == "__main__":                              # started by torchrun: conftest is not there
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from conftest import ROOT, wake

import data
import racedit
import sample
import train as train_module
from diffusion import RectifiedFlow

load_once = functools.cache(data.load)                  # rendering 20,000 digits takes a second

MODELS = {                  # settings that make the model's own losses do something in five steps
    "dit": [], "dtr": [], "ditmoe": ["alpha=0.1", "experts=4"],
    "racedit": ["pool=global", "sim=0.1", "experts=4"],
    "dydit": ["hold=0", "ramp=2", "complete=2", "head_bias=1", "channel_bias=1", "token_bias=1"]}
WATCHED = ("dit-ddp", "dit-fsdp", "accum-ddp", "accum-fsdp")       # what they send is counted
COMMON = ("--tiny --steps 5 --batch 8 --lr 1e-3 --warmup 0 --cooldown 0 --log-every 1 "
          "--sample-every 0 --device cpu --amp off --clip 0.3").split()     # nearly all norms are above


ANT = ["--path", "ddpm", "--weighting", "ant-uw", "--clusters", "3", "--accum", "2"]    # 8 / 3


def command(out, model, *options):
    return ["--model", model, *COMMON, "--out", str(out), *map(str, options),
            "--set", "dim=32", "depth=2", "heads=2", *MODELS[model]]


def jobs(top):
    """name -> the command line of every process, all for two processes, in this order."""
    both = {f"{model}-{engine}": command(top / f"{model}-{engine}", model, *flag)
            for model in MODELS for engine, flag in (("ddp", []), ("fsdp", ["--fsdp"]))}
    both |= {f"{model}-accum": command(top / f"{model}-accum", model, "--accum", 2)
             for model in ("ditmoe", "racedit", "dydit")}
    both |= {f"accum-{engine}": command(top / f"accum-{engine}", "dit", "--accum", 2, *flag)
             for engine, flag in (("ddp", []), ("fsdp", ["--fsdp", "--checkpointing"]))}
    both |= {"two-then-one": command(top / "two-then-one", "racedit", "--fsdp", "--steps", 3),
             "ant-uw": command(top / "ant-uw", "dtr", *ANT, "--steps", 3),
             "one-then-two": command(top / "one-then-two", "dydit", "--fsdp", "--resume",
                                     "--sample-every", 5),
             "sharded": command(top / "sharded", "ditmoe", "--fsdp", "--sharded-save", "--steps", 3,
                                "--save-every", 2),
             "again": command(top / "accum-ddp", "dit", "--steps", 1),
             "cannot-save": command(top / "cannot-save", "dit", "--steps", 1)}
    alone = command(top / "refused", "dit"), command(top / "refused", "dit", "--data", "nowhere")
    draw = ["sample", top / "dit-ddp/last.pt", "--device", "cpu", "--n", 7, "--batch", 2, "--steps", 2]
    both |= {"grid": [*draw, "--out", top / "grid.png"],
             "npz": [*draw, "--out", top / "grid.png", "--npz", top / "s.npz"]}
    lost = command(top / "lost", "dtr", "--steps", 100_000, "--save-every", 2, "--log-every", 5)
    return {name: (argv, argv) for name, argv in both.items()} | {"refused": alone, "lost": (lost, lost)}


def race(top=None):
    """A Race-DiT's choices on a batch of 8, or this process's half of it."""
    cfg = racedit.Config(size=8, patch=2, dim=32, depth=2, heads=2, experts=4, k=1, pool="global")
    model = wake(racedit.Model(cfg))
    g = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(8, 4, 8, 8, generator=g), torch.rand(8, generator=g), torch.arange(8)
    if top:
        rank = int(os.environ["RANK"])
        x, t, y = (v.chunk(2)[rank] for v in (x, t, y))
    out, aux = model(x, t, y)
    out.square().sum().backward()
    seen = dict(map=aux["map"], load=aux["load"], last=aux["last_stat"], out=out.detach(),
                grad=model.blocks[0].moe.experts.w1.grad)
    if top:
        torch.save(seen, top / f"race-{rank}.pt")
    return seen


def precision(top):
    """Under FSDP and bf16: in which type do weights arrive where they are used, and time? And what
    is moved to the device, whole weights or slices?"""
    found, to = {}, torch.nn.Module.to

    def watched(m, *where):                 # a model that does not fit on a GPU is cut before
        seen["moved"] |= {type(p).__name__ for p in m.parameters()}
        return to(m, *where)
    torch.nn.Module.to = watched
    for name in MODELS:
        args = train_module.parse_args(command(top / "none", name, "--fsdp", "--amp", "bf16"))
        module, path = importlib.import_module(name), RectifiedFlow()
        cfg = train_module.make_config(args, module, path, None, None)
        seen = found[name] = {"router": set(), "attention": set(), "t": set(), "moved": set()}
        model, _ = train_module.make_models(args, module, cfg, None, torch.device("cpu"))
        seen["kept"] = {str(p.dtype) for p in model.parameters()}

        def look(m, inputs):
            kind = ("router" if type(m).__name__.endswith("Router") else
                    "attention" if hasattr(m, "qkv") else None)
            if kind:
                seen[kind] |= {str(p.dtype) for p in m.parameters()}
            if type(m).__name__ == "TimestepEmbedder":
                seen["t"].add(str(inputs[0].dtype))
        for m in model.modules():
            m.register_forward_pre_hook(look)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, cfg.channels, cfg.size, cfg.size), torch.rand(2), torch.arange(2))
    torch.nn.Module.to = to
    (top / "precision").write_text(json.dumps(found, default=list))


def work(top):
    """What each of the two processes does."""
    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    (top / f"pid-{rank}").write_text(str(os.getpid()))
    torch.distributed.init_process_group("gloo")
    train_module.load_data = load_once
    race(top)
    precision(top)
    draws, walk = [], sample.walk
    sample.walk = lambda *a, **k: draws.append(a) or walk(*a, **k)
    for name, argv in jobs(top).items():
        program = sample.cli if argv[rank][0] == "sample" else train_module.cli
        with torch.profiler.profile() if name in WATCHED else contextlib.nullcontext() as seen:
            code = program([str(a) for a in argv[rank] if a != "sample"])
        (top / f"{name}-{rank}.code").write_text(str(code))
        (top / f"{name}-{rank}.draws").write_text(str(len(draws)))
        draws.clear()
        if seen:
            sent = {e.key: e.count for e in seen.key_averages() if e.key.startswith("gloo:")}
            (top / f"{name}-{rank}.sent").write_text(json.dumps(sent))


def one(out, model, *options):
    assert train_module.cli(command(out, model, *options)) == 0


def lines(out, file="metrics.jsonl"):
    every = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return {n["step"]: {k: v for k, v in n.items() if k.endswith("loss")} for n in every}


def agree(a, b, limit=1e-5):
    assert list(a) == list(b)
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=limit), step


@pytest.fixture(autouse=True, scope="module")
def digits_once():
    train_module.load_data = load_once
    yield
    train_module.load_data = data.load


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """The launch. At its end, process 1 is killed in the middle of a run."""
    top = tmp_path_factory.mktemp("two")
    one(top / "one-then-two", "dydit", "--steps", 3)
    (top / "cannot-save/last.pt.tmp").mkdir(parents=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    p = subprocess.Popen([*launch, __file__, str(top)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
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
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_print_the_losses_of_one(top, tmp_path, model):
    one(tmp_path, model)
    for engine in ("ddp", "fsdp"):
        agree(lines(top / f"{model}-{engine}"), lines(tmp_path))
    assert len(set(n["loss"] for n in lines(tmp_path).values())) == 5


def test_accumulated_gradients_of_two_processes_are_those_of_one(top, tmp_path):
    one(tmp_path, "dit")
    agree(lines(top / "accum-fsdp"), lines(tmp_path))
    agree(lines(top / "accum-ddp", "previous_metrics.jsonl"), lines(tmp_path))
    for model in ("ditmoe", "racedit", "dydit"):    # their losses look at all pictures of a forward
        one(tmp_path / model, model, "--accum", 2)
        agree(lines(top / f"{model}-accum"), lines(tmp_path / model))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_accumulation_sends_gradients_once_a_step(top, engine):
    one, two = (json.loads((top / f"{name}-{engine}-0.sent").read_text())
                for name in ("dit", "accum"))
    assert two["gloo:all_reduce"] == one["gloo:all_reduce"] >= 5        # reduce_scatter is one, too


@pytest.mark.parametrize("model", MODELS)
def test_sharded_weights_travel_in_bf16_but_a_router_s_and_the_time_do_not(top, model):
    seen = json.loads((top / "precision").read_text())[model]
    assert seen["attention"] == ["torch.bfloat16"] and seen["t"] == seen["kept"] == ["torch.float32"]
    assert seen["router"] == ["torch.float32"] * (model not in ("dit", "dtr"))
    assert seen["moved"] == ["DTensor"]


def test_torchrun_takes_the_lines_of_the_readme(monkeypatch):
    """It reads abbreviations of its own options even behind the program's name: --n was one."""
    monkeypatch.setenv("RANK", "0")
    programs = {"train.py": train_module, "sample.py": sample}
    lines = [line for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith("torchrun ")]
    for line in lines:
        args = torchrun.get_args_parser().parse_args(line.split()[1:])
        programs[args.training_script].parse_args(args.training_script_args)
    assert len(lines) >= 2


def test_a_run_goes_on_with_another_number_of_processes(top, tmp_path):
    one(top / "two-then-one", "racedit", "--resume")
    for name, model in (("two-then-one", "racedit"), ("one-then-two", "dydit")):
        one(tmp_path / name, model)
        agree(lines(top / name), lines(tmp_path / name))


def test_ant_uw_learns_the_same_weights_on_two_processes_and_after_a_restart(top, tmp_path):
    one(top / "ant-uw", "dtr", *ANT, "--resume")
    one(tmp_path, "dtr", *ANT[:-2])                     # in one piece, on one process, at once
    agree(lines(top / "ant-uw"), lines(tmp_path))
    two, alone = (torch.load(folder / "last.pt", weights_only=True)["path"]["weights"]["log_var"]
                  for folder in (top / "ant-uw", tmp_path))
    assert torch.allclose(two, alone, atol=1e-5) and alone.abs().min() > 0.05


def test_a_sharded_dydit_draws_without_slicing(top):
    """Of a shard no rows can be cut."""
    for rank in "01":
        assert (top / f"one-then-two-{rank}.code").read_text() == "0"
    assert (top / "one-then-two/samples/step_0000005.png").exists()


def test_shards_of_two_processes_become_one_file_and_go_on(top, tmp_path, monkeypatch):
    out, last = top / "sharded", top / "sharded/last.pt"
    assert len(list(out.glob("shards-*"))) == 1         # of two saves
    assert "model" not in torch.load(last, weights_only=True)
    before = train_module.read_checkpoint(last)         # what sample.py and --init read
    table = next(out.glob("shards-*/.metadata"))
    whole = table.read_bytes()
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    table.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(train_module.Refusal, match="last.pt is not"):
        train_module.read_checkpoint(last)
    assert train_module.cli(command(out, "ditmoe", "--resume")) == 2
    table.write_bytes(whole)
    part = next(out.glob("shards-*/*.distcp"))
    part.rename(tmp_path / "part")                      # a part is missing
    assert train_module.cli(command(out, "ditmoe", "--resume")) == 2
    (tmp_path / "part").rename(part)
    assert not (tmp_path / "mark").exists()
    one(out, "ditmoe", "--steps", 3, "--resume")        # nothing to train: makes one file
    after = torch.load(last, weights_only=True)
    assert not list(out.glob("shards-*")) and after["step"] == before["step"] == 3
    for key in ("model", "ema"):
        assert all(torch.equal(after[key][k], before[key][k]) for k in after[key])
    one(out, "ditmoe", "--resume", "--sharded-save")    # one process may write shards, too
    one(tmp_path / "one", "ditmoe")
    agree(lines(out), lines(tmp_path / "one"))
    model, alone = (sample.load(folder / "last.pt")[0] for folder in (out, tmp_path / "one"))
    for a, b in zip(model.parameters(), alone.parameters()):
        assert torch.allclose(a, b, atol=1e-4)


class Evil:
    def __reduce__(self):
        return os.system, ("touch $MARK",)


def test_a_race_over_two_processes_chooses_what_one_chooses(top):
    whole, parts = race(), [torch.load(top / f"race-{rank}.pt") for rank in range(2)]
    assert torch.equal(torch.cat([p["map"] for p in parts], dim=1), whole["map"])
    assert torch.equal(sum(p["load"] for p in parts), whole["load"])
    assert len(whole["map"].unique()) > 2               # tokens differ: there is a race at all
    for p in parts:
        assert torch.allclose(p["last"], whole["last"], rtol=1e-5)
    assert torch.allclose(torch.cat([p["out"] for p in parts]), whole["out"], atol=1e-5)
    assert torch.allclose(sum(p["grad"] for p in parts), whole["grad"], rtol=1e-4, atol=1e-4)


def test_two_processes_draw_the_pictures_of_one_to_the_bit(top, tmp_path):
    options = ["--device", "cpu", "--n", 7, "--batch", 2, "--steps", 2, "--npz", tmp_path / "s.npz"]
    out = ["--out", tmp_path / "grid.png"]
    assert sample.cli([str(a) for a in [top / "dit-ddp/last.pt", *options, *out]]) == 0
    with np.load(top / "s.npz") as two, np.load(tmp_path / "s.npz") as alone:
        assert all(np.array_equal(two[k], alone[k]) for k in ("arr_0", "arr_1"))
        assert len(np.unique(alone["arr_0"], axis=0)) == 7
    assert (top / "grid.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    for name in ("grid", "npz"):                        # four batches: two each
        assert [(top / f"{name}-{rank}.draws").read_text() for rank in range(2)] == ["2", "2"]


@pytest.mark.parametrize("name, word", [("refused", "nowhere"), ("cannot-save", "last.pt")])
def test_what_one_process_refuses_ends_all_of_them(top, name, word):
    assert [(top / f"{name}-{rank}.code").read_text() for rank in range(2)] == ["2", "2"]
    said = [line for line in (top / "text").read_text().splitlines() if line.startswith("train.py:")]
    assert sum(word in line for line in said) == 1


def test_a_new_run_moves_the_old_one_aside_once(top):
    assert [(top / f"again-{rank}.code").read_text() for rank in range(2)] == ["0", "0"]
    assert train_module.read_checkpoint(top / "accum-ddp/previous_last.pt")["step"] == 5
    assert train_module.read_checkpoint(top / "accum-ddp/last.pt")["step"] == 1


def test_a_lost_process_leaves_a_checkpoint_to_go_on_from(top, tmp_path):
    assert not (top / "lost-0.code").exists()           # it did not end by itself
    done = train_module.read_checkpoint(top / "lost/last.pt")["step"]
    assert done >= 4
    one(top / "lost", "dtr", "--steps", done + 2, "--resume", "--log-every", 5)
    one(tmp_path, "dtr", "--steps", done + 2, "--log-every", 5)
    agree(lines(top / "lost"), lines(tmp_path))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
