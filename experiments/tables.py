"""The paper's tables and figures, and targets beyond it: models, columns, printed numbers and claims.

A target is a function of the Place that gives a Table: its rows are models, its columns measures, and each
cell comes from stages (measures.py). TARGETS at the end has all of them.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import plots
from experiments.measures import (
    FEWER,
    MEAN_COLOUR,
    UNIGRAMS,
    Model,
    connectivity,
    evaluation,
    few_labels,
    finetune,
    gain_share,
    glue_columns,
    perplexity,
    probe,
    reconstruction,
    text_probe,
    transfer,
)
from experiments.verdicts import Claim
from model import SIZES
from spectral import TABLE_9

AR, DAR, MASKED = "Autoregressive", "Diversity-enhanced", "Masked"
PAIR = {AR: "ar --streams 2", DAR: "dar --t 2"}
TWO_STREAMS = ("All run through two streams of one architecture, with the same {} in the same order and the "
               "same settings, tuned for none of them.")
VIT_B = " The paper's numbers are of ViT-B on ImageNet-1K."
REGIMES = "padded", "truncated"


@dataclass(frozen=True)
class Table:
    title: str
    fair: str                                    # how the comparison was made
    rows: dict = field(default_factory=dict)     # {row: Model}
    columns: dict = field(default_factory=dict)  # {column: Column}
    paper: dict = field(default_factory=dict)    # {row: {column: number}}
    claims: tuple = ()
    extra: tuple = ()                            # stages that no cell needs
    picture: Callable = None                     # (path, {row: what its first stage wrote}); None: dots


# ---------------------------------------------------------------------------- rows and claims

def of(kind, flags):
    """{row: Model} from {row: objective and its flags}."""
    return {row: Model(text, kind) for row, text in flags.items()}


def with_untrained(rows):
    """(rows and an untrained network for each architecture and attention among them, {row: its own}).
    Networks of one kind that are probed under the same attention differ only in what they learned."""
    first = {}
    for model in rows.values():
        first.setdefault((model.kind, model.attention), model)
    several = len({kind for kind, _ in first}) > 1
    names = {(kind, attention): "Untrained" + f" {kind}" * several
             + (f", {attention} attention" if len(first) > several + 1 else "") for kind, attention in first}
    untrained = {names[key]: replace(model, budget=1, instead="untrained") for key, model in first.items()}
    return untrained | rows, {row: names[model.kind, model.attention] for row, model in rows.items()}


def with_guess(row, rows):
    """rows, and before them UNIGRAMS or MEAN_COLOUR, which know what is frequent, or the mean."""
    first = next(model for model in rows.values() if not model.instead)
    return {row: replace(first, instead="guess")} | rows


def claim(columns, column, text, weights, paper=None, untrained=None, primary=False):
    """The Claim that a weighted sum of rows is positive in a column, in the column's direction.

    Its effect is that of the paper's numbers where it gives all of them, else the claim is ours. A column
    that is a mean stands for its parts.
    """
    measure, effect = columns[column], None
    sign, parts = (-1 if measure.lower else 1), measure.mean_of or (column,)
    printed = {row: (paper or {}).get(row, {}).get(column) for row in weights}
    if None not in printed.values():
        effect = sign * sum(weight * measure.judged(printed[row]) for row, weight in weights.items())
    contrast = {(row, part): sign * weight / len(parts) for row, weight in weights.items() for part in parts}
    floors = {(row, part): (measure.floor or (untrained or {}).get(row), part) for row, part in contrast}
    return Claim(f"{column}: {text}", contrast, effect, effect is None, primary, measure.unit, floors,
                 measure.lower)


def beating_unigrams(columns, rows):
    """The floors of claims of other measures: these rows do better than unigrams in every perplexity."""
    return {(row, name): (UNIGRAMS, name) for row in rows for name, column in columns.items()
            if column.floor == UNIGRAMS}


def compare(columns, pairs, paper=None, untrained=None, primary=None):
    """Claims that the first of each pair of rows is better, in every column.

    Where the paper gives numbers for both and these are not better, it claims nothing, and neither is
    claimed. `primary` is the (column, better row, worse row) of the primary claim.
    """
    found = [claim(columns, column, f"{better} better than {worse}", {better: 1, worse: -1}, paper, untrained,
                   (column, better, worse) == primary) for better, worse in pairs for column in columns]
    return tuple(one for one in found if one.effect is None or one.effect > 0)


# ---------------------------------------------------------------------------- text

def table1(place):
    """GLUE and perplexity: here of stand-ins of one size, at paper scale of public models."""
    title = "Table 1: autoregressive and masked models, classification and generation"
    scores = {AR: {"Avg": 72.8}, MASKED: {"Avg": 80.5}}
    if place.name == "paper":
        rows = {AR: Model("hf:openai-community/gpt2-medium"),
                MASKED: Model("hf:google-bert/bert-large-uncased")}
        wikitext = f"--data {shlex.quote(str(place.data / 'wikitext2'))}"
        columns = glue_columns(place) | {"Bits per byte": perplexity("padded", wikitext, bits=True)}
        fair = ("Public GPT-2 medium and BERT large, of about one size but of other data and longer training "
                "each, for the paper's. It takes perplexity from BERT-Large-CAS, and its perplexities are of "
                "other vocabularies than each other's, so that bits per byte stand here. They are not "
                "judged: BERT's tokenizer drops letter case and spacing, which its bits per byte leave out. "
                "Nor is GLUE, since there are no untrained rows.")
        return Table(title, fair, rows, columns, scores if "Avg" in columns else {})
    as_many = "Autoregressive, as many targets"
    rows = of("text", {AR: "ar", MASKED: "mlm --mask 0.15"}) | {as_many: Model("ar", budget=1 / FEWER)}
    rows, untrained = with_untrained(rows)
    classify = text_probe(place) | few_labels(place) if place.name == "cpu" else glue_columns(place)
    generate = {f"Perplexity, {regime}": perplexity(regime) for regime in REGIMES}
    paper = {AR: dict.fromkeys(generate, 22.8), MASKED: dict.fromkeys(generate, 34.1)}
    if "Avg" in classify:
        paper = {row: numbers | scores[row] for row, numbers in paper.items()}
    claims = compare(generate, [(AR, MASKED), (as_many, MASKED)], paper,
                     primary=("Perplexity, padded", AR, MASKED))
    judged = {name: column for name, column in classify.items() if column.mean_of} or classify
    claims += compare(judged, [(MASKED, AR), (MASKED, as_many)], paper, untrained)
    fair = ("Stand-ins of one size, trained here on the same tokens, for GPT-2 medium and BERT large; "
            f"held-out text for WikiText-2, {'linear probes' if place.name == 'cpu' else 'the dev parts'} "
            f"for GLUE. Of the same tokens a masked model predicts 0.15; the last row reads {FEWER:g} times "
            "fewer and so has about as many targets. The paper's 34.1 is of another vocabulary and of "
            "another kind of model (ERRATA.md).")
    if "author, few labels" in classify:
        fair += " Author: who wrote a passage of a novel that the probe has not seen, from 64 of each author."
    return Table(title, fair, with_guess(UNIGRAMS, rows), classify | generate, paper, claims)


def table2(place):
    columns, (rows, untrained) = glue_columns(place), with_untrained(of("text", PAIR))
    names = ("MNLI-m", "MNLI-mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA", "Avg")
    printed = {AR: dict(zip(names, (78.2, 79.3, 90.3, 82.1, 54.3, 84.7, 85.6, 81.9, 30.9, 74.1))),
               DAR: dict(zip(names, (80.5, 80.6, 89.9, 83.7, 56.4, 87.2, 86.3, 85.1, 34.2, 76.0)))}
    mean, paper = list(columns)[-1], {}
    for row, numbers in printed.items():
        paper[row] = {name: numbers[name] for name in columns if name in numbers}
        if paper[row] and mean not in numbers:  # of the tasks that are there
            paper[row][mean] = sum(paper[row].values()) / len(paper[row])
    fair = (TWO_STREAMS.format("tokens") + " Scores are of the dev parts (the paper: test), on the tasks "
            "that are there. SST-2, where the paper's own numbers go the other way, is not judged.")
    return Table("Table 2: GLUE, autoregressive against diversity-enhanced", fair, rows, columns, paper,
                 compare(columns, [(DAR, AR)], paper, untrained, (mean, DAR, AR)))


FIFTEEN, THIRTY, DRAWN = "Masked (0.15)", "Masked (0.3)", "Variable-length [0.15, 0.3]"
MASKS = {FIFTEEN: "mlm --mask 0.15", THIRTY: "mlm --mask 0.3", DRAWN: "vl --mask 0.15,0.3"}


def table7(place):
    other = "hf:allenai/c4::en" if place.name == "paper" else str(place.data / "other")
    columns, elsewhere = {regime: perplexity(regime) for regime in REGIMES}, ""
    if place.name == "paper" or place.name != "smoke" and Path(other).exists():
        columns |= {f"other text, {regime}": perplexity(regime, f"--data {shlex.quote(other)}")
                    for regime in REGIMES}
        elsewhere = ", and on C4 for the other text,"
    numbers = {FIFTEEN: (59.6, 71.2), THIRTY: (50.2, 63.8), DRAWN: (45.1, 59.4)}
    paper = {row: {name: pair[name.startswith("other")] for name in columns} for row, pair in numbers.items()}
    fair = ("One architecture, the same tokens read, the same settings. The paper names neither regime: "
            "padded keeps the later positions as [MASK], truncated cuts them off; its numbers on the "
            f"Pile{elsewhere} stand beside both.")
    claims = compare(columns, [(DRAWN, THIRTY), (DRAWN, FIFTEEN), (THIRTY, FIFTEEN)], paper,
                     primary=("padded", DRAWN, THIRTY))
    return Table("Table 7: left-to-right perplexity of masked models", fair,
                 with_guess(UNIGRAMS, of("text", MASKS)), columns, paper, claims)


def variety(place):
    """Table 7's question: does a range of ratios help because it varies, or because it hides more?"""
    rows = of("text", {f"fixed {ratio}": f"mlm --mask {ratio}" for ratio in (0.15, 0.225, 0.3, 0.575)})
    rows |= of("text", {"[0.15, 0.3]": "vl --mask 0.15,0.3", "[0.15, 1]": "vl --mask 0.15,1"})
    fewer = f"{FEWER:g} x fewer tokens"
    rows |= {f"{row}, {fewer}": replace(rows[row], budget=1 / FEWER) for row in ("fixed 0.3", "[0.15, 1]")}
    columns = {regime: perplexity(regime) for regime in REGIMES}
    numbers = {"fixed 0.15": 59.6, "fixed 0.225": float(np.sqrt(59.6 * 50.2)), "fixed 0.3": 50.2,
               "[0.15, 0.3]": 45.1}
    paper = {row: dict.fromkeys(REGIMES, number) for row, number in numbers.items()}
    pairs = [("[0.15, 0.3]", "fixed 0.225"), ("[0.15, 1]", "fixed 0.575"), ("[0.15, 0.3]", "fixed 0.3"),
             ("[0.15, 1]", "fixed 0.3"), ("[0.15, 1]", "fixed 0.15"), ("fixed 0.3", "fixed 0.15"),
             ("fixed 0.15", f"fixed 0.3, {fewer}"), ("fixed 0.15", f"[0.15, 1], {fewer}")]
    fair = ("One architecture, the same settings; the same tokens but for the last two rows, which read "
            f"{FEWER:g} times fewer: beside these, fixed 0.15 is a model that was trained so much longer. A "
            "range is compared with the fixed ratio of the same mean, which hides as many tokens. The "
            "paper's number beside 0.225 is not printed there: it is the geometric mean of those for 0.15 "
            "and 0.3.")
    return Table("Variety or ratio?", fair, with_guess(UNIGRAMS, rows), columns, paper,
                 compare(columns, pairs, paper, primary=("padded", *pairs[0])))


