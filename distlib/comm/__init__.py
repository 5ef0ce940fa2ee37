"""Communication: `Group` is the only place that starts a collective."""
