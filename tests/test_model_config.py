"""The model's config: what it derives, what it refuses, and that a file gives back what was written."""

from __future__ import annotations

import json

import pytest
import torch

from omnimoe.backbone import LayerRange
from omnimoe.config import ConfigError
from omnimoe.experts import FeedForward, RoutedAttention, RoutedExperts
from omnimoe.hub import load
from omnimoe.layers import Attention, Norm, Rope
from omnimoe.modalities import Patches, Tokens
from omnimoe.model import OmniMoeConfig
from omnimoe.routers import (
    AttributeRouter,
    ByModalityRouter,
    ExpertChoiceRouter,
    SoftRouter,
    StaticRouter,
    TopKRouter,
)
from tests.declarations import DECLARATIONS, DENSE, IMAGE, SPEECH, TEXT, build, routed

PARTS = ("attention", "experts", "norm", "final_norm", "modalities", "layers")


def same(first: OmniMoeConfig, second: OmniMoeConfig) -> bool:
    return all(getattr(first, name) == getattr(second, name) for name in PARTS) and (
        first.to_dict() == second.to_dict() and first.blocks == second.blocks
    )


@pytest.mark.parametrize("name", DECLARATIONS)
def test_json_gives_back_what_was_written(name, tmp_path):
    config = DECLARATIONS[name]
    assert same(OmniMoeConfig.from_dict(json.loads(config.to_json_string())), config)
    assert same(OmniMoeConfig.from_dict(json.loads(config.to_json_string(use_diff=False))), config)
    config.save_pretrained(tmp_path)
    assert same(OmniMoeConfig.from_pretrained(tmp_path), config)


def test_every_part_and_field_survives_a_file(tmp_path):
    config = OmniMoeConfig(
        hidden_size=24,
        num_layers=5,
        modalities=(
            TEXT,
            IMAGE.replace(vocab_start=100, loss_weight=0.5),
            Patches.Config(name="latent", channels=4, objective="flow", placeholder_id=9),
        ),
        attention=Attention.Config(
            num_heads=3, head_dim=8, rope=Rope.Config(theta=5e5, sections=(2, 1, 1)), site_towers={"v_proj": (0, 1, 0)}
        ),
        experts=routed(
            4, ByModalityRouter.Config(experts=(1, 2, 1), router=TopKRouter.Config(top_k=1, score="sigmoid"))
        ),
        norm=Norm.Config(eps=1e-3, towers=(0, 0, 1)),
        final_norm=Norm.Config(towers="modality"),
        layers=(
            LayerRange(start=1, step=2, experts=FeedForward.Config(gated=False, activation="relu2")),
            LayerRange(stop=1),
        ),
        keys=(),
        mask="block_causal",
        bidirectional_modalities=("latent",),
        markers="own",
        vocab_size=128,
        tie_word_embeddings=True,
        eos_token_id=[2, 4],
    )
    config.save_pretrained(tmp_path)
    again = OmniMoeConfig.from_pretrained(tmp_path)
    assert same(again, config)
    assert again.attention.rope.sections == (2, 1, 1)
    assert again.attention.site_towers == {"v_proj": (0, 1, 0)}
    assert again.eos_token_id == [2, 4]
    assert again.bidirectional_modalities == ("latent",)
    assert build(again).state_dict().keys() == build(config).state_dict().keys()


def test_values_changed_back_to_defaults_are_not_lost(tmp_path):
    """Only differences to the defaults are written; a part that differs in one nested value must come back whole."""
    config = OmniMoeConfig(attention=Attention.Config(rope=None), norm=Norm.Config(eps=0.5))
    config.save_pretrained(tmp_path)
    assert OmniMoeConfig.from_pretrained(tmp_path).attention.rope is None
    assert same(OmniMoeConfig.from_pretrained(tmp_path), config)
    default = OmniMoeConfig()
    default.save_pretrained(tmp_path)
    assert same(OmniMoeConfig.from_pretrained(tmp_path), default)


def test_replace_changes_a_copy_and_names_the_near_field():
    changed = DENSE.replace(hidden_size=32, num_hidden_layers=7)
    assert (changed.hidden_size, changed.num_layers, DENSE.hidden_size, DENSE.num_layers) == (32, 7, 16, 2)
    assert changed.attention == DENSE.attention
    with pytest.raises(ConfigError, match="has no field 'hiden_size'; did you mean 'hidden_size'"):
        DENSE.replace(hiden_size=3)
    with pytest.raises(ConfigError, match=r"has no field 'quantization_config'; fresh .* omnimoe.quantize\(model\)"):
        load("mot_nano", quantization_config="int8")
    with pytest.raises(ConfigError, match="has no field 'num_head'; did you mean 'num_heads'"):
        DENSE.replace(attention=DENSE.attention.replace(num_head=3))


