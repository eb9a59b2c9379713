"""Hidden states of all layers on disk: shared, resumable, streamed."""
