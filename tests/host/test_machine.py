import pytest

from dovetail.host import machine

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path):
    class Tree:
        root = tmp_path

        def write(self, path, text):
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    return Tree()


def test_an_empty_tree_still_has_one_core(tree):
    assert machine.cpu_quota(tree.root) is None
    assert machine.cpu_budget(tree.root) >= 1
    assert machine.memory(tree.root) == machine.Memory(0, 0, None)
    assert machine.isa(tree.root) == ()
    assert machine.cpu_model(tree.root)
    assert machine.last_level_cache(tree.root) == 0


@pytest.mark.parametrize(
    ("affinity", "quota", "physical", "budget"),
    [(8, None, 4, 4), (8, 2.9, 4, 2), (1, 2.0, 4, 1), (8, 0.5, 4, 1), (8, 16.0, 8, 8)],
)
def test_the_budget_is_the_least(affinity, quota, physical, budget):
    assert machine.Cores(8, affinity, quota, physical).budget == budget


def test_v2_quota_of_the_tightest_ancestor(tree):
    tree.write("proc/self/cgroup", "0::/a/b/c\n")
    tree.write("sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n")
    tree.write("sys/fs/cgroup/a/b/cpu.max", "150000 100000\n")
    tree.write("sys/fs/cgroup/a/cpu.max", "400000 100000\n")
    assert machine.cpu_quota(tree.root) == 1.5


def test_v2_quota_seen_from_inside_a_container(tree):
    tree.write("proc/self/cgroup", "0::/../../docker/0123\n")
    tree.write("sys/fs/cgroup/cpu.max", "200000 100000\n")
    assert machine.cpu_quota(tree.root) == 2


def test_v1_quota(tree):
    tree.write("proc/self/cgroup", "12:memory:/x\n4:cpu,cpuacct:/docker/0123\n")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    tree.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tree.root) == 3


@pytest.mark.parametrize("quota", ["-1", "0", "garbage", ""])
def test_v1_without_a_quota(tree, quota):
    tree.write("proc/self/cgroup", "4:cpu:/\n")
    tree.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    tree.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert machine.cpu_quota(tree.root) is None


def test_hyperthreads_count_once(tree):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        tree.write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list", siblings + "\n")
    assert machine.physical_cores(tree.root, frozenset(range(4))) == 2
    assert machine.physical_cores(tree.root, frozenset({0, 2})) == 1


def test_cores_from_cpuinfo_when_sys_is_hidden(tree):
    blocks = [f"processor\t: {cpu}\nphysical id\t: {cpu // 4}\ncore id\t\t: {cpu % 2}\n" for cpu in range(8)]
    tree.write("proc/cpuinfo", "\n".join(blocks))
    assert machine.physical_cores(tree.root, frozenset(range(8))) == 4


def test_names_and_instructions(tree):
    tree.write(
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Example CPU @ 3GHz\n"
        "flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 xyz\n\n"
        "processor\t: 1\nmodel name\t: Other\nflags\t\t: fpu\n",
    )
    assert machine.cpu_model(tree.root) == "Example CPU @ 3GHz"
    assert machine.isa(tree.root) == ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def test_memory_without_a_limit(tree):
    tree.write("proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    tree.write("proc/self/cgroup", "3:memory:/\n")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    assert machine.memory(tree.root) == machine.Memory(8 * GIB, 4 * GIB, None)


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cache"),
    [
        ("0::/job", "job", "memory.max", "memory.current", "inactive_file"),
        (
            "3:memory:/job",
            "memory/job",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_memory_limit_counts_page_cache_as_free(tree, line, folder, limit, used, cache):
    tree.write("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n")
    tree.write("proc/self/cgroup", line + "\n")
    tree.write(f"sys/fs/cgroup/{folder}/{limit}", f"{2 * GIB}\n")
    tree.write(f"sys/fs/cgroup/{folder}/{used}", f"{GIB}\n")
    tree.write(f"sys/fs/cgroup/{folder}/memory.stat", f"anon 5\n{cache} {GIB // 2}\n")
    assert machine.memory(tree.root) == machine.Memory(8 * GIB, 3 * GIB // 2, 2 * GIB)


def test_last_level_cache(tree):
    tree.write("sys/devices/system/cpu/cpu0/cache/index0/size", "32K\n")
    tree.write("sys/devices/system/cpu/cpu0/cache/index3/size", "32M\n")
    assert machine.last_level_cache(tree.root) == 32 << 20


def test_bandwidth_is_plausible():
    assert 1e7 < machine.read_bandwidth(2, 16 << 20, 0.01) < 1e14
