"""The paper's tables and figures: models, measures, the printed numbers and the claims that they make.

A target is a function of the Place that gives a Table: its rows are models, its columns measures, and each
cell comes from stages. ours.py has the targets beyond the paper.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.measures import (
    attention_of,
    connectivity,
    few_labels,
    finetune,
    gain_share,
    glue_columns,
    perplexity_column,
    probe,
    reconstruction,
    text_probe,
    told_of_authors,
    transfer,
)
from experiments.pictures import plot_curves_by_length, plot_similarity
from experiments.scales import FEWER
from experiments.stages import Model, evaluation
from experiments.verdicts import Claim
from theory.claims import TABLE_9

AR, DAR = "Autoregressive", "Diversity-enhanced"
PAIR = {AR: "ar --streams 2", DAR: "dar --t 2"}
AS_MANY = "Autoregressive, as many targets"
TWO_STREAMS = ("All run through two streams of one architecture, with the same {} in the same order and the "
               "same settings, tuned for none of them.")


@dataclass(frozen=True)
class Table:
    title: str
    fair: str                # how the comparison was made
    rows: dict = field(default_factory=dict)     # {row: model, see stages.Model}
    columns: dict = field(default_factory=dict)  # {column: Measure}
    paper: dict = field(default_factory=dict)    # {row: {column: number}}
    claims: tuple = ()
    extra: tuple = ()        # stages that no cell needs
    picture: Callable = None  # (place, seeds, content, path): draws; None: dots


def of(kind, flags):
    """{row: model} from {row: objective and its flags}."""
    return {row: f"{kind}: {text}" for row, text in flags.items()}


def with_untrained(rows):
    """(rows and an untrained network for each architecture and attention among them, {row: its untrained
    row}).

    Networks of one kind that are probed under the same attention differ only in what they learned.
    """
    base = {row: (Model(model).kind, attention_of(model)) for row, model in rows.items()
            if not Model(model).hub}
    first = {key: next(row for row in base if base[row] == key) for key in base.values()}
    several = len({kind for kind, _ in first}) > 1
    names = {(kind, attention): "Untrained" + f" {kind}" * several
             + (f", {attention} attention" if len(first) > several + 1 else "") for kind, attention in first}
    untrained = {names[key]: "untrained " + Model(rows[row]).times(1 / Model(rows[row]).budget).text
                 for key, row in first.items()}
    return untrained | rows, {row: names[key] for row, key in base.items()}


def with_counts(rows):
    """rows and before them what knows only how often tokens and classes occur, in text."""
    first = next(model for model in rows.values() if Model(model).kind == "text" and Model(model).learned)
    return {"Unigrams, majority class": f"counts {first}"} | rows


def contrast(columns, column, weights):
    """{(row, column): weight}; a column that is a mean stands for its parts."""
    parts = columns[column].mean_of or (column,)
    sign = -1 if columns[column].lower else 1
    return {(row, part): sign * weight / len(parts) for row, weight in weights.items() for part in parts}


def claim(columns, column, text, weights, paper=None, untrained=None, primary=False, ours=None):
    """The Claim that a weighted sum of rows is positive in a column, in its direction; its effect is that of
    the paper's numbers where it gives all of them."""
    measure, printed = columns[column], {row: (paper or {}).get(row, {}).get(column) for row in weights}
    effect = None
    if all(number is not None for number in printed.values()):
        sign = -1 if measure.lower else 1
        effect = sign * sum(weight * measure.judged(printed[row]) for row, weight in weights.items())
    cells = contrast(columns, column, weights)
    base = {(row, part): ((untrained or {}).get(row), part) for row, part in cells if measure.classifies}
    return Claim(f"{column}: {text}", cells, effect, effect is None if ours is None else ours, primary,
                 measure.unit, base)


def compare(columns, pairs, paper=None, untrained=None, primary=None):
    """Claims that the first of each pair of rows is better, in every column. Where the paper gives numbers
    for both and these are not better, it claims nothing, and neither is claimed. `primary`: the (column,
    better row, worse row)."""
    found = []
    for better, worse in pairs:
        for column in columns:
            one = claim(columns, column, f"{better} better than {worse}", {better: 1, worse: -1}, paper,
                        untrained, (column, better, worse) == primary)
            found += [one] if one.effect is None or one.effect > 0 else []
    return tuple(found)


# ---------------------------------------------------------------------------- targets

