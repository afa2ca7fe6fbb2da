"""Files that are complete or not there, and grids of images."""

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def write_atomic(file, write):
    """Create or replace a file: write(f) fills a temporary file beside it, which is flushed to the
    disk and then renamed. So a crash or a full disk leaves either the old file or the new one.

    Raises UserError if the disk refuses; what was there before is then untouched."""
    file = Path(file)
    temporary = file.with_name(f"{file.name}.{os.urandom(4).hex()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                # or a power cut could leave a name without content
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:    # torch.save reports a full disk as a RuntimeError
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {file} ({why}); what was there before is untouched"
                        ) from None
    finally:                                    # also after Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink()


def output_folder(checkpoint):
    """-> where programs write what they draw from a checkpoint: into its folder, but for one of
    assets/ into runs/NAME."""
    shipped = ASSETS in checkpoint.resolve().parents
    return Path("runs") / checkpoint.stem if shipped else checkpoint.parent


def write_json(file, content):
    write_atomic(file, lambda f: f.write(json.dumps(content, indent=1).encode()))


def read_json(file):
    """-> what the file holds. Raises UserError for a file that is damaged or cannot be read."""
    file = Path(file)
    try:
        if file.exists() and not file.is_file():
            raise ValueError("not a regular file")          # opening a pipe would wait for ever
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> (n, H, W, 3) uint8. Grey is repeated; of latents, 3 channels."""
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def write_grid(file, x, columns=10, gap=2, zoom=None):
    """Images (n, C, H, W) in [-1, 1], or uint8 (n, H, W, 3), row by row, as one PNG."""
    images = to_uint8(x) if torch.is_tensor(x) else x
    n, h, w, _ = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image
    zoom = zoom or max(1, 64 // h)
    sheet = np.kron(sheet, np.ones((zoom, zoom, 1), np.uint8))
    write_atomic(file, lambda f: Image.fromarray(sheet).save(f, "PNG"))
