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
        index: Index of the simulation.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Physics(ABC):
    """``count`` independent simulations of a model.

    Args:
        model: The model.
        count: Number of simulations.
        threads: Number of threads that step them. The results don't depend on it.
        fields: The fields of MjData that will be read.
    """

    @abstractmethod
    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None: ...

    @abstractmethod
    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Reset all simulations to positions ``[count, nq]`` and velocities ``[count, nv]``."""

    @abstractmethod
    def step(self, ctrl: np.ndarray, ids: np.ndarray, substeps: int) -> None:
        """Step simulations ``ids`` under their rows of the controls ``[count, nu]``.

        Raises:
            PhysicsError: MuJoCo raised.
        """

    @abstractmethod
    def read(self, field: str, ids: np.ndarray) -> np.ndarray:
        """Return a field of simulations ``ids``, ``[len(ids), …]``. It is read-only, and valid until the next step."""

    def close(self) -> None:  # noqa: B027
        """Release the resources of the simulations."""


class BatchPhysics(Physics):
    """Steps all simulations in one call of MuJoCo, which does not compute contact forces (``cfrc_ext``)."""

    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None:
        self._count = count
        self._batch = batch.Batch(model, count, threads)
        self._fields = {field: self._batch.bind(field) for field in {*fields, "qpos", "qvel", "ctrl"}}

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Reset all simulations to positions and velocities."""
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
    """Steps simulations one by one in a pool of threads, with contact forces."""

    def __init__(self, model: mujoco.MjModel, count: int, threads: int, fields: Sequence[str]) -> None:
        self._model = model
        self._data = [mujoco.MjData(model) for _ in range(count)]
        self._ctrl = [data.ctrl for data in self._data]
        # Views of MjData's memory, as rows. Making new views at every step takes longer than copying the data.
        self._fields = {
            field: [getattr(data, field)[None] for data in self._data] for field in {*fields, "qpos", "qvel"}
        }
        self._contacts = "cfrc_ext" in fields
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "eggroll_physics") if threads > 1 else None

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Reset all simulations to positions and velocities."""
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
        # More parts than threads, to balance the load: some simulations have more contacts than others.
        parts = np.array_split(ids, min(len(ids), 4 * self._threads))
        futures = [self._pool.submit(self._step, ctrl, part.tolist(), substeps) for part in parts]
        # Wait for all parts before an error is raised.
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
