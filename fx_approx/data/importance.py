"""An epoch that reads some examples only: those whose loss was large more often, with weights that make up for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler

from fx_approx.sampling.base import get_sampler

_KEYS = ("losses", "epoch", "scores", "seed")
_NAMES = ("systematic", "bernoulli")
_STREAM = 0x9E3779B1  # odd, so that the seeds of epochs stay apart


class ImportanceSampler(Sampler[int]):
    """Gives a :class:`torch.utils.data.DataLoader` a share of the examples in each epoch, drawn by their last losses.

    The mean loss over all examples is estimated without bias if each is weighted by the inverse of the probability
    with which it is read; :meth:`weights` gives that, times the share, so that weights are 1 on average::

        data = Indexed(dataset)
        sampler = ImportanceSampler(len(data), 0.6, epochs=30)
        for epoch in range(30):
            sampler.set_epoch(epoch)
            for x, y, index in DataLoader(data, batch_size=128, sampler=sampler):
                losses = F.cross_entropy(model(x), y, reduction="none")
                (losses * sampler.weights(index).to(losses)).mean().backward()
                sampler.update(index, losses)
                ...

    The first epoch reads everything, since nothing is known of any example, and so do the last ones. With several ranks
    every rank gets its part of one draw, in parts of equal length; call :meth:`synchronize` before each epoch, so that
    all know all losses.

    The probabilities are those of Adelman et al. (NeurIPS 2021, Bernoulli-CRS) with losses in the place of norms, and
    the sample is systematic (Madow, 1949). :meth:`infobatch` has the rule of Qin et al. (ICLR 2024) instead.

    Attributes:
        size: Examples of the data set.
        ratio: Share of them that an epoch reads, those that are exact apart.
        epoch: The present one.
    """

    def __init__(
        self,
        size: int | Sized,
        ratio: float = 0.5,
        *,
        epochs: int | None = None,
        exact_first: int = 1,
        exact_last: float = 0.1,
        min_probability: float = 0.1,
        momentum: float = 0.0,
        sampler: str = "systematic",
        even: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        """Begins with epoch 0.

        Args:
            size: How many examples there are, or the data set.
            ratio: Share of them that an epoch reads, in (0, 1].
            epochs: How many there will be; with it the last ones read everything.
            exact_first: So many epochs at the beginning read everything.
            exact_last: Share of ``epochs`` at the end that read everything, in [0, 1]; rounded up.
            min_probability: No example is read with less, in (0, ratio].
            momentum: Of the running mean of an example's losses, in [0, 1); 0 for the last loss alone.
            sampler: ``systematic``, always as many examples; or ``bernoulli``, each by itself.
            even: Every epoch reads as many examples, ``ratio`` of them, as trainers need it that count their steps
                ahead. An exact epoch then reads the next part of a random order of all, and the first ones go on until
                all have been read ``exact_first`` times.
            seed: All draws follow from it and the epoch.
            num_replicas: Ranks; None for those of torch.distributed, 1 without.
            rank: This one; None likewise.

        Raises:
            TypeError: An argument of the wrong type, among them a data set that gives no examples by number.
            ValueError: A value out of range, or ``even`` with a sampler that draws now more and now fewer.
        """
        if isinstance(size, IterableDataset):
            name = type(size).__name__
            raise TypeError(f"size: expected a data set that gives examples by number, got the IterableDataset {name}")
        self.size = _whole("size", len(size) if isinstance(size, Sized) else size, 1)
        self.ratio = _number("ratio", ratio)
        _within("ratio", self.ratio, 0 < self.ratio <= 1, "in (0, 1]")
        self.epochs = None if epochs is None else _whole("epochs", epochs, 1)
        self.exact_first = _whole("exact_first", exact_first, 0)
        self.exact_last = _number("exact_last", exact_last)
        _within("exact_last", self.exact_last, 0 <= self.exact_last <= 1, "in [0, 1]")
        self.min_probability = _number("min_probability", min_probability)
        fits = 0 < self.min_probability <= self.ratio
        _within("min_probability", self.min_probability, fits, f"in (0, ratio], which is {self.ratio:g}")
        self.momentum = _number("momentum", momentum)
        _within("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        if sampler not in _NAMES:
            raise ValueError(f"sampler: expected one of {', '.join(_NAMES)}, got {sampler!r}")
        if not isinstance(even, bool):
            raise TypeError(f"even: expected True or False, got {even!r}")
        if even and sampler != "systematic":
            raise ValueError(
                f"even: expected False with the sampler {sampler}, whose epochs differ in length, got True"
            )
        self.sampler, self.even, self.seed = sampler, even, _whole("seed", seed, 0)
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if there else 1
        self.num_replicas = world if num_replicas is None else _whole("num_replicas", num_replicas, 1)
        self.rank = (torch.distributed.get_rank() if there else 0) if rank is None else _whole("rank", rank, 0)
        _within("rank", self.rank, self.rank < self.num_replicas, f"below num_replicas, which is {self.num_replicas}")
        self._pruned: float | None = None
        self._loaded: int | None = None
        self._losses = torch.full((self.size,), math.nan, dtype=torch.float64)
        self._fresh = torch.zeros(self.size, dtype=torch.bool)
        self.set_epoch(0)

    @classmethod
    def infobatch(
        cls, size: int | Sized, prune: float = 0.5, *, epochs: int, delta: float = 0.875, **options: Any
    ) -> ImportanceSampler:
        """The rule of InfoBatch: examples whose loss is below the mean are left out with probability ``prune``.

        Those of them that are read weigh 1 / (1 - prune); from the share ``delta`` of the epochs on everything is read.
        Source: Qin et al., "InfoBatch: lossless training speed up by unbiased dynamic data pruning", ICLR 2024.

        Args:
            size: As in the class.
            prune: In (0, 1).
            epochs: How many there will be.
            delta: In [0, 1].
            options: ``momentum``, ``seed``, ``num_replicas`` and ``rank``, as in the class.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: A value out of range.
        """
        share = _number("prune", prune)
        _within("prune", share, 0 < share < 1, "in (0, 1)")
        _within("delta", _number("delta", delta), 0 <= delta <= 1, "in [0, 1]")
        kept = 1 - share
        made = cls(
            size, kept, epochs=epochs, exact_last=1 - delta, min_probability=kept, sampler="bernoulli", **options
        )
        made._pruned = share
        return made

    @property
    def exact(self) -> bool:
        """Whether no example is preferred in the present epoch, and all weigh 1."""
        first = math.ceil(self.exact_first * self.size / self._count) if self.even else self.exact_first
        if self.epoch < first or not self._known:
            return True
        last = 0 if self.epochs is None else math.ceil(self.exact_last * self.epochs - 1e-9)
        return self.ratio == 1 or (self.epochs is not None and self.epoch >= self.epochs - last)

    def set_epoch(self, epoch: int) -> None:
        """Draws the examples of an epoch from the losses that are known now; to be called before each.

        The epoch of a state that was loaded stays as it was drawn then.

        Raises:
            TypeError, ValueError: ``epoch`` is no number from 0 on.
        """
        if _whole("epoch", epoch, 0) == self._loaded:
            return
        self._loaded, self.epoch = None, epoch
        self._scores = self._losses.clone()
        self._draw()

    def __iter__(self) -> Iterator[int]:
        yield from self._order.tolist()

    def __len__(self) -> int:
        return int(self._order.numel())

    def weights(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the losses of a batch are to be multiplied by before the mean is taken.

        Args:
            index: Numbers of the examples, any shape.
            dtype: Of the weights.

        Returns:
            Of the same shape, on its device: ratio / probability; 1 in an exact epoch.
        """
        places = self._numbers(index)
        return self._weights[places].view(index.shape).to(index.device, dtype)

    def update(self, index: Tensor, losses: Tensor) -> None:
        """Notes the losses of a batch.

        Args:
            index: Numbers of the examples, ``[n]``.
            losses: Their losses, ``[n]``, not weighted; no gradient is kept.

        Raises:
            ValueError: Shapes that do not fit, a number out of range, or a negative loss; nothing is noted then.
        """
        places = self._numbers(index).flatten()
        values = losses.detach().to("cpu", torch.float64).flatten()
        values = torch.where(values.isfinite(), values, math.nan)  # of an example whose loss overflows nothing is known
        if places.shape != values.shape:
            raise ValueError(f"losses: expected {places.numel()}, one for each index, got {values.numel()}")
        if bool((values < 0).any()):
            raise ValueError(f"losses: expected none below 0, got {values.min().item():g}")
        before = self._losses[places]
        mixed = self.momentum * before + (1 - self.momentum) * values
        self._losses[places] = torch.where(before.isnan(), values, mixed)
        self._fresh[places] = True

    def synchronize(self, group: Any = None) -> None:
        """Tells all ranks the losses of all; to be called by all of them before :meth:`set_epoch`.

        Args:
            group: A process group; None for all ranks.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
        mine = self._fresh.double()
        both = torch.stack((torch.where(self._fresh, self._losses, 0.0), mine))
        device = torch.device("cuda") if torch.distributed.get_backend(group) == "nccl" else torch.device("cpu")
        both = both.to(device)
        torch.distributed.all_reduce(both, group=group)
        sums, counts = both.cpu()
        self._losses = torch.where(counts > 0, sums / counts.clamp(min=1), self._losses)
        self._fresh.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Losses, epoch and what it was drawn from; a run that loads it reads the same examples in the same order.

        Where an epoch is resumed in its middle, skip the batches that were read, as
        ``accelerate.skip_first_batches`` does.
        """
        values = self._losses.clone(), self.epoch, self._scores.clone(), self.seed
        return dict(zip(_KEYS, values, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was.

        Raises:
            ValueError: That is no such state, or of another data set; nothing is changed then.
        """
        if set(state) != set(_KEYS):
            raise ValueError(f"state: expected the keys {', '.join(_KEYS)}, got {', '.join(sorted(state))}")
        losses, scores = (torch.as_tensor(state[name], dtype=torch.float64) for name in ("losses", "scores"))
        if losses.shape != (self.size,) or scores.shape != (self.size,):
            raise ValueError(f"state: of {losses.numel()} examples, this sampler has {self.size}")
        self._losses, self._scores, self.seed = losses.clone(), scores.clone(), int(state["seed"])
        self.epoch = self._loaded = int(state["epoch"])
        self._draw()

    @property
    def _count(self) -> int:
        """Examples of an epoch that is not exact."""
        return max(1, round(self.ratio * self.size))

    @property
    def _known(self) -> bool:
        return not bool(self._scores.isnan().all())

    def _numbers(self, index: Tensor) -> Tensor:
        places = torch.as_tensor(index).detach().to("cpu", torch.int64)
        wrong = places[(places < 0) | (places >= self.size)]
        if wrong.numel():
            raise ValueError(f"index: expected numbers from 0 to {self.size - 1}, got {int(wrong[0])}")
        return places

    def _draw(self) -> None:
        """The order of this rank and the weights, from scores, seed and epoch."""
        generator = torch.Generator().manual_seed((self.seed + _STREAM * (self.epoch + 1)) % 2**63)
        self._weights = torch.ones(self.size, dtype=torch.float64)
        chosen = torch.arange(self.size)
        if self.exact and self.even:
            chosen = self._next_part()
        elif not self.exact:
            # An example of which nothing is known counts as much as the largest: it is looked at soon.
            known = ~self._scores.isnan()
            scores = torch.where(known, self._scores, self._scores[known].max())
            choose = self._drawn if self._pruned is None else self._kept
            chosen = choose(scores, generator)
        order = chosen[torch.randperm(chosen.numel(), generator=generator)]
        each = math.ceil(order.numel() / self.num_replicas)
        missing = each * self.num_replicas - order.numel()
        order = torch.cat([order, order.repeat(math.ceil(missing / max(1, order.numel())))[:missing]])
        self._order = order[self.rank :: self.num_replicas]

    def _next_part(self) -> Tensor:
        """The examples of an even epoch where all are alike: what follows on those before in orders of all."""
        first = self.epoch * self._count
        orders = range(first // self.size, (first + self._count - 1) // self.size + 1)
        seeds = [(self.seed - _STREAM * (order + 1)) % 2**63 for order in orders]
        whole = [torch.randperm(self.size, generator=torch.Generator().manual_seed(one)) for one in seeds]
        return torch.cat(whole)[first % self.size :][: self._count]

    def _drawn(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        sampler, k = get_sampler(self.sampler), self._count
        if k >= self.size:
            return torch.arange(self.size)
        numbers = torch.rand(1, sampler.uniforms(self.size, k), dtype=torch.float64, generator=generator)
        numbers = numbers.clamp(min=torch.finfo(torch.float64).tiny)
        epsilon = min(self.min_probability * self.size / k, 1 - 1e-9)
        found = sampler.draw(scores.unsqueeze(0), k, numbers, epsilon=epsilon)
        assert found.scale is not None
        self._weights[found.indices[0]] = found.scale[0] * k / self.size
        return found.indices[0]

    def _kept(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        assert self._pruned is not None
        low = scores < scores.mean()
        kept = ~low | (torch.rand(self.size, dtype=torch.float64, generator=generator) >= self._pruned)
        self._weights[low] = 1 / (1 - self._pruned)
        return kept.nonzero().flatten()


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    _within(name, value, value >= least, f"{least} or more")
    return value


def _within(name: str, value: float, fits: bool, right: str) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {right}, got {value:g}")
