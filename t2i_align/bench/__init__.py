"""Benches: resumable cells, each one small `result.json`, and the pages made of them."""
