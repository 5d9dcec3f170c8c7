"""The checks before a submission: what makes each of them fail, and what lets it pass."""
