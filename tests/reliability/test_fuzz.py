"""Random bytes, cuts and flipped bits at everything that reads a file: a clear error or none, no hang, no
runaway memory."""

import gzip
import json
import lzma
import resource
import signal
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from test_bad_input import write_run

import data
from downstream import glue, glue_runs, labelled, tables
from engine import log, runs
from images import files, sets
from support.cli import BadInput
from text import folders, sources


@pytest.fixture(autouse=True)
def limits():
    """A minute, on a machine that may be busy with other things, and 300 MB for each test."""

    def late(*_):
        raise TimeoutError("a reader hangs")

    before, peak = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000  # kB


def spoilt(content, rng):
    """A damaged copy of these bytes."""
    kind, content = rng.integers(6), bytearray(content)
    if kind == 0:
        return rng.bytes(rng.integers(200))
    if kind == 1:
        return bytes(content[: rng.integers(len(content) + 1)])
    if kind == 2:
        return bytes(content) + rng.bytes(rng.integers(1, 50))
    if kind == 3:  # the header becomes large numbers
        content[rng.integers(4) : rng.integers(4, 33)] = b"\xff" * rng.integers(1, 33)
        return bytes(content)
    places = (
        rng.integers(0, len(content), rng.integers(1, 20))
        if kind == 4
        else rng.integers(0, min(len(content), 64), 3)
    )
    for place in places:
        content[place] ^= 1 << rng.integers(8)
    return bytes(content)


def fuzz(path, read, count=40):
    """`read` takes damaged versions of this file, or refuses them; returns how many it took and how many it
    refused."""
    whole, taken, refused = path.read_bytes(), 0, 0
    read()
    for number in range(count):
        path.write_bytes(spoilt(whole, np.random.default_rng([zlib.crc32(path.name.encode()), number])))
        try:
            read()
            taken += 1
        except BadInput as error:
            assert len(str(error)) > 20
            refused += 1
    path.write_bytes(whole)
    return taken, refused


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.gz", gzip.compress), ("a.xz", lzma.compress)])
def test_text(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack("naïve text\n".encode() * 300))
    taken, refused = fuzz(
        path,
        lambda: [block.encode() for document in sources.documents(str(path)) for block in document.blocks],
        100,
    )
    # most damage leaves a text a text; what it turns into mostly other bytes is refused
    assert 60 < taken < 100 and refused == 100 - taken if pack is bytes else refused > 50


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    folders.prepare_text([str(tmp_path / "a.txt")], tmp_path / "tokens", quiet=True)
    return tmp_path / "tokens"


def read_tokens(folder):
    corpus = folders.open_tokens(folder)
    sequences = data.Sequences(corpus.train, 16, corpus.tokenizer.separator, seed=0)
    assert (
        0 <= sequences.batch(0, 8).min()
        and sequences.batch(0, 8).max() < corpus.tokenizer.vocab
        and corpus.val_bytes > 0
    )
    corpus.tokenizer.decode(corpus.tokenizer.encode("cat"))


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "manifest.json", "tokenizer.json"])
def test_token_folder(tokens, name):
    assert fuzz(tokens / name, lambda: read_tokens(tokens))[1] > 10
    taken, refused = fuzz(tokens / name, lambda: read_tokens(tokens) or sets.is_images(str(tokens)), 20)
    assert taken + refused == 20 and not sets.is_images(str(tokens))


ODD = [
    None,
    True,
    -1,
    10**12,
    10**400,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    [],
    [[]],
    {},
    {"tokens": "x"},
    [None] * 3,
]


def with_odd_values(content):
    """Copies of a JSON object with one value, at any depth, replaced by an odd one or left out."""
    for key, value in content.items():
        yield {k: v for k, v in content.items() if k != key}
        for odd in ODD:
            yield {**content, key: odd}
        if isinstance(value, dict):
            for inner in with_odd_values(value):
                yield {**content, key: inner}


def feed(path, texts, read):
    """`read` takes a file of these texts, or refuses them -> how many it refused."""
    refused = 0
    for text in texts:
        path.write_text(text)
        try:
            read()
        except BadInput:
            refused += 1
    return refused


