"""Reads the imports of every module and holds them to the order of the tiers; nothing is imported here."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a part may import, besides itself and whatever those may import. A new module needs a line here.
IMPORTS: dict[str, tuple[str, ...]] = {
    "lazy": (),
    "auto": (),
    "plugins": (),
    "installation": (),
    "registry": ("plugins",),
    "config": ("registry",),
    "ops": (),
    "layers": ("ops", "config"),
    "routers": ("layers",),
    "experts": ("routers",),
    "tokenizers": ("config",),
    "encoders": ("ops", "tokenizers"),
    "connectors": ("config",),
    "modalities": ("layers", "encoders", "connectors"),
    "data": ("tokenizers", "modalities", "lazy"),
    "backbone": ("experts",),
    "attend": ("layers",),
    "recompute": (),
    "model_config": ("backbone", "modalities"),
    "inputs": ("model_config",),
    "spans": ("model_config",),
    "blocks": ("model_config",),
    "grids": ("inputs",),
    "scoring": ("inputs", "modalities", "routers"),
    "experts_interface": ("layers",),
    "quantize": ("routers",),
    "parallel": ("ops",),
    "bars": (),
    "flops": ("model_config",),
    "model_card": ("flops",),
    "publish": (),
    "checkpoint": ("bars", "publish"),
    "upload": ("checkpoint", "model_card"),
    "adapters": ("checkpoint",),
    "guarded": ("adapters", "bars", "checkpoint", "quantize", "upload"),
    "outputs": ("model_config",),
    "encode": ("inputs",),
    "aligned": ("encode",),
    "steps": ("blocks", "grids", "inputs", "spans"),
    "pretrained": ("attend", "encode", "experts_interface", "guarded", "parallel", "recompute"),
    "model": ("aligned", "blocks", "inputs", "outputs", "pretrained", "scoring", "steps"),
    "classifier": ("model",),
    "stages": ("model",),
    "shrink": ("model", "encoders"),
    "export": ("model",),
    "closest": ("checkpoint", "model"),
    "convert": ("checkpoint", "model", "model_card", "publish"),
    "zoo": ("model", "tokenizers", "convert"),
    "towers": ("checkpoint", "model"),
    "catalogue": ("checkpoint", "convert", "flops", "model", "zoo"),
    "hub": ("catalogue", "classifier", "towers", "flops", "closest", "checkpoint", "convert", "zoo"),
    "conversion": ("hub",),
    "freeze": ("towers",),
    "auxiliary": ("freeze",),
    "upcycle": ("hub", "freeze", "spans", "tokenizers"),
    "lora": ("hub",),
    "guidance": ("inputs",),
    "layouts": ("blocks", "encoders", "inputs"),
    "denoise": ("blocks", "guidance", "layouts", "model"),
    "joint_denoise": ("inputs", "model"),
    "plots": ("model",),
    "routing_trace": ("plots",),
    "routing_load": ("routing_trace",),
    "report": ("config",),
    "generation": ("hub", "data", "denoise", "plots", "report"),
    "pipelines": ("convert", "denoise", "generation", "hub", "joint_denoise"),
    "generate": ("generation",),
    "demo": ("generate",),
    "preview": ("generation",),
    "train": ("hub", "data", "auxiliary", "lazy", "flops", "routing_trace"),
    "evaluate": ("train", "generate", "plots", "report"),
    "compare": ("train", "generate", "plots"),
    "bench": ("plots",),
    "lm_eval": ("generation",),
    "doctor": ("hub", "installation", "plugins"),
    "quickstart": ("compare",),
    "commands": (
        "quickstart",
        "pipelines",
        "report",
        "demo",
        "preview",
        "routing_load",
        "evaluate",
        "bench",
        "doctor",
        "conversion",
        "upcycle",
        "lora",
    ),
    "cli": ("commands",),
    "__main__": ("cli",),
}

# Parts that are plain PyTorch; transformers enters at the model. The adapters among our tokenizers import it in
# functions, which tests/tokenizers/test_base.py holds them to.
WITHOUT_TRANSFORMERS = {
    *(
        "registry",
        "config",
        "ops",
        "layers",
        "routers",
        "experts",
        "modalities",
        "data",
        "backbone",
        "attend",
    ),
}

# `from omnimoe import name` reads names up to those of the model, so it is open to the parts that may import the model.
PUBLIC_NAMES_FROM = "model"

PACKAGES = sorted((ROOT / "omnimoe").rglob("__init__.py"))


@functools.cache
def reachable(part: str) -> frozenset[str]:
    return frozenset({part}.union(*(reachable(other) for other in IMPORTS[part])))


def modules() -> list[Path]:
    found = [path for top in ("omnimoe", "zoo") for path in (ROOT / top).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def module_name(path: Path) -> tuple[str, ...]:
    names = path.with_suffix("").parts
    names = ("omnimoe", *names) if names[0] == "zoo" else names
    return names[:-1] if names[-1] == "__init__" else names


def imports(source: str, module: tuple[str, ...], *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, in functions too; for type checkers alone does not count.

    ``from a import b`` gives ``a.b``, since ``b`` may be a module.
    """
    package = module if is_package else module[:-1]
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((node.lineno, ".".join((*base, alias.name))) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def complaints(path: Path, source: str) -> list[str]:
    module = module_name(path)
    part = module[1] if len(module) > 1 else None
    if part is None:
        return []
    if part not in IMPORTS:
        return [f"{path}: omnimoe.{part} has no tier; give it a line in {Path(__file__).name}"]
    found = []
    for line, name in imports(source, module, is_package=path.name == "__init__.py"):
        top, _, rest = name.partition(".")
        if top == "zoo":
            found.append(f"{path}:{line} imports {name}; the package is installed as omnimoe.zoo")
        elif top == "transformers" and part in WITHOUT_TRANSFORMERS:
            found.append(f"{path}:{line} imports transformers, which enters at the model tier")
        elif top == "omnimoe":
            other = rest.partition(".")[0]
            if other in IMPORTS and other not in reachable(part):
                found.append(f"{path}:{line} imports omnimoe.{other}; {part} may import {', '.join(allowed(part))}")
            elif other not in IMPORTS and PUBLIC_NAMES_FROM not in reachable(part) - {part}:
                found.append(f"{path}:{line} imports {name} from the package; name the module that defines it")
    return found


def allowed(part: str) -> list[str]:
    return [other for other in IMPORTS if other in reachable(part) - {part}] or ["nothing of omnimoe"]


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_come_from_tiers_above(path):
    assert complaints(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("omnimoe/ops/rope/__init__.py", "import omnimoe.layers.bank", "ops may import nothing of omnimoe"),
        ("omnimoe/ops/rope/__init__.py", "from omnimoe.config import Config", "imports omnimoe.config"),
        ("omnimoe/ops/rope/__init__.py", "from ..permute import permute", None),
        ("omnimoe/layers/bank.py", "from ..routers import base", "imports omnimoe.routers"),
        ("omnimoe/layers/bank.py", "from omnimoe.ops import grouped_mm", None),
        ("omnimoe/layers/bank.py", "def f():\n    from omnimoe import model", ":2 imports omnimoe.model"),
        ("omnimoe/layers/bank.py", "from omnimoe import OmniMoeConfig", "name the module that defines it"),
        (
            "omnimoe/layers/bank.py",
            "if TYPE_CHECKING:\n    import omnimoe.model\nelse:\n    import omnimoe.hub",
            ":4 imports",
        ),
        ("omnimoe/layers/bank.py", "import typing\nif typing.TYPE_CHECKING:\n    import transformers", None),
        ("omnimoe/layers/bank.py", "from transformers.cache_utils import Cache", "enters at the model tier"),
        ("omnimoe/modalities/tokens.py", "from omnimoe.experts.base import Experts", "imports omnimoe.experts"),
        ("omnimoe/tokenizers/text.py", "from tokenizers import Tokenizer", None),
        ("omnimoe/backbone.py", "from omnimoe.modalities import base", "imports omnimoe.modalities"),
        ("omnimoe/model.py", "import transformers\nfrom omnimoe.backbone import Block", None),
        ("omnimoe/model.py", "from omnimoe.hub import load", "imports omnimoe.hub"),
        ("zoo/mot/__init__.py", "from omnimoe import OmniMoeConfig, register_model", None),
        ("zoo/mot/__init__.py", "from ..moma import moma_base", None),
        ("zoo/mot/__init__.py", "from omnimoe.hub import load", "imports omnimoe.hub"),
        ("zoo/mot/__init__.py", "from zoo.moma import moma_base", "installed as omnimoe.zoo"),
        ("omnimoe/cli.py", "from omnimoe.train.loop import train", None),
        ("omnimoe/novelty.py", "", "has no tier"),
        ("omnimoe/__init__.py", "from omnimoe.cli import main", None),
    ],
)
def test_the_reading_of_imports(path, source, complaint):
    found = complaints(Path(path), source)
    assert bool(found) == (complaint is not None), found
    assert complaint is None or complaint in found[0]


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_takes_the_name_of_a_library_its_package_imports(path):
    """Importing ``op.torch`` sets ``torch`` in the namespace of ``op``, where the library was a moment ago."""
    siblings = {file.stem for file in path.parent.glob("*.py")}
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
    bound = {alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names}
    assert siblings & bound == set(), "rename the module"


def test_the_table_is_in_order():
    seen: set[str] = set()
    for part, others in IMPORTS.items():
        assert seen.issuperset(others), f"{part} imports from below: {set(others) - seen}"
        seen.add(part)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git repository, or no git")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_a_build_machine_is_named():
    # Put together from pieces, so that this file does not name one itself.
    folders = "|".join(("work", "root", "home", "Users", "farm", "opt/" + "omni", "tmp/" + "briefs"))
    pattern = re.compile(rf"(?<![\w.\-~:/])/(?:{folders})/[\w.]".encode())
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{path.relative_to(ROOT)}: {match.group().decode()}..." for match in pattern.finditer(content)]
    assert found == []