def trend(place):
    """Do the effects of Tables 7 and 1 come with scale? Every budget is a run with a schedule of its own."""
    most, flags, sizes = place.scale["tokens"], {AR: "ar", **MASKS}, place.scale["sizes"]
    widths = {preset: "{layers} x {width}".format(**SIZES[preset]) for preset in sizes}
    first, *_ = sizes
    pairs = {(DRAWN, THIRTY): (50.2 / 45.1, sizes), (AR, FIFTEEN): (34.1 / 22.8, {first: sizes[first][:1]})}
    columns, rows, claims = {regime: perplexity(regime) for regime in REGIMES}, {}, []

    def weighted(*parts):
        return {row: k * weight for k, contrast in parts for row, weight in contrast.items()}

    for (better, worse), (factor, budgets) in pairs.items():  # in perplexity
        contrasts = {}
        for preset, share in ((preset, share) for preset, shares in budgets.items() for share in shares):
            budget = f"{widths[preset]}, {share * most:,.0f} tokens"
            rows |= {f"{name}, {budget}": Model(flags[name], budget=share, preset=preset)
                     for name in (better, worse)}
            contrasts[preset, share] = {f"{better}, {budget}": 1, f"{worse}, {budget}": -1}
        for regime in REGIMES:
            about = f"{better} better than {worse}"
            found = {(preset, share): claim(columns, regime, f"{about}, {widths[preset]}, "
                                                             f"{share * most:,.0f} tokens", weights)
                     for (preset, share), weights in contrasts.items()}
            pool = tuple(one.contrast for one in found.values())
            claims += [replace(one, effect=float(np.log(factor)), ours=False, pool=pool, at={
                "panel": f"{worse} / {better}, {regime}", "line": widths[preset], "tokens": share * most})
                for (preset, share), one in found.items()]
            for preset, shares in budgets.items():
                if len(shares) > 1:  # the slope of least squares
                    x = np.log10(shares) - np.mean(np.log10(shares))
                    weights = weighted(*((k, contrasts[preset, share])
                                         for k, share in zip(x / np.sum(x ** 2), shares)))
                    text = f"{about}, {widths[preset]}: more so with every tenfold of tokens"
                    primary = (worse, regime, preset) == (THIRTY, "padded", first)
                    claims += [replace(claim(columns, regime, text, weights, primary=primary), pool=pool)]
                if preset != first:  # the mean over the budgets of both widths
                    both = [share for share in shares if share in budgets[first]]
                    weights = weighted(*((sign / len(both), contrasts[size, share]) for share in both
                                         for size, sign in ((preset, 1), (first, -1))))
                    text = f"{about}, {widths[preset]}: more so than at {widths[first]}"
                    claims += [replace(claim(columns, regime, text, weights), pool=pool)]
    fair = ("One architecture, the same text and settings; a budget is a run of its own, not a checkpoint of "
            "a longer one. The variance of seeds is taken as one over the budgets and widths of a contrast, "
            "as few seeds alone decide nothing. Autoregressive models are of the first width and budget.")
    return Table("Trend: do the effects come with scale?", fair, with_guess(UNIGRAMS, rows), columns,
                 claims=tuple(claims))


