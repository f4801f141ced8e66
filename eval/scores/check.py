"""What a verification finds: checks with figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Figure = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Check:
    """One check. ok None: not done, and message says why. figures: what was measured, by name."""

    name: str
    ok: bool | None
    message: str
    figures: Mapping[str, Figure]

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {"name": self.name, "ok": self.ok, "message": self.message, "figures": dict(self.figures)}


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one checkpoint."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. Those that were not done do not count."""
        return not any(check.ok is False for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return {"folder": str(self.folder), "ok": self.ok, "checks": [check.to_dict() for check in self.checks]}


def not_done(name: str, reason: str) -> Check:
    """A check that was left out."""
    return Check(name, None, f"not checked: {reason}", {})


def listed(faults: Sequence[str], most: int = 5) -> str:
    """Faults in one message, the first ones in full."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
