"""VanillaESTrainer: full-rank evolution strategies."""

from __future__ import annotations

from .keyed import KeyedESTrainer


class VanillaESTrainer(KeyedESTrainer):
    """Evolution strategies with full-rank Gaussian perturbations ``s·σ·ε``, ``ε ~ N(0, 1)``.

    Use it for small models and comparisons: a member takes ``O(D)`` memory, where
    :class:`~eggroll_trainer.EGGROLLTrainer` uses low-rank factors. Both scale updates in the same way, so settings
    carry over.

    Takes the arguments of :class:`~eggroll_trainer.ESTrainer` and, of
    :class:`~eggroll_trainer.EGGROLLTrainer`, ``noise_reuse``, ``group_size``, ``shaping`` and ``max_grad_norm``.

    References:
        Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.randn(32, 2)
        >>> def fitness(model):
        ...     return -(model(x) - x.sum(1, keepdim=True)).square().mean().item()
        >>> trainer = VanillaESTrainer(model.parameters(), model=model, fitness_fn=fitness, learning_rate=0.1, seed=0)
        >>> before = trainer.evaluate_fitness(model)
        >>> _ = trainer.train(20, verbose=False)
        >>> trainer.evaluate_fitness(model) > before
        True
    """
