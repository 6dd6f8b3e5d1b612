#!/usr/bin/env bash
# The quick tests, the attention processors of diffusers that are gone, changed or new, and the Triton kernels
# compiled for sm_90, on the lowest and on the highest versions that pyproject.toml admits, each in an environment of
# its own. Some GB each, for a torch with CUDA.
#
#     tests/versions.sh [FOLDER]       where the environments lie; they are made once
#
# LOW and HIGH name the Pythons, "lowest" or "highest" in ONLY runs one of the two.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.versions}
failed=0
for which in lowest highest; do
    [ "${ONLY:-$which}" = "$which" ] || continue
    python=${HIGH:-python3}
    resolution=highest
    if [ "$which" = lowest ]; then
        python=${LOW:-python3.10}
        resolution=lowest-direct
    fi
    here=$folder/$which
    if [ ! -e "$here/.ready" ]; then
        "$python" -m venv "$here" &&
            "$here/bin/python" -m pip install --quiet uv &&
            "$here/bin/uv" pip install --quiet --python "$here/bin/python" \
                --resolution "$resolution" --editable ".[all,dev]" &&
            touch "$here/.ready" || { failed=1; echo "$which: cannot be installed"; continue; }
    fi
    echo "== $which: $("$here/bin/python" -c 'import sys, torch, diffusers, transformers
print("Python %d.%d" % sys.version_info[:2], "torch", torch.__version__,
      "diffusers", diffusers.__version__, "transformers", transformers.__version__)' 2>/dev/null)"
    "$here/bin/python" tools/processors.py
    OMP_NUM_THREADS=1 "$here/bin/python" -m pytest -q -n 2 --dist loadfile \
        --no-loadscope-reorder -p no:cacheprovider -m "not slow" || failed=1
    echo "== $which: the kernels by $("$here/bin/python" -c 'import triton
print("Triton", triton.__version__)')"
    "$here/bin/python" tools/compile_matrix.py --arch sm_90 || failed=1
done
exit $failed
