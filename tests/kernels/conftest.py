import pytest

from sigma_lite.kernels.cuda import build


@pytest.fixture
def without_nvcc(monkeypatch, tmp_path):
    """A machine on which no place that is looked at holds nvcc."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "DEFAULT_NVCC", tmp_path / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
