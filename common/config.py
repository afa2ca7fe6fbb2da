"""From the command line to the Config of a model and to the diffusion."""

import importlib
from dataclasses import asdict, fields, replace

import torch

from common.cli import UserError
from diffusion import DIFFUSIONS

COUNTS = ("_seed", "_steps", "_start", "_from")         # ends of fields that make nothing larger
# Fields that only training reads: with another value, a model still computes the same.
TRAINING_FIELDS = {
    "ditmoe": ("alpha", "scope"), "racedit": ("momentum", "sim", "plr", "balance", "pool"),
    "dydit": ("target", "weight", "anneal_steps", "anneal_start", "full_model_steps",
              "hard_gates_from", "tau", "router_lr")}


def make_diffusion(args, before):
    """-> the diffusion of --path. before: the checkpoint to continue from, or None; it decides what
    the command line leaves open. Raises UserError for an option of the other diffusion."""
    was = before["path"] if before else {"kind": "rf", "options": {}}
    kind = args.path or was["kind"]
    if before and kind != was["kind"]:
        raise UserError(f"--path {kind}, but the checkpoint was trained with {was['kind']}")
    ddpm = ("schedule", "weighting", "gamma", "clusters", "predict")
    given = {k: vars(args)[k] for k in ("times", *ddpm) if vars(args)[k] is not None}
    for k in given:
        if (k in ddpm) != (kind == "ddpm"):
            raise UserError(f"--{k} is for --path {'ddpm' if k in ddpm else 'rf'}, not {kind}")
    old = was["options"]
    if kind == "ddpm" and not before:                   # the recipe's defaults
        given = args.ddpm | given
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
    --set. TINY takes smaller patches for small images, so that these are at least 7 x 7 tokens.
    module: the model's; before: the checkpoint to continue from, or None. Raises UserError."""
    cfg = module.TINY if args.tiny else module.size(args.size)
    if data:
        cfg = replace(cfg, size=data.size, channels=data.channels, classes=data.classes)
    while args.tiny and cfg.size < 7 * cfg.patch and cfg.patch > 1:     # latents of 8x8: patch 1
        cfg = replace(cfg, patch=cfg.patch // 2)
    cfg = replace(cfg, learn_sigma=diffusion.kind == "ddpm")
    known = {f.name: f for f in fields(cfg)}
    cfg = replace(cfg, **kept_fields(args, before)) if before else cfg
    given = dict(parse_setting(s, known) for s in args.set)
    cfg = replace(cfg, **given)
    for name in ("size", "channels", "classes") if data else ():
        ours, theirs = getattr(cfg, name), getattr(data, name)
        if ours != theirs and not (name == "classes" and ours == 0):    # 0: without labels
            who = "--set says" if name in given else "the checkpoint was trained with"
            raise UserError(f"{name} of {data.source} is {theirs}, but {who} {ours}")
    return check_config(args.model, asdict(cfg))


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


def kept_fields(args, before):
    """-> what a checkpoint fixes of the Config: all of it, or of another model DiT's own fields."""
    theirs = asdict(importlib.import_module(before["name"]).Config(**before["config"]))
    dit = {f.name for f in fields(importlib.import_module("dit").Config)}
    return {k: v for k, v in theirs.items() if before["name"] == args.model or k in dit}


def check_parent(args, parent, cfg):
    """--init: the new run must begin as the function that its parent, a checkpoint, computes. The
    parent is of the same model, or a dense DiT. None: there is no --init. Raises UserError."""
    if parent is None:
        return
    who, child = f"--init {args.init}", importlib.import_module(args.model)
    same, upcycles = parent["name"] == args.model, hasattr(child, "from_dense")
    if not (same or is_dense(parent["name"], parent["config"])
            and (upcycles or is_dense(args.model, asdict(cfg)))):
        others = {"racedit": "", "dtr": " or, with --set beta=1, a dense DiT"}
        raise UserError(f"{who}: cannot start from it: it is a {parent['name']}, {args.model} "
                        f"needs another {args.model}{others.get(args.model, ' or a dense DiT')}")
    free = TRAINING_FIELDS.get(args.model, ()) if getattr(cfg, "route", "") != "random" else ()
    fixed = {k: v for k, v in kept_fields(args, parent).items() if k not in free}
    if upcycles and not same:                           # from_dense may fix more: how experts look
        try:
            with torch.device("meta"):                  # allocates nothing
                state = {k: w.to("meta") for k, w in parent["ema"].items()}
                fixed = asdict(child.from_dense(state, replace(cfg, **fixed)).cfg)
        except ValueError as error:
            raise UserError(f"{who}: cannot start from it: {error}") from None
    given = dict(parse_setting(s, {f.name: f for f in fields(cfg)}) for s in args.set)
    for k in given:
        if fixed.get(k, given[k]) != given[k]:
            raise UserError(f"--set {k}={given[k]}: with {who}, {k} must be {fixed[k]}")


def is_dense(name, config):
    """Is this a plain DiT? A DTR is one if it reads all channels."""
    return name == "dit" or (name == "dtr" and config.get("beta") == 1
                             and config.get("route") != "given")


def check_config(name, config):
    """-> the Config of a model; every value has its field's type and a sane size. Training and
    loading both ask here, so that what was trained can be loaded. Raises UserError."""
    module = importlib.import_module(name)
    types = {f.name: type(f.default) for f in fields(module.Config)}
    for k, v in config.items():
        kind = types.get(k)
        if type(v) is not kind and (kind, type(v)) != (float, int):
            raise UserError(f"config: {k} is a {type(v).__name__}")
        most = 1e30 if kind is float else 2**63 - 1 if k.endswith(COUNTS) else 1e7
        if kind in (int, float) and not abs(v) <= most:
            raise UserError(f"config: {k} is out of range")
    cfg = module.Config(**config)
    check_sizes(cfg)
    return cfg


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
