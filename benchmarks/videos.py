"""Short videos for the gallery, and a picture of them, from the videos that runs of `eggroll rl` leave.

python -m benchmarks.videos runs/HalfCheetah-v5-1 runs/Ant-v5-0    # writes docs/videos and docs/images/animals.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .measure import ROOT

VIDEOS, PICTURE = ROOT / "docs" / "videos", ROOT / "docs" / "images" / "animals.png"
SECONDS, FRAMES = 6, 5
"""Length of a video, and pictures of each run, a quarter of a second apart."""


def main(runs: list[Path]) -> None:
    import imageio.v3 as imageio
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    VIDEOS.mkdir(exist_ok=True)
    size = (2 * FRAMES, 2.2 * len(runs))
    figure, axes = plt.subplots(len(runs), FRAMES, figsize=size, layout="constrained", squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        fps = round(imageio.immeta(run / "video.mp4", plugin="FFMPEG")["fps"])
        # Every other row and column are enough for a small picture.
        frames: Any = imageio.imread(run / "video.mp4", plugin="FFMPEG")[: SECONDS * fps, ::2, ::2]
        task = json.loads((run / "config.json").read_text())["env"]
        imageio.imwrite(VIDEOS / f"{task}.mp4", frames, plugin="FFMPEG", fps=fps, macro_block_size=1)
        for number, axis in enumerate(row):
            axis.imshow(frames[2 * fps + number * fps // 4])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(task)
    figure.savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
