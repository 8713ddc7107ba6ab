"""Run the benchmarks and write dated results.

    python -m benchmarks                 # all of them
    python -m benchmarks w1 memory       # some
    python -m benchmarks --quick         # few repeats and small sizes, to see that they run

Needs ``pip install -e '.[bench]'``. What is compared is run in turn in the same process; reported are medians.
Results go to ``docs/research/results``: a table, the figures as JSON, and a plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from . import report, scaling, suites
from .measure import surroundings

SUITES = {**suites.SUITES, "processes": scaling.processes, "ray": scaling.ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few repeats, small sizes")
    parser.add_argument("--out", type=Path, default=Path("docs/research/results"), help="folder for the results")
    args = parser.parse_args()
    unknown = set(args.suites) - SUITES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    results = {"surroundings": surroundings(), "suites": {}}
    for name in args.suites or SUITES:
        print(f"{name} …", flush=True)
        table = SUITES[name](args.quick)
        results["suites"][name] = table.as_dict()
        print(report.markdown_table(table.as_dict()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{datetime.date.today()}{'-' + '-'.join(args.suites) if args.suites else ''}"
    Path(f"{stem}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    Path(f"{stem}.md").write_text(report.markdown(results))
    report.plot(results, Path(f"{stem}.png"))
    print(f"results: {stem}.md")


if __name__ == "__main__":
    main()
