"""carv's own small DiT, trained from scratch on real handwritten digits, and its judge; one file for each stage."""
