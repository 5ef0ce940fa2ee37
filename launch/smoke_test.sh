#!/usr/bin/env bash
# A minute's test of an installation, on any machine: GPUs are not needed, and are used if they are there.
#
#   launch/smoke_test.sh                    two ranks train and agree
#   launch/smoke_test.sh cuda efa mpi       also: these parts must be there (what Dockerfile.cuda promises)
set -euo pipefail

cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

fail() {
    echo "smoke_test.sh: $1" >&2
    exit 1
}

for part in "$@"; do
    case $part in
        cuda)
            python - <<'PYTHON' || fail "torch or distlib is without CUDA, see above"
import ctypes, pathlib
import torch
import distlib
import distlib._build_info as info

assert torch.version.cuda, f"torch {torch.__version__} is built for the CPU only"
assert torch.distributed.is_nccl_available(), f"torch {torch.__version__} is built without NCCL"
assert info.CUDA["built"], info.CUDA["why_not"]
ctypes.CDLL(str(pathlib.Path(distlib.__file__).with_name("_cuda.so")))
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}, _cuda.so loads")
PYTHON
            ;;
        efa)
            fi_info --version || fail "libfabric's fi_info is not on PATH"
            IFS=: read -ra folders <<<"${LD_LIBRARY_PATH:-}"
            plugin=$(find "${folders[@]}" -name 'libnccl-net*.so' -print -quit 2>/dev/null || true)
            [[ -n $plugin ]] || fail "no libnccl-net.so in LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
            # The driver's library comes with the host: an image does not have it while it is built.
            ! ldd "$plugin" | grep 'not found' | grep -v 'libcuda\.so' || fail "$plugin misses libraries, see above"
            # It opens CUDA's runtime by this name. Base images have only libcudart.so.13; NCCL then uses TCP, and says nothing.
            if grep -q -a 'libcudart\.so' "$plugin"; then
                python -c 'import ctypes; ctypes.CDLL("libcudart.so")' ||
                    fail "$plugin opens libcudart.so, which is not there: link it to libcudart.so.13"
            fi
            echo "$plugin"
            ;;
        mpi)
            mpirun --version || fail "mpirun is not on PATH"
            options=(-np 2 --bind-to none --oversubscribe)
            if [[ $(id -u) == 0 ]]; then options+=(--allow-run-as-root); fi
            mpirun "${options[@]}" python -m distlib doctor || fail "distlib doctor found errors under mpirun"
            ;;
        *) fail "unknown part $part: there are cuda, efa and mpi" ;;
    esac
done

torchrun --standalone --nproc-per-node 2 --no-python distlib doctor || fail "distlib doctor found errors under torchrun"
torchrun --standalone --nproc-per-node 2 examples/train_lm.py \
    --steps 3 --width 32 --layers 2 --heads 2 --context 32 --batch 4 --sample 0 || fail "train_lm.py failed"
echo "smoke test passed"
