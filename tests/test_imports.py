"""What a user gets by importing carv, and at what price."""

import subprocess
import sys

import carv


def test_the_public_names_are_there():
    for name in carv.__all__:
        assert hasattr(carv, name), name


def test_importing_carv_imports_nothing_heavy():
    code = (
        "import carv, sys; print([m for m in ('diffusers', 'scipy', 'matplotlib', 'tyro', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
