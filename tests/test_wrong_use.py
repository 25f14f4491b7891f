"""Every wrong use ends with one line that names the value and what is allowed, and changes no file."""

import gzip
import shutil

import pytest
from conftest import call

from util import BadInput, command_line

# command line | words of the message
WRONG = """
objectives.py | name an objective
objectives.py bert | 'bert' ar, dar
objectives.py ar --length 1 | length 1
objectives.py ar --length x | 'x' at least 1
objectives.py ar --t 2 | --t ar
objectives.py dar --t 8 --length 8 | --t 8 1..7
objectives.py mlm --mask 1.5 | 1.5 between 0 and 1
objectives.py mlm --mask a | 'a' 0.15
objectives.py vl --mask 0.3,0.1 | 0.3,0.1 range
objectives.py mtp --t 8 --length 8 | --t 8 1..7
objectives.py blocks --block 9 --length 8 | --block 9 1..7
objectives.py spans --mask 0 | --mask 0 between 0 and 1
objectives.py spans --span 0 | --span 0 at least 1
objectives.py segments --segment 3 | --segment 3 4 x 4
objectives.py segments --segment 0 | --segment 0 4 x 4
train.py --objective bert | 'bert' ar
train.py --obj ar | --obj
train.py --objective dar --streams 1 | --streams 1 dar
train.py --objective segments --data text.txt | segments images
train.py --mask-rule bert | --mask-rule bert ar
train.py --blind | --blind --streams 2
train.py --steps 5 --epochs 1 | --epochs 1 --steps
train.py --lr 0 | --lr 0 positive
train.py --lr nan | --lr nan positive
train.py --warmup 1 | --warmup 1 0..1
train.py --clip -1 | --clip -1 at least 0
train.py --batch-size 1.5 | '1.5' whole number
train.py --device gpu | --device gpu
train.py --dtype fp16 | 'fp16' bf16
train.py --fsdp --data text.txt | --fsdp torchrun
train.py --data none.txt | none.txt does not exist
train.py --data empty.txt | empty.txt
train.py --data cut.gz | cut.gz whole
train.py --data noise.txt | noise.txt UTF-8
train.py --data toy:2 | toy:2 less than 1
train.py --data toy --length 5 | --length 5 toy
train.py --data shapes --length 64 | --length 64 --size
train.py --data shapes --size 30 | --patch 4 30
train.py --data shapes --preset tiny | tiny images
train.py --data text.txt --preset vit-tiny | vit-tiny text
train.py --data text.txt --out ar | ar --resume --overwrite
train.py --resume | --resume --out
train.py --resume --out none | none does not exist
train.py --resume --out ar --lr 0.5 | --lr 0.5
train.py --resume --out ar | step 20
train.py --resume --out ar --steps 30 --data other.txt | other.txt data
train.py --resume --out ar --steps 30 --objective dar | --objective dar
train.py --resume --out spans --steps 30 --mask 0.3 | --mask 0.3
train.py --resume --out ar --overwrite | --resume --overwrite
train.py --resume --out cut | cut whole checkpoint
data.py text none.txt --out new | none.txt does not exist
data.py text empty.txt --out new | empty.txt
data.py text tokens --out new | tokens prepared already
data.py text text.txt --out tokens | tokens another --out
data.py text text.txt --out new --val-fraction 0 | --val-fraction 0 between
data.py text . --out ./new | new inside
data.py images text.txt --out new | text.txt folder
data.py images cifar --out new | data_batch_1.bin whole
evaluate.py | command
evaluate.py perplexity none | none does not exist
evaluate.py perplexity text.txt | text.txt checkpoint
evaluate.py perplexity cut | cut whole checkpoint
evaluate.py perplexity ar --regime padded | --regime padded next
evaluate.py perplexity ar --length 8 | --length 8 hf:
evaluate.py perplexity ar --data short.txt | short.txt
evaluate.py perplexity ar --json none/x.json | none/x.json folder
evaluate.py perplexity none --json . | . folder
evaluate.py perplexity none --plot x.txt | x.txt picture
evaluate.py connectivity none --plot x.jpg | x.jpg picture
evaluate.py reconstruct none --picture x.jpg | x.jpg png
evaluate.py curves ar --plot none/x.png | none/x.png
evaluate.py export none --out . | . exists
evaluate.py predict none --data x --csv . | . folder
evaluate.py perplexity spans | spans likelihood
evaluate.py perplexity images | images text
evaluate.py bound ar | ar any order
evaluate.py curves none | none does not exist
evaluate.py generate images | images text
evaluate.py generate ar --temperature -1 | --temperature -1 at least 0
evaluate.py generate ar --order confident | ar --order confident
evaluate.py generate ar --suffix x | --suffix
evaluate.py generate spans --order left | spans --order left
evaluate.py generate spans --suffix x --tokens 50 | tokens 32
evaluate.py connectivity ar none | none does not exist
evaluate.py connectivity images | images text
evaluate.py reconstruct ar | ar text images
evaluate.py reconstruct images --hide 0 | --hide 0 between
evaluate.py probe ar --data none.tsv | none.tsv label
evaluate.py probe ar --data text.txt | text.txt column
evaluate.py probe ar --data one.tsv | one.tsv only one label
evaluate.py probe ar --data scores.tsv | scores.tsv finetune
evaluate.py probe ar --data sst2 | sst2 --glue-dir
evaluate.py probe ar --data good.tsv --layer 9 | --layer 9 0..2
evaluate.py probe ar --data good.tsv --label-fraction 2 | --label-fraction 2
evaluate.py probe ar --data good.tsv --pixels | --pixels text
evaluate.py finetune ar --data good.tsv --lr 0 | --lr 0 positive
evaluate.py transfer ar --data shapes | ar text images
evaluate.py predict ar --data good.tsv | ar/classifier.pt finetune --out
evaluate.py finetune ar --data good.tsv --out ar | ar exists
evaluate.py probe ar --data good.tsv --dev good.tsv | all texts
evaluate.py glue ar --glue-dir none --tasks cola | none
evaluate.py glue ar --glue-dir none --tasks kola | 'kola' cola
evaluate.py glue images --glue-dir none | images text
spectral.py theorem4.1 --rho 0 | --rho 0
spectral.py theorem4.2 --r 50 --s 50 | r = 50 smaller
spectral.py theorem4.3 --T 100 | T = 100 smaller
spectral.py spectrum --objective dar --t 16 | --t 16 1..15
spectral.py all --json none/x.json | none/x.json folder
spectral.py all --plot x.txt | x.txt picture
spectral.py spectrum --objective ar --json none/x.json | none/x.json folder
spectral.py toy --eps 1 | --eps 1
bench.py --objectives bert | 'bert'
bench.py --objectives dar --t 500 | --t 500 1..127
reproduce.py table99 | 'table99' table1
reproduce.py table1 --tokens 0 | --tokens 0 positive
reproduce.py report --out none | none
"""
ROWS = [tuple(map(str.strip, row.split("|"))) for row in WRONG.strip().splitlines()]


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with a few right and many wrong inputs."""
    root, noise = tmp_path_factory.mktemp("place"), bytes(range(256)) * 8
    text = b"the cat sat on the mat\n" * 100
    for name, content in {
            "text.txt": text, "other.txt": text[::-1] * 2, "short.txt": b"one", "empty.txt": b"",
            "noise.txt": noise, "cut.gz": gzip.compress(noise)[:-20],
            "cifar/data_batch_1.bin": noise, "cifar/test_batch.bin": noise,
            "good.tsv": b"text\tlabel\n" + b"x\ta\ny\tb\n" * 9, "one.tsv": b"text\tlabel\nx\ta\ny\ta\n",
            "scores.tsv": b"text\tlabel\n" + b"x\t0.5\ny\t1.5\n" * 3}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    for name, run in (("ar", trained("ar")), ("spans", trained("spans")),
                      ("images", trained("mlm", data="shapes")), ("cut", trained("ar"))):
        shutil.copytree(run, root / name)
    checkpoint = root / "cut" / "ckpt.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    call(f"data.py text {root / 'text.txt'} --out {root / 'tokens'}")
    return root


def files_of(folder):
    return {path: path.is_dir() or (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("line, words", ROWS, ids=[line for line, _ in ROWS])
def test_a_wrong_use_is_refused_in_one_line_and_writes_nothing(line, words, place, monkeypatch):
    monkeypatch.chdir(place)
    before = files_of(place)
    with pytest.raises((BadInput, OSError)) as refused:
        call(line)
    message = " ".join(str(refused.value).split())
    assert all(word in message for word in words.split()), message
    assert files_of(place) == before


@pytest.mark.parametrize("traceback", ["0", "1"])
def test_a_wrong_use_ends_with_status_2_and_one_line(traceback, monkeypatch, capsys):
    monkeypatch.setenv("TRACEBACK", traceback)

    def main():
        raise BadInput("no such\nthing")

    with pytest.raises(SystemExit) as ended:
        command_line(main)
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert error == "error: no such thing\n" or traceback == "1" and error.startswith("Traceback")
    assert error.splitlines()[-1] == "error: no such thing"
