"""Generation from the weights that training updates: sampling, decoding, best-of-n curves."""
