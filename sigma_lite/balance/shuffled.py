"""A control: does global-batch balance help because f is counted over more tokens, or over more diverse ones?"""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes


class ShuffledLBL(Balancer):
    """LBL whose f is counted over a random share of the batch's tokens (Demons in the Detail, 2501.11873, section 4).

    As few tokens as a micro-batch has, as diverse as the whole batch: steps must be one micro-batch on one rank, because the
    tokens it draws from are those of its call. The draw is a function of the routing, so that a resumed run makes the same.
    """

    assumes = Assumes()
    needs_whole_step = True

    def __init__(self, share: float = 0.25):
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must lie in (0, 1]; a quarter is one micro-batch of four")
        self.share = share

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        T, E = routing.probs.shape
        generator = torch.Generator(routing.ids.device).manual_seed(int(routing.ids.sum()))
        drawn = torch.randperm(T, generator=generator, device=routing.ids.device)[: max(1, round(self.share * T))]
        return load_balancing_loss(routing.probs, routing.ids, load_share(expert_counts(routing.ids[drawn], E)))
