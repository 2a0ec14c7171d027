"""The mesh's own trace sink: OTLP in, one trace at a time out."""
