"""sample.py: what the command line asks for is what is sampled, and the files it writes."""

import argparse
import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import batch, golden, run_cli, smallest_run, write_model
from PIL import Image

import diffusion as diffusions
import dit
import sample
import train
from common import official, sampling
from common.checkpoint import MODELS, load_model, read_checkpoint, write_checkpoint
from common.cli import UserError
from common.files import to_uint8
from data import encode, folder, load
from experiments import metrics, sample_npz

pytestmark = pytest.mark.usefixtures("few_digits")
IMAGES = dict(channels=1, patch=4, dim=32, heads=2)


def arrays(file):
    with np.load(file) as z:
        return z["arr_0"], z["arr_1"]


def test_what_the_command_line_asks_for_reaches_the_sampler(tmp_path):
    model, diffusion = write_model(tmp_path / "dit.pt", "dit", "ddpm", classes=10)
    run_cli(sample, tmp_path / "dit.pt", "--n", 2, "--npz", tmp_path / "s.npz", "--solver", "ddim",
            "--eta", 0.5, "--steps", 4, "--cfg", 3, "--seed", 7, "--cfg-interval", 0.2, 0.6,
            "--cfg-channels", 2, "--classes", 5, "--spacing", "leading", "--clip-x0", 3)
    c, y = model.cfg, torch.tensor([5, 5])

    def end(cfg=3.0, channels=2, interval=(0.2, 0.6), steps=4, solver="ddim", eta=0.5, seed=7,
            **more):
        more = dict(spacing="leading", clip_x0=3.0) | more
        noise = lambda i: diffusions.sample_noise(seed, range(2), (c.channels, c.size, c.size), i)
        f = diffusions.guide(model, y, c.classes, cfg, channels, interval)
        with torch.no_grad():
            *_, (_, x, _) = diffusion.trajectory(f, noise(-1), steps, solver, eta, noise, **more)
        return to_uint8(x)
    images, labels = arrays(tmp_path / "s.npz")
    assert np.array_equal(images, end()) and labels.tolist() == [5, 5]
    for other in (dict(cfg=1.5), dict(channels=3), dict(interval=(0.0, 1.0)), dict(eta=0.0),
                  dict(solver="ddpm"), dict(steps=5), dict(seed=0), dict(spacing="trailing"),
                  dict(clip_x0=None), dict(clip_x0=1.0)):
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
    ("--spacing leading", "--spacing is for --solver ddpm or ddim, not euler"),
    ("--clip-x0 1", "--path ddpm"), ("--clip-x0 none", "--clip-x0"), ("--classes cat", "0 to 9"),
    ("--classes -1", "0 to 9"), ("--vae any", "makes images, not latents"),
    ("--n 2 --out s.npz --npz s.npz", ".png"),
    ("--out film.png --film", "film.png"), ("--weights best", "best"), ("--device tpu", "tpu")])
def test_what_cannot_be_sampled_is_one_clear_line(tmp_path, options, word):
    write_model(tmp_path / "last.pt", "dit", **IMAGES)
    _, error = run_cli(sample, tmp_path / "last.pt", *options.split(), code=2)
    assert word in error and {file.name for file in tmp_path.iterdir()} == {"last.pt"}, error


# ------------------------------------------------------------------------ what is sampled


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    """A small DiT of a few dozen steps for each noise schedule of ddpm."""
    out = tmp_path_factory.mktemp("trained")
    for schedule in ("linear", "cosine"):
        run_cli(train, *smallest_run(out / schedule, "--path", "ddpm", "--schedule", schedule,
                                     "--steps", 60, "--batch", 16, "--lr", 3e-3, "--log-every", 60,
                                     "--sample-every", 60, "--set", "dim=32"))
    return out


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_trained_model_draws_images_within_their_range_with_every_solver(
        tmp_path, trained, schedule, solver, steps):
    file = trained / schedule / "last.pt"
    model, diffusion, _ = load_model(file)
    x = sample.generate(model, diffusion, torch.arange(4), steps=steps, solver=solver)
    assert x.abs().max() <= 1 and -1 < x.mean() < 0.3               # digits are mostly black
    run_cli(sample, file, "--n", 4, "--steps", steps, "--solver", solver, "--npz",
            tmp_path / "s.npz", "--out", tmp_path / "grid.png")
    assert np.array_equal(arrays(tmp_path / "s.npz")[0], to_uint8(x))


