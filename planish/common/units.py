"""Bytes, seconds, shares and perplexities as people read them."""

import math


def size(count: float) -> str:
    """Bytes in decimal units: 164.9 MB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 45 s, 2 min 05 s or 3 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(count: int, what: str) -> str:
    """1 thread, 2 threads."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def change(share: float) -> str:
    """+1.2%."""
    return f"{share:+.1%}" if math.isfinite(share) else "–"


def perplexity(value: float) -> str:
    """Two decimals, fewer where there are many digits before them; NaN."""
    return "NaN" if math.isnan(value) else f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"
