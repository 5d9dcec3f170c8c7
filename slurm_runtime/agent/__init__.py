"""The agent server that is mounted into sandboxes: a folder that runs on any Linux userland."""
