"""`digits`: handwritten-looking digits that this program draws itself, so that no file is needed.

A digit is a few smooth pen strokes through control points. Every image moves the points, warps,
slants and rotates the strokes and picks a pen, so no two images are alike.
Letters: n images, K control points, DOTS ink dots along the strokes."""

import math

import torch
import torch.nn.functional as F

# One string for each way of writing a digit. "x,y x,y ..." is a smooth stroke through these points:
# x goes to the right, y goes down, and the digit is 100 tall. "|" lifts the pen, or makes a corner
# if the next stroke starts where the last one ended.
SKELETONS = {
    0: ["34,1 12,14 2,46 9,82 30,99 50,86 58,50 51,15 32,1 22,5",
        "42,5 22,3 6,28 5,68 24,98 47,90 57,56 51,18 36,4 24,12"],
    1: ["33,0 30,50 28,100",
        "10,24 22,14 34,0|34,0 34,50 33,100",
        "12,22 33,0|33,0 33,50 32,100|8,100 32,99 56,100"],
    2: ["4,24 15,4 37,0 54,15 50,40 28,70 2,98|2,98 30,96 60,98",
        "6,22 18,3 40,1 54,19 46,47 24,77 9,95 3,88 14,80 32,91 46,98 61,90",
        "4,12 27,2 51,9 47,36 26,66 4,98|4,98 30,97 58,95"],
    3: ["6,12 27,0 50,9 51,30 28,46|28,46 53,56 57,80 34,99 4,88",
        "6,3 30,2 54,2|54,2 40,22 26,40|26,40 51,50 58,74 42,97 20,99 2,88",
        "8,9 30,0 51,14 43,37 24,46 19,50 46,53 58,74 40,98 8,95"],
    4: ["14,3 9,30 5,58|5,58 34,57 60,55|45,20 43,60 41,100",
        "42,0 22,32 2,64|2,64 32,64 62,62|42,0 41,50 40,100",
        "8,2 4,36 14,54 32,54 48,44|53,0 48,50 43,100"],
    5: ["53,2 34,2 15,3|15,3 12,22 10,43|10,43 33,36 54,53 53,82 30,100 4,90",
        "17,4 14,24 10,46|10,46 34,38 56,57 50,88 24,100 3,92|17,3 36,2 56,0",
        "54,4 30,2 13,13 14,35 36,45 56,63 48,90 24,100 4,90"],
    6: ["46,0 22,20 5,56 8,86 30,100 54,86 52,62 32,53 9,68",
        "40,0 15,40 4,74 15,96 38,99 54,80 45,60 24,60 7,77"],
    7: ["2,4 30,3 58,2|58,2 36,44 22,100",
        "2,4 30,3 58,2|58,2 38,44 24,100|14,51 32,50 52,48",
        "4,18 4,10 4,3|4,3 30,4 56,2|56,2 40,42 31,100"],
    8: ["50,15 30,0 11,13 16,36 44,58 54,82 30,100 6,84 14,58 44,38 52,17 46,9",
        "30,0 12,10 11,32 30,46 49,32 48,10 30,0|30,46 6,62 5,86 30,100 55,86 54,60 30,46"],
    9: ["52,17 32,1 10,13 8,38 28,50 47,38 53,16|53,16 51,60 45,100",
        "54,14 34,0 10,14 8,40 30,50 50,34 55,13 57,50 47,88 27,100 8,91",
        "50,9 27,2 6,22 13,47 36,46 52,24|52,5 50,50 48,100"],
}
DOTS = 96                                   # ink dots per digit, less than a pen width apart


