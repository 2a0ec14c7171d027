"""The mesh without Kubernetes: Istio YAML in, a real Envoy with the same behaviour out."""