def test_training_shows_clipped_samples_too(trained):
    model, diffusion, _ = load_model(trained / "cosine/last.pt")
    x = sample.generate(model, diffusion, torch.arange(10).repeat(4), clip_x0=1.0)
    shown = np.asarray(Image.open(trained / "cosine/samples/step_0000060.png").convert("RGB"))
    zoom = 64 // 28
    assert np.array_equal(shown[2 * zoom : 30 * zoom : zoom, 2 * zoom : 30 * zoom : zoom],
                          to_uint8(x)[0])


def test_latents_with_the_cosine_schedule_are_sampled_with_a_hint(tmp_path):
    write_model(tmp_path / "dit.pt", "dit", "ddpm")
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    options = content["path"]["options"]
    for schedule, predict, more, hint in (("cosine", "eps", [], True), ("linear", "eps", [], False),
                                          ("cosine", "v", [], False),
                                          ("cosine", "eps", ["--clip-x0", 5], False)):
        options.update(schedule=schedule, predict=predict)
        write_checkpoint(tmp_path / "dit.pt", content)
        said, _ = run_cli(sample, tmp_path / "dit.pt", "--n", 1, "--steps", 2, *more)
        assert ("--clip-x0 5" in said) == hint, (schedule, predict)


@pytest.mark.parametrize("channels, data, clip", [
    (1, {}, 1.0), (3, {}, 1.0), (4, {}, None), (3, dict(latent=True), None),
    (4, dict(latent=False), 1.0)])
def test_estimates_of_images_are_clipped_and_those_of_latents_are_not(channels, data, clip):
    """The checkpoint knows what it makes; an older one is judged by its channels."""
    model = SimpleNamespace(cfg=SimpleNamespace(channels=channels))
    checkpoint = dict(data=data, path=dict(kind="ddpm", options={}))
    for asked, expected in (("auto", clip), (None, None), (5.0, 5.0)):
        args = SimpleNamespace(clip_x0=asked)
        assert sampling.choose_clip(args, model, checkpoint) == expected
    assert [sampling.bound(text) for text in ("auto", "off", "on", "5")] == ["auto", None, 1.0, 5.0]


BREAK = {"a NaN weight": [], "guidance beyond all numbers": ["--cfg", 1e30]}


def broken_model(file, how):
    write_model(file, "dydit", **IMAGES)
    content = torch.load(file, weights_only=True)
    if not BREAK[how]:
        content["ema"]["final_layer.linear.bias"][0] = math.nan
    write_checkpoint(file, content)
    return [file, "--n", 5, "--steps", 4, *BREAK[how]]


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("program, options", [
    (sample, []), (sample, ["--film"]), (sample, ["--maps"]), (sample, ["--npz", "s.npz"]),
    (sample_npz, ["--npz", "s.npz"])])
def test_samples_that_are_not_finite_are_counted_and_nothing_is_written(
        tmp_path, monkeypatch, program, options, how):
    monkeypatch.chdir(tmp_path)
    argv = broken_model(tmp_path / "last.pt", how)
    _, error = run_cli(program, *argv, *options, "--device", "cpu", code=2)
    assert "5 of 5 samples are NaN" in error
    assert not [*tmp_path.rglob("*.png"), *tmp_path.glob("*.npz"), *tmp_path.rglob("*.npy")]


def test_metrics_do_not_measure_samples_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "load_net", lambda source: None)
    file, fields = tmp_path / "dit.pt", dict(size=28, patch=4, channels=1, dim=32, heads=2)
    write_model(file, "dit", **fields)
    _, error = run_cli(metrics, file, "--n", 5, "--steps", 4, "--cfg", 1e30, code=2)
    assert "5 of 5 samples are NaN" in error
    with pytest.raises(UserError, match="NaN or infinity"):         # infinity would be clamped to 1
        metrics.to_images(torch.full((4, 1, 2, 2), torch.inf), 1)


def test_samples_that_are_not_finite_do_not_end_a_training_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "guide", lambda *options: lambda x, t: math.nan * x)
    said, _ = run_cli(train, *smallest_run(tmp_path, "--steps", 2, "--sample-every", 1))
    assert said.count("samples are NaN or infinite") == 2 and "step_0000001.png" in said
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert not (tmp_path / "samples").exists()


