"""Models by name and models from files: what is found, what is refused, and what is left as it was."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimoe import (
    CheckpointError,
    ConfigError,
    ModelInfo,
    OmniMoeConfig,
    OmniMoeForCausalLM,
    add_model_config,
    from_pretrained,
    hub,
    list_models,
    load,
    model_info,
    register_model,
    shrink,
)
from omnimoe.model import MODELS
from omnimoe.plugins import PLUGINS
from omnimoe.registry import RegistryError
from tests.children import capped
from tests.refusals import unchanged

ROOT = Path(__file__).parents[1]


def tiny() -> OmniMoeConfig:
    return shrink(MODELS.get("mot_nano")())


@pytest.fixture
def saved(tmp_path) -> Path:
    OmniMoeForCausalLM(tiny()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def own_model():
    @register_model("own_model")
    def own_model() -> OmniMoeConfig:
        """A model of a test."""
        return tiny()

    yield "own_model"
    MODELS.remove("own_model")


def edit(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestLoad:
    def test_fresh_weights(self):
        model = load("dense_nano")
        assert isinstance(model, OmniMoeForCausalLM)
        assert model.training
        assert model.dtype == torch.float32
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_without_memory(self):
        model = load("mot_7b", device="meta")
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype(self, dtype):
        model = load("dense_nano", num_layers=1, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert torch.get_default_dtype() == torch.float32

    def test_seed(self):
        before = torch.get_rng_state()
        first, second, third = (load("dense_nano", num_layers=1, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
        assert all(map(torch.equal, first.parameters(), second.parameters()))
        assert not torch.equal(first.lm_head.weight, third.lm_head.weight)

    def test_without_a_seed_the_global_generator_decides(self):
        torch.manual_seed(3)
        first = load("dense_nano", num_layers=1)
        torch.manual_seed(3)
        assert torch.equal(first.lm_head.weight, load("dense_nano", num_layers=1).lm_head.weight)

    def test_overrides(self):
        model = load("mot_37m", device="meta", num_layers=2, hidden_size=128)
        assert (model.config.num_layers, model.config.hidden_size) == (2, 128)
        assert MODELS.get("mot_37m")().num_layers == 4

    def test_attention_implementation(self):
        model = load("dense_nano", num_layers=1, attn_implementation="eager")
        assert model(torch.ones(1, 4, dtype=torch.long), output_attentions=True).attentions[0].shape == (1, 6, 4, 4)

    def test_a_wrong_override_names_the_nearest_field(self):
        with pytest.raises(ConfigError, match="has no field 'num_layer'; did you mean 'num_layers'"):
            load("mot_37m", num_layer=2)

    @pytest.mark.parametrize("name", ["mot37m", "mot_37M"])
    def test_an_unknown_name_suggests_the_nearest(self, name):
        with pytest.raises(RegistryError, match="did you mean 'mot_37m'"):
            load(name)

    @pytest.mark.parametrize("form", [str, "local-dir:{}".format])
    def test_an_address_gives_its_config_or_its_weights(self, saved, form):
        fresh, kept = load(form(saved), seed=1, num_layers=1), load(form(saved), pretrained=True)
        held = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(kept.lm_head.weight, held)
        assert (fresh.training, fresh.config.num_layers, fresh.config.hidden_size) == (True, 1, tiny().hidden_size)
        assert not torch.equal(fresh.lm_head.weight, held)

    def test_an_address_that_is_not_there(self):
        with pytest.raises(CheckpointError, match="there is no folder 'model'"):
            load("local-dir:model")

    def test_an_unknown_dtype(self):
        with pytest.raises(ValueError, match="unknown dtype 'int8'; write 'float32'"):
            load("dense_nano", dtype="int8")

    def test_no_weights(self):
        for name in ("gpt_oss_20b", "gpt_oss_120b", "deepseek_v3"):
            with pytest.raises(ValueError, match=rf"{name}' are fetched: its official files.*copy in bfloat16"):
                load(name, pretrained=True)
        with pytest.raises(ValueError, match="there are no weights for 'mot_7b'; weights exist for: "):
            load("mot_7b", pretrained=True)


class TestPretrained:
    @pytest.fixture
    def with_weights(self, own_model, saved, monkeypatch):
        from omnimoe.zoo.card import Card

        card = Card(family="own", title="", paper="https://example.org", weights={own_model: str(saved)})
        monkeypatch.setattr(sys.modules[__name__], "CARD", card, raising=False)
        return own_model

    def test_weights_of_a_card(self, with_weights, saved):
        model = load(with_weights, pretrained=True, dtype="bfloat16")
        assert not model.training
        held = load_file(saved / "model.safetensors")["model.norm.weight"]
        assert torch.equal(model.model.norm.weight, held.bfloat16())

    def test_it_is_listed_and_named(self, with_weights):
        assert with_weights in list_models(pretrained=True)
        assert model_info(with_weights).pretrained.startswith("local-dir:")
        with pytest.raises(ValueError, match=r"weights exist for: .*own_model"):
            load("mot_7b", pretrained=True)

    @pytest.mark.parametrize("given", [{"num_layers": 1}, {"seed": 0}])
    def test_published_weights_fit_one_config(self, with_weights, given):
        with pytest.raises(ValueError, match=f"so {next(iter(given))} cannot be set"):
            load(with_weights, pretrained=True, **given)


class TestFromPretrained:
    @pytest.mark.parametrize("form", [str, Path, "local-dir:{}".format])
    def test_a_folder(self, saved, form):
        model = from_pretrained(form(saved))
        assert not model.training
        held = load_file(saved / "model.safetensors")
        assert all(torch.equal(tensor, held[key]) for key, tensor in model.state_dict().items() if key in held)

    def test_in_shards(self, tmp_path):
        model = OmniMoeForCausalLM(tiny())
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        again = from_pretrained(tmp_path)
        assert all(map(torch.equal, again.parameters(), model.parameters()))

    def test_to_a_device_and_a_dtype(self, saved):
        model = from_pretrained(saved, device="cpu", dtype=torch.float16, attn_implementation="eager")
        assert model.dtype == torch.float16
        assert model.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="pass one of them"):
            from_pretrained(saved, device="cpu", device_map="auto")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    @pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0"), "no_such"])
    def test_a_device_that_is_not_here_is_no_fault_of_the_file(self, saved, device):
        for name in ("device", "device_map"):
            with pytest.raises(ValueError, match=r"device '(cuda|cuda:0|no_such)' cannot be used here") as caught:
                from_pretrained(saved, **{name: device})
            assert not isinstance(caught.value, CheckpointError)

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("lost", 1)])
    def test_trouble_of_the_device_is_no_fault_of_the_file(self, saved, monkeypatch, error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(OmniMoeForCausalLM, "from_pretrained", fail)
        with pytest.raises(type(error)) as caught:
            from_pretrained(saved)
        assert caught.value is error

    def test_every_misfit_in_one_report(self, saved):
        def change(weights):
            del weights["model.backbone.layers.0.mlp.experts.down_proj"]
            del weights["model.backbone.layers.1.mlp.experts.down_proj"]
            weights["model.backbone.layers.0.mlp.router.weight"] = torch.zeros(3)
            weights["model.norm.weight"] = torch.zeros(1, 7)

        edit(saved, change)
        with pytest.raises(CheckpointError) as error:
            from_pretrained(saved)
        for line in (
            "2 missing:\n  model.backbone.layers.{0-1}.mlp.experts.down_proj (2 times)",
            "1 unexpected:\n  model.backbone.layers.0.mlp.router.weight",
            "1 misshapen:\n  model.norm.weight: (1, 7) in the file, (1, 64) in the model",
            "strict=False",
        ):
            assert line in str(error.value)

    def test_the_rest_can_be_loaded(self, saved, caplog):
        edit(saved, lambda weights: weights.pop("model.norm.weight"))
        with caplog.at_level(logging.WARNING, logger="omnimoe.hub"):
            model = from_pretrained(saved, strict=False)
        assert "model.norm.weight" in caplog.text
        assert torch.equal(model.model.norm.weight, torch.ones(1, 64))

    def test_no_config(self, saved):
        (saved / "config.json").unlink()
        with pytest.raises(CheckpointError, match="has no config.json"):
            from_pretrained(saved)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", "must hold a JSON object, not list"),
            ("{}", "holds a model of type None, not 'omnimoe'"),
            ('{"model_type": "flamingo"}', "holds a model of type 'flamingo', not 'omnimoe'"),
            ('{"model_type": "omnimoe", "norm_placement": "sideways"}', "unknown norm_placement 'sideways'"),
        ],
    )
    def test_a_wrong_config(self, saved, text, message):
        (saved / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(saved)

    @pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64])
    def test_unreadable_weights(self, saved, content):
        (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="model.safetensors (has|would have)"):
            from_pretrained(saved)

    def test_pickles_are_not_opened(self, saved):
        (saved / "model.safetensors").unlink()
        (saved / "pytorch_model.bin").write_bytes(b"not opened")
        with pytest.raises(CheckpointError, match=r"only pytorch_model.bin, which can run code"):
            from_pretrained(saved)

    @pytest.mark.parametrize(
        "shard", ["../model.safetensors", "/model.safetensors", "a\\b.safetensors", "model.bin", ".safetensors"]
    )
    def test_an_index_stays_in_its_folder(self, saved, shard):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"key": shard}}))
        with pytest.raises(CheckpointError, match="a shard is a .safetensors file in the same folder"):
            from_pretrained(saved)

    def test_a_part_that_nobody_registered(self, saved):
        plain = json.loads((saved / "config.json").read_text())
        plain["experts"]["type"] = "no_such_part"
        (saved / "config.json").write_text(json.dumps(plain))
        with pytest.raises(CheckpointError, match="unknown experts 'no_such_part'"):
            from_pretrained(saved)

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"key": 1}}])
    def test_a_malformed_index(self, saved, index):
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="has no weight_map"):
            from_pretrained(saved)

    def test_a_missing_shard(self, saved):
        index = {"weight_map": {"model.norm.weight": "model-00002.safetensors"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        (saved / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002.safetensors is missing; it holds 1 weight: norm"):
            from_pretrained(saved)

    def test_a_registered_name_is_no_address(self):
        with pytest.raises(CheckpointError, match=r"call load\('mot_37m'\)"):
            from_pretrained("mot_37m")

    def test_a_folder_of_a_registered_name_is_read_and_told(self, saved, monkeypatch, caplog):
        monkeypatch.chdir(saved.rename(saved.with_name("mot_37m")).parent)
        with caplog.at_level(logging.WARNING, logger="omnimoe.hub"):
            assert from_pretrained("mot_37m").config.hidden_size == tiny().hidden_size
        assert "'mot_37m' is a folder here and a registered model: the folder is read" in caplog.text

    @pytest.mark.parametrize(
        ("source", "message"),
        [("mot_37", "did you mean 'mot_37m'"), ("a/b/c", "neither"), ("local-dir:no", "no folder")],
    )
    def test_neither_a_folder_nor_an_id(self, source, message):
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(source)

    @pytest.mark.parametrize("source", ["no-such-org/no-such-model", "hf-hub:no-such-org/no-such-model"])
    def test_the_hub_without_network(self, source, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(CheckpointError, match="'no-such-org/no-such-model' is not in the cache"):
            from_pretrained(source, local_files_only=True)

    def test_no_code_of_a_checkpoint_runs(self, saved):
        canary = saved / "ran"
        (saved / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
        plain = json.loads((saved / "config.json").read_text())
        plain["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Model"}
        (saved / "config.json").write_text(json.dumps(plain))
        from_pretrained(saved)
        assert not canary.exists()


SPLIT = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from omnimoe import from_pretrained
whole, ids = from_pretrained(sys.argv[1]), torch.arange(20, 32).view(2, 6)
split, report = from_pretrained(
    sys.argv[1], distributed_config=DistributedConfig(tp_size=2), output_loading_info=True
)
assert isinstance(split.model.backbone.layers[0].self_attn.q_proj.weight, DTensor)
assert not any(report.values()), report
torch.testing.assert_close(split(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-4)
"""


