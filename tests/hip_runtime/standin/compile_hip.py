"""The compiler behind the stand-in for hiprtc: `compile_hip.py SOURCE OUTPUT OPTION...` with ziglang's clang and lld."""

import os
import subprocess
import sys


def main(source, output, *options):
    zig = [sys.executable, "-m", "ziglang"]
    (arch,) = (option.partition("=")[2] for option in options if option.startswith("--offload-arch="))
    target = ["-nogpulib", "-nostdinc", "--target=x86_64-unknown-linux-gnu"]
    asm, obj = f"{output}.s", f"{output}.o"
    steps = [
        ["clang", "-x", "hip", "--cuda-device-only", *target, *options, "-S", source, "-o", asm],
        ["clang", "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", asm, "-o", obj],
        ["ld.lld", "-m", "elf64_amdgpu", "--no-undefined", "-shared", obj, "-o", output],
    ]
    try:
        for step in steps:
            done = subprocess.run([*zig, *step], check=False)
            if done.returncode:
                return done.returncode
    finally:
        for path in (asm, obj):
            if os.path.exists(path):
                os.unlink(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
