"""The error that bad data raises."""

from __future__ import annotations

from mcibi_fast.terminal import printable


class DataError(ValueError):
    """Data on disk that cannot be used. The message is one line that names the file and the cure.

    A data loader's worker hands an exception over as the text of its traceback; the line that
    counts is the last one, and only that is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message.rsplit("DataError: ", 1)[-1].strip()))