def test_a_model_that_never_dropped_labels_is_sampled_without_guidance(tmp_path, monkeypatch):
    run_cli(train, *smallest_run(tmp_path / "run", "--steps", 1, "--drop", 0, "--sample-every", 1))
    file, scales = tmp_path / "run/last.pt", []

    def guide(model, y, none, scale, *options):
        scales.append(scale)
        return diffusions.guide(model, y, none, scale, *options)
    monkeypatch.setattr(sample, "guide", guide)
    monkeypatch.setattr(metrics, "evaluate", lambda *a: {})
    options = ["--n", 4, "--steps", 1, "--device", "cpu"]
    for program, more in ((sample, []), (sample_npz, ["--npz", tmp_path / "s.npz"]), (metrics, [])):
        said, _ = run_cli(program, file, *options, *more)
        assert "trained with --drop 0" in said and set(scales) == {1.0}, program
        scales.clear()
    said, _ = run_cli(sample, file, *options, "--cfg", 3)
    assert set(scales) == {3.0} and "--drop" not in said
    scales.clear()
    for drop, scale in ((0, 1.0), (0.1, 2.0)):                      # the sheets of training
        run_cli(train, *smallest_run(tmp_path / str(drop), "--steps", 1, "--drop", drop,
                                     "--sample-every", 1))
        assert set(scales) == {scale}
        scales.clear()
    said, _ = run_cli(sample, tmp_path / "0.1/last.pt", *options)
    assert set(scales) == {2.0} and "--drop" not in said


def test_classes_are_asked_for_and_shown_by_name(tmp_path):
    file = tmp_path / "dit.pt"
    write_model(file, "dit", **IMAGES)
    content = torch.load(file, weights_only=True)
    content["data"]["names"] = ["cat", "dog", "10", "a\x1b[2J", *"456789"]

    def asked(*classes):
        write_checkpoint(file, content)
        said, _ = run_cli(sample, file, "--n", 3, "--steps", 1, "--npz", tmp_path / "s.npz",
                          *(["--classes", *classes] if classes else []))
        return arrays(tmp_path / "s.npz")[1].tolist(), said
    labels, said = asked("dog", "0")
    assert labels == [1, 0, 1] and "classes 0 cat, 1 dog" in said
    assert asked("10")[0] == [2, 2, 2]                              # a name counts before a number
    assert asked("9", "3")[0] == [9, 3, 9] and "\x1b" not in asked("3")[1]
    _, error = run_cli(sample, file, "--classes", "cow", code=2)
    assert "--classes cow" in error and "0 cat, 1 dog, 2 10" in error and "\x1b" not in error
    content["data"]["names"] = [str(i) for i in range(10)]
    labels, said = asked("7")
    assert labels == [7, 7, 7] and "; classes" not in said         # the names are the numbers


# ------------------------------------------------------------------------ bf16, --compile


@pytest.mark.parametrize("name", MODELS)
def test_bf16_changes_samples_by_its_rounding_only(tmp_path, name):
    """--amp bf16, and a model whose weights are bf16; neither touches times, steps or routers."""
    file = tmp_path / "last.pt"
    write_model(file, name, **IMAGES)
    labels = torch.arange(4)

    def draw(convert=lambda model: model, **options):
        model, diffusion, _ = load_model(file)
        model = convert(model)
        seen = []
        model.t_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        x = sample.generate(model, diffusion, labels, steps=4, **options)
        assert {t.dtype for t in seen} == {torch.float32} == {x.dtype}
        return x
    exact, automatic = draw(), draw(amp="auto")
    assert torch.equal(exact, automatic)                            # on a CPU: the same bytes
    for rounded in (draw(amp="bf16"), draw(lambda model: model.bfloat16())):
        error = (rounded - exact).square().mean().sqrt() / exact.std()
        assert 1e-5 < error < 0.05, error


def test_bf16_reaches_every_program_that_samples_and_auto_is_float32_on_a_cpu(
        tmp_path, monkeypatch):
    file, fields = tmp_path / "dit.pt", dict(size=28, patch=4, channels=1, dim=32, heads=2)
    write_model(file, "dit", **fields)
    monkeypatch.setattr(metrics, "evaluate", lambda *a: {})
    monkeypatch.setattr(metrics, "load_net", lambda source: None)
    monkeypatch.setattr(metrics, "validation_loss", lambda *a: dict(mean=1.0, bins=[]))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    seen, compiled, forward = set(), [], dit.DiT.forward

    def watched(model, *inputs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(model, *inputs)
    monkeypatch.setattr(dit.DiT, "forward", watched)
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call) or call)
    for program, more in ((sample, []), (sample_npz, ["--npz", tmp_path / "s.npz"]), (metrics, [])):
        for amp in ("bf16", "auto", "off"):
            argv = [file, "--n", 4, "--steps", 1, "--device", "cpu", "--amp", amp, *more]
            run_cli(program, *argv)
            assert seen == {amp == "bf16"}, (program, amp)
            seen.clear()
        assert not compiled
        run_cli(program, *argv, "--compile")
        assert len(compiled) == 2                                   # blocks, and nothing else
        compiled.clear()
        seen.clear()


