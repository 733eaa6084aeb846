"""A user's project on disk, with models that are trained and then exported."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from dovetail.bundle import build_bundle
from dovetail.bundle.reference import build_reference
from dovetail.bundle.served import ServedModel, served_in_eval
from dovetail.task import TaskSpec
from dovetail.types import Recipe
from dovetail_plugins.export.onnx import OnnxExporter, Options
from dovetail_plugins.export.pytorch import PytorchExporter

LAYERS = '''
import torch
from torch import nn


class Attention(nn.Module):
    """Causal self-attention that does not look at padding."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = 2

    def forward(self, x, mask):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & mask[:, None, None, :].bool()
        # A row that sees nothing (left padding) looks at itself.
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=x.device)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return out.transpose(1, 2).reshape(batch, length, width)
'''

MODELS = '''
import torch
from torch import nn

from export_user_layers import Attention


class Scale(nn.Module):
    """The tensor half of preprocessing: uint8 to float."""

    def __init__(self, by):
        super().__init__()
        self.config = {"by": by}
        self.by = by

    def forward(self, pixels):
        return pixels.float() / self.by


class Vision(nn.Sequential):
    def forward(self, pixels):
        return super().forward(pixels)


def build_vision(width=4):
    return Vision(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(width * 16, 5),
    )


class Language(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(32, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids) + self.place[: input_ids.shape[1]]
        x = x + self.dropout(self.attention(self.norm(x), attention_mask))
        return {"loss": None, "logits": self.head(x), "past_key_values": (x,)}


def build_language(tokens=20, width=8):
    return Language(tokens, width)


class Looping(nn.Linear):
    """Right for any batch in Python, where its size is a number."""

    def forward(self, x):
        rows = [super(Looping, self).forward(x[i]) for i in range(int(x.shape[0]))]
        return torch.stack(rows)


class Branching(nn.Linear):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


def build_looping():
    return Looping(5, 3)


def build_branching():
    return Branching(5, 3)
'''


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """Return the folder of a user's own modules, importable as `models` says."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "export_user_layers.py").write_text(LAYERS)
    (folder / "export_user_models.py").write_text(MODELS)
    (folder / "secret_settings.py").write_text("TOKEN = 'not to be given away'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("export_user_layers", "export_user_models"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def models(project):
    return importlib.import_module("export_user_models")


def draw_pixels(size):
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.zeros(size)}


def draw_tokens(size, length):
    generator = torch.Generator().manual_seed(size + 100 * length)
    ids = torch.randint(0, 20, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def draw_rows(size):
    return {"x": torch.randn(size, 5, generator=torch.Generator().manual_seed(size))}


@pytest.fixture
def vision(project, models):
    torch.manual_seed(0)
    model = models.build_vision(width=4)
    model(torch.randn(8, 3, 8, 8))  # moves the statistics of the batch norm
    return {
        "model": model,
        "task": TaskSpec(name="digits", modality="vision", num_classes=5),
        "transform": models.Scale(255.0),
        "recipe": Recipe("export_user_models:build_vision", {"width": 4}, project),
        "example": draw_pixels(4),
        "golden": [draw_pixels(n) for n in (1, 2, 3, 8)],
    }


@pytest.fixture
def language(project, models):
    torch.manual_seed(0)
    return {
        "model": models.build_language(),
        "task": TaskSpec(name="lines", modality="text", kind="causal_lm", vocab_size=20),
        "recipe": Recipe("export_user_models:build_language", {}, project),
        "example": draw_tokens(4, 9),
        "golden": [draw_tokens(*s) for s in [(1, 5), (2, 12), (3, 9), (8, 17)]],
    }


@pytest.fixture
def rows(project, models):
    """Return what a model of five numbers per sample needs, for its name."""

    def make(name):
        torch.manual_seed(0)
        return {
            "model": getattr(models, f"build_{name}")(),
            "task": TaskSpec(name=name),
            "recipe": Recipe(f"export_user_models:build_{name}", {}, project),
            "example": draw_rows(4),
            "golden": [draw_rows(2), draw_rows(8)],
        }

    return make


@pytest.fixture(scope="session")
def keep(tmp_path_factory):
    """Build the bundle of a model in both formats once."""
    made = {}

    def build(name, arguments):
        if name not in made:
            exporters = {"onnx": OnnxExporter(Options()), "pytorch": PytorchExporter()}
            path = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = build_bundle(exporters=exporters, destination=path, **arguments)
        return made[name]

    return build


@pytest.fixture
def served_inputs(project, models):
    """Return a served linear model and its export inputs, with a recipe to be replaced."""

    def make(model, recipe=None, transform=None):
        served = ServedModel(model, ["x"], transform)
        batches = [draw_rows(2), draw_rows(3)]
        with served_in_eval(served):
            reference = build_reference(served, TaskSpec(), batches[0], batches[1:], recipe)
        return SimpleNamespace(model=served.eval(), inputs=reference.inputs)

    return make
