"""Records videos of a policy, even on machines without a screen."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
from torch import nn

from ..noise.keys import forked_rng
from .policies import Agent


def record(
    policy: nn.Module, env_id: str, path: Path, *, seed: int = 0, most_frames: int = 1000, **options: Any
) -> float:
    """Play one episode, write its frames to ``path``, and return its return.

    Args:
        policy: The policy.
        env_id: Id of the environment.
        path: Path of the video, ``.mp4`` or ``.gif``.
        seed: Seed of the episode, and of the actions that the policy draws.
        most_frames: Largest number of frames in the video. The episode continues after them.
        options: Keyword arguments of the environment.

    Raises:
        RuntimeError: The environment cannot be rendered; the message says what to install.
    """
    import imageio

    try:
        with renderer_chosen():
            env = gymnasium.make(env_id, render_mode="rgb_array", **options)
            observation, _ = env.reset(seed=seed)
            if not options.keys() & {"camera_id", "camera_name"}:
                _follow(env)
            frames = [env.render()]
    except gymnasium.error.DependencyNotInstalled as error:
        raise RuntimeError(f"{env_id} cannot be rendered here: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{env_id} cannot be rendered here: {error}. {_HELP}") from error
    agent, total, ended = Agent(policy, env.action_space, env.observation_space), 0.0, False
    with forked_rng("video", seed, device=next(policy.parameters()).device):
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(agent(observation))
            total, ended = total + float(reward), terminated or truncated
            if len(frames) < most_frames:
                frames.append(env.render())
    env.close()
    rate = env.metadata.get("render_fps", 30)
    # MP4 needs even sizes only; imageio scales to multiples of 16 by default. A GIF takes milliseconds.
    timing = {"duration": 1000 / rate} if path.suffix == ".gif" else {"fps": rate, "macro_block_size": 2}
    imageio.mimwrite(path, frames, **timing)  # type: ignore[arg-type]
    return total


def _follow(env: gymnasium.Env[Any, Any]) -> None:
    """Choose the camera "track" of a MuJoCo model, if it has one.

    Gymnasium 1.4 chooses a fixed camera instead, which the body soon leaves behind.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


@contextlib.contextmanager
def renderer_chosen() -> Iterator[None]:
    """Inside the block, let MuJoCo render with EGL or OSMesa if there is no screen.

    MuJoCo reads the environment variable when it is imported, and when the first frame is rendered.
    """
    chosen = None
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        libraries = {"egl": "EGL", "osmesa": "OSMesa"}
        chosen = next((name for name, library in libraries.items() if ctypes.util.find_library(library)), None)
    if chosen is None:
        yield
        return
    os.environ["MUJOCO_GL"] = chosen
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]


_HELP = (
    "Without a screen, MuJoCo needs EGL (Debian: libegl1) or OSMesa (Debian: libosmesa6); choose one with MUJOCO_GL=egl"
    " or MUJOCO_GL=osmesa. Training needs neither: --no-video"
)