class TestArgumentsOfTransformers:
    def test_the_report(self, saved):
        model, report = from_pretrained(saved, output_loading_info=True)
        assert isinstance(model, OmniMoeForCausalLM)
        assert {name: report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
            name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        assert not any(from_pretrained(saved, towers=["text"], output_loading_info=True)[1].values())
        assert not any(load(saved, pretrained=True, output_loading_info=True)[1].values())

    @pytest.mark.parametrize("lenient", ["strict", "ignore_mismatched_sizes"])
    def test_the_report_of_what_does_not_fit(self, saved, lenient):
        edit(saved, lambda weights: weights.update({"model.extra": torch.ones(1)}))
        edit(saved, lambda weights: weights.pop("model.norm.weight"))
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            from_pretrained(saved, output_loading_info=True)
        given = {lenient: lenient != "strict"}
        _, report = from_pretrained(saved, output_loading_info=True, **given)
        assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == ({"model.norm.weight"}, {"model.extra"})

    def test_of_a_published_checkpoint(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
        model, report = from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, OmniMoeForCausalLM)
        assert not any(report.values())
        with pytest.raises(ValueError, match="is logged; leave output_loading_info or strict out"):
            from_pretrained(tmp_path, output_loading_info=True, strict=False)
        for name, value in (("num_labels", 2), ("quantization_config", "int8")):
            with pytest.raises(ValueError, match=f"{name} is for whole models of omnimoe"):
                from_pretrained(tmp_path, **{name: value})

    @pytest.mark.hazard(29)
    @capped(256 << 20)
    def test_trust_in_remote_code_runs_none(self, saved):
        canary = saved / "ran"
        (saved / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
        plain = json.loads((saved / "config.json").read_text())
        plain["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling.Model")
        (saved / "config.json").write_text(json.dumps(plain))
        with unchanged(saved):
            model = from_pretrained(saved, trust_remote_code=True)
        assert type(model) is OmniMoeForCausalLM
        assert not canary.exists()

    def test_one_process_is_not_several(self, saved):
        from transformers.distributed import DistributedConfig

        for given, message in (
            ({}, "distributed_config is for one process of several; start the program with torchrun"),
            ({"device": "cpu"}, "distributed_config says where the weights go; leave device and device_map out"),
        ):
            with pytest.raises(ValueError, match=message):
                from_pretrained(saved, distributed_config=DistributedConfig(tp_size=2), **given)

    @pytest.mark.slow
    @pytest.mark.ranks
    def test_a_model_on_two_processes(self, tmp_path):
        from tests.declarations import DENSE, build

        build(DENSE).save_pretrained(tmp_path / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        (tmp_path / "split.py").write_text(SPLIT)
        done = subprocess.run(
            [*command, str(tmp_path / "split.py"), str(tmp_path / "model")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]


class TestListing:
    def test_all(self):
        names = list_models()
        assert names == sorted(set(names))
        assert {"mot_37m", "moma_1_4b_4t4i", "moe_nano"} <= set(names)

    @pytest.mark.parametrize(
        ("given", "names"),
        [
            ({"filter": "mo??_micro"}, ["moma_micro"]),
            (
                {"filter": "micro", "exclude": ["omni*", "*mamba*", "mo*_*_micro", "mo*x_micro"]},
                ["dense_micro", "moe_micro", "moma_micro", "mot_micro"],
            ),
            ({"filter": "m??_nano"}, ["moe_nano", "mot_nano"]),
            (
                {"filter": "nano", "exclude": ["mo*", "*mamba*", "cosmos*", "x"]},
                ["dense_nano", "omni_nano", "omni_nano_dense"],
            ),
            ({"family": "transfusion", "exclude": "mot_*", "filter": "*b"}, ["transfusion_1_4b", "transfusion_7b"]),
            ({"modality": "speech", "family": "mot", "filter": "7b"}, ["mot_7b_speech"]),
            ({"modality": "smell"}, []),
            ({"family": "no"}, []),
        ],
    )
    def test_some(self, given, names):
        assert list_models(**given) == names

    def test_info(self):
        info = model_info("mot_7b")
        assert isinstance(info, ModelInfo)
        assert (info.name, info.family, info.modalities) == ("mot_7b", "mot", ("text", "image"))
        assert info.total_params > info.active_params == info.active_params_by_modality["image"]
        assert info.flops_per_token > 2 * (info.active_params - 65_536 * 4096)
        assert info.is_causal
        assert info.sequence_length == 4096
        assert info.pretrained is None
        assert info.license == "Apache-2.0"
        assert info.paper == "https://arxiv.org/abs/2411.04996"

    def test_info_of_an_own_model(self, own_model):
        info = model_info(own_model)
        assert (info.family, info.license, info.paper) == ("custom", "unknown", "")
        assert info.description == "A model of a test."
        assert own_model in list_models(family="custom")

    def test_info_where_a_part_does_not_say_what_it_costs(self, monkeypatch):
        monkeypatch.setattr(type(tiny().experts), "active_params", lambda self, hidden_size, modality: None)
        info = model_info("mot_nano")
        assert info.total_params > 0
        assert (info.active_params, info.active_params_by_modality, info.flops_per_token) == (None, None, None)

    def test_an_unknown_name(self):
        with pytest.raises(RegistryError, match="did you mean"):
            model_info("mot_8b")


class TestModelFromJSON:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "from_json.json"
        tiny().to_json_file(path)
        yield path
        if "from_json" in MODELS:
            MODELS.remove("from_json")

    def test_it_is_a_model_like_others(self, file):
        assert add_model_config(file) == "from_json"
        assert "from_json" in list_models(family="custom")
        assert load("from_json").config.to_dict()["experts"] == tiny().to_dict()["experts"]
        file.unlink()
        assert model_info("from_json").description == "Declared in from_json.json."

    def test_a_taken_name(self, file):
        add_model_config(file)
        with pytest.raises(RegistryError, match="already registered"):
            add_model_config(file)
        add_model_config(file, exist_ok=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "llama"}, "of type 'llama'"),
            ({"hidden_sise": 3}, "unknown fields: hidden_sise"),
            ({"mask": "causall"}, "did you mean 'causal'"),
        ],
    )
    def test_a_wrong_file(self, file, changes, message):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ConfigError, match=message):
            add_model_config(file)
        assert "from_json" not in MODELS

    def test_no_json(self, file):
        file.write_text("model")
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            add_model_config(file)

    def test_a_name_taken_from_the_file(self, file, tmp_path):
        with pytest.raises(RegistryError, match="lower-case"):
            add_model_config(file.rename(tmp_path / "My Model.json"))


