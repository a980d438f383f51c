"""Tier 7: the models, one package a family; each is a card, a few declared functions and a ``README.md``.

A family imports the public names of the tiers above and nothing imports a family but its own kin. Names are registered
when :mod:`omnimoe.hub` loads the zoo, on first use of a model's name.
"""

if __name__ != "omnimoe.zoo":
    # Under a second name every model would be registered twice.
    raise ImportError("the folder zoo/ is the package omnimoe.zoo; import that, or call omnimoe.list_models()")
