"""What a kernel plan needs to know about a device. Standard library only: plans run for devices that are not here."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceSpec:
    """One device.

    `arch` is the compute capability as an integer (90 for Hopper), 0 for a CPU. `bandwidth` is bytes per second,
    `peak_flops` operations per second by operand dtype ("bf16", "fp8", "fp32"), dense.
    """

    name: str
    kind: str  # "cuda" or "cpu"
    arch: int
    num_sms: int
    shared_memory: int  # bytes one block may ask for
    l2: int
    bandwidth: float
    peak_flops: dict[str, float] = field(hash=False, compare=False)

    def rate(self, dtype: str) -> float:
        """Operations per second for operands of `dtype`; devices without an FP8 unit run FP8 at their bf16 rate."""
        return self.peak_flops.get(dtype) or self.peak_flops["bf16"]


def _gpu(name: str, arch: int, sms: int, shared: int, l2_mb: int, tb_s: float, bf16: float, fp8: float, fp32: float):
    peaks = {"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12}
    if fp8:
        peaks["fp8"] = fp8 * 1e12
    return DeviceSpec(name, "cuda", arch, sms, shared, l2_mb * 2**20, tb_s * 1e12, peaks)


# Data-sheet rates, dense.
A100 = _gpu("A100-SXM4-80GB", 80, 108, 166_912, 40, 2.0, 312, 0, 19.5)
L40S = _gpu("L40S", 89, 142, 101_376, 96, 0.86, 362, 733, 91)
H100 = _gpu("H100-SXM5", 90, 132, 232_448, 50, 3.35, 989, 1979, 67)
H200 = _gpu("H200-SXM", 90, 132, 232_448, 60, 4.8, 989, 1979, 67)
B200 = _gpu("B200", 100, 148, 232_448, 126, 8.0, 2250, 4500, 80)
GPUS = {"a100": A100, "l40s": L40S, "h100": H100, "h200": H200, "b200": B200}

CPU = DeviceSpec("cpu", "cpu", 0, 1, 0, 32 * 2**20, 2e10, {"bf16": 2e11, "fp32": 2e11})


def gpu_spec(name: str, arch: int, num_sms: int, shared_memory: int, l2: int) -> DeviceSpec:
    """The spec of a GPU found at run time: its own counts, the rates of the nearest preset scaled by SM count."""
    by_arch = [g for g in GPUS.values() if g.arch == arch] or [
        max((g for g in GPUS.values() if g.arch <= arch), key=lambda g: g.arch, default=A100)
    ]
    near = next((g for g in by_arch if g.name.split("-")[0] in name), by_arch[0])
    scale = num_sms / near.num_sms
    peaks = {dtype: rate * scale for dtype, rate in near.peak_flops.items()}
    return DeviceSpec(name, "cuda", arch, num_sms, shared_memory, l2, near.bandwidth, peaks)
