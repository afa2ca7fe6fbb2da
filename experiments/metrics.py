"""How good are the samples? Four numbers from the judge (features.py), and the paired loss.

   python -m experiments.metrics runs/dit/last.pt                       # samples, then judges
   python -m experiments.metrics samples.npz --data fashion-mnist     # judges what sample.py wrote
   python -m experiments.metrics samples.npz --fidelity ref.npz       # FID and IS by torch-fidelity

   1. Frechet distance: two clouds of 64 features, compared as Gaussians. Falls with blur, wrong
      shapes, missing classes. Even real pictures against real ones do not reach 0: the floor is
      measured at the same N and printed beside it.
   2. Class accuracy: does the judge see the class that was asked for? Only this catches wrong
      labels.
   3. Precision: share of samples that lie among the real pictures.
   4. Recall: share of real pictures that lie among the samples; it catches forgotten kinds.

           real o    radius of o = distance to its         precision: x inside some o's ball
           fake x    3rd nearest o, the same for x         recall:    o inside some x's ball

   5. Paired validation loss: the same held-out pictures, times and noise for every model, so that
      two models differ by what they learned and not by luck.

   Letters: N pictures, D features, C channels, S side, k neighbours.         Read next: evaluate()

   Ledger.  The real set is N pictures of the training split, as FID is defined, evenly many per
   class; "real" is a second such set, with no picture in common. A class accuracy above the real
   one is no praise: guidance draws pictures that are easier than life. Precision and recall are
   Kynkaanniemi et al. 2019 (arXiv:1904.06991, Sec. 2), 64 features in place of VGG's 4096.   """

import functools
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import DataError, load as load_data
from experiments import features as judges


@functools.lru_cache(maxsize=4)
def judge(source):
    return judges.load(source)


