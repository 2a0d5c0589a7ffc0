"""carv's own small Stable Diffusion, trained from scratch on the captioned 3D world; one file for each stage."""
