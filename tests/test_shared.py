"""What holds for every model file: the same plain parts, the same contract, ready for a GPU."""

import ast
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import wake

import diffusion
from train import MODELS, default_loss

ROOT = Path(__file__).resolve().parent.parent
PAPERS = [m for m in MODELS if m != "dit"]
RULER = "plain DiT parts, the same in every file"


def below_the_ruler(name):
    """-> {definition: its source text}."""
    text = (ROOT / f"{name}.py").read_text()
    assert text.count(RULER) == 1, f"{name}.py has no ruler"
    text = text[text.index(RULER):]
    text = text[text.index("\n\n"):]
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", PAPERS)
def test_plain_parts_below_the_ruler_are_those_of_dit(name):
    control = below_the_ruler("dit")
    mine = below_the_ruler(name)
    assert len(mine) > 5
    for part, source in mine.items():
        assert source == control[part], f"{name}.py: {part} differs from dit.py"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_stands_alone(name):
    """It may be copied out of the suite: torch, and nothing of ours before a command line asks."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    ours = {p.stem for p in ROOT.glob("*.py")} | {"experiments"}
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & ours, name


def small(name, **changes):
    module = importlib.import_module(name)
    return module, replace(module.TINY, size=8, patch=2, channels=4, dim=64, depth=2, heads=4, **changes)


def batch(cfg, n=4, device="cpu"):
    shape = (n, cfg.channels, cfg.size, cfg.size)
    return torch.randn(shape, device=device), torch.arange(n, device=device) % cfg.classes


class MetaDraw(diffusion.Draw):
    """Numbers on the meta device, where rows cannot be looked up."""

    def mine(self, numbers):
        return numbers[: len(self.rows)].to(self.device)


class InBf16(torch.nn.Module):
    """A bf16 model behind .module, as under DDP; pictures reach it in bf16, times in float32."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, x, t, y, **more):
        return self.module(x.bfloat16(), t, y, **more)


@pytest.mark.parametrize("kind", ["rf", "ddpm"])
@pytest.mark.parametrize("name", MODELS)
def test_training_never_waits_for_the_gpu(name, kind):
    """The meta device has no values: whatever would copy one to the host fails on it. In bf16, with a
    real loss, backward and an optimizer step."""
    module, cfg = small(name, learn_sigma=kind == "ddpm")
    with torch.device("meta"):
        model = module.Model(cfg).bfloat16()
        path = {"rf": diffusion.RectifiedFlow, "ddpm": diffusion.DDPM}[kind]().to("meta")
    x0, y = batch(cfg, device="meta")
    draw = MetaDraw(0, 0, 4, torch.arange(4), "meta")
    loss, aux = getattr(module, "loss", default_loss)(path, InBf16(model.train()), x0, y, 0, draw)
    (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if hasattr(model, "update_buffers"):
        model.update_buffers({k: v for k, v in aux.items() if k.endswith("_stat")})


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_model_runs_forward_and_backward(name):
    module, cfg = small(name)
    model = wake(module.Model(cfg)).bfloat16().train()
    x0, y = batch(cfg)
    draw, path = diffusion.Draw(0, 0, 4, torch.arange(4)), diffusion.RectifiedFlow()
    loss, aux = getattr(module, "loss", default_loss)(path, InBf16(model), x0, y, 0, draw)
    (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_learns(name):
    """An unused weight breaks DDP and misleads the reader."""
    module, cfg = small(name)
    model = wake(module.Model(cfg)).train()
    x0, y = batch(cfg)
    draw = diffusion.Draw(0, 0, 4, torch.arange(4))
    loss, aux = getattr(module, "loss", default_loss)(diffusion.RectifiedFlow(), model, x0, y, 0, draw)
    (loss + sum(v for k, v in aux.items() if k.endswith("_loss"))).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_has_c_channels_or_2c_and_a_new_network_predicts_zero(name, learn_sigma):
    module, cfg = small(name, learn_sigma=learn_sigma)
    model = module.Model(cfg).eval()
    x, y = batch(cfg)
    prediction, aux = model(x, torch.rand(4), y)
    assert prediction.shape == (4, 8 if learn_sigma else 4, 8, 8)
    assert not prediction.any()
    assert isinstance(aux, dict)
    assert all(v.dim() == 0 for k, v in aux.items() if k.endswith("_loss"))
    if "map" in aux:
        assert aux["map"].shape == (cfg.depth, 4, 16)


@pytest.mark.parametrize("name", MODELS)
def test_a_sampled_picture_does_not_depend_on_its_batch(name):
    module, cfg = small(name)
    model = wake(module.Model(cfg)).train()
    x, y = batch(cfg, 8)
    t = torch.full((8,), 0.5)
    with torch.no_grad():
        if hasattr(model, "update_buffers"):            # on other pictures than those compared
            model.update_buffers(model(torch.randn_like(x), t, y)[1])
        model.eval()
        together = model(x, t, y)[0]
        alone = torch.cat([model(x[i : i + 1], t[:1], y[i : i + 1])[0] for i in range(8)])
    assert (together - alone).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_of_the_papers_can_be_built_and_an_unknown_size_is_refused(name):
    module = importlib.import_module(name)
    for letter in module.SIZES:
        with torch.device("meta"):
            module.Model(module.size(f"{letter}/2"))
    with pytest.raises(ValueError, match="no size"):
        module.size("S/3")


def test_the_training_forward_compiles_without_a_graph_break():
    for name in ("dit", "dtr"):
        module, cfg = small(name)
        model = torch.compile(module.Model(cfg).train(), fullgraph=True, backend="eager")
        x, y = batch(cfg)
        model(x, torch.rand(4), y)[0].square().mean().backward()
