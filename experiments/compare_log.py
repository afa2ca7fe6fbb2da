"""Is a training on track? Its losses beside those of a stored run with the same settings.

    python -m experiments.compare_log runs/racedit          also while it trains, after a first save

Each line of metrics.jsonl has the mean loss since the line before. The stored logs of
assets/checkpoints have a line for every ten steps, so that the same steps can be averaged. Seed,
number of steps and kind of machine may differ. But a run with other --steps lowers its learning
rate at other times, and so is off from then on. Exit code 1: off.

TOLERANCE: 10 % of the expected loss. Of 344 ordered pairs of runs in results/runs/ that differ in
their seed alone (today's recipe), none differed by more in a tenth of the run, and 5 did by more
than 8 %."""

import json
import math
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import mean

from common.checkpoint import read_checkpoint
from common.cli import Parser, UserError, run_program
from common.files import ASSETS

TOLERANCE = 0.10                                        # of the expected loss


def settings(head):
    """Everything that decides the losses but the seed and the steps -> {name: value}."""
    config = import_module(head["name"]).Config(**head["config"])
    data, path = head["data"], head["path"]
    return asdict(config) | path["options"] | head.get("recipe", {}) | dict(
        model=head["name"], path=path["kind"], data=data.get("fingerprint", data["source"]),
        seed=None)


def read_log(file):
    """metrics.jsonl, or a stored log without its first line -> {step: loss}. Steps without a
    finite loss are left out."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        found = {line["step"]: line["loss"] for line in lines if "loss" in line}
        return {step: loss for step, loss in found.items() if math.isfinite(loss)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def compare(log, stored):
    """Two logs, {step: loss} -> [(step, loss, expected), ...], for each tenth of the stored one:
    means over the same steps, up to the last step of the tenth that both logs have."""
    rows, end = [], max(stored)
    for i in range(10):
        own = [s for s in log if i * end < 10 * s <= (i + 1) * end]
        before = max((s for s in log if s < min(own, default=0)), default=0)
        same = [v for s, v in stored.items() if before < s <= max(own, default=0)]
        if same:
            rows.append((own[-1], mean(log[s] for s in own), mean(same)))
    return rows


def main(argv):
    p = Parser(prog="compare_log.py", description="Compare a run's losses with a stored log.")
    p.add_argument("run", type=Path, help="a folder of train.py")
    args = p.parse_args(argv)
    if not args.run.is_dir():
        raise UserError(f"{args.run}: give the folder of a run")
    ours = settings(read_checkpoint(args.run / "last.pt", with_weights=False))
    heads = {file: json.loads(file.read_text().splitlines()[0])
             for file in sorted((ASSETS / "checkpoints").glob("*.jsonl"))}

    def difference(file):
        theirs = settings(heads[file])
        return [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
    nearest = min(heads, key=lambda file: len(difference(file)))
    command = heads[nearest]["command"]
    if difference(nearest):
        raise UserError(f"no stored log has the settings of {args.run}; the nearest is of "
                        f"`{command}`, which differs in {', '.join(difference(nearest))}")
    rows = compare(read_log(args.run / "metrics.jsonl"), read_log(nearest))
    if not rows:
        raise UserError(f"{args.run / 'metrics.jsonl'}: no loss to compare yet")
    print(f"expected: {nearest.name}, {command}\n    step    loss  expected")
    off = [step for step, loss, expected in rows if abs(loss / expected - 1) > TOLERANCE]
    for step, loss, expected in rows:
        print(f"{step:8d}{loss:8.4f}{expected:8.4f} +- {TOLERANCE * expected:.4f}  "
              f"{'off' if step in off else 'on track'}")
    print(f"off from step {off[0]} on" if off else "on track")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(run_program("compare_log.py", main, sys.argv[1:]))
