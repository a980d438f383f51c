"""A model as a graph for other runtimes: ``torch.export`` and ONNX.

Grouped products are ops of our own, or of PyTorch but unknown to ONNX. So a model is exported over the plain definition
of every op, which any runtime has, at the price of memory: each row gathers the matrix that it meets. What is exported
is one forward without a cache, from ids to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnimoe.model import OmniMoeForCausalLM
from omnimoe.ops import backend

FORMATS = ("torch", "onnx")
PLACED = ("input_ids", "modality_ids", "attention_mask", "position_ids", "segment_ids", "key_ids", "block_ids")
"""Inputs of the form ``(B, T)``."""
BY_MODALITY = ("features", "timesteps")
"""Inputs that hold rows by modality."""
LARGEST = 2**20
SMALLEST = (2, 3)
"""Number of rows and length of a sequence from which on a graph is one for all: that of one token is another, and so is
what lies between the tokens of two."""


class ExportError(RuntimeError):
    """A model or an input that cannot be exported, with the reason."""


class _Forward(nn.Module):
    """One forward whose inputs and outputs are tensors."""

    def __init__(self, model: OmniMoeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        out = self.model(**inputs, use_cache=False)
        return {"logits": out.logits, **(getattr(out, "predictions", None) or {})}


def export(
    model: OmniMoeForCausalLM,
    format: str = "torch",
    *,
    inputs: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    dynamic: bool = True,
) -> Any:
    """Exports a forward without a cache, ``input_ids`` and what goes with them to ``logits``.

    Args:
        model: stays as it is.
        format: ``"torch"`` or ``"onnx"``.
        inputs: an example of what the graph will take: tensors by name, as the model's forward has them, and
            ``features`` and ``timesteps`` by modality. Ids and an attention mask where None.
        path: a file to write, ``.pt2`` or ``.onnx``.
        dynamic: leave batch, length and numbers of rows open; then each of them must be at least 2 in the example,
            and the length 3.

    Returns:
        ``torch.export.ExportedProgram`` or ``torch.onnx.ONNXProgram``. Outputs are ``logits`` and, by name, what the
        heads of continuous modalities say.

    Raises:
        ExportError: if the format is unknown, the example is none, a package is missing, or something in the model
            cannot be exported; the message names it.

    Example:
        >>> import omnimoe
        >>> program = omnimoe.export(omnimoe.load("mot_nano", num_layers=1))  # doctest: +SKIP
        >>> program.module()(input_ids=ids, attention_mask=mask)["logits"]  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    name = model.config._attn_implementation or "sdpa"
    if name not in ("sdpa", "eager"):
        raise ExportError(f"attention {name!r} cannot be exported; call model.set_attn_implementation('sdpa') first")
    given = dict(inputs) if inputs is not None else _example(model)
    shapes = _shapes(given) if dynamic else None
    table = _translations() if format == "onnx" else {}
    device = next(model.parameters()).device
    model.model.modality_ids_of(torch.zeros(1, 1, dtype=torch.int64, device=device))  # its table is made once, outside
    was_training = model.training
    try:
        with torch.no_grad(), backend("reference"):
            program = _export(_Forward(model.eval()), given, shapes)
            if format == "onnx":
                program = _to_onnx(program, table)
    finally:
        model.train(was_training)
    if path is not None:
        _save(program, format, Path(path))
    return program


def _example(model: OmniMoeForCausalLM) -> dict[str, Tensor]:
    missing = [f"{held.name!r}" for held in model.config.modalities if not held.is_discrete]
    if missing or model.config.keys:
        wanted = f"features of {', '.join(missing)}" if missing else f"key_ids over {model.config.keys}"
        raise ExportError(f"the model may take {wanted}; pass an example of what the graph is to take as inputs")
    first = min((held.start for held in model.config.token_ranges.values()), default=0)
    ids = torch.full((2, 8), first, dtype=torch.int64, device=next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _shapes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Which sizes stay open."""
    dims = {
        "batch": torch.export.Dim("batch", max=LARGEST),
        "length": torch.export.Dim("length", min=SMALLEST[1], max=LARGEST),
    }
    shapes: dict[str, Any] = {}
    for name, held in given.items():
        if name in BY_MODALITY and isinstance(held, Mapping):
            shapes[name] = {}
            for modality, rows in held.items():
                open_size = dims.setdefault(modality, torch.export.Dim(f"{modality}_rows", max=LARGEST))
                shapes[name][modality] = {0: open_size}
                _check_size(f"{name}[{modality!r}]", rows, 1)
        elif name in PLACED and isinstance(held, Tensor):
            shapes[name] = {0: dims["batch"], 1: dims["length"]}
            _check_size(name, held, 2)
        else:
            raise ExportError(f"{name!r} cannot be an input of a graph; pass tensors named {', '.join(PLACED)}")
    return {"inputs": shapes}


def _check_size(name: str, held: Tensor, axes: int) -> None:
    for size, least in zip(held.shape[:axes], SMALLEST, strict=False):
        if size < least:
            raise ExportError(
                f"{name} is {tuple(held.shape)}, and a size of 0 or 1, or a length below 3, cannot stay open; give a "
                "larger example, or pass dynamic=False"
            )


def _export(forward: nn.Module, given: Mapping[str, Any], shapes: dict[str, Any] | None) -> Any:
    try:
        return torch.export.export(forward, (), kwargs=dict(given), dynamic_shapes=shapes, strict=True)
    except Exception as error:
        raise ExportError(f"torch.export cannot take the model: {_first_line(error)}") from error


def _to_onnx(program: Any, table: Mapping[Any, Callable]) -> Any:
    try:
        return torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=dict(table))
    except Exception as error:
        raise ExportError(f"ONNX cannot express the model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """The line that says what was wrong, of a message that may fill a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # of sizes that cannot stay open the reasons come in lines of their own
    reasons = [line for line in lines[1:] if line.startswith("- ")][:1]
    return f"{type(error).__name__}: {' '.join([*lines[:1], *reasons]) or 'no message'}"


def _save(program: Any, format: str, path: Path) -> None:
    if format == "onnx":
        program.save(str(path))
    else:
        torch.export.save(program, path)


def _translations() -> dict[Any, Callable]:
    """What torch.onnx has no words for.

    Raises:
        ExportError: if onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise ExportError(f"ONNX needs the packages onnx and onnxscript ({error}); install omnimoe[onnx]") from error

    op: Any = opset18

    def sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        # of equal values the one with the lower index comes first: it is stable by definition
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    def searchsorted(
        edges: Any,
        values: Any,
        out_int32: bool = False,
        right: bool = False,
        side: str | None = None,
        sorter: Any = None,
    ) -> Any:
        last = op.Constant(value_ints=[-1])
        wide = op.Unsqueeze(op.Cast(values, to=INT64), last)
        before = op.LessOrEqual(op.Cast(edges, to=INT64), wide) if right else op.Less(op.Cast(edges, to=INT64), wide)
        return op.Cast(op.ReduceSum(op.Cast(before, to=INT64), last, keepdims=0), to=INT32 if out_int32 else INT64)

    return {torch.ops.aten.sort.stable: sort, torch.ops.aten.searchsorted.Tensor: searchsorted}


INT32, INT64 = 6, 7
"""Numbers of ONNX's types."""
