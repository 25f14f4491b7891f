"""Two measurements that only the experiments need, on the held-out sequences that perplexity takes.

    python -m experiments.losses ratios RUN --ratios 0.15,0.5    loss of a hidden token where so many are
    python -m experiments.losses unigram RUN                     loss of the training text's frequencies
"""

import torch

from data import load_evaluation
from downstream.by_length import length_bins
from downstream.closing import unigram_nll
from downstream.connectivity import evaluation_sequences
from downstream.hub import open_run
from engine.runs import about
from masks import masked_groups
from objectives import target_nll
from support.cli import BadInput, Parser, command_line, output_file, positive, ratios, write_json


@torch.no_grad()
def losses_at(run, sequences, shares, draws=4, batch=64):
    """{ratio: [mean -log P of the hidden tokens of each of the sequences (N, S), over `draws` masks]}; the
    same masks for all models of one length, [MASK] at every hidden token."""
    found = {}
    for ratio in shares:
        generator, total = torch.Generator().manual_seed(0), torch.zeros(len(sequences))
        for _ in range(draws):
            groups = masked_groups(len(sequences), sequences.shape[1], ratio, generator)
            targets = (groups > 1).nonzero()[:, 1].view(len(sequences), -1)
            for rows in torch.arange(len(sequences)).split(batch):
                inputs = (x[rows].to(run.model.query.device) for x in (sequences, groups, targets))
                total[rows] += target_nll(run.model, *inputs, run.path).mean(1).cpu() / draws
        found[str(ratio)] = total.tolist()
    return found


def unigram_losses(run, sequences, data):
    """As perplexity's by_length, of a model that knows only how often each token stands in the training
    text."""
    nll = unigram_nll(load_evaluation(data, run.tokenizer), sequences)
    bins = [{"first": low, "last": high, "sequence_nll": nll[:, low - 1:high].mean(1).tolist()}
            for low, high in length_bins(nll.shape[1])]
    return {"nll": nll.mean().item(), "sequence_nll": nll.mean(1).tolist(), "by_length": {"bins": bins}}


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("ratios", "unigram"))
    parser.add_argument("checkpoint", metavar="RUN")
    parser.add_argument("--ratios", type=ratios, default=(0.15, 0.3, 0.5), help="shares of hidden tokens")
    parser.add_argument("--max-sequences", type=positive, default=200, help="sequences drawn from the "
                        "held-out text")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where it is faster")
    parser.add_argument("--json", type=output_file, default="-", metavar="FILE", help="- for standard output")
    args = parser.parse_args(argv)
    run, autocast = open_run(args)
    sequences, _, data = evaluation_sequences(run, None, args.max_sequences)
    if args.what == "ratios" and not all(0 < ratio < 1 for ratio in args.ratios):
        raise BadInput(f"--ratios {args.ratios} are not all between 0 and 1")
    with autocast:
        results = ({"ratios": losses_at(run, sequences, args.ratios)} if args.what == "ratios" else
                   {"regimes": {"unigram": unigram_losses(run, sequences, data)}})
    write_json(args.json, {"command": f"experiments.losses {args.what}", **about(run),
                           "results": {"data": data, "length": sequences.shape[1], **results}})


if __name__ == "__main__":
    command_line(main)
