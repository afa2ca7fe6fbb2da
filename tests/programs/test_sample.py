"""sample.py: what the command line asks for is what is sampled, and the files it writes."""

import argparse
import json
import zipfile

import numpy as np
import pytest
import torch
from helpers import batch, run_cli, smallest_run, write_model
from PIL import Image

import diffusion as diffusions
import sample
import train
from common.files import to_uint8
from data import encode, folder, load

IMAGES = dict(channels=1, patch=4, dim=32, heads=2)


def arrays(file):
    with np.load(file) as z:
        return z["arr_0"], z["arr_1"]


def test_what_the_command_line_asks_for_reaches_the_sampler(tmp_path):
    model, diffusion = write_model(tmp_path / "dit.pt", "dit", "ddpm", classes=10)
    run_cli(sample, tmp_path / "dit.pt", "--n", 2, "--npz", tmp_path / "s.npz", "--solver", "ddim",
            "--eta", 0.5, "--steps", 4, "--cfg", 3, "--seed", 7, "--cfg-interval", 0.2, 0.6,
            "--cfg-channels", 2, "--classes", 5)
    c, y = model.cfg, torch.tensor([5, 5])

    def end(cfg=3.0, channels=2, interval=(0.2, 0.6), steps=4, solver="ddim", eta=0.5, seed=7):
        noise = lambda i: diffusions.sample_noise(seed, range(2), (c.channels, c.size, c.size), i)
        f = diffusions.guide(model, y, c.classes, cfg, channels, interval)
        with torch.no_grad():
            *_, (_, x, _) = diffusion.trajectory(f, noise(-1), steps, solver, eta, noise)
        return to_uint8(x)
    images, labels = arrays(tmp_path / "s.npz")
    assert np.array_equal(images, end()) and labels.tolist() == [5, 5]
    for other in (dict(cfg=1.5), dict(channels=3), dict(interval=(0.0, 1.0)), dict(eta=0.0),
                  dict(solver="ddpm"), dict(steps=5), dict(seed=0)):
        assert not np.array_equal(images, end(**other)), other


def test_an_image_depends_on_seed_and_index_not_on_how_many_are_sampled_together(tmp_path):
    model, diffusion = write_model(tmp_path / "race.pt", "racedit", **IMAGES)
    x, y = batch(model.cfg)
    model.update_buffers(model.train()(x, torch.rand(4), y)[1])     # a threshold to sample with
    model.eval()
    labels = torch.arange(7)
    together = sample.generate(model, diffusion, labels, steps=3)
    in_parts = sample.generate(model, diffusion, labels, steps=3, batch=3)
    assert (together - in_parts).abs().max() < 1e-5
    assert (together - sample.generate(model, diffusion, labels, seed=1, steps=3)).abs().max() > 0.1


def test_raw_and_averaged_weights_are_told_apart(tmp_path):
    write_model(tmp_path / "dit.pt", "dit", **IMAGES)
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    content["ema"] = {k: 2 * v for k, v in content["ema"].items()}
    torch.save(content, tmp_path / "dit.pt")
    for weights in ("ema", "raw"):
        run_cli(sample, tmp_path / "dit.pt", "--weights", weights, "--n", 1, "--steps", 2,
                "--npz", tmp_path / f"{weights}.npz")
    raw, ema = (arrays(tmp_path / f"{weights}.npz")[0] for weights in ("raw", "ema"))
    assert not np.array_equal(raw, ema)


@pytest.mark.parametrize("kind, solver", [("rf", "euler"), ("rf", "heun"), ("ddpm", "ddpm"),
                                          ("ddpm", "ddim"), ("ddpm", "dpm++")])
def test_every_solver_writes_a_grid_and_refuses_the_other_diffusion(tmp_path, kind, solver):
    write_model(tmp_path / "last.pt", "dydit", kind, **IMAGES)
    argv = [tmp_path / "last.pt", "--n", 3, "--steps", 3, "--solver", solver]
    run_cli(sample, *argv, "--maps", "--cfg-interval", 0.2, 0.8)
    zoom = 64 // 8
    assert Image.open(tmp_path / "grid.png").size == ((3 * 8 + 4 * 2) * zoom, (8 + 2 * 2) * zoom)
    other = "ddpm" if kind == "rf" else "rf"
    write_model(tmp_path / "other.pt", "dydit", other, **IMAGES)
    _, error = run_cli(sample, tmp_path / "other.pt", *argv[1:], code=2)
    assert f"it was trained with {other}" in error


@pytest.mark.parametrize("options, word", [
    ("--classes 10", "classes 0 to 9"), ("--n 0", "--n"), ("--eta 0.5", "ddim"),
    ("--cfg-channels 2", "have 1"), ("--cfg-interval 0.8 0.3", "LO is above HI"),
    ("--out /proc/x/grid.png --steps 1", "/proc/x"), ("--maps", "does not report 'map'"),
    ("--vae any", "makes images, not latents"), ("--n 2 --out s.npz --npz s.npz", ".png"),
    ("--out film.png --film", "film.png"), ("--weights best", "best"), ("--device tpu", "tpu")])
