"""One measurement in a process of its own: python -m training.child SIDE WORK, the result as JSON on stdout."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from training.work import Result, Work, temporary


def measure(side: str, work: Work, folder: Path) -> Result:
    """Runs it; what it writes goes to ``folder``.

    Raises:
        RuntimeError: with what the process said when it failed.
    """
    command = [sys.executable, "-m", "training.child", side, json.dumps(dataclasses.asdict(work))]
    done = subprocess.run(command, env=os.environ | temporary(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} with {work.workers} workers failed:\n{done.stderr}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    # Libraries print to stdout; the result is its last line.
    side, text = sys.argv[1:]
    found = importlib.import_module(f"training.{side}").run(Work(**json.loads(text)))
    print(json.dumps(dataclasses.asdict(found)), flush=True)
