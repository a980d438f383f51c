"""What does not fit is refused in one sentence with what would, and the seed stays as it is."""

from __future__ import annotations

import pytest

from omnimoe import ConfigError, Tokens, load, upcycle
from omnimoe.routers import ByModalityRouter, SoftRouter, TopKRouter
from tests.declarations import build, routed
from tests.upcycle.seeds import seed_of

IMAGE = {"image": 12}
CASES = {
    "nothing": ("text", {}, "asked for nothing new"),
    "freeze alone": ("text", {"freeze": ["text"]}, "asked for nothing new"),
    "a modality that is there": ("dense", {"modalities": {"image": 3}}, "modality 'image' twice"),
    "a modality twice": (
        "text",
        {"modalities": [Tokens.Config(name="x", vocab_size=2), Tokens.Config(name="x", vocab_size=2)]},
        "modality 'x' twice",
    ),
    "no modality": ("text", {"modalities": "image"}, "modalities takes configs .* got 'image'"),
    "no codes": ("text", {"modalities": {"image": 0}}, "needs a vocab_size of at least 1"),
    "rows of its own": (
        "text",
        {"modalities": [Tokens.Config(name="x", vocab_size=2, vocab_start=3)]},
        "leave vocab_start out",
    ),
    "a map too short": ("text", {"modalities": IMAGE, "towers": (0,)}, r"\(0,\) has 1 entries for 2 keys"),
    "a map with a gap": ("text", {"modalities": IMAGE, "towers": (0, 2)}, "must use every copy"),
    "a word": ("text", {"modalities": IMAGE, "towers": "each"}, "unknown tower map 'each'"),
    "a site": (
        "text",
        {"modalities": IMAGE, "towers": {"ffn": "modality"}},
        "names site 'ffn'; the sites are attention",
    ),
    "joined towers": ("mot", {"towers": (0, 1, 1)}, "would merge copies of the seed that differ"),
    "sites of latent attention": (
        "deepseek_v3",
        {"modalities": IMAGE, "towers": {"q_proj": "modality"}},
        "LatentAttention.Config has no towers of that kind",
    ),
    "merged pools": ("mixtral", {"modalities": {"a": 2, "b": 2}, "towers": (0, 1, 1)}, "merges some"),
    "experts of an unknown": ("text", {"modalities": IMAGE, "experts": {"text": 2, "sound": 2}}, "unknown 'sound'"),
    "experts of one only": ("text", {"modalities": IMAGE, "experts": {"text": 2}}, "'image' has no number"),
    "experts in a word": ("text", {"experts": "4"}, "experts is a number, .* got '4'"),
    "no experts": ("text", {"experts": 0}, "at least one, got 0"),
    "fewer experts": ("mixtral", {"experts": 2}, "2 experts are fewer than the 4 of the seed"),
    "fewer in a group": ("moma_top_k", {"experts": {"text": 2, "image": 2, "speech": 1}}, "fewer than the 3"),
    "one pool for towers": ("mot", {"experts": 4}, "would merge networks of the seed"),
    "a router alone": ("text", {"router": TopKRouter.Config()}, "say how many"),
    "two routers": (
        "text",
        {"experts": routed(4, TopKRouter.Config()), "router": TopKRouter.Config()},
        "leave router out",
    ),
    "another width": (
        "text",
        {"experts": routed(4, TopKRouter.Config()).replace(intermediate_size=20)},
        r"gate_up_proj is to be \(4, 40, 16\), and the seed has \(4, 48, 16\)",
    ),
    "one network again": ("mixtral", {"experts": seed_of("text").config.experts}, "do not become one network"),
    "soft experts": (
        "text",
        {"experts": routed(4, SoftRouter.Config(experts=(4,))), "modalities": IMAGE},
        "must give each of 2 keys a number",
    ),
    "a group missing": (
        "text",
        {"modalities": IMAGE, "experts": 4, "router": ByModalityRouter.Config(experts=(4,))},
        "must give each of 2 modalities",
    ),
    "tied": ("text", {"modalities": IMAGE, "tie": True}, "head is not its embedding"),
    "a place": ("text", {"modalities": IMAGE, "markers": "middle"}, "'behind' or 'front', got 'middle'"),
    "an origin": ("text", {"modalities": IMAGE, "start_from": {"image": "sound"}}, "'image' starts as 'sound'"),
    "an origin of an old one": ("dense", {"modalities": {"v": 2}, "start_from": {"text": "image"}}, "new keys are v"),
    "other keys": ("mot", {"keys": ("und", "gen")}, "new keys must hold them all"),
    "a frozen stranger": ("text", {"modalities": IMAGE, "freeze": ["sound"]}, "takes names out of text, image"),
    "noise": ("text", {"modalities": IMAGE, "row_noise": -1.0}, "row_noise is a share"),
    "a field": ("text", {"modalities": IMAGE, "hiden_size": 3}, "did you mean 'hidden_size'"),
    "a size": ("text", {"modalities": IMAGE, "hidden_size": 32}, "stay as they are"),
    "layers": ("text", {"modalities": IMAGE, "attention": seed_of("dense").config.attention}, "leave it out"),
    "too many layers": ("text", {"modalities": IMAGE, "num_layers": 3}, "num_layers of the new model follows"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case):
    name, asked, told = CASES[case]
    with pytest.raises(ConfigError, match=told):
        upcycle(seed_of(name), **asked)


def test_what_is_no_seed():
    with pytest.raises(ConfigError, match="a seed is a model of omnimoe or where one lies, got dict"):
        upcycle({}, modalities=IMAGE)
    with pytest.raises(ValueError, match="there are no weights for 'dense_nano'"):
        upcycle("dense_nano", modalities={"video": 4})
    seed = seed_of("mot")
    config = seed.config.replace(experts=seed.config.experts.replace(intermediate_sizes=(24, 12, 24)))
    with pytest.raises(ConfigError, match="differ in width"):
        upcycle(build(config), modalities={"video": 3})


def test_a_quantised_seed():
    pytest.importorskip("torchao")
    from omnimoe import quantize

    seed = load("dense_nano", num_layers=1, seed=0)
    quantize(seed)
    with pytest.raises(ConfigError, match="is quantised; take the seed as it was"):
        upcycle(seed, modalities={"video": 3})
