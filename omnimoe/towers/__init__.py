"""Some towers of a model without the rest: a smaller config, and the part of each stored weight that it needs."""

from omnimoe.towers.cutting import keep_keys
from omnimoe.towers.selection import Selection, select
from omnimoe.towers.weights import kept_copies, load_pieces, pieces

__all__ = ["Selection", "keep_keys", "kept_copies", "load_pieces", "pieces", "select"]
