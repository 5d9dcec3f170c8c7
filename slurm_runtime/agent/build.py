"""Makes an agent tree as an ordinary user: a Python with its C library, the agent server, and their manifest.

The Python comes from Debian's packages, unpacked without root, or is a relocatable one (``uv python install``, or any
folder that the user names), to which this machine's C library is added. A tree is made under another name and renamed
when it is whole; one builder at a time works in a cache folder, and removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm_runtime.agent.tree import MANIFEST, MOUNT_POINT, QUIET_DEFAULTS, SHIM, AgentTree, load

DEFAULT_VERSION = "1.19.1"  # its file routes fit clients before and after 1.14
LEAST_PYTHON = (3, 12)
# What the releases pin in their lock file and not in their metadata: newer ones refuse to import together.
PINS: Mapping[str, Sequence[str]] = {
    "1.9.0": ("fastapi==0.128.0",),
    "1.19.1": ("lmnr==0.7.47", "fastapi==0.129.0", "starlette==0.52.1"),
}
DEBIAN_SUITE = "trixie"
DEBIAN_PYTHON = "python3.13"
DEBIAN_PACKAGES = (DEBIAN_PYTHON, f"{DEBIAN_PYTHON}-venv", "coreutils", "libseccomp2", "libstdc++6")
HOST_LIBRARIES = ("libseccomp.so.2", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0")
BUILDING = ".building-"
STEP_TIMEOUT_S = 1800.0
SITE = "site"
SITE_HOOK = """import os
import site

site.addsitedir(os.path.normpath(os.path.join(os.path.dirname(os.__file__), {steps!r}, {site!r})))
"""
USELESS = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/zoneinfo", "usr/share/python-wheels")

Say = Callable[[str], None]


class BuildProblem(Exception):
    """The tree cannot be made; ``str()`` says why and what to do."""


@dataclass(frozen=True)
class Base:
    """A Python below ``root``, found by paths relative to it."""

    root: Path
    python: str
    executable: str
    stdlib: str
    loader: str
    library_path: tuple[str, ...]
    holder: str


def run(argv: Sequence[str], say: Say, environment: Mapping[str, str] | None = None) -> str:
    """Run a step; its standard output. ``BuildProblem`` with its last lines if it fails."""
    say(f"  {Path(argv[0]).name} {' '.join(argv[1:4])} …")
    try:
        done = subprocess.run(
            argv,
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise BuildProblem(f"{argv[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise BuildProblem(f"{argv[0]} did not end within {STEP_TIMEOUT_S:g} s") from None
    if done.returncode:
        words = " | ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise BuildProblem(f"{' '.join(argv[:3])} … ended with {done.returncode}: {words}")
    return done.stdout


# --- Debian's packages, unpacked without root ------------------------------------------------------------------------


def debian_source() -> str:
    """This machine's own line for a Debian mirror, with the suite that has a Python new enough."""
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text(errors="replace")):
            kept = dict(re.findall(r"^(\S+?):[ \t]*(.+)$", stanza, re.MULTILINE))
            if re.search(r"debian/?\s*$", kept.get("URIs", "")) and "main" in kept.get("Components", ""):
                signed = f"[signed-by={kept['Signed-By']}] " if "Signed-By" in kept else ""
                return f"deb {signed}{kept['URIs'].split()[0]} {DEBIAN_SUITE} main\n"
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))):
        text = path.read_text(errors="replace") if path.is_file() else ""
        match = re.search(r"^deb\s+(\[[^\]]*\]\s+)?(\S+/debian/?)\s", text, re.MULTILINE)
        if match:
            return f"deb {match[1] or ''}{match[2]} {DEBIAN_SUITE} main\n"
    raise BuildProblem("no Debian mirror among this machine's apt sources")


def apt_options(folder: Path) -> list[str]:
    """apt with nothing of the machine's own state, so that it works without root."""
    pairs = {
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Log": folder / "log",
        "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false",
        "APT::Architecture": "amd64",
        "Debug::NoLocking": "true",
    }
    return [word for name, value in pairs.items() for word in ("-o", f"{name}={value}")]


