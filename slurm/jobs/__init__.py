"""The sbatch bodies: each file here is what Slurm runs."""
