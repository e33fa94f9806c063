"""Makes small bundles, each wrong in one way, with what every reader has to say about it.

    python -m tests.conformance.make_bundles FOLDER

writes FOLDER/NAME/ (an OCI image layout of model NAME, version 1.0.0) for each row of `BUNDLES`, and FOLDER/expected.json: NAME → {says, refused by
the reader of layouts, by the server, by the agent}. The same bytes every time: no clock, no randomness, no weights that
an engine could load, since nothing of these bundles may come that far.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wherry_shared.bundle import (
    ANNOTATION_PLAIN_DIGEST,
    ANNOTATION_VARIANT,
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    DOC_TYPE,
    GOLDEN_TYPE,
    MANIFEST_TYPE,
    WEIGHT_TYPE,
)
from wherry_shared.digest import of_bytes
from wherry_shared.image_layout import ANNOTATION_REF, INDEX_TYPE
from wherry_shared.limits import BLOB_BYTES_MAX, CONFIG_BYTES_MAX, VARIANTS_MAX

VERSION = "1.0.0"

Json = dict[str, Any]


class Draft:
    """A bundle as plain JSON values, so that it may say what no typed writer would."""

    def __init__(self, name: str) -> None:
        weights = f"weights of {name}".encode()
        golden = f"golden vectors of {name}".encode()
        self.blobs: dict[str, bytes] = {}
        self.layers = [
            self.add(weights, WEIGHT_TYPE, {ANNOTATION_VARIANT: "float"}),
            self.add(golden, GOLDEN_TYPE, {ANNOTATION_VARIANT: "float"}),
            self.add(b"do as you like", DOC_TYPE),
        ]
        tensor = {"name": "x", "datatype": "FP32", "shape": ["batch", 4]}
        self.config: Json = {
            "format": 1,
            "model": name,
            "version": VERSION,
            "interface": {"inputs": [tensor], "outputs": [{**tensor, "name": "y"}], "dims": {"batch": {}}},
            "variants": [
                {
                    "id": "float",
                    "digest": of_bytes(weights),
                    "bytes": len(weights),
                    "format": "onnx",
                    "precision": "float32",
                    "engines": [{"name": "onnxruntime", "minimum": "1.20"}],
                    "golden": {"digest": of_bytes(golden), "bytes": len(golden), "vectors": 1},
                }
            ],
            "licence": {"expression": "MIT", "source": "tests", "attribution": "Wherry"},
            "provenance": {"source_digests": {}},
        }
        self.manifest: Json = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "layers": self.layers,
        }
        self.manifest_bytes: bytes | None = None
        """Stands for the manifest, where that is no JSON."""
        self.config_bytes: bytes | None = None
        self.after: list[Callable[[Path], None]] = []
        """Done to the folder when all is written."""

    @property
    def variant(self) -> Json:
        found: Json = self.config["variants"][0]
        return found

    def add(self, data: bytes, media_type: str, annotations: dict[str, str] | None = None) -> Json:
        digest = of_bytes(data)
        self.blobs[digest] = data
        named = {"annotations": annotations} if annotations else {}
        return {"mediaType": media_type, "digest": digest, "size": len(data), **named}

    def write(self, root: Path) -> str:
        """Write the layout; return the manifest's digest."""
        config = self.add(_encode(self.config) if self.config_bytes is None else self.config_bytes, CONFIG_TYPE)
        self.manifest = {"config": config, **self.manifest}
        self.manifest["config"] = {**config, **self.manifest.get("config", {})}
        data = _encode(self.manifest) if self.manifest_bytes is None else self.manifest_bytes
        entry = self.add(data, MANIFEST_TYPE, {ANNOTATION_REF: VERSION})
        folder = root / "blobs" / "sha256"
        folder.mkdir(parents=True)
        for digest, blob in self.blobs.items():
            (folder / digest.removeprefix("sha256:")).write_bytes(blob)
        (root / "oci-layout").write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}
        (root / "index.json").write_bytes(_encode(index))
        for change in self.after:
            change(folder)
        return str(entry["digest"])


