"""Write what the runs of scripts/claims.sh say of the paper's claims: no number on those pages is typed by hand.

    python scripts/make_claims.py                        # results/claims.md, and pages with figures in results/claims/
    python scripts/make_claims.py --results DIR/claims   # runs elsewhere: writes DIR/claims.md

A claim is computed in the claim_*.py of its kind.
"""

import sys
from pathlib import Path

import claim_gammas
import claim_gammas_page
import claim_gradients
import claim_nets
import claim_order
import claim_pairs
from claim_parts import FAILS, FEW_SEEDS, HOLDS, OPEN, setting
from make_tables import COUNT, PERCENT, ROOT, agree, filled, read, read_runs, table, write

from arguments import ArgumentParser
from utill import UserError, entry_point, reading

HEADS = ["bears on", "statement", "what was seen", "n", "the statement"]
PAGE = """# The paper's claims, put to the test

Small runs (`scripts/claims.sh`), and what `scripts/folding.py` and `scripts/robustness.sh` see in trained nets. n:
seeds, where nothing else is said. Differences are in points of accuracy, paired by seed, with the 95 % interval of a
t-test; of one net, or one pair of nets, with an interval over images. Each interval stands alone: one in twenty is
wrong by chance, and lines on the same nets go wrong together. Paired runs share data, seed and all settings but what
their rows name (hybrid training has an optimizer and rate of its own), not always the machine (environment.json). What
needs the full size, or longer training, is not seen here. Training images are shifted by up to 4 pixels, as at 32x32:
at 16x16 that is a quarter of an image, with black borders that no test image has, so that training and test differ
more.

The statements are ours: each puts a claim of the paper, or what it would imply, as a number can answer it, and what
counts as an answer (10 %, a tenth, 1 %) is ours too. Rows by name, as `base` and `gamma_0`, are those of
`scripts/claims.sh`; "exponent" is that of weight decay on gammas over the whole training ([gamma.md](claims/gamma.md)).
{}
{}
In {} of the {} lines n is below {}: they tell of these nets alone, and another seed may say otherwise. A line of one
seed has no verdict but where it has an interval over images, or tells what one net holds.

{}
{}Each row's command stands in its folder's environment.json.
"""
PAIRS = """![Difference of each pair with its interval](claims/pairs.png)

"""
STEPS = """Accuracy by norm, input and number of time-steps, %, mean ± deviation over n seeds; averaged: tested with the
statistics of 50 training batches, all time-steps alike.

{}
![Accuracy against the number of time-steps](claims/steps.png)

"""


def read_claims(results):
    """{row: its runs by seed}, with averaged_acc where it was measured; UserError where a run lacks what it is for."""
    found = read_runs(results)
    for name, runs in found.items():
        for run in runs:
            averaged = results / name / f"seed{run['seed']}" / "averaged.json"
            if averaged.exists():
                tested = read(averaged, keys={"top1": PERCENT, "count": COUNT})
                agree(averaged.parent, ["count"], "averaged.json", tested, "result.json", run)
                run["averaged_acc"] = tested["top1"]
            of_gammas = name in (*claim_gammas.ROWS, *claim_order.ORDERS)
            if of_gammas and not {"mean_gamma", "sweep"} <= run["exit"].keys():
                raise UserError(f"{results / name}: run early_exit.py on its best.pth.tar first")
            if of_gammas and run["config"].get("gamma_weight_decay") is None:
                raise UserError(f"{results / name}: its command must name --gamma_weight_decay")
    return found


def in_short(claims):
    """What was told by enough seeds, in words."""
    told = {
        answer: [c.text for c in claims if c.n >= FEW_SEEDS and c.verdict == answer] for answer in (HOLDS, FAILS, OPEN)
    }
    words = [f"{answer.capitalize()}: {'; '.join(texts)}." for answer, texts in told.items() if texts]
    return filled(" ".join([f"**In {FEW_SEEDS} seeds or more.**", *(words or ["Nothing yet."])]))


def page_of_claims(claims, found):
    """claims.md"""
    few = sum(claim.n < FEW_SEEDS for claim in claims)
    below = PAIRS if claim_pairs.compared(found) else ""
    below += STEPS.format(claim_pairs.steps_table(found)) if claim_pairs.by_steps(found) else ""
    settings = [f"- {name}: {setting(runs[0])}\n" for name, runs in found.items() if name in ("gamma_0", "base")]
    lines = table(HEADS, [claim.cells() for claim in claims])
    return PAGE.format("".join(["\n", *settings]), in_short(claims), few, len(claims), FEW_SEEDS, lines, below)


@entry_point
def main(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "claims", help="folder of the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    args = parser.parse_args(argv)
    with reading(args.results):  # whatever its records say
        return run(args.results, args.check)


def run(results, check):
    """Write the pages of the runs below `results`, or check them; returns the exit status."""
    found, nets = read_claims(results), claim_nets.robust_nets(results / "robustness")
    claims = [*claim_gammas.claims(found), *claim_order.claims(found), *claim_gradients.claims(found)]
    claims += [*claim_nets.folding_claims(results / "folding.json"), *claim_pairs.claims(found)]
    claims += [*claim_pairs.conversion_claims(found), *claim_nets.robust_claims(nets)]
    if not (found or claims or nets):
        raise UserError(f"{results} holds nothing that scripts/claims.sh left: give the folder of its runs")
    claim_pairs.check(found)
    pages = [page(found) for page in (claim_gammas_page.page, claim_order.page, claim_gradients.page)]
    pages.append(claim_nets.robust_page(nets))
    figures = {name: draw for page in pages if page.text for name, draw in page.figures.items()}
    if claim_pairs.compared(found):
        figures["pairs.png"] = lambda path: claim_pairs.draw_pairs(found, path)
    if claim_pairs.by_steps(found):
        figures["steps.png"] = lambda path: claim_pairs.draw_steps(found, path)
    for name, draw in figures.items() if not check else ():
        draw(results / name)
    stale = [results / page.name for page in pages if not page.text and (results / page.name).exists()]
    for path in stale:  # its runs are gone
        print(f"{path} has no runs any more: delete it")
    texts = {results / page.name: page.text for page in pages if page.text}
    texts[results.with_suffix(".md")] = page_of_claims(claims, found)
    return write(texts, check, "python scripts/make_claims.py") or int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
