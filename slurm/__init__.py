"""Launches and joins the two jobs of a training run on Slurm, or on one machine."""
