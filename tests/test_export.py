"""Models as graphs for other runtimes: what they give, and what cannot be exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omnimoe.export import ExportError, _first_line, export
from omnimoe.ops._backends import _asked
from tests.declarations import DECLARATIONS, build, ids_like


def batch(kind: str, batch_size: int, length: int) -> dict[str, Tensor]:
    ids = ids_like(DECLARATIONS[kind], batch_size, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def latents(length: int) -> dict:
    ids = ids_like(DECLARATIONS["transfusion"], 2, length)
    ids[:, 3:6] = 7
    return {
        "input_ids": ids,
        "features": {"latent": torch.randn(6, 6)},
        "timesteps": {"latent": torch.full((6,), 0.5)},
    }


@pytest.mark.parametrize(
    "kind",
    [
        "mot",
        "block_causal",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("dense", "moe", "moma", "moma_top_k", "pools", "chameleon")
        ),
    ],
)
def test_a_graph_gives_what_the_model_gives_at_every_size(kind, tmp_path):
    model = build(DECLARATIONS[kind]).train()
    program = export(model, inputs=batch(kind, 2, 12), path=tmp_path / "model.pt2")
    assert model.training
    ops = {str(node.target) for node in program.graph.nodes}
    assert not [op for op in ops if "omnimoe" in op or "grouped_mm" in op]
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((2, 12), (3, 9), (5, 21)):
        given = batch(kind, *size)
        real = given["attention_mask"].bool()
        wanted = model.eval()(**given).logits
        torch.testing.assert_close(loaded(**given)["logits"][real], wanted[real], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mot", "moe", "moma_top_k", "pools"])
def test_onnxruntime_gives_what_the_model_gives(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = build(DECLARATIONS[kind])
    export(model, "onnx", inputs=batch(kind, 2, 12), path=tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for size in ((2, 12), (3, 9)):
        given = batch(kind, *size)
        found = session.run(None, {name: held.numpy() for name, held in given.items()})[0]
        real = given["attention_mask"].bool()
        torch.testing.assert_close(torch.from_numpy(found)[real], model(**given).logits[real], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_continuous_rows_enter_and_leave_a_graph():
    model = build(DECLARATIONS["transfusion"])
    program = export(model, inputs=latents(12))
    given = latents(15)
    found, wanted = program.module()(**given), model(**given)
    torch.testing.assert_close(found["logits"], wanted.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["latent"], wanted.predictions["latent"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "unknown format 'tflite'; known: torch, onnx"),
        ({"inputs": {"input_ids": torch.ones(1, 8, dtype=torch.int64)}}, "a size of 0 or 1, or a length"),
        ({"inputs": {"input_ids": torch.ones(2, 2, dtype=torch.int64)}}, "a length below 3, cannot stay open"),
        ({"inputs": {"labels": torch.ones(2, 8, dtype=torch.int64)}}, "'labels' cannot be an input of a graph"),
        ({"inputs": {"features": {"latent": torch.ones(1, 6)}}}, "features['latent'] is (1, 6)"),
    ],
)
def test_what_cannot_be_exported_is_said_and_changes_nothing(settings, message):
    model = build(DECLARATIONS["dense"]).train()
    with pytest.raises(ExportError) as refused:
        export(model, **settings)
    assert message in str(refused.value)
    assert model.training
    assert _asked[-1] == ""


def test_a_part_that_reads_values_is_named_with_the_reason():
    model = build(DECLARATIONS["dense"])
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x, rows: forward(x, rows) * (1.0 if float(x.sum()) > 0 else 2.0)
    with pytest.raises(ExportError, match="torch.export cannot take the model: "):
        export(model, inputs=batch("dense", 2, 12))
    assert _asked[-1] == ""


def test_attention_that_cannot_be_exported_names_the_remedy():
    model = build(DECLARATIONS["dense"])
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ExportError, match=r"set_attn_implementation\('sdpa'\)"):
        export(model)


def test_a_model_with_continuous_modalities_asks_for_an_example():
    with pytest.raises(ExportError, match="the model may take features of 'latent'; pass an example"):
        export(build(DECLARATIONS["transfusion"]))


def test_torch_export_takes_the_model_itself_with_its_routings_and_rows(tmp_path):
    model, ids = build(DECLARATIONS["moe"]), ids_like(DECLARATIONS["moe"])
    given = {"input_ids": ids, "use_cache": False}
    torch.export.save(torch.export.export(model, (), given, strict=False), tmp_path / "model.pt2")
    found, wanted = torch.export.load(tmp_path / "model.pt2").module()(**given), model(**given)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-4)
    for one, other in zip(found.routings, wanted.routings, strict=True):
        assert torch.equal(one.expert_ids, other.expert_ids)
    assert torch.equal(found.rows.to_time(found.rows.modality_ids), wanted.rows.to_time(wanted.rows.modality_ids))


def test_the_reason_is_given_with_what_was_violated():
    error = ValueError("Constraints violated (length)! For more, set a flag.\n  - length - 1 != 1.\n\nAdvice follows.")
    assert _first_line(error) == "ValueError: Constraints violated (length)! For more, set a flag. - length - 1 != 1."