def table1(place):
    """GLUE and perplexity: here of stand-ins of one size, at paper scale of public models."""
    if place.name == "paper":
        rows = {AR: "hf:openai-community/gpt2-medium", "Masked": "hf:google-bert/bert-large-uncased"}
        wikitext = f"--data {shlex.quote(str(place.data / 'wikitext2'))}"
        columns = glue_columns(place) | {"Bits per byte": perplexity_column("padded", wikitext, bits=True)}
        fair = ("Public GPT-2 medium and BERT large, of about one size but of other data and longer training "
                "each, for the paper's. It takes perplexity from BERT-Large-CAS, and its perplexities are of "
                "other vocabularies than each other's, so that bits per byte stand here. They are not "
                "judged: BERT's tokenizer drops letter case and spacing, which its bits per byte leave out. "
                "Nor is GLUE, since there are no untrained rows.")
        untrained = {}
    else:
        rows, untrained = with_untrained({AR: "text: ar", "Masked": "text: mlm --mask 0.15",
                                          AS_MANY: f"text x{1 / FEWER:g}: ar"})
        rows = with_counts(rows)
        probes = text_probe(place) | few_labels(place) if place.name == "cpu" else glue_columns(place)
        columns = probes | {f"Perplexity, {regime}": perplexity_column(regime)
                            for regime in ("padded", "truncated")}
        scored = "linear probes" if place.name == "cpu" else "the dev parts"
        fair = ("Stand-ins of one size, trained here on the same tokens, for GPT-2 medium and BERT large; "
                f"held-out text for WikiText-2, {scored} for GLUE. Of the same tokens a masked model "
                f"predicts 0.15; the last row reads {FEWER:g} times fewer and so has about as "
                "many targets. The paper's 34.1 is of another vocabulary and of another kind of model "
                "(ERRATA.md)." + told_of_authors(place))
    score = next((name for name in columns if name.startswith("Avg")), None)
    paper = {AR: {"Perplexity, padded": 22.8, "Perplexity, truncated": 22.8, "Avg": 72.8},
             "Masked": {"Perplexity, padded": 34.1, "Perplexity, truncated": 34.1, "Avg": 80.5}}
    paper = {row: {column: number for column, number in numbers.items() if column in columns}
             for row, numbers in paper.items()}
    classify = {name: measure for name, measure in columns.items() if measure.classifies}
    classify = {score: columns[score]} if score else classify
    generate = {name: measure for name, measure in columns.items() if not measure.classifies}
    claims = ()
    if untrained:
        claims = compare(classify, [("Masked", AR), ("Masked", AS_MANY)], paper, untrained)
        claims = compare(generate, [(AR, "Masked"), (AS_MANY, "Masked")], paper,
                         primary=("Perplexity, padded", AR, "Masked")) + claims
    return Table("Table 1: autoregressive and masked models, classification and generation", fair, rows,
                 columns, paper, claims)


def table2(place):
    """GLUE after pretraining from left to right, one token at a time or two."""
    columns, (rows, untrained) = glue_columns(place), with_untrained(of("text", PAIR))
    names = ("MNLI-m", "MNLI-mm", "SST-2", "STS-B", "RTE", "QNLI", "QQP", "MRPC", "CoLA", "Avg")
    paper = {AR: dict(zip(names, (78.2, 79.3, 90.3, 82.1, 54.3, 84.7, 85.6, 81.9, 30.9, 74.1))),
             DAR: dict(zip(names, (80.5, 80.6, 89.9, 83.7, 56.4, 87.2, 86.3, 85.1, 34.2, 76.0)))}
    mean = list(columns)[-1]
    for row, numbers in paper.items():
        own = [numbers[name] for name in columns if name in numbers]
        paper[row] = {name: numbers[name] for name in columns if name in numbers}
        if own and mean not in numbers:
            paper[row][mean] = round(sum(own) / len(own), 1)
    return Table("Table 2: GLUE, autoregressive against diversity-enhanced", TWO_STREAMS.format("tokens")
                 + " Scores are of the dev parts (the paper: test), on the tasks that are there. SST-2, "
                 "where the paper's own numbers go the other way, is not judged.", rows, columns, paper,
                 compare(columns, [(DAR, AR)], paper, untrained, (mean, DAR, AR)))


def images_table(title, paper, columns, rows=None, pairs=((DAR, AR),), note=""):
    rows, untrained = with_untrained(rows or of("images", PAIR))
    if not any(row.startswith("ViT-") for row in rows):
        note = " The paper's numbers are of ViT-B on ImageNet-1K." + note
    recipe = (" Fine-tuning is MAE's without RandAugment, that of vit-tiny also without mixing, erasing and "
              "smoothed labels." if "FT Acc." in columns else "")
    primary = next(iter(columns)), *pairs[-1]
    return Table(title, TWO_STREAMS.format("images") + recipe + note, rows, columns, paper,
                 compare(columns, pairs, paper, untrained, primary))


def lp_ft(numbers):
    return dict(zip(("LP Acc.", "FT Acc."), numbers))


LP_FT = {"LP Acc.": probe(), "FT Acc.": finetune()}


