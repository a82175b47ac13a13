"""Object stores on this machine, as real HTTP servers: S3 by moto, Google's by its emulator."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.request import Request, urlopen

# Asked for before gcsfs is imported: else it asks Google for the kind of every bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import boto3
import fsspec
import pytest
from gcp_storage_emulator import server as gcs
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from moto.server import ThreadedMotoServer

SECRET = "not-to-be-found-anywhere"


@dataclass
class Store:
    """An empty bucket `store`."""

    protocol: str
    port: int
    at: Callable[[int], None]
    """Lets fsspec find the server at another port, such as a proxy's."""

    @property
    def root(self) -> str:
        return f"{self.protocol}://store"

    @property
    def fs(self) -> Any:
        return fsspec.filesystem(self.protocol, use_listings_cache=False)

    def put(self, key: str, content: bytes) -> str:
        """Put an object; gives its address."""
        self.fs.pipe_file(f"store/{key}", content)
        return f"{self.root}/{key}"

    def objects(self) -> dict[str, bytes]:
        found = self.fs.find("store")
        return {key.removeprefix("store/"): self.fs.cat_file(key) for key in found}


@contextmanager
def s3_store(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = int(server.get_host_and_port()[1])
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def at(port: int) -> None:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    at(port)
    boto3.client("s3").create_bucket(Bucket="store")
    yield Store("s3", port, at)
    # All of moto's servers in a process have the same buckets.
    urlopen(Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@contextmanager
def gs_store(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)
    insert_at = rf"^{gcs.settings.UPLOAD_API_ENDPOINT}/b/(?P<bucket_name>[-.\w]+)/o$"
    routes = next(methods for pattern, methods in gcs.HANDLERS if pattern == insert_at)
    patch.setitem(routes, "POST", _insert)
    server = gcs.create_server("127.0.0.1", 0, in_memory=True, default_bucket="store")
    server.start()
    port = server._api._httpd.server_address[1]

    def at(port: int) -> None:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        fsspec.get_filesystem_class("gs").clear_instance_cache()

    at(port)
    yield Store("gs", port, at)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.stop()


def _insert(request: Any, response: Any, storage: Any, *rest: Any, **named: Any) -> None:
    """The emulator's upload, with the precondition that Google's store has and it has not."""
    if request.query.get("ifGenerationMatch") == ["0"]:
        name = request.query.get("name", [None])[0] or request.data["meta"]["name"]
        try:
            storage.get_file_obj(request.params["bucket_name"], name)
        except NotFound:
            pass
        else:
            said = "At least one of the pre-conditions you specified did not hold."
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": said}})
            return
    objects.insert(request, response, storage, *rest, **named)


STORES = {"s3": s3_store, "gs": gs_store}
