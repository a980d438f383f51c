"""Some towers without the rest: what is kept gives what the whole model gives, and the rest is not read."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import multiprocessing
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from omnimoe import CheckpointError, ConfigError, OmniMoeForCausalLM, from_pretrained, load, register_experts, towers
from omnimoe.experts import EXPERTS, FeedForward
from omnimoe.routers import AttributeRouter, StaticRouter, TopKRouter
from tests.declarations import DECLARATIONS, DENSE, MOT, PATCHES, SPEECH, TEXT, build, ids_like, routed, with_towers

KINDS = [
    *("dense", "dense_tied", "mot", "mot_post", "merged", "chameleon", "moe", "static", "moma", "moma_top_k", "pools"),
    *("expert_choice", "mot_hybrid", "one_way", "block_causal", "encoder"),
    *("attention_experts", "attention_heads"),
]
TEXT_IDS = torch.tensor([[1, 9, 12, 8, 19, 10], [1, 8, 8, 15, 11, 2]])


def saved(config, folder: Path, **given) -> OmniMoeForCausalLM:
    model = build(config)
    model.save_pretrained(folder, **given)
    return model


def load_with_text_alone(folder: Path, tower: str) -> None:
    """Loads a tower from a file in which the pages of all but the first copy are locked."""
    path = folder / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    libc, page, locked = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, 0

    def opened(*args, **given):
        nonlocal locked
        file = safe_open(*args, **given)
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        base = min(int(line[0].partition("-")[0], 16) for line in maps)
        for name, entry in header.items():
            if name != "__metadata__" and entry["shape"][0] == 3:
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                first = -(-(start + (stop - start) // 3) // page) * page
                count = stop // page * page - first
                if count > 0:
                    assert libc.mprotect(ctypes.c_void_p(base + first), ctypes.c_size_t(count), 0) == 0
                    locked += count
        return file

    faulthandler.disable()
    towers.weights.safe_open = opened
    from_pretrained(folder, towers=[tower])
    assert locked > path.stat().st_size / 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_tower_gives_what_the_whole_gives(kind, tmp_path):
    whole = saved(DECLARATIONS[kind], tmp_path)
    part = from_pretrained(tmp_path, towers=["text"])
    assert part.config.modality_names == ("text",)
    assert part.config.vocab_size == TEXT.vocab_size == part.lm_head.weight.shape[0]
    assert part.num_parameters() < whole.num_parameters()
    with torch.no_grad():
        wanted = whole(TEXT_IDS).logits[..., : TEXT.vocab_size]
        torch.testing.assert_close(part(TEXT_IDS).logits, wanted, rtol=0, atol=2e-6)
    if kind.startswith("mot"):
        share = part.num_parameters() / whole.num_parameters()
        assert share < 0.5, "two of three towers are gone"
        assert not part.config.needs_key_order, "what has one copy has no order to keep"


@pytest.mark.parametrize("kind", ["mot", "merged", "moma", "static", "mot_hybrid"])
@pytest.mark.parametrize("given", [{"without": "image"}, {"towers": ["speech", "text"]}], ids=str)
def test_two_towers_keep_their_ids(kind, given, tmp_path):
    config = DECLARATIONS[kind]
    whole, part = saved(config, tmp_path), from_pretrained(tmp_path, **given)
    assert part.config.modality_names == ("text", "speech")
    assert part.config.token_ranges["speech"] == config.token_ranges["speech"], "ids do not move"
    ids = ids_like(config.replace(modalities=(TEXT, SPEECH.replace(vocab_start=32))), length=14)
    with torch.no_grad():
        wanted, got = whole(ids).logits, part(ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    silent = part.generation_config.suppress_tokens
    assert silent == [3, *range(20, 32)], "the marker that opens pictures, and their codes"
    assert not set(part.generate(TEXT_IDS[:, :4], max_new_tokens=12, do_sample=True)[:, 4:].flatten().tolist()) & {
        *silent
    }


def test_a_later_tower_alone(tmp_path):
    whole, part = saved(MOT, tmp_path), from_pretrained(tmp_path, towers="speech")
    ids = torch.tensor([[33, 39, 35, 36]])
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, whole(ids).logits, rtol=0, atol=2e-6)
    assert part.config.attention.towers == "shared"


def test_a_modality_with_adapters(tmp_path):
    config = DECLARATIONS["transfusion"]
    whole, part = saved(config, tmp_path), from_pretrained(tmp_path, without=["latent"])
    assert PATCHES.name in whole.model.modalities
    assert len(part.model.modalities) == 0
    assert part.config.bidirectional_modalities == ()
    with torch.no_grad():
        torch.testing.assert_close(part(TEXT_IDS).logits, whole(TEXT_IDS).logits, rtol=0, atol=2e-6)


@pytest.fixture
def roles():
    """Copies by role, over three modalities."""
    return with_towers(DENSE, "modality", keys=("und", "gen"))


def test_towers_of_other_keys_than_modalities(roles, tmp_path):
    whole, part = saved(roles, tmp_path), from_pretrained(tmp_path, towers=["und"])
    assert (part.config.keys, part.config.modality_names) == (("und",), roles.modality_names)
    ids = ids_like(roles)
    with torch.no_grad():
        wanted = whole(ids, key_ids=torch.zeros_like(ids)).logits
        torch.testing.assert_close(part(ids).logits, wanted, rtol=0, atol=2e-6)
    both = from_pretrained(tmp_path, towers=["gen"], without=["speech", "image"])
    assert (both.config.keys, both.config.modality_names) == (("gen",), ("text",))


def test_what_was_loaded_is_a_model_like_others(tmp_path):
    saved(MOT, tmp_path / "whole", max_shard_size="6KB")
    part = from_pretrained(tmp_path / "whole", without=["image"], dtype=torch.bfloat16)
    part.save_pretrained(tmp_path / "part")
    again = from_pretrained(tmp_path / "part", verify=True)
    assert again.dtype == torch.bfloat16
    assert again.state_dict().keys() == part.state_dict().keys()
    assert all(map(torch.equal, again.state_dict().values(), part.state_dict().values()))
    assert again.generation_config.suppress_tokens == part.generation_config.suppress_tokens
    assert not again.training
    for weight in part.parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes, "no weight holds on to the file"


def test_all_towers_are_the_whole_model(tmp_path):
    whole = saved(MOT, tmp_path)
    part = from_pretrained(tmp_path, towers=["speech", "image", "text"])
    assert part.config.vocab_size == MOT.vocab_size
    assert part.num_parameters() == whole.num_parameters()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"towers": ["txt"]}, "towers names 'txt'; this model has image, speech, text"),
        ({"without": ["smell"]}, "without names 'smell'; this model has"),
        ({"without": ["text", "image", "speech"]}, "nothing is left"),
        ({"towers": []}, "nothing is left"),
    ],
)
def test_wrong_names(given, message, tmp_path):
    saved(MOT, tmp_path)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(tmp_path, **given)


class TestWhatIsRead:
    def test_shards_of_what_is_left_out_may_be_missing(self, tmp_path):
        saved(DECLARATIONS["transfusion"], tmp_path, max_shard_size=1)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        left = [file for key, file in index.items() if ".modalities.latent." in key]
        assert len(left) == 2
        (tmp_path / left[0]).unlink()
        (tmp_path / left[1]).write_bytes(b"no safetensors file")
        part = from_pretrained(tmp_path, without=["latent"], verify=True)
        assert len(part.model.modalities) == 0
        with pytest.raises(CheckpointError, match="is missing|no safetensors|has 19 bytes|would have"):
            from_pretrained(tmp_path)

    @pytest.mark.parametrize(("tower", "code"), [("text", 0), ("image", -signal.SIGSEGV)])
    def test_copies_of_what_is_left_out_are_not_touched(self, tmp_path, tower, code):
        """Pages that hold other towers alone are locked once the file is mapped: who reads them is killed."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("the system does not say where a file is mapped")
        wide = DENSE.replace(hidden_size=64, experts=FeedForward.Config(intermediate_size=256))
        OmniMoeForCausalLM(with_towers(wide, "modality")).save_pretrained(tmp_path)
        child = multiprocessing.get_context("fork").Process(target=load_with_text_alone, args=(tmp_path, tower))
        child.start()
        child.join()
        assert child.exitcode == code

    @pytest.mark.parametrize("strict", [True, False])
    def test_misfits_of_what_is_read_are_found(self, tmp_path, strict, caplog):
        saved(MOT, tmp_path)
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        del weights["model.backbone.layers.0.self_attn.q_proj.weight"]
        weights["model.norm.weight"] = torch.zeros(2, 16)
        weights["model.extra"] = torch.zeros(1)
        save_file(weights, path, metadata={"format": "pt"})
        if not strict:
            from_pretrained(tmp_path, towers=["text"], strict=False)
            assert "model.norm.weight" in caplog.text
            return
        with pytest.raises(CheckpointError) as error:
            from_pretrained(tmp_path, towers=["text"])
        for fragment in (
            "q_proj.weight",
            "model.extra",
            "model.norm.weight: (2, 16) in the file, (3, 16) in the model",
        ):
            assert fragment in str(error.value)

    @pytest.mark.parametrize("check", ["verify", "check_finite"])
    def test_the_checks_hold_for_what_is_read(self, tmp_path, check):
        model = build(MOT)
        with torch.no_grad():
            model.model.backbone.layers[0].self_attn.q_proj.weight[1] = float("nan")
        model.save_pretrained(tmp_path)
        from_pretrained(tmp_path, towers=["text"], check_finite="error")
        with pytest.raises(CheckpointError, match="q_proj"):
            from_pretrained(tmp_path, towers=["image"], check_finite="error")
        if check == "verify":
            (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1] + b"\1")
            with pytest.raises(CheckpointError, match="is not the file that was saved"):
                from_pretrained(tmp_path, towers=["text"], verify=True)


