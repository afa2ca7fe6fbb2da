"""What several test modules need: small models, batches, a program run as on the command line."""

import contextlib
import importlib
import io
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import FORMAT, write_checkpoint
from common.cli import run_program
from data import digits
from diffusion import DIFFUSIONS

ROOT = Path(__file__).resolve().parent.parent


def wake(model, std=0.1, seed=0):
    """Fill every all-zero weight and bias with N(0, std); returns the model. adaLN-Zero makes a new
    network predict 0, so that a comparison of two new networks would pass for nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def small(name, **changes):
    """-> the module of a model, and a Config with 16 tokens, width 64 and two blocks."""
    module = importlib.import_module(name)
    fields = dict(size=8, patch=2, channels=4, dim=64, depth=2, heads=4) | changes
    return module, replace(module.TINY, **fields)


def batch(cfg, n=4, device="cpu"):
    """-> images (n, C, S, S) and labels (n,)."""
    shape = (n, cfg.channels, cfg.size, cfg.size)
    return torch.randn(shape, device=device), torch.arange(n, device=device) % cfg.classes


def run_cli(main, *argv, code=0, name="test"):
    """main(argv) as on the command line, in this process -> stdout, stderr. code: the exit code
    that is expected, or a tuple of them; 2 must come with one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = run_program(name, getattr(main, "main", main), [str(a) for a in argv])
    for number, handler in handlers.items():                # training has its own
        signal.signal(number, handler)
    expected = code if isinstance(code, tuple) else (code,)
    assert got in expected, f"exit {got}\n{out.getvalue()}\n{err.getvalue()}"
    assert got != 2 or err.getvalue().count("\n") == 1, err.getvalue()
    return out.getvalue(), err.getvalue()


def smallest_run(out, *options, model="dit"):
    """-> the options of train.py for the smallest model; later ones count."""
    experts = ["experts=4"] if model in ("ditmoe", "racedit") else []
    return [*("--tiny --batch 4 --lr 1e-2 --warmup 0 --log-every 1 --sample-every 0 --device cpu "
              "--amp off --set dim=16 depth=1 heads=2 patch=7").split(), *experts,
            "--model", model, "--out", str(out), *map(str, options)]


def few_digits(split):
    """Stands in for data.digits.draw_digits (see conftest.py): 80 digits in no time."""
    g = torch.Generator().manual_seed(0)
    images = torch.cat([digits.render(ways[0], 8, g) for ways in digits.SKELETONS.values()])
    return images[:, None], torch.arange(10).repeat_interleave(8)


def write_model(file, name, kind="rf", source="digits", seed=0, **fields):
    """Write a checkpoint of a woken, untrained model -> the model in eval mode, its diffusion."""
    module, cfg = small(name, learn_sigma=kind == "ddpm", **fields)
    model, diffusion = wake(module.Model(cfg), seed=seed).eval(), DIFFUSIONS[kind]()
    write_checkpoint(file, dict(
        format=FORMAT, name=name, config=asdict(cfg), step=1, model=model.state_dict(),
        ema=model.state_dict(), path=dict(kind=kind, options=diffusion.options),
        data=dict(source=source)))
    return model, diffusion


def metrics(out, drop=("images_per_s",)):
    """-> the lines of metrics.jsonl, without how fast it was."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def break_losses(name, steps, how, set_attribute=setattr):
    """From now on the losses of these steps of a model are broken. how: "nan", and with it all
    gradients; "inf", whose gradient is finite; "gradient", which alone is infinite."""
    module = importlib.import_module(name)
    owner, hook = (module, "loss") if hasattr(module, "loss") else (
        importlib.import_module("train"), "default_loss")
    whole = getattr(owner, hook)

    def loss(diffusion, model, x0, y, step, rng):
        value, aux = whole(diffusion, model, x0, y, step, rng)
        if step in steps and value.requires_grad:           # not the average's own buffers
            if how == "gradient":
                value.register_hook(lambda g: g * torch.inf)
            else:
                value = value * torch.nan if how == "nan" else value + torch.inf
        return value, aux
    set_attribute(owner, hook, loss)


def assert_same(a, b, where=""):
    """Equal in type, dtype and every bit."""
    kinds = [list if isinstance(v, tuple) else type(v) for v in (a, b)]     # torch makes lists of
    assert kinds[0] is kinds[1], where                                      # AdamW's betas
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b))), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        [assert_same(a[k], b[k], f"{where}/{k}") for k in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        [assert_same(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b))]
    else:
        assert a == b or a != a and b != b, where


def golden(name):
    """What the authors' own code computed with random weights, from the folder GOLDEN_DIR (default
    tests/golden) -> meta (every dimension), the official state dict, all other arrays."""
    file = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden")) / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"no {file}")
    with np.load(file) as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}
        meta = json.loads(str(z["meta"]))
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    return meta, state, {k: v for k, v in arrays.items() if not k.startswith("state/")}


class Evil:
    """A pickle that runs code: the fixture no_pickle_has_run_code sees it."""

    def __reduce__(self):
        return os.system, (f"touch {os.environ['MARK']}",)


def harmed(raw, rng):
    """Some bytes changed, cut off, put in or left out, half of them near the beginning."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(max(1, len(raw) if rng.random() < 0.5 else min(len(raw), 300)))
        n, how = rng.choice([1, 4, 100]), rng.randrange(6)
        raw[at : at + (0, n, n, 1, 4, len(raw))[how]] = (
            rng.randbytes(n), b"", rng.randbytes(n), rng.randbytes(1), b"\xff" * 4, b"")[how]
    return bytes(raw)
