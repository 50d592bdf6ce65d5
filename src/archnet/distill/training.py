"""The LightningModule: a frozen teacher, a student, and losses at their taps."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from archnet.capture import Features
from archnet.distill.comparison import TapComparison
from archnet.distill.options import options_of
from archnet.distill.schedule import DistillError, Period, period_at, plan_for
from archnet.distill.teacher import features_of, require_student
from archnet.loaders import Takes
from archnet.memory import release
from archnet.ops import Activation, Student, Tap, WeightedOperator
from archnet.ops.scores import accuracy, agreement, decisions, each, loss, unexplained
from archnet.quant import Together, exact_constants, grid_steps

_log = logging.getLogger(__name__)

LOG_EVERY = 10  # steps between two that are logged


class OptimizerOptions(Protocol):
    """What is read of `distill.optimizer`."""

    name: str
    lr: float
    grid_lr: float | None
    weight_decay: float


class DistillOptions(Protocol):
    """What is read of `distill`."""

    schedule: str
    steps: int
    joint_steps: int | None
    joint_rate: float
    attention: bool
    adaptation: bool
    inputs: str
    lr_schedule: str
    warmup: int
    mixup: float
    decay: float
    logits_loss: str
    logits_weight: float
    val_every: int
    val_images: int
    checkpoint_every: int
    cache_images: int
    average: float
    keep_zeros: bool
    on_policy: float

    @property
    def optimizer(self) -> OptimizerOptions: ...


class ArchDistillation(lightning.LightningModule):
    """Trains a student so that its features and class scores follow a frozen teacher's.

    With a trainer of one's own::

        module = archnet.ArchDistillation(teacher, student, steps=2000)
        lightning.Trainer(max_steps=2000).fit(module, loader, val_loader)
        archnet.settle(student.eval().cpu())

    A batch is what `archnet.loaders` reads: the inputs (B, ...), with labels beside them or not,
    which training drops. In a period with a source, which only `archnet.distill` runs, it is a
    pair of what a block reads and what the teacher gives there.

    Args:
        teacher: the network that the student was converted from; it is captured, and stays as it
            is. Or its `archnet.capture.Features` at the student's taps. It is no part of the
            checkpoints.
        student: from `convert`, quantized or not; it is trained in place.
        periods: the schedule; None: planned from the options.
        options: `distill` of the config; None: the defaults.
        fields: keys of `distill` in the config that differ from the defaults: ``steps=2000,
            schedule="progressive", lr=1e-3``.

    Raises:
        DistillError: the student is none, or is not this teacher's; the schedule is "local".
        ConfigError: an unknown or impossible key.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: Student,
        periods: Sequence[Period] | None = None,
        options: DistillOptions | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        require_student(student, teacher)
        if options is None or fields:
            options = options_of({"schedule": "joint", **fields})
        if periods is None:
            periods = plan_for(student, options)
            if not periods:
                raise DistillError("steps=0 trains nothing: give at least one")
            if any(period.source is not None for period in periods):
                raise DistillError(
                    "schedule=local trains on cached features, which archnet.distill writes: call "
                    "that, or take schedule=joint or progressive"
                )
        # Outside the module tree: the teacher's weights belong neither to the checkpoints nor to
        # what DDP and the optimizer look after.
        self._teacher = [self.features(teacher, student).requires_grad_(False)]
        self._takes = Takes.of(student)
        self._told = False
        self.student = student
        # Here, where the student is as calibrated: a resumed run moves in the units of the first.
        self._units = grid_steps(student)
        self._exact = exact_constants(student)
        self.periods, self.options = list(periods), options
        self._zeros = _zeros(student) if options.keep_zeros else {}
        self._shares: dict[int, Tensor] = {}  # of the taps in the loss, by the period's first step
        self._together: dict[tuple[tuple[str, ...], tuple[str, ...]], Together] = {}
        self.comparisons = nn.ModuleList(self.comparison(tap) for tap in student.taps)

    def comparison(self, tap: Tap) -> nn.Module:
        """How features at a tap are compared."""
        shape, options = self.student.graph.shapes[tap.value], self.options
        return TapComparison(shape, options.attention, options.adaptation)

    def features(self, teacher: nn.Module, student: Student) -> nn.Module:
        """What returns the teacher's features at the taps, in order, and then its scores."""
        return teacher if isinstance(teacher, Features) else features_of(teacher, student)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """What a loader gives, as the steps below read it: inputs, and labels in validation."""
        if self.trainer.training:
            if period_at(self.periods, self.global_step).source is not None:
                return batch
            found = self._takes.batch(batch, "a batch of the training loader", DistillError)
            if found.labels is not None and not self._told:
                _log.warning("labels are dropped, only the inputs are read")
                self._told = True
            return found.given
        found = self._takes.batch(batch, "a batch of the validation loader", DistillError)
        return found.given, found.labels

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def on_fit_start(self) -> None:
        most, planned = self.trainer.max_steps, self.periods[-1].last if self.periods else 0
        if most != planned:
            _log.warning(
                "the trainer takes %s steps and the schedule has %d: learning rates follow the "
                "schedule, so give both the same number",
                most if most > 0 else "no fixed number of",
                planned,
            )
        self.student.train()  # as `convert` and `quantize` do not leave it
        # As the student's: convolutions on maps with channels last need no reordering.
        self.teacher.to(memory_format=torch.channels_last)
        self.teacher.to(self.device)
        self._zeros = {p: places.to(self.device) for p, places in self._zeros.items()}

    def run(self, values: Mapping[str, Tensor], targets: Sequence[str]) -> list[Tensor]:
        """Targets of the student from given values, with all its parameters rounded at once."""
        key = tuple(values), tuple(targets)
        if key not in self._together:
            steps = self.student.steps_between(*key)
            operators = [self.student.operator(step.name) for step in steps]
            self._together[key] = Together(operators, self._exact)
        with self._together[key].ready():
            return self.student.run(values, targets)

    def teacher_features(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's features at all taps and its results; no gradient."""
        with torch.no_grad():
            values = list(self.teacher(*inputs))
        taps = len(values) - len(self.student.graph.outputs)
        return values[:taps], values[taps:]

    def enter(self, tap: int, feature: Tensor) -> dict[str, Tensor]:
        """A feature of tap ``tap`` as the student's next block reads it: rounded to its grid."""
        value = self.student.taps[tap].value
        return {value: self._grid(value)(feature)}

    def _grid(self, value: str) -> Callable[[Tensor], Tensor]:
        by_name = {step.name: step for step in self.student.graph.steps}
        while value in by_name:
            module = self.student.operator(value)
            if isinstance(module, Activation):
                return module.quantizer or nn.Identity()
            if isinstance(module, WeightedOperator) or not by_name[value].inputs:
                break
            value = by_name[value].inputs[0]
        return nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        period = period_at(self.periods, self.global_step)
        if period.source is None:
            losses = self._through_the_network(batch, period)
        else:
            losses = self._through_a_block(batch, period)
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(total.item()):
            culprit = next((k for k, v in losses.items() if not math.isfinite(v.item())), "total")
            if not all(bool(x.isfinite().all()) for x in _tensors(batch)):
                raise DistillError(
                    f"the batch of step {self.global_step} has values that are not finite (nan or "
                    "inf): look at what the loader gives"
                )
            raise DistillError(
                f"the loss at {culprit} is {total.item()} at step {self.global_step}: "
                "lower distill.optimizer.lr or grid_lr; the last checkpoint is kept"
            )
        if (self.global_step + 1) % LOG_EVERY == 0:  # else nobody reads them
            self._tell(losses, period)
            self.log("loss", total.detach(), prog_bar=True)
        return total

    def _tell(self, losses: Mapping[str, Tensor], period: Period) -> None:
        """Log losses by stage. Lightning would repeat those of a stage that is over to the end."""
        shown = self._unweighted(losses, period)
        figures = {f"loss/{period.name}/{name}": float(value) for name, value in shown.items()}
        for logger in self.loggers:
            logger.log_metrics(figures, step=self.global_step)

    def _unweighted(self, losses: Mapping[str, Tensor], period: Period) -> dict[str, Tensor]:
        """Losses as they are logged, of one unit in all periods: shares of a tap's variance that
        are not explained, and the scores' own distance.
        """
        total = max(1e-12, sum(period.weights.values()))
        taps = [self.student.taps[index].path for index in period.weights]
        shares = dict(zip(taps, (w / total for w in period.weights.values()), strict=True))
        names, weight = self.student.graph.output_names, self.options.logits_weight
        shares |= {self._named("logits", name): weight / len(names) for name in names}
        return {name: value.detach() / max(shares[name], 1e-12) for name, value in losses.items()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A period starts with fresh moments; a block leaves alone what blocks before it hold too.

        Moments of another objective are no measure of this one's gradients: Adam would divide the
        gradients of the whole network by what a lone block had at its end, and undo the blocks
        within a few steps. A quantizer may serve both sides of a tap, as the two sides of an
        addition share one; moving it would change what trained blocks give, and the cached
        features with it. Zeros that are kept get no gradient.
        """
        period = period_at(self.periods, self.global_step)
        if self.global_step == period.first:
            optimizer.state.clear()
        for parameter in self._held_before(period):
            parameter.grad = None
        for parameter, places in self._zeros.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(places, 0.0)

    def _held_before(self, period: Period) -> list[nn.Parameter]:
        if period.source is None or period.source < 0:
            return []
        graph, start = self.student.graph, self.student.taps[period.source].value
        earlier = self.student.steps_between(graph.inputs, [start])
        return [p for step in earlier for p in self.student.operator(step.name).parameters()]

    def _through_the_network(
        self, batch: Tensor | tuple[Tensor, ...], period: Period
    ) -> dict[str, Tensor]:
        inputs = [channels_last(self._mixed(x)) for x in _tensors(batch)]
        features, wanted = self.teacher_features(*inputs)
        graph = self.student.graph
        taps = [self.student.taps[index] for index in period.weights]
        targets = [tap.value for tap in taps] + (graph.outputs if period.logits else [])
        results = self.run(dict(zip(graph.inputs, inputs, strict=True)), targets)
        losses = self.weighted(
            period,
            {
                tap.path: self.comparisons[index](result, features[index])
                for index, tap, result in zip(period.weights, taps, results, strict=False)
            },
        )
        if period.logits:
            losses |= self._compare_results(results[len(taps) :], wanted)
        return losses

    def weighted(self, period: Period, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of the taps, in the order of the period's weights, as shares of their mean."""
        if not losses:
            return {}
        if period.first not in self._shares:
            scale = 1 / max(1e-12, sum(period.weights.values()))
            shares = [weight * scale for weight in period.weights.values()]
            # Kept where it is read: the host waits for what it sends.
            self._shares[period.first] = torch.tensor(shares, device=self.device)
        weighted = torch.stack(list(losses.values())) * self._shares[period.first]
        return dict(zip(losses, weighted, strict=True))

    def _mixed(self, x: Tensor) -> Tensor:
        """Some batches with every sample blended with another (mixup, arXiv 1710.09412).

        The teacher is asked what it makes of them, so that few images go further. Drawn from
        seed, step and rank: a resumed run draws the same.
        """
        if not self.options.mixup:
            return x
        place = self.global_step * self.trainer.world_size + self.global_rank
        generator = torch.Generator().manual_seed(hash((torch.initial_seed(), place)) % 2**63)
        if float(torch.rand((), generator=generator)) >= self.options.mixup:
            return x
        share = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator).to(x)
        order_B = torch.randperm(len(x), generator=generator).to(x.device)
        return torch.lerp(x[order_B], x, share)

    def _through_a_block(self, batch: Sequence[Tensor], period: Period) -> dict[str, Tensor]:
        (source, *targets), graph = batch, self.student.graph
        assert period.source is not None
        if period.source < 0:
            values = {graph.inputs[0]: source}
        else:
            values = self.enter(period.source, source)
        if period.logits:
            return self._compare_results(self.run(values, graph.outputs), targets)
        (index,) = period.weights
        tap = self.student.taps[index]
        (feature,) = self.run(values, [tap.value])
        return self.weighted(period, {tap.path: self.comparisons[index](feature, targets[0])})

    def _compare_results(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], real: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of each result: of class scores their divergence, of others the share of
        unexplained variance. All of them together weigh `distill.logits_weight`.
        """
        options, graph = self.options, self.student.graph
        pairs = zip(ours, theirs, graph.classes, strict=True)
        return {
            self._named("logits", name): options.logits_weight
            / len(graph.outputs)
            * loss(options.logits_loss, student.float(), teacher.float(), axis, real)
            for name, (student, teacher, axis) in zip(graph.output_names, pairs, strict=True)
        }

    def _named(self, figure: str, output: str) -> str:
        """What a figure of a result is called: where there are several, with the result's name."""
        return figure if len(self.student.graph.outputs) == 1 else f"{figure}/{output}"

    def validation_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        given, labels = batch
        inputs = [channels_last(x) for x in _tensors(given)]
        _, wanted = self.teacher_features(*inputs)
        graph, figures = self.student.graph, dict[str, Tensor]()
        lone = graph.classes.count(None) == len(graph.classes) - 1
        pairs = zip(each(self.student(*inputs)), wanted, graph.classes, strict=True)
        for name, (ours, theirs, axis) in zip(graph.output_names, pairs, strict=True):
            figures[self._named("val/logits", name)] = unexplained(ours, theirs)
            if axis is None:
                continue
            figures[self._named("val/agreement", name)] = agreement(ours, theirs, axis) * 100
            # Labels are of the one result with classes; all inputs of a split have them, or none.
            if lone and are_classes(labels, decisions(ours, axis)) and bool((labels >= 0).any()):
                figures["val/accuracy"] = accuracy(ours, labels, axis) * 100
        self.log_dict(figures, prog_bar=True, sync_dist=True, batch_size=len(inputs[0]))

    def on_validation_end(self) -> None:
        release()

    def configure_optimizers(self) -> Any:
        """Numbers on a grid move in steps of it; scales do not decay; each period its own curve.

        Adam moves every number by about its learning rate at each update. For a number on a grid
        that rate is `grid_lr` steps of the grid, so that one value serves every width: a weight
        of 2 bits has a step ten times as long as one of 8 has.
        """
        options = self.options.optimizer
        # SGD moves in proportion to gradients, of which a grid says nothing.
        in_steps = options.grid_lr is not None and options.name != "sgd"
        units = self._units if in_steps else {}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        sizes: dict[nn.Parameter, Tensor] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            rate, size = options.lr, units.get(name.removeprefix("student."))
            if size is not None and options.grid_lr is not None:
                rate, sizes[parameter] = options.grid_lr, size.to(parameter.device)
            decay = 0.0 if name.endswith("log_scale") else options.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
        settings = [
            {"params": members, "lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ]
        optimizer: torch.optim.Optimizer
        # Fused: all parameters of a group in one pass, on every kind of device.
        common: dict[str, Any] = {"params": settings, "lr": options.lr, "fused": True}
        if options.name == "sgd":
            optimizer = torch.optim.SGD(**common, momentum=0.9, nesterov=True)
        else:
            kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
            optimizer = kind(**common)
            if sizes:
                _move_in_units(optimizer, sizes)
        curve = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": curve, "interval": "step"}}

    def rate_at(self, step: int) -> float:
        """Learning rate at a step, as a share of the configured one.

        ``cosine`` falls to a hundredth within each period; ``warm_restarts`` falls and starts
        again after one and three sevenths of it (Loshchilov & Hutter 2017, Tmult 2). Over the
        first `warmup` steps of a period, at most a fifth of it, the rate rises from zero: Adam's
        first moves have full length whatever the gradient, and at 2 bits, where many weights
        come to lie between two levels, they would throw those all over at once.
        """
        period = period_at(self.periods, step)
        rising = min(self.options.warmup, period.steps // 5)
        return period.rate * min(1.0, (step - period.first + 1) / (rising + 1)) * self._curve(step)

    def _curve(self, step: int) -> float:
        period = period_at(self.periods, step)
        position = min(1.0, (step - period.first) / period.steps)
        if self.options.lr_schedule == "constant":
            return 1.0
        if self.options.lr_schedule == "warm_restarts":
            bounds = (0.0, 1 / 7, 3 / 7, 1.0)
            stretch = max(i for i in range(3) if bounds[i] <= position)
            start, end = bounds[stretch], bounds[stretch + 1]
            position = min(1.0, (position - start) / (end - start))
        return 0.01 + 0.495 * (1 + math.cos(math.pi * position))


def channels_last(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) with channels last in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def are_classes(labels: Any, decisions: Tensor) -> bool:
    """Whether labels are the number of a class for each decision."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.shape == decisions.shape


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch; sentences have their own form, and none are looked at."""
    parts = (
        [batch] if isinstance(batch, Tensor) else batch if isinstance(batch, tuple | list) else []
    )
    return [x for x in parts if isinstance(x, Tensor)]


def _zeros(student: Student) -> dict[nn.Parameter, Tensor]:
    """Where weights are zero: beside the identities of an addition, between groups of channels."""
    found = {}
    for module in student.modules():
        if isinstance(module, WeightedOperator) and module.trainable:
            places = module.weight.detach() == 0
            if bool(places.any()):
                found[module.weight] = places
    return found


def _move_in_units(optimizer: torch.optim.Optimizer, sizes: Mapping[nn.Parameter, Tensor]) -> None:
    """Multiply what every update adds to a parameter by its size, which broadcasts to it.

    As if the optimizer held the parameter divided by the size, which for Adam is a learning rate
    for every channel of a layer.
    """
    parameters: list[Tensor] = list(sizes)
    before = [torch.empty_like(parameter) for parameter in parameters]
    # As large as their parameters: a GPU takes lists of like shapes at once.
    factors = [torch.empty_like(p, requires_grad=False).copy_(size) for p, size in sizes.items()]

    def keep(*_: Any) -> None:
        # All of them: gradients are made inside the step, by the closure it is given.
        torch._foreach_copy_(before, [parameter.detach() for parameter in parameters])

    def rescale(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_sub_(parameters, before)
            torch._foreach_mul_(parameters, factors)
            torch._foreach_add_(parameters, before)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(rescale)
