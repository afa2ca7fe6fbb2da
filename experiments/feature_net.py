"""The feature net: a small fixed classifier whose 64 features stand in for Inception's 2048.

    python -m experiments.feature_net --data DATA     trains it, 2 to 6 minutes on one core

1. FID compares images by the features of a network that has seen such images. Inception has not
   seen 28x28 digits, and its 2048 x 2048 covariance needs tens of thousands of samples.
2. Therefore we train 65 thousand weights once to classify a data set, and ship them in assets/.
3. The 64 numbers before the last layer are the features. The predicted class gives the class
   accuracy of samples.
4. SHA256SUMS fixes the file: two people who report the same metric used the same network.
5. A network belongs to its data, not to a name: that of a folder is filed under the fingerprint of
   what the folder holds. The shipped ones are never overwritten; to train one anew, move it away.

    x (n, C, S, S) -> conv 16 -> conv 28, half -> conv 28 + -> conv 64, half -> conv 64 +
                   -> mean over the image = features (n, 64) -> linear -> logits (n, classes)

Letters: n batch, C channels, S side of the image.  Read next: FeatureNet, train().

Figures of this network compare methods on one data set, within this suite. They are no FID and
compare to nothing outside it. The network never sees the held-out images during its training; its
accuracy on them is stored in the file and is the figure to compare the accuracy of samples with."""

import hashlib
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from common.cli import Parser, UserError, number, run_program
from common.files import write_atomic

ASSETS = Path(__file__).resolve().parent / "assets"


