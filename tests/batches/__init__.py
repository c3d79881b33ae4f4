"""Jobs that have their questions answered by a provider's batches, a fake one that keeps to the protocols."""