def table3(place):
    numbers = {"ViT-S": ((33.1, 81.1), (36.2, 83.2)), "ViT-B": ((56.2, 82.5), (59.4, 82.9))}
    numbers["ViT"] = numbers["ViT-B"]
    kinds = {"ViT-S": "images100", "ViT-B": "images"} if place.name == "paper" else {"ViT": "images"}
    rows = {f"{size} {label}": f"{kind}: {flags}" for size, kind in kinds.items()
            for label, flags in PAIR.items()}
    paper = {f"{size} {label}": lp_ft(row) for size in kinds for label, row in zip(PAIR, numbers[size])}
    return images_table("Table 3: images, linear probe and fine-tuning", paper, LP_FT, rows,
                        [(f"{size} {DAR}", f"{size} {AR}") for size in kinds])


def table4(place):
    tenth = "--label-fraction 0.1"
    return images_table("Table 4: a tenth of the labels", {AR: lp_ft((41.2, 70.2)), DAR: lp_ft((45.3, 71.1))},
                        {"LP Acc.": probe(extra=tenth), "FT Acc.": finetune(tenth)}, note=" The caption says "
                        "10% of the labels, the text 1%; here it is 10%, of every class alike.")


def table5(place):
    rows = {f"{share} budget, {label}": f"{kind}: {flags}" for share, kind in (("half", "images x0.5"),
                                                                               ("full", "images"))
            for label, flags in PAIR.items()}
    numbers = ((48.2, 81.4), (52.6, 82.1), (56.2, 82.5), (59.4, 82.9))
    return images_table("Table 5: half and all of the pretraining epochs (the paper: 100 and 200)",
                        {row: lp_ft(n) for row, n in zip(rows, numbers)}, LP_FT, rows,
                        [(f"{share} budget, {DAR}", f"{share} budget, {AR}") for share in ("half", "full")])


def table6(place):
    columns = transfer(place)
    mean = list(columns)[-1]
    rows, untrained = with_untrained(of("images", PAIR))
    paper = {AR: {mean: 76.2}, DAR: {mean: 78.9}}
    return Table("Table 6: transfer, mean accuracy over other image sets", TWO_STREAMS.format("images")
                 + " The paper's numbers are of ViT-B on ImageNet-1K. Sets: those in transfer/, else the "
                 "drawn shapes alone (the paper: nine public sets).", rows, columns, paper,
                 compare({mean: columns[mean]}, [(DAR, AR)], paper, untrained, (mean, DAR, AR)))


FIXED = {"Masked (0.15)": "mlm --mask 0.15", "Masked (0.3)": "mlm --mask 0.3"}
MASKED = FIXED | {"Variable-length [0.15, 0.3]": "vl --mask 0.15,0.3"}
REGIMES = ("padded", "truncated")


def table7(place):
    """Left-to-right perplexity of masked models, one ratio or a range of them."""
    other = {"paper": "hf:allenai/c4::en"}.get(place.name, str(place.data / "other"))
    columns = {regime: perplexity_column(regime) for regime in REGIMES}
    if place.name == "paper" or place.name != "smoke" and Path(other).exists():
        columns |= {f"other text, {regime}": perplexity_column(regime, f"--data {shlex.quote(other)}")
                    for regime in REGIMES}
    fifteen, thirty, vl = MASKED
    paper = {row: {c: numbers[c.startswith("other")] for c in columns} for row, numbers in
             zip(MASKED, ((59.6, 71.2), (50.2, 63.8), (45.1, 59.4)))}
    elsewhere = ", and on C4 for the other text," if len(columns) > 2 else ""
    return Table("Table 7: left-to-right perplexity of masked models", "One architecture, the same tokens "
                 "read, the same settings. The paper names neither regime: padded keeps the later positions "
                 f"as [MASK], truncated cuts them off; its numbers on the Pile{elsewhere} stand beside "
                 "both.", with_counts(of("text", MASKED)), columns, paper,
                 compare(columns, [(vl, thirty), (vl, fifteen), (thirty, fifteen)], paper,
                         primary=("padded", vl, thirty)))


