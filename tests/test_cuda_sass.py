"""The machine code of every CUDA kernel, read without a GPU: no spills, and the instructions each was written for."""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "hopper_model"))
import harness  # noqa: E402

SHARED_MEMORY = 232448  # bytes a CTA may have on sm_90
HOPPER_ONLY = sorted(p.parent.name for p in harness.ROOT.glob("csrc/*/kernel_sm90.cuh"))
PORTABLE = sorted(p.parent.name for p in harness.ROOT.glob("csrc/*/kernel.cuh"))
CASES = [(op, "90a") for op in HOPPER_ONLY] + [(op, arch) for op in PORTABLE for arch in ("80", "90", "100")]


@dataclass
class Kernel:
    registers: int
    stack: int
    spills: int
    shared: int
    sass: str


def cuobjdump() -> str | None:
    """From beside nvcc, from PATH, or from Triton's wheel."""
    folders = [Path(harness.nvcc()).resolve().parent] if harness.nvcc() else []
    spec = harness.importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends/nvidia/bin")
    found = (folder / "cuobjdump" for folder in folders)
    return next((str(p) for p in found if os.access(p, os.X_OK)), shutil.which("cuobjdump"))


@functools.cache
def compile_kernels(op: str, arch: str) -> tuple[dict[str, Kernel], str]:
    """(mangled name -> kernel, what the compiler said)."""
    nvcc, reader = harness.nvcc(), cuobjdump()
    if nvcc is None or reader is None:
        pytest.skip("needs nvcc" if nvcc is None else "needs cuobjdump: beside nvcc or in the triton wheel")
    harness.BUILD.mkdir(parents=True, exist_ok=True)
    said, dump = "", ""
    for source in sorted((harness.ROOT / "csrc" / op).glob("launch*.cu")):
        compiled = harness.BUILD / f"{op}.{source.stem}.sm_{arch}.{os.getpid()}.o"
        command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c"]
        command += ["--expt-relaxed-constexpr", "-I", harness.ROOT / "csrc", "-o", compiled, source]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        said += result.stderr
        try:
            dump += subprocess.run([reader, "-sass", compiled], capture_output=True, text=True, check=True).stdout
        finally:
            compiled.unlink()
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", dump, re.S))
    kernels = {}
    for part in said.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]

        def number(pattern, part=part):
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        kernels[name] = Kernel(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
            sass[name],
        )
    return kernels, said


@pytest.mark.parametrize("op, arch", CASES)
def test_nothing_spills(op, arch):
    kernels, said = compile_kernels(op, arch)
    assert kernels
    for name, kernel in kernels.items():
        assert (kernel.stack, kernel.spills) == (0, 0), name
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), name
        assert kernel.shared <= SHARED_MEMORY, name
    assert "warning" not in said.lower(), said  # serialised wgmma is one


@pytest.mark.parametrize("op, arch", [(op, arch) for op, arch in CASES if op in ("fp8_quantize", "moe_permute")])
def test_whole_rows_move_in_16_byte_words(op, arch):
    """The instances for aligned rows (kWhole true, or words of uint4) load and store 128 bits, and store nothing less
    but scales, which are 32 bits, and the last bytes of a row."""
    kernels, _ = compile_kernels(op, arch)
    whole = {name: kernel for name, kernel in kernels.items() if "Lb1EE" in name or "uint4" in name}
    assert len(whole) >= len(kernels) // 2
    for name, kernel in whole.items():
        assert re.search(r"\bLDG\.E\.128", kernel.sass), name
        assert re.search(r"\bSTG\.E\.128", kernel.sass), name
        if "Lb1EE" in name:
            assert not re.search(r"\bSTG\.E\.(U8|U16|64)", kernel.sass), name


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_moe_sort_overlaps_its_two_launches(arch):
    """From sm_90; atomics are in shared memory alone, on integers."""
    kernels, _ = compile_kernels("moe_sort", arch)
    waits = {name for name, kernel in kernels.items() if "ACQBULK" in kernel.sass}
    signals = {name for name, kernel in kernels.items() if "PREEXIT" in kernel.sass}
    assert waits == {name for name in kernels if "place" in name and arch != "80"}
    assert signals == {name for name in kernels if "4rank" in name and arch != "80"}
    for name, kernel in kernels.items():
        assert not re.search(r"(?<![.\w])(RED|ATOMG?)\.", kernel.sass), f"an atomic in {name}"


def test_moe_gate_asks_the_warp_for_its_largest_key():
    """Once for each choice of eight; DeepSeek-V3's logits in 16-byte words."""
    kernels, _ = compile_kernels("moe_gate", "90")
    for name, kernel in kernels.items():
        assert "REDUX" in kernel.sass and not re.search(r"\b(LDS|STS|RED|ATOM)\b", kernel.sass), name
        if "Li8ELi8E" in name:
            assert re.search(r"\bLDG\.E\.128", kernel.sass), name
            assert kernel.registers <= 64, name


@pytest.mark.parametrize("op", ["fp8_matmul", "fp8_grouped_matmul"])
def test_fp8_matmuls_use_the_hopper_units(op):
    kernels, _ = compile_kernels(op, "90a")
    kernels = {name: kernel for name, kernel in kernels.items() if "MatmulConfig" in name}
    assert kernels
    for name, kernel in kernels.items():
        out, cluster_m, cluster_n, swap, cluster_k = re.search(
            r"MatmulConfigI(f|13__nv_bfloat16)Li\d+ELi\d+ELi(\d)ELi(\d)ELb([01])ELi\d+ELi(\d)E", name
        ).groups()
        units = (
            "QGMMA",
            "UTMALDG.2D",
            "UTMALDG.3D",
            "UTMASTG.2D",
            "USETMAXREG",
            "LDGSTS",
            "ARRIVES.LDGSTSBAR",
            "ACQBULK",
        )
        for unit in units:
            assert unit in kernel.sass, f"{unit} in {name}"
        assert ("UTMALDG.2D.MULTICAST" in kernel.sass) == (cluster_m + cluster_n != "11"), name
        # fences of the whole GPU's memory only where a cluster begins and ends, and where it adds up shares of a tile
        fences = {"111": 0, "112": 3, "114": 3}.get(cluster_m + cluster_n + cluster_k, 2)
        assert kernel.sass.count("MEMBAR.ALL.GPU") == fences, name
        assert cluster_k != "1" or kernel.sass.count("CCTL.IVALL") == fences, name
        assert (("STSM.16.MT88" if swap == "1" else "STSM.16.M88") in kernel.sass) == (out != "f"), name


