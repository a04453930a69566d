"""Words and figures for people: phases of a start, reasons of an end, durations, sizes. PURE.

What has no entry is shown with its underscores as spaces, so that a new identifier is never a fault.
"""

from __future__ import annotations

from collections.abc import Mapping

PHASES: Mapping[str, str] = {
    "waiting_for_gpu": "waiting for the GPU",
    "starting": "starting",
    "boot": "starting the engine",
    "configure": "reading the configuration",
    "download": "downloading",
    "load": "loading the model",
    "weights": "loading weights",
    "compile": "compiling",
    "profile": "measuring memory",
    "capture": "capturing graphs",
    "warm_up": "warming up",
    "serve": "opening its door",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
REASONS: Mapping[str, str] = {
    "operator": "asked to",
    "boot_timeout": "took too long to start",
    "unhealthy": "no longer healthy",
    "wake_failed": "did not wake",
    "died": "died",
}


def phase(name: str | None) -> str:
    """A phase of a start in words."""
    return PHASES.get(name or "starting", words(name or ""))


def reason(name: str | None) -> str:
    """Why a launch is stopping, in words."""
    return REASONS.get(name or "operator", words(name or ""))


def words(identifier: str) -> str:
    return identifier.replace("_", " ")


def duration(seconds: float) -> str:
    """Two units at most: ``0.4 s``, ``42 s``, ``3 m 12 s``, ``2 h 5 m``, ``4 d 1 h``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {smaller_name}"
    return f"{whole} s"


def short(milliseconds: float) -> str:
    """A duration that is often below a second: ``0 ms``, ``0.4 ms``, ``42 ms``, ``3.1 s``, ``2 m 5 s``."""
    if 0 < milliseconds < 1:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else duration(milliseconds / 1000)


def time_left(eta_s: float) -> str:
    """How long something will still take, by earlier times; 0 is what takes longer than it did then."""
    return f"about {duration(eta_s)} left" if eta_s > 0 else "longer than last time"


def size(count: int | None) -> str:
    """Bytes in binary units with three digits or so; ``-`` for what is not known."""
    if count is None:
        return "-"
    value, units = float(count), list(_UNITS)
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


def tokens_per_second(tokens: int | None, duration_ms: float, before_ms: float) -> float | None:
    """How fast an answer was made, once it had begun; None where that cannot be said."""
    made_in_s = (duration_ms - before_ms) / 1000
    return tokens / made_in_s if tokens and made_in_s > 0 else None


def percent(fraction: float | None) -> str:
    """Whole per cent; of less than one its first digit, because a little is not nothing."""
    if fraction is None:
        return "-"
    return f"{fraction * 100:.1g} %" if 0 < fraction < 0.01 else f"{fraction * 100:.0f} %"
