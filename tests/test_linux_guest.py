"""`pagegate guest`: the commands, and initrds with a busybox that is made up."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pagegate import linux
from pagegate.errors import NotSupported
from pagegate.linux import busybox as busyboxes
from pagegate.linux import cache, initramfs
from pagegate.testbed.progress import Silent

from . import linux_parts as parts
from .linux_parts import KERNEL, RELEASE, Offer, largest_file, left, needs_dpkg
from .testbed_parts import own_surroundings, write_program


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path, monkeypatch):
    own_surroundings(tmp_path, monkeypatch)


@pytest.fixture
def offer(tmp_path, monkeypatch):
    return Offer(tmp_path, monkeypatch)


def guest(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagegate", "guest", *map(str, words)],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=60,
    )


class TestBusybox:
    def test_that_of_the_host(self, tmp_path, monkeypatch):
        program = write_program(tmp_path / "path" / "busybox", "")
        program.write_bytes(parts.busybox())
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        assert busyboxes.find_busybox(None, Silent()) == program

    @needs_dpkg
    @pytest.mark.parametrize("directory", ["bin", "usr/bin"])
    def test_the_package_s_where_the_host_s_is_not_static(self, offer, tmp_path, directory):
        program = write_program(tmp_path / "path" / "busybox", "")
        program.write_bytes(parts.busybox(interpreter=True))
        offer("busybox-static", {f"{directory}/busybox": parts.busybox(), "usr/share/x": b""})
        got = busyboxes.find_busybox(None, Silent())
        assert got == cache.cache_directory() / "busybox"
        assert busyboxes.contents(got) == (parts.busybox(), ["bin/sh", "usr/bin/[", "bin/mount", "sbin/insmod"])
        assert left() == ["busybox", "lock"]
        before = offer.calls()
        assert busyboxes.find_busybox(None, Silent()) == got
        assert offer.calls() == before

    @needs_dpkg
    def test_the_package_has_none(self, offer, tmp_path):
        write_program(tmp_path / "path" / "busybox", "#!/bin/sh\n")
        with pytest.raises(NotSupported, match="apt offers no busybox-static: .*--busybox"):
            busyboxes.find_busybox(None, Silent())
        offer("busybox-static", {"bin/busybox": "/bin/sh"})
        with pytest.raises(NotSupported, match="has no static busybox"):
            busyboxes.find_busybox(None, Silent())

    def test_there_is_none(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(NotSupported, match=r"^this host has no apt: install the package busybox-static, or name"):
            busyboxes.find_busybox(None, Silent())

    def test_a_named_one(self, tmp_path):
        named = write_program(tmp_path / "bb", "")
        for data, message in ((parts.busybox(interpreter=True), "dynamic loader"), (b"#!/bin/sh\n", "no 64-bit ELF")):
            named.write_bytes(data)
            with pytest.raises(ValueError, match=message):
                busyboxes.find_busybox(named, Silent())
        named.write_bytes(parts.busybox())
        assert busyboxes.find_busybox(named, Silent()) == named
        assert busyboxes.contents(named)[1]
        named.write_bytes(parts.busybox("bin/true\n"))
        with pytest.raises(ValueError, match="does not list its applets"):
            busyboxes.contents(named)
        named.chmod(0o644)
        with pytest.raises(NotSupported, match="does not run on this host: Permission denied"):
            busyboxes.contents(named)


class TestInitramfs:
    @pytest.fixture
    def make(self, tmp_path):
        """Make an initrd with a busybox that is made up, and return its entries."""
        busybox = write_program(tmp_path / "made-up", "")
        busybox.write_bytes(parts.busybox())

        def make(**options):
            return parts.entries(initramfs.build(busybox=busybox, compress=False, **options))

        make.busybox = busybox
        return make

    @staticmethod
    def init(made):
        return made["init"].data.decode().splitlines()

    def test_a_shell(self, make):
        made = make()
        assert self.init(made)[-3:] == ["setsid cttyhack sh", 'echo "pagegate: exit status $?"', "poweroff -f"]
        assert self.init(made)[0] == "#!/bin/busybox sh"
        assert made["init"].mode == 0o100755
        assert made["bin/busybox"] == (0o100755, parts.busybox(), (0, 0))
        assert made["usr/bin/["] == (0o120777, b"/bin/busybox", (0, 0))
        assert made["dev/console"].device == (5, 1)
        assert "script" not in made
        assert not any("etc/x" in name for name in made), "applets outside of the known directories"

    def test_a_command(self, make):
        made = make(command="echo 'a b'; exit 3")
        assert made["script"].data == b"echo 'a b'; exit 3\n"
        assert self.init(made)[-3] == "sh /script"

    @pytest.mark.parametrize(
        ("script", "line"), [(b"#!/bin/awk -f\n", "/script"), (parts.busybox(), "/script"), (b"true\n", "sh /script")]
    )
    def test_a_script(self, make, script, line):
        made = make(script=script)
        assert made["script"] == (0o100755, script, (0, 0))
        assert self.init(made)[-3] == line

    def test_a_root_file_system(self, make):
        made = make(root=True)
        assert self.init(made)[-1] == 'exec switch_root /sysroot "$init" "$@"'
        assert "poweroff" not in made["init"].data.decode()
        assert "script" not in made
        with pytest.raises(ValueError, match="exclude each other"):
            make(root=True, command="x")

    def test_modules(self, make, tmp_path):
        for name, needs in {"a": "b-c", "b_c": ""}.items():
            path = tmp_path / "lib/modules" / RELEASE / f"{name}.ko"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(parts.module(f"depends={needs}"))
        (tmp_path / "vmlinuz").write_bytes(parts.image(RELEASE))
        made = make(modules=["a"], kernel=tmp_path / "vmlinuz")
        assert [line.split()[1] for line in self.init(made) if line.startswith("insmod")] == [
            *("/lib/modules/b_c.ko", "/lib/modules/a.ko")
        ]
        assert made["lib/modules/a.ko"].data == parts.module("depends=b-c")
        assert any("/dev/console" in line for line in self.init(made)), "the console may be a module's"
        assert made == make(modules=["a"], modules_directory=path.parent)
        with pytest.raises(ValueError, match="are those of one kernel"):
            make(modules=["a"])
        with pytest.raises(ValueError, match="name one of them"):
            make(kernel=path, modules_directory=path.parent)

    def test_files(self, make, tmp_path):
        program = write_program(tmp_path / "program", "x")
        made = make(files={"/root/data": b"1", "/bin/sh": program, "/opt/tool/it": program})
        assert made["root/data"] == (0o100644, b"1", (0, 0))
        assert made["opt/tool/it"] == made["bin/sh"] == (0o100755, b"x", (0, 0))
        for path, message in {
            "/init": "already something",
            "/bin/busybox/x": "no directory",
            "data": "no path",
        }.items():
            with pytest.raises(ValueError, match=message):
                make(files={path: b""})
        with pytest.raises(ValueError, match="only files can be put"):
            make(files={"/root/dev": Path("/dev/zero")})

    def test_the_same_again(self, make):
        made = [initramfs.build(command="x", busybox=make.busybox) for _ in range(2)]
        assert made[0] == made[1]
        assert parts.entries(gzip.decompress(made[0])) == make(command="x")
        path = linux.write(made[0])
        assert path == linux.write(made[1])
        assert path.parent == cache.cache_directory()
        assert path != linux.write(made[0] + b"x")

    def test_it_is_written_in_one_step(self, tmp_path):
        target = tmp_path / "out" / "x.img"
        target.parent.mkdir()
        target.write_bytes(b"before")
        with largest_file(1000), pytest.raises(OSError, match="File too large"):
            linux.write(bytes(10_000), target)
        assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("x.img", b"before")]
        (target.parent / "link").symlink_to("x.img")
        linux.write(b"after", target.parent / "link")
        assert target.read_bytes() == b"after"
        with pytest.raises(OSError, match="No space left"):
            linux.write(b"x", Path("/dev/full"))


class TestCommand:
    @needs_dpkg
    def test_fetch_prints_one_line(self, tmp_path):
        file = parts.deb(tmp_path / "x.deb", {**KERNEL, f"boot/config-{RELEASE}": b"CONFIG_KVM_GUEST=y\n"})
        done = guest("fetch", "--deb", file, COLUMNS="40")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        assert Path(line).read_bytes() == parts.image(RELEASE)
        assert f"{RELEASE} is built without CONFIG_AMD_MEM_ENCRYPT:" in done.stderr

    def test_fetch_without_apt(self):
        done = guest("fetch", PATH="/nonexistent")
        assert (done.returncode, done.stdout) == (3, "")
        assert "this host has no apt: bring a bzImage" in done.stderr
        assert "/boot/vmlinuz-$(uname -r)" in done.stderr
        assert "CONFIG_AMD_MEM_ENCRYPT and CONFIG_KVM_GUEST" in done.stderr

    def test_fetch_usage(self, tmp_path):
        (tmp_path / "x.deb").write_text("no")
        done = guest("fetch", "--deb", tmp_path / "x.deb")
        assert (done.returncode, done.stdout) == (2, "")
        assert "is no Debian package" in done.stderr

    def test_a_cache_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        done = guest("fetch", XDG_CACHE_HOME=str(tmp_path / "file"))
        assert done.returncode == 1
        assert done.stderr.startswith(f"pagegate: {tmp_path}/file/pagegate")

    def test_initramfs(self, tmp_path):
        busybox = write_program(tmp_path / "bb", "")
        busybox.write_bytes(parts.busybox())
        (tmp_path / "a:b").write_text("data")
        (tmp_path / "s").write_text("#!/bin/sh\n")
        common = ("initramfs", "--busybox", busybox, "--file", f"{tmp_path}/a:b:/root/it")
        done = guest(*common, "--script", tmp_path / "s", "--uncompressed", "-o", "out.img")
        assert (done.returncode, done.stdout) == (0, "out.img\n"), done.stderr
        made = parts.entries(Path("out.img").read_bytes())
        assert (made["root/it"].data, made["script"].data) == (b"data", b"#!/bin/sh\n")
        done = guest(*common, "--exec", "true", COLUMNS="40")
        assert parts.entries(gzip.decompress(Path(done.stdout.rstrip("\n")).read_bytes()))["script"].data == b"true\n"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--shell", "--exec", "x"), "exclude each other"),
            (("--root", "--exec", "x"), "exclude each other"),
            (("--module", "a"), "name it with --kernel"),
            (("--file", "a"), "is no HOST:GUEST"),
            (("--file", "a:b"), "is no HOST:GUEST"),
            (("--file", "a:/b", "--file", "c:/b"), "/b is given twice"),
            (("--modules-dir", "/", "--module", "no"), "there is no module 'no'"),
        ],
    )
    def test_initramfs_usage(self, tmp_path, words, message):
        if "/" in words:
            words = ("--modules-dir", tmp_path, *words[2:])
        done = guest("initramfs", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr

    @pytest.mark.parametrize("words", [(), ("fetch",), ("initramfs",)])
    def test_help(self, words):
        done = guest(*words, "--help", COLUMNS="40")
        assert done.returncode == 0
        assert max(map(len, done.stdout.splitlines())) <= 50, "the least that click wraps to"