def figure2(place):
    """How alike the features of contexts are, of the pairs that are most alike (App. B.2)."""
    rows, _ = with_untrained(of("text", {AR: "ar", FIFTEEN: MASKS[FIFTEEN], DAR: "dar --t 2",
                                         "Variable-length": MASKS[DRAWN]}))
    inner = "inner product, top pairs"
    columns = {inner: connectivity("inner_product", "mean"),
               "cosine, top pairs": connectivity("cosine", "mean"),
               "cosine, all pairs": connectivity("cosine", "mean_of_all")}
    claims = compare(columns, [(FIFTEEN, AR)], primary=(inner, FIFTEEN, AR))
    columns |= {"Perplexity, padded": perplexity("padded")}
    floors = beating_unigrams(columns, (FIFTEEN, AR))

    def picture(path, found):
        curves = [{**x["checkpoints"][0], "label": row} for row, x in found.items()]
        plots.ranks(path, {"checkpoints": curves})

    fair = ("One size, the same tokens, contexts from the same held-out sequences. Inner products, which the "
            "paper shows in a picture without numbers, are in units of each network's own; cosines compare "
            "networks.")
    claims = tuple(replace(one, text=one.text.replace("better", "more alike"), ours=not one.primary,
                           floors=floors, lower=True) for one in claims)
    return Table("Figure 2: similarity of features of different texts", fair, with_guess(UNIGRAMS, rows),
                 columns, claims=claims, picture=picture)


