"""Released weights: from the authors' files to an ordinary checkpoint, and back.

    python -m common.official dit DiT-XL-2-256x256.pt --set heads=16 --out runs/dit-xl/last.pt
    python -m common.official ditmoe dit_moe_xl_8E2A.pt --path rf --set k=2 --out runs/moe/last.pt
    python -m common.official to-official runs/dit/last.pt --out theirs.pt

The checkpoint is one of train.py's, at step 0 and without optimizer state: sample.py, --init, the
metrics and the analyses read it like any other. So the papers' fine-tuning starts with the first
line above, then: python train.py --model dydit --init runs/dit-xl/last.pt --size XL/2 --data ...

    name     authors' code                keys that differ from ours
    dit      facebookresearch/DiT         none
    dydit    NUS-HPC-AI-Lab, Alibaba      none; NUS has H rows per router, Alibaba H - 1
    dtr      byeongjun-park/DTR           a mask table (T, D) per block; Switch-DiT: routers.i
    ditmoe   feizc/DiT-MoE                gate, up, down per expert; q/k norm: Wqkv and out_proj

Weights do not tell everything. The command line must say what shapes do not show: heads (S 6, B 12,
L, XL and G 16), experts per token (k=2 in all released files), and the diffusion of a DiT-MoE.

Letters: D width, H heads, E experts, h an expert's hidden width, T noise levels, N depth."""

import argparse
import importlib
import sys
from dataclasses import asdict, fields, replace
from math import isqrt
from pathlib import Path

import torch

from common.checkpoint import (
    FORMAT, check_config, is_plain, load_model, load_untrusted, reason, write_checkpoint)
from common.cli import Parser, UserError, run_program
from common.config import parse_setting
from diffusion import DIFFUSIONS

RELEASED = ("dit", "ditmoe", "dydit", "dtr")
QK_NORM_KEYS = ((".attn.Wqkv.", ".attn.qkv."), (".attn.out_proj.", ".attn.proj."))


def from_official(name, state, **settings):
    """A released state dict, bare or wrapped as in the authors' files -> our model, in float32.

    settings: Config fields that shapes do not tell (heads, k), or that differ from our defaults:
    time_scale=1 for the flows of DiT-MoE (XL, G), whose network embeds t in [0, 1] as it is.
    Raises UserError if a setting is missing or if these are not the weights of such a model."""
    if name not in RELEASED:
        raise UserError(f"{name}: weights were released for {', '.join(RELEASED)} only")
    module = importlib.import_module(name)
    try:
        for wrapper in ("ema", "model", "module", "state_dict"):
            state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
        state = {key.removeprefix("module."): w for key, w in state.items()}
        cfg = replace(module.Config(), **read_config(name, state, settings) | settings)
        if name == "ditmoe":
            stack_experts(state, cfg)
        if name == "dtr":
            cfg = take_masks(module, state, cfg)
        check_config(name, asdict(cfg))
        with torch.device("meta"):                      # allocates nothing
            shapes = {key: tuple(w.shape) for key, w in module.Model(cfg).state_dict().items()}
        device = torch.get_default_device().type
        found = {key: tuple(w.shape) if is_plain(w, device) else "no plain tensor"
                 for key, w in state.items()}
        for key in [*shapes, *found]:
            if found.get(key) != shapes.get(key):
                raise ValueError(f"{key} is {found.get(key, 'missing')}, such a model has "
                                 f"{shapes.get(key, 'none')}")
    except UserError:
        raise
    except (LookupError, RuntimeError, AttributeError, TypeError, ValueError,
            ZeroDivisionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"not a released {name} checkpoint: {why[:200]}") from None
    model = module.Model(cfg)
    model.load_state_dict(state)
    return model


def to_official(model):
    """Our dit, ditmoe, dydit or dtr -> a state dict that the authors' code loads.

    Raises UserError if their layout cannot hold this model."""
    name, cfg = type(model).__module__, model.cfg
    state = {key: w.detach().clone() for key, w in model.state_dict().items()}
    if name not in RELEASED:
        raise UserError(f"{name}: no official code was released, so it has no official layout")
    if name == "dtr":
        state.pop("table", None)
        for i, mask in enumerate(masks_by_block(sys.modules[name], cfg, model.table)):  # (T, D)
            state[f"blocks.{i}.routing._unit_mapping"] = mask.float()
    if name == "ditmoe":
        if cfg.expert != "swiglu" or sum(".moe.gate." in key for key in state) < cfg.depth:
            raise UserError("the official layout of ditmoe has SwiGLU experts in every block and "
                            "nothing else")
        unstack_experts(state, cfg)
    return state


