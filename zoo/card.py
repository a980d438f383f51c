"""What is known of a family beside its code: a module that registers models says it in a constant ``CARD``."""

from __future__ import annotations

from dataclasses import dataclass, field

from omnimoe.convert.licence import license_facts


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts that ``model_info`` reads.

    Args:
        family: name of the family.
        title: one line.
        paper: address of the paper that describes the architecture.
        license: SPDX name of the licence of the weights, or of the declaration where there are none.
        weights: for each model that has weights, where they lie: a folder beside the module that declares the card, or
            an id on the Hub as ``hf-hub:org/name``.
        related: addresses of other papers that the family draws on.
        papers: for models of the family that another paper describes, its address.
        licenses: for models of the family that are under another licence, its name.
        unread: for models whose official files are not read here, why, and what is.
    """

    family: str
    title: str
    paper: str
    license: str = "Apache-2.0"
    weights: dict[str, str] = field(default_factory=dict)
    related: tuple[str, ...] = ()
    papers: dict[str, str] = field(default_factory=dict)
    licenses: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def license_of(self, name: str) -> str:
        """The licence of one of its models."""
        return self.licenses.get(name, self.license)

    def facts(self, name: str) -> dict[str, str]:
        """What the card of a model's folder says of it: licence and paper."""
        return {**license_facts(self.license_of(name)), "paper": self.papers.get(name, self.paper)}
