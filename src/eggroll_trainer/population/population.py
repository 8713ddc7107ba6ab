"""Population: the model, callable for all members at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import TreeSpec, tree_flatten, tree_map
from .._utils import validation
from .._utils.warned import Warned
from ..noise.keys import keyed_generator
from ..perturbation import densify
from ..perturbation.sample import FullRankDraws, ParameterSpec, Perturbations, perturb
from .arguments import dims_of
from .audit import Audit, audited
from .copying import copy_of
from .folded import Folded
from .forward import Call, Forwards
from .holding import holding
from .module_state import ModuleState, NotBatchable, Slot, batching, parameter_slots, training_modes
from .object_calls import ObjectCallResult, run_with_objects
from .one_by_one import call_one_by_one
from .repeated import RepeatedCalls


class Population:
    """The members of a population (or of a chunk of it), callable as one model.

    Every call runs the model under ``torch.vmap``, with parameters perturbed in low-rank form. A model that cannot be
    batched, such as one whose forward branches on values, is run once for each member, with one warning.

    Args:
        model: The centre.
        perturbations: The perturbations of the ``N`` members.
        first: Index of this chunk's first member in the whole population.
        warned: The warnings that have been issued; each is issued once.
        forwards: Makes the batched calls, and keeps compiled code and tile sizes between generations.
        generation: Index of the generation.
        seed: Seed of the run.

    Example:
        >>> import torch, eggroll_trainer
        >>> @eggroll_trainer.batched
        ... def fitness(population):
        ...     x = torch.linspace(-1, 1, 16)[:, None]
        ...     return -(population(x) - x**2).square().mean((1, 2))  # [N, 16, 1] → [N]
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> trainer = eggroll_trainer.EGGROLLTrainer(model=model, fitness_fn=fitness, seed=0)
        >>> trainer.step()["generation"]
        1
    """

    def __init__(
        self,
        model: nn.Module,
        perturbations: Perturbations,
        *,
        first: int = 0,
        warned: Warned | None = None,
        forwards: Forwards | None = None,
        generation: int = 0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.perturbations = perturbations
        self.first, self.generation, self.seed = first, generation, seed
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names = {id(parameters[name]): name for name in perturbations.draws}
        self._centres = {name: draws.spec.centre for name, draws in perturbations.draws.items()}
        self._slots: dict[nn.Module, list[Slot]] = {}
        self._training: dict[nn.Module, bool] = {}
        # States of the model before calls that have filled a cache in it.
        self._before_caches: list[ModuleState] = []
        self.audit: Audit | None = None
        self._dense: dict[int, dict[str, Tensor]] = {}
        # Modules whose calls with objects were checked not to change them.
        self._unchanged_by_calls: set[nn.Module] = set()
        self._generators: dict[Any, torch.Generator] = {}
        self._warned = Warned() if warned is None else warned
        self.forwards = Forwards() if forwards is None else forwards

    @classmethod
    def of(cls, model: nn.Module, *, generation: int = 0, seed: int = 0) -> Population:
        """Return a population whose only member is the model itself, without perturbation."""
        name, parameter = min(model.named_parameters(), key=lambda item: item[1].numel())
        values = torch.zeros(1, *parameter.shape, device=parameter.device)
        signs = torch.ones(1, device=parameter.device)
        draws = FullRankDraws(values, ParameterSpec(name, parameter.detach(), 1.0), signs)
        return cls(model, Perturbations({name: draws}, signs, 1), generation=generation, seed=seed)

    def __len__(self) -> int:
        """Return the number of members, ``N``."""
        return len(self.perturbations)

    def __reduce__(self) -> Any:
        """Pickle the members alone: what is remembered about calls goes by the identity of the model's parts."""
        make = functools.partial(type(self), first=self.first, generation=self.generation, seed=self.seed)
        return make, (self.model, self.perturbations), {"_training": self._training}

    @property
    def members(self) -> range:
        """Indices of these members in the whole population."""
        return range(self.first, self.first + len(self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call every member with the same arguments.

        Returns:
            The model's result, each tensor with a leading dimension of members: ``[...] → [N, ...]``.

        Raises:
            ValueError: A BatchNorm layer is in training mode.
        """
        leaves, _ = tree_flatten((args, kwargs))
        dims: list[int | None] = [None] * len(leaves)
        return audited(self, self._call(args, kwargs, dims), args, kwargs, dims, range(len(self)))

    def each(self, *args: Any, in_dims: int | Sequence[int | None] = 0, **kwargs: Any) -> Any:
        """Call every member with its own arguments: member ``i`` gets ``xs[i]``.

        Args:
            args: Tensors, or nested tuples, lists and dicts of tensors, with a dimension of members. Other values are
                passed on unchanged.
            in_dims: The dimension of members, one for all arguments or one for each positional argument. None marks an
                argument that all members share, as in ``population.each(x, state, in_dims=(None, 0))``.
            kwargs: Like ``args``, with members in dimension 0.

        Returns:
            The model's result, each tensor with a leading dimension of members.

        Raises:
            ValueError: An argument has another number of members, or a BatchNorm layer is in training mode.
        """
        dims = dims_of(args, kwargs, in_dims, len(self))
        return audited(self, self._call(args, kwargs, dims), args, kwargs, dims, range(len(self)))

    def train(self, mode: bool = True) -> Population:
        """Run the members in training mode (evaluation mode if False), whatever the model's, and return ``self``."""
        self._training = {module: mode for module in self.model.modules()}
        return self

    def eval(self) -> Population:
        """Run the members in evaluation mode, whatever mode the model is in, and return ``self``."""
        return self.train(False)

    def member(self, index: int) -> nn.Module:
        """Return a dense copy of one member: an ordinary module that shares nothing with the model.

        Raises:
            IndexError: ``index`` is not below ``len(population)``.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"member {index} of a population of {len(self)}")
        clone = copy_of(self.model)
        self._copy_modes(clone)
        self.write_member(index, clone)
        return clone

    def write_member(self, index: int, module: nn.Module) -> None:
        """Copy one member's parameters into a module.

        Args:
            index: The member, below ``len(population)``.
            module: A copy of the model.
        """
        with torch.no_grad():
            parameters = dict(module.named_parameters(remove_duplicate=False))
            for name, value in self.member_parameters(index).items():
                parameters[name].copy_(value)

    def member_parameters(self, index: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the perturbed parameters of one member as dense tensors, by name.

        Args:
            index: The member, below ``len(population)``.
            names: Names of the parameters to return; all perturbed parameters if None.
        """
        chosen = self._members if names is None else {name: self._members[name] for name in names}
        return {
            name: densify(perturb(self._centres[name], _take(value, index))).detach() for name, value in chosen.items()
        }

    @contextlib.contextmanager
    def holding(self, index: int) -> Iterator[list[str]]:
        """Inside the block, put one member's weights into the user's own model. This defines what a member is.

        Closures, hooks and caches that refer to the model see these weights. Afterwards, everything in the model is
        restored, even if the block raises.

        Yields:
            A list. After the block, it describes what the block has changed in the model besides weights.

        Raises:
            RuntimeError: The block has changed a frozen parameter in place, which cannot be undone.
        """
        values = self._dense.get(index)
        if values is None:
            with torch.inference_mode(False), torch.no_grad():
                values = self.member_parameters(index)
        with holding(self.model, values, self._training) as changed:
            yield changed

    def remember(self, indices: Sequence[int]) -> list[int]:
        """Keep the dense weights of some members for repeated use by :meth:`holding`, until :meth:`close`.

        Args:
            indices: The members, in rising order.

        Returns:
            The members whose weights are kept: the last ones, as many as fit in the memory for a chunk, at least one.
        """
        centres = list(self._centres.values())
        size = sum(centre.nbytes for centre in centres)
        number = max(1, self.forwards.budget.chunk_bytes(centres[0].device) // max(1, size))
        kept = list(indices[-number:])
        with torch.inference_mode(False), torch.no_grad():
            self._dense = {index: self.member_parameters(index) for index in kept}
        return kept

    @property
    def caches(self) -> int:
        """Number of calls that have filled a cache in the model since the evaluation began."""
        return len(self._before_caches)

    def close(self) -> None:
        """End an evaluation: remove what calls have cached in the model, and forget dense weights."""
        self._dense = {}
        while self._before_caches:
            self._before_caches.pop().restore()

    def run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dims: Sequence[int | None],
        members: Sequence[int] | None = None,
        training: dict[nn.Module, bool] | None = None,
    ) -> Any:
        """Call ``module``, the model or a part of it, for many members in one batched forward.

        Args:
            module: The model or one of its submodules.
            args: Positional arguments.
            kwargs: Keyword arguments.
            dims: For each leaf of ``(args, kwargs)`` its dimension of members, or None if members share it.
            members: Indices of the members, ``[n]``; all if None.
            training: Training modes of modules that differ from those in the model during the call.

        Returns:
            The module's result, each tensor with a leading dimension ``n``.

        Raises:
            NotBatchable: The call cannot be made for all members at once.
            ValueError: A BatchNorm layer is in training mode.
        """
        return self._run(self._call_of(module, args, kwargs, dims, members), training)

    @contextlib.contextmanager
    def repeated(self) -> Iterator[Callable[..., Any]]:
        """Make repeated calls, such as the steps of a simulation, at less cost.

        We check that calls don't change the model at the first call of each kind and at the end of the block, instead
        of at every call. Don't change modes such as autocast inside the block. A compiled model is compiled for each
        number of members that it is called for.

        Yields:
            ``each(*tensors, members=…)``, which works like :meth:`each` for ``members``, a range or tuple of indices in
            this population, by default all. The tensors have rows for these members only.

        Raises:
            ValueError: A call has changed the model, or a tensor has another number of members.

        Example:
            >>> import torch
            >>> with Population.of(torch.nn.Linear(2, 3)).repeated() as each:
            ...     results = [each(torch.zeros(1, 4, 2)) for _ in range(10)]
            >>> results[-1].shape
            torch.Size([1, 4, 3])
        """
        everybody = range(len(self))

        def make(tensors: Sequence[Tensor], members: Sequence[int]) -> Call:
            return self._call_of(self.model, tuple(tensors), {}, [0] * len(tensors), members, exact=True)

        def run(call: Call, members: Sequence[int]) -> Any:
            return self._call(tuple(call.leaves), {}, call.dims, members, call)

        calls = RepeatedCalls(make, run, self.forwards.backend)

        def each(*tensors: Tensor, members: range | tuple[int, ...] = everybody) -> Any:
            return audited(self, calls(tensors, members), tensors, {}, [0] * len(tensors), members)

        before, caches = ModuleState(self.model), len(self._before_caches)
        failed = True
        try:
            with training_modes(self.model, self._training):
                yield each
            failed = False
        finally:
            # A cache that was filled stays until the evaluation ends.
            changed = before.restore() if caches == len(self._before_caches) else []
        if changed and not failed:
            raise NotBatchable.for_changes(changed).for_user()

    def folded(
        self, rows: int, *, key: Sequence[int | str] | None = None
    ) -> contextlib.AbstractContextManager[nn.Module]:
        """Run the user's own model on rows of all members at once, for code with its own loops and caches.

        Inside the block, calls of the model take tensors with the rows of all members in dimension 0, member after
        member: ``[N·Q, …]``, or ``[N·Q·k, …]`` if ``generate()`` returns ``k`` sequences for each prompt. Each
        member's rows are computed with its weights. Results have their rows in the same order. Objects that hold
        tensors, such as key-value caches, are passed in and out like tensors.

        Random numbers in the block, as for sampled tokens, come from one generator for each member. They depend only on
        the seed, the generation and the member. Draw them with the rows of all members in dimension 0.

        Code that looks at the whole batch sees all members: ``generate()`` continues until the last row has ended. A
        module that cannot be batched, such as a mixture of experts that looks at values, is run for one member after
        the other, with one warning.

        Args:
            rows: ``Q``, the rows of each member; a divisor of the rows in every call.
            key: Integers and strings that distinguish this block's random numbers from those of other blocks. Without
                it, a block continues where the last one ended, which may depend on how long other members took.

        Yields:
            The model: the module that you passed to the trainer.

        Raises:
            ValueError: A call has another number of rows, or changes a buffer of the model.
            RuntimeError: A perturbed parameter is used outside of a call of a module.

        Example:
            >>> import torch
            >>> with Population.of(torch.nn.Linear(2, 3)).folded(rows=4) as model:
            ...     model(torch.zeros(4, 2)).shape
            torch.Size([4, 3])
        """
        return Folded(self, validation.check_int("rows", rows, 1), key).entered()

    @property
    def training(self) -> Mapping[nn.Module, bool]:
        """Training modes of modules that differ from those in the model."""
        return self._training

    def member_key(self, index: int) -> tuple[int | str, ...]:
        """Return the key of one member's random numbers."""
        return self.seed, self.generation, "member", self.first + index

    def generator(self, index: int, device: torch.device) -> torch.Generator:
        """Return the generator of one member's random numbers; the same object for every call."""
        key = index, device
        if key not in self._generators:
            self._generators[key] = keyed_generator(*self.member_key(index), device=device)
        return self._generators[key]

    def warn(self, message: str) -> None:
        """Issue a warning, once."""
        self._warned.once(message)

    def _call_of(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dims: Sequence[int | None],
        members: Sequence[int] | None,
        exact: bool = False,
    ) -> Call:
        leaves, spec = tree_flatten((args, kwargs))
        return self.call_of(module, leaves, spec, dims, members, exact)

    def call_of(
        self,
        module: nn.Module,
        leaves: Sequence[Any],
        spec: TreeSpec,
        dims: Sequence[int | None],
        members: Sequence[int] | None = None,
        exact: bool = False,
    ) -> Call:
        """Return a call of a module from the leaves of its arguments; see :class:`~.forward.Call`."""
        slots = self._slots_in(module)
        names = list(dict.fromkeys(name for slot in slots for name in slot.names))
        everybody = members is None or list(members) == list(range(len(self)))
        members = range(len(self)) if members is None else members
        factors: Any
        if everybody and self.forwards.compile and not exact:
            # Compiled code reads each draw for all members that share it. Repeated calls use expanded factors instead.
            with torch.inference_mode(False):
                factors = {name: self.perturbations.draws[name].shared() for name in names}
        else:
            factors = {name: self._members[name] for name in names}
        if not everybody:
            index = torch.as_tensor(members, device="cpu")
            factors = {name: tree_map(lambda t: t[index.to(t.device)], value) for name, value in factors.items()}
        centres = {name: self._centres[name] for name in factors}
        return Call(module, slots, centres, factors, leaves, spec, dims, len(members), exact)

    def _run(self, call: Call, training: dict[nn.Module, bool] | None = None) -> Any:
        with batching(call.module, self._training if training is None else training):
            result = self._run_checked(call)
        while self.forwards.reports:
            self._warned.once(self.forwards.reports.pop())
        return result

    def run_with_objects(
        self,
        call: Call,
        objects: Sequence[Any],
        held: list[Tensor],
        held_dims: Sequence[int | None],
        training: dict[nn.Module, bool] | None = None,
        *,
        spend: bool = False,
    ) -> ObjectCallResult:
        """Make a call with objects among its arguments or results; see :func:`~.object_calls.run_with_objects`.

        Raises:
            NotBatchable: It cannot be made for all members at once.
            ValueError: A BatchNorm layer is in training mode.
        """
        state = None if call.module in self._unchanged_by_calls else ModuleState(call.module)
        with batching(call.module, self._training if training is None else training), torch.inference_mode(False):
            result = run_with_objects(call, objects, held, held_dims, spend=spend)
        if state is not None and state.differs_by_member():
            raise NotBatchable.for_changes(state.restore())
        self._unchanged_by_calls.add(call.module)
        return result

    def _run_checked(self, call: Call) -> Any:
        """Make a call, and check that it does not change the module, except for a cache without values of members."""
        before = ModuleState(call.module)
        try:
            result = self.forwards.run(call)
            if not before.differs():
                return result
            filled = None
            if not before.differs_by_member():
                # A cache is filled by the first call: a second call must not change it.
                filled = ModuleState(call.module)
                result = self.forwards.run(call)
                if not filled.differs():
                    self._before_caches.append(before)
                    return result
        except BaseException:
            before.restore()
            raise
        if filled is not None:
            filled.restore()
        raise NotBatchable.for_changes(before.restore())

    @functools.cached_property
    def _members(self) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
        # Ordinary tensors, whatever the modes of the caller.
        with torch.inference_mode(False), torch.no_grad():
            return self.perturbations.members()

    def _slots_in(self, module: nn.Module) -> list[Slot]:
        """Return the places of perturbed parameters in ``module`` and its submodules."""
        if module not in self._slots:
            self._slots[module] = parameter_slots(module, self._names)
        return self._slots[module]

    def _copy_modes(self, clone: nn.Module) -> None:
        for module, original in zip(clone.modules(), self.model.modules(), strict=True):
            module.training = self._training.get(original, original.training)

    def _call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dims: Sequence[int | None],
        members: Sequence[int] | None = None,
        call: Call | None = None,
    ) -> Any:
        chosen = range(len(self)) if members is None else members
        if self.forwards.one_by_one:
            return call_one_by_one(self, args, kwargs, dims, chosen)
        try:
            return self._run(self._call_of(self.model, args, kwargs, dims, members) if call is None else call)
        except NotBatchable as error:
            if error.stateful:
                raise error.for_user() from None
            result = call_one_by_one(self, args, kwargs, dims, chosen)
            self.forwards.one_by_one = True
            self._warned.once(f"the model is run once for each member, not batched: {error}")
            return result


def _take(value: tuple[Tensor, Tensor] | Tensor, index: int) -> tuple[Tensor, Tensor] | Tensor:
    return (value[0][index], value[1][index]) if isinstance(value, tuple) else value[index]
