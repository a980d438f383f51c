"""Readers of a user's own data: folders, WebDataset shards, Hugging Face datasets; all give the same documents."""

from __future__ import annotations

from omnimoe.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "omnimoe.data.readers.base": ("Document", "DocumentError", "Item", "RawFile", "Reader"),
        "omnimoe.data.readers.folder": ("FolderReader",),
        "omnimoe.data.readers.tar": ("TarReader",),
        "omnimoe.data.readers.hub": ("DatasetReader",),
        "omnimoe.data.readers.opening": ("open_reader",),
    },
)