def figure3(place):
    """What masked models gain of what autoregressive ones do, by the length of the prefix."""
    rows = of("text", {AR: "ar", **MASKS})
    spans = {"below S/8": lambda k, S: k < S / 8, "S/8 .. S/2": lambda k, S: S / 8 <= k < S / 2,
             "from S/2": lambda k, S: k >= S / 2}
    columns = {f"{regime}, {span}": gain_share(regime, prefixes, rows[AR])
               for regime in REGIMES for span, prefixes in spans.items()}
    columns |= {f"Perplexity, {regime}": perplexity(regime) for regime in REGIMES}
    claims = []
    for regime in REGIMES:
        short, long = f"{regime}, below S/8", f"{regime}, from S/2"
        less = {(FIFTEEN, long): 1, (FIFTEEN, short): -1}
        text = f"{regime}: {FIFTEEN} gains less of what {AR} gains after short prefixes than after long ones"
        claims += [Claim(text, less, primary=regime == "padded"),
                   Claim(f"{regime}: {DRAWN} has less of that difference",
                         {**less, (DRAWN, long): -1, (DRAWN, short): 1}, ours=True)]
    floors = beating_unigrams(columns, (AR, FIFTEEN, DRAWN))
    claims = tuple(replace(one, floors=floors, lower=True) for one in claims)

    def picture(path, found):
        plots.by_length(path, {row: x["results"] for row, x in found.items()})

    fair = ("Of what the autoregressive model gains over unigrams, the share that a masked model gains, "
            "(H_unigram - L_masked)/(H_unigram - L_ar), by the tokens in the prefix. One size, the same "
            "tokens, the same held-out sequences. The paper shows a picture without numbers.")
    return Table("Figure 3: the length of the prefix", fair, with_guess(UNIGRAMS, rows), columns,
                 claims=claims, picture=picture)


