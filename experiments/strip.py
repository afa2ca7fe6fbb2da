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


def cli(argv):
    try:
        if len(argv) < 2:
            raise ValueError("say OUT and the pictures")
        strip(argv[0], argv[1:])
        return 0
    except (ValueError, OSError) as e:              # no picture, no folder, no known ending
        print(f"strip: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
