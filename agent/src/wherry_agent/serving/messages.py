"""The messages of the protocol over gRPC, made at run time from `oip.binpb` (the compiled `oip.proto`).

They live in a descriptor pool of their own. Other packages register the same names, so the pool that a process shares
would refuse the second of them. Made this way they also need no generated code, which fits only some releases of
protobuf.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("wherry_agent.serving").joinpath("oip.binpb").read_bytes()
).file:
    _pool.Add(_file)


def message(name: str) -> Any:
    """Return the class of a message."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
