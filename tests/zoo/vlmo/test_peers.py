"""The parts of VLMo that transformers has, of other models: a picture alone is BEiT, words go as in BERT."""

from __future__ import annotations

import torch
from transformers import BeitConfig, BeitModel, BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPredictionHeadTransform

from omnimoe.zoo.vlmo.convert import VLMO
from tests.zoo.vlmo.oracle import TINY, bias_row
from tests.zoo.weights import close, published_of, random_model

WIDTH, DEPTH, HEADS = TINY["embed_dim"], TINY["depth"], TINY["num_heads"]


def beit_of(weights: dict[str, torch.Tensor]) -> BeitModel:
    """BEiT with the weights that a picture alone meets; the row of its modality is put into what enters."""
    config = BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=TINY["image_size"],
        patch_size=TINY["patch_size"],
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.1,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        use_mask_token=False,
        use_mean_pooling=False,
    )
    kind, stem = weights["token_type_embeddings.weight"][1], "embeddings.patch_embeddings.projection"
    held = {
        "embeddings.cls_token": weights["transformer.cls_token"] + kind,
        f"{stem}.weight": weights["transformer.patch_embed.proj.weight"],
        f"{stem}.bias": weights["transformer.patch_embed.proj.bias"] + kind,
        "layernorm.weight": weights["transformer.norm.weight"],
        "layernorm.bias": weights["transformer.norm.bias"],
    }
    table = weights["relative_position_bias_table"][: 5 * 5 + 3].chunk(DEPTH, dim=1)
    for layer in range(DEPTH):
        ours, theirs = f"transformer.blocks.{layer}", f"layers.{layer}"
        held[f"{theirs}.relative_position_bias.relative_position_bias_table"] = table[layer]
        for site, rows in zip("qkv", weights[f"{ours}.attn.qkv.weight"].chunk(3), strict=True):
            held[f"{theirs}.attention.{site}_proj.weight"] = rows
        for site in "qv":
            held[f"{theirs}.attention.{site}_proj.bias"] = weights[f"{ours}.attn.{site}_bias"]
        for place in (1, 2):
            held[f"{theirs}.lambda_{place}"] = weights[f"{ours}.gamma_{place}"]
        for kind_of in ("weight", "bias"):
            held[f"{theirs}.attention.o_proj.{kind_of}"] = weights[f"{ours}.attn.proj.{kind_of}"]
            held[f"{theirs}.layernorm_before.{kind_of}"] = weights[f"{ours}.norm1.{kind_of}"]
            held[f"{theirs}.layernorm_after.{kind_of}"] = weights[f"{ours}.norm2_imag.{kind_of}"]
            for part in ("fc1", "fc2"):
                held[f"{theirs}.mlp.{part}.{kind_of}"] = weights[f"{ours}.mlp_imag.{part}.{kind_of}"]
    model = BeitModel(config).eval()
    model.load_state_dict(held)
    return model


def test_a_picture_alone_is_beit():
    model = random_model(VLMO, TINY)
    beit = beit_of(published_of(VLMO, model))
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    seen = model.model.modalities["vision"].get_encoder().patches(pixels)
    with torch.no_grad():
        close(model.encode("vision", seen), beit(pixels).last_hidden_state)


def test_the_loop_counts_cells_as_beit_does():
    beit = BeitModel(BeitConfig(num_hidden_layers=1, use_relative_position_bias=True, image_size=48, patch_size=16))
    index = beit.layers[0].relative_position_bias.generate_relative_position_index((3, 3))
    assert index.tolist() == [[bias_row(("imag", i), ("imag", j), 3, 10) for j in range(10)] for i in range(10)]


def test_words_enter_and_leave_as_in_bert():
    model = random_model(VLMO, TINY)
    config = BertConfig(hidden_size=WIDTH, vocab_size=60, max_position_embeddings=8)
    enters, leaves = BertEmbeddings(config).eval(), BertPredictionHeadTransform(config).eval()
    weights = published_of(VLMO, model)
    for part, prefix in ((enters, "text_embeddings."), (leaves, "mlm_score.transform.")):
        given = {name.removeprefix(prefix): held for name, held in weights.items() if name.startswith(prefix)}
        missing, unexpected = part.load_state_dict(given, strict=False)
        assert unexpected == []
        assert set(missing) <= {"position_embeddings.weight"}
    ids = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        enters.position_embeddings.weight.zero_()
        close(model.get_input_embeddings()(ids), enters(ids))
        rows = torch.randn(2, 5, WIDTH)
        close(model.head_layer(rows), leaves(rows))
