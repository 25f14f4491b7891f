"""Inputs that are right but odd, and odd places to work in."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import words

import data
import masks
import train
from engine import runs
from images import sets
from support.cli import BadInput, command_line
from text import sources, tokenizers

ROOT = Path(train.__file__).parent
CPU = ["--device", "cpu", "--dtype", "fp32", "--no-report"]


def prepare(*argv):
    """`python data.py text`, in this process; returns the manifest."""
    data.main(["text", *map(str, argv)])
    return json.loads((Path(argv[-1]) / "manifest.json").read_text())


def test_empty_and_one_token_documents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for k in range(30):
        (source / f"{k:02d}.txt").write_text("x" * (k % 3 == 0))
    manifest = prepare(source, "--out", tmp_path / "out")
    found = {side: np.fromfile(tmp_path / "out" / f"{side}.bin", np.uint16) for side in ("train", "val")}
    assert (
        sum(manifest[side]["documents"] for side in found)
        == 30
        == sum((ids == 256).sum() for ids in found.values())
    )
    assert sum((ids == ord("x")).sum() for ids in found.values()) == 10
    train.main([
        "--data", str(tmp_path / "out"), *words("--length 8 --batch-size 4 --steps 2 --out"),
        str(tmp_path / "run"), *CPU])


@pytest.mark.parametrize("size", [1, 2, 10])
def test_a_text_shorter_than_a_sequence(tmp_path, size):
    (tmp_path / "a.txt").write_text("x" * size)
    train.main([
        "--data", str(tmp_path / "a.txt"), *words("--length 32 --batch-size 4 --steps 2 --out"),
        str(tmp_path / "run"), *CPU])
    assert runs.load_run(tmp_path / "run").step == 2


def test_one_long_line_takes_little_memory(tmp_path):
    (tmp_path / "line.txt").write_bytes(b"x" * 10**7)
    tracemalloc.start()
    try:
        manifest = prepare(tmp_path / "line.txt", "--out", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 20 * sources.BLOCK
    finally:
        tracemalloc.stop()
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == 10**7


def test_nul_bytes_and_invalid_utf8_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes((b"a\0b\xff\xfec" + b"text " * 9) * 100 + b"\xc3")
    manifest = prepare(tmp_path / "a.txt", "--out", tmp_path / "out")
    assert manifest["train"]["replaced"] == 201 and "201 characters were not UTF-8" in capsys.readouterr().out
    ids = np.concatenate(
        [np.fromfile(tmp_path / "out" / f"{side}.bin", np.uint16) for side in ("train", "val")]
    )
    assert (ids == 0).sum() == 100 and tokenizers.ByteTokenizer().decode(ids).startswith("a\0b\ufffd\ufffdc")


def test_many_small_files(tmp_path):
    source = tmp_path / "source"
    for k in range(1000):
        (source / f"{k % 7}").mkdir(parents=True, exist_ok=True)
        (source / f"{k % 7}" / f"{k}.txt").write_text(f"document {k}\n")
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    manifest = prepare(source, "--out", tmp_path / "out")
    assert (
        manifest["train"]["documents"] + manifest["val"]["documents"] == 1000
        and manifest["val"]["documents"] > 20
    )
    assert files == (len(os.listdir("/proc/self/fd")) if files else 0)


def test_links_in_a_circle(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a.txt").write_text("text\n" * 10)
    (source / "inner" / "up").symlink_to(source)
    (source / "self").symlink_to(source / "self")
    (source / "nowhere.txt").symlink_to(tmp_path / "none")
    assert prepare(source, "--out", tmp_path / "out")["train"]["documents"] == 1
    assert not sets.is_images(str(source))
    with pytest.raises((BadInput, OSError)):
        sets.load_images(str(source))


def test_pipes_are_not_read(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("text\n" * 10)
    os.mkfifo(source / "pipe")
    assert prepare(source, "--out", tmp_path / "out")["train"]["documents"] == 1
    with pytest.raises(BadInput, match="no text"):
        prepare(source / "pipe", "--out", tmp_path / "other")


@pytest.fixture
def odd_folder(tmp_path):
    """A folder whose name has spaces, quotation marks and letters beyond ASCII."""
    folder = tmp_path / "a b'c \u00e4\u65e5"
    folder.mkdir()
    (folder / "t\u00e9xt file.txt").write_text("na\u00efve \u65e5\u672c\n" * 100, encoding="utf-8")
    return folder


def test_paths_with_spaces_and_letters_beyond_ascii(odd_folder, capsys):
    source, out = odd_folder / "t\u00e9xt file.txt", odd_folder / "r\u00fcn 1"
    train.main(
        ["--data", str(source), *words("--length 16 --batch-size 4 --steps 2 --out"), str(out), *CPU]
    )
    train.main(["--resume", "--steps", "3", "--out", str(out), *CPU])
    prepare(odd_folder / "t\u00e9xt file.txt", "--out", odd_folder / "t\u00f6ken")
    assert runs.load_run(out).step == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(SystemExit) as end:
        command_line(lambda: train.main(["--steps", "1", "--out", str(folder / "run"), *CPU]))
    assert end.value.code == 2 and capsys.readouterr().err.count("error: ") == 1


def test_a_locale_without_utf8_and_no_terminal(odd_folder):
    """ASCII only: every file is still UTF-8, what cannot be shown is a question mark; no progress bar."""
    script = (
        "import sys; import objectives, data, train; from support.cli import command_line\n"
        "assert sys.stdout.encoding.lower() in ('ascii', 'us-ascii', 'ansi_x3.4-1968'), sys.stdout.encoding\n"
        "command_line(lambda: objectives.main(['ar', '--length', '3'])\n"
        " or data.main(['text', *sys.argv[1:3], '--out', sys.argv[3]])\n"
        " or train.main(['--data', sys.argv[3], '--length', '16', '--batch-size', '4', '--steps', '3',\n"
        " '--log-every', '1',\n"
        " '--device', 'cpu', '--dtype', 'fp32', '--out', sys.argv[4]]))"
    )
    source = odd_folder / "t\u00e9xt file.txt"
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "utf8=0",
            "-c",
            script,
            source,
            source,
            odd_folder / "t\u00f6ken",
            odd_folder / "r\u00fcn",
        ],
        env={
            **os.environ,
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"\r" not in done.stderr and b"it/s" not in done.stderr and b"%|" not in done.stderr
    assert b"validation loss" in done.stderr and b"perplexity" in done.stdout and b"? " in done.stdout


def test_memory_that_is_not_there_is_an_error_line(capsys):
    for work in (
        lambda: np.empty(2**60, np.uint8),
        lambda: train.torch.empty(2**60, dtype=train.torch.uint8),
    ):
        with pytest.raises(SystemExit) as end:
            command_line(work)
        error = capsys.readouterr().err
        assert (
            end.value.code == 2
            and error.startswith("error: not enough memory")
            and error.count("\n") == 1
            and "smaller" in error
        )
    with pytest.raises(RuntimeError, match="size"):  # an error of another kind stays one
        command_line(lambda: train.torch.zeros(2) + train.torch.zeros(3))


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 100)
    for name in "ab":
        prepare(tmp_path / "a.txt", "--out", tmp_path / name)
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in ("train.bin", "val.bin", "manifest.json")
    )
    assert (
        masks.masked_groups(3, 9, 0.5, train.torch.Generator().manual_seed(0)).tolist()
        == masks.masked_groups(3, 9, 0.5, train.torch.Generator().manual_seed(0)).tolist()
    )
