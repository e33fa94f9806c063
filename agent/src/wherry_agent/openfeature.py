"""An OpenFeature provider for the feature flags of this device (`wherry-agent[openfeature]`).

    from openfeature import api
    from wherry_agent.openfeature import WherryProvider

    api.set_provider_and_wait(WherryProvider())
    client = api.get_client()
    client.get_boolean_value("night-mode", False)

The server decides which value this device has; the provider answers with it, for every evaluation context, also offline.
Values are pushed when they change (`PROVIDER_CONFIGURATION_CHANGED` names the keys). When the supervisor goes away the
last known values stay (`PROVIDER_STALE`, reason CACHED) until it is back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEventDetails
from openfeature.exception import ErrorCode, FlagNotFoundError, ProviderNotReadyError, TypeMismatchError
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.provider import AbstractProvider, Metadata

from wherry_agent.flag_source import FlagSource
from wherry_shared.errors import WherryError

VARIANT = "assigned"
"""The one variant that a device has of each flag."""


class WherryProvider(AbstractProvider):
    """Resolves flags from the agent on this device. Thread-safe."""

    def __init__(self, socket: str | Path | None = None, *, timeout_s: float = 5.0) -> None:
        """Prepare; the OpenFeature API calls `initialize`.

        Args:
            socket: the supervisor's unix socket; default `$WHERRY_HANDLE_SOCKET`, then `/var/lib/wherry/run/handle.sock`.
            timeout_s: how long `initialize` waits for the first values.
        """
        super().__init__()
        self._timeout_s = timeout_s
        self._source = FlagSource(socket, on_change=self._changed, on_link=self._linked)
        self._degraded = False
        """Not ready, or stale, as far as the API was told."""

    def get_metadata(self) -> Metadata:
        """Return the provider's name."""
        return Metadata(name="wherry")

    def initialize(self, evaluation_context: EvaluationContext) -> None:
        """Connect to the supervisor; it goes on trying when nobody answers in time, and says so when it is ready.

        Raises:
            ProviderNotReadyError: no supervisor answered.
        """
        self._source.start()
        try:
            self._source.wait(self._timeout_s)
        except WherryError as error:
            self._degraded = True
            raise ProviderNotReadyError(error.message) from error

    def shutdown(self) -> None:
        """Disconnect."""
        self._source.close()

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """Return a flag whose value is a bool."""
        return self._resolve(flag_key, bool, "a bool")

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        """Return a flag whose value is a str."""
        return self._resolve(flag_key, str, "a str")

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        """Return a flag whose value is an int."""
        return self._resolve(flag_key, int, "an int")

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        """Return a flag whose value is a float; an int is one too."""
        found: FlagResolutionDetails[float] = self._resolve(flag_key, (int, float), "a float")
        found.value = float(found.value)
        return found

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Return a flag whose value is an object; the caller may change what it gets."""
        found = self._resolve(flag_key, dict, "an object")
        found.value = copy.deepcopy(found.value)
        return found

    # -- inside ----------------------------------------------------------------------------------

    def _resolve(self, key: str, kind: type[Any] | tuple[type[Any], ...], name: str) -> FlagResolutionDetails[Any]:
        values, live = self._source.values, self._source.live
        if key not in values:
            raise FlagNotFoundError(f"this device has no flag {key!r}")
        value = values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeMismatchError(f"flag {key!r} is {type(value).__name__}, not {name}")
        return FlagResolutionDetails(value=value, reason=Reason.STATIC if live else Reason.CACHED, variant=VARIANT)

    def _changed(self, keys: list[str]) -> None:
        self.emit_provider_configuration_changed(ProviderEventDetails(flags_changed=keys))

    def _linked(self, live: bool) -> None:
        if not live:
            self._degraded = True
            gone = "the agent is gone; flags have their last known values"
            self.emit_provider_stale(ProviderEventDetails(message=gone, error_code=ErrorCode.GENERAL))
        elif self._degraded:
            self._degraded = False
            self.emit_provider_ready(ProviderEventDetails())
