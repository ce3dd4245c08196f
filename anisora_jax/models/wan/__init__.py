"""The Wan family: video transformer, its published sizes, its placement on a mesh and its names elsewhere."""
