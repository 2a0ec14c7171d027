"""Istio policy → Envoy configuration with Istio's own defaults."""

from services.mesh.translate.build import translate
from services.mesh.translate.node import NodeSettings
from services.mesh.translate.snapshot import Snapshot, Step

__all__ = ["NodeSettings", "Snapshot", "Step", "translate"]
