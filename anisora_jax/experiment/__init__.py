"""The assembly: a config becomes parts, parts become runs and films. The only reader of ConfigDict."""
