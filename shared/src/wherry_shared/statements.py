"""What a bundle says about itself in the formats of others: in-toto with SLSA provenance, and a CycloneDX ML-BOM.

Both are layers of the bundle, so the publisher's signature over the manifest covers them, and both say again what the config says: made from
it here, and compared with it by whoever verifies. Nothing on a device reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from wherry_shared.bundle import Config
from wherry_shared.errors import RefusedError

IN_TOTO_TYPE = "application/vnd.in-toto+json"
CYCLONEDX_TYPE = "application/vnd.cyclonedx+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://wherry.dev/build/v1"
BOM_VERSION = "1.6"
BYTES_MAX = 4 * 1024 * 1024


def provenance_statement(config: Config) -> bytes:
    """Return the in-toto statement of a bundle: which files, made from what, by which tools."""
    made = config.provenance
    materials = {**made.source_digests, **{f"data/{name}": digest for name, digest in made.data_digests.items()}}
    parameters = {"model": config.model, "version": config.version, "recipe": made.recipe_digest}
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in _files(config).items()],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {key: value for key, value in parameters.items() if value is not None},
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": _hex(digest)}} for name, digest in sorted(materials.items())
                ],
            },
            "runDetails": {
                "builder": {"id": f"{BUILD_TYPE}/wherry-optimizer", "version": dict(sorted(made.tools.items()))}
            },
        },
    }
    return msgspec.json.encode(statement)


def bill_of_materials(config: Config) -> bytes:
    """Return the CycloneDX bill of materials of a bundle: the model, its files, its data, the tools, the licence."""
    made = config.provenance
    data = [
        {"type": "data", "bom-ref": f"data/{name}", "name": name, "hashes": [_hash(digest)]}
        for name, digest in sorted(made.data_digests.items())
    ]
    variants = [
        {
            "type": "file",
            "bom-ref": f"variant/{variant.id}",
            "name": variant.id,
            "hashes": [_hash(variant.digest)],
            "properties": [
                {"name": "wherry:format", "value": variant.format},
                {"name": "wherry:precision", "value": variant.precision},
                *(
                    {"name": f"wherry:accuracy:{accuracy.metric}", "value": repr(accuracy.value)}
                    for accuracy in (variant.accuracy,)
                    if accuracy is not None
                ),
            ],
        }
        for variant in config.variants
    ]
    card: dict[str, Any] = {
        "modelParameters": {
            "inputs": [{"format": spec.datatype} for spec in config.interface.inputs],
            "outputs": [{"format": spec.datatype} for spec in config.interface.outputs],
        }
    }
    if data:
        card["modelParameters"]["datasets"] = [{"ref": one["bom-ref"]} for one in data]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": BOM_VERSION,
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": name, "version": version}
                    for name, version in sorted(made.tools.items())
                ]
            },
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": config.model,
                "version": config.version,
                "description": config.description,
                "licenses": [{"expression": config.licence.expression}],
                "copyright": config.licence.attribution,
                "modelCard": card,
            },
        },
        "components": [*variants, *data],
        "dependencies": [{"ref": "model", "dependsOn": [one["bom-ref"] for one in (*variants, *data)]}],
    }
    return msgspec.json.encode(bom)


def check_statement(data: bytes, config: Config) -> None:
    """Compare an in-toto statement with the config of its bundle.

    Raises:
        RefusedError: `statement_invalid`, if it is none or speaks of other files.
    """
    found = _object(data, "in-toto statement")
    if found.get("_type") != STATEMENT or not isinstance(found.get("predicate"), dict):
        raise RefusedError("statement_invalid", f"no in-toto statement of type {STATEMENT}")
    subjects = found.get("subject")
    named = {}
    for subject in subjects if isinstance(subjects, list) else ():
        if isinstance(subject, dict) and isinstance(subject.get("digest"), dict):
            named[str(subject.get("name"))] = str(subject["digest"].get("sha256"))
    _compare("the in-toto statement", named, _files(config))


def check_bill(data: bytes, config: Config) -> None:
    """Compare a CycloneDX bill of materials with the config of its bundle.

    Raises:
        RefusedError: `statement_invalid`, if it is none or speaks of other files, another version or another licence.
    """
    found = _object(data, "CycloneDX bill of materials")
    metadata = found.get("metadata")
    about = metadata.get("component") if isinstance(metadata, dict) else None
    if found.get("bomFormat") != "CycloneDX" or not isinstance(about, dict):
        raise RefusedError("statement_invalid", "no CycloneDX bill of materials of a model")
    said = (about.get("type"), about.get("name"), about.get("version"), about.get("licenses"))
    wanted = ("machine-learning-model", config.model, config.version, [{"expression": config.licence.expression}])
    if said != wanted:
        raise RefusedError(
            "statement_invalid", f"the bill of materials is about {said!r:.300}, the bundle is {wanted!r:.300}"
        )
    named = {}
    components = found.get("components")
    for part in components if isinstance(components, list) else ():
        if isinstance(part, dict) and part.get("type") == "file" and isinstance(part.get("hashes"), list):
            hashes = [
                one.get("content") for one in part["hashes"] if isinstance(one, dict) and one.get("alg") == "SHA-256"
            ]
            named[str(part.get("name"))] = str(hashes[0]) if hashes else ""
    _compare("the bill of materials", named, {variant.id: _hex(variant.digest) for variant in config.variants})


def _files(config: Config) -> dict[str, str]:
    files = {variant.id: _hex(variant.digest) for variant in config.variants}
    return files if config.assets is None else {**files, "assets": _hex(config.assets.digest)}


def _compare(what: str, named: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    other = sorted(name for name in {*named, *wanted} if named.get(name) != wanted.get(name))
    if other:
        raise RefusedError(
            "statement_invalid",
            f"{what} does not speak of the files of this bundle: {', '.join(other)[:200]}",
            consequence="it proves nothing about them",
            next_step="build the bundle again",
        )


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError("statement_invalid", f"no {what}: {error}") from error


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": _hex(digest)}
