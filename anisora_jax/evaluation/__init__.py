"""How good a clip is: numbers per clip, their baselines and the page that shows them."""
