"""What needs a GPU; skipped without one."""

from pathlib import Path

import pytest
import torch

from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("field", ["voxel", "hash"])
def test_a_text_to_3d_run_works_on_a_gpu_and_resumes_there(tmp_path: Path, field: str) -> None:
    config = SDSConfig(
        "a red chair",
        EstimatorConfig(renders=2, renoise=4, proposal="adaptive", coupling="nested"),
        steps=4, size=16, resolution=8, samples=6, field=field, teacher="world", device="cuda",
    )  # fmt: skip
    first = run(config, tmp_path, checkpoint_every=2, quiet=True)
    again = run(config, tmp_path, quiet=True)
    assert "cuda" in first["device"]
    assert first["agreement_with_true_object"] == again["agreement_with_true_object"]
