"""What the processor of this machine can do, and how much of it this process may use."""

from __future__ import annotations

import os
import platform
import re
import sys
from functools import lru_cache
from pathlib import Path

# The instruction sets that decide which kernels the runtimes pick, by their Linux name.
# asimddp is NEON's dot product, i8mm its int8 matrix product, svei8mm the SVE one.
_X86 = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
_ARM = (
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "svei8mm",
)
NOTABLE = _X86 + _ARM
# Any of these multiplies bf16 matrices faster than float32.
BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Names that macOS' sysctl uses (hw.optional.arm.FEAT_...) for the same instructions.
_APPLE = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "AdvSIMD": "asimd"}
_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Return the instruction sets of :data:`NOTABLE` that this processor has.

    Empty where the system does not say (Windows): nothing is then assumed.

    >>> cpu_features() <= set(NOTABLE)
    True
    """
    if sys.platform == "linux":
        flags = set(re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.M)[:1])
        present = set(" ".join(flags).split())
    elif sys.platform == "darwin":
        present = _apple_features()
    else:
        present = set()
    return frozenset(name for name in NOTABLE if name in present)


def lacking() -> tuple[str, ...]:
    """Return the instruction sets that processors of this kind may have and this one has not.

    >>> set(lacking()) & cpu_features()
    set()
    """
    arm = platform.machine().lower().startswith(("arm", "aarch64"))
    return tuple(name for name in (_ARM if arm else _X86) if name not in cpu_features())


@lru_cache(maxsize=1)
def cpu_model() -> str:
    """Return the processor's own name, for example ``AMD EPYC``."""
    found = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.M)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def clock_mhz() -> int | None:
    """Return the clock of this moment, the median of all cores in MHz; None where nobody says.

    A virtual machine's system often tells the nominal clock, whatever the host's is.

    >>> clock_mhz() is None or clock_mhz() > 0
    True
    """
    told = [_words(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = [int(words[0]) / 1000 for words in told if words and words[0].isdigit()]
    if not clocks:
        # Read each time: _cpuinfo() remembers, and a clock changes.
        text = " ".join(_words(Path("/proc/cpuinfo")))
        clocks = [float(value) for value in re.findall(r"cpu MHz : ([\d.]+)", text)]
    return round(sorted(clocks)[len(clocks) // 2]) if clocks else None


def usable_cpus() -> int:
    """Return how many cores this process may keep busy: affinity and cgroup quota considered.

    A container limited to 1.5 cores gets 2 threads: one would leave the half core idle.

    >>> 1 <= usable_cpus() <= os.cpu_count()
    True
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cgroup_cpu_quota(_CGROUP)
    return max(1, min(count, -int(-quota // 1))) if quota else max(1, count)


def physical_cores() -> int:
    """Return how many of :func:`usable_cpus` are cores of their own, not a core's second thread.

    All of them where the system does not say.

    >>> 1 <= physical_cores() <= usable_cpus()
    True
    """
    if not hasattr(os, "sched_getaffinity"):
        return usable_cpus()
    root, file = Path("/sys/devices/system/cpu"), "topology/thread_siblings_list"
    told = (_words(root / f"cpu{cpu}" / file) for cpu in os.sched_getaffinity(0))
    siblings = {tuple(words) for words in told if words}
    return min(len(siblings) or usable_cpus(), usable_cpus())


def cgroup_cpu_quota(root: Path) -> float | None:
    """Return the cores the cgroup below ``root`` allows (v2 ``cpu.max``, else v1), None if all.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> _ = (root / "cpu.max").write_text("150000 100000")
    >>> cgroup_cpu_quota(root)
    1.5
    """
    whole = _words(root / "cpu.max")
    if len(whole) == 2 and whole[0] != "max":
        return int(whole[0]) / int(whole[1])
    quota = _words(root / "cpu" / "cpu.cfs_quota_us")
    period = _words(root / "cpu" / "cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def memory_limit_bytes() -> int | None:
    """Return the cgroup's memory limit, None when there is none (or the system has no cgroups)."""
    for path in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        words = _words(path)
        # v1 writes "no limit" as the largest page-aligned 63-bit number.
        if words and words[0] != "max" and int(words[0]) < 1 << 60:
            return int(words[0])
    return None


@lru_cache(maxsize=1)
def machine_key() -> str:
    """Return the key under which the manifest remembers what was tuned on a machine like this.

    Processor name, instruction sets and usable cores: what decides which variant is the fastest.

    >>> machine_key() == machine_key()
    True
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", cpu_model()).strip("-")
    features = "+".join(sorted(cpu_features())) or platform.machine()
    return f"{platform.system().lower()}-{name}-{usable_cpus()}c-{features}"


def covers(key: str) -> bool:
    """Return whether this machine has every instruction set of the one that ``key`` names.

    What was measured there then says something about here: the same kernels run. Without VNNI, say,
    int8 is neither as fast nor as right (its sums saturate).

    >>> covers(machine_key()), covers("linux-Other-4c-avx9"), covers("")
    (True, False, False)
    """
    system, _, rest = key.partition("-")
    found = re.search(r"-\d+c-([^-]+)$", rest)
    if not found or system != platform.system().lower():
        return False
    return set(found[1].split("+")) <= cpu_features() | {platform.machine()}


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []


@lru_cache(maxsize=1)
def _cpuinfo() -> str:
    try:
        # The first core's block is enough, and a 256-core file is long.
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read(16384)
    except OSError:
        return ""


def _apple_features() -> set[str]:
    import subprocess

    result = subprocess.run(
        ["sysctl", "hw.optional"], capture_output=True, text=True, check=False, timeout=10
    )
    on = {
        line.partition(":")[0].split(".")[-1]
        for line in result.stdout.splitlines()
        if ": 1" in line
    }
    return {_APPLE[name] for name in on if name in _APPLE} | {n for n in on if n in NOTABLE}
