"""Networks and codecs. They know tokens and shapes, never noise or training."""
