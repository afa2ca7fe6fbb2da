"""How good are the samples? Four numbers from the feature net, and the paired validation loss.

    python -m experiments.metrics runs/dit/last.pt                     draws samples, measures them
    python -m experiments.metrics samples.npz --data fashion-mnist     measures what sample.py wrote
    python -m experiments.metrics samples.npz --fidelity ref.npz       FID and IS by torch-fidelity

1. Frechet distance: both sets of 64 features are compared as Gaussians. It rises with blur, wrong
   shapes and missing classes. Two sets of real images do not reach 0 either: their distance is
   measured at the same N and printed beside it.
2. Class accuracy: how often the feature net predicts the class that was asked for. No other number
   notices wrong labels.
3. Precision: the share of samples that lie among the real images.
4. Recall: the share of real images that lie among the samples. It notices forgotten kinds.

        real o    radius of o = distance to its         precision: x inside the ball of some o
        fake x    3rd nearest o; the same for x         recall:    o inside the ball of some x

5. Paired validation loss: every model meets the same held-out images, times and noise, so that two
   models differ by what they learned and not by luck.

Letters: N images, D features, C channels, S side, k neighbours.  Read next: evaluate().

The real set is N images of the training split, as FID is defined, evenly many per class. "real" is
a second such set without a common image. A class accuracy above the real one is no praise: guidance
makes images that are easier to classify than real ones. Precision and recall follow Kynkaanniemi et
al. 2019 (arXiv:1904.06991, Sec. 2), with 64 features in place of VGG's 4096."""

import functools
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import data
import sample
from common.cli import Parser, UserError, number, run_program
from common.distributed import select_device, tune_device
from common.files import write_json
from common.sampling import add_model_options, choose_cfg, choose_clip, load_sampler
from experiments import feature_net

LIMIT = 1 << 30                                 # bytes that an npz may always unpack to


@functools.lru_cache(maxsize=4)
def load_net(source):
    return feature_net.load(source)


