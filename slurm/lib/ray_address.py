"""Under which address do the run's other nodes reach this one? That of NETWORK_INTERFACE, else of the way to a peer."""

from __future__ import annotations

import fcntl
import socket
import struct

from slurm.lib.errors import EnvironmentProblem

SIOCGIFADDR = 0x8915  # netdevice(7)
INTERNET = "192.0.2.1"  # an address for documentation (RFC 5737), behind the default route
ANY_PORT = 9  # nothing is sent; a datagram socket needs some port to have a route


def own_address(interface: str, peer: str) -> str:
    """This node's IPv4 address: of ``interface``, else the one from which it would speak to the host ``peer``.

    Without a peer it is the way to the internet, which is Ray's own choice; on clusters that is often the slow network.
    A host without such a way has the address of its name. ``EnvironmentProblem`` says what cannot be found out.
    """
    if interface:
        return address_of(interface)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
            towards.connect((peer or INTERNET, ANY_PORT))
            return str(towards.getsockname()[0])
    except OSError as problem:
        if not peer:
            return _address_of_own_name()
        raise EnvironmentProblem(
            f"{socket.gethostname()} knows no way to {peer}: {problem.strerror}; set "
            "NETWORK_INTERFACE to the network interface that the nodes share (ip -brief address shows them)"
        ) from None


def _address_of_own_name() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this host; ``EnvironmentProblem`` if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as problem:
            names = ", ".join(name for _number, name in socket.if_nameindex())
            raise EnvironmentProblem(
                f"NETWORK_INTERFACE={interface}: {problem.strerror} on {socket.gethostname()}, which has {names}"
            ) from None
    return socket.inet_ntoa(answer[20:24])
