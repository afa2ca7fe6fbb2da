"""What holds for every model file: the same shared parts, the same contract, ready for a GPU."""

import ast
import importlib
import re

import pytest
import torch
from helpers import ROOT, batch, small, wake

from common.checkpoint import MODELS
from diffusion import DIFFUSIONS, StepRNG
from train import default_loss

every_model = pytest.mark.parametrize("name", MODELS)
RULERS = {"engine": "the expert engine, the same in ditmoe.py and racedit.py",
          "plain": "plain DiT parts, the same in every file"}


def below_the_ruler(name, which):
    """The definitions below one ruler, with everything between them: {name: text}, ruler first."""
    text = (ROOT / f"{name}.py").read_text()
    note = "# -+ .tests/papers/test_shared.py keeps them equal.\n"
    start = re.search(f"^# -+ {RULERS[which]}\n{note}", text, re.M)
    if start is None:
        return {}
    end = re.search(r"^# -----", text[start.end():], re.M)      # the next ruler, or the file's end
    section = text[start.start() : start.end() + end.start() if end else None].rstrip()
    ruler, *parts = section.split("\n\n\n")
    return {"ruler": ruler} | {re.search(r"^(?:def|class) (\w+)", part, re.M)[1]: part
                               for part in parts}


@every_model
def test_plain_parts_are_those_of_dit_to_the_byte(name):
    """A file leaves out what it does not use. It adds nothing but linear_fp32, for routers."""
    control, mine = below_the_ruler("dit", "plain"), below_the_ruler(name, "plain")
    if name in ("racedit", "ditmoe", "dydit"):
        control["linear_fp32"] = below_the_ruler("dydit", "plain")["linear_fp32"]
    assert len(mine) > 10 and list(mine) == [part for part in control if part in mine]
    for part, source in mine.items():
        assert source == control[part], f"{name}.py: {part} differs"


def test_the_expert_engine_is_the_same_in_both_files_to_the_byte():
    engine = below_the_ruler("ditmoe", "engine")
    assert engine == below_the_ruler("racedit", "engine") and "Experts" in engine
    assert not any(below_the_ruler(name, "engine") for name in ("dit", "dydit", "dtr"))


@every_model
def test_a_model_file_imports_torch_math_and_dataclasses_only(name):
    """So that it can be copied out of the suite."""
    nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {n.split(".")[0] for n in names} <= {"torch", "math", "dataclasses"}


# ------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("learn_sigma", [False, True])
@every_model
def test_a_prediction_has_c_channels_or_2c_and_a_new_network_predicts_zero(name, learn_sigma):
    module, cfg = small(name, learn_sigma=learn_sigma)
    model, (x, y) = module.Model(cfg), batch(cfg)
    for mode in (True, False):
        prediction, aux = model.train(mode)(x, torch.rand(4), y)
        assert prediction.shape == (4, 8 if learn_sigma else 4, 8, 8) and not prediction.any()
        assert type(aux) is dict and all(v.dim() == 0 for k, v in aux.items() if "_loss" in k)
        assert "map" not in aux or aux["map"].shape == (cfg.depth, 4, 16)


@every_model
def test_a_sampled_image_does_not_depend_on_its_batch(name):
    module, cfg = small(name)
    model, (x, y), t = wake(module.Model(cfg)).train(), batch(cfg, 8), torch.full((8,), 0.5)
    with torch.no_grad():
        if hasattr(model, "update_buffers"):            # on other images than those compared
            model.update_buffers(model(torch.randn_like(x), t, y)[1])
        model.eval()
        in_a_batch = model(x, t, y)[0]
        alone = torch.cat([model(x[i : i + 1], t[:1], y[i : i + 1])[0] for i in range(8)])
    assert (in_a_batch - alone).abs().max() < 1e-5
    assert (in_a_batch[0] - in_a_batch[1]).abs().max() > 1e-3


@every_model
def test_the_sizes_of_the_papers_can_be_trained_and_an_unknown_size_is_an_error(name):
    module = importlib.import_module(name)
    for letter in module.SIZES:
        cfg = module.size(f"{letter}/2", depth=2)
        with torch.device("meta"):
            model = module.Model(cfg).bfloat16().train()
        x, y = batch(cfg, 1, "meta")
        model(x.bfloat16(), torch.rand(1, device="meta"), y)
    with pytest.raises(ValueError, match="no size"):
        module.size("S/3")


# ------------------------------------------------------------------------ training


def backward(module, model, diffusion, device="cpu"):
    """A training step without the update, as train.py computes it -> the model's aux."""
    x0, y = batch(getattr(model, "module", model).cfg, device=device)
    loss = getattr(module, "loss", default_loss)
    mean, aux = loss(diffusion, model, x0, y, 0, StepRNG(0, 0, 4, torch.arange(4), device))
    (mean + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    return aux


class InBf16(torch.nn.Module):
    """A bf16 model behind .module, as under DDP: images arrive in bf16, times in float32."""

    def __init__(self, model):
        super().__init__()
        self.module = model.bfloat16().train()

    def forward(self, x, t, y, **more):
        return self.module(x.bfloat16(), t, y, **more)


@pytest.mark.parametrize("kind", DIFFUSIONS)
@every_model
def test_a_training_step_never_waits_for_the_gpu(name, kind):
    """The meta device has no values: whatever would copy a value to the CPU fails on it."""
    module, cfg = small(name, learn_sigma=kind == "ddpm")
    with torch.device("meta"):
        model, diffusion = module.Model(cfg), DIFFUSIONS[kind]().to("meta")
    aux = backward(module, InBf16(model), diffusion, "meta")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    if hasattr(model, "update_buffers"):
        model.update_buffers({k: v for k, v in aux.items() if k.endswith("_stat")})


@every_model
def test_a_bf16_model_has_finite_gradients(name):
    module, cfg = small(name)
    model = wake(module.Model(cfg))
    backward(module, InBf16(model), DIFFUSIONS["rf"]())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_model
def test_every_weight_learns(name):
    """A weight that the loss does not reach breaks DDP and misleads the reader."""
    module, cfg = small(name)
    model = wake(module.Model(cfg)).train()
    backward(module, model, DIFFUSIONS["rf"]())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_model
def test_the_training_forward_compiles_without_a_graph_break(name):
    module, cfg = small(name)
    model, (x, y), t = wake(module.Model(cfg)).train(), batch(cfg), torch.rand(4)
    forwards, predictions = (model, torch.compile(model, fullgraph=True, backend="eager")), []
    for forward in forwards:
        torch.manual_seed(1)                            # DyDiT's gates are random in training
        predictions.append(forward(x, t, y)[0])
    assert torch.allclose(*predictions, atol=1e-5)
    predictions[1].square().mean().backward()
