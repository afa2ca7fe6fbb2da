"""The metrics against closed forms and cases worked by hand, the feature net against what its file
says, and the command line."""

import json
import math
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from helpers import run_cli, write_model
from PIL import Image

import sample
from common.cli import UserError
from data import load
from experiments import feature_net, metrics


def gaussian(n, mean, cov, seed):
    root = torch.linalg.cholesky(torch.tensor(cov, dtype=torch.float64))
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    z = z - z.mean(0)                                       # exactly mean 0 and covariance 1 ...
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return torch.tensor(mean, dtype=torch.float64) + z @ root.T         # ... so no sampling error


# -------------------------------------------------------------------------------- Frechet distance

def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    a = gaussian(500, [0.0, 0.0, 1.0], [[4.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]], 1)
    b = gaussian(300, [1.0, 0.0, 3.0], [[1.0, 0, 0], [0, 16.0, 0], [0, 0, 1.0]], 2)
    # commuting covariances: |m|^2 + sum (s_a - s_b)^2 = (1 + 4) + (2-1)^2 + (3-4)^2 + 0
    assert metrics.frechet(a, b) == pytest.approx(7.0, abs=1e-9)


def test_frechet_distance_of_correlated_gaussians_is_the_closed_form():
    a = gaussian(400, [0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]], 3)
    b = gaussian(400, [0.0, 0.0], [[2.0, 0.0], [0.0, 1.0]], 4)
    # 2x2: tr sqrt(P) = sqrt(tr P + 2 sqrt det P), P = AB: tr P = 6, det P = 3 * 2
    expected = 4 + 3 - 2 * math.sqrt(6 + 2 * math.sqrt(6))
    assert metrics.frechet(a, b) == pytest.approx(expected, abs=1e-9)
    assert metrics.frechet(b, a) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_when_it_is_flat():
    a = gaussian(100, [1.0, 2.0], [[1.0, 0.3], [0.3, 1.0]], 5)
    flat = torch.cat([a, a[:, :1] * 2, torch.zeros(100, 1)], dim=1)     # covariance of rank 2 in 4
    assert metrics.frechet(flat, flat) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(flat, flat + 3) == pytest.approx(4 * 9, abs=1e-6)


def test_two_sets_of_white_noise_differ_by_their_sampling_errors():
    a, b = torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(0))
    # means: 2 D / N; covariances, to first order: |error|^2 / 4 = D (D + 1) / (2 N)
    assert metrics.frechet(a, b) == pytest.approx((2 * 64 + 64 * 65 / 2) / 4000, rel=0.05)


# ---------------------------------------------------------------------------- precision and recall

def test_precision_and_recall_of_a_case_worked_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])       # k = 1: radii 1 cover [-1, 4]
    fake = torch.tensor([[0.5], [3.9], [4.1], [9.0]])       # radii 3.4, 0.2, 0.2, 4.9
    precision, recall = metrics.precision_recall(real, fake, k=1)
    assert (precision, recall) == (0.5, 1.0)                # 0.5 covers [-2.9, 3.9]: all real
    # k = 2: radii of real 2 1 1 2 cover [-2, 5]; of fake 3.6 3.4 3.6 5.1 cover everything real
    assert metrics.precision_recall(real, fake, k=2) == (0.75, 1.0)


def test_a_point_on_the_edge_of_a_ball_is_inside():
    real, fake = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [7.0]])
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 1.0)      # 2 is exactly 1 away from 1


def test_recall_notices_forgotten_images_and_precision_invented_ones():
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(200, 8, generator=g), torch.randn(200, 8, generator=g) + 50
    fake = torch.randn(200, 8, generator=g)
    precision, recall = metrics.precision_recall(torch.cat([left, right]), fake)
    assert precision > 0.8 and 0.4 < recall < 0.5
    precision, recall = metrics.precision_recall(left, torch.cat([fake, right]))
    assert 0.4 < precision < 0.5 and recall > 0.8


def test_precision_and_recall_do_not_depend_on_the_chunks():
    g = torch.Generator().manual_seed(2)
    real, fake = torch.randn(2, 1203, 3, generator=g).double()
    far = torch.cdist(real, real).sort(1).values[:, 3]
    inside = (torch.cdist(fake, real) <= far).any(1).double().mean().item()
    assert metrics.precision_recall(real, fake)[0] == pytest.approx(inside)
    with pytest.raises(UserError, match="more than k = 3"):
        metrics.precision_recall(real[:3], fake)


# -------------------------------------------------------------------------------------- paired loss

