"""Search texts by their embeddings, and measure how well that works."""
