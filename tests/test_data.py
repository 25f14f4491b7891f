"""Text: tokenizers, documents, the split, the order of sequences, token folders, the toy model."""

import gzip
import json
import lzma
import zlib

import numpy as np
import pytest
import torch
from conftest import call

import data
from data import ByteTokenizer, Sequences, TrainedTokenizer, load_corpus, load_evaluation
from util import BadInput


@pytest.mark.parametrize("suffix, pack", [(".txt", bytes), (".gz", gzip.compress), (".XZ", lzma.compress)])
def test_text_files_in_every_form(tmp_path, suffix, pack):
    forms = {b"plain\ntext": "plain\ntext", b"\xef\xbb\xbfmark\r\nand CRLF\r": "mark\nand CRLF\n",
             "na\u00efve \u65e5".encode(): "na\u00efve \u65e5", b"one bad \xff byte": "one bad \ufffd byte"}
    for k, raw in enumerate(forms):
        (tmp_path / f"{k}{suffix}").write_bytes(pack(raw))
    (tmp_path / ".hidden").write_text("not read")
    expected = [(f"{k}{suffix}", text) for k, text in enumerate(forms.values())]
    assert list(data.documents(str(tmp_path))) == expected


def test_what_is_not_text_is_named(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(noise)[:-50])
    (tmp_path / "photo.jpg").write_bytes(noise)
    (tmp_path / "wide.txt").write_text("another encoding", encoding="utf-16")
    for name in ("cut.gz", "photo.jpg", "wide.txt", "nowhere"):
        with pytest.raises(BadInput, match=name):
            load_corpus(str(tmp_path / name))


def test_bytes_round_trip():
    tokenizer, text = ByteTokenizer(), "\u00dcn\u00efc\u00f6d\u00e9\n\x00 and [SEP]"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode(text).max() < 256
    assert tokenizer.decode([*tokenizer.encode("a"), 256, *tokenizer.encode("b")]) == "a\n\nb"


def test_cutting_at_lines_loses_nothing():
    text = "".join(f"line {i}\n" for i in range(300)) + "end"
    pieces = list(data.cut_at_lines(text, 100))
    assert "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces[:-1]) and len(pieces) > 10


def split_by_hand(folder, fraction):
    """The documents of a folder for training, and those for validation."""
    sides = ["", ""]
    for path in sorted(folder.glob("*.txt")):
        sides[zlib.crc32(path.name.encode()) < fraction * 2 ** 32] += path.read_text() + "\n\n"
    return sides


def test_documents_are_held_out_by_a_checksum(books, tmp_path):
    corpus = load_corpus(str(books))
    train, val = split_by_hand(books, 0.05)
    assert [corpus.tokenizer.decode(ids) for ids in (corpus.train, corpus.val)] == [train, val] and val
    assert corpus.val_bytes == sum(len(text) for text in val.split("\n\n"))
    whole = load_evaluation(str(books), ByteTokenizer())
    assert len(whole.val) == len(corpus.train) + len(corpus.val) and len(whole.train) == 0
    call(f"data.py text {books} --out {tmp_path / 'tokens'} --val-fraction 0.3")
    prepared = load_corpus(str(tmp_path / "tokens"))
    assert [prepared.tokenizer.decode(x) for x in (prepared.train, prepared.val)] == split_by_hand(books, 0.3)


def test_of_few_documents_the_tail_is_held_out(tmp_path):
    text = "".join(f"sentence {i}. " for i in range(2000))
    (tmp_path / "one.txt").write_text(text)
    call(f"data.py text {tmp_path / 'one.txt'} --out {tmp_path / 'tokens'}")
    for corpus in (load_corpus(str(tmp_path / "one.txt")), load_corpus(str(tmp_path / "tokens"))):
        assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text + "\n\n"
        tail = len(corpus.val)
        assert tail == round(0.05 * (len(text) + 1)) and abs(corpus.val_bytes - tail) <= 1


