"""Reads files that others may have made, and accepts only data of a limited size in them.

The limits are those of `mcibi_fast.limits`.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import pickletools
import stat
import zipfile
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mcibi_fast.limits import check_limit, limit

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# What files of torch.save need to describe tensors; nothing else may be called to read them.
# torch's own list has more functions, some of which fill the memory if given a large number.
_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "collections Counter",
        "torch Size",
        "torch device",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
    }
)
_LEGACY_PICKLES = 5  # magic number, version, system, the object, and the names of its storages


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read.

    Raises OSError as `open` does, and also for anything but a regular file: opening a FIFO can wait
    forever, and a device may never end. Links are followed.
    """
    _check_regular(os.stat(path), path)
    # The file may have been exchanged since the check, so opening must not wait for a FIFO either.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit_name: str) -> bytes:
    """The content of a regular file, see `open_regular`.

    Args:
        path: path of the file, or of a link to it.
        limit_name: name of the limit of its bytes.

    Raises:
        ValueError: it is longer than the limit.
        OSError: it is not a regular file, or cannot be read; the message names it.
    """
    with open_regular(path) as file:
        content = file.read(limit(limit_name) + 1)
        check_limit(
            limit_name, len(content), f"{path}: has {os.fstat(file.fileno()).st_size:,} bytes"
        )
    return content


def read_json(path: Path) -> Any:
    """The content of a small JSON file. Raises ValueError or OSError with the file's name."""
    content = read_bytes(path, "MAX_JSON_BYTES")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; restore it from a copy") from error


def parse_json(content: bytes | str) -> Any:
    """The content of a JSON text. Raises ValueError if it is not JSON or nested too deeply."""
    text = decode_text(content) if isinstance(content, bytes) else content
    if not text.strip():
        raise ValueError("not JSON (nothing is in it)")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise ValueError(f"not JSON ({shorten(error)}{'; it is cut off' * cut})") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({shorten(error)})") from error


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: it is in another encoding, such as Latin-1; the caller must add the file's name.
    """
    marks = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # begin as UTF-16's do
    encoding = "utf-8-sig"
    if content.startswith(marks):
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not a text file in UTF-8 ({shorten(error)}); save it as UTF-8"
        ) from error
    if 4 * text.count("\0") > len(text):
        raise ValueError(
            "not a text file in UTF-8 (it is full of zero bytes, as UTF-16 is); save it as UTF-8"
        )
    return text


def shorten(error: Exception | str, longest: int = 200) -> str:
    """What an error says, in one line of about ``longest`` characters: it may quote the file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


def read_torch(path: Path, *, also: Collection[type] = ()) -> Any:
    """The content of a file of ``torch.save``.

    It may hold tensors, numbers and texts in dictionaries, lists and tuples. Nothing in the file is
    executed, and it cannot take much more memory than its size.

    Args:
        path: path of the file.
        also: further classes that are allowed, such as ``argparse.Namespace``; their instances must
            not hold tensors.

    Raises:
        ValueError: the reason in one line; the caller must add the file's name.
    """
    import torch

    try:
        with open_regular(path) as file:
            allowed = {f"{each.__module__} {each.__qualname__}" for each in also}
            for pickled in _pickles(file):
                _check_pickle(pickled, allowed)
            file.seek(0)
            with torch.serialization.safe_globals(list(also)):
                content = torch.load(file, map_location="cpu", weights_only=True)
        check_tensors(content)
    except OSError:
        raise
    except Exception as error:  # reading damaged files can raise any error
        raise ValueError(shorten(_first_line(error), 500)) from error
    return content


def check_tensors(content: Any) -> None:
    """Checks that tensors hold as many values as their shapes say.

    A file of a few bytes can hold a single value with any shape (by strides of 0); copying such a
    tensor would fill the memory.

    Args:
        content: tensors in mappings, lists and tuples.

    Raises:
        ValueError: a tensor has too few values, or there are too many entries.
    """
    from torch import Tensor

    pending, seen, most = [content], 1, limit("MAX_ENTRIES")
    stored: dict[int, int] = {}
    read = 0
    while pending:
        item = pending.pop()
        children: Any = ()
        if isinstance(item, Tensor):
            read += _tensor_bytes(item)
            storage = item.untyped_storage()
            stored[storage._cdata] = storage.nbytes()
        elif isinstance(item, Mapping):
            children = item.values()  # keys are texts and numbers
        elif isinstance(item, (list, tuple, set, frozenset)):
            children = item
        seen += len(children)
        if seen > most:  # this also ends the loop if a container holds itself
            check_limit("MAX_ENTRIES", seen, f"it holds {seen:,} entries or more")
        pending.extend(children)
    own = sum(stored.values())
    if read:
        sharing = read / own
        check_limit(
            "MAX_SHARING", sharing, f"its tensors have {sharing:.3g} times the {own:,} bytes in it"
        )


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def _tensor_bytes(tensor: Tensor) -> int:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError(f"it holds a tensor of another kind ({tensor.layout}, {tensor.dtype})")
    size = tensor.numel() * tensor.element_size()
    if size > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"it holds a tensor of shape {tuple(tensor.shape)} with "
            f"{tensor.untyped_storage().nbytes() // tensor.element_size():,} values"
        )
    return size


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """The pickles in a file of torch.save; each is read from the present position on."""
    if file.read(4) != b"PK\x03\x04":
        file.seek(0)
        # A copy, as reading from a file allocates as much as a pickle says that it needs.
        start = BytesIO(file.read(_LEGACY_PICKLES * limit("MAX_PICKLE_BYTES")))
        yield from (start for _ in range(_LEGACY_PICKLES))
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.lower() for member in members]
        # Another reader could take other members from such an archive.
        if len(set(names)) < len(names) or min(member.header_offset for member in members):
            raise ValueError("it is no archive of torch.save")
        if any(
            member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size
            for member in members
        ):
            raise ValueError("it is compressed, which torch.save does not do")
        for member in members:
            if not member.filename.lower().endswith(".pkl"):
                continue
            size = member.file_size
            check_limit("MAX_PICKLE_BYTES", size, f"{member.filename} in it has {size:,} bytes")
            yield BytesIO(archive.read(member))


def _check_pickle(pickled: BinaryIO, allowed: Collection[str]) -> None:
    """Reads a pickle to its end and raises if it does more than describe tensors."""
    start, most = pickled.tell(), limit("MAX_PICKLE_BYTES")
    for code, argument, position in pickletools.genops(pickled):
        size = (position or 0) - start
        if size > most:
            check_limit("MAX_PICKLE_BYTES", size, f"it has {size:,} bytes or more")
        if code.name == "GLOBAL" and not (
            argument in _GLOBALS or argument in allowed or _is_type(str(argument))
        ):
            raise ValueError(f"it holds {argument!r}, which is no part of a file of weights")


def _is_type(name: str) -> bool:
    """Whether it is a type of torch, such as "torch FloatStorage" or "torch float32"."""
    import torch

    module, _, last = name.partition(" ")
    is_storage = last.endswith("Storage") and last not in ("TypedStorage", "UntypedStorage")
    return module == "torch" and (is_storage or isinstance(vars(torch).get(last), torch.dtype))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
