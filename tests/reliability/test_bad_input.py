"""Every wrong use ends with status 2 and a line that names the value and the remedy, and changes no file."""

import gzip
import json
import pickle
import shlex
import struct
from dataclasses import asdict

import numpy as np
import pytest

import bench
import data
import evaluate
import objectives
import spectral
import train
from engine import runs
from engine.settings import resolve
from images import sets
from model import Config, Transformer
from support import cli
from text import folders, tokenizers

# command: [(arguments, words of the message: what was given, what to do)]
WRONG = {
    objectives: [
        ("", "name an objective --all"),
        ("bert", "'bert' choose one of"),
        ("ar --length 0", "'0' at least 1"),
        ("ar --length 1", "length 1 of 2 or more"),
        ("ar --length 201", "--length 201 at most 200"),
        ("ar --length x", "'x' whole number"),
        ("ar --samples 0", "'0' at least 1"),
        ("ar --seed -1", "'-1' from 0 to"),
        ("ar --t 2", "--t belongs to dar leave out"),
        ("ar --mask 0.15", "--mask leave out"),
        ("ar more", "'more' choose one of"),
        ("dar --t 0", "'0' at least 1"),
        ("dar --t 8 --length 8", "--t 8 1..7"),
        ("dar --t 1,x", "'x' whole number"),
        ("mlm --mask 1.5", "--mask 1.5 such as --mask 0.15"),
        ("mlm --mask nan", "--mask nan such as --mask 0.15"),
        ("mlm --mask a", "'a' ratio like 0.15"),
        ("mlm --mask 0.1,0.2", "--mask 0.1,0.2 type --mask 0.1"),
        ("vl --mask 0.3", "--mask 0.3 from a range type"),
        ("vl --mask 0.3,0.1", "--mask 0.3,0.1 downwards type --mask 0.1,0.3"),
        ("vl --mask 0,2", "--mask 0,2 such as --mask 0.15,0.3"),
    ],
    train: [
        ("--objective bert", "'bert' choose from"),
        ("--objective", "--objective expected one argument"),
        ("--obj ar", "unrecognized --obj"),
        ("--streams 3", "3 choose from 1, 2"),
        ("--objective dar --streams 1", "--streams 1 --streams 2"),
        ("--mask-rule always", "--mask-rule always leave it out"),
        ("--objective vl --streams 2 --mask-rule bert", "--mask-rule bert two-stream leave it out"),
        ("--preset huge", "'huge' choose from tiny"),
        ("--length 1", "length 1 of 2 or more"),
        ("--objective dar --t 128", "--t 128 1..127"),
        ("--steps 0", "'0' at least 1"),
        ("--steps 100000001", "--steps 1e+08 at most 100 million"),
        ("--epochs 0", "--epochs 0 positive number"),
        ("--epochs nan", "--epochs 'nan' not a number"),
        ("--data tokens --epochs 1e9", "--epochs 1e+09 100 million"),
        ("--steps 5 --epochs 1", "--steps 5 --epochs 1 give one of them"),
        ("--batch-size 1.5", "'1.5' whole number"),
        ("--micro-batch 0", "'0' at least 1"),
        ("--batch-ramp 1", "--batch-ramp 1 in 0..1"),
        ("--lr 0", "--lr 0 positive number"),
        ("--lr nan", "--lr 'nan' not a number"),
        ("--lr fast", "--lr 'fast' not a number"),
        ("--schedule linear", "'linear' choose from cosine"),
        ("--warmup 1", "--warmup 1 in 0..1"),
        ("--weight-decay -1", "--weight-decay -1 at least 0"),
        ("--beta2 1", "--beta2 1 in 0..1"),
        ("--clip -1", "--clip -1 at least 0"),
        ("--optimizer sgd", "'sgd' choose from adamw muon"),
        ("--threads 0", "'0' at least 1"),
        ("--objective mlm --t 2", "--t belongs to dar --mask leave out"),
        ("--objective vl --mask 0.15", "--mask 0.15 type --mask 0.15,0.3"),
        ("--objective vl --mask a,b", "'a,b' a range like"),
        ("--seed 2147483648", "'2147483648' from 0 to 2147483647"),
        ("--device gpu", "--device gpu not usable here"),
        ("--device cuda:77", "--device cuda:77 not usable here"),
        ("--device meta", "--device meta cuda, mps and cpu"),
        ("--dtype fp16", "'fp16' choose from bf16"),
        ("--log-every 0", "'0' at least 1"),
        ("--save-every x", "'x' whole number"),
        ("--fsdp --data text.txt", "--fsdp torchrun"),
        ("--out text.txt --data text.txt", "text.txt is a file another --out"),
        ("--data none.txt", "none.txt does not exist give"),
        ("--data ''", "empty name does not exist give"),
        ("--data hf:", "empty give"),
        ("--data shapes --length 64", "--length does not go with vit-tiny"),
        ("--data shapes --preset tiny", "--preset tiny is for text"),
        ("--data shapes --size 30", "--patch 4 does not divide --size 30"),
        ("--data shapes --crop 0", "--crop 0 in 0..1"),
        (
            "--data shapes --objective mlm --mask 0.5 --mask-rule bert",
            "--mask-rule does not go with vit-tiny",
        ),
        ("--data text.txt --patch 4", "--patch does not go with tiny"),
        ("--data text.txt --preset vit-tiny", "--preset vit-tiny is for images"),
        ("--data tokens-cut", "train.bin manifest says anew"),
        ("--data tokens-damaged", "tokens-damaged not a whole token folder anew python data.py text"),
        ("--data tokens-deep", "tokens-deep not a whole token folder anew python data.py text"),
        ("--data tokens-infinite", "tokens-infinite not a whole token folder anew python data.py text"),
        ("--data tokens-large", "train.bin ids beyond the vocabulary of 257 anew"),
        ("--data pickled", "pickled pickles binary version"),
        ("--data cifar-cut", "data_batch_1.bin not whole"),
        ("--data cifar --size 16", "cifar 32 x 32 python data.py images --size 16"),
        ("--data pictures --size 16", "pictures 8 x 8 --size 16"),
        ("--data pictures-damaged", "pictures-damaged not a whole image folder anew python data.py images"),
        ("--out text", "text holds a run --resume --overwrite"),
        ("--resume", "--resume --out DIR"),
        ("--resume --overwrite --out text", "--resume without --overwrite"),
        ("--resume --out none", "none does not exist train.py writes it"),
        ("--resume --out text --lr 0.5", f"text other settings --lr {resolve().lr:g}, not 0.5"),
        ("--resume --out text --objective dar", "text other settings --objective ar, not dar"),
        ("--resume --out text --length 64", "text other settings --length 16, not 64"),
        (
            "--resume --out text --data other.txt --device cpu --dtype fp32",
            "data holds the tokens not of other.txt choose another",
        ),
        ("--resume --out damaged", "damaged not a whole checkpoint mv damaged/ckpt.prev.pt damaged/ckpt.pt"),
        ("--resume --out otherversion", "otherversion another version colour train anew"),
        ("--resume --out garbage", "garbage not a whole checkpoint"),
        ("--resume --out lacking", "lacking not a whole checkpoint lacks model"),
    ],
    data: [
        ("", "required command"),
        ("sounds", "'sounds' choose from text"),
        ("text --out new", "required INPUT"),
        ("text text.txt", "required --out"),
        ("text none.txt --out new", "none.txt does not exist give"),
        ("text '' --out new", "empty give"),
        ("text empty.txt --out new", "no text in empty.txt"),
        ("text cut.gz --out new", "cut.gz not a whole gz file"),
        ("text noise.xz --out new", "noise.xz not a whole xz file"),
        ("text text.txt --val none.txt --out new", "none.txt does not exist give"),
        ("text tokens --out new", "tokens holds tokens already train.py --data"),
        ("text text.txt --out tokens", "tokens not an empty folder another --out"),
        ("text text.txt --out other.txt", "other.txt not an empty folder another --out"),
        ("text . --out ./new", "new inside the input another folder"),
        ("text text.txt --out new --val-fraction 0", "--val-fraction 0 between 0 and 1"),
        ("text text.txt --out new --val-fraction nan", "--val-fraction nan between 0 and 1"),
        ("text text.txt --out new --tokenizer word", "'word' choose from byte"),
        ("text text.txt --out new --tokenizer bpe --vocab 100", "--vocab 100 needs 300"),
        ("text text.txt --out new --max-bytes 0", "'0' at least 1"),
        ("images --out new", "required INPUT"),
        ("images none --out new", "none not a folder give"),
        ("images text.txt --out new", "text.txt not a folder give"),
        ("images tokens-large --out new", "tokens-large prepared already train.py --data"),
        ("images glue --out new", "glue no JPEG"),
        ("images pickled --out new", "pickled pickles binary version"),
        ("images cifar --out tokens", "tokens not an empty folder another --out"),
        ("images cifar --out cifar/new", "new inside the input another folder"),
        ("images cifar --out new --size 0", "'0' at least 1"),
        ("images glue --out new --val-fraction 2", "--val-fraction 2 between 0 and 1"),
        ("images cifar-cut --out new", "data_batch_1.bin not whole"),
        ("images cifar-names --out new", "batches.meta.txt 2 classes, not 10"),
        ("images idx-cut --out new", "train-images-idx3-ubyte should have by its header"),
        ("images idx-huge --out new", "train-images-idx3-ubyte should have by its header"),
        ("images idx-labels --out new", "2 images 3 labels"),
        ("images idx-empty --out new", "train-images-idx3-ubyte not"),
        ("sheet", "required INPUT"),
        ("sheet none", "none not a folder give"),
        ("sheet text.txt", "text.txt not a folder give"),
        ("sheet pictures --size 16", "pictures 8 x 8 --size 16"),
        ("sheet pictures --columns 0", "'0' at least 1"),
        ("sheet pictures --out none/sheet.png", "none/sheet.png no such folder"),
    ],
    evaluate: [
        ("", "required command"),
        ("guess text", "'guess' choose from perplexity"),
        ("perplexity", "required CKPT"),
        ("perplexity none", "none does not exist train.py writes it"),
        ("perplexity text.txt", "text.txt not a whole checkpoint"),
        ("perplexity damaged", "damaged not a whole checkpoint mv damaged/ckpt.prev.pt"),
        ("perplexity otherversion", "otherversion another version"),
        ("perplexity text --data none.txt", "none.txt does not exist give"),
        ("perplexity text --data short.txt", "short.txt at least two sequences of 16"),
        ("perplexity text --max-sequences 1", "1 sequences at least two"),
        ("perplexity text --regime padded", "--regime padded leave out --regime"),
        ("perplexity text --regime both", "'both' choose from padded"),
        ("perplexity text --length 8", "--length 8 is for hf: models"),
        ("perplexity text --device gpu", "--device gpu not usable here"),
        ("perplexity text --json none/x.json", "--json none/x.json no such folder"),
        ("perplexity text --plot none/x.png", "--plot none/x.png no such folder"),
        ("perplexity picture", "picture trained on images reads text"),
        ("generate picture", "picture trained on images text"),
        ("generate text --temperature -1", "--temperature -1 at least 0"),
        ("generate text --temperature nan", "--temperature nan at least 0"),
        ("generate text --top-k -1", "--top-k -1 at least 0"),
        ("generate text --tokens 0", "'0' at least 1"),
        ("generate text --samples 0", "'0' at least 1"),
        ("generate text --order right", "'right' choose from left"),
        ("generate text --order confident", "ar left to right leave out --order confident"),
        ("generate text --at-once", "--at-once checkpoint is ar leave it out"),
        ("connectivity", "required CKPT"),
        ("connectivity text none", "none does not exist train.py writes it"),
        ("connectivity text --features 1", "1 sequences at least two"),
        ("connectivity text --top 0", "'0' at least 1"),
        ("connectivity picture", "picture trained on images reads text"),
        ("glue text", "required --glue-dir"),
        ("glue text --glue-dir none", "--glue-dir none not a folder gluebenchmark.com"),
        ("glue text --glue-dir glue --tasks kola", "'kola' choose from all cola"),
        ("glue text --glue-dir glue --tasks ax", "ax --submit DIR mnli"),
        ("glue text --glue-dir glue --tasks rte", "RTE/train.tsv does not exist gluebenchmark.com"),
        ("glue text --glue-dir glue --tasks cola", "CoLA/train.tsv, line 2 '7' not one of 0, 1"),
        ("glue text --glue-dir glue --tasks wnli", "WNLI/train.tsv, line 2 3 columns should be 4"),
        ("glue text --glue-dir glue --tasks sst2", "SST-2/train.tsv no column 'label' only sentence"),
        ("glue text --glue-dir glue --tasks cola --seeds 0", "'0' at least 1"),
        ("glue text --glue-dir glue --tasks cola --lr 0", "--lr 0 positive number"),
        (
            "glue text --glue-dir glue --tasks cola --pool first",
            "--pool first --attention full another --pool",
        ),
        (
            "glue text --glue-dir glue --tasks cola --results none/x.json",
            "--results none/x.json no such folder",
        ),
        (
            "glue text --glue-dir whole --tasks cola --results text.txt",
            "text.txt not a file of GLUE results another --results",
        ),
        ("glue picture --glue-dir glue", "picture trained on images GLUE is text"),
        ("probe text --data none.tsv", "none.tsv does not exist columns text and label"),
        ("probe text --data text.txt", "text.txt no line of column names --text-column"),
        ("probe text --data empty.txt", "empty.txt"),
        ("probe text --data good.tsv --dev none.tsv", "none.tsv does not exist give"),
        ("probe text --data one.tsv", "one.tsv only one label 'a'"),
        ("probe text --data scores.tsv", "scores.tsv scores finetune"),
        ("probe text --data sst2", "sst2 GLUE task --glue-dir"),
        ("probe text --data ax --glue-dir glue", "ax neither --tasks mnli,ax --submit"),
        ("probe text --data pydoc --dev good.tsv", "pydoc leave out --dev"),
        ("probe text --data good.tsv --layer 9", "--layer 9 0..2"),
        ("probe text --data good.tsv --layer top", "'top' whole number"),
        ("probe text --data good.tsv --pixels", "--pixels does not apply text leave it out"),
        ("probe text --data pictures", "text trained on text pictures holds images"),
        ("probe picture --data text.txt", "text.txt not a folder give"),
        ("probe picture --glue-dir glue", "--glue-dir does not apply images leave it out"),
        ("probe text --data good.tsv --label-fraction 2", "--label-fraction 2 0 excluded"),
        ("finetune text", "required --data"),
        ("finetune text --data good.tsv --label-fraction 0", "--label-fraction 0 0 excluded"),
        ("finetune text --data good.tsv --label-fraction nan", "--label-fraction 'nan' not a number"),
        ("finetune text --data good.tsv --mixup 1", "--mixup does not apply text leave it out"),
        ("finetune text --data good.tsv --regression", "'a' not a number"),
        ("finetune text --data good.tsv --epochs 0", "'0' at least 1"),
        ("finetune text --data single.tsv", "single.tsv"),
        ("finetune picture --data pictures --smoothing 1", "--smoothing 1 in 0..1"),
        ("finetune picture --data pictures --layer-decay 0", "--layer-decay 0 in 0..1"),
        ("finetune picture --data pictures --max-train 1", "--max-train 1 pictures classes"),
        ("finetune picture --data none", "none not a folder give"),
        ("reconstruct text", "text trained on text images"),
        ("reconstruct none", "none does not exist train.py writes it"),
        ("reconstruct picture --hide 0", "--hide 0 between 0 and 1"),
        ("reconstruct picture --hide nan", "--hide 'nan' not a number"),
        ("reconstruct picture --order random --hide 0.7", "--order random use --order raster"),
        ("reconstruct picture --order up", "'up' choose from raster"),
        ("reconstruct picture --max-images 0", "'0' at least 1"),
        ("reconstruct picture --data text.txt", "text.txt not a folder give"),
        ("reconstruct picture --picture none/x.png", "--picture none/x.png no such folder"),
        ("reconstruct relative", "relative --norm-pix cannot fill"),
        ("transfer picture", "required --data"),
        ("transfer text --data pictures", "text trained on text images"),
        ("transfer picture --data none", "none not a folder give"),
        ("transfer picture --data pictures --layer 9", "--layer 9 0..2"),
    ],
    spectral: [
        ("", "required command"),
        ("theorem5", "'theorem5' choose from theorem3.1"),
        ("theorem3.1 --seed x", "'x' whole number"),
        ("theorem4.1 --rho 0", "--rho 0 use a ratio from 0.25 to 0.75"),
        ("theorem4.1 --rho nan", "--rho nan use a ratio from 0.25 to 0.75"),
        ("theorem4.2 --r 0", "'0' at least 1"),
        ("theorem4.2 --s 1", "--s 1 use --s 2 or more"),
        ("theorem4.2 --r 50 --s 50", "r = 50, s = 50 limit use a smaller"),
        ("theorem4.3 --T 100", "T = 100 limit use a smaller"),
        ("theorem4.3 --steps 0", "'0' at least 1"),
        ("spectrum", "required --objective"),
        ("spectrum --objective bert", "'bert' choose from"),
        ("spectrum --objective dar --t 9", "--t 9 1..7"),
        ("spectrum --objective ar --s 1", "length 1 of 2 or more"),
        ("spectrum --objective ar --mask 0.5", "--mask leave out"),
        ("spectrum --objective mlm --mask 0.01", "--mask 0.01 use a ratio or a larger --s"),
        ("spectrum --objective ar --weighting all", "'all' choose from targets"),
        ("trained", "required CKPT"),
        ("trained none", "none does not exist train.py writes it"),
        ("trained picture", "picture trained on images reads text"),
        ("trained text --device gpu", "--device gpu not usable here"),
        ("trained text --features 3", "3 features give"),
    ],
    bench: [
        ("--objectives bert", "'bert' choose from"),
        ("--objectives ar --t 2", "--t belongs to dar leave out"),
        ("--objectives dar --t 500", "--t 500 1..127"),
        ("--streams 3", "3 choose from 1, 2"),
        ("--preset huge", "'huge' choose from tiny"),
        ("--heads 3", "width 256 3 heads"),
        ("--length 0", "'0' at least 1"),
        ("--preset vit-tiny --patch 5", "--size 32 --patch 5"),
        ("--clock sun", "'sun' choose from wall"),
        ("--dtype fp16", "'fp16' --dtype"),
        ("--device gpu", "--device gpu not usable here"),
        ("--json none/x.json", "--json none/x.json no such folder"),
    ],
}
ROWS = [
    pytest.param(module, shlex.split(argv), words.split(), id=f"{module.__name__} {argv}")
    for module, rows in WRONG.items()
    for argv, words in rows
]