def test_compiled_blocks_draw_the_same_images(tmp_path, monkeypatch):
    """With the compiler's first half, which finds every graph break but needs no C++ compiler."""
    write_model(tmp_path / "last.pt", "dit", **IMAGES)
    kept = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: kept(f, backend="eager", fullgraph=True))
    plain, compiled = ((sample.generate(*sampling.load_sampler(
        tmp_path / "last.pt", SimpleNamespace(weights="ema", compile=c), "cpu")[:2],
        torch.arange(3), steps=2)) for c in (False, True))
    assert torch.allclose(plain, compiled, atol=1e-5)


def test_maps_show_the_compute_of_the_labelled_images():
    """Guidance asks for each image twice; the half without a label must not get into the maps."""
    class Tells(torch.nn.Module):
        cfg = SimpleNamespace(classes=10)

        def forward(self, x, t, y):
            return x, {"map": y.view(1, -1, 1).repeat(3, 1, 4), "other": y}
    record, y = sample.RecordAux(Tells(), {"map": 1}), torch.tensor([4, 7, 0])
    for scale in (2.0, 1.0):
        diffusions.guide(record, y, 10, scale)(torch.zeros(3, 1, 2, 2), 0.5)
    for t, aux in record.calls:
        assert t == 0.5 and list(aux) == ["map"]
        assert torch.equal(aux["map"], y.view(1, 3, 1).repeat(3, 1, 4))


def test_the_validation_loss_leaves_the_device_before_it_becomes_float64():
    """Apple's GPUs have no float64."""
    class OnMPS:
        def cpu(self):
            return torch.ones(100)
    model = torch.nn.Linear(1, 1)
    diffusion = SimpleNamespace(from_uniform=lambda u: u, mse=lambda *a: (OnMPS(), {}))

    class Data(SimpleNamespace):
        def __len__(self):
            return 100

        def batch(self, ids):
            return torch.zeros(len(ids), 1, 2, 2), torch.zeros(len(ids), dtype=torch.long)
    assert metrics.validation_loss(model, diffusion, Data(channels=1, size=2))["mean"] == 1


def test_released_weights_know_the_scale_of_their_latents_and_the_authors_steps(tmp_path):
    meta, state, _ = golden("dit")
    torch.save(state, tmp_path / "theirs.pt")
    said, _ = run_cli(official, "dit", tmp_path / "theirs.pt", "--set", f"heads={meta['heads']}",
                      "--out", tmp_path / "last.pt")
    assert "--solver ddim --spacing leading" in said
    assert read_checkpoint(tmp_path / "last.pt")["data"]["scale"] == 0.18215


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


def test_a_vae_with_other_latents_is_refused_before_sampling(monkeypatch):
    vae = VAE()
    vae.config = SimpleNamespace(latent_channels=16)            # Stable Diffusion 3's
    vae.from_pretrained = lambda name: vae
    monkeypatch.setattr(encode, "autoencoder_class", lambda: vae)
    with pytest.raises(UserError, match="16 channels, those of this checkpoint 4"):
        sample.decoder("any", dict(latent=True), "cpu", 4)


def test_images_become_latents_a_model_samples_them_and_they_become_images(tmp_path, monkeypatch):
    images = write_images(tmp_path / "in", 24, 32)
    encode.encode(images, tmp_path / "latents", VAE(), "any", size=32)
    monkeypatch.setattr(sample, "load_vae", lambda *_: VAE())
    said = sample_latents(tmp_path, "any")
    assert "channels: mean -0." in said and "warning" in said       # grey images: std far from 1
    model, diffusion, _ = load_model(tmp_path / "out/last.pt")
    latents = sample.generate(model, diffusion, torch.arange(4) % 2, steps=2)
    assert torch.allclose(torch.cat(VAE.decoded), 2 * latents)      # divided by the VAE's scale


