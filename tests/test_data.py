"""Text: tokenizers, documents, the split, the order of sequences, token folders, the toy model."""

import functools
import gzip
import json
import lzma
import os
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
    """Noise and cut files stand in test_wrong_use.py."""
    (tmp_path / "wide.txt").write_text("another encoding", encoding="utf-16")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nothing")
    for name in ("wide.txt", "pipe", "broken"):
        with pytest.raises(BadInput, match=name):
            load_corpus(str(tmp_path / name))
    with pytest.raises(BadInput, match="broken .* neither a file nor a folder"):
        load_corpus(str(tmp_path))


def test_links_are_followed_once(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.txt").write_text("linked")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part").symlink_to("../store")
    (tmp_path / "in" / "part.txt").write_text("own")
    expected = [(f"part{os.sep}a.txt", "linked"), ("part.txt", "own")]
    assert list(data.documents(str(tmp_path / "in"))) == expected


def test_what_is_not_utf8_is_told_with_its_count(tmp_path, capsys):
    evaluation = functools.partial(load_evaluation, tokenizer=ByteTokenizer())
    for name, read in (("train.txt", load_corpus), ("test.txt", evaluation)):
        (tmp_path / name).write_bytes(b"plain text\n" * 9000 + b"caf\xe9 au lait\n" * 7)
        read(str(tmp_path / name))
        told = capsys.readouterr().err
        assert name in told and " 7 characters " in told


def test_bytes_round_trip():
    tokenizer, text = ByteTokenizer(), "\u00dcn\u00efc\u00f6d\u00e9\n\x00 and [SEP]"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode(text).max() < 256
    assert tokenizer.decode([*tokenizer.encode("a"), 256, *tokenizer.encode("b")]) == "a\n\nb"


@pytest.mark.parametrize("unit, ends", [("line {}\n", "\n"), ("word{} ", "0123456789"), ("{}", "0123456789")])
def test_cutting_at_lines_loses_nothing(unit, ends):
    text = "".join(unit.format(i) for i in range(900)) + "end"
    pieces = list(data.cut_at_lines(text, 100))
    assert "".join(pieces) == text and all(piece[-1] in ends for piece in pieces[:-1])
    assert all(100 <= len(piece) <= 200 for piece in pieces[:-1])


def test_documents_are_held_out_by_a_checksum(books, tmp_path):
    call(f"data.py text {books} --out {tmp_path / 'tokens'} --val-fraction 0.3")
    for source, fraction in ((books, 0.05), (tmp_path / "tokens", 0.3)):
        expected = ["", ""]
        for path in sorted(books.iterdir()):
            expected[zlib.crc32(path.name.encode()) < fraction * 2 ** 32] += path.read_text() + "\n\n"
        corpus = load_corpus(str(source))
        assert [corpus.tokenizer.decode(ids) for ids in (corpus.train, corpus.val)] == expected
        assert 0 < corpus.val_bytes == sum(len(text) for text in expected[1].split("\n\n"))
    whole = load_evaluation(str(books), ByteTokenizer())
    assert len(whole.val) == len(corpus.train) + len(corpus.val) and len(whole.train) == 0


def test_of_few_documents_the_tail_is_held_out(tmp_path):
    text = "".join(f"sentence {i}. " for i in range(2000))
    (tmp_path / "one.txt").write_text(text)
    call(f"data.py text {tmp_path / 'one.txt'} --out {tmp_path / 'tokens'}")
    cut = len(text) - round(0.05 * len(text))
    for corpus in (load_corpus(str(tmp_path / "one.txt")), load_corpus(str(tmp_path / "tokens"))):
        sides = [corpus.tokenizer.decode(ids) for ids in (corpus.train, corpus.val)]
        assert sides == [text[:cut] + "\n\n", text[cut:] + "\n\n"] and corpus.val_bytes == len(text) - cut
    three = load_corpus([text[:5], text[5:cut + 1], text[cut + 1:]])  # the end begins in the second of them
    assert [three.tokenizer.decode(ids).replace("\n\n", "|") for ids in (three.train, three.val)] == [
        f"{text[:5]}|{text[5:cut]}|", f"{text[cut]}|{text[cut + 1:]}|"]


@pytest.mark.parametrize("kind", ["byte", "bpe", "wordpiece"])
def test_the_bytes_of_a_tail_in_another_language(tmp_path, kind):
    """An appendix of other letters has more bytes a token than the rest: none of them is estimated."""
    if kind != "byte":
        pytest.importorskip("tokenizers")
    tail = "".join(chr(0x4e00 + k % 800) for k in range(400))
    (tmp_path / "one.txt").write_text("some English words\n" * 400 + tail, encoding="utf-8")
    out = call(f"data.py text {tmp_path / 'one.txt'} --tokenizer {kind} --vocab 300 "
               f"--out {tmp_path / 'tokens'}")
    assert load_corpus(str(tmp_path / "tokens")).val_bytes == 3 * round(0.05 * 8000) and "1,200 bytes" in out


