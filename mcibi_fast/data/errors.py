"""The error that bad data raises."""

from __future__ import annotations

from mcibi_fast.terminal import LONGEST_COMPLAINT, printable


class DataError(ValueError):
    """Data on disk that cannot be used; the message is one line with the file and what to do.

    A data loader's worker passes an exception on as the text of its traceback, of which only the
    last line, the message itself, is kept.
    """

    def __init__(self, message: str) -> None:
        text = message.rsplit("DataError: ", 1)[-1].strip()
        super().__init__(printable(text, longest=LONGEST_COMPLAINT))