def table8(place):
    """Reconstruction of hidden patches, one ratio or a range of them."""
    flags = {"Masked (0.75)": "mlm --mask 0.75", "Masked (0.5)": "mlm --mask 0.5",
             "Variable-length [0.5, 0.75]": "vl --mask 0.5,0.75"}
    columns = {"L2": reconstruction("l2", 4), "PSNR": reconstruction("psnr", 2)}
    if "--lpips" in place.scale.evaluate["reconstruct"]:
        columns["Perceptual"] = reconstruction("lpips", 3)
    columns["LP Acc."] = probe()  # what the better reconstruction costs
    large, small, vl = flags
    numbers = ((0.127, 0.201), (0.115, 0.192), (0.072, 0.136))
    paper = {row: {name: x for name, x in zip(("L2", "Perceptual"), pair) if name in columns}
             for row, pair in zip(flags, numbers)}
    rows, untrained = with_untrained(of("images", flags))
    picture = evaluation(place, list(of("images", flags).values()), 0, "reconstruct", "--max-images 8",
                         plot="--picture")
    return Table("Table 8: reconstruction of hidden patches, one at a time", "MAE with the same images seen; "
                 "the same hidden patches for all, never the first. L2 is over hidden patches only and in "
                 "units of the data's variance (the paper says neither the unit nor the part), and judged as "
                 "a factor. The paper's numbers are of ViT-B on ImageNet-1K. The linear probe is ours, as in "
                 "Table 3. Picture: original, hidden in grey, then the trained rows in order.", rows,
                 columns, paper, compare(columns, [(vl, small), (vl, large), (small, large)], paper,
                                         untrained, ("L2", vl, small)), (picture,))


STEPS = {"t = 1": "ar --streams 2", "t = 2": "dar --t 2", "t = 3": "dar --t 3", "t = 4": "dar --t 4",
         "t = 1 or 2": "dar --t 1,2"}
STEP_PAIRS = [("t = 3", "t = 1"), ("t = 4", "t = 1"), ("t = 2", "t = 4"), ("t = 3", "t = 4"),
              ("t = 1 or 2", "t = 1"), ("t = 2", "t = 1 or 2"), ("t = 3", "t = 1 or 2"), ("t = 2", "t = 1")]


def table9(place):
    numbers = (*TABLE_9.values(), (58.1, 82.5))
    return images_table("Table 9: the choice of t", {row: lp_ft(n) for row, n in zip(STEPS, numbers)}, LP_FT,
                        of("images", STEPS), STEP_PAIRS, " How the paper mixes t is not said; here each "
                        "sequence draws 1 or 2.")


def figure2(place):
    """How alike the features of contexts are, of the pairs that are most alike (App. B.2)."""
    rows = of("text", {AR: "ar", "Masked (0.15)": "mlm --mask 0.15", DAR: "dar --t 2",
                       "Variable-length": "vl --mask 0.15,0.3"})
    columns = {"inner product, top pairs": connectivity("inner_product", "mean"),
               "cosine, top pairs": connectivity("cosine", "mean"),
               "cosine, all pairs": connectivity("cosine", "mean_of_all")}
    # The paper compares inner products, and shows them in a picture without numbers.
    claims = tuple(replace(one, ours=not one.text.startswith("inner")) for one in compare(
        columns, [("Masked (0.15)", AR)], primary=("inner product, top pairs", "Masked (0.15)", AR)))

    def picture(place, seeds, content, path):
        found = {row: evaluation(place, model, 0, "connectivity").result() for row, model in rows.items()}
        plot_similarity(path, [{**x["checkpoints"][0], "label": row} for row, x in found.items()])

    return Table("Figure 2: similarity of features of different texts", "One size, the same tokens, contexts "
                 "from the same held-out sequences. Inner products are in units of each network's own; "
                 "cosines compare networks.", rows, columns, {}, claims, picture=picture)


def figure3(place):
    """What masked models gain of what autoregressive ones do, by the length of the prefix."""
    rows = of("text", {AR: "ar", **MASKED})
    spans = {"below S/8": lambda k, S: k < S / 8, "S/8 .. S/2": lambda k, S: S / 8 <= k < S / 2,
             "from S/2": lambda k, S: k >= S / 2}
    columns = {f"{regime}, {span}": gain_share(regime, cut, rows[AR]) for regime in REGIMES
               for span, cut in spans.items()}
    fifteen, _, vl = MASKED
    claims = []
    for regime in REGIMES:
        short, long = f"{regime}, below S/8", f"{regime}, from S/2"
        claims.append(Claim(f"{regime}: {fifteen} gains less of what {AR} gains after short prefixes than "
                            "after long ones", {(fifteen, long): 1, (fifteen, short): -1}, primary=regime
                            == "padded"))
        claims.append(Claim(f"{regime}: {vl} has less of that difference", {
            (fifteen, long): 1, (fifteen, short): -1, (vl, long): -1, (vl, short): 1}, ours=True))

    def picture(place, seeds, content, path):
        plot_curves_by_length(path, place, rows, AR, seeds)

    return Table("Figure 3: the length of the prefix", "Of what the autoregressive model gains over "
                 "unigrams, the share that a masked model gains, (H_unigram - L_masked)/(H_unigram - L_ar), "
                 "by the tokens in the prefix. One size, the same tokens, the same held-out sequences. The "
                 "paper shows a picture without numbers.", rows, columns, {}, tuple(claims), picture=picture)


PAPERS = {f.__name__: f for f in (table1, table2, table3, table4, table5, table6, table7, table8, table9,
                                   figure2, figure3)}
