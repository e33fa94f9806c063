"""Environments of the peers that benchmarks compare with, and of what makes their data: made once under `build/peers/`, by pip."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
PEERS = {
    "mlserver": ["mlserver==1.7.1", "onnxruntime==1.32.0", "numpy<3"],
    "kserve": ["kserve==0.21.0", "onnxruntime==1.32.0", "numpy<3"],
    "nncf": ["nncf==3.4.0", "onnx==1.22.0", "onnxruntime==1.32.0"],
    # torch named first and pinned: asked for by others it comes with accelerators, which makes 5.9 GB of 1.5
    "olive": ["torch==2.13.0", "olive-ai==0.13.0", "onnx==1.22.0", "onnxruntime==1.32.0", "requests"],
    "trainer": ["jax", "pillow"],
}
"""Peer → what is installed beside nothing of ours."""


def python_of(peer: str) -> Path:
    """Return the interpreter of a peer's environment, making the environment first if there is none.

    Raises:
        subprocess.CalledProcessError: pip could not install it; the environment is removed by the next `make clean`.
    """
    home = FOLDER / peer
    python = home / "bin" / "python"
    done = home / ".complete"
    if not done.exists():
        print(f"installing {', '.join(PEERS[peer])} into {home.relative_to(ROOT)}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS[peer]], check=True
        )
        done.touch()
    return python
