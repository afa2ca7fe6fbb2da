"""Train the variants of a claim over several seeds, measure all of them alike, print one table.

    python -m experiments.compare dtr               DiT, random routing, DTR           (DTR, Sec. 5)
    python -m experiments.compare dydit --jobs 2    dense DiT against lambda 0.7 and 0.5
    python -m experiments.compare dtr --show        the table of what has been measured so far

Every run is train.py with the options below, nothing else. The result of a run is written to
experiments/results/STUDY.json as soon as it is there. Rerun the same command to resume a comparison
that was stopped."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

import torch

import data
from common.checkpoint import load_model
from common.cli import Parser, UserError, number, run_program
from common.files import read_json, write_json

HERE = Path(__file__).resolve().parent
FASHION = ["--tiny", "--data", "fashion-mnist"]
DDPM = [*FASHION, "--path", "ddpm"]
DDIM = ["--solver", "ddim", "--steps", "25"]            # of the DDPM rows; flows: euler, 25 steps

LAMBDA_7 = ["--tiny", "--set", "target=0.7"]
LAMBDA_5 = ["--tiny", "--set", "target=0.5"]
LONGER = ["--tiny", "--steps", "800", "--set", "target=0.5", "hard_gates_from=500"]

# study: (seeds, {variant: (model, parent, options of train.py, options of metrics.py)}). A parent
# is the variant whose checkpoint of the same seed is the dense start (--init).
STUDIES = {
    "dtr": (3, {
        "DiT": ("dit", None, DDPM, DDIM),
        "DiT + random routing": ("dtr", None, [*DDPM, "--set", "route=random", "per_block=true"],
                                 DDIM),
        "DiT + DTR": ("dtr", None, DDPM, DDIM)}),
    "weighting": (1, {
        "Min-SNR": ("dtr", None, [*DDPM, "--weighting", "min-snr"], DDIM),
        "ANT-UW": ("dtr", None, [*DDPM, "--weighting", "ant-uw"], DDIM)}),
    "dydit": (3, {
        "dense": ("dit", None, FASHION, []),
        "lambda 0.7": ("dydit", "dense", LAMBDA_7, []),
        "lambda 0.5": ("dydit", "dense", LAMBDA_5, []),
        "lambda 0.5, 800 steps": ("dydit", "dense", LONGER, [])}),
    "dydit-ddpm": (1, {
        "dense": ("dit", None, DDPM, DDIM),
        "lambda 0.7": ("dydit", "dense", LAMBDA_7, DDIM),
        "lambda 0.5": ("dydit", "dense", LAMBDA_5, DDIM),
        "lambda 0.5, 800 steps": ("dydit", "dense", LONGER, DDIM)}),
}
COLUMNS = {"frechet": "Frechet", "accuracy": "accuracy", "precision": "precision",
           "recall": "recall", "loss": "val. loss", "flops": "FLOPs"}


def call(*command):
    """A program of this suite in a process of its own, on one thread."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))}: {done.stderr[-500:]}")


def train_one(study, variant, seed, n):
    """Train, or resume, then measure -> the numbers of one run."""
    model, parent, options, metric_options = STUDIES[study][1][variant]
    folder = Path("runs") / study
    out = folder / f"{variant.replace(' ', '_')}-{seed}"
    init = ["--init", folder / f"{parent}-{seed}/last.pt"] if parent else []
    call("train.py", "--model", model, *init, *options, "--sample-every", 0, "--seed", seed,
         "--out", out, "--resume")
    call("-m", "experiments.metrics", out / "last.pt", "--n", n, "--json", out / "metrics.json",
         *metric_options)
    numbers = read_json(HERE.parent / out / "metrics.json")
    del numbers["json"]                                 # where it was written says nothing
    numbers["flops"] = flops_ratio(HERE.parent / out / "last.pt")
    return numbers


def flops_ratio(checkpoint):
    """Mean of aux["flops"] in eval mode over held-out images and all times; None without it."""
    model, diffusion, about = load_model(checkpoint)
    x0, y = data.held_out(about).batch(torch.arange(500))
    t = diffusion.from_uniform((torch.arange(500) + 0.5) / 500)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        aux = model(diffusion.q_sample(x0, noise, t), t, y)[1]
    return aux["flops"].mean().item() if "flops" in aux else None


def run(study, jobs, n):
    """All runs of a study, parents first, `jobs` at a time."""
    results, lock = results_of(study), Lock()
    seeds, variants = STUDIES[study]

    def one(variant, seed):
        numbers = train_one(study, variant, seed, n)
        with lock:
            results.setdefault(variant, {})[str(seed)] = numbers
            write_json(HERE / "results" / f"{study}.json", results)
            print(f"{variant}, seed {seed}: Frechet {numbers['frechet']:.3f}, "
                  f"accuracy {numbers['accuracy']:.1%}", flush=True)

    for children in (False, True):
        with ThreadPoolExecutor(jobs) as pool:
            runs = [pool.submit(one, name, seed) for seed in range(seeds)
                    for name, (_, parent, _, _) in variants.items()
                    if bool(parent) == children and str(seed) not in results.get(name, {})]
            for r in runs:
                r.result()


def results_of(study):
    file = HERE / "results" / f"{study}.json"
    return read_json(file) if file.exists() else {}


def show(study):
    """A Markdown table: mean +- standard deviation over seeds."""
    results = results_of(study)
    rows = [["", "seeds", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    measured = [v for v in STUDIES[study][1] if v in results]
    for variant in measured:
        runs = list(results[variant].values())
        row = [variant, str(len(runs))]
        for key in COLUMNS:
            values = [r[key]["mean"] if key == "loss" else r[key] for r in runs]
            values = [v for v in values if v is not None]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            row.append(f"{mean(values):.3f}{spread}" if values else "1")
        rows.append(row)
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    for variant in measured:
        bins = zip(*(r["loss"]["bins"] for r in results[variant].values()))
        print(f"val. loss by tenth of t, {variant}: " + " ".join(f"{mean(b):.4f}" for b in bins))


def main(argv):
    p = Parser(prog="compare.py", description="Train the variants of a claim and compare them.")
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--jobs", type=number(int, 1, 1000), default=1, help="runs at a time")
    p.add_argument("--n", type=number(int, 4, 10**6), default=1000, help="samples per run")
    p.add_argument("--show", action="store_true", help="only the table of what has been measured")
    args = p.parse_args(argv)
    if not args.show:
        run(args.study, args.jobs, args.n)
    show(args.study)


if __name__ == "__main__":
    sys.exit(run_program("compare.py", main, sys.argv[1:]))
