"""Environment variables: those that distlib reads, and those that NCCL and libfabric no longer want."""

from __future__ import annotations

# Read while distlib runs. tests/test_doctor.py compares this table with the sources.
SETTINGS = {
    "DISTLIB_NODES": "pretends that one host is this many nodes",
    "DISTLIB_CORE": "0 does without the C++ core: all goes over gloo",
    "DISTLIB_SIMD": "forces an instruction set",
    "DISTLIB_INTERFACE": "the network interface between hosts",
    "DISTLIB_ARENA_MB": "address space of each rank's shared memory, in MiB",
    "DISTLIB_STAGING_KB": "shared memory through which ordinary tensors pass, in KiB",
    "DISTLIB_ROOMS_KB": "smallest message between stages that is made where it is sent from, in KiB",
    "DISTLIB_CHUNK_KB": "piece in which a tensor travels between hosts, in KiB",
    "DISTLIB_FINGERPRINT": "0: between hosts, ranks do not compare what they are about to do",
    "DISTLIB_DEVICE_STAGING_KB": "GPU memory of each rank through which tensors pass, in KiB a block of threads",
    "DISTLIB_DEVICE_BLOCKS": "blocks of threads of a collective's kernel",
    "DISTLIB_DEVICE_THREADS": "threads in such a block",
    "DISTLIB_DEVICE_DESCRIPTORS": "1: GPU memory is shared by file descriptors",
    "DISTLIB_DEVICE_CHUNK_KB": "piece in which tensors of GPUs travel in levels between hosts, in KiB",
    "DISTLIB_MASTER_ADDR": "rank 0's address, under MPI, Slurm and SageMaker",
}

# Read only when distlib is installed.
INSTALL_SETTINGS = {
    "DISTLIB_NATIVE": "0 or 1: leave the C++ core out, or fail without it",
    "DISTLIB_CUDA": "0 or 1: leave the CUDA part out, or fail without it",
    "DISTLIB_CUDA_ARCH": "the GPUs to compile for, in nvcc's words",
}

# Name (a trailing * is any ending) -> the value that is meant; "": any. aws-ofi-nccl >= 1.7 with
# libfabric >= 1.18 needs none of them.
OBSOLETE = {
    "FI_EFA_USE_DEVICE_RDMA": "",
    "FI_PROVIDER": "efa",
    "NCCL_PROTO": "simple",
    "FI_EFA_FORK_SAFE": "",
    "FI_EFA_ENABLE_SHM_TRANSFER": "",
    "RDMAV_*": "",
}

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"  # hardware queues that a process' streams share; distlib.init() takes all 32
LOADING = "CUDA_MODULE_LOADING"  # whether kernels are loaded at the start, or as they are first used; init(): EAGER

# NCCL and its plugin choose these better than old recipes do. NCCL does not read the last: so recipes call the second.
BETTER_LEFT_ALONE = ("NCCL_BUFFSIZE", "NCCL_MIN_NCHANNELS", "NCCL_MIN_CTAS", "NCCL_MIN_CHANNELS")


def is_obsolete(name: str, value: str) -> bool:
    """Whether a variable, with this value, is one that EFA recipes of old set."""
    for pattern, meant in OBSOLETE.items():
        named = name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        if named and (not meant or value.strip().lower() == meant):
            return True
    return False
