"""The warden: one process that is root over all sandboxes of a rootless Podman, and nothing else.

``process`` is that process, ``client`` the API server's side of it. ``fork_server`` forks agent servers into
containers and runs under the agent tree's Python; ``confinement`` gives them what a process of the container has.
"""
