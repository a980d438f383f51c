"""What is checked of a checkpoint before and after it is read.

A checkpoint is untrusted input: safetensors only, no path outside of its folder, no code, and every key must fit.
"""

from omnimoe.checkpoint.errors import CheckpointError, read_json
from omnimoe.checkpoint.fetch import Hub, Source, weight_files
from omnimoe.checkpoint.folder import check_folder, check_weights, read_index
from omnimoe.checkpoint.report import complaint

__all__ = [
    "CheckpointError",
    "Hub",
    "Source",
    "check_folder",
    "check_weights",
    "complaint",
    "read_index",
    "read_json",
    "weight_files",
]
