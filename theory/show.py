"""What the commands of spectral.py print: lines of text from their results."""

import textwrap


def table(rows, align=">"):
    """Rows of strings as lines with aligned columns; the first column to the left."""
    width = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ["  ".join(f"{cell:{align if i else '<'}{width[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in rows]


def prose(*sentences):
    return textwrap.wrap(" ".join(sentences), 108)


def multiplicities(values):
    """'1.000000 x 2, 0.577350 x 6': descending values and how often each comes; zeros are left out."""
    counts = {}
    for value in (f"{value:.6f}" for value in values if value > 1e-6):
        counts[value] = counts.get(value, 0) + 1
    shown = [f"{value} x {count}" if count > 1 else value for value, count in counts.items()]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "..", shown[-1]])


def show_claims(x):
    columns = ("claim", "printed", "computed", "verdict")
    return table([columns, *([claim[name] for name in columns] for claim in x["claims"])], "<")


def show31(x):
    """What theorem31 returns, as lines of text."""
    loss, symmetric = "E[W f]_X+ + E[..]^2", "E f.f' + E (f.f')^2"
    rows = [(f"-2 {loss} = ||Abar - F W'^T||^2 - ||Abar||^2    objectives.spectral_loss", "identity_error"),
            (f"-1 {loss} = ||Abar - F W'^T||^2 - ||Abar||^2    as printed, Eq. 1", "printed_error"),
            (f"-1 {loss} = ||Abar/2 - F W'^T||^2 - ||Abar||^2/4 half the scale", "half_scale_error"),
            (f"-2 {symmetric} = ||P_T - F F^T||^2 - ||P_T||^2, F = f sqrt(P_C)", "symmetric_error"),
            (f"-1 {symmetric} = the same with F = f / sqrt(P_C)    as printed, Eq. 7", "eq7_error"),
            (f"gradient descent, rank {x['rank']}: F W'^T - truncated SVD of Abar", "descent_error")]
    values = [("||Abar||_F^2, minus the constant of the theorem", "constant"),
              ("sum of sigma_j^2", "sum_sigma2"), ("gradient descent: last loss", "descent_loss"),
              ("minus the sum of the first sigma_j^2", "best_loss")]
    return table([("largest error over random P_M, f and W", ""),
                  *((text, f"{x[key]:.1e}") for text, key in rows), ("", ""),
                  *((text, f"{x[key]:.6f}") for text, key in values)])


def show41(x):
    """What theorem41 returns, as lines of text."""
    probes, tie, r = x["probes"], x["tie"], x["classes"]
    rows = [("t", *(cell for name in probes for cell in (name, "tail", "bound")))]
    for t in range(max(len(y["error"]) for y in probes.values())):
        cells = [y[key][t] if t < len(y["error"]) else None for y in probes.values()
                 for key in ("error", "tail", "bound")]
        rows.append((str(t + 1), *("" if cell is None else f"{cell:.6f}" for cell in cells)))
    networks = tie["networks"]
    ties = [("  the best choice of them", f"{tie['best']:.3f}"),
            ("  a random one, mean", f"{tie['random']:.3f}"), ("  the worst", f"{tie['worst']:.3f}"),
            (f"  {len(networks)} networks on bags of tokens, spectral loss, mean", f"{networks.mean():.3f}",
             f"from {networks.min():.3f} to {networks.max():.3f}")]
    lines = [*prose("Least-squares probe on the best rank-t features of contexts: error, tail sum of "
                    "sigma_j^4 over j > t, and bound 4 max P(c) tail + 4 alpha~. Where sigma_j are equal the "
                    "best features are not unique, and the error is a mean over random rotations."), "",
             *table(rows), "",
             "alpha~: " + ", ".join(f"{name} {y['alpha_tilde']:.6f}" for name, y in probes.items()),
             *prose("sigma_j, not sigma_j^2, is the j-th singular value of Abar: the eigenvalues of the "
                    f"normalised P_T are sigma_j^2, to {x['eigenvalue_error']:.0e}."), "",
             *prose(f"Class probe at t = r = {r}, autoregressive. All r(s-1) = {x['units']} singular values "
                    f"are 1, so any {r} of their directions are optimal:"), *table(ties, "<")]
    if x["reversed_at"]:
        lines += ["", *prose(f"For t = {x['reversed_at'][0]} .. {x['reversed_at'][-1]}, r(s-1) <= t < rs, "
                             "the autoregressive tail is 0 and the masked one is not: the bound is in favour "
                             "of the autoregressive features.")]
    return lines


