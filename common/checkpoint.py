"""Checkpoints: one file of plain types that holds everything sampling and resuming need.

    format, name, config        which model this is
    model, ema, optimizer, step what has been trained (model: the raw weights; ema: their average)
    path                        the diffusion: kind, options, its own weights and optimizer
    data                        where the images or latents came from, and the names of the classes
    recipe                      the options that a resumed run must share with its beginning

Files in assets/checkpoints hold the average alone, in fp16: after loading, model is the same.

    save_run, read_checkpoint, load_model, restore             ordinary use
    below the line "files from strangers"                      what is checked before use

A file is loaded with weights_only=True, so it cannot run code. With --sharded-save, last.pt is
small and names a folder beside it, which torch's distributed checkpointing (dcp) reads and writes,
on any number of processes."""

import importlib
import io
import itertools
import math
import os
import pickle
import re
import shutil
import unicodedata
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)

from common.cli import UserError
from common.config import check_config
from common.distributed import from_rank_0, on_all_ranks
from common.files import write_atomic
from common.muon import Muon
from diffusion import DDPM, DIFFUSIONS

MODELS = ("dit", "ditmoe", "racedit", "dydit", "dtr")
FORMAT = 1
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)     # one file, many GPUs
RECIPE = ("seed", "batch", "lr", "muon_lr", "warmup", "cooldown", "beta2", "ema", "clip", "drop")
RENAMED_FIELDS = {"dydit": dict(hold="anneal_start", ramp="anneal_steps", quiet="hard_gates_from",
                                complete="full_model_steps")}           # of older checkpoints


# ------------------------------------------------------------------------ saving


def save_run(run):
    """Write everything that sampling and an exact resume need to OUT/last.pt. run: of train.set_up.

    All processes must call it: FSDP gathers weights from all of them, or with --sharded-save every
    process writes its part. Raises UserError if the disk is full."""
    args, data, file = run.args, run.data, run.args.out / "last.pt"
    ours = [o for o, _ in run.optimizers]
    others = ours[len(of_model(ours, run.diffusion)):]
    path = dict(kind=run.diffusion.kind, options=run.diffusion.options,
                weights=run.diffusion.state_dict(), optimizer=[o.state_dict() for o in others])
    content = dict(
        format=FORMAT, name=args.model, config=asdict(run.model.cfg), step=run.done, path=path,
        data=data.about(), recipe={k: vars(args)[k] for k in RECIPE})
    if args.sharded_save:
        content |= write_shards(run, of_model(ours, run.diffusion))
    else:
        content |= training_state(run.model, run.ema, of_model(ours, run.diffusion), GATHERED)
    on_all_ranks(lambda: run.rank == 0 and write_checkpoint(file, content), run.world_size)
    on_all_ranks(lambda: run.rank == 0 and delete_unused_shards(args.out), run.world_size)


def of_model(optimizers, diffusion):
    """The model's optimizers: all but the last one if the diffusion has weights of its own."""
    return optimizers[:-1] if list(diffusion.parameters()) else optimizers


def training_state(model, ema, optimizers, options=None):
    new = [o for o in optimizers if not o.state]
    moments = get_optimizer_state_dict(model, optimizers, options=options)
    for state in [moments.get("state", {}), *(o.state for o in new)] if new else ():
        for own in state.values():                      # torch made it by a step with gradients
            own.get("step", torch.zeros(())).zero_()    # of 0, and counted this step
    return dict(model=get_model_state_dict(model, options=options),
                ema=get_model_state_dict(ema, options=options), optimizer=moments)


def write_checkpoint(file, content):
    write_atomic(file, lambda f: torch.save(content, f))


