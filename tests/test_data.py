"""Reading text, tokenizing, packing."""

import gzip
import json
import lzma
import re

import numpy as np
import pytest
import torch

import data
from data import Sequences
from support import cli
from support.cli import BadInput
from text import folders, sources, tokenizers
from text.tokenizers import ByteTokenizer


def read(path):
    return "".join(sources.read_text(path))


@pytest.mark.parametrize(
    "raw, text",
    [
        (b"plain\ntext\n", "plain\ntext\n"),
        (b"\xef\xbb\xbfwith a mark\r\nand CRLF\r", "with a mark\nand CRLF\n"),
        ("na\u00efve \u65e5\u672c".encode(), "na\u00efve \u65e5\u672c"),
        (b"bad \xff byte", "bad \ufffd byte"),
        (b"", ""),
    ],
)
@pytest.mark.parametrize("suffix, pack", [(".txt", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_text_files_in_every_form(tmp_path, raw, text, suffix, pack):
    path = tmp_path / ("file" + suffix)
    path.write_bytes(pack(raw))
    assert read(path) == text


def test_truncated_archives_are_named(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress)):
        path = tmp_path / ("cut" + suffix)
        path.write_bytes(pack(np.random.default_rng(0).bytes(5000))[:-50])
        with pytest.raises(BadInput, match="cut" + suffix):
            read(path)


def test_a_long_line_comes_in_blocks(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("word " * 1_000_000)
    blocks = list(sources.read_text(path))
    assert max(map(len, blocks)) <= 3 * sources.BLOCK and "".join(blocks) == "word " * 1_000_000


def test_cutting_at_lines_loses_nothing():
    text = "".join(f"line {i}\n" for i in range(300)) + "end"
    pieces = list(tokenizers.cut_at_lines(text, 100))
    assert "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces[:-1]) and len(pieces) > 10


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    text = "Ünïcödé\n\x00 and [SEP]"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.max() < 256
    assert tokenizer.decode([*tokenizer.encode("a"), 256, *tokenizer.encode("b")]) == "a\n\nb"
    assert tokenizers.tokenizer_from_json(tokenizer.to_json()).vocab == 257


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "books"
    source.mkdir()
    for i in range(40):
        (source / f"book{i}.txt").write_text(f"This is book number {i}.\n" * 50)
    (source / ".hidden").write_text("not read")
    return source


def test_a_folder_becomes_tokens(folder, tmp_path):
    out = tmp_path / "tokens"
    manifest = folders.prepare_text([str(folder)], out, val_fraction=0.3, quiet=True)
    corpus = folders.open_tokens(out)
    val = [d.name for d in sources.documents(str(folder)) if folders.held_out(d, 0.3)]
    assert 4 < len(val) < 20 and manifest["val"]["documents"] == len(val)
    expected = "".join(read(folder / name) + "\n\n" for name in val)
    assert corpus.tokenizer.decode(corpus.val) == expected
    assert len(corpus.train) + len(corpus.val) == sum(p.stat().st_size + 1 for p in folder.glob("*.txt"))
    assert corpus.val_bytes == sum((folder / name).stat().st_size for name in val)


def test_one_long_file_holds_out_its_tail(folder, tmp_path):
    text = "".join(f"sentence {i}. " for i in range(2000))
    (tmp_path / "one.txt").write_text(text)
    folders.prepare_text([str(tmp_path / "one.txt")], tmp_path / "tokens", val_fraction=0.1, quiet=True)
    corpus = folders.open_tokens(tmp_path / "tokens")
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text + "\n\n"
    assert len(corpus.val) == round(0.1 * (len(text) + 1)) and abs(corpus.val_bytes - len(corpus.val)) <= 1


def test_separate_validation_text(folder, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    folders.prepare_text([str(folder)], tmp_path / "tokens", val=[str(tmp_path / "held.txt")], quiet=True)
    corpus = folders.open_tokens(tmp_path / "tokens")
    assert corpus.tokenizer.decode(corpus.val) == "held out\n\n"
    assert len(corpus.train) == sum(p.stat().st_size + 1 for p in folder.glob("*.txt"))


def test_wrong_folders_are_refused(folder, tmp_path):
    out = tmp_path / "tokens"
    folders.prepare_text([str(folder)], out, quiet=True)
    with pytest.raises(BadInput, match="not an empty folder"):
        folders.prepare_text([str(folder)], out, quiet=True)
    with pytest.raises(BadInput, match="does not exist"):
        folders.prepare_text([str(tmp_path / "nowhere")], tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(BadInput, match="lies inside the input"):
        folders.prepare_text([str(folder)], folder / "out", quiet=True)
    with pytest.raises(BadInput, match="holds tokens already"):
        folders.prepare_text([str(out)], tmp_path / "x", quiet=True)
    with open(out / "train.bin", "rb+") as file:
        file.truncate(100)
    with pytest.raises(BadInput, match=r"train\.bin holds 50 tokens"):
        folders.open_tokens(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="token folder"):
        folders.open_tokens(out)


def test_pydoc_is_the_same_every_time_and_split_by_module():
    first = data.load_corpus("pydoc")
    sources.pydoc_texts.cache_clear()
    again = data.load_corpus("pydoc")
    assert np.array_equal(first.train, again.train) and np.array_equal(first.val, again.val)
    assert 1.5e6 < len(first.train) + len(first.val) < 3e6 and 0.05 < len(first.val) / len(first.train) < 0.25
    modules = [
        [d.module for d in sources.documents("pydoc") if folders.held_out(d, 0.1) == side]
        for side in (False, True)
    ]
    assert not set(modules[0]) & set(modules[1])
    assert "the" in first.tokenizer.decode(first.val[:500])


@pytest.mark.parametrize("count", [64, 61])
def test_every_token_once_per_epoch_in_a_seeded_order(count):
    tokens = np.arange(count, dtype=np.uint16)
    sequences = Sequences(tokens, 8, separator=999, seed=1)
    assert len(sequences) == 8
    epochs = [torch.cat([sequences.batch(e * 8 + i, 2) for i in range(0, 8, 2)]) for e in range(2)]
    for epoch in epochs:
        ids = epoch.flatten()
        assert (
            ids[ids != 999].sort().values.tolist() == list(range(count)) and (ids == 999).sum() == 64 - count
        )
    assert not torch.equal(*epochs)
    assert torch.equal(
        Sequences(tokens, 8, 999, 1).batch(5, 6), torch.cat(epochs)[5:11]
    )  # also across epochs
    assert not torch.equal(Sequences(tokens, 8, 999, 2).batch(0, 8), epochs[0])


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_trained_tokenizers(folder, tmp_path, kind):
    pytest.importorskip("tokenizers")
    folders.prepare_text([str(folder)], tmp_path / "tokens", kind, 400, quiet=True)
    corpus = folders.open_tokens(tmp_path / "tokens")
    assert (
        corpus.tokenizer.kind == kind
        and corpus.tokenizer.vocab <= 400
        and corpus.train.max() < corpus.tokenizer.vocab
    )
    text = "this is book number 7." if kind == "wordpiece" else "This is [SEP] book\n number 7.\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text
    assert corpus.tokenizer.separator not in corpus.tokenizer.encode("a [SEP] b")
    assert len(corpus.tokenizer.encode("This is book number 1.")) < 10
    other = folders.prepare_text(["pydoc"], tmp_path / "other", kind, 500, quiet=True)
    assert other["vocab"] == 500
    with pytest.raises(BadInput, match="another tokenizer"):
        data.load_evaluation(str(tmp_path / "other"), corpus.tokenizer)


def test_max_bytes_is_kept_for_each_source(folder, tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 1000)
    manifest = folders.prepare_text(
        [str(tmp_path / "one.txt")], tmp_path / "a", max_bytes=1000, val=[str(folder)], quiet=True
    )
    assert (
        manifest["train"]["bytes"] == 1000
        and manifest["val"]["bytes"] == 1000
        and manifest["val"]["documents"] == 1
    )


def test_hugging_face_data_sets_are_streamed(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i} of the set\n"} for i in range(50)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(sources.documents(f"hf:{tmp_path / 'set'}"))
    assert ["".join(d.blocks) for d in documents] == [row["text"] for row in rows]
    folders.prepare_text([f"hf:{tmp_path / 'set'}"], tmp_path / "tokens", max_bytes=200, quiet=True)
    corpus = folders.open_tokens(tmp_path / "tokens")
    assert 200 <= len(corpus.train) + len(corpus.val) < 300


def rows_of(count):
    return [{"text": f"row {i} of the set has some words\n" * (1 + i % 3)} for i in range(count)]


class Rows:
    """A streamed dataset as `datasets` gives it, that breaks off after `until` rows of one session."""

    def __init__(self, count, until=None):
        self.rows, self.at, self.until, self.read = rows_of(count), 0, until, 0

    def __iter__(self):
        while self.at < len(self.rows):
            if self.read == self.until:
                raise ConnectionResetError("reset by peer")
            self.at, self.read = self.at + 1, self.read + 1
            yield self.rows[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def stream(monkeypatch, rows):
    """load_dataset gives these rows from the start, as often as it is called."""

    def load_dataset(*args, **kwargs):
        rows.at = 0
        return rows

    package = type("datasets", (), {"load_dataset": staticmethod(load_dataset)})
    monkeypatch.setattr(sources, "import_optional", lambda name: package)


def test_a_broken_connection_costs_what_was_not_yet_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "AT_ONCE", 300)
    monkeypatch.setattr(folders, "COMMIT", 1000)
    monkeypatch.setattr(folders.Recipe, "by_document", lambda self: True)  # which would read 20 rows more
    stream(monkeypatch, Rows(400))
    folders.prepare_text(["hf:set"], tmp_path / "whole", quiet=True, val_fraction=0.2)
    sessions = [Rows(400, until) for until in (150, 60, 100, None)]
    for number, rows in enumerate(sessions):
        stream(monkeypatch, rows)
        if number < 3:
            with pytest.raises(BadInput, match=r"beyond document \d+.*reset by peer.*goes on"):
                folders.prepare_text(["hf:set"], tmp_path / "tokens", quiet=True, val_fraction=0.2)
            assert not (tmp_path / "tokens").exists()
        else:
            folders.prepare_text(["hf:set"], tmp_path / "tokens", quiet=True, val_fraction=0.2)
    assert sum(rows.read for rows in sessions) < 400 + 4 * 30  # little is read twice
    for name in ("train.bin", "val.bin", "tokenizer.json", "manifest.json"):
        assert (tmp_path / "tokens" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "tokens.partial").exists()


def test_another_recipe_does_not_go_on_from_the_same_folder(tmp_path, monkeypatch):
    stream(monkeypatch, Rows(400, 100))
    with pytest.raises(BadInput):
        folders.prepare_text(["hf:set"], tmp_path / "tokens", quiet=True)
    stream(monkeypatch, Rows(60))
    manifest = folders.prepare_text(["hf:other"], tmp_path / "tokens", quiet=True)
    assert sum(manifest[side]["documents"] for side in folders.SPLITS) == 60


def test_compressed_datasets_name_the_package_they_need(tmp_path, monkeypatch):
    class Compressed(Rows):
        def __iter__(self):
            raise ValueError("Compression type zstd not supported")

    stream(monkeypatch, Compressed(3))
    with pytest.raises(BadInput, match="pip install zstandard"):
        folders.prepare_text(["hf:set"], tmp_path / "tokens", quiet=True)


def test_many_documents_in_one_call_are_encoded_as_one_by_one(folder):
    pytest.importorskip("tokenizers")
    texts = [read(path) for path in sorted(folder.glob("*.txt"))] + ["", "word " * 20_000]
    for tokenizer in (ByteTokenizer(), tokenizers.TrainedTokenizer.train("wordpiece", 400, texts)):
        for ids, text in zip(tokenizer.encode_all(texts), texts):
            assert np.array_equal(ids, tokenizer.encode(text))


def test_wordpiece_tells_the_share_of_unknown_words(folder, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    (folder / "book99.txt").write_text("\u65e5\u672c\u8a9e " * 40)
    data.main(
        [
            "text",
            str(folder),
            "--out",
            str(tmp_path / "tokens"),
            "--tokenizer",
            "wordpiece",
            "--vocab",
            "300",
            "--val",
            str(folder / "book99.txt"),
        ]
    )
    val = json.loads((tmp_path / "tokens" / "manifest.json").read_text())["val"]
    ids = folders.open_tokens(tmp_path / "tokens")
    assert val["unknown"] == (ids.val == ids.tokenizer.unknown).sum()
    assert capsys.readouterr().out.count("% of the tokens are [UNK]") == 2


def test_what_is_not_text_is_refused_or_left_out_with_the_count(folder, tmp_path, capsys):
    noise = np.random.default_rng(0).bytes(5000)
    (tmp_path / "photo.jpg").write_bytes(noise)
    with pytest.raises(BadInput, match="1 of 1 files .*photo.jpg"):
        data.load_corpus(str(tmp_path / "photo.jpg"), tmp_path / "cache")
    (tmp_path / "wide.txt").write_text("text in another encoding", encoding="utf-16")
    with pytest.raises(BadInput, match="not UTF-8"):
        data.load_corpus(str(tmp_path / "wide.txt"), tmp_path / "cache")
    before = folders.prepare_text([str(folder)], tmp_path / "before", quiet=True)
    (folder / "figure.png").write_bytes(noise)
    assert folders.prepare_text([str(folder)], tmp_path / "after", quiet=True)["train"] == before["train"]
    assert "1 of 41 files" in capsys.readouterr().err
    for i in range(50):
        (folder / f"{i}.bin").write_bytes(noise)
    with pytest.raises(BadInput, match="51 of 91 files"):
        folders.prepare_text([str(folder)], tmp_path / "none", quiet=True)


def test_tokens_of_a_text_that_changed_are_not_taken_again(tmp_path):
    text, cache = tmp_path / "book.txt", tmp_path / "cache"
    text.write_text("one two three " * 50)
    first = data.load_corpus(str(text), cache)
    assert np.array_equal(data.load_corpus(str(text), cache).train, first.train)
    text.write_text("four five six " * 50)  # of the same size
    with pytest.raises(BadInput, match="as it was before it changed.*--overwrite"):
        data.load_corpus(str(text), cache)
    again = data.load_corpus(str(text), cache, replace=True)
    assert "four" in again.tokenizer.decode(again.train) and np.array_equal(
        data.load_corpus(str(text), cache).train, again.train
    )


def test_more_of_a_dataset_is_read_when_more_is_asked_for(tmp_path, monkeypatch):
    stream(monkeypatch, Rows(400))
    small = data.load_corpus("hf:set", tmp_path / "cache", hf_bytes=500)
    stream(monkeypatch, Rows(400))
    assert len(data.load_corpus("hf:set", tmp_path / "cache", hf_bytes=5000, resume=True).train) == len(
        small.train
    )
    stream(monkeypatch, Rows(400))
    assert len(data.load_corpus("hf:set", tmp_path / "cache", hf_bytes=5000, replace=True).train) > 5 * len(
        small.train
    )


def test_a_missing_package_is_named():
    with pytest.raises(BadInput, match="pip install no_such_package"):
        cli.import_optional("no_such_package")


@pytest.mark.parametrize("files, flags, held", [
    (1, (), "the last 5.0% of the tokens, as there are too few documents"),
    (200, ("--val-fraction", "0.3"), r"(2|3)\d\.\d% of the documents, chosen by a checksum of their names"),
    (1, ("--val", "{other}"), "all of .*other.txt")])
def test_what_is_held_out_is_said(tmp_path, capsys, files, flags, held):
    (tmp_path / "in").mkdir()
    for k in range(files):
        (tmp_path / "in" / f"{k}.txt").write_text(f"text number {k}\n" * 40)
    (tmp_path / "other.txt").write_text("another text\n" * 9)
    flags = [flag.format(other=tmp_path / "other.txt") for flag in flags]
    data.main(["text", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *flags])
    text = capsys.readouterr().out
    assert re.search(f"held out: {held}$", text, re.MULTILINE) and " 0 documents" not in text
