"""The package's own error; otherwise it raises ValueError, OSError and ImportError."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line that says at which step and why."""
