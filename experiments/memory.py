"""How many bytes per GPU would a training run need? A plan, computed without allocating anything.

    python -m experiments.memory --model ditmoe --size G/2 --world 64 --accum 4

The options are those of train.py, plus --world, the number of GPUs. The table has a row for DDP and
for FSDP, with and without --checkpointing:

    weights, gradients, optimizer, ema    float32; FSDP cuts each tensor along its first axis
    copies                                of weights, as matrix products read them: autocast makes a
                                          bf16 copy of each; FSDP gathers a block at a time, this
                                          one and the next; DDP sends gradients from where they are
    activations                           what a forward pass keeps for its backward pass

Activations are counted by running one forward pass on the meta device, whose tensors have shapes
and no content: 16 billion parameters take seconds. Read next: plan_memory()."""

import importlib
import sys
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import train
from common.cli import Parser, UserError, number, run_program
from common.config import make_config, make_diffusion
from common.progress import count


def plan_memory(model, diffusion, loss_of, images, world_size, bf16):
    """{engine: {what: bytes per GPU}} for a number of images per GPU and forward pass. model and
    diffusion are on the meta device; loss_of(diffusion, model, x0, y, step, rng)."""
    parameters, saved = list(model.parameters()), SavedTensors(model, bf16)
    c = model.cfg
    x0 = torch.randn(images, c.channels, c.size, c.size, device="meta")
    y = torch.zeros(images, dtype=torch.long, device="meta")
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):    # routers switch it off
        loss_of(diffusion, model, x0, y, 0, MetaRNG(images))

    def stored(tensors, share=1):                       # FSDP cuts along the first axis
        return sum(-(-t.shape[0] // share) * t[:1].numel() * 4 for t in tensors)

    trained = [p for p in parameters if p.requires_grad]
    width, blocks = (2 if bf16 else 4), [stored(b.parameters()) for b in model.blocks]
    plans = {}
    for engine, share in (("DDP", 1), ("FSDP", world_size)):
        gathered = (2 * max(blocks) + stored(parameters) - sum(blocks)) // 4 * width
        plan = dict(weights=stored(parameters, share), gradients=stored(trained, share),
                    optimizer=2 * stored(trained, share), ema=stored(parameters, share),
                    copies=gathered if engine == "FSDP" else saved.copies)
        for name, count in (("", saved.everything), (" --checkpointing", saved.checkpointed)):
            whole = dict(plan, activations=count())
            plans[engine + name] = dict(whole, sum=sum(whole.values()))
    return plans


class MetaRNG:
    """Stands in for a StepRNG: the shapes of its random numbers, without the numbers."""

    def __init__(self, images):
        self.images, self.first, self.rows = images, 0, torch.arange(images, device="meta")

    def uniform(self, name, *shape):
        return torch.empty(self.images, *shape, device="meta")

    normal = uniform


class SavedTensors(TorchFunctionMode):
    """Adds up what a forward pass on the meta device keeps for its backward pass: bytes, each
    storage once.

    It makes the meta device do what a GPU would: products in bf16 where autocast is on, attention
    in one kernel. Experts share their rows evenly, because their numbers of rows are not known."""

    PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
                torch.addmm, torch.bmm, F.scaled_dot_product_attention}

    def __init__(self, model, bf16):
        super().__init__()
        self.bf16, self.place, self.alive = bf16, "outside", []
        self.bytes, self.inputs, self.copies, self.copied = defaultdict(dict), {}, 0, {}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self.enter, i))
            block.register_forward_hook(self.leave)

    def enter(self, i, block, inputs):
        self.place = i
        for t in (t for t in inputs if torch.is_tensor(t)):
            self.inputs[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            self.alive.append(t)                        # or another storage could get its address

    def leave(self, *_):
        self.place = "outside"

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t)
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def keep(self, t):
        self.alive.append(t)
        key = t.untyped_storage()._cdata
        if key not in self.weights:
            self.bytes[self.place][key] = t.untyped_storage().nbytes()
        return t

    def everything(self):
        return sum({k: v for part in self.bytes.values() for k, v in part.items()}.values())

    def checkpointed(self):
        """Between blocks only their inputs; inside, one block at a time."""
        blocks = [sum(part.values()) for place, part in self.bytes.items() if place != "outside"]
        return sum((self.bytes["outside"] | self.inputs).values()) + max(blocks, default=0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.PRODUCTS and self.bf16 and torch.is_autocast_enabled("cpu"):
            args = [self.to_bf16(a) if torch.is_tensor(a) else a for a in args]
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        if func is torch.Tensor.tolist:
            return EvenSizes(args[0])
        if func is torch.Tensor.split and isinstance(args[1], EvenSizes):
            return args[0].tensor_split(len(args[1]))
        return func(*args, **kwargs)

    def to_bf16(self, a):
        """Autocast remembers its copy of a weight, so each weight is copied once."""
        if a.untyped_storage()._cdata not in self.weights:
            return a.to(torch.bfloat16)
        key = a.untyped_storage()._cdata, a.storage_offset(), a.shape
        if key not in self.copied:
            self.copied[key] = copy = a.to(torch.bfloat16)
            self.weights.add(copy.untyped_storage()._cdata)
            self.copies += copy.untyped_storage().nbytes()
        return self.copied[key]


class EvenSizes(list):
    """Numbers of rows that the meta device does not know."""


def main(argv):
    p = Parser(prog="memory.py", description=f"{__doc__.splitlines()[0]} All options of train.py, "
               "and:")
    p.add_argument("--world", type=number(int, 1, 10**9), default=1, help="number of GPUs")
    own, rest = p.parse_known_args(argv)
    world_size = own.world
    args = train.parse_args([*rest, "--dry-run"])           # --fsdp without torchrun
    if args.batch % (world_size * args.accum):
        raise UserError(f"--batch {args.batch} cannot be divided by {world_size} processes x "
                        f"--accum {args.accum}")
    module, diffusion = importlib.import_module(args.model), make_diffusion(args, None)
    data = train.open_data(args, None) if args.data else None
    with torch.device("meta"):
        model = module.Model(make_config(args, module, diffusion, data, None)).train()
    images = args.batch // (world_size * args.accum)
    bf16 = args.amp != "off"                                # auto means bf16 on a GPU
    loss_of = getattr(module, "loss", train.default_loss)
    plans = plan_memory(model, diffusion.to("meta"), loss_of, images, world_size, bf16)
    print("\n".join(count(module, model)))
    print(f"bytes per GPU, {world_size} x {images} images, {'bf16' if bf16 else 'float32'}; "
          "add a fifth of the activations for what lives shortly")
    rows = ("weights", "gradients", "optimizer", "ema", "copies", "activations", "sum")
    print(f"{'':28}" + "".join(f"{row:>12}" for row in rows))
    for name, plan in plans.items():
        print(f"{name:28}" + "".join(f"{plan[row] / 1e9:9.2f} GB" for row in rows))


if __name__ == "__main__":
    sys.exit(run_program("memory.py", main, sys.argv[1:]))