@torch.no_grad()
def features(x, source="digits"):
    """Pictures (N, C, S, S) in [-1, 1] -> features (N, 64) and logits (N, classes), float32."""
    net, about = judge(source)
    if tuple(x.shape[1:]) != (about["channels"], about["size"], about["size"]):
        raise DataError(f"pictures are {tuple(x.shape[1:])}, but the judge of {source} knows "
                        f"{(about['channels'], about['size'], about['size'])}")
    parts = [net(some.float()) for some in x.split(500)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def frechet(a, b):
    """Frechet distance of Gaussians fitted to features a (N, D) and b (M, D), in float64.

    0 for equal means and covariances; (distance of the means)^2 when only they differ."""
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
        raise DataError(f"precision and recall need more than k = {k} pictures")

    def share(points, cloud):
        radius = radii(cloud, k)
        inside = [(distances(some, cloud) <= radius).any(1) for some in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share(fake, real), share(real, fake)


@torch.no_grad()
def validation_loss(model, path, data, n=1000, seed=0):
    """The squared error alone, unweighted, on n pictures of `data` (a test split).

    The i-th picture always meets the same time and noise, whatever the model: compare losses of two
    models pairwise. The times cover [0, 1) evenly. -> {"mean": float, "bins": ten means by time}"""
    n = min(n, len(data))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.linspace(0, len(data) - 1, n).long()
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    noise = torch.randn(n, data.channels, data.size, data.size, generator=generator)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    losses = []
    for rows in torch.arange(n).split(100):
        x0, y = data.batch(ids[rows])
        t = path.grid(u[rows].clamp(max=1 - 1e-6))
        loss, _ = path.error(model, *(v.to(device) for v in (x0, y, t, noise[rows])))
        losses.append(loss.double().cpu())
    model.train(was_training)
    losses, tenth = torch.cat(losses), (10 * u).long().clamp(max=9)             # (n,) each
    bins = [losses[tenth == i].mean().item() if (tenth == i).any() else None for i in range(10)]
    return {"mean": losses.mean().item(), "bins": bins}


@functools.lru_cache(maxsize=2)
def training_data(source):
    return load_data(source, size=judge(source)[1]["size"])


@functools.lru_cache(maxsize=4)
def real_features(source, n):
    """Features of two sets of n training pictures, evenly many per class, none in both."""
    data = training_data(source)
    n = min(n, len(data) // 2)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    rank = torch.zeros(len(data), dtype=torch.int64)    # this is the how-manieth of its class
    for label in range(data.classes):
        mine = order[data.labels[order] == label]
        rank[mine] = torch.arange(len(mine))
    ids = (rank * data.classes + data.labels).argsort()[:2 * n]         # class 0, 1, ..., 0, 1, ...
    feats = features(torch.cat([data.batch(some)[0] for some in ids.split(500)]), source)[0]
    return feats[:n], feats[n:]


def evaluate(samples, labels, source="digits"):
    """samples: float (N, C, S, S) in [-1, 1], or uint8 (N, S, S, 3) as in the npz. labels (N,): the
    class each was asked for. -> the four numbers, and what real pictures reach ("..._real")."""
    x = to_pictures(samples, judge(source)[1]["channels"])
    labels = torch.as_tensor(labels).long()
    if len(labels) != len(x):
        raise DataError(f"{len(labels)} labels for {len(x)} samples")
    feats, logits = features(x, source)
    if not feats.isfinite().all():
        raise DataError("the samples hold NaN or infinity")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(f"labels from {labels.min()} to {labels.max()}, for {logits.shape[1]} "
                        f"classes")
    real, other = real_features(source, len(x))
    precision, recall = precision_recall(real, feats)
    precision_real, recall_real = precision_recall(real, other)
    return {"n": len(x), "n_real": len(real), "source": source,
            "frechet": frechet(real, feats), "frechet_real": frechet(real, other),
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "accuracy_real": judge(source)[1]["accuracy"],
            "precision": precision, "precision_real": precision_real,
            "recall": recall, "recall_real": recall_real}


def to_pictures(samples, channels):
    """What evaluate() accepts -> float32 (N, C, S, S) in [-1, 1]."""
    samples = torch.as_tensor(samples)
    if samples.ndim != 4 or not len(samples):
        raise DataError(f"samples must have 4 dimensions, not shape {tuple(samples.shape)}")
    if samples.dtype != torch.uint8:
        return samples.float().clamp(-1, 1)
    if samples.shape[-1] != 3:
        raise DataError(f"uint8 samples must be (N, S, S, 3), not {tuple(samples.shape)}")
    x = samples.movedim(-1, 1).float() / 127.5 - 1                              # (N, 3, S, S)
    if channels == 1 and not (x[:, :1] == x).all():
        raise DataError("the samples are in colour, the data are grey")
    return x[:, :channels]


def read_npz(path, labels=True):
    """What sample.py --npz wrote: arr_0 uint8 (N, S, S, 3), arr_1 int64 (N,).

    ADM's reference files have no labels."""
    try:
        with zipfile.ZipFile(path) as file:         # pictures shrink by half, not to a hundredth
            whole = sum(entry.file_size for entry in file.infolist())
        if whole > max(data.LIMIT, 10 * Path(path).stat().st_size):
            raise DataError(f"unpacks to {whole:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            samples, labels = file["arr_0"], file["arr_1"] if labels else np.zeros(1, int)
    except Exception as error:                  # damaged files raise a dozen different errors
        raise DataError(f"{path}: cannot be read ({error})") from None
    if samples.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{path}: arr_0 must be uint8 and arr_1 one row of integers")
    return samples, labels


class Pictures(torch.utils.data.Dataset):
    """arr_0 of an npz as torch-fidelity wants it: uint8 (3, S, S), one by one."""

    def __init__(self, path):
        self.pictures = read_npz(path, labels=False)[0]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return torch.from_numpy(self.pictures[i]).permute(2, 0, 1)


def fidelity(file, reference, device):
    """FID and IS by Inception, precision and recall by VGG. reference: an npz with arr_0, or a
    folder of pictures of the same size.

    Not the published figures: ADM's evaluator takes the FID to the mean and covariance of all of
    ImageNet, and precision and recall by Inception, too. Its reference file holds 10,000 pictures
    besides; to them FID is higher."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        raise DataError("--fidelity: pip install torch-fidelity (0.4 or later)") from None
    if not Path(reference).exists():
        raise DataError(f"{reference}: no such file or folder")
    real = Pictures(reference) if str(reference).endswith(".npz") else str(reference)
    found = calculate_metrics(input1=Pictures(file), input2=real, cuda=device.startswith("cuda"),
                              isc=True, fid=True, prc=True, verbose=False,
                              save_cpu_ram=True)        # 50,000 x 50,000 distances: 10 GB a table
    return {name: float(value) for name, value in found.items()}


def from_checkpoint(args):
    """Sample from a checkpoint and measure its validation loss. -> samples, labels, source, loss"""
    import sample                               # lazily: an npz is judged without any model
    from train import Refusal, keep_memory
    keep_memory()
    model, path, checkpoint = sample.load(args.file, weights=args.weights, device=args.device)
    if args.solver and args.solver not in path.solvers:
        raise Refusal(f"--solver {args.solver}: this checkpoint has {', '.join(path.solvers)}")
    if not model.cfg.classes:
        raise Refusal(f"{args.file} knows no classes: the judge cannot ask for them")
    if args.data and args.data != checkpoint["data"]["source"]:
        checkpoint["data"] = dict(source=args.data)
    held_out, source = data.held_out(checkpoint), checkpoint["data"]["source"]
    loss = validation_loss(model, path, held_out)
    if held_out.latent:
        return None, None, source, loss
    judge(source)                               # before the slow part: is there one?
    labels = torch.arange(args.n) % held_out.classes
    samples = sample.generate(model, path, labels, seed=args.seed, steps=args.steps,
                              solver=args.solver, cfg=args.cfg)
    return samples.cpu(), labels, source, loss


def table(result):
    lines = [f"{name:38}{value:10.4f}" for name, value in result.get("fidelity", {}).items()]
    if "frechet" in result:
        same = f"two real sets of {result['n_real']:,}"
        lines += [f"{'':18}{'samples':>9}{'real':>9}   N = {result['n']:,}, {result['source']}",
                  f"{'Frechet distance':18}{result['frechet']:9.3f}{result['frechet_real']:9.3f}"
                  f"   low is good; real: {same}"]
        notes = {"accuracy": "real: held-out pictures", "precision": f"real: {same}", "recall": ""}
        for name, note in notes.items():
            title = "class accuracy" if name == "accuracy" else name
            line = f"{title:18}{result[name]:9.2%}{result[name + '_real']:9.2%}   {note}"
            lines.append(line.rstrip())
    if "loss" in result:
        lines.append(f"{'validation loss':18}{result['loss']['mean']:9.4f}{'':12}held-out pictures")
        for i, value in enumerate(result["loss"]["bins"]):
            if value is not None:
                lines.append(f"  t {i / 10:.1f} to {(i + 1) / 10:.1f}{'':6}{value:9.4f}")
    return "\n".join(lines)


def by_fidelity(args):
    if args.data or not args.file.endswith(".npz"):
        raise DataError("--fidelity compares an npz of sample.py with REF: no checkpoint, --data")
    return {"fidelity": fidelity(args.file, args.fidelity, args.device)}


def by_judge(args):
    loss = None
    if args.file.endswith(".npz"):
        if not args.data:
            raise DataError(f"{args.file}: say which --data these samples imitate")
        samples, labels, source = *read_npz(args.file), args.data
    else:
        samples, labels, source, loss = from_checkpoint(args)
    result = {"source": source} if samples is None else evaluate(samples, labels, source)
    return result | ({"loss": loss} if loss else {})


def main(argv=None):
    from train import Parser, Refusal, join, number             # lazily, as above
    parser = Parser(description="Judge samples of a checkpoint or of an npz.", allow_abbrev=False)
    count = number(int, 1, 10**6)
    parser.add_argument("file", help="checkpoint of train.py, or npz of sample.py")
    parser.add_argument("--data", help="the data set to compare with (default: the checkpoint's)")
    parser.add_argument("--n", type=count, default=2000, help="how many samples")
    parser.add_argument("--cfg", type=number(float, 0), default=2.0, help="guidance scale")
    parser.add_argument("--steps", type=count, default=25)
    parser.add_argument("--solver", help="as in sample.py")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the numbers there as well")
    parser.add_argument("--fidelity", metavar="REF", help="of an npz: FID and IS against this "
                        "npz or folder, not the judge (pip install torch-fidelity)")
    try:
        args = parser.parse_args(argv)
        args.device = str(join(args.device)[2])
        if args.json and not args.json.endswith(".json"):
            raise DataError(f"--json {args.json}: must end in .json")
        if not Path(args.file).is_file():
            raise DataError(f"{args.file}: no such file")
        if args.n <= 3:
            raise DataError(f"--n {args.n}: needs more than 3 samples")
        result = by_fidelity(args) if args.fidelity else by_judge(args)
        if args.json:
            data.write_whole(Path(args.json), json.dumps(vars(args) | result, indent=1).encode())
    except (Refusal, ValueError, OSError) as error:
        print(f"metrics.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
