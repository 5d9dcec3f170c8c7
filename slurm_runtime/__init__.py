"""Serves Podman sandboxes over the OpenHands remote runtime API; never imports slurm."""

__version__ = "0.1.0"