def debian_base(folder: Path, work: Path, say: Say) -> Base:
    """Python and what it needs, from Debian packages, in ``folder``."""
    say(f"fetching {DEBIAN_PYTHON} from Debian {DEBIAN_SUITE}")
    for name in ("state/lists/partial", "cache/archives/partial", "log"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(debian_source())
    options = apt_options(work)
    run(["apt-get", *options, "-qq", "update"], say)
    run(["apt-get", *options, "-qq", "-y", "--download-only", "install", *DEBIAN_PACKAGES], say)
    for link, target in {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(target)
    for package in sorted((work / "cache" / "archives").glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
            tar = ["tar", "-x", "-C", str(folder), "--keep-directory-symlink", "--no-same-owner", "-f", "-"]
            done = subprocess.run(tar, stdin=unpacking.stdout, capture_output=True, text=True, check=False)
        if done.returncode or unpacking.returncode:
            raise BuildProblem(f"could not unpack {package.name}: {done.stderr.strip()[-300:]}")
    return Base(
        root=folder,
        python=f"usr/bin/{DEBIAN_PYTHON}",
        executable="usr/bin/python",
        stdlib=f"usr/lib/{DEBIAN_PYTHON}",
        loader=relative(folder, next((folder / "usr/lib64").glob("ld-linux*"))),
        library_path=("usr/lib/x86_64-linux-gnu",),
        holder="usr/bin/sleep",
    )


def relative(root: Path, path: Path) -> str:
    """``path`` below ``root``, symbolic links resolved where they stay inside."""
    resolved = path.resolve()
    inside = resolved if resolved.is_relative_to(root.resolve()) else path
    return str(inside.relative_to(root.resolve() if inside is resolved else root))


# --- A relocatable Python --------------------------------------------------------------------------------------------


def uv_python(work: Path, say: Say) -> Path:
    """A relocatable Python that uv downloads."""
    say("fetching a relocatable Python through uv")
    run(["uv", "python", "install", "--install-dir", str(work / "pythons"), "3.13"], say)
    found = sorted((work / "pythons").glob("cpython-3.13*/bin/python3.13"))
    if not found:
        raise BuildProblem("uv installed no Python 3.13")
    return found[-1]


def relocatable_base(folder: Path, python: Path, say: Say) -> Base:
    """A copy of the Python at ``python`` with this machine's C library beside it."""
    facts = json.loads(
        run(
            [
                str(python),
                "-I",
                "-c",
                "import json, os, platform, sys; print(json.dumps([sys.version_info[:2], sys.base_prefix, "
                "os.path.dirname(os.__file__), platform.libc_ver()]))",
            ],
            say,
        )
    )
    version, prefix, stdlib = tuple(facts[0]), Path(facts[1]), Path(facts[2])
    if version < LEAST_PYTHON:
        raise BuildProblem(f"{python} is Python {version[0]}.{version[1]}; the agent server needs 3.12 or newer")
    if prefix == Path("/usr"):
        raise BuildProblem(f"{python} belongs to the system and cannot be moved; name a relocatable Python")
    name = f"python{version[0]}.{version[1]}"
    say(f"copying {prefix}")
    shutil.copytree(prefix, folder / "usr", symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "test"))
    loader, sleep = add_host_libraries(folder, python, say)
    return Base(
        root=folder,
        python=f"usr/bin/{name}",
        executable="usr/bin/python",
        stdlib=f"usr/{stdlib.relative_to(prefix)}",
        loader=loader,
        library_path=("host-lib", "usr/lib"),
        holder=sleep,
    )


def add_host_libraries(folder: Path, python: Path, say: Say) -> tuple[str, str]:
    """Copy the loader, the C library and what extension modules need; the loader and an idle program."""
    target = folder / "host-lib"
    target.mkdir()
    sleep = Path(shutil.which("sleep") or "/bin/sleep").resolve()
    linked_text = run(["ldd", str(python)], say) + run(["ldd", str(sleep)], say)
    linked = {Path(match) for match in re.findall(r"(/\S+\.so[\d.]*)", linked_text)}
    listed = linked_text + "".join(line for line in run(["ldconfig", "-p"], say).splitlines(True) if "x86-64" in line)
    loader = ""
    for match in re.finditer(r"(/\S+/(\S+\.so[\d.]*))", listed):
        path, name = Path(match[1]), match[2]
        wanted = name.startswith("ld-linux") or name in HOST_LIBRARIES or path in linked
        if wanted and not (target / name).exists():
            shutil.copy2(path.resolve(), target / name)
            loader = f"host-lib/{name}" if name.startswith("ld-linux") else loader
    if not loader:
        raise BuildProblem(f"{python} is not linked to glibc; name another Python")
    shutil.copy2(sleep, target / "sleep")
    return loader, "host-lib/sleep"


# --- The agent server in it ------------------------------------------------------------------------------------------


def wrapper(base: Base) -> str:
    """A script that runs the tree's Python wherever the tree lies."""
    libraries = ":".join(f"$root/{folder}" for folder in base.library_path)
    steps = "/".join([".."] * base.executable.count("/"))
    return (
        "#!/bin/sh\n"
        f'root=$(cd "$(dirname "$0")/{steps}" && pwd)\n'
        f'exec "$root/{base.loader}" --library-path "{libraries}" --argv0 "$root/{base.executable}" \\\n'
        f'    "$root/{base.python}" "$@"\n'
    )


def shim(tree: AgentTree) -> str:
    """The agent server by the name that clients call it; it is mounted alone, so its paths are absolute."""
    words = " ".join(tree.exec_command(()))
    settings = " ".join(f'{name}="${{{name}-{value}}}"' for name, value in QUIET_DEFAULTS.items())
    return f'#!/bin/sh\nexport {settings}\nexec {words} "$@"\n'


def install(base: Base, version: str, work: Path, say: Say) -> None:
    """The agent server and its packages, by pip under the tree's own Python."""
    say(f"installing openhands-agent-server {version}")
    write_script(base.root / base.executable, wrapper(base))
    hook = SITE_HOOK.format(steps="/".join([".."] * (base.stdlib.count("/") + 1)), site=SITE)
    for leftover in (base.root / base.stdlib / "sitecustomize.py",):
        leftover.unlink(missing_ok=True)
        leftover.write_text(hook)
    (base.root / base.stdlib / "EXTERNALLY-MANAGED").unlink(missing_ok=True)
    pip = pip_command(base, work, say)
    target = ["install", "--quiet", "--target", str(base.root / SITE), "--no-compile"]
    packages = [f"openhands-{part}=={version}" for part in ("sdk", "tools", "agent-server")]
    environment = {**os.environ, "TMPDIR": str(work), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run([*pip, *target, *packages, *(pin for pin in PINS.get(version, ()) if version == "1.9.0")], say, environment)
    if version in PINS and version != "1.9.0":
        run([*pip, *target, "--upgrade", "--no-deps", *PINS[version]], say, environment)


def pip_command(base: Base, work: Path, say: Say) -> list[str]:
    """pip under the tree's Python: Debian's wheel of it, else the one that is built in."""
    wheels = sorted(base.root.glob("usr/share/python-wheels/pip-*.whl"))
    wheels += sorted(base.root.glob(f"{base.stdlib}/ensurepip/_bundled/pip-*.whl"))
    if not wheels:
        raise BuildProblem("the Python of the tree has no pip in it")
    shutil.unpack_archive(wheels[0], work / "pip", "zip")
    return [str(base.root / base.executable), str(work / "pip" / "pip")]


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def clean_environment(work: Path) -> dict[str, str]:
    """What the tree's Python gets while it is looked at: nothing of the user's."""
    (work / "home").mkdir(exist_ok=True)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": str(work / "home"), "TMPDIR": str(work), "LC_ALL": "C.UTF-8", **QUIET_DEFAULTS}


def compile_all(base: Base, say: Say) -> None:
    """Byte code that holds wherever the tree lies and whatever time its files carry: it halves the start."""
    say("compiling")
    folders = [str(base.root / base.stdlib), str(base.root / SITE)]
    command = [str(base.root / base.executable), "-I", "-m", "compileall", "-q", "-j", "0", "-f"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    flags = ["--invalidation-mode", "unchecked-hash", "-s", str(base.root), "-p", MOUNT_POINT]
    with contextlib.suppress(BuildProblem):  # packages ship files for other Pythons; those do not compile
        run([*command, *flags, *folders], say, environment)


def look(base: Base, work: Path, say: Say) -> tuple[tuple[str, ...], dict[str, str]]:
    """The modules that the server imports late, and the packages in the tree."""
    say("starting the agent server once")
    python, environment = str(base.root / base.executable), clean_environment(work)
    scout = Path(__file__).with_name("scout.py")
    (work / "scout").mkdir()
    modules = json.loads(run(["env", "-C", str(work / "scout"), python, "-I", str(scout)], say, environment))
    listing = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    packages = json.loads(run([python, "-I", "-c", listing], say, environment))
    return tuple(sorted(modules)), dict(sorted(packages.items()))


def prune(base: Base) -> None:
    """Remove what nobody runs, and make the rest readable for everybody."""
    for name in USELESS:
        shutil.rmtree(base.root / name, ignore_errors=True)
    for folder in [*base.root.glob(f"{SITE}/*/tests"), *base.root.glob(f"{base.stdlib}/test")]:
        shutil.rmtree(folder, ignore_errors=True)
    for path in base.root.rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode & 0o777
            path.chmod(mode | 0o444 | (0o111 if path.is_dir() or mode & 0o100 else 0) | (0o200 if path.is_dir() else 0))


def base_python(folder: Path, work: Path, python: str, say: Say) -> Base:
    """The Python to build on: the one that was named, Debian's, or uv's."""
    if python not in {"auto", "debian", "uv"}:
        return relocatable_base(folder, Path(python), say)
    if python == "debian" or (python == "auto" and shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return debian_base(folder, work, say)
    if python == "uv" or shutil.which("uv"):
        return relocatable_base(folder, uv_python(work, say), say)
    raise BuildProblem(
        "neither Debian's apt-get and dpkg-deb nor uv is here; install uv (it needs no root), or name a relocatable "
        "Python 3.12 or newer by --python"
    )


def build(cache: Path, version: str, python: str, say: Say) -> AgentTree:
    """The tree of ``version`` in ``cache``, made if it is not there."""
    target = cache / version
    with locked(cache, say):
        with contextlib.suppress(ValueError):
            tree = load(target)
            say(f"{target} is there already")
            return tree
        with unfinished(cache, version) as folder, tempfile.TemporaryDirectory(prefix="skyrl-agent-") as scratch:
            work = Path(scratch)
            tree = make(folder, work, version, python, say)
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
    return load(target)


def make(folder: Path, work: Path, version: str, python: str, say: Say) -> AgentTree:
    base = base_python(folder, work, python, say)
    install(base, version, work, say)
    compile_all(base, say)
    modules, packages = look(base, work, say)
    tree = AgentTree(
        root=folder,
        version=version,
        python=base.python,
        executable=base.executable,
        loader=base.loader,
        library_path=base.library_path,
        holder=base.holder,
        modules=modules,
        packages=packages,
    )
    write_script(folder / SHIM, shim(tree))
    prune(base)
    (folder / MANIFEST).write_text(tree.manifest(), encoding="utf-8")
    folder.chmod(0o755)
    return tree


@contextlib.contextmanager
def locked(cache: Path, say: Say) -> Iterator[None]:
    """One builder at a time in a cache folder; the lock goes with the process."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build in {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def unfinished(cache: Path, version: str) -> Iterator[Path]:
    """A folder to build in; what an earlier builder left is removed first, and it itself if it stays unfinished."""
    for leftover in cache.glob(f"{BUILDING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = cache / f"{BUILDING}{version}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
