"""Budgets: what every model of a scale is trained with, and how much of it is evaluated. All numbers stand
here."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scale:
    """All models of one kind, text or images, get the same flags, the same data and the same budget."""

    about: str
    flops: float    # per second, of which the estimates of time are made until stages have run
    seeds: int      # pretraining runs of each model
    tokens: float   # that a text model reads; None: the preset's
    epochs: float   # over the images; None: the preset's
    vocab: int
    train: dict     # kind of data: flags of train.py
    evaluate: dict  # command, or command and kind: flags of evaluate.py
    forward: dict   # command: sequences forward, backward counting twice, for the estimates
    counts: dict    # kind of data: its training examples, for the estimates
    prepare: dict = field(default_factory=dict)  # kind of data: flags of data.py, where it is raw
    curve: tuple = (1,)  # shares of the image epochs after which `dose` probes, each a training of its own


FEWER = 6.7  # 1/0.15: with so many times fewer tokens a loss at every token has as many targets

HUB = 3e11  # FLOPs of a training sequence of GPT-2 medium and BERT large

PAPER_TEXT = "hf:monology/pile-uncopyrighted"  # the Pile itself is no longer distributed

SAFER = "--lr 2.4e-3 --clip 1"  # MAE's base rate of 1.5e-4, times batch/256
RISK = ("the paper's image settings are a rate of 8e-3 (5e-4 x 4096/256) without clipping, and such a run "
        f"may diverge after days; --safer trains with {SAFER} instead")

SMOKE_SCALE = Scale(
    "two cores, minutes, nothing downloaded; the numbers mean nothing", flops=2e10, seeds=2, tokens=10_240,
    epochs=0.08, vocab=257, counts={"text": 2e5, "images": 8000},
    train={"text": "--preset tiny --length 32 --batch-size 8", "images": "--preset vit-tiny --batch-size 16"},
    evaluate={"perplexity": "--max-sequences 16", "bound": "--max-sequences 16",
              "connectivity": "--features 500 --top 2000", "probe": "--max-train 300 --max-test 300",
              "finetune": "--epochs 1 --max-train 300 --max-test 300", "reconstruct": "--max-images 20",
              "transfer": "--max-train 300 --max-test 300"},
    forward={"perplexity": 1e3, "bound": 1e3, "connectivity": 500, "probe": 1000, "finetune": 2000,
             "reconstruct": 320, "transfer": 1000})

CPU_SCALE = Scale(
    "4 layers x 128; texts of 128 tokens (WordPiece, 1,024 words), perplexity on 64 of them, probes on at "
    "most 5,000; images of 32 x 32 in 16 patches, probes and fine-tuning on 10,000, L2 on 200",
    flops=1.5e11, seeds=3,
    tokens=1_500_000, epochs=4, vocab=1024, counts={"text": 2.2e7, "images": 50_000}, curve=(0.25, 1),
    prepare={"text": "--tokenizer wordpiece --vocab 1024", "images": "--size 32"},
    train={"text": "--preset tiny --batch-size 16 --optimizer muon",
           "images": "--preset vit-tiny --patch 8 --batch-size 64 --optimizer muon --lr 4e-3"},
    evaluate={"perplexity": "--max-sequences 64", "bound": "--max-sequences 24", "connectivity": "",
              "probe text": "--pool mean --max-train 5000", "probe images": "--max-train 10000",
              "finetune": "--epochs 8 --max-train 10000", "reconstruct": "--max-images 200",
              "transfer": "--max-train 10000", "glue": "--seeds 1 --epochs 3 --max-train 5000 --pool mean"},
    forward={"perplexity": 1.2e4, "bound": 8e3, "connectivity": 8e3, "probe": 2e4, "finetune": 8e5,
             "reconstruct": 2e4, "transfer": 2e4, "glue": 3e4})

GPU_SCALE = Scale(
    "8 layers x 512 for text and 12 x 384 for images of 32 x 32; one H100 or H200 at 40% MFU",
    flops=0.4 * 989e12, seeds=3, tokens=4e8, epochs=100, vocab=8192, counts={"text": 4e8, "images": 50_000},
    curve=(0.1, 0.2, 0.5, 1), prepare={"text": "--tokenizer wordpiece --vocab 8192", "images": "--size 32"},
    train={"text": "--preset small",
           "images": "--preset vit-small --size 32 --patch 4 --batch-size 1024 --lr 2e-3"},
    evaluate={"perplexity": "--max-sequences 1024", "bound": "--max-sequences 1024", "connectivity": "",
              "probe text": "--pool mean", "probe images": "", "finetune": "--epochs 50",
              "reconstruct": "--max-images 10000", "transfer": "", "glue": "--seeds 1 --max-train 60000"},
    forward={"perplexity": 2e5, "bound": 2e5, "connectivity": 8e3, "probe": 6e4, "finetune": 8e6,
             "reconstruct": 2e5, "transfer": 1e5, "glue": 6e6})

PAPER_SCALE = Scale(
    "the paper's settings", flops=0.4 * 989e12, seeds=1, tokens=None, epochs=None, vocab=32_768,
    counts={"text": 7.5e10, "images": 1_281_167, "images100": 126_689},
    prepare={"text": "--tokenizer wordpiece --vocab 32768 --val-fraction 0.001 --max-bytes 330000000000",
             "images": "--size 224", "images100": "--size 224"},
    train={"text": "--preset paper", "images": "--preset vit-base", "images100": "--preset vit-small"},
    evaluate={"perplexity": "--max-sequences 4096", "bound": "--max-sequences 4096", "connectivity": "",
              "probe images": "--classifier sgd", "finetune": "--batch-size 4096",
              "reconstruct": "--max-images 50000 --lpips alex", "transfer": "", "glue": "--seeds 3"},
    forward={"perplexity": 8e5, "bound": 8e5, "connectivity": 8e3, "probe": 1.4e6, "finetune": 4e8,
             "reconstruct": 3e6, "transfer": 3e5, "glue": 2e7})

SCALES = {"smoke": SMOKE_SCALE, "cpu": CPU_SCALE, "gpu": GPU_SCALE, "paper": PAPER_SCALE}
