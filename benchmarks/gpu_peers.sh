#!/usr/bin/env bash
# Fetch what benchmarks/gpu.py is measured against into DIR (default gpu-peers), on a machine with a network and pip.
# About 45 MB: carry the folder to the GPU and give it to `gpu.py --peers DIR`. Nothing of it belongs into the repository.
#   python/   flashinfer and what it needs        vllm/     vLLM's Triton kernels and its FlashAttention interface
#   sglang/   SGLang's Triton kernels             _vllm_fa3_C*.so   FlashAttention-3 as vLLM builds it for sm_90
set -euo pipefail
DIR=${1:-gpu-peers} PYTHON=${PYTHON:-python3} VLLM=${VLLM:-0.25.1} SGLANG=${SGLANG:-0.5.23}
mkdir -p "$DIR/python" "$DIR/vllm"
"$PYTHON" -m pip install --quiet --no-deps --target "$DIR/python" flashinfer-python==0.6.13 apache-tvm-ffi
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --platform manylinux_2_31_x86_64 \
  --platform manylinux_2_34_x86_64 --platform manylinux1_x86_64 --python-version 3.12 --dest "$wheels" \
  "vllm==$VLLM" "sglang==$SGLANG"
"$PYTHON" - "$wheels" "$DIR" <<'PYTHON'
import sys, zipfile
from pathlib import Path

wanted = ("vllm/v1/attention/ops/triton_unified_attention.py", "vllm/v1/attention/ops/triton_attention_helpers.py",
          "vllm/vllm_flash_attn/flash_attn_interface.py",
          *(f"sglang/kernels/ops/attention/{name}.py"
            for name in ("decode_attention", "extend_attention", "metadata", "score_mod")))
target = Path(sys.argv[2])
for archive in map(zipfile.ZipFile, Path(sys.argv[1]).glob("*.whl")):
    for name in archive.namelist():
        if name in wanted:
            archive.extract(name, target)
        elif "_vllm_fa3_C" in name:
            (target / Path(name).name).write_bytes(archive.read(name))
print("fetched:", *sorted(str(path.relative_to(target)) for path in target.glob("*")))
PYTHON