def write_shards(run, optimizers):
    """Every process writes its part of every tensor into a new folder -> what last.pt must hold
    besides. The folder counts only once last.pt, which is written after it, names it."""
    name = from_rank_0(f"shards-{run.done:07d}-{os.urandom(3).hex()}", run.world_size)
    state, out = training_state(run.model, run.ema, optimizers), run.args.out
    groups = state["optimizer"].pop("param_groups")     # plain numbers: they go into last.pt
    try:
        with no_warnings():                             # dcp warns if there is only one process
            dcp.save(state, checkpoint_id=out / name)
    except (OSError, CheckpointException) as error:
        if run.rank == 0:
            shutil.rmtree(out / name, ignore_errors=True)
        raise UserError(f"cannot write {out / name} ({str(error).strip().splitlines()[-1]}); the "
                        "last checkpoint is untouched") from None
    return dict(shards=name, groups=groups)


def delete_unused_shards(out):
    """Delete the shard folders that no checkpoint in this folder names."""
    folders, named = list(out.glob(f"shards-{'[0-9]' * 7}*-??????")), set()
    for file in (*out.glob("*.pt"),) if folders else ():
        try:
            named.add(read_checkpoint(file, with_weights=False).get("shards"))
        except UserError:
            return                                      # a damaged file names nothing: keep all
    for folder in folders:
        if folder.name not in named:
            shutil.rmtree(folder)


# ------------------------------------------------------------------------ loading


def read_checkpoint(file, with_weights=True):
    """-> the contents of a checkpoint. Raises UserError if it is missing, damaged or no checkpoint.

    with_weights: of a sharded checkpoint, read all weights into this process, too."""
    file = Path(file)
    if not file.exists():
        raise UserError(f"{file}: no such file")
    try:
        content = load_untrusted(file)
        check_content(content, file)
        if "shards" in content:
            reader = Shards(file.parent, content["shards"])
            reader.read_metadata()
            if with_weights:
                module = importlib.import_module(content["name"])
                for key in ("model", "ema"):
                    model = module.Model(module.Config(**content["config"]))
                    content[key] = model.state_dict()
                with no_warnings():
                    dcp.load({key: content[key] for key in ("model", "ema")},
                             storage_reader=reader, no_dist=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or file}: no such file") from None
    except (Exception, CheckpointException) as error:   # damaged files raise many different errors
        raise UserError(f"{file} is not a checkpoint of train.py, or damaged "
                        f"({reason(error)})") from None
    return content


def load_model(file, weights="ema", device="cpu"):
    """-> the model in eval mode, its diffusion, and the contents of the checkpoint.

    weights: "ema", the moving average, or "raw". Raises UserError."""
    content = read_checkpoint(file)
    module = importlib.import_module(content["name"])
    model = module.Model(module.Config(**content["config"]))
    model.load_state_dict(content["ema" if weights == "ema" else "model"])
    path = content["path"]
    diffusion = DIFFUSIONS[path["kind"]](**path["options"])
    return model.to(device).eval(), diffusion.to(device), content


def restore(file, content, model, ema, optimizers, diffusion):
    """Continue a run: copy a checkpoint's state into the model, average and optimizers -> the step
    at which it stopped. Raises UserError if the checkpoint does not fit them."""
    settings = [[{k: v for k, v in group.items() if k not in ("params", "lr")}
                 for group in optimizer.param_groups] for optimizer in optimizers]
    state, options, ours = content, GATHERED, of_model(optimizers, diffusion)
    try:
        with no_warnings():
            if "shards" in content:                     # any number of processes may have written
                state, options = training_state(model, ema, ours), None
                del state["optimizer"]["param_groups"]
                dcp.load(state, storage_reader=Shards(file.parent, content["shards"]))
                state["optimizer"]["param_groups"] = content["groups"]
            set_model_state_dict(model, state["model"], options=options)
            set_model_state_dict(ema, state["ema"], options=options)
            state["optimizer"]["param_groups"][0]       # torch would accept a state without groups
            set_optimizer_state_dict(model, ours, state["optimizer"], options=options)
            diffusion.load_state_dict(content["path"]["weights"])
            for optimizer, saved in zip(optimizers[len(ours):], content["path"]["optimizer"]):
                optimizer.load_state_dict(saved)
            for optimizer, given in zip(optimizers, settings):
                check_moments(optimizer)
                for group, setting in zip(optimizer.param_groups, given, strict=True):
                    group |= setting                    # betas and the like come from this run
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError,
            CheckpointException) as error:
        raise UserError(f"{file}: its optimizer or diffusion does not fit this run, or it is "
                        f"damaged ({reason(error)})") from None
    return content["step"]


