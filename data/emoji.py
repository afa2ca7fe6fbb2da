"""Small colour images without a download, for data.small_vae: emoji, or else Fashion-MNIST.

The emoji are those of Debian's package fonts-noto-color-emoji (SIL Open Font License): one image of
64x64 per code point from U+1F300 to U+1FAFF, on white. Skin tones and other sequences of code
points are left out, because near duplicates would lie on both sides of training and held out.
Classes are blocks of 128 code points: 1f600 are faces, 1f680 is transport, 1f980 is animals and
food. Without the font, the images are 4,000 of Fashion-MNIST, dark on white."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import load

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def draw_images(folder):
    """Unless the folder is there, make it, with its images as CLASS/NAME.png. It appears only when
    it is complete."""
    if folder.exists():
        return
    part = folder.with_name(folder.name + ".part")
    for name, file, image in emoji() if Path(FONT).exists() else clothes():
        (part / name).mkdir(parents=True, exist_ok=True)
        image.save(part / name / f"{file}.png")
    part.rename(folder)


def emoji():
    """Yields the name of the class, the code point, and the image of every emoji."""
    font = ImageFont.truetype(FONT, 109, layout_engine=ImageFont.Layout.BASIC)  # its one size
    for code in range(0x1F300, 0x1FB00):
        _, top, _, bottom = font.getbbox(chr(code))
        if top < bottom:                                    # else the font has no such emoji
            page = Image.new("RGB", (136, 136), "white")    # an emoji is 136 x 128
            ImageDraw.Draw(page).text((0, 4), chr(code), font=font, embedded_color=True)
            yield f"{code & ~127:05x}", f"{code:05x}", page.resize((64, 64), Image.LANCZOS)


def clothes():
    """The same for Fashion-MNIST; the number of the image takes the code point's place."""
    print(f"{FONT}: not there; taking Fashion-MNIST", file=sys.stderr)
    data = load("fashion-mnist")
    for i, (image, label) in enumerate(zip(*data.fetch(range(4000)))):
        page = Image.new("L", (64, 64), "white")
        page.paste(Image.fromarray(255 - image[0].numpy()).resize((56, 56)), (4, 4))
        yield data.names[label], i, page
