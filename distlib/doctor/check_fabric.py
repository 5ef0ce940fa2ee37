"""Facts in, problems out, for the network between hosts: what keeps NCCL from using EFA or InfiniBand well. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distlib.doctor.facts import Facts, Problem, warning
from distlib.doctor.variables import BETTER_LEFT_ALONE, LOADING, QUEUES, is_obsolete
from distlib.words import version_numbers

OLDEST_LIBFABRIC = (1, 18)
OLDEST_PLUGIN = (1, 7)
DEFAULT_QUEUES = 8
_SLOW = "NCCL uses TCP between hosts, at a fraction of the speed, without a message."
_DMABUF_KERNEL = (5, 12)  # with the open driver it needs no module for GPUDirect


def check_fabric(facts: Facts) -> Iterator[Problem]:
    """What keeps NCCL from using RDMA devices, and variables that old recipes for them set."""
    uses_nccl = facts.versions.nccl is not None
    yield from _devices(facts)
    if uses_nccl and "efa" in facts.fabric.devices.values():
        yield from _plugin(facts)
        yield from _libfabric(facts)
    if uses_nccl:
        yield from _choice(facts)
        yield from _taken(facts)
    if facts.gpus.devices:
        yield from _gpudirect(facts)
    yield from _variables(facts)


def _devices(facts: Facts) -> Iterator[Problem]:
    """Devices that are there and cannot be used."""
    fabric = facts.fabric
    if fabric.closed:
        is_efa = any(fabric.devices.get(name) == "efa" for name in fabric.closed)
        resource = "vpc.amazonaws.com/efa" if is_efa else "the RDMA device plugin's resource"
        yield warning(
            "fabric",
            what=f"this process may not use {', '.join(fabric.closed)}: its files in /dev/infiniband are not here",
            why=_SLOW,
            fix="Give the container the devices: docker --device /dev/infiniband; in Kubernetes "
            f"{resource} among the container's limits.",
        )
    ports = {name: state for name, state in fabric.ports.items() if fabric.devices.get(name) != "efa"}
    if ports and not any("ACTIVE" in state for state in ports.values()):
        states = "; ".join(f"{name}: {state}" for name, state in ports.items())
        yield warning(
            "fabric",
            what=f"no RDMA port is active: {states}",
            why=_SLOW,
            fix="See ibstat: a cable, the switch, or the subnet manager (InfiniBand); `ip link` (Ethernet).",
        )


def _plugin(facts: Facts) -> Iterator[Problem]:
    """aws-ofi-nccl, without which NCCL does not know EFA."""
    fabric = facts.fabric
    efa = [device for device, driver in fabric.devices.items() if driver == "efa"]
    if not fabric.plugins:
        yield warning(
            "fabric",
            what=f"EFA is here ({', '.join(efa)}), but no libnccl-net.so is on LD_LIBRARY_PATH",
            why=_SLOW,
            fix="Install aws-ofi-nccl 1.7 or later and add its lib folder to LD_LIBRARY_PATH. "
            "NCCL_DEBUG=INFO then shows NET/OFI.",
        )
        return
    wanted = fabric.variables.get("NCCL_NET_PLUGIN", "")
    names = {path.rsplit("/", 1)[-1] for path in fabric.plugins}
    if not wanted and "libnccl-net.so" not in names:
        name = sorted(names)[0].removeprefix("libnccl-net-").removesuffix(".so")
        yield warning(
            "fabric",
            what=f"NCCL looks for libnccl-net.so, but the plugin is called {', '.join(sorted(names))}",
            why=_SLOW,
            fix=f"export NCCL_NET_PLUGIN={name} on every host.",
        )
    yield from _faults(facts)
    for path, version in fabric.plugins.items():
        if version and version_numbers(version) < OLDEST_PLUGIN:
            yield warning(
                "fabric",
                what=f"aws-ofi-nccl {version} is older than 1.7 ({path})",
                why="It needs settings by hand to use RDMA, and does not know NCCL's newer interfaces.",
                fix="Install a current release of aws-ofi-nccl, and take the old one's folder from LD_LIBRARY_PATH.",
            )


def _faults(facts: Facts) -> Iterator[Problem]:
    """Plugins that cannot be loaded, once for each reason."""
    faults, cuda = facts.fabric.faults, (facts.versions.cuda or "").partition(".")[0]
    for reason in dict.fromkeys(faults.values()):
        fix = f"Install what it misses (ldd tells), or the plugin of an EFA installer made for CUDA {cuda}."
        if reason.startswith("libcudart.so:"):
            fix = (
                f"Give the CUDA runtime that name: ln -s libcudart.so.{cuda} /usr/local/cuda/lib64/libcudart.so && "
                "ldconfig, as Dockerfile.cuda does; base images and wheels have it with a number only."
            )
        yield warning(
            "fabric",
            what=f"NCCL cannot load {', '.join(path for path, why in faults.items() if why == reason)}: {reason}",
            why=_SLOW,
            fix=fix,
        )


def _libfabric(facts: Facts) -> Iterator[Problem]:
    """The library below the plugin."""
    libfabric = facts.fabric.libfabric
    if libfabric is None and facts.fabric.plugins:
        yield warning(
            "fabric",
            what="EFA is here, but no libfabric is found",
            why=f"The plugin cannot be loaded without it. {_SLOW}",
            fix="Install a current EFA installer (aws-efa-installer), or add libfabric's folder to LD_LIBRARY_PATH.",
        )
    if libfabric and version_numbers(libfabric) < OLDEST_LIBFABRIC:
        yield warning(
            "fabric",
            what=f"libfabric {libfabric} is older than 1.18",
            why="It needs settings by hand to use EFA well, and to be safe after fork().",
            fix="Install a current EFA installer (aws-efa-installer).",
        )


def _choice(facts: Facts) -> Iterator[Problem]:
    """Variables by which a network is forced."""
    fabric = facts.fabric
    network, plugin = (fabric.variables.get(name, "").strip() for name in ("NCCL_NET", "NCCL_NET_PLUGIN"))
    if fabric.devices and network.lower() == "socket":
        yield warning(
            "fabric",
            what=f"NCCL_NET={network} is set, and this host has RDMA devices",
            why="NCCL then uses TCP between hosts, at a fraction of the speed.",
            fix="Unset NCCL_NET.",
        )
    if "efa" in fabric.devices.values() and plugin.lower() == "none":
        yield warning(
            "fabric",
            what=f"NCCL_NET_PLUGIN={plugin} is set, and this host has EFA",
            why="NCCL then loads no plugin, and does not know EFA by itself.",
            fix="Unset NCCL_NET_PLUGIN.",
        )
    elif plugin and plugin.lower() != "none" and not _finds(plugin, fabric.plugins):
        yield warning(
            "fabric",
            what=f"NCCL_NET_PLUGIN={plugin} names a plugin that is not on the library path",
            why="NCCL goes on without it, by its own means.",
            fix="Add its folder to LD_LIBRARY_PATH, give its whole path, or unset NCCL_NET_PLUGIN.",
        )


def _finds(wanted: str, plugins: dict[str, str]) -> bool:
    """Whether each plugin that NCCL_NET_PLUGIN lists is there, by path, by file name, or by the end of its name."""
    names = {path.rsplit("/", 1)[-1] for path in plugins}
    return all(
        name.startswith("/") or name in names or f"libnccl-net-{name}.so" in names
        for name in map(str.strip, wanted.split(","))
    )


def _taken(facts: Facts) -> Iterator[Problem]:
    """What NCCL said during the self-test beside what is here."""
    fabric, said = facts.fabric, facts.fabric.said
    if said is None or fabric.closed or fabric.faults:
        return  # why is told already
    if "efa" in fabric.devices.values() and fabric.plugins and not said.has_ofi_line:
        yield warning(
            "fabric",
            what=f"NCCL's log has no NET/OFI line: it used {said.network or 'no network plugin'}",
            why=_SLOW,
            fix="Run again with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET: NCCL says why the plugin was not "
            "loaded, often a library that it misses (ldd on the plugin tells).",
        )
    elif fabric.devices and said.network == "Socket":
        yield warning(
            "fabric",
            what=f"NCCL used TCP sockets, though there is {', '.join(fabric.devices)}",
            why=_SLOW,
            fix="Run again with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET, and see why it passed by the devices.",
        )
    elif "efa" in fabric.devices.values() and said.provider and not said.provider.startswith("efa"):
        yield warning(
            "fabric",
            what=f"the plugin took libfabric's provider {said.provider}, not efa",
            why=_SLOW,
            fix="Unset FI_PROVIDER; fi_info -p efa says why EFA cannot be used.",
        )


def _gpudirect(facts: Facts) -> Iterator[Problem]:
    """Whether a network card reads a GPU's memory by itself: a kernel module, or dmabuf with the open driver."""
    fabric, gpus = facts.fabric, facts.gpus
    mellanox = [name for name, driver in fabric.devices.items() if driver.startswith("mlx5")]
    system = facts.versions.system.split()
    has_dmabuf = gpus.driver_is_open and len(system) > 1 and version_numbers(system[1]) >= _DMABUF_KERNEL
    if mellanox and gpus.driver and not has_dmabuf and "nvidia_peermem" not in fabric.gpudirect:
        yield warning(
            "fabric",
            what="network cards cannot read GPU memory: nvidia_peermem is not loaded, and this driver has no dmabuf",
            why="NCCL copies what it sends through host memory, at about half the speed.",
            fix="On the host: modprobe nvidia-peermem; or install NVIDIA's open kernel module on Linux 5.12 or later.",
        )