class Conv(nn.Module):
    """3x3 convolution, norm, GELU; added to its input where the shape stays the same."""

    def __init__(self, n_in, n_out, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(n_out)
        self.skip = n_in == n_out

    def forward(self, x):
        y = F.gelu(self.norm(self.conv(x)))
        return x + y if self.skip else y


class FeatureNet(nn.Module):
    """x (n, C, S, S) in [-1, 1] -> features (n, 64), logits (n, classes)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.body = nn.Sequential(
            Conv(channels, 16),                                                 # (n, 16, S, S)
            Conv(16, 28, 2), Conv(28, 28),                                      # (n, 28, S/2, S/2)
            Conv(28, 64, 2), Conv(64, 64))                                      # (n, 64, S/4, S/4)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        features = self.body(x).mean((2, 3))                                    # (n, 64)
        return features, self.head(features)


def shift(x, most, generator):
    """Move every image of x (n, C, S, S) by up to `most` pixels; its border is repeated."""
    n, _, size, _ = x.shape
    x = F.pad(x, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator) + torch.arange(size)
    return x[torch.arange(n)[:, None, None], :, down[:, :, None], right[:, None]].movedim(-1, 1)


@torch.no_grad()
def accuracy(net, images):
    """The share of a Dataset's images that the network classifies correctly."""
    net.eval()
    correct = 0
    for ids in torch.arange(len(images)).split(500):
        x, y = images.batch(ids)
        correct += (net(x)[1].argmax(1) == y).sum().item()
    return correct / len(images)


def train(images, epochs, batch=128, lr=4e-3, seed=0, log=print):
    """AdamW with warm-up and cosine decay, smoothed labels, shifted (and mirrored) images of a
    Dataset -> the network."""
    torch.manual_seed(seed)
    batch, generator = min(batch, len(images)), torch.Generator().manual_seed(seed)
    net = FeatureNet(images.channels, images.classes)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    steps, step, start = epochs * (len(images) // batch), 0, time.time()
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(len(images), generator=generator)
        for ids in order.split(batch)[: len(images) // batch]:
            x, y = images.batch(ids)
            if images.flips:
                mirror = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                x = torch.where(mirror, x.flip(-1), x)
            step += 1
            warmup, decay = min(1, step / 200), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            opt.param_groups[0]["lr"] = lr * warmup * decay
            loss = F.cross_entropy(net(shift(x, 2, generator))[1], y, label_smoothing=0.1)
            opt.zero_grad()
            loss.backward()
            opt.step()
        log(f"epoch {epoch + 1:2d} of {epochs}   loss {loss.item():.3f}   "
            f"{time.time() - start:4.0f} s")
    return net


def save(net, images, test_accuracy, folder=None):
    """Write the weights as fp16, what is needed to use them, and their checksum -> the file."""
    folder = folder or ASSETS
    file = find_file(images.source, folder, images)
    refuse_shipped(images.source, file)
    state = {k: v.half() for k, v in net.state_dict().items() if v.is_floating_point()}
    content = dict(state=state, source=file.stem, channels=images.channels, size=images.size,
                   classes=images.classes, accuracy=test_accuracy)
    write_atomic(file, lambda f: torch.save(content, f))
    write_sum(file)
    return file


def find_file(source, folder, images=None):
    """Where the feature net of a source is. images: its training split, if it is loaded already."""
    if source in data.NAMED:
        return folder / f"{source}.pt"
    name = re.sub(r"[^\w.-]", "_", Path(source).expanduser().resolve().name)
    return folder / f"{name}-{(images or data.load(source)).fingerprint[:12]}.pt"


def refuse_shipped(source, file):
    if source in data.NAMED and file.exists():
        raise UserError(f"{file}: is there already, and metrics that were measured with it could "
                        "no longer be compared; move it away to train another")


def read_sums(folder):
    """SHA256SUMS, the format of `sha256sum -c` -> {file name: checksum}."""
    file = folder / "SHA256SUMS"
    lines = file.read_text().splitlines() if file.exists() else []
    return {line.split()[1]: line.split()[0] for line in lines if len(line.split()) == 2}


def write_sum(file):
    """Put the checksum of a file into SHA256SUMS beside it."""
    sums = read_sums(file.parent) | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    lines = "".join(f"{sums[k]}  {k}\n" for k in sorted(sums))
    write_atomic(file.parent / "SHA256SUMS", lambda f: f.write(lines.encode()))


def load(source, folder=None):
    """The feature net of a data set -> the network in eval mode, and {"accuracy", "size",
    "channels", "classes", "source"}. Raises UserError if there is none or its checksum differs."""
    folder = folder or ASSETS
    file = find_file(source, folder)
    if not file.exists():
        known = ", ".join(sorted(read_sums(folder))) or "none"
        raise UserError(f"{file.name}: no feature net for this data (there are: {known}); train "
                        f"one: python -m experiments.feature_net --data {source}")
    if read_sums(folder).get(file.name) != hashlib.sha256(file.read_bytes()).hexdigest():
        raise UserError(f"{file}: does not match its checksum in SHA256SUMS")
    about = torch.load(file, map_location="cpu", weights_only=True)
    net = FeatureNet(about["channels"], about["classes"])
    net.load_state_dict({k: v.float() for k, v in about.pop("state").items()})
    return net.eval().requires_grad_(False), about


def main(argv):
    p = Parser(prog="feature_net.py", description="Train the feature net that the metrics use.")
    p.add_argument("--data", default="digits", help="as for train.py; images, not latents")
    p.add_argument("--size", type=number(int, 1, 4096), help="side of the images of a folder")
    p.add_argument("--epochs", type=number(int, 1, 10**4), default=12)
    args = p.parse_args(argv)
    images, test = (data.load(args.data, split, size=args.size) for split in ("train", "test"))
    if images.latent:
        raise UserError(f"{args.data} holds latents; the feature net looks at images")
    refuse_shipped(args.data, find_file(args.data, ASSETS, images))
    print(images.describe())
    net = train(images, args.epochs)
    net.load_state_dict({k: v.half().float() if v.is_floating_point() else v
                         for k, v in net.state_dict().items()})     # as the file will hold them
    correct = accuracy(net, test)
    file = save(net, images, correct)
    count = sum(p.numel() for p in net.parameters())
    print(f"{count:,} weights, {correct:.2%} of {len(test):,} held-out images classified "
          f"correctly: {file.name}, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(run_program("feature_net.py", main, sys.argv[1:]))
