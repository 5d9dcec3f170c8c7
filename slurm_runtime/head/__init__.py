"""The head of a runtime on several nodes: one address for clients, in front of the API server of each node."""
