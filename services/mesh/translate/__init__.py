"""Istio policy → Envoy configuration with Istio's own defaults."""

from services.mesh.translate.build import translate
from services.mesh.translate.node import Caller, InboundPort, NodeSettings, Sidecar
from services.mesh.translate.snapshot import Snapshot, Step

__all__ = ["Caller", "InboundPort", "NodeSettings", "Sidecar", "Snapshot", "Step", "translate"]
