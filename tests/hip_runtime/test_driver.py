"""The HIP driver: hip-python's own calls, into a stand-in for the HIP runtime that runs each kernel's host build."""

import pytest

pytestmark = [pytest.mark.compiler, pytest.mark.host]


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def verified(request, standin):
    return request.param, standin.run("verify", devices=request.param)


def test_a_kernel_is_loaded_and_right(verified, standin):
    arch, result = verified
    assert result["arch"] == arch
    assert result["driver"] == "HipModule"
    assert result["list"] == "ListOfPointer"  # made once, not in every launch
    assert result["launches"] == 3
    assert result["runtimes"] == [str(standin.rocm / "lib/libamdhip64.so.7")]


def test_attributes_are_those_of_the_code_object(verified):
    _, result = verified
    wanted, allowed = result["threads"]
    assert wanted == allowed
    assert 16 <= result["registers"] <= 512
    assert result["scratch"] == 0


def test_hip_python_is_imported_for_the_first_kernel_only(verified):
    _, result = verified
    assert not result["hip-python imported early"]


def test_launches_arrive_on_the_callers_stream_and_the_kernels_device(standin):
    result = standin.run("two_devices", devices="gfx942,gfx950")
    assert result["archs"] == ["gfx942", "gfx950"]
    assert result["seen"] == result["expected"]


def test_threads_do_not_disturb_each_other(standin):
    assert standin.run("threads") == {"failures": [], "launches": 24}


@pytest.fixture(scope="module")
def refusals(standin):
    return standin.run("refusals", devices="gfx942")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other arch", ["hipModuleLoadData: hipErrorNoBinaryForGpu (no kernel image", "_gfx950 on device 0, a gfx942"]),
        ("no code object", ["hipModuleLoadData: hipErrorInvalidImage (", "on device 0"]),
        ("missing function", ["hipModuleGetFunction: hipErrorNotFound (", "elsewhere on device 0"]),
        ("empty grid", ["hipModuleLaunchKernel: hipErrorInvalidValue (", "grid 0"]),
        ("large block", ["hipModuleLaunchKernel: hipErrorLaunchFailure (", "grid 1, block "]),
        ("dead stream", ["hipModuleLaunchKernel: hipErrorContextIsDestroyed ("]),
        ("no arguments", ["hipModuleLaunchKernel: hipErrorInvalidValue ("]),
        ("unknown attribute", ["hipFuncGetAttribute: hipErrorInvalidValue ("]),
        ("unknown code", ["hipModuleLaunchKernel: 123456 is not a valid hipError_t"]),
    ],
)
def test_what_the_runtime_refuses_is_named(refusals, what, words):
    for word in words:
        assert word in refusals[what]


def test_nothing_refused_was_launched(refusals):
    assert refusals["launches"] == 0


def test_hip_python_opens_the_runtime_that_torch_uses(standin):
    """Although its own search leads elsewhere."""
    result = standin.run("verify", standin.torch_library, ROCM_PATH=str(standin.rocm))
    assert result["runtimes"] == [standin.torch_library]
    assert result["launches"] == 3
    assert not result["hip-python changed"]


def test_two_runtimes_are_refused(standin):
    result = standin.run("hip_python_first", standin.torch_library)
    both = [str(standin.rocm / "lib/libamdhip64.so.7"), standin.torch_library]
    assert result["runtimes"] == both
    for error in result["errors"]:
        assert f"2 HIP runtimes are loaded in this process, {both[0]} and {both[1]}, and torch and" in error
        assert "LD_LIBRARY_PATH=DIR/lib and ROCM_PATH=DIR" in error


def test_the_remedy_for_two_runtimes_works(standin):
    result = standin.run("hip_python_first", standin.torch_library, rocm=standin.torch, ROCM_PATH=str(standin.torch))
    assert result == {"errors": ["no error"] * 2, "runtimes": [standin.torch_library]}


def test_a_missing_runtime_is_named_with_the_remedy(standin):
    error = standin.run("no_runtime", rocm=standin.folder / "nothing")
    if error is None:
        pytest.skip("rocm")  # of the system, which is always found
    assert "failed to dlopen" in error
    assert "install ROCm" in error
    assert "LD_LIBRARY_PATH" in error


def test_a_missing_package_is_named_with_the_remedy(standin):
    assert "pip install 'mlagen[rocm]'" in standin.run("no_package")
