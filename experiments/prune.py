r"""Static pruning, the rival of DyDiT: half of the heads and half of the MLP channels are gone.

    python -m experiments.prune magnitude --tiny --model dydit --init runs/dit/last.pt \
        --set route=width weight=0                              (DyDiT, Table 2)
    python -m experiments.prune random ...

train.py with a DyDiT whose routers are constants: at all times the first half of the heads and of
the groups of channels is on, and every token is. magnitude: heads and channels are sorted first, so
that the strongest stay (dydit.sort_by_magnitude). random: they are not sorted, and in a trained DiT
their order means nothing. The rest of the options are those of train.py."""

import sys

import torch

import dydit
import train
from common.cli import UserError, run_program


@torch.no_grad()
def half(state, cfg, from_dense=dydit.from_dense):
    """A trained DiT -> a DyDiT that always uses the first half of its heads and groups."""
    if cfg.route != "width" or cfg.weight or cfg.heads < 2:
        raise UserError("pruning needs --set route=width weight=0, and two heads")
    model = from_dense(state, cfg)
    for block in model.blocks:
        for router in (block.attn_rate, block.mlp_rate):
            first = router.always_on                    # the first unit has no row
            router.router.weight.zero_()
            router.router.bias.fill_(-1e4)
            router.router.bias[: cfg.heads // 2 - first] = 1e4
            router.requires_grad_(False)
    return model


def main(argv):
    if argv[:1] not in (["magnitude"], ["random"]):
        raise UserError("say magnitude or random, then the options of train.py")
    if argv[0] == "random":
        dydit.sort_by_magnitude = lambda model: None
    dydit.from_dense = half
    return train.main(argv[1:])


if __name__ == "__main__":
    sys.exit(run_program("prune.py", main, sys.argv[1:]))