def _encode(value: Json) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# --- one function per way of being wrong -----------------------------------------------------------


def _good(_draft: Draft) -> None:
    pass


def _missing_weights(draft: Draft) -> None:
    draft.after.append(lambda folder: (folder / draft.variant["digest"].removeprefix("sha256:")).unlink())


def _missing_config(draft: Draft) -> None:
    draft.after.append(lambda folder: (folder / draft.manifest["config"]["digest"].removeprefix("sha256:")).unlink())


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _altered_weights(draft: Draft) -> None:
    draft.after.append(lambda folder: _alter(folder / draft.variant["digest"].removeprefix("sha256:")))


def _altered_config(draft: Draft) -> None:
    draft.after.append(lambda folder: _alter(folder / draft.manifest["config"]["digest"].removeprefix("sha256:")))


def _short_weights(draft: Draft) -> None:
    def cut(folder: Path) -> None:
        path = folder / draft.variant["digest"].removeprefix("sha256:")
        path.write_bytes(path.read_bytes()[:-1])

    draft.after.append(cut)


def _foreign_artifact(draft: Draft) -> None:
    draft.manifest["artifactType"] = "application/vnd.oci.image.config.v1+json"


def _foreign_config(draft: Draft) -> None:
    draft.manifest["config"] = {"mediaType": "application/vnd.oci.image.config.v1+json"}


def _future_manifest(draft: Draft) -> None:
    draft.manifest["schemaVersion"] = 3


def _no_json(draft: Draft) -> None:
    draft.manifest_bytes = b"\x08\x03 this is no JSON"


def _nested(draft: Draft) -> None:
    draft.manifest_bytes = b"[" * 20_000


def _weak_digest(draft: Draft) -> None:
    draft.layers[2]["digest"] = "md5:" + "0" * 32


def _path_digest(draft: Draft) -> None:
    draft.layers[2]["digest"] = "sha256:../../../../etc/passwd"


def _oversize_layer(draft: Draft) -> None:
    draft.layers[2]["size"] = BLOB_BYTES_MAX + 1


def _negative_layer(draft: Draft) -> None:
    draft.layers[2]["size"] = -1


def _oversize_config(draft: Draft) -> None:
    draft.manifest["config"] = {"size": CONFIG_BYTES_MAX + 1}


def _encrypted(draft: Draft) -> None:
    draft.layers[0]["annotations"][ANNOTATION_PLAIN_DIGEST] = of_bytes(b"what these bytes are when decrypted")


def _other_size(draft: Draft) -> None:
    draft.layers[2]["size"] += 1


def _config_no_json(draft: Draft) -> None:
    draft.config_bytes = b"variants: [float]"


def _unknown_feature(draft: Draft) -> None:
    draft.config["requires"] = ["time-travel"]


def _future_format(draft: Draft) -> None:
    draft.config["format"] = 2


def _escaping_asset(draft: Draft) -> None:
    tar = draft.add(b"tar", "application/vnd.cncf.model.weight.config.v1.tar")
    draft.layers.append(tar)
    listed = {"path": "labels/../../../etc/cron.d/job", "digest": of_bytes(b"x"), "bytes": 1}
    draft.config["assets"] = {"digest": tar["digest"], "bytes": tar["size"], "files": [listed]}


def _absolute_asset(draft: Draft) -> None:
    _escaping_asset(draft)
    draft.config["assets"]["files"][0]["path"] = "/etc/passwd"


def _licence_missing(draft: Draft) -> None:
    del draft.config["licence"]


def _licence_empty(draft: Draft) -> None:
    draft.config["licence"]["expression"] = " "


def _attribution_empty(draft: Draft) -> None:
    draft.config["licence"]["attribution"] = ""


def _many_vectors(draft: Draft) -> None:
    draft.variant["golden"]["vectors"] = 65


