"""Preflight: assessments of results, the report, and probes that need no other rank."""

import json
import re
import socket
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from pipeline.cluster.placement import Placement
from pipeline.cluster.session import Session
from pipeline.config.settings import RunSettings
from pipeline.plan.given.shape import read_shape
from pipeline.plan.plan import make_plan
from pipeline.preflight.check import ProbeResults, compare, flatten, format_ranges, ranks_by_value
from pipeline.preflight.checks import STAGES
from pipeline.preflight.context import RankContext
from pipeline.preflight.gpus import parse_gpu_indices, requests_no_gpu, unallocated_gpus
from pipeline.preflight.host import slurm_memory
from pipeline.preflight.network import infiniband_ports, missing_interfaces
from pipeline.preflight.rates import neighbours, ring_rate
from pipeline.preflight.report import Report
from tests import ROOT
from tests.messages import assert_mentions, refused
from tests.nvml import gpus, make_nvml
from tests.plans import CPU, H100S, LLAMA_8B
from tests.preflight.check_cases import BAD, GOOD, WITHOUT_BAD_RESULTS

pytestmark = pytest.mark.unit

CHECKS = {check.name: check for stage in STAGES for check in stage.checks}
HOSTS = [f"node{rank + 1}" for rank in range(8)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The plan of an 8B model on two H100s."""
    folder = tmp_path_factory.mktemp("8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    settings = RunSettings(model=str(folder), train_data="t.jsonl", output_dir=str(folder / "run"))
    node = replace(H100S, devices_per_node=2)
    return make_plan(settings, read_shape(str(folder)), node, nodes=1, ranks_per_node=2)


def context(plan, *, placement=Placement(), hardware=CPU, **changes) -> RankContext:  # noqa: B008
    values = {
        "placement": placement, "hardware": hardware, "session": Session(placement, hardware),
        "settings": plan.settings, "plan": plan,
    }  # fmt: skip
    return RankContext(**(values | changes))


def probe(name: str, plan, **changes):
    return CHECKS[name].probe(context(plan, **changes))


def results(by_rank, plan=None) -> ProbeResults:
    return ProbeResults(by_rank=by_rank, hosts=HOSTS[: max(2, max(by_rank) + 1)], plan=plan)


@pytest.mark.parametrize(("name", "by_rank", "facts"), GOOD)
def test_good_results_give_one_finding_of_level_ok(name, by_rank, facts, plan):
    (finding,) = CHECKS[name].assess(results(by_rank, plan))
    assert finding.level == "ok"
    assert not finding.remedy
    assert_mentions(finding.text, *facts)


@pytest.mark.parametrize(("name", "by_rank", "level", "facts"), BAD)
def test_bad_results_give_one_finding_with_place_and_remedy(name, by_rank, level, facts, plan):
    (finding,) = CHECKS[name].assess(results(by_rank, plan))
    assert finding.level == level
    assert finding.remedy
    assert_mentions(f"{finding.text} {finding.remedy}", *facts)


def test_every_check_has_a_good_and_a_bad_case():
    assert {case[0] for case in GOOD} == set(CHECKS)
    assert {case[0] for case in BAD} | WITHOUT_BAD_RESULTS == set(CHECKS)
    assert len(CHECKS) == sum(len(stage.checks) for stage in STAGES), "two checks of one name"


def test_a_stage_requires_only_checks_of_earlier_stages():
    earlier = set()
    for stage in STAGES:
        assert set(stage.requires) <= earlier
        earlier |= set(stage.checks)


def test_the_page_explains_every_check_in_order():
    page = (ROOT / "docs/preflight.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(CHECKS)


def test_a_difference_among_64_ranks_is_one_finding_that_names_the_minority():
    hosts = [f"node{rank // 8}" for rank in range(64)]
    minority = {*range(16, 24), 40}
    by_rank = {rank: flatten({"a": {"b": rank in minority}, "c": 1}) for rank in range(64)}
    (finding,) = compare(ProbeResults(by_rank=by_rank, hosts=hosts), "same", "make them equal")
    assert set(finding.ranks) == minority
    assert_mentions(finding.text, "a.b", "ranks 16-23, 40 (node2, node5)")
    assert "c " not in finding.text
    assert len(finding.text.splitlines()) == 3


def test_differences_beyond_a_dozen_are_counted():
    by_rank = {rank: {f"key{i}": str(rank) for i in range(15)} for rank in range(2)}
    (finding,) = compare(results(by_rank), "same", "make them equal")
    assert_mentions(finding.text, "key11", "and 3 more")
    assert "key12" not in finding.text


def test_ranks_are_grouped_into_spans():
    assert format_ranges([]) == ""
    assert format_ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert ranks_by_value({3: "x", 1: "y", 2: "x"}) == {"x": [2, 3], "y": [1]}


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 5, 8])
def test_four_rounds_measure_the_links_of_all_ranks(nodes, per_node):
    """Each rank takes its partners in order; a pair is measured once both ranks have come to it."""
    world = nodes * per_node
    todo = {rank: neighbours(rank, world, per_node) for rank in range(world)}
    done, rounds = set(), 0
    while any(todo.values()):
        ready = {
            (rank, left[0]) for rank, left in todo.items() if left and todo[left[0]][:1] == [rank]
        }
        assert ready, todo
        done |= {tuple(sorted(pair)) for pair in ready}
        todo = {
            rank: left[1:] if (rank, *left[:1]) in ready else left for rank, left in todo.items()
        }
        rounds += 1
    near = {(rank, rank + 1) for rank in range(world - 1) if (rank + 1) % per_node}
    assert done == near | {(rank, rank + per_node) for rank in range(world - per_node)}
    assert rounds <= 4


def test_a_ring_of_two_sends_all_bytes_once():
    assert ring_rate(2, 100, 2.0) == 50
    assert ring_rate(4, 100, 1.0) == 150


# Probes


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
def test_memory_granted_by_slurm_is_read_from_its_variables(env, mib):
    assert slurm_memory(env) == (None if mib is None else mib * 2**20)


@pytest.fixture
def nvml(monkeypatch):
    """NVML with four GPUs, and no variable that selects some of them."""
    monkeypatch.setitem(sys.modules, "pynvml", make_nvml(gpus(4)))
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.delenv(name, raising=False)


def local(rank: int, world_size: int) -> Placement:
    sizes = {"world_size": world_size, "local_size": world_size}
    return Placement(rank=rank, local_rank=rank, **sizes, master_port=1)


def uuids(plan, **changes) -> list[str]:
    return [gpu["uuid"] for gpu in probe("gpus", plan, hardware=H100S, **changes)["gpus"]]


def test_a_rank_probes_its_gpu_and_a_single_process_probes_all(plan, nvml, monkeypatch):
    assert uuids(plan) == [f"GPU-{i}" for i in range(4)]
    assert uuids(plan, is_training=True) == ["GPU-0"]  # the only GPU that it will use
    result = probe("gpus", plan, hardware=H100S, placement=local(1, 2))
    assert [gpu["uuid"] for gpu in result["gpus"]] == ["GPU-1"]
    assert result["visible"] == 4
    json.dumps(result)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # each process sees only its own GPU
    assert uuids(plan, placement=local(1, 2)) == ["GPU-3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with refused("2 GPUs", "3 ranks"):
        uuids(plan, placement=local(2, 3))


def test_gpus_that_slurm_did_not_grant_are_reported(plan, nvml, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # DeepSpeed's --num_gpus sets it so
    result = probe("gpus", plan, hardware=H100S, placement=local(1, 2))
    assert result["unallocated_gpus"] == {"used": "[1]", "allocated": "SLURM_JOB_GPUS=2,3"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert probe("gpus", plan, hardware=H100S, placement=local(1, 2))["unallocated_gpus"] is None


def test_granted_gpus_that_the_driver_does_not_show_are_refused(plan):
    with refused("SLURM_JOB_GPUS=0-3", "nvidia-smi", "DS_ACCELERATOR=cpu"):
        probe("gpus", plan, missing_gpus="SLURM_JOB_GPUS=0-3")


def test_a_slurm_job_without_gpus_is_detected():
    assert requests_no_gpu({"SLURM_JOB_ID": "7"})
    assert not requests_no_gpu({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0"})
    assert not requests_no_gpu({})


def test_granted_gpus_may_be_listed_as_ranges():
    assert parse_gpu_indices("0-3") == {0, 1, 2, 3}
    assert parse_gpu_indices("0,2-3, 7") == {0, 2, 3, 7}
    assert not any(map(parse_gpu_indices, ("", "a,b", "0,?")))
    assert unallocated_gpus([3], 8, {"SLURM_JOB_GPUS": "0-3"}) is None
    assert unallocated_gpus([4], 8, {"SLURM_JOB_GPUS": "0-3"}) is not None
    assert unallocated_gpus([4], 8, {"SLURM_JOB_GPUS": "gres:?"}) is None  # has no indices


def test_indices_are_not_compared_if_a_cgroup_renumbers_the_gpus():
    env = {"SLURM_JOB_GPUS": "6,7"}
    assert unallocated_gpus([0, 1], 2, env) is None
    assert unallocated_gpus([0, 1], 8, env) is not None
    assert unallocated_gpus([7], 8, env) is None
    assert unallocated_gpus([None], 8, env) is None  # a MIG instance has no index
    assert unallocated_gpus([0], 8, {}) is None
    step = env | {"SLURM_STEP_GPUS": "7"}  # the step has fewer GPUs than the job
    assert unallocated_gpus([6], 8, step) is not None


def test_a_port_in_use_is_refused_and_a_free_one_is_not(plan):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        placement = replace(local(0, 2), master_port=port)
        with refused(f"port {port}", "--master_port"):
            probe("port", plan, placement=placement)
    assert probe("port", plan, placement=placement) == f"{port} is free"
    assert "one process" in probe("port", plan)
    for derived in ({"master_port": 0}, {"rendezvous_id": "Slurm step 1.0"}):
        assert "rendezvous" in probe("port", plan, placement=replace(local(0, 2), **derived))


def test_an_interface_named_by_a_variable_must_exist():
    interfaces = ["lo", "eth0", "ib0"]
    for good in ("eth", "ib,eth", "=eth0", "^docker", ""):
        assert missing_interfaces({"NCCL_SOCKET_IFNAME": good}, interfaces) == {}
    for bad in ("enp", "=eth"):
        assert missing_interfaces({"NCCL_SOCKET_IFNAME": bad}, interfaces)
    assert missing_interfaces({"GLOO_SOCKET_IFNAME": "eth"}, interfaces)
    assert missing_interfaces({"GLOO_SOCKET_IFNAME": "eth0"}, interfaces) == {}


def test_an_address_of_rank_0_that_cannot_be_resolved_is_refused(plan):
    result = probe("network", plan, placement=local(0, 2))
    assert (result["interface"], result["master"]) == (None, "127.0.0.1")
    unresolvable = replace(local(0, 2), master_addr="no-such-host.invalid")
    with refused("MASTER_ADDR=no-such-host.invalid"):
        probe("network", plan, placement=unresolvable)


def test_states_of_infiniband_ports_are_read_from_sysfs(tmp_path):
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    assert infiniband_ports(tmp_path) == {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN"}
    assert infiniband_ports(tmp_path / "none") == {}


def test_a_model_without_weights_is_refused(plan):
    with refused("model", "no weights", "model.safetensors", "download"):
        probe("model", plan)


def test_a_full_disk_is_refused(plan, monkeypatch):
    full = SimpleNamespace(free=10)
    monkeypatch.setattr("pipeline.preflight.host.shutil.disk_usage", lambda path: full)
    with refused("output_dir", "0 MiB free", "save_total_limit"):
        probe("disk", plan)


def test_copies_of_checkpoints_made_by_a_user_are_not_counted_as_free_space(plan, tmp_path):
    settings = plan.settings.model_copy(update={"output_dir": str(tmp_path)})
    need = probe("disk", plan, settings=settings)["need"]
    for name in ("step-00000006", "best-00000006", "step-00000006-keep"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter.safetensors").write_bytes(bytes(1000))
    assert probe("disk", plan, settings=settings)["need"] == need - 2000


def test_a_wrong_run_file_gives_a_context_without_settings(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("lora_rnk: 3\n")
    placement = Placement()
    session = Session(placement, CPU)
    wrong = RankContext(placement=placement, hardware=CPU, session=session).with_run(path, [])
    assert (wrong.settings, wrong.plan) == (None, None)
    with refused("lora_rnk"):
        CHECKS["settings"].probe(wrong)


# The report


CPU_RANK = {"gpus": [], "visible": 0, "unallocated_gpus": None, "requests_no_gpu": False}


def report(by_rank: list[dict]) -> Report:
    result, checks = Report(), [CHECKS[name] for name in ("clock", "disk", "drivers")]
    result.add(checks, by_rank, HOSTS[: len(by_rank)], None)
    return result


def test_an_exception_of_a_probe_is_a_failure_of_its_ranks():
    full = {"error": "output_dir: /r has 0 MiB free; free some space"}
    gone = {"error": "MemoryError: gone"}
    result = report(
        [{"clock": 0.0, "disk": full, "drivers": CPU_RANK}, {"clock": gone}, {"clock": gone}]
    )
    assert result.level == "fail"
    assert result.failed() == ["clock", "disk"]
    (clock,), (disk,) = result.findings["clock"], result.findings["disk"]
    assert clock.text == "ranks 1-2 (node2, node3): MemoryError: gone"
    assert clock.remedy == CHECKS["clock"].remedy
    assert (disk.text, disk.remedy) == (
        "rank 0 (node1): output_dir: /r has 0 MiB free", "free some space",
    )  # fmt: skip
    assert list(result.skipped) == ["drivers"]
    assert "-> free some space" in result.text()
    assert_mentions(result.text().splitlines()[-1], "2 of 2", "clock, disk")


def test_a_value_after_the_semicolon_of_a_message_is_not_its_remedy():
    wrong = {"error": "RUN.yaml:3: lora_r: must be a whole number; found 'nine'"}
    result = Report()
    result.add([CHECKS["settings"]], [{"settings": wrong}], HOSTS[:1], None)
    (finding,) = result.findings["settings"]
    assert finding.text.endswith("found 'nine'")
    assert finding.remedy == CHECKS["settings"].remedy


def test_the_report_has_the_same_facts_as_text_and_as_json():
    tight = {"free": 1, "need": 0, "merged": 9}
    result = report([{"clock": 0.0, "disk": tight, "drivers": CPU_RANK}, {"clock": 0.1}])
    assert result.level == "warn"
    assert_mentions(result.text().splitlines()[-1], "2 checks passed", "1 with a warning: disk")
    data = json.loads(json.dumps(result.as_json(HOSTS[:2])))
    assert (data["level"], data["hosts"]) == ("warn", ["node1", "node2"])
    clock, disk = data["findings"]
    assert (clock["check"], clock["level"]) == ("clock", "ok")
    assert disk == {"check": "disk", **asdict(result.findings["disk"][0]), "ranks": []}
    assert list(data["not_checked"]) == ["drivers"]
