"""How far two arrays are apart, as the tests against other libraries say it."""

import numpy as np


def apart(ours, theirs) -> float:
  """The largest difference, relative to the largest number."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()
