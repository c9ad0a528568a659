"""Files and folders that appear whole or not at all, whatever fails."""

import errno
import fcntl
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from flux2_mlx import InputError, writing
from flux2_mlx import disk_cache as cache
from flux2_mlx.writing import atomic_folder, atomic_write, move_to_free_name, remove_partials, tell_unlocked_partials


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch, name, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "state.bin"
    path.write_text("old")
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(type(path) if name == "replace" else os, name, fails)
    with (
        pytest.raises(InputError, match=r"cannot write .*state\.bin: .*; choose another file"),
        atomic_write(path, lasting=True) as temporary,
    ):
        temporary.write_text("new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_what_mlx_cannot_write_is_told_as_what_it_is(tmp_path):
    """MLX raises RuntimeError where the disk is full; another of its errors stays what it is."""
    for text, kind in (("[write] Unable to write 8 bytes to file.", InputError), ("[reshape] no", RuntimeError)):
        with pytest.raises(kind), atomic_write(tmp_path / "a.safetensors"):
            raise RuntimeError(text)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut leaves files of no bytes in it (ext4), after success was told."""
    target, synced = tmp_path / "model", []
    monkeypatch.setattr(writing, "sync", lambda path: synced.append((path.name, target.exists())))
    with atomic_folder(target) as unfinished:
        (unfinished / "vae").mkdir()
        for name in ("vae/weights", "SHA256SUMS"):
            (unfinished / name).touch()
    assert {name for name, _ in synced[:-1]} == {"vae", "weights", "SHA256SUMS", unfinished.name}
    assert [named for _, named in synced] == [False] * 4 + [True]
    assert synced[-1][0] == tmp_path.name


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_is_left_of_half_a_folder(tmp_path, error):
    def write():
        with atomic_folder(tmp_path / "model") as unfinished:
            (unfinished / "a").touch()
            raise error

    with pytest.raises((KeyboardInterrupt, InputError)):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
@pytest.mark.parametrize("name", ["open", "mkdir"])
def test_a_signal_as_a_file_is_created_leaves_nothing(tmp_path, monkeypatch, write, name):
    """Python raises in whatever comes next, as here once the system's call is done."""
    create = getattr(os, name)

    def interrupted(*given, **options):
        create(*given, **options)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, name, interrupted)
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "a"):
        raise KeyboardInterrupt  # a file makes no folder
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_body_reads_is_not_blamed_on_writing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model"):
        (tmp_path / "nowhere" / "weights").read_bytes()


def test_what_a_killed_program_left_goes_and_what_another_writes_stays(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from flux2_mlx.writing import atomic_folder, atomic_write\n"
        "with atomic_write(Path('a.png')) as file, atomic_folder(Path('model')) as folder:\n"
        "    (folder / 'weights').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == -9
    (tmp_path / ".a.mine.png").touch()
    assert len(list(tmp_path.iterdir())) == 3
    with atomic_write(tmp_path / "b.png") as file, atomic_folder(tmp_path / "c") as folder:
        remove_partials(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".a.mine.png", file.name, folder.name}
        file.touch()
    assert {path.name for path in tmp_path.iterdir()} == {".a.mine.png", "b.png", "c"}
    remove_partials(tmp_path / "nowhere")


def test_what_earlier_versions_left_is_named(tmp_path):
    """It has no lock, so that it may still be written."""
    for name in (".model.abcd1234", ".model.too_long_1", ".model2.abcd1234", ".model.a"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match=r"earlier version are left: \S+\.model\.abcd1234; delete") as told:
        tell_unlocked_partials(tmp_path / "model")
    assert len(told) == 1
    tell_unlocked_partials(tmp_path / "nowhere" / "model")


def test_a_free_name_is_never_another_file(tmp_path):
    for number in range(3):
        (tmp_path / "new").write_text(str(number))
        move_to_free_name(tmp_path / "new", tmp_path / "fox.png")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "fox.png": "0",
        "fox-2.png": "1",
        "fox-3.png": "2",
    }


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    embeds = mx.arange(4096, dtype=mx.float32).reshape(1, 16, 256).astype(mx.bfloat16)
    cache.write_prompt([], "key", embeds)
    (file,) = (tmp_path / "prompts").iterdir()
    return embeds, file


def test_a_prompt_comes_back_to_the_bit(kept):
    again = cache.read_prompt([], "key")
    assert again.dtype == mx.bfloat16
    assert mx.array_equal(again, kept[0])


@pytest.mark.parametrize("damage", ["zeros", "bit", "shape", "other", "old"])
def test_a_prompt_that_is_not_what_was_written_is_none(kept, damage):
    """Zeros after a page are what a power cut leaves, "old" is a file of an earlier version."""
    embeds, file = kept
    content = bytearray(file.read_bytes())
    if damage == "zeros":
        content[4096:] = bytes(len(content) - 4096)
        file.write_bytes(content)
    elif damage == "bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "other":
        cache.write_prompt([], "another key", embeds)
        (other,) = set(file.parent.iterdir()) - {file}
        other.replace(file)
    else:
        arrays = {"array": embeds[0]} if damage == "shape" else {"prompt_embeds": embeds}
        mx.save_safetensors(str(file), arrays, {"sha256": cache.array_digest(file.stem, embeds)})
    assert cache.read_prompt([], "key") is None


def test_what_is_not_finite_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    cache.write_prompt([], "key", mx.full((1, 2, 4), float("nan")))
    assert cache.read_prompt([], "key") is None
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_table_that_is_not_what_was_written_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    cache.write_table("rows", {"a": 8, "b": [1.5, 2]})
    assert cache.read_table("rows") == {"a": 8, "b": [1.5, 2]}
    file = tmp_path / "rows.json"
    text = file.read_text()
    for damaged in (text.replace("8", "9"), text[:-9], text + text, '{"a": 8}', "[1]", "[" * 10**5, "\0" * 99):
        file.write_text(damaged)
        assert cache.read_table("rows") == {}
    file.write_text(text)
    file.rename(tmp_path / "other.json")
    assert cache.read_table("other") == {}
