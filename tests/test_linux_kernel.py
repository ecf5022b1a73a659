"""`pagegate guest fetch`: kernels through a stand-in for apt, and from packages that are made up."""

import pytest
from pagegate import linux
from pagegate.errors import NotSupported
from pagegate.linux import cache, kernel, packages

from . import linux_parts as parts
from .linux_parts import KERNEL, RELEASE, Offer, largest_file, left, needs_dpkg
from .testbed_parts import own_surroundings


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path, monkeypatch):
    own_surroundings(tmp_path, monkeypatch)


@pytest.fixture
def offer(tmp_path, monkeypatch):
    return Offer(tmp_path, monkeypatch)


@needs_dpkg
class TestFetch:
    def test_debian(self, offer):
        offer("linux-image-generic", {})
        offer("linux-image-cloud-amd64", {}, depends=f"linux-image-{RELEASE} (= 1:6.1-2)")
        offer(f"linux-image-{RELEASE}", KERNEL, depends="kmod, linux-base (>= 4.3~), initramfs-tools | dracut")
        got = linux.fetch()
        assert got.image == cache.cache_directory() / f"{RELEASE}_1-6.1-2" / "vmlinuz"
        assert got.image.read_bytes() == parts.image(RELEASE)
        assert got.release == RELEASE
        assert got.lacks == ()
        assert got.modules == got.image.parent / "lib/modules" / RELEASE
        everything = sorted(str(path.relative_to(got.image.parent)) for path in got.image.parent.rglob("*"))
        assert everything == [
            *("config", "lib", "lib/modules", f"lib/modules/{RELEASE}"),
            *(f"lib/modules/{RELEASE}/kernel", f"lib/modules/{RELEASE}/kernel/virtio_blk.ko", "vmlinuz"),
        ]
        assert left() == [got.image.parent.name, "by-request", "lock"]

    def test_the_second_time_nothing_is_asked(self, offer, monkeypatch):
        self.test_debian(offer)
        before = offer.calls()
        monkeypatch.setenv("PATH", "/nonexistent")
        assert linux.fetch().release == RELEASE
        assert offer.calls() == before

    def test_update(self, offer):
        self.test_debian(offer)
        offer("linux-image-cloud-amd64", {}, depends="linux-image-6.1.0-8", version="6.1-3")
        offer("linux-image-6.1.0-8", {"boot/vmlinuz-6.1.0-8": parts.image("6.1.0-8")}, version="6.1-3")
        assert linux.fetch().release == RELEASE
        new = linux.fetch(update=True)
        assert (new.release, new.modules, new.lacks) == ("6.1.0-8", None, ())
        assert linux.fetch() == linux.fetch(update=True) == new

    def test_ubuntu(self, offer):
        """The modules are a package of their own, and the image is for root only."""
        image = f"linux-image-unsigned-{RELEASE} | linux-image-{RELEASE}"
        offer("linux-image-virtual", {}, depends=f"{image}, linux-modules-extra-{RELEASE}, linux-firmware")
        offer(f"linux-image-{RELEASE}", {f"boot/vmlinuz-{RELEASE}": parts.image(RELEASE)},
              depends=f"linux-modules-{RELEASE}")  # fmt: skip
        offer(f"linux-modules-{RELEASE}", {name: data for name, data in KERNEL.items() if "vmlinuz" not in name})
        got = linux.fetch()
        assert got.modules is not None
        assert got.lacks == ()
        assert [file.name for file in (got.modules / "kernel").iterdir()] == ["virtio_blk.ko"]
        assert not any("extra" in call for call in offer.calls())

    def test_the_image_among_the_modules(self, offer):
        """As in Debian's later packages."""
        modules = f"usr/lib/modules/{RELEASE}"
        offer("linux-image-cloud-amd64", {}, depends="linux-base-7, linux-binary-7")
        offer("linux-base-7", {f"{modules}/config": b"CONFIG_KVM_GUEST=y\n", f"{modules}/modules.builtin": b""})
        offer("linux-binary-7", {f"{modules}/vmlinuz": parts.image(RELEASE)})
        got = linux.fetch()
        assert [path.name for path in got.modules.iterdir()] == ["modules.builtin"]
        assert got.lacks == ("CONFIG_AMD_MEM_ENCRYPT",)

    def test_a_package_by_its_name(self, offer):
        self.test_debian(offer)
        offer("linux-image-mine", {"boot/vmlinuz-9": parts.image("9.1-mine")})
        assert linux.fetch(package="linux-image-mine").release == "9.1-mine"
        assert linux.fetch().release == RELEASE
        with pytest.raises(ValueError, match="no package's name"):
            linux.fetch(package="-o=x")
        with pytest.raises(NotSupported, match=r"^apt offers no linux-image-yours: run apt-get update.*bzImage"):
            linux.fetch(package="linux-image-yours")

    def test_apt_offers_none(self, offer):
        with pytest.raises(NotSupported, match=r"^apt offers no linux-image-cloud-amd64 or .*CONFIG_AMD_MEM_ENCRYPT"):
            linux.fetch()
        offer("linux-image-cloud-amd64", {}, depends="linux-image-5")
        with pytest.raises(NotSupported, match="apt offers no linux-image-5, which linux-image-cloud-amd64 needs"):
            linux.fetch()
        assert left() == ["lock"]

    def test_packages_that_need_each_other_or_too_many(self, offer):
        offer("linux-image-cloud-amd64", {}, depends="linux-image-1")
        offer("linux-image-1", KERNEL, depends="linux-image-cloud-amd64, linux-image-1")
        assert linux.fetch().release == RELEASE
        for number in range(1, 20):
            offer(f"linux-image-{number}", {}, depends=f"linux-image-{number + 1}")
        with pytest.raises(NotSupported, match="needs more than 16 packages"):
            linux.fetch(update=True)

    def test_the_download_fails(self, offer):
        offer("linux-image-cloud-amd64", {})
        offer.lose("linux-image-cloud-amd64")
        with pytest.raises(NotSupported) as caught:
            linux.fetch()
        assert str(caught.value) == "linux-image-cloud-amd64 cannot be downloaded:\n  E: 404  Not Found"
        assert left() == ["lock"]

    def test_a_suite_that_is_none(self, offer):
        with pytest.raises(NotSupported, match="no Debian suite"):
            linux.fetch(suite="No Suite")

    def test_the_testbed_is_not_recommended(self, offer):
        """The remedy of the testbed's own messages is for its kernel."""
        with pytest.raises(NotSupported, match="bring a bzImage") as caught:
            linux.fetch(suite="trixie")
        assert "PAGEGATE_TESTBED_KERNEL" not in str(caught.value)

    def test_what_a_killed_process_left_is_removed(self, offer):
        (cache.cache_directory() / ".partial-abc" / "tree").mkdir(parents=True)
        self.test_debian(offer)

    def test_an_image_that_was_deleted_is_got_again(self, offer):
        self.test_debian(offer)
        (cache.cache_directory() / f"{RELEASE}_1-6.1-2" / "vmlinuz").unlink()
        self.test_debian(offer)


