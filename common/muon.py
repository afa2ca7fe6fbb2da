"""Muon, the optimizer of the tiny recipe for the weight matrices inside the blocks.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; size of a step: Liu et al. 2025,
arXiv:2502.16982. torch.optim.Muon makes the same steps, but takes no stacks of experts."""

import re

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from common.distributed import full_tensor

HIDDEN = re.compile(r"blocks\.\d+\.(\w+\.)*(qkv|proj|fc1|fc2|w1|w2)(\.weight)?")


def hidden_matrices(model):
    """The parameters that Muon trains: the matrices of attention, MLPs and experts. Everything else
    is left to AdamW: embeddings, adaLN, routers, final layer, biases."""
    return [p for name, p in model.named_parameters() if HIDDEN.fullmatch(name) and p.requires_grad]


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied, so that all directions
    of a weight matrix learn equally fast. A stack of experts (E, m, n) is E matrices.

    The factor 0.2 sqrt(max(m, n)) makes a step about as large as a step of AdamW with the same
    learning rate."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}                                 # matrices of one shape in one product
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape[-2:], []).append(p)
            for (m, n), same in shapes.items():
                parts = []
                for p in same:
                    mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(mean, group["momentum"])                # Nesterov
                    parts.append(full_tensor(ahead).reshape(-1, m, n))
                updates = orthogonalize(torch.cat(parts)).to(same[0].dtype)     # (K, m, n)
                for p, u in zip(same, updates.split([len(part) for part in parts])):
                    u = u.reshape(p.shape)
                    if isinstance(p, DTensor):          # FSDP: this process's slice
                        u = distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None)
                    p.add_(u, alpha=-0.2 * max(m, n) ** 0.5 * group["lr"])


def orthogonalize(g):
    """Five Newton-Schulz steps in bf16 bring all singular values of g (K, m, n) to 0.7 .. 1.2."""
    x = g.to(torch.bfloat16)
    x = x.mT if g.shape[1] > g.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if g.shape[1] > g.shape[2] else x
