"""Random numbers for rows of all members, with one generator for each member.

A member's numbers depend on the seed of the run, the generation and the member, but not on other members.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..noise.keys import keyed_generator
from .members import Members


class MemberDraws(TorchFunctionMode):
    """Inside the block, the random numbers of each member's rows come from its own generator.

    Args:
        population: The ``N`` members.
        rows: ``Q``; random tensors have ``N·Q·k`` rows for some ``k``.
        key: See :meth:`~eggroll_trainer.Population.folded`.
    """

    def __init__(self, population: Members, rows: int, key: Sequence[int | str] | None = None) -> None:
        super().__init__()
        self._population, self._unit, self._key = population, len(population) * rows, key
        self._generators: dict[Any, torch.Generator] = {}
        # False while the module's own forward runs.
        self.on = True
        self._device = next(population.model.parameters()).device

    def __enter__(self) -> MemberDraws:
        self._state = self._global_state()
        super().__enter__()
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        super().__exit__(kind, *exception)
        if kind is None:
            self._check_global_state()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block, draw from the global generator as usual."""
        self._check_global_state()
        self.on = False
        try:
            yield
        finally:
            self.on = True
            self._state = self._global_state()

    def _global_state(self) -> list[Tensor]:
        devices = {torch.device("cpu"), self._device} - {torch.device("meta")}
        return [_module(device).get_rng_state(*_where(device)) for device in sorted(devices, key=str)]

    def _check_global_state(self) -> None:
        if not all(map(torch.equal, self._global_state(), self._state)):
            raise RuntimeError(
                "random numbers were drawn in population.folded() by a function that cannot draw for each member"
                " separately. Use a function such as torch.rand or torch.multinomial, or pass a generator"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.on and kwargs.get("generator") is None:
            if func in _OF_TENSORS:
                return self._of_tensor(func, args, kwargs)
            if func in _OF_SIZES:
                return self._of_sizes(func, args, kwargs)
        return func(*args, **kwargs)

    def _of_tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            first = kwargs.pop("input") if "input" in kwargs else kwargs.pop("self")
        else:
            first, *args = args  # type: ignore[assignment]
        self._check(func, list(first.shape))
        parts = first.unflatten(0, (len(self._population), -1)).unbind(0)
        results = self._for_each(first.device, lambda i: func(parts[i], *args, **kwargs))
        return first if func in _IN_PLACE else torch.cat(results)

    def _of_sizes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        bounds: tuple[Any, ...] = ()
        if "size" in kwargs:
            bounds, sizes = args, kwargs.pop("size")
        elif func is torch.randint:
            *bounds, sizes = args  # type: ignore[assignment]
        else:
            sizes = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        sizes = list(sizes)
        self._check(func, sizes)
        member_sizes = [sizes[0] // len(self._population), *sizes[1:]]
        device = torch.empty(0, device=kwargs.get("device")).device
        return torch.cat(self._for_each(device, lambda _: func(*bounds, member_sizes, **kwargs)))

    def _check(self, func: Any, sizes: list[int]) -> None:
        if not sizes or sizes[0] % self._unit:
            raise ValueError(
                f"{func.__name__} in population.folded() draws numbers of shape {sizes}, but the first dimension must"
                f" be a multiple of {self._unit}, members times rows. For numbers that all members share, pass a"
                " generator, or draw them outside of the block"
            )

    def _generator(self, index: int, device: torch.device) -> torch.Generator:
        if self._key is None:
            return self._population.generator(index, device)
        if (index, device) not in self._generators:
            key = *self._population.member_key(index), *self._key
            self._generators[index, device] = keyed_generator(*key, device=device)
        return self._generators[index, device]

    def _for_each(self, device: torch.device, draw: Callable[[int], Any]) -> list[Any]:
        """Draw for every member, with the state of its own generator in torch's global generator."""
        module, where = _module(device), _where(device)
        before = module.get_rng_state(*where)
        results = []
        try:
            for i in range(len(self._population)):
                generator = self._generator(i, device)
                module.set_rng_state(generator.get_state(), *where)
                results.append(draw(i))
                generator.set_state(module.get_rng_state(*where))
        finally:
            module.set_rng_state(before, *where)
        return results


def _module(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _where(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)


_IN_PLACE: set[Any] = {
    torch.Tensor.exponential_, torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_,
    torch.Tensor.bernoulli_, torch.Tensor.geometric_, torch.Tensor.cauchy_, torch.Tensor.log_normal_,
}  # fmt: skip
_OF_TENSORS: set[Any] = _IN_PLACE | {
    torch.multinomial, torch.Tensor.multinomial, torch.bernoulli, torch.Tensor.bernoulli, torch.rand_like,
    torch.randn_like, torch.randint_like, torch.poisson, torch.normal,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax,
    F.rrelu,
}  # fmt: skip
_OF_SIZES: set[Any] = {torch.rand, torch.randn, torch.randint}
