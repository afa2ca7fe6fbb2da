"""Latents without a download: data.small_vae trains a VAE that the other programs can use."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from helpers import run_cli
from PIL import Image

import sample
import train
from common.checkpoint import load_model
from data import emoji, encode, load, small_vae
from data.encode import load_vae
from experiments import latent_panels

diffusers = pytest.importorskip("diffusers")


def write_images(folder, n=30):
    """Squares of one colour on white, n of them in two classes, 64x64."""
    colours = np.random.default_rng(0).integers(0, 256, (n, 3))
    for i, colour in enumerate(colours):
        image = np.full((64, 64, 3), 255, np.uint8)
        image[16:48, 16:48] = colour
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> a folder with images/, and small-vae/ after 30 steps on them; what was printed."""
    here = tmp_path_factory.mktemp("small")
    torch.set_num_threads(1)
    said, _ = run_cli(small_vae, "--images", write_images(here / "images"), "--out",
                      here / "small-vae", "--steps", 30, "--device", "cpu")
    return here, said


def test_the_vae_has_at_most_a_million_parameters_and_makes_64x64x3_to_8x8x4(trained):
    here, said = trained
    vae = load_vae(here / "small-vae")
    count = sum(p.numel() for p in vae.parameters())
    assert count <= 1_000_000 and f"{count:,} parameters" in said
    with torch.no_grad():
        mean = vae.encode(torch.zeros(2, 3, 64, 64)).latent_dist.mean
        assert mean.shape == (2, 4, 8, 8) and vae.decode(mean).sample.shape == (2, 3, 64, 64)


def test_scaled_latents_have_a_standard_deviation_of_1(trained):
    here, _ = trained
    images = load(here / "images", size=64)
    vae = load_vae(here / "small-vae")
    x, _ = images.batch(range(len(images)))
    with torch.no_grad():
        z = vae.encode(x).latent_dist.sample()
    assert vae.config.scaling_factor != 0.18215             # diffusers' default
    assert (z * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.03)


def test_thirty_steps_learn_colours_that_were_held_out(trained):
    """White alone, the best guess before training, has a PSNR that is lower by more than 2 dB."""
    here, said = trained
    held_out = load(here / "images", "test", size=64)
    x, _ = held_out.batch(range(len(held_out)))
    white = (-10 * ((1 - x) / 2).square().mean((1, 2, 3)).log10()).mean().item()
    psnr = small_vae.measure(load_vae(here / "small-vae"), held_out, "cpu")[1]
    assert psnr > white + 2
    assert float(re.search(r"PSNR ([\d.]+) dB", said)[1]) == pytest.approx(psnr, abs=0.5)


