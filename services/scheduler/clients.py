"""Outgoing calls: none. Envoy asks the scheduler and workers report to it; it calls nobody.

The mesh's authorization policy is kept equal to the clients.py files, and this one grants nothing.
"""
