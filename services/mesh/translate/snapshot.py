"""A translated configuration: resources, their files, and the order in which files may replace each other.

Envoy reads the files; who writes them (by rename) and starts Envoy is not known here. Equal input gives equal bytes.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from services.mesh.translate.names import Json, file_name

CDS_FILE = "cds/cds.json"
LDS_FILE = "lds/lds.json"
_CDS_VERSION = "cluster_manager.cds.version_text"
_LDS_VERSION = "listener_manager.lds.version_text"


@dataclass(frozen=True, slots=True)
class Step:
    """Files to put in place together (path relative to the run directory → bytes).

    After writing, wait until each text statistic in `expects` (`/stats?type=TextReadouts`) has the value given here;
    a configuration that Envoy refuses never gets there, and its `update_rejected` counter rises instead.
    """

    files: dict[str, bytes]
    expects: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """Everything one Envoy needs."""

    bootstrap: Json
    clusters: tuple[Json, ...]
    listeners: tuple[Json, ...]
    routes: tuple[Json, ...]
    endpoints: tuple[Json, ...]

    @cached_property
    def version(self) -> str:
        """Digest of the whole content."""
        return _digest([self.bootstrap, self.clusters, self.listeners, self.routes, self.endpoints])

    def files(self) -> dict[str, bytes]:
        """All files, `bootstrap.json` included, by path relative to the run directory."""
        return {
            "bootstrap.json": encode(self.bootstrap),
            **self._endpoint_files(),
            CDS_FILE: _response(self.clusters),
            **self._route_files(),
            LDS_FILE: _response(self.listeners),
        }

    def steps_from(self, old: "Snapshot | None") -> tuple[Step, ...]:
        """Make before break: clusters exist before routes name them, and go after the routes have let go.

        Each file is listed only where it changes; the bootstrap is not a step, as Envoy reads it at start only. From
        nothing, the steps may be written at once before Envoy starts.
        """
        both = self.clusters if old is None else _union(self.clusters, old.clusters)
        before = {} if old is None else old.files()
        wanted: tuple[tuple[dict[str, bytes], dict[str, str]], ...] = (
            (self._endpoint_files(), {}),
            ({CDS_FILE: _response(both)}, {_CDS_VERSION: _digest(both)}),
            (self._route_files(), {} if old is None else self._route_versions()),
            ({LDS_FILE: _response(self.listeners)}, {_LDS_VERSION: _digest(self.listeners)}),
        )
        steps = [Step(files, expects) for group, expects in wanted if (files := _changed(before, group))]
        if len(both) > len(self.clusters):
            steps.append(Step({CDS_FILE: _response(self.clusters)}, {_CDS_VERSION: _digest(self.clusters)}))
        return tuple(steps)

    def stale_files(self, old: "Snapshot") -> tuple[str, ...]:
        """Files of the old snapshot that nothing reads once all steps are taken."""
        return tuple(sorted(old.files().keys() - self.files().keys()))

    def _route_versions(self) -> dict[str, str]:
        return {f"http.{item['name']}.rds.{item['name']}.version_text": _digest([item]) for item in self.routes}

    def static(self) -> Json:
        """The same as one bootstrap without files, for `envoy --mode validate`."""
        # Validation does not read dynamic resources, so they are written into the bootstrap itself.
        config = copy.deepcopy(self.bootstrap)
        del config["dynamic_resources"]
        assignments = {item["cluster_name"]: _untyped(item) for item in self.endpoints}
        for cluster in self.clusters:
            plain = _untyped(cluster)
            if plain["type"] == "EDS":
                known_as = plain.pop("eds_cluster_config")["service_name"]
                plain |= {"type": "STATIC", "load_assignment": assignments[known_as]}
            config["static_resources"]["clusters"].append(plain)
        routes = {item["name"]: _untyped(item) for item in self.routes}
        config["static_resources"]["listeners"] = [_untyped(listener) for listener in self.listeners]
        for listener in config["static_resources"]["listeners"]:
            for chain in listener["filter_chains"]:
                manager = chain["filters"][-1]["typed_config"]
                if "rds" in manager:
                    manager["route_config"] = routes[manager.pop("rds")["route_config_name"]]
        return config

    def _endpoint_files(self) -> dict[str, bytes]:
        return {f"eds/{file_name(item['cluster_name'])}": _response([item]) for item in self.endpoints}

    def _route_files(self) -> dict[str, bytes]:
        return {f"rds/{file_name(item['name'])}": _response([item]) for item in self.routes}


def encode(value: object) -> bytes:
    """The one JSON form: sorted keys, so equal content is equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _digest(value: object) -> str:
    return hashlib.sha256(encode(value)).hexdigest()[:16]


def _response(resources: Iterable[Json]) -> bytes:
    kept = list(resources)
    return encode({"version_info": _digest(kept), "resources": kept})


def _untyped(resource: Json) -> Json:
    result = copy.deepcopy(resource)
    del result["@type"]
    return result


def _union(new: tuple[Json, ...], old: tuple[Json, ...]) -> tuple[Json, ...]:
    names = {cluster["name"] for cluster in new}
    return new + tuple(cluster for cluster in old if cluster["name"] not in names)


def _changed(old: dict[str, bytes], new: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in new.items() if old.get(path) != content}
