"""Train the variants of a claim over several seeds, measure all of them alike, print one table.

    python -m experiments.compare dtr               DiT, random routing, DTR           (DTR, Sec. 5)
    python -m experiments.compare dydit --jobs 2    dense DiT against lambda 0.7 and 0.5
    python -m experiments.compare dtr --show        the table of what is measured so far

Every run is train.py with the options below, nothing else. A finished run is written to
experiments/results/STUDY.json at once, so a comparison that was cut off goes on where it stopped."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

from train import Parser, answer, number

HERE = Path(__file__).resolve().parent
FASHION = ["--tiny", "--data", "fashion-mnist", "--sample-every", "0"]
DDPM = [*FASHION, "--path", "ddpm"]
SOLVER = ["--solver", "ddim", "--steps", "25"]          # of the DDPM rows; flows: euler, 25 steps

# study: (seeds, {variant: (model, options of train.py, options of the metrics)}). "parent" names the
# variant whose checkpoint of the same seed is the dense start.
STUDIES = {
    "dtr": (3, {
        "DiT": ("dit", DDPM, SOLVER),
        "DiT + random routing": ("dtr", [*DDPM, "--set", "route=random",
                                         "per_block=true"], SOLVER),
        "DiT + DTR": ("dtr", DDPM, SOLVER)}),
    "weighting": (1, {
        "Min-SNR": ("dtr", [*DDPM, "--weighting", "min-snr"], SOLVER),
        "ANT-UW": ("dtr", [*DDPM, "--weighting", "ant-uw"], SOLVER)}),
    "dydit": (3, {
        "dense": ("dit", FASHION, []),
        "lambda 0.7": ("dydit", ["--tiny", "parent=dense", "--set", "target=0.7"], []),
        "lambda 0.5": ("dydit", ["--tiny", "parent=dense", "--set", "target=0.5"], []),
        "lambda 0.5, 800 steps": ("dydit", ["--tiny", "parent=dense", "--steps", "800", "--set",
                                            "target=0.5", "quiet=500"], [])}),
    "dydit-ddpm": (1, {
        "dense": ("dit", DDPM, SOLVER),
        "lambda 0.7": ("dydit", ["--tiny", "parent=dense", "--set", "target=0.7"], SOLVER),
        "lambda 0.5": ("dydit", ["--tiny", "parent=dense", "--set", "target=0.5"], SOLVER),
        "lambda 0.5, 800 steps": ("dydit", ["--tiny", "parent=dense", "--steps", "800", "--set",
                                            "target=0.5", "quiet=500"], SOLVER)}),
}
COLUMNS = {"frechet": "Frechet", "accuracy": "accuracy", "precision": "precision", "recall": "recall",
           "loss": "val. loss", "flops": "FLOPs"}


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE.parent, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command))}: {done.stderr[-500:]}")


def train_one(study, variant, seed, n):
    """Train, then measure -> the numbers of one run. What is already trained is not trained again."""
    model, options, judge = STUDIES[study][1][variant]
    out = Path("runs") / study / f"{variant.replace(' ', '_')}-{seed}"
    for i, option in enumerate(options):
        if option.startswith("parent="):
            parent = Path("runs") / study / f"{option[7:]}-{seed}" / "last.pt"
            options = [*options[:i], "--init", parent, *options[i + 1:], "--sample-every", "0"]
    call("train.py", "--model", model, *options, "--seed", seed, "--out", out, "--resume")
    result = HERE.parent / out / "metrics.json"
    call("-m", "experiments.metrics", out / "last.pt", "--n", n, "--json", result, *judge)
    numbers = json.loads(result.read_text())
    del numbers["json"]                                 # where it was written says nothing
    numbers["flops"] = flops_ratio(HERE.parent / out / "last.pt")
    return numbers


def flops_ratio(checkpoint):
    """Mean of aux["flops"] in eval mode over held-out pictures and times, None if the model has none."""
    import torch

    import data
    import sample
    model, path, saved = sample.load(checkpoint)
    held_out = data.held_out(saved)
    x0, y = held_out.batch(torch.arange(500))
    t = path.grid((torch.arange(500) + 0.5) / 500)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        aux = model(path.mix(x0, noise, t), t, y)[1]
    return aux["flops"].mean().item() if "flops" in aux else None


def run(study, jobs, n):
    """All runs of a study, parents first, `jobs` at a time."""
    file = HERE / "results" / f"{study}.json"
    results, lock = read(file), Lock()
    seeds, variants = STUDIES[study]

    def one(variant, seed):
        numbers = train_one(study, variant, seed, n)
        with lock:
            results.setdefault(variant, {})[str(seed)] = numbers
            file.parent.mkdir(exist_ok=True)
            beside = file.with_suffix(".tmp")
            beside.write_text(json.dumps(results, indent=1))
            os.replace(beside, file)
            print(f"{variant}, seed {seed}: Frechet {numbers['frechet']:.3f}, "
                  f"accuracy {numbers['accuracy']:.1%}", flush=True)

    children = {v for v, (_, options, _) in variants.items() if any("parent=" in o for o in options)}
    for group in (set(variants) - children, children):
        with ThreadPoolExecutor(jobs) as pool:
            runs = [pool.submit(one, v, s) for s in range(seeds) for v in variants
                    if v in group and str(s) not in results.get(v, {})]
            for r in runs:
                r.result()


def read(file):
    return json.loads(file.read_text()) if file.exists() else {}


def show(study):
    """A Markdown table: mean +- standard deviation over seeds."""
    results = read(HERE / "results" / f"{study}.json")
    rows = [["", "seeds", *COLUMNS.values()]]
    for variant in (v for v in STUDIES[study][1] if v in results):
        runs = list(results[variant].values())
        row = [variant, str(len(runs))]
        for key in COLUMNS:
            values = [r[key]["mean"] if key == "loss" else r[key] for r in runs]
            values = [v for v in values if v is not None]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            row.append(f"{mean(values):.3f}{spread}" if values else "1")
        rows.append(row)
    print("\n".join("| " + " | ".join(r) + " |" for r in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))
    for variant in (v for v in STUDIES[study][1] if v in results):
        bins = zip(*(r["loss"]["bins"] for r in results[variant].values()))
        print(f"val. loss by tenth of t, {variant}: " + " ".join(f"{mean(b):.4f}" for b in bins))


def main(argv):
    p = Parser(prog="compare", description="Train the variants of a claim and compare them.",
               allow_abbrev=False)
    p.add_argument("study", choices=STUDIES)
    p.add_argument("--jobs", type=number(int, 1, 1000), default=1, help="runs at a time")
    p.add_argument("--n", type=number(int, 4, 10**6), default=1000, help="samples per run")
    p.add_argument("--show", action="store_true")
    args = p.parse_args(argv)
    if not args.show:
        run(args.study, args.jobs, args.n)
    show(args.study)


def cli(argv):
    return answer("compare", main, argv)


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
