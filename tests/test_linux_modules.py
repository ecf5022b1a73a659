"""What an initrd is made of: modules in their order, ELF files that are read, and the archive."""

import gzip
import lzma
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagegate.errors import NotSupported
from pagegate.linux import cpio, kernel, modules
from pagegate.linux.elf import is_static, modinfo

from . import linux_parts as parts
from .linux_parts import RELEASE


class TestModules:
    @pytest.fixture
    def directory(self, tmp_path):
        """Modules of which some are compressed, and one is needed by two."""
        root = tmp_path / RELEASE
        (root / "kernel/drivers").mkdir(parents=True)
        made = {
            "kernel/virtio_ring.ko": parts.module("depends="),
            "kernel/virtio.ko.xz": lzma.compress(parts.module("depends=virtio_ring"), lzma.FORMAT_XZ),
            "kernel/drivers/virtio-net.ko.gz": gzip.compress(parts.module("depends=net-failover,virtio,crc32c")),
            "kernel/drivers/net_failover.ko": parts.module(
                "depends=", "softdep=pre: fail-over nothing post: virtio_net"
            ),
            "kernel/drivers/fail_over.ko": parts.module(),
            "kernel/drivers/odd'; name.ko": b"x",
        }
        for name, data in made.items():
            (root / name).write_bytes(data)
        (root / "modules.builtin").write_text("kernel/lib/crc32c.ko\nkernel/ext4/ext4.ko\n")
        return root

    @staticmethod
    def names(directory, *names):
        return [module.name for module in modules.in_order(directory, names)]

    def test_what_a_module_needs_is_loaded_before_it(self, directory):
        expected = ["fail_over", "net_failover", "virtio_ring", "virtio", "virtio_net"]
        assert self.names(directory, "virtio_net") == expected
        assert self.names(directory, "virtio-net", "virtio_net", "ext4", "virtio") == expected
        assert self.names(directory, "virtio", "virtio_net") == [
            *("virtio_ring", "virtio", "fail_over", "net_failover", "virtio_net")
        ]
        assert self.names(directory, "ext4") == self.names(directory) == []

    def test_they_are_decompressed(self, directory):
        made = {module.name: module.data for module in modules.in_order(directory, ["virtio_net"])}
        assert made["virtio"] == parts.module("depends=virtio_ring")
        assert modinfo(made["virtio_net"])["depends"] == ["net-failover,virtio,crc32c"]

    def test_modules_dep_is_believed_too(self, directory):
        (directory / "modules.dep").write_text(
            "kernel/virtio_ring.ko:\nkernel/drivers/fail_over.ko: kernel/virtio.ko.xz kernel/virtio_ring.ko\nrubbish\n"
        )
        assert self.names(directory, "fail_over") == ["virtio_ring", "virtio", "fail_over"]

    def test_a_circle_ends(self, directory):
        (directory / "kernel/virtio_ring.ko").write_bytes(parts.module("depends=virtio"))
        assert self.names(directory, "virtio") == ["virtio_ring", "virtio"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("virtio_nett", r"no module 'virtio_nett' in .*: there is virtio_net, "),
            ("zzz", "no module 'zzz' in .*: name one as virtio_blk, without .ko"),
            ("odd'; name", "no module"),
            ("", "no module ''"),
        ],
    )
    def test_an_unknown_one(self, directory, name, message):
        with pytest.raises(ValueError, match=message):
            modules.in_order(directory, [name])

    def test_one_that_another_needs_is_missing(self, directory):
        (directory / "kernel/virtio_ring.ko").unlink()
        with pytest.raises(ValueError, match=r"^the module virtio needs virtio_ring, which is not in"):
            modules.in_order(directory, ["virtio"])

    @pytest.mark.parametrize(
        ("file", "data", "message"),
        [
            ("a.ko", b"", "no 64-bit ELF file"),
            ("a.ko", parts.module()[:-1], "cut off"),
            ("a.ko", parts.elf({".text": b""}), r"no section \.modinfo"),
            ("a.ko.xz", b"no xz", "cannot be decompressed"),
            ("a.ko.gz", b"no gzip", "cannot be decompressed"),
            ("a.ko.gz", gzip.compress(bytes(5000)), "is larger than"),
            ("a.ko.xz", lzma.compress(bytes(5000)), "is larger than"),
            ("a.ko", bytes(5000), "is larger than"),
        ],
    )
    def test_a_broken_one(self, directory, monkeypatch, file, data, message):
        (directory / file).write_bytes(data)
        if "larger" in message:
            monkeypatch.setattr(modules, "LARGEST", 4000)
        with pytest.raises(ValueError, match=message):
            modules.in_order(directory, ["a"])

    @pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd, which packs the module")
    def test_zstd(self, directory, monkeypatch):
        path = directory / "a.ko.zst"
        path.write_bytes(subprocess.run(["zstd", "-c"], input=parts.module(), capture_output=True, check=True).stdout)
        assert modules.in_order(directory, ["a"])[0].data == parts.module()
        monkeypatch.setattr(modules, "LARGEST", 100)
        with pytest.raises(ValueError, match="is larger than"):
            modules.in_order(directory, ["a"])
        path.write_bytes(b"no zstd")
        with pytest.raises(ValueError, match="zstd failed"):
            modules.in_order(directory, ["a"])

    def test_no_zstd(self, directory, monkeypatch):
        (directory / "a.ko.zst").write_bytes(b"")
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(NotSupported, match="install the package zstd"):
            modules.in_order(directory, ["a"])

    def test_no_directory(self, directory):
        with pytest.raises(ValueError, match="is no directory"):
            modules.in_order(directory / "nowhere", ["a"])

    def test_where_they_are_looked_for(self, tmp_path):
        for place in ("a/vmlinuz", "b/boot/vmlinuz", f"c/usr/lib/modules/{RELEASE}/vmlinuz"):
            image = tmp_path / place
            image.parent.mkdir(parents=True)
            image.write_bytes(parts.image(RELEASE))
            root = tmp_path / place.partition("/")[0]
            expected = root / ("usr/lib" if "c" in place[:1] else "lib") / "modules" / RELEASE
            expected.mkdir(parents=True, exist_ok=True)
            assert kernel.modules_of(image) == expected
        shutil.rmtree(tmp_path / "a/lib")
        with pytest.raises(ValueError, match=f"are not in lib/modules/{RELEASE} beside it"):
            kernel.modules_of(tmp_path / "a/vmlinuz")
        with pytest.raises(ValueError, match="is no file"):
            kernel.modules_of(tmp_path)


