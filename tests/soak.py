"""Train for hours and see that nothing grows: memory, open files, threads; and that a step takes no longer at the end.

    python tests/soak.py --output DIR                 # two hours
    python tests/soak.py --output DIR --hours 0.2     # a first look; too short for a slope

It starts `pretrain.py --mini` with validations and checkpoints all the time, and looks at all of the run's processes
every few seconds. DIR/soak.jsonl holds what it saw, DIR/run what the training wrote. The last line says whether all
stayed flat (exit code 1 if not). Needs Linux's /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
from scipy.stats import theilslopes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TICKS = os.sysconf("SC_CLK_TCK")
WARM = 0.25  # the share of the time that counts as warm-up: caches fill, the allocator finds its size


def tree(pid):
    """A process and all that it started that still run."""
    found, parents = [pid], {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parents.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(name))
        except OSError:  # it has ended meanwhile
            pass
    for one in found:
        found += parents.get(one, [])
    return found


def look(pid):
    """What a run holds, over all its processes: MB of its own, open files, threads, processes, seconds of CPU."""
    megabytes = files = threads = processes = seconds = 0
    for one in tree(pid):
        try:
            with open(f"/proc/{one}/smaps_rollup") as file:
                sizes = dict(line.split()[:2] for line in file if line.startswith(("Pss_Anon", "Pss_Shmem")))
            with open(f"/proc/{one}/stat") as file:
                stat = file.read().rsplit(")", 1)[1].split()
            files += len(os.listdir(f"/proc/{one}/fd"))
        except OSError:
            continue
        # Shared by several, a page counts by shares; what only mirrors a file on the disk does not count
        megabytes += sum(int(size) for size in sizes.values()) / 1024
        threads += int(stat[17])
        seconds += (int(stat[11]) + int(stat[12])) / TICKS
        processes += 1
    return {"megabytes": megabytes, "files": files, "threads": threads, "processes": processes, "cpu_seconds": seconds}


def steps_of(log):
    """(step, seconds of training) of each line about training that log.jsonl has so far."""
    try:
        with open(log) as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return []
    return [(line["step"], line["seconds"]) for line in lines if "loss" in line]


def judge(seen):
    """Rows (what, at the start, at the end, slope an hour, limit, flat?) of what was seen after the warm-up."""
    seen = [one for one in seen if one["hours"] >= WARM * seen[-1]["hours"]]
    hours = np.array([one["hours"] for one in seen])
    third = max(1, len(seen) // 3)
    rows = []
    for key, limit in (("megabytes", 1.0), ("files", 0.5), ("threads", 0.5), ("processes", 0.5)):
        values = np.array([one[key] for one in seen], float)
        # The median of the slopes between all pairs: a validation's peak that one look happens to meet does not count
        slope = theilslopes(values, hours)[0] if len(seen) > 1 else 0.0
        rows.append((key, np.median(values[:third]), np.median(values[-third:]), slope, limit, slope < limit))
    changes = [b for a, b in zip(seen, seen[1:]) if b["step"] > a["step"]]  # the log has a line every few steps
    cost = [(b["cpu_seconds"] - a["cpu_seconds"]) / (b["step"] - a["step"]) for a, b in zip(changes, changes[1:])]
    third = max(1, len(cost) // 3)
    # Other work on the machine makes some steps dearer and none cheaper, so the cheapest quarters are compared
    first, last = np.quantile(cost[:third], 0.25), np.quantile(cost[-third:], 0.25)
    rows.append(("CPU seconds a step", first, last, (last - first) / first * 100, 5.0, last < 1.05 * first))
    return rows


# glibc keeps what large tensors leave behind in a heap that grows by 20 to 50 MB once in a while, which says nothing
# about what the program holds. With these it gives back at once what is freed, so that a leak is seen, nothing else.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("words", nargs="*", metavar="FLAG", help="after --: more flags for pretrain.py")
    args = parser.parse_args()
    run = os.path.join(args.output, "run")
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, "soak.log"), "w") as log:
        process = subprocess.Popen(
            [sys.executable, "pretrain.py", "--mini", "--output", os.path.abspath(run),
             "--data", os.path.abspath(os.path.join(args.output, "world")), "--minutes", str(args.hours * 60),
             "--epochs", "1000", "--val-every", "250", "--checkpoint-minutes", "2", *args.words],
            cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **GIVE_BACK})
    began, seen = time.time(), []
    with open(os.path.join(args.output, "soak.jsonl"), "w") as file:
        while process.poll() is None:
            time.sleep(args.every)
            steps = steps_of(os.path.join(run, "log.jsonl"))
            if steps:
                seen.append({"hours": (time.time() - began) / 3600, "step": steps[-1][0], **look(process.pid)})
                file.write(json.dumps(seen[-1]) + "\n")
                file.flush()
    if process.returncode or not seen:
        sys.exit(f"the training ended with {process.returncode}; see {args.output}/soak.log")
    seen = [one for one in seen if one["processes"]]
    rows = judge(seen)
    print(f"{'':20} {'start':>9} {'end':>9} {'an hour':>9}")
    for key, first, last, slope, limit, flat in rows:
        print(f"{key:20} {first:9.2f} {last:9.2f} {slope:+8.2f}{'%' if 'CPU' in key else ' '}  "
              f"{'flat' if flat else f'more than {limit:g}'}")
    flat = all(row[-1] for row in rows)
    print(f"{args.hours:g} hours, {steps[-1][0]} steps, {len(seen)} looks, flat: {'yes' if flat else 'no'}")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
