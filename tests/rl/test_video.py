"""Videos of a policy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
imageio = pytest.importorskip("imageio")

from eggroll_trainer.rl.policies import LinearPolicy  # noqa: E402
from eggroll_trainer.rl.video import record  # noqa: E402

SPACE = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


class Film(gymnasium.Env[Any, Any]):  # type: ignore[name-defined]
    """Frames of a size that is no multiple of 16, as CartPole's."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012
    observation_space = action_space = SPACE

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.time = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return np.zeros(2, np.float32), 0.5, self.time == 6, False, {}

    def render(self) -> Any:
        return np.full((40, 60, 3), 30 * self.time, np.uint8)


@pytest.fixture
def film() -> Iterator[str]:
    gymnasium.register("Film-v0", Film)
    yield "Film-v0"
    del gymnasium.registry["Film-v0"]


# imageio leaves the pipe of its reader open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_frames_keep_their_size(name: str, film: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert record(LinearPolicy(SPACE, SPACE), film, tmp_path / name) == 3.0
    frames = imageio.mimread(tmp_path / name)
    assert len(frames) == 7 and {frame.shape[:2] for frame in frames} == {(40, 60)} and not caplog.records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_camera_follows_a_body(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

    class FarAway(HalfCheetahEnv):
        def step(self, action: Any) -> Any:
            self.set_state(self.data.qpos + 100 * (np.arange(9) == 0), self.data.qvel)
            return super().step(action)

    gymnasium.register("FarAway-v0", FarAway, max_episode_steps=2)
    try:
        space = gymnasium.make("FarAway-v0")
        policy = LinearPolicy(space.observation_space, space.action_space)
        record(policy, "FarAway-v0", tmp_path / "video.mp4")
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        del gymnasium.registry["FarAway-v0"]
    frame = np.asarray(imageio.mimread(tmp_path / "video.mp4")[-1], int)
    assert (frame[..., 0] > frame[..., 1] + 20).sum() > 500  # the animal is brown, the ground black and green
