"""The real VERL as the trainer of a run on this machine, without a GPU: ``launch.py --config local-verl``.

VERL 0.5.0 trains a tiny model with PPO; every reward comes from running the model's answer in a sandbox of the run's
API server. ``train`` is the entrance. ``adaptation``, ``weights`` and ``reward`` run inside of VERL's processes, under
the Python of VERL's own environment, beside its unchanged files.
"""
