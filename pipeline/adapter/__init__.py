"""What comes out of a run: gathered, verified, published and merged."""
