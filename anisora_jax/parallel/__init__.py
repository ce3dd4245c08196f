"""The named device mesh, where arrays live on it, and attention that talks across it."""
