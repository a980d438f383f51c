"""A whole file of an outside user, imports and training included, in fewer than fifteen lines for each kind of part."""

from __future__ import annotations

import runpy

import pytest

from omnimoe.experts import EXPERTS
from omnimoe.layers import ATTENTIONS
from omnimoe.modalities import MODALITIES
from omnimoe.model import MODELS
from omnimoe.routers import ROUTERS

TRAIN = "history = Training(model, TrainSettings(steps=4, warmup=0, batch_size=1, sequence_length=128)).run()"

ROUTER = (
    ROUTERS,
    f"""\
import torch
from omnimoe import RoutedExperts, Router, Routing, load, register_router
from omnimoe.train import Training, TrainSettings
@register_router("round_robin")
class RoundRobinRouter(Router):
    def __init__(self, config, *, hidden_size, num_experts, num_modalities):
        super().__init__()
        self.num_experts = num_experts
    def forward(self, x, rows):
        token_index = torch.arange(len(x), device=x.device)
        return Routing(token_index, token_index % self.num_experts, x.new_ones(len(x)))
model = load("dense_nano", experts=RoutedExperts.Config(intermediate_size=64, router=RoundRobinRouter.Config()))
{TRAIN}
""",
)
EXPERT = (
    EXPERTS,
    f"""\
import torch
from omnimoe import Experts, load, register_experts
from omnimoe.train import Training, TrainSettings
@register_experts("one_matrix")
class OneMatrix(Experts):
    def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
        super().__init__()
        self.matrix = torch.nn.Linear(hidden_size, hidden_size)
    def forward(self, x, rows):
        return self.matrix(x).relu(), None
model = load("dense_nano", experts=OneMatrix.Config())
{TRAIN}
""",
)
ATTENTION = (
    ATTENTIONS,
    f"""\
import torch
from omnimoe import BaseAttention, load, register_attention
from omnimoe.train import Training, TrainSettings
@register_attention("mean_of_the_past")
class MeanOfThePast(BaseAttention):
    def __init__(self, config, *, hidden_size, num_modalities, layer_idx):
        super().__init__()
        self.out = torch.nn.Linear(hidden_size, hidden_size)
    def forward(self, x, rows, mask, cache=None):
        seen = mask.dense().squeeze(1).to(x.dtype)
        return self.out(rows.to_rows((seen / seen.sum(-1, keepdim=True)) @ rows.to_time(x)))
model = load("dense_nano", attention=MeanOfThePast.Config())
{TRAIN}
""",
)
MODEL = (
    MODELS,
    f"""\
from omnimoe import LayerRange, load, register_model
from omnimoe.train import Training, TrainSettings
@register_model("half_towers")
def half_towers():
    mot, dense = (load(name, device="meta").config for name in ("mot_nano", "dense_nano"))
    return mot.replace(layers=(LayerRange(stop=2, attention=dense.attention, experts=dense.experts),))
model = load("half_towers")
{TRAIN}
""",
)
MODALITY = (
    MODALITIES,
    """\
import torch
from omnimoe import Modality, load, load_tokenizer, register_modality
@register_modality("colours")
class Colours(Modality):
    def __init__(self, config, *, hidden_size):
        super().__init__()
        self.inward, self.outward = torch.nn.Linear(3, hidden_size), torch.nn.Linear(hidden_size, 3)
    def embed(self, inputs, timesteps=None): return self.inward(inputs)
    def head(self, x): return self.outward(x)
text, picture = load("dense_nano", device="meta").config.modalities[0], load_tokenizer("picture")
model = load("dense_nano", modalities=(text, Colours.Config(name="colours", placeholder_id=7)))
pixels = torch.tensor(picture.decode(torch.arange(64))[::16, ::16] / 255, dtype=torch.float32).view(-1, 3)
model(torch.full((1, 16), 7), features={"colours": pixels}, targets={"colours": pixels}).loss.backward()
torch.optim.AdamW(model.parameters()).step()
""",
)


@pytest.mark.parametrize(
    ("registry", "source"),
    [ROUTER, EXPERT, ATTENTION, MODEL, MODALITY],
    ids=["router", "experts", "attention", "model", "modality"],
)
def test_a_whole_file_is_short_and_trains(registry, source, tmp_path):
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) < 15
    before = set(registry)
    path = tmp_path / "mine.py"
    path.write_text(source)
    try:
        made = runpy.run_path(str(path))
    finally:
        (new,) = set(registry) - before
        registry.remove(new)
    if "history" in made:
        losses = made["history"].held_out["all"]
        assert made["history"].steps == [0, 4]
        assert losses[-1] < losses[0]
    else:
        assert all(parameter.grad is not None for parameter in made["model"].parameters())
