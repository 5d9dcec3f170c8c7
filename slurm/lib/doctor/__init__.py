"""The doctor: what a site has of what the suite needs, on the login node and on the nodes of both jobs."""
