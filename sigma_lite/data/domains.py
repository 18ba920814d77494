"""An order of rows in which neighbours share a domain.

A document's domain is the first folder of its name ("prose/asyncio/tasks.txt"), see `corpora.domain_of`; that of a row
is the domain of all its tokens. Micro-batches of a single domain are where a balance loss that looks at one of them at
a time hurts: it asks every expert to serve every domain (Demons in the Detail, 2501.11873).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sigma_lite.config import require
from sigma_lite.data.stream import NO_DOMAIN, Domains


class Stretches:
    """An epoch's rows regrouped so that every `run` consecutive ones share a domain.

    The shuffled rows are dealt onto one pile a domain; a pile that has `run` rows is played out and begins anew. So
    stretches keep the random order of their rows, and domains alternate about as often as without regrouping. What
    lies on the piles at the end, fewer than `run` rows a domain, is left out of this epoch; the next one deals others.
    Rows in which two domains meet are never visited: one for each border between domains.
    """

    def __init__(self, domains_N: np.ndarray, n_domains: int, run: int):
        self.domains_N, self.run = domains_N, run
        self.counts_D = np.bincount(domains_N[domains_N != NO_DOMAIN], minlength=n_domains)
        self.n_rows = int((self.counts_D // run).sum()) * run  # visited in an epoch: the same number in each

    def regroup(self, order_N: np.ndarray) -> np.ndarray:
        """The rows of the permutation `order_N` in stretches, int64 [n_rows]."""
        domains_N = self.domains_N[order_N]
        places_N = np.argsort(domains_N, kind="stable")  # pile by pile, each in the order of dealing
        places_N = places_N[domains_N[places_N] != NO_DOMAIN]
        rank_N = np.arange(len(places_N)) - np.repeat(np.cumsum(self.counts_D) - self.counts_D, self.counts_D)
        full_N = rank_N < np.repeat(self.counts_D // self.run * self.run, self.counts_D)
        stretches = places_N[full_N].reshape(-1, self.run)
        return order_N[stretches[np.argsort(stretches[:, -1])].ravel()]  # by the row that fills the pile


def stretches_for(domains: Domains | None, of_rows: Callable[[np.ndarray], np.ndarray], n_rows: int, run: int) -> Stretches:
    """The regrouping that `rows.domain_run` asks for. `of_rows` is `Rows.domains`.

    Raises ConfigError when the corpus has no domains, or one too small for a single stretch.
    """
    fix = "or set rows.domain_run to 1"
    require(
        domains is not None,
        f"rows.domain_run={run}: this data was prepared before domains were recorded: delete its folder and run"
        f" `sigma-lite prepare`, {fix}",
    )
    outside = int(np.diff(domains.ends_R[:-1], prepend=0)[domains.ids_R[:-1] == NO_DOMAIN].sum())
    require(
        outside == 0,
        f"rows.domain_run={run}: {outside} training tokens belong to no domain: use corpus source 'domains', or 'files'"
        f" with every file in a folder named for its domain, {fix}",
    )
    found = Stretches(of_rows(np.arange(n_rows)), len(domains.names), run)
    for name, count in zip(domains.names, found.counts_D, strict=True):
        require(
            count >= run,
            f"rows.domain_run={run}: domain {name!r} has only {count} whole training rows and would never be seen: add"
            f" text, make rows.length smaller, {fix if count < 2 else f'or set rows.domain_run to {count} or less'}",
        )
    return found
