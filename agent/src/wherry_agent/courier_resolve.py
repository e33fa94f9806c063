"""From an offered release to the variants that this device may try: signed target → manifest → config → ranking.

Nothing is believed that a digest or a signature does not say; weights are not touched here.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from wherry_agent.children import Candidate, Loadable, Resolve, Trust
from wherry_agent.courier_blobs import Blobs
from wherry_agent.store import Store
from wherry_agent.trust import Keeper, Policy, Session
from wherry_shared import facts as device_facts
from wherry_shared import ids, operations, reasons
from wherry_shared.bundle import (
    Config,
    Manifest,
    Variant,
    encrypted_layers,
    incompatibilities,
    parse_config,
    parse_manifest,
)
from wherry_shared.errors import RefusedError, UnreachableError
from wherry_shared.image_layout import check_layers
from wherry_shared.wire import VariantTried

MODES = frozenset({"replace", "shadow", "split", "blue_green"})
"""Modes that bring a bundle to a device."""


def check_offered(task: Resolve) -> tuple[str, str]:
    """Return (model, version) of the offered target.

    Raises:
        RefusedError: `offer_invalid` or `unsupported`.
    """
    if task.offered.mode not in MODES:
        raise RefusedError(reasons.UNSUPPORTED, f"mode {task.offered.mode} of {task.model}")
    try:
        model, version = ids.split_target(task.offered.target)
    except RefusedError as error:
        raise RefusedError(reasons.OFFER_INVALID, error.message) from error
    if model != task.model:
        raise RefusedError(reasons.OFFER_INVALID, f"target {task.offered.target} is offered for model {task.model}")
    return model, version


def release(task: Resolve, keeper: Keeper) -> tuple[int, Trust]:
    """Check that the offered manifest is signed, not below the floor and not revoked; (manifest bytes, trust).

    Without a network an unexpired set on this device will do, if it holds the answer.

    Raises:
        RefusedError: `trust_unsigned`, `below_floor`, `revoked`, `trust_*`.
        UnreachableError: `network`.
        DeviceError: `disk_full` or `disk`.
    """
    try:
        with keeper.online() as session:
            return _release(task, session), keeper.commit(session)
    except UnreachableError as unreachable:
        try:
            with keeper.offline() as session:
                return _release(task, session), keeper.commit(session)
        except UnreachableError:
            raise unreachable from None
        except RefusedError as error:
            if error.code == reasons.TRUST_EXPIRED:  # what is missing is the network, not a better repository
                raise unreachable from None
            raise


def _release(task: Resolve, session: Session) -> int:
    model, version = check_offered(task)
    found = session.manifest_of(task.offered.target)
    if found is None:
        raise RefusedError(reasons.TRUST_UNSIGNED, f"no publisher signed {task.offered.target}")
    manifest, length = found
    if manifest != task.offered.manifest:
        raise RefusedError(
            reasons.TRUST_UNSIGNED,
            f"{task.offered.target} is signed as {manifest}, offered as {task.offered.manifest[:80]}",
        )
    _check_policy(session.policy(model), task.offered.target, version, manifest)
    return length


def _check_policy(policy: Policy, target: str, version: str, manifest: str) -> None:
    if policy.floor and ids.parse_version(version).key < ids.parse_version(policy.floor).key:
        raise RefusedError(reasons.BELOW_FLOOR, f"{target} is below the publisher's floor {policy.floor}")
    if manifest in policy.revoked:
        raise RefusedError(reasons.REVOKED, f"{target} was revoked by its publisher")


def config_of(blobs: Blobs, manifest_digest: str, manifest_bytes: int) -> tuple[Manifest, Config]:
    """Return manifest and config of a bundle, fetched and cross-checked.

    Raises:
        RefusedError: `manifest_*`, `config_*`, `digest_mismatch`.
        UnreachableError: `network`.
        DeviceError: `disk_full` or `disk`.
    """
    manifest = parse_manifest(blobs.small(manifest_digest, manifest_bytes))
    config = parse_config(blobs.small(manifest.config.digest, manifest.config.size))
    check_layers(manifest, config)
    return manifest, config


def candidates(
    task: Resolve, manifest: Manifest, config: Config, store: Store, *, note: Callable[[str], None]
) -> tuple[list[Candidate], list[VariantTried]]:
    """Rank what fits this device; (candidates in order, what was passed over and why).

    Raises:
        RefusedError: `bundle_invalid` (not what its target says), `contract_broken`, `unsupported` (an operation that is
            not known here) or `no_variant`.
    """
    model, version = check_offered(task)
    if (config.model, config.version) != (model, version):
        raise RefusedError(
            reasons.BUNDLE_INVALID, f"{task.offered.target} holds the bundle {config.model} {config.version}"
        )
    if task.contract is not None:
        broken = incompatibilities(
            task.contract,
            config.interface,
            contract_preprocess=task.contract_preprocess,
            offered_preprocess=config.preprocess.id,
            declared=task.contract_declared,
        )
        if broken:
            raise RefusedError(reasons.CONTRACT_BROKEN, "; ".join(broken))
    _check_processing(config)
    try:
        facts = msgspec.convert(task.facts, device_facts.DeviceFacts)
    except msgspec.ValidationError as error:
        raise RuntimeError(f"the supervisor sent facts that are none: {error}") from error
    ranked = device_facts.rank(config, facts, task.offered.figures)
    fitting = {item.variant.id for item in ranked}
    passed_over = [
        VariantTried(
            id=variant.id,
            digest=variant.digest,
            outcome="misfit",
            reason=reasons.NO_VARIANT,
            why="; ".join(device_facts.misfits(variant, facts)),
        )
        for variant in config.variants
        if variant.id not in fitting
    ]
    if not ranked:
        why = "; ".join(f"{item.id}: {item.why}" for item in passed_over)
        raise RefusedError(reasons.NO_VARIANT, f"no variant of {task.offered.target} fits this device: {why}")
    note(f"{task.offered.target}: {', '.join(item.variant.id for item in ranked)} fit")
    return [_candidate(task, manifest, config, store, item) for item in ranked], passed_over


def _check_processing(config: Config) -> None:
    """Refuse operations that an application's handle here could not run as the publisher means them."""
    try:
        operations.steps_of(config.preprocess, config.interface, "preprocess")
        operations.steps_of(config.postprocess, config.interface, "postprocess")
    except RefusedError as error:
        code = reasons.UNSUPPORTED if error.code == "operation_unknown" else reasons.BUNDLE_INVALID
        raise RefusedError(code, error.message) from error


