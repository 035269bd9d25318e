"""What the package raises besides ValueError, OSError and ImportError."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says at which step and why."""