@torch.no_grad()
def features(x, source="digits"):
    """Images (N, C, S, S) in [-1, 1] -> features (N, 64) and logits (N, classes), float32."""
    net, about = load_net(source)
    expected = (about["channels"], about["size"], about["size"])
    if tuple(x.shape[1:]) != expected:
        raise UserError(f"images are {tuple(x.shape[1:])}, but the feature net of {source} was "
                        f"trained on {expected}")
    parts = [net(some.float()) for some in x.split(500)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def frechet(a, b):
    """Frechet distance of Gaussians fitted to features a (N, D) and b (M, D), in float64.

    0 for equal means and covariances; (distance of the means)^2 when only the means differ."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    cov_a, cov_b = torch.cov(a.T).reshape(2 * a.shape[1:]), torch.cov(b.T).reshape(2 * b.shape[1:])
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                     # cov_a^1/2 (D, D)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)                    # rounding may leave -1e-12


def distances(a, b):
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")       # equal rows: 0


def radii(a, k):
    """Distance of every row to its k-th nearest other row (N,), a thousand rows at a time."""
    return torch.cat([distances(some, a).kthvalue(k + 1).values for some in a.split(1000)])


def precision_recall(real, fake, k=3):
    """Shares of fake among real, and of real among fake (Kynkaanniemi Eq. 1-3), both 0..1."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than k = {k} images")

    def share(points, cloud):
        radius = radii(cloud, k)
        inside = [(distances(some, cloud) <= radius).any(1) for some in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share(fake, real), share(real, fake)


@torch.no_grad()
def validation_loss(model, diffusion, held_out, n=1000, seed=0):
    """The mean squared error, without weights and auxiliary losses, on n images of a Dataset.

    The i-th image always meets the same time and noise, whatever the model: compare the losses of
    two models pairwise. Times cover [0, 1) evenly. -> {"mean": float, "bins": ten means by time}"""
    n = min(n, len(held_out))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.linspace(0, len(held_out) - 1, n).long()
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    noise = torch.randn(n, held_out.channels, held_out.size, held_out.size, generator=generator)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses = []
    for rows in torch.arange(n).split(100):
        x0, y = held_out.batch(ids[rows])
        t = diffusion.from_uniform(u[rows].clamp(max=1 - 1e-6))
        loss, _ = diffusion.mse(model, *(v.to(device) for v in (x0, y, t, noise[rows])))
        losses.append(loss.cpu().double())              # MPS has no float64
    model.train(was_training)
    losses, tenth = torch.cat(losses), (10 * u).long().clamp(max=9)             # (n,) each
    bins = [losses[tenth == i].mean().item() if (tenth == i).any() else None for i in range(10)]
    return {"mean": losses.mean().item(), "bins": bins}


@functools.lru_cache(maxsize=2)
def training_images(source):
    return data.load(source, size=load_net(source)[1]["size"])


@functools.lru_cache(maxsize=4)
def real_features(source, n):
    """Features of two sets of n training images, evenly many per class, no image in both."""
    images = training_images(source)
    n = min(n, len(images) // 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    place = torch.zeros(len(images), dtype=torch.int64)     # of an image within its class
    for label in range(images.classes):
        members = order[images.labels[order] == label]
        place[members] = torch.arange(len(members))
    ids = (place * images.classes + images.labels).argsort()[: 2 * n]   # class 0, 1, ..., 0, 1, ...
    feats = features(torch.cat([images.batch(some)[0] for some in ids.split(500)]), source)[0]
    return feats[:n], feats[n:]


def evaluate(samples, labels, source="digits"):
    """samples: float (N, C, S, S) in [-1, 1], or uint8 (N, S, S, 3) as in the npz; labels (N,): the
    class that each was asked for. -> the four numbers, and what real images reach ("..._real")."""
    x = to_images(samples, load_net(source)[1]["channels"])
    labels = torch.as_tensor(labels).long()
    if len(labels) != len(x):
        raise UserError(f"{len(labels)} labels for {len(x)} samples")
    feats, logits = features(x, source)
    if not feats.isfinite().all():
        raise UserError("the samples hold NaN or infinity")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise UserError(f"labels from {labels.min()} to {labels.max()}, for {logits.shape[1]} "
                        f"classes")
    real, other = real_features(source, len(x))
    precision, recall = precision_recall(real, feats)
    precision_real, recall_real = precision_recall(real, other)
    return {"n": len(x), "n_real": len(real), "source": source,
            "frechet": frechet(real, feats), "frechet_real": frechet(real, other),
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "accuracy_real": load_net(source)[1]["accuracy"],
            "precision": precision, "precision_real": precision_real,
            "recall": recall, "recall_real": recall_real}


def to_images(samples, channels):
    """What evaluate() accepts -> float32 (N, C, S, S) in [-1, 1]."""
    samples = torch.as_tensor(samples)
    if samples.ndim != 4 or not len(samples):
        raise UserError(f"samples must have 4 dimensions, not shape {tuple(samples.shape)}")
    if samples.dtype != torch.uint8:
        if not samples.isfinite().all():
            raise UserError("the samples hold NaN or infinity")
        return samples.float().clamp(-1, 1)
    if samples.shape[-1] != 3:
        raise UserError(f"uint8 samples must be (N, S, S, 3), not {tuple(samples.shape)}")
    x = samples.movedim(-1, 1).float() / 127.5 - 1                              # (N, 3, S, S)
    if channels == 1 and not (x[:, :1] == x).all():
        raise UserError("the samples are in colour, the data are grey")
    return x[:, :channels]


def read_npz(file, labels=True):
    """What sample.py --npz writes -> arr_0 uint8 (N, S, S, 3), arr_1 int64 (N,).

    labels=False: the file may have none, like ADM's reference files."""
    try:
        with zipfile.ZipFile(file) as z:            # images shrink by half, not to a hundredth
            unpacked = sum(entry.file_size for entry in z.infolist())
        if unpacked > max(LIMIT, 10 * Path(file).stat().st_size):
            raise UserError(f"unpacks to {unpacked:,} bytes")
        with np.load(file, allow_pickle=False) as arrays:
            samples = arrays["arr_0"]
            labels = arrays["arr_1"] if labels else np.zeros(1, int)
    except Exception as error:                      # damaged files raise a dozen different errors
        raise UserError(f"{file}: cannot be read ({error})") from None
    if samples.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{file}: arr_0 must be uint8 and arr_1 one row of integers")
    return samples, labels


class Images(torch.utils.data.Dataset):
    """arr_0 of an npz as torch-fidelity reads it: uint8 (3, S, S), one by one."""

    def __init__(self, file):
        self.images = read_npz(file, labels=False)[0]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)


def fidelity(file, reference, device):
    """FID and IS by Inception, precision and recall by VGG. reference: an npz with arr_0, or a
    folder of images of the same size.

    These are not the published figures: ADM's evaluator compares with the mean and covariance of
    all of ImageNet, and takes precision and recall by Inception. The 10,000 images that its
    reference file also holds give a higher FID."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise UserError("--fidelity: pip install torch-fidelity (0.4 or later)") from None
    if not Path(reference).exists():
        raise UserError(f"{reference}: no such file or folder")
    real = Images(reference) if str(reference).endswith(".npz") else str(reference)
    found = calculate_metrics(input1=Images(file), input2=real, cuda=device.startswith("cuda"),
                              isc=True, fid=True, prc=True, verbose=False,
                              save_cpu_ram=True)        # 50,000 x 50,000 distances: 10 GB a table
    return {name: float(value) for name, value in found.items()}


def from_checkpoint(args):
    """Draw samples and measure the validation loss -> samples, labels, source, loss; of a model of
    latents the loss alone."""
    tune_device(torch.device(args.device))
    model, diffusion, checkpoint = load_sampler(args.file, args, args.device)
    if args.solver and args.solver not in diffusion.solvers:
        raise UserError(f"--solver {args.solver}: this checkpoint has "
                        f"{', '.join(diffusion.solvers)}")
    if not model.cfg.classes:
        raise UserError(f"{args.file} was trained without classes: there is no class to ask for")
    about = checkpoint["data"]
    if args.data and args.data != about["source"]:      # the same data elsewhere, or others
        same = data.load(args.data).fingerprint == about.get("fingerprint")
        checkpoint["data"] = dict(about if same else {}, source=args.data)
    held_out, source = data.held_out(checkpoint), checkpoint["data"]["source"]
    loss = validation_loss(model, diffusion, held_out)
    if held_out.latent:
        return None, None, source, loss
    load_net(source)                                # fails now, not after the slow part
    labels = torch.arange(args.n) % held_out.classes
    args.cfg, *notes = choose_cfg(args.cfg, checkpoint)
    if notes:
        print(*notes, sep="\n")
    samples = sample.generate(model, diffusion, labels, seed=args.seed, steps=args.steps,
                              solver=args.solver, cfg=args.cfg, amp=args.amp,
                              clip_x0=choose_clip(args, model, checkpoint))
    return samples.cpu(), labels, source, loss


def measure(args):
    """What the command line asks for -> the numbers."""
    is_npz, loss = args.file.endswith(".npz"), None
    if args.fidelity:
        if args.data or not is_npz:
            raise UserError("--fidelity compares an npz of sample.py with REF: no checkpoint and "
                            "no --data")
        return {"fidelity": fidelity(args.file, args.fidelity, args.device)}
    if is_npz:
        if not args.data:
            raise UserError(f"{args.file}: say which --data these samples imitate")
        samples, labels, source = *read_npz(args.file), args.data
    else:
        samples, labels, source, loss = from_checkpoint(args)
    result = {"source": source} if samples is None else evaluate(samples, labels, source)
    return result | ({"loss": loss} if loss else {})


def table(result):
    """The numbers as text."""
    lines = [f"{name:38}{value:10.4f}" for name, value in result.get("fidelity", {}).items()]
    if "frechet" in result:
        same = f"two real sets of {result['n_real']:,}"
        lines += [f"{'':18}{'samples':>9}{'real':>9}   N = {result['n']:,}, {result['source']}",
                  f"{'Frechet distance':18}{result['frechet']:9.3f}{result['frechet_real']:9.3f}"
                  f"   low is good; real: {same}"]
        notes = {"accuracy": "real: held-out images", "precision": f"real: {same}", "recall": ""}
        for name, note in notes.items():
            title = "class accuracy" if name == "accuracy" else name
            line = f"{title:18}{result[name]:9.2%}{result[name + '_real']:9.2%}   {note}"
            lines.append(line.rstrip())
    if "loss" in result:
        lines.append(f"{'validation loss':18}{result['loss']['mean']:9.4f}{'':12}held-out images")
        for i, value in enumerate(result["loss"]["bins"]):
            if value is not None:
                lines.append(f"  t {i / 10:.1f} to {(i + 1) / 10:.1f}{'':6}{value:9.4f}")
    return "\n".join(lines)


def main(argv):
    p = Parser(prog="metrics.py", description="Measure samples of a checkpoint or of an npz.")
    count = number(int, 1, 10**6)
    p.add_argument("file", help="checkpoint of train.py, or npz of sample.py")
    p.add_argument("--data", help="the data set to compare with (default: the checkpoint's)")
    p.add_argument("--n", type=number(int, 4, 10**6), default=2000, help="how many samples")
    p.add_argument("--cfg", type=number(float, 0), help="guidance scale (2; 1 after --drop 0)")
    p.add_argument("--steps", type=count, default=25)
    p.add_argument("--solver", help="as in sample.py")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--device", default="cpu")
    add_model_options(p)
    p.add_argument("--json", help="write the numbers there as well")
    p.add_argument("--fidelity", metavar="REF", help="of an npz: FID and IS against this npz or "
                   "folder, without the feature net (pip install torch-fidelity)")
    args = p.parse_args(argv)
    args.device = str(select_device(args.device))
    if args.json and not args.json.endswith(".json"):
        raise UserError(f"--json {args.json}: must end in .json")
    if not Path(args.file).is_file():
        raise UserError(f"{args.file}: no such file")
    result = measure(args)
    if args.json:
        write_json(args.json, vars(args) | result)
    print(table(result))


if __name__ == "__main__":
    sys.exit(run_program("metrics.py", main, sys.argv[1:]))