def grey_there_and_back(tmp_path, monkeypatch, about=None, rewrite=lambda content: None, **factors):
    """Encode grey images of 64 and 192, let a model train on them, and decode what it was trained
    on by the checkpoint's own knowledge -> the grey levels. about: changes of meta.json."""
    vae = VAE()
    vae.config = SimpleNamespace(**factors)
    monkeypatch.setattr(sample, "load_vae", lambda *_: vae)
    for i in range(24):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        grey = np.full((32, 32, 3), (64, 192)[i % 2], np.uint8)
        Image.fromarray(grey).save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    encode.encode(tmp_path / "in", tmp_path / "latents", vae, "any", size=32)
    meta = tmp_path / "latents/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | (about or {})))
    run_cli(train, *smallest_run(tmp_path / "out", "--set", "patch=2", "--data",
                                 tmp_path / "latents", "--steps", 1))
    content = read_checkpoint(tmp_path / "out/last.pt")
    rewrite(content)
    data = load(tmp_path / "latents")
    x, y = data.batch([*range(len(data))])
    decode = sample.decoder("any", content["data"], torch.device("cpu"), 4)
    images = to_uint8(decode(x))
    return [int(images[y == label].mean().round()) for label in (0, 1)], x, json.loads(
        meta.read_text())


@pytest.mark.parametrize("about", [None, dict(scale=0.3), dict(scale=1.0), dict(shift=0.2)])
def test_latents_are_decoded_with_the_scale_and_shift_that_the_model_was_trained_with(
        tmp_path, monkeypatch, about):
    grey, _, _ = grey_there_and_back(tmp_path, monkeypatch, about, scaling_factor=0.5)
    assert grey == [64, 192]


def test_a_vae_that_shifts_its_latents_encodes_and_decodes(tmp_path, monkeypatch):
    """Stable Diffusion 3 and FLUX."""
    grey, x, meta = grey_there_and_back(tmp_path, monkeypatch, scaling_factor=1.5, shift_factor=0.6)
    assert grey == [64, 192] and (meta["scale"], meta["shift"]) == (1.5, 0.6)
    expected = [1.5 * (2 * (v / 127.5 - 1) - 0.6) for v in (64, 192)]       # VAE above doubles
    assert sorted(x.unique().tolist()) == pytest.approx(expected, abs=2e-3)


def test_a_checkpoint_that_tells_no_scale_is_decoded_with_that_of_the_vae(tmp_path, monkeypatch):
    def older(content):
        del content["data"]["scale"], content["data"]["shift"]
    grey, *_ = grey_there_and_back(tmp_path, monkeypatch, None, older, scaling_factor=0.5,
                                   shift_factor=0.6)
    assert grey == [64, 192]


def test_latents_that_came_already_scaled_are_decoded_with_the_scale_of_the_vae(
        tmp_path, monkeypatch):
    """Fast-DiT's files: the number that they were multiplied with is not in them."""
    for i in range(20):
        for kind, array in (("features", np.full((1, 4, 4, 4), 0.25 - i % 2, np.float32)),
                            ("labels", np.array([i % 2]))):
            (tmp_path / f"imagenet256_{kind}").mkdir(exist_ok=True)
            np.save(tmp_path / f"imagenet256_{kind}/{i}.npy", array)
    run_cli(train, *smallest_run(tmp_path / "out", "--set", "patch=2", "--data", tmp_path,
                                 "--steps", 1))
    content = read_checkpoint(tmp_path / "out/last.pt")
    monkeypatch.setattr(sample, "load_vae", lambda *_: VAE())     # scale 0.5, doubles
    decode = sample.decoder("any", content["data"], torch.device("cpu"), 4)
    assert content["data"]["scale"] is None and \
        decode(torch.full((1, 4, 4, 4), 0.25)).unique() == 0.25


@pytest.mark.parametrize("field, value", [("scale", 0.0), ("scale", -1.0), ("scale", math.nan),
                                          ("scale", "1"), ("shift", math.inf), ("shift", None)])
def test_an_impossible_scale_or_shift_is_refused(tmp_path, field, value):
    write_model(tmp_path / "dit.pt", "dit", **IMAGES)
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    content["data"][field] = value
    write_checkpoint(tmp_path / "dit.pt", content)
    assert "damaged" in run_cli(sample, tmp_path / "dit.pt", code=2)[1]


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
