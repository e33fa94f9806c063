"""What can go wrong in an engine, split by whose fault it is: only `EngineFault` is evidence against a model."""

from __future__ import annotations

from wherry_shared.errors import DeviceError, RefusedError


class BadInput(RefusedError):  # noqa: N818 - the contract's word
    """The caller's fault: wrong name, datatype, shape or size. Never evidence against the model."""

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(
            "bad_input",
            message,
            consequence="the model was not run",
            next_step=next_step or "compare the request with the model's metadata",
        )


class EngineFault(DeviceError):  # noqa: N818 - the contract's word
    """The model or its engine failed on input that the interface allows: evidence against this variant here."""

    def __init__(self, code: str, message: str, *, consequence: str = "", next_step: str = "") -> None:
        super().__init__(code, message, consequence=consequence, next_step=next_step)


class OutOfMemory(EngineFault):
    """An allocation failed while loading or running."""

    def __init__(self, message: str) -> None:
        super().__init__("out_of_memory", message, consequence="the model was not run to its end")
