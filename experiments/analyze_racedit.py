"""Race-DiT: experts per token by time, and how evenly experts and pairs of experts are used.

    python -m experiments.analyze_racedit runs/racedit/last.pt     (Expert Race, Fig. 6 and Table 2)

Held-out images, noised to times that fill each tenth, in eval mode: as in sampling, tau decides.
Letters: N blocks, B images, L tokens, E experts, k experts per token on average."""

import sys
from pathlib import Path

import torch

import data
from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.files import write_json


def max_violation(shared):
    """shared (E, E): tokens that are assigned to both expert i and expert j -> how far the busiest
    expert is above the mean: 0 when even, E/k - 1 when k experts take everything. (MaxVio, Table 2)
    """
    load = shared.diagonal()
    return (load.max() / load.mean() - 1).item()


def combination_usage(shared):
    """-> the percentage of pairs i < j that make up the first 95 % of all shared tokens; about 95
    when all pairs are used alike. (Comb, Table 2)"""
    i, j = torch.triu_indices(len(shared), len(shared), 1)
    share = shared[i, j].double().sort(descending=True).values
    return 100 * (share.cumsum(0) / share.sum() < 0.95).double().mean().item()


@torch.no_grad()
def measure(model, diffusion, held_out, n=200, times=10):
    """-> experts per token at each time (times,), shared (N, E, E) over all times."""
    shared = torch.zeros(model.cfg.depth, model.cfg.experts, model.cfg.experts)

    def count(layer, inputs):                           # of the expert engine
        x, token, expert, _ = inputs                    # (T, D), then (R,): the pairs that won
        assigned = torch.zeros(len(x), model.cfg.experts)
        assigned[token, expert] = 1.0                                           # (T, E)
        shared[layer] += assigned.mT @ assigned

    hooks = [b.moe.experts.register_forward_pre_hook(lambda m, inputs, i=i: count(i, inputs))
             for i, b in enumerate(model.blocks)]
    n = min(n, len(held_out))
    x0, y = held_out.batch(torch.linspace(0, len(held_out) - 1, n).long())
    noise, per_token = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), []
    for i in range(times):
        t = diffusion.from_uniform((i + (torch.arange(n) + 0.5) / n) / times)   # fills its tenth
        _, aux = model(diffusion.q_sample(x0, noise, t), t, y.clamp(max=model.cfg.classes))
        per_token.append(aux["map"].mean().item())
    for hook in hooks:
        hook.remove()
    return per_token, shared


def main(argv):
    p = Parser(prog="analyze_racedit.py", description="Experts per token by time, and balance.")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--n", type=number(int, 1, 5000), default=200, help="held-out images, at most")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    if args.json and args.json.suffix != ".json":
        raise UserError(f"--json {args.json}: must end in .json")
    model, diffusion, checkpoint = load_model(args.checkpoint)
    if checkpoint["name"] != "racedit":
        raise UserError(f"{args.checkpoint} holds {checkpoint['name']}, not racedit")
    per_token, shared = measure(model, diffusion, data.held_out(checkpoint), args.n)
    result = dict(k=model.cfg.k, experts_per_token=per_token, mean=sum(per_token) / len(per_token),
                  max_violation=[max_violation(s) for s in shared],
                  combination_usage=[combination_usage(s) for s in shared])
    print("t            " + " ".join(f"{(i + 0.5) / 10:5.2f}" for i in range(10)))
    print("experts/token" + " ".join(f"{v:5.2f}" for v in per_token)
          + f"   mean {result['mean']:.3f}")
    print("MaxVio per layer  " + " ".join(f"{v:6.2f}" for v in result["max_violation"]))
    print("Comb % per layer  " + " ".join(f"{v:6.1f}" for v in result["combination_usage"]))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(run_program("analyze_racedit.py", main, sys.argv[1:]))