def test_pydoc_is_split_by_package():
    corpus, again = load_corpus("pydoc"), load_evaluation("pydoc", ByteTokenizer())
    assert np.array_equal(corpus.train, again.train) and np.array_equal(corpus.val, again.val)
    assert 1.5e6 < len(corpus.train) + len(corpus.val) < 3e6
    assert 0.05 < len(corpus.val) / len(corpus.train) < 0.25
    held = {}
    for (name, _), (side, _) in zip(data.documents("pydoc"), data.split(["pydoc"], (), 0.1)):
        held.setdefault(name if name.startswith("topics.") else name.partition(".")[0], set()).add(side)
    assert all(len(sides) == 1 for sides in held.values()) and {"val"} in held.values()


def test_what_is_held_out_holds_text(tmp_path):
    for k in range(25):
        name = f"{k}.txt"
        held = zlib.crc32(name.encode()) < 0.05 * 2 ** 32
        (tmp_path / name).write_text(" \n"[k % 3:] if held else "a text")
    corpus = load_corpus(str(tmp_path))
    assert 0 < corpus.val_bytes < 20 and "text" in corpus.tokenizer.decode(corpus.val)
    whole = load_evaluation(str(tmp_path), ByteTokenizer())
    assert len(whole.val) == len(corpus.train) + len(corpus.val) - 1  # the cut text is closed twice
    for text in ("", "x", "ten bytes."):
        (tmp_path / "tiny").write_text(text)
        with pytest.raises(BadInput, match="text"):
            load_corpus(str(tmp_path / "tiny"))
    (tmp_path / "empty").touch()
    with pytest.raises(BadInput, match="empty.*too few for validation"):
        call(f"data.py text {tmp_path} --val {tmp_path / 'empty'} --out {tmp_path.parent / 'out'}")


def test_validation_text_is_not_trained_on(books, tmp_path, capsys):
    (tmp_path / "copy.txt").write_bytes((books / "11.txt").read_bytes().replace(b"\n", b"\r\n"))
    call(f"data.py text {books} --val {books / '07.txt'} {tmp_path / 'copy.txt'} --out {tmp_path / 'tokens'}")
    corpus = load_corpus(str(tmp_path / "tokens"))
    texts = {path.name: path.read_text() for path in sorted(books.iterdir())}
    held = [texts.pop(name) for name in ("07.txt", "11.txt")]
    for ids, expected in ((corpus.train, texts.values()), (corpus.val, held)):
        assert corpus.tokenizer.decode(ids) == "".join(text + "\n\n" for text in expected)
    assert "--val has them: 2" in capsys.readouterr().err
    with pytest.raises(BadInput, match="too few for training"):
        call(f"data.py text {books / '07.txt'} --val {books} --out {tmp_path / 'none'}")


def test_no_folder_of_somebody_else_is_touched(books, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("out", "link", "out.partial"):
        with pytest.raises(BadInput, match=f"{out}.* exists"):
            call(f"data.py text {books} --out {tmp_path / out}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "mine", "out.partial"]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_trained_tokenizers_through_the_command(books, tmp_path, kind):
    pytest.importorskip("tokenizers")
    (tmp_path / "held.txt").write_text("Nobody saw the cat.")
    command = (f"data.py text {books} --out {{}} --tokenizer {kind} --vocab 400 "
               f"--val {tmp_path / 'held.txt'} --max-bytes 20000")
    call(command.format(tmp_path / "tokens"))
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
    call(command.format(tmp_path / "again"))
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "tokens" / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_words_without_end_are_cut(kind):
    """Time would be quadratic in the length of a word."""
    pytest.importorskip("tokenizers")
    text = "na\u00efve " + "\u65e5\u672c" * 500 + " " + "acgt" * 900 + "\n" + "-_" * 400 + " " * 350 + "end"
    tokenizer = TrainedTokenizer.train(kind, 400, [text])
    words = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert max(len(word) for word, _ in words) == 100
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == text if kind == "bpe" else "[UNK]" not in decoded and decoded.endswith("end")


def test_a_tokenizer_comes_back_from_its_json():
    pytest.importorskip("tokenizers")
    text = "some [SEP] text \ud83d."  # half of a surrogate pair
    for tokenizer in (ByteTokenizer(), TrainedTokenizer.train("bpe", 300, ["some text " * 9])):
        again = data.tokenizer_from_json(tokenizer.to_json())
        assert again.to_json() == tokenizer.to_json() and again.separator == tokenizer.separator
        assert np.array_equal(again.encode(text), tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == "some [SEP] text ?."


def hub_folder(folder, texts):
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return f"hf:{folder}"


def test_hugging_face_datasets_are_read_or_streamed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = [f"row {i} of the set\n" for i in range(60)]
    source = hub_folder(tmp_path / "set", texts)
    for max_bytes in (None, 10 ** 6):
        assert [text for _, text in data.documents(source, max_bytes)] == texts
    with_null = hub_folder(tmp_path / "null", [None, *texts])
    assert [text for _, text in data.documents(with_null)] == texts
    assert "null rows left out: 1" in capsys.readouterr().err
    for name, odd in (("list", ["a"]), ("number", 5)):
        with pytest.raises(BadInput, match="row 0 has no text"):
            list(data.documents(hub_folder(tmp_path / name, [odd])))
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
    assert torch.equal(sequences.lengths(0, 16), (torch.cat(epochs) != 999).sum(1))
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
