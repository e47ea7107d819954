"""Unpack files that are compressed as a whole: .gz, .zst and .xz.

The libraries' own readers take a truncated end, or what follows the first part, for the end of the file.
"""

from __future__ import annotations

import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

BLOCK_BYTES = 2**16


def unpack(name: str) -> Iterator[bytes]:
    """Read a file in blocks, unpacked if its name says that it is compressed.

    Raises:
        EOFError: an archive is empty or truncated. Damaged ones raise the errors of their libraries.
    """
    blocks_of = next((blocks_of for ending, blocks_of in UNPACKED.items() if name.endswith(ending)), None)
    with open(name, "rb") as file:
        if blocks_of is None:
            while block := file.read(BLOCK_BYTES):
                yield block
            return
        if not file.read(1):
            raise EOFError("it is empty, and no archive")
        file.seek(0)
        yield from blocks_of(file)


def _gzip_blocks(file: BinaryIO) -> Iterator[bytes]:
    return _blocks(file, lambda: zlib.decompressobj(wbits=31), "member", zeros_follow=True)


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    zstandard = importlib.import_module("zstandard")
    # `zstd --long` makes large windows, which are refused without this size.
    return _blocks(file, lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), "frame")


def _xz_blocks(file: BinaryIO) -> Iterator[bytes]:
    return _blocks(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), "stream", zeros_follow=True)


def _blocks(file: BinaryIO, new: Callable[[], Any], part: str, zeros_follow: bool = False) -> Iterator[bytes]:
    """Decompress all parts of an archive, one after the other.

    Args:
        new: makes the decompressor of a part.
        part: what the format calls a part, for the error.
        zeros_follow: whether the format allows zeros after a part.
    """
    current = None
    while block := file.read(BLOCK_BYTES):
        while block:
            if zeros_follow and current is None and not (block := block.lstrip(b"\0")):
                break
            current = current or new()
            yield current.decompress(block)
            block, current = (current.unused_data, None) if current.eof else (b"", current)
    if current is not None:
        raise EOFError(f"its last {part} has no end")


UNPACKED: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _gzip_blocks,
    ".zst": _zstd_blocks,
    ".xz": _xz_blocks,
}