def test_pydoc_is_split_by_package():
    corpus, again = load_corpus("pydoc"), load_evaluation("pydoc", ByteTokenizer())
    assert np.array_equal(corpus.train, again.train) and np.array_equal(corpus.val, again.val)
    assert 1.5e6 < len(corpus.train) + len(corpus.val) < 3e6
    assert 0.05 < len(corpus.val) / len(corpus.train) < 0.25
    held = {}
    for (name, _), (side, _) in zip(data.documents("pydoc"), data.split(["pydoc"], (), 0.1)):
        held.setdefault(name if name.startswith("topics.") else name.partition(".")[0], set()).add(side)
    assert all(len(sides) == 1 for sides in held.values()) and {"val"} in held.values()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_trained_tokenizers_through_the_command(books, tmp_path, kind):
    pytest.importorskip("tokenizers")
    (tmp_path / "held.txt").write_text("Nobody saw the cat.")
    call(f"data.py text {books} --out {tmp_path / 'tokens'} --tokenizer {kind} --vocab 400 "
         f"--val {tmp_path / 'held.txt'} --max-bytes 20000")
    corpus = load_corpus(str(tmp_path / "tokens"))
    tokenizer, text = corpus.tokenizer, "the [SEP] cat\n sat on"
    assert tokenizer.kind == kind and corpus.train.max() < tokenizer.vocab <= 400
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == text if kind == "bpe" else decoded.split()[-3:] == ["cat", "sat", "on"]
    assert tokenizer.separator not in tokenizer.encode(text) and len(tokenizer.encode("the cat sat")) < 10
    assert "obody saw the cat." in tokenizer.decode(corpus.val) and corpus.val_bytes == 19
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["train"]["bytes"] == 20000
    assert len(load_evaluation(str(tmp_path / "tokens"), tokenizer).val) == len(corpus.val)
    with pytest.raises(BadInput, match="another tokenizer"):
        load_evaluation(str(tmp_path / "tokens"), ByteTokenizer())


def test_hugging_face_datasets_are_mapped_or_streamed(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [f"row {i} of the set\n" for i in range(60)]
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    source = f"hf:{tmp_path / 'set'}"
    for max_bytes in (None, 10 ** 6):
        assert [text for _, text in data.documents(source, max_bytes)] == texts
    part = load_corpus(source, hf_bytes=500)
    assert 500 <= len(part.train) + len(part.val) <= 500 + len(texts) and len(part.val)


@pytest.mark.parametrize("count", [64, 61])
def test_every_token_once_per_epoch_in_a_seeded_order(count):
    tokens = np.arange(count, dtype=np.uint16)
    sequences = Sequences(tokens, 8, separator=999, seed=1)
    epochs = [torch.cat([sequences.batch(e * 8 + i, 2) for i in range(0, 8, 2)]) for e in range(2)]
    for epoch in epochs:
        ids = epoch[epoch != 999]
        assert ids.sort().values.tolist() == list(range(count)) and (epoch == 999).sum() == 64 - count
    assert not torch.equal(*epochs) and not torch.equal(Sequences(tokens, 8, 999, 2).batch(0, 8), epochs[0])
    assert torch.equal(Sequences(tokens, 8, 999, 1).batch(5, 6, slice(1, 4)), torch.cat(epochs)[6:9])
    assert Sequences(tokens, 8, 999).batch(7, 2)[:, 0].tolist() == [56, 0]


def test_toy_sequences_have_one_class_unless_redrawn():
    for eps in (0, 0.5):
        corpus = load_corpus(f"toy:{eps}" if eps else "toy")
        position, rest = np.divmod(corpus.train.reshape(-1, data.POSITIONS).astype(int) - ord("0"), 8)
        assert (position == np.arange(data.POSITIONS)).all()
        classes = rest // data.VALUES
        alike = (1 - eps) ** 2 + (1 - (1 - eps) ** 2) / data.CLASSES  # neither redrawn, or by chance
        assert abs((classes[:, 1:] == classes[:, :1]).mean() - alike) < 0.01


def test_prefetch_draws_in_order_and_passes_errors_on():
    assert list(data.prefetch(lambda k: k * k, range(5))) == [0, 1, 4, 9, 16]
    assert not list(data.prefetch(int, []))
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda k: 1 / k, [1, 0]))


def test_a_tokenizer_comes_back_from_its_json():
    pytest.importorskip("tokenizers")
    for tokenizer in (ByteTokenizer(), TrainedTokenizer.train("bpe", 300, ["some text " * 9])):
        again = data.tokenizer_from_json(tokenizer.to_json())
        assert again.to_json() == tokenizer.to_json() and again.separator == tokenizer.separator
        assert np.array_equal(again.encode("some [SEP] text"), tokenizer.encode("some [SEP] text"))