def show42(x):
    """What theorem42 returns, as lines of text."""
    r, last, printed = x["classes"], len(x["printed"]["masked"]), x["printed"]
    rows = [(name.replace("_", " "), multiplicities(printed[name.split("_")[0]]), multiplicities(x[name]))
            for name in x["unit_values"]]
    if not x["literal_tokens"]:
        rows += [("entries of masked Abar (A.3)", *(f"{y['masked_entry']:.6f}" for y in (printed, x))),
                 ("zeros in a row, in its class (A.3)", *(f"{y['zeros_in_row']}" for y in (printed, x))),
                 ("autoregressive blocks, a class (A.3)", *(", ".join(y["blocks"]) for y in (printed, x)))]
    fails = f"fails at j = {', '.join(map(str, x['not_larger_at']))}" if x["not_larger_at"] else "holds"
    fails += " (one hidden token, which the theorem excludes)" if x["hidden"] == 1 else ""
    lines = [*table([("singular values", "printed", "computed"), *rows], "<"), "",
             f"sigma_j (autoregressive) > sigma_j (masked), printed for {r} < j <= {last}: {fails}"]
    if not x["whole"]:
        lines += prose(f"rho = {x['rho']:g} of {last // r} tokens is no whole number. Printed is the formula "
                       f"at rho; computed are {x['hidden']} hidden ones.")
    if x["literal_tokens"]:
        lines += prose(f"Printed token sets, which classes share: {x['unit_values']['masked']} unit values "
                       f"of masked, where {r} separate classes have {r}.")
    return lines


def show43(x):
    """What theorem43 returns, as lines of text."""
    columns = {"prefix": "prefix", "loss_one_length": "one length", "loss_all_lengths": "all lengths",
               "ideal_blind": "ideal blind", "ideal_told_position": "ideal told",
               "norm_one_length": "||W f||", "printed_bound": "printed", "corrected_bound": "corrected",
               "corrected_bound_all_lengths": "all lengths"}
    shown = {key: "d" if key == "prefix" else ".1f" if "bound" in key else ".4f" for key in columns}
    rows = [tuple(f"{x[key][i]:{shown[key]}}" if i < len(x[key]) else "-" for key in columns)
            for i in range(len(x["prefix"]))]
    steps = [("", "one length", "", "counterexample", "")]
    for step, sides in x["proof"].items():
        steps.append((step, *(f"{side:.2f}" for side in (*sides, *x["proof_counterexample"][step]))))
    s_m, broken = x["visible"], x["counterexample"]
    return [*prose("Linear attention on D_sim: loss (coefficient 1) on a prefix, and bounds on it. Training "
                   f"hides tokens so that s_m = {s_m} are visible (one length), or 1 .. s - 1 of them (all "
                   "lengths). ||W f|| is the mean norm of the scores of one length; Eq. 10, 12, 20 and 21 "
                   "take it to be 1."),
            "", *table([tuple(columns.values()), *rows]), "",
            *prose("Of what one length loses to the ideal that is told the position, "
                   f"{x['share_of_blindness']:.0%} on prefixes up to {s_m} and "
                   f"{x['share_of_blindness_all_prefixes']:.0%} on all prefixes is blindness to the position "
                   "asked for, which no choice of lengths cures."), "",
            "A model against the printed bound: "
            + ", ".join(f"{name} {broken[name]:.1f}" for name in ("loss", "printed", "corrected")),
            *prose(f"f on {s_m} copies of a token is {x['growth']:.1f} times f on one: a double sum, of "
                   f"{s_m ** 2} terms, not a triple one of {s_m ** 3}."),
            *prose(f"w_k with power 3, k = 1 .. {len(x['w'])}: {', '.join(map(str, x['w']))}. At k = 1 it is "
                   f"divided by k - 1 = 0, beyond k = {s_m + 1} it is negative."), "",
            "Steps of the proof (A.4): left and right side, where they are most wrong", *table(steps)]


def show_spectrum(x):
    return [line for y in x["spectra"] for line in ["", *one_spectrum(y)]][1:]


def one_spectrum(x):
    """One objective's matrices, as far as they are small, and its singular values, as lines of text."""
    counted = {"targets": "query counts by its weight", "sequences": "sequence counts alike",
               "contexts": "context counts alike"}[x["weighting"]]
    lines = [f"{x['objective']}, s = {x['s']}, every {counted} ({x['method']})", ""]
    if "M" in x and x["s"] <= 12:
        lines += ["M, positions 1 .. s", *table([[f"{value:.6f}" for value in row] for row in x["M"]]), ""]
    rows = [("singular values per class", multiplicities(x["singular_values"])),
            ("tail sum of sigma_j^4, j > 1, per class", f"{x['tail_sigma4_per_class']:.6f}"),
            (f"tail sum of sigma_j^4, j > r = {x['r']}", f"{x['tail_sigma4']:.6f}")]
    if "noise" in x:
        rows.append(("each sigma_j^2 may be off by about", f"{x['noise']:.6f}"))
    if x["closed_form_text"]:
        rows += [("closed form", x["closed_form_text"]), ("  its tail sum", f"{x['closed_form_tail']:.6f}")]
    return lines + table(rows, "<")
