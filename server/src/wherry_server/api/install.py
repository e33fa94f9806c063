"""What a machine needs to become a device: the program of the line, the authority's certificate, wheels. Open to anybody."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import FileResponse, JSONResponse

from wherry_server import wheels
from wherry_server.auth import ServicesDep
from wherry_server.broker_tokens import Issuer
from wherry_shared.errors import RefusedError

router = APIRouter(prefix="/install", tags=["device"])


@router.get("/join.py", response_class=Response)
async def join_program() -> Response:
    """The program that the line of `wherry device invite` runs, after it compared the digest."""
    return Response(program(), media_type="text/x-python")


@router.get("/ca.pem", response_class=Response)
async def authority(services: ServicesDep) -> Response:
    """The certificate of the authority that signs for this server and its devices."""
    return Response(services.authority.ca_pem, media_type="application/x-pem-file")


@router.get("/broker-keys.json", response_class=JSONResponse)
def broker_keys(services: ServicesDep) -> Response:
    """The public keys (JWK set) with which a broker checks tokens of devices."""
    return JSONResponse(Issuer.ensure(services.settings.keys_folder, services.project).key_set())


@router.get("/wheels.json", response_class=JSONResponse)
def list_wheels(services: ServicesDep) -> Response:
    """The wheels that this server gives: name and SHA-256."""
    return JSONResponse(wheels.offered(services.settings.wheels_folder))


@router.get("/wheels/{name}", response_class=Response)
def get_wheel(name: Annotated[str, Path(pattern=f"^{wheels.NAME.pattern}$")], services: ServicesDep) -> Response:
    """One wheel."""
    own = wheels.own().get(name)
    if own is not None:
        return Response(own, media_type="application/octet-stream")
    path = services.settings.wheels_folder / name
    if not path.is_file():
        raise RefusedError("wheel_unknown", f"there is no wheel {name[:80]!r}", next_step="see /install/wheels.json")
    return FileResponse(path, media_type="application/octet-stream")


def program() -> bytes:
    """Return the bytes of the program."""
    return files("wherry_server").joinpath("install/join.py").read_bytes()