def at_rest(manifest: Manifest, digest: str) -> str:
    """Return the digest of the bytes that are fetched and kept for a blob that the config names."""
    layer = encrypted_layers(manifest).get(digest)
    return layer.digest if layer is not None else digest


def wanted_blobs(manifest: Manifest, config: Config, variant: Variant) -> dict[str, int]:
    """Return what a variant needs in the store: digest → bytes."""
    encrypted = encrypted_layers(manifest)
    wanted = {}
    for digest, length in ((variant.golden.digest, variant.golden.bytes), (variant.digest, variant.bytes)):
        layer = encrypted.get(digest)
        wanted[layer.digest if layer is not None else digest] = layer.size if layer is not None else length
    if config.assets is not None:
        wanted[config.assets.digest] = config.assets.bytes
    return wanted


def _candidate(task: Resolve, manifest: Manifest, config: Config, store: Store, item: device_facts.Ranked) -> Candidate:
    variant = item.variant
    wanted = wanted_blobs(manifest, config, variant)
    weights, golden = at_rest(manifest, variant.digest), at_rest(manifest, variant.golden.digest)
    loadable = Loadable(
        model=task.model,
        target=task.offered.target,
        manifest=task.offered.manifest,
        variant=variant.id,
        digest=variant.digest,
        engine=item.engine.name,
        engine_version=item.engine.version,
        format=variant.format,
        path=str(store.path_of(weights)),
        at_rest=weights if weights != variant.digest else "",
        golden_path=str(store.path_of(golden)),
        golden_plain=variant.golden.digest if golden != variant.golden.digest else "",
        config_path=str(store.path_of(manifest.config.digest)),
        interface=config.interface,
        assets_path=str(store.assets_of(config.assets.digest)) if config.assets is not None else "",
        tensors=variant.tensors,
        options=variant.options,
        batch=variant.batch,
        preprocess=config.preprocess,
        postprocess=config.postprocess,
    )
    missing = sum(length for digest, length in wanted.items() if not store.has(digest, length))
    return Candidate(loadable=loadable, bytes=missing, why=item.why)
