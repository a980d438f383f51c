"""What two processes do together, each on a part of a model; every rank runs this file, and says how each case ended.

python tests/parallel/cases.py FOLDER CASE...     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers.distributed import DistributedConfig

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.parallel import ParallelError
from omnimoe.stages import pipeline_stage
from tests.declarations import DECLARATIONS, build, ids_like

CASES: dict[str, Callable[[Path], None]] = {}
TIED = DECLARATIONS["dense_tied"]
ODD = (*TIED.modalities[:-1], TIED.modalities[-1].replace(vocab_size=9))
MOE = DECLARATIONS["moe"]
KINDS = {
    **DECLARATIONS,
    "dense_tied": TIED.replace(modalities=ODD),
    "moe_tied": MOE.replace(modalities=ODD, tie_word_embeddings=True),
    "moe_top_1": MOE.replace(experts=MOE.experts.replace(router=MOE.experts.router.replace(top_k=1))),
}
"""Two ranks cannot halve the vocabulary of the tied one."""


def case(*kinds: str) -> Callable[[Callable[[Path, str], None]], None]:
    """Files one case for each kind of model, ``function/kind``."""

    def file_under(function: Callable[[Path, str], None]) -> None:
        for kind in kinds:
            CASES[f"{function.__name__}/{kind}"] = lambda folder, kind=kind: function(folder, kind)

    return file_under


def batch(kind: str) -> dict[str, Tensor]:
    """Two rows, one of them padded on the left."""
    ids = ids_like(KINDS[kind])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def saved(folder: Path, kind: str) -> Path:
    """A folder with the model's weights, written by the first rank."""
    target = folder / kind
    if dist.get_rank() == 0:
        build(KINDS[kind]).save_pretrained(target)
    dist.barrier()
    return target


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that lies on several ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_step(whole: OmniMoeForCausalLM, split: OmniMoeForCausalLM, inputs: dict[str, Tensor]) -> None:
    """Logits, loss and every gradient are those of the model in one piece."""
    with torch.no_grad():
        torch.testing.assert_close(full(split(**inputs).logits), whole(**inputs).logits, atol=2e-5, rtol=1e-4)
    wanted = whole.train()(**inputs)
    found = split.train()(**inputs)
    torch.testing.assert_close(full(found.loss), wanted.loss)
    wanted.loss.backward()
    found.loss.backward()
    check_gradients(whole, split)


def check_gradients(whole: OmniMoeForCausalLM, split: OmniMoeForCausalLM) -> None:
    """Every gradient is there and is that of the model in one piece."""
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in split.named_parameters():
        assert parameter.grad is not None, name
        difference = (full(parameter.grad) - gradients[name]).abs().max()
        assert difference <= 2e-5 + 1e-3 * gradients[name].abs().max(), f"{name} differs by {difference}"


def check_saved(split: OmniMoeForCausalLM, source: Path, target: Path) -> None:
    """What a split model saves is what a whole one saved."""
    split.save_pretrained(target)
    dist.barrier()
    wanted, found = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


@case(
    "dense", "dense_tied", "mot", "mot_post", "merged", "chameleon", "moe", "moma", "moma_top_k", "pools", "mot_hybrid"
)
def tensor_parallel(folder: Path, kind: str) -> None:
    source = saved(folder, kind)
    whole = OmniMoeForCausalLM.from_pretrained(source)
    split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(tp_size=2))
    attention = split.model.backbone.layers[0].self_attn
    assert attention.q_proj.weight.to_local().shape[1] * 2 == attention.q_proj.weight.shape[1]
    check_step(whole, split, batch(kind))
    check_saved(split, source, folder / f"{kind}_again")


@case("dense", "mot", "moe")
def tensor_parallel_generation(folder: Path, kind: str) -> None:
    source = saved(folder, kind)
    whole = OmniMoeForCausalLM.from_pretrained(source)
    split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(tp_size=2))
    inputs = batch(kind)
    del inputs["labels"]
    for cache in ("dynamic", "static"):
        settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        assert torch.equal(split.generate(**inputs, **settings), whole.generate(**inputs, **settings)), cache


