"""Options shared by the commands that train, made from the fields of ``TrainSettings``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnimoe.train.settings import TrainSettings

SHORT = {"learning_rate": "lr", "checkpoint_activations": "checkpoint-activations"}


def add_settings(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = (), **defaults: object) -> None:
    """Adds an option for every field of ``TrainSettings``, its help the sentence under the field.

    Args:
        parser: of the command.
        without: fields that the command sets itself.
        defaults: defaults of this command where they differ from the fields'.
    """
    from omnimoe.train.settings import TrainSettings

    group = parser.add_argument_group("training")
    sentences = field_sentences(TrainSettings)
    for field in dataclasses.fields(TrainSettings):
        if field.name in without:
            continue
        default = defaults.get(field.name, field.default)
        option = "--" + SHORT.get(field.name, field.name.replace("_", "-"))
        told = sentences[field.name].rstrip(".").replace("%", "%%").replace("`", "") + f" (default: {default})"
        # an option that was not given leaves no trace, so that a resumed run can keep what it had
        shared: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": told}
        if isinstance(default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, **shared)
        else:
            group.add_argument(option, type=type(default), metavar=type(default).__name__.upper(), **shared)


def read_settings(args: argparse.Namespace, base: TrainSettings) -> TrainSettings:
    """The settings of a command: ``base``, with the options that were given."""
    names = [field.name for field in dataclasses.fields(base)]
    return base.replace(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def read_device(name: str):
    """The device of ``--device``.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({told}); leave it out to train on the CPU") from error


def field_sentences(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    found = {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for statement, after in itertools.pairwise(statements):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[statement.target.id] = " ".join(str(text).split())
    return found
