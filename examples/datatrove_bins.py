"""Token bins of a corpus that outgrows one machine: datatrove runs data_process.py on each part of the files.

python examples/datatrove_bins.py --input texts/ --tokenizer data/mine/tokenizer --out data/big --tasks 8 --workers 2
python pretrain.py --data.dir data/big ...

Part r of n takes every n-th file and writes out/r/, a directory as data_process.py writes it: bins, summary.json,
checkpoint. A task that was killed goes on, a finished one is not repeated. `LocalPipelineExecutor` runs the tasks on
this machine; datatrove's SlurmPipelineExecutor and RayPipelineExecutor take the same pipeline (untried). Duplicates are
found within a part only; before it, datatrove's own MinHash steps can remove those between the parts.

Needs datatrove: pip install datatrove==0.10.1
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    from datatrove.executor import LocalPipelineExecutor
except ImportError:
    sys.exit("error: examples/datatrove_bins.py needs datatrove, which is not installed: pip install datatrove==0.10.1")

import data_process
from corpora.files import find_files
from files import write_json
from tokenizer import load_tokenizer


class BinsOfPart:
    """A step of a datatrove pipeline: the bins of one part of the files."""

    def __init__(self, files: list[Path], out: Path, **settings: Any) -> None:
        self.files, self.out, self.settings = files, out, settings

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Write out/RANK/; one process, because datatrove runs as many tasks as there are cores."""
        own = tuple(self.files[rank::world_size])
        data_process.main(data_process.Args(input=own, out=self.out / f"{rank:05d}", processes=1, **self.settings))
        return data


def main() -> None:
    """Run all tasks, then write what the parts hold together to out/manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of text files")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=2, help="parts of the corpus")
    parser.add_argument("--workers", type=int, default=2, help="parts at a time")
    parser.add_argument("--near_duplicates", type=float, default=0.0)
    args = parser.parse_args()
    files = find_files(args.input)
    if len(files) < args.tasks:
        sys.exit(f"error: --tasks {args.tasks} needs as many files, found {len(files)} in {args.input}: lower it")
    step = BinsOfPart(files, args.out, tokenizer=args.tokenizer, near_duplicates=args.near_duplicates)
    logs = args.out / "datatrove_logs"
    LocalPipelineExecutor([step], tasks=args.tasks, workers=args.workers, logging_dir=str(logs)).run()
    load_tokenizer(args.tokenizer).save(args.out / "tokenizer")
    parts = {f"{rank:05d}": args.out / f"{rank:05d}" for rank in range(args.tasks)}
    write_json(args.out / "manifest.json", {name: described(part) for name, part in parts.items()})


def described(part: Path) -> dict[str, Any]:
    """Return the counts of a part, and what each of its bins holds, with its SHA-256."""
    bins = {path.stem: json.loads(path.read_text(encoding="utf8")) for path in sorted(part.glob("train_[0-9]*.json"))}
    return {"total": json.loads((part / "summary.json").read_text(encoding="utf8"))["total"], "bins": bins}


if __name__ == "__main__":
    main()
