"""A small, honest reinforcement-learning loop: does the whole system work here?

A tiny policy learns by policy gradient which shell commands solve a few tasks; every reward comes from running the
command in a real sandbox started through the API server. Start with ``python -m shell_rl.train --help``.
"""