def write_run(folder, damage=None, config=None, **settings):
    """A run folder of a tiny model that never trained."""
    settings = resolve(batch_size=4, **settings)
    config = config or Config(257, settings.length, 2, 16, 2)
    tokenizer = None if config.patch else tokenizers.ByteTokenizer().to_json()
    content = {
        "settings": asdict(settings),
        "model_config": asdict(config),
        "model": Transformer(config).state_dict(),
        "optimizer": {},
        "step": 1,
        "seen": 4,
        "seconds": 0.0,
        "dtype": "fp32",
        "tokenizer": tokenizer,
        "train_total": 1,
    }
    if damage:
        damage(content)
    folder.mkdir()
    runs.save_checkpoint(folder / "ckpt.pt", content)


def copied(folder, name, **changes):
    """A copy of a prepared folder with other files, {name without dots: bytes}."""
    target = folder.with_name(name)
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(changes.get(path.name.replace(".", "_"), path.read_bytes()))
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few right and many wrong inputs."""
    root, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    text = b"the cat sat on the mat\n" * 100
    for name, content in {
        "text.txt": text,
        "other.txt": text[::-1],
        "short.txt": b"one",
        "empty.txt": b"",
        "cut.gz": gzip.compress(rng.bytes(5000))[:-100],
        "noise.xz": rng.bytes(500),
        "good.tsv": b"text\tlabel\n" + b"x\ta\ny\tb\n" * 9,
        "one.tsv": b"text\tlabel\nx\ta\ny\ta\n",
        "scores.tsv": b"text\tlabel\nx\t0.5\ny\t1.5\n",
        "single.tsv": b"text\tlabel\nx\ta\n",
        "glue/CoLA/train.tsv": b"a\t1\t\tGood.\na\t7\t\tBad.\n",
        "glue/CoLA/dev.tsv": b"a\t1\t\tGood.\n",
        "whole/CoLA/train.tsv": b"a\t1\t\tGood.\na\t0\t\tBad.\n",
        "whole/CoLA/dev.tsv": b"a\t1\t\tGood.\na\t0\t\tBad.\n",
        "glue/SST-2/train.tsv": b"sentence\nfine\n",
        "glue/SST-2/dev.tsv": b"sentence\tlabel\nfine\t1\n",
        "glue/WNLI/train.tsv": b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\n",
        "glue/WNLI/dev.tsv": b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    tokens = root / "tokens"
    folders.prepare_text([str(root / "text.txt")], tokens, quiet=True)
    manifest = json.loads((tokens / "manifest.json").read_text())
    ids = np.fromfile(tokens / "train.bin", np.uint16)
    copied(tokens, "tokens-cut", train_bin=ids[:-3].tobytes())
    copied(tokens, "tokens-large", train_bin=(ids + 300).astype(np.uint16).tobytes())
    copied(tokens, "tokens-damaged", manifest_json=b'{"dtype": ')
    copied(tokens, "tokens-deep", manifest_json=b"[" * 100_000)
    copied(
        tokens,
        "tokens-infinite",
        manifest_json=json.dumps({**manifest, "val": {"tokens": 1, "bytes": float("inf")}}).encode(),
    )

    cifar = root / "cifar"
    cifar.mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = rng.integers(0, 256, (6, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(6) % 3
        records.tofile(cifar / name)
    sets.prepare_images(str(cifar), root / "pictures", size=8, quiet=True)
    copied(cifar, "cifar-cut", data_batch_1_bin=bytes(3000))
    (copied(cifar, "cifar-names") / "batches.meta.txt").write_text("cat\ndog\n")
    copied(root / "pictures", "pictures-damaged", manifest_json=b'{"format": "images", "size": -8}')
    (root / "pickled").mkdir()
    (root / "pickled" / "data_batch_1").write_bytes(pickle.dumps({"data": 1}))

    def idx(name, pixels, header=(2, 4, 4), labels=2):
        folder = root / name
        folder.mkdir()
        for prefix in ("train", "t10k"):
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
                struct.pack(">4I", 0x803, *header) + bytes(pixels)
            )
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
                struct.pack(">2I", 0x801, labels) + bytes(labels)
            )

    idx("idx-cut", 30)
    idx("idx-huge", 32, (2**32 - 1, 2**32 - 1, 2**32 - 1))
    idx("idx-labels", 32, labels=3)
    idx("idx-empty", 0, (0, 4, 4), labels=0)

    word = {"data": str(root / "text.txt"), "length": 16}
    write_run(root / "text", **word)
    folders.prepare_text([word["data"]], root / "text" / "data", quiet=True)
    write_run(root / "masked", objective="vl", **word)
    write_run(root / "lacking", lambda content: content.pop("model"), **word)
    write_run(root / "otherversion", lambda content: content["settings"].update(colour="red"), **word)
    write_run(root / "damaged", **word)
    whole = (root / "damaged" / "ckpt.pt").read_bytes()
    (root / "damaged" / "ckpt.prev.pt").write_bytes(whole)
    (root / "damaged" / "ckpt.pt").write_bytes(whole[: len(whole) // 2])
    (root / "garbage").mkdir()
    (root / "garbage" / "ckpt.pt").write_bytes(rng.bytes(3000))
    pixel = {"data": str(root / "pictures"), "size": 8, "patch": 4}
    shape = {
        "vocab": 0,
        "length": 4,
        "layers": 2,
        "width": 16,
        "heads": 2,
        "patch": 4,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }
    write_run(root / "picture", config=Config(**shape), **pixel)
    write_run(root / "relative", config=Config(**shape, norm_pix=True), norm_pix=True, **pixel)
    return root


def snapshot(root):
    """{path: when it was last changed} of every file below, and of every folder its name."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize("module, argv, words", ROWS)
def test_wrong_use(module, argv, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if module is evaluate and len(argv) > 1 and "--device" not in argv:
        argv = [*argv, "--device", "cpu", "--dtype", "fp32"]  # spares the measurement that chooses
    before = snapshot(place)
    with pytest.raises(SystemExit) as end:
        cli.command_line(lambda: module.main(argv))
    output, error = capsys.readouterr()
    assert end.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not output
    missing = [word for word in words if word not in error]
    assert not missing, f"{missing} not in: {error}"
    assert snapshot(place) == before


def test_there_are_enough_of_them():
    assert len(ROWS) >= 80 and len({row.id for row in ROWS}) == len(ROWS)


def test_the_right_inputs_are_right(place, monkeypatch, capsys):
    """Otherwise a row could fail for another reason than the one it is for."""
    monkeypatch.chdir(place)
    for command in (
        "perplexity text --max-sequences 4",
        "generate masked --order confident --tokens 3",
        "reconstruct picture --max-images 4",
        "probe text --data good.tsv",
    ):
        evaluate.main([*command.split(), "--device", "cpu", "--dtype", "fp32"])
    data.main(["sheet", "cifar", "--out", str(place / "sheet.png"), "--columns", "2"])
    assert "perplexity" in capsys.readouterr().out
