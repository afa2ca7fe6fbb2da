"""Does DyDiT turn FLOPs into seconds? The static, the masked and the sliced path side by side.

    python -m experiments.bench_dydit                                                one forward
    python -m experiments.bench_dydit --dense runs/dit/last.pt --ours runs/dydit/last.pt   sampling
    python -m experiments.bench_dydit --dense runs/dit/last.pt --curve 400    ratio in a fine-tuning

Everything in one process, on one thread. The paths take turns, and a round is compared with itself,
so a machine that is busy slows them all; the figures are medians over rounds. Results are added to
OUT/dydit_speed.json. Read next: forward_times(), sampling_times()."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import data
import dit
import dydit
import sample
import train
from diffusion import Draw

WIDTHS = ((256, 4), (384, 6), (512, 8))                     # D, H
MIXES = {(0.5, "width"): (1 / 2, 1 / 2), (0.5, "both"): (1 / 2, 2 / 3),         # heads, groups on:
         (0.7, "few heads"): (1 / 2, 1.0), (0.7, "both"): (3 / 4, 5 / 6)}       # tokens do the rest


def seconds(f):
    """On a CPU: the thread's own time, in which other programs of the machine do not count."""
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if torch.cuda.is_available() else \
        (lambda: None, time.process_time)
    wait()
    start = clock()
    f()
    wait()
    return clock() - start


def rounds(paths, n):
    """{name: f} -> {name: seconds (n,)}. Every round begins with another path."""
    times, names = {name: [] for name in paths}, list(paths)
    for f in paths.values():                                # warm up
        f()
    for i in range(n):
        for name in names[i % len(names):] + names[: i % len(names)]:
            times[name].append(seconds(paths[name]))
    return {name: torch.tensor(v) for name, v in times.items()}


def compare(times):
    """Medians: seconds of the static path, the others in units of it, round by round."""
    return {"static_s": times["static"].median().item()} | {
        k: (v / times["static"]).median().item() for k, v in times.items() if k != "static"}


# ------------------------------------------------------------------------------- one forward


@torch.no_grad()
def switch(model, h, g, tokens, inputs):
    """Make the routers of all blocks choose h heads, g groups, and this share of the tokens."""
    for block in model.blocks:
        for layer, on in ((block.attn_rate.router, h), (block.mlp_rate.router, g)):
            layer.weight.zero_()                            # the first is always on
            layer.bias.copy_(torch.where(torch.arange(len(layer.bias)) < on - 1, 1.0, -1.0))
    for block in model.blocks:                              # one changes the tokens of the next
        seen, router = [], block.token_selection
        hook = router.register_forward_hook(lambda _, x, on: seen.append(router.mlp_head(x[0])))
        model(*inputs, fast=False)
        hook.remove()
        router.mlp_head[2].bias -= seen[0].quantile(1 - tokens) if tokens < 1 else seen[0].min() - 1


@torch.no_grad()
def forward_times(dim, heads, target, kind, batch, n, depth=6, device="cpu"):
    """One forward of a network of random weights, 256 tokens, that spends exactly the target."""
    size = dict(size=32, patch=2, dim=dim, heads=heads, depth=depth, learn_sigma=False)
    torch.manual_seed(0)
    model, static = dydit.DyDiT(dydit.Config(**size)).eval(), dit.DiT(dit.Config(**size)).eval()
    for p in model.parameters():                            # a fresh network's gates are 0
        p += 0.02 * torch.randn_like(p) if p.requires_grad else 0
    static.load_state_dict({k: model.state_dict()[k] for k in static.state_dict()})
    model, static = model.to(device), static.to(device)
    inputs = [v.to(device) for v in (torch.randn(batch, 4, 32, 32), torch.full((batch,), 0.4),
                                     torch.arange(batch))]
    h, g = (round(share * heads) for share in MIXES[target, kind])
    attention = dydit.spend(torch.ones(1), torch.ones(1), torch.zeros(1), model.cfg).item()
    tokens = min((target - attention * h / heads) / ((1 - attention) * g / heads), 1.0)
    switch(model, h, g, tokens, inputs)
    times = rounds({"static": lambda: static(*inputs), "masked": lambda: model(*inputs, fast=False),
                    "sliced": lambda: model(*inputs, fast=True)}, n)
    return dict(dim=dim, mix=kind, heads=f"{h}/{heads}", groups=f"{g}/{heads}", tokens=tokens,
                ratio=model(*inputs)[1]["flops"].mean().item(), **compare(times))


# ------------------------------------------------------------------------------- sampling


def open_model(file, name, device):
    model, path, saved = sample.load(file, device=device)
    if saved["name"] != name:
        raise train.Refusal(f"{file} holds {saved['name']}, not {name}")
    return model, path


def sampling_times(dense, ours, n, steps=25, guidance=2.0, batch=64, device="cpu"):
    """A whole sampling run of two trained models, cutting weights included."""
    static, path = open_model(dense, "dit", device)
    model, _ = open_model(ours, "dydit", device)
    spent = []

    def watched(x, t, y):
        prediction, aux = model(x, t, y)
        spent.append(aux["flops"].mean())
        return prediction, aux

    def masked(x, t, y):
        return model(x, t, y, fast=False)

    watched.cfg = masked.cfg = model.cfg
    labels = torch.arange(batch, device=device) % max(model.cfg.classes, 1)
    run = partial(sample.generate, path=path, labels=labels, steps=steps, cfg=guidance, batch=batch)
    times = rounds({"static": lambda: run(static), "masked": lambda: run(masked),
                    "sliced": lambda: run(model.float())}, n)       # .float(): forget what was cut
    difference = (run(model) - run(masked)).abs().max().item()
    run(watched)
    return dict(steps=steps, guidance=guidance, batch=batch, target=model.cfg.target,
                ratio=torch.stack(spent).mean().item(), difference=difference, **compare(times))


