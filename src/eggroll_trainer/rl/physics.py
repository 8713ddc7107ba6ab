"""One MuJoCo model, simulated for every member of a population."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np

try:
    # Since MuJoCo 4.
    from mujoco import batch
except ImportError:
    batch = None


class PhysicsError(RuntimeError):
    """MuJoCo raised in one of the simulations.

    Attributes:
        index: Which one.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Physics(ABC):
    """``count`` simulations of a model, each as if it were the only one.

    Args:
        model: The model.
        count: How many simulations.
        threads: How many threads step them; the results don't depend on it.
        fields: The fields of MjData that will be read.
    """

    @abstractmethod
    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None: ...

    @abstractmethod
    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set all simulations to the positions ``[count, nq]`` and velocities ``[count, nv]``, all else as new."""

    @abstractmethod
    def step(self, ctrl: np.ndarray, ids: np.ndarray, substeps: int) -> None:
        """Step simulations ``ids`` under their rows of the controls ``[count, nu]``.

        Raises:
            PhysicsError: MuJoCo raised.
        """

    @abstractmethod
    def read(self, field: str, ids: np.ndarray) -> np.ndarray:
        """Return a field of simulations ``ids``, ``[len(ids), …]``, valid until the next step, to be read only."""

    def close(self) -> None:  # noqa: B027
        """Give back what the simulations hold."""


class BatchPhysics(Physics):
    """Stepped by MuJoCo itself in one call, without the forces of contacts (``cfrc_ext``), which it leaves out."""

    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None:
        self._count = count
        self._batch = batch.Batch(model, count, threads)
        self._fields = {field: self._batch.bind(field) for field in {*fields, "qpos", "qvel", "ctrl"}}

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set all simulations to positions and velocities, all else as new."""
        self._batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._fields["qpos"][:] = qpos
        self._fields["qvel"][:] = qvel
        self._batch.forward()

    def step(self, ctrl: np.ndarray, ids: np.ndarray, substeps: int) -> None:
        """Step simulations ``ids``."""
        everyone = len(ids) == self._count
        if everyone:
            self._fields["ctrl"][:] = ctrl
        else:
            self._fields["ctrl"][ids] = ctrl[ids]
        try:
            self._batch.step(None if everyone else ids, nstep=substeps)
        except batch.SimulationError as error:
            index = int(error.ids[0])
            raise PhysicsError(index, self._batch.error(index)) from error

    def read(self, field: str, ids: np.ndarray) -> np.ndarray:
        """Return a field of simulations ``ids``."""
        values: np.ndarray = self._fields[field]
        return values if len(ids) == self._count else values[ids]


class ThreadPhysics(Physics):
    """Stepped one by one by a pool of threads, forces of contacts included."""

    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None:
        self._model = model
        self._data = [mujoco.MjData(model) for _ in range(count)]
        self._ctrl = [data.ctrl for data in self._data]
        # Views of MjData's memory, as rows: making them anew at every step takes longer than to copy what they show.
        self._fields = {
            field: [getattr(data, field)[None] for data in self._data] for field in {*fields, "qpos", "qvel"}
        }
        self._contacts = "cfrc_ext" in fields
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "eggroll_physics") if threads > 1 else None

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set all simulations to positions and velocities, all else as new."""
        for index, data in enumerate(self._data):
            mujoco.mj_resetData(self._model, data)
            data.qpos[:] = qpos[index]
            data.qvel[:] = qvel[index]
            mujoco.mj_forward(self._model, data)

    def step(self, ctrl: np.ndarray, ids: np.ndarray, substeps: int) -> None:
        """Step simulations ``ids``."""
        if self._pool is None:
            self._step(ctrl, ids.tolist(), substeps)
            return
        # More parts than threads, since some simulations have more contacts than others.
        parts = np.array_split(ids, min(len(ids), 4 * self._threads))
        futures = [self._pool.submit(self._step, ctrl, part.tolist(), substeps) for part in parts]
        # None may still be running when an error reaches the caller.
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _step(self, ctrl: np.ndarray, ids: list[int], substeps: int) -> None:
        model = self._model
        for index in ids:
            data = self._data[index]
            self._ctrl[index][:] = ctrl[index]
            try:
                mujoco.mj_step(model, data, nstep=substeps)
                if self._contacts:
                    mujoco.mj_rnePostConstraint(model, data)
            except Exception as error:
                raise PhysicsError(index, str(error)) from error

    def read(self, field: str, ids: np.ndarray) -> np.ndarray:
        """Return a field of simulations ``ids``."""
        views = self._fields[field]
        return np.concatenate([views[index] for index in ids.tolist()])

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
