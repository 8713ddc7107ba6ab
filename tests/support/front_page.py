"""Run the Python blocks of a page as pasted: ``python front_page.py PAGE``, where the package is installed."""

import re
import sys
from pathlib import Path


def main(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", Path(page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})


if __name__ == "__main__":
    main(sys.argv[1])