@case("moe", "moe_tied", "moma", "moma_top_k", "pools", "mot_hybrid", "expert_choice")
def expert_parallel(folder: Path, kind: str) -> None:
    """Experts lie on two ranks, each whole on one; the rest is split by heads and width."""
    source = saved(folder, kind)
    whole = OmniMoeForCausalLM.from_pretrained(source)
    for implementation in ("auto", "all_reduce", "all_to_all"):
        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
        split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=config)
        bank = split.model.backbone.layers[1].mlp.experts
        bank = bank.pools[0] if kind == "pools" else bank
        assert split.model.backbone.layers[1].self_attn.q_proj.weight.placements[0].dim == 1
        assert bank.gate_up_proj.to_local().shape[0] * 2 == bank.gate_up_proj.shape[0]
        assert not torch.equal(*gathered(bank.gate_up_proj.to_local()))  # each rank has its own experts
        assert (split.lm_head.weight is split.model.embed_tokens.weight) == (kind == "moe_tied")
        for kernels in ("omnimoe", "eager"):
            whole.set_experts_implementation(kernels)
            split.set_experts_implementation(kernels)
            whole.zero_grad(set_to_none=True)
            split.zero_grad(set_to_none=True)
            check_step(whole.eval(), split.eval(), batch(kind))
    check_saved(split, source, folder / f"{kind}_again")


@case("moe_top_1")
def expert_parallel_one_expert(folder: Path, kind: str) -> None:
    """Every row goes to the same expert: one rank has all the work, and the other none."""
    source = folder / kind
    if dist.get_rank() == 0:
        model = build(KINDS[kind])
        with torch.no_grad():
            for layer in model.model.backbone.layers:
                layer.mlp.router.scorer.weight.zero_()  # every row has the same tie
        model.save_pretrained(source)
    dist.barrier()
    whole = OmniMoeForCausalLM.from_pretrained(source)
    for implementation in ("auto", "all_reduce", "all_to_all"):
        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
        split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=config)
        whole.zero_grad(set_to_none=True)
        check_step(whole.eval(), split.eval(), batch(kind))
        for layer in whole.model.backbone.layers:
            used = layer.mlp.experts.down_proj.grad.flatten(1).abs().sum(1) > 0
            assert used.sum() == 1, used


@case("moe", "mot_hybrid")
def expert_parallel_generation(folder: Path, kind: str) -> None:
    source = saved(folder, kind)
    whole = OmniMoeForCausalLM.from_pretrained(source)
    inputs = batch(kind)
    del inputs["labels"]
    for implementation in ("auto", "all_to_all"):
        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
        split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=config)
        for extra in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            settings = {"max_new_tokens": 4, "do_sample": False, **extra}
            found, wanted = split.generate(**inputs, **settings), whole.generate(**inputs, **settings)
            assert torch.equal(found, wanted), (implementation, extra)


@case("mot", "moe", "moma_top_k")
def recomputed(folder: Path, kind: str) -> None:
    """Layers that are recomputed in backward send rows to the same experts, on whatever rank they lie."""
    source = saved(folder, kind)
    layouts = [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}] if kind != "mot" else [{"tp_size": 2}]
    for sizes in layouts:
        whole = OmniMoeForCausalLM.from_pretrained(source)
        split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(**sizes))
        split.gradient_checkpointing_enable()
        check_step(whole, split, batch(kind))
    split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))
    split.gradient_checkpointing_enable()
    check_ranks(folder, kind, split)


@case("dense", "dense_tied", "mot", "moe", "moma_top_k")
def fully_sharded(folder: Path, kind: str) -> None:
    """Each rank has a row of its own: gradients are the mean of both. Then a batch without pictures on one of them."""
    source = saved(folder, kind)
    split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=DistributedConfig(fsdp_size=2))
    check_saved(split, source, folder / f"{kind}_again")
    check_ranks(folder, kind, split)


