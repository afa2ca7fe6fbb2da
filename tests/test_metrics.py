"""The metrics against closed forms and cases worked by hand; the judge against its own promises."""

import json
import math

import numpy as np
import pytest
import torch

from data import DataError, load
from experiments import features, metrics


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


def test_the_floor_of_two_sets_of_white_noise_is_what_their_sampling_errors_give():
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


def test_a_ball_reaches_its_edge():
    real, fake = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [7.0]])
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 1.0)      # 2 is exactly 1 away from 1


def test_recall_catches_a_generator_that_forgot_half_and_precision_one_that_invents():
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
    with pytest.raises(DataError, match="more than k = 3"):
        metrics.precision_recall(real[:3], fake)


# -------------------------------------------------------------------------------------- paired loss

class Path:
    """Stands in for a diffusion path: the loss is the time, or whatever the model says."""

    def grid(self, u):
        assert 0 <= u.min() and u.max() < 1
        return (1000 * u).floor() / 1000

    def error(self, model, x0, y, t, noise):
        prediction, aux = model(x0 + noise, t, y)
        return prediction, aux


class Spy(torch.nn.Module):
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


def test_validation_times_are_even_so_the_mean_of_t_is_a_half_and_bins_climb(held_out):
    found = metrics.validation_loss(Spy(), Path(), held_out, n=1000)
    assert found["mean"] == pytest.approx(0.4995, abs=5e-4)             # grid rounds down by 1/2000
    assert found["bins"] == pytest.approx([0.05 + i / 10 - 5e-4 for i in range(10)], abs=2e-3)


def test_two_models_meet_the_same_pictures_times_noise_and_labels(held_out):
    a, b = Spy().train(), Spy()
    metrics.validation_loss(a, Path(), held_out, n=230)
    torch.rand(7)                                           # the global generator plays no part
    metrics.validation_loss(b, Path(), held_out, n=230)
    assert all(torch.equal(u, v) for p, q in zip(a.seen, b.seen) for u, v in zip(p, q))
    assert a.training and sum(len(x) for x, _, _ in a.seen) == 230
    metrics.validation_loss(b, Path(), held_out, n=230, seed=1)
    assert not torch.equal(b.seen[0][1], b.seen[3][1])


# -------------------------------------------------------------------------------------------- judge

def test_the_shipped_judges_are_as_accurate_as_their_files_say(held_out):
    net, about = features.load("digits")
    assert features.accuracy(net.train(), held_out) == pytest.approx(about["accuracy"], abs=1e-3)
    assert about["accuracy"] >= 0.99 and not net.training
    assert features.load("fashion-mnist")[1]["accuracy"] >= 0.915
    assert sum(p.numel() for p in net.parameters()) < 70_000


def test_a_judge_with_one_changed_byte_is_refused(tmp_path):
    for name in ("digits.pt", "SHA256SUMS"):
        (tmp_path / name).write_bytes((features.ASSETS / name).read_bytes())
    features.load("digits", tmp_path)
    raw = bytearray((tmp_path / "digits.pt").read_bytes())
    raw[5000] ^= 1
    (tmp_path / "digits.pt").write_bytes(raw)
    with pytest.raises(DataError, match="checksum"):
        features.load("digits", tmp_path)
    with pytest.raises(DataError, match="python -m experiments.features --data nothing"):
        features.load("nothing", tmp_path)


def test_the_judge_learns_from_its_recipe_and_survives_saving(tmp_path, held_out):
    class Few:                                              # 512 pictures of the test split
        channels, classes, flips, source, size = 1, 10, True, "few", 28
        batch, __len__ = staticmethod(held_out.batch), lambda self: 512

    log = []
    net = features.train(Few(), epochs=2, batch=64, log=log.append)
    assert len(log) == 2
    path = features.save(net, Few(), 0.5, tmp_path)
    again, about = features.load("few", tmp_path)
    x = held_out.batch(torch.arange(8))[0]
    assert about["accuracy"] == 0.5 and path.stat().st_size < 150_000
    assert torch.allclose(net.eval()(x)[0], again(x)[0], atol=1e-2)     # fp16 in the file


def test_shifting_moves_a_picture_and_repeats_its_border():
    x = torch.arange(25.0).view(1, 1, 5, 5).repeat(50, 1, 1, 1)
    moved = features.shift(x, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (1,) * 4, mode="replicate")[0, 0]
    allowed = [padded[i:i + 5, j:j + 5] for i in range(3) for j in range(3)]
    found = {next(i for i, a in enumerate(allowed) if torch.equal(a, m[0])) for m in moved}
    assert found == set(range(9))


# ---------------------------------------------------------------------------------------- evaluate

def test_real_pictures_score_like_real_ones_and_noise_does_not(held_out):
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


def test_the_two_real_sets_are_balanced_and_share_no_picture():
    a, b = metrics.real_features("digits", 500)
    assert len(a) == len(b) == 500
    assert torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min() > 0


def write_npz(path, x, y):
    rgb = ((x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).movedim(1, -1)
    np.savez(path, arr_0=rgb.numpy(), arr_1=y.numpy())


def test_an_npz_is_judged_as_the_floats_it_was_made_from(tmp_path, held_out, capsys):
    x, y = held_out.batch(torch.arange(100))
    write_npz(tmp_path / "s.npz", x, y)
    report = tmp_path / "r.json"
    code = metrics.main([str(tmp_path / "s.npz"), "--data", "digits", "--json", str(report)])
    out = capsys.readouterr().out
    found, direct = json.loads(report.read_text()), metrics.evaluate(x, y, "digits")
    assert code == 0 and all(word in out for word in ("Frechet", "accuracy", "precision", "recall"))
    assert found.pop("source") == direct.pop("source")
    assert all(found[key] == pytest.approx(direct[key], abs=1e-6) for key in direct)
    assert not (tmp_path / "r.json.part").exists()


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
def test_a_broken_npz_is_one_line_and_exit_2(tmp_path, capsys, arrays, word):
    np.savez(tmp_path / "s.npz", **arrays)
    code = metrics.main([str(tmp_path / "s.npz"), "--data", "digits"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and word in error, error


def test_an_npz_that_unpacks_to_a_thousand_times_itself_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.data, "LIMIT", 1 << 20)             # else 1 GB is fine
    np.savez_compressed(tmp_path / "s.npz", arr_0=np.zeros((600, 28, 28, 3), np.uint8), arr_1=np.zeros(600, int))
    assert metrics.main([str(tmp_path / "s.npz"), "--data", "digits"]) == 2
    assert "unpacks to" in capsys.readouterr().err


def test_bad_arguments_are_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 no zip")
    for argv, word in ([[str(tmp_path / "s.npz"), "--data", "digits"], "cannot be read"],
                       [[str(tmp_path / "s.npz")], "--data"], [["nothing.pt"], "no such file"],
                       [[str(tmp_path / "s.npz"), "--n", "2"], "more than 3"]):
        code = metrics.main(argv)
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and word in error, error
