"""Run the benchmarks, or those that are named, print one table each, and write every figure to a JSON file.

make bench
python benchmarks operators gpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import closed_form
import gpu
import iteration
import memory
import operators
from measure import SMALL, arguments, machine, show, towers

BENCHMARKS = {"operators": operators, "memory": memory, "iteration": iteration, "closed_form": closed_form, "gpu": gpu}


def main() -> int:
    """Run, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones; default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks.json"), help="where the figures go")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    results: dict[str, Any] = {"machine": machine()}
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()) + "\n", flush=True)
    try:
        with towers(options.folder, options.architecture) as made:
            for name in options.names or BENCHMARKS:
                module: Any = BENCHMARKS[name]
                reason = module.why_not() if hasattr(module, "why_not") else None
                toy = getattr(module, "TOY", {}) if options.architecture == SMALL else {}
                rows = [] if reason else module.run(made, **toy)
                results[name] = {"skipped": reason} if reason else [row.as_json() for row in rows]
                print(f"{module.TITLE}: skipped, {reason}\n" if reason else show(module.TITLE, rows), flush=True)
    except OSError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"All figures: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
