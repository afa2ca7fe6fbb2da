"""What the authors' own code computed, computed by ours. The files in tests/golden (or GOLDEN_DIR)
hold random weights, inputs and the outputs of their released code; every dimension is read from them.
Tolerances are relative to the largest reference value: 1e-4, and 1e-3 after a whole sampler."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion
import dit

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def golden(name):
    """-> meta, official state dict, everything else."""
    if not (FOLDER / f"{name}.npz").exists():
        pytest.skip(f"{FOLDER} has no {name}.npz")
    with np.load(FOLDER / f"{name}.npz") as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "meta"}
        meta = json.loads(str(z["meta"]))
    state = {k[6:]: v for k, v in arrays.items() if k.startswith("state/")}
    return meta, state, {k: v for k, v in arrays.items() if not k.startswith("state/")}


def close(ours, theirs, tolerance=1e-4):
    theirs = theirs.to(ours.dtype)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def guided(model, g, channels):
    """Their guided batch: first half labelled, second half not, the same x in both. Ours returns the
    labelled half; the guided channels of the other half are the same numbers."""
    x, t, y = (g[k][: len(g["cfg_x"]) // 2] for k in ("cfg_x", "cfg_t", "cfg_y"))
    ours = []
    for i in range(len(x)):                             # one by one: their t may differ
        f = diffusion.guide(model, y[i : i + 1], model.cfg.classes, g["cfg_scale"].item(), channels)
        ours.append(f(x[i : i + 1], t[i].item() / 1000))
    close(torch.cat(ours), g["cfg_out"][: len(x)])
    n = channels or x.shape[1]
    close(torch.cat(ours)[:, :n], g["cfg_out"][len(x):, :n])


@pytest.fixture
def theirs():
    """The released DiT's numbers, and our model with its weights."""
    torch.set_grad_enabled(False)
    meta, state, g = golden("dit")
    yield dit.from_official(state, heads=meta["heads"]), g, diffusion.DDPM()
    torch.set_grad_enabled(True)


def test_dit_with_official_weights_predicts_what_the_official_code_predicts(theirs):
    model, g, _ = theirs
    close(model(g["x"], g["t"] / 1000, g["y"])[0], g["out"])


def test_dit_guides_the_first_three_channels_as_the_official_code_does(theirs):
    model, g, _ = theirs
    guided(model, g, channels=3)


def test_official_dimensions_are_read_from_shapes(theirs):
    model, _, _ = theirs
    meta = golden("dit")[0]
    for k in ("dim", "heads", "depth", "size", "patch", "channels", "classes", "learn_sigma"):
        assert getattr(model.cfg, k) == meta[k], k


def test_official_weights_without_the_number_of_heads_are_refused():
    with pytest.raises(ValueError, match="heads"):
        dit.from_official(golden("dit")[1])


def test_ddpm_training_loss_is_mse_plus_vb_as_the_official_code_computes_them(theirs):
    model, g, path = theirs
    t, x = g["t"] / 1000, path.mix(g["x"], g["train_noise"], g["t"] / 1000)
    prediction, _ = model(x, t, g["y"])
    close(path.mse(prediction, g["train_noise"]), g["train_mse"])
    close(path.vb(prediction, g["x"], x, g["t"]), g["train_vb"])
    close(path.loss(model, g["x"], g["y"], t, g["train_noise"])[0], g["train_loss"])


def test_a_reverse_step_has_the_official_mean_variance_and_x0(theirs):
    model, g, path = theirs
    prediction, _ = model(g["x"], g["t"] / 1000, g["y"])
    ours = path.reverse(prediction, g["x"], diffusion.Coefficients(path.table, g["t"]))
    for mine, name in zip(ours, ("p_mean", "p_logvar", "p_x0")):
        close(mine, g[name])


def test_respaced_samplers_keep_the_official_steps_and_betas(theirs):
    _, g, path = theirs
    assert diffusion.respace(1000, 250) == g["respaced_250"].tolist()
    assert diffusion.respace(1000, 8) == g["ddpm8_map"].tolist()
    assert diffusion.respace(1000, 10, "ddim") == g["ddim10_map"].tolist()
    log_beta = diffusion.coefficients(path.abar[g["respaced_250"]])[:, 3]
    close(log_beta.double().exp(), g["respaced_250_betas"])


def test_ten_ddim_steps_end_where_the_official_sampler_ends(theirs):
    model, g, path = theirs
    f = diffusion.guide(model, g["ddim10_y"], model.cfg.classes, 1.5, channels=3)
    *_, (_, x, _) = path.trajectory(f, g["ddim10_noise"], 10, "ddim")
    close(x, g["ddim10_out"], 1e-3)


def test_eight_ancestral_steps_end_where_the_official_sampler_ends(theirs):
    model, g, path = theirs
    f = diffusion.guide(model, g["ddim10_y"], model.cfg.classes, 1.5, channels=3)
    *_, (_, x, _) = path.trajectory(f, g["ddim10_noise"], 8, "ddpm",
                                    noise=lambda i: g["ddpm8_step_noise"][i])
    close(x, g["ddpm8_out"], 1e-3)