def _no_vectors(draft: Draft) -> None:
    draft.variant["golden"]["vectors"] = 0


def _no_variant(draft: Draft) -> None:
    draft.config["variants"] = []


def _many_variants(draft: Draft) -> None:
    draft.config["variants"] = [{**draft.variant, "id": f"v{n}"} for n in range(VARIANTS_MAX + 1)]


def _twice(draft: Draft) -> None:
    draft.config["variants"] = [draft.variant, draft.variant]


def _no_engine(draft: Draft) -> None:
    draft.variant["engines"] = []


def _unknown_engine(draft: Draft) -> None:
    draft.variant["engines"][0]["name"] = "abacus"


def _stray_layer(draft: Draft) -> None:
    draft.variant["digest"] = of_bytes(b"something that is no layer")


def _other_length(draft: Draft) -> None:
    draft.variant["bytes"] += 1


def _stray_tensor(draft: Draft) -> None:
    draft.variant["tensors"] = {"z": "native_z"}


def _nameless_axis(draft: Draft) -> None:
    draft.config["interface"]["dims"] = {}


def _negative_axis(draft: Draft) -> None:
    draft.config["interface"]["inputs"][0]["shape"] = [-1, 4]


def _stray_state(draft: Draft) -> None:
    draft.config["interface"]["state"] = [{"output": "y", "input": "memory"}]


def _bad_name(draft: Draft) -> None:
    draft.config["model"] = "../model"


def _bad_version(draft: Draft) -> None:
    draft.config["version"] = "one"


def _renamed(draft: Draft) -> None:
    draft.config["version"] = "1.0.1"


class Row(NamedTuple):
    """A bundle and what is said of it; a code that is empty says that this reader has nothing against it."""

    make: Callable[[Draft], None]
    says: str
    reader: str
    """Code of `Layout.verify_all`."""
    server: str
    """Code with which an upload or the release is refused."""
    agent: str
    """Reason with which the courier refuses, in `resolve` or in `fetch`."""
    step: str = "resolve"
    signed: bool = True


INVALID = ("config_invalid", "config_invalid", "bundle_invalid")
MANIFEST = ("manifest_invalid", "manifest_invalid", "bundle_invalid")
FOREIGN = ("manifest_foreign", "manifest_foreign", "bundle_invalid")
DIGEST = ("bad_digest", "bad_digest", "bundle_invalid")

