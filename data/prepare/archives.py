"""Unpack files that are compressed as a whole: .gz, .zst and .xz. The libraries' own readers miss a truncated end."""

from __future__ import annotations

import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

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
    """Decompress all members."""
    member = None
    while block := file.read(BLOCK_BYTES):
        while block:
            if member is None and not (block := block.lstrip(b"\0")):  # zeros may follow a member
                break
            member = member or zlib.decompressobj(wbits=31)
            yield member.decompress(block)
            block, member = (member.unused_data, None) if member.eof else (b"", member)
    if member is not None:
        raise EOFError("its last member has no end")


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all frames. The library's own reader takes a truncated frame for the end of the file."""
    zstandard = importlib.import_module("zstandard")
    frame = None
    while block := file.read(BLOCK_BYTES):
        while block:
            # `zstd --long` makes large windows, which are refused without this size.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(block)
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("its last frame has no end")


def _xz_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all streams. The library's own reader takes what follows a stream and is none for the end."""
    stream = None
    while block := file.read(BLOCK_BYTES):
        while block:
            if stream is None and not (block := block.lstrip(b"\0")):  # zeros may follow a stream
                break
            stream = stream or lzma.LZMADecompressor(lzma.FORMAT_XZ)
            yield stream.decompress(block)
            block, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise EOFError("its last stream has no end")


UNPACKED: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _gzip_blocks,
    ".zst": _zstd_blocks,
    ".xz": _xz_blocks,
}
