"""Devices and processes: the process group, DDP and FSDP2, bf16, the stop signal.

torchrun starts one process per GPU and tells each its RANK. Without torchrun a program is process 0
of 1, and what is meant for several does nothing."""

import ctypes
import os
import signal
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from common.cli import UserError


def select_device(name=None):
    """cuda, mps or cpu: the name that was asked for, else the first that this machine has."""
    device = name or ("cuda" if torch.cuda.is_available() else
                      "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()            # fails on a device without numbers (meta)
        # cuDNN's attention, torch's first choice on Hopper, has given wrong gradients and is not
        # deterministic; this leaves the flash and the memory-efficient kernels.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return device
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {device}: not available on this machine") from None


def init_distributed(name=None):
    """-> rank, world_size, device of this process."""
    device = select_device(name)
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"                  # what is no tensor is sent by the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                device_id=device if on_gpu else None)
    return dist.get_rank(), dist.get_world_size(), device


def on_all_ranks(work, world_size):
    """Run work() on every process. If one process raises an error, all of them raise it; otherwise
    the others would wait for ever for the one that has left."""
    result = trouble = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        trouble = str(error) or type(error).__name__
    if world_size > 1:
        each = [None] * world_size
        dist.all_gather_object(each, trouble)
        trouble = next((t for t in each if t), None)
    if trouble:
        error = UserError(trouble)
        error.raised_on_all_ranks = True
        raise error
    return result


def from_rank_0(value, world_size):
    """The value that process 0 has, on every process."""
    box = [value]
    if world_size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average_over_ranks(stats, world_size):
    """{name: tensor} -> the same, each tensor averaged over all processes in place."""
    for v in stats.values():
        if world_size > 1:
            dist.all_reduce(v)
            v /= world_size
    return stats


class StopSignal:
    """Ctrl-C or SIGTERM: finish the step, save, leave. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.received = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.receive)

    def receive(self, *_):
        if self.received:
            raise KeyboardInterrupt
        self.received = True


# ------------------------------------------------------------------------ one model, many GPUs


def wants_bf16(amp, device):
    """--amp auto: bf16 where the hardware multiplies it. On a CPU with avx512_bf16 or AMX a step
    takes about 0.6 of its float32 time; on other CPUs bf16 is emulated, and slower."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def tune_device(device, deterministic=False):
    """TF32 on GPUs that have it; on a CPU see tune_malloc(). Where there are two cores, one thread:
    the many small products of experts were measured to be 1.3 times as fast, and two threads wait
    for each other when another program runs. On some machines two are faster: OMP_NUM_THREADS=2. A
    trial at the start could choose, but then another program that runs at that moment would change
    the last digits of a training.

    deterministic: the same bits in each run on a GPU, too, by kernels without atomic additions."""
    torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        tune_malloc()
        if (os.cpu_count() or 1) <= 2 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)


def tune_malloc():
    """Keep large freed blocks in the process. glibc gives them back to the kernel at every free and
    gets them back, zeroed, at the next malloc; training asks for the same blocks at every step, and
    keeping them saves a tenth of its time on a CPU."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 1 << 30)    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass                                            # another C library: nothing to tune


def shard_from_rank_0(make, whole, device, amp):
    """FSDP2 -> a model of which each process keeps its slice of every tensor on its device.

    whole: the model on process 0, None elsewhere. make: its class."""
    have = (whole.cfg, dict(whole.named_buffers())) if whole else None
    cfg, buffers = from_rank_0(have, dist.get_world_size())
    with torch.device("meta"):
        model = make(cfg)
    shard(model, device, amp)
    model.to_empty(device=device)
    set_model_state_dict(model, whole.state_dict() if whole else {},
                         options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, b in model.named_buffers():               # some are not part of the state dict
        b.copy_(buffers[name])
    return model


def shard(model, device, amp):
    """FSDP2. Weights are gathered in bf16, gradients are averaged in float32. Inputs keep their
    type, because bf16 would round t = 0.999 to 1. Routers stay in float32 entirely."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if wants_bf16(amp, device):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    routers = [m for b in model.blocks for m in b.modules() if getattr(m, "full_precision", False)]
    for part in routers:
        fully_shard(part, mesh=mesh)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def wrap(model, fsdp=False):
    """The network that training calls: the model in DDP, or the model itself."""
    if fsdp or not dist.is_initialized():
        return model
    with warnings.catch_warnings():                     # torch 2.13 renames broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DDP(model, broadcast_buffers=False,      # train.py averages what buffers learn from
                   gradient_as_bucket_view=True)        # gradients are sent from where they lie


def compile_blocks(model):
    """Compile the blocks: all have the same code, so that one compilation serves all of them."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


def checkpoint_blocks(model):
    """Activation checkpointing: blocks compute their activations again in the backward pass. Call
    it after compile_blocks()."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def sync_gradients(net, model, now):
    """Average gradients over processes in the next backward pass, or only add them up locally."""
    if isinstance(net, DDP):
        net.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def full_tensor(v):
    """FSDP keeps a slice of a tensor on each process -> the whole of it."""
    return v.full_tensor() if hasattr(v, "full_tensor") else v
