"""`parity score`: perplexity, and the distance of two sides' predictions over a text."""
