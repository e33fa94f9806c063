"""What a bundle says of itself in the formats of others is what those others ask for, by their own schema and code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement

from tests.trust_kit import write_bundle
from wherry_shared import statements
from wherry_shared.bundle import Accuracy, Config, Provenance, parse_config, parse_manifest

DIGEST = "sha256:" + "a" * 64


def bill_trouble(data: bytes) -> str:
    """Return what CycloneDX' schema says against a bill; empty if nothing."""
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode())
    return "" if found is None else str(found)[:400]


def check_provenance(data: bytes) -> None:
    """Read a statement and its predicate as in-toto's own messages, where an unknown or misplaced field is an error."""
    document = json.loads(data)
    predicate = document.get("predicate", {})
    message = json_format.ParseDict(document, statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    found = json_format.ParseDict(predicate, provenance_pb2.Provenance())
    build = found.build_definition
    assert build.build_type, "SLSA requires a build type"
    assert len(build.external_parameters), "SLSA requires external parameters"
    assert found.run_details.builder.id, "SLSA requires a builder"
    for one in build.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(one).validate()
    for one in (*message.subject, *build.resolved_dependencies):
        assert re.fullmatch("[0-9a-f]{64}", one.digest["sha256"]), "in-toto's digests are lower-case hex"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("bundle")
    manifest = write_bundle(folder, "1.0.0", model="thing", weights=b"x" * 100)
    blobs = {path.name: path.read_bytes() for path in (folder / "blobs" / "sha256").iterdir()}
    return parse_config(blobs[parse_manifest(blobs[manifest[7:]]).config.digest[7:]])


def rich(config: Config) -> Config:
    """Everything that a config may say."""
    accuracy = Accuracy(metric="top1", value=0.75, standard_error=0.01, drop=0.002, samples=1000)
    made = Provenance(
        source_digests={"model.onnx": DIGEST},
        recipe_digest=DIGEST,
        data_digests={"validation": DIGEST, "calibration": DIGEST},
        tools={"onnx": "1.23.2", "wherry-optimizer": "0.1.0"},
        created_at=1_700_000_000_000_000,
    )
    (variant,) = config.variants
    variants = [
        msgspec.structs.replace(variant, id=name, accuracy=accuracy, digest="sha256:" + name[0] * 64)
        for name in ("float", "block-int8")
    ]
    licence = msgspec.structs.replace(config.licence, expression="LicenseRef-Ours AND Apache-2.0")
    return msgspec.structs.replace(
        config, variants=variants, provenance=made, licence=licence, description="Sorts lamps from things."
    )


def test_bills_of_materials_are_valid_by_the_schema_of_cyclonedx(plain: Config) -> None:
    for config in (plain, rich(plain)):
        assert bill_trouble(statements.bill_of_materials(config)) == ""


def test_statements_are_valid_by_the_code_of_in_toto_and_the_message_of_slsa(plain: Config) -> None:
    for config in (plain, rich(plain)):
        check_provenance(statements.provenance_statement(config))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"machine-learning-model"', '"model"'),
        ('"SHA-256"', '"sha256"'),
        ('"modelCard"', '"card"'),
        ('"bom-ref":"model"', '"bom-ref":7'),
    ],
)
def test_a_bill_that_is_none_is_noticed(plain: Config, was: str, becomes: str) -> None:
    text = statements.bill_of_materials(rich(plain)).decode()
    assert was in text
    assert bill_trouble(text.replace(was, becomes).encode())


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"subject"', '"subjects"'),
        ("in-toto.io/Statement/v1", "in-toto.io/Statement/v9"),
        ('"sha256":"', '"sha256":"zz'),
        ('"resolvedDependencies"', '"materials"'),
        ('"externalParameters"', '"parameters"'),
        ('"builder":{"id"', '"builder":{"name"'),
    ],
)
def test_a_statement_that_is_none_is_noticed(plain: Config, was: str, becomes: str) -> None:
    text = statements.provenance_statement(rich(plain)).decode()
    assert was in text
    with pytest.raises((ValueError, AssertionError, json_format.ParseError)):
        check_provenance(text.replace(was, becomes).encode())
