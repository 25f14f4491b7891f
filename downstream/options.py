"""downstream.options."""
import math

from downstream.finetune import Protocol
from downstream.labelled import label_subset
from images.sets import is_images
from objectives import DiversityEnhanced, describe
from support.cli import BadInput

# ---------------------------------------------------------------------------- command line

def text_run(run):
    """The run, if it is one of text."""
    if run.tokenizer is None:
        raise BadInput(f"{run.name} was trained on images and GLUE is text; probe and finetune take images too")
    return run


def attention_and_pool(run, attention=None, pool=None):
    """--attention and --pool, or their defaults: causal and last for left-to-right objectives, else full and mean."""
    left_to_right = run.objective.one_stream == "causal" or isinstance(run.objective, DiversityEnhanced)
    attention = attention or ("causal" if left_to_right else "full")
    pool = pool or ("last" if attention == "causal" else "mean")
    if (attention, pool) == ("causal", "first"):
        raise BadInput("--pool first sees one token only under causal attention; type --attention full or another --pool")
    return attention, pool


def refuse(args, run, names):
    """Raise BadInput if one of these options was given, which do not apply to this kind of checkpoint, or --data is of the
    other kind."""
    kind = "images" if run.tokenizer is None else "text"
    for name in names:
        if getattr(args, name, None) is not None and getattr(args, name) is not False:
            raise BadInput(f"--{name.replace('_', '-')} does not apply to a checkpoint of {kind} such as {run.name}; leave it out")
    if kind == "text" and is_images(args.data):
        raise BadInput(f"{run.name} was trained on text and {args.data} holds images")


def protocol_from(args, run):
    """The Protocol that the flags describe."""
    attention, pool = attention_and_pool(run, args.attention, args.pool)
    lr = (4e-5 if run.model.config.width >= 512 else 5e-4) if args.lr is None else args.lr
    if not 0 < lr < math.inf:
        raise BadInput(f"--lr {lr:g} is not a positive number")
    given = {name: getattr(args, name) for name in ("epochs", "batch_size") if getattr(args, name)}
    return Protocol(lr, pool, attention, best_epoch=args.best_epoch, **given)


def describe_run(run):
    return f"{describe(run.objective)} ({run.path})" + (f", step {run.step:,}" if run.step else "")


def fewer(part, args):
    """The training examples that --label-fraction and --max-train leave."""
    return part.only(label_subset(part.labels, args.label_fraction, seed=0)).at_most(args.max_train)
