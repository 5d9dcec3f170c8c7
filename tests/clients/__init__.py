"""The real OpenHands clients, in a Debian tree of their own, and what drives them against our server."""
