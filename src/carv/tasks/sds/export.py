"""What a run leaves for people and other programs: a turntable, a contact sheet and a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from carv.extras import require
from carv.tasks.sds.field import Field
from carv.world.cameras import WORLD_RANGE, Cameras

_MESH_LEVEL = 10.0
"""Density at the surface, per unit of length: half the light is lost over 0.07 units there."""


def turntable_cameras(frames: int, elevation: float = 15.0) -> Cameras:
    """Cameras once around the object, all at one elevation in degrees."""
    same = torch.ones(frames)
    fov = sum(WORLD_RANGE.fov) / 2
    return Cameras(torch.arange(frames) * (360 / frames), elevation * same, WORLD_RANGE.distance * same, fov * same)


def render_all(field: Field, cameras: Cameras, size: int) -> Tensor:
    """Pictures `[R, 3, size, size]` on the CPU, one view at a time to bound memory."""
    with torch.no_grad():
        return torch.cat([field(cameras[i : i + 1], size)[0].cpu() for i in range(len(cameras))])


def write_turntable(path: Path, field: Field, frames: int = 36, size: int = 128) -> None:
    """An animated GIF of the object turning."""
    pictures = _bytes(render_all(field, turntable_cameras(frames), size))
    require("imageio.v3", "sds").imwrite(path, list(pictures), duration=3000 // frames, loop=0)


def write_contact_sheet(path: Path, rows: Sequence[Tensor], gap: int = 2) -> None:
    """A PNG grid of pictures.

    Args:
        path: of the PNG.
        rows: each `[columns, 3, H, W]` in [0, 1].
        gap: white pixels between pictures.
    """
    padded = [torch.nn.functional.pad(row, (0, gap, 0, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), 2) for row in padded], 1)
    require("imageio.v3", "sds").imwrite(path, _bytes(sheet[None])[0])


def write_mesh(path: Path, field: Field, resolution: int = 96) -> int:
    """The surface at a fixed density as a mesh with vertex colours (.glb or .ply), by marching cubes.

    Returns:
        The number of faces; 0, with an empty scene not written, if the density is nowhere that high.
    """
    measure, trimesh = require("skimage.measure", "sds"), require("trimesh", "sds")
    with torch.no_grad():
        # A border of empty space closes surfaces that reach the cube's sides.
        density = torch.nn.functional.pad(field.density_grid(resolution).cpu(), [1] * 6).numpy()
    if density.max() <= _MESH_LEVEL:
        return 0
    vertices, faces, _, _ = measure.marching_cubes(density, _MESH_LEVEL)
    points = (2 * (vertices - 1) / (resolution - 1) - 1) * field.radius
    with torch.no_grad():
        colours = field.colour_at(torch.from_numpy(points.astype(np.float32))).cpu().numpy()
    # glTF's y is up, the world's z is: (x, y, z) -> (y, z, x) keeps the front facing the viewer.
    mesh = trimesh.Trimesh(points[:, [1, 2, 0]], faces, vertex_colors=(255 * colours).astype(np.uint8), process=False)
    mesh.export(path)
    return len(faces)


def _bytes(pictures: Tensor) -> np.ndarray:
    """`[N, 3, H, W]` in [0, 1] -> uint8 `[N, H, W, 3]`."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