def test_the_same_seed_trains_the_same_vae(trained, tmp_path):
    here, _ = trained
    states = []
    for seed in (3, 3, 4):
        out = tmp_path / f"{len(states)}"
        run_cli(small_vae, "--images", here / "images", "--out", out, "--steps", 2, "--seed", seed,
                "--device", "cpu")
        states.append(load_vae(out).state_dict()["decoder.conv_out.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_muon_and_adamw_train_every_weight(trained):
    """Muon sees views of the weights; if these were copies, the convolutions would stay."""
    here, _ = trained
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**small_vae.SIZES)
    before = {k: p.clone() for k, p in vae.named_parameters()}
    small_vae.train(vae, load(here / "images", size=64), steps=2, device="cpu", batch=2)
    # The bias of a key adds the same to all logits of a softmax: its gradient is 0.
    same = [k for k, p in vae.named_parameters() if torch.equal(p, before[k])]
    assert not [k for k in same if "to_k.bias" not in k]


def test_images_become_latents_a_dit_samples_them_and_they_become_images(trained):
    """The commands of the docstring, at micro size."""
    here, _ = trained
    latents, run, vae = here / "latents", here / "run", here / "small-vae"
    said, _ = run_cli(encode, "--images", here / "images", "--out", latents, "--vae", vae,
                      "--size", 64, "--device", "cpu")
    assert "latents 8x8x4 in 2 classes" in said and "warning" not in said
    meta = json.loads((latents / "meta.json").read_text())
    assert meta["scale"] == load_vae(vae).config.scaling_factor
    run_cli(train, "--model", "dit", "--tiny", "--data", latents, "--out", run, "--steps", 2,
            "--batch", 4, "--sample-every", 0, "--device", "cpu", "--set", "dim=16", "depth=1",
            "heads=2")
    assert load_model(run / "last.pt")[0].cfg.patch == 1    # 8 x 8 tokens; TINY's 4 would give 4
    said, _ = run_cli(sample, run / "last.pt", "--vae", vae, "-n", 4, "--steps", 2, "--npz",
                      here / "s.npz", "--device", "cpu")
    with np.load(here / "s.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 64, 64, 3) and arrays["arr_0"].std() > 0
    run_cli(latent_panels, run / "last.pt", "--vae", vae, "--images", here / "images", "-n", 7,
            "--steps", 2, "--device", "cpu", "--out", here / "panels.png")
    panels = Image.open(here / "panels.png")
    assert panels.size == (3 * 6 * 64 + 2 * 24, 2 * 64 + 32)
    left = np.array(panels.convert("RGB"))[32:96, :64].astype(int)     # the first held-out image
    real = load(here / "images", "test", size=64).fetch([0])[0][0].permute(1, 2, 0).numpy()
    assert abs(left - real).mean() < 12                     # of 256 colours


@pytest.mark.parametrize("options, why", [
    (["--out", "images"], "already there"), (["--out", "new", "--steps", 0], "not between")])
def test_nothing_is_overwritten_and_wrong_options_are_one_line(trained, monkeypatch, options, why):
    monkeypatch.chdir(trained[0])
    argv = ["--images", "images", "--steps", 1, *options]
    assert why in run_cli(small_vae, *argv, code=2)[1]


def test_without_diffusers_one_line_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    argv = ["--images", tmp_path / "images", "--out", tmp_path / "vae"]
    assert "pip install diffusers" in run_cli(small_vae, *argv, code=2)[1]
    assert not (tmp_path / "images").exists()               # before anything is drawn


@pytest.mark.parametrize("source", ["emoji", "clothes"])
def test_images_are_drawn_where_there_are_none(tmp_path, monkeypatch, source):
    """With a font of two glyphs in place of the real one, or, without it, with fake clothes."""
    class Font:
        def getbbox(self, text):
            return (0, 101 * (ord(text) not in (0x1F600, 0x1F680)), 136, 101)

    class Pen:
        def __init__(self, page):
            self.page = page

        def text(self, at, text, font, embedded_color):
            assert embedded_color and isinstance(font, Font)
            self.page.paste((255, 0, 0), (34, 34, 102, 102))

    class Clothes:
        names = ["T-shirt", "bag"]

        def fetch(self, ids):
            return torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), torch.tensor([0, 1])

    monkeypatch.setattr(emoji, "FONT", str(tmp_path / "font.ttf"))
    monkeypatch.setattr(emoji, "load", lambda name: Clothes())
    monkeypatch.setattr(emoji.ImageFont, "truetype", lambda *args, **options: Font())
    monkeypatch.setattr(emoji.ImageDraw, "Draw", Pen)
    if source == "emoji":
        (tmp_path / "font.ttf").touch()
    emoji.draw_images(tmp_path / "images")
    found = load(tmp_path / "images", hold_out=0)
    x, _ = found.fetch([0, 1])                              # (2, 3, 64, 64)
    assert found.names == (["1f600", "1f680"] if source == "emoji" else ["T-shirt", "bag"])
    middle = [255, 0, 0] if source == "emoji" else [55] * 3
    assert x[0, :, 32, 32].tolist() == middle and x[0, :, 1, 1].tolist() == [255] * 3
    assert not (tmp_path / "images.part").exists()


@pytest.mark.skipif(not emoji.Path(emoji.FONT).exists(), reason="needs fonts-noto-color-emoji")
def test_the_font_has_more_than_a_thousand_different_emoji(tmp_path):
    drawn = [(name, image.tobytes()) for name, _, image in emoji.emoji()]
    assert len(drawn) > 1000 and len({image for _, image in drawn}) == len(drawn)
    assert sum(name == "1f600" for name, _ in drawn) == 80 and b"\xff" * 12288 not in dict(
        map(reversed, drawn))
