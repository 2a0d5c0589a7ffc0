"""carv's own small Wan: a video diffusion pipeline trained from scratch on moving digits; one file for each stage."""
