"""Bounds that more than one member obeys: each has a name, a unit and this one home.

Bounds that belong to one member only live in that member's settings.
"""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB

MQTT_PAYLOAD_BYTES_MAX = 100 * 1000
"""One MQTT message (architecture.md §3.10: brokers with a 128 KB cap stay exchangeable)."""

MANIFEST_BYTES_MAX = 1 * MIB
CONFIG_BYTES_MAX = 4 * MIB
"""A signed bundle config; label lists are the bulk of it."""
BLOB_BYTES_MAX = 8 * 1024 * MIB
TILE_BYTES = 256 * KIB
"""Content of one tile of an encrypted blob: 16 bytes more each, and what a range decrypts at most too much at either end."""
TILE_BYTES_MIN = 4 * KIB
TILE_BYTES_MAX = 16 * MIB
VARIANTS_MAX = 64
TENSORS_MAX = 256
TENSOR_RANK_MAX = 16

GOLDEN_VECTORS_MAX = 64
GOLDEN_BYTES_MIN_BUDGET = 256 * 1000
"""Golden vectors of a variant may take max(this, 10 % of the variant) bytes, compressed (contracts.md §7)."""
GOLDEN_SHARE_OF_VARIANT = 0.10
GOLDEN_DECODED_BYTES_MAX = 64 * MIB
GOLDEN_TEXTS_MAX = 1 << 20
"""Elements of text in all golden vectors of a variant: each costs some 50 bytes more decoded than encoded."""

ASSETS_BYTES_MAX = 64 * MIB
"""Assets are labels and tables; one of them is in memory at a time."""
ASSETS_FILES_MAX = 1000
ASSET_PATH_CHARS_MAX = 255

ZSTD_WINDOW_BYTES_MAX = 8 * MIB
"""A device must be able to decode what a server encodes: zstd windows stay at or below this."""

TUF_ROOT_BYTES_MAX = 512 * KIB
TUF_METADATA_BYTES_MAX = 2 * MIB

STREAM_IN_FLIGHT_MAX = 20
"""Unacknowledged messages that a device keeps on the way, per stream (contracts.md §3)."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
"""Environment (bytes, arenas) of processes that run engines: only with it do they give memory back (contracts.md §6)."""

REQUEST_BYTES_MAX = 64 * MIB
"""One local inference request."""
REPORT_DETAIL_CHARS_MAX = 500
LOG_LINES_MAX = 200

METRICS_PER_WINDOW_MAX = 8
"""Names under which an application tells numbers about one model."""
METRIC_NAME_PATTERN = "[a-z][a-z0-9_.-]{0,39}"
"""What such a name may be."""
METRIC_NAME = re.compile(METRIC_NAME_PATTERN)
METRIC_VALUE_MAX = 1e12
"""One such number, above or below 0."""

SAMPLE_BYTES_MAX = 16 * KIB
"""All input tensors of one sample, raw."""
SAMPLES_PER_WINDOW_MAX = 2
"""Samples of one telemetry window: with their base64 and the window's sketches they fit a message."""
SAMPLE_SHARE_MAX = 0.1
"""Share of a model's requests that may be asked for."""