def test_token_manifest_with_odd_values(tokens):
    path = tokens / "manifest.json"
    texts = [json.dumps(x) for x in with_odd_values(json.loads(path.read_text()))] + [
        "[" * 100_000,
        "null",
        "[]",
        '"x"',
        "1e999",
    ]
    assert feed(path, texts, lambda: (sets.is_images(str(tokens)), read_tokens(tokens))) > 80


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_extras_trained_tokenizers(tmp_path, kind):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("the cat sat on the mat, naïve\n" * 50)
    folders.prepare_text([str(tmp_path / "a.txt")], tmp_path / "tokens", kind, 320, quiet=True)
    path = tmp_path / "tokens" / "tokenizer.json"
    taken, refused = fuzz(path, lambda: read_tokens(tmp_path / "tokens"), 60)
    assert refused > 30 and taken + refused == 60
    content = json.loads(path.read_text())
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:5])
    texts = [json.dumps(x) for x in with_odd_values(content)]
    assert feed(path, texts, lambda: read_tokens(tmp_path / "tokens")) > 0.5 * len(texts)


# ---------------------------------------------------------------------------- labelled text


@pytest.mark.parametrize(
    "name, rows",
    [
        ("cola", "a\t1\t\tGood.\na\t0\t\tBad.\n"),
        ("qqp", "question1\tquestion2\tis_duplicate\nx\ty\t1\nx\tz\t0\n"),
        ("stsb", "sentence1\tsentence2\tscore\nx\ty\t1.5\nx\tz\t5\n"),
        ("sst2", "sentence\tlabel\nfine\t1\ndull\t0\n"),
    ],
)
def test_glue(tmp_path, name, rows):
    path = tmp_path / glue.TASKS[name].folder / "train.tsv"
    path.parent.mkdir()
    path.write_text(rows * (1 if name != "cola" else 5))

    def read():
        return glue.task_labels(name, glue.read_task(tmp_path, name, "train.tsv"))

    taken, refused = fuzz(path, read, 60)
    assert refused > 20 and taken + refused == 60
    assert feed(path, ["\n\n", "\r\n", "\t\t\t\n", "\0" * 100], read) == 4
    labels = []
    assert feed(path, [rows, "\n" + rows, rows + "\n\n"], lambda: labels.append(read().tolist())) == 0
    assert labels[0] == labels[1] == labels[2] and len(labels[0]) == 2  # empty lines are no rows


def test_a_blank_first_line_is_skipped(tmp_path):
    (tmp_path / "a.tsv").write_text("\ntext\tlabel\nfine\t1\n")
    assert tables.read_table(tmp_path / "a.tsv", ("text",), "label").texts == [("fine",)]


def test_labelled_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "fine\t1\ndull\t0\n" * 10)
    taken, refused = fuzz(path, lambda: labelled.table_dataset(path), 100)
    assert taken > 10 and refused > 10 and taken + refused == 100
    assert labelled.table_dataset(path).classes == ("0", "1")  # the whole file is back


def test_glue_results(tmp_path):
    path = tmp_path / "glue.json"
    path.write_text(
        json.dumps([{"key": {"task": "cola"}, "scores": {"matthews": 0.5}, "figures": {}, "predictions": {}}])
    )
    assert fuzz(path, lambda: glue_runs.read_results(path))[1] > 20
    assert glue_runs.read_results(path) == []  # entries of an older version are not this one's


# ---------------------------------------------------------------------------- images


def read_images(folder):
    found = sets.load_images(str(folder))
    for part in (found.train, found.val):
        pixels, labels = part.batch(np.arange(min(4, len(part))))
        assert (
            pixels.shape[1:] == (found.size, found.size, 3)
            and 0 <= labels.min()
            and labels.max() < len(found.classes)
        )
    assert (
        all(isinstance(name, str) for name in found.classes) and np.isfinite([*found.mean, *found.std]).all()
    )


@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"]
)
def test_idx(tmp_path, name, end, pack):
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        for kind, header, content in (
            ("images-idx3", struct.pack(">4I", 0x803, 6, 5, 5), rng.bytes(150)),
            ("labels-idx1", struct.pack(">2I", 0x801, 6), bytes(range(6))),
        ):
            (tmp_path / f"{prefix}-{kind}-ubyte{end}").write_bytes(pack(header + content))
    path = tmp_path / (name + end)
    assert fuzz(path, lambda: read_images(tmp_path))[1] > 15
    # headers that claim 10^12 bytes and more
    for shape in ((10_000, 10_000, 10_000), (2**32 - 1,) * 3, (6, 0, 5)):
        path.write_bytes(pack(struct.pack(">4I", 0x803, *shape) + bytes(100)))
        with pytest.raises(BadInput, match="idx file|should have"):
            files.read_idx(path, 3)


