"""The closed family of errors, split by whose fault it is.

Every error speaks twice: `str(error)` is one line for the log, `diagnostics()` is cause, consequence and next step for
the person. `code` is stable: reports, API problems and tests compare it, and nothing parses the message.
"""

from __future__ import annotations


class WherryError(Exception):
    """Anything that Wherry refuses, cannot reach or cannot do, with a stable `code`."""

    def __init__(self, code: str, message: str, *, consequence: str = "", next_step: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.consequence = consequence
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def sentence(self, chars_max: int = 0) -> str:
        """Return cause, consequence and next step in one line, for a caller who gets one text; 0: however long."""
        words = [f"{word}: {text}" for word, text in (("so", self.consequence), ("next", self.next_step)) if text]
        tail = f" ({'; '.join(words)})" if words else ""
        return f"{self.message[: max(chars_max - len(tail), 0)] if chars_max else self.message}{tail}"

    def diagnostics(self) -> str:
        """Return cause, consequence and next step, each on a line of its own."""
        lines = [f"error: {self.message} [{self.code}]"]
        if self.consequence:
            lines.append(f"so:    {self.consequence}")
        if self.next_step:
            lines.append(f"next:  {self.next_step}")
        return "\n".join(lines)


class RefusedError(WherryError):
    """What we were given is bad: malformed, unsigned, altered, out of bounds. Trying again changes nothing."""


class UnreachableError(WherryError):
    """Somebody else did not answer, or not in time. Trying again may help."""


class DeviceError(WherryError):
    """This machine cannot: disk full, engine missing, clock unset, memory short."""