class TestElf:
    @given(at=st.integers(0, 400), value=st.binary(min_size=1, max_size=9), cut=st.integers(0, 1000))
    def test_anything_may_be_in_a_file(self, at, value, cut):
        """Nothing but ValueError is raised, whatever is in it."""
        for made in (parts.module("depends=a"), parts.busybox()):
            broken = (made[:at] + value + made[at + len(value) :])[: cut + 64]
            for read in (modinfo, is_static):
                try:
                    read(broken)
                except ValueError:
                    continue

    def test_programs(self):
        assert is_static(parts.busybox())
        assert not is_static(parts.busybox(interpreter=True))
        with pytest.raises(ValueError, match="another processor"):
            is_static(parts.busybox()[:18] + b"\xb7" + parts.busybox()[19:])


class TestCpio:
    def test_round_trip(self):
        archive = cpio.Archive()
        archive.file("/a//b/c", b"12345", executable=True)
        archive.file("/a/d", b"")
        archive.symlink("/bin/sh", "/bin/busybox")
        archive.character_device("/dev/console", 5, 1)
        archive.directory("/a/b")
        archive.directory("/tmp")
        archive.file("/odd 'name'\n\udcff ä", bytes(4096))
        assert parts.entries(archive.to_bytes()) == {
            "a": (0o040755, b"", (0, 0)),
            "a/b": (0o040755, b"", (0, 0)),
            "a/b/c": (0o100755, b"12345", (0, 0)),
            "a/d": (0o100644, b"", (0, 0)),
            "bin": (0o040755, b"", (0, 0)),
            "bin/sh": (0o120777, b"/bin/busybox", (0, 0)),
            "dev": (0o040755, b"", (0, 0)),
            "dev/console": (0o020600, b"", (5, 1)),
            "tmp": (0o040755, b"", (0, 0)),
            "odd 'name'\n\udcff ä": (0o100644, bytes(4096), (0, 0)),
        }

    @pytest.mark.parametrize("program", ["cpio", "busybox"])
    def test_another_reader(self, program):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
        archive = cpio.Archive()
        for size in range(6):
            archive.file(f"/etc/{'x' * size}y", b"z" * size)
        command = ["cpio", "-t"] if program == "cpio" else ["busybox", "cpio", "-t"]
        done = subprocess.run(command, input=archive.to_bytes(), capture_output=True, check=True)
        assert done.stdout.decode().split() == ["etc", *(f"etc/{'x' * size}y" for size in range(6))]

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            *((path, "is no path of a file") for path in ("", "a", "/", "/a/", "/a/../b", "/./a", "/a\0b")),
            ("/" + "a" * 256, "is too long"),
            ("/a" * 2048, "is too long"),
            ("/TRAILER!!!", "how an archive ends"),
            ("/file", "already something"),
            ("/file/x", "/file in the guest is no directory"),
            ("/link/x", "/link in the guest is no directory"),
            ("/etc", "already something"),
        ],
    )
    def test_a_path_that_cannot_be(self, path, message):
        archive = cpio.Archive()
        archive.file("/file", b"")
        archive.symlink("/link", "/etc")
        archive.directory("/etc")
        with pytest.raises(ValueError, match=message):
            archive.file(path, b"")

    def test_too_much(self, monkeypatch):
        monkeypatch.setattr(cpio, "LARGEST", 10)
        archive = cpio.Archive()
        archive.file("/a", bytes(10))
        with pytest.raises(ValueError, match="in all"):
            archive.file("/b", b"1")
