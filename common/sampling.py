"""What the programs that sample have in common on the command line: sample.py, and metrics.py and
sample_npz.py of experiments/. First the options, then what they mean for a checkpoint."""

from pathlib import Path

import torch

from common.checkpoint import load_model
from common.cli import UserError, number
from common.distributed import compile_blocks

STEPS = {"euler": 25, "heun": 13, "ddpm": 250, "ddim": 50, "dpm++": 20}     # without --steps


def add_sampling_options(p):
    """The options of sample.py and experiments/sample_npz.py."""
    count = number(int, 1, 10**7)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("-n", "--n", type=count, default=80,         # torchrun takes --n for its own
                   help="number of images, over the classes in turn")
    p.add_argument("--classes", nargs="+", help="only these, in turn: by name, else by number")
    p.add_argument("--steps", type=count, help=f"default: {STEPS}")
    p.add_argument("--solver", choices=tuple(STEPS))
    p.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="new noise in ddim")
    p.add_argument("--spacing", choices=("linspace", "trailing", "leading"),
                   help="steps of ddpm (linspace) and ddim (trailing; its authors': leading)")
    p.add_argument("--cfg", type=number(float, 0), help="guidance, 1: none (2; 1 after --drop 0)")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
                   metavar=("LO", "HI"), help="guide only at times t in LO..HI")
    p.add_argument("--cfg-channels", type=count, help="guide only the first channels (DiT: 3)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--batch", type=count, default=64)
    p.add_argument("--npz", type=Path, help="also this file: arr_0 uint8 RGB, arr_1 labels")
    p.add_argument("--vae", help="decoder of latents, such as stabilityai/sd-vae-ft-ema")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    add_model_options(p)


def add_model_options(p):
    """The options that experiments/metrics.py has, too."""
    p.add_argument("--clip-x0", type=bound, default="auto", metavar="auto|on|off|BOUND",
                   help="ddpm: bound every estimate of x0 (auto: to 1 for images, not for latents)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema")
    p.add_argument("--amp", choices=("auto", "off", "bf16"), default="auto",
                   help="auto: bf16 on a GPU, float32 elsewhere")
    p.add_argument("--compile", action="store_true", help="a slow start, then faster")


def bound(text):
    """The argparse type of --clip-x0: auto, off (None), on (1), or a number."""
    known = dict(auto="auto", off=None, on=1.0)
    return known[text] if text in known else number(float, 1e-3, 1e6)(text)


def load_sampler(file, args, device):
    """load_model() with --weights and --compile, which compiles each block."""
    model, diffusion, checkpoint = load_model(file, args.weights, device)
    if args.compile:
        compile_blocks(model)
    return model, diffusion, checkpoint


def sampling_options(args, model, checkpoint):
    """-> labels (n,), the options of sample.sample_trajectory(), and lines to print. Raises
    UserError."""
    c, names = model.cfg, class_names(model, checkpoint)
    wanted = [find_class(text, names) for text in args.classes or ()] or range(len(names))
    if args.cfg_channels and args.cfg_channels > c.channels:
        raise UserError(f"--cfg-channels {args.cfg_channels}: the images of this checkpoint have "
                        f"{c.channels}")
    if not c.classes and args.cfg not in (None, 1.0):
        raise UserError(f"--cfg {args.cfg:g}: this checkpoint knows no classes to guide towards")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise UserError("--cfg-interval: LO is above HI")
    labels = torch.tensor([wanted[i % len(wanted)] for i in range(args.n)])
    (cfg, *notes), clip_x0 = choose_cfg(args.cfg, checkpoint), choose_clip(args, model, checkpoint)
    how = checkpoint["path"]["options"]                 # see DDPM.trajectory
    if clip_x0 is None and args.clip_x0 == "auto" and how.get("schedule") == "cosine" and (
            how.get("predict") != "v"):
        notes.append("latents with the cosine schedule: they may need --clip-x0 5")
    return labels, dict(
        seed=args.seed, steps=args.steps, solver=args.solver, eta=args.eta, spacing=args.spacing,
        clip_x0=clip_x0, cfg=cfg, channels=args.cfg_channels, interval=tuple(args.cfg_interval),
        amp=args.amp), notes


def choose_cfg(asked, checkpoint):
    """-> (the guidance scale,), and a line to print where the checkpoint decides it."""
    if asked is None and checkpoint.get("recipe", {}).get("drop") == 0:
        return 1.0, ("trained with --drop 0: the model never learned \"no class\", from which "
                     "guidance starts, so it is off unless --cfg turns it on")
    return (2.0 if asked is None else asked,)


def choose_clip(args, model, checkpoint):
    """-> clip_x0 of DDPM.trajectory, a bound or None. A checkpoint that does not say whether it
    makes images or latents is judged by its channels. Raises UserError."""
    if args.clip_x0 != "auto" and checkpoint["path"]["kind"] != "ddpm":
        raise UserError("--clip-x0 is for checkpoints of --path ddpm")
    latent = checkpoint["data"].get("latent", model.cfg.channels not in (1, 3))
    return (None if latent else 1.0) if args.clip_x0 == "auto" else args.clip_x0


# ------------------------------------------------------------------------ classes


def class_names(model, checkpoint):
    """-> the name of each class; "0", "1", ... where the checkpoint names none."""
    classes = max(model.cfg.classes, 1)
    names = [str(name) for name in checkpoint["data"].get("names", [])][:model.cfg.classes]
    return names + [str(i) for i in range(len(names), classes)]


def find_class(text, names):
    """What --classes asks for -> its number. A name counts before a number. Raises UserError."""
    n = names.index(text) if text in names else int(text) if text.isdecimal() else -1
    if not 0 <= n < len(names):
        raise UserError(f"--classes {text}: this checkpoint has classes 0 to {len(names) - 1}"
                        f"{show_classes(range(len(names)), names)}")
    return n


def show_classes(labels, names):
    """The first ten of the labels (n,) with their names -> "; classes 0 cat, 1 dog", or nothing if
    the names only repeat the numbers."""
    used = sorted({int(n) for n in labels})
    shown = [f"{n} {names[n] if names[n].isprintable() else ascii(names[n])}" for n in used[:10]]
    known = any(names[n] != str(n) for n in used)
    return f"; classes {', '.join(shown)}{', ...' * (len(used) > 10)}" if known else ""
