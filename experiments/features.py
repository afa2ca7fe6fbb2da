"""The judge: a small fixed network whose 64 features stand in for Inception's 2048.

   1. FID needs a network that has seen the kind of picture it judges; for 28x28 digits Inception
      has not, and its 2048 x 2048 covariance needs tens of thousands of samples.
   2. So we train 65 thousand weights to name the classes of a data set, once, and ship them.
   3. The 64 numbers before its last layer are the features; its class is the class accuracy.
   4. The file is fixed by its SHA-256: two people who report the same metric used the same judge.

        x (n, C, S, S) -> conv 16 -> conv 28, half -> conv 28 + -> conv 64, half -> conv 64 +
                       -> mean over the picture = features (n, 64) -> linear -> classes

   python -m experiments.features --data fashion-mnist      # trains it: 2 to 6 minutes on one core

   Letters: n batch, C channels, S side.                                  Read next: Judge, train()

   Ledger.  Figures made with this judge compare methods on one data set, here; they are no FID and
   compare to nothing outside. The judge never sees the held-out pictures while it learns, and its
   accuracy on them, stored in the file, is the ceiling for the class accuracy of samples.   """

import hashlib
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, load as load_data

ASSETS = Path(__file__).resolve().parent / "assets"


class Conv(nn.Module):
    """3x3 convolution, norm, GELU; added to its input where the shape stays."""

    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(n_out)
        self.skip = n_in == n_out

    def forward(self, x):
        y = F.gelu(self.norm(self.conv(x)))
        return x + y if self.skip else y


class Judge(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.body = nn.Sequential(
            Conv(channels, 16),                                                 # (n, 16, S, S)
            Conv(16, 28, 2), Conv(28, 28),                                      # (n, 28, S/2, S/2)
            Conv(28, 64, 2), Conv(64, 64))                                      # (n, 64, S/4, S/4)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        """x (n, C, S, S) in [-1, 1] -> features (n, 64), logits (n, classes)."""
        features = self.body(x).mean((2, 3))
        return features, self.head(features)


def shift(x, most, generator):
    """Every picture moved by up to `most` pixels, its border repeated."""
    n, _, size, _ = x.shape
    x = F.pad(x, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator) + torch.arange(size)
    return x[torch.arange(n)[:, None, None], :, down[:, :, None], right[:, None]].movedim(-1, 1)


@torch.no_grad()
def accuracy(net, data):
    net.eval()
    hits = 0
    for ids in torch.arange(len(data)).split(500):
        x, y = data.batch(ids)
        hits += (net(x)[1].argmax(1) == y).sum().item()
    return hits / len(data)


def train(data, epochs, batch=128, rate=4e-3, seed=0, log=print):
    """The recipe: AdamW, one warm-up and one cosine, smoothed labels, shifted pictures."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Judge(data.channels, data.classes)
    opt = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    steps, step, began = epochs * (len(data) // batch), 0, time.time()
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(len(data), generator=generator)
        for ids in order.split(batch)[:len(data) // batch]:
            x, y = data.batch(ids)
            if data.flips:
                mirror = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                x = torch.where(mirror, x.flip(-1), x)
            step += 1
            warm, left = min(1, step / 200), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            opt.param_groups[0]["lr"] = rate * warm * left
            loss = F.cross_entropy(net(shift(x, 2, generator))[1], y, label_smoothing=0.1)
            opt.zero_grad()
            loss.backward()
            opt.step()
        log(f"epoch {epoch + 1:2d} of {epochs}   loss {loss.item():.3f}   "
            f"{time.time() - began:4.0f} s")
    return net


def save(net, data, test_accuracy, folder=ASSETS):
    """The weights as fp16 with what they need to be used, and their checksum. -> path"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(data.source).name}.pt"
    state = {k: v.half() for k, v in net.state_dict().items() if v.is_floating_point()}
    part = path.with_suffix(".part")
    torch.save({"state": state, "source": path.stem, "channels": data.channels, "size": data.size,
                "classes": data.classes, "accuracy": test_accuracy}, part)
    os.replace(part, path)
    sums = read_sums(folder) | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "SHA256SUMS").write_text("".join(f"{sums[k]}  {k}\n" for k in sorted(sums)))
    return path


def read_sums(folder):
    """SHA256SUMS, the format of `sha256sum -c` -> {file name: checksum}"""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line.split()[1]: line.split()[0] for line in lines if len(line.split()) == 2}


def load(source, folder=ASSETS):
    """The judge of that data set -> net in eval mode, {"accuracy", "size", "channels", ...}."""
    path = folder / f"{Path(source).name}.pt"
    if not path.exists():
        known = ", ".join(sorted(read_sums(folder))) or "none"
        raise DataError(f"{path.name}: no judge for this data (there are: {known}); train one: "
                        f"python -m experiments.features --data {source}")
    if read_sums(folder).get(path.name) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise DataError(f"{path}: does not match its checksum in SHA256SUMS")
    about = torch.load(path, map_location="cpu", weights_only=True)
    net = Judge(about["channels"], about["classes"])
    net.load_state_dict({k: v.float() for k, v in about.pop("state").items()})
    return net.eval().requires_grad_(False), about


def main(argv=None):
    from train import Parser, Refusal, number
    parser = Parser(description="Train the feature net that the metrics use.", allow_abbrev=False)
    parser.add_argument("--data", default="digits", help="as for train.py; pictures only")
    parser.add_argument("--size", type=number(int, 1, 4096), help="side of the pictures of a folder")
    parser.add_argument("--epochs", type=number(int, 1, 10**4), default=12)
    try:
        args = parser.parse_args(argv)
        data, test = (load_data(args.data, split, size=args.size) for split in ("train", "test"))
        if data.latent:
            raise DataError(f"{args.data}: holds latents; this judge looks at pictures")
    except (Refusal, ValueError, OSError) as error:
        print(f"features.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(data.describe())
    net = train(data, args.epochs)
    net.load_state_dict({k: v.half().float() if v.is_floating_point() else v
                         for k, v in net.state_dict().items()})     # what the file will hold
    right = accuracy(net, test)
    path = save(net, data, right)
    count = sum(p.numel() for p in net.parameters())
    print(f"{count:,} weights, {right:.2%} of {len(test):,} held-out pictures right: {path.name}, "
          f"{path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
