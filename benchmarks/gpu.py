"""Measure the app on a GPU: correctness, steps, memory, rounds and a study, in one command.

python benchmarks/gpu.py --out FOLDER --assets ../shared          # on a GPU, at most eight minutes
python benchmarks/gpu.py --out FOLDER --device cpu --quick        # tries the command on two cores
python benchmarks/gpu_summary.py FOLDER                           # the tables of its results

Each part runs in a process of its own and writes FOLDER/PART.json row by row; FOLDER/summary.json
has the card, the versions, the status of each part and the gates. A part that fails does not stop
the next one. Each part has a share of the minutes, and what a part leaves is for the next ones; a
part that needs more is ended, and its file names what is missing. The exit code is 1 if a part
failed. Neither Ray nor a network is needed.
"""

import argparse
import contextlib
import importlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_parts import part_file
from gpu_parts.gates import outcomes
from gpu_parts.settings import Settings

# part -> its share of the minutes, in relation to the others; the most wanted part first
PARTS = {"correctness": 1.0, "steps": 3.5, "memory": 0.6, "rounds": 1.5, "study": 1.4}
_LEAST_SECONDS = 10.0  # a part with less does not begin: imports alone take so long
_LIBRARIES = ("torch", "transformers", "peft", "timm", "opacus", "flwr", "numpy", "triton")
_HERE = Path(__file__).resolve()
_ROOT = _HERE.parents[1]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _card() -> str:
    """Return name, memory and driver of the first GPU; "" if there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else ""


def about(settings: Settings) -> dict[str, Any]:
    """Return what a reader of the results must know: the machine, versions and options."""
    return {
        "device": _card() if settings.on_gpu else "CPU",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{library: _version(library) for library in _LIBRARIES},
        "quick": settings.quick,
    }


def _command(part: str, settings: Settings) -> list[str]:
    command = [sys.executable, str(_HERE), "--part", part, "--out", str(settings.out)]
    command += ["--device", settings.device]
    command += ["--assets", str(settings.assets)] if settings.assets else []
    return [*command, "--quick"] if settings.quick else command


def _environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a part: the code is that of this checkout."""
    before = os.environ.get("PYTHONPATH", "")
    own = {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), before)))}
    if settings.quick:
        own["OMP_NUM_THREADS"] = "1"  # of tiny shapes, threads wait for each other
    return os.environ | own


def _run(part: str, settings: Settings, seconds: float) -> None:
    """Run a part in a process of its own for at most ``seconds``; its file tells how it ended."""
    file = settings.out / f"{part}.json"
    command = _command(part, settings)
    process = subprocess.Popen(command, env=_environment(settings), start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        part_file.end(file, part_file.CUT_SHORT, f"its time of {seconds:.0f} s was over")
        return
    finally:  # also for Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if part_file.read(file).get("status") not in (part_file.COMPLETE, part_file.FAILED):
        part_file.end(file, part_file.FAILED, f"its process ended with the exit code {code}")


def _run_or_skip(part: str, settings: Settings, seconds: float) -> None:
    file = settings.out / f"{part}.json"
    file.unlink(missing_ok=True)  # of an earlier run
    if part == "study" and settings.assets is None:
        part_file.end(file, part_file.SKIPPED, "no --assets")
    elif seconds < _LEAST_SECONDS:
        part_file.end(file, part_file.SKIPPED, f"{max(seconds, 0.0):.0f} s were left for it")
    else:
        _run(part, settings, seconds)


def _write_summary(settings: Settings, seconds: dict[str, float]) -> dict[str, Any]:
    """Write summary.json with the parts that have run so far, and return it."""
    files = {part: part_file.read(settings.out / f"{part}.json") for part in seconds}
    keys = ("status", "reason", "missing")
    parts = {
        part: {key: files[part][key] for key in keys if files[part].get(key)} | {"seconds": spent}
        for part, spent in seconds.items()
    }
    gates = outcomes({part: files[part]["rows"] for part in files})
    summary = {"about": about(settings), "parts": parts, "gates": gates}
    part_file.write(settings.out / "summary.json", summary)
    return summary


def run_all(settings: Settings, minutes: float) -> bool:
    """Run all parts in turn; return whether none failed."""
    began, spent = time.monotonic(), {}
    names = list(PARTS)
    for i, part in enumerate(names):
        now = time.monotonic()
        left = 60 * minutes - (now - began)
        share = PARTS[part] / sum(PARTS[name] for name in names[i:])
        print(f"{part}: at most {left * share:.0f} s", flush=True)
        _run_or_skip(part, settings, left * share)
        spent[part] = round(time.monotonic() - now, 1)
        summary = _write_summary(settings, spent)
        told = summary["parts"][part]
        print(f"{part}: {told['status']} {told.get('reason', '')}", flush=True)
    for gate in summary["gates"]:
        print(f"{gate['gate']}: {gate['value']} ({gate['bound']}), met: {gate['met']}", flush=True)
    return all(part["status"] != part_file.FAILED for part in summary["parts"].values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--assets", type=Path, help="folder with models/minilm-l6-h384 and data/sst2, for a study")
    add("--minutes", type=float, default=8.0, help="time for all parts together (default 8)")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="tiny shapes, to try the command itself")
    add("--part", choices=list(PARTS), help="run this part only, without a limit of time")
    args = parser.parse_args()
    if args.device == "cuda" and not _card():
        parser.error("--device cuda: nvidia-smi finds no GPU; --device cpu tries the command")
    if args.assets and not args.assets.is_dir():
        parser.error(f"--assets {args.assets} must be a folder")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} must be above 0")
    return args


def main() -> int:
    """Run all parts, or one of them; return the exit code."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that _run ends its process
    assets = args.assets.resolve() if args.assets else None
    settings = Settings(args.out.resolve(), args.device, args.quick, assets)
    settings.out.mkdir(parents=True, exist_ok=True)
    if args.part is None:
        return 0 if run_all(settings, args.minutes) else 1
    units = importlib.import_module(f"gpu_parts.{args.part}").units(settings)
    return 0 if part_file.run_part(settings.out / f"{args.part}.json", units) else 1


if __name__ == "__main__":
    sys.exit(main())
