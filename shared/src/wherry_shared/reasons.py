"""Reason codes that devices report and operators read. Stable: never rename one, only add.

Only *verdicts* are evidence against a variant and are remembered as known-bad; everything else is trouble around it
(disk, network, trust, clock) and says nothing about the model.
"""

from __future__ import annotations

# Verdicts: the variant itself failed on this device.
GOLDEN_MISS = "golden_miss"
CRASH = "crash"
OVER_MEMORY = "over_memory"
TIMEOUT = "timeout"
HEALTH_ERRORS = "health_errors"
HEALTH_LATENCY = "health_latency"
HEALTH_GOLDEN = "health_golden"
HEALTH_AGREEMENT = "health_agreement"
"""A shadow's answers differ from the incumbent's more often than its terms allow."""
APPLICATION = "application"
LOAD_FAILED = "load_failed"
DEVICE_DOWN = "device_down"
"""The device, or its agent, went down as often as the terms allow while this alone was tried, and does not otherwise."""

VERDICTS = frozenset(
    {
        GOLDEN_MISS,
        CRASH,
        OVER_MEMORY,
        TIMEOUT,
        HEALTH_ERRORS,
        HEALTH_LATENCY,
        HEALTH_GOLDEN,
        HEALTH_AGREEMENT,
        APPLICATION,
        LOAD_FAILED,
        DEVICE_DOWN,
    }
)
"""Reasons that make a variant known-bad (architecture.md §3.8: golden, crash, memory, health)."""
OF_THE_BUNDLE = frozenset({GOLDEN_MISS, HEALTH_ERRORS, HEALTH_GOLDEN, HEALTH_AGREEMENT, APPLICATION})
"""Verdicts on a file together with what its bundle says of it (golden vectors, processing, labels), which a later release may mend.

The others are verdicts on the file with its engine, whatever bundle it comes in.
"""

# The bundle cannot be used here, without having been tried.
KNOWN_BAD = "known_bad"
NO_VARIANT = "no_variant"
CONTRACT_BROKEN = "contract_broken"
UNSUPPORTED = "unsupported"
BUNDLE_INVALID = "bundle_invalid"

UNUSABLE = frozenset({KNOWN_BAD, NO_VARIANT, CONTRACT_BROKEN, UNSUPPORTED, BUNDLE_INVALID})

# Trouble around the model: never evidence against it.
DISK_FULL = "disk_full"
DISK = "disk"
NETWORK = "network"
DIGEST_MISMATCH = "digest_mismatch"
KEY_MISSING = "key_missing"
"""The bundle is encrypted, and this device has no content key for it, or none that opens it."""
ALTERED = frozenset({DISK, DIGEST_MISMATCH, KEY_MISSING})
"""A file on the device is not what was verified: another try loads the same bytes, fetching it again mends it."""
TRUST_UNSIGNED = "trust_unsigned"
TRUST_EXPIRED = "trust_expired"
TRUST_ROLLBACK = "trust_rollback"
TRUST_INVALID = "trust_invalid"
TRUST_STALE = "trust_stale"
BELOW_FLOOR = "below_floor"
REVOKED = "revoked"
CLOCK_UNSET = "clock_unset"
ENROL_REFUSED = "enrol_refused"
OFFER_EXPIRED = "offer_expired"
OFFER_INVALID = "offer_invalid"
OFFER_FOREIGN = "offer_foreign"
OFFER_OLD = "offer_old"
CHILD_FAILED = "child_failed"
READ_ONLY = "read_only"
"""The disk takes no writes; what is installed serves on."""
ENGINE_MISSING = "engine_missing"
"""The engine that ran a version here does not load any more."""
ENGINE_CHANGED = "engine_changed"
"""The engine was replaced under a version that had been proved with the one before."""
CONDITIONS = "conditions"
"""A download waits for what the device's settings ask: network, power, temperature, or the maintenance window."""
MEMORY_SHORT = "memory_short"
"""A mode that needs both versions in memory does not fit on this device now."""
PUT_BACK = "put_back"
"""The home of this device was put back as it once was: the server knows reports that it has not made yet."""

# Ends that are nobody's fault.
WITHDRAWN = "withdrawn"
SUPERSEDED = "superseded"
GROUP = "group"
"""Another model of the same atomic group did not come through."""
RESTARTS = "restarts"
"""The device restarted too often while a candidate was tried, and so it does without one, or nobody knows for which
candidate: counted, returned, not held against the variant."""

NEUTRAL = frozenset(
    {
        DISK_FULL,
        DISK,
        NETWORK,
        DIGEST_MISMATCH,
        TRUST_UNSIGNED,
        TRUST_EXPIRED,
        TRUST_ROLLBACK,
        TRUST_INVALID,
        TRUST_STALE,
        BELOW_FLOOR,
        REVOKED,
        CLOCK_UNSET,
        ENROL_REFUSED,
        OFFER_EXPIRED,
        OFFER_INVALID,
        OFFER_FOREIGN,
        OFFER_OLD,
        CHILD_FAILED,
        READ_ONLY,
        ENGINE_MISSING,
        ENGINE_CHANGED,
        CONDITIONS,
        MEMORY_SHORT,
        PUT_BACK,
        KEY_MISSING,
        WITHDRAWN,
        SUPERSEDED,
        GROUP,
        RESTARTS,
    }
)
"""Reasons that say nothing against a bundle. Every code is in one of `VERDICTS`, `UNUSABLE` and `NEUTRAL`."""
