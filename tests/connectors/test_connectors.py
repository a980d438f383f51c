"""Every connector: shapes, gradients, padding, and the mathematics it is named after."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omnimoe.config import ConfigError
from omnimoe.connectors import CONNECTORS, MLP, Connector, LatentQueries, Linear, Pool, QFormer, register_connector

CHANNELS, WIDTH = 6, 16
SMALL = {"num_queries": 3, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "linear": Linear.Config(),
    "linear_plain": Linear.Config(norm=False),
    "mlp": MLP.Config(intermediate_size=10),
    "pool": Pool.Config(then=Linear.Config()),
    "pool_shuffle": Pool.Config(kind="shuffle", then=MLP.Config()),
    "pool_moments": Pool.Config(axes=1, size=3, then=Linear.Config()),
    "pool_then_queries": Pool.Config(axes=1, then=LatentQueries.Config(**SMALL)),
    "q_former": QFormer.Config(**SMALL, hidden_size=8, intermediate_size=12),
    "latent_queries": LatentQueries.Config(**SMALL),
}


def build(config: Connector.Config) -> Connector:
    torch.manual_seed(0)
    return config.build(channels=CHANNELS, hidden_size=WIDTH)


def test_the_table_has_one_of_each_kind():
    assert {"linear", "mlp", "pool", "q_former", "latent_queries"} <= set(CONNECTORS.names())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_shapes_gradients_and_json(config):
    connector, x = build(config), torch.randn(2, 16, CHANNELS, requires_grad=True)
    rows = connector(x)
    assert rows.shape == (2, connector.num_rows(16), WIDTH)
    rows.square().sum().backward()
    assert x.grad.abs().sum(-1).all()
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())
    assert Connector.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_padding_is_not_seen(config):
    connector, x = build(config), torch.randn(2, 16, CHANNELS)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    other = torch.where(mask.unsqueeze(-1), x, 9.0)
    kept = connector.row_mask(mask)
    assert kept.shape == (2, connector.num_rows(16))
    assert kept[0].all()
    torch.testing.assert_close(connector(x, mask)[kept], connector(other, mask)[kept])
    torch.testing.assert_close(connector(x, torch.ones_like(mask)), connector(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "pool_moments", "q_former", "latent_queries"])
def test_a_padded_input_gives_what_it_gives_alone(name):
    connector, x = build(CONFIGS[name]), torch.randn(1, 9, CHANNELS)
    padded = F.pad(x, (0, 0, 0, 6))
    mask = (torch.arange(15) < 9).unsqueeze(0)
    rows = connector(padded, mask)[connector.row_mask(mask)]
    torch.testing.assert_close(rows, connector(x)[0], rtol=1e-4, atol=1e-5)


def test_linear_and_mlp_are_their_formulas():
    x = torch.randn(2, 5, CHANNELS)
    plain = build(CONFIGS["linear_plain"])
    torch.testing.assert_close(plain(x), x @ plain.proj.weight.T + plain.proj.bias)
    mlp = build(CONFIGS["mlp"])
    normal = F.layer_norm(x, (CHANNELS,))
    hidden = F.gelu(normal @ mlp.up_proj.weight.T + mlp.up_proj.bias)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down_proj.weight.T + mlp.down_proj.bias)
    assert mlp.up_proj.out_features == 10


@pytest.mark.parametrize(("side", "size"), [(4, 2), (6, 3), (5, 2), (4, 1), (3, 5)])
def test_pooling_a_grid_is_that_of_pictures(side, size):
    config = Pool.Config(size=size, then=Linear.Config(norm=False))
    connector, x = build(config), torch.randn(2, side * side, CHANNELS)
    picture = x.transpose(1, 2).unflatten(2, (side, side))
    wanted = F.avg_pool2d(picture, size, ceil_mode=True, count_include_pad=False)
    assert connector.num_rows(side * side) == wanted[0, 0].numel()
    padding = -side % size
    real = F.avg_pool2d(F.pad(torch.ones(1, 1, side, side), (0, padding, 0, padding)), size)
    summed = F.avg_pool2d(F.pad(picture, (0, padding, 0, padding)), size)
    mask = torch.ones(2, side * side, dtype=torch.bool)
    for given in (None, mask):
        found = connector(x, given)
        torch.testing.assert_close(found, connector.then((summed / real).flatten(2).transpose(1, 2)))


def test_a_window_at_the_edge_is_the_mean_of_what_is_there():
    connector = build(Pool.Config(size=2, then=Linear.Config(norm=False)))
    x = torch.ones(1, 9, CHANNELS)
    torch.testing.assert_close(connector(x), connector.then(torch.ones(1, 4, CHANNELS)))


def test_shuffling_a_grid_is_a_pixel_unshuffle():
    connector, x = build(CONFIGS["pool_shuffle"]), torch.randn(2, 16, CHANNELS)
    picture = x.transpose(1, 2).unflatten(2, (4, 4))
    pixels = F.pixel_unshuffle(picture, 2)  # channels are the slow axis there, and the fast one here
    wanted = pixels.unflatten(1, (CHANNELS, 4)).transpose(1, 2).flatten(1, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(connector(x), connector.then(wanted))


def test_the_q_former_is_that_of_transformers():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    connector, x = build(CONFIGS["q_former"]), torch.randn(2, 7, CHANNELS)
    assert isinstance(connector.network, Blip2QFormerModel)
    form = Blip2QFormerConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        encoder_hidden_size=CHANNELS,
        cross_attention_frequency=2,
    )
    theirs = Blip2QFormerModel(form).eval()
    theirs.load_state_dict(connector.network.state_dict())
    wanted = theirs(query_embeds=connector.queries.expand(2, -1, -1), encoder_hidden_states=x).last_hidden_state
    torch.testing.assert_close(connector(x), connector.out_proj(wanted))


def test_queries_see_features_as_a_set():
    connector, x = build(CONFIGS["latent_queries"]), torch.randn(1, 9, CHANNELS)
    torch.testing.assert_close(connector(x), connector(x[:, torch.randperm(9)]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(connector(x), connector(x + 1))


@pytest.mark.parametrize("name", ["linear_plain", "mlp", "pool_shuffle", "latent_queries"])
def test_active_params_are_the_matrices_that_a_row_meets(name):
    config = CONFIGS[name]
    connector = build(config)
    matrices = [weight for key, weight in connector.named_parameters() if weight.ndim == 2]
    met = sum(w.numel() for w in matrices) - (
        connector.queries.numel() + connector.in_proj.weight.numel() if name == "latent_queries" else 0
    )
    assert config.active_params(CHANNELS, WIDTH) == met


def test_active_params_of_the_q_former_leave_out_what_features_meet():
    config = CONFIGS["q_former"]
    network = build(config).network
    cross = [layer.crossattention for layer in network.encoder.layer if hasattr(layer, "crossattention")]
    features = sum(part.attention.key.weight.numel() + part.attention.value.weight.numel() for part in cross)
    matrices = sum(weight.numel() for weight in network.parameters() if weight.ndim == 2)
    assert config.active_params(CHANNELS, WIDTH) == matrices - features + 8 * WIDTH


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pool.Config(size=0), "size must be at least 1"),
        (lambda: Pool.Config(kind="max"), "unknown kind 'max'"),
        (lambda: Pool.Config(axes=3), "axes must be 1 or 2"),
        (lambda: MLP.Config(intermediate_size=0), "intermediate_size must be at least 1"),
        (lambda: LatentQueries.Config(num_queries=0), "must be at least 1"),
        (lambda: QFormer.Config(num_layers=0), "must be at least 1"),
        (lambda: QFormer.Config(hidden_size=10, num_heads=4), "num_heads 4 does not divide hidden_size 10"),
        (lambda: build(LatentQueries.Config(num_heads=3)), "num_heads 3 does not divide the model's hidden_size 16"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_rows_that_are_no_square_are_refused_where_a_grid_is_pooled():
    with pytest.raises(ValueError, match=r"15 rows are no square grid; write axes=1"):
        build(CONFIGS["pool"])(torch.zeros(1, 15, CHANNELS))


def test_a_connector_of_ones_own():
    @register_connector("first_rows_test")
    class FirstRows(Connector):
        """The first rows alone."""

        @dataclass(frozen=True, kw_only=True)
        class Config(Connector.Config):
            num: int = 2
            """How many."""

        def __init__(self, config, *, channels, hidden_size):
            super().__init__()
            self.num, self.proj = config.num, nn.Linear(channels, hidden_size)

        def forward(self, x, mask=None):
            return self.proj(x[:, : self.num])

        def num_rows(self, length):
            return self.num

        def row_mask(self, mask):
            return mask[:, : self.num]

    try:
        config = FirstRows.Config(num=1)
        assert Connector.Config.from_dict({"type": "first_rows_test", "num": 1}) == config
        assert build(config)(torch.zeros(3, 5, CHANNELS)).shape == (3, 1, WIDTH)
    finally:
        CONNECTORS.remove("first_rows_test")