def test_a_stored_part_with_an_unknown_field_or_type_is_refused():
    plain = DENSE.to_dict()
    plain["attention"] = {**plain["attention"], "num_head": 3}
    with pytest.raises(ConfigError, match="no field 'num_head'; did you mean 'num_heads'"):
        OmniMoeConfig.from_dict(plain)
    plain = DENSE.to_dict()
    plain["experts"] = {"type": "feed_foward"}
    with pytest.raises(ValueError, match="unknown experts 'feed_foward'; did you mean 'feed_forward'"):
        OmniMoeConfig.from_dict(plain)


def test_the_vocabulary_follows_the_modalities_unless_it_is_given():
    assert DENSE.vocab_size == 40
    assert DENSE.replace(modalities=(TEXT,)).vocab_size == 20
    padded = DENSE.replace(vocab_size=64)
    assert padded.vocab_size == 64
    assert padded.replace(hidden_size=32).vocab_size == 64
    with pytest.raises(ConfigError, match="vocab_size 39 is less than the 40 rows"):
        DENSE.replace(vocab_size=39)


@pytest.mark.parametrize(
    ("name", "causal"),
    [("dense", True), ("mot", True), ("moe", True), ("static", True), ("moma_top_k", True), ("one_way", True),
     ("moma", False), ("expert_choice", False), ("encoder", False), ("block_causal", False), ("transfusion", False)],
)  # fmt: skip
def test_is_causal_reads_the_mask_and_every_router(name, causal):
    assert DECLARATIONS[name].is_causal == causal


def test_is_causal_looks_into_layer_ranges_and_lone_experts():
    leaky = routed(4, ExpertChoiceRouter.Config())
    assert not DENSE.replace(layers=(LayerRange(start=1, experts=leaky),)).is_causal
    lone = ByModalityRouter.Config(experts=(1, 1, 1))
    assert DENSE.replace(experts=routed(3, lone)).is_causal
    assert not DENSE.replace(experts=routed(3, lone.replace(gate_lone_expert=True))).is_causal


@pytest.mark.parametrize(
    ("name", "sorted_"),
    [("dense", False), ("moe", False), ("static", False), ("mot", True), ("moma", True), ("merged", True)],
)
def test_rows_are_sorted_only_where_something_has_copies_by_key(name, sorted_):
    assert DECLARATIONS[name].needs_key_order == sorted_


def test_one_site_with_towers_is_enough_to_sort():
    assert DENSE.replace(attention=DENSE.attention.replace(site_towers={"o_proj": "modality"})).needs_key_order
    assert DENSE.replace(final_norm=Norm.Config(towers="modality")).needs_key_order
    assert DENSE.replace(layers=(LayerRange(start=1, norm=Norm.Config(towers="modality")),)).needs_key_order


def test_the_partition_names_the_modality_of_every_row():
    table = DENSE.modality_of_ids()
    assert table.tolist() == [0] * 20 + [1] * 12 + [2] * 8
    assert table.dtype == torch.int64


def test_boundary_markers_belong_to_text_or_to_their_span():
    assert DENSE.modality_of_ids()[[3, 4, 5, 6]].tolist() == [0] * 4
    assert DENSE.modality_of_ids(markers="own")[[3, 4, 5, 6]].tolist() == [1, 1, 2, 2]
    own = DENSE.replace(markers="own")
    assert own.modality_of_ids()[[3, 4, 5, 6]].tolist() == [1, 1, 2, 2]
    assert own.modality_of_ids(markers="text")[[3, 4, 5, 6]].tolist() == [0] * 4
    model = build(own)
    assert model.model.modality_ids_of(torch.tensor([[3, 20, 4, 8]])).tolist() == [[1, 1, 1, 0]]


def test_placeholders_of_continuous_modalities_are_theirs():
    config = DECLARATIONS["transfusion"]
    assert config.modality_of_ids().tolist() == [1 if i == 7 else 0 for i in range(20)]


