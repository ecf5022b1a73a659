"""Building the testbed's kernel, with stand-ins for apt and make."""

import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from pagegate import testbed
from pagegate.errors import TestbedError
from pagegate.testbed import apt, builder, kernel, progress
from rich.progress import Progress

from .testbed_parts import leaves_nothing_behind, own_surroundings, write_image, write_program


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path, monkeypatch):
    own_surroundings(tmp_path, monkeypatch)


APT_CACHE = """#!/bin/sh
case "$*" in
*search*) cat "$FAKE_PACKAGES" ;;
*policy*) echo "pkg:"; echo "  Installed: (none)"; echo "  Candidate: 9.9-1" ;;
esac
"""


class TestSource:
    @pytest.fixture
    def offer(self, tmp_path, monkeypatch):
        """Have the stand-in for apt offer these packages."""
        write_program(tmp_path / "path" / "apt-cache", APT_CACHE)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_PACKAGES", str(tmp_path / "packages"))

        def offer(*packages):
            (tmp_path / "packages").write_text("".join(f"{package} - Linux kernel source\n" for package in packages))

        return offer

    def test_the_preferred_or_the_newest(self, offer):
        offer("linux-source-6.1", "linux-source-7.3", "linux-source-7.12")
        assert builder.choose_source() == kernel.Source("linux-source-7.3", "9.9-1")
        offer("linux-source-6.12", "linux-source-6.1", "linux-source-6.9")
        assert builder.choose_source().package == "linux-source-6.12"
        offer("linux-source-7.9", "linux-source-7.12", "linux-source-6.12")
        assert builder.choose_source().package == "linux-source-7.12"

    def test_none_is_new_enough(self, offer):
        offer("linux-source-6.1")
        with pytest.raises(TestbedError, match=r"apt offers no linux-source of 6\.12 or later: .*--suite"):
            builder.choose_source()

    def test_of_one_series(self, offer):
        offer("linux-source-6.12", "linux-source-7.3")
        assert builder.choose_source(series=(6, 12)).package == "linux-source-6.12"
        with pytest.raises(TestbedError, match=r"apt offers no linux-source-7\.1:"):
            builder.choose_source(series=(7, 1))

    def test_apt_fails(self, offer, tmp_path):
        offer()
        write_program(tmp_path / "path" / "apt-cache", "#!/bin/sh\necho W: hm >&2; echo 'E: no lists' >&2; exit 100\n")
        with pytest.raises(TestbedError, match=r"^apt-cache failed: no lists$"):
            builder.choose_source()

    def test_a_suite_by_its_name(self):
        with pytest.raises(TestbedError, match="no Debian suite"):
            builder.choose_source("http://example.org trixie")


# Stands in for apt-get. The host's package lists are $FAKE_APT/targets; an update with the host's sources gets
# $FAKE_APT/fetched, and one with sources of its own fails if they name an archive that $FAKE_APT/refused lists.
APT_GET = """#!/bin/sh
echo "$*" >>"$FAKE_APT/calls"
lists=$FAKE_APT parts=
for word; do
    case $word in
    Dir::State::Lists=*) lists=${word#*=} ;;
    Dir::Etc::SourceParts=*) parts=${word#*=} ;;
    esac
done
case " $* " in
*" indextargets "*)
    if [ -e "$lists/targets" ]; then cat "$lists/targets"; fi ;;
*" update "*)
    if [ -z "$parts" ]; then
        cp "$FAKE_APT/fetched" "$lists/targets"
    elif [ -e "$FAKE_APT/refused" ] && grep -qFf "$FAKE_APT/refused" "$parts"/*; then
        echo "E: there is no Release file" >&2
        echo "E: The list of sources is of no use" >&2
        exit 100
    fi ;;
*" --print-uris "*)
    echo "'somewhere' linux-source.deb 3000000 SHA256:0" ;;
*" download "*)
    echo deb >linux-source.deb ;;
esac
"""


