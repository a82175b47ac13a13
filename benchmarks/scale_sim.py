"""A billion rows on preemptible machines: what the plan, the claims and the store would see.

python benchmarks/scale_sim.py                 the simulation alone, seconds
python benchmarks/scale_sim.py --build         also builds and lists a plan of 100,000 shards

Workers are preempted at random, come back after a while, and go on with what was flushed. Time is
simulated; what one operation costs on this machine is measured where `--build` is given.
"""

from __future__ import annotations

import argparse
import heapq
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from results import environment, write_section

from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import find_run, read_run, save_run
from batchvlm.plan import plan_shards
from batchvlm.records import InputFile

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed; the command line changes it."""

    num_rows: int = 1_000_000_000
    num_shards: int = 100_000
    num_workers: int = 2_000
    rows_per_s: float = 20.0
    """Of one worker."""
    spread: float = 0.3
    """Standard deviation of a worker's speed, as a share of it: nodes differ."""
    uptime_s: float = 6 * HOUR_S
    """Mean time until a worker is preempted."""
    away_s: float = 0.5 * HOUR_S
    """Mean time in the queue after that."""
    start_s: float = 120.0
    """From the start of a worker to its first row: imports and the model."""
    flush_s: float = 30.0
    is_warned: float = 0.9
    """Share of preemptions with a signal, so that nothing is lost; the others lose what was not
    flushed."""

    @property
    def rows_per_shard(self) -> int:
        return self.num_rows // self.num_shards


@dataclass(kw_only=True)
class Outcome:
    """What happened."""

    wall_s: float = 0.0
    idle_s: float = 0.0
    """Worker time after its last shard, until the job was done."""
    num_preemptions: int = 0
    rows_lost: float = 0.0
    requests: Counter[str] = None  # type: ignore[assignment]
    peak_starts_per_s: float = 0.0