class TestPartsOfOthers:
    @pytest.fixture
    def own(self):
        @register_experts("own_scales")
        class OwnScales(FeedForward):
            """A learned scale for each key, that nobody else knows of."""

            @dataclass(frozen=True, kw_only=True)
            class Config(FeedForward.Config):
                """As the feed-forward network."""

            def __init__(self, config, *, num_modalities, **sizes):
                super().__init__(config, num_modalities=num_modalities, **sizes)
                self.scales = nn.Parameter(torch.rand(num_modalities))

            def forward(self, x, rows):
                return super().forward(x, rows)[0] * self.scales[rows.key_ids].unsqueeze(1), None

        yield OwnScales
        EXPERTS.remove("own_scales")

    def test_a_part_that_does_not_say_how_it_is_cut(self, own, tmp_path):
        saved(DENSE.replace(experts=own.Config(intermediate_size=8, towers=(0, 1, 1))), tmp_path)
        with pytest.raises(
            ConfigError, match=r"scales is to be \(1,\) .* \(3,\) of it stay: .* omnimoe.towers.kept_copies"
        ):
            from_pretrained(tmp_path, towers=["text"])
        assert from_pretrained(tmp_path).config.modality_names == DENSE.modality_names

    def test_a_part_that_says_it(self, own, tmp_path):
        towers.kept_copies.register(own)(
            lambda module, keys: {**towers.kept_copies.dispatch(FeedForward)(module, keys), "scales": keys}
        )
        whole = saved(DENSE.replace(experts=own.Config(intermediate_size=8, towers=(0, 1, 1))), tmp_path)
        part = from_pretrained(tmp_path, towers=["text"])
        with torch.no_grad():
            wanted = whole(TEXT_IDS).logits[..., : TEXT.vocab_size]
            torch.testing.assert_close(part(TEXT_IDS).logits, wanted, rtol=0, atol=2e-6)


