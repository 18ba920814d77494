"""Losses into steps: what one training step computes, in one visible place."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, as_balancer, require_whole_step
from sigma_lite.balance.bits import BitsPerByte
from sigma_lite.balance.exact import widest
from sigma_lite.balance.metrics import ExpertLoad
from sigma_lite.balance.objective import objective
from sigma_lite.balance.pooled import Counted, PooledCounts, mean_counted
from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.config import (
    OF_ROWS,
    BalanceConfig,
    ConfigError,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SparsityConfig,
    check_schedule,
    require,
)
from sigma_lite.data.chat import marks
from sigma_lite.data.rows import IGNORED
from sigma_lite.identity import identify
from sigma_lite.lightning_keys import require_clipping, require_precision
from sigma_lite.model import Parts, Routing, Transformer, of_experts, of_tokens
from sigma_lite.model.parts import as_parts
from sigma_lite.scale.parameters import shape_of
from sigma_lite.train.callbacks.replan import Replan
from sigma_lite.train.callbacks.sparsity_schedule import SparsitySchedule
from sigma_lite.train.checkpoint import require_finite
from sigma_lite.train.optim import clip_gradients, optimizer_of, own_identities, schedule_of, total_norm
from sigma_lite.train.reward import Lesson, Outcome, Reinforcement

if TYPE_CHECKING:
    from sigma_lite.data.rows import Batch
    from sigma_lite.train.branch import Branch


class SigmaLit(pl.LightningModule):
    """A Transformer, its losses and its optimizer.

    Args:
        net: shape of the model.
        sparsity: experts per token before and after the switch.
        balance: auxiliary losses on the router.
        optim: the optimizer, AdamW unless it says otherwise, and the learning rate.
        custom_balance: your own balancer or balance loss instead of what `balance` names; see balance/balancer.py.
        parts: your own router, experts, attention or dispatch, as a `Parts` or as plain values; see model/parts.py.
        reward: learn from rewards for the model's own answers, not from what the rows say.
    """

    def __init__(
        self,
        net: ModelConfig,
        sparsity: SparsityConfig = SparsityConfig(),  # noqa: B008  frozen: safe to share
        balance: BalanceConfig = BalanceConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(),  # noqa: B008
        custom_balance: Balancer | Callable | None = None,  # so spelt, yaml can name a class with init_args, or a function
        parts: dict[str, Any] | None = None,  # or `Parts`; plain in yaml: no parser may make a router without a config
        reward: RewardConfig = RewardConfig(),  # noqa: B008
    ):
        super().__init__()
        check_schedule(net, sparsity)
        self.net, self.sparsity, self.balance, self.optim, self.reward = net, sparsity, balance, optim, reward
        self.schedule = schedule_of(optim)
        self.balance_with(custom_balance)
        self.made_of(as_parts(parts))
        self.run_settings: dict[str, Any] = {}  # of the whole run, where one command made it
        self.told_by_lightning: bool | None = None  # None: loggers are, if there are any; False: a diary tells them
        self.reinforce: Reinforcement | None = None  # once a stage of rewards begins
        self.branched: Branch | None = None  # how the next checkpoint is read, where its settings were others
        self.unequal = False  # whether micro-batches may weigh unequally, as the data module says when training begins
        self.each: Counted | None = None  # of this step, where they do
        self.lessons: list[Lesson] = []  # of this step, a micro-batch each
        self.pooled = PooledCounts()
        self.grad_norm = float("nan")  # of the last finished optimizer step, before clipping
        self._norm: Tensor | None = None
        self.heldout_bits = BitsPerByte()
        self.heldout_load = ExpertLoad(net.n_layers, net.n_experts)
        self.heldout_of: dict[str, BitsPerByte] = {}  # by source, where rows are a mixture of several

    def balance_with(self, own: Callable | None) -> None:
        """Use this Balancer or BalanceLoss instead of what the settings name; None: what they name.

        Raises: ConfigError for a loss of rows beside rewards.
        """
        self.custom_balance = own
        self.own_identity = None if own is None else identify(own)  # before training can change its state
        main = "policy" if self.reward.answers else "lm"
        self.objective = objective(self.balance, self.net.n_layers, None if own is None else as_balancer(own), main)
        balancer, asks = self.objective.balancer, f"model.reward.answers={self.reward.answers}"
        require(not (self.reward.answers and balancer.of_rows), f"{asks}: the loss of {balancer} {OF_ROWS}")

    def made_of(self, parts: Parts) -> None:
        """Build the model of these parts."""
        self.parts = parts
        self.parts_identity = {f"parts.{name}": identify(part) for name, part in parts.custom.items()}

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = Transformer(self.net, self.parts)
        for step in (0, self.sparsity.switch_step) if self.parts.custom else ():
            self.model.set_k(self.k_at(step))  # a router that cannot choose so many says so before any step

    @property
    def shape(self) -> ModelConfig:
        """`net`, with a ledger that counts parts of one's own too. There is none before the model."""
        return shape_of(self.model)

    def require_fit(self) -> None:
        """ConfigError where balancer and parts cannot work together: of a model without numbers, before there is one."""
        if not (self.parts.custom or self.custom_balance):
            return
        try:
            with torch.device("meta"):
                model = Transformer(self.net, self.parts)
        except ConfigError:
            raise
        except Exception:  # whatever a reader's part does to numbers: it is asked again when `fit` has a model
            model = getattr(self, "model", None)
        if model is not None:
            self.objective.require_fit(model)

    def k_at(self, step: int) -> tuple[int, ...]:
        """Experts per token in each layer at an optimizer step."""
        return k_per_layer(
            step,
            switch_step=self.sparsity.switch_step,
            n_layers=self.net.n_layers,
            head=self.sparsity.head,
            target=self.net.top_k,
        )

    def setup(self, stage: str) -> None:
        """ConfigError for what Lightning offers and this module would get wrong without a word, however it was asked for."""
        require_precision(self.trainer.precision_plugin.precision)
        clipping = self.trainer.gradient_clip_algorithm
        require_clipping(clipping and clipping.value)

    # ---------------------------------------------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        self.require_fit()

    def on_train_start(self) -> None:
        """A fit before this one may have ended in the middle of a step."""
        self.pooled.reset()
        self._norm, self.each = None, None
        require_whole_step(self.objective.balancer, self.trainer.accumulate_grad_batches, self.trainer.world_size)
        self.unequal = getattr(self.trainer.datamodule, "unequal", False)
        if self.reward.answers:
            source = next(iter(self.trainer.datamodule.prepared.sources.values()))  # one tokenizer serves all
            frame = marks(source.tokenizer, source.manifest["end_of_text"])
            text = functools.partial(source.tokenizer.decode, skip_special_tokens=False)
            self.reinforce = Reinforcement(self.reward, self.model, frame, text)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        learned = self._learned(batch, batch_idx)
        read = self.each and self.each.read
        losses = self.objective(learned.loss, learned.routings, self.pooled, learned.lengths, read)
        terms, main = {name: term.detach() for name, term in losses.terms.items()}, self.objective.main
        shown = {main: terms[main], "lbl": losses.lbl, **({"balance": terms["balance"]} if self.custom_balance else {})}
        for name, value in {**shown, **learned.told}.items():
            self.log(name, value, prog_bar=True, batch_size=len(batch.ids_BS), logger=self.told_by_lightning)
        total = losses.total if learned.live else 0 * losses.total
        tokens = len(learned.routings[0].ids) if read is None else read  # of this rank, or of the mean micro-batch
        out = {"loss": total, "terms": terms, "lbl": losses.lbl, "rewards": learned.told, "tokens": tokens}
        return {**out, "routings": [r.each(Tensor.detach) for r in learned.routings]}

    def _learned(self, batch: Batch, batch_idx: int) -> Outcome:
        """From what the rows say, or from rewards."""
        micro = batch_idx % self.trainer.accumulate_grad_batches if self.unequal else 0
        if self.unequal and micro == 0:
            self._look_ahead()
        if self.reinforce:
            return self.reinforce.learn(self.lessons[micro], self.each)
        count = self.each and self.each.scored
        lm, routings = self.model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS, count=count)
        return Outcome(lm, of_tokens(routings, batch.own_T), batch.lengths, True, {})

    def _look_ahead(self) -> None:
        """Before the first micro-batch: how much each of the step's weighs, and all answers that rewards are for."""
        step, world, rank = self.trainer.global_step, self.trainer.world_size, self.trainer.global_rank
        batches = self.trainer.datamodule.batches_of(step)
        if self.reinforce:
            # as data/rows.py shares out the rows of a step
            firsts = [(micro * world + rank) * len(batch.ids_BS) for micro, batch in enumerate(batches)]
            self.lessons = [self.reinforce.ask(batch, step, first) for batch, first in zip(batches, firsts, strict=True)]
        self.each = mean_counted(self.lessons if self.reinforce else batches, world, self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step whose groups are all dead, on every rank, changes nothing: AdamW passes over weights without a gradient."""
        if self.reward.answers and float(self.gradient_norm()) == 0:
            optimizer.zero_grad(set_to_none=True)
            self.pooled.reset()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        self._move_bias(step)
        self.pooled.reset()  # the next step's global-batch shares start empty
        self.grad_norm, self._norm = float(self._norm), None

    @torch.no_grad()
    def _move_bias(self, step: int) -> None:
        if self.pooled.statistics is None:
            return  # the step was refused
        moved_LE = self.objective.balancer.next_bias(self.model.bias_LE, self.pooled.statistics, step)
        if moved_LE is not None:
            self.model.set_bias(moved_LE)

    def gradient_norm(self) -> Tensor:
        """Total norm of this step's gradient before clipping, computed once a step."""
        if self._norm is None:
            self._norm = total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        return self._norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        norm = self.gradient_norm()
        if gradient_clip_val:  # 0 and None both mean that nothing is clipped
            clip_gradients(self.model.parameters(), norm, gradient_clip_val)

    def rate_factor(self, step: int) -> float:
        """Factor on the peak learning rate at an optimizer step."""
        return self.schedule(step, total_steps=self.trainer.max_steps, optim=self.optim)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = optimizer_of(self.model, self.optim)
        if self.branched:
            self.branched.adapt_optimizer(optimizer, self)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> list[pl.Callback]:
        every = getattr(self.trainer.strategy, "replan_every", 0)
        return [SparsitySchedule(), *([Replan(every)] if every else [])]

    # ---------------------------------------------------------------------------------------------------- held-out

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        nats_BS, routings = self.nats(batch)
        self.heldout_bits.update(nats_BS, batch.targets_BS, batch.bytes_BS)
        for source, bits in enumerate(self.heldout_of.values()):
            own_B = batch.domains_B == source
            bits.update(nats_BS, batch.targets_BS.where(own_B[:, None], IGNORED), batch.bytes_BS)
        scored_T = (batch.targets_BS != IGNORED).flatten()  # the rest fills up rows, and batches of other ranks
        self.heldout_load.update([r.each(lambda t: t[scored_T]) for r in of_experts(routings)])

    def on_validation_epoch_end(self) -> None:
        values = {name: widest(value, self.device) for name, value in self.heldout_bits.compute().items()}
        require(
            bool(values["nats_per_token"].isfinite()),
            f"the model's loss on held-out text is {float(values['nats_per_token'])} nats a token: its weights or logits"
            " hold NaN or infinity; use an earlier checkpoint, and train with a lower optim.lr",
        )
        bits, nats, logger = values["bits_per_byte"], values["nats_per_token"], self.told_by_lightning
        self.log("heldout_bits_per_byte", bits, prog_bar=True, sync_dist=True, logger=logger)  # the same on all ranks
        self.log("heldout_nats_per_token", nats, sync_dist=True, logger=logger)
        for name, of_source in self.heldout_of.items():
            its = widest(of_source.compute()["bits_per_byte"], self.device)
            self.log(f"heldout_bits_per_byte/{name}", its, sync_dist=True, logger=logger)

    def on_validation_epoch_start(self) -> None:
        self.heldout_bits.reset()
        self.heldout_load.reset()
        mixture = getattr(self.trainer.datamodule, "mixture", None)
        self.heldout_of = {name: BitsPerByte().to(self.device) for name in (mixture.sources if mixture else ())}

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What the model made of each held-out token: cost in nats, and the first expert of each layer, -1 for none."""
        nats_BS, routings = self.nats(batch)
        experts_LBS = torch.stack([r.ids[:, 0].view_as(batch.ids_BS) for r in of_experts(routings)])
        return {"ids": batch.ids_BS, "nats": nats_BS, "experts": experts_LBS.transpose(0, 1), "kinds": batch.kinds_BS}

    def nats(self, batch: Batch) -> tuple[Tensor, list[Routing]]:
        return self.model.nats(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def settings(self) -> dict[str, Any]:
        """The settings that weights depend on, as plain values."""
        parts = {"net": self.net, "sparsity": self.sparsity, "balance": self.balance, "optim": self.optim}
        parts |= {"reward": self.reward} if self.reward.answers else {}
        named = {name: dataclasses.asdict(part) for name, part in parts.items()}
        return {**named, "custom_balance": self.own_identity, **self.parts_identity, **own_identities(self.optim)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_finite(checkpoint, self.device)
        checkpoint["settings"] = json.dumps(self.run_settings or self.settings())
        checkpoint["balancer"] = self.objective.balancer.state_dict()
        for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("Timer")]:
            del checkpoint["callbacks"][name]  # trainer.max_time is of one start: or a run that it ended could not go on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.branched:
            self.branched.adapt_checkpoint(checkpoint)
        self.model.set_k(self.k_at(checkpoint["global_step"]))  # also where no schedule runs: validate, predict
        self.objective.balancer.load_state_dict(checkpoint.get("balancer", {}))  # checkpoints of before had none
