"""What the authors' own code computed, computed by ours. The files of tests/golden (or GOLDEN_DIR)
hold random weights, inputs and the outputs of the released code; every dimension is read from them.
Tolerances are relative to the largest reference value: 1e-4, and 1e-3 after a whole sampler."""

import json
from dataclasses import asdict

import pytest
import torch
from helpers import batch, golden, small, wake

import diffusion
from common.cli import UserError
from common.official import from_official, to_official

# file: our model, what the file does not tell, how many channels its authors guide (None: all)
RELEASED = {"dit": ("dit", ("heads",), 3),
            "ditmoe": ("ditmoe", ("heads", "k"), 3), "ditmoe_qknorm": ("ditmoe", ("k",), 3),
            "dydit": ("dydit", ("heads",), 3), "dydit_nus": ("dydit", ("heads",), 3),
            "dtr": ("dtr", ("heads", "alpha", "beta"), None),
            "dtr_random": ("dtr", ("heads", "alpha", "beta"), None)}
every_file = pytest.mark.parametrize("file", RELEASED)
both_moe = pytest.mark.parametrize("file", ["ditmoe", "ditmoe_qknorm"])
both_dydit = pytest.mark.parametrize("file", ["dydit", "dydit_nus"])
both_dtr = pytest.mark.parametrize("file", ["dtr", "dtr_random"])


def load(file, **settings):
    """-> our model with the weights of a golden file, its meta, its state dict, its arrays."""
    name, needed, _ = RELEASED[file]
    meta, state, g = golden(file)
    settings = {k: meta[k] for k in needed} | settings
    return from_official(name, state, **settings).eval(), meta, state, g


def close(ours, theirs, tolerance=1e-4):
    theirs = theirs.to(ours.dtype)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def predict(model, g, **options):
    return model(g["x"], g["t"] / 1000, g["y"], **options)


@every_file
def test_released_weights_predict_what_the_authors_code_predicts(file):
    model, _, _, g = load(file)
    close(predict(model, g)[0], g["out"])


