"""Small trained additions to a large frozen network."""