@pytest.fixture
def cifar(tmp_path):
    root = tmp_path / "cifar"
    root.mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = np.random.default_rng(0).integers(0, 256, (3, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(3)
        records.tofile(root / name)
    (root / "batches.meta.txt").write_text("\n".join(f"class{k}" for k in range(10)))
    return root


@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch.bin", "batches.meta.txt"])
def test_cifar(cifar, name):
    assert fuzz(cifar / name, lambda: read_images(cifar))[1] > 5


@pytest.mark.parametrize("name", ["train.bin", "val.labels.bin", "manifest.json"])
def test_image_folder(cifar, tmp_path, name):
    folder = tmp_path / "prepared"
    sets.prepare_images(str(cifar), folder, size=4, quiet=True)
    assert fuzz(folder / name, lambda: read_images(folder))[1] > 10
    if name == "manifest.json":
        content = json.loads((folder / name).read_text())
        texts = [json.dumps(x) for x in with_odd_values(content)] + [
            "[" * 100_000,
            "null",
            "[]",
            '{"format": "images"}',
        ]
        assert feed(folder / name, texts, lambda: (sets.is_images(str(folder)), read_images(folder))) > 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extras_image_files(tmp_path, kind):
    Image = pytest.importorskip("PIL.Image")
    for k in range(4):
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 60 * k, np.uint8)).save(
            tmp_path / f"class{k % 2}" / f"{k}.{kind.lower()}", kind
        )
    path = tmp_path / "class0" / f"0.{kind.lower()}"
    assert fuzz(path, lambda: read_images(tmp_path))[1] > 5


def test_extras_a_small_file_that_claims_a_huge_image(tmp_path):
    pytest.importorskip("PIL")

    def part(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    for side in (12_000, 2**30):
        (tmp_path / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
            + part(b"IDAT", zlib.compress(bytes(1000)))
            + part(b"IEND", b"")
        )
        assert "is corrupt" in files.decode(tmp_path / "a.png", 32)


# ---------------------------------------------------------------------------- checkpoints


@pytest.fixture
def run(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    write_run(tmp_path / "run", data=str(tmp_path / "a.txt"), length=16)
    return tmp_path / "run"


def test_checkpoint(run):
    assert (
        fuzz(run / "ckpt.pt", lambda: runs.load_run(run), 80)[1] > 60
    )  # flipped bits in the padding between the archive's members change nothing


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": 10**12},
        {"vocab": 3 * 10**9, "width": 16},
        {"width": 10**9},
        {"layers": 10**12},
        {"length": 10**12},
        {"heads": 3},
        {"heads": 0},
        {"length": "x"},
        {"vocab": -1},
        {"dropout": 7.0},
        {"decoder": [10**9, 16, 2]},
        {"patch": 10**6},
    ],
    ids=lambda change: "-".join(f"{key} {value}" for key, value in change.items()),
)
def test_checkpoint_whose_sizes_are_not_its_weights(run, change):
    content = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save({**content, "model_config": {**content["model_config"], **change}}, run / "ckpt.pt")
    with pytest.raises(BadInput):
        runs.load_run(run)


def test_checkpoint_with_odd_values(run):
    content = torch.load(run / "ckpt.pt", weights_only=True)
    for key in ("settings", "model_config", "model", "tokenizer"):
        for odd in ODD[:12]:
            torch.save({**content, key: odd}, run / "ckpt.pt")
            with pytest.raises(BadInput):
                runs.load_run(run)
    for odd in (torch.zeros(3), [1], "x", {"settings": 1}):
        torch.save(odd, run / "ckpt.pt")
        with pytest.raises(BadInput):
            runs.load_run(run)


def test_nothing_in_a_checkpoint_is_executed(run, tmp_path):
    """A pickle that would write a file when it is loaded, in place of the one in the archive."""
    code = b"cbuiltins\nopen\n(V" + str(tmp_path / "trace").encode() + b"\nVw\ntR."
    with zipfile.ZipFile(run / "ckpt.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(run / "ckpt.pt", "w") as file:
        for name, content in parts.items():
            file.writestr(name, code if name.endswith("data.pkl") else content)
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        runs.load_run(run)
    assert not (tmp_path / "trace").exists()


def test_metrics_of_any_content(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 30)))
    assert fuzz(path, lambda: log.open_metrics(path, 20).close()) == (40, 0)  # it is never a reason to stop
    odd = ["[" * 100_000, "null\n3\n[]\n{}\n" + '{"step": "x"}\n{"step": null}\n', "\0\n"]
    assert feed(path, odd, lambda: log.open_metrics(path, 20).close()) == 0
    path.write_text('{"step": 20}\n{"step": 21}\n{"st')
    log.open_metrics(path, 20).close()
    assert path.read_text() == '{"step": 20}\n'