# ---------------------------------------------------------------------------- images

PROBE_AND_FINETUNE = {"LP Acc.": probe(), "FT Acc.": finetune()}


def images_table(title, rows, numbers, pairs=((DAR, AR),), columns=PROBE_AND_FINETUNE, note=""):
    """A table of linear probes and fine-tuning; `numbers` are the paper's, row by row."""
    paper = {row: dict(zip(columns, pair)) for row, pair in zip(rows, numbers)}
    rows, untrained = with_untrained(rows)
    fair = (TWO_STREAMS.format("images") + " Fine-tuning is MAE's without RandAugment and random erasing, "
            "that of vit-tiny also without mixing and smoothed labels." + note)
    return Table(title, fair, rows, columns, paper,
                 compare(columns, pairs, paper, untrained, ("LP Acc.", *pairs[-1])))


def table3(place):
    full = place.name == "paper"
    sizes = {"ViT-S": "images100", "ViT-B": "images"} if full else {"ViT": "images"}
    rows = {f"{size} {row}": Model(flags, kind)
            for size, kind in sizes.items() for row, flags in PAIR.items()}
    numbers = ((33.1, 81.1), (36.2, 83.2)) * full + ((56.2, 82.5), (59.4, 82.9))
    return images_table("Table 3: images, linear probe and fine-tuning", rows, numbers,
                        [(f"{size} {DAR}", f"{size} {AR}") for size in sizes], note="" if full else VIT_B)


def table4(place):
    tenth = "--label-fraction 0.1"
    return images_table("Table 4: a tenth of the labels", of("images", PAIR), ((41.2, 70.2), (45.3, 71.1)),
                        columns={"LP Acc.": probe(tenth), "FT Acc.": finetune(tenth)}, note=f"{VIT_B} The "
                        "caption says 10% of the labels, the text 1%; here it is 10%, of every class alike.")


