"""Curation: from a heap of films to clips worth learning from. One stage a file, each a function of one item."""
