"""Building a model and its moving average, from new weights or from a dense checkpoint."""

import copy

import torch

from common.distributed import (
    checkpoint_blocks, compile_blocks, on_all_ranks, shard_from_rank_0)


def make_models(args, module, cfg, dense, rank, world_size, device):
    """-> the model and its moving average, with the same weights on every process. With --fsdp only
    process 0 builds the whole model, in the memory of its host, and sends out the slices.

    dense: a checkpoint to start from (--init), or None."""
    if args.fsdp:
        whole = on_all_ranks(lambda: None if rank else build(args, module, cfg, dense),
                             world_size)
        model, ema = (shard_from_rank_0(module.Model, whole, device, args.amp) for _ in range(2))
    else:
        model = build(args, module, cfg, dense).to(device)
        ema = copy.deepcopy(model)
    model.train(), ema.eval().requires_grad_(False)
    if args.compile:
        compile_blocks(model)
    if args.checkpointing:
        checkpoint_blocks(model)
    return model, ema


def build(args, module, cfg, dense):
    """A model on the CPU, whose initial weights are the same for every kind of device."""
    torch.manual_seed(args.seed)
    if dense and dense["name"] != args.model and hasattr(module, "from_dense"):
        return module.from_dense(dense["ema"], cfg)
    model = module.Model(cfg)
    if dense:
        model.load_state_dict(dense["ema"])
    return model