class Diffusion:
    """Stands in for a diffusion: the error of an image is what the model predicts."""

    def from_uniform(self, u):
        assert 0 <= u.min() and u.max() < 1
        return (1000 * u).floor() / 1000

    def mse(self, model, x0, y, t, noise):
        prediction, aux = model(x0 + noise, t, y)
        return prediction, aux


class TimeModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x, t, y):
        assert not self.training
        self.seen.append((x, t, y))
        return t * self.weight, {"balance_loss": torch.tensor(1e6)}     # aux must not count


@pytest.fixture(scope="module")
def held_out():
    torch.set_num_threads(1)
    return load("digits", "test")


def test_validation_times_cover_0_to_1_evenly(held_out):
    found = metrics.validation_loss(TimeModel(), Diffusion(), held_out, n=1000)
    assert found["mean"] == pytest.approx(0.4995, abs=5e-4)             # rounded down by 1/2000
    assert found["bins"] == pytest.approx([0.05 + i / 10 - 5e-4 for i in range(10)], abs=2e-3)


def test_two_models_meet_the_same_images_times_noise_and_labels(held_out):
    a, b = TimeModel().train(), TimeModel()
    metrics.validation_loss(a, Diffusion(), held_out, n=230)
    torch.rand(7)                                           # torch's own generator plays no part
    metrics.validation_loss(b, Diffusion(), held_out, n=230)
    assert all(torch.equal(u, v) for p, q in zip(a.seen, b.seen) for u, v in zip(p, q))
    assert a.training and sum(len(x) for x, _, _ in a.seen) == 230
    metrics.validation_loss(b, Diffusion(), held_out, n=230, seed=1)
    assert not torch.equal(b.seen[0][1], b.seen[3][1])


# -------------------------------------------------------------------------------- the feature net

def test_the_shipped_feature_nets_are_as_accurate_as_their_files_say(held_out):
    net, about = feature_net.load("digits")
    assert feature_net.accuracy(net.train(), held_out) == pytest.approx(about["accuracy"], abs=1e-3)
    assert about["accuracy"] >= 0.99 and not net.training
    assert feature_net.load("fashion-mnist")[1]["accuracy"] >= 0.915
    assert sum(p.numel() for p in net.parameters()) < 70_000


def test_a_feature_net_with_one_changed_byte_is_an_error(tmp_path):
    for name in ("digits.pt", "SHA256SUMS"):
        (tmp_path / name).write_bytes((feature_net.ASSETS / name).read_bytes())
    feature_net.load("digits", tmp_path)
    raw = bytearray((tmp_path / "digits.pt").read_bytes())
    raw[5000] ^= 1
    (tmp_path / "digits.pt").write_bytes(raw)
    with pytest.raises(UserError, match="checksum"):
        feature_net.load("digits", tmp_path)
    with pytest.raises(UserError, match="python -m experiments.feature_net --data mnist"):
        feature_net.load("mnist", tmp_path)


def test_a_feature_net_survives_saving_in_half_precision(tmp_path, held_out):
    class Few:                                              # 512 images of the test split
        channels, classes, flips, source, size = 1, 10, True, "mnist", 28
        batch, __len__ = staticmethod(held_out.batch), lambda self: 512

    log = []
    net = feature_net.train(Few(), epochs=2, batch=64, log=log.append)
    assert len(log) == 2
    path = feature_net.save(net, Few(), 0.5, tmp_path)
    again, about = feature_net.load("mnist", tmp_path)
    x = held_out.batch(torch.arange(8))[0]
    assert about["accuracy"] == 0.5 and path.stat().st_size < 150_000
    assert torch.allclose(net.eval()(x)[0], again(x)[0], atol=1e-2)     # fp16 in the file


