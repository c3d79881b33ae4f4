"""Other people's plugins doing their jobs on this runtime; each is skipped where it is not installed."""