@needs_dpkg
class TestDeb:
    """Packages that are given as files."""

    def test_one(self, tmp_path):
        file = parts.deb(tmp_path / "odd name's;\n$(x).deb", KERNEL)
        got = linux.fetch(debs=[file])
        assert got.release == RELEASE
        assert linux.fetch(debs=[file]) == got
        other = linux.fetch(debs=[parts.deb(tmp_path / "b.deb", {**KERNEL, f"boot/config-{RELEASE}": b"#\n"})])
        assert other.image != got.image
        assert other.lacks == kernel.NEEDED

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"usr/bin/x": b""}, "no kernel is in it"),
            ({"boot/vmlinuz-1": parts.image(), "boot/vmlinuz-2": parts.image()}, "2 kernels are in it"),
            ({"boot/vmlinuz-1": b"\x7fELF"}, "no x86 kernel image"),
            ({"boot/vmlinuz-1": parts.image("../../x")}, "no x86 kernel image"),
            ({"boot/vmlinuz-1": parts.image("6" * 80)}, "no x86 kernel image"),
        ],
    )
    def test_none_of_a_kernel(self, tmp_path, files, message):
        with pytest.raises(ValueError, match=message):
            linux.fetch(debs=[parts.deb(tmp_path / "x.deb", files)])
        assert left() == ["lock"]

    def test_no_package(self, tmp_path):
        (tmp_path / "x.deb").write_text("<html>")
        with pytest.raises(ValueError, match="is no Debian package"):
            linux.fetch(debs=[tmp_path / "x.deb"])
        (tmp_path / "x.deb").write_bytes(b"!<arch>\n and then nothing")
        with pytest.raises(NotSupported, match=r"^.*x\.deb cannot be unpacked:\n  dpkg-deb: error: "):
            linux.fetch(debs=[tmp_path / "x.deb"])
        with pytest.raises(ValueError, match="is no file"):
            linux.fetch(debs=[tmp_path])
        with pytest.raises(FileNotFoundError):
            linux.fetch(debs=[tmp_path / "nothing"])
        with pytest.raises(ValueError, match="are for apt"):
            linux.fetch(debs=[tmp_path / "x.deb"], suite="trixie")

    def test_links_lead_nowhere(self, tmp_path):
        """A package's links are neither followed nor kept."""
        mine = tmp_path / "mine"
        (mine / RELEASE).mkdir(parents=True)
        (mine / RELEASE / "secret").write_text("secret")
        (mine / "vmlinuz").write_bytes(parts.image(RELEASE))
        with pytest.raises(ValueError, match="no kernel is in it"):
            linux.fetch(debs=[parts.deb(tmp_path / "a.deb", {"boot/vmlinuz-1": str(mine / "vmlinuz")})])
        files = {"boot/vmlinuz-1": parts.image(RELEASE), "lib/modules": str(mine), "boot/config-1": str(mine / "x")}
        assert linux.fetch(debs=[parts.deb(tmp_path / "b.deb", files)]).modules is None
        assert (mine / RELEASE / "secret").read_text() == "secret"

    def test_a_package_that_is_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(packages, "LARGEST", 2048)
        with pytest.raises(NotSupported, match="cannot be unpacked"):
            linux.fetch(debs=[parts.deb(tmp_path / "x.deb", KERNEL)])
        assert left() == ["lock"]

    def test_a_full_disk(self, tmp_path):
        file = parts.deb(tmp_path / "x.deb", {**KERNEL, "usr/lib/large": bytes(100_000)})
        with largest_file(50_000), pytest.raises(NotSupported, match="cannot be unpacked"):
            linux.fetch(debs=[file])
        assert left() == ["lock"]
        assert linux.fetch(debs=[file]).release == RELEASE

    def test_files_that_nobody_may_read(self, tmp_path):
        got = linux.fetch(debs=[parts.deb(tmp_path / "x.deb", KERNEL, mode=0)])
        assert got.image.stat().st_mode & 0o777 == 0o644
