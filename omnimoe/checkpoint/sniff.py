"""What a file is that calls itself safetensors and is not, from its first bytes."""

from __future__ import annotations

_FETCH = "download the file itself"
_PICKLE = "which can run code as it is read; convert it with safetensors in a place you trust"
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points at; run git lfs pull, or " + _FETCH),
    (b"<!doctype", "an HTML page, as a server sends in place of a file; " + _FETCH),
    (b"<html", "an HTML page, as a server sends in place of a file; " + _FETCH),
    (b"<?xml", "an XML page, as a server sends in place of a file; " + _FETCH),
    (b"{", "a text in JSON, as a server sends in place of a file; " + _FETCH),
    (b"pk\x03\x04", "a zip archive, as torch.save writes: a pickle, " + _PICKLE),
    (b"\x1f\x8b", "packed with gzip; unpack it first"),
    (b"bzh", "packed with bzip2; unpack it first"),
    (b"\xfd7zxz\x00", "packed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it first"),
    (b"\x89hdf\r\n", "an HDF5 file; convert it to safetensors first"),
    (b"\x93numpy", "a NumPy array; convert it to safetensors first"),
    (b"gguf", "a GGUF file, which holds quantised weights for another program"),
    (b"\x7felf", "a program"),
)


def suspicion(start: bytes) -> str:
    """What a file seems to be, as the rest of a sentence with what to do; empty where nothing is known.

    Args:
        start: its first 512 bytes, or what there is of them.

    Example:
        >>> suspicion(b"<html>404</html>")
        'an HTML page, as a server sends in place of a file; download the file itself'
    """
    text = start.lstrip().lower()
    for magic, meaning in _KINDS:
        if text.startswith(magic):
            return meaning
    if len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return "a pickle, " + _PICKLE
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if start and not start.strip(b"\0"):
        return "all zeros, as a copy that was broken off leaves; copy it again"
    return ""
