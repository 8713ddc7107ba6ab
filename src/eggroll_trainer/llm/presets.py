"""Published settings, converted to the scale of this library.

The plain step here is ``θ ← θ + learning_rate·√N·mean_i(w_i·σ·ε_i)``: with weights ``w`` of unit spread, a weight moves
by about ``learning_rate·σ`` a generation. Settings that a source does not give have the command's defaults. All of
these were found for models of 0.5 to 8 billion parameters on accelerators.

``eggroll-countdown``, ``eggroll-gsm8k``
    "Evolution Strategies at the Hyperscale", arXiv 2511.16652v2, tables 10 and 12: RWKV-7 with 1.5 and 7 billion
    parameters, plain gradient steps of rank 1 on matrices only, greedy completions of 1,000 tokens.

    - ``learning_rate`` is their learning-rate scale unchanged, because their released code makes the same step as this
      library: the estimate is ``√N·mean_i(w_i·σ·ε_i)``, in antithetic pairs, and ``w`` is centred for each prompt and
      divided by the spread of all scores, as with ``compare="prompts"``.
    - ``population_size`` is their number of generations per prompt, and ``prompts_per_generation`` their number of
      prompts per epoch: 256 × 6 = 1,536 and 512 × 16 = 8,192 completions. The paper's equation averages each direction
      over the prompts, as we do. In the released code, every completion has its own direction, which makes steps
      ``√prompts`` times longer for the same rewards. ``--learning-rate 0.31`` and ``0.24`` give steps of that length;
      use them if learning is slow.
    - Their table 3, for Qwen3 on another engine, also has σ 0.001 and rank 1 with 2,048 members. Its learning rate of
      0.001 belongs to an update rule that was not published, so it is not a preset.

``es-at-scale``
    "Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement Learning", arXiv 2509.24372, and its code for
    Countdown: Qwen2.5 and Llama, one setting for all, 30 independent members, σ 0.001, 200 prompts in every
    generation, greedy completions of 1,024 tokens, 500 generations.

    - Their step is ``θ ← θ + α·mean_i(z_i·ε_i)`` with ``α = 0.0005`` and ``z`` the z-scores of mean rewards, so
      ``learning_rate = α / (σ·√N) = 0.0005 / (0.001·√30) = 0.0913``, and ``compare="mean"``.
    - They perturb all parameters at full rank. The preset perturbs all parameters too, but matrices at rank 1, with the
      same spread of each weight. ``--rank 0`` is full rank, and takes a copy of the weights for each member of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Preset = Literal["eggroll-countdown", "eggroll-gsm8k", "es-at-scale"]

_EGGROLL: dict[str, Any] = {
    "rank": 1,
    "antithetic": True,
    "freeze_nonlora": True,
    "optimizer": "sgd",
    "temperature": 0.0,
    "max_new_tokens": 1000,
}

PRESETS: dict[Preset, dict[str, Any]] = {
    "eggroll-countdown": {
        **_EGGROLL,
        "population_size": 256,
        "prompts_per_generation": 6,
        "sigma": 7e-4,
        "learning_rate": 0.125,
    },
    "eggroll-gsm8k": {
        **_EGGROLL,
        "population_size": 512,
        "prompts_per_generation": 16,
        "sigma": 2e-3,
        "learning_rate": 0.06,
    },
    "es-at-scale": {
        "generations": 500,
        "population_size": 30,
        "antithetic": False,
        "prompts_per_generation": 200,
        "compare": "mean",
        "sigma": 1e-3,
        "learning_rate": round(5e-4 / (1e-3 * math.sqrt(30)), 4),
        "optimizer": "sgd",
        "temperature": 0.0,
        "max_new_tokens": 1024,
        "target_modules": ("all",),
    },
}