@every_file
@torch.no_grad()
def test_guidance_equals_the_authors_guidance(file):
    """Their batch: first half labelled, second half not, the same x in both. Ours returns the
    labelled half; the guided channels of the other half are the same numbers."""
    model, _, _, g = load(file)
    channels = RELEASED[file][2]
    x, t, y = (g[k][: len(g["cfg_x"]) // 2] for k in ("cfg_x", "cfg_t", "cfg_y"))
    ours = []
    for i in range(len(x)):                                 # one by one, because their t differ
        f = diffusion.guide(model, y[i, None], model.cfg.classes, g["cfg_scale"].item(), channels)
        ours.append(f(x[i, None], t[i].item() / 1000))
    close(torch.cat(ours), g["cfg_out"][: len(x)])
    n = channels or x.shape[1]
    close(torch.cat(ours)[:, :n], g["cfg_out"][len(x):, :n])


@every_file
def test_dimensions_are_read_from_the_shapes(file):
    model, meta, _, _ = load(file)
    assert all(getattr(model.cfg, k) == v for k, v in meta.items() if k not in ("source", "seed"))


@every_file
def test_weights_go_back_to_the_official_layout_unchanged(file):
    model, meta, state, _ = load(file)
    back = to_official(model)
    assert back.keys() == state.keys()
    for k, w in state.items():                              # our masks are bool, theirs float32
        assert back[k].dtype == torch.float32 and torch.equal(back[k], w.float()), k
    again = from_official(RELEASED[file][0], back, **{k: meta[k] for k in RELEASED[file][1]})
    torch._foreach_zero_(list(back.values()))               # a copy: the model keeps its weights
    assert again.cfg == model.cfg
    ours, state = again.state_dict(), model.state_dict()
    assert ours.keys() == state.keys() and all(torch.equal(ours[k], state[k]) for k in state)


@pytest.mark.parametrize("name, changes, told", [
    ("dit", dict(learn_sigma=False), dict(heads=4)), ("ditmoe", dict(qk_norm=True, shared=0), {}),
    ("ditmoe", dict(shared=3, hidden=2), dict(heads=4)), ("dtr", dict(tasks=50), dict(heads=4)),
    ("dtr", dict(route="random", route_seed=3), dict(heads=4)), ("dydit", {}, dict(heads=4))])
@torch.no_grad()
def test_a_model_of_ours_goes_to_the_official_layout_and_back(name, changes, told):
    module, cfg = small(name, **changes)
    model = wake(module.Model(cfg)).eval()
    told |= dict(k=cfg.k) if name == "ditmoe" else {}
    again = from_official(name, to_official(model), **told).eval()
    x, y = batch(cfg)
    t = torch.rand(4)
    assert torch.equal(again(x, t, y)[0], model(x, t, y)[0])
    assert all(getattr(again.cfg, k) == v for k, v in changes.items() if "route" not in k)


@every_file
def test_weights_are_found_in_the_wrappings_of_the_authors(file):
    name, needed, _ = RELEASED[file]
    model, meta, state, _ = load(file)
    prefixed = {f"module.{k}": w for k, w in state.items()}
    zeros = {k: torch.zeros_like(w) for k, w in prefixed.items()}
    for wrapped in (dict(ema=state), dict(model=zeros, ema=prefixed, opt={"state": {}}),
                    dict(module=prefixed), dict(model=dict(state_dict=state))):
        again = from_official(name, wrapped, **{k: meta[k] for k in needed})
        assert all(torch.equal(w, again.state_dict()[k]) for k, w in model.state_dict().items())


def test_half_precision_weights_become_float32():
    _, meta, state, _ = load("ditmoe_qknorm")               # as XL and G were released
    model = from_official("ditmoe", {k: w.half() for k, w in state.items()}, k=meta["k"])
    assert {w.dtype for w in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.blocks[0].moe.gate.weight.half(),
                       state["blocks.0.moe.gate.weight"].half())


# ------------------------------------------------------------------------ DiT: losses and samplers


@pytest.fixture
def dit():
    model, _, _, g = load("dit")
    return model, g, diffusion.DDPM()


@torch.no_grad()
def test_ddpm_training_loss_is_mse_plus_vlb_as_the_authors_code_computes_them(dit):
    model, g, ddpm = dit
    t = g["t"] / 1000
    x = ddpm.q_sample(g["x"], g["train_noise"], t)
    prediction, _ = model(x, t, g["y"])
    close(ddpm.mse(model, g["x"], g["y"], t, g["train_noise"])[0], g["train_mse"])
    close(ddpm.vlb(prediction, g["x"], x, g["t"]), g["train_vb"])
    close(ddpm.loss(model, g["x"], g["y"], t, g["train_noise"])[0], g["train_loss"])


def test_a_reverse_step_has_the_authors_mean_variance_and_x0(dit):
    model, g, ddpm = dit
    ours = ddpm.p_mean_variance(predict(model, g)[0], g["x"],
                                diffusion.Coefficients(ddpm.table, g["t"]))
    for mine, name in zip(ours[:3], ("p_mean", "p_logvar", "p_x0"), strict=True):
        close(mine, g[name])


def test_respaced_samplers_keep_the_authors_steps_and_betas(dit):
    _, g, ddpm = dit
    assert diffusion.respace(1000, 250) == g["respaced_250"].tolist()
    assert diffusion.respace(1000, 8) == g["ddpm8_map"].tolist()
    assert diffusion.respace(1000, 10, "leading") == g["ddim10_map"].tolist()
    log_beta = diffusion.coefficients(ddpm.alphas_cumprod[g["respaced_250"]])[:, 3]
    close(log_beta.double().exp(), g["respaced_250_betas"])


@pytest.mark.parametrize("solver, steps, spacing", [("ddim", 10, "leading"), ("ddpm", 8, None)])
@torch.no_grad()
def test_ten_ddim_and_eight_ancestral_steps_end_where_the_authors_end(dit, solver, steps, spacing):
    model, g, ddpm = dit
    f = diffusion.guide(model, g["ddim10_y"], model.cfg.classes, 1.5, channels=3)
    *_, (_, x, _) = ddpm.trajectory(f, g["ddim10_noise"], steps, solver,
                                    noise=lambda i: g["ddpm8_step_noise"][i], spacing=spacing)
    close(x, g[f"{solver}{steps}_out"], 1e-3)


# ------------------------------------------------------------------------ DiT-MoE


@both_moe
def test_training_outputs_balance_losses_and_gradients_are_the_authors(file):
    model, _, _, g = load(file, alpha=0.01)
    losses = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda _, __, out: losses.append(0.01 * out[1]["balance"]))
    out, aux = model.train()(g["x"], g["t"] / 1000, g["y"])
    close(out, g["train_out"])
    close(torch.stack(losses), g["balance_losses_alpha001"])
    close(aux["balance_loss"], g["balance_losses_alpha001"].sum())
    (out.square().mean() + aux["balance_loss"]).backward()
    close(model.blocks[0].moe.gate.weight.grad, g["grad_gate0"])
    close(model.blocks[0].moe.experts.w2.grad[0].T, g["grad_down0"])


@both_moe
@torch.no_grad()
def test_ten_steps_of_a_flow_end_where_the_authors_end(file):
    model, meta, _, g = load(file, time_scale=1.0)          # they embed t in [0, 1] as it is
    f = diffusion.guide(model, g["rf10_y"], meta["classes"], g["rf10_cfg"].item())
    *_, (t, x, x0) = diffusion.RectifiedFlow().trajectory(f, g["rf10_noise"], steps=10)
    close(x, g["rf10_out"], 1e-3)
    close(x0, x)                                        # the last estimate of x0 is the result
    assert t == 0


# ------------------------------------------------------------------------ DyDiT


@both_dydit
def test_masks_and_compute_are_the_authors(file):
    model, _, _, g = load(file)
    assert model.cfg.always_on == (file == "dydit")     # NUS has a router row for every head
    _, aux = predict(model, g)
    for k in ("heads", "groups", "tokens"):
        assert torch.equal(aux[k], g[k]), k
    if "flops_ratio" in g:
        assert torch.allclose(aux["flops"], g["flops_ratio"].float(), atol=1e-6)
    if "out_complete" in g:
        close(predict(model, g, full_model=True)[0], g["out_complete"])


@both_dydit
@torch.no_grad()
def test_the_sliced_model_computes_what_the_authors_masked_one_computes(file):
    model, _, _, g = load(file)
    for i in range(len(g["x"])):                            # slices are those of one time
        x, t, y = (g[k][i, None] for k in ("x", "t", "y"))
        out, aux = model(x, t / 1000, y, sliced=True)
        close(out, g["out"][i, None])
        assert all(torch.equal(aux[k], g[k][i, None]) for k in ("heads", "groups", "tokens"))


@pytest.mark.parametrize("name", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("always_on", [True, False])
def test_routers_tell_the_heads_of_the_papers_sizes(name, always_on):
    module, _ = small("dydit")
    with torch.device("meta"):
        cfg = module.size(f"{name}/2", depth=1, always_on=always_on)
        found = from_official("dydit", module.Model(cfg).state_dict()).cfg
    assert (found.heads, found.always_on) == (cfg.heads, always_on)


# ------------------------------------------------------------------------ DTR


@both_dtr
def test_masks_that_are_not_windows_are_kept_and_stored(file):
    model, meta, state, g = load(file)
    assert model.cfg.route == ("window" if file == "dtr" else "given")
    again = type(model)(type(model.cfg)(**json.loads(json.dumps(asdict(model.cfg)))))
    again.load_state_dict(model.state_dict())
    close(predict(again, g)[0], g["out"])
    for i in range(meta["depth"]):
        mask = state[f"blocks.{i}.routing._unit_mapping"].bool()
        assert file == "dtr" or torch.equal(again.table[i], mask)


@pytest.mark.parametrize("field, factor", [("alpha", 1 / 4), ("beta", 1 / 2)])
def test_the_masks_of_a_file_win_over_alpha_and_beta(field, factor):
    model, _, _, g = load("dtr", **{field: golden("dtr")[0][field] * factor})
    assert model.cfg.route == "given"
    close(predict(model, g)[0], g["out"])


def test_masks_are_also_found_under_switch_dits_names_and_may_be_missing():
    _, meta, state, g = load("dtr_random")
    bare = {k: w for k, w in state.items() if "mapping" not in k}           # a plain DiT's file
    masks = {f"routers.{i}._unit_mapping": state[f"blocks.{i}.routing._unit_mapping"].float()
             for i in reversed(range(meta["depth"]))}                       # in any order
    close(predict(from_official("dtr", bare | masks, heads=meta["heads"]), g)[0], g["out"])
    assert from_official("dtr", bare, heads=meta["heads"]).cfg.route == "window"


def test_an_unconditional_official_file_has_one_row_of_labels_and_no_class():
    full, meta, state, g = load("dtr")
    key = "y_embedder.embedding_table.weight"               # as with num_classes=1 and no dropout
    model = from_official("dtr", state | {key: state[key][-1:]}, heads=meta["heads"])
    assert model.cfg.classes == 0
    no_class = torch.full_like(g["y"], full.cfg.classes)
    close(predict(model, g | dict(y=0 * g["y"]))[0], predict(full, g | dict(y=no_class))[0])


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name, file, told, word", [
    ("dit", "dit", {}, "heads=16"), ("dtr", "dtr", {}, "heads=16"),
    ("ditmoe", "ditmoe", dict(k=2), "heads=16"), ("ditmoe", "ditmoe", dict(heads=4), "k=2"),
    ("dydit", "dydit", {}, "heads=H-1 .NUS. or heads=H"),
    ("dydit", "dydit", dict(heads=1), "heads=H-1 .NUS. or heads=H"),
    ("dit", "dit", dict(heads=5), "heads 5"), ("dit", "dit", dict(heads=0), "heads 0"),
    ("dit", "dit", dict(heads=4, depth=9), "blocks.* is missing"),
    ("ditmoe", "ditmoe", dict(heads=4, k=99), "k"), ("dit", "dit", dict(heads=4, wings=2), "wings"),
    ("dit", "dydit", dict(heads=4), "not a released dit checkpoint: .*attn_rate"),
    ("dydit", "dit", {}, "not a released dydit checkpoint: it has no .*router"),
    ("ditmoe", "dit", dict(k=2), "not a released ditmoe checkpoint: it has no"),
    ("racedit", "dit", dict(heads=4), "dit, ditmoe, dydit, dtr")])
