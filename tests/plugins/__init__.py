"""Other people's plugins doing their jobs on this package; each is skipped where it is not installed."""
