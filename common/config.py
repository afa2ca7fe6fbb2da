"""From the command line to the Config of a model and to the diffusion."""

import importlib
from dataclasses import fields, replace

from common.cli import UserError
from diffusion import DIFFUSIONS


def make_diffusion(args, before):
    """-> the diffusion of --path. before: the checkpoint to continue from, or None; it decides what
    the command line leaves open. Raises UserError for an option of the other diffusion."""
    was = before["path"] if before else {"kind": "rf", "options": {}}
    kind = args.path or was["kind"]
    if before and kind != was["kind"]:
        raise UserError(f"--path {kind}, but {args.init or args.out / 'last.pt'} was trained with "
                        f"{was['kind']}")
    ddpm = ("schedule", "weighting", "gamma", "clusters")
    given = {k: vars(args)[k] for k in ("times", *ddpm) if vars(args)[k] is not None}
    for k in given:
        if (k in ddpm) != (kind == "ddpm"):
            raise UserError(f"--{k} is for --path {'ddpm' if k in ddpm else 'rf'}, not {kind}")
    old = was["options"]
    if given.get("weighting", old.get("weighting")) != old.get("weighting"):
        old = {k: v for k, v in old.items() if k != "gamma"}        # each weighting has its own
    diffusion = DIFFUSIONS[kind](**(old | given))
    for k, users in (("gamma", ("min-snr", "p2")), ("clusters", ("ant-uw",))):
        if k in given and diffusion.options["weighting"] not in users:
            raise UserError(f"--{k} is for --weighting {' or '.join(users)}, not "
                            f"{diffusion.options['weighting']}")
    return diffusion


def make_config(args, module, diffusion, data, before):
    """-> the Config: TINY or a paper's size, fitted to the data, then what a checkpoint fixes, then
    --set. module: the model's; before: the checkpoint to continue from, or None. Raises
    UserError."""
    cfg = module.TINY if args.tiny else module.size(args.size)
    if data:
        cfg = replace(cfg, size=data.size, channels=data.channels, classes=data.classes)
    cfg = replace(cfg, learn_sigma=diffusion.kind == "ddpm")
    known = {f.name: f for f in fields(cfg)}
    if before:                                          # of another model: DiT's own fields
        same = before["name"] == args.model
        keep = known if same else {f.name for f in fields(importlib.import_module("dit").Config)}
        cfg = replace(cfg, **{k: v for k, v in before["config"].items() if k in keep})
    given = dict(parse_setting(s, known) for s in args.set)
    cfg = replace(cfg, **given)
    for name in ("size", "channels", "classes") if data else ():
        ours, theirs = getattr(cfg, name), getattr(data, name)
        if ours != theirs and not (name == "classes" and ours == 0):    # 0: without labels
            who = "--set says" if name in given else "the checkpoint was trained with"
            raise UserError(f"{name} of {data.source} is {theirs}, but {who} {ours}")
    check_sizes(cfg)
    return cfg


def parse_setting(text, known):
    """key=value of --set -> (key, value), of the Config field's type. known: {name: field}."""
    key, equals, value = text.partition("=")
    if key not in known or not equals:
        raise UserError(f"--set {text}: write key=value, with one of the keys {', '.join(known)}")
    kind = type(known[key].default)
    try:
        if kind is bool:
            return key, {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return key, kind(value)
    except (KeyError, ValueError):
        raise UserError(f"--set {text}: {key} must be of type {kind.__name__}") from None


def check_sizes(cfg):
    """What every model needs of its Config. Raises UserError."""
    for whole, part in (("dim", "heads"), ("size", "patch")):
        a, b = getattr(cfg, whole), getattr(cfg, part)
        if b < 1 or a < 1 or a % b:
            raise UserError(f"{whole} {a} cannot be divided by {part} {b}")
    if cfg.dim % 4 or not 1 <= cfg.depth <= 1000:
        raise UserError(f"dim {cfg.dim} must be a multiple of 4, depth {cfg.depth} from 1 to 1000")
    if cfg.channels < 1 or cfg.classes < 0:
        raise UserError(f"channels {cfg.channels} must be 1 or more, classes {cfg.classes} 0 or "
                        "more")
