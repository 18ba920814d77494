"""Where papers disagree with each other or with their code, and what we measure: the page book/disagreements.md.

    python -m sigma_lite.lab.disagreements        writes it

No number of ours is typed in: lab/claims.py computes each, and a test holds the page to be what this module says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sigma_lite.lab import claims
from sigma_lite.lab.claims import Entry

PAGE = Path(__file__).parents[2] / "book" / "disagreements.md"

ENTRIES: tuple[Callable[[], Entry], ...] = (
    claims.blind_spot,
    claims.loss_free,
    claims.threshold,
    claims.no_op,
    claims.ranks_unseen,
    claims.a_quarter,
    claims.groups,
    claims.micro_or_global,
    claims.monotone,
    claims.k_or_one,
    claims.sign_of_error,
    claims.importance,
    claims.similar_rows,
    claims.rows_of_routers,
    claims.sure_or_even,
)

OPEN = (
    "Demons in the Detail counts its batch in tokens in the text, and its numbers are those of sequences.",
    "Demons in the Detail finds that loss-free balance, too, needs loads of the global batch (perplexity 8.521 and 8.080);"
    " we have no such pair of runs.",
    "ADRS: the article's balance (0.66 for EPLB) and a course's copy of its evaluator (0.3111) measure different things.",
    "ModuleFormer: load concentration is described, its equation could not be reached and no code of it is released; the"
    " released default weight of the mutual information is 0.",
    "SMEBU, expert threshold and the K-means router were read in abstracts and second hand: what of them is ours is said in"
    " each file of `papers/`.",
)

HEAD = """# Disagreements

Papers disagree with each other, and with their own code. Here is each case that we met and could measure: what the one
says, what the other says, what we find, and what is settled by it. Every number under "here" is computed by
`sigma_lite/lab/claims.py`, in seconds, or read from a recorded result in `results/`, whose name is given. Runs
are small (six layers of 96 experts, 3.3 million tokens): they show mechanisms, not what happens at the papers' sizes.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for entry in (make() for make in ENTRIES):
        parts.append(
            f"## {entry.title}\n\n- **One:** {entry.description}\n- **Other:** {entry.against}\n- **Here:** {entry.found}\n"
            f"- **So:** {entry.settled}\n"
        )
    parts.append("## Not settled here\n\n" + "\n".join(f"- {text}" for text in OPEN) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