class TestSuite:
    """A suite that apt is not set up for."""

    @pytest.fixture
    def host(self, tmp_path, monkeypatch):
        """The files and variables that the stand-ins for apt's programs read."""
        host = tmp_path / "apt"
        host.mkdir()
        (host / "packages").write_text("linux-source-7.3 - Linux kernel source\n")
        write_program(tmp_path / "path" / "apt-cache", APT_CACHE)
        write_program(tmp_path / "path" / "apt-get", APT_GET)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_PACKAGES", str(host / "packages"))
        monkeypatch.setenv("FAKE_APT", str(host))
        return host

    @staticmethod
    def target(uri: str, entry: object, origin: str = "Debian", component: str = "main") -> str:
        return "\t".join([origin, origin, "deb", "Packages", component, uri.rstrip("/"), uri, str(entry)]) + "\n"

    @staticmethod
    def sources(suite: str = "trixie-backports") -> tuple[str, str]:
        """Name and text of the sources file with which apt fetched the suite."""
        (file,) = (kernel.cache_directory() / "apt" / suite / "parts").iterdir()
        return file.name, file.read_text()

    def test_a_line_of_the_sources(self, host):
        entries = host / "debian.list"
        entries.write_text(
            "# a comment\ndeb http://other.test/ubuntu noble main\n"
            "deb  [ arch=amd64 signed-by=/the/key ] http://mirror.test/debian bookworm main contrib # ours\n"
        )
        (host / "targets").write_text(
            self.target("http://other.test/ubuntu/", f"{entries}:2", "Ubuntu")
            + self.target("http://mirror.test/debian/", f"{entries}:3", component="contrib")
            + self.target("http://mirror.test/debian/", f"{entries}:3")
        )
        assert apt.choose_source("trixie-backports") == kernel.Source("linux-source-7.3", "9.9-1")
        assert self.sources() == (
            "archive.list",
            "deb [ arch=amd64 signed-by=/the/key ] http://mirror.test/debian/ trixie-backports main\n",
        )

    def test_a_line_without_options(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "targets").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        apt.choose_source("trixie-backports")
        assert self.sources()[1].split() == ["deb", "http://mirror.test/debian/", "trixie-backports", "main"]

    def test_a_stanza_of_the_sources(self, host):
        entries = host / "debian.sources"
        entries.write_text(
            "# Comments are\n\n# no stanzas.\n\n"
            "Enabled: no\nTypes: deb\nURIs: http://first.test/debian\nSuites: bookworm\nComponents: main\n\n\n"
            "Types: deb deb-src\n# a comment\nURIs: http://broken.test/debian\n http://mirror.test/debian\n"
            "Suites: bookworm\n bookworm-updates\nComponents: main contrib\nCheck-Valid-Until: no\n"
            "signed-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\n"
            "Types: deb\nURIs: http://third.test/debian\nSuites: x\nComponents: main\nTrusted: yes\n"
        )
        (host / "targets").write_text(self.target("http://mirror.test/debian/", f"{entries}:2"))
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert self.sources() == (
            "archive.sources",
            "Types: deb\nURIs: http://mirror.test/debian/\nSuites: trixie-backports\nComponents: main\n"
            "Check-Valid-Until: no\nsigned-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n",
        )

    def test_the_host_s_apt_stays_as_it_is(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "targets").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        apt.choose_source("trixie-backports")
        (update,) = [call for call in (host / "calls").read_text().splitlines() if call.endswith(" update")]
        own = kernel.cache_directory() / "apt" / "trixie-backports"
        for place in ("Dir::State::Lists=", "Dir::State::Status=", "Dir::Cache=", "Dir::Etc::SourceParts="):
            assert f"-o {place}{own}" in update
        assert "-o Dir::Etc::SourceList=/dev/null" in update
        assert "#clear APT::Update::Post-Invoke;\n" in (own / "apt.conf").read_text()
        assert f"-c {own}/apt.conf " in update

    def test_another_archive_where_the_first_lacks_it(self, host):
        (host / "debian.list").write_text("deb http://a.test/debian sid main\ndeb http://b.test/debian sid main\n")
        (host / "targets").write_text(
            self.target("http://a.test/debian/", host / "debian.list:1")
            + self.target("http://b.test/debian/", host / "debian.list:2")
        )
        (host / "refused").write_text("http://a.test/\n")
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert "http://b.test/debian/" in self.sources()[1]

    def test_no_archive_has_it(self, host):
        self.test_another_archive_where_the_first_lacks_it(host)
        (host / "refused").write_text("http://a.test/\nhttp://b.test/\n")
        with pytest.raises(TestbedError) as caught:
            apt.choose_source("trixie-backports")
        assert str(caught.value).splitlines() == [
            "trixie-backports cannot be fetched from any Debian archive that apt's sources name:",
            "  http://a.test/debian: apt-get failed: there is no Release file",
            "  http://b.test/debian: apt-get failed: there is no Release file",
            "name a suite that is there with --suite, add an archive that has trixie-backports to apt's sources, or "
            "build the kernel on another Debian machine and name its image with --kernel or PAGEGATE_TESTBED_KERNEL",
        ]

    def test_the_archive_has_it_without_a_kernel(self, host):
        self.test_another_archive_where_the_first_lacks_it(host)
        (host / "packages").write_text("linux-source-6.1 - Linux kernel source\n")
        message = r"^trixie-backports of http://b.test/debian offers no linux-source of 6\.12 or later: .*--kernel"
        with pytest.raises(TestbedError, match=message):
            apt.choose_source("trixie-backports")

    def test_no_debian_archive(self, host):
        (host / "targets").write_text(self.target("http://other.test/ubuntu/", "/nowhere:1", "Ubuntu"))
        with pytest.raises(TestbedError, match="lists of http://other.test/ubuntu only: .* --kernel or PAGEGATE"):
            apt.choose_source("trixie-backports")

    def test_a_host_that_has_no_lists(self, host):
        (host / "debian.list").write_text("deb http://mirror.test/debian bookworm main\n")
        (host / "fetched").write_text(self.target("http://mirror.test/debian/", host / "debian.list:1"))
        assert apt.choose_source("trixie-backports").package == "linux-source-7.3"
        assert "http://mirror.test/debian/" in self.sources()[1]

    def test_a_host_that_can_get_no_lists(self, host):
        with pytest.raises(TestbedError, match=r"apt can get none \(apt-get update says why\):"):
            apt.choose_source("trixie-backports")
        assert " update" in (host / "calls").read_text()

    @pytest.mark.skipif(shutil.which("xz") is None, reason="needs xz, which unpacks the source")
    def test_the_source_is_downloaded_and_unpacked_once(self, host, tmp_path):
        self.test_a_line_without_options(host)
        (tmp_path / "linux-source-7.3").mkdir()
        (tmp_path / "linux-source-7.3" / "Makefile").write_text("VERSION = 7\n")
        with tarfile.open(tmp_path / "linux-source-7.3.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / "linux-source-7.3", "linux-source-7.3")
        with tarfile.open(tmp_path / "content.tar", "w") as archive:
            archive.add(tmp_path / "linux-source-7.3.tar.xz", "./usr/src/linux-source-7.3.tar.xz")
        write_program(tmp_path / "path" / "dpkg-deb", f'#!/bin/sh\ncat "{tmp_path}/content.tar"\n')
        source = kernel.Source("linux-source-7.3", "9.9-1")
        tree = builder.unpacked_source(source, "trixie-backports", progress.Silent())
        assert (tree / "Makefile").read_text() == "VERSION = 7\n"
        (download,) = [call for call in (host / "calls").read_text().splitlines() if "--quiet download" in call]
        assert f"Dir::State::Lists={kernel.cache_directory()}/apt/trixie-backports/lists" in download
        assert download.endswith(" linux-source-7.3=9.9-1")
        assert builder.unpacked_source(source, "trixie-backports", progress.Silent()) == tree
        assert (host / "calls").read_text().count("--quiet download") == 1

    def test_no_host_is_named_in_the_code(self):
        for file in Path(apt.__file__).parent.iterdir():
            if file.is_file():
                assert "://" not in file.read_text(), file


class TestBuild:
    source = kernel.Source("linux-source-7.3", "7.3.4-1")

    @pytest.fixture
    def make(self, tmp_path, monkeypatch):
        """A stand-in for make, with the source unpacked and chosen. Returns the targets it was called with so far."""
        tree = kernel.cache_directory() / "sources" / self.source.name
        write_program(tree / "scripts/kconfig/merge_config.sh", "#!/bin/sh\n")
        config = "".join(f"CONFIG_{name}=y\n" for name in builder._NEEDED)
        (tmp_path / "config").write_text(config)
        write_image(tmp_path / "image")
        program = f"""#!/bin/sh
            for word; do case $word in O=*) objects=${{word#O=}} ;; esac; done
            echo "$word" >>{tmp_path}/made
            case $word in
            olddefconfig) cp {tmp_path}/config $objects/.config ;;
            bzImage)
                echo '  CC      init/main.o'
                test -e {tmp_path}/fails && {{ echo 'main.c: error: no'; exit 2; }}
                mkdir -p $objects/arch/x86/boot; cp {tmp_path}/image $objects/arch/x86/boot/bzImage ;;
            esac
        """
        write_program(tmp_path / "path" / "make", program)
        monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
        monkeypatch.setattr(builder, "require_tools", lambda: None)
        monkeypatch.setattr(builder, "choose_source", lambda *_: self.source)
        return lambda: (tmp_path / "made").read_text().split() if (tmp_path / "made").exists() else []

    def test_it_builds_once(self, make):
        image = testbed.build()
        assert image == testbed.find_kernel()
        assert make() == ["tinyconfig", "olddefconfig", "bzImage"]
        assert testbed.build() == image
        assert make() == ["tinyconfig", "olddefconfig", "bzImage"]

    def test_a_failed_build_is_none_and_goes_on_where_it_was(self, make, tmp_path):
        (tmp_path / "fails").touch()
        with pytest.raises(TestbedError, match=r"make failed with status 2; .*build\.log ends with:\n.*\n.*error: no"):
            testbed.build()
        with pytest.raises(TestbedError, match="no kernel"):
            testbed.find_kernel()
        (tmp_path / "fails").unlink()
        assert testbed.build() == testbed.find_kernel()
        assert make() == ["tinyconfig", "olddefconfig", "bzImage", "bzImage"]

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_no_compiler_is_left_when_this_process_is_ended(self, name, tmp_path):
        program = (
            "from pathlib import Path; from pagegate.testbed import builder\n"
            f"builder.call(['sh', '-c', 'echo $$ >{tmp_path}/pid; sleep 60'], Path('{tmp_path}/log'))\n"
        )
        leaves_nothing_behind(program, tmp_path / "pid", getattr(signal, name))

    def test_a_lost_option_is_named(self, make, tmp_path):
        config = (tmp_path / "config").read_text()
        (tmp_path / "config").write_text(config.replace("CONFIG_KVM_SW_PROTECTED_VM=y", "# nothing"))
        with pytest.raises(TestbedError, match="does not grant CONFIG_KVM_SW_PROTECTED_VM, without which"):
            testbed.build()
        assert "bzImage" not in make()

    def test_what_is_needed_is_asked_for(self):
        assert builder.lost_options(kernel.fragment()) == []

    def test_missing_tools_are_named_together(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        for name in builder._PROGRAMS:
            if name not in ("flex", "bison"):
                write_program(tmp_path / "path" / name, "#!/bin/sh\nexit 1\n")
        with pytest.raises(
            TestbedError, match="needs flex, bison, libelf-dev and libssl-dev: apt-get install flex bison"
        ):
            builder.require_tools()
        for name in builder._PROGRAMS:
            write_program(tmp_path / "path" / name, "#!/bin/sh\nexit 0\n")
        with pytest.raises(TestbedError, match="this host has no apt"):
            builder.require_tools()

    def test_without_a_compiler_the_headers_are_named_too(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert builder.missing_packages() == [*builder._PROGRAMS.values(), "libelf-dev", "libssl-dev"]

    def test_progress_without_a_terminal(self, monkeypatch, capsys):
        clock = iter([0.0, 5.0, 25.0, 50.0])
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        lines = progress.PlainLines(sys.stdout)
        lines.stage("compiling", 100)
        for done in (10, 50, 101):
            lines.reach(done)
        assert capsys.readouterr().out == "compiling\ncompiling: 50 of about 100, 25 s\ncompiling: 101, 50 s\n"
        monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 30.0]).__next__)
        lines.stage("downloading", 70, "MiB")
        lines.reach(40)
        assert capsys.readouterr().out == "downloading\ndownloading: 40 of about 70 MiB, 30 s\n"

    @pytest.mark.parametrize("name", ["Bars", "Silent"])
    def test_progress_elsewhere(self, name):
        shown = progress.Bars(Progress(disable=True)) if name == "Bars" else progress.Silent()
        shown.stage("compiling", 100)
        shown.reach(10)
        shown.stage("linking")