def test_what_does_not_fit_is_refused_in_words(name, file, told, word):
    meta, state, _ = golden(file)
    told = {k: meta["heads"] if (k, v) == ("heads", 4) else v for k, v in told.items()}
    word = word.replace("H-1", str(meta["heads"] - 1)).replace("=H", f"={meta['heads']}")
    with pytest.raises(UserError, match=word):
        from_official(name, state, **told)


@pytest.mark.parametrize("state", [[], {}, dict(ema=3), {0: 1}, {"x_embedder.proj.weight": 3},
                                   {"x_embedder.proj.weight": torch.zeros(4)}])
def test_what_is_no_state_dict_is_refused(state):
    with pytest.raises(UserError, match="not a released dit checkpoint"):
        from_official("dit", state, heads=4)


def test_a_broken_state_dict_is_refused_before_memory_is_allocated():
    meta, state, _ = golden("dit")
    for key, w in ((f"blocks.{10**9}.x", torch.zeros(1)), ("loss_scale", torch.zeros(8)),
                   ("pos_embed", torch.zeros(1, 10**6, 1))):
        with pytest.raises(UserError, match="not a released dit checkpoint"):
            from_official("dit", state | {key: w}, heads=meta["heads"])
    with pytest.raises(UserError, match="final_layer.linear.weight is missing"):
        from_official("dit", {k: w for k, w in state.items() if k != "final_layer.linear.weight"},
                      heads=meta["heads"])


@pytest.mark.parametrize("name, changes, word", [
    ("ditmoe", dict(expert="gelu"), "SwiGLU"), ("ditmoe", dict(moe_layers="deep"), "SwiGLU"),
    ("racedit", {}, "no official code")])
def test_what_the_official_layouts_cannot_hold_is_refused(name, changes, word):
    module, cfg = small(name, **changes)
    with pytest.raises(UserError, match=word):
        to_official(module.Model(cfg))