def _variables(facts: Facts) -> Iterator[Problem]:
    """What old recipes set."""
    variables = facts.fabric.variables
    obsolete = {name: value for name, value in variables.items() if is_obsolete(name, value)}
    if obsolete:
        yield warning(
            "fabric",
            what=f"obsolete: {', '.join(f'{name}={value}' for name, value in obsolete.items())}",
            why="Since libfabric 1.18 and aws-ofi-nccl 1.7 these only cost speed or choose a wrong provider.",
            fix=f"Unset {', '.join(obsolete)}.",
        )
    tuned = [name for name in BETTER_LEFT_ALONE if name in variables]
    if tuned:
        yield warning(
            "fabric",
            what=f"{' and '.join(tuned)} {'are' if len(tuned) > 1 else 'is'} set",
            why="NCCL and its plugin choose better for the hosts that they find.",
            fix=f"Unset {', '.join(tuned)}, or measure that it helps here: distlib bench collectives.",
        )
    queues = variables.get(QUEUES, "")
    if queues.isdigit() and int(queues) < DEFAULT_QUEUES:
        yield warning(
            "gpu",
            what=f"{QUEUES}={queues}",
            why="Streams that share a queue of a GPU run in turn: kernels that wait for other ranks hold up those that "
            "the other ranks wait for, and pipelines may stop.",
            fix=f"Unset {QUEUES}: distlib.init() then takes all 32.",
        )
    if variables.get(LOADING, "").upper() == "LAZY" and facts.build.cuda_built:
        yield warning(
            "gpu",
            what=f"{LOADING}={variables[LOADING]}",
            why="A kernel that is first used while one of distlib's waits for another rank may be loaded only when "
            "that one is over: ranks that call groups in different orders may then stop.",
            fix=f"Unset {LOADING}: distlib.init() then sets EAGER where distlib's kernels are used.",
        )
