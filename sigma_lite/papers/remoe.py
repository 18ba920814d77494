"""ReMoE (2412.14711; code thu-ml/ReMoE): no top-K. The gate is ReLU of the logit, so routing is continuous and learns K.

The paper's: gate ReLU(z), an expert works where it is above 0; the mean number of experts is steered to K by an L1 penalty
on the gates, whose coefficient is multiplied by alpha = 1.2 in a step with too many experts and divided by it in a step
with too few, from 1e-8 on; the penalty of an expert is weighted by its load, E / (K T) times its tokens, which balances.
About half of the experts work for each token at first, until the coefficient has grown: the paper's dense stage.

Ours: the load is that of the global batch, as for the LBL; the number of experts is counted over ranks and micro-batches;
`probs` are gates over their sum, and all 0 for a token that no expert wants. K of the router is not used: K is the
balancer's. Set model.balance.weight to 1: the coefficient is the weight. Confidence: paper and code were read second hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, counts_of, is_ours
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import ConfigError, ModelConfig, require
from sigma_lite.model import NamedRouting, Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE
from sigma_lite.model.router import slots


class ReLURouter(Router):
    """Every expert whose logit is above 0, gated with the logit; to be used with `L1`."""

    assumes = Assumes(k="0 to E, K on average")
    leaves_empty = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = "relu"

    def set_k(self, k: int) -> None:
        use = "the ReLUs decide how many experts a token has: leave out model.sparsity.head"
        require(k == self.top_k, f"{k} experts per token beside net.top_k={self.top_k}: {use}")

    def must_fit(self, balancer: Balancer) -> None:
        require(
            isinstance(balancer, L1) or not is_ours(balancer),
            f"{balancer} does not thin out ReLU gates, so about half of all experts would work for each token: set"
            " model.custom_balance: sigma_lite.papers.remoe.L1, and model.balance.weight: 1",
        )

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.relu()

    def choose(self, scores_TE: Tensor) -> Tensor:
        return slots(scores_TE > 0, scores_TE)


class L1(Balancer):
    """coefficient * sum over experts of (their load, 1 where even) * (mean of their gates). Of heads: coefficient * LBL.

    Args:
        k: experts per token to be reached.
        alpha: factor of the coefficient in each step, > 1.
        start: the first coefficient.
    """

    assumes = Assumes(state="a coefficient")

    def __init__(self, k: float = 1.0, alpha: float = 1.2, start: float = 1e-8):
        require(k > 0 and alpha > 1 and start > 0, f"k={k}, alpha={alpha}, start={start}: k, start > 0 and alpha > 1")
        self.k, self.alpha, self.coefficient = k, alpha, start

    def must_fit(self, layer: MoE) -> None:
        router = layer.router
        name = "sigma_lite.papers.remoe.ReLURouter"
        require(
            isinstance(router, ReLURouter) or not is_ours(router),
            f"L1 steers ReLUs of logits, which are no gates of {type(router).__name__}: set model.parts.router: {name}",
        )
        require(
            abs(self.k - router.top_k) < 1,
            f"L1(k={self.k}) beside net.top_k={router.top_k}: the router's K is not used, so give both the same number",
        )

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        if isinstance(routing, NamedRouting):  # heads are gated by a softmax, not by ReLUs
            return self.coefficient * load_balancing_loss(routing.probs, routing.ids, f_E)
        T, E = routing.logits.shape
        per_token = (routing.ids >= 0).sum() / max(T, 1)
        load_E = E * f_E * per_token / self.k
        return self.coefficient * (load_E * routing.logits.relu().sum(0) / max(T, 1)).sum()

    def statistics(self, routings: Sequence[Routing]) -> Tensor:
        """[L, E + 1]: slots per expert, and last the tokens."""
        counts_LE = counts_of(routings)
        return torch.cat((counts_LE, torch.full_like(counts_LE[:, :1], len(routings[0].ids))), 1)

    def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> None:
        """The bias stays; the coefficient moves."""
        slots, tokens = int(pooled[:, :-1].sum()), int(pooled[:, -1].sum())
        self.coefficient *= self.alpha ** ((slots > self.k * tokens) - (slots < self.k * tokens))

    def state_dict(self) -> dict[str, Tensor]:
        return {"coefficient": torch.tensor(self.coefficient, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if unknown := sorted(state.keys() - {"coefficient"}):
            raise ConfigError(f"the checkpoint holds {', '.join(unknown)} of another balancer: begin a new run")
        if state:
            self.coefficient = float(state["coefficient"])
