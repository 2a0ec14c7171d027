"""Several meshes on one machine, each a cloud of its own: networks between them, and what each knows of the others."""
