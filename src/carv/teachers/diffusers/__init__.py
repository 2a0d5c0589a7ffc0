"""Teachers read from diffusers pipeline folders: Stable Diffusion 1, 2, XL and 3, DiT, Flux, Wan."""

from carv.teachers.diffusers.teacher import DiffusersTeacher

__all__ = ["DiffusersTeacher"]
