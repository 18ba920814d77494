"""What the CUDA kernels take of a multiprocessor on three generations of GPUs, and what they do on the emulator with one
safeguard taken out. Nothing is run on a GPU.

python benchmarks/cuda_build.py   # nvcc, a C++ compiler, one minute; writes results/bench/cuda-nvcc13.json
"""

from __future__ import annotations

from pathlib import Path

import torch

from sigma_lite.kernels.cuda.resources import compiled_resources
from sigma_lite.storage import write_json
from sigma_lite.teach import cuda_lab
from sigma_lite.train.provenance import device_name, git_commit

CAPABILITIES = ((8, 0), (9, 0), (10, 0))


def main() -> None:
    torch.set_num_threads(1)
    commit, resources = git_commit(), {}  # of the code as it was loaded
    for major, minor in CAPABILITIES:
        resources[f"{major}.{minor}"] = {name: list(used) for name, used in compiled_resources((major, minor)).items()}
    record = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        "command": "python benchmarks/cuda_build.py",
        "device": device_name(torch.device("cpu")),
        "commit": commit,
        "nvcc": cuda_lab.nvcc_release(),
        "registers and spilled bytes of a thread": resources,
        "safeguards": cuda_lab.trials(),
    }
    out = Path(__file__).parents[1] / "results" / cuda_lab.RECORD
    write_json(out, record)
    print(out)


if __name__ == "__main__":
    main()