def write_digits(root, shift, n=4):
    """IDX files of a set that is no copy of any other -> its folder."""
    root.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = (np.arange(n) + shift).astype(np.uint8) % 3
        images = np.zeros((n, 8, 8), np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (root / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
    return root


def test_a_feature_net_belongs_to_its_data_and_not_to_the_name_of_a_folder(tmp_path, monkeypatch):
    """my pics/ of two people are two data sets, and a folder called digits is not `digits`."""
    shutil.copytree(feature_net.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(feature_net, "ASSETS", tmp_path / "assets")
    shipped = feature_net.load("digits")[1]["accuracy"]
    sources = [write_digits(tmp_path / where, i) for i, where in enumerate(
        ("a/my pics", "b/my pics", "c/digits"))]
    for i, source in enumerate(sources):
        images = load(source)
        net = feature_net.FeatureNet(images.channels, images.classes)
        feature_net.save(net, images, i / 10)
    assert [feature_net.load(source)[1]["accuracy"] for source in sources] == [0, 0.1, 0.2]
    assert feature_net.load("digits")[1]["accuracy"] == shipped
    os.rename(tmp_path / "a", tmp_path / "d")               # the same data at another place
    assert feature_net.load(tmp_path / "d" / "my pics")[1]["accuracy"] == 0
    with pytest.raises(UserError, match="no feature net"):
        feature_net.load(write_digits(tmp_path / "e" / "my pics", 0, n=5))


def test_a_shipped_feature_net_is_never_overwritten(monkeypatch):
    monkeypatch.setattr(feature_net, "train", lambda *a: pytest.fail("trained for nothing"))
    before = (feature_net.ASSETS / "SHA256SUMS").read_bytes()
    assert "is there already" in run_cli(feature_net, "--data", "digits", code=2)[1]
    with pytest.raises(UserError, match="is there already"):
        feature_net.save(feature_net.FeatureNet(1, 10), load("digits", "test"), 0.5)
    assert (feature_net.ASSETS / "SHA256SUMS").read_bytes() == before


def test_shifting_moves_an_image_and_repeats_its_border():
    x = torch.arange(25.0).view(1, 1, 5, 5).repeat(50, 1, 1, 1)
    moved = feature_net.shift(x, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (1,) * 4, mode="replicate")[0, 0]
    allowed = [padded[i:i + 5, j:j + 5] for i in range(3) for j in range(3)]
    found = {next(i for i, a in enumerate(allowed) if torch.equal(a, m[0])) for m in moved}
    assert found == set(range(9))


# ---------------------------------------------------------------------------------------- evaluate

def test_real_images_score_like_real_ones_and_noise_does_not(held_out):
    ids = torch.arange(400)
    x, y = held_out.batch(ids)
    good = metrics.evaluate(x, y, "digits")
    assert good["accuracy"] > 0.98 and good["precision"] > 0.7 and good["recall"] > 0.7
    assert 0 < good["frechet_real"] < good["frechet"] * 1.5 < 6 * good["frechet_real"]
    wrong = metrics.evaluate(x, (y + 1) % 10, "digits")
    assert wrong["accuracy"] < 0.02 and wrong["frechet"] == good["frechet"]     # only accuracy sees
    noise = metrics.evaluate(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), y)
    assert noise["frechet"] > 10 * good["frechet"] and noise["precision"] < 0.05
    forgot = metrics.evaluate(x[y < 5], y[y < 5], "digits")
    assert forgot["recall"] < 0.7 < forgot["precision"]


def test_the_two_real_sets_share_no_image():
    a, b = metrics.real_features("digits", 500)
    assert len(a) == len(b) == 500
    assert torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min() > 0


def images_and_labels(held_out, n):
    x, y = held_out.batch(torch.arange(n))
    return x, y, sample.to_uint8(x)


def test_an_npz_scores_as_the_images_it_was_made_from(tmp_path, held_out):
    x, y, rgb = images_and_labels(held_out, 100)
    sample.write_npz(tmp_path / "s.npz", lambda: iter([rgb]), y)
    out, _ = run_cli(metrics, tmp_path / "s.npz", "--data", "digits", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    direct = metrics.evaluate(x, y, "digits")
    assert all(word in out for word in ("Frechet", "accuracy", "precision", "recall"))
    assert found.pop("source") == direct.pop("source")
    assert all(found[key] == pytest.approx(direct[key], abs=1e-6) for key in direct)


def test_a_checkpoint_is_sampled_and_its_loss_is_measured(tmp_path):
    file, fields = tmp_path / "dit.pt", dict(size=28, patch=4, channels=1, dim=32, heads=2)
    write_model(file, "dit", **fields)
    out, _ = run_cli(metrics, file, "--n", 5, "--steps", 1, "--json", tmp_path / "m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["n"] == 5 and found["source"] == "digits" and "validation loss" in out
    assert 0.5 < found["loss"]["mean"] < 4 and len(found["loss"]["bins"]) == 10
    assert "euler, heun" in run_cli(metrics, file, "--solver", "ddim", code=2)[1]
    write_model(file, "dit", classes=0, **fields)
    assert "without classes" in run_cli(metrics, file, code=2)[1]


def test_the_data_of_a_checkpoint_are_recognised_at_another_place(tmp_path):
    """Else images that it has trained on would count as held out."""
    for i in range(20):
        (tmp_path / "in" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "in" / f"{i % 2}" / f"{i}.png")
    images = load(tmp_path / "in", size=8, hold_out=0)
    write_model(tmp_path / "dit.pt", "dit", channels=3, classes=2)
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    torch.save(content | {"data": images.about()}, tmp_path / "dit.pt")
    os.rename(tmp_path / "in", tmp_path / "there")
    _, error = run_cli(metrics, tmp_path / "dit.pt", "--data", tmp_path / "there", code=2)
    assert "--hold-out is 0" in error


@pytest.mark.parametrize("arrays, word", [
    (dict(arr_0=np.zeros((5, 28, 28, 3), np.uint8)), "arr_1"),
    (dict(arr_0=np.zeros((5, 28, 28, 3), np.float32), arr_1=np.zeros(5, np.int64)), "uint8"),
    (dict(arr_0=np.zeros((5, 28, 28, 3), np.uint8), arr_1=np.array([{}] * 5)), "cannot be read"),
    (dict(arr_0=np.zeros((5, 28, 28, 3), np.uint8), arr_1=np.zeros(4, np.int64)), "4 labels"),
    (dict(arr_0=np.zeros((5, 28, 28, 3), np.uint8), arr_1=np.full(5, 10)), "10 classes"),
    (dict(arr_0=np.zeros((5, 32, 32, 3), np.uint8), arr_1=np.zeros(5, np.int64)), "32"),
    (dict(arr_0=np.zeros((0, 28, 28, 3), np.uint8), arr_1=np.zeros(0, np.int64)), "4 dimensions"),
    (dict(arr_0=np.zeros((3, 28, 28, 3), np.uint8), arr_1=np.zeros(3, np.int64)), "more than k"),
    (dict(arr_0=np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8),
          arr_1=np.zeros(5, np.int64)), "colour")])
def test_a_broken_npz_is_one_line_and_exit_2(tmp_path, arrays, word):
    np.savez(tmp_path / "s.npz", **arrays)
    assert word in run_cli(metrics, tmp_path / "s.npz", "--data", "digits", code=2)[1]


def test_an_npz_that_unpacks_to_a_thousand_times_its_size_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LIMIT", 1 << 20)                  # else 1 GB is fine
    images, labels = np.zeros((600, 28, 28, 3), np.uint8), np.zeros(600, int)
    np.savez_compressed(tmp_path / "s.npz", arr_0=images, arr_1=labels)
    assert "unpacks to" in run_cli(metrics, tmp_path / "s.npz", "--data", "digits", code=2)[1]


def test_bad_arguments_are_one_line_and_exit_2(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 no zip")
    for argv, word in ([["s.npz", "--data", "digits"], "cannot be read"], [["s.npz"], "--data"],
                       [["nothing.pt"], "no such file"], [["s.npz", "--n", "3"], "--n"],
                       [["s.npz", "--json", "r.txt"], "r.txt"]):
        assert word in run_cli(metrics, tmp_path / argv[0], *argv[1:], code=2)[1]


def test_fidelity_hands_both_sets_to_the_library(tmp_path, monkeypatch):
    """The library needs Inception's weights, so the test looks at what the library is given."""
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), dtype=np.uint8)
    sample.write_npz(tmp_path / "s.npz", lambda: iter([x[0]]), torch.arange(5))
    np.savez(tmp_path / "ref.npz", arr_0=x[1], mu=np.zeros(3))          # as ADM's: without labels
    argv = [tmp_path / "s.npz", "--fidelity", tmp_path / "ref.npz"]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)            # as if not installed
    assert "pip install torch-fidelity" in run_cli(metrics, *argv, code=2)[1]

    def calculate_metrics(input1, input2, cuda, **wanted):
        assert wanted["fid"] and wanted["isc"] and not cuda
        for ours, images in zip((input1, input2), x):
            assert len(ours) == 5 and ours[3].dtype == torch.uint8
            assert np.array_equal(ours[3].permute(1, 2, 0), images[3])
        return {"frechet_inception_distance": np.float64(12.5)}
    monkeypatch.setitem(sys.modules, "torch_fidelity",
                        types.SimpleNamespace(calculate_metrics=calculate_metrics))
    assert "12.5000" in run_cli(metrics, *argv)[0]
    for bad in (["nowhere.npz"], [argv[2], "--data", "digits"], [argv[2], "--device", "tpu"]):
        run_cli(metrics, *argv[:2], *bad, code=2)