# ------------------------------------------------------------------------------- the ratio's curve


@torch.no_grad()
def eval_ratio(model, path, x0, y):
    """FLOPs ratio without noise in the switches, over all times alike."""
    device = model.pos_embed.device
    x0, y, rows = x0.to(device), y.to(device), torch.arange(len(x0), device=device)
    draw, t = Draw(0, 0, len(x0), rows, device), path.grid((rows + 0.5) / len(x0))
    _, aux = path.error(model, x0, y, t, path.draw(x0, draw)[1])
    return aux["flops"].mean().item()


def curve(dense, target, steps, out, device="cpu", every=10):
    """Fine-tune by train.py -> [(step, lambda_step, ratio in training, ratio of the EMA), ...]"""
    args = train.parse_args(
        f"--model dydit --tiny --steps {steps} --sample-every 0 --set target={target}".split()
        + ["--init", str(dense), "--out", str(out / "curve"), "--device", str(device)])
    loss, update, spent, points = dydit.loss, train.update_ema, [], []
    held = data.load(train.read_checkpoint(dense)["data"]["source"], "test")
    rows = torch.arange(min(256, len(held)))
    x0, y = held.batch(rows, Draw(0, 0, len(rows), rows))

    def watched_loss(path, *rest):
        result = loss(path, *rest)
        spent[:] = path, result[1]["flops"].mean().item()
        return result

    def watched_update(ema, model, decay):
        update(ema, model, decay)
        watched_update.step += 1
        if watched_update.step % every == 0 or watched_update.step == steps:
            points.append((watched_update.step, dydit.lambda_step(watched_update.step, model.cfg),
                           spent[1], eval_ratio(ema, spent[0], x0, y)))

    watched_update.step = 0
    dydit.loss, train.update_ema = watched_loss, watched_update
    try:
        train.main(args)
    finally:
        dydit.loss, train.update_ema = loss, update
    return points


def draw_curve(file, points, width=640, height=320):
    """lambda_step grey, ratio in training blue, of the EMA without noise red; bottom 0, top 1."""
    picture = Image.new("RGB", (width, height), "white")
    last = points[-1][0]
    for column, colour in ((1, "grey"), (2, "royalblue"), (3, "crimson")):
        line = [(p[0] / last * (width - 1), (1 - p[column]) * (height - 1)) for p in points]
        ImageDraw.Draw(picture).line(line, fill=colour, width=2)
    picture.save(file)


# ------------------------------------------------------------------------------- command line


def show(rows):
    """A list of dicts with the same keys as a table."""
    text = [list(rows[0])]
    text += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    for row in text:
        print("  ".join(cell.rjust(max(len(r[i]) for r in text)) for i, cell in enumerate(row)))


def main(argv=None):
    p = train.Parser(prog="bench_dydit", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = train.number(int, 1, 10**6)
    p.add_argument("--dense", type=Path, help="checkpoint of a dense DiT")
    p.add_argument("--ours", type=Path, nargs="+", help="checkpoints of DyDiT fine-tuned from it")
    p.add_argument("--curve", type=count, metavar="STEPS",
                   help="fine-tune --dense, watch the ratio")
    p.add_argument("--target", type=train.number(float, 0, 1), default=0.5, help="lambda of --curve")
    p.add_argument("--rounds", type=count, help="default: 15 forwards, or 3 sampling runs")
    p.add_argument("--batch", type=count, default=4, help="of the forwards")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--out", type=Path, default=Path("runs"))
    args = p.parse_args(argv)
    device = train.join(args.device)[2]
    if (args.curve or args.ours) and not args.dense:
        raise train.Refusal("--ours and --curve need --dense")
    torch.set_num_threads(1)
    train.keep_memory()                                     # as train.py and sample.py do
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "dydit_speed.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if args.curve:
        open_model(args.dense, "dit", device)                   # or a Refusal
        points = curve(args.dense, args.target, args.curve, args.out, device)
        results[f"curve {args.target}"] = points
        draw_curve(args.out / f"dydit_curve_{args.target}.png", points)
        print(f"step {points[-1][0]}: lambda {args.target}, ratio in training {points[-1][2]:.3f}, "
              f"of the EMA without noise {points[-1][3]:.3f}")
    elif args.ours:
        results["sampling"] = [
            sampling_times(args.dense, f, args.rounds or 3, device=device) for f in args.ours]
        show(results["sampling"])
    else:
        results["forward"] = [
            forward_times(*width, *mix, args.batch, args.rounds or 15, device=device)
            for width in WIDTHS for mix in MIXES]
        show(results["forward"])
    file.write_text(json.dumps(results, indent=1))
    print(f"written to {file}")


def cli(argv):
    try:
        main(argv)
        return 0
    except (train.Refusal, ValueError, OSError) as e:
        print(f"bench_dydit: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
