"""How much goes through the model at once, sized from what the machine says is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batchvlm.config import EngineConfig
from batchvlm.engine.slots import memory
from batchvlm.engine.slots.memory import Ceiling, MemoryPlan, free_bytes

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a /proc and a /sys of these files."""

    def make(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def below(path: str) -> Path:
        known = {
            "/proc/meminfo": "meminfo",
            "/proc/self/cgroup": "groups",
            "/sys/fs/cgroup": "cgroup",
        }
        return tmp_path / known[path]

    monkeypatch.setattr(memory, "Path", below)
    return make


MEMINFO = f"MemTotal:  99 kB\nMemFree:  1 kB\nMemAvailable:   {8 * GIB >> 10} kB\nCached: 5 kB\n"


class TestFreeBytes:
    def test_without_a_limit_it_is_what_the_machine_has(self, machine: Any) -> None:
        machine(meminfo=MEMINFO)
        assert free_bytes(CPU) == 8 * GIB

    def test_a_machine_that_says_nothing(self, machine: Any) -> None:
        assert 0 < free_bytes(CPU) < 1 << 50

    def group_v2(self, machine: Any, most: str) -> None:
        machine(
            meminfo=MEMINFO,
            groups="0::/\n",
            **{
                "cgroup__memory.max": f"{most}\n",
                "cgroup__memory.current": f"{3 * GIB}\n",
                "cgroup__memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
            },
        )

    def test_a_container_of_version_2(self, machine: Any) -> None:
        # Files that were only read give way.
        self.group_v2(machine, str(4 * GIB))
        assert free_bytes(CPU) == 2 * GIB

    def test_a_container_without_a_limit(self, machine: Any) -> None:
        self.group_v2(machine, "max")
        assert free_bytes(CPU) == 8 * GIB

    def test_a_container_above_the_machine(self, machine: Any) -> None:
        self.group_v2(machine, str(400 * GIB))
        assert free_bytes(CPU) == 8 * GIB

    def test_a_container_that_is_full(self, machine: Any) -> None:
        self.group_v2(machine, str(GIB))
        assert free_bytes(CPU) == 0

    def test_a_container_of_version_1(self, machine: Any) -> None:
        # The group that limits processor time may have the name of one with less memory.
        for file, number in ("limit_in_bytes", 1), ("usage_in_bytes", 0), ("stat", ""):
            machine(**{f"cgroup__memory__other__memory.{file}": str(number)})
        machine(
            meminfo=MEMINFO,
            groups="2:cpu,cpuacct:/other\n5:memory:/outside/name\n0::/\n",
            **{
                "cgroup__memory__memory.limit_in_bytes": f"{4 * GIB}\n",
                "cgroup__memory__memory.usage_in_bytes": f"{3 * GIB}\n",
                "cgroup__memory__memory.stat": f"cache 5\ninactive_file {GIB}\n",
            },
        )
        assert free_bytes(CPU) == 2 * GIB

    def test_a_job_step_within_a_node(self, machine: Any) -> None:
        # As SLURM and systemd make them: the limits are the groups' own, and the least counts.
        machine(meminfo=MEMINFO, groups="0::/job:7/step_0\n")
        for group, most in (("job:7", 6 * GIB), ("job:7__step_0", "max")):
            machine(
                **{
                    f"cgroup__{group}__memory.max": f"{most}\n",
                    f"cgroup__{group}__memory.current": f"{3 * GIB}\n",
                    f"cgroup__{group}__memory.stat": "anon 5\n",
                }
            )
        assert free_bytes(CPU) == 3 * GIB


class TestPlan:
    @pytest.fixture
    def plan(self, monkeypatch: pytest.MonkeyPatch) -> MemoryPlan:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000_000)
        return MemoryPlan(EngineConfig(memory_fraction=0.5), CPU)

    def test_slots_take_their_share_of_the_free_memory(self, plan: MemoryPlan) -> None:
        most = int(10_000_000 * 0.5)
        for bytes_per_token, length in ((1000, 64), (1000, 640), (5000, 128)):
            num_slots = plan.num_slots(bytes_per_token, length)
            assert 1 <= num_slots <= plan.max_slots
            assert num_slots == 1 or num_slots * bytes_per_token * length <= most
        assert plan.num_slots(1000, 64) > plan.num_slots(1000, 640) > 1
        assert plan.num_slots(1, 1) == plan.max_slots
        assert plan.num_slots(1000, 1 << 20) == 1

    def test_what_is_set_counts(self) -> None:
        plan = MemoryPlan(EngineConfig(max_slots=3, max_prefill_tokens=77), CPU)
        assert (plan.max_slots, plan.pack_tokens, plan.max_step_rows) == (3, 77, 3)
        assert plan.piece_tokens == plan.num_scored(1) == 77
        assert plan.num_slots(1, 1) == 3

    def test_slots_leave_the_memory_of_what_is_still_to_be_loaded(self, plan: MemoryPlan) -> None:
        beside = MemoryPlan(EngineConfig(memory_fraction=0.5), CPU, taken_bytes=5_000_000)
        assert beside.num_slots(1000, 64) == plan.num_slots(1000, 2 * 64) > 1
        full = MemoryPlan(EngineConfig(memory_fraction=0.5), CPU, taken_bytes=20_000_000)
        assert full.num_slots(1000, 64) == 1

    def test_choices_of_a_large_vocabulary_are_scored_in_smaller_packs(
        self, plan: MemoryPlan
    ) -> None:
        few, many = plan.num_scored(1 << 20), plan.num_scored(1 << 18)
        assert (many, plan.num_scored(1 << 40)) == (4 * few, 2)

    def test_a_piece_of_a_long_prompt_is_no_larger_than_a_pack(self, plan: MemoryPlan) -> None:
        plan.pieces.lower(100)
        assert plan.piece_tokens == 100 < plan.pack_tokens
        plan.lower_pack(100)
        assert plan.piece_tokens == plan.pack_tokens == 50

    def test_ceilings_fall_where_memory_is_short(self, plan: MemoryPlan) -> None:
        plan.lower_pack(100)
        plan.lower_pack(900)
        assert plan.pack_tokens == 50
        plan.lower_vision(100)
        plan.lower_vision(900)
        assert plan.vision_cells == 50
        plan.lower_step(4)
        plan.lower_step(8)
        assert plan.max_step_rows == 4
        plan.lower_cache(64 * 1000 * 8)
        plan.lower_cache(64 * 1000 * 20)
        assert plan.num_slots(1000, 64) == 4

    def test_there_is_always_room_for_one(self, plan: MemoryPlan) -> None:
        for _ in range(3):
            plan.lower_pack(1)
            plan.lower_vision(1)
            plan.lower_step(0)
            plan.lower_cache(1)
        assert (plan.pack_tokens, plan.vision_cells, plan.max_step_rows) == (1, 1, 1)
        assert plan.num_slots(1000, 64) == 1

    def test_what_was_too_large_once_is_tried_again(self, plan: MemoryPlan) -> None:
        def limits() -> tuple[int, ...]:
            scored = plan.num_scored(1)
            packs = plan.pack_tokens, plan.piece_tokens
            return plan.max_step_rows, *packs, plan.vision_cells, scored, slots()

        def slots() -> int:
            return plan.num_slots(1000, 64)

        def count() -> None:
            plan.count_good_step()
            plan.count_good_pack()
            plan.count_good_images()
            plan.count_good_scored()

        whole = limits()
        plan.lower_step(whole[0] // 4)
        plan.lower_pack(whole[1] // 2)
        plan.pieces.lower(whole[2] // 4)
        plan.lower_vision(whole[3] // 2)
        plan.lower_scored(whole[4] // 2)
        plan.lower_cache(64 * 1000 * (whole[5] // 2))
        assert all(now <= most // 4 + 1 for now, most in zip(limits(), whole, strict=True))
        for _ in range(3 * memory._TRY_AGAIN_STEPS):
            count()
        assert limits() == whole

    def test_only_successes_since_it_was_lowered_count(self) -> None:
        ceiling = Ceiling(8, try_again=3)
        for limit in (4, 2):
            ceiling.lower(limit)
            for _ in range(2):
                ceiling.count_good()
            assert ceiling.now == limit
        ceiling.count_good()
        assert ceiling.now == 4
        # One attempt failed, however often the limit is lowered after it.
        ceiling.lower(2)
        ceiling.lower(1)
        for _ in range(6):
            ceiling.count_good()
        assert ceiling.now == 2

    def test_what_is_too_large_again_is_tried_less_and_less_often(self) -> None:
        ceiling = Ceiling(8, try_again=2)
        ceiling.lower(2)
        tried = []
        for n in range(1, 40):
            ceiling.count_good()
            if ceiling.now > 2:
                tried.append(n)
                ceiling.lower(2)
        assert tried == [2, 6, 14, 30]
