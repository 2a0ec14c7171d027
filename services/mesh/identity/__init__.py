"""Certificates of the local mesh: a small authority of our own, and the files Envoy reads them from."""

from services.mesh.identity.authority import Authority, Certificate, Unusable
from services.mesh.identity.keeper import Identities, Issued, Terms, write_trial

__all__ = ["Authority", "Certificate", "Identities", "Issued", "Terms", "Unusable", "write_trial"]