def table5(place):
    rows = {f"{share} budget, {row}": Model(flags, "images", budget)
            for share, budget in (("half", 0.5), ("full", 1)) for row, flags in PAIR.items()}
    return images_table("Table 5: half and all of the pretraining epochs (the paper: 100 and 200)", rows,
                        ((48.2, 81.4), (52.6, 82.1), (56.2, 82.5), (59.4, 82.9)),
                        [(f"{share} budget, {DAR}", f"{share} budget, {AR}") for share in ("half", "full")],
                        note=VIT_B)


def table6(place):
    columns, (rows, untrained) = transfer(place), with_untrained(of("images", PAIR))
    mean = list(columns)[-1]
    paper = {AR: {mean: 76.2}, DAR: {mean: 78.9}}
    fair = (TWO_STREAMS.format("images") + VIT_B + " Sets: those in transfer/ and the drawn shapes "
            "(the paper: nine public sets). Accuracy is over all test images, though the usual protocol of "
            "aircraft, caltech101, flowers and pets is the mean over classes. Where images/ is CIFAR-10, "
            "the column cifar10 is no transfer.")
    return Table("Table 6: transfer, mean accuracy over other image sets", fair, rows, columns, paper,
                 compare({mean: columns[mean]}, [(DAR, AR)], paper, untrained, (mean, DAR, AR)))


def table8(place):
    large, small, drawn = "Masked (0.75)", "Masked (0.5)", "Variable-length [0.5, 0.75]"
    models = of("images", {large: "mlm --mask 0.75", small: "mlm --mask 0.5", drawn: "vl --mask 0.5,0.75"})
    columns = {"L2": reconstruction("l2", 4), "PSNR": reconstruction("psnr", 2)}
    if "--lpips" in place.scale["evaluate"]["reconstruct"]:
        columns["Perceptual"] = reconstruction("lpips", 3)
    columns["LP Acc."] = probe()  # what the better reconstruction costs
    numbers = {large: (0.127, 0.201), small: (0.115, 0.192), drawn: (0.072, 0.136)}
    paper = {row: {name: x for name, x in zip(("L2", "Perceptual"), pair) if name in columns}
             for row, pair in numbers.items()}
    rows, untrained = with_untrained(models)
    claims = compare(columns, [(drawn, small), (drawn, large), (small, large)], paper, untrained,
                     ("L2", drawn, small))
    picture = evaluation(place, list(models.values()), 0, "reconstruct", "--max-images 8", plot="--picture")
    fair = ("MAE with the same images seen; the same hidden patches for all, never the first. L2 is over "
            "hidden patches only and in units of the data's variance (the paper says neither the unit nor "
            f"the part), and judged as a factor.{VIT_B} The linear probe is ours, as in Table 3. Picture: "
            "original, hidden patches in their mean colour, then the trained rows in order.")
    return Table("Table 8: reconstruction of hidden patches, one at a time", fair,
                 with_guess(MEAN_COLOUR, rows), columns, paper, claims, (picture,))


def table9(place):
    rows = {"t = 1": "ar --streams 2", "t = 2": "dar --t 2", "t = 3": "dar --t 3", "t = 4": "dar --t 4",
            "t = 1 or 2": "dar --t 1,2"}
    pairs = [("t = 3", "t = 1"), ("t = 4", "t = 1"), ("t = 2", "t = 4"), ("t = 3", "t = 4"),
             ("t = 1 or 2", "t = 1"), ("t = 2", "t = 1 or 2"), ("t = 3", "t = 1 or 2"), ("t = 2", "t = 1")]
    return images_table("Table 9: the choice of t", of("images", rows), (*TABLE_9.values(), (58.1, 82.5)),
                        pairs, note=f"{VIT_B} How the paper mixes t is not said; here each sequence draws 1 "
                        "or 2.")


