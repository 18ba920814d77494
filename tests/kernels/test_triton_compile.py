"""Every Triton kernel compiles, at the size of Sigma-MoE-Tiny, for GPUs that this machine need not have."""

import pytest

from sigma_lite.kernels.compile_offline import SHARED, Layer, compiled, kernel_names
from sigma_lite.kernels.triton_check import INSTALLED

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton is not installed: make test installs it where it exists")
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
MATMULS = ("swiglu_forward", "project", "swiglu_backward", "weight_gradient", "project_2", "weight_gradient_2")
OTHERS = ("count_block", "scan_blocks", "place", "cut_tiles", "sum_choices")


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORE)
@pytest.mark.parametrize("kernel", MATMULS)
def test_a_matmul_uses_the_tensor_cores_of_its_gpu_and_spills_nothing(kernel, arch):
    c = compiled(kernel, arch)
    assert c.spills == 0
    assert c.shared_bytes <= SHARED[arch]
    for name, number in c.instructions.items():
        if name in TENSOR_CORE.values():
            assert (number > 0) == (name == TENSOR_CORE[arch]), name
    assert c.instructions["cp.async"] > 0  # the next operands travel while these are multiplied


@pytest.mark.slow
@pytest.mark.parametrize("kernel", OTHERS)
def test_the_plan_and_the_sum_spill_nothing(kernel):
    assert compiled(kernel, "sm_90", layer=Layer(K=8)).spills == 0


@pytest.mark.slow
def test_fp32_is_not_rounded_to_tf32(monkeypatch):
    """And it compiles where the interpreter has taken over, in a process of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    c = compiled("project", "sm_90", "fp32", Layer(E=4, D=64, F=32, T=128))
    assert "tf32" not in c.ptx and c.instructions["fma.f32"] > 0 and c.spills == 0
    assert "FFMA" in c.sass


def test_launches_are_named_in_order():
    names = kernel_names(Layer(K=2))
    assert names[:7] == ["count_block", "scan_blocks", "place", "cut_tiles", "swiglu_forward", "project", "sum_choices"]
    assert set(MATMULS) | set(OTHERS) == set(names) - {"sum_choices_2"}
    assert "sum_choices" not in kernel_names(Layer(K=1))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (("down",), "kernel 'down' is not launched"),
        (("project", "sm_70"), "arch 'sm_70' is not known: choose sm_80"),
        (("project", "sm_90", "fp8"), "dtype 'fp8' is not known: choose bf16, fp16, fp32"),
    ],
)
def test_unknown_names(request_, message):
    with pytest.raises(ValueError, match=message):
        compiled(*request_)
