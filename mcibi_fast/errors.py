"""The package's own error and warning; otherwise it raises ValueError, OSError, ImportError."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line that says at which step and why."""


class DataWarning(UserWarning):
    """Data that can be used, but not all of it, or perhaps not as its owner expects."""
