"""Worker nodes without Podman, for benchmarks of the head."""
