"""The topology file is read strictly, and becomes instances and a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.mesh import topology
from services.mesh.topology import TopologyError

GOOD = """
version: 1
services:
  cache:
    module: services.cache
    ports: [{name: grpc, number: 50051, protocol: grpc}]
  worker:
    module: services.worker
    after: [cache]
    ports: [{name: grpc, number: 50051, protocol: grpc}]
    replicas:
      - {name: v1, count: 2, labels: {version: v1}}
      - {name: canary, count: 0, labels: {version: canary}}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    return path


def test_instances_wait_for_every_replica_of_what_they_need(tmp_path: Path) -> None:
    """`after` names services; a process waits for all processes of those."""
    loaded = topology.load(write(tmp_path, GOOD))
    found = topology.instances(loaded, range(100, 200))
    assert [item.name for item in found] == ["cache", "worker-v1-0", "worker-v1-1"]
    assert found[1].after == ("cache",)
    assert found[2].labels == {"app": "worker", "version": "v1"}
    assert len({item.ports["grpc"] for item in found}) == 3


def test_only_ready_instances_are_endpoints(tmp_path: Path) -> None:
    """A service keeps its place in the registry without any endpoint."""
    loaded = topology.load(write(tmp_path, GOOD))
    instances = topology.instances(loaded, range(100, 200))
    services = {item.name: item for item in topology.registry(loaded, "autoglm", "127.0.0.1", instances[2:]).services}
    assert services["cache"].endpoints["grpc"] == ()
    assert [item.port for item in services["worker"].endpoints["grpc"]] == [instances[2].inbound["grpc"]]
    assert services["worker"].endpoints["grpc"][0].has_sidecar
    assert services["worker"].selector == {"app": "worker"}


def test_processes_have_sidecars_and_only_those_who_call_have_a_way_out(tmp_path: Path) -> None:
    """Every port twice: the sidecar's and the process's own. No way out where nobody runs or calls."""
    loaded = topology.load(write(tmp_path, GOOD.replace("after: [cache]", "after: [cache]\n    calls: [cache]")))
    supply = iter(range(100, 200))
    instances = topology.instances(loaded, supply)
    found = topology.sidecars(loaded, "autoglm", instances)
    assert [item.workload.name for item in found] == ["cache", "worker-v1-0", "worker-v1-1"]
    assert found[1].workload.identity == "spiffe://cluster.local/ns/autoglm/sa/worker"
    assert found[1].workload.labels == {"app": "worker", "version": "v1"}
    ports = [(port.listens, port.forwards_to) for item in found for port in item.ports]
    assert len({number for pair in ports for number in pair}) == 6
    (caller,) = topology.callers(loaded, supply)
    assert (caller.service_account, caller.calls) == ("worker", frozenset({"cache"}))
    nobody = topology.load(tmp_path / "mesh.yaml", "worker/v1=0")
    assert topology.callers(nobody, supply) == ()


def test_replica_counts_can_be_overridden(tmp_path: Path) -> None:
    """The canary is started by a setting, without editing the file."""
    loaded = topology.load(write(tmp_path, GOOD), "worker/canary=1, worker/v1=1")
    assert [item.name for item in topology.instances(loaded, range(9))] == ["cache", "worker-v1-0", "worker-canary-0"]


def test_a_model_of_ones_own_has_its_own_replica_count(tmp_path: Path) -> None:
    """`own_model_count` counts for such a model only, and an override by name still wins."""
    path = write(tmp_path, GOOD.replace("count: 2,", "count: 2, own_model_count: 1,"))

    def names(*arguments: object) -> list[str]:
        return [item.name for item in topology.instances(topology.load(path, *arguments), range(9))]  # type: ignore[arg-type]

    assert names() == ["cache", "worker-v1-0", "worker-v1-1"]
    assert names("", True) == ["cache", "worker-v1-0"]
    assert names("worker/v1=2", True) == ["cache", "worker-v1-0", "worker-v1-1"]


@pytest.mark.parametrize("overrides", ["worker=1", "nobody/v1=1", "worker/v9=1", "worker/v1=-1", "worker/v1=99"])
def test_wrong_overrides_are_named(tmp_path: Path, overrides: str) -> None:
    """A mistake in AUTOGLM_REPLICAS is quoted back."""
    with pytest.raises(TopologyError, match=overrides.partition("=")[0]):
        topology.load(write(tmp_path, GOOD), overrides)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("after: [cache]", "after: [nobody]"), "unknown service nobody"),
        (("after: [cache]", "after: [worker]"), "wait for each other: worker"),
        (("after: [cache]", "calls: [nobody]"), "calls: unknown service nobody"),
        (("count: 2", "count: 2, colour: red"), "colour"),
        (("count: 2", "count: many"), "count"),
        (("name: canary", "name: v1"), "a name is used twice"),
        (("version: 1\n", "version: 2\n"), "version"),
        (("services.cache", "services.cache; rm"), "module"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    """Nothing in the file is guessed."""
    with pytest.raises(TopologyError, match=words):
        topology.load(write(tmp_path, GOOD.replace(*change)))


def test_the_repositorys_own_topology_has_every_service_of_the_request_path() -> None:
    """The file that `make run` reads: two workers of v1, a canary that can be started."""
    loaded = topology.load(Path(__file__).parents[3] / "deploy/local/mesh.yaml", "sparse-inference/canary=1")
    names = [item.name for item in topology.instances(loaded, range(1000))]
    assert {"gateway", "tokenizer", "scheduler", "cache"} <= set(names)
    assert names.count("sparse-inference-canary-0") == 1 and "sparse-inference-v1-1" in names


def test_every_decision_of_the_local_mesh_is_kept() -> None:
    """The decision log is on, in the run directory of its mesh: what happened can be replayed without preparation."""
    loaded = topology.load(Path(__file__).resolve().parents[3] / "deploy" / "local" / "mesh.yaml")
    assert loaded.services["scheduler"].environment["AUTOGLM_DECISION_LOG"].startswith("{run_dir}/")
