"""States on disk: saved asynchronously, sharded, verified, restored onto any mesh."""