def test_routers_inside_of_groups_keep_their_weights(tmp_path):
    whole, part = saved(DECLARATIONS["moma_top_k"], tmp_path), from_pretrained(tmp_path, towers=["image"])
    routers = [model.model.backbone.layers[1].mlp.router.routers for model in (whole, part)]
    assert all(map(torch.equal, routers[0][1].parameters(), routers[1][0].parameters()))
    assert not all(map(torch.equal, routers[0][0].parameters(), routers[1][0].parameters()))
    assert part.config.experts.num_experts == 3
    assert routed(3, part.config.experts.router).num_experts == 3


@pytest.mark.parametrize(
    "router",
    [
        StaticRouter.Config(experts_of_keys=((0, 3), 2, (1, 3))),
        TopKRouter.Config(expert_bias="key", entropy_keys=(0, 2)),
        AttributeRouter.Config(),
    ],
    ids=lambda router: router.target.registered_name,
)
@pytest.mark.parametrize("tower", ["text", "image", "speech"])
def test_routers_with_fields_over_keys(router, tower, tmp_path):
    config = DENSE.replace(experts=routed(4, router))
    whole = saved(config, tmp_path)
    part = from_pretrained(tmp_path, towers=tower)
    first = config.token_ranges[tower]
    ids = torch.arange(first.start, first.stop)[-6:].unsqueeze(0)
    with torch.no_grad():
        wanted = whole(ids).logits[..., : part.config.vocab_size]
        torch.testing.assert_close(part(ids).logits, wanted, rtol=0, atol=2e-6)


def test_weights_that_ship(tmp_path):
    folder = shutil.copytree(Path(load("omni_nano", pretrained=True).name_or_path), tmp_path / "omni")
    whole, part = from_pretrained(folder), from_pretrained(folder, towers=["text"])
    ids = torch.randint(10, 2000, (1, 24))
    with torch.no_grad():
        assert torch.equal(part(ids).logits, whole(ids).logits[..., : part.config.vocab_size])