def test_the_weight_gradient_uses_the_hopper_units():
    kernels, _ = compile_kernels("fp8_grouped_matmul", "90a")
    kernels = {name: kernel for name, kernel in kernels.items() if "WgradConfig" in name}
    assert kernels
    for name, kernel in kernels.items():
        cluster_m, cluster_n, staged = re.search(r"WgradConfigILi\d+ELi\d+ELi(\d)ELi(\d)ELb([01])E", name).groups()
        stores = ("UTMASTG.3D", "UTMAREDG.3D.ADD") if staged == "1" else ("STG.E.64",)
        for unit in (
            "QGMMA",
            "UTMALDG.2D",
            "UTMALDG.3D",
            "USETMAXREG",
            "LDGSTS",
            "ARRIVES.LDGSTSBAR",
            "ACQBULK",
            *stores,
        ):
            assert unit in kernel.sass, f"{unit} in {name}"
        assert not re.search(r"(?<![.\w])(RED|ATOMG?)\.", kernel.sass), f"an atomic in {name}"
        assert ("UTMALDG.2D.MULTICAST" in kernel.sass) == (cluster_m + cluster_n != "11"), name


def test_grouped_matmul_uses_the_hopper_units():
    """Operands in the order they lie in, nothing but multiplications between two of a tile, the result by TMA."""
    kernels, _ = compile_kernels("grouped_matmul", "90a")
    assert len(kernels) == 12
    for name, kernel in kernels.items():
        kind, out, columns, cluster, transposed = re.search(
            r"(Forward|Wgrad)ConfigI(f|13__nv_bfloat16)?Li(\d+)ELi(\d)E(?:Lb([01])E)?", name
        ).groups()
        order = ".tnspA.tnspB" if kind == "Wgrad" else ".tnspA" if transposed == "1" else ""
        found = set(re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16 R\d+, gdesc\[UR\d+\](\S*),", kernel.sass))
        narrow = {("128", order)} if (kind, columns) == ("Forward", "256") else set()
        assert found == {(columns, order)} | narrow, name
        stores = ("UTMASTG.3D", "STSM.16.M88.4") if kind == "Wgrad" else ("UTMASTG.2D", "STSM.16.MT88.4")
        if out == "f":
            stores = ("STG.E.64",)
        for unit in ("UTMALDG.3D", "USETMAXREG", "ACQBULK", *stores):
            assert unit in kernel.sass, f"{unit} in {name}"
        assert ("UTMALDG.3D.MULTICAST" in kernel.sass) == (cluster != "1"), name
        assert kernel.sass.count("MEMBAR.ALL.GPU") == (0 if cluster == "1" else 2), name
        assert not re.search(r"(?<![.\w])(RED|ATOMG?)\.", kernel.sass), f"an atomic in {name}"


def test_mla_decode_uses_the_hopper_units():
    """Scores 64 x 64, sums 64 x 256 with weights from registers and from shared memory; a wait only where it is written
    (the compiler adds one to every product that it runs by itself)."""
    kernels, said = compile_kernels("mla_decode", "90a")
    assert "wait is injected" not in said and "serialized" not in said, said
    attends = {name: kernel for name, kernel in kernels.items() if "merge" not in name}
    assert len(attends) == 4 and len(kernels) == 6
    for name, kernel in attends.items():
        for unit in ("UTMALDG.3D", "USETMAXREG", "STSM.16.M88", "ACQBULK", "PREEXIT", "MUFU.EX2"):
            assert unit in kernel.sass, f"{unit} in {name}"
        assert ("UTMALDG.3D.MULTICAST" in kernel.sass) == ("Li2EEE" in name), name
        products = re.findall(r"\bHGMMA\.(\w+)", kernel.sass)
        assert (products.count("64x64x16"), products.count("64x256x16")) == (2 * 36, 2 * 8), name
        assert kernel.sass.count("WARPGROUP.DEPBAR") == 7, name
        # fences of the whole GPU's memory only where a cluster begins and ends
        assert kernel.sass.count("MEMBAR.ALL.GPU") == (2 if "Li2EEE" in name else 0), name
    for name, kernel in kernels.items():
        assert not re.search(r"(?<![.\w])(RED|ATOMG?)\.", kernel.sass), f"an atomic in {name}"
        assert name in attends or ("ACQBULK" in kernel.sass and re.search(r"\bLDG\.E\.128", kernel.sass)), name


def test_the_generated_wgmma_is_up_to_date():
    generator = harness.ROOT / "csrc/common/gen_wgmma.py"
    printed = subprocess.run([sys.executable, generator], capture_output=True, text=True, check=True).stdout
    assert printed == generator.with_name("sm90_wgmma.inc").read_text()


def test_nothing_of_the_planted_bugs_reaches_a_device():
    harness_only = re.compile(r"\bmodel::")
    for source in harness.ROOT.glob("csrc/*/*.cu*"):
        if source.parent.name != "common":
            assert not harness_only.search(source.read_text()), source
