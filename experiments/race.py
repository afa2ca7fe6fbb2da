"""Who wins the race? Experts per token by time, and how evenly experts and pairs of experts are used.

    python -m experiments.race runs/racedit/last.pt             (Expert Race, Fig. 6 and Table 2)

Held-out pictures, noised to ten times, in eval mode: tau decides, as in sampling.
Letters: N blocks, B pictures, L tokens, E experts."""

import json
import sys
from pathlib import Path

import torch

import data
import sample
from racedit import reach, select
from train import Parser, Refusal, answer, number


def max_violation(shared):
    """shared (E, E), tokens that i and j both won -> how far the busiest expert is above the mean:
    0 when even, E/k - 1 when k experts take everything.   (MaxVio, Table 2)"""
    load = shared.diagonal()
    return (load.max() / load.mean() - 1).item()


def combination_usage(shared):
    """-> percentage of the pairs i < j that make up the first 95 % of all shared tokens; about 95
    when all pairs are used alike.   (Comb, Table 2)"""
    i, j = torch.triu_indices(len(shared), len(shared), 1)
    share = shared[i, j].double().sort(descending=True).values
    return 100 * (share.cumsum(0) / share.sum() < 0.95).double().mean().item()


@torch.no_grad()
def watch(model, path, held_out, n=200, times=10):
    """-> experts per token at each time (times,), shared (N, E, E) over all times."""
    scores = []
    hooks = [b.moe.router.register_forward_hook(lambda m, u, out: scores.append(out[0]))
             for b in model.blocks]
    x0, y = held_out.batch(torch.linspace(0, len(held_out) - 1, n).long())
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    per_token, shared = [], 0
    for i in range(times):
        t = path.grid((i + (torch.arange(n) + 0.5) / n) / times)                # fills its tenth
        scores.clear()
        _, aux = model(path.mix(x0, noise, t), t, y.clamp(max=model.cfg.classes))
        per_token.append(aux["map"].mean().item())
        shared = shared + torch.stack([pairs_won(b.moe, S) for b, S in zip(model.blocks, scores)])
    for h in hooks:
        h.remove()
    return per_token, shared


def pairs_won(moe, S):
    """Scores (B, L, E) -> M' (E, E)."""
    Z = {"identity": S, "sigmoid": S.sigmoid(), "softmax": S.softmax(-1)}[moe.cfg.gate]
    winners = reach(Z, moe.tau, moe.cfg.route) if len(moe.tau) else \
        select(Z, moe.cfg.k, moe.cfg.route)[0]
    won = torch.zeros(S.numel()).index_fill(0, winners, 1.0).view(-1, S.shape[-1])
    return won.mT @ won


def main(argv):
    p = Parser(prog="race", description="Experts per token by time, and balance.", allow_abbrev=False)
    p.add_argument("checkpoint", type=Path)
    p.add_argument("--n", type=number(int, 1, 10**6), default=200, help="held-out pictures")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    if args.json and args.json.suffix != ".json":
        raise Refusal(f"--json {args.json}: must end in .json")
    model, path, saved = sample.load(args.checkpoint)
    if saved["name"] != "racedit":
        raise Refusal(f"{args.checkpoint} is a {saved['name']}: only racedit races")
    per_token, shared = watch(model, path, data.held_out(saved), args.n)
    result = dict(k=model.cfg.k, experts_per_token=per_token, mean=sum(per_token) / len(per_token),
                  max_violation=[max_violation(s) for s in shared],
                  combination_usage=[combination_usage(s) for s in shared])
    print("t            " + " ".join(f"{(i + 0.5) / 10:5.2f}" for i in range(10)))
    print("experts/token" + " ".join(f"{v:5.2f}" for v in per_token) + f"   mean {result['mean']:.3f}")
    print("MaxVio per layer  " + " ".join(f"{v:6.2f}" for v in result["max_violation"]))
    print("Comb % per layer  " + " ".join(f"{v:6.1f}" for v in result["combination_usage"]))
    if args.json:
        data.write_whole(args.json, json.dumps(result, indent=1).encode())


def cli(argv):
    return answer("race", main, argv)


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