@case("mot", "transfusion")
def fully_shard_by_hand(folder: Path, kind: str) -> None:
    """PyTorch's own ``fully_shard``, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    saved(folder, kind)
    split = OmniMoeForCausalLM.from_pretrained(folder / kind)
    for layer in split.model.backbone.layers:
        fully_shard(layer)
    fully_shard(split)
    check_ranks(folder, kind, split)


@case("moe")
def fully_sharded_with_expert_parallel(folder: Path, kind: str) -> None:
    """Rows of two batches meet experts on two ranks."""
    source = saved(folder, kind)
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    split = OmniMoeForCausalLM.from_pretrained(source, distributed_config=config)
    check_ranks(folder, kind, split)


def check_ranks(folder: Path, kind: str, split: OmniMoeForCausalLM) -> None:
    """Gradients are the mean of what both ranks would have alone, with every modality and with text alone on one.

    After each of these a step, which the next one starts from.
    """
    whole = OmniMoeForCausalLM.from_pretrained(folder / kind)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, foreach=False) for model in (whole, split)]
    for inputs in (rank_batches(kind), lopsided_batches(kind), rank_batches(kind)):
        whole.zero_grad(set_to_none=True)
        split.zero_grad(set_to_none=True)
        losses = [whole.train()(**part).loss for part in inputs]
        (sum(losses) / 2).backward()
        loss = split.train()(**inputs[dist.get_rank()]).loss
        torch.testing.assert_close(full(loss), losses[dist.get_rank()])
        loss.backward()
        check_gradients(whole, split)
        for optimizer in optimizers:
            optimizer.step()


def rank_batches(kind: str) -> list[dict[str, Tensor]]:
    return [given(kind, ids_like(KINDS[kind], 2, 10, seed=seed)) for seed in (0, 1)]


def lopsided_batches(kind: str) -> list[dict[str, Tensor]]:
    """Text alone on the first rank, everything on the second."""
    return [given(kind, torch.full((2, 8), 9)), rank_batches(kind)[1]]


def given(kind: str, ids: Tensor) -> dict[str, Tensor]:
    if kind != "transfusion":
        return {"input_ids": ids, "labels": ids}
    ids = ids.clone()
    if len(set(ids.flatten().tolist())) > 1:
        ids[:, 3:6] = 7
    noisy = torch.randn(int((ids == 7).sum()), 6, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == 7, -100),
        "features": {"latent": noisy} if len(noisy) else {},
        "timesteps": {"latent": torch.full((len(noisy),), 0.5)} if len(noisy) else {},
        "targets": {"latent": -noisy} if len(noisy) else {},
    }


@case("dense", "mot", "moe", "block_causal")
def pipeline(folder: Path, kind: str) -> None:
    """PyTorch's own schedules, over the stages that the plan of the config names: a step of two micro-batches."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    source, rank = saved(folder, kind), dist.get_rank()
    whole = OmniMoeForCausalLM.from_pretrained(source).train()
    inputs = batch(kind)
    parts = [{name: held[row : row + 1] for name, held in inputs.items()} for row in range(2)]
    outs = [whole(**part) for part in parts]
    (sum(out.loss for out in outs) / 2).backward()
    gradients = {name: held.grad for name, held in whole.named_parameters()}
    for schedule in (ScheduleGPipe, Schedule1F1B):
        stage = pipeline_stage(OmniMoeForCausalLM.from_pretrained(source).train(), rank, 2)
        if schedule is Schedule1F1B:
            stage.model.gradient_checkpointing_enable()
        placed = PipelineStage(stage, rank, 2, torch.device("cpu"))
        losses: list[Tensor] = []
        out = schedule(placed, 2, loss_fn=lambda out, labels: out[1]).step(
            **inputs, target=inputs["labels"] if rank else None, losses=losses
        )
        for name, parameter in stage.model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=1e-3, msg=name)
        if rank:
            torch.testing.assert_close(out[0], torch.cat([part.logits for part in outs]), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(torch.cat(losses), torch.stack([part.loss for part in outs]))
            assert torch.equal(out[1], torch.cat(losses))


def gathered(local: Tensor) -> list[Tensor]:
    """What every rank has."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return parts


@case("dense")
def refusals(folder: Path, kind: str) -> None:
    """What cannot be split is said before a weight is read."""
    dense = KINDS[kind]
    source = saved(folder, kind)
    if dist.get_rank() == 0:
        odd = dense.attention.replace(num_heads=3, num_kv_heads=3, head_dim=4)
        build(dense.replace(attention=odd)).save_pretrained(folder / "odd")
    dist.barrier()
    gone = {"model.backbone.layers.*.mlp.gate": "bank_mlp"}
    for name, settings, message in (
        ("odd", {"tp_size": 2}, "3 query heads and 3 key heads cannot be split over 2 ranks; take a tp_size"),
        (kind, {"tp_size": 2, "tp_plan": gone}, "match nothing"),
        (kind, {"tp_size": 2, "ep_size": 2}, "has no `ep_plan`"),
        (kind, {"pp_size": 2}, "pp_size=2 cuts models by .*; take omnimoe.stages.pipeline_stage"),
    ):
        with pytest.raises(ValueError, match=message):
            OmniMoeForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**settings))
    whole = OmniMoeForCausalLM.from_pretrained(source)
    with pytest.raises(
        ParallelError, match="tp_plan has rules for .*mlp.gate.*, which OmniMoeForCausalLM does not have"
    ):
        whole.tp_plan = gone


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ended = {}
    for name in names:
        torch.manual_seed(0)
        place = folder / name.replace("/", "_")
        try:
            CASES[name](place)
            ended[name] = ""
        except Exception:
            # the other rank may wait for this one, so nothing runs after a failure
            ended[name] = traceback.format_exc()
            break
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(ended), encoding="utf-8")
    if all(not text for text in ended.values()):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
