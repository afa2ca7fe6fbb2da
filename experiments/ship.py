"""What assets/checkpoints holds of a run: its averaged weights, and its log.

    python -m experiments.ship runs/dit-digits assets/checkpoints/dit-digits "python train.py ..."

NAME.pt is a checkpoint of a quarter of the size, or less: the average alone (no raw weights, no
optimizer), its matrices in fp16. Vectors, such as Race-DiT's tau, stay in float32. After loading
all is float32 (common/checkpoint.py), so every program takes the file. NAME.jsonl: a line with the
settings of the run and the command that made it, then a line per logged step with its loss
(experiments/compare_log.py). SHA256SUMS gets the checksum of NAME.pt. --log-only: no NAME.pt."""

import json
import sys
from pathlib import Path

from common.checkpoint import read_checkpoint, write_checkpoint
from common.cli import Parser, UserError, run_program
from common.files import write_atomic
from experiments.compare_log import read_log
from experiments.feature_net import write_sum


def main(argv):
    p = Parser(prog="ship.py", description="Make a small checkpoint and a log of a run.")
    p.add_argument("run", type=Path, help="a folder of train.py")
    p.add_argument("name", type=Path, help="the files to write, without .pt and .jsonl")
    p.add_argument("command", help="the command that made the run")
    p.add_argument("--log-only", action="store_true")
    args = p.parse_args(argv)
    content, log = read_checkpoint(args.run / "last.pt"), read_log(args.run / "metrics.jsonl")
    if not log:
        raise UserError(f"{args.run / 'metrics.jsonl'}: holds no loss")
    head = {k: content[k] for k in ("format", "name", "config", "step", "data", "recipe")
            if k in content}
    head["path"] = {k: content["path"][k] for k in ("kind", "options")}
    lines = [head | dict(command=args.command), *(dict(step=s, loss=round(v, 5))
                                                  for s, v in log.items())]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(Path(f"{args.name}.jsonl"), lambda f: f.write(text.encode()))
    if not args.log_only:
        file = Path(f"{args.name}.pt")
        write_checkpoint(file, head | dict(
            ema={k: w.half() if w.ndim > 1 else w for k, w in content["ema"].items()}))
        write_sum(file)
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(run_program("ship.py", main, sys.argv[1:]))