def test_a_range_with_a_start_of_its_own_cuts_into_the_one_before():
    """A published vocabulary's layout: image codes inside the text's range, and what follows continues after them."""
    inside = IMAGE.replace(vocab_start=8, vocab_size=4)
    config = OmniMoeConfig(hidden_size=16, modalities=(TEXT, inside, SPEECH), attention=Attention.Config(num_heads=4))
    assert config.modality_of_ids().tolist() == [0] * 8 + [1] * 4 + [2] * 8
    assert {name: (held.start, held.stop) for name, held in config.token_ranges.items()} == {
        "text": (0, 20),
        "image": (8, 12),
        "speech": (12, 20),
    }
    assert config.vocab_size == 20
    far = DENSE.replace(modalities=(TEXT, IMAGE.replace(vocab_start=100)))
    assert far.vocab_size == 112
    assert far.modality_of_ids()[[20, 99, 100, 111]].tolist() == [0, 0, 1, 1]


BAD = {
    "no modality": ({"modalities": ()}, "at least one modality"),
    "two of a name": ({"modalities": (TEXT, TEXT)}, "each its own name"),
    "unknown mask": ({"mask": "causl"}, "unknown mask rule 'causl'; did you mean 'causal'"),
    "unknown placement": ({"norm_placement": "middle"}, "unknown norm_placement 'middle'; known: pre, post"),
    "unknown markers": ({"markers": "both"}, "markers must be 'text', 'own' or 'key', got 'both'"),
    "unknown block": ({"bidirectional_modalities": ("video",)}, "bidirectional_modalities names ['video']"),
    "attention of another kind": (
        {"attention": FeedForward.Config()},
        "OmniMoeConfig.attention must be BaseAttention.Config, got a FeedForward.Config",
    ),
    "a modality of another kind": ({"modalities": (Norm.Config(),)}, "OmniMoeConfig.modalities must be"),
    "width as text": ({"hidden_size": "64"}, "OmniMoeConfig.hidden_size must be int, got '64'"),
    "a range beyond the layers": ({"layers": (LayerRange(start=2),)}, "starts at 2, but the model has 2 layers"),
    "a range's placement": ({"layers": (LayerRange(norm_placement="mid"),)}, "unknown norm_placement 'mid'"),
    "no width": ({"hidden_size": 0}, "hidden_size 0"),
    "negative layers": ({"num_layers": -1}, "num_layers -1"),
    "a marker outside": (
        {"modalities": (TEXT, IMAGE.replace(begin_id=99))},
        "begin_id 99 of modality 'image' is outside",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case):
    changes, message = BAD[case]
    with pytest.raises(ConfigError) as caught:
        DENSE.replace(**changes)
    assert message in str(caught.value)


BUILT = {
    "short tower map": ({"attention": Attention.Config(num_heads=4, towers=(0, 1))}, "has 2 entries for 3 keys"),
    "unused copy": ({"experts": FeedForward.Config(towers=(0, 2, 2))}, "must use every copy from 0 to 2"),
    "negative copy": ({"norm": Norm.Config(towers=(0, -1, 1))}, "must use every copy"),
    "unknown word": ({"norm": Norm.Config(towers="modal")}, "unknown tower map 'modal'; write 'shared'"),
    "short site map": ({"attention": Attention.Config(num_heads=4, site_towers={"q_proj": (0, 1)})}, "2 entries for 3"),
    "heads": ({"attention": Attention.Config(num_heads=3)}, "hidden_size 16 must be a multiple of num_heads 3"),
    "odd heads": ({"attention": Attention.Config(num_heads=4, head_dim=3)}, "head_dim must be even, got 3"),
    "sections": ({"attention": Attention.Config(num_heads=4, rope=Rope.Config(sections=(1, 2)))}, "must sum to half"),
    "too many choices": ({"experts": routed(2, TopKRouter.Config(top_k=3))}, "top_k 3 exceeds the 2 experts"),
    "groups": ({"experts": routed(4, ByModalityRouter.Config(experts=(2, 2)))}, "each of 3 modalities"),
    "group sum": ({"experts": routed(4, ByModalityRouter.Config(experts=(2, 2, 2)))}, "sum to the bank's 4"),
    "empty group": ({"experts": routed(4, ByModalityRouter.Config(experts=(2, 2, 0)))}, "at least one expert"),
    "static": ({"experts": routed(2, StaticRouter.Config())}, "must name one of 2 experts for each of 3 keys"),
}


def run(config: OmniMoeConfig) -> None:
    """Builds the model and its rotary table, which is made at the first forward."""
    build(config)(torch.tensor([[8, 9]]))


@pytest.mark.parametrize("case", BUILT)
def test_parts_that_do_not_fit_are_refused_when_the_model_is_built(case):
    changes, message = BUILT[case]
    with pytest.raises(ConfigError) as caught:
        run(DENSE.replace(**changes))
    assert message in str(caught.value)


FIELDS = {
    "qk norm": (
        lambda: Attention.Config(qk_norm="batch"),
        "unknown qk_norm 'batch'; known: none, rms, rms_joint, layer",
    ),
    "kv heads": (lambda: Attention.Config(num_heads=4, num_kv_heads=3), "must be a multiple of num_kv_heads 3"),
    "no heads": (lambda: Attention.Config(num_heads=0), "num_heads must be at least 1, got 0"),
    "no kv heads": (lambda: Attention.Config(num_kv_heads=0), "num_kv_heads must be at least 1, got 0"),
    "no head": (lambda: Attention.Config(head_dim=-8), "head_dim must be at least 1, got -8"),
    "heads as text": (lambda: Attention.Config(num_heads="8"), "Attention.Config.num_heads must be int, got '8'"),
    "width": (lambda: FeedForward.Config(intermediate_size=0), "intermediate_size must be at least 1, got 0"),
    "activation": (lambda: FeedForward.Config(activation="silly"), "unknown activation 'silly'; known: silu"),
    "expert width": (lambda: RoutedExperts.Config(intermediate_size=-4), "intermediate_size must be at least 1"),
    "expert activation": (lambda: RoutedExperts.Config(activation="silly"), "unknown activation 'silly'"),
    "shared experts": (lambda: RoutedExperts.Config(num_shared_experts=-1), "num_shared_experts must be at least 0"),
    "router of another kind": (lambda: RoutedExperts.Config(router=Norm.Config()), "router must be Router.Config"),
    "negative start": (lambda: LayerRange(start=-1), "from start -1 to stop None by step 1 holds no layer"),
    "no step": (lambda: LayerRange(step=0), "by step 0 holds no layer"),
    "empty range": (lambda: LayerRange(start=3, stop=3), "from start 3 to stop 3"),
    "site": (lambda: Attention.Config(site_towers={"w_proj": "shared"}), "unknown sites ['w_proj']"),
    "score": (lambda: TopKRouter.Config(score="relu"), "unknown score 'relu'; known: softmax, sigmoid"),
    "top k": (lambda: TopKRouter.Config(top_k=0), "top_k must be at least 1, got 0"),
    "choice score": (lambda: ExpertChoiceRouter.Config(score="relu"), "unknown score 'relu'"),
    "capacity": (lambda: ExpertChoiceRouter.Config(capacity_factor=0), "at least 0.0001, and finite, got 0"),
    "experts": (lambda: routed(0, TopKRouter.Config()), "num_experts must be at least 1, got 0"),
    "soft experts": (lambda: SoftRouter.Config(experts=(2, 0)), "(2, 0) must give each key at least one expert"),
    "slots": (lambda: SoftRouter.Config(num_slots=0), "num_slots must be at least 1, got 0"),
    "routed sites": (lambda: RoutedAttention.Config(routed_sites=("q",)), "must name some of q_proj, k_proj, v_proj"),
    "a routed site twice": (
        lambda: RoutedAttention.Config(routed_sites=("q_proj", "q_proj")),
        "each once, got ('q_proj', 'q_proj')",
    ),
    "a site twice": (
        lambda: RoutedAttention.Config(site_towers={"q_proj": "modality"}),
        "q_proj is routed and has a tower map in site_towers; drop one",
    ),
    "own heads' sites": (
        lambda: RoutedAttention.Config(own_heads=True, routed_sites=("v_proj",)),
        "is ('q_proj', 'o_proj') or empty, got ('v_proj',)",
    ),
    "attention's shared gate": (
        lambda: RoutedAttention.Config(shared_gate="sigmoid"),
        "shared_gate 'sigmoid' gates nothing; set num_shared_experts",
    ),
    "attention's zero experts": (
        lambda: RoutedAttention.Config(num_zero_experts=1, router=ExpertChoiceRouter.Config()),
        "ExpertChoiceRouter.Config chooses among the experts of the bank alone",
    ),
    "own heads' norm": (
        lambda: RoutedAttention.Config(own_heads=True, routed_sites=("q_proj", "o_proj"), qk_norm="layer"),
        "take 'rms' or 'none'",
    ),
    "own heads of mixtures": (
        lambda: RoutedAttention.Config(own_heads=True, routed_sites=("q_proj", "o_proj"), router=SoftRouter.Config()),
        "SoftRouter.Config mixes rows; leave own_heads out",
    ),
    "width of attributes": (lambda: AttributeRouter.Config(top_k=1, width=0), "width must be at least 1, got 0"),
    "vocabulary": (lambda: Tokens.Config(name="text"), "modality 'text' needs a vocab_size of at least 1, got 0"),
    "objective": (lambda: Patches.Config(name="x", objective="gan"), "unknown objective 'gan'; known: flow, ddpm"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_part_refuses_its_own_bad_values(case):
    make, message = FIELDS[case]
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_names_that_transformers_reads_are_there():
    config = DECLARATIONS["dense"]
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        2,
        4,
        2,
        4,
    )
    assert config.get_text_config() is config
    assert config.num_keys == 3
    assert DENSE.replace(keys=("und", "gen")).num_keys == 2


def test_a_slip_of_the_pen_is_no_attribute_of_its_own():
    with pytest.raises(ConfigError, match="has no field 'hiden_size'; did you mean 'hidden_size'"):
        OmniMoeConfig(hiden_size=3)
    assert OmniMoeConfig(num_hidden_layers=3).num_layers == 3
    with pytest.raises(
        ConfigError, match=r"no field 'num_heads'; it belongs to attention: write attention=Attention.C"
    ):
        OmniMoeConfig(num_heads=3)
    with pytest.raises(ConfigError, match="no field 'foo_bar'; set attributes of your own"):
        OmniMoeConfig(foo_bar=3)
    with pytest.raises(ConfigError, match="no field 'num_attention_heads'"):
        OmniMoeConfig(num_attention_heads=3)
    taken = OmniMoeConfig(architectures=["OmniMoeForCausalLM"], dtype="bfloat16", attn_implementation="eager")
    assert (taken.dtype, taken._attn_implementation) == (torch.bfloat16, "eager")


def test_notes_of_other_tools_survive_a_file_and_slips_in_it_are_refused(tmp_path):
    config = OmniMoeConfig()
    config.my_note = "kept"
    config.save_pretrained(tmp_path)
    assert OmniMoeConfig.from_pretrained(tmp_path).my_note == "kept"
    again, unused = OmniMoeConfig.from_pretrained(tmp_path, return_unused_kwargs=True, nothing=1)
    assert (again.my_note, unused) == ("kept", {"nothing": 1})
    with pytest.raises(ConfigError, match="no field 'hiden_size'; did you mean 'hidden_size'"):
        OmniMoeConfig.from_dict({**config.to_dict(), "hiden_size": 3})


def test_values_of_a_wrong_type_in_a_file_are_refused():
    plain = DENSE.to_dict()
    with pytest.raises(ConfigError, match="OmniMoeConfig.hidden_size must be int, got '64'"):
        OmniMoeConfig.from_dict({**plain, "hidden_size": "64"})
    with pytest.raises(ConfigError, match="Attention.Config.num_heads must be int, got '8'"):
        OmniMoeConfig.from_dict({**plain, "attention": {"type": "attention", "num_heads": "8"}})
    with pytest.raises(ConfigError, match="modalities must be a tuple of Modality.Config, got 'text'"):
        OmniMoeConfig.from_dict({**plain, "modalities": "text"})


@pytest.mark.parametrize("held", [3, None, "norm", {"norm": 1}, ["norm", 3]], ids=str)
@pytest.mark.parametrize("name", ["absent", "kept", "repeated"])
def test_what_a_converted_checkpoint_remembers_are_lists_of_names(name, held):
    plain = DENSE.to_dict()
    with pytest.raises(ConfigError) as caught:
        OmniMoeConfig.from_dict({**plain, "published": {name: held}})
    assert f"published['{name}'] must be a list of names, got {held!r}; leave it out" in str(caught.value)
    assert OmniMoeConfig.from_dict({**plain, "published": {name: ["norm"]}}).published == {name: ["norm"]}


@pytest.mark.parametrize(("name", "held"), [("family", 3), ("files", 3), ("files", ["config.json"])])
def test_the_family_and_files_it_remembers_are_a_name_and_a_mapping(name, held):
    with pytest.raises(ConfigError) as caught:
        OmniMoeConfig.from_dict({**DENSE.to_dict(), "published": {name: held}})
    assert f"published['{name}'] must be " in str(caught.value)
    assert f"got {held!r}" in str(caught.value)
