"""Read whole sources; run an S3 server on loopback."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nb_lightning.token_source import Source


def everything(source: Source) -> np.ndarray:
    """Read all tokens of a split."""
    return np.concatenate([source.read(c, 0, int(n)) for c, n in enumerate(source.chunk_tokens)])


@contextmanager
def s3_server(cache: Path) -> Iterator[Any]:
    """A real S3 server on this machine, empty; yields a client of it. Streamed chunks go to `cache`."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            endpoint = "http://{}:{}".format(*server.get_host_and_port())
            for key, value in (
                ("AWS_ENDPOINT_URL", endpoint),
                ("AWS_ACCESS_KEY_ID", "test"),
                ("AWS_SECRET_ACCESS_KEY", "test"),
                ("AWS_DEFAULT_REGION", "us-east-1"),
                ("NO_PROXY", "127.0.0.1"),
            ):
                patch.setenv(key, value)
            # litdata's faster client, obstore, is built for https only; without it litdata reads through boto3.
            patch.setattr("litdata.streaming.downloader._OBSTORE_AVAILABLE", False)
            patch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", str(cache))
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
            yield boto3.client("s3")
    finally:
        server.stop()


def content(folder: Path) -> dict[str, str]:
    """Hash each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
