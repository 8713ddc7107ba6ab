"""Run the Python blocks of a page as pasted: ``python front_page.py PAGE``, where the package is installed."""

import re
import sys
from pathlib import Path

blocks = re.findall(r"^```python\n(.*?)^```", Path(sys.argv[1]).read_text(), re.DOTALL | re.MULTILINE)
assert blocks
for block in blocks:
    exec(compile(block, sys.argv[1], "exec"), {})
