"""Files in folders and zip files."""

from __future__ import annotations

import os
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from mcibi_fast.data import DataError
from mcibi_fast.data.archives import Files
from tests.data.trees import pack


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "x.bin").write_bytes(bytes(range(256)) * 50)
    (folder / "a" / "list.txt").write_text("\ufeffone\r\n\n  two \n", encoding="utf-8")
    return folder


@pytest.fixture(params=["folder", "zip", "folder of a zip", "zip below a folder"])
def files(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Files:
    if request.param == "folder":
        return Files(tree)
    within = "top/" if "below" in request.param else ""
    (tmp_path / "zips").mkdir()
    archive = pack(tree, tmp_path / "zips" / "data.zip", within=within)
    return Files(archive.parent if request.param.startswith("folder") else archive)


def test_a_folder_and_its_zip_file_read_alike(files: Files) -> None:
    place = files.locate("a/b")
    assert place.endswith("a/b")
    assert files.names(place) == ["x.bin"]
    assert files.read(f"{place}/x.bin") == bytes(range(256)) * 50
    assert files.lines(files.locate("list.txt")) == ["one", "two"]
    assert files.find("nothing", "b") is not None
    assert files.find("nothing", "nothing.txt") is None
    assert files.names("nothing") == []
    with pytest.raises(DataError, match="no nothing in it; expected the dataset"):
        files.locate("nothing")
    with pytest.raises(DataError, match=r"a/gone\.bin: missing; expected"):
        files.read("a/gone.bin")


def test_parts_may_lie_in_a_folder_and_several_zip_files(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "c").mkdir(parents=True)
    (other / "c" / "y.txt").write_text("y")
    pack(other, tree / "other.ZIP")
    files = Files(tree)
    assert files.read(f"{files.locate('a/b')}/x.bin")
    assert files.read(f"{files.locate('c')}/y.txt") == b"y"
    assert files.describe("c/y.txt") == "other.ZIP/c/y.txt"
    assert files.describe("a/b/x.bin") == "a/b/x.bin"


def test_hidden_files_are_no_part_of_a_dataset(tree: Path, tmp_path: Path) -> None:
    """What a Mac leaves beside each file on a foreign disk."""
    (tree / "a" / "b" / "._x.bin").write_bytes(b"")
    for root in (tree, pack(tree, tmp_path / "t.zip")):
        files = Files(root)
        assert files.names(files.locate("a/b")) == ["x.bin"]


def test_names_are_matched_whole(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, tmp_path / "t.zip", within="ya/")
    assert Files(archive).find("a") == "ya/a"
    assert Files(archive).find("b") == "ya/a/b"
    assert Files(tree).find("ist.txt") is None


@pytest.fixture
def zipped(tree: Path, tmp_path: Path) -> Files:
    """20 members of 200 kB, the file open in this process."""
    for i in range(20):
        (tree / f"{i}.bin").write_bytes(bytes([i]) * 200_000)
    files = Files(pack(tree, tmp_path / "t.zip"))
    files.read("1.bin")
    return files


@pytest.mark.slow
def test_workers_read_one_zip_file_at_once(zipped: Files) -> None:
    for method in ("fork", "spawn"):
        loader = DataLoader(
            Sums(zipped), batch_size=None, num_workers=2, multiprocessing_context=method
        )
        assert list(loader) == [200_000 * i for i in range(20)]


def test_a_forked_process_leaves_the_file_position_it_inherits(zipped: Files) -> None:
    """Processes that read through one file position would mix their reads."""
    (store,) = zipped._stores
    handle = store._opened[1].fp.fileno()
    before = os.lseek(handle, 0, os.SEEK_CUR)
    reader = get_context("fork").Process(target=zipped.read, args=("9.bin",))
    reader.start()
    reader.join()
    assert reader.exitcode == 0
    assert os.lseek(handle, 0, os.SEEK_CUR) == before


class Sums(Dataset):
    def __init__(self, files: Files) -> None:
        self.files = files

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return sum(self.files.read(f"{index}.bin"))


def test_a_broken_zip_file_is_one_clear_line(tree: Path, tmp_path: Path) -> None:
    archive = pack(tree, tmp_path / "t.zip")
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"^t\.zip: not a whole zip file \(.+\); download it again"):
        Files(archive)
    with pytest.raises(DataError, match="no such folder or zip file"):
        Files(tmp_path / "nothing.zip")


def test_a_broken_zip_file_beside_good_ones_does_no_harm(tree: Path) -> None:
    (tree / "aa.zip").write_bytes(b"half a download")
    files = Files(tree)
    assert files.locate("a/b") == "a/b"
    with pytest.raises(DataError, match=r"aa\.zip: not a whole zip file"):
        files.locate("nothing")


def test_a_damaged_member_names_itself(tree: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("x.bin", b"abcdefgh" * 100)
    content = bytearray((tmp_path / "t.zip").read_bytes())
    content[content.index(b"abcdefgh") + 3] ^= 0xFF
    (tmp_path / "t.zip").write_bytes(content)
    files = Files(tmp_path / "t.zip")
    with pytest.raises(DataError, match=r"^t\.zip/x\.bin: cannot be read \(Bad CRC-32"):
        files.read("x.bin")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_lists_that_list_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"list\.txt: lists nothing"):
        Files(tmp_path).lines("list.txt")


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list\.txt: not a text file"):
        Files(tmp_path).lines("list.txt")