def skeleton(text):
    """One way of writing -> control points (K, 2), the weights that blend them into dots (DOTS, K),
    and after which dots the pen is lifted (DOTS,)."""
    strokes = [[tuple(map(float, point.split(","))) for point in stroke.split()]
               for stroke in text.split("|")]
    points = sorted({point for stroke in strokes for point in stroke})
    spans = [(stroke, i) for stroke in strokes for i in range(len(stroke) - 1)]
    length = torch.tensor([math.dist(stroke[i], stroke[i + 1]) for stroke, i in spans])
    ends = (length.cumsum(0) / length.sum() * DOTS).round().int().tolist()
    blend, lifts, row = torch.zeros(DOTS, len(points)), torch.zeros(DOTS, dtype=torch.bool), 0
    for (stroke, i), end in zip(spans, ends):
        last = i == len(stroke) - 2
        u = torch.linspace(0, 1, end - row + (not last))[:end - row]            # (dots here,)
        weights = torch.stack([-u + 2*u**2 - u**3, 2 - 5*u**2 + 3*u**3,
                               u + 4*u**2 - 3*u**3, u**3 - u**2]) / 2           # Catmull-Rom spline
        for weight, j in zip(weights, (i - 1, i, i + 1, i + 2)):
            neighbour = stroke[min(max(j, 0), len(stroke) - 1)]
            blend[row:end, points.index(neighbour)] += weight
        row = end
        lifts[row - 1] = last
    return torch.tensor(points), blend, lifts


def render(text, n, generator):
    """One way of writing a digit -> n images (n, 28, 28) uint8, each in a different handwriting."""
    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    points, blend, lifts = skeleton(text)
    dots = blend @ (points + 2.8 * normal(*points.shape)) / 100                 # (n, DOTS, 2)
    dots = dots - torch.tensor([0.3, 0.5])
    wave, phase = 1.5 * normal(2, 1, 2), uniform(0, 6.3, 2, 1)
    warp = torch.sin(dots[:, None] @ wave.transpose(2, 3) * 3 + phase[..., None])     # slow waves
    dots = dots + 0.03 * warp.squeeze(-1).transpose(1, 2)                      # (n, DOTS, 2)
    angle, slant = 0.12 * normal(1), 0.2 * normal(1) + 0.08
    tall, wide = uniform(16.5, 21.5, 1), uniform(0.8, 1.25, 1)
    x, y = dots[..., 0] * wide - slant * dots[..., 1], dots[..., 1]             # (n, DOTS) each
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    middle = lambda v: (v.amax(1, keepdim=True) + v.amin(1, keepdim=True)) / 2
    x = ((x - middle(x)) * tall + 13.5 + uniform(-1.5, 1.5, 1)).contiguous()        # pixels
    y = ((y - middle(y)) * tall + 13.5 + uniform(-1.5, 1.5, 1)).contiguous()

    # Each dot is a Gaussian of 1 pixel, weighted by its share of the stroke. Their sum, one matrix
    # product per image, falls with the distance d to the stroke as exp(-d^2/2); solve it for d.
    step = (x.diff().square() + y.diff().square()).sqrt() * ~lifts[:-1]         # (n, DOTS-1)
    share = (F.pad(step, (1, 0)) + F.pad(step, (0, 1)))[:, :, None] / 2         # (n, DOTS, 1)
    grid = torch.arange(28.0)
    columns = share * (-(grid - x[:, :, None]).square() / 2).exp()              # (n, DOTS, 28)
    rows = (-(grid - y[:, :, None]).square() / 2).exp()
    ink = torch.bmm(rows.transpose(1, 2), columns) / math.sqrt(2 * math.pi)     # (n, 28, 28)
    distance = (-2 * ink.clamp(1e-9, 1).log()).sqrt()
    pen, soft, dark = uniform(0.9, 1.7, 1, 1), uniform(0.9, 1.5, 1, 1), uniform(0.85, 1, 1, 1)
    return (255 * dark * ((pen - distance) / soft + 0.5).clamp(0, 1)).to(torch.uint8)


def draw_digits(split):
    """20,000 training or 2,000 test images -> images (N, 1, 28, 28) uint8, labels (N,) int64."""
    n, seed = {"train": (20_000, 1), "test": (2_000, 2)}[split]
    generator = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for digit, ways in SKELETONS.items():
        for i, way in enumerate(ways):
            count = n // 10 // len(ways) + (i < n // 10 % len(ways))
            images.append(render(way, count, generator))
            labels += [digit] * count
    order = torch.randperm(n, generator=generator)
    return torch.cat(images)[order, None], torch.tensor(labels)[order]


def load_digits(split):
    """-> keyword arguments of Dataset."""
    images, labels = draw_digits(split)
    return dict(labels=labels, names=[str(digit) for digit in range(10)], read=images.__getitem__,
                note="rendered by this program")