def dose(place):
    """Tables 3 and 9 as a dose-response curve: the more tokens at once, the better the features?"""
    doses = {f"t = {t}": t for t in (1, 2, 4, 8)}
    rows = {row: "ar --streams 2" if t == 1 else f"dar --t {t}" for row, t in doses.items()}
    rows |= {f"masked {ratio}": f"mlm --mask {ratio} --streams 2" for ratio in (0.5, 0.75)}
    rows, untrained = with_untrained(of("images", rows))
    rows |= {"Raw pixels": replace(rows["t = 1"], instead="pixels")}
    shares = {f"after {share:.0%}": probe(attention="own", share=share) for share in place.scale["curve"]}
    attention = {f"{name} attention": probe(attention=name) for name in ("causal", "full")}
    last = list(shares)[-1]
    paper = {row: {last: TABLE_9[t][0]} for row, t in doses.items() if t in TABLE_9}
    claims = compare({last: shares[last]}, [(f"t = {t}", "t = 1") for t in (2, 4, 8)], paper, untrained,
                     (last, "t = 2", "t = 1"))
    x = np.log2(list(doses.values()))
    weights = dict(zip(doses, (x - x.mean()) / np.sum((x - x.mean()) ** 2)))  # of a least-squares slope
    slope = claim(shares, last, "slope of accuracy on log2 t", weights, {}, untrained)
    printed, _ = np.polyfit(np.log2(list(TABLE_9)), [probed for probed, _ in TABLE_9.values()], 1)
    pairs = [(f"masked {ratio}", f"t = {t}") for ratio in (0.5, 0.75) for t in (1, 2)]
    claims += replace(slope, effect=float(printed)), *compare(attention, pairs, untrained=untrained)
    fair = (TWO_STREAMS.format("images") + " Linear probes after shares of the budget, each a training of "
            "its own, under the attention that the objective was trained with, and at the end under either "
            "attention. The paper's numbers, of ViT-B on ImageNet-1K, are those of Table 9, whose slope is "
            "over t = 1 to 4.")
    return Table("Dose and response: t, and masked against autoregressive", fair, rows, shares | attention,
                 paper, claims)


def masked(place):
    """Does the masked objective classify better than the autoregressive one, on images, each in its own
    attention?"""
    better, worse = "masked 0.75", "t = 1"
    rows = of("images", {worse: "ar --streams 2", better: "mlm --mask 0.75 --streams 2"})
    rows, untrained = with_untrained(rows)
    columns = {"LP Acc.": probe(attention="own")}
    [primary] = compare(columns, [(better, worse)], {}, untrained, ("LP Acc.", better, worse))
    return Table("Masked against autoregressive, images", TWO_STREAMS.format("images") + " The paper "
                 "compares them in classification by the GLUE scores of two public models (Table 1) and "
                 "prints no number for images.", rows, columns, {}, (replace(primary, ours=False),))


# ---------------------------------------------------------------------------- theory

def of_one_stage(place, title, fair, name, argv, *needs, plot="--plot"):
    """A Table without rows: what one command finds and draws."""
    stage = place.stage(name, argv, *needs, plot=plot if find_spec("matplotlib") else None)
    return Table(title, fair, extra=(stage,))


def theory(place):
    return of_one_stage(place, "Theory: what is printed and what holds", "Computed on the paper's toy model.",
                        "spectral", ("spectral.py", "all"), plot=None)


def toy(place):
    return of_one_stage(place, "The theory on its own ground", "Networks on the paper's toy model and on a "
                        "noisy one; see spectral.py toy.", "toy",
                        ("spectral.py", "toy", *["--quick"] * (place.name == "smoke")))


def bridge(place):
    """The Transformer on the toy model, blind and told, a stage for each seed: experiments/bridge.py."""
    quick, seeds = (["--quick"], 2) if place.name == "smoke" else ([], 3)
    runs = [place.stage(f"bridge-seed{seed}", ("experiments.bridge", "train", "--seed", str(seed), *quick))
            for seed in range(seeds)]
    return of_one_stage(place, "From the theory to our Transformer", "The Transformer of train.py on the "
                        "paper's toy model, its queries blind or told which position they predict; see "
                        "experiments/bridge.py.",
                        "bridge", ("experiments.bridge", "summary", *(str(run.out) for run in runs)), *runs)


TARGETS = {target.__name__: target for target in (
    table1, table2, table3, table4, table5, table6, table7, table8, table9, figure2, figure3, variety, trend,
    dose, masked, theory, toy, bridge)}