def test_what_cannot_be_sampled_is_one_clear_line(tmp_path, options, word):
    write_model(tmp_path / "last.pt", "dit", **IMAGES)
    _, error = run_cli(sample, tmp_path / "last.pt", *options.split(), code=2)
    assert word in error and {file.name for file in tmp_path.iterdir()} == {"last.pt"}, error


def test_the_npz_is_what_numpy_and_the_evaluator_of_adm_read(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    sample.write_npz(tmp_path / "s.npz", lambda: iter((x[:4], x[4:])), torch.arange(7))
    images, labels = arrays(tmp_path / "s.npz")
    assert np.array_equal(images, x) and labels.tolist() == list(range(7))
    assert labels.dtype == np.int64
    with zipfile.ZipFile(tmp_path / "s.npz") as z, z.open("arr_0.npy") as f:  # as the evaluator
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((7, 4, 4, 3), False, np.dtype("uint8"))


# ------------------------------------------------------------------------ images and latents


def write_images(root, n, side):
    for i in range(n):
        file = root / ("cat", "dog")[i % 2] / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = np.full((side, side, 3), (i % 250, i // 250 * 20, 99), np.uint8)
        Image.fromarray(grey).save(file)
    return root


class VAE:
    """Stands in for diffusers' AutoencoderKL: the latent is the mean of 8 x 8 pixels, doubled."""

    config = argparse.Namespace(scaling_factor=0.5)
    decoded = []

    def to(self, device):
        return self

    def encode(self, x):
        mean = 2 * torch.nn.functional.avg_pool2d(x, 8)
        return argparse.Namespace(latent_dist=argparse.Namespace(mean=mean, std=0 * mean))

    def decode(self, z):
        self.decoded.append(z)
        return argparse.Namespace(sample=z.repeat_interleave(8, 2).repeat_interleave(8, 3) / 2)


def sample_latents(tmp_path, vae, model="racedit"):
    """Train two steps on the latents in tmp_path and sample four images."""
    out = tmp_path / "out"
    said, _ = run_cli(train, *smallest_run(out, "--set", "patch=2", "--data", tmp_path / "latents",
                                           "--steps", 2, model=model))
    run_cli(sample, out / "last.pt", "--n", 4, "--steps", 2, "--vae", vae, "--npz",
            tmp_path / "s.npz", "--device", "cpu")
    images, labels = arrays(tmp_path / "s.npz")
    assert images.shape == (4, 32, 32, 3) and labels.tolist() == [0, 1, 0, 1]
    assert Image.open(out / "grid.png").size == (2 * 4 * 32 + 2 * 5 * 2, 2 * (32 + 4))
    return said


def test_images_become_latents_a_model_samples_them_and_they_become_images(tmp_path, monkeypatch):
    images = write_images(tmp_path / "in", 24, 32)
    encode.encode(images, tmp_path / "latents", VAE(), "any", size=32)
    monkeypatch.setattr(sample, "load_vae", lambda name, device: VAE())
    said = sample_latents(tmp_path, "any")
    assert "channels: mean -0." in said and "warning" in said       # grey images: std far from 1
    model, diffusion, _ = sample.load_model(tmp_path / "out/last.pt")
    latents = sample.generate(model, diffusion, torch.arange(4) % 2, steps=2)
    assert torch.allclose(torch.cat(VAE.decoded), 2 * latents)      # divided by the VAE's scale
    VAE.config.shift_factor = 0.1                                   # Stable Diffusion 3 has one
    _, error = run_cli(sample, tmp_path / "out/last.pt", "--vae", "any", code=2)
    del VAE.config.shift_factor
    assert "shifts its latents" in error


def test_the_vae_of_diffusers_encodes_and_decodes(tmp_path):
    """A tiny one with random weights, loaded as a real one is; only where diffusers is there."""
    diffusers = pytest.importorskip("diffusers")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4)
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4,
                                  latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    images = write_images(tmp_path / "in", 24, 32)
    run_cli(encode, "--images", images, "--out", tmp_path / "latents", "--vae", tmp_path / "vae",
            "--size", 32, "--device", "cpu")
    about = json.loads((tmp_path / "latents/meta.json").read_text())
    assert about["scale"] == vae.config.scaling_factor
    x = torch.tensor(folder.center_crop(next((images / "cat").iterdir()), 32))
    with torch.no_grad():
        found = vae.eval().encode(x.permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
    some = load(tmp_path / "latents")
    nearest = [(some.batch([i])[0][0] / about["scale"] - found.mean[0]).abs().max()
               for i in range(12)]
    assert min(nearest) < 2e-3                                      # of float16
    sample_latents(tmp_path, tmp_path / "vae", model="dit")
