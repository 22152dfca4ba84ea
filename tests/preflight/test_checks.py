"""Preflight without ranks: what is said of answers, and what a machine answers."""

import json
import re
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster.devices import missing_gpus
from pipeline.cluster.host_memory import host_memory
from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.config.settings import RunSettings
from pipeline.errors import UserError
from pipeline.plan.given.hardware import GIB
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.preflight.check import ProbeResults, by_answer, compare, flat, spans
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import none_asked, not_granted, numbers_of, probe_gpus
from pipeline.preflight.host import granted_by_slurm
from pipeline.preflight.inputs import probe_disk, probe_model
from pipeline.preflight.network import (
    infiniband_ports,
    missing_interfaces,
    probe_network,
    probe_port,
)
from pipeline.preflight.rates import neighbours, ring_rate
from pipeline.preflight.report import Report
from pipeline.preflight.table import STAGES
from tests import ROOT
from tests.planning import CPU, H100S, LLAMA_8B
from tests.preflight.check_cases import BAD, GOOD, LOOKS_ALONE

pytestmark = pytest.mark.unit

CHECKS = {check.name: check for checks in STAGES.values() for check in checks}
HOSTS = [f"node{rank + 1}" for rank in range(8)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """An 8B model on two H100s."""
    folder = tmp_path_factory.mktemp("8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    settings = RunSettings(model=str(folder), train_data="t.jsonl", output_dir=str(folder / "run"))
    machine = replace(H100S, devices_per_node=2)
    return make_plan(settings, read_shape(str(folder)), machine, nodes=1, ranks_per_node=2)


def context(plan, *, placement=Placement(), hardware=CPU, **changes) -> RankContext:  # noqa: B008
    values = {
        "placement": placement, "hardware": hardware, "session": Session(placement, hardware),
        "settings": plan.settings, "plan": plan,
    }  # fmt: skip
    return RankContext(**(values | changes))


def seen(answers, plan=None) -> ProbeResults:
    return ProbeResults(answers=answers, hosts=HOSTS[: max(2, max(answers) + 1)], plan=plan)


@pytest.mark.parametrize(("name", "answers", "parts"), GOOD)
def test_good_answers_are_one_ok(name, answers, parts, plan):
    (found,) = CHECKS[name].judge(seen(answers, plan))
    assert found.level == "ok"
    assert not found.remedy
    for part in parts:
        assert part in found.text


@pytest.mark.parametrize(("name", "answers", "level", "parts"), BAD)
def test_bad_answers_are_told_with_place_and_remedy(name, answers, level, parts, plan):
    (found,) = CHECKS[name].judge(seen(answers, plan))
    assert found.level == level
    assert found.remedy
    for part in parts:
        assert part in found.text


def test_every_check_has_both_cases():
    assert {case[0] for case in GOOD} == set(CHECKS)
    assert {case[0] for case in BAD} | LOOKS_ALONE == set(CHECKS)
    assert len(CHECKS) == sum(map(len, STAGES.values())), "two checks of one name"


def test_the_page_explains_every_check_in_the_tables_order():
    page = (ROOT / "docs/preflight.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(CHECKS)


def test_64_ranks_of_8_machines_are_told_in_one_line():
    hosts = [f"node{rank // 8}" for rank in range(64)]
    odd = {*range(16, 24), 40}
    answers = {rank: flat({"a": {"b": rank in odd}, "c": 1}) for rank in range(64)}
    (found,) = compare(ProbeResults(answers=answers, hosts=hosts), "same", "mend")
    assert set(found.ranks) == odd
    assert "a.b" in found.text
    assert "ranks 16-23, 40 (node2, node5)" in found.text
    assert "c " not in found.text
    assert len(found.text.splitlines()) == 3


def test_spans_and_groups():
    assert spans([]) == ""
    assert spans([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert by_answer({3: "x", 1: "y", 2: "x"}) == {"x": [2, 3], "y": [1]}


@pytest.mark.parametrize("machines", [1, 2, 3, 8])
@pytest.mark.parametrize("each", [1, 2, 3, 4, 5, 8])
def test_all_pairs_of_a_round_work_at_once(machines, each):
    """Each rank goes through its list; a pair needs both. Nobody waits for a rank that waits."""
    world = machines * each
    todo = {rank: neighbours(rank, world, each) for rank in range(world)}
    done, rounds = set(), 0
    while any(todo.values()):
        ready = {(r, o[0]) for r, o in todo.items() if o and todo[o[0]][:1] == [r]}
        assert ready, todo
        done |= {tuple(sorted(pair)) for pair in ready}
        todo = {r: o[1:] if (r, *o[:1]) in ready else o for r, o in todo.items()}
        rounds += 1
    near = {(rank, rank + 1) for rank in range(world - 1) if (rank + 1) % each}
    assert done == near | {(rank, rank + each) for rank in range(world - each)}
    assert rounds <= 4


def test_a_ring_of_two_moves_all_bytes_once():
    assert ring_rate(2, 100, 2.0) == 50
    assert ring_rate(4, 100, 1.0) == 150


# What a machine answers


def cgroup(root: Path, lines: str, **files: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_jobs_limit_below_the_top_group_counts(tmp_path):
    """As Slurm makes it with version 2: the limit is on the job, the process in a task."""
    cgroup(
        tmp_path,
        "0::/slurm/job_7/step_0/task_0\n",
        slurm__memory_dot_max="max\n",
        slurm__job_7__memory_dot_max=f"{2**30}\n",
        slurm__job_7__memory_dot_current=f"{2**29}\n",
        slurm__job_7__memory_dot_stat=f"anon 1\ninactive_file {2**28}\n",
        slurm__job_7__step_0__memory_dot_max="max\n",
    )
    found = host_memory(tmp_path)
    assert found.total == 2**30
    assert found.free == 2**30 - 2**29 + 2**28  # the page cache is given back
    assert found.limited_by.endswith("slurm/job_7")


def test_a_limit_of_version_1(tmp_path):
    cgroup(
        tmp_path,
        "5:cpuset:/x\n4:memory,hugetlb:/docker/abc\n",
        memory__memory_dot_limit_in_bytes=f"{2**30}\n",  # in a container the top is its own
        memory__memory_dot_usage_in_bytes=f"{2**29}\n",
        cpuset__memory_dot_limit_in_bytes="1\n",
    )
    found = host_memory(tmp_path)
    assert (found.total, found.free) == (2**30, 2**29)


@pytest.mark.parametrize("lines", ["0::/\n", "4:memory:/\n", ""])
def test_no_limit_is_the_machines_memory(tmp_path, lines):
    cgroup(tmp_path, lines, memory__memory_dot_limit_in_bytes=f"{2**63 - 4096}\n")
    found = host_memory(tmp_path)
    assert found.total == host_memory(tmp_path / "nowhere").total
    assert 0 < found.free <= found.total
    assert found.limited_by == ""


@pytest.mark.parametrize(
    ("env", "mib"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4096),
        ({"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "4"}, 4000),
        ({"SLURM_MEM_PER_GPU": "500", "SLURM_GPUS_ON_NODE": "8"}, 4000),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_CPU": "1000"}, None),
        ({}, None),
    ],
)
def test_memory_that_slurm_granted(env, mib):
    assert granted_by_slurm(env) == (None if mib is None else mib * 2**20)


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for NVML: four GPUs of a node, of which CUDA_VISIBLE_DEVICES shows some."""
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetIndex=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: "NVIDIA H100 80GB HBM3",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * GIB, free=79 * GIB),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=handle + 70)],
        nvmlSystemGetDriverVersion=lambda: "580.65",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)
    return nvml


def local(rank: int, of: int) -> Placement:
    return Placement(rank=rank, local_rank=rank, world_size=of, local_size=of, master_port=1)


def uuids(answer) -> list[str]:
    return [card["uuid"] for card in answer["gpus"]]


def test_a_rank_answers_for_its_gpu_and_one_process_for_all(plan, nvml, monkeypatch):
    assert uuids(probe_gpus(context(plan, hardware=H100S))) == [f"GPU-{i}" for i in range(4)]
    # Training by one process uses one GPU; what is done with the others is others' business.
    assert uuids(probe_gpus(context(plan, hardware=H100S, is_training=True))) == ["GPU-0"]
    rank_1 = context(plan, hardware=H100S, placement=local(1, 2))
    answer = probe_gpus(rank_1)
    assert uuids(answer) == ["GPU-1"]
    assert answer["gpus"][0]["processes"] == (71,)
    json.dumps(answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # each process sees its own only
    assert uuids(probe_gpus(rank_1)) == ["GPU-3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(UserError, match="shows 2 GPUs and 3 ranks"):
        probe_gpus(context(plan, hardware=H100S, placement=local(2, 3)))


def test_gpus_that_slurm_did_not_grant_are_told(plan, nvml, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as DeepSpeed's --num_gpus leaves it
    stranger = probe_gpus(context(plan, hardware=H100S, placement=local(1, 2)))["stranger"]
    assert stranger == {"used": "[1]", "granted": "SLURM_JOB_GPUS=2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert probe_gpus(context(plan, hardware=H100S, placement=local(1, 2)))["stranger"] is None


@pytest.mark.parametrize("name", ["SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES"])
def test_granted_gpus_that_the_driver_does_not_show_are_refused(plan, nvml, monkeypatch, name):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv(name, "0-3" if name.startswith("SLURM") else "0,1")
    unseen = missing_gpus(Placement(), CPU)
    with pytest.raises(UserError, match=f"{name}=0.*shows none.*DS_ACCELERATOR=cpu"):
        probe_gpus(context(plan, missing_gpus=unseen))
    assert missing_gpus(Placement(), H100S) is None
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert missing_gpus(Placement(), CPU) is None


def test_deepspeeds_numbers_of_cpu_ranks_are_no_grant(nvml, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert missing_gpus(replace(local(0, 2), launcher="deepspeed"), CPU) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert missing_gpus(Placement(), CPU) is None


def test_a_slurm_job_that_speaks_of_no_gpu():
    assert none_asked({"SLURM_JOB_ID": "7"})
    assert not none_asked({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0"})
    assert not none_asked({})


def test_granted_gpus_may_be_told_as_ranges():
    assert numbers_of("0-3") == {0, 1, 2, 3}
    assert numbers_of("0,2-3, 7") == {0, 2, 3, 7}
    assert not any(map(numbers_of, ("", "a,b", "0,?")))
    assert not_granted([3], 8, {"SLURM_JOB_GPUS": "0-3"}) is None
    assert not_granted([4], 8, {"SLURM_JOB_GPUS": "0-3"}) is not None
    assert not_granted([4], 8, {"SLURM_JOB_GPUS": "gres:?"}) is None  # says nothing


def test_a_control_group_that_hides_the_others_numbers_gpus_anew():
    env = {"SLURM_JOB_GPUS": "6,7"}
    assert not_granted([0, 1], 2, env) is None
    assert not_granted([0, 1], 8, env) is not None
    assert not_granted([7], 8, env) is None
    assert not_granted([None], 8, env) is None  # a MIG slice has no number
    assert not_granted([0], 8, {}) is None
    assert not_granted([6], 8, env | {"SLURM_STEP_GPUS": "7"}) is not None  # the step has fewer


def test_a_port_in_use_is_refused_and_a_free_one_is_not(plan):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = replace(local(0, 2), master_port=port)
        with pytest.raises(UserError, match=f"port {port} .*--master_port"):
            probe_port(context(plan, placement=place))
    assert probe_port(context(plan, placement=place)) == f"{port} is free"
    assert "one process" in probe_port(context(plan))
    for later in ({"master_port": 0}, {"rendezvous_id": "Slurm step 1.0"}):
        said = probe_port(context(plan, placement=replace(local(0, 2), **later)))
        assert "when the ranks meet" in said


def test_an_interface_that_is_named_must_be_there():
    there = ["lo", "eth0", "ib0"]
    for good in ("eth", "ib,eth", "=eth0", "^docker", ""):
        assert missing_interfaces({"NCCL_SOCKET_IFNAME": good}, there) == {}
    for bad in ("enp", "=eth"):
        assert missing_interfaces({"NCCL_SOCKET_IFNAME": bad}, there)
    assert missing_interfaces({"GLOO_SOCKET_IFNAME": "eth"}, there)
    assert missing_interfaces({"GLOO_SOCKET_IFNAME": "eth0"}, there) == {}


def test_the_way_to_rank_zero(plan):
    answer = probe_network(context(plan, placement=local(0, 2)))
    assert (answer["interface"], answer["master"]) == (None, "127.0.0.1")
    nowhere = replace(local(0, 2), master_addr="no-such-host.invalid")
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid"):
        probe_network(context(plan, placement=nowhere))


def test_states_of_infiniband_ports(tmp_path):
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    assert infiniband_ports(tmp_path) == {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN"}
    assert infiniband_ports(tmp_path / "none") == {}


def test_a_model_without_weights_and_a_disk_that_is_full(plan, monkeypatch):
    with pytest.raises(UserError, match=r"no weights .*; download"):
        probe_model(context(plan))
    full = SimpleNamespace(free=10)
    monkeypatch.setattr("pipeline.preflight.inputs.shutil.disk_usage", lambda path: full)
    with pytest.raises(UserError, match="0 MiB free and the run will need"):
        probe_disk(context(plan))


def test_a_users_own_copies_are_no_room_for_checkpoints(plan, tmp_path):
    there = context(plan, settings=plan.settings.model_copy(update={"output_dir": str(tmp_path)}))
    need = probe_disk(there)["need"]
    for name in ("step-00000006", "best-00000006", "step-00000006-keep"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter.safetensors").write_bytes(bytes(1000))
    assert probe_disk(there)["need"] == need - 2000


def test_what_is_wrong_with_the_run_file_is_an_answer(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("lora_rnk: 3\n")
    session = Session(Placement(), CPU)
    found = RankContext.read(
        path, [], placement=Placement(), hardware=CPU, session=session, beat=lambda where: None
    )
    assert (found.settings, found.plan) == (None, None)
    with pytest.raises(UserError, match="did you mean 'lora_r'"):
        CHECKS["settings"].look(found)


# The report


CPU_RANK = {"gpus": [], "stranger": None, "is_unasked": False}


def report(answers: list[dict]) -> Report:
    made, checks = Report(), [CHECKS[name] for name in ("clock", "disk", "drivers")]
    made.add(checks, answers, HOSTS[: len(answers)], None)
    return made


def test_a_look_that_raised_is_a_failure_of_its_ranks():
    full = {"error": "output_dir: /r has 0 MiB free; free some space"}
    gone = {"error": "MemoryError: gone"}
    made = report(
        [{"clock": 0.0, "disk": full, "drivers": CPU_RANK}, {"clock": gone}, {"clock": gone}]
    )
    assert made.verdict == "fail"
    assert made.failed() == ["clock", "disk"]
    assert made.failed(["drivers", "clock"]) == ["clock"]
    (clock,), (disk,) = made.findings["clock"], made.findings["disk"]
    assert clock.text == "ranks 1-2 (node2, node3): MemoryError: gone"
    assert clock.remedy == CHECKS["clock"].otherwise
    assert (disk.text, disk.remedy) == (
        "rank 0 (node1): output_dir: /r has 0 MiB free", "free some space",
    )  # fmt: skip
    assert list(made.left_out) == ["drivers"]
    assert "-> free some space" in made.text()
    assert made.text().endswith("2 of 2 checks fail: clock, disk")


def test_what_was_found_is_no_remedy():
    wrong = {"error": "RUN.yaml:3: lora_r: must be a whole number; found 'nine'"}
    made = Report()
    made.add([CHECKS["settings"]], [{"settings": wrong}], HOSTS[:1], None)
    (found,) = made.findings["settings"]
    assert found.text.endswith("found 'nine'")
    assert found.remedy == CHECKS["settings"].otherwise


def test_the_report_as_text_and_as_json():
    tight = {"free": 1, "need": 0, "merged": 9}
    made = report([{"clock": 0.0, "disk": tight, "drivers": CPU_RANK}, {"clock": 0.1}])
    assert made.verdict == "warn"
    assert made.text().endswith("2 checks passed, 1 with a warning: disk")
    data = json.loads(json.dumps(made.as_json(HOSTS[:2])))
    assert (data["verdict"], data["hosts"]) == ("warn", ["node1", "node2"])
    clock, disk = data["findings"]
    assert (clock["check"], clock["level"]) == ("clock", "ok")
    assert disk == {"check": "disk", **asdict(made.findings["disk"][0]), "ranks": []}
    assert data["not_checked"] == {"drivers": "nothing to look at in this run"}
