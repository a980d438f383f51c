"""Quantisation by torchao that reaches the banks, or says what it would leave.

Nearly all weights of a model are banks ``(copies, out, in)``, which tools that look for ``nn.Linear`` pass by: a model
would be called quantised with its experts as large as before. Here torchao is told of every bank by name, and what it
did is read off the weights. A quantised bank keeps torchao's integers; they become numbers where they are used.
Embeddings, heads, norms and routers stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from omnimoe.layers import BankLinear, BankMLP
from omnimoe.routers import Router

_BANKS = (
    r"re:.*\blayers\.\d+\.(self_attn|mlp)\.([\w.]+\.)?\w+_proj\.weight",
    r"re:.*\blayers\.\d+\.mlp\.([\w.]+\.)?\w*experts\.(pools\.\d+\.)?\w+_proj",
)
"""The banks of attention and experts, as torchao spells patterns; a module's name would take its biases too."""


class QuantizationError(ValueError):
    """A quantisation that would leave banks as they are."""


def quantize(model: nn.Module, config: Any = None, *, allow_partial: bool = False) -> nn.Module:
    """Quantises the weights of a model's layers in place.

    Args:
        model: with or without heads.
        config: of torchao; int8 weights with a scale a row where None.
        allow_partial: leave what torchao cannot do as it is.

    Returns:
        The model.

    Raises:
        ImportError: if torchao is not installed.
        QuantizationError: if a weight of the layers would stay as it is; the model is unchanged then.
    """
    quantize_, by_name = _torchao()
    config = config if config is not None else int8()
    places = list(matrices(model))
    if not places:
        raise QuantizationError(f"{type(model).__name__} has no banks and no linear layers inside of layers")
    reasons: dict[tuple[int, ...], str] = {}
    for _, module, parameter in places:
        weight = getattr(module, parameter)
        if tuple(weight.shape) not in reasons:
            reasons[tuple(weight.shape)] = _why_not(weight, config)
    left = [name for name, module, parameter in places if reasons[tuple(getattr(module, parameter).shape)]]
    if left and not allow_partial:
        raise QuantizationError(_complaint(model, left, next(filter(None, reasons.values()))))
    if not allow_partial:
        _check_parts(model)
    for _, module, parameter in places:
        if not reasons[tuple(getattr(module, parameter).shape)]:
            quantize_(module, by_name({parameter: config}), filter_fn=None)
    return model


def torchao_config(model: nn.Module, config: Any = None) -> Any:
    """The ``TorchAoConfig`` of transformers that reaches every bank of a model, for ``from_pretrained``.

    Args:
        model: of the same declaration as what is loaded; one on the meta device will do.
        config: as for :func:`quantize`.

    Raises:
        ImportError: if torchao is not installed.
    """
    from transformers import TorchAoConfig

    _, by_name = _torchao()
    config = config if config is not None else int8()
    return TorchAoConfig(by_name({name: config for name, _, _ in matrices(model)}))


def named(name: str) -> Any:
    """The config of transformers for a kind of quantisation by its name, for any model of omnimoe's own banks.

    Raises:
        ImportError: if torchao is not installed.
        QuantizationError: if there is no such kind.
    """
    if name != "int8":
        raise QuantizationError(f"unknown quantization_config {name!r}; write 'int8', or pass a config of transformers")
    from transformers import TorchAoConfig

    return TorchAoConfig(_torchao()[1](dict.fromkeys(_BANKS, int8())))


def check_reach(model: nn.Module) -> None:
    """Refuses a model that was quantised in part.

    Raises:
        QuantizationError: with the share of the weights that stayed as they are.
    """
    left = [name for name, module, parameter in matrices(model) if not is_quantized(getattr(module, parameter))]
    if left:
        raise QuantizationError(_complaint(model, left, "it does not reach weights of that kind"))
    _check_parts(model)


