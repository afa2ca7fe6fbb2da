"""Pictures side by side at one height: the strip at the top of the README.

    python -m experiments.strip assets/strip.png a.png b.png ..."""

import sys
from pathlib import Path

from PIL import Image

HEIGHT, GAP = 240, 16


def strip(out, files):
    pictures = [Image.open(f).convert("RGB") for f in files]
    pictures = [p.crop((0, 0, p.width, min(p.height, p.width))) for p in pictures]    # the top, square
    pictures = [p.resize((round(p.width * HEIGHT / p.height), HEIGHT)) for p in pictures]
    sheet = Image.new("RGB", (sum(p.width + GAP for p in pictures) - GAP, HEIGHT), "white")
    left = 0
    for p in pictures:
        sheet.paste(p, (left, 0))
        left += p.width + GAP
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


if __name__ == "__main__":
    strip(sys.argv[1], sys.argv[2:])