def simulate(cluster: Cluster, num_slices: int | None, *, seed: int = 0) -> Outcome:
    """Run the job through; events are the ends of shards and of uptimes.

    Args:
        num_slices: `runtime.num_tasks`; an array element that is done makes room for the next,
            which loads the model again. None: shards are claimed one by one.
    """
    draw = random.Random(seed)
    out = Outcome(requests=Counter())
    num = cluster.num_workers
    speeds = [cluster.rows_per_s * max(0.2, draw.gauss(1, cluster.spread)) for _ in range(num)]
    step = num_slices or cluster.num_shards
    slices = [list(range(s, cluster.num_shards, step)) for s in range(step)][::-1]
    mine: list[list[int]] = [[] for _ in range(num)]
    left_rows: dict[int, float] = {}
    current: list[int | None] = [None] * num
    up_until = [-1.0] * num
    done_at = [0.0] * num
    # Time and worker: it comes up, or is done with a shard.
    events = [(draw.uniform(0, 60), worker) for worker in range(num)]
    heapq.heapify(events)
    starts: Counter[int] = Counter()
    while events:
        now, worker = heapq.heappop(events)
        is_new = up_until[worker] < now
        if is_new:
            up_until[worker] = now + draw.expovariate(1 / cluster.uptime_s)
        shard = current[worker]
        if shard is None and not mine[worker]:
            if not slices:
                done_at[worker] = now
                continue
            mine[worker] = slices.pop()
            is_new = is_new or num_slices is not None
        if is_new:
            # It reads run.json, and looks for what is finished.
            starts[int(now // 60)] += 1
            out.requests["GET run.json, 3 MiB"] += 1
            out.requests["HEAD at the start"] += len(mine[worker]) if num_slices else 0
            out.requests["LIST at the start"] += 0 if num_slices else cluster.num_shards // 1000
            now += cluster.start_s
        if shard is None:
            shard = current[worker] = mine[worker].pop()
            left_rows[shard] = cluster.rows_per_shard
            out.requests["claim"] += num_slices is None
            out.requests["HEAD of a shard"] += 6
            out.requests["LIST of a shard"] += 3
        needed_s = left_rows[shard] / speeds[worker]
        spent_s = min(needed_s, max(0.0, up_until[worker] - now))
        num_flushes = int(spent_s // cluster.flush_s)
        out.requests["PUT of segments and counts"] += 3 * num_flushes
        if spent_s == needed_s:
            current[worker] = None
            out.requests["PUT of parts"] += 1
            out.requests["GET and DELETE of segments"] += 3 * max(1, num_flushes)
            heapq.heappush(events, (now + spent_s, worker))
            continue
        rows = spent_s * speeds[worker]
        if draw.random() > cluster.is_warned:
            lost = min(rows, draw.uniform(0, cluster.flush_s) * speeds[worker])
            out.rows_lost += lost
            rows -= lost
        left_rows[shard] -= rows
        out.num_preemptions += 1
        back_s = max(now, up_until[worker]) + draw.expovariate(1 / cluster.away_s)
        up_until[worker] = -1.0
        heapq.heappush(events, (back_s, worker))
    out.wall_s = max(done_at)
    out.idle_s = sum(out.wall_s - at for at in done_at)
    out.peak_starts_per_s = max(starts.values()) / 60
    return out


def table(cluster: Cluster) -> list[str]:
    """The simulation as Markdown, for three ways to share the work."""
    ways = (cluster.num_workers, 10 * cluster.num_workers, None)
    outs = [simulate(cluster, num_slices) for num_slices in ways]
    ideal_s = cluster.num_rows / (cluster.rows_per_s * cluster.num_workers)
    few, many = (f"{n:,} slices" for n in ways if n)

    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    lines = [
        row("", (few, many, "claimed one by one")),
        "|---|--:|--:|--:|",
        row(
            f"done after, of {ideal_s / HOUR_S:.1f} h at full strength",
            (f"{out.wall_s / HOUR_S:.1f} h" for out in outs),
        ),
        row("worker-hours after the last shard", (f"{o.idle_s / HOUR_S:,.0f}" for o in outs)),
        row("preemptions", (f"{out.num_preemptions:,}" for out in outs)),
        row("rows computed twice", (f"{out.rows_lost:,.0f}" for out in outs)),
        row("starts a second, at most", (f"{out.peak_starts_per_s:.1f}" for out in outs)),
    ]
    for name in sorted({name for out in outs for name in out.requests}):
        lines.append(
            row(
                name,
                (f"{o.requests[name]:,} ({o.requests[name] / o.wall_s:.1f}/s)" for o in outs),
            )
        )
    return lines


def build(cluster: Cluster) -> list[str]:
    """Plan, write, read and list the real thing on this machine's disk."""

    def timed(label: str, action: object) -> object:
        start = time.process_time()
        value = action()  # type: ignore[operator]
        lines.append(f"| {label} | {time.process_time() - start:.2f} s |")
        return value

    lines = ["| With 100,000 shards | CPU |", "|---|--:|"]
    rows = cluster.rows_per_shard
    files = [
        InputFile(name=f"{i:05d}.parquet", num_rows=100 * rows, row_groups=(rows,) * 100,
                  identity=f"{i}")
        for i in range(cluster.num_shards // 100)
    ]  # fmt: skip
    plan = timed("plan 1,000 files of 100 row groups",
                 lambda: plan_shards(files, rows_per_shard=rows, max_rows=None))  # fmt: skip
    assert isinstance(plan, list) and len(plan) == cluster.num_shards
    with tempfile.TemporaryDirectory() as root:
        folder = OutputFolder(Path(root) / "out")
        about = {"identity": {}, "layout": {}, "settings": {}, "packages": {}}
        run = find_run(folder, plan=plan, **about)
        timed("write run.json", lambda: save_run(folder, run))
        size = folder.run_json.stat().st_size
        timed("read run.json, as every start does", lambda: read_run(folder))
        folder.data.mkdir()
        for index in range(cluster.num_shards):
            folder.part(index, cluster.num_shards).touch()
        found = timed("list 100,000 parts", lambda: folder.finished_shards(cluster.num_shards))
        assert len(found) == cluster.num_shards  # type: ignore[arg-type]
        mine = range(0, cluster.num_shards, cluster.num_workers)
        few = timed("look for the 50 parts of a slice",
                    lambda: folder.finished_shards(cluster.num_shards, mine))  # fmt: skip
        assert len(few) == len(mine)  # type: ignore[arg-type]
        folder.part(7, cluster.num_shards).unlink()
        timed("find that a part is not there", lambda: folder.find_part(7, cluster.num_shards))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(f"| size of run.json | {size / 2**20:.1f} MiB |")
    lines.append(f"| most memory of this process | {memory:.0f} MiB |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=Cluster.num_rows)
    parser.add_argument("--shards", type=int, default=Cluster.num_shards)
    parser.add_argument("--workers", type=int, default=Cluster.num_workers)
    parser.add_argument("--uptime-h", type=float, default=Cluster.uptime_s / HOUR_S)
    parser.add_argument("--build", action="store_true", help="build and list the plan for real")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    args = parser.parse_args()
    cluster = Cluster(
        num_rows=args.rows,
        num_shards=args.shards,
        num_workers=args.workers,
        uptime_s=args.uptime_h * HOUR_S,
    )
    lines = table(cluster)
    if args.build:
        lines += ["", *build(cluster)]
    text = "\n".join(lines)
    print(text)
    if args.write:
        command = "python benchmarks/scale_sim.py --build --write"
        write_section("Scale", f"{environment(command)}\n\n{text}")


if __name__ == "__main__":
    main()