class TestFirstUse:
    def test_plugins_are_imported_and_may_fail(self, monkeypatch, caplog):
        class Plugin:
            def __init__(self, name, action):
                self.name, self.value, self.load = name, f"{name}:module", action

        def fail():
            raise ImportError("its dependency is missing")

        ran = []
        plugins = [Plugin("broken", fail), Plugin("working", lambda: ran.append("working"))]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins if group == PLUGINS else [])
        with caplog.at_level(logging.WARNING, logger="omnimoe.plugins"):
            hub.load_zoo()
        assert ran == ["working"]
        assert "the plugin 'broken' (broken:module) failed to load" in caplog.text
        assert "its dependency is missing" in caplog.text

    def test_loading_twice_registers_once(self):
        before = list_models()
        hub.load_zoo()
        assert list_models() == before

    def test_a_checkout_that_is_not_installed(self):
        code = (
            "import sys\n"
            # An editable install answers for omnimoe.zoo; without its finder this is a bare checkout.
            "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "import omnimoe\n"
            "print('mot_37m' in omnimoe.list_models(), 'zoo' in sys.modules, sys.modules['omnimoe.zoo'].__name__)\n"
            "import omnimoe.zoo.mot; print(omnimoe.zoo.mot.mot_37m.__module__)"
        )
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
        )
        assert child.stdout.split() == ["True", "False", "omnimoe.zoo", "omnimoe.zoo.mot"]

    def test_the_folder_under_another_name_is_refused(self):
        child = subprocess.run(
            [sys.executable, "-c", "import zoo"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert child.returncode != 0
        assert "the package omnimoe.zoo" in child.stderr