BUNDLES: dict[str, Row] = {
    "good": Row(_good, "nothing is wrong", "", "", ""),
    "unsigned": Row(_good, "no bin names its manifest", "", "unsigned", "trust_unsigned", signed=False),
    "missing-weights": Row(
        _missing_weights, "a layer is not there", "blob_missing", "blob_missing", "network", "fetch"
    ),
    "missing-config": Row(_missing_config, "the config is not there", "blob_missing", "blob_missing", "network"),
    "altered-weights": Row(
        _altered_weights, "a bit of a layer changed", "digest_mismatch", "digest_mismatch", "digest_mismatch", "fetch"
    ),
    "altered-config": Row(
        _altered_config, "a bit of the config changed", "digest_mismatch", "digest_mismatch", "digest_mismatch"
    ),
    "short-weights": Row(
        _short_weights, "the last byte of a layer is gone", "length_mismatch", "digest_mismatch", "network", "fetch"
    ),
    "foreign-artifact": Row(_foreign_artifact, "the artifact is no model", *FOREIGN),
    "foreign-config": Row(_foreign_config, "the config is a container's", *FOREIGN),
    "future-manifest": Row(_future_manifest, "a manifest schema that nobody knows", *FOREIGN),
    "manifest-no-json": Row(_no_json, "the manifest is no JSON", *MANIFEST),
    "manifest-nested": Row(_nested, "the manifest nests 20,000 levels", *MANIFEST),
    "weak-digest": Row(_weak_digest, "a layer is named by md5", *DIGEST),
    "digest-is-a-path": Row(_path_digest, "a digest leads out of the store", *DIGEST),
    "oversize-layer": Row(_oversize_layer, "a layer claims more than 8 GiB", *MANIFEST),
    "negative-layer": Row(_negative_layer, "a layer claims −1 bytes", *MANIFEST),
    "oversize-config": Row(
        _oversize_config, "the config claims more than 4 MiB", "config_too_large", "config_too_large", "bundle_invalid"
    ),
    "encrypted-layer": Row(
        _encrypted,
        "a layer is stored encrypted",
        "layer_encrypted",
        "layer_encrypted",
        "unsupported",
    ),
    "layer-of-another-size": Row(
        _other_size, "a layer claims a byte more than it has", "length_mismatch", "manifest_invalid", ""
    ),
    "config-no-json": Row(_config_no_json, "the config is YAML", *INVALID),
    "unknown-feature": Row(
        _unknown_feature, "it requires what nobody can", "config_requires", "config_requires", "unsupported"
    ),
    "future-format": Row(_future_format, "config format 2", "config_format", "config_format", "unsupported"),
    "asset-escapes": Row(_escaping_asset, "an asset climbs out of its folder", *INVALID),
    "asset-absolute": Row(_absolute_asset, "an asset has an absolute path", *INVALID),
    "licence-missing": Row(_licence_missing, "there is no licence", *INVALID),
    "licence-empty": Row(
        _licence_empty, "the licence is a blank", "licence_missing", "licence_missing", "bundle_invalid"
    ),
    "attribution-empty": Row(
        _attribution_empty, "nobody is named", "licence_missing", "licence_missing", "bundle_invalid"
    ),
    "golden-65": Row(_many_vectors, "65 golden vectors", *INVALID),
    "golden-0": Row(_no_vectors, "no golden vectors", *INVALID),
    "variants-none": Row(_no_variant, "no variant", *INVALID),
    "variants-65": Row(_many_variants, "65 variants", *INVALID),
    "variant-twice": Row(_twice, "two variants of one id", *INVALID),
    "engine-none": Row(_no_engine, "a variant for no engine", *INVALID),
    "engine-unknown": Row(_unknown_engine, "a variant for an engine that nobody has", *INVALID),
    "variant-no-layer": Row(_stray_layer, "a variant that is no layer", *INVALID),
    "variant-of-another-length": Row(_other_length, "a variant and its layer differ in length", *INVALID),
    "tensor-unknown": Row(_stray_tensor, "a variant maps a tensor that the interface lacks", *INVALID),
    "axis-nameless": Row(_nameless_axis, "an axis that dims does not name", *INVALID),
    "axis-negative": Row(_negative_axis, "an axis of −1", *INVALID),
    "state-unknown": Row(_stray_state, "a state pair without its input", *INVALID),
    "name-is-a-path": Row(_bad_name, "a model name with a slash", "bad_name", "bad_name", "bundle_invalid"),
    "version-no-semver": Row(_bad_version, "version “one”", "bad_version", "bad_version", "bundle_invalid"),
    "another-version": Row(_renamed, "signed as 1.0.0, says 1.0.1", "", "bundle_mismatch", "bundle_invalid"),
}


def make(folder: Path) -> dict[str, str]:
    """Write all bundles and the table; return the manifest digest of each."""
    shutil.rmtree(folder, ignore_errors=True)
    digests: dict[str, str] = {}
    table: dict[str, Json] = {}
    for name, row in BUNDLES.items():
        draft = Draft(name)
        row.make(draft)
        digests[name] = draft.write(folder / name)
        refused = {"reader": row.reader, "server": row.server, "agent": row.agent}
        table[name] = {"says": row.says, "signed": row.signed, "manifest": digests[name], **refused}
        if row.agent:
            table[name]["agent_step"] = row.step
    text = json.dumps(table, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")
    return digests


if __name__ == "__main__":
    made = make(Path(sys.argv[1]))
    print(f"{len(made)} bundles in {sys.argv[1]}")  # noqa: T201