def read_config(name, state, settings):
    """-> the Config fields that shapes tell. Raises UserError for those that settings must add."""
    D, channels, patch, _ = state["x_embedder.proj.weight"].shape
    known = dict(dim=D, channels=channels, patch=patch,
                 size=isqrt(state["pos_embed"].shape[1]) * patch,
                 depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
                 classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                 learn_sigma=len(state["final_layer.linear.bias"]) == 2 * patch**2 * channels)
    if name == "dydit":                                 # the paper's heads are 64 or 72 wide
        rows = len(state["blocks.0.attn_rate.router.weight"])
        heads = settings.get("heads") or next(
            (h for h in (rows, rows + 1) if D / h in (64, 72)), None)
        if heads not in (rows, rows + 1):
            raise UserError(f"its routers have {rows} rows: --set heads={rows} (NUS) or "
                            f"heads={rows + 1} (Alibaba)")
        known |= dict(heads=heads, always_on=rows < heads)
    if name == "ditmoe":
        rows = {key.split(".")[3]: len(w) for key, w in state.items() if "up_proj" in key}   # h
        q_norm = state.get("blocks.0.attn.q_norm.weight")                       # (D/H,)
        known |= dict(experts=len(state["blocks.0.moe.gate.weight"]), hidden=rows["experts"] // D,
                      shared=rows.get("shared_experts", 0) // D, qk_norm=q_norm is not None)
        known |= {} if q_norm is None else dict(heads=D // len(q_norm))
        if "k" not in settings:
            raise UserError("the file does not tell how many experts a token uses: --set k=2")
    if "heads" not in known | settings:
        raise UserError("the file does not tell the number of heads: --set heads=16 (S 6, B 12, "
                        "L, XL and G 16)")
    return known


def expert_names(cfg):
    """-> for every block, the prefix of its keys and the official names of its networks."""
    names = [f"experts.{e}" for e in range(cfg.experts)] + ["shared_experts"] * bool(cfg.shared)
    return [(moe, [moe + name for name in names])
            for moe in (f"blocks.{i}.moe." for i in range(cfg.depth))]


def stack_experts(state, cfg):
    """In place, theirs to ours: gate, up (h, D) and down (D, h) of each expert become w1 (E, D, 2h)
    and w2 (E, h, D); those of the shared experts w1 (2h, D) and w2 (D, h)."""
    for moe, nets in expert_names(cfg):
        gate, up, down = ([state.pop(f"{net}.{which}_proj.weight") for net in nets]
                          for which in ("gate", "up", "down"))
        both = [torch.cat(pair) for pair in zip(gate, up)]                      # (2h, D) each
        if cfg.shared:
            state[f"{moe}shared_experts.w1"] = both.pop()
            state[f"{moe}shared_experts.w2"] = down.pop()
        state[f"{moe}experts.w1"] = torch.stack(both).mT                        # (E, D, 2h)
        state[f"{moe}experts.w2"] = torch.stack(down).mT                        # (E, h, D)
    for theirs, ours in QK_NORM_KEYS:
        for key in [key for key in state if theirs in key]:
            state[key.replace(theirs, ours)] = state.pop(key)


def unstack_experts(state, cfg):
    """The inverse of stack_experts."""
    for moe, nets in expert_names(cfg):
        w1, w2 = ([*state.pop(f"{moe}experts.{w}").mT] for w in ("w1", "w2"))
        if cfg.shared:
            w1.append(state.pop(f"{moe}shared_experts.w1"))
            w2.append(state.pop(f"{moe}shared_experts.w2"))
        for net, both, down in zip(nets, w1, w2):
            for which, w in zip(("gate", "up", "down"), (*both.chunk(2), down)):
                state[f"{net}.{which}_proj.weight"] = w.clone()
    for theirs, ours in QK_NORM_KEYS if cfg.qk_norm else ():
        for key in [key for key in state if ours in key]:
            state[key.replace(ours, theirs)] = state.pop(key)


def masks_by_block(dtr, cfg, table):
    """Which channels each noise level reads in each block -> (N, T, D) bool."""
    masks = dtr.task_masks(cfg, table, torch.arange(cfg.tasks))                 # (1 or N, T, 1, D)
    return masks[:, :, 0].expand(cfg.depth, -1, -1)


def take_masks(dtr, state, cfg):
    """Take DTR's mask tables out of the state -> cfg. The weights were trained with these masks, so
    unless they are the windows of alpha and beta, the model keeps them (route "given")."""
    masks = {int(key.split(".")[1]): state.pop(key)
             for key in [*state] if key.endswith("._unit_mapping")}
    if masks:
        masks = torch.stack([masks[i] for i in range(cfg.depth)]).bool()        # (N, T, D)
        cfg = replace(cfg, tasks=masks.shape[1])
        if not torch.equal(masks, masks_by_block(dtr, cfg, dtr.window_starts(cfg))):
            cfg, state["table"] = replace(cfg, route="given", per_block=True), masks
    return cfg


# ------------------------------------------------------------------------ command line


def read_file(file):
    """torch.load of a file of the authors. weights_only builds tensors and plain types and runs no
    code. Training files also hold the authors' command line, an argparse.Namespace: it carries
    values and no code, and is allowed here and nowhere else. Any other class is refused."""
    if not file.exists():
        raise UserError(f"{file}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return load_untrusted(file, ours=False)
    except Exception as error:                          # damaged files raise many different errors
        raise UserError(f"{file} is not loaded: {reason(error)}. Tensors, plain types and "
                        "argparse.Namespace are safe; if you trust the file, save its ema "
                        "alone") from None


def convert(args):
    """A released file -> a checkpoint, and the command that samples as its authors did."""
    kind = args.path or (None if args.name == "ditmoe" else "ddpm")
    if not kind:
        raise UserError("ditmoe: say --path ddpm (released S and B) or --path rf (XL and G)")
    if args.schedule and kind == "rf":
        raise UserError("--schedule is for --path ddpm, not rf")
    known = {f.name: f for f in fields(importlib.import_module(args.name).Config)}
    settings = dict(time_scale=1.0) if kind == "rf" else {}
    settings |= dict(parse_setting(text, known) for text in args.set)
    state = read_file(args.file)
    try:
        model = from_official(args.name, state, **settings)
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from None
    diffusion = DIFFUSIONS[kind](**dict(schedule=args.schedule) if args.schedule else {})
    cfg, weights = model.cfg, model.state_dict()
    write_checkpoint(args.out, dict(
        format=FORMAT, name=args.name, config=asdict(cfg), step=0, recipe={},
        path=dict(kind=kind, options=diffusion.options, weights=diffusion.state_dict(),
                  optimizer=[]),
        data=dict(source="the authors' data", names=[str(i) for i in range(cfg.classes)],
                  latent=cfg.channels == 4, latent_kind=None, size=None,
                  scale=0.18215 if cfg.channels == 4 else None, shift=0.0),   # Stable Diffusion's
        model=weights, ema=weights))
    options = [f"--steps {50 if kind == 'rf' else 250}"]
    if cfg.classes:                                     # DTR guides all channels, the others three
        options += ["--cfg 7" if kind == "rf" else "--cfg 1.5"]
        options += ["--cfg-channels 3"] if kind == "ddpm" and args.name != "dtr" else []
    options += ["--vae stabilityai/sd-vae-ft-ema"] if cfg.channels == 4 else []
    if kind == "ddpm":
        print("their DDIM: add --solver ddim --spacing leading --steps 50, or another number for "
              "which a stride over 1000 steps exists")
    print(f"sample as its authors did: python sample.py {args.out} {' '.join(options)}")


def main(argv):
    p = Parser(prog="python -m common.official", description=__doc__.split("\n\n")[0])
    p.add_argument("name", choices=(*RELEASED, "to-official"),
                   help="which model the file holds, or to-official: from a checkpoint of ours")
    p.add_argument("file", type=Path)
    p.add_argument("--out", type=Path, required=True, help="a new file")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                   help="what the file does not tell: heads=16, k=2")
    p.add_argument("--path", choices=tuple(DIFFUSIONS),
                   help="what it was trained with (default: ddpm; of a ditmoe it must be said)")
    p.add_argument("--schedule", choices=("linear", "cosine"),
                   help="noise of ddpm (default: linear; DTR's training code defaults to cosine)")
    args = p.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} exists already: choose another --out")
    if args.name != "to-official":
        return convert(args)
    if args.set or args.path or args.schedule:
        raise UserError("--set, --path and --schedule: the checkpoint knows its own")
    write_checkpoint(args.out, dict(ema=to_official(load_model(args.file)[0])))
    print(f"{args.out}: the averaged weights, in the authors' layout")


if __name__ == "__main__":
    sys.exit(run_program("common.official", main, sys.argv[1:]))
