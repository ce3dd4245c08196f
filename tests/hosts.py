"""The share of one of several hosts, as loaders take it."""


def host_of(host: int, hosts: int):
  """Of every batch the part of that number."""
  return lambda bucket: ([host], hosts)