def check_same_run(args, content, cfg, diffusion, data):
    """--resume continues a run; it must not turn it into another one. Raises UserError."""
    theirs = dict(content["config"], model=content["name"], **content["path"]["options"],
                  **(dict(muon_lr=0.0) | content.get("recipe", {})))
    ours = dict(asdict(cfg), model=args.model, **diffusion.options,
                **{k: vars(args)[k] for k in RECIPE})
    for k in theirs:
        if ours.get(k, theirs[k]) != theirs[k]:
            raise UserError(f"--resume: {k} was {theirs[k]}, now {ours[k]}; keep it or change "
                            "--out")
    check_same_data(content["data"], data.about())


def check_same_data(theirs, ours):
    """The data of --resume must be those that the run began with. Their folder may have moved, and
    a tenth of the files may have been mended: then the names are the same, not the sizes. Older
    checkpoints know no fingerprint, so their folder must not have moved. Raises UserError."""
    keys = dict(names="classes", hold_out="--hold-out", count="number of training images",
                kind="kind of latents", scale="scale of the latents", shift="shift of the latents")
    old = dict(source="folder", latent_kind="--latent-kind", names="classes")
    for k, what in (keys if "fingerprint" in theirs else old).items():
        was, now = theirs.get(k, ours[k]), ours[k]
        if was != now and was != []:
            if k == "names":                            # only those that differ
                was, now = ([n for n in a if n not in b][:5] for a, b in ((was, now), (now, was)))
            raise UserError(f"--resume: {what} of {ours['source']}: was {was}, now {now}; keep it "
                            "or change --out")
    if theirs.get("fingerprint", ours["fingerprint"]) != ours["fingerprint"]:
        raise UserError(f"--resume: the files of {ours['source']} have other names or labels than "
                        "when the run began; keep them or change --out")
    pairs = list(zip(theirs.get("sizes", ""), ours["sizes"]))
    changed = sum(a != b for a, b in pairs)
    if changed > max(1, len(pairs) // 10):
        raise UserError(f"--resume: {changed} of {len(pairs)} files of {ours['source']} have "
                        "another size than when the run began; keep them or change --out")


def detect_previous_run(args, rank, world_size):
    """Is there a checkpoint in --out? Process 0 looks, and all of them get its answer."""
    last = args.out / "last.pt"
    return from_rank_0(on_all_ranks(lambda: rank == 0 and last.exists(), world_size), world_size)


def prepare_run_dir(args, previous_run):
    """Make the folder of a run. A new run moves an earlier one aside instead of overwriting it."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / ".write"
        probe.touch(), probe.unlink()
        for part in (*args.out.glob("last.pt.*.tmp"), *args.out.glob("metrics.jsonl.*.tmp")):
            part.unlink()                               # of a run that was killed while it wrote
        if previous_run and not args.resume:
            names = ("metrics.jsonl", "samples", "last.pt")
            numbers = (f"previous_{n}_" for n in itertools.count(2))        # after previous_
            free = next(start for start in itertools.chain(["previous_"], numbers)
                        if not any((args.out / f"{start}{name}").exists() for name in names))
            for name in names:
                if (args.out / name).exists():
                    os.replace(args.out / name, args.out / f"{free}{name}")
            print(f"the earlier run in --out was kept as {free}last.pt", flush=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None


# ======================================================================== files from strangers
#
# weights_only builds tensors and plain types and runs no code. It does not check whether a zip file
# unpacks to more than itself, nor its checksums, nor tensors that repeat one number a billion times
# by a stride of 0, nor whether a config fits the tensors. That is done here, before anything of
# that size is allocated.


def load_untrusted(file, ours=True):
    """torch.load of a file that anybody may have written. ours: written by train.py, hence a zip
    file; a few old official files are not. Raises ValueError, or what torch raises."""
    if not file.is_file():
        raise UserError("not a regular file")
    size, zipped = file.stat().st_size, ours or zipfile.is_zipfile(file)
    if zipped:
        check_zip(file, size)
    with no_warnings():
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped and not ours)
    tensors = tensors_in(content)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for t in tensors if is_plain(t)}        # two state dicts may share their tensors
    if sum(storages.values()) > size or any(
            t.numel() * t.element_size() > (t.untyped_storage().nbytes() if is_plain(t) else size)
            for t in tensors):
        raise UserError("larger inside than outside")
    return content


def check_zip(file, size):
    """torch never compresses, so an honest file is at least as large as what it holds."""
    with zipfile.ZipFile(file) as z:
        entries = z.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > size:
            raise UserError("larger inside than outside")
        if z.testzip():
            raise UserError("wrong checksum")


def tensors_in(content):
    """All tensors, each once, however the containers are nested or refer to each other."""
    seen, todo = {}, [content]
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen[id(one)] = one
            todo += [*one.keys(), *one.values()] if isinstance(one, dict) else (
                list(one) if isinstance(one, (list, tuple, set)) else [])
    return [one for one in seen.values() if torch.is_tensor(one)]


def is_plain(t, device="cpu"):
    """An ordinary tensor: not sparse, not quantized, on this device."""
    return (torch.is_tensor(t) and t.layout is torch.strided and t.device.type == device
            and not t.is_quantized)


TYPES = dict(name=str, config=dict, path=dict, data=dict, step=int, optimizer=dict, recipe=dict)
DATA_TYPES = dict(source=str, names=list, latent=bool, latent_kind=(str, type(None)),
                  size=(int, type(None)), scale=(float, type(None)), shift=float,
                  kind=(str, type(None)), count=int, hold_out=(float, type(None)), sizes=str,
                  fingerprint=str)


def check_content(content, file):
    """Check everything that later code relies on, in place; rename the fields of older configs, and
    turn the weights of a file of experiments/ship.py into float32.

    The config is checked against the tensors on the meta device, which allocates nothing."""
    if not isinstance(content, dict) or content["format"] != FORMAT:
        raise UserError(f"not of format {FORMAT}")
    for table, types in ((content, TYPES), (content["data"], DATA_TYPES)):
        for k, kind in types.items():
            if k in table and not isinstance(table[k], kind):
                raise UserError(f"{k} is a {type(table[k]).__name__}")
    if content["name"] not in MODELS:
        raise UserError("unknown model")
    if "model" not in content and "shards" not in content:      # of experiments/ship.py, in fp16
        content["model"] = content["ema"] = {k: w.float() if w.dtype is torch.half else w
                                             for k, w in content["ema"].items()}
    check_source(content["data"]["source"])
    scale, shift = content["data"].get("scale"), content["data"].get("shift", 0.0)
    if content.get("step", 0) < 0 or not (scale is None or 0 < scale <= 1e30) or not (
            abs(shift) <= 1e30):
        raise UserError("impossible step, scale or shift")
    if any(k not in RECIPE or type(v) not in (int, float) for k, v in content.get(
            "recipe", {}).items()):
        raise UserError("recipe")
    renamed = RENAMED_FIELDS.get(content["name"], {})
    content["config"] = {renamed.get(k, k): v for k, v in content["config"].items()}
    cfg = check_config(content["name"], content["config"])
    options = content["path"]["options"]
    if any(type(v) not in (str, int, float) for v in options.values()) or not (
            options.get("clusters", 1) in range(1, DDPM.T + 1)
            and 0 <= options.get("gamma", 0) < math.inf):
        raise UserError("options of the diffusion")
    DIFFUSIONS[content["path"]["kind"]](**options)
    check_weights(content, cfg, file)


def check_source(source):
    """Programs print where images came from: no character of it may command the terminal. Spaces of
    every width are fine. Training asks here, too, before its first step. Raises UserError."""
    if not all(c.isprintable() or unicodedata.category(c) == "Zs" for c in source):
        raise UserError(f"source {ascii(source)[:200]}: this name cannot be printed")


def check_weights(content, cfg, file):
    """Do the tensors have the names, shapes and types that the config says?"""
    if "shards" in content:
        folder = file.parent / Path(content["shards"]).name
        there = sum(part.stat().st_size for part in folder.iterdir())
    else:
        there = sum(t.numel() for t in tensors_in(content["model"]))
    if 10 * cfg.depth * cfg.dim**2 + getattr(cfg, "experts", 0) > there:    # a lower bound
        raise UserError("config says more weights than there are")
    with torch.device("meta"):
        expected = importlib.import_module(content["name"]).Model(cfg).state_dict()
    if "shards" in content:                             # their own table tells where tensors lie
        if sum(v.numel() for v in expected.values()) > there:
            raise UserError("config says more weights than there are")
        return
    expected = {k: (v.shape, v.dtype) for k, v in expected.items()}
    for weights in ("model", "ema"):
        found = {k: (v.shape, v.dtype) if is_plain(v) else None
                 for k, v in content[weights].items()}
        if found != expected:
            raise UserError(f"{weights} does not fit the config")


def check_moments(optimizer):
    """The fused AdamW trusts shapes: it would read and write beyond a moment that is too small."""
    muon = isinstance(optimizer, Muon)
    moments = ["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq"]
    for p, state in optimizer.state.items():
        for k, wanted in [(k, p) for k in moments] + ([] if muon else [("step", torch.zeros(()))]):
            v = state[k]
            if (v.shape, v.dtype, v.layout) != (wanted.shape, wanted.dtype, torch.strided):
                raise ValueError(k)


class TableOfContents(pickle._Unpickler):
    """dcp keeps the table of contents of a sharded checkpoint as a pickle. Only the classes that
    such a table consists of are allowed. (This is Python's own unpickler, because the one in C
    allocates as much memory as a file asks for.)"""

    CLASSES = {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_StorageInfo",
               "TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
               "PosixPath", "WindowsPath", "_get_layout", "Size"}
    MODULES = {"torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
               "torch.distributed.checkpoint.filesystem", "pathlib", "pathlib._local"}

    def find_class(self, module, name):
        if module not in self.MODULES or not (
                name in self.CLASSES or isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


class Shards(FileSystemReader):
    """dcp's reader with a safe table of contents, which checks each piece as whole files are."""

    def __init__(self, out, name):
        super().__init__(out / Path(name).name)

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as f:
            table = TableOfContents(f).load()
        table.storage_meta.load_id = self.load_id
        return table

    def read_data(self, plan, planner):
        for item in plan.items:
            piece = self.storage_data[item.storage_index]
            file = Path(self.path) / Path(piece.relative_path).name
            if piece.relative_path != file.name or not file.is_file() or (
                    piece.transform_descriptors) or not 0 <= piece.length <= file.stat().st_size:
                raise UserError(f"{piece.relative_path} is no shard")
            with open(file, "rb") as f:
                f.seek(piece.offset)
                check_zip(io.BytesIO(f.read(piece.length)), piece.length)
        return super().read_data(plan, planner)


def reason(error):
    """What is wrong with a file, in a few words."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, UserError):
        return str(error)
    return f"it holds {code[1]}, which could run code" if code else type(error).__name__


@contextmanager
def no_warnings():
    """torch warns about kinds of tensors that are rejected here anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
