"""BEiT-3 against a plain loop over published names, for where torchscale is not installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.zoo.beit3 import BEIT3
from tests.zoo.beit3.peer import TINY, for_ours, published
from tests.zoo.weights import close

PLAIN = published(**TINY, kinds=("words", "aligned"))


def published_tensors(model: OmniMoeForCausalLM) -> dict[str, torch.Tensor]:
    """What a published file of the model would hold."""
    plan, held = BEIT3.plan(model), model.state_dict()
    assert all(piece.rows is None for piece in plan.pieces)
    return {piece.published: piece.change.back(piece.place(held[piece.ours])) for piece in plan.pieces}


def encoded(w: dict[str, torch.Tensor], pixels: torch.Tensor, words: list[int], heads: int) -> torch.Tensor:
    """``(n, D)``, the rows of one picture and one text, each row by itself."""
    seen = F.conv2d(pixels[None], w["beit3.vision_embed.proj.weight"], w["beit3.vision_embed.proj.bias"], stride=4)
    patches = [w["beit3.vision_embed.cls_token"].view(-1), *seen[0].flatten(1).T]
    x = [row + w["beit3.encoder.embed_positions.A.weight"][2 + place] for place, row in enumerate(patches)]
    texts = [w["beit3.text_embed.weight"][word] for word in words]
    x += [row + w["beit3.encoder.embed_positions.B.weight"][2 + place] for place, row in enumerate(texts)]
    copies = ["A"] * len(patches) + ["B"] * len(texts)

    def norm(row: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(row, row.shape, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def line(row: torch.Tensor, name: str) -> torch.Tensor:
        return w[f"{name}.weight"] @ row + w[f"{name}.bias"]

    for layer in range(PLAIN["encoder_layers"]):
        at = f"beit3.encoder.layers.{layer}"
        inner = [norm(row, f"{at}.self_attn_layer_norm.{copy}") for row, copy in zip(x, copies, strict=True)]
        q, k, v = (
            torch.stack(
                [line(row, f"{at}.self_attn.{site}_proj.{copy}") for row, copy in zip(inner, copies, strict=True)]
            ).unflatten(1, (heads, -1))
            for site in "qkv"
        )
        for place, copy in enumerate(copies):
            mixed = []
            for head in range(heads):
                weights = torch.softmax(k[:, head] @ q[place, head] / q.shape[-1] ** 0.5, dim=0)
                mixed.append(weights @ v[:, head])
            mixed = norm(torch.cat(mixed), f"{at}.self_attn.inner_attn_ln.{copy}")
            row = x[place] + line(mixed, f"{at}.self_attn.out_proj.{copy}")
            wide = F.gelu(line(norm(row, f"{at}.final_layer_norm.{copy}"), f"{at}.ffn.{copy}.fc1"))
            x[place] = row + line(norm(wide, f"{at}.ffn.{copy}.ffn_layernorm"), f"{at}.ffn.{copy}.fc2")
    return torch.stack([norm(row, f"beit3.encoder.layer_norm.{copy}") for row, copy in zip(x, copies, strict=True)])


def test_rows_and_logits():
    torch.manual_seed(0)
    model = OmniMoeForCausalLM(BEIT3.config_of(PLAIN)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        w = {name: tensor.double() for name, tensor in published_tensors(model).items()}
        pixels, words = torch.randn(2, 3, 12, 12), torch.randint(3, 50, (2, 4))
        out = model(**for_ours(model, pixels, words, None), output_hidden_states=[-1])
        for row in range(2):
            wanted = encoded(w, pixels[row].double(), words[row].tolist(), PLAIN["encoder_attention_heads"])
            close(out.hidden_states[-1][row], wanted)
            logits = wanted @ w["mlm_head.weight"].T + w["mlm_head.bias"]
            close(out.logits[row], logits)