def stored_form(model: nn.Module, config: Any, held: Collection[str]) -> dict[str, Tensor] | None:
    """The tensors that a file of a quantised model has, without memory.

    Args:
        model: as it is declared, on the meta device; it is quantised in place.
        config: the ``quantization_config`` of its config.
        held: names in the file. A weight that is there by its own name is as it was.

    Returns:
        Shape and dtype of each tensor by its name in a file; None where that is not known: for quantisations by others
        than torchao, and kinds that torchao does not do without memory.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    read = AutoQuantizationConfig.from_dict(copy.deepcopy(config)) if isinstance(config, dict) else config
    if not isinstance(read, TorchAoConfig):
        return None
    quantize_, by_name = _torchao()
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    whole = model.state_dict()
    kind = read.get_apply_tensor_subclass()
    if not isinstance(kind, by_name):
        kind = by_name({name: kind for name, weight in whole.items() if name not in held and weight.ndim > 1})
    try:
        quantize_(model, kind, filter_fn=None)
        flat = flatten_tensor_state_dict({name: one for name, one in model.state_dict().items() if name not in held})[0]
    except (NotImplementedError, ValueError, AssertionError, RuntimeError):
        return None
    return {name: weight for name, weight in whole.items() if name in held} | flat


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in another form than as plain floating-point numbers."""
    return not weight.dtype.is_floating_point or type(weight) not in (nn.Parameter, Tensor)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The weights of the layers that rows are multiplied by: their name, the module that holds them, and as what."""
    layers = {name: part for name, part in model.named_modules() if name.rpartition(".")[2] == "layers"}
    for prefix, stack in layers.items():
        routers = tuple(f"{name}." for name, part in stack.named_modules() if isinstance(part, Router))
        for name, module in stack.named_modules():
            if not isinstance(module, BankLinear | BankMLP | nn.Linear) or f"{name}.".startswith(routers):
                continue
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.ndim == (2 if isinstance(module, nn.Linear) else 3):
                    yield f"{prefix}.{name}.{parameter}", module, parameter


def _check_parts(model: nn.Module) -> None:
    """Refuses banks that parts of somebody else's making hold bare, whose use nothing here knows."""
    known = {name for name, _, _ in matrices(model)}
    for place, part in model.named_modules():
        if ".layers." not in f".{place}." or type(part).__module__.startswith(("omnimoe.", "torch.", "torchao.")):
            continue
        for parameter, weight in part.named_parameters(recurse=False):
            name = f"{place}.{parameter}"
            if weight.ndim == 3 and name not in known and not isinstance(part, Router) and not is_quantized(weight):
                raise QuantizationError(
                    f"the quantisation leaves {name} {tuple(weight.shape)} as it is, a bank that "
                    f"{type(part).__qualname__} holds bare; make it a BankLinear or BankMLP, or pass allow_partial=True"
                )


def int8() -> Any:
    """torchao's int8 weights with a scale a row; settings of the compiler, which torchao would change, stay."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise _missing() from error
    return Int8WeightOnlyConfig(set_inductor_config=False)


def _why_not(weight: Tensor, config: Any) -> str:
    """What keeps torchao from a weight of this shape, found out on a part of it; empty where nothing does."""
    quantize_, by_name = _torchao()
    trial = nn.Module()
    trial.weight = nn.Parameter(weight.detach()[:1].clone() if weight.ndim == 3 else weight.detach().clone())
    try:
        quantize_(trial, by_name({"weight": config}), filter_fn=None)
    except (NotImplementedError, ValueError, AssertionError, RuntimeError) as error:
        return f"torchao says {str(error).splitlines()[0]!r}"
    return "" if is_quantized(trial.weight) else f"torchao passes over weights of shape {tuple(weight.shape)}"


def _complaint(model: nn.Module, left: list[str], reason: str) -> str:
    places = {name: getattr(module, parameter) for name, module, parameter in matrices(model)}
    total, stays = sum(held.numel() for held in places.values()), sum(places[name].numel() for name in left)
    return (
        f"the quantisation leaves {stays / total:.0%} of the weights of the layers as they are, {left[0]} among them: "
        f"{reason}. Take quantization_config='int8', or omnimoe.quantize(model) once it is loaded, which reaches "
        "parts of your own too, or pass allow_partial=True"
    )


def _torchao() -> tuple[Any, Any]:
    try:
        from torchao.quantization import FqnToConfig, quantize_
    except ImportError as error:
        raise _missing() from error
    return quantize_, FqnToConfig


def _missing() -> ImportError:
    return ImportError("quantisation needs torchao: pip install 'omnimoe[torchao]'")
